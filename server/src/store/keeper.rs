//! The keeper looks after the room on the disk: it watches what is free, takes snapshots, lets go of log that
//! no snapshot needs any more, and has an engine built anew whose files have grown far beyond what lives in them.
//!
//! # How large it all gets
//!
//! With `L` the bytes of keys and values that live, `S` the setting `snapshot_bytes`, `G` the size of a segment, `F` the factor of
//! a rebuild and `B` its floor, as long as there is room to work:
//!
//! - an interval between two snapshots is `I = max(S, 2 L)` of log, and what is written while one is taken;
//! - the log is at most `2 I` and 3 segments: back to the older of two snapshots, the segment in use, the one made ready;
//! - snapshots are at most `3 L`: two that are kept, one being written (plus 8 bytes a MiB and 6 an entry);
//! - the engine is at most `max(B, F (L + I), 2 R)`, and what is written from one look to the next. `R` is its size just after
//!   it was last built anew, in the proportion of what lives now to what lived then, if that is less; just after a
//!   snapshot `I` is nothing. While it is built anew there is the new one beside it.
//!
//! `store/tests/growing.rs` holds the store to this.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::committer::LogFigures;
use super::current::{Copied, Current};
use super::engine::{Engine, EngineError};
use super::home::{Before, EngineHome};
use super::log::disk::Disk;
use super::log::{SET_ASIDE, Segments};
use super::set_aside::{SetAside, free_name};
use super::snapshot::{self, Info, SnapshotError, Surroundings};
use crate::delivery::Mono;
use crate::ports::Clock;

/// How often the keeper looks around.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Looks between two measurements of what was set aside, which grows at starts and by damage alone.
const ASIDE_EVERY: u64 = 60;

/// Snapshots that are kept; see `snapshot.rs`.
const SNAPSHOTS_KEPT: usize = 2;

/// A snapshot is due when the log since the last one is this many times what lives. So writing snapshots costs at
/// most half as much again as writing the log.
const LIVE_MULTIPLE: u64 = 2;

/// Longest pause after a block of a walk.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// How long the keeper waits after a snapshot that failed.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Free space must be this much above the reserve before a full disk counts as open again: one eighth of the
/// reserve, so that the state does not flicker.
const RELIEF: u64 = 8;

/// How long the keeper waits after an engine could not be built anew, or there was no room for it.
const REBUILD_RETRY_AFTER: Duration = Duration::from_secs(600);

/// An engine that was built anew is left alone until it is this many times as large as it was then. An engine of very small
/// records may need more than the factor for itself, and would be built again and again.
const REGROWN: u64 = 2;

/// Room for an engine that is built: this many times what lives, and some for its own files.
const REBUILD_ROOM: u64 = 3;
const REBUILD_ROOM_LEAST: u64 = 64 << 20;

/// Room that an engine may need for so much that lives.
pub(super) fn room_for_engine(live: u64) -> u64 {
    live.saturating_mul(REBUILD_ROOM)
        .saturating_add(REBUILD_ROOM_LEAST)
}

/// When snapshots are taken, when an engine is built anew, and how much room must stay free.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// How many times what lives the engine's files may be; 0: any size.
    pub(super) rebuild_factor: u64,
    /// Files of this size are never too large.
    pub(super) rebuild_floor: u64,
    pub(super) snapshot_bytes: u64,
    pub(super) snapshot_every: Duration,
    pub(super) reserve_bytes: u64,
}

/// Free room, as last seen.
#[derive(Default)]
pub(super) struct Room {
    pub(super) free: AtomicU64,
    pub(super) full: AtomicBool,
}

pub(super) struct Keeper {
    pub(super) engine: Arc<Current>,
    pub(super) home: Arc<dyn EngineHome>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) store: [u8; 16],
    pub(super) segments: Arc<Segments>,
    pub(super) figures: Arc<LogFigures>,
    pub(super) aside: Arc<SetAside>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) rules: Rules,
    pub(super) room: Arc<Room>,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a snapshot is taken, as two would write into one file, and while an engine is built.
    taking: Mutex<()>,
    /// Engines built anew in this run.
    rebuilds: AtomicU64,
    /// Bytes of everything that was set aside, as last measured.
    aside_bytes: AtomicU64,
    /// Engines that were replaced, until nobody walks over them any more.
    replaced: Mutex<Vec<Arc<dyn Engine>>>,
}

