//! `POST /v1/pings/batch` over real sockets: every line its own answer, in order, as they come.

use bellwire_server::delivery::{AppId, DeviceId};
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::{DeviceChange, Limits, RuntimeSettings};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::store::Mode;
use crate::support::{PATIENCE, Reply, Server, Setup, raw, send, start, start_with, until};

const NOBODY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaa";
const NDJSON: &str = "application/x-ndjson";
const PATH: &str = "/v1/pings/batch";

fn head(server: &Server, more: &str) -> String {
    format!(
        "POST {PATH} HTTP/1.1\r\nhost: test\r\nconnection: close\r\nauthorization: Bearer {}\r\n\
         content-type: {NDJSON}\r\n{more}\r\n",
        server.key
    )
}

async fn ask(server: &Server, body: &str) -> Reply {
    let length = format!("content-length: {}\r\n", body.len());
    let mut reply = raw(
        server.api,
        format!("{}{body}", head(server, &length)).as_bytes(),
    )
    .await;
    if reply.header("transfer-encoding") == Some("chunked") {
        reply.body = whole(&reply.body).expect("the answer has its end");
    }
    reply
}

/// The body that was sent in chunks; `None`: it has no end.
fn whole(mut chunks: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = chunks.windows(2).position(|two| two == b"\r\n")?;
        let size = usize::from_str_radix(std::str::from_utf8(&chunks[..end]).unwrap(), 16).unwrap();
        chunks = &chunks[end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunks.get(..size)?);
        chunks = chunks.get(size + 2..)?;
    }
}

