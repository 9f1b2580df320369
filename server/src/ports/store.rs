//! The store: what is promised lives here.

use std::ops::Range;
use std::sync::Arc;

use super::audience::{
    Audience, ExpansionProgress, ExpansionRecord, Member, Membership, OpenExpansion, Spans, Stamp,
    TopicChange,
};
use super::backup::{BackupError, BackupStats, BackupSummary, BackupWatch};
use super::callbacks::{CallbackRecord, DeadLetter};
use super::outcomes::{
    OutcomeEvents, OutcomeFollow, OutcomeFollower, OutcomePage, OutcomePosition, OutcomeQuery,
    OutcomeRecord, OutcomeStats,
};
use super::records::{AppRecord, DeviceRecord, Erasure, IdempotencyRecord, KeyRecord, Seen};
use crate::delivery::{
    AppId, Body, Change, CommitFailure, DeviceId, MailboxRead, MailboxView, Outcome, PingId,
    RowKey, StoredMailbox, Withdrawal,
};

/// One thing to write. Values are absolute: applying an operation twice changes nothing.
#[derive(Clone)]
pub enum Op {
    /// What a mailbox decided.
    Mailbox(Change),
    /// An app, new or changed.
    PutApp(AppRecord),
    /// A device record, new or changed. `fresh`: its empty mailbox is made with it.
    PutDevice {
        /// The record.
        record: DeviceRecord,
        /// Make the mailbox as well.
        fresh: bool,
        /// The user it belonged to before, if that changes.
        previous_user: Option<String>,
    },
    /// A device record that goes, and when the device was last seen. Its mailbox was emptied before, or in the same batch
    /// ([`Change::Forget`]).
    DropDevice(DeviceRecord),
    /// When a device was last seen.
    PutSeen(DeviceId, Seen),
    /// When a device became one of its app's, for pings to everyone. Follows the [`Op::PutDevice`] that makes it, in the
    /// same batch.
    PutJoined(AppId, DeviceId, Stamp),
    /// The topics of a device.
    PutTopics(TopicChange),
    /// A ping to an audience that was accepted.
    PutExpansion(ExpansionRecord),
    /// A part of the list that an expansion addresses: devices by rising id. Belongs into the batch that accepts it.
    PutChunk {
        /// Whose.
        app: AppId,
        /// Of which expansion.
        stamp: Stamp,
        /// Its number, from 0.
        number: u32,
        /// The devices.
        devices: Arc<[DeviceId]>,
    },
    /// How far an expansion has come. Chunks before the one that it goes on with are no longer needed.
    PutProgress {
        /// Whose.
        app: AppId,
        /// Which expansion.
        stamp: Stamp,
        /// How far.
        progress: ExpansionProgress,
        /// These chunks go.
        done: Range<u32>,
    },
    /// An expansion that is done or was taken back, with the chunks that it still has.
    DropExpansion {
        /// Whose.
        app: AppId,
        /// Which expansion.
        stamp: Stamp,
        /// The chunks that are left.
        chunks: Range<u32>,
    },
    /// An API key, new or changed.
    PutKey(KeyRecord),
    /// An API key that goes.
    DropKey(AppId, [u8; 10]),
    /// Where the outcomes of an app are posted, new or changed.
    PutCallback(CallbackRecord),
    /// The outcomes of an app are posted nowhere any more. Its dead letters were dropped before.
    DropCallback(AppId),
    /// A batch that could not be posted.
    PutDeadLetter(DeadLetter),
    /// A batch that could not be posted goes.
    DropDeadLetter(AppId, u64),
    /// An idempotency key that was used.
    PutIdempotency(IdempotencyRecord),
    /// That something is erased, for restores of older backups. Belongs into the batch that erases it. That of a
    /// notification comes by itself, with its removal as revoked.
    Erase(Erasure),
    /// A device is to take something off the screen, until it has heard so or the time is over.
    PutWithdrawal {
        /// Whose app.
        app: AppId,
        /// Which device.
        device: DeviceId,
        /// What, and how long it is told.
        withdrawal: Withdrawal,
    },
    /// The device has heard of it, or is gone.
    DropWithdrawal {
        /// Which device.
        device: DeviceId,
        /// What it was told.
        withdrawal: Withdrawal,
    },
    /// The outcome of a notification that was never stored, so that it is known as surely as that of a stored one.
    PutOutcome(OutcomeRecord),
}

