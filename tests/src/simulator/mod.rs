//! Whole installations in one thread: the real core, store, session machines, codecs and client window, joined by links that cut
//! anywhere and disks that forget what was not synced. The same seed makes the same run, to the byte.
//!
//! - [`faults`]: what goes wrong, as named parameters drawn from the seed.
//! - `world`: the queue of things that happen, and what each does; `house` and `device` hold the state of either side,
//!   `network` what is between them.
//! - `ledger`: the oracle. It objects to a lost promise, a notification that reaches an app twice or late or out of order, an
//!   outcome that is not true, a mailbox that stays awake, a row that nobody counts.
//!
//! A failed seed is replayed with `BELLWIRE_SIM_SEED=n`, which tells everything that happened (docs/testing.md).

mod device;
pub mod faults;
mod house;
mod ledger;
mod network;
mod world;

use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

/// What a run was like.
#[derive(Debug, Clone, Copy, Default)]
pub struct Report {
    /// Things that happened.
    pub steps: u64,
    /// Notifications that reached an app.
    pub calls: u64,
    /// Times the server died.
    pub crashes: u32,
}

/// A part that is broken on purpose, to see that the oracle objects.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing is.
    None,
    /// The committer answers before the frame is written.
    AnswersBeforeSync,
    /// The client acknowledges before its window is on disk.
    AcknowledgesBeforeSaving,
    /// The client has no window of ids.
    ForgetsWhatItHad,
}

/// Runs one seed.
///
/// # Errors
///
/// What the oracle objects to.
pub fn run(seed: u64, sabotage: Sabotage, trace: bool) -> Result<Report, String> {
    panic::catch_unwind(AssertUnwindSafe(|| World::new(seed, sabotage, trace).run()))
        .unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("panicked: {}", text.unwrap_or("with something")))
        })
}

/// Runs many seeds on two threads, and answers the sum of their reports with the number of those that were run.
///
/// # Panics
///
/// With the lowest seed that failed.
pub fn check(seeds: u64) -> (u64, Report) {
    let next = AtomicU64::new(0);
    let failed = AtomicU64::new(u64::MAX);
    let work = || {
        let mut sum = Report::default();
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || failed.load(Ordering::Relaxed) < seed {
                return sum;
            }
            match run(seed, Sabotage::None, false) {
                Ok(report) => {
                    sum.steps += report.steps;
                    sum.calls += report.calls;
                    sum.crashes += report.crashes;
                }
                Err(_) => {
                    failed.fetch_min(seed, Ordering::Relaxed);
                }
            }
        }
    };
    let sums = std::thread::scope(|scope| {
        let threads = [scope.spawn(work), scope.spawn(work)];
        threads.map(|thread| thread.join().unwrap())
    });
    let seed = failed.load(Ordering::Relaxed);
    if seed < u64::MAX {
        let why = run(seed, Sabotage::None, false).err();
        panic!(
            "seed {seed}: {}\nreplay it with BELLWIRE_SIM_SEED={seed}",
            why.unwrap_or_else(
                || "it only failed once: the run does not depend on its seed alone".to_owned()
            )
        );
    }
    let mut sum = Report::default();
    for one in sums {
        sum.steps += one.steps;
        sum.calls += one.calls;
        sum.crashes += one.crashes;
    }
    (seeds, sum)
}
