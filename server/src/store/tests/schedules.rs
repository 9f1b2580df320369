//! Backups that the server makes by itself: when, how many, and what happens when the disk does not do what it should.

use std::time::Duration;

use super::super::backup::erasures;
use super::super::backup::schedule::Turns;
use super::super::testing::{ManualClock, MemoryDisk, SeededEntropy, SyncSettings, SyncStore};
use super::super::*;
use super::crashes::commit_now;
use super::support::*;
use crate::ports::{BackupStats, Erased, Erasure};

const HOUR: Duration = Duration::from_secs(3600);

struct Scene {
    store: Arc<SyncStore>,
    clock: Arc<ManualClock>,
    disk: MemoryDisk,
    turns: Turns,
    figures: Arc<BackupFigures>,
}

fn plan() -> BackupPlan {
    BackupPlan {
        dir: "backups".into(),
        every: HOUR,
        keep: 3,
        keep_for: 100 * HOUR,
    }
}

impl Scene {
    fn new() -> Scene {
        let clock = Arc::new(ManualClock::new(1_700_000_000_000));
        let (store, _) = SyncStore::open(
            &MemoryDisk::new(),
            SyncSettings::default(),
            clock.clone(),
            Arc::new(SeededEntropy::new(3)),
        )
        .unwrap();
        commit_now(&store, vec![register(device_id(1), "ada")])
            .unwrap()
            .unwrap();
        let disk = MemoryDisk::new();
        let (turns, figures) = store.schedule(Arc::new(disk.clone()), plan());
        Scene {
            store: Arc::new(store),
            clock,
            disk,
            turns,
            figures,
        }
    }

    /// The server starts anew: what it knew in memory is gone.
    fn restart(&mut self) {
        let disk = Arc::new(self.disk.clone());
        (self.turns, self.figures) = self.store.schedule(disk, plan());
    }

    fn after(&mut self, time: Duration) {
        self.clock.advance(time);
        self.turns.turn();
    }

    fn backups(&self) -> Vec<String> {
        let names = self.disk.names().into_iter();
        names.filter(|name| name != "erasures").collect()
    }

    fn stats(&self) -> BackupStats {
        self.figures.stats(false)
    }

    fn revoke(&self, n: u64) {
        revoke(&self.store, n);
    }

    fn erased(&self) -> (Vec<Erased>, u64) {
        erased(&self.disk)
    }
}

fn revoke(store: &SyncStore, n: u64) {
    let erasure = Erasure {
        app: AppId::DEFAULT,
        what: Erased::Device(device_id(n)),
        at_ms: 5,
        until_ms: 1_800_000_000_000,
    };
    commit_now(store, vec![Op::Erase(erasure)])
        .unwrap()
        .unwrap();
}

fn erased(disk: &MemoryDisk) -> (Vec<Erased>, u64) {
    let mut found = Vec::new();
    let file = disk.open(erasures::FILE).unwrap();
    let held = erasures::read(&*file, &mut |erasure| found.push(erasure.what)).unwrap();
    found.sort_unstable();
    (found, held.damaged)
}

#[test]
fn backups_are_made_in_time_and_the_oldest_go() {
    let mut scene = Scene::new();
    scene.turns.turn();
    let first = scene.backups();
    assert_eq!(first.len(), 1);
    scene.after(HOUR / 2);
    assert_eq!(scene.backups(), first);
    for made in 2..=5 {
        scene.after(HOUR);
        assert_eq!(scene.backups().len(), made.min(3));
        assert_eq!(scene.stats().kept, made.min(3) as u64);
    }
    assert!(!scene.backups().contains(&first[0]));
    let stats = scene.stats();
    assert_eq!((stats.failures, stats.trouble), (0, None));
    assert!(stats.last_ms > 1_700_000_000_000 && stats.due_ms > stats.last_ms);
}

