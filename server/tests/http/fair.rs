//! What callers are told of their allowances.

use bellwire_server::delivery::AppId;
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::RuntimeSettings;
use serde_json::json;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{OTHER_APP, Reply, Server, Setup, raw, send, start, start_with, until};

const BODY: &str = r#"{"to":{"user":"nobody"}}"#;

/// The members of a list of a field: name, and each parameter with its number.
fn members(reply: &Reply, field: &str) -> Vec<(String, Vec<(String, u64)>)> {
    let value = reply
        .header(field)
        .unwrap_or_else(|| panic!("no {field} in {reply:?}"));
    value
        .split(", ")
        .map(|member| {
            let mut parts = member.split(';');
            let name = parts.next().unwrap();
            // A string of structured fields.
            assert!(name.starts_with('"') && name.ends_with('"'), "{value}");
            let parameters = parts.map(|parameter| {
                let (name, number) = parameter.split_once('=').unwrap();
                (name.to_owned(), number.parse().unwrap())
            });
            (name.trim_matches('"').to_owned(), parameters.collect())
        })
        .collect()
}

fn parameter(members: &[(String, Vec<(String, u64)>)], name: &str, wanted: &str) -> u64 {
    let member = members.iter().find(|(known, _)| known == name).unwrap();
    let parameter = member.1.iter().find(|(known, _)| known == wanted).unwrap();
    parameter.1
}

async fn with_key(server: &Server, key: &str, body: &str) -> Reply {
    let bearer = format!("Bearer {key}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    send(server.api, "POST", "/v1/pings", &headers, body.as_bytes()).await
}

#[tokio::test]
async fn every_answer_of_a_limited_call_says_what_is_left() {
    let server = start().await;
    let accepted = server.ask("POST", "/v1/pings", BODY).await;
    assert_eq!(accepted.status, 202);
    let malformed = server.ask("POST", "/v1/pings", "{").await;
    assert_eq!(malformed.status, 400);
    let unknown = json!({"to": {"device": "aaaaaaaaaaaaaaaaaaaaaaaaaa"}});
    let unknown = server.ask("POST", "/v1/pings", &unknown.to_string()).await;
    assert_eq!(unknown.status, 404);
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
        BODY.as_bytes(),
    )
    .await;
    assert_eq!(batch.status, 200);
    for reply in [&accepted, &malformed, &unknown, &batch] {
        let policy = members(reply, "ratelimit-policy");
        assert_eq!(policy.len(), 1);
        assert_eq!(parameter(&policy, "key", "q"), 100_000);
        assert_eq!(parameter(&policy, "key", "w"), 2);
        let left = members(reply, "ratelimit");
        assert!((99_000..=100_000).contains(&parameter(&left, "key", "r")));
        assert!(parameter(&left, "key", "t") <= 1);
    }
    // Calls that are not limited, and callers that nobody knows, are told nothing.
    let look = server.ask("GET", "/v1/devices", "").await;
    let stranger = with_key(&server, "bw_wrong", BODY).await;
    assert_eq!((look.status, stranger.status), (200, 401));
    for reply in [&look, &stranger] {
        assert_eq!(reply.header("ratelimit"), None);
        assert_eq!(reply.header("ratelimit-policy"), None);
    }
    server.stop().await;
}

