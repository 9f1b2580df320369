//! What drives the core: shards as tasks, reading threads, answers to publishers, the directory of devices and keys.
//!
//! Transports and front doors see only [`Handle`] and the types of `api`; `main` starts a [`Runtime`].

mod api;
mod audiences;
mod background;
mod backup;
mod cache;
mod callbacks;
mod clock;
mod directory;
mod entropy;
mod erasing;
mod events;
mod expander;
mod handed;
mod handle;
mod hashing;
mod idempotency;
mod lanes;
mod ledger;
mod listings;
mod meters;
mod pings;
mod quota;
mod rate;
mod reading;
mod reserve;
mod seen;
mod settings;
mod shard;
mod start;
mod status;
mod topics;
mod traces;
mod turn;
mod withdraw;

pub use api::{
    AttachRequest, Authenticated, Content, DeviceChange, DeviceChanged, DeviceQuery, DeviceView,
    ExpansionView, Identity, KeyView, LinkSettings, Out, Outlet, PairView, PingAnswer, PingError,
    PingRequest, PingView, Principal, Requested, RevokeCounts, Rotated, RuntimeError, Target,
    TopicsChange, UserView, Waiting, WhoError, WithdrawCounts,
};
pub use backup::{BackupStream, NoBackup};
pub use callbacks::{
    CallbackError, CallbackFigures, CallbackLimits, CallbackView, CallbackWish, Posted,
};
pub use clock::SystemClock;
pub use entropy::SystemEntropy;
pub use events::{EventStream, EventsFrom, EventsOf, Step};
pub use handed::{Begun, HandedPing};
pub use handle::Handle;
pub use hashing::{HashKey, HashKeyError, load_or_create_hash_key, sha256};
pub use quota::{Allowance, AllowanceView, Throttle};
pub use reserve::BodyShare;
pub use settings::{
    AppQuota, DEVICES_PER_LIST, DEVICES_PER_PING, EXPANSION_CHUNK, KEYS_MAX, Limits,
    NAME_MAX_BYTES, Quotas, READING_THREADS_MAX, RuntimeSettings, SECRET_OVERLAP_MAX, SHARDS_MAX,
    TOPIC_MAX_BYTES, TOPICS_PER_DEVICE, TRANSIENT_MS, USER_MAX_BYTES, USERS_PER_PING,
};
pub use start::{Runtime, StartError};
pub use status::{AppUse, DrainSummary, NotReady, Status};
pub use topics::{Patterns, is_topic};
pub use traces::{Origin, Trace};
pub use turn::{Placed, Turn};

// What the answers are made of, for those who know the runtime and not its ports.
pub use crate::delivery::Outcome;
pub use crate::ports::{
    ClockState, DeadLetter, Failing, OutcomeEvent, OutcomeGap, OutcomeOrder, OutcomePage,
    OutcomePosition, OutcomeQuery, OutcomeRecord, OutcomeStats, Page, PairState, Scopes, Seen,
    StoreHealth, StoreStats,
};

/// The value behind a lock. A panic elsewhere while it was held does not spread: each holder leaves the value whole
/// at every step.
fn locked<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Answers somebody who may have gone away meanwhile, which nobody minds.
fn reply<T>(to: tokio::sync::oneshot::Sender<T>, answer: T) {
    let _ = to.send(answer);
}
