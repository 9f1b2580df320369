//! A device that moves between networks: the real binaries in two network namespaces that are joined by two links. It needs
//! root, `ip` (Debian: iproute2) and a kernel that permits namespaces; where one is missing it fails and says so.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::process::Stdio;
use std::time::Duration;

use bellwire_tests::real::{PATIENCE, Site, binary};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// Where the server is, on every link.
const SERVER: &str = "10.213.0.1";

/// Two namespaces, joined by the links `wifi` (10.213.1.0/24) and `mobile` (10.213.2.0/24). They go with it.
struct Networks {
    server: String,
    device: String,
}

fn ip(arguments: &str) {
    let output = std::process::Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("ip is missing: tests/run installs it (apt-get install iproute2)");
    assert!(
        output.status.success(),
        "ip {arguments}: {} (network namespaces need root)",
        String::from_utf8_lossy(&output.stderr)
    );
}

impl Networks {
    fn new() -> Self {
        let pid = std::process::id();
        let networks = Self {
            server: format!("bellwire-server-{pid}"),
            device: format!("bellwire-device-{pid}"),
        };
        let Self { server, device } = &networks;
        ip(&format!("netns add {server}"));
        ip(&format!("netns add {device}"));
        for (number, link) in [(1, "wifi"), (2, "mobile")] {
            ip(&format!(
                "-n {server} link add {link} type veth peer name {link} netns {device}"
            ));
            for (namespace, host) in [(server, 1), (device, 2)] {
                ip(&format!(
                    "-n {namespace} address add 10.213.{number}.{host}/24 dev {link}"
                ));
                ip(&format!("-n {namespace} link set {link} up"));
            }
        }
        ip(&format!("-n {server} link set lo up"));
        ip(&format!("-n {server} address add {SERVER}/32 dev lo"));
        ip(&format!("-n {device} link set lo up"));
        networks.route("wifi");
        networks
    }

    /// The device's way out is this link.
    fn route(&self, link: &str) {
        let gateway = match link {
            "wifi" => "10.213.1.1",
            _ => "10.213.2.1",
        };
        ip(&format!(
            "-n {} route replace default via {gateway} dev {link}",
            self.device
        ));
    }

    fn set(&self, link: &str, state: &str) {
        ip(&format!("-n {} link set {link} {state}", self.device));
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for namespace in [&self.server, &self.device] {
            let _ = std::process::Command::new("ip")
                .args(["netns", "delete", namespace])
                .status();
        }
    }
}

/// `bellwire-device listen` in the device's namespace.
struct Device {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// Everything that it printed, in order.
    seen: Vec<Value>,
}

impl Device {
    fn start(networks: &Networks, site: &Site, server: &str, carrier: &str) -> Self {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &networks.device])
            .arg(binary("bellwire-device"))
            .args(["listen", "--json", "--carrier", carrier])
            .args(["--server", server, "--ca"])
            .arg(site.dir().join("pki/dev-ca.pem"))
            .arg("--credentials")
            .arg(site.dir().join("ann.json"))
            .arg("--state-dir")
            .arg(site.dir().join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self {
            child,
            lines,
            seen: Vec::new(),
        }
    }

    /// Reads until there is an event of this name that is `like` it.
    async fn until(&mut self, name: &str, like: impl Fn(&Value) -> bool) -> Value {
        let reading = async {
            while let Some(line) = self.lines.next_line().await.unwrap() {
                let event: Value = serde_json::from_str(&line).unwrap();
                self.seen.push(event.clone());
                if event["event"] == name && like(&event) {
                    return event;
                }
            }
            panic!("it ended");
        };
        let read = tokio::time::timeout(PATIENCE, reading).await;
        read.unwrap_or_else(|_| panic!("no `{name}` in {:#?}", self.seen))
    }

    async fn notified(&mut self, body: &str) {
        // It may have come before what was waited for last.
        let shown = |event: &Value| event["event"] == "notification" && event["body"] == body;
        if !self.seen.iter().any(shown) {
            self.until("notification", shown).await;
        }
    }

    fn named(&self, name: &str) -> Vec<&Value> {
        let named = self.seen.iter().filter(|event| event["event"] == name);
        named.collect()
    }

    async fn leave(mut self) -> Vec<Value> {
        let pid = rustix::process::Pid::from_raw(self.child.id().unwrap() as i32).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.until("stopped", |_| true).await;
        let status = tokio::time::timeout(PATIENCE, self.child.wait()).await;
        assert!(status.unwrap().unwrap().success());
        self.seen
    }
}

