//! Restores: into any engine, beside or in place of an old store, and without what was erased since.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use bellwire_faultfs::{Fault, FaultFs, Op as Call, Options};

use super::super::backup::{
    Applied, Contents, Restore, RestoreError, Restored, UserHash, restore, verify,
};
use super::super::testing::{ManualClock, SeededEntropy};
use super::super::*;
use super::support::*;
use crate::delivery::Outcome;
use crate::ports::{Audience, Erased, Erasure, ExpansionProgress, ExpansionRecord, Scopes, Stamp};

const NOW: u64 = 1_700_000_000_000;
const DAY: u64 = 86_400_000;

fn clock() -> Arc<ManualClock> {
    Arc::new(ManualClock::new(NOW))
}

fn api_key(n: u8) -> KeyRecord {
    KeyRecord {
        id: [n; 10],
        app: AppId::DEFAULT,
        scopes: Scopes::ALL,
        name: "job".to_owned(),
        created_ms: 5,
        secret_hash: [6; 32],
    }
}

fn erase(what: Erased) -> Op {
    Op::Erase(Erasure {
        app: AppId::DEFAULT,
        what,
        at_ms: NOW,
        until_ms: NOW + 400 * DAY,
    })
}

fn note(n: u64) -> Arc<Notification> {
    notification(ping_id(n), |note| note.expires_ms = NOW + 7 * DAY)
}

/// Three devices of two users with a notification of the same ping each, two keys.
fn fill(store: &dyn Store) {
    for n in 1..=3 {
        commit(
            store,
            vec![
                register(device_id(n), if n == 3 { "bob" } else { "ada" }),
                insert(device_id(n), 1, &note(7)),
                summary(device_id(n), 1, 5, 2),
            ],
        )
        .unwrap();
    }
    let keys = [1, 2].map(|n| Op::PutKey(api_key(n)));
    commit(store, keys.to_vec()).unwrap();
}

fn back_up(store: &dyn Store, path: &Path) {
    let mut file = File::create(path).unwrap();
    store
        .backup(&mut file, &|_| std::ops::ControlFlow::Continue(()))
        .unwrap();
    verify(&mut File::open(path).unwrap(), &mut |_| {}).unwrap();
}

/// As the runtime does it: the mailbox first, then the device with its erasure.
fn revoke_device(store: &dyn Store, n: u64) {
    let wipe = vec![
        remove(device_id(n), 1, &note(7), Outcome::Revoked, NOW),
        Op::Mailbox(crate::delivery::Change::Forget {
            device: device_id(n),
        }),
    ];
    commit(store, wipe).unwrap();
    let record = store.device(device_id(n)).unwrap().unwrap();
    commit(
        store,
        vec![Op::DropDevice(record), erase(Erased::Device(device_id(n)))],
    )
    .unwrap();
}

/// Device 1, key 1 and the notification of device 2.
fn erase_some(store: &dyn Store) {
    revoke_device(store, 1);
    let key = api_key(1).id;
    commit(
        store,
        vec![Op::DropKey(AppId::DEFAULT, key), erase(Erased::Key(key))],
    )
    .unwrap();
    commit(
        store,
        vec![
            remove(device_id(2), 1, &note(7), Outcome::Revoked, NOW),
            summary(device_id(2), 0, 0, 2),
        ],
    )
    .unwrap();
}

