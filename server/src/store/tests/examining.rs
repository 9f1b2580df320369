//! What is said about a data directory, and that looking at it changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::examine::{
    EngineState, Holder, Inspect, Inspection, Plan, Salvage, SalvageError, Salvaged, Verified,
    inspect, salvage, verify,
};
use super::super::*;
use super::files::{Shop, damage, files, frames, patch, settle};
use super::support::*;

/// Every file and directory below a directory: its bytes, its mode and when it was changed.
pub(super) fn portrait(dir: &Path) -> BTreeMap<PathBuf, (Vec<u8>, u32, i64, i64)> {
    let mut seen = BTreeMap::new();
    let mut rest = vec![dir.to_owned()];
    while let Some(path) = rest.pop() {
        let found = fs::symlink_metadata(&path).unwrap();
        let bytes = if found.is_dir() {
            rest.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            Vec::new()
        } else {
            fs::read(&path).unwrap()
        };
        seen.insert(
            path,
            (bytes, found.mode(), found.mtime(), found.mtime_nsec()),
        );
    }
    seen
}

pub(super) fn look(dir: &Path, open_engines: bool) -> Inspection {
    inspect(&Inspect {
        dir: dir.to_owned(),
        open_engines,
        scratch: None,
    })
    .unwrap()
}

#[test]
fn a_look_changes_not_one_byte() {
    for engine in [EngineKind::Memory, EngineKind::Sled] {
        let shop = Shop::lived(engine, 30);
        fs::write(shop.data().join("log/next.tmp"), b"left over").unwrap();
        let before = portrait(&shop.data());
        for open_engines in [false, true] {
            let seen = look(&shop.data(), open_engines);
            assert_eq!(seen.findings, [""; 0]);
            assert_eq!(seen.leftovers, ["log/next.tmp"]);
            assert_eq!(seen.holder, Holder::Nobody);
        }
        assert!(before == portrait(&shop.data()));
    }
}

#[test]
fn a_look_says_what_the_start_then_does() {
    let shop = Shop::lived(EngineKind::Sled, 31);
    let seen = look(&shop.data(), true);
    let Plan::Engine { frame, replays } = seen.start.plan else {
        panic!("{:?}", seen.start);
    };
    let (house, report) = shop.open();
    assert_eq!(
        (report.replayed_frames, report.last_frame + 1),
        (replays, frame)
    );
    // Beside a server it says who that is, and leaves the engine alone.
    let seen = look(&shop.data(), true);
    let pid = Some(std::process::id());
    assert_eq!(seen.holder, Holder::Server { pid });
    assert!(matches!(
        seen.engines[0].state,
        EngineState::NotOpened { .. }
    ));
    drop(house);
}

// ---- Verify and salvage --------------------------------------------------------------------------------------------

const ENGINES: [EngineKind; 3] = [EngineKind::Memory, EngineKind::Sled, EngineKind::Fjall];

pub(super) fn checked(dir: &Path) -> Verified {
    verify(dir.to_owned(), None, &|_| {}).unwrap()
}

pub(super) fn try_salvage(shop: &Shop, into: Option<&Path>) -> Result<Salvaged, SalvageError> {
    salvage(
        &Salvage {
            broken: shop.data(),
            into: into.map(Path::to_owned),
            scratch: None,
            settings: settings(into.unwrap_or(Path::new("")), shop.engine),
        },
        Arc::new(testing::ManualClock::new(1_700_000_100_000)),
        Arc::new(testing::SeededEntropy::new(77)),
        &|_| {},
    )
}

/// Salvages into a fresh directory, and sees that the old one is as it was and the new one is sound.
pub(super) fn saved(shop: &Shop) -> (tempfile::TempDir, Salvaged) {
    let room = tempfile::tempdir().unwrap();
    let into = room.path().join("new");
    let before = portrait(&shop.data());
    let salvaged = try_salvage(shop, Some(&into)).unwrap();
    assert!(before == portrait(&shop.data()), "nothing was changed");
    let found = checked(&into);
    assert!(found.sound, "{:?}", found.wrong);
    (room, salvaged)
}

pub(super) fn opened(room: &tempfile::TempDir, engine: EngineKind) -> House {
    open_house(
        &settings(&room.path().join("new"), engine),
        Arc::new(testing::ManualClock::new(1_700_000_200_000)),
        Arc::new(testing::SeededEntropy::new(78)),
    )
    .unwrap()
    .0
}

