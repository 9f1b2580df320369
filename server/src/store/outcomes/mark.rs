//! The mark: what a start has to know of the history beyond what its segments say.
//!
//! Without it, or where it cannot be read, the worst is assumed, so that whoever follows is told of a gap that may be none and never
//! the other way round: everything before the first segment was dropped, and the run before did not end in order.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::format::{self, DIR, HEADER, MARK, MARK_TEMPORARY, Mark};
use super::segment::{Kind, Segment};
use super::{History, Writing, follow};
use crate::store::log::disk::Disk;

/// Reads the mark of this store.
pub(super) fn read(disk: &dyn Disk, store: [u8; 16]) -> Option<Mark> {
    let file = disk.open(MARK).ok()?;
    let mut bytes = [0; HEADER];
    file.read_at(&mut bytes, 0).ok()?;
    match format::parse_mark(&bytes, store) {
        Ok(mark) => Some(mark),
        Err(why) => {
            tracing::warn!(file = MARK, %why, "the mark of the history cannot be used: who follows it may be told of a gap that is none");
            None
        }
    }
}

pub(super) fn write(disk: &dyn Disk, store: [u8; 16], mark: Mark) -> io::Result<()> {
    let file = disk.create(MARK_TEMPORARY)?;
    file.write_at(&format::mark(store, mark), 0)?;
    file.sync()?;
    disk.rename(MARK_TEMPORARY, MARK)?;
    disk.sync_dir(DIR)
}

impl History {
    /// Says on disk that a run is under way, so that the next start knows if this one did not end in order.
    pub(in crate::store) fn begin_run(&self) {
        let mut writing = self.writing();
        self.set_mark(&mut writing, |mark| mark.running = true);
    }

    /// Says that everything was written and told.
    pub(super) fn end_run(&self, writing: &mut Writing) {
        self.set_mark(writing, |mark| mark.running = false);
    }

    /// Remembers up to where records are dropped, before that is done.
    pub(super) fn note_dropped(&self, writing: &mut Writing, segments: &[Arc<Segment>]) {
        let behind = |segment: &Arc<Segment>| match (&segment.kind, segment.length()) {
            (Kind::Unusable(_), _) => Some(follow::position(segment.number.saturating_add(1), 0)),
            (_, 0) => None,
            (_, length) => Some(follow::position(segment.number, length)),
        };
        let dropped_to = segments.iter().filter_map(behind).max();
        let Some(dropped_to) = dropped_to.filter(|to| *to > writing.mark.dropped_to) else {
            return;
        };
        self.dropped_to.store(dropped_to.0, Ordering::Release);
        self.set_mark(writing, |mark| mark.dropped_to = dropped_to);
    }

    fn set_mark(&self, writing: &mut Writing, set: impl Fn(&mut Mark)) {
        set(&mut writing.mark);
        let Err(error) = write(&*self.disk, self.store, writing.mark) else {
            return;
        };
        tracing::warn!(
            %error,
            file = MARK,
            "the mark of the history could not be written; it is removed, and after the next start who follows may be told of a gap that is none"
        );
        // An old one would hide a gap. Removing takes no room.
        let removed = self
            .disk
            .remove(MARK)
            .and_then(|()| self.disk.sync_dir(DIR));
        if let Err(error) = removed
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(%error, file = MARK, "the mark of the history could not be removed either");
        }
    }
}
