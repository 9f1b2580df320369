//! The only place where the client reads clocks and rolls dice. Everything else is handed the time.
//!
//! Time goes on while the machine sleeps: a notification that waited for the app over night has expired, and a connection is
//! as old as it is. Where the system has no such clock, it stands still meanwhile.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bellwire_protocol::Id;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::time::Instant;

use crate::testing;

/// How often a waiting client looks whether the machine slept. The system's timers stand still while it sleeps, so nothing
/// else would tell.
const LOOK_EVERY_MS: u64 = 5_000;

/// Less than this is no sleep: the two clocks are read one after the other.
const SLEPT_MIN_MS: u64 = 2_000;

/// Milliseconds since the client was built, and chance that is seeded by the operating system.
#[derive(Debug)]
pub(crate) struct Clock {
    source: Source,
    chance: Mutex<StdRng>,
}

#[derive(Debug)]
enum Source {
    System {
        /// Without sleep.
        awake: Instant,
        /// With sleep, in milliseconds of the system.
        all_ms: u64,
    },
    Manual(testing::Clock),
}

/// When to look at the surroundings again.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NextLook(u64);

impl Clock {
    pub(crate) fn new() -> Self {
        Self::from(Source::System {
            awake: Instant::now(),
            all_ms: system_ms().unwrap_or(0),
        })
    }

    pub(crate) fn manual(clock: testing::Clock) -> Self {
        Self::from(Source::Manual(clock))
    }

    fn from(source: Source) -> Self {
        Self {
            source,
            chance: Mutex::new(StdRng::from_os_rng()),
        }
    }

    /// Milliseconds since the start, those included in which the machine slept.
    pub(crate) fn now_ms(&self) -> u64 {
        match &self.source {
            Source::System { awake, all_ms } => {
                let awake_ms = awake.elapsed().as_millis() as u64;
                // Never less: the two are read one after the other, and the second may have a coarser grain.
                system_ms().map_or(awake_ms, |now| now.saturating_sub(*all_ms).max(awake_ms))
            }
            Source::Manual(clock) => clock.now_ms(),
        }
    }

    /// How much of that the machine slept, as far as can be known.
    pub(crate) fn slept_ms(&self) -> u64 {
        match &self.source {
            Source::System { awake, all_ms } => {
                let awake_ms = awake.elapsed().as_millis() as u64;
                system_ms().map_or(0, |now| {
                    now.saturating_sub(*all_ms).saturating_sub(awake_ms)
                })
            }
            Source::Manual(clock) => clock.slept_ms(),
        }
    }

    /// Waits until [`now_ms`](Self::now_ms) is `ms`. May be late by the time that the machine sleeps: whoever waits for long
    /// looks for sleep as well ([`look_again`](Self::look_again)).
    pub(crate) async fn sleep_until(&self, ms: u64) {
        match &self.source {
            Source::System { .. } => {
                // Far futures are as good as a day: whoever waits looks again.
                let wait_ms = ms.saturating_sub(self.now_ms()).min(86_400_000);
                tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            }
            Source::Manual(clock) => clock.reached(ms).await,
        }
    }

    /// When the surroundings are looked at for the first time.
    pub(crate) fn first_look(&self) -> NextLook {
        NextLook(match &self.source {
            Source::System { .. } => self.now_ms() + LOOK_EVERY_MS,
            Source::Manual(clock) => clock.moves(),
        })
    }

    /// Waits until it is time to look at the surroundings: every few seconds, or (by a manual clock) when it was moved. May be
    /// dropped and asked again as often as one likes.
    pub(crate) async fn look_again(&self, next: &mut NextLook) {
        match &self.source {
            Source::System { .. } => {
                self.sleep_until(next.0).await;
                next.0 = self.now_ms() + LOOK_EVERY_MS;
            }
            Source::Manual(clock) => next.0 = clock.moved_since(next.0).await,
        }
    }

    /// Whether a sum of sleep is long enough to be one.
    pub(crate) const fn is_sleep(slept_ms: u64) -> bool {
        slept_ms >= SLEPT_MIN_MS
    }

    /// Wall time in Unix milliseconds, only for names of files and ages of advice. It may jump.
    pub(crate) fn wall_ms(&self) -> u64 {
        match &self.source {
            Source::System { .. } => wall_ms(),
            Source::Manual(clock) => clock.wall_ms(),
        }
    }

    /// A random number of `0..=max`.
    pub(crate) fn up_to(&self, max: u64) -> u64 {
        self.chance().random_range(0..=max)
    }

    /// 128 random bits.
    pub(crate) fn id(&self) -> Id {
        let mut bytes = [0; 16];
        self.chance().fill_bytes(&mut bytes);
        Id::from_bytes(bytes)
    }

    fn chance(&self) -> std::sync::MutexGuard<'_, StdRng> {
        self.chance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wall time in Unix milliseconds.
pub(crate) fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as u64)
}

/// A clock of the system that goes on while the machine sleeps.
#[cfg(any(target_os = "linux", target_os = "android"))]
fn system_ms() -> Option<u64> {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let seconds = u64::try_from(now.tv_sec).ok()?;
    let fraction = u64::try_from(now.tv_nsec).ok()?;
    Some(seconds * 1_000 + fraction / 1_000_000)
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn system_ms() -> Option<u64> {
    None
}
