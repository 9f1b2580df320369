//! What can be told to go wrong.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use rustix::io::Errno;

/// What a program asks of a file system, as far as faults and counters tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Op {
    /// Reading a file.
    Read,
    /// Writing to a file.
    Write,
    /// `fsync` or `fdatasync` of a file.
    Sync,
    /// `fsync` of a directory.
    SyncDir,
    /// Making a file.
    Create,
    /// Opening a file that is there.
    Open,
    /// Giving a file or directory another name.
    Rename,
    /// Removing a file.
    Unlink,
    /// Making a directory.
    MakeDir,
    /// Reserving room (`fallocate`).
    Allocate,
    /// Changing a file's length.
    Truncate,
}

impl Op {
    /// All of them.
    pub const ALL: [Op; 11] = [
        Op::Read,
        Op::Write,
        Op::Sync,
        Op::SyncDir,
        Op::Create,
        Op::Open,
        Op::Rename,
        Op::Unlink,
        Op::MakeDir,
        Op::Allocate,
        Op::Truncate,
    ];

    /// Its name in commands and counters.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Sync => "sync",
            Op::SyncDir => "syncdir",
            Op::Create => "create",
            Op::Open => "open",
            Op::Rename => "rename",
            Op::Unlink => "unlink",
            Op::MakeDir => "mkdir",
            Op::Allocate => "allocate",
            Op::Truncate => "truncate",
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Op {
    type Err = String;

    fn from_str(text: &str) -> Result<Op, String> {
        Op::ALL
            .into_iter()
            .find(|op| op.as_str() == text)
            .ok_or_else(|| {
                let known: Vec<&str> = Op::ALL.iter().map(|op| op.as_str()).collect();
                format!("`{text}` is no operation; there are {}", known.join(", "))
            })
    }
}

/// An operation that fails. A write that fails does its first half; a sync that fails makes any part of what it was to
/// make safe safe and forgets the rest, as Linux does: a later sync succeeds and does not bring it back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub(crate) op: Op,
    pub(crate) errno: Errno,
    pub(crate) after: u64,
    pub(crate) times: u64,
    pub(crate) on: Option<String>,
    /// Instead of failing: the power goes, with this seed.
    pub(crate) cut: Option<u64>,
}

impl Fault {
    /// The next such operation fails, once.
    #[must_use]
    pub fn new(op: Op, errno: Errno) -> Fault {
        Fault {
            op,
            errno,
            after: 0,
            times: 1,
            on: None,
            cut: None,
        }
    }

    /// Before the next such operation is done, the power goes: see [`FaultFs::power_cut`](crate::FaultFs::power_cut).
    #[must_use]
    pub fn power_cut(op: Op, seed: u64) -> Fault {
        Fault {
            cut: Some(seed),
            ..Fault::new(op, Errno::IO)
        }
    }

    /// So many operations succeed first.
    #[must_use]
    pub fn after(mut self, operations: u64) -> Fault {
        self.after = operations;
        self
    }

    /// So many fail in a row.
    #[must_use]
    pub fn times(mut self, operations: u64) -> Fault {
        self.times = operations;
        self
    }

    /// All of them fail, until the faults are cleared.
    #[must_use]
    pub fn always(self) -> Fault {
        self.times(u64::MAX)
    }

    /// Only operations on paths that contain this, such as `log/` or `.snap`. Paths are relative to the mount and do not begin
    /// with a slash.
    #[must_use]
    pub fn on(mut self, part: &str) -> Fault {
        self.on = Some(part.to_owned());
        self
    }
}

/// What a fault does to an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Struck {
    Fails(Errno),
    Cut(u64),
}

/// The faults that wait, and the delays.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults {
    waiting: Vec<Fault>,
    delays: BTreeMap<Op, (Duration, Option<String>)>,
}

impl Faults {
    pub(crate) fn add(&mut self, fault: Fault) {
        self.waiting.push(fault);
    }

    pub(crate) fn clear(&mut self) {
        self.waiting.clear();
        self.delays.clear();
    }

    pub(crate) fn delay(&mut self, op: Op, by: Duration, on: Option<&str>) {
        if by.is_zero() {
            self.delays.remove(&op);
        } else {
            self.delays.insert(op, (by, on.map(str::to_owned)));
        }
    }

    pub(crate) fn delay_of(&self, op: Op, path: impl FnOnce() -> String) -> Option<Duration> {
        match self.delays.get(&op)? {
            (by, None) => Some(*by),
            (by, Some(part)) => path().contains(part).then_some(*by),
        }
    }

    /// Counts an operation and says whether it fails.
    pub(crate) fn strike(&mut self, op: Op, path: impl FnOnce() -> String) -> Result<(), Struck> {
        if !self.waiting.iter().any(|fault| fault.op == op) {
            return Ok(());
        }
        let path = path();
        let mut verdict = Ok(());
        for fault in &mut self.waiting {
            let meant = fault.op == op && fault.on.as_ref().is_none_or(|part| path.contains(part));
            if !meant {
                continue;
            }
            if fault.after > 0 {
                fault.after -= 1;
            } else if verdict.is_ok() {
                fault.times -= 1;
                verdict = Err(fault.cut.map_or(Struck::Fails(fault.errno), Struck::Cut));
            }
        }
        self.waiting.retain(|fault| fault.times > 0);
        verdict
    }

    /// How many faults have not struck to the end.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_after_so_many_and_so_often_and_only_where_it_is_meant() {
        let mut faults = Faults::default();
        faults.add(
            Fault::new(Op::Write, Errno::IO)
                .after(1)
                .times(2)
                .on("log/"),
        );
        let mut write = |path: &str| faults.strike(Op::Write, || path.to_owned());
        assert_eq!(write("sled/db"), Ok(()));
        assert_eq!(write("log/1.seg"), Ok(()));
        assert_eq!(write("log/1.seg"), Err(Struck::Fails(Errno::IO)));
        assert_eq!(write("sled/db"), Ok(()));
        assert_eq!(write("log/1.seg"), Err(Struck::Fails(Errno::IO)));
        assert_eq!(write("log/1.seg"), Ok(()));
        assert_eq!(faults.waiting(), 0);
    }
}
