//! The committer: one thread that makes batches safe, many at a time.
//!
//! # The turn
//!
//! A disk syncs a few hundred to a few thousand times a second, whatever is in a sync. So the committer gathers everything
//! that came while the last frame was written, writes it as one frame, syncs once, and answers everybody. There is no
//! timer in this: an idle committer starts at once, a busy one as soon as it is done.
//!
//! Shards do not send batches whenever they like, because an operation should stay theirs until the moment a
//! frame is sealed: a notification that is acknowledged before that costs no disk at all. So a shard *wants* a
//! place and *submits* when it has one:
//!
//! ```text
//!            idle: want -> true                       want -> false (noted)
//!   Open ------------------------------> Busy --------------------------------> Open
//!    |  places are granted at once        |  the frame is written and synced     |  those who want
//!    |  submits and single batches come   |  the overlay shows it                |  get Ready
//!    '--- all granted have submitted -----'  everybody is answered; if the engine
//!                                            is too far behind, wait for it
//! ```
//!
//! # What keeps it from going wrong
//!
//! - One mutex guards who wants, who was granted and what was handed over; the condition is signalled after every change that the
//!   committer may wait for. No wake-up is lost, because it looks at the state again under the mutex before it sleeps.
//! - A source has at most one place in a frame, so gathering ends although others go on wanting.
//! - A source hears `Committed` of one batch before it is told `Ready` for the next: both come from this thread, in
//!   this order, and while answers are given the phase is still Busy, so nobody is granted a place past them.
//! - A source that was granted a place and never submits would stop the house. After [`GATHER_MAX`] it loses its place, loudly;
//!   should it submit after all, its batch goes into the next frame.
//! - A callback that panics is the caller's trouble, not that of those who are answered after it.
//! - Nobody is answered `Ok` before [`Log::write`] said so, and the overlay shows a frame before anybody hears of it.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::apply::{Queue, SafeFrame};
use super::backup::erasures::Fresh;
use super::keys;
use super::log::{AppendError, Log};
use super::overlay::Overlay;
use super::write::{Chore, FrameBuilder, Unwritable, Write};
use crate::delivery::CommitFailure;
use crate::ports::{Batch, Clock, Committed, Grant, Op, SourceId};

/// How long the committer waits for a source that was granted a place. Shards answer within microseconds; one that takes
/// this long is stuck or dead.
pub(super) const GATHER_MAX: Duration = Duration::from_secs(1);

/// Bytes after which a frame takes no further batch; the rest follows in the next one. Long frames make everybody in them
/// wait for the last byte.
const FRAME_TARGET: usize = 4 << 20;

/// Most things that wait to ride along; beyond that they are lost, as any of them may be.
const RIDES_MAX: usize = 65_536;

/// Syncs of which the durations are kept for statistics.
const SYNCS_KEPT: usize = 1_024;

/// What is to become safe together.
pub(super) enum Work {
    /// From the runtime.
    Ops(Batch),
    /// The store's own.
    Chores(Vec<Chore>),
}

impl Work {
    fn add_to(&self, frame: &mut FrameBuilder) -> Result<(), Unwritable> {
        match self {
            Work::Ops(batch) => batch.iter().try_for_each(|op| frame.add(op)),
            Work::Chores(chores) => chores.iter().try_for_each(|chore| frame.add_chore(chore)),
        }
    }
}

/// Called with what became of a single batch.
pub(super) type Done = Box<dyn FnOnce(Committed) + Send>;

/// Who is answered.
pub(super) enum Waiter {
    Source(SourceId),
    Single(Done),
}

/// A batch and who waits for it.
pub(super) struct Entry {
    pub(super) waiter: Waiter,
    pub(super) work: Work,
}

/// Things that ride along in whatever frame is written next.
#[derive(Default)]
pub(super) struct Rides {
    ops: Vec<Op>,
    chores: Vec<Chore>,
}

impl Rides {
    pub(super) fn add(&mut self, op: Op) {
        if self.ops.len() < RIDES_MAX {
            self.ops.push(op);
        }
    }

    pub(super) fn add_chores(&mut self, chores: Vec<Chore>) {
        if self.chores.len() < RIDES_MAX {
            self.chores.extend(chores);
        }
    }

    /// Whatever cannot be written is left out.
    fn add_to(&self, frame: &mut FrameBuilder) {
        for op in &self.ops {
            let mark = frame.mark();
            if let Err(error) = frame.add(op) {
                tracing::error!(%error, "something that rode along cannot be written");
                frame.back_to(mark);
            }
        }
        for chore in &self.chores {
            let mark = frame.mark();
            if let Err(error) = frame.add_chore(chore) {
                tracing::error!(%error, "a chore cannot be written");
                frame.back_to(mark);
            }
        }
    }
}

