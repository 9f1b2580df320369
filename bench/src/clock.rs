//! One clock for all processes of a run: the machine's monotonic one, in nanoseconds.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds in a second.
pub(crate) const SECOND: u64 = 1_000_000_000;

/// Now, in nanoseconds since some moment that all processes of this machine share.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The kernel counts both up from 0.
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * SECOND + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// How long it is until `moment`; zero if it has passed.
pub(crate) fn until(moment: u64) -> Duration {
    Duration::from_nanos(moment.saturating_sub(now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let before = now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(now() >= before + 2_000_000);
        assert_eq!(until(before), Duration::ZERO);
        assert!(until(now() + SECOND) > Duration::from_millis(500));
    }
}
