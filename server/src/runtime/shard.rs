//! A shard as a task: it owns mailboxes that are awake, the sessions of their devices and whoever waits for an answer,
//! and turns events into effects. Nothing of that is locked.
//!
//! A turn: look at the clock once; hear what the committer says; take inputs up to [`TURN_INPUTS`] of links and as many of
//! publishers, apps in turns ([`Lanes`]); do what is due;
//! carry out the effects; wake each link once; hand a batch to the committer if it has a place; then hand all reads
//! to the reading threads at once.
//!
//! The inbox has no limit of its own, because everybody who puts something in is bounded already: a publisher by
//! the memory reserve and its requests, a link by its window and its frames in flight, the reading threads and the
//! committer by what the shard asked them for, the sweep by its page.
//!
//! A panic in a turn would leave mailboxes half decided, so it ends the process, loudly: the log is the promise, a
//! supervisor restarts, and everything that was answered is there again.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use slab::Slab;
use tokio::sync::{Notify, oneshot};

use super::api::{Out, Outlet};
use super::lanes::Lanes;
use super::ledger::Ledger;
use super::meters::Meters;
use super::rate::{DeviceRates, LivePace};
use super::reading::{MailboxJob, Reading};
use super::seen::SeenBook;
use super::traces::Traces;
use super::{locked, reply};
use crate::delivery::{
    AppId, Attach, Change, Closing, CommitFailure, DeviceId, Disk, Effect, Enqueue, Event, Mono,
    Notice, Notification, PingId, Policy, Refusal, Rejection, SessionId, Shard, Stock,
    StoredMailbox, Ticket, Tickets,
};
use crate::ports::{
    Batch, Carrier, Clock, Committed, Grant, Op, OutcomeRecord, Seen, SourceId, Store, StoreHealth,
};

/// Inputs of one turn: enough to fill a frame, few enough that the committer and the other tasks do not wait long.
pub(super) const TURN_INPUTS: usize = 512;
/// Room of an inbox that is given back when a burst is over.
pub(super) const INBOX_KEEPS: usize = 4 * TURN_INPUTS;
/// Outcomes of a shard that may wait to become safe (`receipts.durable`): what ends in seconds on a disk that stands
/// still. Further ones are announced without, and counted.
const HELD_MAX: usize = 65_536;
/// Of these, how many go into one frame.
const HELD_AT_ONCE: usize = 8_192;
/// How late the timer may ring while nothing else happens: a ping to a device that acknowledges in less needs no waking of the shard then,
/// and no earlier ringing of the timer. What is due is due at its own time all the same: in any turn before, and nothing is sent past its
/// expiry.
const TIMER_GRAIN: Duration = Duration::from_millis(5);
/// Far longer than the way from a proof to the shard may take; then an ended secret need not be remembered, because the
/// store tells.
const PROOF_MAX: Duration = Duration::from_secs(600);
/// Different agents that are kept once for all who say them. Beyond it everybody pays for its own.
const AGENTS_MAX: usize = 1_024;
/// Buffers kept for the words of links.
const SPARE_BUFFERS: usize = 256;

/// What a shard is told.
pub(super) enum Input {
    Event(DeviceId, Event),
    Enqueue {
        device: DeviceId,
        notification: Arc<Notification>,
        may_repeat: bool,
        /// It counts against the rate of the device.
        paced: bool,
        /// Its row may wait until it is released.
        patient: bool,
        waiter: Waiter,
    },
    /// What is held back of this ping for these devices has waited long enough. At most
    /// [`RELEASED_AT_ONCE`](super::settings::RELEASED_AT_ONCE) of them.
    Release {
        app: AppId,
        ping: PingId,
        devices: Vec<DeviceId>,
    },
    Attach {
        device: DeviceId,
        /// When the device's secret was looked up, or before.
        proved: Mono,
        proof_until_ms: Option<u64>,
        agent: Option<Arc<str>>,
        attach: Box<Attach>,
        outlet: Arc<dyn Outlet>,
        carrier: Carrier,
    },
    Detach {
        device: DeviceId,
        session: SessionId,
    },
    Revoke {
        app: AppId,
        device: DeviceId,
        ping: PingId,
        answer: oneshot::Sender<bool>,
    },
    /// Revoke everything that waits in a mailbox, and write `ops` in the same frame. One at a time for a device.
    Empty {
        app: AppId,
        device: DeviceId,
        /// The mailbox itself goes, and its session is cut.
        forget: bool,
        ops: Batch,
        answer: oneshot::Sender<Emptied>,
    },
    /// Secrets that a device showed before now are good until then only, Unix milliseconds; 0: not any more.
    EndSecret {
        device: DeviceId,
        until_ms: u64,
        answer: oneshot::Sender<()>,
    },
    /// End this session, which was greeted after its secret had ended.
    CutSecret {
        device: DeviceId,
        session: SessionId,
    },
    /// Mailboxes of this shard in the store, for the count of what apps hold: all those behind the last ones up to `passed`.
    Seed {
        mailboxes: Vec<StoredMailbox>,
        passed: Option<DeviceId>,
    },
    /// A device is about to be made, and is counted already.
    Made(DeviceId),
    /// What the disk can do now; comes every second.
    Disk(Disk),
    Policy(Box<Policy>),
    /// Tell a part of the sessions to go: all that remain when this is the last step.
    Drain {
        steps_left: u32,
        min_ms: u64,
        max_ms: u64,
    },
    /// Detach every session that is left; answer how many there were.
    Cut(oneshot::Sender<u64>),
    /// Answer when nothing waits for the disk.
    Settle(oneshot::Sender<()>),
    /// The end.
    Stop,
}

impl Input {
    /// What it costs, in notifications.
    pub(super) fn cost(&self) -> usize {
        if let Input::Release { devices, .. } = self {
            devices.len().max(1)
        } else {
            1
        }
    }

    /// The app whose publisher asked for this. Such inputs are done in turns of apps, and in their order within one.
    pub(super) fn publisher(&self) -> Option<AppId> {
        match self {
            Input::Enqueue { notification, .. } => Some(notification.app),
            // Behind what it means.
            Input::Release { app, .. } | Input::Revoke { app, .. } | Input::Empty { app, .. } => {
                Some(*app)
            }
            Input::Event(..)
            | Input::Attach { .. }
            | Input::Detach { .. }
            | Input::EndSecret { .. }
            | Input::CutSecret { .. }
            | Input::Seed { .. }
            | Input::Made(_)
            | Input::Disk(_)
            | Input::Policy(_)
            | Input::Drain { .. }
            | Input::Cut(_)
            | Input::Settle(_)
            | Input::Stop => None,
        }
    }
}