/// What one source wants in the next frame; all of it becomes safe together or not at all.
pub type Batch = Vec<Op>;

/// Whether a batch is safe: written and synced in the log.
pub type Committed = Result<(), CommitFailure>;

/// A shard, as the committer knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SourceId(pub usize);

/// What the committer tells a source. Called on the committer's thread: hand it over and return.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grant {
    /// The place that [`Store::want`] asked for is there: [`Store::submit`] now, once, even an empty batch.
    Ready,
    /// What became of the batch submitted last.
    Committed(Committed),
}

/// A read that could not be done. Details go to the log of the operator; the caller can only try later.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The engine could not be read.
    #[error("the store could not be read: {0}")]
    Engine(String),
    /// A record of a newer format than this program knows.
    #[error("the store holds a record of format {0}, newer than this program")]
    Newer(u8),
    /// It is being made ready; the same read succeeds a little later.
    #[error("not ready yet: {0}")]
    NotYet(String),
}

/// A page of a list, and where the next one starts.
#[derive(Debug, Clone)]
pub struct Page<T, C> {
    /// The entries.
    pub items: Vec<T>,
    /// Pass this to get the next page; `None` at the end.
    pub next: Option<C>,
}

/// What is known of one notification of a ping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairState {
    /// It waits in the mailbox.
    Waiting {
        /// When it expires, Unix milliseconds.
        expires_ms: u64,
    },
    /// It ended.
    Ended {
        /// How.
        outcome: Outcome,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
}

/// Which devices to list.
#[derive(Debug, Clone, Default)]
pub struct DeviceFilter {
    /// Only those of this user.
    pub user: Option<String>,
    /// Only the members of this topic.
    pub topic: Option<String>,
}

/// A row past its expiry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpiredRow {
    /// In whose mailbox.
    pub device: DeviceId,
    /// Which row.
    pub key: RowKey,
    /// When it expired, Unix milliseconds.
    pub expires_ms: u64,
}

/// Where a sweep stopped, so that the next one does not walk over what was just removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExpiryCursor(pub Vec<u8>);

/// Whether the store can promise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreHealth {
    /// Yes.
    Open,
    /// Free space is below the reserve: removals only.
    Full {
        /// Free bytes seen.
        free: u64,
        /// The reserve, bytes.
        reserve: u64,
    },
    /// The engine is too far behind the log; new work waits.
    Behind,
    /// A write or sync failed; nothing is promised until a restart.
    Failed(String),
}

