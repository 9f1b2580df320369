//! The directory and the server process of a demonstration. Whatever happens, no process is left behind.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bellwire_server::config::ENV_PREFIX;
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::process::{Child, ChildStdin, Command};
use tokio::time::{sleep, timeout};

use super::screen::Screen;
use crate::cli::{Api, BOOTSTRAP_KEY, DEV_CA, Failure, ListenFile};

/// Longest time for a start, on a slow machine that builds something else meanwhile.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often it is looked whether the server is ready.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// Longest time for a stop in order: the drain window below, and what devices and requests may take.
const STOP_LIMIT: Duration = Duration::from_secs(30);
/// Lines of the server's log that are shown when it fails.
const LOG_LINES: usize = 12;

/// Where it all takes place.
pub(super) struct Stage {
    root: Root,
    server: Option<Child>,
    /// Held open as long as the server is to run: it stops when this ends.
    leash: Option<ChildStdin>,
    listen: Option<ListenFile>,
}

/// The directory: gone at the end, or kept because somebody named it.
enum Root {
    Temporary(TempDir),
    Named(PathBuf),
}

impl Root {
    fn path(&self) -> &Path {
        match self {
            Root::Temporary(dir) => dir.path(),
            Root::Named(dir) => dir,
        }
    }
}

impl Stage {
    /// A directory to work in.
    pub(super) fn new(named: Option<&Path>) -> Result<Stage, Failure> {
        let unusable = |path: &Path, error: &std::io::Error| {
            Failure::new(
                format!("{} cannot be used: {error}", path.display()),
                "name a directory that is new or empty with --dir",
            )
        };
        let root = match named {
            None => Root::Temporary(
                tempfile::Builder::new()
                    .prefix("bellwire-demo-")
                    .tempdir()
                    .map_err(|error| unusable(&std::env::temp_dir(), &error))?,
            ),
            Some(path) => {
                fs::create_dir_all(path).map_err(|error| unusable(path, &error))?;
                let mut entries = fs::read_dir(path).map_err(|error| unusable(path, &error))?;
                if entries.next().is_some() {
                    return Err(Failure::usage(
                        format!("{} is not empty", path.display()),
                        "name a directory that is new or empty with --dir",
                    ));
                }
                // The server runs with another working directory.
                Root::Named(
                    path.canonicalize()
                        .map_err(|error| unusable(path, &error))?,
                )
            }
        };
        Ok(Stage {
            root,
            server: None,
            leash: None,
            listen: None,
        })
    }

    /// The directory.
    pub(super) fn path(&self) -> &Path {
        self.root.path()
    }

    /// The server's data directory.
    pub(super) fn data(&self) -> PathBuf {
        self.path().join("data")
    }

    /// The file with the server's first API key.
    pub(super) fn key_file(&self) -> PathBuf {
        self.data().join(BOOTSTRAP_KEY)
    }

    /// The authority that devices trust.
    pub(super) fn ca(&self) -> PathBuf {
        self.data().join(DEV_CA)
    }

    fn log(&self) -> PathBuf {
        self.path().join("server.log")
    }

    /// The end of the server's log, as advice.
    pub(super) fn log_hint(&self) -> String {
        let text = fs::read_to_string(self.log()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = &lines[lines.len().saturating_sub(LOG_LINES)..];
        if tail.is_empty() {
            "the server wrote no log".to_owned()
        } else {
            format!("the end of the server's log:\n    {}", tail.join("\n    "))
        }
    }

    /// Starts the server and waits until it is ready. The second time it listens where it listened before.
    pub(super) async fn start(&mut self) -> Result<&ListenFile, Failure> {
        let mut child = self.spawn()?;
        // Waiting for a child would close it.
        self.leash = child.stdin.take();
        let child = self.server.insert(child);
        let data = self.root.path().join("data");
        let ready = async {
            loop {
                if let Some(listen) = ListenFile::read(&data)? {
                    // One from before a crash names another process.
                    if Some(listen.pid) == child.id() {
                        return Ok(Some(listen));
                    }
                }
                if matches!(child.try_wait(), Ok(Some(_)) | Err(_)) {
                    return Ok(None);
                }
                sleep(LOOK_EVERY).await;
            }
        };
        match timeout(START_LIMIT, ready).await {
            Ok(Ok(Some(listen))) => Ok(self.listen.insert(listen)),
            Ok(Ok(None)) => Err(Failure::new("the server did not start", self.log_hint())),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::new(
                format!(
                    "the server was not ready within {} s",
                    START_LIMIT.as_secs()
                ),
                self.log_hint(),
            )),
        }
    }

