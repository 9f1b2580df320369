//! Every limit of the device link: what it bounds, its unit, and why it has this size.
//!
//! These are the limits of the wire. Both sides compile them in, so changing one needs the care of a protocol change; what an
//! operator may set (mailbox sizes, TTLs, rates) lives in the server's configuration and stays within them.

/// Greatest integer that a frame may carry: 2^53 - 1, so that every JSON implementation reads it exactly.
pub const INTEGER_MAX: u64 = (1 << 53) - 1;

/// Greatest frame that a device may send to any server, in bytes, checked before decoding. 16 KiB holds the largest useful
/// one: a `subscribe` with [`TOPICS_MAX`] names of [`TOPIC_BYTES_MAX`] bytes, or a `hello` with [`SEEN_MAX`] ids. An operator
/// may take larger ones, never only smaller ones.
pub const DEVICE_FRAME_MAX_BYTES: usize = 16 * 1024;

/// Greatest frame from a device that an operator may let in, in bytes: what each connection may make a server hold. Room for
/// members of later versions.
pub const DEVICE_FRAME_CEILING_BYTES: usize = 64 * 1024;

/// Default bound of one notification's content, in bytes of [`Content::size`](crate::Content::size). 4,096 is what the
/// older push systems agree on.
pub const CONTENT_DEFAULT_MAX_BYTES: usize = 4_096;

/// Greatest bound of one notification's content that an operator may set, in bytes.
pub const CONTENT_MAX_BYTES: usize = 65_536;

/// What a `notify` may need beside its content: headers, ids, times, and the heads of at most [`SYNC_MAX`] names. In bytes.
pub const NOTIFY_OVERHEAD_MAX_BYTES: usize = 4 * 1024;

/// Greatest CBOR frame that a server sends, in bytes.
pub const SERVER_FRAME_MAX_BYTES: usize = CONTENT_MAX_BYTES + NOTIFY_OVERHEAD_MAX_BYTES;

/// Greatest JSON frame that a server sends, in bytes: a control character takes one byte of content and six of JSON (`\u0007`).
pub const SERVER_JSON_FRAME_MAX_BYTES: usize = CONTENT_MAX_BYTES * 6 + NOTIFY_OVERHEAD_MAX_BYTES;

/// Deepest nesting of arrays and maps in a frame. Known members need three; the rest is room for members of later versions.
pub const DEPTH_MAX: usize = 16;

/// Greatest number of entries in a content map: the header of the map is then one byte, which is what lets a `notify` join
/// a head and a stored content without decoding it.
pub const CONTENT_ENTRIES_MAX: usize = 23;

/// Smallest key of a content member in CBOR.
pub const CONTENT_KEY_MIN: u64 = 8;

/// Greatest key of a content member in CBOR. Keys outside of this range belong to the frame.
pub const CONTENT_KEY_MAX: u64 = 31;

/// Greatest number of source names in the content member `sync`.
pub const SYNC_MAX: usize = 100;

/// Greatest number of repeated verdicts in a `hello`.
pub const SEEN_MAX: usize = 128;

/// Greatest number of ids in one `ack`; a session never has more in flight.
pub const ACK_IDS_MAX: usize = 256;

/// Greatest number of ids in one `withdraw`.
pub const WITHDRAW_IDS_MAX: usize = 256;

/// Greatest number of topics in one `subscribe`, `unsubscribe` or `subscribed`, and that a device may be a member of.
pub const TOPICS_MAX: usize = 100;

/// Greatest length of a topic name in bytes of UTF-8; the smallest is 1.
pub const TOPIC_BYTES_MAX: usize = 128;

/// Greatest length of a device secret in bytes of UTF-8; the smallest is 1.
pub const SECRET_BYTES_MAX: usize = 256;

/// Greatest length of the `agent` of a `hello` in bytes of UTF-8.
pub const AGENT_BYTES_MAX: usize = 256;

/// Greatest length of the `reason` of a `decline` in bytes of UTF-8.
pub const REASON_BYTES_MAX: usize = 256;

/// Greatest length of the `message` of an `error` in bytes of UTF-8.
pub const MESSAGE_BYTES_MAX: usize = 512;

/// Greatest length of the `code` of an `error` in bytes of UTF-8.
pub const CODE_BYTES_MAX: usize = 64;

/// Greatest length of the `endpoint` of a `goaway` in bytes of UTF-8.
pub const ENDPOINT_BYTES_MAX: usize = 512;

/// Smallest window that a device may ask for, in notifications.
pub const WINDOW_MIN: u16 = 1;

/// Greatest window that a device may ask for, in notifications.
pub const WINDOW_MAX: u16 = 256;

/// Window granted to a device that asks for none, in notifications.
pub const WINDOW_DEFAULT: u16 = 32;

/// Frames that the server keeps for a device that talks on between its `hello` and the `welcome`.
pub const FRAMES_BEFORE_WELCOME_MAX: usize = 8;

