//! What an operator can set, what can be wrong at the start, and what is told about it.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Which engine indexes the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineKind {
    /// Everything in memory, rebuilt from snapshot and log at each start. For tests and small servers.
    Memory,
    /// sled, in files below the data directory. The default.
    #[default]
    Sled,
    /// fjall, in files below the data directory.
    Fjall,
}

impl EngineKind {
    /// Its name in settings, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            EngineKind::Memory => "memory",
            EngineKind::Sled => "sled",
            EngineKind::Fjall => "fjall",
        }
    }
}

/// How the store is set up. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreSettings {
    /// The data directory; made with mode 0700 if it is not there. One process at a time.
    pub dir: PathBuf,
    /// Which engine indexes the log. Default sled.
    pub engine: EngineKind,
    /// Memory that the store may use, about: sled's cache is a quarter of it, fjall's an eighth, frames that the engine has not
    /// applied yet are at most a quarter, the rest is for what is being written. Default 256 MiB; smaller makes reads of
    /// absent devices slower, and bursts wait sooner.
    pub memory_bytes: u64,
    /// Size of one log segment, allocated in full before it is used. Default 64 MiB; smaller means more frequent,
    /// shorter pauses to change over.
    pub segment_bytes: u64,
    /// Log written since the last snapshot before the next is due, unless twice the live data is more. Default
    /// 256 MiB. Larger means fewer snapshots, more disk, and a longer replay after the engine was lost.
    pub snapshot_bytes: u64,
    /// Time after which a snapshot is due if anything was written. Default 1 hour.
    pub snapshot_every: Duration,
    /// How far the engine may be behind the log before new work waits. Default 64 MiB; that much memory may be held
    /// by frames on their way.
    pub lag_bytes: u64,
    /// The same as a time: what the engine will take for all that it does not have yet, as quick as it was of late, and the age of the
    /// oldest of it, counted from the end of [`rest_time`](StoreSettings::rest_time). Default 2 seconds.
    pub lag_time: Duration,
    /// How long what is safe rests before the engine takes it, unless it comes to 16 MiB, to a quarter of
    /// [`lag_bytes`](StoreSettings::lag_bytes), or to what the engine takes an eighth of [`lag_time`](StoreSettings::lag_time) for
    /// before. Default 1 second; 0: it does not rest. Longer means that more of what is
    /// acknowledged soon never reaches the engine, and more to replay after a kill.
    pub rest_time: Duration,
    /// How many times what lives the engine's files may be before another is built beside it while the store serves.
    /// Default 4; 0 never builds. Smaller means more copying, larger more disk.
    pub rebuild_factor: u64,
    /// Files of an engine up to this size are left alone. Default 256 MiB: what an engine takes for its own ends, such as
    /// journals, is below it.
    pub rebuild_floor: u64,
    /// Free room on the volume below which new pings are refused, so that removals still can be written. Default 512 MiB.
    pub reserve_bytes: u64,
    /// Tells which hash key the secrets in the store were hashed with, without telling the key. Backups carry it. Default
    /// zeros: not known.
    pub key_mark: [u8; 32],
    /// Use a data directory on a network file system or behind FUSE, because the operator knows that syncs and locks hold
    /// there. Default false: such a place is refused.
    pub trust_file_system: bool,
    /// Backups that the server makes by itself. Default none.
    pub backup: Option<BackupPlan>,
    /// How long outcomes are kept (`receipts.keep`). Default 24 hours.
    pub outcomes_keep: Duration,
    /// Size of the history of outcomes (`receipts.max_bytes`); the oldest give way. Default 4 GiB.
    pub outcomes_max_bytes: u64,
}

/// Where and how often the server makes backups by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupPlan {
    /// The directory; it is never made, so that a volume that is not mounted is noticed.
    pub dir: PathBuf,
    /// Time from one to the next.
    pub every: Duration,
    /// How many are kept; at least 1.
    pub keep: u32,
    /// How long each is kept; the newest one stays whatever its age.
    pub keep_for: Duration,
}

impl StoreSettings {
    /// The defaults, for a data directory.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> StoreSettings {
        StoreSettings {
            dir: dir.into(),
            engine: EngineKind::default(),
            memory_bytes: 256 << 20,
            segment_bytes: 64 << 20,
            snapshot_bytes: 256 << 20,
            snapshot_every: Duration::from_secs(3600),
            lag_bytes: 64 << 20,
            lag_time: Duration::from_secs(2),
            rest_time: Duration::from_secs(1),
            rebuild_factor: 4,
            rebuild_floor: 256 << 20,
            reserve_bytes: 512 << 20,
            trust_file_system: false,
            key_mark: [0; 32],
            backup: None,
            outcomes_keep: Duration::from_secs(24 * 3600),
            outcomes_max_bytes: 4 << 30,
        }
    }
}

