//! Private files, written whole or not at all.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

#[cfg(unix)]
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

use super::StateError;

/// Makes the directory, with its parents, readable by its owner only, and waits until a power cut cannot take it away with all
/// that will be in it. One that is there stays as it is.
pub(crate) fn make_directory(path: &Path) -> Result<(), StateError> {
    let missing: Vec<&Path> = path
        .ancestors()
        .take_while(|directory| !directory.as_os_str().is_empty() && !directory.exists())
        .collect();
    let mut builder = DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    builder.mode(0o700);
    builder
        .create(path)
        .map_err(StateError::io("make the directory", path))?;
    for made in missing {
        sync_directory_of(made).map_err(StateError::io("make the directory", made))?;
    }
    Ok(())
}

/// Options for a file that only its owner may read.
pub(super) fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    #[cfg(unix)]
    options.mode(0o600);
    options
}

/// Replaces `path` by `bytes` in one step. With `sync` it survives a power cut as soon as this returns.
///
/// Returns the new file, open for appending.
pub(super) fn replace(path: &Path, bytes: &[u8], sync: bool) -> io::Result<File> {
    let fresh = path.with_extension("new");
    let mut file = private()
        .create(true)
        .write(true)
        .truncate(true)
        .open(&fresh)?;
    file.write_all(bytes)?;
    if sync {
        file.sync_all()?;
    }
    std::fs::rename(&fresh, path)?;
    if sync {
        sync_directory_of(path)?;
    }
    Ok(file)
}

/// Makes a rename or a new name in the directory of `path` durable.
pub(super) fn sync_directory_of(path: &Path) -> io::Result<()> {
    match path.parent() {
        #[cfg(unix)]
        Some(parent) if parent.as_os_str().is_empty() => File::open(".")?.sync_all(),
        #[cfg(unix)]
        Some(parent) => File::open(parent)?.sync_all(),
        _ => Ok(()),
    }
}

/// A name beside `path` that nothing has yet, for a file that cannot be read.
pub(super) fn free_name(path: &Path, why: &str, now_ms: u64) -> PathBuf {
    let mut name = path.with_extension(format!("{why}-{now_ms}"));
    let mut turn = 0u32;
    while name.exists() {
        turn += 1;
        name = path.with_extension(format!("{why}-{now_ms}-{turn}"));
    }
    name
}

/// Gives a file that cannot be read another name, so that a new one can take its place and nothing is deleted. `None`: it
/// could not be moved.
pub(super) fn set_aside(path: &Path, why: &str, now_ms: u64) -> Option<PathBuf> {
    let name = free_name(path, why, now_ms);
    std::fs::rename(path, &name).ok().map(|()| name)
}
