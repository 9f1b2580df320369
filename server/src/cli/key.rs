//! `bellwire key`: API keys of backends.

use std::path::PathBuf;

use bellwire_certs::{IfExists, write_private};
use bellwire_server::ports::Scopes;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::console::Paint;
use super::{Console, Failure, Outcome, moment, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire key create --name billing --scope ping --scope read
  bellwire key create --name ops --all --out ops.key
  bellwire key list
  bellwire key revoke 4m2kq7tz5n3xw6ja";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key; it is shown once
    #[command(
        after_help = "Examples:\n  bellwire key create --name billing --scope ping --scope read"
    )]
    Create {
        /// A name for people, such as the system that will use it
        #[arg(long)]
        name: String,
        /// What it may do: ping, read, devices, keys, admin; several times for several
        #[arg(long = "scope", value_name = "SCOPE", value_parser = scope_names(), required_unless_present = "all")]
        scopes: Vec<String>,
        /// Every scope
        #[arg(long, conflicts_with = "scopes")]
        all: bool,
        /// Write the key to this file (mode 0600) instead of showing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List keys; secrets are never shown again
    #[command(
        after_help = "Examples:\n  bellwire key list\n  bellwire key list --json | jq -r '.keys[].id'"
    )]
    List {
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Revoke a key at once
    #[command(after_help = "Examples:\n  bellwire key revoke 4m2kq7tz5n3xw6ja")]
    Revoke {
        /// Its id, as `key list` shows it
        id: String,
        #[command(flatten)]
        api: ApiArgs,
    },
}

fn scope_names() -> clap::builder::PossibleValuesParser {
    clap::builder::PossibleValuesParser::new(Scopes::NAMES.iter().map(|(_, name)| *name))
}

impl KeyArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            KeyCommand::Create { api, .. }
            | KeyCommand::List { api }
            | KeyCommand::Revoke { api, .. } => api.json,
        }
    }
}

pub(crate) async fn run(args: &KeyArgs) -> Outcome {
    let out = Console::out();
    match &args.command {
        KeyCommand::Create {
            name,
            scopes,
            all,
            out: file,
            api,
        } => {
            let scopes: Vec<&str> = if *all {
                Scopes::NAMES.iter().map(|(_, name)| *name).collect()
            } else {
                scopes.iter().map(String::as_str).collect()
            };
            let body = json!({ "name": name, "scopes": scopes });
            let mut answer = Api::find(api)?
                .ask(Method::POST, "/v1/keys", Some(&body))
                .await?;
            let key = answer
                .get("key")
                .and_then(Value::as_str)
                .unwrap_or_default()
                .to_owned();
            let id = text(&answer, "id");
            if let Some(file) = file {
                write_private(file, format!("{key}\n").as_bytes(), IfExists::Refuse).map_err(|error| {
                    Failure::new(
                        format!("the key {id} was made, but {error}"),
                        format!("revoke it (bellwire key revoke {id}) and try again with another --out"),
                    )
                })?;
                if let Some(object) = answer.as_object_mut() {
                    object.remove("key");
                    object.insert("file".to_owned(), json!(file.display().to_string()));
                }
            }
            if api.json {
                out.line(&answer.to_string());
                return Ok(());
            }
            let shown = match file {
                Some(file) => format!("written to {} (mode 0600)", file.display()),
                None => out.paint(Paint::Cyan, &plain(&key)),
            };
            out.pairs(&[("id", id), ("scopes", scopes.join(", ")), ("key", shown)]);
            if file.is_none() {
                out.line(&out.paint(
                    Paint::Yellow,
                    "The key is shown this once and kept nowhere: store it now.",
                ));
            }
            Ok(())
        }
        KeyCommand::List { api } => {
            let answer = Api::find(api)?.ask(Method::GET, "/v1/keys", None).await?;
            if api.json {
                out.line(&answer.to_string());
                return Ok(());
            }
            let keys = answer
                .get("keys")
                .and_then(Value::as_array)
                .cloned()
                .unwrap_or_default();
            let rows: Vec<Vec<String>> = keys
                .iter()
                .map(|key| {
                    let scopes = key.get("scopes").and_then(Value::as_array);
                    let scopes: Vec<&str> = scopes
                        .into_iter()
                        .flatten()
                        .filter_map(Value::as_str)
                        .collect();
                    vec![
                        text(key, "id"),
                        text(key, "name"),
                        scopes.join(","),
                        key.get("created_ms")
                            .and_then(Value::as_u64)
                            .map(moment)
                            .unwrap_or_default(),
                    ]
                })
                .collect();
            out.table(&["ID", "NAME", "SCOPES", "CREATED"], &rows);
            Ok(())
        }
        KeyCommand::Revoke { id, api } => {
            Api::find(api)?
                .ask(Method::DELETE, &format!("/v1/keys/{}", encode(id)), None)
                .await?;
            if api.json {
                out.line(&json!({ "id": id, "revoked": true }).to_string());
            } else {
                out.line(&format!("revoked {}", plain(id)));
            }
            Ok(())
        }
    }
}

/// A text member of an answer, safe for a terminal; empty if it is not there.
pub(super) fn text(value: &Value, name: &str) -> String {
    plain(value.get(name).and_then(Value::as_str).unwrap_or_default())
}