/// How a notification for one device was settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    /// Promised, or ended already.
    Accepted,
    Rejected(Rejection),
    /// The store did not answer in time.
    Busy,
}

/// What became of [`Input::Empty`]; everything of it is safe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Emptied {
    pub(super) revoked: u32,
    /// The operations were in the frame. `false`: there was no mailbox, and no frame.
    pub(super) written: bool,
}

/// Somebody who waits for an answer of the core.
pub(super) enum Waiter {
    One(oneshot::Sender<Settled>),
    Part(Arc<Gather>),
    /// The same, of a row that is held back: its device is waited for, and not the disk.
    Held(Arc<Gather>),
    Revoke(oneshot::Sender<bool>),
    Empty(DeviceId, oneshot::Sender<Emptied>),
    /// Was answered without the core; the core's answer is heard by nobody.
    Gone,
}

/// Devices that have a notification safe, or its outcome.
pub(super) type Had = Arc<Mutex<HashSet<DeviceId>>>;

/// Collects the answers of several devices. Only the waiters own it: when the last one is dropped unanswered, the
/// receiver learns that as well.
pub(super) struct Gather(Mutex<Gathered>);

struct Gathered {
    left: usize,
    /// Of these, rows that are held back.
    held: usize,
    answer: Option<oneshot::Sender<Parts>>,
    parts: Parts,
    /// Who is done, noted at once. Then all are waited for, also if one is told that the store is busy.
    had: Option<Had>,
}

/// What several devices answered.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) rejected: Vec<(DeviceId, Rejection)>,
    pub(super) busy: bool,
}

impl Gather {
    /// Waits for so many answers, at least one.
    pub(super) fn new(count: usize) -> (Arc<Gather>, oneshot::Receiver<Parts>) {
        Gather::noting(count, None)
    }

    /// The same of all of them, whatever one says, and notes in `had` who is done. Also when nobody waits for the answer any more.
    pub(super) fn of_all(count: usize, had: Had) -> (Arc<Gather>, oneshot::Receiver<Parts>) {
        Gather::noting(count, Some(had))
    }

    fn noting(count: usize, had: Option<Had>) -> (Arc<Gather>, oneshot::Receiver<Parts>) {
        let (answer, answered) = oneshot::channel();
        let gather = Gather(Mutex::new(Gathered {
            left: count,
            held: 0,
            answer: Some(answer),
            parts: Parts::default(),
            had,
        }));
        (Arc::new(gather), answered)
    }

    /// Answers that have not come, and how many of these wait for nothing but an acknowledgement.
    pub(super) fn left(&self) -> (usize, usize) {
        let gathered = locked(&self.0);
        (gathered.left, gathered.held)
    }

    fn hold(&self) {
        locked(&self.0).held += 1;
    }

    /// One that was held is held no more, and is settled.
    fn settle_held(&self, device: DeviceId, settled: Settled) {
        let mut gathered = locked(&self.0);
        gathered.held = gathered.held.saturating_sub(1);
        drop(gathered);
        self.settle(device, settled);
    }

    fn settle(&self, device: DeviceId, settled: Settled) {
        let mut gathered = locked(&self.0);
        match settled {
            Settled::Rejected(why) => gathered.parts.rejected.push((device, why)),
            // An outcome that could not be made safe is one all the same.
            Settled::Accepted | Settled::Busy if gathered.had.is_some() => {
                if let Some(had) = &gathered.had {
                    locked(had).insert(device);
                }
            }
            Settled::Accepted => {}
            Settled::Busy => gathered.parts.busy = true,
        }
        gathered.left = gathered.left.saturating_sub(1);
        // Who was told to come again need not wait for the rest.
        if (gathered.left == 0 || gathered.parts.busy)
            && let Some(answer) = gathered.answer.take()
        {
            reply(answer, std::mem::take(&mut gathered.parts));
        }
    }
}

/// Where everybody leaves things for a shard.
#[derive(Default)]
pub(super) struct Inbox {
    queue: Mutex<Queue>,
    notify: Notify,
}

#[derive(Default)]
struct Queue {
    grants: Vec<Grant>,
    inputs: VecDeque<Input>,
    /// The shard has stopped: what comes in is dropped, and with it the waiters.
    closed: bool,
}

impl Queue {
    fn is_empty(&self) -> bool {
        self.grants.is_empty() && self.inputs.is_empty()
    }
}

impl Inbox {
    /// Leaves one input.
    pub(super) fn push(&self, input: Input) {
        let mut queue = locked(&self.queue);
        if queue.closed {
            return;
        }
        let first = queue.is_empty();
        queue.inputs.push_back(input);
        drop(queue);
        self.tell(first);
    }

    /// Leaves several, in order.
    pub(super) fn push_all(&self, inputs: Vec<Input>) {
        let mut queue = locked(&self.queue);
        if queue.closed {
            return;
        }
        let first = queue.is_empty();
        queue.inputs.extend(inputs);
        drop(queue);
        self.tell(first);
    }

    /// Leaves a word of the committer, which overtakes the inputs: the committer waits for nobody.
    fn grant(&self, grant: Grant) {
        let mut queue = locked(&self.queue);
        let first = queue.is_empty();
        queue.grants.push(grant);
        drop(queue);
        self.tell(first);
    }

    /// Something was left where nothing was: the shard takes everything at once, so behind something it was told already.
    fn tell(&self, first: bool) {
        if first {
            self.notify.notify_one();
        }
    }

    /// Inputs that the shard has not taken in.
    fn waiting(&self) -> usize {
        locked(&self.queue).inputs.len()
    }
}

/// What is known of an attached device from outside its shard.
#[derive(Debug, Clone, Copy)]
pub(super) struct Presence {
    session: SessionId,
    pub(super) since_ms: u64,
    pub(super) carrier: Carrier,
}

/// The outside of a shard.
pub(super) struct ShardDoor {
    pub(super) inbox: Arc<Inbox>,
    presence: Mutex<HashMap<DeviceId, Presence>>,
    seen: Mutex<SeenBook>,
    awake: AtomicUsize,
    /// Inputs that the shard took in and has not done yet.
    backlog: AtomicUsize,
    sessions: AtomicU64,
}

impl ShardDoor {
    /// A door to a shard that is about to start.
    pub(super) fn new() -> ShardDoor {
        ShardDoor {
            inbox: Arc::default(),
            presence: Mutex::default(),
            seen: Mutex::default(),
            awake: AtomicUsize::new(0),
            backlog: AtomicUsize::new(0),
            sessions: AtomicU64::new(0),
        }
    }

