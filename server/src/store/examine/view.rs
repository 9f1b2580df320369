//! A look at a data directory that cannot change it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::store::log::disk::{Disk, DiskFile, RealDisk};

/// The files of a data directory, opened for reading only. Leftovers of unfinished work (`*.tmp`) are not listed, so that
/// nobody who looks through this tries to sweep them.
pub(super) struct ViewDisk {
    root: PathBuf,
    real: RealDisk,
}

impl ViewDisk {
    pub(super) fn new(root: &Path) -> ViewDisk {
        ViewDisk {
            root: root.to_owned(),
            real: RealDisk::new(root),
        }
    }
}

fn refused() -> io::Error {
    io::Error::new(
        io::ErrorKind::PermissionDenied,
        "this is only a look: nothing may be changed",
    )
}

impl Disk for ViewDisk {
    /// Says yes and does nothing: a directory that is not there has no files, and that is all a look needs to know.
    fn make_dir(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, _name: &str) -> io::Result<Box<dyn DiskFile>> {
        Err(refused())
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(Box::new(ViewFile(File::open(self.root.join(name))?)))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let mut names = self.real.list(dir)?;
        names.retain(|name| !name.ends_with(".tmp"));
        Ok(names)
    }

    fn rename(&self, _from: &str, _to: &str) -> io::Result<()> {
        Err(refused())
    }

    fn remove(&self, _name: &str) -> io::Result<()> {
        Err(refused())
    }

    fn sync_dir(&self, _dir: &str) -> io::Result<()> {
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        self.real.free()
    }
}

struct ViewFile(File);

impl DiskFile for ViewFile {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(refused())
    }

    fn allocate(&self, _length: u64) -> io::Result<()> {
        Err(refused())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
