//! The one table of codes: what can go wrong on the link and over HTTP, whose fault it is, and what to do about it.
//!
//! docs/errors.md prints this table; a test keeps the two equal.

use serde::{Deserialize, Serialize};

/// Whose fault a code is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Blame {
    /// The device, or the client library in it.
    Device,
    /// The publisher: whoever called the HTTP API.
    Publisher,
    /// Whoever sent it: the device on the link, the publisher over HTTP.
    Sender,
    /// The network between device and server.
    Network,
    /// The operator: configuration, capacity, disk.
    Operator,
    /// The server itself: a defect of ours.
    Server,
    /// Nobody: part of normal life.
    Nobody,
}

impl Blame {
    /// The lower-case word used in docs, logs and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Publisher => "publisher",
            Self::Sender => "sender",
            Self::Network => "network",
            Self::Operator => "operator",
            Self::Server => "server",
            Self::Nobody => "nobody",
        }
    }
}

/// When it makes sense to try again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Retry {
    /// Not before something was changed: credentials, configuration, version, request.
    Never,
    /// After a back-off with jitter, or the time that was named.
    Later,
    /// At once.
    Now,
}

impl Retry {
    /// The lower-case word used on the wire and in docs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Never => "never",
            Self::Later => "later",
            Self::Now => "now",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, Copy)]
struct Row {
    name: &'static str,
    blame: Blame,
    http: Option<u16>,
    close: Option<u16>,
    retry: Retry,
    meaning: &'static str,
    remedy: &'static str,
}

/// `Variant = "name", blame, http status or -, close number or -, retry; meaning; remedy;`
macro_rules! codes {
    (@option -) => { None };
    (@option $number:literal) => { Some($number) };
    ($($variant:ident = $name:literal, $blame:ident, $http:tt, $close:tt, $retry:ident; $meaning:literal; $remedy:literal;)*) => {
        /// A stable code: the name that is sent, logged, counted and documented.
        ///
        /// Names and numbers never change their meaning and are never used again for something else.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[non_exhaustive]
        pub enum Code {
            $(#[doc = $meaning] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            const fn row(self) -> Row {
                match self {
                    $(Self::$variant => Row {
                        name: $name,
                        blame: Blame::$blame,
                        http: codes!(@option $http),
                        close: codes!(@option $close),
                        retry: Retry::$retry,
                        meaning: $meaning,
                        remedy: $remedy,
                    },)*
                }
            }

            /// The code of this name, if there is one.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    $($name => Some(Self::$variant),)*
                    _ => None,
                }
            }
        }
    };
}

