//! From a backup to a data directory that a server can start on.
//!
//! The new store is built in a directory of its own inside the data directory, with an identity of its own, opened as a start
//! would, and freed of what was erased since the backup was made. Only then it takes its place; an old store
//! is put aside, never deleted. While files change places the file `format` says so, and a start refuses; a restore that was cut
//! off is simply done again.
//!
//! What was erased since is gathered from wherever somebody may know it: the store that is replaced, read past any damage; a
//! newer backup; the file that a server keeps beside its backups.

mod erase;
mod gather;
mod target;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::erase::{Applier, wait};
use self::gather::Gathered;
use self::target::{change_places, look_at_target, make_ready, replaced_in};
use crate::delivery::AppId;
use crate::ports::{BackupSummary, Clock, Entropy, ReadError, Store};
use crate::store::backup::erasures;
use crate::store::backup::read::BackupFault;
use crate::store::backup::unpack::Unpack;
use crate::store::committer::Work;
use crate::store::log::disk::{Disk, RealDisk, make_private_dir};
use crate::store::snapshot::SnapshotError;
use crate::store::write::Chore;
use crate::store::{
    FORMAT, House, OpenError, StoreSettings, UNDER_WAY, mark_number, open_house, stamp,
    write_identity,
};

/// Where the new store is built.
pub(in crate::store) const BUILDING: &str = "restoring";
/// How the directory of a store begins that was replaced.
pub(in crate::store) const REPLACED: &str = "replaced-";

/// Files of a data directory that are not the store's: they stay where they are.
const STAY: [&str; 11] = [
    "server.lock",
    "lock",
    "listen.json",
    "bootstrap.key",
    "hash.key",
    "dev-ca.pem",
    "dev-ca-key.pem",
    "dev-server.pem",
    "dev-server-key.pem",
    BUILDING,
    // Of the volume.
    "lost+found",
];

/// The run of a restored store is so much above that of its backup. A run is a start, and nobody starts so often between two
/// backups; so no run after the restore has a number that was used before it.
const RUN_LEAP: u32 = 1_000;

/// Commits of erasures that may be under way at once.
const COMMITS_MAX: usize = 256;

/// Devices of one page.
const PAGE: usize = 1_000;
/// Expansions of one page; each has its content with it.
const EXPANSIONS_PAGE: usize = 64;

/// Finds the keyed hash under which a user is recorded as erased.
pub type UserHash<'a> = &'a dyn Fn(AppId, &str) -> [u8; 32];

/// Where a restore is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreStep {
    /// Checking the backup, bytes.
    Verify,
    /// Writing what is in it, bytes of the backup.
    Unpack,
    /// Building the engine.
    Open,
    /// Applying erasures, erasures.
    Erase,
}

/// What to restore, and how.
pub struct Restore<'a> {
    /// The backup.
    pub from: &'a Path,
    /// The store to make; its directory is the data directory. No server runs on it: the caller holds its lock.
    pub settings: StoreSettings,
    /// Put a store that is there aside.
    pub replace: bool,
    /// Where else to look for what was erased: files of erasures, newer backups, data directories.
    pub erasures: Vec<PathBuf>,
    /// Whether the backup fits whatever the caller knows; asked before anything is touched.
    pub check: &'a dyn Fn(&BackupSummary) -> Result<(), String>,
    /// Needed for erased users.
    pub user_hash: Option<UserHash<'a>>,
    /// The clock.
    pub clock: Arc<dyn Clock>,
    /// Chance.
    pub entropy: Arc<dyn Entropy>,
    /// Told where it is: step, done, of how much.
    pub progress: &'a mut dyn FnMut(RestoreStep, u64, u64),
}

/// Where erasures were looked for, and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErasureSource {
    /// Where.
    pub path: PathBuf,
    /// How many it knows.
    pub found: u64,
    /// What could not be read there, if anything.
    pub trouble: Option<String>,
}

/// What was erased again.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Applied {
    /// Devices, those of erased users among them.
    pub devices: u64,
    /// API keys.
    pub keys: u64,
    /// Notifications that waited.
    pub notifications: u64,
}

/// What a store or backup holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Contents {
    /// Apps.
    pub apps: u64,
    /// Devices.
    pub devices: u64,
    /// API keys.
    pub keys: u64,
    /// Notifications that wait.
    pub waiting: u64,
}

