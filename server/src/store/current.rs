//! The engine that counts, and how another takes its place while everybody goes on using it.
//!
//! [`Current`] is an engine itself: whoever reads or writes through it uses the engine that counts at that moment, and a walk
//! keeps the one it began with.
//!
//! # How another takes its place
//!
//! A fresh, empty engine is attached. From then on each batch goes into both, and a [`Fill`] copies what the old one holds,
//! page by page, in the order of the keys. A batch and a page never overlap. So after each of them this holds: below the
//! place that the copy has reached, the fresh engine has exactly what the old one has; beyond it, what the fresh engine
//! has at all is what the old one has, because it came with a batch. When the copy has reached the end, the two
//! are equal, and stay so.
//!
//! The fresh engine is told its position last, in the same pause in which it takes the place of the other. Until then it
//! says of itself that it stands nowhere, and nobody would believe it.
//!
//! # Why readers do not notice
//!
//! A view (`overlay.rs`) may ask the old engine for one key and the fresh one for the next. At the moment of the change
//! they are equal; afterwards the applier changes the fresh one only in keys that every view finds in the overlay. A walk
//! that began over the old engine goes on over one that nobody changes any more, which is what it saw anyway. A
//! snapshot that is being taken stays one for the frame that it noted: the old engine had all frames before it.

use std::ops::{ControlFlow, Range};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use bytes::Bytes;

use super::engine::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite, Visit};
use super::keys;

/// Most bytes of keys and values in a page, unless one entry alone is larger. While a page is copied the applier waits.
const PAGE_BYTES: usize = 1 << 20;

/// Most entries in a page. Few in tests, so that much can happen between two pages.
const PAGE_ENTRIES: usize = if cfg!(test) { 12 } else { BATCH_OPERATIONS };

/// The engine that counts.
pub(super) struct Current {
    engine: RwLock<Arc<dyn Engine>>,
    /// The engine that is being filled. Held while a batch is applied or a page is copied.
    fresh: Mutex<Option<Arc<dyn Engine>>>,
}

impl Current {
    pub(super) fn new(engine: Arc<dyn Engine>) -> Current {
        Current {
            engine: RwLock::new(engine),
            fresh: Mutex::new(None),
        }
    }

    fn engine(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.engine.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn fresh(&self) -> MutexGuard<'_, Option<Arc<dyn Engine>>> {
        self.fresh.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Attaches an empty engine, to be filled. Only one at a time; a second one takes the first one's place.
    pub(super) fn fill(&self, fresh: Arc<dyn Engine>) -> Fill<'_> {
        *self.fresh() = Some(Arc::clone(&fresh));
        Fill {
            current: self,
            fresh,
            next: Vec::new(),
            copied: Copied::default(),
        }
    }
}

/// What a [`Fill`] has copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Copied {
    pub(super) entries: u64,
    /// Bytes of keys and values.
    pub(super) bytes: u64,
}

/// An engine that is being filled. Detached when this is dropped before [`Fill::take_place`].
pub(super) struct Fill<'a> {
    current: &'a Current,
    fresh: Arc<dyn Engine>,
    /// The first key that is not copied yet.
    next: Vec<u8>,
    copied: Copied,
}

impl Fill<'_> {
    /// Fails if the fresh engine could not take a batch: then it was detached and is of no use.
    fn attached(&self, fresh: &MutexGuard<'_, Option<Arc<dyn Engine>>>) -> Result<(), EngineError> {
        if fresh
            .as_ref()
            .is_some_and(|fresh| Arc::ptr_eq(fresh, &self.fresh))
        {
            Ok(())
        } else {
            Err(EngineError(
                "the engine being filled could not take what was written meanwhile".to_owned(),
            ))
        }
    }

    /// Copies a page. `false`: that was all.
    pub(super) fn step(&mut self) -> Result<bool, EngineError> {
        let fresh = self.current.fresh();
        self.attached(&fresh)?;
        let mut page: Vec<EngineWrite> = Vec::new();
        let mut bytes = 0;
        let mut more = false;
        self.current
            .engine()
            .scan(&self.next..&[u8::MAX], Direction::Up, &mut |key, value| {
                if key == keys::POSITION {
                    return ControlFlow::Continue(());
                }
                let size = key.len() + value.len();
                if page.len() == PAGE_ENTRIES || (bytes + size > PAGE_BYTES && bytes > 0) {
                    more = true;
                    return ControlFlow::Break(());
                }
                bytes += size;
                page.push(EngineWrite {
                    key: Bytes::copy_from_slice(key),
                    value: Some(Bytes::copy_from_slice(value)),
                });
                ControlFlow::Continue(())
            })?;
        self.fresh.apply(&page, None)?;
        if let Some(last) = page.last() {
            self.next.clear();
            self.next.extend_from_slice(&last.key);
            // The smallest key behind it.
            self.next.push(0);
        }
        self.copied.entries += page.len() as u64;
        self.copied.bytes += bytes as u64;
        Ok(more)
    }

    pub(super) fn copied(&self) -> Copied {
        self.copied
    }

    /// Hands what was copied to the disk, so that the pause of [`Fill::take_place`] is short.
    pub(super) fn settle(&self) -> Result<(), EngineError> {
        self.fresh.close()
    }

    /// Gives the filled engine the place of the one that counts, and answers that one. `name` makes it count after a crash
    /// as well; if that fails, nothing has changed here.
    pub(super) fn take_place(
        self,
        name: impl FnOnce() -> Result<(), EngineError>,
    ) -> Result<Arc<dyn Engine>, EngineError> {
        let mut fresh = self.current.fresh();
        self.attached(&fresh)?;
        self.fresh.apply(&[], self.current.engine().position()?)?;
        name()?;
        let mut engine = self
            .current
            .engine
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *engine, Arc::clone(&self.fresh));
        *fresh = None;
        // Before this is dropped, which looks at it.
        drop((engine, fresh));
        Ok(before)
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        let mut fresh = self.current.fresh();
        if self.attached(&fresh).is_ok() {
            *fresh = None;
        }
    }
}

impl Engine for Current {
    fn name(&self) -> &'static str {
        self.engine().name()
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.engine().get(key)
    }

    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        self.engine().scan(range, direction, visit)
    }

    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        let mut fresh = self.fresh();
        self.engine().apply(batch, position)?;
        if let Some(filling) = &*fresh
            && let Err(error) = filling.apply(batch, None)
        {
            // The one that counts has it. The other is given up.
            tracing::warn!(%error, "an engine that was being built could not take a batch");
            *fresh = None;
        }
        Ok(())
    }

    fn position(&self) -> Result<Option<u64>, EngineError> {
        self.engine().position()
    }

    fn size_bytes(&self) -> u64 {
        self.engine().size_bytes()
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.engine().flush()
    }

    fn close(&self) -> Result<(), EngineError> {
        self.engine().close()
    }
}
