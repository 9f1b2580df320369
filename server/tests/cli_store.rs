//! The data directory with the real binary: whose it is, who may look into it, one process at a time, and what the commands of
//! `bellwire store` say about it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cli_support::{Room, mode, until};
use rustix::process::Signal;
use serde_json::Value;

/// Everything below a directory, and the directory.
fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut seen = vec![dir.to_owned()];
    let mut at = 0;
    while at < seen.len() {
        let path = seen[at].clone();
        at += 1;
        if path.is_dir() {
            seen.extend(
                fs::read_dir(path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
    }
    seen
}

/// A command of this room under the mask that hides nothing.
fn without_mask(room: &Room, arguments: &[&str]) -> Command {
    let inner = room.command(arguments);
    let mut command = Command::new("sh");
    command
        .args(["-c", "umask 000; exec \"$0\" \"$@\""])
        .arg(inner.get_program())
        .args(inner.get_args())
        .current_dir(room.path())
        .stdin(std::process::Stdio::null());
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command
}

#[test]
fn every_file_is_for_its_owner_alone_whatever_the_mask() {
    for engine in ["sled", "fjall"] {
        let room = Room::new();
        let mut command = without_mask(&room, &["serve"]);
        command.env("BELLWIRE__STORE__ENGINE", engine);
        let server = room.serve_by(command);
        room.run(&["device", "add", "--user", "ada"]).good();
        room.run(&["ping", "--user", "ada", "--body", "hello"])
            .good();
        let seen = walk(&room.data());
        assert!(seen.iter().any(|path| path.ends_with(engine)));
        for path in &seen {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(path), expected, "{}", path.display());
        }
        server.stop();
        for path in walk(&room.data()) {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(&path), expected, "{} after the end", path.display());
        }
    }
}

#[test]
fn a_second_server_is_told_who_has_the_directory() {
    let room = Room::new();
    let server = room.serve();
    let said = room.run(&["serve"]);
    assert_eq!(said.code, 1);
    let holder = format!("process id {}", server.pid());
    assert!(said.err.contains(&holder), "{}", said.err);
    assert!(said.err.contains("stop that one first"), "{}", said.err);
    // And the first one goes on.
    room.run(&["device", "add", "--user", "ada"]).good();
    server.stop();
}

#[test]
fn a_lock_that_a_killed_server_left_is_no_lock() {
    let room = Room::new();
    let mut server = room.serve();
    let dead = server.pid();
    server.signal(Signal::KILL);
    server.end();
    let left = fs::read_to_string(room.data().join("lock")).unwrap();
    assert_eq!(left.trim(), dead.to_string());
    // The number may belong to somebody else by now: here to this test, which lives.
    for lock in ["lock", "server.lock"] {
        fs::write(room.data().join(lock), format!("{}\n", std::process::id())).unwrap();
    }
    let said = room.run(&["store", "inspect"]).good();
    assert!(said.out.contains("in use     no"), "{}", said.out);
    let server = room.serve();
    let now = fs::read_to_string(room.data().join("lock")).unwrap();
    assert_eq!(now.trim(), server.pid().to_string());
    server.stop();
}

#[test]
fn a_link_to_the_data_directory_is_followed_and_shown_resolved() {
    let room = Room::new();
    let real = room.path().join("volume");
    fs::create_dir(&real).unwrap();
    std::os::unix::fs::symlink(&real, room.data()).unwrap();
    let server = room.serve();
    until("it says where the data is", || {
        server.out().contains("/volume").then_some(())
    });
    assert!(real.join("log").is_dir());
    let said = room.run(&["store", "inspect"]).good();
    assert!(said.out.contains("/volume"), "{}", said.out);
    // Two ways to one directory are one directory.
    let mut again = room.command(&["serve"]);
    again.env("BELLWIRE__DATA_DIR", &real);
    let output = again.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    server.stop();
}

