//! The workloads in their smallest form, against the real server: everything must arrive and every device must stay. Speed
//! is no test's business.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

mod support;

use serde_json::Value;
use support::{run, said, value};

fn good(arguments: &[&str]) -> Value {
    support::need_server();
    support::good(arguments)
}

#[test]
fn every_ping_to_an_attached_device_arrives_once() {
    let report = good(&["ping"]);
    assert!(value(&report, "pings in all, warm-up included") > 300.0);
}

#[test]
fn every_ping_to_an_absent_device_waits_for_it() {
    let report = good(&["stored", "--engines", "sled,fjall,memory"]);
    assert!(value(&report, "fjall, batch: sustained") > 0.0);
}

#[test]
fn a_ping_to_many_reaches_each_once() {
    let report = good(&["fanout"]);
    // Four pings each to a topic and to everyone, thirty devices.
    for carrier in ["websocket", "quic"] {
        let deliveries = format!("{carrier}: deliveries in all");
        assert_eq!(value(&report, &deliveries), 240.0);
    }
}

#[test]
fn mailboxes_are_emptied() {
    good(&["drain"]);
}

#[test]
fn idle_devices_stay_beside_the_floor() {
    let report = good(&["idle"]);
    for carrier in ["plain", "websocket", "quic"] {
        assert_eq!(value(&report, &format!("{carrier}: devices")), 20.0);
    }
}

#[test]
fn devices_come_back_after_a_restart() {
    let report = good(&["connect"]);
    for carrier in ["websocket", "quic"] {
        let resumed = |kind: &str| value(&report, &format!("{carrier}, {kind}: of these resumed"));
        assert_eq!(resumed("full"), 0.0);
        // The first connection of each of four at a time has nothing to resume.
        assert_eq!(resumed("resumed"), 80.0, "{report}");
    }
}

#[test]
fn what_grows_is_all_there() {
    good(&["grow"]);
}

#[test]
fn mixed_load_loses_nothing() {
    good(&["soak"]);
}

#[test]
fn a_report_of_several_runs_is_written_down() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().to_str().unwrap();
    let report = good(&["ping", "--only", "rates", "--runs", "2", "--out", out]);
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
    let said = said(&output);
    assert!(said.contains("/nowhere/bellwire"), "{said}");
    assert!(said.contains("cargo build"), "{said}");
}
