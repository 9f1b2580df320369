//! The floors, for a moment: what was written must be there, and what was connected must stand. Speed is no test's business.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

mod support;

use serde_json::Value;
use support::{good, value};

fn floors(part: &str) -> Value {
    good(&["floor", "--part", part])
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
