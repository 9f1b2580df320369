//! One run: a queue of things that happen, the server, the devices and the links between them, on one thread and one clock.

mod client;
mod links;
mod plan;
mod publisher;
mod rest;
mod server;
mod trouble;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bellwire_client::parts::Given;
use bellwire_protocol::limits::{
    DEVICE_FRAME_MAX_BYTES, HELLO_TIMEOUT_MS, SERVER_JSON_FRAME_MAX_BYTES, SILENCE_PERCENT,
    WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN,
};
use bellwire_protocol::{
    Ack, ClientAction, ClientSession, Code, Codec, Content, DeviceFrame, EXPIRED, FrameReader,
    Goaway, GoawayReason, Hello, Id, KeepAlive, ReconnectRange, ReconnectWhen, Secret,
    ServerAction, ServerFrame, ServerSession, SharedNotify, Topics, Verdict, Welcome, Withdraw,
};
use bellwire_server::delivery::{
    Acknowledged, AppId, Attach, Closing, CollapseKey, CommitFailure, DeviceId, Disk, Effect,
    Enqueue, Event, Held, Hold, MailboxRead, Notice, Notification, Now, OverflowRule, PingId,
    Policy, Refusal, Rejection, RowKey, SessionId, Stock, Urgency, WireSlot,
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
    Release(usize, usize),
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
                self.look_at_the_count();
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
                self.ledger
                    .object(format!("it does not come to rest: {why}"));
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
            Ev::Release(number, device) => self.release(number, device),
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
}
