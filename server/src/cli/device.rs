//! `bellwire device`: register, list, change, rotate the secret, revoke.

use std::path::PathBuf;
use std::time::Duration;

use bellwire_certs::{IfExists, write_private};
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::console::Paint;
use super::key::text;
use super::{Console, Failure, Outcome, moment, now, plain};

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
    #[command(after_help = "\
Examples:
  bellwire device list
  bellwire device list --user anna --json
  bellwire device list --away --not-seen-for 30d        candidates for `bellwire device revoke`")]
    List {
        /// Only those of this user
        #[arg(long)]
        user: Option<String>,
        /// Only those that are connected now
        #[arg(long, conflicts_with = "away")]
        connected: bool,
        /// Only those that are not connected now
        #[arg(long)]
        away: bool,
        /// Only those that were not there for so long, such as 30d or 12h
        #[arg(long, value_name = "TIME", value_parser = ago)]
        not_seen_for: Option<Duration>,
        /// Only those that were there within so long, such as 30d or 12h
        #[arg(long, value_name = "TIME", value_parser = ago)]
        seen_within: Option<Duration>,
        /// Stop after so many
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        limit: u32,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show a device: its user, whether it is connected, when it was last seen, what waits for it
    #[command(after_help = "Examples:\n  bellwire device show mfrggzdfmztwq2lknnwg23tpoa")]
    Show {
        /// Its id
        device: String,
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
            | DeviceCommand::Show { api, .. }
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
        DeviceCommand::List {
            user,
            connected,
            away,
            not_seen_for,
            seen_within,
            limit,
            api,
        } => {
            let mut filters = String::new();
            let mut filter = |name: &str, value: &str| {
                filters.push_str(&format!("&{name}={}", encode(value)));
            };
            if let Some(user) = user {
                filter("user", user);
            }
            if *connected || *away {
                filter("attached", if *connected { "true" } else { "false" });
            }
            if let Some(time) = not_seen_for {
                filter("seen_before_ms", &before(*time));
            }
            if let Some(time) = seen_within {
                filter("seen_after_ms", &before(*time));
            }
            let limit = usize::try_from(*limit).unwrap_or(usize::MAX);
            list(&filters, limit, api).await
        }
        DeviceCommand::Show { device, api } => show(device, api).await,
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

/// Longest time that a list looks back.
const AGO_MAX: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A time with its unit, as settings have it.
fn ago(text: &str) -> Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        _ => 0,
    };
    digits
        .parse::<u64>()
        .ok()
        .filter(|_| unit > 0)
        .and_then(|count| count.checked_mul(unit))
        .map(Duration::from_secs)
        .filter(|time| *time <= AGO_MAX)
        .ok_or_else(|| "write a time with its unit: s, m, h or d, such as 30d".to_owned())
}

/// The moment so long ago, in Unix milliseconds.
fn before(time: Duration) -> String {
    let now_ms = now().unix_timestamp_nanos() / 1_000_000;
    let time_ms = i128::try_from(time.as_millis()).unwrap_or(i128::MAX);
    now_ms.saturating_sub(time_ms).max(0).to_string()
}

async fn show(device: &str, api: &ApiArgs) -> Outcome {
    let path = format!("/v1/devices/{}", encode(device));
    let answer = Api::find(api)?.ask(Method::GET, &path, None).await?;
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64);
    let time = |of: &Value, name: &str| number(of, name).map(moment).unwrap_or_default();
    let seen = answer.get("last_seen").unwrap_or(&Value::Null);
    let mut pairs = vec![
        ("device", text(&answer, "device")),
        ("user", text(&answer, "user")),
        ("name", text(&answer, "name")),
        ("created", time(&answer, "created_ms")),
        ("connected", connected(&answer)),
        ("last seen", last_seen(&answer)),
        ("agent", text(seen, "agent")),
        (
            "waiting",
            number(&answer, "waiting").unwrap_or(0).to_string(),
        ),
    ];
    if answer.get("previous_secret_until_ms").is_some() {
        pairs.push((
            "old secret",
            format!("good until {}", time(&answer, "previous_secret_until_ms")),
        ));
    }
    out.pairs(&pairs);
    Ok(())
}

pub(super) async fn list(filters: &str, limit: usize, args: &ApiArgs) -> Outcome {
    let api = Api::find(args)?;
    let mut devices = Vec::new();
    let mut after: Option<String> = None;
    let more = loop {
        let mut path = format!("/v1/devices?limit={}", PAGE.min(limit - devices.len()));
        path.push_str(filters);
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
    out.table(
        &[
            "DEVICE",
            "USER",
            "NAME",
            "CREATED",
            "CONNECTED",
            "LAST SEEN",
        ],
        &rows,
    );
    if more {
        out.line(&out.paint(Paint::Dim, "There are more; raise --limit to see them."));
    }
    Ok(())
}

/// How and since when a device is connected.
fn connected(device: &Value) -> String {
    let attached = device
        .get("attached")
        .filter(|attached| attached.is_object());
    match attached {
        Some(attached) => {
            let since = attached
                .get("since_ms")
                .and_then(Value::as_u64)
                .map(moment)
                .unwrap_or_default();
            format!("{} since {since}", text(attached, "carrier"))
        }
        None => "no".to_owned(),
    }
}

/// When a device was last there.
fn last_seen(device: &Value) -> String {
    let at_ms = device
        .get("last_seen")
        .and_then(|seen| seen.get("at_ms"))
        .and_then(Value::as_u64);
    at_ms.map_or("never".to_owned(), moment)
}

fn row(device: &Value) -> Vec<String> {
    vec![
        text(device, "device"),
        text(device, "user"),
        text(device, "name"),
        device
            .get("created_ms")
            .and_then(Value::as_u64)
            .map(moment)
            .unwrap_or_default(),
        connected(device),
        last_seen(device),
    ]
}
