//! Everything that can be set. The table in `docs/operations.md` is made from this list.

use super::checked::{Engine, LogFormat, MailboxFull};
use super::setting::{
    AddressSetting, AnyKey, BytesSetting, ChoiceSetting, CountSetting, FlagSetting, HostsSetting,
    Key, NetworksSetting, PathSetting, SpanSetting, TextSetting,
};

/// Declares the keys and the list of them, so that neither is without the other.
macro_rules! keys {
    ($($(#[doc = $doc:literal])+ $name:ident: $kind:ty = $text:literal, $setting:expr, $default:literal;)+) => {
        $(
            $(#[doc = $doc])+
            pub static $name: Key<$kind> = Key {
                name: $text,
                setting: $setting,
                default: $default,
                about: concat!($($doc),+),
            };
        )+

        /// Every key, in the order of the documentation.
        pub static ALL: &[&dyn AnyKey] = &[$(&$name),+];
    };
}

const fn span(min_ms: u64, max_ms: u64) -> SpanSetting {
    SpanSetting { min_ms, max_ms }
}

const fn bytes(min: u64, max: u64) -> BytesSetting {
    BytesSetting { min, max }
}

const fn count(min: u64, max: u64) -> CountSetting {
    CountSetting { min, max }
}

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;
const SECOND: u64 = 1_000;
const MINUTE: u64 = 60 * SECOND;
const HOUR: u64 = 60 * MINUTE;
const DAY: u64 = 24 * HOUR;

keys! {
    /// Directory for everything the server keeps. Made with mode 0700 if it is not there. One server at a time uses it.
    DATA_DIR: PathSetting = "data_dir", PathSetting, "./bellwire-data";

    /// Where devices connect: QUIC over UDP and WebSocket over TCP, on the same port number.
    LISTEN_DEVICES: AddressSetting = "listen.devices", AddressSetting, "127.0.0.1:4433";
    /// Where load balancers bring devices over plain TCP after they ended TLS themselves, each connection with a PROXY header of version 2. Needs `listen.proxy_networks`. Without TLS, so keep it inside your network.
    LISTEN_DEVICES_PLAIN: AddressSetting = "listen.devices_plain", AddressSetting, "";
    /// Networks of the load balancers that may connect to `listen.devices_plain`. Whoever is in them says which address a device has, so list the balancers and nobody else.
    LISTEN_PROXY_NETWORKS: NetworksSetting = "listen.proxy_networks", NetworksSetting, "";
    /// Where backends call the API.
    LISTEN_API: AddressSetting = "listen.api", AddressSetting, "127.0.0.1:8480";
    /// Where health, metrics and the API's description are served, over plain HTTP. Keep it inside your network.
    LISTEN_OPERATIONS: AddressSetting = "listen.operations", AddressSetting, "127.0.0.1:8490";

    /// Certificate chain for devices, PEM, the server's own certificate first. Without it, a development authority and a certificate are made in the data directory.
    TLS_CERT: PathSetting = "tls.cert", PathSetting, "";
    /// Private key of that certificate, PEM, not encrypted.
    TLS_KEY: PathSetting = "tls.key", PathSetting, "";
    /// Speak AES-256-GCM with SHA-384 and no other cipher suite, with devices and on the API, where a regulation asks for it. Whoever offers none of it is refused, and a handshake takes a tenth more.
    TLS_AES_256_ONLY: FlagSetting = "tls.aes_256_only", FlagSetting, "false";

    /// Certificate chain for the API, PEM. With it the API speaks HTTPS. Needed on any address but loopback, unless a trusted proxy stands in front.
    API_CERT: PathSetting = "api.cert", PathSetting, "";
    /// Private key of that certificate, PEM, not encrypted.
    API_KEY: PathSetting = "api.key", PathSetting, "";
    /// The API speaks plain HTTP on an address other than loopback, because a proxy that you trust stands in front and speaks TLS. Said wrongly, API keys cross the network in the clear.
    API_TRUSTED_PROXY: FlagSetting = "api.trusted_proxy", FlagSetting, "false";

    /// What indexes the log. `fjall` gives room back by itself and takes more writes; `memory` keeps everything in memory and rebuilds it from snapshot and log at each start, for tests and small servers. Chosen anew, the engine is built from snapshot and log at the next start; `bellwire store convert` does it while the server is down.
    STORE_ENGINE: ChoiceSetting<Engine> = "store.engine", ChoiceSetting {
        words: &[
            ("sled", Engine::Sled),
            ("fjall", Engine::Fjall),
            ("memory", Engine::Memory),
        ],
        refused: &[],
    }, "sled";
    /// Memory that the store may use, about: an eighth of it is fjall's cache, a quarter sled's; the rest is for what is being written, and for the frames that the engine has not applied yet.
    STORE_MEMORY: BytesSetting = "store.memory_bytes", bytes(4 * MIB, TIB), "256MiB";
    /// Longest time that a notification for an attached device is kept from the disk, waiting for its acknowledgement. Longer saves disk work, and makes an answer later when the acknowledgement does not come. `0s` turns it off.
    STORE_DEFER_MAX: SpanSetting = "store.defer_max", span(0, SECOND), "50ms";
    /// Size of one file of the log, allocated in full before it is used.
    STORE_SEGMENT: BytesSetting = "store.segment_bytes", bytes(MIB, GIB), "64MiB";
    /// Log written since the last snapshot before the next one is taken, unless twice the live data is more. Larger means fewer snapshots, more disk, and a longer start after the engine was lost.
    STORE_SNAPSHOT_BYTES: BytesSetting = "store.snapshot_bytes", bytes(MIB, TIB), "256MiB";
    /// Time after which a snapshot is taken if anything was written.
    STORE_SNAPSHOT_EVERY: SpanSetting = "store.snapshot_every", span(MINUTE, 30 * DAY), "1h";
    /// How many times the live data the engine's files may be before the server builds another engine beside it, copies what lives, and drops the old one, while serving. `0` never does. Smaller means more copying, larger more disk; files below 256 MiB are left alone.
    STORE_REBUILD: CountSetting = "store.rebuild_factor", count(0, 100), "4";
    /// New pings are refused (507) while less than this is free on the volume of the data directory; delivery and removal go on.
    STORE_RESERVE: BytesSetting = "store.reserve_bytes", bytes(0, TIB), "512MiB";
    /// How far the engine may be behind the log before new work waits. Never more than a quarter of `store.memory_bytes`.
    STORE_LAG_BYTES: BytesSetting = "store.lag_bytes", bytes(MIB, 4 * GIB), "64MiB";
    /// The same, as a time: what the engine will take for all that it does not have yet, as quick as it was of late, and the age of the oldest of it, counted from the end of its rest.
    STORE_LAG_TIME: SpanSetting = "store.lag_time", span(100, MINUTE), "2s";
    /// How long what is safe in the log rests before the engine takes it; 16 MiB, a quarter of `store.lag_bytes`, or what the engine takes an eighth of `store.lag_time` for, end the rest before. What is acknowledged within that time costs the engine next to nothing. Longer means a little more to replay after a kill. `0s` turns it off.
    STORE_REST_TIME: SpanSetting = "store.rest_time", span(0, 10 * SECOND), "1s";
    /// The data directory may lie on a network file system or behind FUSE, because you know that a sync there reaches a disk and a lock holds. Said wrongly, promised notifications can be lost and two servers can write into one directory.
    STORE_TRUST: FlagSetting = "store.trust_file_system", FlagSetting, "false";

    /// How long it is known that a device or an API key was erased, so that restoring a backup made before does not bring it back. Longer than the oldest backup that anybody may restore.
    STORE_ERASURES_KEEP: SpanSetting = "store.erasures_keep", span(DAY, 3650 * DAY), "400d";

    /// Directory in which the server keeps backups of its own, best on another volume. It must exist, and lie outside the data directory. Without it the server makes none.
    BACKUP_DIR: PathSetting = "backup.dir", PathSetting, "";
    /// Time from one backup to the next. One that was missed while the server was down is made at the start.
    BACKUP_EVERY: SpanSetting = "backup.every", span(MINUTE, 365 * DAY), "24h";
    /// How many backups of this store are kept there. An old one goes only after a newer one was read again and found good.
    BACKUP_KEEP: CountSetting = "backup.keep", count(1, 100_000), "7";
    /// Age from which a backup is removed although fewer are there; the newest one stays. No longer than `store.erasures_keep`: what was erased longer ago would come back with it.
    BACKUP_KEEP_FOR: SpanSetting = "backup.keep_for", span(HOUR, 3650 * DAY), "400d";

    /// Content of one notification.
    LIMITS_CONTENT: BytesSetting = "limits.content_bytes", bytes(1, 64 * KIB), "4KiB";
    /// Notifications that wait in one mailbox.
    LIMITS_MAILBOX: CountSetting = "limits.mailbox_notifications", count(1, 1_000), "1000";
    /// Content bytes that wait in one mailbox.
    LIMITS_MAILBOX_BYTES: BytesSetting = "limits.mailbox_bytes", bytes(64 * KIB, GIB), "1MiB";
    /// What a full mailbox does: `evict` lets the least urgent, oldest one go; `refuse` answers 429 `mailbox_full`.
    LIMITS_MAILBOX_FULL: ChoiceSetting<MailboxFull> = "limits.mailbox_full", ChoiceSetting {
        words: &[("evict", MailboxFull::Evict), ("refuse", MailboxFull::Refuse)],
        refused: &[],
    }, "evict";
    /// How long a notification may wait when its ping does not say.
    LIMITS_TTL_DEFAULT: SpanSetting = "limits.ttl_default", span(0, 365 * DAY), "7d";
    /// Longest time a notification may wait; a longer TTL is lowered, and the granted one is returned.
    LIMITS_TTL_MAX: SpanSetting = "limits.ttl_max", span(SECOND, 365 * DAY), "30d";
    /// Notifications that may be in flight in a session whose device asks for no number of its own; further ones wait.
    LIMITS_IN_FLIGHT: CountSetting = "limits.in_flight", count(1, 256), "32";
    /// Most notifications in flight that a device is granted, whatever it asks for.
    LIMITS_IN_FLIGHT_MAX: CountSetting = "limits.in_flight_max", count(1, 256), "256";
    /// How long `?wait=acknowledged` waits when it names no `timeout_s`. In whole seconds.
    LIMITS_WAIT_DEFAULT: SpanSetting = "limits.wait_default", span(0, MINUTE), "10s";
    /// Longest `timeout_s`; a longer one is answered 400.
    LIMITS_WAIT_MAX: SpanSetting = "limits.wait_max", span(SECOND, MINUTE), "60s";
    /// Largest body of a request, and largest line of a batch; above it 413. A ping by itself may have 4 MiB, so that it can name many devices.
    LIMITS_BODY: BytesSetting = "limits.body_bytes", bytes(128 * KIB, 16 * MIB), "1MiB";
    /// Largest body of a batch; above it 413, and nothing of it happens.
    LIMITS_BATCH: BytesSetting = "limits.batch_bytes", bytes(128 * KIB, 64 * MIB), "8MiB";
    /// Most pings of a batch; above it 413, and nothing of it happens.
    LIMITS_BATCH_LINES: CountSetting = "limits.batch_lines", count(1, 10_000), "1000";
    /// TLS handshake and hello together.
    LIMITS_HELLO: SpanSetting = "limits.hello_deadline", span(SECOND, 5 * MINUTE), "10s";
    /// A send that the device's transport has not taken for so long ends the session.
    LIMITS_WRITE: SpanSetting = "limits.write_deadline", span(SECOND, 10 * MINUTE), "30s";
    /// A notification without a verdict for so long ends the session; it is sent again in the next one.
    LIMITS_ACK: SpanSetting = "limits.ack_timeout", span(SECOND, HOUR), "5m";
    /// Shortest keep-alive advised to devices over QUIC.
    LIMITS_KEEP_ALIVE_QUIC_MIN: SpanSetting = "limits.keep_alive_quic_min", span(SECOND, HOUR), "20s";
    /// Longest keep-alive advised to devices over QUIC.
    LIMITS_KEEP_ALIVE_QUIC_MAX: SpanSetting = "limits.keep_alive_quic_max", span(SECOND, HOUR), "2m";
    /// Shortest keep-alive advised to devices over WebSocket.
    LIMITS_KEEP_ALIVE_WEBSOCKET_MIN: SpanSetting = "limits.keep_alive_websocket_min", span(SECOND, HOUR), "1m";
    /// Longest keep-alive advised to devices over WebSocket.
    LIMITS_KEEP_ALIVE_WEBSOCKET_MAX: SpanSetting = "limits.keep_alive_websocket_max", span(SECOND, HOUR), "15m";
    /// Silence after which a link is dropped, in percent of the longest advised keep-alive. Smaller notices dead links earlier, and drops living ones whose network loses a packet.
    LIMITS_SILENCE: CountSetting = "limits.silence_percent", count(150, 1_000), "250";
    /// Largest frame from a device; above it the link ends with `frame_too_large`. Every client counts on 16 KiB, so it can only be raised. Each connection may make the server hold so much.
    LIMITS_FRAME: BytesSetting = "limits.frame_bytes", bytes(16 * KIB, 64 * KIB), "16KiB";
    /// Connections from one address that have not said hello yet.
    LIMITS_PER_ADDRESS: CountSetting = "limits.connections_per_address", count(1, 1_000_000), "256";
    /// Networks whose connections are not counted per address, such as a NAT or a load balancer. Loopback never is.
    LIMITS_EXEMPT: NetworksSetting = "limits.exempt_networks", NetworksSetting, "";
    /// Connections in all that have not said hello yet.
    LIMITS_UNAUTHENTICATED: CountSetting = "limits.unauthenticated_connections", count(1, 10_000_000), "10000";
    /// Devices that one ping may name in a list. Above 1,000 it is brought to them afterwards, as a ping to a topic is.
    LIMITS_LIST: CountSetting = "limits.list_devices", count(1_000, 100_000), "100000";
    /// Pings to topics, to everyone and to long lists that one app may have on their way at once; above it they are answered 429. They are brought one after the other, so more would only wait; the content of each takes its share of `limits.memory_bytes` until it has been brought to all.
    LIMITS_EXPANSIONS: CountSetting = "limits.open_expansions", count(1, 1_000), "100";
    /// Memory for the content of notifications that are on their way; above it new pings are answered 503.
    LIMITS_MEMORY: BytesSetting = "limits.memory_bytes", bytes(MIB, TIB), "256MiB";
    /// Pings that one API key may send in a second, in the long run; above it they are answered 429.
    LIMITS_PING_RATE: CountSetting = "limits.pings_per_second", count(1, 10_000_000), "50000";
    /// Pings that one API key may send at once before the rate counts.
    LIMITS_PING_BURST: CountSetting = "limits.ping_burst", count(1, 100_000_000), "100000";
    /// Pings to one device in a second, in the long run, whoever sends them; above it they are refused for that device. `0`: no limit.
    LIMITS_DEVICE_RATE: CountSetting = "limits.device_pings_per_second", count(0, 1_000_000), "1000";
    /// Pings to one device at once before its rate counts.
    LIMITS_DEVICE_BURST: CountSetting = "limits.device_ping_burst", count(1, 100_000_000), "10000";
    /// How long a device's old secret stays good after a rotation that names no time.
    LIMITS_SECRET_OVERLAP: SpanSetting = "limits.secret_overlap", span(0, 90 * DAY), "24h";
    /// Connections that the API serves at once; more wait. Changing it needs a restart.
    LIMITS_API_CONNECTIONS: CountSetting = "limits.api_connections", count(1, 1_000_000), "4096";
    /// How long a device that comes back is told what it is to take off the screen; 0: only those attached are told.
    LIMITS_WITHDRAWALS_KEEP: SpanSetting = "limits.withdrawals_keep", span(0, 90 * DAY), "7d";
    /// How long a caller of `GET /v1/backup` may take nothing, and how much longer than a second for each 256 KiB it may let the backup wait in all. One that is slower is cut: until a backup is taken the log is not let go.
    LIMITS_BACKUP_STALL: SpanSetting = "limits.backup_stall", span(SECOND, HOUR), "60s";
    /// How long a caller of `POST /v1/pings/batch` may take none of its answers; then it is cut, and lines that were not begun are not sent.
    LIMITS_BATCH_STALL: SpanSetting = "limits.batch_stall", span(SECOND, HOUR), "60s";

    /// Streams of events (`GET /v1/events`) that one app may have at once; more are answered 429.
    LIMITS_EVENT_STREAMS: CountSetting = "limits.event_streams", count(1, 100_000), "64";
    /// Pings that one app may send at once, refilled evenly over 24 hours, so that in any 24 hours no more than twice as many go; above it they are answered 429 `quota_exceeded`. Full at the start of the server. `0`: no limit. `[quota.apps.NAME]` sets this and its neighbours for one app.
    QUOTA_PINGS: CountSetting = "quota.pings_per_day", count(0, 1_000_000_000_000), "0";

    /// Notifications that one app may have waiting, in all of its mailboxes together; those that would go beyond are answered 429 `quota_exceeded`. What is sent at once, what replaces something that is not in flight and no smaller, and TTL 0 are not. `0`: no limit.
    QUOTA_NOTIFICATIONS: CountSetting = "quota.notifications", count(0, 1_000_000_000_000), "0";
    /// Their content bytes, in the same way. `0`: no limit.
    QUOTA_BYTES: BytesSetting = "quota.bytes", bytes(0, 1_024 * TIB), "0";
    /// Devices that one app may have; beyond it registering one is answered 429 `quota_exceeded`. `0`: no limit.
    QUOTA_DEVICES: CountSetting = "quota.devices", count(0, 1_000_000_000_000), "0";

    /// Topics that devices may join and leave by themselves, with commas between them: exact names, or a beginning and `*`, such as `news/*`. Without it only the backend says who is in a topic.
    TOPICS_SELF: TextSetting = "topics.self_subscribe", TextSetting {
        takes: "nothing, or names of topics and beginnings that end in `*`, with commas between them; at most 100",
        fits: is_patterns,
    }, "";

    /// How long the outcome of a ping can be asked for; then it answers 404 `ping_not_retained`.
    RECEIPTS_KEEP: SpanSetting = "receipts.keep", span(MINUTE, 90 * DAY), "24h";
    /// Size of the history of outcomes; above it the oldest are dropped before their time.
    RECEIPTS_MAX_BYTES: BytesSetting = "receipts.max_bytes", bytes(MIB, 256 * GIB), "4GiB";
    /// `true`: no outcome is announced before it is safe, as those of stored notifications always are. Costs a write and
    /// a share of a sync for each notification that reaches its device at once.
    RECEIPTS_DURABLE: FlagSetting = "receipts.durable", FlagSetting, "false";

    /// Where outcomes may be posted: names (`hooks.example.com`, `*.example.com`) and networks (`10.20.0.0/16`). A name leads to public addresses only, unless a network that is listed has them. Only the port that belongs to `https` (443; 80 for `http`) is reached, unless the entry names one (`hooks.example.com:8443`, `10.20.0.0/16:8443`, `[fd00::/8]:8443`) or all (`:*`). Empty: nowhere, and nothing is looked up.
    CALLBACKS_ALLOW: HostsSetting = "callbacks.allow", HostsSetting, "";
    /// Outcomes may be posted to `http://` as well. Whoever is on the way can read ids of pings and devices then.
    CALLBACKS_PLAIN: FlagSetting = "callbacks.plain_http", FlagSetting, "false";
    /// Authorities to trust for https, PEM. Without it those of the system.
    CALLBACKS_CA: PathSetting = "callbacks.ca", PathSetting, "";
    /// Longest time from a request to the end of its answer. Looking a name up, connecting and TLS have 5 s each.
    CALLBACKS_TIMEOUT: SpanSetting = "callbacks.timeout", span(SECOND, 2 * MINUTE), "15s";
    /// Most outcomes of one post; it has at most 64 KiB.
    CALLBACKS_BATCH: CountSetting = "callbacks.batch", count(1, 1_000), "100";
    /// Longest wait between two tries. It begins with a second and doubles.
    CALLBACKS_RETRY_MAX: SpanSetting = "callbacks.retry_max", span(SECOND, DAY), "5m";
    /// How long a batch is tried before it is kept as a dead letter and the next one's turn comes.
    CALLBACKS_GIVE_UP: SpanSetting = "callbacks.give_up", span(SECOND, 30 * DAY), "12h";
    /// Dead letters that are kept for each app, at most 64 KiB each; above it the oldest is dropped.
    CALLBACKS_DEAD_LETTERS: CountSetting = "callbacks.dead_letters", count(1, 100_000), "1000";

    /// Shards that own the mailboxes; each is one task. 0: one for each processor.
    RUNTIME_SHARDS: CountSetting = "runtime.shards", count(0, 256), "0";
    /// Window over which devices are sent away at a stop, so that they do not all come back at once.
    DRAIN_WINDOW: SpanSetting = "drain.window", span(0, 10 * MINUTE), "30s";

    /// How log lines on standard error look; `auto` is text on a terminal and JSON elsewhere.
    LOG_FORMAT: ChoiceSetting<LogFormat> = "log.format", ChoiceSetting {
        words: &[("auto", LogFormat::Auto), ("text", LogFormat::Text), ("json", LogFormat::Json)],
        refused: &[],
    }, "auto";
    /// Which log lines are written: `error`, `warn`, `info`, `debug` or `trace`, or directives such as `info,bellwire_server::store=debug`.
    LOG_LEVEL: TextSetting = "log.level", TextSetting {
        takes: "error, warn, info, debug, trace, or directives with commas between them",
        fits: is_log_filter,
    }, "info";
}

/// As the runtime reads them; a test where both are known holds this to it.
fn is_patterns(text: &str) -> bool {
    let named = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~/:@+".contains(&byte);
    let pattern = |pattern: &str| {
        let name = pattern.strip_suffix('*').unwrap_or(pattern);
        pattern == "*" || ((1..=128).contains(&name.len()) && name.bytes().all(named))
    };
    text.trim().is_empty()
        || (text.split(',').count() <= 100 && text.split(',').map(str::trim).all(pattern))
}

fn is_log_filter(text: &str) -> bool {
    !text.is_empty()
        && text.split(',').all(|directive| {
            let (target, level) = directive.rsplit_once('=').unwrap_or(("", directive));
            let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | ':');
            target.chars().all(plain)
                && ["off", "error", "warn", "info", "debug", "trace"].contains(&level)
        })
}

/// Keys of the section `quota` that an app can have its own value of: `quota.apps.NAME.` and the last part of the name.
pub static PER_APP: &[&dyn AnyKey] = &[
    &QUOTA_PINGS,
    &QUOTA_NOTIFICATIONS,
    &QUOTA_BYTES,
    &QUOTA_DEVICES,
];
