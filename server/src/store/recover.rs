//! From what is on the disk to a state that can be proved.
//!
//! The log is the promise and the engine an index over it, so the question at the start is only how much of the index
//! is still good. In this order:
//!
//! 1. the engine that is there, and every frame from its position on;
//! 2. the newest snapshot that verifies, and every frame from its start on; then the one before it;
//! 3. nothing, and every frame from the first on, if the log still begins there.
//!
//! An engine is not used if it cannot be opened, cannot say where it stands, stands before the log begins or after
//! it ends, stands before a place from which on the log is rotten, or was left open when the machine (not only the process) went down: sled never syncs, so after a
//! loss of power its files prove nothing. Before rot it may have taken half of a run whose frames are gone
//! now, and their numbers are given again; if nothing else is left to begin with, it is used all the same, and
//! every removal is brought into it. A new one is built in a place of its own, which takes the old one's place only when
//! it is complete; only then the old one is moved aside under a dated name ([`go_on_without`]). So a start that fails changes
//! nothing.
//!
//! An engine that is moved aside may know of frames that the log has lost, and the numbers of those are used a second time from
//! now on. So a note is written first that says from which number on: without it nobody could tell later whether
//! what the engine knows belongs before or beside the frames of the log.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

use super::apply::apply_run;
use super::engine::Engine;
use super::home::{ASIDE, Before, Built, EngineHome, Unusable};
use super::log::disk::{Disk, is_no_room};
use super::log::{Ending, ReplayError, SET_ASIDE, Shelf, Tail};
use super::set_aside;
use super::settings::{OpenError, OpenReport, Rebuilt};
use super::snapshot::{self, SnapshotError};
use super::write::{self, Write};

/// Bytes of frames that are applied at a time in a replay.
const RUN_BYTES: usize = 8 << 20;

/// What was found and can be proved.
pub(super) struct Recovered {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) tail: Tail,
    /// The number of the next frame: behind the tail, unless a snapshot knows of later ones.
    pub(super) next_frame: u64,
    /// Bytes of what lived when the newest snapshot was taken, if one was read.
    pub(super) live: u64,
    /// The engine was built anew: what counted before, if anything did, goes.
    pub(super) anew: bool,
    /// The engine may hold rows of frames that the log has lost.
    pub(super) doubtful: bool,
}

impl Recovered {
    /// The engine as it was found, with what the log has behind its position.
    fn of_engine(engine: Arc<dyn Engine>, tail: Tail, doubtful: bool) -> Recovered {
        Recovered {
            engine,
            next_frame: tail.next_frame,
            tail,
            live: 0,
            anew: false,
            doubtful,
        }
    }
}

struct Replayed {
    tail: Tail,
    frames: u64,
}

