//! What survives, against the plainest words for it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use super::*;

fn name(text: &str) -> &OsStr {
    OsStr::new(text)
}

struct Disk(State);

impl Disk {
    fn new(names: Names) -> Disk {
        Disk(State::new(names, None))
    }

    fn create(&mut self, dir: u64, text: &str) -> u64 {
        let meta = Meta::new(0o600, 0, 0);
        self.0.make(dir, name(text), false, meta, true).unwrap().ino
    }

    fn make_dir(&mut self, text: &str) -> u64 {
        let meta = Meta::new(0o700, 0, 0);
        self.0
            .make(ROOT, name(text), true, meta, false)
            .unwrap()
            .ino
    }

    fn write(&mut self, ino: u64, offset: u64, data: &[u8]) {
        assert_eq!(self.0.write(ino, offset, data, false), Ok(data.len()));
    }

    fn bytes(&mut self, ino: u64) -> Vec<u8> {
        self.0.read(ino, 0, u64::MAX).unwrap()
    }

    fn names(&self, dir: u64) -> Vec<String> {
        let list = self.0.list(dir).unwrap();
        list[2..]
            .iter()
            .map(|(_, _, name)| name.to_string_lossy().into_owned())
            .collect()
    }

    fn has(&self, dir: u64, text: &str) -> bool {
        self.names(dir).iter().any(|name| name == text)
    }

    fn after_cut(&self, seed: u64) -> Disk {
        let mut state = self.0.clone();
        state.cut(seed);
        Disk(state)
    }
}

/// Whatever was written, each sector is found as it was at some moment since the last sync, and the length is one of those
/// since then.
#[test]
fn every_sector_is_of_some_moment_since_the_last_sync() {
    let mut seen = BTreeMap::<&str, u32>::new();
    for seed in 0..1_500u64 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut disk = Disk::new(Names::Strict);
        let file = disk.create(ROOT, "file");
        disk.0.sync_dir(ROOT).unwrap();
        // What a reader would have seen, at each moment since the last sync.
        let mut moments: Vec<Vec<u8>> = vec![Vec::new()];
        for step in 0..rng.random_range(1..20u64) {
            match rng.random_range(0..10) {
                0 => {
                    disk.0.sync(file).unwrap();
                    moments = vec![disk.bytes(file)];
                }
                1 => {
                    let size = rng.random_range(0..6_000);
                    disk.0.truncate(file, size).unwrap();
                }
                2 => {
                    let from = rng.random_range(0..6_000);
                    disk.0.allocate(file, from, 1_000, false).unwrap();
                }
                _ => {
                    let data = vec![step as u8 + 1; rng.random_range(1..2_000)];
                    disk.write(file, rng.random_range(0..6_000), &data);
                }
            }
            moments.push(disk.bytes(file));
        }
        let mut after = disk.after_cut(seed);
        let found = after.bytes(file);
        assert!(
            moments.iter().any(|moment| moment.len() == found.len()),
            "seed {seed}: a length that never was"
        );
        for at in (0..found.len()).step_by(512) {
            let sector = &found[at..found.len().min(at + 512)];
            // Behind an earlier end, and in what was cut off, there are zeros.
            let was = moments.iter().any(|moment| {
                let mut then = moment.get(at..).unwrap_or_default().to_vec();
                then.resize(sector.len(), 0);
                then == sector
            });
            let partly = sector.iter().rev().skip_while(|byte| **byte == 0).count();
            let cut_off = moments
                .iter()
                .any(|moment| moment.get(at..at + partly) == Some(&sector[..partly]));
            assert!(was || cut_off, "seed {seed}: sector at {at} never was so");
        }
        let what = match &found {
            all if Some(all) == moments.last() => "everything",
            none if Some(none) == moments.first() => "nothing",
            _ => "a part",
        };
        *seen.entry(what).or_default() += 1;
        assert_eq!(found, disk.after_cut(seed).bytes(file), "it repeats itself");
        assert!(after.0.unsynced().is_empty());
    }
    for what in ["everything", "nothing", "a part"] {
        assert!(seen.get(what).is_some_and(|times| *times > 50), "{seen:?}");
    }
}

