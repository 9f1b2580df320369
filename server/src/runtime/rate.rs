//! How many pings may come: rates with a burst, each in one number.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::settings::Limits;
use crate::delivery::{AppId, DeviceId, Mono};

const NANOS_PER_SECOND: u64 = 1_000_000_000;
const NANOS_PER_MICRO: u64 = 1_000;
const NANOS_PER_DAY: u64 = 86_400 * NANOS_PER_SECOND;

/// A rate: one each so often, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pace {
    /// Nanoseconds; 0: no limit.
    each: u64,
    burst: u64,
}

impl Pace {
    /// Everything is let through.
    pub(super) const FREE: Pace = Pace { each: 0, burst: 0 };

    /// So many in a second in the long run, and so many at once; at least one of each.
    pub(super) fn per_second(rate: u32, burst: u32) -> Pace {
        Pace {
            each: NANOS_PER_SECOND / u64::from(rate.max(1)),
            burst: u64::from(burst.max(1)),
        }
    }

    /// So many at once, refilled evenly over 24 hours; 0: no limit.
    pub(super) fn per_day(count: u64) -> Pace {
        match NANOS_PER_DAY.checked_div(count) {
            None => Pace::FREE,
            Some(each) => Pace {
                each: each.max(1),
                burst: count,
            },
        }
    }

    /// What one API key may send.
    pub(super) fn of_key(limits: &Limits) -> Pace {
        Pace::per_second(limits.pings_per_second, limits.ping_burst)
    }

    /// What one device may be sent.
    pub(super) fn of_device(limits: &Limits) -> Pace {
        match limits.device_pings_per_second {
            0 => Pace::FREE,
            rate => Pace::per_second(rate, limits.device_ping_burst),
        }
    }

    /// Whether there is no limit.
    pub(super) fn is_free(self) -> bool {
        self.each == 0
    }

    /// How many may come at once, after a pause.
    pub(super) fn burst(self) -> u64 {
        self.burst
    }

    /// In how many seconds, rounded up, a burst that was used up is whole again.
    pub(super) fn window_s(self) -> u64 {
        self.ahead().div_ceil(NANOS_PER_SECOND)
    }

    fn ahead(self) -> u64 {
        self.each.saturating_mul(self.burst)
    }

    /// One more after what was taken until `even`, at `now`: the next `even`, or how long it is too early.
    fn step(self, even: u64, now: u64) -> Result<u64, u64> {
        let next = even.max(now).saturating_add(self.each);
        match next.saturating_sub(now.saturating_add(self.ahead())) {
            0 => Ok(next),
            early => Err(early),
        }
    }
}

fn nanos(now: Mono) -> u64 {
    now.0.saturating_mul(NANOS_PER_MICRO)
}

/// The moment, in nanoseconds of this run, at which everything that was taken so far would have been taken at an even
/// rate (the theoretical arrival time of the generic cell rate algorithm). It may run ahead of now by the burst.
#[derive(Debug, Default)]
pub(super) struct Rate(AtomicU64);

impl Rate {
    /// Takes one. The error is how long until there is one again; nothing changes then.
    pub(super) fn take(&self, now: Mono, pace: Pace) -> Result<(), Duration> {
        if pace.is_free() {
            return Ok(());
        }
        let now = nanos(now);
        self.0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |even| {
                pace.step(even, now).ok()
            })
            .map(|_| ())
            .map_err(|even| Duration::from_nanos(pace.step(even, now).err().unwrap_or_default()))
    }

    /// How many are left now, and in how many seconds, rounded up, all of them are there again.
    pub(super) fn left(&self, now: Mono, pace: Pace) -> (u64, u64) {
        let debt = self.0.load(Ordering::Relaxed).saturating_sub(nanos(now));
        let left = pace
            .ahead()
            .saturating_sub(debt)
            .checked_div(pace.each)
            .unwrap_or_default();
        (left, debt.div_ceil(NANOS_PER_SECOND))
    }
}

/// A [`Pace`] that can be changed while it is used. Whoever reads between two writes sees half of each, for one ping.
#[derive(Debug)]
pub(super) struct LivePace {
    each: AtomicU64,
    burst: AtomicU64,
}

impl LivePace {
    pub(super) fn new(pace: Pace) -> LivePace {
        LivePace {
            each: AtomicU64::new(pace.each),
            burst: AtomicU64::new(pace.burst),
        }
    }

