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

    /// Room for a body of `size` bytes, if all bodies stay within `limit` then. The first one always fits.
    pub(super) fn take(self: &Arc<Reserve>, size: usize, limit: u64) -> Option<Share> {
        let bytes = size as u64 + OVERHEAD_BYTES;
        let before = self.0.fetch_add(bytes, Ordering::Relaxed);
        let share = Share {
            reserve: Arc::clone(self),
            bytes,
        };
        (before == 0 || before.saturating_add(bytes) <= limit).then_some(share)
    }
}

/// A share of the reserve; dropping it gives it back.
pub(super) struct Share {
    reserve: Arc<Reserve>,
    bytes: u64,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.reserve.0.fetch_sub(self.bytes, Ordering::Relaxed);
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
        let limit = 2 * (OVERHEAD_BYTES + 100);
        let first = reserve.take(100, limit).unwrap();
        let second = reserve.take(100, limit).unwrap();
        assert!(reserve.take(100, limit).is_none());
        assert_eq!(reserve.used(), limit);
        drop(first);
        assert!(reserve.take(100, limit).is_some());
        drop(second);
        assert_eq!(reserve.used(), 0);
    }

    #[test]
    fn one_body_larger_than_the_reserve_still_gets_through_alone() {
        let reserve = Arc::new(Reserve::default());
        let share = reserve.take(10_000, 1).unwrap();
        assert!(reserve.take(0, 1).is_none());
        drop(share);
        assert_eq!(reserve.used(), 0);
    }
}
