//! What apps have in their mailboxes, counted exactly, and how much they may have.
//!
//! A mailbox counts with every row that is stored or about to be, and not on its way out. Each shard adds up what changes in its own mailboxes, in a
//! cell that only it writes, so counting costs no lock, no shared cache line and no allocation; whoever wants to know adds the
//! cells up.
//!
//! What slept in the store before the run is counted by a walk over the summaries of all mailboxes, by rising id, a page at a
//! time ([`Shard::seed`](super::Shard::seed)), while everything goes on. A mailbox that wakes before the walk came by is counted
//! from its own summary, and the walk passes over it. So each is counted once, whatever happens meanwhile:
//! - a mailbox that never woke in this run is in the store as it was at the start, however old the page is;
//! - one that woke is known to its shard from then on, up to the moment at which the walk has passed.
//!
//! Until the walk is over the count is too low, never too high: nothing is refused wrongly.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize, Ordering};

use super::ids::{AppId, DeviceId};

/// What a quota of an app is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Quota {
    /// Notifications that wait in all of its mailboxes.
    Notifications,
    /// Their content bytes.
    Bytes,
    /// Devices.
    Devices,
}

impl Quota {
    /// Its name in settings, metrics and the API.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Quota::Notifications => "notifications",
            Quota::Bytes => "bytes",
            Quota::Devices => "devices",
        }
    }
}

/// What an app has, or may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Held {
    /// Notifications that wait.
    pub notifications: u64,
    /// Their content bytes.
    pub bytes: u64,
    /// Devices.
    pub devices: u64,
}

impl Held {
    /// The one that a quota is about.
    #[must_use]
    pub fn of(self, quota: Quota) -> u64 {
        match quota {
            Quota::Notifications => self.notifications,
            Quota::Bytes => self.bytes,
            Quota::Devices => self.devices,
        }
    }
}

/// A mailbox in the store, for the walk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoredMailbox {
    /// Whose.
    pub device: DeviceId,
    /// The app of the device.
    pub app: AppId,
    /// Stored notifications.
    pub count: u32,
    /// Their content bytes.
    pub bytes: u64,
}

/// What one shard has counted of one app, on a cache line of its own. May be below zero where others count the rest.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Cell {
    notifications: AtomicI64,
    bytes: AtomicI64,
    devices: AtomicI64,
}

/// One app.
#[derive(Debug)]
struct AppStock {
    /// 0: no limit.
    notifications_max: AtomicU64,
    bytes_max: AtomicU64,
    devices_max: AtomicU64,
    /// Devices that were made in this run.
    made: AtomicI64,
    /// By shard.
    cells: Box<[Cell]>,
}

impl AppStock {
    fn new(shards: usize) -> AppStock {
        AppStock {
            notifications_max: AtomicU64::new(0),
            bytes_max: AtomicU64::new(0),
            devices_max: AtomicU64::new(0),
            made: AtomicI64::new(0),
            cells: (0..shards).map(|_| Cell::default()).collect(),
        }
    }

    fn sum(&self, part: fn(&Cell) -> &AtomicI64) -> i64 {
        self.cells
            .iter()
            .map(|cell| part(cell).load(Ordering::Relaxed))
            .fold(0, i64::saturating_add)
    }

    fn held(&self) -> Held {
        let made = self.made.load(Ordering::Relaxed);
        Held {
            notifications: above_zero(self.sum(|cell| &cell.notifications)),
            bytes: above_zero(self.sum(|cell| &cell.bytes)),
            devices: above_zero(self.sum(|cell| &cell.devices).saturating_add(made)),
        }
    }

    fn limits(&self) -> Held {
        Held {
            notifications: self.notifications_max.load(Ordering::Relaxed),
            bytes: self.bytes_max.load(Ordering::Relaxed),
            devices: self.devices_max.load(Ordering::Relaxed),
        }
    }
}

/// Between two looks at different cells the sum may be below zero for a moment.
fn above_zero(sum: i64) -> u64 {
    u64::try_from(sum).unwrap_or(0)
}

/// What all apps have in their mailboxes. Shared by the shards, and by whoever looks.
#[derive(Debug, Default)]
pub struct Stock {
    apps: HashMap<AppId, AppStock>,
    /// Shards whose mailboxes the walk has not all passed.
    uncounted: AtomicUsize,
}

impl Stock {
    /// Nothing is counted yet. Apps that are not named are not counted and have no limits.
    #[must_use]
    pub fn new(apps: impl IntoIterator<Item = AppId>, shards: usize) -> Stock {
        Stock {
            apps: apps
                .into_iter()
                .map(|app| (app, AppStock::new(shards)))
                .collect(),
            uncounted: AtomicUsize::new(shards),
        }
    }

    /// Sets how much an app may have; 0: as much as it likes.
    pub fn limit(&self, app: AppId, limits: Held) {
        if let Some(stock) = self.apps.get(&app) {
            let set = |to: &AtomicU64, limit| to.store(limit, Ordering::Relaxed);
            set(&stock.notifications_max, limits.notifications);
            set(&stock.bytes_max, limits.bytes);
            set(&stock.devices_max, limits.devices);
        }
    }

