//! How many pings one API key may send: a rate with a burst, in one atomic number.

use std::sync::atomic::{AtomicU64, Ordering};

use super::settings::Limits;
use crate::delivery::Mono;

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const NANOS_PER_MICRO: u64 = 1_000;

/// The moment, in nanoseconds of this run, at which everything that was taken so far would have been taken at an even
/// rate (the theoretical arrival time of the generic cell rate algorithm). It may run ahead of now by the burst.
#[derive(Debug, Default)]
pub(super) struct Rate(AtomicU64);

impl Rate {
    /// Takes one ping, unless the burst is used up; then nothing changes.
    pub(super) fn take(&self, now: Mono, limits: &Limits) -> bool {
        let now = now.0.saturating_mul(NANOS_PER_MICRO);
        let each = NANOS_PER_SECOND / u64::from(limits.pings_per_second.max(1));
        let ahead = each.saturating_mul(u64::from(limits.ping_burst.max(1)));
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |even| {
                let next = even.max(now).saturating_add(each);
                (next <= now.saturating_add(ahead)).then_some(next)
            })
            .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rate: &Rate, at_us: u64, times: u32, limits: &Limits) -> usize {
        (0..times)
            .filter(|_| rate.take(Mono(at_us), limits))
            .count()
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_rate() {
        let limits = Limits {
            pings_per_second: 10,
            ping_burst: 5,
            ..Limits::default()
        };
        let rate = Rate::default();
        assert_eq!(taken(&rate, 0, 100, &limits), 5);
        // One every 100 ms.
        assert_eq!(taken(&rate, 99_999, 100, &limits), 0);
        assert_eq!(taken(&rate, 100_000, 100, &limits), 1);
        assert_eq!(taken(&rate, 350_000, 100, &limits), 2);
        // A pause gives the burst back, and no more than that.
        assert_eq!(taken(&rate, 60_000_000, 100, &limits), 5);
    }

    #[test]
    fn the_default_never_stops_an_even_50_000_a_second() {
        let limits = Limits::default();
        let rate = Rate::default();
        for ping in 0..200_000u64 {
            assert!(rate.take(Mono(ping * 20), &limits));
        }
    }

    #[test]
    fn settings_of_nothing_still_let_one_through() {
        let limits = Limits {
            pings_per_second: 0,
            ping_burst: 0,
            ..Limits::default()
        };
        assert_eq!(taken(&Rate::default(), 0, 10, &limits), 1);
    }
}
