//! One device's undelivered notifications, and every decision about them.
//!
//! # Knowing only what is needed
//!
//! A mailbox is in memory only while something happens to it. It wakes knowing nothing, reads its [`Summary`] and
//! whatever the event at hand needs (the row of a ping, of a collapse key, the rows that rank lowest), and from then on
//! everything that changes goes through it, so what it knows stays true until it sleeps. [`Known`] says how much that is; an
//! attached device's mailbox knows every row. [`Mailbox::missing`] is the one place that decides what to read;
//! while a read is under way, events wait in order.
//!
//! # A row's life
//!
//! | [`Stage`] | meaning | next |
//! | --- | --- | --- |
//! | transient | TTL 0: in flight, never stored | gone |
//! | held | in flight; the acknowledgement is given a chance to beat the disk | offered, or gone without a trace |
//! | offered | waits for a frame; still ours to withdraw | sealed, or gone without a trace |
//! | sealed | in the frame that is being written | stored |
//! | stored | safe; promised | gone, by a removal in a later frame |
//!
//! A row that goes becomes a [`Departure`]: it carries the outcome until that may be announced. What an acceptance
//! pushes out (collapse, eviction) *rides* with the newcomer's row and is sealed in the same frame, so that neither can
//! be on disk without the other; if a verdict takes the newcomer out first, the riders go into a frame alone and the
//! newcomer's outcome waits for it, because otherwise a collapsed row could come back after its successor.
//!
//! # Invariants
//!
//! - Every ticket is answered once; every accepted notification ends once ([`Effect::Ended`]).
//! - Nothing is sent past its expiry, nor twice in one session, nor out of order.
//! - At most `window` are in flight, and what is in flight is never evicted.
//! - `summary` is the state of the store after the last sealed frame; `unsealed` and `leaving` are the difference to now.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::event::{
    Acknowledged, Attach, Change, Closing, CommitFailure, Disk, Effect, Enqueue, Event, Lowest,
    MailboxRead, MailboxView, Notice, Outcome, Refusal, Rejection, RowKey, RowMeta, Summary,
    Verdict,
};
use super::ids::{DeviceId, PingId, SessionId, Ticket};
use super::notification::{CollapseKey, Notification};
use super::policy::{OverflowRule, Policy};
use super::session::{InFlight, Session};
use super::time::{Mono, Now};

/// How long a failed read waits before it is tried again.
const READ_RETRY: Duration = Duration::from_secs(1);

/// How long a row in flight waits for its acknowledgement while the disk is full, before its publisher is told so.
/// Long enough for a device on a slow network, short enough for an HTTP client's patience.
const FULL_DISK_PATIENCE: Duration = Duration::from_secs(5);

/// What surrounds an event.
pub(super) struct Context<'a> {
    pub(super) device: DeviceId,
    pub(super) policy: &'a Policy,
    pub(super) disk: Disk,
    pub(super) now: Now,
    pub(super) effects: &'a mut Vec<Effect>,
}

impl Context<'_> {
    fn emit(&mut self, effect: Effect) {
        self.effects.push(effect);
    }

    fn reject(&mut self, ticket: Ticket, ping: PingId, why: Rejection) {
        let device = self.device;
        self.emit(Effect::Rejected {
            ticket,
            device,
            ping,
            why,
        });
    }

    fn accept(&mut self, tickets: &mut Vec<Ticket>, ping: PingId) {
        let device = self.device;
        for ticket in tickets.drain(..) {
            self.emit(Effect::Accepted {
                ticket,
                device,
                ping,
            });
        }
    }
}

/// How much of itself a mailbox knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// It has just woken.
    Nothing,
    /// Its summary and some rows.
    Some,
    /// Its summary and every row.
    All,
    /// That the device does not exist.
    Absent,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Transient,
    Held,
    Offered,
    Sealed,
    Stored,
}

#[derive(Debug)]
struct Row {
    meta: RowMeta,
    stage: Stage,
    /// Kept while the disk may still need it, or while it is about to be sent.
    body: Option<Arc<Notification>>,
    /// Who waits for acceptance.
    tickets: Vec<Ticket>,
    /// It may have been sent before.
    sent: bool,
    in_flight: bool,
    /// A newer one with its collapse key waits behind it: in flight, so it may still win its verdict.
    superseded: bool,
    /// What its acceptance pushed out.
    rides: Vec<Departure>,
}

/// Whether the row of a departure ever reached the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Insert {
    /// It was withdrawn in time.
    Never,
    /// It is in the frame that is being written.
    Outstanding,
    /// Yes: a removal is needed.
    Done,
}

/// A row that is gone from the mailbox and whose outcome is not announced yet.
#[derive(Debug)]
struct Departure {
    meta: RowMeta,
    insert: Insert,
    outcome: Outcome,
    at_ms: u64,
    tickets: Vec<Ticket>,
    revokers: Vec<Ticket>,
    /// The order of the row whose acceptance pushed this one out, once both are sealed.
    because: Option<u64>,
}

/// A number of rows and their content bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Load {
    count: u32,
    bytes: u64,
}

impl Load {
    fn add(&mut self, size: u32) {
        self.count += 1;
        self.bytes += u64::from(size);
    }

    fn remove(&mut self, size: u32) {
        // Saturating, because the figures on disk may have been damaged; a wrong count must not stop the house.
        self.count = self.count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(size));
    }
}

#[derive(Debug)]
struct Wipe {
    tickets: Vec<Ticket>,
    revoked: u32,
    sealed: bool,
}

