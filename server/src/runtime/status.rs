//! How the server is: for `GET /v1/status`, health checks and metrics.

use std::sync::Arc;
use std::time::Duration;

use super::api::LinkSettings;
use super::settings::{AppQuota, Limits};
use crate::delivery::{Held, Policy};
use crate::ports::{ClockState, StoreHealth, StoreStats};

/// A look at everything that runs. Plain values; taking one is cheap.
#[derive(Debug, Clone)]
pub struct Status {
    /// The version of this program.
    pub version: &'static str,
    /// The number of this run, raised at each start.
    pub run: u32,
    /// When this run started, Unix milliseconds.
    pub started_ms: u64,
    /// How long it runs.
    pub uptime: Duration,
    /// This moment by our clock, Unix milliseconds.
    pub now_ms: u64,
    /// Shards.
    pub shards: usize,
    /// Devices attached over QUIC.
    pub connected_quic: u64,
    /// Devices attached over WebSocket.
    pub connected_websocket: u64,
    /// Mailboxes in memory.
    pub awake: u64,
    /// What the store says of itself.
    pub store: StoreStats,
    /// Whether the store can promise.
    pub health: StoreHealth,
    /// Pings on their way to audiences.
    pub expansions: u64,
    /// Bytes of bodies in flight.
    pub reserve_bytes: u64,
    /// Notifications in the ledger.
    pub ledger_entries: u64,
    /// Bytes of the ledger.
    pub ledger_bytes: u64,
    /// Idempotency keys remembered.
    pub idempotency_entries: u64,
    /// How our clock stands to the system's.
    pub clock: ClockState,
    /// The server goes down.
    pub draining: bool,
    /// The limits in force.
    pub limits: Limits,
    /// Those of links.
    pub link: Arc<LinkSettings>,
    /// Those of mailboxes.
    pub policy: Arc<Policy>,
    /// What apps may use and do use, by name.
    pub apps: Vec<AppUse>,
    /// What apps hold is counted: false for a while after a start, when it is too low.
    pub counted: bool,
}

impl Status {
    /// Devices attached in all.
    #[must_use]
    pub fn connected(&self) -> u64 {
        self.connected_quic + self.connected_websocket
    }
}

/// What one app may use, and what it does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AppUse {
    /// Its name.
    pub name: String,
    /// What it may use.
    pub quota: AppQuota,
    /// Pings that it may still send now, of those of a day; `None`: as many as it likes.
    pub pings_left: Option<u64>,
    /// Bytes of its bodies in flight.
    pub reserve_bytes: u64,
    /// What waits in its mailboxes, and its devices.
    pub held: Held,
}

/// Why the server does not want traffic now (`/readyz`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotReady {
    /// It goes down.
    #[error("draining")]
    Draining,
    /// A write or sync failed; only a restart helps.
    #[error("the store failed and needs a restart")]
    StoreFailed,
    /// The engine is too far behind the log.
    #[error("the store is behind")]
    StoreBehind,
}

/// What a drain did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DrainSummary {
    /// Sessions that were told to go.
    pub sessions: u64,
    /// Sessions still there when the window ended; their notifications come again.
    pub cut: u64,
    /// Everything accepted was committed. `false` only if the store failed.
    pub committed: bool,
    /// How long it took.
    pub took: Duration,
}
