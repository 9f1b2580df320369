//! The generator: devices and backends of one peer, in a process of its own. It does one job, looks at the server's time and memory
//! while it does it, and says what it found.
//!
//! Every message carries its number. One array remembers when each was due, one when it was answered, one when a device
//! had it; figures are made of them afterwards, and what was answered and never came is a violation.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, sleep_until};

use super::broker::Target;
use super::fleet::{Backend, Device, Fleet, NUMBER_DIGITS, many};
use crate::child;
use crate::failure::{During, Failure, Outcome};
use crate::process;

/// Most messages that a run may publish. Bounds the memory of the generator at 24 bytes each.
const MESSAGES_MAX: usize = 5_000_000;

/// Messages a second that a closed loop is given room for.
const RATE_MAX: usize = 250_000;

/// Messages that a closed loop may have on their way to devices. What is published beyond that waits in the generator, so that
/// a server that answers before it delivers cannot run ahead of its devices.
const ON_THE_WAY_MAX: usize = 4_096;

/// How long a run waits after the last message for what is still on its way.
const SETTLE_MAX: Duration = Duration::from_secs(120);

/// How often a condition is looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Devices that connect and leave before anything is weighed, so that what a process makes once is there.
const WARM_UP: usize = 64;

/// Latencies above this count as this, in microseconds.
const LATENCY_MAX_MICROS: u64 = 120_000_000;

/// Devices and backends of one peer, started by `peers`
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct PeerLoad {
    /// A [`Job`] as JSON.
    job: String,
}

/// What is to be done.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Job {
    pub(super) target: Target,
    pub(super) part: Part,
    pub(super) devices: usize,
    /// Devices in the middle of connecting at a time.
    pub(super) connecting: usize,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Part {
    /// Devices connect and stay silent.
    Idle { settle: u32 },
    /// Devices are attached, and messages flow to them.
    Flow {
        sending: Sending,
        /// Messages a second by the clock; otherwise as fast as answers and devices allow.
        rate: Option<u32>,
        seconds: u32,
        warm_up: u32,
    },
    /// Devices are away while messages come, and then fetch them.
    Stored { sending: Sending },
}

