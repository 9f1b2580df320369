//! What does a connected device cost that has nothing to say, and what does connecting cost?
//!
//! Devices connect to a fresh server, one carrier after the other; the growth of the server's memory, divided by the
//! devices, is what each of them holds, and the processor time is what its connection took. The same figures of a server
//! that does nothing else stand beside them, measured in the same run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bellwire_protocol::Carrier;
use serde::Serialize;
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::api::{Metrics, Registered};
use crate::device::{Dialer, Link};
use crate::failure::{Failure, Outcome};
use crate::fleet::{self, Attached, Carriers};
use crate::floor::{Floor, FloorCarrier};
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Report};
use crate::server::{self, Server};

/// Devices that connect and leave before anything is measured, so that what a process makes once is there.
const WARM_UP: usize = 64;

/// How long sessions may take to be counted by the server, or to be gone from its count.
const COUNTED_MAX: Duration = Duration::from_secs(30);

/// How often a condition is looked at while waiting.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Connect devices that stay silent, and weigh them
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Idle {
    /// The server binary; default: `bellwire` beside this program
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    pub(crate) server: Option<PathBuf>,
    /// A setting of the server, such as STORE__ENGINE=memory; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) settings: Vec<String>,
    /// Devices over WebSocket; each takes a file of this process and one of the server
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) websocket: u32,
    /// Devices over QUIC; they share a few sockets
    #[arg(long, default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(crate) quic: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    pub(crate) carrier: Carriers,
    /// Devices in the middle of connecting at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub(crate) connecting: u32,
    /// Quiet time before memory is read, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub(crate) settle: u32,
    /// Leave out the floors
    #[arg(long)]
    pub(crate) no_floor: bool,
    /// A few devices, to see that all of them connect and stay; sizes and times are not looked at
    #[arg(long)]
    pub(crate) smoke: bool,
}

impl Idle {
    fn smoke(self) -> Idle {
        Idle {
            websocket: 20,
            quic: 20,
            connecting: 8,
            settle: 1,
            ..self
        }
    }
}

/// What one server cost.
struct Cost {
    resident: f64,
    proportional: f64,
    slab: Option<f64>,
    tcp_buffers: Option<f64>,
    cpu_micros: f64,
    connects_per_second: f64,
}

/// Runs the workload.
pub(crate) async fn run(args: Idle, progress: Progress) -> Outcome<Report> {
    let args = if args.smoke { args.smoke() } else { args };
    let files = process::raise_file_limit();
    if args.carrier != Carriers::Quic && u64::from(args.websocket) + process::FILES_RESERVED > files
    {
        return Err(Failure::new(format!(
            "{} WebSockets do not fit into {files} open files",
            args.websocket
        )));
    }
    let mut report = Report::new("idle", &args)?;
    let binary = server::binary(args.server.as_deref())?;
    for (carrier, carriers, floor, count) in [
        (
            Carrier::WebSocket,
            Carriers::Websocket,
            FloorCarrier::Websocket,
            args.websocket,
        ),
        (Carrier::Quic, Carriers::Quic, FloorCarrier::Quic, args.quic),
    ] {
        if args.carrier != Carriers::Both && args.carrier != carriers {
            continue;
        }
        let floor = match args.no_floor {
            true => None,
            false => Some(weigh_floor(&args, carrier, floor, count as usize, progress).await?),
        };
        let ours = weigh_server(
            &args,
            &binary,
            carriers,
            count as usize,
            &mut report,
            progress,
        )
        .await?;
        tell(&mut report, carrier, count, &ours, floor.as_ref());
    }
    Ok(report)
}

async fn weigh_server(
    args: &Idle,
    binary: &Path,
    carriers: Carriers,
    count: usize,
    report: &mut Report,
    progress: Progress,
) -> Outcome<Cost> {
    let mut server = Server::start(binary, &args.settings).await?;
    let listen = server.listen.clone();
    let devices: Arc<[Registered]> = fleet::register(listen.api, &server.key, count, progress)
        .await?
        .into();
    let dialer = Dialer::new(listen.devices, &server.authority, true)?;
    let at_once = args.connecting as usize;
    let sessions = async |wanted: usize| -> Outcome<usize> {
        let give_up = Instant::now() + COUNTED_MAX;
        loop {
            let metrics = Metrics::read(listen.operations).await?;
            let counted = metrics.sum("bellwire_sessions", "") as usize;
            if counted == wanted || Instant::now() > give_up {
                return Ok(counted);
            }
            sleep(LOOK_EVERY).await;
        }
    };

    let first: Arc<[Registered]> = devices[..count.min(WARM_UP)].into();
    drop(fleet::attach(&dialer, &first, carriers, at_once, progress).await?);
    sessions(0).await?;
    let (cost, mut held) = weigh(
        args,
        server.pid(),
        count,
        fleet::attach(&dialer, &devices, carriers, at_once, progress),
        progress,
    )
    .await?;
    server.check()?;
    let counted = sessions(count).await?;
    if counted != count {
        report.violations.push(format!(
            "{count} devices were welcomed over {carriers:?}, the server counts {counted}"
        ));
    }
    report.violations.extend(held.lost());
    drop(held);
    if !server.stop().await {
        report.violation("the server did not end by itself after SIGTERM");
    }
    Ok(cost)
}