/// What a restore did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    /// What the backup is.
    pub backup: BackupSummary,
    /// The new store.
    pub store: [u8; 16],
    /// Where the old one is now.
    pub replaced: Option<PathBuf>,
    /// Where erasures were looked for.
    pub sources: Vec<ErasureSource>,
    /// What was erased again.
    pub applied: Applied,
    /// What the new store holds.
    pub contents: Contents,
}

/// Why nothing was restored. The data directory is as it was, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The backup cannot be used.
    #[error("the backup {path} cannot be used: {fault}")]
    Backup {
        /// Which.
        path: PathBuf,
        /// Why.
        fault: BackupFault,
    },
    /// The backup does not fit what the caller knows.
    #[error("{0}")]
    Unfit(String),
    /// There is a store already.
    #[error("{0} holds a store already")]
    Occupied(PathBuf),
    /// There is something else.
    #[error("{dir} holds {what}, which is no part of a store")]
    Strange {
        /// The data directory.
        dir: PathBuf,
        /// One of the names.
        what: String,
    },
    /// A place that was named cannot be read at all.
    #[error("erasures cannot be read from {path}: {why}")]
    Erasures {
        /// Which.
        path: PathBuf,
        /// Why.
        why: String,
    },
    /// What is in the backup could not be written where it belongs.
    #[error("{dir}: {why}")]
    Target {
        /// Where the new store was being made.
        dir: PathBuf,
        /// Why.
        why: String,
    },
    /// The file system said no.
    #[error("{path}: {error}")]
    Io {
        /// With what.
        path: PathBuf,
        /// What it said.
        error: io::Error,
    },
    /// What was written cannot be opened.
    #[error("the restored store cannot be opened: {0}")]
    Open(#[from] OpenError),
    /// What was erased could not be erased again.
    #[error("what was erased since could not be erased again: {0}")]
    Erase(String),
}

