//! Tests of the history: formats, damage, and random histories against a list.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use super::format::{Slot, index_name, slot_offset};
use super::*;
use crate::delivery::Outcome;
use crate::ports::{OutcomeOrder, OutcomePosition};
use crate::store::testing::{ManualClock, MemoryDisk};
use crate::store::tests::formats::check;

pub(super) const STORE: [u8; 16] = [7; 16];
pub(super) const START_MS: u64 = 1_800_000_000_000;
pub(super) const DAY_MS: u64 = 86_400_000;
pub(super) const APP: AppId = AppId::DEFAULT;

pub(super) fn ping(n: u64) -> PingId {
    PingId((u128::from(n) << 64 | 5).to_be_bytes())
}

pub(super) fn device(n: u64) -> DeviceId {
    DeviceId((u128::from(n) << 64 | 9).to_be_bytes())
}

pub(super) fn record(n: u64) -> OutcomeRecord {
    OutcomeRecord {
        app: APP,
        ping: ping(n),
        device: device(n % 5),
        outcome: Outcome::ALL[n as usize % 8],
        at_ms: START_MS + n,
        accepted_ms: (!n.is_multiple_of(3)).then_some(START_MS),
    }
}

/// A history whose thread is the test.
pub(super) struct Bench {
    pub(super) disk: MemoryDisk,
    pub(super) clock: Arc<ManualClock>,
    pub(super) rules: Rules,
    full: Arc<AtomicBool>,
}

impl Bench {
    pub(super) fn new(keep_ms: u64, max_bytes: u64, segment_places: u32) -> Bench {
        let disk = MemoryDisk::new();
        disk.make_dir(DIR).unwrap();
        // Each run of these tests ended in order unless one says that it began.
        mark::write(&disk, STORE, Mark::default()).unwrap();
        Bench {
            disk,
            clock: Arc::new(ManualClock::new(START_MS)),
            rules: Rules {
                keep_ms,
                max_bytes,
                segment_places,
                first: 1,
            },
            full: Arc::default(),
        }
    }

    pub(super) fn open(&self) -> History {
        let full = Arc::clone(&self.full);
        History::open(
            Arc::new(self.disk.clone()),
            STORE,
            Arc::clone(&self.clock) as Arc<dyn Clock>,
            self.rules,
            Box::new(move || full.load(Ordering::Relaxed)),
        )
        .unwrap()
    }

    /// The files, without the mark.
    fn names(&self) -> Vec<String> {
        let mut names = self.disk.names();
        names.retain(|name| name != format::MARK);
        names
    }

    /// Bytes of them.
    fn used(&self) -> u64 {
        self.disk.used() - 64
    }

    pub(super) fn advance(&self, ms: u64) {
        self.clock.advance(Duration::from_millis(ms));
    }

