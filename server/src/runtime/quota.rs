//! What apps and their keys may use, and what they have used.
//!
//! Everything here is looked at before anything of a ping is done, without a lock: a rate is one atomic number, room in memory two.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use aws_lc_rs::hmac;
use smallvec::SmallVec;

use super::api::{Principal, RuntimeError};
use super::handle::Inner;
use super::rate::{Pace, Rate};
use super::reserve::Share;
use super::settings::{AppQuota, Quotas};
use super::shard::Input;
use super::status::AppUse;
use crate::delivery::{AppId, DeviceClaim, Quota, StoredMailbox};
use crate::ports::AppRecord;
use crate::telemetry::metrics as names;

/// Mailboxes that are counted at a time after a start.
const COUNTED_PAGE: usize = 1_000;
/// How long the count pauses between two pages: a million mailboxes take five seconds of pauses.
const COUNT_PAUSE: Duration = Duration::from_millis(5);
/// How long it waits after a page that could not be read.
const COUNT_RETRY: Duration = Duration::from_secs(1);

/// An app, with what is derived from its record and what it uses.
pub(super) struct App {
    name: String,
    /// Derives ping ids from idempotency keys.
    pub(super) secret: hmac::Key,
    quota: ArcSwap<AppQuota>,
    /// Its pings of a day.
    day: Rate,
    /// Bytes of the memory reserve that its bodies take.
    pub(super) room: Arc<AtomicU64>,
}

impl App {
    pub(super) fn new(record: &AppRecord, quotas: &Quotas) -> App {
        App {
            name: record.name.clone(),
            secret: hmac::Key::new(hmac::HMAC_SHA256, &record.secret),
            quota: ArcSwap::from_pointee(quotas.of(&record.name)),
            day: Rate::default(),
            room: Arc::default(),
        }
    }

    fn day_pace(&self) -> Pace {
        Pace::per_day(self.quota.load().pings_per_day)
    }
}

/// Whose allowance is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// What one API key may send in a moment.
    Key,
    /// What an app may send in a day.
    App,
}

impl Allowance {
    /// Its name in answers and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Allowance::Key => "key",
            Allowance::App => "app",
        }
    }
}

/// A ping is not taken because an allowance is used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Throttle {
    /// Which one.
    pub by: Allowance,
    /// How long until it gives one ping again.
    pub wait: Duration,
}

/// How an allowance stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowanceView {
    /// Which one.
    pub by: Allowance,
    /// Pings that it gives at once, after a pause.
    pub quota: u64,
    /// In how many seconds it gives them all again, once they were used.
    pub window_s: u64,
    /// Pings that it gives now.
    pub left: u64,
    /// In how many seconds all of them are there again.
    pub whole_in_s: u64,
}

impl Inner {
    /// Counts one ping of a caller.
    pub(super) fn admit(&self, who: &Principal) -> Result<(), Throttle> {
        let now = self.shared.clock.now().mono;
        let key = Pace::of_key(&self.limits.load());
        let (by, taken) = match who.rate.take(now, key) {
            Ok(()) => match self.app(who.app) {
                Some(app) => (Allowance::App, app.day.take(now, app.day_pace())),
                // The ping will be told so.
                None => return Ok(()),
            },
            refused => (Allowance::Key, refused),
        };
        taken.map_err(|wait| {
            let label = self.shared.meters.app(who.app, |app| app.label.clone());
            metrics::counter!(names::PINGS_THROTTLED_TOTAL, "app" => label, "by" => by.as_str())
                .increment(1);
            Throttle { by, wait }
        })
    }

    /// How the allowances of a caller stand; those without a limit are left out.
    pub(super) fn allowances(&self, who: &Principal) -> SmallVec<[AllowanceView; 2]> {
        let now = self.shared.clock.now().mono;
        let view = |by, rate: &Rate, pace: Pace| {
            let (left, whole_in_s) = rate.left(now, pace);
            AllowanceView {
                by,
                quota: pace.burst(),
                window_s: pace.window_s(),
                left,
                whole_in_s,
            }
        };
        let mut views = SmallVec::new();
        let key = Pace::of_key(&self.limits.load());
        views.push(view(Allowance::Key, &who.rate, key));
        if let Some(app) = self.app(who.app) {
            let pace = app.day_pace();
            if !pace.is_free() {
                views.push(view(Allowance::App, &app.day, pace));
            }
        }
        views
    }