impl From<ReadError> for RestoreError {
    fn from(error: ReadError) -> RestoreError {
        RestoreError::Erase(error.to_string())
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> RestoreError {
    let path = path.to_owned();
    move |error| RestoreError::Io { path, error }
}

/// Restores a backup into a data directory. Blocks for as long as it takes.
///
/// # Errors
///
/// When the backup is damaged or of a later version, the directory is not empty and nothing was said of replacing it, or the disk
/// does not do what is asked. Nothing is ever deleted.
pub fn restore(restore: Restore<'_>) -> Result<Restored, RestoreError> {
    let Restore {
        from,
        settings,
        replace,
        erasures,
        check,
        user_hash,
        clock,
        entropy,
        progress,
    } = restore;
    let dir = settings.dir.clone();
    let unusable = |fault| RestoreError::Backup {
        path: from.to_owned(),
        fault,
    };
    // What takes no time comes first, and all of the backup is read before anything is touched.
    let occupied = look_at_target(&dir, replace)?;
    let mut file = File::open(from).map_err(|error| unusable(error.into()))?;
    let length = file.metadata().map_err(io_at(from))?.len();
    let backup = super::verify(&mut file, &mut |done| {
        progress(RestoreStep::Verify, done, length);
    })
    .map_err(unusable)?;
    check(&backup).map_err(RestoreError::Unfit)?;

    let mut gathered = Gathered::default();
    if occupied {
        gathered.of_directory(&dir, false)?;
    }
    for earlier in replaced_in(&dir)? {
        gathered.of_directory(&earlier, false)?;
    }
    let beside = from
        .parent()
        .map(|parent| parent.join(erasures::FILE))
        .filter(|path| path.is_file() && !erasures.contains(path));
    for path in erasures.iter().chain(&beside) {
        gathered.of_path(path)?;
    }

    let building = dir.join(BUILDING);
    // What a restore that was cut off had made: only ever a copy of a backup.
    remove_building(&building)?;
    make_private_dir(&building).map_err(io_at(&building))?;
    let built = Building {
        from,
        length,
        building: &building,
        settings,
        user_hash,
        clock,
        entropy,
        progress,
    }
    .make(&backup, &gathered);
    let built = match built {
        Ok(built) => built,
        Err(error) => {
            // It only takes room, perhaps the last there was. Why it is there at all is what must be told.
            let _ = remove_building(&building);
            return Err(error);
        }
    };
    let replaced =
        make_ready(&dir, &building, occupied, &stamp(built.now_ms)).inspect_err(|_| {
            let _ = remove_building(&building);
        })?;
    change_places(&dir, &building, replaced.as_deref())?;
    Ok(Restored {
        backup,
        store: built.store,
        replaced,
        sources: gathered.sources,
        applied: built.applied,
        contents: built.contents,
    })
}

/// Whether a restore into this directory was broken off: there is no store, and only part of one.
#[must_use]
pub fn is_unfinished(dir: &Path) -> bool {
    match fs::read_to_string(dir.join(FORMAT)) {
        Ok(text) => text.split_whitespace().next() == UNDER_WAY.split_whitespace().next(),
        Err(error) => error.kind() == io::ErrorKind::NotFound && dir.join(BUILDING).exists(),
    }
}

fn remove_building(building: &Path) -> Result<(), RestoreError> {
    match fs::remove_dir_all(building) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_at(building)(error)),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The new store, being made in a directory of its own.
struct Building<'a, 'p> {
    from: &'a Path,
    length: u64,
    building: &'a Path,
    settings: StoreSettings,
    user_hash: Option<UserHash<'a>>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    progress: &'p mut dyn FnMut(RestoreStep, u64, u64),
}

/// A new store that is whole and safe.
struct Built {
    store: [u8; 16],
    now_ms: u64,
    applied: Applied,
    contents: Contents,
}

impl Building<'_, '_> {
    fn make(self, backup: &BackupSummary, gathered: &Gathered) -> Result<Built, RestoreError> {
        let Building {
            from,
            length,
            building,
            settings,
            user_hash,
            clock,
            entropy,
            progress,
        } = self;
        let unusable = |fault| RestoreError::Backup {
            path: from.to_owned(),
            fault,
        };
        let mut store = [0; 16];
        entropy.fill(&mut store);
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(building));
        let mut file = File::open(from).map_err(|error| unusable(error.into()))?;
        Unpack {
            disk: Arc::clone(&disk),
            entropy: Arc::clone(&entropy),
            store,
            segment_bytes: settings.segment_bytes,
            now_ms: clock.now().unix_ms,
            progress: &mut |done| progress(RestoreStep::Unpack, done, length),
        }
        .run(&mut file)
        .map_err(|fault| match fault {
            // The backup was read to its end before: it is the target that does not take it.
            BackupFault::Refused(why) => RestoreError::Target {
                dir: building.to_owned(),
                why,
            },
            BackupFault::Io(_)
            | BackupFault::Foreign
            | BackupFault::Newer(_)
            | BackupFault::Cut(_)
            | BackupFault::Rotten { .. } => unusable(fault),
        })?;
        write_identity(&*disk, store, true).map_err(io_at(building))?;

        progress(RestoreStep::Open, 0, 0);
        let (house, report) = open_house(
            &StoreSettings {
                dir: building.to_owned(),
                // Nothing is refused for lack of a reserve here; a disk that is really full says so itself.
                reserve_bytes: 0,
                ..settings
            },
            Arc::clone(&clock),
            entropy,
        )?;
        let now_ms = clock.now().unix_ms;
        let run = report.run.max(gathered.run).saturating_add(RUN_LEAP);
        let mut chores = vec![Chore::Run(run)];
        chores.extend(mark_number(&backup.key_mark).map(Chore::HashKey));
        wait(&house, Work::Chores(chores))?;
        let total = gathered.erasures.len() as u64;
        let applied = Applier {
            house: &house,
            now_ms,
            applied: Applied::default(),
        }
        .run(&gathered.erasures, user_hash, &mut |done| {
            progress(RestoreStep::Erase, done.min(total), total);
        })?;
        let contents = house.contents()?;
        // The erasures are in it, and it was read again.
        house.keeper.take_snapshot().map_err(|error| match error {
            SnapshotError::Io(error) => RestoreError::Io {
                path: building.to_owned(),
                error,
            },
            SnapshotError::Engine(_)
            | SnapshotError::Newer(_)
            | SnapshotError::Rotten(_)
            | SnapshotError::Foreign
            | SnapshotError::Interrupted => RestoreError::Erase(error.to_string()),
        })?;
        house.close();
        Ok(Built {
            store,
            now_ms,
            applied,
            contents,
        })
    }
}

impl House {
    /// What it holds.
    fn contents(&self) -> Result<Contents, ReadError> {
        let census = self.reader.census()?;
        let count = |room: char| census.get(&room).copied().unwrap_or(0);
        Ok(Contents {
            apps: count('a'),
            devices: count('d'),
            keys: count('k'),
            waiting: count('r'),
        })
    }
}
