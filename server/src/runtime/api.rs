//! The words between the runtime and its neighbours: what transports and front doors ask for and are answered.

use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use std::sync::Arc;

use super::rate::Rate;
use crate::delivery::Quota;
use crate::delivery::{
    AppId, Closing, CollapseKey, DeviceId, Mono, Notification, PingId, Refusal, Rejection,
    SessionId, Urgency, Verdict,
};
use crate::ports::{PairState, Scopes, Seen};

// ---- Links -------------------------------------------------------------------------------------------------------

/// What a device showed to prove who it is.
pub enum Identity<'a> {
    /// The secret of the hello frame.
    Secret(&'a str),
}

/// Proof that a device is who it says. Only [`Handle::authenticate`](super::Handle::authenticate) makes one.
#[derive(Debug, Clone, Copy)]
pub struct Authenticated {
    pub(super) device: DeviceId,
    /// Before the secret was looked up.
    pub(super) at: Mono,
    /// It was shown a secret that is good until then, Unix milliseconds. `None`: the newest.
    pub(super) until_ms: Option<u64>,
}

impl Authenticated {
    /// Which device.
    #[must_use]
    pub fn device(&self) -> DeviceId {
        self.device
    }
}

/// Why somebody is not let in. Wrong secret and unknown id look the same from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WhoError {
    /// Unknown, or the secret does not fit.
    #[error("not known here, or the secret does not fit")]
    Unauthorized,
    /// The store could not be read; nothing is known about the caller.
    #[error("the store could not be read; try again later")]
    StoreUnavailable,
    /// The server is going down.
    #[error("the server is draining; connect again")]
    Draining,
}

/// A device's hello, checked.
#[derive(Debug)]
pub struct AttachRequest {
    /// The new session, from [`Handle::next_session`](super::Handle::next_session).
    pub session: SessionId,
    /// Random per client process.
    pub instance: u128,
    /// Rising per instance.
    pub attempt: u64,
    /// Granted window, 1..=256.
    pub window: u16,
    /// Less urgent ones stay in the mailbox.
    pub min_urgency: Urgency,
    /// Verdicts whose acknowledgement may have been lost.
    pub seen: Vec<(PingId, Verdict)>,
    /// `quic` or `websocket`, for presence and metrics.
    pub carrier: &'static str,
    /// What the client says it is.
    pub agent: Option<Arc<str>>,
}

/// What the runtime tells a link, in order.
#[derive(Debug)]
pub enum Out {
    /// Attached: greet the device.
    Welcome {
        /// How many wait.
        pending: u32,
        /// Granted window.
        window: u16,
    },
    /// Not attached: say why and close. Nothing follows.
    Refuse(Refusal),
    /// Send this.
    Send {
        /// Number in this session.
        seq: u64,
        /// It may have been sent before.
        redelivered: bool,
        /// What.
        notification: Arc<Notification>,
    },
    /// These, sent before, were taken back.
    Withdraw(Vec<PingId>),
    /// The mailbox has let go: say why and close. Nothing follows.
    Close(Closing),
    /// The server goes down: `goaway drain` with this advice in milliseconds, then close.
    Drain {
        /// Earliest return.
        min_ms: u64,
        /// Latest return.
        max_ms: u64,
    },
}

/// The link's end of the wire between runtime and transport: a bounded queue that wakes its task. It holds at most
/// `window` notifications and a few control words, because the core sends no more. Pushing never blocks; after the
/// link is gone it does nothing.
pub trait Outlet: Send + Sync + 'static {
    /// Queues one word for the device.
    fn push(&self, out: Out);

    /// Queues several, in order, and wakes the link once; `outs` is empty afterwards. The runtime hands over all
    /// that one turn has for a link by this.
    fn push_all(&self, outs: &mut Vec<Out>) {
        for out in outs.drain(..) {
            self.push(out);
        }
    }
}

