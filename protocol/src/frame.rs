//! The frames of protocol version 1: plain values, the same for both codecs. docs/protocol.md explains each member.

use std::fmt;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::code::{Code, Retry};
use crate::content::Content;
use crate::id::Id;
use crate::limits::{MESSAGE_BYTES_MAX, WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN};

/// What a device did with a notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It was handed to the app.
    Acknowledged,
    /// The device cannot or will not use it.
    Declined,
}

/// How urgent a notification is (RFC 8030 section 5.3). Ordered from least to most urgent.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Urgency {
    /// On power and Wi-Fi: advertisements.
    VeryLow,
    /// On either power or Wi-Fi: topic updates.
    Low,
    /// On neither: chat or calendar messages.
    #[default]
    Normal,
    /// Low battery: incoming calls, alarms.
    High,
}

/// Whether a person uses the app just now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PresenceState {
    /// The app is in front.
    Active,
    /// It is not.
    Idle,
}

/// Why the server sends the device away in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GoawayReason {
    /// The server shuts down or gives connections away.
    Drain,
    /// A newer session of this device took over.
    Replaced,
    /// The device was revoked.
    Revoked,
    /// Come back to another endpoint or version.
    Upgrade,
}

impl GoawayReason {
    /// The code that the connection is closed with.
    pub const fn code(self) -> Code {
        match self {
            Self::Drain => Code::Drain,
            Self::Replaced => Code::Replaced,
            Self::Revoked => Code::Revoked,
            Self::Upgrade => Code::Upgrade,
        }
    }
}

/// A verdict of an earlier session whose acknowledgement may have been lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
pub struct Seen {
    /// The notification.
    pub id: Id,
    /// What became of it.
    pub verdict: Verdict,
}

// By hand, because a derived implementation would also take `[id, verdict]`.
impl<'de> Deserialize<'de> for Seen {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Members {
            id: Id,
            verdict: Verdict,
        }
        struct Object;
        impl<'de> Visitor<'de> for Object {
            type Value = Seen;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with `id` and `verdict`")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Seen, A::Error> {
                let Members { id, verdict } =
                    Members::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Seen { id, verdict })
            }
        }
        deserializer.deserialize_map(Object)
    }
}

/// A device secret: shown once when the device is registered, said in `hello`. `Debug` does not print it.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl Secret {
    /// The text, for comparing it with what is known.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// `hello`: who the device is. The first frame of a session, said only on the carrier that won the race.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The device's id, from its registration.
    pub device: Id,
    /// The device's secret; absent with a client certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<Secret>,
    /// Random per client process.
    pub instance: Id,
    /// Rising with every connection of one instance, so that a late connection cannot replace a newer one.
    pub attempt: u64,
    /// Verdicts whose acknowledgement may have been lost, at most 128.
    #[serde(
        default,
        deserialize_with = "null_as_empty",
        skip_serializing_if = "Vec::is_empty"
    )]
    pub seen: Vec<Seen>,
    /// How many notifications may be in flight, 1 to 256; 32 when absent. The granted one is in `welcome`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<u16>,
    /// Send nothing less urgent in this session.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_urgency: Option<Urgency>,
    /// Name and version of the client, for the operator's eyes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<String>,
}

impl Hello {
    /// The window that the device asks for, or the default.
    pub fn asked_window(&self) -> u16 {
        self.window
            .unwrap_or(WINDOW_DEFAULT)
            .clamp(WINDOW_MIN, WINDOW_MAX)
    }
}

/// `ack`: the verdict "acknowledged" for one or more notifications of this session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "AckMembers", into = "AckMembers")]
pub enum Ack {
    /// This `seq` and all before it.
    UpTo(u64),
    /// These ids, at most 256; unknown ones are ignored.
    Ids(Vec<Id>),
}

#[derive(Serialize, Deserialize)]
struct AckMembers {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    up_to: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ids: Option<Vec<Id>>,
}

impl TryFrom<AckMembers> for Ack {
    type Error = &'static str;

    fn try_from(members: AckMembers) -> Result<Self, Self::Error> {
        match (members.up_to, members.ids) {
            (Some(seq), None) => Ok(Self::UpTo(seq)),
            (None, Some(ids)) => Ok(Self::Ids(ids)),
            (None, None) => Err("missing field `up_to`"),
            (Some(_), Some(_)) => Err("either `up_to` or `ids`"),
        }
    }
}

impl From<Ack> for AckMembers {
    fn from(ack: Ack) -> Self {
        match ack {
            Ack::UpTo(seq) => Self {
                up_to: Some(seq),
                ids: None,
            },
            Ack::Ids(ids) => Self {
                up_to: None,
                ids: Some(ids),
            },
        }
    }
}

/// `decline`: the device cannot or will not use a notification. Terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decline {
    /// The notification.
    pub id: Id,
    /// Why, for the publisher: a word or a short sentence, at most 256 bytes. `expired` is the one that clients send by themselves.
    pub reason: String,
}

/// `presence`: feeds the queueing rules. It is not the keep-alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Presence {
    /// Whether a person uses the app.
    pub state: PresenceState,
}

/// Names of topics: `subscribe`, `unsubscribe`, and the full set in `subscribed`. At most 100 names of 1 to 128 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topics {
    /// The names.
    pub topics: Vec<String>,
}

