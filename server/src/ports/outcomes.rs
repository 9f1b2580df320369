//! How notifications ended, as history: what is recorded and what can be asked.

use crate::delivery::{AppId, DeviceId, Outcome, PingId};

/// How one notification for one device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutcomeRecord {
    /// Whose app.
    pub app: AppId,
    /// Which ping.
    pub ping: PingId,
    /// Which device.
    pub device: DeviceId,
    /// How it ended.
    pub outcome: Outcome,
    /// When it ended, Unix milliseconds.
    pub at_ms: u64,
    /// When it was accepted, Unix milliseconds; `None` where that was no longer known.
    pub accepted_ms: Option<u64>,
}

/// Where a record stands in the history. Later records have greater positions, none is ever used twice, and dropping
/// old records changes none. The numbers mean nothing outside the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct OutcomePosition(pub u64);

/// In which order records are listed: that in which they were recorded, which is the order of their times to within a
/// few seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OutcomeOrder {
    /// The latest first.
    #[default]
    NewestFirst,
    /// The earliest first.
    OldestFirst,
}

/// Which records to list.
#[derive(Debug, Clone)]
pub struct OutcomeQuery {
    /// Whose; never another's.
    pub app: AppId,
    /// Only those of these devices, at most [`OutcomeQuery::DEVICES_MAX`]; `None`: of all.
    pub devices: Option<Vec<DeviceId>>,
    /// Only those that ended so.
    pub outcome: Option<Outcome>,
    /// Only those that ended at this time or later, Unix milliseconds.
    pub from_ms: u64,
    /// Only those that ended before this time, Unix milliseconds.
    pub to_ms: u64,
    /// In which order.
    pub order: OutcomeOrder,
    /// The first position to look at, from [`OutcomePage::next`]; `None`: the beginning.
    pub start: Option<OutcomePosition>,
    /// Most records to answer.
    pub limit: usize,
}

impl OutcomeQuery {
    /// Most devices that one query may name.
    pub const DEVICES_MAX: usize = 1_000;
}

/// A page of records. It may hold fewer than asked for, even none, and still have a next one: what a call may look at
/// is limited.
#[derive(Debug, Clone, Default)]
pub struct OutcomePage {
    /// The records.
    pub items: Vec<OutcomeRecord>,
    /// Where the next page starts; `None` at the end. It stays valid while old records are dropped: what was dropped
    /// is left out.
    pub next: Option<OutcomePosition>,
    /// What ended before this time is not told, because it is not kept for longer, Unix milliseconds.
    pub kept_from_ms: u64,
}

/// Figures of the history. Bytes unless the name says otherwise.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OutcomeStats {
    /// Size of all files.
    pub bytes: u64,
    /// Number of segments.
    pub segments: u64,
    /// Records that can be asked for.
    pub records: u64,
    /// Records written in this run.
    pub written: u64,
    /// Records of this run that were not written because the queue was full.
    pub overflowed: u64,
    /// Records of this run that were not written because a write failed.
    pub failed: u64,
    /// Segments dropped by age or size in this run.
    pub segments_dropped: u64,
    /// Records and files that cannot be read.
    pub unreadable: u64,
    /// When the oldest record ended that can be asked for, Unix milliseconds; 0: there is none.
    pub oldest_ms: u64,
}

/// What somebody who follows an app's history meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeEvent {
    /// A notification ended.
    Ended(OutcomeRecord),
    /// Records are missing here, perhaps of this app.
    Gap(OutcomeGap),
}

/// Why records are missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutcomeGap {
    /// They were dropped by age or size before they were asked for.
    Dropped,
    /// They were never written: a crash, a full queue, a failing disk.
    Lost,
    /// They cannot be read any more.
    Unreadable,
    /// The position is not of this store.
    Elsewhere,
}

/// Which outcomes somebody follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutcomeFollow {
    /// Whose; never another's.
    pub app: AppId,
    /// Only those of this ping.
    pub ping: Option<PingId>,
    /// Only those of this device.
    pub device: Option<DeviceId>,
    /// Only those that ended so; none: all.
    pub outcomes: Vec<Outcome>,
    /// The first position that was not seen yet; 0: all that is there.
    pub from: OutcomePosition,
    /// Most events to answer.
    pub limit: usize,
}

impl OutcomeFollow {
    /// All of an app, from here on.
    #[must_use]
    pub fn all(app: AppId, from: OutcomePosition, limit: usize) -> OutcomeFollow {
        OutcomeFollow {
            app,
            ping: None,
            device: None,
            outcomes: Vec::new(),
            from,
            limit,
        }
    }

    /// Whether this one is wanted.
    #[must_use]
    pub fn wants(&self, record: &OutcomeRecord) -> bool {
        record.app == self.app
            && self.ping.is_none_or(|ping| ping == record.ping)
            && self.device.is_none_or(|device| device == record.device)
            && (self.outcomes.is_empty() || self.outcomes.contains(&record.outcome))
    }
}

/// Events in the order in which they were recorded, each with the position behind it.
#[derive(Debug, Clone)]
pub struct OutcomeEvents {
    /// The events.
    pub items: Vec<(OutcomePosition, OutcomeEvent)>,
    /// Where to go on.
    pub next: OutcomePosition,
    /// Whether there is more already.
    pub more: bool,
}

/// Called when outcomes were added to the history.
pub type OutcomeFollower = std::sync::Arc<dyn Fn() + Send + Sync>;
