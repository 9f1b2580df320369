//! The data directory itself: whose it is, who may look into it, and what kind of file system it lies on.
//!
//! The promise of the log rests on what `fdatasync` does, and the lock on what `flock` does. Both are kept by file systems of this
//! machine. On one that lies on another machine they mean what its server, its mount options and its caches make
//! of them, and that cannot be seen from here; so such a place is refused unless the operator vouches for it.

use std::fmt;
use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::log::disk::DIR_MODE;
use super::settings::OpenError;

/// What is known of a file system by its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// A sync reaches a disk of this machine, as far as anybody can tell from here.
    Local,
    /// Layers over another file system, as in containers; it is as good as the one below.
    Layered,
    /// Memory: everything is gone when the machine goes down.
    Volatile,
    /// It lies on another machine, or behind a program, and what a sync means there cannot be seen from here.
    Distant,
    /// Not in the list.
    Unknown,
}

/// The file system that a path lies on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileSystem {
    /// What the system calls its type.
    pub magic: u32,
    /// Its name; for an unknown one a general word.
    pub name: &'static str,
    /// What that means for a store.
    pub trust: Trust,
}

impl fmt::Display for FileSystem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.trust {
            Trust::Unknown => write!(f, "unknown (type {:#x})", self.magic),
            Trust::Local | Trust::Layered | Trust::Volatile | Trust::Distant => {
                f.write_str(self.name)
            }
        }
    }
}

/// The types that are known: `statfs(2)`, `linux/magic.h` and the file systems' own sources name them.
const TYPES: &[(u32, &str, Trust)] = &[
    (0x0000_ef53, "ext4", Trust::Local),
    (0x5846_5342, "XFS", Trust::Local),
    (0x9123_683e, "Btrfs", Trust::Local),
    (0x2fc1_2fc1, "ZFS", Trust::Local),
    (0xf2f5_2010, "F2FS", Trust::Local),
    (0xca45_1a4e, "bcachefs", Trust::Local),
    (0x3153_464a, "JFS", Trust::Local),
    (0x5265_4973, "ReiserFS", Trust::Local),
    (0x0000_3434, "NILFS", Trust::Local),
    (0x2405_1905, "UBIFS", Trust::Local),
    (0x0000_f15f, "eCryptfs", Trust::Layered),
    (0x794c_7630, "overlayfs", Trust::Layered),
    (0x6175_6673, "aufs", Trust::Layered),
    (0x0102_1994, "tmpfs", Trust::Volatile),
    (0x8584_58f6, "ramfs", Trust::Volatile),
    (0x0000_6969, "NFS", Trust::Distant),
    (0x0000_517b, "SMB", Trust::Distant),
    (0xff53_4d42, "CIFS", Trust::Distant),
    (0xfe53_4d42, "SMB 2", Trust::Distant),
    (0x0102_1997, "9p", Trust::Distant),
    (0x00c3_6400, "Ceph", Trust::Distant),
    (0x0bd0_0bd0, "Lustre", Trust::Distant),
    (0x5346_414f, "AFS", Trust::Distant),
    (0x6b41_4653, "AFS", Trust::Distant),
    (0x7375_7245, "Coda", Trust::Distant),
    (0x0000_564c, "NCP", Trust::Distant),
    (0x6573_5546, "FUSE", Trust::Distant),
    (0x786f_4256, "vboxsf", Trust::Distant),
    (0xbacb_acbc, "vmhgfs", Trust::Distant),
    (0x7c7c_6673, "prl_fs", Trust::Distant),
    (0x4750_4653, "GPFS", Trust::Distant),
    (0x1983_0326, "BeeGFS", Trust::Distant),
    (0x2003_0528, "OrangeFS", Trust::Distant),
    (0x0116_1970, "GFS2", Trust::Distant),
    (0x7461_636f, "OCFS2", Trust::Distant),
    (0xaad7_aaea, "PanFS", Trust::Distant),
    (0xbeef_dead, "StorNext", Trust::Distant),
];

