//! Settings that were checked: what the rest of the program is handed.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::keys;
use super::problem::Problems;
use super::reload::Values;
use super::setting::{Allowed, AnyKey};
use super::source::Source;

/// Every setting, checked one by one and against its neighbours. Made by [`super::load`] only.
#[derive(Debug, Clone)]
pub struct Checked {
    /// Where everything is kept.
    pub data_dir: PathBuf,
    /// Where to listen.
    pub listen: Listen,
    /// Networks of load balancers that may use [`Listen::devices_plain`].
    pub proxies: Vec<(IpAddr, u8)>,
    /// The certificate for devices; `None`: make one for development.
    pub tls: Option<PemPair>,
    /// No cipher suite but AES-256-GCM with SHA-384, for devices and the API.
    pub aes_256_only: bool,
    /// How the API is protected on its way.
    pub api: ApiAccess,
    /// The store.
    pub store: Store,
    /// Backups that the server makes by itself; `None`: it makes none.
    pub backup: Option<Backup>,
    /// Limits.
    pub limits: Limits,
    /// Where outcomes may be posted.
    pub callbacks: Callbacks,
    /// What apps may use.
    pub quotas: Quotas,
    /// How long outcomes can be asked for.
    pub receipts_keep: Duration,
    /// Size of the history of outcomes, bytes.
    pub receipts_max_bytes: u64,
    /// Whether every outcome is safe before it is announced.
    pub receipts_durable: bool,
    /// Topics that devices may join and leave by themselves: patterns with commas between them.
    pub self_subscribe: String,
    /// Shards; `None`: one for each processor.
    pub shards: Option<usize>,
    /// Over how long devices are sent away at a stop.
    pub drain_window: Duration,
    /// The log on standard error.
    pub log: LogSettings,
    /// What is allowed and should be said loudly at each start.
    pub warnings: Vec<String>,
    /// As it was given, to tell what a reload changes.
    pub(super) values: Values,
}

/// Where to listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listen {
    /// Devices, UDP and TCP.
    pub devices: SocketAddr,
    /// Load balancers that ended TLS; `None`: nowhere.
    pub devices_plain: Option<SocketAddr>,
    /// The API.
    pub api: SocketAddr,
    /// Health and metrics.
    pub operations: SocketAddr,
}

/// A certificate chain and its key, as files. Whether they are there and fit is found out when they are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PemPair {
    /// The chain, the server's own certificate first.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// How the API is protected on its way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ApiAccess {
    /// Plain HTTP that never leaves the machine.
    Loopback,
    /// HTTPS.
    Https(PemPair),
    /// Plain HTTP behind a proxy that the operator trusts.
    TrustedProxy,
}

/// What indexes the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Engine {
    /// The embedded database that is the default.
    Sled,
    /// The other embedded database: it gives room back by itself.
    Fjall,
    /// Nothing on disk but the log.
    Memory,
}

/// The store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Store {
    /// What indexes it.
    pub engine: Engine,
    /// The engine's cache, bytes.
    pub memory_bytes: u64,
    /// How long a row may be held back from the disk.
    pub defer_max: Duration,
    /// Size of one log file, bytes.
    pub segment_bytes: u64,
    /// Log written before a snapshot is due, bytes.
    pub snapshot_bytes: u64,
    /// Time after which a snapshot is due.
    pub snapshot_every: Duration,
    /// How many times the live data the engine's files may be; 0: any size.
    pub rebuild_factor: u64,
    /// Free space below which new pings are refused, bytes.
    pub reserve_bytes: u64,
    /// How far the engine may be behind, bytes.
    pub lag_bytes: u64,
    /// How far the engine may be behind in time, beyond the rest.
    pub lag_time: Duration,
    /// How long what is safe rests before the engine takes it.
    pub rest_time: Duration,
    /// How long it is known what was erased.
    pub erasures_keep: Duration,
    /// A network file system is good enough.
    pub trust_file_system: bool,
}

/// Backups that the server makes by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Where.
    pub dir: PathBuf,
    /// Time from one to the next.
    pub every: Duration,
    /// How many are kept.
    pub keep: u32,
    /// How long they are kept.
    pub keep_for: Duration,
}

