//! `bellwire demo`: both sides of the story in one terminal.
//!
//! A real server runs as a child process of the same binary, on free ports and a directory of its own; two real devices
//! run in this process through the reference client; pings come over HTTP as a backend would send them. Each step is
//! checked, with a deadline, and the time it took is shown. This is the only room of the server that may use the client.
//!
//! - [`stage`] is the directory, the server process and how it is killed.
//! - [`device`] is one device with a diary of what reached its app.
//! - [`screen`] writes the steps.
//! - [`tour`] is the story.

mod device;
mod screen;
mod stage;
mod tour;

use std::path::PathBuf;
use std::sync::Arc;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use self::device::Device;
use self::screen::Screen;
use self::stage::Stage;
use crate::cli::{Failure, Outcome, no_threads};

const AFTER_HELP: &str = "\
Examples:
  bellwire demo                    the tour, then a server to try by hand until Ctrl-C
  bellwire demo --once             the tour only; exit code 0 if every step happened
  bellwire demo --dir my-demo      keep everything in my-demo, to look at it afterwards

It needs no network and changes nothing outside of its directory.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DemoArgs {
    /// End after the tour
    #[arg(long)]
    once: bool,
    /// Work in this directory, which must be new or empty, and keep it; default: a temporary one
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

pub(crate) fn run(args: &DemoArgs) -> Outcome {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|error| no_threads(&error))?
        .block_on(perform(args))
}

async fn perform(args: &DemoArgs) -> Outcome {
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| no_threads(&error))?;
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| no_threads(&error))?;
    let screen = Arc::new(Screen::new());
    let mut stage = Stage::new(args.dir.as_deref())?;
    let told = {
        let story = async {
            let cast = tour::tour(&mut stage, &screen).await?;
            if args.once {
                return Ok(cast);
            }
            tour::by_hand(&stage, &screen).await?;
            screen.watch();
            // Until somebody stops it, or the server is gone.
            stage.server_ended().await;
            Err(Failure::new("the server ended by itself", stage.log_hint()))
        };
        tokio::select! {
            told = story => told.map(Some),
            _ = interrupt.recv() => Ok(None),
            _ = terminate.recv() => Ok(None),
        }
    };
    let complete = matches!(told, Ok(Some(_)));
    let failure = match told {
        Ok(cast) => {
            leave(cast).await;
            None
        }
        Err(failure) => Some(failure),
    };
    let served = screen.watching();
    screen.quiet();
    let stopped = stage.stop(&screen).await;
    if let Some(failure) = failure {
        return Err(failure);
    }
    stopped?;
    if complete {
        screen.finish();
        return Ok(());
    }
    if served {
        // The tour was over, and Ctrl-C is how the rest ends.
        return Ok(());
    }
    Err(Failure::new(
        "stopped before the end of the tour",
        "nothing is left behind; start it again with: bellwire demo",
    ))
}

async fn leave(cast: Option<Vec<Device>>) {
    for device in cast.into_iter().flatten() {
        device.close().await;
    }
}
