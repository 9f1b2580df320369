//! `bellwire-device status`.

use std::fmt::Write as _;
use std::path::PathBuf;

use bellwire_client::{Inspection, WindowState, inspect};
use clap::Args;

use super::print::{date, line, plain};
use super::{Exit, Setup, base_dir, from_file};

/// Devices of one user that are shown.
const DEVICES_MAX: usize = 256;

pub(crate) const EXAMPLES: &str = "\
It looks and changes nothing; a client may run meanwhile.

Examples:
  Every device of this user:
    bellwire-device status

  One device, for a script:
    bellwire-device status --credentials anna.json --json

Exit codes:
  0  shown, perhaps with trouble in it
  1  a file or directory cannot be read
  2  the arguments are wrong";

#[derive(Debug, Args)]
pub(crate) struct Status {
    /// The device of this credentials file; its secret is not used.
    #[arg(long, env = "BELLWIRE_CREDENTIALS", value_name = "FILE")]
    credentials: Option<PathBuf>,

    /// The device with this id.
    #[arg(
        long,
        env = "BELLWIRE_DEVICE",
        value_name = "ID",
        conflicts_with = "credentials"
    )]
    device: Option<String>,

    /// This directory. [default: all below $XDG_STATE_HOME/bellwire-device, or ~/.local/state/bellwire-device]
    #[arg(long, env = "BELLWIRE_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// Print JSON: one object with an array `devices`.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Status) -> Result<Exit, Setup> {
    let directories = directories(arguments)?;
    let mut found = Vec::with_capacity(directories.len());
    for directory in &directories {
        found.push(inspect(directory).map_err(|error| Setup(error.to_string()))?);
    }
    let text = match arguments.json {
        true => serde_json::json!({ "devices": found }).to_string(),
        false if found.is_empty() => {
            format!(
                "No device of this user has been here yet ({} is empty or absent).",
                base_dir().display()
            )
        }
        false => {
            let texts: Vec<_> = found.iter().map(for_people).collect();
            texts.join("\n\n")
        }
    };
    // Nobody reads it: no failure.
    let _ = line(&text);
    Ok(Exit::Done)
}

fn directories(arguments: &Status) -> Result<Vec<PathBuf>, Setup> {
    if let Some(directory) = &arguments.state_dir {
        return Ok(vec![directory.clone()]);
    }
    let device = match (&arguments.credentials, &arguments.device) {
        (Some(path), _) => Some(from_file(path)?.device),
        (None, Some(id)) => Some(
            id.trim()
                .parse()
                .map_err(|error| Setup(format!("the device's id is wrong: {error}")))?,
        ),
        (None, None) => None,
    };
    let base = base_dir();
    if let Some(device) = device {
        return Ok(vec![base.join(device.to_string())]);
    }
    let entries = match std::fs::read_dir(&base) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(Setup(format!("cannot read {}: {error}", base.display())));
        }
    };
    let mut directories: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_dir())
        .take(DEVICES_MAX)
        .collect();
    directories.sort();
    Ok(directories)
}

fn for_people(found: &Inspection) -> String {
    let mut text = plain(&found.directory.display().to_string());
    let running = match found.in_use {
        true => "a client runs with it",
        false => "no client runs with it",
    };
    let _ = write!(text, "\n  client   {running}");
    let window = found.window;
    let state = match window.state {
        WindowState::Absent => "absent: no client has run here yet",
        WindowState::Intact => "in order",
        WindowState::Torn => {
            "cut at its end, by a crash or by a client that writes just now; nothing is lost"
        }
        WindowState::Damaged => {
            "DAMAGED: the next start keeps it under another name and saves what can be read. Check the disk"
        }
        WindowState::Newer => {
            "of a NEWER version: use the newer client, or move the file away and accept that a notification may come twice"
        }
        _ => "unknown",
    };
    let _ = write!(
        text,
        "\n  answers  {state}; {} remembered, {} perhaps not yet with the server, {} bytes",
        window.remembered, window.unconfirmed, window.bytes
    );
    for path in &found.set_aside {
        let path = plain(&path.display().to_string());
        let _ = write!(
            text,
            "\n  damaged  {path} was set aside; it is not needed any more"
        );
    }
    match &found.last_session {
        None => text.push_str("\n  session  none yet"),
        Some(last) => {
            let proxy = match &last.proxy {
                Some(proxy) => format!(" through {}", plain(proxy)),
                None => String::new(),
            };
            let _ = write!(
                text,
                "\n  session  {} with {} over {} ({}){proxy}, from {}",
                last.session,
                plain(&last.server),
                plain(&last.carrier),
                plain(&last.codec),
                date(last.began_ms)
            );
            match (&last.ended_ms, &last.why, found.in_use) {
                (Some(ended), why, _) => {
                    let why = plain(why.as_deref().unwrap_or("no reason is known"));
                    let _ = write!(text, " to {}: {why}", date(*ended));
                }
                (None, _, true) => text.push_str(", and it stands"),
                (None, _, false) => text.push_str("; its process was killed"),
            }
        }
    }
    if let Some(subscriptions) = &found.subscriptions {
        let names = |names: &[String]| plain(&names.join(" "));
        match &subscriptions.topics {
            None => text.push_str("\n  topics   the server has not named them yet"),
            Some(topics) if topics.is_empty() => text.push_str("\n  topics   none"),
            Some(topics) => {
                let _ = write!(text, "\n  topics   {}", names(topics));
            }
        }
        for (wish, wanted) in [
            ("join", &subscriptions.joining),
            ("leave", &subscriptions.leaving),
        ] {
            if !wanted.is_empty() {
                let _ = write!(
                    text,
                    "; asked to {wish} and not answered yet: {}",
                    names(wanted)
                );
            }
        }
    }
    match &found.networks {
        None => text.push_str("\n  networks cannot be read; the next client begins anew"),
        Some(networks) => {
            for network in networks {
                let name = match network.name.as_str() {
                    "" => "(unknown)".to_owned(),
                    name => plain(name),
                };
                let _ = write!(text, "\n  network  {name}, used {}", date(network.used_ms));
                if let Some(carrier) = network.carrier {
                    let _ = write!(text, "; {carrier} won");
                }
                if let Some(proxy) = &network.proxy {
                    let _ = write!(text, " through {}", plain(proxy));
                }
                let bears = [
                    ("QUIC", network.quic_bears_s),
                    ("WebSocket", network.websocket_bears_s),
                ];
                for (carrier, seconds) in bears {
                    if let Some(seconds) = seconds {
                        let _ = write!(text, "; bears {seconds} s of silence on {carrier}");
                    }
                }
            }
        }
    }
    text
}