/// What a full mailbox does with a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MailboxFull {
    /// The least urgent, oldest one goes.
    Evict,
    /// The newcomer is refused.
    Refuse,
}

/// Bounds of the keep-alive advised to devices, whole seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeepAlive {
    /// Least, seconds.
    pub min_s: u32,
    /// Most, seconds.
    pub max_s: u32,
}

/// Limits. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Content of one notification.
    pub content_bytes: u32,
    /// Notifications in one mailbox.
    pub mailbox_notifications: u32,
    /// Content in one mailbox.
    pub mailbox_bytes: u64,
    /// What a full mailbox does.
    pub mailbox_full: MailboxFull,
    /// TTL when a ping does not say.
    pub ttl_default: Duration,
    /// Longest TTL.
    pub ttl_max: Duration,
    /// In flight in a session whose device does not ask.
    pub in_flight: u32,
    /// In flight at most.
    pub in_flight_max: u32,
    /// Wait for acknowledgements when a ping does not say.
    pub wait_default: Duration,
    /// Longest wait for acknowledgements.
    pub wait_max: Duration,
    /// Body of a request.
    pub body_bytes: u64,
    /// Body of a batch.
    pub batch_bytes: u64,
    /// Lines of a batch.
    pub batch_lines: u32,
    /// TLS and hello together.
    pub hello_deadline: Duration,
    /// A send that the peer's transport does not take.
    pub write_deadline: Duration,
    /// In flight without a verdict.
    pub ack_timeout: Duration,
    /// Advised over QUIC.
    pub keep_alive_quic: KeepAlive,
    /// Advised over WebSocket.
    pub keep_alive_websocket: KeepAlive,
    /// Silence after which a link is dropped, in percent of the longest advised keep-alive.
    pub silence_percent: u32,
    /// Largest frame from a device.
    pub frame_bytes: u64,
    /// Connections of one address before hello.
    pub per_address: u32,
    /// Networks that are not counted per address.
    pub exempt: Vec<(IpAddr, u8)>,
    /// Connections before hello in all.
    pub unauthenticated: u32,
    /// Devices that one ping may name in a list.
    pub list_devices: u32,
    /// Pings to audiences of one app that may be on their way at once.
    pub open_expansions: u32,
    /// Memory for bodies in flight.
    pub memory_bytes: u64,
    /// Pings of one API key in a second.
    pub pings_per_second: u32,
    /// Pings of one API key at once.
    pub ping_burst: u32,
    /// Pings to one device in a second; 0: no limit.
    pub device_pings_per_second: u32,
    /// Pings to one device at once.
    pub device_ping_burst: u32,
    /// How long a device's old secret stays good after a rotation.
    pub secret_overlap: Duration,
    /// Connections of the API at once.
    pub api_connections: u32,
    /// How long a device that comes back is told what it is to take off the screen.
    pub withdrawals_keep: Duration,
    /// How long a backup may wait for whoever takes it.
    pub backup_stall: Duration,
    /// How long whoever sends a batch may take none of its answers.
    pub batch_stall: Duration,
    /// Streams of events that one app may have at once.
    pub event_streams: u32,
}

/// Where outcomes may be posted, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Callbacks {
    /// Hosts and networks; none: nowhere.
    pub allow: Vec<Allowed>,
    /// `http://` as well.
    pub plain_http: bool,
    /// Authorities to trust; `None`: those of the system.
    pub ca: Option<PathBuf>,
    /// Longest time for a request and its answer.
    pub timeout: Duration,
    /// Most outcomes of one post.
    pub batch: u32,
    /// Longest wait between two tries.
    pub retry_max: Duration,
    /// How long a batch is tried.
    pub give_up: Duration,
    /// Dead letters that are kept for each app.
    pub dead_letters: u32,
}

/// What one app may use; 0: as much as it likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AppQuota {
    /// Pings in a day.
    pub pings_per_day: u64,
    /// Notifications that wait.
    pub notifications: u64,
    /// Their content bytes.
    pub bytes: u64,
    /// Devices.
    pub devices: u64,
}

