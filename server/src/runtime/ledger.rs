//! What became of recent pings, in bounded memory.
//!
//! It answers for the last moments at once and without the disk; for everything before, and after a restart, there are
//! the store and its history of outcomes. The oldest pings give way first. The ledger is cut into stripes by ping, each
//! with its own lock, held for one look-up.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

use super::api::PairView;
use super::locked;
use crate::delivery::{AppId, DeviceId, Outcome, PingId};
use crate::ports::PairState;

/// Stripes: more than cores, so that shards seldom meet at one lock.
const STRIPES: usize = 16;
/// What a ping costs besides its pairs: entry, key, place in the ring, and the slack of a hash map.
const PING_BYTES: u64 = 160;
/// What each notification costs.
const PAIR_BYTES: u64 = size_of::<PairView>() as u64;

/// Notifications of one ping that are kept: a ping to everyone must not push all others out. Of the rest the store and its
/// history know.
const PAIRS_PER_PING: usize = 4_096;

/// Recent pings and their outcomes.
pub(super) struct Ledger {
    stripes: Vec<Mutex<Stripe>>,
    /// Most notifications in one stripe.
    pairs_max: u64,
    /// Most bytes in one stripe.
    bytes_max: u64,
    pairs: AtomicU64,
    bytes: AtomicU64,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Stripe {
    pings: HashMap<PingId, Entry>,
    /// Oldest first.
    order: VecDeque<PingId>,
    pairs: u64,
    bytes: u64,
    /// What of the two is in the ledger's own figures.
    published_pairs: u64,
    published_bytes: u64,
}

struct Entry {
    app: AppId,
    /// How many wait.
    open: u32,
    /// 0: not known.
    accepted_ms: u64,
    pairs: Pairs,
    watchers: Option<Arc<Notify>>,
}

/// Sorted by device. Most pings have one.
enum Pairs {
    None,
    One(PairView),
    Many(Vec<PairView>),
}

impl Pairs {
    fn as_slice(&self) -> &[PairView] {
        match self {
            Pairs::None => &[],
            Pairs::One(pair) => std::slice::from_ref(pair),
            Pairs::Many(pairs) => pairs,
        }
    }

    fn find(&mut self, device: DeviceId) -> Option<&mut PairView> {
        match self {
            Pairs::None => None,
            Pairs::One(pair) => (pair.device == device).then_some(pair),
            Pairs::Many(pairs) => {
                let index = pairs
                    .binary_search_by_key(&device, |pair| pair.device)
                    .ok()?;
                pairs.get_mut(index)
            }
        }
    }

    /// Adds one that is not there yet.
    fn add(&mut self, pair: PairView) {
        match self {
            Pairs::None => *self = Pairs::One(pair),
            Pairs::One(first) => {
                let mut pairs = vec![*first, pair];
                pairs.sort_unstable_by_key(|pair| pair.device);
                *self = Pairs::Many(pairs);
            }
            Pairs::Many(pairs) => {
                let index = pairs.partition_point(|known| known.device < pair.device);
                pairs.insert(index, pair);
            }
        }
    }
}

/// What the ledger made of an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Noted {
    /// It had an outcome before, which stays.
    pub(super) repeated: bool,
    /// When it was accepted, if that is known.
    pub(super) accepted_ms: Option<u64>,
}

/// What the ledger knows of one ping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) app: AppId,
    /// How many wait, over all devices.
    pub(super) open: u32,
    /// By device.
    pub(super) pairs: Vec<PairView>,
}

impl Ledger {
    /// An empty ledger of at most so many notifications and bytes.
    pub(super) fn new(pairs_max: usize, bytes_max: u64) -> Ledger {
        Ledger {
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            pairs_max: (pairs_max as u64 / STRIPES as u64).max(1),
            bytes_max: (bytes_max / STRIPES as u64).max(PING_BYTES + PAIR_BYTES),
            pairs: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
        }
    }

    /// Notifications held.
    pub(super) fn entries(&self) -> u64 {
        self.pairs.load(Ordering::Relaxed)
    }

