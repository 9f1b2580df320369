//! From a backup to a data directory that a server can start on.
//!
//! The new store is built in a directory of its own inside the data directory, with an identity of its own, opened as a start
//! would, and freed of what was erased since the backup was made. Only then it takes its place; an old store
//! is put aside, never deleted. While files change places the file `format` says so, and a start refuses; a restore that was cut
//! off is simply done again.
//!
//! What was erased since is gathered from wherever somebody may know it: the store that is replaced, read past any damage; a
//! newer backup; the file that a server keeps beside its backups.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};

use bytes::Bytes;

use super::erasures;
use super::read::{BackupFault, Parser, Piece};
use super::unpack::Unpack;
use crate::delivery::{AppId, Change, DeviceId, MailboxRead, Outcome, PingId, RowMeta, Summary};
use crate::ports::{
    BackupSummary, Batch, Clock, Committed, DeviceFilter, Entropy, Erased, Erasure, Op,
    OpenExpansion, ReadError, Store, TopicChange,
};
use crate::store::committer::Work;
use crate::store::log::SET_ASIDE;
use crate::store::log::disk::{Disk, RealDisk, make_private_dir};
use crate::store::log::frame;
use crate::store::log::segment::{self, Header};
use crate::store::snapshot::{self, SnapshotError};
use crate::store::write::{self, Chore, Write};
use crate::store::{
    FORMAT, House, OpenError, StoreSettings, UNDER_WAY, keys, mark_number, open_house, record,
    stamp, write_identity,
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

/// Whether there is a store in the data directory.
fn look_at_target(dir: &Path, replace: bool) -> Result<bool, RestoreError> {
    make_private_dir(dir).map_err(io_at(dir))?;
    let names = names_in(dir)?;
    let Some(first) = names.first() else {
        return Ok(false);
    };
    let known = ["format", "log", "snapshots"];
    if !names.iter().any(|name| known.contains(&name.as_str())) {
        return Err(RestoreError::Strange {
            dir: dir.to_owned(),
            what: first.clone(),
        });
    }
    if !replace {
        return Err(RestoreError::Occupied(dir.to_owned()));
    }
    Ok(true)
}

/// The names in a data directory that belong to its store.
fn names_in(dir: &Path) -> Result<Vec<String>, RestoreError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        let name = entry.map_err(io_at(dir))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if !STAY.contains(&name.as_str()) && !name.starts_with(REPLACED) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Stores that were replaced before, perhaps by a restore that was cut off.
fn replaced_in(dir: &Path) -> Result<Vec<PathBuf>, RestoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        let entry = entry.map_err(io_at(dir))?;
        if entry.file_name().to_string_lossy().starts_with(REPLACED) {
            found.push(entry.path());
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn sync_dir(path: &Path) -> Result<(), RestoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_at(path))
}

fn move_file(from: &Path, to: &Path) -> Result<(), RestoreError> {
    fs::rename(from, to).map_err(io_at(from))
}

/// The word that a restore is under way, in a file of the new store's directory.
const MARK: &str = "under-way";

/// Makes the place for the old store and writes the word that a restore is under way, as long as nothing has been moved: whatever
/// takes room on the disk comes here. Answers where the old store goes.
fn make_ready(
    dir: &Path,
    building: &Path,
    occupied: bool,
    stamp: &str,
) -> Result<Option<PathBuf>, RestoreError> {
    let mark = building.join(MARK);
    fs::write(&mark, UNDER_WAY).map_err(io_at(&mark))?;
    File::open(&mark)
        .and_then(|file| file.sync_all())
        .map_err(io_at(&mark))?;
    if !occupied {
        return Ok(None);
    }
    let mut to = dir.join(format!("{REPLACED}{stamp}"));
    let mut again = 1;
    while to.exists() {
        again += 1;
        to = dir.join(format!("{REPLACED}{stamp}-{again}"));
    }
    make_private_dir(&to).map_err(io_at(&to))?;
    let format = dir.join(FORMAT);
    // Kept under its name before the word that a restore is under way takes its place.
    let kept = if format.exists() {
        fs::copy(&format, to.join(FORMAT))
            .and_then(|_| File::open(to.join(FORMAT))?.sync_all())
            .map_err(io_at(&format))
            .and_then(|()| sync_dir(&to))
    } else {
        Ok(())
    };
    match kept {
        Ok(()) => Ok(Some(to)),
        Err(error) => {
            // Nothing but a copy is in it.
            let _ = fs::remove_dir_all(&to);
            Err(error)
        }
    }
}

