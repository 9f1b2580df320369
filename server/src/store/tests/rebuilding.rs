//! An engine is built anew while writes go on, and everything ends at any moment: one of the two counts, and it holds what
//! was promised.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::AtomicU64;

use bytes::Bytes;

use super::super::convert::convert_on;
use super::super::current::Current;
use super::super::engine::memory::MemoryEngine;
use super::super::engine::{Direction, EngineError, EngineWrite, Visit};
use super::super::home::{self, Files, Unusable};
use super::super::keeper::{RebuildError, Stage};
use super::super::testing::{ManualClock, MemoryDisk, SeededEntropy, SyncSettings, SyncStore};
use super::super::*;
use super::model::{Dice, Model, Script};

type Batches = Vec<(Vec<EngineWrite>, Option<u64>)>;

/// An engine as bad as the contract lets it be: whatever ends it leaves the state after some prefix of the batches, at
/// least what was flushed (a kill) or closed (the power).
struct Fickle {
    engine: MemoryEngine,
    past: Mutex<Past>,
}

#[derive(Default)]
struct Past {
    batches: Batches,
    flushed: usize,
    closed: usize,
}

impl Fickle {
    fn of(batches: Batches) -> Fickle {
        let engine = MemoryEngine::new();
        for (batch, position) in &batches {
            engine.apply(batch, *position).unwrap();
        }
        let kept = batches.len();
        Fickle {
            engine,
            past: Mutex::new(Past {
                batches,
                flushed: kept,
                closed: kept,
            }),
        }
    }

    fn cut(&self, dice: &mut Dice, power: bool) -> Fickle {
        let past = self.past.lock().unwrap();
        let least = if power { past.closed } else { past.flushed };
        let kept = least + dice.roll((past.batches.len() - least + 1) as u64) as usize;
        Fickle::of(past.batches[..kept].to_vec())
    }
}

/// One opening of such an engine.
struct Opened(Arc<Fickle>);

impl Engine for Opened {
    fn name(&self) -> &'static str {
        "fickle"
    }
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.0.engine.get(key)
    }
    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        self.0.engine.scan(range, direction, visit)
    }
    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        let mut past = self.0.past.lock().unwrap();
        past.batches.push((batch.to_vec(), position));
        self.0.engine.apply(batch, position)
    }
    fn position(&self) -> Result<Option<u64>, EngineError> {
        self.0.engine.position()
    }
    fn size_bytes(&self) -> u64 {
        self.0.engine.size_bytes()
    }
    fn flush(&self) -> Result<(), EngineError> {
        let mut past = self.0.past.lock().unwrap();
        past.flushed = past.batches.len();
        Ok(())
    }
    fn close(&self) -> Result<(), EngineError> {
        let mut past = self.0.past.lock().unwrap();
        past.flushed = past.batches.len();
        past.closed = past.flushed;
        Ok(())
    }
}

/// Directories of such engines, which outlive the process.
#[derive(Clone, Default)]
struct Rack {
    engines: Arc<Mutex<BTreeMap<String, Arc<Fickle>>>>,
    /// Handles of an earlier process do nothing any more.
    process: Arc<AtomicU64>,
    boot: Arc<AtomicU64>,
}

