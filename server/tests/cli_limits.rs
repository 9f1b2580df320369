//! Every limit that an operator may set is in force and can be seen: the table of docs/operations.md against the real server.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::collections::BTreeSet;

use bellwire_server::telemetry::metrics::METRICS;
use cli_support::Room;
use serde_json::{Value, json};

/// What is set, each to something that is no default, and where the status has to show what of it.
fn settings() -> Vec<(&'static str, &'static str, &'static str, Value)> {
    let quic = json!([30, 100]);
    let websocket = json!([70, 800]);
    vec![
        (
            "limits.content_bytes",
            "2KiB",
            "limits.content_max",
            json!(2_048),
        ),
        (
            "limits.mailbox_notifications",
            "900",
            "limits.mailbox_notifications",
            json!(900),
        ),
        (
            "limits.mailbox_bytes",
            "512KiB",
            "limits.mailbox_bytes",
            json!(512 << 10),
        ),
        (
            "limits.mailbox_full",
            "refuse",
            "limits.mailbox_full",
            json!("refuse"),
        ),
        (
            "limits.ttl_default",
            "3d",
            "limits.ttl_default_s",
            json!(3 * 86_400),
        ),
        (
            "limits.ttl_max",
            "20d",
            "limits.ttl_max_s",
            json!(20 * 86_400),
        ),
        ("limits.in_flight", "16", "limits.in_flight", json!(16)),
        (
            "limits.in_flight_max",
            "128",
            "limits.in_flight_max",
            json!(128),
        ),
        (
            "limits.frame_bytes",
            "32KiB",
            "limits.frame_max",
            json!(32 << 10),
        ),
        (
            "limits.hello_deadline",
            "7s",
            "limits.hello_deadline_s",
            json!(7),
        ),
        (
            "store.lag_bytes",
            "2MiB",
            "limits.lag_bytes_max",
            json!(2 << 20),
        ),
        // Both together.
        ("store.lag_time", "3s", "limits.lag_ms_max", json!(5_000)),
        ("store.rest_time", "2s", "limits.lag_ms_max", json!(5_000)),
        (
            "limits.keep_alive_quic_min",
            "30s",
            "limits.keep_alive_quic_s",
            quic.clone(),
        ),
        (
            "limits.keep_alive_quic_max",
            "100s",
            "limits.keep_alive_quic_s",
            quic,
        ),
        (
            "limits.keep_alive_websocket_min",
            "70s",
            "limits.keep_alive_websocket_s",
            websocket.clone(),
        ),
        (
            "limits.keep_alive_websocket_max",
            "800s",
            "limits.keep_alive_websocket_s",
            websocket,
        ),
        (
            "limits.silence_percent",
            "300",
            "limits.silence_percent",
            json!(300),
        ),
        (
            "limits.wait_default",
            "5s",
            "limits.wait_default_s",
            json!(5),
        ),
        ("limits.wait_max", "50s", "limits.wait_max_s", json!(50)),
        ("drain.window", "1s", "limits.drain_window_s", json!(1)),
        (
            "limits.secret_overlap",
            "12h",
            "limits.secret_overlap_s",
            json!(12 * 3_600),
        ),
        (
            "limits.connections_per_address",
            "99",
            "limits.connections_per_address",
            json!(99),
        ),
        (
            "limits.unauthenticated_connections",
            "999",
            "limits.unauthenticated_connections",
            json!(999),
        ),
        (
            "limits.exempt_networks",
            "10.20.0.0/16",
            "limits.exempt_networks",
            json!(["10.20.0.0/16"]),
        ),
        (
            "limits.api_connections",
            "77",
            "limits.api_connections",
            json!(77),
        ),
        (
            "limits.body_bytes",
            "512KiB",
            "limits.body_max",
            json!(512 << 10),
        ),
        (
            "limits.batch_bytes",
            "4MiB",
            "limits.batch_body_max",
            json!(4 << 20),
        ),
        (
            "limits.batch_lines",
            "500",
            "limits.batch_lines_max",
            json!(500),
        ),
        (
            "limits.pings_per_second",
            "1234",
            "limits.pings_per_second",
            json!(1_234),
        ),
        (
            "limits.ping_burst",
            "4321",
            "limits.ping_burst",
            json!(4_321),
        ),
        (
            "limits.device_pings_per_second",
            "55",
            "limits.device_pings_per_second",
            json!(55),
        ),
        (
            "limits.device_ping_burst",
            "66",
            "limits.device_ping_burst",
            json!(66),
        ),
        (
            "quota.notifications",
            "6000",
            "apps.0.notifications_max",
            json!(6_000),
        ),
        ("quota.bytes", "7MiB", "apps.0.bytes_max", json!(7 << 20)),
        ("quota.devices", "80", "apps.0.devices_max", json!(80)),
        (
            "quota.pings_per_day",
            "5000",
            "apps.0.pings_per_day",
            json!(5_000),
        ),
        (
            "store.reserve_bytes",
            "2MiB",
            "limits.disk_reserve",
            json!(2 << 20),
        ),
        (
            "limits.memory_bytes",
            "128MiB",
            "limits.memory_reserve",
            json!(128 << 20),
        ),
    ]
}

/// What the cells of one column of the table have between backticks.
fn column(index: usize) -> BTreeSet<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/operations.md");
    let page = std::fs::read_to_string(path).unwrap();
    let (_, rest) = page.split_once("<!-- limits -->\n").unwrap();
    let (table, _) = rest.split_once("<!-- /limits -->").unwrap();
    let cells = table.lines().skip(2).map(|row| {
        let cell = row.split('|').nth(index + 1);
        cell.unwrap_or_else(|| panic!("a cell is missing: {row}"))
    });
    let quoted = cells.flat_map(|cell| cell.split('`').skip(1).step_by(2));
    quoted.map(str::to_owned).collect()
}

fn find<'a>(status: &'a Value, place: &str) -> Option<&'a Value> {
    status.pointer(&format!("/{}", place.replace('.', "/")))
}

#[test]
fn every_limit_of_the_page_is_set_and_seen_and_counted() {
    let all = settings();
    let names = |pick: fn(&(&str, &str, &str, Value)) -> String| -> BTreeSet<String> {
        all.iter().map(pick).collect()
    };
    assert_eq!(column(1), names(|row| row.0.to_owned()), "settings");
    assert_eq!(column(2), names(|row| row.2.to_owned()), "places");

    let room = Room::new();
    let mut command = room.command(&["serve"]);
    for (setting, value, ..) in &all {
        let variable = setting.to_uppercase().replace('.', "__");
        command.env(format!("BELLWIRE__{variable}"), value);
    }
    let server = room.serve_by(command);
    let status = room.ask(&["status"]);
    for (setting, value, place, shown) in &all {
        assert_eq!(
            find(&status, place),
            Some(shown),
            "{setting} = {value} must be seen as {place}"
        );
    }

    // How much is used is a place of the status, a metric, or said of another call; what counts is a metric.
    let known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
    for used in column(3) {
        let metric = used.starts_with("bellwire_");
        let elsewhere = ["waiting", "GET /v1/devices/{id}", "RateLimit"].contains(&used.as_str());
        let found = match metric {
            true => known(&used),
            false => elsewhere || find(&status, &used).is_some(),
        };
        assert!(found, "{used} is nowhere");
    }
    for counted in column(4) {
        let name = counted.split('{').next().unwrap();
        if name.starts_with("bellwire_") {
            assert!(known(name), "{counted} is no metric");
        }
    }
    server.stop();
}
