//! A clock that stands still until a test moves it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

/// The wall time that a new manual clock shows, in Unix milliseconds: 2023-11-14 22:13:20 UTC.
pub const START_MS: u64 = 1_700_000_000_000;

/// A clock that stands still until a test moves it. Clones are the same clock.
///
/// Signs of life, back-off, expiry and the detection of sleep run by it. Time limits of sockets do not; in-memory links have
/// none that matter.
#[derive(Debug, Clone)]
pub struct Clock {
    times: Arc<watch::Sender<Times>>,
    /// Who waits, by the moment that is waited for: how many.
    awaited: Arc<Mutex<BTreeMap<u64, usize>>>,
}

/// Somebody waits for a moment, until this is dropped.
struct Awaiting<'a> {
    clock: &'a Clock,
    ms: u64,
}

impl<'a> Awaiting<'a> {
    fn new(clock: &'a Clock, ms: u64) -> Self {
        *clock.awaited().entry(ms).or_default() += 1;
        Self { clock, ms }
    }
}

impl Drop for Awaiting<'_> {
    fn drop(&mut self) {
        let mut awaited = self.clock.awaited();
        if let Some(number) = awaited.get_mut(&self.ms) {
            *number -= 1;
            if *number == 0 {
                awaited.remove(&self.ms);
            }
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Times {
    now_ms: u64,
    slept_ms: u64,
    wall_ms: u64,
    moves: u64,
}

impl Default for Clock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock {
    /// A clock at [`START_MS`].
    pub fn new() -> Self {
        let times = Times {
            now_ms: 0,
            slept_ms: 0,
            wall_ms: START_MS,
            moves: 0,
        };
        Self {
            times: Arc::new(watch::Sender::new(times)),
            awaited: Arc::default(),
        }
    }

    /// Time passes.
    pub fn advance(&self, by: Duration) {
        let by_ms = by.as_millis() as u64;
        self.move_by(|times| {
            times.now_ms += by_ms;
            times.wall_ms += by_ms;
        });
    }

    /// The machine sleeps for this long, and wakes up.
    pub fn sleep_machine(&self, by: Duration) {
        let by_ms = by.as_millis() as u64;
        self.move_by(|times| {
            times.now_ms += by_ms;
            times.slept_ms += by_ms;
            times.wall_ms += by_ms;
        });
    }

    /// Someone sets the wall clock; no time passes.
    pub fn set_wall(&self, unix_ms: u64) {
        self.move_by(|times| times.wall_ms = unix_ms);
    }

    /// In how long the next thing is due that a client waits for: a sign of life, an answer that it gives up on, the end of a
    /// pause. `None`: nobody waits. So a test can go from one to the next without knowing the numbers.
    ///
    /// Let the client settle first: what it does in answer to the last move may change what it waits for.
    pub fn due_in(&self) -> Option<Duration> {
        let now_ms = self.now_ms();
        let awaited = self.awaited();
        let next = awaited.keys().find(|ms| **ms > now_ms)?;
        Some(Duration::from_millis(next - now_ms))
    }

    fn awaited(&self) -> MutexGuard<'_, BTreeMap<u64, usize>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wall time in Unix milliseconds.
    pub fn wall_ms(&self) -> u64 {
        self.times.borrow().wall_ms
    }

    pub(crate) fn now_ms(&self) -> u64 {
        self.times.borrow().now_ms
    }

    pub(crate) fn slept_ms(&self) -> u64 {
        self.times.borrow().slept_ms
    }

    pub(crate) fn moves(&self) -> u64 {
        self.times.borrow().moves
    }

    pub(crate) async fn reached(&self, ms: u64) {
        let mut times = self.times.subscribe();
        let _awaiting = Awaiting::new(self, ms);
        // It cannot fail: this clock holds the sender.
        let _ = times.wait_for(|times| times.now_ms >= ms).await;
    }

    /// Waits until it was moved more often than `moves`; how often it was by now.
    pub(crate) async fn moved_since(&self, moves: u64) -> u64 {
        let mut times = self.times.subscribe();
        let moved = times.wait_for(|times| times.moves > moves).await;
        moved.map_or(moves, |times| times.moves)
    }

    fn move_by(&self, change: impl FnOnce(&mut Times)) {
        self.times.send_modify(|times| {
            change(times);
            times.moves += 1;
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_stands_still_until_it_is_moved_and_then_wakes_who_waits() {
        let clock = Clock::new();
        let waiting = tokio::spawn({
            let clock = clock.clone();
            async move { clock.reached(60_000).await }
        });
        tokio::task::yield_now().await;
        assert_eq!(clock.due_in(), Some(Duration::from_secs(60)));
        clock.advance(Duration::from_secs(59));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        assert_eq!(clock.due_in(), Some(Duration::from_secs(1)));
        clock.sleep_machine(Duration::from_secs(2));
        assert!(waiting.await.is_ok());
        assert_eq!(clock.due_in(), None);
        assert_eq!((clock.now_ms(), clock.slept_ms()), (61_000, 2_000));
        assert_eq!(clock.wall_ms(), START_MS + 61_000);
        clock.set_wall(5);
        assert_eq!((clock.wall_ms(), clock.now_ms()), (5, 61_000));
        assert_eq!(clock.moved_since(2).await, 3);
    }
}
