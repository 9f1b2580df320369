//! The committer's turn: who is granted when, who is told what, in which order, and what happens when somebody is stuck.

use std::collections::BTreeMap;
use std::io;
use std::sync::Condvar;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Duration;

use super::super::log::disk::DiskFile;
use super::super::testing::{ManualClock, MemoryDisk, SeededEntropy};
use super::super::*;
use super::model::{Dice, Model, Script};
use super::support::*;

/// A disk of memory whose syncs of the log wait at a gate.
#[derive(Clone)]
struct GatedDisk {
    inner: MemoryDisk,
    gate: Arc<Gate>,
}

#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Default)]
struct GateState {
    closed: bool,
    failing: bool,
    waiting: usize,
}

impl Gate {
    fn set_closed(&self, closed: bool) {
        self.state.lock().unwrap().closed = closed;
        self.changed.notify_all();
    }

    /// The next sync fails.
    fn fail_one(&self) {
        self.state.lock().unwrap().failing = true;
    }

    fn pass(&self) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.waiting += 1;
        self.changed.notify_all();
        let mut state = self
            .changed
            .wait_while(state, |state| state.closed)
            .unwrap();
        state.waiting -= 1;
        if std::mem::take(&mut state.failing) {
            return Err(io::Error::other("the gate is broken"));
        }
        Ok(())
    }

    /// Waits until a sync stands at the gate.
    fn wait_for_sync(&self) {
        let state = self.state.lock().unwrap();
        let (_state, timeout) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| state.waiting == 0)
            .unwrap();
        assert!(!timeout.timed_out(), "no sync came");
    }
}

struct GatedFile {
    inner: Box<dyn DiskFile>,
    gate: Option<Arc<Gate>>,
}

impl DiskFile for GatedFile {
    fn length(&self) -> io::Result<u64> {
        self.inner.length()
    }
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.inner.read_at(buffer, offset)
    }
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.inner.write_at(data, offset)
    }
    fn allocate(&self, length: u64) -> io::Result<()> {
        self.inner.allocate(length)
    }
    fn sync(&self) -> io::Result<()> {
        if let Some(gate) = &self.gate {
            gate.pass()?;
        }
        self.inner.sync()
    }
}

impl GatedDisk {
    fn wrap(&self, name: &str, inner: Box<dyn DiskFile>) -> Box<dyn DiskFile> {
        // The committer's segments only: the one made ready in the background must not stand at the gate.
        let gated = name.ends_with(".seg") || name.ends_with("hurried.tmp");
        Box::new(GatedFile {
            inner,
            gate: gated.then(|| Arc::clone(&self.gate)),
        })
    }
}

impl Disk for GatedDisk {
    fn make_dir(&self, name: &str) -> io::Result<()> {
        self.inner.make_dir(name)
    }
    fn create(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(name, self.inner.create(name)?))
    }
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        Ok(self.wrap(name, self.inner.open(name)?))
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.inner.list(dir)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.inner.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.inner.remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }
    fn free(&self) -> io::Result<u64> {
        self.inner.free()
    }
}

/// A store with its threads, on a disk that stands still when told to.
struct Stand {
    house: Arc<House>,
    gate: Arc<Gate>,
    clock: Arc<ManualClock>,
}

fn stand(change: impl FnOnce(&mut StoreSettings)) -> Stand {
    let gate = Arc::new(Gate::default());
    let clock = Arc::new(ManualClock::new(1_700_000_000_000));
    let mut settings = settings(Path::new(""), EngineKind::Memory);
    settings.segment_bytes = 1 << 20;
    change(&mut settings);
    let parts = assemble(
        &settings,
        Arc::new(GatedDisk {
            inner: MemoryDisk::new(),
            gate: Arc::clone(&gate),
        }),
        Arc::new(MemoryHome),
        Arc::clone(&clock) as Arc<dyn Clock>,
        Arc::new(SeededEntropy::new(5)),
    )
    .unwrap();
    let house = Arc::new(House::start(parts, None, None).unwrap());
    Stand { house, gate, clock }
}

type Events = mpsc::Receiver<(usize, Grant)>;

