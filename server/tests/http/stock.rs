//! What callers are told when their app holds as much as it may.

use bellwire_server::delivery::{Held, Quota};
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::RuntimeSettings;
use serde_json::{Value, json};

use crate::support::{OTHER_APP, PATIENCE, Reply, Server, Setup, send, start_with};

fn limited(quota: Quota, most: u64) -> RuntimeSettings {
    let mut held = Held::default();
    match quota {
        Quota::Notifications => held.notifications = most,
        Quota::Bytes => held.bytes = most,
        Quota::Devices => held.devices = most,
    }
    let mut settings = RuntimeSettings {
        // So that the last place is the last one.
        shards: 1,
        ..RuntimeSettings::default()
    };
    settings.quotas.default.held = held;
    settings
}

async fn with(settings: RuntimeSettings) -> Server {
    start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await
}

async fn status(server: &Server) -> Value {
    let bearer = format!("Bearer {}", server.key);
    let headers = [("authorization", bearer.as_str())];
    let reply = send(server.operations, "GET", "/v1/status", &headers, b"").await;
    reply.json()
}

/// The status once everything is counted and the app holds so many notifications.
async fn holding(server: &Server, notifications: u64) -> Value {
    let waiting = async {
        loop {
            let status = status(server).await;
            if status["apps_counted"] == true && status["apps"][0]["notifications"] == notifications
            {
                return status["apps"][0].clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap()
}

async fn keyed(server: &Server, key: &str, body: &str) -> Reply {
    let bearer = format!("Bearer {}", server.key);
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        ("idempotency-key", key),
    ];
    send(server.api, "POST", "/v1/pings", &headers, body.as_bytes()).await
}

#[tokio::test]
async fn an_app_with_no_more_room_is_told_which_quota_it_is_and_a_repeat_is_answered() {
    let server = with(limited(Quota::Notifications, 2)).await;
    let (ana, _) = server.device("ana").await;
    let (ben, _) = server.device("ben").await;
    let to = |device| json!({"to": {"device": format!("{device}")}, "body": "ring"}).to_string();
    let first = keyed(&server, "order-1", &to(ana)).await;
    assert_eq!(first.status, 202);
    assert_eq!(keyed(&server, "order-2", &to(ben)).await.status, 202);
    let app = holding(&server, 2).await;
    assert_eq!(
        (&app["notifications_max"], &app["devices"]),
        (&json!(2), &json!(2))
    );
    assert_eq!(
        (&app["devices_max"], &app["bytes_max"]),
        (&json!(0), &json!(0))
    );
    assert!(app["bytes"].as_u64().unwrap() >= 8);

    let refused = keyed(&server, "order-3", &to(ana)).await;
    assert_eq!(refused.problem(), "429 quota_exceeded");
    assert_eq!(refused.header("retry-after"), Some("30"));
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    let wanted = "Notifications that wait in the app: 2, and it may have 2 (quota.notifications)";
    assert!(detail.contains(wanted), "{detail}");
    let again = keyed(&server, "order-1", &to(ana)).await;
    assert_eq!(
        (again.status, &again.json()["id"]),
        (202, &first.json()["id"])
    );

    // A line of a batch is told the same, and only it.
    let (carl, _) = server.device("carl").await;
    let lines = format!("{}\n{}\n", to(carl), r#"{"to":{"user":"nobody"}}"#);
    let bearer = format!("Bearer {}", server.key);
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/x-ndjson"),
    ];
    let batch = send(
        server.api,
        "POST",
        "/v1/pings/batch",
        &headers,
        lines.as_bytes(),
    )
    .await;
    let told = batch.text();
    assert!(told.contains("\"code\":\"quota_exceeded\""), "{told}");
    assert!(told.contains("\"status\":429"), "{told}");
    assert!(told.contains("\"status\":202"), "{told}");

    // Another app has a quota of its own, and a place that is free again is one.
    let other = server.key_with(OTHER_APP, Scopes::PING).await;
    let bearer = format!("Bearer {other}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    let body = r#"{"to":{"user":"nobody"}}"#;
    let reply = send(server.api, "POST", "/v1/pings", &headers, body.as_bytes()).await;
    assert_eq!(reply.status, 202);
    let path = format!("/v1/pings/{}", first.json()["id"].as_str().unwrap());
    assert_eq!(server.ask("DELETE", &path, "").await.status, 200);
    holding(&server, 1).await;
    let several = json!({"to": {"devices": [ana.to_string(), ben.to_string()]}, "body": "ring"});
    let several = server.ask("POST", "/v1/pings", &several.to_string()).await;
    assert_eq!(several.status, 202);
    let rejected = several.json()["rejected"].clone();
    assert_eq!(rejected.as_array().unwrap().len(), 1, "{rejected}");
    assert_eq!(rejected[0]["code"], "quota_exceeded");
    server.stop().await;
}

#[tokio::test]
async fn bytes_and_devices_have_quotas_that_a_reload_moves() {
    let server = with(limited(Quota::Bytes, 10)).await;
    let (ana, _) = server.device("ana").await;
    let body = json!({"to": {"device": ana.to_string()}, "body": "rings"}).to_string();
    assert_eq!(server.ask("POST", "/v1/pings", &body).await.status, 202);
    holding(&server, 1).await;
    let large = json!({"to": {"device": ana.to_string()}, "body": "much too loud"}).to_string();
    let refused = server.ask("POST", "/v1/pings", &large).await;
    assert_eq!(refused.problem(), "429 quota_exceeded");
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(
        detail.contains("and it may have 10 (quota.bytes)"),
        "{detail}"
    );

    server.handle.reload(&limited(Quota::Devices, 1));
    assert_eq!(server.ask("POST", "/v1/pings", &large).await.status, 202);
    let refused = server.ask("POST", "/v1/devices", r#"{"user":"ben"}"#).await;
    assert_eq!(refused.problem(), "429 quota_exceeded");
    let detail = refused.json()["detail"].as_str().unwrap().to_owned();
    assert!(
        detail.contains("Devices of the app: 1, and it may have 1 (quota.devices)"),
        "{detail}"
    );
    let path = format!("/v1/devices/{ana}");
    assert_eq!(server.ask("DELETE", &path, "").await.status, 204);
    let made = server.ask("POST", "/v1/devices", r#"{"user":"ben"}"#).await;
    assert_eq!(made.status, 201);
    let app = holding(&server, 0).await;
    assert_eq!(
        (&app["devices"], &app["devices_max"]),
        (&json!(1), &json!(1))
    );
    server.stop().await;
}