/// A command of the server's host, which must succeed.
fn admin(site: &Site, arguments: &[&str]) {
    let output = site.command().args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn ping(site: &Site, body: usize) {
    admin(
        site,
        &["ping", "--user", "ann", "--body", &body.to_string()],
    );
}

/// A server, its device, and one notification that has arrived.
fn place(networks: &Networks) -> (Site, bellwire_tests::real::Server) {
    let site = Site::new()
        .in_namespace(&networks.server)
        .with("LISTEN__DEVICES", "0.0.0.0:0")
        .with("TLS__CERT", "pki/server.pem")
        .with("TLS__KEY", "pki/server-key.pem");
    admin(&site, &["certs", "make", "--name", SERVER, "--dir", "pki"]);
    let server = site.start();
    admin(
        &site,
        &["device", "add", "--user", "ann", "--out", "ann.json"],
    );
    (site, server)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_session_moves_to_another_network_and_loses_and_doubles_nothing() {
    let networks = Networks::new();
    let (site, server) = place(&networks);
    let address = format!("{SERVER}:{}", server.listen().devices.port());
    let mut device = Device::start(&networks, &site, &address, "quic");
    device.until("connected", |_| true).await;
    for body in 0..5 {
        ping(&site, body);
    }
    device.notified("4").await;

    // Out of the house: the link is gone before there is another way, and notifications come in meanwhile.
    networks.set("wifi", "down");
    for body in 5..10 {
        ping(&site, body);
    }
    networks.route("mobile");
    device.until("moved", |_| true).await;
    device.notified("9").await;
    for body in 10..15 {
        ping(&site, body);
    }
    device.notified("14").await;

    // And back, with both links up for a while.
    networks.set("wifi", "up");
    networks.route("wifi");
    for body in 15..20 {
        ping(&site, body);
    }
    device.until("moved", |_| true).await;
    device.notified("19").await;
    networks.set("mobile", "down");
    ping(&site, 20);
    device.notified("20").await;

    assert_eq!(device.named("connected").len(), 1, "{:#?}", device.seen);
    assert!(
        device.named("disconnected").is_empty(),
        "{:#?}",
        device.seen
    );
    let seen = device.leave().await;
    let bodies: Vec<_> = seen
        .iter()
        .filter(|event| event["event"] == "notification")
        .map(|event| event["body"].as_str().unwrap().to_owned())
        .collect();
    let expected: Vec<_> = (0..=20).map(|body: usize| body.to_string()).collect();
    assert_eq!(bodies, expected);
    // Two networks are remembered, each with the carrier.
    let known = std::process::Command::new(binary("bellwire-device"))
        .args(["status", "--json", "--state-dir"])
        .arg(site.dir().join("state"))
        .output()
        .unwrap();
    let known: Value = serde_json::from_slice(&known.stdout).unwrap();
    assert_eq!(known["devices"][0]["in_use"], false);
    assert!(
        !known["devices"][0]["networks"]
            .as_array()
            .unwrap()
            .is_empty()
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_session_is_replaced_within_seconds_after_a_move() {
    let networks = Networks::new();
    let (site, server) = place(&networks);
    let address = format!("{SERVER}:{}", server.listen().devices.port());
    let mut device = Device::start(&networks, &site, &address, "websocket");
    let first = device.until("connected", |_| true).await;
    ping(&site, 0);
    device.notified("0").await;
    networks.set("wifi", "down");
    ping(&site, 1);
    networks.route("mobile");
    let moved = tokio::time::Instant::now();
    device.until("moved", |_| true).await;
    let again = device.until("connected", |_| true).await;
    // TCP by itself would wait for minutes, the sign of life as well.
    assert!(moved.elapsed() < Duration::from_secs(45));
    assert!(again["session"].as_u64() > first["session"].as_u64());
    device.notified("1").await;
    let seen = device.leave().await;
    let bodies = seen.iter().filter(|event| event["event"] == "notification");
    assert_eq!(bodies.count(), 2);
    server.stop().await;
}
