//! What operators and their tools look at: status, health, metrics, the document.

use axum::body::Body;
use axum::extract::State;
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::{Read, Scoped};
use super::document::refusals;
use super::error::Problem;
use super::loaded::SettingsReport;
use super::{Backend, Connections, answer};
use crate::delivery::OverflowRule;
use crate::runtime::{CallbackFigures, ClockState, Status, StoreHealth};

/// Apps that one status tells of; metrics add the others up.
const APPS_MAX: usize = 1_000;

/// How the server is.
#[derive(Serialize, ToSchema)]
pub(super) struct StatusReport {
    /// The version of the program.
    version: &'static str,
    /// The number of this run, raised at each start.
    run: u32,
    /// When this run started, Unix milliseconds.
    started_ms: u64,
    /// How long it runs, seconds.
    uptime_s: u64,
    /// The server's time, Unix milliseconds.
    now_ms: u64,
    /// Whether it wants traffic, as `/readyz` says.
    ready: bool,
    /// Whether it is going down.
    draining: bool,
    devices: DevicesReport,
    connections: ConnectionsReport,
    /// Pings on their way to audiences.
    expansions: u64,
    memory: MemoryReport,
    store: StoreReport,
    history: HistoryReport,
    callbacks: CallbacksReport,
    /// Backups that the server makes by itself; missing if it makes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    backup: Option<BackupReport>,
    clock: ClockReport,
    limits: LimitsReport,
    /// What apps may use and do use, by name: the first 1,000.
    apps: Vec<AppReport>,
    /// Apps that are not among them.
    apps_left_out: usize,
    /// Whether everything that apps have is counted. For a while after a start it is not, and the counts are too low.
    apps_counted: bool,
    settings: SettingsReport,
}

/// Callbacks: where outcomes are posted.
#[derive(Serialize, ToSchema)]
struct CallbacksReport {
    /// Whether the operator's settings allow any.
    on: bool,
    /// How many are set.
    set: u64,
    /// Of these, those that are tried again.
    failing: u64,
    /// Of these, those whose receiver said that it is gone.
    gone: u64,
    /// Batches that were given up and are kept.
    dead_letters: u64,
}

impl From<CallbackFigures> for CallbacksReport {
    fn from(figures: CallbackFigures) -> CallbacksReport {
        CallbacksReport {
            on: figures.on,
            set: figures.set,
            failing: figures.failing,
            gone: figures.gone,
            dead_letters: figures.dead_letters,
        }
    }
}

/// Connected devices.
#[derive(Serialize, ToSchema)]
struct DevicesReport {
    /// In all.
    connected: u64,
    /// Over QUIC.
    quic: u64,
    /// Over WebSocket.
    websocket: u64,
}

/// Connections that `limits` bounds.
#[derive(Serialize, ToSchema)]
struct ConnectionsReport {
    /// Of devices, that have not said hello yet; `limits.unauthenticated_connections` is the bound.
    unauthenticated: u32,
    /// Of these, those of the address that has most; `limits.connections_per_address` is the bound. Loopback and
    /// networks that are exempt are not among them.
    busiest_address: u32,
    /// Of the API, with one place that is ready for the next; `limits.api_connections` is the bound.
    api: usize,
}

/// What is held in memory.
#[derive(Serialize, ToSchema)]
struct MemoryReport {
    /// Tasks that own mailboxes.
    shards: usize,
    /// Mailboxes in memory.
    mailboxes_awake: u64,
    /// Bodies in flight, bytes.
    reserve_bytes: u64,
    /// Notifications in the ledger of recent outcomes.
    ledger_entries: u64,
    /// Bytes of that ledger.
    ledger_bytes: u64,
    /// Idempotency keys remembered.
    idempotency_entries: u64,
}

