//! Tests of following: each record once and in order, or a gap.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::AtomicUsize;

use super::format::{Slot, Unusable};
use super::tests::{APP, Bench, Chance, DAY_MS, START_MS, STORE, device, ping, record, write};
use super::*;
use crate::delivery::Outcome;
use crate::ports::{OutcomeEvent, OutcomeFollow, OutcomeGap, OutcomePosition};
use crate::store::tests::formats::check;

/// What a follower saw: numbers of records, and gaps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seen {
    Record(u64),
    Gap(OutcomeGap),
}
use OutcomeGap::{Dropped, Elsewhere, Lost, Unreadable};
use Seen::{Gap, Record};

/// Somebody who follows, page by page.
struct Follower {
    follow: OutcomeFollow,
}

impl Follower {
    fn at(position: OutcomePosition) -> Follower {
        Follower {
            follow: OutcomeFollow::all(APP, position, 4),
        }
    }

    fn new() -> Follower {
        Follower::at(OutcomePosition::default())
    }

    /// Everything that is new.
    fn read(&mut self, history: &History) -> Vec<Seen> {
        let mut seen = Vec::new();
        loop {
            let events = history.events(&self.follow).unwrap();
            assert!(events.items.len() <= self.follow.limit + 1);
            assert!(events.next >= self.follow.from || seen.is_empty());
            for (position, event) in &events.items {
                assert!(*position <= events.next);
                seen.push(match event {
                    OutcomeEvent::Ended(record) => Record(record.at_ms - START_MS),
                    OutcomeEvent::Gap(gap) => Gap(*gap),
                });
            }
            self.follow.from = events.next;
            if !events.more {
                return seen;
            }
        }
    }
}

fn records(numbers: impl IntoIterator<Item = u64>) -> Vec<Seen> {
    numbers.into_iter().map(Record).collect()
}

/// A clean end of a run.
fn close(history: History) {
    history.close();
    history.run();
}

#[test]
fn the_slot_of_missing_records_and_the_mark_are_written_and_read_as_they_were() {
    let slots = Slots::new(STORE, 1);
    let mut written = Vec::new();
    slots.put_missing(&mut written, 3, START_MS, Some(7));
    slots.put_missing(&mut written, 4, START_MS, None);
    let golden = check("outcomes-missing-v1", &written);
    let missing = |count| Slot::Missing {
        at_ms: START_MS,
        count,
    };
    assert_eq!(slots.read(3, &golden[..SLOT]), missing(Some(7)));
    assert_eq!(slots.read(4, &golden[SLOT..]), missing(None));
    assert_eq!(slots.read(3, &golden[SLOT..]), Slot::Rotten);

    let mark = Mark {
        running: true,
        dropped_to: OutcomePosition(0x0000_0005_0000_0009),
    };
    let golden = check("outcomes-mark-v1", &format::mark(STORE, mark));
    let golden: &[u8; 64] = golden.first_chunk().unwrap();
    assert_eq!(format::parse_mark(golden, STORE), Ok(mark));
    assert_eq!(format::parse_mark(golden, [8; 16]), Err(Unusable::Foreign));
    for bit in 0..512 {
        let mut damaged = *golden;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(format::parse_mark(&damaged, STORE).is_err(), "bit {bit}");
    }
}

#[test]
fn each_record_is_told_once_and_in_order_over_segments_and_clean_restarts() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let mut follower = Follower::new();
    for run in 0..3 {
        let history = bench.open();
        history.begin_run();
        let first = run * 17;
        assert_eq!(follower.read(&history), []);
        write(&history, (first..first + 10).map(record));
        assert_eq!(follower.read(&history), records(first..first + 10));
        write(&history, (first + 10..first + 17).map(record));
        if run % 2 == 0 {
            assert_eq!(follower.read(&history), records(first + 10..first + 17));
            close(history);
        } else {
            close(history);
            let history = bench.open();
            assert_eq!(follower.read(&history), records(first + 10..first + 17));
        }
    }
    assert_eq!(Follower::new().read(&bench.open()), records(0..51));
}

