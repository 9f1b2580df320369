//! An app that must not do anything twice, even when its process is killed in the middle.
//!
//! The client remembers what was answered, but a process can die after the callback and before the disk has the verdict; then
//! the notification comes again. An app for which that matters remembers the ids in its own data, in the same transaction as
//! what it does. Here the data is a ledger of payments, one line each, and a line is one transaction.
//!
//! ```sh
//! cargo run -p bellwire-client --example exactly_once -- localhost:4433 bellwire-data/dev-ca.pem anna.json
//! ```

use std::collections::BTreeSet;
use std::error::Error;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, PoisonError};

use bellwire_client::{Builder, Client, Id, Notification, Trust, Verdict};

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
    let [server, ca, credentials] = &arguments[..] else {
        return Err("usage: exactly_once SERVER CA.pem CREDENTIALS.json".into());
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
    let ledger = Ledger::open(Path::new("payments"))?;
    let client = app(builder, Path::new("payments-state"), ledger)
        .start()
        .await?;
    tokio::signal::ctrl_c().await?;
    client.shutdown().await;
    Ok(())
}

fn app(builder: Builder, state: &Path, ledger: Ledger) -> Builder {
    builder
        .state_dir(state)
        .on_notification(move |notification| {
            match ledger.pay(&notification) {
                Ok(()) => Verdict::Acknowledge,
                // Not lost: the publisher reads the reason.
                Err(error) => Verdict::decline(format!("not booked: {error}")),
            }
        })
}

/// Payments, each with the id of the notification that asked for it.
struct Ledger {
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    /// What is in the file. A real one forgets ids that are older than the longest lifetime of a notification.
    paid: BTreeSet<Id>,
}

impl Ledger {
    fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        // A line without its end was cut by a crash, so it was never paid.
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        file.set_len(whole as u64)?;
        file.seek(io::SeekFrom::End(0))?;
        let ids = text[..whole].lines().filter_map(|line| line.get(..26));
        let paid = ids.filter_map(|id| id.parse().ok()).collect();
        let inner = Mutex::new(Inner { file, paid });
        Ok(Self { inner })
    }

    /// Pays, unless this notification was paid before: one line, written and synced at once.
    fn pay(&self, notification: &Notification) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.paid.contains(&notification.id) {
            return Ok(());
        }
        let what = notification.content.title.as_deref().unwrap_or_default();
        let line = format!("{} {}\n", notification.id, what.replace('\n', " "));
        let end = inner.file.stream_position()?;
        let mut write = || {
            inner.file.write_all(line.as_bytes())?;
            inner.file.sync_data()
        };
        if let Err(error) = write() {
            // Half a line must not become the beginning of the next one.
            inner.file.set_len(end)?;
            inner.file.seek(io::SeekFrom::Start(end))?;
            return Err(error);
        }
        inner.paid.insert(notification.id);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bellwire_client::testing::{Outcome, Server, content};

    use super::*;

    #[tokio::test]
    async fn a_payment_is_made_once_even_if_the_client_forgets_everything() {
        let directory = tempfile::tempdir().unwrap();
        let payments = directory.path().join("payments");
        let server = Server::new();
        let mut order = None;
        // Three lives. Each loses the client's own memory, which is worse than any crash.
        for life in 0..3 {
            let state = directory.path().join(format!("state-{life}"));
            let ledger = Ledger::open(&payments).unwrap();
            let client = app(server.client(), &state, ledger).start().await.unwrap();
            let id = *order.get_or_insert_with(|| server.notify(content("12.50 to Ben", "")));
            assert_eq!(server.outcome(id).await, Outcome::Acknowledged);
            client.crash().await;
            server.detached().await;
            server.repeat(id);
            // The disk kept half of a line that was about to be written.
            let mut file = File::options().append(true).open(&payments).unwrap();
            file.write_all(b"half of a li").unwrap();
        }
        drop(Ledger::open(&payments).unwrap());
        let text = std::fs::read_to_string(&payments).unwrap();
        assert_eq!(text, format!("{} 12.50 to Ben\n", order.unwrap()));
    }
}
