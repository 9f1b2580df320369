//! The core, where decisions live: no async, no clock, no sockets, no disk.
//!
//! A [`Shard`] owns the mailboxes that are awake. It is handed an [`Event`] and the time and answers with
//! [`Effect`]s; twice a frame it is asked what must reach the disk ([`Shard::seal`]) and told what became of it
//! ([`Shard::handle_committed`]). Everything it can decide is in this folder and can be replayed from a script.

mod event;
mod fair;
mod ids;
mod mailbox;
mod notification;
mod policy;
mod session;
mod shard;
mod stock;
mod time;

pub use event::{
    Acknowledged, Attach, Body, Change, Closing, CommitFailure, Disk, Effect, Enqueue, Event,
    Lowest, MailboxRead, MailboxView, Notice, Outcome, Refusal, Rejection, RowKey, RowMeta,
    Summary, Verdict, Withdrawal,
};
pub use fair::FairQueue;
pub use ids::{AppId, DeviceId, IdError, PingId, SessionId, Ticket, Tickets};
pub use mailbox::WITHDRAWALS_MAX;
pub use notification::{CollapseKey, Hold, Notification, Urgency, WireSlot};
pub use policy::{AUDIENCE_DEFER_MAX, OverflowRule, Policy};
pub use shard::Shard;
pub use stock::{DeviceClaim, Held, Quota, Stock, StoredMailbox};
pub use time::{Mono, Now};
