//! `bellwire status`: how the server is.

use clap::Args;
use http::Method;
use serde_json::Value;

use super::api::{Api, ApiArgs};
use super::{Console, Outcome, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire status
  bellwire status --json | jq .
  bellwire status --api https://push.example.com:8480 --key-file ops.key --ca company-ca.pem";

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
    let mut pairs = Vec::new();
    flatten("", &answer, &mut pairs);
    let pairs: Vec<(&str, String)> = pairs
        .iter()
        .map(|(name, value)| (name.as_str(), value.clone()))
        .collect();
    out.pairs(&pairs);
    Ok(())
}

/// One line for each figure: whatever this server's version tells is shown, not only what this program knows.
fn flatten(prefix: &str, value: &Value, pairs: &mut Vec<(String, String)>) {
    match value {
        Value::Object(members) => {
            for (name, value) in members {
                let name = name.replace('_', " ");
                let full = if prefix.is_empty() {
                    name
                } else {
                    format!("{prefix} {name}")
                };
                flatten(&full, value, pairs);
            }
        }
        Value::String(text) => pairs.push((prefix.to_owned(), plain(text))),
        Value::Null => pairs.push((prefix.to_owned(), "-".to_owned())),
        Value::Bool(flag) => pairs.push((
            prefix.to_owned(),
            if *flag { "yes" } else { "no" }.to_owned(),
        )),
        Value::Number(number) => pairs.push((prefix.to_owned(), number.to_string())),
        Value::Array(_) => pairs.push((prefix.to_owned(), plain(&value.to_string()))),
    }
}