    pub(super) fn set(&self, pace: Pace) {
        self.each.store(pace.each, Ordering::Relaxed);
        self.burst.store(pace.burst, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> Pace {
        Pace {
            each: self.each.load(Ordering::Relaxed),
            burst: self.burst.load(Ordering::Relaxed),
        }
    }
}

/// Devices for which an entry is kept before anybody looks which of them are worth it.
const LOOK_AT: usize = 1_024;

/// The rates of the devices of one shard. Kept only for those that were sent something in the last moments: an entry whose time has
/// passed says the same as none.
#[derive(Debug)]
pub(super) struct DeviceRates {
    /// By app as well: whoever names a device of another app uses nothing of its rate up.
    even: HashMap<(AppId, DeviceId), u64>,
    /// Entries at which those that say nothing go.
    look_at: usize,
}

impl DeviceRates {
    pub(super) fn new() -> DeviceRates {
        DeviceRates {
            even: HashMap::new(),
            look_at: LOOK_AT,
        }
    }

    /// Takes one for a device; `false`: it is too early, and nothing changes.
    pub(super) fn take(&mut self, app: AppId, device: DeviceId, now: Mono, pace: Pace) -> bool {
        if pace.is_free() {
            return true;
        }
        let now = nanos(now);
        if self.even.len() >= self.look_at {
            self.even.retain(|_, even| *even > now);
            self.look_at = (2 * self.even.len()).max(LOOK_AT);
            self.even.shrink_to(self.look_at);
        }
        let even = self.even.entry((app, device)).or_default();
        match pace.step(*even, now) {
            Ok(next) => {
                *even = next;
                true
            }
            Err(_) => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(rate: &Rate, at_us: u64, times: u32, pace: Pace) -> usize {
        (0..times)
            .filter(|_| rate.take(Mono(at_us), pace).is_ok())
            .count()
    }

    #[test]
    fn a_burst_is_let_through_and_then_the_rate() {
        let pace = Pace::per_second(10, 5);
        let rate = Rate::default();
        assert_eq!(rate.left(Mono(0), pace), (5, 0));
        assert_eq!(taken(&rate, 0, 100, pace), 5);
        assert_eq!(rate.left(Mono(0), pace), (0, 1));
        // One every 100 ms.
        assert_eq!(taken(&rate, 99_999, 100, pace), 0);
        assert_eq!(
            rate.take(Mono(60_000), pace),
            Err(Duration::from_millis(40))
        );
        assert_eq!(taken(&rate, 100_000, 100, pace), 1);
        assert_eq!(taken(&rate, 350_000, 100, pace), 2);
        assert_eq!(rate.left(Mono(450_000), pace), (1, 1));
        // A pause gives the burst back, and no more than that.
        assert_eq!(rate.left(Mono(60_000_000), pace), (5, 0));
        assert_eq!(taken(&rate, 60_000_000, 100, pace), 5);
    }

    #[test]
    fn the_default_never_stops_an_even_50_000_a_second() {
        let pace = Pace::of_key(&Limits::default());
        assert_eq!((pace.burst(), pace.window_s()), (100_000, 2));
        let rate = Rate::default();
        for ping in 0..200_000u64 {
            assert!(rate.take(Mono(ping * 20), pace).is_ok());
        }
    }

    #[test]
    fn settings_of_nothing_still_let_one_through() {
        assert_eq!(taken(&Rate::default(), 0, 10, Pace::per_second(0, 0)), 1);
    }

    #[test]
    fn a_days_allowance_is_refilled_evenly() {
        let pace = Pace::per_day(24);
        assert_eq!((pace.burst(), pace.window_s()), (24, 86_400));
        let hour = 3_600_000_000;
        let rate = Rate::default();
        assert_eq!(taken(&rate, 0, 100, pace), 24);
        assert_eq!(rate.take(Mono(0), pace), Err(Duration::from_secs(3_600)));
        assert_eq!(taken(&rate, 3 * hour, 100, pace), 3);
        let none = Pace::per_day(0);
        assert!(none.is_free());
        assert_eq!(taken(&rate, 3 * hour, 100, none), 100);
        // More in a day than there are nanoseconds is no limit that anybody meets, and no division by zero.
        assert_eq!(
            taken(&Rate::default(), 0, 100, Pace::per_day(u64::MAX)),
            100
        );
    }

    #[test]
    fn devices_have_a_rate_each_and_are_forgotten_when_it_says_nothing() {
        let pace = Pace::per_second(1_000, 2);
        let mut rates = DeviceRates::new();
        let device = |number: u32| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.to_be_bytes());
            DeviceId(id)
        };
        assert!(rates.take(AppId::DEFAULT, device(0), Mono(0), pace));
        assert!(rates.take(AppId::DEFAULT, device(0), Mono(0), pace));
        assert!(!rates.take(AppId::DEFAULT, device(0), Mono(0), pace));
        assert!(rates.take(AppId::DEFAULT, device(1), Mono(0), pace));
        // Somebody else who names it uses nothing up.
        assert!(rates.take(AppId(7), device(0), Mono(0), pace));
        assert!(rates.take(AppId::DEFAULT, device(0), Mono(1_000), pace));
        for number in 0..100_000 {
            assert!(rates.take(
                AppId::DEFAULT,
                device(number),
                Mono(u64::from(number) * 100 + 10_000),
                pace
            ));
        }
        assert!(rates.even.len() <= LOOK_AT, "{}", rates.even.len());
        assert!(rates.even.capacity() <= 8 * LOOK_AT);
    }
}
