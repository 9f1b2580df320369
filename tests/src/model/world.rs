//! The core, a store, and time: steps in, effects out, with the observer looking on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{
    Acknowledged, AppId, Attach, Change, CollapseKey, CommitFailure, DeviceId, Disk, Effect,
    Enqueue, Event, Held, Hold, Mono, Notification, Now, OverflowRule, PingId, Policy, RowKey,
    SessionId, Shard, Stock, StoredMailbox, Summary, Ticket, WireSlot, Withdrawal,
};
use bytes::Bytes;

use super::observer::Observer;
use super::step::{Name, Step, TRANSIENT, WITHDRAWN_MS};
use super::store::ModelStore;

/// The one device.
pub const DEVICE: DeviceId = DeviceId(*b"device-of-models");
/// The wall time at which each history starts, Unix milliseconds.
pub const START_MS: u64 = 1_000_000;

/// The id of a ping.
///
/// # Panics
/// On a name that is no ASCII character.
#[must_use]
pub fn ping(name: Name) -> PingId {
    PingId([u8::try_from(name).unwrap(); 16])
}

/// The name of a ping.
#[must_use]
pub fn name(ping: PingId) -> Name {
    char::from(ping.0[0])
}

/// The number that a notification got when it was made: what tells two of one name apart.
#[must_use]
pub fn serial(notification: &Notification) -> usize {
    usize::from(u16::from_le_bytes([
        notification.content[0],
        notification.content[1],
    ]))
}

/// Everything that there is.
pub struct World {
    /// The core.
    pub shard: Shard,
    /// What it counts.
    pub stock: Arc<Stock>,
    /// The walk over the store that follows a start: what it read, and has not told yet.
    walk: Option<Vec<StoredMailbox>>,
    /// A frame was said to have failed: nobody knows what is on disk.
    unsure: bool,
    /// Its settings.
    pub policy: Policy,
    /// What is on disk.
    pub store: ModelStore,
    /// Who looks on.
    pub observer: Observer,
    /// Milliseconds since the start.
    pub now_ms: u64,
    sealed: Option<Vec<Change>>,
    hold_reads: bool,
    held: VecDeque<Event>,
    tickets: u64,
    serials: u16,
    /// The effects of the last step.
    pub effects: Vec<Effect>,
}

/// A shard that counts, with everything that was there before it still to be told.
fn counting(policy: &Policy) -> (Shard, Arc<Stock>) {
    let stock = Arc::new(Stock::new([AppId::DEFAULT], 1));
    let shard = Shard::with_stock(policy.clone(), Arc::clone(&stock), 0);
    (shard, stock)
}

impl Default for World {
    fn default() -> World {
        World::new()
    }
}

impl World {
    /// A world without a device.
    #[must_use]
    pub fn new() -> World {
        let policy = Policy {
            defer_max: Duration::ZERO,
            ..Policy::default()
        };
        let (shard, stock) = counting(&policy);
        World {
            shard,
            stock,
            walk: Some(Vec::new()),
            unsure: false,
            policy,
            store: ModelStore::default(),
            observer: Observer::default(),
            now_ms: 0,
            sealed: None,
            hold_reads: false,
            held: VecDeque::new(),
            tickets: 0,
            serials: 0,
            effects: Vec::new(),
        }
    }

    /// This moment.
    #[must_use]
    pub fn now(&self) -> Now {
        Now {
            mono: Mono(self.now_ms * 1_000),
            unix_ms: START_MS + self.now_ms,
        }
    }

    /// A frame is being written.
    #[must_use]
    pub fn is_sealed(&self) -> bool {
        self.sealed.is_some()
    }

    /// How many reads wait for their answer.
    #[must_use]
    pub fn held_reads(&self) -> usize {
        self.held.len()
    }

    /// Takes one step.
    ///
    /// # Errors
    /// What must not happen, and did.
    pub fn step(&mut self, step: &Step) -> Result<(), String> {
        self.effects.clear();
        self.apply(step)?;
        self.observer.look(&self.store);
        self.counts()?;
        match self.observer.complaints.first() {
            Some(complaint) => Err(complaint.clone()),
            None => Ok(()),
        }
    }