/// Figures of the log.
#[derive(Default)]
pub(super) struct LogFigures {
    pub(super) frames: AtomicU64,
    pub(super) syncs: AtomicU64,
    pub(super) last_frame: AtomicU64,
    pub(super) bytes: AtomicU64,
    failed: Mutex<Option<String>>,
    sync_us: Mutex<VecDeque<u32>>,
}

impl LogFigures {
    /// Why nothing is promised any more, if so.
    pub(super) fn failed(&self) -> Option<String> {
        self.failed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn fail(&self, why: &str) {
        let mut failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.get_or_insert_with(|| why.to_owned());
    }

    fn synced(&self, took: Duration) {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.sync_us.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == SYNCS_KEPT {
            kept.pop_front();
        }
        kept.push_back(u32::try_from(took.as_micros()).unwrap_or(u32::MAX));
    }

    /// Median and worst of the last syncs, microseconds.
    pub(super) fn sync_us(&self) -> (u64, u64) {
        let mut kept: Vec<u32> = {
            let kept = self.sync_us.lock().unwrap_or_else(PoisonError::into_inner);
            kept.iter().copied().collect()
        };
        kept.sort_unstable();
        let at = |index: usize| kept.get(index).map_or(0, |us| u64::from(*us));
        (at(kept.len() / 2), at(kept.len().saturating_sub(1)))
    }
}

/// Writes frames, on whichever thread asks.
pub(super) struct Writer {
    log: Log,
    overlay: Arc<Overlay>,
    queue: Arc<Queue>,
    clock: Arc<dyn Clock>,
    figures: Arc<LogFigures>,
    erased: Option<Arc<Fresh>>,
}

impl Writer {
    pub(super) fn new(
        log: Log,
        overlay: Arc<Overlay>,
        queue: Arc<Queue>,
        clock: Arc<dyn Clock>,
        figures: Arc<LogFigures>,
    ) -> Writer {
        figures
            .last_frame
            .store(log.next_frame() - 1, Ordering::Relaxed);
        Writer {
            log,
            overlay,
            queue,
            clock,
            figures,
            erased: None,
        }
    }

    /// From now on what is erased is noted there as well.
    pub(super) fn note_erased(&mut self, fresh: Arc<Fresh>) {
        self.erased = Some(fresh);
    }

    /// Why nothing is promised any more, if so.
    pub(super) fn failed(&self) -> Option<String> {
        self.figures.failed()
    }

    /// From now on log segments are made ready in the background.
    pub(super) fn make_ahead(&mut self) -> std::io::Result<()> {
        self.log.make_ahead()
    }

    /// Writes one frame of as many entries as fit, from the front, and takes them out with what became of each. The rides go
    /// with it; if there is nothing else to write they stay.
    pub(super) fn write_frame(
        &mut self,
        entries: &mut VecDeque<Entry>,
        rides: &mut Rides,
    ) -> Vec<(Waiter, Committed)> {
        let mut frame = FrameBuilder::new();
        let mut answers = Vec::new();
        while let Some(entry) = entries.front() {
            let mark = frame.mark();
            let added = entry.work.add_to(&mut frame);
            if let Err(error) = added {
                frame.back_to(mark);
                if matches!(error, Unwritable::Frame(_)) && !frame.is_empty() {
                    // Too large beside the others; alone it may fit.
                    break;
                }
                tracing::error!(%error, "a batch cannot be written and is refused");
            }
            if let Some(entry) = entries.pop_front() {
                let verdict = added.map_err(|_| CommitFailure::NoRoom);
                answers.push((entry.waiter, verdict));
            }
            if frame.len() >= FRAME_TARGET {
                break;
            }
        }
        if frame.is_empty() {
            if self.figures.failed().is_some() {
                for (_, verdict) in &mut answers {
                    *verdict = Err(CommitFailure::Failed);
                }
            }
            return answers;
        }
        std::mem::take(rides).add_to(&mut frame);
        if let Err(failure) = self.write(frame) {
            for (_, verdict) in &mut answers {
                *verdict = verdict.and(Err(failure));
            }
        }
        answers
    }