impl FileSystem {
    /// The file system that a file or directory lies on.
    ///
    /// # Errors
    /// When the system does not say.
    pub fn of(path: &Path) -> io::Result<FileSystem> {
        let stat = rustix::fs::statfs(path)?;
        // The type is 32 bits wide; on some machines it comes in a wider word, with or without a sign.
        #[allow(
            clippy::cast_sign_loss,
            clippy::cast_possible_truncation,
            clippy::unnecessary_cast,
            reason = "the width and sign of the word depend on the machine; the type has 32 bits"
        )]
        let magic = stat.f_type as u32;
        Ok(FileSystem::of_type(magic))
    }

    /// What is known of a type.
    #[must_use]
    pub fn of_type(magic: u32) -> FileSystem {
        let (name, trust) = TYPES
            .iter()
            .find(|(known, _, _)| *known == magic)
            .map_or(("unknown", Trust::Unknown), |(_, name, trust)| {
                (*name, *trust)
            });
        FileSystem { magic, name, trust }
    }

    /// What an operator should know about it; `None`: nothing.
    #[must_use]
    pub fn remark(&self) -> Option<String> {
        match self.trust {
            Trust::Local => None,
            Trust::Layered => Some(format!(
                "it lies on {self}, which is as safe as the file system below it"
            )),
            Trust::Volatile => Some(format!(
                "it lies on {self}: everything is lost when the machine goes down"
            )),
            Trust::Distant => Some(format!(
                "it lies on {self}, where it cannot be seen from here whether a sync reaches a disk and a lock holds"
            )),
            Trust::Unknown => Some(format!(
                "its file system is {self}: make sure that it keeps what was synced"
            )),
        }
    }
}

/// A data directory that may be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Where it is, links followed.
    pub path: PathBuf,
    /// Others could look into it until now.
    pub was_open: bool,
}

/// Makes a data directory (mode 0700) if it is not there, and sees that it is this user's and closed to others. Links are
/// followed here, once: from here on the place is the one that they led to.
///
/// # Errors
/// When it is a file, belongs to another user, or the system refuses.
pub fn prepare(dir: &Path) -> Result<Place, OpenError> {
    let io = || OpenError::io("could not make the data directory", dir);
    match fs::metadata(dir) {
        Ok(found) if !found.is_dir() => {
            return Err(io()(io::Error::new(
                io::ErrorKind::NotADirectory,
                "it is a file",
            )));
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(dir).map_err(io())?,
        Err(error) => return Err(io()(error)),
    }
    let path = fs::canonicalize(dir).map_err(io())?;
    let found = fs::metadata(&path).map_err(io())?;
    let us = rustix::process::geteuid().as_raw();
    if found.uid() != us {
        return Err(OpenError::NotOurs {
            dir: path,
            owner: found.uid(),
            us,
        });
    }
    let was_open = is_open(&found);
    if was_open {
        fs::set_permissions(&path, Permissions::from_mode(DIR_MODE)).map_err(io())?;
        tracing::warn!(
            path = %path.display(),
            mode = format!("{:04o}", found.permissions().mode() & 0o7777),
            "others on this machine could look into the data directory; it is closed to them now (mode 0700)"
        );
    }
    Ok(Place { path, was_open })
}

/// Makes a directory and those above it, each for its owner alone, and syncs the names.
fn make(dir: &Path) -> io::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(DIR_MODE)
        .create(dir)?;
    // Whatever the mask took from the mode of the last one, the owner must be able to use it.
    fs::set_permissions(dir, Permissions::from_mode(DIR_MODE))?;
    match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => fs::File::open(parent)?.sync_all(),
        Some(_) | None => Ok(()),
    }
}

/// Whether others than the owner may read or enter it.
#[must_use]
pub fn is_open(found: &fs::Metadata) -> bool {
    found.permissions().mode() & 0o077 != 0
}

/// Judges the file system of a data directory. `trusted`: the operator vouches for it.
pub(super) fn judge(dir: &Path, trusted: bool) -> Result<(), OpenError> {
    let system = match FileSystem::of(dir) {
        Ok(system) => system,
        Err(error) => {
            tracing::warn!(%error, "the type of the data directory's file system cannot be seen");
            return Ok(());
        }
    };
    verdict(dir, system, trusted)?;
    match (system.trust, system.remark()) {
        (Trust::Layered, Some(remark)) => tracing::info!("the data directory: {remark}"),
        (_, Some(remark)) => tracing::warn!("the data directory: {remark}"),
        (_, None) => {}
    }
    Ok(())
}

