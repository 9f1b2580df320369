//! `bellwire-device` and the client in Python (tests/python/client.py), which was written from docs/write-a-client.md alone:
//! the same stories for both.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use bellwire_client::{Code, GoawayReason};
use bellwire_protocol::{DeviceFrame, ErrorFrame, Goaway, Notify, ServerFrame, Topics, Withdraw};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

use crate::support::{DEVICE, FakeServer, NOW_MS, PATIENCE, Udp, id, notify};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Rust,
    Python,
}

const BOTH: [Which; 2] = [Which::Rust, Which::Python];

/// A directory with what a device is given, and the server that it talks to.
struct World {
    server: FakeServer,
    dir: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let server = FakeServer::start(Udp::Quic).await;
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("ca"), &server.ca_pem).unwrap();
        let credentials = format!(r#"{{"device":"{DEVICE}","secret":"a secret"}}"#);
        std::fs::write(dir.path().join("anna.json"), credentials).unwrap();
        Self { server, dir }
    }

    fn state(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    fn command(&self, which: Which) -> Command {
        let mut command = match which {
            Which::Rust => {
                let mut command = Command::new(env!("CARGO_BIN_EXE_bellwire-device"));
                command.args(["listen", "--json"]);
                command
            }
            Which::Python => {
                let mut command = Command::new(python());
                command
                    .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/python/client.py"));
                command
            }
        };
        command
            .args([
                "--server",
                &format!("localhost:{}", self.server.address.port()),
            ])
            .arg("--ca")
            .arg(self.dir.path().join("ca"))
            .arg("--credentials")
            .arg(self.dir.path().join("anna.json"))
            .arg("--state-dir")
            .arg(self.state())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    fn start(&self, which: Which, more: &[&str]) -> Program {
        let mut child = self.command(which).args(more).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Program {
            which,
            child,
            lines,
        }
    }
}

/// The interpreter with what the client needs: the one that tests/run made, or the system's.
fn python() -> String {
    let python = std::env::var("BELLWIRE_TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let check = std::process::Command::new(&python)
        .args(["-c", "import websockets.asyncio.client"])
        .output();
    let ready = check.is_ok_and(|output| output.status.success());
    assert!(
        ready,
        "{python} has no `websockets`: use tests/run, or `python3 -m pip install -r tests/requirements.txt` and set BELLWIRE_TEST_PYTHON"
    );
    python
}

struct Program {
    which: Which,
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Program {
    /// The next line with this event.
    async fn event(&mut self, name: &str) -> Value {
        let waiting = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                let value: Value = serde_json::from_str(&line).unwrap();
                if value["event"] == name {
                    return value;
                }
            }
            let mut errors = String::new();
            self.child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut errors)
                .await
                .unwrap();
            panic!("{:?} ended without `{name}`: {errors}", self.which);
        };
        tokio::time::timeout(PATIENCE, waiting)
            .await
            .unwrap_or_else(|_| panic!("no `{name}`"))
    }

    /// Waits until it has ended by itself; a code that is not expected is told with its last words.
    async fn ended_with(mut self, code: i32) {
        let ended = tokio::time::timeout(PATIENCE, self.child.wait())
            .await
            .expect("it does not end")
            .unwrap();
        if ended.code() != Some(code) {
            let mut errors = String::new();
            self.child
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut errors)
                .await
                .unwrap();
            panic!("{:?} ended with {ended}: {errors}", self.which);
        }
    }

    /// SIGKILL: nothing is said or saved any more.
    async fn kill(self) {
        self.kill_and_read().await;
    }

    /// The same; answers with the ids of the notifications that it had printed by then.
    async fn kill_and_read(mut self) -> Vec<String> {
        self.child.kill().await.unwrap();
        let mut ids = Vec::new();
        while let Ok(Some(line)) = self.lines.next_line().await {
            // The last line may be cut.
            let Ok(value) = serde_json::from_str::<Value>(&line) else {
                break;
            };
            if value["event"] == "notification" {
                ids.push(value["id"].as_str().unwrap().to_owned());
            }
        }
        ids
    }
}

