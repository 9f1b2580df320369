//! The only place where the client reads clocks and rolls dice. Everything else is handed the time.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bellwire_protocol::Id;
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use tokio::time::Instant;

/// Monotonic milliseconds since the client was built, and chance that is seeded by the operating system.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
    chance: Mutex<StdRng>,
}

impl Clock {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            chance: Mutex::new(StdRng::from_os_rng()),
        }
    }

    /// Milliseconds since the start. Stands still while the machine sleeps, on Linux.
    pub(crate) fn now_ms(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    /// The moment at which [`now_ms`](Self::now_ms) will be `ms`.
    pub(crate) fn at(&self, ms: u64) -> Instant {
        // Far futures are as good as a day: whoever waits looks again.
        self.start + Duration::from_millis(ms.min(self.now_ms() + 86_400_000))
    }

    /// Wall time in Unix milliseconds, only for names of files and ages of advice. It may jump.
    pub(crate) fn wall_ms(&self) -> u64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        since.map_or(0, |since| since.as_millis() as u64)
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