#[test]
fn only_what_is_wanted_is_told_and_never_another_apps() {
    let bench = Bench::new(DAY_MS, 1 << 30, 7);
    let history = bench.open();
    let mixed = (0..40).map(|n| OutcomeRecord {
        app: if n % 4 == 0 { AppId(9) } else { APP },
        ..record(n)
    });
    write(&history, mixed);
    let ours: Vec<u64> = (0..40).filter(|n| n % 4 != 0).collect();
    assert_eq!(Follower::new().read(&history), records(ours.clone()));
    let with = |set: &dyn Fn(&mut OutcomeFollow)| {
        let mut follower = Follower::new();
        set(&mut follower.follow);
        follower.read(&history)
    };
    let of = |wanted: &dyn Fn(u64) -> bool| {
        records(
            ours.iter()
                .copied()
                .filter(|n| wanted(*n))
                .collect::<Vec<_>>(),
        )
    };
    assert_eq!(with(&|of| of.ping = Some(ping(7))), records([7]));
    assert_eq!(with(&|of| of.ping = Some(ping(8))), [], "another app's");
    assert_eq!(with(&|of| of.device = Some(device(3))), of(&|n| n % 5 == 3));
    let kinds = vec![Outcome::ALL[1], Outcome::ALL[6]];
    assert_eq!(
        with(&|of| of.outcomes.clone_from(&kinds)),
        of(&|n| n % 8 == 1 || n % 8 == 6)
    );
}

#[test]
fn a_crash_is_a_gap_even_if_nothing_was_written_before_it() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    history.begin_run();
    // The segment is full and sealed, so that none is open.
    write(&history, (0..5).map(record));
    let mut follower = Follower::new();
    assert_eq!(follower.read(&history), records(0..5));
    // Never written.
    history.record(&mut vec![record(5)]);
    bench.disk.kill();
    let history = bench.open();
    history.begin_run();
    write(&history, [record(6)]);
    assert_eq!(follower.read(&history), [Gap(Lost), Record(6)]);
    close(history);
    let history = bench.open();
    write(&history, [record(7)]);
    assert_eq!(follower.read(&history), records([7]), "told once");
}

#[test]
fn what_the_power_took_after_it_was_told_leaves_no_place_that_is_used_twice() {
    let bench = Bench::new(DAY_MS, 1 << 30, 100);
    let history = bench.open();
    history.begin_run();
    write(&history, (0..10).map(record));
    let mut follower = Follower::new();
    assert_eq!(follower.read(&history), records(0..10));
    bench.disk.crash(0);
    let history = bench.open();
    history.begin_run();
    write(&history, (20..30).map(record));
    let mut expected = vec![Gap(Lost)];
    expected.extend(records(20..30));
    assert_eq!(follower.read(&history), expected);
}

#[test]
fn records_that_were_left_out_are_a_gap_where_they_belong() {
    let bench = Bench::new(DAY_MS, 1 << 30, 100);
    let history = bench.open();
    let mut follower = Follower::new();
    write(&history, [record(0)]);
    bench.disk.fail_write_in(0);
    write(&history, [record(1)]);
    bench.advance(10_000);
    write(&history, [record(2)]);
    assert_eq!(follower.read(&history), [Record(0), Gap(Lost), Record(2)]);
    // The list passes over it.
    assert_eq!(history.stats().failed, 1);
    // More than the queue takes.
    let bench = Bench::new(DAY_MS, 1 << 30, 1 << 18);
    let history = bench.open();
    let mut follower = Follower::new();
    follower.follow.limit = QUEUE_MAX;
    history.record(&mut (0..QUEUE_MAX as u64 + 3).map(|n| record(n + 10)).collect());
    history.turn();
    let seen = follower.read(&history);
    assert_eq!(seen.len(), QUEUE_MAX + 1);
    assert_eq!(seen.last(), Some(&Gap(Lost)));
}

