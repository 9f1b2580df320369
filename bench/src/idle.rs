//! What does a connected device hold that has nothing to say?
//!
//! Devices connect to a fresh server, one carrier after the other; the growth of the server's memory, divided by the
//! devices, is what each of them holds. The same figures of a server that does nothing else stand beside them, measured
//! in the same run, and what is more than that is Bellwire's own.

use std::time::Duration;

use serde::Serialize;
use tokio::time::sleep;

use crate::failure::{Failure, Outcome};
use crate::fleet::Carriers;
use crate::floor::{Floor, FloorCarrier};
use crate::generator::devices::{Fleet, Place};
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::rig::{self, Rig, ServerArgs};

/// Devices that connect and leave before anything is measured, so that what a process makes once is there.
const WARM_UP: usize = 64;

/// Time for those that left to be gone from a floor, which counts nothing.
const GONE_AFTER: Duration = Duration::from_secs(1);

/// Connect devices that stay silent, and weigh them
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench idle                                          2,000 WebSockets, 5,000 over QUIC
  bellwire-bench idle --websocket 15000 --quic 200000          as many as fit here
  bellwire-bench idle --carrier plain                          without TLS, as behind a load balancer")]
pub(crate) struct IdleArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// Devices over WebSocket, with TLS and without; each takes a file here and one of the server
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    websocket: u32,
    /// Devices over QUIC; they share a few sockets
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    quic: u32,
    /// What the devices connect by; `both`: plain WebSocket as well
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Devices in the middle of connecting at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connecting: u32,
    /// Quiet time before memory is read, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    settle: u32,
    /// Leave out the floors
    #[arg(long)]
    no_floor: bool,
}

impl IdleArgs {
    fn smoke(self) -> IdleArgs {
        IdleArgs {
            websocket: 20,
            quic: 20,
            connecting: 8,
            settle: 1,
            ..self
        }
    }
}

/// What each device costs one server.
struct Cost {
    resident: f64,
    own: f64,
    slab: Option<f64>,
    tcp_buffers: Option<f64>,
    /// CPU of the quiet time, microseconds of each device and second.
    quiet_micros: f64,
}

/// Runs the workload.
pub(crate) async fn run(args: IdleArgs, progress: Progress) -> Outcome<Report> {
    let args = if args.server.smoke {
        args.smoke()
    } else {
        args
    };
    process::raise_file_limit();
    let mut report = Report::new("idle", &args)?;
    let carriers: &[Carriers] = match args.carrier {
        Carriers::Both => &[Carriers::Plain, Carriers::Websocket, Carriers::Quic],
        Carriers::Websocket | Carriers::Quic | Carriers::Plain => args.carrier.each(),
    };
    let mut floors = Vec::new();
    for &carrier in carriers {
        let count = match carrier {
            Carriers::Quic => args.quic,
            Carriers::Websocket | Carriers::Plain | Carriers::Both => args.websocket,
        };
        let floor = match args.no_floor {
            true => None,
            false => Some(weigh_floor(&args, carrier, count as usize, progress).await?),
        };
        let ours = weigh_server(&args, carrier, count as usize, &mut report, progress).await?;
        tell(&mut report, &args, carrier, count, &ours, floor.as_ref());
        if let Some(floor) = floor {
            floors.push((carrier, floor.own));
        }
    }
    let below = |wanted| floors.iter().find(|(carrier, _)| *carrier == wanted);
    if let (Some((_, plain)), Some((_, tls))) = (below(Carriers::Plain), below(Carriers::Websocket))
    {
        // What the libraries hold for a device over TLS, part by part; Bellwire's own stands above.
        report.push(Figure::new(
            "websocket: of that socket, task and WebSocket",
            *plain,
            "bytes",
        ));
        report.push(Figure::new("websocket: of that TLS", tls - plain, "bytes"));
    }
    Ok(report)
}

async fn weigh_server(
    args: &IdleArgs,
    carrier: Carriers,
    count: usize,
    report: &mut Report,
    progress: Progress,
) -> Outcome<Cost> {
    let rig = Rig::start(&args.server, &[], count, progress).await?;
    let at_once = args.connecting as usize;
    let first = &rig.devices[..count.min(WARM_UP)];
    let mut fleet = Fleet::start(&rig.place(carrier), carrier, first, false).await?;
    fleet.attach(at_once, false).await?;
    fleet.stop().await;
    rig.sessions(0).await?;

    let mut fleet = Fleet::start(&rig.place(carrier), carrier, &rig.devices, false).await?;
    let cost = weigh(args, rig.server.pid(), &mut fleet, progress).await?;
    let counted = rig.sessions(count).await?;
    if counted != count {
        report.violation(format!(
            "{count} devices were welcomed over {}, the server counts {counted}",
            carrier.name()
        ));
    }
    rig::devices_are_well(report, &mut [&mut fleet]).await?;
    let attached = fleet.counts().await?.attached;
    if attached != count as u64 {
        report.violation(format!(
            "{attached} of {count} devices are still connected over {}",
            carrier.name()
        ));
    }
    // Everybody is there and is cut at once, because no workload has a window for drains.
    let ended = rig.stop(report).await;
    report.push(Figure::new(
        format!("{}: ending while all are attached", carrier.name()),
        ended.as_secs_f64(),
        "s",
    ));
    fleet.stop().await;
    Ok(cost)
}