    /// How a device is attached.
    pub(super) fn presence(&self, device: DeviceId) -> Option<Presence> {
        locked(&self.presence).get(&device).copied()
    }

    /// When a device was last seen, as far as that is not written yet.
    pub(super) fn seen(&self, device: DeviceId) -> Option<Seen> {
        locked(&self.seen).get(device)
    }

    /// Devices whose last sighting is not written yet.
    pub(super) fn seen_waiting(&self) -> usize {
        locked(&self.seen).waiting()
    }

    /// All sightings that are not written yet, for the last frames of an orderly stop.
    pub(super) fn take_seen(&self) -> Batch {
        locked(&self.seen).take_all()
    }

    /// Inputs that wait.
    pub(super) fn waiting(&self) -> usize {
        self.inbox.waiting() + self.backlog.load(Ordering::Relaxed)
    }

    /// Mailboxes awake.
    pub(super) fn awake(&self) -> usize {
        self.awake.load(Ordering::Relaxed)
    }

    /// Sessions, greeted or not.
    pub(super) fn sessions(&self) -> u64 {
        self.sessions.load(Ordering::Relaxed)
    }
}

/// What all shards share.
pub(super) struct Shared {
    pub(super) store: Arc<dyn Store>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) reading: Reading,
    pub(super) ledger: Ledger,
    pub(super) traces: Traces,
    pub(super) meters: Meters,
    /// What apps hold.
    pub(super) stock: Arc<Stock>,
    /// What one device may be sent.
    pub(super) device_pace: LivePace,
    /// Longest wait for a settlement, milliseconds.
    pub(super) accept_wait_ms: AtomicU64,
    /// The store failed: said once.
    pub(super) failed: AtomicBool,
    /// Every outcome is safe before it is announced (`receipts.durable`).
    pub(super) durable: bool,
}

impl Shared {
    /// Longest wait for a settlement.
    pub(super) fn accept_wait(&self) -> Duration {
        Duration::from_millis(self.accept_wait_ms.load(Ordering::Relaxed))
    }
}

/// How a notification ended.
struct Ended {
    tickets: Tickets,
    record: OutcomeRecord,
    stored: bool,
}

/// What is said once the outcomes before it are safe.
enum Held {
    Ended(Ended),
    Revoked {
        ticket: Ticket,
        revoked: bool,
    },
    Emptied {
        ticket: Ticket,
        revoked: u32,
        written: bool,
    },
}

struct SessionEntry {
    device: DeviceId,
    outlet: Arc<dyn Outlet>,
    /// Its place in `touched`, if that still names this session.
    touched: u32,
    carrier: Carrier,
    welcomed: bool,
    agent: Option<Arc<str>>,
    proved: Mono,
    /// When its secret ends, Unix milliseconds; the key under which it is in `ending`.
    ends_ms: u64,
    /// It was told that it is over, and is told nothing more.
    cut: bool,
}

/// A secret that was replaced.
#[derive(Debug, Clone, Copy)]
struct Replaced {
    at: Mono,
    /// Good until then, Unix milliseconds; 0: it was stolen, and ended at once.
    until_ms: u64,
}

/// The words of this turn for one link.
struct Touched {
    session: SessionId,
    outlet: Arc<dyn Outlet>,
    /// Mostly there is one, and it needs no buffer.
    first: Option<Out>,
    more: Vec<Out>,
}

/// Somebody who waits, with what the ledger needs to know of the notification.
struct Slot {
    waiter: Waiter,
    generation: u32,
    app: AppId,
    accepted_ms: u64,
    expires_ms: u64,
}

/// Those who wait for an answer. A ticket is a place and a generation, so that a late answer never meets a newcomer.
#[derive(Default)]
struct Waiters {
    slots: Slab<Slot>,
    generation: u32,
    /// Publishers, oldest first, with the moment at which they are told that the store is busy.
    patience: VecDeque<(Mono, Ticket)>,
}

impl Waiters {
    fn add(&mut self, waiter: Waiter, app: AppId, accepted_ms: u64, expires_ms: u64) -> Ticket {
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let place = self.slots.insert(Slot {
            waiter,
            generation,
            app,
            accepted_ms,
            expires_ms,
        });
        Ticket((u64::from(generation) << 32) | place as u64)
    }

    fn slot(&mut self, ticket: Ticket) -> Option<&mut Slot> {
        let (place, generation) = split(ticket);
        self.slots
            .get_mut(place)
            .filter(|slot| slot.generation == generation)
    }

    /// The row is held back.
    fn held(&mut self, ticket: Ticket) {
        if let Some(slot) = self.slot(ticket) {
            slot.waiter = match std::mem::replace(&mut slot.waiter, Waiter::Gone) {
                Waiter::Part(gather) => {
                    gather.hold();
                    Waiter::Held(gather)
                }
                other @ (Waiter::One(_)
                | Waiter::Held(_)
                | Waiter::Revoke(_)
                | Waiter::Empty(..)
                | Waiter::Gone) => other,
            };
        }
    }

    fn take(&mut self, ticket: Ticket) -> Option<Slot> {
        let (place, generation) = split(ticket);
        let fits = self
            .slots
            .get(place)
            .is_some_and(|slot| slot.generation == generation);
        fits.then(|| self.slots.remove(place))
    }

    /// Forgets those at the head who were answered; tells the overdue.
    fn patience(&mut self, now: Mono) {
        while let Some(&(until, ticket)) = self.patience.front() {
            let overdue = until <= now;
            match self.slot(ticket) {
                Some(slot) if overdue => {
                    match std::mem::replace(&mut slot.waiter, Waiter::Gone) {
                        Waiter::One(answer) => reply(answer, Settled::Busy),
                        // The device does not matter: the whole ping is told to come again.
                        Waiter::Part(gather) => gather.settle(DeviceId([0; 16]), Settled::Busy),
                        other @ (Waiter::Held(_)
                        | Waiter::Revoke(_)
                        | Waiter::Empty(..)
                        | Waiter::Gone) => {
                            slot.waiter = other;
                        }
                    }
                }
                Some(_) => break,
                None => {}
            }
            self.patience.pop_front();
        }
        if self.patience.is_empty() && self.patience.capacity() > INBOX_KEEPS {
            self.patience = VecDeque::new();
        }
    }
}

fn split(ticket: Ticket) -> (usize, u32) {
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of the ticket"
    )]
    let (place, generation) = ((ticket.0 as u32) as usize, (ticket.0 >> 32) as u32);
    (place, generation)
}

