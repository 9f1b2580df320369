//! `bellwire ping`: send one, see what became of it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use clap::Args;
use http::Method;
use serde_json::{Map, Value, json};

use super::api::{Api, ApiArgs};
use super::batch;
use super::console::Paint;
use super::key::text;
use super::{Console, Failure, Outcome, moment};

/// Most bytes read for `--data-file`: the largest content that a server can be set to take.
const DATA_MAX: u64 = 64 << 10;
/// Longest time that a server waits for an acknowledgement.
const WAIT_MAX_S: u64 = 60;

const AFTER_HELP: &str = "\
Examples:
  bellwire ping --user anna --title \"Order 7\" --body \"Ready at gate 3\"
  bellwire ping --device mfrggzdfmztwq2lknnwg23tpoa --body Hi --wait
  bellwire ping --user anna --user ben --body \"Shift starts\" --ttl 600 --urgency high
  bellwire ping --user anna --sync orders --collapse orders --idempotency-key order-7
  bellwire ping --topic ward/3 --body \"Visiting time is over\"
  bellwire ping --everyone --title Maintenance --body \"Tonight at ten\" --ttl 3600
  bellwire ping --batch pings.ndjson          one ping a line, as POST /v1/pings/batch takes it; - reads standard input

The exit code is 0 when the server has accepted the ping; with --wait, when it was acknowledged everywhere; with --batch, when
every line was accepted. Lines for which the server has no room at the moment are sent again, behind others, if that is safe: those
with an idempotency_key, and those refused before anything happened.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
#[command(group = clap::ArgGroup::new("what").multiple(true)
    .args(["title", "body", "sound", "badge", "vibrate", "category", "sync", "data", "data_file"]))]
#[command(group = clap::ArgGroup::new("how").multiple(true).args(["ttl", "urgency", "collapse", "idempotency_key", "wait"]))]
pub(crate) struct PingArgs {
    /// A user; several times for several
    #[arg(
        long = "user",
        value_name = "USER",
        help_heading = "Whom",
        conflicts_with = "devices"
    )]
    users: Vec<String>,
    /// A device id; several times for several
    #[arg(
        long = "device",
        value_name = "ID",
        help_heading = "Whom",
        required_unless_present_any = ["users", "topic", "everyone", "batch"]
    )]
    devices: Vec<String>,
    /// The devices in a topic
    #[arg(long, value_name = "TOPIC", help_heading = "Whom", conflicts_with_all = ["users", "devices", "everyone"])]
    topic: Option<String>,
    /// Every device
    #[arg(long, help_heading = "Whom", conflicts_with_all = ["users", "devices"])]
    everyone: bool,
    /// Many pings, one a line as JSON; `-` reads standard input. Lines with an `idempotency_key` are safe to send again
    #[arg(long, value_name = "FILE", help_heading = "Whom", conflicts_with_all = ["users", "devices", "topic", "everyone", "what", "how"])]
    batch: Option<PathBuf>,

    /// A line in bold
    #[arg(long, help_heading = "What")]
    title: Option<String>,
    /// The text
    #[arg(long, help_heading = "What")]
    body: Option<String>,
    /// Name of a sound
    #[arg(long, help_heading = "What")]
    sound: Option<String>,
    /// Number on the app's icon
    #[arg(long, help_heading = "What")]
    badge: Option<u32>,
    /// Vibrate for so many milliseconds
    #[arg(long, value_name = "MS", help_heading = "What")]
    vibrate: Option<u32>,
    /// Category that the app knows
    #[arg(long, help_heading = "What")]
    category: Option<String>,
    /// A data source to synchronise; several times for several
    #[arg(long = "sync", value_name = "SOURCE", help_heading = "What")]
    sync: Vec<String>,
    /// Data for the app, as text
    #[arg(long, help_heading = "What", conflicts_with = "data_file")]
    data: Option<String>,
    /// Data for the app, the bytes of a file
    #[arg(long, value_name = "FILE", help_heading = "What")]
    data_file: Option<PathBuf>,

    /// Seconds that it may wait for a device; 0: now or never. Default: as the server is set
    #[arg(long, value_name = "SECONDS", help_heading = "How")]
    ttl: Option<u64>,
    /// How much it matters
    #[arg(long, value_parser = ["very-low", "low", "normal", "high"], help_heading = "How")]
    urgency: Option<String>,
    /// Takes the place of a waiting one with the same key
    #[arg(long, value_name = "KEY", help_heading = "How")]
    collapse: Option<String>,
    /// Makes it safe to send the same again: one key for one ping, for ever
    #[arg(long, value_name = "KEY", help_heading = "How")]
    idempotency_key: Option<String>,
    /// Wait so many seconds for the acknowledgement (10 if no number is given, at most 60)
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "10", require_equals = true,
          value_parser = clap::value_parser!(u64).range(1..=WAIT_MAX_S), help_heading = "How")]
    wait: Option<u64>,

    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

