//! Every record of everything that is there, read and held against the others.

use std::path::PathBuf;

use serde::Serialize;

use super::audit::{Audit, Manner, cross_check, read_all};
use super::sources::{Scratch, log, replay};
use super::view::ViewDisk;
use super::{Inspect, InspectError, Inspection, Plan, Progress, home, inspect};
use crate::store::identity::read_identity;
use crate::store::{outcomes, record, snapshot};

/// What was found.
#[derive(Debug, Clone, Serialize)]
pub struct Verified {
    /// What an inspection with copies of the engines says.
    pub inspection: Inspection,
    /// Snapshots with a record in them that cannot be read, and how many.
    pub snapshots: Vec<SnapshotRecords>,
    /// Segments of the history of outcomes with something in them that cannot be read, or an index that does not fit.
    pub outcomes: Vec<OutcomesRecords>,
    /// The state that a start would serve. `None`: a start would refuse, or a server has the engine.
    pub state: Option<Audit>,
    /// Nothing is wrong.
    pub sound: bool,
    /// What is wrong, in words.
    pub wrong: Vec<String>,
}

/// The records of a snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotRecords {
    /// Its file.
    pub file: String,
    /// Records in it.
    pub records: u64,
    /// Records in it that cannot be read.
    pub rotten: u64,
}

/// The records of a segment of the history of outcomes.
#[derive(Debug, Clone, Serialize)]
pub struct OutcomesRecords {
    /// Its file.
    pub file: String,
    /// Outcomes in it.
    pub records: u64,
    /// Outcomes in it that cannot be read.
    pub rotten: u64,
    /// Its index leads to its outcomes and to no others.
    pub index_fits: bool,
}

/// Reads and checks everything in a data directory. Changes nothing in it; needs room for a copy of the engine.
///
/// # Errors
/// When the directory cannot be read at all, or there is no room for the copy.
pub fn verify(
    dir: PathBuf,
    scratch: Option<PathBuf>,
    progress: Progress<'_>,
) -> Result<Verified, InspectError> {
    progress("reading log, snapshots and engines");
    let inspection = inspect(&Inspect {
        dir,
        open_engines: true,
        scratch: scratch.clone(),
    })?;
    let disk = ViewDisk::new(&inspection.dir);
    let store = read_identity(&disk, &inspection.dir)
        .ok()
        .flatten()
        .map(|identity| identity.store);
    let mut wrong = inspection.findings.clone();
    for engine in &inspection.engines {
        let remark = engine.moved_aside();
        wrong.retain(|finding| Some(finding) != remark.as_ref());
    }
    wrong.extend(inspection.lost.iter().map(|lost| format!("lost: {lost}")));
    let mut snapshots = Vec::new();
    for seen in inspection.snapshots.iter().filter(|seen| seen.verified) {
        progress(&format!("checking the records of {}", seen.file));
        let mut records = SnapshotRecords {
            file: seen.file.clone(),
            records: 0,
            rotten: 0,
        };
        let read = snapshot::read(
            &disk,
            &seen.file,
            store.unwrap_or_default(),
            &mut |key, value| {
                records.records += 1;
                if record::verify(key, value).is_err() {
                    records.rotten += 1;
                }
                Ok(())
            },
        );
        if let Err(error) = read {
            wrong.push(format!("{}: {error}", seen.file));
        }
        if records.rotten > 0 {
            wrong.push(format!(
                "{}: {} records in it cannot be read",
                seen.file, records.rotten
            ));
        }
        snapshots.push(records);
    }
    let outcomes = check_outcomes(&inspection, &disk, store, progress, &mut wrong);
    let base = match inspection.start.plan {
        Plan::Engine { frame, .. } => {
            let engine = inspection.engines.iter().find(|engine| engine.counts);
            match engine.and_then(|engine| Some((home::whose(&engine.dir)?, &engine.dir))) {
                Some((kind, name)) => {
                    let copy =
                        Scratch::copy_of(kind, &inspection.dir.join(name), scratch.as_deref())?
                            .map_err(InspectError::engine)?;
                    Some((copy, frame))
                }
                None => None,
            }
        }
        Plan::Snapshot { frame, .. } if !inspection.start.engine_unseen => Some((
            Scratch::of_snapshot(&disk, frame, store, scratch.as_deref())?,
            frame,
        )),
        Plan::Log { .. } if !inspection.start.engine_unseen => {
            Some((Scratch::empty(scratch.as_deref())?, 1))
        }
        Plan::Snapshot { .. } | Plan::Log { .. } | Plan::New => None,
        Plan::Refuses { ref why } => {
            wrong.push(format!("a start refuses: {why}"));
            None
        }
    };
    let mut state = None;
    if let Some((base, from)) = base {
        progress("bringing a copy up to the end of the log");
        let segments = log(&disk, store)?;
        let end = super::end_of(&inspection, from);
        replay(&disk, &segments, store, &*base.engine, from, end)?;
        progress("reading every record");
        let mut audit = Audit::default();
        let failed = |error: crate::store::engine::EngineError| InspectError::engine(error.0);
        read_all(&*base.engine, &mut audit).map_err(failed)?;
        progress("holding records, counters and indexes against each other");
        cross_check(&*base.engine, Manner::Check, &mut audit).map_err(failed)?;
        wrong.extend(
            audit
                .kinds
                .iter()
                .map(|(kind, count)| format!("{count} times: {kind}")),
        );
        state = Some(audit);
    }
    Ok(Verified {
        sound: wrong.is_empty(),
        inspection,
        snapshots,
        outcomes,
        state,
        wrong,
    })
}

fn check_outcomes(
    inspection: &Inspection,
    disk: &ViewDisk,
    store: Option<[u8; 16]>,
    progress: Progress<'_>,
    wrong: &mut Vec<String>,
) -> Vec<OutcomesRecords> {
    let usable = inspection.outcomes.iter().filter(|seen| seen.why.is_none());
    let mut bad = Vec::new();
    for seen in usable {
        progress(&format!("checking {}", seen.file));
        let checked = match outcomes::check(disk, store.unwrap_or_default(), seen.number) {
            Ok(Some(checked)) => checked,
            // Dropped by a running server meanwhile.
            Ok(None) => continue,
            // Nothing else depends on it, and there is more to look at.
            Err(error) => {
                wrong.push(format!("{} cannot be read: {error}", seen.file));
                bad.push(OutcomesRecords {
                    file: seen.file.clone(),
                    records: 0,
                    rotten: seen.records,
                    index_fits: false,
                });
                continue;
            }
        };
        if checked.rotten > 0 {
            wrong.push(format!(
                "{}: {} outcomes in it cannot be read",
                seen.file, checked.rotten
            ));
        }
        if !checked.index_fits {
            wrong.push(format!(
                "{}: its index does not fit; remove the `.idx` beside it and a start makes it again",
                seen.file
            ));
        }
        if checked.rotten > 0 || !checked.index_fits {
            bad.push(OutcomesRecords {
                file: seen.file.clone(),
                records: checked.records,
                rotten: checked.rotten,
                index_fits: checked.index_fits,
            });
        }
    }
    bad
}
