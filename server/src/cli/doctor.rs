//! `bellwire doctor`: is this machine fit to run it, and does a server that runs here do well? Looks at what
//! `bellwire check` cannot know from the settings: time, disk, network, limits. Changes nothing.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bellwire_certs::{AltName, CertInfo, DevAuthority, Validity, check_server_files};
use bellwire_server::config::{self, AnyKey, ApiAccess, Checked, Environment, PemPair, keys};
use bellwire_server::ports::Clock;
use bellwire_server::runtime::SystemClock;
use bellwire_server::store::place::{FileSystem, Trust};
use clap::Args;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustix::process::{Resource, getrlimit};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use socket2::SockRef;
use tokio::time::timeout;

use super::api::{ListenFile, reachable};
use super::check::cannot_listen;
use super::console::Paint;
use super::{ConfigArg, Console, Failure, Outcome, now};

/// A certificate that ends within so many days is worth a word.
const SOON_DAYS: i64 = 30;
/// Writes that are synced to learn how long that takes: enough for a median, few enough to be done in a moment.
const SYNCS: usize = 32;
/// Bytes of each: a frame of a few pings.
const SYNC_BYTES: usize = 4_096;
/// Median of a sync from which on pings for absent devices wait noticeably.
const SYNC_SLOW: Duration = Duration::from_millis(20);
/// All syncs together end after this long; a disk that is slower has shown it by then.
const SYNC_MAX: Duration = Duration::from_secs(5);
/// Free room that should be there beyond the reserve: log segments, a snapshot, the engine.
const ROOM_BYTES: u64 = 2 << 30;
/// Open files below which a fleet over WebSocket meets the limit.
const FILES_LEAST: u64 = 65_536;
/// UDP buffers that the server asks for, in bytes.
const UDP_BUFFER_BYTES: u64 = 4 << 20;
/// Connections that may wait to be accepted; the server asks for so many.
const BACKLOG: u64 = 4_096;
/// Memory beyond caches and reserves that a server with some thousand devices takes, in bytes.
const MEMORY_BYTES: u64 = 256 << 20;
/// How long a connection on this machine may take.
const ANSWER_MAX: Duration = Duration::from_secs(3);
/// Most bytes read of an answer or a file of the kernel.
const TEXT_MAX: u64 = 16 << 10;

const AFTER_HELP: &str = "\
Examples:
  bellwire doctor
  bellwire doctor --config /etc/bellwire/bellwire.toml
  bellwire doctor --json | jq '.findings[] | select(.mark != \"ok\")'

Looks at ports, certificates, clock, UDP, disk, memory and the limits of the system, with or without a running server,
and says of each what was found and what to do. Run it as the user that runs the server, with the same settings.
What lies between devices and this machine, such as a firewall, cannot be seen from here.
Exit code 0 if nothing failed (warnings may be there), 78 if the settings are wrong, 1 otherwise.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

/// How one look turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    Good,
    Warned,
    Failed,
}

impl Mark {
    fn word(self) -> &'static str {
        match self {
            Mark::Good => "ok",
            Mark::Warned => "warned",
            Mark::Failed => "failed",
        }
    }

    fn paint(self) -> Paint {
        match self {
            Mark::Good => Paint::Green,
            Mark::Warned => Paint::Yellow,
            Mark::Failed => Paint::Red,
        }
    }
}

/// One look: what was found, and what to do unless all is well.
#[derive(Debug)]
struct Finding {
    mark: Mark,
    about: &'static str,
    found: String,
    advice: Option<String>,
}

fn good(about: &'static str, found: impl Into<String>) -> Finding {
    Finding {
        mark: Mark::Good,
        about,
        found: found.into(),
        advice: None,
    }
}

fn warned(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding {
        mark: Mark::Warned,
        advice: Some(advice.into()),
        ..good(about, found)
    }
}

