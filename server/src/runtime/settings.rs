//! What an operator can set about the runtime, and the limits that are fixed.

use std::collections::BTreeMap;
use std::time::Duration;

use super::api::LinkSettings;
use super::callbacks::CallbackLimits;
use super::topics::Patterns;
use crate::delivery::{Held, Policy};

/// Devices that one ping may address, named or found through users. Default and ceiling: above it the promise of
/// promise 1 for each device would hold one request open for too long.
pub const DEVICES_PER_PING: u32 = 1_000;
/// Devices that one ping may name in a list; above [`DEVICES_PER_PING`] it is expanded. Default and ceiling: what fits the
/// largest request body.
pub const DEVICES_PER_LIST: u32 = 100_000;
/// Devices of one stored chunk of a list, and of one page of it: a record of 16 KiB.
pub const EXPANSION_CHUNK: usize = 1_000;
/// Pages of audiences on their way to the shards at the same time, over all apps: a single ping finds no more before it.
pub(super) const PAGES_IN_FLIGHT: usize = 2;
/// Pages of one ping that the shards have and that are not noted yet, because some device has not acknowledged. So many devices
/// a ping comes to in every [`AUDIENCE_DEFER_MAX`](crate::delivery::AUDIENCE_DEFER_MAX), even if one of each page does not
/// answer; and so many a crash may ask twice.
pub(super) const PAGES_AHEAD: usize = 32;
/// Devices of one ping that have it and are not settled, when a further page begins. Without it a busy server would hand over
/// more than it can bring in [`AUDIENCE_DEFER_MAX`](crate::delivery::AUDIENCE_DEFER_MAX), would have to store what is late, and
/// be busier.
pub(super) const UNSETTLED_MAX: usize = 8 * EXPANSION_CHUNK;
/// Devices that one input of a shard releases: what one app may do before another has its turn.
pub(super) const RELEASED_AT_ONCE: usize = 32;
/// The same as [`PAGES_AHEAD`] over all apps: some 10 MiB of those who wait, and 5 of those who do not any more.
pub(super) const PAGES_AHEAD_IN_ALL: usize = 128;
/// Members that are looked at to say how many an audience has; larger ones are estimated to within a few percent.
pub(super) const ESTIMATE_LOOK: usize = 1_000;
/// Topics of one device: they are told in one frame.
pub const TOPICS_PER_DEVICE: usize = 100;
/// Longest name of a topic, bytes.
pub const TOPIC_MAX_BYTES: usize = 128;
/// Users that one ping may name, known or not: each costs a look-up.
pub const USERS_PER_PING: usize = 1_000;
/// Longest user name, bytes.
pub const USER_MAX_BYTES: usize = 255;
/// Longest name of a device or key, bytes.
pub const NAME_MAX_BYTES: usize = 255;
/// Most API keys in all: they are kept in memory, and a person must be able to review them.
pub const KEYS_MAX: usize = 1_000;
/// Longest time for which two secrets of a device are good.
pub const SECRET_OVERLAP_MAX: Duration = Duration::from_secs(90 * 86_400);
/// How long a TTL 0 notification may still be sent after its acceptance, milliseconds.
pub const TRANSIENT_MS: u64 = 30_000;
/// Most shards: more than any machine has cores.
pub const SHARDS_MAX: usize = 256;
/// Most reading threads.
pub const READING_THREADS_MAX: usize = 64;

/// Settings of the runtime. Those marked *live* can be changed by [`Handle::reload`](super::Handle::reload).
#[derive(Debug, Clone)]
pub struct RuntimeSettings {
    /// Tasks that own mailboxes; 0 = one per core. At most [`SHARDS_MAX`]. Default 0.
    pub shards: usize,
    /// Threads that read the store; 1 to [`READING_THREADS_MAX`]. Default 2. Too few: attaching after a restart is
    /// slow (`bellwire_reads_waiting` stays up).
    pub reading_threads: usize,
    /// Limits and waits of the core. `run` is set from the store. *Live.*
    pub policy: Policy,
    /// Limits for links. *Live* for new links.
    pub link: LinkSettings,
    /// Limits for pings. *Live.*
    pub limits: Limits,
    /// What apps may use. *Live.*
    pub quotas: Quotas,
    /// Topics that devices may join and leave by themselves (`topics.self_subscribe`). Default none. *Live.*
    pub self_subscribe: Patterns,
    /// Members of an audience that are read and addressed at a time. Default [`EXPANSION_CHUNK`]. Only tests set another.
    pub expansion_page: usize,
    /// How often expired rows are looked for. Default 1 s.
    pub sweep_every: Duration,
    /// How long outcomes are kept (`receipts.keep`). Default 24 h.
    pub receipts_keep: Duration,
    /// How long it is known what was erased, so that restoring a backup made before does not bring it back
    /// (`store.erasures_keep`). Default 400 days.
    pub erasures_keep: Duration,
    /// Whether the outcome of a notification that was never stored is safe before anybody is told of it
    /// (`receipts.durable`). Costs a write and a share of a sync for each. Default no.
    pub receipts_durable: bool,
    /// How long an idempotency key is remembered. Default 24 h.
    pub idempotency_keep: Duration,
    /// Idempotency keys remembered for each app; the oldest give way. Default 1,000,000.
    pub idempotency_entries: usize,
    /// Notifications in the ledger of recent outcomes; the oldest pings give way. Default 500,000.
    pub ledger_entries: usize,
    /// Bytes of the ledger. Default 128 MiB.
    pub ledger_bytes: u64,
}

