//! The process: how many files it may open, and the signals that it hears.

use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::cli::{Failure, no_threads};

/// Raises the limit of open files to what the system allows: each device over WebSocket is one.
pub(super) fn raise_file_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it is; it bounds the number of devices");
    }
}

/// What the outside wants of the process.
pub(super) enum Word {
    Stop(&'static str),
    Reload,
}

pub(super) struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
    /// Cancelled when standard input ends, if that matters.
    orphaned: CancellationToken,
}

impl Signals {
    pub(super) fn new(until_stdin_ends: bool) -> Result<Signals, Failure> {
        let listen = |kind| signal(kind).map_err(|error| no_threads(&error));
        let orphaned = CancellationToken::new();
        if until_stdin_ends {
            let token = orphaned.clone();
            // A thread of its own: reading a pipe cannot be taken back, and must not hold up the end.
            std::thread::Builder::new()
                .name("stdin".to_owned())
                .spawn(move || {
                    // An error is an end as well.
                    let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
                    token.cancel();
                })
                .map_err(|error| no_threads(&error))?;
        }
        Ok(Signals {
            term: listen(SignalKind::terminate())?,
            int: listen(SignalKind::interrupt())?,
            hup: listen(SignalKind::hangup())?,
            orphaned,
        })
    }

    pub(super) async fn next(&mut self) -> Word {
        tokio::select! {
            why = Signals::stopped(&mut self.term, &mut self.int) => Word::Stop(why),
            _ = self.hup.recv() => Word::Reload,
            () = self.orphaned.cancelled() => Word::Stop("standard input ended"),
        }
    }

    /// Waits for a signal to stop. SIGHUP means nothing any more.
    pub(super) async fn stop(&mut self) -> &'static str {
        Signals::stopped(&mut self.term, &mut self.int).await
    }

    async fn stopped(term: &mut Signal, int: &mut Signal) -> &'static str {
        tokio::select! {
            _ = term.recv() => "SIGTERM",
            _ = int.recv() => "SIGINT",
        }
    }
}
