//! What stays the same when something grows? Four things are grown, one after the other, each on a fresh server: stored
//! notifications, registered devices that are absent, attached devices, and a backlog of notifications that expired while
//! the server was away.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::sleep;

use crate::drain::{fill, quiet};
use crate::engine::Engine;
use crate::failure::{During, Failure, Outcome};
use crate::fleet::Carriers;
use crate::generator::backends::Backends;
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Plot, Report};
use crate::rig::{self, Load, Rig, ServerArgs, quantile_ms};

/// Notifications that wait for a device at most: below the limit of a mailbox.
const PINGS_OF_A_DEVICE: u64 = 900;

/// Connections that post at each step, and pings of a batch.
const CONNECTIONS: u32 = 8;
const BATCH: u32 = 100;

/// Devices that get the pings that are measured while something else is grown.
const MEASURED_DEVICES: usize = 100;

/// Pings a second beside a backlog, and to attached devices.
const RATE: u32 = 500;

/// Time for memory to settle before it is read.
const SETTLE: Duration = Duration::from_secs(2);

/// Seconds before a load is measured.
const WARM_UP: u32 = 2;

/// Content of a ping to attached devices.
const SMALL_BYTES: u32 = 256;

/// How long notifications of the backlog may wait, seconds, and how many are stored in a second at least: longer than storing them
/// takes.
const TTL_MIN_S: u32 = 30;
const STORED_IN_A_SECOND: u64 = 4_000;

/// Longest wait for a backlog to be swept.
const SWEPT_MAX: Duration = Duration::from_secs(900);

/// How new work is refused while the engine is behind.
const BUSY: &str = "store_busy";

static ACCEPT: Plot = Plot {
    title: "Server CPU of a stored ping",
    x_label: "notifications that wait",
    x_log: true,
    y_log: false,
};

static MEMORY: Plot = Plot {
    title: "Resident memory while notifications wait",
    x_label: "notifications that wait",
    x_log: true,
    y_log: false,
};

static REGISTERED: Plot = Plot {
    title: "Resident memory and registered devices",
    x_label: "registered devices, all absent",
    x_log: false,
    y_log: false,
};

static ATTACHED: Plot = Plot {
    title: "Server CPU of a ping and attached devices",
    x_label: "attached devices",
    x_log: true,
    y_log: false,
};

/// How many times the first step's cost a later step's may be.
const TIMES_AT_MOST: f64 = 1.2;

/// What is grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Notifications that wait, then opening
    Stored,
    /// Registered devices that are absent
    Registered,
    /// Notifications that expired while the server was away
    Expired,
    /// Attached devices
    Attached,
}

/// Grow what a server keeps, and look at what should stay the same
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench grow --only stored --engines fjall --stored 10000,1000000,10000000
  bellwire-bench grow --only registered --registered 1000,1000000
  bellwire-bench grow --only expired --expired 1000000
  bellwire-bench grow --only attached --attached 1000,200000")]
pub(crate) struct GrowArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// Engines, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Engine::Sled, Engine::Fjall])]
    engines: Vec<Engine>,
    /// Stored notifications, step by step
    #[arg(long, value_delimiter = ',', default_values_t = [10_000, 100_000, 1_000_000])]
    stored: Vec<u64>,
    /// Registered devices, step by step
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 100_000])]
    registered: Vec<u64>,
    /// Notifications of the backlog
    #[arg(long, default_value_t = 200_000, value_parser = clap::value_parser!(u64).range(1..=50_000_000))]
    expired: u64,
    /// Attached devices, step by step
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 5_000, 20_000])]
    attached: Vec<u64>,
    /// What devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Quic)]
    carrier: Carriers,
    /// Content of a stored ping in bytes
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(33..=1_000))]
    bytes: u32,
    /// Measured time of a step, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Stored, Part::Registered, Part::Expired, Part::Attached])]
    only: Vec<Part>,
}

impl GrowArgs {
    fn smoke(self) -> GrowArgs {
        GrowArgs {
            engines: vec![Engine::Sled],
            stored: vec![200, 400],
            registered: vec![50, 100],
            expired: 300,
            attached: vec![10, 20],
            seconds: 1,
            ..self
        }
    }
}

impl GrowArgs {
    /// Waits until what is under way is over, where that matters.
    async fn settle(&self) {
        if !self.server.smoke {
            sleep(SETTLE).await;
        }
    }

    /// Seconds before a load is measured.
    fn warm_up(&self) -> u32 {
        if self.server.smoke { 0 } else { WARM_UP }
    }
}

