//! One ping's content on its way, shared by all the mailboxes it goes to.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;

use super::ids::{AppId, PingId};

/// How much a notification matters (RFC 8030 section 5.3); the order is the order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum Urgency {
    /// Advertisements, telemetry.
    VeryLow,
    /// Topic updates.
    Low,
    /// Chat, calendar. The default.
    #[default]
    Normal,
    /// Calls, alarms.
    High,
}

impl Urgency {
    /// All of them, lowest first.
    pub const ALL: [Urgency; 4] = [
        Urgency::VeryLow,
        Urgency::Low,
        Urgency::Normal,
        Urgency::High,
    ];

    /// Its rank, 0 for the lowest. This is the number on disk.
    #[must_use]
    pub fn rank(self) -> u8 {
        match self {
            Urgency::VeryLow => 0,
            Urgency::Low => 1,
            Urgency::Normal => 2,
            Urgency::High => 3,
        }
    }

    /// The urgency of a rank, if there is one.
    #[must_use]
    pub fn from_rank(rank: u8) -> Option<Urgency> {
        Urgency::ALL.get(usize::from(rank)).copied()
    }
}

/// A replacement key: a newer notification takes the place of an undelivered one with the same key.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CollapseKey(Arc<str>);

impl CollapseKey {
    /// The longest key, in bytes: long enough for a UUID with a prefix, short enough for every index.
    pub const MAX_BYTES: usize = 64;

    /// A key of 1 to [`CollapseKey::MAX_BYTES`] bytes; anything else is `None`.
    #[must_use]
    pub fn new(text: &str) -> Option<CollapseKey> {
        (1..=Self::MAX_BYTES)
            .contains(&text.len())
            .then(|| CollapseKey(text.into()))
    }

    /// The key as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A slot in which a transport keeps the encoded form of a notification, so that a fan-out is encoded once.
/// The core never looks inside.
#[derive(Default)]
pub struct WireSlot(OnceLock<Arc<dyn Any + Send + Sync>>);

impl WireSlot {
    /// The value of the slot, made by `make` the first time. `None` if the slot holds another type.
    pub fn get_or_init<T: Any + Send + Sync>(&self, make: impl FnOnce() -> T) -> Option<Arc<T>> {
        Arc::clone(self.0.get_or_init(|| Arc::new(make())))
            .downcast::<T>()
            .ok()
    }
}

impl fmt::Debug for WireSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WireSlot")
    }
}

/// Something that must live as long as the notification, such as a share of the memory reserve.
#[derive(Clone, Default)]
pub struct Hold(Option<Arc<dyn Any + Send + Sync>>);

impl Hold {
    /// Keeps `value` until the last copy of the notification is gone.
    pub fn of<T: Any + Send + Sync>(value: T) -> Hold {
        Hold(Some(Arc::new(value)))
    }
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Hold({})",
            if self.0.is_some() {
                "something"
            } else {
                "nothing"
            }
        )
    }
}

/// What one ping says to each of its devices. Immutable and shared.
#[derive(Debug)]
pub struct Notification {
    /// The ping that made it.
    pub ping: PingId,
    /// The app it belongs to.
    pub app: AppId,
    /// When it was accepted, Unix milliseconds.
    pub accepted_ms: u64,
    /// When it must no longer be sent, Unix milliseconds. For a transient one: 30 s after acceptance.
    pub expires_ms: u64,
    /// How much it matters.
    pub urgency: Urgency,
    /// Its replacement key, if any.
    pub collapse: Option<CollapseKey>,
    /// Its content size as limits count it: UTF-8 plus decoded bytes over all content members.
    pub size: u32,
    /// TTL 0: sent now or never, and never stored.
    pub transient: bool,
    /// The ping addresses more than one device, so the body is stored once beside the rows.
    pub shared: bool,
    /// The content, opaque here: an encoded map that the transports understand.
    pub content: Bytes,
    /// Where a transport keeps the encoded frame.
    pub wire: WireSlot,
    /// What is given back when the last mailbox lets go.
    pub hold: Hold,
}
