//! `bellwire store salvage`: a store that starts, made of what can be read of one that does not.

use std::path::PathBuf;
use std::sync::Arc;

use bellwire_server::runtime::{SystemClock, SystemEntropy};
use bellwire_server::store::examine::{Salvage, SalvageError, Salvaged, salvage};
use bellwire_server::store::{EngineKind, StoreSettings};
use clap::{Args, ValueEnum};

use super::super::console::Paint;
use super::super::{Console, Failure, Outcome, plain};
use super::{DirArg, json, progress};

const AFTER_HELP: &str = "\
Examples:
  bellwire store salvage --data-dir /var/lib/bellwire --dry-run
  bellwire store salvage --data-dir /var/lib/bellwire --into /var/lib/bellwire-new
  bellwire store salvage --data-dir /var/lib/bellwire --into /var/lib/bellwire-new --engine fjall --json

For when a start refuses, or after a start that had to set something aside: it takes the best base that can be proved (an
engine, one that was set aside, a snapshot), every frame that can be read, also those behind a rotten place and those under
set-aside/, and what engines knew that the log has lost. Counters and indexes are made anew. What provably ended stays
ended; everything that waits is marked as redelivered. Keys and certificates are copied, backups are not needed for it.

The data directory is only read: nothing in it is changed or deleted. The server must be stopped. Copies of the engines need
room in the directory for temporary files or in --scratch. Then start the server with the new directory, and keep the
old one until everything is found to be there.";

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum EngineArg {
    Sled,
    Fjall,
    Memory,
}

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct SalvageArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Directory of the new store; must not be there yet, or be empty
    #[arg(
        long,
        value_name = "DIR",
        required_unless_present = "dry_run",
        conflicts_with = "dry_run"
    )]
    into: Option<PathBuf>,
    /// Only say what would be saved
    #[arg(long)]
    dry_run: bool,
    /// Engine of the new store
    #[arg(long, value_enum, default_value = "sled")]
    engine: EngineArg,
    /// Where copies go; default: the system's directory for temporary files
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// The new directory may lie on a network file system, because you know that syncs and locks hold there
    #[arg(long)]
    trust_file_system: bool,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &SalvageArgs) -> Outcome {
    let tell: &dyn Fn(&str) = if args.json { &|_| {} } else { &progress };
    let ask = Salvage {
        broken: args.dir.find()?,
        into: args.into.clone(),
        scratch: args.scratch.clone(),
        settings: StoreSettings {
            engine: match args.engine {
                EngineArg::Sled => EngineKind::Sled,
                EngineArg::Fjall => EngineKind::Fjall,
                EngineArg::Memory => EngineKind::Memory,
            },
            trust_file_system: args.trust_file_system,
            ..StoreSettings::new(args.into.clone().unwrap_or_default())
        },
    };
    let saved = salvage(
        &ask,
        Arc::new(SystemClock::new()),
        Arc::new(SystemEntropy::new()),
        tell,
    )
    .map_err(failure)?;
    if args.json {
        return json(&saved);
    }
    print(&saved);
    Ok(())
}

fn failure(error: SalvageError) -> Failure {
    let help = match &error {
        SalvageError::Inspect(_) => {
            "run this as the user that the server runs as, and give copies room with --scratch"
        }
        SalvageError::InUse { .. } => {
            "a server that runs has no need of it; to see what it has set aside, use `bellwire store inspect`"
        }
        SalvageError::NotEmpty(_) | SalvageError::Inside(_) => "name another directory with --into",
        SalvageError::Newer(_) => "nothing was changed",
        SalvageError::Nothing(_) => "name the data directory with --data-dir, or restore a backup",
        SalvageError::Open(_) => {
            "the old directory is as it was; remove the new one before you try again"
        }
    };
    Failure::new(error.to_string(), help)
}

fn print(saved: &Salvaged) {
    let out = Console::out();
    let count = |room: char| saved.records.get(&room).copied().unwrap_or(0).to_string();
    let lost: Vec<String> = saved.lost_frames.iter().map(ToString::to_string).collect();
    out.pairs(&[
        ("from", saved.inspection.dir.display().to_string()),
        (
            "base",
            format!("{} at frame {}", plain(&saved.base), saved.base_frame),
        ),
        ("frames applied", saved.frames.to_string()),
        (
            "frames lost",
            if lost.is_empty() {
                "none".to_owned()
            } else {
                lost.join(", ")
            },
        ),
        (
            "rotten records",
            format!(
                "{}, of which {} were found elsewhere",
                saved.rotten, saved.found_elsewhere
            ),
        ),
        ("notifications", count('r')),
        ("devices", count('d')),
        ("API keys", count('k')),
    ]);
    if !saved.side_lines.is_empty() {
        out.line("");
        let rows: Vec<Vec<String>> = saved
            .side_lines
            .iter()
            .map(|line| {
                vec![
                    plain(&line.name),
                    line.frames.to_string(),
                    line.unreadable_frames.to_string(),
                    line.notifications.to_string(),
                    line.ended.to_string(),
                    line.registrations.to_string(),
                    line.removed.to_string(),
                ]
            })
            .collect();
        out.table(
            &[
                "SET ASIDE",
                "FRAMES",
                "UNREADABLE",
                "WAIT AGAIN",
                "ENDED",
                "REGISTERED",
                "REMOVED",
            ],
            &rows,
        );
    }
    let heading = |text: &str| {
        out.line("");
        out.line(&out.paint(Paint::Bold, text));
    };
    if !saved.repaired.is_empty() {
        heading("put right");
        for (kind, count) in &saved.repaired {
            out.line(&format!("  {count} times: {kind}"));
        }
    }
    if !saved.left.is_empty() {
        heading("still does not fit");
        for left in &saved.left {
            out.line(&format!("  {}", plain(left)));
        }
    }
    if !saved.passed_over.is_empty() {
        heading("not used, because no note says from where the log went on without it");
        for engine in &saved.passed_over {
            out.line(&format!("  {}", plain(engine)));
        }
    }
    if !saved.unreadable.is_empty() {
        heading("could not be read, in whole or in part; all of it is where it was");
        for file in &saved.unreadable {
            out.line(&format!("  {}", plain(file)));
        }
    }
    out.line("");
    match (&saved.into, &saved.store) {
        (Some(into), Some(store)) => {
            out.line(&out.paint(
                Paint::Green,
                &format!("the new store {store} is in {}", into.display()),
            ));
            out.line(&format!(
                "Copied beside it: {}. Start the server with data_dir = \"{}\", and keep the old directory until everything is \
                 found to be there.",
                if saved.copied.is_empty() {
                    "nothing".to_owned()
                } else {
                    saved.copied.join(", ")
                },
                into.display()
            ));
        }
        _ => out.line("Nothing was written: this was a dry run."),
    }
}