/// Time from the accepted connection to a complete `hello`, TLS handshake included, in milliseconds.
pub const HELLO_TIMEOUT_MS: u64 = 10_000;

/// Time that a client waits for the `welcome` after its `hello`, in milliseconds. Longer than the server's own deadline, so
/// that the client sees the server's error rather than its own guess.
pub const WELCOME_TIMEOUT_MS: u64 = 20_000;

/// Time that a client waits for any frame after its keep-alive `ping` before it takes the server for gone, in milliseconds.
pub const PONG_TIMEOUT_MS: u64 = 15_000;

/// Time that a session lives on after `goaway` with reason `drain` or `upgrade`, so that verdicts still arrive, in milliseconds.
pub const GOAWAY_GRACE_MS: u64 = 5_000;

/// Time that a client takes after such a `goaway` to finish what it was handed, in milliseconds.
pub const FAREWELL_MS: u64 = 3_000;

/// Time that a replaced client stays away, at least, in milliseconds.
pub const REPLACED_AWAY_MIN_MS: u64 = 60_000;

/// Advised keep-alive on QUIC in seconds: networks forget UDP flows early.
pub const QUIC_KEEP_ALIVE_S: (u32, u32) = (20, 120);

/// Advised keep-alive on WebSocket in seconds: networks and proxies forget TCP flows late.
pub const WEBSOCKET_KEEP_ALIVE_S: (u32, u32) = (60, 900);

/// How much silence a server bears unless its operator says otherwise, in percent of the longest advised keep-alive: two that
/// were lost, and half of one for a slow network.
pub const SILENCE_PERCENT: u32 = 250;

/// Least of that which an operator may set: a device that pings at the advised maximum is heard in time even if that ping is late.
pub const SILENCE_PERCENT_MIN: u32 = 150;

/// Greatest advised keep-alive that a client believes, in seconds.
pub const KEEP_ALIVE_MAX_S: u32 = 86_400;

/// Greatest `reconnect_ms` that a client believes, in milliseconds: a day.
pub const RECONNECT_MAX_MS: u32 = 86_400_000;

/// First ceiling of a client's back-off between connections, in milliseconds; it doubles with each failure.
pub const BACKOFF_FIRST_MS: u64 = 1_000;

/// Last ceiling of a client's back-off, in milliseconds.
pub const BACKOFF_MAX_MS: u64 = 300_000;

/// Time that a client stays away, at least, after an error with retry `later`, in milliseconds.
pub const LATER_MIN_MS: u64 = 2_000;

/// Lifetime of a notification with TTL 0 that was sent at once, in milliseconds.
pub const TTL_ZERO_GRACE_MS: u64 = 30_000;

/// One row of the table in docs/protocol.md: the value, its unit, and what it bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Name of the constant in this module.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// Its unit; empty for a plain number.
    pub unit: &'static str,
    /// What it bounds.
    pub about: &'static str,
}

macro_rules! table {
    ($($name:ident, $unit:literal, $about:literal;)*) => {
        /// The limits that a peer can notice.
        pub const TABLE: &[Limit] =
            &[$(Limit { name: stringify!($name), value: $name as u64, unit: $unit, about: $about },)*];
    };
}

table! {
    DEVICE_FRAME_MAX_BYTES, "bytes", "frame from a device, either codec, that every server takes";
    DEVICE_FRAME_CEILING_BYTES, "bytes", "the same, as far as an operator may raise it";
    SERVER_FRAME_MAX_BYTES, "bytes", "CBOR frame from a server";
    SERVER_JSON_FRAME_MAX_BYTES, "bytes", "JSON frame from a server";
    CONTENT_MAX_BYTES, "bytes", "content of one notification, as far as an operator may raise it";
    CONTENT_DEFAULT_MAX_BYTES, "bytes", "content of one notification by default";
    INTEGER_MAX, "", "any integer, unless the tables say 32 bits";
    DEPTH_MAX, "levels", "nesting of arrays and maps, the frame itself being level 1";
    CONTENT_ENTRIES_MAX, "members", "content of one notification, unknown members included";
    SYNC_MAX, "names", "`sync`";
    SEEN_MAX, "entries", "`seen`";
    ACK_IDS_MAX, "ids", "`ack`";
    WITHDRAW_IDS_MAX, "ids", "`withdraw`";
    TOPICS_MAX, "names", "`subscribe`, `unsubscribe`, `subscribed`, and the topics of one device";
    TOPIC_BYTES_MAX, "bytes", "name of a topic";
    SECRET_BYTES_MAX, "bytes", "`secret`";
    AGENT_BYTES_MAX, "bytes", "`agent`";
    REASON_BYTES_MAX, "bytes", "`reason` of `decline`";
    MESSAGE_BYTES_MAX, "bytes", "`message`";
    CODE_BYTES_MAX, "bytes", "`code`";
    ENDPOINT_BYTES_MAX, "bytes", "`endpoint`";
    WINDOW_DEFAULT, "notifications", "window when none is asked for";
    WINDOW_MAX, "notifications", "window that may be asked for";
    FRAMES_BEFORE_WELCOME_MAX, "frames", "from a device between `hello` and `welcome`";
    HELLO_TIMEOUT_MS, "ms", "from the connection to a complete `hello`, TLS included";
    WELCOME_TIMEOUT_MS, "ms", "a client waits for `welcome`";
    PONG_TIMEOUT_MS, "ms", "a client waits for any frame after `ping`";
    GOAWAY_GRACE_MS, "ms", "a server keeps a session after `goaway` `drain` or `upgrade`";
    FAREWELL_MS, "ms", "a client takes for its last verdicts after such a `goaway`";
    REPLACED_AWAY_MIN_MS, "ms", "a replaced client stays away, at least";
    LATER_MIN_MS, "ms", "a client stays away after retry `later`, at least";
    BACKOFF_FIRST_MS, "ms", "first ceiling of a client's jitter; doubles with each failure";
    BACKOFF_MAX_MS, "ms", "last ceiling of a client's jitter";
    KEEP_ALIVE_MAX_S, "s", "advised keep-alive that a client believes";
    RECONNECT_MAX_MS, "ms", "`reconnect_ms` that a client believes";
    TTL_ZERO_GRACE_MS, "ms", "lifetime of a notification with TTL 0 that was sent at once";
}

