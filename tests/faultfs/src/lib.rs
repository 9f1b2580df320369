//! A file system for tests that forgets, tears, delays, fails and runs full when told to.
//!
//! It is mounted for real (FUSE, so Linux and root), so programs meet it through the system calls that they use anyway, whole
//! servers in processes of their own as well. It keeps everything in memory, twice: as a running system sees it, and as it
//! would be found after a loss of power, with what lies between the two in the order in which it happened. A
//! [power cut](FaultFs::power_cut) then keeps, loses or tears each unsynced write, chosen by a seed: the same history and the
//! same seed lead to the same bytes.
//!
//! ```no_run
//! use bellwire_faultfs::{Errno, FaultFs, Op, Options};
//!
//! # fn main() -> std::io::Result<()> {
//! let disk = FaultFs::new(&Options::default())?;
//! std::fs::write(disk.path().join("news"), "never synced")?;
//! disk.fail_next(Op::Sync, Errno::IO, 2); // the third sync from now on fails
//! disk.power_cut(7); // everything fails with EIO ...
//! disk.power_on()?; // ... until the survivors are mounted
//! # Ok(())
//! # }
//! ```
//!
//! # What a loss of power may do
//!
//! - A sector of 512 bytes is as it was after one of the writes since the last sync, or as it was at the last sync. Sectors
//!   are independent of each other, within a write and across writes and files.
//! - Lengths and reservations of a file are kept up to one of them; bytes behind the surviving end are gone, and what is within
//!   it and was not kept reads as zeros or as it was.
//! - Names follow [`Names`]: by default a name is safe only after an `fsync` of its directory.
//! - What a failed sync was to make safe is safe in any part, and no later sync brings the rest back.
//! - Owner, mode and times are safe at once; links do not exist.
//! - `sync_file_range` never reaches a FUSE file system: it succeeds and makes nothing safe, as on a real one, where it says
//!   nothing about the disk's own cache or about lengths. `sync` does not reach it either, so it makes nothing safe.
//! - Beyond 64 MiB of unsynced writes, those of one file become safe by themselves, as by the kernel's writeback.
//!
//! The kernel is told to cache nothing: every read and write of a program arrives here, so reads can fail, and nothing outlives
//! a cut in a cache. Locks are the kernel's own.

mod faults;
mod fuse;
mod image;
mod mount;
mod state;

pub use faults::{Fault, Op};
pub use mount::{FaultFs, Options, SmallDisk};
pub use rustix::io::Errno;
pub use state::{Counters, Names, Unsynced};
