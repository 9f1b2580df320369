//! For tests and simulations: a disk of memory that forgets, a store without threads on it, time and chance by hand.
//!
//! Nothing here is used by the server itself. It is public because the simulator lives in a crate of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::backup::Copier;
#[cfg(test)]
use super::backup::schedule::Turns as BackupTurns;
use super::committer::{Desk, Done, Work};
use super::home::{EngineHome, MemoryHome};
use super::log::disk::{Disk, DiskFile};
use super::settings::{OpenError, OpenReport, StoreSettings};
use super::snapshot::SnapshotError;
use super::write::Chore;
use super::{Parts, assemble, health, stats};
use crate::delivery::{
    AppId, CommitFailure, DeviceId, MailboxRead, MailboxView, Mono, Notification, Now, PingId,
    RowKey, StoredMailbox, Withdrawal,
};
use crate::ports::{
    AppRecord, Audience, BackupError, BackupSummary, BackupWatch, Batch, CallbackRecord, Clock,
    ClockState, Committed, DeadLetter, DeviceFilter, DeviceRecord, Entropy, ExpiredRow,
    ExpiryCursor, Grant, IdempotencyRecord, KeyRecord, Member, Membership, Op, OpenExpansion,
    OutcomeEvents, OutcomeFollow, OutcomeFollower, OutcomePage, OutcomePosition, OutcomeQuery,
    OutcomeRecord, Page, PairState, ReadError, Seen, SourceId, Spans, Stamp, Store, StoreHealth,
    StoreStats,
};

/// A clock that stands still until it is moved.
#[derive(Debug, Default)]
pub struct ManualClock {
    mono_us: AtomicU64,
    start_ms: u64,
}

impl ManualClock {
    /// A clock at the beginning of a run that starts at this Unix time, milliseconds.
    #[must_use]
    pub fn new(start_ms: u64) -> ManualClock {
        ManualClock {
            mono_us: AtomicU64::new(0),
            start_ms,
        }
    }

    /// Moves both clocks forward.
    pub fn advance(&self, by: Duration) {
        let us = u64::try_from(by.as_micros()).unwrap_or(u64::MAX);
        self.mono_us.fetch_add(us, Ordering::Relaxed);
    }
}

impl Clock for ManualClock {
    fn now(&self) -> Now {
        let us = self.mono_us.load(Ordering::Relaxed);
        Now {
            mono: Mono(us),
            unix_ms: self.start_ms + us / 1000,
        }
    }

    fn state(&self) -> ClockState {
        ClockState::Steady
    }
}

/// Chance that repeats itself: the same seed, the same bytes. Never for anything that must be secret.
#[derive(Debug)]
pub struct SeededEntropy(Mutex<Chance>);

impl SeededEntropy {
    /// Entropy that a test can repeat.
    #[must_use]
    pub fn new(seed: u64) -> SeededEntropy {
        SeededEntropy(Mutex::new(Chance(seed)))
    }
}

impl Entropy for SeededEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        let mut chance = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in buffer.chunks_mut(8) {
            let bytes = chance.next().to_le_bytes();
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
    }
}

/// SplitMix64: small, and good enough to choose what a crash keeps.
#[derive(Debug, Clone, Copy)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not 0.
    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A disk writes sectors whole; what is larger may be torn between them.
const SECTOR: u64 = 512;

/// A disk of memory. What was not synced may be lost, in part or in whole, when it [crashes](MemoryDisk::crash); it can be
/// told to fail or to be full. Clones are handles of the same disk.
#[derive(Clone, Default)]
pub struct MemoryDisk(Arc<Mutex<Platter>>);

#[derive(Default)]
struct Platter {
    files: BTreeMap<u64, FileData>,
    /// Names as a running system sees them.
    names: BTreeMap<String, u64>,
    /// Names as they would be found after a loss of power.
    safe_names: BTreeMap<String, u64>,
    /// What happened to names since they were last safe, in order.
    pending_names: Vec<NameChange>,
    next_file: u64,
    /// Counts down to a write that fails.
    fail_write_in: Option<u64>,
    /// Counts down to a sync that fails.
    fail_sync_in: Option<u64>,
    /// Counts down to a sync that is not done any more, because the power goes.
    cut_sync_in: Option<u64>,
    /// Files that no byte can be read from.
    unreadable: BTreeSet<u64>,
    /// Bytes that fit; `None`: any number.
    capacity: Option<u64>,
    syncs: u64,
    /// Handles of before the last crash do nothing any more.
    age: u64,
}