    pub(super) fn bytes(&self, name: &str) -> Vec<u8> {
        let file = Disk::open(&self.disk, name).unwrap();
        let mut bytes = vec![0; file.length().unwrap() as usize];
        file.read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

pub(super) fn write(history: &History, records: impl IntoIterator<Item = OutcomeRecord>) {
    history.record(&mut records.into_iter().collect());
    history.turn();
}

fn query(order: OutcomeOrder) -> OutcomeQuery {
    OutcomeQuery {
        app: APP,
        devices: None,
        outcome: None,
        from_ms: 0,
        to_ms: u64::MAX,
        order,
        start: None,
        limit: 1_000_000,
    }
}

/// Every page of a query, in one list.
fn walk(history: &History, mut query: OutcomeQuery) -> Vec<OutcomeRecord> {
    let mut found = Vec::new();
    loop {
        let page = history.query(&query).unwrap();
        assert!(page.items.len() <= query.limit);
        found.extend(page.items);
        match page.next {
            None => return found,
            next => query.start = next,
        }
    }
}

fn all(history: &History) -> Vec<OutcomeRecord> {
    walk(history, query(OutcomeOrder::OldestFirst))
}

fn of_device(n: u64) -> OutcomeQuery {
    OutcomeQuery {
        devices: Some(vec![device(n)]),
        limit: 3,
        ..query(OutcomeOrder::OldestFirst)
    }
}

// ---- Formats -----------------------------------------------------------------------------------------------------

#[test]
fn the_files_of_version_1_are_written_and_read_as_they_were() {
    let bench = Bench::new(DAY_MS, 1 << 30, 8);
    let history = bench.open();
    write(&history, (0..8).map(record));
    let segment = check(
        "outcomes-segment-v1",
        &bench.bytes("outcomes/0000000001.out"),
    );
    let index = check("outcomes-index-v1", &bench.bytes("outcomes/0000000001.idx"));
    let fresh = Bench::new(DAY_MS, 1 << 30, 8);
    for (name, bytes) in [("0000000001.out", segment), ("0000000001.idx", index)] {
        let file = fresh.disk.create(&format!("outcomes/{name}")).unwrap();
        file.write_at(&bytes, 0).unwrap();
    }
    let history = fresh.open();
    assert_eq!(all(&history), (0..8).map(record).collect::<Vec<_>>());
    assert_eq!(walk(&history, of_device(1)), [record(1), record(6)]);
    assert_eq!(history.of_ping(APP, ping(3), None, 5).unwrap(), [record(3)]);
    assert_eq!(history.stats().unreadable, 0);
}

#[test]
fn every_flipped_bit_of_a_segment_is_found_and_costs_one_record_at_most() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..5).map(record));
    let name = "outcomes/0000000001.out";
    let whole: Vec<_> = (0..5).map(record).collect();
    for bit in 0..bench.bytes(name).len() * 8 {
        let (offset, mask) = (bit as u64 / 8, 1 << (bit % 8));
        assert!(bench.disk.flip(name, offset, mask));
        let history = bench.open();
        let found = all(&history);
        let stats = history.stats();
        if offset < slot_offset(0) {
            // Reserved bytes of the header are under its sum as well.
            assert_eq!((found.len(), stats.unreadable), (0, 1), "bit {bit}");
        } else {
            let lost = (offset - slot_offset(0)) / 64;
            let mut left = whole.clone();
            left.remove(lost as usize);
            assert_eq!((found, stats.unreadable), (left, 1), "bit {bit}");
            let of = whole[lost as usize];
            let one = history.of_ping(APP, of.ping, None, 9).unwrap();
            assert_eq!(one, [], "bit {bit}");
        }
        history.turn();
        assert_eq!(bench.names(), [&name.replace(".out", ".idx"), name]);
        assert!(bench.disk.flip(name, offset, mask));
    }
}

#[test]
fn every_flipped_byte_of_an_index_is_found_and_costs_nothing() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..5).map(record));
    let name = "outcomes/0000000001.idx";
    let whole = bench.bytes(name);
    for offset in 0..whole.len() as u64 {
        assert!(bench.disk.flip(name, offset, 1 << (offset % 8)));
        let history = bench.open();
        // Each of the two is asked for, so that whatever is damaged is met.
        for n in 0..5 {
            assert_eq!(walk(&history, of_device(n)), [record(n)], "byte {offset}");
            let found = history.of_ping(APP, ping(n), None, 9).unwrap();
            assert_eq!(found, [record(n)], "byte {offset}");
        }
        history.turn();
        assert!(
            bench.bytes(name) == whole,
            "byte {offset}: the index was made again"
        );
    }
}

#[test]
fn a_missing_index_is_made_again_and_one_without_records_goes() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..10).map(record));
    let whole = bench.bytes("outcomes/0000000001.idx");
    Disk::remove(&bench.disk, "outcomes/0000000001.idx").unwrap();
    Disk::remove(&bench.disk, "outcomes/0000000002.out").unwrap();
    drop(bench.disk.create("outcomes/0000000007.idx.tmp").unwrap());
    let history = bench.open();
    assert_eq!(walk(&history, of_device(2)), [record(2)]);
    history.turn();
    assert!(bench.bytes("outcomes/0000000001.idx") == whole);
    assert_eq!(walk(&history, of_device(2)), [record(2)]);
    // No number is used twice, not even that of a file that is gone.
    write(&history, [record(11)]);
    let names = bench.names();
    assert_eq!(
        names,
        [
            "outcomes/0000000001.idx",
            "outcomes/0000000001.out",
            "outcomes/0000000008.out"
        ]
    );
}

