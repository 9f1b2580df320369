//! The frames as tables: JSON names, CBOR keys, types. docs/protocol.md prints them, and a test holds them against the golden
//! vectors, so that tables, codecs and vectors cannot drift apart.

use crate::codec::cbor::{self, frame_type, key};
use crate::content::key as content;
use crate::frame::{GoawayReason, PresenceState, Urgency, Verdict};
use crate::{Encoding, Retry};

/// A frame type, or another kind of map with members.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// JSON: the value of `type`.
    pub name: &'static str,
    /// CBOR: the value of key 0. `None` for maps inside of frames.
    pub number: Option<u64>,
    /// What it is for.
    pub about: &'static str,
    /// Its members, without the type.
    pub members: &'static [Member],
}

/// A member of a frame.
#[derive(Debug, Clone, Copy)]
pub struct Member {
    /// JSON name.
    pub name: &'static str,
    /// CBOR key.
    pub key: u64,
    /// Type in both codecs.
    pub kind: Kind,
    /// May be absent, or `null`.
    pub optional: bool,
    /// What it says.
    pub about: &'static str,
}

/// Types of members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Unsigned integer of at most 2^53 - 1.
    Integer,
    /// Unsigned integer of at most 2^32 - 1.
    Small,
    /// Boolean.
    Boolean,
    /// UTF-8 text.
    Text,
    /// Array of texts.
    Texts,
    /// CBOR: byte string. JSON: padded standard base64.
    Bytes,
    /// CBOR: byte string of 16 bytes. JSON: 26 base32 characters.
    Id,
    /// Array of ids.
    Ids,
    /// Array of maps with `id` and `verdict`.
    Seen,
    /// Array of two integers: at least, at most.
    Range,
    /// `acknowledged` or `declined`.
    Verdict,
    /// `very-low` to `high`.
    Urgency,
    /// `active` or `idle`.
    PresenceState,
    /// `drain`, `replaced`, `revoked`, `upgrade`.
    GoawayReason,
    /// `never`, `later`, `now`.
    Retry,
}

impl Kind {
    /// The word for it in docs/protocol.md.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Integer => "integer",
            Self::Small => "integer (32 bits)",
            Self::Boolean => "boolean",
            Self::Text => "text",
            Self::Texts => "array of text",
            Self::Bytes => "bytes",
            Self::Id => "id",
            Self::Ids => "array of id",
            Self::Seen => "array of seen",
            Self::Range => "array of two integers (32 bits)",
            Self::Verdict => "verdict",
            Self::Urgency => "urgency",
            Self::PresenceState => "presence state",
            Self::GoawayReason => "goaway reason",
            Self::Retry => "retry",
        }
    }
}

const fn member(name: &'static str, key: u64, kind: Kind, about: &'static str) -> Member {
    Member {
        name,
        key,
        kind,
        optional: false,
        about,
    }
}

const fn optional(name: &'static str, key: u64, kind: Kind, about: &'static str) -> Member {
    Member {
        name,
        key,
        kind,
        optional: true,
        about,
    }
}