/// The store.
#[derive(Serialize, ToSchema)]
struct StoreReport {
    /// The engine.
    engine: &'static str,
    /// `open`, `full` (below the free-space reserve), `behind` (the engine is), or `failed` (until a restart).
    health: &'static str,
    /// What an operator should know about that.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    detail: Option<String>,
    /// Frames written to the log in this run.
    frames: u64,
    /// Syncs of the log in this run.
    syncs: u64,
    /// The last frame that is safe.
    last_frame: u64,
    /// The last frame that the engine has.
    applied_frame: u64,
    /// How far the engine is behind, bytes.
    lag_bytes: u64,
    /// How far the engine is behind, milliseconds.
    lag_ms: u64,
    /// Size of the log, bytes.
    log_bytes: u64,
    /// Segments of the log.
    log_segments: u64,
    /// Size of the engine's files, bytes.
    engine_bytes: u64,
    /// Keys and values that lived when the newest snapshot was taken, bytes; 0 before the first.
    live_bytes: u64,
    /// Size of the snapshots, bytes.
    snapshot_bytes: u64,
    /// Times that the engine was built anew while serving, in this run.
    rebuilds: u64,
    /// Free space on the volume, bytes.
    free_bytes: u64,
    /// Median duration of the last 1,024 syncs, microseconds.
    sync_median_us: u64,
    /// Worst duration of the last 1,024 syncs, microseconds.
    sync_worst_us: u64,
    /// Frame at which the newest verified snapshot starts.
    snapshot_frame: u64,
    /// Records that could not be read and were set aside.
    set_aside: u64,
    /// Size of everything that was set aside and is still there, engines and damaged files, bytes; at most a minute old.
    aside_bytes: u64,
}

/// Backups that the server makes by itself.
#[derive(Serialize, ToSchema)]
struct BackupReport {
    /// When the last good one was begun, Unix milliseconds; 0 if there is none.
    last_ms: u64,
    /// How long it took, milliseconds; 0 if an earlier run made it.
    took_ms: u64,
    /// Its size, bytes.
    bytes: u64,
    /// Backups in the directory that the schedule made of this store.
    kept: u64,
    /// Tries of this run that failed.
    failures: u64,
    /// When the next one is due, Unix milliseconds.
    due_ms: u64,
    /// One is being made now.
    running: bool,
    /// What went wrong at the last try, if anything did; an old backup that could not be removed too.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    trouble: Option<String>,
}

/// The history of outcomes.
#[derive(Serialize, ToSchema)]
struct HistoryReport {
    /// Size of its files, bytes.
    bytes: u64,
    /// Its segments.
    segments: u64,
    /// Outcomes that can be asked for.
    records: u64,
    /// When the oldest of them ended, Unix milliseconds; 0: there is none.
    oldest_ms: u64,
    /// Outcomes and files that cannot be read.
    unreadable: u64,
    /// Outcomes of this run that were left out: more than the history takes, or a write failed.
    lost: u64,
}

/// Our clock against the system's.
#[derive(Serialize, ToSchema)]
struct ClockReport {
    /// `steady`, or `jumped`: the sweep of expired notifications pauses.
    state: &'static str,
    /// By how much the system's clock is ahead of ours after a jump, milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    jumped_by_ms: Option<i64>,
}

