//! The smallest whole app: it prints what arrives, until Ctrl-C.
//!
//! ```sh
//! bellwire serve &
//! bellwire device add --user anna --out anna.json
//! cargo run -p bellwire-client --example receive -- localhost:4433 bellwire-data/dev-ca.pem anna.json
//! ```

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "an app names the events that it cares for; later versions bring more"
)]

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;

use bellwire_client::{Builder, Client, Event, Notification, Trust, Verdict};

/// What `bellwire device add --out` and `POST /v1/devices` write.
#[derive(serde::Deserialize)]
struct Credentials {
    device: String,
    secret: String,
}

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
        return Err("usage: receive SERVER CA.pem CREDENTIALS.json".into());
    };
    let credentials: Credentials = serde_json::from_slice(&std::fs::read(credentials)?)?;
    let builder = Client::builder()
        .server(server)
        .trust(Trust::File(ca.into()))
        .device(credentials.device.parse()?, credentials.secret);
    let client = app(builder, Path::new("receive-state"), show)
        .start()
        .await?;
    tokio::signal::ctrl_c().await?;
    // Without this line everything works as well: the server notices that we are gone, a little later.
    client.shutdown().await;
    Ok(())
}

/// The app itself. Where it is connected to comes from outside, so that the test below can run it.
fn app(
    builder: Builder,
    state: &Path,
    show: impl Fn(&Notification) + Send + Sync + 'static,
) -> Builder {
    builder
        .state_dir(state)
        .on_notification(move |notification| {
            show(&notification);
            Verdict::Acknowledge
        })
        .on_event(|event| match event {
            Event::Connected { carrier, .. } => eprintln!("connected over {}", carrier.name()),
            Event::Disconnected { why, .. } => eprintln!("{why}. {}", why.advice()),
            _ => {}
        })
}

fn show(notification: &Notification) {
    let content = &notification.content;
    println!(
        "{}: {}",
        content.title.as_deref().unwrap_or("(no title)"),
        content.body.as_deref().unwrap_or_default()
    );
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::{Arc, Mutex};

    use bellwire_client::testing::{Outcome, Server, content};

    use super::*;

    #[tokio::test]
    async fn what_arrives_is_shown_once_although_the_connection_breaks() {
        let directory = tempfile::tempdir().unwrap();
        let (server, shown) = (Server::new(), Arc::new(Mutex::new(Vec::new())));
        let titles = shown.clone();
        let app = app(server.client(), directory.path(), move |notification| {
            let title = notification.content.title.clone();
            titles.lock().unwrap().push(title.unwrap());
        });
        let client = app.start().await.unwrap();
        let invoice = server.notify(content("Invoice", "Please approve"));
        assert_eq!(server.outcome(invoice).await, Outcome::Acknowledged);
        // The server never got the answer, and asks again in the next session.
        server.repeat(invoice);
        server.break_link();
        server.sessions_in_time(2).await;
        assert_eq!(server.outcome(invoice).await, Outcome::Acknowledged);
        client.shutdown().await;
        assert_eq!(*shown.lock().unwrap(), ["Invoice"]);
    }
}