#[test]
fn a_start_waits_for_the_rest_of_the_time_and_catches_up_when_it_has_passed() {
    let mut scene = Scene::new();
    scene.turns.turn();
    scene.after(HOUR / 4);
    scene.restart();
    scene.turns.turn();
    assert_eq!(scene.backups().len(), 1, "not due yet");
    assert!(scene.stats().last_ms > 0, "the last one is known");
    scene.after(HOUR / 2);
    assert_eq!(scene.backups().len(), 1, "not due yet");
    scene.after(HOUR / 4);
    assert_eq!(scene.backups().len(), 2);
    scene.clock.advance(10 * HOUR);
    scene.restart();
    scene.turns.turn();
    assert_eq!(scene.backups().len(), 3, "missed while it was down");
}

#[test]
fn only_proved_backups_of_this_store_are_counted_and_removed() {
    let mut scene = Scene::new();
    let put = |name: &str, bytes: &[u8]| {
        let file = scene.disk.create(name).unwrap();
        file.write_at(bytes, 0).unwrap();
    };
    // Of another store, no backup at all, and what a killed run of ours left.
    put("bellwire-other.backup", &super::backups::a_backup());
    put("letter.backup", b"dear operator");
    let mut by_hand = Vec::new();
    let go_on = |_: &crate::ports::BackupProgress| std::ops::ControlFlow::Continue(());
    scene.store.backup(&mut by_hand, &go_on).unwrap();
    put("by-hand.backup", &by_hand);
    scene.turns.turn();
    let ours = scene.backups().into_iter().find(|name| {
        name.starts_with("bellwire-") && name.ends_with("Z.backup") && !name.contains("other")
    });
    let prefix = ours.unwrap()[..18].to_owned();
    let file = scene.disk.create(&format!("{prefix}x.backup.partial"));
    file.unwrap().write_at(b"half", 0).unwrap();
    for _ in 0..6 {
        scene.after(HOUR);
    }
    let names = scene.backups();
    assert_eq!(names.len(), 3 + 3, "{names:?}");
    assert!(names.contains(&"bellwire-other.backup".to_owned()));
    assert!(names.contains(&"letter.backup".to_owned()));
    assert!(names.contains(&"by-hand.backup".to_owned()));
    assert!(!names.iter().any(|name| name.ends_with(".partial")));
}

#[test]
fn a_backup_that_fails_is_told_tried_again_and_costs_no_older_one() {
    let mut scene = Scene::new();
    for _ in 0..3 {
        scene.after(HOUR);
    }
    let good = scene.backups();
    assert_eq!(good.len(), 3);
    // Less is free than the last one took.
    scene.disk.set_capacity(Some(scene.disk.used() + 100));
    scene.after(HOUR);
    assert_eq!(scene.backups(), good, "nothing half, nothing gone");
    assert_eq!(scene.stats().failures, 1);
    assert!(scene.stats().trouble.unwrap().contains("free"));
    scene.after(Duration::from_secs(61));
    assert_eq!(scene.stats().failures, 2, "after a minute");
    scene.after(Duration::from_secs(61));
    assert_eq!(scene.stats().failures, 2, "then after two");
    scene.disk.set_capacity(None);
    scene.disk.fail_sync_in(0);
    scene.after(Duration::from_secs(61));
    assert_eq!(scene.stats().failures, 3);
    assert_eq!(scene.backups(), good);
    scene.after(HOUR);
    assert_eq!(scene.backups().len(), 3);
    assert_ne!(scene.backups(), good);
    assert_eq!(scene.stats().trouble, None);
}

#[test]
fn what_is_erased_is_noted_beside_the_backups() {
    let mut scene = Scene::new();
    scene.revoke(1);
    scene.turns.turn();
    scene.revoke(2);
    scene.turns.turn();
    let devices = |range: std::ops::RangeInclusive<u64>| -> Vec<Erased> {
        range.map(|n| Erased::Device(device_id(n))).collect()
    };
    assert_eq!(scene.erased(), (devices(1..=2), 0));
    // Erased while the file could not be written.
    scene.disk.set_capacity(Some(scene.disk.used()));
    scene.revoke(3);
    scene.turns.turn();
    assert_eq!(scene.erased(), (devices(1..=2), 0));
    scene.disk.set_capacity(None);
    scene.turns.turn();
    assert_eq!(scene.erased(), (devices(1..=3), 0));
    // A rotten record costs itself only, and is made good from the store.
    assert!(scene.disk.flip(erasures::FILE, 64 + 30, 1));
    assert_eq!(scene.erased(), (devices(2..=3), 1));
    scene.restart();
    scene.turns.turn();
    assert_eq!(scene.erased(), (devices(1..=3), 1));
    // A torn record at the end is passed over.
    let file = scene.disk.open(erasures::FILE).unwrap();
    file.write_at(&[7; 20], file.length().unwrap()).unwrap();
    scene.restart();
    scene.revoke(4);
    scene.turns.turn();
    assert_eq!(scene.erased(), (devices(1..=4), 2));
}

