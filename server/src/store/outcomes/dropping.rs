//! What goes: segments that are too old or too many, and those that cannot be read.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::{DIR, History, RETRY_AFTER, SEGMENTS_MAX, SLACK_MS, Writing, segment};
use crate::ports::ClockState;
use crate::store::log::SET_ASIDE;
use crate::store::outcomes::format::{Unusable, index_name, segment_name};
use crate::store::outcomes::segment::{Kind, Segment};
use crate::store::set_aside::free_name;

impl History {
    pub(super) fn drop_old(&self, writing: &mut Writing) {
        let now = self.clock.now();
        if now.mono < writing.remove_not_before {
            return;
        }
        let segments = self.list();
        let mut removed = false;
        // Nothing grows old because somebody set the clock.
        if self.clock.state() == ClockState::Steady {
            let before_ms = now.unix_ms.saturating_sub(self.rules.keep_ms);
            // Times follow the order of the records to within seconds.
            let long_before_ms = before_ms.saturating_sub(SLACK_MS);
            // When the latest record at or after this place in the list ended.
            let mut latest_ms = None;
            let mut old = Vec::new();
            for (place, segment) in segments.iter().enumerate().rev() {
                // What tells the age of an unreadable one goes together with it.
                let before = place.checked_sub(1).and_then(|place| segments.get(place));
                let witness = before.is_some_and(|before| before.is_undated());
                match &segment.kind {
                    Kind::Open(_) => latest_ms = Some(u64::MAX),
                    Kind::Unusable(unused) => {
                        // Its records are at most as old as those of the segment after it.
                        if latest_ms.is_some_and(|latest| latest < long_before_ms)
                            && unused.why != Unusable::Foreign
                        {
                            old.push(Arc::clone(segment));
                        }
                    }
                    Kind::Sealed(_) | Kind::Bare(_) => {
                        let old_enough = match segment.span() {
                            Some((_, latest)) => {
                                latest_ms = Some(latest);
                                latest < if witness { long_before_ms } else { before_ms }
                            }
                            // Nothing can be read in it, or not yet: as if it could not be used at all.
                            None if segment.length() > 0 => {
                                latest_ms.is_some_and(|latest| latest < long_before_ms)
                            }
                            // Nothing was ever written. The last one keeps the numbers rising.
                            None => place + 1 < segments.len(),
                        };
                        if old_enough {
                            old.push(Arc::clone(segment));
                        }
                    }
                }
            }
            let last = segments.last().map(|segment| segment.number);
            self.note_dropped(writing, &old);
            for segment in old.iter().rev() {
                if Some(segment.number) == last && !self.keep_number(writing) {
                    break;
                }
                self.remove(writing, segment, "age");
            }
            removed = !old.is_empty();
        }
        let mut segments = self.list();
        // What can be read does not give way to what cannot, and nothing unreadable is dropped before its age says so.
        segments.retain(|segment| segment.goes_by_size() || matches!(segment.kind, Kind::Open(_)));
        let mut bytes: u64 = segments.iter().map(|segment| segment.bytes()).sum();
        let mut count = segments.len();
        let mut surplus = Vec::new();
        // All but the last one, which keeps the numbers rising.
        for segment in segments.iter().rev().skip(1).rev() {
            if bytes <= self.rules.max_bytes && count <= SEGMENTS_MAX {
                break;
            }
            if segment.goes_by_size() {
                bytes -= segment.bytes();
                count -= 1;
                surplus.push(Arc::clone(segment));
            }
        }
        self.note_dropped(writing, &surplus);
        for segment in &surplus {
            self.remove(writing, segment, "size");
            removed = true;
        }
        if removed && let Err(error) = self.disk.sync_dir(DIR) {
            tracing::warn!(%error, "that old outcomes were dropped may be forgotten by a crash of the machine");
        }
    }

    /// Begins a segment before the last one is dropped: a later run goes on behind the highest number that it finds, and
    /// without one it would use positions again that somebody may still hold.
    fn keep_number(&self, writing: &mut Writing) -> bool {
        match self.begin(writing) {
            Ok(_) => true,
            Err(error) => {
                tracing::warn!(
                    %error,
                    "the last old outcomes are kept: no segment could be begun after them; it is tried again"
                );
                writing.remove_not_before = self.clock.now().mono + RETRY_AFTER;
                false
            }
        }
    }

    /// Keeps a file in which nothing can be read where nobody asks for its age.
    fn set_aside(&self, number: u32) -> io::Result<()> {
        let to = free_name(&*self.disk, &format!("outcomes-{number:010}"), "out")?;
        self.disk.rename(&segment_name(number), &to)?;
        self.disk.sync_dir(SET_ASIDE)?;
        tracing::warn!(
            file = to,
            "outcomes that cannot be read were set aside: they are past their time"
        );
        Ok(())
    }

    /// Whether nothing in it can be read, so that nobody but an operator may remove it.
    fn is_kept(&self, segment: &Arc<Segment>) -> bool {
        match &segment.kind {
            // Nobody has looked into it yet.
            Kind::Bare(bare) if bare.slots > 0 && bare.span.is_none() => {
                match segment::read_all(&*self.disk, segment, bare.torn) {
                    Ok(Some((_, summary))) => summary.slots > 0 && summary.latest_ms == 0,
                    Ok(None) => false,
                    Err(_) => true,
                }
            }
            Kind::Open(_) | Kind::Sealed(_) | Kind::Bare(_) | Kind::Unusable(_) => {
                segment.says_nothing()
            }
        }
    }

    /// Drops a segment. What is reading it reads on or finds nothing.
    pub(super) fn remove(&self, writing: &mut Writing, segment: &Arc<Segment>, why: &str) {
        let number = segment.number;
        let gone = |result: io::Result<()>| match result {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        let records = if self.is_kept(segment) {
            gone(self.set_aside(number))
        } else {
            gone(self.disk.remove(&segment_name(number)))
        };
        match records.and_then(|()| gone(self.disk.remove(&index_name(number)))) {
            Ok(()) => {
                self.segments
                    .write()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&number);
                writing.unread_until.remove(&number);
                self.dropped.fetch_add(1, Ordering::Relaxed);
                tracing::debug!(number, why, "dropped a segment of outcomes");
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    file = segment_name(number),
                    "old outcomes could not be dropped; it is tried again"
                );
                writing.remove_not_before = self.clock.now().mono + RETRY_AFTER;
            }
        }
    }
}
