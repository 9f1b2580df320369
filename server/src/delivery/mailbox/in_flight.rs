//! Sessions and what they have in flight: attach, send, verdicts, detach.

use std::collections::VecDeque;

use smallvec::SmallVec;

use super::{Clearing, Context, Departure, Insert, Known, Mailbox, READ_RETRY, Stage, Wipe};
use crate::delivery::event::{
    Acknowledged, Attach, Body, Closing, Disk, Effect, Notice, Outcome, Refusal, RowKey, RowMeta,
    Verdict,
};
use crate::delivery::ids::{PingId, SessionId, Ticket};
use crate::delivery::notification::Urgency;
use crate::delivery::session::{Clones, InFlight, Session};

impl Mailbox {
    pub(super) fn session_is(&self, session: SessionId) -> bool {
        self.session
            .as_ref()
            .is_some_and(|current| current.id == session)
    }

    pub(super) fn attach(&mut self, attach: Attach, cx: &mut Context<'_>) {
        if self.known == Known::Absent || self.wipe.is_some() {
            return cx.emit(Effect::Refuse {
                session: attach.session,
                why: Refusal::UnknownDevice,
            });
        }
        let mut clones = Clones::default();
        if let Some(current) = self.session.as_mut() {
            if current.instance == attach.instance {
                if attach.attempt <= current.attempt {
                    return cx.emit(Effect::Refuse {
                        session: attach.session,
                        why: Refusal::StaleAttempt,
                    });
                }
            } else {
                if current.clones.refuses(cx.now.mono, cx.policy) {
                    cx.emit(Effect::Noticed(Notice::DuplicateDevice));
                    return cx.emit(Effect::Refuse {
                        session: attach.session,
                        why: Refusal::DuplicateDevice,
                    });
                }
                current.clones.replaced(cx.now.mono);
            }
            clones = current.clones.clone();
            let session = current.id;
            cx.emit(Effect::Close {
                session,
                why: Closing::Replaced,
            });
            self.detach(cx);
        }
        for &(ping, verdict) in &attach.seen {
            let outcome = match verdict {
                Verdict::Acknowledged => Outcome::Acknowledged,
                Verdict::Declined => Outcome::Declined,
            };
            // Most of them ended long ago: a client repeats what may have been lost.
            if let Some(index) = self.position_of(ping) {
                self.end(index, outcome, cx.now.unix_ms, None, cx);
            }
        }
        let session = Session::new(&attach, clones);
        let waiting = self
            .rows
            .iter()
            .filter(|row| row.meta.key.urgency >= session.min_urgency)
            .count();
        cx.emit(Effect::Welcome {
            session: session.id,
            pending: u32::try_from(waiting).unwrap_or(u32::MAX),
            window: session.window,
        });
        self.session = Some(Box::new(session));
        self.tell_withdrawals(cx);
        self.pump(cx);
    }

    /// The session is gone: what it had in flight returns to the queue.
    pub(super) fn detach(&mut self, cx: &mut Context<'_>) {
        self.release(|_| true, cx);
        let Some(session) = self.session.take() else {
            return;
        };
        self.untell();
        for flight in &session.in_flight {
            let Some(index) = self.index_of(flight.order) else {
                continue;
            };
            let row = &mut self.rows[index];
            row.in_flight = false;
            if row.superseded {
                self.end(index, Outcome::Replaced, cx.now.unix_ms, None, cx);
            } else if row.stage == Stage::Transient {
                self.end(index, Outcome::Expired, cx.now.unix_ms, None, cx);
            } else if flight.order > self.summary.sent_up_to {
                self.summary.sent_up_to = flight.order;
                self.touched = true;
            }
        }
        for row in &mut self.rows {
            if row.stage == Stage::Stored {
                row.body = None;
            }
        }
    }

