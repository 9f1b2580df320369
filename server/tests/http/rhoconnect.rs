//! RhoConnect's ping endpoint, row by row as docs/rhoconnect.md tells it.

use bellwire_server::delivery::{AppId, OverflowRule};
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::RuntimeSettings;

use crate::store::Mode;
use crate::support::{OTHER_APP, PATIENCE, Reply, Server, Setup, send, start, start_with, until};

const PATHS: [&str; 3] = ["/rc/v1/users/ping", "/api/ping", "/api/client/ping"];
const TOKEN: &str = "X-RhoConnect-API-TOKEN";
const FORM: (&str, &str) = ("content-type", "application/x-www-form-urlencoded");
const JSON: (&str, &str) = ("content-type", "application/json");

/// Status and text; checks what all answers of this door have in common.
fn told(reply: &Reply) -> (u16, &str) {
    assert_eq!(reply.header("cache-control"), Some("no-cache"), "{reply:?}");
    assert_eq!(reply.header("pragma"), Some("no-cache"), "{reply:?}");
    if reply.status == 200 {
        assert!(reply.body.is_empty());
    } else {
        assert_eq!(
            reply.header("content-type"),
            Some("text/plain"),
            "{reply:?}"
        );
    }
    (reply.status, reply.text())
}

async fn post(server: &Server, path: &str, headers: &[(&str, &str)], body: &str) -> Reply {
    send(server.api, "POST", path, headers, body.as_bytes()).await
}

const NO_TOKEN: (u16, &str) = (422, "No API token provided");
const NO_USER: (u16, &str) = (422, "Invalid/missing API user");
const BAD_DATA: (u16, &str) = (500, "Server error while processing client data");
const DONE: (u16, &str) = (200, "");

