//! Frames that are safe but that the engine does not have yet, laid over it so that nobody sees the lag.
//!
//! They lie in layers: the newest frames in an open one, older ones in closed ones, each of which goes into the engine as a whole and
//! then away as a whole. A layer is closed when it holds as much as the engine takes in one go, or when the applier has nothing
//! older to take. A read takes a [`View`]: the layers, locked for reading, and the engine beneath. A key is answered by the
//! newest layer that has it, or else by the engine.
//!
//! # Why a view is one consistent moment
//!
//! - The committer publishes a frame whole, under the lock for writing, after its sync and before anybody is told. So a view
//!   holds every frame that anybody was told of, and no part of a frame.
//! - The applier changes the engine without a lock. It takes a layer away only after the engine has all of it, under
//!   the lock for writing. So while a view exists, every key that the applier may be changing in the engine
//!   is still in that layer, and the engine's old or new value is never looked at.
//! - Layers go in the order of their frames, so what a newer one says of a key stands above what went.
//! - The rules ([`Write::Collect`] and its sisters) are not shown. Until the applier judges them, what
//!   they will delete is still seen: a body that no row names, an outcome that is about to be forgotten. When it judges
//!   them it changes keys of the engine that may not be in any layer. That shows in a view as well, but
//!   only in what no row of that view needs: a shared body is collected when no notification of the ping waits, and a
//!   row that is in the view and shares a body was put there by a frame that also carries the body. Either
//!   that frame is applied, and its notification counts as waiting, or it is in a layer with its body.
//!
//! # Who waits for whom
//!
//! The lock is held by a reader for one bounded read, by the committer for one frame, by the applier for a moment. No view is kept
//! while anything waits, and no thread takes two at once, because a lock for reading that waits behind a writer that waits
//! behind its own would never end. Within it the lock of the applier's queue is taken, and never the other way round: so
//! a frame is in both or in neither when the applier takes a layer and the frames of it.

use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use bytes::Bytes;

use super::engine::{Direction, Engine, EngineError, Visit};
use super::keys::Key;
use super::layer::{Layer, Walk};
use super::write::Write;

#[derive(Default)]
struct Layers {
    /// What comes now.
    open: Layer,
    /// The oldest first. The first one may be in the applier's hands.
    closed: VecDeque<Arc<Layer>>,
}

impl Layers {
    fn close(&mut self) {
        self.closed
            .push_back(Arc::new(std::mem::take(&mut self.open)));
    }

    /// The newest first.
    fn newest_first(&self) -> impl Iterator<Item = &Layer> {
        let closed = self.closed.iter().rev().map(|layer| &**layer);
        std::iter::once(&self.open).chain(closed)
    }
}

/// The frames not yet applied.
#[derive(Default)]
pub(super) struct Overlay {
    layers: RwLock<Layers>,
}

/// A frame is shown as long as this lives, and nobody reads or takes it yet.
#[must_use = "the applier may take the frame once this is dropped, and must find it in its queue then"]
pub(super) struct Showing<'a> {
    _layers: RwLockWriteGuard<'a, Layers>,
}

impl Overlay {
    /// Nothing yet.
    pub(super) fn new() -> Overlay {
        Overlay::default()
    }

    fn write(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a frame that has just become safe, to everybody at once when the answer is dropped. `bytes`: its size in the log; `most`: what
    /// a layer may have, unless its first frame alone has more.
    pub(super) fn publish(
        &self,
        frame: u64,
        bytes: usize,
        writes: Vec<Write>,
        most: usize,
    ) -> Showing<'_> {
        let mut layers = self.write();
        if !layers.open.is_empty() && layers.open.bytes() + bytes > most {
            layers.close();
        }
        layers.open.add(frame, bytes, writes.into_iter());
        Showing { _layers: layers }
    }

    /// The oldest layer, which nothing is added to any more, and what `with` makes of it meanwhile. It goes on being shown. `None`:
    /// there is none.
    pub(super) fn take<T>(&self, with: impl FnOnce(&Layer) -> T) -> Option<(Arc<Layer>, T)> {
        let mut layers = self.write();
        if layers.closed.is_empty() && !layers.open.is_empty() {
            layers.close();
        }
        let layer = Arc::clone(layers.closed.front()?);
        let made = with(&layer);
        Some((layer, made))
    }

    /// Takes the oldest layer away: the engine has it.
    pub(super) fn remove(&self, layer: &Arc<Layer>) {
        let mut layers = self.write();
        let oldest = layers
            .closed
            .pop_front_if(|oldest| Arc::ptr_eq(oldest, layer));
        debug_assert!(oldest.is_some(), "layers go in their order");
    }

    /// One consistent look.
    pub(super) fn view<'a>(&'a self, engine: &'a dyn Engine) -> View<'a> {
        View {
            layers: self.layers.read().unwrap_or_else(PoisonError::into_inner),
            engine,
        }
    }
}

/// One consistent look at everything that is safe.
pub(super) struct View<'a> {
    layers: RwLockReadGuard<'a, Layers>,
    engine: &'a dyn Engine,
}

