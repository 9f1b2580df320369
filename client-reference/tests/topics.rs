//! Topics and withdrawals, as an app sees them: by the server and the clock for tests, and by the golden vectors.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it expects"
)]

use std::path::Path;
use std::sync::{Arc, Mutex};

use bellwire_client::testing::{Outcome, PATIENCE, Reach, Server, content, inspect};
use bellwire_client::{Builder, Carriers, Client, Code, Codec, Event, Id, TopicsError, Verdict};
use bellwire_protocol::{Decoded, DeviceFrame, ServerFrame};
use tokio::sync::{Notify, Semaphore};

/// What the app was told of topics and withdrawals, as text, oldest first.
#[derive(Clone, Default)]
struct Told {
    lines: Arc<Mutex<Vec<String>>>,
    bell: Arc<Notify>,
}

impl Told {
    fn event(&self, event: &Event) {
        let line = match event {
            Event::Subscribed { topics, refused } => {
                format!(
                    "topics [{}] refused [{}]",
                    topics.join(" "),
                    refused.join(" ")
                )
            }
            Event::Withdrawn { ids } => {
                let ids: Vec<_> = ids.iter().map(Id::to_string).collect();
                format!("withdrawn {}", ids.join(" "))
            }
            Event::Trouble { what } => what.clone(),
            _ => return,
        };
        self.lines.lock().unwrap().push(line);
        self.bell.notify_one();
    }

