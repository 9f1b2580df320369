//! From the log into the engine, a little later.
//!
//! Frames wait in a queue, in order. The applier takes as many as there are, up to a bound, and merges them: of several writes
//! of one key only the last is done, and a row that came and went in between never reaches the engine. So the
//! further the engine is behind, the cheaper a frame becomes.
//!
//! That is why frames rest before they are taken (`docs/decisions/0043`): until the oldest is of a certain age, or until they
//! come to so many bytes, or until the store is closed. What a device acknowledges within that time costs the
//! engine nothing but its outcome. Nobody waits for it: readers see the overlay, a snapshot and a backup begin at the engine's
//! position, and the log keeps what is behind that. While frames rest the applier sleeps; only a first frame and the last of
//! enough bytes wake it.
//!
//! A merged run goes into the engine in batches of bounded size, in the order of its keys, and only the last batch carries the
//! position. A process that dies in between finds some keys of the run written and the position before it; the
//! replay then does the whole run again, which ends in the same state because writes are absolute
//! (`docs/decisions/0002`). Only one shortcut is not allowed in a replay: leaving out a deletion because the run
//! itself contains the insertion. An earlier try, with a shorter run, may have brought that insertion into the engine.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::{Bound, ControlFlow};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::engine::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite};
use super::keys;
use super::overlay::Overlay;
use super::record::{self, Pair, PairStored};
use super::write::Write;
use crate::delivery::{DeviceId, Mono, Outcome, PingId, RowKey};
use crate::ports::Clock;

/// Most bytes of frames that are merged into one run while others wait for the engine: room comes back when a run is done.
const RUN_BYTES: usize = 8 << 20;

/// The same while the engine is slow.
const RUN_BYTES_MIN: usize = 256 << 10;

/// Most bytes that rest, and that are merged into one run while nobody waits for it.
const REST_BYTES: usize = 16 << 20;

/// Which part of what the engine may be behind may rest: bursts keep the room of the others.
const REST_PART: u64 = 4;

/// Most bytes of values in one batch.
const BATCH_BYTES: usize = 4 << 20;

/// Bytes after which the engine hands what it buffers to the operating system.
const FLUSH_BYTES: usize = 8 << 20;

/// Time after which it does so anyway. What was not flushed is replayed from the log after a kill.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// How long the applier waits before it tries an engine again that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A frame that is safe, on its way into the engine.
#[derive(Debug)]
pub(super) struct SafeFrame {
    pub(super) number: u64,
    pub(super) writes: Vec<Write>,
    /// Its size in the log.
    pub(super) bytes: usize,
    /// When it became safe.
    pub(super) at: Mono,
}

/// How far the engine may be behind.
#[derive(Debug, Clone, Copy)]
pub(super) struct LagLimit {
    pub(super) bytes: u64,
    /// Age of the oldest frame that it does not have, and the time that it will take for all of them.
    pub(super) time: Duration,
}

/// Fewest bytes of a run that shows how fast the engine is.
const PACE_BYTES: u64 = 64 << 10;

/// Which part of the time that the engine may be behind a run takes at most while it is behind by more than half of it: those who wait for it
/// go on when a run is done.
const RUN_PART: u32 = 8;

/// Frames on their way, and how far behind that makes the engine.
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    limit: LagLimit,
    /// How old the oldest frame becomes before it is taken, unless there are so many bytes before.
    rest: Duration,
    rest_bytes: usize,
}

#[derive(Default)]
struct QueueState {
    frames: VecDeque<SafeFrame>,
    /// Bytes of all frames not yet applied, those in the applier's hands included.
    bytes: u64,
    /// Bytes of those that nobody has taken yet.
    waiting: usize,
    /// When the oldest of them became safe.
    oldest: Option<Mono>,
    /// Nanoseconds that the engine took for a byte of late; 0 as long as that is not known.
    pace: f64,
    applied: u64,
    closing: bool,
    /// Held by a test that wants to see the lag.
    paused: bool,
}

