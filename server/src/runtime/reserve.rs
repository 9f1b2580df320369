//! The memory reserve for bodies in flight: taken when a ping comes in, given back when its last mailbox lets go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What a notification costs besides its content: itself, its row, its frame.
const OVERHEAD_BYTES: u64 = 512;

/// How much of the reserve is used.
#[derive(Default)]
pub(super) struct Reserve(AtomicU64);

impl Reserve {
    /// Bytes used.
    pub(super) fn used(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Room for a body of `size` bytes of an app, whose use is counted in `of`. `limits`: what all bodies and what those of the app may
    /// take together. The first one of all always fits.
    pub(super) fn take(
        self: &Arc<Reserve>,
        of: &Arc<AtomicU64>,
        size: usize,
        (all, own): (u64, u64),
    ) -> Option<Share> {
        let bytes = size as u64 + OVERHEAD_BYTES;
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        let before_own = of.fetch_add(bytes, Ordering::Relaxed);
        let share = Share {
            reserve: Arc::clone(self),
            of: Arc::clone(of),
            bytes,
        };
        let fits = |before: u64, limit| before == 0 || before.saturating_add(bytes) <= limit;
        (fits(before, all) && fits(before_own, own)).then_some(share)
    }
}

/// A share of the reserve; dropping it gives it back.
pub(super) struct Share {
    reserve: Arc<Reserve>,
    of: Arc<AtomicU64>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.reserve.0.fetch_sub(self.bytes, Ordering::Relaxed);
        self.of.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// Room for a request's body while it is read. Dropping it gives it back.
pub struct BodyShare {
    /// Held for what dropping it does.
    _share: Share,
}

impl BodyShare {
    pub(super) fn new(share: Share) -> BodyShare {
        BodyShare { _share: share }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_full_reserve_refuses_and_everything_comes_back() {
        let reserve = Arc::new(Reserve::default());
        let app = Arc::default();
        let limit = 2 * (OVERHEAD_BYTES + 100);
        let limits = (limit, limit);
        let first = reserve.take(&app, 100, limits).unwrap();
        let second = reserve.take(&app, 100, limits).unwrap();
        assert!(reserve.take(&app, 100, limits).is_none());
        assert_eq!(reserve.used(), limit);
        drop(first);
        assert!(reserve.take(&app, 100, limits).is_some());
        drop(second);
        assert_eq!(reserve.used(), 0);
        assert_eq!(app.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn one_app_leaves_the_others_something() {
        let reserve = Arc::new(Reserve::default());
        let (one, other) = (Arc::default(), Arc::default());
        let each = OVERHEAD_BYTES + 100;
        let limits = (4 * each, 3 * each);
        let mut held = Vec::new();
        while let Some(share) = reserve.take(&one, 100, limits) {
            held.push(share);
        }
        assert_eq!(held.len(), 3);
        let rest = reserve.take(&other, 100, limits);
        assert!(rest.is_some());
        assert!(reserve.take(&other, 100, limits).is_none(), "it is full");
        drop((held, rest));
        assert_eq!(reserve.used(), 0);
    }

    #[test]
    fn one_body_larger_than_the_reserve_still_gets_through_alone() {
        let reserve = Arc::new(Reserve::default());
        let app = Arc::default();
        let share = reserve.take(&app, 10_000, (1, 1)).unwrap();
        assert!(reserve.take(&app, 0, (1, 1)).is_none());
        drop(share);
        assert_eq!(reserve.used(), 0);
    }
}