#[test]
fn what_a_later_program_or_another_store_wrote_is_kept_and_told_until_its_age_says_so() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..15).map(record));
    // The version of the first, the store of the second.
    assert!(bench.disk.flip("outcomes/0000000001.out", 8, 2));
    let file = Disk::open(&bench.disk, "outcomes/0000000002.out").unwrap();
    file.write_at(&format::header([8; 16], 2, START_MS), 0)
        .unwrap();
    let history = bench.open();
    assert_eq!(all(&history), (10..15).map(record).collect::<Vec<_>>());
    assert_eq!(history.stats().unreadable, 2);
    // Size drops nothing that cannot be read.
    let tight = Bench {
        rules: Rules {
            max_bytes: 1,
            ..bench.rules
        },
        disk: bench.disk.clone(),
        clock: Arc::clone(&bench.clock),
        full: Arc::default(),
    };
    assert!(history.segments.read().unwrap().contains_key(&1));
    bench.advance(DAY_MS + 1_000);
    let history = bench.open();
    history.turn();
    assert_eq!(bench.names().len(), 6);
    bench.advance(SLACK_MS);
    history.turn();
    assert_eq!(
        bench.names(),
        [
            "outcomes/0000000002.idx",
            "outcomes/0000000002.out",
            "outcomes/0000000004.out",
            "set-aside/outcomes-0000000001.out"
        ],
        "what cannot be read is set aside with those after it, another store's stays, an empty one keeps the number"
    );
    tight.open().turn();
    assert_eq!(
        bench.names(),
        [
            "outcomes/0000000002.idx",
            "outcomes/0000000002.out",
            "outcomes/0000000004.idx",
            "outcomes/0000000004.out",
            "set-aside/outcomes-0000000001.out"
        ],
        "size drops none of them"
    );
}

#[test]
fn what_was_torn_off_at_the_end_is_cut_off_and_nobody_is_alarmed() {
    let bench = Bench::new(DAY_MS, 1 << 30, 100);
    let history = bench.open();
    write(&history, (0..10).map(record));
    bench.disk.kill();
    // Half a record more.
    let file = Disk::open(&bench.disk, "outcomes/0000000001.out").unwrap();
    file.write_at(&[1; 100], slot_offset(10)).unwrap();
    let history = bench.open();
    history.turn();
    assert_eq!(all(&history), (0..10).map(record).collect::<Vec<_>>());
    assert_eq!(walk(&history, of_device(1)), [record(1), record(6)]);
    assert_eq!(history.stats().unreadable, 0);
    assert_eq!(bench.open().stats().records, 10);
}

#[test]
fn what_the_disk_does_not_give_is_left_out_and_the_rest_is_told() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    write(&history, (0..15).map(record));
    bench.disk.fail_reads("outcomes/0000000002.out", true);
    bench.disk.fail_reads("outcomes/0000000003.idx", true);
    let left: Vec<_> = (0..5).chain(10..15).map(record).collect();
    assert_eq!(all(&history), left);
    for n in 0..15 {
        let found = history.of_ping(APP, ping(n), None, 9).unwrap();
        let expected: Vec<_> = left.iter().filter(|left| left.ping == ping(n)).collect();
        assert_eq!(found.iter().collect::<Vec<_>>(), expected, "ping {n}");
    }
    assert_eq!(walk(&history, of_device(1)), [1, 11].map(record));
    assert_eq!(history.stats().unreadable, 1);
    // The index is made again, in other places of the disk.
    history.turn();
    assert!(!history.list()[2].is_doubted());
    assert_eq!(walk(&history, of_device(1)), [1, 11].map(record));
    // A disk that thinks better of it is asked again.
    bench.disk.fail_reads("outcomes/0000000002.out", false);
    assert_eq!(all(&history), (0..15).map(record).collect::<Vec<_>>());
}

#[test]
fn an_index_is_made_although_a_later_segment_cannot_be_read() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..15).map(record));
    let indexes = [1, 2, 3].map(index_name);
    for name in &indexes {
        Disk::remove(&bench.disk, name).unwrap();
    }
    let history = bench.open();
    bench.disk.fail_reads(&segment_name(3), true);
    bench.disk.fail_reads(&segment_name(2), true);
    for _ in 0..3 {
        history.turn();
    }
    let there = |name: &String| bench.names().contains(name);
    assert_eq!(indexes.each_ref().map(there), [true, false, false]);
    // A start makes what can be made before it compares.
    Disk::remove(&bench.disk, &indexes[0]).unwrap();
    bench.disk.fail_reads(&segment_name(3), false);
    bench.disk.fail_reads(&segment_name(2), false);
    let history = bench.open();
    bench.disk.fail_reads(&segment_name(3), true);
    history.backfill(|_, _: Option<()>| Ok((Vec::new(), None)));
    assert_eq!(indexes.each_ref().map(there), [true, true, false]);
    bench.disk.fail_reads(&segment_name(3), false);
    bench.advance(60_000);
    history.turn();
    assert_eq!(indexes.each_ref().map(there), [true, true, true]);
}