pub(super) const DEVICE: u64 = 1;

/// A store in which one device is sent a notification in each frame.
pub(super) fn posted(engine: EngineKind, count: u64) -> Shop {
    let shop = Shop::new(engine, 1);
    let (house, _) = shop.open();
    commit(&house, vec![register(device_id(DEVICE), "ada")]).unwrap();
    post(&house, 1..=count);
    drop(house);
    shop
}

pub(super) fn note(n: u64) -> Arc<Notification> {
    notification(ping_id(n), |note| {
        note.accepted_ms = 1_000 + n;
        note.expires_ms = 1_800_000_000_000 + n;
        note.content = vec![n as u8; 300].into();
        note.size = 300;
    })
}

pub(super) fn post(house: &House, pings: std::ops::RangeInclusive<u64>) {
    for n in pings {
        let view = house.read_mailbox(&everything(device_id(DEVICE))).unwrap();
        let order = view.summary.unwrap().next_order;
        let count = view.rows.len() as u32 + 1;
        commit(
            house,
            vec![
                insert(device_id(DEVICE), order, &note(n)),
                summary(device_id(DEVICE), count, u64::from(count) * 300, order + 1),
            ],
        )
        .unwrap();
    }
}

/// Waits until the history knows how a ping ended; a start tells it what the engine knows.
pub(super) fn remembered(house: &House, ping: u64) {
    let give_up = std::time::Instant::now() + PATIENCE;
    let known = || house.outcomes_of_ping(AppId::DEFAULT, ping_id(ping), None, 1);
    while known().unwrap().is_empty() {
        assert!(std::time::Instant::now() < give_up, "ping {ping}");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// The device acknowledges a ping, long ago.
pub(super) fn acknowledge(house: &House, ping: u64) {
    acknowledge_at(house, ping, 5_000 + ping);
}

/// The same at a time.
pub(super) fn acknowledge_at(house: &House, ping: u64, at_ms: u64) {
    let view = house.read_mailbox(&everything(device_id(DEVICE))).unwrap();
    let row = view
        .rows
        .iter()
        .find(|row| row.ping == ping_id(ping))
        .unwrap();
    let count = view.rows.len() as u32 - 1;
    let next = view.summary.unwrap().next_order;
    commit(
        house,
        vec![
            remove(
                device_id(DEVICE),
                row.key.order,
                &note(ping),
                crate::delivery::Outcome::Acknowledged,
                at_ms,
            ),
            summary(device_id(DEVICE), count, u64::from(count) * 300, next),
        ],
    )
    .unwrap();
}

/// The pings that wait for the device, each with the content that it was sent with.
pub(super) fn waiting(house: &House) -> Vec<u64> {
    let device = device_id(DEVICE);
    let view = house.read_mailbox(&everything(device)).unwrap();
    let rows: Vec<_> = view.rows.iter().map(|row| row.key).collect();
    let run = house.stats().run;
    assert!(view.rows.iter().all(|row| row.run < run), "redelivered");
    let mut pings: Vec<u64> = house
        .read_bodies(device, &rows)
        .unwrap()
        .into_iter()
        .map(|(_, body)| {
            let body = body.expect("every row has its body");
            let n = u64::from_be_bytes(body.ping.0[8..].try_into().unwrap());
            assert_eq!(body.content, note(n).content);
            n
        })
        .collect();
    pings.sort_unstable();
    pings
}

/// Breaks the frame that carries a ping; answers the segment.
pub(super) fn rot(shop: &Shop, ping: u64) -> usize {
    let segments = shop.segments();
    for (index, segment) in segments.iter().enumerate() {
        let data = fs::read(segment).unwrap();
        for (begin, end) in frames(segment) {
            let frame = &data[begin as usize..end as usize];
            if frame.windows(250).any(|part| part == [ping as u8; 250]) {
                patch(segment, begin + 30, b"rot");
                return index;
            }
        }
    }
    panic!("no frame carries ping {ping}");
}

#[test]
fn a_sound_store_is_found_sound_and_survives_a_salvage_unchanged() {
    for engine in ENGINES {
        let shop = Shop::lived(engine, 32);
        let found = checked(&shop.data());
        assert!(found.sound, "{engine:?}: {:?}", found.wrong);
        assert!(found.state.is_some(), "{engine:?}");
        let (room, salvaged) = saved(&shop);
        assert_eq!(salvaged.lost_frames, []);
        assert!(salvaged.repaired.is_empty(), "{:?}", salvaged.repaired);
        shop.check(&opened(&room, engine));
    }
}

#[test]
fn frames_behind_a_rotten_place_are_saved_before_a_start_and_after_it() {
    for engine in ENGINES {
        for started in [false, true] {
            let shop = posted(engine, 90);
            shop.without_engine();
            let index = rot(&shop, 40);
            assert!(index > 0 && index + 1 < shop.segments().len());
            let mut expected: Vec<u64> = (1..=90).filter(|n| *n != 40).collect();
            if started {
                let (house, report) = shop.open();
                assert!(!report.set_aside.is_empty());
                assert_eq!(waiting(&house), (1..40).collect::<Vec<u64>>());
                // Numbers of frames and places of rows are used a second time.
                post(&house, 101..=110);
                expected.extend(101..=110);
                drop(house);
            }
            let (room, salvaged) = saved(&shop);
            let house = opened(&room, engine);
            assert_eq!(waiting(&house), expected, "{engine:?} {started}");
            if started {
                assert_eq!(salvaged.side_lines.len(), 1);
                assert_eq!(salvaged.side_lines[0].unreadable_frames, 1);
                assert_eq!(salvaged.side_lines[0].notifications, 50);
            } else {
                assert_eq!(salvaged.lost_frames.len(), 1);
            }
        }
    }
}

#[test]
fn what_ended_stays_ended_whichever_side_says_so() {
    let engine = EngineKind::Sled;
    let shop = posted(engine, 60);
    let (house, _) = shop.open();
    // Behind the rotten place: the end of one that was accepted before it.
    acknowledge(&house, 3);
    drop(house);
    shop.without_engine();
    rot(&shop, 40);
    let (house, _) = shop.open();
    // After the start: it is there again, and so is 5, which ends now.
    assert_eq!(waiting(&house), (1..40).collect::<Vec<u64>>());
    acknowledge(&house, 5);
    drop(house);
    let (room, salvaged) = saved(&shop);
    let expected: Vec<u64> = (1..=60).filter(|n| ![3, 5, 40].contains(n)).collect();
    assert_eq!(waiting(&opened(&room, engine)), expected);
    assert_eq!(salvaged.side_lines[0].ended, 1);
}

#[test]
fn a_lost_segment_costs_its_own_frames_and_no_others() {
    for place in ["first", "middle", "last"] {
        let engine = EngineKind::Memory;
        let shop = posted(engine, 90);
        let segments = shop.segments();
        let index = match place {
            "first" => 0,
            "middle" => segments.len() / 2,
            _ => segments.len() - 1,
        };
        let data = fs::read(&segments[index]).unwrap();
        let lost: Vec<u64> = (1..=90u64)
            .filter(|n| data.windows(250).any(|part| part == [*n as u8; 250]))
            .collect();
        fs::remove_file(&segments[index]).unwrap();
        let (room, salvaged) = saved(&shop);
        let house = opened(&room, engine);
        let expected: Vec<u64> = match place {
            // The device was registered in it, and nothing proves who it was.
            "first" => Vec::new(),
            _ => (1..=90).filter(|n| !lost.contains(n)).collect(),
        };
        let record = house.device(device_id(DEVICE)).unwrap();
        assert_eq!(record.is_some(), place != "first");
        assert_eq!(waiting(&house), expected, "{place}");
        assert_eq!(salvaged.lost_frames.is_empty(), place == "last");
    }
}

#[test]
fn what_only_an_engine_ahead_of_the_log_knew_is_saved_from_where_it_was_moved() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let shop = posted(engine, 90);
        let segments = shop.segments();
        for segment in &segments[segments.len() / 2..] {
            fs::remove_file(segment).unwrap();
        }
        let (house, report) = shop.open();
        assert!(report.rebuilt.unwrap().why.contains("ahead of the log"));
        let left = waiting(&house);
        assert!(left.len() < 90);
        post(&house, 101..=105);
        acknowledge(&house, 2);
        drop(house);
        let (room, _) = saved(&shop);
        let expected: Vec<u64> = (1..=90).chain(101..=105).filter(|n| *n != 2).collect();
        assert_eq!(waiting(&opened(&room, engine)), expected);
    }
}

