//! What does connecting cost, and what happens when all devices come back at once?
//!
//! First devices connect, are welcomed and leave, over and over, with full handshakes and with resumed ones; a server that
//! only takes connections stands beside it. Then a fleet is attached, the server is killed and started again, and all of
//! the fleet comes back at once, while backends go on posting by the clock.

use std::time::Duration;

use serde::Serialize;
use tokio::time::sleep;

use crate::clock::{self, SECOND};
use crate::failure::Outcome;
use crate::fleet::Carriers;
use crate::floor::Floor;
use crate::generator::devices::{Attached, Fleet, Place};
use crate::idle::floor_of;
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::rig::{self, Books, Load, Meter, Rig, ServerArgs, quantile_ms};

/// Connections before those that are measured.
const WARM_UP: usize = 100;

/// Devices that take turns in connecting.
const DEVICES: usize = 500;

/// Connections that post during the storm.
const BACKENDS: u32 = 32;

/// Content of a ping in bytes.
const BYTES: u32 = 256;

/// Time between the last connection and the last reading of the meter, so that what follows it counts.
const AFTER: Duration = Duration::from_millis(300);

/// A part of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Handshakes, full and resumed
    Handshakes,
    /// All devices come back at once after a restart
    Storm,
}

/// Connect devices: full handshakes, resumed ones, and all at once after a restart
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench connect                                       handshakes, then a storm of 5,000
  bellwire-bench connect --only handshakes --carrier quic      one carrier
  bellwire-bench connect --only storm --storm 15000            a larger storm")]
pub(crate) struct ConnectArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Connections of each kind
    #[arg(long, default_value_t = 4_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
    /// Devices in the middle of connecting at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connecting: u32,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
    /// Devices of the storm
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    storm: u32,
    /// Pings a second during the storm and before it
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Time that is measured before the storm and from its beginning, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Handshakes, Part::Storm])]
    only: Vec<Part>,
}

impl ConnectArgs {
    fn smoke(self) -> ConnectArgs {
        ConnectArgs {
            connections: 20,
            connecting: 4,
            storm: 30,
            rate: 50,
            seconds: 1,
            ..self
        }
    }
}

impl ConnectArgs {
    /// Seconds before a load is measured.
    fn warm_up(&self) -> u32 {
        u32::from(!self.server.smoke)
    }
}

/// What connections took.
struct Cost {
    attached: Attached,
    cpu_micros: f64,
}

/// Runs the workload.
pub(crate) async fn run(args: ConnectArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    process::raise_file_limit();
    let mut report = Report::new("connect", &args)?;
    if args.only.contains(&Part::Handshakes) {
        for &carrier in args.carrier.each() {
            for resume in [false, true] {
                handshakes(&args, carrier, resume, &mut report, progress).await?;
            }
        }
    }
    if args.only.contains(&Part::Storm) {
        storm(&args, &mut report, progress).await?;
    }
    Ok(report)
}

async fn handshakes(
    args: &ConnectArgs,
    carrier: Carriers,
    resume: bool,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let kind = if resume { "resumed" } else { "full" };
    let what = format!("{}, {kind}", carrier.name());
    let bar = progress.wait(&what);
    let floor = match args.no_floor {
        true => None,
        false => {
            let floor = Floor::start(floor_of(carrier)).await?;
            let place = Place {
                address: floor.address,
                authority: &floor.authority,
                bellwire: false,
            };
            let mut fleet = Fleet::strangers(&place, carrier, DEVICES, resume).await?;
            let cost = measure(args, floor.pid()?, &mut fleet).await?;
            fleet.stop().await;
            floor.stop().await;
            Some(cost)
        }
    };
    let rig = Rig::start(&args.server, &[], DEVICES, progress).await?;
    let mut fleet = Fleet::start(&rig.place(carrier), carrier, &rig.devices, resume).await?;
    let cost = measure(args, rig.server.pid(), &mut fleet).await?;
    bar.done();
    let wanted = u64::from(args.connections);
    if cost.attached.connections < wanted {
        report.violation(format!(
            "{what}: {} of {wanted} connections were welcomed",
            cost.attached.connections
        ));
    }
    let left = rig.sessions(0).await?;
    if left != 0 {
        report.violation(format!(
            "{what}: the server counts {left} sessions of devices that left"
        ));
    }
    fleet.stop().await;
    rig.stop(report).await;
    let most = Budget::TimesFloorAtMost(1.25);
    let below = floor.as_ref().map(|floor| floor.cpu_micros);
    report.push(
        Figure::new(
            format!("{what}: server CPU of a connection"),
            cost.cpu_micros,
            "µs",
        )
        .floor(below)
        .budget_if(!args.server.smoke && !resume, most),
    );
    report.push(
        Figure::new(
            format!("{what}: connections"),
            1e6 / cost.cpu_micros.max(1.0),
            "per server CPU-second",
        )
        .floor(below.map(|micros| 1e6 / micros.max(1.0))),
    );
    let rate = |cost: &Cost| cost.attached.connections as f64 / cost.attached.seconds.max(1e-3);
    report.push(
        Figure::new(
            format!("{what}: connections with both ends here"),
            rate(&cost),
            "connections/s",
        )
        .floor(floor.as_ref().map(rate)),
    );
    let part = cost.attached.resumed as f64 / cost.attached.connections.max(1) as f64;
    report.push(Figure::new(
        format!("{what}: of these resumed"),
        part * 100.0,
        "%",
    ));
    Ok(())
}