#[derive(Clone)]
enum NameChange {
    Set(String, u64),
    Remove(String),
}

impl NameChange {
    fn name(&self) -> &str {
        match self {
            NameChange::Set(name, _) | NameChange::Remove(name) => name,
        }
    }

    fn apply(self, names: &mut BTreeMap<String, u64>) {
        match self {
            NameChange::Set(name, file) => {
                names.insert(name, file);
            }
            NameChange::Remove(name) => {
                names.remove(&name);
            }
        }
    }
}

#[derive(Default)]
struct FileData {
    /// As a running system reads it.
    current: Vec<u8>,
    /// As it would be found after a loss of power.
    safe: Vec<u8>,
    /// Ranges of `current` written since the last sync.
    pending: Vec<(u64, u64)>,
}

impl FileData {
    fn keep(&mut self, from: u64, to: u64) {
        let (from, to) = (from as usize, (to as usize).min(self.current.len()));
        if self.safe.len() < to {
            self.safe.resize(to, 0);
        }
        if from < to {
            self.safe[from..to].copy_from_slice(&self.current[from..to]);
        }
    }
}

impl MemoryDisk {
    /// An empty disk that does everything right.
    #[must_use]
    pub fn new() -> MemoryDisk {
        MemoryDisk::default()
    }

    fn lock(&self) -> MutexGuard<'_, Platter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The power goes: what was synced stays; of the rest any part may be there, chosen by `seed`. Open handles do
    /// nothing any more.
    pub fn crash(&self, seed: u64) {
        let mut platter = self.lock();
        let mut chance = Chance(seed);
        let style = chance.below(3);
        let mut stays = move || match style {
            0 => false,
            1 => true,
            _ => chance.below(2) == 0,
        };
        for file in platter.files.values_mut() {
            if stays() && file.safe.len() < file.current.len() {
                let length = file.current.len();
                file.safe.resize(length, 0);
            }
            for (from, to) in std::mem::take(&mut file.pending) {
                let mut at = from;
                while at < to {
                    let end = (at - at % SECTOR + SECTOR).min(to);
                    if stays() {
                        file.keep(at, end);
                    }
                    at = end;
                }
            }
            file.current.clone_from(&file.safe);
        }
        let mut pending = std::mem::take(&mut platter.pending_names);
        let kept = pending
            .iter()
            .position(|_| !stays())
            .unwrap_or(pending.len());
        pending.truncate(kept);
        for change in pending {
            change.apply(&mut platter.safe_names);
        }
        platter.names = platter.safe_names.clone();
        platter.forget_nameless();
        platter.fail_write_in = None;
        platter.fail_sync_in = None;
        platter.cut_sync_in = None;
        platter.age += 1;
    }

    /// The process ends, the machine goes on: everything written stays, synced or not. Open handles do nothing any more.
    pub fn kill(&self) {
        self.lock().age += 1;
    }

    /// The write after `writes` more fails, with any part of it done.
    pub fn fail_write_in(&self, writes: u64) {
        self.lock().fail_write_in = Some(writes);
    }

    /// From now on reading this file fails, as on a disk with a bad place, or no longer.
    pub fn fail_reads(&self, name: &str, fails: bool) {
        let mut platter = self.lock();
        let Some(id) = platter.names.get(name).copied() else {
            return;
        };
        if fails {
            platter.unreadable.insert(id);
        } else {
            platter.unreadable.remove(&id);
        }
    }

    /// The sync after `syncs` more fails. As on Linux, what it was to make safe is then forgotten: a later sync
    /// succeeds and does not bring it back.
    pub fn fail_sync_in(&self, syncs: u64) {
        self.lock().fail_sync_in = Some(syncs);
    }

    /// The sync after `syncs` more is not done any more, because the power goes: what it was to make safe may be found, in
    /// part or in whole, after the [crash](MemoryDisk::crash) that must follow.
    pub fn cut_sync_in(&self, syncs: u64) {
        self.lock().cut_sync_in = Some(syncs);
    }

