//! A store that starts, made of whatever can be read of one that does not, or of one that lost something on the way.
//!
//! # Which history is believed
//!
//! A store has one main line: the frames of its log as they are now. Where an earlier start met a place that it could not
//! read, it went on from before that place and set the frames behind it aside; where an engine knew of frames that the
//! log had lost, it set the engine aside. Those are side lines: they were promised too, they belong to the time
//! before the main line went on without them, and their numbers are used a second time by frames that came later. The note that a
//! start writes beside what it sets aside (`set_aside.rs`) says from which number on.
//!
//! 1. *The main line.* The base that leaves the fewest frames missing is taken (an engine, an engine that a note says was set aside
//!    before the line went on, a snapshot, nothing), then every readable frame after it, also those behind a rotten place.
//!    Frames write absolute values, so the newest wins by its number.
//! 2. *The side lines*, the latest first. What they say of devices, apps and keys counts unless a later frame of
//!    the main line wrote the same. An end counts, also against a row of the main line. A row counts if nothing
//!    says that its notification has ended; it gets a new place if its number was used again.
//! 3. *Records that rotted* are looked for in every other source.
//! 4. *Repair* (`examine/audit/`): counters and indexes are made anew from the rows, and what dangles is ended.
//!
//! The outcome has an identity of its own, so that its files are never mixed with those that it was made of, and its run
//! is above every run that was ever seen, so that every row in it is marked as redelivered.

mod bases;
mod build;
mod lines;
mod merge;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::{fs, io};

use serde::Serialize;

use self::bases::{Bases, bases, groups, identity_of, missing, unreadable};
use self::build::write_store;
use self::lines::Work;
use self::merge::erase;
use crate::ports::{Clock, Entropy};
use crate::store::engine::Engine;
use crate::store::examine::audit::{Audit, Manner, cross_check, read_all};
use crate::store::examine::frames::{Numbers, SegmentSeen, SegmentState};
use crate::store::examine::view::ViewDisk;
use crate::store::examine::{
    AsideSeen, Holder, Inspect, InspectError, Inspection, Progress, Range, home, inspect,
};
use crate::store::identity::read_identity;
use crate::store::settings::{OpenError, StoreSettings};
use crate::store::snapshot::{self, SnapshotError};

/// What to save from where.
#[derive(Debug, Clone)]
pub struct Salvage {
    /// The data directory that something is wrong with. It is only read.
    pub broken: PathBuf,
    /// Where the new one goes: a directory that is not there yet, or empty. `None`: only say what would be done.
    pub into: Option<PathBuf>,
    /// Where copies of engines go. `None`: the system's directory for temporary files.
    pub scratch: Option<PathBuf>,
    /// The settings that the new store is opened with; its directory is that of `into`.
    pub settings: StoreSettings,
}

/// What was saved, from where, and what was not.
#[derive(Debug, Clone, Serialize)]
pub struct Salvaged {
    /// What was looked at.
    pub inspection: Inspection,
    /// Where it began: `sled`, `snapshots/...`, or `nothing`.
    pub base: String,
    /// The frame that the base takes next.
    pub base_frame: u64,
    /// Frames of the log that were applied to it.
    pub frames: u64,
    /// Frames that nothing has any more.
    pub lost_frames: Vec<Range>,
    /// What was set aside, the latest first.
    pub side_lines: Vec<SideLine>,
    /// Engines that were moved aside and that no note tells the place of. They are not used: what they know may have ended long ago.
    pub passed_over: Vec<String>,
    /// Records that could not be read where they were.
    pub rotten: u64,
    /// Those of them that were found somewhere else.
    pub found_elsewhere: u64,
    /// What did not fit and was put right, by kind.
    pub repaired: BTreeMap<&'static str, u64>,
    /// What still does not fit after that, in words.
    pub left: Vec<String>,
    /// What is in the new store: records by the first letter of their keys.
    pub records: BTreeMap<char, u64>,
    /// Files that could not be read, in whole or in part. All of them are where they were.
    pub unreadable: Vec<String>,
    /// Other files of the data directory that were copied.
    pub copied: Vec<String>,
    /// The identity of the new store. `None`: nothing was written.
    pub store: Option<String>,
    /// The number of its first run.
    pub run: u64,
    /// Where it is. `None`: nothing was written.
    pub into: Option<PathBuf>,
}