    /// Sends what waits, in order, as far as the window goes.
    pub(super) fn pump(&mut self, cx: &mut Context<'_>) {
        loop {
            let Some(session) = self.session.as_mut().filter(|session| session.has_place()) else {
                return;
            };
            let (cursor, min_urgency, id) = (session.cursor, session.min_urgency, session.id);
            let Some(index) = self.next_to_send(cursor, min_urgency) else {
                return;
            };
            if self.rows[index].meta.expires_ms <= cx.now.unix_ms {
                let at_ms = self.rows[index].meta.expires_ms;
                self.end(index, Outcome::Expired, at_ms, None, cx);
                continue;
            }
            let Some(notification) = self.rows[index].body.clone() else {
                if self.rows[index].stage == Stage::Sealed {
                    // It came back while it is being written: it can be read when that is done.
                    return;
                }
                return self.fetch(index, cx);
            };
            let Some(session) = self.session.as_mut() else {
                return;
            };
            let row = &mut self.rows[index];
            if session.in_flight.capacity() == 0 {
                // Mostly it stays the only one.
                session.in_flight.reserve_exact(1);
            }
            session.seq += 1;
            session.cursor = row.meta.key.order;
            session.in_flight.push_back(InFlight {
                seq: session.seq,
                order: row.meta.key.order,
                sent_at: cx.now.mono,
                expires_at: cx.now.mono_at(row.meta.expires_ms),
                held_until: None,
                held_long: false,
                ended: None,
            });
            let redelivered = row.sent;
            row.sent = true;
            row.in_flight = true;
            if row.stage == Stage::Stored {
                row.body = None;
            }
            cx.emit(Effect::Send {
                session: id,
                seq: session.seq,
                redelivered,
                notification,
            });
        }
    }

    /// The first row behind the cursor that this session may receive and does not have.
    pub(super) fn next_to_send(&self, cursor: u64, min_urgency: Urgency) -> Option<usize> {
        let start = self
            .rows
            .partition_point(|row| row.meta.key.order <= cursor);
        self.rows
            .range(start..)
            .position(|row| row.meta.key.urgency >= min_urgency && !row.in_flight)
            .map(|offset| start + offset)
    }

    /// Asks for the bodies of the next rows, as many as there are places.
    pub(super) fn fetch(&mut self, from: usize, cx: &mut Context<'_>) {
        if self.fetching || self.fetch_again_at.is_some() {
            return;
        }
        let Some(session) = self.session.as_ref() else {
            return;
        };
        let places = usize::from(session.window) - session.in_flight.len();
        let rows: Vec<RowKey> = self
            .rows
            .range(from..)
            .filter(|row| row.meta.key.urgency >= session.min_urgency && !row.in_flight)
            .take(places)
            .filter(|row| row.body.is_none() && row.stage == Stage::Stored)
            .map(|row| row.meta.key)
            .collect();
        self.fetching = true;
        let device = cx.device;
        cx.emit(Effect::Fetch { device, rows });
    }

    pub(super) fn handle_bodies(&mut self, answer: Result<Vec<Body>, ()>, cx: &mut Context<'_>) {
        self.fetching = false;
        let Ok(bodies) = answer else {
            self.fetch_again_at = Some(cx.now.mono + READ_RETRY);
            return;
        };
        if self.session.is_none() {
            return;
        }
        for (key, body) in bodies {
            let Some(index) = self.index_of(key.order) else {
                continue;
            };
            let row = &mut self.rows[index];
            if row.in_flight || row.stage != Stage::Stored {
                continue;
            }
            match body {
                Some(body) => row.body = Some(body),
                None => {
                    cx.emit(Effect::Noticed(Notice::UnreadableBody));
                    self.end(index, Outcome::Evicted, cx.now.unix_ms, None, cx);
                }
            }
        }
        self.pump(cx);
    }

    pub(super) fn acknowledge(&mut self, what: Acknowledged, cx: &mut Context<'_>) {
        match what {
            Acknowledged::UpTo(seq) => {
                let Some(session) = self.session.as_ref() else {
                    return;
                };
                let count = session
                    .in_flight
                    .partition_point(|flight| flight.seq <= seq);
                let orders: SmallVec<[u64; 4]> = session
                    .in_flight
                    .range(..count)
                    .map(|flight| flight.order)
                    .collect();
                let last = session.in_flight.range(..count).next_back();
                if let Some(seq) = last.map(|flight| flight.seq) {
                    self.heard_before(seq, cx);
                }
                for order in orders {
                    match self.index_of(order) {
                        Some(index) => self.verdict(index, Outcome::Acknowledged, cx),
                        None => self.land(order),
                    }
                }
            }
            Acknowledged::Ids(pings) => {
                for ping in pings {
                    self.verdict_by_id(ping, Outcome::Acknowledged, cx);
                }
            }
        }
        self.pump(cx);
    }