#[test]
fn an_unfinished_segment_in_which_nothing_can_be_read_is_kept_until_its_time_and_then_set_aside() {
    let bench = Bench::new(DAY_MS, 1 << 30, 100);
    write(&bench.open(), (0..3).map(record));
    bench.disk.kill();
    for place in 0..3 {
        assert!(bench.disk.flip(&segment_name(1), slot_offset(place), 1));
    }
    let whole = bench.bytes(&segment_name(1));
    let history = bench.open();
    write(&history, [record(5)]);
    assert_eq!(all(&history), [record(5)]);
    assert_eq!(history.stats().unreadable, 3);
    assert_eq!(bench.bytes(&segment_name(1)), whole);
    bench.advance(DAY_MS + SLACK_MS + 1_000);
    history.turn();
    history.turn();
    let aside = "set-aside/outcomes-0000000001.out";
    assert!(bench.disk.names().contains(&aside.to_owned()));
    assert_eq!(bench.bytes(aside), whole);
}

#[test]
fn a_record_at_another_place_is_not_believed() {
    let slots = Slots::new(STORE, 1);
    let mut bytes = Vec::new();
    slots.put(&mut bytes, 3, &record(1));
    assert_eq!(slots.read(3, &bytes), Slot::Record(record(1)));
    assert_eq!(slots.read(4, &bytes), Slot::Rotten);
    assert_eq!(Slots::new(STORE, 2).read(3, &bytes), Slot::Rotten);
    assert_eq!(Slots::new([8; 16], 1).read(3, &bytes), Slot::Rotten);
    assert_eq!(slots.read(3, &[0; 64]), Slot::Empty);
}

// ---- Limits ------------------------------------------------------------------------------------------------------

#[test]
fn beyond_the_queue_records_are_counted_and_left_out_and_nobody_waits() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1 << 18);
    let history = bench.open();
    let most = QUEUE_MAX as u64;
    history.record(&mut (0..most + 10).map(record).collect());
    history.record(&mut vec![record(1)]);
    assert_eq!(history.stats().overflowed, 11);
    history.turn();
    assert_eq!(history.stats().written, most);
    write(&history, [record(most)]);
    assert_eq!(all(&history).len() as u64, most + 1);
}

#[test]
fn below_the_reserve_nothing_is_written_and_above_it_what_waited_is() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    bench.full.store(true, Ordering::Relaxed);
    write(&history, (0..4).map(record));
    assert_eq!(bench.names(), [""; 0]);
    bench.full.store(false, Ordering::Relaxed);
    history.turn();
    assert_eq!(all(&history).len(), 4);
}

#[test]
fn a_writer_that_cannot_write_waits_for_its_second_however_much_waits_for_it() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1 << 18);
    let history = bench.open();
    history.record(&mut (0..QUEUE_WAKES as u64).map(record).collect());
    let due = |able| history.queue().is_due(able);
    bench.full.store(true, Ordering::Relaxed);
    assert!(!due(history.turn()), "no room");
    bench.full.store(false, Ordering::Relaxed);
    bench.disk.fail_write_in(0);
    assert!(history.turn());
    history.record(&mut (0..QUEUE_WAKES as u64).map(record).collect());
    assert!(!due(history.turn()), "a write has just failed");
    history.close();
    assert!(due(false));
}

#[test]
fn what_could_not_be_written_before_the_end_is_counted() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    write(&history, [record(0)]);
    bench.full.store(true, Ordering::Relaxed);
    history.record(&mut (1..5).map(record).collect());
    history.close();
    history.run();
    let stats = history.stats();
    assert_eq!((stats.written, stats.failed), (1, 4));
    assert_eq!(all(&bench.open()), [record(0)]);
}

#[test]
fn nothing_is_synced_but_where_a_segment_begins_and_ends() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1_000);
    let history = bench.open();
    write(&history, [record(0)]);
    let begun = bench.disk.syncs();
    for first in (1..999).step_by(2) {
        write(&history, (first..first + 2).map(record));
    }
    assert_eq!(bench.disk.syncs(), begun);
    // Records, index, and the names of both.
    write(&history, [record(999)]);
    assert!(bench.disk.syncs() <= begun + 3);
    assert_eq!(all(&history).len(), 1_000);
}

#[test]
fn a_look_at_a_ping_does_not_read_everything_when_indexes_were_lost() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1_000);
    let history = bench.open();
    let count = 6_000;
    write(&history, (0..count).map(record));
    let look = |history: &History, n| history.of_ping(APP, ping(n), None, 10);
    assert_eq!(look(&history, 7).unwrap(), [record(7)]);
    drop(history);
    for name in bench.names() {
        if name.ends_with(".idx") {
            bench.disk.remove(&name).unwrap();
        }
    }
    let history = bench.open();
    let error = look(&history, 7).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
    // The writer makes one in each turn.
    history.turn();
    history.turn();
    for n in [7, count - 1] {
        assert_eq!(look(&history, n).unwrap(), [record(n)]);
    }
}