#[test]
fn what_was_dropped_before_it_was_seen_is_a_gap_and_what_was_seen_is_none() {
    let bench = Bench::new(80_000, 1 << 30, 5);
    let history = bench.open();
    history.begin_run();
    let (mut seen, mut unseen) = (Follower::new(), Follower::new());
    unseen.follow.limit = 3;
    write(&history, (0..12).map(record));
    assert_eq!(seen.read(&history), records(0..12));
    unseen.follow.from = history.events(&unseen.follow).unwrap().next;
    for restarted in [false, true, true] {
        bench.advance(200_000);
        history.turn();
        history.turn();
        let again = restarted.then(|| bench.open());
        let history = again.as_ref().unwrap_or(&history);
        assert_eq!(Follower::at(seen.follow.from).read(history), []);
        assert_eq!(
            Follower::at(unseen.follow.from).read(history),
            [Gap(Dropped)]
        );
        assert_eq!(
            Follower::new().read(history),
            [],
            "whoever asks for what is there gets that"
        );
    }
    close(history);
    let history = bench.open();
    history.begin_run();
    let late = OutcomeRecord {
        at_ms: bench.clock.now().unix_ms,
        ..record(0)
    };
    write(&history, [late]);
    let late = Record(late.at_ms - START_MS);
    assert_eq!(Follower::at(seen.follow.from).read(&history), [late]);
    assert_eq!(
        Follower::at(unseen.follow.from).read(&history),
        [Gap(Dropped), late]
    );
    // Without the mark the worst is assumed.
    close(history);
    bench.disk.remove("outcomes/mark").unwrap();
    let history = bench.open();
    assert_eq!(
        Follower::at(seen.follow.from).read(&history)[0],
        Gap(Dropped)
    );
}

#[test]
fn a_segment_that_only_tells_of_a_gap_goes_by_age_like_any_other() {
    let bench = Bench::new(80_000, 1 << 30, 5);
    let history = bench.open();
    history.begin_run();
    bench.disk.kill();
    let history = bench.open();
    history.begin_run();
    history.turn();
    assert_eq!(history.stats().records, 0);
    close(history);
    let history = bench.open();
    assert_eq!(Follower::new().read(&history), [Gap(Lost)]);
    bench.advance(200_000);
    history.turn();
    assert_eq!(Follower::new().read(&history), []);
    assert!(
        bench
            .disk
            .names()
            .iter()
            .all(|name| !name.starts_with("set-aside"))
    );
}

#[test]
fn by_size_as_well() {
    let bench = Bench::new(DAY_MS, 3_000, 5);
    let history = bench.open();
    let mut follower = Follower::new();
    write(&history, (0..3).map(record));
    assert_eq!(follower.read(&history), records(0..3));
    for n in 3..60 {
        write(&history, [record(n)]);
    }
    let seen = follower.read(&history);
    assert_eq!(seen[0], Gap(Dropped));
    let Record(first) = seen[1] else {
        panic!("{seen:?}");
    };
    assert!(first > 5);
    assert_eq!(seen[1..], records(first..60));
}

#[test]
fn rot_is_a_gap_where_it_is_and_so_is_a_file_that_nobody_can_read() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    write(&history, (0..15).map(record));
    drop(history);
    let damage = |name: &str, at: u64| {
        let file = Disk::open(&bench.disk, name).unwrap();
        file.write_at(&[0x55; 4], at).unwrap();
    };
    damage("outcomes/0000000001.out", format::slot_offset(2));
    damage("outcomes/0000000002.out", 3);
    let seen = Follower::new().read(&bench.open());
    let mut expected = records([0, 1]);
    expected.push(Gap(Unreadable));
    expected.extend(records([3, 4]));
    expected.push(Gap(Unreadable));
    expected.extend(records(10..15));
    assert_eq!(seen, expected);
}

#[test]
fn a_place_of_another_history_is_a_gap_and_the_stream_goes_on_at_the_end() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    write(&history, (0..3).map(record));
    let mut lost = Follower::at(OutcomePosition(u64::MAX));
    assert_eq!(lost.read(&history), [Gap(Elsewhere)]);
    write(&history, (3..6).map(record));
    assert_eq!(lost.read(&history), records(3..6));
    // A history that begins anew begins at its time.
    let begins_ms = START_MS;
    let mut fresh = Bench::new(DAY_MS, 1 << 30, 5);
    fresh.disk.remove(format::MARK).unwrap();
    fresh.rules = fresh.rules.beginning_at(begins_ms);
    let history = fresh.open();
    assert_eq!(history.end().0 >> 32, begins_ms / 1_000);
    write(&history, [record(1)]);
    assert_eq!(history.end().0, (begins_ms / 1_000) << 32 | 1);
    let older = Follower::at(OutcomePosition(5 << 32 | 7)).read(&history);
    assert_eq!(older, [Gap(Dropped), Record(1)]);
    assert_eq!(Follower::new().read(&history), records([1]));
}

