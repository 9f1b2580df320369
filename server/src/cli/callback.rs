//! `bellwire callback`: where outcomes are posted.

use std::path::PathBuf;

use bellwire_certs::{IfExists, write_private};
use bellwire_server::runtime::Outcome as Ending;
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use http::Method;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs};
use super::console::Paint;
use super::failure::Trouble;
use super::key::text;
use super::{Console, Failure, Outcome, moment, plain};

/// Most bytes of a file with a secret.
const SECRET_FILE_MAX: u64 = 4 << 10;

const AFTER_HELP: &str = "\
Examples:
  bellwire callback set https://hooks.example.com/bellwire --out callback.secret
  bellwire callback test
  bellwire callback show
  bellwire callback dead-letters
  bellwire callback resend --all

Outcomes are posted as docs/callbacks.md describes, signed as Standard Webhooks say. The operator allows hosts and networks in
`callbacks.allow`; without them callbacks are off.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CallbackArgs {
    #[command(subcommand)]
    command: CallbackCommand,
}

#[derive(Debug, Subcommand)]
enum CallbackCommand {
    /// Set where outcomes are posted; a secret that is made is shown once
    #[command(
        after_help = "Examples:\n  bellwire callback set https://hooks.example.com/bellwire\n  bellwire callback set https://hooks.example.com/lost --outcome expired,evicted\n\nSetting it again changes URL and choice, keeps the secret and goes on where it was; one that was `gone` goes on."
    )]
    Set {
        /// Where to
        url: String,
        /// Only those that ended so; more of them with commas between them
        #[arg(long, value_name = "OUTCOME", value_delimiter = ',',
              value_parser = PossibleValuesParser::new(Ending::ALL.map(Ending::as_str)))]
        outcome: Vec<String>,
        /// A file with a secret of your own (`whsec_` and base64)
        #[arg(long, value_name = "FILE", conflicts_with = "out")]
        secret_file: Option<PathBuf>,
        /// Write the secret that is made to this file (mode 0600) instead of showing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Show where outcomes are posted, and how that goes
    #[command(
        after_help = "Examples:\n  bellwire callback show\n  bellwire callback show --json | jq -r .state"
    )]
    Show {
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Post a test now
    #[command(after_help = "Examples:\n  bellwire callback test")]
    Test {
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Make a new secret; the one before signs as well for a while
    #[command(
        after_help = "Examples:\n  bellwire callback rotate --out callback.secret\n  bellwire callback rotate --overlap-s 3600"
    )]
    Rotate {
        /// For how long the old one signs as well, seconds; default: as the server is set
        #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(0..=7_776_000))]
        overlap_s: Option<u64>,
        /// A file with a secret of your own (`whsec_` and base64)
        #[arg(long, value_name = "FILE", conflicts_with = "out")]
        secret_file: Option<PathBuf>,
        /// Write the secret that is made to this file (mode 0600) instead of showing it
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// List the batches that were given up
    #[command(
        after_help = "Examples:\n  bellwire callback dead-letters\n  bellwire callback dead-letters --json"
    )]
    DeadLetters {
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Post dead letters again
    #[command(
        after_help = "Examples:\n  bellwire callback resend 17\n  bellwire callback resend --all"
    )]
    Resend {
        /// Its number, as `dead-letters` shows it
        #[arg(required_unless_present = "all")]
        number: Option<u64>,
        /// All of them, the oldest first, until one is not taken
        #[arg(long, conflicts_with = "number")]
        all: bool,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Forget a dead letter
    #[command(after_help = "Examples:\n  bellwire callback forget 17")]
    Forget {
        /// Its number, as `dead-letters` shows it
        number: u64,
        #[command(flatten)]
        api: ApiArgs,
    },
    /// Post outcomes nowhere any more, and forget the dead letters
    #[command(after_help = "Examples:\n  bellwire callback remove")]
    Remove {
        #[command(flatten)]
        api: ApiArgs,
    },
}

impl CallbackArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            CallbackCommand::Set { api, .. }
            | CallbackCommand::Show { api }
            | CallbackCommand::Test { api }
            | CallbackCommand::Rotate { api, .. }
            | CallbackCommand::DeadLetters { api }
            | CallbackCommand::Resend { api, .. }
            | CallbackCommand::Forget { api, .. }
            | CallbackCommand::Remove { api } => api.json,
        }
    }
}

