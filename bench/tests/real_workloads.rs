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
    let (output, report) = run(&["deliver"]);
    assert_good(&output, &report);
    assert_eq!(value(&report, "pings in all, warm-up included"), 400.0);
}

#[test]
fn every_ping_by_the_clock_arrives_once() {
    let (output, report) = run(&["deliver", "--rate", "500", "--carrier", "websocket"]);
    assert_good(&output, &report);
    assert_eq!(value(&report, "pings in all, warm-up included"), 400.0);
}

#[test]
fn every_ping_of_a_batch_arrives_once() {
    let (output, report) = run(&["deliver", "--batch", "70"]);
    assert_good(&output, &report);
    assert_eq!(value(&report, "pings in all, warm-up included"), 400.0);
    let (output, report) = run(&["deliver", "--batch", "70", "--absent"]);
    assert_good(&output, &report);
}

#[test]
fn every_ping_to_an_absent_device_waits_for_it() {
    let (output, report) = run(&["deliver", "--absent"]);
    assert_good(&output, &report);
    assert!(value(&report, "fetched after attaching, connecting included") > 0.0);
}

#[test]
fn idle_devices_stay_beside_the_floor() {
    let (output, report) = run(&["idle"]);
    assert_good(&output, &report);
    assert_eq!(value(&report, "websocket: devices"), 20.0);
    assert_eq!(value(&report, "quic: devices"), 20.0);
}

#[test]
fn a_server_that_is_not_there_is_said_so() {
    let (output, _) = run(&["deliver", "--server", "/nowhere/bellwire"]);
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nowhere/bellwire"), "{said}");
    assert!(said.contains("cargo build"), "{said}");
}
