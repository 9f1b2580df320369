//! `bellwire store`: what is kept in a data directory, seen without a server.

mod convert;
mod inspect;
mod salvage;
mod verify;

use std::path::PathBuf;

use bellwire_server::config::{self, Environment};
use clap::{Args, Subcommand};

use super::console::Paint;
use super::{ConfigArg, Console, Failure, Outcome, keep_to_ourselves};

const AFTER_HELP: &str = "\
Examples:
  bellwire store inspect
  bellwire store inspect --data-dir /var/lib/bellwire --json
  bellwire store verify --data-dir /var/lib/bellwire
  bellwire store salvage --data-dir /var/lib/bellwire --into /var/lib/bellwire-new
  bellwire store convert --to fjall

docs/store.md says what the files are and what happens when one is damaged.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct StoreArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What is in a data directory and what a start would do; changes nothing
    Inspect(inspect::InspectArgs),
    /// Read and check every record; changes nothing
    Verify(verify::VerifyArgs),
    /// Make a store that starts of what can be read of one that does not
    Salvage(salvage::SalvageArgs),
    /// Copy what is kept into another engine, while no server runs
    Convert(convert::ConvertArgs),
}

impl StoreArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Command::Inspect(args) => args.json,
            Command::Verify(args) => args.json,
            Command::Salvage(args) => args.json,
            Command::Convert(args) => args.json,
        }
    }
}

pub(crate) fn run(args: &StoreArgs) -> Outcome {
    // Copies hold other people's messages.
    keep_to_ourselves();
    match &args.command {
        Command::Inspect(args) => inspect::run(args),
        Command::Verify(args) => verify::run(args),
        Command::Salvage(args) => salvage::run(args),
        Command::Convert(args) => convert::run(args),
    }
}

/// Which data directory a command is about.
#[derive(Debug, Clone, Args)]
pub(crate) struct DirArg {
    /// Data directory; default: the one that the settings name
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    #[command(flatten)]
    config: ConfigArg,
}

impl DirArg {
    /// The directory. Settings are read only if no directory was named, so a broken settings file is not in the way of looking
    /// at a broken store.
    pub(crate) fn find(&self) -> Result<PathBuf, Failure> {
        match &self.data_dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(
                config::load(self.config.config.as_deref(), &Environment::of_process())?.data_dir,
            ),
        }
    }
}

/// Says what is being done, on standard error: answers are for standard output.
pub(crate) fn progress(step: &str) {
    let err = Console::err();
    err.line(&err.paint(Paint::Dim, step));
}

/// The answer as one line of JSON.
pub(crate) fn json(answer: &impl serde::Serialize) -> Outcome {
    let text = serde_json::to_string(answer).map_err(|error| {
        Failure::new(
            format!("the answer cannot be written as JSON: {error}"),
            "this is a fault of the program: please report it",
        )
    })?;
    Console::out().line(&text);
    Ok(())
}

/// A size as people read it.
pub(crate) fn size(bytes: u64) -> String {
    const STEPS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in STEPS {
        if bytes >> shift > 0 {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_short() {
        let sizes = [0, 1023, 1024, 67_108_864, 1_610_612_736, u64::MAX].map(size);
        assert_eq!(
            sizes,
            [
                "0 B",
                "1023 B",
                "1.0 KiB",
                "64.0 MiB",
                "1.5 GiB",
                "16777215.9 TiB"
            ]
        );
    }
}