impl Rack {
    fn ends(&self, dice: &mut Dice, power: bool) {
        self.process.fetch_add(1, Ordering::Relaxed);
        let mut engines = self.engines.lock().unwrap();
        for (name, engine) in &mut *engines {
            let closed = {
                let past = engine.past.lock().unwrap();
                past.closed == past.batches.len()
            };
            *engine = Arc::new(if power && name.starts_with("sled") && !closed {
                // Synced by nothing but an end in order: anything may be left, here everything but the beginning, and a
                // position.
                let past = engine.past.lock().unwrap().batches.clone();
                Fickle::of(past[past.len() / 2..].to_vec())
            } else {
                engine.cut(dice, power)
            });
        }
        if power {
            self.boot.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn names(&self) -> Vec<String> {
        self.engines.lock().unwrap().keys().cloned().collect()
    }

    fn home(&self, kind: FileEngine) -> testing::HomeMaker {
        let rack = self.clone();
        Arc::new(move |disk| {
            let files = RackFiles {
                rack: rack.clone(),
                process: rack.process.load(Ordering::Relaxed),
            };
            Arc::new(FilesHome::new(
                Arc::new(disk.clone()),
                Box::new(files),
                kind,
            ))
        })
    }
}

struct RackFiles {
    rack: Rack,
    process: u64,
}

impl RackFiles {
    fn alive(&self) -> io::Result<std::sync::MutexGuard<'_, BTreeMap<String, Arc<Fickle>>>> {
        if self.rack.process.load(Ordering::Relaxed) == self.process {
            Ok(self.rack.engines.lock().unwrap())
        } else {
            Err(io::Error::other("this process has ended"))
        }
    }
}

impl Files for RackFiles {
    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.alive()?.keys().cloned().collect())
    }
    fn open(&self, _kind: FileEngine, name: &str) -> Result<Arc<dyn Engine>, Unusable> {
        let mut engines = self
            .alive()
            .map_err(|error| Unusable::Busy(error.to_string()))?;
        let engine = engines
            .entry(name.to_owned())
            .or_insert_with(|| Arc::new(Fickle::of(Vec::new())));
        Ok(Arc::new(Opened(Arc::clone(engine))))
    }
    fn make(&self, name: &str) -> io::Result<()> {
        let fresh = Arc::new(Fickle::of(Vec::new()));
        assert!(
            self.alive()?.insert(name.to_owned(), fresh).is_none(),
            "{name} is built where something is"
        );
        Ok(())
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut engines = self.alive()?;
        let engine = engines.remove(from).expect("it is there");
        engines.insert(to.to_owned(), engine);
        Ok(())
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.alive()?.remove(name);
        Ok(())
    }
    fn size(&self, name: &str) -> u64 {
        let engines = self.rack.engines.lock().unwrap();
        engines
            .get(name)
            .map_or(0, |engine| engine.engine.size_bytes())
    }
    fn boot(&self) -> Option<String> {
        Some(self.rack.boot.load(Ordering::Relaxed).to_string())
    }
}

/// How a run ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Kill,
    Power,
}

struct Trial {
    seed: u64,
    disk: MemoryDisk,
    rack: Rack,
    store: SyncStore,
    /// Callbacks of a rebuild change it as well.
    life: RefCell<Life>,
}

struct Life {
    dice: Dice,
    script: Script,
    model: Model,
    log: Vec<String>,
}

