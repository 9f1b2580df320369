//! The demonstration happens, step by step, and leaves nothing behind.

#![cfg(feature = "demo")]
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use cli_support::Room;

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
        std::fs::read_dir(room.path()).unwrap().count(),
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
