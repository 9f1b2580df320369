//! `bellwire-bench`: workloads against the real server, each with the question that it answers. bench/README.md says how to
//! read the figures.
//!
//! The server runs as a process of its own on this machine, loopback only; this program plays backends and devices. What
//! it starts it ends, also when it is interrupted.

mod api;
mod churn;
mod deliver;
mod device;
mod failure;
mod fleet;
mod floor;
mod idle;
mod process;
mod progress;
mod report;
mod server;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::failure::{During, Failure, Outcome};
use crate::progress::Progress;
use crate::report::Report;

/// Measures a Bellwire server on this machine.
#[derive(Debug, Parser)]
#[command(name = "bellwire-bench", version, arg_required_else_help = true)]
#[command(after_help = "Examples:
  bellwire-bench deliver                            as many pings as 32 connections get through
  bellwire-bench deliver --rate 5000                5,000 pings a second, by the clock
  bellwire-bench deliver --connections 1 --rate 100 one quiet ping at a time
  bellwire-bench deliver --absent --devices 1000    pings that wait on disk
  bellwire-bench idle                               memory and time of devices that only stay connected
  bellwire-bench churn --engine fjall               a million rows into a store and out again")]
struct Arguments {
    #[command(subcommand)]
    workload: Workload,
    /// Print the report as JSON
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing while working
    #[arg(long, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Workload {
    Deliver(deliver::Deliver),
    Idle(idle::Idle),
    Churn(churn::Churn),
    #[command(hide = true)]
    ChurnStore(churn::ChurnStore),
    #[command(hide = true)]
    FloorServer(floor::FloorServer),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let json = arguments.json;
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("bellwire-bench: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(run(arguments)) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(report)) => print(&report, json),
        Err(failure) => {
            eprintln!("bellwire-bench: {failure}");
            ExitCode::FAILURE
        }
    }
}

async fn run(arguments: Arguments) -> Outcome<Option<Report>> {
    let progress = Progress::new(arguments.quiet);
    let mut terminate = signal(SignalKind::terminate()).during("listen for signals")?;
    let work = async {
        match arguments.workload {
            Workload::Deliver(args) => deliver::run(args, progress).await.map(Some),
            Workload::Idle(args) => idle::run(args, progress).await.map(Some),
            Workload::Churn(args) => churn::run(args, progress).await.map(Some),
            Workload::ChurnStore(args) => churn::serve(&args).map(|()| None),
            Workload::FloorServer(args) => floor::serve(args).await.map(|()| None),
        }
    };
    // Interrupted, the work is dropped here, and with it every process that it started.
    tokio::select! {
        done = work => done,
        _ = tokio::signal::ctrl_c() => Err(Failure::new("interrupted")),
        _ = terminate.recv() => Err(Failure::new("terminated")),
    }
}

fn print(report: &Report, json: bool) -> ExitCode {
    let text = match json {
        true => report.json(),
        false => Ok(report.markdown()),
    };
    match text {
        Ok(text) => println!("{text}"),
        Err(failure) => {
            eprintln!("bellwire-bench: {failure}");
            return ExitCode::FAILURE;
        }
    }
    for violation in &report.violations {
        eprintln!("bellwire-bench: {} failed: {violation}", report.workload);
    }
    match report.violations.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}
