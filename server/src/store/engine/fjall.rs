//! The engine on fjall 3: a log-structured tree that syncs for real and gives room back.
//!
//! - One keyspace, because the position belongs into the batch; fjall writes a batch into its journal between a start mark
//!   and a checksum, and at a start it drops a last batch that is not whole.
//! - [`Engine::flush`] hands its journal's buffer to the operating system and syncs nothing: what survives a kill is the journal
//!   up to some byte, so the state after some prefix of the batches.
//! - fjall syncs a journal before it begins the next, and before it writes a table from what the journal holds. So
//!   what a loss of power leaves is a prefix as well, and its files may be believed (`docs/decisions/0014`).
//! - Journals and memtables are capped, or fjall holds hundreds of megabytes for a few that live.
//! - A commit waits inside fjall, without end, while four memtables are being written. If the disk fails just then nobody
//!   ends that wait. So [`Engine::apply`] waits before it commits, with a bound, and looks whether fjall has given up.
//! - Everything is guarded against panics: damaged files reach a few of its `expect`s.

use std::ops::{ControlFlow, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use fjall::{AbstractTree, Database, Keyspace, KeyspaceCreateOptions, PersistMode};

use super::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite, Visit, disk_bytes};
use crate::store::keys;

/// The one keyspace.
const KEYSPACE: &str = "store";

/// Size at which a memtable is written as a table, as a part of the memory that the store may use, and its bounds: small beside the
/// cache, and a few seconds of writing.
const MEMTABLE_PART: u64 = 32;
const MEMTABLE_BYTES: (u64, u64) = (1 << 20, 8 << 20);

/// Which part of that memory is the cache. The rest is for memtables (one that grows and up to three that are being written) and
/// for what a merge reads and writes.
const CACHE_PART: u64 = 8;

/// Journals kept at most, bytes. fjall takes no less; it begins a new journal at 64 MB.
const JOURNAL_BYTES: u64 = 64 << 20;

/// Threads that write tables and merge them: with two, one is always free for writing, so merging never stops it.
const WORKERS: usize = 2;

/// Files of tables held open. A table is up to 64 MiB; beyond 16 GiB some are opened again and again.
const OPEN_FILES: usize = 256;

/// Memtables being written, and runs not yet merged, from which on a commit waits. fjall itself waits from 4 and 30 on.
const SEALED_MAX: usize = 2;
const RUNS_MAX: usize = 16;

/// Longest wait of that kind, and the time between two looks.
const WAIT_MAX: Duration = Duration::from_secs(10);
const WAIT_STEP: Duration = Duration::from_millis(2);

/// Entries and bytes after which a walk begins anew behind the last one. An open walk keeps every memtable and table that was
/// there when it began, and a snapshot may walk for minutes while writes go on.
const PAGE_ENTRIES: usize = 1_000;
const PAGE_BYTES: usize = 1 << 20;

const BUSY: &str = "fjall's files are open elsewhere";

/// fjall's own errors are values; its panics are turned into the same.
fn guarded<T>(what: &str, run: impl FnOnce() -> fjall::Result<T>) -> Result<T, EngineError> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(fjall::Error::Locked)) => Err(EngineError(BUSY.to_owned())),
        Ok(Err(fjall::Error::Poisoned)) => Err(EngineError(format!(
            "fjall could not {what}: an earlier write or sync failed, and it takes nothing until a restart"
        ))),
        Ok(Err(error)) => Err(EngineError(format!("fjall could not {what}: {error}"))),
        Err(_) => Err(EngineError(format!("fjall panicked when asked to {what}"))),
    }
}

pub(in crate::store) struct FjallEngine {
    // Before the database: the last handle of that one ends its threads.
    entries: Keyspace,
    db: Database,
    dir: PathBuf,
}

