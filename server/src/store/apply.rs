//! From the log into the engine, a little later.
//!
//! Frames wait in order, and what they come to is gathered in layers (`layer.rs`), which readers see meanwhile. The applier takes
//! the oldest layer as one run: of several writes of one key only the last is done, and a row that came and went in between never
//! reaches the engine. So the further the engine is behind, the cheaper a frame becomes. The queue here knows how many bytes
//! wait and since when.
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

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;

use super::engine::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite};
use super::keys;
use super::layer::Layer;
use super::overlay::Overlay;
use super::record::{self, Pair, PairStored};
use super::write::Write;
use crate::delivery::{Mono, Outcome, PingId};
use crate::ports::Clock;

/// Most bytes of frames that rest, and that are one run. Room for others comes back when a run is done.
const RUN_BYTES: usize = 16 << 20;

/// What a run may have however slow the engine is.
const RUN_BYTES_MIN: usize = 256 << 10;

/// Which part of the bytes that the engine may be behind a run is at most: bursts keep the room of the others.
const RUN_PART_OF_BYTES: u64 = 4;

/// Which part of the time that the engine may be behind a run takes at most: those who wait for it go on when a run is done.
const RUN_PART_OF_TIME: u32 = 8;

/// Most bytes of values in one batch.
const BATCH_BYTES: usize = 4 << 20;

/// Bytes after which the engine hands what it buffers to the operating system.
const FLUSH_BYTES: usize = 8 << 20;

/// Time after which it does so anyway. What was not flushed is replayed from the log after a kill.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// How long the applier waits before it tries an engine again that failed.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A frame that is safe, on its way into the engine. What it says is in a layer of the overlay.
#[derive(Debug)]
pub(super) struct SafeFrame {
    pub(super) number: u64,
    /// Its size in the log.
    pub(super) bytes: usize,
    /// When it became safe.
    pub(super) at: Mono,
}

/// How far the engine may be behind.
#[derive(Debug, Clone, Copy)]
pub(super) struct LagLimit {
    pub(super) bytes: u64,
    /// Age of the oldest frame that it does not have.
    pub(super) time: Duration,
}

/// Fewest bytes of a run that shows how fast the engine is.
const PACE_BYTES: usize = 64 << 10;

/// Frames on their way, and how far behind that makes the engine.
pub(super) struct Queue {
    state: Mutex<QueueState>,
    changed: Condvar,
    limit: LagLimit,
    /// How old the oldest frame becomes before it is taken, unless there are so many bytes before.
    rest: Duration,
    /// Bytes of a run at most, with an engine that is quick enough for them.
    run_bytes_max: usize,
}

