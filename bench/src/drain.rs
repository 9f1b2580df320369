//! How fast do devices get what waited for them? Mailboxes are filled while their devices are away; then all of them come at
//! once.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::sleep;

use crate::engine::Engine;
use crate::failure::Outcome;
use crate::fleet::Carriers;
use crate::floor::beside;
use crate::generator::devices::Fleet;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::rig::{self, LOOK_EVERY, Load, Meter, Rig, ServerArgs};

/// Pings of a batch, and connections that fill mailboxes.
const BATCH: u32 = 500;
const CONNECTIONS: u32 = 4;

/// Messages that go to one connection together in the floor: a window of a session.
const TOGETHER: usize = 32;

/// Longest wait for the engine to have all that the log has.
const QUIET_MAX: Duration = Duration::from_secs(60);

/// How new work is refused while the engine is behind.
const BUSY: &str = "store_busy";

/// Fill mailboxes of absent devices, let all of them come, and see how fast they are emptied
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench drain                                200 devices with 1,000 notifications each
  bellwire-bench drain --engine fjall --devices 1000  five times as many, out of fjall")]
pub(crate) struct DrainArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// The engine
    #[arg(long, value_enum, default_value_t = Engine::Sled)]
    engine: Engine,
    /// Devices, of each carrier by itself
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    devices: u32,
    /// Notifications that wait for each
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    depth: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(33..=1_000))]
    bytes: u32,
}

impl DrainArgs {
    fn smoke(self) -> DrainArgs {
        DrainArgs {
            devices: 4,
            depth: 100,
            ..self
        }
    }
}

/// Runs the workload.
pub(crate) async fn run(args: DrainArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    let mut report = Report::new("drain", &args)?;
    for &carrier in args.carrier.each() {
        drain(&args, carrier, &mut report, progress).await?;
    }
    Ok(report)
}

async fn drain(
    args: &DrainArgs,
    carrier: Carriers,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let what = carrier.name();
    let floor = match args.no_floor || args.server.smoke {
        true => None,
        false => {
            let devices = args.devices as usize;
            Some(beside::written(carrier, devices, args.bytes, TOGETHER).await?)
        }
    };
    let engine = args.engine.setting();
    let mut rig = Rig::start(&args.server, &[&engine], args.devices as usize, progress).await?;
    let before = rig.books().await?;
    let wanted = u64::from(args.devices) * u64::from(args.depth);
    let accepted = fill(&mut rig, wanted, args.bytes, None, report).await?;
    quiet(&rig).await?;

    let bar = progress.wait("empty mailboxes");
    let mut fleet = Fleet::start(&rig.place(carrier), carrier, &rig.devices, false).await?;
    let syncs = rig.metric(rig::SYNCS).await?;
    let meter = Meter::start(rig.server.pid(), Vec::new(), fleet.pids()?)?;
    fleet.attach(args.devices as usize, false).await?;
    rig::wait_for(&mut [&mut fleet], accepted).await?;
    let usage = meter.read()?;
    bar.done();
    report.push(
        Figure::new(
            format!("{what}: notifications"),
            accepted as f64 / usage.server.max(1e-2),
            "per server CPU-second",
        )
        .floor(floor)
        .budget_if(!args.server.smoke, Budget::AtLeast(50_000.0)),
    );
    report.push(Figure::new(
        format!("{what}: notifications, connecting included"),
        accepted as f64 / usage.seconds,
        "notifications/s",
    ));
    usage.tell(report, what, accepted, "µs per notification", None);
    rig::judge(report, &rig.server, &mut [&mut fleet], before, accepted).await?;
    let syncs = rig.metric(rig::SYNCS).await? - syncs;
    report.push(Figure::new(format!("{what}: syncs for it"), syncs, "syncs"));
    fleet.stop().await;
    rig.stop(report).await;
    Ok(())
}

/// Posts until so many notifications wait, and says how many do; what is refused because the engine is behind is posted anew.
pub(crate) async fn fill(
    rig: &mut Rig,
    wanted: u64,
    bytes: u32,
    ttl_s: Option<u32>,
    report: &mut Report,
) -> Outcome<u64> {
    let bar = rig.progress.wait("fill mailboxes");
    let target = rig.to_devices();
    let mut backends = rig
        .backends(target, CONNECTIONS, BATCH, bytes, ttl_s)
        .await?;
    let load = Load::closed(0, 3_600).at_most(wanted);
    let measured = rig::load(&mut rig.server, &mut backends, &mut [], load, 0).await?;
    rig::none_refused(report, "filling", &measured.posted, &[BUSY]);
    backends.stop().await;
    bar.done();
    Ok(measured.posted.accepted)
}

/// Waits until the engine has all that the log has.
pub(crate) async fn quiet(rig: &Rig) -> Outcome<()> {
    let give_up = Instant::now() + QUIET_MAX;
    while rig.metric("bellwire_store_lag_bytes").await? > 0.0 && Instant::now() < give_up {
        sleep(LOOK_EVERY).await;
    }
    Ok(())
}