/// What a device says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum DeviceFrame {
    /// Who the device is.
    Hello(Hello),
    /// These were handed to the app.
    Ack(Ack),
    /// This one cannot be used.
    Decline(Decline),
    /// Whether a person uses the app.
    Presence(Presence),
    /// Become a member of these topics, as far as the app allows it.
    Subscribe(Topics),
    /// Leave these topics.
    Unsubscribe(Topics),
    /// Keep-alive; answered by `pong`.
    Ping,
    /// A clean leave; the server closes.
    Bye,
}

/// Bounds of the keep-alive that the server advises, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct KeepAlive {
    /// Shortest sensible interval, at least 1.
    pub min_s: u32,
    /// Longest interval; the server drops the link after 2.5 times this without a sign of life.
    pub max_s: u32,
}

impl From<(u32, u32)> for KeepAlive {
    fn from((min_s, max_s): (u32, u32)) -> Self {
        Self { min_s, max_s }
    }
}

impl From<KeepAlive> for (u32, u32) {
    fn from(bounds: KeepAlive) -> Self {
        (bounds.min_s, bounds.max_s)
    }
}

/// When to reconnect: a random moment of this range, in milliseconds from now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "(u32, u32)", into = "(u32, u32)")]
pub struct ReconnectRange {
    /// Not before.
    pub min_ms: u32,
    /// Not after.
    pub max_ms: u32,
}

impl From<(u32, u32)> for ReconnectRange {
    fn from((min_ms, max_ms): (u32, u32)) -> Self {
        Self { min_ms, max_ms }
    }
}

impl From<ReconnectRange> for (u32, u32) {
    fn from(range: ReconnectRange) -> Self {
        (range.min_ms, range.max_ms)
    }
}

/// `welcome`: the session stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Number of the session, to find it in the server's log. At most 2^53 - 1.
    pub session: u64,
    /// How many notifications wait for the device.
    pub pending: u64,
    /// How many may be in flight: the granted window, 1 to 256.
    pub window: u16,
    /// Greatest content of one notification that this server sends, in bytes of [`Content::size`].
    pub max_bytes: u32,
    /// Within which bounds the device keeps the link alive.
    pub keep_alive_s: KeepAlive,
    /// The server's wall time. The device judges expiry by this plus its own monotonic time since.
    pub now_ms: u64,
}

/// `notify`: one notification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Notify {
    /// 1, 2, 3 … within the session.
    pub seq: u64,
    /// False only if this run of the server accepted the notification and never sent it before.
    pub redelivered: bool,
    /// The ping that made it. This, and not `seq`, is its identity.
    pub id: Id,
    /// When the server accepted it.
    pub accepted_ms: u64,
    /// When it is of no more use; nothing is sent, and nothing handed to the app, past this moment.
    pub expires_ms: u64,
    /// How urgent it is.
    pub urgency: Urgency,
    /// What the app gets to see; in the frame its members stand beside the others.
    #[serde(flatten)]
    pub content: Content,
}

/// `withdraw`: sent earlier, now revoked or read elsewhere; the app may take it off the screen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdraw {
    /// The notifications, at most 256.
    pub ids: Vec<Id>,
}

/// `goaway`: the server sends the device away in good order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Goaway {
    /// Why.
    pub reason: GoawayReason,
    /// When to come back; meaningless when revoked.
    pub reconnect_ms: ReconnectRange,
    /// Where to come back to, if not to the same place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// `error`: the last word before the server closes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorFrame {
    /// Name of a [`Code`]. A newer server may send one that this side does not know yet; `retry` says what to do then.
    pub code: String,
    /// One sentence for the developer's log. Never content or secrets.
    pub message: String,
    /// When to try again.
    pub retry: Retry,
}

impl ErrorFrame {
    /// The frame for a code, with the code's own retry advice. A message over 512 bytes is cut.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let mut message: String = message.into();
        if message.len() > MESSAGE_BYTES_MAX {
            message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
        }
        Self {
            code: code.name().to_owned(),
            message,
            retry: code.retry(),
        }
    }

    /// The code, if this side knows it.
    pub fn known_code(&self) -> Option<Code> {
        Code::from_name(&self.code)
    }
}

/// What a server says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum ServerFrame {
    /// The session stands.
    Welcome(Welcome),
    /// One notification.
    Notify(Notify),
    /// Take these off the screen.
    Withdraw(Withdraw),
    /// Answer to `ping`.
    Pong,
    /// All topics that the device is a member of now.
    Subscribed(Topics),
    /// Leave and come back.
    Goaway(Goaway),
    /// The last word.
    Error(ErrorFrame),
}

/// Names of the frames, as in the JSON member `type`.
impl DeviceFrame {
    /// The name of the frame, for logs and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Ack(_) => "ack",
            Self::Decline(_) => "decline",
            Self::Presence(_) => "presence",
            Self::Subscribe(_) => "subscribe",
            Self::Unsubscribe(_) => "unsubscribe",
            Self::Ping => "ping",
            Self::Bye => "bye",
        }
    }
}

impl ServerFrame {
    /// The name of the frame, for logs and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Welcome(_) => "welcome",
            Self::Notify(_) => "notify",
            Self::Withdraw(_) => "withdraw",
            Self::Pong => "pong",
            Self::Subscribed(_) => "subscribed",
            Self::Goaway(_) => "goaway",
            Self::Error(_) => "error",
        }
    }
}

/// `null` stands for an absent member.
fn null_as_empty<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Vec<T>, D::Error> {
    Ok(Option::<Vec<T>>::deserialize(deserializer)?.unwrap_or_default())
}
