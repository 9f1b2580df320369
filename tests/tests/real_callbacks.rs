//! Outcomes posted by the real binary to a real receiver: signed, in order, over failures, kills and rotations; and where
//! nothing may go, nothing goes.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::VecDeque;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use bellwire_tests::real::{Api, Server, Site, eventually};
use http::Method;
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// One request that came.
#[derive(Debug, Clone)]
struct Got {
    head: String,
    body: String,
}

impl Got {
    fn header(&self, name: &str) -> String {
        let found = self.head.lines().find_map(|line| {
            let (known, value) = line.split_once(':')?;
            known
                .eq_ignore_ascii_case(name)
                .then(|| value.trim().to_owned())
        });
        found.unwrap_or_default()
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap()
    }

    /// The pings whose outcomes are in it, in order.
    fn pings(&self) -> Vec<String> {
        let json = self.json();
        let events = json["data"]["events"].as_array().unwrap().clone();
        let pings = events.iter().filter_map(|event| event["ping"].as_str());
        pings.map(str::to_owned).collect()
    }
}

/// Whoever outcomes are posted to.
struct Receiver {
    address: SocketAddr,
    got: Arc<Mutex<Vec<Got>>>,
    /// What it answers next, whole; without any 204.
    answers: Arc<Mutex<VecDeque<String>>>,
    /// What it answers when there is nothing else.
    always: Arc<Mutex<String>>,
}

/// An answer without a body.
fn answer(status: &str, headers: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{headers}content-length: 0\r\n\r\n")
}

impl Receiver {
    async fn start() -> Receiver {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let receiver = Receiver {
            address: listener.local_addr().unwrap(),
            got: Arc::default(),
            answers: Arc::default(),
            always: Arc::new(Mutex::new(answer("204 No Content", ""))),
        };
        let (got, answers, always) = (
            Arc::clone(&receiver.got),
            Arc::clone(&receiver.answers),
            Arc::clone(&receiver.always),
        );
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (got, answers, always) =
                    (Arc::clone(&got), Arc::clone(&answers), Arc::clone(&always));
                tokio::spawn(async move { serve(stream, &got, &answers, &always).await });
            }
        });
        receiver
    }

    fn url(&self) -> String {
        format!("http://{}/bellwire?from=test", self.address)
    }

    fn all(&self) -> Vec<Got> {
        self.got.lock().unwrap().clone()
    }

    fn answers_with(&self, text: String) {
        *self.always.lock().unwrap() = text;
    }

    /// Waits until so many requests came.
    async fn came(&self, count: usize) -> Vec<Got> {
        eventually("the posts come", async || {
            let got = self.all();
            (got.len() >= count).then_some(got)
        })
        .await
    }
}

async fn serve(
    mut stream: TcpStream,
    got: &Mutex<Vec<Got>>,
    answers: &Mutex<VecDeque<String>>,
    always: &Mutex<String>,
) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            stream
                .read_buf(&mut bytes)
                .await
                .ok()
                .filter(|read| *read > 0)?;
        };
        let head = String::from_utf8(bytes[..end].to_vec()).unwrap();
        let mut one = Got {
            head,
            body: String::new(),
        };
        let length: usize = one.header("content-length").parse().unwrap();
        while bytes.len() < end + length {
            stream
                .read_buf(&mut bytes)
                .await
                .ok()
                .filter(|read| *read > 0)?;
        }
        one.body = String::from_utf8(bytes[end..end + length].to_vec()).unwrap();
        bytes.drain(..end + length);
        got.lock().unwrap().push(one);
        let next = answers.lock().unwrap().pop_front();
        let text = next.unwrap_or_else(|| always.lock().unwrap().clone());
        if text.is_empty() {
            // Takes everything and never answers.
            std::future::pending::<()>().await;
        }
        stream.write_all(text.as_bytes()).await.ok()?;
    }
}

