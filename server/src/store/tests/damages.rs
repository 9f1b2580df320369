//! Damage to real files, and that nothing that cannot be read is deleted: not by the start that meets it, and not later either.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::super::examine::SalvageError;
use super::super::*;
use super::examining::{
    acknowledge_at, copy_tree, opened, portrait, post, posted, remembered, rot, saved, try_salvage,
    waiting,
};
use super::files::{Shop, files, patch, settle};
use super::support::*;

/// A life with snapshots, outcomes, several segments and a second engine.
fn full(engine: EngineKind) -> Shop {
    let shop = posted(engine, 40);
    let (house, _) = shop.open();
    settle(&house);
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    post(&house, 41..=60);
    acknowledge_at(&house, 7, 1_699_999_999_000);
    settle(&house);
    house.keeper.rebuild().unwrap();
    drop(house);
    let (house, _) = shop.open();
    remembered(&house, 7);
    drop(house);
    assert!(files(&shop.data().join("log"), ".seg").len() > 3);
    assert!(shop.data().join("engine").exists());
    assert!(!files(&shop.data().join("outcomes"), ".out").is_empty());
    shop
}

fn overwrite(path: &Path) {
    let length = fs::metadata(path).unwrap().len() as usize;
    fs::write(path, vec![0xa5; length]).unwrap();
}

fn first(dir: &Path, suffix: &str) -> PathBuf {
    files(dir, suffix).remove(0)
}

/// Damages something and says which files carry it.
type Damage = fn(&Shop) -> PathBuf;

const DAMAGES: [(&str, Damage); 8] = [
    ("a frame", |shop| {
        shop.without_engine();
        let index = rot(shop, 20);
        shop.segments()[index].clone()
    }),
    ("the head of a segment", |shop| {
        shop.without_engine();
        let segment = shop.segments().remove(2);
        patch(&segment, 20, b"rot");
        segment
    }),
    ("a segment cut short", |shop| {
        shop.without_engine();
        let segment = shop.segments().remove(2);
        let bytes = fs::read(&segment).unwrap();
        fs::write(&segment, &bytes[..40]).unwrap();
        segment
    }),
    ("a snapshot", |shop| {
        shop.without_engine();
        let snapshot = first(&shop.data().join("snapshots"), ".snap");
        patch(&snapshot, 100, b"rot");
        snapshot
    }),
    ("the engine", |shop| {
        let dir = shop.engine_dir();
        let largest = files(&dir, "")
            .into_iter()
            .max_by_key(|path| fs::metadata(path).unwrap().len())
            .unwrap();
        overwrite(&largest);
        largest
    }),
    ("the file that says which engine counts", |shop| {
        let pointer = shop.data().join("engine");
        patch(&pointer, 3, b"rot");
        pointer
    }),
    ("the format file", |shop| {
        let format = shop.data().join("format");
        patch(&format, 3, b"rot");
        format
    }),
    ("outcomes", |shop| {
        let outcomes = first(&shop.data().join("outcomes"), ".out");
        patch(&outcomes, 20, b"rot");
        outcomes
    }),
];

#[test]
fn whatever_is_damaged_its_bytes_are_still_there_after_the_starts_that_follow() {
    for engine in [EngineKind::Sled, EngineKind::Fjall] {
        let model = full(engine);
        for (what, damage) in DAMAGES {
            let shop = Shop::new(engine, 1);
            copy_tree(&model.data(), &shop.data());
            let damaged = fs::read(damage(&shop)).unwrap();
            for _ in 0..2 {
                let opened = shop.try_open();
                if what == "the format file" {
                    assert!(matches!(opened, Err(OpenError::NotAStore { .. })));
                } else {
                    let (house, _) = opened.unwrap();
                    let left = waiting(&house);
                    match what {
                        // What is behind it cannot be proved.
                        "a frame" | "the head of a segment" | "a segment cut short" => {
                            assert!(left.len() >= 5, "{what}: {left:?}");
                        }
                        _ => assert_eq!(left.len(), 59, "{engine:?}: {what}"),
                    }
                }
                if (what, engine) == ("the engine", EngineKind::Fjall) {
                    // It cuts its own journal where that cannot be read. It is an index: nothing is lost by that.
                    continue;
                }
                let there = portrait(&shop.data());
                assert!(
                    there.values().any(|(bytes, ..)| *bytes == damaged),
                    "{engine:?}: {what}: the damaged file is gone"
                );
            }
        }
    }
}

