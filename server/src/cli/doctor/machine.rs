//! The machine: its clock, its disk, and the limits of its system.

use std::fs;
use std::io::{self, Read, Write};
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use bellwire_server::config::Checked;
use bellwire_server::ports::Clock;
use bellwire_server::runtime::SystemClock;
use bellwire_server::store::place::{FileSystem, Trust};
use rustix::process::{Resource, getrlimit};
use socket2::SockRef;
use time::OffsetDateTime;
use tokio::process::Command;
use tokio::time::timeout;

use super::{ANSWER_MAX, TEXT_MAX};
use crate::cli::findings::{Finding, failed, good, warned};
use crate::cli::now;

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
/// How far from now the newest file of the data directory may be: file systems and clocks are not that exact.
const AHEAD_MAX: time::Duration = time::Duration::minutes(1);
/// Most files that are looked at for that.
const FILES_LOOKED_AT: usize = 1_000;

/// Whether the clock is right, as far as this machine can tell.
pub(super) async fn clock(data_dir: &Path) -> Finding {
    const ABOUT: &str = "clock";
    let shown = now();
    if let Some(newest) = newest_file(data_dir)
        && newest - shown > AHEAD_MAX
    {
        return failed(
            ABOUT,
            format!(
                "{shown}, but {} holds files written at {newest}",
                data_dir.display()
            ),
            "it went back, or was wrong when they were written: set it right, since expiry and certificates go by it",
        );
    }
    match synchronized().await {
        Some((true, who)) => good(ABOUT, format!("{shown}, kept right ({who})")),
        Some((false, who)) => failed(
            ABOUT,
            format!("{shown}, and nothing keeps it right ({who})"),
            "start a time service (systemd-timesyncd, chrony): expiry and certificates go by this clock",
        ),
        None => warned(
            ABOUT,
            format!("{shown}; nobody here says whether that is right"),
            "compare it with a clock that you trust; in a container, the host keeps the time",
        ),
    }
}

/// Whether somebody keeps the clock right, and who says so.
async fn synchronized() -> Option<(bool, &'static str)> {
    // What the kernel was told by whichever service there is.
    let told = ask(
        "timedatectl",
        &["show", "--property=NTPSynchronized", "--value"],
    )
    .await;
    match told.as_deref().map(<[u8]>::trim_ascii) {
        Some(b"yes") => return Some((true, "timedatectl says so")),
        Some(b"no") => return Some((false, "timedatectl says so")),
        Some(_) | None => {}
    }
    // Without names, so that none is looked up.
    if let Some(told) = ask("chronyc", &["-n", "-c", "tracking"]).await {
        return chrony_says(&told).map(|kept| (kept, "chrony says so"));
    }
    // What systemd's own time service leaves behind once it has the time.
    Path::new("/run/systemd/timesync/synchronized")
        .exists()
        .then_some((true, "systemd-timesyncd had the time"))
}

/// The last of the fields with commas between them is how the clock stands to leap seconds, or that it is not kept.
fn chrony_says(told: &[u8]) -> Option<bool> {
    let text = std::str::from_utf8(told).ok()?;
    match text.trim().rsplit(',').next()? {
        "Normal" | "Insert second" | "Delete second" => Some(true),
        "Not synchronised" => Some(false),
        _ => None,
    }
}

/// What a program of the system prints, if it is there and ends well.
async fn ask(program: &str, arguments: &[&str]) -> Option<Vec<u8>> {
    let asked = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    match timeout(ANSWER_MAX, asked).await {
        Ok(Ok(output)) if output.status.success() => Some(output.stdout),
        Ok(_) | Err(_) => None,
    }
}

/// When the newest file of the data directory, or of its log, was written.
fn newest_file(data_dir: &Path) -> Option<OffsetDateTime> {
    [data_dir.to_owned(), data_dir.join("log")]
        .iter()
        .filter_map(|folder| fs::read_dir(folder).ok())
        .flatten()
        .take(FILES_LOOKED_AT)
        .filter_map(|entry| entry.ok()?.metadata().ok()?.modified().ok())
        .max()
        .map(OffsetDateTime::from)
}

// ---- Disk ----------------------------------------------------------------------------------------------------------

/// The directory itself, or the nearest one above that is there.
fn place_of(data_dir: &Path) -> PathBuf {
    data_dir
        .ancestors()
        .find(|place| place.is_dir())
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

pub(super) fn disk(checked: &Checked, findings: &mut Vec<Finding>) {
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

pub(super) fn limits(checked: &Checked, findings: &mut Vec<Finding>) {
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
    use crate::cli::findings::Mark;

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
    async fn a_clock_that_went_back_is_told_by_the_files() {
        let folder = tempfile::tempdir().unwrap();
        let file = fs::File::create(folder.path().join("one")).unwrap();
        let newest = newest_file(folder.path()).unwrap();
        assert!((newest - now()).abs() < AHEAD_MAX, "{newest}");
        let tomorrow = file.metadata().unwrap().modified().unwrap() + Duration::from_secs(86_400);
        file.set_modified(tomorrow).unwrap();
        let found = clock(folder.path()).await;
        assert_eq!(found.mark, Mark::Failed, "{found:?}");
        assert!(found.found.contains("holds files written at"), "{found:?}");
        assert_eq!(newest_file(&folder.path().join("nowhere")), None);
    }

    #[test]
    fn chrony_is_understood() {
        let line = |last: &str| {
            format!(
                "C0A80001,192.168.0.1,3,1700000000.1,0.000001,0.0,0.0,1.5,0.0,0.1,0.01,0.002,64.2,{last}\n"
            )
        };
        for (last, kept) in [
            ("Normal", Some(true)),
            ("Insert second", Some(true)),
            ("Not synchronised", Some(false)),
            ("", None),
        ] {
            assert_eq!(chrony_says(line(last).as_bytes()), kept, "{last}");
        }
        assert_eq!(chrony_says(&[0xff]), None);
    }
}
