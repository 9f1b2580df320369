//! One run: a queue of things that happen, the server, the devices and the links between them, on one thread and one clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Duration;

use bellwire_client::testing::Given;
use bellwire_protocol::limits::{
    DEVICE_FRAME_MAX_BYTES, HELLO_TIMEOUT_MS, SERVER_JSON_FRAME_MAX_BYTES,
    WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN,
};
use bellwire_protocol::{
    Ack, ClientAction, ClientSession, Code, Codec, Content, DeviceFrame, EXPIRED, FrameReader,
    Goaway, GoawayReason, Hello, Id, KeepAlive, ReconnectRange, ReconnectWhen, Secret,
    ServerAction, ServerFrame, ServerSession, SharedNotify, Topics, Verdict, Welcome, Withdraw,
};
use bellwire_server::delivery::{
    Acknowledged, AppId, Attach, Closing, CollapseKey, CommitFailure, DeviceId, Disk, Effect,
    Enqueue, Event, Hold, MailboxRead, Notice, Notification, Now, OverflowRule, PingId,
    Policy, Refusal, Rejection, RowKey, SessionId, Urgency, WireSlot,
};
use bellwire_server::ports::{
    Clock, ClockState, DeviceRecord, ExpiryCursor, Grant, Op, Store, StoreHealth,
};
use bellwire_server::store::testing::{MemoryDisk, SeededEntropy, SyncSettings, SyncStore, Turns};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::device::{Decided, Device, Hand, Process, SAVE_AFTER_MS, Waiting};
use super::faults::Faults;
use super::house::{Ask, Grants, House, Link, desk};
use super::ledger::{Allowed, Ledger, short};
use super::network::{Carrier, Conn, Piece, Way};
use super::{Report, Sabotage};

/// Wall time at the start of each run, Unix milliseconds.
const START_MS: u64 = 1_700_000_000_000;

/// How long a run may take to come to rest after everything healed: longer than every back-off, silence and wait together.
const REST_S: u64 = 3 * 3_600;

/// Advised keep-alive of the simulated links, seconds: short, so that half-open ones are noticed soon.
const KEEP_ALIVE: KeepAlive = KeepAlive {
    min_s: 5,
    max_s: 20,
};

/// How long a device's disk takes to save verdicts, milliseconds.
const SAVE_MS: u64 = 8;

/// Steps at one moment after which the world spins.
const SPIN: u32 = 20_000;

/// The shared clock: the simulation's time, for the store.
#[derive(Debug, Default)]
struct SimClock(AtomicU64);

impl Clock for SimClock {
    fn now(&self) -> Now {
        let us = self.0.load(Ordering::Relaxed);
        Now {
            mono: bellwire_server::delivery::Mono(us),
            unix_ms: START_MS + us / 1_000,
        }
    }

    fn state(&self) -> ClockState {
        ClockState::Steady
    }
}

/// Something that will happen.
#[derive(Debug)]
enum Ev {
    Publish(usize),
    Retry(usize, usize),
    Revoke(usize),
    Wipe(usize),
    Arrive(u64, Way),
    Dial(usize, u32),
    AppDone(usize, u32),
    Saved(usize, u32),
    StartClient(usize),
    StartServer,
    ReadDone(u32, usize, Question),
    BeginFrame(u32),
    EndFrame(u32),
    Tick,
    Fault(Fault),
    Heal,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    KillServer,
    CutPower,
    KillClient,
    CutLink,
    HalfOpen,
    FillDisk,
    FreeDisk,
    FailSync,
    FailWrite,
    Snapshot,
}

#[derive(Debug)]
enum Question {
    Mailbox(Box<MailboxRead>),
    Bodies(Vec<RowKey>),
}

/// A ping that the publisher will send.
#[derive(Debug, Clone)]
struct PingPlan {
    ping: PingId,
    targets: Vec<usize>,
    urgency: Urgency,
    key: Option<u8>,
    ttl_ms: u64,
    transient: bool,
    text: usize,
}

/// See the head of this file.
pub(super) struct World {
    faults: Faults,
    sabotage: Sabotage,
    random: StdRng,
    now_us: u64,
    clock: Arc<SimClock>,
    queue: BTreeMap<(u64, u64), Ev>,
    next_event: u64,
    disk: MemoryDisk,
    store: SyncStore,
    house: Option<House>,
    /// Power was lost, not only the process.
    dark: bool,
    /// The server is coming back.
    starting: bool,
    skew_ms: i64,
    conns: BTreeMap<u64, Conn>,
    next_conn: u64,
    devices: Vec<Device>,
    plan: Vec<PingPlan>,
    /// Wipes that were not answered.
    wipes: Vec<usize>,
    ledger: Ledger,
    healed: bool,
    /// Steps at this moment.
    spin: u32,
    steps: u64,
    trace: bool,
}

impl World {
    pub(super) fn new(seed: u64, sabotage: Sabotage, trace: bool) -> World {
        let mut random = StdRng::seed_from_u64(seed);
        let faults = Faults::draw(&mut random);
        let disk = MemoryDisk::new();
        let clock = Arc::new(SimClock::default());
        let settings = SyncSettings {
            turns: Turns::Manual,
            lag_frames: faults.lag_frames,
            segment_bytes: 16 << 10,
            reserve_bytes: 4 << 10,
        };
        let entropy = Arc::new(SeededEntropy::new(seed));
        let (store, _) = SyncStore::open(&disk, settings, clock.clone(), entropy).unwrap();
        let ledger = Ledger::new(Allowed {
            evictions: faults.mailbox < 1_000 || faults.mailbox_bytes < 1 << 20,
            disorder: faults.picky || faults.disk_full || faults.failing_reads > 0.0,
        });
        let mut world = World {
            sabotage,
            random,
            now_us: 0,
            clock,
            queue: BTreeMap::new(),
            next_event: 0,
            disk,
            store,
            house: None,
            dark: false,
            starting: false,
            skew_ms: 0,
            conns: BTreeMap::new(),
            next_conn: 1,
            devices: Vec::new(),
            plan: Vec::new(),
            wipes: Vec::new(),
            ledger,
            healed: false,
            spin: 0,
            steps: 0,
            trace,
            faults,
        };
        if trace {
            println!("seed {seed}: {:#?}", world.faults);
        }
        world.prepare();
        world
    }