/// What came of something that was set aside.
#[derive(Debug, Clone, Default, Serialize)]
pub struct SideLine {
    /// What it is: the time of a start, or an engine's directory.
    pub name: String,
    /// The main line went on without it from this frame on; `None`: no note says so.
    pub cut: Option<u64>,
    /// Frames in it that were used.
    pub frames: u64,
    /// Frames in it that could not be read.
    pub unreadable_frames: u64,
    /// Notifications that wait again because of it.
    pub notifications: u64,
    /// Notifications that have ended because of it.
    pub ended: u64,
    /// Devices, apps, keys and used idempotency keys that were taken from it.
    pub registrations: u64,
    /// The same, removed because of it.
    pub removed: u64,
}

/// Why nothing could be saved.
#[derive(Debug, thiserror::Error)]
pub enum SalvageError {
    /// Looking at it failed.
    #[error(transparent)]
    Inspect(#[from] InspectError),
    /// A server has it.
    #[error("a server has the data directory {dir}{}; stop it first", pid.map_or(String::new(), |pid| format!(" (process {pid})")))]
    InUse {
        /// The data directory.
        dir: PathBuf,
        /// Which.
        pid: Option<u32>,
    },
    /// The new directory is in use for something.
    #[error("{0} is not empty; name a directory that is not there yet")]
    NotEmpty(PathBuf),
    /// The new directory would be in the old one.
    #[error("{0} is a part of the directory that is saved; name one outside of it")]
    Inside(PathBuf),
    /// Written by a later version.
    #[error("{0}: use the version of this program that wrote it, or a later one")]
    Newer(String),
    /// There is nothing to save.
    #[error("there is nothing of a store in {0}")]
    Nothing(PathBuf),
    /// The new store does not open.
    #[error("the new store cannot be opened: {0}")]
    Open(#[from] OpenError),
}

fn engine_error(error: crate::store::engine::EngineError) -> InspectError {
    InspectError::engine(error.0)
}

/// Saves what can be saved. Changes nothing in the broken directory.
///
/// # Errors
/// When a server has the directory, when it was written by a later version, when there is no room, or when nothing is there.
pub fn salvage(
    ask: &Salvage,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
    progress: Progress<'_>,
) -> Result<Salvaged, SalvageError> {
    let into = ask.into.as_deref();
    if let Some(into) = into {
        target_is_free(&ask.broken, into)?;
    }
    progress("reading log, snapshots and engines");
    let inspection = inspect(&Inspect {
        dir: ask.broken.clone(),
        open_engines: true,
        scratch: ask.scratch.clone(),
    })?;
    if let Holder::Server { pid } = inspection.holder {
        return Err(SalvageError::InUse {
            dir: inspection.dir,
            pid,
        });
    }
    // Held until the end, so that no server starts on what is read.
    let _probe = super::lock::Probe::take(&inspection.dir);
    nothing_newer(&inspection)?;
    let disk = ViewDisk::new(&inspection.dir);
    let store = identity_of(&disk, &inspection);
    let segments: Vec<SegmentSeen> = inspection.log.clone();
    let groups = groups(&inspection);
    let numbers = Numbers::of(&segments);
    let Bases {
        bases,
        ahead,
        passed_over,
    } = bases(&inspection, &groups, store);
    let end = bases
        .iter()
        .map(|base| base.frame)
        .chain(numbers.last().map(|last| last + 1))
        .max()
        .unwrap_or(1);
    if end == 1 && groups.is_empty() && ahead.is_empty() {
        return Err(SalvageError::Nothing(inspection.dir.clone()));
    }
    let mut work = Work {
        disk: &disk,
        dir: &inspection.dir,
        store,
        segments: &segments,
        scratch: ask.scratch.as_deref(),
        run: 0,
    };
    let (main, base) = work.main_line(&bases, &numbers, end, progress)?;
    let lost = missing(&numbers, base.frame, end);
    let frames = work.bring_up(&*main.engine, base.frame, end, progress)?;
    let side_lines = work.side_lines(&*main.engine, &groups, &ahead, end, progress)?;
    erase(&*main.engine)?;
    progress("looking for records that cannot be read");
    let mut audit = Audit::default();
    let rotten = read_all(&*main.engine, &mut audit).map_err(engine_error)?;
    if let Some(version) = audit.newer {
        return Err(SalvageError::Newer(format!(
            "it has records of format {version}"
        )));
    }
    let found_elsewhere = work.look_elsewhere(&*main.engine, &rotten, &inspection, &base)?;
    progress("making counters and indexes anew");
    let gaps = !lost.is_empty() || rotten.iter().any(|key| key.first() == Some(&b's'));
    let now_ms = clock.now().unix_ms;
    let repaired = repair(&*main.engine, Manner::Repair { now_ms, gaps })?;
    let run = work.raise_run(&*main.engine, now_ms)?;
    let mut after = Audit::default();
    read_all(&*main.engine, &mut after).map_err(engine_error)?;
    cross_check(&*main.engine, Manner::Check, &mut after).map_err(engine_error)?;
    let unreadable = unreadable(&inspection);
    let mut salvaged = Salvaged {
        base: base.name,
        base_frame: base.frame,
        frames: frames.frames,
        lost_frames: lost,
        side_lines,
        rotten: rotten.len() as u64,
        found_elsewhere,
        repaired,
        left: after.told,
        passed_over,
        records: after.records,
        unreadable,
        copied: Vec::new(),
        store: None,
        run,
        into: None,
        inspection,
    };
    if let Some(into) = into {
        progress("writing the new store");
        main.engine.apply(&[], Some(end)).map_err(engine_error)?;
        write_store(
            ask,
            into,
            &*main.engine,
            (clock, entropy),
            &mut salvaged,
            progress,
        )?;
    }
    Ok(salvaged)
}

/// Most passes of a repair; one finds what another one changed, but for a few kinds none does.
const REPAIRS_MAX: usize = 8;

/// Repairs until there is nothing more to repair; answers what was put right, by kind.
fn repair(main: &dyn Engine, manner: Manner) -> Result<BTreeMap<&'static str, u64>, SalvageError> {
    let mut repaired: BTreeMap<&'static str, u64> = BTreeMap::new();
    for _ in 0..REPAIRS_MAX {
        let mut pass = Audit::default();
        cross_check(main, manner, &mut pass).map_err(engine_error)?;
        if pass.kinds.is_empty() {
            break;
        }
        for (kind, count) in pass.kinds {
            *repaired.entry(kind).or_default() += count;
        }
    }
    Ok(repaired)
}

fn target_is_free(broken: &Path, into: &Path) -> Result<(), SalvageError> {
    let io = |error| InspectError::io(into.display().to_string())(error);
    match fs::read_dir(into) {
        Ok(mut entries) => {
            if entries.next().is_some() {
                return Err(SalvageError::NotEmpty(into.to_owned()));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io(error).into()),
    }
    let there = into
        .ancestors()
        .find(|place| place.exists())
        .map_or_else(|| fs::canonicalize("."), fs::canonicalize)
        .map_err(io)?;
    if let Ok(broken) = fs::canonicalize(broken)
        && there.starts_with(&broken)
    {
        return Err(SalvageError::Inside(into.to_owned()));
    }
    Ok(())
}

/// Whatever a later version wrote may mean anything: nothing is done with it.
fn nothing_newer(inspection: &Inspection) -> Result<(), SalvageError> {
    let set_aside = inspection.set_aside.iter().filter_map(|aside| match aside {
        AsideSeen::Segment(segment) => Some(segment),
        AsideSeen::Record { .. } | AsideSeen::Note { .. } | AsideSeen::Other(_) => None,
    });
    for segment in inspection.log.iter().chain(set_aside) {
        if segment.state == SegmentState::Newer {
            return Err(SalvageError::Newer(format!(
                "{} is of a later format",
                segment.file
            )));
        }
    }
    let disk = ViewDisk::new(&inspection.dir);
    for seen in inspection.snapshots.iter().filter(|seen| !seen.verified) {
        if let Err(SnapshotError::Newer(_)) = snapshot::check(&disk, seen.frame, None) {
            return Err(SalvageError::Newer(format!(
                "{} is of a later format",
                seen.file
            )));
        }
    }
    if let Some(version) = home::newer(&disk) {
        return Err(SalvageError::Newer(format!(
            "the file `{}` has format {version}",
            home::POINTER
        )));
    }
    match read_identity(&disk, &inspection.dir) {
        Err(OpenError::Newer { what }) => Err(SalvageError::Newer(what)),
        Ok(_) | Err(_) => Ok(()),
    }
}
