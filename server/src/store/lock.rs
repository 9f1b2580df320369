//! One process per data directory.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

use super::log::disk::FILE_MODE;

/// The lock on a data directory, held as long as this lives.
#[derive(Debug)]
pub(super) struct DirLock {
    _file: File,
}

/// Why the lock was not taken.
#[derive(Debug)]
pub(super) enum LockError {
    /// Another process has it; its id, if it left one.
    Held(Option<u32>),
    /// The file could not be opened or locked.
    Io(PathBuf, io::Error),
}

impl DirLock {
    /// Takes the lock or says who has it. The kernel lets go of it when the process ends, however it ends.
    pub(super) fn take(dir: &Path) -> Result<DirLock, LockError> {
        let path = dir.join("lock");
        let io = |error| LockError::Io(path.clone(), error);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(FILE_MODE)
            .open(&path)
            .map_err(io)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let read = file.read_to_string(&mut holder);
                return Err(LockError::Held(
                    read.ok().and_then(|_| holder.trim().parse().ok()),
                ));
            }
            Err(error) => return Err(io(error.into())),
        }
        file.set_len(0).map_err(io)?;
        file.rewind().map_err(io)?;
        writeln!(file, "{}", std::process::id()).map_err(io)?;
        Ok(DirLock { _file: file })
    }
}