#[test]
fn what_cannot_be_read_is_kept_when_it_is_not_needed_any_more() {
    let shop = posted(EngineKind::Sled, 30);
    let (house, _) = shop.open();
    settle(&house);
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    post(&house, 31..=35);
    drop(house);
    // A snapshot that nobody reads, and a frame that the engine has had for long.
    let snapshot = first(&shop.data().join("snapshots"), ".snap");
    patch(&snapshot, 100, b"rot");
    let index = rot(&shop, 34);
    let segment = shop.segments()[index].clone();
    let damaged = [&snapshot, &segment].map(|path| fs::read(path).unwrap());
    let (house, report) = shop.open();
    assert_eq!(report.gaps, 1, "it is told");
    assert_eq!((report.rebuilt, report.set_aside), (None, Vec::new()));
    assert_eq!(waiting(&house), (1..=35).collect::<Vec<u64>>());
    // From here on the segment is written to; what was rotten in it stays as it is.
    let spoiled = |bytes: &[u8]| {
        let from = bytes.windows(250).position(|part| part == [34; 250]);
        from.map(|from| bytes[from - 60..from].to_vec())
    };
    let rotten = spoiled(&damaged[1]).unwrap();
    for round in 0..3u64 {
        post(&house, 41 + round * 30..=70 + round * 30);
        settle(&house);
        assert!(house.keeper.take_snapshot().unwrap().is_some());
    }
    let expected: Vec<u64> = (1..=35).chain(41..=130).collect();
    assert_eq!(waiting(&house), expected);
    drop(house);
    assert!(!snapshot.exists() && !segment.exists(), "they were retired");
    let there = portrait(&shop.data());
    let kept = |dir: &str, test: &dyn Fn(&[u8]) -> bool| {
        there
            .iter()
            .any(|(path, (bytes, ..))| path.display().to_string().contains(dir) && test(bytes))
    };
    assert!(kept("set-aside/retired-", &|bytes| bytes == damaged[0]));
    assert!(kept("set-aside/released-", &|bytes| {
        spoiled(bytes).is_some_and(|found| found == rotten)
    }));
    // Whoever saves the store later is not led astray by them.
    let (room, salvaged) = saved(&shop);
    assert_eq!(salvaged.side_lines.len(), 0);
    assert_eq!(waiting(&opened(&room, EngineKind::Sled)), expected);
}

type Change = fn(&Shop);

/// The bytes of all files but the lock, which says who came last.
fn contents(shop: &Shop) -> BTreeMap<PathBuf, Vec<u8>> {
    portrait(&shop.data())
        .into_iter()
        .filter(|(path, _)| path.is_file() && !path.ends_with("lock"))
        .map(|(path, (bytes, ..))| (path, bytes))
        .collect()
}

#[test]
fn anything_of_a_later_format_is_refused_by_start_and_salvage_and_left_alone() {
    let later: [(&str, Change); 4] = [
        ("the directory", |shop| {
            let path = shop.data().join("format");
            let text = fs::read_to_string(&path).unwrap();
            fs::write(
                &path,
                text.replace("bellwire-store 1 ", "bellwire-store 2 "),
            )
            .unwrap();
        }),
        ("a segment", |shop| {
            let path = shop.segments().pop().unwrap();
            let mut head = fs::read(&path).unwrap()[..64].to_vec();
            head[8] = 2;
            let sum = crc32c::crc32c_append(crc32c::crc32c(&head[..12]), &head[16..]);
            head[12..16].copy_from_slice(&sum.to_le_bytes());
            patch(&path, 0, &head);
        }),
        ("a snapshot", |shop| {
            shop.without_engine();
            let path = first(&shop.data().join("snapshots"), ".snap");
            patch(&path, 8, &[2]);
        }),
        ("the file that says which engine counts", |shop| {
            let text = "bellwire-engine 2 sled.2 -";
            let sum = crc32c::crc32c(text.as_bytes());
            fs::write(shop.data().join("engine"), format!("{text} {sum:08x}\n")).unwrap();
        }),
    ];
    for (what, change) in later {
        let shop = full(EngineKind::Sled);
        change(&shop);
        let before = contents(&shop);
        let refused = shop.try_open().err().unwrap();
        assert!(
            matches!(refused, OpenError::Newer { .. }),
            "{what}: {refused}"
        );
        let after = contents(&shop);
        assert!(
            before
                .iter()
                .all(|(path, bytes)| after.get(path) == Some(bytes)),
            "{what}: something was changed"
        );
        let refused = try_salvage(&shop, None).err().unwrap();
        assert!(
            matches!(refused, SalvageError::Newer(_)),
            "{what}: {refused}"
        );
    }
}

