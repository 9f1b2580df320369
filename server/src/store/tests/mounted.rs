//! The whole store, its real files and its real engines, on a file system that loses power, fails, lies, takes its time and
//! runs full (`tests/faultfs`).
//!
//! The disk of memory of `crashes.rs` is quicker and sees everything that goes through `log/disk.rs`. Here the rest is
//! there as well: the threads, the engines' own files, the system calls.

use std::fs;
use std::path::PathBuf;

use bellwire_faultfs::{Errno, Fault, FaultFs, Op as Call, Options};

use super::super::testing::{ManualClock, SeededEntropy};
use super::super::*;
use super::model::{Dice, Model, Script};
use super::support::*;
use crate::ports::Op;

/// Histories of each engine in an ordinary run; `BELLWIRE_DISK_SEEDS` asks for more, `BELLWIRE_DISK_SEED` for one of them.
const SEEDS: u64 = 12;

fn seeds(ordinary: u64) -> std::ops::Range<u64> {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    match number("BELLWIRE_DISK_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number("BELLWIRE_DISK_SEEDS").unwrap_or(ordinary),
    }
}

fn disk() -> FaultFs {
    FaultFs::new(&Options::default()).unwrap()
}

/// A store on such a disk, and what must be in it.
struct Trial {
    disk: FaultFs,
    engine: EngineKind,
    dice: Dice,
    script: Script,
    house: Option<House>,
    /// What may be there: the first is what was answered as safe, the others what would be there if more of what was
    /// handed over had become safe as well.
    states: Vec<Model>,
    /// Something of the engine was made to fail: it may not be able to read until a restart.
    hurt: bool,
    opened: u64,
    told: Vec<String>,
}

impl Trial {
    fn new(engine: EngineKind, seed: u64) -> Trial {
        let mut trial = Trial {
            disk: disk(),
            engine,
            dice: Dice(seed ^ 0xd15c),
            script: Script::new(seed),
            house: None,
            states: vec![Model::default()],
            hurt: false,
            opened: 0,
            told: Vec::new(),
        };
        trial.open().unwrap();
        trial
    }

    fn data(&self) -> PathBuf {
        self.disk.path().join("data")
    }

    fn settings(&self) -> StoreSettings {
        StoreSettings {
            segment_bytes: 16 << 10,
            // What it is made of is known here.
            trust_file_system: true,
            ..settings(&self.data(), self.engine)
        }
    }

