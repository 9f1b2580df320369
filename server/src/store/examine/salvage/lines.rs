//! The main line and the side lines, read into one engine.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;
use std::path::Path;

use bytes::Bytes;

use super::bases::{Ahead, Base, Group, Origin};
use super::merge::Merge;
use super::{SalvageError, SideLine, engine_error};
use crate::store::backup::erasures;
use crate::store::engine::{Direction, Engine, EngineWrite};
use crate::store::examine::frames::{Numbers, SegmentSeen};
use crate::store::examine::sources::{Applied, Scratch, each_frame, put, replay};
use crate::store::examine::view::ViewDisk;
use crate::store::examine::{EngineState, InspectError, Inspection, Progress, home};
use crate::store::record::{self, Pair, PairStored};
use crate::store::write::Write;
use crate::store::{keys, snapshot};

pub(super) struct Work<'a> {
    pub(super) disk: &'a ViewDisk,
    pub(super) dir: &'a Path,
    pub(super) store: Option<[u8; 16]>,
    pub(super) segments: &'a [SegmentSeen],
    pub(super) scratch: Option<&'a Path>,
    /// The highest run that was seen.
    pub(super) run: u64,
}

/// Where a delta says that a key was deleted.
pub(super) const DELETED: u8 = 0;
/// Where it says that a key was written; the value follows.
pub(super) const WRITTEN: u8 = 1;

/// Rooms whose records are taken whole from a side line.
const REGISTRATIONS: [u8; 8] = [b'a', b'k', b'd', b'h', b'i', b'f', b'v', keys::EXPANSIONS];

impl Work<'_> {
    /// Opens the base that leaves the least missing.
    pub(super) fn main_line(
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

    pub(super) fn bring_up(
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
    pub(super) fn side_lines(
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
    pub(super) fn look_elsewhere(
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
    pub(super) fn raise_run(&self, main: &dyn Engine, now_ms: u64) -> Result<u64, SalvageError> {
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

pub(super) fn written(value: &[u8]) -> Vec<u8> {
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
pub(super) fn each_of(engine: &dyn Engine, room: u8, visit: Each<'_>) -> Result<(), SalvageError> {
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