#[test]
fn a_directory_of_another_user_is_refused_with_what_to_do() {
    let room = Room::new();
    fs::create_dir(room.data()).unwrap();
    if std::os::unix::fs::chown(room.data(), Some(54_321), None).is_err() {
        // Only root can give a directory away; for anybody else the root directory is somebody else's.
        let mut command = room.command(&["serve"]);
        let output = command.env("BELLWIRE__DATA_DIR", "/").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        return;
    }
    let said = room.run(&["serve"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("belongs to user 54321"), "{}", said.err);
    assert!(said.err.contains("chown"), "{}", said.err);
    let found = fs::metadata(room.data()).unwrap();
    assert_eq!(
        (found.uid(), fs::read_dir(room.data()).unwrap().count()),
        (54_321, 0),
        "nothing was done there"
    );
    let check = room.run(&["check"]);
    assert_eq!(check.code, 1);
    assert!(check.out.contains("belongs to user 54321"), "{}", check.out);
}

#[test]
fn a_check_says_what_the_directory_lies_on() {
    let room = Room::new();
    let said = room.run(&["check", "--json"]).good().json();
    let findings = said["findings"].as_array().unwrap();
    assert!(
        findings
            .iter()
            .any(|finding| finding["about"] == "file system"),
        "{said}"
    );
}

#[test]
fn an_inspection_beside_a_server_says_so_and_disturbs_nobody() {
    let room = Room::new();
    let server = room.serve();
    room.run(&["device", "add", "--user", "ada"]).good();
    let seen = room.ask(&["store", "inspect", "--open-engine"]);
    assert_eq!(seen["holder"]["state"], "server");
    assert_eq!(seen["holder"]["pid"], server.pid());
    assert_eq!(seen["engines"][0]["state"]["state"], "not_opened");
    room.run(&["ping", "--user", "ada", "--body", "hello"])
        .good();
    server.stop();
    let seen = room.ask(&["store", "inspect", "--open-engine"]);
    assert_eq!(seen["holder"]["state"], "nobody");
    assert_eq!(seen["start"]["plan"]["from"], "engine");
    assert_eq!(seen["findings"], serde_json::json!([]));
    let modes: Vec<u32> = walk(&room.data())
        .iter()
        .map(|path| fs::metadata(path).unwrap().permissions().mode() & 0o077)
        .collect();
    assert!(modes.iter().all(|mode| *mode == 0));
}

// ---- Verify, salvage, and who may be in the way ----------------------------------------------------------------------

/// A directory with a device, waiting pings and a few segments' worth of nothing; the server is gone.
fn lived() -> Room {
    let room = Room::new();
    let server = room.serve();
    room.run(&["device", "add", "--user", "ada"]).good();
    for n in 0..PINGS {
        let body = format!("ping {n}");
        room.run(&["ping", "--user", "ada", "--body", &body]).good();
    }
    server.stop();
    room
}

const PINGS: u64 = 5;

/// What is in every file.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    walk(dir)
        .into_iter()
        .filter(|path| path.is_file())
        .map(|path| {
            let bytes = fs::read(&path).unwrap();
            (path, bytes)
        })
        .collect()
}

/// Breaks a promised frame in the middle of the log, and takes the engine away so that it is needed.
fn break_the_log(room: &Room) -> PathBuf {
    fs::remove_dir_all(room.data().join("sled")).unwrap();
    let segment = walk(&room.data().join("log"))
        .into_iter()
        .find(|path| path.to_string_lossy().ends_with("0000000001.seg"))
        .unwrap();
    let mut bytes = fs::read(&segment).unwrap();
    let place = bytes
        .windows(6)
        .position(|part| part == b"ping 2")
        .expect("content is kept as it came");
    bytes[place] ^= 1;
    fs::write(&segment, bytes).unwrap();
    segment
}

fn rows(verified: &Value) -> u64 {
    verified["state"]["records"]["r"].as_u64().unwrap()
}

#[test]
fn a_sound_store_is_verified_and_salvaged_without_changing_a_byte() {
    let room = lived();
    let before = contents(&room.data());
    let said = room.run(&["store", "verify"]).good();
    assert!(said.out.contains("nothing is wrong"), "{}", said.out);
    let found = room.ask(&["store", "verify"]);
    assert_eq!((&found["sound"], rows(&found)), (&Value::from(true), PINGS));
    let said = room.run(&["store", "salvage", "--dry-run"]).good();
    assert!(said.out.contains("dry run"), "{}", said.out);
    let dry = room.ask(&["store", "salvage", "--dry-run"]);
    assert_eq!(
        (&dry["into"], &dry["records"]["r"]),
        (&Value::Null, &Value::from(PINGS))
    );
    let saved = room.ask(&["store", "salvage", "--into", "new"]);
    assert_eq!(saved["records"]["r"], PINGS);
    assert_eq!(saved["lost_frames"], serde_json::json!([]));
    assert!(before == contents(&room.data()), "the old one is as it was");

    // The new one starts, with the old key and the same device, and everything waits.
    let mut command = room.command(&["serve"]);
    command.env("BELLWIRE__DATA_DIR", room.path().join("new"));
    fs::remove_dir_all(room.data()).unwrap();
    std::os::unix::fs::symlink(room.path().join("new"), room.data()).unwrap();
    let server = room.serve_by(command);
    let devices = room.ask(&["device", "list", "--user", "ada"]);
    assert!(devices.to_string().contains("\"ada\""), "{devices}");
    server.stop();
    let found = room.ask(&["store", "verify"]);
    assert_eq!((&found["sound"], rows(&found)), (&Value::from(true), PINGS));
}