impl Trial {
    fn new(seed: u64, kind: FileEngine) -> Trial {
        let mut dice = Dice(seed ^ 0xb417);
        let disk = MemoryDisk::new();
        let rack = Rack::default();
        let settings = SyncSettings {
            lag_frames: dice.roll(5) as usize,
            segment_bytes: 4_096,
            ..SyncSettings::default()
        };
        let (store, _) = SyncStore::open_in(
            &disk,
            settings,
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(seed)),
            rack.home(kind),
        )
        .unwrap();
        Trial {
            seed,
            disk,
            rack,
            store,
            life: RefCell::new(Life {
                dice,
                script: Script::new(seed),
                model: Model::default(),
                log: Vec::new(),
            }),
        }
    }

    fn roll(&self, sides: u64) -> u64 {
        self.life.borrow_mut().dice.roll(sides)
    }

    fn note(&self, text: impl Into<String>) {
        self.life.borrow_mut().log.push(text.into());
    }

    fn work(&self, batches: u64) {
        for _ in 0..batches {
            let Life { script, model, .. } = &mut *self.life.borrow_mut();
            let batch = script.batch(model);
            batch.iter().for_each(|op| model.apply(op));
            let (sender, receiver) = mpsc::channel();
            self.store.commit(
                batch,
                Box::new(move |verdict| sender.send(verdict).unwrap()),
            );
            assert_eq!(receiver.try_recv(), Ok(Ok(())));
        }
    }

    fn check(&self, when: &str) {
        let life = self.life.borrow();
        if let Some(difference) = life.model.difference(&self.store, &life.script) {
            panic!("seed {}, {when}: {difference}\n{:#?}", self.seed, life.log);
        }
    }

    fn end(&self, end: End) -> OpenReport {
        self.note(format!("{end:?}"));
        let seed = self.roll(1 << 30);
        self.rack
            .ends(&mut self.life.borrow_mut().dice, end == End::Power);
        let report = match end {
            End::Kill => self.store.kill_and_reopen(),
            End::Power => self.store.crash_and_reopen(seed),
        };
        let report = report.unwrap_or_else(|error| {
            panic!("seed {}: {error}\n{:#?}", self.seed, self.life.borrow().log)
        });
        self.check("after a start");
        report
    }

    /// Builds the engine anew with writes between the stages, and ends everything after the stage of this number.
    fn rebuild(&self, end: Option<(u64, End)>) -> Vec<Stage> {
        let stages = RefCell::new(Vec::new());
        let built = self.store.keeper().rebuild_in_stages(&|stage| {
            self.note(format!("{stage:?}"));
            let number = stages.borrow().len() as u64;
            stages.borrow_mut().push(stage);
            if let Some((after, end)) = end
                && after == number
            {
                self.end(end);
                return Err(RebuildError::Interrupted);
            }
            let batches = self.roll(4);
            self.work(batches);
            if number.is_multiple_of(4) {
                self.check("while it is built");
            }
            Ok(())
        });
        match (built, end) {
            (Ok(_), _) => self.check("when it was built"),
            (Err(RebuildError::Interrupted), Some(_)) => {}
            (Err(error), _) => panic!("seed {}: {error}", self.seed),
        }
        stages.into_inner()
    }
}

#[test]
fn an_engine_is_built_anew_while_writes_go_on_between_every_step() {
    for seed in 0..4 {
        let trial = Trial::new(seed, FileEngine::Fjall);
        trial.work(40);
        for round in 2..5 {
            let stages = trial.rebuild(None);
            assert!(stages.contains(&Stage::Copied), "more than a page");
            assert_eq!(
                trial.rack.names(),
                [format!("fjall.{round}")],
                "the one before is gone"
            );
            trial.work(10);
        }
        assert_eq!(trial.store.stats().rebuilds, 3);
        let report = trial.end(End::Kill);
        assert_eq!(report.rebuilt, None, "the new one is believed");
        assert_eq!(trial.rack.names(), ["fjall.4"]);
    }
}

#[test]
fn an_end_after_any_step_leaves_the_old_engine_or_the_new_one_and_nothing_is_lost() {
    for (kind, end) in [
        (FileEngine::Fjall, End::Kill),
        (FileEngine::Fjall, End::Power),
        (FileEngine::Sled, End::Kill),
        (FileEngine::Sled, End::Power),
    ] {
        for seed in 0..3 {
            let mut after = 0;
            loop {
                let trial = Trial::new(seed, kind);
                trial.work(12);
                if trial.roll(2) == 0 {
                    assert!(trial.store.snapshot());
                }
                let stages = trial.rebuild(Some((after, end)));
                if stages.len() as u64 <= after {
                    assert_eq!(stages.last(), Some(&Stage::TookPlace));
                    break;
                }
                let names: Vec<String> = trial
                    .rack
                    .names()
                    .into_iter()
                    .filter(|name| !name.contains("aside"))
                    .collect();
                assert_eq!(
                    names.len(),
                    1,
                    "seed {seed}, {kind:?}, {end:?} after {:?}: {names:?}",
                    stages.last()
                );
                trial.work(2);
                trial.end(End::Power);
                after += 1;
            }
        }
    }
}

