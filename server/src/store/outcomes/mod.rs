//! How notifications ended, for a day: append-only segments, written lazily, dropped whole.
//!
//! ```text
//!   shards ── record ──▸ queue ── once a second, or when it is half full ──▸ the open segment
//!                          │ full: counted, left out                              │ full, or an eighth of the keeping time old
//!                          ▾                                                      ▾
//!                      overflowed                                        sealed: synced, indexed
//!                                                                                 │ too old, or too much in all
//!                                                                                 ▾
//!                                                                              dropped
//! ```
//!
//! # What it promises
//!
//! Nothing. It answers who asks what became of a ping, of a device's notifications or of a time. The promise is the
//! log's: the outcome of a stored notification is in the frame that removes its row, and with `receipts.durable`
//! that of every other one is in a frame as well. What was in the queue when the process was killed, and what was
//! not synced when the machine went down, is missing here; what the engine knows of it is
//! [written again](History::backfill) at the next start. What is here is true: each record has a sum over what it says and
//! where it stands, and one that does not check is left out, counted and told.
//!
//! That records are missing is a record itself: after an end that was not in order, and after records were left out, a slot
//! says so, and whoever [follows](History::events) is told where (`follow.rs`). A small file beside the segments, the mark, says
//! whether a run is under way and up to where records were dropped.
//!
//! # What keeps it from doing harm
//!
//! - Recording takes a short lock and never waits for a disk. Beyond [`QUEUE_MAX`] records are counted and left out.
//! - Below the reserve of free room nothing is written; the queue waits, then overflows.
//! - A write that fails costs the records in it. The store goes on: nothing here is needed for delivery.
//! - Memory: the queue (4 MiB, twice while it is written), 16 bytes a record of the open segment (4 MiB), the fences of indexes
//!   that were asked (about 0.7 MiB for each GiB of segments).
//! - What a call looks at is limited (`query.rs`, `follow.rs`).
//!
//! # Files
//!
//! `format.rs` has their layout. Each run begins a segment of its own with its first record, and when all are
//! dropped an empty one stays, so no position is ever used twice. Records are never written over; an index is written under another name and renamed. A file that nobody
//! can read is kept until the segment after it is dropped by age, and then set aside; one of another store is never touched.

mod follow;
#[cfg(test)]
mod follow_tests;
mod format;
mod look;
mod mark;
mod query;
mod segment;
#[cfg(test)]
mod tests;

mod backfill;
mod dropping;
mod sealing;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use crate::delivery::{AppId, DeviceId, Mono, PingId};
use crate::ports::{
    Clock, OutcomeFollower, OutcomePage, OutcomeQuery, OutcomeRecord, OutcomeStats,
};
use crate::store::log::disk::Disk;
use crate::store::outcomes::format::{Mark, SLOT, Slots, segment_name};
use crate::store::outcomes::segment::{Kind, Segment};

pub(super) use self::format::DIR;
pub(super) use self::look::{IndexLook, check, look};

/// Records that wait to be written: more than a server ends in a second.
pub(super) const QUEUE_MAX: usize = 65_536;
/// The writer does not wait for its second once so many wait.
const QUEUE_WAKES: usize = QUEUE_MAX / 2;
/// Room of the queue that is kept when a burst is over.
const QUEUE_KEEPS: usize = 4_096;
/// How often the writer writes.
const WRITE_EVERY: Duration = Duration::from_secs(1);
/// How long the writer gathers while somebody follows.
const WRITE_SOON: Duration = Duration::from_millis(20);
/// Largest segment, bytes of records. Smaller ones if less is kept in all, so that it is always dropped in small parts.
const SEGMENT_BYTES: u64 = 16 << 20;
const SEGMENT_BYTES_MIN: u64 = 64 << 10;
/// In how many parts all that is kept is dropped at least, by size and by age.
const PARTS_BY_SIZE: u64 = 16;
const PARTS_BY_AGE: u64 = 8;
/// Most segments: a server that is started every few seconds makes many small ones.
const SEGMENTS_MAX: usize = 16_384;
/// How long the writer waits after a write that failed; what ends meanwhile waits in the queue.
const WRITE_RETRY: Duration = Duration::from_secs(10);
/// How long the writer waits after trouble with a file before it tries that again.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// Records of the engine that one step of a backfill looks at.
pub(super) const BACKFILL_PAGE: usize = 1_000;
/// Most records that a start writes again.
const BACKFILL_MAX: usize = 1_000_000;
/// By how much the times of records may run against their order: an outcome is recorded once its frame is safe.
const SLACK_MS: u64 = 60_000;

