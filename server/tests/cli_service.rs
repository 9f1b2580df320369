//! Under a service manager: what it is told, what a reload takes, and what an operator can see of it.

#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

mod cli_support;

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::process::{Command, Output};
use std::time::Duration;

use bellwire_certs::{DevAuthority, Validity};
use cli_support::{Room, Server, until};
use rustix::process::Signal;
use rustix::time::{ClockId, clock_gettime};
use serde_json::Value;

/// Longest wait for a datagram that must come.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stand-in for the service manager.
struct Manager(UnixDatagram);

impl Manager {
    fn at(room: &Room) -> (Manager, String) {
        let path = room.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        (Manager::of(socket), path.display().to_string())
    }

    fn of(socket: UnixDatagram) -> Manager {
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        Manager(socket)
    }

    /// The next datagram, as names and values.
    fn hears(&self) -> HashMap<String, String> {
        let mut datagram = [0; 4096];
        let length = self.0.recv(&mut datagram).expect("something is told");
        let text = std::str::from_utf8(&datagram[..length]).unwrap();
        text.lines()
            .map(|line| {
                let (name, value) = line.split_once('=').unwrap();
                (name.to_owned(), value.to_owned())
            })
            .collect()
    }

    /// The next datagram that has this name; signs of life and states in between are skipped.
    fn hears_of(&self, name: &str) -> HashMap<String, String> {
        loop {
            let heard = self.hears();
            if heard.contains_key(name) {
                return heard;
            }
        }
    }
}

fn serve_under(room: &Room, socket: &str, more: &[(&str, &str)]) -> Server {
    let mut command = room.command(&["serve"]);
    command.env("NOTIFY_SOCKET", socket);
    for (name, value) in more {
        command.env(name, value);
    }
    room.serve_by(command)
}

fn address(room: &Room, listener: &str) -> SocketAddr {
    let listen = fs::read_to_string(room.data().join("listen.json")).unwrap();
    let listen: Value = serde_json::from_str(&listen).unwrap();
    listen[listener].as_str().unwrap().parse().unwrap()
}

/// An answer of the operations listener: head and body.
fn get(room: &Room, path: &str) -> (String, String) {
    ask(
        address(room, "operations"),
        &format!("GET {path} HTTP/1.1\r\n"),
        "",
    )
}

