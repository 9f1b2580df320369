//! The commands that speak to a server, and what every command has in common.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::fs;

use cli_support::{Room, mode};
use serde_json::Value;

/// The names below "Commands:" in a help text.
fn subcommands(help: &str) -> Vec<String> {
    help.lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_command_has_help_with_examples() {
    let room = Room::new();
    let mut left = vec![Vec::<String>::new()];
    let mut seen = 0;
    while let Some(path) = left.pop() {
        let mut arguments: Vec<&str> = path.iter().map(String::as_str).collect();
        arguments.push("--help");
        let help = room.run(&arguments).good().out;
        assert!(help.contains("Examples:\n  bellwire "), "{path:?}:\n{help}");
        for name in subcommands(&help) {
            let mut deeper = path.clone();
            deeper.push(name);
            left.push(deeper);
        }
        seen += 1;
    }
    assert!(seen >= 16, "only {seen} commands were found");
}

#[test]
fn completions_exist_for_every_shell() {
    let room = Room::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = room.run(&["completions", shell]).good().out;
        assert!(script.contains("bellwire"), "{shell}");
    }
}

#[test]
fn a_wrong_command_line_ends_with_2_and_a_missing_server_with_1() {
    let room = Room::new();
    assert_eq!(room.run(&["pong"]).code, 2);
    assert_eq!(room.run(&["ping", "--body", "to nobody"]).code, 2);
    assert_eq!(
        room.run(&["status", "--api", "gopher://x", "--key-file", "/dev/null"])
            .code,
        2
    );
    let said = room.run(&["status"]);
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("no server runs") && said.err.contains("bellwire serve"),
        "{}",
        said.err
    );
    let told: Value = serde_json::from_str(&room.run(&["status", "--json"]).err).unwrap();
    assert!(told["help"].as_str().unwrap().contains("bellwire serve"));
}

#[test]
fn devices_are_added_listed_and_revoked() {
    let room = Room::new();
    let server = room.serve();
    let shown = room.ask(&["device", "add", "--user", "anna", "--name", "phone"]);
    assert!(shown["secret"].as_str().unwrap().len() >= 26);
    let filed = room.ask(&["device", "add", "--user", "ben", "--out", "ben.json"]);
    assert_eq!(
        filed.get("secret"),
        None,
        "what is in the file is not shown"
    );
    let path = room.path().join("ben.json");
    assert_eq!(mode(&path), 0o600);
    let credentials: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(credentials["device"], filed["device"]);
    assert!(credentials["secret"].is_string());

    let of_anna = room.ask(&["device", "list", "--user", "anna"]);
    assert_eq!(of_anna["devices"].as_array().unwrap().len(), 1);
    assert_eq!(room.ask(&["device", "list", "--limit", "1"])["more"], true);
    let table = room.run(&["device", "list"]).good().out;
    assert!(
        table.starts_with("DEVICE ") && table.lines().count() == 3,
        "{table}"
    );
    assert!(!table.contains('\x1b'), "no colours without a terminal");

    let id = shown["device"].as_str().unwrap();
    room.ask(&["device", "revoke", id]);
    let again = room.run(&["device", "revoke", id]);
    assert_eq!(again.code, 1);
    assert!(again.err.contains("404"), "{}", again.err);
    server.stop();
}

