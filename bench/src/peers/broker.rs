//! The servers that Bellwire is measured beside: where they are, how they are set up, and how they are started and ended.
//! bench/README.md says what each of them promises with these settings.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use bellwire_certs::{IfExists, write_private, write_public};
use serde::{Deserialize, Serialize};
use tokio::time::sleep;

use crate::failure::{During, Failure, Outcome};
use crate::server::Server;
use crate::tls::Identity;

/// How long a server may take until it listens.
const START_MAX: Duration = Duration::from_secs(30);

/// How long it may take to end after SIGTERM before it is killed.
const STOP_MAX: Duration = Duration::from_secs(15);

/// How often a condition of a process is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// How much of a log is shown when a server did not start, in bytes.
const LOG_SHOWN_BYTES: usize = 4_000;

/// Another program may take a port that was free a moment ago; so often another is tried.
const STARTS: usize = 3;

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Peer {
    /// The server of this project
    Bellwire,
    /// mosquitto: MQTT, quality of service 1, sessions that outlive their connections
    Mosquitto,
    /// nats-server: JetStream, synced at every message
    Nats,
}

impl Peer {
    pub(super) const ALL: [Peer; 3] = [Peer::Bellwire, Peer::Mosquitto, Peer::Nats];

    pub(super) fn name(self) -> &'static str {
        match self {
            Peer::Bellwire => "bellwire",
            Peer::Mosquitto => "mosquitto",
            Peer::Nats => "nats",
        }
    }
}

/// What a generator must know of a server.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Target {
    pub(super) peer: Peer,
    pub(super) pid: u32,
    /// Devices come here, by TLS.
    pub(super) devices: SocketAddr,
    /// Backends come here, without TLS.
    pub(super) backends: SocketAddr,
    /// The authority that devices trust, PEM.
    pub(super) authority: String,
    /// What backends of Bellwire show.
    pub(super) key: String,
    /// Streams of nats-server that messages are spread over.
    pub(super) streams: usize,
}

/// How a server is to be started.
pub(super) struct Start<'a> {
    pub(super) peer: Peer,
    pub(super) program: &'a Path,
    /// Settings of Bellwire.
    pub(super) settings: &'a [String],
    /// Seconds between two saves of mosquitto.
    pub(super) autosave: u32,
    /// `sync_interval` of nats-server.
    pub(super) nats_sync: &'a str,
    /// Streams of nats-server.
    pub(super) nats_streams: usize,
}

/// A server that runs. Dropping it kills it.
pub(super) enum Broker {
    Bellwire(Box<Server>, Target),
    Foreign(Box<Foreign>),
}

impl Broker {
    pub(super) async fn start(start: &Start<'_>) -> Outcome<Broker> {
        if start.peer == Peer::Bellwire {
            let server = Server::start(start.program, start.settings).await?;
            let target = Target {
                peer: Peer::Bellwire,
                pid: server.pid(),
                devices: server.listen.devices,
                backends: server.listen.api,
                authority: String::from_utf8_lossy(&server.authority).into_owned(),
                key: server.key.clone(),
                streams: 0,
            };
            return Ok(Broker::Bellwire(Box::new(server), target));
        }
        let mut tries = 1;
        loop {
            match Foreign::start(start).await {
                Ok(foreign) => return Ok(Broker::Foreign(Box::new(foreign))),
                Err(_) if tries < STARTS => tries += 1,
                Err(failure) => return Err(failure),
            }
        }
    }

    pub(super) fn target(&self) -> &Target {
        match self {
            Broker::Bellwire(_, target) => target,
            Broker::Foreign(foreign) => &foreign.target,
        }
    }

    /// Ends it. True if it ended by itself.
    pub(super) async fn stop(self) -> bool {
        match self {
            Broker::Bellwire(server, _) => server.stop().await.0,
            Broker::Foreign(foreign) => foreign.stop().await,
        }
    }
}

/// A server of somebody else's.
pub(super) struct Foreign {
    child: Child,
    target: Target,
    // Removed after the process has gone.
    _directory: tempfile::TempDir,
}