pub(crate) async fn run(args: &CallbackArgs) -> Outcome {
    match &args.command {
        CallbackCommand::Set {
            url,
            outcome,
            secret_file,
            out,
            api,
        } => {
            let mut body = json!({ "url": url, "outcomes": outcome });
            add_secret(&mut body, secret_file.as_ref())?;
            let answer = Api::find(api)?
                .ask(Method::PUT, "/v1/callbacks", Some(&body))
                .await?;
            show_made(answer, out.as_ref(), api)
        }
        CallbackCommand::Rotate {
            overlap_s,
            secret_file,
            out,
            api,
        } => {
            let mut body = json!({});
            if let Some(overlap_s) = overlap_s {
                body = json!({ "overlap_s": overlap_s });
            }
            add_secret(&mut body, secret_file.as_ref())?;
            let answer = Api::find(api)?
                .ask(Method::POST, "/v1/callbacks/secret", Some(&body))
                .await?;
            show_made(answer, out.as_ref(), api)
        }
        CallbackCommand::Show { api } => {
            let answer = Api::find(api)?
                .ask(Method::GET, "/v1/callbacks", None)
                .await?;
            show(&answer, api);
            Ok(())
        }
        CallbackCommand::Test { api } => {
            let answer = Api::find(api)?
                .ask(Method::POST, "/v1/callbacks/test", None)
                .await?;
            told(
                api,
                &answer,
                &format!("taken, with {}", number(&answer, "status")),
            );
            Ok(())
        }
        CallbackCommand::DeadLetters { api } => list(api).await,
        CallbackCommand::Resend {
            number: Some(number),
            api,
            ..
        } => {
            let answer = resend(&Api::find(api)?, *number).await?;
            told(api, &answer, &format!("{number} was taken"));
            Ok(())
        }
        CallbackCommand::Resend {
            number: None, api, ..
        } => resend_all(api).await,
        CallbackCommand::Forget { number, api } => {
            let path = format!("/v1/callbacks/dead-letters/{number}");
            Api::find(api)?.ask(Method::DELETE, &path, None).await?;
            told(
                api,
                &json!({ "number": number, "forgotten": true }),
                &format!("{number} is forgotten"),
            );
            Ok(())
        }
        CallbackCommand::Remove { api } => {
            Api::find(api)?
                .ask(Method::DELETE, "/v1/callbacks", None)
                .await?;
            told(api, &json!({ "removed": true }), "removed");
            Ok(())
        }
    }
}

fn told(api: &ApiArgs, answer: &Value, line: &str) {
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
    } else {
        out.line(&plain(line));
    }
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or(0)
}

/// Puts the secret of a file into a request.
fn add_secret(body: &mut Value, file: Option<&PathBuf>) -> Result<(), Failure> {
    use std::io::Read as _;

    let Some(file) = file else {
        return Ok(());
    };
    let mut secret = String::new();
    std::fs::File::open(file)
        .and_then(|open| open.take(SECRET_FILE_MAX).read_to_string(&mut secret))
        .map_err(|error| {
            Failure::usage(
                format!("{} cannot be read: {error}", file.display()),
                "name a file with one line that begins with whsec_",
            )
        })?;
    if let Some(object) = body.as_object_mut() {
        object.insert("secret".to_owned(), json!(secret.trim()));
    }
    Ok(())
}

/// Shows a callback, and keeps or shows the secret that was made.
fn show_made(mut answer: Value, file: Option<&PathBuf>, api: &ApiArgs) -> Outcome {
    let out = Console::out();
    let secret = answer
        .get("secret")
        .and_then(Value::as_str)
        .map(str::to_owned);
    if let (Some(secret), Some(file)) = (&secret, file) {
        write_private(file, format!("{secret}\n").as_bytes(), IfExists::Refuse).map_err(
            |error| {
                Failure::new(
                    format!("the secret was made, but {error}"),
                    "make another one with `bellwire callback rotate --out FILE`",
                )
            },
        )?;
        if let Some(object) = answer.as_object_mut() {
            object.remove("secret");
            object.insert("secret_file".to_owned(), json!(file.display().to_string()));
        }
    }
    show(&answer, api);
    if api.json {
        return Ok(());
    }
    match (secret, file) {
        (Some(_), Some(file)) => {
            out.line(&format!("secret written to {} (mode 0600)", file.display()));
        }
        (Some(secret), None) => {
            out.line(&format!(
                "secret  {}",
                out.paint(Paint::Cyan, &plain(&secret))
            ));
            out.line(&out.paint(
                Paint::Yellow,
                "The secret is shown this once: give it to the receiver now.",
            ));
        }
        (None, _) => {}
    }
    Ok(())
}