fn register_sources(house: &House, count: usize) -> (Vec<SourceId>, Events) {
    let (sender, events) = mpsc::channel();
    let sources = (0..count)
        .map(|n| {
            let sender = sender.clone();
            house.register(Box::new(move |grant| {
                // A test that has seen enough no longer listens.
                let _ = sender.send((n, grant));
            }))
        })
        .collect();
    (sources, events)
}

fn next(events: &Events) -> (usize, Grant) {
    events
        .recv_timeout(PATIENCE)
        .expect("the committer answers")
}

/// Takes a place, at once or when the committer says so: right after an answer it may not be open again yet.
fn take_place(house: &House, source: SourceId, events: &Events) {
    if !house.want(source) {
        assert_eq!(next(events), (source.0, Grant::Ready));
    }
}

fn one(n: u64) -> Batch {
    vec![register(device_id(n), "ada")]
}

#[test]
fn an_idle_committer_grants_at_once_and_a_busy_one_says_when() {
    let stand = stand(|_| {});
    let (sources, events) = register_sources(&stand.house, 2);
    stand.gate.set_closed(true);
    assert!(stand.house.want(sources[0]), "idle");
    assert!(!stand.house.want(sources[0]), "it has a place already");
    stand.house.submit(sources[0], one(1));
    stand.gate.wait_for_sync();
    assert!(!stand.house.want(sources[1]), "a frame is being written");
    assert!(
        !stand.house.want(sources[1]),
        "asking again changes nothing"
    );
    assert!(!stand.house.want(sources[0]));
    assert!(
        stand.house.device(device_id(1)).unwrap().is_none(),
        "what is not safe is not seen"
    );
    stand.gate.set_closed(false);
    assert_eq!(next(&events), (0, Grant::Committed(Ok(()))));
    assert_eq!(next(&events), (0, Grant::Ready), "committed before ready");
    assert_eq!(next(&events), (1, Grant::Ready));
    assert!(stand.house.device(device_id(1)).unwrap().is_some());
    stand.house.submit(sources[0], Vec::new());
    stand.house.submit(sources[1], one(2));
    assert_eq!(
        next(&events),
        (0, Grant::Committed(Ok(()))),
        "an empty batch is answered too"
    );
    assert_eq!(next(&events), (1, Grant::Committed(Ok(()))));
    take_place(&stand.house, sources[0], &events);
    stand.house.submit(sources[0], Vec::new());
    assert_eq!(next(&events), (0, Grant::Committed(Ok(()))));
}

#[test]
fn what_comes_during_a_sync_shares_the_next_one() {
    let stand = stand(|_| {});
    stand.gate.set_closed(true);
    let (sender, answers) = mpsc::channel();
    for n in 1..=100 {
        let sender = sender.clone();
        stand.house.commit(
            one(n),
            Box::new(move |verdict| sender.send((n, verdict)).unwrap()),
        );
        if n == 1 {
            stand.gate.wait_for_sync();
        }
    }
    let before = stand.house.stats().frames;
    stand.gate.set_closed(false);
    for n in 1..=100 {
        assert_eq!(
            answers.recv_timeout(PATIENCE).unwrap(),
            (n, Ok(())),
            "in order"
        );
    }
    let stats = stand.house.stats();
    assert_eq!(
        stats.frames - before,
        2,
        "the one under way and one for all the others"
    );
    assert_eq!(stats.syncs, stats.frames);
}

#[test]
fn a_source_that_never_submits_does_not_stop_the_house() {
    let stand = stand(|_| {});
    let (sources, events) = register_sources(&stand.house, 2);
    assert!(stand.house.want(sources[0]), "granted, and then nothing");
    assert!(stand.house.want(sources[1]));
    stand.house.submit(sources[1], one(1));
    assert_eq!(next(&events), (1, Grant::Committed(Ok(()))));
    // Late, but not lost.
    stand.house.submit(sources[0], one(2));
    assert_eq!(next(&events), (0, Grant::Committed(Ok(()))));
    assert!(stand.house.device(device_id(2)).unwrap().is_some());
}