#[test]
fn a_file_that_is_there_is_never_overwritten_with_credentials() {
    let room = Room::new();
    let server = room.serve();
    room.write("mine.json", "mine");
    let said = room.run(&["device", "add", "--user", "anna", "--out", "mine.json"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("bellwire device revoke"), "{}", said.err);
    assert_eq!(
        fs::read_to_string(room.path().join("mine.json")).unwrap(),
        "mine"
    );
    server.stop();
}

#[test]
fn keys_are_made_with_scopes_used_and_revoked() {
    let room = Room::new();
    let server = room.serve();
    let made = room.ask(&[
        "key", "create", "--name", "shop", "--scope", "ping", "--out", "shop.key",
    ]);
    assert_eq!(made["scopes"], serde_json::json!(["ping"]));
    assert_eq!(made.get("key"), None);
    let with_key = |arguments: &[&str]| {
        let mut all = arguments.to_vec();
        all.extend(["--key-file", "shop.key"]);
        room.run(&all)
    };
    with_key(&["ping", "--user", "anna", "--body", "x"]).good();
    let refused = with_key(&["device", "list"]);
    assert_eq!(refused.code, 1);
    assert!(
        refused.err.contains("403") && refused.err.contains("help:"),
        "{}",
        refused.err
    );
    assert_eq!(
        room.ask(&["key", "list"])["keys"].as_array().unwrap().len(),
        2
    );
    room.ask(&["key", "revoke", made["id"].as_str().unwrap()]);
    let gone = with_key(&["ping", "--user", "anna", "--body", "x"]);
    assert_eq!(gone.code, 1);
    assert!(gone.err.contains("401"), "{}", gone.err);
    server.stop();
}

#[test]
fn a_ping_is_sent_repeated_safely_and_looked_at() {
    let room = Room::new();
    let server = room.serve();
    let device = room.ask(&["device", "add", "--user", "anna"]);
    let ping = [
        "ping",
        "--user",
        "anna",
        "--title",
        "Order 7",
        "--body",
        "Ready",
        "--sync",
        "orders",
        "--data",
        "bytes",
        "--ttl",
        "600",
        "--urgency",
        "high",
        "--collapse",
        "order",
        "--idempotency-key",
        "order-7",
    ];
    let first = room.ask(&ping);
    assert_eq!(first["devices"], 1);
    assert_eq!(first["ttl_s"], 600);
    assert_eq!(room.ask(&ping)["id"], first["id"]);
    let shown = room
        .run(&[
            "ping",
            "--device",
            device["device"].as_str().unwrap(),
            "--body",
            "x",
        ])
        .good();
    assert!(shown.out.contains("devices  1"), "{}", shown.out);
    let nobody = room
        .run(&["ping", "--user", "nobody", "--body", "x"])
        .good();
    assert!(
        nobody.out.contains("nobody it addresses has a device"),
        "{}",
        nobody.out
    );
    let waited = room.run(&[
        "ping", "--user", "anna", "--body", "x", "--wait=1", "--json",
    ]);
    assert_eq!(waited.code, 1, "{}", waited.err);
    assert_eq!(waited.json()["outcomes"][0]["state"], "waiting");
    server.stop();
}

#[test]
fn a_device_changes_hands_and_secret_and_a_user_is_shown_and_erased() {
    let room = Room::new();
    let server = room.serve();
    let made = room.ask(&["device", "add", "--user", "anna", "--name", "phone"]);
    let id = made["device"].as_str().unwrap();
    room.ask(&["ping", "--user", "anna", "--body", "for anna"]);
    let shown = room.run(&["device", "show", id]).good().out;
    assert!(
        shown.contains("anna") && shown.contains("never") && shown.contains("waiting    1"),
        "{shown}"
    );

    let mistaken = room.run(&["device", "change", id]);
    assert_eq!(mistaken.code, 2);
    assert_eq!(room.run(&["device", "change", id, "--keep"]).code, 2);
    let kept = room.ask(&["device", "change", id, "--user", "ben", "--keep"]);
    assert_eq!(
        (&kept["user"], &kept["revoked"]),
        (&"ben".into(), &0.into())
    );
    let changed = room.ask(&["device", "change", id, "--user", "cleo", "--no-name"]);
    assert_eq!(
        (&changed["revoked"], &changed["waiting"]),
        (&1.into(), &0.into())
    );
    assert_eq!(changed.get("name"), None);

    let rotated = room.ask(&[
        "device",
        "rotate",
        id,
        "--overlap",
        "60",
        "--out",
        "new.json",
    ]);
    assert!(rotated["previous_until_ms"].is_u64() && rotated.get("secret").is_none());
    assert_eq!(mode(&room.path().join("new.json")), 0o600);
    let again = room.run(&["device", "rotate", id, "--out", "new.json"]);
    assert_eq!(again.code, 2, "{}", again.err);
    assert!(room.ask(&["device", "show", id])["previous_secret_until_ms"].is_u64());
    let ended = room.run(&["device", "rotate", id, "--overlap", "0"]).good();
    assert!(ended.out.contains("ended"), "{}", ended.out);

    let away = room.ask(&["device", "list", "--away"]);
    assert_eq!(away["devices"].as_array().unwrap().len(), 1);
    for nobody in [
        &["device", "list", "--connected"][..],
        &["device", "list", "--seen-within", "1h"],
        &["device", "list", "--not-seen-for", "30d"],
    ] {
        assert_eq!(room.ask(nobody)["devices"], serde_json::json!([]));
    }
    assert_eq!(
        room.run(&["device", "list", "--seen-within", "soon"]).code,
        2
    );

    let shown = room.run(&["user", "show", "cleo"]).good().out;
    assert!(shown.contains(id) && shown.contains("AGENT"), "{shown}");
    assert_eq!(room.run(&["user", "erase", "cleo"]).code, 2);
    let erased = room.ask(&["user", "erase", "cleo", "--yes"]);
    assert_eq!(erased["erased"], true);
    assert_eq!(
        room.ask(&["user", "show", "cleo"])["devices"],
        serde_json::json!([])
    );
    assert_eq!(room.run(&["device", "show", id]).code, 1);
    server.stop();
}

#[test]
fn a_batch_is_sent_out_of_a_file_and_refused_lines_are_named() {
    let room = Room::new();
    let server = room.serve();
    room.ask(&["device", "add", "--user", "anna"]);
    let line = |number: usize| {
        format!(
            "{{\"to\": {{\"user\": \"anna\"}}, \"body\": \"{number}\", \"idempotency_key\": \"k-{number}\"}}\n"
        )
    };
    let good: String = (0..1_200).map(line).collect();
    room.write("good.ndjson", &good);
    let said = room.run(&["ping", "--batch", "good.ndjson"]).good();
    assert!(said.out.contains("accepted  1200 lines"), "{}", said.out);

    let mixed = format!("\n{}oops\n{}{{}}", line(0), line(1));
    let file = room.write("mixed.ndjson", &mixed);
    let said = room.run(&["ping", "--batch", "mixed.ndjson"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("refused: 2 of 4 lines"), "{}", said.err);
    let table: Vec<&str> = said
        .out
        .lines()
        .filter(|line| line.contains("malformed"))
        .collect();
    assert!(
        table.len() == 2 && table[0].starts_with('3') && table[1].starts_with('5'),
        "{}",
        said.out
    );
    let mut command = room.command(&["ping", "--batch", "-", "--json"]);
    command.stdin(fs::File::open(file).unwrap());
    let said = command.output().unwrap();
    let answers: Vec<Value> = String::from_utf8(said.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let told: Vec<_> = answers
        .iter()
        .map(|answer| (answer["line"].as_u64(), answer["status"].as_u64()))
        .collect();
    let pair = |line, status| (Some(line), Some(status));
    assert_eq!(
        told,
        [pair(2, 202), pair(3, 400), pair(4, 202), pair(5, 400)]
    );

    for wrong in [
        &["ping", "--batch", "good.ndjson", "--user", "anna"][..],
        &["ping", "--batch", "good.ndjson", "--body", "x"],
        &["ping", "--batch", "good.ndjson", "--ttl", "1"],
        &["ping", "--batch", "missing.ndjson"],
    ] {
        assert_eq!(room.run(wrong).code, 2, "{wrong:?}");
    }
    server.stop();
}

#[test]
fn a_key_that_sends_too_fast_is_told_to_wait() {
    let room = Room::new();
    room.write(
        "bellwire.toml",
        "[limits]\npings_per_second = 1\nping_burst = 1\n",
    );
    let server = room.serve();
    let mut refused = None;
    // One a second is allowed, and these come faster.
    for _ in 0..100 {
        let said = room.run(&["ping", "--user", "anna", "--body", "x"]);
        if said.code != 0 {
            refused = Some(said);
            break;
        }
    }
    let said = refused.unwrap();
    assert!(
        said.err.contains("429") && said.err.contains("try again"),
        "{}",
        said.err
    );
    server.stop();
}

#[test]
fn status_is_for_people_and_for_scripts() {
    let room = Room::new();
    let server = room.serve();
    let status = room.ask(&["status"]);
    assert_eq!(status["ready"], true);
    let text = room.run(&["status"]).good().out;
    assert!(text.contains("ready") && text.contains("sled"), "{text}");
    server.stop();
}

#[test]
fn https_is_spoken_and_checked() {
    let room = Room::new();
    room.run(&[
        "certs",
        "make",
        "--name",
        "localhost",
        "--name",
        "127.0.0.1",
        "--dir",
        "pki",
    ])
    .good();
    let mut command = room.command(&["serve"]);
    command
        .env("BELLWIRE__API__CERT", "pki/server.pem")
        .env("BELLWIRE__API__KEY", "pki/server-key.pem");
    let server = room.serve_by(command);
    let trusted = room
        .run(&["status", "--ca", "pki/dev-ca.pem", "--json"])
        .good();
    assert_eq!(trusted.json()["ready"], true);
    room.run(&["certs", "make", "--name", "localhost", "--dir", "other"])
        .good();
    let untrusted = room.run(&["status", "--ca", "other/dev-ca.pem"]);
    assert_eq!(untrusted.code, 1);
    assert!(untrusted.err.contains("--ca"), "{}", untrusted.err);
    server.stop();
}