codes! {
    // The link: ordinary ends.
    Bye = "bye", Nobody, -, 0, Never;
        "The device said `bye`, or the server left in good order.";
        "Nothing to do.";
    Replaced = "replaced", Nobody, -, 1, Later;
        "A newer session of the same device took over.";
        "The client stays away for at least 60 s. If it repeats, two installations share one device id: enrol each one by itself.";
    Revoked = "revoked", Operator, -, 2, Never;
        "The device was revoked while it was connected.";
        "Enrol it again if that was not intended; the old id and secret stay dead.";
    Drain = "drain", Nobody, -, 3, Now;
        "The server shuts down, or gives connections away.";
        "The client reconnects within the time that `goaway` named. Nothing is lost.";
    Upgrade = "upgrade", Nobody, -, 4, Now;
        "The device should come back to another endpoint, which `goaway` named if it differs.";
        "The client reconnects within the time that `goaway` named.";

    // The link: the device's fault.
    Malformed = "malformed", Sender, 400, 5, Later;
        "The frame or request does not follow the format: not well-formed, a missing or repeated member, a wrong type, a number out of range.";
        "Compare it with docs/protocol.md (frames) or the OpenAPI document (requests); the message names the member where it can.";
    FrameTooLarge = "frame_too_large", Device, -, 6, Later;
        "A frame is larger than the receiver accepts (16 KiB from a device, unless the operator takes more).";
        "Send less in one frame: split `ack` and `subscribe`, shorten `seen`.";
    HelloExpected = "hello_expected", Device, -, 7, Later;
        "The first frame was not `hello`.";
        "Say `hello` before anything else.";
    HelloTimeout = "hello_timeout", Device, -, 8, Later;
        "No complete `hello` came within the hello deadline (10 s, TLS handshake included).";
        "Say `hello` as soon as the connection stands; on slow networks look for a proxy that holds back bytes.";
    SecondHello = "second_hello", Device, -, 9, Later;
        "A session said `hello` twice.";
        "Open a new connection for a new session.";
    FramesBeforeWelcome = "frames_before_welcome", Device, -, 10, Later;
        "The device sent more than 8 frames between its `hello` and the `welcome`.";
        "Wait for the `welcome`.";
    Unauthorized = "unauthorized", Device, -, 11, Never;
        "The device id is unknown or revoked, or its secret is wrong; the answer is the same for all of them.";
        "Check the id and the secret that `POST /v1/devices` returned; if they are lost, enrol the device again.";
    StaleAttempt = "stale_attempt", Device, -, 12, Later;
        "The same client process is already connected with this `attempt` or a higher one.";
        "Raise `attempt` with every connection of one `instance`; say `hello` only on the carrier that won the race.";
    DuplicateDevice = "duplicate_device", Operator, -, 13, Later;
        "More than 3 replacements of this device by different client processes within 60 s: several installations use one id and secret.";
        "Find the copies (cloned image, restored backup) and enrol each one by itself; newcomers are refused for 60 s.";
    AckAhead = "ack_ahead", Device, -, 14, Later;
        "An `ack` names a `seq` that this session has not sent yet.";
        "Count `seq` for each session from 1, and acknowledge only what was received.";
    AckTimeout = "ack_timeout", Device, -, 15, Later;
        "A notification got no verdict within 5 minutes.";
        "Acknowledge after handing over to the app, and decline what cannot be used; look for a blocked callback.";
    SlowReader = "slow_reader", Network, -, 16, Later;
        "The peer's transport has not taken what was sent within 30 s.";
        "Nothing is lost: it comes again after reconnecting. If it repeats, look at the network, or ask for a smaller `window`.";
    Silence = "silence", Network, -, 17, Now;
        "Nothing was heard from the device for too long: 2.5 times the advised keep-alive maximum, unless the operator set another bound.";
        "Send `ping` within the advised bounds; look for network equipment that forgets idle flows.";
    UnsupportedVersion = "unsupported_version", Device, 426, 18, Never;
        "The client speaks a version of the link or of WebSocket that this server does not.";
        "Upgrade the older side; servers speak every version that they ever shipped.";

    // The link: the operator's and ours.
    TooManyConnections = "too_many_connections", Operator, 503, 19, Later;
        "Too many connections from this address have not said `hello` yet, or too many in all.";
        "Reconnect with jitter. For fleets behind one address, list the network as exempt or raise the limit.";
    StoreUnavailable = "store_unavailable", Operator, 503, 20, Later;
        "The store cannot write or sync. New work is refused until the server restarts; nothing that was promised is lost.";
        "Look at the disk and the server's log; `bellwire store inspect` tells what is there; restart once the cause is gone.";
    Internal = "internal", Server, 500, 21, Later;
        "A defect in the server; it was logged with the request or session.";
        "Try again, and report it with the log line.";

    // Before a session: the answers of the device port to what is not a device link.
    UnsupportedSubprotocol = "unsupported_subprotocol", Device, 400, -, Never;
        "Only unknown WebSocket subprotocols were offered.";
        "Offer `bellwire.1.cbor` or `bellwire.1.json`, or none for JSON.";
    NotADeviceEndpoint = "not_a_device_endpoint", Publisher, 404, -, Never;
        "The device port knows `GET /v1/link` only.";
        "Use the API's address for `/v1/pings` and all the rest; it is on another port.";
    TlsRequired = "tls_required", Publisher, 400, -, Never;
        "Plain HTTP was spoken on a port that expects TLS.";
        "Use `https` or `wss`.";

    // HTTP: who and what.
    Unauthenticated = "unauthenticated", Publisher, 401, -, Never;
        "No API key, or one that is unknown or revoked.";
        "Send `Authorization: Bearer <key>`; list the keys with `bellwire key list`.";
    Forbidden = "forbidden", Publisher, 403, -, Never;
        "The key lacks the scope that this call needs.";
        "Use a key with the scope that the message names.";
    UnknownDevice = "unknown_device", Publisher, 404, -, Never;
        "No device of this app has this id, or it was revoked.";
        "Drop the id from your records, or enrol the device again.";
    PingNotRetained = "ping_not_retained", Publisher, 404, -, Never;
        "Nothing is known of this ping: it never was, or its outcomes are past their keeping time.";
        "Ask earlier, or raise `receipts.keep` and `receipts.max_bytes`.";
    NoCallback = "no_callback", Publisher, 404, -, Never;
        "No callback is set for this app.";
        "Set one with `PUT /v1/callbacks`.";
    NotFound = "not_found", Publisher, 404, -, Never;
        "There is nothing at this path.";
        "Compare the path with the OpenAPI document.";
    MethodNotAllowed = "method_not_allowed", Publisher, 405, -, Never;
        "The path exists, the method does not.";
        "Use a method that the `Allow` header names.";
    BodyTimeout = "body_timeout", Publisher, 408, -, Later;
        "The request body did not arrive in time (30 s).";
        "Send the body at once; look for a proxy that holds back bytes.";
    IdempotencyConflict = "idempotency_conflict", Publisher, 409, -, Never;
        "The `Idempotency-Key` was used before with another body.";
        "Use one key for one ping, for ever; make a new key for a new ping.";
    BackupUnderWay = "backup_under_way", Operator, 409, -, Later;
        "A backup is being made already, by somebody else or by the server's own schedule; one is made at a time.";
        "Wait until that one is done; with `backup.dir` set, `bellwire status` shows it.";
    ContentTooLarge = "content_too_large", Publisher, 413, -, Never;
        "The content of the notification is larger than the limit (4,096 bytes unless set otherwise).";
        "Send less, or send a reference that the app fetches; the operator may raise the limit to 65,536.";
    BodyTooLarge = "body_too_large", Publisher, 413, -, Never;
        "The request body is larger than the limit.";
        "Split the request.";
    UnsupportedMediaType = "unsupported_media_type", Publisher, 415, -, Never;
        "The `Content-Type` is not one that this call reads.";
        "Send `application/json`, or what the OpenAPI document names for the call.";
    Unprocessable = "unprocessable", Publisher, 422, -, Never;
        "The request is well-formed, but impossible; the detail says why.";
        "Change what the detail names.";
    CallbackNotAllowed = "callback_not_allowed", Operator, 422, -, Never;
        "The operator's settings do not allow posting outcomes there.";
        "Ask the operator to add the host, with its port unless that is 443 for `https` or 80 for `http`, and the network if its addresses are not public, to `callbacks.allow`.";
    CallbackFailed = "callback_failed", Publisher, 502, -, Later;
        "The receiver of the callback did not take what was posted; the detail says why.";
        "Look at the receiver; a 2xx takes it.";
    MailboxFull = "mailbox_full", Publisher, 429, -, Later;
        "The device's mailbox is full, and the server is set to refuse rather than evict.";
        "Wait until the device has been back, use collapse keys, or set the mailbox to evict.";
    RateLimited = "rate_limited", Publisher, 429, -, Later;
        "The key sends faster than it may.";
        "Wait for the time in `Retry-After`.";
    TooManyStreams = "too_many_streams", Operator, 429, -, Later;
        "As many follow the events as may at once.";
        "Share one stream between the parts of a backend, close those that nobody reads, or raise `limits.event_streams`.";
    DeviceRateLimited = "device_rate_limited", Publisher, 429, -, Later;
        "The device is sent more pings than one device may be, by everybody together.";
        "Wait for the time in `Retry-After`, and let a newer notification replace an older one with a collapse key.";
    QuotaExceeded = "quota_exceeded", Publisher, 429, -, Later;
        "The app has used up what it may: pings of a day, notifications that wait, their bytes, or devices.";
        "Look at `detail`, which names the quota. Wait for the time in `Retry-After`, let devices take what waits, or revoke what nobody needs; the operator may allow more (`[quota]`).";
    TooManyExpansions = "too_many_expansions", Publisher, 429, -, Later;
        "As many pings to audiences (a topic, everyone, a long list) as may be are on their way already.";
        "Wait for the time in `Retry-After`; `GET /v1/pings/{id}` tells how far one has come. The operator may raise `limits.open_expansions`.";
    StoreBusy = "store_busy", Operator, 503, -, Later;
        "The engine is too far behind the log to take more for the moment.";
        "Wait for the time in `Retry-After`; if it repeats, the disk is too slow for this load.";
    Draining = "draining", Operator, 503, -, Later;
        "The server is shutting down and takes no new work.";
        "Send it to another server, or again after the restart.";
    MemoryReserve = "memory_reserve", Operator, 503, -, Later;
        "The memory set aside for bodies in flight is used up.";
        "Wait for the time in `Retry-After`; if it repeats, raise the reserve or send less at a time.";
    NoRoom = "no_room", Operator, 507, -, Later;
        "The free disk space is below the reserve. New pings are refused; delivery and deletes go on.";
        "Free space or add disk; it clears by itself.";
}

