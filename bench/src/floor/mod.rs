//! Floors: what this machine and the bare libraries need for one thing alone. A figure of the server divided by its floor
//! survives a change of machine.
//!
//! [`server`] holds connections, [`connect`] weighs them, [`commit`] makes records safe in groups, [`mod@write`] writes messages to
//! connections. Each runs in a process of its own that does nothing else.

pub(crate) mod beside;
mod commit;
mod connect;
mod server;
mod write;

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use crate::failure::{During, Failure, Outcome};
use crate::process;
use crate::progress::Progress;
use crate::report::{Figure, Report};

pub(crate) use commit::{FloorCommit, Ground, serve as serve_commit};
pub(crate) use server::{Floor, FloorCarrier, FloorServer, serve};
pub(crate) use write::{FloorWrite, Over, serve as serve_write};

/// Messages that go to one connection in one write.
const TOGETHER: usize = 32;

/// Measure what the bare libraries and the disk allow
#[derive(Debug, Clone, clap::Args, Serialize)]
pub(crate) struct Floors {
    /// What to measure; may be repeated. Default: all
    #[arg(long = "part", value_enum)]
    parts: Vec<Part>,
    /// Connections of the floor of idle devices, by each carrier
    #[arg(long, default_value_t = 2_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    connections: u32,
    /// Connections in the middle of connecting at a time
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    connecting: u32,
    /// Quiet time before memory is read, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    settle: u32,
    /// Where records are committed to; may be repeated. Default: all
    #[arg(long = "ground", value_enum)]
    grounds: Vec<Ground>,
    /// Records that become safe together; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [1, 256, 2_000], value_parser = clap::value_parser!(u32).range(1..=10_000))]
    groups: Vec<u32>,
    /// Bytes of a record without its key
    #[arg(long, default_value_t = 1_100, value_parser = clap::value_parser!(u32).range(8..=65_536))]
    record: u32,
    /// Where the records are written; default: a temporary directory. It should be the disk that the server would use
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// What messages are written over; may be repeated. Default: all
    #[arg(long = "over", value_enum)]
    over: Vec<Over>,
    /// Bytes of a message; several are measured one after the other
    #[arg(long, value_delimiter = ',', default_values_t = [128, 1_024], value_parser = clap::value_parser!(u32).range(1..=65_535))]
    message: Vec<u32>,
    /// Connections that are written to
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    readers: u32,
    /// Measured time of each commit and write, seconds
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=600))]
    seconds: u32,
    /// A moment of each, to see that everything written is there; speed is not looked at
    #[arg(long)]
    smoke: bool,
}

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Part {
    /// Memory and handshakes of bare connections
    Idle,
    /// Records that become safe in groups
    Commit,
    /// Messages written to connections
    Write,
}

impl Floors {
    fn smoke(self) -> Floors {
        Floors {
            connections: 20,
            connecting: 8,
            settle: 1,
            groups: vec![300],
            message: vec![128],
            readers: 32,
            seconds: 1,
            ..self
        }
    }

    fn wants(&self, part: Part) -> bool {
        self.parts.is_empty() || self.parts.contains(&part)
    }
}

/// `asked`, or everything if nothing was asked for.
fn or_all<T: Copy>(asked: &[T], all: &[T]) -> Vec<T> {
    if asked.is_empty() { all } else { asked }.to_vec()
}

/// Runs the workload.
pub(crate) async fn run(args: Floors, progress: Progress) -> Outcome<Report> {
    let args = if args.smoke { args.smoke() } else { args };
    let files = process::raise_file_limit();
    let most = args.connections.max(args.readers);
    if u64::from(most) + process::FILES_RESERVED > files {
        return Err(Failure::new(format!(
            "{most} connections do not fit into {files} open files"
        )));
    }
    let mut report = Report::new("floor", &args)?;
    if args.wants(Part::Idle) {
        idle(&args, &mut report, progress).await?;
    }
    if args.wants(Part::Commit) {
        commits(&args, &mut report, progress).await?;
    }
    if args.wants(Part::Write) {
        writes(&args, &mut report, progress).await?;
    }
    Ok(report)
}

