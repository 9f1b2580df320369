//! What is safe rests before the engine takes it: what comes and goes meanwhile never reaches the engine, a kill loses nothing of it,
//! and nothing rests for ever.

use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::super::apply::SafeFrame;
use super::super::engine::memory::MemoryEngine;
use super::super::engine::{EngineError, EngineWrite, Visit};
use super::super::testing::{ManualClock, SeededEntropy};
use super::super::write::FrameBuilder;
use super::super::*;
use super::support::*;
use crate::delivery::Outcome;

/// Longer than any test takes.
const LONG: Duration = Duration::from_secs(3600);

/// An engine in memory that remembers what it was told to write.
#[derive(Default)]
struct Recorder {
    inner: MemoryEngine,
    told: Mutex<Vec<EngineWrite>>,
}

impl Recorder {
    /// How many writes there were of keys that begin like this, and how many of those were puts.
    fn told(&self, room: u8) -> (usize, usize) {
        let told = self.told.lock().unwrap();
        let of_room = told.iter().filter(|write| write.key[0] == room);
        let puts = of_room.clone().filter(|write| write.value.is_some());
        (of_room.count(), puts.count())
    }
}

impl Engine for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.inner.get(key)
    }
    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: engine::Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        self.inner.scan(range, direction, visit)
    }
    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        self.told.lock().unwrap().extend_from_slice(batch);
        self.inner.apply(batch, position)
    }
    fn position(&self) -> Result<Option<u64>, EngineError> {
        self.inner.position()
    }
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }
    fn flush(&self) -> Result<(), EngineError> {
        Ok(())
    }
    fn close(&self) -> Result<(), EngineError> {
        Ok(())
    }
}

/// An applier on its thread, and what it works on. Its clock stands still.
struct Bench {
    engine: Arc<Recorder>,
    overlay: Arc<Overlay>,
    queue: Arc<Queue>,
    clock: Arc<ManualClock>,
    thread: JoinHandle<()>,
    frames: u64,
}

impl Bench {
    fn new(rest: Duration, lag_bytes: u64) -> Bench {
        let engine = Arc::new(Recorder::default());
        let clock = Arc::new(ManualClock::new(1_700_000_000_000));
        let limit = LagLimit {
            bytes: lag_bytes,
            time: LONG,
        };
        let queue = Arc::new(Queue::new(limit, rest, 0));
        let overlay = Arc::new(Overlay::new());
        let applier = Applier::new(
            Arc::clone(&engine) as Arc<dyn Engine>,
            Arc::clone(&overlay),
            Arc::clone(&clock) as Arc<dyn Clock>,
        );
        let thread = {
            let queue = Arc::clone(&queue);
            std::thread::spawn(move || applier.run(&queue, &|| {}))
        };
        Bench {
            engine,
            overlay,
            queue,
            clock,
            thread,
            frames: 0,
        }
    }

    fn push(&mut self, ops: &[Op]) {
        self.frames += 1;
        let mut frame = FrameBuilder::new();
        ops.iter().for_each(|op| frame.add(op).unwrap());
        let (bytes, writes) = frame.seal(self.frames, 0);
        let most = self.queue.run_bytes();
        let showing = self.overlay.publish(self.frames, bytes.len(), writes, most);
        self.queue.push(SafeFrame {
            number: self.frames,
            bytes: bytes.len(),
            at: self.clock.now().mono,
        });
        drop(showing);
    }

    /// Waits until the engine has every frame.
    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.queue.applied() < self.frames {
            assert!(Instant::now() < deadline, "it rests for ever");
            std::thread::yield_now();
        }
    }

    fn close(self) -> Arc<Recorder> {
        self.queue.close();
        self.thread.join().unwrap();
        assert_eq!(self.queue.applied(), self.frames);
        assert_eq!(self.engine.position().unwrap(), Some(self.frames + 1));
        self.engine
    }
}