#[test]
fn a_callback_that_panics_harms_nobody_else() {
    let stand = stand(|_| {});
    stand
        .house
        .commit(one(1), Box::new(|_| panic!("a caller's mistake")));
    assert_eq!(commit(&*stand.house, one(2)), Ok(()));
    assert!(stand.house.device(device_id(1)).unwrap().is_some());
}

#[test]
fn nothing_is_written_for_nothing_and_rides_join_what_is_written() {
    let stand = stand(|_| {});
    let before = stand.house.stats().frames;
    stand.house.ride_along(one(1).remove(0));
    assert_eq!(commit(&*stand.house, Vec::new()), Ok(()));
    assert_eq!(
        stand.house.stats().frames,
        before,
        "an empty batch needs no frame"
    );
    assert!(stand.house.device(device_id(1)).unwrap().is_none());
    assert_eq!(commit(&*stand.house, one(2)), Ok(()));
    assert_eq!(stand.house.stats().frames, before + 1);
    assert!(
        stand.house.device(device_id(1)).unwrap().is_some(),
        "it rode along"
    );
}

#[test]
fn a_batch_that_cannot_be_written_is_refused_alone() {
    let stand = stand(|_| {});
    let huge = notification(ping_id(1), |note| note.content = vec![0; 80 << 10].into());
    stand.gate.set_closed(true);
    let (sender, answers) = mpsc::channel();
    let batches = [
        one(1),
        vec![
            register(device_id(2), "ada"),
            insert(device_id(2), 1, &huge),
        ],
        one(3),
    ];
    for batch in batches {
        let sender = sender.clone();
        stand.house.commit(
            batch,
            Box::new(move |verdict| sender.send(verdict).unwrap()),
        );
    }
    stand.gate.set_closed(false);
    let verdicts: Vec<Committed> = (0..3)
        .map(|_| answers.recv_timeout(PATIENCE).unwrap())
        .collect();
    assert_eq!(verdicts, [Ok(()), Err(CommitFailure::NoRoom), Ok(())]);
    assert!(
        stand.house.device(device_id(2)).unwrap().is_none(),
        "all of it or nothing"
    );
    assert!(stand.house.device(device_id(3)).unwrap().is_some());
}

#[test]
fn an_engine_too_far_behind_makes_new_work_wait() {
    let stand = stand(|settings| settings.lag_bytes = 4_000);
    let (sources, events) = register_sources(&stand.house, 1);
    stand.house.queue.pause(true);
    let big = notification(ping_id(1), |note| note.content = vec![7; 8_000].into());
    assert_eq!(
        commit(&*stand.house, vec![insert(device_id(1), 1, &big)]),
        Ok(())
    );
    // The answer came before the committer looked at the lag; the next want is the first to feel it.
    assert_eq!(stand.house.health(), StoreHealth::Behind);
    let (sender, answers) = mpsc::channel();
    let mut granted = stand.house.want(sources[0]);
    if granted {
        // It was still open: the place is given back empty, and the next one has to wait.
        stand.house.submit(sources[0], Vec::new());
        assert_eq!(next(&events), (0, Grant::Committed(Ok(()))));
        granted = stand.house.want(sources[0]);
    }
    assert!(!granted);
    stand.house.commit(
        one(1),
        Box::new(move |verdict| sender.send(verdict).unwrap()),
    );
    assert!(
        events.try_recv().is_err(),
        "no place while the engine is behind"
    );
    assert!(answers.try_recv().is_err());
    stand.house.queue.pause(false);
    assert_eq!(next(&events), (0, Grant::Ready));
    stand.house.submit(sources[0], one(2));
    assert_eq!(next(&events), (0, Grant::Committed(Ok(()))));
    assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), Ok(()));
    stand.house.close();
    assert_eq!(stand.house.health(), StoreHealth::Open);
}