struct State {
    closing: bool,
    /// Frames of the snapshots that are there, oldest first.
    snapshots: Vec<u64>,
    /// Bytes of what lived when the last snapshot was taken.
    live: u64,
    /// Bytes of log since the last snapshot that earlier runs wrote.
    inherited: u64,
    /// [`LogFigures::bytes`] and the last frame at the last snapshot.
    mark: u64,
    mark_frame: u64,
    taken_at: Mono,
    not_before: Mono,
    /// The size of the engine just after it was built anew in this run, or 0, and the bytes that may have lived then.
    rebuilt_bytes: u64,
    rebuilt_live: u64,
    rebuild_not_before: Mono,
    /// Size of the snapshot files.
    snapshot_bytes: u64,
}

/// Why an engine was not built anew. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub(super) enum RebuildError {
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("the server is going down")]
    Interrupted,
    #[error("the disk ran full meanwhile")]
    NoRoom,
}

/// Where a rebuild is, for those who want to happen in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The fresh engine is there, and empty.
    Built,
    /// A page was copied.
    Copied,
    /// All was copied and handed to the disk.
    Settled,
    /// The fresh engine counts; the one before is still there.
    TookPlace,
}

/// What a keeper starts from.
pub(super) struct Inheritance {
    pub(super) snapshots: Vec<u64>,
    pub(super) live: u64,
    pub(super) log_bytes: u64,
    pub(super) last_frame: u64,
}

/// What a keeper needs of the house.
pub(super) struct Tools {
    pub(super) engine: Arc<Current>,
    pub(super) home: Arc<dyn EngineHome>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) store: [u8; 16],
    pub(super) segments: Arc<Segments>,
    pub(super) figures: Arc<LogFigures>,
    pub(super) aside: Arc<SetAside>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) room: Arc<Room>,
}

