//! Real files that were torn, rotten, truncated, mixed up or taken away.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::super::*;
use super::model::{Model, Script};
use super::support::*;
use crate::ports::Op;

/// A store on real files and what it should hold.
pub(super) struct Shop {
    pub(super) dir: tempfile::TempDir,
    pub(super) engine: EngineKind,
    pub(super) script: Script,
    pub(super) model: Model,
}

impl Shop {
    pub(super) fn new(engine: EngineKind, seed: u64) -> Shop {
        Shop {
            dir: tempfile::tempdir().unwrap(),
            engine,
            script: Script::new(seed),
            model: Model::default(),
        }
    }

    pub(super) fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub(super) fn try_open(&self) -> Result<(House, OpenReport), OpenError> {
        let settings = StoreSettings {
            segment_bytes: 8 << 10,
            ..settings(&self.data(), self.engine)
        };
        open_house(
            &settings,
            Arc::new(testing::ManualClock::new(1_700_000_000_000)),
            Arc::new(testing::SeededEntropy::new(
                fs::read_dir(self.dir.path()).unwrap().count() as u64,
            )),
        )
    }

    pub(super) fn open(&self) -> (House, OpenReport) {
        self.try_open().unwrap()
    }

    pub(super) fn work(&mut self, house: &House, batches: usize) {
        for _ in 0..batches {
            let batch = self.script.batch(&self.model);
            batch.iter().for_each(|op| self.model.apply(op));
            commit(house, batch).unwrap();
        }
    }

    pub(super) fn check(&self, house: &House) {
        assert_eq!(self.model.difference(house, &self.script), None);
    }

    /// Works a while, closes in order, works on: a plain life with several segments.
    pub(super) fn lived(engine: EngineKind, seed: u64) -> Shop {
        let mut shop = Shop::new(engine, seed);
        for _ in 0..2 {
            let (house, _) = shop.open();
            shop.work(&house, 60);
            drop(house);
        }
        shop
    }

    pub(super) fn segments(&self) -> Vec<PathBuf> {
        files(&self.data().join("log"), ".seg")
    }

    pub(super) fn set_aside(&self) -> usize {
        let notes = files(&self.data().join("set-aside"), ".txt").len();
        files(&self.data().join("set-aside"), "").len() - notes
    }

    pub(super) fn without_engine(&self) {
        let dir = self.engine_dir();
        if dir.exists() {
            fs::remove_dir_all(dir).unwrap();
        }
    }

    /// The directory of the engine that counts.
    pub(super) fn engine_dir(&self) -> PathBuf {
        let disk = RealDisk::new(&self.data());
        let name = home::named(&disk).unwrap_or_else(|| self.engine.as_str().to_owned());
        self.data().join(name)
    }
}

pub(super) fn files(dir: &Path, suffix: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    let mut files: Vec<PathBuf> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file() && path.to_string_lossy().ends_with(suffix))
        .collect();
    files.sort();
    files
}

