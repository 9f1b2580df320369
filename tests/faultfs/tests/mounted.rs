//! The mounted file system: the same as a real one to whoever uses it, and as told to whoever breaks it.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use bellwire_faultfs::{Errno, Fault, FaultFs, Names, Op, Options};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

fn mounted() -> FaultFs {
    FaultFs::new(&Options::default()).unwrap()
}

/// One of many things that a program may do, and what came of it.
struct Life<'a> {
    root: &'a Path,
    open: BTreeMap<u64, File>,
}

impl Life<'_> {
    fn path(&self, rng: &mut StdRng) -> std::path::PathBuf {
        let name = format!("f{}", rng.random_range(0..5));
        match rng.random_range(0..3) {
            0 => self.root.join(name),
            1 => self.root.join("d0").join(name),
            _ => self.root.join("d1").join(name),
        }
    }

    fn step(&mut self, rng: &mut StdRng) -> String {
        let kind = rng.random_range(0..22);
        let path = self.path(rng);
        let other = self.path(rng);
        let handle = rng.random_range(0..4);
        let (offset, length) = (rng.random_range(0..10_000), rng.random_range(0..9_000));
        let dir = self.root.join(format!("d{}", rng.random_range(0..3)));
        let data = vec![rng.random_range(0..250); length];
        let open = |options: &mut OpenOptions| options.open(&path);
        match kind {
            0 | 1 => {
                let opened = open(OpenOptions::new().read(true).write(true).create(true));
                self.keep(handle, opened)
            }
            2 => {
                let opened = open(OpenOptions::new().read(true).write(true).create_new(true));
                self.keep(handle, opened)
            }
            3 => {
                let mut options = OpenOptions::new();
                let opened = open(options.read(true).write(true).create(true).truncate(true));
                self.keep(handle, opened)
            }
            4 => {
                let opened = open(OpenOptions::new().append(true).create(true));
                self.keep(handle, opened)
            }
            5 => self.with(handle, |mut file| file.write_all(&data)),
            6..=8 => self.with(handle, |file| file.write_all_at(&data, offset)),
            9 | 10 => self.with(handle, |file| {
                let mut found = vec![0; length];
                let read = file.read_at(&mut found, offset)?;
                Ok(format!("{:?}", &found[..read]))
            }),
            11 => self.with(handle, |file| file.set_len(offset)),
            12 => self.with(handle, |file| {
                let room = rustix::fs::FallocateFlags::empty();
                rustix::fs::fallocate(file, room, offset, length as u64 + 1)?;
                Ok(())
            }),
            13 => self.with(handle, |file| Ok(file.metadata()?.len())),
            14 => self.with(handle, |file| file.sync_all()),
            15 => said(fs::rename(&path, &other)),
            16 => said(fs::remove_file(&path)),
            17 => said(fs::create_dir(&dir)),
            18 => said(fs::remove_dir(&dir)),
            19 => said(fs::read(&path)),
            20 => said(fs::rename(&dir, self.root.join("d1"))),
            _ => {
                self.open.remove(&handle);
                String::new()
            }
        }
    }

    fn keep(&mut self, handle: u64, opened: io::Result<File>) -> String {
        match opened {
            Ok(file) => {
                self.open.insert(handle, file);
                "opened".to_owned()
            }
            Err(error) => said::<()>(Err(error)),
        }
    }

    fn with<T: std::fmt::Debug>(
        &self,
        handle: u64,
        run: impl FnOnce(&File) -> io::Result<T>,
    ) -> String {
        self.open
            .get(&handle)
            .map_or("no file".to_owned(), |file| said(run(file)))
    }
}

fn said<T: std::fmt::Debug>(what: io::Result<T>) -> String {
    match what {
        Ok(value) => format!("{value:?}"),
        Err(error) => format!("{:?} {:?}", error.kind(), error.raw_os_error()),
    }
}

/// Everything below a directory: paths, lengths, bytes.
fn tree(dir: &Path, list: &mut BTreeMap<String, Option<Vec<u8>>>, root: &Path) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        if path.is_dir() {
            list.insert(name, None);
            tree(&path, list, root);
        } else {
            list.insert(name, Some(fs::read(&path).unwrap()));
        }
    }
}

#[test]
fn the_same_operations_give_the_same_results_as_in_a_real_directory() {
    let disk = mounted();
    for seed in 0..12 {
        let real = tempfile::tempdir().unwrap();
        let ours = disk.path().join(seed.to_string());
        fs::create_dir(&ours).unwrap();
        let mut lives = [real.path(), &ours].map(|root| Life {
            root,
            open: BTreeMap::new(),
        });
        let mut chances = [StdRng::seed_from_u64(seed), StdRng::seed_from_u64(seed)];
        for step in 0..250 {
            let [expected, found] =
                [0, 1].map(|index: usize| lives[index].step(&mut chances[index]));
            assert_eq!(found, expected, "seed {seed}, step {step}");
        }
        let trees = [real.path(), &ours].map(|root| {
            let mut list = BTreeMap::new();
            tree(root, &mut list, root);
            list
        });
        assert_eq!(trees[1], trees[0], "seed {seed}");
    }
}

