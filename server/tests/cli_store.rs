//! The data directory with the real binary: whose it is, who may look into it, one process at a time, and what the commands of
//! `bellwire store` say about it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cli_support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use cli_support::{Room, mode};
use rustix::process::Signal;

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
    assert!(server.out().contains("/volume"), "{}", server.out());
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