/// What apps may use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Quotas {
    /// Those that nothing of their own is set for.
    pub default: AppQuota,
    /// By name.
    pub apps: BTreeMap<String, AppQuota>,
}

impl Quotas {
    /// What an app may use.
    #[must_use]
    pub fn of(&self, app: &str) -> AppQuota {
        self.apps.get(app).copied().unwrap_or(self.default)
    }
}

/// The log on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogSettings {
    /// How lines look.
    pub format: LogFormat,
    /// Which lines are written.
    pub level: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// `Text` on a terminal, `Json` elsewhere.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl Checked {
    /// Checks everything that was given.
    ///
    /// # Errors
    /// Everything that is wrong.
    pub(super) fn from_source(source: &Source) -> Result<Checked, Problems> {
        let mut warnings = Vec::new();
        let listen = Listen {
            devices: source.get(&keys::LISTEN_DEVICES),
            devices_plain: source.find(&keys::LISTEN_DEVICES_PLAIN),
            api: source.get(&keys::LISTEN_API),
            operations: source.get(&keys::LISTEN_OPERATIONS),
        };
        check_ports(source, listen);
        let proxies = proxies(source, listen.devices_plain, &mut warnings);
        let tls = pair(source, &keys::TLS_CERT, &keys::TLS_KEY);
        if tls.is_none() && !listen.devices.ip().is_loopback() {
            warnings.push(format!(
                "devices connect to {} and the certificate is one for development, made by this server: set tls.cert and \
                 tls.key to one of your own before real devices use it",
                listen.devices
            ));
        }
        let api = api_access(source, listen.api);
        if !listen.operations.ip().is_loopback() {
            warnings.push(format!(
                "health and metrics are served without a key over plain HTTP on {}: keep listen.operations inside your \
                 network",
                listen.operations
            ));
        }
        let store = Store {
            engine: source.get(&keys::STORE_ENGINE),
            memory_bytes: source.get(&keys::STORE_MEMORY),
            defer_max: source.get(&keys::STORE_DEFER_MAX),
            segment_bytes: source.get(&keys::STORE_SEGMENT),
            snapshot_bytes: source.get(&keys::STORE_SNAPSHOT_BYTES),
            snapshot_every: source.get(&keys::STORE_SNAPSHOT_EVERY),
            rebuild_factor: source.get(&keys::STORE_REBUILD),
            reserve_bytes: source.get(&keys::STORE_RESERVE),
            lag_bytes: source.get(&keys::STORE_LAG_BYTES),
            lag_time: source.get(&keys::STORE_LAG_TIME),
            rest_time: source.get(&keys::STORE_REST_TIME),
            erasures_keep: source.get(&keys::STORE_ERASURES_KEEP),
            trust_file_system: source.get(&keys::STORE_TRUST),
        };
        let checked = Checked {
            data_dir: source.get(&keys::DATA_DIR),
            listen,
            proxies,
            tls,
            aes_256_only: source.get(&keys::TLS_AES_256_ONLY),
            api,
            store,
            backup: backup(source),
            limits: limits(source),
            callbacks: callbacks(source, &mut warnings),
            quotas: quotas(source),
            receipts_keep: source.get(&keys::RECEIPTS_KEEP),
            receipts_max_bytes: source.get(&keys::RECEIPTS_MAX_BYTES),
            receipts_durable: source.get(&keys::RECEIPTS_DURABLE),
            self_subscribe: source.get(&keys::TOPICS_SELF),
            shards: usize::try_from(source.get(&keys::RUNTIME_SHARDS))
                .ok()
                .filter(|shards| *shards > 0),
            drain_window: source.get(&keys::DRAIN_WINDOW),
            log: LogSettings {
                format: source.get(&keys::LOG_FORMAT),
                level: source.get(&keys::LOG_LEVEL),
            },
            warnings,
            values: Values::of(source),
        };
        source.verdict()?;
        Ok(checked)
    }
}

