//! Topics, their members, and pings on their way to many.

use std::ops::Range;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::delivery::{AppId, DeviceId, Notification};

/// A moment among those at which somebody joined or left an audience, or a ping to one was accepted. Later ones are
/// greater, over restarts as well, and none is ever given twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stamp {
    /// The run that gave it.
    pub run: u32,
    /// Its number in that run, from 1.
    pub count: u64,
}

impl Stamp {
    /// Before every other.
    pub const FIRST: Stamp = Stamp { run: 0, count: 0 };
}

/// A time for which a device was in an audience.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// When it joined.
    pub joined: Stamp,
    /// When it left; `None`: it is a member.
    pub left: Option<Stamp>,
}

impl Span {
    /// Whether the device was a member at `at`.
    #[must_use]
    pub fn holds(&self, at: Stamp) -> bool {
        self.joined < at && self.left.is_none_or(|left| left > at)
    }
}

/// The spans of one device in one audience, the earliest first. Most have one, and it is open.
pub type Spans = SmallVec<[Span; 1]>;

/// That a device is in a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Membership {
    /// The name of the topic.
    pub topic: String,
    /// Since when.
    pub joined: Stamp,
}

/// The topics of a device, as they are from now on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TopicChange {
    /// Whose.
    pub app: AppId,
    /// Which device.
    pub device: DeviceId,
    /// All its topics; none: nothing is kept of it.
    pub topics: Vec<Membership>,
    /// Its places in the lists of topics that change, with all their spans; a place without spans goes.
    pub places: Vec<(String, Spans)>,
}

impl TopicChange {
    /// A device that is in these topics leaves them for good: nothing of it is kept in any.
    #[must_use]
    pub fn leave_all(app: AppId, device: DeviceId, topics: Vec<Membership>) -> TopicChange {
        let places = topics.into_iter().map(|was| (was.topic, Spans::new()));
        TopicChange {
            app,
            device,
            topics: Vec::new(),
            places: places.collect(),
        }
    }
}

/// A device that is, or was, in an audience.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Which device.
    pub device: DeviceId,
    /// When it was.
    pub spans: Spans,
}

/// Whom a ping to many addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Audience {
    /// The members of a topic.
    Topic(String),
    /// Every device of the app.
    Everyone,
    /// So many devices that were named, in chunks of their own ([`Op::PutChunk`](super::Op::PutChunk)) numbered from 0.
    Listed {
        /// Number of chunks.
        chunks: u32,
        /// Number of devices.
        devices: u32,
    },
}

/// A ping that was accepted for an audience and has not reached all of it.
#[derive(Debug, Clone)]
pub struct ExpansionRecord {
    /// When it was accepted. Together with the app this is its name in the store.
    pub stamp: Stamp,
    /// Whom it addresses.
    pub audience: Audience,
    /// About how many devices these are.
    pub estimate: u32,
    /// What each of them gets.
    pub notification: Arc<Notification>,
}

impl ExpansionRecord {
    /// The chunks of its list from this one on; none where it has no list.
    #[must_use]
    pub fn chunks_from(&self, chunk: u32) -> Range<u32> {
        match self.audience {
            Audience::Listed { chunks, .. } => chunk.min(chunks)..chunks,
            Audience::Topic(_) | Audience::Everyone => 0..0,
        }
    }
}

/// How far an expansion has come. Devices are addressed by rising id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ExpansionProgress {
    /// The last device that was done; `None`: nothing was.
    pub done: Option<DeviceId>,
    /// Devices done, those that were refused included.
    pub devices: u32,
    /// Of these, those that are no device of the app (any more).
    pub unknown: u32,
    /// The next chunk of a list.
    pub chunk: u32,
}

/// An expansion that is not done, as it is stored.
#[derive(Debug, Clone)]
pub struct OpenExpansion {
    /// What was accepted.
    pub record: ExpansionRecord,
    /// How far it has come.
    pub progress: ExpansionProgress,
}