/// What is kept.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// For how long, milliseconds.
    keep_ms: u64,
    /// How many bytes.
    max_bytes: u64,
    /// Records of a segment.
    segment_places: u32,
    /// The number of the first segment, where there is none.
    first: u32,
}

impl Rules {
    /// Keeps outcomes for so long and in so many bytes.
    pub(super) fn new(keep: Duration, max_bytes: u64) -> Rules {
        let bytes = (max_bytes / PARTS_BY_SIZE).clamp(SEGMENT_BYTES_MIN, SEGMENT_BYTES);
        Rules {
            keep_ms: u64::try_from(keep.as_millis()).unwrap_or(u64::MAX),
            max_bytes,
            // At most 262,144.
            segment_places: (bytes / SLOT as u64) as u32,
            first: 1,
        }
    }

    /// A history that begins anew begins with the time as its number: a position that somebody still holds of another one
    /// (before a restore, say) is then behind its beginning, and not by accident in the middle of it.
    pub(super) fn beginning_at(self, unix_ms: u64) -> Rules {
        let first = u32::try_from(unix_ms / 1_000).unwrap_or(1).max(1);
        Rules { first, ..self }
    }
}

/// Asks whether free room is below the reserve.
pub(super) type NoRoom = Box<dyn Fn() -> bool + Send + Sync>;

/// A page of what the engine knows: records, and where the next page starts.
pub(super) type EnginePage<C> = (Vec<OutcomeRecord>, Option<C>);

/// The history of outcomes.
pub(super) struct History {
    disk: Arc<dyn Disk>,
    store: [u8; 16],
    clock: Arc<dyn Clock>,
    rules: Rules,
    no_room: NoRoom,
    queue: Mutex<Queue>,
    wake: Condvar,
    /// By number. Whoever looks takes a copy of the list, so that nobody waits for anybody's disk.
    segments: RwLock<BTreeMap<u32, Arc<Segment>>>,
    writing: Mutex<Writing>,
    /// When this run began, Unix milliseconds: what ended before is an earlier run's.
    begun_ms: u64,
    written: AtomicU64,
    overflowed: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    overflow_told: AtomicBool,
    /// The lowest number that a segment which is begun now, by this run or a later one, can have.
    next_number: AtomicU32,
    /// Called when records were written; while there is one they are written at once.
    follower: Mutex<Option<OutcomeFollower>>,
    /// Behind the last record that was ever dropped.
    dropped_to: AtomicU64,
}

#[derive(Default)]
struct Queue {
    records: Vec<OutcomeRecord>,
    /// Somebody follows.
    followed: bool,
    closing: bool,
}

impl Queue {
    /// How many wake the writer before its second is over.
    fn wakes(&self) -> usize {
        if self.followed { 1 } else { QUEUE_WAKES }
    }

    /// Whether the writer does not wait for its second. If it could not write just now, only the end is a reason.
    fn is_due(&self, able: bool) -> bool {
        self.closing || (able && self.records.len() >= self.wakes())
    }
}

/// What only the writer uses.
struct Writing {
    open: Option<Arc<Segment>>,
    /// The number of the next segment; `None`: there are no more numbers.
    next: Option<u32>,
    buffer: Vec<u8>,
    /// Records of this run that were left out, as far as a slot tells of them.
    missing_told: u64,
    /// The run before did not end in order; a slot has to say that.
    owes_crash: bool,
    /// A write failed since that was told last.
    owes_failed: bool,
    /// What the next start is to know.
    mark: Mark,
    /// Trouble is told, and tried again, once a minute.
    write_told: Option<Mono>,
    write_not_before: Mono,
    index_not_before: Mono,
    /// Segments that could not be read to make their index, and when each is tried again.
    unread_until: BTreeMap<u32, Mono>,
    remove_not_before: Mono,
}