#[test]
fn a_write_that_fails_costs_its_records_and_nothing_else() {
    let bench = Bench::new(DAY_MS, 1 << 30, 100);
    let history = bench.open();
    write(&history, (0..3).map(record));
    bench.disk.fail_write_in(0);
    write(&history, (3..6).map(record));
    assert_eq!(history.stats().failed, 3);
    // Not at once again; what comes meanwhile waits.
    write(&history, (6..9).map(record));
    assert_eq!(all(&history).len(), 3);
    bench.advance(10_000);
    history.turn();
    let left: Vec<_> = (0..3).chain(6..9).map(record).collect();
    assert_eq!(all(&history), left);
    bench.disk.kill();
    let history = bench.open();
    history.turn();
    assert_eq!((all(&history), history.stats().unreadable), (left, 0));
}

#[test]
fn an_index_that_cannot_be_written_is_tried_again_and_missed_by_nobody() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    let history = bench.open();
    // The sync of the header, that of the records, then that of the index.
    bench.disk.fail_sync_in(2);
    write(&history, (0..5).map(record));
    assert_eq!(walk(&history, of_device(2)), [record(2)]);
    assert!(
        !bench
            .names()
            .contains(&"outcomes/0000000001.idx".to_owned())
    );
    bench.advance(61_000);
    history.turn();
    assert!(
        bench
            .names()
            .contains(&"outcomes/0000000001.idx".to_owned())
    );
    assert_eq!(walk(&history, of_device(2)), [record(2)]);
}

#[test]
fn a_call_looks_at_a_limited_number_of_records_and_says_where_it_stopped() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1 << 18);
    let history = bench.open();
    let count = query::LOOKS_MAX as u64 * 2;
    for first in (0..count).step_by(QUEUE_MAX) {
        write(&history, (first..first + QUEUE_MAX as u64).map(record));
    }
    for order in [OutcomeOrder::OldestFirst, OutcomeOrder::NewestFirst] {
        let rare = OutcomeQuery {
            from_ms: START_MS + count / 2,
            to_ms: START_MS + count / 2 + 1,
            ..query(order)
        };
        let page = history.query(&rare).unwrap();
        assert!(page.next.is_some());
        assert_eq!(walk(&history, rare), [record(count / 2)]);
    }
}

#[test]
fn segments_are_dropped_whole_by_age_and_nothing_older_is_told_meanwhile() {
    let bench = Bench::new(80_000, 1 << 30, 1_000);
    let history = bench.open();
    // One every second; a segment is closed when it is ten seconds old.
    for n in 0..200 {
        write(
            &history,
            [OutcomeRecord {
                at_ms: START_MS + n * 1_000,
                ..record(n)
            }],
        );
        let told = all(&history);
        let from = (START_MS + n * 1_000).saturating_sub(80_000);
        assert!(told.iter().all(|record| record.at_ms >= from));
        assert_eq!(told.len() as u64, n.min(80) + 1);
        bench.advance(1_000);
    }
    let stats = history.stats();
    assert!((9..=11).contains(&stats.segments), "{stats:?}");
    assert!(stats.segments_dropped >= 9, "{stats:?}");
    bench.advance(91_000);
    history.turn();
    history.turn();
    assert_eq!(history.stats().records, 0);
    // An empty one is left, so that its number is not used again.
    assert_eq!(history.stats().segments, 1);
    assert_eq!(bench.used(), 64);
}

#[test]
fn no_position_is_used_again_when_all_was_dropped_before_a_restart() {
    let bench = Bench::new(80_000, 1 << 30, 5);
    let history = bench.open();
    write(&history, (0..12).map(record));
    let page = OutcomeQuery {
        limit: 3,
        ..query(OutcomeOrder::OldestFirst)
    };
    let kept = history.query(&page).unwrap().next.unwrap();
    for _ in 0..3 {
        // Also when the one that was left has grown old itself.
        bench.advance(200_000);
        history.turn();
        history.turn();
    }
    assert_eq!(all(&history), []);
    drop(history);
    let history = bench.open();
    let now_ms = bench.clock.now().unix_ms;
    let late: Vec<OutcomeRecord> = (0..4)
        .map(|n| OutcomeRecord {
            at_ms: now_ms + n,
            ..record(n)
        })
        .collect();
    write(&history, late.clone());
    // Whoever still holds the place of an old record misses none of the new ones.
    let from_there = OutcomeQuery {
        start: Some(kept),
        ..query(OutcomeOrder::OldestFirst)
    };
    assert_eq!(walk(&history, from_there), late);
}

