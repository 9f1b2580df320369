//! A backup as a stream of bytes, for whoever asked over HTTP.
//!
//! The store writes on a thread of its own, and waits for whoever takes the bytes: only a few blocks are in memory. A backup
//! keeps the log from being let go, so whoever takes it must go on taking it ([`Pace`]). Who does not is cut, connection and all; so
//! it is when the server goes down. What was taken then has no end and is no backup.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::handle::Inner;
use crate::ports::BackupError;

/// Blocks that may wait for whoever takes them; each is about 1 MiB.
const WAITING: usize = 2;
/// What must be taken in a second in the long run, bytes: 10 GiB in 11 hours.
const PACE_MIN: u64 = 256 << 10;
/// How often a writer that waits looks whether the server goes down.
const LOOK: Duration = Duration::from_millis(50);

/// Why there is no backup to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoBackup {
    /// One is being made already.
    Busy,
    /// The server goes down.
    Draining,
    /// The store cannot be read.
    Store,
    /// There is too little room on the disk to keep the log meanwhile.
    NoRoom,
}

/// What goes from the thread that writes to whoever takes it.
enum Parcel {
    Bytes(Bytes),
    /// That was all of it.
    End,
    /// What came before is no backup.
    Broken(BackupError),
}

/// A backup on its way.
pub struct BackupStream {
    first: Option<Bytes>,
    rest: mpsc::Receiver<Parcel>,
}

impl BackupStream {
    /// The next bytes; `None`: that was all of it. After an error what was taken is no backup.
    pub async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        match self.rest.recv().await {
            Some(Parcel::Bytes(bytes)) => Some(Ok(bytes)),
            Some(Parcel::End) => None,
            Some(Parcel::Broken(error)) => Some(Err(io::Error::other(error))),
            None => Some(Err(io::Error::from(io::ErrorKind::UnexpectedEof))),
        }
    }
}

/// How long whoever takes a backup may let it wait: never longer than `stall` at once, and in all no longer than `stall` and a
/// second for every [`PACE_MIN`] bytes that were taken.
#[derive(Debug)]
struct Pace {
    stall: Duration,
    waited: Duration,
    taken: u64,
}

impl Pace {
    fn new(stall: Duration) -> Pace {
        Pace {
            stall,
            waited: Duration::ZERO,
            taken: 0,
        }
    }

    /// How long the next block may wait.
    fn allows(&self) -> Duration {
        let earned = Duration::from_millis(self.taken.saturating_mul(1_000) / PACE_MIN);
        let left = (self.stall + earned).saturating_sub(self.waited);
        left.min(self.stall)
    }

    fn took(&mut self, bytes: usize, waited: Duration) {
        self.taken += bytes as u64;
        self.waited += waited;
    }
}

/// Hands what is written to the other end.
struct Pipe {
    to: mpsc::Sender<Parcel>,
    inner: Arc<Inner>,
    runtime: tokio::runtime::Handle,
    pace: Pace,
}

impl Pipe {
    /// Waits for a place, but not for ever.
    fn hand_over(&mut self, parcel: Parcel, bytes: usize) -> io::Result<()> {
        let clock = &self.inner.shared.clock;
        let (begun, allowed) = (clock.now().mono, self.pace.allows());
        let (to, runtime) = (&self.to, &self.runtime);
        loop {
            let place = runtime.block_on(async { tokio::time::timeout(LOOK, to.reserve()).await });
            let waited = clock.now().mono - begun;
            match place {
                Ok(Ok(place)) => {
                    place.send(parcel);
                    self.pace.took(bytes, waited);
                    return Ok(());
                }
                Ok(Err(_)) => return Err(io::Error::from(io::ErrorKind::BrokenPipe)),
                Err(_) if self.inner.draining() => {
                    return Err(io::Error::new(
                        io::ErrorKind::Interrupted,
                        "the server goes down",
                    ));
                }
                Err(_) if waited >= allowed => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "whoever asked for it took it too slowly (limits.backup_stall)",
                    ));
                }
                Err(_) => {}
            }
        }
    }
}

impl io::Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let block = Parcel::Bytes(Bytes::copy_from_slice(bytes));
        match self.hand_over(block, bytes.len()) {
            Ok(()) => Ok(bytes.len()),
            // `Interrupted` would be tried again.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                Err(io::Error::other(error))
            }
            Err(error) => Err(error),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Inner {
    /// `cut` is cancelled when whoever takes the backup does not go on taking it.
    pub(super) async fn backup(
        self: &Arc<Inner>,
        key: &str,
        cut: CancellationToken,
    ) -> Result<BackupStream, NoBackup> {
        if self.draining() {
            return Err(NoBackup::Draining);
        }
        let (to, mut rest) = mpsc::channel(WAITING);
        let inner = Arc::clone(self);
        let mut pipe = Pipe {
            to,
            inner: Arc::clone(self),
            runtime: tokio::runtime::Handle::current(),
            pace: Pace::new(self.limits.load().backup_stall),
        };
        let key = key.to_owned();
        let writing = tokio::task::spawn_blocking(move || {
            let made = inner.shared.store.backup(&mut pipe, &|_| {
                if inner.draining() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            let last = match made {
                Ok(summary) => {
                    tracing::info!(
                        key,
                        bytes = summary.bytes,
                        last_frame = summary.last_frame,
                        left_out = summary.left_out,
                        "wrote a backup for whoever asked for it"
                    );
                    Parcel::End
                }
                Err(error) => {
                    if !matches!(error, BackupError::Busy) {
                        tracing::warn!(key, %error, "a backup was not handed out whole");
                    }
                    Parcel::Broken(error)
                }
            };
            match pipe.hand_over(last, 0) {
                // Whoever asked has gone away.
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                // Nobody takes what is there, so nobody would ever see that there is no more to come.
                Err(_) => cut.cancel(),
            }
        });
        match rest.recv().await {
            Some(Parcel::Bytes(first)) => Ok(BackupStream {
                first: Some(first),
                rest,
            }),
            Some(Parcel::Broken(BackupError::Busy)) => Err(NoBackup::Busy),
            Some(Parcel::Broken(BackupError::Interrupted)) => Err(NoBackup::Draining),
            Some(Parcel::Broken(BackupError::NoRoom)) => Err(NoBackup::NoRoom),
            Some(Parcel::Broken(BackupError::Store(_) | BackupError::Write(_)) | Parcel::End) => {
                Err(NoBackup::Store)
            }
            None => {
                if let Err(error) = writing.await {
                    tracing::error!(%error, "the writing of a backup broke off");
                }
                Err(NoBackup::Store)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STALL: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn whoever_takes_a_backup_steadily_is_never_cut_and_whoever_stops_is() {
        let mut pace = Pace::new(STALL);
        assert_eq!(pace.allows(), STALL);
        // A block of 1 MiB each four seconds is just enough, for as long as it takes.
        for _ in 0..10_000 {
            pace.took(1 << 20, 4 * SECOND);
            assert_eq!(pace.allows(), STALL);
        }
        // A quick beginning buys no longer stall.
        pace.took(1 << 40, Duration::ZERO);
        assert_eq!(pace.allows(), STALL);
    }

    #[test]
    fn a_drip_ends_after_the_stall_and_what_was_taken_is_worth() {
        let mut pace = Pace::new(STALL);
        let mut waited = Duration::ZERO;
        while pace.allows() >= 30 * SECOND {
            pace.took(1 << 20, 30 * SECOND);
            waited += 30 * SECOND;
        }
        assert!(waited < 2 * STALL, "{waited:?}");
    }
}