#[test]
fn a_write_may_be_torn_and_two_may_be_found_in_the_other_order() {
    let mut disk = Disk::new(Names::Strict);
    let file = disk.create(ROOT, "file");
    disk.write(file, 0, &[1; 4_096]);
    disk.0.sync(file).unwrap();
    disk.0.sync_dir(ROOT).unwrap();
    disk.write(file, 0, &[2; 1_024]);
    disk.write(file, 1_024, &[3; 1_024]);
    let (mut torn, mut reversed, mut lost, mut kept) = (0, 0, 0, 0);
    for seed in 0..500 {
        let found = disk.after_cut(seed).bytes(file);
        assert_eq!(found.len(), 4_096);
        assert!(
            found[2_048..].iter().all(|byte| *byte == 1),
            "what was synced stays"
        );
        let sectors: Vec<u8> = found.chunks(512).map(|sector| sector[0]).collect();
        match &sectors[..4] {
            [2, 2, 3, 3] => kept += 1,
            [1, 1, 1, 1] => lost += 1,
            [1, 1, 3, 3] => reversed += 1,
            [first, second, ..] if first != second => torn += 1,
            _ => {}
        }
    }
    for times in [torn, reversed, lost, kept] {
        assert!(times > 20, "{torn} {reversed} {lost} {kept}");
    }
}

#[test]
fn two_writes_within_a_sector_are_found_in_order() {
    let mut disk = Disk::new(Names::Strict);
    let file = disk.create(ROOT, "file");
    disk.write(file, 0, &[1; 512]);
    disk.0.sync(file).unwrap();
    disk.0.sync_dir(ROOT).unwrap();
    disk.write(file, 0, &[2; 100]);
    disk.write(file, 100, &[3; 100]);
    for seed in 0..200 {
        let found = disk.after_cut(seed).bytes(file);
        if found[100] == 3 {
            assert_eq!(found[0], 2, "the sector was written with both");
        }
    }
}

#[test]
fn a_failed_sync_forgets_and_the_next_one_does_not_bring_it_back() {
    let mut missing = 0;
    for tries in 0..20u64 {
        let mut disk = Disk::new(Names::Strict);
        disk.0.failed_syncs = tries;
        let file = disk.create(ROOT, "file");
        disk.write(file, 0, &[1; 8_192]);
        disk.0.sync(file).unwrap();
        disk.0.sync_dir(ROOT).unwrap();
        disk.write(file, 0, &[2; 4_096]);
        disk.0.fail(Fault::new(Op::Sync, Errno::IO));
        assert_eq!(disk.0.sync(file), Err(Errno::IO));
        assert_eq!(disk.bytes(file)[..4_096], [2; 4_096], "readers see it");
        assert_eq!(disk.0.sync(file), Ok(()));
        disk.write(file, 4_096, &[3; 4_096]);
        assert_eq!(disk.0.sync(file), Ok(()));
        let found = disk.after_cut(1).bytes(file);
        assert_eq!(found[4_096..], [3; 4_096], "what is written anew is safe");
        missing += u32::from(found[..4_096] != [2; 4_096]);
    }
    assert!(missing > 5, "{missing}");
}

#[test]
fn a_liar_says_yes_and_keeps_nothing_safe() {
    let mut disk = Disk::new(Names::Strict);
    disk.0.set_liar(true);
    let file = disk.create(ROOT, "file");
    disk.write(file, 0, b"promised");
    assert_eq!(disk.0.sync(file), Ok(()));
    assert_eq!(disk.0.sync_dir(ROOT), Ok(()));
    let gone = (0..100)
        .filter(|seed| !disk.after_cut(*seed).has(ROOT, "file"))
        .count();
    assert!(gone > 20, "{gone}");
    disk.0.set_liar(false);
    disk.0.sync(file).unwrap();
    disk.0.sync_dir(ROOT).unwrap();
    for seed in 0..100 {
        assert_eq!(disk.after_cut(seed).bytes(file), b"promised");
    }
}

#[test]
fn a_name_is_safe_after_a_sync_of_its_directory_and_not_before() {
    let mut disk = Disk::new(Names::Strict);
    let dir = disk.make_dir("dir");
    let first = disk.create(dir, "first");
    disk.write(first, 0, b"one");
    disk.0.sync(first).unwrap();
    let without = (0..100)
        .filter(|seed| !disk.after_cut(*seed).has(ROOT, "dir"))
        .count();
    assert!(
        (20..95).contains(&without),
        "{without}: a sync of a file does not save its name"
    );
    disk.0.sync_dir(ROOT).unwrap();
    disk.0.sync_dir(dir).unwrap();
    let second = disk.create(dir, "second");
    disk.write(second, 0, b"two");
    disk.0.sync(second).unwrap();
    disk.0
        .rename(dir, name("second"), dir, name("first"), true)
        .unwrap();
    let mut outcomes = BTreeSet::new();
    for seed in 0..200 {
        let mut after = disk.after_cut(seed);
        assert!(after.has(dir, "first"), "one of the two is always there");
        let ino = after.0.lookup(dir, name("first")).unwrap().ino;
        let found = after.bytes(ino);
        assert!(found == b"one" || found == b"two");
        outcomes.insert((found, after.has(dir, "second")));
    }
    assert!(outcomes.contains(&(b"one".to_vec(), false)));
    assert!(outcomes.contains(&(b"two".to_vec(), false)));
    disk.0.sync_dir(dir).unwrap();
    for seed in 0..50 {
        let after = disk.after_cut(seed);
        assert_eq!(after.names(dir), ["first"]);
    }
}

