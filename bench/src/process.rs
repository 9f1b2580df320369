//! What the kernel knows of a process and of the machine: time used, memory held.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::failure::{During, Failure, Outcome};

/// Files that a process leaves unused when it counts how many connections fit.
pub(crate) const FILES_RESERVED: u64 = 256;

/// CPU time that a process has used so far, user and system together, all threads. The kernel counts in ticks, mostly of
/// 10 ms, so only differences over a second or more mean something.
pub(crate) fn cpu_time(pid: u32) -> Outcome<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).during(format_args!("read {path}"))?;
    // The second field is the program's name in brackets and may hold anything; utime and stime are the 14th and 15th.
    let ticks: Option<u64> = text.rsplit_once(')').and_then(|(_, rest)| {
        let mut fields = rest.split_whitespace().skip(11);
        let user: u64 = fields.next()?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        Some(user + system)
    });
    let ticks = ticks.ok_or_else(|| Failure::new(format!("{path} has an unknown form")))?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Ok(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// CPU time that all processes of the machine together have used so far, system included. `None` where it does not say.
pub(crate) fn machine_time() -> Option<Duration> {
    let text = fs::read_to_string("/proc/stat").ok()?;
    let ticks = busy_ticks(text.lines().next()?)?;
    let per_second = rustix::param::clock_ticks_per_second().max(1);
    Some(Duration::from_secs_f64(ticks as f64 / per_second as f64))
}

/// Out of the first line of /proc/stat: user, nice, system, idle, waiting for disks, interrupts of both kinds. What guests used is
/// in user already.
fn busy_ticks(line: &str) -> Option<u64> {
    let mut fields = line.strip_prefix("cpu ")?.split_whitespace();
    let mut next = || fields.next()?.parse::<u64>().ok();
    let (user, nice, system) = (next()?, next()?, next()?);
    let (_idle, _disks) = (next()?, next()?);
    let (hard, soft) = (next()?, next()?);
    Some(user + nice + system + hard + soft)
}

/// Memory of a process in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Memory {
    /// Resident, pages shared with others counted in full.
    pub(crate) resident: u64,
    /// Heap and stacks, which are resident and no file's. Pages of files are left out: they are shared with every process that
    /// runs the same program, and change hands when one of them starts.
    pub(crate) own: u64,
}

/// Memory that a process holds now.
pub(crate) fn memory(pid: u32) -> Outcome<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = fs::read_to_string(&path).during(format_args!("read {path}"))?;
    let find = |name: &str| {
        kilobytes(&text, name).ok_or_else(|| Failure::new(format!("{path} does not name {name}")))
    };
    Ok(Memory {
        resident: find("Rss:")?,
        own: find("Pss_Anon:")?,
    })
}

/// The most that a process has ever held resident, bytes.
pub(crate) fn peak_memory(pid: u32) -> Outcome<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).during(format_args!("read {path}"))?;
    kilobytes(&text, "VmHWM:").ok_or_else(|| Failure::new(format!("{path} does not name a peak")))
}

/// The figure of a line such as `Rss:   1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let number: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(number * 1024)
}

/// Files and threads that a process has now.
pub(crate) fn files_and_threads(pid: u32) -> Outcome<(u64, u64)> {
    let count = |folder: &str| -> Outcome<u64> {
        let path = format!("/proc/{pid}/{folder}");
        let entries = fs::read_dir(&path).during(format_args!("read {path}"))?;
        Ok(entries.count() as u64)
    };
    Ok((count("fd")?, count("task")?))
}

/// What the kernel holds for everybody, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KernelMemory {
    /// Kernel objects of all kinds, sockets among them (`Slab` of /proc/meminfo).
    pub(crate) slab: u64,
    /// Buffers of TCP sockets (`mem` of /proc/net/sockstat).
    pub(crate) tcp_buffers: u64,
}

impl KernelMemory {
    /// Both together.
    pub(crate) fn sum(self) -> u64 {
        self.slab + self.tcp_buffers
    }
}

