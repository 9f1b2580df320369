//! Bellwire's device link, version 1: everything that both ends of it must agree on, and nothing else. No sockets, no
//! clocks, no async: bytes, values and times come in as arguments.
//!
//! A guided tour, from the outside in:
//!
//! 1. A [`Carrier`] brings bytes. On WebSocket [`negotiate`] picks the [`Codec`], and one message is one frame; on QUIC the
//!    codec is CBOR, and a [`FrameReader`] cuts the stream into frames.
//! 2. The [`Codec`] turns bytes into a [`DeviceFrame`] or [`ServerFrame`] and back. It checks every limit in [`limits`];
//!    what a later version added is skipped.
//! 3. What matters in the end is the [`Content`] of a notification. It rests in its CBOR form, and a [`SharedNotify`] sends
//!    it to any number of sessions without encoding it again.
//! 4. Who may say what when is decided by a [`ServerSession`] and a [`ClientSession`]: what happened goes in, what to do
//!    comes out.
//! 5. Whatever goes wrong has a [`Code`]: a name, whose fault it is, an HTTP status, close codes, and what to do.
//!
//! docs/protocol.md tells the same story for people who write a client in another language; tests keep the two together.

mod carrier;
mod code;
mod codec;
mod content;
mod frame;
mod framing;
pub mod fuzz;
mod id;
pub mod limits;
mod notify;
pub mod schema;
mod session;

pub use carrier::{
    ALPN, Carrier, LINK_PATH, Negotiated, SUBPROTOCOL_CBOR, SUBPROTOCOL_JSON,
    UnsupportedSubprotocol, negotiate,
};
pub use code::{Blame, Code, Retry, WEBSOCKET_CLOSE_BASE};
pub use codec::{Codec, DecodeError, Decoded};
pub use content::{Content, Encoding};
pub use frame::{
    Ack, Decline, DeviceFrame, ErrorFrame, Goaway, GoawayReason, Hello, KeepAlive, Notify,
    Presence, PresenceState, ReconnectRange, Secret, Seen, ServerFrame, Topics, Urgency, Verdict,
    Welcome, Withdraw,
};
pub use framing::{FrameReader, LENGTH_MAX_BYTES, LengthPrefix, write_framed};
pub use id::{Id, ParseIdError};
pub use notify::{NotifyFrame, NotifyHead, SharedNotify};
pub use session::{
    ClientAction, ClientSession, EXPIRED, Reconnect, ReconnectWhen, ServerAction, ServerSession,
    SessionEnd, WITHDRAWN, backoff_ceiling_ms,
};