/// Puts the old store aside and the new one in its place.
fn change_places(dir: &Path, building: &Path, aside: Option<&Path>) -> Result<(), RestoreError> {
    move_file(&building.join(MARK), &dir.join(FORMAT))?;
    sync_dir(dir)?;
    if let Some(aside) = aside {
        for name in names_in(dir)? {
            if name != FORMAT {
                move_file(&dir.join(&name), &aside.join(&name))?;
            }
        }
        sync_dir(aside)?;
        sync_dir(dir)?;
    }
    for entry in fs::read_dir(building).map_err(io_at(building))? {
        let name = entry.map_err(io_at(building))?.file_name();
        if name != FORMAT && name != "lock" {
            move_file(&building.join(&name), &dir.join(&name))?;
        }
    }
    sync_dir(dir)?;
    move_file(&building.join(FORMAT), &dir.join(FORMAT))?;
    sync_dir(dir)?;
    fs::remove_dir_all(building).map_err(io_at(building))?;
    sync_dir(dir)
}

// ---- Gathering what was erased ---------------------------------------------------------------------------------------

/// What was erased, from everywhere, and the highest run that was met on the way.
#[derive(Default)]
struct Gathered {
    erasures: BTreeMap<Erased, Erasure>,
    run: u32,
    sources: Vec<ErasureSource>,
}

