//! One server process and the directory it lives in.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::{Api, PATIENCE};

/// The path of a binary of this workspace, beside the running test.
///
/// # Panics
///
/// When it was not built: `tests/run` builds all of them, `cargo build --workspace` does as well.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running test has a path");
    let profile = test
        .ancestors()
        .nth(2)
        .expect("tests are built to target/PROFILE/deps");
    let path = profile.join(name);
    assert!(
        path.is_file(),
        "{} is missing: run `cargo build --workspace` first",
        path.display()
    );
    path
}

/// What a server writes to `listen.json`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Listen {
    /// Where devices connect, UDP and TCP.
    pub devices: SocketAddr,
    /// Where load balancers bring devices.
    #[serde(default)]
    pub devices_plain: Option<SocketAddr>,
    /// Where backends call.
    pub api: SocketAddr,
    /// Where operators look.
    pub operations: SocketAddr,
    /// `http` or `https`.
    pub api_scheme: String,
    /// The process.
    pub pid: u32,
}

/// A directory with settings, in which servers are started one after the other.
pub struct Site {
    dir: tempfile::TempDir,
    data: PathBuf,
    settings: Vec<(String, String)>,
    namespace: Option<String>,
}

impl Site {
    /// A fresh directory; nothing is set but free ports.
    ///
    /// # Panics
    ///
    /// When no directory can be made.
    #[must_use]
    pub fn new() -> Site {
        let dir = tempfile::tempdir().expect("a temporary directory can be made");
        let any = "127.0.0.1:0".to_owned();
        let settings = ["DEVICES", "API", "OPERATIONS"]
            .map(|name| (format!("BELLWIRE__LISTEN__{name}"), any.clone()));
        Site {
            data: dir.path().join("data"),
            dir,
            settings: settings.to_vec(),
            namespace: None,
        }
    }

    /// The same with the server's data somewhere else, such as on a disk that misbehaves.
    #[must_use]
    pub fn with_data(mut self, data: impl Into<PathBuf>) -> Site {
        self.data = data.into();
        self
    }

    /// Sets one key for servers started later, such as `LIMITS__MAILBOX_NOTIFICATIONS`.
    #[must_use]
    pub fn with(mut self, key: &str, value: &str) -> Site {
        self.set(key, value);
        self
    }

    /// Sets one key for servers started later.
    pub fn set(&mut self, key: &str, value: &str) {
        let key = format!("BELLWIRE__{key}");
        self.settings.retain(|(known, _)| *known != key);
        self.settings.push((key, value.to_owned()));
    }

    /// Runs everything in this network namespace, as `ip netns add` made it; only what runs there as well reaches it.
    #[must_use]
    pub fn in_namespace(mut self, name: &str) -> Site {
        self.namespace = Some(name.to_owned());
        self
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The data directory of the server.
    #[must_use]
    pub fn data(&self) -> PathBuf {
        self.data.clone()
    }

    /// A command of the `bellwire` binary with this site's settings and nothing else of ours in its environment.
    #[must_use]
    pub fn command(&self) -> Command {
        let mut command = match &self.namespace {
            None => Command::new(binary("bellwire")),
            Some(namespace) => {
                // It becomes the binary, under the same process id.
                let mut command = Command::new("ip");
                command
                    .args(["netns", "exec", namespace])
                    .arg(binary("bellwire"));
                command
            }
        };
        for (key, _) in std::env::vars_os() {
            if key.to_string_lossy().starts_with("BELLWIRE") {
                command.env_remove(key);
            }
        }
        command
            .current_dir(self.dir())
            .env("BELLWIRE__DATA_DIR", self.data())
            .stdin(Stdio::null());
        for (key, value) in &self.settings {
            command.env(key, value);
        }
        command
    }

    /// Starts a server and waits until it is ready.
    ///
    /// # Panics
    ///
    /// When it does not become ready; the message holds what it wrote.
    #[must_use]
    pub fn start(&self) -> Server {
        self.try_start().unwrap_or_else(|log| panic!("{log}"))
    }

    /// Starts a server and waits until it is ready, or has ended: then answers with how, and with what it wrote.
    ///
    /// # Errors
    ///
    /// When it ends.
    ///
    /// # Panics
    ///
    /// When it does neither in time.
    pub fn try_start(&self) -> Result<Server, String> {
        let log_path = self.dir().join(format!(
            "serve-{}.log",
            fs::read_dir(self.dir()).map_or(0, Iterator::count)
        ));
        let log = File::create(&log_path).expect("the test's directory can be written");
        let child = self
            .command()
            .arg("serve")
            .stdout(log.try_clone().expect("a file handle can be duplicated"))
            .stderr(log)
            .spawn()
            .expect("the server binary starts");
        let mut server = Server {
            child,
            log_path,
            data: self.data(),
            listen: None,
            ended: None,
        };
        let give_up = Instant::now() + PATIENCE;
        let path = self.data().join("listen.json");
        while server.listen.is_none() {
            let listen = fs::read(&path)
                .ok()
                .and_then(|text| serde_json::from_slice::<Listen>(&text).ok());
            // One left by a server that was killed names another process.
            server.listen = listen.filter(|listen| listen.pid == server.child.id());
            let ended = server.child.try_wait().expect("a child can be asked");
            if let Some(status) = ended {
                server.ended = ended;
                return Err(format!("the server ended with {status}:\n{}", server.log()));
            }
            assert!(
                Instant::now() < give_up,
                "the server is not ready:\n{}",
                server.log()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(server)
    }
}

impl Default for Site {
    fn default() -> Site {
        Site::new()
    }
}

/// A running server. Killed when dropped.
pub struct Server {
    child: Child,
    log_path: PathBuf,
    data: PathBuf,
    listen: Option<Listen>,
    ended: Option<ExitStatus>,
}

impl Server {
    /// Where it listens.
    ///
    /// # Panics
    ///
    /// Never: a server is handed out when it is ready.
    #[must_use]
    pub fn listen(&self) -> &Listen {
        self.listen
            .as_ref()
            .expect("a server is handed out when it is ready")
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log_path).unwrap_or_default()
    }

    /// The certificate authority that devices trust.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.data.join("dev-ca.pem")
    }

    /// Its API, with the bootstrap key.
    ///
    /// # Panics
    ///
    /// When the key cannot be read.
    #[must_use]
    pub fn api(&self) -> Api {
        let key = fs::read_to_string(self.data.join("bootstrap.key"))
            .expect("a first start writes a key");
        Api::new(self.listen().api, self.listen().operations, key.trim_end())
    }

    /// Sends a signal.
    ///
    /// # Panics
    ///
    /// When the process is gone already.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).expect("the server is there");
    }

    /// Kills it, as a power cut would, and waits until it is gone.
    pub fn kill(mut self) {
        self.end();
    }

    /// Asks it to drain and waits for its exit code.
    ///
    /// # Panics
    ///
    /// When it does not end.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal(rustix::process::Signal::TERM);
        let status = super::eventually("the server ends after SIGTERM", async || {
            self.child.try_wait().expect("a child can be asked")
        })
        .await;
        self.ended = Some(status);
        status
    }

    fn end(&mut self) {
        if self.ended.is_none() {
            let _gone = self.child.kill();
            self.ended = self.child.wait().ok();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            eprintln!("---- the server's log ----\n{}", self.log());
        }
    }
}
