//! Topics and audiences over HTTP: every refusal at its place, every call as docs/http-api.md tells it.

use std::time::Duration;

use bellwire_server::delivery::AppId;
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::RuntimeSettings;
use serde_json::{Value, json};

use crate::support::{OTHER_APP, Server, Setup, send, start, start_with};

const NOBODY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaa";

/// Asks until a ping has reached its audience; answers what is known of it then.
async fn brought(server: &Server, id: &str) -> Value {
    let path = format!("/v1/pings/{id}?limit=1000");
    for _ in 0..2_000 {
        let reply = server.ask("GET", &path, "").await;
        assert_eq!(reply.status, 200, "{}", reply.text());
        let report = reply.json();
        if report.get("expanding").is_none() {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the audience was not reached");
}

#[tokio::test]
async fn topics_are_set_edited_and_shown_and_mistakes_are_pointed_at() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let path = format!("/v1/devices/{device}/topics");
    let many: Vec<String> = (0..101).map(|n| format!("t{n}")).collect();
    for (method, body, expected) in [
        ("PUT", "{}".to_owned(), "400 malformed /topics"),
        (
            "PUT",
            json!({"topics": null}).to_string(),
            "400 malformed /topics",
        ),
        (
            "PUT",
            json!({"topics": "news"}).to_string(),
            "400 malformed /topics",
        ),
        (
            "PUT",
            json!({"topics": ["news", "a b"]}).to_string(),
            "400 malformed /topics/1",
        ),
        (
            "PUT",
            json!({"topics": [""]}).to_string(),
            "400 malformed /topics/0",
        ),
        (
            "PUT",
            json!({"topics": ["x".repeat(129)]}).to_string(),
            "400 malformed /topics/0",
        ),
        (
            "PUT",
            json!({"topics": many}).to_string(),
            "422 unprocessable /topics",
        ),
        (
            "PUT",
            json!({"join": ["news"]}).to_string(),
            "400 malformed /join",
        ),
        (
            "PATCH",
            json!({"join": ["n*"]}).to_string(),
            "400 malformed /join/0",
        ),
        (
            "PATCH",
            json!({"topics": []}).to_string(),
            "400 malformed /topics",
        ),
    ] {
        let reply = server.ask(method, &path, &body).await;
        assert_eq!(reply.problem(), expected, "{body}");
    }
    for (method, body, expected) in [
        ("GET", Value::Null, json!([])),
        (
            "PUT",
            json!({"topics": ["ward/3", "news", "news"]}),
            json!(["news", "ward/3"]),
        ),
        (
            "PATCH",
            json!({"join": ["x@y:z"], "leave": ["news", "other"]}),
            json!(["ward/3", "x@y:z"]),
        ),
        ("PATCH", json!({}), json!(["ward/3", "x@y:z"])),
        ("GET", Value::Null, json!(["ward/3", "x@y:z"])),
        ("PUT", json!({"topics": []}), json!([])),
    ] {
        let body = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let reply = server.ask(method, &path, &body).await;
        assert_eq!(
            (reply.status, &reply.json()["topics"]),
            (200, &expected),
            "{body}"
        );
    }
    let full: Vec<String> = (0..100).map(|n| format!("t{n}")).collect();
    let reply = server
        .ask("PUT", &path, &json!({"topics": full}).to_string())
        .await;
    assert_eq!(reply.status, 200);
    let reply = server
        .ask("PATCH", &path, &json!({"join": ["one-more"]}).to_string())
        .await;
    assert_eq!(reply.status, 422);
    let nobody = format!("/v1/devices/{NOBODY}/topics");
    for (method, body) in [("GET", ""), ("PUT", r#"{"topics":[]}"#), ("PATCH", "{}")] {
        let reply = server.ask(method, &nobody, body).await;
        assert_eq!(reply.problem(), "404 unknown_device");
    }
    // Another app's device does not exist, and each call needs its scope.
    for (app, scopes, expected) in [
        (OTHER_APP, Scopes::ALL, 404),
        (AppId::DEFAULT, Scopes::READ, 403),
    ] {
        let bearer = format!("Bearer {}", server.key_with(app, scopes).await);
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/json"),
        ];
        let reply = send(server.api, "PUT", &path, &headers, br#"{"topics":[]}"#).await;
        assert_eq!(reply.status, expected);
    }
}

#[tokio::test]
async fn the_members_of_a_topic_are_listed_and_rung() {
    let server = start().await;
    let mut members = Vec::new();
    for number in 0..5 {
        let (device, secret) = server.device("ana").await;
        let topics = if number < 3 {
            json!(["ward/3"])
        } else {
            json!(["ward/33"])
        };
        let body = json!({ "topics": topics }).to_string();
        let path = format!("/v1/devices/{device}/topics");
        assert_eq!(server.ask("PUT", &path, &body).await.status, 200);
        if number < 3 {
            members.push((device, server.attach(device, &secret).await));
        }
    }
    members.sort_by_key(|(device, _)| *device);
    let ids: Vec<String> = members
        .iter()
        .map(|(device, _)| device.to_string())
        .collect();
    let listed = server
        .ask("GET", "/v1/devices?topic=ward%2F3", "")
        .await
        .json();
    let listed = listed["devices"].as_array().unwrap().iter();
    let listed: Vec<&str> = listed
        .map(|device| device["device"].as_str().unwrap())
        .collect();
    assert_eq!(listed, ids);
    let reply = server.ask("GET", "/v1/devices?topic=a%20b", "").await;
    assert_eq!(reply.status, 400);

    let ping = json!({"to": {"topic": "ward/3"}, "body": "Visiting time is over"}).to_string();
    let reply = server
        .ask("POST", "/v1/pings?wait=acknowledged", &ping)
        .await;
    let answer = reply.json();
    assert_eq!((reply.status, &answer["devices"]), (200, &json!(3)));
    assert_eq!(answer["outcomes"].as_array().unwrap().len(), 3);
    for (_, device) in &members {
        let contents = device.contents();
        let topics: Vec<_> = contents
            .iter()
            .map(|content| content.topic.as_deref())
            .collect();
        assert_eq!(topics, [Some("ward/3")]);
    }
    let everyone = json!({"to": {"everyone": true}, "body": "Hi"}).to_string();
    let reply = server.ask("POST", "/v1/pings", &everyone).await;
    assert_eq!((reply.status, &reply.json()["devices"]), (202, &json!(5)));
    let report = brought(&server, reply.json()["id"].as_str().unwrap()).await;
    assert_eq!(report["devices"].as_array().unwrap().len(), 5);
}

#[tokio::test]
async fn a_ping_on_its_way_tells_how_far_it_is_and_can_be_taken_back() {
    let mut settings = RuntimeSettings::default();
    settings.limits.expansions_max = 1;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    for _ in 0..3 {
        server.device("ana").await;
    }
    server.store.set_crowded(true);
    let everyone = json!({"to": {"everyone": true}, "body": "Hi"}).to_string();
    let reply = server.ask("POST", "/v1/pings", &everyone).await;
    assert_eq!(reply.status, 202);
    let path = format!("/v1/pings/{}", reply.json()["id"].as_str().unwrap());
    let report = server.ask("GET", &path, "").await.json();
    assert_eq!(
        report["expanding"],
        json!({"estimate": 3, "done": 0, "unknown": 0})
    );
    assert_eq!(report["devices"], json!([]));
    let status = server.ask("GET", "/v1/status", "").await.json();
    assert_eq!(status["expansions"], json!(1));
    assert_eq!(status["limits"]["open_expansions"], json!(1));
    let reply = server.ask("POST", "/v1/pings", &everyone).await;
    assert_eq!(reply.problem(), "429 too_many_expansions");
    assert!(reply.header("retry-after").is_some());
    for _ in 0..2 {
        let reply = server.ask("DELETE", &path, "").await;
        assert_eq!(
            (reply.status, reply.json()),
            (200, json!({"revoked": 0, "ended": 0}))
        );
    }
    server.store.set_crowded(false);
    let report = server.ask("GET", &path, "").await.json();
    assert!(report.get("expanding").is_none());
    assert_eq!(server.ask("POST", "/v1/pings", &everyone).await.status, 202);
}

#[tokio::test]
async fn a_long_list_fits_a_body_of_its_own_size_and_no_more() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let list = |count: usize| {
        let mut devices = vec![device.to_string()];
        devices.extend((1..count).map(|n| {
            let id = bellwire_server::delivery::DeviceId((n as u128).to_be_bytes());
            id.to_string()
        }));
        json!({"to": {"devices": devices}, "body": "Hi"}).to_string()
    };
    let body = list(100_000);
    assert!(body.len() > 1 << 20);
    let reply = server.ask("POST", "/v1/pings", &body).await;
    assert_eq!(
        (reply.status, &reply.json()["devices"]),
        (202, &json!(100_000))
    );
    let reply = server.ask("POST", "/v1/pings", &list(100_001)).await;
    assert_eq!(reply.problem(), "422 unprocessable /to/devices");
    let too_long = json!({"to": {"everyone": true}, "body": "x".repeat(4 << 20)}).to_string();
    let reply = server.ask("POST", "/v1/pings", &too_long).await;
    assert_eq!(reply.problem(), "413 body_too_large");
}