pub(super) fn patch(path: &Path, offset: u64, bytes: &[u8]) {
    let file = fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

/// Where the frames of a segment begin and end.
pub(super) fn frames(path: &Path) -> Vec<(u64, u64)> {
    let data = fs::read(path).unwrap();
    let header = log::segment::Header::decode(&data).unwrap();
    let start = log::segment::HEADER as usize;
    log::frame::scan(
        &data,
        start,
        header.seed(),
        header.first_frame,
        header.first_frame,
    )
    .frames
    .iter()
    .map(|found| {
        (
            (found.payload.start - log::frame::HEADER) as u64,
            found.end as u64,
        )
    })
    .collect()
}

const ALL: [EngineKind; 3] = [EngineKind::Memory, EngineKind::Sled, EngineKind::Fjall];

/// Engines that keep files.
const FILES: [EngineKind; 2] = [EngineKind::Sled, EngineKind::Fjall];

#[test]
fn a_store_that_was_closed_is_found_as_it_was() {
    for engine in ALL {
        let shop = Shop::lived(engine, 1);
        let (house, report) = shop.open();
        assert_eq!(report.rebuilt, None);
        assert_eq!(report.run, 3);
        assert!(!report.torn);
        if engine != EngineKind::Memory {
            assert_eq!(report.replayed_frames, 0, "the engine was flushed");
        }
        shop.check(&house);
    }
}

#[test]
fn a_torn_last_frame_is_dropped_and_the_log_goes_on_behind_it() {
    for engine in ALL {
        for cut in [1, 8, 17, 40] {
            let mut shop = Shop::lived(engine, 2);
            // What a write that was cut off leaves behind: the beginning of a frame after the last one.
            let last = shop.segments().pop().unwrap();
            let spans = frames(&last);
            let (begin, end) = *spans.last().unwrap();
            let mut torn = fs::read(&last).unwrap()[begin as usize..end as usize].to_vec();
            torn.truncate(cut.min(torn.len() - 8));
            torn[0] |= 1;
            patch(&last, end, &torn);
            let (house, report) = shop.open();
            assert!(report.torn, "cut {cut}");
            assert_eq!(report.set_aside, [""; 0]);
            shop.check(&house);
            shop.work(&house, 20);
            drop(house);
            let (house, report) = shop.open();
            assert!(!report.torn, "the remains were wiped");
            shop.check(&house);
        }
    }
}

#[test]
fn rot_in_frames_that_the_engine_has_is_told_and_costs_nothing() {
    let mut shop = Shop::lived(EngineKind::Sled, 3);
    let first = shop.segments().remove(0);
    let (begin, _) = frames(&first)[2];
    patch(&first, begin + 20, b"rot");
    let (house, report) = shop.open();
    assert_eq!((report.rebuilt, report.set_aside), (None, Vec::new()));
    shop.check(&house);
    shop.work(&house, 5);
    shop.check(&house);
}

#[test]
fn rot_in_the_middle_cuts_the_log_there_and_keeps_the_rest_aside() {
    for engine in ALL {
        let shop = Shop::lived(engine, 4);
        shop.without_engine();
        // The middle of the second segment: frames before it can be proved, nothing after it.
        let segments = shop.segments();
        assert!(segments.len() > 3);
        let spans = frames(&segments[1]);
        let (begin, _) = spans[spans.len() / 2];
        patch(&segments[1], begin + 20, b"rot");
        let (house, report) = shop.open();
        assert_eq!(
            report.set_aside.len(),
            segments.len() - 1,
            "the bad one and all after it"
        );
        assert_eq!(shop.set_aside(), segments.len() - 1, "nothing is deleted");
        assert!(report.replayed_frames > 0);
        drop(house);
        // From then on it is a store like any other.
        let (house, report) = shop.open();
        assert_eq!(report.set_aside, [""; 0]);
        assert_eq!(commit(&house, vec![register(device_id(77), "ada")]), Ok(()));
        drop(house);
        let (house, _) = shop.open();
        assert!(house.device(device_id(77)).unwrap().is_some());
    }
}

#[test]
fn a_missing_segment_is_rot() {
    let shop = Shop::lived(EngineKind::Memory, 5);
    let segments = shop.segments();
    fs::remove_file(&segments[1]).unwrap();
    let (_house, report) = shop.open();
    // The one before it is kept whole as well: it is where the proof ends.
    assert_eq!(report.set_aside.len(), segments.len() - 1);
}

#[test]
fn a_segment_with_a_rotten_header_is_rot() {
    let shop = Shop::lived(EngineKind::Memory, 6);
    let segments = shop.segments();
    patch(&segments[2], 20, b"rot");
    let (_house, report) = shop.open();
    assert_eq!(report.set_aside.len(), segments.len() - 1);
}

#[test]
fn an_engine_that_will_not_open_is_moved_aside_and_rebuilt() {
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 3] = [
        ("truncated to nothing", |db| {
            fs::File::create(db).unwrap();
        }),
        ("overwritten", |db| {
            let length = fs::metadata(db).unwrap().len();
            fs::write(db, vec![0xa5; length as usize]).unwrap();
        }),
        ("without its configuration", |db| {
            fs::write(db.with_file_name("conf"), b"nothing that sled knows").unwrap();
        }),
    ];
    for (what, damage) in damages {
        let mut shop = Shop::lived(EngineKind::Sled, 7);
        damage(&shop.data().join("sled").join("db"));
        let (house, report) = shop.open();
        let rebuilt = report
            .rebuilt
            .unwrap_or_else(|| panic!("{what}: it was used"));
        let aside = rebuilt.moved_to.unwrap();
        assert_eq!(aside, "sled.aside-20231114T221320Z", "{what}");
        assert!(
            shop.data().join(aside).is_dir(),
            "{what}: nothing is deleted"
        );
        shop.check(&house);
        shop.work(&house, 10);
        drop(house);
        let (house, report) = shop.open();
        assert_eq!(report.rebuilt, None, "{what}");
        shop.check(&house);
    }
}