fn restored(
    from: &Path,
    dir: &Path,
    engine: EngineKind,
    change: impl FnOnce(&mut Restore<'_>),
) -> Result<Restored, RestoreError> {
    let mut progress = |_, _, _| {};
    let mut request = Restore {
        from,
        settings: settings(dir, engine),
        replace: false,
        erasures: Vec::new(),
        check: &|_| Ok(()),
        user_hash: None,
        clock: clock(),
        entropy: Arc::new(SeededEntropy::new(77)),
        progress: &mut progress,
    };
    change(&mut request);
    restore(request)
}

fn check_erased(dir: &Path, engine: EngineKind) {
    let opened = open_at(dir, engine);
    assert_eq!(opened.report.rebuilt, None);
    assert!(opened.report.set_aside.is_empty());
    let store = opened.store;
    assert!(store.device(device_id(1)).unwrap().is_none());
    assert!(
        store
            .read_mailbox(&everything(device_id(1)))
            .unwrap()
            .summary
            .is_none()
    );
    assert!(store.key(api_key(1).id).unwrap().is_none());
    assert!(store.key(api_key(2).id).unwrap().is_some());
    let second = store.read_mailbox(&everything(device_id(2))).unwrap();
    assert_eq!((second.rows.len(), second.summary.unwrap().count), (0, 0));
    let third = store.read_mailbox(&everything(device_id(3))).unwrap();
    assert_eq!((third.rows.len(), third.summary.unwrap().count), (1, 1));
    assert!(third.rows[0].run < opened.report.run);
}

const ERASED: Applied = Applied {
    devices: 1,
    keys: 1,
    notifications: 1,
};

#[test]
fn a_restore_in_place_keeps_what_was_erased_since_and_the_old_store() {
    for engine in [EngineKind::Memory, EngineKind::Sled, EngineKind::Fjall] {
        let place = tempfile::tempdir().unwrap();
        let (dir, file) = (place.path().join("data"), place.path().join("b.backup"));
        let opened = open_at(&dir, EngineKind::Sled);
        fill(&*opened.store);
        back_up(&*opened.store, &file);
        erase_some(&*opened.store);
        commit(&*opened.store, vec![register(device_id(9), "eve")]).unwrap();
        let run = opened.report.run;
        drop(opened);
        fs::write(dir.join("hash.key"), "kept").unwrap();
        let refused = restored(&file, &dir, engine, |_| {}).unwrap_err();
        assert!(matches!(refused, RestoreError::Occupied(_)), "{refused}");
        let done = restored(&file, &dir, engine, |request| request.replace = true).unwrap();
        assert_eq!(done.applied, ERASED);
        let left = Contents {
            apps: 0,
            devices: 2,
            keys: 1,
            waiting: 1,
        };
        assert_eq!(done.contents, left);
        assert_ne!(done.store, done.backup.store);
        assert_eq!(fs::read_to_string(dir.join("hash.key")).unwrap(), "kept");
        check_erased(&dir, engine);
        let again = open_at(&dir, engine);
        assert!(again.report.run > run + 900);
        assert!(again.store.device(device_id(9)).unwrap().is_none());
        drop(again);
        // The old store is whole, and can be started on.
        let old = open_at(&done.replaced.unwrap(), EngineKind::Sled);
        assert!(old.store.device(device_id(9)).unwrap().is_some());
    }
}

#[test]
fn erasures_are_taken_from_newer_backups_and_damaged_stores() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let opened = open_at(&at("data"), EngineKind::Sled);
    fill(&*opened.store);
    back_up(&*opened.store, &at("old"));
    erase_some(&*opened.store);
    back_up(&*opened.store, &at("new"));
    drop(opened);
    let done = restored(&at("old"), &at("plain"), EngineKind::Memory, |_| {}).unwrap();
    assert_eq!(done.applied, Applied::default());
    assert!(done.sources.is_empty());
    let done = restored(
        &at("old"),
        &at("by-backup"),
        EngineKind::Memory,
        |request| {
            request.erasures = vec![at("new")];
        },
    )
    .unwrap();
    assert_eq!((done.applied, done.sources[0].found), (ERASED, 4));
    check_erased(&at("by-backup"), EngineKind::Memory);
    // The first frames rot, the format is lost, and so is the engine.
    let mut log = fs::read(at("data/log/0000000001.seg")).unwrap();
    log[64 + 20] ^= 1;
    fs::write(at("data/log/0000000001.seg"), log).unwrap();
    fs::remove_file(at("data/format")).unwrap();
    let done = restored(&at("old"), &at("by-wreck"), EngineKind::Memory, |request| {
        request.erasures = vec![at("data")];
    })
    .unwrap();
    assert_eq!(done.applied, ERASED);
    assert!(done.sources[0].trouble.is_some());
    check_erased(&at("by-wreck"), EngineKind::Memory);
    // What is erased stays known, so that a further restore keeps it as well.
    let done = restored(&at("old"), &at("further"), EngineKind::Memory, |request| {
        request.erasures = vec![at("by-wreck")];
    })
    .unwrap();
    assert_eq!(done.applied, ERASED);
    let nothing = restored(&at("old"), &at("nothing"), EngineKind::Memory, |request| {
        request.erasures = vec![at("data/lock")];
    });
    assert!(matches!(nothing, Err(RestoreError::Erasures { .. })));
}

