//! Handles of the metrics that are counted often, made once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use arc_swap::ArcSwap;
use metrics::{Counter, Gauge, Histogram, SharedString, counter, gauge, histogram};

use super::ledger::Noted;
use crate::delivery::{AppId, Closing, Held, Notice, Outcome, Quota, Refusal, Rejection};
use crate::ports::Carrier;
use crate::telemetry::metrics as names;

/// The counters of one app.
pub(super) struct AppMeters {
    pub(super) label: SharedString,
    pub(super) pings_accepted: Counter,
    pub(super) notifications: Counter,
    outcomes: [Counter; Outcome::ALL.len()],
}

impl AppMeters {
    fn new(label: SharedString) -> AppMeters {
        AppMeters {
            pings_accepted: counter!(names::PINGS_TOTAL, "app" => label.clone(), "result" => "accepted"),
            notifications: counter!(names::NOTIFICATIONS_TOTAL, "app" => label.clone()),
            outcomes: Outcome::ALL.map(|outcome| {
                counter!(names::OUTCOMES_TOTAL, "app" => label.clone(), "outcome" => outcome.as_str())
            }),
            label,
        }
    }
}

/// The words for what the core notices, in the order of their declaration.
const NOTICES: [(Notice, &str); 6] = [
    (Notice::UnknownVerdict, "unknown_verdict"),
    (Notice::DuplicateDevice, "duplicate_device"),
    (Notice::UnreadableBody, "unreadable_body"),
    (Notice::CollapseRepaired, "collapse_repaired"),
    (Notice::Deferred, "deferred"),
    (Notice::DeferralWon, "deferral_won"),
];

// One that is added must be listed, and in its place.
const _: () = {
    let mut place = 0;
    while place < NOTICES.len() {
        assert!(NOTICES[place].0 as usize == place);
        place += 1;
    }
    match Notice::UnknownVerdict {
        Notice::UnknownVerdict
        | Notice::DuplicateDevice
        | Notice::UnreadableBody
        | Notice::CollapseRepaired
        | Notice::Deferred
        | Notice::DeferralWon => {}
    }
};

/// Who shows a secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Who {
    Device,
    Key,
}

/// All of them.
pub(super) struct Meters {
    apps: ArcSwap<HashMap<AppId, AppMeters>>,
    other: AppMeters,
    pub(super) accept_seconds: Histogram,
    acknowledge_seconds: Histogram,
    repeated: Counter,
    /// By `redelivered`.
    pub(super) sends: [Counter; 2],
    pub(super) withdrawals: Counter,
    pub(super) commit_no_room: Counter,
    pub(super) commit_failed: Counter,
    pub(super) drained: Counter,
    pub(super) revocations: Counter,
    pub(super) not_durable: Counter,
    /// Every deferred notification counts here, so they are made once; the position is the discriminant.
    notices: [Counter; NOTICES.len()],
    /// By [`Who`], and whether it was refused.
    authentications: [[Counter; 2]; 2],
    sessions: [Gauge; 2],
    attaches: [Counter; 2],
    connected: [AtomicU64; 2],
}

impl Meters {
    pub(super) fn new() -> Meters {
        let carriers = [Carrier::Quic.as_str(), Carrier::WebSocket.as_str()];
        Meters {
            apps: ArcSwap::default(),
            other: AppMeters::new("other".into()),
            accept_seconds: histogram!(names::ACCEPT_SECONDS),
            acknowledge_seconds: histogram!(names::ACKNOWLEDGE_SECONDS),
            repeated: counter!(names::OUTCOMES_REPEATED_TOTAL),
            sends: ["false", "true"]
                .map(|redelivered| counter!(names::SENDS_TOTAL, "redelivered" => redelivered)),
            withdrawals: counter!(names::WITHDRAWALS_TOTAL),
            commit_no_room: counter!(names::COMMIT_FAILURES_TOTAL, "reason" => "no_room"),
            commit_failed: counter!(names::COMMIT_FAILURES_TOTAL, "reason" => "failed"),
            drained: counter!(names::SESSION_CLOSES_TOTAL, "reason" => "drain"),
            revocations: counter!(names::REVOCATIONS_TOTAL),
            not_durable: counter!(names::OUTCOMES_NOT_DURABLE_TOTAL),
            notices: NOTICES.map(|(_, name)| counter!(names::NOTICES_TOTAL, "notice" => name)),
            authentications: ["device", "key"].map(|who| {
                ["accepted", "refused"].map(
                    |result| counter!(names::AUTHENTICATIONS_TOTAL, "who" => who, "result" => result),
                )
            }),
            sessions: carriers.map(|carrier| gauge!(names::SESSIONS, "carrier" => carrier)),
            attaches: carriers.map(|carrier| counter!(names::ATTACHES_TOTAL, "carrier" => carrier)),
            connected: [AtomicU64::new(0), AtomicU64::new(0)],
        }
    }