/// How backends send.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Sending {
    /// Connections of backends.
    pub(super) connections: usize,
    /// Messages that one of them sends in one write before it waits for the answers.
    pub(super) burst: usize,
    /// Size of a message.
    pub(super) bytes: usize,
    /// Messages after which it ends.
    pub(super) messages: Option<usize>,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Found {
    pub(super) what: What,
    /// What must not happen and did.
    pub(super) violations: Vec<String>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum What {
    Idle(Idle),
    Flow(Flow),
    Stored(Stored),
}

/// Of one device, in bytes and microseconds of the server.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Idle {
    pub(super) absent_bytes: f64,
    pub(super) connection_bytes: f64,
    pub(super) kernel_bytes: Option<f64>,
    pub(super) cpu_micros: f64,
    pub(super) per_second: f64,
    pub(super) connected: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Flow {
    pub(super) seconds: f64,
    /// In that time.
    pub(super) answered: usize,
    pub(super) arrived: usize,
    pub(super) server_cpu_seconds: f64,
    pub(super) generator_cpu_seconds: f64,
    pub(super) to_answer: Latency,
    pub(super) to_device: Latency,
    /// Altogether.
    pub(super) published: usize,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Stored {
    pub(super) messages: usize,
    pub(super) publish_seconds: f64,
    pub(super) publish_cpu_seconds: f64,
    pub(super) to_answer: Latency,
    /// Growth of the server's memory, of each.
    pub(super) message_bytes: f64,
    /// From the first device that connects to the last message.
    pub(super) fetch_seconds: f64,
    pub(super) fetch_cpu_seconds: f64,
}

/// Milliseconds.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Latency {
    pub(super) p50: f64,
    pub(super) p90: f64,
    pub(super) p99: f64,
    pub(super) max: f64,
}

/// The child's side: does the job.
pub(crate) async fn serve(args: PeerLoad) -> Outcome<()> {
    process::raise_file_limit();
    let job: Job = child::job(&args.job)?;
    let found = match job.part {
        Part::Idle { settle } => idle(&job, settle).await?,
        Part::Flow {
            sending,
            rate,
            seconds,
            warm_up,
        } => flow(&job, sending, rate, seconds, warm_up).await?,
        Part::Stored { sending } => stored(&job, sending).await?,
    };
    child::say(&found)
}

// ---- Silent devices ------------------------------------------------------------------------------------------------

async fn idle(job: &Job, settle: u32) -> Outcome<Found> {
    let pid = job.target.pid;
    let settle = Duration::from_secs(settle.into());
    // A server's first device makes it ready; it is weighed with the others' growth divided among all of them.
    let before_any = process::memory(pid)?;
    let fleet = Fleet::prepare(&job.target, job.devices, job.connecting).await?;
    drop(attach(&fleet, job.devices.min(WARM_UP), job.connecting).await?);
    sleep(settle).await;
    let before = process::memory(pid)?;
    let kernel = process::kernel_memory();
    let cpu = process::cpu_time(pid)?;
    let started = Instant::now();
    let devices = attach(&fleet, job.devices, job.connecting).await?;
    let per_second = job.devices as f64 / started.elapsed().as_secs_f64();
    let ledger = Arc::new(Ledger::new(0));
    let mut listeners = listen(devices, &ledger);
    sleep(settle).await;
    let cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    let after = process::memory(pid)?;
    let kernel = kernel.zip(process::kernel_memory());
    let each = |before: u64, after: u64| (after as f64 - before as f64) / job.devices as f64;
    let mut violations = Vec::new();
    lost_devices(&mut listeners, &mut violations);
    Ok(Found {
        what: What::Idle(Idle {
            absent_bytes: each(before_any.own, before.own),
            connection_bytes: each(before.own, after.own),
            kernel_bytes: kernel.map(|(before, after)| each(before.sum(), after.sum()) / 2.0),
            cpu_micros: cpu.as_secs_f64() * 1e6 / job.devices as f64,
            per_second,
            connected: listeners.len(),
        }),
        violations,
    })
}

/// Devices with their numbers.
async fn attach(fleet: &Fleet, count: usize, at_once: usize) -> Outcome<Vec<(usize, Device)>> {
    many(count, at_once, |number| {
        let fleet = fleet.clone();
        async move { Ok((number, fleet.attach(number).await?)) }
    })
    .await
}

/// Lets every device listen in a task of its own.
fn listen(devices: Vec<(usize, Device)>, ledger: &Arc<Ledger>) -> JoinSet<Failure> {
    let count = devices.len();
    devices
        .into_iter()
        .map(|(number, device)| listen_one(device, number, count, Arc::clone(ledger)))
        .collect()
}

async fn listen_one(
    mut device: Device,
    number: usize,
    devices: usize,
    ledger: Arc<Ledger>,
) -> Failure {
    loop {
        let mut each = |content: &[u8]| ledger.arrival(content, number, devices);
        if let Err(failure) = device.take(&mut each).await {
            return failure;
        }
    }
}

/// Devices whose connection ended, in one sentence with the first reason.
fn lost_devices(listeners: &mut JoinSet<Failure>, violations: &mut Vec<String>) {
    let mut reasons = Vec::new();
    while let Some(ended) = listeners.try_join_next() {
        reasons.push(match ended {
            Ok(failure) => failure.to_string(),
            Err(error) => error.to_string(),
        });
    }
    if let Some(first) = reasons.first() {
        violations.push(format!(
            "{} devices lost their connection: {first}",
            reasons.len()
        ));
    }
}

// ---- Messages ------------------------------------------------------------------------------------------------------

/// What backends and devices share.
struct Ledger {
    start: Instant,
    /// Next message to publish.
    next: AtomicUsize,
    /// Nanoseconds since `start`, 0 while it has not happened, for each message by its number.
    due: Vec<AtomicU64>,
    answered: Vec<AtomicU64>,
    arrived: Vec<AtomicU64>,
    answers: AtomicUsize,
    arrivals: AtomicUsize,
    doubled: AtomicUsize,
    strange: AtomicUsize,
    stop: AtomicBool,
    /// Room on the way to devices.
    room: Semaphore,
}

impl Ledger {
    fn new(messages: usize) -> Ledger {
        let zeros = || (0..messages).map(|_| AtomicU64::new(0)).collect();
        Ledger {
            start: Instant::now(),
            next: AtomicUsize::new(0),
            due: zeros(),
            answered: zeros(),
            arrived: zeros(),
            answers: AtomicUsize::new(0),
            arrivals: AtomicUsize::new(0),
            doubled: AtomicUsize::new(0),
            strange: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            room: Semaphore::new(ON_THE_WAY_MAX),
        }
    }

    fn now(&self) -> u64 {
        self.since_start(Instant::now())
    }

    fn since_start(&self, at: Instant) -> u64 {
        // 0 means never, so the first nanosecond is nobody's.
        1 + u64::try_from(at.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    fn answer(&self, number: usize) {
        self.answered[number].store(self.now(), Ordering::Relaxed);
        self.answers.fetch_add(1, Ordering::Relaxed);
    }

    /// `device` of `devices` got this.
    fn arrival(&self, content: &[u8], device: usize, devices: usize) {
        let number = content
            .get(..NUMBER_DIGITS)
            .and_then(|digits| std::str::from_utf8(digits).ok()?.parse::<usize>().ok())
            .filter(|number| number % devices == device);
        let Some(arrived) = number.and_then(|number| self.arrived.get(number)) else {
            self.strange.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if arrived.swap(self.now(), Ordering::Relaxed) == 0 {
            self.arrivals.fetch_add(1, Ordering::Relaxed);
            self.room.add_permits(1);
        } else {
            self.doubled.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits until everything answered has arrived, or long enough.
    async fn settled(&self) {
        let give_up = Instant::now() + SETTLE_MAX;
        let missing =
            || self.arrivals.load(Ordering::Relaxed) < self.answers.load(Ordering::Relaxed);
        while missing() && Instant::now() < give_up {
            sleep(LOOK_EVERY).await;
        }
    }

    /// Nothing lost, nothing doubled, nothing invented.
    fn judge(&self, violations: &mut Vec<String>) {
        let happened = |time: &AtomicU64| time.load(Ordering::Relaxed) != 0;
        let lost = self
            .answered
            .iter()
            .zip(&self.arrived)
            .filter(|(answered, arrived)| happened(answered) && !happened(arrived))
            .count();
        let (doubled, strange) = (
            self.doubled.load(Ordering::Relaxed),
            self.strange.load(Ordering::Relaxed),
        );
        for (count, what) in [
            (lost, "messages were answered and reached no device"),
            (doubled, "messages came more than once"),
            (strange, "messages were not for the device that got them"),
        ] {
            if count > 0 {
                violations.push(format!("{count} {what}"));
            }
        }
        if self.answers.load(Ordering::Relaxed) == 0 {
            violations.push("not one message was answered".to_owned());
        }
    }

    fn within(&self, times: &[AtomicU64], from: u64, to: u64) -> usize {
        times
            .iter()
            .filter(|time| (from..=to).contains(&time.load(Ordering::Relaxed)))
            .count()
    }

    /// Time from when a message was due to what `done` says, of the messages of these numbers. Not of those that were due in some
    /// time: where a server is late, all of those were due long before.
    fn latency(&self, done: &[AtomicU64], numbers: Range<usize>) -> Latency {
        let mut micros = Histogram::<u64>::new_with_max(LATENCY_MAX_MICROS, 3)
            .unwrap_or_else(|_| unreachable!("the bounds are valid"));
        for (due, done) in self.due[numbers.clone()].iter().zip(&done[numbers]) {
            let (due, done) = (due.load(Ordering::Relaxed), done.load(Ordering::Relaxed));
            if due != 0 && done >= due {
                micros.saturating_record(((done - due) / 1_000).max(1));
            }
        }
        let at = |quantile| micros.value_at_quantile(quantile) as f64 / 1e3;
        Latency {
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: at(1.0),
        }
    }
}

/// A backend that publishes until it is told to stop or all is published.
struct Publisher {
    backend: Backend,
    ledger: Arc<Ledger>,
    sending: Sending,
    devices: usize,
    rate: Option<u32>,
    /// Wait for room on the way to devices.
    attached: bool,
    text: String,
}

impl Publisher {
    async fn run(mut self) -> Outcome<()> {
        let ledger = Arc::clone(&self.ledger);
        let limit = ledger.due.len();
        while !ledger.stop.load(Ordering::Relaxed) {
            if self.attached && self.rate.is_none() {
                // Closed when all are told to stop.
                let room = ledger.room.acquire_many(self.sending.burst as u32).await;
                let Ok(room) = room else {
                    return Ok(());
                };
                room.forget();
            }
            let first = ledger.next.fetch_add(self.sending.burst, Ordering::Relaxed);
            if first >= limit {
                return Ok(());
            }
            let numbers = first..limit.min(first + self.sending.burst);
            let due = match self.rate {
                None => Instant::now(),
                // Due times are the clock's. What is sent late, because the last answer was, counts from when it was due
                // (coordinated omission). Waking up a little after the due time is this program's fault and does not count.
                Some(rate) => {
                    let due = ledger.start + due(first, rate);
                    let late = Instant::now() >= due;
                    if !late {
                        sleep_until(due.into()).await;
                    }
                    if late { due } else { Instant::now() }
                }
            };
            for number in numbers.clone() {
                ledger.due[number].store(ledger.since_start(due), Ordering::Relaxed);
            }
            let answered = |number: usize| ledger.answer(number);
            self.backend
                .publish(numbers, self.devices, &self.text, &answered)
                .await?;
        }
        Ok(())
    }
}

/// When the n-th message is due.
fn due(number: usize, rate: u32) -> Duration {
    Duration::from_nanos((number as u128 * 1_000_000_000 / u128::from(rate)) as u64)
}

/// Connects backends. They publish from when they are let run.
async fn publishers(
    job: &Job,
    fleet: &Fleet,
    sending: Sending,
    rate: Option<u32>,
    attached: bool,
    ledger: &Arc<Ledger>,
) -> Outcome<Vec<Publisher>> {
    let mut publishers = Vec::with_capacity(sending.connections);
    for number in 0..sending.connections {
        publishers.push(Publisher {
            backend: fleet.backend(&job.target, number).await?,
            ledger: Arc::clone(ledger),
            sending,
            devices: job.devices,
            rate,
            attached,
            text: "x".repeat(sending.bytes.saturating_sub(NUMBER_DIGITS)),
        });
    }
    Ok(publishers)
}

async fn flow(
    job: &Job,
    sending: Sending,
    rate: Option<u32>,
    seconds: u32,
    warm_up: u32,
) -> Outcome<Found> {
    let fleet = Fleet::prepare(&job.target, job.devices, job.connecting).await?;
    let devices = attach(&fleet, job.devices, job.connecting).await?;
    let time = (seconds + warm_up) as usize;
    let room = rate.map_or(RATE_MAX, |rate| rate as usize) * time;
    let limit = sending.messages.unwrap_or(MESSAGES_MAX).min(room);
    if limit > MESSAGES_MAX {
        return Err(Failure::new(format!(
            "this rate over this time makes {limit} messages; at most {MESSAGES_MAX} are sent in a run"
        )));
    }
    // Connections first, so that the clock of due times starts with the first message.
    let waiting = Arc::new(Ledger::new(0));
    let mut publishers = publishers(job, &fleet, sending, rate, true, &waiting).await?;
    let ledger = Arc::new(Ledger::new(limit));
    let mut listeners = listen(devices, &ledger);
    let mut running = JoinSet::new();
    for mut publisher in publishers.drain(..) {
        publisher.ledger = Arc::clone(&ledger);
        running.spawn(publisher.run());
    }
    let (pid, me) = (job.target.pid, std::process::id());
    sleep(Duration::from_secs(warm_up.into())).await;
    let (cpu, own) = (process::cpu_time(pid)?, process::cpu_time(me)?);
    let taken = || ledger.next.load(Ordering::Relaxed).min(limit);
    let (from, first) = (ledger.now(), taken());
    let end = Instant::now() + Duration::from_secs(seconds.into());
    while Instant::now() < end && ledger.next.load(Ordering::Relaxed) < limit {
        sleep(LOOK_EVERY).await;
    }
    let (to, numbers) = (ledger.now(), first..taken());
    let server_cpu_seconds = process::cpu_time(pid)?.saturating_sub(cpu).as_secs_f64();
    let generator_cpu_seconds = process::cpu_time(me)?.saturating_sub(own).as_secs_f64();
    ledger.stop.store(true, Ordering::Relaxed);
    ledger.room.close();
    let mut violations = Vec::new();
    while let Some(done) = running.join_next().await {
        if let Err(failure) = done.during("publish")? {
            violations.push(failure.to_string());
        }
    }
    ledger.settled().await;
    lost_devices(&mut listeners, &mut violations);
    ledger.judge(&mut violations);
    let flow = Flow {
        seconds: (to - from) as f64 / 1e9,
        answered: ledger.within(&ledger.answered, from, to),
        arrived: ledger.within(&ledger.arrived, from, to),
        server_cpu_seconds,
        generator_cpu_seconds,
        to_answer: ledger.latency(&ledger.answered, numbers.clone()),
        to_device: ledger.latency(&ledger.arrived, numbers),
        published: ledger.answers.load(Ordering::Relaxed),
    };
    Ok(Found {
        what: What::Flow(flow),
        violations,
    })
}

async fn stored(job: &Job, sending: Sending) -> Outcome<Found> {
    let fleet = Fleet::prepare(&job.target, job.devices, job.connecting).await?;
    let messages = sending.messages.unwrap_or_default().min(MESSAGES_MAX);
    let ledger = Arc::new(Ledger::new(messages));
    let publishers = publishers(job, &fleet, sending, None, false, &ledger).await?;
    let pid = job.target.pid;
    let (memory, cpu) = (process::memory(pid)?, process::cpu_time(pid)?);
    let publishing = Instant::now();
    let mut running = JoinSet::new();
    for publisher in publishers {
        running.spawn(publisher.run());
    }
    let mut violations = Vec::new();
    while let Some(done) = running.join_next().await {
        if let Err(failure) = done.during("publish")? {
            violations.push(failure.to_string());
        }
    }
    let publish_seconds = publishing.elapsed().as_secs_f64();
    let publish_cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    let grown = process::memory(pid)?.own as f64 - memory.own as f64;

    let cpu = process::cpu_time(pid)?;
    let fetching = Instant::now();
    // Each listens as soon as it is connected, for its messages come with the welcome.
    let mut listeners = JoinSet::new();
    let connecting = many(job.devices, job.connecting, |number| {
        let (fleet, ledger) = (fleet.clone(), Arc::clone(&ledger));
        let devices = job.devices;
        async move {
            let device = fleet.attach(number).await?;
            Ok(tokio::spawn(listen_one(device, number, devices, ledger)))
        }
    });
    for listener in connecting.await? {
        listeners.spawn(async move {
            listener
                .await
                .unwrap_or_else(|error| Failure::new(error.to_string()))
        });
    }
    ledger.settled().await;
    let fetch_seconds = fetching.elapsed().as_secs_f64();
    let fetch_cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    lost_devices(&mut listeners, &mut violations);
    ledger.judge(&mut violations);
    Ok(Found {
        what: What::Stored(Stored {
            messages: ledger.answers.load(Ordering::Relaxed),
            publish_seconds,
            publish_cpu_seconds: publish_cpu.as_secs_f64(),
            to_answer: ledger.latency(&ledger.answered, 0..messages),
            message_bytes: grown / messages.max(1) as f64,
            fetch_seconds,
            fetch_cpu_seconds: fetch_cpu.as_secs_f64(),
        }),
        violations,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_did_not_come_or_came_twice_is_told() {
        let ledger = Ledger::new(3);
        (0..3).for_each(|number| ledger.answer(number));
        ledger.arrival(b"000000000000xxx", 0, 2);
        ledger.arrival(b"000000000001", 1, 2);
        ledger.arrival(b"000000000001", 1, 2);
        ledger.arrival(b"000000000002", 1, 2);
        ledger.arrival(b"short", 0, 2);
        let mut violations = Vec::new();
        ledger.judge(&mut violations);
        assert_eq!(
            violations,
            [
                "1 messages were answered and reached no device",
                "1 messages came more than once",
                "2 messages were not for the device that got them",
            ]
        );
    }

    #[test]
    fn a_message_counts_from_when_it_was_due() {
        let ledger = Ledger::new(2);
        for (number, due, arrived) in [(0, 1_000_000, 3_000_000), (1, 9_000_000, 9_500_000)] {
            ledger.due[number].store(due, Ordering::Relaxed);
            ledger.arrived[number].store(arrived, Ordering::Relaxed);
        }
        let latency = ledger.latency(&ledger.arrived, 0..1);
        assert!((1.99..=2.01).contains(&latency.p50), "{latency:?}");
        assert_eq!(latency.p50, latency.max);
        let latency = ledger.latency(&ledger.arrived, 1..2);
        assert!((0.49..=0.51).contains(&latency.p50), "{latency:?}");
    }
}
