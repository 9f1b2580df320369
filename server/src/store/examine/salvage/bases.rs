//! What there is to begin with: which engines, snapshots and segments belong to the main line, and which left it.

use std::collections::BTreeMap;

use crate::store::examine::frames::{Numbers, SegmentSeen, SegmentState};
use crate::store::examine::view::ViewDisk;
use crate::store::examine::{AsideSeen, EngineState, Inspection, Range, home};
use crate::store::identity::read_identity;
use crate::store::set_aside;
use crate::store::snapshot;

/// Which store it is: by its format file, or else by the head of its newest segment or snapshot.
pub(super) fn identity_of(disk: &ViewDisk, inspection: &Inspection) -> Option<[u8; 16]> {
    if let Ok(Some(identity)) = read_identity(disk, &inspection.dir) {
        return Some(identity.store);
    }
    let by_log = inspection.log.iter().rev().find_map(|segment| {
        let (_, read) = crate::store::examine::frames::look(disk, &segment.file, None, None);
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
pub(super) struct Group {
    pub(super) stamp: String,
    pub(super) cut: Option<u64>,
    pub(super) segments: Vec<SegmentSeen>,
}

/// By the stamps in the names, oldest first.
pub(super) fn groups(inspection: &Inspection) -> Vec<Group> {
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
pub(super) struct Base {
    pub(super) name: String,
    pub(super) frame: u64,
    pub(super) from: Origin,
    /// Its files prove nothing.
    pub(super) unproven: bool,
}

/// An engine that knows of frames which the main line went on without.
pub(super) struct Ahead {
    pub(super) base: Base,
    pub(super) cut: Option<u64>,
    /// Which start went on without them.
    pub(super) group: usize,
}

#[derive(Clone)]
pub(super) enum Origin {
    Nothing,
    Snapshot,
    Engine(home::FileEngine),
}

/// What there is to begin with, and beside it.
pub(super) struct Bases {
    /// On the main line.
    pub(super) bases: Vec<Base>,
    /// Engines that left it: they are ahead of where it went on without them.
    pub(super) ahead: Vec<Ahead>,
    /// Engines of which nobody knows which of the two they are.
    pub(super) passed_over: Vec<String>,
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

pub(super) fn bases(inspection: &Inspection, groups: &[Group], store: Option<[u8; 16]>) -> Bases {
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

pub(super) fn missing(numbers: &Numbers, from: u64, end: u64) -> Vec<Range> {
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

pub(super) fn unreadable(inspection: &Inspection) -> Vec<String> {
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