    /// Bytes held.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Pings that gave way.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// A ping was accepted that has no device (yet).
    pub(super) fn open(&self, app: AppId, ping: PingId, accepted_ms: u64) {
        let mut stripe = locked(self.stripe(ping));
        stripe.entry(app, ping, accepted_ms);
        self.settle(stripe);
    }

    /// One notification is promised. An outcome that is known already stays.
    pub(super) fn accepted(
        &self,
        app: AppId,
        ping: PingId,
        device: DeviceId,
        accepted_ms: u64,
        expires_ms: u64,
    ) {
        let mut stripe = locked(self.stripe(ping));
        let entry = stripe.entry(app, ping, accepted_ms);
        if entry.pairs.find(device).is_some() || entry.pairs.as_slice().len() >= PAIRS_PER_PING {
            return;
        }
        entry.open += 1;
        entry.pairs.add(PairView {
            device,
            state: PairState::Waiting { expires_ms },
        });
        stripe.grown();
        self.settle(stripe);
    }

    /// One notification ended. `stored`: the store knows that too, so an unknown ping need not be remembered.
    /// `accepted_ms`: when, if this is its acceptance as well.
    #[expect(clippy::too_many_arguments, reason = "the members of one effect")]
    pub(super) fn ended(
        &self,
        app: AppId,
        ping: PingId,
        device: DeviceId,
        outcome: Outcome,
        at_ms: u64,
        stored: bool,
        accepted_ms: Option<u64>,
    ) -> Noted {
        let mut stripe = locked(self.stripe(ping));
        if stored && accepted_ms.is_none() && !stripe.pings.contains_key(&ping) {
            return Noted {
                repeated: false,
                accepted_ms: None,
            };
        }
        let entry = stripe.entry(app, ping, accepted_ms.unwrap_or(0));
        let full = entry.pairs.as_slice().len() >= PAIRS_PER_PING;
        let state = PairState::Ended { outcome, at_ms };
        let mut added = false;
        let repeated = match entry.pairs.find(device) {
            Some(pair) => match pair.state {
                PairState::Waiting { .. } => {
                    pair.state = state;
                    entry.open = entry.open.saturating_sub(1);
                    false
                }
                PairState::Ended { .. } => true,
            },
            None if full => false,
            None => {
                entry.pairs.add(PairView { device, state });
                added = true;
                false
            }
        };
        let noted = Noted {
            repeated,
            accepted_ms: Some(entry.accepted_ms).filter(|&at| at > 0),
        };
        if entry.open == 0
            && let Some(watchers) = &entry.watchers
        {
            watchers.notify_waiters();
        }
        if added {
            stripe.grown();
            self.settle(stripe);
        }
        noted
    }

    /// Whether a notification is known to have ended.
    pub(super) fn has_ended(&self, ping: PingId, device: DeviceId) -> bool {
        let mut stripe = locked(self.stripe(ping));
        let pair = stripe
            .pings
            .get_mut(&ping)
            .and_then(|entry| entry.pairs.find(device));
        pair.is_some_and(|pair| matches!(pair.state, PairState::Ended { .. }))
    }