#[test]
fn what_comes_and_goes_while_it_rests_never_reaches_the_engine() {
    let mut bench = Bench::new(LONG, u64::MAX);
    let device = device_id(1);
    let stays = notification(ping_id(99), |_| {});
    bench.push(&[register(device, "ada"), insert(device, 99, &stays)]);
    for order in 1..=20 {
        let note = notification(ping_id(order), |note| note.collapse = key("score"));
        bench.push(&[
            insert(device, order, &note),
            summary(device, 2, 10, order + 1),
        ]);
        bench.push(&[
            remove(device, order, &note, Outcome::Acknowledged, order),
            summary(device, 1, 5, order + 1),
        ]);
    }
    assert_eq!(bench.queue.applied(), 0, "all of it rests");
    let engine = bench.close();
    for (room, writes) in [
        (b'r', 1),
        (b'x', 1),
        (b'c', 0),
        (b'p', 21),
        (b't', 20),
        (b's', 1),
    ] {
        let name = char::from(room);
        assert_eq!(engine.told(room), (writes, writes), "{name}");
    }
}

#[test]
fn what_the_engine_took_before_is_removed_from_it() {
    let mut bench = Bench::new(Duration::ZERO, u64::MAX);
    let (device, note) = (device_id(1), notification(ping_id(1), |_| {}));
    bench.push(&[insert(device, 1, &note)]);
    bench.wait();
    bench.push(&[remove(device, 1, &note, Outcome::Acknowledged, 7)]);
    let engine = bench.close();
    assert_eq!(engine.told(b'r'), (2, 1), "a put, then a removal");
    let rows = keys::rows(device);
    let mut left = 0;
    let count: Visit<'_> = &mut |_, _| {
        left += 1;
        std::ops::ControlFlow::Continue(())
    };
    let up = engine::Direction::Up;
    engine.scan(&*rows..&*rows.end(), up, count).unwrap();
    assert_eq!(left, 0);
}

#[test]
fn nothing_rests_for_ever_even_if_the_clock_stands_still() {
    let mut bench = Bench::new(Duration::from_millis(10), u64::MAX);
    for n in 1..=5 {
        bench.push(&[register(device_id(n), "ada")]);
        bench.wait();
    }
    bench.close();
}

#[test]
fn a_quarter_of_what_the_engine_may_be_behind_ends_the_rest() {
    let mut bench = Bench::new(LONG, 64 << 10);
    for n in 1..=40u64 {
        let note = notification(ping_id(n), |note| note.content = vec![7; 1_000].into());
        bench.push(&[insert(device_id(n), 1, &note)]);
    }
    // Without any help of the clock.
    let deadline = Instant::now() + PATIENCE;
    while bench.queue.applied() < 16 {
        assert!(Instant::now() < deadline, "it rests for ever");
        std::thread::yield_now();
    }
    bench.close();
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).unwrap();
        }
    }
}

fn open_resting(dir: &Path, engine: EngineKind) -> (House, OpenReport) {
    let settings = StoreSettings {
        rest_time: LONG,
        ..settings(dir, engine)
    };
    open_house(
        &settings,
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(9)),
    )
    .unwrap()
}