    /// Room for a body in the memory reserve. Where there are several apps, none takes more than three quarters of it, so that one
    /// that floods leaves the others something.
    pub(super) fn take_room(&self, app: AppId, size: usize, reserve: u64) -> Option<Share> {
        let most = match self.apps.len() {
            0 | 1 => reserve,
            _ => reserve - reserve / 4,
        };
        self.reserve
            .take(&self.app(app)?.room, size, (reserve, most))
    }

    /// What kept something of an app out, in figures of this moment.
    pub(super) fn over_quota(&self, app: AppId, quota: Quota) -> RuntimeError {
        let stock = &self.shared.stock;
        RuntimeError::QuotaExceeded {
            quota,
            limit: stock.limits(app).of(quota),
            used: stock.held(app).of(quota),
        }
    }

    /// One more device of an app, if it may have one.
    pub(super) fn claim_device(&self, app: AppId) -> Result<DeviceClaim, RuntimeError> {
        self.shared
            .stock
            .claim_device(app)
            .map_err(|(limit, used)| {
                self.shared.meters.over_quota(app, Quota::Devices);
                RuntimeError::QuotaExceeded {
                    quota: Quota::Devices,
                    limit,
                    used,
                }
            })
    }

    /// Counts what waited in mailboxes before this run, so that quotas hold for it as well: page by page, and slowly, because
    /// others read too. What is counted so far is never too much.
    pub(super) async fn count_stock(self: Arc<Inner>) {
        let mut after = None;
        loop {
            let page = self
                .shared
                .reading
                .read(move |store| store.mailboxes(after, COUNTED_PAGE))
                .await;
            let page = match page {
                Ok(page) => page,
                Err(error) => {
                    tracing::warn!(%error, "what waits in mailboxes could not be counted; it is tried again");
                    tokio::time::sleep(COUNT_RETRY).await;
                    continue;
                }
            };
            let mut parts: Vec<Vec<StoredMailbox>> = vec![Vec::new(); self.shards.len()];
            for mailbox in page.items {
                parts[self.shard_place(mailbox.device)].push(mailbox);
            }
            for (shard, mailboxes) in self.shards.iter().zip(parts) {
                shard.inbox.push(Input::Seed {
                    mailboxes,
                    passed: page.next,
                });
            }
            after = page.next;
            if after.is_none() {
                return;
            }
            tokio::time::sleep(COUNT_PAUSE).await;
        }
    }

    /// What apps use, by name.
    pub(super) fn app_uses(&self) -> Vec<AppUse> {
        let now = self.shared.clock.now().mono;
        let mut uses: Vec<AppUse> = self
            .apps
            .iter()
            .map(|(id, app)| {
                let pace = app.day_pace();
                AppUse {
                    name: app.name.clone(),
                    quota: **app.quota.load(),
                    pings_left: (!pace.is_free()).then(|| app.day.left(now, pace).0),
                    reserve_bytes: app.room.load(Ordering::Relaxed),
                    held: self.shared.stock.held(*id),
                }
            })
            .collect();
        uses.sort_by(|one, other| one.name.cmp(&other.name));
        uses
    }

    /// Takes new quotas.
    pub(super) fn set_quotas(&self, quotas: &Quotas) {
        for (id, app) in &self.apps {
            let quota = quotas.of(&app.name);
            self.shared.stock.limit(*id, quota.held);
            app.quota.store(Arc::new(quota));
        }
        self.warn_of_unknown_apps(quotas);
    }

    /// A quota for an app that is not there is probably one that was meant for another.
    pub(super) fn warn_of_unknown_apps(&self, quotas: &Quotas) {
        for name in quotas.apps.keys() {
            if !self.apps.values().any(|app| app.name == *name) {
                tracing::warn!(
                    app = name.as_str(),
                    "settings give a quota to an app that there is not (quota.apps)"
                );
            }
        }
    }
}
