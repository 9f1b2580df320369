//! `bellwire-bench`: workloads against the real server, each with the question that it answers. bench/README.md says how to
//! read the figures.
//!
//! The server runs as a process of its own on this machine, loopback only; this program plays backends and devices. What
//! it starts it ends, also when it is interrupted.

mod api;
mod child;
mod churn;
mod clock;
mod connect;
mod device;
mod drain;
mod engine;
mod failure;
mod fanout;
mod fleet;
mod floor;
mod generator;
mod grow;
mod idle;
mod peers;
mod ping;
mod process;
mod progress;
mod report;
mod rig;
mod server;
mod soak;
mod stored;
mod tls;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{During, Failure, Outcome};
use crate::progress::Progress;
use crate::report::Report;

/// Runs of a report that is written to a folder, when nobody says otherwise: as few as show a spread that means something.
const RUNS_OF_A_REPORT: u32 = 5;

/// Measures a Bellwire server on this machine.
#[derive(Debug, Parser)]
#[command(name = "bellwire-bench", version, arg_required_else_help = true)]
#[command(after_help = "Examples:
  bellwire-bench ping                               quiet, at fixed rates, as many as go, in batches
  bellwire-bench stored --engines fjall             pings that wait on disk
  bellwire-bench fanout --devices 10000             one ping to 10,000 attached devices
  bellwire-bench idle --websocket 15000 --quic 200000
                                                    what silent devices hold
  bellwire-bench connect --out report               five runs, as Markdown, JSON and plots
  bellwire-bench grow --engines fjall --stored 10000,1000000,10000000
                                                    what stays the same while something grows
  bellwire-bench soak --minutes 60                  an hour of everything at once
  bellwire-bench all --out report                   everything
  bellwire-bench churn --engine fjall               a million rows into a store and out again
  bellwire-bench floor                              what the bare libraries and the disk allow
  bellwire-bench peers --runs 5                     Bellwire beside mosquitto and nats-server