/// A site whose settings allow this machine.
fn site() -> Site {
    Site::new()
        .with("CALLBACKS__ALLOW", "127.0.0.0/8:*")
        .with("CALLBACKS__PLAIN_HTTP", "true")
        .with("CALLBACKS__RETRY_MAX", "1s")
}

async fn set(api: &Api, body: Value) -> Value {
    api.call(Method::PUT, "/v1/callbacks", &body)
        .await
        .expect(200)
}

/// A ping to nobody who is there: its outcome is `expired`, at once.
async fn ping(api: &Api, device: &str) -> String {
    let body = json!({ "to": { "device": device }, "ttl_s": 0 });
    api.post("/v1/pings", body).await.id()
}

async fn state(api: &Api) -> Value {
    api.get("/v1/callbacks").await.expect(200)
}

/// The program of docs/callbacks.md, run as it stands there.
fn verified(site: &Site, got: &Got, secret: &str) -> bool {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/callbacks.md");
    let page = std::fs::read_to_string(page).unwrap();
    let (_, rest) = page.split_once("```python\n").unwrap();
    let (program, _) = rest.split_once("```").unwrap();
    let script = site.dir().join("verify.py");
    let call = "\nimport json, sys\nasked = json.load(sys.stdin)\n\
        print(verify(asked['secret'], asked['headers'], asked['body'].encode()))\n";
    std::fs::write(&script, format!("{program}{call}")).unwrap();
    let python =
        std::env::var_os("BELLWIRE_TEST_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
    let mut child = Command::new(python)
        .arg(&script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let headers: serde_json::Map<String, Value> =
        ["webhook-id", "webhook-timestamp", "webhook-signature"]
            .map(|name| (name.to_owned(), json!(got.header(name))))
            .into_iter()
            .collect();
    let asked = json!({ "secret": secret, "headers": headers, "body": got.body });
    let mut input = child.stdin.take().unwrap();
    input.write_all(asked.to_string().as_bytes()).unwrap();
    drop(input);
    let out = child.wait_with_output().unwrap();
    assert!(out.status.success());
    match String::from_utf8(out.stdout).unwrap().trim() {
        "True" => true,
        "False" => false,
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn outcomes_are_posted_in_order_once_and_with_a_signature_that_others_check() {
    let (site, receiver) = (site(), Receiver::start().await);
    let server = site.start();
    let api = server.api();
    let (device, _) = api.device("ana").await;
    // What was recorded before is not posted.
    ping(&api, &device).await;
    eventually("it is recorded", async || {
        let listed = api.get("/v1/outcomes").await.expect(200);
        (listed["outcomes"].as_array().unwrap().len() == 1).then_some(())
    })
    .await;
    assert_eq!(api.get("/v1/callbacks").await.code(), "no_callback");
    let made = set(&api, json!({ "url": receiver.url() })).await;
    let secret = made["secret"].as_str().unwrap().to_owned();
    assert_eq!(made["state"], "ok");
    let posted = api
        .post("/v1/callbacks/test", Value::Null)
        .await
        .expect(200);
    assert_eq!(posted, json!({ "status": 204 }));
    let test = receiver.all().remove(0);
    assert_eq!(test.json()["type"], "bellwire.test");
    assert!(
        test.head
            .starts_with("POST /bellwire?from=test HTTP/1.1\r\n")
    );
    assert_eq!(test.header("content-type"), "application/json");
    assert!(verified(&site, &test, &secret));

    let mut pings = Vec::new();
    for _ in 0..25 {
        pings.push(ping(&api, &device).await);
    }
    // A batch that is given up, or one that is repeated, would show here.
    let came = async || {
        let all = receiver.all();
        let came: Vec<String> = all[1..].iter().flat_map(Got::pings).collect();
        (came.len() >= pings.len()).then_some(came)
    };
    assert_eq!(eventually("all outcomes are posted", came).await, pings);
    for got in &receiver.all()[1..] {
        assert_eq!(got.json()["type"], "bellwire.outcomes");
        assert!(verified(&site, got, &secret));
    }
    let one = &receiver.all()[1];
    let forged = Got {
        body: one.body.replace("expired", "acknowledged"),
        ..one.clone()
    };
    assert!(!verified(&site, &forged, &secret));
    assert!(!verified(
        &site,
        one,
        "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    ));

    // While two secrets are good, a receiver may know either.
    let path = "/v1/callbacks/secret";
    let rotated = api
        .post(path, json!({ "overlap_s": 600 }))
        .await
        .expect(200);
    let new = rotated["secret"].as_str().unwrap();
    let before = receiver.all().len();
    ping(&api, &device).await;
    let got = receiver.came(before + 1).await.pop().unwrap();
    assert!(verified(&site, &got, &secret));
    assert!(verified(&site, &got, new));
    let back = json!({ "overlap_s": 0, "secret": secret });
    assert_eq!(api.post(path, back).await.status, 200);
    let before = receiver.all().len();
    ping(&api, &device).await;
    let got = receiver.came(before + 1).await.pop().unwrap();
    assert!(verified(&site, &got, &secret) && !verified(&site, &got, new));

    // Chosen outcomes only, and an end.
    let chosen = json!({ "url": receiver.url(), "outcomes": ["acknowledged"] });
    assert_eq!(set(&api, chosen).await.get("secret"), None);
    let before = receiver.all().len();
    ping(&api, &device).await;
    set(
        &api,
        json!({ "url": receiver.url(), "outcomes": ["expired"] }),
    )
    .await;
    let last = ping(&api, &device).await;
    eventually("the chosen one is posted", async || {
        let all = receiver.all();
        let came: Vec<String> = all[before..].iter().flat_map(Got::pings).collect();
        came.contains(&last).then_some(())
    })
    .await;
    assert_eq!(api.delete("/v1/callbacks").await.status, 204);
    assert_eq!(api.delete("/v1/callbacks").await.code(), "no_callback");
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn a_batch_that_fails_keeps_its_id_over_a_kill_until_it_is_taken() {
    let (site, receiver) = (site(), Receiver::start().await);
    receiver.answers_with(answer("503 Service Unavailable", "retry-after: 1\r\n"));
    let server = site.start();
    let api = server.api();
    let (device, _) = api.device("ana").await;
    set(&api, json!({ "url": receiver.url() })).await;
    let first = ping(&api, &device).await;
    receiver.came(2).await;
    let failing = state(&api).await;
    assert_eq!(failing["state"], "failing");
    assert_eq!(failing["failing"]["why"], "it answered 503");
    // Comes behind the batch that fails, and not into it.
    let second = ping(&api, &device).await;
    let tried = receiver.came(3).await;
    server.kill();
    receiver.answers_with(answer("200 OK", ""));
    let before = receiver.all().len();
    let server = site.start();
    let api = server.api();
    let after = eventually("both are posted", async || {
        let after = receiver.all().split_off(before);
        let came: Vec<String> = after.iter().flat_map(Got::pings).collect();
        came.contains(&second).then_some(after)
    })
    .await;
    for got in tried.iter().chain(&after[..1]) {
        assert_eq!(got.header("webhook-id"), tried[0].header("webhook-id"));
        assert_eq!(got.body, tried[0].body);
    }
    assert_eq!(tried[0].pings(), [first]);
    let ids: Vec<String> = after.iter().map(|got| got.header("webhook-id")).collect();
    assert_ne!(ids[0], ids[1]);
    eventually("nothing fails any more", async || {
        (state(&api).await["state"] == "ok").then_some(())
    })
    .await;
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn what_is_given_up_is_a_dead_letter_that_can_be_sent_again() {
    let (site, receiver) = (
        site().with("CALLBACKS__GIVE_UP", "1s"),
        Receiver::start().await,
    );
    let server = site.start();
    let api = server.api();
    let (device, _) = api.device("ana").await;
    set(&api, json!({ "url": receiver.url() })).await;
    receiver.answers_with(answer("500 Oops", ""));
    let lost = ping(&api, &device).await;
    let letters = async |api: &Api| api.get("/v1/callbacks/dead-letters").await.expect(200);
    let letter = eventually("it is given up", async || {
        let found = letters(&api).await["dead_letters"][0].clone();
        found.is_object().then_some(found)
    })
    .await;
    assert_eq!(
        (&letter["number"], &letter["why"]),
        (&json!(1), &json!("it answered 500"))
    );
    let resend = "/v1/callbacks/dead-letters/1/resend";
    assert_eq!(
        api.post(resend, Value::Null).await.code(),
        "callback_failed"
    );
    receiver.answers_with(answer("200 OK", ""));
    let next = ping(&api, &device).await;
    eventually("the next one is posted", async || {
        let last = receiver.all().pop()?;
        last.pings().contains(&next).then_some(())
    })
    .await;
    // Kept over a kill, under the id of all its attempts.
    server.kill();
    let server = site.start();
    let api = server.api();
    assert_eq!(
        letters(&api).await["dead_letters"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let before = receiver.all().len();
    assert_eq!(api.post(resend, Value::Null).await.status, 200);
    let again = receiver.all().split_off(before);
    let again: Vec<&Got> = again
        .iter()
        .filter(|got| got.pings().contains(&lost))
        .collect();
    assert_eq!(again.len(), 1);
    assert_eq!(json!(again[0].header("webhook-id")), letter["id"]);
    assert_eq!(api.post(resend, Value::Null).await.status, 404);
    // One who says that it is gone is left alone until somebody says otherwise.
    receiver.answers_with(answer("410 Gone", ""));
    ping(&api, &device).await;
    eventually("it is gone", async || {
        (state(&api).await["state"] == "gone").then_some(())
    })
    .await;
    receiver.answers_with(answer("200 OK", ""));
    let waiting = ping(&api, &device).await;
    set(&api, json!({ "url": receiver.url() })).await;
    eventually("it goes on", async || {
        receiver
            .all()
            .iter()
            .any(|got| got.pings().contains(&waiting))
            .then_some(())
    })
    .await;
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn nothing_goes_where_the_operator_does_not_allow_it() {
    let (site, receiver, other) = (
        Site::new(),
        Receiver::start().await,
        Receiver::start().await,
    );
    let server = site.start();
    let refused = async |server: &Server, url: &str| {
        let body = json!({ "url": url });
        let answer = server.api().call(Method::PUT, "/v1/callbacks", &body).await;
        assert_eq!(answer.status, 422, "{}", answer.text);
        assert_eq!(answer.code(), "callback_not_allowed");
        answer.json()["detail"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    refused(&server, "https://hooks.example.com/").await;
    assert_eq!(
        server.api().get("/v1/status").await.json()["callbacks"]["on"],
        false
    );
    assert!(server.stop().await.success());

    // A name that is allowed does not lead to this machine: neither as it is set nor when it is looked up.
    let site = site
        .with("CALLBACKS__ALLOW", "localhost:*")
        .with("CALLBACKS__PLAIN_HTTP", "true");
    let server = site.start();
    let api = server.api();
    let why = refused(&server, &receiver.url()).await;
    assert!(
        why.contains("127.0.0.1") && why.contains("callbacks.allow"),
        "{why}"
    );
    let named = format!("http://localhost:{}/", receiver.address.port());
    set(&api, json!({ "url": named })).await;
    let failed = api.post("/v1/callbacks/test", Value::Null).await;
    assert_eq!(failed.code(), "callback_failed");
    assert!(failed.text.contains("no public address"), "{}", failed.text);
    assert_eq!(receiver.all().len(), 0);
    assert!(server.stop().await.success());

    // A redirect is an answer like any that is no 2xx, wherever it leads.
    let site = site
        .with("CALLBACKS__ALLOW", "127.0.0.0/8:*")
        .with("CALLBACKS__RETRY_MAX", "1s");
    let server = site.start();
    let api = server.api();
    let location = format!("location: {}\r\n", other.url());
    receiver.answers_with(answer("307 Temporary Redirect", &location));
    set(&api, json!({ "url": receiver.url() })).await;
    let (device, _) = api.device("ana").await;
    ping(&api, &device).await;
    receiver.came(2).await;
    let why = state(&api).await["failing"]["why"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(why.contains("redirects are not followed"), "{why}");
    assert_eq!(other.all().len(), 0);
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn a_reload_changes_where_posts_may_go_at_once() {
    let receiver = Receiver::start().await;
    let site = Site::new();
    let settings = site.dir().join("bellwire.toml");
    let allow = |entries: &str| {
        let text =
            format!("[callbacks]\nallow = [{entries}]\nplain_http = true\nretry_max = \"1h\"\n");
        std::fs::write(&settings, text).unwrap();
    };
    let here = format!("\"{}\"", receiver.address);
    allow("\"127.0.0.1\"");
    let server = site.start();
    let api = server.api();
    let reloaded = async |times: u64| {
        server.signal(Signal::HUP);
        eventually("the reload is taken", async || {
            (api.get("/v1/status").await.json()["settings"]["reloads"] == times).then_some(())
        })
        .await;
    };
    // The host alone is not enough: an entry without a port is for that of the scheme.
    let wanted = json!({ "url": receiver.url() });
    let refused = api.call(Method::PUT, "/v1/callbacks", &wanted).await;
    assert_eq!(refused.code(), "callback_not_allowed");
    assert!(refused.text.contains(&receiver.address.port().to_string()));
    allow(&here);
    reloaded(1).await;
    set(&api, wanted).await;
    let (device, _) = api.device("ana").await;
    let mut posted = vec![ping(&api, &device).await];
    receiver.came(1).await;

    // Taken off the list, it is posted nothing, over the connection that stands neither.
    allow("\"127.0.0.1:9\"");
    reloaded(2).await;
    posted.push(ping(&api, &device).await);
    eventually("it says why it waits", async || {
        let why = state(&api).await["failing"]["why"].clone();
        why.as_str()?.contains("callbacks.allow").then_some(())
    })
    .await;
    assert_eq!(receiver.all().len(), 1);

    // And on it again, at once, however long the wait for the next try would be.
    allow(&here);
    reloaded(3).await;
    let came: Vec<String> = receiver.came(2).await.iter().flat_map(Got::pings).collect();
    assert_eq!(came, posted);
    assert!(server.stop().await.success());
}

#[tokio::test]
async fn a_receiver_that_never_answers_holds_up_no_ping() {
    let (site, receiver) = (
        site().with("CALLBACKS__TIMEOUT", "1s"),
        Receiver::start().await,
    );
    receiver.answers_with(String::new());
    let server = site.start();
    let api = server.api();
    let (device, _) = api.device("ana").await;
    set(&api, json!({ "url": receiver.url() })).await;
    ping(&api, &device).await;
    receiver.came(1).await;
    for _ in 0..200 {
        let id = ping(&api, &device).await;
        let seen = api.get(&format!("/v1/pings/{id}")).await.expect(200);
        assert_eq!(seen["devices"][0]["state"], "expired");
    }
    eventually("the wait has an end", async || {
        let why = state(&api).await["failing"]["why"].clone();
        (why == "the answer took longer than 1 s").then_some(())
    })
    .await;
    receiver.answers_with(answer("200 OK", ""));
    eventually("all are posted", async || {
        let all = receiver.all();
        let mut came: Vec<String> = all.iter().flat_map(Got::pings).collect();
        came.sort_unstable();
        came.dedup();
        (came.len() == 201).then_some(())
    })
    .await;
    assert!(server.stop().await.success());
}
