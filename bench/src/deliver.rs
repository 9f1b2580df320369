//! How many pings a second, and how fast? Backends on keep-alive connections post, devices acknowledge, and both sides are
//! counted: a run in which a ping is lost or doubled has failed, however fast it was.
//!
//! Every ping carries its number. One array remembers when each was posted (or should have been), one when it was
//! answered, one when a device had it; figures are made of them afterwards.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bellwire_protocol::{Ack, DeviceFrame, Id, ServerFrame};
use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::{Instant as TokioInstant, sleep, sleep_until};

use crate::api::{self, Connection, Metrics, Registered};
use crate::device::{Dialer, Link};
use crate::failure::{During, Failure, Outcome};
use crate::fleet::{self, Carriers};
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::server::{self, Server};

/// Most pings of a run. Bounds the memory of the generator at 24 bytes each.
const PINGS_MAX: usize = 20_000_000;

/// Pings that an absent device gets at most, with content up to a KiB: below the limits of a mailbox, 1,000 and 1 MiB, so
/// that none is evicted.
const PINGS_OF_AN_ABSENT_DEVICE_MAX: usize = 800;

/// How long the run waits after the last post for what is still on its way.
const SETTLE_MAX: Duration = Duration::from_secs(60);

/// How often a condition is looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// Pause after a refusal, so that a server in trouble is not hammered.
const AFTER_REFUSAL: Duration = Duration::from_millis(20);

/// No rate of the key that posts, nor of the devices.
const UNLIMITED: [&str; 3] = [
    "LIMITS__PINGS_PER_SECOND=10000000",
    "LIMITS__PING_BURST=100000000",
    "LIMITS__DEVICE_PINGS_PER_SECOND=0",
];

/// Connections that devices open at a time.
const CONNECTING: usize = 32;

/// Digits of the number that each ping carries.
const NUMBER_DIGITS: usize = 12;

/// Violations of one kind that are spelled out.
const VIOLATIONS_SHOWN: usize = 5;

/// Cores that the generator may use before the report says so.
const BUSY_CORES: f64 = 0.9;

/// Latencies above this are counted as this, in microseconds.
const LATENCY_MAX_MICROS: u64 = 120_000_000;

/// Post pings to devices and count what arrives
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Deliver {
    /// The server binary; default: `bellwire` beside this program
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    pub(crate) server: Option<PathBuf>,
    /// A setting of the server, such as STORE__ENGINE=memory; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Devices
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub(crate) devices: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    pub(crate) carrier: Carriers,
    /// Keep-alive HTTP/1.1 connections that post, each one request at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connections: u32,
    /// Measured time, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    pub(crate) seconds: u32,
    /// Time before that, not measured, seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=600))]
    pub(crate) warm_up: u32,
    /// Pings a second, posted by the clock whether or not the server keeps up; latency counts from when a ping was due.
    /// Default: as fast as answers come
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) rate: Option<u32>,
    /// Stop after so many pings
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=PINGS_MAX as i64))]
    pub(crate) pings: Option<u32>,
    /// Pings of one request: posted to the batch endpoint if more than one
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000), conflicts_with = "rate")]
    pub(crate) batch: u32,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(NUMBER_DIGITS as i64..=4_096))]
    pub(crate) bytes: u32,
    /// The devices are away while pings are posted, and come afterwards to fetch them
    #[arg(long)]
    pub(crate) absent: bool,
    /// A few pings to a few devices, to see that everything arrives; speed is not looked at
    #[arg(long)]
    pub(crate) smoke: bool,
}

/// What the senders and the devices share.
struct Ledger {
    start: Instant,
    /// Next ping to post.
    next: AtomicUsize,
    /// Nanoseconds since `start`, 0 while it has not happened, for each ping by its number.
    posted: Vec<AtomicU64>,
    answered: Vec<AtomicU64>,
    arrived: Vec<AtomicU64>,
    accepted: AtomicUsize,
    acknowledged: AtomicUsize,
    refused: AtomicUsize,
    doubled: AtomicUsize,
    strange: AtomicUsize,
    stop: AtomicBool,
    first_refusal: std::sync::Mutex<Option<String>>,
}

