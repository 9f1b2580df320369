//! `bellwire store verify`: every record of everything that is there, read and checked.

use std::path::PathBuf;

use bellwire_server::store::examine::{Verified, verify};
use clap::Args;

use super::super::console::Paint;
use super::super::{Console, Failure, Outcome, plain};
use super::{DirArg, inspect, json, progress};

const AFTER_HELP: &str = "\
Examples:
  bellwire store verify
  bellwire store verify --data-dir /var/lib/bellwire --scratch /var/tmp
  bellwire store verify --json | jq .wrong

Reads every frame, every snapshot, every engine (a copy of it) and every record, brings a copy of the engine up to the end
of the log as a start would, and holds rows, counters and indexes against each other. Changes not one byte of the data
directory. Needs room for the copy, in the directory for temporary files or in --scratch. Beside a running server the
engine is left out; stop the server to have it checked.

Exit code 0: nothing is wrong. 1: something is, and the answer says what.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct VerifyArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Where copies go; default: the system's directory for temporary files
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &VerifyArgs) -> Outcome {
    let tell: &dyn Fn(&str) = if args.json { &|_| {} } else { &progress };
    let found = verify(args.dir.find()?, args.scratch.clone(), tell).map_err(|error| {
        Failure::new(
            error.to_string(),
            "name the data directory with --data-dir, give copies room with --scratch, and run this as the user that the \
             server runs as",
        )
    })?;
    if args.json {
        json(&found)?;
    } else {
        print(&found);
    }
    if found.sound {
        return Ok(());
    }
    Err(Failure::new(
        format!("{} things are wrong", found.wrong.len()),
        "`bellwire store inspect` shows what is there; docs/store.md says what each damage leads to; `bellwire store salvage` \
         makes a new store of what can be read",
    ))
}

/// What the records of a room are, for people; `--json` has the letters that docs and reports use.
fn records(room: char) -> String {
    let name = match room {
        'r' => "waiting notifications",
        'b' => "shared bodies",
        's' => "mailboxes",
        'x' => "by expiry",
        'c' => "by replacement key",
        'p' => "notifications by ping",
        't' => "endings by age",
        'd' => "devices",
        'e' => "devices by app",
        'u' => "devices by user",
        'l' => "last sights of devices",
        'h' => "topics of devices",
        'g' => "members of topics",
        'o' => "pings on their way to audiences",
        'a' => "apps",
        'k' => "API keys",
        'i' => "idempotency keys",
        'j' => "idempotency keys by age",
        'z' => "erasures",
        'm' => "the store's own",
        _ => return plain(&room.to_string()),
    };
    name.to_owned()
}

fn print(found: &Verified) {
    let out = Console::out();
    inspect::print(out, &found.inspection);
    out.line("");
    match &found.state {
        Some(audit) => {
            let rows: Vec<Vec<String>> = audit
                .records
                .iter()
                .map(|(room, count)| vec![records(*room), count.to_string()])
                .collect();
            out.table(&["RECORDS", "COUNT"], &rows);
            for told in &audit.told {
                out.line(&format!("  {}", plain(told)));
            }
            let untold = audit.wrong.saturating_sub(audit.told.len() as u64);
            if untold > 0 {
                out.line(&format!("  and {untold} more"));
            }
        }
        None => out.line("the state that a start would serve was not checked"),
    }
    out.line("");
    if found.sound {
        out.line(&out.paint(Paint::Green, "nothing is wrong"));
    }
    for wrong in &found.wrong {
        out.line(&format!(
            "{} {}",
            out.paint(Paint::Red, "wrong:"),
            plain(wrong)
        ));
    }
}