#[test]
fn what_only_an_engine_ahead_of_the_log_knew_is_saved_after_a_conversion_too() {
    let kinds = [EngineKind::Sled, EngineKind::Fjall];
    for (from, to) in [(kinds[0], kinds[1]), (kinds[1], kinds[0])] {
        let mut shop = posted(from, 90);
        let segments = shop.segments();
        for segment in &segments[segments.len() / 2..] {
            fs::remove_file(segment).unwrap();
        }
        let settings = StoreSettings {
            segment_bytes: 8 << 10,
            ..settings(&shop.data(), to)
        };
        let clock = testing::ManualClock::new(1_700_000_000_000);
        let converted = convert(&settings, &clock, &mut |_, _, _| {}).unwrap();
        let rebuilt = converted.report.rebuilt.unwrap();
        assert!(rebuilt.why.contains("ahead of the log"), "{}", rebuilt.why);
        // The log takes the numbers that the engine knew a second time, and more.
        shop.engine = to;
        let (house, _) = shop.open();
        post(&house, 101..=180);
        acknowledge(&house, 2);
        drop(house);
        let (room, salvaged) = saved(&shop);
        assert_eq!(salvaged.passed_over, [""; 0]);
        let expected: Vec<u64> = (1..=90).chain(101..=180).filter(|n| *n != 2).collect();
        assert_eq!(waiting(&opened(&room, to)), expected);
    }
}