/// A layer in the applier's hands, and how many frames it is made of.
struct Run {
    layer: Arc<Layer>,
    frames: usize,
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
    /// Bytes of a run at most, as quick as the engine is.
    run_bytes: usize,
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
        let part = usize::try_from(limit.bytes / RUN_PART_OF_BYTES).unwrap_or(usize::MAX);
        let run_bytes_max = part.min(RUN_BYTES);
        Queue {
            state: Mutex::new(QueueState {
                applied,
                run_bytes: run_bytes_max,
                ..QueueState::default()
            }),
            changed: Condvar::new(),
            limit,
            rest,
            run_bytes_max,
        }
    }

    /// Bytes of frames from which on they do not rest, and of which a layer is to be at most.
    pub(super) fn run_bytes(&self) -> usize {
        self.lock().run_bytes
    }

    fn lock(&self) -> MutexGuard<'_, QueueState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame that is being shown (`Showing`).
    pub(super) fn push(&self, frame: SafeFrame) {
        let mut state = self.lock();
        let enough = state.waiting >= state.run_bytes;
        state.bytes += frame.bytes as u64;
        state.waiting += frame.bytes;
        state.oldest.get_or_insert(frame.at);
        state.frames.push_back(frame);
        // Whoever rests for others is not woken by each of them.
        if state.frames.len() == 1 || (!enough && state.waiting >= state.run_bytes) {
            self.changed.notify_all();
        }
    }

    /// How long the frames that wait may still rest.
    fn rest_left(&self, state: &QueueState, now: Mono) -> Duration {
        match state.frames.front() {
            Some(frame) if state.waiting < state.run_bytes => {
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
        self.is_behind(&self.lock(), now)
    }

    fn is_behind(&self, state: &QueueState, now: Mono) -> bool {
        let time = state.oldest.map_or(Duration::ZERO, |oldest| now - oldest);
        state.bytes >= self.limit.bytes || time >= self.limit.time
    }

    /// Whether new work waits: the engine is too far behind, or would take too long for what it does not have yet. If only the age of
    /// the oldest counted, a burst would be let in as a whole, and whoever comes after it would wait until the engine has nearly all
    /// of it. The age comes to its limit only if the engine is slower than it was.
    pub(super) fn holds(&self, now: Mono) -> bool {
        let state = self.lock();
        let takes = state.pace * state.bytes as f64;
        takes >= self.time().as_nanos() as f64 || self.is_behind(&state, now)
    }

    /// How long the engine may take for what it does not have yet: the limit without the rest.
    fn time(&self) -> Duration {
        self.limit.time.saturating_sub(self.rest)
    }

    /// Whether it is behind by half of what it may be beyond the rest, or more. What rests within its own bounds is no lag: a server
    /// that has nothing to catch up with is never crowded.
    pub(super) fn crowded(&self, now: Mono) -> bool {
        let (bytes, time) = self.lag(now);
        let resting = if self.rest.is_zero() {
            0
        } else {
            self.run_bytes_max as u64
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

    /// Takes the frames of a layer; answers how many they are.
    fn take(&self, layer: &Layer) -> usize {
        let mut state = self.lock();
        let frames = state
            .frames
            .partition_point(|frame| frame.number <= layer.last());
        let bytes: usize = state.frames.drain(..frames).map(|frame| frame.bytes).sum();
        state.waiting -= bytes;
        frames
    }

    /// The engine has a run of so many bytes up to the frame `last`, and took so long for it.
    pub(super) fn done(&self, last: u64, bytes: usize, took: Duration) {
        let mut state = self.lock();
        if bytes >= PACE_BYTES {
            let pace = took.as_nanos() as f64 / bytes as f64;
            state.pace = f64::midpoint(state.pace, pace);
            let most = (self.time() / RUN_PART_OF_TIME).as_nanos() as f64 / state.pace.max(1e-3);
            // A float that is too large becomes the largest number.
            state.run_bytes = (most as usize).max(RUN_BYTES_MIN).min(self.run_bytes_max);
        }
        state.bytes -= bytes as u64;
        state.oldest = state.frames.front().map(|frame| frame.at);
        state.applied = last;
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
            let Some(closing) = self.wait(queue) else {
                return;
            };
            let Some(run) = self.take(queue) else {
                continue;
            };
            let began = self.clock.now().mono;
            let mut tries = 0u64;
            while let Err(error) = self.apply(&run.layer) {
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
            self.done(queue, run, self.clock.now().mono - began);
            caught_up();
        }
    }

    /// The oldest layer, and its frames out of the queue: at once, because a frame comes into both at once.
    fn take(&self, queue: &Queue) -> Option<Run> {
        let (layer, frames) = self.overlay.take(|layer| queue.take(layer))?;
        Some(Run { layer, frames })
    }

    /// The engine has it.
    fn done(&self, queue: &Queue, run: Run, took: Duration) {
        self.overlay.remove(&run.layer);
        queue.done(run.layer.last(), run.layer.bytes(), took);
        // Its last holder lets go of it here, with all its keys, while nobody waits.
        drop(run);
    }

    /// Waits until frames have rested; answers whether the queue is being closed. `None`: it is closed and empty.
    fn wait(&mut self, queue: &Queue) -> Option<bool> {
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
                    !state.closing && !state.paused && state.waiting < state.run_bytes
                })
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            // Waited for, and not looked at again: however the clock runs, frames do not rest for ever.
            if waited.timed_out() {
                break;
            }
        }
        Some(state.closing)
    }

    /// Applies the oldest layer, on this thread. Answers the number of its frames.
    pub(super) fn step(&mut self, queue: &Queue) -> Result<usize, EngineError> {
        let Some(run) = self.take(queue) else {
            return Ok(0);
        };
        let began = self.clock.now().mono;
        self.apply(&run.layer)?;
        let frames = run.frames;
        self.done(queue, run, self.clock.now().mono - began);
        Ok(frames)
    }

    fn apply(&mut self, layer: &Layer) -> Result<(), EngineError> {
        let elide = std::mem::replace(&mut self.elide, false);
        apply_layer(&*self.engine, layer, layer.last() + 1, elide)?;
        self.elide = self.proven;
        self.unflushed += layer.bytes();
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
    let mut layer = Layer::default();
    writes.for_each(|write| layer.write(write.clone()));
    apply_layer(engine, &layer, next, elide)
}

/// As [`apply_run`], of what they come to.
fn apply_layer(
    engine: &dyn Engine,
    layer: &Layer,
    next: u64,
    elide: bool,
) -> Result<(), EngineError> {
    let mut ruled = Judge::new(engine, layer).judged()?.into_iter().peekable();
    let mut batches = Batches {
        engine,
        batch: Vec::with_capacity(BATCH_OPERATIONS),
        bytes: 0,
    };
    for (key, entry) in layer.entries() {
        while let Some((before, value)) = ruled.next_if(|(ruled, _)| ruled < key) {
            batches.add(before, value)?;
        }
        if let Some((key, value)) = ruled.next_if(|(ruled, _)| ruled == key) {
            batches.add(key, value)?;
        } else if !(elide && entry.came_and_went(key)) {
            batches.add(key.clone(), entry.value.clone())?;
        }
    }
    for (key, value) in ruled {
        batches.add(key, value)?;
    }
    engine.apply(&batches.batch, Some(next))
}

/// Writes on their way, in batches of bounded size.
struct Batches<'a> {
    engine: &'a dyn Engine,
    batch: Vec<EngineWrite>,
    bytes: usize,
}

