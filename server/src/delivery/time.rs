//! Time, as it is handed in: sampled once per turn, never read here.

use std::ops::{Add, Sub};
use std::time::Duration;

/// Microseconds since this run began; only ever moves forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Mono(pub u64);

impl Add<Duration> for Mono {
    type Output = Mono;

    fn add(self, span: Duration) -> Mono {
        Mono(
            self.0
                .saturating_add(u64::try_from(span.as_micros()).unwrap_or(u64::MAX)),
        )
    }
}

impl Sub for Mono {
    type Output = Duration;

    fn sub(self, earlier: Mono) -> Duration {
        Duration::from_micros(self.0.saturating_sub(earlier.0))
    }
}

/// One moment, in both clocks.
///
/// Waiting and measuring use `mono`; TTLs use `unix_ms`, because they outlive the process. Within a run
/// `unix_ms` is the start plus the monotonic time, slewed, so that the pair converts one into the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// Monotonic time of this run.
    pub mono: Mono,
    /// Unix time in milliseconds.
    pub unix_ms: u64,
}

impl Now {
    /// The monotonic moment at which the calendar will show `unix_ms`; now if that has passed.
    #[must_use]
    pub fn mono_at(&self, unix_ms: u64) -> Mono {
        self.mono + Duration::from_millis(unix_ms.saturating_sub(self.unix_ms))
    }
}
