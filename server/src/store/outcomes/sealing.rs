//! Segments: how one begins, is sealed, gets its index, and is mended.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::{DIR, History, PARTS_BY_AGE, RETRY_AFTER, Writing, format, segment};
use crate::store::outcomes::format::{Summary, index_name, segment_name};
use crate::store::outcomes::segment::{Bare, Kind, Segment};

impl History {
    /// Begins a segment. Its name is safe when this returns, so that its number is never used again.
    pub(super) fn begin(&self, writing: &mut Writing) -> io::Result<Arc<Segment>> {
        let number = writing
            .next
            .ok_or_else(|| io::Error::other("there are no more numbers for segments"))?;
        let name = segment_name(number);
        let made_ms = self.clock.now().unix_ms;
        let file = self.disk.create(&name)?;
        // Even if what follows fails, the file is there.
        writing.next = number.checked_add(1);
        let begun = file
            .write_at(&format::header(self.store, number, made_ms), 0)
            .and_then(|()| file.sync())
            .and_then(|()| self.disk.sync_dir(DIR));
        if let Err(error) = begun {
            // Nothing is in it; if it cannot be removed, the next start finds it empty.
            drop(self.disk.remove(&name));
            // This run does not use the number again, but one that starts may: the end stays before it.
            return Err(error);
        }
        let segment = Arc::new(Segment::open(self.store, number, file, made_ms));
        self.insert(Arc::clone(&segment));
        // Only now: who follows must not be sent past it.
        self.next_number
            .store(number.saturating_add(1), Ordering::Release);
        writing.open = Some(Arc::clone(&segment));
        Ok(segment)
    }

    pub(super) fn insert(&self, segment: Arc<Segment>) {
        self.segments
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(segment.number, segment);
    }

    /// Whether the open segment has been open for so long that dropping it whole would be late.
    pub(super) fn is_long_open(&self, writing: &Writing) -> bool {
        let Some(Kind::Open(open)) = writing.open.as_deref().map(|segment| &segment.kind) else {
            return false;
        };
        let open_for = self.clock.now().unix_ms.saturating_sub(open.made_ms);
        open_for >= self.rules.keep_ms / PARTS_BY_AGE
    }

    pub(super) fn seal_open(&self, writing: &mut Writing) {
        let Some(segment) = writing.open.take() else {
            return;
        };
        let Kind::Open(open) = &segment.kind else {
            return;
        };
        if let Err(error) = open.file.sync() {
            tracing::error!(
                %error,
                file = segment_name(segment.number),
                "a file of outcomes could not be synced; some may be missing after a crash of the machine"
            );
        }
        let keys = open.keys();
        let (earliest_ms, latest_ms) = segment.span().unwrap_or((0, 0));
        let slots = open.length();
        let summary = Summary {
            slots,
            // At most as many.
            entries: keys.len() as u32,
            rotten: 0,
            earliest_ms,
            latest_ms,
        };
        let kind = match self.write_index(writing, segment.number, keys, &summary) {
            true => return,
            false => Kind::Bare(Bare {
                slots,
                span: segment.span(),
                torn: false,
            }),
        };
        self.insert(Arc::new(Segment::new(self.store, segment.number, kind)));
    }

    /// Writes an index and shows the segment as sealed; `false`: it could not be written.
    fn write_index(
        &self,
        writing: &mut Writing,
        number: u32,
        keys: Vec<segment::Keys>,
        summary: &Summary,
    ) -> bool {
        let written = segment::write_index(&*self.disk, self.store, number, keys, summary)
            .and_then(|()| self.disk.sync_dir(DIR));
        match written {
            Ok(()) => {
                self.insert(Arc::new(Segment::sealed(self.store, number, *summary)));
                true
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    file = index_name(number),
                    "an index of outcomes could not be written; it is tried again, and until then every record is read"
                );
                writing.index_not_before = self.clock.now().mono + RETRY_AFTER;
                false
            }
        }
    }

    /// Makes one index that is missing or damaged.
    pub(super) fn mend(&self, writing: &mut Writing) {
        let Some(segment) = self.wanting(writing) else {
            return;
        };
        let torn = matches!(&segment.kind, Kind::Bare(bare) if bare.torn);
        // If it cannot be read the others must not wait for it.
        let later = self.clock.now().mono + RETRY_AFTER;
        match segment::read_all(&*self.disk, &segment, torn) {
            Ok(Some((keys, summary))) => {
                self.write_index(writing, segment.number, keys, &summary);
            }
            Ok(None) => {
                writing.unread_until.insert(segment.number, later);
            }
            Err(error) => {
                writing.unread_until.insert(segment.number, later);
                if let Err(error) = segment.skip(error) {
                    tracing::warn!(
                        %error,
                        file = segment_name(segment.number),
                        "a file of outcomes could not be read; it is tried again"
                    );
                }
            }
        }
    }

    /// The segment whose index is to be made next.
    pub(super) fn wanting(&self, writing: &Writing) -> Option<Arc<Segment>> {
        let now = self.clock.now().mono;
        if now < writing.index_not_before || (self.no_room)() {
            return None;
        }
        let wanting = |segment: &&Arc<Segment>| {
            let later = writing.unread_until.get(&segment.number);
            later.is_none_or(|later| now >= *later)
                && match &segment.kind {
                    Kind::Bare(_) => true,
                    Kind::Sealed(_) => segment.is_doubted(),
                    Kind::Open(_) | Kind::Unusable(_) => false,
                }
        };
        // The latest first: it is asked for most.
        self.list().iter().rev().find(wanting).map(Arc::clone)
    }
}
