//! How does Bellwire stand beside others who keep messages for devices? mosquitto and nats-server do the same work, over the
//! same TLS, from the same generator, set up for the same promise as far as they can give it; bench/README.md says how far that is.
//!
//! [`broker`] starts the servers, [`mqtt`] and [`nats`] speak with them over a [`pipe`], [`fleet`] puts all of them behind one
//! face, and [`load`] is the generator, a process of its own.

mod broker;
mod fleet;
mod load;
mod mqtt;
mod nats;
mod pipe;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::child::Child;
use crate::failure::{Failure, Outcome};
use crate::process;
use crate::progress::Progress;
use crate::report::{Figure, Report};

use broker::{Broker, Peer, Start};
use load::{Found, Job, Latency, Sending, What};

pub(crate) use load::{PeerLoad, serve};

/// Longest that a generator may take beyond its measured time: devices are made before it, and messages settle after it.
const AROUND_MAX: Duration = Duration::from_secs(900);

/// No rate of the key that posts, nor of the devices: what is measured is the server.
const UNLIMITED: [&str; 3] = [
    "LIMITS__PINGS_PER_SECOND=10000000",
    "LIMITS__PING_BURST=100000000",
    "LIMITS__DEVICE_PINGS_PER_SECOND=0",
];

/// Messages that an absent device gets at most, with content up to a KiB: below Bellwire's limits of a mailbox, 1,000 and 1 MiB,
/// so that none is evicted. The others have no such limit.
const STORED_OF_A_DEVICE_MAX: u32 = 800;

/// Messages that a backend sends in one write in the part `together`.
const TOGETHER: usize = 32;

/// Part of a rate that must arrive, or the server did not keep up.
const KEPT_UP: f64 = 0.95;

/// Messages a second of the part `quiet`, from one backend.
const QUIET_RATE: u32 = 100;

/// Measure Bellwire beside mosquitto and nats-server
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Peers {
    /// Whom to measure; may be repeated. Default: all
    #[arg(long = "peer", value_enum)]
    peers: Vec<Peer>,
    /// What to measure; may be repeated. Default: all
    #[arg(long = "part", value_enum)]
    parts: Vec<Kind>,
    /// Bellwire's binary; default: `bellwire` beside this program
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    server: Option<PathBuf>,
    /// mosquitto's binary; default: the system's
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    mosquitto: Option<PathBuf>,
    /// nats-server's binary; default: what bench/peers/install brought, or the system's
    #[arg(long, value_name = "PATH")]
    #[serde(skip)]
    nats_server: Option<PathBuf>,
    /// A setting of Bellwire, such as STORE__ENGINE=memory; may be repeated
    #[arg(long = "set", value_name = "KEY=VALUE")]
    settings: Vec<String>,
    /// Seconds between two saves of mosquitto's database; it answers in between all the same
    #[arg(long, default_value_t = 1_800, value_parser = clap::value_parser!(u32).range(1..=86_400))]
    mosquitto_autosave: u32,
    /// When nats-server syncs; anything but `always` answers before a message is on disk
    #[arg(long, default_value = "always", value_name = "always|TIME", value_parser = sync_interval)]
    nats_sync: String,
    /// Streams of nats-server that messages are spread over, each device's in one of them
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    nats_streams: u32,
    /// Devices that stay silent
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    idle: u32,
    /// Quiet time before memory is read, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    settle: u32,
    /// Devices that messages go to
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    devices: u32,
    /// Connections of backends, each one request at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=100))]
    connections: u32,
    /// Messages a second of the part `clock`, by the clock; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 3_000], value_parser = clap::value_parser!(u32).range(1..=400_000))]
    rates: Vec<u32>,
    /// Messages that are stored for absent devices
    #[arg(long, default_value_t = 40_000, value_parser = clap::value_parser!(u32).range(1..=5_000_000))]
    stored: u32,
    /// Bytes of a message
    #[arg(long, default_value_t = 1_024, value_parser = clap::value_parser!(u32).range(12..=4_096))]
    bytes: u32,
    /// Measured time of a flow of messages, seconds
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// Time before that, not measured, seconds
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(0..=60))]
    warm_up: u32,
    /// A moment of each, to see that everything arrives; speed is not looked at
    #[arg(long)]
    smoke: bool,
}

/// `always`, or a number with a unit, such as `2m`.
fn sync_interval(text: &str) -> Result<String, String> {
    let time = text.strip_suffix(['s', 'm', 'h']);
    let is_number =
        |digits: &str| !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    match text == "always" || time.is_some_and(is_number) {
        true => Ok(text.to_owned()),
        false => Err("expected `always`, or a time such as 10s or 2m".to_owned()),
    }
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    /// Memory of devices that are silent, connected and away
    Idle,
    /// One message at a time to attached devices
    Quiet,
    /// Messages by the clock to attached devices
    Clock,
    /// As many as get through to attached devices, one request at a time on each connection
    Attached,
    /// The same with 32 messages in one request, or in one write
    Together,
    /// Messages for absent devices, which then fetch them
    Stored,
    /// The same with 32 messages in one request, or in one write
    StoredTogether,
}

