//! How many pings a second to attached devices, and how fast? Backends post, devices acknowledge, and both sides are
//! counted.
//!
//! Four questions to one server: one quiet ping at a time; fixed rates by the clock; as many as answers allow; the same
//! in batches.

use serde::Serialize;

use crate::failure::Outcome;
use crate::fleet::Carriers;
use crate::floor::beside;
use crate::generator::backends::Backends;
use crate::generator::devices::Fleet;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Plot, Report};
use crate::rig::{self, Load, Measured, Rig, ServerArgs, quantile_ms};

/// Pings a second of the quiet part.
const QUIET_RATE: u32 = 100;

/// Devices that connect at a time.
const CONNECTING: usize = 32;

static TO_DEVICE: Plot = Plot {
    title: "From when a ping was due until the device had it",
    x_label: "pings a second, by the clock",
    x_log: false,
    y_log: true,
};

static TO_ANSWER: Plot = Plot {
    title: "From when a ping was due until its answer",
    x_label: "pings a second, by the clock",
    x_log: false,
    y_log: true,
};

static CPU: Plot = Plot {
    title: "Server CPU of a ping",
    x_label: "pings a second, by the clock",
    x_log: false,
    y_log: false,
};

/// A part of the workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// One ping at a time, 100 a second
    Quiet,
    /// Fixed rates by the clock
    Rates,
    /// As many as answers allow
    Throughput,
    /// The same, many pings in a request
    Batch,
}

/// Post pings to attached devices: quiet, at fixed rates, as many as go through, in batches
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench ping                                    all parts, two minutes
  bellwire-bench ping --only quiet,throughput --runs 5   two parts, five times
  bellwire-bench ping --only rates --rates 500,5000      latency at two rates
  bellwire-bench ping --set STORE__DEFER_MAX=0s          without waiting for acknowledgements")]
pub(crate) struct PingArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// Devices
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    devices: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Keep-alive HTTP/1.1 connections that post, each one request at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    connections: u32,
    /// Measured time of each part, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=3_600))]
    seconds: u32,
    /// Time before that, not measured, seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=600))]
    warm_up: u32,
    /// Pings a second, one part each
    #[arg(long, value_delimiter = ',', default_values_t = [500, 1_000, 2_000, 4_000, 6_000, 8_000, 10_000])]
    rates: Vec<u32>,
    /// Pings of a batch
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(2..=1_000))]
    batch: u32,
    /// Connections that post batches
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    batch_connections: u32,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(33..=4_096))]
    bytes: u32,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
    /// Only these parts
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = [Part::Quiet, Part::Rates, Part::Throughput, Part::Batch])]
    only: Vec<Part>,
}

impl PingArgs {
    fn smoke(self) -> PingArgs {
        PingArgs {
            devices: 8,
            connections: 4,
            seconds: 1,
            warm_up: 0,
            rates: vec![200],
            batch: 20,
            batch_connections: 2,
            ..self
        }
    }
}

/// Runs the workload.
pub(crate) async fn run(args: PingArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    let mut report = Report::new("ping", &args)?;
    let mut rig = Rig::start(&args.server, &[], args.devices as usize, progress).await?;
    let mut fleet = rig.attach(args.carrier, CONNECTING).await?;
    let before = rig.books().await?;
    let mut sum = Sum {
        next: 0,
        accepted: 0,
    };
    // Budgets are for a load that was meant by them, and a quiet machine.
    let meant = !args.server.smoke && args.connections >= 32 && args.bytes >= 1_000;

    if args.only.contains(&Part::Quiet) {
        let bar = progress.wait("quiet pings");
        let mut backends = to_devices(&rig, &args, 1, 1).await?;
        let load = Load::by_the_clock(QUIET_RATE, args.warm_up, args.seconds);
        let measured = sum
            .load(
                &mut report,
                "quiet",
                &mut rig,
                &mut backends,
                &mut fleet,
                load,
            )
            .await?;
        latencies(&mut report, "quiet", &measured, &mut fleet).await?;
        if !args.server.smoke {
            if !args.no_floor {
                let floor = beside::one_way_ms(args.bytes).await?;
                report.set_floor("quiet: due to device p50", floor);
            }
            report.set_budget("quiet: due to device p50", Budget::AtMost(0.4));
            report.set_budget("quiet: due to device p99", Budget::AtMost(2.0));
        }
        backends.stop().await;
        bar.done();
    }
    if args.only.contains(&Part::Rates) {
        let mut backends = to_devices(&rig, &args, args.connections, 1).await?;
        for &rate in &args.rates {
            let what = format!("{rate} pings/s");
            let bar = progress.wait(&what);
            let load = Load::by_the_clock(rate, args.warm_up, args.seconds);
            let measured = sum
                .load(
                    &mut report,
                    &what,
                    &mut rig,
                    &mut backends,
                    &mut fleet,
                    load,
                )
                .await?;
            at_rate(&mut report, rate, &measured, &mut fleet).await?;
            bar.done();
        }
        backends.stop().await;
    }
    if args.only.contains(&Part::Throughput) {
        let bar = progress.wait("as many as go through");
        let mut backends = to_devices(&rig, &args, args.connections, 1).await?;
        let load = Load::closed(args.warm_up, args.seconds);
        let what = "throughput";
        let measured = sum
            .load(&mut report, what, &mut rig, &mut backends, &mut fleet, load)
            .await?;
        report.push(
            Figure::new(format!("{what}: accepted"), measured.rate(), "pings/s")
                .budget_if(meant, Budget::AtLeast(15_000.0)),
        );
        latencies(&mut report, what, &measured, &mut fleet).await?;
        if meant {
            report.set_budget("throughput: due to answer p99", Budget::AtMost(8.0));
        }
        usage(&mut report, what, &measured);
        backends.stop().await;
        bar.done();
    }
    if args.only.contains(&Part::Batch) {
        let bar = progress.wait("batches");
        let mut backends = to_devices(&rig, &args, args.batch_connections, args.batch).await?;
        let load = Load::closed(args.warm_up, args.seconds);
        let what = "batch";
        let measured = sum
            .load(&mut report, what, &mut rig, &mut backends, &mut fleet, load)
            .await?;
        report.push(
            Figure::new(format!("{what}: accepted"), measured.rate(), "pings/s")
                .budget_if(meant, Budget::AtLeast(60_000.0)),
        );
        latencies(&mut report, what, &measured, &mut fleet).await?;
        usage(&mut report, what, &measured);
        backends.stop().await;
        bar.done();
    }
    rig::judge(
        &mut report,
        &rig.server,
        &mut [&mut fleet],
        before,
        sum.accepted,
    )
    .await?;
    report.push(Figure::new(
        "pings in all, warm-up included",
        sum.accepted as f64,
        "pings",
    ));
    fleet.stop().await;
    rig.stop(&mut report).await;
    Ok(report)
}