#[test]
fn an_engine_that_no_note_tells_of_is_passed_over_while_there_is_anything_else() {
    let shop = posted(EngineKind::Sled, 20);
    let old = shop.data().join("sled.aside-20230101T000000Z");
    copy_tree(&shop.engine_dir(), &old);
    let (house, _) = shop.open();
    acknowledge(&house, 3);
    drop(house);
    fs::remove_dir_all(shop.engine_dir()).unwrap();
    fs::remove_file(&shop.segments()[0]).unwrap();
    let salvaged = try_salvage(&shop, None).unwrap();
    assert_eq!(salvaged.passed_over, ["sled.aside-20230101T000000Z"]);
    assert_eq!(salvaged.base, "nothing");
    // It is all there is.
    for segment in shop.segments() {
        fs::remove_file(segment).unwrap();
    }
    let (room, salvaged) = saved(&shop);
    assert_eq!(salvaged.base, "sled.aside-20230101T000000Z");
    assert_eq!(salvaged.passed_over, [""; 0]);
    let expected: Vec<u64> = (1..=20).collect();
    assert_eq!(waiting(&opened(&room, EngineKind::Sled)), expected);
}

#[test]
fn a_repair_goes_on_until_nothing_is_left() {
    let shop = posted(EngineKind::Sled, 3);
    let (house, _) = shop.open();
    // A second row of one notification, and what knows of them rots wherever it is.
    let device = device_id(DEVICE);
    let twice = vec![insert(device, 4, &note(2)), summary(device, 4, 1_200, 5)];
    commit(&house, twice).unwrap();
    settle(&house);
    damage(&house, &keys::pair(ping_id(2), device));
    for pings in [11..=60, 61..=110, 111..=112] {
        post(&house, pings);
        settle(&house);
        assert!(house.keeper.take_snapshot().unwrap().is_some());
    }
    drop(house);
    let (room, salvaged) = saved(&shop);
    assert_eq!(salvaged.left, [""; 0]);
    assert_eq!(salvaged.repaired["a second row of one notification"], 1);
    let expected: Vec<u64> = (1..=3).chain(11..=112).collect();
    assert_eq!(waiting(&opened(&room, EngineKind::Sled)), expected);
}

#[test]
fn a_salvage_takes_no_other_store_along() {
    let shop = posted(EngineKind::Memory, 3);
    for other in ["replaced-20230101T000000Z", "restoring"] {
        copy_tree(
            &shop.data().join("log"),
            &shop.data().join(other).join("log"),
        );
    }
    fs::write(shop.data().join("hash.key"), [7; 32]).unwrap();
    let (room, salvaged) = saved(&shop);
    assert_eq!(salvaged.copied, ["hash.key"]);
    assert!(room.path().join("new/hash.key").exists());
    assert!(!room.path().join("new/restoring").exists());
}