fn verdict(dir: &Path, system: FileSystem, trusted: bool) -> Result<(), OpenError> {
    if system.trust == Trust::Distant && !trusted {
        return Err(OpenError::FileSystem {
            dir: dir.to_owned(),
            name: system.name,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn network_file_systems_are_refused_unless_the_operator_vouches_for_them() {
        let distant = [
            0x6969,
            0x517b,
            0xff53_4d42,
            0xfe53_4d42,
            0x0102_1997,
            0x00c3_6400,
            0x0bd0_0bd0,
            0x5346_414f,
            0x6b41_4653,
            0x7375_7245,
            0x6573_5546,
            0x786f_4256,
        ];
        let dir = Path::new("/data");
        for magic in distant {
            let system = FileSystem::of_type(magic);
            assert_eq!(system.trust, Trust::Distant, "{magic:#x}");
            let error = verdict(dir, system, false).unwrap_err();
            let text = error.to_string();
            assert!(
                text.contains(system.name) && text.contains("store.trust_file_system"),
                "{text}"
            );
            assert!(verdict(dir, system, true).is_ok());
        }
        for (magic, trust) in [
            (0xef53, Trust::Local),
            (0x5846_5342, Trust::Local),
            (0x794c_7630, Trust::Layered),
            (0x0102_1994, Trust::Volatile),
            (0x8584_58f6, Trust::Volatile),
            (0x1234_5678, Trust::Unknown),
        ] {
            let system = FileSystem::of_type(magic);
            assert_eq!(system.trust, trust, "{magic:#x}");
            assert!(verdict(dir, system, false).is_ok());
        }
        let memory = FileSystem::of_type(0x0102_1994).remark().unwrap();
        assert!(memory.contains("lost when the machine goes down"));
    }

    #[test]
    fn no_type_is_listed_twice() {
        let mut seen: Vec<u32> = TYPES.iter().map(|(magic, _, _)| *magic).collect();
        seen.sort_unstable();
        let all = seen.len();
        seen.dedup();
        assert_eq!(seen.len(), all);
    }

    #[test]
    fn the_type_of_a_real_directory_is_seen() {
        let dir = tempfile::tempdir().unwrap();
        let system = FileSystem::of(dir.path()).unwrap();
        assert_ne!(system.magic, 0);
        // A kernel's own file system is none that a store could lie on, and not in the list.
        let proc = FileSystem::of(Path::new("/proc")).unwrap();
        assert_eq!((proc.magic, proc.trust), (0x9fa0, Trust::Unknown));
    }

    #[test]
    fn a_directory_that_others_can_enter_is_closed_to_them() {
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("data");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        assert!(prepare(&dir).unwrap().was_open);
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
        assert!(!prepare(&dir).unwrap().was_open);
    }

    #[test]
    fn a_link_is_followed_once_and_a_file_is_no_directory() {
        let room = tempfile::tempdir().unwrap();
        let real = room.path().join("real");
        let link = room.path().join("link");
        fs::create_dir(&real).unwrap();
        std::os::unix::fs::symlink(&real, &link).unwrap();
        let place = prepare(&link).unwrap();
        assert_eq!(place.path, fs::canonicalize(&real).unwrap());
        let file = room.path().join("file");
        fs::write(&file, b"").unwrap();
        assert!(matches!(prepare(&file), Err(OpenError::Io { .. })));
    }

    #[test]
    fn a_directory_of_another_user_is_refused() {
        // Only root can give a directory away, and root is who tests often are.
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("data");
        fs::create_dir(&dir).unwrap();
        if std::os::unix::fs::chown(&dir, Some(54_321), None).is_err() {
            let theirs = Path::new("/");
            assert!(matches!(prepare(theirs), Err(OpenError::NotOurs { .. })));
            return;
        }
        let error = prepare(&dir).unwrap_err();
        assert!(
            matches!(error, OpenError::NotOurs { owner: 54_321, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("chown"), "{error}");
    }
}