impl Gathered {
    fn add(&mut self, erasure: Erasure) {
        let known = self.erasures.entry(erasure.what).or_insert(erasure);
        *known = erasures::merged(*known, erasure);
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> bool {
        if key == keys::RUN {
            let run = record::number(key, value).unwrap_or(0);
            self.run = self.run.max(u32::try_from(run).unwrap_or(u32::MAX));
        }
        match erasures::of_entry(key, value) {
            Some(erasure) => {
                self.add(erasure);
                true
            }
            None => false,
        }
    }

    fn source(&mut self, path: &Path, found: u64, trouble: Option<String>) {
        self.sources.push(ErasureSource {
            path: path.to_owned(),
            found,
            trouble,
        });
    }

    /// A file of erasures, a backup or a data directory.
    fn of_path(&mut self, path: &Path) -> Result<(), RestoreError> {
        let bad = |why: String| RestoreError::Erasures {
            path: path.to_owned(),
            why,
        };
        if path.is_dir() {
            return self.of_directory(path, true);
        }
        let mut file = File::open(path).map_err(|error| bad(error.to_string()))?;
        let mut head = [0; 8];
        file.read_exact(&mut head)
            .map_err(|_| bad("it is neither a file of erasures nor a backup".to_owned()))?;
        if erasures::is_one(&head) {
            return self.of_file(path).map_err(|error| bad(error.to_string()));
        }
        if head != super::MAGIC {
            return Err(bad(
                "it is neither a file of erasures nor a backup".to_owned()
            ));
        }
        let file = File::open(path).map_err(|error| bad(error.to_string()))?;
        self.of_backup(path, file);
        Ok(())
    }

    fn of_file(&mut self, path: &Path) -> io::Result<()> {
        let (dir, name) = (
            path.parent().unwrap_or(Path::new(".")),
            path.file_name().and_then(|name| name.to_str()),
        );
        let name = name.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let file = RealDisk::new(dir).open_to_read(name)?;
        let held = erasures::read(&*file, &mut |erasure| self.add(erasure))?;
        let trouble =
            (held.damaged > 0).then(|| format!("{} records in it cannot be read", held.damaged));
        self.source(path, held.erasures, trouble);
        Ok(())
    }

    /// As much of a backup as can be read.
    fn of_backup(&mut self, path: &Path, mut file: File) {
        let mut found = 0;
        let mut parser = Parser::new();
        let mut buffer = vec![0; 256 << 10];
        let trouble = loop {
            match file.read(&mut buffer) {
                Ok(0) => break parser.finish().err().map(|fault| fault.to_string()),
                Ok(count) => {
                    let fed = parser.feed(&buffer[..count], &mut |piece| {
                        match piece {
                            Piece::Head(head) => self.run = self.run.max(head.run),
                            Piece::Entry(key, value) => found += u64::from(self.put(key, value)),
                            Piece::Frame(_, _, writes) => found += self.writes(writes),
                        }
                        Ok(())
                    });
                    if let Err(fault) = fed {
                        break Some(fault.to_string());
                    }
                }
                Err(error) => break Some(error.to_string()),
            }
        };
        self.source(path, found, trouble);
    }

    fn writes(&mut self, writes: &[Write]) -> u64 {
        let mut found = 0;
        for write in writes {
            if let Write::Put { key, value } = write {
                found += u64::from(self.put(key, value));
            }
        }
        found
    }

    /// As much of a data directory, or of a directory of backups, as can be read: its snapshots and its log have every
    /// erasure, whatever became of its engine.
    fn of_directory(&mut self, dir: &Path, named: bool) -> Result<(), RestoreError> {
        let disk = RealDisk::new(dir);
        let mut troubles: Vec<String> = Vec::new();
        let mut found = 0;
        let mut seen = false;
        for name in disk.list(snapshot::DIR).unwrap_or_default() {
            if !name.ends_with(".snap") {
                continue;
            }
            seen = true;
            let read = disk
                .open_to_read(&format!("{}/{name}", snapshot::DIR))
                .map_err(SnapshotError::Io)
                .and_then(|file| {
                    snapshot::parse(&*file, None, &mut |key, value| {
                        found += u64::from(self.put(key, value));
                        Ok(())
                    })
                });
            if let Err(error) = read {
                troubles.push(format!("{name}: {error}"));
            }
        }
        for place in [segment::DIR, SET_ASIDE] {
            for name in disk.list(place).unwrap_or_default() {
                if !name.ends_with(".seg") {
                    continue;
                }
                seen = true;
                match self.of_segment(&disk, &format!("{place}/{name}")) {
                    Ok((count, trouble)) => {
                        found += count;
                        troubles.extend(trouble.map(|why| format!("{name}: {why}")));
                    }
                    Err(error) => troubles.push(format!("{name}: {error}")),
                }
            }
        }
        if seen {
            let trouble = (!troubles.is_empty()).then(|| troubles.join("; "));
            self.source(dir, found, trouble);
        }
        let file = dir.join(erasures::FILE);
        if file.is_file() {
            self.of_file(&file).map_err(io_at(&file))?;
        } else if named && !seen {
            return Err(RestoreError::Erasures {
                path: dir.to_owned(),
                why: "it is no data directory and has no file of erasures".to_owned(),
            });
        }
        Ok(())
    }

    /// Every frame of a segment that can be read, past any damage.
    fn of_segment(&mut self, disk: &RealDisk, name: &str) -> io::Result<(u64, Option<String>)> {
        let file = disk.open_to_read(name)?;
        let length = usize::try_from(file.length()?).map_err(io::Error::other)?;
        let mut data = vec![0; length];
        file.read_at(&mut data, 0)?;
        let data = Bytes::from(data);
        let Ok(header) = Header::decode(&data) else {
            return Ok((0, Some("its header cannot be read".to_owned())));
        };
        let scan = frame::scan(
            &data,
            segment::HEADER as usize,
            header.seed(),
            header.first_frame,
            u64::MAX,
        );
        let mut found = 0;
        let mut undecodable = 0;
        for frame in &scan.frames {
            match write::decode(&data.slice(frame.payload.clone())) {
                Ok(writes) => found += self.writes(&writes),
                Err(_) => undecodable += 1,
            }
        }
        let missing: u64 = scan.gaps.iter().map(|gap| gap.end - gap.start).sum();
        let trouble = (missing + undecodable > 0)
            .then(|| format!("{} frames cannot be read", missing + undecodable));
        Ok((found, trouble))
    }
}

// ---- Erasing again ---------------------------------------------------------------------------------------------------

/// Hands over a batch and waits until it is safe.
fn wait(house: &House, work: Work) -> Result<(), RestoreError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    house.desk.commit(
        work,
        Box::new(move |verdict: Committed| {
            // The receiver waits below for as long as this lives.
            let _ = sender.send(verdict);
        }),
    );
    settled(receiver.recv())
}

