//! The seam to the engines: an ordered map of bytes that takes batches.
//!
//! An engine is an index over the log. It need not be durable, it may be thrown away, but one thing it must do:
//! whatever survives a kill of the process is the state after some prefix of the writes, and the position that a batch brings the
//! engine to is the last write of that batch. Then an engine that says a position has everything before it, and what
//! it has beyond that is written again by the replay. Nothing above this folder knows trees.

pub(in crate::store) mod fjall;
pub(in crate::store) mod memory;
pub(in crate::store) mod sled;

#[cfg(test)]
mod conformance;

use std::ops::{ControlFlow, Range};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bytes::Bytes;

/// Most operations in one batch: the pieces in which much is applied, between which others get their turn.
pub(in crate::store) const BATCH_OPERATIONS: usize = 256;

/// An engine that did not do what was asked; the text is for the operator.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub(in crate::store) struct EngineError(pub(in crate::store) String);

/// From which end a range is walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum Direction {
    /// Smallest key first.
    Up,
    /// Greatest key first.
    Down,
}

/// What a walk is told about each entry; it may stop the walk.
pub(in crate::store) type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> ControlFlow<()>;

/// One put or delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct EngineWrite {
    /// Which key.
    pub(in crate::store) key: Bytes,
    /// Its value; `None` deletes.
    pub(in crate::store) value: Option<Bytes>,
}

/// An ordered map of bytes.
pub(in crate::store) trait Engine: Send + Sync + 'static {
    /// Its name in settings, logs and metrics.
    fn name(&self) -> &'static str;

    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// Walks over a range. What is written meanwhile may be seen or not.
    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError>;

    /// Applies a batch of at most [`BATCH_OPERATIONS`], then the position if one is given. Readers may see a part of it, and a crash or
    /// an error may leave one, but the position is never there without all of the batch.
    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError>;

    /// The frame that it takes next; `None` if it never was told.
    fn position(&self) -> Result<Option<u64>, EngineError>;

    /// Size of its files, or of what it holds in memory, bytes.
    fn size_bytes(&self) -> u64;

    /// Hands what it buffers to the operating system. Called by one thread only.
    fn flush(&self) -> Result<(), EngineError>;

    /// Hands everything to the disk. Reads still work.
    fn close(&self) -> Result<(), EngineError>;
}

/// Bytes that the files below a directory take on the disk. What vanishes while it looks counts as nothing.
pub(in crate::store) fn disk_bytes(dir: &Path) -> u64 {
    /// The unit of `st_blocks`, whatever the file system's own is.
    const SECTOR: u64 = 512;
    let Ok(entries) = std::fs::read_dir(dir) else {
        return 0;
    };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(about) if about.is_dir() => disk_bytes(&entry.path()),
            Ok(about) => about.blocks() * SECTOR,
            Err(_) => 0,
        })
        .sum()
}
