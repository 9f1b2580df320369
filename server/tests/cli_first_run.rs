//! The first run, to the letter: files, modes, `listen.json`, signals, exit codes.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;

use cli_support::{Room, mode, until};
use rustix::process::Signal;
use serde_json::Value;

fn listen(room: &Room) -> Value {
    serde_json::from_str(&fs::read_to_string(room.data().join("listen.json")).unwrap()).unwrap()
}

#[test]
fn a_first_start_without_any_settings_makes_all_it_needs() {
    let room = Room::new();
    let server = room.serve();
    assert_eq!(mode(&room.data()), 0o700);
    for private in [
        "bootstrap.key",
        "hash.key",
        "dev-ca-key.pem",
        "dev-server-key.pem",
    ] {
        assert_eq!(mode(&room.data().join(private)), 0o600, "{private}");
    }
    let key = fs::read_to_string(room.data().join("bootstrap.key")).unwrap();
    assert!(key.starts_with("bw_") && key.ends_with('\n') && key.lines().count() == 1);
    assert!(
        fs::read_to_string(room.data().join("dev-ca.pem"))
            .unwrap()
            .starts_with("-----BEGIN CERTIFICATE-----")
    );
    assert!(server.log().contains("certificate for development"));

    let listen = listen(&room);
    let mut members: Vec<&String> = listen.as_object().unwrap().keys().collect();
    members.sort();
    assert_eq!(
        members,
        ["api", "api_scheme", "devices", "operations", "pid"]
    );
    assert_eq!(listen["api_scheme"], "http");
    assert_eq!(listen["pid"].as_u64(), Some(u64::from(server.pid())));
    for name in ["devices", "api", "operations"] {
        let address: SocketAddr = listen[name].as_str().unwrap().parse().unwrap();
        assert!(address.ip().is_loopback() && address.port() != 0, "{name}");
        assert!(
            TcpListener::bind(address).is_err(),
            "{name} is really bound"
        );
    }
    let devices: SocketAddr = listen["devices"].as_str().unwrap().parse().unwrap();
    assert!(UdpSocket::bind(devices).is_err(), "UDP has the same number");

    let ready = until("the ready line", || {
        Some(server.out()).filter(|out| out.ends_with('\n'))
    });
    assert_eq!(ready.lines().count(), 1);
    assert!(ready.contains("is ready") && ready.contains(listen["api"].as_str().unwrap()));
    server.stop();
    assert!(!room.data().join("listen.json").exists());
}

#[test]
fn a_later_start_keeps_key_and_certificate() {
    let room = Room::new();
    let read = |name: &str| fs::read(room.data().join(name)).unwrap();
    room.serve().stop();
    let before = ["bootstrap.key", "hash.key", "dev-ca.pem", "dev-server.pem"].map(read);
    let server = room.serve();
    assert_eq!(
        before,
        ["bootstrap.key", "hash.key", "dev-ca.pem", "dev-server.pem"].map(read)
    );
    assert_eq!(room.ask(&["status"])["run"], 2);
    server.stop();
}

#[test]
fn a_killed_server_leaves_nothing_that_the_next_one_stumbles_over() {
    let room = Room::new();
    let mut killed = room.serve();
    killed.signal(Signal::KILL);
    killed.end();
    assert!(room.data().join("listen.json").exists());
    let server = room.serve();
    assert_eq!(listen(&room)["pid"].as_u64(), Some(u64::from(server.pid())));
    room.ask(&["status"]);
    server.stop();
}

#[test]
fn sigint_stops_in_order_as_well() {
    let room = Room::new();
    let mut server = room.serve();
    server.signal(Signal::INT);
    assert_eq!(server.end(), 0, "{}", server.log());
}

#[test]
fn a_second_signal_stops_at_once() {
    let room = Room::new();
    let mut server = room.serve();
    let key = fs::read_to_string(room.data().join("bootstrap.key")).unwrap();
    // A request whose body does not come holds up an orderly end.
    let api: SocketAddr = listen(&room)["api"].as_str().unwrap().parse().unwrap();
    let mut slow = TcpStream::connect(api).unwrap();
    write!(
        slow,
        "POST /v1/devices HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n\
         content-length: 100\r\nexpect: 100-continue\r\n\r\n",
        key.trim()
    )
    .unwrap();
    let mut line = [0; 12];
    slow.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"HTTP/1.1 100", "the server waits for the body");
    server.signal(Signal::TERM);
    until("it goes down", || {
        server.log().contains("drained").then_some(())
    });
    server.signal(Signal::TERM);
    assert_eq!(server.end(), 1, "{}", server.log());
    assert!(server.log().contains("a second signal"), "{}", server.log());
}

#[test]
fn the_limit_of_open_files_is_raised_to_what_is_allowed() {
    let room = Room::new();
    let mut command = Command::new("sh");
    let serve = room.command(&["serve"]);
    command
        .args(["-c", "ulimit -S -n 64; exec \"$0\" serve"])
        .arg(serve.get_program())
        .current_dir(room.path())
        .envs(
            serve
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        );
    let server = room.serve_by(command);
    let limits = fs::read_to_string(format!("/proc/{}/limits", server.pid())).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let numbers: Vec<&str> = line.split_whitespace().skip(3).take(2).collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
    server.stop();
}