impl Queue {
    /// How far the engine may be behind.
    pub(super) fn limit(&self) -> &LagLimit {
        &self.limit
    }

    /// A queue behind the frame `applied`, in which frames rest for a time. The limit counts that time as well.
    pub(super) fn new(limit: LagLimit, rest: Duration, applied: u64) -> Queue {
        let rest_bytes = usize::try_from(limit.bytes / REST_PART).unwrap_or(usize::MAX);
        Queue {
            state: Mutex::new(QueueState {
                applied,
                ..QueueState::default()
            }),
            changed: Condvar::new(),
            limit,
            rest,
            rest_bytes: rest_bytes.min(REST_BYTES),
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, frame: SafeFrame) {
        let mut state = self.lock();
        let enough = state.waiting >= self.rest_bytes;
        state.bytes += frame.bytes as u64;
        state.waiting += frame.bytes;
        state.oldest.get_or_insert(frame.at);
        state.frames.push_back(frame);
        // Whoever rests for others is not woken by each of them.
        if state.frames.len() == 1 || (!enough && state.waiting >= self.rest_bytes) {
            self.changed.notify_all();
        }
    }

    /// How long the frames that wait may still rest.
    fn rest_left(&self, state: &QueueState, now: Mono) -> Duration {
        match state.frames.front() {
            Some(frame) if state.waiting < self.rest_bytes => {
                self.rest.saturating_sub(now - frame.at)
            }
            Some(_) | None => Duration::ZERO,
        }
    }

    /// Bytes behind, and for how long.
    pub(super) fn lag(&self, now: Mono) -> (u64, Duration) {
        let state = self.lock();
        (
            state.bytes,
            state.oldest.map_or(Duration::ZERO, |oldest| now - oldest),
        )
    }

    /// Whether the engine is too far behind for new work.
    pub(super) fn behind(&self, now: Mono) -> bool {
        let (bytes, time) = self.lag(now);
        bytes >= self.limit.bytes || time >= self.limit.time
    }

    /// Whether new work waits: the engine is too far behind, or will be when it comes to the last frame. If only the age of the
    /// oldest counted, a burst would be let in as a whole, and whoever comes after it would wait until the engine has nearly all
    /// of it.
    pub(super) fn holds(&self, now: Mono) -> bool {
        self.behind(now) || self.takes_long(&self.lock(), 1)
    }

    /// Whether the engine will take one `part` of the time that it may be behind for what it does not have yet.
    fn takes_long(&self, state: &QueueState, part: u32) -> bool {
        state.pace * state.bytes as f64 >= (self.limit.time / part).as_nanos() as f64
    }

    /// Whether it is behind by half of what it may be beyond the rest, or more. What rests within its own bounds is no lag: a server
    /// that has nothing to catch up with is never crowded.
    pub(super) fn crowded(&self, now: Mono) -> bool {
        let (bytes, time) = self.lag(now);
        let resting = if self.rest.is_zero() {
            0
        } else {
            self.rest_bytes as u64
        };
        bytes.saturating_sub(resting) >= self.limit.bytes.saturating_sub(resting) / 2
            || time.saturating_sub(self.rest) >= self.limit.time.saturating_sub(self.rest) / 2
    }

    /// Frames that nobody has taken yet.
    pub(super) fn waiting(&self) -> usize {
        self.lock().frames.len()
    }

    /// The last frame that the engine has.
    pub(super) fn applied(&self) -> u64 {
        self.lock().applied
    }

    /// Lets the applier finish what is there and end.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// Holds the applier, or lets it go on. For tests that want to see the lag.
    #[cfg(test)]
    pub(super) fn pause(&self, paused: bool) {
        self.lock().paused = paused;
        self.changed.notify_all();
    }

    /// The next run.
    pub(super) fn take(&self) -> Vec<SafeFrame> {
        self.take_from(&mut self.lock())
    }

    fn take_from(&self, state: &mut QueueState) -> Vec<SafeFrame> {
        let most = if self.takes_long(state, 2) {
            let bytes = (self.limit.time / RUN_PART).as_nanos() as f64 / state.pace.max(1e-3);
            // A float that is too large becomes the largest number.
            (bytes as usize).clamp(RUN_BYTES_MIN, RUN_BYTES)
        } else if state.bytes >= self.limit.bytes / 2 {
            RUN_BYTES
        } else {
            REST_BYTES
        };
        let mut run = Vec::new();
        let mut bytes = 0;
        while let Some(frame) = state.frames.front() {
            if !run.is_empty() && bytes + frame.bytes > most {
                break;
            }
            bytes += frame.bytes;
            run.extend(state.frames.pop_front());
        }
        state.waiting -= bytes;
        run
    }

    /// A run is in the engine, which took so long for it.
    pub(super) fn done(&self, run: &[SafeFrame], took: Duration) {
        let mut state = self.lock();
        let bytes = run.iter().map(|frame| frame.bytes as u64).sum::<u64>();
        if bytes >= PACE_BYTES {
            let pace = took.as_nanos() as f64 / bytes as f64;
            state.pace = f64::midpoint(state.pace, pace);
        }
        state.bytes -= bytes;
        state.oldest = state.frames.front().map(|frame| frame.at);
        if let Some(last) = run.last() {
            state.applied = last.number;
        }
    }
}

/// Brings frames into the engine. One per engine.
pub(super) struct Applier {
    engine: Arc<dyn Engine>,
    overlay: Arc<Overlay>,
    clock: Arc<dyn Clock>,
    /// Whether an insertion and its deletion in one run may both be left out: not in a replay, and not after an error.
    elide: bool,
    /// Whether it may be done at all with this engine.
    proven: bool,
    unflushed: usize,
    flushed_at: Mono,
}

impl Applier {
    /// An applier that takes over right behind the last replayed frame.
    pub(super) fn new(
        engine: Arc<dyn Engine>,
        overlay: Arc<Overlay>,
        clock: Arc<dyn Clock>,
    ) -> Applier {
        let flushed_at = clock.now().mono;
        Applier {
            engine,
            overlay,
            clock,
            elide: true,
            proven: true,
            unflushed: 0,
            flushed_at,
        }
    }