/// WebSocket close codes of the link begin here (RFC 6455 section 7.4.2: 4000-4999 are for private use).
pub const WEBSOCKET_CLOSE_BASE: u16 = 4_000;

impl Code {
    /// The stable name, as it is sent and documented.
    pub const fn name(self) -> &'static str {
        self.row().name
    }

    /// Whose fault it is.
    pub const fn blame(self) -> Blame {
        self.row().blame
    }

    /// The HTTP status that carries this code; `None` for what happens on the link only.
    pub const fn http_status(self) -> Option<u16> {
        self.row().http
    }

    /// The WebSocket close code, 4000 + n; `None` for what happens over HTTP only.
    pub const fn websocket_close(self) -> Option<u16> {
        match self.row().close {
            Some(number) => Some(WEBSOCKET_CLOSE_BASE + number),
            None => None,
        }
    }

    /// The QUIC application close code, n; `None` for what happens over HTTP only.
    pub const fn quic_close(self) -> Option<u32> {
        match self.row().close {
            Some(number) => Some(number as u32),
            None => None,
        }
    }

    /// When the peer may try again.
    pub const fn retry(self) -> Retry {
        self.row().retry
    }

    /// One sentence: what it means.
    pub const fn meaning(self) -> &'static str {
        self.row().meaning
    }

    /// One sentence: what to do.
    pub const fn remedy(self) -> &'static str {
        self.row().remedy
    }

    /// The code behind a WebSocket close code, if it is one of ours.
    pub fn from_websocket_close(close: u16) -> Option<Self> {
        Self::from_quic_close(u64::from(close.checked_sub(WEBSOCKET_CLOSE_BASE)?))
    }

    /// The code behind a QUIC application close code, if it is one of ours.
    pub fn from_quic_close(close: u64) -> Option<Self> {
        Self::ALL
            .iter()
            .copied()
            .find(|code| code.row().close.map(u64::from) == Some(close))
    }
}

