//! `bellwire withdraw`: take a ping back, also off the screens where it is shown.

use clap::Args;
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::{Console, Outcome, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire withdraw k5xw6ztqmfzwk3thonuw4zlsme
  bellwire withdraw k5xw6ztqmfzwk3thonuw4zlsme --except mfrggzdfmztwq2lknnwg23tpoa   it was read there
  bellwire withdraw k5xw6ztqmfzwk3thonuw4zlsme --waiting                             only where it was not delivered

Devices that are away are told when they come back, within limits.withdrawals_keep.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct WithdrawArgs {
    /// The id of the ping
    #[arg(value_name = "PING")]
    ping: String,
    /// A device that keeps it; several times for several
    #[arg(long, value_name = "ID")]
    except: Vec<String>,
    /// Only revoke it where it waits; leave it where it was delivered
    #[arg(long, conflicts_with = "except")]
    waiting: bool,
    #[command(flatten)]
    pub(crate) api: ApiArgs,
}

pub(crate) async fn run(args: &WithdrawArgs) -> Outcome {
    let api = Api::find(&args.api)?;
    let path = format!("/v1/pings/{}", encode(&args.ping));
    let answer = if args.waiting {
        api.ask(Method::DELETE, &path, None).await?
    } else {
        let body = json!({ "except": args.except });
        api.ask(Method::POST, &format!("{path}/withdraw"), Some(&body))
            .await?
    };
    let out = Console::out();
    if args.api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let number = |name: &str| answer.get(name).and_then(Value::as_u64);
    out.pairs(&[("ping", plain(&args.ping))]);
    for (name, what) in [
        ("revoked", "taken back before it was delivered"),
        ("withdrawn", "delivered, and taken off the screen"),
        ("kept", "left alone, as asked"),
        ("ended", "had ended before"),
    ] {
        if let Some(count) = number(name) {
            out.line(&format!("{count:>9}  {what}"));
        }
    }
    Ok(())
}