#[test]
fn files_of_another_store_are_never_mixed_in() {
    let other = Shop::new(EngineKind::Sled, 1);
    // Chance differs, so its identity does.
    fs::write(other.dir.path().join("another"), "").unwrap();
    let (house, _) = other.open();
    commit(&house, vec![register(device_id(9), "eve")]).unwrap();
    settle(&house);
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    drop(house);
    let foreign = first(&other.data().join("snapshots"), ".snap");

    // A snapshot that says it knows more than anything here.
    let shop = full(EngineKind::Sled);
    let newest = shop
        .data()
        .join("snapshots")
        .join(format!("{:020}.snap", 1_000));
    fs::copy(&foreign, &newest).unwrap();
    let bytes = fs::read(&newest).unwrap();
    let (house, report) = shop.open();
    assert_eq!(report.rebuilt, None);
    assert_eq!(waiting(&house).len(), 59);
    assert!(house.device(device_id(9)).unwrap().is_none());
    drop(house);
    assert!(
        portrait(&shop.data())
            .values()
            .any(|(found, ..)| *found == bytes)
    );
    let (room, _) = saved(&shop);
    let house = opened(&room, EngineKind::Sled);
    assert_eq!(waiting(&house).len(), 59);
    assert!(house.device(device_id(9)).unwrap().is_none());

    // A segment.
    let shop = full(EngineKind::Sled);
    let segment = shop.segments().pop().unwrap();
    fs::copy(&other.segments()[0], &segment).unwrap();
    let before = contents(&shop);
    let refused = shop.try_open().err().unwrap();
    assert!(matches!(refused, OpenError::Mixed(_)), "{refused}");
    assert!(before == contents(&shop));
}

#[test]
fn a_history_that_cannot_be_opened_keeps_no_store_from_starting() {
    let shop = posted(EngineKind::Sled, 3);
    let outcomes = shop.data().join(outcomes::DIR);
    fs::remove_dir_all(&outcomes).unwrap();
    fs::write(&outcomes, "not a directory").unwrap();
    let (house, _) = shop.open();
    post(&house, 4..=5);
    acknowledge_at(&house, 2, 1_699_999_999_000);
    house.record_outcomes(&mut vec![
        OutcomeRecord {
            app: AppId::DEFAULT,
            ping: ping_id(2),
            device: device_id(1),
            outcome: crate::delivery::Outcome::Acknowledged,
            at_ms: 1_699_999_999_000,
            accepted_ms: None,
        };
        3
    ]);
    assert_eq!(house.stats().outcomes.failed, 3);
    let none = house.outcomes_of_ping(AppId::DEFAULT, ping_id(2), None, 1);
    assert_eq!(none.unwrap(), []);
    assert_eq!(waiting(&house), [1, 3, 4, 5]);
    drop(house);
    assert_eq!(fs::read(&outcomes).unwrap(), b"not a directory");
    let found = super::examining::checked(&shop.data());
    let told = |wrong: &String| wrong.contains("the outcomes cannot be listed");
    assert!(found.wrong.iter().any(told), "{:?}", found.wrong);
}

#[test]
fn rot_that_came_while_the_server_ran_is_kept_when_its_segment_is_not_needed_any_more() {
    let shop = posted(EngineKind::Sled, 3);
    let (house, _) = shop.open();
    post(&house, 11..=80);
    let segments = shop.segments();
    assert!(segments.len() > 3);
    let rotten = &segments[rot(&shop, 30)];
    let (name, bytes) = (rotten.file_name().unwrap(), fs::read(rotten).unwrap());
    for pings in [81..=120, 121..=160] {
        post(&house, pings);
        settle(&house);
        assert!(house.keeper.take_snapshot().unwrap().is_some());
    }
    let left = shop.segments();
    assert!(
        !left.iter().any(|path| segments[..3].contains(path)),
        "{left:?}"
    );
    let kept = files(&shop.data().join("set-aside"), ".segment");
    let number = name.to_str().unwrap().strip_suffix(".seg").unwrap();
    assert_eq!(kept.len(), 1, "only that one: {kept:?}");
    assert!(kept[0].ends_with(format!("set-aside/released-{number}.segment")));
    assert_eq!(fs::read(&kept[0]).unwrap(), bytes);
}
