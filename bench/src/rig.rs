//! What most workloads are put together from: a server with registered devices, loads, meters, and the judgement whether
//! all books agree.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;
use tokio::time::{sleep, timeout};

use crate::api::{Metrics, Registered};
use crate::clock::{self, SECOND};
use crate::failure::Outcome;
use crate::fleet::{self, Carriers};
use crate::generator::backends::{Backends, Post, Posted, Setup, Target};
use crate::generator::devices::{Fleet, Place};
use crate::generator::{add, histogram};
use crate::process;
use crate::progress::Progress;
use crate::report::{Figure, Report};
use crate::server::{self, Server};

/// How long nothing may arrive before what is missing counts as lost.
const NOTHING_MAX: Duration = Duration::from_secs(30);

/// How long the server's books may need to agree with what its answers said.
const AGREE_MAX: Duration = Duration::from_secs(30);

/// How often a condition is looked at while waiting.
pub(crate) const LOOK_EVERY: Duration = Duration::from_millis(20);

/// From telling the backends to the first ping that is due.
const LEAD: u64 = SECOND / 10;

/// Part of a core from which on a process of one thread is called busy.
const BUSY: f64 = 0.9;

/// Part of the machine that programs which have nothing to do with the run may use before the report says so.
const OTHERS_MAX: f64 = 0.1;

/// How late a generator may be by itself in one of a hundred pings before the report says so.
const LATE_MAX_MS: f64 = 1.0;

/// What is not measured: rates of keys and devices, which are there to slow down what is, and the time over which devices
/// are sent away when all is done.
const UNLIMITED: [&str; 5] = [
    "DRAIN__WINDOW=0s",
    "LIMITS__PINGS_PER_SECOND=10000000",
    "LIMITS__PING_BURST=100000000",
    "LIMITS__DEVICE_PINGS_PER_SECOND=0",
    "LIMITS__DEVICE_PING_BURST=100000000",
];

/// What opens a listener for load balancers.
const PLAIN: [&str; 2] = [
    "LISTEN__DEVICES_PLAIN=127.0.0.1:0",
    "LISTEN__PROXY_NETWORKS=127.0.0.0/8",
];

/// Metrics of the server that are looked at.
pub(crate) const SYNCS: &str = "bellwire_store_syncs_total";
const OUTCOMES: &str = "bellwire_outcomes_total";

/// Which server is measured.
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct ServerArgs {
    /// The server binary; default: `bellwire` beside this program
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    pub(crate) server: Option<PathBuf>,
    /// A setting of the server, such as STORE__ENGINE=memory; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// A smallest form, to see that everything arrives and all counts agree; speed is not looked at
    #[arg(long)]
    pub(crate) smoke: bool,
}

/// A server with devices that are registered.
pub(crate) struct Rig {
    pub(crate) server: Server,
    pub(crate) devices: Arc<[Registered]>,
    pub(crate) progress: Progress,
}

impl Rig {
    /// `settings` count before those of the command line.
    pub(crate) async fn start(
        args: &ServerArgs,
        settings: &[&str],
        devices: usize,
        progress: Progress,
    ) -> Outcome<Rig> {
        process::raise_file_limit();
        let binary = server::binary(args.server.as_deref())?;
        let settings: Vec<String> = UNLIMITED
            .iter()
            .chain(&PLAIN)
            .chain(settings)
            .map(|setting| (*setting).to_owned())
            .chain(args.settings.iter().cloned())
            .collect();
        let server = Server::start(&binary, &settings).await?;
        let devices = fleet::register(server.listen.api, &server.key, devices, progress).await?;
        Ok(Rig {
            server,
            devices: devices.into(),
            progress,
        })
    }

    /// Registers more devices.
    pub(crate) async fn register(&mut self, count: usize) -> Outcome<()> {
        let (api, key) = (self.server.listen.api, &self.server.key);
        let more = fleet::register(api, key, count, self.progress).await?;
        self.devices = self.devices.iter().cloned().chain(more).collect();
        Ok(())
    }

