//! Devices: many connections of one process, which take what comes, acknowledge it and count it.

mod play;

use std::hash::{BuildHasher, RandomState};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures_util::future::try_join_all;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use super::{Recorded, add, histogram};
use crate::api::Registered;
use crate::child::Child;
use crate::failure::{During, Failure, Outcome};
use crate::fleet::Carriers;

pub(crate) use play::{PlayDevices, play};

/// Devices over WebSocket that one process plays at most: each takes a file.
const WEBSOCKETS_OF_A_PROCESS: usize = 15_000;

/// Devices over QUIC that one process plays at most, so that a large fleet has more than one core's worth of handshakes.
const QUIC_OF_A_PROCESS: usize = 50_000;

/// Longest that a question takes that asks for no work.
const ANSWER_MAX: Duration = Duration::from_secs(120);

/// Longest that connecting all devices takes.
const CONNECT_MAX: Duration = Duration::from_secs(1_800);

/// What a process of devices is.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Setup {
    address: SocketAddr,
    /// PEM.
    authority: String,
    carriers: Carriers,
    /// A server of Bellwire; otherwise a floor, which only takes connections.
    bellwire: bool,
    /// Where they connect from, so that each process has ports of its own.
    source: IpAddr,
    /// Connections resume the TLS session of the one before.
    resume: bool,
    /// Devices of all processes together: the n-th takes the single pings whose number modulo this is n.
    total: usize,
    /// Place of the first one.
    first: usize,
    devices: Vec<Registered>,
    /// Devices of a floor, which are not registered.
    strangers: usize,
}

/// What it is told. Each is answered by one [`Told`].
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Order {
    /// Connect all, so many at a time; `again`: until each of them is let in.
    Attach {
        at_once: usize,
        again: bool,
    },
    /// Disconnect all.
    Leave,
    /// Connect and disconnect by turns, so often in all.
    Cycle {
        count: usize,
        at_once: usize,
    },
    /// From now on measure the pings due in this time.
    Watch {
        from: u64,
        to: u64,
    },
    Count,
    Latency,
}

/// What it answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum Told {
    Ready,
    Attached(Attached),
    Counts(Counts),
    Latency(Recorded),
}

/// What connecting took.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) connections: u64,
    pub(crate) resumed: u64,
    /// Attempts that came to nothing and were made again.
    pub(crate) again: u64,
    pub(crate) seconds: f64,
}

/// What came.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Notifications, each once.
    pub(crate) arrived: u64,
    /// Came once more and said so (`redelivered`), because their acknowledgement was lost.
    pub(crate) redelivered: u64,
    /// Came once more and did not say so.
    pub(crate) doubled: u64,
    /// Not for this device, or not ours.
    pub(crate) strange: u64,
    /// Devices that are connected.
    pub(crate) attached: u64,
    /// Sessions that ended by themselves.
    pub(crate) lost: u64,
    /// Why the first one did.
    pub(crate) first_loss: Option<String>,
}

/// Where devices connect to.
pub(crate) struct Place<'a> {
    pub(crate) address: SocketAddr,
    /// PEM.
    pub(crate) authority: &'a [u8],
    pub(crate) bellwire: bool,
}

/// Devices as processes.
pub(crate) struct Fleet {
    processes: Vec<Child>,
    pub(crate) devices: usize,
}

impl Fleet {
    /// Makes the processes; nobody connects yet.
    pub(crate) async fn start(
        place: &Place<'_>,
        carriers: Carriers,
        devices: &[Registered],
        resume: bool,
    ) -> Outcome<Fleet> {
        let total = devices.len();
        Fleet::start_in(place, carriers, devices, (0, 0), resume, total).await
    }

    /// Makes those at the start of a list of `total` devices that all get pings.
    pub(crate) async fn sample(
        place: &Place<'_>,
        carriers: Carriers,
        devices: &[Registered],
        total: usize,
    ) -> Outcome<Fleet> {
        Fleet::start_in(place, carriers, devices, (0, 0), false, total).await
    }

    /// Makes those from `first` to the end of a list of devices that all get pings.
    pub(crate) async fn rest(
        place: &Place<'_>,
        carriers: Carriers,
        devices: &[Registered],
        first: usize,
    ) -> Outcome<Fleet> {
        let some = devices.get(first..).unwrap_or_default();
        Fleet::start_in(place, carriers, some, (first, 0), false, devices.len()).await
    }

    /// Devices of a floor.
    pub(crate) async fn strangers(
        place: &Place<'_>,
        carriers: Carriers,
        count: usize,
        resume: bool,
    ) -> Outcome<Fleet> {
        Fleet::start_in(place, carriers, &[], (0, count), resume, count).await
    }