/// Runs the workload.
pub(crate) async fn run(args: GrowArgs, progress: Progress) -> Outcome<Report> {
    let mut args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    for steps in [&mut args.stored, &mut args.registered, &mut args.attached] {
        steps.sort_unstable();
        steps.dedup();
    }
    let mut report = Report::new("grow", &args)?;
    for &engine in &args.engines {
        if args.only.contains(&Part::Stored) {
            stored(&args, engine, &mut report, progress).await?;
        }
        if args.only.contains(&Part::Expired) {
            expired(&args, engine, &mut report, progress).await?;
        }
        if args.only.contains(&Part::Registered) {
            registered(&args, engine, &mut report, progress).await?;
        }
    }
    if args.only.contains(&Part::Attached) {
        attached(&args, &mut report, progress).await?;
    }
    Ok(report)
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

async fn stored(
    args: &GrowArgs,
    engine: Engine,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let most = args.stored.last().copied().unwrap_or(1);
    let devices = usize::try_from(most.div_ceil(PINGS_OF_A_DEVICE)).during("count devices")?;
    let setting = engine.setting();
    let mut rig = Rig::start(&args.server, &[&setting], devices.max(10), progress).await?;
    let target = rig.to_devices();
    let mut backends = rig
        .backends(target, CONNECTIONS, BATCH, args.bytes, None)
        .await?;
    let (mut next, mut accepted) = (0, 0);
    let mut first_cost = None;
    for &step in &args.stored {
        let what = format!("{engine}, {step} stored");
        let bar = progress.wait(&what);
        let already = accepted;
        let cpu = process::cpu_time(rig.server.pid())?;
        let mut load = Load::closed(0, 3_600).at_most(step - accepted.min(step));
        let measured = rig::load(&mut rig.server, &mut backends, &mut [], load, next).await?;
        rig::none_refused(report, &what, &measured.posted, &[BUSY]);
        (next, accepted) = (measured.posted.next, accepted + measured.posted.accepted);
        // Refused because the engine was behind: posted until there are as many as the step says.
        while accepted < step {
            load.limit = step - accepted;
            let more = rig::load(&mut rig.server, &mut backends, &mut [], load, next).await?;
            (next, accepted) = (more.posted.next, accepted + more.posted.accepted);
        }
        // What the engine does later belongs to it.
        quiet(&rig).await?;
        let cpu = process::cpu_time(rig.server.pid())?.saturating_sub(cpu);
        args.settle().await;
        let memory = process::memory(rig.server.pid())?.resident;
        let cost = cpu.as_secs_f64() * 1e6 / (accepted - already).max(1) as f64;
        let least = *first_cost.get_or_insert(cost);
        report.push(
            Figure::new(format!("{what}: server CPU"), cost, "µs per ping")
                .budget_if(
                    !args.server.smoke && step != args.stored[0],
                    Budget::AtMost(TIMES_AT_MOST * least),
                )
                .plotted(&ACCEPT, engine.to_string(), step as f64),
        );
        report.push(Figure::new(
            format!("{what}: accepted"),
            measured.posted.accepted as f64 / measured.usage.seconds,
            "pings/s",
        ));
        report.push(
            Figure::new(format!("{what}: resident"), mib(memory), "MiB").plotted(
                &MEMORY,
                engine.to_string(),
                step as f64,
            ),
        );
        for (name, metric) in [
            ("engine on disk", "bellwire_store_engine_bytes"),
            ("log on disk", "bellwire_store_log_bytes"),
        ] {
            let bytes = rig.metric(metric).await?;
            let size = bytes / f64::from(1 << 20);
            report.push(Figure::new(format!("{what}: {name}"), size, "MiB"));
        }
        bar.done();
    }
    backends.stop().await;
    let counted = rig.metric("bellwire_notifications_total").await? as u64;
    if counted != accepted {
        report.violation(format!(
            "{engine}: {accepted} pings were answered by 202, the server counts {counted}"
        ));
    }
    let peak = process::peak_memory(rig.server.pid())?;
    report.push(Figure::new(
        format!("{engine}, stored: resident, peak"),
        mib(peak),
        "MiB",
    ));
    let bar = progress.wait("open again");
    let Rig { server, .. } = rig;
    let (good, stopped) = server.stop().await;
    if !good {
        report.violation("the server did not end by itself after SIGTERM");
    }
    let server = stopped.start().await?;
    let meant = !args.server.smoke;
    report.push(
        Figure::new(
            format!("{engine}, {most} stored: ready after a clean stop"),
            server.opened.as_secs_f64(),
            "s",
        )
        .budget_if(meant, Budget::AtMost(2.0)),
    );
    let server = server.kill().start().await?;
    report.push(
        Figure::new(
            format!("{engine}, {most} stored: ready after a kill"),
            server.opened.as_secs_f64(),
            "s",
        )
        .budget_if(meant, Budget::AtMost(10.0)),
    );
    bar.done();
    drop(server);
    Ok(())
}

async fn registered(
    args: &GrowArgs,
    engine: Engine,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let setting = engine.setting();
    let mut rig = Rig::start(&args.server, &[&setting], MEASURED_DEVICES, progress).await?;
    quiet(&rig).await?;
    args.settle().await;
    let pid = rig.server.pid();
    let none = process::memory(pid)?.resident;
    report.push(
        Figure::new(
            format!("{engine}, no more registered: resident"),
            mib(none),
            "MiB",
        )
        .plotted(&REGISTERED, engine.to_string(), 0.0),
    );
    let mut there = 0;
    for &step in &args.registered {
        let started = Instant::now();
        let more = usize::try_from(step - there).during("count devices")?;
        rig.register(more).await?;
        let seconds = started.elapsed().as_secs_f64();
        there = step;
        quiet(&rig).await?;
        args.settle().await;
        let memory = process::memory(pid)?.resident;
        let what = format!("{engine}, {step} registered");
        report.push(
            Figure::new(format!("{what}: resident"), mib(memory), "MiB").plotted(
                &REGISTERED,
                engine.to_string(),
                step as f64,
            ),
        );
        report.push(Figure::new(
            format!("{what}: bytes of a device"),
            (memory as f64 - none as f64) / step as f64,
            "bytes",
        ));
        report.push(Figure::new(
            format!("{what}: registered"),
            more as f64 / seconds.max(1e-3),
            "devices/s",
        ));
    }
    // What the cache of the store took has nothing to do with what devices need: a fresh process shows that.
    let Rig { server, .. } = rig;
    let (good, stopped) = server.stop().await;
    if !good {
        report.violation("the server did not end by itself after SIGTERM");
    }
    let server = stopped.start().await?;
    args.settle().await;
    report.push(Figure::new(
        format!("{engine}, {there} registered: resident after a restart"),
        mib(process::memory(server.pid())?.resident),
        "MiB",
    ));
    drop(server);
    Ok(())
}

async fn expired(
    args: &GrowArgs,
    engine: Engine,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let what = format!("{engine}, {} expired", args.expired);
    let devices =
        usize::try_from(args.expired.div_ceil(PINGS_OF_A_DEVICE)).during("count devices")?;
    let setting = engine.setting();
    let devices = devices.max(MEASURED_DEVICES);
    let mut rig = Rig::start(&args.server, &[&setting], devices, progress).await?;
    let bar = progress.wait(&what);
    // Devices that are attached show what pings feel.
    let ping = async |rig: &mut Rig, first: u64| -> Outcome<(f64, f64, u64)> {
        let some = rig.devices[..MEASURED_DEVICES.min(rig.devices.len())].to_vec();
        let some: std::sync::Arc<[_]> = some.into();
        let all = std::mem::replace(&mut rig.devices, some);
        let mut fleet = rig.attach(args.carrier, 32).await?;
        let mut backends: Backends = rig
            .backends(rig.to_devices(), CONNECTIONS, 1, SMALL_BYTES, None)
            .await?;
        let load = Load::by_the_clock(RATE, args.warm_up(), args.seconds);
        let fleets = &mut [&mut fleet];
        let measured = rig::load(&mut rig.server, &mut backends, fleets, load, first).await?;
        let accepted = measured.posted.accepted;
        let arrived = rig::wait_for(&mut [&mut fleet], accepted).await?;
        if arrived != accepted {
            return Err(Failure::new(format!(
                "{accepted} pings were accepted beside the backlog, {arrived} arrived"
            )));
        }
        backends.stop().await;
        fleet.stop().await;
        rig.devices = all;
        let share = measured.usage.server / measured.usage.seconds * 100.0;
        Ok((
            quantile_ms(&measured.answer(), 0.99),
            share,
            measured.posted.next,
        ))
    };
    let (p99_before, share_before, first) = ping(&mut rig, 0).await?;
    let ttl_s = if args.server.smoke {
        2
    } else {
        TTL_MIN_S + (args.expired / STORED_IN_A_SECOND) as u32
    };
    let accepted = fill(&mut rig, args.expired, args.bytes, Some(ttl_s), report).await?;
    quiet(&rig).await?;
    // On a machine that is slower than that, the first ones have expired by now.
    let early = rig.metric("bellwire_sweep_rows_total").await? as u64;
    let Rig {
        server,
        devices,
        progress,
    } = rig;
    let (_, stopped) = server.stop().await;
    // Until the last of them has expired.
    sleep(Duration::from_secs(u64::from(ttl_s) + 1)).await;
    let server = stopped.start().await?;
    let mut rig = Rig {
        server,
        devices,
        progress,
    };
    let swept = async |rig: &Rig| rig.metric("bellwire_sweep_rows_total").await;
    let cpu = process::cpu_time(rig.server.pid())?;
    let began = Instant::now();
    let already = swept(&rig).await?;
    sleep(Duration::from_secs(args.seconds.into())).await;
    let alone = process::cpu_time(rig.server.pid())?.saturating_sub(cpu);
    let alone_share = alone.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0;
    let rows = swept(&rig).await? - already;
    let (p99, share, _) = ping(&mut rig, first).await?;
    let during = swept(&rig).await?;
    let give_up = Instant::now() + SWEPT_MAX;
    while (swept(&rig).await? as u64) + early < accepted && Instant::now() < give_up {
        sleep(Duration::from_millis(200)).await;
    }
    let total = swept(&rig).await? as u64 + early;
    let took = began.elapsed().as_secs_f64();
    if total < accepted {
        report.violation(format!(
            "{what}: {accepted} notifications expired, the sweep found {total}"
        ));
    }
    bar.done();
    let meant = !args.server.smoke;
    report.push(
        Figure::new(
            format!("{what}: sweep alone, share of a core"),
            alone_share,
            "%",
        )
        .budget_if(meant, Budget::AtMost(5.0)),
    );
    report.push(Figure::new(
        format!("{what}: CPU of a swept row"),
        alone.as_secs_f64() * 1e6 / rows.max(1.0),
        "µs",
    ));
    report.push(Figure::new(
        format!("{what}: swept before pings were posted"),
        rows,
        "rows",
    ));
    report.push(Figure::new(
        format!("{what}: swept after them"),
        during,
        "rows",
    ));
    report.push(Figure::new(
        format!("{what}: until all were swept"),
        took,
        "s",
    ));
    report.push(Figure::new(
        format!("{what}: ping p99 before"),
        p99_before,
        "ms",
    ));
    report.push(
        Figure::new(format!("{what}: ping p99 beside the sweep"), p99, "ms")
            .budget_if(meant, Budget::AtMost(1.5 * p99_before)),
    );
    report.push(Figure::new(
        format!("{what}: server with pings before, share of a core"),
        share_before,
        "%",
    ));
    report.push(Figure::new(
        format!("{what}: server with pings beside the sweep, share of a core"),
        share,
        "%",
    ));
    rig.stop(report).await;
    Ok(())
}

async fn attached(args: &GrowArgs, report: &mut Report, progress: Progress) -> Outcome<()> {
    let mut first_cost = None;
    for &step in &args.attached {
        let what = format!("{step} attached");
        let count = usize::try_from(step).during("count devices")?;
        let mut rig = Rig::start(&args.server, &[], count, progress).await?;
        let mut fleet = rig.attach(args.carrier, 64).await?;
        let bar = progress.wait(&what);
        let before = rig.books().await?;
        let mut backends = rig
            .backends(rig.to_devices(), CONNECTIONS, 1, SMALL_BYTES, None)
            .await?;
        let load = Load::by_the_clock(RATE, args.warm_up(), args.seconds);
        let fleets = &mut [&mut fleet];
        let measured = rig::load(&mut rig.server, &mut backends, fleets, load, 0).await?;
        rig::none_refused(report, &what, &measured.posted, &[]);
        let pings = measured.posted.measured.max(1) as f64;
        let cost = measured.usage.server * 1e6 / pings;
        let least = *first_cost.get_or_insert(cost);
        report.push(
            Figure::new(format!("{what}: server CPU"), cost, "µs per ping")
                .budget_if(
                    !args.server.smoke && step != args.attached[0],
                    Budget::AtMost(TIMES_AT_MOST * least),
                )
                .plotted(&ATTACHED, args.carrier.name(), step as f64),
        );
        rig::wait_for(&mut [&mut fleet], measured.posted.accepted).await?;
        let device = fleet.latency().await?;
        report.push(Figure::new(
            format!("{what}: due to device p50"),
            quantile_ms(&device, 0.5),
            "ms",
        ));
        report.push(Figure::new(
            format!("{what}: due to device p99"),
            quantile_ms(&device, 0.99),
            "ms",
        ));
        let accepted = measured.posted.accepted;
        rig::judge(report, &rig.server, &mut [&mut fleet], before, accepted).await?;
        report.push(Figure::new(
            format!("{what}: resident"),
            mib(process::memory(rig.server.pid())?.resident),
            "MiB",
        ));
        backends.stop().await;
        fleet.stop().await;
        rig.stop(report).await;
        bar.done();
    }
    Ok(())
}