    /// Where devices connect by such a carrier.
    pub(crate) fn place(&self, carriers: Carriers) -> Place<'_> {
        let listen = &self.server.listen;
        let address = match carriers {
            Carriers::Plain => listen.devices_plain.unwrap_or(listen.devices),
            Carriers::Both | Carriers::Quic | Carriers::Websocket => listen.devices,
        };
        Place {
            address,
            authority: &self.server.authority,
            bellwire: true,
        }
    }

    /// All devices, connected.
    pub(crate) async fn attach(&self, carriers: Carriers, at_once: usize) -> Outcome<Fleet> {
        let mut fleet = Fleet::start(&self.place(carriers), carriers, &self.devices, false).await?;
        let bar = self.progress.wait("connect devices");
        fleet.attach(at_once, false).await?;
        bar.done();
        Ok(fleet)
    }

    pub(crate) fn to_devices(&self) -> Target {
        Target::Devices(self.devices.iter().map(|device| device.device).collect())
    }

    pub(crate) async fn backends(
        &self,
        target: Target,
        connections: u32,
        batch: u32,
        bytes: u32,
        ttl_s: Option<u32>,
    ) -> Outcome<Backends> {
        Backends::start(&Setup {
            api: self.server.listen.api,
            key: self.server.key.clone(),
            target,
            connections,
            batch,
            bytes,
            ttl_s,
        })
        .await
    }

    /// A metric of the server, over all its labels.
    pub(crate) async fn metric(&self, name: &str) -> Outcome<f64> {
        let metrics = Metrics::read(self.server.listen.operations).await?;
        Ok(metrics.sum(name, ""))
    }

    pub(crate) async fn books(&self) -> Outcome<Books> {
        Books::read(&self.server).await
    }

    /// Waits until the server counts so many sessions, for some time, and says how many it counts.
    pub(crate) async fn sessions(&self, wanted: usize) -> Outcome<usize> {
        let give_up = Instant::now() + AGREE_MAX;
        loop {
            let metrics = Metrics::read(self.server.listen.operations).await?;
            let counted = metrics.sum("bellwire_sessions", "") as usize;
            if counted == wanted || Instant::now() > give_up {
                return Ok(counted);
            }
            sleep(LOOK_EVERY).await;
        }
    }

    /// Ends the server, and tells how long that took.
    pub(crate) async fn stop(self, report: &mut Report) -> Duration {
        let begun = Instant::now();
        if !self.server.stop().await.0 {
            report.violation("the server did not end by itself after SIGTERM");
        }
        begun.elapsed()
    }
}

/// What backends do.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) rate: Option<u32>,
    pub(crate) warm_up: Duration,
    pub(crate) time: Duration,
    pub(crate) limit: u64,
    /// See [`Post::sample`].
    pub(crate) sample: u64,
}

impl Load {
    /// As much as answers allow.
    pub(crate) fn closed(warm_up: u32, seconds: u32) -> Load {
        Load {
            rate: None,
            warm_up: Duration::from_secs(warm_up.into()),
            time: Duration::from_secs(seconds.into()),
            limit: u64::MAX,
            sample: 0,
        }
    }

    /// So many pings a second.
    pub(crate) fn by_the_clock(rate: u32, warm_up: u32, seconds: u32) -> Load {
        Load {
            rate: Some(rate),
            ..Load::closed(warm_up, seconds)
        }
    }

    pub(crate) fn at_most(self, limit: u64) -> Load {
        Load { limit, ..self }
    }
}

/// A load that was measured.
pub(crate) struct Measured {
    pub(crate) posted: Posted,
    pub(crate) usage: Usage,
    pub(crate) syncs: f64,
}

impl Measured {
    /// Accepted a second while measuring.
    pub(crate) fn rate(&self) -> f64 {
        self.posted.measured as f64 / self.usage.seconds
    }

    /// How late the generator was by itself, in one of a hundred pings; `None` where no clock said when.
    pub(crate) fn lag_ms(&self) -> Option<f64> {
        let mut micros = histogram();
        add(&mut micros, &self.posted.lag);
        (!micros.is_empty()).then(|| quantile_ms(&micros, 0.99))
    }

    pub(crate) fn answer(&self) -> Histogram<u64> {
        let mut micros = histogram();
        add(&mut micros, &self.posted.answer);
        micros
    }
}

/// Lets backends post, and reads all meters over the measured time.
pub(crate) async fn load(
    server: &mut Server,
    backends: &mut Backends,
    fleets: &mut [&mut Fleet],
    load: Load,
    first: u64,
) -> Outcome<Measured> {
    let nanos = |span: Duration| u64::try_from(span.as_nanos()).unwrap_or(u64::MAX);
    let start = clock::now() + LEAD;
    let from = start + nanos(load.warm_up);
    let to = from + nanos(load.time);
    let post = Post {
        first,
        limit: load.limit,
        rate: load.rate,
        start,
        from,
        to,
        sample: load.sample,
    };
    let mut pids = Vec::new();
    for fleet in fleets.iter_mut() {
        fleet.watch(from, to).await?;
        pids.extend(fleet.pids()?);
    }
    let operations = server.listen.operations;
    backends.post(&post).await?;
    sleep(clock::until(from)).await;
    let syncs = Metrics::read(operations).await?.sum(SYNCS, "");
    let meter = Meter::start(server.pid(), vec![backends.pid()?], pids)?;
    // Ends early when all pings are posted.
    let early = timeout(clock::until(to), backends.done(&post)).await;
    let usage = meter.read()?;
    let syncs = Metrics::read(operations).await?.sum(SYNCS, "") - syncs;
    server.check()?;
    let posted = match early {
        Ok(done) => done?,
        Err(_) => backends.done(&post).await?,
    };
    Ok(Measured {
        posted,
        usage,
        syncs,
    })
}

