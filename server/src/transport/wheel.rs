//! One timer wheel for all links: it notices silence, and reminds links to look after what they sent.
//!
//! A link costs the wheel an entry of two words and no timer of its own. Time is a count of coarse ticks, one a
//! second; a link notes the tick at which it last heard its peer, which is a load and a store, and the wheel looks at
//! it only when its entry comes up. An entry that is not due yet goes back in, so that hearing from a peer never
//! touches the wheel.
//!
//! The wheel kicks, the link decides: a kick too many changes nothing.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use super::outbox::{Kick, Outbox};

/// Slots of the wheel. A link that is gone leaves its entry behind for at most so many ticks; one that is due later
/// is looked at once a round, which for a million links is a few milliseconds a second.
const SLOTS: u32 = 128;

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Watch {
    /// Kick when nothing was heard for too long.
    Silence,
    /// Kick when the time has come.
    Sent,
}

struct Entry {
    due: u32,
    watch: Watch,
    link: Weak<Outbox>,
}

/// The wheel. [`Wheel::advance`] is called once a second by one task.
pub(crate) struct Wheel {
    /// Changed under the lock of `slots` only.
    now: AtomicU32,
    slots: Mutex<Vec<Vec<Entry>>>,
}

impl Wheel {
    /// A wheel at tick 0.
    pub(crate) fn new() -> Wheel {
        Wheel {
            now: AtomicU32::new(0),
            slots: Mutex::new((0..SLOTS).map(|_| Vec::new()).collect()),
        }
    }

    /// The current tick.
    pub(crate) fn now(&self) -> u32 {
        self.now.load(Ordering::Relaxed)
    }

    /// Looks at a link at tick `due`, or at the next one if that is past.
    pub(crate) fn watch(&self, link: Weak<Outbox>, watch: Watch, due: u32) {
        let mut slots = self.slots();
        let now = self.now();
        // The slot of the current tick is empty already: what is due now waits for the next one.
        let at = due.clamp(now + 1, now + SLOTS - 1);
        slots[(at % SLOTS) as usize].push(Entry { due, watch, link });
    }

    /// One tick passes: kicks the links that are due.
    pub(crate) fn advance(&self) {
        let (now, entries) = {
            let mut slots = self.slots();
            let now = self.now.fetch_add(1, Ordering::Relaxed) + 1;
            (now, std::mem::take(&mut slots[(now % SLOTS) as usize]))
        };
        for entry in entries {
            let Some(link) = entry.link.upgrade() else {
                continue;
            };
            let next = if entry.due > now {
                Some(entry.due)
            } else {
                match entry.watch {
                    Watch::Silence => link.check_silence(now),
                    Watch::Sent => {
                        link.kick(Kick::Sent);
                        None
                    }
                }
            };
            if let Some(due) = next {
                self.watch(entry.link, entry.watch, due);
            }
        }
    }

    /// Kicks every link that is watched for silence.
    pub(crate) fn kick_all(&self, kick: Kick) {
        let links: Vec<_> = self
            .slots()
            .iter()
            .flatten()
            .filter_map(Entry::silence)
            .collect();
        for link in links.iter().filter_map(Weak::upgrade) {
            link.kick(kick);
        }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Vec<Entry>>> {
        // A push or a take cannot stop half-way.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[cfg(test)]
    fn entries(&self) -> usize {
        self.slots().iter().map(Vec::len).sum()
    }
}

impl Entry {
    fn silence(&self) -> Option<Weak<Outbox>> {
        (self.watch == Watch::Silence).then(|| Weak::clone(&self.link))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn link(wheel: &Arc<Wheel>, silence: u32) -> Arc<Outbox> {
        let link = Outbox::new(Arc::clone(wheel), silence);
        link.watch_silence();
        link
    }

    fn pass(wheel: &Wheel, ticks: u32) {
        (0..ticks).for_each(|_| wheel.advance());
    }

    #[test]
    fn a_silent_link_is_kicked_after_its_time_and_not_before() {
        for silence in [1, 2, 127, 128, 129, 255, 256, 257, 2_250] {
            let wheel = Arc::new(Wheel::new());
            pass(&wheel, 77);
            let link = link(&wheel, silence);
            pass(&wheel, silence - 1);
            assert!(!link.take_kicks().has(Kick::Silence), "{silence}");
            pass(&wheel, 1);
            assert!(link.take_kicks().has(Kick::Silence), "{silence}");
        }
    }

    #[test]
    fn what_is_heard_puts_the_kick_off_and_adds_no_entry() {
        let wheel = Arc::new(Wheel::new());
        let link = link(&wheel, 300);
        for _ in 0..20 {
            pass(&wheel, 299);
            link.heard();
            assert!(link.take_kicks().is_empty());
            assert_eq!(wheel.entries(), 1);
        }
        pass(&wheel, 299);
        assert!(link.take_kicks().is_empty());
        pass(&wheel, 1);
        assert!(link.take_kicks().has(Kick::Silence));
        assert_eq!(wheel.entries(), 0);
    }

    #[test]
    fn a_reminder_comes_at_its_tick_and_once() {
        let wheel = Arc::new(Wheel::new());
        let link = link(&wheel, 10_000);
        link.remind(30);
        pass(&wheel, 29);
        assert!(link.take_kicks().is_empty());
        pass(&wheel, 1);
        assert!(link.take_kicks().has(Kick::Sent));
        pass(&wheel, 500);
        assert!(link.take_kicks().is_empty());
    }

    #[test]
    fn a_link_that_is_gone_leaves_within_a_round_and_holds_nothing() {
        let wheel = Arc::new(Wheel::new());
        let link = link(&wheel, 2_250);
        let weak = Arc::downgrade(&link);
        drop(link);
        assert!(weak.upgrade().is_none());
        pass(&wheel, SLOTS);
        assert_eq!(wheel.entries(), 0);
    }

    #[test]
    fn everybody_can_be_kicked_at_once() {
        let wheel = Arc::new(Wheel::new());
        let links: Vec<_> = (1..200).map(|silence| link(&wheel, silence)).collect();
        wheel.kick_all(Kick::Shutdown);
        assert!(
            links
                .iter()
                .all(|link| link.take_kicks().has(Kick::Shutdown))
        );
    }
}