bench/README.md tells how to read the figures. A workload fails (exit code 1) if something was
lost, doubled or counted differently on two sides, never because it was slow.")]
struct Arguments {
    #[command(subcommand)]
    workload: Workload,
    /// Print the report as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing while working
    #[arg(long, global = true)]
    quiet: bool,
    /// How often the workload runs, each time with a fresh server; figures are medians. Default: 1, or 5 with --out
    #[arg(long, global = true, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: Option<u32>,
    /// Write report.md, report.json and plots (SVG) into this folder as well
    #[arg(long, global = true, value_name = "DIR")]
    out: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Workload {
    Ping(ping::PingArgs),
    Stored(stored::StoredArgs),
    Fanout(fanout::FanoutArgs),
    Drain(drain::DrainArgs),
    Idle(idle::IdleArgs),
    Connect(connect::ConnectArgs),
    Grow(grow::GrowArgs),
    Soak(soak::SoakArgs),
    Churn(churn::Churn),
    /// Run every workload but churn and peers as it is by default, one after the other
    All(rig::ServerArgs),
    #[command(hide = true)]
    ChurnStore(churn::ChurnStore),
    /// Measure what the bare libraries and the disk allow
    #[command(name = "floor")]
    Floors(floor::Floors),
    Peers(peers::Peers),
    #[command(hide = true)]
    PeerLoad(peers::PeerLoad),
    #[command(hide = true)]
    FloorServer(floor::FloorServer),
    #[command(hide = true)]
    FloorCommit(floor::FloorCommit),
    #[command(hide = true)]
    FloorWrite(floor::FloorWrite),
    #[command(hide = true)]
    PlayDevices(generator::devices::PlayDevices),
    #[command(hide = true)]
    PlayBackends(generator::backends::PlayBackends),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (json, out) = (arguments.json, arguments.out.clone());
    // What plays many devices has one thread, so that its share of a core says whether it was busy.
    let runtime = if matches!(arguments.workload, Workload::PlayDevices(_)) {
        Builder::new_current_thread().enable_all().build()
    } else {
        tokio::runtime::Runtime::new()
    };
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bellwire-bench: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let told = runtime.block_on(run(arguments)).and_then(|reports| {
        if !reports.is_empty() {
            tell(&reports, json, out.as_deref())?;
        }
        Ok(reports)
    });
    let reports = match told {
        Ok(reports) => reports,
        Err(failure) => {
            eprintln!("bellwire-bench: {failure}");
            return ExitCode::FAILURE;
        }
    };
    let mut good = true;
    for report in &reports {
        for violation in &report.violations {
            eprintln!("bellwire-bench: {} failed: {violation}", report.workload);
            good = false;
        }
    }
    match good {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// The workloads of `all`, in their order.
const ALL: [&str; 9] = [
    "floor", "idle", "connect", "ping", "stored", "fanout", "drain", "grow", "soak",
];

/// Runs what was asked for. Parts that this program plays in a process of its own have nothing to report.
async fn run(arguments: Arguments) -> Outcome<Vec<Report>> {
    let progress = Progress::new(arguments.quiet);
    let default = match arguments.out {
        Some(_) => RUNS_OF_A_REPORT,
        None => 1,
    };
    let runs = arguments.runs.unwrap_or(default);
    let mut terminate = signal(SignalKind::terminate()).during("listen for signals")?;
    let work = async {
        if let Workload::All(args) = &arguments.workload {
            return all(args, runs, progress, arguments.out.as_deref()).await;
        }
        work(arguments.workload, runs, progress).await
    };
    // Interrupted, the work is dropped here, and with it every process that it started.
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted")),
        _ = terminate.recv() => Err(Failure::new("terminated")),
    }
}

/// Runs all workloads as they are by default. What is done is written down at once where a folder was asked for, so that
/// hours are not lost with the last of them.
async fn all(
    args: &rig::ServerArgs,
    runs: u32,
    progress: Progress,
    out: Option<&Path>,
) -> Outcome<Vec<Report>> {
    let mut reports = Vec::new();
    for name in ALL {
        progress.say(&format!("== {name}"));
        let mut line: Vec<OsString> = vec!["bellwire-bench".into(), name.into()];
        if args.smoke {
            line.push("--smoke".into());
        }
        if name != "floor" {
            if let Some(server) = &args.server {
                line.extend(["--server".into(), server.into()]);
            }
            for setting in &args.settings {
                line.extend(["--set".into(), setting.into()]);
            }
        }
        let one = Arguments::try_parse_from(line).during(format_args!("ask for {name}"))?;
        reports.extend(work(one.workload, runs, progress).await?);
        if let Some(out) = out {
            write_down(&reports, out)?;
        }
    }
    Ok(reports)
}

async fn work(workload: Workload, runs: u32, progress: Progress) -> Outcome<Vec<Report>> {
    Ok(match workload {
        Workload::Ping(args) => {
            repeat(runs, progress, || ping::run(args.clone(), progress)).await?
        }
        Workload::Stored(args) => {
            repeat(runs, progress, || stored::run(args.clone(), progress)).await?
        }
        Workload::Fanout(args) => {
            repeat(runs, progress, || fanout::run(args.clone(), progress)).await?
        }
        Workload::Drain(args) => {
            repeat(runs, progress, || drain::run(args.clone(), progress)).await?
        }
        Workload::Connect(args) => {
            repeat(runs, progress, || connect::run(args.clone(), progress)).await?
        }
        Workload::Idle(args) => {
            repeat(runs, progress, || idle::run(args.clone(), progress)).await?
        }
        Workload::Grow(args) => {
            repeat(runs, progress, || grow::run(args.clone(), progress)).await?
        }
        Workload::Soak(args) => {
            repeat(runs, progress, || soak::run(args.clone(), progress)).await?
        }
        Workload::Churn(args) => {
            repeat(runs, progress, || churn::run(args.clone(), progress)).await?
        }
        Workload::Floors(args) => {
            repeat(runs, progress, || floor::run(args.clone(), progress)).await?
        }
        Workload::Peers(args) => {
            repeat(runs, progress, || peers::run(args.clone(), progress)).await?
        }
        Workload::All(_) => return Err(Failure::new("`all` does not hold itself")),
        Workload::PeerLoad(args) => peers::serve(args).await.map(|()| Vec::new())?,
        Workload::ChurnStore(args) => churn::serve(&args).map(|()| Vec::new())?,
        Workload::FloorCommit(args) => floor::serve_commit(&args).map(|()| Vec::new())?,
        Workload::FloorWrite(args) => floor::serve_write(args).await.map(|()| Vec::new())?,
        Workload::FloorServer(args) => floor::serve(args).await.map(|()| Vec::new())?,
        Workload::PlayDevices(_) => generator::devices::play().await.map(|()| Vec::new())?,
        // Threads of its own, and nothing that waits for this one.
        Workload::PlayBackends(_) => generator::backends::play().map(|()| Vec::new())?,
    })
}

/// Runs a workload so often and makes one report of it.
async fn repeat<F: Future<Output = Outcome<Report>>>(
    runs: u32,
    progress: Progress,
    workload: impl Fn() -> F,
) -> Outcome<Vec<Report>> {
    let mut reports = Vec::new();
    for run in 0..runs {
        if runs > 1 {
            progress.say(&format!("run {} of {runs}", run + 1));
        }
        reports.push(workload().await?);
    }
    Ok(Report::of_runs(reports).into_iter().collect())
}

/// Prints the reports, and writes them down where that was asked for.
fn tell(reports: &[Report], json: bool, out: Option<&Path>) -> Outcome<()> {
    if let Some(out) = out {
        write_down(reports, out)?;
    }
    let text = if json {
        structured(reports)?
    } else {
        markdown(reports)
    };
    println!("{text}");
    Ok(())
}

fn markdown(reports: &[Report]) -> String {
    let each: Vec<String> = reports.iter().map(Report::markdown).collect();
    each.join("\n")
}

fn structured(reports: &[Report]) -> Outcome<String> {
    // One workload is one object, as a script that asks for one expects.
    match reports {
        [one] => serde_json::to_string_pretty(one),
        several => serde_json::to_string_pretty(several),
    }
    .during("write the report")
}

/// Writes Markdown, JSON and plots into a folder.
fn write_down(reports: &[Report], out: &Path) -> Outcome<()> {
    let written = |name: &str, text: &str| {
        let path = out.join(name);
        std::fs::write(&path, text).during(format_args!("write {}", path.display()))
    };
    std::fs::create_dir_all(out).during(format_args!("make {}", out.display()))?;
    written("report.md", &markdown(reports))?;
    written("report.json", &structured(reports)?)?;
    for drawing in reports.iter().flat_map(Report::drawings) {
        written(&drawing.file, &drawing.svg)?;
    }
    Ok(())
}