    /// Whenever nothing is on its way, what is counted is what is on disk.
    fn counts(&self) -> Result<(), String> {
        if self.walk.is_some()
            || self.unsure
            || self.sealed.is_some()
            || self.shard.has_offers()
            || self.shard.awake() > 0
        {
            return Ok(());
        }
        let metas = self.store.rows.values().map(|(meta, _)| meta);
        let stored = Held {
            notifications: self.store.rows.len() as u64,
            bytes: metas.map(|meta| u64::from(meta.size)).sum(),
            devices: u64::from(self.store.summary.is_some()),
        };
        let counted = self.stock.held(AppId::DEFAULT);
        if counted == stored {
            return Ok(());
        }
        Err(format!("{counted:?} is counted, {stored:?} is on disk"))
    }

    fn apply(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Device => {
                if self.store.summary.is_none() && self.shard.awake() == 0 {
                    if let Ok(claim) = self.stock.claim_device(AppId::DEFAULT) {
                        claim.keep();
                    }
                    self.shard.made(DEVICE);
                    self.store.summary = Some(Summary::new(AppId::DEFAULT));
                }
            }
            Step::Policy {
                count,
                bytes,
                refuse,
                defer_ms,
            } => {
                self.policy.mailbox_notifications = *count;
                self.policy.mailbox_bytes = *bytes;
                self.policy.overflow = if *refuse {
                    OverflowRule::Refuse
                } else {
                    OverflowRule::Evict
                };
                self.policy.defer_max = Duration::from_millis(*defer_ms);
                self.shard.set_policy(self.policy.clone());
            }
            Step::Enqueue {
                name: of,
                ttl_ms,
                urgency,
                key,
                size,
                transient,
                repeat,
                patient,
            } => {
                let ticket = self.ticket();
                let ttl_ms = if *transient {
                    u64::try_from(TRANSIENT.as_millis()).unwrap_or(u64::MAX)
                } else {
                    *ttl_ms
                };
                let now_ms = self.now().unix_ms;
                let notification = Arc::new(Notification {
                    ping: ping(*of),
                    app: AppId::DEFAULT,
                    accepted_ms: now_ms,
                    expires_ms: now_ms + ttl_ms,
                    urgency: *urgency,
                    collapse: key.and_then(|key| CollapseKey::new(&key.to_string())),
                    size: *size,
                    transient: *transient,
                    shared: false,
                    content: Bytes::copy_from_slice(&self.serials.to_le_bytes()),
                    wire: WireSlot::default(),
                    hold: Hold::default(),
                });
                self.serials += 1;
                self.observer.asked(
                    ticket,
                    Arc::clone(&notification),
                    self.policy.run,
                    (*patient, *repeat),
                );
                self.event(Event::Enqueue(Enqueue {
                    ticket,
                    notification,
                    may_repeat: *repeat,
                    too_fast: false,
                    patient: *patient,
                }));
            }
            Step::Attach {
                session,
                instance,
                attempt,
                window,
                min,
                seen,
            } => {
                if self.observer.knows_session(SessionId(*session)) {
                    return Ok(());
                }
                let attach = Attach {
                    session: SessionId(*session),
                    instance: *instance,
                    attempt: *attempt,
                    window: *window,
                    min_urgency: *min,
                    seen: seen
                        .iter()
                        .map(|&(name, verdict)| (ping(name), verdict))
                        .collect(),
                };
                self.observer.attaches(&attach);
                self.event(Event::Attach(attach));
            }
            Step::Detach(session) => {
                let session = SessionId(*session);
                self.observer.detaches(session);
                self.event(Event::Detach { session });
            }
            Step::AckUpTo(session, seq) => {
                let session = SessionId(*session);
                // The session machine lets nothing else through.
                if self.observer.last_seq(session) >= *seq {
                    let what = Acknowledged::UpTo(*seq);
                    self.observer.acknowledges(session, &what);
                    self.event(Event::Acknowledge { session, what });
                }
            }
            Step::AckIds(session, names) => {
                let session = SessionId(*session);
                if self.observer.is_attaching(session) {
                    return Ok(());
                }
                let what = Acknowledged::Ids(names.iter().map(|&name| ping(name)).collect());
                self.observer.acknowledges(session, &what);
                self.event(Event::Acknowledge { session, what });
            }
            Step::Decline(session, name) => {
                let (session, ping) = (SessionId(*session), ping(*name));
                if self.observer.is_attaching(session) {
                    return Ok(());
                }
                self.observer.declines(session, ping);
                self.event(Event::Decline { session, ping });
            }
            Step::Revoke(name) => {
                let (ticket, ping) = (self.ticket(), ping(*name));
                self.observer.revokes(ticket, ping);
                self.event(Event::Revoke { ticket, ping });
            }
            Step::Release(name) => self.event(Event::Release { ping: ping(*name) }),
            Step::Withdraw(name) => {
                // The runtime asks for none from a device that is gone.
                if self.store.summary.is_some() {
                    let withdrawal = Withdrawal {
                        ping: ping(*name),
                        until_ms: self.now().unix_ms + WITHDRAWN_MS,
                    };
                    self.store.withdraw(withdrawal);
                    self.observer.withdraws(withdrawal.ping);
                    self.event(Event::Withdraw(withdrawal));
                }
            }
            Step::Wipe => {
                let ticket = self.ticket();
                self.observer.wipes(ticket);
                self.event(Event::Wipe { ticket });
            }
            Step::Sweep => {
                let now_ms = self.now().unix_ms;
                let metas = self.store.rows.values().map(|(meta, _)| meta);
                let rows: Vec<RowKey> = metas
                    .filter(|meta| meta.expires_ms <= now_ms)
                    .map(|meta| meta.key)
                    .collect();
                self.event(Event::Expire { rows });
            }
            Step::At(ms) => return self.at(*ms),
            Step::Seal => self.seal(),
            Step::Commit => {
                self.seal();
                return self.committed(Ok(()));
            }
            Step::NoRoom => return self.committed(Err(CommitFailure::NoRoom)),
            Step::Fail(written) => {
                if *written {
                    self.write_sealed()?;
                }
                self.unsure |= self.sealed.is_some();
                return self.committed(Err(CommitFailure::Failed));
            }
            Step::Disk(disk) => {
                self.observer.disk(*disk);
                let mut effects = Vec::new();
                self.shard.set_disk(*disk, self.now(), &mut effects);
                self.take(effects);
            }
            Step::HoldReads => self.hold_reads = true,
            Step::AnswerOne => {
                if let Some(answer) = self.held.pop_front() {
                    self.event(answer);
                }
            }
            Step::AnswerReads => {
                self.hold_reads = false;
                for answer in std::mem::take(&mut self.held) {
                    self.event(answer);
                }
            }
            Step::FailReads => {
                self.hold_reads = false;
                for answer in std::mem::take(&mut self.held) {
                    self.observer.read_failed();
                    let failed = if matches!(answer, Event::Read(_)) {
                        Event::Read(Err(()))
                    } else {
                        Event::Bodies(Err(()))
                    };
                    self.event(failed);
                }
            }
            Step::Rot(name) => {
                let ping = ping(*name);
                let rows = self.store.rows.values();
                let rotten = rows
                    .filter(|(meta, _)| meta.ping == ping)
                    .map(|(meta, _)| meta.key.order);
                self.store.rotten.extend(rotten);
            }
            Step::Crash(written) => {
                if *written {
                    self.write_sealed()?;
                }
                self.sealed = None;
                self.held.clear();
                self.hold_reads = false;
                self.policy.run += 1;
                (self.shard, self.stock) = counting(&self.policy);
                let summary = self.store.summary.iter();
                let read = summary.map(|summary| StoredMailbox {
                    device: DEVICE,
                    app: summary.app,
                    count: summary.count,
                    bytes: summary.bytes,
                });
                self.walk = Some(read.collect());
                self.unsure = false;
                self.observer.crashes(&self.store, self.policy.run);
            }
        }
        Ok(())
    }

    fn at(&mut self, ms: u64) -> Result<(), String> {
        if ms < self.now_ms {
            return Ok(());
        }
        self.now_ms = ms;
        if let Some(read) = self.walk.take() {
            // Late: what it read is as old as the start.
            self.shard.seed(&read, None);
        }
        self.observer.now_ms = self.now().unix_ms;
        let mut effects = Vec::new();
        self.shard.handle_deadlines(self.now(), &mut effects);
        self.take(effects);
        match self.shard.next_deadline() {
            Some(at) if at <= self.now().mono => {
                Err("what was due is still due: the shard would spin".to_owned())
            }
            Some(_) | None => Ok(()),
        }
    }

    fn ticket(&mut self) -> Ticket {
        self.tickets += 1;
        Ticket(self.tickets)
    }

    fn event(&mut self, event: Event) {
        let mut effects = Vec::new();
        self.shard.handle(DEVICE, event, self.now(), &mut effects);
        self.take(effects);
    }

    /// Takes effects in, then answers the reads among them, as of the time of the question.
    #[expect(
        clippy::wildcard_enum_match_arm,
        reason = "two effects ask for an answer, one tells the store something"
    )]
    fn take(&mut self, effects: Vec<Effect>) {
        let mut answers = Vec::new();
        for effect in effects {
            self.observer.happened(&effect, &self.store);
            match &effect {
                Effect::Read(request) => {
                    answers.push(Event::Read(Ok(Box::new(self.store.read(request)))));
                }
                Effect::Fetch { rows, .. } => {
                    answers.push(Event::Bodies(Ok(self.store.bodies(rows))));
                }
                Effect::WithdrawalsHeard { heard, .. } => {
                    let withdrawals = &mut self.store.withdrawals;
                    withdrawals.retain(|one| !heard.iter().any(|heard| heard.ping == one.ping));
                }
                _ => {}
            }
            self.effects.push(effect);
        }
        for answer in answers {
            if self.hold_reads {
                self.held.push_back(answer);
            } else {
                self.event(answer);
            }
        }
    }

    fn seal(&mut self) {
        if self.sealed.is_none() && self.shard.has_offers() {
            let changes = self.shard.seal();
            self.observer.sealed(&changes, &self.store);
            self.sealed = Some(changes);
        }
    }

    fn write_sealed(&mut self) -> Result<(), String> {
        if let Some(changes) = &self.sealed {
            self.store.apply(changes.clone(), self.policy.run)?;
        }
        Ok(())
    }

    fn committed(&mut self, result: Result<(), CommitFailure>) -> Result<(), String> {
        if self.sealed.is_none() {
            return Ok(());
        }
        if result.is_ok() {
            self.write_sealed()?;
        }
        self.sealed = None;
        self.observer.committed(result);
        let mut effects = Vec::new();
        self.shard
            .handle_committed(result, self.now(), &mut effects);
        self.take(effects);
        Ok(())
    }

    /// Heals everything and lets it come to rest: nobody may be left waiting, nothing may be lost, nobody stays awake.
    ///
    /// # Errors
    /// What must not happen, and did.
    pub fn settle(&mut self) -> Result<(), String> {
        self.settle_disk()?;
        if self.observer.is_failed() {
            self.step(&Step::Crash(false))?;
        }
        // A device comes, takes everything, and goes.
        let session = self.observer.next_session();
        self.step(&Step::Attach {
            session,
            instance: 99,
            attempt: 1,
            window: 256,
            min: bellwire_server::delivery::Urgency::VeryLow,
            seen: Vec::new(),
        })?;
        // It may have been refused, as one of too many.
        if !self.observer.is_attached(SessionId(session)) && self.store.summary.is_some() {
            self.step(&Step::At(self.now_ms + 600_000))?;
            self.step(&Step::Detach(session))?;
            return Ok(());
        }
        for _ in 0..3 {
            let seq = self.observer.last_seq(SessionId(session));
            self.step(&Step::AckUpTo(session, seq))?;
            self.settle_disk()?;
        }
        if let Some((meta, _)) = self.store.rows.values().next() {
            return Err(format!(
                "{} was not delivered to a device that takes everything",
                name(meta.ping)
            ));
        }
        self.step(&Step::Detach(session))?;
        self.settle_disk()?;
        match self.shard.awake() {
            0 => Ok(()),
            _ => Err("the mailbox does not sleep".to_owned()),
        }
    }

    fn settle_disk(&mut self) -> Result<(), String> {
        self.step(&Step::AnswerReads)?;
        self.step(&Step::Disk(Disk::Open))?;
        for _ in 0..4 {
            // What is patient is not so for ever.
            for ping in self.observer.waited_for() {
                self.step(&Step::Release(name(ping)))?;
            }
            // Longer than every retry and holding back, shorter than a life.
            self.step(&Step::At(self.now_ms + 6_000))?;
            self.step(&Step::AnswerReads)?;
            self.step(&Step::Commit)?;
        }
        if self.shard.has_offers() || self.is_sealed() {
            return Err("a frame follows a frame without end".to_owned());
        }
        self.observer.nobody_waits();
        match self.observer.complaints.first() {
            Some(complaint) => Err(complaint.clone()),
            None => Ok(()),
        }
    }
}
