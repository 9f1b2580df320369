//! What is said about a data directory, and that looking at it changes nothing.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::examine::{EngineState, Holder, Inspect, Inspection, Plan, inspect};
use super::super::*;
use super::files::Shop;

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