#[test]
fn a_kill_while_frames_rest_loses_nothing() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let dir = tempfile::tempdir().unwrap();
        let device = device_id(1);
        let notes: Vec<_> = (1..=6).map(|n| notification(ping_id(n), |_| {})).collect();
        let add = |order: u64| insert(device, order, &notes[order as usize - 1]);
        let end = |order: u64| {
            let note = &notes[order as usize - 1];
            remove(device, order, note, Outcome::Acknowledged, 9)
        };
        let (house, _) = open_resting(&dir.path().join("data"), engine);
        commit(&house, vec![register(device, "ada"), add(1), add(2)]).unwrap();
        house.close();
        drop(house);
        // The engine has two rows. One of them and two of four new ones go while everything rests.
        let (house, _) = open_resting(&dir.path().join("data"), engine);
        commit(&house, vec![add(3), add(4)]).unwrap();
        commit(&house, vec![end(1), end(3)]).unwrap();
        commit(&house, vec![add(5), add(6), summary(device, 3, 15, 7)]).unwrap();
        commit(&house, vec![end(5), summary(device, 3, 15, 7)]).unwrap();
        assert!(house.stats().lag_bytes > 0, "it rests");
        let there = |house: &House| {
            let view = house.read_mailbox(&everything(device)).unwrap();
            assert_eq!(view.summary.unwrap().count, 3);
            let rows = view.rows.iter().map(|row| row.key.order);
            let ended = (1..=6).filter(|n| {
                let page = house.pairs(ping_id(*n), None, 1).unwrap();
                matches!(page.items[..], [(_, _, PairState::Ended { .. })])
            });
            (rows.collect::<Vec<_>>(), ended.collect::<Vec<_>>())
        };
        let expected = (vec![2, 4, 6], vec![1, 3, 5]);
        assert_eq!(there(&house), expected);
        // What a kill leaves is what is in the files now.
        copy(&dir.path().join("data"), &dir.path().join("killed"));
        let (after, report) = open_resting(&dir.path().join("killed"), engine);
        assert_eq!(report.rebuilt, None);
        assert!(report.replayed_frames >= 4, "{report:?}");
        assert_eq!(there(&after), expected, "{engine:?}");
        after.close();
        assert_eq!(there(&after), expected, "{engine:?}: applied");
        house.close();
        assert_eq!(there(&house), expected, "{engine:?}: the one that went on");
    }
}

#[test]
fn a_replay_removes_rows_that_an_earlier_life_had_brought_into_the_engine() {
    for engine in [FileEngine::Sled, FileEngine::Fjall] {
        let kind = match engine {
            FileEngine::Sled => EngineKind::Sled,
            FileEngine::Fjall => EngineKind::Fjall,
        };
        let dir = tempfile::tempdir().unwrap();
        let (device, note) = (device_id(1), notification(ping_id(1), |_| {}));
        let (house, _) = open_resting(dir.path(), kind);
        let before = house.stats().last_frame;
        commit(
            &house,
            vec![register(device, "ada"), insert(device, 1, &note)],
        )
        .unwrap();
        let ends = remove(device, 1, &note, Outcome::Acknowledged, 9);
        commit(&house, vec![ends, summary(device, 0, 0, 2)]).unwrap();
        house.close();
        drop(house);
        // As if a run of both frames had been broken off by a kill behind the batch that has the row: the engine has the row,
        // and stands before the frame that put it.
        let files = RealFiles::new(dir.path(), 8 << 20);
        let raw = home::Files::open(&files, engine, engine.name()).unwrap();
        let row = RowKey {
            urgency: note.urgency,
            order: 1,
        };
        let key = Bytes::copy_from_slice(&keys::row(device, row));
        let mut value = Vec::new();
        record::put_row(&key, &mut value, 1, &note);
        let put = EngineWrite {
            key: key.clone(),
            value: Some(value.into()),
        };
        raw.apply(&[put], Some(before + 1)).unwrap();
        raw.close().unwrap();
        drop(raw);
        let (house, report) = open_resting(dir.path(), kind);
        assert_eq!(report.rebuilt, None);
        assert!(report.replayed_frames >= 2, "{report:?}");
        let view = house.read_mailbox(&everything(device)).unwrap();
        assert_eq!(view.rows, [], "{kind:?}: it was acknowledged");
        assert_eq!(house.engine.get(&key).unwrap(), None);
    }
}

#[test]
fn what_rests_within_its_bounds_is_no_lag_and_what_goes_beyond_is() {
    let clock = ManualClock::new(1_700_000_000_000);
    let at = clock.now().mono;
    let limit = LagLimit {
        bytes: 1_000,
        time: Duration::from_secs(12),
    };
    let queue = |rest| Queue::new(limit, Duration::from_secs(rest), 0);
    let push = |queue: &Queue, bytes| {
        queue.push(SafeFrame {
            number: 1,
            bytes,
            at,
        });
    };
    let after = |millis| at + Duration::from_millis(millis);
    let resting = queue(10);
    push(&resting, 250);
    for (millis, crowded, behind) in [
        (0, false, false),
        (9_999, false, false),
        (10_999, false, false),
        (11_000, true, false),
        (11_999, true, false),
        (12_000, true, true),
    ] {
        assert_eq!(resting.crowded(after(millis)), crowded, "{millis} ms");
        assert_eq!(resting.behind(after(millis)), behind, "{millis} ms");
    }
    // A run that the engine has in its hands, and as much that rests meanwhile.
    push(&resting, 250);
    assert!(!resting.crowded(at));
    push(&resting, 125);
    assert!(resting.crowded(at));
    assert!(!resting.behind(at));
    // Where nothing rests, everything is lag.
    let restless = queue(0);
    push(&restless, 499);
    assert!(!restless.crowded(after(5_999)));
    assert!(restless.crowded(after(6_000)));
    push(&restless, 1);
    assert!(restless.crowded(at));
}

