//! The one place where time is read.
//!
//! Neither clock of the system alone is enough: the wall clock jumps, the monotonic one knows no calendar. Ours
//! shows the wall time at the start plus the monotonic time since, and leans towards the system's wall clock by at
//! most [`SLEW_PPM`]. A difference above [`JUMP_MS`] is not followed but reported: somebody set the clock, or the
//! machine slept, and no TTL may run out because of that.

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::delivery::{Mono, Now};
use crate::ports::{Clock, ClockState};

/// Fastest correction, parts per million: what NTP daemons allow themselves (half a millisecond a second).
const SLEW_PPM: u64 = 500;
/// A difference above this is a jump and is not followed.
const JUMP_MS: i64 = 60_000;
/// How often the system's wall clock is looked at.
const COMPARE_EVERY: Duration = Duration::from_secs(1);
/// How often a jump is said again.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The system's clocks as one pair.
pub struct SystemClock {
    start: Instant,
    start_unix_us: i64,
    /// What slewing has added so far, microseconds.
    offset_us: AtomicI64,
    /// The jump in force, milliseconds; 0 = steady.
    jump_ms: AtomicI64,
    /// When to compare next, microseconds of `Mono`.
    compare_at: AtomicU64,
    /// Never go back: the highest wall time given out, milliseconds.
    highest_ms: AtomicU64,
    slew: Mutex<Slew>,
}

impl Default for SystemClock {
    fn default() -> SystemClock {
        SystemClock::new()
    }
}

impl SystemClock {
    /// A clock whose `Mono` starts now.
    #[must_use]
    #[allow(
        clippy::disallowed_methods,
        reason = "time enters here and nowhere else"
    )]
    pub fn new() -> SystemClock {
        SystemClock {
            start: Instant::now(),
            start_unix_us: system_unix_us(),
            offset_us: AtomicI64::new(0),
            jump_ms: AtomicI64::new(0),
            compare_at: AtomicU64::new(0),
            highest_ms: AtomicU64::new(0),
            slew: Mutex::new(Slew::default()),
        }
    }

    fn compare(&self, mono: Mono) {
        let next = mono + COMPARE_EVERY;
        self.compare_at.store(next.0, Ordering::Relaxed);
        // Somebody else compares already: nothing to add.
        let Ok(mut slew) = self.slew.try_lock() else {
            return;
        };
        let ours = self.start_unix_us.saturating_add_unsigned(mono.0)
            + self.offset_us.load(Ordering::Relaxed);
        let step = slew.compare(mono, system_unix_us().saturating_sub(ours));
        self.offset_us.fetch_add(step.add_us, Ordering::Relaxed);
        self.jump_ms
            .store(step.jump_ms.unwrap_or(0), Ordering::Relaxed);
        match step.say {
            Some(Say::Jumped(by_ms)) => tracing::error!(
                by_ms,
                "the system clock jumped; expiry is judged by the old time until it comes back or the server is \
                 restarted, and the sweep pauses"
            ),
            Some(Say::Back) => tracing::warn!("the system clock is back; the sweep goes on"),
            None => {}
        }
    }
}

impl Clock for SystemClock {
    fn now(&self) -> Now {
        let elapsed = self.start.elapsed();
        let mono = Mono(u64::try_from(elapsed.as_micros()).unwrap_or(u64::MAX));
        if mono.0 >= self.compare_at.load(Ordering::Relaxed) {
            self.compare(mono);
        }
        let unix_us = self.start_unix_us.saturating_add_unsigned(mono.0)
            + self.offset_us.load(Ordering::Relaxed);
        let unix_ms = u64::try_from(unix_us / 1_000).unwrap_or(0);
        let highest = self.highest_ms.fetch_max(unix_ms, Ordering::Relaxed);
        Now {
            mono,
            unix_ms: unix_ms.max(highest),
        }
    }