/// Finds a provable state. What happened on the way is added to the report.
pub(super) fn recover(
    disk: &dyn Disk,
    shelf: &Shelf,
    home: &dyn EngineHome,
    store: [u8; 16],
    begun: bool,
    report: &mut OpenReport,
) -> Result<Recovered, OpenError> {
    report.engine = home.name();
    let found = match home.open() {
        // Nothing was done yet, and nothing is.
        Err(Unusable::Busy(why)) => return Err(OpenError::Engine(why)),
        Err(Unusable::Newer(what)) => return Err(OpenError::Newer { what }),
        Ok(engine) => Ok(engine),
        Err(Unusable::Broken(why)) => Err(why),
    };
    // Before the first write to the engine, and after the look at the last note.
    home.begin().map_err(|error| {
        if is_no_room(&error) {
            OpenError::NoRoom(error.to_string())
        } else {
            OpenError::io("could not note the use of", home.name())(error)
        }
    })?;
    let mut doubtful = None;
    let why = match found {
        Ok(None) => None,
        Ok(Some(engine)) => match try_engine(&engine, shelf)? {
            Ok(replayed) => match snapshot_beyond(disk, store, replayed.tail.next_frame)? {
                Some(frame) => Some(format!(
                    "it ends with the log before frame {}, and snapshot {frame} proves that there was more",
                    replayed.tail.next_frame
                )),
                None if matches!(replayed.tail.ending, Ending::Rotten { .. }) => {
                    let why = format!(
                        "the log is rotten from frame {} on, and it may have taken some of what came then",
                        replayed.tail.next_frame
                    );
                    doubtful = Some((engine, replayed));
                    Some(why)
                }
                None => {
                    report.replayed_frames = replayed.frames;
                    return Ok(Recovered::of_engine(engine, replayed.tail, false));
                }
            },
            Err(why) => Some(why),
        },
        Err(why) => Some(why),
    };
    let mut tried = why
        .clone()
        .unwrap_or_else(|| "there is no engine".to_owned());
    let snapshots = snapshot::list(disk).map_err(OpenError::io("could not list", snapshot::DIR))?;
    for frame in snapshots.iter().rev() {
        match try_snapshot(disk, shelf, home, store, *frame)? {
            Ok((engine, replayed, live)) => {
                let next_frame = replayed.tail.next_frame.max(*frame);
                if replayed.tail.next_frame < *frame {
                    tracing::error!(
                        snapshot = frame,
                        log_ends_before = replayed.tail.next_frame,
                        "the log ends before the snapshot begins: frames after it may be missing"
                    );
                }
                report.replayed_frames = replayed.frames;
                report.rebuilt = why.map(|why| Rebuilt {
                    why,
                    snapshot: Some(*frame),
                    moved_to: None,
                });
                return Ok(Recovered {
                    engine,
                    tail: replayed.tail,
                    next_frame,
                    live,
                    anew: true,
                    doubtful: false,
                });
            }
            Err(why) => {
                tracing::error!(snapshot = frame, why, "a snapshot cannot be used");
                tried = format!("{tried}; snapshot {frame}: {why}");
            }
        }
    }
    let gone = shelf.first_frame().is_none_or(|first| first > 1);
    if let Some((engine, replayed)) = doubtful.take_if(|_| gone) {
        tracing::error!(
            tried,
            "the engine is used although it may know of frames that the log has lost: nothing else leads up to the log"
        );
        report.replayed_frames = replayed.frames;
        return Ok(Recovered::of_engine(engine, replayed.tail, true));
    }
    if let Some(first) = shelf.first_frame()
        && first > 1
    {
        return Err(OpenError::Unprovable {
            why: format!("{tried}; the log begins at frame {first} and no snapshot leads up to it"),
        });
    }
    if (begun || !snapshots.is_empty()) && shelf.first_frame().is_none() {
        return Err(OpenError::Unprovable {
            why: format!("{tried}; there is no log"),
        });
    }
    let built = home.build().map_err(|error| OpenError::Engine(error.0))?;
    let replayed = replay(&built.engine, shelf, 1)?.map_err(OpenError::Engine)?;
    let engine = adopt(home, built)?;
    report.replayed_frames = replayed.frames;
    report.rebuilt = why.map(|why| Rebuilt {
        why,
        snapshot: None,
        moved_to: None,
    });
    Ok(Recovered {
        engine,
        next_frame: replayed.tail.next_frame,
        tail: replayed.tail,
        live: 0,
        anew: true,
        doubtful: false,
    })
}

/// Writes down what is not used from here on and from which frame on the log goes on without it; then gives the engines that do
/// not count any more their dated names.
///
/// # Errors
/// When the note cannot be written, nothing was moved.
pub(super) fn go_on_without(
    disk: &dyn Disk,
    shelf: &Shelf,
    home: &dyn EngineHome,
    recovered: &Recovered,
    stamp: &str,
    report: &mut OpenReport,
) -> Result<(), OpenError> {
    let (tail, next_frame) = (&recovered.tail, recovered.next_frame);
    let mut words = Vec::new();
    if let Some(rebuilt) = &report.rebuilt {
        words.push(format!("The engine was made anew: {}.", rebuilt.why));
    }
    words.extend(leave(&home.leaving(recovered.anew), stamp));
    if let Ending::Rotten { segment, offset } = tail.ending {
        words.push(format!(
            "The log cannot be proved from byte {offset} of segment {segment} on: {}.",
            shelf.unprovable(tail).join(", ")
        ));
    }
    for frame in snapshot::list(disk).map_err(OpenError::io("could not list", snapshot::DIR))? {
        if frame > next_frame {
            words.push(format!(
                "Snapshot {frame} is of a time that the log does not reach."
            ));
        }
    }
    note(disk, stamp, next_frame, words).map_err(|error| {
        if is_no_room(&error) {
            OpenError::NoRoom(error.to_string())
        } else {
            OpenError::io("could not write down what is set aside in", SET_ASIDE)(error)
        }
    })?;
    let moved = if recovered.anew {
        home.move_aside(stamp)
    } else {
        home.move_leftovers(stamp).map(|()| None)
    };
    let moved_to = moved.map_err(OpenError::io("could not move aside", home.name()))?;
    if let Some(rebuilt) = &mut report.rebuilt {
        rebuilt.moved_to = moved_to;
    }
    Ok(())
}

/// What a note says of engines that get another name.
pub(super) fn leave(engines: &[String], stamp: &str) -> Option<String> {
    (!engines.is_empty()).then(|| {
        format!(
            "These get a name with `{ASIDE}{stamp}`: {}.",
            engines.join(", ")
        )
    })
}

/// Writes a note, if there is anything to say.
pub(super) fn note(
    disk: &dyn Disk,
    stamp: &str,
    next_frame: u64,
    mut words: Vec<String>,
) -> io::Result<()> {
    if words.is_empty() {
        return Ok(());
    }
    words.push(format!(
        "The log goes on with frame {next_frame}. `bellwire store salvage` knows how to use what was set aside."
    ));
    set_aside::write_note(disk, stamp, next_frame, &words)
}