#[tokio::test]
async fn tokens_are_taken_from_header_and_parameters_and_refused_with_422() {
    let server = start().await;
    let good = server.key.clone();
    let weak = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    let foreign = server.key_with(OTHER_APP, Scopes::ALL).await;
    for (header, parameter, expected) in [
        (Some(&good), None, DONE),
        (None, Some(&good), DONE),
        (Some(&"unknown".to_owned()), Some(&good), DONE),
        (Some(&good), Some(&"unknown".to_owned()), DONE),
        (Some(&good), Some(&weak), DONE),
        (None, None, NO_TOKEN),
        (Some(&"unknown".to_owned()), None, NO_TOKEN),
        (None, Some(&"unknown".to_owned()), NO_TOKEN),
        (Some(&String::new()), Some(&String::new()), NO_TOKEN),
        (Some(&weak), None, NO_USER),
        (None, Some(&weak), NO_USER),
        (Some(&weak), Some(&good), NO_USER),
        (Some(&foreign), None, NO_USER),
    ] {
        let pair = |text: &String| format!("api_token={text}&user_id=ana");
        let as_form = parameter.map_or("user_id=ana".to_owned(), pair);
        let as_json = match parameter {
            Some(text) => format!(r#"{{"user_id":"ana","api_token":"{text}"}}"#),
            None => r#"{"user_id":"ana"}"#.to_owned(),
        };
        let mut headers: Vec<(&str, &str)> = header
            .map(|text| (TOKEN, text.as_str()))
            .into_iter()
            .collect();
        for path in PATHS {
            headers.push(FORM);
            let reply = post(&server, path, &headers, &as_form).await;
            assert_eq!(told(&reply), expected, "form {header:?} {parameter:?}");
            headers.pop();
            headers.push(JSON);
            let reply = post(&server, path, &headers, &as_json).await;
            assert_eq!(told(&reply), expected, "JSON {header:?} {parameter:?}");
            headers.pop();
            let query = format!("{path}?{as_form}");
            let reply = post(&server, &query, &headers, "").await;
            assert_eq!(told(&reply), expected, "query {header:?} {parameter:?}");
            let warning = reply.header("warning");
            assert_eq!(warning.is_some(), path != PATHS[0], "{path}");
            assert!(
                warning.is_none_or(
                    |text| text.starts_with("299 ") && text.contains("/rc/v1/users/ping")
                )
            );
        }
    }
    server.stop().await;
}

#[tokio::test]
async fn the_body_is_parsed_before_the_token_and_the_token_before_the_parameters() {
    let server = start().await;
    for body in ["{", "[]", "\"x\"", "{\"user_id\":\"a\"}x", "null"] {
        for headers in [
            vec![JSON],
            vec![
                ("content-type", "application/json; charset=utf-8"),
                (TOKEN, "unknown"),
            ],
        ] {
            let reply = post(&server, PATHS[0], &headers, body).await;
            assert_eq!(told(&reply), BAD_DATA, "{body}");
        }
    }
    // The same bytes as a form are a form.
    assert_eq!(told(&post(&server, PATHS[0], &[FORM], "{").await), NO_TOKEN);
    let too_many = "sources[]=s&".repeat(101);
    assert_eq!(
        told(&post(&server, PATHS[0], &[FORM], &too_many).await),
        NO_TOKEN
    );
    let reply = post(&server, PATHS[0], &[FORM, (TOKEN, &server.key)], &too_many).await;
    assert_eq!(told(&reply), (500, "A ping names at most 100 sources"));
    server.stop().await;
}

#[tokio::test]
async fn parameters_become_content_in_both_forms() {
    let server = start().await;
    let (device, secret) = server.device("ana").await;
    let attached = server.attach(device, &secret).await;
    let key = server.key.clone();
    let mut expected = Vec::new();
    for (content_type, body, content) in [
        (FORM, "user_id=ana", "{}"),
        (JSON, r#"{"user_id":"ana"}"#, "{}"),
        (
            FORM,
            "user_id[]=ana&message=Order+ready&sources[]=Product&sources[]=Customer&vibrate=2000&badge=3&sound=ding.mp3",
            r#"{"body":"Order ready","sound":"ding.mp3","badge":3,"vibrate_ms":2000,"sync":["Product","Customer"]}"#,
        ),
        (
            ("content-type", "application/json;charset=UTF-8"),
            r#"{"user_id":["ana"],"message":"Order ready","sources":["Product","Customer"],"vibrate":"2000","badge":"3","sound":"ding.mp3"}"#,
            r#"{"body":"Order ready","sound":"ding.mp3","badge":3,"vibrate_ms":2000,"sync":["Product","Customer"]}"#,
        ),
        (FORM, "user_id=ana&sources=all", r#"{"sync":["all"]}"#),
        (FORM, "user_id=ana&sources[]=all", r#"{"sync":["all"]}"#),
        (
            JSON,
            r#"{"user_id":"ana","sources":"all"}"#,
            r#"{"sync":["all"]}"#,
        ),
        (
            FORM,
            "user_id=ana&message=&vibrate=soon&badge=x&source_id=S&phone_id=1",
            r#"{"body":""}"#,
        ),
        (
            JSON,
            r#"{"user_id":"ana","vibrate":500,"badge":0}"#,
            r#"{"badge":0,"vibrate_ms":500}"#,
        ),
    ] {
        let reply = post(&server, PATHS[0], &[content_type, (TOKEN, &key)], body).await;
        assert_eq!(told(&reply), DONE, "{body}");
        expected.push(serde_json::from_str::<serde_json::Value>(content).unwrap());
    }
    until(|| attached.contents().len() == expected.len()).await;
    let sent: Vec<serde_json::Value> = attached
        .contents()
        .iter()
        .map(|content| serde_json::to_value(content).unwrap())
        .collect();
    assert_eq!(sent, expected);
    server.stop().await;
}

#[tokio::test]
async fn unknown_users_are_skipped_and_a_device_is_pinged_once() {
    let server = start().await;
    let (device, secret) = server.device("ana").await;
    let attached = server.attach(device, &secret).await;
    let key = server.key.clone();
    for body in [
        "",
        "message=nobody",
        "user_id=",
        "user_id=nobody",
        "user_id[]=nobody&user_id[]=neither",
    ] {
        let reply = post(&server, PATHS[0], &[FORM, (TOKEN, &key)], body).await;
        assert_eq!(told(&reply), DONE, "{body}");
    }
    for body in [
        r#"{"user_id":null}"#,
        r#"{"user_id":[]}"#,
        r#"{"user_id":[{}, null]}"#,
        "{}",
    ] {
        let reply = post(&server, PATHS[0], &[JSON, (TOKEN, &key)], body).await;
        assert_eq!(told(&reply), DONE, "{body}");
    }
    let body = r#"{"user_id":["nobody","ana","ana"],"message":"once"}"#;
    let reply = post(&server, PATHS[0], &[JSON, (TOKEN, &key)], body).await;
    assert_eq!(told(&reply), DONE);
    let reply = post(
        &server,
        PATHS[0],
        &[FORM, (TOKEN, &key)],
        "user_id=ana&message=last",
    )
    .await;
    assert_eq!(told(&reply), DONE);
    until(|| attached.contents().len() >= 2).await;
    let bodies: Vec<_> = attached
        .contents()
        .into_iter()
        .map(|content| content.body)
        .collect();
    assert_eq!(bodies, [Some("once".to_owned()), Some("last".to_owned())]);
    server.stop().await;
}

#[tokio::test]
async fn failures_are_joined_and_do_not_stop_the_others() {
    let mut settings = RuntimeSettings::default();
    settings.policy.mailbox_notifications = 1;
    settings.policy.overflow = OverflowRule::Refuse;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let key = server.key.clone();
    let (first, _) = server.device("ana").await;
    let (second, _) = server.device("ana").await;
    let (other, secret) = server.device("ben").await;
    let headers = [FORM, (TOKEN, key.as_str())];
    assert_eq!(
        told(&post(&server, PATHS[0], &headers, "user_id=ana").await),
        DONE
    );

    let attached = server.attach(other, &secret).await;
    let body = "user_id[]=ana&user_id[]=ben&message=m";
    let reply = post(&server, PATHS[0], &headers, body).await;
    assert_eq!(reply.status, 500);
    told(&reply);
    let mut messages: Vec<&str> = reply.text().split("\\n").collect();
    messages.sort_unstable();
    let mut expected = vec![
        format!("device {first}: the mailbox is full"),
        format!("device {second}: the mailbox is full"),
    ];
    expected.sort_unstable();
    assert_eq!(messages, expected);
    until(|| attached.contents().len() == 1).await;

    for body in [
        "user_id=ana&async=true",
        "user_id=ana&async=false",
        "user_id=ana&async=",
    ] {
        assert_eq!(
            told(&post(&server, PATHS[0], &headers, body).await),
            DONE,
            "{body}"
        );
    }
    let headers = [JSON, (TOKEN, key.as_str())];
    for (body, status) in [
        (r#"{"user_id":"ana","async":true}"#, 200),
        (r#"{"user_id":"ana","async":"false"}"#, 200),
        (r#"{"user_id":"ana","async":false}"#, 500),
        (r#"{"user_id":"ana","async":null}"#, 500),
    ] {
        assert_eq!(
            told(&post(&server, PATHS[0], &headers, body).await).0,
            status,
            "{body}"
        );
    }
    server.stop().await;
}

#[tokio::test]
async fn other_trouble_is_500_with_a_text_and_never_a_status_that_callers_do_not_know() {
    let server = start().await;
    server.device("ana").await;
    let key = server.key.clone();
    let headers = [FORM, (TOKEN, key.as_str())];
    let large = format!("user_id=ana&message={}", "x".repeat(4_097));
    assert_eq!(
        told(&post(&server, PATHS[0], &headers, &large).await),
        (500, "the content has 4097 bytes, 4096 are allowed")
    );
    let huge = format!("user_id=ana&message={}", "x".repeat(2 << 20));
    assert_eq!(
        told(&post(&server, PATHS[0], &headers, &huge).await),
        (500, "The body broke off or is larger than 1048576 bytes")
    );
    let get = send(server.api, "GET", PATHS[1], &headers, b"").await;
    assert_eq!(told(&get), (405, "Only POST is known here"));
    assert_eq!(get.header("allow"), Some("POST"));

    server.store.set_mode(Mode::NoRoom);
    let reply = post(&server, PATHS[0], &headers, "user_id=ana").await;
    assert_eq!(told(&reply), (500, "no room on disk"));

    let handle = server.handle.clone();
    handle.drain(PATIENCE).await;
    let reply = post(&server, PATHS[0], &headers, "user_id=ana").await;
    assert_eq!(told(&reply), (500, "the server is draining"));
    server.stop().await;
}

#[tokio::test]
async fn more_devices_than_one_ping_may_address_are_reached_in_parts() {
    let mut settings = RuntimeSettings::default();
    settings.limits.devices_max = 2;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let mut devices = Vec::new();
    for user in ["a", "b", "c", "d", "e"] {
        devices.push(server.device(user).await);
    }
    let mut attached = Vec::new();
    for (device, secret) in &devices {
        attached.push(server.attach(*device, secret).await);
    }
    let key = server.key.clone();
    let body = r#"{"user_id":["a","b","c","d","e"],"message":"m"}"#;
    let reply = post(&server, PATHS[0], &[JSON, (TOKEN, &key)], body).await;
    assert_eq!(told(&reply), DONE);
    until(|| attached.iter().all(|device| device.contents().len() == 1)).await;
    server.stop().await;
}

/// What the door must survive: each file of the corpora, and each with every byte cut off its end.
#[test]
fn the_corpora_do_no_harm() {
    use bellwire_server::compat::rhoconnect::fuzz;
    for (folder, fuzz) in [
        ("rhoconnect_form", fuzz::form as fn(&[u8])),
        ("rhoconnect_json", fuzz::json),
    ] {
        let folder = format!("{}/tests/http/corpus/{folder}", env!("CARGO_MANIFEST_DIR"));
        for bytes in crate::support::corpus(&folder) {
            fuzz(&bytes);
            for end in 0..bytes.len().min(512) {
                fuzz(&bytes[..end]);
            }
        }
    }
}