    /// Limits what fits on the disk, bytes; `None`: no limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.lock().capacity = bytes;
    }

    /// Bytes of all files.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.lock().used()
    }

    /// Syncs of files so far.
    #[must_use]
    pub fn syncs(&self) -> u64 {
        self.lock().syncs
    }

    /// The names of all files.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().names.keys().cloned().collect()
    }

    /// One byte of a file, if it has so many.
    #[must_use]
    pub fn byte(&self, name: &str, offset: u64) -> Option<u8> {
        let platter = self.lock();
        let file = platter.files.get(platter.names.get(name)?)?;
        file.current.get(offset as usize).copied()
    }

    /// Changes one byte of a file, as rot does: at once, safely, unnoticed. `false`: there is no such byte.
    pub fn flip(&self, name: &str, offset: u64, mask: u8) -> bool {
        let mut platter = self.lock();
        let Some(id) = platter.names.get(name).copied() else {
            return false;
        };
        let Some(file) = platter.files.get_mut(&id) else {
            return false;
        };
        let at = offset as usize;
        let Some(byte) = file.current.get_mut(at) else {
            return false;
        };
        *byte ^= mask;
        if let Some(byte) = file.safe.get_mut(at) {
            *byte ^= mask;
        }
        true
    }
}

impl Platter {
    fn used(&self) -> u64 {
        self.names
            .values()
            .filter_map(|id| self.files.get(id))
            .map(|file| file.current.len() as u64)
            .sum()
    }

    fn forget_nameless(&mut self) {
        let (names, safe) = (&self.names, &self.safe_names);
        let pending = &self.pending_names;
        self.files.retain(|id, _| {
            names.values().any(|named| named == id)
                || safe.values().any(|named| named == id)
                || pending
                    .iter()
                    .any(|change| matches!(change, NameChange::Set(_, named) if named == id))
        });
    }

    fn rename(&mut self, change: NameChange) {
        self.pending_names.push(change.clone());
        change.apply(&mut self.names);
    }
}

fn not_found() -> io::Error {
    io::Error::from(io::ErrorKind::NotFound)
}

fn broken(what: &str) -> io::Error {
    io::Error::other(format!("the simulated disk failed to {what}"))
}

impl Disk for MemoryDisk {
    fn make_dir(&self, _name: &str) -> io::Result<()> {
        Ok(())
    }

    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let mut platter = self.lock();
        let id = platter.next_file;
        platter.next_file += 1;
        platter.files.insert(id, FileData::default());
        platter.rename(NameChange::Set(name.to_owned(), id));
        Ok(Box::new(MemoryFile {
            disk: self.clone(),
            id,
            age: platter.age,
        }))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let platter = self.lock();
        let id = *platter.names.get(name).ok_or_else(not_found)?;
        Ok(Box::new(MemoryFile {
            disk: self.clone(),
            id,
            age: platter.age,
        }))
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let platter = self.lock();
        Ok(platter
            .names
            .keys()
            .filter_map(|name| match dir {
                "" => (!name.contains('/')).then_some(name.as_str()),
                dir => name.strip_prefix(dir)?.strip_prefix('/'),
            })
            .map(str::to_owned)
            .collect())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut platter = self.lock();
        let id = *platter.names.get(from).ok_or_else(not_found)?;
        platter.rename(NameChange::Remove(from.to_owned()));
        platter.rename(NameChange::Set(to.to_owned(), id));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut platter = self.lock();
        if !platter.names.contains_key(name) {
            return Err(not_found());
        }
        platter.rename(NameChange::Remove(name.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut platter = self.lock();
        let inside = |name: &str| name.rsplit_once('/').map_or("", |(dir, _)| dir) == dir;
        let (now, later): (Vec<_>, Vec<_>) = std::mem::take(&mut platter.pending_names)
            .into_iter()
            .partition(|change| inside(change.name()));
        for change in now {
            change.apply(&mut platter.safe_names);
        }
        platter.pending_names = later;
        platter.forget_nameless();
        Ok(())
    }

    fn free(&self) -> io::Result<u64> {
        let platter = self.lock();
        Ok(platter
            .capacity
            .map_or(u64::MAX, |capacity| capacity.saturating_sub(platter.used())))
    }
}

struct MemoryFile {
    disk: MemoryDisk,
    id: u64,
    age: u64,
}

impl MemoryFile {
    fn with<T>(&self, run: impl FnOnce(&mut Platter, u64) -> io::Result<T>) -> io::Result<T> {
        let mut platter = self.disk.lock();
        if platter.age != self.age {
            return Err(broken("serve a process that has ended"));
        }
        run(&mut platter, self.id)
    }
}

impl Platter {
    fn file(&mut self, id: u64) -> io::Result<&mut FileData> {
        self.files.get_mut(&id).ok_or_else(not_found)
    }

