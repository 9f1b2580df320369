//! One running client for one state directory.

use std::fs::{File, TryLockError};
use std::path::Path;

use super::StateError;
use super::files::private;

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
        match file.try_lock() {
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
        drop(first);
        Lock::take(directory.path()).unwrap();
    }
}
