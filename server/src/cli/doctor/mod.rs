//! `bellwire doctor`: is this machine fit to run it, and does a server that runs here do well? Looks at what
//! `bellwire check` cannot know from the settings: time, disk, network, limits. Changes nothing.

mod certificates;
mod machine;
mod network;

use std::time::Duration;

use bellwire_server::config::{self, Environment};
use clap::Args;

use super::api::ListenFile;
use super::findings::{good, report, warned};
use super::{ConfigArg, Outcome};

/// How long one answer from this machine may take.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Most bytes read of an answer or a file of the kernel.
const TEXT_MAX: u64 = 16 << 10;

const AFTER_HELP: &str = "\
Examples:
  bellwire doctor
  bellwire doctor --config /etc/bellwire/bellwire.toml
  bellwire doctor --json | jq '.findings[] | select(.mark != \"ok\")'

Looks at ports, certificates, clock, UDP, disk, memory and the limits of the system, with or without a running server,
and says of each what was found and what to do. Run it as the user that runs the server, with the same settings.
What lies between devices and this machine, such as a firewall, cannot be seen from here.
Exit code 0 if nothing failed (warnings may be there), 78 if the settings are wrong, 1 otherwise.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) async fn run(args: &DoctorArgs) -> Outcome {
    let checked = config::load(args.config.config.as_deref(), &Environment::of_process())?;
    let mut findings = Vec::new();
    for warning in &checked.warnings {
        findings.push(warned(
            "settings",
            warning.clone(),
            "see docs/operations.md",
        ));
    }
    if findings.is_empty() {
        findings.push(good("settings", "nothing is wrong with them"));
    }
    certificates::look(&checked, &mut findings);
    let running = ListenFile::read(&checked.data_dir)?;
    match &running {
        Some(listen) => {
            let shown = network::running_server(listen, &mut findings).await;
            certificates::look_at_shown(&checked, listen, shown, &mut findings).await;
        }
        None => network::free_ports(&checked, &mut findings).await,
    }
    findings.push(machine::clock(&checked.data_dir).await);
    machine::disk(&checked, &mut findings);
    machine::limits(&checked, &mut findings);
    report(&findings, args.json, |failed, all| {
        format!("{failed} of {all} looks found something that must be mended")
    })
}