impl Kind {
    const ALL: [Kind; 7] = [
        Kind::Idle,
        Kind::Quiet,
        Kind::Clock,
        Kind::Attached,
        Kind::Together,
        Kind::Stored,
        Kind::StoredTogether,
    ];

    fn name(self) -> &'static str {
        match self {
            Kind::Idle => "idle",
            Kind::Quiet => "quiet",
            Kind::Clock => "clock",
            Kind::Attached => "attached",
            Kind::Together => "together",
            Kind::Stored => "stored",
            Kind::StoredTogether => "stored together",
        }
    }
}

impl Peers {
    fn smoke(self) -> Peers {
        Peers {
            idle: 20,
            settle: 1,
            devices: 8,
            connections: 4,
            rates: vec![500],
            stored: 640,
            seconds: 60,
            warm_up: 0,
            ..self
        }
    }

    /// Messages after which a flow ends.
    fn messages(&self) -> Option<usize> {
        self.smoke.then_some(320)
    }

    fn sending(&self, kind: Kind) -> Sending {
        Sending {
            connections: match kind {
                Kind::Quiet => 1,
                Kind::Idle
                | Kind::Clock
                | Kind::Attached
                | Kind::Together
                | Kind::Stored
                | Kind::StoredTogether => self.connections as usize,
            },
            burst: match kind {
                Kind::Together | Kind::StoredTogether => TOGETHER,
                Kind::Idle | Kind::Quiet | Kind::Clock | Kind::Attached | Kind::Stored => 1,
            },
            bytes: self.bytes as usize,
            messages: self.messages(),
        }
    }

    /// What a generator does for a part, and how that is called.
    fn jobs(&self, kind: Kind) -> Vec<(String, load::Part)> {
        let sending = self.sending(kind);
        let flow = |rate| load::Part::Flow {
            sending,
            rate,
            seconds: self.seconds,
            warm_up: self.warm_up,
        };
        let name = kind.name().to_owned();
        match kind {
            Kind::Idle => vec![(
                name,
                load::Part::Idle {
                    settle: self.settle,
                },
            )],
            Kind::Quiet => vec![(name, flow(Some(QUIET_RATE)))],
            Kind::Clock => {
                let of = |&rate: &u32| (format!("{rate} a second"), flow(Some(rate)));
                self.rates.iter().map(of).collect()
            }
            Kind::Attached | Kind::Together => vec![(name, flow(None))],
            Kind::Stored | Kind::StoredTogether => {
                let sending = Sending {
                    messages: Some(self.stored as usize),
                    ..sending
                };
                vec![(name, load::Part::Stored { sending })]
            }
        }
    }

    fn devices(&self, kind: Kind) -> u32 {
        match kind {
            Kind::Idle => self.idle,
            Kind::Quiet | Kind::Clock | Kind::Attached | Kind::Together => self.devices,
            // So many that no mailbox overflows.
            Kind::Stored | Kind::StoredTogether => self
                .devices
                .max(self.stored.div_ceil(STORED_OF_A_DEVICE_MAX)),
        }
    }

    fn program(&self, peer: Peer) -> Outcome<PathBuf> {
        let asked = match peer {
            Peer::Bellwire => &self.server,
            Peer::Mosquitto => &self.mosquitto,
            Peer::Nats => &self.nats_server,
        };
        broker::program(peer, asked.as_deref())
    }
}

/// Runs the workload.
pub(crate) async fn run(args: Peers, progress: Progress) -> Outcome<Report> {
    let args = if args.smoke { args.smoke() } else { args };
    let files = process::raise_file_limit();
    let most = args.idle.max(args.devices(Kind::Stored)) + args.connections;
    if u64::from(most) + process::FILES_RESERVED > files {
        return Err(Failure::new(format!(
            "{most} connections do not fit into {files} open files"
        )));
    }
    let all = |asked: &[Peer]| match asked {
        [] => Peer::ALL.to_vec(),
        some => some.to_vec(),
    };
    let mut programs = Vec::new();
    let mut report = Report::new("peers", &args)?;
    for peer in all(&args.peers) {
        let program = args.program(peer)?;
        report.note(format!(
            "{}: {}",
            peer.name(),
            broker::version(peer, &program)?
        ));
        programs.push((peer, program));
    }
    let mut settings: Vec<String> = UNLIMITED.map(str::to_owned).to_vec();
    settings.extend(args.settings.iter().cloned());
    for kind in Kind::ALL {
        if !args.parts.is_empty() && !args.parts.contains(&kind) {
            continue;
        }
        for (name, part) in args.jobs(kind) {
            // One after the other under the same part, so that what the machine does meanwhile hits all alike.
            for (peer, program) in &programs {
                let bar = progress.wait(&format!("{name}: {}", peer.name()));
                let start = Start {
                    peer: *peer,
                    program,
                    settings: &settings,
                    autosave: args.mosquitto_autosave,
                    nats_sync: &args.nats_sync,
                    nats_streams: args.nats_streams as usize,
                };
                let devices = args.devices(kind) as usize;
                measure(&mut report, &start, &name, part, devices).await?;
                bar.done();
            }
        }
    }
    Ok(report)
}

