//! Following: the records of an app from a position on, in the order in which they were recorded, and where some are missing.
//!
//! A position is a segment and a place in it, so a walk reads what was added and nothing else, and whoever comes back
//! begins where it was. What may be missing is told rather than passed over: records that were dropped before the walk came to
//! them, slots that say that records were never written, slots and files that cannot be read.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use super::format::Slot;
use super::query::LOOKS_MAX;
use super::segment::{CHUNK, Kind, Segment};
use super::{History, Writing};
use crate::ports::{
    OutcomeEvent, OutcomeEvents, OutcomeFollow, OutcomeFollower, OutcomeGap, OutcomePosition,
};
use crate::store::log::disk::Disk;

/// A place of a segment.
pub(super) fn position(number: u32, place: u32) -> OutcomePosition {
    OutcomePosition(u64::from(number) << 32 | u64::from(place))
}

/// The segment and the place.
pub(super) fn parts(position: OutcomePosition) -> (u32, u32) {
    // The two halves.
    ((position.0 >> 32) as u32, position.0 as u32)
}

impl History {
    pub(super) fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls this whenever records were written, and writes them at once; `None`: nobody follows any more.
    pub(in crate::store) fn follow(&self, follower: Option<OutcomeFollower>) {
        let followed = follower.is_some();
        *self.lock_follower() = follower;
        self.queue().followed = followed;
        self.wake.notify_all();
    }

    fn lock_follower(&self) -> MutexGuard<'_, Option<OutcomeFollower>> {
        self.follower.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell_follower(&self) {
        let follower = self.lock_follower().clone();
        if let Some(follower) = follower {
            follower();
        }
    }

    /// Behind the last record.
    pub(in crate::store) fn end(&self) -> OutcomePosition {
        // The number first: a segment that is begun meanwhile is in the list, or its number is the end.
        let next_number = self.next_number.load(Ordering::Acquire);
        match self.list().last() {
            Some(last) if matches!(last.kind, Kind::Open(_)) => {
                position(last.number, last.length())
            }
            _ => position(next_number, 0),
        }
    }

    /// What an app's follower has not seen yet.
    pub(in crate::store) fn events(&self, follow: &OutcomeFollow) -> io::Result<OutcomeEvents> {
        let walk = Walk {
            follow,
            since_ms: self.told_since_ms(),
            // Both before the list: what is added or dropped meanwhile is met by the next call.
            end: self.end(),
            dropped_to: OutcomePosition(self.dropped_to.load(Ordering::Acquire)),
            items: Vec::new(),
            looks_left: LOOKS_MAX,
        };
        walk.read(&*self.disk, &self.list())
    }
}

/// A walk under way.
struct Walk<'a> {
    follow: &'a OutcomeFollow,
    /// What ended before is past its keeping time.
    since_ms: u64,
    end: OutcomePosition,
    dropped_to: OutcomePosition,
    items: Vec<(OutcomePosition, OutcomeEvent)>,
    looks_left: usize,
}

impl Walk<'_> {
    fn read(mut self, disk: &dyn Disk, segments: &[Arc<Segment>]) -> io::Result<OutcomeEvents> {
        let mut at = self.follow.from;
        if at > self.end {
            let end = self.end;
            self.gap(end, OutcomeGap::Elsewhere);
            return Ok(self.until(end, false));
        }
        let from = parts(at).0;
        for segment in segments.iter().filter(|segment| segment.number >= from) {
            let (number, mut place) = parts(at);
            if segment.number > number {
                place = 0;
                let begins = position(segment.number, 0);
                self.absent(at, begins);
            }
            match self.segment(disk, segment, &mut place) {
                Ok(Some(next)) => return Ok(self.until(next, true)),
                Ok(None) => {}
                Err(error) => {
                    segment.skip(error)?;
                    let next = if matches!(segment.kind, Kind::Open(_)) {
                        place = segment.length();
                        position(segment.number, place)
                    } else {
                        position(segment.number.saturating_add(1), 0)
                    };
                    self.gap(next, OutcomeGap::Unreadable);
                }
            }
            at = match &segment.kind {
                Kind::Open(_) => position(segment.number, place),
                // Nothing more comes into it.
                Kind::Sealed(_) | Kind::Bare(_) | Kind::Unusable(_) => {
                    position(segment.number.saturating_add(1), 0)
                }
            };
        }
        let open = segments
            .last()
            .is_some_and(|last| matches!(last.kind, Kind::Open(_)));
        if !open && at < self.end {
            let end = self.end;
            self.absent(at, end);
            at = end;
        }
        Ok(self.until(at, false))
    }

    /// Nothing is there between two positions. It may be that nothing ever was.
    fn absent(&mut self, at: OutcomePosition, next: OutcomePosition) {
        // Position 0 asks for what there is.
        if at > OutcomePosition(0) && at < self.dropped_to {
            self.gap(next, OutcomeGap::Dropped);
        }
    }

    /// Reads a segment from a place on, and moves it; answers where to go on if that is enough for one call.
    fn segment(
        &mut self,
        disk: &dyn Disk,
        segment: &Segment,
        place: &mut u32,
    ) -> io::Result<Option<OutcomePosition>> {
        let behind = position(segment.number.saturating_add(1), 0);
        if matches!(segment.kind, Kind::Unusable(_)) {
            self.gap(behind, OutcomeGap::Unreadable);
            return Ok(None);
        }
        let length = segment.length();
        if *place >= length {
            return Ok(None);
        }
        let Some(mut records) = segment.records_of(disk)? else {
            // Dropped this moment.
            self.gap(behind, OutcomeGap::Dropped);
            return Ok(None);
        };
        while *place < length {
            let first = *place;
            if self.items.len() >= self.follow.limit || self.looks_left == 0 {
                return Ok(Some(position(segment.number, first)));
            }
            let count = CHUNK.min(length - first);
            self.looks_left = self.looks_left.saturating_sub(count as usize);
            for (at, slot) in (first..).zip(records.some(first, count)?) {
                if self.items.len() >= self.follow.limit {
                    return Ok(Some(position(segment.number, at)));
                }
                let next = position(segment.number, at + 1);
                match slot {
                    Slot::Record(record) if !self.follow.wants(&record) => {}
                    Slot::Record(record) if record.at_ms < self.since_ms => {
                        self.gap(next, OutcomeGap::Dropped);
                    }
                    Slot::Record(record) => self.items.push((next, OutcomeEvent::Ended(record))),
                    Slot::Missing { .. } => self.gap(next, OutcomeGap::Lost),
                    Slot::Empty => {}
                    Slot::Rotten => {
                        records.rotten(at);
                        self.gap(next, OutcomeGap::Unreadable);
                    }
                }
            }
            *place += count;
        }
        Ok(None)
    }

    /// Adds a gap; one that follows another of its kind makes it longer.
    fn gap(&mut self, next: OutcomePosition, gap: OutcomeGap) {
        let same = |last: &&mut (OutcomePosition, OutcomeEvent)| last.1 == OutcomeEvent::Gap(gap);
        match self.items.last_mut().filter(same) {
            Some(last) => last.0 = next,
            None => self.items.push((next, OutcomeEvent::Gap(gap))),
        }
    }

    fn until(self, next: OutcomePosition, more: bool) -> OutcomeEvents {
        OutcomeEvents {
            items: self.items,
            next,
            more,
        }
    }
}