    /// The engine may hold rows of frames that the log has lost, under numbers that are given again: nothing is left out with it.
    pub(super) fn doubtful(self) -> Applier {
        Applier {
            elide: false,
            proven: false,
            ..self
        }
    }

    /// Runs until the queue is closed and empty. `caught_up` is called after every run.
    pub(super) fn run(mut self, queue: &Queue, caught_up: &dyn Fn()) {
        loop {
            let Some((run, closing)) = self.wait(queue) else {
                return;
            };
            let began = self.clock.now().mono;
            let mut tries = 0u64;
            while let Err(error) = self.apply(&run) {
                // Said at once, then once a minute: somebody must act, but the log must not fill the disk as well.
                if tries.is_multiple_of(60) {
                    tracing::error!(%error, tries, "the engine cannot take what is safe in the log; new work will wait. \
                        Nothing is lost: restart the server once the cause is gone");
                }
                tries += 1;
                let state = queue.lock();
                if closing || state.closing {
                    // The next start replays it.
                    return;
                }
                drop(
                    queue
                        .changed
                        .wait_timeout(state, RETRY_AFTER)
                        .unwrap_or_else(PoisonError::into_inner),
                );
            }
            queue.done(&run, self.clock.now().mono - began);
            caught_up();
        }
    }

    /// Waits until frames have rested, and takes a run of them; with it whether the queue is being closed. `None`: it is closed
    /// and empty.
    fn wait(&mut self, queue: &Queue) -> Option<(Vec<SafeFrame>, bool)> {
        let mut state = queue.lock();
        loop {
            if state.closing {
                if state.frames.is_empty() {
                    return None;
                }
                break;
            }
            if state.frames.is_empty() || state.paused {
                if self.unflushed == 0 {
                    state = queue
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                    continue;
                }
                let (guard, waited) = queue
                    .changed
                    .wait_timeout(state, FLUSH_EVERY)
                    .unwrap_or_else(PoisonError::into_inner);
                state = guard;
                if waited.timed_out() {
                    drop(state);
                    self.flush();
                    state = queue.lock();
                }
                continue;
            }
            let left = queue.rest_left(&state, self.clock.now().mono);
            if left.is_zero() {
                break;
            }
            let (guard, waited) = queue
                .changed
                .wait_timeout_while(state, left, |state| {
                    !state.closing && !state.paused && state.waiting < queue.rest_bytes
                })
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            // Waited for, and not looked at again: however the clock runs, frames do not rest for ever.
            if waited.timed_out() {
                break;
            }
        }
        Some((queue.take_from(&mut state), state.closing))
    }