async fn weigh_floor(
    args: &Idle,
    carrier: Carrier,
    floor: FloorCarrier,
    count: usize,
    progress: Progress,
) -> Outcome<Cost> {
    let floor = Floor::start(floor).await?;
    let dialer = Dialer::new(floor.address, &floor.authority, false)?;
    let connect = |count: usize| {
        let dialer = dialer.clone();
        fleet::connect_all(count, args.connecting as usize, move |_| {
            let dialer = dialer.clone();
            async move {
                let mut link: Link = dialer.connect(carrier).await?;
                // QUIC shows a stream to the other side with its first byte.
                link.send_bytes(&[0]).await?;
                Ok((link, None))
            }
        })
    };
    drop(connect(count.min(WARM_UP)).await?);
    // It counts nothing; those that left are gone long before this ends.
    sleep(Duration::from_secs(1)).await;
    let bar = progress.wait("connect to the floor");
    let (cost, held) = weigh(args, floor.pid()?, count, connect(count), progress).await?;
    bar.done();
    drop(held);
    floor.stop().await;
    Ok(cost)
}

/// Reads time and memory of a process around `connect`.
async fn weigh(
    args: &Idle,
    pid: u32,
    count: usize,
    connect: impl Future<Output = Outcome<Vec<Attached>>>,
    progress: Progress,
) -> Outcome<(Cost, Held)> {
    let memory = process::memory(pid)?;
    let kernel = process::kernel_memory();
    let cpu = process::cpu_time(pid)?;
    let started = Instant::now();
    let links = connect.await?;
    let took = started.elapsed();
    // What follows the last welcome, such as tickets, belongs to connecting too.
    let held = Held::new(links);
    let bar = progress.wait("settle");
    sleep(Duration::from_secs(args.settle.into())).await;
    bar.done();
    let cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    let memory_after = process::memory(pid)?;
    let kernel_after = process::kernel_memory();
    let each = |before: u64, after: u64| (after as f64 - before as f64) / count as f64;
    // Both ends of each connection are on this machine, so half of what the kernel took is the server's.
    let kernel = kernel.zip(kernel_after);
    let cost = Cost {
        resident: each(memory.resident, memory_after.resident),
        proportional: each(memory.proportional, memory_after.proportional),
        slab: kernel.map(|(before, after)| each(before.slab, after.slab) / 2.0),
        tcp_buffers: kernel
            .map(|(before, after)| each(before.tcp_buffers, after.tcp_buffers) / 2.0),
        cpu_micros: cpu.as_secs_f64() * 1e6 / count as f64,
        connects_per_second: count as f64 / took.as_secs_f64(),
    };
    Ok((cost, held))
}

/// Devices that stay. Dropping it lets them all go.
struct Held(JoinSet<Failure>);

impl Held {
    fn new(links: Vec<Attached>) -> Held {
        let mut tasks = JoinSet::new();
        for (mut link, keep_alive) in links {
            tasks.spawn(async move { link.hold(keep_alive).await });
        }
        Held(tasks)
    }

    /// Devices whose connection ended, in one sentence with the first reason.
    fn lost(&mut self) -> Option<String> {
        let mut reasons = std::iter::from_fn(|| self.0.try_join_next());
        let first = match reasons.next()? {
            Ok(failure) => failure.to_string(),
            Err(error) => error.to_string(),
        };
        let more = reasons.count();
        Some(format!(
            "{} devices lost their connection: {first}",
            more + 1
        ))
    }
}

fn tell(report: &mut Report, carrier: Carrier, count: u32, ours: &Cost, floor: Option<&Cost>) {
    let name = carrier.name();
    let bytes_max = match carrier {
        Carrier::WebSocket => 11.0 * 1024.0,
        Carrier::Quic => 29.0 * 1024.0,
    };
    let figure = |what: &str, value: f64, unit, floor: Option<f64>| {
        Figure::new(format!("{name}: {what}"), value, unit).floor(floor)
    };
    let of = |get: fn(&Cost) -> f64| (get(ours), floor.map(get));
    let (value, below) = of(|cost| cost.proportional);
    report.push(
        figure("memory of a device", value, "bytes", below).budget(Budget::AtMost(bytes_max)),
    );
    if let Some(below) = below {
        report.push(
            figure("of that Bellwire's own", value - below, "bytes", None)
                .budget(Budget::AtMost(1.5 * 1024.0)),
        );
    }
    let (value, below) = of(|cost| cost.resident);
    report.push(figure("resident memory of a device", value, "bytes", below));
    if carrier == Carrier::WebSocket {
        for (what, get) in [
            (
                "kernel objects",
                (|cost| cost.slab) as fn(&Cost) -> Option<f64>,
            ),
            ("kernel buffers", |cost| cost.tcp_buffers),
        ] {
            if let Some(value) = get(ours) {
                let what = format!("{what} of a device, about");
                report.push(figure(&what, value, "bytes", floor.and_then(get)));
            }
        }
    }
    let (value, below) = of(|cost| cost.cpu_micros);
    report.push(
        figure("server CPU of a connection", value, "µs", below)
            .budget(Budget::TimesFloorAtMost(1.25)),
    );
    let (value, below) = of(|cost| cost.connects_per_second);
    report.push(figure("connections", value, "connections/s", below));
    report.push(figure("devices", f64::from(count), "devices", None));
}
