//! Rows come and go by the thousand: what is on the disk follows what lives, by the formula at the head of `keeper.rs`, not
//! what came by.

use super::super::testing::{ManualClock, SeededEntropy};
use super::super::*;
use super::support::*;
use crate::delivery::{Notification, Outcome};
use crate::ports::Op;

/// Rows of a wave, all of them there before the first goes.
const WAVE: u64 = 3_000;
const BATCH: u64 = 500;
const CONTENT: usize = 1_024;

const DEVICES: u64 = 50;

/// The settings that the formula is about.
const SEGMENT: u64 = 1 << 20;
const INTERVAL: u64 = 1 << 20;
const FACTOR: u64 = 4;
const FLOOR: u64 = 12 << 20;

/// Bytes of a row besides its content that may live: its keys, its index, its outcome.
const AROUND: u64 = 1_024;

/// What is written between two looks at most: a batch, with what it says of mailboxes.
const BETWEEN: u64 = BATCH * (CONTENT as u64 + 2 * AROUND);

fn place(row: u64) -> (DeviceId, u64) {
    (device_id(row % DEVICES), row / DEVICES + 1)
}

fn note(row: u64) -> Arc<Notification> {
    notification(ping_id(row), |note| {
        let mut content = vec![0; CONTENT];
        let mut word = row.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for piece in content.chunks_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            piece.copy_from_slice(&word.to_le_bytes());
        }
        note.content = content.into();
        note.size = CONTENT as u32;
    })
}

struct Stock {
    _dir: tempfile::TempDir,
    house: House,
    /// Rows that came, and rows that went.
    came: u64,
    went: u64,
    /// The size of an engine just after it was built anew, the largest one.
    rebuilt: u64,
    seen: u64,
}

impl Stock {
    fn new(engine: EngineKind) -> Stock {
        let dir = tempfile::tempdir().unwrap();
        let settings = StoreSettings {
            segment_bytes: SEGMENT,
            snapshot_bytes: INTERVAL,
            rebuild_factor: FACTOR,
            rebuild_floor: FLOOR,
            ..settings(&dir.path().join("data"), engine)
        };
        let (house, _) = open_house(
            &settings,
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(9)),
        )
        .unwrap();
        let devices = (0..DEVICES).map(|n| register(device_id(n), "ada"));
        commit(&house, devices.collect()).unwrap();
        Stock {
            _dir: dir,
            house,
            came: 0,
            went: 0,
            rebuilt: 0,
            seen: 0,
        }
    }

    /// Commits, waits until the engine has it, and lets the keeper look.
    fn write(&mut self, batch: Vec<Op>) {
        commit(&self.house, batch).unwrap();
        self.house.drop_receipts(u64::MAX, 1_000).unwrap();
        let give_up = std::time::Instant::now() + PATIENCE;
        while self.house.stats().lag_bytes > 0 {
            assert!(
                std::time::Instant::now() < give_up,
                "the engine stays behind"
            );
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        self.house.keeper.look();
        let stats = self.house.stats();
        if stats.rebuilds > self.seen {
            self.seen = stats.rebuilds;
            self.rebuilt = self.rebuilt.max(stats.engine_bytes);
        }
    }

    fn come(&mut self) {
        let rows = self.came..self.came + BATCH;
        self.came += BATCH;
        let mut batch: Vec<Op> = rows
            .map(|row| {
                let (device, order) = place(row);
                insert(device, order, &note(row))
            })
            .collect();
        batch.extend(self.summaries());
        self.write(batch);
    }

    fn go(&mut self) {
        let rows = self.went..self.went + BATCH;
        self.went += BATCH;
        let mut batch: Vec<Op> = rows
            .map(|row| {
                let (device, order) = place(row);
                remove(device, order, &note(row), Outcome::Acknowledged, 2_000)
            })
            .collect();
        batch.extend(self.summaries());
        self.write(batch);
    }

    fn summaries(&self) -> Vec<Op> {
        let live = (self.came - self.went) / DEVICES;
        (0..DEVICES)
            .map(|n| {
                let bytes = live * CONTENT as u64;
                summary(device_id(n), live as u32, bytes, self.came / DEVICES + 1)
            })
            .collect()
    }

    /// Holds every size against the formula, for at most so many rows that lived since the snapshots that are kept.
    fn check(&self, rows: u64, when: &str) {
        let stats = self.house.stats();
        let live = (rows + DEVICES) * (CONTENT as u64 + AROUND);
        let interval = INTERVAL.max(2 * live) + BETWEEN;
        let log = 2 * interval + 3 * SEGMENT;
        let snapshots = 3 * (live + (live >> 17)) + 4_096;
        let engine = FLOOR.max(FACTOR * (live + interval)).max(2 * self.rebuilt) + BETWEEN;
        let told = format!("{when}, {} in, {} out: {stats:?}", self.came, self.went);
        assert!(stats.log_bytes <= log, "log over {log} {told}");
        assert!(
            stats.snapshot_bytes <= snapshots,
            "snapshots over {snapshots} {told}"
        );
        assert!(stats.engine_bytes <= engine, "engine over {engine} {told}");
    }
}

#[test]
fn what_is_on_the_disk_follows_what_lives_and_not_what_came_by() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let mut stock = Stock::new(engine);
        let mut rests = Vec::new();
        for _ in 0..3 {
            for _ in 0..WAVE / BATCH {
                stock.come();
                stock.check(WAVE, "while rows come");
            }
            for _ in 0..WAVE / BATCH {
                stock.go();
                stock.check(WAVE, "while rows go");
            }
            // Few live, until both snapshots that are kept say so.
            let mut snapshots = vec![stock.house.stats().snapshot_frame];
            for turn in 0.. {
                stock.come();
                stock.go();
                stock.check(WAVE, "while few live");
                snapshots.push(stock.house.stats().snapshot_frame);
                snapshots.dedup();
                if snapshots.len() == 4 {
                    break;
                }
                assert!(turn < 200, "no snapshots: {snapshots:?}");
            }
            stock.check(BATCH, "at rest");
            let stats = stock.house.stats();
            rests.push(stats.log_bytes + stats.snapshot_bytes + stats.engine_bytes);
        }
        let [first, .., last] = rests[..] else {
            panic!("three waves");
        };
        assert!(last <= first + first / 2 + FLOOR, "{engine:?}: {rests:?}");
        if engine == EngineKind::Sled {
            assert!(stock.seen > 0, "its file does not shrink by itself");
        }
    }
}