pub(crate) async fn run(args: &PingArgs) -> Outcome {
    if let Some(file) = &args.batch {
        return batch::run(file, &args.api).await;
    }
    let body = request(args)?;
    let wait = Duration::from_secs(args.wait.unwrap_or(0));
    let path = match args.wait {
        Some(seconds) => format!("/v1/pings?wait=acknowledged&timeout_s={seconds}"),
        None => "/v1/pings".to_owned(),
    };
    let headers: Vec<(&'static str, &str)> = args
        .idempotency_key
        .iter()
        .map(|key| ("idempotency-key", key.as_str()))
        .collect();
    let answer = Api::find(&args.api)?
        .ask_waiting(Method::POST, &path, Some(&body), &headers, wait)
        .await?;
    let out = Console::out();
    let waiting = args.wait.map_or(0, |_| unacknowledged(&answer));
    if args.api.json {
        out.line(&answer.to_string());
    } else {
        show(out, &answer);
    }
    if waiting > 0 {
        return Err(Failure::new(
            format!(
                "not acknowledged in time: {waiting} of {} notifications",
                outcomes(&answer).len() + rejected(&answer).len()
            ),
            format!(
                "what was accepted still waits; `bellwire outcomes --ping {}` tells what becomes of it",
                text(&answer, "id")
            ),
        ));
    }
    Ok(())
}

fn request(args: &PingArgs) -> Result<Value, Failure> {
    let mut ping = Map::new();
    let to = match (args.users.as_slice(), args.devices.as_slice()) {
        _ if args.everyone => json!({ "everyone": true }),
        _ if args.topic.is_some() => json!({ "topic": args.topic }),
        ([user], _) => json!({ "user": user }),
        (_, [device]) => json!({ "device": device }),
        ([], devices) => json!({ "devices": devices }),
        (users, _) => json!({ "users": users }),
    };
    ping.insert("to".to_owned(), to);
    let texts = [
        ("title", &args.title),
        ("body", &args.body),
        ("sound", &args.sound),
        ("category", &args.category),
        ("urgency", &args.urgency),
        ("collapse", &args.collapse),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            ping.insert(name.to_owned(), json!(value));
        }
    }
    let numbers = [
        ("badge", args.badge.map(u64::from)),
        ("vibrate_ms", args.vibrate.map(u64::from)),
        ("ttl_s", args.ttl),
    ];
    for (name, value) in numbers {
        if let Some(value) = value {
            ping.insert(name.to_owned(), json!(value));
        }
    }
    if !args.sync.is_empty() {
        ping.insert("sync".to_owned(), json!(args.sync));
    }
    let data = match (&args.data, &args.data_file) {
        (Some(text), _) => Some(text.clone().into_bytes()),
        (None, Some(file)) => Some(read_data(file)?),
        (None, None) => None,
    };
    if let Some(data) = data {
        ping.insert("data".to_owned(), json!(BASE64_STANDARD.encode(data)));
    }
    Ok(Value::Object(ping))
}

fn read_data(file: &Path) -> Result<Vec<u8>, Failure> {
    let size = std::fs::metadata(file).map(|found| found.len());
    match size {
        Ok(size) if size > DATA_MAX => {
            return Err(Failure::usage(
                format!(
                    "{} has {size} bytes; no server takes more than {DATA_MAX}",
                    file.display()
                ),
                "send a reference to it instead of the whole",
            ));
        }
        Ok(_) | Err(_) => {}
    }
    std::fs::read(file).map_err(|error| {
        Failure::usage(
            format!("{}: {error}", file.display()),
            "name a file that can be read",
        )
    })
}

fn outcomes(answer: &Value) -> &[Value] {
    answer
        .get("outcomes")
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn rejected(answer: &Value) -> &[Value] {
    answer
        .get("rejected")
        .and_then(Value::as_array)
        .map_or(&[], Vec::as_slice)
}

fn unacknowledged(answer: &Value) -> usize {
    outcomes(answer)
        .iter()
        .filter(|pair| text(pair, "state") != "acknowledged")
        .count()
        + rejected(answer).len()
}

fn show(out: Console, answer: &Value) {
    let number = |name: &str| answer.get(name).and_then(Value::as_u64).unwrap_or(0);
    out.pairs(&[
        ("ping", out.paint(Paint::Cyan, &text(answer, "id"))),
        ("devices", number("devices").to_string()),
        ("ttl", format!("{} s", number("ttl_s"))),
    ]);
    if number("devices") == 0 {
        out.line(&out.paint(
            Paint::Yellow,
            "The ping was accepted, but nobody it addresses has a device.",
        ));
    }
    let state = |pair: &Value| {
        let at = pair
            .get("at_ms")
            .and_then(Value::as_u64)
            .map(moment)
            .unwrap_or_default();
        vec![text(pair, "device"), text(pair, "state"), at]
    };
    let refused = |pair: &Value| {
        vec![
            text(pair, "device"),
            format!("rejected: {}", text(pair, "code")),
            String::new(),
        ]
    };
    let rows: Vec<Vec<String>> = outcomes(answer)
        .iter()
        .map(state)
        .chain(rejected(answer).iter().map(refused))
        .collect();
    if !rows.is_empty() {
        out.table(&["DEVICE", "STATE", "AT"], &rows);
    }
}