    fn write(&mut self, id: u64, data: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + data.len() as u64;
        let free = self
            .capacity
            .map(|capacity| capacity.saturating_sub(self.used()));
        let fails = countdown(&mut self.fail_write_in);
        let file = self.file(id)?;
        let grows = end.saturating_sub(file.current.len() as u64);
        if free.is_some_and(|free| grows > free) {
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        if grows > 0 {
            file.current.resize(end as usize, 0);
        }
        let done = if fails { data.len() / 2 } else { data.len() };
        file.current[offset as usize..offset as usize + done].copy_from_slice(&data[..done]);
        file.pending.push((offset, offset + done as u64));
        if fails { Err(broken("write")) } else { Ok(()) }
    }
}

/// Whether the counted event is the one that fails.
fn countdown(left: &mut Option<u64>) -> bool {
    match left {
        Some(0) => {
            *left = None;
            true
        }
        Some(more) => {
            *more -= 1;
            false
        }
        None => false,
    }
}

impl DiskFile for MemoryFile {
    fn length(&self) -> io::Result<u64> {
        self.with(|platter, id| Ok(platter.file(id)?.current.len() as u64))
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|platter, id| {
            if platter.unreadable.contains(&id) {
                return Err(io::Error::from_raw_os_error(
                    rustix::io::Errno::IO.raw_os_error(),
                ));
            }
            let file = platter.file(id)?;
            let from = offset as usize;
            let bytes = file
                .current
                .get(from..from + buffer.len())
                .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
            buffer.copy_from_slice(bytes);
            Ok(())
        })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.with(|platter, id| platter.write(id, data, offset))
    }

    fn allocate(&self, length: u64) -> io::Result<()> {
        self.with(|platter, id| {
            let free = platter
                .capacity
                .map(|capacity| capacity.saturating_sub(platter.used()));
            let file = platter.file(id)?;
            let grows = length.saturating_sub(file.current.len() as u64);
            if free.is_some_and(|free| grows > free) {
                return Err(io::Error::from(io::ErrorKind::StorageFull));
            }
            if grows > 0 {
                file.current.resize(length as usize, 0);
            }
            Ok(())
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.with(|platter, id| {
            if countdown(&mut platter.cut_sync_in) {
                return Err(broken("sync before the power went"));
            }
            platter.syncs += 1;
            let fails = countdown(&mut platter.fail_sync_in);
            let file = platter.file(id)?;
            let pending = std::mem::take(&mut file.pending);
            if fails {
                return Err(broken("sync"));
            }
            if file.safe.len() < file.current.len() {
                let length = file.current.len();
                file.safe.resize(length, 0);
            }
            for (from, to) in pending {
                file.keep(from, to);
            }
            Ok(())
        })
    }
}

/// When a [`SyncStore`] writes its frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Turns {
    /// As soon as everybody who has a place has submitted, on the thread that handed over last.
    #[default]
    Immediate,
    /// Only by [`SyncStore::begin_frame`] and [`SyncStore::finish_frame`], so that anything can happen in between.
    Manual,
}

/// How a [`SyncStore`] behaves.
#[derive(Debug, Clone)]
pub struct SyncSettings {
    /// When frames are written.
    pub turns: Turns,
    /// How many frames the engine stays behind: 0 applies each at once.
    pub lag_frames: usize,
    /// Size of a log segment, bytes.
    pub segment_bytes: u64,
    /// Free room below which the store counts as full, bytes.
    pub reserve_bytes: u64,
}

impl Default for SyncSettings {
    fn default() -> SyncSettings {
        SyncSettings {
            turns: Turns::Immediate,
            lag_frames: 0,
            segment_bytes: 64 << 10,
            reserve_bytes: 0,
        }
    }
}

/// The store without threads, on a [`MemoryDisk`] with the engine in memory: everything happens on the caller's thread, and
/// the same calls lead to the same bytes.
///
/// Everything but the threads is the store's own code: log, frames, overlay, applier, snapshots, recovery.
pub struct SyncStore {
    disk: MemoryDisk,
    settings: SyncSettings,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    home: HomeMaker,
    /// Replaced as a whole by a crash. Callbacks run without it being locked.
    life: Mutex<Arc<Life>>,
}

/// Bytes of a backup's block: small.
const BACKUP_BLOCK: usize = 512;

/// Makes the place of the engine, anew for each run.
pub(super) type HomeMaker = Arc<dyn Fn(&MemoryDisk) -> Arc<dyn EngineHome> + Send + Sync>;

/// One run of a [`SyncStore`].
struct Life {
    desk: Desk,
    parts: Mutex<Parts>,
    frame: Mutex<Option<(std::collections::VecDeque<super::Entry>, super::Rides)>>,
    turning: AtomicBool,
    run: u32,
    copier: Arc<Copier>,
}

impl SyncStore {
    /// Opens the store that is on the disk, or makes one.
    ///
    /// # Errors
    ///
    /// As [`super::open`].
    pub fn open(
        disk: &MemoryDisk,
        settings: SyncSettings,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
    ) -> Result<(SyncStore, OpenReport), OpenError> {
        Self::open_in(
            disk,
            settings,
            clock,
            entropy,
            Arc::new(|_| Arc::new(MemoryHome)),
        )
    }