    /// What is known of a ping, its devices after `after`, at most `limit`. What ended before `from_ms` is left out, and
    /// a ping of which nothing else is known is not known.
    pub(super) fn known(
        &self,
        ping: PingId,
        from_ms: u64,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Option<Known> {
        let stripe = locked(self.stripe(ping));
        let entry = stripe.pings.get(&ping)?;
        let pairs = entry.pairs.as_slice();
        let start = after.map_or(0, |after| {
            pairs.partition_point(|pair| pair.device <= after)
        });
        let kept = |pair: &&PairView| match pair.state {
            PairState::Waiting { .. } => true,
            PairState::Ended { at_ms, .. } => at_ms >= from_ms,
        };
        let empty = pairs.is_empty() && entry.accepted_ms >= from_ms;
        if !empty && !pairs.iter().any(|pair| kept(&pair)) {
            return None;
        }
        Some(Known {
            app: entry.app,
            open: entry.open,
            pairs: pairs
                .iter()
                .skip(start)
                .filter(kept)
                .take(limit)
                .copied()
                .collect(),
        })
    }

    /// What wakes when the last notification of a ping ends or the ping leaves the ledger, and how many wait now.
    /// `None`: not known.
    pub(super) fn watch(&self, ping: PingId) -> Option<(Arc<Notify>, u32)> {
        let mut stripe = locked(self.stripe(ping));
        let entry = stripe.pings.get_mut(&ping)?;
        Some((
            Arc::clone(entry.watchers.get_or_insert_default()),
            entry.open,
        ))
    }

    fn stripe(&self, ping: PingId) -> &Mutex<Stripe> {
        // Ids are random or a keyed hash, so any byte spreads them evenly.
        &self.stripes[usize::from(ping.0[0]) % STRIPES]
    }

    /// Makes room, then publishes the difference in size.
    fn settle(&self, mut stripe: std::sync::MutexGuard<'_, Stripe>) {
        while stripe.pairs > self.pairs_max || stripe.bytes > self.bytes_max {
            let Some(oldest) = stripe.order.pop_front() else {
                break;
            };
            let Some(entry) = stripe.pings.remove(&oldest) else {
                continue;
            };
            let pairs = entry.pairs.as_slice().len() as u64;
            stripe.pairs -= pairs;
            stripe.bytes -= PING_BYTES + pairs * PAIR_BYTES;
            if let Some(watchers) = entry.watchers {
                watchers.notify_waiters();
            }
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
        let (pairs, bytes) = (stripe.pairs, stripe.bytes);
        let (before_pairs, before_bytes) = (stripe.published_pairs, stripe.published_bytes);
        stripe.published_pairs = pairs;
        stripe.published_bytes = bytes;
        drop(stripe);
        // Wrapping addition of a difference: also right when it is negative.
        self.pairs
            .fetch_add(pairs.wrapping_sub(before_pairs), Ordering::Relaxed);
        self.bytes
            .fetch_add(bytes.wrapping_sub(before_bytes), Ordering::Relaxed);
    }
}

impl Stripe {
    fn entry(&mut self, app: AppId, ping: PingId, accepted_ms: u64) -> &mut Entry {
        if !self.pings.contains_key(&ping) {
            self.order.push_back(ping);
            self.bytes += PING_BYTES;
        }
        self.pings.entry(ping).or_insert_with(|| Entry {
            app,
            open: 0,
            accepted_ms,
            pairs: Pairs::None,
            watchers: None,
        })
    }

    fn grown(&mut self) {
        self.pairs += 1;
        self.bytes += PAIR_BYTES;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const APP: AppId = AppId::DEFAULT;

    fn ping(n: u8) -> PingId {
        // One stripe, so that the order of age is one order.
        let mut id = [0; 16];
        id[1] = n;
        PingId(id)
    }

    fn device(n: u8) -> DeviceId {
        DeviceId([n; 16])
    }

    #[test]
    fn the_first_outcome_wins_and_a_second_one_is_noted() {
        let ledger = Ledger::new(1_000, 1 << 20);
        ledger.accepted(APP, ping(1), device(1), 5, 100);
        let first = ledger.ended(
            APP,
            ping(1),
            device(1),
            Outcome::Acknowledged,
            7,
            false,
            None,
        );
        assert_eq!(
            first,
            Noted {
                repeated: false,
                accepted_ms: Some(5)
            }
        );
        assert!(
            ledger
                .ended(APP, ping(1), device(1), Outcome::Expired, 9, false, None)
                .repeated
        );
        let known = ledger.known(ping(1), 0, None, 10).unwrap();
        assert_eq!(known.open, 0);
        assert_eq!(
            known.pairs[0].state,
            PairState::Ended {
                outcome: Outcome::Acknowledged,
                at_ms: 7
            }
        );
    }

    #[test]
    fn pairs_stay_sorted_by_device_and_are_paged() {
        let ledger = Ledger::new(1_000, 1 << 20);
        for n in [5, 1, 3, 2, 4] {
            ledger.accepted(APP, ping(1), device(n), 1, 100);
        }
        let ids = |known: Known| {
            known
                .pairs
                .iter()
                .map(|pair| pair.device.0[0])
                .collect::<Vec<_>>()
        };
        assert_eq!(ids(ledger.known(ping(1), 0, None, 3).unwrap()), [1, 2, 3]);
        assert_eq!(
            ids(ledger.known(ping(1), 0, Some(device(3)), 3).unwrap()),
            [4, 5]
        );
        assert_eq!(ledger.known(ping(1), 0, None, 1).unwrap().open, 5);
    }

    #[test]
    fn the_oldest_pings_give_way_by_entries() {
        let ledger = Ledger::new(STRIPES * 3, 1 << 30);
        for n in 0..10 {
            ledger.accepted(APP, ping(n), device(1), 1, 100);
        }
        assert!(ledger.known(ping(6), 0, None, 1).is_none());
        assert!(ledger.known(ping(7), 0, None, 1).is_some());
        assert_eq!(ledger.entries(), 3);
        assert_eq!(ledger.bytes(), 3 * (PING_BYTES + PAIR_BYTES));
        assert_eq!(ledger.dropped(), 7);
    }

    #[test]
    fn one_large_ping_does_not_push_the_others_out() {
        let ledger = Ledger::new(STRIPES * 2 * PAIRS_PER_PING, 1 << 30);
        ledger.accepted(APP, ping(1), device(1), 1, 100);
        for number in 0..3 * PAIRS_PER_PING as u128 {
            let device = DeviceId(number.to_be_bytes());
            if number % 2 == 0 {
                ledger.accepted(APP, ping(2), device, 1, 100);
            } else {
                ledger.ended(APP, ping(2), device, Outcome::Expired, 7, false, Some(1));
            }
        }
        assert_eq!(ledger.entries(), PAIRS_PER_PING as u64 + 1);
        assert!(ledger.known(ping(1), 0, None, 1).is_some());
        assert_eq!(ledger.dropped(), 0);
    }

    #[test]
    fn the_oldest_pings_give_way_by_bytes() {
        let each = PING_BYTES + PAIR_BYTES;
        let ledger = Ledger::new(1 << 20, STRIPES as u64 * each * 2);
        for n in 0..10 {
            ledger.accepted(APP, ping(n), device(1), 1, 100);
        }
        assert_eq!(ledger.entries(), 2);
        assert_eq!(ledger.bytes(), 2 * each);
    }

    #[test]
    fn pings_without_devices_are_bounded_too() {
        let ledger = Ledger::new(1 << 20, STRIPES as u64 * (PING_BYTES * 2 + PAIR_BYTES));
        for n in 0..10 {
            ledger.open(APP, ping(n), 1);
        }
        assert!(ledger.known(ping(9), 0, None, 1).is_some());
        assert!(ledger.known(ping(0), 0, None, 1).is_none());
        assert_eq!(ledger.dropped(), 8);
    }

    #[test]
    fn an_outcome_that_the_store_has_does_not_bring_back_a_forgotten_ping() {
        let ledger = Ledger::new(1_000, 1 << 20);
        ledger.ended(
            APP,
            ping(1),
            device(1),
            Outcome::Acknowledged,
            7,
            true,
            None,
        );
        assert!(ledger.known(ping(1), 0, None, 1).is_none());
        ledger.ended(
            APP,
            ping(1),
            device(1),
            Outcome::Acknowledged,
            7,
            false,
            None,
        );
        assert!(ledger.known(ping(1), 0, None, 1).is_some());
    }

    #[tokio::test]
    async fn whoever_watches_wakes_when_the_last_one_ends() {
        let ledger = Arc::new(Ledger::new(1_000, 1 << 20));
        ledger.accepted(APP, ping(1), device(1), 1, 100);
        ledger.accepted(APP, ping(1), device(2), 1, 100);
        let (watch, open) = ledger.watch(ping(1)).unwrap();
        assert_eq!(open, 2);
        let waiting = watch.notified();
        tokio::pin!(waiting);
        waiting.as_mut().enable();
        ledger.ended(APP, ping(1), device(1), Outcome::Declined, 2, false, None);
        ledger.ended(APP, ping(1), device(2), Outcome::Declined, 2, false, None);
        waiting.await;
        assert_eq!(ledger.watch(ping(1)).unwrap().1, 0);
    }
}
