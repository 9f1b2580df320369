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
//! 4. *Repair* (`audit.rs`): counters and indexes are made anew from the rows, and what dangles is ended.
//!
//! The outcome has an identity of its own, so that its files are never mixed with those that it was made of, and its run
//! is above every run that was ever seen, so that every row in it is marked as redelivered.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use serde::Serialize;

use super::audit::{Audit, Manner, cross_check, read_all};
use super::frames::{Numbers, SegmentSeen, SegmentState};
use super::sources::{Applied, Scratch, each_frame, put, replay};
use super::view::ViewDisk;
use super::{
    AsideSeen, EngineState, Holder, Inspect, InspectError, Inspection, Progress, Range, home,
    inspect,
};
use crate::delivery::{AppId, DeviceId, Notification, PingId, RowKey, Summary, Urgency};
use crate::ports::{Clock, Entropy, Erased};
use crate::store::backup::erasures;
use crate::store::backup::{BUILDING, REPLACED};
use crate::store::engine::{Direction, Engine, EngineWrite};
use crate::store::identity::{FORMAT, read_identity, write_identity};
use crate::store::log::disk::{Disk, RealDisk, make_private_dir};
use crate::store::record::{self, Pair, PairStored};
use crate::store::set_aside::{self, SetAside};
use crate::store::settings::{OpenError, StoreSettings};
use crate::store::snapshot::SnapshotError;
use crate::store::write::Write;
use crate::store::{keys, open, snapshot};

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

/// Which store it is: by its format file, or else by the head of its newest segment or snapshot.
fn identity_of(disk: &ViewDisk, inspection: &Inspection) -> Option<[u8; 16]> {
    if let Ok(Some(identity)) = read_identity(disk, &inspection.dir) {
        return Some(identity.store);
    }
    let by_log = inspection.log.iter().rev().find_map(|segment| {
        let (_, read) = super::frames::look(disk, &segment.file, None, None);
        Some(read?.header.store)
    });
    by_log.or_else(|| {
        inspection
            .snapshots
            .iter()
            .rev()
            .find_map(|seen| snapshot::store_of(disk, seen.frame).ok())
    })
}

/// What one start set aside.
struct Group {
    stamp: String,
    cut: Option<u64>,
    segments: Vec<SegmentSeen>,
}

/// By the stamps in the names, oldest first.
fn groups(inspection: &Inspection) -> Vec<Group> {
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    for aside in &inspection.set_aside {
        let (file, segment, cut) = match aside {
            AsideSeen::Segment(segment) => (&segment.file, Some(segment), None),
            AsideSeen::Note { file, text } => (file, None, set_aside::cut_of(text)),
            AsideSeen::Record { .. } | AsideSeen::Other(_) => continue,
        };
        let Some(stamp) = set_aside::stamp_of(file) else {
            continue;
        };
        let group = groups.entry(stamp.to_owned()).or_insert_with(|| Group {
            stamp: stamp.to_owned(),
            cut: None,
            segments: Vec::new(),
        });
        group.cut = group.cut.or(cut);
        group.segments.extend(segment.cloned());
    }
    groups.into_values().collect()
}

/// Something to begin with.
#[derive(Clone)]
struct Base {
    name: String,
    frame: u64,
    from: Origin,
    /// Its files prove nothing.
    unproven: bool,
}

/// An engine that knows of frames which the main line went on without.
struct Ahead {
    base: Base,
    cut: Option<u64>,
    /// Which start went on without them.
    group: usize,
}

#[derive(Clone)]
enum Origin {
    Nothing,
    Snapshot,
    Engine(home::FileEngine),
}

/// What there is to begin with, and beside it.
struct Bases {
    /// On the main line.
    bases: Vec<Base>,
    /// Engines that left it: they are ahead of where it went on without them.
    ahead: Vec<Ahead>,
    /// Engines of which nobody knows which of the two they are.
    passed_over: Vec<String>,
}

/// Whether the note of a start tells of an engine that was moved aside under this stamp.
fn is_noted(groups: &[Group], stamp: &str) -> bool {
    let tells = |group: &Group| {
        let rest = stamp.strip_prefix(group.stamp.as_str());
        // Two engines of one name and time have a number behind it.
        group.cut.is_some() && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    };
    groups.iter().any(tells)
}

