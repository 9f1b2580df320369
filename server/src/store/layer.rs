//! What consecutive frames come to: of several writes of one key the last one, and the rules.
//!
//! A layer is gathered once and used twice. While it grows, and while the engine takes it, readers see it (`overlay.rs`); what the
//! engine takes is the layer itself (`apply.rs`), in the order of its keys. So a key is looked up once on its way from a
//! frame into the engine, whatever else happens to it (`docs/decisions/0050`).

use std::collections::BTreeMap;
use std::collections::btree_map::{Entry as Place, Range};
use std::ops::Bound;

use bytes::Bytes;

use super::engine::Direction;
use super::keys;
use super::write::Write;

/// What the newest frame of a layer with a key says of it.
#[derive(Debug)]
pub(super) struct Entry {
    /// `None`: deleted.
    pub(super) value: Option<Bytes>,
    /// Whether the oldest frame of the layer with this key put it.
    put_first: bool,
}

/// What consecutive frames come to.
#[derive(Debug, Default)]
pub(super) struct Layer {
    entries: BTreeMap<Bytes, Entry>,
    rules: Vec<Write>,
    bytes: usize,
    last: u64,
}

impl Layer {
    /// Adds a frame: all of its writes, its size in the log, and its number.
    pub(super) fn add(&mut self, frame: u64, bytes: usize, writes: impl Iterator<Item = Write>) {
        for write in writes {
            self.write(write);
        }
        self.bytes += bytes;
        self.last = frame;
    }

    /// Adds a write.
    pub(super) fn write(&mut self, write: Write) {
        let (key, value) = match write {
            Write::Put { key, value } => (key, Some(value)),
            Write::Delete { key } => (key, None),
            rule @ (Write::Collect { .. } | Write::DropReceipt { .. } | Write::Settle { .. }) => {
                self.rules.push(rule);
                return;
            }
        };
        match self.entries.entry(key) {
            Place::Occupied(mut place) => place.get_mut().value = value,
            Place::Vacant(place) => {
                let put_first = value.is_some();
                place.insert(Entry { value, put_first });
            }
        }
    }

    /// Whether no frame was added.
    pub(super) fn is_empty(&self) -> bool {
        self.bytes == 0
    }

    /// Size of its frames in the log.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The number of its newest frame.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// What it says of a key; `None`: nothing.
    pub(super) fn get(&self, key: &[u8]) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// The keys from `from` to before `to`; `from` must not be greater.
    pub(super) fn range(&self, from: &[u8], to: &[u8]) -> Range<'_, Bytes, Entry> {
        let range = (Bound::Included(from), Bound::Excluded(to));
        self.entries.range::<[u8], _>(range)
    }

    /// Every key, in order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&Bytes, &Entry)> {
        self.entries.iter()
    }

    /// The rules, in the order of their frames.
    pub(super) fn rules(&self) -> &[Write] {
        &self.rules
    }
}

impl Entry {
    /// Whether the key came and went within the layer and is never written again: an engine that has no frame of the layer yet need
    /// not hear of it.
    pub(super) fn came_and_went(&self, key: &[u8]) -> bool {
        self.put_first && self.value.is_none() && keys::is_written_once(key)
    }
}

/// A walk over several layers at once: each key once, with what the newest layer says of it.
pub(super) struct Walk<'a> {
    direction: Direction,
    /// The newest first.
    heads: Vec<Head<'a>>,
}

struct Head<'a> {
    next: (&'a Bytes, &'a Entry),
    rest: Range<'a, Bytes, Entry>,
}

impl<'a> Walk<'a> {
    /// A walk over ranges of layers, the newest first.
    pub(super) fn over(
        ranges: impl Iterator<Item = Range<'a, Bytes, Entry>>,
        direction: Direction,
    ) -> Walk<'a> {
        let heads = ranges
            .filter_map(|mut rest| {
                let next = step(&mut rest, direction)?;
                Some(Head { next, rest })
            })
            .collect();
        Walk { direction, heads }
    }
}

impl<'a> Iterator for Walk<'a> {
    type Item = (&'a Bytes, &'a Entry);

    fn next(&mut self) -> Option<Self::Item> {
        let direction = self.direction;
        // Of equal keys the newest stays, because it is met first.
        let found = self
            .heads
            .iter()
            .map(|head| head.next)
            .reduce(|best, next| {
                let ahead = match direction {
                    Direction::Up => next.0 < best.0,
                    Direction::Down => next.0 > best.0,
                };
                if ahead { next } else { best }
            })?;
        self.heads.retain_mut(|head| {
            if head.next.0 != found.0 {
                return true;
            }
            match step(&mut head.rest, direction) {
                Some(next) => {
                    head.next = next;
                    true
                }
                None => false,
            }
        });
        Some(found)
    }
}

fn step<'a>(
    range: &mut Range<'a, Bytes, Entry>,
    direction: Direction,
) -> Option<(&'a Bytes, &'a Entry)> {
    match direction {
        Direction::Up => range.next(),
        Direction::Down => range.next_back(),
    }
}
