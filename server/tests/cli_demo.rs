//! The demonstration happens, step by step, and leaves nothing behind.

#![cfg(feature = "demo")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Child;

use cli_support::{Room, until};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

/// The demonstration without `--once`, after its first lines hold this text.
fn started(room: &Room, text: &str) -> Child {
    let out = room.path().join("out");
    let mut child = room
        .command(&["demo"])
        .env("TMPDIR", room.path())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(room.path().join("err")).unwrap())
        .spawn()
        .unwrap();
    until(text, || {
        assert_eq!(child.try_wait().unwrap(), None);
        fs::read_to_string(&out)
            .unwrap()
            .contains(text)
            .then_some(())
    });
    child
}

/// The process of the server that a demonstration runs, and its directory.
fn server_of(room: &Room) -> (Pid, PathBuf) {
    let dir = fs::read_dir(room.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.is_dir())
        .unwrap();
    let text = fs::read_to_string(dir.join("data/listen.json")).unwrap();
    let listen: serde_json::Value = serde_json::from_str(&text).unwrap();
    let pid = i32::try_from(listen["pid"].as_i64().unwrap()).unwrap();
    (Pid::from_raw(pid).unwrap(), dir)
}

fn is_gone(pid: Pid) -> Option<()> {
    test_kill_process(pid).is_err().then_some(())
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

#[test]
fn ctrl_c_after_the_tour_ends_well_and_leaves_nothing() {
    let room = Room::new();
    let mut demo = started(&room, "Ctrl-C ends it");
    let (server, dir) = server_of(&room);
    signal(&demo, Signal::INT);
    let status = until("the demonstration ends", || demo.try_wait().unwrap());
    assert_eq!(status.code(), Some(0));
    assert!(!dir.exists());
    until("the server is gone", || is_gone(server));
}

#[test]
fn ctrl_c_during_the_tour_is_no_success_and_leaves_nothing() {
    let room = Room::new();
    let mut demo = started(&room, "data in ");
    let (server, dir) = server_of(&room);
    signal(&demo, Signal::INT);
    let status = until("the demonstration ends", || demo.try_wait().unwrap());
    assert_eq!(status.code(), Some(1));
    assert!(!dir.exists());
    until("the server is gone", || is_gone(server));
}

#[test]
fn a_demonstration_that_is_killed_leaves_no_server_behind() {
    let room = Room::new();
    let mut demo = started(&room, "Ctrl-C ends it");
    let (server, _) = server_of(&room);
    demo.kill().unwrap();
    demo.wait().unwrap();
    until("the server is gone", || is_gone(server));
}

#[test]
fn the_tour_ends_well_in_plain_text_and_cleans_up() {
    let room = Room::new();
    let output = room
        .command(&["demo", "--once"])
        .env("TMPDIR", room.path())
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    assert_eq!(output.status.code(), Some(0), "{out}\n{err}");
    assert!(out.ends_with("Every step happened.\n"), "{out}");
    assert!(out.is_ascii(), "plain text without a terminal");
    assert_eq!(out.matches(" ms\n").count(), out.matches("    ok ").count());
    assert_eq!(
        fs::read_dir(room.path()).unwrap().count(),
        0,
        "nothing is left"
    );
}

#[test]
fn a_directory_with_something_in_it_is_not_used() {
    let room = Room::new();
    room.write("mine", "");
    let said = room.run(&["demo", "--once", "--dir", "."]);
    assert_eq!(said.code, 2);
    assert!(said.err.contains("not empty"), "{}", said.err);
}

#[test]
fn a_tour_that_cannot_begin_is_a_failure() {
    let room = Room::new();
    let output = room
        .command(&["demo", "--once"])
        .env("TMPDIR", room.path().join("absent"))
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
}
