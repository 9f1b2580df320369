//! Frames that are safe but that the engine does not have yet, laid over it so that nobody sees the lag.
//!
//! A read takes a [`View`]: the overlay, locked for reading, and the engine beneath. A key in the overlay is answered from
//! there, any other from the engine.
//!
//! # Why a view is one consistent moment
//!
//! - The committer publishes a frame whole, under the lock for writing, after its sync and before anybody is told. So a view
//!   holds every frame that anybody was told of, and no part of a frame.
//! - The applier changes the engine without a lock. It takes keys out of the overlay only after the engine has them, under
//!   the lock for writing. So while a view exists, every key that the applier may be changing in the engine
//!   is still in the overlay, and the engine's old or new value is never looked at.
//! - A key comes out only if no later frame has put it there again: each entry knows its frame.
//! - The rules ([`Write::Collect`] and its sisters) are not in the overlay. Until the applier judges them, what
//!   they will delete is still seen: a body that no row names, an outcome that is about to be forgotten. When it judges
//!   them it changes keys of the engine that may not be in the overlay. That shows in a view as well, but
//!   only in what no row of that view needs: a shared body is collected when no notification of the ping waits, and a
//!   row that is in the view and shares a body was put there by a frame that also carries the body. Either
//!   that frame is applied, and its notification counts as waiting, or it is in the overlay with its body.
//!
//! The lock is held by a reader for one bounded read and by a writer for one frame. No view is kept while anything waits, and no
//! thread takes two at once, because a lock for reading that waits behind a writer that waits behind its own would
//! never end.

use std::collections::BTreeMap;
use std::ops::{Bound, ControlFlow};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::engine::{Direction, Engine, EngineError, Visit};
use super::keys::Key;
use super::write::Write;

/// What the newest frame with a key says of it.
struct Entry {
    /// `None`: deleted.
    value: Option<Bytes>,
    frame: u64,
}

/// The frames not yet applied.
#[derive(Default)]
pub(super) struct Overlay {
    entries: RwLock<BTreeMap<Bytes, Entry>>,
}

/// Keys taken out in one go; readers get in between.
const PAGE: usize = 1024;

impl Overlay {
    pub(super) fn new() -> Overlay {
        Overlay::default()
    }

    fn write(&self) -> RwLockWriteGuard<'_, BTreeMap<Bytes, Entry>> {
        self.entries.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a frame that has just become safe.
    pub(super) fn publish(&self, frame: u64, writes: &[Write]) {
        let mut entries = self.write();
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    entries.insert(
                        key.clone(),
                        Entry {
                            value: Some(value.clone()),
                            frame,
                        },
                    );
                }
                Write::Delete { key } => {
                    entries.insert(key.clone(), Entry { value: None, frame });
                }
                Write::Collect { .. } | Write::DropReceipt { .. } | Write::Settle { .. } => {}
            }
        }
    }

    /// Takes out what the engine has: the keys of `writes` unless a frame after `frame` wrote them again.
    pub(super) fn remove(&self, frame: u64, writes: &[Write]) {
        for page in writes.chunks(PAGE) {
            let mut entries = self.write();
            for write in page {
                if let Write::Put { key, .. } | Write::Delete { key } = write
                    && entries.get(key).is_some_and(|entry| entry.frame <= frame)
                {
                    entries.remove(key);
                }
            }
        }
    }

    /// One consistent look.
    pub(super) fn view<'a>(&'a self, engine: &'a dyn Engine) -> View<'a> {
        View {
            entries: self.entries.read().unwrap_or_else(PoisonError::into_inner),
            engine,
        }
    }
}

/// One consistent look at everything that is safe.
pub(super) struct View<'a> {
    entries: RwLockReadGuard<'a, BTreeMap<Bytes, Entry>>,
    engine: &'a dyn Engine,
}