async fn idle(args: &Floors, report: &mut Report, progress: Progress) -> Outcome<()> {
    for (name, carrier) in [
        ("plain", FloorCarrier::Plain),
        ("websocket", FloorCarrier::Websocket),
        ("quic", FloorCarrier::Quic),
    ] {
        let bar = progress.wait(&format!("floor: idle {name}"));
        let found = connect::measure(
            carrier,
            args.connections as usize,
            args.connecting as usize,
            Duration::from_secs(args.settle.into()),
        )
        .await?;
        bar.done();
        if found.connected != args.connections as usize {
            report.violation(format!(
                "{} connections were made over {name}, and {} stood at the end",
                args.connections, found.connected
            ));
        }
        let mut push = |what: &str, value, unit| {
            report.push(Figure::new(format!("{name}: {what}"), value, unit));
        };
        push("memory of a connection", found.own, "bytes");
        if let (Some(kernel), FloorCarrier::Websocket) = (found.kernel, carrier) {
            push("kernel memory of a connection, about", kernel, "bytes");
        }
        push("server CPU of a connection", found.cpu_micros, "µs");
        if found.cpu_micros > 0.0 {
            push("full handshakes", 1e6 / found.cpu_micros, "per CPU-second");
        }
        push("connections", found.per_second, "connections/s");
        push("connected", found.connected as f64, "connections");
    }
    Ok(())
}

async fn commits(args: &Floors, report: &mut Report, progress: Progress) -> Outcome<()> {
    for ground in or_all(&args.grounds, &Ground::ALL) {
        for &group in &args.groups {
            let name = format!("commit {}, {group} together", ground.name());
            let bar = progress.wait(&name);
            let dir = match &args.dir {
                Some(dir) => tempfile::tempdir_in(dir),
                None => tempfile::tempdir(),
            };
            let dir = dir.during("make a directory for records")?;
            let found = commit::measure(&commit::Job {
                ground,
                group: group as usize,
                bytes: args.record as usize,
                seconds: args.seconds,
                dir: dir.path().to_owned(),
            })
            .await?;
            bar.done();
            if let Some(fault) = found.fault() {
                report.violation(format!("{name}: {fault}"));
            }
            let mut push = |what: &str, value, unit| {
                report.push(Figure::new(format!("{name}: {what}"), value, unit));
            };
            let records = found.records as f64;
            push("records", records / found.seconds, "records/s");
            let thousands = records / 1e3;
            push(
                "CPU",
                found.cpu_seconds * 1e3 / thousands,
                "ms per 1,000 records",
            );
            push("commit p50", found.p50_ms, "ms");
            push("commit p99", found.p99_ms, "ms");
            push("found again", found.as_written as f64, "records");
        }
    }
    Ok(())
}

async fn writes(args: &Floors, report: &mut Report, progress: Progress) -> Outcome<()> {
    for over in or_all(&args.over, &Over::ALL) {
        for &bytes in &args.message {
            let readers = args.readers as usize;
            let manners: [(String, write::Manner, usize); 4] = [
                ("one each".to_owned(), write::Manner::Write(1), readers),
                (
                    "one each, answered".to_owned(),
                    write::Manner::Answered,
                    readers,
                ),
                (
                    format!("{TOGETHER} in one write"),
                    write::Manner::Write(TOGETHER),
                    readers,
                ),
                ("there and back".to_owned(), write::Manner::Echo, 1),
            ];
            for (what, manner, connections) in manners {
                if over == Over::Websocket && manner == write::Manner::Echo {
                    // Two or four bytes more than over TLS.
                    continue;
                }
                let name = format!("write {}, {bytes} bytes, {what}", over.name());
                let bar = progress.wait(&name);
                let found = write::measure(&write::Job {
                    over,
                    manner,
                    connections,
                    bytes: bytes as usize,
                    seconds: args.seconds,
                })
                .await;
                bar.done();
                let mut push = |what: &str, value, unit| {
                    report.push(Figure::new(format!("{name}{what}"), value, unit));
                };
                match found {
                    Ok(write::Found::Rates {
                        messages,
                        per_second,
                        per_cpu_second,
                    }) => {
                        push("", per_cpu_second, "messages per CPU-second");
                        push(": rate", per_second, "messages/s");
                        push(": arrived", messages as f64, "messages");
                    }
                    Ok(write::Found::Trips { count, p50, p99 }) => {
                        push(" p50", p50, "ms");
                        push(" p99", p99, "ms");
                        push(": trips", count as f64, "messages");
                    }
                    Err(failure) => report.violation(format!("{name}: {failure}")),
                }
            }
        }
    }
    Ok(())
}