#[test]
fn what_was_accepted_again_after_it_was_revoked_stays() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let opened = open_at(&at("data"), EngineKind::Memory);
    let sent = |accepted_ms| {
        notification(ping_id(7), |note| {
            note.accepted_ms = accepted_ms;
            note.expires_ms = NOW + 7 * DAY;
        })
    };
    let revoked = |n, accepted_ms, at_ms| {
        let gone = Erased::Notification(ping_id(7), device_id(n));
        let erasure = Erasure {
            app: AppId::DEFAULT,
            what: gone,
            at_ms,
            // Each of them lasts as long as what it erased.
            until_ms: NOW + 7 * DAY + at_ms % 10,
        };
        let batch = vec![
            remove(device_id(n), 1, &sent(accepted_ms), Outcome::Revoked, at_ms),
            Op::Erase(erasure),
        ];
        commit(&*opened.store, batch).unwrap();
    };
    let accept = |n, order, accepted_ms| {
        let batch = vec![
            insert(device_id(n), order, &sent(accepted_ms)),
            summary(device_id(n), 1, 5, order + 1),
        ];
        commit(&*opened.store, batch).unwrap();
    };
    for n in 1..=2 {
        commit(&*opened.store, vec![register(device_id(n), "ada")]).unwrap();
        accept(n, 1, NOW - 10);
        revoked(n, NOW - 10, NOW - 8);
        accept(n, 2, NOW - 5);
    }
    back_up(&*opened.store, &at("backup"));
    // That of the second device goes as well, in the end.
    revoked(2, NOW - 5, NOW - 3);
    drop(opened);
    let done = restored(&at("backup"), &at("new"), EngineKind::Memory, |request| {
        request.erasures = vec![at("data")];
    })
    .unwrap();
    assert_eq!((done.applied.notifications, done.contents.waiting), (1, 1));
    let store = open_at(&at("new"), EngineKind::Memory).store;
    let first = store.read_mailbox(&everything(device_id(1))).unwrap();
    assert_eq!((first.rows.len(), first.summary.unwrap().count), (1, 1));
}

