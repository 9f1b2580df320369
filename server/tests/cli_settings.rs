//! `bellwire check` and what wrong settings look like.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::net::TcpListener;

use cli_support::Room;

/// A blank at the end of a line is layout.
fn trimmed(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

#[test]
fn mistakes_in_the_file_are_shown_where_they_stand() {
    let room = Room::new();
    room.write(
        "bad.toml",
        "data_dir = \"data\"\n\n[listen]\ndevice = \"127.0.0.1:4433\"\n\n[limits]\nttl_default = 30\n",
    );
    for command in ["check", "serve"] {
        let said = room.run(&[command, "--config", "bad.toml"]);
        assert_eq!(said.code, 78);
        assert_eq!(said.out, "");
        assert_eq!(
            trimmed(&said.err),
            "  x listen.device is not a setting
   ,-[bad.toml:4:1]
 3 | [listen]
 4 | device = \"127.0.0.1:4433\"
   : ^^^|^^
   :    `-- not known
 5 |
   `----
  help: did you mean devices?

  x limits.ttl_default: 30 has no unit of time
   ,-[bad.toml:7:15]
 6 | [limits]
 7 | ttl_default = 30
   :               ^|
   :                `-- here
   `----
  help: write a time with its unit (ms, s, m, h, d); 0s to 365d

error: the settings are wrong in 2 places; nothing was done"
        );
    }
    assert!(!room.path().join("data").exists(), "nothing was started");
}

#[test]
fn mistakes_are_told_to_scripts_as_well() {
    let room = Room::new();
    room.write("bellwire.toml", "[listen\n");
    let said = room.run(&["check", "--json"]);
    assert_eq!(said.code, 78);
    let told: serde_json::Value = serde_json::from_str(&said.err).unwrap();
    assert_eq!(told["problems"][0]["line"], 1);
    assert_eq!(told["problems"][0]["file"], "bellwire.toml");
}

#[test]
fn a_wrong_variable_is_called_by_its_name() {
    let room = Room::new();
    let output = room
        .command(&["check"])
        .env("BELLWIRE__LISTEN__API", "push.example.com:8480")
        .env("BELLWIRE__STORE__ENGIN", "sled")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(
        text.contains(
            "BELLWIRE__LISTEN__API (listen.api): \"push.example.com:8480\" is not an address"
        ),
        "{text}"
    );
    assert!(
        text.contains("did you mean BELLWIRE__STORE__ENGINE?"),
        "{text}"
    );
}

#[test]
fn a_check_of_good_settings_changes_nothing() {
    let room = Room::new();
    let said = room.run(&["check"]).good();
    assert!(
        said.out.lines().all(|line| line.starts_with("ok")),
        "{}",
        said.out
    );
    assert_eq!(std::fs::read_dir(room.path()).unwrap().count(), 0);
}

#[test]
fn a_check_finds_a_port_in_use_and_a_key_of_somebody_else() {
    let room = Room::new();
    for dir in ["one", "two"] {
        room.run(&["certs", "make", "--name", "localhost", "--dir", dir])
            .good();
    }
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = room
        .command(&["check", "--json"])
        .env(
            "BELLWIRE__LISTEN__API",
            taken.local_addr().unwrap().to_string(),
        )
        .env("BELLWIRE__TLS__CERT", "one/server.pem")
        .env("BELLWIRE__TLS__KEY", "two/server-key.pem")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(told["ok"], false);
    let wrong: Vec<String> = told["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|finding| finding["mark"] == "failed")
        .map(|finding| finding["found"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].contains("does not belong"), "{wrong:?}");
    assert!(wrong[1].contains("BELLWIRE__LISTEN__API"), "{wrong:?}");
}

#[test]
fn an_api_outside_of_the_machine_needs_a_certificate() {
    let room = Room::new();
    let output = room
        .command(&["serve"])
        .env("BELLWIRE__LISTEN__API", "0.0.0.0:0")
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(78), "{text}");
    assert!(
        text.contains("in the clear") && text.contains("trusted_proxy"),
        "{text}"
    );
}

#[test]
fn certificates_that_were_made_can_be_inspected_and_are_not_replaced_unasked() {
    let room = Room::new();
    room.run(&[
        "certs",
        "make",
        "--name",
        "push.example.com",
        "--name",
        "192.0.2.10",
    ])
    .good();
    assert_eq!(
        cli_support::mode(&room.path().join("server-key.pem")),
        0o600
    );
    let seen = room
        .run(&[
            "certs",
            "inspect",
            "server.pem",
            "--key",
            "server-key.pem",
            "--json",
        ])
        .good()
        .json();
    assert_eq!(
        seen["certificates"][0]["names"],
        serde_json::json!(["push.example.com", "192.0.2.10"])
    );
    let again = room.run(&["certs", "make", "--name", "other.example.com"]);
    assert_eq!(again.code, 1);
    assert!(again.err.contains("--replace"), "{}", again.err);
    let ca = std::fs::read(room.path().join("dev-ca.pem")).unwrap();
    room.run(&["certs", "make", "--name", "other.example.com", "--replace"])
        .good();
    assert_eq!(std::fs::read(room.path().join("dev-ca.pem")).unwrap(), ca);
}
