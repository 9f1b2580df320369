//! Outcomes as they happen, over real sockets.

use bellwire_server::delivery::{AppId, Outcome, PingId};
use bellwire_server::ports::{OutcomeRecord, Scopes, Store as _};
use bellwire_server::runtime::{Limits, RuntimeSettings};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::support::{OTHER_APP, PATIENCE, Server, Setup, send, start, start_with, until};

/// A reader of a stream.
struct Stream {
    socket: TcpStream,
    text: String,
}

impl Stream {
    async fn open(server: &Server, key: &str, path: &str, headers: &str) -> Stream {
        let mut socket = TcpStream::connect(server.api).await.unwrap();
        let head = format!(
            "GET {path} HTTP/1.1\r\nhost: test\r\nauthorization: Bearer {key}\r\n{headers}\r\n"
        );
        socket.write_all(head.as_bytes()).await.unwrap();
        let mut stream = Stream {
            socket,
            text: String::new(),
        };
        stream.until(|text| text.contains("\r\n\r\n")).await;
        stream
    }

    /// Reads until the text is as wanted; `false`: the stream ended before.
    async fn until(&mut self, wanted: impl Fn(&str) -> bool) -> bool {
        let reading = async {
            let mut bytes = [0; 4_096];
            while !wanted(&self.text) {
                match self.socket.read(&mut bytes).await.unwrap() {
                    0 => return false,
                    read => self.text += &String::from_utf8_lossy(&bytes[..read]),
                }
            }
            true
        };
        tokio::time::timeout(PATIENCE, reading).await.unwrap()
    }

    async fn events(&mut self, count: usize) -> Vec<(String, String, Value)> {
        assert!(
            self.until(|text| events(text).len() >= count).await,
            "{}",
            self.text
        );
        events(&self.text)
    }
}

/// Id, name and data of the events in a text; those without data are left out.
fn events(text: &str) -> Vec<(String, String, Value)> {
    let field = |event: &str, name: &str| {
        let line = event.lines().find_map(|line| line.strip_prefix(name));
        line.map(|value| value.trim().to_owned())
    };
    text.split("\n\n")
        .filter_map(|event| {
            let data = serde_json::from_str(&field(event, "data:")?).ok()?;
            Some((field(event, "id:")?, field(event, "event:")?, data))
        })
        .collect()
}

fn record(app: AppId, n: u8) -> OutcomeRecord {
    OutcomeRecord {
        app,
        ping: PingId([n; 16]),
        device: bellwire_server::delivery::DeviceId([9; 16]),
        outcome: Outcome::Acknowledged,
        at_ms: 1_000 + u64::from(n),
        accepted_ms: None,
    }
}

fn end(server: &Server, app: AppId, n: u8) {
    server.store.record_outcomes(&mut vec![record(app, n)]);
}

fn numbers(events: &[(String, String, Value)]) -> Vec<u64> {
    let at = |event: &(String, String, Value)| event.2["at_ms"].as_u64().unwrap() - 1_000;
    events.iter().map(at).collect()
}