/// Figures for status and metrics. Bytes unless the name says otherwise.
#[derive(Debug, Clone, Default)]
pub struct StoreStats {
    /// The engine's name.
    pub engine: &'static str,
    /// The number of this run, raised at each start.
    pub run: u32,
    /// How far the engine may be behind before new work waits.
    pub lag_bytes_max: u64,
    /// The same as a time, milliseconds.
    pub lag_ms_max: u64,
    /// Free space below which new notifications are refused.
    pub reserve_bytes: u64,
    /// Frames written in this run.
    pub frames: u64,
    /// Syncs done in this run.
    pub syncs: u64,
    /// The last frame that is safe.
    pub last_frame: u64,
    /// The last frame that the engine has.
    pub applied_frame: u64,
    /// How far the engine is behind, bytes.
    pub lag_bytes: u64,
    /// How far the engine is behind, milliseconds since the oldest frame not applied.
    pub lag_ms: u64,
    /// Size of all log segments.
    pub log_bytes: u64,
    /// Number of log segments.
    pub log_segments: u64,
    /// Size of the engine's files.
    pub engine_bytes: u64,
    /// Keys and values that lived when the newest snapshot was taken, bytes; 0 before the first.
    pub live_bytes: u64,
    /// Size of the snapshots.
    pub snapshot_bytes: u64,
    /// Times that the engine was built anew while serving, in this run.
    pub rebuilds: u64,
    /// Free bytes on the volume.
    pub free_bytes: u64,
    /// Microseconds that the last syncs took: median and worst of the last 1,024.
    pub sync_us: (u64, u64),
    /// Frame at which the newest verified snapshot starts.
    pub snapshot_frame: u64,
    /// Records that could not be read and were set aside.
    pub set_aside: u64,
    /// Size of everything that was set aside, in this run or an earlier one, and still is there; at most a minute old.
    pub aside_bytes: u64,
    /// Backups that the server makes by itself; `None`: it makes none.
    pub backup: Option<BackupStats>,
    /// The history of outcomes.
    pub outcomes: OutcomeStats,
}