fn show(answer: &Value, api: &ApiArgs) {
    let out = Console::out();
    if api.json {
        out.line(&answer.to_string());
        return;
    }
    let outcomes: Vec<&str> = answer
        .get("outcomes")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let mut pairs = vec![
        ("url", text(answer, "url")),
        (
            "outcomes",
            if outcomes.is_empty() {
                "all".to_owned()
            } else {
                plain(&outcomes.join(", "))
            },
        ),
        ("state", text(answer, "state")),
        (
            "behind",
            format!("{} s", number(answer, "lag_ms").div_ceil(1_000)),
        ),
        ("dead letters", number(answer, "dead_letters").to_string()),
    ];
    if let Some(until) = answer
        .get("previous_secret_until_ms")
        .and_then(Value::as_u64)
    {
        pairs.push(("old secret until", moment(until)));
    }
    if let Some(failing) = answer.get("failing") {
        pairs.push(("fails since", moment(number(failing, "since_ms"))));
        pairs.push(("tries", number(failing, "tries").to_string()));
        pairs.push(("why", text(failing, "why")));
        if let Some(next) = failing.get("next_try_ms").and_then(Value::as_u64) {
            pairs.push(("next try", moment(next)));
        }
    }
    out.pairs(&pairs);
}

/// All dead letters.
async fn letters(api: &Api) -> Result<Vec<Value>, Failure> {
    let mut all = Vec::new();
    let mut path = "/v1/callbacks/dead-letters".to_owned();
    loop {
        let page = api.ask(Method::GET, &path, None).await?;
        let letters = page.get("dead_letters").and_then(Value::as_array);
        all.extend(letters.into_iter().flatten().cloned());
        match page.get("next").and_then(Value::as_u64) {
            Some(next) => path = format!("/v1/callbacks/dead-letters?after={next}"),
            None => return Ok(all),
        }
    }
}

async fn list(args: &ApiArgs) -> Outcome {
    let out = Console::out();
    let found = letters(&Api::find(args)?).await?;
    if args.json {
        out.line(&json!({ "dead_letters": found }).to_string());
        return Ok(());
    }
    let rows: Vec<Vec<String>> = found
        .iter()
        .map(|letter| {
            vec![
                number(letter, "number").to_string(),
                moment(number(letter, "at_ms")),
                number(letter, "events").to_string(),
                number(letter, "tries").to_string(),
                text(letter, "id"),
                text(letter, "why"),
            ]
        })
        .collect();
    out.table(
        &["NUMBER", "GIVEN UP", "EVENTS", "TRIES", "ID", "WHY"],
        &rows,
    );
    Ok(())
}

async fn resend(api: &Api, number: u64) -> Result<Value, Failure> {
    let path = format!("/v1/callbacks/dead-letters/{number}/resend");
    api.ask(Method::POST, &path, None).await
}

async fn resend_all(args: &ApiArgs) -> Outcome {
    let out = Console::out();
    let api = Api::find(args)?;
    let mut taken = Vec::new();
    for letter in letters(&api).await? {
        let number = number(&letter, "number");
        match resend(&api, number).await {
            Ok(_) => {
                taken.push(number);
                if !args.json {
                    out.line(&format!("{number} was taken"));
                }
            }
            // Somebody else was quicker.
            Err(Failure::Trouble(Trouble {
                api: Some((_, 404)),
                ..
            })) => {}
            Err(failure) => return Err(failure),
        }
    }
    if args.json {
        out.line(&json!({ "taken": taken }).to_string());
    } else if taken.is_empty() {
        out.line("there are no dead letters");
    }
    Ok(())
}
