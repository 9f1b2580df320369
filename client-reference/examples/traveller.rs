//! An app on a device that moves: between an office with a proxy, a home without one, and a pocket where it sleeps. It names the
//! networks by itself, says when a person looks at it, does slow work outside of the callback, and shows what is wrong.
//!
//! ```sh
//! cargo run -p bellwire-client --example traveller -- push.example.org anna.json http://proxy.example.org:3128
//! ```
//!
//! With the authority of a server for development as a fourth argument it runs against that one.

#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "an app names the events that it cares for; later versions bring more"
)]

use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use bellwire_client::{
    Builder, Client, Disconnect, Event, Notification, PresenceState, Proxy, Trust, Verdict,
};
use tokio::sync::mpsc;

/// Notifications that wait for the slow work. When it is full the next callback waits, and behind it the server.
const WORK_MAX: usize = 16;

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
    let [server, credentials, proxy, ca @ ..] = &arguments[..] else {
        return Err("usage: traveller SERVER CREDENTIALS.json PROXY [CA.pem]".into());
    };
    let credentials: serde_json::Value = serde_json::from_slice(&std::fs::read(credentials)?)?;
    let text = |name: &str| {
        credentials[name]
            .as_str()
            .ok_or("no credentials")
            .map(str::to_owned)
    };
    let mut builder = Client::builder()
        .server(server)
        .device(text("device")?.parse()?, text("secret")?);
    // Otherwise the authorities of the machine are trusted.
    if let [ca] = ca {
        builder = builder.trust(Trust::File(ca.into()));
    }
    let (work, mut todo) = mpsc::channel(WORK_MAX);
    let app = app(builder, Path::new("traveller-state"), proxy.parse()?, work);
    let client = app.network("office").start().await?;
    // A real app hears these from its platform.
    client.presence(PresenceState::Active).await?;
    client.network_changed(Some("home".to_owned())).await?;
    loop {
        tokio::select! {
            Some(notification) = todo.recv() => slow_work(notification).await,
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    client.presence(PresenceState::Idle).await?;
    client.shutdown().await;
    Ok(())
}

fn app(builder: Builder, state: &Path, proxy: Proxy, work: mpsc::Sender<Notification>) -> Builder {
    builder
        .state_dir(state)
        // At home the direct way is quicker; in the office there is only the proxy. Each network's way is remembered.
        .proxy_when_needed(proxy)
        .on_notification_async(move |notification| {
            let work = work.clone();
            async move {
                // Acknowledged once it is in good hands. An app that must not lose it in a crash stores it here first.
                match work.send(notification).await {
                    Ok(()) => Verdict::Acknowledge,
                    Err(_) => Verdict::decline("the app is closing"),
                }
            }
        })
        .on_event(|event| {
            if let Some(line) = status_line(&event) {
                eprintln!("{line}");
            }
        })
}

/// What the app shows beside its name.
fn status_line(event: &Event) -> Option<String> {
    match event {
        Event::Connected { .. } => Some("online".to_owned()),
        Event::Disconnected {
            why: Disconnect::Left,
            ..
        } => None,
        Event::Disconnected { why, retry_in } => {
            // The client comes back by itself, unless something must be changed first.
            let state = match retry_in {
                Some(_) => "offline",
                None => "stopped",
            };
            Some(format!("{state}: {why}. {}", why.advice()))
        }
        Event::Woke { slept } if *slept > Duration::from_secs(60) => Some("checking".to_owned()),
        Event::Trouble { what } => Some(what.clone()),
        _ => None,
    }
}

async fn slow_work(notification: Notification) {
    println!("working on {}", notification.id);
    tokio::time::sleep(Duration::from_secs(2)).await;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use bellwire_client::testing::{Outcome, Reach, Server, content, inspect};
    use bellwire_client::{Carrier, Carriers};

    use super::*;

    #[tokio::test]
    async fn it_finds_its_way_in_the_office_and_at_home_and_misses_nothing_in_the_pocket() {
        let directory = tempfile::tempdir().unwrap();
        let server = Server::new();
        let (work, mut todo) = mpsc::channel(WORK_MAX);
        let proxy = "http://proxy.test:3128".parse().unwrap();
        let app = app(server.client(), directory.path(), proxy, work);

        server.reach(Reach::ProxyOnly);
        let app = app.carriers(Carriers::Auto).network("office");
        let client = app.start().await.unwrap();
        assert_eq!(server.attached().await, Carrier::WebSocket);
        let first = server.notify(content("in the office", ""));
        assert_eq!(server.outcome(first).await, Outcome::Acknowledged);

        // On the way home the old connection is dead; something is sent meanwhile, and the machine sleeps.
        server.be_silent(true);
        let second = server.notify(content("on the way", ""));
        server.clock().sleep_machine(Duration::from_secs(1_800));
        server.reach(Reach::All);
        client
            .network_changed(Some("home".to_owned()))
            .await
            .unwrap();
        server.be_silent(false);
        server.break_link();
        server.sessions_in_time(2).await;
        assert_eq!(server.outcome(second).await, Outcome::Acknowledged);
        assert_eq!(server.attached().await, Carrier::Quic);
        client.presence(PresenceState::Active).await.unwrap();
        server.heard(|frame| frame.name() == "presence").await;
        client.shutdown().await;

        let titles = [todo.recv().await, todo.recv().await].map(|work| work.unwrap().content.title);
        assert_eq!(
            titles,
            [
                Some("in the office".to_owned()),
                Some("on the way".to_owned())
            ]
        );
        let found = inspect(directory.path(), &server.clock()).unwrap();
        let mut ways: Vec<_> = found
            .networks
            .unwrap()
            .into_iter()
            .map(|network| (network.name, network.carrier))
            .collect();
        ways.sort();
        assert_eq!(
            ways,
            [
                ("home".to_owned(), Some("quic")),
                ("office".to_owned(), Some("websocket"))
            ]
        );
    }
}