#[test]
fn nothing_is_left_out_with_an_engine_that_may_know_of_lost_frames() {
    let engine = Arc::new(Recorder::default());
    let clock = Arc::new(ManualClock::new(1_700_000_000_000));
    let limit = LagLimit {
        bytes: u64::MAX,
        time: LONG,
    };
    let queue = Queue::new(limit, LONG, 0);
    let overlay = Arc::new(Overlay::new());
    let mut applier = Applier::new(
        Arc::clone(&engine) as Arc<dyn Engine>,
        Arc::clone(&overlay),
        Arc::clone(&clock) as Arc<dyn Clock>,
    )
    .doubtful();
    let device = device_id(1);
    for order in 1..=3 {
        let note = notification(ping_id(order), |_| {});
        let mut frame = FrameBuilder::new();
        frame.add(&insert(device, order, &note)).unwrap();
        let ends = remove(device, order, &note, Outcome::Acknowledged, order);
        frame.add(&ends).unwrap();
        let (bytes, writes) = frame.seal(order, 0);
        let showing = overlay.publish(order, bytes.len(), writes, queue.run_bytes());
        queue.push(SafeFrame {
            number: order,
            bytes: bytes.len(),
            at: clock.now().mono,
        });
        drop(showing);
        assert_eq!(applier.step(&queue).unwrap(), 1);
        assert_eq!(engine.told(b'r'), (order as usize, 0), "its removal");
    }
}

/// Breaks the one place of the log where these bytes are.
fn rot(dir: &Path, bytes: &[u8]) {
    let mut broken = 0;
    for entry in fs::read_dir(dir.join("log")).unwrap() {
        let path = entry.unwrap().path();
        let mut segment = fs::read(&path).unwrap();
        let found = segment
            .windows(bytes.len())
            .position(|window| window == bytes);
        if let Some(place) = found {
            segment[place] ^= 1;
            fs::write(&path, segment).unwrap();
            broken += 1;
        }
    }
    assert_eq!(broken, 1);
}

