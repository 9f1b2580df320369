//! Backups: consistent while writes go on, readable as version 1 wrote them, and never believed when damaged.

use std::cell::RefCell;
use std::io::Write as _;
use std::ops::ControlFlow;

use super::super::backup::{BackupFault, Unpack, verify};
use super::super::testing::{ManualClock, MemoryDisk, SeededEntropy, SyncSettings, SyncStore};
use super::super::*;
use super::crashes::commit_now;
use super::model::{Dice, Model, Script};
use super::support::*;
use crate::delivery::Outcome;

const STORE: [u8; 16] = [0xbb; 16];

fn sync_store(disk: &MemoryDisk, seed: u64, settings: SyncSettings) -> SyncStore {
    let (store, _) = SyncStore::open(
        disk,
        settings,
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(seed)),
    )
    .unwrap();
    store
}

fn go_on(_: &crate::ports::BackupProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// The store that a backup makes on a disk of its own.
fn unpacked(bytes: &[u8]) -> Result<MemoryDisk, BackupFault> {
    let disk = MemoryDisk::new();
    let unpack = Unpack {
        disk: Arc::new(disk.clone()),
        entropy: Arc::new(SeededEntropy::new(7)),
        store: STORE,
        segment_bytes: 4_096,
        now_ms: 5,
        progress: &mut |_| {},
    };
    unpack.run(&mut &*bytes)?;
    write_identity(&disk, STORE, true).unwrap();
    Ok(disk)
}

#[test]
fn a_backup_made_while_writes_go_on_is_the_state_after_its_last_frame() {
    let mut frames_seen = 0;
    for seed in 0..120 {
        let mut dice = Dice(seed ^ 0xbac);
        let disk = MemoryDisk::new();
        let store = sync_store(
            &disk,
            seed,
            SyncSettings {
                lag_frames: dice.roll(6) as usize,
                segment_bytes: 1_024 << dice.roll(4),
                ..SyncSettings::default()
            },
        );
        let mut script = Script::new(seed);
        let mut model = Model::default();
        let mut write = |model: &mut Model| {
            let batch = script.batch(model);
            let mut after = model.clone();
            batch.iter().for_each(|op| after.apply(op));
            commit_now(&store, batch).unwrap().unwrap();
            *model = after;
        };
        for _ in 0..dice.roll(80) {
            write(&mut model);
            if dice.roll(30) == 0 {
                store.snapshot();
            }
        }
        let state = RefCell::new((&mut dice, &mut model, &mut write));
        let mut file = Vec::new();
        let made = store
            .backup(&mut file, &|progress| {
                let mut state = state.borrow_mut();
                let (dice, model, write) = &mut *state;
                // Once its last frame is noted, later ones are not in it.
                if progress.frames == 0 {
                    for _ in 0..dice.roll(4) {
                        write(model);
                    }
                    match dice.roll(6) {
                        0 => store.catch_up(),
                        // Lets go of log that nobody but the backup needs.
                        1 => drop(store.snapshot()),
                        _ => {}
                    }
                }
                ControlFlow::Continue(())
            })
            .unwrap();
        frames_seen += made.frames;
        assert_eq!(verify(&mut &*file, &mut |_| {}).unwrap(), made);
        let disk = unpacked(&file).unwrap();
        let restored = sync_store(&disk, seed, SyncSettings::default());
        if let Some(difference) = model.difference(&restored, &script) {
            panic!("seed {seed}: {difference}");
        }
        model.check_lists(&restored);
        assert_eq!(restored.shared_bodies(), model.shared_bodies(), "{seed}");
        // It goes on from there, over a crash.
        let mut after = model.clone();
        let batch = script.batch(&model);
        batch.iter().for_each(|op| after.apply(op));
        commit_now(&restored, batch).unwrap().unwrap();
        restored.crash_and_reopen(seed).unwrap();
        assert_eq!(after.difference(&restored, &script), None, "seed {seed}");
    }
    assert!(frames_seen > 500, "{frames_seen}");
}

/// A small backup with entries and frames in several blocks.
pub(super) fn a_backup() -> Vec<u8> {
    let disk = MemoryDisk::new();
    let store = sync_store(
        &disk,
        1,
        SyncSettings {
            lag_frames: 99,
            ..SyncSettings::default()
        },
    );
    for n in 1..=4 {
        let note = notification(ping_id(n), |note| note.content = vec![n as u8; 60].into());
        commit_now(&store, vec![register(device_id(n), "ada")])
            .unwrap()
            .unwrap();
        commit_now(
            &store,
            vec![
                insert(device_id(n), 1, &note),
                summary(device_id(n), 1, 60, 2),
            ],
        )
        .unwrap()
        .unwrap();
        if n == 3 {
            store.catch_up();
        }
    }
    let note = notification(ping_id(1), |_| {});
    commit_now(
        &store,
        vec![remove(
            device_id(1),
            1,
            &note,
            Outcome::Acknowledged,
            70_000,
        )],
    )
    .unwrap()
    .unwrap();
    let mut file = Vec::new();
    let made = store.backup(&mut file, &go_on).unwrap();
    assert!(made.entries > 10 && made.frames == 3, "{made:?}");
    file
}

#[test]
fn every_flipped_bit_of_a_backup_is_seen() {
    let good = a_backup();
    verify(&mut &*good, &mut |_| {}).unwrap();
    for at in 0..good.len() {
        for bit in [1, 0x10, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= bit;
            let fault = verify(&mut &*bad, &mut |_| {}).unwrap_err();
            assert!(
                matches!(
                    fault,
                    BackupFault::Rotten { .. } | BackupFault::Foreign | BackupFault::Cut(_)
                ),
                "byte {at}: {fault}"
            );
        }
    }
}

#[test]
fn a_backup_cut_anywhere_or_with_something_behind_it_is_none() {
    let good = a_backup();
    for length in 0..good.len() {
        let fault = verify(&mut &good[..length], &mut |_| {}).unwrap_err();
        assert!(matches!(fault, BackupFault::Cut(_)), "{length}: {fault}");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(verify(&mut &*longer, &mut |_| {}).is_err());
    let fault = verify(&mut &b"something else"[..], &mut |_| {}).unwrap_err();
    assert!(matches!(fault, BackupFault::Foreign), "{fault}");
}

#[test]
fn blocks_in_another_order_or_left_out_are_seen() {
    let good = a_backup();
    let mut blocks = Vec::new();
    let mut at = 128;
    while at < good.len() {
        let length = u32::from_le_bytes(good[at + 4..at + 8].try_into().unwrap()) as usize + 12;
        blocks.push(&good[at..at + length]);
        at += length;
    }
    assert!(blocks.len() > 4);
    let joined = |order: &[usize]| {
        let mut file = good[..128].to_vec();
        order
            .iter()
            .for_each(|n| file.extend_from_slice(blocks[*n]));
        file
    };
    let all: Vec<usize> = (0..blocks.len()).collect();
    assert!(verify(&mut &*joined(&all), &mut |_| {}).is_ok());
    for left_out in 0..blocks.len() {
        let some: Vec<usize> = all.iter().copied().filter(|n| *n != left_out).collect();
        assert!(verify(&mut &*joined(&some), &mut |_| {}).is_err());
    }
    for first in 0..blocks.len() - 1 {
        let mut swapped = all.clone();
        swapped.swap(first, first + 1);
        assert!(verify(&mut &*joined(&swapped), &mut |_| {}).is_err());
    }
}

#[test]
fn a_backup_of_a_later_program_is_told_from_a_damaged_one() {
    let mut newer = a_backup();
    newer[8] = 9;
    // As a later program would sum it; ours cannot know.
    newer[12] ^= 0x55;
    let fault = verify(&mut &*newer, &mut |_| {}).unwrap_err();
    assert!(matches!(fault, BackupFault::Newer(9)), "{fault}");
    assert!(fault.to_string().contains("newer than this program"));
}

#[test]
fn a_damaged_backup_makes_no_store() {
    let good = a_backup();
    for at in (0..good.len()).step_by(97) {
        let mut bad = good.clone();
        bad[at] ^= 1;
        assert!(unpacked(&bad).is_err(), "byte {at}");
    }
}

#[test]
fn one_backup_is_made_at_a_time_and_a_broken_one_leaves_the_place() {
    let disk = MemoryDisk::new();
    let store = sync_store(&disk, 1, SyncSettings::default());
    let mut inner = None;
    let cell = RefCell::new(&mut inner);
    store
        .backup(&mut std::io::sink(), &|_| {
            **cell.borrow_mut() = Some(store.backup(&mut std::io::sink(), &go_on).unwrap_err());
            ControlFlow::Continue(())
        })
        .unwrap();
    assert!(matches!(inner, Some(BackupError::Busy)));
    let stopped = store.backup(&mut std::io::sink(), &|_| ControlFlow::Break(()));
    assert!(matches!(stopped, Err(BackupError::Interrupted)));
    struct Full;
    impl std::io::Write for Full {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::Error::from(std::io::ErrorKind::StorageFull))
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let full = store.backup(&mut Full, &go_on);
    assert!(matches!(full, Err(BackupError::Write(_))));
    store.backup(&mut std::io::sink(), &go_on).unwrap();
}

#[test]
fn a_rotten_record_is_left_out_of_a_backup_and_counted() {
    let disk = MemoryDisk::new();
    let store = sync_store(&disk, 1, SyncSettings::default());
    commit_now(&store, vec![register(device_id(1), "ada")])
        .unwrap()
        .unwrap();
    store.catch_up();
    store.rot(&keys::device(device_id(1)));
    let mut file = Vec::new();
    let made = store.backup(&mut file, &go_on).unwrap();
    assert_eq!(made.left_out, 1);
    assert_eq!(verify(&mut &*file, &mut |_| {}).unwrap().left_out, 1);
    assert_eq!(store.stats().set_aside, 1);
}

#[test]
fn a_backup_reads_over_damage_in_frames_that_nobody_needs() {
    let disk = MemoryDisk::new();
    let store = sync_store(
        &disk,
        1,
        SyncSettings {
            lag_frames: 99,
            ..SyncSettings::default()
        },
    );
    for n in 1..=6 {
        commit_now(&store, vec![register(device_id(n), "ada")])
            .unwrap()
            .unwrap();
        if n == 4 {
            store.catch_up();
        }
    }
    // The length of the first frame: the run that began.
    assert!(disk.flip("log/0000000001.seg", 64, 0x40));
    let mut file = Vec::new();
    assert_eq!(store.backup(&mut file, &go_on).unwrap().frames, 2);
    // The payload of the last one.
    let name = "log/0000000001.seg";
    let length = 64 << 10;
    let last = (0..length)
        .rev()
        .find(|at| {
            let seen = disk.byte(name, *at);
            seen.is_some_and(|byte| byte != 0)
        })
        .unwrap();
    assert!(disk.flip(name, last, 1));
    let failed = store.backup(&mut std::io::sink(), &go_on).unwrap_err();
    assert!(
        failed.to_string().contains("missing or damaged"),
        "{failed}"
    );
}

#[test]
fn a_backup_of_either_engine_goes_into_the_other() {
    for (from, to) in [
        (EngineKind::Sled, EngineKind::Memory),
        (EngineKind::Memory, EngineKind::Sled),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let opened = open_at(dir.path(), from);
        let note = notification(ping_id(1), |_| {});
        commit(
            &*opened.store,
            vec![
                register(device_id(1), "ada"),
                insert(device_id(1), 1, &note),
                summary(device_id(1), 1, 5, 2),
            ],
        )
        .unwrap();
        let mut file = std::fs::File::create(dir.path().join("x")).unwrap();
        opened.store.backup(&mut file, &go_on).unwrap();
        file.flush().unwrap();
        let target = tempfile::tempdir().unwrap();
        let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(target.path()));
        Unpack {
            disk: Arc::clone(&disk),
            entropy: Arc::new(SeededEntropy::new(7)),
            store: STORE,
            segment_bytes: 1 << 20,
            now_ms: 5,
            progress: &mut |_| {},
        }
        .run(&mut std::fs::File::open(dir.path().join("x")).unwrap())
        .unwrap();
        write_identity(&*disk, STORE, true).unwrap();
        let restored = open_at(target.path(), to);
        let view = restored
            .store
            .read_mailbox(&everything(device_id(1)))
            .unwrap();
        assert_eq!(view.rows.len(), 1);
        assert!(view.rows[0].run < restored.report.run);
    }
}

#[test]
fn a_backup_reads_as_it_was_written_by_version_1() {
    // Anything that reads it must go on doing so; what is written now may say another version of the program.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/store/backup-v1.bin");
    let golden = std::fs::read(path).unwrap();
    let held = verify(&mut &*golden, &mut |_| {}).unwrap();
    assert_eq!((held.entries, held.frames, held.run), (22, 3, 1));
    assert_eq!(held.program, "0.1.0");
    let disk = unpacked(&golden).unwrap();
    let store = sync_store(&disk, 1, SyncSettings::default());
    let waiting = |n| store.read_mailbox(&everything(device_id(n))).unwrap().rows;
    assert_eq!(waiting(1).len(), 0);
    assert_eq!(waiting(4)[0].ping, ping_id(4));
}

#[test]
fn a_header_that_was_changed_with_its_checksum_is_seen_by_the_digest() {
    let mut bytes = a_backup();
    // When it was begun.
    bytes[24] ^= 1;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..128]);
    bytes[12..16].copy_from_slice(&sum.to_le_bytes());
    let fault = verify(&mut bytes.as_slice(), &mut |_| {}).unwrap_err();
    assert!(fault.to_string().contains("digest"), "{fault}");
}