    /// Applies what is in the queue, on this thread. Answers the number of frames.
    pub(super) fn step(&mut self, queue: &Queue) -> Result<usize, EngineError> {
        let run = queue.take();
        if !run.is_empty() {
            let began = self.clock.now().mono;
            self.apply(&run)?;
            queue.done(&run, self.clock.now().mono - began);
        }
        Ok(run.len())
    }

    fn apply(&mut self, run: &[SafeFrame]) -> Result<(), EngineError> {
        let Some(last) = run.last() else {
            return Ok(());
        };
        let writes = run.iter().flat_map(|frame| &frame.writes);
        let elide = std::mem::replace(&mut self.elide, false);
        apply_run(&*self.engine, writes, last.number + 1, elide)?;
        self.elide = self.proven;
        for frame in run {
            self.overlay.remove(last.number, &frame.writes);
            self.unflushed += frame.bytes;
        }
        if self.unflushed >= FLUSH_BYTES || self.clock.now().mono - self.flushed_at >= FLUSH_EVERY {
            self.flush();
        }
        Ok(())
    }

    fn flush(&mut self) {
        if let Err(error) = self.engine.flush() {
            // Nothing rests on it: after a kill the log replays more.
            tracing::warn!(%error, "the engine could not flush");
        }
        self.unflushed = 0;
        self.flushed_at = self.clock.now().mono;
    }
}

/// Applies the writes of consecutive frames, the last of which is `next - 1`. `elide`: the engine is known to hold
/// nothing of them yet.
pub(super) fn apply_run<'a>(
    engine: &dyn Engine,
    writes: impl Iterator<Item = &'a Write>,
    next: u64,
    elide: bool,
) -> Result<(), EngineError> {
    let merged = Merged::of(writes, elide).judged(engine)?;
    let mut batch = Vec::with_capacity(BATCH_OPERATIONS);
    let mut bytes = 0;
    for (key, value) in merged {
        let size = key.len() + value.as_ref().map_or(0, Bytes::len);
        // One place is left for the position.
        if batch.len() + 1 >= BATCH_OPERATIONS || (bytes + size > BATCH_BYTES && bytes > 0) {
            engine.apply(&batch, None)?;
            batch.clear();
            bytes = 0;
        }
        bytes += size;
        batch.push(EngineWrite { key, value });
    }
    engine.apply(&batch, Some(next))
}

/// What a run of frames comes to.
#[derive(Default)]
struct Merged {
    writes: BTreeMap<Bytes, Option<Bytes>>,
    settle: Vec<(u64, PingId, DeviceId, RowKey)>,
    receipts: Vec<(u64, PingId, DeviceId)>,
    collect: BTreeSet<PingId>,
}

