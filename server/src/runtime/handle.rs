//! The one door to the runtime.

use std::sync::Arc;
use std::time::Duration;

use super::api::{
    AttachRequest, Authenticated, DeviceView, Identity, KeyView, LinkSettings, Outlet, PingAnswer,
    PingError, PingRequest, PingView, Principal, Requested, RevokeCounts, RuntimeError, WhoError,
};
use super::settings::{Limits, RuntimeSettings};
use super::status::{DrainSummary, NotReady, Status};
use crate::delivery::{Acknowledged, AppId, DeviceId, PingId, SessionId};
use crate::ports::{ClockState, Page, Scopes, StoreHealth, StoreStats};

/// A cheap, cloneable handle to everything that runs.
#[derive(Clone)]
pub struct Handle {
    pub(super) _inner: Arc<()>,
}

#[expect(
    clippy::unused_async,
    unused_variables,
    reason = "filled in by the runtime"
)]
impl Handle {
    /// Limits for links.
    #[must_use]
    pub fn link_settings(&self) -> Arc<LinkSettings> {
        Arc::new(LinkSettings::default())
    }

    /// This moment in Unix milliseconds, for `welcome`.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        0
    }

    /// A session id that was never used in this run.
    #[must_use]
    pub fn next_session(&self) -> SessionId {
        SessionId(0)
    }

    /// Whether new work is turned away because the server goes down.
    #[must_use]
    pub fn draining(&self) -> bool {
        false
    }

    /// Whether the server wants traffic (`/readyz`).
    pub fn ready(&self) -> Result<(), NotReady> {
        Err(NotReady::Draining)
    }

    /// A look at everything that runs.
    #[must_use]
    pub fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION"),
            run: 0,
            started_ms: 0,
            uptime: Duration::ZERO,
            now_ms: 0,
            shards: 0,
            connected_quic: 0,
            connected_websocket: 0,
            awake: 0,
            store: StoreStats::default(),
            health: StoreHealth::Open,
            reserve_bytes: 0,
            ledger_entries: 0,
            ledger_bytes: 0,
            idempotency_entries: 0,
            clock: ClockState::Steady,
            draining: false,
            limits: Limits::default(),
        }
    }

    /// Takes the live settings (policy, link, limits) from `settings`; the rest needs a restart.
    pub fn reload(&self, settings: &RuntimeSettings) {}

    /// Goes down in order: not ready, `goaway` to every session spread over the window, a last commit, the store
    /// closed. Pings are still taken for a moment, then refused with `Draining`. Answers when nothing is left to do;
    /// a second call waits for the first.
    pub async fn drain(&self, window: Duration) -> DrainSummary {
        DrainSummary {
            sessions: 0,
            cut: 0,
            committed: true,
            took: Duration::ZERO,
        }
    }

    /// Makes a key with every scope for app `default` if there is no key at all, and answers its text.
    pub async fn ensure_bootstrap_key(&self) -> Result<Option<String>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Checks who a device is.
    pub async fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> Result<Authenticated, WhoError> {
        Err(WhoError::StoreUnavailable)
    }

    /// Attaches a link to its mailbox; the answer comes through the outlet. [`Handle::detach`] must follow once.
    pub fn attach(&self, who: Authenticated, request: AttachRequest, outlet: Arc<dyn Outlet>) {}

    /// The link is gone.
    pub fn detach(&self, device: DeviceId, session: SessionId) {}

    /// The device has these.
    pub fn acknowledge(&self, device: DeviceId, session: SessionId, what: Acknowledged) {}

    /// The device will not use this one.
    pub fn decline(&self, device: DeviceId, session: SessionId, ping: PingId) {}

    /// Somebody is at the device, or not.
    pub fn presence(&self, device: DeviceId, session: SessionId, active: bool) {}

    /// Publishes. Answers when every part is safe or has its outcome.
    pub async fn ping(&self, request: PingRequest) -> Result<PingAnswer, PingError> {
        Err(PingError::Runtime(RuntimeError::StoreUnavailable))
    }

    /// What is known of a ping of this app; `None`: not known, or no longer.
    pub async fn ping_view(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Option<PingView>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Takes a ping back where it has not ended; `None`: not known, or no longer.
    pub async fn revoke_ping(
        &self,
        app: AppId,
        ping: PingId,
    ) -> Result<Option<RevokeCounts>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Registers a device.
    pub async fn create_device(
        &self,
        app: AppId,
        user: &str,
        name: Option<&str>,
    ) -> Result<Requested<DeviceView>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// One device of this app.
    pub async fn device(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<DeviceView>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Devices of this app by id, a page at a time.
    pub async fn devices(
        &self,
        app: AppId,
        user: Option<&str>,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceView, DeviceId>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Revokes a device: cuts its session, empties its mailbox. `false`: not known.
    pub async fn revoke_device(&self, app: AppId, device: DeviceId) -> Result<bool, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Checks an API key (`bw_…`).
    pub async fn authenticate_key(&self, key: &str) -> Result<Principal, WhoError> {
        Err(WhoError::StoreUnavailable)
    }

    /// Makes an API key.
    pub async fn create_key(
        &self,
        app: AppId,
        name: &str,
        scopes: Scopes,
    ) -> Result<Requested<KeyView>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// The API keys of this app.
    pub async fn keys(&self, app: AppId) -> Result<Vec<KeyView>, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }

    /// Revokes an API key. `false`: not known.
    pub async fn revoke_key(&self, app: AppId, id: &str) -> Result<bool, RuntimeError> {
        Err(RuntimeError::StoreUnavailable)
    }
}
