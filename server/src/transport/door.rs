//! What links ask of the runtime: the part of its [`Handle`] that they use, as a trait, so that tests can stand in.

use std::future::Future;
use std::sync::Arc;

use crate::delivery::{Acknowledged, DeviceId, PingId, SessionId};
use crate::runtime::{
    AttachRequest, Authenticated, Handle, Identity, LinkSettings, Outlet, RuntimeError, WhoError,
};

/// The runtime, as links see it. Each method is the one of [`Handle`] with the same name.
pub trait Door: Clone + Send + Sync + Unpin + 'static {
    /// Proof that a device is who it says.
    type Proof: Send + 'static;

    /// Limits for links.
    fn link_settings(&self) -> Arc<LinkSettings>;
    /// This moment in Unix milliseconds.
    fn now_ms(&self) -> u64;
    /// A session id that was never used in this run.
    fn next_session(&self) -> SessionId;
    /// Checks who a device is.
    fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> impl Future<Output = Result<Self::Proof, WhoError>> + Send;
    /// Attaches a link to its mailbox; the answer comes through the outlet.
    fn attach(&self, who: Self::Proof, request: AttachRequest, outlet: Arc<dyn Outlet>);
    /// The link is gone; once for each [`Door::attach`].
    fn detach(&self, device: DeviceId, session: SessionId);
    /// The device has these.
    fn acknowledge(&self, device: DeviceId, session: SessionId, what: Acknowledged);
    /// The device will not use this one.
    fn decline(&self, device: DeviceId, session: SessionId, ping: PingId);
    /// Somebody is at the device, or not.
    fn presence(&self, device: DeviceId, session: SessionId, active: bool);
    /// Topics that a device asks to join and to leave by itself; answers all that it is in.
    fn subscribe(
        &self,
        device: DeviceId,
        join: Vec<String>,
        leave: Vec<String>,
    ) -> impl Future<Output = Result<Option<Vec<String>>, RuntimeError>> + Send;
}

impl Door for Handle {
    type Proof = Authenticated;

    fn link_settings(&self) -> Arc<LinkSettings> {
        Handle::link_settings(self)
    }

    fn now_ms(&self) -> u64 {
        Handle::now_ms(self)
    }

    fn next_session(&self) -> SessionId {
        Handle::next_session(self)
    }

    async fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> Result<Authenticated, WhoError> {
        Handle::authenticate(self, device, identity).await
    }

    fn attach(&self, who: Authenticated, request: AttachRequest, outlet: Arc<dyn Outlet>) {
        Handle::attach(self, who, request, outlet);
    }

    fn detach(&self, device: DeviceId, session: SessionId) {
        Handle::detach(self, device, session);
    }

    fn acknowledge(&self, device: DeviceId, session: SessionId, what: Acknowledged) {
        Handle::acknowledge(self, device, session, what);
    }

    fn decline(&self, device: DeviceId, session: SessionId, ping: PingId) {
        Handle::decline(self, device, session, ping);
    }

    fn presence(&self, device: DeviceId, session: SessionId, active: bool) {
        Handle::presence(self, device, session, active);
    }

    async fn subscribe(
        &self,
        device: DeviceId,
        join: Vec<String>,
        leave: Vec<String>,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        Handle::subscribe(self, device, join, leave).await
    }
}