#[test]
fn a_ping_on_its_way_goes_on_from_where_the_backup_saw_it_and_one_that_was_revoked_since_does_not()
{
    for engine in [EngineKind::Memory, EngineKind::Sled, EngineKind::Fjall] {
        let place = tempfile::tempdir().unwrap();
        let (dir, file) = (place.path().join("data"), place.path().join("b.backup"));
        let opened = open_at(&dir, EngineKind::Sled);
        let store = &*opened.store;
        fill(store);
        let app = AppId::DEFAULT;
        let stamp = |count| Stamp { run: 1, count };
        let progress = ExpansionProgress {
            done: Some(device_id(2)),
            devices: 2,
            unknown: 1,
            chunk: 1,
        };
        // Two lists of three chunks; a page of each is through.
        for (count, n) in [(10, 70), (11, 71)] {
            let record = ExpansionRecord {
                stamp: stamp(count),
                audience: Audience::Listed {
                    chunks: 3,
                    devices: 3,
                },
                estimate: 3,
                notification: notification(ping_id(n), |note| {
                    note.shared = true;
                    note.expires_ms = NOW + 7 * DAY;
                }),
            };
            let chunks = (0..3).map(|number| Op::PutChunk {
                app,
                stamp: stamp(count),
                number,
                devices: [device_id(u64::from(number) + 1)].into(),
            });
            let mut batch: Vec<Op> = chunks.collect();
            batch.push(Op::PutExpansion(record));
            commit(store, batch).unwrap();
            let through = Op::PutProgress {
                app,
                stamp: stamp(count),
                progress,
                done: 0..1,
            };
            commit(store, vec![through]).unwrap();
        }
        back_up(store, &file);
        // Afterwards the first is taken back, and the second reaches everybody.
        let ended = |count| Op::DropExpansion {
            app,
            stamp: stamp(count),
            chunks: 1..3,
        };
        commit(
            store,
            vec![ended(10), erase(Erased::Expansion(ping_id(70)))],
        )
        .unwrap();
        // Of the second, what waited for a device without a row was revoked with a change of hands.
        let revoked = Op::Mailbox(crate::delivery::Change::Outcome {
            app,
            device: device_id(3),
            ping: ping_id(71),
            outcome: Outcome::Revoked,
            at_ms: NOW + 5,
            expires_ms: NOW + 7 * DAY,
        });
        commit(store, vec![revoked]).unwrap();
        commit(store, vec![ended(11)]).unwrap();
        drop(opened);

        restored(&file, &dir, engine, |request| request.replace = true).unwrap();
        let again = open_at(&dir, engine).store;
        let open = again.expansions(None, 10).unwrap().items;
        assert_eq!(open.len(), 1, "{engine:?}");
        assert_eq!(open[0].record.notification.ping, ping_id(71));
        assert_eq!(open[0].progress, progress);
        let chunk = |count, number| again.chunk(app, stamp(count), number).unwrap();
        assert_eq!(chunk(11, 1), [device_id(2)]);
        assert_eq!(chunk(11, 2), [device_id(3)]);
        for number in 0..3 {
            assert!(chunk(10, number).is_empty(), "{number}");
        }
        let known = again.pairs(ping_id(71), None, 10).unwrap().items;
        let ended = PairState::Ended {
            outcome: Outcome::Revoked,
            at_ms: NOW + 5,
        };
        assert_eq!(known, [(app, device_id(3), ended)], "{engine:?}");
    }
}

#[test]
fn an_erased_user_stays_erased_without_being_named() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let hash: UserHash<'_> = &|_, user| {
        let mut hash = [0; 32];
        hash[..user.len()].copy_from_slice(user.as_bytes());
        hash.reverse();
        hash
    };
    let opened = open_at(&at("data"), EngineKind::Memory);
    fill(&*opened.store);
    back_up(&*opened.store, &at("old"));
    let gone = Erased::User(hash(AppId::DEFAULT, "ada"));
    commit(&*opened.store, vec![erase(gone)]).unwrap();
    back_up(&*opened.store, &at("new"));
    let done = restored(&at("old"), &at("next"), EngineKind::Memory, |request| {
        request.erasures = vec![at("new")];
        request.user_hash = Some(hash);
    })
    .unwrap();
    assert_eq!(done.applied.devices, 2);
    assert_eq!((done.contents.devices, done.contents.waiting), (1, 1));
}

#[test]
fn a_damaged_backup_or_a_foreign_directory_changes_nothing() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let opened = open_at(&at("data"), EngineKind::Memory);
    fill(&*opened.store);
    back_up(&*opened.store, &at("old"));
    drop(opened);
    let mut bytes = fs::read(at("old")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    fs::write(at("bad"), bytes).unwrap();
    let before = fs::read_dir(at("data")).unwrap().count();
    let refused = restored(&at("bad"), &at("data"), EngineKind::Memory, |request| {
        request.replace = true;
    });
    assert!(matches!(refused, Err(RestoreError::Backup { .. })));
    assert_eq!(fs::read_dir(at("data")).unwrap().count(), before);
    assert!(
        open_at(&at("data"), EngineKind::Memory)
            .store
            .device(device_id(1))
            .unwrap()
            .is_some()
    );
    fs::create_dir(at("mine")).unwrap();
    fs::write(at("mine/letter.txt"), "x").unwrap();
    let refused = restored(&at("old"), &at("mine"), EngineKind::Memory, |request| {
        request.replace = true;
    });
    assert!(matches!(refused, Err(RestoreError::Strange { .. })));
}