/// Where accepted notifications are kept.
///
/// Reads block and belong on a reading thread; every read is the engine plus the frames that it has not applied yet,
/// so it sees all that was answered as safe. Writes go through the committer:
/// a source [wants](Store::want) a place, gets it, and submits what it has by then. So an operation stays its
/// owner's until the moment a frame is sealed, and one sync serves everybody.
pub trait Store: Send + Sync + 'static {
    /// Registers a source of batches, before any traffic. `grant` is called on the committer's thread.
    fn register(&self, grant: Box<dyn Fn(Grant) + Send + Sync>) -> SourceId;

    /// Asks for a place in the next frame. `true`: granted, submit at once (the committer waits for it). `false`: a
    /// frame is being written; [`Grant::Ready`] follows. Asking again while one is pending changes nothing.
    fn want(&self, source: SourceId) -> bool;

    /// Hands over the batch for a granted place. [`Grant::Committed`] follows, for an empty batch too.
    fn submit(&self, source: SourceId, batch: Batch);

    /// Commits a batch that stands alone, such as a registration. `done` is called on the committer's thread.
    fn commit(&self, batch: Batch, done: Box<dyn FnOnce(Committed) + Send>);

    /// Adds something that nobody waits for to whatever frame is written next; lost if none is.
    fn ride_along(&self, op: Op);

    /// Reads what a mailbox needs to know.
    fn read_mailbox(&self, request: &MailboxRead) -> Result<MailboxView, ReadError>;

    /// Reads bodies. A row that is gone or rotten yields `None`; rotten ones are set aside and reported.
    fn read_bodies(&self, device: DeviceId, rows: &[RowKey]) -> Result<Vec<Body>, ReadError>;

    /// What a device is to take off the screen, the one that is told the shortest first, those of an earlier time
    /// included.
    fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError>;

    /// What is known of a ping, device by device.
    fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError>;

    /// Adds outcomes to the history, and empties `records`. Never waits: they are written a little later, and a crash
    /// or a full queue may lose them.
    fn record_outcomes(&self, records: &mut Vec<OutcomeRecord>);

    /// The history, a page of it: outcomes of stored and of other notifications alike, as far as they are kept.
    fn outcomes(&self, query: &OutcomeQuery) -> Result<OutcomePage, ReadError>;

    /// What the history knows of a ping: its outcomes by device, those after `after`, at most `limit`.
    fn outcomes_of_ping(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Vec<OutcomeRecord>, ReadError>;

    /// Behind the last outcome of the history.
    fn outcomes_end(&self) -> OutcomePosition;

    /// What was added to an app's history from a position on, and where records are missing. One call looks at a limited number.
    fn outcome_events(&self, follow: &OutcomeFollow) -> Result<OutcomeEvents, ReadError>;

    /// Calls `follower` whenever outcomes were added to the history, which happens within some ten milliseconds while
    /// there is one. `None`: nobody follows any more.
    fn follow_outcomes(&self, follower: Option<OutcomeFollower>);

    /// Rows that expired up to `until_ms`, oldest first, from where the last call stopped.
    fn expired(
        &self,
        until_ms: u64,
        after: &ExpiryCursor,
        limit: usize,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError>;

    /// Forgets outcomes and idempotency keys older than `before_ms`, at most `limit` of them, and commits that.
    /// Answers how many it dropped.
    fn drop_receipts(&self, before_ms: u64, limit: usize) -> Result<usize, ReadError>;

    /// One device.
    fn device(&self, id: DeviceId) -> Result<Option<DeviceRecord>, ReadError>;

    /// Devices of an app by id, a page at a time.
    fn devices(
        &self,
        app: AppId,
        filter: &DeviceFilter,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceRecord, DeviceId>, ReadError>;

    /// The ids of a user's devices, at most `limit`.
    fn user_devices(
        &self,
        app: AppId,
        user: &str,
        limit: usize,
    ) -> Result<Vec<DeviceId>, ReadError>;

    /// When each of these devices was last seen, in their order, as far as it was written.
    fn seen(&self, devices: &[DeviceId]) -> Result<Vec<Option<Seen>>, ReadError>;

    /// The topics of a device, in the order of their names.
    fn topics(&self, device: DeviceId) -> Result<Vec<Membership>, ReadError>;

    /// When a device was in each of these topics, in their order.
    fn spans(
        &self,
        app: AppId,
        device: DeviceId,
        topics: &[String],
    ) -> Result<Vec<Spans>, ReadError>;

    /// The members of a topic, or the devices of an app, by id, a page at a time; also those that left, as far as that is
    /// still kept. Not for lists: these are in chunks.
    fn members(
        &self,
        app: AppId,
        audience: &Audience,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError>;

    /// What every mailbox holds, by rising id of the device, a page at a time.
    fn mailboxes(
        &self,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<StoredMailbox, DeviceId>, ReadError>;

    /// Expansions that are not done, a page at a time.
    fn expansions(
        &self,
        after: Option<(AppId, Stamp)>,
        limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError>;

    /// A chunk of a list; empty if it cannot be read (it is set aside then and reported).
    fn chunk(&self, app: AppId, stamp: Stamp, number: u32) -> Result<Vec<DeviceId>, ReadError>;

    /// One API key by its public part.
    fn key(&self, id: [u8; 10]) -> Result<Option<KeyRecord>, ReadError>;

    /// All API keys (a few hundred at most).
    fn keys(&self) -> Result<Vec<KeyRecord>, ReadError>;

    /// Every callback.
    fn callbacks(&self) -> Result<Vec<CallbackRecord>, ReadError>;

    /// The batches of an app that could not be posted, the oldest first, from behind a number on.
    fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError>;

    /// All apps (a few thousand at most).
    fn apps(&self) -> Result<Vec<AppRecord>, ReadError>;

    /// What an idempotency key was used with, if that is still known.
    fn idempotency(
        &self,
        app: AppId,
        key_hash: [u8; 32],
    ) -> Result<Option<IdempotencyRecord>, ReadError>;

    /// Whether it can promise now. Cheap; asked often.
    fn health(&self) -> StoreHealth;

    /// Whether the engine is behind the log by half of what it may be, or more: whoever can wait, does. Cheap; asked often.
    fn crowded(&self) -> bool;

    /// Figures for status and metrics.
    fn stats(&self) -> StoreStats;

    /// Writes a backup of everything that is safe, while serving. It is whole only if this says so. Blocks; one at a
    /// time. `watch` is called after each block.
    fn backup(
        &self,
        out: &mut dyn std::io::Write,
        watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError>;

    /// Commits what was handed over, applies it to the engine, closes files. Blocks. Reads still work, writes fail.
    fn close(&self);
}
