//! `bellwire status`: how the server is.

use clap::Args;
use http::Method;
use serde_json::Value;

use super::api::{Api, ApiArgs};
use super::{Console, Outcome, moment, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire status
  bellwire status --json | jq .
  bellwire status --api https://push.example.com:8480 --key-file ops.key --ca company-ca.pem";

/// Apps that are shown to people; `--json` has more.
const APPS_SHOWN: usize = 5;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct StatusArgs {
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

pub(crate) async fn run(args: &StatusArgs) -> Outcome {
    let answer = Api::find(&args.api)?
        .ask(Method::GET, "/v1/status", None)
        .await?;
    let out = Console::out();
    if args.api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let rows = overview(&answer);
    let pairs: Vec<(&str, String)> = rows
        .iter()
        .map(|(name, text)| (*name, text.clone()))
        .collect();
    out.pairs(&pairs);
    Ok(())
}

/// What an operator looks at first; everything else is in `--json`.
fn overview(answer: &Value) -> Vec<(&'static str, String)> {
    let at = |path: &str| answer.pointer(path);
    let number = |path: &str| at(path).and_then(Value::as_u64).unwrap_or(0);
    let text = |path: &str| plain(at(path).and_then(Value::as_str).unwrap_or("-"));
    let yes = |path: &str| at(path).and_then(Value::as_bool).unwrap_or(false);
    let ready = match (yes("/ready"), yes("/draining")) {
        (true, _) => "yes",
        (false, true) => "no: draining",
        (false, false) => "no: see store",
    };
    let mut health = text("/store/health");
    if let Some(detail) = at("/store/detail").and_then(Value::as_str) {
        health = format!("{health}: {}", plain(detail));
    }
    vec![
        (
            "server",
            format!(
                "bellwire {}, run {}, up {}",
                text("/version"),
                number("/run"),
                span(number("/uptime_s"))
            ),
        ),
        ("ready", ready.to_owned()),
        (
            "devices",
            format!(
                "{} connected ({} QUIC, {} WebSocket), {} mailboxes awake; {} pings on their way to audiences",
                number("/devices/connected"),
                number("/devices/quic"),
                number("/devices/websocket"),
                number("/memory/mailboxes_awake"),
                number("/expansions"),
            ),
        ),
        ("store", format!("{health} ({})", text("/store/engine"))),
        (
            "log",
            format!(
                "{} in {} files, {} frames in this run, engine {} behind",
                size(number("/store/log_bytes")),
                number("/store/log_segments"),
                number("/store/frames"),
                size(number("/store/lag_bytes")),
            ),
        ),
        (
            "sizes",
            format!(
                "engine {}, snapshots {}, {} of it lives; set aside {}; engine built anew {} times in this run",
                size(number("/store/engine_bytes")),
                size(number("/store/snapshot_bytes")),
                size(number("/store/live_bytes")),
                size(number("/store/aside_bytes")),
                number("/store/rebuilds"),
            ),
        ),
        (
            "disk",
            format!(
                "{} free; a sync takes {} us (median), {} us (worst)",
                size(number("/store/free_bytes")),
                number("/store/sync_median_us"),
                number("/store/sync_worst_us"),
            ),
        ),
        (
            "backups",
            match at("/backup") {
                None => "none by itself: backup.dir is not set".to_owned(),
                Some(_) => {
                    let last = match number("/backup/last_ms") {
                        0 => "none yet".to_owned(),
                        at => format!("{}, {}", moment(at), size(number("/backup/bytes"))),
                    };
                    let trouble = at("/backup/trouble").and_then(Value::as_str);
                    let trouble = trouble.map_or(String::new(), |why| {
                        format!("; at the last try: {}", plain(why))
                    });
                    let running = at("/backup/running").and_then(Value::as_bool);
                    let now = match running {
                        Some(true) => "; one is being made now",
                        Some(false) | None => "",
                    };
                    format!(
                        "last {last}; {} kept, next {}{now}{trouble}",
                        number("/backup/kept"),
                        moment(number("/backup/due_ms")),
                    )
                }
            },
        ),
        (
            "outcomes",
            format!(
                "{} kept in {}{}; {} unreadable, {} left out in this run",
                number("/history/records"),
                size(number("/history/bytes")),
                match number("/history/oldest_ms") {
                    0 => String::new(),
                    oldest => format!(", the oldest of {}", moment(oldest)),
                },
                number("/history/unreadable"),
                number("/history/lost"),
            ),
        ),
        (
            "callbacks",
            match (number("/callbacks/set"), number("/callbacks/dead_letters")) {
                (0, 0) => "none".to_owned(),
                (set, letters) => format!(
                    "{set} set, {} failing, {} gone; {letters} dead letters",
                    number("/callbacks/failing"),
                    number("/callbacks/gone"),
                ),
            },
        ),
        ("apps", apps(answer)),
        ("clock", text("/clock/state")),
    ]
}

/// What apps hold, and what they may.
fn apps(answer: &Value) -> String {
    let all = answer.get("apps").and_then(Value::as_array);
    let all = all.map_or(&[][..], Vec::as_slice);
    let mut told: Vec<String> = all
        .iter()
        .take(APPS_SHOWN)
        .map(|app| {
            let number = |name: &str| app.get(name).and_then(Value::as_u64).unwrap_or(0);
            let part = |name: &str, show: fn(u64) -> String| {
                let most = match number(&format!("{name}_max")) {
                    0 => String::new(),
                    most => format!(" of {}", show(most)),
                };
                format!("{}{most}", show(number(name)))
            };
            format!(
                "{}: {} waiting, {}, {} devices",
                plain(app.get("name").and_then(Value::as_str).unwrap_or("-")),
                part("notifications", |number| number.to_string()),
                part("bytes", size),
                part("devices", |number| number.to_string()),
            )
        })
        .collect();
    let left_out = answer.get("apps_left_out").and_then(Value::as_u64);
    let more = (all.len() - told.len()) as u64 + left_out.unwrap_or(0);
    if more > 0 {
        told.push(format!("and {more} more"));
    }
    if answer.get("apps_counted") == Some(&Value::Bool(false)) {
        told.push("still being counted".to_owned());
    }
    told.join("; ")
}

/// A size for people, rounded.
fn size(bytes: u64) -> String {
    for (unit, least) in [("GiB", 1_u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
        if bytes >= least {
            return format!("{} {unit}", bytes / least);
        }
    }
    format!("{bytes} bytes")
}

/// A time for people, rounded.
fn span(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
