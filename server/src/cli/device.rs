//! `bellwire device`: register, list, change, rotate the secret, revoke.

use std::path::PathBuf;

use bellwire_certs::{IfExists, write_private};
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::console::Paint;
use super::key::text;
use super::{Console, Failure, Outcome, moment, plain};

/// Devices asked for at a time; the server may give fewer.
const PAGE: usize = 1_000;

const AFTER_HELP: &str = "\
Examples:
  bellwire device add --user anna --name \"Anna's scanner\" --out anna.json
  bellwire device list --user anna
  bellwire device change mfrggzdfmztwq2lknnwg23tpoa --user ben
  bellwire device rotate mfrggzdfmztwq2lknnwg23tpoa --out anna.json
  bellwire device revoke mfrggzdfmztwq2lknnwg23tpoa";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DeviceArgs {
    #[command(subcommand)]
    command: DeviceCommand,
}

#[derive(Debug, Subcommand)]
enum DeviceCommand {
    /// Register a device; its secret is shown once
    #[command(after_help = "\
Examples:
  bellwire device add --user anna
  bellwire device add --user anna --out anna.json     then, on the device: bellwire-device listen --credentials anna.json")]
    Add {
        /// The user who owns it: the name that backends ping
        #[arg(long)]
        user: String,
        /// A name for people
        #[arg(long)]
        name: Option<String>,
        /// Write device id and secret to this file (mode 0600) for `bellwire-device listen --credentials`
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List devices
    #[command(
        after_help = "Examples:\n  bellwire device list\n  bellwire device list --user anna --json"
    )]
    List {
        /// Only those of this user
        #[arg(long)]
        user: Option<String>,
        /// Stop after so many
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        limit: u32,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Change a device: its name, its user
    #[command(after_help = "\
Examples:
  bellwire device change mfrggzdfmztwq2lknnwg23tpoa --name \"Ward 4 tablet\"
  bellwire device change mfrggzdfmztwq2lknnwg23tpoa --user ben            what waits ends as revoked
  bellwire device change mfrggzdfmztwq2lknnwg23tpoa --user ben --keep     what waits goes with the device")]
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["user", "name", "no_name"]))]
    Change {
        /// Its id
        device: String,
        /// The new user
        #[arg(long)]
        user: Option<String>,
        /// The new name
        #[arg(long, conflicts_with = "no_name")]
        name: Option<String>,
        /// Take the name away
        #[arg(long)]
        no_name: bool,
        /// With --user: let what waits go with the device; otherwise it ends as revoked, because it was meant for somebody else
        #[arg(long, requires = "user")]
        keep: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Give a device a new secret; it is shown once
    #[command(after_help = "\
Examples:
  bellwire device rotate mfrggzdfmztwq2lknnwg23tpoa                   the old one stays good for a while (24 h unless set)
  bellwire device rotate mfrggzdfmztwq2lknnwg23tpoa --overlap 0       the old one and the session end at once")]
    Rotate {
        /// Its id
        device: String,
        /// Seconds for which the old secret stays good; 0: not at all, and the session is cut
        #[arg(long, value_name = "SECONDS")]
        overlap: Option<u64>,
        /// Write device id and secret to this file (mode 0600) for `bellwire-device listen --credentials`
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Revoke a device: cut its session, take back what waits for it
    #[command(after_help = "Examples:\n  bellwire device revoke mfrggzdfmztwq2lknnwg23tpoa")]
    Revoke {
        /// Its id
        device: String,
        #[command(flatten)]
        api: ApiArgs,
    },
}

impl DeviceArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            DeviceCommand::Add { api, .. }
            | DeviceCommand::List { api, .. }
            | DeviceCommand::Change { api, .. }
            | DeviceCommand::Rotate { api, .. }
            | DeviceCommand::Revoke { api, .. } => api.json,
        }
    }
}

pub(crate) async fn run(args: &DeviceArgs) -> Outcome {
    match &args.command {
        DeviceCommand::Add {
            user,
            name,
            out,
            api,
        } => add(user, name.as_deref(), out.as_ref(), api).await,
        DeviceCommand::List { user, limit, api } => {
            list(
                user.as_deref(),
                usize::try_from(*limit).unwrap_or(usize::MAX),
                api,
            )
            .await
        }
        DeviceCommand::Change {
            device,
            user,
            name,
            no_name,
            keep,
            api,
        } => {
            let mut change = json!({});
            if let Some(user) = user {
                change["user"] = json!(user);
                change["waiting"] = json!(if *keep { "keep" } else { "revoke" });
            }
            if *no_name {
                change["name"] = Value::Null;
            } else if let Some(name) = name {
                change["name"] = json!(name);
            }
            self::change(device, &change, api).await
        }
        DeviceCommand::Rotate {
            device,
            overlap,
            out,
            api,
        } => rotate(device, *overlap, out.as_ref(), api).await,
        DeviceCommand::Revoke { device, api } => {
            Api::find(api)?
                .ask(
                    Method::DELETE,
                    &format!("/v1/devices/{}", encode(device)),
                    None,
                )
                .await?;
            if api.json {
                Console::out().line(&json!({ "device": device, "revoked": true }).to_string());
            } else {
                Console::out().line(&format!("revoked {}", plain(device)));
            }
            Ok(())
        }
    }
}