#[test]
fn what_waits_for_the_engine_is_bounded_by_the_memory_of_the_store_too() {
    for (memory_bytes, behind) in [(16_000, StoreHealth::Behind), (64 << 20, StoreHealth::Open)] {
        let stand = stand(|settings| {
            settings.lag_bytes = u64::MAX;
            settings.memory_bytes = memory_bytes;
        });
        stand.house.queue.pause(true);
        let big = notification(ping_id(1), |note| note.content = vec![7; 8_000].into());
        let insert = vec![insert(device_id(1), 1, &big)];
        assert_eq!(commit(&*stand.house, insert), Ok(()));
        assert_eq!(stand.house.health(), behind, "{memory_bytes} bytes");
        stand.house.queue.pause(false);
        stand.house.close();
    }
}

#[test]
fn lag_is_also_a_matter_of_time() {
    let stand = stand(|_| {});
    stand.house.queue.pause(true);
    assert_eq!(commit(&*stand.house, one(1)), Ok(()));
    assert_eq!(stand.house.health(), StoreHealth::Open);
    stand.clock.advance(Duration::from_secs(3));
    assert_eq!(stand.house.health(), StoreHealth::Behind);
    assert_eq!(stand.house.stats().lag_ms, 3_000);
    stand.house.queue.pause(false);
    stand.house.close();
    assert_eq!(stand.house.stats().lag_bytes, 0);
}

#[test]
fn closing_writes_what_was_handed_over_and_fails_what_comes_after() {
    let stand = stand(|_| {});
    let (sources, events) = register_sources(&stand.house, 1);
    let (sender, answers) = mpsc::channel();
    stand.gate.set_closed(true);
    for n in 1..=3 {
        let sender = sender.clone();
        stand.house.commit(
            one(n),
            Box::new(move |verdict| sender.send(verdict).unwrap()),
        );
        if n == 1 {
            stand.gate.wait_for_sync();
        }
    }
    assert!(!stand.house.want(sources[0]));
    let closing = {
        let house = Arc::clone(&stand.house);
        std::thread::spawn(move || house.close())
    };
    stand.gate.set_closed(false);
    closing.join().unwrap();
    for _ in 0..3 {
        assert_eq!(answers.recv_timeout(PATIENCE).unwrap(), Ok(()));
    }
    // Whoever waited for a place is told, so that it hears the failure instead of nothing.
    assert_eq!(next(&events), (0, Grant::Ready));
    stand.house.submit(sources[0], one(9));
    assert_eq!(
        next(&events),
        (0, Grant::Committed(Err(CommitFailure::Failed)))
    );
    assert_eq!(commit(&*stand.house, one(9)), Err(CommitFailure::Failed));
    assert!(
        stand.house.device(device_id(3)).unwrap().is_some(),
        "reads go on"
    );
    assert!(stand.house.device(device_id(9)).unwrap().is_none());
}

#[test]
fn a_failed_sync_fails_everybody_in_the_frame_and_everybody_after() {
    let stand = stand(|_| {});
    let (sources, events) = register_sources(&stand.house, 2);
    assert_eq!(commit(&*stand.house, one(1)), Ok(()));
    stand.gate.fail_one();
    let failed = Grant::Committed(Err(CommitFailure::Failed));
    take_place(&stand.house, sources[0], &events);
    take_place(&stand.house, sources[1], &events);
    stand.house.submit(sources[0], one(2));
    stand.house.submit(sources[1], one(3));
    assert_eq!(next(&events), (0, failed));
    assert_eq!(next(&events), (1, failed));
    assert!(matches!(stand.house.health(), StoreHealth::Failed(_)));
    assert_eq!(commit(&*stand.house, one(4)), Err(CommitFailure::Failed));
    assert!(
        stand.house.device(device_id(1)).unwrap().is_some(),
        "reads go on"
    );
    assert!(
        stand.house.device(device_id(2)).unwrap().is_none(),
        "unpromised is unseen"
    );
}