/// Why the store cannot be opened. The text says what the operator can do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has the directory.
    #[error(
        "the data directory {dir} is in use{}; stop that server first, or give this one a directory of its own",
        holder.map_or(String::new(), |pid| format!(" by process {pid}"))
    )]
    InUse {
        /// The data directory.
        dir: PathBuf,
        /// Who has it, if it said so.
        holder: Option<u32>,
    },
    /// The data directory belongs to another user.
    #[error(
        "the data directory {dir} belongs to user {owner}, and this is user {us}: start the server as that user, or give the \
         directory to this one (chown -R {us} {dir})"
    )]
    NotOurs {
        /// The data directory.
        dir: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Who this is.
        us: u32,
    },
    /// The data directory lies on a file system whose promises cannot be seen from here.
    #[error(
        "the data directory {dir} lies on a file system of type {name}, and from here nobody can tell whether what is synced \
         there reaches a disk and whether a lock there holds: use a disk of this machine (data_dir), or, if you know that \
         it keeps both promises, say so with store.trust_file_system = true"
    )]
    FileSystem {
        /// The data directory.
        dir: PathBuf,
        /// What it lies on.
        name: &'static str,
    },
    /// The operating system refused something.
    #[error(
        "{what} {path}: {error}; check that the directory is there, writable for this user and on a healthy disk"
    )]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// What came back.
        error: io::Error,
    },
    /// Written by a later version.
    #[error(
        "the store was written by a later version of this program ({what}); start that version, or restore a backup \
         made by this one"
    )]
    Newer {
        /// What is too new.
        what: String,
    },
    /// Not a store.
    #[error("{path} does not describe a store: {why}; this directory may belong to something else")]
    NotAStore {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A restore was broken off before it had put a store here.
    #[error(
        "a restore into {0} was not finished: run `bellwire restore` again, with --replace if it asks for it. To begin with an \
         empty store instead, remove the directory `restoring` in there"
    )]
    Restoring(PathBuf),
    /// The secrets in the store were hashed with another key.
    #[error(
        "the secrets of this store were hashed with another key than the one in hash.key, so no device and no API key would be \
         let in: put the hash.key of the server that made this store, or its backup, in its place"
    )]
    HashKey,
    /// Files of different stores are mixed.
    #[error("{0}; files of two data directories were mixed, put them back where they belong")]
    Mixed(String),
    /// Neither engine nor snapshot plus log give a provable state.
    #[error(
        "what is stored cannot be proved: {why}. Nothing was deleted. Restore a backup into a fresh directory, or move \
         `snapshots` and `log` back if they were taken away"
    )]
    Unprovable {
        /// What was tried and why it failed.
        why: String,
    },
    /// The engine cannot even be made anew.
    #[error("the engine cannot be opened: {0}")]
    Engine(String),
    /// The first write of this run could not be made safe.
    #[error("the first write of this run failed ({0}); check the disk before starting again")]
    FirstWrite(String),
    /// No room for the first frame of this run.
    #[error("there is no room on the disk to start: {0}; free some and start again")]
    NoRoom(String),
}

impl OpenError {
    pub(super) fn io(
        what: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(io::Error) -> OpenError {
        let path = path.as_ref().to_owned();
        move |error| OpenError::Io { what, path, error }
    }
}

/// What happened at the start, for the log and the operator.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The number of this run, raised at each start.
    pub run: u32,
    /// The engine's name.
    pub engine: &'static str,
    /// Frames that the engine did not have and that were replayed.
    pub replayed_frames: u64,
    /// The last frame of the log.
    pub last_frame: u64,
    /// The last write before this start was cut off; it was never promised.
    pub torn: bool,
    /// Frames that were damaged although nothing needs them any more.
    pub gaps: u64,
    /// The engine was made anew.
    pub rebuilt: Option<Rebuilt>,
    /// Files that could not be used and were kept, relative to the data directory. Anything here means that promised
    /// notifications may be missing.
    pub set_aside: Vec<String>,
}

/// Why and from what an engine was made anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rebuilt {
    /// What was wrong with the old one.
    pub why: String,
    /// The frame of the snapshot that was loaded; `None`: the whole log was replayed.
    pub snapshot: Option<u64>,
    /// Where the old one is now, relative to the data directory.
    pub moved_to: Option<String>,
}

impl OpenReport {
    /// Tells the operator's log.
    pub(super) fn log(&self) {
        tracing::info!(
            run = self.run,
            engine = self.engine,
            replayed_frames = self.replayed_frames,
            last_frame = self.last_frame,
            torn = self.torn,
            "the store is open"
        );
        if self.gaps > 0 {
            tracing::warn!(
                frames = self.gaps,
                "the log holds damaged frames that nothing needs any more; have the disk checked"
            );
        }
        if let Some(rebuilt) = &self.rebuilt {
            tracing::warn!(
                why = rebuilt.why,
                snapshot = rebuilt.snapshot,
                moved_to = rebuilt.moved_to,
                "the engine was made anew from snapshot and log"
            );
        }
        for file in &self.set_aside {
            tracing::error!(
                file,
                "a part of the log is damaged and was set aside: promised notifications may be missing"
            );
        }
    }
}