#[test]
fn whatever_happens_in_whatever_order_nothing_is_lost() {
    for seed in 0..40 {
        let kind = if seed % 2 == 0 {
            FileEngine::Sled
        } else {
            FileEngine::Fjall
        };
        let trial = Trial::new(seed, kind);
        for _ in 0..25 {
            match trial.roll(12) {
                0 => {
                    trial.end(End::Kill);
                }
                1 => {
                    trial.end(End::Power);
                }
                2 => {
                    trial.rebuild(None);
                }
                3 => {
                    let end = if trial.roll(2) == 0 {
                        End::Kill
                    } else {
                        End::Power
                    };
                    let after = trial.roll(6);
                    trial.rebuild(Some((after, end)));
                }
                4 => assert!(trial.store.snapshot()),
                5 => trial.store.catch_up(),
                _ => trial.work(3),
            }
            trial.check("while running");
        }
        trial.end(End::Power);
        trial.end(End::Kill);
    }
}

#[test]
fn an_engine_that_cannot_be_named_does_not_take_the_place() {
    for broken in 0..2 {
        let trial = Trial::new(broken, FileEngine::Fjall);
        trial.work(40);
        let built = trial.store.keeper().rebuild_in_stages(&|stage| {
            if stage == Stage::Settled {
                match broken {
                    0 => trial.disk.fail_sync_in(0),
                    _ => trial.disk.fail_write_in(0),
                }
            }
            Ok(())
        });
        assert!(matches!(built, Err(RebuildError::Engine(_))));
        assert_eq!(trial.store.stats().rebuilds, 0);
        trial.check("after it failed");
        trial.work(5);
        assert_eq!(trial.rack.names(), ["fjall"], "the build was removed");
        trial.end(End::Kill);
        trial.rebuild(None);
        trial.end(End::Power);
    }
}

#[test]
fn an_engine_that_cannot_take_what_is_written_meanwhile_is_given_up() {
    struct Broken;
    impl Engine for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
        fn get(&self, _: &[u8]) -> Result<Option<Bytes>, EngineError> {
            Ok(None)
        }
        fn scan(&self, _: Range<&[u8]>, _: Direction, _: Visit<'_>) -> Result<(), EngineError> {
            Ok(())
        }
        fn apply(&self, _: &[EngineWrite], _: Option<u64>) -> Result<(), EngineError> {
            Err(EngineError("no".to_owned()))
        }
        fn position(&self) -> Result<Option<u64>, EngineError> {
            Ok(None)
        }
        fn size_bytes(&self) -> u64 {
            0
        }
        fn flush(&self) -> Result<(), EngineError> {
            Ok(())
        }
        fn close(&self) -> Result<(), EngineError> {
            Ok(())
        }
    }
    let current = Current::new(Arc::new(MemoryEngine::new()));
    let fill = current.fill(Arc::new(Broken));
    let write = EngineWrite {
        key: Bytes::from_static(b"m"),
        value: Some(Bytes::from_static(b"1")),
    };
    current.apply(&[write], Some(2)).unwrap();
    assert!(current.get(b"m").unwrap().is_some(), "the store goes on");
    assert!(fill.take_place(|| panic!("it must not be named")).is_err());
    assert_eq!(current.name(), "memory");
}

#[test]
fn a_walk_that_began_before_the_change_ends_over_what_it_began_with() {
    let current = Current::new(Arc::new(MemoryEngine::new()));
    let put = |key: u8, value: u8| {
        let write = EngineWrite {
            key: Bytes::copy_from_slice(&[key]),
            value: Some(Bytes::copy_from_slice(&[value])),
        };
        current.apply(&[write], Some(1)).unwrap();
    };
    (b'a'..=b'z').for_each(|key| put(key, 1));
    let mut before = None;
    let mut seen = Vec::new();
    current
        .scan(b"a"..b"{", Direction::Up, &mut |key, value| {
            if key == b"m" {
                let mut fill = current.fill(Arc::new(MemoryEngine::new()));
                while fill.step().unwrap() {}
                before = Some(fill.take_place(|| Ok(())).unwrap());
                (b'a'..=b'z').for_each(|key| put(key, 2));
            }
            seen.push(value[0]);
            ControlFlow::Continue(())
        })
        .unwrap();
    assert_eq!(seen, [1; 26]);
    assert_eq!(Arc::strong_count(&before.unwrap()), 1, "nobody has it now");
    assert_eq!(current.get(b"z").unwrap().unwrap()[0], 2);
}