impl View<'_> {
    /// The value of a key.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        match self.entries.get(key) {
            Some(entry) => Ok(entry.value.clone()),
            None => self.engine.get(key),
        }
    }

    /// Walks over every key from `from` to before `to`.
    pub(super) fn scan(
        &self,
        from: &Key,
        to: &Key,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        if **from >= **to {
            return Ok(());
        }
        let range = (Bound::Included(&**from), Bound::Excluded(&**to));
        let mut above = self.entries.range::<[u8], _>(range);
        let mut step = || match direction {
            Direction::Up => above.next(),
            Direction::Down => above.next_back(),
        };
        let mut next = step();
        let mut stopped = false;
        self.engine
            .scan(&**from..&**to, direction, &mut |key, value| {
                while let Some((over, entry)) = next {
                    let ahead = match direction {
                        Direction::Up => **over < *key,
                        Direction::Down => **over > *key,
                    };
                    if !ahead && **over != *key {
                        break;
                    }
                    next = step();
                    if let Some(value) = &entry.value
                        && visit(over, value).is_break()
                    {
                        stopped = true;
                        return ControlFlow::Break(());
                    }
                    if !ahead {
                        // The overlay has spoken for this key.
                        return ControlFlow::Continue(());
                    }
                }
                let flow = visit(key, value);
                stopped = flow.is_break();
                flow
            })?;
        while let (false, Some((key, entry))) = (stopped, next) {
            if let Some(value) = &entry.value {
                stopped = visit(key, value).is_break();
            }
            next = step();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::engine::EngineWrite;
    use super::super::engine::memory::MemoryEngine;
    use super::*;

    fn bytes(text: &str) -> Bytes {
        Bytes::copy_from_slice(text.as_bytes())
    }

    fn put(key: &str, value: &str) -> Write {
        Write::Put {
            key: bytes(key),
            value: bytes(value),
        }
    }

    fn delete(key: &str) -> Write {
        Write::Delete { key: bytes(key) }
    }

    fn engine(entries: &[(&str, &str)]) -> MemoryEngine {
        let engine = MemoryEngine::new();
        let batch: Vec<EngineWrite> = entries
            .iter()
            .map(|(key, value)| EngineWrite {
                key: bytes(key),
                value: Some(bytes(value)),
            })
            .collect();
        engine.apply(&batch, None).unwrap();
        engine
    }

    fn all(view: &View<'_>, direction: Direction, most: usize) -> String {
        let mut seen = Vec::new();
        let (from, to) = (Key::from_slice(b"a"), Key::from_slice(b"z"));
        view.scan(&from, &to, direction, &mut |key, value| {
            seen.push(format!(
                "{}={}",
                String::from_utf8_lossy(key),
                String::from_utf8_lossy(value)
            ));
            if seen.len() == most {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
        seen.join(" ")
    }

    #[test]
    fn a_walk_merges_what_the_engine_has_and_what_it_lacks() {
        let engine = engine(&[("b", "1"), ("d", "1"), ("f", "1"), ("h", "1")]);
        let overlay = Overlay::new();
        overlay.publish(
            5,
            &[
                put("a", "2"),
                put("d", "2"),
                delete("f"),
                put("g", "2"),
                put("k", "2"),
                delete("m"),
            ],
        );
        let view = overlay.view(&engine);
        assert_eq!(all(&view, Direction::Up, 99), "a=2 b=1 d=2 g=2 h=1 k=2");
        assert_eq!(all(&view, Direction::Down, 99), "k=2 h=1 g=2 d=2 b=1 a=2");
        assert_eq!(all(&view, Direction::Up, 3), "a=2 b=1 d=2");
        assert_eq!(all(&view, Direction::Down, 1), "k=2");
        assert_eq!(view.get(b"d").unwrap(), Some(bytes("2")));
        assert_eq!(view.get(b"f").unwrap(), None);
        assert_eq!(view.get(b"b").unwrap(), Some(bytes("1")));
    }

    #[test]
    fn a_key_that_a_later_frame_wrote_again_stays() {
        let engine = engine(&[]);
        let overlay = Overlay::new();
        let first = [put("a", "1"), put("b", "1")];
        overlay.publish(1, &first);
        overlay.publish(2, &[put("a", "2")]);
        overlay.remove(1, &first);
        let view = overlay.view(&engine);
        assert_eq!(all(&view, Direction::Up, 99), "a=2");
    }
}
