//! What the outside knows of a link: the runtime pushes words for the device, the wheel kicks, the link's task wakes.
//!
//! It is one small allocation for each link, and empty while nothing happens: no channel, no pre-allocated slots.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;

use bellwire_protocol::limits::WINDOW_MAX;
use futures_util::task::AtomicWaker;

use super::wheel::{Watch, Wheel};
use crate::runtime::{Out, Outlet};

/// Most words that wait for a link's task. The core sends at most a window of notifications; what is taken back while
/// the device does not read adds a withdrawal and a successor each. A device that lets so many pile up is a slow reader.
pub(crate) const OUTBOX_MAX: usize = 4 * WINDOW_MAX as usize;

/// Why a link's task is woken, beside words in its outbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kick {
    /// Nothing was heard for too long.
    Silence = 1,
    /// Something was sent a while ago: look whether it arrived.
    Sent = 2,
    /// More words wait than may.
    Overflow = 4,
    /// The transport ends now.
    Shutdown = 8,
}

/// The kicks since the last look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Kicks(u8);

impl Kicks {
    /// Whether there was this one.
    pub(crate) fn has(self, kick: Kick) -> bool {
        self.0 & kick as u8 != 0
    }

    /// Whether there was none.
    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The outside of one link.
pub(crate) struct Outbox {
    /// `None` once the link is gone.
    words: Mutex<Option<VecDeque<Out>>>,
    waker: AtomicWaker,
    kicks: AtomicU8,
    /// The tick at which the peer was last heard.
    heard: AtomicU32,
    /// Ticks of silence that are borne.
    silence: u32,
    wheel: Arc<Wheel>,
}

impl Outbox {
    /// An empty outbox of a link whose peer was heard just now and may be silent for `silence` ticks.
    pub(crate) fn new(wheel: Arc<Wheel>, silence: u32) -> Arc<Outbox> {
        Arc::new(Outbox {
            words: Mutex::new(Some(VecDeque::new())),
            waker: AtomicWaker::new(),
            kicks: AtomicU8::new(0),
            heard: AtomicU32::new(wheel.now()),
            silence,
            wheel,
        })
    }