fn bases(inspection: &Inspection, groups: &[Group], store: Option<[u8; 16]>) -> Bases {
    let mut bases = vec![Base {
        name: "nothing".to_owned(),
        frame: 1,
        from: Origin::Nothing,
        unproven: false,
    }];
    let mut ahead = Vec::new();
    let mut unnoted = Vec::new();
    for seen in inspection
        .snapshots
        .iter()
        .filter(|seen| seen.verified && store.is_some())
    {
        bases.push(Base {
            name: seen.file.clone(),
            frame: seen.frame,
            from: Origin::Snapshot,
            unproven: false,
        });
    }
    for engine in &inspection.engines {
        let Some(kind) = home::whose(&engine.dir) else {
            continue;
        };
        let (EngineState::Opens { position }
        | EngineState::Unproven {
            position: Some(position),
            ..
        }) = engine.state
        else {
            continue;
        };
        let base = Base {
            name: engine.dir.clone(),
            frame: position,
            from: Origin::Engine(kind),
            unproven: matches!(engine.state, EngineState::Unproven { .. }),
        };
        let stamp = engine.dir.split_once(home::ASIDE).map(|(_, stamp)| stamp);
        if engine.aside && stamp.is_some_and(|stamp| !is_noted(groups, stamp)) {
            unnoted.push(base);
            continue;
        }
        // The first start from that one on which went on from before this engine's place counts.
        let left = stamp.and_then(|stamp| {
            let after = groups
                .iter()
                .enumerate()
                .filter(|(_, group)| group.stamp.as_str() >= stamp);
            after
                .filter_map(|(index, group)| Some((index, group.cut?)))
                .find(|(_, cut)| position > *cut)
        });
        match left {
            Some((group, cut)) if engine.aside => ahead.push(Ahead {
                base,
                cut: Some(cut),
                group,
            }),
            Some(_) | None => bases.push(base),
        }
    }
    let something = bases.len() > 1
        || !ahead.is_empty()
        || inspection.log.iter().any(|segment| segment.range.is_some());
    let mut passed_over = Vec::new();
    if something {
        passed_over = unnoted.into_iter().map(|base| base.name).collect();
    } else {
        // There is no line that it could contradict.
        bases.append(&mut unnoted);
    }
    Bases {
        bases,
        ahead,
        passed_over,
    }
}

fn missing(numbers: &Numbers, from: u64, end: u64) -> Vec<Range> {
    let mut missing = Vec::new();
    let mut next = from;
    for run in numbers.runs() {
        if run.to < next {
            continue;
        }
        if run.from > next {
            missing.push(Range {
                from: next,
                to: run.from - 1,
            });
        }
        next = run.to + 1;
    }
    if next < end {
        missing.push(Range {
            from: next,
            to: end - 1,
        });
    }
    missing
}

fn unreadable(inspection: &Inspection) -> Vec<String> {
    let mut files: Vec<String> = Vec::new();
    let set_aside = inspection.set_aside.iter().filter_map(|aside| match aside {
        AsideSeen::Segment(segment) => Some(segment),
        AsideSeen::Record { .. } | AsideSeen::Note { .. } | AsideSeen::Other(_) => None,
    });
    for segment in inspection.log.iter().chain(set_aside) {
        if segment.state != SegmentState::Whole {
            files.push(segment.file.clone());
        }
    }
    for seen in &inspection.snapshots {
        if !seen.verified {
            files.push(seen.file.clone());
        }
    }
    for engine in &inspection.engines {
        if matches!(engine.state, EngineState::Fails { .. }) {
            files.push(engine.dir.clone());
        }
    }
    files
}

struct Work<'a> {
    disk: &'a ViewDisk,
    dir: &'a Path,
    store: Option<[u8; 16]>,
    segments: &'a [SegmentSeen],
    scratch: Option<&'a Path>,
    /// The highest run that was seen.
    run: u64,
}

/// Where a delta says that a key was deleted.
const DELETED: u8 = 0;
/// Where it says that a key was written; the value follows.
const WRITTEN: u8 = 1;

/// Rooms whose records are taken whole from a side line.
const REGISTRATIONS: [u8; 8] = [b'a', b'k', b'd', b'h', b'i', b'f', b'v', keys::EXPANSIONS];