    async fn start_in(
        place: &Place<'_>,
        carriers: Carriers,
        devices: &[Registered],
        (offset, strangers): (usize, usize),
        resume: bool,
        total: usize,
    ) -> Outcome<Fleet> {
        let played = devices.len() + strangers;
        let of_a_process = match carriers {
            Carriers::Quic => QUIC_OF_A_PROCESS,
            Carriers::Websocket | Carriers::Plain | Carriers::Both => WEBSOCKETS_OF_A_PROCESS,
        };
        let count = played.div_ceil(of_a_process).max(1);
        let authority = String::from_utf8_lossy(place.authority).into_owned();
        let mut processes = Vec::new();
        for process in 0..count {
            let first = played * process / count;
            let end = played * (process + 1) / count;
            let setup = Setup {
                address: place.address,
                authority: authority.clone(),
                carriers,
                bellwire: place.bellwire,
                source: some_loopback_address().into(),
                resume,
                total,
                first: offset + first,
                devices: devices.get(first..end).unwrap_or_default().to_vec(),
                strangers: if strangers > 0 { end - first } else { 0 },
            };
            let mut child = Child::start("play-devices", &())?;
            ask(&mut child, &setup, ANSWER_MAX).await?;
            processes.push(child);
        }
        Ok(Fleet {
            processes,
            devices: played,
        })
    }

    pub(crate) fn pids(&self) -> Outcome<Vec<u32>> {
        self.processes.iter().map(Child::pid).collect()
    }

    async fn ask_all(&mut self, order: &Order, at_most: Duration) -> Outcome<Vec<Told>> {
        let asked = self
            .processes
            .iter_mut()
            .map(|child| ask(child, order, at_most));
        try_join_all(asked).await
    }

    async fn connecting(&mut self, order: &Order) -> Outcome<Attached> {
        let mut whole = Attached::default();
        for told in self.ask_all(order, CONNECT_MAX).await? {
            let Told::Attached(one) = told else {
                return Err(Failure::new("devices answered something else"));
            };
            whole.connections += one.connections;
            whole.resumed += one.resumed;
            whole.again += one.again;
            whole.seconds = whole.seconds.max(one.seconds);
        }
        Ok(whole)
    }

    /// Connects all, about `at_once` at a time. `again`: devices that are turned away try again until they are let in.
    pub(crate) async fn attach(&mut self, at_once: usize, again: bool) -> Outcome<Attached> {
        let at_once = at_once.div_ceil(self.processes.len());
        self.connecting(&Order::Attach { at_once, again }).await
    }

    /// Lets each process make `count` connections in all, each of which ends at once.
    pub(crate) async fn cycle(&mut self, count: usize, at_once: usize) -> Outcome<Attached> {
        let processes = self.processes.len();
        let (count, at_once) = (count.div_ceil(processes), at_once.div_ceil(processes));
        self.connecting(&Order::Cycle { count, at_once }).await
    }

    pub(crate) async fn leave(&mut self) -> Outcome<()> {
        self.ask_all(&Order::Leave, ANSWER_MAX).await.map(drop)
    }

    /// From now on the pings due in this time are measured, and those before forgotten.
    pub(crate) async fn watch(&mut self, from: u64, to: u64) -> Outcome<()> {
        self.ask_all(&Order::Watch { from, to }, ANSWER_MAX)
            .await
            .map(drop)
    }

    /// All of them together, since they were started.
    pub(crate) async fn counts(&mut self) -> Outcome<Counts> {
        let mut whole = Counts::default();
        for told in self.ask_all(&Order::Count, ANSWER_MAX).await? {
            let Told::Counts(one) = told else {
                return Err(Failure::new("devices answered something else"));
            };
            whole.arrived += one.arrived;
            whole.redelivered += one.redelivered;
            whole.doubled += one.doubled;
            whole.strange += one.strange;
            whole.attached += one.attached;
            whole.lost += one.lost;
            whole.first_loss = whole.first_loss.or(one.first_loss);
        }
        Ok(whole)
    }

    /// From when a ping was due until a device had it, microseconds.
    pub(crate) async fn latency(&mut self) -> Outcome<Histogram<u64>> {
        let mut micros = histogram();
        for told in self.ask_all(&Order::Latency, ANSWER_MAX).await? {
            let Told::Latency(one) = told else {
                return Err(Failure::new("devices answered something else"));
            };
            add(&mut micros, &one);
        }
        Ok(micros)
    }

    pub(crate) async fn stop(self) {
        for child in self.processes {
            child.stop().await;
        }
    }
}

/// An address of this machine by chance. Each process of devices has its own: ports of one address are used up by those who connect
/// from it now, and by those who did within the last minute.
fn some_loopback_address() -> Ipv4Addr {
    let [second, third, fourth, ..] = RandomState::new().hash_one(()).to_ne_bytes();
    // Neither the addresses that others use, nor those that end like a network's own.
    Ipv4Addr::new(127, second | 1, third, fourth.clamp(1, 254))
}

async fn ask(child: &mut Child, what: &impl Serialize, at_most: Duration) -> Outcome<Told> {
    let line = serde_json::to_string(what).during("write down what devices do")?;
    child.tell(&line).await?;
    child
        .hear::<Result<Told, String>>(at_most)
        .await?
        .map_err(Failure::new)
}