/// What a device says.
pub const DEVICE_FRAMES: &[Shape] = &[
    Shape {
        name: "hello",
        number: Some(frame_type::HELLO),
        about: "Who the device is. The first frame, once in a session.",
        members: &[
            member("device", key::hello::DEVICE, Kind::Id, "The device's id."),
            optional(
                "secret",
                key::hello::SECRET,
                Kind::Text,
                "Its secret; absent with a client certificate. 1 to 256 bytes.",
            ),
            member(
                "instance",
                key::hello::INSTANCE,
                Kind::Id,
                "Random, made anew by every client process.",
            ),
            member(
                "attempt",
                key::hello::ATTEMPT,
                Kind::Integer,
                "Higher with every connection of one instance.",
            ),
            optional(
                "seen",
                key::hello::SEEN,
                Kind::Seen,
                "Verdicts whose acknowledgement may have been lost, at most 128.",
            ),
            optional(
                "window",
                key::hello::WINDOW,
                Kind::Small,
                "How many notifications may be in flight: 1 to 256, 32 when absent.",
            ),
            optional(
                "min_urgency",
                key::hello::MIN_URGENCY,
                Kind::Urgency,
                "Send nothing less urgent in this session.",
            ),
            optional(
                "agent",
                key::hello::AGENT,
                Kind::Text,
                "Name and version of the client, for the operator. At most 256 bytes.",
            ),
        ],
    },
    Shape {
        name: "ack",
        number: Some(frame_type::ACK),
        about: "The verdict \"acknowledged\". Exactly one of the two members.",
        members: &[
            optional(
                "up_to",
                key::ack::UP_TO,
                Kind::Integer,
                "This `seq` of this session, and all before it.",
            ),
            optional(
                "ids",
                key::ack::IDS,
                Kind::Ids,
                "These notifications, of whatever session; at most 256. Unknown ones are ignored.",
            ),
        ],
    },
    Shape {
        name: "decline",
        number: Some(frame_type::DECLINE),
        about: "The verdict \"declined\": the device cannot or will not use it.",
        members: &[
            member("id", key::decline::ID, Kind::Id, "The notification."),
            member(
                "reason",
                key::decline::REASON,
                Kind::Text,
                "Why, for the publisher; at most 256 bytes. `expired` for what arrived too late.",
            ),
        ],
    },
    Shape {
        name: "presence",
        number: Some(frame_type::PRESENCE),
        about: "Whether a person uses the app. Not the keep-alive.",
        members: &[member(
            "state",
            key::presence::STATE,
            Kind::PresenceState,
            "`active` or `idle`.",
        )],
    },
    Shape {
        name: "subscribe",
        number: Some(frame_type::SUBSCRIBE),
        about: "Become a member of topics, as far as the app allows it; answered by `subscribed`.",
        members: &[member(
            "topics",
            key::topics::TOPICS,
            Kind::Texts,
            "At most 100 names of 1 to 128 bytes.",
        )],
    },
    Shape {
        name: "unsubscribe",
        number: Some(frame_type::UNSUBSCRIBE),
        about: "Leave topics; answered by `subscribed`.",
        members: &[member(
            "topics",
            key::topics::TOPICS,
            Kind::Texts,
            "At most 100 names of 1 to 128 bytes.",
        )],
    },
    Shape {
        name: "ping",
        number: Some(frame_type::PING),
        about: "Keep-alive; answered by `pong`.",
        members: &[],
    },
    Shape {
        name: "bye",
        number: Some(frame_type::BYE),
        about: "A clean leave; the server closes.",
        members: &[],
    },
];

/// What a server says. The members of [`CONTENT`] stand in `notify` beside those listed here.
pub const SERVER_FRAMES: &[Shape] = &[
    Shape {
        name: "welcome",
        number: Some(frame_type::WELCOME),
        about: "The session stands.",
        members: &[
            member(
                "session",
                key::welcome::SESSION,
                Kind::Integer,
                "Number of the session in the server's log.",
            ),
            member(
                "pending",
                key::welcome::PENDING,
                Kind::Integer,
                "How many notifications wait for the device.",
            ),
            member(
                "window",
                key::welcome::WINDOW,
                Kind::Small,
                "How many may be in flight: the granted window.",
            ),
            member(
                "max_bytes",
                key::welcome::MAX_BYTES,
                Kind::Small,
                "Greatest content of one notification, in bytes.",
            ),
            member(
                "keep_alive_s",
                key::welcome::KEEP_ALIVE_S,
                Kind::Range,
                "Advised seconds between signs of life from the device.",
            ),
            member(
                "now_ms",
                key::welcome::NOW_MS,
                Kind::Integer,
                "The server's wall time.",
            ),
        ],
    },
    Shape {
        name: "notify",
        number: Some(frame_type::NOTIFY),
        about: "One notification, with its content beside these members.",
        members: &[
            member(
                "seq",
                key::notify::SEQ,
                Kind::Integer,
                "1, 2, 3 … in this session.",
            ),
            member(
                "redelivered",
                key::notify::REDELIVERED,
                Kind::Boolean,
                "False only if this run of the server accepted it and never sent it.",
            ),
            member(
                "id",
                key::notify::ID,
                Kind::Id,
                "The ping that made it: its identity.",
            ),
            member(
                "accepted_ms",
                key::notify::ACCEPTED_MS,
                Kind::Integer,
                "When the server accepted it.",
            ),
            member(
                "expires_ms",
                key::notify::EXPIRES_MS,
                Kind::Integer,
                "When it is of no more use.",
            ),
            member(
                "urgency",
                key::notify::URGENCY,
                Kind::Urgency,
                "How urgent it is.",
            ),
        ],
    },
    Shape {
        name: "withdraw",
        number: Some(frame_type::WITHDRAW),
        about: "Sent earlier, now revoked or read elsewhere; the app may take them off the screen.",
        members: &[member(
            "ids",
            key::withdraw::IDS,
            Kind::Ids,
            "The notifications, at most 256.",
        )],
    },
    Shape {
        name: "pong",
        number: Some(frame_type::PONG),
        about: "Answer to `ping`.",
        members: &[],
    },
    Shape {
        name: "subscribed",
        number: Some(frame_type::SUBSCRIBED),
        about: "Answer to `subscribe` and `unsubscribe`.",
        members: &[member(
            "topics",
            key::topics::TOPICS,
            Kind::Texts,
            "All topics that the device is a member of now.",
        )],
    },
    Shape {
        name: "goaway",
        number: Some(frame_type::GOAWAY),
        about: "Leave in good order, and come back as told.",
        members: &[
            member("reason", key::goaway::REASON, Kind::GoawayReason, "Why."),
            member(
                "reconnect_ms",
                key::goaway::RECONNECT_MS,
                Kind::Range,
                "Come back at a random moment of this range, milliseconds from now.",
            ),
            optional(
                "endpoint",
                key::goaway::ENDPOINT,
                Kind::Text,
                "Where to, if not to the same place (`host:port`). At most 512 bytes.",
            ),
        ],
    },
    Shape {
        name: "error",
        number: Some(frame_type::ERROR),
        about: "What went wrong; then the server closes.",
        members: &[
            member(
                "code",
                key::error::CODE,
                Kind::Text,
                "A name from the table of codes, or of a later version. 1 to 64 bytes.",
            ),
            member(
                "message",
                key::error::MESSAGE,
                Kind::Text,
                "One sentence for the developer's log. At most 512 bytes.",
            ),
            member(
                "retry",
                key::error::RETRY,
                Kind::Retry,
                "When to try again.",
            ),
        ],
    },
];