    fn write(&mut self, frame: FrameBuilder) -> Committed {
        let result = self.log.make_room(frame.len()).and_then(|(number, seed)| {
            let (bytes, writes) = frame.seal(number, seed);
            let before = self.clock.now().mono;
            self.log.write(&bytes)?;
            let now = self.clock.now().mono;
            self.figures.synced(now - before);
            Ok((number, bytes.len(), writes, now))
        });
        match result {
            Ok((number, bytes, writes, at)) => {
                let erased = self.erased.as_ref().map(|fresh| (fresh, erasures(&writes)));
                let most = self.queue.run_bytes();
                let showing = self.overlay.publish(number, bytes, writes, most);
                self.queue.push(SafeFrame { number, bytes, at });
                drop(showing);
                // Whoever looks into the store because not all of it could be noted must find it there.
                if let Some((fresh, erased)) = erased {
                    fresh.note(&erased);
                }
                self.figures.frames.fetch_add(1, Ordering::Relaxed);
                self.figures
                    .bytes
                    .fetch_add(bytes as u64, Ordering::Relaxed);
                self.figures.last_frame.store(number, Ordering::Relaxed);
                Ok(())
            }
            Err(AppendError::NoRoom(why)) => {
                tracing::warn!(
                    why,
                    "no room for a log segment: new work is refused until there is"
                );
                Err(CommitFailure::NoRoom)
            }
            Err(AppendError::Failed(why)) => {
                self.figures.fail(&why);
                Err(CommitFailure::Failed)
            }
        }
    }
}

/// Those writes of a frame that tell of erasures.
fn erasures(writes: &[Write]) -> Vec<Write> {
    let told = |write: &&Write| matches!(write, Write::Put { key, .. } if key.first() == Some(&keys::ERASURES));
    writes.iter().filter(told).cloned().collect()
}

/// Runs a callback of somebody else's.
fn call(what: &str, callback: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(callback)).is_err() {
        tracing::error!(what, "a callback of the store panicked");
    }
}

type GrantFn = Arc<dyn Fn(Grant) + Send + Sync>;

struct Source {
    grant: GrantFn,
    /// Asked for a place while none was to be had.
    wants: bool,
    /// Has a place and has not submitted yet.
    granted: bool,
    /// Has submitted for the frame that is being gathered.
    submitted: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Gathering: places are granted at once.
    Open,
    /// A frame is being written or answered, or the engine is too far behind.
    Busy,
    /// No more frames.
    Closed,
}

struct DeskState {
    phase: Phase,
    sources: Vec<Source>,
    /// Sources with `granted`.
    outstanding: usize,
    entries: VecDeque<Entry>,
    rides: Rides,
    closing: bool,
}

/// Where batches are handed in.
pub(super) struct Desk {
    state: Mutex<DeskState>,
    changed: Condvar,
}

