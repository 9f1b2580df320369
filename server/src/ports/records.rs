//! What is registered: apps, devices, API keys, idempotency keys. Domain types; the disk format is the store's own.

use std::sync::Arc;

use crate::delivery::{AppId, DeviceId, PingId};

/// A tenant.
#[derive(Clone, PartialEq, Eq)]
pub struct AppRecord {
    /// Its number; `default` is 1.
    pub id: AppId,
    /// Its name, unique.
    pub name: String,
    /// The secret that derives ping ids from idempotency keys.
    pub secret: [u8; 32],
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
}

/// A device, as the backend registered it.
#[derive(Clone, PartialEq, Eq)]
pub struct DeviceRecord {
    /// Its id, unique across apps.
    pub id: DeviceId,
    /// The app it belongs to.
    pub app: AppId,
    /// The user who owns it, 1 to 255 bytes of UTF-8.
    pub user: String,
    /// A name for people.
    pub name: Option<String>,
    /// When it was registered, Unix milliseconds.
    pub created_ms: u64,
    /// Keyed hash of its secret. The secret itself is shown once and never kept.
    pub secret_hash: [u8; 32],
    /// The secrets before that one that are still good, oldest first; at most [`DeviceRecord::PREVIOUS_SECRETS_MAX`].
    pub previous_secrets: Vec<PreviousSecret>,
}

impl DeviceRecord {
    /// Most secrets that are good beside the newest: room for repeats of a rotation whose answers got lost.
    pub const PREVIOUS_SECRETS_MAX: usize = 4;
}

/// A device's secret that was rotated and is still good for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PreviousSecret {
    /// Keyed hash of it.
    pub hash: [u8; 32],
    /// Refused from then on, Unix milliseconds.
    pub until_ms: u64,
}

/// How a device connects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Carrier {
    /// QUIC over UDP.
    Quic,
    /// WebSocket over TCP.
    WebSocket,
}

impl Carrier {
    /// The carrier of this name; anything that is not `quic` is a WebSocket.
    #[must_use]
    pub fn named(name: &str) -> Carrier {
        if name == Carrier::Quic.as_str() {
            Carrier::Quic
        } else {
            Carrier::WebSocket
        }
    }

    /// The word for it in the API, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Carrier::Quic => "quic",
            Carrier::WebSocket => "websocket",
        }
    }
}

/// When and how a device was last there. Written lazily: it may be some minutes behind, and a crash may lose the newest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// When it attached or left last, Unix milliseconds.
    pub at_ms: u64,
    /// How it was connected.
    pub carrier: Carrier,
    /// What its client said it is, as it said it.
    pub agent: Option<Arc<str>>,
}

/// What an API key may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scopes(u8);

impl Scopes {
    /// Send pings, revoke them.
    pub const PING: Scopes = Scopes(1);
    /// Read outcomes, devices, status.
    pub const READ: Scopes = Scopes(2);
    /// Register and revoke devices.
    pub const DEVICES: Scopes = Scopes(4);
    /// Make and revoke keys.
    pub const KEYS: Scopes = Scopes(8);
    /// Everything that concerns the whole server.
    pub const ADMIN: Scopes = Scopes(16);
    /// Every scope.
    pub const ALL: Scopes = Scopes(31);
    /// No scope.
    pub const NONE: Scopes = Scopes(0);
    /// The scopes with their names in the API.
    pub const NAMES: [(Scopes, &'static str); 5] = [
        (Scopes::PING, "ping"),
        (Scopes::READ, "read"),
        (Scopes::DEVICES, "devices"),
        (Scopes::KEYS, "keys"),
        (Scopes::ADMIN, "admin"),
    ];

    /// The scopes of a number on disk; unknown bits are dropped.
    #[must_use]
    pub fn from_bits(bits: u8) -> Scopes {
        Scopes(bits & Scopes::ALL.0)
    }

    /// The number on disk.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Both.
    #[must_use]
    pub fn with(self, other: Scopes) -> Scopes {
        Scopes(self.0 | other.0)
    }

    /// Whether every scope of `wanted` is here.
    #[must_use]
    pub fn contains(self, wanted: Scopes) -> bool {
        self.0 & wanted.0 == wanted.0
    }
}

/// An API key. Its text is `bw_<public id>_<secret>`.
#[derive(Clone, PartialEq, Eq)]
pub struct KeyRecord {
    /// The public part, for look-up and lists.
    pub id: [u8; 10],
    /// The app it belongs to.
    pub app: AppId,
    /// What it may do.
    pub scopes: Scopes,
    /// A name for people.
    pub name: String,
    /// When it was made, Unix milliseconds.
    pub created_ms: u64,
    /// Keyed hash of the secret part.
    pub secret_hash: [u8; 32],
}

/// What was erased for good, so that a backup made before does not bring it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Erased {
    /// A device was revoked, with everything in its mailbox.
    Device(DeviceId),
    /// An API key was revoked.
    Key([u8; 10]),
    /// A notification was taken back by its publisher, or with its device.
    Notification(PingId, DeviceId),
    /// A ping to an audience was taken back before it had reached all of it: it must not go on.
    Expansion(PingId),
    /// Everything of a user went: the keyed hash of the name, because the name must not stay for the sake of its erasure.
    User([u8; 32]),
}

/// That something was erased. Kept for as long as a backup may be restored that still has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Erasure {
    /// Whose.
    pub app: AppId,
    /// What.
    pub what: Erased,
    /// When, Unix milliseconds.
    pub at_ms: u64,
    /// Until when it is kept, Unix milliseconds.
    pub until_ms: u64,
}

/// That an idempotency key was used, with what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdempotencyRecord {
    /// Whose key.
    pub app: AppId,
    /// Hash of the key.
    pub key_hash: [u8; 32],
    /// SHA-256 of the raw body it was used with.
    pub body_hash: [u8; 32],
    /// The ping it made.
    pub ping: PingId,
    /// How many devices that ping addressed, so that a repeat gets the same answer.
    pub devices: u32,
    /// The TTL that was granted, seconds.
    pub ttl_s: u64,
    /// When, Unix milliseconds.
    pub at_ms: u64,
}