/// The content of a `notify`.
pub const CONTENT: Shape = Shape {
    name: "content",
    number: None,
    about: "What the app gets to see.",
    members: &[
        optional(
            "title",
            content::TITLE,
            Kind::Text,
            "Headline of the message that is shown.",
        ),
        optional(
            "body",
            content::BODY,
            Kind::Text,
            "Text of the message that is shown.",
        ),
        optional(
            "sound",
            content::SOUND,
            Kind::Text,
            "Name of the sound to play.",
        ),
        optional(
            "badge",
            content::BADGE,
            Kind::Small,
            "Number to show on the app's icon; 0 takes it away.",
        ),
        optional(
            "vibrate_ms",
            content::VIBRATE_MS,
            Kind::Small,
            "How long to vibrate.",
        ),
        optional(
            "category",
            content::CATEGORY,
            Kind::Text,
            "Name of the set of actions that the app offers with it.",
        ),
        optional(
            "sync",
            content::SYNC,
            Kind::Texts,
            "Names of sources to synchronise, at most 100.",
        ),
        optional("data", content::DATA, Kind::Bytes, "Bytes for the app."),
        optional(
            "encoding",
            content::ENCODING,
            Kind::Text,
            "`aes128gcm` when `data` is encrypted end to end.",
        ),
        optional(
            "topic",
            content::TOPIC,
            Kind::Text,
            "The topic that the ping addressed. At most 128 bytes.",
        ),
    ],
};

/// One entry of `seen` in `hello`.
pub const SEEN: Shape = Shape {
    name: "seen",
    number: None,
    about: "A verdict of an earlier session.",
    members: &[
        member("id", key::seen::ID, Kind::Id, "The notification."),
        member(
            "verdict",
            key::seen::VERDICT,
            Kind::Verdict,
            "What became of it.",
        ),
    ],
};

/// The enumerations: name, and the JSON text of each value. In CBOR a value is its place in the list, from 0.
pub fn enumerations() -> [(&'static str, Vec<&'static str>); 5] {
    let verdict = |value: &Verdict| match value {
        Verdict::Acknowledged => "acknowledged",
        Verdict::Declined => "declined",
    };
    let presence = |value: &PresenceState| match value {
        PresenceState::Active => "active",
        PresenceState::Idle => "idle",
    };
    let reason = |value: &GoawayReason| match value {
        GoawayReason::Drain => "drain",
        GoawayReason::Replaced => "replaced",
        GoawayReason::Revoked => "revoked",
        GoawayReason::Upgrade => "upgrade",
    };
    [
        (
            Kind::Verdict.name(),
            cbor::VERDICTS.iter().map(verdict).collect(),
        ),
        (
            Kind::Urgency.name(),
            cbor::URGENCIES.iter().map(|value| value.name()).collect(),
        ),
        (
            Kind::PresenceState.name(),
            cbor::PRESENCE_STATES.iter().map(presence).collect(),
        ),
        (
            Kind::GoawayReason.name(),
            cbor::GOAWAY_REASONS.iter().map(reason).collect(),
        ),
        (
            Kind::Retry.name(),
            cbor::RETRIES
                .iter()
                .map(|value: &Retry| value.name())
                .collect(),
        ),
    ]
}

/// The values of the content member `encoding`; a text in both codecs.
pub const ENCODINGS: &[Encoding] = &[Encoding::Aes128Gcm];

impl Urgency {
    /// The name on the wire and in the API.
    pub const fn name(self) -> &'static str {
        match self {
            Self::VeryLow => "very-low",
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}