#[test]
fn a_move_between_directories_is_two_changes_or_one() {
    for names in [Names::Strict, Names::Journaled] {
        let mut disk = Disk::new(names);
        let (from, to) = (disk.make_dir("from"), disk.make_dir("to"));
        let file = disk.create(from, "file");
        disk.0.sync(file).unwrap();
        for dir in [ROOT, from, to] {
            disk.0.sync_dir(dir).unwrap();
        }
        disk.0
            .rename(from, name("file"), to, name("file"), true)
            .unwrap();
        let mut outcomes = BTreeSet::new();
        for seed in 0..300 {
            let after = disk.after_cut(seed);
            outcomes.insert((after.has(from, "file"), after.has(to, "file")));
        }
        assert!(outcomes.contains(&(true, false)) && outcomes.contains(&(false, true)));
        let both = outcomes.contains(&(true, true)) && outcomes.contains(&(false, false));
        assert_eq!(both, names == Names::Strict, "{names:?} {outcomes:?}");
    }
}

#[test]
fn a_journal_keeps_names_up_to_a_moment_and_any_sync_commits_it() {
    let mut disk = Disk::new(Names::Journaled);
    for number in 0..6 {
        disk.create(ROOT, &number.to_string());
    }
    let mut ends = BTreeSet::new();
    for seed in 0..200 {
        let names = disk.after_cut(seed).names(ROOT);
        let expected: Vec<String> = (0..names.len()).map(|n| n.to_string()).collect();
        assert_eq!(names, expected, "no later one without the earlier ones");
        ends.insert(names.len());
    }
    assert!(ends.len() > 3, "{ends:?}");
    let other = disk.create(ROOT, "6");
    disk.0.sync(other).unwrap();
    for seed in 0..50 {
        assert_eq!(disk.after_cut(seed).names(ROOT).len(), 7);
    }
}

#[test]
fn a_full_disk_takes_what_fits_and_says_how_much_that_is() {
    let mut disk = Disk::new(Names::Strict);
    disk.0.set_capacity(Some(4 * PAGE));
    let file = disk.create(ROOT, "file");
    assert_eq!(
        disk.0.write(file, 100, &[1; 20_000], false),
        Ok(4 * 4_096 - 100)
    );
    assert_eq!(disk.0.write(file, 4 * PAGE, &[1], false), Err(Errno::NOSPC));
    assert_eq!(disk.0.allocate(file, 0, 5 * PAGE, false), Err(Errno::NOSPC));
    assert_eq!(disk.0.room(), (4, 0));
    disk.write(file, 0, &[2; 100]);
    // Removed, but open: the room comes back when it is closed.
    disk.0.remove(ROOT, name("file"), false).unwrap();
    assert_eq!(disk.0.room(), (4, 0));
    disk.0.release(file);
    assert_eq!(disk.0.room(), (4, 4));
    let reserved = disk.create(ROOT, "reserved");
    disk.0.allocate(reserved, 0, 4 * PAGE, false).unwrap();
    assert_eq!(disk.0.room(), (4, 0));
    disk.write(reserved, PAGE, &[3; 4_096]);
}

#[test]
fn nothing_is_kept_of_what_nobody_can_reach() {
    let mut disk = Disk::new(Names::Strict);
    let dir = disk.make_dir("dir");
    for round in 0..100 {
        let file = disk.create(dir, "file");
        disk.write(file, 0, &[round; 1_000]);
        disk.0.remove(dir, name("file"), false).unwrap();
        disk.0.release(file);
        disk.0.forget(file, 1);
        disk.0.sync_dir(dir).unwrap();
    }
    assert_eq!(disk.0.inodes.len(), 2);
    assert_eq!(disk.0.pending_bytes, 0);
}

#[test]
fn what_is_kept_for_a_loss_of_power_is_bounded() {
    let mut disk = Disk::new(Names::Strict);
    let files = [disk.create(ROOT, "a"), disk.create(ROOT, "b")];
    let data = vec![1; 1 << 20];
    for step in 0..200 {
        disk.write(files[step % 2], 0, &data);
        assert!(disk.0.pending_bytes <= WRITE_BACK + data.len());
    }
    let bytes: usize = disk.0.unsynced().iter().map(|one| one.bytes).sum();
    assert_eq!(bytes, disk.0.pending_bytes);
}
