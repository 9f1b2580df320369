//! Bellwire and its peers, for a moment: everything that was answered must arrive once, by the same generator. Speed is no
//! test's business. `bench/peers/install` brings the peers.

#![allow(
    clippy::unwrap_used,
    reason = "a workload that cannot be run is a failed test"
)]

mod support;

use serde_json::Value;
use support::{good, need_server, run, said, value};

fn peers(arguments: &[&str]) -> Value {
    need_server();
    good(&[&["peers"], arguments].concat())
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
    let missing = [
        "peers",
        "--peer",
        "nats",
        "--nats-server",
        "/nowhere/nats-server",
    ];
    let (output, _) = run(&missing);
    assert!(!output.status.success());
    let said = said(&output);
    assert!(said.contains("/nowhere/nats-server"), "{said}");
}
