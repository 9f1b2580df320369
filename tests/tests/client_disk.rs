//! The reference client on a disk that fails, hangs and forgets: a file system that misbehaves under its state directory, and
//! the server and the clock for tests in front of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_client::testing::{Outcome, PATIENCE, Server, content};
use bellwire_client::{Builder, Verdict};
use bellwire_faultfs::{FaultFs, Op, Options};
use rustix::io::Errno;

/// Longer than any client waits.
const FOR_EVER: Duration = Duration::from_secs(3_600);

/// Histories of power cuts, each with its own luck.
const SEEDS: u64 = 12;

#[derive(Clone, Default)]
struct Shown(Arc<Mutex<Vec<String>>>);

impl Shown {
    fn titles(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
}

fn app(server: &Server, state: &Path, shown: &Shown) -> Builder {
    let shown = shown.clone();
    server
        .client()
        .state_dir(state)
        .on_notification(move |notification| {
            let title = notification.content.title.unwrap();
            shown.0.lock().unwrap().push(title);
            Verdict::Acknowledge
        })
}

/// A disk, and a directory on it that is not there yet.
fn disk() -> (FaultFs, std::path::PathBuf) {
    let disk = FaultFs::new(&Options::default()).expect("a file system that misbehaves");
    let state = disk.path().join("device/state");
    (disk, state)
}

#[tokio::test]
async fn what_a_failed_sync_did_not_save_is_not_acknowledged_and_not_shown_again() {
    let (disk, state) = disk();
    let (server, shown) = (Server::new(), Shown::default());
    let client = app(&server, &state, &shown).start().await.unwrap();
    server.attached().await;
    disk.fail_next(Op::Sync, Errno::IO, 0);
    let id = server.notify(content("one", ""));
    // The session ends without a verdict; in the next one the server repeats, and the client answers without the app.
    server.sessions_in_time(2).await;
    assert_eq!(server.outcome(id).await, Outcome::Acknowledged);
    assert_eq!(shown.titles(), ["one"]);
    assert_eq!(disk.faults_waiting(), 0);
    client.shutdown().await;
}

#[tokio::test]
async fn whatever_the_power_leaves_of_the_disk_what_was_acknowledged_is_not_shown_again() {
    for seed in 0..SEEDS {
        let (disk, state) = disk();
        let (server, shown) = (Server::new(), Shown::default());
        let mut ids = Vec::new();
        let mut wishes = Vec::new();
        for life in 1..=3 {
            let client = app(&server, &state, &shown).start().await.unwrap();
            let topic = format!("topic {life}");
            client.subscribe([topic.clone()]).await.unwrap();
            wishes.push(topic);
            for number in 1..=life {
                ids.push(server.notify(content(format!("{life}.{number}"), "")));
            }
            for &id in &ids {
                assert_eq!(
                    server.outcome(id).await,
                    Outcome::Acknowledged,
                    "seed {seed}"
                );
            }
            disk.power_cut(seed * 10 + life);
            client.crash().await;
            server.detached().await;
            disk.power_on().unwrap();
            ids.iter().for_each(|id| server.repeat(*id));
        }
        let client = app(&server, &state, &shown).start().await.unwrap();
        for &id in &ids {
            assert_eq!(
                server.outcome(id).await,
                Outcome::Acknowledged,
                "seed {seed}"
            );
        }
        client.shutdown().await;
        let expected = ["1.1", "2.1", "2.2", "3.1", "3.2", "3.3"];
        assert_eq!(shown.titles(), expected, "seed {seed}");
        assert_eq!(server.topics(), wishes, "seed {seed}");
    }
}

#[tokio::test]
async fn a_client_leaves_although_its_disk_hangs_and_tells_nothing_that_is_not_safe() {
    let (disk, state) = disk();
    let (server, shown) = (Server::new(), Shown::default());
    let client = app(&server, &state, &shown).start().await.unwrap();
    server.attached().await;
    disk.delay(Op::Sync, FOR_EVER);
    let id = server.notify(content("one", ""));
    let leaving = async {
        while shown.titles().is_empty() {
            tokio::task::yield_now().await;
        }
        let leaving = client.shutdown();
        tokio::pin!(leaving);
        loop {
            tokio::select! {
                () = &mut leaving => break,
                // What it waits for by its own clock passes quickly.
                () = tokio::time::sleep(Duration::from_millis(50)) => {
                    server.clock().advance(Duration::from_secs(1));
                }
            }
        }
    };
    let left = tokio::time::timeout(PATIENCE, leaving).await;
    // The thread that still waits for the disk ends with it.
    disk.power_cut(1);
    left.expect("it waits for its disk");
    assert_eq!(server.outcome_now(id), None);
}