/// One shard. See the head of this file.
pub(super) struct ShardTask {
    core: Shard,
    door: Arc<ShardDoor>,
    shared: Arc<Shared>,
    source: SourceId,
    run: u32,
    /// A place was asked for and not granted yet.
    wanted: bool,
    /// A batch was submitted and not answered yet.
    outstanding: bool,
    waiters: Waiters,
    sessions: HashMap<SessionId, SessionEntry>,
    /// What was found in the inbox last; empty between turns.
    arrived: VecDeque<Input>,
    lanes: Lanes,
    /// How much each device was sent in the last moments.
    rates: DeviceRates,
    grants: Vec<Grant>,
    effects: Vec<Effect>,
    touched: Vec<Touched>,
    spare: Vec<Vec<Out>>,
    reads: Vec<MailboxJob>,
    /// Outcomes of this turn, for the history.
    outcomes: Vec<OutcomeRecord>,
    /// What waits for a frame, in order; empty unless outcomes are durable.
    held: VecDeque<Held>,
    /// What is in the outstanding frame.
    sealed: Vec<Held>,
    /// What goes into the frame that empties a mailbox.
    owed: HashMap<DeviceId, Batch>,
    /// Secrets that were replaced: whoever was proved before is let in until its end only. Kept for [`PROOF_MAX`]; each
    /// costs whoever makes it a commit.
    replaced: HashMap<DeviceId, Replaced>,
    /// The same, oldest first.
    replaced_order: VecDeque<(Mono, DeviceId)>,
    /// Sessions whose secret ends, by that time (Unix milliseconds), each once.
    ending: BTreeSet<(u64, SessionId)>,
    /// What clients said they are; most of a fleet says the same.
    agents: HashSet<Arc<str>>,
    /// So many sightings wait that they are worth a frame.
    seen_full: bool,
    /// Sessions that have not been told to go, while the server drains.
    drain: Option<Drain>,
    settling: Vec<oneshot::Sender<()>>,
    stopped: bool,
}

struct Drain {
    untold: Vec<SessionId>,
    /// The last step was taken: newcomers are told at once.
    over: bool,
    min_ms: u64,
    max_ms: u64,
}

impl ShardTask {
    /// Registers with the store and prepares the task; [`ShardTask::run`] is the task.
    pub(super) fn new(
        door: Arc<ShardDoor>,
        shared: Arc<Shared>,
        policy: Policy,
        place: usize,
    ) -> ShardTask {
        let inbox = Arc::clone(&door.inbox);
        let source = shared
            .store
            .register(Box::new(move |grant| inbox.grant(grant)));
        ShardTask {
            run: policy.run,
            core: Shard::with_stock(policy, Arc::clone(&shared.stock), place),
            door,
            shared,
            source,
            wanted: false,
            outstanding: false,
            waiters: Waiters::default(),
            sessions: HashMap::new(),
            arrived: VecDeque::new(),
            lanes: Lanes::new(),
            rates: DeviceRates::new(),
            grants: Vec::new(),
            effects: Vec::new(),
            touched: Vec::new(),
            spare: Vec::new(),
            reads: Vec::new(),
            outcomes: Vec::new(),
            held: VecDeque::new(),
            sealed: Vec::new(),
            owed: HashMap::new(),
            replaced: HashMap::new(),
            replaced_order: VecDeque::new(),
            ending: BTreeSet::new(),
            agents: HashSet::new(),
            seen_full: false,
            drain: None,
            settling: Vec::new(),
            stopped: false,
        }
    }

    /// Runs until it is told to stop.
    pub(super) async fn run(mut self) {
        let door = Arc::clone(&self.door);
        let timer = tokio::time::sleep(Duration::ZERO);
        tokio::pin!(timer);
        // The moment for which the timer is set. Later deadlines do not move it: waking early is harmless.
        let mut armed: Option<Mono> = None;
        loop {
            if let Some(deadline) = self.core.next_deadline()
                && armed.is_none_or(|at| deadline < at)
            {
                let now = self.shared.clock.now().mono;
                let at = deadline.max(now + TIMER_GRAIN);
                if armed.is_none_or(|armed| at < armed) {
                    timer.set(tokio::time::sleep(at - now));
                    armed = Some(at);
                }
            }
            tokio::select! {
                biased;
                () = door.inbox.notify.notified() => {}
                () = &mut timer, if armed.is_some() => armed = None,
            }
            loop {
                let turn = catch_unwind(AssertUnwindSafe(|| self.turn()));
                let Ok(more) = turn else {
                    tracing::error!(
                        "a shard panicked; the process ends so that a restart finds everything as the log has it"
                    );
                    std::process::abort();
                };
                if self.stopped {
                    return;
                }
                if !more {
                    break;
                }
                // Whoever else is ready goes first.
                tokio::task::yield_now().await;
            }
        }
    }

    /// One turn; `true` if there was more than it may do. What was left meanwhile is told by itself.
    fn turn(&mut self) -> bool {
        {
            let mut queue = locked(&self.door.inbox.queue);
            std::mem::swap(&mut queue.grants, &mut self.grants);
            std::mem::swap(&mut queue.inputs, &mut self.arrived);
        }
        self.lanes.take_in(&mut self.arrived);
        let now = self.shared.clock.now();
        let mut place = false;
        let mut grants = std::mem::take(&mut self.grants);
        for grant in grants.drain(..) {
            match grant {
                Grant::Ready => place = true,
                Grant::Committed(result) => self.committed(result, now),
            }
        }
        self.grants = grants;
        for _ in 0..TURN_INPUTS {
            let Some(input) = self.lanes.next_first() else {
                break;
            };
            self.input(input, now);
        }
        let mut done = 0;
        while done < TURN_INPUTS
            && let Some(input) = self.lanes.next_of_apps()
        {
            done += input.cost();
            self.input(input, now);
        }
        self.core.handle_deadlines(now, &mut self.effects);
        self.carry_out(now.unix_ms);
        // First of all: an acknowledgement that comes before its row is sealed spares the disk.
        self.wake_links();
        if place {
            self.wanted = false;
            self.submit();
        } else if !self.wanted
            && !self.outstanding
            && (self.core.has_offers()
                || !self.held.is_empty()
                || (self.seen_full && !self.failed()))
        {
            if self.shared.store.want(self.source) {
                self.submit();
            } else {
                self.wanted = true;
            }
        }
        if !self.outcomes.is_empty() {
            self.shared.store.record_outcomes(&mut self.outcomes);
        }
        if !self.reads.is_empty() {
            self.shared
                .reading
                .mailboxes(&self.door.inbox, &mut self.reads);
        }
        self.waiters.patience(now.mono);
        self.door.awake.store(self.core.awake(), Ordering::Relaxed);
        self.door.backlog.store(self.lanes.len(), Ordering::Relaxed);
        self.settle();
        !self.lanes.is_empty()
    }