fn answers(reply: &Reply) -> Vec<Value> {
    assert_eq!(reply.status, 200, "{reply:?}");
    assert_eq!(reply.header("content-type"), Some(NDJSON));
    assert!(reply.body.ends_with(b"\n"));
    reply
        .text()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Line, status, code and place of each answer.
fn told(answers: &[Value]) -> Vec<String> {
    answers
        .iter()
        .map(|answer| {
            let problem = &answer["problem"];
            let text = |name: &str| problem[name].as_str().unwrap_or_default().to_owned();
            let told = format!(
                "{} {} {} {}",
                answer["line"],
                answer["status"],
                text("code"),
                text("pointer")
            );
            if problem.is_object() {
                assert!(answer.get("id").is_none());
                for name in ["title", "detail", "remedy"] {
                    assert!(text(name).ends_with('.'), "{answer}");
                }
            } else {
                assert_eq!(answer["id"].as_str().unwrap().len(), 26);
            }
            told.trim_end().to_owned()
        })
        .collect()
}

#[tokio::test]
async fn every_line_has_its_own_answer_and_a_bad_one_costs_only_itself() {
    let server = start().await;
    let (device, secret) = server.device("ana").await;
    let (away, _) = server.device("ben").await;
    let attached = server.attach(device, &secret).await;
    let body = format!(
        "{}\n\n{}\r\nnonsense\n{}\n[]\n{}\n{}\n{}\n{}\n{}",
        json!({"to": {"user": "ana"}, "body": "1"}),
        json!({"to": {"device": NOBODY}, "body": "2"}),
        json!({"to": {"devices": [away.to_string(), NOBODY]}, "body": "3", "ttl_s": 600}),
        json!({"to": {"user": "ana"}, "body": 4}),
        json!({"to": {"user": "ana"}, "data": "A".repeat(8_192)}),
        json!({"to": {"user": "ana"}, "idempotency_key": "two words"}),
        json!({"to": {"user": "nobody"}}),
        json!({"to": {"user": "ana"}, "body": "last"}),
    );
    let answers = answers(&ask(&server, &body).await);
    assert_eq!(
        told(&answers),
        [
            "1 202",
            "3 404 unknown_device /to/device",
            "4 400 malformed",
            "5 202",
            "6 400 malformed",
            "7 400 malformed /body",
            "8 413 content_too_large",
            "9 400 malformed /idempotency_key",
            "10 202",
            "11 202",
        ]
    );
    assert_eq!(answers[3]["devices"], 2);
    assert_eq!(answers[3]["ttl_s"], 600);
    assert_eq!(
        answers[3]["rejected"],
        json!([{"device": NOBODY, "code": "unknown_device"}])
    );
    assert_eq!(answers[8]["devices"], 0);
    until(|| attached.contents().len() == 2).await;
    let texts: Vec<_> = attached
        .contents()
        .into_iter()
        .map(|content| content.body.unwrap())
        .collect();
    assert_eq!(texts, ["1", "last"]);
    // The same as one by one.
    let id = answers[0]["id"].as_str().unwrap();
    let look = server.ask("GET", &format!("/v1/pings/{id}"), "").await;
    assert_eq!(look.json()["devices"][0]["state"], "acknowledged");
    server.stop().await;
}

#[tokio::test]
async fn a_line_that_is_too_long_costs_only_itself() {
    let server = start().await;
    let good = json!({"to": {"user": "nobody"}});
    let long = json!({"to": {"user": "nobody"}, "body": "x".repeat(1 << 20)});
    let answers = answers(&ask(&server, &format!("{good}\n{long}\n{good}")).await);
    assert_eq!(told(&answers), ["1 202", "2 413 body_too_large", "3 202"]);
    server.stop().await;
}

#[tokio::test]
async fn a_batch_that_cannot_be_is_refused_before_anything_of_it_happens() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let line = json!({"to": {"device": device.to_string()}}).to_string();
    for (body, expected) in [
        (String::new(), "400 malformed"),
        ("\n \r\n".to_owned(), "400 malformed"),
        (format!("{line}\n").repeat(1_001), "413 body_too_large"),
    ] {
        assert_eq!(ask(&server, &body).await.problem(), expected);
    }
    let bearer = format!("Bearer {}", server.key);
    let as_type = |kind: &'static str| {
        [
            ("authorization", bearer.clone()),
            ("content-type", kind.to_owned()),
        ]
    };
    for (kind, status) in [
        ("application/json", 415),
        ("text/plain", 415),
        ("application/jsonl; charset=utf-8", 200),
        ("application/NDJSON", 200),
    ] {
        let headers = as_type(kind);
        let headers: Vec<_> = headers
            .iter()
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let body = json!({"to": {"user": "nobody"}}).to_string();
        let reply = send(server.api, "POST", PATH, &headers, body.as_bytes()).await;
        assert_eq!(reply.status, status, "{kind}");
    }
    let reply = raw(
        server.api,
        head(&server, "idempotency-key: k\r\ncontent-length: 2\r\n").as_bytes(),
    )
    .await;
    assert_eq!(reply.problem(), "400 malformed Idempotency-Key");
    // Too large by its own word, and found out on the way.
    let reply = raw(
        server.api,
        head(&server, "content-length: 8388609\r\n").as_bytes(),
    )
    .await;
    assert_eq!(reply.problem(), "413 body_too_large");
    let mut chunked = head(&server, "transfer-encoding: chunked\r\n").into_bytes();
    let mebibyte = format!("100000\r\n{}\r\n", "x".repeat(1 << 20));
    chunked.extend(mebibyte.repeat(9).as_bytes());
    chunked.extend(b"0\r\n\r\n");
    assert_eq!(
        raw(server.api, &chunked).await.problem(),
        "413 body_too_large"
    );
    let reader = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    let reader = format!("Bearer {reader}");
    let headers = [("authorization", reader.as_str()), ("content-type", NDJSON)];
    let reply = send(server.api, "POST", PATH, &headers, line.as_bytes()).await;
    assert_eq!(reply.problem(), "403 forbidden");
    let reply = server
        .ask("POST", &format!("{PATH}?wait=acknowledged"), &line)
        .await;
    assert_eq!(reply.problem(), "400 malformed wait");
    server.store.disk(|disk| assert!(disk.rows.is_empty()));
    assert_eq!(server.handle.status().reserve_bytes, 0);
    server.stop().await;
}