    fn say(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>12.3} ms  {}", self.now_us as f64 / 1_000.0, what());
        }
    }

    fn at(&mut self, at_us: u64, event: Ev) {
        self.next_event += 1;
        self.queue
            .insert((at_us.max(self.now_us), self.next_event), event);
    }

    fn after_ms(&mut self, ms: u64, event: Ev) {
        self.at(self.now_us + ms * 1_000, event);
    }

    fn up_to(&mut self, most: u64) -> u64 {
        self.random.random_range(0..=most)
    }

    fn now_ms(&self) -> u64 {
        self.now_us / 1_000
    }

    // ---- Before the first event ------------------------------------------------------------------------------------

    fn prepare(&mut self) {
        for index in 0..self.faults.devices {
            let mut id = [0xd0; 16];
            id[0] = u8::try_from(index).unwrap_or(0);
            let picky = self.faults.picky && self.random.random_bool(0.5);
            self.devices.push(Device {
                id: Id(id),
                disk: Vec::new(),
                life: 0,
                process: None,
                gone: false,
                picky,
            });
            let record = DeviceRecord {
                id: DeviceId(id),
                app: AppId::DEFAULT,
                user: "user".to_owned(),
                name: None,
                created_ms: START_MS,
                secret_hash: [0; 32],
            };
            let registered = Op::PutDevice {
                record,
                fresh: true,
                previous_user: None,
            };
            self.store.commit(vec![registered], Box::new(|_| {}));
            let start_ms = self.up_to(2_000);
            self.after_ms(start_ms, Ev::StartClient(index));
        }
        while self.store.begin_frame() {
            self.store.finish_frame();
        }
        self.start_server(false);
        self.plan_pings();
        self.plan_faults();
        self.after_ms(1_000, Ev::Tick);
        let heal_us = self.faults.trouble_s * 1_000_000;
        self.at(heal_us, Ev::Heal);
    }

    fn plan_pings(&mut self) {
        let trouble_us = self.faults.trouble_s * 1_000_000;
        let mut at_us = 0;
        for number in 0..self.faults.pings {
            if !self.random.random_bool(self.faults.bursts) {
                at_us = self.random.random_range(0..trouble_us);
            }
            let mut id = [0xb0; 16];
            id[..4].copy_from_slice(&u32::try_from(number).unwrap_or(0).to_be_bytes());
            let everyone = self.random.random_bool(self.faults.shared);
            let targets = if everyone {
                (0..self.devices.len()).collect()
            } else {
                vec![self.random.random_range(0..self.devices.len())]
            };
            let transient = self.random.random_bool(self.faults.ttl_zero);
            let short = self.random.random_bool(self.faults.short_lives);
            let plan = PingPlan {
                ping: PingId(id),
                targets,
                urgency: Urgency::ALL[self.random.random_range(0..4)],
                key: (!transient && self.random.random_bool(self.faults.collapse))
                    .then(|| self.random.random_range(0..3)),
                ttl_ms: match (transient, short) {
                    (true, _) => 30_000,
                    (false, true) => self.random.random_range(1_000..20_000),
                    (false, false) => 7 * 86_400_000,
                },
                transient,
                text: self.random.random_range(1..=60),
            };
            self.plan.push(plan);
            self.at(at_us, Ev::Publish(number));
            if self.random.random_bool(self.faults.revokes) {
                let later = self.random.random_range(0..10_000_000);
                self.at(at_us + later, Ev::Revoke(number));
            }
        }
        if self.faults.wipe {
            let at_us = self.random.random_range(0..trouble_us);
            let device = self.random.random_range(0..self.devices.len());
            self.at(at_us, Ev::Wipe(device));
        }
    }

    fn plan_faults(&mut self) {
        let trouble_us = self.faults.trouble_s * 1_000_000;
        let faults = self.faults.clone();
        let counted = [
            (faults.server_kills, Fault::KillServer),
            (faults.power_cuts, Fault::CutPower),
            (faults.client_kills, Fault::KillClient),
            (faults.link_cuts, Fault::CutLink),
            (faults.half_opens, Fault::HalfOpen),
            (u32::from(faults.failed_sync), Fault::FailSync),
            (u32::from(faults.failed_write), Fault::FailWrite),
            (3 * u32::from(faults.snapshots), Fault::Snapshot),
        ];
        for (count, fault) in counted {
            for _ in 0..count {
                let at_us = self.random.random_range(0..trouble_us);
                self.at(at_us, Ev::Fault(fault));
            }
        }
        if faults.disk_full {
            let at_us = self.random.random_range(0..trouble_us);
            let for_us = self.random.random_range(0..20_000_000);
            self.at(at_us, Ev::Fault(Fault::FillDisk));
            self.at(at_us + for_us, Ev::Fault(Fault::FreeDisk));
        }
    }

    // ---- The run ---------------------------------------------------------------------------------------------------

    /// Runs until everything rests.
    ///
    /// # Errors
    ///
    /// What the oracle objects to.
    pub(super) fn run(mut self) -> Result<Report, String> {
        let last_us = (self.faults.trouble_s + REST_S) * 1_000_000;
        while self.ledger.objections.is_empty() {
            if self.healed && self.is_at_rest() {
                self.farewell();
                return self.verdict();
            }
            let due = self.next_deadline_us();
            let queued = self.queue.first_key_value().map(|(&(at, _), _)| at);
            let Some(next_us) = due.into_iter().chain(queued).min() else {
                break;
            };
            self.steps += 1;
            self.spin = if next_us > self.now_us {
                0
            } else {
                self.spin + 1
            };
            if self.spin > SPIN {
                self.ledger.object("the world spins".to_owned());
            }
            if next_us > last_us {
                let why = self.unrest();
                self.ledger.object(format!("it does not come to rest: {why}"));
                break;
            }
            self.now_us = self.now_us.max(next_us);
            self.clock.0.store(self.now_us, Ordering::Relaxed);
            if queued == Some(next_us) {
                if let Some((_, event)) = self.queue.pop_first() {
                    self.happen(event);
                }
            } else {
                self.mind_deadlines();
            }
            self.settle();
        }
        self.verdict()
    }

    fn verdict(mut self) -> Result<Report, String> {
        if self.ledger.objections.is_empty() {
            self.look_at_the_store();
        }
        match self.ledger.objections.first() {
            Some(objection) => Err(objection.clone()),
            None => Ok(Report {
                steps: self.steps,
                calls: self.ledger.calls,
                crashes: self.ledger.crashes,
            }),
        }
    }

    fn next_deadline_us(&self) -> Option<u64> {
        let clients = self.devices.iter().filter_map(|device| {
            let machine = device.process.as_ref()?.machine.as_ref()?;
            Some(machine.deadline_ms()? * 1_000)
        });
        let house = self.house.as_ref().and_then(House::next_deadline_us);
        clients.chain(house).min()
    }

    fn mind_deadlines(&mut self) {
        let now_ms = self.now_ms();
        for index in 0..self.devices.len() {
            let mut actions = Vec::new();
            if let Some(process) = &mut self.devices[index].process
                && let Some(machine) = &mut process.machine
            {
                machine.handle_deadline(now_ms, &mut actions);
            }
            self.client_actions(index, actions);
        }
        let Some(house) = &mut self.house else { return };
        let now = house.now(self.now_us);
        let mut effects = Vec::new();
        for desk in &mut house.desks {
            desk.core.handle_deadlines(now, &mut effects);
        }
        let mut acted = Vec::new();
        for (&conn, link) in &mut house.links {
            let mut actions = Vec::new();
            link.session.handle_deadline(now_ms, &mut actions);
            if !actions.is_empty() {
                acted.push((conn, actions));
            }
        }
        for effect in effects {
            self.effect(effect);
        }
        for (conn, actions) in acted {
            self.server_actions(conn, actions);
        }
    }

    fn happen(&mut self, event: Ev) {
        match event {
            Ev::Publish(number) => {
                let targets = self.plan[number].targets.clone();
                self.publish(number, &targets);
            }
            Ev::Retry(number, device) => self.publish(number, &[device]),
            Ev::Revoke(number) => self.revoke(number),
            Ev::Wipe(device) => self.wipe(device),
            Ev::Arrive(conn, way) => self.arrive(conn, way),
            Ev::Dial(device, life) => self.dial(device, life),
            Ev::AppDone(device, life) => self.app_done(device, life),
            Ev::Saved(device, life) => self.saved(device, life),
            Ev::StartClient(device) => self.start_client(device),
            Ev::StartServer => self.start_server(true),
            Ev::ReadDone(run, device, question) => self.read_done(run, device, question),
            Ev::BeginFrame(run) => self.begin_frame(run),
            Ev::EndFrame(run) => self.end_frame(run),
            Ev::Tick => self.tick(),
            Ev::Fault(fault) => self.fault(fault),
            Ev::Heal => self.heal(),
        }
    }

    // ---- The publisher ---------------------------------------------------------------------------------------------

    fn publish(&mut self, number: usize, targets: &[usize]) {
        let plan = self.plan[number].clone();
        let retries = self.faults.retries;
        let Some(house) = &mut self.house else {
            // Connection refused.
            if retries {
                let wait_ms = 500 + self.random.random_range(0..2_000);
                for &device in targets {
                    self.after_ms(wait_ms, Ev::Retry(number, device));
                }
            }
            return;
        };
        let now = house.now(self.now_us);
        let content = Content {
            body: Some("x".repeat(plan.text)),
            ..Content::default()
        };
        let notification = Arc::new(Notification {
            ping: plan.ping,
            app: AppId::DEFAULT,
            accepted_ms: now.unix_ms,
            expires_ms: now.unix_ms + plan.ttl_ms,
            urgency: plan.urgency,
            collapse: plan
                .key
                .and_then(|key| CollapseKey::new(&format!("key-{key}"))),
            size: u32::try_from(content.size()).unwrap_or(u32::MAX),
            transient: plan.transient,
            shared: plan.targets.len() > 1,
            content: content.to_cbor().into(),
            wire: WireSlot::default(),
            hold: Hold::default(),
        });
        for &device in targets {
            let ping = plan.ping;
            let ticket = house.ticket(Ask::Ping { ping, device });
            let enqueue = Enqueue {
                ticket,
                notification: Arc::clone(&notification),
                may_repeat: retries,
            };
            house.inbox.push_back((device, Event::Enqueue(enqueue)));
            self.ledger.asks(ping, device, plan.key, plan.transient);
            if self.wipes.contains(&device) || self.devices[device].gone {
                self.ledger.revoked(ping, device);
            }
        }
        self.say(|| {
            format!(
                "publish {} to {targets:?}{}{} ttl {} ms",
                short(plan.ping),
                plan.key.map_or(String::new(), |key| format!(" key {key}")),
                if plan.transient { " transient" } else { "" },
                plan.ttl_ms
            )
        });
    }

    fn number(ping: PingId) -> usize {
        u32::from_be_bytes([ping.0[0], ping.0[1], ping.0[2], ping.0[3]]) as usize
    }

    /// The publisher got no answer, or one that says "later".
    fn ask_again(&mut self, ping: PingId, device: usize) {
        if self.faults.retries {
            let wait_ms = 500 + self.random.random_range(0..2_000);
            self.after_ms(wait_ms, Ev::Retry(Self::number(ping), device));
        }
    }

    fn revoke(&mut self, number: usize) {
        let plan = self.plan[number].clone();
        let Some(house) = &mut self.house else { return };
        for &device in &plan.targets {
            let ticket = house.ticket(Ask::Revoke);
            let ping = plan.ping;
            house
                .inbox
                .push_back((device, Event::Revoke { ticket, ping }));
            self.ledger.revoked(ping, device);
        }
        self.say(|| format!("revoke {}", short(plan.ping)));
    }

    fn wipe(&mut self, device: usize) {
        if !self.wipes.contains(&device) {
            self.wipes.push(device);
        }
        self.ledger.wiped(device);
        let Some(house) = &mut self.house else {
            return self.after_ms(1_000, Ev::Wipe(device));
        };
        let ticket = house.ticket(Ask::Wipe { device });
        house.inbox.push_back((device, Event::Wipe { ticket }));
        self.say(|| format!("wipe d{device}"));
    }

    // ---- The server ------------------------------------------------------------------------------------------------

    fn start_server(&mut self, again: bool) {
        self.starting = false;
        if self.house.is_some() {
            return;
        }
        if again {
            let seed = self.random.random();
            let opened = if self.dark {
                self.store.crash_and_reopen(seed)
            } else {
                self.store.kill_and_reopen()
            };
            match opened {
                Ok(report) => {
                    if !report.set_aside.is_empty() {
                        self.ledger.object(format!("files set aside: {:?}", report.set_aside));
                    }
                }
                Err(error) => {
                    if self.healed {
                        self.ledger.object(format!("the store does not open: {error}"));
                    }
                    self.say(|| format!("the server does not start: {error}"));
                    self.dark = false;
                    self.starting = true;
                    return self.after_ms(3_000, Ev::StartServer);
                }
            }
            self.dark = false;
            let jump = i64::try_from(self.faults.clock_jump_s * 1_000).unwrap_or(0);
            self.skew_ms = self.random.random_range(-jump..=jump);
        }
        let run = self.store.stats().run;
        let policy = Policy {
            mailbox_notifications: self.faults.mailbox,
            mailbox_bytes: self.faults.mailbox_bytes,
            overflow: if self.faults.refuse {
                OverflowRule::Refuse
            } else {
                OverflowRule::Evict
            },
            defer_max: Duration::from_millis(if self.faults.defer { 50 } else { 0 }),
            defer_after: 2,
            ack_timeout: Duration::from_secs(60),
            run,
            ..Policy::default()
        };
        let grants: Grants = Arc::default();
        let desks = (0..self.faults.shards)
            .map(|shard| {
                let grants = Arc::clone(&grants);
                let grant = move |grant| grants.lock().unwrap().push_back((shard, grant));
                desk(&policy, self.store.register(Box::new(grant)))
            })
            .collect();
        self.house = Some(House {
            run,
            desks,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            tickets: BTreeMap::new(),
            grants,
            inbox: VecDeque::new(),
            next_session: 1,
            next_ticket: 0,
            started_us: self.now_us,
            started_ms: (START_MS + self.now_ms()).saturating_add_signed(self.skew_ms),
            disk: Disk::Open,
            sweep: ExpiryCursor::default(),
            writing: false,
        });
        self.say(|| format!("the server starts, run {run}"));
    }

    /// The server's process is gone. `dark`: its machine lost power.
    fn stop_server(&mut self, dark: bool, wait_ms: u64) {
        let Some(house) = self.house.take() else {
            self.dark |= dark;
            return;
        };
        self.say(|| format!("the server dies{}", if dark { ", power and all" } else { "" }));
        self.dark |= dark;
        self.ledger.crashes += 1;
        // What was being written is there in whole, in part, or not.
        if house.writing {
            match self.random.random_range(0..4) {
                0 => {}
                1 => {
                    self.disk.fail_write_in(0);
                    self.store.finish_frame();
                }
                2 => {
                    self.disk.cut_sync_in(0);
                    self.store.finish_frame();
                }
                _ => {
                    self.store.finish_frame();
                }
            }
        }
        for ask in house.tickets.values() {
            match *ask {
                Ask::Ping { ping, device } => self.ask_again(ping, device),
                Ask::Wipe { device } => self.after_ms(1_000, Ev::Wipe(device)),
                Ask::Revoke => {}
            }
        }
        let ids: Vec<u64> = self.conns.keys().copied().collect();
        for id in ids {
            self.break_way(id, Way::Down);
        }
        self.starting = true;
        self.after_ms(wait_ms, Ev::StartServer);
    }

    /// One side is gone without a word; the other learns it, if anything arrives any more.
    fn break_way(&mut self, id: u64, toward: Way) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        match toward {
            Way::Down => conn.server = false,
            Way::Up => conn.client = false,
        }
        let at_us = conn.end(toward, Piece::Broken, self.now_us, &mut self.random);
        self.at(at_us, Ev::Arrive(id, toward));
        self.forget_conn(id);
    }

    fn forget_conn(&mut self, id: u64) {
        if self
            .conns
            .get(&id)
            .is_some_and(|conn| !conn.client && !conn.server)
        {
            self.conns.remove(&id);
        }
    }

    /// Everything that the server has to do at once.
    fn settle(&mut self) {
        loop {
            let Some(house) = &mut self.house else { return };
            let now = house.now(self.now_us);
            let grant = house.grants.lock().unwrap().pop_front();
            if let Some((shard, grant)) = grant {
                match grant {
                    Grant::Ready => {
                        house.desks[shard].wanted = false;
                        self.submit(shard);
                    }
                    Grant::Committed(result) => self.committed(shard, result),
                }
                continue;
            }
            if let Some((device, event)) = house.inbox.pop_front() {
                let id = DeviceId(self.devices[device].id.0);
                let mut effects = Vec::new();
                house
                    .desk(device)
                    .core
                    .handle(id, event, now, &mut effects);
                for effect in effects {
                    self.effect(effect);
                }
                continue;
            }
            let wants = house
                .desks
                .iter()
                .position(|desk| !desk.wanted && !desk.outstanding && desk.core.has_offers());
            let Some(shard) = wants else { break };
            if self.store.want(house.desks[shard].source) {
                self.submit(shard);
            } else {
                house.desks[shard].wanted = true;
            }
        }
    }

    fn submit(&mut self, shard: usize) {
        let Some(house) = &mut self.house else { return };
        let desk = &mut house.desks[shard];
        desk.outstanding = true;
        let batch: Vec<Op> = desk.core.seal().into_iter().map(Op::Mailbox).collect();
        let run = house.run;
        self.store.submit(desk.source, batch);
        if self.sabotage == Sabotage::AnswersBeforeSync {
            let now = house.now(self.now_us);
            let mut effects = Vec::new();
            house.desks[shard]
                .core
                .handle_committed(Ok(()), now, &mut effects);
            for effect in effects {
                self.effect(effect);
            }
        }
        let gather_us = self.up_to(500);
        self.at(self.now_us + gather_us, Ev::BeginFrame(run));
    }

    fn committed(&mut self, shard: usize, result: Result<(), CommitFailure>) {
        self.say(|| format!("frame of shard {shard}: {result:?}"));
        let Some(house) = &mut self.house else { return };
        let now = house.now(self.now_us);
        let mut effects = Vec::new();
        let desk = &mut house.desks[shard];
        desk.outstanding = false;
        if result == Err(CommitFailure::NoRoom)
            && matches!(self.store.health(), StoreHealth::Full { .. })
        {
            desk.core.set_disk(Disk::Full, now, &mut effects);
        }
        if self.sabotage != Sabotage::AnswersBeforeSync {
            desk.core.handle_committed(result, now, &mut effects);
        }
        for effect in effects {
            self.effect(effect);
        }
    }

    fn begin_frame(&mut self, run: u32) {
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        if !house.writing && self.store.begin_frame() {
            house.writing = true;
            let sync_us = self.random.random_range(0..=self.faults.sync_ms * 1_000);
            self.at(self.now_us + sync_us, Ev::EndFrame(run));
        }
    }

    fn end_frame(&mut self, run: u32) {
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        house.writing = false;
        self.store.finish_frame();
        // Somebody may have submitted meanwhile.
        self.at(self.now_us, Ev::BeginFrame(run));
    }

    fn read_done(&mut self, run: u32, device: usize, question: Question) {
        let fails = !self.healed && self.random.random_bool(self.faults.failing_reads);
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        let id = DeviceId(self.devices[device].id.0);
        let event = match question {
            Question::Mailbox(request) => {
                let view = self.store.read_mailbox(&request).map_err(drop);
                Event::Read(if fails { Err(()) } else { view.map(Box::new) })
            }
            Question::Bodies(rows) => {
                let bodies = self.store.read_bodies(id, &rows).map_err(drop);
                Event::Bodies(if fails { Err(()) } else { bodies })
            }
        };
        house.inbox.push_back((device, event));
    }

    fn tick(&mut self) {
        self.after_ms(1_000, Ev::Tick);
        self.store.look_at_room();
        let health = self.store.health();
        let Some(house) = &mut self.house else {
            if !self.starting {
                self.starting = true;
                self.after_ms(1_000, Ev::StartServer);
            }
            return;
        };
        let now = house.now(self.now_us);
        let disk = match health {
            StoreHealth::Open | StoreHealth::Behind => Disk::Open,
            StoreHealth::Full { .. } => Disk::Full,
            StoreHealth::Failed(_) => Disk::Failed,
        };
        let mut effects = Vec::new();
        house.disk = disk;
        for desk in &mut house.desks {
            desk.core.set_disk(disk, now, &mut effects);
        }
        let after = std::mem::take(&mut house.sweep);
        if let Ok(page) = self.store.expired(now.unix_ms, &after, 100) {
            house.sweep = page.next.unwrap_or_default();
            let mut rows: BTreeMap<usize, Vec<RowKey>> = BTreeMap::new();
            for row in page.items {
                rows.entry(usize::from(row.device.0[0]))
                    .or_default()
                    .push(row.key);
            }
            for (device, rows) in rows {
                house.inbox.push_back((device, Event::Expire { rows }));
            }
        }
        let silence_us = KEEP_ALIVE.silence_ms() * 1_000;
        let silent: Vec<u64> = house
            .links
            .iter()
            .filter(|(_, link)| link.heard_us + silence_us <= self.now_us)
            .map(|(&conn, _)| conn)
            .collect();
        for effect in effects {
            self.effect(effect);
        }
        for conn in silent {
            self.drive(conn, |session, actions| {
                session.handle_failure(Code::Silence, "silence", actions);
            });
        }
        if disk == Disk::Failed {
            // The operator restarts it.
            self.stop_server(false, 1_500);
        }
    }

    fn effect(&mut self, effect: Effect) {
        let Some(house) = &mut self.house else { return };
        let now = house.now(self.now_us);
        match effect {
            Effect::Accepted { ticket, ping, .. } => {
                if let Some(Ask::Ping { device, .. }) = house.tickets.remove(&ticket) {
                    self.ledger.accepted(ping, device);
                    self.say(|| format!("accepted {} for d{device}", short(ping)));
                } else {
                    self.ledger.object(format!("{} is answered twice", short(ping)));
                }
            }
            Effect::Ended {
                tickets,
                device,
                ping,
                outcome,
                at_ms,
                stored,
                ..
            } => {
                let device = usize::from(device.0[0]);
                let late_by_ms = now.unix_ms as i64 - at_ms as i64;
                let mut asked = true;
                for ticket in tickets {
                    asked &= house.tickets.remove(&ticket).is_some();
                    self.ledger.accepted(ping, device);
                }
                if !asked {
                    self.ledger.object(format!("{} is answered twice", short(ping)));
                }
                self.ledger.ended(ping, device, outcome, stored, late_by_ms);
                self.say(|| {
                    let how = if stored { " (stored)" } else { "" };
                    format!("{} on d{device} ends as {}{how}", short(ping), outcome.as_str())
                });
            }
            Effect::Rejected {
                ticket, ping, why, ..
            } => {
                let Some(Ask::Ping { device, .. }) = house.tickets.remove(&ticket) else {
                    return self.ledger.object(format!("{} is answered twice", short(ping)));
                };
                self.say(|| format!("rejected {} for d{device}: {why:?}", short(ping)));
                match why {
                    Rejection::NoRoom | Rejection::StoreFailed => self.ask_again(ping, device),
                    Rejection::MailboxFull => {}
                    Rejection::UnknownDevice => {
                        if !self.wipes.contains(&device) {
                            self.ledger.object(format!("d{device} is unknown"));
                        }
                    }
                }
            }
            Effect::RevokeAnswered { ticket, .. } => {
                if house.tickets.remove(&ticket).is_none() {
                    self.ledger.object("a revocation is answered twice".to_owned());
                }
            }
            Effect::Wiped { ticket, .. } => match house.tickets.remove(&ticket) {
                Some(Ask::Wipe { device }) => {
                    self.say(|| format!("d{device} is wiped"));
                    self.devices[device].gone = true;
                }
                Some(Ask::Ping { .. } | Ask::Revoke) | None => {
                    self.ledger.object("a wipe is answered twice".to_owned());
                }
            },
            Effect::Welcome {
                session,
                pending,
                window,
            } => {
                let Some(&conn) = house.sessions.get(&session) else {
                    return;
                };
                let welcome = Welcome {
                    session: session.0,
                    pending: pending.into(),
                    window,
                    max_bytes: 4_096,
                    keep_alive_s: KEEP_ALIVE,
                    now_ms: now.unix_ms,
                };
                self.drive(conn, |session, actions| {
                    session.handle_welcome(welcome, actions);
                });
            }
            Effect::Refuse { session, why } => {
                let code = match why {
                    Refusal::StaleAttempt => Code::StaleAttempt,
                    Refusal::DuplicateDevice => Code::DuplicateDevice,
                    Refusal::UnknownDevice => Code::Unauthorized,
                    Refusal::StoreFailed => Code::StoreUnavailable,
                };
                if let Some(&conn) = house.sessions.get(&session) {
                    self.say(|| format!("c{conn} is refused: {why:?}"));
                    self.drive(conn, |session, actions| {
                        session.handle_refused(code, code.meaning(), actions);
                    });
                }
            }
            Effect::Send {
                session,
                seq,
                redelivered,
                notification,
            } => self.send(session, seq, redelivered, &notification),
            Effect::Withdraw { session, pings } => {
                if let Some(&conn) = house.sessions.get(&session) {
                    let ids = pings.iter().map(|ping| Id(ping.0)).collect();
                    self.tell_device(conn, &ServerFrame::Withdraw(Withdraw { ids }));
                }
            }
            Effect::Close { session, why } => {
                let Some(&conn) = house.sessions.get(&session) else {
                    return;
                };
                self.say(|| format!("c{conn} is closed: {why:?}"));
                match why {
                    Closing::Replaced => self.go_away(conn, GoawayReason::Replaced, 5_000),
                    Closing::Revoked => self.go_away(conn, GoawayReason::Revoked, 0),
                    Closing::AckTimeout => self.drive(conn, |session, actions| {
                        session.handle_failure(Code::AckTimeout, "too slow", actions);
                    }),
                }
            }
            Effect::Read(request) => {
                let device = usize::from(request.device.0[0]);
                let question = Question::Mailbox(Box::new(request));
                self.ask_the_store(device, question);
            }
            Effect::Fetch { device, rows } => {
                self.ask_the_store(usize::from(device.0[0]), Question::Bodies(rows));
            }
            Effect::Noticed(Notice::UnreadableBody) => {
                self.ledger.object("a body could not be read".to_owned());
            }
            Effect::Noticed(
                Notice::UnknownVerdict
                | Notice::DuplicateDevice
                | Notice::CollapseRepaired
                | Notice::Deferred
                | Notice::DeferralWon,
            ) => {}
        }
    }

    fn ask_the_store(&mut self, device: usize, question: Question) {
        let Some(house) = &self.house else { return };
        let run = house.run;
        let read_us = self.up_to(self.faults.read_ms * 1_000);
        self.at(self.now_us + read_us, Ev::ReadDone(run, device, question));
    }

    fn send(
        &mut self,
        session: SessionId,
        seq: u64,
        redelivered: bool,
        notification: &Notification,
    ) {
        let Some(house) = &mut self.house else { return };
        let ping = notification.ping;
        if notification.expires_ms <= house.now(self.now_us).unix_ms {
            return self
                .ledger
                .object(format!("{} is sent past its expiry", short(ping)));
        }
        let Some(&conn) = house.sessions.get(&session) else {
            return;
        };
        let Some(link) = house.links.get_mut(&conn) else {
            return;
        };
        // After `goaway` nothing new is sent.
        if !link.session.is_attached() || link.session.deadline_ms().is_some() {
            return;
        }
        let shared = notification.wire.get_or_init(|| {
            SharedNotify::new(
                Id(ping.0),
                notification.accepted_ms,
                notification.expires_ms,
                urgency_outside(notification.urgency),
                notification.content.clone(),
            )
        });
        let Some(Ok(shared)) = shared.as_deref() else {
            return self
                .ledger
                .object(format!("the content of {} is damaged", short(ping)));
        };
        link.session.handle_sent(seq);
        let Some(link) = self.conns.get_mut(&conn) else {
            return;
        };
        let frame = shared.frame(link.codec, seq, redelivered).to_vec();
        self.say(|| {
            let again = if redelivered { " (redelivered)" } else { "" };
            format!("c{conn} ◂ notify #{seq} {}{again}", short(ping))
        });
        self.put(conn, Way::Down, &frame);
    }

    fn put(&mut self, id: u64, way: Way, frame: &[u8]) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let arrivals = conn.send(way, frame, self.now_us, &mut self.random);
        for at_us in arrivals {
            self.at(at_us, Ev::Arrive(id, way));
        }
    }

    fn tell_device(&mut self, id: u64, frame: &ServerFrame) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let bytes = conn.codec.encode_server(frame);
        self.say(|| format!("c{id} ◂ {}", frame.name()));
        self.put(id, Way::Down, &bytes);
    }

    fn go_away(&mut self, conn: u64, reason: GoawayReason, away_ms: u32) {
        let goaway = Goaway {
            reason,
            reconnect_ms: ReconnectRange {
                min_ms: away_ms,
                max_ms: 2 * away_ms,
            },
            endpoint: None,
        };
        let now_ms = self.now_ms();
        self.drive(conn, |session, actions| {
            session.handle_goaway(goaway, now_ms, actions);
        });
    }

    fn drive(&mut self, conn: u64, act: impl FnOnce(&mut ServerSession, &mut Vec<ServerAction>)) {
        let Some(link) = self
            .house
            .as_mut()
            .and_then(|house| house.links.get_mut(&conn))
        else {
            return;
        };
        let mut actions = Vec::new();
        act(&mut link.session, &mut actions);
        self.server_actions(conn, actions);
    }

    fn server_actions(&mut self, conn: u64, actions: Vec<ServerAction>) {
        for action in actions {
            let Some(house) = &mut self.house else { return };
            let Some(link) = house.links.get_mut(&conn) else {
                return;
            };
            let Some(device) = self.conns.get(&conn).map(|conn| conn.device) else {
                return;
            };
            let session = link.attached;
            let event = match (action, session) {
                (ServerAction::Attach(hello), _) => {
                    let session = SessionId(house.next_session);
                    house.next_session += 1;
                    link.attached = Some(session);
                    house.sessions.insert(session, conn);
                    Some(Event::Attach(attach(session, &hello)))
                }
                (ServerAction::Acknowledge(ack), Some(session)) => {
                    let what = match ack {
                        Ack::UpTo(seq) => Acknowledged::UpTo(seq),
                        Ack::Ids(ids) => {
                            Acknowledged::Ids(ids.into_iter().map(|id| PingId(id.0)).collect())
                        }
                    };
                    Some(Event::Acknowledge { session, what })
                }
                (ServerAction::Decline { id, .. }, Some(session)) => Some(Event::Decline {
                    session,
                    ping: PingId(id.0),
                }),
                (ServerAction::Subscribe(_) | ServerAction::Unsubscribe(_), _) => {
                    let topics = Topics { topics: Vec::new() };
                    self.tell_device(conn, &ServerFrame::Subscribed(topics));
                    None
                }
                (ServerAction::Send(frame), _) => {
                    self.tell_device(conn, &frame);
                    None
                }
                (ServerAction::Leave, _) => {
                    self.detach(conn);
                    None
                }
                (ServerAction::Close { code, .. }, _) => {
                    self.detach(conn);
                    self.close_link(conn, code);
                    return;
                }
                (
                    ServerAction::Acknowledge(_)
                    | ServerAction::Decline { .. }
                    | ServerAction::Presence(_),
                    _,
                ) => None,
            };
            if let (Some(event), Some(house)) = (event, &mut self.house) {
                house.inbox.push_back((device, event));
            }
        }
    }

    fn detach(&mut self, conn: u64) {
        let Some(house) = &mut self.house else { return };
        let Some(device) = self.conns.get(&conn).map(|conn| conn.device) else {
            return;
        };
        if let Some(session) = house
            .links
            .get_mut(&conn)
            .and_then(|link| link.attached.take())
        {
            house.sessions.remove(&session);
            house.inbox.push_back((device, Event::Detach { session }));
        }
    }

    fn close_link(&mut self, id: u64, code: Code) {
        if let Some(house) = &mut self.house {
            house.links.remove(&id);
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.server = false;
            let at_us = conn.end(Way::Down, Piece::Close(code), self.now_us, &mut self.random);
            self.at(at_us, Ev::Arrive(id, Way::Down));
        }
        self.forget_conn(id);
    }

    // ---- Links -----------------------------------------------------------------------------------------------------

    fn arrive(&mut self, id: u64, way: Way) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let Some(piece) = conn.arrive(way) else {
            return;
        };
        let (device, life, run) = (conn.device, conn.life, conn.run);
        let (carrier, codec) = (conn.carrier, conn.codec);
        let alive = match way {
            Way::Up => conn.server && self.house.as_ref().is_some_and(|house| house.run == run),
            Way::Down => conn.client && self.devices[device].life == life,
        };
        if !alive {
            return;
        }
        match (way, piece) {
            (Way::Up, Piece::Bytes(bytes)) => self.server_hears(id, carrier, codec, &bytes),
            (Way::Down, Piece::Bytes(bytes)) => {
                self.client_hears(id, device, carrier, codec, &bytes);
            }
            (Way::Up, Piece::Close(_) | Piece::Broken) => {
                self.detach(id);
                if let Some(house) = &mut self.house {
                    house.links.remove(&id);
                }
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.server = false;
                }
                self.forget_conn(id);
            }
            (Way::Down, Piece::Close(code)) => self.client_closed(id, device, Some(code)),
            (Way::Down, Piece::Broken) => self.client_closed(id, device, None),
        }
    }

    fn server_hears(&mut self, id: u64, carrier: Carrier, codec: Codec, bytes: &[u8]) {
        let mut first = true;
        loop {
            let Some(link) = self
                .house
                .as_mut()
                .and_then(|house| house.links.get_mut(&id))
            else {
                return;
            };
            link.heard_us = self.now_us;
            let decoded = match carrier {
                Carrier::Messages if first => codec.decode_device(bytes),
                Carrier::Messages => return,
                Carrier::Stream => {
                    if first {
                        link.reader.push(bytes);
                    }
                    match link.reader.pull() {
                        Ok(Some(frame)) => codec.decode_device(&frame),
                        Ok(None) => return,
                        Err(error) => Err(error),
                    }
                }
            };
            first = false;
            if let Err(error) = &decoded {
                self.ledger.object(format!("the server cannot read a frame: {error}"));
            }
            self.drive(id, |session, actions| {
                session.handle_decoded(decoded, actions);
            });
        }
    }

    // ---- Devices ---------------------------------------------------------------------------------------------------

    fn start_client(&mut self, index: usize) {
        let instance = Id(self.random.random());
        let device = &mut self.devices[index];
        if device.process.is_some() || device.gone {
            return;
        }
        device.life += 1;
        let life = device.life;
        device.process = Some(Process::new(
            instance,
            &device.disk,
            SERVER_JSON_FRAME_MAX_BYTES,
        ));
        self.say(|| format!("d{index} starts"));
        self.at(self.now_us, Ev::Dial(index, life));
    }

    fn process(&mut self, index: usize, life: u32) -> Option<&mut Process> {
        let device = &mut self.devices[index];
        device.process.as_mut().filter(|_| device.life == life)
    }

    fn dial(&mut self, index: usize, life: u32) {
        let now_ms = self.now_ms();
        let healed = self.healed;
        let window = self.faults.window;
        let picky = self.devices[index].picky;
        let id = self.devices[index].id;
        let run = self.house.as_ref().map(|house| house.run);
        let Some(process) = self.process(index, life) else {
            return;
        };
        if process.conn.is_some() || process.leaving {
            return;
        }
        let Some(run) = run else {
            return self.come_back(index, ReconnectWhen::Backoff { floor_ms: 0 }, None);
        };
        process.attempt += 1;
        let hello = Hello {
            device: id,
            secret: Some(Secret("secret".to_owned())),
            instance: process.instance,
            attempt: process.attempt,
            seen: process.memory.seen(),
            window: Some(window),
            min_urgency: (picky && !healed).then_some(bellwire_protocol::Urgency::Normal),
            agent: None,
        };
        process.hello_mark = process.memory.mark();
        process.sent_mark = 0;
        process.ping_mark = None;
        process.welcomed_at_ms = None;
        process.waiting.clear();
        process.untold.clear();
        process.reader = FrameReader::new(SERVER_JSON_FRAME_MAX_BYTES);
        let mut machine = ClientSession::new(hello, None);
        let mut actions = Vec::new();
        machine.handle_connected(now_ms, &mut actions);
        process.machine = Some(machine);
        let conn = self.next_conn;
        self.next_conn += 1;
        if let Some(process) = self.process(index, life) {
            process.conn = Some(conn);
        }
        let clock = self
            .house
            .as_ref()
            .map_or((0, 0), |house| (house.started_us, house.started_ms));
        let how = match self.random.random_range(0..3) {
            0 => (Carrier::Stream, Codec::Cbor),
            1 => (Carrier::Messages, Codec::Cbor),
            _ => (Carrier::Messages, Codec::Json),
        };
        let delay_us = 1_000 + self.up_to(self.faults.delay_ms * 1_000);
        let pieces = self.faults.pieces;
        self.conns
            .insert(conn, Conn::new(index, life, (run, clock), how, delay_us, pieces));
        if let Some(house) = &mut self.house {
            house.links.insert(
                conn,
                Link {
                    session: ServerSession::new(now_ms + HELLO_TIMEOUT_MS),
                    reader: FrameReader::new(DEVICE_FRAME_MAX_BYTES),
                    attached: None,
                    heard_us: self.now_us,
                },
            );
        }
        self.say(|| format!("d{index} connects: c{conn}, {how:?}"));
        self.client_actions(index, actions);
    }

    fn come_back(&mut self, index: usize, when: ReconnectWhen, stood_ms: Option<u64>) {
        let random = &mut self.random;
        let device = &mut self.devices[index];
        let life = device.life;
        let Some(process) = &mut device.process else {
            return;
        };
        let wait = process
            .backoff
            .wait(when, stood_ms, |most| random.random_range(0..=most));
        match wait {
            Some(wait) => {
                let at_us = self.now_us + u64::try_from(wait.as_micros()).unwrap_or(0);
                self.at(at_us, Ev::Dial(index, life));
            }
            None => {
                if !self.wipes.contains(&index) && !self.devices[index].process_leaves() {
                    self.ledger
                        .object(format!("d{index} was told never to come back"));
                }
                self.devices[index].gone |= self.wipes.contains(&index);
            }
        }
    }

    fn client_hears(
        &mut self,
        id: u64,
        index: usize,
        carrier: Carrier,
        codec: Codec,
        bytes: &[u8],
    ) {
        let now_ms = self.now_ms();
        let mut first = true;
        loop {
            let forgets = self.sabotage == Sabotage::ForgetsWhatItHad;
            let Some(process) = self.devices[index]
                .process
                .as_mut()
                .filter(|process| process.conn == Some(id))
            else {
                return;
            };
            let decoded = match carrier {
                Carrier::Messages if first => codec.decode_server(bytes),
                Carrier::Messages => break,
                Carrier::Stream => {
                    if first {
                        process.reader.push(bytes);
                    }
                    match process.reader.pull() {
                        Ok(Some(frame)) => codec.decode_server(&frame),
                        Ok(None) => break,
                        Err(error) => Err(error),
                    }
                }
            };
            first = false;
            if let Err(error) = &decoded {
                self.ledger.object(format!("d{index} cannot read a frame: {error}"));
            }
            if matches!(
                decoded,
                Ok(bellwire_protocol::Decoded::Frame(ServerFrame::Pong))
            ) && let Some(mark) = process.ping_mark.take()
            {
                process.memory.confirm(mark);
            }
            let Some(machine) = &mut process.machine else {
                return;
            };
            let memory = &process.memory;
            let known = |id: &Id| {
                (!forgets && memory.is_acknowledged_safely(id)).then_some(Verdict::Acknowledged)
            };
            let mut actions = Vec::new();
            machine.handle_decoded(decoded, now_ms, &known, &mut actions);
            self.client_actions(index, actions);
        }
        self.flush_client(index);
    }

    fn flush_client(&mut self, index: usize) {
        let now_ms = self.now_ms();
        let mut actions = Vec::new();
        if let Some(process) = &mut self.devices[index].process
            && let Some(machine) = &mut process.machine
        {
            machine.flush(now_ms, &mut actions);
        }
        self.client_actions(index, actions);
    }

    fn client_closed(&mut self, id: u64, index: usize, code: Option<Code>) {
        let mut actions = Vec::new();
        if let Some(process) = self.devices[index]
            .process
            .as_mut()
            .filter(|process| process.conn == Some(id))
            && let Some(machine) = &mut process.machine
        {
            machine.handle_closed(code, &mut actions);
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.client = false;
        }
        self.client_actions(index, actions);
        // The other side learns it as well.
        if self.conns.contains_key(&id) {
            self.break_way(id, Way::Up);
        }
    }

    fn client_actions(&mut self, index: usize, actions: Vec<ClientAction>) {
        let now_ms = self.now_ms();
        for action in actions {
            let device = &mut self.devices[index];
            let Some(process) = &mut device.process else {
                return;
            };
            let Some(conn) = process.conn else { return };
            match action {
                ClientAction::Send(frame) => {
                    match &frame {
                        DeviceFrame::Ping => process.ping_mark = Some(process.sent_mark),
                        DeviceFrame::Decline(decline) if decline.reason == EXPIRED => {
                            self.ledger.declined(PingId(decline.id.0), index);
                        }
                        _ => {}
                    }
                    self.say(|| format!("c{conn} ▸ {}", told(&frame)));
                    if let Some(link) = self.conns.get(&conn) {
                        let bytes = link.codec.encode_device(&frame);
                        self.put(conn, Way::Up, &bytes);
                    }
                }
                ClientAction::Attached(_) => {
                    process.welcomed_at_ms = Some(now_ms);
                    process.memory.confirm(process.hello_mark);
                }
                ClientAction::Deliver(notify) => {
                    let server_now_ms = process
                        .machine
                        .as_ref()
                        .and_then(|machine| machine.server_now_ms(now_ms))
                        .unwrap_or(notify.accepted_ms);
                    let left_ms = notify.expires_ms.saturating_sub(server_now_ms);
                    let over_at_us = self
                        .conns
                        .get(&conn)
                        .map_or(0, |link| link.over_at_us(notify.expires_ms));
                    process.waiting.push_back(Waiting {
                        notify,
                        expires_at_ms: now_ms + left_ms,
                        over_at_us,
                    });
                    self.hand_over(index);
                }
                ClientAction::Withdraw(_) | ClientAction::Subscribed(_) => {}
                ClientAction::Close(code) => {
                    if let Some(link) = self.conns.get_mut(&conn) {
                        let at_us =
                            link.end(Way::Up, Piece::Close(code), self.now_us, &mut self.random);
                        self.at(at_us, Ev::Arrive(conn, Way::Up));
                    }
                }
                ClientAction::Reconnect(reconnect) => {
                    let stood_ms = process.welcomed_at_ms.map(|at| now_ms - at);
                    process.conn = None;
                    process.machine = None;
                    if let Some(link) = self.conns.get_mut(&conn) {
                        link.client = false;
                    }
                    self.forget_conn(conn);
                    self.say(|| format!("c{conn} ends for d{index}: {:?}", reconnect.why));
                    if let bellwire_protocol::SessionEnd::Misbehaved(rule) = reconnect.why {
                        self.ledger
                            .object(format!("the server broke a rule of the session: {rule}"));
                    }
                    self.come_back(index, reconnect.when, stood_ms);
                }
            }
        }
    }

    /// The client's hand-over takes its next step, if it is free.
    fn hand_over(&mut self, index: usize) {
        let app_ms = self.faults.app_ms;
        loop {
            let now_ms = self.now_ms();
            let now_us = self.now_us;
            let device = &mut self.devices[index];
            let life = device.life;
            let Some(process) = &mut device.process else {
                return;
            };
            if !matches!(process.hand, Hand::Idle) {
                return;
            }
            let late = process
                .first_decided_ms
                .is_some_and(|first| now_ms - first >= SAVE_AFTER_MS);
            if process.batch.is_empty() || late {
                if !process.decided.is_empty() {
                    return self.save(index);
                }
                if process.batch.is_empty() {
                    process.batch = std::mem::take(&mut process.waiting);
                }
                if process.batch.is_empty() {
                    return;
                }
                continue;
            }
            let Some(next) = process.batch.pop_front() else {
                return;
            };
            let id = next.notify.id;
            let forgets = self.sabotage == Sabotage::ForgetsWhatItHad;
            if let Some(given) = process
                .memory
                .given(&id)
                .filter(|_| !forgets)
                .cloned()
            {
                process.decided.push(Decided { id, given, mark: 0 });
                continue;
            }
            if now_ms >= next.expires_at_ms {
                let given = Given::declined(EXPIRED);
                process.decided.push(Decided { id, given, mark: 0 });
                self.ledger.declined(PingId(id.0), index);
                continue;
            }
            if now_us >= next.over_at_us {
                self.ledger
                    .object(format!("{} reaches its app late", short(PingId(id.0))));
            }
            process.hand = Hand::Calling(id);
            self.ledger.called(PingId(id.0), index);
            self.say(|| format!("d{index} calls its app with {}", short(PingId(id.0))));
            let takes_us = self.random.random_range(0..=app_ms * 1_000);
            return self.at(self.now_us + takes_us, Ev::AppDone(index, life));
        }
    }

    fn app_done(&mut self, index: usize, life: u32) {
        let declines = self.random.random_bool(self.faults.declines);
        let now_ms = self.now_ms();
        let Some(process) = self.process(index, life) else {
            return;
        };
        let Hand::Calling(id) = std::mem::replace(&mut process.hand, Hand::Idle) else {
            return;
        };
        let given = if declines {
            Given::declined("not now")
        } else {
            Given::Acknowledged
        };
        process.memory.remember(id, given.clone());
        let mark = process.memory.mark();
        process.decided.push(Decided { id, given, mark });
        process.first_decided_ms.get_or_insert(now_ms);
        if declines {
            self.ledger.declined(PingId(id.0), index);
        }
        self.hand_over(index);
    }

    fn save(&mut self, index: usize) {
        let sabotage = self.sabotage;
        let device = &mut self.devices[index];
        let life = device.life;
        let Some(process) = &mut device.process else {
            return;
        };
        process.first_decided_ms = None;
        let records = process.memory.unsaved();
        if records.is_empty() {
            return self.decided(index);
        }
        process.hand = Hand::Saving(records);
        if sabotage == Sabotage::AcknowledgesBeforeSaving {
            self.decided(index);
        }
        let takes_us = self.up_to(SAVE_MS * 1_000);
        self.at(self.now_us + takes_us, Ev::Saved(index, life));
    }

    fn saved(&mut self, index: usize, life: u32) {
        let Some(process) = self.process(index, life) else {
            return;
        };
        let Hand::Saving(records) = std::mem::replace(&mut process.hand, Hand::Idle) else {
            return;
        };
        process.memory.saved();
        self.devices[index].disk.extend(records);
        self.decided(index);
    }

    /// Verdicts are safe: the session tells the server.
    fn decided(&mut self, index: usize) {
        let now_ms = self.now_ms();
        let device = &mut self.devices[index];
        let Some(process) = &mut device.process else {
            return;
        };
        let mut actions = Vec::new();
        for decided in std::mem::take(&mut process.decided) {
            let Some(machine) = &mut process.machine else {
                continue;
            };
            match decided.given {
                Given::Acknowledged => {
                    machine.handle_acknowledged(decided.id, now_ms, &mut actions);
                }
                Given::Declined(reason) => {
                    machine.handle_declined(decided.id, reason, now_ms, &mut actions);
                }
            }
            process.sent_mark = process.sent_mark.max(decided.mark);
        }
        if let Some(machine) = &mut process.machine {
            machine.flush(now_ms, &mut actions);
        }
        self.client_actions(index, actions);
        self.hand_over(index);
    }

    fn kill_client(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let Some(process) = device.process.take() else {
            return;
        };
        // What it had not written down is forgotten: exactly these may reach the app again.
        if self.sabotage != Sabotage::AcknowledgesBeforeSaving {
            for id in process.unsaved() {
                self.ledger.forgotten(PingId(id.0), index);
            }
        }
        device.life += 1;
        self.say(|| format!("d{index} is killed"));
        if let Some(conn) = process.conn {
            self.break_way(conn, Way::Up);
        }
        if !self.devices[index].gone {
            let wait_ms = 200 + self.up_to(3_000);
            self.after_ms(wait_ms, Ev::StartClient(index));
        }
    }

    // ---- Faults ----------------------------------------------------------------------------------------------------

    fn fault(&mut self, fault: Fault) {
        if self.healed && !matches!(fault, Fault::FreeDisk) {
            return;
        }
        self.say(|| format!("fault: {fault:?}"));
        match fault {
            Fault::KillServer => {
                let wait_ms = 100 + self.up_to(5_000);
                self.stop_server(false, wait_ms);
            }
            Fault::CutPower => {
                let wait_ms = 500 + self.up_to(5_000);
                self.stop_server(true, wait_ms);
            }
            Fault::KillClient => {
                let index = self.random.random_range(0..self.devices.len());
                self.kill_client(index);
            }
            Fault::CutLink => {
                if let Some(id) = self.any_link() {
                    let at_us = self.now_us + self.up_to(50_000);
                    if let Some(conn) = self.conns.get_mut(&id) {
                        conn.cut(&mut self.random);
                    }
                    self.at(at_us, Ev::Arrive(id, Way::Up));
                    self.at(at_us, Ev::Arrive(id, Way::Down));
                }
            }
            Fault::HalfOpen => {
                if let Some(conn) = self.any_link().and_then(|id| self.conns.get_mut(&id)) {
                    conn.silent = true;
                }
            }
            Fault::FillDisk => {
                let used = self.disk.used();
                let room = self.up_to(8 << 10);
                self.disk.set_capacity(Some(used + room));
            }
            Fault::FreeDisk => self.disk.set_capacity(None),
            Fault::FailSync => {
                let later = self.up_to(3);
                self.disk.fail_sync_in(later);
            }
            Fault::FailWrite => {
                let later = self.up_to(3);
                self.disk.fail_write_in(later);
            }
            Fault::Snapshot => {
                if self.house.is_some() {
                    self.store.snapshot();
                }
            }
        }
    }

    fn any_link(&mut self) -> Option<u64> {
        let ids: Vec<u64> = self.conns.keys().copied().collect();
        let at = self.random.random_range(0..ids.len().max(1));
        ids.get(at).copied()
    }

    fn heal(&mut self) {
        self.say(|| "everything heals".to_owned());
        self.healed = true;
        self.disk.set_capacity(None);
        // Devices that only wanted what is urgent want everything from now on.
        for index in 0..self.devices.len() {
            if self.devices[index].picky {
                self.kill_client(index);
            }
        }
    }

    // ---- The end ---------------------------------------------------------------------------------------------------

    /// Why it does not rest, for people.
    fn unrest(&self) -> String {
        let Some(house) = &self.house else {
            return "the server is away".to_owned();
        };
        for (index, device) in self.devices.iter().enumerate() {
            if device.gone {
                continue;
            }
            let Some(process) = &device.process else {
                return format!("d{index} is away");
            };
            if !process.machine.as_ref().is_some_and(ClientSession::is_attached) {
                return format!("d{index} is not attached");
            }
            if !matches!(process.hand, Hand::Idle) || !process.waiting.is_empty() {
                return format!("d{index} is busy");
            }
        }
        if !house.tickets.is_empty() {
            return format!("{:?} wait", house.tickets.values().next());
        }
        if house.writing || house.desks.iter().any(|desk| desk.outstanding || desk.core.has_offers()) {
            return "frames follow frames".to_owned();
        }
        if self.pairs_waiting() > 0 {
            return format!("{} rows wait", self.pairs_waiting());
        }
        "something is on its way".to_owned()
    }

    fn pairs_waiting(&self) -> usize {
        self.devices
            .iter()
            .map(|device| self.rows_of(device).map_or(0, |view| view.rows.len()))
            .sum()
    }

    fn rows_of(&self, device: &Device) -> Option<bellwire_server::delivery::MailboxView> {
        self.store
            .read_mailbox(&MailboxRead {
                device: DeviceId(device.id.0),
                all: true,
                ping: None,
                collapse: None,
                lowest: None,
                rows: Vec::new(),
            })
            .ok()
    }

    fn is_at_rest(&self) -> bool {
        let Some(house) = &self.house else {
            return false;
        };
        if house.disk != Disk::Open || !house.tickets.is_empty() || house.writing {
            return false;
        }
        let busy = self.queue.values().any(|event| match event {
            Ev::Tick | Ev::Heal => false,
            Ev::Publish(_)
            | Ev::Retry(..)
            | Ev::Revoke(_)
            | Ev::Wipe(_)
            | Ev::Arrive(..)
            | Ev::Dial(..)
            | Ev::AppDone(..)
            | Ev::Saved(..)
            | Ev::StartClient(_)
            | Ev::StartServer
            | Ev::ReadDone(..)
            | Ev::BeginFrame(_)
            | Ev::EndFrame(_)
            | Ev::Fault(_) => true,
        });
        if busy
            || house
                .desks
                .iter()
                .any(|desk| desk.outstanding || desk.core.has_offers())
        {
            return false;
        }
        let clients = self.devices.iter().all(|device| {
            device.gone
                || device.process.as_ref().is_some_and(|process| {
                    let attached = process
                        .machine
                        .as_ref()
                        .is_some_and(|machine| machine.is_attached() && machine.in_flight() == 0);
                    let silent = process
                        .conn
                        .and_then(|conn| self.conns.get(&conn))
                        .is_none_or(|conn| conn.silent || !conn.server);
                    attached && !silent && matches!(process.hand, Hand::Idle)
                })
        });
        clients && self.pairs_waiting() == 0
    }

    /// All leave in good order; then nobody may be awake.
    fn farewell(&mut self) {
        self.say(|| "everybody leaves".to_owned());
        let now_ms = self.now_ms();
        for index in 0..self.devices.len() {
            let mut actions = Vec::new();
            if let Some(process) = &mut self.devices[index].process {
                process.leaving = true;
                if let Some(machine) = &mut process.machine {
                    machine.leave(now_ms, &mut actions);
                }
            }
            self.client_actions(index, actions);
        }
        self.settle();
        let until_us = self.now_us + 400 * 1_000_000;
        while let Some((&(at_us, _), _)) = self.queue.first_key_value() {
            let awake = self.awake();
            if awake == 0 && self.house.as_ref().is_some_and(|house| house.links.is_empty()) {
                break;
            }
            let due_us = self.next_deadline_us().unwrap_or(u64::MAX);
            let next_us = at_us.min(due_us);
            if next_us > until_us || !self.ledger.objections.is_empty() {
                break;
            }
            self.now_us = self.now_us.max(next_us);
            self.clock.0.store(self.now_us, Ordering::Relaxed);
            if at_us <= due_us {
                if let Some((_, event)) = self.queue.pop_first() {
                    self.happen(event);
                }
            } else {
                self.mind_deadlines();
            }
            self.settle();
        }
        let awake = self.awake();
        if awake > 0 {
            self.ledger.object(format!("{awake} mailboxes stay awake"));
        }
    }

    fn awake(&self) -> usize {
        self.house.as_ref().map_or(0, |house| {
            house.desks.iter().map(|desk| desk.core.awake()).sum()
        })
    }

    fn look_at_the_store(&mut self) {
        // What is promised must also be there after the last crash.
        let seed = self.random.random();
        self.house = None;
        if let Err(error) = self.store.crash_and_reopen(seed) {
            return self.ledger.object(format!("the store does not open: {error}"));
        }
        let mut rows = 0;
        for index in 0..self.devices.len() {
            let Some(view) = self.rows_of(&self.devices[index]) else {
                return self.ledger.object("a mailbox cannot be read".to_owned());
            };
            let bytes: u64 = view.rows.iter().map(|row| u64::from(row.size)).sum();
            rows += view.rows.len() as u64;
            match view.summary {
                Some(summary) => {
                    if (summary.count as usize, summary.bytes) != (view.rows.len(), bytes) {
                        self.ledger.object(format!("the summary of d{index} is wrong"));
                    }
                }
                None => {
                    if !self.devices[index].gone || !view.rows.is_empty() {
                        self.ledger.object(format!("d{index} has no summary"));
                    }
                }
            }
        }
        let census = self.store.census().unwrap_or_default();
        let count = |kind: char| census.get(&kind).copied().unwrap_or(0);
        if count('r') != rows || count('x') != rows || count('c') > rows {
            self.ledger.object(format!("{rows} rows, and in the store {census:?}"));
        }
        if rows == 0 && count('b') > 0 {
            self.ledger.object(format!("bodies without rows: {census:?}"));
        }
        let store = &self.store;
        let devices = &self.devices;
        self.ledger.settle(|ping, device| {
            let page = store.pairs(ping, None, 100).ok()?;
            let id = DeviceId(devices[device].id.0);
            page.items
                .into_iter()
                .find(|(_, of, _)| *of == id)
                .map(|(_, _, state)| state)
        });
    }
}