async fn weigh_floor(
    args: &IdleArgs,
    carrier: Carriers,
    count: usize,
    progress: Progress,
) -> Outcome<Cost> {
    let floor = Floor::start(floor_of(carrier)).await?;
    let place = Place {
        address: floor.address,
        authority: &floor.authority,
        bellwire: false,
    };
    let mut fleet = Fleet::strangers(&place, carrier, count.min(WARM_UP), false).await?;
    fleet.attach(args.connecting as usize, false).await?;
    fleet.stop().await;
    sleep(GONE_AFTER).await;
    let mut fleet = Fleet::strangers(&place, carrier, count, false).await?;
    let cost = weigh(args, floor.pid()?, &mut fleet, progress).await?;
    let attached = fleet.counts().await?.attached;
    if attached != count as u64 {
        return Err(Failure::new(format!(
            "{attached} of {count} connections to the floor stayed"
        )));
    }
    fleet.stop().await;
    floor.stop().await;
    Ok(cost)
}

/// The floor under a carrier.
pub(crate) fn floor_of(carrier: Carriers) -> FloorCarrier {
    match carrier {
        Carriers::Quic => FloorCarrier::Quic,
        Carriers::Plain => FloorCarrier::Plain,
        Carriers::Websocket | Carriers::Both => FloorCarrier::Websocket,
    }
}

/// Reads time and memory of a process around connecting.
async fn weigh(args: &IdleArgs, pid: u32, fleet: &mut Fleet, progress: Progress) -> Outcome<Cost> {
    let memory = process::memory(pid)?;
    let kernel = process::kernel_memory();
    let bar = progress.wait("connect devices");
    fleet.attach(args.connecting as usize, false).await?;
    bar.done();
    // What follows the last welcome, such as tickets, belongs to connecting.
    let bar = progress.wait("settle");
    sleep(GONE_AFTER).await;
    let cpu = process::cpu_time(pid)?;
    sleep(Duration::from_secs(args.settle.into())).await;
    bar.done();
    let cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    let memory_after = process::memory(pid)?;
    let kernel_after = process::kernel_memory();
    let count = fleet.devices as f64;
    let each = |before: u64, after: u64| (after as f64 - before as f64) / count;
    // Both ends of each connection are on this machine, so half of what the kernel took is the server's.
    let kernel = kernel.zip(kernel_after);
    Ok(Cost {
        resident: each(memory.resident, memory_after.resident),
        own: each(memory.own, memory_after.own),
        slab: kernel.map(|(before, after)| each(before.slab, after.slab) / 2.0),
        tcp_buffers: kernel
            .map(|(before, after)| each(before.tcp_buffers, after.tcp_buffers) / 2.0),
        quiet_micros: cpu.as_secs_f64() * 1e6 / count / f64::from(args.settle),
    })
}

fn tell(
    report: &mut Report,
    args: &IdleArgs,
    carrier: Carriers,
    count: u32,
    ours: &Cost,
    floor: Option<&Cost>,
) {
    let name = carrier.name();
    let mut figure = |what: &str,
                      unit: &'static str,
                      of: &dyn Fn(&Cost) -> Option<f64>,
                      budget: Option<Budget>| {
        let Some(value) = of(ours) else { return };
        let figure = Figure::new(format!("{name}: {what}"), value, unit).floor(floor.and_then(of));
        report.push(match budget.filter(|_| !args.server.smoke) {
            Some(budget) => figure.budget(budget),
            None => figure,
        });
    };
    let most = match carrier {
        Carriers::Quic => 29.0,
        Carriers::Plain => 3.0,
        Carriers::Websocket | Carriers::Both => 11.0,
    };
    figure(
        "memory of a device",
        "bytes",
        &|cost| Some(cost.own),
        Some(Budget::AtMost(most * 1_024.0)),
    );
    figure(
        "resident memory of a device",
        "bytes",
        &|cost| Some(cost.resident),
        None,
    );
    if carrier != Carriers::Quic {
        figure(
            "kernel objects of a device, about",
            "bytes",
            &|cost| cost.slab,
            None,
        );
        figure(
            "kernel buffers of a device, about",
            "bytes",
            &|cost| cost.tcp_buffers,
            None,
        );
    }
    figure(
        "server CPU of a quiet device",
        "µs a second",
        &|cost| Some(cost.quiet_micros),
        None,
    );
    if let Some(floor) = floor {
        let own = Figure::new(
            format!("{name}: of that Bellwire's own"),
            ours.own - floor.own,
            "bytes",
        );
        report.push(own.budget_if(!args.server.smoke, Budget::AtMost(1.5 * 1_024.0)));
    }
    report.push(Figure::new(
        format!("{name}: devices"),
        f64::from(count),
        "devices",
    ));
}