    fn input(&mut self, input: Input, now: crate::delivery::Now) {
        let (device, event) = match input {
            Input::Event(device, event) => (device, event),
            Input::Enqueue {
                device,
                notification,
                may_repeat,
                paced,
                patient,
                waiter,
            } => {
                let pace = self.shared.device_pace.get();
                let too_fast = paced && !self.rates.take(notification.app, device, now.mono, pace);
                // What was accepted before is answered as before: with a key by whoever knows of it.
                if too_fast && may_repeat && self.shared.ledger.has_ended(notification.ping, device)
                {
                    return answer(waiter, device, Settled::Accepted);
                }
                if too_fast && !may_repeat {
                    self.shared.meters.rejected(Rejection::TooFast);
                    return answer(waiter, device, Settled::Rejected(Rejection::TooFast));
                }
                let ticket = self.waiters.add(
                    waiter,
                    notification.app,
                    notification.accepted_ms,
                    notification.expires_ms,
                );
                // Whoever brings an audience does not come again before it has all answers: what is under way is not to be
                // handed over twice.
                if !patient {
                    let patience = self.shared.accept_wait();
                    self.waiters
                        .patience
                        .push_back((now.mono + patience, ticket));
                }
                let enqueue = Enqueue {
                    ticket,
                    notification,
                    may_repeat,
                    too_fast,
                    patient,
                };
                let before = self.effects.len();
                let event = Event::Enqueue(enqueue);
                self.core.handle(device, event, now, &mut self.effects);
                // The last thing that is said of a row that is held back.
                let said = self.effects.get(before..).and_then(<[Effect]>::last);
                if patient && matches!(said, Some(Effect::Noticed(Notice::Deferred))) {
                    self.waiters.held(ticket);
                }
                return;
            }
            Input::Attach {
                device,
                proved,
                proof_until_ms,
                agent,
                attach,
                outlet,
                carrier,
            } => {
                let replaced = self.secret_end(device, proved);
                let until_ms = match (proof_until_ms, replaced) {
                    // Stolen, whatever was known when it was shown.
                    (_, Some(0)) => Some(0),
                    (Some(shown), _) => Some(shown),
                    (None, replaced) => replaced,
                };
                if until_ms.is_some_and(|until_ms| until_ms <= now.unix_ms) {
                    return outlet.push(Out::Refuse(Refusal::UnknownDevice));
                }
                let entry = SessionEntry {
                    device,
                    outlet,
                    touched: u32::MAX,
                    carrier,
                    welcomed: false,
                    agent: agent.map(|agent| self.shared_agent(agent)),
                    proved,
                    ends_ms: u64::MAX,
                    cut: false,
                };
                self.sessions.insert(attach.session, entry);
                if let Some(until_ms) = until_ms {
                    self.ends_at(attach.session, until_ms);
                }
                self.count_sessions();
                (device, Event::Attach(*attach))
            }
            Input::Detach { device, session } => {
                self.forget_session(session, now);
                (device, Event::Detach { session })
            }
            Input::Revoke {
                app: _,
                device,
                ping,
                answer,
            } => {
                let ticket = self.waiters.add(Waiter::Revoke(answer), AppId(0), 0, 0);
                (device, Event::Revoke { ticket, ping })
            }
            Input::Empty {
                app: _,
                device,
                forget,
                ops,
                answer,
            } => {
                self.owed.insert(device, ops);
                let waiter = Waiter::Empty(device, answer);
                let ticket = self.waiters.add(waiter, AppId(0), 0, 0);
                let event = if forget {
                    Event::Wipe { ticket }
                } else {
                    Event::Clear { ticket }
                };
                (device, event)
            }
            Input::EndSecret {
                device,
                until_ms,
                answer,
            } => {
                self.end_secret(device, until_ms, now);
                return reply(answer, ());
            }
            Input::CutSecret { device, session } => {
                return self.cut_secret(device, session, now);
            }
            Input::Release { ping, devices, .. } => {
                for device in devices {
                    let release = Event::Release { ping };
                    self.core.handle(device, release, now, &mut self.effects);
                }
                return;
            }
            Input::Seed { mailboxes, passed } => return self.core.seed(&mailboxes, passed),
            Input::Made(device) => return self.core.made(device),
            Input::Disk(disk) => {
                self.end_sessions(now);
                return self.core.set_disk(disk, now, &mut self.effects);
            }
            Input::Policy(policy) => {
                // The run is a fact, not a setting.
                return self.core.set_policy(Policy {
                    run: self.run,
                    ..*policy
                });
            }
            Input::Drain {
                steps_left,
                min_ms,
                max_ms,
            } => return self.drain(steps_left, min_ms, max_ms),
            Input::Cut(answer) => {
                let left: Vec<(SessionId, DeviceId)> = self
                    .sessions
                    .iter()
                    .map(|(session, entry)| (*session, entry.device))
                    .collect();
                for &(session, device) in &left {
                    self.forget_session(session, now);
                    self.core
                        .handle(device, Event::Detach { session }, now, &mut self.effects);
                }
                reply(answer, left.len() as u64);
                return;
            }
            Input::Settle(answer) => return self.settling.push(answer),
            Input::Stop => {
                let mut queue = locked(&self.door.inbox.queue);
                queue.closed = true;
                queue.inputs.clear();
                self.stopped = true;
                return;
            }
        };
        self.core.handle(device, event, now, &mut self.effects);
    }

    // ---- The disk ------------------------------------------------------------------------------------------------

    fn submit(&mut self) {
        self.outstanding = true;
        let changes = self.core.seal();
        let mut seen = locked(&self.door.seen);
        let mut batch: Batch = Vec::with_capacity(changes.len());
        for change in changes {
            // A verdict that is known already stays.
            if let Change::Outcome { ping, device, .. } = &change
                && self.shared.ledger.has_ended(*ping, *device)
            {
                continue;
            }
            let owed = match &change {
                Change::Forget { device } => {
                    seen.forget(*device);
                    self.owed.get(device).cloned()
                }
                Change::Cleared { device } => self.owed.get(device).cloned(),
                Change::Insert { .. }
                | Change::Remove { .. }
                | Change::Outcome { .. }
                | Change::Withdraw { .. }
                | Change::Summary { .. } => None,
            };
            batch.push(Op::Mailbox(change));
            batch.extend(owed.into_iter().flatten());
        }
        let count = self.held.len().min(HELD_AT_ONCE);
        self.sealed.extend(self.held.drain(..count));
        for held in &self.sealed {
            // A verdict that is known already stays.
            if let Held::Ended(Ended { record, .. }) = held
                && !self.shared.ledger.has_ended(record.ping, record.device)
            {
                batch.push(Op::PutOutcome(*record));
            }
        }
        if !batch.is_empty() || self.seen_full {
            batch.append(&mut seen.take_due(self.shared.clock.now().mono));
            self.seen_full = seen.is_full();
        }
        drop(seen);
        self.shared.store.submit(self.source, batch);
    }