#[test]
fn the_engine_in_memory_knows_after_a_restart_what_it_knew() {
    let room = Room::new();
    room.write("bellwire.toml", "[store]\nengine = \"memory\"\n");
    let server = room.serve();
    let made = room.ask(&["device", "add", "--user", "anna"]);
    server.stop();
    let server = room.serve();
    assert_eq!(
        room.ask(&["device", "list"])["devices"][0]["device"],
        made["device"]
    );
    assert!(!room.data().join("sled").exists());
    server.stop();
}

#[test]
fn a_second_server_on_the_same_directory_is_refused_and_disturbs_nothing() {
    let room = Room::new();
    let server = room.serve();
    let second = room.run(&["serve"]);
    assert_eq!(second.code, 1);
    assert!(
        second.err.contains(&format!(
            "in use by the server with process id {}",
            server.pid()
        )),
        "{}",
        second.err
    );
    assert!(second.err.contains("BELLWIRE__DATA_DIR"), "{}", second.err);
    room.ask(&["status"]);
    server.stop();
}

#[test]
fn a_port_in_use_is_named_by_its_setting() {
    let room = Room::new();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (variable, setting) in [
        ("BELLWIRE__LISTEN__API", "listen.api"),
        ("BELLWIRE__LISTEN__OPERATIONS", "listen.operations"),
        ("BELLWIRE__LISTEN__DEVICES", "listen.devices"),
    ] {
        let output = room
            .command(&["serve"])
            .env(variable, &address)
            .output()
            .unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(
            text.contains(&format!("{address} is in use by another program"))
                && text.contains(setting)
                && text.contains(variable),
            "{text}"
        );
        assert!(!room.data().join("listen.json").exists());
    }
}

#[test]
fn a_data_directory_that_is_a_file_is_refused() {
    let room = Room::new();
    room.write("bellwire-data", "");
    let said = room.run(&["serve"]);
    assert_eq!(said.code, 1);
    assert!(said.err.contains("is a file"), "{}", said.err);
}

#[test]
fn a_lost_hash_key_is_never_replaced_silently() {
    let room = Room::new();
    room.serve().stop();
    fs::remove_file(room.data().join("hash.key")).unwrap();
    let said = room.run(&["serve"]);
    assert_eq!(said.code, 1);
    assert!(
        said.err.contains("hash.key is gone") && said.err.contains("backup"),
        "{}",
        said.err
    );
    assert!(!room.data().join("hash.key").exists());
}

#[test]
fn a_data_directory_that_others_can_read_is_closed_to_them() {
    let room = Room::new();
    fs::create_dir(room.data()).unwrap();
    fs::set_permissions(
        room.data(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let told = room.run(&["check"]).good().out;
    assert!(told.contains("others on this machine"), "{told}");
    assert_eq!(mode(&room.data()), 0o755, "a check changes nothing");
    let server = room.serve();
    assert!(server.log().contains("it is closed to them now"));
    assert_eq!(mode(&room.data()), 0o700);
    server.stop();
}

#[test]
fn a_lost_key_is_replaced_on_request() {
    let room = Room::new();
    room.serve().stop();
    let old = fs::read_to_string(room.data().join("bootstrap.key")).unwrap();
    fs::remove_file(room.data().join("bootstrap.key")).unwrap();
    let server = room.serve();
    assert!(!room.data().join("bootstrap.key").exists());
    server.stop();
    let server = room.serve_by(room.command(&["serve", "--new-key"]));
    let new = fs::read_to_string(room.data().join("bootstrap.key")).unwrap();
    assert_ne!(old, new);
    assert_eq!(
        room.ask(&["key", "list"])["keys"].as_array().unwrap().len(),
        2
    );
    server.stop();
}

#[test]
fn sighup_takes_new_limits_and_refuses_wrong_settings_without_a_stop() {
    let room = Room::new();
    let path = room.write("bellwire.toml", "[limits]\ncontent_bytes = 1000\n");
    let server = room.serve();
    // By the directory, because the settings will be wrong.
    let limit =
        || room.ask(&["status", "--data-dir", "bellwire-data"])["limits"]["content_max"].clone();
    assert_eq!(limit(), 1000);
    fs::write(&path, "[limits]\ncontent_bytes = 2000\n").unwrap();
    server.signal(Signal::HUP);
    until("the new limit holds", || (limit() == 2000).then_some(()));
    fs::write(&path, "[limits]\ncontent = 3000\n").unwrap();
    server.signal(Signal::HUP);
    until("the mistake is told", || {
        server
            .log()
            .contains("everything stays as it was")
            .then_some(())
    });
    assert_eq!(limit(), 2000);
    server.stop();
}

#[test]
fn a_server_on_a_leash_stops_when_its_parent_is_gone() {
    let room = Room::new();
    let mut command = room.command(&["serve", "--until-stdin-ends"]);
    let (reader, writer) = std::io::pipe().unwrap();
    command.stdin(reader);
    let mut server = room.serve_by(command);
    drop(writer);
    assert_eq!(server.end(), 0, "{}", server.log());
}
