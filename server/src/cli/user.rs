//! `bellwire user`: look at one, erase one.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::key::text;
use super::{Console, Failure, Outcome, moment, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire user show anna
  bellwire user erase anna --yes";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct UserArgs {
    #[command(subcommand)]
    command: UserCommand,
}

#[derive(Debug, Subcommand)]
enum UserCommand {
    /// Show a user: devices, whether they are connected, what waits for them
    #[command(
        after_help = "Examples:\n  bellwire user show anna\n  bellwire user show anna --json"
    )]
    Show {
        /// The user
        user: String,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Erase everything held of a user; there is no way back
    #[command(after_help = "\
Examples:
  bellwire user erase anna --yes

Its devices are revoked, and what waits for them is taken back. If it fails half way, do it again: it finishes.")]
    Erase {
        /// The user
        user: String,
        /// Yes, erase
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
}

impl UserArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            UserCommand::Show { api, .. } | UserCommand::Erase { api, .. } => api.json,
        }
    }
}

pub(crate) async fn run(args: &UserArgs) -> Outcome {
    match &args.command {
        UserCommand::Show { user, api } => show(user, api).await,
        UserCommand::Erase { user, yes, api } => {
            if !yes {
                return Err(Failure::usage(
                    "erasing a user cannot be undone",
                    "say that you mean it: add --yes",
                ));
            }
            Api::find(api)?
                .ask(Method::DELETE, &format!("/v1/users/{}", encode(user)), None)
                .await?;
            if api.json {
                Console::out().line(&json!({ "user": user, "erased": true }).to_string());
            } else {
                Console::out().line(&format!("erased {}", plain(user)));
            }
            Ok(())
        }
    }
}

async fn show(user: &str, args: &ApiArgs) -> Outcome {
    let path = format!("/v1/users/{}?limit=1000", encode(user));
    let answer = Api::find(args)?.ask(Method::GET, &path, None).await?;
    let out = Console::out();
    if args.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let devices = answer
        .get("devices")
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let number = |of: &Value, name: &str| of.get(name).and_then(Value::as_u64).unwrap_or(0);
    out.pairs(&[
        ("user", plain(user)),
        ("devices", devices.len().to_string()),
        ("connected", number(&answer, "attached").to_string()),
        ("waiting", number(&answer, "waiting").to_string()),
    ]);
    let row = |device: &Value| {
        let seen = device.get("last_seen").unwrap_or(&Value::Null);
        let at = seen.get("at_ms").and_then(Value::as_u64);
        vec![
            text(device, "device"),
            text(device, "name"),
            if device.get("attached").is_some_and(Value::is_object) {
                "yes".to_owned()
            } else {
                "no".to_owned()
            },
            at.map_or("never".to_owned(), moment),
            text(seen, "agent"),
            number(device, "waiting").to_string(),
        ]
    };
    let rows: Vec<Vec<String>> = devices.iter().map(row).collect();
    if !rows.is_empty() {
        out.table(
            &[
                "DEVICE",
                "NAME",
                "CONNECTED",
                "LAST SEEN",
                "AGENT",
                "WAITING",
            ],
            &rows,
        );
    }
    if answer.get("next").is_some() {
        out.line("There are more; `bellwire device list --user` tells all of them.");
    }
    Ok(())
}
