//! `bellwire check`: would a start work? Nothing is changed, and a server that runs is not disturbed.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use bellwire_certs::check_server_files;
use bellwire_server::config::{self, AnyKey, ApiAccess, Checked, Environment, PemPair, keys};
use bellwire_server::store::place::{self, FileSystem, Trust};
use clap::Args;

use super::api::ListenFile;
use super::findings::{Finding, Mark, good, report};
use super::{ConfigArg, Outcome, now};

/// A certificate that ends within so many days is worth a word.
const SOON_DAYS: i64 = 30;

const AFTER_HELP: &str = "\
Examples:
  bellwire check
  bellwire check --config /etc/bellwire/bellwire.toml
  bellwire check --json

Exit code 0 if a start would work, 78 if the settings are wrong, 1 for anything else that is in the way.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &CheckArgs) -> Outcome {
    let checked = config::load(args.config.config.as_deref(), &Environment::of_process())?;
    let mut findings = vec![good(
        "settings",
        match &args.config.config {
            Some(file) => format!("{} is fine", file.display()),
            None if Path::new(config::DEFAULT_FILE).exists() => {
                format!("{} is fine", config::DEFAULT_FILE)
            }
            None => {
                "no file; every setting has its default or comes from the environment".to_owned()
            }
        },
    )];
    for warning in &checked.warnings {
        findings.push(Finding::new(Mark::Warned, "settings", warning.clone()));
    }
    match &checked.tls {
        Some(pair) => findings.push(certificate("devices' certificate", pair)),
        None => findings.push(good(
            "devices' certificate",
            "none is set: a development authority and certificate are made in the data directory",
        )),
    }
    if let ApiAccess::Https(pair) = &checked.api {
        findings.push(certificate("API's certificate", pair));
    }
    findings.push(data_dir(&checked.data_dir));
    findings.push(file_system(
        &checked.data_dir,
        checked.store.trust_file_system,
    ));
    if let Some(backup) = &checked.backup {
        findings.push(backup_dir(&backup.dir, &checked.data_dir));
    }
    ports(&checked, &mut findings);
    report(&findings, args.json, |failed, all| {
        format!("a start would fail: {failed} of {all} checks went wrong")
    })
}

fn certificate(about: &'static str, pair: &PemPair) -> Finding {
    let now = now();
    let (mark, text) = match check_server_files(&pair.cert, &pair.key, now) {
        Ok(chain) => match chain.first() {
            Some(leaf)
                if leaf
                    .check_time(now + time::Duration::days(SOON_DAYS))
                    .is_err() =>
            {
                (
                    Mark::Warned,
                    format!(
                        "{} ends at {}: renew it soon",
                        pair.cert.display(),
                        leaf.not_after
                    ),
                )
            }
            Some(leaf) => (
                Mark::Good,
                format!(
                    "{} fits its key and is valid until {}",
                    pair.cert.display(),
                    leaf.not_after
                ),
            ),
            None => (
                Mark::Failed,
                format!("{} holds no certificate", pair.cert.display()),
            ),
        },
        Err(error) => (Mark::Failed, error.to_string()),
    };
    Finding::new(mark, about, text)
}

fn data_dir(path: &Path) -> Finding {
    let (mark, text) = match look_at(path) {
        Ok(text) if fs::metadata(path).is_ok_and(|found| place::is_open(&found)) => (
            Mark::Warned,
            format!(
                "{text}, but others on this machine may look into it: a start closes it to them (mode 0700)"
            ),
        ),
        Ok(text) => (Mark::Good, text),
        Err(error) => (
            Mark::Failed,
            format!(
                "{}: {error}; name a directory that this user can write with data_dir (BELLWIRE__DATA_DIR)",
                path.display()
            ),
        ),
    };
    Finding::new(mark, "data directory", text)
}

/// What the data directory lies on, or would lie on.
fn file_system(path: &Path, trusted: bool) -> Finding {
    let place = path
        .ancestors()
        .find(|place| place.exists())
        .unwrap_or(Path::new("."));
    let (mark, text) = match FileSystem::of(place) {
        Ok(system) => match (system.trust, system.remark()) {
            (_, None) => (Mark::Good, format!("{system}, on this machine")),
            (Trust::Layered, Some(remark)) => (Mark::Good, remark),
            (Trust::Distant, Some(remark)) if !trusted => (
                Mark::Failed,
                format!(
                    "{remark}: a start refuses it; use a disk of this machine, or set store.trust_file_system = true \
                     (BELLWIRE__STORE__TRUST_FILE_SYSTEM) if you know that it keeps both promises"
                ),
            ),
            (_, Some(remark)) => (Mark::Warned, remark),
        },
        Err(error) => (Mark::Warned, format!("its type cannot be seen: {error}")),
    };
    Finding::new(mark, "file system", text)
}

/// Why a start would not take an existing directory although it can be written.
fn not_ours(found: &fs::Metadata) -> Option<io::Error> {
    let us = rustix::process::geteuid().as_raw();
    (found.uid() != us).then(|| {
        io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it belongs to user {}, and this is user {us}", found.uid()),
        )
    })
}