fn failed(about: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Finding {
    Finding {
        mark: Mark::Failed,
        ..warned(about, found, advice)
    }
}

pub(crate) async fn run(args: &DoctorArgs) -> Outcome {
    let checked = config::load(args.config.config.as_deref(), &Environment::of_process())?;
    let mut findings = Vec::new();
    for warning in &checked.warnings {
        findings.push(warned(
            "settings",
            warning.clone(),
            "see docs/operations.md",
        ));
    }
    if findings.is_empty() {
        findings.push(good("settings", "nothing is wrong with them"));
    }
    certificates(&checked, &mut findings);
    let running = ListenFile::read(&checked.data_dir)?;
    match &running {
        Some(listen) => running_server(listen, &mut findings).await,
        None => free_ports(&checked, &mut findings).await,
    }
    findings.push(clock().await);
    disk(&checked, &mut findings);
    limits(&checked, &mut findings);
    tell(&findings, args.json);
    let bad = findings
        .iter()
        .filter(|finding| finding.mark == Mark::Failed)
        .count();
    if bad > 0 {
        return Err(Failure::new(
            format!(
                "{bad} of {} looks found something that must be mended",
                findings.len()
            ),
            "each line above that says `failed` tells what to do",
        ));
    }
    Ok(())
}

fn tell(findings: &[Finding], as_json: bool) {
    let out = Console::out();
    if as_json {
        let list: Vec<_> = findings
            .iter()
            .map(|finding| {
                json!({
                    "mark": finding.mark.word(),
                    "about": finding.about,
                    "found": finding.found,
                    "advice": finding.advice,
                })
            })
            .collect();
        let fine = findings.iter().all(|finding| finding.mark != Mark::Failed);
        out.line(&json!({ "ok": fine, "findings": list }).to_string());
        return;
    }
    for finding in findings {
        let word = out.paint(finding.mark.paint(), &format!("{:<6}", finding.mark.word()));
        out.line(&format!("{word}  {}: {}", finding.about, finding.found));
        if let Some(advice) = &finding.advice {
            out.line(&format!("        -> {advice}"));
        }
    }
}

// ---- Certificates --------------------------------------------------------------------------------------------------

fn certificates(checked: &Checked, findings: &mut Vec<Finding>) {
    const DEVICES: &str = "devices' certificate";
    match &checked.tls {
        Some(pair) => {
            let outside = !checked.listen.devices.ip().is_loopback();
            findings.push(certificate(DEVICES, pair, outside));
        }
        None => findings.push(warned(
            DEVICES,
            "none is set, so one for development is made",
            "set tls.cert and tls.key before real devices connect",
        )),
    }
    if let ApiAccess::Https(pair) = &checked.api {
        let outside = !checked.listen.api.ip().is_loopback();
        findings.push(certificate("API's certificate", pair, outside));
    }
}

fn certificate(about: &'static str, pair: &PemPair, outside: bool) -> Finding {
    let moment = now();
    let file = pair.cert.display();
    let chain = match check_server_files(&pair.cert, &pair.key, moment) {
        Ok(chain) => chain,
        Err(error) => {
            return failed(
                about,
                error.to_string(),
                format!(
                    "look at it with: bellwire certs inspect {file} --key {}",
                    pair.key.display()
                ),
            );
        }
    };
    let Some(leaf) = chain.first() else {
        return failed(
            about,
            format!("{file} holds no certificate"),
            "put the chain into it",
        );
    };
    let names: Vec<String> = leaf.alt_names.iter().map(ToString::to_string).collect();
    let found = format!(
        "{file} fits its key, names {}, has {} in its chain and is valid until {}",
        names.join(", "),
        chain.len(),
        leaf.not_after
    );
    if outside && leaf.alt_names.iter().all(is_local) {
        return warned(
            about,
            found,
            "it names this machine only, and devices elsewhere will refuse it: get one with the name that they connect to",
        );
    }
    let soon = moment + time::Duration::days(SOON_DAYS);
    let ends_soon = |info: &&CertInfo| info.check_time(soon).is_err();
    match chain.iter().find(ends_soon) {
        Some(info) => warned(
            about,
            found,
            format!(
                "{} ends at {}: renew it, then `systemctl reload bellwire` (SIGHUP)",
                info.subject, info.not_after
            ),
        ),
        None => good(about, found),
    }
}

fn is_local(name: &AltName) -> bool {
    match name {
        AltName::Dns(name) => name == "localhost" || name.ends_with(".localhost"),
        AltName::Ip(ip) => ip.is_loopback(),
        AltName::Uri(_) | AltName::Other(_) => true,
    }
}

// ---- Ports ---------------------------------------------------------------------------------------------------------

/// A server is said to run: does it answer, wherever it listens?
async fn running_server(listen: &ListenFile, findings: &mut Vec<Finding>) {
    findings.push(match readiness(reachable(listen.operations)) {
        Ok(answer) if answer.contains(" 200 ") => good(
            "server",
            format!(
                "the server with process id {} runs and is ready",
                listen.pid
            ),
        ),
        Ok(answer) => failed(
            "server",
            format!(
                "the server with process id {} runs and is not ready: {}",
                listen.pid,
                answer.lines().next().unwrap_or_default()
            ),
            "see `bellwire status` and the log",
        ),
        Err(error) => failed(
            "server",
            format!(
                "the server with process id {} does not answer on {}: {error}",
                listen.pid, listen.operations
            ),
            "it was killed, or hangs: look at its log and start it again",
        ),
    });
    let plain = listen
        .devices_plain
        .map(|plain| ("load balancers, TCP", plain));
    for (about, address) in [("devices, TCP", listen.devices), ("API, TCP", listen.api)]
        .into_iter()
        .chain(plain)
    {
        let target = reachable(address);
        findings.push(match TcpStream::connect_timeout(&target, ANSWER_MAX) {
            Ok(_) => good(about, format!("{target} takes connections")),
            Err(error) => failed(
                about,
                format!("{target} takes no connection: {error}"),
                "look for a packet filter on this machine",
            ),
        });
    }
    findings.push(handshake(reachable(listen.devices), None).await);
}

/// The status line of `/readyz`.
fn readiness(operations: SocketAddr) -> io::Result<String> {
    let mut tcp = TcpStream::connect_timeout(&operations, ANSWER_MAX)?;
    tcp.set_read_timeout(Some(ANSWER_MAX))?;
    tcp.set_write_timeout(Some(ANSWER_MAX))?;
    write!(
        tcp,
        "GET /readyz HTTP/1.1\r\nhost: {operations}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    tcp.take(TEXT_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// No server runs: could one listen, and does QUIC come through?
async fn free_ports(checked: &Checked, findings: &mut Vec<Finding>) {
    let listen = &checked.listen;
    let tcp = |address: SocketAddr| TcpListener::bind(address).map(drop);
    let mut looks: Vec<(&'static str, &dyn AnyKey, SocketAddr)> = vec![
        ("devices, TCP", &keys::LISTEN_DEVICES, listen.devices),
        ("API, TCP", &keys::LISTEN_API, listen.api),
        (
            "operations, TCP",
            &keys::LISTEN_OPERATIONS,
            listen.operations,
        ),
    ];
    if let Some(plain) = listen.devices_plain {
        looks.push(("load balancers, TCP", &keys::LISTEN_DEVICES_PLAIN, plain));
    }
    for (about, key, address) in looks {
        findings.push(match tcp(address) {
            Ok(()) => good(about, format!("{address} is free")),
            Err(error) => failed(
                about,
                cannot_listen(key.name(), address, &error),
                "then run this again",
            ),
        });
    }
    match UdpSocket::bind(listen.devices) {
        Ok(socket) => findings.push(handshake(listen.devices, Some(socket)).await),
        Err(error) => findings.push(failed(
            "devices, UDP",
            cannot_listen(keys::LISTEN_DEVICES.name, listen.devices, &error),
            "then run this again",
        )),
    }
}

/// A QUIC handshake with whoever listens there, or with a listener of our own on this socket. That the certificate is
/// then refused is expected: it shows that packets pass in both directions.
async fn handshake(address: SocketAddr, listener: Option<UdpSocket>) -> Finding {
    const ABOUT: &str = "devices, UDP";
    let own = match listener.map(own_listener).transpose() {
        Ok(own) => own,
        Err(error) => {
            return warned(
                ABOUT,
                format!("QUIC could not be tried: {error}"),
                "run this again",
            );
        }
    };
    let address = match &own {
        Some(endpoint) => match endpoint.local_addr() {
            Ok(bound) => reachable(bound),
            Err(_) => address,
        },
        None => address,
    };
    let serving = own.clone().map(|endpoint| {
        tokio::spawn(async move {
            if let Some(incoming) = endpoint.accept().await {
                // The peer breaks it off; that it came so far is what matters.
                let _ = incoming.await;
            }
        })
    });
    let tried = try_quic(address).await;
    if let Some(serving) = serving {
        serving.abort();
    }
    match tried {
        Ok(true) => good(
            ABOUT,
            format!("a QUIC handshake with {address} passes on this machine"),
        ),
        Ok(false) => failed(
            ABOUT,
            format!("nothing came back of a QUIC handshake with {address} on this machine"),
            "look for a packet filter that drops UDP; without UDP devices use WebSocket",
        ),
        Err(error) => warned(
            ABOUT,
            format!("QUIC could not be tried: {error}"),
            "run this again",
        ),
    }
}

fn own_listener(socket: UdpSocket) -> io::Result<quinn::Endpoint> {
    let authority = DevAuthority::generate(
        "doctor",
        Validity::authority(now()).map_err(io::Error::other)?,
    )
    .map_err(io::Error::other)?;
    let name = "localhost".parse().map_err(io::Error::other)?;
    let issued = authority
        .server(&[name], Validity::leaf(now()).map_err(io::Error::other)?)
        .map_err(io::Error::other)?;
    let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).map_err(io::Error::other)?;
    let mut tls = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    tls.alpn_protocols = vec![bellwire_protocol::ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    socket.set_nonblocking(true)?;
    quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        Some(quinn::ServerConfig::with_crypto(Arc::new(crypto))),
        socket,
        Arc::new(quinn::TokioRuntime),
    )
}

/// Whether something came back.
async fn try_quic(address: SocketAddr) -> io::Result<bool> {
    let mut tls = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    tls.alpn_protocols = vec![bellwire_protocol::ALPN.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let any: SocketAddr = if address.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let endpoint = quinn::Endpoint::client(any)?;
    let connecting = endpoint
        .connect_with(
            quinn::ClientConfig::new(Arc::new(crypto)),
            address,
            "localhost",
        )
        .map_err(io::Error::other)?;
    // Any end but a silent one shows that the peer was heard.
    Ok(match timeout(ANSWER_MAX, connecting).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => !matches!(error, quinn::ConnectionError::TimedOut),
        Err(_) => false,
    })
}

// ---- Time ----------------------------------------------------------------------------------------------------------

/// Whether the system's time service says that the clock is right.
async fn clock() -> Finding {
    const ABOUT: &str = "clock";
    let shown = now();
    let asked = tokio::process::Command::new("timedatectl")
        .args(["show", "--property=NTPSynchronized", "--value"])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let synchronized = match timeout(ANSWER_MAX, asked).await {
        Ok(Ok(output)) if output.status.success() => match output.stdout.trim_ascii() {
            b"yes" => Some(true),
            b"no" => Some(false),
            _ => None,
        },
        // The file that systemd's own time service leaves behind once it has the time.
        _ if Path::new("/run/systemd/timesync/synchronized").exists() => Some(true),
        _ => None,
    };
    match synchronized {
        Some(true) => good(ABOUT, format!("{shown}, kept by the system's time service")),
        Some(false) => failed(
            ABOUT,
            format!("{shown}, and the system says that it is not synchronised"),
            "start a time service (systemd-timesyncd, chrony): expiry and certificates go by this clock",
        ),
        None => warned(
            ABOUT,
            format!("{shown}; nobody here says whether that is right"),
            "compare it with a clock that you trust; in a container, the host keeps the time",
        ),
    }
}

// ---- Disk ----------------------------------------------------------------------------------------------------------

/// The directory itself, or the nearest one above that is there.
fn place_of(data_dir: &Path) -> PathBuf {
    data_dir
        .ancestors()
        .find(|place| place.is_dir())
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

fn disk(checked: &Checked, findings: &mut Vec<Finding>) {
    let place = place_of(&checked.data_dir);
    findings.push(volume(&place, checked.store.trust_file_system));
    findings.push(room(&place, checked.store.reserve_bytes));
    findings.push(match measure_syncs(&place) {
        Ok((median, worst)) => {
            let found = format!(
                "a sync in {} takes {:.1} ms (median), {:.1} ms (worst)",
                place.display(),
                median.as_secs_f64() * 1_000.0,
                worst.as_secs_f64() * 1_000.0
            );
            if median > SYNC_SLOW {
                warned(
                    "disk sync",
                    found,
                    "every ping for an absent device waits for one: put data_dir on a faster disk, best one with \
                     power-loss protection",
                )
            } else {
                good("disk sync", found)
            }
        }
        Err(error) => failed(
            "disk sync",
            format!("{} cannot be written and synced: {error}", place.display()),
            "name a directory that this user can write with data_dir (BELLWIRE__DATA_DIR)",
        ),
    });
}

/// What kind of file system it is, and whether its promises can be seen from here.
fn volume(place: &Path, trusted: bool) -> Finding {
    const ABOUT: &str = "volume";
    let shown = place.display();
    let system = match FileSystem::of(place) {
        Ok(system) => system,
        Err(error) => {
            return failed(
                ABOUT,
                format!("{shown} cannot be looked at: {error}"),
                "let the user that runs this read it",
            );
        }
    };
    let found = format!("{shown} lies on {system}");
    match system.trust {
        Trust::Local | Trust::Layered => good(ABOUT, found),
        Trust::Volatile => warned(
            ABOUT,
            format!("{found}: everything is lost when the machine goes down"),
            "put data_dir on a disk",
        ),
        Trust::Distant if trusted => warned(
            ABOUT,
            format!("{found}, and store.trust_file_system vouches for it"),
            "make sure that a sync there reaches a disk and a lock holds",
        ),
        Trust::Distant => failed(
            ABOUT,
            format!(
                "{found}: whether a sync there reaches a disk and a lock holds cannot be seen from here"
            ),
            "a start refuses it: put data_dir on a disk of this machine, or set store.trust_file_system = true \
             (BELLWIRE__STORE__TRUST_FILE_SYSTEM) if you know that it keeps both promises",
        ),
        Trust::Unknown => warned(
            ABOUT,
            found,
            "make sure that this file system keeps what was synced",
        ),
    }
}

fn room(place: &Path, reserve: u64) -> Finding {
    const ABOUT: &str = "free room";
    match rustix::fs::statvfs(place) {
        Ok(found) => {
            let free = found.f_bavail.saturating_mul(found.f_frsize);
            let text = format!(
                "{} MiB are free, {} MiB of them kept as a reserve",
                free >> 20,
                reserve >> 20
            );
            if free <= reserve {
                failed(
                    ABOUT,
                    text,
                    "new pings would be refused (507): make room, or lower store.reserve_bytes",
                )
            } else if free - reserve < ROOM_BYTES {
                warned(
                    ABOUT,
                    text,
                    "log, snapshots and engine need some: 2 GiB beyond the reserve is a good start",
                )
            } else {
                good(ABOUT, text)
            }
        }
        Err(error) => failed(
            ABOUT,
            format!("cannot be told: {error}"),
            "look at the volume",
        ),
    }
}

/// Median and worst duration of small synced writes.
fn measure_syncs(place: &Path) -> io::Result<(Duration, Duration)> {
    let path = place.join(format!(".bellwire-doctor-{}", std::process::id()));
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&path)?;
    // Gone from the directory at once, so that nothing is left behind however this ends.
    fs::remove_file(&path)?;
    let clock = SystemClock::new();
    let begun = clock.now().mono;
    let mut took = Vec::with_capacity(SYNCS);
    while took.len() < SYNCS && clock.now().mono - begun < SYNC_MAX {
        let from = clock.now().mono;
        file.write_all(&[0x5a; SYNC_BYTES])?;
        file.sync_data()?;
        took.push(clock.now().mono - from);
    }
    took.sort_unstable();
    let worst = took.last().copied().unwrap_or_default();
    Ok((took.get(took.len() / 2).copied().unwrap_or_default(), worst))
}

// ---- Limits of the system ------------------------------------------------------------------------------------------

fn limits(checked: &Checked, findings: &mut Vec<Finding>) {
    let files = getrlimit(Resource::Nofile).maximum;
    findings.push(match files {
        Some(files) if files < FILES_LEAST => warned(
            "open files",
            format!("this user may open {files}"),
            format!("each device over WebSocket is one: raise the hard limit (LimitNOFILE, ulimit -Hn) to {FILES_LEAST} or more"),
        ),
        Some(files) => good("open files", format!("this user may open {files}")),
        None => good("open files", "this user may open as many as there are"),
    });
    for (about, path, least, advice) in [
        (
            "UDP receive buffer",
            "/proc/sys/net/core/rmem_max",
            UDP_BUFFER_BYTES,
            "a fleet that reconnects at once loses packets: sysctl -w net.core.rmem_max=4194304, and keep it in /etc/sysctl.d",
        ),
        (
            "UDP send buffer",
            "/proc/sys/net/core/wmem_max",
            UDP_BUFFER_BYTES,
            "sysctl -w net.core.wmem_max=4194304, and keep it in /etc/sysctl.d",
        ),
        (
            "connections that wait",
            "/proc/sys/net/core/somaxconn",
            BACKLOG,
            "a fleet that reconnects at once is partly refused: sysctl -w net.core.somaxconn=4096, and keep it in /etc/sysctl.d",
        ),
        (
            "open files of the machine",
            "/proc/sys/fs/file-max",
            FILES_LEAST,
            "sysctl -w fs.file-max=1000000, and keep it in /etc/sysctl.d",
        ),
    ] {
        findings.extend(kernel_number(path).map(|number| {
            let found = format!("{number} ({path})");
            if number < least {
                warned(about, found, advice)
            } else {
                good(about, found)
            }
        }));
    }
    findings.extend(granted_buffers());
    findings.extend(memory(checked));
}

/// A number that the kernel shows; none where it shows none.
fn kernel_number(path: &str) -> Option<u64> {
    let mut text = String::new();
    fs::File::open(path)
        .ok()?
        .take(TEXT_MAX)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}

/// What the system really grants, where it shows no limits.
fn granted_buffers() -> Option<Finding> {
    if kernel_number("/proc/sys/net/core/rmem_max").is_some() {
        return None;
    }
    let socket = UdpSocket::bind("127.0.0.1:0").ok()?;
    let socket = SockRef::from(&socket);
    let _ = socket.set_recv_buffer_size(usize::try_from(UDP_BUFFER_BYTES).ok()?);
    let granted = socket.recv_buffer_size().ok()?;
    let found = format!("{granted} bytes are granted");
    Some(if (granted as u64) < UDP_BUFFER_BYTES {
        warned(
            "UDP receive buffer",
            found,
            "raise net.core.rmem_max to 4194304 on the host",
        )
    } else {
        good("UDP receive buffer", found)
    })
}

/// Whether what was configured fits into what the machine, or the container, gives.
fn memory(checked: &Checked) -> Option<Finding> {
    const ABOUT: &str = "memory";
    let total = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    })? << 10;
    let given = kernel_number("/sys/fs/cgroup/memory.max").map_or(total, |limit| limit.min(total));
    let wanted = checked
        .store
        .memory_bytes
        .saturating_add(checked.limits.memory_bytes)
        .saturating_add(MEMORY_BYTES);
    let found = format!(
        "{} MiB are there; store.memory_bytes, limits.memory_bytes and the rest may take {} MiB",
        given >> 20,
        wanted >> 20
    );
    Some(if wanted > given {
        warned(
            ABOUT,
            found,
            "lower the two, or give more memory: a process that is killed for it serves nobody",
        )
    } else {
        good(ABOUT, found)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn syncs_are_measured_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let (median, worst) = measure_syncs(folder.path()).unwrap();
        assert!(median <= worst);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        assert!(measure_syncs(&folder.path().join("nowhere")).is_err());
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_looked_at_where_it_will_be() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(place_of(&folder.path().join("a/b/c")), folder.path());
        assert_eq!(place_of(Path::new("surely-not-there")), Path::new("."));
    }

    #[test]
    fn room_is_judged_by_the_reserve() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(room(folder.path(), u64::MAX).mark, Mark::Failed);
        assert_ne!(room(folder.path(), 0).mark, Mark::Failed);
    }

    #[tokio::test]
    async fn a_handshake_shows_whether_packets_come_back() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let found = handshake(address, Some(listener)).await;
        assert_eq!(found.mark, Mark::Good, "{found:?}");
        // Somebody who takes packets and says nothing.
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let found = handshake(silent.local_addr().unwrap(), None).await;
        assert_eq!(found.mark, Mark::Failed, "{found:?}");
    }
}