/// CPU time of all who take part, from now on.
pub(crate) struct Meter {
    server: (u32, Duration),
    backends: Vec<(u32, Duration)>,
    devices: Vec<(u32, Duration)>,
    machine: Option<Duration>,
    started: Instant,
}

/// What they used.
#[derive(Debug, Clone)]
pub(crate) struct Usage {
    /// Seconds of a core.
    pub(crate) server: f64,
    pub(crate) backends: Vec<f64>,
    /// Of each process; one that plays devices has one thread.
    pub(crate) devices: Vec<f64>,
    /// Of everything else that ran on the machine.
    pub(crate) others: f64,
    /// Time that passed.
    pub(crate) seconds: f64,
}

impl Meter {
    pub(crate) fn start(server: u32, backends: Vec<u32>, devices: Vec<u32>) -> Outcome<Meter> {
        let each = |pids: Vec<u32>| -> Outcome<Vec<(u32, Duration)>> {
            pids.into_iter()
                .map(|pid| Ok((pid, process::cpu_time(pid)?)))
                .collect()
        };
        Ok(Meter {
            backends: each(backends)?,
            devices: each(devices)?,
            server: (server, process::cpu_time(server)?),
            machine: process::machine_time(),
            started: Instant::now(),
        })
    }

    pub(crate) fn read(&self) -> Outcome<Usage> {
        let used = |(pid, before): &(u32, Duration)| -> Outcome<f64> {
            Ok(process::cpu_time(*pid)?
                .saturating_sub(*before)
                .as_secs_f64())
        };
        let seconds = self.started.elapsed().as_secs_f64();
        let mut usage = Usage {
            server: used(&self.server)?,
            backends: self.backends.iter().map(used).collect::<Outcome<_>>()?,
            devices: self.devices.iter().map(used).collect::<Outcome<_>>()?,
            others: 0.0,
            seconds: seconds.max(1e-3),
        };
        if let Some((before, now)) = self.machine.zip(process::machine_time()) {
            let all = now.saturating_sub(before).as_secs_f64();
            usage.others = (all - usage.server - usage.generators()).max(0.0);
        }
        Ok(usage)
    }
}

impl Usage {
    fn generators(&self) -> f64 {
        self.backends.iter().chain(&self.devices).sum()
    }

    /// Says what everybody used for each of `count` things, and who was the bottleneck.
    pub(crate) fn tell(
        &self,
        report: &mut Report,
        what: &str,
        count: u64,
        unit: &'static str,
        posted: Option<&Posted>,
    ) {
        let each = count.max(1) as f64;
        report.push(Figure::new(
            format!("{what}: server CPU"),
            self.server * 1e6 / each,
            unit,
        ));
        report.push(Figure::new(
            format!("{what}: generators' CPU"),
            self.generators() * 1e6 / each,
            unit,
        ));
        for (who, used) in [
            ("server", self.server),
            ("backends", self.backends.iter().sum()),
            ("devices", self.devices.iter().sum()),
            ("everything else on the machine", self.others),
        ] {
            report.push(Figure::new(
                format!("{what}: {who}, share of a core"),
                used / self.seconds * 100.0,
                "%",
            ));
        }
        let lag = posted.map(|posted| {
            let mut micros = histogram();
            add(&mut micros, &posted.lag);
            micros
        });
        let lag_ms = lag.filter(|lag| !lag.is_empty());
        let lag_ms = lag_ms.map(|lag| lag.value_at_quantile(0.99) as f64 / 1e3);
        if let Some(lag_ms) = lag_ms {
            report.push(Figure::new(
                format!("{what}: generator late by itself, p99"),
                lag_ms,
                "ms",
            ));
        }
        report.note(format!("{what}: {}", self.verdict(lag_ms)));
    }

    /// Who was the bottleneck.
    pub(crate) fn verdict(&self, lag_ms: Option<f64>) -> &'static str {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as f64;
        let busy = self
            .backends
            .iter()
            .chain(&self.devices)
            .any(|used| used / self.seconds > BUSY);
        let all = (self.server + self.generators()) / self.seconds;
        if self.others / self.seconds > cores * OTHERS_MAX {
            "other programs used more than 10 % of the machine: rates and latencies mean nothing, CPU per ping is about right."
        } else if busy {
            "a process of the generator used more than 90 % of a core: the generator was the bottleneck."
        } else if lag_ms.is_some_and(|lag_ms| lag_ms > LATE_MAX_MS) {
            "the generator itself was late: latencies are too high."
        } else if all > cores * BUSY {
            "server and generators together used the whole machine: a rate says as much about the generators as about the server, CPU per ping does not."
        } else {
            "no generator was busy: what is measured is the server."
        }
    }
}

