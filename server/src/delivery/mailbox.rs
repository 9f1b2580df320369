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
//! How long a row may be held depends on who waits. A publisher who was promised nothing yet waits for moments. A ping to an
//! audience is safe with its expansion, so its rows wait until they are released ([`Event::Release`]), with one condition:
//! whatever is offered takes those along that are held so before it; else a crash could bring an earlier one again behind
//! a later one.
//!
//! A row that goes becomes a [`Departure`]: it carries the outcome until that may be announced. What an acceptance
//! pushes out (collapse, eviction) *rides* with the newcomer's row and is sealed in the same frame, so that neither can
//! be on disk without the other; if a verdict takes the newcomer out first, the riders go into a frame alone and the
//! newcomer's outcome waits for it, because otherwise a collapsed row could come back after its successor.
//!
//! # What was delivered and is taken back
//!
//! A withdrawal is no row: it has no order, no outcome and no place in the window, and telling it twice does no harm. The
//! store keeps it until the device has shown that it heard, or its time is over; every session is told what is left.
//!
//! # Invariants
//!
//! - Every ticket is answered once; every accepted notification ends once ([`Effect::Ended`]).
//! - Nothing is sent past its expiry, nor twice in one session, nor out of order.
//! - At most `window` are in flight, and what is in flight is never evicted.
//! - `summary` is the state of the store after the last sealed frame; `unsealed` and `leaving` are the difference to now.

mod enqueue;
mod frames;
mod in_flight;
mod time;
mod withdraw;