async fn measure(args: &ConnectArgs, pid: u32, fleet: &mut Fleet) -> Outcome<Cost> {
    let at_once = args.connecting as usize;
    fleet
        .cycle(WARM_UP.min(args.connections as usize), at_once)
        .await?;
    sleep(AFTER).await;
    let cpu = process::cpu_time(pid)?;
    let attached = fleet.cycle(args.connections as usize, at_once).await?;
    sleep(AFTER).await;
    let cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    Ok(Cost {
        attached,
        cpu_micros: cpu.as_secs_f64() * 1e6 / attached.connections.max(1) as f64,
    })
}

async fn storm(args: &ConnectArgs, report: &mut Report, progress: Progress) -> Outcome<()> {
    let what = "storm";
    let count = args.storm as usize;
    let mut rig = Rig::start(&args.server, &[], count, progress).await?;
    let mut fleet = rig.attach(args.carrier, args.connecting as usize).await?;
    let before = rig.books().await?;
    let target = rig.to_devices();
    let mut backends = rig
        .backends(target.clone(), BACKENDS, 1, BYTES, None)
        .await?;
    let bar = progress.wait("quiet before the storm");
    let load = Load::by_the_clock(args.rate, args.warm_up(), args.seconds);
    let fleets = &mut [&mut fleet];
    let quiet = rig::load(&mut rig.server, &mut backends, fleets, load, 0).await?;
    let accepted = quiet.posted.accepted;
    rig::judge(report, &rig.server, &mut [&mut fleet], before, accepted).await?;
    bar.done();
    let steady = process::memory(rig.server.pid())?.resident;
    backends.stop().await;

    let bar = progress.wait("storm");
    let stopped = rig.server.kill();
    // The server is gone; what devices make of that is not the question.
    fleet.leave().await?;
    let losses = fleet.counts().await?.lost;
    rig.server = stopped.start().await?;
    let mut backends = rig.backends(target, BACKENDS, 1, BYTES, None).await?;
    let now = clock::now();
    fleet.watch(now, now + 600 * SECOND).await?;
    let pids = (vec![backends.pid()?], fleet.pids()?);
    let meter = Meter::start(rig.server.pid(), pids.0, pids.1)?;
    let load = Load::by_the_clock(args.rate, 0, args.seconds);
    let first = quiet.posted.next;
    let (attached, posted) = tokio::join!(
        fleet.attach(count, true),
        rig::load(&mut rig.server, &mut backends, &mut [], load, first),
    );
    let (attached, posted) = (attached?, posted?);
    let usage = meter.read()?;
    let peak = process::peak_memory(rig.server.pid())?;
    bar.done();
    rig::none_refused(report, what, &posted.posted, &[]);
    let all = accepted + posted.posted.accepted;
    let arrived = rig::wait_for(&mut [&mut fleet], all).await?;
    if arrived != all {
        report.violation(format!(
            "{what}: {all} notifications were accepted before and after the restart, {arrived} arrived"
        ));
    }
    let counts = fleet.counts().await?;
    if counts.doubled > 0 || counts.strange > 0 || counts.lost > losses {
        report.violation(format!("{what}: not all is well: {counts:?}"));
    }
    let sessions = rig.sessions(count).await?;
    if sessions != count {
        report.violation(format!(
            "{what}: {count} devices came back, the server counts {sessions}"
        ));
    }
    let counted = rig.books().await?.accepted_since(Books::empty());
    if counted != posted.posted.accepted {
        report.violation(format!(
            "{what}: {} pings were answered by 202, the server counts {counted}",
            posted.posted.accepted
        ));
    }
    let (calm, busy) = (quiet.answer(), posted.answer());
    let p99 = quantile_ms(&calm, 0.99);
    let meant = !args.server.smoke;
    report.push(Figure::new(format!("{what}: API p99 before"), p99, "ms"));
    report.push(
        Figure::new(
            format!("{what}: API p99 meanwhile"),
            quantile_ms(&busy, 0.99),
            "ms",
        )
        .budget_if(meant, Budget::AtMost(10.0 * p99)),
    );
    report.push(Figure::new(
        format!("{what}: API p50 meanwhile"),
        quantile_ms(&busy, 0.5),
        "ms",
    ));
    report.push(Figure::new(
        format!("{what}: until all were back"),
        attached.seconds,
        "s",
    ));
    report.push(Figure::new(
        format!("{what}: attempts that were made again"),
        attached.again as f64,
        "attempts",
    ));
    report.push(Figure::new(
        format!("{what}: start of the server"),
        rig.server.opened.as_secs_f64(),
        "s",
    ));
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    report.push(Figure::new(
        format!("{what}: resident before"),
        mib(steady),
        "MiB",
    ));
    report.push(
        Figure::new(format!("{what}: resident, peak"), mib(peak), "MiB")
            .budget_if(meant, Budget::AtMost(1.3 * mib(steady))),
    );
    let connections = attached.connections;
    usage.tell(
        report,
        what,
        connections,
        "µs per device",
        Some(&posted.posted),
    );
    fleet.stop().await;
    backends.stop().await;
    rig.stop(report).await;
    Ok(())
}