#[test]
fn a_rotten_record_of_the_engine_is_found_in_the_log() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let shop = posted(engine, 20);
        let (house, _) = shop.open();
        settle(&house);
        let row = row_meta(7, &note(7)).key;
        for key in [
            keys::row(device_id(DEVICE), row),
            keys::pair(ping_id(8), device_id(DEVICE)),
            keys::summary(device_id(DEVICE)),
            keys::device(device_id(DEVICE)),
        ] {
            damage(&house, &key);
        }
        drop(house);
        let found = checked(&shop.data());
        assert!(!found.sound);
        let kinds = found.state.unwrap().kinds;
        assert_eq!(kinds["a record that cannot be read"], 4, "{kinds:?}");
        let (room, salvaged) = saved(&shop);
        assert_eq!((salvaged.rotten, salvaged.found_elsewhere), (4, 4));
        assert_eq!(
            waiting(&opened(&room, engine)),
            (1..=20).collect::<Vec<u64>>()
        );
    }
}

#[test]
fn the_last_sight_of_a_device_is_saved_with_it_and_of_one_that_is_gone_is_not() {
    use crate::ports::{Carrier, Seen};
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let shop = posted(engine, 3);
        let (house, _) = shop.open();
        let seen = Seen {
            at_ms: 7,
            carrier: Carrier::Quic,
            agent: Some("tester/1".into()),
        };
        let (here, gone) = (device_id(DEVICE), device_id(77));
        let sights = [here, gone].map(|device| Op::PutSeen(device, seen.clone()));
        commit(&house, sights.to_vec()).unwrap();
        settle(&house);
        drop(house);
        let found = checked(&shop.data());
        let kinds = found.state.unwrap().kinds;
        assert_eq!(
            kinds["the last sight of a device that is gone"], 1,
            "{kinds:?}"
        );
        let (room, _) = saved(&shop);
        let house = opened(&room, engine);
        assert_eq!(house.seen(&[here, gone]).unwrap(), [Some(seen), None]);
    }
}

#[test]
fn a_store_without_its_format_file_is_saved_and_a_later_one_is_left_alone() {
    let shop = posted(EngineKind::Sled, 10);
    let format = shop.data().join("format");
    fs::remove_file(&format).unwrap();
    assert!(matches!(
        look(&shop.data(), false).start.plan,
        Plan::Refuses { .. }
    ));
    assert!(matches!(shop.try_open(), Err(OpenError::NotAStore { .. })));
    let (room, _) = saved(&shop);
    let house = opened(&room, EngineKind::Sled);
    assert_eq!(waiting(&house), (1..=10).collect::<Vec<u64>>());
    fs::write(&format, "bellwire-store 2 00\n").unwrap();
    let refused = try_salvage(&shop, None).err().unwrap();
    assert!(matches!(refused, SalvageError::Newer(_)), "{refused}");
}

#[test]
fn a_salvage_writes_nowhere_but_into_a_fresh_directory_and_not_at_all_when_dry() {
    let shop = posted(EngineKind::Sled, 5);
    let before = portrait(&shop.data());
    let dry = try_salvage(&shop, None).unwrap();
    assert_eq!((dry.into, dry.records[&'r']), (None, 5));
    let inside = shop.data().join("new");
    let refused = try_salvage(&shop, Some(&inside)).err().unwrap();
    assert!(matches!(refused, SalvageError::Inside(_)), "{refused}");
    let refused = try_salvage(&shop, Some(shop.dir.path())).err().unwrap();
    assert!(matches!(refused, SalvageError::NotEmpty(_)), "{refused}");
    assert!(before == portrait(&shop.data()));
    let (house, _) = shop.open();
    let refused = try_salvage(&shop, None).err().unwrap();
    assert!(matches!(refused, SalvageError::InUse { .. }), "{refused}");
    drop(house);
}

