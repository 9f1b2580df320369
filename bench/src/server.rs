//! The real server as a process of its own, on free ports and a fresh directory.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use crate::failure::{During, Failure, Outcome};

/// How long a server may take until it is ready.
const START_MAX: Duration = Duration::from_secs(120);

/// How long a server may take to end after SIGTERM before it is killed: cutting hundreds of thousands of devices is work.
const STOP_MAX: Duration = Duration::from_secs(180);

/// How often a condition of a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// How much of the server's log is shown when it did not start, in bytes.
const LOG_SHOWN_BYTES: usize = 4_000;

/// What the server writes to `listen.json`.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Listen {
    pub(crate) devices: SocketAddr,
    pub(crate) devices_plain: Option<SocketAddr>,
    pub(crate) api: SocketAddr,
    pub(crate) operations: SocketAddr,
    api_scheme: String,
    pid: u32,
}

/// A running server. Dropping it kills it.
pub(crate) struct Server {
    // Killed before its directory is removed.
    running: Running,
    pub(crate) listen: Listen,
    /// An API key with every scope.
    pub(crate) key: String,
    /// The authority that devices trust, PEM.
    pub(crate) authority: Vec<u8>,
    /// From its start until it was ready.
    pub(crate) opened: Duration,
    home: Home,
}

/// A server that does not run, with all that it keeps.
pub(crate) struct Stopped {
    listen: Listen,
    key: String,
    home: Home,
}

/// What outlives a process of the server.
struct Home {
    binary: PathBuf,
    settings: Vec<String>,
    directory: tempfile::TempDir,
}

/// A process, killed when this is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // One that has ended already does not mind.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The server to measure: what was asked for, or the one built beside this program.
pub(crate) fn binary(asked: Option<&Path>) -> Outcome<PathBuf> {
    let path = match asked {
        Some(path) => path.to_owned(),
        None => std::env::current_exe()
            .during("find this program's own path")?
            .with_file_name("bellwire"),
    };
    if path.is_file() {
        // The server runs in a directory of its own.
        return std::path::absolute(&path).during("find the server");
    }
    Err(Failure::new(format!(
        "there is no server at {}: run `cargo build --release --workspace` first, or name one with --server",
        path.display()
    )))
}

impl Server {
    /// Starts a server with nothing set but free ports, a directory, and `settings` such as
    /// `STORE__ENGINE=memory`, of which the later count, and waits until it is ready.
    pub(crate) async fn start(binary: &Path, settings: &[String]) -> Outcome<Server> {
        let directory = tempfile::Builder::new()
            .prefix("bellwire-bench-")
            .tempdir()
            .during("make a directory for the server")?;
        let home = Home {
            binary: binary.to_owned(),
            settings: settings.to_vec(),
            directory,
        };
        home.run(None, None).await
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.0.id()
    }

    /// Whether it still runs.
    pub(crate) fn check(&mut self) -> Outcome<()> {
        match self.running.0.try_wait().during("ask for the server")? {
            None => Ok(()),
            Some(status) => Err(Failure::new(format!("the server ended early ({status})"))),
        }
    }

    /// Kills it.
    pub(crate) fn kill(self) -> Stopped {
        drop(self.running);
        Stopped {
            listen: self.listen,
            key: self.key,
            home: self.home,
        }
    }

    /// Asks it to drain and waits for it, for some seconds; then kills it. True if it ended by itself with success.
    pub(crate) async fn stop(mut self) -> (bool, Stopped) {
        let pid = rustix::process::Pid::from_child(&self.running.0);
        let asked = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let give_up = Instant::now() + STOP_MAX;
        let mut good = false;
        while asked.is_ok() && Instant::now() < give_up {
            match self.running.0.try_wait() {
                Ok(Some(status)) => {
                    good = status.success();
                    break;
                }
                Ok(None) => tokio::time::sleep(LOOK_EVERY).await,
                Err(_) => break,
            }
        }
        (good, self.kill())
    }
}

impl Stopped {
    /// Starts it again, on the same ports.
    pub(crate) async fn start(self) -> Outcome<Server> {
        self.home.run(Some(&self.listen), Some(self.key)).await
    }
}

impl Home {
    fn data(&self) -> PathBuf {
        self.directory.path().join("data")
    }

    async fn run(self, ports: Option<&Listen>, key: Option<String>) -> Outcome<Server> {
        let data = self.data();
        let log_path = self.directory.path().join("server.log");
        let log = File::options()
            .create(true)
            .append(true)
            .open(&log_path)
            .during("make the server's log")?;
        let mut command = Command::new(&self.binary);
        for (name, _) in std::env::vars_os() {
            // A developer's own settings must not decide what is measured.
            if name.to_string_lossy().starts_with("BELLWIRE") {
                command.env_remove(name);
            }
        }
        let free = SocketAddr::from(([127, 0, 0, 1], 0));
        for (listener, address) in [
            ("DEVICES", ports.map(|ports| ports.devices)),
            ("API", ports.map(|ports| ports.api)),
            ("OPERATIONS", ports.map(|ports| ports.operations)),
        ] {
            let address = address.unwrap_or(free).to_string();
            command.env(format!("BELLWIRE__LISTEN__{listener}"), address);
        }
        for setting in &self.settings {
            let (key, value) = setting
                .split_once('=')
                .ok_or_else(|| Failure::new(format!("--set wants KEY=VALUE, not {setting}")))?;
            command.env(format!("BELLWIRE__{key}"), value);
        }
        let started = Instant::now();
        let child = command
            .arg("serve")
            .env("BELLWIRE__DATA_DIR", &data)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().during("share the server's log")?)
            .stderr(log)
            .spawn()
            .during(format_args!("start {}", self.binary.display()))?;
        // Owned from here on, so that every way out kills the process.
        let mut running = Running(child);
        let told = |what: &str| {
            let log = fs::read(&log_path).unwrap_or_default();
            let log = String::from_utf8_lossy(&log[log.len().saturating_sub(LOG_SHOWN_BYTES)..])
                .into_owned();
            Failure::new(format!("the server {what}; it wrote:\n{log}"))
        };
        let give_up = started + START_MAX;
        let listen = loop {
            let listen = fs::read(data.join("listen.json"))
                .ok()
                .and_then(|text| serde_json::from_slice::<Listen>(&text).ok());
            if let Some(listen) = listen.filter(|listen| listen.pid == running.0.id()) {
                break listen;
            }
            if let Some(status) = running.0.try_wait().during("ask for the server")? {
                return Err(told(&format!("ended at once ({status})")));
            }
            if Instant::now() > give_up {
                return Err(told("was not ready within two minutes"));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        };
        let opened = started.elapsed();
        if listen.api_scheme != "http" {
            return Err(Failure::new(
                "the API speaks TLS; this generator measures plain HTTP on loopback",
            ));
        }
        let key = match key {
            Some(key) => key,
            None => fs::read_to_string(data.join("bootstrap.key"))
                .during("read the server's bootstrap.key")?
                .trim_end()
                .to_owned(),
        };
        let authority = fs::read(data.join("dev-ca.pem")).during("read the server's dev-ca.pem")?;
        Ok(Server {
            running,
            listen,
            key,
            authority,
            opened,
            home: self,
        })
    }
}
