//! What a mailbox knows of its session: the window, what is in flight, how quickly it acknowledges.
//!
//! The link's own states (hello, deadlines, keep-alive) are in the protocol crate; here is only what decides about
//! notifications.

use std::collections::VecDeque;
use std::time::Duration;

use super::event::Attach;
use super::ids::{PingId, SessionId};
use super::notification::Urgency;
use super::policy::{AUDIENCE_DEFER_MAX, Policy};
use super::time::Mono;

/// Held back until it is released, not until a moment.
pub(super) const UNTIL_RELEASED: Mono = Mono(u64::MAX);

/// A notification sent in this session that the device has not answered yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct InFlight {
    /// Its number in this session.
    pub(super) seq: u64,
    /// Its acceptance number in the mailbox.
    pub(super) order: u64,
    /// When it was sent.
    pub(super) sent_at: Mono,
    /// When it expires.
    pub(super) expires_at: Mono,
    /// Its row is held back from the disk until then, or [`UNTIL_RELEASED`].
    pub(super) held_until: Option<Mono>,
    /// It is held back for longer than moments: it goes to the disk with whatever goes there from behind it.
    pub(super) held_long: bool,
    /// It ended otherwise (expired, revoked, turned away), but the device still counts it: its place is free
    /// only when the device has answered.
    pub(super) ended: Option<PingId>,
}

impl InFlight {
    /// Its row is held back until somebody says otherwise.
    pub(super) fn is_patient(&self) -> bool {
        self.held_until == Some(UNTIL_RELEASED)
    }
}

/// One attached connection.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) id: SessionId,
    pub(super) instance: u128,
    pub(super) attempt: u64,
    pub(super) window: u16,
    pub(super) min_urgency: Urgency,
    /// Somebody is at the device. Kept for message rules; decides nothing yet.
    pub(super) active: bool,
    /// Rows up to this order were sent in this session, or passed over because of their urgency.
    pub(super) cursor: u64,
    /// The last number given.
    pub(super) seq: u64,
    pub(super) in_flight: VecDeque<InFlight>,
    /// Smoothed acknowledgement time, microseconds; 0 before the first.
    smoothed_us: u32,
    /// Quick acknowledgements in a row, up to the policy's `defer_after`.
    quick: u8,
    pub(super) clones: Clones,
}

/// How often instances replaced one another, to stop two clones of one installation from doing so for ever.
#[derive(Debug, Clone, Default)]
pub(super) struct Clones {
    /// When, at most `replacements` of them, oldest first.
    replaced_at: VecDeque<Mono>,
    /// Until when other instances are refused.
    refuse_until: Option<Mono>,
}

impl Clones {
    /// Whether a newcomer with another instance is refused now.
    pub(super) fn refuses(&mut self, now: Mono, policy: &Policy) -> bool {
        if let Some(until) = self.refuse_until {
            if now < until {
                return true;
            }
            self.refuse_until = None;
            self.replaced_at.clear();
        }
        while self
            .replaced_at
            .front()
            .is_some_and(|&at| now - at >= policy.replacement_span)
        {
            self.replaced_at.pop_front();
        }
        if self.replaced_at.len() >= usize::from(policy.replacements) {
            self.refuse_until = Some(now + policy.replacement_span);
            return true;
        }
        false
    }

    /// A newcomer with another instance took over.
    pub(super) fn replaced(&mut self, now: Mono) {
        self.replaced_at.push_back(now);
    }
}

impl Session {
    pub(super) fn new(attach: &Attach, clones: Clones) -> Session {
        Session {
            id: attach.session,
            instance: attach.instance,
            attempt: attach.attempt,
            window: attach.window.max(1),
            min_urgency: attach.min_urgency,
            active: true,
            cursor: 0,
            seq: 0,
            in_flight: VecDeque::new(),
            smoothed_us: 0,
            quick: 0,
            clones,
        }
    }

    pub(super) fn has_place(&self) -> bool {
        self.in_flight.len() < usize::from(self.window)
    }

    /// How long the rows of this session are held back; `None`: not at all.
    pub(super) fn defers_for(&self, policy: &Policy) -> Option<Duration> {
        (!policy.defer_max.is_zero() && self.quick >= policy.defer_after)
            .then(|| Duration::from_micros(2 * u64::from(self.smoothed_us)).min(policy.defer_max))
    }

    /// Whether its device may be expected to acknowledge within [`AUDIENCE_DEFER_MAX`]: it usually does, and nothing that it has
    /// waits for longer.
    pub(super) fn is_prompt(&self, now: Mono, policy: &Policy) -> bool {
        let smoothed = Duration::from_micros(u64::from(self.smoothed_us));
        !policy.defer_max.is_zero()
            && smoothed < AUDIENCE_DEFER_MAX
            && self
                .in_flight
                .front()
                .is_none_or(|oldest| now - oldest.sent_at < AUDIENCE_DEFER_MAX)
    }

    /// Takes a measured acknowledgement time. Answers whether it was quick.
    pub(super) fn observe(&mut self, took: Duration, policy: &Policy) -> bool {
        let sample = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
        self.smoothed_us = match self.smoothed_us {
            0 => sample.max(1),
            // RFC 6298 section 2 weighs a new sample one eighth.
            known => known - known / 8 + sample / 8,
        };
        let quick = took < policy.defer_max / 2;
        self.quick = if quick {
            self.quick.saturating_add(1).min(policy.defer_after)
        } else {
            0
        };
        quick
    }

    /// Takes one out of flight, by its order.
    pub(super) fn land(&mut self, order: u64) -> Option<InFlight> {
        let at = self
            .in_flight
            .iter()
            .position(|flight| flight.order == order)?;
        let landed = self.in_flight.remove(at);
        if self.in_flight.is_empty() {
            // An idle session keeps no buffer.
            self.in_flight = VecDeque::new();
        }
        landed
    }

    /// One in flight ended without the device's word: it keeps its place until that comes.
    pub(super) fn end(&mut self, order: u64, ping: PingId) {
        if let Some(flight) = self
            .in_flight
            .iter_mut()
            .find(|flight| flight.order == order)
        {
            flight.ended = Some(ping);
            flight.held_until = None;
            flight.expires_at = Mono(u64::MAX);
        }
    }

    /// The device's word on one that had ended before.
    pub(super) fn land_ended(&mut self, ping: PingId) {
        let order = self
            .in_flight
            .iter()
            .find(|flight| flight.ended == Some(ping))
            .map(|flight| flight.order);
        if let Some(order) = order {
            self.land(order);
        }
    }

    /// The earliest moment at which something in flight is due.
    pub(super) fn next_deadline(&self, policy: &Policy) -> Option<Mono> {
        let oldest = self
            .in_flight
            .front()
            .map(|flight| flight.sent_at + policy.ack_timeout);
        let due = self.in_flight.iter().map(|flight| match flight.held_until {
            Some(until) => until.min(flight.expires_at),
            None => flight.expires_at,
        });
        due.chain(oldest).min()
    }
}