    fn state(&self) -> ClockState {
        match self.jump_ms.load(Ordering::Relaxed) {
            0 => ClockState::Steady,
            by_ms => ClockState::Jumped { by_ms },
        }
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "time enters here and nowhere else"
)]
fn system_unix_us() -> i64 {
    match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_micros()).unwrap_or(i64::MAX),
        // Before 1970: a machine without a battery. The jump is reported once the clock is set.
        Err(before) => i64::try_from(before.duration().as_micros()).map_or(i64::MIN, |us| -us),
    }
}

/// The arithmetic of slewing; pure.
#[derive(Debug, Default)]
struct Slew {
    /// When it was compared last.
    last: Option<Mono>,
    /// When a jump was last complained about.
    complained: Option<Mono>,
}

/// What one comparison decides.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    /// Add this to our wall time, microseconds.
    add_us: i64,
    /// The jump in force, milliseconds.
    jump_ms: Option<i64>,
    /// Tell the operator.
    say: Option<Say>,
}

#[derive(Debug, PartialEq, Eq)]
enum Say {
    Jumped(i64),
    Back,
}

impl Slew {
    /// `behind_us`: the system's wall clock minus ours.
    fn compare(&mut self, mono: Mono, behind_us: i64) -> Step {
        let since = self.last.map_or(Duration::ZERO, |last| mono - last);
        self.last = Some(mono);
        let by_ms = behind_us / 1_000;
        if by_ms.abs() > JUMP_MS {
            let due = self
                .complained
                .is_none_or(|said| mono - said >= COMPLAIN_EVERY);
            if due {
                self.complained = Some(mono);
            }
            return Step {
                add_us: 0,
                jump_ms: Some(by_ms),
                say: due.then_some(Say::Jumped(by_ms)),
            };
        }
        let most =
            i64::try_from(since.as_micros().saturating_mul(u128::from(SLEW_PPM)) / 1_000_000)
                .unwrap_or(i64::MAX);
        Step {
            add_us: behind_us.clamp(-most, most),
            jump_ms: None,
            say: self.complained.take().map(|_| Say::Back),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Mono {
        Mono(seconds * 1_000_000)
    }

    #[test]
    fn a_small_difference_is_closed_at_no_more_than_500_ppm() {
        let mut slew = Slew::default();
        assert_eq!(slew.compare(at(0), 30_000).add_us, 0);
        assert_eq!(slew.compare(at(1), 30_000).add_us, 500);
        assert_eq!(slew.compare(at(3), -30_000).add_us, -1_000);
        assert_eq!(slew.compare(at(4), 120).add_us, 120);
    }

    #[test]
    fn a_jump_is_not_followed_and_said_once_a_minute() {
        let mut slew = Slew::default();
        slew.compare(at(0), 0);
        let first = slew.compare(at(1), 61_000_000);
        assert_eq!(first.add_us, 0);
        assert_eq!(first.jump_ms, Some(61_000));
        assert_eq!(first.say, Some(Say::Jumped(61_000)));
        assert_eq!(slew.compare(at(2), 61_000_000).say, None);
        assert_eq!(
            slew.compare(at(61), -3_600_000_000).say,
            Some(Say::Jumped(-3_600_000))
        );
    }

    #[test]
    fn a_clock_that_comes_back_is_followed_again() {
        let mut slew = Slew::default();
        slew.compare(at(0), 61_000_000);
        let back = slew.compare(at(1), 1_000);
        assert_eq!(back.jump_ms, None);
        assert_eq!(back.say, Some(Say::Back));
        assert_eq!(back.add_us, 500);
        assert_eq!(slew.compare(at(2), 0).say, None);
    }

    #[test]
    fn the_pair_never_moves_backwards() {
        let clock = SystemClock::new();
        let mut last = clock.now();
        for _ in 0..10_000 {
            let now = clock.now();
            assert!(now.mono >= last.mono && now.unix_ms >= last.unix_ms);
            last = now;
        }
        assert_eq!(clock.state(), ClockState::Steady);
    }
}