/// Where outcomes may be posted, and how.
fn callbacks(source: &Source, warnings: &mut Vec<String>) -> Callbacks {
    let callbacks = Callbacks {
        allow: source.get(&keys::CALLBACKS_ALLOW),
        plain_http: source.get(&keys::CALLBACKS_PLAIN),
        ca: source.find(&keys::CALLBACKS_CA),
        timeout: source.get(&keys::CALLBACKS_TIMEOUT),
        batch: clamp(source.get(&keys::CALLBACKS_BATCH)),
        retry_max: source.get(&keys::CALLBACKS_RETRY_MAX),
        give_up: source.get(&keys::CALLBACKS_GIVE_UP),
        dead_letters: clamp(source.get(&keys::CALLBACKS_DEAD_LETTERS)),
    };
    if !callbacks.allow.is_empty() && callbacks.plain_http {
        warnings.push(
            "outcomes may be posted over plain http: whoever is on the way can read the ids of pings and devices \
             (callbacks.plain_http)"
                .to_owned(),
        );
    }
    callbacks
}

/// Backups that the server makes by itself.
fn backup(source: &Source) -> Option<Backup> {
    let dir = source.find(&keys::BACKUP_DIR)?;
    if dir.starts_with(source.get(&keys::DATA_DIR)) {
        source.note(
            &keys::BACKUP_DIR,
            "backups would lie in the data directory, and be lost with it",
            "name a directory outside of it, best on another volume",
        );
    }
    let keep_for = source.get(&keys::BACKUP_KEEP_FOR);
    if keep_for > source.get(&keys::STORE_ERASURES_KEEP) {
        source.note(
            &keys::BACKUP_KEEP_FOR,
            "backups would be kept for longer than it is known what was erased since",
            "set it no higher than store.erasures_keep",
        );
    }
    Some(Backup {
        dir,
        every: source.get(&keys::BACKUP_EVERY),
        keep: u32::try_from(source.get(&keys::BACKUP_KEEP)).unwrap_or(u32::MAX),
        keep_for,
    })
}

/// Two TCP listeners cannot share an address and a port.
fn check_ports(source: &Source, listen: Listen) {
    let same = |a: SocketAddr, b: SocketAddr| {
        a.port() == b.port()
            && a.port() != 0
            && (a.ip() == b.ip() || a.ip().is_unspecified() || b.ip().is_unspecified())
    };
    let mut named: Vec<(&dyn AnyKey, SocketAddr)> = vec![
        (&keys::LISTEN_DEVICES, listen.devices),
        (&keys::LISTEN_API, listen.api),
        (&keys::LISTEN_OPERATIONS, listen.operations),
    ];
    if let Some(plain) = listen.devices_plain {
        named.push((&keys::LISTEN_DEVICES_PLAIN, plain));
    }
    for (index, (key, address)) in named.iter().enumerate() {
        for (earlier, taken) in &named[..index] {
            if same(*address, *taken) {
                source.note(
                    *key,
                    &format!(
                        "{address} is what {} uses already ({taken})",
                        earlier.name()
                    ),
                    "give each listener a port of its own",
                );
            }
        }
    }
}

/// Who may bring devices without TLS.
fn proxies(
    source: &Source,
    plain: Option<SocketAddr>,
    warnings: &mut Vec<String>,
) -> Vec<(IpAddr, u8)> {
    let networks = source.get(&keys::LISTEN_PROXY_NETWORKS);
    let asked = source.is_set(&keys::LISTEN_DEVICES_PLAIN);
    if networks.is_empty() && asked {
        source.note(
            &keys::LISTEN_DEVICES_PLAIN,
            "nobody may connect here, because no load balancer is listed",
            "set listen.proxy_networks to the networks of your load balancers, such as [\"10.0.3.0/28\"]",
        );
    }
    if !networks.is_empty() && !asked {
        source.note(
            &keys::LISTEN_PROXY_NETWORKS,
            "load balancers are listed, but there is no listener for them",
            "set listen.devices_plain to an address and a port, or remove the list",
        );
    }
    if networks.iter().any(|(_, prefix)| *prefix == 0) {
        source.note(
            &keys::LISTEN_PROXY_NETWORKS,
            "the whole world could say which address a device has",
            "list the networks of your load balancers and nobody else",
        );
    }
    if let Some(plain) = plain.filter(|plain| !plain.ip().is_loopback()) {
        warnings.push(format!(
            "load balancers bring devices to {plain} without TLS: keep listen.devices_plain inside your network"
        ));
    }
    networks
}

