//! How many pings a second go to disk, when their devices are away? With each engine, one by one and in batches: in a burst,
//! that is until the engine is as far behind the log as it may be, and sustained, when it holds everybody up. And how long
//! does one quiet ping take, which waits for one sync?
//!
//! Afterwards some of the devices come and must be given exactly what was accepted for them.

use std::time::Duration;

use serde::Serialize;

use crate::engine::Engine;
use crate::failure::Outcome;
use crate::fleet::Carriers;
use crate::floor::{Ground, beside};
use crate::generator::devices::Fleet;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Plot, Report};
use crate::rig::{self, Load, Rig, ServerArgs};

/// Pings that a device gets at most: below the limits of a mailbox, 1,000 and 1 MiB, so that none is evicted.
const PINGS_OF_A_DEVICE_MAX: u64 = 800;

/// Pings a second of the quiet part.
const QUIET_RATE: u32 = 50;

/// Seconds of which the best counts as the burst.
const BURST_SECONDS: usize = 3;

/// Records that become safe together in a floor.
const TOGETHER: usize = 256;

/// How new work is refused when the engine is too far behind for too long; the workload provokes that.
const BUSY: &str = "store_busy";

static OVER_TIME: Plot = Plot {
    title: "Stored pings a second over time",
    x_label: "seconds",
    x_log: false,
    y_log: false,
};

/// A part of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// One ping at a time, 50 a second
    Quiet,
    /// A ping in a request
    Single,
    /// Many pings in a request
    Batch,
}

/// Post pings to absent devices: quiet, one by one, in batches; burst and sustained, with each engine
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench stored                                        both engines, four minutes
  bellwire-bench stored --engines fjall --only batch           one engine, in batches
  bellwire-bench stored --seconds 300 --devices 50000          five minutes of each")]
pub(crate) struct StoredArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// Engines, one after the other
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Engine::Sled, Engine::Fjall])]
    engines: Vec<Engine>,
    /// Devices that are away; each gets at most 800 pings, so that no mailbox overflows
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    devices: u32,
    /// Of these, how many come afterwards and fetch what is theirs
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    fetch: u32,
    /// Keep-alive HTTP/1.1 connections that post, each one request at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    connections: u32,
    /// Measured time of each part, seconds; what is sustained is measured over it
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// Time before that, in which the burst is over, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=600))]
    warm_up: u32,
    /// Pings of a batch
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    batch: u32,
    /// Connections that post batches
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch_connections: u32,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(33..=1_300))]
    bytes: u32,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Quiet, Part::Single, Part::Batch])]
    only: Vec<Part>,
}

impl StoredArgs {
    fn smoke(self) -> StoredArgs {
        StoredArgs {
            devices: 40,
            fetch: 40,
            connections: 4,
            seconds: 1,
            warm_up: 0,
            batch: 20,
            batch_connections: 2,
            ..self
        }
    }
}

/// Runs the workload.
pub(crate) async fn run(args: StoredArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    let mut report = Report::new("stored", &args)?;
    let floors = !args.no_floor && !args.server.smoke;
    let log = match floors {
        true => Some(Log::measure(args.bytes).await?),
        false => None,
    };
    for &engine in &args.engines {
        let ground = match engine {
            Engine::Sled => Some(Ground::SledUnsynced),
            Engine::Fjall => Some(Ground::FjallUnsynced),
            Engine::Memory => None,
        };
        let own = match ground.filter(|_| floors) {
            Some(ground) => Some(beside::committed(ground, TOGETHER, args.bytes).await?.0),
            None => None,
        };
        for &part in &args.only {
            post(&args, engine, part, (log, own), &mut report, progress).await?;
        }
    }
    Ok(report)
}

/// What the bare log does.
#[derive(Debug, Clone, Copy)]
struct Log {
    /// Milliseconds until one record is safe.
    one_ms: f64,
    /// Records a second when many become safe together.
    rate: f64,
}

impl Log {
    async fn measure(bytes: u32) -> Outcome<Log> {
        Ok(Log {
            one_ms: beside::committed(Ground::Log, 1, bytes).await?.1,
            rate: beside::committed(Ground::Log, TOGETHER, bytes).await?.0,
        })
    }
}