#[test]
fn a_store_that_is_opened_to_be_copied_stays_as_it_is_whatever_the_settings_say() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let shop = super::examining::posted(engine, 20);
        let (house, _) = shop.open();
        house.record_outcomes(&mut vec![
            OutcomeRecord {
                app: AppId::DEFAULT,
                ping: ping_id(2),
                device: device_id(1),
                outcome: Outcome::Acknowledged,
                at_ms: 1_699_000_000_000,
                accepted_ms: None,
            };
            100
        ]);
        drop(house);
        let outcomes = super::examining::portrait(&shop.data().join("outcomes"));
        let directories = || -> Vec<String> {
            let entries = std::fs::read_dir(shop.data()).unwrap().map(Result::unwrap);
            let mut names: Vec<String> = entries
                .filter(|entry| entry.path().is_dir())
                .map(|entry| entry.file_name().into_string().unwrap())
                .collect();
            names.sort_unstable();
            names
        };
        let before = directories();
        let other = match engine {
            EngineKind::Sled => EngineKind::Fjall,
            EngineKind::Fjall | EngineKind::Memory => EngineKind::Sled,
        };
        // Outcomes are long past this keeping time.
        let settings = StoreSettings {
            outcomes_keep: std::time::Duration::from_secs(60),
            outcomes_max_bytes: 1,
            ..settings(&shop.data(), other)
        };
        let opened = open_as_it_is(
            &settings,
            Arc::new(ManualClock::new(1_700_000_000_000)),
            Arc::new(SeededEntropy::new(5)),
        )
        .unwrap();
        assert_eq!(opened.report.rebuilt, None);
        let mut bytes = Vec::new();
        opened.store.backup(&mut bytes, &go_on).unwrap();
        opened.store.close();
        drop(opened);
        assert_eq!(directories(), before);
        assert!(outcomes == super::examining::portrait(&shop.data().join("outcomes")));
        verify(&mut &*bytes, &mut |_| {}).unwrap();
    }
}