impl FjallEngine {
    /// Opens or makes the files below `dir`.
    pub(in crate::store) fn open(
        dir: &Path,
        memory_bytes: u64,
    ) -> Result<FjallEngine, EngineError> {
        let (db, entries) = guarded("open its files", || {
            let db = Database::builder(dir)
                .cache_size(memory_bytes / CACHE_PART)
                .max_cached_files(Some(OPEN_FILES))
                .max_journaling_size(JOURNAL_BYTES)
                .worker_threads(WORKERS)
                .manual_journal_persist(true)
                .open()?;
            let entries = db.keyspace(KEYSPACE, || {
                KeyspaceCreateOptions::default().max_memtable_size(
                    (memory_bytes / MEMTABLE_PART).clamp(MEMTABLE_BYTES.0, MEMTABLE_BYTES.1),
                )
            })?;
            Ok((db, entries))
        })?;
        Ok(FjallEngine {
            entries,
            db,
            dir: dir.to_owned(),
        })
    }

    /// Whether an error of [`FjallEngine::open`] says that the files are open elsewhere.
    pub(in crate::store) fn is_busy(error: &EngineError) -> bool {
        error.0 == BUSY
    }

    /// Waits until a commit will not wait inside fjall.
    fn wait_for_writers(&self) -> Result<(), EngineError> {
        let mut waited = Duration::ZERO;
        while guarded("look at its tables", || {
            let tree = &self.entries.tree;
            Ok(tree.sealed_memtable_count() > SEALED_MAX || tree.l0_run_count() > RUNS_MAX)
        })? {
            // Says so if a thread of fjall's has given up.
            self.flush()?;
            if waited >= WAIT_MAX {
                return Err(EngineError(
                    "fjall does not get its tables written".to_owned(),
                ));
            }
            std::thread::sleep(WAIT_STEP);
            waited += WAIT_STEP;
        }
        Ok(())
    }
}

impl Engine for FjallEngine {
    fn name(&self) -> &'static str {
        "fjall"
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let value = guarded("read", || self.entries.get(key))?;
        Ok(value.map(Bytes::from))
    }

    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        let (mut low, mut high) = (
            Bytes::copy_from_slice(range.start),
            Bytes::copy_from_slice(range.end),
        );
        while low < high {
            let mut entries = guarded("walk over a range", || {
                Ok(self.entries.range(&low[..]..&high[..]))
            })?;
            let (mut seen, mut bytes) = (0, 0);
            loop {
                let entry = guarded("walk over a range", || {
                    match direction {
                        Direction::Up => entries.next(),
                        Direction::Down => entries.next_back(),
                    }
                    .map(fjall::Guard::into_inner)
                    .transpose()
                })?;
                let Some((key, value)) = entry else {
                    return Ok(());
                };
                if let ControlFlow::Break(()) = visit(&key, &value) {
                    return Ok(());
                }
                seen += 1;
                bytes += key.len() + value.len();
                if seen < PAGE_ENTRIES && bytes < PAGE_BYTES {
                    continue;
                }
                match direction {
                    Direction::Up => {
                        // The smallest key behind it.
                        let mut next = Vec::with_capacity(key.len() + 1);
                        next.extend_from_slice(&key);
                        next.push(0);
                        low = next.into();
                    }
                    Direction::Down => high = Bytes::copy_from_slice(&key),
                }
                break;
            }
        }
        Ok(())
    }

    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        debug_assert!(batch.len() <= BATCH_OPERATIONS);
        self.wait_for_writers()?;
        guarded("apply a batch", || {
            let mut writes = self.db.batch();
            for write in batch {
                // Copies of their own: slices would keep the whole frames that they were cut from, and fjall keeps
                // what it is given until the memtable is written.
                match &write.value {
                    Some(value) => writes.insert(&self.entries, &*write.key, &**value),
                    None => writes.remove(&self.entries, &*write.key),
                }
            }
            if let Some(position) = position {
                let mut value = Vec::new();
                crate::store::record::put_number(keys::POSITION, &mut value, position);
                writes.insert(&self.entries, keys::POSITION, value);
            }
            writes.commit()
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
        // What the files take, not how long they are: a journal is made 64 MiB long before anything is in it.
        disk_bytes(&self.dir)
    }

    fn flush(&self) -> Result<(), EngineError> {
        guarded("flush", || self.db.persist(PersistMode::Buffer))
    }

    fn close(&self) -> Result<(), EngineError> {
        guarded("sync its files", || self.db.persist(PersistMode::SyncAll))
    }
}