#[test]
fn a_snapshot_that_knows_more_than_log_and_engine_is_used() {
    let shop = posted(EngineKind::Sled, 30);
    let early = shop.dir.path().join("early");
    fs::create_dir(&early).unwrap();
    for file in shop.segments() {
        fs::copy(&file, early.join(file.file_name().unwrap())).unwrap();
    }
    let engine = shop.engine_dir();
    let kept = shop.dir.path().join("engine");
    copy_tree(&engine, &kept);
    let (house, _) = shop.open();
    post(&house, 31..=60);
    settle(&house);
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    drop(house);
    // Log and engine are put back to an earlier time; the snapshot is not.
    fs::remove_dir_all(shop.data().join("log")).unwrap();
    copy_tree(&early, &shop.data().join("log"));
    fs::remove_dir_all(&engine).unwrap();
    copy_tree(&kept, &engine);
    let (house, report) = shop.open();
    assert!(report.rebuilt.unwrap().why.contains("there was more"));
    assert_eq!(waiting(&house), (1..=60).collect::<Vec<u64>>());
}

pub(super) fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_tree(&entry.path(), &target);
        } else {
            fs::copy(entry.path(), target).unwrap();
        }
    }
}

#[test]
fn two_starts_within_one_second_set_aside_under_names_of_their_own() {
    let shop = posted(EngineKind::Memory, 90);
    let mut kept = 0;
    for ping in [60, 20] {
        rot(&shop, ping);
        let before: Vec<_> = files(&shop.data().join("set-aside"), "");
        let (_house, report) = shop.open();
        assert!(!report.set_aside.is_empty());
        let after = files(&shop.data().join("set-aside"), "");
        assert!(before.iter().all(|file| after.contains(file)));
        assert!(after.len() > kept + report.set_aside.len(), "and a note");
        kept = after.len();
    }
    let expected: Vec<u64> = (1..=90).filter(|n| ![20, 60].contains(n)).collect();
    let (room, salvaged) = saved(&shop);
    assert_eq!(salvaged.side_lines.len(), 2);
    assert_eq!(waiting(&opened(&room, EngineKind::Memory)), expected);
}

// ---- Outcomes ------------------------------------------------------------------------------------------------------

#[test]
fn rot_in_outcomes_is_told_where_it_is_and_a_torn_end_is_none() {
    let shop = Shop::lived(EngineKind::Memory, 41);
    let (house, _) = shop.open();
    let record = |n: u8| OutcomeRecord {
        app: AppId::DEFAULT,
        ping: PingId([n; 16]),
        device: device_id(7),
        outcome: crate::delivery::Outcome::Expired,
        at_ms: 1_700_000_000_000 - u64::from(n),
        accepted_ms: None,
    };
    house.record_outcomes(&mut (0..100).map(record).collect());
    drop(house);
    let segment = files(&shop.data().join("outcomes"), ".out").pop().unwrap();
    let index = segment.with_extension("idx");
    let found = checked(&shop.data());
    assert!(found.sound, "{:?}", found.wrong);
    let seen = found.inspection.outcomes.last().unwrap().clone();
    assert_eq!((seen.records, seen.index), (100, "whole"));
    assert_eq!(seen.latest_ms, Some(1_700_000_000_000));
    assert!(found.inspection.other.is_empty());
    let whole = (fs::read(&segment).unwrap(), fs::read(&index).unwrap());

    // Cut off, as a crash leaves it.
    fs::remove_file(&index).unwrap();
    fs::write(&segment, &whole.0[..whole.0.len() - 30]).unwrap();
    let found = checked(&shop.data());
    assert!(found.sound, "{:?}", found.wrong);
    let seen = found.inspection.outcomes.last().unwrap();
    assert_eq!((seen.records, seen.index), (99, "missing"));

    for (place, told) in [
        (64 + 5 * 64 + 1, "1 outcomes in it cannot be read"),
        (33, "it is damaged"),
    ] {
        let mut bytes = whole.0.clone();
        bytes[place] ^= 4;
        fs::write(&segment, &bytes).unwrap();
        fs::write(&index, &whole.1).unwrap();
        let before = portrait(&shop.data());
        let found = checked(&shop.data());
        assert!(
            found.wrong.iter().any(|wrong| wrong.contains(told)),
            "{:?}",
            found.wrong
        );
        assert!(before == portrait(&shop.data()), "nothing was changed");
    }
    fs::write(&segment, &whole.0).unwrap();
    for place in [20, 64 + 30, whole.1.len() - 1] {
        let mut bytes = whole.1.clone();
        bytes[place] ^= 4;
        fs::write(&index, &bytes).unwrap();
        let found = checked(&shop.data());
        assert!(
            found.wrong.iter().any(|wrong| wrong.contains("index")),
            "{place}: {:?}",
            found.wrong
        );
    }
}
