//! How many devices does one ping to a topic, or to everyone, reach for a second of the server's time, and how soon has the
//! last of them got it?
//!
//! One ping at a time to devices that are all attached; the next one is posted when all have acknowledged the one before.

use serde::Serialize;

use crate::failure::Outcome;
use crate::fleet::{self, Carriers};
use crate::floor::beside;
use crate::generator::backends::Target;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::rig::{self, Load, Meter, Rig, ServerArgs, quantile_ms};

/// The topic of all devices.
const TOPIC: &str = "fan";

/// Devices that connect at a time.
const CONNECTING: usize = 64;

/// Post pings to a topic and to everyone, and see how they spread over attached devices
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench fanout                                      10,000 devices of each carrier
  bellwire-bench fanout --carrier quic --devices 100000      ten times as many over QUIC
  bellwire-bench fanout --pings 100 --runs 5 --out report    with spread, as files")]
pub(crate) struct FanoutArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// Attached devices, of each carrier by itself
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=200_000))]
    devices: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Measured pings, of each kind
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pings: u32,
    /// Pings before that, not measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    warm_up: u32,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(33..=4_000))]
    bytes: u32,
}

impl FanoutArgs {
    fn smoke(self) -> FanoutArgs {
        FanoutArgs {
            devices: 30,
            pings: 3,
            warm_up: 1,
            ..self
        }
    }
}

/// Runs the workload.
pub(crate) async fn run(args: FanoutArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    let mut report = Report::new("fanout", &args)?;
    for &carrier in args.carrier.each() {
        spread(&args, carrier, &mut report, progress).await?;
    }
    Ok(report)
}

async fn spread(
    args: &FanoutArgs,
    carrier: Carriers,
    report: &mut Report,
    progress: Progress,
) -> Outcome<()> {
    let devices = u64::from(args.devices);
    let floor = match args.no_floor || args.server.smoke {
        true => None,
        false => {
            let bar = progress.phase(&format!("{}, bare", carrier.name()), 2);
            let answered = beside::answered(carrier, devices as usize, args.bytes).await?;
            bar.step();
            report.push(Figure::new(
                format!(
                    "{}: bare connections, each message answered",
                    carrier.name()
                ),
                answered,
                "messages per CPU-second",
            ));
            let written = beside::written(carrier, devices as usize, args.bytes, 1).await?;
            bar.done();
            Some(written)
        }
    };
    let mut rig = Rig::start(&args.server, &[], devices as usize, progress).await?;
    let (api, key) = (rig.server.listen.api, rig.server.key.clone());
    fleet::subscribe(api, &key, &rig.devices, TOPIC, progress).await?;
    let mut fleet = rig.attach(carrier, CONNECTING).await?;
    let before = rig.books().await?;
    let (mut next, mut expected) = (0, 0);
    for (kind, target) in [
        ("topic", Target::Topic(TOPIC.to_owned())),
        ("everyone", Target::Everyone),
    ] {
        let what = format!("{}, {kind}", carrier.name());
        let bar = progress.phase(&what, (args.warm_up + args.pings) as usize);
        let mut backends = rig.backends(target, 1, 1, args.bytes, None).await?;
        let mut answers = Vec::new();
        let (mut median, mut last) = (Vec::new(), Vec::new());
        let mut meter = None;
        for ping in 0..args.warm_up + args.pings {
            if ping == args.warm_up {
                let pids = (vec![backends.pid()?], fleet.pids()?);
                meter = Some(Meter::start(rig.server.pid(), pids.0, pids.1)?);
            }
            // Waiting for the answer of one ping is all there is to do.
            let load = Load::closed(0, 60).at_most(1);
            let fleets = &mut [&mut fleet];
            let measured = rig::load(&mut rig.server, &mut backends, fleets, load, next).await?;
            rig::none_refused(report, &what, &measured.posted, &[]);
            next = measured.posted.next;
            expected += measured.posted.accepted * devices;
            rig::wait_for(&mut [&mut fleet], expected).await?;
            if ping >= args.warm_up {
                answers.push(quantile_ms(&measured.answer(), 1.0));
                let micros = fleet.latency().await?;
                median.push(quantile_ms(&micros, 0.5));
                last.push(quantile_ms(&micros, 1.0));
            }
            bar.step();
        }
        let usage = meter.as_ref().map(Meter::read).transpose()?;
        backends.stop().await;
        bar.done();
        let deliveries = devices * u64::from(args.pings);
        if let Some(usage) = usage {
            let budget = match carrier {
                Carriers::Quic => 40_000.0,
                Carriers::Websocket | Carriers::Plain | Carriers::Both => 60_000.0,
            };
            report.push(
                Figure::new(
                    format!("{what}: deliveries"),
                    deliveries as f64 / usage.server.max(1e-2),
                    "per server CPU-second",
                )
                .floor(floor)
                .budget_if(!args.server.smoke, Budget::AtLeast(budget)),
            );
            usage.tell(report, &what, deliveries, "µs per delivery", None);
        }
        for (name, values) in [
            ("posted to answer", &answers),
            ("posted to the median device", &median),
            ("posted to the last device", &last),
        ] {
            let value = crate::report::median(values).unwrap_or_default();
            report.push(Figure::new(format!("{what}: {name}, median"), value, "ms"));
        }
    }
    rig::judge(report, &rig.server, &mut [&mut fleet], before, expected).await?;
    report.push(Figure::new(
        format!("{}: deliveries in all", carrier.name()),
        expected as f64,
        "notifications",
    ));
    fleet.stop().await;
    rig.stop(report).await;
    Ok(())
}
