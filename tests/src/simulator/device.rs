//! A device: the client's session machine, its window of ids, its app, and a disk that forgets what was not saved.
//!
//! What the real client does in tasks (sessions in `session.rs`, the hand-over to the app in `handover.rs`) is done here in
//! steps; machine, window, back-off and bytes are the real ones.

use std::collections::VecDeque;

use bellwire_client::parts::{Backoff, Given, Memory, Record};
use bellwire_protocol::{ClientSession, FrameReader, Id, Notify};

/// How long a verdict may wait for others before it is saved, as in the client's hand-over.
pub(super) const SAVE_AFTER_MS: u64 = 50;

/// One device.
pub(super) struct Device {
    pub(super) id: Id,
    /// What is on its disk, in order.
    pub(super) disk: Vec<Record>,
    /// Counts processes.
    pub(super) life: u32,
    pub(super) process: Option<Process>,
    /// It was wiped: its client stays away.
    pub(super) gone: bool,
    /// It only wants what is urgent.
    pub(super) picky: bool,
}

/// A verdict that is saved, or was before.
#[derive(Debug, Clone)]
pub(super) struct Decided {
    pub(super) id: Id,
    pub(super) given: Given,
    pub(super) mark: u64,
}

/// What the hand-over does.
pub(super) enum Hand {
    Idle,
    /// The app is called with this one.
    Calling(Id),
    /// Verdicts are written down.
    Saving(Vec<Record>),
}

/// A notification that waits for the app.
pub(super) struct Waiting {
    pub(super) notify: Notify,
    /// On the client's clock.
    pub(super) expires_at_ms: u64,
    /// When it is truly over, on the clock of the run that sent it, microseconds of the simulation.
    pub(super) over_at_us: u64,
}

/// One process of the client.
pub(super) struct Process {
    pub(super) instance: Id,
    pub(super) attempt: u64,
    pub(super) memory: Memory,
    pub(super) backoff: Backoff,
    pub(super) machine: Option<ClientSession>,
    pub(super) conn: Option<u64>,
    pub(super) reader: FrameReader,
    pub(super) hello_mark: u64,
    pub(super) sent_mark: u64,
    pub(super) ping_mark: Option<u64>,
    pub(super) welcomed_at_ms: Option<u64>,
    /// What the session brought, not yet taken by the hand-over.
    pub(super) waiting: VecDeque<Waiting>,
    /// What the hand-over took.
    pub(super) batch: VecDeque<Waiting>,
    pub(super) hand: Hand,
    pub(super) decided: Vec<Decided>,
    pub(super) first_decided_ms: Option<u64>,
    /// Saved verdicts that no session has taken yet.
    pub(super) untold: Vec<Decided>,
    /// It leaves, and does not come back.
    pub(super) leaving: bool,
}

impl Process {
    pub(super) fn new(instance: Id, disk: &[Record], frame_max: usize) -> Process {
        Process {
            instance,
            attempt: 0,
            memory: Memory::from_records(disk.to_vec()),
            backoff: Backoff::default(),
            machine: None,
            conn: None,
            reader: FrameReader::new(frame_max),
            hello_mark: 0,
            sent_mark: 0,
            ping_mark: None,
            welcomed_at_ms: None,
            waiting: VecDeque::new(),
            batch: VecDeque::new(),
            hand: Hand::Idle,
            decided: Vec::new(),
            first_decided_ms: None,
            untold: Vec::new(),
            leaving: false,
        }
    }

    /// Ids that the app has and the disk does not know: those that a kill may bring to the app again.
    pub(super) fn unsaved(&self) -> Vec<Id> {
        let mut ids: Vec<Id> = self
            .memory
            .unsaved()
            .into_iter()
            .filter_map(|record| match record {
                Record::Given(id, _) => Some(id),
                Record::Confirmed => None,
            })
            .collect();
        if let Hand::Calling(id) = &self.hand {
            ids.push(*id);
        }
        ids
    }
}
