//! What log and snapshots ask of a disk, and the real one.
//!
//! The seam is narrow on purpose: a test puts a disk of memory behind it that forgets or tears whatever was not synced
//! (`store::testing`), and everything above behaves as on the real one.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A directory of files. Names are relative, `directory/file` or `file`.
pub(in crate::store) trait Disk: Send + Sync + 'static {
    /// Makes a directory if it is not there. Safe when this returns.
    fn make_dir(&self, name: &str) -> io::Result<()>;

    /// Makes an empty file; one of that name is emptied.
    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;

    /// Opens a file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;

    /// The names of the files in a directory, sorted; empty if there is no such directory.
    fn list(&self, dir: &str) -> io::Result<Vec<String>>;

    /// Gives a file or directory another name. Safe only after [`Disk::sync_dir`] of both directories.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file. Safe only after [`Disk::sync_dir`].
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes what happened to the names in a directory safe.
    fn sync_dir(&self, dir: &str) -> io::Result<()>;

    /// Free bytes that this process may use.
    fn free(&self) -> io::Result<u64>;
}

/// An open file.
pub(in crate::store) trait DiskFile: Send + Sync {
    /// Its length, bytes.
    fn length(&self) -> io::Result<u64>;

    /// Fills the whole buffer from this offset on.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of it at this offset. Safe only after [`DiskFile::sync`].
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Reserves room up to this length, which reads as zeros. When it fails, the file is of no use.
    fn allocate(&self, length: u64) -> io::Result<()>;

    /// Makes everything written before safe (`fdatasync`). After an error nobody knows what is safe.
    fn sync(&self) -> io::Result<()>;
}

/// Owner only: what is kept is other people's messages.
pub(in crate::store) const DIR_MODE: u32 = 0o700;
/// Owner only.
pub(in crate::store) const FILE_MODE: u32 = 0o600;

/// Files below a directory of the real disk.
#[derive(Debug, Clone)]
pub(in crate::store) struct RealDisk {
    root: PathBuf,
}

impl RealDisk {
    pub(in crate::store) fn new(root: &Path) -> RealDisk {
        RealDisk {
            root: root.to_owned(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }
}

impl RealDisk {
    /// Opens a file that this process need not be able to write.
    pub(in crate::store) fn open_to_read(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(RealFile(File::open(self.path(name))?)))
    }
}

/// Makes a directory of mode 0700, and syncs its name into its parent.
pub(in crate::store) fn make_private_dir(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(DIR_MODE).create(path) {
        Ok(()) => match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => File::open(parent)?.sync_all(),
            _ => Ok(()),
        },
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::set_permissions(path, Permissions::from_mode(DIR_MODE))
        }
        Err(error) => Err(error),
    }
}

impl Disk for RealDisk {
    fn make_dir(&self, name: &str) -> io::Result<()> {
        make_private_dir(&self.path(name))
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(FILE_MODE)
            .open(self.path(name))?;
        Ok(Box::new(RealFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path(name))?;
        Ok(Box::new(RealFile(file)))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path(dir)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry?;
            // A name that is not UTF-8 is none of ours.
            if let (true, Ok(name)) = (
                entry.file_type()?.is_file(),
                entry.file_name().into_string(),
            ) {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path(from), self.path(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path(name))
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.path(dir))?.sync_all()
    }

    fn free(&self) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(&self.root)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

struct RealFile(File);

impl DiskFile for RealFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(data, offset)
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        match rustix::fs::fallocate(&self.0, rustix::fs::FallocateFlags::empty(), 0, length) {
            Ok(()) => Ok(()),
            // A file system that cannot reserve: zeros take the room just as well.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => {
                fill_with_zeros(self, length)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }
}

/// Zeros are written in pieces of this size.
const ZEROS: usize = 1 << 20;

/// Writes zeros up to `length`. Blocks that were only reserved have to be marked as written by a journal commit
/// of the file system at every sync; blocks that hold zeros do not.
pub(in crate::store) fn fill_with_zeros(file: &dyn DiskFile, length: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS];
    let mut at = 0;
    while at < length {
        let step = (length - at).min(ZEROS as u64);
        file.write_at(&zeros[..step as usize], at)?;
        at += step;
    }
    Ok(())
}

/// Whether an error says that there is no room: nothing is broken, and it may pass.
pub(in crate::store) fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge
    )
}