/// The bodies that wait for a device, in the order of its mailbox.
fn waiting(server: &Server, device: DeviceId) -> Vec<String> {
    server.store.disk(|disk| {
        disk.rows
            .iter()
            .filter(|((of, _), _)| *of == device)
            .map(|(_, (_, notification))| {
                let content = bellwire_protocol::Content::from_cbor(&notification.content).unwrap();
                content.body.unwrap_or_default().to_string()
            })
            .collect()
    })
}

#[tokio::test]
async fn lines_to_one_device_reach_it_in_their_order_however_they_name_it() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let mut body = String::new();
    for number in 0..900 {
        let to = match number % 4 {
            0 => json!({"device": device.to_string()}),
            1 => json!({"user": "ana"}),
            // Nobody has asked for this one before: it must be looked up.
            2 => json!({"users": [format!("stranger {number}"), "ana"]}),
            _ => json!({"devices": [NOBODY, device.to_string()]}),
        };
        let mut line = json!({"to": to, "body": number.to_string()});
        if number % 5 == 0 {
            line["idempotency_key"] = json!(format!("key-{number}"));
        }
        body.push_str(&format!("{line}\n"));
    }
    let answers = answers(&ask(&server, &body).await);
    assert!(answers.iter().all(|answer| answer["status"] == 202));
    assert_eq!(answers.len(), 900);
    for (place, answer) in answers.iter().enumerate() {
        assert_eq!(answer["line"], place + 1);
    }
    let expected: Vec<String> = (0..900).map(|number| number.to_string()).collect();
    assert_eq!(waiting(&server, device), expected);
    server.stop().await;
}

#[tokio::test]
async fn a_line_with_a_key_is_one_ping_however_often_it_is_sent() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let to = json!({"user": "ana"});
    let keyed = json!({"to": to, "body": "once", "idempotency_key": "k-1"});
    let body = format!(
        "{keyed}\n{}\n{keyed}\r\n",
        json!({"to": to, "body": "plain"})
    );
    let first = answers(&ask(&server, &body).await);
    assert_eq!(told(&first), ["1 202", "2 202", "3 202"]);
    assert_eq!(first[0]["id"], first[2]["id"]);
    let second = answers(&ask(&server, &body).await);
    assert_eq!(second[0]["id"], first[0]["id"]);
    assert_ne!(second[1]["id"], first[1]["id"]);
    assert_eq!(waiting(&server, device), ["once", "plain", "plain"]);

    let other = json!({"to": to, "body": "other", "idempotency_key": "k-1"});
    let refused = answers(&ask(&server, &other.to_string()).await);
    assert_eq!(
        told(&refused),
        ["1 409 idempotency_conflict /idempotency_key"]
    );
    // After a restart that forgot the key the id is the same.
    let id = first[0]["id"].clone();
    server.store.disk(|disk| disk.idempotency.clear());
    let server = server.restart().await;
    let again = answers(&ask(&server, &keyed.to_string()).await);
    assert_eq!(again[0]["id"], id);
    server.stop().await;
}