fn pair(
    source: &Source,
    cert: &super::Key<super::setting::PathSetting>,
    key: &super::Key<super::setting::PathSetting>,
) -> Option<PemPair> {
    match (source.find(cert), source.find(key)) {
        (Some(cert), Some(key)) => Some(PemPair { cert, key }),
        (Some(_), None) if !source.is_set(key) => {
            source.note(
                cert,
                "a certificate without its key",
                &format!("set {} as well", key.name),
            );
            None
        }
        (None, Some(_)) if !source.is_set(cert) => {
            source.note(
                key,
                "a key without its certificate",
                &format!("set {} as well", cert.name),
            );
            None
        }
        (Some(_) | None, None) | (None, Some(_)) => None,
    }
}

fn api_access(source: &Source, address: SocketAddr) -> ApiAccess {
    let pair = pair(source, &keys::API_CERT, &keys::API_KEY);
    let proxy = source.get(&keys::API_TRUSTED_PROXY);
    if let Some(pair) = pair {
        if proxy {
            source.note(
                &keys::API_TRUSTED_PROXY,
                "the API has a certificate, so it speaks HTTPS and no proxy needs to be trusted",
                "remove api.trusted_proxy, or api.cert and api.key",
            );
        }
        return ApiAccess::Https(pair);
    }
    if proxy {
        return ApiAccess::TrustedProxy;
    }
    let asked = source.is_set(&keys::API_CERT) || source.is_set(&keys::API_KEY);
    if !address.ip().is_loopback() && !asked {
        source.note(
            &keys::LISTEN_API,
            &format!(
                "the API would speak plain HTTP on {address}, and API keys would cross the network in the clear"
            ),
            "set api.cert and api.key, so that it speaks HTTPS; or listen on 127.0.0.1; or, if a proxy that you trust \
             stands in front and speaks TLS, say so with api.trusted_proxy = true",
        );
    }
    ApiAccess::Loopback
}

/// Two settings of which one must not be above the other.
fn ordered(least: (&dyn AnyKey, u64), most: (&dyn AnyKey, u64), source: &Source) {
    if least.1 <= most.1 {
        return;
    }
    let (key, other) = if source.is_set(least.0) {
        (least.0, most.0)
    } else {
        (most.0, least.0)
    };
    source.note(
        key,
        &format!("{} is above {}", least.0.name(), most.0.name()),
        &format!(
            "set {} no higher than {} (look at {})",
            least.0.name(),
            most.0.name(),
            other.name()
        ),
    );
}

