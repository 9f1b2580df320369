//! An app that shows notices until they are taken back: what was withdrawn leaves the board again, and the device is a member of
//! the topics that are named on the command line, as far as the app's rules allow it.
//!
//! ```sh
//! cargo run -p bellwire-client --example noticeboard -- localhost:4433 bellwire-data/dev-ca.pem anna.json canteen lift
//! ```

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "an app names the events that it cares for; later versions bring more"
)]

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwire_client::{Builder, Client, Event, Id, Trust, Verdict};

/// Notices on the board; the oldest makes room.
const NOTICES_MAX: usize = 20;

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [server, ca, credentials, topics @ ..] = &arguments[..] else {
        return Err("usage: noticeboard SERVER CA.pem CREDENTIALS.json [TOPIC...]".into());
    };
    let credentials: serde_json::Value = serde_json::from_slice(&std::fs::read(credentials)?)?;
    let text = |name: &str| {
        credentials[name]
            .as_str()
            .ok_or("no credentials")
            .map(str::to_owned)
    };
    let builder = Client::builder()
        .server(server)
        .trust(Trust::File(ca.into()))
        .device(text("device")?.parse()?, text("secret")?);
    let client = app(builder, Path::new("noticeboard-state"), Board::default())
        .start()
        .await?;
    // From here on the wish is on disk. It is said when there is a session, and what comes of it is told by an event.
    if !topics.is_empty() {
        client.subscribe(topics).await?;
    }
    tokio::signal::ctrl_c().await?;
    client.shutdown().await;
    Ok(())
}

fn app(builder: Builder, state: &Path, board: Board) -> Builder {
    let for_events = board.clone();
    builder
        .state_dir(state)
        .on_notification(move |notification| {
            let title = notification.content.title.unwrap_or_default();
            board.pin(notification.id, notification.accepted_ms, title);
            Verdict::Acknowledge
        })
        .on_event(move |event| match event {
            // Comes after the callback above, never before it. It may name ids that were never here, or name them again.
            Event::Withdrawn { ids } => for_events.take_off(&ids),
            Event::Subscribed { topics, refused } => {
                println!("topics: {}", topics.join(" "));
                if !refused.is_empty() {
                    println!("not allowed: {}", refused.join(" "));
                }
            }
            Event::Disconnected { why, .. } => eprintln!("{why}. {}", why.advice()),
            _ => {}
        })
}

/// What hangs on the board, by age. A real one is on disk or on a screen.
#[derive(Clone, Default)]
struct Board {
    notices: Arc<Mutex<BTreeMap<(u64, Id), String>>>,
}

impl Board {
    fn notices(&self) -> MutexGuard<'_, BTreeMap<(u64, Id), String>> {
        self.notices.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pin(&self, id: Id, accepted_ms: u64, title: String) {
        println!("+ {title}");
        let mut notices = self.notices();
        notices.insert((accepted_ms, id), title);
        if notices.len() > NOTICES_MAX {
            notices.pop_first();
        }
    }

    fn take_off(&self, ids: &[Id]) {
        self.notices().retain(|(_, id), title| {
            let stays = !ids.contains(id);
            if !stays {
                println!("- {title}");
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bellwire_client::testing::{Outcome, PATIENCE, Server, content};

    use super::*;

    #[tokio::test]
    async fn what_was_taken_back_leaves_the_board() {
        let directory = tempfile::tempdir().unwrap();
        let (server, board) = (Server::new(), Board::default());
        let client = app(server.client(), directory.path(), board.clone())
            .start()
            .await
            .unwrap();
        client.subscribe(["canteen"]).await.unwrap();
        server.attached().await;
        let [soup, lift] = ["soup", "lift"].map(|title| server.notify(content(title, "")));
        assert_eq!(server.outcome(soup).await, Outcome::Acknowledged);
        assert_eq!(server.outcome(lift).await, Outcome::Acknowledged);
        server.withdraw(vec![soup]);
        let alone = async {
            while board.notices().len() > 1 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(PATIENCE, alone).await.unwrap();
        assert_eq!(board.notices().values().collect::<Vec<_>>(), ["lift"]);
        assert_eq!(server.topics(), ["canteen"]);
        client.shutdown().await;
    }
}