/// Limits of the links that come from configuration.
#[derive(Debug, Clone)]
pub struct LinkSettings {
    /// TLS and hello together. Default 10 s.
    pub hello_deadline: Duration,
    /// A send that the peer's transport has not taken for so long detaches. Default 30 s.
    pub write_deadline: Duration,
    /// Connections per address before hello. Default 256; loopback and `exempt` are not counted.
    pub per_address: u32,
    /// Unauthenticated connections in all. Default 10,000.
    pub unauthenticated: u32,
    /// Networks that are not counted per address, as `address/prefix`.
    pub exempt: Vec<(std::net::IpAddr, u8)>,
    /// Networks of load balancers that may say, by the PROXY protocol, for whom they connect. Default none.
    pub proxies: Vec<(std::net::IpAddr, u8)>,
    /// Advised keep-alive over QUIC, seconds. Default 20..120.
    pub keep_alive_quic_s: (u32, u32),
    /// Advised keep-alive over WebSocket, seconds. Default 60..900.
    pub keep_alive_websocket_s: (u32, u32),
    /// Silence that is borne, in percent of the longest advised keep-alive. Default 250.
    pub silence_percent: u32,
    /// Largest frame from a device, bytes. Default 16 KiB, which is also the least: devices were promised it.
    pub frame_max: usize,
    /// Largest content of one notification, bytes. Default 4,096.
    pub content_max: u32,
    /// Notifications in flight for a device that asks for no number. Default 32.
    pub window_default: u16,
    /// Most notifications in flight that a device is granted. Default 256.
    pub window_max: u16,
}

impl Default for LinkSettings {
    fn default() -> LinkSettings {
        LinkSettings {
            hello_deadline: Duration::from_secs(10),
            write_deadline: Duration::from_secs(30),
            per_address: 256,
            unauthenticated: 10_000,
            exempt: Vec::new(),
            proxies: Vec::new(),
            keep_alive_quic_s: (20, 120),
            keep_alive_websocket_s: (60, 900),
            silence_percent: 250,
            frame_max: 16 << 10,
            content_max: 4_096,
            window_default: 32,
            window_max: 256,
        }
    }
}

// ---- Pings -------------------------------------------------------------------------------------------------------

/// Whom a ping addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// One device; unknown is an error (404).
    Device(DeviceId),
    /// These devices; unknown ones are refused one by one. More than 1,000 are an audience: an unknown one is only counted.
    Devices(Vec<DeviceId>),
    /// The members of a topic when the ping is accepted.
    Topic(String),
    /// Every device of the app when the ping is accepted.
    Everyone,
    /// Users, in this order; unknown ones and those without devices count 0. A device is pinged once.
    Users(Vec<String>),
}

/// Content, as the front door encoded it.
#[derive(Clone)]
pub struct Content {
    /// The encoded map that transports understand.
    pub encoded: Bytes,
    /// Its size as limits count it.
    pub size: u32,
}

/// Content is never shown.
impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Content")
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// One publish request, checked by a front door.
#[derive(Debug, Clone)]
pub struct PingRequest {
    /// Whose.
    pub app: AppId,
    /// To whom.
    pub target: Target,
    /// What.
    pub content: Content,
    /// Asked TTL in seconds; `None` = default. Lowered to the ceiling.
    pub ttl_s: Option<u64>,
    /// How much it matters.
    pub urgency: Urgency,
    /// Replacement key.
    pub collapse: Option<CollapseKey>,
    /// The `Idempotency-Key` with the SHA-256 of the raw body.
    pub idempotency: Option<(String, [u8; 32])>,
    /// Wait so long for verdicts after acceptance.
    pub wait_acknowledged: Option<Duration>,
}

/// What became of a publish request: everything in it is promised.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PingAnswer {
    /// Its id.
    pub id: PingId,
    /// How many devices it addresses; for an audience about how many.
    pub devices: u32,
    /// Granted TTL in seconds.
    pub ttl_s: u64,
    /// Devices that did not accept theirs, when there are several.
    pub rejected: Vec<(DeviceId, Rejection)>,
    /// With `wait_acknowledged`: the outcomes so far.
    pub outcomes: Vec<PairView>,
}

