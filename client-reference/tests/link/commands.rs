//! `bellwire-device status`, `doctor` and `bench-one` as processes: what they print for programs, and how they end.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use bellwire_client::Code;
use serde_json::Value;
use tokio::process::Command;

use crate::support::{DEVICE, Everyone, FakeServer, NOW_MS, PATIENCE, Udp, notify};

/// What a device is given, and where it keeps its state.
struct Place {
    dir: tempfile::TempDir,
}

/// How a command ended.
struct Ended {
    code: i32,
    out: String,
    err: String,
}

impl Ended {
    /// Its only line.
    fn json(&self) -> Value {
        assert_eq!(self.out.trim_end().lines().count(), 1, "{}", self.out);
        serde_json::from_str(&self.out).unwrap()
    }

    #[track_caller]
    fn with(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\n{}", self.out, self.err);
        self
    }
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let credentials = format!(r#"{{"device":"{DEVICE}","secret":"very-secret"}}"#);
        std::fs::write(dir.path().join("anna.json"), credentials).unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn state(&self) -> PathBuf {
        self.path("state")
            .join("bellwire-device")
            .join(DEVICE.to_string())
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bellwire-device"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("BELLWIRE") {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .env("XDG_STATE_HOME", self.path("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Ended {
        let output = tokio::time::timeout(3 * PATIENCE, self.command(arguments).output());
        let output = output.await.expect("it does not end").unwrap();
        let ended = Ended {
            code: output.status.code().expect("it was killed"),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        assert!(!ended.out.contains("very-secret") && !ended.err.contains("very-secret"));
        ended
    }

    /// The same with the way to a server, and who the device is.
    async fn run_at(&self, server: &FakeServer, arguments: &[&str]) -> Ended {
        let address = format!("localhost:{}", server.address.port());
        // Several servers may be asked at once.
        let ca = self.text(&format!("ca-{}.pem", server.address.port()));
        std::fs::write(&ca, &server.ca_pem).unwrap();
        let credentials = self.text("anna.json");
        let mut all = arguments.to_vec();
        all.extend(["--server", &address, "--ca", &ca]);
        if !arguments.contains(&"--without-credentials") {
            all.extend(["--credentials", &credentials]);
        }
        all.retain(|argument| *argument != "--without-credentials");
        self.run(&all).await
    }
}

fn check<'a>(diagnosis: &'a Value, name: &str) -> &'a Value {
    let checks = diagnosis["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap()
}

#[track_caller]
fn results(diagnosis: &Value, expected: &[(&str, &str)]) {
    let checks = diagnosis["checks"].as_array().unwrap().iter();
    let found: Vec<_> = checks
        .map(|check| {
            assert!(check["took_ms"].is_u64() && check["detail"].is_string());
            // What failed comes with advice, and nothing else does.
            let advised = !check["advice"].as_str().unwrap().is_empty();
            assert_eq!(advised, check["result"] == "failed", "{check}");
            (
                check["name"].as_str().unwrap(),
                check["result"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(found, expected, "{diagnosis}");
}

#[tokio::test]
async fn doctor_finds_everything_in_order_and_says_hello_only_with_credentials() {
    let place = Place::new();
    let mut server = FakeServer::start(Udp::Quic).await;
    let everyone = server.welcome_everyone(Everyone::Now);
    let well = place.run_at(&server, &["doctor", "--json"]).await.with(0);
    let diagnosis = well.json();
    assert_eq!(diagnosis["health"], "good");
    results(
        &diagnosis,
        &[
            ("name", "ok"),
            ("proxy", "skipped"),
            ("tcp", "ok"),
            ("tls", "ok"),
            ("websocket", "ok"),
            ("udp", "ok"),
            ("hello", "ok"),
            ("clock", "ok"),
        ],
    );
    let detail = check(&diagnosis, "hello")["detail"].as_str().unwrap();
    assert!(detail.contains("welcome over quic"), "{detail}");
    assert_eq!(everyone.hellos(), 1);
    let anonymous = ["doctor", "--json", "--without-credentials"];
    let without = place.run_at(&server, &anonymous).await.with(0).json();
    assert_eq!(check(&without, "hello")["result"], "skipped");
    assert_eq!(everyone.hellos(), 1);
    // For people: a line for each step, and what it means.
    let lines = place.run_at(&server, &["doctor"]).await.with(0).out;
    assert!(lines.ends_with("everything works\n"), "{lines}");
    assert_eq!(lines.lines().count(), 9, "{lines}");
    assert!(!lines.contains('\u{1b}'), "{lines}");
}

#[tokio::test]
async fn doctor_tells_what_is_limited_what_is_refused_and_what_is_unreachable() {
    let place = Place::new();
    let mut blocked = FakeServer::start(Udp::Blackhole).await;
    let _everyone = blocked.welcome_everyone(Everyone::Now);
    let mut early = FakeServer::start(Udp::Quic).await;
    let _everyone_early = early.welcome_everyone(Everyone::At(NOW_MS));
    let mut strict = FakeServer::start(Udp::Quic).await;
    let _everyone_strict = strict.welcome_everyone(Everyone::Refused(Code::Unauthorized));
    let gone = FakeServer::start(Udp::Blackhole).await;
    let gone = gone.without_tcp().await;
    let json = ["doctor", "--json"];
    let (limited, skewed, refused, unreachable) = tokio::join!(
        place.run_at(&blocked, &json),
        place.run_at(&early, &json),
        place.run_at(&strict, &json),
        place.run_at(&gone, &json),
    );

    let limited = limited.with(5).json();
    assert_eq!(limited["health"], "limited");
    assert_eq!(check(&limited, "udp")["result"], "failed");
    let advice = check(&limited, "udp")["advice"].as_str().unwrap();
    assert!(advice.contains("UDP may be blocked"), "{advice}");
    assert_eq!(check(&limited, "hello")["result"], "ok");

    let skewed = skewed.with(5).json();
    assert_eq!(check(&skewed, "clock")["result"], "failed");
    let detail = check(&skewed, "clock")["detail"].as_str().unwrap();
    assert!(detail.contains("ahead of the server's"), "{detail}");

    let refused = refused.with(3).json();
    assert_eq!(refused["health"], "refused");
    let detail = check(&refused, "hello")["detail"].as_str().unwrap();
    assert!(detail.contains("unauthorized"), "{detail}");

    let unreachable = unreachable.with(4).json();
    assert_eq!(unreachable["health"], "unreachable");
    results(
        &unreachable,
        &[
            ("name", "ok"),
            ("proxy", "skipped"),
            ("tcp", "failed"),
            ("tls", "skipped"),
            ("websocket", "skipped"),
            ("udp", "failed"),
            ("hello", "skipped"),
            ("clock", "skipped"),
        ],
    );
}

#[tokio::test]
async fn doctor_does_not_take_the_place_of_a_client_that_runs_and_bench_one_refuses_to() {
    let place = Place::new();
    let mut server = FakeServer::start(Udp::Quic).await;
    let everyone = server.welcome_everyone(Everyone::Now);
    std::fs::write(place.path("ca.pem"), &server.ca_pem).unwrap();
    let address = format!("localhost:{}", server.address.port());
    let (ca, credentials) = (place.text("ca.pem"), place.text("anna.json"));
    let mut listening = place
        .command(&[
            "listen",
            "--json",
            "--carrier",
            "quic",
            "--server",
            &address,
            "--ca",
            &ca,
            "--credentials",
            &credentials,
        ])
        .spawn()
        .unwrap();
    everyone.at_least(1).await;
    let diagnosis = place.run_at(&server, &["doctor", "--json"]).await.with(0);
    let hello = check(&diagnosis.json(), "hello").clone();
    assert_eq!(hello["result"], "skipped");
    let detail = hello["detail"].as_str().unwrap();
    assert!(detail.contains("would lose its session"), "{detail}");
    let bench = place.run_at(&server, &["bench-one"]).await.with(1);
    assert!(
        bench.err.contains("would lose its session"),
        "{}",
        bench.err
    );
    assert_eq!(everyone.hellos(), 1);

    // `status` sees it running, and sees that it was killed.
    let status = async || {
        let ended = place.run(&["status", "--json"]).await.with(0);
        let devices = ended.json()["devices"].as_array().unwrap().clone();
        assert_eq!(devices.len(), 1);
        devices[0].clone()
    };
    let running = status().await;
    assert_eq!(running["in_use"], true);
    assert_eq!(running["last_session"]["carrier"], "quic");
    assert_eq!(running["last_session"]["server"], address);
    assert!(running["last_session"]["ended_ms"].is_null());
    listening.kill().await.unwrap();
    let killed = status().await;
    assert_eq!(killed["in_use"], false);
    assert!(killed["last_session"]["ended_ms"].is_null());
    let text = place.run(&["status"]).await.with(0).out;
    assert!(text.contains("its process was killed"), "{text}");
}

#[tokio::test]
async fn a_wrong_setting_ends_with_1_and_wrong_arguments_with_2() {
    let place = Place::new();
    let server = FakeServer::start(Udp::Quic).await;
    let address = format!("localhost:{}", server.address.port());
    let at = ["--server", &address];
    let credentials = place.text("anna.json");
    for (arguments, code, says) in [
        (
            vec!["doctor", "--ca", "/nowhere/ca.pem"],
            1,
            "/nowhere/ca.pem",
        ),
        (vec!["doctor", "--proxy", "socks5://proxy:1"], 1, "SOCKS"),
        (
            vec!["doctor", "--credentials", "/nowhere.json"],
            1,
            "/nowhere.json",
        ),
        (vec!["bench-one"], 2, "--credentials"),
        (
            vec!["bench-one", "--credentials", &credentials, "--rounds", "0"],
            2,
            "--rounds",
        ),
        (vec!["doctor", "--proxy-when-needed"], 2, "--proxy"),
    ] {
        let ended = place.run(&[&arguments[..], &at[..]].concat()).await;
        assert!(ended.err.contains(says), "{arguments:?}: {}", ended.err);
        ended.with(code);
    }
    let ended = place.run(&["status", "--state-dir", "/nowhere"]).await;
    assert!(ended.err.contains("/nowhere"), "{}", ended.err);
    ended.with(1);
    for command in ["listen", "status", "doctor", "bench-one"] {
        let help = place.run(&[command, "--help"]).await.with(0).out;
        assert!(
            help.contains("Examples:") && help.contains("Exit codes:"),
            "{command}"
        );
    }
}

#[tokio::test]
async fn status_shows_what_is_on_disk_and_changes_nothing() {
    let place = Place::new();
    let none = place.run(&["status", "--json"]).await.with(0).json();
    assert_eq!(none["devices"].as_array().unwrap().len(), 0);
    let text = place.run(&["status"]).await.with(0).out;
    assert!(text.contains("No device of this user"), "{text}");

    let mut server = FakeServer::start(Udp::Quic).await;
    let listen = [
        "listen",
        "--json",
        "--carrier",
        "quic",
        "--count",
        "2",
        "--network",
        "home",
        "--decline",
        "not now",
    ];
    let ca = place.path("ca.pem");
    std::fs::write(&ca, &server.ca_pem).unwrap();
    let address = format!("localhost:{}", server.address.port());
    let (ca, credentials) = (place.text("ca.pem"), place.text("anna.json"));
    let way = [
        "--server",
        &address,
        "--ca",
        &ca,
        "--credentials",
        &credentials,
    ];
    let listen = [&listen[..], &way[..]].concat();
    let (ended, ()) = tokio::join!(place.run(&listen), async {
        let mut peer = server.accept().await;
        peer.welcome().await;
        peer.say([notify(1, 1), notify(2, 2)]).await;
        peer.goodbye().await;
    });
    ended.with(0);
    let before = contents(&place.state());
    let found = place.run(&["status", "--json"]).await.with(0).json();
    let device = &found["devices"][0];
    assert_eq!(device["in_use"], false);
    assert_eq!(device["window"]["state"], "intact");
    assert_eq!(device["window"]["remembered"], 2);
    assert_eq!(device["window"]["unconfirmed"], 0);
    assert_eq!(device["networks"][0]["name"], "home");
    assert_eq!(device["networks"][0]["carrier"], "quic");
    assert!(device["last_session"]["ended_ms"].is_u64());
    let text = place.run(&["status"]).await.with(0).out;
    for part in ["in order; 2 remembered", "network  home", "quic won"] {
        assert!(text.contains(part), "{text}");
    }

    // A window that is cut, one that is broken, one of a later version; none of them is touched.
    assert_eq!(contents(&place.state()), before);
    let window = place.state().join("window");
    let whole = std::fs::read(&window).unwrap();
    for (bytes, state) in [
        (whole[..whole.len() - 3].to_vec(), "torn"),
        ([b"RUBBISH!", &whole[8..]].concat(), "damaged"),
    ] {
        std::fs::write(&window, &bytes).unwrap();
        let credentials = place.text("anna.json");
        let one = ["status", "--json", "--credentials", &credentials];
        let found = place.run(&one).await.with(0).json();
        assert_eq!(found["devices"][0]["window"]["state"], state, "{found}");
        assert_eq!(std::fs::read(&window).unwrap(), bytes);
    }
    std::fs::write(place.state().join("networks.json"), "rubbish").unwrap();
    let found = place.run(&["status", "--json"]).await.with(0).json();
    assert!(found["devices"][0]["networks"].is_null(), "{found}");
}

/// Every file with its bytes.
fn contents(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut files: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .map(|path| (path.clone(), std::fs::read(path).unwrap()))
        .collect();
    files.sort();
    files
}

#[track_caller]
fn is_sorted(times: &Value) {
    let times: Vec<_> = ["min", "p50", "p90", "p99", "max"]
        .iter()
        .map(|name| times[name].as_u64().unwrap())
        .collect();
    assert!(times.is_sorted() && times[0] > 0, "{times:?}");
}

#[tokio::test]
async fn bench_one_measures_both_carriers_and_tells_what_failed() {
    let place = Place::new();
    let mut server = FakeServer::start(Udp::Quic).await;
    let everyone = server.welcome_everyone(Everyone::Now);
    let bench = ["bench-one", "--json", "--rounds", "5"];
    let measured = place.run_at(&server, &bench).await.with(0).json();
    assert_eq!(measured["measure"], "connections");
    let carriers = measured["carriers"].as_array().unwrap();
    assert_eq!(carriers.len(), 2);
    for (carrier, name) in carriers.iter().zip(["quic", "websocket"]) {
        assert_eq!(carrier["carrier"], name);
        assert_eq!(
            (&carrier["rounds"], &carrier["failed"]),
            (&5.into(), &0.into())
        );
        is_sorted(&carrier["link_us"]);
        is_sorted(&carrier["welcome_us"]);
    }
    assert_eq!(everyone.hellos(), 10);
    let trips = [
        &bench[..],
        &["--measure", "round-trips", "--carrier", "websocket"],
    ]
    .concat();
    let measured = place.run_at(&server, &trips).await.with(0).json();
    let carriers = measured["carriers"].as_array().unwrap();
    assert_eq!(carriers.len(), 1);
    is_sorted(&carriers[0]["round_trip_us"]);
    assert!(carriers[0]["link_us"].is_null());
    assert_eq!(everyone.hellos(), 11, "one session for all round trips");
    let people = place.run_at(&server, &["bench-one", "--rounds", "2"]).await;
    let table = people.with(0).out;
    assert_eq!(table.lines().count(), 5, "{table}");

    let mut strict = FakeServer::start(Udp::Quic).await;
    let refusing = strict.welcome_everyone(Everyone::Refused(Code::Unauthorized));
    let refused = place.run_at(&strict, &bench).await.with(3);
    assert!(refused.err.contains("unauthorized"), "{}", refused.err);
    assert_eq!(refusing.hellos(), 1, "it does not go on after a refusal");

    let mut moody = FakeServer::start(Udp::Quic).await;
    let _everyone = moody.welcome_everyone(Everyone::ButTheFirst);
    let partly = place.run_at(&moody, &bench).await.with(5).json();
    assert_eq!(partly["carriers"][0]["rounds"], 4);
    assert_eq!(partly["carriers"][0]["failed"], 1);
    assert!(partly["carriers"][0]["failure"].is_string());

    let gone = FakeServer::start(Udp::Blackhole).await.without_tcp().await;
    let websocket = [&bench[..], &["--carrier", "websocket"]].concat();
    let nothing = place.run_at(&gone, &websocket).await.with(4).json();
    assert_eq!(nothing["carriers"][0]["rounds"], 0);
    assert!(nothing["carriers"][0]["link_us"].is_null());
}
