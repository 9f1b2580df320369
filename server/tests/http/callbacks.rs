//! Callbacks over the API, with a way out that answers by a script.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use bellwire_server::delivery::{AppId, DeviceId, Outcome, PingId};
use bellwire_server::ports::{
    Outbound, OutboundLine, OutcomeRecord, Post, PostAnswer, PostError, Posting, Scopes,
    Store as _, UrlRefusal,
};
use bellwire_server::runtime::{CallbackLimits, Limits, RuntimeSettings};
use serde_json::{Value, json};

use crate::support::{OTHER_APP, Server, Setup, send, start, start_with, until};

type Script = Result<PostAnswer, PostError>;

/// Takes what is posted, and answers by a script, then always 200.
#[derive(Clone, Default)]
struct Fake {
    posts: Arc<Mutex<Vec<Post>>>,
    script: Arc<Mutex<VecDeque<Script>>>,
    /// Nobody is answered while this is held for writing.
    quiet: Arc<tokio::sync::RwLock<()>>,
}

impl Outbound for Fake {
    fn is_on(&self) -> bool {
        true
    }

    fn check(&self, url: &str) -> Result<(), UrlRefusal> {
        match url {
            "https://no.example/" => Err(UrlRefusal::NotAllowed("it is not listed".to_owned())),
            url if url.starts_with("https://") => Ok(()),
            _ => Err(UrlRefusal::Malformed("a URL that begins with `https://`")),
        }
    }

    fn line(&self) -> Box<dyn OutboundLine> {
        Box::new(self.clone())
    }
}

impl OutboundLine for Fake {
    fn post<'a>(&'a mut self, post: &'a Post) -> Posting<'a> {
        self.posts.lock().unwrap().push(post.clone());
        let next = self.script.lock().unwrap().pop_front();
        Box::pin(async move {
            drop(self.quiet.read().await);
            next.unwrap_or(status(200))
        })
    }
}

fn status(status: u16) -> Script {
    Ok(PostAnswer {
        status,
        retry_after: None,
    })
}

impl Fake {
    fn says(&self, script: impl IntoIterator<Item = Script>) {
        self.script.lock().unwrap().extend(script);
    }

    fn posts(&self) -> Vec<Post> {
        self.posts.lock().unwrap().clone()
    }

    /// When each outcome that was posted ended, by post.
    fn ends(&self) -> Vec<Vec<u64>> {
        let ends = |post: &Post| {
            let body: Value = serde_json::from_slice(&post.body).unwrap();
            let events = body["data"]["events"].as_array().unwrap().clone();
            events
                .iter()
                .map(|event| event["at_ms"].as_u64().unwrap())
                .collect()
        };
        self.posts().iter().map(ends).collect()
    }
}

async fn with(fake: &Fake, callbacks: CallbackLimits) -> Server {
    let settings = RuntimeSettings {
        limits: Limits {
            callbacks,
            ..Limits::default()
        },
        ..RuntimeSettings::default()
    };
    start_with(Setup {
        settings,
        outbound: Arc::new(fake.clone()),
        ..Setup::default()
    })
    .await
}

fn end(server: &Server, app: AppId, at_ms: u64) {
    server.store.record_outcomes(&mut vec![OutcomeRecord {
        app,
        ping: PingId([at_ms as u8; 16]),
        device: DeviceId([9; 16]),
        outcome: if at_ms.is_multiple_of(2) {
            Outcome::Expired
        } else {
            Outcome::Acknowledged
        },
        at_ms,
        accepted_ms: None,
    }]);
}

async fn put(server: &Server, key: &str, body: &str) -> crate::support::Reply {
    let bearer = format!("Bearer {key}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    send(
        server.api,
        "PUT",
        "/v1/callbacks",
        &headers,
        body.as_bytes(),
    )
    .await
}

const SET: &str = r#"{"url": "https://ok.example/"}"#;

#[tokio::test]
async fn without_a_way_out_nothing_can_be_set_and_the_answer_says_what_is_missing() {
    let server = start().await;
    let refused = put(&server, &server.key, SET).await;
    assert_eq!(refused.problem(), "422 callback_not_allowed");
    assert!(
        refused.text().contains("callbacks.allow"),
        "{}",
        refused.text()
    );
    let none = server.ask("GET", "/v1/callbacks", "").await;
    assert_eq!(none.problem(), "404 no_callback");
    server.stop().await;
}

