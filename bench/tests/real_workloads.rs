//! The workloads in their smallest form, against the real server: everything must arrive and every device must stay. Speed
//! is no test's business.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

fn run(arguments: &[&str]) -> (Output, Value) {
    let bench = Path::new(env!("CARGO_BIN_EXE_bellwire-bench"));
    assert!(
        bench.with_file_name("bellwire").is_file(),
        "the server binary is missing beside {}: run `cargo build --workspace` first",
        bench.display()
    );
    let output = Command::new(bench)
        .args(arguments)
        .args(["--smoke", "--json", "--quiet"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output, report)
}

fn value(report: &Value, figure: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    let found = figures.iter().find(|found| found["name"] == figure);
    found.unwrap_or_else(|| panic!("no figure {figure} in {report}"))["value"]
        .as_f64()
        .unwrap()
}

#[track_caller]
fn assert_good(output: &Output, report: &Value) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    assert_eq!(report["violations"], serde_json::json!([]), "{said}");
}

#[test]
fn every_ping_to_an_attached_device_arrives_once() {
    let (output, report) = run(&["ping"]);
    assert_good(&output, &report);
    assert!(value(&report, "pings in all, warm-up included") > 300.0);
}

#[test]
fn every_ping_to_an_absent_device_waits_for_it() {
    let (output, report) = run(&["stored", "--engines", "sled,fjall,memory"]);
    assert_good(&output, &report);
    assert!(value(&report, "fjall, batch: sustained") > 0.0);
}

#[test]
fn a_ping_to_many_reaches_each_once() {
    let (output, report) = run(&["fanout"]);
    assert_good(&output, &report);
    // Four pings each to a topic and to everyone, thirty devices.
    for carrier in ["websocket", "quic"] {
        let deliveries = format!("{carrier}: deliveries in all");
        assert_eq!(value(&report, &deliveries), 240.0);
    }
}

#[test]
fn mailboxes_are_emptied() {
    let (output, report) = run(&["drain"]);
    assert_good(&output, &report);
}

#[test]
fn idle_devices_stay_beside_the_floor() {
    let (output, report) = run(&["idle"]);
    assert_good(&output, &report);
    for carrier in ["plain", "websocket", "quic"] {
        assert_eq!(value(&report, &format!("{carrier}: devices")), 20.0);
    }
}

#[test]
fn devices_come_back_after_a_restart() {
    let (output, report) = run(&["connect"]);
    assert_good(&output, &report);
    for carrier in ["websocket", "quic"] {
        let resumed = |kind: &str| value(&report, &format!("{carrier}, {kind}: of these resumed"));
        assert_eq!(resumed("full"), 0.0);
        // The first connection of each of four at a time has nothing to resume.
        assert_eq!(resumed("resumed"), 80.0, "{report}");
    }
}

#[test]
fn what_grows_is_all_there() {
    let (output, report) = run(&["grow"]);
    assert_good(&output, &report);
}

#[test]
fn mixed_load_loses_nothing() {
    let (output, report) = run(&["soak"]);
    assert_good(&output, &report);
}

#[test]
fn a_report_of_several_runs_is_written_down() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let (output, report) = run(&["ping", "--only", "rates", "--runs", "2", "--out", out]);
    assert_good(&output, &report);
    assert_eq!(report["runs"], 2);
    assert_eq!(report["figures"][0]["runs"].as_array().unwrap().len(), 2);
    let markdown = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
    assert!(markdown.contains("2 runs"), "{markdown}");
    let drawn = std::fs::read_dir(folder.path()).unwrap();
    let drawn = drawn.filter(|file| {
        let path = file.as_ref().unwrap().path();
        path.extension().is_some_and(|extension| extension == "svg")
    });
    assert!(drawn.count() >= 3);
}

#[test]
fn a_server_that_is_not_there_is_said_so() {
    let (output, _) = run(&["ping", "--server", "/nowhere/bellwire"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nowhere/bellwire"), "{said}");
    assert!(said.contains("cargo build"), "{said}");
}
