//! What every engine must do, played to each of them: random histories against an ordered map, over reopenings.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::fjall::FjallEngine;
use super::memory::MemoryEngine;
use super::sled::SledEngine;
use super::{BATCH_OPERATIONS, Direction, Engine, EngineWrite};
use crate::store::home::{FileEngine, Files, RealFiles};
use crate::store::keys;
use crate::store::record::RECORD_MAX;

/// A small generator of repeatable choices.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (self.0 >> 33) % sides
    }
}

/// Opens the engine in a directory, again and again.
type Open<'a> = &'a dyn Fn(&Path) -> Arc<dyn Engine>;

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

fn walk(engine: &dyn Engine, from: &[u8], to: &[u8], direction: Direction, most: usize) -> Entries {
    let mut seen = Vec::new();
    if most == 0 {
        return seen;
    }
    engine
        .scan(from..to, direction, &mut |key, value| {
            if key != keys::POSITION {
                seen.push((key.to_vec(), value.to_vec()));
            }
            if seen.len() == most {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })
        .unwrap();
    seen
}

fn history(open: Open<'_>, keeps: bool, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(seed);
    let mut engine = open(dir.path());
    let mut model: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    assert_eq!(
        engine.position().unwrap(),
        None,
        "a fresh engine stands nowhere"
    );
    for step in 1..=60u64 {
        let mut batch = Vec::new();
        let mut touched = std::collections::BTreeSet::new();
        for _ in 0..dice.roll(BATCH_OPERATIONS as u64 - 1) {
            let mut key = vec![b'a' + dice.roll(4) as u8];
            key.extend_from_slice(&dice.roll(200).to_be_bytes());
            if !touched.insert(key.clone()) {
                continue;
            }
            let value = (dice.roll(3) > 0).then(|| {
                let length = if dice.roll(50) == 0 {
                    RECORD_MAX as u64
                } else {
                    dice.roll(300)
                };
                vec![dice.roll(256) as u8; length as usize]
            });
            match &value {
                Some(value) => model.insert(key.clone(), value.clone()),
                None => model.remove(&key),
            };
            batch.push(EngineWrite {
                key: key.into(),
                value: value.map(Bytes::from),
            });
        }
        engine.apply(&batch, Some(step)).unwrap();
        assert_eq!(engine.position().unwrap(), Some(step), "seed {seed}");
        if dice.roll(10) == 0 {
            engine.flush().unwrap();
        }
        if keeps && dice.roll(12) == 0 {
            engine.close().unwrap();
            drop(engine);
            engine = open(dir.path());
            assert_eq!(engine.position().unwrap(), Some(step), "seed {seed}");
        }
        let (mut from, mut to) = (dice.roll(900), dice.roll(900));
        if from > to {
            std::mem::swap(&mut from, &mut to);
        }
        let bound = |at: u64| {
            let mut key = vec![b'a' + (at / 200) as u8];
            key.extend_from_slice(&(at % 200).to_be_bytes());
            key
        };
        let (from, to) = (bound(from), bound(to));
        let expected: Entries = model
            .range(from.clone()..to.clone())
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let most = if dice.roll(2) == 0 {
            usize::MAX
        } else {
            dice.roll(20) as usize
        };
        let up = walk(&*engine, &from, &to, Direction::Up, most);
        assert!(
            up.iter().eq(expected.iter().take(most)),
            "seed {seed} step {step}: up"
        );
        let down = walk(&*engine, &from, &to, Direction::Down, most);
        assert!(
            down.iter().eq(expected.iter().rev().take(most)),
            "seed {seed} step {step}: down"
        );
        let probe = bound(dice.roll(800));
        assert_eq!(
            engine.get(&probe).unwrap().map(|value| value.to_vec()),
            model.get(&probe).cloned(),
            "seed {seed} step {step}"
        );
    }
    let all = walk(&*engine, b"a", b"z", Direction::Up, usize::MAX);
    assert!(all.into_iter().eq(model), "seed {seed}: everything");
    assert!(engine.size_bytes() > 0);
    let sled = dir.path().join("sled");
    assert!(
        !sled.join("blobs").exists() || blobs(&sled) == 0,
        "no record became a blob"
    );
}

/// Files that sled would never sync.
fn blobs(dir: &Path) -> usize {
    std::fs::read_dir(dir.join("blobs")).unwrap().count()
}

fn conforms(open: Open<'_>, keeps: bool) {
    for seed in 0..12 {
        history(open, keeps, seed);
    }
}

#[test]
fn the_memory_engine_conforms() {
    conforms(&|_| Arc::new(MemoryEngine::new()), false);
}

/// Opens as the store does: threads of an engine's own may hold its files for a moment after it was dropped.
fn in_files(kind: FileEngine) -> impl Fn(&Path) -> Arc<dyn Engine> {
    move |dir| {
        RealFiles::new(dir, 8 << 20)
            .open(kind, kind.name())
            .unwrap()
    }
}

#[test]
fn the_sled_engine_conforms() {
    conforms(&in_files(FileEngine::Sled), true);
}

#[test]
fn the_fjall_engine_conforms() {
    conforms(&in_files(FileEngine::Fjall), true);
}

#[test]
fn a_range_that_is_empty_or_reversed_has_no_entries() {
    let dir = tempfile::tempdir().unwrap();
    let engines: [Arc<dyn Engine>; 3] = [
        Arc::new(MemoryEngine::new()),
        Arc::new(SledEngine::open(&dir.path().join("sled"), 8 << 20).unwrap()),
        Arc::new(FjallEngine::open(&dir.path().join("fjall"), 8 << 20).unwrap()),
    ];
    for engine in engines {
        let write = EngineWrite {
            key: Bytes::from_static(b"m"),
            value: Some(Bytes::from_static(b"1")),
        };
        engine.apply(&[write], None).unwrap();
        assert_eq!(walk(&*engine, b"m", b"m", Direction::Up, 9), []);
        assert_eq!(walk(&*engine, b"z", b"a", Direction::Down, 9), []);
        assert_eq!(engine.position().unwrap(), None);
    }
}

/// Keys that nobody touches, while another thread inserts and removes around them, so that pages split and merge: every walk sees
/// each of them once, in order.
fn walks_among_changes(engine: &Arc<dyn Engine>) {
    const KEPT: u32 = 1_000;
    const BETWEEN: u32 = 16;
    let key = |number: u32| {
        let mut key = b"k".to_vec();
        key.extend_from_slice(&number.to_be_bytes());
        Bytes::from(key)
    };
    let write = |number: u32, value: Option<usize>| EngineWrite {
        key: key(number),
        value: value.map(|length| Bytes::from(vec![7; length])),
    };
    for first in 0..KEPT {
        engine
            .apply(&[write(first * BETWEEN, Some(40))], None)
            .unwrap();
    }
    let kept: Vec<Bytes> = (0..KEPT).map(|number| key(number * BETWEEN)).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    let rounds = std::sync::atomic::AtomicU64::new(0);
    let order = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let mut dice = Dice(5);
            while !done.load(order) {
                // A stretch is filled up until its pages split, and emptied until they merge.
                let first = dice.roll(u64::from(KEPT - 40)) as u32;
                for grow in [true, false] {
                    for gap in first..first + 40 {
                        let batch: Vec<EngineWrite> = (1..BETWEEN)
                            .map(|at| write(gap * BETWEEN + at, grow.then_some(200)))
                            .collect();
                        engine.apply(&batch, None).unwrap();
                    }
                }
                rounds.fetch_add(1, order);
            }
        });
        let mut walks = 0;
        let mut wrong = Vec::new();
        while (walks < 24 || rounds.load(order) < 20) && wrong.is_empty() {
            if changes.is_finished() {
                wrong.push(format!(
                    "the changes ended after {rounds:?} rounds: why stands above"
                ));
            }
            for direction in [Direction::Up, Direction::Down] {
                let seen = walk(&**engine, b"k", b"l", direction, usize::MAX);
                let mut seen: Vec<Vec<u8>> = seen
                    .into_iter()
                    .map(|(key, _)| key)
                    .filter(|seen| {
                        let number = seen[1..].first_chunk().map(|at| u32::from_be_bytes(*at));
                        number.is_some_and(|number| number.is_multiple_of(BETWEEN))
                    })
                    .collect();
                if direction == Direction::Down {
                    seen.reverse();
                }
                if !seen.iter().eq(&kept) {
                    wrong.push(format!("{direction:?}: {} of {KEPT}", seen.len()));
                }
                walks += 1;
            }
        }
        done.store(true, order);
        assert_eq!(wrong, [""; 0]);
    });
}

#[test]
fn a_walk_sees_what_nobody_touches_once_while_everything_around_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    walks_among_changes(&(Arc::new(MemoryEngine::new()) as Arc<dyn Engine>));
    for kind in [FileEngine::Sled, FileEngine::Fjall] {
        walks_among_changes(&in_files(kind)(&dir.path().join(kind.name())));
    }
}