    /// Gives the first apps counters of their own.
    pub(super) fn set_apps<'a>(&self, apps: impl Iterator<Item = (AppId, &'a str)>) {
        let apps = apps
            .take(names::APPS_LABELLED)
            .map(|(id, name)| (id, AppMeters::new(name.to_owned().into())))
            .collect();
        self.apps.store(std::sync::Arc::new(apps));
    }

    pub(super) fn app<T>(&self, app: AppId, count: impl FnOnce(&AppMeters) -> T) -> T {
        count(self.apps.load().get(&app).unwrap_or(&self.other))
    }

    /// A secret was looked at.
    pub(super) fn authenticated(&self, who: Who, fits: bool) {
        self.authentications[who as usize][usize::from(!fits)].increment(1);
    }

    pub(super) fn ended(&self, app: AppId, outcome: Outcome, at_ms: u64, noted: Noted) {
        self.app(app, |meters| {
            // The position in `ALL` is the discriminant.
            meters.outcomes[outcome as usize].increment(1);
        });
        if noted.repeated {
            self.repeated.increment(1);
        }
        if outcome == Outcome::Acknowledged
            && let Some(accepted_ms) = noted.accepted_ms
        {
            #[expect(clippy::cast_precision_loss, reason = "a measurement")]
            self.acknowledge_seconds
                .record(at_ms.saturating_sub(accepted_ms) as f64 / 1_000.0);
        }
    }

    pub(super) fn rejected(&self, why: Rejection) {
        let reason = match why {
            Rejection::UnknownDevice => "unknown_device",
            Rejection::MailboxFull => "mailbox_full",
            Rejection::NoRoom => "no_room",
            Rejection::StoreFailed => "store_failed",
            Rejection::TooFast => "device_rate",
            Rejection::Quota(_) => "quota",
        };
        counter!(names::REJECTIONS_TOTAL, "reason" => reason).increment(1);
    }

    /// A quota of an app kept something out.
    pub(super) fn over_quota(&self, app: AppId, quota: Quota) {
        let label = self.app(app, |app| app.label.clone());
        counter!(names::QUOTA_REFUSALS_TOTAL, "app" => label, "quota" => quota.as_str())
            .increment(1);
    }

    /// What apps hold, those without a label of their own added up.
    #[expect(clippy::cast_precision_loss, reason = "measurements")]
    pub(super) fn held(&self, apps: impl Iterator<Item = (AppId, Held)>) {
        let mut by_label: HashMap<SharedString, Held> = HashMap::new();
        for (app, held) in apps {
            let label = self.app(app, |app| app.label.clone());
            let sum = by_label.entry(label).or_default();
            sum.notifications = sum.notifications.saturating_add(held.notifications);
            sum.bytes = sum.bytes.saturating_add(held.bytes);
            sum.devices = sum.devices.saturating_add(held.devices);
        }
        for (label, held) in by_label {
            gauge!(names::APP_NOTIFICATIONS, "app" => label.clone()).set(held.notifications as f64);
            gauge!(names::APP_BYTES, "app" => label.clone()).set(held.bytes as f64);
            gauge!(names::APP_DEVICES, "app" => label).set(held.devices as f64);
        }
    }

    pub(super) fn refused(&self, why: Refusal) {
        let reason = match why {
            Refusal::StaleAttempt => "stale_attempt",
            Refusal::DuplicateDevice => "duplicate_device",
            Refusal::UnknownDevice => "unknown_device",
            Refusal::StoreFailed => "store_failed",
        };
        counter!(names::ATTACH_REFUSALS_TOTAL, "reason" => reason).increment(1);
    }

    pub(super) fn closed(&self, why: Closing) {
        let reason = match why {
            Closing::Replaced => "replaced",
            Closing::Revoked => "revoked",
            Closing::AckTimeout => "ack_timeout",
            Closing::SecretEnded => "secret_ended",
        };
        counter!(names::SESSION_CLOSES_TOTAL, "reason" => reason).increment(1);
    }

    pub(super) fn noticed(&self, notice: Notice) {
        self.notices[notice as usize].increment(1);
    }

    pub(super) fn attached(&self, carrier: Carrier) {
        self.attaches[carrier as usize].increment(1);
        self.connected[carrier as usize].fetch_add(1, Ordering::Relaxed);
        self.sessions[carrier as usize].increment(1.0);
    }

    pub(super) fn left(&self, carrier: Carrier) {
        self.connected[carrier as usize].fetch_sub(1, Ordering::Relaxed);
        self.sessions[carrier as usize].decrement(1.0);
    }

    /// Devices attached over `carrier`.
    pub(super) fn connected(&self, carrier: Carrier) -> u64 {
        self.connected[carrier as usize].load(Ordering::Relaxed)
    }
}
