//! From the log into the engine, a little later.
//!
//! Frames wait in a queue, in order. The applier takes as many as there are, up to a bound, and merges them: of several writes
//! of one key only the last is done, and a row that came and went in between never reaches the engine. So the
//! further the engine is behind, the cheaper a frame becomes.
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

/// Most bytes of frames that are merged into one run.
const RUN_BYTES: usize = 8 << 20;

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
    pub(super) time: Duration,
}

/// Frames on their way, and how far behind that makes the engine.
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    limit: LagLimit,
}

#[derive(Default)]
struct QueueState {
    frames: VecDeque<SafeFrame>,
    /// Bytes of all frames not yet applied, those in the applier's hands included.
    bytes: u64,
    /// When the oldest of them became safe.
    oldest: Option<Mono>,
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

    pub(super) fn new(limit: LagLimit, applied: u64) -> Queue {
        Queue {
            state: Mutex::new(QueueState {
                applied,
                ..QueueState::default()
            }),
            changed: Condvar::new(),
            limit,
        }
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, frame: SafeFrame) {
        let mut state = self.lock();
        state.bytes += frame.bytes as u64;
        state.oldest.get_or_insert(frame.at);
        state.frames.push_back(frame);
        self.changed.notify_all();
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

    /// Whether it is behind by half of that, or more.
    pub(super) fn crowded(&self, now: Mono) -> bool {
        let (bytes, time) = self.lag(now);
        bytes >= self.limit.bytes / 2 || time >= self.limit.time / 2
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

    fn take(state: &mut QueueState) -> Vec<SafeFrame> {
        let mut run = Vec::new();
        let mut bytes = 0;
        while let Some(frame) = state.frames.front() {
            if !run.is_empty() && bytes + frame.bytes > RUN_BYTES {
                break;
            }
            bytes += frame.bytes;
            run.extend(state.frames.pop_front());
        }
        run
    }

    fn done(&self, run: &[SafeFrame]) {
        let mut state = self.lock();
        state.bytes -= run.iter().map(|frame| frame.bytes as u64).sum::<u64>();
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
            unflushed: 0,
            flushed_at,
        }
    }

    /// Runs until the queue is closed and empty. `caught_up` is called after every run.
    pub(super) fn run(mut self, queue: &Queue, caught_up: &dyn Fn()) {
        loop {
            let (run, closing) = {
                let mut state = queue.lock();
                loop {
                    if !state.frames.is_empty() && (!state.paused || state.closing) {
                        break;
                    }
                    if state.closing {
                        return;
                    }
                    if self.unflushed == 0 {
                        state = queue
                            .changed
                            .wait(state)
                            .unwrap_or_else(PoisonError::into_inner);
                    } else {
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
                    }
                }
                (Queue::take(&mut state), state.closing)
            };
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
            queue.done(&run);
            caught_up();
        }
    }

    /// Applies what is in the queue, on this thread. Answers the number of frames.
    pub(super) fn step(&mut self, queue: &Queue) -> Result<usize, EngineError> {
        let run = Queue::take(&mut queue.lock());
        if !run.is_empty() {
            self.apply(&run)?;
            queue.done(&run);
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
        self.elide = true;
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
