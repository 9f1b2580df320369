//! Backups: what is asked of the store, and what a backup holds.

use std::ops::ControlFlow;

/// How far a backup is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BackupProgress {
    /// Entries of the walk so far.
    pub entries: u64,
    /// Frames so far.
    pub frames: u64,
    /// Bytes written so far.
    pub bytes: u64,
}

/// Called after each block; may wait, so that the backup leaves room for others, or end it.
pub type BackupWatch<'a> = &'a dyn Fn(&BackupProgress) -> ControlFlow<()>;

/// What a whole backup holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSummary {
    /// The store that it is of.
    pub store: [u8; 16],
    /// Tells which hash key its secrets were hashed with, without telling the key; zeros: not known.
    pub key_mark: [u8; 32],
    /// The version of the program that wrote it.
    pub program: String,
    /// The run that wrote it.
    pub run: u32,
    /// When it was begun, Unix milliseconds.
    pub begun_ms: u64,
    /// When it was finished, Unix milliseconds.
    pub finished_ms: u64,
    /// The first frame that is replayed over its entries.
    pub first_frame: u64,
    /// It is the state right after this frame.
    pub last_frame: u64,
    /// Entries of the walk.
    pub entries: u64,
    /// Bytes of their keys and values.
    pub entry_bytes: u64,
    /// Frames written while it was made.
    pub frames: u64,
    /// Bytes of their payloads.
    pub frame_bytes: u64,
    /// Records that could not be read and are not in it; they were set aside in the store.
    pub left_out: u64,
    /// Size of the file, bytes.
    pub bytes: u64,
    /// SHA-256 over everything before the digest itself.
    pub sha256: [u8; 32],
}

/// Figures of the backups that the server makes by itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct BackupStats {
    /// When the last good one was begun, Unix milliseconds; 0: there is none.
    pub last_ms: u64,
    /// How long it took, milliseconds; 0: an earlier run made it.
    pub took_ms: u64,
    /// Its size, bytes.
    pub bytes: u64,
    /// Backups of this store in the directory.
    pub kept: u64,
    /// Tries of this run that failed.
    pub failures: u64,
    /// When the next one is due, Unix milliseconds.
    pub due_ms: u64,
    /// One is being made now.
    pub running: bool,
    /// Why the last try failed, if it did.
    pub trouble: Option<String>,
}

/// Why there is no backup.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// Another one is being made.
    #[error("a backup is being made already")]
    Busy,
    /// Where it goes did not take it.
    #[error("it could not be written: {0}")]
    Write(std::io::Error),
    /// The store could not be read.
    #[error("the store could not be read: {0}")]
    Store(String),
    /// It keeps the log from being let go, and the disk has too little room for that.
    #[error("there is too little room on the disk to keep the log until it is done")]
    NoRoom,
    /// The server goes down, or whoever watches wants no more.
    #[error("it was broken off")]
    Interrupted,
}