/// Where backups go: there, writable, and not within what they are to save.
fn backup_dir(path: &Path, data_dir: &Path) -> Finding {
    let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let help = "name a directory that is there and that this user can write with backup.dir (BELLWIRE__BACKUP__DIR)";
    let (mark, text) = match fs::metadata(path) {
        Ok(found) if !found.is_dir() => (
            Mark::Failed,
            format!("{} is no directory; {help}", path.display()),
        ),
        Ok(_) if real(path).starts_with(real(data_dir)) => (
            Mark::Failed,
            format!(
                "{} lies in the data directory, and would be lost with it; {help}",
                path.display()
            ),
        ),
        Ok(found) => match try_to_write(path) {
            Ok(()) if fs::metadata(data_dir).is_ok_and(|data| data.dev() == found.dev()) => (
                Mark::Warned,
                format!(
                    "{} can be written, but lies on the same volume as the data: both may be lost at once",
                    path.display()
                ),
            ),
            Ok(()) => (Mark::Good, format!("{} can be written", path.display())),
            Err(error) => (Mark::Failed, format!("{}: {error}; {help}", path.display())),
        },
        Err(error) => (Mark::Failed, format!("{}: {error}; {help}", path.display())),
    };
    Finding::new(mark, "backups", text)
}

/// Makes a file and removes it.
fn try_to_write(dir: &Path) -> io::Result<()> {
    let probe = dir.join(format!(".bellwire-check-{}", std::process::id()));
    fs::write(&probe, b"")?;
    fs::remove_file(&probe)
}

/// Tries to write where the server would write, and leaves nothing behind.
fn look_at(path: &Path) -> io::Result<String> {
    let (place, text) = match fs::metadata(path) {
        Ok(found) if !found.is_dir() => {
            return Err(io::Error::new(io::ErrorKind::NotADirectory, "it is a file"));
        }
        Ok(found) => match not_ours(&found) {
            Some(error) => return Err(error),
            None => {
                let real = fs::canonicalize(path)?;
                (path, format!("{} can be written", real.display()))
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = path
                .ancestors()
                .skip(1)
                .find(|parent| parent.as_os_str().is_empty() || parent.is_dir())
                .filter(|parent| !parent.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            (parent, format!("{} will be made", path.display()))
        }
        Err(error) => return Err(error),
    };
    let probe = place.join(format!(".bellwire-check-{}", std::process::id()));
    fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe))?;
    Ok(text)
}

fn ports(checked: &Checked, findings: &mut Vec<Finding>) {
    // A server on this data directory holds them, as it should.
    if let Ok(Some(listen)) = ListenFile::read(&checked.data_dir) {
        findings.push(good(
            "ports",
            format!(
                "a server with process id {} uses this data directory and listens on {} (devices), {} (API) and {} \
                 (operations)",
                listen.pid, listen.devices, listen.api, listen.operations
            ),
        ));
        return;
    }
    let listen = &checked.listen;
    let tcp = |address: SocketAddr| TcpListener::bind(address).map(drop);
    let udp = |address: SocketAddr| UdpSocket::bind(address).map(drop);
    let mut looks: Vec<(&'static str, &dyn AnyKey, SocketAddr, io::Result<()>)> = vec![
        (
            "devices, TCP",
            &keys::LISTEN_DEVICES,
            listen.devices,
            tcp(listen.devices),
        ),
        (
            "devices, UDP",
            &keys::LISTEN_DEVICES,
            listen.devices,
            udp(listen.devices),
        ),
        ("API", &keys::LISTEN_API, listen.api, tcp(listen.api)),
        (
            "operations",
            &keys::LISTEN_OPERATIONS,
            listen.operations,
            tcp(listen.operations),
        ),
    ];
    if let Some(plain) = listen.devices_plain {
        looks.push((
            "load balancers",
            &keys::LISTEN_DEVICES_PLAIN,
            plain,
            tcp(plain),
        ));
    }
    for (about, key, address, bound) in looks {
        let (mark, text) = match bound {
            Ok(()) if address.port() == 0 => {
                (Mark::Good, format!("{address}: a free port will be picked"))
            }
            Ok(()) => (Mark::Good, format!("{address} is free")),
            Err(error) => (Mark::Failed, cannot_listen(key.name(), address, &error)),
        };
        findings.push(Finding::new(mark, about, text));
    }
}

/// Why nobody can listen there, and which setting says so.
pub(super) fn cannot_listen(setting: &str, address: SocketAddr, error: &io::Error) -> String {
    let variable = config::variable_of(setting);
    let kind = error.kind();
    if kind == io::ErrorKind::AddrInUse {
        format!(
            "{address} is in use by another program: stop that one, or set {setting} ({variable}) to another port"
        )
    } else if kind == io::ErrorKind::PermissionDenied {
        format!(
            "this user may not listen on {address}: ports below 1024 need a privilege; set {setting} ({variable}) to a \
             higher one"
        )
    } else if kind == io::ErrorKind::AddrNotAvailable {
        format!(
            "{address} is not an address of this machine: set {setting} ({variable}) to one that is"
        )
    } else {
        format!("nobody can listen on {address} ({error}): look at {setting} ({variable})")
    }
}