#[tokio::test]
async fn a_program_prints_what_comes_answers_it_and_leaves_after_the_wanted_number() {
    for which in BOTH {
        let mut world = World::new().await;
        let mut program = world.start(which, &["--count", "3"]);
        let mut peer = world.server.accept().await;
        let hello = peer.welcome().await;
        assert_eq!(
            (hello.device, hello.attempt, hello.seen.len()),
            (DEVICE, 1, 0)
        );
        program.event("connected").await;
        peer.say((1..=3).map(|number| notify(number, number))).await;
        peer.acknowledged_up_to(3).await;
        for number in 1..=3 {
            let notification = program.event("notification").await;
            assert_eq!(notification["id"], id(number).to_string());
            assert_eq!(notification["title"], number.to_string());
            assert_eq!(notification["urgency"], "normal");
        }
        peer.goodbye().await;
        program.ended_with(0).await;
    }
}

#[tokio::test]
async fn a_killed_program_gives_the_same_verdict_again_and_prints_nothing_twice() {
    for which in BOTH {
        let mut world = World::new().await;
        let program = world.start(which, &[]);
        let mut peer = world.server.accept().await;
        peer.welcome().await;
        peer.say([notify(1, 1), notify(2, 2)]).await;
        peer.acknowledged_up_to(2).await;
        program.kill().await;

        let mut program = world.start(which, &["--count", "1"]);
        let mut peer = world.server.accept().await;
        let hello = peer.welcome().await;
        assert_eq!(
            hello.seen.iter().map(|seen| seen.id).collect::<Vec<_>>(),
            [id(1), id(2)]
        );
        // A server that overlooks `seen` repeats them.
        peer.say([notify(1, 1), notify(2, 2), notify(3, 3)]).await;
        peer.acknowledged_up_to(3).await;
        assert_eq!(
            program.event("notification").await["title"],
            "3",
            "{which:?}"
        );
        peer.goodbye().await;
        program.ended_with(0).await;
    }
}

#[tokio::test]
async fn a_program_declines_what_comes_too_late() {
    for which in BOTH {
        let mut world = World::new().await;
        let mut program = world.start(which, &[]);
        let mut peer = world.server.accept().await;
        peer.welcome().await;
        let ServerFrame::Notify(late) = notify(1, 1) else {
            unreachable!()
        };
        peer.say([ServerFrame::Notify(Notify {
            expires_ms: NOW_MS,
            ..late
        })])
        .await;
        match peer.hear().await {
            Ok(DeviceFrame::Decline(decline)) => {
                assert_eq!((decline.id, decline.reason.as_str()), (id(1), "expired"))
            }
            other => panic!("{which:?}: {other:?}"),
        }
        assert_eq!(program.event("expired").await["id"], id(1).to_string());
    }
}

#[tokio::test]
async fn a_program_leaves_a_draining_server_and_comes_back_when_told() {
    for which in BOTH {
        let mut world = World::new().await;
        let mut program = world.start(which, &["--count", "2"]);
        let mut peer = world.server.accept().await;
        let first = peer.welcome().await;
        let goaway = Goaway {
            reason: GoawayReason::Drain,
            reconnect_ms: (1, 50).into(),
            endpoint: None,
        };
        peer.say([notify(1, 1), ServerFrame::Goaway(goaway)]).await;
        peer.acknowledged_up_to(1).await;
        peer.goodbye().await;
        let mut peer = world.server.accept().await;
        let second = peer.welcome().await;
        assert_eq!((second.instance, second.attempt), (first.instance, 2));
        peer.say([notify(1, 2)]).await;
        peer.acknowledged_up_to(1).await;
        peer.goodbye().await;
        program.event("disconnected").await;
        program.ended_with(0).await;
    }
}

#[tokio::test]
async fn a_program_with_a_wrong_secret_ends_with_3_and_does_not_try_again() {
    for which in BOTH {
        let mut world = World::new().await;
        let mut program = world.start(which, &[]);
        let mut peer = world.server.accept().await;
        assert!(matches!(peer.hear().await, Ok(DeviceFrame::Hello(_))));
        peer.say([ServerFrame::Error(ErrorFrame::new(
            Code::Unauthorized,
            "no",
        ))])
        .await;
        peer.close(Code::Unauthorized).await;
        let told = program.event("disconnected").await;
        assert!(
            told["why"].as_str().unwrap().contains("unauthorized"),
            "{told}"
        );
        assert_eq!(told["retry_in_ms"], Value::Null);
        program.ended_with(3).await;
        assert!(world.server.nobody_else_came());
    }
}

