//! What the runtime asks of the outside, in our words: a store, a clock, entropy.

mod audience;
mod backup;
mod callbacks;
mod clock;
mod entropy;
mod outcomes;
mod records;
mod store;

pub use audience::{
    Audience, ExpansionProgress, ExpansionRecord, Member, Membership, OpenExpansion, Span, Spans,
    Stamp, TopicChange,
};
pub use backup::{BackupError, BackupProgress, BackupStats, BackupSummary, BackupWatch};
pub use callbacks::{
    CallbackRecord, DeadLetter, Failing, NoOutbound, Outbound, OutboundLine, Post, PostAnswer,
    PostError, Posting, SigningSecret, UrlRefusal,
};
pub use clock::{Clock, ClockState};
pub use entropy::Entropy;
pub use outcomes::{
    OutcomeEvent, OutcomeEvents, OutcomeFollow, OutcomeFollower, OutcomeGap, OutcomeOrder,
    OutcomePage, OutcomePosition, OutcomeQuery, OutcomeRecord, OutcomeStats,
};
pub use records::{
    AppRecord, Carrier, DeviceRecord, Erased, Erasure, IdempotencyRecord, KeyRecord,
    PreviousSecret, Scopes, Seen,
};
pub use store::{
    Batch, Committed, DeviceFilter, ExpiredRow, ExpiryCursor, Grant, Op, Page, PairState,
    ReadError, SourceId, Store, StoreHealth, StoreStats,
};
