//! What a store can be put together from: bases (engines, snapshots, nothing) and the frames after them.

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::engines::{TempCopy, open_engine};
use super::frames::{self, SegmentSeen};
use super::{InspectError, view::ViewDisk};
use crate::store::apply::apply_run;
use crate::store::engine::{Engine, EngineWrite};
use crate::store::home::FileEngine;
use crate::store::log::disk::Disk;
use crate::store::log::segment;
use crate::store::snapshot;
use crate::store::write::{self, Write};

/// Bytes of frames that are applied at a time.
const RUN_BYTES: usize = 8 << 20;

/// An engine in a temporary directory, which goes with it.
pub(super) struct Scratch {
    // Closed before its files are removed.
    pub(super) engine: Arc<dyn Engine>,
    _copy: TempCopy,
}

impl Scratch {
    /// A copy of an engine's files, opened. The inner error says why it does not open.
    pub(super) fn copy_of(
        kind: FileEngine,
        dir: &Path,
        scratch: Option<&Path>,
    ) -> Result<Result<Scratch, String>, InspectError> {
        let copy = TempCopy::of(dir, scratch).map_err(InspectError::io(format!(
            "{} cannot be copied",
            dir.display()
        )))?;
        Ok(open_engine(kind, copy.path()).map(|engine| Scratch {
            engine,
            _copy: copy,
        }))
    }

    /// An empty engine.
    pub(super) fn empty(scratch: Option<&Path>) -> Result<Scratch, InspectError> {
        let copy = TempCopy::empty(scratch)
            .map_err(InspectError::io("a temporary directory cannot be made"))?;
        let engine = open_engine(FileEngine::Sled, copy.path()).map_err(InspectError::engine)?;
        Ok(Scratch {
            engine,
            _copy: copy,
        })
    }

    /// A snapshot, loaded. It was verified before.
    pub(super) fn of_snapshot(
        disk: &dyn Disk,
        frame: u64,
        store: Option<[u8; 16]>,
        scratch: Option<&Path>,
    ) -> Result<Scratch, InspectError> {
        let made = Scratch::empty(scratch)?;
        snapshot::pour(disk, frame, store, &*made.engine)
            .map_err(|error| InspectError::engine(error.to_string()))?;
        Ok(made)
    }

    pub(super) fn put(&self, writes: &mut Vec<EngineWrite>) -> Result<(), InspectError> {
        for batch in writes.chunks(crate::store::engine::BATCH_OPERATIONS) {
            self.engine
                .apply(batch, None)
                .map_err(|error| InspectError::engine(error.0))?;
        }
        writes.clear();
        Ok(())
    }
}

/// What was done with some frames.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Applied {
    /// Frames that were handed on.
    pub(super) frames: u64,
    /// Frames whose checksum is right but which say nothing that this program knows.
    pub(super) foreign: u64,
}

/// Hands every readable frame from `from` up to but not including `to` to `visit`, by rising number, each number once: also
/// those behind a place that cannot be read.
pub(super) fn each_frame(
    disk: &dyn Disk,
    segments: &[SegmentSeen],
    store: Option<[u8; 16]>,
    from: u64,
    to: u64,
    visit: &mut dyn FnMut(u64, Vec<Write>) -> Result<(), InspectError>,
) -> Result<Applied, InspectError> {
    let mut order: Vec<&SegmentSeen> = segments
        .iter()
        .filter(|segment| {
            segment
                .range
                .is_some_and(|range| range.to >= from && range.from < to)
        })
        .collect();
    order.sort_by_key(|segment| segment.range.map(|range| (range.from, range.to)));
    let mut applied = Applied::default();
    let mut next = from;
    for segment in order {
        let (_, Some(read)) = frames::look(disk, &segment.file, None, store) else {
            continue;
        };
        for found in &read.frames {
            if found.number < next || found.number >= to {
                continue;
            }
            next = found.number + 1;
            match write::decode(&read.data.slice(found.payload.clone())) {
                Ok(writes) => {
                    applied.frames += 1;
                    visit(found.number, writes)?;
                }
                Err(_) => applied.foreign += 1,
            }
        }
    }
    Ok(applied)
}

/// Applies every readable frame from `from` on to an engine, and notes `end` as its position.
pub(super) fn replay(
    disk: &dyn Disk,
    segments: &[SegmentSeen],
    store: Option<[u8; 16]>,
    engine: &dyn Engine,
    from: u64,
    end: u64,
) -> Result<Applied, InspectError> {
    let mut run: Vec<Write> = Vec::new();
    let mut bytes = 0;
    let applied = each_frame(disk, segments, store, from, end, &mut |number, writes| {
        bytes += writes.iter().map(size).sum::<usize>();
        run.extend(writes);
        if bytes >= RUN_BYTES {
            apply_run(engine, run.iter(), number + 1, false)
                .map_err(|error| InspectError::engine(error.0))?;
            run.clear();
            bytes = 0;
        }
        Ok(())
    })?;
    apply_run(engine, run.iter(), end, false).map_err(|error| InspectError::engine(error.0))?;
    Ok(applied)
}

fn size(write: &Write) -> usize {
    match write {
        Write::Put { key, value } => key.len() + value.len(),
        Write::Delete { key } => key.len(),
        Write::Collect { .. } | Write::DropReceipt { .. } | Write::Settle { .. } => 64,
    }
}

/// The segments of the log, read to their end.
pub(super) fn log(
    disk: &ViewDisk,
    store: Option<[u8; 16]>,
) -> Result<Vec<SegmentSeen>, InspectError> {
    frames::segments(disk, segment::DIR, store).map_err(InspectError::io("the log cannot be read"))
}

/// A put for an engine.
pub(super) fn put(key: &[u8], value: Vec<u8>) -> EngineWrite {
    EngineWrite {
        key: Bytes::copy_from_slice(key),
        value: Some(value.into()),
    }
}
