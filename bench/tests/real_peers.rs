//! Bellwire and its peers, for a moment: everything that was answered must arrive once, by the same generator. Speed is no
//! test's business. `bench/peers/install` brings the peers.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

fn peers(arguments: &[&str]) -> Value {
    let bench = Path::new(env!("CARGO_BIN_EXE_bellwire-bench"));
    assert!(
        bench.with_file_name("bellwire").is_file(),
        "the server binary is missing beside {}: run `cargo build --workspace` first",
        bench.display()
    );
    let output = Command::new(bench)
        .args(["peers", "--smoke", "--json", "--quiet"])
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", output.status);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["violations"], serde_json::json!([]), "{said}");
    report
}

fn value(report: &Value, figure: &str) -> f64 {
    let figures = report["figures"].as_array().unwrap();
    let found = figures.iter().find(|found| found["name"] == figure);
    found.unwrap_or_else(|| panic!("no figure {figure} in {report}"))["value"]
        .as_f64()
        .unwrap()
}

const PEERS: [&str; 3] = ["bellwire", "mosquitto", "nats"];

#[test]
fn devices_of_every_peer_connect_and_stay() {
    let report = peers(&["--part", "idle"]);
    for peer in PEERS {
        assert_eq!(value(&report, &format!("idle, {peer}: connected")), 20.0);
    }
}

#[test]
fn messages_to_attached_devices_of_every_peer_arrive_once() {
    let report = peers(&[
        "--part", "clock", "--part", "attached", "--part", "together",
    ]);
    for peer in PEERS {
        for part in ["500 a second", "attached", "together"] {
            let all = format!("{part}, {peer}: messages in all");
            assert_eq!(value(&report, &all), 320.0);
        }
    }
}

#[test]
fn messages_wait_for_absent_devices_of_every_peer() {
    let report = peers(&["--part", "stored", "--part", "stored-together"]);
    for peer in PEERS {
        for part in ["stored", "stored together"] {
            let all = format!("{part}, {peer}: messages in all");
            assert_eq!(value(&report, &all), 640.0);
        }
    }
}

#[test]
fn a_peer_that_is_not_there_is_said_so() {
    let output = Command::new(env!("CARGO_BIN_EXE_bellwire-bench"))
        .args(["peers", "--smoke", "--quiet", "--peer", "nats"])
        .args(["--nats-server", "/nowhere/nats-server"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("/nowhere/nats-server"), "{said}");
}