#[test]
fn a_restore_that_was_cut_off_refuses_a_start_and_is_done_again() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let opened = open_at(&at("data"), EngineKind::Memory);
    fill(&*opened.store);
    back_up(&*opened.store, &at("old"));
    erase_some(&*opened.store);
    drop(opened);
    let done = restored(&at("old"), &at("data"), EngineKind::Memory, |request| {
        request.replace = true;
    })
    .unwrap();
    // As if the machine had gone down before the last rename: the new `format` is not in its place yet.
    let aside = done.replaced.unwrap();
    fs::write(at("data/format"), "bellwire-restore under way\n").unwrap();
    fs::create_dir(at("data/restoring")).unwrap();
    fs::write(at("data/restoring/half"), "x").unwrap();
    let refused = open(
        &settings(&at("data"), EngineKind::Memory),
        clock(),
        Arc::new(SeededEntropy::new(9)),
    );
    assert!(matches!(refused.err(), Some(OpenError::Restoring(_))));
    let done = restored(&at("old"), &at("data"), EngineKind::Memory, |request| {
        request.replace = true;
    })
    .unwrap();
    assert_eq!(done.applied, ERASED);
    assert!(done.sources.iter().any(|source| source.path == aside));
    check_erased(&at("data"), EngineKind::Memory);
}

/// A restore in place on a disk that does not keep still: the old store, the backup and the new one are the ones of the other
/// tests.
struct Moving {
    disk: FaultFs,
    backup: tempfile::TempDir,
}

impl Moving {
    fn new() -> Moving {
        let moving = Moving {
            disk: FaultFs::new(&Options::default()).unwrap(),
            backup: tempfile::tempdir().unwrap(),
        };
        let opened = moving.open().unwrap();
        fill(&*opened.store);
        back_up(&*opened.store, &moving.file());
        erase_some(&*opened.store);
        commit(&*opened.store, vec![register(device_id(9), "eve")]).unwrap();
        opened.store.close();
        drop(opened);
        moving.disk.settle();
        moving
    }

    fn file(&self) -> PathBuf {
        self.backup.path().join("old.backup")
    }

    fn data(&self) -> PathBuf {
        self.disk.path().join("data")
    }

    fn settings(&self) -> StoreSettings {
        StoreSettings {
            trust_file_system: true,
            segment_bytes: 16 << 10,
            ..settings(&self.data(), EngineKind::Memory)
        }
    }

    fn open(&self) -> Result<Opened, OpenError> {
        let entropy = Arc::new(SeededEntropy::new(9));
        open(&self.settings(), clock(), entropy)
    }

    fn restore(&self) -> Result<Restored, RestoreError> {
        restored(&self.file(), &self.data(), EngineKind::Memory, |request| {
            request.replace = true;
            request.settings = self.settings();
        })
    }
}

#[test]
fn a_restore_cut_by_a_loss_of_power_anywhere_leaves_one_store_or_a_refusal_and_is_done_again() {
    let quiet = Moving::new();
    let before = quiet.disk.counters();
    quiet.restore().unwrap();
    let after = quiet.disk.counters();
    let (mut cuts, mut refused, mut old) = (0, 0, 0);
    for call in Call::ALL {
        let count = after.of(call) - before.of(call);
        let step = (count / 6).max(1);
        for at in (0..count).step_by(usize::try_from(step).unwrap()) {
            let moving = Moving::new();
            moving.disk.fail(Fault::power_cut(call, at + 1).after(at));
            let done = moving.restore();
            if done.is_ok() {
                // The moment did not come: threads take turns as they like.
                continue;
            }
            cuts += 1;
            moving.disk.power_on().unwrap();
            moving.disk.clear_faults();
            match moving.open() {
                Ok(opened) => {
                    let store = opened.store;
                    let is_old = store.device(device_id(9)).unwrap().is_some();
                    let is_new = store.device(device_id(3)).unwrap().is_some() && !is_old;
                    assert!(is_old || is_new, "{call:?} {at}: neither");
                    assert!(
                        store.device(device_id(1)).unwrap().is_none(),
                        "{call:?} {at}: what was erased is back"
                    );
                    old += u64::from(is_old);
                }
                Err(OpenError::Restoring(_)) => refused += 1,
                Err(error) => panic!("{call:?} {at}: {error}"),
            }
            let done = moving.restore().unwrap();
            assert!(!done.sources.is_empty());
            check_restored(&moving);
        }
    }
    assert!(
        cuts > 20 && refused > 0 && old > 0,
        "{cuts} {refused} {old}"
    );
}

