//! What drives the core: shards as tasks, reading threads, answers to publishers, the directory of devices and keys.
//!
//! Transports and front doors see only [`Handle`] and the types of `api`.

mod api;
mod handle;

pub use api::{
    AttachRequest, Authenticated, Content, DeviceView, Identity, KeyView, LinkSettings, Out,
    Outlet, PairView, PingAnswer, PingError, PingRequest, PingView, Principal, Requested,
    RevokeCounts, RuntimeError, Target, WhoError,
};
pub use handle::Handle;