    fn spawn(&self) -> Result<Child, Failure> {
        let unable = |error: std::io::Error| {
            Failure::new(
                format!("the server process cannot be started: {error}"),
                "look at the limits of this user",
            )
        };
        let program = std::env::current_exe().map_err(unable)?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .map_err(unable)?;
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with(ENV_PREFIX) {
                command.env_remove(name);
            }
        }
        let any = "127.0.0.1:0".to_owned();
        let (devices, api, operations) = match &self.listen {
            Some(listen) => (
                listen.devices.to_string(),
                listen.api.to_string(),
                listen.operations.to_string(),
            ),
            None => (any.clone(), any.clone(), any),
        };
        command
            .arg("serve")
            .arg("--until-stdin-ends")
            // No settings file of where the demonstration was started.
            .current_dir(self.path())
            .env("BELLWIRE__DATA_DIR", self.data())
            // It lasts a minute, wherever the temporary directory lies.
            .env("BELLWIRE__STORE__TRUST_FILE_SYSTEM", "true")
            .env("BELLWIRE__LISTEN__DEVICES", devices)
            .env("BELLWIRE__LISTEN__API", api)
            .env("BELLWIRE__LISTEN__OPERATIONS", operations)
            .env("BELLWIRE__DRAIN__WINDOW", "1s")
            .env("BELLWIRE__LOG__FORMAT", "text")
            // A demonstration on a full laptop is still one.
            .env("BELLWIRE__STORE__RESERVE_BYTES", "16MiB")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(log)
            // Ctrl-C is for us: the server is stopped in order afterwards.
            .process_group(0)
            .kill_on_drop(true);
        command.spawn().map_err(unable)
    }

    /// The API with the bootstrap key.
    pub(super) fn api(&self) -> Result<Api, Failure> {
        let key = fs::read_to_string(self.key_file()).map_err(|error| {
            Failure::new(
                format!("{}: {error}", self.key_file().display()),
                "the server should have written it at its first start",
            )
        })?;
        Api::new(&self.listening()?.api_url(), key.trim(), None)
    }

    /// Where the server listens.
    pub(super) fn listening(&self) -> Result<&ListenFile, Failure> {
        self.listen
            .as_ref()
            .ok_or_else(|| Failure::new("the server was not started", "please report it"))
    }

    /// Kills the server with SIGKILL: no drain, no last commit, nothing.
    pub(super) async fn crash(&mut self) -> Result<(), Failure> {
        let Some(mut child) = self.server.take() else {
            return Err(Failure::new(
                "there is no server to kill",
                "please report it",
            ));
        };
        child.kill().await.map_err(|error| {
            Failure::new(
                format!("the server cannot be killed: {error}"),
                "please report it",
            )
        })
    }

    /// Waits until the server ends by itself.
    pub(super) async fn server_ended(&mut self) {
        match &mut self.server {
            // Whatever the answer, the process is gone.
            Some(child) => drop(child.wait().await),
            None => std::future::pending().await,
        }
    }

    /// Stops the server in order, and takes the directory away unless somebody named it.
    pub(super) async fn stop(mut self, screen: &Screen) -> Result<(), Failure> {
        let ended = match self.server.take() {
            Some(child) => self.end(child).await,
            None => Ok(()),
        };
        match self.root {
            Root::Named(path) => screen.note(&format!("everything is kept in {}", path.display())),
            Root::Temporary(dir) => {
                let path = dir.path().to_owned();
                dir.close().map_err(|error| {
                    Failure::new(
                        format!("{} cannot be removed: {error}", path.display()),
                        "remove it by hand",
                    )
                })?;
            }
        }
        ended
    }

    async fn end(&self, mut child: Child) -> Result<(), Failure> {
        let pid = child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .and_then(Pid::from_raw);
        if let Some(pid) = pid {
            // It may have ended by itself a moment ago; waiting tells.
            let _ = kill_process(pid, Signal::TERM);
        }
        match timeout(STOP_LIMIT, child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(Failure::new(
                format!("the server ended with {status}"),
                self.log_hint(),
            )),
            Ok(Err(error)) => Err(Failure::new(
                format!("the server's end is unknown: {error}"),
                self.log_hint(),
            )),
            Err(_) => {
                // Killed when `child` is dropped.
                Err(Failure::new(
                    format!(
                        "the server did not stop within {} s and was killed",
                        STOP_LIMIT.as_secs()
                    ),
                    self.log_hint(),
                ))
            }
        }
    }
}