/// `floors`: of the log, and the rate of the engine by itself.
async fn post(
    args: &StoredArgs,
    engine: Engine,
    part: Part,
    floors: (Option<Log>, Option<f64>),
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let (name, connections, batch) = match part {
        Part::Quiet => ("quiet", 1, 1),
        Part::Single => ("single", args.connections, 1),
        Part::Batch => ("batch", args.batch_connections, args.batch),
    };
    let what = format!("{engine}, {name}");
    let total = args.devices as usize;
    let mut rig = Rig::start(&args.server, &[&engine.setting()], total, progress).await?;
    let bar = progress.wait(&what);
    let before = rig.books().await?;
    let mut backends = rig
        .backends(rig.to_devices(), connections, batch, args.bytes, None)
        .await?;
    let load = Load {
        rate: (part == Part::Quiet).then_some(QUIET_RATE),
        warm_up: Duration::from_secs(match part {
            Part::Quiet => u64::from(!args.server.smoke),
            Part::Single | Part::Batch => args.warm_up.into(),
        }),
        sample: args.fetch.min(args.devices).into(),
        ..Load::closed(0, args.seconds)
    };
    let load = load.at_most(total as u64 * PINGS_OF_A_DEVICE_MAX);
    let measured = rig::load(&mut rig.server, &mut backends, &mut [], load, 0).await?;
    backends.stop().await;
    bar.done();
    let posted = &measured.posted;
    rig::none_refused(report, &what, posted, &[BUSY]);
    let full = posted.next >= load.limit;
    if full {
        report.note(format!(
            "{what}: all mailboxes were full before the time was over; more --devices take more pings."
        ));
    }
    let meant = !args.server.smoke && args.connections >= 32;
    if part == Part::Quiet {
        let median = rig.metric("bellwire_store_sync_median_seconds").await? * 1e3;
        report.push(Figure::new(format!("{what}: a sync, median"), median, "ms"));
        report.push_latency(&format!("{what}: due to answer"), &measured.answer());
        if !args.server.smoke {
            let p50 = format!("{what}: due to answer p50");
            report.set_budget(&p50, Budget::AtMost(median + 1.0));
            if let Some(log) = floors.0 {
                report.set_floor(&p50, log.one_ms);
            }
        }
    } else {
        let burst = posted.seconds.iter().take(BURST_SECONDS).max();
        report.push(
            Figure::new(
                format!("{what}: burst, best of the first {BURST_SECONDS} seconds"),
                *burst.unwrap_or(&0) as f64,
                "pings/s",
            )
            .floor(floors.0.map(|log| log.rate)),
        );
        let budget = match (engine, part) {
            (Engine::Fjall, Part::Single) => Some(15_000.0),
            (Engine::Fjall, Part::Batch) => Some(40_000.0),
            (Engine::Sled, Part::Single) => Some(8_000.0),
            (Engine::Sled, Part::Batch) => Some(15_000.0),
            (Engine::Memory, _) | (_, Part::Quiet) => None,
        };
        let figure = Figure::new(format!("{what}: sustained"), measured.rate(), "pings/s");
        let figure = figure.floor(floors.1);
        let budget = budget.filter(|_| meant && !full);
        report.push(match budget {
            Some(least) => figure.budget(Budget::AtLeast(least)),
            None => figure,
        });
        report.push_latency(&format!("{what}: due to answer"), &measured.answer());
        let usage = &measured.usage;
        usage.tell(report, &what, posted.measured, "µs per ping", Some(posted));
        report.push(Figure::new(
            format!("{what}: syncs"),
            measured.syncs / usage.seconds,
            "syncs/s",
        ));
        report.push(Figure::new(
            format!("{what}: refused because the engine was behind"),
            posted.refusals() as f64,
            "pings",
        ));
        let seconds = (args.warm_up + args.seconds) as usize;
        for (second, &accepted) in posted.seconds.iter().take(seconds).enumerate() {
            report.push(
                Figure::new(
                    format!("{what}: accepted in second {}", second + 1),
                    accepted as f64,
                    "pings/s",
                )
                .plotted(&OVER_TIME, what.clone(), second as f64 + 1.0),
            );
        }
        let memory = crate::process::peak_memory(rig.server.pid())? as f64;
        report.push(Figure::new(
            format!("{what}: resident, peak"),
            memory / f64::from(1 << 20),
            "MiB",
        ));
    }
    fetch(
        args,
        &rig,
        report,
        &what,
        before,
        posted.accepted,
        posted.sampled,
    )
    .await?;
    rig.stop(report).await;
    Ok(())
}

/// Some devices come and fetch what waits for them.
async fn fetch(
    args: &StoredArgs,
    rig: &Rig,
    report: &mut Report,
    what: &str,
    before: rig::Books,
    accepted: u64,
    sampled: u64,
) -> Outcome<()> {
    let bar = rig.progress.wait("fetch");
    let some = &rig.devices[..args.fetch.min(args.devices) as usize];
    let place = rig.place(Carriers::Both);
    let mut fleet = Fleet::sample(&place, Carriers::Both, some, rig.devices.len()).await?;
    fleet.attach(some.len(), false).await?;
    let arrived = rig::wait_for(&mut [&mut fleet], sampled).await?;
    if arrived != sampled {
        report.violation(format!(
            "{what}: {sampled} notifications waited for {} devices, {arrived} came",
            some.len()
        ));
    }
    rig::devices_are_well(report, &mut [&mut fleet]).await?;
    let now = rig.books().await?;
    let counted = now.accepted_since(before);
    if counted != accepted {
        report.violation(format!(
            "{what}: {accepted} pings were answered by 202, the server counts {counted}"
        ));
    }
    fleet.stop().await;
    bar.done();
    Ok(())
}