#[test]
fn half_a_run_of_frames_that_rot_took_leaves_nothing_under_numbers_that_are_given_again() {
    for engine in [FileEngine::Sled, FileEngine::Fjall] {
        let kind = match engine {
            FileEngine::Sled => EngineKind::Sled,
            FileEngine::Fjall => EngineKind::Fjall,
        };
        let dir = tempfile::tempdir().unwrap();
        let (live, killed) = (dir.path().join("data"), dir.path().join("killed"));
        let device = device_id(1);
        let marked = b"these bytes are only in one frame";
        let lost = notification(ping_id(1), |note| note.content = marked.to_vec().into());
        let (house, _) = open_resting(&live, kind);
        commit(&house, vec![register(device, "ada")]).unwrap();
        house.close();
        drop(house);
        let (house, _) = open_resting(&live, kind);
        commit(
            &house,
            vec![insert(device, 1, &lost), summary(device, 1, 5, 2)],
        )
        .unwrap();
        commit(&house, vec![register(device_id(2), "bob")]).unwrap();
        copy(&live, &killed);
        house.close();
        drop(house);
        // The run was broken off behind the batch with the row, and then its frame rotted.
        let files = RealFiles::new(&killed, 8 << 20);
        let raw = home::Files::open(&files, engine, engine.name()).unwrap();
        let row = RowKey {
            urgency: lost.urgency,
            order: 1,
        };
        let key = Bytes::copy_from_slice(&keys::row(device, row));
        let mut value = Vec::new();
        record::put_row(&key, &mut value, 2, &lost);
        let put = EngineWrite {
            key: key.clone(),
            value: Some(value.into()),
        };
        raw.apply(&[put], None).unwrap();
        raw.close().unwrap();
        drop(raw);
        rot(&killed, marked);
        let (house, report) = open_resting(&killed, kind);
        assert!(!report.set_aside.is_empty(), "{report:?}");
        let rows = |house: &House| house.read_mailbox(&everything(device)).unwrap().rows;
        assert_eq!(rows(&house), [], "{kind:?}: its frame is gone");
        // The number is given again, to one that comes and goes while it rests.
        let fresh = notification(ping_id(3), |_| {});
        commit(
            &house,
            vec![insert(device, 1, &fresh), summary(device, 1, 5, 2)],
        )
        .unwrap();
        let ends = remove(device, 1, &fresh, Outcome::Acknowledged, 9);
        commit(&house, vec![ends, summary(device, 0, 0, 2)]).unwrap();
        house.close();
        assert_eq!(rows(&house), [], "{kind:?}: nothing stays");
        assert_eq!(house.engine.get(&key).unwrap(), None, "{kind:?}");
    }
}

#[test]
fn new_work_waits_for_what_a_slow_engine_will_take_and_runs_are_short_then() {
    const KIB: usize = 1 << 10;
    const MIB: usize = 1 << 20;
    let at = ManualClock::new(1_700_000_000_000).now().mono;
    let limit = LagLimit {
        bytes: 64 << 20,
        time: Duration::from_secs(5),
    };
    // Four seconds are for the engine.
    let queue = Queue::new(limit, Duration::from_secs(1), 0);
    let push = |bytes| {
        queue.push(SafeFrame {
            number: 1,
            bytes,
            at,
        });
    };
    let done = |bytes, took| queue.done(1, bytes, took);
    // As long as nothing is known of the engine, a burst is let in up to the bytes that it may be behind, and runs are long.
    push(63 * MIB);
    assert!(!queue.holds(at));
    assert_eq!(queue.run_bytes(), 16 * MIB);
    // A MiB in half a second, and again until that is what it does: 8 in four, and one in an eighth of that.
    done(63 * MIB, Duration::from_secs(63) / 2);
    for _ in 0..20 {
        push(MIB);
        done(MIB, Duration::from_millis(500));
    }
    let run = queue.run_bytes();
    assert!((MIB - KIB..=MIB).contains(&run), "{run}");
    push(8 * MIB - KIB);
    assert!(!queue.holds(at));
    push(2 * KIB);
    assert!(
        queue.holds(at),
        "the last of 8 MiB would come after four seconds"
    );
    assert!(!queue.behind(at), "but it has only just come");
    // Those who wait go on when a run is done: after half a second.
    done(MIB, Duration::from_millis(500));
    assert!(!queue.holds(at));
    // Too little to learn from.
    done(32 * KIB, Duration::from_secs(60));
    assert_eq!(queue.run_bytes(), run);
    done(7 * MIB - 31 * KIB, Duration::from_millis(3_500));
    // An engine that stands still makes itself known by the age of what waits for it.
    push(KIB);
    assert!(!queue.holds(at + Duration::from_millis(4_999)));
    assert!(queue.holds(at + Duration::from_secs(5)));
    // One that is much slower still is given little at a time, but not nothing.
    for _ in 0..20 {
        push(MIB);
        done(MIB, Duration::from_secs(60));
    }
    assert_eq!(queue.run_bytes(), 256 * KIB);
    // And one that became quick is held to its bytes alone.
    for _ in 0..30 {
        push(MIB);
        done(MIB, Duration::ZERO);
    }
    assert_eq!(queue.run_bytes(), 16 * MIB);
    push(62 * MIB);
    assert!(!queue.holds(at));
    push(2 * MIB);
    assert!(queue.holds(at));
}
