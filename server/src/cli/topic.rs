//! `bellwire topic`: who is in a topic, and which topics a device is in.

use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs, encode};
use super::device;
use super::{Console, Outcome, plain};

const AFTER_HELP: &str = "\
Examples:
  bellwire topic join mfrggzdfmztwq2lknnwg23tpoa news ward/3
  bellwire topic members ward/3
  bellwire ping --topic ward/3 --body \"Visiting time is over\"";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct TopicArgs {
    #[command(subcommand)]
    command: TopicCommand,
}

#[derive(Debug, Subcommand)]
enum TopicCommand {
    /// List the devices in a topic
    #[command(after_help = "\
Examples:
  bellwire topic members news
  bellwire topic members news --json")]
    Members {
        /// The topic
        topic: String,
        /// Stop after so many
        #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
        limit: u32,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show the topics that a device is in
    #[command(after_help = "Examples:\n  bellwire topic show mfrggzdfmztwq2lknnwg23tpoa")]
    Show {
        /// The device's id
        device: String,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Let a device join topics; it stays in all others
    #[command(
        after_help = "Examples:\n  bellwire topic join mfrggzdfmztwq2lknnwg23tpoa news ward/3"
    )]
    Join {
        /// The device's id
        device: String,
        /// The topics: 1 to 128 characters of a-z, A-Z, 0-9 and -._~/:@+
        #[arg(required = true)]
        topics: Vec<String>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Let a device leave topics; it stays in all others
    #[command(after_help = "Examples:\n  bellwire topic leave mfrggzdfmztwq2lknnwg23tpoa ward/3")]
    Leave {
        /// The device's id
        device: String,
        /// The topics
        #[arg(required = true)]
        topics: Vec<String>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Say which topics a device is in; it leaves all others
    #[command(after_help = "\
Examples:
  bellwire topic set mfrggzdfmztwq2lknnwg23tpoa news ward/3
  bellwire topic set mfrggzdfmztwq2lknnwg23tpoa              it is in none")]
    Set {
        /// The device's id
        device: String,
        /// The topics
        topics: Vec<String>,
        #[command(flatten)]
        api: ApiArgs,
    },
}

impl TopicArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            TopicCommand::Members { api, .. }
            | TopicCommand::Show { api, .. }
            | TopicCommand::Join { api, .. }
            | TopicCommand::Leave { api, .. }
            | TopicCommand::Set { api, .. } => api.json,
        }
    }
}

pub(crate) async fn run(args: &TopicArgs) -> Outcome {
    match &args.command {
        TopicCommand::Members { topic, limit, api } => {
            let limit = usize::try_from(*limit).unwrap_or(usize::MAX);
            device::list(&format!("&topic={}", encode(topic)), limit, api).await
        }
        TopicCommand::Show { device, api } => topics(device, Method::GET, None, api).await,
        TopicCommand::Join {
            device,
            topics: join,
            api,
        } => topics(device, Method::PATCH, Some(json!({ "join": join })), api).await,
        TopicCommand::Leave {
            device,
            topics: leave,
            api,
        } => topics(device, Method::PATCH, Some(json!({ "leave": leave })), api).await,
        TopicCommand::Set {
            device,
            topics: all,
            api,
        } => topics(device, Method::PUT, Some(json!({ "topics": all })), api).await,
    }
}

async fn topics(device: &str, method: Method, body: Option<Value>, api: &ApiArgs) -> Outcome {
    let answer = Api::find(api)?
        .ask(
            method,
            &format!("/v1/devices/{}/topics", encode(device)),
            body.as_ref(),
        )
        .await?;
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
        return Ok(());
    }
    let topics = answer.get("topics").and_then(Value::as_array);
    let topics: Vec<&str> = topics
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    if topics.is_empty() {
        out.line("in no topic");
    }
    for topic in topics {
        out.line(&plain(topic));
    }
    Ok(())
}