#[tokio::test]
async fn an_app_beyond_its_day_is_told_when_to_come_back_and_another_app_goes_on() {
    let mut settings = RuntimeSettings::default();
    settings.quotas.default.pings_per_day = 3;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let second = server.key_with(AppId::DEFAULT, Scopes::PING).await;
    for _ in 0..3 {
        assert_eq!(server.ask("POST", "/v1/pings", BODY).await.status, 202);
    }
    let refused = with_key(&server, &second, BODY).await;
    assert_eq!(refused.problem(), "429 quota_exceeded");
    let wait: u64 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((28_000..=28_800).contains(&wait), "{wait}");
    let left = members(&refused, "ratelimit");
    assert_eq!(parameter(&left, "app", "r"), 0);
    assert!((86_000..=86_400).contains(&parameter(&left, "app", "t")));
    let policy = members(&refused, "ratelimit-policy");
    assert_eq!(parameter(&policy, "app", "q"), 3);
    assert_eq!(parameter(&policy, "app", "w"), 86_400);
    assert!(parameter(&left, "key", "r") > 0);
    // A line of a batch is told as well, with its own time.
    let head = format!(
        "POST /v1/pings/batch HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {second}\r\n\
         content-type: application/x-ndjson\r\ncontent-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    let batch = raw(server.api, head.as_bytes()).await;
    assert!(
        batch.text().contains("\"code\":\"quota_exceeded\""),
        "{batch:?}"
    );
    assert!(batch.text().contains("\"retry_after_s\":28"), "{batch:?}");
    let other = server.key_with(OTHER_APP, Scopes::PING).await;
    assert_eq!(with_key(&server, &other, BODY).await.status, 202);
    server.stop().await;
}

#[tokio::test]
async fn a_device_that_is_sent_too_much_says_so() {
    let mut settings = RuntimeSettings::default();
    settings.limits.device_pings_per_second = 1;
    settings.limits.device_ping_burst = 2;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let (device, _) = server.device("ana").await;
    let body = json!({"to": {"device": device.to_string()}}).to_string();
    let mut refused = None;
    // However slow the machine: it is quicker than one ping a second.
    for _ in 0..1_000 {
        let reply = server.ask("POST", "/v1/pings", &body).await;
        if reply.status != 202 {
            refused = Some(reply);
            break;
        }
    }
    let refused = refused.unwrap();
    assert_eq!(refused.problem(), "429 device_rate_limited");
    assert_eq!(refused.header("retry-after"), Some("1"));
    server.stop().await;
}

#[tokio::test]
async fn limits_that_were_set_hold_and_are_shown() {
    let mut settings = RuntimeSettings::default();
    settings.limits.body_max = 200_000;
    settings.limits.batch_body_max = 300_000;
    settings.limits.batch_lines_max = 3;
    settings.limits.wait_max = std::time::Duration::from_secs(2);
    settings.limits.memory_reserve = 4 << 20;
    settings.link.window_default = 8;
    settings.quotas.default.pings_per_day = 1_000;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let bearer = format!("Bearer {}", server.key);
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/x-ndjson"),
    ];
    let batch = async |body: &str| {
        let path = "/v1/pings/batch";
        send(server.api, "POST", path, &headers, body.as_bytes()).await
    };
    let line = format!("{BODY}\n");
    assert_eq!(batch(&line.repeat(3)).await.status, 200);
    let many = batch(&line.repeat(4)).await;
    assert_eq!(many.problem(), "413 body_too_large");
    let large = batch(&" ".repeat(300_001)).await;
    assert_eq!(large.problem(), "413 body_too_large");
    let padded = format!("{}{BODY}", " ".repeat(200_000));
    assert!(batch(&padded).await.text().contains("\"status\":413"));
    // A ping may name a hundred thousand devices.
    let single = server.ask("POST", "/v1/pings", &padded).await;
    assert_eq!(single.status, 202);
    let beyond = format!("{}{BODY}", " ".repeat(4 << 20));
    let single = server.ask("POST", "/v1/pings", &beyond).await;
    assert_eq!(single.problem(), "413 body_too_large");
    let other = server.ask("POST", "/v1/devices", &padded).await;
    assert_eq!(other.problem(), "413 body_too_large");
    let path = "/v1/pings?wait=acknowledged&timeout_s=3";
    let wait = server.ask("POST", path, BODY).await;
    assert_eq!(wait.problem(), "400 malformed timeout_s");
    let path = "/v1/pings?wait=acknowledged&timeout_s=2";
    assert_eq!(server.ask("POST", path, BODY).await.status, 200);

    let headers = [("authorization", bearer.as_str())];
    let status = send(server.operations, "GET", "/v1/status", &headers, b"").await;
    let status = status.json();
    for (name, value) in [
        ("body_max", 200_000),
        ("batch_body_max", 300_000),
        ("batch_lines_max", 3),
        ("wait_max_s", 2),
        ("memory_reserve", 4 << 20),
        ("in_flight", 8),
        ("in_flight_max", 256),
        ("frame_max", 16_384),
        ("mailbox_notifications", 1_000),
        ("pings_per_second", 50_000),
        ("device_pings_per_second", 1_000),
        ("hello_deadline_s", 10),
        ("connections_per_address", 256),
    ] {
        assert_eq!(status["limits"][name], value, "{name}");
    }
    assert_eq!(status["limits"]["mailbox_full"], "evict");
    assert_eq!(status["limits"]["keep_alive_quic_s"], json!([20, 120]));
    let apps = status["apps"].as_array().unwrap();
    let names: Vec<_> = apps.iter().map(|app| &app["name"]).collect();
    assert_eq!(names, ["default", "other"]);
    // Three lines of the batch, the padded line, the padded ping, and the one that waited; those that were too large were not
    // read.
    assert_eq!(apps[0]["pings_left"], 1_000 - 6);
    assert_eq!(apps[1]["pings_left"], 1_000);
    server.stop().await;
}