async fn add(user: &str, name: Option<&str>, file: Option<&PathBuf>, api: &ApiArgs) -> Outcome {
    let out = Console::out();
    let mut body = json!({ "user": user });
    if let (Some(name), Some(object)) = (name, body.as_object_mut()) {
        object.insert("name".to_owned(), json!(name));
    }
    let mut answer = Api::find(api)?
        .ask(Method::POST, "/v1/devices", Some(&body))
        .await?;
    let (device, secret) = (text(&answer, "device"), text(&answer, "secret"));
    if let Some(file) = file {
        let credentials = json!({ "device": device, "secret": secret });
        write_private(
            file,
            format!("{credentials}\n").as_bytes(),
            IfExists::Refuse,
        )
        .map_err(|error| {
            Failure::new(
                format!("the device {device} was registered, but {error}"),
                format!(
                    "revoke it (bellwire device revoke {device}) and try again with another --out"
                ),
            )
        })?;
        if let Some(object) = answer.as_object_mut() {
            object.remove("secret");
            object.insert("file".to_owned(), json!(file.display().to_string()));
        }
    }
    if api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let shown = match file {
        Some(file) => format!("written to {} (mode 0600)", file.display()),
        None => out.paint(Paint::Cyan, &secret),
    };
    out.pairs(&[("device", device), ("user", plain(user)), ("secret", shown)]);
    if file.is_none() {
        out.line(&out.paint(
            Paint::Yellow,
            "The secret is shown this once and kept nowhere: store it now.",
        ));
    }
    Ok(())
}

async fn change(device: &str, change: &Value, api: &ApiArgs) -> Outcome {
    let answer = Api::find(api)?
        .ask(
            Method::PATCH,
            &format!("/v1/devices/{}", encode(device)),
            Some(change),
        )
        .await?;
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let number = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
    out.pairs(&[
        ("device", text(&answer, "device")),
        ("user", text(&answer, "user")),
        ("name", text(&answer, "name")),
        ("waiting", number("waiting").to_string()),
        ("revoked", number("revoked").to_string()),
    ]);
    Ok(())
}

async fn rotate(
    device: &str,
    overlap: Option<u64>,
    file: Option<&PathBuf>,
    api: &ApiArgs,
) -> Outcome {
    // Before the old secret is given up.
    if let Some(file) = file.filter(|file| file.exists()) {
        return Err(Failure::usage(
            format!("{} is there already", file.display()),
            "name another file with --out; nothing was changed",
        ));
    }
    let body = overlap.map(|seconds| json!({ "overlap_s": seconds }));
    let mut answer = Api::find(api)?
        .ask(
            Method::POST,
            &format!("/v1/devices/{}/secret", encode(device)),
            body.as_ref(),
        )
        .await?;
    let secret = text(&answer, "secret");
    if let Some(file) = file {
        let credentials = json!({ "device": text(&answer, "device"), "secret": secret });
        write_private(
            file,
            format!("{credentials}\n").as_bytes(),
            IfExists::Refuse,
        )
        .map_err(|error| {
            Failure::new(
                format!("the secret of {} was rotated, but {error}", plain(device)),
                "rotate it again with another --out before the old secret ends",
            )
        })?;
        if let Some(object) = answer.as_object_mut() {
            object.remove("secret");
            object.insert("file".to_owned(), json!(file.display().to_string()));
        }
    }
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let shown = match file {
        Some(file) => format!("written to {} (mode 0600)", file.display()),
        None => out.paint(Paint::Cyan, &secret),
    };
    let until = answer.get("previous_until_ms").and_then(Value::as_u64);
    out.pairs(&[
        ("device", text(&answer, "device")),
        ("secret", shown),
        (
            "old secret",
            until.map_or("ended".to_owned(), |until| {
                format!("good until {}", moment(until))
            }),
        ),
    ]);
    if file.is_none() {
        out.line(&out.paint(
            Paint::Yellow,
            "The secret is shown this once and kept nowhere: store it now.",
        ));
    }
    Ok(())
}

async fn list(user: Option<&str>, limit: usize, args: &ApiArgs) -> Outcome {
    let api = Api::find(args)?;
    let mut devices = Vec::new();
    let mut after: Option<String> = None;
    let more = loop {
        let mut path = format!("/v1/devices?limit={}", PAGE.min(limit - devices.len()));
        if let Some(user) = user {
            path.push_str(&format!("&user={}", encode(user)));
        }
        if let Some(after) = &after {
            path.push_str(&format!("&after={}", encode(after)));
        }
        let page = api.ask(Method::GET, &path, None).await?;
        let found = page
            .get("devices")
            .and_then(Value::as_array)
            .cloned()
            .unwrap_or_default();
        devices.extend(found);
        let next = page.get("next").and_then(Value::as_str).map(str::to_owned);
        // A server that gives the same place again would be asked for ever.
        if next.is_none() || next == after || devices.len() >= limit {
            break next.is_some();
        }
        after = next;
    };
    let out = Console::out();
    if args.json {
        out.line(&json!({ "devices": devices, "more": more }).to_string());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = devices.iter().map(row).collect();
    out.table(&["DEVICE", "USER", "NAME", "CREATED", "CONNECTED"], &rows);
    if more {
        out.line(&out.paint(Paint::Dim, "There are more; raise --limit to see them."));
    }
    Ok(())
}

fn row(device: &Value) -> Vec<String> {
    let attached = device
        .get("attached")
        .filter(|attached| attached.is_object());
    let connected = match attached {
        Some(attached) => {
            let since = attached
                .get("since_ms")
                .and_then(Value::as_u64)
                .map(moment)
                .unwrap_or_default();
            format!("{} since {since}", text(attached, "carrier"))
        }
        None => "no".to_owned(),
    };
    vec![
        text(device, "device"),
        text(device, "user"),
        text(device, "name"),
        device
            .get("created_ms")
            .and_then(Value::as_u64)
            .map(moment)
            .unwrap_or_default(),
        connected,
    ]
}