impl Batches<'_> {
    fn add(&mut self, key: Bytes, value: Option<Bytes>) -> Result<(), EngineError> {
        let size = key.len() + value.as_ref().map_or(0, Bytes::len);
        // One place is left for the position.
        let full = self.batch.len() + 1 >= BATCH_OPERATIONS;
        if full || (self.bytes + size > BATCH_BYTES && self.bytes > 0) {
            self.engine.apply(&self.batch, None)?;
            self.batch.clear();
            self.bytes = 0;
        }
        self.bytes += size;
        self.batch.push(EngineWrite { key, value });
        Ok(())
    }
}

/// Judges the rules of a layer by the state at its end. Judging them all there, and not each in its frame, comes to
/// the same: `docs/decisions/0003` goes through the cases.
struct Judge<'a> {
    engine: &'a dyn Engine,
    layer: &'a Layer,
    /// What the rules say so far, on top of the layer.
    ruled: BTreeMap<Bytes, Option<Bytes>>,
}

impl<'a> Judge<'a> {
    fn new(engine: &'a dyn Engine, layer: &'a Layer) -> Judge<'a> {
        Judge {
            engine,
            layer,
            ruled: BTreeMap::new(),
        }
    }

    fn judged(mut self) -> Result<BTreeMap<Bytes, Option<Bytes>>, EngineError> {
        let rules = self.layer.rules();
        for rule in rules {
            let Write::Settle {
                expires_ms,
                ping,
                device,
                row,
            } = rule
            else {
                continue;
            };
            let key = keys::pair(*ping, *device);
            if let Some(Pair {
                app,
                state: PairStored::Waiting { row: waits, .. },
            }) = self.pair(&key)?
                && waits == *row
            {
                let ended = Pair {
                    app,
                    state: PairStored::Ended {
                        outcome: Outcome::Expired,
                        at_ms: *expires_ms,
                    },
                };
                let mut value = Vec::new();
                record::put_pair(&key, &mut value, ended);
                self.rule(&key, Some(value.into()));
            }
        }
        for rule in rules {
            let Write::DropReceipt {
                at_ms: at,
                ping,
                device,
            } = rule
            else {
                continue;
            };
            let key = keys::pair(*ping, *device);
            if let Some(PairStored::Ended { at_ms, .. }) = self.pair(&key)?.map(|pair| pair.state)
                && at_ms == *at
            {
                self.rule(&key, None);
            }
        }
        let collect: BTreeSet<PingId> = rules
            .iter()
            .filter_map(|rule| match rule {
                Write::Collect { ping } => Some(*ping),
                Write::Put { .. }
                | Write::Delete { .. }
                | Write::DropReceipt { .. }
                | Write::Settle { .. } => None,
            })
            .collect();
        for ping in collect {
            if !self.waits(ping)? {
                self.rule(&keys::body(ping), None);
            }
        }
        Ok(self.ruled)
    }

    fn rule(&mut self, key: &[u8], value: Option<Bytes>) {
        self.ruled.insert(Bytes::copy_from_slice(key), value);
    }

    /// What rules and layer say of a key; `None`: nothing, so the engine is asked.
    fn said(&self, key: &[u8]) -> Option<&Option<Bytes>> {
        let ruled = self.ruled.get(key);
        ruled.or_else(|| self.layer.get(key).map(|entry| &entry.value))
    }

    fn pair(&self, key: &[u8]) -> Result<Option<Pair>, EngineError> {
        let value = match self.said(key) {
            Some(value) => value.clone(),
            None => self.engine.get(key)?,
        };
        // A rotten one is left as it is: it says nothing, and readers set it aside.
        Ok(value.and_then(|value| record::pair(key, &value).ok()))
    }

    /// Whether a notification of the ping still waits. One that cannot be read may.
    fn waits(&self, ping: PingId) -> Result<bool, EngineError> {
        let waiting = |key: &[u8], value: &[u8]| {
            record::pair(key, value).map_or(true, |pair| {
                matches!(pair.state, PairStored::Waiting { .. })
            })
        };
        let (from, to) = (keys::pairs(ping), keys::pairs(ping).end());
        // What rules said of such a key, so that it ended or is forgotten, does not wait.
        let mut waits = self.layer.range(&from, &to).any(|(key, entry)| {
            !self.ruled.contains_key(key)
                && (entry.value.as_ref()).is_some_and(|value| waiting(key, value))
        });
        if !waits {
            let unsaid = &mut |key: &[u8], value: &[u8]| {
                if self.said(key).is_none() && waiting(key, value) {
                    waits = true;
                    return ControlFlow::Break(());
                }
                ControlFlow::Continue(())
            };
            self.engine.scan(&*from..&*to, Direction::Up, unsaid)?;
        }
        Ok(waits)
    }
}