    pub(super) fn verdict_by_id(&mut self, ping: PingId, outcome: Outcome, cx: &mut Context<'_>) {
        if let Some(session) = self.session.as_mut() {
            session.land_ended(ping);
        }
        match self.position_of(ping) {
            Some(index) => self.verdict(index, outcome, cx),
            None => cx.emit(Effect::Noticed(Notice::UnknownVerdict)),
        }
    }

    pub(super) fn verdict(&mut self, index: usize, outcome: Outcome, cx: &mut Context<'_>) {
        let order = self.rows[index].meta.key.order;
        let mut late = false;
        if let Some(session) = self.session.as_mut()
            && let Some(flight) = session
                .in_flight
                .iter()
                .find(|flight| flight.order == order)
        {
            let (took, seq) = (cx.now.mono - flight.sent_at, flight.seq);
            session.observe(took);
            late = !session.may_defer(cx.policy);
            self.heard_before(seq, cx);
        }
        if self.rows[index].stage == Stage::Held {
            cx.emit(Effect::Noticed(Notice::DeferralWon));
        }
        self.end(index, outcome, cx.now.unix_ms, None, cx);
        if late && cx.disk == Disk::Open {
            // This device is slower than it was: what waits for moments goes to the disk.
            self.release(|flight| !flight.is_patient(), cx);
        }
    }

    /// The row at `index` has its outcome.
    pub(super) fn end(
        &mut self,
        index: usize,
        outcome: Outcome,
        at_ms: u64,
        revoker: Option<Ticket>,
        cx: &mut Context<'_>,
    ) {
        let Some(row) = self.rows.remove(index) else {
            return;
        };
        if self.rows.is_empty() {
            // An idle mailbox keeps no buffer.
            self.rows = VecDeque::new();
        }
        match outcome {
            Outcome::Acknowledged | Outcome::Declined => self.land(row.meta.key.order),
            Outcome::Replaced
            | Outcome::Expired
            | Outcome::Evicted
            | Outcome::Revoked
            | Outcome::Refused
            | Outcome::Forwarded => {
                if let Some(session) = self.session.as_mut() {
                    session.end(row.meta.key.order, row.meta.ping);
                }
            }
        }
        let mut departure = Departure {
            meta: row.meta,
            insert: Insert::Never,
            outcome,
            at_ms,
            tickets: row.tickets,
            revokers: revoker.into_iter().collect(),
            late: Vec::new(),
            sent: row.sent,
            because: None,
        };
        match row.stage {
            // The device may show it, and must hear that it was taken back: that is safe before anybody else hears of it.
            Stage::Transient if departure.may_be_shown() => self.departures.push(departure),
            Stage::Transient => self.announce(departure, false, cx),
            Stage::Held | Stage::Offered => {
                self.unsealed.remove(departure.meta.size);
                if row.stage == Stage::Held {
                    self.held -= 1;
                }
                let mut rides = row.rides;
                self.take_predecessors(&departure.meta, &mut rides);
                if rides.iter().any(|ride| ride.insert != Insert::Never)
                    || self.predecessor_leaves(&departure.meta)
                    || departure.may_be_shown()
                    || (outcome == Outcome::Revoked && self.clearing.is_some())
                {
                    // The removals that it caused must be safe before anybody hears of it, and whoever takes the device over must
                    // not find what was taken from it.
                    self.departures.extend(rides);
                    self.departures.push(departure);
                } else {
                    self.announce(departure, false, cx);
                    for ride in rides {
                        self.announce(ride, false, cx);
                    }
                }
            }
            Stage::Sealed => {
                self.sealed_rows -= 1;
                self.leaving.add(departure.meta.size);
                departure.insert = Insert::Outstanding;
                self.departures.push(departure);
            }
            Stage::Stored => {
                self.leaving.add(departure.meta.size);
                departure.insert = Insert::Done;
                self.departures.push(departure);
            }
        }
    }

    /// What rides with a row in flight that this one superseded: its own end justifies those removals too, and a crash must
    /// not bring them back after it.
    fn take_predecessors(&mut self, meta: &RowMeta, rides: &mut Vec<Departure>) {
        let Some(key) = &meta.collapse else { return };
        for row in &mut self.rows {
            if row.superseded && row.meta.collapse.as_ref() == Some(key) {
                rides.append(&mut row.rides);
            }
        }
    }

    /// Whether one that this one replaced, or the one before it did, is on its way out of the store.
    fn predecessor_leaves(&self, meta: &RowMeta) -> bool {
        let Some(key) = &meta.collapse else {
            return false;
        };
        self.departures.iter().chain(&self.sealed).any(|departure| {
            departure.insert != Insert::Never && departure.meta.collapse.as_ref() == Some(key)
        })
    }

