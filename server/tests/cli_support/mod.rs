//! The real binary in a directory of its own, with nothing of the tester's environment.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "shared by several test binaries, each using a part; what fails here fails the test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

/// Longest time for anything that a loaded machine must do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A fresh directory in which commands run.
pub(crate) struct Room {
    dir: TempDir,
}

/// What a command did.
pub(crate) struct Said {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Said {
    /// Standard output as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("no JSON ({error}): {}\n{}", self.out, self.err))
    }

    /// The same, for a command that must have gone well.
    pub(crate) fn good(self) -> Said {
        assert_eq!(self.code, 0, "out: {}\nerr: {}", self.out, self.err);
        self
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Said {
        Said {
            code: output.status.code().unwrap_or(-1),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Room {
    pub(crate) fn new() -> Room {
        Room {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.path().join("bellwire-data")
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path().join(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// A command in this directory, on free ports.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bellwire"));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("BELLWIRE") {
                command.env_remove(name);
            }
        }
        command
            .args(arguments)
            .current_dir(self.path())
            .env("BELLWIRE__LISTEN__DEVICES", "127.0.0.1:0")
            .env("BELLWIRE__LISTEN__API", "127.0.0.1:0")
            .env("BELLWIRE__LISTEN__OPERATIONS", "127.0.0.1:0")
            .env("BELLWIRE__STORE__RESERVE_BYTES", "1MiB")
            .env("BELLWIRE__DRAIN__WINDOW", "0s")
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Said {
        self.command(arguments).output().unwrap().into()
    }

    /// Runs a command of the API and takes its JSON.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Value {
        let mut with_json = arguments.to_vec();
        with_json.push("--json");
        self.run(&with_json).good().json()
    }

    /// Starts a server and waits until it has said everything that it says when it is ready.
    pub(crate) fn serve(&self) -> Server {
        self.serve_by(self.command(&["serve"]))
    }

    /// The same with a command of one's own.
    pub(crate) fn serve_by(&self, mut command: Command) -> Server {
        let out = self.path().join("serve.out");
        let err = self.path().join("serve.err");
        let child = command
            .stdout(fs::File::create(&out).unwrap())
            .stderr(fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let mut server = Server { child, out, err };
        let listen = self.data().join("listen.json");
        let pid = u64::from(server.child.id());
        until("the server is ready", || {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("the server ended with {status}: {}", server.log());
            }
            let text = fs::read_to_string(&listen).ok()?;
            let listen: Value = serde_json::from_str(&text).ok()?;
            (listen["pid"].as_u64() == Some(pid)).then_some(())?;
            // The line for people comes after the file for programs.
            server.out().contains(" is ready: ").then_some(())
        });
        server
    }
}

/// A server that runs; killed when dropped.
pub(crate) struct Server {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

impl Server {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(&self.err).unwrap()
    }

    pub(crate) fn out(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    /// Waits for the end; the exit code.
    pub(crate) fn end(&mut self) -> i32 {
        until("the server ends", || self.child.try_wait().unwrap())
            .code()
            .unwrap_or(-1)
    }

    /// Stops it in order.
    pub(crate) fn stop(mut self) {
        self.signal(Signal::TERM);
        assert_eq!(self.end(), 0, "{}", self.log());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It has ended already, or the test failed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Looks until there is something to see.
pub(crate) fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < give_up, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

pub(crate) fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}