#[test]
fn a_cut_makes_everything_fail_and_the_survivors_are_mounted() {
    let disk = mounted();
    let path = disk.path().join("file");
    let mut file = File::create(&path).unwrap();
    file.write_all(b"safe").unwrap();
    file.sync_all().unwrap();
    File::open(disk.path()).unwrap().sync_all().unwrap();
    file.write_all(&[9; 100_000]).unwrap();
    assert_eq!(disk.unsynced().len(), 1);
    assert_eq!(disk.unsynced()[0].path, "file");
    disk.power_cut(3);
    assert_eq!(file.write(b"x").unwrap_err().raw_os_error(), Some(5));
    assert!(fs::read(&path).is_err());
    assert!(File::create(disk.path().join("new")).is_err());
    disk.power_on().unwrap();
    assert_eq!(&fs::read(&path).unwrap()[..4], b"safe");
    assert!(file.write(b"x").is_err(), "what was open stays broken");
    assert!(file.sync_all().is_err());
    assert!(disk.unsynced().is_empty());
    assert_eq!(disk.counters().cuts, 1);
}

#[test]
fn the_end_of_a_process_loses_nothing_and_makes_nothing_safe() {
    let disk = mounted();
    let path = disk.path().join("file");
    fs::write(&path, [7; 5_000]).unwrap();
    disk.power_on().unwrap();
    assert_eq!(fs::read(&path).unwrap(), [7; 5_000]);
    assert!(!disk.unsynced().is_empty(), "and it is not safe yet");
}

#[test]
fn the_same_seed_finds_the_same_bytes() {
    let survivors = |seed| {
        let disk = mounted();
        for name in ["a", "b", "c"] {
            let file = File::create(disk.path().join(name)).unwrap();
            for step in 0..20 {
                file.write_all_at(&[step; 900], u64::from(step) * 700)
                    .unwrap();
            }
        }
        disk.power_cut(seed);
        disk.power_on().unwrap();
        let mut list = BTreeMap::new();
        tree(disk.path(), &mut list, disk.path());
        list
    };
    let first: Vec<_> = (0..6).map(survivors).collect();
    let again: Vec<_> = (0..6).map(survivors).collect();
    assert_eq!(first, again);
    assert!(first.iter().any(|list| *list != first[0]));
}

#[test]
fn what_shall_fail_fails_when_and_where_it_was_said() {
    let disk = mounted();
    fs::create_dir(disk.path().join("log")).unwrap();
    let log = File::create(disk.path().join("log/1")).unwrap();
    let other = File::create(disk.path().join("other")).unwrap();
    disk.fail(Fault::new(Op::Sync, Errno::IO).after(1).on("log/"));
    other.sync_all().unwrap();
    log.sync_data().unwrap();
    other.sync_all().unwrap();
    assert_eq!(log.sync_data().unwrap_err().raw_os_error(), Some(5));
    log.sync_data().unwrap();
    disk.fail_next(Op::Write, Errno::IO, 0);
    assert!(log.write_all_at(&[1; 1_000], 0).is_err());
    assert_eq!(log.metadata().unwrap().len(), 500, "half of it was done");
    disk.fail_next(Op::Read, Errno::IO, 0);
    assert!(fs::read(disk.path().join("log/1")).is_err());
    disk.fail_next(Op::Create, Errno::NOSPC, 0);
    let full = File::create(disk.path().join("new")).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    disk.fail_next(Op::Rename, Errno::IO, 0);
    let (from, to) = (disk.path().join("other"), disk.path().join("moved"));
    assert!(fs::rename(&from, &to).is_err());
    fs::rename(&from, &to).unwrap();
    assert_eq!(disk.faults_waiting(), 0);
    let counters = disk.counters();
    assert_eq!((counters.of(Op::Sync), counters.of(Op::Rename)), (5, 2));
}