    fn committed(&mut self, result: Committed, now: crate::delivery::Now) {
        self.outstanding = false;
        locked(&self.door.seen).committed(result.is_ok());
        match result {
            Ok(()) => {}
            Err(CommitFailure::NoRoom) => {
                self.shared.meters.commit_no_room.increment(1);
                if matches!(self.shared.store.health(), StoreHealth::Full { .. }) {
                    self.core.set_disk(Disk::Full, now, &mut self.effects);
                }
            }
            Err(CommitFailure::Failed) => {
                self.shared.meters.commit_failed.increment(1);
                if !self.shared.failed.swap(true, Ordering::Relaxed) {
                    tracing::error!("the store failed; nothing is promised until a restart");
                }
            }
        }
        self.core.handle_committed(result, now, &mut self.effects);
        let mut sealed = std::mem::take(&mut self.sealed);
        for held in sealed.drain(..) {
            self.release(held, result);
        }
        self.sealed = sealed;
    }

    fn release(&mut self, held: Held, result: Committed) {
        match held {
            Held::Ended(ended) => self.announce(ended, result),
            Held::Revoked { ticket, revoked } => self.revoked(ticket, revoked),
            Held::Emptied {
                ticket,
                revoked,
                written,
            } => self.emptied(ticket, revoked, written),
        }
    }

    /// An answer that rests on every outcome before it: it waits until those are safe.
    fn after_outcomes(&mut self, answer: Held) {
        if !self.held.is_empty() {
            self.held.push_back(answer);
        } else if !self.sealed.is_empty() {
            // They are in the outstanding frame; it needs none of its own.
            self.sealed.push(answer);
        } else {
            self.release(answer, Ok(()));
        }
    }

    /// Answers those who wait for a quiet disk.
    fn settle(&mut self) {
        if self.settling.is_empty()
            || self.outstanding
            || self.wanted
            || self.core.has_offers()
            || !self.held.is_empty()
            || !self.waiters.slots.is_empty()
            || !self.lanes.is_empty()
        {
            return;
        }
        for answer in self.settling.drain(..) {
            reply(answer, ());
        }
    }

    // ---- Effects -------------------------------------------------------------------------------------------------

    fn carry_out(&mut self, now_ms: u64) {
        let mut effects = std::mem::take(&mut self.effects);
        for effect in effects.drain(..) {
            self.effect(effect, now_ms);
        }
        self.effects = effects;
    }

    fn effect(&mut self, effect: Effect, now_ms: u64) {
        match effect {
            Effect::Accepted {
                ticket,
                device,
                ping,
            } => {
                if let Some(slot) = self.waiters.take(ticket) {
                    self.shared.ledger.accepted(
                        slot.app,
                        ping,
                        device,
                        slot.accepted_ms,
                        slot.expires_ms,
                    );
                    answer(slot.waiter, device, Settled::Accepted);
                }
            }
            Effect::Ended {
                tickets,
                app,
                device,
                ping,
                outcome,
                at_ms,
                stored,
            } => {
                let ended = Ended {
                    tickets,
                    record: OutcomeRecord {
                        app,
                        ping,
                        device,
                        outcome,
                        at_ms,
                        accepted_ms: None,
                    },
                    stored,
                };
                if stored || !self.shared.durable {
                    self.announce(ended, Ok(()));
                } else if self.held.len() < HELD_MAX {
                    self.held.push_back(Held::Ended(ended));
                } else {
                    self.announce(ended, Err(CommitFailure::NoRoom));
                }
            }
            Effect::Rejected {
                ticket,
                device,
                ping: _,
                why,
            } => {
                self.shared.meters.rejected(why);
                if let Some(slot) = self.waiters.take(ticket) {
                    if let Rejection::Quota(quota) = why {
                        self.shared.meters.over_quota(slot.app, quota);
                    }
                    answer(slot.waiter, device, Settled::Rejected(why));
                }
            }
            // The outcomes that it caused come right before it.
            Effect::RevokeAnswered { ticket, revoked } => {
                self.after_outcomes(Held::Revoked { ticket, revoked });
            }
            Effect::Wiped {
                ticket,
                revoked,
                known: written,
            }
            | Effect::Cleared {
                ticket,
                revoked,
                known: written,
            } => {
                self.after_outcomes(Held::Emptied {
                    ticket,
                    revoked,
                    written,
                });
            }
            Effect::Welcome {
                session,
                pending,
                window,
            } => self.welcome(session, pending, window, now_ms),
            Effect::Refuse { session, why } => {
                self.shared.meters.refused(why);
                self.tell(session, Out::Refuse(why));
            }
            Effect::Send {
                session,
                seq,
                redelivered,
                notification,
            } => {
                self.shared.meters.sends[usize::from(redelivered)].increment(1);
                self.tell(
                    session,
                    Out::Send {
                        seq,
                        redelivered,
                        notification,
                    },
                );
            }
            Effect::Withdraw { session, pings } => {
                self.shared.meters.withdrawals.increment(pings.len() as u64);
                self.tell(session, Out::Withdraw(pings));
            }
            Effect::WithdrawalsHeard { device, heard } => {
                for withdrawal in heard {
                    // Nobody waits for it: if it is lost, the device is told once more.
                    let op = Op::DropWithdrawal { device, withdrawal };
                    self.shared.store.ride_along(op);
                }
            }
            Effect::Close { session, why } => {
                self.shared.meters.closed(why);
                self.tell(session, Out::Close(why));
                self.absent(session, now_ms);
            }
            Effect::Read(request) => self.reads.push(MailboxJob::Read(request)),
            Effect::Fetch { device, rows } => self.reads.push(MailboxJob::Fetch(device, rows)),
            Effect::Noticed(notice) => self.shared.meters.noticed(notice),
        }
    }