/// What the server had counted at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Books {
    accepted: f64,
    acknowledged: f64,
    outcomes: f64,
    repeated: f64,
}

impl Books {
    /// Those of a server that has just started.
    pub(crate) fn empty() -> Books {
        Books {
            accepted: 0.0,
            acknowledged: 0.0,
            outcomes: 0.0,
            repeated: 0.0,
        }
    }

    /// Notifications accepted since an earlier look.
    pub(crate) fn accepted_since(&self, before: Books) -> u64 {
        (self.accepted - before.accepted) as u64
    }

    pub(crate) async fn read(server: &Server) -> Outcome<Books> {
        let metrics = Metrics::read(server.listen.operations).await?;
        Ok(Books {
            accepted: metrics.sum("bellwire_notifications_total", ""),
            acknowledged: metrics.sum(OUTCOMES, "outcome=\"acknowledged\""),
            outcomes: metrics.sum(OUTCOMES, ""),
            repeated: metrics.sum("bellwire_outcomes_repeated_total", ""),
        })
    }
}

/// Waits until `expected` notifications have arrived in all, as long as there is progress.
pub(crate) async fn wait_for(fleets: &mut [&mut Fleet], expected: u64) -> Outcome<u64> {
    let mut arrived = 0;
    let mut since = Instant::now();
    loop {
        let mut now = 0;
        for fleet in fleets.iter_mut() {
            now += fleet.counts().await?.arrived;
        }
        if now > arrived {
            (arrived, since) = (now, Instant::now());
        }
        if arrived >= expected || since.elapsed() > NOTHING_MAX {
            return Ok(arrived);
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Nothing lost, nothing doubled, no session gone, and both sides counted the same: all of `expected` notifications, which
/// is how many were accepted since `before`, have arrived and were acknowledged.
pub(crate) async fn judge(
    report: &mut Report,
    server: &Server,
    fleets: &mut [&mut Fleet],
    before: Books,
    expected: u64,
) -> Outcome<()> {
    let arrived = wait_for(fleets, expected).await?;
    if arrived < expected {
        report.violation(format!(
            "{} of {expected} notifications that were accepted reached no device",
            expected - arrived
        ));
    } else if arrived > expected {
        report.violation(format!(
            "{arrived} notifications arrived, {expected} were accepted"
        ));
    }
    if expected == 0 {
        report.violation("not one ping was accepted");
    }
    devices_are_well(report, fleets).await?;
    // The server's books follow its answers within moments.
    let give_up = Instant::now() + AGREE_MAX;
    loop {
        let now = Books::read(server).await?;
        let mut differences = Vec::new();
        for (what, before, now) in [
            ("notifications accepted", before.accepted, now.accepted),
            ("acknowledged", before.acknowledged, now.acknowledged),
            ("outcomes in all", before.outcomes, now.outcomes),
        ] {
            if now - before != expected as f64 {
                differences.push(format!("{what}: {} instead of {expected}", now - before));
            }
        }
        if differences.is_empty() || arrived < expected || Instant::now() > give_up {
            for difference in differences {
                report.violation(format!("the server counted otherwise: {difference}"));
            }
            if now.repeated != before.repeated {
                report.violation("a notification had more than one outcome");
            }
            return Ok(());
        }
        sleep(LOOK_EVERY).await;
    }
}

/// No device got anything twice or by mistake, or lost its session.
pub(crate) async fn devices_are_well(
    report: &mut Report,
    fleets: &mut [&mut Fleet],
) -> Outcome<()> {
    for fleet in fleets.iter_mut() {
        let counts = fleet.counts().await?;
        if counts.doubled > 0 {
            report.violation(format!(
                "{} notifications came more than once and did not say so",
                counts.doubled
            ));
        }
        if counts.strange > 0 {
            report.violation(format!(
                "{} notifications came to the wrong device or were never posted",
                counts.strange
            ));
        }
        if counts.lost > 0 {
            report.violation(format!(
                "{} devices lost their session, the first because: {}",
                counts.lost,
                counts.first_loss.unwrap_or_default()
            ));
        }
    }
    Ok(())
}

/// No ping was refused, but for the codes that the workload provokes.
pub(crate) fn none_refused(report: &mut Report, what: &str, posted: &Posted, but: &[&str]) {
    for (code, count) in &posted.refused {
        if !but.contains(&code.as_str()) {
            report.violation(format!("{what}: {count} pings were refused: {code}"));
        }
    }
}

/// Milliseconds out of a histogram of microseconds.
pub(crate) fn quantile_ms(micros: &Histogram<u64>, quantile: f64) -> f64 {
    micros.value_at_quantile(quantile) as f64 / 1_000.0
}