    /// Waits until this many lines are there, and answers with them.
    async fn lines(&self, number: usize) -> Vec<String> {
        let waiting = async {
            loop {
                let bell = self.bell.notified();
                let lines = self.lines.lock().unwrap().clone();
                if lines.len() >= number {
                    return lines;
                }
                bell.await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("no {number} lines: {:?}", self.lines.lock().unwrap()))
    }

    fn now(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }
}

fn client(server: &Server, state: &Path, told: &Told) -> Builder {
    let told = told.clone();
    server
        .client()
        .state_dir(state)
        .on_event(move |event| told.event(&event))
        .on_notification(|_| Verdict::Acknowledge)
}

async fn settle() {
    for _ in 0..64 {
        tokio::task::yield_now().await;
    }
}

/// What the device asked about topics since the last look.
fn asked(server: &Server) -> Vec<String> {
    let heard = server.take_heard().into_iter();
    let asked = heard.filter_map(|frame| match frame {
        DeviceFrame::Subscribe(topics) => Some(format!("+{}", topics.topics.join(" "))),
        DeviceFrame::Unsubscribe(topics) => Some(format!("-{}", topics.topics.join(" "))),
        _ => None,
    });
    asked.collect()
}

#[tokio::test]
async fn a_topic_is_asked_for_once_and_the_answer_is_remembered() {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    server.forbid_topics(["staff"]);
    let app = client(&server, state.path(), &told).start().await.unwrap();
    server.attached().await;
    app.subscribe(["news", "staff"]).await.unwrap();
    assert_eq!(told.lines(1).await, ["topics [news] refused [staff]"]);
    assert_eq!(asked(&server), ["+news staff"]);

    // Neither a new session nor a new process asks again: the backend has decided otherwise meanwhile, and its word stands.
    server.set_topics(["weather"]);
    server.break_link();
    server.sessions_in_time(2).await;
    settle().await;
    assert_eq!(asked(&server), [""; 0]);
    app.shutdown().await;
    let known = inspect(state.path(), &server.clock()).unwrap();
    let topics = known.subscriptions.unwrap().topics;
    assert_eq!(topics.unwrap(), ["news"], "as the server said last");
    let app = client(&server, state.path(), &told).start().await.unwrap();
    server.sessions(3).await;
    settle().await;
    assert_eq!(asked(&server), [""; 0]);
    assert_eq!(server.topics(), ["weather"]);

    // Asking for nothing tells.
    app.subscribe::<&str>([]).await.unwrap();
    assert_eq!(told.lines(2).await[1], "topics [weather] refused []");
    assert_eq!(app.subscriptions().topics.unwrap(), ["weather"]);
    app.unsubscribe(["weather"]).await.unwrap();
    assert_eq!(told.lines(3).await[2], "topics [] refused []");
    app.shutdown().await;
}

#[tokio::test]
async fn a_wish_outlives_the_process_when_there_was_no_session() {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    server.set_topics(["old"]);
    server.reach(Reach::Nothing);
    let app = client(&server, state.path(), &told).start().await.unwrap();
    app.subscribe(["news"]).await.unwrap();
    app.unsubscribe(["old"]).await.unwrap();
    assert_eq!(app.subscriptions().joining, ["news"]);
    // Killed: what was promised is on disk.
    app.crash().await;
    server.reach(Reach::All);
    let app = client(&server, state.path(), &told).start().await.unwrap();
    assert_eq!(
        told.lines(2).await,
        ["topics [] refused []", "topics [news] refused []"]
    );
    assert_eq!(asked(&server), ["-old", "+news"]);
    assert!(app.subscriptions().joining.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn a_request_whose_answer_was_lost_is_said_again() {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    let app = client(&server, state.path(), &told).start().await.unwrap();
    server.attached().await;
    server.be_silent(true);
    app.subscribe(["news"]).await.unwrap();
    settle().await;
    assert_eq!(told.now(), [""; 0]);
    server.be_silent(false);
    server.break_link();
    server.sessions_in_time(2).await;
    assert_eq!(told.lines(1).await, ["topics [news] refused []"]);
    app.shutdown().await;
}

#[tokio::test]
async fn a_topic_over_which_every_session_ends_is_given_up_and_the_app_hears_of_it() {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    server.fail_on_topics(Some(Code::Malformed));
    let app = client(&server, state.path(), &told).start().await.unwrap();
    server.attached().await;
    app.subscribe(["what is this"]).await.unwrap();
    // Three sessions end; the fourth is not asked.
    server.sessions_in_time(4).await;
    settle().await;
    let lines = told.lines(1).await;
    assert!(lines[0].ends_with("given up: what is this"), "{lines:?}");
    assert_eq!(asked(&server).len(), 3);
    server.attached().await;
    assert!(app.subscriptions().joining.is_empty());
    app.shutdown().await;
}

#[tokio::test]
async fn names_are_checked_before_anything_is_asked() {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    let app = client(&server, state.path(), &told).start().await.unwrap();
    server.attached().await;
    for wrong in [vec![String::new()], vec!["x".repeat(129)]] {
        assert!(matches!(
            app.subscribe(wrong).await,
            Err(TopicsError::Invalid)
        ));
    }
    // An iterator without an end is not followed to it.
    let endless = (0u64..).map(|n| n.to_string());
    assert!(matches!(
        app.unsubscribe(endless).await,
        Err(TopicsError::Invalid)
    ));
    let other = app.clone();
    app.shutdown().await;
    assert!(matches!(
        other.subscribe(["a"]).await,
        Err(TopicsError::Gone(_))
    ));
    assert_eq!(asked(&server), [""; 0]);
}

#[tokio::test]
async fn what_is_withdrawn_before_the_app_sees_it_never_reaches_it_and_the_rest_is_told_in_its_turn()
 {
    let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
    let (shown, gate) = (
        Arc::new(Mutex::new(Vec::new())),
        Arc::new(Semaphore::new(0)),
    );
    let (for_app, for_gate) = (shown.clone(), gate.clone());
    let app = client(&server, state.path(), &told)
        .window(2)
        .on_notification_async(move |notification| {
            let (shown, gate) = (for_app.clone(), for_gate.clone());
            async move {
                shown
                    .lock()
                    .unwrap()
                    .push(notification.content.title.unwrap());
                gate.acquire().await.unwrap().forget();
                Verdict::Acknowledge
            }
        })
        .start()
        .await
        .unwrap();
    let [first, second, third, fourth] =
        ["first", "second", "third", "fourth"].map(|title| server.notify(content(title, "")));
    server.attached().await;
    settle().await;
    assert_eq!(*shown.lock().unwrap(), ["first"]);

    // The app works on the first, the second waits for it, the third is not even sent.
    server.withdraw(vec![first, second, third]);
    assert_eq!(
        told.lines(1).await,
        [format!("withdrawn {second} {third}")],
        "the first one is on its way to the screen"
    );
    gate.add_permits(1);
    assert_eq!(told.lines(2).await[1], format!("withdrawn {first}"));
    for id in [first, second, third] {
        assert_eq!(server.outcome(id).await, Outcome::Revoked);
    }
    server
        .heard(|frame| matches!(frame, DeviceFrame::Decline(decline) if decline.id == second && decline.reason == "withdrawn"))
        .await;
    // Both places in the window are free again.
    gate.add_permits(2);
    let fifth = server.notify(content("fifth", ""));
    assert_eq!(server.outcome(fourth).await, Outcome::Acknowledged);
    assert_eq!(server.outcome(fifth).await, Outcome::Acknowledged);
    assert_eq!(*shown.lock().unwrap(), ["first", "fourth", "fifth"]);
    app.shutdown().await;
}

/// The frames that any client is tested with, said to ours in both codecs.
#[tokio::test]
async fn the_golden_frames_reach_the_app() {
    let vectors = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../protocol/vectors/server.json"
    );
    let vectors: serde_json::Value =
        serde_json::from_slice(&std::fs::read(vectors).unwrap()).unwrap();
    let mut expected = Vec::new();
    let mut frames = Vec::new();
    for golden in vectors["frames"].as_array().unwrap() {
        let text = golden["json"].as_str().unwrap();
        let Decoded::Frame(frame) = Codec::Json.decode_server(text.as_bytes()).unwrap() else {
            panic!("unknown: {text}");
        };
        match &frame {
            ServerFrame::Withdraw(withdraw) => {
                let ids: Vec<_> = withdraw.ids.iter().map(Id::to_string).collect();
                expected.push(format!("withdrawn {}", ids.join(" ")));
            }
            ServerFrame::Subscribed(topics) => {
                expected.push(format!("topics [{}] refused []", topics.topics.join(" ")));
            }
            _ => continue,
        }
        frames.push(frame);
    }
    assert!(expected.len() >= 3);
    for (carriers, codec) in [
        (Carriers::Quic, Codec::Cbor),
        (Carriers::WebSocket, Codec::Cbor),
        (Carriers::WebSocket, Codec::Json),
    ] {
        let (server, told, state) = (Server::new(), Told::default(), tempfile::tempdir().unwrap());
        let app: Client = client(&server, state.path(), &told)
            .carriers(carriers)
            .websocket_codec(codec)
            .start()
            .await
            .unwrap();
        server.attached().await;
        frames.iter().for_each(|frame| server.say(frame.clone()));
        assert_eq!(told.lines(expected.len()).await, expected);
        app.shutdown().await;
    }
}