    fn revoked(&mut self, ticket: Ticket, revoked: bool) {
        if let Some(Slot {
            waiter: Waiter::Revoke(answer),
            ..
        }) = self.waiters.take(ticket)
        {
            reply(answer, revoked);
        }
    }

    fn emptied(&mut self, ticket: Ticket, revoked: u32, written: bool) {
        if let Some(Slot {
            waiter: Waiter::Empty(device, answer),
            ..
        }) = self.waiters.take(ticket)
        {
            self.owed.remove(&device);
            reply(answer, Emptied { revoked, written });
        }
    }

    /// Tells everybody how a notification ended. `safe`: whether the outcome is as safe as it was to be; if not, it
    /// is told all the same, because it is so, but whoever waits for it is promised nothing.
    fn announce(&mut self, ended: Ended, safe: Committed) {
        let Ended {
            tickets,
            record,
            stored,
        } = ended;
        let OutcomeRecord {
            app,
            ping,
            device,
            outcome,
            at_ms,
            ..
        } = record;
        let mut accepted_ms = None;
        let waiters: smallvec::SmallVec<[Waiter; 2]> = tickets
            .into_iter()
            .filter_map(|ticket| {
                let slot = self.waiters.take(ticket)?;
                accepted_ms = accepted_ms.or(Some(slot.accepted_ms));
                Some(slot.waiter)
            })
            .collect();
        let noted =
            self.shared
                .ledger
                .ended(app, ping, device, outcome, at_ms, stored, accepted_ms);
        self.shared.meters.ended(app, outcome, at_ms, noted);
        if !noted.repeated {
            let accepted_ms = accepted_ms.or(noted.accepted_ms);
            let took_ms = accepted_ms.map(|at| at_ms.saturating_sub(at));
            self.shared.traces.ended(ping, device, outcome, took_ms);
            self.outcomes.push(OutcomeRecord {
                accepted_ms,
                ..record
            });
        }
        let settled = match safe {
            Ok(()) => Settled::Accepted,
            Err(CommitFailure::NoRoom) => Settled::Busy,
            Err(CommitFailure::Failed) => Settled::Rejected(Rejection::StoreFailed),
        };
        if safe.is_err() {
            self.shared.meters.not_durable.increment(1);
        }
        // After the ledger, so that whoever is answered and asks finds it there.
        for waiter in waiters {
            answer(waiter, device, settled);
        }
    }

    // ---- Sessions ------------------------------------------------------------------------------------------------

    /// Adds a word for a link; the link is woken at the end of the turn.
    fn tell(&mut self, session: SessionId, out: Out) {
        let Some(entry) = self.sessions.get_mut(&session).filter(|entry| !entry.cut) else {
            return;
        };
        if let Some(touched) = self
            .touched
            .get_mut(entry.touched as usize)
            .filter(|touched| touched.session == session)
        {
            if touched.more.is_empty() {
                touched.more = self.spare.pop().unwrap_or_default();
                touched.more.extend(touched.first.take());
            }
            touched.more.push(out);
            return;
        }
        entry.touched = u32::try_from(self.touched.len()).unwrap_or(u32::MAX);
        self.touched.push(Touched {
            session,
            outlet: Arc::clone(&entry.outlet),
            first: Some(out),
            more: Vec::new(),
        });
    }

    fn wake_links(&mut self) {
        for mut touched in self.touched.drain(..) {
            match touched.first {
                Some(out) => touched.outlet.push(out),
                None => {
                    touched.outlet.push_all(&mut touched.more);
                    if self.spare.len() < SPARE_BUFFERS {
                        touched.more.clear();
                        self.spare.push(touched.more);
                    }
                }
            }
        }
    }

    fn welcome(&mut self, session: SessionId, pending: u32, window: u16, now_ms: u64) {
        let Some(entry) = self.sessions.get_mut(&session) else {
            return;
        };
        let (device, carrier, proved) = (entry.device, entry.carrier, entry.proved);
        if self
            .secret_end(device, proved)
            .is_some_and(|until_ms| until_ms <= now_ms)
        {
            // It came before its secret ended and was let in after. The core lets go of it in the next turn: this one is
            // carrying out what was decided before.
            self.tell(session, Out::Close(Closing::SecretEnded));
            self.mark_cut(session);
            self.door.inbox.push(Input::CutSecret { device, session });
            return;
        }
        if let Some(entry) = self.sessions.get_mut(&session) {
            entry.welcomed = true;
        }
        let presence = Presence {
            session,
            since_ms: now_ms,
            carrier,
        };
        if let Some(before) = locked(&self.door.presence).insert(device, presence) {
            self.shared.meters.left(before.carrier);
        }
        self.shared.meters.attached(carrier);
        self.note_seen(session, now_ms);
        self.tell(session, Out::Welcome { pending, window });
        if let Some(drain) = &mut self.drain {
            if drain.over {
                let (min_ms, max_ms) = (drain.min_ms, drain.max_ms);
                self.tell(session, Out::Drain { min_ms, max_ms });
            } else {
                drain.untold.push(session);
            }
        }
    }

    /// The device of this session is no longer attached by it.
    fn absent(&mut self, session: SessionId, now_ms: u64) {
        let Some(entry) = self.sessions.get(&session).filter(|entry| entry.welcomed) else {
            return;
        };
        let mut presence = locked(&self.door.presence);
        if presence
            .get(&entry.device)
            .is_none_or(|presence| presence.session != session)
        {
            return;
        }
        presence.remove(&entry.device);
        drop(presence);
        self.shared.meters.left(entry.carrier);
        self.note_seen(session, now_ms);
    }

    /// Notes that the device of this session is there, or was until now.
    fn note_seen(&mut self, session: SessionId, now_ms: u64) {
        let Some(entry) = self.sessions.get(&session) else {
            return;
        };
        let seen = Seen {
            at_ms: now_ms,
            carrier: entry.carrier,
            agent: entry.agent.clone(),
        };
        let now = self.shared.clock.now().mono;
        self.seen_full |= locked(&self.door.seen).note(entry.device, seen, now);
    }

    fn forget_session(&mut self, session: SessionId, now: crate::delivery::Now) {
        self.absent(session, now.unix_ms);
        if let Some(entry) = self.sessions.remove(&session) {
            self.ending.remove(&(entry.ends_ms, session));
        }
        self.count_sessions();
    }

    /// The same text as others have, if there is one.
    fn shared_agent(&mut self, agent: Arc<str>) -> Arc<str> {
        if let Some(known) = self.agents.get(&agent) {
            return Arc::clone(known);
        }
        if self.agents.len() >= AGENTS_MAX {
            self.agents.retain(|known| Arc::strong_count(known) > 1);
        }
        if self.agents.len() < AGENTS_MAX {
            self.agents.insert(Arc::clone(&agent));
        }
        agent
    }