#[tokio::test]
async fn two_programs_do_not_share_a_directory() {
    for which in BOTH {
        let mut world = World::new().await;
        let _first = world.start(which, &[]);
        let mut peer = world.server.accept().await;
        peer.welcome().await;
        let second = world.command(which).output().await.unwrap();
        assert_eq!(second.status.code(), Some(1));
        let errors = String::from_utf8(second.stderr).unwrap();
        assert!(
            errors.contains("in use by another client"),
            "{which:?}: {errors}"
        );
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_program_that_is_told_to_end_says_bye() {
    for which in BOTH {
        let mut world = World::new().await;
        let mut program = world.start(which, &[]);
        let mut peer = world.server.accept().await;
        peer.welcome().await;
        program.event("connected").await;
        let pid = rustix::process::Pid::from_raw(program.child.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        peer.goodbye().await;
        program.ended_with(0).await;
    }
}

#[tokio::test]
async fn a_wrong_authority_is_told_with_what_to_do_and_fail_fast_ends() {
    let world = World::new().await;
    let other = FakeServer::start(Udp::Quic).await;
    std::fs::write(world.dir.path().join("ca"), &other.ca_pem).unwrap();
    let output = world
        .command(Which::Rust)
        .arg("--fail-fast")
        .output()
        .await
        .unwrap();
    assert_eq!(output.status.code(), Some(4));
    let told = String::from_utf8(output.stdout).unwrap();
    assert!(
        told.contains("invalid peer certificate") && told.contains("--ca FILE"),
        "{told}"
    );
}

#[tokio::test]
async fn a_line_for_people_is_plain_without_a_terminal() {
    let mut world = World::new().await;
    let mut command = Command::new(env!("CARGO_BIN_EXE_bellwire-device"));
    command.args([
        "listen",
        "--count",
        "1",
        "--server",
        &format!("localhost:{}", world.server.address.port()),
    ]);
    command.arg("--ca").arg(world.dir.path().join("ca"));
    command.arg("--state-dir").arg(world.state());
    command
        .args(["--device", &DEVICE.to_string()])
        .env("BELLWIRE_DEVICE_SECRET", "a secret");
    let running = tokio::spawn(command.output());
    let mut peer = world.server.accept().await;
    assert_eq!(peer.welcome().await.secret.unwrap().expose(), "a secret");
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    peer.goodbye().await;
    let output = running.await.unwrap().unwrap();
    assert_eq!(
        String::from_utf8(output.stdout).unwrap(),
        format!("22:13:20Z  normal    1  ({})\n", id(1))
    );
    let about = String::from_utf8(output.stderr).unwrap();
    assert!(about.starts_with("connected over "), "{about}");
    assert!(!about.contains('\u{1b}'), "{about}");
}

/// Rounds of kill and restart for each program; each one adds notifications and repeats what has no verdict.
const KILLS: usize = 6;

#[tokio::test]
async fn what_was_acknowledged_was_printed_and_is_never_printed_again_however_often_it_is_killed() {
    for which in BOTH {
        let mut world = World::new().await;
        let ids: Vec<_> = (0..100).map(id).collect();
        let number = |text: &str| ids.iter().position(|id| id.to_string() == text).unwrap() as u64;
        let mut without_verdict: Vec<u64> = Vec::new();
        let mut printed: Vec<u64> = Vec::new();
        for round in 0..=KILLS {
            let last = round == KILLS;
            // A killed process closes its TCP connection; on UDP nobody would know.
            let more: &[&str] = match which {
                Which::Rust => &["--window", "128", "--carrier", "websocket"],
                Which::Python => &["--window", "128"],
            };
            let mut program = world.start(which, more);
            let mut peer = world.server.accept().await;
            let hello = peer.welcome().await;
            let seen: Vec<_> = hello
                .seen
                .iter()
                .map(|seen| number(&seen.id.to_string()))
                .collect();
            for acknowledged in &seen {
                assert!(
                    printed.contains(acknowledged),
                    "{which:?}: {acknowledged} was acknowledged, not printed"
                );
            }
            // This server overlooks `seen`, so that the window has to answer.
            let first = round as u64 * 10;
            without_verdict.extend(first..first + if last { 0 } else { 10 });
            let sent = without_verdict.clone();
            peer.say(
                sent.iter()
                    .enumerate()
                    .map(|(place, number)| notify(place as u64 + 1, *number)),
            )
            .await;
            // Another place in the batch each time, and the rest of what it manages to do races the kill.
            let mut lines = Vec::new();
            for _ in 0..if last { 0 } else { round + 1 } {
                lines.push(number(
                    program.event("notification").await["id"].as_str().unwrap(),
                ));
            }
            if last && !sent.is_empty() {
                peer.acknowledged_up_to(sent.len() as u64).await;
                without_verdict.clear();
            }
            lines.extend(program.kill_and_read().await.iter().map(|id| number(id)));
            for line in &lines {
                let fresh = sent.contains(line) && !seen.contains(line);
                assert!(
                    fresh,
                    "{which:?}: {line} was printed again after its verdict"
                );
            }
            while let Ok(frame) = peer.hear().await {
                let DeviceFrame::Ack(bellwire_protocol::Ack::UpTo(up_to)) = frame else {
                    continue;
                };
                for acknowledged in &sent[..up_to as usize] {
                    without_verdict.retain(|waiting| waiting != acknowledged);
                    let known = printed.contains(acknowledged) || lines.contains(acknowledged);
                    assert!(
                        known,
                        "{which:?}: {acknowledged} was acknowledged, not printed"
                    );
                }
            }
            printed.extend(lines);
        }
        assert!(without_verdict.is_empty());
        let distinct: std::collections::BTreeSet<_> = printed.iter().copied().collect();
        assert_eq!(
            distinct,
            (0..KILLS as u64 * 10).collect(),
            "{which:?}: nothing is missing"
        );
    }
}

/// The most memory that a process ever had, in KiB.
#[cfg(target_os = "linux")]
fn most_memory_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let number = line.unwrap().split_whitespace().nth(1).unwrap();
    number.parse().unwrap()
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn memory_stays_where_it_is_however_much_comes() {
    /// As many as a window holds, each with nearly as much content as a server takes by default.
    const AT_ONCE: u64 = 32;
    const BODY_BYTES: usize = 3_500;
    let large = |seq, number| {
        let ServerFrame::Notify(mut notify) = notify(seq, number) else {
            unreachable!("it makes one")
        };
        notify.redelivered = false;
        notify.content.body = Some("x".repeat(BODY_BYTES));
        ServerFrame::Notify(notify)
    };
    let mut world = World::new().await;
    let mut command = world.command(Which::Rust);
    command.args(["--no-sync", "--quiet"]).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let pid = child.id().unwrap();
    let mut peer = world.server.accept().await;
    peer.welcome().await;
    let mut most = Vec::new();
    for round in 0..120 {
        let from = round * AT_ONCE;
        peer.say((1..=AT_ONCE).map(|place| large(from + place, from + place)))
            .await;
        peer.acknowledged_up_to(from + AT_ONCE).await;
        most.push(most_memory_kib(pid));
    }
    // Ten windows fill every buffer; 110 more, 12 MB of content, and more ids than are remembered, must add next to nothing.
    let grown_kib = most[119] - most[9];
    assert!(grown_kib < 3 * 1_024, "{grown_kib} KiB more: {most:?}");
    child.kill().await.unwrap();
}

#[tokio::test]
async fn a_program_asks_for_topics_and_prints_what_came_of_it_and_what_was_withdrawn() {
    let mut world = World::new().await;
    let topics = ["--subscribe", "news", "--subscribe", "staff"];
    let mut program = world.start(
        Which::Rust,
        &[&topics[..], &["--unsubscribe", "old"]].concat(),
    );
    let mut peer = world.server.accept().await;
    peer.welcome().await;
    let of = |names: &[&str]| Topics {
        topics: names.iter().map(|name| (*name).to_owned()).collect(),
    };
    // The one who left has room for the ones that come.
    assert_eq!(
        peer.hear().await,
        Ok(DeviceFrame::Unsubscribe(of(&["old"])))
    );
    peer.say([ServerFrame::Subscribed(of(&[]))]).await;
    let asked = Ok(DeviceFrame::Subscribe(of(&["news", "staff"])));
    assert_eq!(peer.hear().await, asked);
    peer.say([
        ServerFrame::Subscribed(of(&["news"])),
        ServerFrame::Withdraw(Withdraw { ids: vec![id(4)] }),
    ])
    .await;
    assert_eq!(
        program.event("subscribed").await["refused"],
        serde_json::json!([])
    );
    let answer = program.event("subscribed").await;
    assert_eq!(answer["topics"], serde_json::json!(["news"]));
    assert_eq!(answer["refused"], serde_json::json!(["staff"]));
    let withdrawn = program.event("withdrawn").await;
    assert_eq!(withdrawn["ids"], serde_json::json!([id(4).to_string()]));
    let pid = rustix::process::Pid::from_raw(program.child.id().unwrap() as i32).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    peer.goodbye().await;
    program.ended_with(0).await;

    let status = Command::new(env!("CARGO_BIN_EXE_bellwire-device"))
        .args(["status", "--state-dir"])
        .arg(world.state())
        .output()
        .await
        .unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    assert!(status.contains("topics   news"), "{status}");
}