    /// The same with another place for the engine.
    pub(super) fn open_in(
        disk: &MemoryDisk,
        settings: SyncSettings,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        home: HomeMaker,
    ) -> Result<(SyncStore, OpenReport), OpenError> {
        let (life, report) = Life::begin(disk, &settings, &clock, &entropy, &home)?;
        let store = SyncStore {
            disk: disk.clone(),
            settings,
            clock,
            entropy,
            home,
            life: Mutex::new(Arc::new(life)),
        };
        Ok((store, report))
    }

    fn life(&self) -> Arc<Life> {
        Arc::clone(&self.life.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The power goes and comes back: see [`MemoryDisk::crash`]. Sources are forgotten and must register again; nobody who
    /// waited is answered.
    ///
    /// # Errors
    ///
    /// As [`super::open`].
    pub fn crash_and_reopen(&self, seed: u64) -> Result<OpenReport, OpenError> {
        self.disk.crash(seed);
        self.reopen()
    }

    /// The process is killed and started again: as [`SyncStore::crash_and_reopen`], but what was written is there.
    ///
    /// # Errors
    ///
    /// As [`super::open`].
    pub fn kill_and_reopen(&self) -> Result<OpenReport, OpenError> {
        self.disk.kill();
        self.reopen()
    }

    fn reopen(&self) -> Result<OpenReport, OpenError> {
        let (life, report) = Life::begin(
            &self.disk,
            &self.settings,
            &self.clock,
            &self.entropy,
            &self.home,
        )?;
        *self.life.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(life);
        Ok(report)
    }

    /// Takes what was handed over into a frame, if everybody who has a place has submitted. From here until
    /// [`SyncStore::finish_frame`] the frame is under way: places are refused. `false`: nothing to write.
    pub fn begin_frame(&self) -> bool {
        self.life().begin_frame()
    }

    /// Writes and syncs the frame under way, answers everybody, grants places. `false`: none was under way.
    pub fn finish_frame(&self) -> bool {
        self.life().finish_frame(self.settings.lag_frames)
    }

    /// Lets the engine catch up.
    pub fn catch_up(&self) {
        self.life().apply(0);
    }

    /// Takes a snapshot and releases what it makes superfluous. `false`: it could not be taken.
    pub fn snapshot(&self) -> bool {
        let life = self.life();
        let parts = life.parts();
        match parts.keeper.take_snapshot() {
            Ok(_) => true,
            Err(
                SnapshotError::Io(_)
                | SnapshotError::Engine(_)
                | SnapshotError::Newer(_)
                | SnapshotError::Rotten(_)
                | SnapshotError::Foreign
                | SnapshotError::Interrupted,
            ) => false,
        }
    }

    /// How many keys there are of each kind, by their first letter (the table atop `keys.rs`): for those who look for what
    /// was left behind.
    ///
    /// # Errors
    ///
    /// If the engine cannot be read.
    pub fn census(&self) -> Result<BTreeMap<char, u64>, ReadError> {
        self.reading(|reader, _| reader.census())
    }

    /// Looks at the free room, as the server does once a second.
    pub fn look_at_room(&self) {
        self.life().parts().keeper.look_at_room();
    }

    /// What makes backups of this run into a directory by itself, for a test that takes its turns. Only frames written from
    /// now on are noted there.
    #[cfg(test)]
    pub(super) fn schedule(
        &self,
        disk: Arc<dyn Disk>,
        plan: super::BackupPlan,
    ) -> (BackupTurns, Arc<super::BackupFigures>) {
        let life = self.life();
        let mut parts = life.parts();
        let fresh = Arc::new(super::Fresh::default());
        parts.writer.note_erased(Arc::clone(&fresh));
        let figures = Arc::new(super::BackupFigures::default());
        let turns = BackupTurns::new(super::Schedule {
            disk,
            plan,
            copier: Arc::clone(&life.copier),
            reader: parts.reader.clone(),
            clock: Arc::clone(&self.clock),
            fresh,
            reserve_bytes: 0,
            figures: Arc::clone(&figures),
            bell: Arc::default(),
        });
        (turns, figures)
    }

    /// Damages the value of a key in the engine, as rot does.
    #[cfg(test)]
    pub(super) fn rot(&self, key: &[u8]) {
        use super::engine::Engine as _;
        let life = self.life();
        let parts = life.parts();
        let value = parts.engine.get(key).ok().flatten();
        let mut value = value.map(|value| value.to_vec()).unwrap_or_default();
        if let Some(byte) = value.first_mut() {
            *byte ^= 1;
        }
        let write = super::engine::EngineWrite {
            key: bytes::Bytes::copy_from_slice(key),
            value: Some(value.into()),
        };
        assert!(parts.engine.apply(&[write], None).is_ok());
    }

    /// Who looks after the room.
    #[cfg(test)]
    pub(super) fn keeper(&self) -> Arc<super::Keeper> {
        Arc::clone(&self.life().parts().keeper)
    }

    /// How many bodies the engine holds that several rows share.
    #[cfg(test)]
    pub(super) fn shared_bodies(&self) -> usize {
        use super::engine::Engine as _;
        let life = self.life();
        life.apply(0);
        let mut count = 0;
        let (from, to) = (&b"b"[..], &b"c"[..]);
        let scanned =
            life.parts()
                .engine
                .scan(from..to, super::engine::Direction::Up, &mut |_, _| {
                    count += 1;
                    std::ops::ControlFlow::Continue(())
                });
        assert!(scanned.is_ok());
        count
    }

    fn turn(&self) {
        if self.settings.turns == Turns::Immediate {
            self.life().turn(self.settings.lag_frames);
        }
    }

    fn reading<T>(&self, read: impl FnOnce(&super::Reader, &mut Vec<Chore>) -> T) -> T {
        let life = self.life();
        let mut chores = Vec::new();
        let answer = read(&life.parts().reader, &mut chores);
        life.desk.chores(chores);
        answer
    }
}

impl Life {
    fn begin(
        disk: &MemoryDisk,
        settings: &SyncSettings,
        clock: &Arc<dyn Clock>,
        entropy: &Arc<dyn Entropy>,
        home: &HomeMaker,
    ) -> Result<(Life, OpenReport), OpenError> {
        let mut parts = assemble(
            &StoreSettings {
                segment_bytes: settings.segment_bytes,
                reserve_bytes: settings.reserve_bytes,
                lag_bytes: u64::MAX,
                lag_time: Duration::MAX,
                ..StoreSettings::new(PathBuf::new())
            },
            Arc::new(disk.clone()),
            home(disk),
            Arc::clone(clock),
            Arc::clone(entropy),
        )?;
        let report = parts.report.clone();
        if let Some(copier) = Arc::get_mut(&mut parts.copier) {
            // So that little data makes many blocks, and much happens between them.
            copier.set_block(BACKUP_BLOCK);
            // All of the little log that there is counts.
            copier.set_held_max(0);
        }
        let life = Life {
            desk: Desk::new(),
            run: report.run,
            copier: Arc::clone(&parts.copier),
            parts: Mutex::new(parts),
            frame: Mutex::new(None),
            turning: AtomicBool::new(false),
        };
        Ok((life, report))
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin_frame(&self) -> bool {
        let mut frame = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        if frame.is_none() {
            *frame = self.desk.try_gather();
        }
        frame.is_some()
    }

    fn finish_frame(&self, lag_frames: usize) -> bool {
        let taken = self
            .frame
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some((mut entries, mut rides)) = taken else {
            return false;
        };
        while !entries.is_empty() {
            let answers = self.parts().writer.write_frame(&mut entries, &mut rides);
            self.apply(lag_frames);
            for (waiter, verdict) in answers {
                self.desk.answer(waiter, verdict);
            }
        }
        self.desk.open_again(rides);
        true
    }

    /// Frames until there is nothing to write. A callback that hands over more is served by the loop that called it.
    fn turn(&self, lag_frames: usize) {
        if self.turning.swap(true, Ordering::Relaxed) {
            return;
        }
        while self.begin_frame() {
            self.finish_frame(lag_frames);
        }
        self.turning.store(false, Ordering::Relaxed);
    }

    fn apply(&self, lag_frames: usize) {
        let mut parts = self.parts();
        let Parts { applier, queue, .. } = &mut *parts;
        if queue.waiting() > lag_frames {
            while applier.step(queue).is_ok_and(|frames| frames > 0) {}
        }
    }
}

impl Store for SyncStore {
    fn register(&self, grant: Box<dyn Fn(Grant) + Send + Sync>) -> SourceId {
        self.life().desk.register(grant)
    }

    fn want(&self, source: SourceId) -> bool {
        self.life().desk.want(source)
    }

    fn submit(&self, source: SourceId, batch: Batch) {
        self.life().desk.submit(source, batch);
        self.turn();
    }

    fn commit(&self, batch: Batch, done: Done) {
        self.life().desk.commit(Work::Ops(batch), done);
        self.turn();
    }

    fn ride_along(&self, op: Op) {
        self.life().desk.ride_along(op);
    }

    fn read_mailbox(&self, request: &MailboxRead) -> Result<MailboxView, ReadError> {
        self.reading(|reader, chores| reader.mailbox(request, chores))
    }

    fn read_bodies(
        &self,
        device: DeviceId,
        rows: &[RowKey],
    ) -> Result<Vec<(RowKey, Option<Arc<Notification>>)>, ReadError> {
        self.reading(|reader, chores| reader.bodies(device, rows, chores))
    }

    fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError> {
        self.reading(|reader, _| reader.withdrawals(device))
    }

    fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError> {
        self.reading(|reader, _| reader.pairs(ping, after, limit))
    }

    /// Keeps no history: what it would write must not move where a seed fails.
    fn record_outcomes(&self, records: &mut Vec<OutcomeRecord>) {
        records.clear();
    }

    fn outcomes(&self, _query: &OutcomeQuery) -> Result<OutcomePage, ReadError> {
        Ok(OutcomePage::default())
    }

    fn outcomes_of_ping(
        &self,
        _app: AppId,
        _ping: PingId,
        _after: Option<DeviceId>,
        _limit: usize,
    ) -> Result<Vec<OutcomeRecord>, ReadError> {
        Ok(Vec::new())
    }

    fn outcomes_end(&self) -> OutcomePosition {
        OutcomePosition(0)
    }

    fn outcome_events(&self, follow: &OutcomeFollow) -> Result<OutcomeEvents, ReadError> {
        Ok(OutcomeEvents {
            items: Vec::new(),
            next: follow.from,
            more: false,
        })
    }

    fn follow_outcomes(&self, _follower: Option<OutcomeFollower>) {}

    fn expired(
        &self,
        until_ms: u64,
        after: &ExpiryCursor,
        limit: usize,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError> {
        self.reading(|reader, chores| reader.expired(until_ms, after, limit, chores))
    }

    /// Takes a frame of its own at once, whatever [`Turns`] says.
    fn drop_receipts(&self, before_ms: u64, limit: usize) -> Result<usize, ReadError> {
        let life = self.life();
        let now_ms = self.clock.now().unix_ms;
        let chores = life.parts().reader.receipts(before_ms, now_ms, limit)?;
        if chores.is_empty() {
            return Ok(0);
        }
        let dropped = chores.len();
        let verdict = Arc::new(Mutex::new(Err(CommitFailure::Failed)));
        let heard = Arc::clone(&verdict);
        life.desk.commit(
            Work::Chores(chores),
            Box::new(move |said: Committed| {
                *heard.lock().unwrap_or_else(PoisonError::into_inner) = said;
            }),
        );
        life.turn(self.settings.lag_frames);
        let said = *verdict.lock().unwrap_or_else(PoisonError::into_inner);
        said.map(|()| dropped)
            .map_err(|failure| ReadError::Engine(format!("{failure:?}")))
    }

    fn device(&self, id: DeviceId) -> Result<Option<DeviceRecord>, ReadError> {
        self.reading(|reader, _| reader.device(id))
    }

    fn devices(
        &self,
        app: AppId,
        filter: &DeviceFilter,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceRecord, DeviceId>, ReadError> {
        self.reading(|reader, _| reader.devices(app, filter, after, limit))
    }

    fn user_devices(
        &self,
        app: AppId,
        user: &str,
        limit: usize,
    ) -> Result<Vec<DeviceId>, ReadError> {
        self.reading(|reader, _| reader.user_devices(app, user, limit))
    }

    fn seen(&self, devices: &[DeviceId]) -> Result<Vec<Option<Seen>>, ReadError> {
        self.reading(|reader, _| reader.seen(devices))
    }

    fn topics(&self, device: DeviceId) -> Result<Vec<Membership>, ReadError> {
        self.reading(|reader, _| reader.topics(device))
    }

    fn spans(
        &self,
        app: AppId,
        device: DeviceId,
        topics: &[String],
    ) -> Result<Vec<Spans>, ReadError> {
        self.reading(|reader, _| reader.spans(app, device, topics))
    }

    fn members(
        &self,
        app: AppId,
        audience: &Audience,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError> {
        self.reading(|reader, _| reader.members(app, audience, after, limit))
    }

    fn mailboxes(
        &self,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<StoredMailbox, DeviceId>, ReadError> {
        self.reading(|reader, _| reader.mailboxes(after, limit))
    }

    fn expansions(
        &self,
        after: Option<(AppId, Stamp)>,
        limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError> {
        self.reading(|reader, _| reader.expansions(after, limit))
    }

    fn chunk(&self, app: AppId, stamp: Stamp, number: u32) -> Result<Vec<DeviceId>, ReadError> {
        self.reading(|reader, _| reader.chunk(app, stamp, number))
    }

    fn key(&self, id: [u8; 10]) -> Result<Option<KeyRecord>, ReadError> {
        self.reading(|reader, _| reader.key(id))
    }

    fn keys(&self) -> Result<Vec<KeyRecord>, ReadError> {
        self.reading(|reader, _| reader.keys())
    }

    fn callbacks(&self) -> Result<Vec<CallbackRecord>, ReadError> {
        self.reading(|reader, _| reader.callbacks())
    }

    fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError> {
        self.reading(|reader, _| reader.dead_letters(app, after, limit))
    }

    fn apps(&self) -> Result<Vec<AppRecord>, ReadError> {
        self.reading(|reader, _| reader.apps())
    }

    fn idempotency(
        &self,
        app: AppId,
        key_hash: [u8; 32],
    ) -> Result<Option<IdempotencyRecord>, ReadError> {
        self.reading(|reader, _| reader.idempotency(app, key_hash))
    }

    fn health(&self) -> StoreHealth {
        let life = self.life();
        let parts = life.parts();
        health(&parts.figures, &parts.keeper, false)
    }

    /// Its engine is as far behind as its settings say.
    fn crowded(&self) -> bool {
        false
    }

    fn stats(&self) -> StoreStats {
        let life = self.life();
        let parts = life.parts();
        let now = parts.clock.now().mono;
        stats(&parts.figures, &parts.keeper, &parts.queue, life.run, now)
    }

    /// The store is not locked while `watch` is called: it may write.
    fn backup(
        &self,
        out: &mut dyn io::Write,
        watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError> {
        let copier = Arc::clone(&self.life().copier);
        copier.copy(out, watch)
    }

    fn close(&self) {
        let life = self.life();
        life.turn(0);
        life.apply(0);
        life.desk.shut();
    }
}