#[test]
fn a_lost_or_rotten_pointer_and_another_choice_in_the_settings_never_believe_old_files() {
    for what in ["lost", "rotten", "another engine"] {
        let trial = Trial::new(7, FileEngine::Fjall);
        trial.work(40);
        trial.rebuild(None);
        trial.work(10);
        assert_eq!(trial.rack.names(), ["fjall.2"]);
        let disk: &dyn Disk = &trial.disk;
        match what {
            "lost" => disk.remove(home::POINTER).unwrap(),
            "rotten" => assert!(trial.disk.flip(home::POINTER, 20, 1)),
            _ => {}
        }
        trial.rack.ends(&mut trial.life.borrow_mut().dice, false);
        trial.disk.kill();
        let kind = if what == "another engine" {
            FileEngine::Sled
        } else {
            FileEngine::Fjall
        };
        let (store, report) = SyncStore::open_in(
            &trial.disk,
            SyncSettings::default(),
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(1)),
            trial.rack.home(kind),
        )
        .unwrap();
        let rebuilt = report.rebuilt.unwrap();
        assert_eq!(
            trial.rack.names(),
            [
                "fjall.2.aside-20231114T221320Z".to_owned(),
                format!("{}.3", kind.name())
            ],
            "{what}: {}",
            rebuilt.why
        );
        let life = trial.life.borrow();
        assert_eq!(life.model.difference(&store, &life.script), None, "{what}");
    }
}

/// What breaks a conversion off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Break {
    /// After so many words of progress.
    After(u64, End),
    /// The sync of this number fails.
    Sync(u64),
    /// The write of this number fails.
    Write(u64),
}

impl Trial {
    /// Ends the server, converts, and breaks that off. `Some`: it came to its end all the same.
    fn convert(&self, to: FileEngine, how: Break) -> Option<Result<Converted, ConvertError>> {
        /// What a process leaves behind that is killed: nothing is tidied up.
        struct Cut;
        self.note(format!("convert to {to:?}, {how:?}"));
        let ends = |end| {
            let seed = self.roll(1 << 30);
            self.rack
                .ends(&mut self.life.borrow_mut().dice, end == End::Power);
            match end {
                End::Kill => self.disk.kill(),
                End::Power => self.disk.crash(seed),
            }
        };
        ends(End::Kill);
        match how {
            Break::After(..) => {}
            Break::Sync(number) => self.disk.fail_sync_in(number),
            Break::Write(number) => self.disk.fail_write_in(number),
        }
        let process = self.rack.process.load(Ordering::Relaxed);
        let mut words = 0;
        let converted = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            convert_on(
                Arc::new(self.disk.clone()),
                &|| {
                    Box::new(RackFiles {
                        rack: self.rack.clone(),
                        process,
                    })
                },
                to,
                &ManualClock::new(1_700_000_000_000),
                &mut |step, _, _| {
                    self.note(format!("{step:?}"));
                    if let Break::After(after, end) = how
                        && after == words
                    {
                        ends(end);
                        std::panic::resume_unwind(Box::new(Cut));
                    }
                    words += 1;
                },
            )
        }));
        match converted {
            Ok(converted) => {
                ends(End::Kill);
                Some(converted)
            }
            Err(cut) => {
                assert!(cut.is::<Cut>(), "seed {}: {how:?}", self.seed);
                None
            }
        }
    }

    /// A start with an engine finds everything.
    fn starts(&self, kind: FileEngine) -> OpenReport {
        let life = self.life.borrow();
        let (store, report) = SyncStore::open_in(
            &self.disk,
            SyncSettings::default(),
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(1)),
            self.rack.home(kind),
        )
        .unwrap_or_else(|error| panic!("seed {}: {error}\n{:#?}", self.seed, life.log));
        let difference = life.model.difference(&store, &life.script);
        assert_eq!(difference, None, "seed {}: {:#?}", self.seed, life.log);
        report
    }

    fn not_aside(&self) -> Vec<String> {
        let mut names = self.rack.names();
        names.retain(|name| !name.contains("aside"));
        names
    }
}