#[tokio::test]
async fn a_line_counts_as_one_ping_of_the_rate() {
    let settings = RuntimeSettings {
        limits: Limits {
            pings_per_second: 1,
            ping_burst: 3,
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let body = format!("{}\n", json!({"to": {"user": "ana"}})).repeat(200);
    let answers = answers(&ask(&server, &body).await);
    let limited: Vec<_> = answers
        .iter()
        .filter(|answer| answer["status"] == 429)
        .collect();
    assert!((190..=197).contains(&limited.len()), "{}", limited.len());
    assert_eq!(limited[0]["problem"]["code"], "rate_limited");
    assert_eq!(limited[0]["problem"]["retry_after_s"], 1);
    server.stop().await;
}

/// A batch whose answer is read bit by bit.
struct Reading {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Reading {
    async fn begin(server: &Server, body: &str) -> Reading {
        // Hardly anything fits between the server and whoever reads nothing.
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4_096).unwrap();
        let mut stream = socket.connect(server.api).await.unwrap();
        let length = format!("content-length: {}\r\n", body.len());
        let request = format!("{}{body}", head(server, &length));
        stream.write_all(request.as_bytes()).await.unwrap();
        Reading {
            stream,
            read: Vec::new(),
        }
    }

    /// Reads until so many answers are there.
    async fn answers(&mut self, count: usize) {
        let reading = async {
            while self.count() < count {
                let mut piece = [0; 4_096];
                let size = self.stream.read(&mut piece).await.unwrap();
                assert!(size > 0, "the answer ended early");
                self.read.extend_from_slice(&piece[..size]);
            }
        };
        tokio::time::timeout(PATIENCE, reading).await.unwrap();
    }

    fn count(&self) -> usize {
        String::from_utf8_lossy(&self.read)
            .matches("{\"line\":")
            .count()
    }
}

#[tokio::test]
async fn answers_come_as_soon_as_they_are_known_and_in_order() {
    let server = start().await;
    let (here, secret) = server.device("ana").await;
    let (away, _) = server.device("ben").await;
    let attached = server.attach(here, &secret).await;
    // So that acknowledgements beat the disk.
    for _ in 0..12 {
        let to = json!({"to": {"user": "ana"}}).to_string();
        assert_eq!(server.ask("POST", "/v1/pings", &to).await.status, 202);
    }
    server.store.set_mode(Mode::Hold);
    let ana = json!({"to": {"user": "nobody"}});
    let ben = json!({"to": {"device": away.to_string()}});
    let mut reading = Reading::begin(&server, &format!("{ana}\n{ana}\n{ben}\n{ana}\n")).await;
    reading.answers(2).await;
    until(|| server.store.held() > 0).await;
    assert_eq!(reading.count(), 2);
    server.store.set_mode(Mode::Commit);
    reading.answers(4).await;
    drop(attached);
    server.stop().await;
}

#[tokio::test]
async fn a_caller_that_goes_away_ends_what_was_not_begun_and_nothing_else() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    server.store.set_mode(Mode::Hold);
    let line = json!({"to": {"device": device.to_string()}});
    let body = format!(
        "{}\n{}",
        json!({"to": {"user": "nobody"}}),
        format!("{line}\n").repeat(999)
    );
    let mut reading = Reading::begin(&server, &body).await;
    reading.answers(1).await;
    until(|| server.store.held() > 0).await;
    drop(reading);
    until(|| server.handle.status().reserve_bytes > 0).await;
    server.store.set_mode(Mode::Commit);
    until(|| server.handle.status().reserve_bytes == 0).await;
    let kept = waiting(&server, device).len();
    // Those under way are kept; how many were begun before it was noticed is open.
    assert!((1..1_000).contains(&kept), "{kept}");
    server.stop().await;
}

#[tokio::test]
async fn a_caller_that_reads_nothing_holds_up_nobody_who_changes_a_device() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    // Each answer names hundreds of devices: far more than the socket's buffers hold.
    let many: Vec<String> = (0..400u32)
        .map(|number| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            DeviceId(id).to_string()
        })
        .collect();
    let strangers = json!({"to": {"devices": many}});
    let ana = json!({"to": {"user": "ana"}});
    let body = format!("{ana}\n{strangers}\n").repeat(100);
    let reading = Reading::begin(&server, &body).await;
    until(|| !waiting(&server, device).is_empty()).await;
    let change = DeviceChange {
        user: Some("ben".to_owned()),
        ..DeviceChange::default()
    };
    let changed = server.handle.change_device(AppId::DEFAULT, device, change);
    let changed = tokio::time::timeout(PATIENCE, changed).await.unwrap();
    assert_eq!(changed.unwrap().unwrap().device.user, "ben");
    drop(reading);
    until(|| server.handle.status().reserve_bytes == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_caller_that_stops_reading_in_the_middle_is_cut_and_costs_nobody_else_anything() {
    let settings = RuntimeSettings {
        limits: Limits {
            batch_stall: std::time::Duration::from_millis(300),
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    let server = start_with(Setup {
        settings,
        connections_max: 2,
        ..Setup::default()
    })
    .await;
    let (device, _) = server.device("ana").await;
    let many: Vec<String> = (0..400u32)
        .map(|number| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            DeviceId(id).to_string()
        })
        .collect();
    let strangers = json!({"to": {"devices": many}});
    let ana = json!({"to": {"user": "ana"}, "body": "of the batch"});
    let mut stalled = Reading::begin(&server, &format!("{ana}\n{strangers}\n").repeat(400)).await;
    stalled.answers(3).await;
    // Everybody else goes on: the same user, another device, a batch of their own.
    let line = json!({"to": {"user": "ana"}, "body": "of another"}).to_string();
    let one = server.ask("POST", "/v1/pings", &line).await;
    assert_eq!(one.status, 202);
    let other = answers(&ask(&server, &format!("{line}\n").repeat(20)).await);
    assert_eq!(other.len(), 20);
    assert!(other.iter().all(|answer| answer["status"] == 202));
    // The room that the batch had is given back, and its place among the connections as well: one is taken by a caller who says
    // nothing, so the next one gets an answer only in the place of the batch.
    until(|| server.handle.status().reserve_bytes == 0).await;
    let quiet = TcpStream::connect(server.api).await.unwrap();
    assert_eq!(server.ask("POST", "/v1/pings", &line).await.status, 202);
    drop(quiet);
    // What was begun is kept, and the answer does not look whole.
    let bodies = waiting(&server, device);
    let begun = bodies.iter().filter(|body| *body == "of the batch").count();
    assert!((2..=400).contains(&begun), "{begun}");
    assert_eq!(bodies.len() - begun, 22);
    let mut rest = Vec::new();
    let reading = stalled.stream.read_to_end(&mut rest);
    // An end that is no end may be a reset.
    let _ = tokio::time::timeout(PATIENCE, reading).await.unwrap();
    assert!(!rest.ends_with(b"0\r\n\r\n"), "it must not look whole");
    server.stop().await;
}

#[tokio::test]
async fn a_batch_takes_its_room_out_of_the_memory_reserve_and_gives_it_back() {
    let settings = RuntimeSettings {
        limits: Limits {
            memory_reserve: 600_000,
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let (device, _) = server.device("ana").await;
    server.store.set_mode(Mode::Hold);
    let line = json!({"to": {"device": device.to_string()}, "body": "x".repeat(2_000)});
    let body = format!("{line}\n").repeat(75);
    let first = Reading::begin(&server, &body).await;
    // The body itself, and each ping for itself.
    until(|| server.handle.status().reserve_bytes > 75 * 2 * 2_000).await;
    assert_eq!(ask(&server, &body).await.problem(), "503 memory_reserve");
    server.store.set_mode(Mode::Commit);
    let mut first = first;
    first.answers(75).await;
    until(|| server.handle.status().reserve_bytes == 0).await;
    server.stop().await;
}

#[tokio::test]
async fn a_batch_in_a_server_that_goes_down_is_refused_line_by_line() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    server.store.set_mode(Mode::Hold);
    let line = json!({"to": {"device": device.to_string()}});
    let mut reading = Reading::begin(&server, &format!("{line}\n").repeat(1_000)).await;
    until(|| server.store.held() > 0).await;
    let handle = server.handle.clone();
    let drained = tokio::spawn(async move { handle.drain(std::time::Duration::ZERO).await });
    until(|| server.handle.draining()).await;
    server.store.set_mode(Mode::Commit);
    drained.await.unwrap();
    reading.answers(1_000).await;
    let text = String::from_utf8_lossy(&reading.read).into_owned();
    assert!(text.contains("\"status\":202"));
    let (accepted, refused) = (
        text.matches("\"status\":202").count(),
        text.matches("\"code\":\"draining\"").count(),
    );
    assert_eq!(accepted + refused, 1_000);
    assert_eq!(waiting(&server, device).len(), accepted);
    server.stop().await;
}
