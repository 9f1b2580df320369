//! The floors, for a moment: what was written must be there, and what was connected must stand. Speed is no test's business.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

use std::process::{Command, Stdio};

use serde_json::Value;

fn floors(part: &str) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_bellwire-bench"))
        .args(["floor", "--part", part, "--smoke", "--json", "--quiet"])
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

#[test]
fn bare_connections_stand() {
    let report = floors("idle");
    assert_eq!(value(&report, "websocket: connected"), 20.0);
    assert_eq!(value(&report, "quic: connected"), 20.0);
}

#[test]
fn committed_records_are_found_again() {
    let report = floors("commit");
    for ground in ["log", "fjall", "fjall, unsynced", "sled", "sled, unsynced"] {
        let found = format!("commit {ground}, 300 together: found again");
        assert!(value(&report, &found) >= 300.0, "{ground}");
    }
}

#[test]
fn written_messages_arrive() {
    let report = floors("write");
    for over in ["tcp", "tls", "websocket", "quic"] {
        for manner in ["one each", "32 in one write"] {
            let arrived = format!("write {over}, 128 bytes, {manner}: arrived");
            assert!(value(&report, &arrived) > 0.0, "{over}, {manner}");
        }
    }
    for over in ["tcp", "tls", "quic"] {
        let trips = format!("write {over}, 128 bytes, there and back: trips");
        assert!(value(&report, &trips) > 0.0, "{over}");
    }
}