#[test]
fn by_size_the_oldest_segments_go() {
    let bench = Bench::new(DAY_MS, 60_000, 5);
    let history = bench.open();
    write(&history, (0..100).map(record));
    let stats = history.stats();
    assert!(stats.bytes <= 60_000, "{stats:?}");
    let left = all(&history);
    assert_eq!(left.last(), Some(&record(99)));
    assert_eq!(
        left,
        (100 - left.len() as u64..100)
            .map(record)
            .collect::<Vec<_>>()
    );
    assert_eq!(bench.used(), stats.bytes);
}

#[test]
fn by_size_what_can_be_read_is_dropped_although_nobody_has_looked_at_it_yet() {
    let bench = Bench::new(DAY_MS, 1 << 30, 5);
    write(&bench.open(), (0..20).map(record));
    for number in 1..=4 {
        Disk::remove(&bench.disk, &index_name(number)).unwrap();
    }
    // In the second not one can.
    for place in 0..5 {
        assert!(bench.disk.flip(&segment_name(2), slot_offset(place), 1));
    }
    let tight = Bench {
        rules: Rules {
            max_bytes: 1,
            ..bench.rules
        },
        ..bench
    };
    let history = tight.open();
    history.turn();
    assert_eq!(all(&history), (15..20).map(record).collect::<Vec<_>>());
    assert_eq!(
        tight.names(),
        [
            &index_name(4),
            &segment_name(4),
            "set-aside/outcomes-0000000002.out"
        ]
    );
}

#[test]
fn by_size_what_can_be_read_does_not_give_way_to_what_cannot() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1_000);
    let history = bench.open();
    write(&history, (0..1_000).map(record));
    // Of another store, and larger than all that may be kept.
    let file = Disk::open(&bench.disk, &segment_name(1)).unwrap();
    file.write_at(&format::header([8; 16], 1, START_MS), 0)
        .unwrap();
    write(&history, (1_000..1_010).map(record));
    history.seal();
    let tight = Bench {
        rules: Rules {
            max_bytes: 30_000,
            segment_places: 5,
            ..bench.rules
        },
        ..bench
    };
    let history = tight.open();
    write(&history, (1_010..1_015).map(record));
    let left: Vec<_> = (1_000..1_015).map(record).collect();
    assert_eq!(all(&history), left);
}

// ---- Walks -------------------------------------------------------------------------------------------------------

#[test]
fn a_walk_neither_repeats_nor_skips_while_others_come_and_go() {
    for order in [OutcomeOrder::OldestFirst, OutcomeOrder::NewestFirst] {
        for devices in [None, Some(vec![device(1), device(2)])] {
            let bench = Bench::new(DAY_MS, 1 << 30, 5);
            let history = bench.open();
            write(&history, (0..43).map(record));
            let mut asked = OutcomeQuery {
                devices: devices.clone(),
                limit: 4,
                ..query(order)
            };
            let mut found = Vec::new();
            let mut next = 43;
            loop {
                let page = history.query(&asked).unwrap();
                found.extend(page.items);
                if page.next.is_none() || found.len() > 60 {
                    break;
                }
                asked.start = page.next;
                write(&history, (next..next + 3).map(record));
                next += 3;
                if next == 52 {
                    // The oldest two segments go.
                    let mut writing = history.writing.lock().unwrap();
                    for segment in history.list().iter().take(2) {
                        history.remove(&mut writing, segment, "test");
                    }
                }
            }
            let wanted = |record: &OutcomeRecord| {
                devices
                    .as_ref()
                    .is_none_or(|devices| devices.contains(&record.device))
            };
            match order {
                OutcomeOrder::NewestFirst => {
                    let there: Vec<_> = (10..43).rev().map(record).filter(wanted).collect();
                    assert_eq!(found, there);
                }
                OutcomeOrder::OldestFirst => {
                    let there: Vec<_> = (0..next).map(record).filter(wanted).collect();
                    assert_eq!(found[..], there[..found.len()]);
                    assert!(found.len() >= (0..43).map(record).filter(wanted).count());
                }
            }
        }
    }
}

#[test]
fn a_cursor_of_before_a_crash_skips_nothing_that_came_after_it() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1_000);
    let history = bench.open();
    write(&history, (0..10).map(record));
    // What was seen last was lost with the power.
    bench.disk.crash(0);
    let history = bench.open();
    write(&history, (20..30).map(record));
    let asked = OutcomeQuery {
        start: Some(OutcomePosition((1 << 32) + 10)),
        ..query(OutcomeOrder::OldestFirst)
    };
    assert_eq!(
        walk(&history, asked),
        (20..30).map(record).collect::<Vec<_>>()
    );
}