    /// What an app has.
    #[must_use]
    pub fn held(&self, app: AppId) -> Held {
        self.apps.get(&app).map(AppStock::held).unwrap_or_default()
    }

    /// What it may have; 0: as much as it likes.
    #[must_use]
    pub fn limits(&self, app: AppId) -> Held {
        let limits = self.apps.get(&app).map(AppStock::limits);
        limits.unwrap_or_default()
    }

    /// Everything is counted, what was there before the run as well.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.uncounted.load(Ordering::Acquire) == 0
    }

    /// Counts one more device of an app, if it may have one. Exact: however many ask at once, none gets one too many.
    ///
    /// # Errors
    /// What it may have and what it has.
    pub fn claim_device(self: &Arc<Stock>, app: AppId) -> Result<DeviceClaim, (u64, u64)> {
        if let Some(stock) = self.apps.get(&app) {
            let mut made = stock.made.load(Ordering::Relaxed);
            loop {
                let max = stock.devices_max.load(Ordering::Relaxed);
                let has = above_zero(stock.sum(|cell| &cell.devices).saturating_add(made));
                if max > 0 && has >= max {
                    return Err((max, has));
                }
                let claimed = stock.made.compare_exchange_weak(
                    made,
                    made + 1,
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                );
                match claimed {
                    Ok(_) => break,
                    Err(other) => made = other,
                }
            }
        }
        Ok(DeviceClaim {
            stock: Some(Arc::clone(self)),
            app,
        })
    }

    fn add(&self, app: AppId, shard: usize, (notifications, bytes, devices): (i64, i64, i64)) {
        let cell = self.apps.get(&app).and_then(|app| app.cells.get(shard));
        if let Some(cell) = cell {
            // Nobody else writes it, so a load and a store do.
            let add = |to: &AtomicI64, more: i64| {
                if more != 0 {
                    let before = to.load(Ordering::Relaxed);
                    to.store(before.saturating_add(more), Ordering::Relaxed);
                }
            };
            add(&cell.notifications, notifications);
            add(&cell.bytes, bytes);
            add(&cell.devices, devices);
        }
    }
}

/// A device that is counted and not made yet: dropped, it is not counted any more.
#[derive(Debug)]
pub struct DeviceClaim {
    stock: Option<Arc<Stock>>,
    app: AppId,
}

impl DeviceClaim {
    /// It was made.
    pub fn keep(mut self) {
        self.stock = None;
    }
}