/// What was read for the event at hand, so that nothing is asked twice.
#[derive(Debug, Clone, Copy, Default)]
struct Asked {
    ping: bool,
    collapse: bool,
    lowest: bool,
    rows: bool,
}

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Mailbox {
    known: Known,
    reading: bool,
    fetching: bool,
    /// The summary must be written although no row changes.
    touched: bool,
    asked: Asked,
    summary: Summary,
    rows: VecDeque<Row>,
    session: Option<Box<Session>>,
    unsealed: Load,
    held: u32,
    sealed_rows: u32,
    /// Stored rows whose removal is not sealed yet.
    leaving: Load,
    departures: Vec<Departure>,
    sealed: Vec<Departure>,
    backlog: VecDeque<Event>,
    /// Orders that went while a read was under way: the read may still show them.
    gone: Vec<u64>,
    /// When a failed read is tried again.
    read_again_at: Option<Mono>,
    /// When failed bodies are asked for again.
    fetch_again_at: Option<Mono>,
    wipe: Option<Box<Wipe>>,
    /// On the shard's list of those that want a frame.
    pub(super) listed: bool,
    /// The deadline under which the shard has it.
    pub(super) deadline: Option<Mono>,
}

impl Mailbox {
    pub(super) fn new() -> Mailbox {
        Mailbox {
            known: Known::Nothing,
            reading: false,
            fetching: false,
            touched: false,
            asked: Asked::default(),
            summary: Summary {
                app: super::ids::AppId(0),
                count: 0,
                bytes: 0,
                next_order: 1,
                sent_up_to: 0,
            },
            rows: VecDeque::new(),
            session: None,
            unsealed: Load::default(),
            held: 0,
            sealed_rows: 0,
            leaving: Load::default(),
            departures: Vec::new(),
            sealed: Vec::new(),
            backlog: VecDeque::new(),
            gone: Vec::new(),
            read_again_at: None,
            fetch_again_at: None,
            wipe: None,
            listed: false,
            deadline: None,
        }
    }

    /// Nothing would be lost by forgetting it.
    pub(super) fn may_sleep(&self) -> bool {
        self.session.is_none()
            && self.unsealed.count == 0
            && self.sealed_rows == 0
            && self.departures.is_empty()
            && self.sealed.is_empty()
            && !self.reading
            && self.backlog.is_empty()
            && !self.touched
            && self.wipe.is_none()
    }

    /// Something waits for a frame.
    pub(super) fn has_offers(&self) -> bool {
        self.unsealed.count > self.held
            || !self.departures.is_empty()
            || self.touched
            || self.wipe.as_ref().is_some_and(|wipe| !wipe.sealed)
    }

    pub(super) fn next_deadline(&self, policy: &Policy) -> Option<Mono> {
        let session = self
            .session
            .as_ref()
            .and_then(|session| session.next_deadline(policy));
        session
            .into_iter()
            .chain(self.read_again_at)
            .chain(self.fetch_again_at)
            .min()
    }

    // ---- Events --------------------------------------------------------------------------------------------------

    pub(super) fn handle(&mut self, event: Event, cx: &mut Context<'_>) {
        match event {
            Event::Read(answer) => {
                self.handle_read(answer, cx);
                self.work_off(cx);
            }
            Event::Bodies(answer) => self.handle_bodies(answer, cx),
            other @ (Event::Enqueue(_)
            | Event::Attach(_)
            | Event::Detach { .. }
            | Event::Acknowledge { .. }
            | Event::Decline { .. }
            | Event::Presence { .. }
            | Event::Revoke { .. }
            | Event::Wipe { .. }
            | Event::Expire { .. }) => {
                self.backlog.push_back(other);
                self.work_off(cx);
            }
        }
    }

