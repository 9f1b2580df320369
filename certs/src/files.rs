//! Puts certificates and keys on disk: whole or not at all, with the right permissions from the first byte on.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::error::CertError;

/// Read and written by the owner only.
const PRIVATE_MODE: u32 = 0o600;

/// Read by everyone, written by the owner: what certificates are for.
const PUBLIC_MODE: u32 = 0o644;

/// What to do when the file is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfExists {
    /// Leave it and say so ([`CertError::Exists`]).
    Refuse,
    /// Put the new one in its place, in one step.
    Replace,
}

/// Writes a private key, an API key or the like: mode 0600, synced, and either whole or not there.
///
/// Readers see the old file or the new one, never a part. After a crash there may be a file named `.NAME.*.new` left
/// beside it, with mode 0600, that nobody reads.
///
/// # Errors
/// [`CertError::Exists`] if the file is there and was not to be replaced; otherwise what the disk or the permissions of
/// the directory bring. Each names the file.
pub fn write_private(path: &Path, bytes: &[u8], if_exists: IfExists) -> Result<(), CertError> {
    write(path, bytes, PRIVATE_MODE, if_exists).map_err(|error| error.in_file(path))
}

/// Writes a certificate or another public file: mode 0644, otherwise as [`write_private`].
///
/// # Errors
/// As [`write_private`].
pub fn write_public(path: &Path, bytes: &[u8], if_exists: IfExists) -> Result<(), CertError> {
    write(path, bytes, PUBLIC_MODE, if_exists).map_err(|error| error.in_file(path))
}

fn write(path: &Path, bytes: &[u8], mode: u32, if_exists: IfExists) -> Result<(), CertError> {
    // Asked early for the sake of a clean refusal; what counts is asked again when the name is taken.
    if if_exists == IfExists::Refuse && fs::symlink_metadata(path).is_ok() {
        return Err(CertError::Exists);
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let temporary = temporary_name(directory, path)?;
    let placed = fill(&temporary, bytes, mode).and_then(|()| place(&temporary, path, if_exists));
    if placed.is_err() {
        // What failed is what the operator needs to hear of; the leftover is harmless.
        let _ = fs::remove_file(&temporary);
    }
    placed?;
    // The name is in the directory only once the directory is synced.
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(|error| CertError::Io {
            doing: "its directory cannot be synced",
            error,
        })
}

fn temporary_name(directory: &Path, path: &Path) -> Result<PathBuf, CertError> {
    let name = path.file_name().ok_or_else(|| CertError::Io {
        doing: "it cannot be written",
        error: io::Error::new(io::ErrorKind::InvalidInput, "the path names no file"),
    })?;
    let mut random = [0u8; 8];
    aws_lc_rs::rand::fill(&mut random).map_err(|_| CertError::Making {
        detail: "the system has no random numbers".to_owned(),
    })?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{:016x}.new", u64::from_ne_bytes(random)));
    Ok(directory.join(temporary))
}

fn fill(temporary: &Path, bytes: &[u8], mode: u32) -> Result<(), CertError> {
    let io = |error| CertError::Io {
        doing: "it cannot be written",
        error,
    };
    // Created as private as it can be; a looser mode is given once the content is known to be meant for it.
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(PRIVATE_MODE)
        .open(temporary)
        .map_err(io)?;
    file.write_all(bytes).map_err(io)?;
    // Set outright, so that the umask of whoever starts the server decides nothing.
    file.set_permissions(Permissions::from_mode(mode))
        .map_err(io)?;
    file.sync_all().map_err(io)
}

fn place(temporary: &Path, path: &Path, if_exists: IfExists) -> Result<(), CertError> {
    let io = |error| CertError::Io {
        doing: "it cannot be put in place",
        error,
    };
    if if_exists == IfExists::Replace {
        return fs::rename(temporary, path).map_err(io);
    }
    match renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) => Err(CertError::Exists),
        // Some file systems cannot rename this way; a hard link refuses an existing name as well.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match fs::hard_link(temporary, path)
        {
            Ok(()) => fs::remove_file(temporary).map_err(io),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(CertError::Exists),
            Err(error) => Err(io(error)),
        },
        Err(error) => Err(io(error.into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn private_files_are_for_their_owner_only_and_public_ones_for_everyone() {
        let directory = tempfile::tempdir().unwrap();
        let (key, cert) = (
            directory.path().join("key.pem"),
            directory.path().join("cert.pem"),
        );
        write_private(&key, b"secret", IfExists::Refuse).unwrap();
        write_public(&cert, b"shown", IfExists::Refuse).unwrap();
        assert_eq!((mode(&key), mode(&cert)), (0o600, 0o644));
        assert_eq!(fs::read(&key).unwrap(), b"secret");
        assert_eq!(names(directory.path()), ["cert.pem", "key.pem"]);
    }

    #[test]
    fn an_existing_file_is_left_alone_unless_it_may_be_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        fs::write(&path, b"old").unwrap();
        let error = write_private(&path, b"new", IfExists::Refuse).unwrap_err();
        assert!(
            matches!(&error, CertError::InFile { error, .. } if matches!(**error, CertError::Exists)),
            "{error}"
        );
        assert!(
            error.to_string().contains("key.pem: it exists already"),
            "{error}"
        );
        assert_eq!(fs::read(&path).unwrap(), b"old");

        write_private(&path, b"new", IfExists::Replace).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(
            mode(&path),
            0o600,
            "the mode of the old file must not survive"
        );
        assert_eq!(names(directory.path()), ["key.pem"]);
    }

    #[test]
    fn taking_a_name_that_appeared_meanwhile_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let (temporary, path) = (directory.path().join("t"), directory.path().join("key.pem"));
        fill(&temporary, b"new", PRIVATE_MODE).unwrap();
        fs::write(&path, b"old").unwrap();
        assert!(matches!(
            place(&temporary, &path, IfExists::Refuse),
            Err(CertError::Exists)
        ));
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn a_missing_directory_is_an_error_that_names_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("absent").join("key.pem");
        let error = write_private(&path, b"x", IfExists::Refuse)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("absent/key.pem: it cannot be written"),
            "{error}"
        );
    }
}