#[test]
fn many_sources_at_once_are_each_answered_once_for_each_batch() {
    const SOURCES: usize = 6;
    const BATCHES: u64 = 200;
    let stand = stand(|settings| settings.segment_bytes = 8 << 10);
    let mut threads = Vec::new();
    for n in 0..SOURCES {
        let house = Arc::clone(&stand.house);
        threads.push(std::thread::spawn(move || {
            let (sender, events) = mpsc::channel();
            let source = house.register(Box::new(move |grant| sender.send(grant).unwrap()));
            let mut dice = Dice(n as u64);
            let mut next_device = (n as u64) << 32;
            for _ in 0..BATCHES {
                if !house.want(source) {
                    assert_eq!(events.recv_timeout(PATIENCE).unwrap(), Grant::Ready);
                }
                let batch: Batch = (0..dice.roll(4))
                    .map(|_| {
                        next_device += 1;
                        register(device_id(next_device), "ada")
                    })
                    .collect();
                house.submit(source, batch);
                assert_eq!(
                    events.recv_timeout(PATIENCE).unwrap(),
                    Grant::Committed(Ok(()))
                );
                if next_device & 0xffff_ffff > 0 {
                    assert!(house.device(device_id(next_device)).unwrap().is_some());
                }
            }
            assert!(events.try_recv().is_err(), "no answer too many");
        }));
    }
    for thread in threads {
        thread.join().unwrap();
    }
    let stats = stand.house.stats();
    assert!(stats.log_segments > 1, "segments were changed meanwhile");
    stand.house.close();
    assert_eq!(
        stand.house.stats().applied_frame,
        stand.house.stats().last_frame
    );
}

#[test]
fn nobody_sees_the_lag() {
    for seed in 0..20 {
        let stand = stand(|settings| settings.lag_bytes = u64::MAX);
        let mut script = Script::new(seed);
        let mut model = Model::default();
        for _ in 0..3 {
            stand.house.queue.pause(true);
            for _ in 0..15 {
                let batch = script.batch(&model);
                batch.iter().for_each(|op| model.apply(op));
                commit(&*stand.house, batch).unwrap();
            }
            assert_eq!(
                model.difference(&*stand.house, &script),
                None,
                "seed {seed}: behind"
            );
            // While the applier runs, and after.
            stand.house.queue.pause(false);
            while stand.house.stats().lag_bytes > 0 {
                assert_eq!(
                    model.difference(&*stand.house, &script),
                    None,
                    "seed {seed}: applying"
                );
            }
            assert_eq!(
                model.difference(&*stand.house, &script),
                None,
                "seed {seed}: applied"
            );
        }
    }
}

#[test]
fn a_look_at_a_mailbox_is_one_moment() {
    // A writer moves a mailbox between two states, each consistent in itself; readers must never see a mixture.
    let stand = stand(|_| {});
    let device = device_id(1);
    let done = Arc::new(AtomicBool::new(false));
    let looks = Arc::new(AtomicUsize::new(0));
    let readers: Vec<_> = (0..2)
        .map(|_| {
            let (house, done, looks) = (
                Arc::clone(&stand.house),
                Arc::clone(&done),
                Arc::clone(&looks),
            );
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let view = house.read_mailbox(&everything(device)).unwrap();
                    let count = view.summary.map_or(0, |summary| summary.count);
                    assert_eq!(count as usize, view.rows.len());
                    for row in &view.rows {
                        let body = house.read_bodies(device, &[row.key]).unwrap();
                        if let Some(note) = &body[0].1 {
                            assert_eq!(note.ping, row.ping);
                        }
                    }
                    looks.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let mut rows: BTreeMap<u64, Arc<Notification>> = BTreeMap::new();
    let mut dice = Dice(4);
    let mut order = 0;
    while order < 600 || looks.load(Ordering::Relaxed) < 200 {
        let mut batch = Vec::new();
        for _ in 0..dice.roll(4) {
            order += 1;
            let note = notification(ping_id(order), |note| note.shared = order % 2 == 0);
            batch.push(insert(device, order, &note));
            rows.insert(order, note);
        }
        while rows.len() > 8 {
            let (gone, note) = rows.pop_first().unwrap();
            batch.push(remove(
                device,
                gone,
                &note,
                crate::delivery::Outcome::Acknowledged,
                order,
            ));
        }
        batch.push(summary(device, rows.len() as u32, 0, order + 1));
        commit(&*stand.house, batch).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
}