#[test]
fn an_engine_that_lost_its_end_is_brought_up_to_date_or_rebuilt() {
    let shop = Shop::lived(EngineKind::Sled, 18);
    let whole = fs::read(shop.engine_dir().join("db")).unwrap();
    let used = whole.iter().rposition(|byte| *byte != 0).unwrap();
    for eighth in 1..8 {
        fs::write(shop.engine_dir().join("db"), &whole[..used * eighth / 8]).unwrap();
        let (house, report) = shop.open();
        assert!(
            report.rebuilt.is_some() || report.replayed_frames > 0,
            "{eighth}"
        );
        shop.check(&house);
    }
}

#[test]
fn an_engine_is_rebuilt_from_snapshot_and_log() {
    for engine in ALL {
        let mut shop = Shop::new(engine, 8);
        let (house, _) = shop.open();
        for _ in 0..4 {
            shop.work(&house, 40);
            while house.stats().lag_bytes > 0 {
                std::thread::yield_now();
            }
            assert!(house.keeper.take_snapshot().unwrap().is_some());
            assert!(
                house.keeper.take_snapshot().unwrap().is_none(),
                "nothing new"
            );
        }
        assert_eq!(files(&shop.data().join("snapshots"), ".snap").len(), 2);
        assert!(house.stats().snapshot_frame > 0);
        shop.work(&house, 10);
        drop(house);
        let first = shop.segments().remove(0);
        assert!(!first.ends_with("0000000001.seg"), "the log was released");
        shop.without_engine();
        let (house, report) = shop.open();
        assert!(report.replayed_frames >= 10);
        shop.check(&house);
        drop(house);
        // The newest snapshot rots: the one before it serves, because the log reaches back to it.
        shop.without_engine();
        let newest = files(&shop.data().join("snapshots"), ".snap")
            .pop()
            .unwrap();
        let length = fs::metadata(&newest).unwrap().len();
        fs::OpenOptions::new()
            .write(true)
            .open(&newest)
            .unwrap()
            .set_len(length - 1)
            .unwrap();
        let (house, _) = shop.open();
        shop.check(&house);
        drop(house);
        // No log, no engine, and the snapshots gone: it does not pretend to be new.
        shop.without_engine();
        fs::remove_dir_all(shop.data().join("snapshots")).unwrap();
        let error = shop.try_open().err().unwrap();
        assert!(matches!(error, OpenError::Unprovable { .. }), "{error}");
    }
}

#[test]
fn a_store_that_lost_its_log_does_not_pretend_to_be_new() {
    for engine in ALL {
        let mut shop = Shop::new(engine, 23);
        let (house, _) = shop.open();
        shop.work(&house, 3);
        drop(house);
        shop.without_engine();
        fs::remove_dir_all(shop.data().join("log")).unwrap();
        let error = shop.try_open().err().unwrap();
        assert!(matches!(error, OpenError::Unprovable { .. }), "{error}");
    }
}