impl Foreign {
    async fn start(start: &Start<'_>) -> Outcome<Foreign> {
        let mut builder = tempfile::Builder::new();
        builder.prefix("bellwire-bench-");
        let directory = builder.tempdir().during("make a directory for a peer")?;
        let at = |name: &str| directory.path().join(name);
        let identity = Identity::fresh()?;
        let issued = &identity.issued;
        write_private(&at("key.pem"), issued.key_pem.as_bytes(), IfExists::Refuse)
            .during("write a key")?;
        write_public(
            &at("chain.pem"),
            issued.chain_pem.as_bytes(),
            IfExists::Refuse,
        )
        .during("write a certificate")?;
        fs::create_dir(at("data")).during("make a data directory")?;
        let mut command = Command::new(start.program);
        let (devices, backends) = match start.peer {
            Peer::Mosquitto => {
                let ports = [free_port()?, free_port()?];
                let text = mosquitto(ports, directory.path(), start.autosave);
                fs::write(at("mosquitto.conf"), text).during("write mosquitto's settings")?;
                command.arg("-c").arg(at("mosquitto.conf"));
                (ports[0], ports[1])
            }
            // One port serves both: TLS begins after the first line.
            Peer::Nats | Peer::Bellwire => {
                let port = free_port()?;
                let text = nats(port, directory.path(), start.nats_sync);
                fs::write(at("nats.conf"), text).during("write nats-server's settings")?;
                command.arg("-c").arg(at("nats.conf"));
                (port, port)
            }
        };
        let log = File::create(at("log")).during("make a peer's log")?;
        let child = command
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().during("share a peer's log")?)
            .stderr(log)
            .spawn()
            .during(format_args!("start {}", start.program.display()))?;
        // Owned from here on, so that every way out kills the process.
        let mut foreign = Foreign {
            target: Target {
                peer: start.peer,
                pid: child.id(),
                devices,
                backends,
                authority: identity.authority,
                key: String::new(),
                streams: start.nats_streams,
            },
            child,
            _directory: directory,
        };
        let log = foreign._directory.path().join("log");
        let told = |what: &str| {
            let log = fs::read(&log).unwrap_or_default();
            let log = &log[log.len().saturating_sub(LOG_SHOWN_BYTES)..];
            Failure::new(format!(
                "{} {what}; it wrote:\n{}",
                start.program.display(),
                String::from_utf8_lossy(log)
            ))
        };
        let give_up = Instant::now() + START_MAX;
        loop {
            if let Some(status) = foreign.child.try_wait().during("ask for a peer")? {
                return Err(told(&format!("ended at once ({status})")));
            }
            if [devices, backends]
                .iter()
                .all(|address| TcpStream::connect(address).is_ok())
            {
                return Ok(foreign);
            }
            if Instant::now() > give_up {
                return Err(told("did not listen within 30 s"));
            }
            sleep(LOOK_EVERY).await;
        }
    }

    async fn stop(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        let asked = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let give_up = Instant::now() + STOP_MAX;
        while asked.is_ok() && Instant::now() < give_up {
            match self.child.try_wait() {
                Ok(Some(_)) => return true,
                Ok(None) => sleep(LOOK_EVERY).await,
                Err(_) => break,
            }
        }
        false
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // One that has ended already does not mind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of loopback that nobody listens on.
fn free_port() -> Outcome<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")
        .and_then(|listener| listener.local_addr())
        .during("find a free port")
}

/// mosquitto's settings: TLS for devices and none for backends, sessions and their queues kept and without a bound,
/// persistence on.
fn mosquitto(ports: [SocketAddr; 2], directory: &Path, autosave: u32) -> String {
    let dir = directory.display();
    let [devices, backends] = ports.map(|address| address.port());
    format!(
        "user root\n\
         persistence true\n\
         persistence_location {dir}/data/\n\
         autosave_interval {autosave}\n\
         autosave_on_changes false\n\
         max_queued_messages 0\n\
         max_queued_bytes 0\n\
         max_inflight_messages 1000\n\
         set_tcp_nodelay true\n\
         allow_anonymous true\n\
         connection_messages false\n\
         sys_interval 0\n\
         log_dest stderr\n\
         log_type error\n\
         log_type warning\n\
         log_type notice\n\
         listener {devices} 127.0.0.1\n\
         certfile {dir}/chain.pem\n\
         keyfile {dir}/key.pem\n\
         tls_version tlsv1.3\n\
         listener {backends} 127.0.0.1\n"
    )
}

/// nats-server's settings: JetStream on disk; TLS for whoever asks for it.
fn nats(port: SocketAddr, directory: &Path, sync: &str) -> String {
    let dir = directory.display();
    format!(
        "listen: \"{port}\"\n\
         server_name: bench\n\
         max_connections: 1000000\n\
         tls {{ cert_file: \"{dir}/chain.pem\", key_file: \"{dir}/key.pem\" }}\n\
         allow_non_tls: true\n\
         jetstream {{ store_dir: \"{dir}/data\", sync_interval: {sync}, max_file_store: 32GB }}\n"
    )
}

/// Where a peer's program is: what was asked for, what `bench/peers/install` brought, or what the system has.
pub(super) fn program(peer: Peer, asked: Option<&Path>) -> Outcome<PathBuf> {
    let name = match peer {
        Peer::Bellwire => return crate::server::binary(asked),
        Peer::Mosquitto => "mosquitto",
        Peer::Nats => "nats-server",
    };
    if let Some(asked) = asked {
        return match asked.is_file() {
            true => Ok(asked.to_owned()),
            false => Err(Failure::new(format!("there is no {}", asked.display()))),
        };
    }
    let mut places = Vec::new();
    // This program is target/release/bellwire-bench, or debug.
    if let Some(target) = std::env::current_exe()
        .during("find this program's own path")?
        .ancestors()
        .nth(2)
    {
        places.push(target.join("bench-peers/bin"));
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    places.extend(std::env::split_paths(&path));
    places.push("/usr/sbin".into());
    places
        .into_iter()
        .map(|place| place.join(name))
        .find(|path| path.is_file())
        .ok_or_else(|| {
            Failure::new(format!(
                "there is no {name}: run `bench/peers/install` first, or leave it out with --peer"
            ))
        })
}

/// What a program says of its version, for the report.
pub(super) fn version(peer: Peer, program: &Path) -> Outcome<String> {
    let argument = match peer {
        Peer::Bellwire | Peer::Nats => "--version",
        Peer::Mosquitto => "-h",
    };
    let output = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .output()
        .during(format_args!("start {}", program.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_program_that_is_not_there_is_said_so() {
        let asked = Path::new("/nowhere/nats-server");
        let failure = program(Peer::Nats, Some(asked)).unwrap_err().to_string();
        assert!(failure.contains("/nowhere/nats-server"), "{failure}");
    }
}