/// Begins a request, sends these bytes of its body, and leaves it open.
async fn begins(server: &Server, bearer: &str, length: usize, sent: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(server.api).await.unwrap();
    let head = format!(
        "POST /v1/pings/batch HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {bearer}\r\n\
         content-type: application/x-ndjson\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(sent).await.unwrap();
    stream
}

#[tokio::test]
async fn a_body_holds_the_room_of_what_has_arrived_and_not_of_what_is_announced() {
    let mut settings = RuntimeSettings::default();
    settings.limits.memory_reserve = 4 << 20;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    const ANNOUNCED: usize = 8 << 20;
    let held = || server.handle.status().reserve_bytes;
    // Far more is announced than there is; a byte of each came.
    let mut open = Vec::new();
    for number in 1..=20 {
        open.push(begins(&server, &server.key, ANNOUNCED, b" ").await);
        until(|| held() > number * 1_024).await;
    }
    assert!(held() <= 20 * (17 << 10), "{}", held());
    // Whoever announces and says nothing holds nothing at all, and a stranger not even what it sent.
    let quiet = begins(&server, &server.key, ANNOUNCED, b"").await;
    let before = held();
    let mut stranger = begins(&server, "bw_nobody", ANNOUNCED, &[b' '; 1_000]).await;
    let mut answer = [0; 12];
    stranger.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"HTTP/1.1 401");
    assert_eq!(held(), before);
    // So there is room for those who send what they announce, and it grows with what comes.
    let padded = format!("{}\n{BODY}", " ".repeat(300_000));
    let bearer = format!("Bearer {}", server.key);
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/x-ndjson"),
    ];
    let path = "/v1/pings/batch";
    let whole = send(server.api, "POST", path, &headers, padded.as_bytes()).await;
    assert_eq!(whole.status, 200);
    let growing = begins(&server, &server.key, ANNOUNCED, &[b' '; 300_000]).await;
    until(|| held() >= before + 300_000).await;
    assert!(held() <= before + 2 * 300_000 + (17 << 10), "{}", held());
    drop((open, quiet, growing, stranger));
    until(|| held() == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_long_ping_takes_room_while_it_arrives() {
    let server = start().await;
    let held = || server.handle.status().reserve_bytes;
    let mut stream = TcpStream::connect(server.api).await.unwrap();
    let head = format!(
        "POST /v1/pings HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: 1000000\r\n\r\n",
        server.key
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(&[b' '; 200_000]).await.unwrap();
    until(|| held() >= 200_000).await;
    drop(stream);
    until(|| held() == 0).await;
    server.stop().await;
}
