//! What can go wrong in a command, and what the exit code says about it.

use std::fmt::Write as _;

use bellwire_server::config::Problems;
use miette::{GraphicalReportHandler, GraphicalTheme};
use serde_json::json;

use super::console::{Console, Paint, plain};

/// Everything went well.
pub(crate) const EXIT_OK: u8 = 0;
/// Something went wrong.
pub(crate) const EXIT_TROUBLE: u8 = 1;
/// The command line cannot be understood.
pub(crate) const EXIT_USAGE: u8 = 2;
/// The settings are wrong (`EX_CONFIG` of sysexits.h): restarting does not help.
pub(crate) const EXIT_CONFIG: u8 = 78;

/// Columns of a message about the settings file.
const REPORT_WIDTH: usize = 100;

/// Why a command did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The settings are wrong.
    Config(Problems),
    /// Anything else.
    Trouble(Trouble),
}

/// What went wrong, and what to do.
#[derive(Debug)]
pub(crate) struct Trouble {
    /// In one sentence.
    pub(crate) what: String,
    /// More about it.
    pub(crate) detail: Option<String>,
    /// What to do.
    pub(crate) help: Option<String>,
    /// The API's stable code and the HTTP status, if it came from there.
    pub(crate) api: Option<(String, u16)>,
    /// The exit code.
    pub(crate) exit: u8,
}

impl Failure {
    /// Trouble with advice.
    pub(crate) fn new(what: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure::Trouble(Trouble {
            what: what.into(),
            detail: None,
            help: Some(help.into()),
            api: None,
            exit: EXIT_TROUBLE,
        })
    }

    /// An argument that cannot be.
    pub(crate) fn usage(what: impl Into<String>, help: impl Into<String>) -> Failure {
        Failure::Trouble(Trouble {
            what: what.into(),
            detail: None,
            help: Some(help.into()),
            api: None,
            exit: EXIT_USAGE,
        })
    }

    /// What is wrong, without the advice: for the log.
    pub(crate) fn what(&self) -> String {
        match self {
            Failure::Config(problems) => problems.to_string(),
            Failure::Trouble(trouble) => match &trouble.detail {
                Some(detail) => format!("{}: {detail}", trouble.what),
                None => trouble.what.clone(),
            },
        }
    }

    /// What to do about it, where that is one thing.
    pub(crate) fn help(&self) -> Option<&str> {
        match self {
            Failure::Config(_) => None,
            Failure::Trouble(trouble) => trouble.help.as_deref(),
        }
    }

    /// The exit code that belongs to it.
    pub(crate) fn exit(&self) -> u8 {
        match self {
            Failure::Config(_) => EXIT_CONFIG,
            Failure::Trouble(trouble) => trouble.exit,
        }
    }

    /// Says it on standard error: for people, or as one JSON object.
    pub(crate) fn report(&self, console: Console, as_json: bool) {
        console.line(&if as_json {
            self.as_json()
        } else {
            self.as_text(console)
        });
    }

    fn as_json(&self) -> String {
        let object = match self {
            Failure::Config(problems) => json!({
                "error": "the settings are wrong",
                "code": "config",
                "problems": problems.iter().map(|problem| {
                    let place = problem.position();
                    json!({
                        "what": problem.what(),
                        "help": problem.advice(),
                        "file": place.map(|(file, _, _)| file.display().to_string()),
                        "line": place.map(|(_, line, _)| line),
                        "column": place.map(|(_, _, column)| column),
                    })
                }).collect::<Vec<_>>(),
            }),
            Failure::Trouble(trouble) => json!({
                "error": trouble.what,
                "detail": trouble.detail,
                "help": trouble.help,
                "code": trouble.api.as_ref().map(|(code, _)| code),
                "status": trouble.api.as_ref().map(|(_, status)| status),
            }),
        };
        object.to_string()
    }

    fn as_text(&self, console: Console) -> String {
        match self {
            Failure::Config(problems) => config_text(problems, console),
            Failure::Trouble(trouble) => {
                let mut text = format!(
                    "{} {}",
                    console.paint(Paint::Red, "error:"),
                    plain(&trouble.what)
                );
                // Writing to a string cannot fail.
                if let Some(detail) = &trouble.detail {
                    let _ = write!(text, "\n  {}", plain(detail));
                }
                if let Some((code, status)) = &trouble.api {
                    let _ = write!(
                        text,
                        "\n  {}",
                        console.paint(Paint::Dim, &format!("({} {status})", plain(code)))
                    );
                }
                if let Some(help) = &trouble.help {
                    let _ = write!(text, "\n  {} {help}", console.paint(Paint::Cyan, "help:"));
                }
                text
            }
        }
    }
}

fn config_text(problems: &Problems, console: Console) -> String {
    let theme = if console.colour() {
        GraphicalTheme::unicode()
    } else {
        GraphicalTheme::none()
    };
    let handler = GraphicalReportHandler::new_themed(theme)
        .with_width(REPORT_WIDTH)
        .with_links(false);
    let mut text = String::new();
    for problem in problems.iter() {
        // Neither the handler nor a string fails here; if it did, the sentence alone would have to do.
        if handler.render_report(&mut text, problem).is_err() {
            let _ = writeln!(text, "{problem}");
        }
        text.push('\n');
    }
    let count = problems.iter().count();
    let _ = write!(
        text,
        "{} the settings are wrong in {count} place{}; nothing was done",
        console.paint(Paint::Red, "error:"),
        if count == 1 { "" } else { "s" },
    );
    text
}

impl From<Problems> for Failure {
    fn from(problems: Problems) -> Failure {
        Failure::Config(problems)
    }
}

/// The result of a command.
pub(crate) type Outcome = Result<(), Failure>;