#[test]
fn an_engine_is_converted_there_and_back_and_nothing_is_lost() {
    let mut shop = Shop::lived(EngineKind::Sled, 31);
    let convert_to = |shop: &Shop, engine| {
        let mut steps = Vec::new();
        let converted = convert(
            &StoreSettings {
                engine,
                ..settings(&shop.data(), engine)
            },
            &testing::ManualClock::new(1_700_000_000_000),
            &mut |step, _, _| {
                if steps.last() != Some(&step) {
                    steps.push(step);
                }
            },
        );
        (converted, steps)
    };
    let mut digests = Vec::new();
    for (from, to, kept) in [
        ("sled", EngineKind::Fjall, "sled.aside-20231114T221320Z"),
        (
            "fjall",
            EngineKind::Sled,
            "fjall.2.aside-20231114T221320Z-2",
        ),
    ] {
        let (converted, steps) = convert_to(&shop, to);
        let converted = converted.unwrap();
        assert_eq!(steps[0], ConvertStep::Recover);
        assert_eq!((converted.from, converted.to), (Some(from), to.as_str()));
        assert_eq!(converted.kept.as_deref(), Some(kept));
        assert!(shop.data().join(kept).is_dir(), "it is kept");
        digests.push(converted.digest);
        let (again, _) = convert_to(&shop, to);
        assert!(matches!(again, Err(ConvertError::Already { .. })));
        shop.engine = to;
        let (house, report) = shop.open();
        assert_eq!(report.rebuilt, None, "the copy is believed");
        assert_eq!(report.replayed_frames, 0, "and up to date");
        shop.check(&house);
        let (busy, _) = convert_to(&shop, EngineKind::Fjall);
        assert!(matches!(
            busy,
            Err(ConvertError::Open(OpenError::InUse { .. }) | ConvertError::Already { .. })
        ));
        shop.work(&house, 10);
        drop(house);
    }
    assert!(digests[0].entries > 20, "{digests:?}");
    // Without an engine, from snapshot and log.
    shop.without_engine();
    let (converted, _) = convert_to(&shop, EngineKind::Fjall);
    assert_eq!(converted.unwrap().from, None);
    shop.engine = EngineKind::Fjall;
    let (house, _) = shop.open();
    shop.check(&house);
}

#[test]
fn choosing_another_engine_builds_it_and_keeps_the_old_one_aside() {
    let mut shop = Shop::lived(EngineKind::Sled, 32);
    for (engine, aside) in [
        (EngineKind::Fjall, "sled.aside-20231114T221320Z"),
        // Within the same second, as this clock has it.
        (EngineKind::Sled, "fjall.2.aside-20231114T221320Z-2"),
    ] {
        shop.engine = engine;
        let (house, report) = shop.open();
        let rebuilt = report.rebuilt.unwrap();
        assert!(rebuilt.why.contains("the settings choose"), "{rebuilt:?}");
        assert_eq!(rebuilt.moved_to.as_deref(), Some(aside));
        shop.check(&house);
        shop.work(&house, 10);
        drop(house);
        let (house, report) = shop.open();
        assert_eq!(report.rebuilt, None);
        shop.check(&house);
    }
}

#[test]
fn snapshots_are_taken_one_at_a_time() {
    for engine in FILES {
        one_at_a_time(Shop::new(engine, 19));
    }
}

fn one_at_a_time(mut shop: Shop) {
    let (house, _) = shop.open();
    for _ in 0..5 {
        shop.work(&house, 30);
        settle(&house);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| house.keeper.take_snapshot().unwrap());
            }
        });
    }
    drop(house);
    shop.without_engine();
    let (house, _) = shop.open();
    shop.check(&house);
}

#[test]
fn an_engine_that_was_in_use_when_the_machine_went_down_is_rebuilt() {
    let mut shop = Shop::lived(EngineKind::Sled, 9);
    let note = shop.data().join("sled.in-use");
    assert!(!note.exists(), "closed in order");
    let (house, _) = shop.open();
    shop.work(&house, 5);
    assert!(note.exists());
    drop(house);
    assert!(!note.exists());
    fs::write(&note, "another boot of this machine\n").unwrap();
    let (house, report) = shop.open();
    assert!(report.rebuilt.unwrap().why.contains("machine went down"));
    shop.check(&house);
    drop(house);
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    fs::write(&note, boot).unwrap();
    let (house, report) = shop.open();
    assert_eq!(report.rebuilt, None, "only the process had ended");
    shop.check(&house);
}