/// A snapshot that verifies and begins behind the end of the log: the log has lost its end, and the snapshot knows more.
fn snapshot_beyond(
    disk: &dyn Disk,
    store: [u8; 16],
    next_frame: u64,
) -> Result<Option<u64>, OpenError> {
    let snapshots = snapshot::list(disk).map_err(OpenError::io("could not list", snapshot::DIR))?;
    let beyond = snapshots.into_iter().rev();
    for frame in beyond.take_while(|frame| *frame > next_frame) {
        match snapshot::check(disk, frame, Some(store)) {
            Ok(_) => return Ok(Some(frame)),
            Err(SnapshotError::Newer(version)) => {
                return Err(OpenError::Newer {
                    what: format!("snapshot {frame} has format {version}"),
                });
            }
            Err(error) => {
                tracing::error!(snapshot = frame, %error, "a snapshot cannot be used");
            }
        }
    }
    Ok(None)
}

type Attempt<T> = Result<Result<T, String>, OpenError>;

fn try_engine(engine: &Arc<dyn Engine>, shelf: &Shelf) -> Attempt<Replayed> {
    let position = match engine.position() {
        Ok(Some(position)) => position,
        Ok(None) => return Ok(Err("it does not say which frames it has".to_owned())),
        Err(error) => return Ok(Err(error.to_string())),
    };
    replay(engine, shelf, position)
}

fn try_snapshot(
    disk: &dyn Disk,
    shelf: &Shelf,
    home: &dyn EngineHome,
    store: [u8; 16],
    frame: u64,
) -> Attempt<(Arc<dyn Engine>, Replayed, u64)> {
    let built = home.build().map_err(|error| OpenError::Engine(error.0))?;
    let info = match snapshot::load(disk, frame, store, &built.engine) {
        Ok(info) => info,
        Err(SnapshotError::Newer(version)) => {
            home.discard(built);
            return Err(OpenError::Newer {
                what: format!("snapshot {frame} has format {version}"),
            });
        }
        Err(error) => {
            home.discard(built);
            return Ok(Err(error.to_string()));
        }
    };
    let replayed = match replay_over(&built.engine, shelf, frame)? {
        Ok(replayed) => replayed,
        Err(why) => {
            home.discard(built);
            return Ok(Err(why));
        }
    };
    let engine = adopt(home, built)?;
    Ok(Ok((engine, replayed, info.bytes)))
}

fn adopt(home: &dyn EngineHome, built: Built) -> Result<Arc<dyn Engine>, OpenError> {
    home.adopt(&built, Before::Kept)
        .map_err(|error| OpenError::Engine(error.0))?;
    Ok(built.engine)
}

/// Replays from `from` on. A log that ends before that is a reason not to use this engine.
fn replay(engine: &Arc<dyn Engine>, shelf: &Shelf, from: u64) -> Attempt<Replayed> {
    let replayed = replay_over(engine, shelf, from)?;
    Ok(replayed.and_then(|replayed| {
        if replayed.tail.next_frame < from {
            Err(format!(
                "it is ahead of the log: it wants frame {from}, the log ends before frame {}",
                replayed.tail.next_frame
            ))
        } else {
            Ok(replayed)
        }
    }))
}

fn replay_over(engine: &Arc<dyn Engine>, shelf: &Shelf, from: u64) -> Attempt<Replayed> {
    let mut writes: Vec<Write> = Vec::new();
    let (mut bytes, mut frames, mut next) = (0, 0, from);
    let mut visit = |number: u64, payload: Bytes| -> Result<(), String> {
        let decoded = write::decode(&payload)
            .map_err(|error| format!("frame {number} was written by another program: {error}"))?;
        writes.extend(decoded);
        bytes += payload.len();
        frames += 1;
        next = number + 1;
        if bytes >= RUN_BYTES {
            apply_run(&**engine, writes.iter(), next, false).map_err(|error| error.to_string())?;
            writes.clear();
            bytes = 0;
        }
        Ok(())
    };
    let tail = match shelf.replay(from, &mut visit) {
        Ok(tail) => tail,
        Err(ReplayError::Io(error)) => {
            return Err(OpenError::Io {
                what: "could not read",
                path: PathBuf::from(super::log::segment::DIR),
                error,
            });
        }
        Err(error @ ReplayError::NotCovered { .. }) => return Ok(Err(error.to_string())),
        Err(ReplayError::Visit(why)) => return Ok(Err(why)),
    };
    if let Err(error) = apply_run(&**engine, writes.iter(), next, false) {
        return Ok(Err(error.to_string()));
    }
    if let Ending::Rotten { segment, offset } = tail.ending {
        tracing::error!(
            segment,
            offset,
            next_frame = tail.next_frame,
            "the log is damaged in the middle; nothing after this place can be proved"
        );
    }
    Ok(Ok(Replayed { tail, frames }))
}
