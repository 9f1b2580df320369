//! Runs the program as a person would, in its smallest form, and reads its report.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// Where the program is.
pub(crate) const BENCH: &str = env!("CARGO_BIN_EXE_bellwire-bench");

/// Runs it; the report is `Null` when there is none.
pub(crate) fn run(arguments: &[&str]) -> (Output, Value) {
    let output = Command::new(BENCH)
        .args(arguments)
        .args(["--smoke", "--json", "--quiet"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output, report)
}

/// The report of a run in which nothing was amiss.
#[track_caller]
pub(crate) fn good(arguments: &[&str]) -> Value {
    let (output, report) = run(arguments);
    let said = said(&output);
    assert!(output.status.success(), "{}: {said}", output.status);
    assert_eq!(report["violations"], serde_json::json!([]), "{said}");
    report
}

/// What it said to a person.
pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A figure of a report.
#[track_caller]
pub(crate) fn value(report: &Value, figure: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    let found = figures.iter().find(|found| found["name"] == figure);
    found.unwrap_or_else(|| panic!("no figure {figure} in {report}"))["value"]
        .as_f64()
        .unwrap()
}

/// Says what to do when the server was not built, instead of what follows from it.
#[allow(dead_code, reason = "the floors need no server")]
#[track_caller]
pub(crate) fn need_server() {
    assert!(
        Path::new(BENCH).with_file_name("bellwire").is_file(),
        "the server binary is missing beside {BENCH}: run `cargo build --workspace` first"
    );
}