impl Keeper {
    pub(super) fn new(tools: Tools, rules: Rules, from: Inheritance) -> Keeper {
        let now = tools.clock.now().mono;
        let keeper = Keeper {
            engine: tools.engine,
            disk: tools.disk,
            store: tools.store,
            segments: tools.segments,
            figures: tools.figures,
            aside: tools.aside,
            clock: tools.clock,
            home: tools.home,
            rules,
            room: tools.room,
            state: Mutex::new(State {
                closing: false,
                snapshots: from.snapshots,
                live: from.live,
                inherited: from.log_bytes,
                mark: 0,
                mark_frame: from.last_frame,
                taken_at: now,
                not_before: now,
                rebuilt_bytes: 0,
                rebuilt_live: 0,
                rebuild_not_before: now,
                snapshot_bytes: 0,
            }),
            changed: Condvar::new(),
            taking: Mutex::new(()),
            rebuilds: AtomicU64::new(0),
            aside_bytes: AtomicU64::new(0),
            replaced: Mutex::new(Vec::new()),
        };
        keeper.measure_snapshots();
        keeper.measure_aside();
        keeper.look_at_room();
        keeper
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The frame at which the newest snapshot starts; 0 if there is none.
    pub(super) fn snapshot_frame(&self) -> u64 {
        self.lock().snapshots.last().copied().unwrap_or(0)
    }

    /// Bytes of what lived when the newest snapshot was taken.
    pub(super) fn live_bytes(&self) -> u64 {
        self.lock().live
    }

    /// Size of the snapshot files.
    pub(super) fn snapshot_bytes(&self) -> u64 {
        self.lock().snapshot_bytes
    }

    /// Engines built anew in this run.
    pub(super) fn rebuilds(&self) -> u64 {
        self.rebuilds.load(Ordering::Relaxed)
    }

    /// Bytes of what was set aside: engines, and what is below `set-aside/`. At most a minute old.
    pub(super) fn aside_bytes(&self) -> u64 {
        self.aside_bytes.load(Ordering::Relaxed)
    }

    pub(super) fn measure_aside(&self) {
        let measured = || {
            let mut bytes = self.home.aside_bytes()?;
            for file in self.disk.list(SET_ASIDE)? {
                bytes += self.disk.open(&format!("{SET_ASIDE}/{file}"))?.length()?;
            }
            Ok::<_, std::io::Error>(bytes)
        };
        match measured() {
            Ok(bytes) => self.aside_bytes.store(bytes, Ordering::Relaxed),
            // Removed under its eyes by the operator, most likely.
            Err(error) => tracing::debug!(%error, "what was set aside could not be measured"),
        }
    }

    fn measure_snapshots(&self) {
        let frames = self.lock().snapshots.clone();
        let length = |frame| self.disk.open(&snapshot::name(frame))?.length();
        let bytes = frames
            .into_iter()
            // One that cannot be read is told about when it is needed.
            .filter_map(|frame| length(frame).ok())
            .sum();
        self.lock().snapshot_bytes = bytes;
    }

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// The keeper's thread.
    pub(super) fn run(&self) {
        for look in 1u64.. {
            let state = self.lock();
            let (state, _) = self
                .changed
                .wait_timeout_while(state, LOOK_EVERY, |state| !state.closing)
                .unwrap_or_else(PoisonError::into_inner);
            if state.closing {
                return;
            }
            drop(state);
            if look.is_multiple_of(ASIDE_EVERY) {
                self.measure_aside();
            }
            self.look();
        }
    }

    /// Looks around once, and does what is due.
    pub(super) fn look(&self) {
        self.look_at_room();
        self.let_go();
        if self.due() {
            self.try_snapshot();
        }
        if self.overgrown() {
            self.try_rebuild();
        }
    }

    /// Looks at the free room and notes whether it is below the reserve.
    pub(super) fn look_at_room(&self) {
        let free = match self.disk.free() {
            Ok(free) => free,
            Err(error) => {
                tracing::warn!(%error, "the free room on the disk cannot be seen");
                return;
            }
        };
        self.room.free.store(free, Ordering::Relaxed);
        let reserve = self.rules.reserve_bytes;
        let was_full = self.room.full.load(Ordering::Relaxed);
        let full = if was_full {
            free < reserve.saturating_add(reserve / RELIEF)
        } else {
            free < reserve
        };
        if full != was_full {
            self.room.full.store(full, Ordering::Relaxed);
            if full {
                tracing::error!(
                    free,
                    reserve,
                    "free room is below the reserve: new pings are refused, delivery and removals go on"
                );
            } else {
                tracing::info!(free, reserve, "there is room again: new pings are accepted");
            }
        }
    }

    fn due(&self) -> bool {
        let now = self.clock.now().mono;
        let state = self.lock();
        let written = self.figures.bytes.load(Ordering::Relaxed) - state.mark + state.inherited;
        let traffic = self.figures.last_frame.load(Ordering::Relaxed) > state.mark_frame;
        let limit = self
            .rules
            .snapshot_bytes
            .max(state.live.saturating_mul(LIVE_MULTIPLE));
        now >= state.not_before
            && (written > limit || (traffic && now - state.taken_at >= self.rules.snapshot_every))
    }

    /// Something to be called after each piece of long work: it waits, and says whether the server goes down.
    fn breath(&self) -> impl Fn() -> ControlFlow<()> + '_ {
        let began = std::cell::Cell::new(self.clock.now().mono);
        move || {
            let took = (self.clock.now().mono - began.get()).min(PAUSE_MAX);
            // As long a pause as the piece took leaves half of a core to others.
            let (state, _) = self
                .changed
                .wait_timeout_while(self.lock(), took, |state| !state.closing)
                .unwrap_or_else(PoisonError::into_inner);
            began.set(self.clock.now().mono);
            if state.closing {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        }
    }

    /// Bytes of keys and values that may live: what did at the last snapshot, and all that was written since.
    fn may_live(&self, state: &State) -> u64 {
        let written = self.figures.bytes.load(Ordering::Relaxed) - state.mark + state.inherited;
        state.live.saturating_add(written)
    }

    /// Whether the engine's files have grown too large for what can live in them.
    fn overgrown(&self) -> bool {
        if self.rules.rebuild_factor == 0 {
            return false;
        }
        let now = self.clock.now().mono;
        let (limit, not_before) = {
            let state = self.lock();
            let may_live = self.may_live(&state);
            let regrown = state.rebuilt_bytes.saturating_mul(REGROWN);
            // When less lives than then, less is left alone.
            let regrown = u128::from(regrown) * u128::from(may_live.min(state.rebuilt_live))
                / u128::from(state.rebuilt_live.max(1));
            let limit = may_live
                .saturating_mul(self.rules.rebuild_factor)
                .max(self.rules.rebuild_floor)
                .max(u64::try_from(regrown).unwrap_or(u64::MAX));
            (limit, state.rebuild_not_before)
        };
        now >= not_before && self.engine.size_bytes() > limit
    }

    fn try_rebuild(&self) {
        let before = self.engine.size_bytes();
        let need = {
            let state = self.lock();
            self.may_live(&state)
                .saturating_mul(REBUILD_ROOM)
                .min(before)
                .saturating_add(REBUILD_ROOM_LEAST)
        };
        let free = self.room.free.load(Ordering::Relaxed);
        let room = free.saturating_sub(self.rules.reserve_bytes);
        let later = || {
            let now = self.clock.now().mono;
            self.lock().rebuild_not_before = now + REBUILD_RETRY_AFTER;
        };
        if room < need {
            tracing::warn!(
                engine_bytes = before,
                need,
                room,
                "the engine has grown far beyond what lives in it, and there is no room to build another"
            );
            later();
            return;
        }
        tracing::info!(
            engine_bytes = before,
            "the engine has grown far beyond what lives in it: building another beside it"
        );
        match self.rebuild() {
            Ok(copied) => tracing::info!(
                entries = copied.entries,
                live_bytes = copied.bytes,
                engine_bytes = self.engine.size_bytes(),
                before,
                "the engine was built anew"
            ),
            Err(RebuildError::Interrupted) => {}
            Err(error) => {
                tracing::error!(%error, "the engine could not be built anew; the one that counts goes on");
                later();
            }
        }
    }

    /// Builds the engine anew while the store serves.
    pub(super) fn rebuild(&self) -> Result<Copied, RebuildError> {
        let breath = self.breath();
        let pages = std::cell::Cell::new(0u32);
        self.rebuild_in_stages(&|stage| {
            if breath().is_break() {
                return Err(RebuildError::Interrupted);
            }
            pages.set(pages.get() + 1);
            if stage == Stage::Copied && pages.get().is_multiple_of(64) {
                self.look_at_room();
                if self.room.full.load(Ordering::Relaxed) {
                    return Err(RebuildError::NoRoom);
                }
            }
            Ok(())
        })
    }

    /// Builds the engine anew; `between` is asked after each stage.
    pub(super) fn rebuild_in_stages(
        &self,
        between: &dyn Fn(Stage) -> Result<(), RebuildError>,
    ) -> Result<Copied, RebuildError> {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let built = self.home.build()?;
        let filled = (|| {
            let mut fill = self.engine.fill(Arc::clone(&built.engine));
            between(Stage::Built)?;
            while fill.step()? {
                between(Stage::Copied)?;
            }
            fill.settle()?;
            between(Stage::Settled)?;
            let copied = fill.copied();
            let before = fill.take_place(|| self.home.adopt(&built, Before::Replaced))?;
            Ok((copied, before))
        })();
        let (copied, before) = match filled {
            Ok(filled) => filled,
            Err(error) => {
                self.home.discard(built);
                return Err(error);
            }
        };
        self.rebuilds.fetch_add(1, Ordering::Relaxed);
        self.replaced().push(before);
        let size = self.engine.size_bytes();
        let mut state = self.lock();
        state.rebuilt_live = self.may_live(&state);
        state.rebuilt_bytes = size;
        drop(state);
        between(Stage::TookPlace)?;
        self.let_go();
        Ok(copied)
    }

    fn replaced(&self) -> MutexGuard<'_, Vec<Arc<dyn Engine>>> {
        self.replaced.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes engines that were replaced, once nobody walks over them.
    pub(super) fn let_go(&self) {
        let mut replaced = self.replaced();
        if replaced.is_empty() || replaced.iter().any(|before| Arc::strong_count(before) > 1) {
            return;
        }
        // The last handles.
        replaced.clear();
        if let Err(error) = self.home.remove_replaced() {
            tracing::warn!(%error, "an engine that was replaced could not be removed; the next start does");
        }
    }

    fn try_snapshot(&self) {
        match self.take_snapshot() {
            Ok(Some(info)) => tracing::info!(
                frame = info.frame,
                entries = info.entries,
                bytes = info.bytes,
                "took a snapshot"
            ),
            Ok(None) | Err(SnapshotError::Interrupted) => {}
            Err(error) => {
                tracing::error!(%error, "a snapshot could not be taken; the log is kept until one can");
                let now = self.clock.now().mono;
                self.lock().not_before = now + RETRY_AFTER;
            }
        }
    }

    /// Removes a snapshot that others have made superfluous; one that cannot be read is kept aside.
    fn retire(&self, frame: u64) -> std::io::Result<()> {
        let name = snapshot::name(frame);
        match snapshot::check(&*self.disk, frame, Some(self.store)) {
            Ok(_) => self.disk.remove(&name),
            Err(SnapshotError::Io(error)) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => {
                let to = free_name(&*self.disk, &format!("retired-{frame:020}"), "snap")?;
                tracing::error!(%error, file = to, "a snapshot that is not needed any more cannot be read and was set aside");
                self.disk.rename(&name, &to)?;
                self.disk.sync_dir(SET_ASIDE)?;
                self.disk.sync_dir(snapshot::DIR)
            }
        }
    }

    /// Takes a snapshot now and lets go of what it makes superfluous. `None`: nothing has changed since the last one.
    pub(super) fn take_snapshot(&self) -> Result<Option<Info>, SnapshotError> {
        let _taking = self.taking.lock().unwrap_or_else(PoisonError::into_inner);
        let position = self.engine.position()?.unwrap_or(1);
        let (mark, mark_frame) = (
            self.figures.bytes.load(Ordering::Relaxed),
            self.figures.last_frame.load(Ordering::Relaxed),
        );
        if self.lock().snapshots.last() == Some(&position) {
            return Ok(None);
        }
        let breathe = self.breath();
        let info = snapshot::take(
            &*self.engine,
            &Surroundings {
                disk: &*self.disk,
                store: self.store,
                now_ms: self.clock.now().unix_ms,
                aside: &self.aside,
                breathe: &breathe,
            },
        )?;
        let (retired, covered) = {
            let mut state = self.lock();
            state.snapshots.push(info.frame);
            state.snapshots.dedup();
            state.live = info.bytes;
            state.inherited = 0;
            state.mark = mark;
            state.mark_frame = mark_frame;
            state.taken_at = self.clock.now().mono;
            let superfluous = state.snapshots.len().saturating_sub(SNAPSHOTS_KEPT);
            let retired: Vec<u64> = state.snapshots.drain(..superfluous).collect();
            let covered = (state.snapshots.len() == SNAPSHOTS_KEPT).then(|| state.snapshots[0]);
            (retired, covered)
        };
        if let Some(frame) = covered {
            let released = self.segments.release(frame)?;
            if released > 0 {
                tracing::debug!(released, frame, "released log segments");
            }
        }
        for frame in retired {
            self.retire(frame)?;
        }
        self.measure_snapshots();
        Ok(Some(info))
    }
}