#[test]
fn damage_is_found_told_salvaged_and_never_deleted() {
    let room = lived();
    let segment = break_the_log(&room);
    let damaged = fs::read(&segment).unwrap();
    let before = contents(&room.data());
    let said = room.run(&["store", "verify"]);
    assert_eq!(said.code, 1);
    assert!(said.out.contains("wrong:"), "{}", said.out);
    assert!(said.err.contains("bellwire store salvage"), "{}", said.err);
    let said = room.run(&["store", "verify", "--json"]);
    assert_eq!(said.code, 1);
    assert_eq!(said.json()["sound"], false);
    assert!(!said.json()["wrong"].as_array().unwrap().is_empty());
    let dry = room.ask(&["store", "salvage", "--dry-run"]);
    assert_eq!(dry["records"]["r"], PINGS - 1);
    let saved = room.ask(&["store", "salvage", "--into", "new"]);
    assert_eq!(saved["records"]["r"], PINGS - 1);
    assert_eq!(saved["lost_frames"].as_array().unwrap().len(), 1);
    assert!(before == contents(&room.data()));
    for path in walk(&room.path().join("new")) {
        let expected = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode(&path), expected, "{}", path.display());
    }

    // A start goes on without what it cannot prove, and keeps it; a salvage after it finds the same.
    let server = room.serve();
    room.run(&["ping", "--user", "ada", "--body", "later"])
        .good();
    server.stop();
    let after = contents(&room.data());
    assert!(after.values().any(|bytes| *bytes == damaged));
    let seen = room.ask(&["store", "inspect"]);
    assert!(!seen["set_aside"].as_array().unwrap().is_empty());
    let saved = room.ask(&["store", "salvage", "--into", "newer"]);
    assert_eq!(
        saved["records"]["r"], PINGS,
        "all but one, and the later one"
    );
    assert!(after == contents(&room.data()));
}

