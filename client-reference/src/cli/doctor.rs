//! `bellwire-device doctor`.

use std::io::IsTerminal;

use bellwire_client::diagnose::{Check, CheckResult, Diagnosis, Examination, Health};
use bellwire_client::inspect;
use clap::Args;

use super::print::{line, plain};
use super::{Exit, Identity, Setup, Way};

pub(crate) const EXAMPLES: &str = "\
Each line is one step: ok, FAILED, or skipped. Without credentials no hello is said. With them, a session of the same device \
that stands is replaced; if a client runs with this device's state directory on this machine, that step is skipped.

Examples:
  Why does nothing arrive?
    bellwire-device doctor --server push.example.org --credentials anna.json

  Can this network reach the server at all, through the company's proxy?
    bellwire-device doctor --server push.example.org --proxy http://proxy:3128

Exit codes:
  0  everything works
  1  nothing was tried: a file or a setting is wrong
  2  the arguments are wrong
  3  the server said never to come back: wrong credentials, revoked, wrong version
  4  there is no way to a session
  5  a session is possible, but something is wrong, such as UDP that is blocked or a clock that is off";

#[derive(Debug, Args)]
pub(crate) struct Doctor {
    #[command(flatten)]
    way: Way,

    #[command(flatten)]
    identity: Identity,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: Doctor) -> Result<Exit, Setup> {
    let dialer = arguments.way.dialer()?;
    let mut examination = Examination::new(dialer);
    if let Some(credentials) = arguments.identity.read_if_given()? {
        let state_dir = arguments.identity.state_dir(credentials.device);
        examination = match inspect(&state_dir).is_ok_and(|found| found.in_use) {
            true => examination.without_hello(
                "a client of this device runs on this machine, and would lose its session",
            ),
            false => examination.as_device(credentials.device, credentials.secret),
        };
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Setup(format!("cannot start: {error}")))?;
    let (json, colour) = (arguments.json, std::io::stdout().is_terminal());
    let diagnosis = runtime.block_on(examination.run(|check| {
        if !json {
            let _ = line(&for_people(
                check,
                colour && std::env::var_os("NO_COLOR").is_none(),
            ));
        }
    }));
    let text = match json {
        true => serde_json::to_string(&diagnosis).map_err(|error| Setup(error.to_string()))?,
        false => summary(&diagnosis),
    };
    let _ = line(&text);
    Ok(match diagnosis.health {
        Health::Good => Exit::Done,
        Health::Limited => Exit::Limited,
        Health::Refused => Exit::Refused,
        Health::Unreachable => Exit::Unreachable,
    })
}

fn for_people(check: &Check, colour: bool) -> String {
    let (word, paint) = match check.result {
        CheckResult::Ok => ("ok", "\u{1b}[32m"),
        CheckResult::Failed => ("FAILED", "\u{1b}[31m"),
        CheckResult::Skipped => ("skipped", "\u{1b}[2m"),
    };
    let (paint, off) = if colour {
        (paint, "\u{1b}[0m")
    } else {
        ("", "")
    };
    let took = match check.result {
        CheckResult::Skipped => String::new(),
        CheckResult::Ok | CheckResult::Failed => format!(" ({} ms)", check.took_ms),
    };
    let mut text = format!(
        "{:<10}{paint}{word:<8}{off}{}{took}",
        check.name,
        plain(&check.detail)
    );
    if !check.advice.is_empty() {
        text.push_str("\n          -> ");
        text.push_str(&check.advice);
    }
    text
}

fn summary(diagnosis: &Diagnosis) -> String {
    match diagnosis.health {
        Health::Good => "everything works".to_owned(),
        Health::Limited => "a session is possible, but something is wrong (see above)".to_owned(),
        Health::Refused => {
            "the server does not want this device; only a person can change that".to_owned()
        }
        Health::Unreachable => format!(
            "there is no way to a session with {}",
            plain(&diagnosis.server)
        ),
    }
}