#[test]
fn who_follows_is_told_when_records_were_written() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = Arc::new(bench.open());
    let told = Arc::new(AtomicUsize::new(0));
    let telling = Arc::clone(&told);
    history.follow(Some(Arc::new(move || {
        telling.fetch_add(1, Ordering::Relaxed);
    })));
    history.turn();
    assert_eq!(told.load(Ordering::Relaxed), 0);
    write(&history, [record(1)]);
    assert_eq!(told.load(Ordering::Relaxed), 1);
    history.follow(None);
    write(&history, [record(2)]);
    assert_eq!(told.load(Ordering::Relaxed), 1);
}

/// A follower that comes and goes, over restarts, crashes, drops and failing writes: whatever it does not see comes with a gap.
#[test]
fn random_histories_tell_everything_or_say_that_they_do_not() {
    for seed in 0..150 {
        let mut chance = Chance(seed);
        let bench = Bench::new(100_000, 4_000, 1 + chance.below(9) as u32);
        let mut history = bench.open();
        history.begin_run();
        let mut follower = Follower::new();
        // Not from the beginning of all, which knows no gap.
        write(&history, [record(0)]);
        assert_eq!(follower.read(&history), records([0]));
        let mut next = 1;
        let mut due: Vec<u64> = Vec::new();
        for _ in 0..60 {
            match chance.below(12) {
                0..=4 => {
                    let count = 1 + chance.below(6);
                    let some: Vec<u64> = (next..next + count).collect();
                    next += count;
                    due.extend(&some);
                    let some = some.iter().map(|n| OutcomeRecord {
                        ping: ping(*n),
                        at_ms: bench.clock.now().unix_ms,
                        ..record(0)
                    });
                    history.record(&mut some.collect());
                    if chance.below(3) > 0 {
                        history.turn();
                    }
                }
                5 => bench.disk.fail_write_in(chance.below(3)),
                6 => {
                    bench.advance(chance.below(60_000));
                    history.turn();
                }
                7 => {
                    bench.disk.kill();
                    history = bench.open();
                    history.begin_run();
                }
                8 => {
                    close(history);
                    history = bench.open();
                    history.begin_run();
                }
                _ => {
                    // Beyond the wait after a failure.
                    for _ in 0..3 {
                        bench.advance(11_000);
                        history.turn();
                    }
                    let mut gap = false;
                    let mut seen = Vec::new();
                    loop {
                        let events = history.events(&follower.follow).unwrap();
                        for (_, event) in &events.items {
                            match event {
                                OutcomeEvent::Ended(record) => {
                                    seen.push(u64::from_be_bytes(
                                        *record.ping.0.first_chunk().unwrap(),
                                    ));
                                }
                                OutcomeEvent::Gap(_) => gap = true,
                            }
                        }
                        follower.follow.from = events.next;
                        if !events.more {
                            break;
                        }
                    }
                    assert!(seen.is_sorted_by(|a, b| a < b), "seed {seed}: {seen:?}");
                    if gap {
                        assert!(seen.iter().all(|n| due.contains(n)), "seed {seed}");
                    } else {
                        assert_eq!(seen, due, "seed {seed}");
                    }
                    due.clear();
                }
            }
        }
    }
}

#[test]
fn what_the_disk_does_not_give_is_a_gap_and_the_rest_is_told() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    write(&history, (1..16).map(record));
    bench.disk.fail_reads("outcomes/0000000002.out", true);
    let expected: Vec<Seen> = (1..6)
        .map(Record)
        .chain([Gap(Unreadable)])
        .chain((11..16).map(Record))
        .collect();
    assert_eq!(Follower::new().read(&history), expected);
    // The one that grows, too, and what comes to it later.
    write(&history, (16..18).map(record));
    bench.disk.fail_reads("outcomes/0000000004.out", true);
    let mut follower = Follower::new();
    let last = [Gap(Unreadable)];
    assert!(follower.read(&history).ends_with(&last));
    bench.disk.fail_reads("outcomes/0000000004.out", false);
    write(&history, (18..20).map(record));
    assert_eq!(follower.read(&history), [18, 19].map(Record));
}
