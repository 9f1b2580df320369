//! The power goes at any moment, the disk fails at any moment: what was answered as safe is there, what was not may be,
//! and nothing else is.

use super::super::testing::{ManualClock, MemoryDisk, SeededEntropy, SyncSettings, SyncStore};
use super::super::*;
use super::model::{Dice, Model, Script};
use super::support::PATIENCE;
use crate::ports::Op;

/// Histories in an ordinary run; `BELLWIRE_STORE_SEEDS` asks for more, `BELLWIRE_STORE_SEED` for one of them.
const SEEDS: u64 = 1_500;

fn seeds() -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("BELLWIRE_STORE_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BELLWIRE_STORE_SEEDS").unwrap_or(SEEDS),
    }
}

/// What became of a commit on a store that answers on the same thread; `None`: nobody was answered.
pub(super) fn commit_now(store: &SyncStore, batch: Vec<Op>) -> Option<Committed> {
    let (sender, receiver) = mpsc::channel();
    store.commit(
        batch,
        Box::new(move |verdict| sender.send(verdict).unwrap()),
    );
    receiver.try_recv().ok()
}

struct Trial {
    seed: u64,
    dice: Dice,
    disk: MemoryDisk,
    store: SyncStore,
    script: Script,
    /// What must be there.
    safe: Model,
    /// What may be there instead: the frame whose fate nobody knows.
    maybe: Option<Model>,
    log: Vec<String>,
}

impl Trial {
    fn new(seed: u64) -> Trial {
        let mut dice = Dice(seed ^ 0x5eed);
        let disk = MemoryDisk::new();
        let settings = SyncSettings {
            lag_frames: dice.roll(6) as usize,
            segment_bytes: 2_048 << dice.roll(4),
            ..SyncSettings::default()
        };
        let (store, _) = SyncStore::open(
            &disk,
            settings,
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(seed)),
        )
        .unwrap();
        Trial {
            seed,
            dice,
            disk,
            store,
            script: Script::new(seed),
            safe: Model::default(),
            maybe: None,
            log: Vec::new(),
        }
    }

    fn step(&mut self) {
        match self.dice.roll(40) {
            0 => self.disk.fail_sync_in(self.dice.roll(3)),
            1 => self.disk.fail_write_in(self.dice.roll(3)),
            2 | 3 => {
                let taken = self.store.snapshot();
                self.log.push(format!("snapshot {taken}"));
            }
            4 => self.store.catch_up(),
            5 => self.crash(),
            6 => {
                self.log.push("kill".to_owned());
                // A fault may be waiting for the start; each strikes once.
                let mut tries = 0;
                while let Err(error) = self.store.kill_and_reopen() {
                    self.log.push(format!("start failed: {error}"));
                    tries += 1;
                    assert!(tries < 4, "seed {}: {error}", self.seed);
                }
                self.found();
            }
            7 => self.forget(),
            _ => self.commit(),
        }
    }

    fn commit(&mut self) {
        let batch = self.script.batch(&self.safe);
        let mut after = self.safe.clone();
        batch.iter().for_each(|op| after.apply(op));
        let verdict = commit_now(&self.store, batch).expect("it answers on this thread");
        self.log.push(format!("commit {verdict:?}"));
        self.became(verdict, after);
    }

    fn forget(&mut self) {
        let before = self.script.now_ms.saturating_sub(self.dice.roll(200));
        let mut after = self.safe.clone();
        after.drop_receipts(before);
        let verdict = match self.store.drop_receipts(before, usize::MAX) {
            // Nothing to forget, nothing written.
            Ok(0) => return,
            Ok(_) => Ok(()),
            Err(_) => Err(CommitFailure::Failed),
        };
        self.log.push(format!("forget before {before} {verdict:?}"));
        // What is forgotten by rule is still seen until the engine has judged it.
        self.store.catch_up();
        self.became(verdict, after);
    }

    fn became(&mut self, verdict: Committed, after: Model) {
        let failed_before = self.maybe.is_some();
        match verdict {
            Ok(()) => {
                assert!(
                    !failed_before,
                    "seed {}: after a failure nothing is promised",
                    self.seed
                );
                self.safe = after;
            }
            // Only the first failed frame reached the disk at all.
            Err(CommitFailure::Failed) if failed_before => {}
            Err(CommitFailure::Failed) => self.maybe = Some(after),
            Err(CommitFailure::NoRoom) => panic!("seed {}: there is room", self.seed),
        }
    }

    fn crash(&mut self) {
        self.log.push("crash".to_owned());
        let seed = self.dice.roll(u64::MAX >> 33);
        self.store.crash_and_reopen(seed).unwrap();
        self.found();
    }

    /// After a start: the store is in one of the two states.
    fn found(&mut self) {
        let difference = self.safe.difference(&self.store, &self.script);
        let maybe = self.maybe.take();
        if let Some(difference) = difference {
            match maybe {
                Some(maybe) => {
                    if let Some(other) = maybe.difference(&self.store, &self.script) {
                        panic!(
                            "seed {}: neither before nor after\n{difference}\nor\n{other}\n{:#?}",
                            self.seed, self.log
                        );
                    }
                    self.safe = maybe;
                }
                None => panic!("seed {}: {difference}\n{:#?}", self.seed, self.log),
            }
        }
        assert_eq!(
            self.store.shared_bodies(),
            self.safe.shared_bodies(),
            "seed {}: bodies that several rows share\n{:#?}",
            self.seed,
            self.log
        );
    }

    /// While it runs: reads see what is safe, whatever failed since.
    fn reads(&self) {
        if let Some(difference) = self.safe.difference(&self.store, &self.script) {
            panic!(
                "seed {}: while running\n{difference}\n{:#?}",
                self.seed, self.log
            );
        }
        self.safe.check_lists(&self.store);
    }
}