impl History {
    /// Looks at what is there. Reads the headers of the files and nothing else.
    pub(super) fn open(
        disk: Arc<dyn Disk>,
        store: [u8; 16],
        clock: Arc<dyn Clock>,
        rules: Rules,
        no_room: NoRoom,
    ) -> io::Result<History> {
        disk.make_dir(DIR)?;
        let mut segments = BTreeMap::new();
        let mut last = 0;
        let files = disk.list(DIR)?;
        for file in &files {
            let Some(number) = format::parse_name(file, ".out") else {
                continue;
            };
            last = last.max(number);
            let segment = Segment::found(&*disk, store, number);
            if let Kind::Unusable(unused) = &segment.kind {
                tracing::error!(
                    file = segment_name(number),
                    why = %unused.why,
                    "a file of outcomes cannot be used and is kept as it is"
                );
            }
            segments.insert(number, Arc::new(segment));
        }
        for file in &files {
            let index = format::parse_name(file, ".idx");
            let unfinished = format::parse_name(file, ".idx.tmp");
            let stray = index.is_some_and(|number| !segments.contains_key(&number));
            if stray || unfinished.is_some() {
                last = last.max(index.or(unfinished).unwrap_or(0));
                // An index can be made again from its records, and without them it leads nowhere.
                if let Err(error) = disk.remove(&format!("{DIR}/{file}")) {
                    tracing::warn!(%error, file, "a superfluous index of outcomes could not be removed");
                }
            }
        }
        let now = clock.now();
        let mark = mark::read(&*disk, store);
        let next = if last == 0 && mark.is_none() {
            Some(rules.first)
        } else {
            last.checked_add(1)
        };
        let mark = mark.unwrap_or_else(|| Mark {
            running: !segments.is_empty(),
            // What is not there may have been, here or in a history before this one.
            dropped_to: follow::position(segments.keys().next().copied().or(next).unwrap_or(0), 0),
        });
        Ok(History {
            disk,
            store,
            clock,
            rules,
            no_room,
            queue: Mutex::default(),
            wake: Condvar::new(),
            segments: RwLock::new(segments),
            writing: Mutex::new(Writing {
                open: None,
                next,
                buffer: Vec::new(),
                missing_told: 0,
                owes_crash: mark.running,
                owes_failed: false,
                mark,
                write_told: None,
                write_not_before: now.mono,
                index_not_before: now.mono,
                unread_until: BTreeMap::new(),
                remove_not_before: now.mono,
            }),
            begun_ms: now.unix_ms,
            written: AtomicU64::new(0),
            overflowed: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            overflow_told: AtomicBool::new(false),
            next_number: AtomicU32::new(next.unwrap_or(u32::MAX)),
            follower: Mutex::default(),
            dropped_to: AtomicU64::new(mark.dropped_to.0),
        })
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes records, to be written within about a second. Never waits for a disk.
    pub(super) fn record(&self, records: &mut Vec<OutcomeRecord>) {
        let mut queue = self.queue();
        let room = QUEUE_MAX.saturating_sub(queue.records.len());
        let fit = if queue.closing {
            0
        } else {
            records.len().min(room)
        };
        let before = queue.records.len();
        queue.records.extend(records.drain(..fit));
        let wakes = before < queue.wakes() && queue.records.len() >= queue.wakes();
        drop(queue);
        if wakes {
            self.wake.notify_all();
        }
        if !records.is_empty() {
            self.overflowed
                .fetch_add(records.len() as u64, Ordering::Relaxed);
            records.clear();
            if !self.overflow_told.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "more notifications end than their history can take: some outcomes are left out of it"
                );
            }
        }
    }

    /// The writer's thread; ends after [`History::close`] with everything written.
    pub(super) fn run(&self) {
        let mut able = true;
        loop {
            let queue = self.queue();
            let (queue, _) = self
                .wake
                .wait_timeout_while(queue, WRITE_EVERY, |queue| !queue.is_due(able))
                .unwrap_or_else(PoisonError::into_inner);
            let closing = queue.closing;
            let gathers = queue.followed && !closing;
            drop(queue);
            if gathers {
                std::thread::sleep(WRITE_SOON);
            }
            // What cannot be written now does not wake it again before its second is over.
            able = self.turn();
            if closing {
                self.seal();
                return;
            }
        }
    }

    /// Nothing more is taken; the writer ends.
    pub(super) fn close(&self) {
        self.queue().closing = true;
        self.wake.notify_all();
    }

    /// One turn of the writer: writes what waits, makes an index, drops what is too old or too much. Answers whether it could
    /// write.
    pub(super) fn turn(&self) -> bool {
        let mut writing = self.writing();
        let able = self.is_able(&writing);
        if able {
            let records = self.take_queue();
            if records.len() < QUEUE_WAKES {
                self.overflow_told.store(false, Ordering::Relaxed);
            }
            // What a crash or a failure took belongs before these, what the queue did not take behind them.
            let owes = writing.owes_crash || writing.owes_failed;
            let told = owes && self.tell_missing(&mut writing);
            self.write(&mut writing, &records);
            let told = self.tell_missing(&mut writing) || told;
            if told || !records.is_empty() {
                self.tell_follower();
            }
        }
        if self.is_long_open(&writing) {
            self.seal_open(&mut writing);
        }
        self.mend(&mut writing);
        self.drop_old(&mut writing);
        able
    }

    fn is_able(&self, writing: &Writing) -> bool {
        !(self.no_room)() && self.clock.now().mono >= writing.write_not_before
    }

    fn take_queue(&self) -> Vec<OutcomeRecord> {
        let mut queue = self.queue();
        let spare = Vec::with_capacity(queue.records.len().min(QUEUE_KEEPS));
        std::mem::replace(&mut queue.records, spare)
    }

    /// Seals the open segment, so that the next start finds everything in order. What waited and could not be written is lost.
    fn seal(&self) {
        let mut writing = self.writing();
        let left = self.take_queue();
        if !left.is_empty() {
            self.failed.fetch_add(left.len() as u64, Ordering::Relaxed);
            tracing::error!(
                outcomes = left.len(),
                "outcomes could not be written to their history before the end and are left out of it"
            );
        }
        self.seal_open(&mut writing);
        self.mend(&mut writing);
        let told = writing.missing_told == self.missing() && !writing.owes_crash;
        if told && self.queue().records.is_empty() {
            self.end_run(&mut writing);
        }
    }

    // ---- Writing -------------------------------------------------------------------------------------------------

    fn write(&self, writing: &mut Writing, mut records: &[OutcomeRecord]) {
        let most = self.rules.segment_places;
        while !records.is_empty() {
            match self.write_some(writing, records, most) {
                Ok(written) => {
                    self.written.fetch_add(written as u64, Ordering::Relaxed);
                    records = &records[written..];
                }
                Err(error) => {
                    self.failed
                        .fetch_add(records.len() as u64, Ordering::Relaxed);
                    let now = self.clock.now().mono;
                    writing.write_not_before = now + WRITE_RETRY;
                    writing.owes_failed = true;
                    // Nothing is written over what this may have left behind.
                    self.seal_open(writing);
                    if writing
                        .write_told
                        .is_none_or(|told| now - told >= RETRY_AFTER)
                    {
                        writing.write_told = Some(now);
                        tracing::error!(
                            %error,
                            "outcomes could not be written to their history and are left out of it; delivery goes on"
                        );
                    }
                    return;
                }
            }
        }
    }

    /// Records of this run that were left out.
    fn missing(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed) + self.failed.load(Ordering::Relaxed)
    }

    /// Writes that records are missing, if that is so and was not written yet; whether it did.
    fn tell_missing(&self, writing: &mut Writing) -> bool {
        let missing = self.missing();
        let crash = writing.owes_crash;
        if (!crash && missing == writing.missing_told)
            || self.clock.now().mono < writing.write_not_before
        {
            return false;
        }
        let count = (!crash).then(|| missing - writing.missing_told);
        match self.write_missing(writing, count) {
            Ok(()) => {
                writing.missing_told = missing;
                writing.owes_crash = false;
                writing.owes_failed = false;
                true
            }
            Err(error) => {
                tracing::debug!(%error, "that outcomes are missing is written with the next ones");
                writing.write_not_before = self.clock.now().mono + WRITE_RETRY;
                false
            }
        }
    }

    fn write_missing(&self, writing: &mut Writing, count: Option<u64>) -> io::Result<()> {
        let segment = match &writing.open {
            Some(segment) => Arc::clone(segment),
            None => self.begin(writing)?,
        };
        let Kind::Open(open) = &segment.kind else {
            writing.open = None;
            return Err(io::Error::other("the segment is not open"));
        };
        let place = open.length();
        let mut slot = Vec::with_capacity(SLOT);
        let now_ms = self.clock.now().unix_ms;
        segment.slots.put_missing(&mut slot, place, now_ms, count);
        let written = open.file.write_at(&slot, format::slot_offset(place));
        if written.is_ok() {
            open.show_missing(now_ms);
        }
        if written.is_err() || open.length() >= self.rules.segment_places {
            // Nothing is written over what a failure may have left behind.
            self.seal_open(writing);
        }
        written
    }

    /// Writes as many as fit into the open segment.
    fn write_some(
        &self,
        writing: &mut Writing,
        records: &[OutcomeRecord],
        most: u32,
    ) -> io::Result<usize> {
        let segment = match &writing.open {
            Some(segment) => Arc::clone(segment),
            None => self.begin(writing)?,
        };
        let Kind::Open(open) = &segment.kind else {
            writing.open = None;
            return Ok(0);
        };
        let first = open.length();
        let count = records.len().min(most.saturating_sub(first) as usize);
        let some = &records[..count];
        let mut buffer = std::mem::take(&mut writing.buffer);
        buffer.clear();
        for (place, record) in (first..).zip(some) {
            segment.slots.put(&mut buffer, place, record);
        }
        let result = open.file.write_at(&buffer, format::slot_offset(first));
        if buffer.capacity() <= QUEUE_KEEPS * SLOT {
            writing.buffer = buffer;
        }
        result?;
        open.show(some);
        if open.length() >= most {
            self.seal_open(writing);
        }
        Ok(count)
    }

    // ---- Dropping ------------------------------------------------------------------------------------------------

    // ---- Asking --------------------------------------------------------------------------------------------------

    /// The segments by rising number.
    fn list(&self) -> Vec<Arc<Segment>> {
        self.segments
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .map(Arc::clone)
            .collect()
    }

    /// The earliest end that is still told.
    fn told_since_ms(&self) -> u64 {
        self.clock.now().unix_ms.saturating_sub(self.rules.keep_ms)
    }

    /// The records that fit a query, a page of them. None that is older than what is kept.
    pub(super) fn query(&self, query: &OutcomeQuery) -> io::Result<OutcomePage> {
        let kept_from_ms = self.told_since_ms();
        let query = OutcomeQuery {
            from_ms: query.from_ms.max(kept_from_ms),
            ..query.clone()
        };
        let page = query::list(&*self.disk, &self.list(), &query)?;
        Ok(OutcomePage {
            kept_from_ms,
            ..page
        })
    }

    /// The records of a ping by device, those after `after`, at most `limit`.
    pub(super) fn of_ping(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> io::Result<Vec<OutcomeRecord>> {
        let segments = self.list();
        query::of_ping(
            &*self.disk,
            &segments,
            app,
            ping,
            self.told_since_ms(),
            after,
            limit,
        )
    }

    pub(super) fn stats(&self) -> OutcomeStats {
        let segments = self.list();
        let mut stats = OutcomeStats {
            segments: segments.len() as u64,
            written: self.written.load(Ordering::Relaxed),
            overflowed: self.overflowed.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            segments_dropped: self.dropped.load(Ordering::Relaxed),
            ..OutcomeStats::default()
        };
        for segment in &segments {
            stats.bytes += segment.bytes();
            stats.records += segment.records();
            stats.unreadable += segment.unreadable();
        }
        let oldest = segments.iter().filter_map(|segment| segment.span());
        stats.oldest_ms = oldest
            .map(|(earliest, _)| earliest)
            .min()
            .map_or(0, |oldest| oldest.max(self.told_since_ms()));
        stats
    }

    // ---- After a crash -------------------------------------------------------------------------------------------
}

/// For a fuzzer and the corpus: reads bytes as each of the things that a file holds.
pub(super) fn read_anything(data: &[u8]) {
    let slots = Slots::new([7; 16], 1);
    let _ = slots.read(0, data);
    let _ = format::page(slots, 0, data);
    let _ = format::fences(slots, data);
    if let Some(header) = data.first_chunk() {
        let _ = format::check_header(header, [7; 16], 1);
        let _ = format::check_index_header(header, [7; 16], 1);
    }
}