    /// The device has answered: its place is free.
    fn land(&mut self, order: u64) {
        if let Some(session) = self.session.as_mut() {
            session.land(order);
        }
    }

    /// `stored`: a frame with its outcome is safe.
    pub(super) fn announce(&self, departure: Departure, stored: bool, cx: &mut Context<'_>) {
        let device = cx.device;
        cx.emit(Effect::Ended {
            tickets: departure.tickets,
            app: self.summary.app,
            device,
            ping: departure.meta.ping,
            outcome: departure.outcome,
            at_ms: departure.at_ms,
            stored,
        });
        for ticket in departure.revokers {
            cx.emit(Effect::RevokeAnswered {
                ticket,
                revoked: true,
            });
        }
        for ticket in departure.late {
            cx.emit(Effect::RevokeAnswered {
                ticket,
                revoked: false,
            });
        }
    }

    pub(super) fn revoke(&mut self, ticket: Ticket, ping: PingId, cx: &mut Context<'_>) {
        let Some(index) = self.position_of(ping) else {
            // Until its end is safe, the store says that it waits: whoever asks is answered then.
            let rides = self.rows.iter_mut().flat_map(|row| row.rides.iter_mut());
            let mut going = self
                .departures
                .iter_mut()
                .chain(&mut self.sealed)
                .chain(rides);
            return match going.find(|departure| departure.meta.ping == ping) {
                Some(departure) => departure.late.push(ticket),
                None => cx.emit(Effect::RevokeAnswered {
                    ticket,
                    revoked: false,
                }),
            };
        };
        if self.rows[index].sent {
            self.withdraw_now(vec![ping], cx);
        }
        self.end(index, Outcome::Revoked, cx.now.unix_ms, Some(ticket), cx);
        self.pump(cx);
    }

    pub(super) fn wipe(&mut self, ticket: Ticket, cx: &mut Context<'_>) {
        if let Some(wipe) = self.wipe.as_mut() {
            return wipe.tickets.push(ticket);
        }
        if self.known == Known::Absent {
            return cx.emit(Effect::Wiped {
                ticket,
                revoked: 0,
                known: false,
            });
        }
        if let Some(session) = self.session.as_ref().map(|session| session.id) {
            cx.emit(Effect::Close {
                session,
                why: Closing::Revoked,
            });
            self.detach(cx);
        }
        // Nobody is left to take anything off a screen.
        for row in &mut self.rows {
            row.sent = false;
        }
        let revoked = self.revoke_all(cx);
        self.wipe = Some(Box::new(Wipe {
            tickets: vec![ticket],
            revoked,
            sealed: false,
        }));
    }

    pub(super) fn clear(&mut self, ticket: Ticket, cx: &mut Context<'_>) {
        if self.known == Known::Absent || self.wipe.is_some() {
            return cx.emit(Effect::Cleared {
                ticket,
                revoked: 0,
                known: false,
            });
        }
        let sent = self.rows.iter().filter(|row| row.sent);
        let pings: Vec<PingId> = sent.map(|row| row.meta.ping).collect();
        self.withdraw_now(pings, cx);
        let clearing = self.clearing.get_or_insert_with(|| {
            Box::new(Clearing {
                tickets: Vec::new(),
                revoked: 0,
                sealed: false,
            })
        });
        clearing.tickets.push(ticket);
        // One that is being written already says nothing of what is revoked now: all are answered with the next frame.
        clearing.sealed = false;
        let revoked = self.revoke_all(cx);
        if let Some(clearing) = self.clearing.as_mut() {
            clearing.revoked += revoked;
        }
    }

    fn revoke_all(&mut self, cx: &mut Context<'_>) -> u32 {
        let mut revoked = 0;
        while !self.rows.is_empty() {
            self.end(0, Outcome::Revoked, cx.now.unix_ms, None, cx);
            revoked += 1;
        }
        revoked
    }

    pub(super) fn expire(&mut self, rows: &[RowKey], cx: &mut Context<'_>) {
        for key in rows {
            if let Some(index) = self.index_of(key.order)
                && self.rows[index].meta.expires_ms <= cx.now.unix_ms
            {
                let at_ms = self.rows[index].meta.expires_ms;
                self.end(index, Outcome::Expired, at_ms, None, cx);
            }
        }
        self.pump(cx);
    }
}