#[tokio::test]
async fn what_cannot_be_a_callback_is_refused_at_its_place() {
    let fake = Fake::default();
    let server = with(&fake, CallbackLimits::default()).await;
    for (body, problem) in [
        ("{}", "400 malformed /url"),
        (r#"{"url": 5}"#, "400 malformed /url"),
        (r#"{"url": "ftp://x"}"#, "400 malformed /url"),
        (
            r#"{"url": "https://no.example/"}"#,
            "422 callback_not_allowed /url",
        ),
        (
            r#"{"url": "https://ok.example/", "secret": "whsec_AAAA"}"#,
            "400 malformed /secret",
        ),
        (
            r#"{"url": "https://ok.example/", "outcomes": ["late"]}"#,
            "400 malformed /outcomes/0",
        ),
        (
            r#"{"url": "https://ok.example/", "uri": ""}"#,
            "400 malformed /uri",
        ),
    ] {
        assert_eq!(
            put(&server, &server.key, body).await.problem(),
            problem,
            "{body}"
        );
    }
    let reader = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    assert_eq!(put(&server, &reader, SET).await.problem(), "403 forbidden");
    for (method, path) in [("DELETE", "/v1/callbacks"), ("POST", "/v1/callbacks/test")] {
        let refused = server.ask(method, path, "").await;
        assert_eq!(refused.problem(), "404 no_callback", "{method} {path}");
    }
    let resend = "/v1/callbacks/dead-letters/1/resend";
    assert_eq!(
        server.ask("POST", resend, "").await.problem(),
        "404 not_found"
    );
    assert_eq!(fake.posts().len(), 0);
    server.stop().await;
}

#[tokio::test]
async fn a_test_that_waited_for_its_place_goes_where_the_callback_is_then() {
    let fake = Fake::default();
    let server = Arc::new(with(&fake, CallbackLimits::default()).await);
    put(&server, &server.key, SET).await;
    let quiet = fake.quiet.write().await;
    let test = || {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.ask("POST", "/v1/callbacks/test", "").await.status })
    };
    let mut tests: Vec<_> = (0..8).map(|_| test()).collect();
    // All places are taken.
    until(|| fake.posts().len() == 8).await;
    tests.push(test());
    // It goes the same way as these.
    for _ in 0..20 {
        server.ask("GET", "/v1/callbacks", "").await;
    }
    let moved = put(&server, &server.key, r#"{"url": "https://new.example/"}"#).await;
    assert_eq!(moved.status, 200);
    drop(quiet);
    for one in tests {
        assert_eq!(one.await.unwrap(), 200);
    }
    let posts = fake.posts();
    let to: Vec<&str> = posts.iter().map(|post| post.url.as_str()).collect();
    assert_eq!(to[..8], ["https://ok.example/"; 8]);
    assert_eq!(to[8..], ["https://new.example/"]);
    Arc::into_inner(server).unwrap().stop().await;
}

#[tokio::test]
async fn an_apps_callback_is_told_of_its_own_outcomes_in_batches_and_in_order() {
    let fake = Fake::default();
    let limits = CallbackLimits {
        batch: 3,
        ..CallbackLimits::default()
    };
    let server = with(&fake, limits).await;
    let set = put(
        &server,
        &server.key,
        r#"{"url": "https://ok.example/", "outcomes": null}"#,
    )
    .await;
    assert_eq!(set.status, 200);
    assert!(set.text().contains("whsec_"));
    // The first one is failing while the others come, so that they come together.
    fake.says([status(503)]);
    for at_ms in 1..=8 {
        end(&server, AppId::DEFAULT, at_ms);
        end(&server, OTHER_APP, 100 + at_ms);
    }
    until(|| fake.ends().concat().contains(&8)).await;
    let ends = fake.ends();
    assert_eq!(ends[0], ends[1], "the same batch again");
    assert_eq!(ends[1..].concat(), (1..=8).collect::<Vec<_>>());
    assert!(ends.iter().all(|batch| batch.len() <= 3), "{ends:?}");
    let id = |post: &Post| post.headers[0].1.clone();
    let posts = fake.posts();
    assert_eq!(id(&posts[0]), id(&posts[1]));
    assert_ne!(id(&posts[1]), id(&posts[2]));
    let other = server.key_with(OTHER_APP, Scopes::ALL).await;
    let bearer = format!("Bearer {other}");
    let headers = [("authorization", bearer.as_str())];
    let none = send(server.api, "GET", "/v1/callbacks", &headers, b"").await;
    assert_eq!(none.problem(), "404 no_callback");
    server.stop().await;
}

#[tokio::test]
async fn only_chosen_outcomes_are_posted_and_a_batch_that_comes_again_has_the_same_id() {
    let fake = Fake::default();
    let server = with(&fake, CallbackLimits::default()).await;
    let body = r#"{"url": "https://ok.example/", "outcomes": ["expired"]}"#;
    assert_eq!(put(&server, &server.key, body).await.status, 200);
    fake.says([Err(PostError::Broken("cut".to_owned()))]);
    // The batch ends behind an outcome that is not wanted; what comes later does not change it.
    end(&server, AppId::DEFAULT, 2);
    end(&server, AppId::DEFAULT, 3);
    until(|| fake.posts().len() == 1).await;
    end(&server, AppId::DEFAULT, 4);
    until(|| fake.ends().concat().contains(&4)).await;
    assert_eq!(fake.ends()[..2], [[2], [2]]);
    assert_eq!(fake.posts()[0].headers[0], fake.posts()[1].headers[0]);
    assert_eq!(fake.ends()[2..].concat(), [4]);
    server.stop().await;
}

#[tokio::test]
async fn a_batch_that_is_wrong_in_itself_is_given_up_and_the_next_one_goes_out() {
    let fake = Fake::default();
    let limits = CallbackLimits {
        batch: 1,
        retry_max: Duration::from_millis(1),
        dead_letters: 2,
        ..CallbackLimits::default()
    };
    let server = with(&fake, limits).await;
    assert_eq!(put(&server, &server.key, SET).await.status, 200);
    // Three batches, ten tries each.
    fake.says((0..30).map(|_| status(422)));
    for at_ms in 1..=4 {
        end(&server, AppId::DEFAULT, at_ms);
    }
    until(|| fake.ends().concat().contains(&4)).await;
    let path = "/v1/callbacks/dead-letters";
    let listed = server.ask("GET", path, "").await.json();
    let letters = listed["dead_letters"].as_array().unwrap();
    let numbers: Vec<&Value> = letters.iter().map(|letter| &letter["number"]).collect();
    assert_eq!(numbers, [&json!(2), &json!(3)], "the oldest one went");
    assert_eq!(
        (&letters[0]["tries"], &letters[0]["why"]),
        (&json!(10), &json!("it answered 422"))
    );
    let page = server
        .ask("GET", &format!("{path}?limit=1"), "")
        .await
        .json();
    assert_eq!(page["next"], 2);
    fake.says([status(500)]);
    let resend = format!("{path}/3/resend");
    assert_eq!(
        server.ask("POST", &resend, "").await.problem(),
        "502 callback_failed"
    );
    let taken = server.ask("POST", &resend, "").await;
    assert_eq!((taken.status, taken.json()), (200, json!({"status": 200})));
    let last = fake.posts().pop().unwrap();
    assert_eq!(json!(last.headers[0].1), letters[1]["id"]);
    assert_eq!(
        server.ask("DELETE", &format!("{path}/2"), "").await.status,
        204
    );
    assert_eq!(
        server
            .ask("DELETE", &format!("{path}/2"), "")
            .await
            .problem(),
        "404 not_found"
    );
    let shown = server.ask("GET", "/v1/callbacks", "").await.json();
    assert_eq!(
        (&shown["dead_letters"], &shown["state"]),
        (&json!(0), &json!("ok"))
    );
    assert_eq!(server.ask("DELETE", "/v1/callbacks", "").await.status, 204);
    server.stop().await;
}

#[tokio::test]
async fn a_secret_that_is_rotated_while_the_history_is_read_stays_rotated() {
    let fake = Fake::default();
    let server = with(&fake, CallbackLimits::default()).await;
    let expired = r#"{"url": "https://ok.example/", "outcomes": ["expired"]}"#;
    assert_eq!(put(&server, &server.key, expired).await.status, 200);
    server.store.hold_events(true);
    // Not wanted: the poster only notes that it looked at it.
    end(&server, AppId::DEFAULT, 1);
    until(|| server.store.events_held() > 0).await;
    let rotated = server
        .ask("POST", "/v1/callbacks/secret", r#"{"overlap_s": 0}"#)
        .await;
    assert_eq!(rotated.status, 200);
    let secret = rotated.json()["secret"].as_str().unwrap().to_owned();
    let before = server.store.event_reads();
    server.store.hold_events(false);
    // The read that was held, and the one after what came of it.
    until(|| server.store.event_reads() >= before + 2).await;
    end(&server, AppId::DEFAULT, 2);
    until(|| fake.posts().len() == 1).await;
    let post = &fake.posts()[0];
    let header = |name: &str| {
        let found = post.headers.iter().find(|(known, _)| *known == name);
        found.unwrap().1.clone()
    };
    let key = BASE64_STANDARD
        .decode(secret.strip_prefix("whsec_").unwrap())
        .unwrap();
    let signed = format!(
        "{}.{}.{}",
        header("webhook-id"),
        header("webhook-timestamp"),
        std::str::from_utf8(&post.body).unwrap()
    );
    let sum = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &key), signed.as_bytes());
    let expected = format!("v1,{}", BASE64_STANDARD.encode(sum));
    assert_eq!(
        header("webhook-signature").split(' ').next(),
        Some(&*expected)
    );
    server.stop().await;
}