pub use withdraw::WITHDRAWALS_MAX;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::event::{
    Disk, Effect, Enqueue, Event, Lowest, MailboxRead, Outcome, Rejection, RowMeta, Summary,
    Withdrawal,
};
use super::ids::{AppId, DeviceId, PingId, Ticket, Tickets};
use super::notification::{CollapseKey, Notification};
use super::policy::{OverflowRule, Policy};
use super::session::Session;
use super::stock::{Tally, signed};
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
    pub(super) tally: &'a Tally,
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

    fn accept(&mut self, tickets: &mut Tickets, ping: PingId) {
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
    tickets: Tickets,
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

/// A withdrawal, and whether the session that is attached was told.
#[derive(Debug, Clone, Copy)]
struct Told {
    what: Withdrawal,
    /// The last number of the session when it was told. A verdict on a later one shows that it was heard, because frames
    /// arrive in order.
    after: Option<u64>,
}

/// A row that is gone from the mailbox and whose outcome is not announced yet.
#[derive(Debug)]
struct Departure {
    meta: RowMeta,
    insert: Insert,
    outcome: Outcome,
    at_ms: u64,
    tickets: Tickets,
    revokers: Vec<Ticket>,
    /// Those who wanted it revoked when it had ended already: answered when that is safe.
    late: Vec<Ticket>,
    /// It may have been sent.
    sent: bool,
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

    /// How much more this is: rows, bytes.
    fn beyond(self, other: Load) -> (i64, i64) {
        (
            i64::from(self.count) - i64::from(other.count),
            signed(self.bytes).saturating_sub(signed(other.bytes)),
        )
    }

    fn remove(&mut self, size: u32) {
        // Saturating, because the figures on disk may have been damaged; a wrong count must not stop the house.
        self.count = self.count.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(u64::from(size));
    }
}

/// What is counted of a mailbox in the stock of its app.
#[derive(Debug, Clone, Copy)]
enum Counted {
    /// It is not known yet, or no more.
    Nothing,
    /// It has just been read, with this in it.
    Read(Load),
    /// This.
    All(Load),
}

#[derive(Debug)]
struct Wipe {
    tickets: Vec<Ticket>,
    revoked: u32,
    sealed: bool,
}

/// Everything that waited is on its way out, and the mailbox stays.
#[derive(Debug)]
struct Clearing {
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
    /// It is in the frame that is being written: until that is safe, the store tells what was before.
    outstanding: bool,
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
    /// What the device is to take off the screen, as far as it is known here.
    withdrawals: Vec<Told>,
    /// That is all of it.
    withdrawals_known: bool,
    /// Orders that went while a read was under way: the read may still show them.
    gone: Vec<u64>,
    /// When a failed read is tried again.
    read_again_at: Option<Mono>,
    /// When failed bodies are asked for again.
    fetch_again_at: Option<Mono>,
    wipe: Option<Box<Wipe>>,
    clearing: Option<Box<Clearing>>,
    /// What the shard has counted of it ([`Mailbox::count`]).
    counted: Counted,
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
            outstanding: false,
            asked: Asked::default(),
            summary: Summary {
                app: AppId(0),
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
            withdrawals: Vec::new(),
            withdrawals_known: false,
            gone: Vec::new(),
            read_again_at: None,
            fetch_again_at: None,
            wipe: None,
            clearing: None,
            counted: Counted::Nothing,
            listed: false,
            deadline: None,
        }
    }

    /// Nothing would be lost by forgetting it.
    pub(super) fn may_sleep(&self) -> bool {
        self.session.is_none()
            && self.unsealed.count == 0
            && !self.outstanding
            && self.departures.is_empty()
            && self.sealed.is_empty()
            && !self.reading
            && self.backlog.is_empty()
            && !self.touched
            && self.wipe.is_none()
            && self.clearing.is_none()
    }

    /// Every row that is stored or about to be, and not on its way out; `None`: nothing is known, or the device is no more.
    fn load(&self) -> Option<Load> {
        match self.known {
            Known::Nothing | Known::Absent => None,
            Known::Some | Known::All => Some(self.occupied()),
        }
    }

    /// What is in the store after the last sealed frame, and what has changed since.
    fn occupied(&self) -> Load {
        let (stored, more, less) = (&self.summary, self.unsealed, self.leaving);
        Load {
            count: stored
                .count
                .saturating_add(more.count)
                .saturating_sub(less.count),
            bytes: stored
                .bytes
                .saturating_add(more.bytes)
                .saturating_sub(less.bytes),
        }
    }

    /// What it has more than it was counted with: rows, bytes.
    fn uncounted(&self) -> (i64, i64) {
        match (self.counted, self.load()) {
            (Counted::Read(before) | Counted::All(before), Some(now)) => now.beyond(before),
            (Counted::Nothing, _) | (_, None) => (0, 0),
        }
    }

    /// Counts what changed since the last time. Called after everything that may have happened to it.
    pub(super) fn count(&mut self, device: DeviceId, tally: &mut Tally) {
        let app = self.summary.app;
        if let Counted::Read(stored) = self.counted {
            tally.met(device, app, (stored.count, stored.bytes));
            self.counted = Counted::All(stored);
        }
        let Counted::All(before) = self.counted else {
            return;
        };
        match self.load() {
            Some(now) if now == before => {}
            Some(now) => {
                let (count, bytes) = now.beyond(before);
                tally.add(app, (count, bytes, 0));
                self.counted = Counted::All(now);
            }
            // It went with its device, and with everything that damage may have left in its figures.
            None => {
                let (count, bytes) = Load::default().beyond(before);
                tally.add(app, (count, bytes, -1));
                self.counted = Counted::Nothing;
            }
        }
    }

    /// Whose mailbox it is, once anything is known of it: nothing is offered before.
    pub(super) fn app(&self) -> AppId {
        self.summary.app
    }

    /// Something waits for a frame.
    pub(super) fn has_offers(&self) -> bool {
        self.unsealed.count > self.held
            || !self.departures.is_empty()
            || self.touched
            || self.wipe.as_ref().is_some_and(|wipe| !wipe.sealed)
            || self
                .clearing
                .as_ref()
                .is_some_and(|clearing| !clearing.sealed)
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
            | Event::Release { .. }
            | Event::Withdraw(_)
            | Event::Wipe { .. }
            | Event::Clear { .. }
            | Event::Expire { .. }) => {
                if self.backlog.is_empty() && !self.reading && self.read_again_at.is_none() {
                    // Mostly nothing waits: then the backlog needs no place either.
                    if let Some(other) = self.decide(other, cx) {
                        self.backlog.push_front(other);
                    }
                } else {
                    self.backlog.push_back(other);
                    self.work_off(cx);
                }
            }
        }
    }

    /// Handles what waits, in order, until something must be read first.
    fn work_off(&mut self, cx: &mut Context<'_>) {
        while !self.reading && self.read_again_at.is_none() {
            let Some(event) = self.backlog.pop_front() else {
                break;
            };
            if let Some(event) = self.decide(event, cx) {
                self.backlog.push_front(event);
                return;
            }
        }
        if self.backlog.is_empty() && self.backlog.capacity() > 0 {
            self.backlog = VecDeque::new();
        }
    }

    /// Handles an event, or gives it back and asks for what must be read first.
    fn decide(&mut self, event: Event, cx: &mut Context<'_>) -> Option<Event> {
        if let Some(request) = self.missing(&event, cx) {
            self.reading = true;
            cx.emit(Effect::Read(request));
            return Some(event);
        }
        self.apply(event, cx);
        self.asked = Asked::default();
        None
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
            Event::Release { ping } => self.release_ping(ping, cx),
            Event::Withdraw(withdrawal) => self.withdraw(withdrawal, cx),
            Event::Wipe { ticket } => self.wipe(ticket, cx),
            Event::Clear { ticket } => self.clear(ticket, cx),
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
            withdrawals: false,
        };
        if self.known == Known::All && !self.withdrawals_known && matches!(event, Event::Attach(_))
        {
            return Some(MailboxRead {
                withdrawals: true,
                ..nothing
            });
        }
        if matches!(self.known, Known::All | Known::Absent) {
            return None;
        }
        match event {
            Event::Enqueue(enqueue) => self.missing_to_enqueue(enqueue, nothing, cx),
            Event::Attach(_) => Some(MailboxRead {
                all: true,
                withdrawals: true,
                ..nothing
            }),
            Event::Wipe { .. } | Event::Clear { .. } => Some(MailboxRead {
                all: true,
                ..nothing
            }),
            Event::Revoke { ping, .. } => {
                let unknown = !self.asked.ping && self.position_of(*ping).is_none();
                self.asked.ping = true;
                unknown.then_some(MailboxRead {
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
            | Event::Release { .. }
            | Event::Withdraw(_)
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
        // It joins what waits or is turned away; nothing else about it is asked.
        if enqueue.too_fast {
            let unknown = self.known == Known::Nothing || request.ping.is_some();
            return unknown.then_some(request);
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
        if u64::from(notification.size) > cx.policy.mailbox_bytes {
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
        if self.asked.lowest && self.outranked(replaced, over) {
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
