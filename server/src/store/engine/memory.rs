//! The engine for tests and for servers that may begin each start with a replay: everything in memory.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow, Range};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::{Direction, Engine, EngineError, EngineWrite, Visit};

#[derive(Default)]
pub(in crate::store) struct MemoryEngine {
    inner: RwLock<Inner>,
}

#[derive(Default)]
struct Inner {
    map: BTreeMap<Bytes, Bytes>,
    position: Option<u64>,
    bytes: u64,
}

/// Entries that a walk takes at a time, so that it does not keep writers out.
const PAGE: usize = 256;

impl MemoryEngine {
    pub(in crate::store) fn new() -> MemoryEngine {
        MemoryEngine::default()
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn remove(&mut self, key: &[u8]) {
        if let Some((key, value)) = self.map.remove_entry(key) {
            self.bytes -= (key.len() + value.len()) as u64;
        }
    }
}

impl Engine for MemoryEngine {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        Ok(self.read().map.get(key).cloned())
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
        let mut low = Bound::Included(Bytes::copy_from_slice(range.start));
        let mut high = Bound::Excluded(Bytes::copy_from_slice(range.end));
        loop {
            let page: Vec<(Bytes, Bytes)> = {
                let inner = self.read();
                let entries = inner
                    .map
                    .range((low.clone(), high.clone()))
                    .map(|(key, value)| (key.clone(), value.clone()));
                match direction {
                    Direction::Up => entries.take(PAGE).collect(),
                    Direction::Down => entries.rev().take(PAGE).collect(),
                }
            };
            for (key, value) in &page {
                if let ControlFlow::Break(()) = visit(key, value) {
                    return Ok(());
                }
            }
            match page.last() {
                Some((last, _)) if page.len() == PAGE => match direction {
                    Direction::Up => low = Bound::Excluded(last.clone()),
                    Direction::Down => high = Bound::Excluded(last.clone()),
                },
                _ => return Ok(()),
            }
            if let (Bound::Excluded(low), Bound::Excluded(high)) = (&low, &high)
                && low >= high
            {
                return Ok(());
            }
        }
    }

    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        let mut inner = self.write();
        for write in batch {
            inner.remove(&write.key);
            if let Some(value) = &write.value {
                // Copies of their own: slices would keep the whole frames that they were cut from.
                let key = Bytes::copy_from_slice(&write.key);
                let value = Bytes::copy_from_slice(value);
                inner.bytes += (key.len() + value.len()) as u64;
                inner.map.insert(key, value);
            }
        }
        if position.is_some() {
            inner.position = position;
        }
        Ok(())
    }

    fn position(&self) -> Result<Option<u64>, EngineError> {
        Ok(self.read().position)
    }

    fn size_bytes(&self) -> u64 {
        self.read().bytes
    }

    fn flush(&self) -> Result<(), EngineError> {
        Ok(())
    }

    fn close(&self) -> Result<(), EngineError> {
        Ok(())
    }
}
