//! The mailboxes that are awake.

use super::event::{Change, CommitFailure, Disk, Effect, Event};
use super::ids::DeviceId;
use super::policy::Policy;
use super::time::{Mono, Now};

/// The mailboxes of one shard.
///
/// Call [`Shard::handle`] for each event and [`Shard::handle_deadlines`] when the moment of
/// [`Shard::next_deadline`] has come (earlier calls change nothing). While [`Shard::has_offers`], ask the store for a
/// place; when it is granted call [`Shard::seal`] and commit what it gives; one frame is outstanding at a time;
/// tell [`Shard::handle_committed`] what became of it. After each call the effects are in the buffer, in order.
pub struct Shard {
    policy: Policy,
}

impl Shard {
    /// An empty shard.
    #[must_use]
    pub fn new(policy: Policy) -> Shard {
        Shard { policy }
    }

    /// Replaces the policy; holds from the next event on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// What the disk can do now.
    pub fn set_disk(&mut self, _disk: Disk, _now: Now, _effects: &mut Vec<Effect>) {}

    /// One event for one mailbox.
    pub fn handle(
        &mut self,
        _device: DeviceId,
        _event: Event,
        _now: Now,
        _effects: &mut Vec<Effect>,
    ) {
    }

    /// The earliest moment at which something is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Mono> {
        None
    }

    /// Does what is due.
    pub fn handle_deadlines(&mut self, _now: Now, _effects: &mut Vec<Effect>) {}

    /// Something waits for a frame, and none is outstanding.
    #[must_use]
    pub fn has_offers(&self) -> bool {
        false
    }

    /// Takes everything offered for one frame. Until [`Shard::handle_committed`], this must not be called again.
    #[must_use]
    pub fn seal(&mut self) -> Vec<Change> {
        Vec::new()
    }

    /// What became of the frame.
    pub fn handle_committed(
        &mut self,
        _result: Result<(), CommitFailure>,
        _now: Now,
        _effects: &mut Vec<Effect>,
    ) {
    }

    /// Mailboxes awake now.
    #[must_use]
    pub fn awake(&self) -> usize {
        0
    }
}
