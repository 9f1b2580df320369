//! The engine on sled 0.34.7: the embedded default.
//!
//! sled is asked for little, because little is known to hold: its `flush` never syncs (it ends in
//! `sync_file_range`), its blobs are never synced, there is no repair, and it does not check what it reads beyond
//! its own frames. The log makes that harmless. Kept to here:
//! - one tree, because a batch covers one tree;
//! - segments of 8 MiB, so that no leaf of records up to 72 KiB becomes a blob;
//! - sled's own flush thread is off; [`Engine::flush`] comes from the applier alone, because two at once were seen to hang;
//! - writes go in one by one, the position last. sled's own batches keep every reader out, write their part of its log by
//!   itself, waking all its threads for it, twice, and pin the epoch once, so that a million inserts held 9 GB of garbage. What they
//!   would add is not needed: see [`Engine::apply`];
//! - every few writes crossbeam's garbage is let go: often, so that it is little and what is freed is still warm;
//! - everything is guarded against panics, which is what damaged files and failing disks lead to in places.

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Deref, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite, Visit};
use crate::store::keys;

/// sled's unit of writing. A leaf becomes a blob beyond a quarter of it, and holds up to 16 records. Fixed when the
/// files are made.
const SEGMENT: usize = 8 << 20;

/// Writes after which crossbeam's garbage is let go, a bounded piece each time. A write makes a few pieces, a call frees some
/// hundreds of them, so it does not pile up; gathered for a whole batch it took a quarter more CPU, all of it the allocator's.
const EPOCH_FLUSH_EVERY: usize = 4;

/// sled's own errors are values; its panics are turned into the same.
fn guarded<T>(what: &str, run: impl FnOnce() -> sled::Result<T>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(EngineError(format!("sled could not {what}: {error}"))),
        Err(_) => Err(EngineError(format!("sled panicked when asked to {what}"))),
    }
}

/// sled's handle. When the last one goes, sled syncs its files once more, and panics when the disk says no.
struct Handle(Option<sled::Db>);

impl Deref for Handle {
    type Target = sled::Db;

    fn deref(&self) -> &sled::Db {
        self.0.as_ref().expect("it is only taken when dropped")
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let db = self.0.take();
        if let Err(error) = guarded("let go of its files", || {
            drop(db);
            Ok(())
        }) {
            tracing::warn!(%error, "nothing is lost: the log has what these files may miss");
        }
    }
}

/// Which part of the memory that the store may use is sled's cache.
const CACHE_PART: u64 = 4;

pub(in crate::store) struct SledEngine {
    db: Handle,
    dir: PathBuf,
}

impl SledEngine {
    /// Opens or makes the files below `dir`.
    pub(in crate::store) fn open(dir: &Path, memory_bytes: u64) -> Result<SledEngine, EngineError> {
        let db = guarded("open its files", || {
            sled::Config::new()
                .path(dir)
                .cache_capacity(memory_bytes / CACHE_PART)
                .segment_size(SEGMENT)
                .flush_every_ms(None)
                .open()
        })?;
        Ok(SledEngine {
            db: Handle(Some(db)),
            dir: dir.to_owned(),
        })
    }

    /// Whether an error of [`SledEngine::open`] says that the files are open elsewhere; sled has no other sign of it.
    pub(in crate::store) fn is_busy(error: &EngineError) -> bool {
        error.0.contains("could not acquire lock")
    }
}

impl Engine for SledEngine {
    fn name(&self) -> &'static str {
        "sled"
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let value = guarded("read", || self.db.get(key))?;
        Ok(value.map(Bytes::from_owner))
    }

    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        if range.start >= range.end {
            return Ok(());
        }
        let mut entries = self.db.range(range);
        loop {
            let entry = guarded("walk over a range", || {
                match direction {
                    Direction::Up => entries.next(),
                    Direction::Down => entries.next_back(),
                }
                .transpose()
            })?;
            match entry {
                Some((key, value)) => {
                    if let ControlFlow::Break(()) = visit(&key, &value) {
                        return Ok(());
                    }
                }
                None => return Ok(()),
            }
        }
    }

    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        debug_assert!(batch.len() <= BATCH_OPERATIONS);
        guarded("apply a batch", || {
            for writes in batch.chunks(EPOCH_FLUSH_EVERY) {
                for write in writes {
                    match &write.value {
                        Some(value) => self.db.insert(&*write.key, &**value)?,
                        None => self.db.remove(&*write.key)?,
                    };
                }
                crossbeam_epoch::pin().flush();
            }
            // Behind all that it speaks of, in sled's log as well.
            if let Some(position) = position {
                let mut value = Vec::new();
                crate::store::record::put_number(keys::POSITION, &mut value, position);
                self.db.insert(keys::POSITION, value)?;
            }
            Ok(())
        })
    }

    fn position(&self) -> Result<Option<u64>, EngineError> {
        let Some(value) = self.get(keys::POSITION)? else {
            return Ok(None);
        };
        crate::store::record::number(keys::POSITION, &value)
            .map(Some)
            .map_err(|fault| EngineError(format!("the engine's position cannot be read: {fault}")))
    }

    fn size_bytes(&self) -> u64 {
        guarded("measure its files", || self.db.size_on_disk()).unwrap_or(0)
    }

    fn flush(&self) -> Result<(), EngineError> {
        guarded("flush", || self.db.flush()).map(|_| ())
    }

    fn close(&self) -> Result<(), EngineError> {
        self.flush()?;
        // sled does not sync; a clean end does it for it, so that the next start may trust the files
        // even if the machine went down in between.
        sync_files(&self.dir)
            .map_err(|error| EngineError(format!("sled's files could not be synced: {error}")))
    }
}

/// Syncs every file below a directory, and the directory.
fn sync_files(dir: &Path) -> io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_files(&entry.path())?;
        } else {
            File::open(entry.path())?.sync_all()?;
        }
    }
    File::open(dir)?.sync_all()
}
