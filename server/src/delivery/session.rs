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

/// Shortest time for which a row is held back: as long as a busy machine may keep a quick device, or us, from its turn. Who waits
/// for a device that went without a word waits that much longer, once.
const DEFER_MIN: Duration = Duration::from_millis(10);

/// Longest acknowledgement time that counts: a device that was away for minutes and is back must not seem slow for as long. Longer
/// than [`AUDIENCE_DEFER_MAX`], so that one that always takes longer is known to.
const SAMPLE_MAX: Duration = Duration::from_secs(2);

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
    /// By how much acknowledgement times usually differ from that, microseconds.
    varies_us: u32,
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
            varies_us: 0,
            clones,
        }
    }

    pub(super) fn has_place(&self) -> bool {
        self.in_flight.len() < usize::from(self.window)
    }

    /// How long rows of this session are held back, if nothing speaks against it now: until the acknowledgement may be expected,
    /// as RFC 6298 expects one. `None`: not at all, because it would probably come too late, or nobody knows yet.
    fn patience(&self, policy: &Policy) -> Option<Duration> {
        let (smoothed, varies) = (u64::from(self.smoothed_us), u64::from(self.varies_us));
        let usual = Duration::from_micros(smoothed + 2 * varies);
        (self.smoothed_us > 0 && !policy.defer_max.is_zero() && usual <= policy.defer_max).then(
            || {
                Duration::from_micros(smoothed + 4 * varies)
                    .max(DEFER_MIN)
                    .min(policy.defer_max)
            },
        )
    }

    /// Whether acknowledgements may be expected in time.
    pub(super) fn may_defer(&self, policy: &Policy) -> bool {
        self.patience(policy).is_some()
    }

    /// How long a row that is sent now is held back; `None`: not at all. One that is still unanswered after that time shows that
    /// the device is away, or slower than it was.
    pub(super) fn defers_for(&self, now: Mono, policy: &Policy) -> Option<Duration> {
        self.patience(policy).filter(|patience| {
            self.in_flight
                .front()
                .is_none_or(|oldest| now - oldest.sent_at <= *patience)
        })
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

    /// Takes a measured acknowledgement time, as RFC 6298 section 2 takes a round trip.
    pub(super) fn observe(&mut self, took: Duration) {
        let took = took.min(SAMPLE_MAX);
        // At most two million.
        let sample = u32::try_from(took.as_micros()).unwrap_or(u32::MAX).max(1);
        if self.smoothed_us == 0 {
            self.smoothed_us = sample;
            self.varies_us = sample / 2;
        } else {
            let off = self.smoothed_us.abs_diff(sample);
            self.varies_us = self.varies_us - self.varies_us / 4 + off / 4;
            self.smoothed_us = self.smoothed_us - self.smoothed_us / 8 + sample / 8;
        }
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