#[test]
fn what_was_answered_as_safe_survives_every_crash() {
    for seed in seeds() {
        let mut trial = Trial::new(seed);
        for step in 0..30 {
            trial.step();
            if step % 10 == 9 {
                trial.reads();
            }
        }
        trial.crash();
    }
}

#[test]
fn a_crash_between_two_steps_of_a_frame_leaves_all_of_it_or_nothing() {
    use super::super::testing::Turns;
    for seed in 0..200u64 {
        let disk = MemoryDisk::new();
        let settings = SyncSettings {
            turns: Turns::Manual,
            ..SyncSettings::default()
        };
        let (store, _) = SyncStore::open(
            &disk,
            settings,
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(seed)),
        )
        .unwrap();
        let mut script = Script::new(seed);
        let mut safe = Model::default();
        for _ in 0..10 {
            let batch = script.batch(&safe);
            let mut after = safe.clone();
            batch.iter().for_each(|op| after.apply(op));
            assert_eq!(
                commit_now(&store, batch),
                None,
                "nobody is answered before the sync"
            );
            assert!(store.begin_frame());
            if script.dice.roll(3) == 0 {
                store.crash_and_reopen(seed).unwrap();
            } else {
                assert!(store.finish_frame());
                safe = after;
            }
            assert_eq!(safe.difference(&store, &script), None, "seed {seed}");
        }
    }
}