/// One device's part of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PairView {
    /// Which device.
    pub device: DeviceId,
    /// Waiting, or how and when it ended.
    pub state: PairState,
}

/// Why a publish request is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PingError {
    /// No such device in this app.
    #[error("no such device in this app")]
    UnknownDevice,
    /// The one mailbox addressed is full and set to refuse.
    #[error("the mailbox is full")]
    MailboxFull,
    /// The only device is sent more than it may be (429).
    #[error("the device is sent more than it may be")]
    DeviceTooFast,
    /// The key was used with another body.
    #[error("the idempotency key was used with another body")]
    IdempotencyConflict,
    /// Larger than the limit.
    #[error("the content has {size} bytes, {limit} are allowed")]
    ContentTooLarge {
        /// Counted size.
        size: u32,
        /// The limit.
        limit: u32,
    },
    /// More devices than one request may address.
    #[error("the ping addresses more than {limit} devices")]
    TooManyDevices {
        /// The limit.
        limit: u32,
    },
    /// As many pings to audiences as may be are on their way.
    #[error("{limit} pings to audiences are on their way already")]
    TooManyExpansions {
        /// The limit.
        limit: u32,
    },
    /// The runtime itself is in trouble.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// What a request to the runtime can meet. All but `Invalid` are nobody's fault outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RuntimeError {
    /// The store failed or cannot be read (503).
    #[error("the store is unavailable")]
    StoreUnavailable,
    /// The store is behind; try again (503).
    #[error("the store is busy")]
    StoreBusy,
    /// A quota of the app is used up (429).
    #[error("the app has {used} {}, and may have {limit}", quota.as_str())]
    QuotaExceeded {
        /// Which one.
        quota: Quota,
        /// What the app may have.
        limit: u64,
        /// What it has.
        used: u64,
    },
    /// The server is going down (503).
    #[error("the server is draining")]
    Draining,
    /// The reserve for bodies in flight is used up (503).
    #[error("too many bodies are in flight")]
    MemoryReserve,
    /// No room on disk (507).
    #[error("no room on disk")]
    NoRoom,
    /// As many follow the app's outcomes as may at once (429).
    #[error("too many streams of events")]
    TooManyStreams,
    /// A registration that cannot be: the text names the member and the rule (422).
    #[error("{0}")]
    Invalid(&'static str),
}

/// What is known of a ping.
#[derive(Debug, Clone)]
pub struct PingView {
    /// Its id.
    pub id: PingId,
    /// Device by device, by device id.
    pub devices: Vec<PairView>,
    /// There are more after the last one.
    pub next: Option<DeviceId>,
    /// It is on its way to an audience, and has come so far.
    pub expansion: Option<ExpansionView>,
}

/// How far a ping to an audience has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpansionView {
    /// About how many devices it addresses.
    pub estimate: u32,
    /// How many are done.
    pub done: u32,
    /// Of these, how many are no device of the app.
    pub unknown: u32,
}

/// How to change the topics of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TopicsChange {
    /// It is in these and no others.
    Set(Vec<String>),
    /// It leaves some and joins others.
    Edit {
        /// Those it joins.
        join: Vec<String>,
        /// Those it leaves. One that is in both lists is joined.
        leave: Vec<String>,
    },
}

/// What a withdrawal did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WithdrawCounts {
    /// Taken back before the device had said that it has it.
    pub revoked: u32,
    /// The device has it, and is told to take it off the screen: now, or when it comes back.
    pub withdrawn: u32,
    /// Ended otherwise before: there is nothing to take off a screen. Devices that are gone are among them.
    pub ended: u32,
    /// Left alone, as asked.
    pub kept: u32,
}

