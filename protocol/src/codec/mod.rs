//! Bytes to frames and back, in either codec. Decoding never panics, checks every limit, and leaves nothing unread.

pub(crate) mod cbor;
pub(crate) mod json;

use crate::code::Code;
use crate::frame::{Ack, DeviceFrame, ServerFrame, Topics};
use crate::limits::*;

/// How frames are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Codec {
    /// The compact one: CBOR (RFC 8949), maps with integer keys. QUIC always; WebSocket in binary messages.
    Cbor,
    /// The readable one: JSON objects with a `type` member. WebSocket in text messages.
    Json,
}

/// What came out of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded<F> {
    /// A frame of a type that we know.
    Frame(F),
    /// A well-formed frame of a type that we do not know: a later version's. It is skipped (docs/protocol.md).
    Skipped,
}

/// Why bytes are no frame. Its text may be shown to the peer: it names members and positions, never contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// Larger than the receiver accepts; noticed before decoding.
    #[error("a frame of {len} bytes; at most {limit} are accepted")]
    TooLarge {
        /// Length of the frame in bytes.
        len: u64,
        /// What is accepted, in bytes.
        limit: u64,
    },
    /// Not CBOR, or cut short.
    #[error("not well-formed CBOR at byte {0}")]
    NotCbor(usize),
    /// Not JSON, or cut short.
    #[error("not well-formed JSON at line {line}, column {column}")]
    NotJson {
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1.
        column: usize,
    },
    /// The frame is not a map (CBOR: of definite length) or object.
    #[error("a frame is one map (CBOR, definite length) or object (JSON)")]
    NotAMap,
    /// Arrays and maps are nested too deep.
    #[error("nested deeper than {DEPTH_MAX}")]
    TooDeep,
    /// Bytes behind the frame.
    #[error("bytes behind the end of the frame")]
    TrailingBytes,
    /// A member is missing.
    #[error("member `{0}` is missing")]
    Missing(&'static str),
    /// A member came twice.
    #[error("member `{0}` came twice")]
    Duplicate(&'static str),
    /// A member has another type than it should, or a value that does not exist.
    #[error("member `{0}` has a wrong type or value")]
    WrongValue(&'static str),
    /// The same, where only the place is known.
    #[error("a member has a wrong type or value at line {line}, column {column}")]
    WrongValueAt {
        /// Line, from 1.
        line: usize,
        /// Column in bytes, from 1.
        column: usize,
    },
    /// A number is outside of its range.
    #[error("member `{0}` is out of range")]
    OutOfRange(&'static str),
    /// A text is too long or too short.
    #[error("member `{0}` is too long or too short")]
    Length(&'static str),
    /// An array has too many entries.
    #[error("member `{0}` has too many entries")]
    TooMany(&'static str),
    /// A WebSocket text message where a binary one belongs, or the other way round.
    #[error("binary messages carry CBOR, text messages JSON; this session speaks the other one")]
    WrongMessageKind,
}

impl DecodeError {
    /// The code that the peer is told.
    pub const fn code(&self) -> Code {
        match self {
            Self::TooLarge { .. } => Code::FrameTooLarge,
            Self::NotCbor(_)
            | Self::NotJson { .. }
            | Self::NotAMap
            | Self::TooDeep
            | Self::TrailingBytes
            | Self::Missing(_)
            | Self::Duplicate(_)
            | Self::WrongValue(_)
            | Self::WrongValueAt { .. }
            | Self::OutOfRange(_)
            | Self::Length(_)
            | Self::TooMany(_)
            | Self::WrongMessageKind => Code::Malformed,
        }
    }
}

impl Codec {
    /// The lower-case name, for logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cbor => "cbor",
            Self::Json => "json",
        }
    }

    /// Greatest frame that a server may send in this codec, in bytes.
    pub const fn server_frame_max_bytes(self) -> usize {
        match self {
            Self::Cbor => SERVER_FRAME_MAX_BYTES,
            Self::Json => SERVER_JSON_FRAME_MAX_BYTES,
        }
    }

    /// Writes a device's frame.
    pub fn encode_device(self, frame: &DeviceFrame) -> Vec<u8> {
        match self {
            Self::Cbor => cbor::write_device(frame),
            Self::Json => json::write(frame),
        }
    }

    /// Writes a server's frame. Where many sessions get the same `notify`, [`SharedNotify`](crate::SharedNotify) is cheaper.
    pub fn encode_server(self, frame: &ServerFrame) -> Vec<u8> {
        match self {
            Self::Cbor => cbor::write_server(frame),
            Self::Json => json::write(frame),
        }
    }

    /// Reads a device's frame: exactly one, of at most [`DEVICE_FRAME_MAX_BYTES`].
    ///
    /// # Errors
    /// The device's fault, always: the frame is too large, or does not follow docs/protocol.md.
    pub fn decode_device(self, bytes: &[u8]) -> Result<Decoded<DeviceFrame>, DecodeError> {
        self.decode_device_within(bytes, DEVICE_FRAME_MAX_BYTES)
    }

    /// The same with a bound of one's own, for a server whose operator takes larger frames.
    ///
    /// # Errors
    /// As [`decode_device`](Self::decode_device).
    pub fn decode_device_within(
        self,
        bytes: &[u8],
        most: usize,
    ) -> Result<Decoded<DeviceFrame>, DecodeError> {
        check_size(bytes, most)?;
        let decoded = match self {
            Self::Cbor => cbor::read_device(bytes)?,
            Self::Json => json::read_device(bytes)?,
        };
        if let Decoded::Frame(frame) = &decoded {
            check_device(frame)?;
        }
        Ok(decoded)
    }

    /// Reads a server's frame: exactly one, of at most [`server_frame_max_bytes`](Self::server_frame_max_bytes).
    ///
    /// # Errors
    /// The server's fault, always: the frame is too large, or does not follow docs/protocol.md.
    pub fn decode_server(self, bytes: &[u8]) -> Result<Decoded<ServerFrame>, DecodeError> {
        check_size(bytes, self.server_frame_max_bytes())?;
        let decoded = match self {
            Self::Cbor => cbor::read_server(bytes)?,
            Self::Json => json::read_server(bytes)?,
        };
        if let Decoded::Frame(frame) = &decoded {
            check_server(frame)?;
        }
        Ok(decoded)
    }
}

fn check_size(bytes: &[u8], limit: usize) -> Result<(), DecodeError> {
    if bytes.len() > limit {
        return Err(DecodeError::TooLarge {
            len: bytes.len() as u64,
            limit: limit as u64,
        });
    }
    Ok(())
}

// What follows is checked here for both codecs, after the types are known.

fn check_device(frame: &DeviceFrame) -> Result<(), DecodeError> {
    match frame {
        DeviceFrame::Hello(hello) => {
            if let Some(secret) = &hello.secret {
                check_length("secret", secret.expose(), 1, SECRET_BYTES_MAX)?;
            }
            check_integer("attempt", hello.attempt)?;
            check_count("seen", hello.seen.len(), SEEN_MAX)?;
            if let Some(window) = hello.window {
                check_window(window)?;
            }
            check_length(
                "agent",
                hello.agent.as_deref().unwrap_or_default(),
                0,
                AGENT_BYTES_MAX,
            )
        }
        DeviceFrame::Ack(Ack::UpTo(seq)) => check_integer("up_to", *seq),
        DeviceFrame::Ack(Ack::Ids(ids)) => check_count("ids", ids.len(), ACK_IDS_MAX),
        DeviceFrame::Decline(decline) => {
            check_length("reason", &decline.reason, 0, REASON_BYTES_MAX)
        }
        DeviceFrame::Subscribe(topics) | DeviceFrame::Unsubscribe(topics) => check_topics(topics),
        DeviceFrame::Presence(_) | DeviceFrame::Ping | DeviceFrame::Bye => Ok(()),
    }
}

fn check_server(frame: &ServerFrame) -> Result<(), DecodeError> {
    match frame {
        ServerFrame::Welcome(welcome) => {
            check_integer("session", welcome.session)?;
            check_integer("pending", welcome.pending)?;
            check_window(welcome.window)?;
            check_integer("now_ms", welcome.now_ms)?;
            let bounds = welcome.keep_alive_s;
            if bounds.min_s < 1 || bounds.min_s > bounds.max_s || bounds.max_s > KEEP_ALIVE_MAX_S {
                return Err(DecodeError::OutOfRange("keep_alive_s"));
            }
            Ok(())
        }
        ServerFrame::Notify(notify) => {
            check_integer("seq", notify.seq)?;
            check_integer("accepted_ms", notify.accepted_ms)?;
            check_integer("expires_ms", notify.expires_ms)
        }
        ServerFrame::Withdraw(withdraw) => check_count("ids", withdraw.ids.len(), WITHDRAW_IDS_MAX),
        ServerFrame::Subscribed(topics) => check_topics(topics),
        ServerFrame::Goaway(goaway) => {
            let range = goaway.reconnect_ms;
            if range.min_ms > range.max_ms || range.max_ms > RECONNECT_MAX_MS {
                return Err(DecodeError::OutOfRange("reconnect_ms"));
            }
            check_length(
                "endpoint",
                goaway.endpoint.as_deref().unwrap_or_default(),
                0,
                ENDPOINT_BYTES_MAX,
            )
        }
        ServerFrame::Error(error) => {
            check_length("code", &error.code, 1, CODE_BYTES_MAX)?;
            check_length("message", &error.message, 0, MESSAGE_BYTES_MAX)
        }
        ServerFrame::Pong => Ok(()),
    }
}

fn check_integer(member: &'static str, value: u64) -> Result<(), DecodeError> {
    if value > INTEGER_MAX {
        Err(DecodeError::OutOfRange(member))
    } else {
        Ok(())
    }
}

fn check_window(window: u16) -> Result<(), DecodeError> {
    if (WINDOW_MIN..=WINDOW_MAX).contains(&window) {
        Ok(())
    } else {
        Err(DecodeError::OutOfRange("window"))
    }
}

fn check_count(member: &'static str, count: usize, most: usize) -> Result<(), DecodeError> {
    if count > most {
        Err(DecodeError::TooMany(member))
    } else {
        Ok(())
    }
}

fn check_length(
    member: &'static str,
    text: &str,
    least: usize,
    most: usize,
) -> Result<(), DecodeError> {
    if (least..=most).contains(&text.len()) {
        Ok(())
    } else {
        Err(DecodeError::Length(member))
    }
}

fn check_topics(topics: &Topics) -> Result<(), DecodeError> {
    check_count("topics", topics.topics.len(), TOPICS_MAX)?;
    topics
        .topics
        .iter()
        .try_for_each(|topic| check_length("topics", topic, 1, TOPIC_BYTES_MAX))
}