fn settled(verdict: Result<Committed, mpsc::RecvError>) -> Result<(), RestoreError> {
    match verdict {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(RestoreError::Erase(
            "the log could not be written; look at the disk and its free room".to_owned(),
        )),
    }
}

struct Applier<'a> {
    house: &'a House,
    now_ms: u64,
    applied: Applied,
}

impl Applier<'_> {
    fn run(
        mut self,
        erasures: &BTreeMap<Erased, Erasure>,
        user_hash: Option<UserHash<'_>>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Applied, RestoreError> {
        let mut devices: BTreeSet<DeviceId> = BTreeSet::new();
        let mut notifications: BTreeMap<DeviceId, BTreeMap<PingId, u64>> = BTreeMap::new();
        let mut batches: Vec<Batch> = Vec::new();
        let mut users: BTreeMap<(AppId, [u8; 32]), u64> = BTreeMap::new();
        let mut expansions: BTreeSet<PingId> = BTreeSet::new();
        for (what, erasure) in erasures {
            let mut batch = Vec::new();
            match *what {
                Erased::Device(device) => drop(devices.insert(device)),
                Erased::Key(id) => {
                    if let Some(key) = self.house.reader.key(id)? {
                        self.applied.keys += 1;
                        batch.push(Op::DropKey(key.app, id));
                    }
                }
                Erased::Notification(ping, device) => {
                    let pings = notifications.entry(device).or_default();
                    pings.insert(ping, erasure.at_ms);
                }
                Erased::Expansion(ping) => drop(expansions.insert(ping)),
                Erased::User(hash) => drop(users.insert((erasure.app, hash), erasure.at_ms)),
            }
            // Known in the new store as well: it may be restored again, from another backup.
            if erasure.until_ms > self.now_ms {
                batch.push(Op::Erase(*erasure));
            }
            if !batch.is_empty() {
                batches.push(batch);
            }
        }
        if let (Some(hash), false) = (user_hash, users.is_empty()) {
            self.devices_of(&users, hash, &mut devices)?;
        }
        if !expansions.is_empty() {
            batches.extend(self.stopped(&expansions)?);
        }
        let (sender, receiver) = mpsc::channel();
        let (mut under_way, mut done) = (0, 0);
        let mut commit = |batch: Batch| -> Result<(), RestoreError> {
            if under_way == COMMITS_MAX {
                settled(receiver.recv())?;
                under_way -= 1;
            }
            let sender = sender.clone();
            self.house.desk.commit(
                Work::Ops(batch),
                Box::new(move |verdict: Committed| {
                    // The receiver waits below for every one of them.
                    let _ = sender.send(verdict);
                }),
            );
            under_way += 1;
            done += 1;
            progress(done);
            Ok(())
        };
        for batch in batches {
            commit(batch)?;
        }
        for device in &devices {
            if let Some(batch) = forget_device(self.house, *device, self.now_ms)? {
                self.applied.devices += 1;
                commit(batch)?;
            }
        }
        for (device, pings) in notifications {
            if devices.contains(&device) {
                continue;
            }
            let (count, batch) = take_back(self.house, device, &pings, self.now_ms)?;
            if count > 0 {
                self.applied.notifications += count;
                commit(batch)?;
            }
        }
        for _ in 0..under_way {
            settled(receiver.recv())?;
        }
        Ok(self.applied)
    }

    /// What ends expansions that were taken back after the backup was made.
    fn stopped(&self, taken_back: &BTreeSet<PingId>) -> Result<Vec<Batch>, ReadError> {
        let mut batches = Vec::new();
        let mut after = None;
        loop {
            let page = self.house.reader.expansions(after, EXPANSIONS_PAGE)?;
            for OpenExpansion { record, progress } in page.items {
                if taken_back.contains(&record.notification.ping) {
                    batches.push(vec![Op::DropExpansion {
                        app: record.notification.app,
                        stamp: record.stamp,
                        chunks: record.chunks_from(progress.chunk),
                    }]);
                }
            }
            after = page.next;
            if after.is_none() {
                return Ok(batches);
            }
        }
    }

    /// The devices of erased users. Those registered after the erasure belong to somebody who came back.
    fn devices_of(
        &self,
        users: &BTreeMap<(AppId, [u8; 32]), u64>,
        hash: UserHash<'_>,
        devices: &mut BTreeSet<DeviceId>,
    ) -> Result<(), RestoreError> {
        let apps: BTreeSet<AppId> = users.keys().map(|(app, _)| *app).collect();
        for app in apps {
            let mut after = None;
            loop {
                let filter = DeviceFilter::default();
                let page = self.house.reader.devices(app, &filter, after, PAGE)?;
                for record in page.items {
                    let erased_ms = users.get(&(app, hash(app, &record.user)));
                    if erased_ms.is_some_and(|at_ms| record.created_ms <= *at_ms) {
                        devices.insert(record.id);
                    }
                }
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }
}

fn mailbox(house: &House, device: DeviceId) -> Result<(Option<Summary>, Vec<RowMeta>), ReadError> {
    let mut chores = Vec::new();
    let view = house.reader.mailbox(
        &MailboxRead {
            device,
            all: true,
            ping: None,
            collapse: None,
            lowest: None,
            rows: Vec::new(),
            withdrawals: false,
        },
        &mut chores,
    )?;
    house.desk.chores(chores);
    Ok((view.summary, view.rows))
}

fn removal(app: AppId, device: DeviceId, row: RowMeta, at_ms: u64) -> Op {
    Op::Mailbox(Change::Remove {
        app,
        device,
        row,
        outcome: Outcome::Revoked,
        at_ms,
    })
}

/// What revoking a device does, in one frame. `None`: it is not there.
fn forget_device(house: &House, device: DeviceId, now_ms: u64) -> Result<Option<Batch>, ReadError> {
    let record = house.reader.device(device)?;
    let (summary, rows) = mailbox(house, device)?;
    let Some(app) = record
        .as_ref()
        .map(|record| record.app)
        .or(summary.map(|summary| summary.app))
    else {
        return Ok(None);
    };
    let mut batch: Batch = rows
        .into_iter()
        .map(|row| removal(app, device, row, now_ms))
        .collect();
    batch.push(Op::Mailbox(Change::Forget { device }));
    batch.extend(record.map(Op::DropDevice));
    let topics = house.reader.topics(device)?;
    batch.push(Op::PutTopics(TopicChange::leave_all(app, device, topics)));
    Ok(Some(batch))
}

/// What revoking these pings at these times does in one mailbox. What was accepted after that, under the same id, stays.
fn take_back(
    house: &House,
    device: DeviceId,
    pings: &BTreeMap<PingId, u64>,
    now_ms: u64,
) -> Result<(u64, Batch), ReadError> {
    let (Some(mut summary), rows) = mailbox(house, device)? else {
        return Ok((0, Vec::new()));
    };
    let mut batch = Vec::new();
    let mut chores = Vec::new();
    for row in rows {
        let Some(at_ms) = pings.get(&row.ping) else {
            continue;
        };
        let bodies = house.reader.bodies(device, &[row.key], &mut chores)?;
        // One that cannot be read is taken back: nobody could show it was meant to stay.
        let stays = bodies.iter().any(|(_, body)| {
            body.as_ref()
                .is_some_and(|notification| notification.accepted_ms > *at_ms)
        });
        if !stays {
            summary.count = summary.count.saturating_sub(1);
            summary.bytes = summary.bytes.saturating_sub(u64::from(row.size));
            batch.push(removal(summary.app, device, row, now_ms));
        }
    }
    house.desk.chores(chores);
    let count = batch.len() as u64;
    batch.push(Op::Mailbox(Change::Summary { device, summary }));
    Ok((count, batch))
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