/// What a revocation did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RevokeCounts {
    /// Taken back now.
    pub revoked: u32,
    /// Had ended before.
    pub ended: u32,
}

// ---- Devices, users, keys ----------------------------------------------------------------------------------------

/// A device, for lists.
#[derive(Debug, Clone)]
pub struct DeviceView {
    /// Its id.
    pub device: DeviceId,
    /// Its owner.
    pub user: String,
    /// A name for people.
    pub name: Option<String>,
    /// When it was registered, Unix milliseconds.
    pub created_ms: u64,
    /// How it is attached now, and since when (Unix milliseconds).
    pub attached: Option<(&'static str, u64)>,
    /// When and how it was last seen; now, while it is attached. `None`: never.
    pub seen: Option<Seen>,
    /// Until when the secret before the current one is good as well, Unix milliseconds.
    pub previous_secret_until_ms: Option<u64>,
    /// Notifications in its mailbox on disk, where that was asked for. Those on their way to an attached device that have
    /// not touched the disk are not counted.
    pub waiting: Option<u32>,
}

/// Which devices to list. Everything that is given must fit.
#[derive(Debug, Clone, Default)]
pub struct DeviceQuery {
    /// Of this user.
    pub user: Option<String>,
    /// In this topic.
    pub topic: Option<String>,
    /// Attached now, or not.
    pub attached: Option<bool>,
    /// Last seen before this, Unix milliseconds; one that was never seen counts from its registration.
    pub seen_before_ms: Option<u64>,
    /// Seen at this time or later, Unix milliseconds.
    pub seen_after_ms: Option<u64>,
}

/// What becomes of what waits in the mailbox of a device whose user changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Waiting {
    /// It ends as `revoked`: it was meant for somebody else.
    #[default]
    Revoke,
    /// It goes with the device.
    Keep,
}

/// How to change a device. `None` leaves a member as it is.
#[derive(Debug, Clone, Default)]
pub struct DeviceChange {
    /// The new user.
    pub user: Option<String>,
    /// The new name; `Some(None)` takes it away.
    pub name: Option<Option<String>>,
    /// What becomes of what waits if the user changes.
    pub waiting: Waiting,
}

/// A device after a change.
#[derive(Debug, Clone)]
pub struct DeviceChanged {
    /// As it is now.
    pub device: DeviceView,
    /// Notifications that were revoked because the user changed.
    pub revoked: u32,
}

/// A rotated secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotated {
    /// Whose.
    pub device: DeviceId,
    /// Until when the secret before is good as well, Unix milliseconds; `None`: it ended at once.
    pub previous_until_ms: Option<u64>,
}

/// A user: whoever owns devices.
#[derive(Debug, Clone)]
pub struct UserView {
    /// Its devices, by id.
    pub devices: Vec<DeviceView>,
    /// There are more after this one.
    pub next: Option<DeviceId>,
}

/// A device or key just made. The secret is shown once.
pub struct Requested<T> {
    /// What was made.
    pub made: T,
    /// Its secret as text.
    pub secret: String,
}

/// An API key, for lists.
#[derive(Debug, Clone)]
pub struct KeyView {
    /// Its public part as text.
    pub id: String,
    /// What it may do.
    pub scopes: Scopes,
    /// A name for people.
    pub name: String,
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
}

/// Who calls the API. Only [`Handle::authenticate_key`](super::Handle::authenticate_key) makes one.
#[derive(Debug, Clone)]
pub struct Principal {
    pub(super) app: AppId,
    pub(super) scopes: Scopes,
    pub(super) key: String,
    pub(super) rate: Arc<Rate>,
}

impl Principal {
    /// Whose key.
    #[must_use]
    pub fn app(&self) -> AppId {
        self.app
    }

    /// Whether the key may do this.
    #[must_use]
    pub fn may(&self, wanted: Scopes) -> bool {
        self.scopes.contains(wanted)
    }

    /// The public part of the key.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }
}