/// Does one job with a fresh server. What goes wrong is the report's, and the others are measured all the same.
async fn measure(
    report: &mut Report,
    start: &Start<'_>,
    name: &str,
    part: load::Part,
    devices: usize,
) -> Outcome<()> {
    let title = format!("{name}, {}", start.peer.name());
    let broker = Broker::start(start).await?;
    let job = Job {
        target: broker.target().clone(),
        part,
        devices,
        connecting: 32,
    };
    let mut child = Child::start("peer-load", &job)?;
    let found: Outcome<Found> = child.hear(AROUND_MAX).await;
    child.stop().await;
    match found {
        Ok(found) => {
            for violation in &found.violations {
                report.violation(format!("{title}: {violation}"));
            }
            tell(report, &title, &found.what);
            if let (
                load::Part::Flow {
                    rate: Some(rate), ..
                },
                What::Flow(flow),
            ) = (part, &found.what)
            {
                let arrived = flow.arrived as f64 / flow.seconds;
                if arrived < f64::from(rate) * KEPT_UP {
                    report.note(format!(
                        "{title}: it did not keep up, so messages waited the longer the longer it ran"
                    ));
                }
            }
        }
        Err(failure) => report.violation(format!("{title}: {failure}")),
    }
    if !broker.stop().await {
        let what = format!("{title}: the server did not end by itself after SIGTERM");
        // What a peer does with what it holds is not what is measured.
        match start.peer {
            Peer::Bellwire => report.violation(what),
            Peer::Mosquitto | Peer::Nats => report.note(what),
        }
    }
    Ok(())
}

fn tell(report: &mut Report, title: &str, what: &What) {
    let mut push = |what: &str, value: f64, unit| {
        report.push(Figure::new(format!("{title}: {what}"), value, unit));
    };
    let mut latencies = Vec::new();
    match what {
        What::Idle(idle) => {
            push("memory of a known device", idle.absent_bytes, "bytes");
            push("memory of its connection", idle.connection_bytes, "bytes");
            if let Some(kernel) = idle.kernel_bytes {
                push("kernel memory of it, about", kernel, "bytes");
            }
            push("server CPU of connecting", idle.cpu_micros, "µs");
            push("connections", idle.per_second, "connections/s");
            push("connected", idle.connected as f64, "devices");
        }
        What::Flow(flow) => {
            push("arrived", flow.arrived as f64 / flow.seconds, "messages/s");
            push(
                "answered",
                flow.answered as f64 / flow.seconds,
                "messages/s",
            );
            let thousands = (flow.arrived as f64 / 1e3).max(f64::MIN_POSITIVE);
            for (who, cpu) in [
                ("server", flow.server_cpu_seconds),
                ("generator", flow.generator_cpu_seconds),
            ] {
                if flow.arrived > 0 {
                    let each = cpu * 1e3 / thousands;
                    push(&format!("{who} CPU"), each, "ms per 1,000 messages");
                }
                push(
                    &format!("{who} CPU, share of a core"),
                    cpu / flow.seconds * 100.0,
                    "%",
                );
            }
            push("messages in all", flow.published as f64, "messages");
            latencies.push(("to answer", flow.to_answer));
            latencies.push(("to device", flow.to_device));
        }
        What::Stored(stored) => {
            let messages = stored.messages as f64;
            let thousands = messages.max(1.0) / 1e3;
            push("stored", messages / stored.publish_seconds, "messages/s");
            push(
                "server CPU of storing",
                stored.publish_cpu_seconds * 1e3 / thousands,
                "ms per 1,000 messages",
            );
            push("memory of a message", stored.message_bytes, "bytes");
            push(
                "fetched, connecting included",
                messages / stored.fetch_seconds,
                "messages/s",
            );
            push(
                "server CPU of fetching",
                stored.fetch_cpu_seconds * 1e3 / thousands,
                "ms per 1,000 messages",
            );
            push("messages in all", messages, "messages");
            latencies.push(("to answer", stored.to_answer));
        }
    }
    for (what, Latency { p50, p90, p99, max }) in latencies {
        for (label, value) in [("p50", p50), ("p90", p90), ("p99", p99), ("max", max)] {
            push(&format!("{what} {label}"), value, "ms");
        }
    }
}