const _: () = {
    assert!(CONTENT_DEFAULT_MAX_BYTES <= CONTENT_MAX_BYTES);
    assert!(DEVICE_FRAME_MAX_BYTES <= DEVICE_FRAME_CEILING_BYTES);
    assert!(100 < SILENCE_PERCENT_MIN && SILENCE_PERCENT_MIN <= SILENCE_PERCENT);
    // Every known content member has a head of at most 7 bytes (key 2, length 5), every sync name one of at most 5.
    assert!(CONTENT_ENTRIES_MAX * 7 + SYNC_MAX * 5 + 256 <= NOTIFY_OVERHEAD_MAX_BYTES);
    // The largest subscribe: a head of 3 bytes for each name.
    assert!(TOPICS_MAX * (TOPIC_BYTES_MAX + 3) + 64 <= DEVICE_FRAME_MAX_BYTES);
    // The largest hello, in JSON: `{"id":"…26…","verdict":"acknowledged"},` is 55 bytes; text may double by escaping.
    assert!(
        SEEN_MAX * 56 + 2 * (SECRET_BYTES_MAX + AGENT_BYTES_MAX) + 512 <= DEVICE_FRAME_MAX_BYTES
    );
    // The largest ack, in JSON: 26 characters, two quotes and a comma for each id.
    assert!(ACK_IDS_MAX * 29 + 64 <= DEVICE_FRAME_MAX_BYTES);
    // A full subscribed and a full withdraw fit a frame to the device.
    assert!(TOPICS_MAX * (TOPIC_BYTES_MAX + 3) + 64 <= SERVER_FRAME_MAX_BYTES);
    assert!(WITHDRAW_IDS_MAX * 17 + 64 <= SERVER_FRAME_MAX_BYTES);
    assert!(ACK_IDS_MAX >= WINDOW_MAX as usize);
    assert!(WINDOW_MIN >= 1 && WINDOW_MIN <= WINDOW_DEFAULT && WINDOW_DEFAULT <= WINDOW_MAX);
    // Content keys leave room below for the frame's own members, and are one or two bytes long.
    assert!(CONTENT_KEY_MIN > 6 && CONTENT_KEY_MAX < 64);
    assert!((CONTENT_KEY_MAX - CONTENT_KEY_MIN + 1) as usize >= CONTENT_ENTRIES_MAX);
    assert!(QUIC_KEEP_ALIVE_S.0 <= QUIC_KEEP_ALIVE_S.1);
    assert!(WEBSOCKET_KEEP_ALIVE_S.0 <= WEBSOCKET_KEEP_ALIVE_S.1);
    assert!(
        QUIC_KEEP_ALIVE_S.1 <= KEEP_ALIVE_MAX_S && WEBSOCKET_KEEP_ALIVE_S.1 <= KEEP_ALIVE_MAX_S
    );
    // A device that pings at the advised maximum and waits in vain has noticed before the server gives it up.
    assert!(PONG_TIMEOUT_MS < QUIC_KEEP_ALIVE_S.1 as u64 * (SILENCE_PERCENT_MIN as u64 - 100) * 10);
    // The device has said `bye` before the server closes.
    assert!(FAREWELL_MS < GOAWAY_GRACE_MS);
    assert!(BACKOFF_FIRST_MS <= BACKOFF_MAX_MS);
    assert!(WELCOME_TIMEOUT_MS > HELLO_TIMEOUT_MS);
    assert!(SERVER_FRAME_MAX_BYTES <= SERVER_JSON_FRAME_MAX_BYTES);
};