impl Work<'_> {
    /// Opens the base that leaves the least missing.
    fn main_line(
        &self,
        bases: &[Base],
        numbers: &Numbers,
        end: u64,
        progress: Progress<'_>,
    ) -> Result<(Scratch, Base), SalvageError> {
        let mut order: Vec<&Base> = bases.iter().collect();
        order.sort_by_key(|base| {
            (
                numbers.missing_between(base.frame, end),
                base.unproven,
                std::cmp::Reverse(base.frame),
            )
        });
        for base in order {
            progress(&format!("beginning with {}", base.name));
            let opened = match base.from {
                Origin::Nothing => Scratch::empty(self.scratch)?,
                Origin::Snapshot => {
                    Scratch::of_snapshot(self.disk, base.frame, self.store, self.scratch)?
                }
                Origin::Engine(kind) => {
                    match Scratch::copy_of(kind, &self.dir.join(&base.name), self.scratch)? {
                        Ok(opened) => opened,
                        // It opened a moment ago; the next one may still do.
                        Err(_) => continue,
                    }
                }
            };
            return Ok((opened, base.clone()));
        }
        Err(SalvageError::Nothing(self.dir.to_owned()))
    }

    fn bring_up(
        &mut self,
        engine: &dyn Engine,
        from: u64,
        end: u64,
        progress: Progress<'_>,
    ) -> Result<Applied, SalvageError> {
        progress("applying every frame that can be read");
        let applied = replay(self.disk, self.segments, self.store, engine, from, end)?;
        self.note_run(engine.get(keys::RUN).map_err(engine_error)?.as_deref());
        Ok(applied)
    }

    fn note_run(&mut self, value: Option<&[u8]>) {
        if let Some(run) = value.and_then(|value| record::number(keys::RUN, value).ok()) {
            self.run = self.run.max(run);
        }
    }

    /// What was set aside, the latest first: each is judged by everything that came after it.
    fn side_lines(
        &mut self,
        main: &dyn Engine,
        groups: &[Group],
        ahead: &[Ahead],
        end: u64,
        progress: Progress<'_>,
    ) -> Result<Vec<SideLine>, SalvageError> {
        let mut lines = Vec::new();
        if groups.iter().all(|group| group.segments.is_empty()) && ahead.is_empty() {
            return Ok(lines);
        }
        // What later frames of the main line wrote: keys of registrations, and ends.
        let later = Scratch::empty(self.scratch)?;
        let mut reached = end;
        for (index, group) in groups.iter().enumerate().rev() {
            let cut = group.cut.unwrap_or(1);
            if cut < reached {
                self.note_later(&later, cut, reached)?;
                reached = cut;
            }
            for ahead in ahead.iter().filter(|ahead| ahead.group == index) {
                progress(&format!("taking what {} has more", ahead.base.name));
                lines.push(self.take_engine(main, &later, &ahead.base, ahead.cut)?);
            }
            if group.segments.is_empty() {
                continue;
            }
            progress(&format!("taking what was set aside at {}", group.stamp));
            let delta = Scratch::empty(self.scratch)?;
            let mut line = SideLine {
                name: group.stamp.clone(),
                cut: group.cut,
                ..SideLine::default()
            };
            let mut run = None;
            let applied = each_frame(
                self.disk,
                &group.segments,
                self.store,
                cut,
                u64::MAX,
                &mut |_, writes| {
                    run = note_delta(&delta, &writes)?.or(run.take());
                    Ok(())
                },
            )?;
            self.note_run(run.as_deref());
            line.frames = applied.frames;
            let numbers = Numbers::of(&group.segments);
            line.unreadable_frames = applied.foreign
                + numbers
                    .last()
                    .map_or(0, |last| numbers.missing_between(cut, last + 1));
            self.merge(main, &later, &delta, &mut line)?;
            lines.push(line);
        }
        Ok(lines)
    }

    /// An engine that is ahead of where the main line went on: everything that it has, judged like the rest.
    fn take_engine(
        &mut self,
        main: &dyn Engine,
        later: &Scratch,
        base: &Base,
        cut: Option<u64>,
    ) -> Result<SideLine, SalvageError> {
        let mut line = SideLine {
            name: base.name.clone(),
            cut,
            ..SideLine::default()
        };
        let Origin::Engine(kind) = base.from else {
            return Ok(line);
        };
        let Ok(copy) = Scratch::copy_of(kind, &self.dir.join(&base.name), self.scratch)? else {
            return Ok(line);
        };
        let delta = Scratch::empty(self.scratch)?;
        let mut writes = Vec::new();
        let mut outcome = Ok(());
        copy.engine
            .scan(&[]..&[u8::MAX], Direction::Up, &mut |key, value| {
                if record::verify(key, value).is_ok() {
                    writes.push(put(key, written(value)));
                }
                if writes.len() >= crate::store::engine::BATCH_OPERATIONS {
                    outcome = delta.put(&mut writes);
                }
                if outcome.is_ok() {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
            .map_err(engine_error)?;
        outcome?;
        delta.put(&mut writes)?;
        let run = copy.engine.get(keys::RUN).map_err(engine_error)?;
        self.note_run(run.as_deref());
        self.merge(main, later, &delta, &mut line)?;
        Ok(line)
    }

    /// Notes what the frames of the main line between two numbers wrote.
    fn note_later(&self, later: &Scratch, from: u64, to: u64) -> Result<(), SalvageError> {
        let mut notes = Vec::new();
        each_frame(
            self.disk,
            self.segments,
            self.store,
            from,
            to,
            &mut |_, writes| {
                for write in &writes {
                    match write {
                        Write::Put { key, .. } | Write::Delete { key }
                            if key.first().is_some_and(|room| REGISTRATIONS.contains(room)) =>
                        {
                            notes.push(put(key, vec![WRITTEN]));
                        }
                        Write::Put { key, value } if key.first() == Some(&b'p') => {
                            let ended_at = |value: &[u8]| match record::pair(key, value) {
                                Ok(Pair {
                                    state: PairStored::Ended { at_ms, .. },
                                    ..
                                }) => Some(at_ms),
                                Ok(_) | Err(_) => None,
                            };
                            let known = later.engine.get(key).map_err(engine_error)?;
                            // Frames further back are noted later and must not hide a later end.
                            let known = known.and_then(|value| ended_at(&value));
                            if ended_at(value) > known {
                                notes.push(put(key, value.to_vec()));
                            }
                        }
                        Write::Put { .. }
                        | Write::Delete { .. }
                        | Write::Collect { .. }
                        | Write::DropReceipt { .. }
                        | Write::Settle { .. } => {}
                    }
                }
                later.put(&mut notes)
            },
        )?;
        Ok(())
    }

    /// Brings a side line into the main one.
    fn merge(
        &self,
        main: &dyn Engine,
        later: &Scratch,
        delta: &Scratch,
        line: &mut SideLine,
    ) -> Result<(), SalvageError> {
        let merge = Merge {
            main,
            later: &*later.engine,
        };
        // An erasure stays one, whichever line it is from, and the later of two counts.
        each_of(&*delta.engine, keys::ERASURES, &mut |key, value| {
            let Some((&WRITTEN, value)) = value.split_first() else {
                return Ok(());
            };
            let known = merge
                .get(key)?
                .and_then(|known| erasures::of_entry(key, &known));
            match (known, erasures::of_entry(key, value)) {
                (Some(known), Some(new)) if erasures::merged(known, new) == known => Ok(()),
                (_, Some(_)) | (None, None) => merge.write(&[put(key, value.to_vec())]),
                (Some(_), None) => Ok(()),
            }
        })?;
        for room in REGISTRATIONS {
            each_of(&*delta.engine, room, &mut |key, value| {
                merge.registration(key, value, line)
            })?;
        }
        each_of(&*delta.engine, b'p', &mut |key, value| {
            merge.end(key, value, line)
        })?;
        each_of(&*delta.engine, b'b', &mut |key, value| {
            if let Some((&WRITTEN, value)) = value.split_first()
                && merge.get(key)?.is_none()
            {
                merge.write(&[put(key, value.to_vec())])?;
            }
            Ok(())
        })?;
        each_of(&*delta.engine, b'r', &mut |key, value| {
            merge.row(key, value, line)
        })
    }

    /// Searches the other sources for records that cannot be read, and drops those that nobody has.
    fn look_elsewhere(
        &self,
        main: &dyn Engine,
        rotten: &[Bytes],
        inspection: &Inspection,
        base: &Base,
    ) -> Result<u64, SalvageError> {
        let mut wanted: BTreeSet<Bytes> = rotten.iter().cloned().collect();
        let mut found: Vec<EngineWrite> = Vec::new();
        for seen in inspection
            .snapshots
            .iter()
            .rev()
            .filter(|seen| seen.verified)
        {
            if wanted.is_empty() {
                break;
            }
            // One that turns out to be unreadable gives what it gave.
            let _ = snapshot::read(
                self.disk,
                &seen.file,
                self.store.unwrap_or_default(),
                &mut |key, value| {
                    if wanted.contains(key) && record::verify(key, value).is_ok() {
                        wanted.remove(key);
                        found.push(put(key, value.to_vec()));
                    }
                    Ok(())
                },
            );
        }
        for engine in &inspection.engines {
            let (Some(kind), EngineState::Opens { .. }) = (home::whose(&engine.dir), &engine.state)
            else {
                continue;
            };
            if wanted.is_empty() || engine.dir == base.name {
                continue;
            }
            let Ok(copy) = Scratch::copy_of(kind, &self.dir.join(&engine.dir), self.scratch)?
            else {
                continue;
            };
            for key in wanted.clone() {
                let value = copy.engine.get(&key).map_err(engine_error)?;
                if let Some(value) = value.filter(|value| record::verify(&key, value).is_ok()) {
                    wanted.remove(&key);
                    found.push(put(&key, value.to_vec()));
                }
            }
        }
        // Frames hold what was written, however the engine kept it afterwards: the last write of a key is its value.
        if !wanted.is_empty() {
            let mut last: BTreeMap<Bytes, Bytes> = BTreeMap::new();
            each_frame(
                self.disk,
                self.segments,
                self.store,
                1,
                u64::MAX,
                &mut |_, writes| {
                    for write in writes {
                        if let Write::Put { key, value } = write
                            && wanted.contains(&key)
                            && record::verify(&key, &value).is_ok()
                        {
                            last.insert(key, Bytes::copy_from_slice(&value));
                        }
                    }
                    Ok(())
                },
            )?;
            for (key, value) in last {
                wanted.remove(&key);
                found.push(put(&key, value.to_vec()));
            }
        }
        let count = found.len() as u64;
        found.extend(
            wanted
                .into_iter()
                .map(|key| EngineWrite { key, value: None }),
        );
        for batch in found.chunks(crate::store::engine::BATCH_OPERATIONS) {
            main.apply(batch, None).map_err(engine_error)?;
        }
        Ok(count)
    }

    /// Puts the run above every one that was seen, with room for those that may have been in frames that are lost.
    fn raise_run(&self, main: &dyn Engine, now_ms: u64) -> Result<u64, SalvageError> {
        let run = if self.run == 0 {
            // Nothing says how many there were; there were fewer than seconds.
            now_ms / 1000
        } else {
            self.run + RUNS_UNSEEN
        };
        let run = run.min(u64::from(u32::MAX - 1));
        let mut value = Vec::new();
        record::put_number(keys::RUN, &mut value, run);
        main.apply(&[put(keys::RUN, value)], None)
            .map_err(engine_error)?;
        Ok(run + 1)
    }
}

/// Runs that may have begun in frames that nobody can read any more.
const RUNS_UNSEEN: u64 = 1_000;

fn written(value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(1 + value.len());
    bytes.push(WRITTEN);
    bytes.extend_from_slice(value);
    bytes
}

/// Notes the writes of a frame of a side line. Answers the run that it begins, if it begins one.
fn note_delta(delta: &Scratch, writes: &[Write]) -> Result<Option<Bytes>, InspectError> {
    let mut notes: BTreeMap<&[u8], Vec<u8>> = BTreeMap::new();
    let mut run = None;
    for write in writes {
        match write {
            Write::Put { key, value } => {
                if &**key == keys::RUN {
                    run = Some(Bytes::copy_from_slice(value));
                }
                notes.insert(key, written(value));
            }
            Write::Delete { key } => {
                notes.insert(key, vec![DELETED]);
            }
            Write::Collect { .. } | Write::DropReceipt { .. } | Write::Settle { .. } => {}
        }
    }
    let mut notes = notes
        .into_iter()
        .map(|(key, value)| put(key, value))
        .collect();
    delta.put(&mut notes)?;
    Ok(run)
}

/// What is done with an entry of a delta.
type Each<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<(), InspectError>;

/// Hands the entries of a room on; `visit` may write to another engine.
fn each_of(engine: &dyn Engine, room: u8, visit: Each<'_>) -> Result<(), SalvageError> {
    let mut outcome = Ok(());
    engine
        .scan(&[room]..&[room + 1], Direction::Up, &mut |key, value| {
            outcome = visit(key, value);
            if outcome.is_ok() {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })
        .map_err(engine_error)?;
    Ok(outcome?)
}

/// Takes out again what was erased for good: a side line may be of a time before that.
fn erase(main: &dyn Engine) -> Result<(), SalvageError> {
    let mut gone: Vec<EngineWrite> = Vec::new();
    let mut expansions: BTreeSet<PingId> = BTreeSet::new();
    let delete = |key: &[u8]| EngineWrite {
        key: Bytes::copy_from_slice(key),
        value: None,
    };
    each_of(main, keys::ERASURES, &mut |key, value| {
        let Some(erasure) = erasures::of_entry(key, value) else {
            return Ok(());
        };
        match erasure.what {
            // Its rows end with it: a repair ends what has lost its device.
            Erased::Device(device) => {
                gone.push(delete(&keys::device(device)));
                gone.push(delete(&keys::seen(device)));
                gone.push(delete(&keys::topics(device)));
            }
            Erased::Key(id) => gone.push(delete(&keys::api_key(id))),
            Erased::Notification(ping, device) => {
                let pair = keys::pair(ping, device);
                let stored = main.get(&pair).map_err(engine_error)?;
                let stored = stored.and_then(|value| record::pair(&pair, &value).ok());
                if let Some(PairStored::Waiting { row, .. }) = stored.map(|pair| pair.state) {
                    let row_key = keys::row(device, row);
                    let value = main.get(&row_key).map_err(engine_error)?;
                    let accepted = value.and_then(|value| {
                        let row = record::row(&row_key, row, &value).ok()?;
                        Some(row.notification(None).accepted_ms)
                    });
                    if accepted.is_some_and(|accepted| accepted <= erasure.at_ms) {
                        gone.push(delete(&row_key));
                    }
                }
            }
            Erased::Expansion(ping) => drop(expansions.insert(ping)),
            // The devices of the user have erasures of their own.
            Erased::User(_) => {}
        }
        if gone.len() + 3 >= crate::store::engine::BATCH_OPERATIONS {
            main.apply(&gone, None).map_err(engine_error)?;
            gone.clear();
        }
        Ok(())
    })?;
    main.apply(&gone, None).map_err(engine_error)?;
    gone.clear();
    // A repair drops what belongs to a head that is gone.
    if !expansions.is_empty() {
        each_of(main, keys::EXPANSIONS, &mut |key, value| {
            if let Some((app, stamp, keys::Part::Head)) = keys::parse_expansion(key)
                && let Ok(head) = record::expansion(key, app, stamp, value)
                && expansions.contains(&head.notification.ping)
            {
                gone.push(delete(key));
            }
            Ok(())
        })?;
        for batch in gone.chunks(crate::store::engine::BATCH_OPERATIONS) {
            main.apply(batch, None).map_err(engine_error)?;
        }
    }
    Ok(())
}

struct Merge<'a> {
    main: &'a dyn Engine,
    later: &'a dyn Engine,
}

impl Merge<'_> {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, InspectError> {
        self.main.get(key).map_err(engine_error)
    }

    fn write(&self, writes: &[EngineWrite]) -> Result<(), InspectError> {
        self.main.apply(writes, None).map_err(engine_error)
    }

    /// A device, an app, a key: what came later counts.
    fn registration(
        &self,
        key: &[u8],
        value: &[u8],
        line: &mut SideLine,
    ) -> Result<(), InspectError> {
        if self.later.get(key).map_err(engine_error)?.is_some() {
            return Ok(());
        }
        let there = self.get(key)?;
        match value.split_first() {
            Some((&WRITTEN, value)) if there.as_deref() != Some(value) => {
                let mut writes = vec![put(key, value.to_vec())];
                // A device has a mailbox as long as it is there.
                if let Some(id) = key.strip_prefix(b"d").and_then(|_| keys::parse_id(key)) {
                    let device = DeviceId(id);
                    let summary = keys::summary(device);
                    if let (None, Ok(record)) =
                        (self.get(&summary)?, record::device(key, device, value))
                    {
                        let mut bytes = Vec::new();
                        record::put_summary(&summary, &mut bytes, &Summary::new(record.app));
                        writes.push(put(&summary, bytes));
                    }
                }
                self.write(&writes)?;
                line.registrations += 1;
            }
            Some((&DELETED, _)) if there.is_some() => {
                self.write(&[EngineWrite {
                    key: Bytes::copy_from_slice(key),
                    value: None,
                }])?;
                line.removed += 1;
            }
            Some(_) | None => {}
        }
        Ok(())
    }

    fn pair(&self, key: &[u8]) -> Result<Option<Pair>, InspectError> {
        Ok(self
            .get(key)?
            .and_then(|value| record::pair(key, &value).ok()))
    }

    fn notification(
        &self,
        device: DeviceId,
        row: RowKey,
    ) -> Result<Option<Arc<Notification>>, InspectError> {
        let key = keys::row(device, row);
        Ok(self.get(&key)?.and_then(|value| {
            record::row(&key, row, &value)
                .ok()
                .map(|row| row.notification(None))
        }))
    }

    /// The end of a notification: it counts unless the notification was accepted anew after it.
    fn end(&self, key: &[u8], value: &[u8], line: &mut SideLine) -> Result<(), InspectError> {
        let Some((&WRITTEN, value)) = value.split_first() else {
            return Ok(());
        };
        let (Some((_, device)), Ok(side)) = (keys::parse_pair(key), record::pair(key, value))
        else {
            return Ok(());
        };
        let PairStored::Ended { at_ms, .. } = side.state else {
            return Ok(());
        };
        match self.pair(key)?.map(|pair| pair.state) {
            Some(PairStored::Waiting { row, .. }) => {
                let accepted = self.notification(device, row)?.map(|note| note.accepted_ms);
                if accepted.is_some_and(|accepted| accepted > at_ms) {
                    return Ok(());
                }
                line.ended += u64::from(accepted.is_some());
                self.write(&[
                    put(key, value.to_vec()),
                    EngineWrite {
                        key: Bytes::copy_from_slice(&keys::row(device, row)),
                        value: None,
                    },
                ])
            }
            // The first verdict wins.
            Some(PairStored::Ended { at_ms: known, .. }) if known <= at_ms => Ok(()),
            Some(PairStored::Ended { .. }) | None => self.write(&[put(key, value.to_vec())]),
        }
    }

    /// A notification that waited: it waits again unless something says that it has ended.
    fn row(&self, key: &[u8], value: &[u8], line: &mut SideLine) -> Result<(), InspectError> {
        let (Some((&WRITTEN, value)), Some((device, row))) =
            (value.split_first(), keys::parse_row(key))
        else {
            return Ok(());
        };
        let Ok(stored) = record::row(key, row, value) else {
            return Ok(());
        };
        let note = stored.notification(None);
        let (ping, run) = (stored.meta.ping, stored.meta.run);
        let pair_key = keys::pair(ping, device);
        let ended = |pair: Option<Pair>| {
            matches!(
                pair.map(|pair| pair.state),
                Some(PairStored::Ended { at_ms, .. }) if at_ms >= note.accepted_ms
            )
        };
        let known = self.pair(&pair_key)?;
        let later = self
            .later
            .get(&pair_key)
            .map_err(engine_error)?
            .and_then(|value| record::pair(&pair_key, &value).ok());
        if ended(known) || ended(later) {
            return Ok(());
        }
        if let Some(PairStored::Waiting { row, .. }) = known.map(|pair| pair.state)
            && self.notification(device, row)?.is_some()
        {
            return Ok(());
        }
        let place = self.free_place(device, row, note.app)?;
        let row_key = keys::row(device, place);
        let mut bytes = Vec::new();
        record::put_row(&row_key, &mut bytes, run, &note);
        let mut pair = Vec::new();
        record::put_pair(
            &pair_key,
            &mut pair,
            Pair {
                app: note.app,
                state: PairStored::Waiting {
                    row: place,
                    expires_ms: note.expires_ms,
                },
            },
        );
        self.write(&[put(&row_key, bytes), put(&pair_key, pair)])?;
        line.notifications += 1;
        Ok(())
    }

    /// Where a row of a side line may stand: its own place, or behind all others if another row has its number now.
    fn free_place(
        &self,
        device: DeviceId,
        row: RowKey,
        app: AppId,
    ) -> Result<RowKey, InspectError> {
        let mut taken = false;
        for urgency in Urgency::ALL {
            taken |= self
                .get(&keys::row(device, RowKey { urgency, ..row }))?
                .is_some();
        }
        let key = keys::summary(device);
        let stored = self.get(&key)?;
        let mut summary = stored
            .and_then(|value| record::summary(&key, &value).ok())
            .unwrap_or(Summary::new(app));
        let order = if taken { summary.next_order } else { row.order };
        summary.next_order = summary.next_order.max(order.saturating_add(1));
        let mut bytes = Vec::new();
        record::put_summary(&key, &mut bytes, &summary);
        self.write(&[put(&key, bytes)])?;
        Ok(RowKey { order, ..row })
    }
}