#[test]
fn an_engine_ahead_of_the_log_is_not_believed() {
    let shop = Shop::lived(EngineKind::Sled, 10);
    // The last segments are taken away: the engine knows of frames that nothing proves.
    let segments = shop.segments();
    for segment in &segments[2..] {
        fs::remove_file(segment).unwrap();
    }
    let (house, report) = shop.open();
    let rebuilt = report.rebuilt.unwrap();
    assert!(rebuilt.why.contains("ahead of the log"), "{}", rebuilt.why);
    assert!(shop.data().join(rebuilt.moved_to.unwrap()).is_dir());
    drop(house);
    let (_house, report) = shop.open();
    assert_eq!(report.rebuilt, None);
}

#[test]
fn what_a_later_version_wrote_is_refused_and_left_alone() {
    let shop = Shop::lived(EngineKind::Sled, 11);
    let format = shop.data().join("format");
    let text = fs::read_to_string(&format).unwrap();
    fs::write(
        &format,
        text.replace("bellwire-store 1 ", "bellwire-store 2 "),
    )
    .unwrap();
    assert!(matches!(shop.try_open(), Err(OpenError::Newer { .. })));
    fs::write(&format, "something else").unwrap();
    assert!(matches!(shop.try_open(), Err(OpenError::NotAStore { .. })));
    fs::remove_file(&format).unwrap();
    assert!(matches!(shop.try_open(), Err(OpenError::NotAStore { .. })));
    fs::write(&format, &text).unwrap();
    let (house, _) = shop.open();
    shop.check(&house);
    drop(house);
    // A log of another store.
    fs::write(&format, format!("bellwire-store 1 {}\n", "00".repeat(16))).unwrap();
    assert!(matches!(shop.try_open(), Err(OpenError::Mixed(_))));
    fs::write(&format, &text).unwrap();
    let (house, _) = shop.open();
    shop.check(&house);
}

#[test]
fn files_are_for_their_owner_alone() {
    let shop = Shop::lived(EngineKind::Sled, 12);
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(shop.data()), 0o700);
    for name in ["log", "sled"] {
        assert_eq!(mode(shop.data().join(name)), 0o700, "{name}");
    }
    for name in ["lock", "format", "log/0000000001.seg"] {
        assert_eq!(mode(shop.data().join(name)), 0o600, "{name}");
    }
}

#[test]
fn a_directory_is_for_one_process() {
    let shop = Shop::lived(EngineKind::Memory, 13);
    let (house, _) = shop.open();
    let error = shop.try_open().err().unwrap();
    assert!(matches!(error, OpenError::InUse { .. }), "{error}");
    house.close();
    let error = shop.try_open().err().unwrap();
    assert!(
        matches!(error, OpenError::InUse { .. }),
        "it is still read from"
    );
    drop(house);
    shop.open().0.close();
}

/// Everything that waits in the engine, so that a test may damage it there.
pub(super) fn settle(house: &House) {
    while house.stats().lag_bytes > 0 {
        std::thread::yield_now();
    }
}

pub(super) fn damage(house: &House, key: &[u8]) {
    let mut value = house.engine.get(key).unwrap().unwrap().to_vec();
    let middle = value.len() / 2;
    value[middle] ^= 1;
    let write = engine::EngineWrite {
        key: bytes::Bytes::copy_from_slice(key),
        value: Some(value.into()),
    };
    house.engine.apply(&[write], None).unwrap();
}