#[test]
fn the_devices_of_a_large_ping_are_paged_in_order() {
    let bench = Bench::new(DAY_MS, 1 << 30, 1_000);
    let history = bench.open();
    let one = |n: u64| OutcomeRecord {
        ping: ping(1),
        device: device(n * 7 % 3_000),
        ..record(n)
    };
    write(&history, (0..2_999).map(one));
    let mut after = None;
    let mut found = Vec::new();
    loop {
        let page = history.of_ping(APP, ping(1), after, 250).unwrap();
        if page.is_empty() {
            break;
        }
        after = page.last().map(|record| record.device);
        found.extend(page);
    }
    assert!(found.is_sorted_by(|a, b| a.device < b.device));
    assert_eq!(found.len(), 2_999);
    assert_eq!(history.of_ping(AppId(2), ping(1), None, 9).unwrap(), []);
}

// ---- After a crash -----------------------------------------------------------------------------------------------

#[test]
fn what_the_engine_knows_and_the_history_lost_is_written_again_once() {
    let bench = Bench::new(DAY_MS, 1 << 30, 10);
    let history = bench.open();
    write(&history, (0..23).map(record));
    // Never written: the process was killed.
    history.record(&mut (23..40).map(record).collect());
    bench.disk.kill();
    bench.advance(5_000);
    let known: Vec<OutcomeRecord> = (0..40)
        .filter(|n| n % 2 == 0)
        .map(|n| OutcomeRecord {
            accepted_ms: None,
            ..record(n)
        })
        .collect();
    let page = |from_ms: u64, after: Option<usize>| {
        let first = after.map_or(0, |after| after + 1);
        let some: Vec<_> = known
            .iter()
            .skip(first)
            .take(3)
            .filter(|record| record.at_ms >= from_ms)
            .copied()
            .collect();
        Ok((some, (first + 3 < known.len()).then_some(first + 2)))
    };
    for _ in 0..2 {
        let history = bench.open();
        history.backfill(page);
        history.turn();
        let expected: Vec<_> = (0..23)
            .map(record)
            .chain(
                known
                    .iter()
                    .filter(|record| record.at_ms > START_MS + 23)
                    .copied(),
            )
            .collect();
        assert_eq!(all(&history), expected);
        bench.disk.kill();
        bench.advance(1_000);
    }
}

// ---- Against a list ----------------------------------------------------------------------------------------------

pub(super) struct Chance(pub(super) u64);

impl Chance {
    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}

fn is_subsequence(part: &[OutcomeRecord], whole: &[OutcomeRecord]) -> bool {
    let mut rest = whole.iter();
    part.iter().all(|record| rest.any(|other| other == record))
}

fn compare(history: &History, model: &[OutcomeRecord], chance: &mut Chance, now_ms: u64) {
    for _ in 0..4 {
        let order = match chance.below(2) {
            0 => OutcomeOrder::NewestFirst,
            _ => OutcomeOrder::OldestFirst,
        };
        let devices = match chance.below(3) {
            0 => None,
            1 => Some(vec![device(chance.below(7))]),
            _ => Some((0..4).map(device).collect()),
        };
        let asked = OutcomeQuery {
            app: AppId(1 + chance.below(2) as u32),
            devices,
            outcome: (chance.below(2) == 0).then(|| Outcome::ALL[chance.below(8) as usize]),
            from_ms: chance.below(2) * (now_ms - chance.below(200_000)),
            to_ms: match chance.below(2) {
                0 => u64::MAX,
                _ => now_ms - chance.below(100_000),
            },
            order,
            start: None,
            limit: 1 + chance.below(20) as usize,
        };
        let mut expected: Vec<_> = model
            .iter()
            .filter(|record| {
                record.app == asked.app
                    && asked
                        .outcome
                        .is_none_or(|outcome| outcome == record.outcome)
                    && (asked.from_ms..asked.to_ms).contains(&record.at_ms)
                    && asked
                        .devices
                        .as_ref()
                        .is_none_or(|devices| devices.contains(&record.device))
            })
            .copied()
            .collect();
        if order == OutcomeOrder::NewestFirst {
            expected.reverse();
        }
        assert_eq!(walk(history, asked.clone()), expected, "{asked:?}");
    }
    let (app, of) = (AppId(1 + chance.below(2) as u32), ping(chance.below(30)));
    let after = (chance.below(2) == 0).then(|| device(chance.below(7)));
    let mut first: BTreeMap<DeviceId, OutcomeRecord> = BTreeMap::new();
    for record in model {
        if (record.app, record.ping) == (app, of) && after.is_none_or(|after| record.device > after)
        {
            first.entry(record.device).or_insert(*record);
        }
    }
    let limit = 1 + chance.below(8) as usize;
    let expected: Vec<_> = first.into_values().take(limit).collect();
    assert_eq!(history.of_ping(app, of, after, limit).unwrap(), expected);
}