impl Device {
    fn process_leaves(&self) -> bool {
        self.process.as_ref().is_none_or(|process| process.leaving)
    }
}

fn attach(session: SessionId, hello: &Hello) -> Attach {
    let window = hello.window.unwrap_or(WINDOW_DEFAULT);
    Attach {
        session,
        instance: u128::from_be_bytes(hello.instance.0),
        attempt: hello.attempt,
        window: window.clamp(WINDOW_MIN, WINDOW_MAX),
        min_urgency: hello.min_urgency.map_or(Urgency::VeryLow, urgency_inside),
        seen: hello
            .seen
            .iter()
            .map(|seen| {
                let verdict = match seen.verdict {
                    Verdict::Acknowledged => bellwire_server::delivery::Verdict::Acknowledged,
                    Verdict::Declined => bellwire_server::delivery::Verdict::Declined,
                };
                (PingId(seen.id.0), verdict)
            })
            .collect(),
    }
}

fn urgency_outside(urgency: Urgency) -> bellwire_protocol::Urgency {
    match urgency {
        Urgency::VeryLow => bellwire_protocol::Urgency::VeryLow,
        Urgency::Low => bellwire_protocol::Urgency::Low,
        Urgency::Normal => bellwire_protocol::Urgency::Normal,
        Urgency::High => bellwire_protocol::Urgency::High,
    }
}