/// The limits in force.
#[derive(Serialize, ToSchema)]
struct LimitsReport {
    /// Largest content of one notification, bytes.
    content_max: u32,
    /// TTL of a ping that names none, seconds.
    ttl_default_s: u64,
    /// Longest TTL, seconds.
    ttl_max_s: u64,
    /// Devices that one ping may address and be answered device by device; more are an audience.
    devices_per_ping: u32,
    /// Devices that one ping may name in a list.
    devices_per_list: u32,
    /// Pings to audiences of one app that may be on their way at once.
    open_expansions: u32,
    /// How long a device's old secret stays good after a rotation that names no time, seconds.
    secret_overlap_s: u64,
    /// Notifications in one mailbox.
    mailbox_notifications: u32,
    /// Content bytes in one mailbox.
    mailbox_bytes: u64,
    /// What a full mailbox does: `evict` or `refuse`.
    mailbox_full: &'static str,
    /// Notifications in flight in a session whose device asks for no number.
    in_flight: u16,
    /// Most notifications in flight that a device is granted.
    in_flight_max: u16,
    /// Largest frame from a device, bytes.
    frame_max: usize,
    /// TLS and hello together, seconds.
    hello_deadline_s: u64,
    /// Advised keep-alive over QUIC, seconds, least and most.
    keep_alive_quic_s: (u32, u32),
    /// Advised keep-alive over WebSocket, seconds, least and most.
    keep_alive_websocket_s: (u32, u32),
    /// Silence after which a link is dropped, in percent of the longest advised keep-alive.
    silence_percent: u32,
    /// Over how long devices are sent away at a stop, seconds.
    drain_window_s: u64,
    /// Connections that the API serves at once; `connections.api` are there.
    api_connections: usize,
    /// Connections of one address that have not said hello.
    connections_per_address: u32,
    /// Networks whose connections are not counted by address; loopback never is.
    exempt_networks: Vec<String>,
    /// Connections in all that have not said hello.
    unauthenticated_connections: u32,
    /// Wait for acknowledgements of a ping that names none, seconds.
    wait_default_s: u64,
    /// Longest wait for acknowledgements, seconds.
    wait_max_s: u64,
    /// Largest body of a request, bytes.
    body_max: usize,
    /// Largest body of a batch, bytes.
    batch_body_max: usize,
    /// Most pings of a batch.
    batch_lines_max: usize,
    /// Pings of one API key in a second, in the long run.
    pings_per_second: u32,
    /// Pings of one API key at once.
    ping_burst: u32,
    /// Pings to one device in a second, in the long run; 0: no limit.
    device_pings_per_second: u32,
    /// Pings to one device at once.
    device_ping_burst: u32,
    /// Bodies in flight, bytes; `memory.reserve_bytes` of it are used.
    memory_reserve: u64,
    /// How far the engine may be behind the log, bytes; `store.lag_bytes` is how far it is.
    lag_bytes_max: u64,
    /// The same as a time, milliseconds: `store.lag_time` and `store.rest_time` together.
    lag_ms_max: u64,
    /// Free space that is kept, bytes; `store.free_bytes` is what there is.
    disk_reserve: u64,
}

/// What one app may use and does use.
#[derive(Serialize, ToSchema)]
struct AppReport {
    /// Its name.
    name: String,
    /// Pings that it may send in 24 hours; 0: as many as it likes.
    pings_per_day: u64,
    /// Of those, what is left now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pings_left: Option<u64>,
    /// Its bodies in flight, bytes.
    reserve_bytes: u64,
    /// Notifications that wait in its mailboxes.
    notifications: u64,
    /// As many as it may have; 0: as many as it likes.
    notifications_max: u64,
    /// Their content bytes.
    bytes: u64,
    /// As many as it may have; 0: as many as it likes.
    bytes_max: u64,
    /// Its devices.
    devices: u64,
    /// As many as it may have; 0: as many as it likes.
    devices_max: u64,
}