#[test]
fn a_restore_that_finds_no_room_says_so_and_leaves_nothing_behind() {
    let moving = Moving::new();
    let mut failed = 0;
    for pages in (0..).step_by(2) {
        let room = moving.disk.used() + (pages << 12);
        moving.disk.set_capacity(Some(room));
        let Err(error) = moving.restore() else {
            break;
        };
        failed += 1;
        let error = error.to_string();
        let told = error.contains("no room") || error.contains("No space");
        assert!(told, "{pages}: {error}");
        let left: Vec<_> = fs::read_dir(moving.data())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("re"))
            .collect();
        assert!(left.is_empty(), "{pages}: {left:?}");
        moving.disk.set_capacity(None);
        let opened = moving.open().unwrap();
        assert!(
            opened.store.device(device_id(9)).unwrap().is_some(),
            "the old store is as it was"
        );
    }
    assert!(failed > 3);
    moving.disk.set_capacity(None);
    check_restored(&moving);
}

fn check_restored(moving: &Moving) {
    let opened = moving.open().unwrap();
    let there = |n| opened.store.device(device_id(n)).unwrap().is_some();
    assert_eq!((there(1), there(3), there(9)), (false, true, false));
}

#[test]
fn a_directory_with_half_a_restore_is_not_begun_as_an_empty_store() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("data");
    fs::create_dir_all(dir.join("restoring/log")).unwrap();
    let refused = open(
        &settings(&dir, EngineKind::Memory),
        clock(),
        Arc::new(SeededEntropy::new(9)),
    );
    assert!(matches!(refused.err(), Some(OpenError::Restoring(_))));
    assert!(!dir.join("format").exists());
}

#[test]
fn a_store_is_opened_with_the_hash_key_that_it_was_begun_with_also_after_a_restore() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| -> PathBuf { place.path().join(name) };
    let with = |dir: &Path, mark: [u8; 32]| {
        let settings = StoreSettings {
            key_mark: mark,
            ..settings(dir, EngineKind::Memory)
        };
        open(&settings, clock(), Arc::new(SeededEntropy::new(9)))
    };
    let (ours, theirs) = ([1; 32], [2; 32]);
    // Begun before the key was noted, by a tool that does not know it.
    drop(open_at(&at("data"), EngineKind::Memory));
    let opened = with(&at("data"), ours).unwrap();
    fill(&*opened.store);
    back_up(&*opened.store, &at("b.backup"));
    drop(opened);
    assert!(matches!(
        with(&at("data"), theirs).err(),
        Some(OpenError::HashKey)
    ));
    restored(&at("b.backup"), &at("new"), EngineKind::Memory, |_| {}).unwrap();
    for dir in ["data", "new"] {
        assert!(matches!(
            with(&at(dir), theirs).err(),
            Some(OpenError::HashKey)
        ));
        assert!(with(&at(dir), ours).is_ok());
    }
}

#[test]
fn what_belongs_to_the_volume_is_no_reason_to_refuse() {
    let place = tempfile::tempdir().unwrap();
    let (data, file, new) = (
        place.path().join("data"),
        place.path().join("b.backup"),
        place.path().join("new"),
    );
    let opened = open_at(&data, EngineKind::Memory);
    fill(&*opened.store);
    back_up(&*opened.store, &file);
    fs::create_dir_all(new.join("lost+found")).unwrap();
    restored(&file, &new, EngineKind::Memory, |_| {}).unwrap();
    assert!(new.join("lost+found").is_dir());
}