impl Drop for DeviceClaim {
    fn drop(&mut self) {
        let stock = self.stock.take();
        if let Some(app) = stock.as_ref().and_then(|stock| stock.apps.get(&self.app)) {
            app.made.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// The part of one shard.
#[derive(Debug, Default)]
pub(super) struct Tally {
    stock: Arc<Stock>,
    shard: usize,
    /// `None`: the walk is over.
    walk: Option<Walk>,
}

/// How far the walk has come.
#[derive(Debug, Default)]
struct Walk {
    /// All up to this one are counted.
    passed: Option<DeviceId>,
    /// Those behind it that are counted. Never more than the mailboxes that woke, or were made, since the start.
    early: BTreeSet<DeviceId>,
}

impl Walk {
    fn has(&self, device: DeviceId) -> bool {
        self.passed.is_some_and(|passed| device <= passed) || self.early.contains(&device)
    }
}

impl Tally {
    pub(super) fn new(stock: Arc<Stock>, shard: usize) -> Tally {
        Tally {
            stock,
            shard,
            walk: Some(Walk::default()),
        }
    }

    /// A mailbox is known for the first time since it woke, and this is stored in it.
    pub(super) fn met(&mut self, device: DeviceId, app: AppId, stored: (u32, u64)) {
        if let Some(walk) = &mut self.walk
            && !walk.has(device)
        {
            walk.early.insert(device);
            self.add(app, (i64::from(stored.0), signed(stored.1), 1));
        }
    }

    /// A device is about to be made and is counted already.
    pub(super) fn made(&mut self, device: DeviceId) {
        if let Some(walk) = &mut self.walk
            && !walk.has(device)
        {
            walk.early.insert(device);
        }
    }

    /// The walk came by these, and by all others up to `passed`; `None`: it is over.
    pub(super) fn seed(&mut self, mailboxes: &[StoredMailbox], passed: Option<DeviceId>) {
        let Some(mut walk) = self.walk.take() else {
            return;
        };
        for mailbox in mailboxes.iter().filter(|mailbox| !walk.has(mailbox.device)) {
            let held = (i64::from(mailbox.count), signed(mailbox.bytes), 1);
            self.add(mailbox.app, held);
        }
        match passed {
            Some(passed) => {
                walk.early = walk.early.split_off(&passed);
                walk.early.remove(&passed);
                walk.passed = Some(passed);
                self.walk = Some(walk);
            }
            None => {
                self.stock.uncounted.fetch_sub(1, Ordering::Release);
            }
        }
    }

    pub(super) fn add(&self, app: AppId, more: (i64, i64, i64)) {
        self.stock.add(app, self.shard, more);
    }

    /// The quota that so much more would cross. What takes nothing more crosses none.
    pub(super) fn crossed(&self, app: AppId, (count, bytes): (i64, i64)) -> Option<Quota> {
        let stock = self.stock.apps.get(&app)?;
        let beyond = |more: i64, max: &AtomicU64, part: fn(&Cell) -> &AtomicI64| {
            let max = max.load(Ordering::Relaxed);
            more > 0
                && max > 0
                && above_zero(stock.sum(part)).saturating_add(more.unsigned_abs()) > max
        };
        if beyond(count, &stock.notifications_max, |cell| &cell.notifications) {
            return Some(Quota::Notifications);
        }
        beyond(bytes, &stock.bytes_max, |cell| &cell.bytes).then_some(Quota::Bytes)
    }
}

pub(super) fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const APP: AppId = AppId(1);

    fn device(number: u8) -> DeviceId {
        DeviceId([number; 16])
    }

    fn mailbox(number: u8, count: u32, bytes: u64) -> StoredMailbox {
        StoredMailbox {
            device: device(number),
            app: APP,
            count,
            bytes,
        }
    }

    fn held(notifications: u64, bytes: u64, devices: u64) -> Held {
        Held {
            notifications,
            bytes,
            devices,
        }
    }

    #[test]
    fn each_mailbox_is_counted_once_whether_it_wakes_before_or_after_the_walk() {
        let stock = Arc::new(Stock::new([APP], 1));
        let mut tally = Tally::new(Arc::clone(&stock), 0);
        // Wakes before the walk comes by; one more row arrives, and the page that was read before still says 2.
        tally.met(device(2), APP, (2, 20));
        tally.add(APP, (1, 10, 0));
        tally.seed(&[mailbox(1, 1, 5), mailbox(2, 2, 20)], Some(device(2)));
        assert_eq!(stock.held(APP), held(4, 35, 2));
        assert!(tally.walk.as_ref().unwrap().early.is_empty());
        // Wakes after it.
        tally.met(device(1), APP, (1, 5));
        // Goes before the walk comes by, which still shows it.
        tally.met(device(4), APP, (3, 30));
        tally.add(APP, (-3, -30, -1));
        assert!(!stock.is_whole());
        tally.seed(&[mailbox(3, 7, 70), mailbox(4, 3, 30)], None);
        assert!(stock.is_whole());
        assert_eq!(stock.held(APP), held(11, 105, 3));
        // Later pages, if there were any, change nothing.
        tally.seed(&[mailbox(9, 9, 9)], None);
        assert_eq!(stock.held(APP), held(11, 105, 3));
        assert!(stock.is_whole());
    }

    #[test]
    fn a_device_that_was_just_made_is_not_counted_again_by_the_walk() {
        let stock = Arc::new(Stock::new([APP], 1));
        let mut tally = Tally::new(Arc::clone(&stock), 0);
        let claim = stock.claim_device(APP).unwrap();
        tally.made(device(5));
        claim.keep();
        tally.seed(&[mailbox(5, 0, 0), mailbox(6, 0, 0)], None);
        assert_eq!(stock.held(APP), held(0, 0, 2));
        drop(stock.claim_device(APP).unwrap());
        assert_eq!(stock.held(APP).devices, 2);
    }

    #[test]
    fn nobody_gets_a_device_too_many_however_many_ask_at_once() {
        let stock = Arc::new(Stock::new([APP], 1));
        stock.limit(APP, held(0, 0, 100));
        let made: usize = std::thread::scope(|scope| {
            let ask = || {
                let stock = Arc::clone(&stock);
                scope.spawn(move || {
                    let asked = (0..60).filter_map(|_| stock.claim_device(APP).ok());
                    asked.map(DeviceClaim::keep).count()
                })
            };
            let asking: Vec<_> = (0..4).map(|_| ask()).collect();
            asking.into_iter().map(|one| one.join().unwrap()).sum()
        });
        assert_eq!(made, 100);
        assert_eq!(stock.claim_device(APP).unwrap_err(), (100, 100));
    }

    #[test]
    fn only_what_takes_more_crosses_a_quota() {
        let stock = Arc::new(Stock::new([APP], 2));
        let mut tally = Tally::new(Arc::clone(&stock), 0);
        tally.seed(&[mailbox(1, 10, 100)], None);
        assert_eq!(tally.crossed(APP, (1, 1)), None);
        stock.limit(APP, held(10, 0, 0));
        assert_eq!(tally.crossed(APP, (1, 1)), Some(Quota::Notifications));
        assert_eq!(tally.crossed(APP, (0, 50)), None);
        stock.limit(APP, held(11, 105, 0));
        assert_eq!(tally.crossed(APP, (1, 5)), None);
        assert_eq!(tally.crossed(APP, (1, 6)), Some(Quota::Bytes));
        assert_eq!(tally.crossed(APP, (-1, -6)), None);
        // Apps that nobody named are not counted.
        assert_eq!(tally.crossed(AppId(9), (1, 1)), None);
    }
}