#[tokio::test]
async fn what_ends_is_told_at_once_and_only_to_its_own_app() {
    let server = start().await;
    end(&server, AppId::DEFAULT, 1);
    let mut stream = Stream::open(&server, &server.key, "/v1/events", "").await;
    let head = stream.text.to_lowercase();
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    assert!(head.contains("cache-control: no-store"), "{head}");
    assert!(
        stream
            .until(|text| text.contains("retry: ") && text.contains("id: o"))
            .await
    );
    end(&server, OTHER_APP, 2);
    end(&server, AppId::DEFAULT, 3);
    end(&server, AppId::DEFAULT, 4);
    let told = stream.events(2).await;
    assert_eq!(numbers(&told), [3, 4]);
    assert_eq!(told[0].1, "outcome");
    assert_eq!(
        told[0].2,
        json!({"ping": PingId([3; 16]).to_string(),
            "device": bellwire_server::delivery::DeviceId([9; 16]).to_string(),
            "outcome": "acknowledged", "at_ms": 1_003})
    );
    drop(stream);
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_comes_back_goes_on_behind_the_last_event_it_saw() {
    let server = start().await;
    for n in 1..=5 {
        end(&server, AppId::DEFAULT, n);
    }
    let mut stream = Stream::open(&server, &server.key, "/v1/events?from=oldest", "").await;
    let all = stream.events(5).await;
    assert_eq!(numbers(&all), [1, 2, 3, 4, 5]);
    drop(stream);
    let header = format!("last-event-id: {}\r\n", all[2].0);
    // The header counts more than the parameter, as browsers that reconnect send both.
    let mut again = Stream::open(&server, &server.key, "/v1/events?from=oldest", &header).await;
    assert_eq!(numbers(&again.events(2).await), [4, 5]);
    drop(again);
    let path = format!("/v1/events?from={}", all[3].0);
    let mut other = Stream::open(&server, &server.key, &path, "").await;
    assert_eq!(numbers(&other.events(1).await), [5]);
    drop(other);
    // The same id is a place in the list.
    let path = format!("/v1/outcomes?order=oldest&after={}", all[3].0);
    let page = server.ask("GET", &path, "").await;
    assert_eq!(page.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_reader_may_choose_which_outcomes_it_is_told() {
    let server = start().await;
    for n in 1..=4 {
        end(&server, AppId::DEFAULT, n);
    }
    server.store.record_outcomes(&mut vec![OutcomeRecord {
        outcome: Outcome::Expired,
        ..record(AppId::DEFAULT, 5)
    }]);
    let (ping, device) = (
        PingId([2; 16]),
        bellwire_server::delivery::DeviceId([9; 16]),
    );
    for (choice, expected) in [
        (format!("ping={ping}"), vec![2]),
        (format!("device={device}&outcome=expired,evicted"), vec![5]),
        ("outcome=acknowledged".to_owned(), vec![1, 2, 3, 4]),
    ] {
        let path = format!("/v1/events?from=oldest&{choice}");
        let mut stream = Stream::open(&server, &server.key, &path, "").await;
        let told = stream.events(expected.len()).await;
        assert_eq!(numbers(&told), expected, "{choice}");
    }
    for (name, bad) in [("ping", "x"), ("device", ""), ("outcome", "expired,late")] {
        let path = format!("/v1/events?{name}={bad}");
        let refused = server.ask("GET", &path, "").await;
        assert_eq!(refused.problem(), format!("400 malformed {name}"));
    }
    server.stop().await;
}

#[tokio::test]
async fn bad_places_are_refused_precisely() {
    let server = start().await;
    for bad in ["yesterday", "o12", "n0000000000000001", ""] {
        let path = format!("/v1/events?from={bad}");
        let refused = server.ask("GET", &path, "").await;
        assert_eq!(refused.problem(), "400 malformed from", "{bad}");
    }
    let bearer = format!("Bearer {}", server.key);
    for bad in ["1", "o000000000000000g"] {
        let headers = [("authorization", bearer.as_str()), ("last-event-id", bad)];
        let refused = send(server.api, "GET", "/v1/events", &headers, b"").await;
        assert_eq!(refused.problem(), "400 malformed Last-Event-ID", "{bad}");
    }
    let pings_only = server.key_with(AppId::DEFAULT, Scopes::PING).await;
    let bearer = format!("Bearer {pings_only}");
    let headers = [("authorization", bearer.as_str())];
    let refused = send(server.api, "GET", "/v1/events", &headers, b"").await;
    assert_eq!(refused.problem(), "403 forbidden");
    server.stop().await;
}

#[tokio::test]
async fn only_so_many_follow_and_a_place_is_free_when_one_leaves() {
    let settings = RuntimeSettings {
        limits: Limits {
            event_streams: 2,
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let one = Stream::open(&server, &server.key, "/v1/events", "").await;
    let two = Stream::open(&server, &server.key, "/v1/events", "").await;
    let refused = server.ask("GET", "/v1/events", "").await;
    assert_eq!(refused.problem(), "429 too_many_streams");
    assert_eq!(refused.header("retry-after"), Some("30"));
    drop(one);
    let free = async {
        loop {
            let mut stream = Stream::open(&server, &server.key, "/v1/events", "").await;
            if stream.text.starts_with("HTTP/1.1 200") {
                end(&server, AppId::DEFAULT, 7);
                assert_eq!(numbers(&stream.events(1).await), [7]);
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, free).await.unwrap();
    drop(two);
    // Nobody follows any more, so nobody is told.
    until(|| !server.store.is_followed()).await;
    server.stop().await;
}

#[tokio::test]
async fn a_stream_ends_when_its_key_is_revoked() {
    let server = start().await;
    let key = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    let mut stream = Stream::open(&server, &key, "/v1/events", "").await;
    let id = key
        .trim_start_matches("bw_")
        .split('_')
        .next()
        .unwrap()
        .to_owned();
    let revoked = server.ask("DELETE", &format!("/v1/keys/{id}"), "").await;
    assert_eq!(revoked.status, 204);
    end(&server, AppId::DEFAULT, 1);
    // The last chunk says that this was the end and no break.
    stream.until(|text| text.ends_with("\r\n0\r\n\r\n")).await;
    assert_eq!(events(&stream.text), [], "{}", stream.text);
    server.stop().await;
}

#[tokio::test]
async fn a_stream_ends_in_good_order_when_the_server_goes_down() {
    let server = start().await;
    let mut stream = Stream::open(&server, &server.key, "/v1/events", "").await;
    let drained = server.handle.drain(std::time::Duration::ZERO).await;
    assert!(drained.committed);
    let ended = stream.until(|text| text.ends_with("\r\n0\r\n\r\n")).await;
    assert!(ended, "{:?}", stream.text);
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_takes_nothing_holds_nobody_up() {
    let server = start().await;
    let path = "/v1/events?from=oldest";
    let mut slow = Stream::open(&server, &server.key, path, "").await;
    let mut other = Stream::open(&server, &server.key, path, "").await;
    // Some megabytes: far more than what lies between the two ends of a connection.
    let count = 20_000;
    for first in (0..count).step_by(1_000) {
        let mut some = (first..first + 1_000)
            .map(|n| OutcomeRecord {
                at_ms: 1_000 + n,
                ..record(AppId::DEFAULT, 1)
            })
            .collect();
        server.store.record_outcomes(&mut some);
    }
    let last = format!("\"at_ms\":{}", 1_000 + count - 1);
    // It came with the last piece that was read, or not yet.
    let done = |text: &str| text[text.len().saturating_sub(5_000)..].contains(&last);
    assert!(other.until(done).await);
    assert_eq!(
        numbers(&events(&other.text)),
        (0..count).collect::<Vec<_>>()
    );
    // What it did not take waits for it.
    assert!(slow.until(done).await);
    assert_eq!(numbers(&events(&slow.text)), (0..count).collect::<Vec<_>>());
    server.stop().await;
}

#[tokio::test]
async fn a_reader_that_takes_nothing_is_cut_after_a_minute_and_holds_no_place() {
    let settings = RuntimeSettings {
        limits: Limits {
            event_streams: 1,
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    let server = start_with(Setup {
        settings,
        connections_max: 1,
        ..Setup::default()
    })
    .await;
    // More than all buffers between the two take.
    let mut history = vec![record(AppId::DEFAULT, 1); 150_000];
    server.store.record_outcomes(&mut history);
    let path = "/v1/events?from=oldest";
    let mut reader = Stream::open(&server, &server.key, path, "").await;
    // A minute is over as soon as nothing else is to be done, which is when all buffers are full.
    tokio::time::pause();
    tokio::time::sleep(std::time::Duration::from_secs(7_200)).await;
    tokio::time::resume();
    // Both places, of streams and of connections, are for others again.
    let refused = send(
        server.api,
        "GET",
        path,
        &[("authorization", "Bearer nobody")],
        b"",
    )
    .await;
    assert_eq!(refused.status, 401);
    let next = Stream::open(&server, &server.key, path, "").await;
    assert!(next.text.starts_with("HTTP/1.1 200"), "{}", next.text);
    // What was cut does not look whole. Its end may be a reset.
    let mut rest = Vec::new();
    let reading = reader.socket.read_to_end(&mut rest);
    let _ = tokio::time::timeout(PATIENCE, reading).await.unwrap();
    assert!(!rest.ends_with(b"0\r\n\r\n"));
    drop(next);
    server.stop().await;
}