#[test]
fn a_salvage_says_what_it_needs() {
    let room = lived();
    let before = contents(&room.data());
    let refused = |arguments: &[&str], code: i32, words: &[&str]| {
        let mut all = vec!["store", "salvage"];
        all.extend(arguments);
        let said = room.run(&all);
        assert_eq!(said.code, code, "{arguments:?}: {}", said.err);
        for word in words {
            assert!(said.err.contains(word), "{arguments:?}: {}", said.err);
        }
    };
    refused(&[], 2, &["--into"]);
    refused(&["--into", "new", "--dry-run"], 2, &["--dry-run"]);
    fs::create_dir(room.path().join("full")).unwrap();
    fs::write(room.path().join("full/letter"), "keep me").unwrap();
    refused(&["--into", "full"], 1, &["full is not empty", "--into"]);
    let letter = fs::read_to_string(room.path().join("full/letter")).unwrap();
    assert_eq!(letter, "keep me");
    refused(&["--into", "bellwire-data/new"], 1, &["outside of it"]);
    refused(&["--data-dir", "nowhere", "--dry-run"], 1, &["nowhere"]);
    assert!(before == contents(&room.data()));

    // What a later version wrote is left alone by all of them.
    let format = room.data().join("format");
    let text = fs::read_to_string(&format).unwrap();
    fs::write(
        &format,
        text.replace("bellwire-store 1 ", "bellwire-store 2 "),
    )
    .unwrap();
    let before = contents(&room.data());
    refused(&["--into", "new"], 1, &["format 2"]);
    assert!(!room.path().join("new").exists());
    let said = room.run(&["store", "verify"]);
    assert_eq!(said.code, 1);
    assert!(said.out.contains("format 2"), "{}", said.out);
    let said = room.run(&["serve"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("format 2"), "{}", said.err);
    let mut after = contents(&room.data());
    // The server's two locks say who came last.
    for lock in ["lock", "server.lock"] {
        let path = room.data().join(lock);
        after.insert(path.clone(), before[&path].clone());
    }
    assert!(before == after);
}

#[test]
fn whoever_comes_to_a_running_server_is_told_its_process_and_place() {
    let room = Room::new();
    let server = room.serve();
    room.run(&["device", "add", "--user", "ada"]).good();
    room.run(&["backup", "--to", "b.backup"]).good();
    let place = fs::canonicalize(room.data()).unwrap();
    let pid = server.pid().to_string();
    let commands: [&[&str]; 6] = [
        &["serve"],
        &["store", "salvage", "--into", "new"],
        &["store", "salvage", "--dry-run"],
        &["store", "convert", "--to", "fjall"],
        &["restore", "--from", "b.backup", "--replace"],
        &["backup", "--offline", "--to", "c.backup"],
    ];
    for command in commands {
        let said = room.run(command);
        assert_eq!(said.code, 1, "{command:?}: {}", said.out);
        for word in [&pid, place.to_str().unwrap()] {
            assert!(said.err.contains(word), "{command:?}: {}", said.err);
        }
        assert!(said.err.contains("stop"), "{command:?}: {}", said.err);
    }
    // A check reads what can be read safely, and says so.
    let found = room.ask(&["store", "verify"]);
    assert_eq!(found["inspection"]["holder"]["pid"], server.pid());
    // And nobody was disturbed.
    room.run(&["ping", "--user", "ada", "--body", "hello"])
        .good();
    server.stop();
    assert_eq!(rows(&room.ask(&["store", "verify"])), 1);
}

#[test]
fn files_made_late_are_for_their_owner_alone_as_well() {
    let (engine, other) = ("sled", "fjall");
    let room = Room::new();
    let backups = room.path().join("backups");
    fs::create_dir(&backups).unwrap();
    fs::set_permissions(&backups, fs::Permissions::from_mode(0o700)).unwrap();
    let start = |kind: &str| {
        let mut command = without_mask(&room, &["serve"]);
        command
            .env("BELLWIRE__STORE__ENGINE", kind)
            .env("BELLWIRE__STORE__SEGMENT_BYTES", "1MiB")
            .env("BELLWIRE__STORE__SNAPSHOT_BYTES", "1MiB")
            .env("BELLWIRE__BACKUP__DIR", &backups)
            .env("BELLWIRE__BACKUP__EVERY", "1m");
        room.serve_by(command)
    };
    let run = |arguments: &[&str]| {
        let output = without_mask(&room, arguments).output().unwrap();
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {err}");
    };
    let server = start(engine);
    run(&["device", "add", "--user", "ada", "--out", "ada.json"]);
    // Enough for snapshots, segments that follow each other, and a backup.
    let data = room.write("data", &"x".repeat(3_000));
    let data = data.to_str().unwrap();
    let snapshots = room.data().join("snapshots");
    until("there is a snapshot", || {
        for _ in 0..40 {
            run(&["ping", "--user", "ada", "--data-file", data]);
        }
        let found = fs::read_dir(&snapshots).ok()?.any(|entry| {
            entry.is_ok_and(|entry| entry.path().extension().is_some_and(|end| end == "snap"))
        });
        found.then_some(())
    });
    run(&["backup", "--to", backups.to_str().unwrap()]);
    server.stop();
    // Another engine takes its place, and something rots and is set aside.
    run(&["store", "convert", "--to", other]);
    start(other).stop();
    let mut segments: Vec<PathBuf> = walk(&room.data().join("log"))
        .into_iter()
        .filter(|path| path.extension().is_some_and(|end| end == "seg"))
        .collect();
    segments.sort();
    let last = segments.last().unwrap();
    let mut bytes = fs::read(last).unwrap();
    bytes[20] ^= 1;
    fs::write(last, bytes).unwrap();
    start(other).stop();
    run(&["store", "salvage", "--into", "saved"]);
    let mut kinds = 0;
    for (dir, parts) in [
        (
            room.data(),
            &["log", "snapshots", "set-aside", "engine", ".aside-"][..],
        ),
        (backups, &["backup", "erasures"][..]),
        (room.path().join("saved"), &["log", "format"][..]),
    ] {
        let seen = walk(&dir);
        for part in parts {
            let there = seen.iter().any(|path| {
                let name = path.strip_prefix(&dir).unwrap();
                name.to_string_lossy().contains(part)
            });
            assert!(there, "no {part} in {}: {seen:?}", dir.display());
            kinds += 1;
        }
        for path in seen {
            let expected = if path.is_dir() { 0o700 } else { 0o600 };
            assert_eq!(mode(&path), expected, "{engine}: {}", path.display());
        }
    }
    assert_eq!(kinds, 9);
    assert_eq!(mode(&room.path().join("ada.json")), 0o600);
}
