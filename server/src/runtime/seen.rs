//! When devices were last seen, until that is written.
//!
//! Nobody waits for it, so it costs no frame of its own: what is noted stays here for [`WRITE_AFTER`] and then rides in the
//! next frame that its shard writes anyway. So a device that comes and goes all the time is written at most once in that
//! time, and a fleet to which nothing happens causes no write at all. Only when more than [`WAITING_MAX`] devices wait
//! here is a frame written for them. What waits here is lost by a crash, not by an orderly stop.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use crate::delivery::{DeviceId, Mono};
use crate::ports::{Op, Seen};
use crate::telemetry::metrics as names;

/// How long a note waits before it may be written: the least time between two writes for one device.
const WRITE_AFTER: Duration = Duration::from_secs(300);
/// Devices of one shard that wait before a frame is written for them: about a megabyte.
const WAITING_MAX: usize = 4_096;
/// Devices of one shard that are noted at all. Further ones are not, until there is room: only a disk without room lets it
/// come so far.
const NOTED_MAX: usize = 65_536;
/// Notes of one frame, so that what somebody waits for is not held up.
const FRAME_MAX: usize = 512;

/// The notes of one shard.
#[derive(Default)]
pub(super) struct SeenBook {
    waiting: HashMap<DeviceId, Note>,
    /// Those that wait, the oldest first. One that was written or forgotten meanwhile is passed over.
    order: VecDeque<(Mono, DeviceId)>,
    /// In the frame that is being written.
    writing: HashMap<DeviceId, Note>,
}

struct Note {
    seen: Seen,
    since: Mono,
}

impl SeenBook {
    /// Notes that a device was seen. `true`: so many wait that a frame is worth it.
    pub(super) fn note(&mut self, device: DeviceId, seen: Seen, now: Mono) -> bool {
        if let Some(note) = self.waiting.get_mut(&device) {
            note.seen = seen;
        } else if self.waiting.len() < NOTED_MAX {
            self.waiting.insert(device, Note { seen, since: now });
            self.order.push_back((now, device));
        } else {
            metrics::counter!(names::SEEN_DROPPED_TOTAL).increment(1);
        }
        self.is_full()
    }

    /// What is known here of a device, if anything.
    pub(super) fn get(&self, device: DeviceId) -> Option<Seen> {
        let note = self.waiting.get(&device).or(self.writing.get(&device));
        note.map(|note| note.seen.clone())
    }

    /// The device is gone for ever: nothing of it may be written after that.
    pub(super) fn forget(&mut self, device: DeviceId) {
        self.waiting.remove(&device);
        self.writing.remove(&device);
    }

    /// What may be written now.
    pub(super) fn take_due(&mut self, now: Mono) -> Vec<Op> {
        let mut ops = Vec::new();
        while ops.len() < FRAME_MAX
            && let Some(&(since, device)) = self.order.front()
        {
            let due = since + WRITE_AFTER <= now || self.is_full();
            let current = self
                .waiting
                .get(&device)
                .is_some_and(|note| note.since == since);
            if current && !due {
                break;
            }
            self.order.pop_front();
            if current && let Some(note) = self.waiting.remove(&device) {
                ops.push(Op::PutSeen(device, note.seen.clone()));
                self.writing.insert(device, note);
            }
        }
        ops
    }

    /// What became of the frame with what was taken last.
    pub(super) fn committed(&mut self, safe: bool) {
        for (device, note) in self.writing.drain() {
            if !safe && !self.waiting.contains_key(&device) {
                self.order.push_front((note.since, device));
                self.waiting.insert(device, note);
            }
        }
        if self.waiting.is_empty() {
            // Whoever came in a burst is not expected to do so again.
            *self = SeenBook::default();
        }
    }

    /// Everything, for the last frames before an orderly stop.
    pub(super) fn take_all(&mut self) -> Vec<Op> {
        self.order.clear();
        let all = self.writing.drain().chain(self.waiting.drain());
        all.map(|(device, note)| Op::PutSeen(device, note.seen))
            .collect()
    }

    /// Devices that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len() + self.writing.len()
    }

    /// So many wait that a frame is worth it.
    pub(super) fn is_full(&self) -> bool {
        self.waiting.len() > WAITING_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::Carrier;

    fn device(n: u32) -> DeviceId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&n.to_be_bytes());
        DeviceId(id)
    }

    fn seen(at_ms: u64) -> Seen {
        Seen {
            at_ms,
            carrier: Carrier::Quic,
            agent: None,
        }
    }

    fn at(seconds: u64) -> Mono {
        Mono(0) + Duration::from_secs(seconds)
    }

    fn written(ops: &[Op]) -> Vec<u64> {
        ops.iter()
            .map(|op| {
                if let Op::PutSeen(_, seen) = op {
                    seen.at_ms
                } else {
                    0
                }
            })
            .collect()
    }

    #[test]
    fn a_device_that_comes_and_goes_is_written_once_in_five_minutes_with_the_newest() {
        let mut book = SeenBook::default();
        for second in 0..299 {
            book.note(device(1), seen(second), at(second));
            assert!(book.take_due(at(second)).is_empty());
        }
        assert_eq!(written(&book.take_due(at(300))), [298]);
        book.note(device(1), seen(301), at(301));
        book.committed(true);
        assert!(book.take_due(at(400)).is_empty());
        assert_eq!(book.get(device(1)).map(|seen| seen.at_ms), Some(301));
        assert_eq!(written(&book.take_due(at(601))), [301]);
    }

    #[test]
    fn what_found_no_room_waits_on_unless_something_newer_does() {
        let mut book = SeenBook::default();
        book.note(device(1), seen(1), at(0));
        book.note(device(2), seen(2), at(0));
        assert_eq!(written(&book.take_due(at(300))), [1, 2]);
        book.note(device(2), seen(3), at(301));
        book.committed(false);
        assert_eq!(book.waiting(), 2);
        assert_eq!(written(&book.take_due(at(301))), [1]);
        book.committed(true);
        assert_eq!(written(&book.take_due(at(601))), [3]);
    }

    #[test]
    fn one_that_is_gone_for_ever_is_never_written_again() {
        let mut book = SeenBook::default();
        book.note(device(1), seen(1), at(0));
        book.note(device(2), seen(2), at(0));
        assert_eq!(book.take_due(at(300)).len(), 2);
        book.forget(device(1));
        book.committed(false);
        assert_eq!(written(&book.take_due(at(300))), [2]);
    }

    #[test]
    fn too_many_are_worth_a_frame_and_the_number_is_bounded() {
        let mut book = SeenBook::default();
        let mut full = false;
        for n in 0..NOTED_MAX as u32 + 10 {
            full = book.note(device(n), seen(1), at(0));
        }
        assert!(full);
        assert_eq!(book.waiting(), NOTED_MAX);
        let ops = book.take_due(at(0));
        assert_eq!(ops.len(), FRAME_MAX);
        book.committed(true);
        let mut taken = ops.len();
        while book.is_full() {
            taken += book.take_due(at(0)).len();
            book.committed(true);
        }
        assert_eq!(taken, NOTED_MAX - WAITING_MAX);
        assert!(book.take_due(at(1)).is_empty());
    }
}