// ---- The new store -------------------------------------------------------------------------------------------------

/// Files at the top of a data directory that belong to a process or to the old store's files, and are not copied. Nor is a store
/// that a restore is making.
const NOT_COPIED: [&str; 5] = ["lock", "server.lock", "listen.json", FORMAT, BUILDING];

fn write_store(
    ask: &Salvage,
    into: &Path,
    engine: &dyn Engine,
    (clock, entropy): (Arc<dyn Clock>, Arc<dyn Entropy>),
    salvaged: &mut Salvaged,
    progress: Progress<'_>,
) -> Result<(), SalvageError> {
    let io = |what: &str| InspectError::io(format!("{what} {}", into.display()));
    let place = crate::store::place::prepare(into)?;
    let into = place.path.as_path();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(into));
    let mut store = [0; 16];
    entropy.fill(&mut store);
    snapshot::take(
        engine,
        &snapshot::Surroundings {
            disk: &*disk,
            store,
            now_ms: clock.now().unix_ms,
            aside: &SetAside::new(Arc::clone(&disk), 0),
            breathe: &|| ControlFlow::Continue(()),
        },
    )
    .map_err(|error| InspectError::engine(format!("the snapshot cannot be written: {error}")))?;
    salvaged.copied =
        copy_others(&salvaged.inspection, into).map_err(io("other files cannot be copied to"))?;
    // Last: a directory without it is no store, so one that was left half made is never started from.
    write_identity(&*disk, store, true).map_err(io("the format file cannot be written in"))?;
    progress("starting from it once");
    let settings = StoreSettings {
        dir: into.to_owned(),
        ..ask.settings.clone()
    };
    let opened = open(&settings, clock, entropy)?;
    salvaged.run = u64::from(opened.report.run);
    opened.store.close();
    salvaged.store = Some(HEXLOWER.encode(&store));
    salvaged.into = Some(into.to_owned());
    Ok(())
}

/// Copies what is not the store's: keys and certificates, without which no device could come back.
fn copy_others(inspection: &Inspection, into: &Path) -> io::Result<Vec<String>> {
    let mut copied = Vec::new();
    for other in &inspection.other {
        let from = inspection.dir.join(&other.name);
        let skip = NOT_COPIED.contains(&other.name.as_str())
            || other.name.contains(".aside")
            || other.name.starts_with(REPLACED);
        if skip {
            continue;
        }
        let to = into.join(&other.name);
        let kind = fs::symlink_metadata(&from)?.file_type();
        if kind.is_dir() {
            make_private_dir(&to)?;
            super::engines::copy_dir(&from, &to)?;
        } else if kind.is_file() {
            super::engines::copy_file(&from, &to)?;
        } else {
            continue;
        }
        copied.push(other.name.clone());
    }
    fs::File::open(into)?.sync_all()?;
    Ok(copied)
}