#[test]
fn the_power_can_go_just_before_an_operation() {
    let disk = mounted();
    let file = File::create(disk.path().join("file")).unwrap();
    File::open(disk.path()).unwrap().sync_all().unwrap();
    disk.fail(Fault::power_cut(Op::Sync, 5).after(1).on("file"));
    file.write_all_at(b"first", 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(b"other", 0).unwrap();
    assert!(file.sync_all().is_err(), "it is not done any more");
    assert!(file.sync_all().is_err());
    assert_eq!(disk.counters().cuts, 1);
    disk.power_on().unwrap();
    let found = fs::read(disk.path().join("file")).unwrap();
    assert!(found == b"first" || found == b"other");
    let file = File::open(disk.path().join("file")).unwrap();
    disk.disconnect();
    assert!(file.sync_all().is_err());
    disk.power_on().unwrap();
    assert_eq!(fs::read(disk.path().join("file")).unwrap(), found);
}

#[test]
fn a_delayed_sync_holds_up_nobody_else_and_ends_with_the_power() {
    let disk = mounted();
    let file = File::create(disk.path().join("slow")).unwrap();
    file.write_all_at(b"x", 0).unwrap();
    disk.delay(Op::Sync, Duration::from_millis(150));
    let begun = Instant::now();
    file.sync_all().unwrap();
    assert!(begun.elapsed() >= Duration::from_millis(150));
    disk.delay(Op::Sync, Duration::from_secs(3_600));
    let waits = std::thread::spawn(move || file.sync_all());
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut steps = 0;
    while steps < 50 {
        fs::write(disk.path().join("quick"), "y").unwrap();
        steps += 1;
        assert!(Instant::now() < deadline);
    }
    assert!(!waits.is_finished());
    disk.power_cut(1);
    assert!(waits.join().unwrap().is_err());
}

#[test]
fn a_full_disk_says_so_and_opens_again() {
    let disk = mounted();
    disk.set_capacity(Some(1 << 20));
    let stat = rustix::fs::statvfs(disk.path()).unwrap();
    assert_eq!(stat.f_bavail * stat.f_frsize, 1 << 20);
    let mut file = File::create(disk.path().join("file")).unwrap();
    let full = file.write_all(&vec![1; 2 << 20]).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    assert_eq!(
        file.metadata().unwrap().len(),
        1 << 20,
        "what fits is there"
    );
    assert_eq!(disk.used(), 1 << 20);
    let stat = rustix::fs::statvfs(disk.path()).unwrap();
    assert_eq!((stat.f_bavail, stat.f_bfree), (0, 0));
    disk.set_capacity(None);
    file.write_all(b"again").unwrap();
    disk.fill();
    assert!(fs::write(disk.path().join("more"), "more").is_err());
}

#[test]
fn locks_modes_and_open_files_without_a_name_are_as_anywhere() {
    let disk = mounted();
    let path = disk.path().join("lock");
    let first = File::create(&path).unwrap();
    let second = File::open(&path).unwrap();
    let exclusive = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    rustix::fs::flock(&first, exclusive).unwrap();
    assert!(rustix::fs::flock(&second, exclusive).is_err());
    drop(first);
    rustix::fs::flock(&second, exclusive).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert_eq!(
        fs::metadata(&path).unwrap().permissions().mode() & 0o777,
        0o640
    );
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.write_all_at(b"still here", 0).unwrap();
    fs::remove_file(&path).unwrap();
    let mut bytes = [0; 10];
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"still here");
    for number in 0..300 {
        fs::write(disk.path().join(format!("{number}")), "").unwrap();
    }
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 300);
    for entry in fs::read_dir(disk.path()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    assert_eq!(fs::read_dir(disk.path()).unwrap().count(), 0);
}

#[test]
fn it_is_gone_when_dropped_even_while_files_are_open() {
    let disk = FaultFs::new(&Options {
        names: Names::Journaled,
        ..Options::default()
    })
    .unwrap();
    let point = disk.path().to_owned();
    let mut file = File::create(point.join("open")).unwrap();
    disk.delay(Op::Read, Duration::from_secs(3_600));
    drop(disk);
    assert!(!point.exists());
    assert!(file.read(&mut [0; 1]).is_err());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&point.display().to_string()));
}

#[test]
fn the_program_mounts_takes_commands_and_cleans_up() {
    let point = tempfile::tempdir().unwrap();
    let mut program = Command::new(env!("CARGO_BIN_EXE_faultfs"))
        .arg(point.path())
        .args(["--capacity", "8388608"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut commands = program.stdin.take().unwrap();
    let mut answers = io::BufRead::lines(io::BufReader::new(program.stdout.take().unwrap()));
    let mut next = || answers.next().unwrap().unwrap();
    assert!(next().contains("mounted at"), "it says when it is ready");
    let mut say = |text: &str| {
        writeln!(commands, "{text}").unwrap();
        commands.flush().unwrap();
    };
    let path = point.path().join("file");
    fs::write(&path, [1; 3_000]).unwrap();
    say("unsynced");
    let mut told = Vec::new();
    loop {
        let line = next();
        if line == "ok" {
            break;
        }
        told.push(line);
    }
    assert!(
        told.iter()
            .any(|line| line.contains("file") && line.contains("3072")),
        "{told:?}"
    );
    say("settle");
    assert_eq!(next(), "ok");
    say("cut 7");
    assert_eq!(next(), "ok");
    assert!(fs::read(&path).is_err());
    say("on");
    assert_eq!(next(), "ok");
    assert_eq!(fs::read(&path).unwrap(), [1; 3_000]);
    say("fail sync EIO after 1 on file");
    assert_eq!(next(), "ok");
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.sync_all().unwrap();
    assert!(file.sync_all().is_err());
    say("full");
    assert_eq!(next(), "ok");
    assert!(fs::write(point.path().join("more"), "more").is_err());
    say("fial sync");
    assert!(next().starts_with("error: "));
    say("quit");
    assert_eq!(next(), "ok");
    let deadline = Instant::now() + Duration::from_secs(20);
    while program.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            program.kill().unwrap();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(program.wait().unwrap().success());
    assert_eq!(fs::read_dir(point.path()).unwrap().count(), 0);
}