fn limits(source: &Source) -> Limits {
    ordered(
        (&keys::LIMITS_IN_FLIGHT, source.get(&keys::LIMITS_IN_FLIGHT)),
        (
            &keys::LIMITS_IN_FLIGHT_MAX,
            source.get(&keys::LIMITS_IN_FLIGHT_MAX),
        ),
        source,
    );
    ordered(
        (
            &keys::LIMITS_WAIT_DEFAULT,
            source.get(&keys::LIMITS_WAIT_DEFAULT).as_secs(),
        ),
        (
            &keys::LIMITS_WAIT_MAX,
            source.get(&keys::LIMITS_WAIT_MAX).as_secs(),
        ),
        source,
    );
    let ttl_default = source.get(&keys::LIMITS_TTL_DEFAULT);
    let ttl_max = source.get(&keys::LIMITS_TTL_MAX);
    if ttl_default > ttl_max {
        let (key, other): (&dyn AnyKey, _) = if source.is_set(&keys::LIMITS_TTL_DEFAULT) {
            (&keys::LIMITS_TTL_DEFAULT, "limits.ttl_max")
        } else {
            (&keys::LIMITS_TTL_MAX, "limits.ttl_default")
        };
        source.note(
            key,
            "the default TTL is longer than the longest one",
            &format!("lower limits.ttl_default or raise limits.ttl_max (look at {other})"),
        );
    }
    let content = source.get(&keys::LIMITS_CONTENT);
    let mailbox_bytes = source.get(&keys::LIMITS_MAILBOX_BYTES);
    if content > mailbox_bytes {
        source.note(
            &keys::LIMITS_MAILBOX_BYTES,
            "one notification of the largest size would not fit into an empty mailbox",
            "raise limits.mailbox_bytes or lower limits.content_bytes",
        );
    }
    Limits {
        content_bytes: clamp(content),
        mailbox_notifications: clamp(source.get(&keys::LIMITS_MAILBOX)),
        mailbox_bytes,
        mailbox_full: source.get(&keys::LIMITS_MAILBOX_FULL),
        ttl_default,
        ttl_max,
        in_flight: clamp(source.get(&keys::LIMITS_IN_FLIGHT)),
        in_flight_max: clamp(source.get(&keys::LIMITS_IN_FLIGHT_MAX)),
        wait_default: source.get(&keys::LIMITS_WAIT_DEFAULT),
        wait_max: source.get(&keys::LIMITS_WAIT_MAX),
        body_bytes: source.get(&keys::LIMITS_BODY),
        batch_bytes: source.get(&keys::LIMITS_BATCH),
        batch_lines: clamp(source.get(&keys::LIMITS_BATCH_LINES)),
        hello_deadline: source.get(&keys::LIMITS_HELLO),
        write_deadline: source.get(&keys::LIMITS_WRITE),
        ack_timeout: source.get(&keys::LIMITS_ACK),
        keep_alive_quic: keep_alive(
            source,
            &keys::LIMITS_KEEP_ALIVE_QUIC_MIN,
            &keys::LIMITS_KEEP_ALIVE_QUIC_MAX,
        ),
        keep_alive_websocket: keep_alive(
            source,
            &keys::LIMITS_KEEP_ALIVE_WEBSOCKET_MIN,
            &keys::LIMITS_KEEP_ALIVE_WEBSOCKET_MAX,
        ),
        silence_percent: clamp(source.get(&keys::LIMITS_SILENCE)),
        frame_bytes: source.get(&keys::LIMITS_FRAME),
        per_address: clamp(source.get(&keys::LIMITS_PER_ADDRESS)),
        exempt: source.get(&keys::LIMITS_EXEMPT),
        unauthenticated: clamp(source.get(&keys::LIMITS_UNAUTHENTICATED)),
        list_devices: clamp(source.get(&keys::LIMITS_LIST)),
        open_expansions: clamp(source.get(&keys::LIMITS_EXPANSIONS)),
        memory_bytes: source.get(&keys::LIMITS_MEMORY),
        pings_per_second: clamp(source.get(&keys::LIMITS_PING_RATE)),
        ping_burst: clamp(source.get(&keys::LIMITS_PING_BURST)),
        device_pings_per_second: clamp(source.get(&keys::LIMITS_DEVICE_RATE)),
        device_ping_burst: clamp(source.get(&keys::LIMITS_DEVICE_BURST)),
        secret_overlap: source.get(&keys::LIMITS_SECRET_OVERLAP),
        api_connections: clamp(source.get(&keys::LIMITS_API_CONNECTIONS)),
        withdrawals_keep: source.get(&keys::LIMITS_WITHDRAWALS_KEEP),
        backup_stall: source.get(&keys::LIMITS_BACKUP_STALL),
        batch_stall: source.get(&keys::LIMITS_BATCH_STALL),
        event_streams: clamp(source.get(&keys::LIMITS_EVENT_STREAMS)),
    }
}

fn quotas(source: &Source) -> Quotas {
    let of = |app: &str| AppQuota {
        pings_per_day: source.get_of(app, &keys::QUOTA_PINGS),
        notifications: source.get_of(app, &keys::QUOTA_NOTIFICATIONS),
        bytes: source.get_of(app, &keys::QUOTA_BYTES),
        devices: source.get_of(app, &keys::QUOTA_DEVICES),
    };
    Quotas {
        // No app has this name.
        default: of(""),
        apps: source
            .apps()
            .into_iter()
            .map(|app| {
                let own = of(&app);
                (app, own)
            })
            .collect(),
    }
}