async fn to_devices(rig: &Rig, args: &PingArgs, connections: u32, batch: u32) -> Outcome<Backends> {
    rig.backends(rig.to_devices(), connections, batch, args.bytes, None)
        .await
}

/// What was posted over all parts.
struct Sum {
    next: u64,
    accepted: u64,
}

impl Sum {
    async fn load(
        &mut self,
        report: &mut Report,
        what: &str,
        rig: &mut Rig,
        backends: &mut Backends,
        fleet: &mut Fleet,
        load: Load,
    ) -> Outcome<Measured> {
        let server = &mut rig.server;
        let measured = rig::load(server, backends, &mut [&mut *fleet], load, self.next).await?;
        self.next = measured.posted.next;
        self.accepted += measured.posted.accepted;
        rig::none_refused(report, what, &measured.posted, &[]);
        if measured.posted.unposted > 0 {
            report.note(format!(
                "{what}: the server did not keep up with the clock."
            ));
        }
        // The next part begins with an empty house, and every latency is in.
        rig::wait_for(&mut [fleet], self.accepted).await?;
        Ok(measured)
    }
}

async fn latencies(
    report: &mut Report,
    what: &str,
    measured: &Measured,
    fleet: &mut Fleet,
) -> Outcome<()> {
    report.push_latency(&format!("{what}: due to answer"), &measured.answer());
    report.push_latency(&format!("{what}: due to device"), &fleet.latency().await?);
    Ok(())
}

fn usage(report: &mut Report, what: &str, measured: &Measured) {
    let Measured {
        posted,
        usage,
        syncs,
    } = measured;
    usage.tell(report, what, posted.measured, "µs per ping", Some(posted));
    report.push(Figure::new(
        format!("{what}: syncs"),
        syncs / usage.seconds,
        "syncs/s",
    ));
}

async fn at_rate(
    report: &mut Report,
    rate: u32,
    measured: &Measured,
    fleet: &mut Fleet,
) -> Outcome<()> {
    let what = format!("{rate} pings/s");
    let (answer, device) = (measured.answer(), fleet.latency().await?);
    for (name, plot, micros) in [
        ("answer", &TO_ANSWER, &answer),
        ("device", &TO_DEVICE, &device),
    ] {
        for (label, quantile) in [("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999)] {
            report.push(
                Figure::new(
                    format!("{what}: due to {name} {label}"),
                    quantile_ms(micros, quantile),
                    "ms",
                )
                .plotted(plot, label, rate),
            );
        }
    }
    let pings = measured.posted.measured.max(1) as f64;
    report.push(
        Figure::new(
            format!("{what}: server CPU"),
            measured.usage.server * 1e6 / pings,
            "µs per ping",
        )
        .plotted(&CPU, "server", rate),
    );
    let lag = measured.lag_ms();
    report.push(Figure::new(
        format!("{what}: generator late by itself, p99"),
        lag.unwrap_or_default(),
        "ms",
    ));
    report.note(format!("{what}: {}", measured.usage.verdict(lag)));
    Ok(())
}
