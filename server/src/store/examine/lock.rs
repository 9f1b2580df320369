//! Whether a server has the directory, without leaving a trace.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use serde::Serialize;

/// Who has a data directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Holder {
    /// Nobody.
    Nobody,
    /// A server that runs. What it has open can be read only in part: the last frames may be on their way, and the engine is
    /// not looked at.
    Server {
        /// Its process, if it said so.
        pid: Option<u32>,
    },
    /// It cannot be found out.
    Unknown,
}

/// The lock, held while this lives if nobody else has it, so that no server starts while its files are looked at.
pub(super) struct Probe {
    holder: Holder,
    _held: Option<File>,
}

impl Probe {
    /// Takes the lock if there is a lock file and nobody has it. Makes and writes nothing.
    pub(super) fn take(dir: &Path) -> Probe {
        let path = dir.join("lock");
        let mut file = match File::open(path) {
            Ok(file) => file,
            // Nobody ever started here.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Probe {
                    holder: Holder::Nobody,
                    _held: None,
                };
            }
            Err(_) => {
                return Probe {
                    holder: Holder::Unknown,
                    _held: None,
                };
            }
        };
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Probe {
                holder: Holder::Nobody,
                _held: Some(file),
            },
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut pid = String::new();
                let read = file.by_ref().take(PID_MAX).read_to_string(&mut pid);
                Probe {
                    holder: Holder::Server {
                        pid: read.ok().and_then(|_| pid.trim().parse().ok()),
                    },
                    _held: None,
                }
            }
            Err(_) => Probe {
                holder: Holder::Unknown,
                _held: None,
            },
        }
    }

    pub(super) fn holder(&self) -> Holder {
        self.holder
    }

    /// Whether files that a server writes may change while they are read.
    pub(super) fn is_busy(&self) -> bool {
        matches!(self.holder, Holder::Server { .. })
    }
}

/// A process id has no more digits.
const PID_MAX: u64 = 20;
