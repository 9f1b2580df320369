//! What drives the core: shards as tasks, reading threads, answers to publishers, the directory of devices and keys.
//!
//! Transports and front doors see only [`Handle`] and the types of `api`; `main` starts a [`Runtime`].

mod api;
mod clock;
mod entropy;
mod handle;
mod hashing;
mod settings;
mod start;
mod status;

pub use api::{
    AttachRequest, Authenticated, Content, DeviceView, Identity, KeyView, LinkSettings, Out,
    Outlet, PairView, PingAnswer, PingError, PingRequest, PingView, Principal, Requested,
    RevokeCounts, RuntimeError, Target, WhoError,
};
pub use clock::SystemClock;
pub use entropy::SystemEntropy;
pub use handle::Handle;
pub use hashing::{HashKey, HashKeyError, load_or_create_hash_key, sha256};
pub use settings::{
    DEVICES_PER_PING, KEYS_MAX, Limits, NAME_MAX_BYTES, READING_THREADS_MAX, RuntimeSettings,
    SHARDS_MAX, TRANSIENT_MS, USER_MAX_BYTES, USERS_PER_PING,
};
pub use start::{Runtime, StartError};
pub use status::{DrainSummary, NotReady, Status};