impl Desk {
    pub(super) fn new() -> Desk {
        Desk {
            state: Mutex::new(DeskState {
                phase: Phase::Open,
                sources: Vec::new(),
                outstanding: 0,
                entries: VecDeque::new(),
                rides: Rides::default(),
                closing: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn register(&self, grant: Box<dyn Fn(Grant) + Send + Sync>) -> SourceId {
        let mut state = self.lock();
        state.sources.push(Source {
            grant: Arc::from(grant),
            wants: false,
            granted: false,
            submitted: false,
        });
        SourceId(state.sources.len() - 1)
    }

    pub(super) fn want(&self, id: SourceId) -> bool {
        let mut state = self.lock();
        let phase = state.phase;
        let Some(source) = state.sources.get_mut(id.0) else {
            return false;
        };
        if source.granted || source.wants {
            return false;
        }
        match phase {
            // The submit that follows is answered with the failure.
            Phase::Closed => true,
            Phase::Open if !source.submitted => {
                source.granted = true;
                state.outstanding += 1;
                true
            }
            Phase::Open | Phase::Busy => {
                source.wants = true;
                false
            }
        }
    }

    pub(super) fn submit(&self, id: SourceId, batch: Batch) {
        let mut state = self.lock();
        let closed = state.phase == Phase::Closed;
        let Some(source) = state.sources.get_mut(id.0) else {
            return;
        };
        let was_granted = std::mem::replace(&mut source.granted, false);
        if closed {
            let grant = Arc::clone(&source.grant);
            drop(state);
            grant(Grant::Committed(Err(CommitFailure::Failed)));
            return;
        }
        source.submitted = was_granted;
        if was_granted {
            state.outstanding -= 1;
        }
        state.entries.push_back(Entry {
            waiter: Waiter::Source(id),
            work: Work::Ops(batch),
        });
        // Or the committer would wake only to wait for this lock.
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn commit(&self, work: Work, done: Done) {
        let mut state = self.lock();
        if state.phase == Phase::Closed {
            drop(state);
            done(Err(CommitFailure::Failed));
            return;
        }
        state.entries.push_back(Entry {
            waiter: Waiter::Single(done),
            work,
        });
        drop(state);
        self.changed.notify_all();
    }

    pub(super) fn ride_along(&self, op: Op) {
        self.lock().rides.add(op);
    }

    pub(super) fn chores(&self, chores: Vec<Chore>) {
        if !chores.is_empty() {
            self.lock().rides.add_chores(chores);
        }
    }

    /// The engine got further: a committer that waits for it looks again.
    pub(super) fn caught_up(&self) {
        // Taking the lock orders this after the committer's look at the lag.
        drop(self.lock());
        self.changed.notify_all();
    }

    /// Lets the committer write what was handed over and end.
    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// The committer's thread.
    pub(super) fn run(&self, mut writer: Writer) {
        while let Some((mut entries, mut rides)) = self.gather() {
            while !entries.is_empty() {
                for (waiter, verdict) in writer.write_frame(&mut entries, &mut rides) {
                    self.answer(waiter, verdict);
                }
            }
            self.reopen(rides, &writer);
        }
    }

    /// Waits until there is something to write and everybody who has a place has used it. `None`: closed.
    fn gather(&self) -> Option<(VecDeque<Entry>, Rides)> {
        let mut state = self
            .changed
            .wait_while(self.lock(), |state| {
                state.entries.is_empty() && !state.closing
            })
            .unwrap_or_else(PoisonError::into_inner);
        if state.outstanding > 0 && !state.closing {
            let (guard, waited) = self
                .changed
                .wait_timeout_while(state, GATHER_MAX, |state| {
                    state.outstanding > 0 && !state.closing
                })
                .unwrap_or_else(PoisonError::into_inner);
            state = guard;
            if waited.timed_out() {
                tracing::error!(
                    sources = state.outstanding,
                    "sources that were granted a place in a frame did not submit; the house goes on without them"
                );
                state.outstanding = 0;
                for source in &mut state.sources {
                    source.granted = false;
                }
            }
        }
        if state.entries.is_empty() {
            // Closing, and all is written. Under the lock that was held since the look: nothing slips in between.
            state.phase = Phase::Closed;
            drop(state);
            self.shut();
            return None;
        }
        state.phase = Phase::Busy;
        Some((
            std::mem::take(&mut state.entries),
            std::mem::take(&mut state.rides),
        ))
    }

    /// As [`Desk::gather`], for somebody who does not wait.
    pub(super) fn try_gather(&self) -> Option<(VecDeque<Entry>, Rides)> {
        let mut state = self.lock();
        if state.phase != Phase::Open || state.outstanding > 0 || state.entries.is_empty() {
            return None;
        }
        state.phase = Phase::Busy;
        Some((
            std::mem::take(&mut state.entries),
            std::mem::take(&mut state.rides),
        ))
    }

    /// No more frames: whatever comes is answered with a failure.
    pub(super) fn shut(&self) {
        let mut state = self.lock();
        state.closing = true;
        state.phase = Phase::Closed;
        let waiting = Self::take_wanting(&mut state);
        drop(state);
        for grant in waiting {
            call("ready", || grant(Grant::Ready));
        }
    }

    pub(super) fn answer(&self, waiter: Waiter, verdict: Committed) {
        match waiter {
            Waiter::Single(done) => call("done", || done(verdict)),
            Waiter::Source(id) => {
                let grant = self
                    .lock()
                    .sources
                    .get(id.0)
                    .map(|source| Arc::clone(&source.grant));
                if let Some(grant) = grant {
                    call("committed", || grant(Grant::Committed(verdict)));
                }
            }
        }
    }

    /// Waits for an engine that is too far behind, then grants places to those who want one.
    fn reopen(&self, rides: Rides, writer: &Writer) {
        let mut state = self.lock();
        while writer.queue.holds(writer.clock.now().mono) && !state.closing {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        self.open_again(rides);
    }

    /// Grants places to those who want one. `rides`: what did not ride in the frames written.
    pub(super) fn open_again(&self, rides: Rides) {
        let mut state = self.lock();
        // What did not ride yet comes before what was added meanwhile.
        let later = std::mem::replace(&mut state.rides, rides);
        for op in later.ops {
            state.rides.add(op);
        }
        state.rides.add_chores(later.chores);
        state.phase = Phase::Open;
        for source in &mut state.sources {
            source.submitted = false;
        }
        let ready = if state.closing {
            Vec::new()
        } else {
            Self::take_wanting(&mut state)
        };
        drop(state);
        for grant in ready {
            call("ready", || grant(Grant::Ready));
        }
    }

    /// Those who want a place have one now.
    fn take_wanting(state: &mut DeskState) -> Vec<GrantFn> {
        let open = state.phase == Phase::Open;
        let mut ready = Vec::new();
        for source in &mut state.sources {
            if std::mem::replace(&mut source.wants, false) {
                source.granted = open;
                state.outstanding += usize::from(open);
                ready.push(Arc::clone(&source.grant));
            }
        }
        ready
    }
}
