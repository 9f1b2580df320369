//! When to come back: full jitter over a doubling ceiling, unless the server said when.
//!
//! The policy is pure: it is handed the outcome of a session and a random number, and answers with a wait.

use std::time::Duration;

use bellwire_protocol::{ReconnectWhen, backoff_ceiling_ms};

/// A session that stood this long was a success, in milliseconds: the next failure counts from one again. A server that
/// accepts and drops at once must not be hammered.
pub(crate) const STABLE_MS: u64 = 60_000;

/// Counts failures in a row.
#[derive(Debug, Default)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// What to wait after a session that stood for `stood_ms` (`None`: there was none). `up_to(max)` answers a random number
    /// of `0..=max`. `None`: do not come back.
    pub fn wait(
        &mut self,
        when: ReconnectWhen,
        stood_ms: Option<u64>,
        up_to: impl FnOnce(u64) -> u64,
    ) -> Option<Duration> {
        if stood_ms.is_some_and(|stood| stood >= STABLE_MS) {
            self.failures = 0;
        }
        let wait_ms = match when {
            ReconnectWhen::Never => return None,
            ReconnectWhen::Within { min_ms, max_ms } => {
                // The server knows best, and it was no failure.
                self.failures = 0;
                min_ms.saturating_add(up_to(max_ms.saturating_sub(min_ms)))
            }
            ReconnectWhen::Backoff { floor_ms } => {
                let ceiling = backoff_ceiling_ms(self.failures);
                self.failures = self.failures.saturating_add(1);
                floor_ms.saturating_add(up_to(ceiling))
            }
        };
        Some(Duration::from_millis(wait_ms))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const LOST: ReconnectWhen = ReconnectWhen::Backoff { floor_ms: 0 };
    const LATER: ReconnectWhen = ReconnectWhen::Backoff { floor_ms: 2_000 };

    /// A row of ends, and the shortest and longest wait after each in milliseconds.
    fn check(ends: &[(ReconnectWhen, Option<u64>)], expected: &[Option<(u128, u128)>]) {
        let (mut least, mut most) = (Backoff::default(), Backoff::default());
        let found: Vec<_> = ends
            .iter()
            .map(|&(when, stood)| {
                let shortest = least.wait(when, stood, |_| 0)?.as_millis();
                let longest = most.wait(when, stood, |max| max)?.as_millis();
                Some((shortest, longest))
            })
            .collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn failures_in_a_row_double_the_ceiling_up_to_five_minutes() {
        check(
            &[(LOST, None); 11],
            &[1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300].map(|seconds| Some((0, seconds * 1_000))),
        );
    }

    #[test]
    fn a_session_that_stood_a_minute_starts_the_row_again_and_a_short_one_does_not() {
        check(
            &[
                (LOST, None),
                (LOST, None),
                (LOST, Some(59_999)),
                (LOST, Some(60_000)),
                (LOST, None),
            ],
            &[
                Some((0, 1_000)),
                Some((0, 2_000)),
                Some((0, 4_000)),
                Some((0, 1_000)),
                Some((0, 2_000)),
            ],
        );
    }

    #[test]
    fn the_server_says_when_and_that_starts_the_row_again() {
        let drain = ReconnectWhen::Within {
            min_ms: 500,
            max_ms: 20_000,
        };
        let replaced = ReconnectWhen::Within {
            min_ms: 60_000,
            max_ms: 60_000,
        };
        check(
            &[
                (LOST, None),
                (LOST, None),
                (drain, Some(5)),
                (LOST, None),
                (replaced, Some(5)),
            ],
            &[
                Some((0, 1_000)),
                Some((0, 2_000)),
                Some((500, 20_000)),
                Some((0, 1_000)),
                Some((60_000, 60_000)),
            ],
        );
    }

    #[test]
    fn later_has_a_floor_and_never_is_never() {
        check(
            &[(LATER, None), (LATER, None), (ReconnectWhen::Never, None)],
            &[Some((2_000, 3_000)), Some((2_000, 4_000)), None],
        );
    }
}