impl StatusReport {
    fn new(
        status: &Status,
        callbacks: CallbackFigures,
        connections: Connections,
        ready: bool,
        settings: SettingsReport,
    ) -> StatusReport {
        let (health, detail) = match &status.health {
            StoreHealth::Open => ("open", None),
            StoreHealth::Full { free, reserve } => (
                "full",
                Some(format!(
                    "{free} bytes are free, {reserve} are kept as a reserve: free space or add disk"
                )),
            ),
            StoreHealth::Behind => ("behind", None),
            StoreHealth::Failed(why) => ("failed", Some(why.clone())),
        };
        let (clock, jumped_by_ms) = match status.clock {
            ClockState::Steady => ("steady", None),
            ClockState::Jumped { by_ms } => ("jumped", Some(by_ms)),
        };
        let store = &status.store;
        StatusReport {
            version: status.version,
            run: status.run,
            started_ms: status.started_ms,
            uptime_s: status.uptime.as_secs(),
            now_ms: status.now_ms,
            ready,
            draining: status.draining,
            devices: DevicesReport {
                connected: status.connected(),
                quic: status.connected_quic,
                websocket: status.connected_websocket,
            },
            connections: ConnectionsReport {
                unauthenticated: connections.unauthenticated,
                busiest_address: connections.busiest_address,
                api: connections.api,
            },
            expansions: status.expansions,
            memory: MemoryReport {
                shards: status.shards,
                mailboxes_awake: status.awake,
                reserve_bytes: status.reserve_bytes,
                ledger_entries: status.ledger_entries,
                ledger_bytes: status.ledger_bytes,
                idempotency_entries: status.idempotency_entries,
            },
            store: StoreReport {
                engine: store.engine,
                health,
                detail,
                frames: store.frames,
                syncs: store.syncs,
                last_frame: store.last_frame,
                applied_frame: store.applied_frame,
                lag_bytes: store.lag_bytes,
                lag_ms: store.lag_ms,
                log_bytes: store.log_bytes,
                log_segments: store.log_segments,
                engine_bytes: store.engine_bytes,
                live_bytes: store.live_bytes,
                snapshot_bytes: store.snapshot_bytes,
                rebuilds: store.rebuilds,
                free_bytes: store.free_bytes,
                sync_median_us: store.sync_us.0,
                sync_worst_us: store.sync_us.1,
                snapshot_frame: store.snapshot_frame,
                set_aside: store.set_aside,
                aside_bytes: store.aside_bytes,
            },
            backup: store.backup.as_ref().map(|backup| BackupReport {
                last_ms: backup.last_ms,
                took_ms: backup.took_ms,
                bytes: backup.bytes,
                kept: backup.kept,
                failures: backup.failures,
                due_ms: backup.due_ms,
                running: backup.running,
                trouble: backup.trouble.clone(),
            }),
            callbacks: CallbacksReport::from(callbacks),
            history: HistoryReport {
                bytes: store.outcomes.bytes,
                segments: store.outcomes.segments,
                records: store.outcomes.records,
                oldest_ms: store.outcomes.oldest_ms,
                unreadable: store.outcomes.unreadable,
                lost: store
                    .outcomes
                    .overflowed
                    .saturating_add(store.outcomes.failed),
            },
            clock: ClockReport {
                state: clock,
                jumped_by_ms,
            },
            limits: LimitsReport {
                content_max: status.limits.content_max,
                ttl_default_s: status.limits.ttl_default_s,
                ttl_max_s: status.limits.ttl_max_s,
                devices_per_ping: status.limits.devices_max,
                devices_per_list: status.limits.list_max,
                open_expansions: status.limits.expansions_max,
                secret_overlap_s: status.limits.secret_overlap.as_secs(),
                mailbox_notifications: status.policy.mailbox_notifications,
                mailbox_bytes: status.policy.mailbox_bytes,
                mailbox_full: match status.policy.overflow {
                    OverflowRule::Evict => "evict",
                    OverflowRule::Refuse => "refuse",
                },
                in_flight: status.link.window_default,
                in_flight_max: status.link.window_max,
                frame_max: status.link.frame_max,
                hello_deadline_s: status.link.hello_deadline.as_secs(),
                keep_alive_quic_s: status.link.keep_alive_quic_s,
                keep_alive_websocket_s: status.link.keep_alive_websocket_s,
                silence_percent: status.link.silence_percent,
                drain_window_s: status.limits.drain_window.as_secs(),
                api_connections: connections.api_max,
                connections_per_address: status.link.per_address,
                exempt_networks: status
                    .link
                    .exempt
                    .iter()
                    .map(|(network, prefix)| format!("{network}/{prefix}"))
                    .collect(),
                unauthenticated_connections: status.link.unauthenticated,
                wait_default_s: status.limits.wait_default.as_secs(),
                wait_max_s: status.limits.wait_max.as_secs(),
                body_max: status.limits.body_max,
                batch_body_max: status.limits.batch_body_max,
                batch_lines_max: status.limits.batch_lines_max,
                pings_per_second: status.limits.pings_per_second,
                ping_burst: status.limits.ping_burst,
                device_pings_per_second: status.limits.device_pings_per_second,
                device_ping_burst: status.limits.device_ping_burst,
                memory_reserve: status.limits.memory_reserve,
                lag_bytes_max: store.lag_bytes_max,
                lag_ms_max: store.lag_ms_max,
                disk_reserve: store.reserve_bytes,
            },
            apps: status
                .apps
                .iter()
                .take(APPS_MAX)
                .map(|app| AppReport {
                    name: app.name.clone(),
                    pings_per_day: app.quota.pings_per_day,
                    pings_left: app.pings_left,
                    reserve_bytes: app.reserve_bytes,
                    notifications: app.held.notifications,
                    notifications_max: app.quota.held.notifications,
                    bytes: app.held.bytes,
                    bytes_max: app.quota.held.bytes,
                    devices: app.held.devices,
                    devices_max: app.quota.held.devices,
                })
                .collect(),
            apps_left_out: status.apps.len().saturating_sub(APPS_MAX),
            apps_counted: status.counted,
            settings,
        }
    }
}