fn keep_alive(
    source: &Source,
    min: &super::Key<super::setting::SpanSetting>,
    max: &super::Key<super::setting::SpanSetting>,
) -> KeepAlive {
    let (least, most) = (source.get(min), source.get(max));
    if least > most {
        let key: &dyn AnyKey = if source.is_set(min) { min } else { max };
        source.note(
            key,
            "the shortest keep-alive is longer than the longest",
            &format!("set {} no higher than {}", min.name, max.name),
        );
    }
    // Devices are advised in whole seconds.
    KeepAlive {
        min_s: clamp(least.as_secs()),
        max_s: clamp(most.as_secs()),
    }
}

/// The bounds of the keys lie far below what fits.
fn clamp(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::super::{Environment, load};
    use super::*;

    fn from_file(text: &str) -> Result<Checked, Problems> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bellwire.toml");
        std::fs::write(&path, text).unwrap();
        load(Some(&path), &Environment::default())
    }

    /// What is wrong with this file: line:column what | help.
    fn wrong(text: &str) -> Vec<String> {
        from_file(text)
            .unwrap_err()
            .iter()
            .map(|problem| {
                let place = problem.position().map_or_else(
                    || "-".to_owned(),
                    |(_, line, column)| format!("{line}:{column}"),
                );
                format!("{place} {} | {}", problem.what(), problem.advice())
            })
            .collect()
    }

    #[test]
    fn every_default_is_what_its_key_takes() {
        for key in keys::ALL.iter().filter(|key| !key.default().is_empty()) {
            let default = super::super::setting::Given::Text(key.default().to_owned());
            assert_eq!(key.check(&default), Ok(()), "{}", key.name());
        }
        let checked = from_file("").unwrap();
        assert_eq!(checked.listen.api.to_string(), "127.0.0.1:8480");
        assert_eq!(checked.api, ApiAccess::Loopback);
        assert_eq!(checked.warnings, Vec::<String>::new());
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("bellwire.toml");
        std::fs::write(&path, "data_dir = \"a\"\n[limits]\nttl_max = \"9d\"\n").unwrap();
        let environment = Environment::of([
            ("BELLWIRE__DATA_DIR", "b"),
            ("BELLWIRE__LISTEN__API", "127.0.0.1:0"),
            (
                "BELLWIRE__LIMITS__EXEMPT_NETWORKS",
                "10.0.0.0/8,192.168.0.0/16",
            ),
        ]);
        let checked = load(Some(&path), &environment).unwrap();
        assert_eq!(checked.data_dir, PathBuf::from("b"));
        assert_eq!(checked.listen.api.port(), 0);
        assert_eq!(checked.limits.exempt.len(), 2);
        assert_eq!(checked.limits.ttl_max, Duration::from_secs(9 * 86_400));
    }

    #[test]
    fn a_mistyped_key_is_refused_where_it_stands_with_the_one_that_was_meant() {
        assert_eq!(
            wrong(
                "[listen]\n  device = \"127.0.0.1:1\"\n\n[store]\ndata_dir = \"x\"\n[colour]\nred = 1\n"
            ),
            [
                "2:3 listen.device is not a setting | did you mean devices?",
                "5:1 store.data_dir is not a setting | did you mean data_dir, at the top of the file?",
                "7:1 colour.red is not a setting | docs/operations.md lists every setting; remove it, or look for its \
                 name there",
            ]
        );
    }

    #[test]
    fn a_mistyped_variable_is_refused_by_its_name() {
        let problems = load(None, &Environment::of([("BELLWIRE__LISTEN__APY", "x")])).unwrap_err();
        assert_eq!(
            problems.to_string(),
            "BELLWIRE__LISTEN__APY is not a setting"
        );
        assert_eq!(
            problems.iter().next().unwrap().advice(),
            "did you mean BELLWIRE__LISTEN__API?"
        );
        let problems =
            load(None, &Environment::of([("BELLWIRE__LISTEN__API", "here")])).unwrap_err();
        assert_eq!(
            problems.to_string(),
            "BELLWIRE__LISTEN__API (listen.api): \"here\" is not an address with a port"
        );
    }

    #[test]
    fn all_problems_are_told_at_once_in_the_order_of_the_file() {
        let found =
            wrong("[store]\nengine = \"redb\"\nmemory_bytes = \"64MB\"\n[limits]\nttl_max = 30\n");
        assert_eq!(found.len(), 3, "{found:#?}");
        assert!(found[0].starts_with("2:10 store.engine: \"redb\""));
        assert!(
            found[1]
                .starts_with("3:16 store.memory_bytes: \"64MB\" does not do here | write a size")
        );
        assert!(found[2].starts_with("5:11 limits.ttl_max: 30 has no unit of time"));
    }

    #[test]
    fn what_is_no_toml_is_pointed_at() {
        let found = wrong("data_dir = here\n");
        assert_eq!(found.len(), 1);
        assert!(found[0].starts_with("1:12 this is not TOML"), "{found:?}");
    }

    #[test]
    fn the_api_leaves_the_machine_only_with_a_certificate_or_a_trusted_proxy() {
        let open = "[listen]\napi = \"0.0.0.0:8480\"\n";
        let found = wrong(open);
        assert!(found[0].contains("in the clear"), "{found:?}");
        assert!(found[0].contains("api.trusted_proxy = true"), "{found:?}");
        let proxy = from_file(&format!("{open}[api]\ntrusted_proxy = true\n")).unwrap();
        assert_eq!(proxy.api, ApiAccess::TrustedProxy);
        let https = from_file(&format!("{open}[api]\ncert = \"c\"\nkey = \"k\"\n")).unwrap();
        assert!(matches!(https.api, ApiAccess::Https(_)));
        assert_eq!(wrong("[api]\ncert = \"c\"\n").len(), 1);
    }

    #[test]
    fn development_certificates_outside_the_machine_are_allowed_and_said() {
        let checked = from_file("[listen]\ndevices = \"0.0.0.0:4433\"\n").unwrap();
        assert_eq!(checked.warnings.len(), 1);
        assert!(checked.warnings[0].contains("for development"));
    }

    #[test]
    fn two_listeners_never_share_a_port() {
        let found = wrong("[listen]\napi = \"127.0.0.1:4433\"\n");
        assert!(
            found[0].contains("listen.devices uses already"),
            "{found:?}"
        );
        assert!(
            from_file("[listen]\napi = \"127.0.0.1:0\"\noperations = \"127.0.0.1:0\"\n").is_ok()
        );
    }

    #[test]
    fn the_plain_listener_and_its_load_balancers_are_set_together() {
        let plain = "[listen]\ndevices_plain = \"127.0.0.1:4434\"\n";
        assert!(wrong(plain)[0].starts_with("2:17 listen.devices_plain: nobody may connect"));
        let only = "[listen]\nproxy_networks = [\"10.0.3.0/28\"]\n";
        assert!(
            wrong(only)[0].starts_with("2:18 listen.proxy_networks: load balancers are listed")
        );
        let world = format!("{plain}proxy_networks = [\"0.0.0.0/0\"]\n");
        assert!(wrong(&world)[0].contains("the whole world"));
        let taken = format!("{plain}proxy_networks = [\"::1/128\"]\napi = \"127.0.0.1:4434\"\n");
        assert!(
            wrong(&taken)[0].contains("listen.api uses already"),
            "{:?}",
            wrong(&taken)
        );
        let good = from_file(&format!("{plain}proxy_networks = [\"10.0.3.0/28\"]\n")).unwrap();
        assert_eq!((good.proxies.len(), good.warnings.len()), (1, 0));
        let open = from_file(
            "[listen]\ndevices_plain = \"10.0.3.1:4434\"\nproxy_networks = [\"10.0.3.0/28\"]\n",
        );
        assert!(open.unwrap().warnings[0].contains("without TLS"));
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let problems = load(
            Some(std::path::Path::new("/nowhere/bellwire.toml")),
            &Environment::default(),
        );
        assert!(
            problems
                .unwrap_err()
                .to_string()
                .contains("/nowhere/bellwire.toml")
        );
    }
}