/// A disk on which something else happens before a file is made or gets its name.
struct Meanwhile {
    disk: MemoryDisk,
    happens: Box<dyn Fn(&str) + Send + Sync>,
}

impl Disk for Meanwhile {
    fn make_dir(&self, name: &str) -> std::io::Result<()> {
        self.disk.make_dir(name)
    }

    fn create(&self, name: &str) -> std::io::Result<Box<dyn log::disk::DiskFile>> {
        (self.happens)(name);
        self.disk.create(name)
    }

    fn open(&self, name: &str) -> std::io::Result<Box<dyn log::disk::DiskFile>> {
        self.disk.open(name)
    }

    fn list(&self, dir: &str) -> std::io::Result<Vec<String>> {
        self.disk.list(dir)
    }

    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        (self.happens)(to);
        self.disk.rename(from, to)
    }

    fn remove(&self, name: &str) -> std::io::Result<()> {
        self.disk.remove(name)
    }

    fn sync_dir(&self, dir: &str) -> std::io::Result<()> {
        self.disk.sync_dir(dir)
    }

    fn free(&self) -> std::io::Result<u64> {
        self.disk.free()
    }
}

#[test]
fn what_is_erased_while_a_backup_is_made_is_noted_before_it_is_done() {
    let scene = Scene::new();
    scene.revoke(1);
    let noted = Arc::new(Mutex::new(Vec::new()));
    let (store, clock) = (Arc::clone(&scene.store), scene.clock.clone());
    let (beside, seen) = (scene.disk.clone(), Arc::clone(&noted));
    let disk = Meanwhile {
        disk: scene.disk.clone(),
        happens: Box::new(move |name| {
            if name.ends_with(".partial") {
                revoke(&store, 2);
                clock.advance(Duration::from_secs(1));
            } else if name.ends_with(".backup") {
                seen.lock().unwrap().push(erased(&beside));
            }
        }),
    };
    let (mut turns, _) = scene.store.schedule(Arc::new(disk), plan());
    turns.turn();
    let both = [1, 2].map(|n| Erased::Device(device_id(n))).to_vec();
    assert_eq!(*noted.lock().unwrap(), [(both, 0)]);
}

#[test]
fn of_two_erasures_of_one_notification_the_later_one_is_noted() {
    let mut scene = Scene::new();
    let what = Erased::Notification(ping_id(1), device_id(1));
    let erase = |scene: &Scene, at_ms, until_ms| {
        let erasure = Erasure {
            app: AppId::DEFAULT,
            what,
            at_ms,
            until_ms,
        };
        commit_now(&scene.store, vec![Op::Erase(erasure)])
            .unwrap()
            .unwrap();
    };
    erase(&scene, 5, 1_800_000_000_000);
    scene.turns.turn();
    // While nobody mirrors.
    erase(&scene, 7, 1_800_000_000_001);
    scene.restart();
    scene.turns.turn();
    let file = scene.disk.open(erasures::FILE).unwrap();
    let mut latest = 0;
    erasures::read(&*file, &mut |erasure| latest = latest.max(erasure.at_ms)).unwrap();
    assert_eq!(latest, 7);
}

