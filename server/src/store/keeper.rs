//! The keeper looks after the room on the disk: it watches what is free, takes snapshots, and lets go of log that
//! no snapshot needs any more.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::committer::LogFigures;
use super::engine::Engine;
use super::log::Segments;
use super::log::disk::Disk;
use super::set_aside::SetAside;
use super::snapshot::{self, Info, SnapshotError, Surroundings};
use crate::delivery::Mono;
use crate::ports::Clock;

/// How often the keeper looks around.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Snapshots that are kept; see `snapshot.rs`.
const SNAPSHOTS_KEPT: usize = 2;

/// A snapshot is due when the log since the last one is this many times what lives. So writing snapshots costs at
/// most half as much again as writing the log.
const LIVE_MULTIPLE: u64 = 2;

/// Longest pause after a block of a walk.
pub(super) const PAUSE_MAX: Duration = Duration::from_millis(50);

/// How long the keeper waits after a snapshot that failed.
const RETRY_AFTER: Duration = Duration::from_secs(60);

/// Free space must be this much above the reserve before a full disk counts as open again: one eighth of the
/// reserve, so that the state does not flicker.
const RELIEF: u64 = 8;

/// When snapshots are taken, and how much room must stay free.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
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
    pub(super) engine: Arc<dyn Engine>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) store: [u8; 16],
    pub(super) segments: Arc<Segments>,
    pub(super) figures: Arc<LogFigures>,
    pub(super) aside: Arc<SetAside>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) rules: Rules,
    pub(super) room: Room,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while a snapshot is taken: two would write into one file.
    taking: Mutex<()>,
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
    pub(super) engine: Arc<dyn Engine>,
    pub(super) disk: Arc<dyn Disk>,
    pub(super) store: [u8; 16],
    pub(super) segments: Arc<Segments>,
    pub(super) figures: Arc<LogFigures>,
    pub(super) aside: Arc<SetAside>,
    pub(super) clock: Arc<dyn Clock>,
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
            rules,
            room: Room::default(),
            state: Mutex::new(State {
                closing: false,
                snapshots: from.snapshots,
                live: from.live,
                inherited: from.log_bytes,
                mark: 0,
                mark_frame: from.last_frame,
                taken_at: now,
                not_before: now,
            }),
            changed: Condvar::new(),
            taking: Mutex::new(()),
        };
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

    pub(super) fn close(&self) {
        self.lock().closing = true;
        self.changed.notify_all();
    }

    /// The keeper's thread.
    pub(super) fn run(&self) {
        loop {
            let state = self.lock();
            let (state, _) = self
                .changed
                .wait_timeout_while(state, LOOK_EVERY, |state| !state.closing)
                .unwrap_or_else(PoisonError::into_inner);
            if state.closing {
                return;
            }
            drop(state);
            self.look_at_room();
            if self.due() {
                self.try_snapshot();
            }
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
        let began = std::cell::Cell::new(self.clock.now().mono);
        let breathe = || {
            let took = (self.clock.now().mono - began.get()).min(PAUSE_MAX);
            // As long a pause as the block took leaves half of a core to others.
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
        };
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
            self.disk.remove(&snapshot::name(frame))?;
        }
        Ok(Some(info))
    }
}
