//! The claims that merging, partial runs and snapshots rest on: however the frames are cut into runs, wherever a run breaks
//! off and is done again, whatever a walk saw while writes went on, the engine ends in the one state that the frames say.

use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::AtomicI64;

use bytes::Bytes;

use super::super::apply::apply_run;
use super::super::engine::memory::MemoryEngine;
use super::super::engine::{Direction, EngineError, EngineWrite, Visit};
use super::super::write::{FrameBuilder, Write};
use super::super::*;
use super::model::{Dice, Model, Script};

/// The writes of frames 1, 2, 3 …
fn history(seed: u64, frames: usize) -> Vec<Vec<Write>> {
    let mut script = Script::new(seed);
    let mut model = Model::default();
    let mut history = Vec::new();
    for number in 1..=frames {
        let mut frame = FrameBuilder::new();
        for op in script.batch(&model) {
            model.apply(&op);
            frame.add(&op).unwrap();
        }
        // Now and then the oldest outcomes are forgotten.
        if script.dice.roll(10) == 0 {
            let before = script.now_ms.saturating_sub(100);
            for ((ping, device), state) in model.pairs.clone() {
                if let PairState::Ended { at_ms, .. } = state
                    && at_ms < before
                {
                    frame
                        .add_chore(&Chore::DropReceipt {
                            at_ms,
                            ping,
                            device,
                        })
                        .unwrap();
                }
            }
            model.drop_receipts(before);
        }
        history.push(frame.seal(number as u64, 0).1);
    }
    history
}

fn entries(engine: &dyn Engine) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut entries = BTreeMap::new();
    engine
        .scan(&[]..&[0xff], Direction::Up, &mut |key, value| {
            entries.insert(key.to_vec(), value.to_vec());
            ControlFlow::Continue(())
        })
        .unwrap();
    entries
}

/// Every frame by itself, in order: what must come out.
fn reference(history: &[Vec<Write>]) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let engine = MemoryEngine::new();
    for (frame, writes) in history.iter().enumerate() {
        apply_run(&engine, writes.iter(), frame as u64 + 2, false).unwrap();
    }
    entries(&engine)
}

/// Frames from `position` on, in runs of random length.
fn run_from(
    engine: &dyn Engine,
    history: &[Vec<Write>],
    dice: &mut Dice,
    elide: bool,
) -> Result<(), EngineError> {
    let mut at = engine.position()?.unwrap_or(1) as usize - 1;
    while at < history.len() {
        let end = (at + 1 + dice.roll(60) as usize).min(history.len());
        apply_run(
            engine,
            history[at..end].iter().flatten(),
            end as u64 + 1,
            elide,
        )?;
        at = end;
    }
    Ok(())
}

/// An engine in memory that can be told to fail, and that lets writes in while it is walked over.
struct Shaky {
    inner: MemoryEngine,
    /// Batches until one fails; negative: none does.
    fail_in: AtomicI64,
    /// What happens during a walk: runs of frames, and the position behind each.
    meanwhile: Mutex<VecDeque<(Vec<Write>, u64)>>,
}

impl Shaky {
    fn new() -> Shaky {
        Shaky {
            inner: MemoryEngine::new(),
            fail_in: AtomicI64::new(-1),
            meanwhile: Mutex::new(VecDeque::new()),
        }
    }
}

impl Engine for Shaky {
    fn name(&self) -> &'static str {
        "shaky"
    }
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.inner.get(key)
    }
    fn scan(
        &self,
        range: Range<&[u8]>,
        direction: Direction,
        visit: Visit<'_>,
    ) -> Result<(), EngineError> {
        // A key at a time, so that what is written meanwhile shows as soon as it can.
        let mut from = range.start.to_vec();
        assert_eq!(direction, Direction::Up);
        let mut walked = 0;
        loop {
            let mut next = None;
            self.inner
                .scan(&*from..range.end, direction, &mut |key, value| {
                    next = Some((key.to_vec(), value.to_vec()));
                    ControlFlow::Break(())
                })?;
            let Some((key, value)) = next else {
                return Ok(());
            };
            if visit(&key, &value).is_break() {
                return Ok(());
            }
            from = key;
            from.push(0);
            walked += 1;
            if walked % 5 == 0
                && let Some((writes, position)) = self.meanwhile.lock().unwrap().pop_front()
            {
                apply_run(&self.inner, writes.iter(), position, true)?;
            }
        }
    }
    fn apply(&self, batch: &[EngineWrite], position: Option<u64>) -> Result<(), EngineError> {
        if self.fail_in.fetch_sub(1, Ordering::Relaxed) == 0 {
            return Err(EngineError("told to".to_owned()));
        }
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

#[test]
fn frames_come_to_the_same_however_they_are_cut_into_runs() {
    for seed in 0..150 {
        let history = history(seed, 120);
        let expected = reference(&history);
        let engine = MemoryEngine::new();
        run_from(&engine, &history, &mut Dice(seed), true).unwrap();
        assert!(entries(&engine) == expected, "seed {seed}");
        assert_eq!(engine.position().unwrap(), Some(121));
    }
}

#[test]
fn a_run_that_broke_off_is_done_again_with_another_cut() {
    let mut broke_off = 0;
    for seed in 0..150 {
        let history = history(seed, 200);
        let expected = reference(&history);
        let engine = Shaky::new();
        let mut dice = Dice(seed);
        let mut replay = false;
        loop {
            engine.fail_in.store(dice.roll(6) as i64, Ordering::Relaxed);
            match run_from(&engine, &history, &mut dice, !replay) {
                Ok(()) => break,
                Err(_) => {
                    broke_off += 1;
                    // As after a start: until the end nothing may be left out.
                    replay = true;
                    if dice.roll(3) == 0 {
                        engine.fail_in.store(-1, Ordering::Relaxed);
                        run_from(&engine, &history, &mut dice, false).unwrap();
                        break;
                    }
                }
            }
        }
        assert!(entries(&engine.inner) == expected, "seed {seed}");
    }
    assert!(broke_off > 100, "{broke_off}");
}

#[test]
fn a_snapshot_taken_while_writes_go_on_restores_with_the_frames_since() {
    for seed in 0..150 {
        let history = history(seed, 160);
        let expected = reference(&history);
        let mut dice = Dice(seed);
        let engine = Shaky::new();
        let begun = 20 + dice.roll(60) as usize;
        run_from(&engine, &history[..begun], &mut dice, true).unwrap();
        let mut at = begun;
        while at < history.len() {
            let end = (at + 1 + dice.roll(8) as usize).min(history.len());
            let writes = history[at..end].iter().flatten().cloned().collect();
            engine
                .meanwhile
                .lock()
                .unwrap()
                .push_back((writes, end as u64 + 1));
            at = end;
        }
        let disk = testing::MemoryDisk::new();
        let info = snapshot::take(
            &engine,
            &snapshot::Surroundings {
                disk: &disk,
                store: [1; 16],
                now_ms: 5,
                aside: &SetAside::new(Arc::new(disk.clone()), 1),
                breathe: &|| ControlFlow::Continue(()),
            },
        )
        .unwrap();
        assert_eq!(info.frame, begun as u64 + 1);
        let restored: Arc<dyn Engine> = Arc::new(MemoryEngine::new());
        snapshot::load(&disk, info.frame, [1; 16], &restored).unwrap();
        assert_eq!(restored.position().unwrap(), Some(info.frame));
        run_from(&*restored, &history, &mut dice, false).unwrap();
        assert!(entries(&*restored) == expected, "seed {seed}");
    }
}
