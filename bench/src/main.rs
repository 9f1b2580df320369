//! `bellwire-bench`: workloads against the real server, each with the question that it answers. bench/README.md says how to
//! read the figures.
//!
//! The server runs as a process of its own on this machine, loopback only; this program plays backends and devices. What
//! it starts it ends, also when it is interrupted.

mod api;
mod child;
mod churn;
mod deliver;
mod device;
mod failure;
mod fleet;
mod floor;
mod idle;
mod peers;
mod process;
mod progress;
mod report;
mod server;
mod tls;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
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
  bellwire-bench deliver                            as many pings as 32 connections get through
  bellwire-bench deliver --rate 5000                5,000 pings a second, by the clock
  bellwire-bench deliver --connections 1 --rate 100 one quiet ping at a time
  bellwire-bench deliver --absent --devices 1000    pings that wait on disk
  bellwire-bench idle --runs 5                      memory and time of devices that only stay connected
  bellwire-bench idle --out report                  the same, five times, as Markdown, JSON and plots in a folder
  bellwire-bench churn --engine fjall               a million rows into a store and out again
  bellwire-bench floor                              what the bare libraries and the disk allow
  bellwire-bench peers --runs 5                     Bellwire beside mosquitto and nats-server")]
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
    Deliver(deliver::Deliver),
    Idle(idle::Idle),
    Churn(churn::Churn),
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
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let (json, out) = (arguments.json, arguments.out.clone());
    let runtime = match tokio::runtime::Runtime::new() {
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

/// Runs what was asked for. Parts that this program plays in a process of its own have nothing to report.
async fn run(arguments: Arguments) -> Outcome<Vec<Report>> {
    let progress = Progress::new(arguments.quiet);
    let default = if arguments.out.is_some() {
        RUNS_OF_A_REPORT
    } else {
        1
    };
    let runs = arguments.runs.unwrap_or(default);
    let mut terminate = signal(SignalKind::terminate()).during("listen for signals")?;
    let work = async {
        Ok(match arguments.workload {
            Workload::Deliver(args) => {
                repeat(runs, progress, || deliver::run(args.clone(), progress)).await?
            }
            Workload::Idle(args) => {
                repeat(runs, progress, || idle::run(args.clone(), progress)).await?
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
            Workload::PeerLoad(args) => peers::serve(args).await.map(|()| Vec::new())?,
            Workload::ChurnStore(args) => churn::serve(&args).map(|()| Vec::new())?,
            Workload::FloorCommit(args) => floor::serve_commit(&args).map(|()| Vec::new())?,
            Workload::FloorWrite(args) => floor::serve_write(args).await.map(|()| Vec::new())?,
            Workload::FloorServer(args) => floor::serve(args).await.map(|()| Vec::new())?,
        })
    };
    // Interrupted, the work is dropped here, and with it every process that it started.
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted")),
        _ = terminate.recv() => Err(Failure::new("terminated")),
    }
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
fn tell(reports: &[Report], json: bool, out: Option<&std::path::Path>) -> Outcome<()> {
    let markdown: Vec<String> = reports.iter().map(Report::markdown).collect();
    let markdown = markdown.join("\n");
    // One workload is one object, as a script that asks for one expects.
    let structured = match reports {
        [one] => serde_json::to_string_pretty(one),
        several => serde_json::to_string_pretty(several),
    };
    let structured = structured.during("write the report")?;
    if let Some(out) = out {
        let written = |name: &str, text: &str| {
            let path = out.join(name);
            std::fs::write(&path, text).during(format_args!("write {}", path.display()))
        };
        std::fs::create_dir_all(out).during(format_args!("make {}", out.display()))?;
        written("report.md", &markdown)?;
        written("report.json", &structured)?;
        for drawing in reports.iter().flat_map(Report::drawings) {
            written(&drawing.file, &drawing.svg)?;
        }
    }
    println!("{}", if json { structured } else { markdown });
    Ok(())
}