impl Ledger {
    fn new(pings: usize) -> Ledger {
        let zeros = || (0..pings).map(|_| AtomicU64::new(0)).collect();
        Ledger {
            start: Instant::now(),
            next: AtomicUsize::new(0),
            posted: zeros(),
            answered: zeros(),
            arrived: zeros(),
            accepted: AtomicUsize::new(0),
            acknowledged: AtomicUsize::new(0),
            refused: AtomicUsize::new(0),
            doubled: AtomicUsize::new(0),
            strange: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            first_refusal: std::sync::Mutex::new(None),
        }
    }

    fn now(&self) -> u64 {
        self.since_start(Instant::now())
    }

    fn since_start(&self, at: Instant) -> u64 {
        // 0 means never, so the first nanosecond is nobody's.
        1 + u64::try_from(at.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX)
    }

    fn refusal(&self, text: impl FnOnce() -> String) {
        if self.refused.fetch_add(1, Ordering::Relaxed) == 0
            && let Ok(mut first) = self.first_refusal.lock()
        {
            *first = Some(text());
        }
    }

    fn arrival(&self, title: Option<&str>) {
        let number = title.and_then(|title| title.parse::<usize>().ok());
        let Some(arrived) = number.and_then(|number| self.arrived.get(number)) else {
            self.strange.fetch_add(1, Ordering::Relaxed);
            return;
        };
        if arrived.swap(self.now(), Ordering::Relaxed) == 0 {
            self.acknowledged.fetch_add(1, Ordering::Relaxed);
        } else {
            self.doubled.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Deliver {
    fn smoke(self) -> Deliver {
        Deliver {
            devices: 8,
            connections: 4,
            seconds: 60,
            warm_up: 0,
            pings: Some(400),
            ..self
        }
    }

    /// How many pings the run may post at most.
    fn limit(&self) -> Outcome<usize> {
        let mut limit = self.pings.map_or(PINGS_MAX, |pings| pings as usize);
        if self.absent {
            limit = limit.min(self.devices as usize * PINGS_OF_AN_ABSENT_DEVICE_MAX);
        }
        if let Some(rate) = self.rate {
            let seconds = u64::from(self.seconds + self.warm_up);
            let pings = usize::try_from(u64::from(rate) * seconds).unwrap_or(PINGS_MAX);
            if pings > PINGS_MAX {
                return Err(Failure::new(format!(
                    "--rate over this time makes {pings} pings; at most {PINGS_MAX} are posted in a run"
                )));
            }
            limit = limit.min(pings);
        }
        Ok(limit)
    }
}

/// Runs the workload.
pub(crate) async fn run(args: Deliver, progress: Progress) -> Outcome<Report> {
    let args = if args.smoke { args.smoke() } else { args };
    let files = process::raise_file_limit();
    if u64::from(args.devices) + u64::from(args.connections) + process::FILES_RESERVED > files {
        return Err(Failure::new(format!(
            "{} devices and {} connections do not fit into {files} open files",
            args.devices, args.connections
        )));
    }
    let mut report = Report::new("deliver", &args)?;
    let binary = server::binary(args.server.as_deref())?;
    let mut settings = args.settings.clone();
    if args.batch > 1 {
        // What is measured is the server and not the rate that a key is allowed.
        settings.splice(0..0, UNLIMITED.map(str::to_owned));
    }
    let mut server = Server::start(&binary, &settings).await?;
    let listen = server.listen.clone();
    let devices: Arc<[Registered]> =
        fleet::register(listen.api, &server.key, args.devices as usize, progress)
            .await?
            .into();
    let dialer = Dialer::new(listen.devices, &server.authority, true)?;
    let limit = args.limit()?;
    let ledger = Arc::new(Ledger::new(limit));
    let mut listeners = JoinSet::new();
    if !args.absent {
        attach_all(&dialer, &devices, &args, &ledger, &mut listeners, progress).await?;
    }

    let before = Look::at(&server).await?;
    let posting = post_all(&args, &server, &devices, &ledger, limit, progress).await?;
    server.check()?;
    if args.absent {
        let attaching = Instant::now();
        attach_all(&dialer, &devices, &args, &ledger, &mut listeners, progress).await?;
        wait_for_all(&ledger).await;
        let seconds = attaching.elapsed().as_secs_f64();
        report.push(Figure::new(
            "fetched after attaching, connecting included",
            ledger.acknowledged.load(Ordering::Relaxed) as f64 / seconds,
            "notifications/s",
        ));
    } else {
        wait_for_all(&ledger).await;
    }
    // Where a session ends before the run does, it is counted below as well: what it had in flight comes to nobody.
    while let Some(ended) = listeners.try_join_next() {
        let why = ended.during("listen")?;
        report
            .violations
            .push(format!("a device lost its session: {why}"));
    }
    judge(&mut report, &ledger, &before, listen.operations).await?;
    summarise(&mut report, &args, &ledger, &posting);
    listeners.shutdown().await;
    if !server.stop().await {
        report.violation("the server did not end by itself after SIGTERM");
    }
    Ok(report)
}

/// Connects every device and lets each listen in a task of its own.
async fn attach_all(
    dialer: &Dialer,
    devices: &Arc<[Registered]>,
    args: &Deliver,
    ledger: &Arc<Ledger>,
    listeners: &mut JoinSet<Failure>,
    progress: Progress,
) -> Outcome<()> {
    let links = fleet::attach(dialer, devices, args.carrier, CONNECTING, progress).await?;
    for (link, _) in links {
        listeners.spawn(listen(link, Arc::clone(ledger)));
    }
    Ok(())
}

/// A device: takes what comes and acknowledges it, what came together by one frame.
async fn listen(mut link: Link, ledger: Arc<Ledger>) -> Failure {
    loop {
        let mut last = None;
        let mut next = Some(link.receive().await);
        while let Some(frame) = next {
            match frame {
                Ok(ServerFrame::Notify(notify)) => {
                    ledger.arrival(notify.content.title.as_deref());
                    last = Some(notify.seq);
                }
                Ok(ServerFrame::Pong | ServerFrame::Withdraw(_) | ServerFrame::Subscribed(_)) => {}
                Ok(
                    frame @ (ServerFrame::Welcome(_)
                    | ServerFrame::Goaway(_)
                    | ServerFrame::Error(_)),
                ) => return Failure::new(format!("the server said {frame:?}")),
                Err(failure) => return failure,
            }
            next = link.receive_ready();
        }
        if let Some(seq) = last
            && let Err(failure) = link.send(&DeviceFrame::Ack(Ack::UpTo(seq))).await
        {
            return failure;
        }
    }
}

/// The measured part of posting.
struct Posting {
    /// When it began and ended, on the ledger's clock.
    from: u64,
    to: u64,
    server_cpu: Duration,
    own_cpu: Duration,
    syncs: f64,
    /// Numbers of the first ping posted in it, and of the first one not posted at all.
    first: usize,
    end: usize,
}

async fn post_all(
    args: &Deliver,
    server: &Server,
    devices: &Arc<[Registered]>,
    ledger: &Arc<Ledger>,
    limit: usize,
    progress: Progress,
) -> Outcome<Posting> {
    let bar = progress.wait("post pings");
    let mut senders = JoinSet::new();
    for _ in 0..args.connections {
        let sender = Sender::open(server, devices, ledger, args).await?;
        senders.spawn(sender.run(limit));
    }
    let me = std::process::id();
    let pid = server.pid();
    let operations = server.listen.operations;
    sleep(Duration::from_secs(args.warm_up.into())).await;
    let syncs_before = Metrics::read(operations).await?.sum(SYNCS, "");
    let (cpu_before, own_before) = (process::cpu_time(pid)?, process::cpu_time(me)?);
    let (from, first) = (ledger.now(), ledger.next.load(Ordering::Relaxed).min(limit));
    let measured = TokioInstant::now() + Duration::from_secs(args.seconds.into());
    // Ends early when all pings are posted.
    let posted_all = async {
        while !senders.is_empty() && ledger.next.load(Ordering::Relaxed) < limit + senders.len() {
            sleep(LOOK_EVERY).await;
        }
    };
    tokio::select! {
        () = sleep_until(measured) => {}
        () = posted_all => {}
    }
    let (to, end) = (ledger.now(), ledger.next.load(Ordering::Relaxed).min(limit));
    let server_cpu = process::cpu_time(pid)?.saturating_sub(cpu_before);
    let own_cpu = process::cpu_time(me)?.saturating_sub(own_before);
    let syncs = Metrics::read(operations).await?.sum(SYNCS, "") - syncs_before;
    ledger.stop.store(true, Ordering::Relaxed);
    while let Some(done) = senders.join_next().await {
        done.during("post pings")??;
    }
    bar.done();
    Ok(Posting {
        from,
        to,
        server_cpu,
        own_cpu,
        syncs,
        first,
        end,
    })
}

/// One backend connection.
struct Sender {
    connection: Connection,
    /// One ping, and where its device and number stand in it.
    line: String,
    device_at: usize,
    number_at: usize,
    /// The request of so many pings, and where its body starts.
    request: Vec<u8>,
    start: usize,
    pings: usize,
    host: SocketAddr,
    key: String,
    batch: usize,
    devices: Arc<[Registered]>,
    ledger: Arc<Ledger>,
    rate: Option<u32>,
}

impl Sender {
    async fn open(
        server: &Server,
        devices: &Arc<[Registered]>,
        ledger: &Arc<Ledger>,
        args: &Deliver,
    ) -> Outcome<Sender> {
        let filler = "x".repeat(args.bytes as usize - NUMBER_DIGITS);
        let placeholder = "a".repeat(Id::TEXT_LEN);
        let zeros = "0".repeat(NUMBER_DIGITS);
        let before_device = r#"{"to":{"device":""#;
        let before_number = r#""},"title":""#;
        let line =
            format!(r#"{before_device}{placeholder}{before_number}{zeros}","body":"{filler}"}}"#);
        let device_at = before_device.len();
        Ok(Sender {
            connection: Connection::open(server.listen.api).await?,
            line,
            device_at,
            number_at: device_at + Id::TEXT_LEN + before_number.len(),
            request: Vec::new(),
            start: 0,
            pings: 0,
            host: server.listen.api,
            key: server.key.clone(),
            batch: args.batch as usize,
            devices: Arc::clone(devices),
            ledger: Arc::clone(ledger),
            rate: args.rate,
        })
    }

    async fn run(mut self, limit: usize) -> Outcome<()> {
        let ledger = Arc::clone(&self.ledger);
        while !ledger.stop.load(Ordering::Relaxed) {
            let number = ledger.next.fetch_add(self.batch, Ordering::Relaxed);
            if number >= limit {
                break;
            }
            let pings = self.batch.min(limit - number);
            self.make_room(pings);
            if self.batch > 1 {
                self.post_batch(number, pings).await?;
                continue;
            }
            if let Some(rate) = self.rate {
                // Due times are the clock's. A connection that comes late, because its last answer did, posts at once, and
                // the ping counts from when it was due: a backend would have waited so long (coordinated omission). Waking
                // up a little after the due time is this program's fault and does not count.
                let due = ledger.start + due(number, rate);
                let late = Instant::now() >= due;
                if !late {
                    sleep_until(due.into()).await;
                }
                let from = if late { due } else { Instant::now() };
                ledger.posted[number].store(ledger.since_start(from), Ordering::Relaxed);
            } else {
                ledger.posted[number].store(ledger.now(), Ordering::Relaxed);
            }
            self.address(0, number);
            let answer = self.connection.exchange(&self.request).await?;
            if answer.status == 202 {
                ledger.answered[number].store(ledger.now(), Ordering::Relaxed);
                ledger.accepted.fetch_add(1, Ordering::Relaxed);
                continue;
            }
            ledger.refusal(|| {
                let body = String::from_utf8_lossy(self.connection.body(answer));
                format!("{}: {body}", answer.status)
            });
            sleep(AFTER_REFUSAL).await;
        }
        Ok(())
    }

    /// Posts a batch; each of its pings counts from the moment at which all of them are posted.
    async fn post_batch(&mut self, first: usize, pings: usize) -> Outcome<()> {
        let ledger = Arc::clone(&self.ledger);
        for place in 0..pings {
            self.address(place, first + place);
        }
        let now = ledger.now();
        for posted in &ledger.posted[first..first + pings] {
            posted.store(now, Ordering::Relaxed);
        }
        let mut place = 0;
        let mut refused = false;
        let mut take = |line: &[u8]| {
            let answered = ledger.answered.get(first + place).filter(|_| place < pings);
            let accepted = line.windows(ACCEPTED.len()).any(|part| part == ACCEPTED);
            match answered {
                Some(answered) if accepted => {
                    answered.store(ledger.now(), Ordering::Relaxed);
                    ledger.accepted.fetch_add(1, Ordering::Relaxed);
                }
                Some(_) | None => {
                    refused = true;
                    ledger.refusal(|| String::from_utf8_lossy(line).into_owned());
                }
            }
            place += 1;
        };
        let answer = self
            .connection
            .exchange_lines(&self.request, &mut take)
            .await?;
        if let Some(answer) = answer {
            refused = true;
            ledger.refusal(|| {
                let body = String::from_utf8_lossy(self.connection.body(answer));
                format!("{}: {body}", answer.status)
            });
        } else if place != pings {
            return Err(Failure::new(format!(
                "a batch of {pings} pings has {place} answers"
            )));
        }
        if refused {
            sleep(AFTER_REFUSAL).await;
        }
        Ok(())
    }

    /// Makes the request one of so many pings.
    fn make_room(&mut self, pings: usize) {
        if self.pings == pings {
            return;
        }
        (self.request, self.start) = if self.batch > 1 {
            let lines = format!("{}\n", self.line).repeat(pings);
            let kind = "application/x-ndjson";
            api::post_as(kind, "/v1/pings/batch", self.host, &self.key, &lines)
        } else {
            api::post("/v1/pings", self.host, &self.key, &self.line)
        };
        self.pings = pings;
    }

    /// Writes number and device into a ping of the request.
    fn address(&mut self, place: usize, number: usize) {
        let ping = &mut self.request[self.start + place * (self.line.len() + 1)..];
        let device = self.devices[number % self.devices.len()].device.text();
        ping[self.device_at..][..Id::TEXT_LEN].copy_from_slice(&device);
        let digits = &mut ping[self.number_at..][..NUMBER_DIGITS];
        let mut rest = number;
        for digit in digits.iter_mut().rev() {
            *digit = b'0' + (rest % 10) as u8;
            rest /= 10;
        }
    }
}

/// What the answer to a line has that was accepted.
const ACCEPTED: &[u8] = b"\"status\":202";

/// When the n-th ping is due.
fn due(number: usize, rate: u32) -> Duration {
    Duration::from_nanos((number as u128 * 1_000_000_000 / u128::from(rate)) as u64)
}

/// Waits until everything accepted has arrived, or long enough.
async fn wait_for_all(ledger: &Ledger) {
    let give_up = Instant::now() + SETTLE_MAX;
    let missing =
        || ledger.acknowledged.load(Ordering::Relaxed) < ledger.accepted.load(Ordering::Relaxed);
    while missing() && Instant::now() < give_up {
        sleep(LOOK_EVERY).await;
    }
}

const SYNCS: &str = "bellwire_store_syncs_total";
const OUTCOMES: &str = "bellwire_outcomes_total";

/// What the server had counted at one moment.
struct Look {
    accepted: f64,
    acknowledged: f64,
    outcomes: f64,
    repeated: f64,
}

impl Look {
    async fn at(server: &Server) -> Outcome<Look> {
        Look::from(server.listen.operations).await
    }

    async fn from(operations: SocketAddr) -> Outcome<Look> {
        let metrics = Metrics::read(operations).await?;
        Ok(Look {
            accepted: metrics.sum("bellwire_notifications_total", ""),
            acknowledged: metrics.sum(OUTCOMES, "outcome=\"acknowledged\""),
            outcomes: metrics.sum(OUTCOMES, ""),
            repeated: metrics.sum("bellwire_outcomes_repeated_total", ""),
        })
    }
}

/// Nothing lost, nothing doubled, and both sides counted the same.
async fn judge(
    report: &mut Report,
    ledger: &Ledger,
    before: &Look,
    operations: SocketAddr,
) -> Outcome<()> {
    let accepted = ledger.accepted.load(Ordering::Relaxed);
    let mut broken = |what: String| report.violations.push(what);
    let lost: Vec<usize> = (0..ledger.posted.len())
        .filter(|&number| {
            ledger.answered[number].load(Ordering::Relaxed) != 0
                && ledger.arrived[number].load(Ordering::Relaxed) == 0
        })
        .collect();
    if !lost.is_empty() {
        let some = &lost[..lost.len().min(VIOLATIONS_SHOWN)];
        broken(format!(
            "{} pings were accepted and reached no device, such as numbers {some:?}",
            lost.len()
        ));
    }
    let doubled = ledger.doubled.load(Ordering::Relaxed);
    if doubled > 0 {
        broken(format!("{doubled} notifications came more than once"));
    }
    let strange = ledger.strange.load(Ordering::Relaxed);
    if strange > 0 {
        broken(format!("{strange} notifications were never posted"));
    }
    let refused = ledger.refused.load(Ordering::Relaxed);
    if refused > 0 {
        let first = ledger.first_refusal.lock();
        let first = first.ok().and_then(|first| first.clone());
        broken(format!(
            "{refused} pings were refused, the first by {}",
            first.unwrap_or_default()
        ));
    }
    if accepted == 0 {
        broken("not one ping was accepted".to_owned());
    }
    // The server's books follow its answers within moments.
    let give_up = Instant::now() + SETTLE_MAX;
    let mut now = Look::from(operations).await?;
    let differs = |now: &Look| {
        let counted = accepted as f64;
        let mut differences = Vec::new();
        for (what, before, after) in [
            ("notifications accepted", before.accepted, now.accepted),
            ("acknowledged", before.acknowledged, now.acknowledged),
            ("outcomes in all", before.outcomes, now.outcomes),
        ] {
            if after - before != counted {
                differences.push(format!("{what}: {} instead of {counted}", after - before));
            }
        }
        differences
    };
    while !differs(&now).is_empty() && lost.is_empty() && Instant::now() < give_up {
        sleep(LOOK_EVERY).await;
        now = Look::from(operations).await?;
    }
    for difference in differs(&now) {
        broken(format!("the server counted otherwise: {difference}"));
    }
    if now.repeated != before.repeated {
        broken("a notification had more than one outcome".to_owned());
    }
    Ok(())
}

fn summarise(report: &mut Report, args: &Deliver, ledger: &Ledger, posting: &Posting) {
    let seconds = (posting.to - posting.from) as f64 / 1e9;
    let within = |times: &[AtomicU64]| {
        times
            .iter()
            .filter(|time| (posting.from..=posting.to).contains(&time.load(Ordering::Relaxed)))
            .count() as f64
    };
    let answered = within(&ledger.answered);
    let attached = !args.absent;
    let closed = args.rate.is_none() && args.connections >= 32 && !args.smoke;
    let batch = args.batch >= 100;
    let least = match (attached, batch) {
        (true, false) => 15_000.0,
        (true, true) => 60_000.0,
        (false, false) => 8_000.0,
        (false, true) => 15_000.0,
    };
    let figure = Figure::new("pings accepted", answered / seconds, "pings/s");
    report.push(figure.budget_if(closed, Budget::AtLeast(least)));
    let own = posting.own_cpu.as_secs_f64() / seconds;
    if own > BUSY_CORES {
        report.note(format!(
            "The generator used {own:.1} cores: the rate says as much about it as about the server."
        ));
    }
    if attached {
        report.push(Figure::new(
            "notifications arrived",
            within(&ledger.arrived) / seconds,
            "notifications/s",
        ));
    }
    report.push_latency(
        "post to answer",
        &latency(ledger, &ledger.answered, posting),
    );
    if attached {
        report.push_latency("post to device", &latency(ledger, &ledger.arrived, posting));
        if closed && args.batch == 1 {
            report.set_budget("post to answer p99", Budget::AtMost(8.0));
        } else if args.connections == 1 && !args.smoke {
            report.set_budget("post to device p50", Budget::AtMost(0.4));
            report.set_budget("post to device p99", Budget::AtMost(2.0));
        }
    }
    let thousands = (answered / 1_000.0).max(f64::MIN_POSITIVE);
    for (name, used) in [
        ("server CPU", posting.server_cpu),
        ("generator CPU", posting.own_cpu),
    ] {
        report.push(Figure::new(
            name,
            used.as_secs_f64() * 1_000.0 / thousands,
            "ms per 1,000 pings",
        ));
        report.push(Figure::new(
            format!("{name}, share of a core"),
            used.as_secs_f64() / seconds * 100.0,
            "%",
        ));
    }
    report.push(Figure::new("syncs", posting.syncs / seconds, "syncs/s"));
    report.push(Figure::new(
        "pings in all, warm-up included",
        ledger.accepted.load(Ordering::Relaxed) as f64,
        "pings",
    ));
}

/// Time from posting to what `done` says, of the pings posted while measuring, in microseconds.
fn latency(ledger: &Ledger, done: &[AtomicU64], posting: &Posting) -> Histogram<u64> {
    // Three digits over the whole range: the bounds are constants that the library accepts.
    let mut micros = Histogram::new_with_max(LATENCY_MAX_MICROS, 3)
        .unwrap_or_else(|_| unreachable!("the bounds are valid"));
    for number in posting.first..posting.end {
        let posted = ledger.posted[number].load(Ordering::Relaxed);
        let done = done[number].load(Ordering::Relaxed);
        if posted != 0 && done >= posted {
            micros.saturating_record(((done - posted) / 1_000).max(1));
        }
    }
    micros
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn due_times_do_not_drift() {
        assert_eq!(due(0, 3), Duration::ZERO);
        assert_eq!(due(3, 3), Duration::from_secs(1));
        assert_eq!(due(3_000_000, 3), Duration::from_secs(1_000_000));
    }

    #[test]
    fn arrivals_are_told_apart() {
        let ledger = Ledger::new(2);
        ledger.arrival(Some("000000000001"));
        ledger.arrival(Some("000000000001"));
        ledger.arrival(Some("000000000002"));
        ledger.arrival(Some("hello"));
        ledger.arrival(None);
        let count = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        assert_eq!(count(&ledger.acknowledged), 1);
        assert_eq!(count(&ledger.doubled), 1);
        assert_eq!(count(&ledger.strange), 3);
    }
}