impl View<'_> {
    /// The value of a key.
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        match self.layers.newest_first().find_map(|layer| layer.get(key)) {
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
        let ranges = self.layers.newest_first();
        let ranges = ranges.map(|layer| layer.range(from, to));
        let mut above = Walk::over(ranges, direction);
        let mut next = above.next();
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
                    next = above.next();
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
            next = above.next();
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

    /// A frame that lies in one layer with the one before it.
    fn publish(overlay: &Overlay, frame: u64, writes: Vec<Write>) {
        drop(overlay.publish(frame, 10, writes, 100));
    }

    /// A frame in a layer of its own.
    fn publish_apart(overlay: &Overlay, frame: u64, writes: Vec<Write>) {
        drop(overlay.publish(frame, 10, writes, 1));
    }

    fn taken(overlay: &Overlay) -> Arc<Layer> {
        overlay.take(|_| {}).unwrap().0
    }

    #[test]
    fn a_walk_merges_what_the_engine_has_and_what_it_lacks() {
        let engine = engine(&[("b", "1"), ("d", "1"), ("f", "1"), ("h", "1")]);
        let frame = || {
            vec![
                put("a", "2"),
                put("d", "2"),
                delete("f"),
                put("g", "2"),
                put("k", "2"),
                delete("m"),
            ]
        };
        // The same in one layer, and in a layer for each write.
        let (one, many) = (Overlay::new(), Overlay::new());
        publish(&one, 5, frame());
        for (write, number) in frame().into_iter().zip(5..) {
            publish_apart(&many, number, vec![write]);
        }
        for overlay in [one, many] {
            let view = overlay.view(&engine);
            assert_eq!(all(&view, Direction::Up, 99), "a=2 b=1 d=2 g=2 h=1 k=2");
            assert_eq!(all(&view, Direction::Down, 99), "k=2 h=1 g=2 d=2 b=1 a=2");
            assert_eq!(all(&view, Direction::Up, 3), "a=2 b=1 d=2");
            assert_eq!(all(&view, Direction::Down, 1), "k=2");
            assert_eq!(view.get(b"d").unwrap(), Some(bytes("2")));
            assert_eq!(view.get(b"f").unwrap(), None);
            assert_eq!(view.get(b"b").unwrap(), Some(bytes("1")));
        }
    }

    #[test]
    fn of_several_layers_the_newest_speaks() {
        let engine = engine(&[("a", "1"), ("b", "1"), ("c", "1"), ("d", "1")]);
        let overlay = Overlay::new();
        publish_apart(&overlay, 1, vec![put("a", "2"), delete("b"), put("e", "2")]);
        publish_apart(&overlay, 2, vec![delete("a"), put("b", "3"), put("c", "3")]);
        publish_apart(&overlay, 3, vec![put("a", "4"), delete("e"), put("f", "4")]);
        let view = overlay.view(&engine);
        assert_eq!(all(&view, Direction::Up, 99), "a=4 b=3 c=3 d=1 f=4");
        assert_eq!(all(&view, Direction::Down, 99), "f=4 d=1 c=3 b=3 a=4");
        assert_eq!(view.get(b"a").unwrap(), Some(bytes("4")));
        assert_eq!(view.get(b"e").unwrap(), None);
        drop(view);
        // The engine "has" the oldest one now; here it has nothing of it, which shows that nobody looks at the layer any more.
        let oldest = taken(&overlay);
        assert_eq!(oldest.last(), 1);
        overlay.remove(&oldest);
        let view = overlay.view(&engine);
        assert_eq!(all(&view, Direction::Up, 99), "a=4 b=3 c=3 d=1 f=4");
        assert_eq!(view.get(b"e").unwrap(), None);
    }

    #[test]
    fn a_key_that_a_later_frame_wrote_again_stays() {
        let engine = engine(&[]);
        let overlay = Overlay::new();
        publish(&overlay, 1, vec![put("a", "1"), put("b", "1")]);
        let first = taken(&overlay);
        // It goes on being shown, and what comes now is not added to it.
        publish(&overlay, 2, vec![put("a", "2")]);
        assert_eq!(all(&overlay.view(&engine), Direction::Up, 99), "a=2 b=1");
        assert_eq!((first.last(), first.bytes()), (1, 10));
        assert_eq!(taken(&overlay).last(), 1, "until it is taken away");
        overlay.remove(&first);
        assert_eq!(all(&overlay.view(&engine), Direction::Up, 99), "a=2");
        overlay.remove(&taken(&overlay));
        assert!(overlay.take(|_| {}).is_none());
        assert_eq!(all(&overlay.view(&engine), Direction::Up, 99), "");
    }

    #[test]
    fn a_layer_takes_frames_up_to_its_bound_and_one_that_is_larger_alone() {
        let overlay = Overlay::new();
        for (frame, bytes) in [(1, 60), (2, 40), (3, 1), (4, 500), (5, 7)] {
            drop(overlay.publish(frame, bytes, vec![put("a", "1")], 100));
        }
        let mut layers = Vec::new();
        while let Some((layer, ())) = overlay.take(|_| {}) {
            layers.push((layer.last(), layer.bytes()));
            overlay.remove(&layer);
        }
        assert_eq!(layers, [(2, 100), (3, 1), (4, 500), (5, 7)]);
    }
}