    /// Handles what waits, in order, until something must be read first.
    fn work_off(&mut self, cx: &mut Context<'_>) {
        while !self.reading && self.read_again_at.is_none() {
            let Some(event) = self.backlog.pop_front() else {
                break;
            };
            if let Some(request) = self.missing(&event, cx) {
                self.reading = true;
                self.backlog.push_front(event);
                cx.emit(Effect::Read(request));
                return;
            }
            self.apply(event, cx);
            self.asked = Asked::default();
        }
        if self.backlog.is_empty() && self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
        }
    }

    fn apply(&mut self, event: Event, cx: &mut Context<'_>) {
        match event {
            Event::Enqueue(enqueue) => self.enqueue(enqueue, cx),
            Event::Attach(attach) => self.attach(attach, cx),
            Event::Detach { session } => {
                if self.session_is(session) {
                    self.detach(cx);
                }
            }
            Event::Acknowledge { session, what } => {
                if self.session_is(session) {
                    self.acknowledge(what, cx);
                }
            }
            Event::Decline { session, ping } => {
                if self.session_is(session) {
                    self.verdict_by_id(ping, Outcome::Declined, cx);
                    self.pump(cx);
                }
            }
            Event::Presence { session, active } => {
                if let Some(current) = self
                    .session
                    .as_mut()
                    .filter(|current| current.id == session)
                {
                    current.active = active;
                }
            }
            Event::Revoke { ticket, ping } => self.revoke(ticket, ping, cx),
            Event::Wipe { ticket } => self.wipe(ticket, cx),
            Event::Expire { rows } => self.expire(&rows, cx),
            Event::Read(_) | Event::Bodies(_) => {
                debug_assert!(false, "answers are handled on arrival")
            }
        }
    }

    /// What must be read before `event` can be decided.
    fn missing(&mut self, event: &Event, cx: &Context<'_>) -> Option<MailboxRead> {
        let nothing = MailboxRead {
            device: cx.device,
            all: false,
            ping: None,
            collapse: None,
            lowest: None,
            rows: Vec::new(),
        };
        if matches!(self.known, Known::All | Known::Absent) {
            return None;
        }
        match event {
            Event::Enqueue(enqueue) => self.missing_to_enqueue(enqueue, nothing, cx),
            Event::Attach(_) | Event::Wipe { .. } => Some(MailboxRead {
                all: true,
                ..nothing
            }),
            Event::Revoke { ping, .. } => {
                let unknown = !self.asked.ping && self.position_of(*ping).is_none();
                self.asked.ping = true;
                unknown.then(|| MailboxRead {
                    ping: Some(*ping),
                    ..nothing
                })
            }
            Event::Expire { rows } => {
                let unknown =
                    !self.asked.rows && rows.iter().any(|row| self.index_of(row.order).is_none());
                self.asked.rows = true;
                (unknown || self.known == Known::Nothing).then(|| MailboxRead {
                    rows: rows.clone(),
                    ..nothing
                })
            }
            // Without a session, and there is none before every row is known, these change nothing.
            Event::Detach { .. }
            | Event::Acknowledge { .. }
            | Event::Decline { .. }
            | Event::Presence { .. }
            | Event::Read(_)
            | Event::Bodies(_) => None,
        }
    }

    fn missing_to_enqueue(
        &mut self,
        enqueue: &Enqueue,
        nothing: MailboxRead,
        cx: &Context<'_>,
    ) -> Option<MailboxRead> {
        let notification = &enqueue.notification;
        if cx.disk == Disk::Failed || self.wipe.is_some() {
            return None;
        }
        let mut request = nothing;
        let ping = notification.ping;
        if enqueue.may_repeat && !self.asked.ping && self.position_of(ping).is_none() {
            self.asked.ping = true;
            request.ping = Some(ping);
        }
        if let Some(key) = &notification.collapse
            && !notification.transient
            && !self.asked.collapse
            && self.position_of_key(key).is_none()
        {
            self.asked.collapse = true;
            request.collapse = Some(key.clone());
        }
        if self.known == Known::Nothing || request.ping.is_some() || request.collapse.is_some() {
            return Some(request);
        }
        if notification.transient || cx.policy.overflow == OverflowRule::Refuse {
            return None;
        }
        // A mailbox that would overflow needs to know who ranks lowest.
        let replaced = notification
            .collapse
            .as_ref()
            .and_then(|key| self.position_of_key(key));
        let over = self.overflow(notification, replaced, cx.policy)?;
        if self.victims(notification, replaced, over).is_some() {
            return None;
        }
        if self.asked.lowest {
            return Some(MailboxRead {
                all: true,
                ..request
            });
        }
        self.asked.lowest = true;
        // The store still shows rows that are on their way out or known already: ask for that many more.
        let known = self.rows.len() + self.departures.len() + self.sealed.len();
        let more = u32::try_from(known)
            .unwrap_or(u32::MAX)
            .saturating_add(self.leaving.count);
        request.lowest = Some(Lowest {
            count: over.count.saturating_add(more),
            bytes: over.bytes,
        });
        Some(request)
    }

    // ---- Enqueue -------------------------------------------------------------------------------------------------

    fn enqueue(&mut self, enqueue: Enqueue, cx: &mut Context<'_>) {
        let Enqueue {
            ticket,
            notification,
            may_repeat,
        } = enqueue;
        let ping = notification.ping;
        if cx.disk == Disk::Failed {
            return cx.reject(ticket, ping, Rejection::StoreFailed);
        }
        if self.known == Known::Absent
            || self.wipe.is_some()
            || notification.app != self.summary.app
        {
            return cx.reject(ticket, ping, Rejection::UnknownDevice);
        }
        if may_repeat && self.join(ticket, ping, cx) {
            return;
        }
        if notification.expires_ms <= cx.now.unix_ms {
            return self.end_at_once(
                ticket,
                &notification,
                Outcome::Expired,
                notification.expires_ms,
                cx,
            );
        }
        if notification.transient {
            return self.enqueue_transient(ticket, notification, cx);
        }
        let replaced = notification
            .collapse
            .as_ref()
            .and_then(|key| self.position_of_key(key));
        let victims = match self.overflow(&notification, replaced, cx.policy) {
            None => Vec::new(),
            Some(_) if cx.policy.overflow == OverflowRule::Refuse => {
                return cx.reject(ticket, ping, Rejection::MailboxFull);
            }
            Some(over) => match self.victims(&notification, replaced, over) {
                Some(victims) => victims,
                None => {
                    return self.end_at_once(
                        ticket,
                        &notification,
                        Outcome::Refused,
                        cx.now.unix_ms,
                        cx,
                    );
                }
            },
        };
        if cx.disk == Disk::Full && !self.could_send(&notification) {
            return cx.reject(ticket, ping, Rejection::NoRoom);
        }

        let mut rides = Vec::new();
        for order in victims {
            self.ride(order, Outcome::Evicted, &mut rides, cx);
        }
        if let Some(old) = replaced {
            if self.rows[old.index].in_flight {
                self.rows[old.index].superseded = true;
            } else {
                self.ride(old.order, Outcome::Replaced, &mut rides, cx);
            }
        }

        let order = self.summary.next_order;
        self.summary.next_order += 1;
        let meta = RowMeta {
            key: RowKey {
                urgency: notification.urgency,
                order,
            },
            ping,
            size: notification.size,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.clone(),
            run: cx.policy.run,
            shared: notification.shared,
        };
        self.unsealed.add(meta.size);
        self.rows.push_back(Row {
            meta,
            stage: Stage::Offered,
            body: Some(notification),
            tickets: vec![ticket],
            sent: false,
            in_flight: false,
            superseded: false,
            rides,
        });
        self.pump(cx);
        self.hold_back(order, cx);
    }

    /// TTL 0: sent now or never.
    fn enqueue_transient(
        &mut self,
        ticket: Ticket,
        notification: Arc<Notification>,
        cx: &mut Context<'_>,
    ) {
        if !self.could_send(&notification) {
            return self.end_at_once(ticket, &notification, Outcome::Expired, cx.now.unix_ms, cx);
        }
        let order = self.summary.next_order;
        self.summary.next_order += 1;
        let meta = RowMeta {
            key: RowKey {
                urgency: notification.urgency,
                order,
            },
            ping: notification.ping,
            size: notification.size,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.clone(),
            run: cx.policy.run,
            shared: notification.shared,
        };
        let mut tickets = vec![ticket];
        cx.accept(&mut tickets, notification.ping);
        self.rows.push_back(Row {
            meta,
            stage: Stage::Transient,
            body: Some(notification),
            tickets,
            sent: false,
            in_flight: false,
            superseded: false,
            rides: Vec::new(),
        });
        self.pump(cx);
    }

    /// An id that waits already changes nothing and takes that row's answer. Answers whether there was one.
    fn join(&mut self, ticket: Ticket, ping: PingId, cx: &mut Context<'_>) -> bool {
        if let Some(index) = self.position_of(ping) {
            let row = &mut self.rows[index];
            match row.stage {
                Stage::Held | Stage::Offered | Stage::Sealed => row.tickets.push(ticket),
                Stage::Transient | Stage::Stored => cx.accept(&mut vec![ticket], ping),
            }
            return true;
        }
        let rides = self.rows.iter_mut().flat_map(|row| row.rides.iter_mut());
        let leaving = self
            .departures
            .iter_mut()
            .chain(self.sealed.iter_mut())
            .chain(rides);
        for departure in leaving {
            if departure.meta.ping == ping {
                departure.tickets.push(ticket);
                return true;
            }
        }
        false
    }

    /// It is accepted and has its outcome in the same moment; nothing is kept.
    #[expect(clippy::unused_self, reason = "reads as what happens to this mailbox")]
    fn end_at_once(
        &self,
        ticket: Ticket,
        notification: &Notification,
        outcome: Outcome,
        at_ms: u64,
        cx: &mut Context<'_>,
    ) {
        let (app, ping, device) = (notification.app, notification.ping, cx.device);
        cx.emit(Effect::Ended {
            tickets: vec![ticket],
            app,
            device,
            ping,
            outcome,
            at_ms,
            stored: false,
        });
    }

    /// What the mailbox would hold too much with the newcomer in it; `None`: it fits.
    fn overflow(
        &self,
        newcomer: &Notification,
        replaced: Option<Found>,
        policy: &Policy,
    ) -> Option<Load> {
        let mut count = self
            .summary
            .count
            .saturating_add(self.unsealed.count)
            .saturating_sub(self.leaving.count);
        let mut bytes = self
            .summary
            .bytes
            .saturating_add(self.unsealed.bytes)
            .saturating_sub(self.leaving.bytes);
        if let Some(old) = replaced.filter(|old| !self.rows[old.index].in_flight) {
            count = count.saturating_sub(1);
            bytes = bytes.saturating_sub(u64::from(self.rows[old.index].meta.size));
        }
        let over = Load {
            count: (count + 1).saturating_sub(policy.mailbox_notifications),
            bytes: (bytes + u64::from(newcomer.size)).saturating_sub(policy.mailbox_bytes),
        };
        (over != Load::default()).then_some(over)
    }

    /// The rows that make room: lowest urgency first, oldest first within it, none more urgent than the newcomer,
    /// none in flight. `None`: the known rows do not suffice.
    fn victims(
        &self,
        newcomer: &Notification,
        replaced: Option<Found>,
        over: Load,
    ) -> Option<Vec<u64>> {
        let mut candidates: Vec<(RowKey, u32)> = self
            .rows
            .iter()
            .filter(|row| !row.in_flight && row.stage != Stage::Transient)
            .filter(|row| row.meta.key.urgency <= newcomer.urgency)
            .filter(|row| replaced.is_none_or(|old| old.order != row.meta.key.order))
            .map(|row| (row.meta.key, row.meta.size))
            .collect();
        if self.known != Known::All && !self.asked.lowest {
            // Rows that rank lower may exist unseen.
            return None;
        }
        candidates.sort_unstable_by_key(|&(key, _)| key);
        let mut freed = Load::default();
        let mut orders = Vec::new();
        for (key, size) in candidates {
            if freed.count >= over.count && freed.bytes >= over.bytes {
                break;
            }
            freed.add(size);
            orders.push(key.order);
        }
        (freed.count >= over.count && freed.bytes >= over.bytes).then_some(orders)
    }

    /// Takes a row out and lets it ride with a newcomer.
    fn ride(&mut self, order: u64, outcome: Outcome, rides: &mut Vec<Departure>, cx: &Context<'_>) {
        let Some(mut row) = self
            .index_of(order)
            .and_then(|index| self.rows.remove(index))
        else {
            return;
        };
        let insert = match row.stage {
            Stage::Stored => Insert::Done,
            Stage::Sealed => Insert::Outstanding,
            Stage::Held | Stage::Offered | Stage::Transient => Insert::Never,
        };
        match insert {
            Insert::Never => {
                self.unsealed.remove(row.meta.size);
                rides.append(&mut row.rides);
            }
            Insert::Outstanding | Insert::Done => self.leaving.add(row.meta.size),
        }
        if row.stage == Stage::Sealed {
            self.sealed_rows -= 1;
        }
        rides.push(Departure {
            meta: row.meta,
            insert,
            outcome,
            at_ms: cx.now.unix_ms,
            tickets: row.tickets,
            revokers: Vec::new(),
            because: None,
        });
    }

    /// Whether a newcomer would be sent at once.
    fn could_send(&self, newcomer: &Notification) -> bool {
        self.session.as_ref().is_some_and(|session| {
            session.has_place()
                && newcomer.urgency >= session.min_urgency
                && self
                    .next_to_send(session.cursor, session.min_urgency)
                    .is_none()
        })
    }

    /// Gives the acknowledgement of a row just sent a chance to beat the disk.
    fn hold_back(&mut self, order: u64, cx: &mut Context<'_>) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let patience = match (cx.disk, session.defers_for(cx.policy)) {
            (Disk::Full, _) => FULL_DISK_PATIENCE,
            (_, Some(patience)) => patience,
            (_, None) => return,
        };
        let Some(flight) = session
            .in_flight
            .back_mut()
            .filter(|flight| flight.order == order)
        else {
            return;
        };
        let Some(row) = self
            .rows
            .back_mut()
            .filter(|row| row.meta.key.order == order)
        else {
            return;
        };
        flight.held_until = Some(cx.now.mono + patience);
        row.stage = Stage::Held;
        self.held += 1;
        cx.emit(Effect::Noticed(Notice::Deferred));
    }

    /// Ends the holding back of every row for which `due` says so.
    fn release(&mut self, due: impl Fn(&InFlight) -> bool, cx: &mut Context<'_>) {
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let mut orders = Vec::new();
        for flight in &mut session.in_flight {
            if flight.held_until.is_some() && due(flight) {
                flight.held_until = None;
                orders.push(flight.order);
            }
        }
        for order in orders {
            self.offer_held(order, cx);
        }
    }

    fn offer_held(&mut self, order: u64, cx: &mut Context<'_>) {
        let Some(index) = self
            .index_of(order)
            .filter(|&index| self.rows[index].stage == Stage::Held)
        else {
            return;
        };
        self.held -= 1;
        self.rows[index].stage = Stage::Offered;
        match cx.disk {
            Disk::Open => {}
            Disk::Full => self.turn_away(index, Rejection::NoRoom, cx),
            Disk::Failed => self.turn_away(index, Rejection::StoreFailed, cx),
        }
    }

    /// An unsealed row that can no longer be promised: its publisher is told, what it pushed out comes back.
    fn turn_away(&mut self, index: usize, why: Rejection, cx: &mut Context<'_>) {
        let Some(row) = self.rows.remove(index) else {
            return;
        };
        debug_assert!(matches!(row.stage, Stage::Offered | Stage::Held));
        self.unsealed.remove(row.meta.size);
        if row.stage == Stage::Held {
            self.held -= 1;
        }
        if let Some(session) = self.session.as_mut() {
            session.land(row.meta.key.order);
        }
        for ticket in row.tickets {
            cx.reject(ticket, row.meta.ping, why);
        }
        for ride in row.rides {
            self.bring_back(ride, why, cx);
        }
        self.superseded_no_more(row.meta.collapse.as_ref());
    }

    /// Undoes a departure whose cause did not happen.
    fn bring_back(&mut self, departure: Departure, why: Rejection, cx: &mut Context<'_>) {
        let stage = match departure.insert {
            Insert::Done => Stage::Stored,
            Insert::Outstanding => Stage::Sealed,
            Insert::Never => {
                for ticket in departure.tickets {
                    cx.reject(ticket, departure.meta.ping, why);
                }
                return;
            }
        };
        self.leaving.remove(departure.meta.size);
        if stage == Stage::Sealed {
            self.sealed_rows += 1;
        }
        let order = departure.meta.key.order;
        let sent = departure.meta.run != cx.policy.run || order <= self.summary.sent_up_to;
        let row = Row {
            meta: departure.meta,
            stage,
            body: None,
            tickets: departure.tickets,
            sent,
            in_flight: false,
            superseded: false,
            rides: Vec::new(),
        };
        self.rows.insert(
            self.rows.partition_point(|row| row.meta.key.order < order),
            row,
        );
        if let Some(session) = self.session.as_mut() {
            // Never sent in this session, or it would have been in flight: let the cursor meet it again. What lies
            // between is in flight or was passed over, and neither is sent twice.
            session.cursor = session.cursor.min(order - 1);
        }
    }

    /// The successor of a row in flight was turned away.
    fn superseded_no_more(&mut self, key: Option<&CollapseKey>) {
        let Some(key) = key else { return };
        if self.position_of_key(key).is_none()
            && let Some(row) = self
                .rows
                .iter_mut()
                .rev()
                .find(|row| row.meta.collapse.as_ref() == Some(key))
        {
            row.superseded = false;
        }
    }

    // ---- Sessions ------------------------------------------------------------------------------------------------

    fn session_is(&self, session: SessionId) -> bool {
        self.session
            .as_ref()
            .is_some_and(|current| current.id == session)
    }

    fn attach(&mut self, attach: Attach, cx: &mut Context<'_>) {
        if self.known == Known::Absent || self.wipe.is_some() {
            return cx.emit(Effect::Refuse {
                session: attach.session,
                why: Refusal::UnknownDevice,
            });
        }
        let mut clones = super::session::Clones::default();
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
        self.pump(cx);
    }

    /// The session is gone: what it had in flight returns to the queue.
    fn detach(&mut self, cx: &mut Context<'_>) {
        self.release(|_| true, cx);
        let Some(session) = self.session.take() else {
            return;
        };
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
    fn pump(&mut self, cx: &mut Context<'_>) {
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
                return self.fetch(index, cx);
            };
            let Some(session) = self.session.as_mut() else {
                return;
            };
            let row = &mut self.rows[index];
            session.seq += 1;
            session.cursor = row.meta.key.order;
            session.in_flight.push_back(InFlight {
                seq: session.seq,
                order: row.meta.key.order,
                sent_at: cx.now.mono,
                expires_at: cx.now.mono_at(row.meta.expires_ms),
                held_until: None,
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
    fn next_to_send(
        &self,
        cursor: u64,
        min_urgency: super::notification::Urgency,
    ) -> Option<usize> {
        let start = self
            .rows
            .partition_point(|row| row.meta.key.order <= cursor);
        self.rows
            .range(start..)
            .position(|row| row.meta.key.urgency >= min_urgency && !row.in_flight)
            .map(|offset| start + offset)
    }

    /// Asks for the bodies of the next rows, as many as there are places.
    fn fetch(&mut self, from: usize, cx: &mut Context<'_>) {
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
            .filter(|row| row.body.is_none())
            .map(|row| row.meta.key)
            .collect();
        self.fetching = true;
        let device = cx.device;
        cx.emit(Effect::Fetch { device, rows });
    }

    fn handle_bodies(
        &mut self,
        answer: Result<Vec<(RowKey, Option<Arc<Notification>>)>, ()>,
        cx: &mut Context<'_>,
    ) {
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

    // ---- Verdicts ------------------------------------------------------------------------------------------------

    fn acknowledge(&mut self, what: Acknowledged, cx: &mut Context<'_>) {
        match what {
            Acknowledged::UpTo(seq) => {
                let Some(session) = self.session.as_ref() else {
                    return;
                };
                let count = session
                    .in_flight
                    .partition_point(|flight| flight.seq <= seq);
                let orders: Vec<u64> = session
                    .in_flight
                    .range(..count)
                    .map(|flight| flight.order)
                    .collect();
                for order in orders {
                    if let Some(index) = self.index_of(order) {
                        self.verdict(index, Outcome::Acknowledged, cx);
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

    fn verdict_by_id(&mut self, ping: PingId, outcome: Outcome, cx: &mut Context<'_>) {
        match self.position_of(ping) {
            Some(index) => self.verdict(index, outcome, cx),
            None => cx.emit(Effect::Noticed(Notice::UnknownVerdict)),
        }
    }

    fn verdict(&mut self, index: usize, outcome: Outcome, cx: &mut Context<'_>) {
        let order = self.rows[index].meta.key.order;
        let mut late = false;
        if let Some(session) = self.session.as_mut()
            && let Some(flight) = session
                .in_flight
                .iter()
                .find(|flight| flight.order == order)
        {
            let took = cx.now.mono - flight.sent_at;
            late = !session.observe(took, cx.policy);
        }
        if self.rows[index].stage == Stage::Held {
            cx.emit(Effect::Noticed(Notice::DeferralWon));
        }
        self.end(index, outcome, cx.now.unix_ms, None, cx);
        if late && cx.disk == Disk::Open {
            // This device is slower than it was: what waits for it goes to the disk.
            self.release(|_| true, cx);
        }
    }

    /// The row at `index` has its outcome.
    fn end(
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
        if let Some(session) = self.session.as_mut() {
            session.land(row.meta.key.order);
        }
        let mut departure = Departure {
            meta: row.meta,
            insert: Insert::Never,
            outcome,
            at_ms,
            tickets: row.tickets,
            revokers: revoker.into_iter().collect(),
            because: None,
        };
        match row.stage {
            Stage::Transient => self.announce(departure, cx),
            Stage::Held | Stage::Offered => {
                self.unsealed.remove(departure.meta.size);
                if row.stage == Stage::Held {
                    self.held -= 1;
                }
                if row.rides.iter().any(|ride| ride.insert != Insert::Never) {
                    // The removals that it caused must be safe before anybody hears of it.
                    self.departures.extend(row.rides);
                    self.departures.push(departure);
                } else {
                    self.announce(departure, cx);
                    for ride in row.rides {
                        self.announce(ride, cx);
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

    fn announce(&self, departure: Departure, cx: &mut Context<'_>) {
        let device = cx.device;
        cx.emit(Effect::Ended {
            tickets: departure.tickets,
            app: self.summary.app,
            device,
            ping: departure.meta.ping,
            outcome: departure.outcome,
            at_ms: departure.at_ms,
            stored: departure.insert == Insert::Done,
        });
        for ticket in departure.revokers {
            cx.emit(Effect::RevokeAnswered {
                ticket,
                revoked: true,
            });
        }
    }

    fn revoke(&mut self, ticket: Ticket, ping: PingId, cx: &mut Context<'_>) {
        let Some(index) = self.position_of(ping) else {
            return cx.emit(Effect::RevokeAnswered {
                ticket,
                revoked: false,
            });
        };
        if self.rows[index].sent
            && let Some(session) = self.session.as_ref().map(|session| session.id)
        {
            cx.emit(Effect::Withdraw {
                session,
                pings: vec![ping],
            });
        }
        self.end(index, Outcome::Revoked, cx.now.unix_ms, Some(ticket), cx);
        self.pump(cx);
    }

    fn wipe(&mut self, ticket: Ticket, cx: &mut Context<'_>) {
        if let Some(wipe) = self.wipe.as_mut() {
            return wipe.tickets.push(ticket);
        }
        if self.known == Known::Absent {
            return cx.emit(Effect::Wiped { ticket, revoked: 0 });
        }
        if let Some(session) = self.session.as_ref().map(|session| session.id) {
            cx.emit(Effect::Close {
                session,
                why: Closing::Revoked,
            });
            self.detach(cx);
        }
        let mut revoked = 0;
        while !self.rows.is_empty() {
            self.end(0, Outcome::Revoked, cx.now.unix_ms, None, cx);
            revoked += 1;
        }
        self.wipe = Some(Box::new(Wipe {
            tickets: vec![ticket],
            revoked,
            sealed: false,
        }));
    }

    fn expire(&mut self, rows: &[RowKey], cx: &mut Context<'_>) {
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

    // ---- Time ----------------------------------------------------------------------------------------------------

    /// Does what is due; too early changes nothing.
    pub(super) fn handle_deadline(&mut self, cx: &mut Context<'_>) {
        let now = cx.now;
        if self.read_again_at.is_some_and(|at| at <= now.mono) {
            self.read_again_at = None;
            self.work_off(cx);
        }
        if self.fetch_again_at.is_some_and(|at| at <= now.mono) {
            self.fetch_again_at = None;
        }
        self.release(
            |flight| flight.held_until.is_some_and(|until| until <= now.mono),
            cx,
        );
        if let Some(session) = self.session.as_ref() {
            let expired: Vec<u64> = session
                .in_flight
                .iter()
                .filter(|flight| flight.expires_at <= now.mono)
                .map(|f| f.order)
                .collect();
            for order in expired {
                if let Some(index) = self.index_of(order) {
                    let at_ms = self.rows[index].meta.expires_ms;
                    self.end(index, Outcome::Expired, at_ms, None, cx);
                }
            }
        }
        let timeout = cx.policy.ack_timeout;
        if let Some(session) = self.session.as_ref()
            && session
                .in_flight
                .front()
                .is_some_and(|flight| flight.sent_at + timeout <= now.mono)
        {
            let session = session.id;
            cx.emit(Effect::Close {
                session,
                why: Closing::AckTimeout,
            });
            self.detach(cx);
        }
        self.pump(cx);
    }

    // ---- The store's answers -------------------------------------------------------------------------------------

    fn handle_read(&mut self, answer: Result<Box<MailboxView>, ()>, cx: &mut Context<'_>) {
        self.reading = false;
        let gone = std::mem::take(&mut self.gone);
        match answer {
            Ok(view) => self.merge(*view, &gone, cx),
            Err(()) => self.read_failed(cx),
        }
    }

    fn merge(&mut self, view: MailboxView, gone: &[u64], cx: &mut Context<'_>) {
        let Some(summary) = view.summary else {
            self.known = Known::Absent;
            return;
        };
        if self.known == Known::Nothing {
            self.summary = summary;
            self.known = Known::Some;
        }
        for meta in view.rows {
            let order = meta.key.order;
            if self.index_of(order).is_some() || gone.contains(&order) || self.is_leaving(order) {
                continue;
            }
            let sent = meta.run != cx.policy.run || order <= self.summary.sent_up_to;
            let row = Row {
                meta,
                stage: Stage::Stored,
                body: None,
                tickets: Vec::new(),
                sent,
                in_flight: false,
                superseded: false,
                rides: Vec::new(),
            };
            self.rows.insert(
                self.rows.partition_point(|row| row.meta.key.order < order),
                row,
            );
            self.summary.next_order = self.summary.next_order.max(order + 1);
        }
        if view.complete {
            self.known = Known::All;
            self.repair(cx);
        }
    }

    /// A crash may have left a row in flight beside its successor: the successor wins.
    fn repair(&mut self, cx: &mut Context<'_>) {
        let mut index = self.rows.len();
        while index > 0 {
            index -= 1;
            let Some(key) = self.rows[index].meta.collapse.clone() else {
                continue;
            };
            let newer = self
                .rows
                .range(index + 1..)
                .any(|row| row.meta.collapse.as_ref() == Some(&key));
            if newer {
                cx.emit(Effect::Noticed(Notice::CollapseRepaired));
                self.end(index, Outcome::Replaced, cx.now.unix_ms, None, cx);
            }
        }
    }

    /// Those who can be told are told; the rest is tried again.
    fn read_failed(&mut self, cx: &mut Context<'_>) {
        self.asked = Asked::default();
        for event in std::mem::take(&mut self.backlog) {
            match event {
                Event::Enqueue(enqueue) => {
                    cx.reject(
                        enqueue.ticket,
                        enqueue.notification.ping,
                        Rejection::StoreFailed,
                    );
                }
                Event::Attach(attach) => {
                    cx.emit(Effect::Refuse {
                        session: attach.session,
                        why: Refusal::StoreFailed,
                    });
                }
                Event::Revoke { .. } | Event::Wipe { .. } => {
                    self.backlog.push_back(event);
                    self.read_again_at = Some(cx.now.mono + READ_RETRY);
                }
                // The sweep comes back to them.
                Event::Expire { .. } => {}
                // These speak of sessions, and there is none before every row is known.
                Event::Detach { .. }
                | Event::Acknowledge { .. }
                | Event::Decline { .. }
                | Event::Presence { .. }
                | Event::Read(_)
                | Event::Bodies(_) => {}
            }
        }
    }

    // ---- Frames --------------------------------------------------------------------------------------------------

    /// Hands over what is offered.
    pub(super) fn seal(&mut self, device: DeviceId, run: u32, changes: &mut Vec<Change>) {
        let before = changes.len();
        let mut left = self.unsealed.count;
        for row in self.rows.iter_mut().rev() {
            if left == 0 {
                break;
            }
            if row.stage == Stage::Held {
                left -= 1;
            }
            if row.stage != Stage::Offered {
                continue;
            }
            left -= 1;
            let Some(body) = &row.body else {
                debug_assert!(false, "an unsealed row keeps its body");
                continue;
            };
            let order = row.meta.key.order;
            changes.push(Change::Insert {
                device,
                order,
                run,
                notification: Arc::clone(body),
            });
            row.stage = Stage::Sealed;
            self.sealed_rows += 1;
            self.unsealed.remove(row.meta.size);
            self.summary.count = self.summary.count.saturating_add(1);
            self.summary.bytes = self.summary.bytes.saturating_add(u64::from(row.meta.size));
            self.departures
                .extend(row.rides.drain(..).map(|ride| Departure {
                    because: Some(order),
                    ..ride
                }));
        }
        // Inserts were met newest first; the log tells them in order.
        changes[before..].reverse();
        for departure in self.departures.drain(..) {
            debug_assert!(
                departure.insert != Insert::Outstanding,
                "one frame is outstanding at a time"
            );
            if departure.insert == Insert::Done {
                let size = departure.meta.size;
                self.leaving.remove(size);
                self.summary.count = self.summary.count.saturating_sub(1);
                self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(size));
                changes.push(Change::Remove {
                    device,
                    row: departure.meta.clone(),
                    outcome: departure.outcome,
                    at_ms: departure.at_ms,
                });
            }
            self.sealed.push(departure);
        }
        self.touched = false;
        if let Some(wipe) = self.wipe.as_mut() {
            wipe.sealed = true;
            changes.push(Change::Forget { device });
        } else {
            changes.push(Change::Summary {
                device,
                summary: self.summary,
            });
        }
    }

    /// What became of the frame.
    pub(super) fn handle_committed(
        &mut self,
        result: Result<(), CommitFailure>,
        cx: &mut Context<'_>,
    ) {
        match result {
            Ok(()) => self.committed(cx),
            Err(failure) => self.not_committed(failure, cx),
        }
        self.pump(cx);
    }

    fn committed(&mut self, cx: &mut Context<'_>) {
        let mut left = self.sealed_rows;
        self.sealed_rows = 0;
        for row in self.rows.iter_mut().rev() {
            for ride in &mut row.rides {
                if ride.insert == Insert::Outstanding {
                    ride.insert = Insert::Done;
                    cx.accept(&mut ride.tickets, ride.meta.ping);
                }
            }
            if row.stage == Stage::Sealed {
                row.stage = Stage::Stored;
                row.body = None;
                cx.accept(&mut row.tickets, row.meta.ping);
                left = left.saturating_sub(1);
            }
            if left == 0 && self.unsealed.count == 0 {
                break;
            }
        }
        for departure in &mut self.departures {
            if departure.insert == Insert::Outstanding {
                departure.insert = Insert::Done;
                cx.accept(&mut departure.tickets, departure.meta.ping);
            }
        }
        for departure in std::mem::take(&mut self.sealed) {
            if self.reading {
                self.gone.push(departure.meta.key.order);
            }
            self.announce(departure, cx);
        }
        if self.wipe.as_ref().is_some_and(|wipe| wipe.sealed)
            && let Some(wipe) = self.wipe.take()
        {
            self.known = Known::Absent;
            for ticket in wipe.tickets {
                cx.emit(Effect::Wiped {
                    ticket,
                    revoked: wipe.revoked,
                });
            }
        }
    }

    fn not_committed(&mut self, failure: CommitFailure, cx: &mut Context<'_>) {
        let why = match failure {
            CommitFailure::NoRoom => Rejection::NoRoom,
            CommitFailure::Failed => Rejection::StoreFailed,
        };
        if let Some(wipe) = self.wipe.as_mut() {
            wipe.sealed = false;
        }
        // Removals that stand alone are offered again; those that an insert caused did not happen, like the insert.
        for departure in std::mem::take(&mut self.sealed) {
            if departure.insert == Insert::Done {
                let size = departure.meta.size;
                self.leaving.add(size);
                self.summary.count = self.summary.count.saturating_add(1);
                self.summary.bytes = self.summary.bytes.saturating_add(u64::from(size));
            }
            if departure.because.is_some() {
                self.bring_back(departure, why, cx);
            } else {
                self.departures.push(departure);
            }
        }
        self.sealed_rows = 0;
        let mut lost = Vec::new();
        for row in &mut self.rows {
            if row.stage == Stage::Sealed {
                row.stage = Stage::Offered;
                self.unsealed.add(row.meta.size);
                self.summary.count = self.summary.count.saturating_sub(1);
                self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(row.meta.size));
                lost.push(row.meta.key.order);
            }
        }
        for order in lost {
            if let Some(index) = self.index_of(order) {
                self.turn_away(index, why, cx);
            }
        }
        // Rows that ended, or were pushed out, while their insert was being written: it never was.
        let mut ended = Vec::new();
        let mut index = 0;
        while index < self.departures.len() {
            if self.departures[index].insert == Insert::Outstanding {
                let mut departure = self.departures.remove(index);
                departure.insert = Insert::Never;
                ended.push(departure);
            } else {
                index += 1;
            }
        }
        for row in &mut self.rows {
            for ride in &mut row.rides {
                if ride.insert == Insert::Outstanding {
                    ride.insert = Insert::Never;
                    self.leaving.remove(ride.meta.size);
                    self.summary.count = self.summary.count.saturating_sub(1);
                    self.summary.bytes =
                        self.summary.bytes.saturating_sub(u64::from(ride.meta.size));
                }
            }
        }
        for departure in ended {
            let size = departure.meta.size;
            self.leaving.remove(size);
            self.summary.count = self.summary.count.saturating_sub(1);
            self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(size));
            self.announce(departure, cx);
        }
        if failure == CommitFailure::Failed {
            self.store_failed(cx);
        }
    }

    /// The store promises nothing any more: whoever waits for it is told.
    pub(super) fn store_failed(&mut self, cx: &mut Context<'_>) {
        self.release(|_| true, cx);
        let offered: Vec<u64> = self
            .rows
            .iter()
            .filter(|row| row.stage == Stage::Offered)
            .map(|row| row.meta.key.order)
            .collect();
        for order in offered {
            if let Some(index) = self.index_of(order) {
                self.turn_away(index, Rejection::StoreFailed, cx);
            }
        }
    }

    // ---- Looking things up ---------------------------------------------------------------------------------------

    fn index_of(&self, order: u64) -> Option<usize> {
        self.rows
            .binary_search_by_key(&order, |row| row.meta.key.order)
            .ok()
    }

    fn position_of(&self, ping: PingId) -> Option<usize> {
        // The oldest are the likeliest to be spoken of.
        self.rows.iter().position(|row| row.meta.ping == ping)
    }

    /// The newest row with this key that has no successor.
    fn position_of_key(&self, key: &CollapseKey) -> Option<Found> {
        let index = self.rows.iter().rposition(|row| {
            row.meta.collapse.as_ref() == Some(key)
                && !row.superseded
                && row.stage != Stage::Transient
        })?;
        Some(Found {
            index,
            order: self.rows[index].meta.key.order,
        })
    }

    fn is_leaving(&self, order: u64) -> bool {
        let rides = self.rows.iter().flat_map(|row| row.rides.iter());
        self.departures
            .iter()
            .chain(&self.sealed)
            .chain(rides)
            .any(|departure| departure.meta.key.order == order)
    }
}

/// A row found: where it stands now, and its lasting number.
#[derive(Debug, Clone, Copy)]
struct Found {
    index: usize,
    order: u64,
}