#[test]
fn a_conversion_broken_off_at_any_moment_leaves_a_store_that_starts_and_nothing_is_lost() {
    let kinds = [
        (FileEngine::Sled, FileEngine::Fjall),
        (FileEngine::Fjall, FileEngine::Sled),
    ];
    type Kind = fn(u64) -> Break;
    let breaks: [Kind; 4] = [
        |n| Break::After(n, End::Kill),
        |n| Break::After(n, End::Power),
        Break::Sync,
        Break::Write,
    ];
    for (from, to) in kinds {
        for how in breaks {
            for seed in 0..4 {
                let mut number = 0;
                loop {
                    let trial = Trial::new(seed, from);
                    trial.work(20);
                    if trial.roll(2) == 0 {
                        assert!(trial.store.snapshot());
                        trial.work(3);
                    }
                    let converted = trial.convert(to, how(number));
                    let kind = if trial.roll(2) == 0 { from } else { to };
                    trial.disk.fail_sync_in(u64::MAX);
                    trial.disk.fail_write_in(u64::MAX);
                    let report = trial.starts(kind);
                    assert_eq!(
                        trial.not_aside().len(),
                        1,
                        "one counts, and the others are out of the way: {:#?}",
                        trial.life.borrow().log
                    );
                    if let Some(Ok(converted)) = converted {
                        assert_eq!(converted.from, Some(from.name()));
                        assert!(converted.digest.entries > 0);
                        assert_eq!(report.rebuilt.is_none(), kind == to, "it is believed");
                        let least = match how(0) {
                            Break::After(..) => 5,
                            Break::Sync(_) | Break::Write(_) => 2,
                        };
                        assert!(number >= least, "it was broken off before: {number}");
                        break;
                    }
                    // And again, to its end.
                    let again = trial.convert(if kind == from { to } else { from }, how(u64::MAX));
                    again.unwrap().unwrap();
                    trial.starts(if kind == from { to } else { from });
                    number += 1;
                }
            }
        }
    }
}

#[test]
fn a_conversion_that_has_no_room_says_so_before_it_begins() {
    let trial = Trial::new(3, FileEngine::Fjall);
    trial.work(20);
    trial.disk.set_capacity(Some(trial.disk.used() + (1 << 20)));
    let refused = trial.convert(FileEngine::Sled, Break::Sync(u64::MAX));
    let Some(Err(ConvertError::NoRoom { need, free })) = refused else {
        panic!("{refused:?}");
    };
    assert!(need > 64 << 20 && free <= 1 << 20, "{need}, {free}");
    assert_eq!(trial.rack.names(), ["fjall"]);
    trial.disk.set_capacity(None);
    assert_eq!(trial.starts(FileEngine::Fjall).rebuilt, None);
}

#[test]
fn no_engine_gets_another_name_before_a_note_says_where_the_log_goes_on() {
    for number in 0.. {
        let trial = Trial::new(7, FileEngine::Sled);
        trial.work(40);
        trial.store.catch_up();
        // The log loses its end, and the engine alone knows what was there.
        let mut segments = trial.disk.names();
        segments.retain(|name| name.starts_with("log/") && name.ends_with(".seg"));
        assert!(segments.len() > 3, "{segments:?}");
        for lost in &segments[2..] {
            trial.disk.remove(lost).unwrap();
        }
        trial.disk.fail_write_in(number);
        let opened = SyncStore::open_in(
            &trial.disk,
            SyncSettings::default(),
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(1)),
            trial.rack.home(FileEngine::Sled),
        );
        let aside = trial.rack.names().iter().any(|name| name.contains("aside"));
        let told = |name: &String| name.starts_with("set-aside/") && name.ends_with(".txt");
        let told = trial.disk.names().iter().any(told);
        assert!(told || !aside, "write {number}");
        if let Ok((_, report)) = opened {
            let rebuilt = report.rebuilt.unwrap();
            assert!(rebuilt.why.contains("ahead of the log"), "{}", rebuilt.why);
            assert!(aside && rebuilt.moved_to.is_some());
            assert!(number >= 2, "it was broken off before: {number}");
            return;
        }
    }
}
