//! `bellwire-device listen`.

use std::sync::Arc;
use std::time::Duration;

use bellwire_client::{Client, Event, TopicsError, Trust, Verdict};
use tokio::sync::mpsc;

use super::print::Printer;
use super::{Exit, Listen, ProxyChoice, Setup};

/// Why the run ends before the client does. The first word counts, so one place is enough.
const REASONS_MAX: usize = 4;

/// Runs until there is a reason to end.
pub(crate) fn run(arguments: Listen) -> Result<Exit, Setup> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let runtime = runtime.map_err(|error| Setup(format!("cannot start: {error}")))?;
    runtime.block_on(listen(arguments))
}

async fn listen(arguments: Listen) -> Result<Exit, Setup> {
    let credentials = arguments.identity.read()?;
    let state_dir = arguments.identity.state_dir(credentials.device);
    let printer = Arc::new(Printer::new(
        arguments.json,
        arguments.quiet,
        arguments.fail_fast,
    ));
    let (ends, mut end) = mpsc::channel(REASONS_MAX);

    let mut builder = Client::builder()
        .server(&arguments.way.server)
        .device(credentials.device, credentials.secret)
        .state_dir(&state_dir)
        .carriers(arguments.carrier.into())
        .websocket_codec(arguments.codec.into())
        .window(arguments.window)
        .agent(concat!("bellwire-device/", env!("CARGO_PKG_VERSION")))
        .trust(arguments.way.trust());
    builder = match arguments.way.proxy()? {
        ProxyChoice::None => builder,
        ProxyChoice::Environment => builder.proxy_from_environment(),
        ProxyChoice::Always(proxy) => builder.proxy(proxy),
        ProxyChoice::WhenNeeded(proxy) => builder.proxy_when_needed(proxy),
    };
    if let Some(path) = &arguments.way.proxy_ca {
        builder = builder.proxy_trust(Trust::File(path.clone()));
    }
    if let Some(network) = &arguments.network {
        builder = builder.network(network);
    }
    if let Some(urgency) = arguments.min_urgency {
        builder = builder.min_urgency(urgency.into());
    }
    if let Some(seconds) = arguments.keep_alive {
        builder = builder.keep_alive(Duration::from_secs(seconds.into()));
    }
    if let Some(count) = arguments.count {
        builder = builder.leave_after(count);
    }
    if arguments.no_sync {
        builder = builder.without_sync();
    }

    let verdict = match arguments.decline {
        Some(reason) => Verdict::Decline(reason),
        None => Verdict::Acknowledge,
    };
    let delay = Duration::from_millis(arguments.delay_ms);
    let (for_notifications, ends_by_pipe) = (printer.clone(), ends.clone());
    builder = builder.on_notification_async(move |notification| {
        let (printer, ends, verdict) = (
            for_notifications.clone(),
            ends_by_pipe.clone(),
            verdict.clone(),
        );
        async move {
            if !delay.is_zero() {
                tokio::time::sleep(delay).await;
            }
            if printer.notification(&notification).is_err() {
                // Nobody reads us any more. Without a verdict it stays with the server.
                let _ = ends.try_send(End::NobodyReads);
                std::future::pending::<()>().await;
            }
            verdict
        }
    });
    let (for_events, fail_fast) = (printer.clone(), arguments.fail_fast);
    builder = builder.on_event(move |event| {
        if for_events.event(&event).is_err() {
            let _ = ends.try_send(End::NobodyReads);
        }
        if let Event::Disconnected { retry_in, why } = &event {
            let left = matches!(why, bellwire_client::Disconnect::Left);
            let end = match retry_in {
                None if left => None,
                None => Some(End::Refused),
                Some(_) if fail_fast => Some(End::Lost),
                Some(_) => None,
            };
            if let Some(end) = end {
                let _ = ends.try_send(end);
            }
        }
    });
    let client = builder
        .start()
        .await
        .map_err(|error| Setup(error.to_string()))?;
    if let Err(error) = topics(&client, arguments.subscribe, arguments.unsubscribe).await {
        client.shutdown().await;
        return Err(Setup(format!("cannot ask for topics: {error}")));
    }

    let end = tokio::select! {
        biased;
        Some(end) = end.recv() => end,
        () = client.ended() => end.try_recv().unwrap_or(End::Enough),
        () = interrupted() => End::Interrupted,
    };
    if end != End::NobodyReads {
        client.shutdown().await;
    }
    Ok(match end {
        End::Enough | End::Interrupted | End::NobodyReads => Exit::Done,
        End::Refused => Exit::Refused,
        End::Lost => Exit::Unreachable,
    })
}

async fn topics(client: &Client, join: Vec<String>, leave: Vec<String>) -> Result<(), TopicsError> {
    let asked = async {
        if !leave.is_empty() {
            client.unsubscribe(leave).await?;
        }
        if !join.is_empty() {
            client.subscribe(join).await?;
        }
        Ok(())
    };
    match asked.await {
        // The server said never to come back, which is told otherwise.
        Err(TopicsError::Gone(_)) => Ok(()),
        asked => asked,
    }
}

/// Why the run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// The wanted number arrived.
    Enough,
    /// Ctrl-C or SIGTERM.
    Interrupted,
    /// Standard output was closed.
    NobodyReads,
    /// The server said never.
    Refused,
    /// There is no session, and that is to end the run.
    Lost,
}

/// Ctrl-C, or SIGTERM where there is one.
async fn interrupted() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let Ok(mut terminate) = signal(SignalKind::terminate()) {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}
