//! Telling the service manager how the server is (the protocol of `sd_notify`): datagrams of lines on the socket that
//! `NOTIFY_SOCKET` names. Without that variable nothing is sent.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use tokio_util::sync::CancellationToken;

/// Where the service manager listens; a leading `@` stands for the abstract namespace.
const SOCKET: &str = "NOTIFY_SOCKET";
/// How long the service manager waits for a sign of life, microseconds.
const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
/// Whose signs of life it waits for, if not those of whoever reads this.
const WATCHDOG_PID: &str = "WATCHDOG_PID";

/// Shortest time between two signs of life, so that a tiny limit does not burn a core.
const WATCHDOG_LEAST: Duration = Duration::from_millis(50);

/// The service manager, if there is one. Telling it never waits; what it does not take is lost, and logged.
#[derive(Debug)]
pub(super) struct Notify {
    socket: Option<UnixDatagram>,
    watchdog: Option<Duration>,
}

impl Notify {
    /// Looks for a service manager in the environment.
    pub(super) fn of_process() -> Notify {
        let socket = match std::env::var_os(SOCKET) {
            Some(name) if !name.is_empty() => match connect(&name) {
                Ok(socket) => Some(socket),
                Err(error) => {
                    tracing::warn!(%error, "the service manager's socket ({SOCKET}) cannot be used; it will not be told that the server is ready");
                    None
                }
            },
            Some(_) | None => None,
        };
        let variable = |name| std::env::var(name).ok();
        let watchdog =
            watchdog(variable(WATCHDOG_USEC), variable(WATCHDOG_PID)).filter(|_| socket.is_some());
        Notify { socket, watchdog }
    }

    /// The server serves.
    pub(super) fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\n{}", line(status)));
    }

    /// Settings are being read anew; [`Notify::ready`] follows.
    pub(super) fn reloading(&self) {
        let now = clock_gettime(ClockId::Monotonic);
        // Seconds since the machine started fit many times over.
        let micros = now.tv_sec * 1_000_000 + now.tv_nsec / 1_000;
        self.tell(&format!(
            "RELOADING=1\nMONOTONIC_USEC={micros}\n{}",
            line("reading settings and certificates anew")
        ));
    }

    /// The server goes down, which may take so long.
    pub(super) fn stopping(&self, longest: Duration, status: &str) {
        self.tell(&format!(
            "STOPPING=1\nEXTEND_TIMEOUT_USEC={}\n{}",
            longest.as_micros(),
            line(status)
        ));
    }

    /// How it is, in a line for people.
    pub(super) fn status(&self, status: &str) {
        self.tell(&line(status));
    }

    /// Gives signs of life until `stop`, if somebody waits for them. Runs as a task among all others: if none of
    /// them gets a turn any more, neither does this one, and the service manager starts the server anew.
    pub(super) async fn live(&self, stop: CancellationToken) {
        let Some(limit) = self.watchdog else { return };
        let mut turn = tokio::time::interval((limit / 2).max(WATCHDOG_LEAST));
        while stop.run_until_cancelled(turn.tick()).await.is_some() {
            self.tell("WATCHDOG=1\n");
        }
    }

    fn tell(&self, lines: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.send(lines.as_bytes()) {
            tracing::warn!(%error, "the service manager could not be told something");
        }
    }
}

/// A status is one line whatever it says.
fn line(status: &str) -> String {
    format!("STATUS={}\n", status.replace('\n', " "))
}

fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        #[cfg(target_os = "linux")]
        [b'@', rest @ ..] => {
            use std::os::linux::net::SocketAddrExt;
            SocketAddr::from_abstract_name(rest)?
        }
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a path nor an abstract name",
            ));
        }
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    // Nobody is waited for: a manager that does not read must not stop the server.
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn watchdog(limit: Option<String>, of: Option<String>) -> Option<Duration> {
    let limit: u64 = limit?.parse().ok().filter(|&limit| limit > 0)?;
    match of {
        Some(pid) if pid.parse() != Ok(std::process::id()) => None,
        Some(_) | None => Some(Duration::from_micros(limit)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn signs_of_life_are_given_only_by_whom_they_are_asked_of() {
        let some = |text: &str| Some(text.to_owned());
        let own = std::process::id().to_string();
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog(some("1000000"), None), second);
        assert_eq!(watchdog(some("1000000"), some(&own)), second);
        for (limit, of) in [
            (None, None),
            (some("0"), None),
            (some("soon"), None),
            (some("1000000"), some("1")),
            (some("1000000"), some("")),
        ] {
            assert_eq!(watchdog(limit, of), None);
        }
    }

    #[test]
    fn a_socket_is_a_path_or_an_abstract_name() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let heard = UnixDatagram::bind(&path).unwrap();
        let notify = Notify {
            socket: Some(connect(path.as_os_str()).unwrap()),
            watchdog: None,
        };
        notify.ready("two\nlines");
        let mut datagram = [0; 100];
        let length = heard.recv(&mut datagram).unwrap();
        assert_eq!(&datagram[..length], b"READY=1\nSTATUS=two lines\n");
        assert!(connect(OsStr::new("relative")).is_err());
        assert!(connect(OsStr::new("/nowhere/at/all")).is_err());
    }
}
