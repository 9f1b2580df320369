//! What `bellwire check` and `bellwire doctor` find: look by look, in words or in JSON, and whether all is well.

use serde_json::json;

use super::console::Paint;
use super::{Console, Failure, Outcome};

/// How one look turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
    Good,
    Warned,
    Failed,
}

impl Mark {
    fn word(self) -> &'static str {
        match self {
            Mark::Good => "ok",
            Mark::Warned => "warned",
            Mark::Failed => "failed",
        }
    }

    fn paint(self) -> Paint {
        match self {
            Mark::Good => Paint::Green,
            Mark::Warned => Paint::Yellow,
            Mark::Failed => Paint::Red,
        }
    }
}

/// One look: what was found, and what to do where that is not said with it.
#[derive(Debug)]
pub(super) struct Finding {
    pub(super) mark: Mark,
    pub(super) about: &'static str,
    pub(super) found: String,
    pub(super) advice: Option<String>,
}

impl Finding {
    /// One whose text says what to do, if there is anything to do.
    pub(super) fn new(mark: Mark, about: &'static str, found: impl Into<String>) -> Finding {
        Finding {
            mark,
            about,
            found: found.into(),
            advice: None,
        }
    }
}

pub(super) fn good(about: &'static str, found: impl Into<String>) -> Finding {
    Finding::new(Mark::Good, about, found)
}

pub(super) fn warned(
    about: &'static str,
    found: impl Into<String>,
    advice: impl Into<String>,
) -> Finding {
    Finding {
        advice: Some(advice.into()),
        ..Finding::new(Mark::Warned, about, found)
    }
}

pub(super) fn failed(
    about: &'static str,
    found: impl Into<String>,
    advice: impl Into<String>,
) -> Finding {
    Finding {
        mark: Mark::Failed,
        ..warned(about, found, advice)
    }
}

/// Tells all of them. It is a failure if one of them is: `what` says so, of how many that failed and how many there are.
pub(super) fn report(
    findings: &[Finding],
    as_json: bool,
    what: impl FnOnce(usize, usize) -> String,
) -> Outcome {
    let failed = findings
        .iter()
        .filter(|finding| finding.mark == Mark::Failed)
        .count();
    tell(findings, as_json, failed == 0);
    if failed > 0 {
        return Err(Failure::new(
            what(failed, findings.len()),
            "each line above that says `failed` tells what to do",
        ));
    }
    Ok(())
}

fn tell(findings: &[Finding], as_json: bool, fine: bool) {
    let out = Console::out();
    if as_json {
        let list: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({
                    "mark": finding.mark.word(),
                    "about": finding.about,
                    "found": finding.found,
                    "advice": finding.advice,
                })
            })
            .collect();
        out.line(&json!({ "ok": fine, "findings": list }).to_string());
        return;
    }
    for finding in findings {
        let word = out.paint(finding.mark.paint(), &format!("{:<6}", finding.mark.word()));
        out.line(&format!("{word}  {}: {}", finding.about, finding.found));
        if let Some(advice) = &finding.advice {
            out.line(&format!("        -> {advice}"));
        }
    }
}