/// What the kernel holds now; `None` where it does not say.
pub(crate) fn kernel_memory() -> Option<KernelMemory> {
    let slab = kilobytes(&fs::read_to_string("/proc/meminfo").ok()?, "Slab:")?;
    let sockets = fs::read_to_string("/proc/net/sockstat").ok()?;
    let tcp = sockets.lines().find(|line| line.starts_with("TCP:"))?;
    let mut words = tcp.split_whitespace().skip_while(|word| *word != "mem");
    let pages: u64 = words.nth(1)?.parse().ok()?;
    Some(KernelMemory {
        slab,
        tcp_buffers: pages * rustix::param::page_size() as u64,
    })
}

/// Raises the limit of open files as far as it goes, for this process and those that it starts, and returns it.
pub(crate) fn raise_file_limit() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // Where it does not work, the present limit counts.
    let reached = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    reached.unwrap_or(u64::MAX)
}

/// The machine, for the head of a report.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct Machine {
    cpu: String,
    cores: usize,
    memory_gib: f64,
    kernel: String,
    /// The kind of the file system that data directories are made on.
    file_system: String,
}

impl Machine {
    pub(crate) fn here() -> Machine {
        let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpu
            .lines()
            .find(|line| line.starts_with("model name"))
            .and_then(|line| line.split_once(':'))
            .map_or("unknown", |(_, name)| name.trim())
            .to_owned();
        let memory = fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let memory = kilobytes(&memory, "MemTotal:").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Machine {
            cpu,
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_gib: (memory as f64 / (1u64 << 30) as f64 * 10.0).round() / 10.0,
            kernel: kernel.trim().to_owned(),
            file_system: file_system(&std::env::temp_dir()).unwrap_or_else(|| "unknown".to_owned()),
        }
    }
}

/// The kind of the file system that `path` lies on.
fn file_system(path: &Path) -> Option<String> {
    let path = fs::canonicalize(path).ok()?;
    kind_of(&path, &fs::read_to_string("/proc/self/mounts").ok()?)
}

/// The same out of the list of what is mounted: a line is device, place, kind and more. Of two at one place the later counts.
fn kind_of(path: &Path, mounts: &str) -> Option<String> {
    let mut found: Option<(&Path, &str)> = None;
    for line in mounts.lines() {
        let mut words = line.split_whitespace().skip(1);
        let (Some(place), Some(kind)) = (words.next(), words.next()) else {
            continue;
        };
        let place = Path::new(place);
        let longer = found.is_none_or(|(best, _)| place.starts_with(best));
        if path.starts_with(place) && longer {
            found = Some((place, kind));
        }
    }
    found.map(|(_, kind)| kind.to_owned())
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Machine {
            cpu,
            cores,
            memory_gib,
            kernel,
            file_system,
        } = self;
        write!(
            f,
            "{cores} × {cpu}, {memory_gib} GiB, Linux {kernel}, {file_system}"
        )
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_process_has_used_time_and_holds_memory() {
        let me = std::process::id();
        cpu_time(me).unwrap();
        let memory = memory(me).unwrap();
        assert!(memory.resident >= memory.own && memory.own > 0);
    }

    #[test]
    fn the_machine_is_busy_when_it_is_not_idle() {
        let line = "cpu  100 20 30 4000 500 6 7 80 0 0";
        assert_eq!(busy_ticks(line), Some(163));
        assert_eq!(busy_ticks("cpu0 1 2 3 4 5 6 7"), None);
        assert!(machine_time().is_some());
    }

    #[test]
    fn the_file_system_is_that_of_the_longest_mount() {
        let mounts =
            "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp/data xfs rw 0 0\n";
        assert_eq!(kind_of(Path::new("/tmp/x"), mounts).unwrap(), "tmpfs");
        assert_eq!(kind_of(Path::new("/tmp/data/x"), mounts).unwrap(), "xfs");
        assert_eq!(kind_of(Path::new("/tmpx"), mounts).unwrap(), "ext4");
        assert_eq!(kind_of(Path::new("/tmp"), ""), None);
    }

    #[test]
    fn a_figure_is_found_by_its_name_and_is_in_bytes() {
        let text = "Shared: 1 kB\nRss:      2048 kB\n";
        assert_eq!(kilobytes(text, "Rss:"), Some(2_097_152));
        assert_eq!(kilobytes(text, "Pss:"), None);
    }
}