refusals! {
    StatusRefusals: Unauthenticated, Forbidden, Internal, StoreUnavailable, Draining;
    ReadyRefusals: StoreUnavailable, StoreBusy, Draining;
}

/// See how the server is.
#[utoipa::path(
    get,
    path = "/v1/status",
    tag = "operations",
    operation_id = "get_status",
    responses((status = 200, description = "How it is.", body = StatusReport), StatusRefusals),
)]
pub(super) async fn status(_who: Scoped<Read>, State(backend): State<Backend>) -> Response {
    let handle = &backend.handle;
    answer(
        StatusCode::OK,
        &StatusReport::new(
            &handle.status(),
            handle.callback_figures(),
            (backend.connections)(),
            handle.ready().is_ok(),
            backend.loaded.report(),
        ),
    )
}

/// Whether the process is alive.
///
/// Says only that it answers: for a supervisor that restarts what does not.
#[utoipa::path(
    get,
    path = "/healthz",
    tag = "operations",
    operation_id = "alive",
    security(()),
    responses((status = 200, description = "It is.", body = String, content_type = "text/plain", example = "alive\n")),
)]
pub(super) async fn alive() -> Response {
    plain("text/plain; charset=utf-8", "alive\n")
}

/// Whether the server wants traffic.
///
/// For load balancers: 503 with the reason while it drains, after the store failed, or while the store is behind.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "operations",
    operation_id = "ready",
    security(()),
    responses(
        (status = 200, description = "It does.", body = String, content_type = "text/plain", example = "ready\n"),
        ReadyRefusals,
    ),
)]
pub(super) async fn ready(State(backend): State<Backend>) -> Result<Response, Problem> {
    backend.handle.ready()?;
    Ok(plain("text/plain; charset=utf-8", "ready\n"))
}

/// The metrics, in the Prometheus text format.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "operations",
    operation_id = "metrics",
    security(()),
    responses((status = 200, description = "docs/operations.md lists them.", body = String, content_type = "text/plain")),
)]
pub(super) async fn metrics(State(backend): State<Backend>) -> Response {
    plain(
        "text/plain; version=0.0.4; charset=utf-8",
        (backend.metrics)(),
    )
}

/// This document.
#[utoipa::path(
    get,
    path = "/openapi.json",
    tag = "operations",
    operation_id = "openapi",
    security(()),
    responses((status = 200, description = "OpenAPI 3.1.", body = Object, content_type = "application/json")),
)]
pub(super) async fn openapi(State(backend): State<Backend>) -> Response {
    plain("application/json", backend.document)
}

fn plain(content_type: &'static str, body: impl Into<Body>) -> Response {
    let mut response = Response::new(body.into());
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