/// All that a history tells of each of the two apps, one after the other.
fn both(history: &History) -> Vec<OutcomeRecord> {
    let of = |app| {
        let asked = OutcomeQuery {
            app: AppId(app),
            ..query(OutcomeOrder::OldestFirst)
        };
        walk(history, asked)
    };
    [of(1), of(2)].concat()
}

fn of_app(records: &[OutcomeRecord], app: u32) -> Vec<OutcomeRecord> {
    let of = |record: &&OutcomeRecord| record.app == AppId(app);
    records.iter().filter(of).copied().collect()
}

fn history_of(seed: u64) {
    let mut chance = Chance(seed);
    let keep_ms = 20_000 + chance.below(200_000);
    let by_size = chance.below(2) == 0;
    let places = [3, 17, 400][chance.below(3) as usize];
    let max_bytes = if by_size { 100_000 } else { 1 << 40 };
    let bench = Bench::new(keep_ms, max_bytes, places);
    let mut history = bench.open();
    // What can be there; of each app in order.
    let mut model: Vec<OutcomeRecord> = Vec::new();
    // Whatever was recorded, in order.
    let mut ever: Vec<OutcomeRecord> = Vec::new();
    let mut troubled = false;
    for _ in 0..60 {
        let now_ms = bench.clock.now().unix_ms;
        match chance.below(12) {
            0 => bench.advance(chance.below(keep_ms / 4)),
            1 => {
                bench.disk.fail_write_in(chance.below(3));
                troubled = true;
            }
            2 => {
                let all = history.list();
                let open = |segment: &&Arc<Segment>| matches!(segment.kind, Kind::Open(_));
                let unsafe_records: u64 = all.iter().filter(open).map(|open| open.records()).sum();
                bench.disk.crash(seed ^ chance.below(1 << 40));
                history = bench.open();
                // An index may be gone, but no record of a sealed segment is.
                let found = both(&history);
                for app in [1, 2] {
                    let there = of_app(&found, app);
                    assert!(
                        is_subsequence(&there, &of_app(&ever, app)),
                        "seed {seed}: untrue"
                    );
                }
                let lost = model.len().saturating_sub(found.len());
                assert!(
                    troubled || lost as u64 <= unsafe_records,
                    "seed {seed}: {lost} of {unsafe_records}"
                );
                model = found;
                troubled = false;
                bench.advance(10_000);
            }
            3 => {
                bench.disk.kill();
                history = bench.open();
            }
            4 => history.seal(),
            _ => {
                let count = chance.below(60);
                let some: Vec<_> = (0..count)
                    .map(|_| OutcomeRecord {
                        app: AppId(1 + chance.below(2) as u32),
                        ping: ping(chance.below(30)),
                        device: device(chance.below(7)),
                        outcome: Outcome::ALL[chance.below(8) as usize],
                        at_ms: now_ms - chance.below(3_000),
                        accepted_ms: None,
                    })
                    .collect();
                model.extend_from_slice(&some);
                ever.extend_from_slice(&some);
                write(&history, some);
            }
        }
        history.turn();
        let now_ms = bench.clock.now().unix_ms;
        let from = now_ms.saturating_sub(keep_ms);
        model.retain(|record| record.at_ms >= from);
        let found = both(&history);
        for app in [1, 2] {
            let (expected, there) = (of_app(&model, app), of_app(&found, app));
            let figures = history.stats();
            if troubled {
                let ever = of_app(&ever, app);
                assert!(is_subsequence(&there, &ever), "seed {seed}: {figures:?}");
            } else if by_size {
                assert!(expected.ends_with(&there), "seed {seed}: {figures:?}");
            } else {
                assert!(expected == there, "seed {seed}: {figures:?}");
            }
        }
        compare(&history, &found, &mut chance, now_ms);
        // What a failed write held back may come yet.
        if !troubled {
            model = found;
            assert_eq!(history.stats().unreadable, 0, "seed {seed}");
        }
    }
}

#[test]
fn random_histories_answer_as_a_list_would() {
    let seeds = std::env::var("BELLWIRE_STORE_SEEDS")
        .ok()
        .and_then(|seeds| seeds.parse().ok())
        .unwrap_or(12);
    match std::env::var("BELLWIRE_STORE_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
    {
        Some(seed) => history_of(seed),
        None => (0..seeds).for_each(history_of),
    }
}