impl Default for RuntimeSettings {
    fn default() -> RuntimeSettings {
        RuntimeSettings {
            shards: 0,
            reading_threads: 2,
            policy: Policy::default(),
            link: LinkSettings::default(),
            limits: Limits::default(),
            quotas: Quotas::default(),
            self_subscribe: Patterns::default(),
            expansion_page: EXPANSION_CHUNK,
            sweep_every: Duration::from_secs(1),
            receipts_keep: Duration::from_secs(24 * 3_600),
            erasures_keep: Duration::from_secs(400 * 24 * 3_600),
            receipts_durable: false,
            idempotency_keep: Duration::from_secs(24 * 3_600),
            idempotency_entries: 1_000_000,
            ledger_entries: 500_000,
            ledger_bytes: 128 << 20,
        }
    }
}

/// What one app may use; 0: as much as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AppQuota {
    /// Pings at once, refilled evenly over 24 hours; full at the start of the run. Default 0.
    pub pings_per_day: u64,
    /// Notifications that wait in its mailboxes, their content bytes, and devices. Default 0.
    pub held: Held,
}

/// What apps may use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Quotas {
    /// Those that nothing of their own is set for.
    pub default: AppQuota,
    /// Others, by name.
    pub apps: BTreeMap<String, AppQuota>,
}

impl Quotas {
    /// What an app may use.
    #[must_use]
    pub fn of(&self, app: &str) -> AppQuota {
        self.apps.get(app).copied().unwrap_or(self.default)
    }
}

/// Limits that hold for each ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Largest content of one notification, bytes. Default 4,096; settable to 65,536.
    pub content_max: u32,
    /// TTL of a ping that names none, seconds. Default 7 days.
    pub ttl_default_s: u64,
    /// Longest TTL, seconds; longer ones are lowered to it. Default 30 days.
    pub ttl_max_s: u64,
    /// Devices that one ping may address. Default [`DEVICES_PER_PING`].
    pub devices_max: u32,
    /// Wait for acknowledgements of a ping that names none. Default 10 s; whole seconds.
    pub wait_default: Duration,
    /// Longest wait for acknowledgements. Default 60 s.
    pub wait_max: Duration,
    /// Largest body of a request, and largest line of a batch, bytes. Default 1 MiB.
    pub body_max: usize,
    /// Largest body of a batch, bytes. Default 8 MiB.
    pub batch_body_max: usize,
    /// Most pings of a batch: so many are answered by one sync of the disk, and no more are in doubt if the connection breaks.
    /// Default 1,000.
    pub batch_lines_max: usize,
    /// Devices that one ping may name in a list. Default [`DEVICES_PER_LIST`].
    pub list_max: u32,
    /// Pings to audiences of one app that may be on their way at once; at least 1. Default 100: they are brought one
    /// after the other, so more would only wait.
    pub expansions_max: u32,
    /// Bodies in flight, bytes: accepted ones that a mailbox still holds in memory. Default 256 MiB.
    pub memory_reserve: u64,
    /// Pings that one API key may send, per second in the long run. Default 50,000: more than one server takes, so that
    /// only a caller that runs away meets it.
    pub pings_per_second: u32,
    /// Pings that one API key may send at once before the rate counts. Default 100,000.
    pub ping_burst: u32,
    /// Pings that one device may be sent, per second in the long run, whoever sends them; 0: no limit. Default 1,000: more than
    /// any person or program behind one device reads, so that only a publisher that runs away meets it.
    pub device_pings_per_second: u32,
    /// Pings that one device may be sent at once before its rate counts. Default 10,000.
    pub device_ping_burst: u32,
    /// Longest wait for the store before a ping is answered with `StoreBusy`. Default 10 s. What was queued may
    /// still be stored then: that is no promise.
    pub accept_wait: Duration,
    /// How long a device that comes back is told what it is to take off the screen. Default 7 days, as the TTL of a ping that
    /// names none; 0: only those attached are told.
    pub withdrawals_keep: Duration,
    /// How long whoever takes a backup may let it wait: at once, and in all on top of a second for each 256 KiB. Default 60 s.
    /// Until it is taken the log is not let go.
    pub backup_stall: Duration,
    /// How long whoever sends a batch may take none of its answers before it is cut. Default 60 s.
    pub batch_stall: Duration,
    /// Streams of events that one app may have at once. Default 64.
    pub event_streams: usize,
    /// How long a device's old secret stays good after a rotation that names no time. Default 24 h; at most
    /// [`SECRET_OVERLAP_MAX`].
    pub secret_overlap: Duration,
    /// How outcomes are posted.
    pub callbacks: CallbackLimits,
    /// Over how long devices are sent away at a stop, for whoever looks; [`Handle::drain`](super::Handle::drain) is told.
    /// Default 30 s.
    pub drain_window: Duration,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            content_max: 4_096,
            ttl_default_s: 7 * 86_400,
            ttl_max_s: 30 * 86_400,
            devices_max: DEVICES_PER_PING,
            wait_default: Duration::from_secs(10),
            wait_max: Duration::from_secs(60),
            body_max: 1 << 20,
            batch_body_max: 8 << 20,
            batch_lines_max: 1_000,
            list_max: DEVICES_PER_LIST,
            expansions_max: 100,
            memory_reserve: 256 << 20,
            pings_per_second: 50_000,
            ping_burst: 100_000,
            device_pings_per_second: 1_000,
            device_ping_burst: 10_000,
            accept_wait: Duration::from_secs(10),
            withdrawals_keep: Duration::from_secs(7 * 86_400),
            backup_stall: Duration::from_secs(60),
            batch_stall: Duration::from_secs(60),
            event_streams: 64,
            secret_overlap: Duration::from_secs(24 * 3_600),
            callbacks: CallbackLimits::default(),
            drain_window: Duration::from_secs(30),
        }
    }
}