impl Merged {
    fn of<'a>(writes: impl Iterator<Item = &'a Write>, elide: bool) -> Merged {
        let mut merged = Merged::default();
        for write in writes {
            match write {
                Write::Put { key, value } => {
                    merged.writes.insert(key.clone(), Some(value.clone()));
                }
                Write::Delete { key } => match merged.writes.entry(key.clone()) {
                    Entry::Occupied(mut entry) => {
                        if elide && entry.get().is_some() && keys::is_written_once(key) {
                            entry.remove();
                        } else {
                            entry.insert(None);
                        }
                    }
                    Entry::Vacant(entry) => {
                        entry.insert(None);
                    }
                },
                Write::Collect { ping } => {
                    merged.collect.insert(*ping);
                }
                Write::DropReceipt {
                    at_ms,
                    ping,
                    device,
                } => merged.receipts.push((*at_ms, *ping, *device)),
                Write::Settle {
                    expires_ms,
                    ping,
                    device,
                    row,
                } => merged.settle.push((*expires_ms, *ping, *device, *row)),
            }
        }
        merged
    }

    /// Judges the rules by the state at the end of the run. Judging them all there, and not each in its frame, comes to
    /// the same: `docs/decisions/0003` goes through the cases.
    fn judged(
        mut self,
        engine: &dyn Engine,
    ) -> Result<BTreeMap<Bytes, Option<Bytes>>, EngineError> {
        for (expires_ms, ping, device, row) in std::mem::take(&mut self.settle) {
            let key = keys::pair(ping, device);
            if let Some(Pair {
                app,
                state: PairStored::Waiting { row: waits, .. },
            }) = self.pair(engine, &key)?
                && waits == row
            {
                let ended = Pair {
                    app,
                    state: PairStored::Ended {
                        outcome: Outcome::Expired,
                        at_ms: expires_ms,
                    },
                };
                let mut value = Vec::new();
                record::put_pair(&key, &mut value, ended);
                self.writes
                    .insert(Bytes::copy_from_slice(&key), Some(value.into()));
            }
        }
        for (at, ping, device) in std::mem::take(&mut self.receipts) {
            let key = keys::pair(ping, device);
            if let Some(PairStored::Ended { at_ms, .. }) =
                self.pair(engine, &key)?.map(|pair| pair.state)
                && at_ms == at
            {
                self.writes.insert(Bytes::copy_from_slice(&key), None);
            }
        }
        for ping in std::mem::take(&mut self.collect) {
            if !self.waits(engine, ping)? {
                self.writes
                    .insert(Bytes::copy_from_slice(&keys::body(ping)), None);
            }
        }
        Ok(self.writes)
    }

    fn pair(&self, engine: &dyn Engine, key: &[u8]) -> Result<Option<Pair>, EngineError> {
        let value = match self.writes.get(key) {
            Some(value) => value.clone(),
            None => engine.get(key)?,
        };
        // A rotten one is left as it is: it says nothing, and readers set it aside.
        Ok(value.and_then(|value| record::pair(key, &value).ok()))
    }

    /// Whether a notification of the ping still waits. One that cannot be read may.
    fn waits(&self, engine: &dyn Engine, ping: PingId) -> Result<bool, EngineError> {
        let waiting = |key: &[u8], value: &[u8]| {
            record::pair(key, value).map_or(true, |pair| {
                matches!(pair.state, PairStored::Waiting { .. })
            })
        };
        let (from, to) = (keys::pairs(ping), keys::pairs(ping).end());
        let range = (Bound::Included(&*from), Bound::Excluded(&*to));
        let mut waits = self
            .writes
            .range::<[u8], _>(range)
            .any(|(key, value)| value.as_ref().is_some_and(|value| waiting(key, value)));
        if !waits {
            engine.scan(&*from..&*to, Direction::Up, &mut |key, value| {
                if !self.writes.contains_key(key) && waiting(key, value) {
                    waits = true;
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            })?;
        }
        Ok(waits)
    }
}