#[test]
fn a_file_of_erasures_that_has_grown_old_is_written_anew() {
    let mut scene = Scene::new();
    for n in 0..2_000 {
        let until_ms = if n % 4 == 0 {
            u64::MAX
        } else {
            1_700_000_000_001
        };
        let erasure = Erasure {
            app: AppId::DEFAULT,
            what: Erased::Device(device_id(n)),
            at_ms: 5,
            until_ms,
        };
        commit_now(&scene.store, vec![Op::Erase(erasure)])
            .unwrap()
            .unwrap();
    }
    scene.turns.turn();
    assert_eq!(scene.erased().0.len(), 2_000);
    scene.clock.advance(HOUR);
    let dropped = scene.store.drop_receipts(0, 10_000).unwrap();
    assert_eq!(dropped, 1_500, "the store forgets them as well");
    scene.restart();
    scene.turns.turn();
    assert_eq!(
        scene.erased(),
        (
            (0..2_000)
                .step_by(4)
                .map(|n| Erased::Device(device_id(n)))
                .collect(),
            0
        )
    );
}

#[test]
fn backups_go_by_age_as_well_but_never_the_newest_one() {
    let mut scene = Scene::new();
    let plan = BackupPlan {
        keep: 100,
        keep_for: 3 * HOUR,
        ..plan()
    };
    let disk = Arc::new(scene.disk.clone());
    (scene.turns, scene.figures) = scene.store.schedule(disk, plan);
    scene.turns.turn();
    for _ in 0..8 {
        scene.after(HOUR);
    }
    // Those of now, of one, two and three hours ago.
    assert_eq!(scene.backups().len(), 4);
    assert_eq!(scene.stats().kept, 4);
    // None could be made for a week: what is there is old, and stays until there is a newer one.
    let old = scene.backups();
    scene.disk.set_capacity(Some(scene.disk.used()));
    scene.after(200 * HOUR);
    assert_eq!(scene.backups(), old);
    scene.disk.set_capacity(None);
    scene.after(HOUR);
    assert_eq!(scene.backups().len(), 1);
    assert!(!old.contains(&scene.backups()[0]));
}

/// A disk from which no backup can be removed.
struct Sticky(MemoryDisk);

impl Disk for Sticky {
    fn make_dir(&self, name: &str) -> std::io::Result<()> {
        self.0.make_dir(name)
    }

    fn create(&self, name: &str) -> std::io::Result<Box<dyn log::disk::DiskFile>> {
        self.0.create(name)
    }

    fn open(&self, name: &str) -> std::io::Result<Box<dyn log::disk::DiskFile>> {
        self.0.open(name)
    }

    fn list(&self, dir: &str) -> std::io::Result<Vec<String>> {
        self.0.list(dir)
    }

    fn rename(&self, from: &str, to: &str) -> std::io::Result<()> {
        self.0.rename(from, to)
    }

    fn remove(&self, _: &str) -> std::io::Result<()> {
        Err(std::io::Error::from(std::io::ErrorKind::PermissionDenied))
    }

    fn sync_dir(&self, dir: &str) -> std::io::Result<()> {
        self.0.sync_dir(dir)
    }

    fn free(&self) -> std::io::Result<u64> {
        self.0.free()
    }
}

#[test]
fn an_old_backup_that_cannot_be_removed_is_told_and_the_new_one_counts() {
    let mut scene = Scene::new();
    let sticky = Arc::new(Sticky(scene.disk.clone()));
    (scene.turns, scene.figures) = scene.store.schedule(sticky, plan());
    scene.turns.turn();
    for made in 2..=5 {
        scene.after(HOUR);
        assert_eq!(
            scene.backups().len(),
            made,
            "one each hour, not one a minute"
        );
        scene.after(Duration::from_secs(61));
        assert_eq!(scene.backups().len(), made);
    }
    let stats = scene.stats();
    assert_eq!((stats.failures, stats.kept), (0, 5));
    assert!(stats.trouble.unwrap().contains("could not be removed"));
}

#[test]
fn a_backup_gives_way_when_the_log_that_it_keeps_takes_the_last_room() {
    let scene = Scene::new();
    let go_on = |_: &crate::ports::BackupProgress| std::ops::ControlFlow::Continue(());
    let full = |full| {
        let keeper = scene.store.keeper();
        keeper.room.full.store(full, Ordering::Relaxed);
    };
    full(true);
    let refused = scene.store.backup(&mut Vec::new(), &go_on);
    assert!(matches!(refused, Err(BackupError::NoRoom)));
    full(false);
    assert!(scene.store.backup(&mut Vec::new(), &go_on).is_ok());
}