    fn open(&mut self) -> Result<(), OpenError> {
        self.opened += 1;
        let (house, report) = open_house(
            &self.settings(),
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(self.opened)),
        )?;
        self.told.push(format!("open {report:?}"));
        self.house = Some(house);
        Ok(())
    }

    fn house(&self) -> &House {
        self.house.as_ref().unwrap()
    }

    /// Hands over some batches at once and waits for what becomes of them.
    fn burst(&mut self, batches: usize) -> Result<(), String> {
        let failed_before = self.states.len() > 1;
        let mut after = vec![self.states[0].clone()];
        let mut waiting = Vec::new();
        for _ in 0..batches {
            let mut model = after[after.len() - 1].clone();
            let batch = self.script.batch(&model);
            batch.iter().for_each(|op| model.apply(op));
            after.push(model);
            waiting.push(hand_over(self.house(), batch));
        }
        let verdicts: Vec<Committed> = waiting.iter().map(became).collect();
        self.told.push(format!("burst {verdicts:?}"));
        let safe = verdicts.iter().take_while(|said| said.is_ok()).count();
        let rest = &verdicts[safe..];
        if failed_before && safe > 0 || rest.iter().any(Result::is_ok) {
            return Err("something was promised after a failure".to_owned());
        }
        if let Some(refused) = rest
            .iter()
            .find(|said| **said != Err(CommitFailure::Failed))
        {
            return Err(format!("{refused:?} although there is room"));
        }
        if safe < batches {
            match self.house().health() {
                StoreHealth::Failed(_) => {}
                other @ (StoreHealth::Open | StoreHealth::Full { .. } | StoreHealth::Behind) => {
                    return Err(format!("a write failed and health says {other:?}"));
                }
            }
        }
        if !failed_before {
            self.states = after.split_off(safe);
        }
        Ok(())
    }

    /// Ends the process, with or without the power, and starts the next one.
    fn restart(&mut self, cut: Option<u64>) -> Result<(), String> {
        match cut {
            Some(seed) if !self.is_cut() => self.disk.power_cut(seed),
            Some(_) => {}
            None => self.disk.disconnect(),
        }
        self.begin_again(cut.is_some())
    }

    fn is_cut(&self) -> bool {
        fs::metadata(self.data()).is_err()
    }

    fn begin_again(&mut self, cut: bool) -> Result<(), String> {
        self.told.push(format!("restart, power lost: {cut}"));
        // Whatever still happens in it happens to a dead disk.
        self.house = None;
        self.disk.power_on().unwrap();
        let note = self.data().join("sled.in-use");
        if cut && note.exists() {
            // The machine has booted since.
            let before = "00000000-0000-0000-0000-000000000000\n";
            fs::write(&note, before).unwrap();
            self.disk.settle();
        }
        self.find()
    }

    /// Opens the store: it holds one of the states that it may hold.
    fn find(&mut self) -> Result<(), String> {
        // Each fault strikes at the start at most as often as it was told to.
        let mut tries = 0;
        while let Err(error) = self.open() {
            self.told.push(format!("start failed: {error}"));
            tries += 1;
            if tries > 6 {
                return Err(format!("it does not start: {error}"));
            }
        }
        self.hurt = false;
        let differences: Vec<Option<String>> = self
            .states
            .iter()
            .map(|state| state.difference(self.house(), &self.script))
            .collect();
        let found = differences.iter().position(Option::is_none);
        let Some(found) = found else {
            let first = differences.into_iter().flatten().next();
            return Err(format!(
                "found none of {} states; to the safe one, {}",
                self.states.len(),
                first.unwrap_or_default()
            ));
        };
        self.states = vec![self.states.swap_remove(found)];
        Ok(())
    }

    /// While it runs: reads see what is safe.
    fn reads(&self) -> Result<(), String> {
        if self.hurt || self.states.len() > 1 {
            return Ok(());
        }
        match self.states[0].difference(self.house(), &self.script) {
            Some(difference) => Err(format!("while it runs, {difference}")),
            None => Ok(()),
        }
    }

    fn snapshot(&mut self) {
        let taken = self.house().keeper.take_snapshot();
        self.told.push(format!("snapshot {}", taken.is_ok()));
    }

    fn step(&mut self) -> Result<(), String> {
        let bursts = 1 + self.dice.roll(4) as usize;
        match self.dice.roll(20) {
            0 | 1 => self.snapshot(),
            2 => {
                let call = [Call::Write, Call::Sync, Call::SyncDir][self.dice.roll(3) as usize];
                let place = ["log/", "snapshots/", "sled", "fjall", ""];
                let place = place[self.dice.roll(5) as usize];
                let fault = Fault::new(call, Errno::IO)
                    .after(self.dice.roll(6))
                    .on(place);
                self.told.push(format!("{fault:?}"));
                self.disk.fail(fault);
                self.hurt = true;
            }
            3 | 4 => {
                let calls = [
                    Call::Write,
                    Call::Write,
                    Call::Sync,
                    Call::Sync,
                    Call::SyncDir,
                    Call::Rename,
                    Call::Create,
                    Call::Allocate,
                    Call::Unlink,
                ];
                let call = calls[self.dice.roll(9) as usize];
                let seed = self.dice.roll(1 << 30);
                let fault = Fault::power_cut(call, seed).after(self.dice.roll(12));
                self.told.push(format!("{fault:?}"));
                self.disk.fail(fault);
                self.hurt = true;
                self.burst(bursts)?;
                self.snapshot();
                self.burst(bursts)?;
                self.restart(Some(seed))?;
            }
            5 => {
                let seed = self.dice.roll(1 << 30);
                self.restart(Some(seed))?;
            }
            6 => self.restart(None)?,
            7 => {
                // In good order, and then the power goes.
                self.house = None;
                self.told.push("closed".to_owned());
                let seed = self.dice.roll(1 << 30);
                self.restart(Some(seed))?;
            }
            8 => {
                self.house = None;
                self.told.push("closed".to_owned());
                self.find()?;
            }
            _ => {
                self.burst(bursts)?;
                self.reads()?;
            }
        }
        Ok(())
    }

    /// A whole history: what was not kept, if anything.
    fn live(&mut self, steps: usize) -> Result<(), String> {
        for _ in 0..steps {
            self.step()?;
        }
        let seed = self.dice.roll(1 << 30);
        self.restart(Some(seed))
    }
}

fn hand_over(store: &dyn Store, batch: Vec<Op>) -> mpsc::Receiver<Committed> {
    let (sender, receiver) = mpsc::channel();
    store.commit(
        batch,
        Box::new(move |verdict| {
            let _nobody_waits = sender.send(verdict);
        }),
    );
    receiver
}

fn became(receiver: &mpsc::Receiver<Committed>) -> Committed {
    receiver
        .recv_timeout(PATIENCE)
        .expect("everybody is answered")
}

fn histories(engine: EngineKind) {
    for seed in seeds(SEEDS) {
        let mut trial = Trial::new(engine, seed);
        if let Err(lost) = trial.live(25) {
            panic!("{engine:?}, seed {seed}: {lost}\n{:#?}", trial.told);
        }
    }
}

#[test]
fn what_was_answered_survives_losses_of_power_and_a_failing_disk_in_memory() {
    histories(EngineKind::Memory);
}

#[test]
fn what_was_answered_survives_losses_of_power_and_a_failing_disk_with_sled() {
    histories(EngineKind::Sled);
}

#[test]
fn what_was_answered_survives_losses_of_power_and_a_failing_disk_with_fjall() {
    histories(EngineKind::Fjall);
}

#[test]
fn without_being_trusted_such_a_file_system_is_refused() {
    let disk = disk();
    let refused = open_house(
        &settings(&disk.path().join("data"), EngineKind::Memory),
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(1)),
    );
    let Err(error) = refused else {
        panic!("it promises on a disk that it cannot see");
    };
    assert!(
        error.to_string().contains("store.trust_file_system"),
        "{error}"
    );
}

#[test]
fn the_same_check_finds_out_a_disk_that_lies_about_syncs() {
    let mut missing = 0;
    for seed in 0..6 {
        let mut trial = Trial::new(EngineKind::Memory, seed);
        // The store was begun on an honest disk; then its syncs do nothing any more.
        trial.disk.settle();
        trial.disk.set_liar(true);
        for _ in 0..10 {
            trial.burst(2).unwrap();
        }
        let found = trial.restart(Some(seed));
        missing += u32::from(found.is_err_and(|lost| lost.contains("missing")));
    }
    assert!(missing >= 2, "{missing} of 6 losses were found");
}
