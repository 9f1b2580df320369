//! One running client for one state directory.

use std::fs::{File, TryLockError};
use std::path::Path;
use std::time::Duration;

use super::StateError;
use super::files::private;

/// How long someone may hold the lock who only looks whether it is held.
const LOOK_LASTS: Duration = Duration::from_millis(20);

/// How often that is waited for.
const LOOKS_MAX: u32 = 3;

/// Holds the directory until it is dropped; the operating system lets go when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the directory.
    ///
    /// # Errors
    /// [`StateError::InUse`] when another client has it.
    pub(crate) fn take(directory: &Path) -> Result<Self, StateError> {
        let path = directory.join("lock");
        let file = private()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path);
        let file = file.map_err(StateError::io("open", &path))?;
        let mut tried = file.try_lock();
        for _ in 0..LOOKS_MAX {
            if !matches!(tried, Err(TryLockError::WouldBlock)) {
                break;
            }
            std::thread::sleep(LOOK_LASTS);
            tried = file.try_lock();
        }
        match tried {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(StateError::InUse {
                path: directory.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(StateError::Io {
                what: "lock",
                path,
                source,
            }),
        }
    }

    /// Whether a client has the directory just now. Takes it for a moment if not.
    pub(crate) fn is_taken(directory: &Path) -> bool {
        let file = private().read(true).open(directory.join("lock"));
        file.is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_directory_belongs_to_one_client_until_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        let first = Lock::take(directory.path()).unwrap();
        let second = Lock::take(directory.path());
        assert!(
            matches!(second, Err(StateError::InUse { .. })),
            "{second:?}"
        );
        assert!(Lock::is_taken(directory.path()));
        drop(first);
        assert!(!Lock::is_taken(directory.path()));
        Lock::take(directory.path()).unwrap();
    }
}