impl std::fmt::Display for Code {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl Serialize for Code {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_close_numbers_are_unique_and_find_their_code() {
        let names: BTreeSet<_> = Code::ALL.iter().map(|code| code.name()).collect();
        assert_eq!(names.len(), Code::ALL.len());
        let closes: Vec<_> = Code::ALL
            .iter()
            .filter_map(|code| code.quic_close())
            .collect();
        assert_eq!(closes.iter().collect::<BTreeSet<_>>().len(), closes.len());
        for &code in Code::ALL {
            assert_eq!(Code::from_name(code.name()), Some(code));
            if let Some(close) = code.websocket_close() {
                assert_eq!(Code::from_websocket_close(close), Some(code));
            }
            if let Some(close) = code.quic_close() {
                assert_eq!(Code::from_quic_close(close.into()), Some(code));
            }
        }
        assert_eq!(Code::from_websocket_close(1000), None);
        assert_eq!(Code::from_quic_close(u64::MAX), None);
    }

    #[test]
    fn every_code_can_be_seen_somewhere_and_fits_a_frame() {
        for code in Code::ALL {
            assert!(
                code.http_status().is_some() || code.quic_close().is_some(),
                "{code} is never sent"
            );
            assert!(code.name().len() <= crate::limits::CODE_BYTES_MAX);
            assert!(
                code.name()
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
            );
            assert!(code.meaning().ends_with('.') && code.remedy().ends_with('.'));
        }
    }
}