#[test]
fn a_rotten_row_is_set_aside_and_its_notification_still_ends() {
    for engine in ALL {
        let shop = Shop::new(engine, 14);
        let (house, _) = shop.open();
        let device = device_id(1);
        let notes: Vec<_> = (1..=3)
            .map(|n| notification(ping_id(n), |note| note.expires_ms = 5_000 + n))
            .collect();
        let mut batch: Vec<Op> = vec![register(device, "ada")];
        for (note, order) in notes.iter().zip(1..) {
            batch.push(insert(device, order, note));
        }
        batch.push(summary(device, 3, 15, 4));
        commit(&house, batch).unwrap();
        settle(&house);
        damage(&house, &keys::row(device, row_meta(2, &notes[1]).key));
        let view = house.read_mailbox(&everything(device)).unwrap();
        let orders: Vec<u64> = view.rows.iter().map(|row| row.key.order).collect();
        assert_eq!(orders, [1, 3], "never served");
        assert_eq!(house.stats().set_aside, 1);
        house.read_mailbox(&everything(device)).unwrap();
        assert_eq!(house.stats().set_aside, 1, "told once");
        assert_eq!(shop.set_aside(), 1, "and kept");
        // The next frame takes the row out; the sweep then meets its place in the index and ends the notification.
        commit(&house, vec![register(device_id(2), "ada")]).unwrap();
        let sweep = || {
            let page = house.expired(6_000, &ExpiryCursor::default(), 10).unwrap();
            page.items.len()
        };
        assert_eq!(sweep(), 2, "the rows that are there");
        commit(&house, vec![register(device_id(3), "ada")]).unwrap();
        settle(&house);
        let page = house.pairs(ping_id(2), None, 10).unwrap();
        let ended = PairState::Ended {
            outcome: crate::delivery::Outcome::Expired,
            at_ms: 5_002,
        };
        assert_eq!(page.items, [(AppId::DEFAULT, device, ended)]);
        assert_eq!(house.drop_receipts(5_003, 10).unwrap(), 1);
        settle(&house);
        assert_eq!(house.pairs(ping_id(2), None, 10).unwrap().items.len(), 0);
    }
}

#[test]
fn a_rotten_shared_body_leaves_its_rows_without_one() {
    let shop = Shop::new(EngineKind::Sled, 15);
    let (house, _) = shop.open();
    let note = notification(ping_id(1), |note| note.shared = true);
    let batch = vec![
        register(device_id(1), "ada"),
        register(device_id(2), "ada"),
        insert(device_id(1), 1, &note),
        insert(device_id(2), 1, &note),
    ];
    commit(&house, batch).unwrap();
    settle(&house);
    damage(&house, &keys::body(ping_id(1)));
    let row = row_meta(1, &note).key;
    assert!(
        house.read_bodies(device_id(1), &[row]).unwrap()[0]
            .1
            .is_none()
    );
    assert_eq!(house.stats().set_aside, 1);
}

#[test]
fn a_record_of_a_later_version_fails_the_read_and_nothing_else() {
    let shop = Shop::new(EngineKind::Memory, 16);
    let (house, _) = shop.open();
    commit(
        &house,
        vec![register(device_id(1), "ada"), register(device_id(2), "bob")],
    )
    .unwrap();
    settle(&house);
    let key = keys::device(device_id(1));
    let mut value = house.engine.get(&key).unwrap().unwrap().to_vec();
    value.truncate(value.len() - 4);
    value[0] = 9;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&key), &value);
    value.extend_from_slice(&sum.to_le_bytes());
    let write = engine::EngineWrite {
        key: bytes::Bytes::copy_from_slice(&key),
        value: Some(value.into()),
    };
    house.engine.apply(&[write], None).unwrap();
    assert!(matches!(
        house.device(device_id(1)),
        Err(ReadError::Newer(9))
    ));
    assert!(house.device(device_id(2)).unwrap().is_some());
    assert_eq!(house.stats().set_aside, 0, "it is not rot");
}

#[test]
fn a_snapshot_leaves_rot_out_and_says_so() {
    let shop = Shop::new(EngineKind::Sled, 17);
    let (house, _) = shop.open();
    commit(
        &house,
        vec![register(device_id(1), "ada"), register(device_id(2), "bob")],
    )
    .unwrap();
    settle(&house);
    damage(&house, &keys::device(device_id(1)));
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    assert_eq!(house.stats().set_aside, 1);
    drop(house);
    shop.without_engine();
    let (house, _) = shop.open();
    assert!(house.device(device_id(2)).unwrap().is_some());
}