    /// Until when a proof of that moment is good, if its secret was replaced since. Unix milliseconds.
    fn secret_end(&self, device: DeviceId, proved: Mono) -> Option<u64> {
        let replaced = self.replaced.get(&device)?;
        (proved <= replaced.at).then_some(replaced.until_ms)
    }

    /// A secret is replaced. A session that was proved with it ends with it.
    fn end_secret(&mut self, device: DeviceId, until_ms: u64, now: crate::delivery::Now) {
        while let Some(&(at, old)) = self.replaced_order.front() {
            if now.mono - at < PROOF_MAX {
                break;
            }
            self.replaced_order.pop_front();
            if self.replaced.get(&old).is_some_and(|one| one.at == at) {
                self.replaced.remove(&old);
            }
        }
        let at = now.mono;
        self.replaced.insert(device, Replaced { at, until_ms });
        self.replaced_order.push_back((at, device));
        if let Some(Presence { session, .. }) = self.door.presence(device) {
            // One that ends already was proved with an older secret, whose end stays.
            let older = |entry: &SessionEntry| entry.ends_ms != u64::MAX;
            if until_ms == 0 || !self.sessions.get(&session).is_some_and(older) {
                self.ends_at(session, until_ms);
            }
        }
        self.end_sessions(now);
    }

    /// A session ends at this time, if not before.
    fn ends_at(&mut self, session: SessionId, until_ms: u64) {
        if let Some(entry) = self.sessions.get_mut(&session)
            && until_ms < entry.ends_ms
        {
            self.ending.remove(&(entry.ends_ms, session));
            entry.ends_ms = until_ms;
            self.ending.insert((until_ms, session));
        }
    }

    /// Ends the sessions whose secret is not good any more.
    fn end_sessions(&mut self, now: crate::delivery::Now) {
        while let Some(&(until_ms, session)) = self.ending.first() {
            if until_ms > now.unix_ms {
                break;
            }
            self.ending.pop_first();
            if let Some(entry) = self.sessions.get(&session) {
                self.cut_secret(entry.device, session, now);
            }
        }
    }

    fn cut_secret(&mut self, device: DeviceId, session: SessionId, now: crate::delivery::Now) {
        self.core
            .handle(device, Event::Detach { session }, now, &mut self.effects);
        self.tell(session, Out::Close(Closing::SecretEnded));
        self.mark_cut(session);
        self.shared.meters.closed(Closing::SecretEnded);
        self.absent(session, now.unix_ms);
    }

    fn mark_cut(&mut self, session: SessionId) {
        if let Some(entry) = self.sessions.get_mut(&session) {
            entry.cut = true;
        }
    }

    fn failed(&self) -> bool {
        self.shared.failed.load(Ordering::Relaxed)
    }

    fn count_sessions(&self) {
        self.door
            .sessions
            .store(self.sessions.len() as u64, Ordering::Relaxed);
    }

    fn drain(&mut self, steps_left: u32, min_ms: u64, max_ms: u64) {
        let sessions = &self.sessions;
        let drain = self.drain.get_or_insert_with(|| Drain {
            untold: sessions.keys().copied().collect(),
            over: false,
            min_ms,
            max_ms,
        });
        drain.min_ms = min_ms;
        drain.max_ms = max_ms;
        drain.over |= steps_left <= 1;
        let count = drain.untold.len().div_ceil(steps_left.max(1) as usize);
        let now = drain.untold.split_off(drain.untold.len() - count);
        for session in now {
            self.tell(session, Out::Drain { min_ms, max_ms });
            self.shared.meters.drained.increment(1);
        }
    }
}

fn answer(waiter: Waiter, device: DeviceId, settled: Settled) {
    match waiter {
        Waiter::One(answer) => reply(answer, settled),
        Waiter::Part(gather) => gather.settle(device, settled),
        Waiter::Held(gather) => gather.settle_held(device, settled),
        Waiter::Revoke(_) | Waiter::Empty(..) | Waiter::Gone => {}
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn what_an_idle_attached_device_costs_here_is_small() {
        let session = size_of::<(SessionId, SessionEntry)>();
        let presence = size_of::<(DeviceId, Presence)>();
        // A hash map is at worst a little over half empty, and keeps one byte a place.
        let worst = (session + presence + 2) * 16 / 7;
        println!("session {session} B, presence {presence} B, at worst {worst} B in their maps");
        assert!(worst <= 300, "{worst} B for an idle device");
        println!(
            "input {} B, effect {} B, slot {} B",
            size_of::<Input>(),
            size_of::<Effect>(),
            size_of::<Slot>()
        );
    }

    #[test]
    fn a_late_answer_never_meets_a_newcomer() {
        let mut waiters = Waiters::default();
        let (first, _kept) = oneshot::channel();
        let old = waiters.add(Waiter::One(first), AppId(1), 0, 0);
        assert!(waiters.take(old).is_some());
        let (second, _kept) = oneshot::channel();
        let new = waiters.add(Waiter::One(second), AppId(1), 0, 0);
        assert!(waiters.take(old).is_none());
        assert!(waiters.take(new).is_some());
    }

    #[test]
    fn the_impatient_are_told_once_and_their_ticket_stays_the_cores() {
        let mut waiters = Waiters::default();
        let (sender, mut told) = oneshot::channel();
        let ticket = waiters.add(Waiter::One(sender), AppId(1), 0, 0);
        waiters.patience.push_back((Mono(10), ticket));
        waiters.patience(Mono(9));
        assert!(told.try_recv().is_err());
        waiters.patience(Mono(10));
        assert_eq!(told.try_recv().unwrap(), Settled::Busy);
        assert!(waiters.patience.is_empty());
        assert!(waiters.take(ticket).is_some());
        assert!(waiters.slots.is_empty());
    }

    #[test]
    fn several_parts_make_one_answer() {
        let (gather, mut answered) = Gather::new(3);
        gather.settle(DeviceId([1; 16]), Settled::Accepted);
        gather.settle(
            DeviceId([2; 16]),
            Settled::Rejected(Rejection::UnknownDevice),
        );
        assert!(answered.try_recv().is_err());
        gather.settle(DeviceId([3; 16]), Settled::Accepted);
        let parts = answered.try_recv().unwrap();
        assert_eq!(
            parts.rejected,
            [(DeviceId([2; 16]), Rejection::UnknownDevice)]
        );
        assert!(!parts.busy);
    }
}