    /// Wakes this task from now on.
    pub(crate) fn register(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    /// The words so far, in order.
    pub(crate) fn take_words(&self) -> VecDeque<Out> {
        self.words()
            .as_mut()
            .map(std::mem::take)
            .unwrap_or_default()
    }

    /// Whether there are words to take.
    pub(crate) fn has_words(&self) -> bool {
        self.words().as_ref().is_some_and(|words| !words.is_empty())
    }

    /// The kicks since the last call.
    pub(crate) fn take_kicks(&self) -> Kicks {
        // Mostly there are none, and then nothing is written.
        match self.kicks.load(Ordering::Relaxed) {
            0 => Kicks(0),
            _ => Kicks(self.kicks.swap(0, Ordering::Acquire)),
        }
    }

    /// Wakes the link's task for a reason.
    pub(crate) fn kick(&self, kick: Kick) {
        self.kicks.fetch_or(kick as u8, Ordering::Release);
        self.waker.wake();
    }

    /// The link is gone: words are dropped from now on.
    pub(crate) fn close(&self) {
        let words = self.words().take();
        // Outside of the lock, because dropping notifications may take time.
        drop(words);
    }

    /// The peer gave a sign of life.
    pub(crate) fn heard(&self) {
        let now = self.wheel.now();
        // Written once a second at most, so that the wheel's reading does not fight for the line.
        if self.heard.load(Ordering::Relaxed) != now {
            self.heard.store(now, Ordering::Relaxed);
        }
    }

    /// The current tick, for notes about sending.
    pub(crate) fn now(&self) -> u32 {
        self.wheel.now()
    }

    /// From now on, silence kicks.
    pub(crate) fn watch_silence(self: &Arc<Outbox>) {
        let due = self
            .heard
            .load(Ordering::Relaxed)
            .saturating_add(self.silence);
        self.wheel.watch(self.weak(), Watch::Silence, due);
    }

    /// Kicks with [`Kick::Sent`] after so many ticks.
    pub(crate) fn remind(self: &Arc<Outbox>, ticks: u32) {
        let due = self.wheel.now().saturating_add(ticks);
        self.wheel.watch(self.weak(), Watch::Sent, due);
    }

    /// For the wheel: kicks if the peer was silent for too long, otherwise says when to look again.
    pub(crate) fn check_silence(&self, now: u32) -> Option<u32> {
        let due = self
            .heard
            .load(Ordering::Relaxed)
            .saturating_add(self.silence);
        if due > now {
            return Some(due);
        }
        self.kick(Kick::Silence);
        None
    }

    fn weak(self: &Arc<Outbox>) -> Weak<Outbox> {
        Arc::downgrade(self)
    }

    fn words(&self) -> MutexGuard<'_, Option<VecDeque<Out>>> {
        // A push or a take cannot stop half-way.
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Outlet for Outbox {
    fn push(&self, out: Out) {
        let (woken, surplus) = match &mut *self.words() {
            None => (false, Some(out)),
            Some(words) if words.len() >= OUTBOX_MAX => {
                self.kicks.fetch_or(Kick::Overflow as u8, Ordering::Release);
                (true, Some(out))
            }
            Some(words) => {
                words.push_back(out);
                // Behind others the task has been woken already.
                (words.len() == 1, None)
            }
        };
        drop(surplus);
        if woken {
            self.waker.wake();
        }
    }

    fn push_all(&self, outs: &mut Vec<Out>) {
        let woken = match &mut *self.words() {
            None => false,
            Some(words) => {
                // Behind others the task has been woken already.
                let first = words.is_empty() && !outs.is_empty();
                let room = OUTBOX_MAX.saturating_sub(words.len());
                let overflow = outs.len() > room;
                if overflow {
                    self.kicks.fetch_or(Kick::Overflow as u8, Ordering::Release);
                }
                words.extend(outs.drain(..outs.len().min(room)));
                first || overflow
            }
        };
        // Outside of the lock, because dropping notifications may take time.
        outs.clear();
        if woken {
            self.waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::wildcard_enum_match_arm)]
    use super::*;
    use crate::delivery::PingId;
    use futures_util::task::{ArcWake, waker};
    use std::sync::atomic::AtomicUsize;

    struct Count(AtomicUsize);

    impl ArcWake for Count {
        fn wake_by_ref(this: &Arc<Count>) {
            this.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn outbox() -> (Arc<Outbox>, Arc<Count>) {
        let outbox = Outbox::new(Arc::new(Wheel::new()), 10);
        let count = Arc::new(Count(AtomicUsize::new(0)));
        outbox.register(&waker(Arc::clone(&count)));
        (outbox, count)
    }

    fn word(number: u8) -> Out {
        Out::Withdraw(vec![PingId([number; 16])])
    }

    #[test]
    fn the_words_of_one_turn_wake_once_and_keep_their_order() {
        let (outbox, count) = outbox();
        let mut outs: Vec<Out> = (1..=3)
            .map(|n| Out::Withdraw(vec![PingId([n; 16])]))
            .collect();
        outbox.push_all(&mut outs);
        assert!(outs.is_empty());
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        let words = outbox.take_words();
        for (n, word) in (1..=3).zip(words) {
            assert!(matches!(word, Out::Withdraw(ids) if ids == [PingId([n; 16])]));
        }
    }

    #[test]
    fn words_beyond_the_bound_are_dropped_and_kick() {
        let (outbox, count) = outbox();
        let mut outs: Vec<Out> = (0..=OUTBOX_MAX)
            .map(|_| Out::Withdraw(Vec::new()))
            .collect();
        outbox.push_all(&mut outs);
        assert_eq!(outbox.take_words().len(), OUTBOX_MAX);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert_ne!(outbox.take_kicks().0, 0);
        outbox.push_all(&mut Vec::new());
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn words_come_out_in_order_and_wake_once_until_they_are_taken() {
        let (outbox, count) = outbox();
        (0..3).for_each(|number| outbox.push(word(number)));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        let firsts: Vec<u8> = outbox
            .take_words()
            .iter()
            .map(|out| match out {
                Out::Withdraw(ids) => ids[0].0[0],
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(firsts, [0, 1, 2]);
        assert!(outbox.take_words().is_empty());
    }

    #[test]
    fn a_full_outbox_kicks_and_drops_what_is_too_much() {
        let (outbox, _) = outbox();
        (0..OUTBOX_MAX).for_each(|_| outbox.push(word(1)));
        assert!(outbox.take_kicks().is_empty());
        outbox.push(word(2));
        assert!(outbox.take_kicks().has(Kick::Overflow));
        assert_eq!(outbox.take_words().len(), OUTBOX_MAX);
    }

    #[test]
    fn after_closing_words_are_dropped_and_nobody_is_woken() {
        let (outbox, count) = outbox();
        outbox.push(word(1));
        outbox.close();
        outbox.push(word(2));
        assert!(outbox.take_words().is_empty());
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