#[test]
fn every_run_has_a_number_of_its_own() {
    let disk = MemoryDisk::new();
    let (store, first) = SyncStore::open(
        &disk,
        SyncSettings::default(),
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    assert_eq!(first.run, 1);
    for (seed, run) in (2..20).enumerate() {
        let report = store.crash_and_reopen(seed as u64).unwrap();
        assert_eq!(report.run, run);
        assert_eq!(store.stats().run, run);
    }
}

#[test]
fn a_full_disk_refuses_and_opens_again_by_itself() {
    let disk = MemoryDisk::new();
    let settings = SyncSettings {
        segment_bytes: 4_096,
        reserve_bytes: 1_000,
        ..SyncSettings::default()
    };
    let (store, _) = SyncStore::open(
        &disk,
        settings,
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    let mut script = Script::new(3);
    let mut model = Model::default();
    disk.set_capacity(Some(disk.used()));
    store.look_at_room();
    assert!(matches!(store.health(), StoreHealth::Full { free: 0, .. }));
    let mut refused = 0;
    for _ in 0..200 {
        let batch = script.batch(&model);
        let ops = batch.clone();
        match commit_now(&store, batch).unwrap() {
            Ok(()) => ops.iter().for_each(|op| model.apply(op)),
            Err(CommitFailure::NoRoom) => {
                refused += 1;
                if refused == 5 {
                    disk.set_capacity(None);
                }
            }
            Err(CommitFailure::Failed) => panic!("nothing broke"),
        }
        assert_eq!(model.difference(&store, &script), None);
    }
    assert_eq!(
        refused, 5,
        "five frames found no room, then all of them did"
    );
    store.look_at_room();
    assert_eq!(store.health(), StoreHealth::Open);
    store.crash_and_reopen(7).unwrap();
    assert_eq!(model.difference(&store, &script), None);
}

#[test]
fn a_failed_sync_ends_every_promise_until_a_restart_and_reads_go_on() {
    let disk = MemoryDisk::new();
    let (store, _) = SyncStore::open(
        &disk,
        SyncSettings::default(),
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    let mut script = Script::new(3);
    let mut model = Model::default();
    let mut commit = |model: &mut Model| {
        let batch = script.batch(model);
        let ops = batch.clone();
        let verdict = commit_now(&store, batch).unwrap();
        if verdict.is_ok() {
            ops.iter().for_each(|op| model.apply(op));
        }
        assert_eq!(model.difference(&store, &script), None);
        verdict
    };
    assert_eq!(commit(&mut model), Ok(()));
    disk.fail_sync_in(0);
    for _ in 0..5 {
        // Only the first one meets the broken sync.
        assert_eq!(commit(&mut model), Err(CommitFailure::Failed));
    }
    assert!(matches!(store.health(), StoreHealth::Failed(_)));
    assert_eq!(
        commit_now(&store, Vec::new()),
        Some(Err(CommitFailure::Failed)),
        "an empty batch is no exception"
    );
    store.kill_and_reopen().unwrap();
    assert_eq!(store.health(), StoreHealth::Open);
    assert!(PATIENCE > std::time::Duration::ZERO);
}

#[test]
fn a_frame_that_a_restart_takes_over_is_made_safe_before_anything_rests_on_it() {
    // The sync fails and Linux forgets the pages; the process is killed, the next one finds the frame in memory and goes
    // on; then the power goes. What the second process could read must still be there.
    for seed in 0..50 {
        let disk = MemoryDisk::new();
        let (store, _) = SyncStore::open(
            &disk,
            SyncSettings::default(),
            Arc::new(ManualClock::new(0)),
            Arc::new(SeededEntropy::new(seed)),
        )
        .unwrap();
        let mut script = Script::new(seed);
        let mut model = Model::default();
        for _ in 0..3 {
            let batch = script.batch(&model);
            batch.iter().for_each(|op| model.apply(op));
            commit_now(&store, batch).unwrap().unwrap();
        }
        disk.fail_sync_in(0);
        let batch = script.batch(&model);
        batch.iter().for_each(|op| model.apply(op));
        assert!(commit_now(&store, batch).unwrap().is_err());
        store.kill_and_reopen().unwrap();
        assert_eq!(model.difference(&store, &script), None, "it is found");
        store.crash_and_reopen(seed).unwrap();
        assert_eq!(model.difference(&store, &script), None, "and it stays");
    }
}

#[test]
fn snapshots_let_go_of_the_log_and_restore_what_they_cover() {
    let disk = MemoryDisk::new();
    let settings = SyncSettings {
        segment_bytes: 4_096,
        lag_frames: 3,
        ..SyncSettings::default()
    };
    let (store, _) = SyncStore::open(
        &disk,
        settings,
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    let mut script = Script::new(11);
    let mut model = Model::default();
    let mut most = 0;
    for round in 0..30 {
        for _ in 0..20 {
            let batch = script.batch(&model);
            batch.iter().for_each(|op| model.apply(op));
            commit_now(&store, batch).unwrap().unwrap();
        }
        assert!(store.snapshot());
        if round > 3 {
            most = most.max(store.stats().log_segments);
        }
        let snapshots = disk.names().iter().filter(|n| n.ends_with(".snap")).count();
        assert!(snapshots <= 2, "two are kept");
    }
    assert!(most < 20, "the log does not grow: {most} segments");
    store.crash_and_reopen(1).unwrap();
    assert_eq!(model.difference(&store, &script), None);
    // The newest one rots: the one before it and the log still lead to the same state.
    let newest = disk
        .names()
        .into_iter()
        .rfind(|n| n.ends_with(".snap"))
        .unwrap();
    assert!(disk.flip(&newest, 60, 1));
    store.kill_and_reopen().unwrap();
    assert_eq!(model.difference(&store, &script), None);
    // Both rot: nothing can be proved, and it says so instead of starting empty.
    for name in disk.names().iter().filter(|n| n.ends_with(".snap")) {
        if *name != newest {
            assert!(disk.flip(name, 60, 1));
        }
    }
    match store.kill_and_reopen() {
        Err(OpenError::Unprovable { .. }) => {}
        other => panic!("{other:?}"),
    }
}
