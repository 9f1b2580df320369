//! A backup as a stream of bytes, for whoever asked over HTTP.
//!
//! The store writes on a thread of its own, and waits for whoever takes the bytes: only a few blocks are in memory. Who does not
//! take them for [`STALL`] has gone away; then, and when the server goes down, the stream ends with an error, and what was
//! taken has no end and is no backup.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

use super::handle::Inner;
use crate::ports::BackupError;

/// Blocks that may wait for whoever takes them; each is about 1 MiB.
const WAITING: usize = 2;
/// How long a block may wait.
const STALL: Duration = Duration::from_secs(60);

/// Why there is no backup to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoBackup {
    /// One is being made already.
    Busy,
    /// The server goes down.
    Draining,
    /// The store cannot be read.
    Store,
}

/// A backup on its way.
pub struct BackupStream {
    first: Option<Bytes>,
    rest: mpsc::Receiver<Result<Bytes, BackupError>>,
}

impl BackupStream {
    /// The next bytes; `None`: that was all of it. After an error what was taken is no backup.
    pub async fn next(&mut self) -> Option<Result<Bytes, io::Error>> {
        if let Some(first) = self.first.take() {
            return Some(Ok(first));
        }
        Some(self.rest.recv().await?.map_err(io::Error::other))
    }
}

/// Hands what is written to the other end.
struct Pipe {
    to: mpsc::Sender<Result<Bytes, BackupError>>,
    runtime: tokio::runtime::Handle,
}

impl io::Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let block = Bytes::copy_from_slice(bytes);
        let sent = self
            .runtime
            .block_on(async { tokio::time::timeout(STALL, self.to.send(Ok(block))).await });
        match sent {
            Ok(Ok(())) => Ok(bytes.len()),
            Ok(Err(_)) => Err(io::Error::from(io::ErrorKind::BrokenPipe)),
            Err(_) => Err(io::Error::from(io::ErrorKind::TimedOut)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Inner {
    pub(super) async fn backup(self: &Arc<Inner>) -> Result<BackupStream, NoBackup> {
        if self.draining() {
            return Err(NoBackup::Draining);
        }
        let (to, mut rest) = mpsc::channel(WAITING);
        let inner = Arc::clone(self);
        let mut pipe = Pipe {
            to: to.clone(),
            runtime: tokio::runtime::Handle::current(),
        };
        let writing = tokio::task::spawn_blocking(move || {
            let made = inner.shared.store.backup(&mut pipe, &|_| {
                if inner.draining() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            });
            match made {
                Ok(summary) => tracing::info!(
                    bytes = summary.bytes,
                    last_frame = summary.last_frame,
                    left_out = summary.left_out,
                    "handed out a backup"
                ),
                Err(error) => {
                    if !matches!(error, BackupError::Busy) {
                        tracing::warn!(%error, "a backup was not handed out whole");
                    }
                    // Whoever has gone away is not told.
                    let _ = pipe.runtime.block_on(pipe.to.send(Err(error)));
                }
            }
        });
        drop(to);
        match rest.recv().await {
            Some(Ok(first)) => Ok(BackupStream {
                first: Some(first),
                rest,
            }),
            Some(Err(BackupError::Busy)) => Err(NoBackup::Busy),
            Some(Err(BackupError::Interrupted)) => Err(NoBackup::Draining),
            Some(Err(BackupError::Store(_) | BackupError::Write(_))) => Err(NoBackup::Store),
            None => {
                if let Err(error) = writing.await {
                    tracing::error!(%error, "the writing of a backup broke off");
                }
                Err(NoBackup::Store)
            }
        }
    }
}