fn ask(server: SocketAddr, head: &str, body: &str) -> (String, String) {
    let mut tcp = TcpStream::connect(server).unwrap();
    write!(
        tcp,
        "{head}host: x\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

fn monotonic_us() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000 + now.tv_nsec / 1_000
}

#[test]
fn the_service_manager_is_told_of_every_turn() {
    let room = Room::new();
    let settings = room.write("bellwire.toml", "[limits]\ncontent_bytes = 1000\n");
    let (manager, socket) = Manager::at(&room);
    let mut server = serve_under(&room, &socket, &[("BELLWIRE__DRAIN__WINDOW", "7s")]);
    let ready = manager.hears_of("READY");
    assert_eq!(ready["READY"], "1");
    assert!(
        ready["STATUS"].contains(&address(&room, "api").to_string()),
        "{ready:?}"
    );

    // Taken: between the two words the settings change.
    fs::write(&settings, "[limits]\ncontent_bytes = 2000\n").unwrap();
    let before = monotonic_us();
    server.signal(Signal::HUP);
    let reloading = manager.hears_of("RELOADING");
    let told: i64 = reloading["MONOTONIC_USEC"].parse().unwrap();
    assert!((before..=monotonic_us()).contains(&told), "{reloading:?}");
    let again = manager.hears_of("READY");
    assert!(again["STATUS"].contains("read anew"), "{again:?}");
    assert_eq!(room.ask(&["status"])["limits"]["content_max"], 2000);

    // Refused: the manager is not left waiting, and is told.
    fs::write(&settings, "[limits]\ncontent_bytes = 0\n").unwrap();
    server.signal(Signal::HUP);
    manager.hears_of("RELOADING");
    let again = manager.hears_of("READY");
    assert!(again["STATUS"].contains("refused"), "{again:?}");

    server.signal(Signal::TERM);
    let stopping = manager.hears_of("STOPPING");
    let longest: u64 = stopping["EXTEND_TIMEOUT_USEC"].parse().unwrap();
    assert!(
        longest >= 7_000_000,
        "the window is asked for: {stopping:?}"
    );
    assert_eq!(server.end(), 0, "{}", server.log());
}

#[test]
fn signs_of_life_go_to_an_abstract_socket_as_often_as_asked() {
    let room = Room::new();
    let name = format!("bellwire-test-{}", std::process::id());
    let socket = UnixAddr::from_abstract_name(&name).unwrap();
    let manager = Manager::of(UnixDatagram::bind_addr(&socket).unwrap());
    let server = serve_under(&room, &format!("@{name}"), &[("WATCHDOG_USEC", "200000")]);
    for _ in 0..3 {
        assert_eq!(manager.hears_of("WATCHDOG")["WATCHDOG"], "1");
    }
    server.stop();
    // Also while it goes down, and no more after.
    manager.hears_of("STOPPING");
}

#[test]
fn a_manager_that_cannot_be_told_keeps_nobody_from_serving() {
    let room = Room::new();
    let server = serve_under(&room, "/nowhere/notify", &[("WATCHDOG_USEC", "200000")]);
    assert!(
        server.log().contains("service manager's socket"),
        "{}",
        server.log()
    );
    server.stop();
}

#[test]
fn a_reload_takes_all_that_can_change_and_names_what_waits_for_a_restart() {
    let room = Room::new();
    let path = room.write("bellwire.toml", "[limits]\nttl_max = \"20d\"\n");
    let server = room.serve();
    // By the directory, because the settings will be wrong.
    let ask = || room.ask(&["status", "--data-dir", "bellwire-data"]);
    let status = || ask()["settings"].clone();
    let first = status();
    assert_eq!(
        (&first["reloads"], &first["refused"]),
        (&0.into(), &0.into())
    );
    assert!(first.get("last_reload").is_none() && first["loaded_ms"].is_u64());

    fs::write(
        &path,
        "[limits]\nttl_max = \"10d\"\nping_burst = 5\napi_connections = 9\n[receipts]\nkeep = \"2h\"\n[log]\nlevel = \
         \"debug\"\n",
    )
    .unwrap();
    server.signal(Signal::HUP);
    let taken = until("the reload is taken", || {
        Some(status()).filter(|status| status["reloads"] == 1)
    });
    assert_eq!(
        taken["last_reload"]["changed"],
        serde_json::json!(["limits.ttl_max", "limits.ping_burst", "log.level"])
    );
    let waiting = serde_json::json!(["limits.api_connections", "receipts.keep"]);
    assert_eq!(taken["waiting_for_restart"], waiting);
    assert_eq!(ask()["limits"]["ttl_max_s"], 10 * 86_400);
    assert!(server.log().contains("changes at the next start only"));
    // The new level holds at once: requests are logged now.
    until("debug lines are written", || {
        server.log().contains("\"answered\"").then_some(())
    });
    let metrics = get(&room, "/metrics").1;
    for line in [
        "bellwire_reloads_total{result=\"taken\"} 1",
        "bellwire_reloads_total{result=\"refused\"} 0",
        "bellwire_settings_waiting 2",
    ] {
        assert!(metrics.contains(line), "{line}: {metrics}");
    }

    // One mistake among good changes: nothing is taken, and the place is told.
    fs::write(&path, "[limits]\nttl_max = \"9d\"\nping_burst = \"many\"\n").unwrap();
    server.signal(Signal::HUP);
    let refused = until("the reload is refused", || {
        Some(status()).filter(|status| status["refused"] == 1)
    });
    let problem = refused["last_reload"]["problems"][0].as_str().unwrap();
    assert!(
        problem.contains("bellwire.toml:3:14") && problem.contains("many"),
        "{problem}"
    );
    assert_eq!(refused["waiting_for_restart"], waiting);
    assert!(
        server.log().contains("nothing was taken"),
        "{}",
        server.log()
    );

    // Settings that are right, with a certificate that is not: nothing is taken either.
    room.write("no.pem", "nothing");
    fs::write(
        &path,
        "[limits]\nttl_max = \"9d\"\n[log]\nlevel = \"error\"\n[tls]\ncert = \"no.pem\"\nkey = \"no.pem\"\n",
    )
    .unwrap();
    server.signal(Signal::HUP);
    let refused = until("the reload is refused", || {
        Some(status()).filter(|status| status["refused"] == 2)
    });
    let problem = refused["last_reload"]["problems"][0].as_str().unwrap();
    assert!(problem.contains("no.pem"), "{problem}");
    assert_eq!(ask()["limits"]["ttl_max_s"], 10 * 86_400);
    until("the level of before holds", || {
        server
            .log()
            .lines()
            .rev()
            .take(5)
            .any(|line| line.contains("\"answered\""))
            .then_some(())
    });
    server.stop();
}

#[test]
fn the_description_loads_nothing_from_elsewhere_under_a_policy_that_says_so() {
    let room = Room::new();
    let server = room.serve();
    let (head, page) = get(&room, "/docs");
    let head = head.to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    for line in [
        "content-type: text/html; charset=utf-8",
        "content-security-policy: default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; \
         form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "x-frame-options: deny",
        "referrer-policy: no-referrer",
    ] {
        assert!(head.contains(line), "{line}: {head}");
    }
    assert!(page.starts_with("<!doctype html>") && page.contains("/v1/pings"));
    // Whatever it loads comes from here and is there.
    let mut loaded = Vec::new();
    for attribute in ["src=\"", "href=\""] {
        for target in page.split(attribute).skip(1) {
            let target = target.split_once('"').unwrap().0;
            assert!(
                target.starts_with('#') || target.starts_with('/') && !target.starts_with("//"),
                "{target}"
            );
            if target.starts_with('/') && !loaded.contains(&target) {
                loaded.push(target);
            }
        }
    }
    for needed in ["/docs/style.css", "/docs/icon.svg"] {
        assert!(loaded.contains(&needed), "{loaded:?}");
    }
    for target in loaded {
        let (head, body) = get(&room, target);
        assert!(head.starts_with("HTTP/1.1 200"), "{target}: {head}");
        assert!(
            !body.contains("url(") && !body.contains("@import"),
            "{target}"
        );
    }
    assert!(!page.contains("<script") && !page.contains(" style="));
    // Not on the listener of backends.
    let (head, _) = ask(address(&room, "api"), "GET /docs HTTP/1.1\r\n", "");
    assert!(head.starts_with("HTTP/1.1 404"), "{head}");
    server.stop();
}

#[test]
fn one_ping_can_be_followed_through_the_log_by_its_trace() {
    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
    const SECRET: &str = "the content is nobody's business";
    let room = Room::new();
    let server = room.serve();
    let device = room.ask(&["device", "add", "--user", "anna"])["device"].clone();
    let key = fs::read_to_string(room.data().join("bootstrap.key")).unwrap();
    let api = address(&room, "api");
    let ping = |traceparent: &str, request: &str| {
        let head = format!(
            "POST /v1/pings HTTP/1.1\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ntraceparent: \
             {traceparent}\r\nx-request-id: {request}\r\n",
            key.trim()
        );
        let body = format!(r#"{{"to":{{"device":{device}}},"body":"{SECRET}"}}"#);
        let (head, body) = ask(api, &head, &body);
        assert!(head.contains(&format!("x-request-id: {request}")), "{head}");
        let body: Value = serde_json::from_str(&body).unwrap();
        body["id"].as_str().unwrap().to_owned()
    };
    let lines = |id: &str| {
        server
            .log()
            .lines()
            .filter(|line| line.contains(id))
            .map(|line| serde_json::from_str::<Value>(line).unwrap())
            .collect::<Vec<_>>()
    };
    let sampled = ping(&format!("00-{TRACE}-00f067aa0ba902b7-01"), "order-17");
    let quiet = ping(&format!("00-{TRACE}-00f067aa0ba902b7-00"), "order-18");
    let broken = ping(&format!("00-{TRACE}-00f067aa0ba902b7-01-"), "order-19");
    // Taken back: that is an outcome too.
    let device = device.as_str().unwrap();
    room.run(&["device", "revoke", device]).good();
    let told = until("the outcome is logged", || {
        Some(lines(&sampled)).filter(|lines| lines.len() == 2)
    });
    assert_eq!(told[0]["message"], "a ping was accepted");
    assert_eq!(told[0]["devices"], 1);
    assert_eq!(told[1]["message"], "a notification ended");
    assert_eq!(
        (&told[1]["outcome"], &told[1]["device"]),
        (&"revoked".into(), &device.into())
    );
    for line in &told {
        assert_eq!(
            (&line["trace_id"], &line["level"]),
            (&TRACE.into(), &"INFO".into())
        );
        assert_eq!(line["span_id"], told[0]["span_id"]);
        assert_eq!(line["request_id"], "order-17");
    }
    assert_eq!(told[0]["span_id"].as_str().unwrap().len(), 16);
    assert_ne!(told[0]["span_id"], "00f067aa0ba902b7");
    // Those that nobody samples are no lines at `info`.
    assert_eq!((lines(&quiet).len(), lines(&broken).len()), (0, 0));
    assert!(!server.log().contains(SECRET));
    server.stop();
}

/// Another certificate for this machine, and its key.
fn renewed() -> (Vec<u8>, Vec<u8>) {
    let now = time::OffsetDateTime::now_utc();
    let authority = DevAuthority::generate("renewed", Validity::authority(now).unwrap()).unwrap();
    let names = ["localhost".parse().unwrap()];
    let issued = authority
        .server(&names, Validity::leaf(now).unwrap())
        .unwrap();
    (
        issued.chain_pem.as_bytes().to_vec(),
        issued.key_pem.as_bytes().to_vec(),
    )
}

#[test]
fn the_doctor_looks_at_everything_with_and_without_a_server() {
    let room = Room::new();
    let look = || {
        let said = room.run(&["doctor", "--json"]);
        let found = said.json();
        assert_eq!(found["ok"] == true, said.code == 0, "{found}");
        let list = found["findings"].as_array().unwrap().clone();
        list.into_iter()
            .map(|finding| (finding["about"].as_str().unwrap().to_owned(), finding))
            .collect::<HashMap<_, _>>()
    };
    let before = look();
    for about in [
        "settings",
        "devices' certificate",
        "devices, TCP",
        "devices, UDP",
        "API, TCP",
        "operations, TCP",
        "clock",
        "volume",
        "free room",
        "disk sync",
        "open files",
        "memory",
    ] {
        let finding = before
            .get(about)
            .unwrap_or_else(|| panic!("{about}: {before:?}"));
        assert_eq!(
            finding["mark"] == "ok",
            finding["advice"].is_null(),
            "{finding}"
        );
    }
    for fine in ["devices, UDP", "devices, TCP", "disk sync"] {
        assert_ne!(before[fine]["mark"], "failed", "{before:?}");
    }
    assert!(!room.data().exists(), "it changes nothing");

    let server = room.serve();
    let during = look();
    assert!(
        during["server"]["found"]
            .as_str()
            .unwrap()
            .contains(&server.pid().to_string())
    );
    for fine in [
        "server",
        "devices, TCP",
        "devices, UDP",
        "API, TCP",
        "shown to devices",
    ] {
        assert_eq!(during[fine]["mark"], "ok", "{during:?}");
    }
    // A certificate that was renewed and not reloaded.
    let (chain, key) = renewed();
    fs::write(room.data().join("dev-server.pem"), chain).unwrap();
    fs::write(room.data().join("dev-server-key.pem"), key).unwrap();
    let shown = look()["shown to devices"].clone();
    assert_eq!(shown["mark"], "warned", "{shown}");
    assert!(shown["advice"].as_str().unwrap().contains("reload"));
    let text = room.run(&["doctor"]);
    assert!(text.out.contains("QUIC handshake"), "{}", text.out);
    server.stop();

    let taken = UdpSocket::bind("127.0.0.1:0").unwrap();
    let said = room
        .command(&["doctor", "--json"])
        .env(
            "BELLWIRE__LISTEN__DEVICES",
            taken.local_addr().unwrap().to_string(),
        )
        .output()
        .unwrap();
    assert_eq!(said.status.code(), Some(1));
    assert!(
        String::from_utf8(said.stdout)
            .unwrap()
            .contains("in use by another program")
    );
}

/// Runs systemd's checker of units.
fn systemd_analyze(arguments: &[&str]) -> Output {
    Command::new("systemd-analyze")
        .args(arguments)
        .output()
        .unwrap_or_else(|error| {
            panic!(
                "systemd-analyze does not start ({error}); this test needs it: tests/run installs it, or: \
                 apt-get install systemd"
            )
        })
}

/// A file of `packaging/systemd`.
fn packaged(name: &str) -> String {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/systemd/");
    fs::read_to_string(format!("{folder}{name}")).unwrap()
}

/// The unit of `packaging/` as the systemd of this machine understands it.
fn unit_for_this_systemd() -> String {
    let version = String::from_utf8(systemd_analyze(&["--version"]).stdout).unwrap();
    let version: u32 = version.split_whitespace().nth(1).unwrap().parse().unwrap();
    let unit = packaged("bellwire.service");
    assert!(unit.contains("\nType=notify-reload\n"));
    if version < 253 {
        // It skips the word that it does not know, with a line that is no fault of the unit, and takes the drop-in's.
        let unit = unit.replace("Type=notify-reload\n", "");
        format!("{unit}\n{}", packaged("before-253.conf"))
    } else {
        unit
    }
}

#[test]
fn systemd_finds_nothing_wrong_with_the_unit_and_rates_it_safe() {
    // What systemd-analyze calls "OK" ends at 1.9 of 10; the rest of the way is the network, which it is there for.
    const EXPOSURE_MAX_TENTHS: &str = "15";
    let unit = unit_for_this_systemd();
    let room = Room::new();
    let unit = unit.replace("/usr/local/bin/bellwire", env!("CARGO_BIN_EXE_bellwire"));
    let path = room.write("bellwire.service", &unit);
    let with_credentials = format!("{unit}\n{}", packaged("credentials.conf"));
    let second = room.write("bellwire-credentials.service", &with_credentials);
    for path in [path, second] {
        let path = path.to_str().unwrap();
        let said = systemd_analyze(&["verify", "--man=no", path]);
        let text = String::from_utf8(said.stderr).unwrap();
        // Other units of the machine are not ours to judge.
        let ours: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("bellwire"))
            .collect();
        assert!(said.status.success() && ours.is_empty(), "{text}");
        let threshold = format!("--threshold={EXPOSURE_MAX_TENTHS}");
        let said = systemd_analyze(&["security", "--offline=yes", "--no-pager", &threshold, path]);
        let text = String::from_utf8(said.stdout).unwrap();
        assert!(said.status.success(), "{text}");
    }
}
