//! `bellwire store convert` with the real binary on real files: there and back, refused beside a server, and killed while it
//! works.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, mpsc};

use bellwire_server::delivery::{AppId, DeviceId};
use bellwire_server::ports::{DeviceRecord, Op};
use bellwire_server::store::testing::{ManualClock, SeededEntropy};
use bellwire_server::store::{EngineKind, StoreSettings, open};
use cli_support::Room;
use serde_json::Value;

/// Enough for the steps of a conversion to take longer than a kill.
const DEVICES: u64 = 3_000;

fn serve(room: &Room, engine: &str) -> cli_support::Server {
    let mut command = room.command(&["serve"]);
    command.env("BELLWIRE__STORE__ENGINE", engine);
    room.serve_by(command)
}

/// The directories of engines that a start looks at or would remove.
fn engines(room: &Room) -> Vec<String> {
    let seen = room.ask(&["store", "inspect"]);
    let engines = seen["engines"].as_array().unwrap().iter();
    engines
        .filter(|engine| engine["aside"] == false)
        .map(|engine| engine["dir"].as_str().unwrap().to_owned())
        .collect()
}

/// Everything is checked, and of each kind of record there are so many.
fn records(room: &Room) -> Value {
    let found = room.ask(&["store", "verify"]);
    assert_eq!(found["sound"], true, "{found}");
    found["state"]["records"].clone()
}

fn fill(dir: &Path, engine: EngineKind) {
    let settings = StoreSettings {
        engine,
        segment_bytes: 1 << 20,
        reserve_bytes: 0,
        ..StoreSettings::new(dir)
    };
    let opened = open(
        &settings,
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    let numbers: Vec<u64> = (0..DEVICES).collect();
    for some in numbers.chunks(500) {
        let batch = some
            .iter()
            .map(|&number| {
                let mut id = [7; 16];
                id[..8].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
                Op::PutDevice {
                    record: DeviceRecord {
                        id: DeviceId(id),
                        app: AppId::DEFAULT,
                        user: format!("user-{number}"),
                        name: Some("x".repeat(60)),
                        created_ms: 1,
                        secret_hash: [0; 32],
                        previous_secrets: Vec::new(),
                    },
                    fresh: true,
                    previous_user: None,
                }
            })
            .collect();
        let (sender, receiver) = mpsc::channel();
        opened.store.commit(
            batch,
            Box::new(move |verdict| sender.send(verdict).unwrap()),
        );
        receiver.recv().unwrap().unwrap();
    }
    opened.store.close();
}

#[test]
fn a_store_is_converted_there_and_back_and_a_server_finds_everything() {
    let room = Room::new();
    let server = serve(&room, "sled");
    room.run(&["device", "add", "--user", "ada"]).good();
    for body in ["one", "two", "three"] {
        room.run(&["ping", "--user", "ada", "--body", body]).good();
    }
    let refused = room.run(&["store", "convert", "--to", "fjall"]);
    assert_eq!(refused.code, 1);
    let holder = format!("in use by process {}", server.pid());
    assert!(refused.err.contains(&holder), "{}", refused.err);
    assert!(refused.err.contains("stop that server"), "{}", refused.err);
    server.stop();

    let before = records(&room);
    let plan = room.ask(&["store", "convert", "--to", "fjall", "--dry-run"]);
    assert_eq!(
        (&plan["converted"], &plan["from"], &plan["to"]),
        (&false.into(), &"sled".into(), &"fjall".into())
    );
    assert!(plan["room_needed_max"].as_u64() > plan["live_bytes_max"].as_u64());
    assert_eq!(engines(&room), ["sled"], "nothing was changed");

    for (from, to, counts) in [("sled", "fjall", "fjall.2"), ("fjall", "sled", "sled.3")] {
        let done = room.ask(&["store", "convert", "--to", to]);
        assert_eq!(
            (&done["converted"], &done["from"], &done["to"]),
            (&true.into(), &from.into(), &to.into())
        );
        let kept = done["kept"].as_str().unwrap();
        assert!(room.data().join(kept).is_dir(), "the old one is kept");
        assert_eq!(engines(&room), [counts]);
        assert_eq!(records(&room), before);
        let again = room.run(&["store", "convert", "--to", to]);
        assert_eq!(again.code, 1);
        assert!(again.err.contains("nothing to convert"), "{}", again.err);

        let server = serve(&room, to);
        assert!(!server.log().contains("made anew"), "{}", server.log());
        let status = room.ask(&["status"]);
        assert_eq!(status["store"]["engine"], to, "{status}");
        let devices = room.ask(&["device", "list"]);
        assert!(devices.to_string().contains("ada"), "{devices}");
        server.stop();
        assert_eq!(engines(&room), [counts]);
        assert_eq!(records(&room)["r"], before["r"], "three that wait");
    }
    assert_eq!(before["r"], 3, "{before}");
}

#[test]
fn a_conversion_that_is_killed_leaves_a_store_that_starts_and_can_be_converted() {
    let room = Room::new();
    // Keys and certificates.
    serve(&room, "sled").stop();
    fill(&room.data(), EngineKind::Sled);
    let mut broken_off = 0;
    let (mut counts, mut other) = ("sled", "fjall");
    for word in [
        "up to date",
        "counting",
        "copying",
        "comparing",
        "the new engine counts",
    ] {
        let mut child = room
            .command(&["store", "convert", "--to", other])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let seen = lines.map(Result::unwrap).find(|line| line.contains(word));
        assert!(seen.is_some(), "{word} is told");
        // It may be quicker.
        child.kill().unwrap();
        broken_off += u32::from(!child.wait().unwrap().success());

        let seen = room.ask(&["store", "inspect", "--open-engine"]);
        assert_eq!(seen["start"]["plan"]["from"], "engine", "{word}: {seen}");
        if word == "the new engine counts" {
            (counts, other) = (other, counts);
        }
        let server = serve(&room, counts);
        assert!(
            !server.log().contains("made anew"),
            "{word}: {}",
            server.log()
        );
        room.run(&["status"]).good();
        server.stop();
        let left = engines(&room);
        assert_eq!(left.len(), 1, "{word}: {left:?}");
        assert!(left[0].starts_with(counts), "{word}: {left:?}");
    }
    assert!(broken_off >= 3, "{broken_off} of 5 were broken off");
    let done = room.ask(&["store", "convert", "--to", other]);
    assert_eq!(done["from"], counts);
    // Whatever one of them had lost would be missing.
    assert_eq!(records(&room)["d"], DEVICES);
}

#[test]
fn what_is_no_store_is_not_made_one() {
    let room = Room::new();
    let said = room.run(&["store", "convert", "--to", "fjall", "--data-dir", "nowhere"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("--data-dir"), "{}", said.err);
    assert!(!room.path().join("nowhere").exists());
    let said = room.run(&["store", "convert", "--to", "memory"]);
    assert_eq!(said.code, 2, "{}", said.err);
}
