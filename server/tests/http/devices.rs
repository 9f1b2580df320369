//! Devices and users over HTTP: every refusal at its place, every call as docs/http-api.md tells it.

use bellwire_server::delivery::AppId;
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::{Identity, WhoError};
use serde_json::json;

use crate::support::{OTHER_APP, Reply, Server, send, start, until};

const NOBODY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaa";

async fn patch(server: &Server, path: &str, kind: &str, body: &str) -> Reply {
    let bearer = format!("Bearer {}", server.key);
    let length = body.len().to_string();
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", kind),
        ("content-length", length.as_str()),
    ];
    send(server.api, "PATCH", path, &headers, body.as_bytes()).await
}

#[tokio::test]
async fn a_device_is_changed_by_a_merge_patch_and_mistakes_are_pointed_at() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let path = format!("/v1/devices/{device}");
    let kind = "application/merge-patch+json";
    let long = "x".repeat(256);
    for (body, expected) in [
        ("[]".to_owned(), "400 malformed "),
        ("{".to_owned(), "400 malformed"),
        (r#"{"user":null}"#.to_owned(), "422 unprocessable /user"),
        (r#"{"user":7}"#.to_owned(), "400 malformed /user"),
        (r#"{"user":""}"#.to_owned(), "400 malformed /user"),
        (format!(r#"{{"name":"{long}"}}"#), "400 malformed /name"),
        (r#"{"secret":"mine"}"#.to_owned(), "400 malformed /secret"),
        (
            r#"{"user":"ben","waiting":"burn"}"#.to_owned(),
            "400 malformed /waiting",
        ),
        (
            r#"{"waiting":"keep"}"#.to_owned(),
            "422 unprocessable /waiting",
        ),
    ] {
        let reply = patch(&server, &path, kind, &body).await;
        assert_eq!(reply.problem(), expected, "{body}");
    }
    let reply = patch(&server, &path, "text/plain", "{}").await;
    assert_eq!(reply.problem(), "415 unsupported_media_type Content-Type");
    let reply = patch(&server, &format!("/v1/devices/{NOBODY}"), kind, "{}").await;
    assert_eq!(reply.problem(), "404 unknown_device");

    let reply = patch(&server, &path, kind, r#"{"name":"Ward 4"}"#).await;
    assert_eq!(
        (reply.status, &reply.json()["name"]),
        (200, &json!("Ward 4"))
    );
    let to = json!({"to": {"user": "ana"}}).to_string();
    server.ask("POST", "/v1/pings", &to).await;
    let reply = patch(
        &server,
        &path,
        "application/json",
        r#"{"user":"ben","name":null}"#,
    )
    .await;
    let body = reply.json();
    assert_eq!(
        (
            &body["user"],
            &body["name"],
            &body["revoked"],
            &body["waiting"]
        ),
        (&json!("ben"), &json!(null), &json!(1), &json!(0))
    );
    let to = json!({"to": {"user": "ben"}}).to_string();
    server.ask("POST", "/v1/pings", &to).await;
    let reply = patch(&server, &path, kind, r#"{"user":"cleo","waiting":"keep"}"#).await;
    assert_eq!(
        (&reply.json()["revoked"], &reply.json()["waiting"]),
        (&json!(0), &json!(1))
    );
}

#[tokio::test]
async fn a_secret_is_rotated_and_the_old_one_ends_when_it_was_said() {
    let server = start().await;
    let (device, old) = server.device("ana").await;
    let path = format!("/v1/devices/{device}/secret");
    for (body, expected) in [
        (r#"{"overlap_s":-1}"#, "400 malformed /overlap_s"),
        (r#"{"overlap_s":"1h"}"#, "400 malformed /overlap_s"),
        (r#"{"overlap":1}"#, "400 malformed /overlap"),
        (r#"{"overlap_s":7776001}"#, "422 unprocessable /overlap_s"),
    ] {
        let reply = server.ask("POST", &path, body).await;
        assert_eq!(reply.problem(), expected, "{body}");
    }
    let reply = server.ask("POST", &path, "").await;
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("cache-control"), Some("no-store"));
    let body = reply.json();
    let until_ms = body["previous_until_ms"].as_u64().unwrap();
    assert!(until_ms > server.handle.now_ms() + 86_000_000);
    let look = server
        .ask("GET", &format!("/v1/devices/{device}"), "")
        .await;
    assert_eq!(look.json()["previous_secret_until_ms"], until_ms);
    assert!(!look.text().contains(body["secret"].as_str().unwrap()));
    let knows = async |secret: &str| {
        let who = server.handle.authenticate(device, Identity::Secret(secret));
        who.await.map(drop) != Err(WhoError::Unauthorized)
    };
    let second = body["secret"].as_str().unwrap().to_owned();
    assert!(knows(&old).await && knows(&second).await);

    let reply = server.ask("POST", &path, r#"{"overlap_s":0}"#).await;
    assert!(reply.json().get("previous_until_ms").is_none());
    let third = reply.json()["secret"].as_str().unwrap().to_owned();
    assert!(!knows(&old).await && !knows(&second).await && knows(&third).await);
}

#[tokio::test]
async fn lists_and_users_show_who_is_there_and_what_waits() {
    let server = start().await;
    let (here, secret) = server.device("ana m/c").await;
    let (away, _) = server.device("ana m/c").await;
    let attached = server.attach(here, &secret).await;
    let to = json!({"to": {"device": away.to_string()}}).to_string();
    server.ask("POST", "/v1/pings", &to).await;

    let list = async |query: &str| {
        let reply = server.ask("GET", &format!("/v1/devices?{query}"), "").await;
        let devices = reply.json()["devices"].as_array().unwrap().clone();
        let ids = devices
            .iter()
            .map(|device| device["device"].as_str().unwrap().to_owned());
        ids.collect::<Vec<_>>()
    };
    assert_eq!(list("attached=true").await, [here.to_string()]);
    assert_eq!(list("attached=false").await, [away.to_string()]);
    assert_eq!(list("seen_after_ms=1").await, [here.to_string()]);
    assert_eq!(list("seen_before_ms=1").await, Vec::<String>::new());
    for query in [
        "attached=maybe",
        "seen_before_ms=yesterday",
        "seen_after_ms=-1",
    ] {
        let reply = server.ask("GET", &format!("/v1/devices?{query}"), "").await;
        let parameter = query.split('=').next().unwrap();
        assert_eq!(reply.problem(), format!("400 malformed {parameter}"));
    }

    let reply = server.ask("GET", "/v1/users/ana%20m%2Fc", "").await;
    let body = reply.json();
    assert_eq!(
        (&body["user"], &body["attached"], &body["waiting"]),
        (&json!("ana m/c"), &json!(1), &json!(1))
    );
    for device in body["devices"].as_array().unwrap() {
        let is_here = device["device"] == here.to_string();
        assert_eq!(device["last_seen"]["agent"] == "tester/1", is_here);
        assert_eq!(device["waiting"], if is_here { 0 } else { 1 });
    }
    let reply = server.ask("GET", "/v1/users/nobody", "").await;
    assert_eq!((reply.status, &reply.json()["devices"]), (200, &json!([])));
    let reply = server.ask("GET", "/v1/users/a%0Ab", "").await;
    assert_eq!(reply.problem(), "400 malformed");

    let reply = server.ask("DELETE", "/v1/users/ana%20m%2Fc", "").await;
    assert_eq!((reply.status, reply.body.len()), (204, 0));
    let reply = server.ask("DELETE", "/v1/users/ana%20m%2Fc", "").await;
    assert_eq!(reply.status, 204);
    assert!(server.store.disk(|disk| disk.devices.is_empty()));
    until(|| server.handle.status().connected() == 0).await;
    drop(attached);
}

#[tokio::test]
async fn nothing_of_it_crosses_apps_or_scopes() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let other = server.key_with(OTHER_APP, Scopes::ALL).await;
    let reader = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    let as_key = async |key: &str, method: &str, path: &str| {
        let bearer = format!("Bearer {key}");
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/json"),
            ("content-length", "2"),
        ];
        let headers = if method == "PATCH" {
            &headers[..]
        } else {
            &headers[..1]
        };
        let body = if method == "PATCH" { "{}" } else { "" };
        send(server.api, method, path, headers, body.as_bytes()).await
    };
    let (one, secret, user) = (
        format!("/v1/devices/{device}"),
        format!("/v1/devices/{device}/secret"),
        "/v1/users/ana",
    );
    for (method, path) in [("PATCH", one.as_str()), ("POST", secret.as_str())] {
        assert_eq!(
            as_key(&other, method, path).await.problem(),
            "404 unknown_device"
        );
        assert_eq!(
            as_key(&reader, method, path).await.problem(),
            "403 forbidden"
        );
    }
    assert_eq!(
        as_key(&reader, "DELETE", user).await.problem(),
        "403 forbidden"
    );
    assert_eq!(as_key(&other, "DELETE", user).await.status, 204);
    let reply = as_key(&other, "GET", user).await;
    assert_eq!(reply.json()["devices"], json!([]));
    let reply = as_key(&reader, "GET", user).await;
    assert_eq!(reply.json()["devices"].as_array().unwrap().len(), 1);
}