fn urgency_inside(urgency: bellwire_protocol::Urgency) -> Urgency {
    match urgency {
        bellwire_protocol::Urgency::VeryLow => Urgency::VeryLow,
        bellwire_protocol::Urgency::Low => Urgency::Low,
        bellwire_protocol::Urgency::Normal => Urgency::Normal,
        bellwire_protocol::Urgency::High => Urgency::High,
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the rest of a frame is told by its name"
)]
fn told(frame: &DeviceFrame) -> String {
    let ids = |ids: &[Id]| {
        let ids: Vec<String> = ids.iter().map(|id| short(PingId(id.0))).collect();
        ids.join(" ")
    };
    match frame {
        DeviceFrame::Ack(Ack::UpTo(seq)) => format!("ack up to #{seq}"),
        DeviceFrame::Ack(Ack::Ids(named)) => format!("ack {}", ids(named)),
        DeviceFrame::Decline(decline) => {
            format!("decline {}: {}", ids(&[decline.id]), decline.reason)
        }
        DeviceFrame::Hello(hello) => {
            let seen: Vec<Id> = hello.seen.iter().map(|seen| seen.id).collect();
            format!("hello, attempt {}, seen [{}]", hello.attempt, ids(&seen))
        }
        other => other.name().to_owned(),
    }
}
