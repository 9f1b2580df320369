//! What is in a data directory: for an operator who must know before anything is touched.
//!
//! [`inspect`] reads only. It opens files for reading, holds the store's lock while it looks so that no server starts
//! meanwhile, and where a server runs already it says so and leaves out what cannot be read beside it.
//! What a start would do is found out with the same code that a start runs, on a disk that refuses every change.
//!
//! The answers are plain data with names that are stable: they are what `--json` prints.

mod audit;
mod engines;
mod frames;
mod lock;
mod salvage;
mod sources;
mod verify;
mod view;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use data_encoding::HEXLOWER;
use serde::Serialize;

pub use self::audit::Audit;
pub use self::engines::{EngineSeen, EngineState};
use self::frames::Numbers;
pub use self::frames::{Bad, SegmentSeen, SegmentState};
pub use self::lock::Holder;
use self::lock::Probe;
pub use self::salvage::{Salvage, SalvageError, Salvaged, SideLine, salvage};
pub use self::verify::{OutcomesRecords, SnapshotRecords, Verified, verify};
use self::view::ViewDisk;
use super::home::{self, POINTER};
use super::identity::{Identity, read_identity};
use super::log::disk::Disk;
use super::log::{Ending, ReplayError, SET_ASIDE, Shelf, ShelfError, segment};
use super::outcomes::{self, IndexLook};
use super::settings::{OpenError, StoreSettings};
use super::snapshot::{self, SnapshotError};
use super::{record, write};

/// What to look at.
#[derive(Debug, Clone)]
pub struct Inspect {
    /// The data directory.
    pub dir: PathBuf,
    /// Open copies of the engines. Opening an engine writes to its files, so it is never done where they are.
    pub open_engines: bool,
    /// Where copies go; they are removed again. `None`: the system's directory for temporary files.
    pub scratch: Option<PathBuf>,
}

/// What was found. Frames are numbers, ranges are from a first to a last one, both included.
#[derive(Debug, Clone, Serialize)]
pub struct Inspection {
    /// The data directory, links followed.
    pub dir: PathBuf,
    /// Whether a server has it.
    pub holder: Holder,
    /// The format file.
    pub format: FormatSeen,
    /// The segments of the log, in order.
    pub log: Vec<SegmentSeen>,
    /// Frames that are missing or cannot be read between the first and the last frame of the log.
    pub missing_frames: Vec<Range>,
    /// Snapshots, oldest first.
    pub snapshots: Vec<SnapshotSeen>,
    /// Directories of engines, also those that were moved aside.
    pub engines: Vec<EngineSeen>,
    /// Segments of the history of outcomes, in order. Nothing else depends on them.
    pub outcomes: Vec<OutcomesSeen>,
    /// What is kept under `set-aside/`.
    pub set_aside: Vec<AsideSeen>,
    /// Leftovers of work that was cut off; a start removes them.
    pub leftovers: Vec<String>,
    /// Everything else in the directory, with its size.
    pub other: Vec<OtherSeen>,
    /// What a start would do now.
    pub start: Start,
    /// What nothing here can bring back.
    pub lost: Vec<String>,
    /// What is not as it should be, in words. Empty: all is well as far as was looked.
    pub findings: Vec<String>,
}

/// Some frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Range {
    /// The first.
    pub from: u64,
    /// The last.
    pub to: u64,
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.from == self.to {
            write!(f, "frame {}", self.from)
        } else {
            write!(f, "frames {} to {}", self.from, self.to)
        }
    }
}

/// The format file.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum FormatSeen {
    /// It says which store this is.
    Good {
        /// The layout's version.
        version: u32,
        /// The identity, in hexadecimal digits.
        store: String,
        /// Something was promised here.
        begun: bool,
    },
    /// There is none, and nothing else: a start makes a new store.
    Empty,
    /// It is missing or says something else.
    Bad {
        /// What is wrong.
        why: String,
    },
}

/// A snapshot.
#[derive(Debug, Clone, Serialize)]
pub struct SnapshotSeen {
    /// Its file, below the data directory.
    pub file: String,
    /// The first frame that must be replayed over it.
    pub frame: u64,
    /// Size of the file.
    pub bytes: u64,
    /// When it was made, Unix milliseconds.
    pub made_ms: Option<u64>,
    /// Records in it.
    pub entries: Option<u64>,
    /// Every byte of it was read and checks.
    pub verified: bool,
    /// Why not.
    pub why: Option<String>,
}

/// A segment of the history of outcomes. An inspection reads its headers, a verification every byte.
#[derive(Debug, Clone, Serialize)]
pub struct OutcomesSeen {
    /// Its file, below the data directory; its index lies beside it.
    pub file: String,
    #[serde(skip)]
    pub(super) number: u32,
    /// Size of both.
    pub bytes: u64,
    /// Outcomes in it.
    pub records: u64,
    /// Its index: `whole`, `missing` (it is the one that grew last; a start makes one) or `damaged` (as well).
    pub index: &'static str,
    /// When the earliest of them ended, Unix milliseconds, if the index says so.
    pub earliest_ms: Option<u64>,
    /// When the latest of them ended.
    pub latest_ms: Option<u64>,
    /// Why it cannot be used.
    pub why: Option<String>,
}

/// Something under `set-aside/`.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum AsideSeen {
    /// A part of the log.
    Segment(SegmentSeen),
    /// A record that could not be read.
    Record {
        /// Its file.
        file: String,
        /// The first letter of its key; `store/keys.rs` says what they mean.
        room: char,
        /// What is wrong with it.
        why: String,
    },
    /// What the start wrote down when it set something aside.
    Note {
        /// Its file.
        file: String,
        /// The text.
        text: String,
    },
    /// Something else.
    Other(OtherSeen),
}

/// A file or directory that the store does not know.
#[derive(Debug, Clone, Serialize)]
pub struct OtherSeen {
    /// Its name, below the data directory.
    pub name: String,
    /// Its size with everything below it.
    pub bytes: u64,
}

/// What a start would do.
#[derive(Debug, Clone, Serialize)]
pub struct Start {
    /// With the engine that counts, if it was looked at; else as if there were none.
    pub plan: Plan,
    /// The engine that counts was not opened, so a start may do better than the plan says.
    pub engine_unseen: bool,
    /// In one sentence.
    pub text: String,
    /// What would be set aside.
    pub sets_aside: Vec<String>,
}

/// How a start would go about it.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub enum Plan {
    /// A new store is made.
    New,
    /// From the engine.
    Engine {
        /// The frame that it takes next.
        frame: u64,
        /// Frames that are replayed into it.
        replays: u64,
    },
    /// From a snapshot.
    Snapshot {
        /// Its frame.
        frame: u64,
        /// Frames that are replayed over it.
        replays: u64,
    },
    /// From the log alone.
    Log {
        /// Frames that are replayed.
        replays: u64,
    },
    /// Not at all.
    Refuses {
        /// Why.
        why: String,
    },
}

/// Why nothing could be said.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// There is no such directory.
    #[error("{dir} cannot be read: {error}")]
    NoDirectory {
        /// Which.
        dir: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The disk refused something.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: String,
        /// What came back.
        error: io::Error,
    },
}

/// Is told what is being done, for whoever waits.
pub type Progress<'a> = &'a dyn Fn(&str);

impl InspectError {
    fn engine(why: impl Into<String>) -> InspectError {
        InspectError::Io {
            what: "a copy to work on cannot be used".to_owned(),
            error: io::Error::other(why.into()),
        }
    }

    fn io(what: impl Into<String>) -> impl FnOnce(io::Error) -> InspectError {
        let what = what.into();
        move |error| InspectError::Io { what, error }
    }
}

/// Looks at a data directory. Changes nothing in it.
///
/// # Errors
/// When the directory cannot be read at all. Whatever is wrong with what is in it is part of the answer.
pub fn inspect(ask: &Inspect) -> Result<Inspection, InspectError> {
    let dir = fs::canonicalize(&ask.dir).map_err(|error| InspectError::NoDirectory {
        dir: ask.dir.clone(),
        error,
    })?;
    let probe = Probe::take(&dir);
    let disk: Arc<dyn Disk> = Arc::new(ViewDisk::new(&dir));
    let mut findings = Vec::new();
    let identity = read_identity(&*disk, &dir);
    let store = match &identity {
        Ok(Some(identity)) => Some(identity.store),
        Ok(None) | Err(_) => None,
    };
    let log = frames::segments(&*disk, segment::DIR, store)
        .map_err(InspectError::io("the log cannot be read"))?;
    let snapshots = snapshots(&*disk, store)?;
    let format = format_seen(&identity, log.is_empty() && snapshots.is_empty());
    let (engines, pointer_trouble) = engines::engines(&*disk, &dir, ask, &probe)?;
    // Nothing else depends on them.
    let outcomes = outcomes_seen(&*disk, store).unwrap_or_else(|error| {
        findings.push(format!("the outcomes cannot be listed: {error}"));
        Vec::new()
    });
    let set_aside = set_aside(&*disk, &dir, store)?;
    let numbers = Numbers::of(&log);
    let missing_frames = numbers.missing();
    let pointer_trouble = pointer_trouble.map(|why| EngineState::Fails {
        why: format!("the file `{POINTER}` says which engine counts: {why}"),
    });
    let position = engines
        .iter()
        .find(|engine| engine.counts)
        .map(|engine| &engine.state)
        .or(pointer_trouble.as_ref());
    let start = start(&disk, &dir, position);
    if let Some(EngineState::Fails { why }) = &pointer_trouble {
        findings.push(why.clone());
    }
    let lost = lost(&missing_frames, &snapshots, &engines, &numbers);
    told(
        &format,
        &log,
        &snapshots,
        &engines,
        &set_aside,
        &mut findings,
    );
    for segment in &outcomes {
        match &segment.why {
            Some(why) => findings.push(format!("{}: {why}", segment.file)),
            None if segment.index == "damaged" => findings.push(format!(
                "{}: its index is damaged; a start makes it again",
                segment.file
            )),
            None => {}
        }
    }
    let (leftovers, other) = leftovers_and_other(&dir)?;
    Ok(Inspection {
        holder: probe.holder(),
        dir,
        format,
        log,
        missing_frames,
        snapshots,
        engines,
        outcomes,
        set_aside,
        leftovers,
        other,
        start,
        lost,
        findings,
    })
}

fn format_seen(identity: &Result<Option<Identity>, OpenError>, empty: bool) -> FormatSeen {
    match identity {
        Ok(Some(identity)) => FormatSeen::Good {
            version: super::identity::FORMAT_VERSION,
            store: HEXLOWER.encode(&identity.store),
            begun: identity.begun,
        },
        Ok(None) if empty => FormatSeen::Empty,
        Ok(None) => FormatSeen::Bad {
            why: "there is none, although there are files of a store".to_owned(),
        },
        Err(error) => FormatSeen::Bad {
            why: error.to_string(),
        },
    }
}

fn snapshots(disk: &dyn Disk, store: Option<[u8; 16]>) -> Result<Vec<SnapshotSeen>, InspectError> {
    let frames =
        snapshot::list(disk).map_err(InspectError::io("the snapshots cannot be listed"))?;
    Ok(frames
        .into_iter()
        .map(|frame| {
            let file = snapshot::name(frame);
            let bytes = disk.open(&file).and_then(|file| file.length()).unwrap_or(0);
            let read = snapshot::check(disk, frame, store);
            let (info, why) = match read {
                Ok(info) => (Some(info), None),
                Err(error) => (None, Some(error.to_string())),
            };
            SnapshotSeen {
                file,
                frame,
                bytes,
                made_ms: info.map(|info| info.made_ms),
                entries: info.map(|info| info.entries),
                verified: info.is_some(),
                why,
            }
        })
        .collect())
}

fn outcomes_seen(disk: &dyn Disk, store: Option<[u8; 16]>) -> io::Result<Vec<OutcomesSeen>> {
    let looks = outcomes::look(disk, store.unwrap_or_default())?;
    Ok(looks
        .into_iter()
        .map(|look| OutcomesSeen {
            file: look.file,
            number: look.number,
            bytes: look.bytes,
            records: look.records,
            index: match look.index {
                IndexLook::Whole => "whole",
                IndexLook::Missing => "missing",
                IndexLook::Damaged => "damaged",
            },
            earliest_ms: look.span.map(|(earliest, _)| earliest),
            latest_ms: look.span.map(|(_, latest)| latest),
            why: match store {
                Some(_) => look.why,
                None => Some("which store this is, is not known".to_owned()),
            },
        })
        .collect())
}

/// What the start and the reads have put under `set-aside/`.
fn set_aside(
    disk: &dyn Disk,
    dir: &Path,
    store: Option<[u8; 16]>,
) -> Result<Vec<AsideSeen>, InspectError> {
    let files = disk
        .list(SET_ASIDE)
        .map_err(InspectError::io("set-aside cannot be listed"))?;
    let mut seen = Vec::new();
    for name in files {
        let file = format!("{SET_ASIDE}/{name}");
        seen.push(if name.ends_with(".seg") {
            AsideSeen::Segment(frames::segment(disk, &file, None, store))
        } else if name.ends_with(".bin") {
            record_aside(disk, file)
        } else if name.ends_with(".txt") {
            let text = fs::read_to_string(dir.join(&file)).unwrap_or_default();
            AsideSeen::Note {
                file,
                text: text.trim().to_owned(),
            }
        } else {
            let bytes = disk.open(&file).and_then(|file| file.length()).unwrap_or(0);
            AsideSeen::Other(OtherSeen { name: file, bytes })
        });
    }
    Ok(seen)
}

fn record_aside(disk: &dyn Disk, file: String) -> AsideSeen {
    let read = || -> io::Result<Vec<u8>> {
        let open = disk.open(&file)?;
        let length = open.length()?.min(RECORD_FILE_MAX);
        let mut bytes = vec![0; length as usize];
        open.read_at(&mut bytes, 0)?;
        Ok(bytes)
    };
    let entry = read().ok().and_then(|bytes| {
        let (length, rest) = bytes.split_first_chunk::<4>()?;
        let (key, value) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let why = match record::verify(key, value) {
            Ok(()) => "its checksum is right, but it says nothing that fits its key".to_owned(),
            Err(fault) => fault.to_string(),
        };
        Some((char::from(*key.first()?), why))
    });
    let (room, why) = entry.unwrap_or(('?', "the file is cut short".to_owned()));
    AsideSeen::Record { file, room, why }
}

/// The largest file of a record that was set aside: length, key, value.
const RECORD_FILE_MAX: u64 = (4 + super::keys::KEY_MAX + record::RECORD_MAX) as u64;

/// Directories and files below the data directory that are the store's and were looked at.
const KNOWN: [&str; 7] = [
    "format",
    "log",
    "snapshots",
    outcomes::DIR,
    SET_ASIDE,
    "lock",
    POINTER,
];

fn leftovers_and_other(dir: &Path) -> Result<(Vec<String>, Vec<OtherSeen>), InspectError> {
    let (mut leftovers, mut other) = (Vec::new(), Vec::new());
    let list = |below: &str| names(&dir.join(below));
    for below in ["", segment::DIR, snapshot::DIR] {
        for name in list(below).map_err(InspectError::io("the data directory cannot be listed"))? {
            let name = if below.is_empty() {
                name
            } else {
                format!("{below}/{name}")
            };
            if name.ends_with(".tmp") {
                leftovers.push(name);
            } else if below.is_empty()
                && !KNOWN.contains(&name.as_str())
                && home::whose(&name).is_none()
            {
                let bytes = size(&dir.join(&name));
                other.push(OtherSeen { name, bytes });
            }
        }
    }
    Ok((leftovers, other))
}

/// Names in a directory, sorted; none if there is no such directory.
fn names(dir: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

/// Size of a file, or of everything below a directory; what cannot be read counts nothing.
fn size(path: &Path) -> u64 {
    let Ok(found) = fs::symlink_metadata(path) else {
        return 0;
    };
    if !found.is_dir() {
        return found.len();
    }
    fs::read_dir(path).map_or(0, |entries| {
        entries.flatten().map(|entry| size(&entry.path())).sum()
    })
}

// ---- What a start would do -----------------------------------------------------------------------------------------

fn start(disk: &Arc<dyn Disk>, dir: &Path, engine: Option<&EngineState>) -> Start {
    let refuses = |why: String| Start {
        text: format!("refuses: {why}"),
        plan: Plan::Refuses { why },
        engine_unseen: false,
        sets_aside: Vec::new(),
    };
    let identity = match read_identity(&**disk, dir) {
        Ok(Some(identity)) => identity,
        Ok(None) => {
            let kept = [segment::DIR, snapshot::DIR]
                .iter()
                .any(|kept| disk.list(kept).is_ok_and(|files| !files.is_empty()));
            if kept {
                return refuses("the format file is missing".to_owned());
            }
            return Start {
                plan: Plan::New,
                engine_unseen: false,
                text: "makes a new store".to_owned(),
                sets_aside: Vec::new(),
            };
        }
        Err(error) => return refuses(error.to_string()),
    };
    let shelf = match Shelf::look(disk, identity.store) {
        Ok(shelf) => shelf,
        Err(error @ (ShelfError::Io(_) | ShelfError::Newer { .. } | ShelfError::Foreign(_))) => {
            return refuses(error.to_string());
        }
    };
    let beyond = |next_frame: u64| {
        let frames = snapshot::list(&**disk).unwrap_or_default();
        frames.into_iter().rev().find(|frame| {
            *frame > next_frame && snapshot::check(&**disk, *frame, Some(identity.store)).is_ok()
        })
    };
    let (unseen, reasons) = match engine {
        None => (false, vec!["there is no engine".to_owned()]),
        Some(EngineState::Opens { position }) => match tried(&shelf, *position) {
            Ok(tail) if tail.next_frame >= *position => {
                if let Some(frame) = beyond(tail.next_frame) {
                    let why = format!(
                        "it ends with the log before frame {}, and snapshot {frame} proves that there was more",
                        tail.next_frame
                    );
                    return from_snapshots(disk, &shelf, identity, (false, vec![why]));
                }
                return Start {
                    text: format!(
                        "starts from the engine at frame {position}, replays {}{}",
                        frames_text(tail.replays),
                        tail.cut_text()
                    ),
                    plan: Plan::Engine {
                        frame: *position,
                        replays: tail.replays,
                    },
                    engine_unseen: false,
                    sets_aside: tail.sets_aside,
                };
            }
            Ok(tail) => (
                false,
                vec![format!(
                    "the engine is ahead of the log: it wants frame {position}, the log ends before frame {}",
                    tail.next_frame
                )],
            ),
            Err(why) => (false, vec![why]),
        },
        Some(EngineState::Fails { why } | EngineState::Unproven { why, .. }) => {
            (false, vec![why.clone()])
        }
        Some(EngineState::NotOpened { .. }) => (true, vec!["the engine was not opened".to_owned()]),
    };
    from_snapshots(disk, &shelf, identity, (unseen, reasons))
}

/// What a start does without an engine: `unseen`: there is one that was not opened; `reasons`: why there is none to use.
fn from_snapshots(
    disk: &Arc<dyn Disk>,
    shelf: &Shelf,
    identity: Identity,
    (unseen, mut reasons): (bool, Vec<String>),
) -> Start {
    let refuses = |why: String| Start {
        text: format!("refuses: {why}"),
        plan: Plan::Refuses { why },
        engine_unseen: false,
        sets_aside: Vec::new(),
    };
    let lead = if unseen {
        "starts from the engine if that opens and stands where the log is (look with --open-engine); otherwise "
    } else {
        ""
    };
    for frame in snapshot::list(&**disk).unwrap_or_default().iter().rev() {
        match snapshot::check(&**disk, *frame, Some(identity.store)) {
            Ok(_) => {}
            Err(SnapshotError::Newer(version)) => {
                return refuses(format!("snapshot {frame} has format {version}"));
            }
            Err(error) => {
                reasons.push(format!("snapshot {frame}: {error}"));
                continue;
            }
        }
        match tried(shelf, *frame) {
            Ok(tail) => {
                return Start {
                    text: format!(
                        "{lead}rebuilds from snapshot {frame}, replays {}{}",
                        frames_text(tail.replays),
                        tail.cut_text()
                    ),
                    plan: Plan::Snapshot {
                        frame: *frame,
                        replays: tail.replays,
                    },
                    engine_unseen: unseen,
                    sets_aside: tail.sets_aside,
                };
            }
            Err(why) => reasons.push(format!("snapshot {frame}: {why}")),
        }
    }
    let begun = identity.begun || snapshot::list(&**disk).is_ok_and(|list| !list.is_empty());
    match shelf.first_frame() {
        Some(first) if first > 1 => {
            reasons.push(format!(
                "the log begins at frame {first} and no snapshot leads up to it"
            ));
        }
        None if begun => reasons.push("there is no log".to_owned()),
        _ => match tried(shelf, 1) {
            Ok(tail) => {
                return Start {
                    text: format!(
                        "{lead}replays the whole log, {}{}",
                        frames_text(tail.replays),
                        tail.cut_text()
                    ),
                    plan: Plan::Log {
                        replays: tail.replays,
                    },
                    engine_unseen: unseen,
                    sets_aside: tail.sets_aside,
                };
            }
            Err(why) => reasons.push(why),
        },
    }
    let why = reasons.join("; ");
    Start {
        text: format!("{lead}refuses: {why}"),
        plan: Plan::Refuses { why },
        engine_unseen: unseen,
        sets_aside: Vec::new(),
    }
}

fn frames_text(frames: u64) -> String {
    if frames == 1 {
        "1 frame".to_owned()
    } else {
        format!("{frames} frames")
    }
}

struct Tried {
    next_frame: u64,
    replays: u64,
    ending: Ending,
    sets_aside: Vec<String>,
}

impl Tried {
    fn cut_text(&self) -> String {
        match self.ending {
            Ending::Clean => String::new(),
            Ending::Torn => "; drops a last write that was cut off and never promised".to_owned(),
            Ending::Rotten { segment, offset } => format!(
                "; cuts the log before frame {}, at byte {offset} of segment {segment}, and sets the rest aside",
                self.next_frame
            ),
        }
    }
}

/// Reads the log as a start does, from a frame on.
fn tried(shelf: &Shelf, from: u64) -> Result<Tried, String> {
    let mut replays = 0;
    let tail = shelf.replay(from, &mut |number: u64, payload: Bytes| {
        replays += 1;
        write::decode(&payload)
            .map(|_| ())
            .map_err(|error| format!("frame {number} was written by another program: {error}"))
    });
    match tail {
        Ok(tail) => Ok(Tried {
            next_frame: tail.next_frame,
            replays,
            sets_aside: shelf.unprovable(&tail),
            ending: tail.ending,
        }),
        Err(ReplayError::Visit(why)) => Err(why),
        Err(error @ (ReplayError::Io(_) | ReplayError::NotCovered { .. })) => {
            Err(error.to_string())
        }
    }
}

// ---- What it comes to ----------------------------------------------------------------------------------------------

fn lost(
    missing: &[Range],
    snapshots: &[SnapshotSeen],
    engines: &[EngineSeen],
    numbers: &Numbers,
) -> Vec<String> {
    let mut lost = Vec::new();
    let snapshot = snapshots
        .iter()
        .filter(|snapshot| snapshot.verified)
        .map(|snapshot| snapshot.frame)
        .max();
    let engine = engines
        .iter()
        .filter_map(|engine| match engine.state {
            EngineState::Opens { position } => Some(position),
            EngineState::NotOpened { .. }
            | EngineState::Fails { .. }
            | EngineState::Unproven { .. } => None,
        })
        .max();
    let covered = snapshot.max(engine).unwrap_or(1);
    let unseen = engines
        .iter()
        .any(|engine| matches!(engine.state, EngineState::NotOpened { .. }));
    let mut missing: Vec<Range> = missing.to_vec();
    if let Some(first) = numbers.first()
        && first > covered
    {
        missing.insert(
            0,
            Range {
                from: covered,
                to: first - 1,
            },
        );
    }
    for range in missing {
        if range.to < covered {
            continue;
        }
        let range = Range {
            from: range.from.max(covered),
            ..range
        };
        lost.push(if unseen {
            format!("{range}, unless an engine has them (look with --open-engine)")
        } else {
            format!("{range}: whatever only they held")
        });
    }
    lost
}

/// The number of the frame behind the last one that is there, or `from` if that is more.
fn end_of(inspection: &Inspection, from: u64) -> u64 {
    Numbers::of(&inspection.log)
        .last()
        .map_or(from, |last| from.max(last + 1))
}

/// What is not as it should be.
fn told(
    format: &FormatSeen,
    log: &[SegmentSeen],
    snapshots: &[SnapshotSeen],
    engines: &[EngineSeen],
    set_aside: &[AsideSeen],
    findings: &mut Vec<String>,
) {
    if let FormatSeen::Bad { why } = format {
        findings.push(format!("format: {why}"));
    }
    let last = log.len().saturating_sub(1);
    for (index, segment) in log.iter().enumerate() {
        match (&segment.state, &segment.why) {
            (SegmentState::Whole, _) => {}
            // A write that was cut off is what a crash leaves; only at the end of the log is it that.
            (SegmentState::Torn, _) if index == last => {
                findings.push(format!(
                    "{}: the last write was cut off; it was never promised",
                    segment.file
                ));
            }
            (state, why) => findings.push(format!(
                "{}: {state}{}",
                segment.file,
                why.as_ref().map_or(String::new(), |why| format!(": {why}"))
            )),
        }
    }
    for snapshot in snapshots {
        if let Some(why) = &snapshot.why {
            findings.push(format!("{}: {why}", snapshot.file));
        }
    }
    for engine in engines {
        if let EngineState::Fails { why } | EngineState::Unproven { why, .. } = &engine.state {
            findings.push(format!("{}: {why}", engine.dir));
        }
        findings.extend(engine.moved_aside());
    }
    let mut kinds: BTreeMap<&str, u64> = BTreeMap::new();
    for aside in set_aside {
        let kind = match aside {
            AsideSeen::Segment(_) => "segments of the log",
            AsideSeen::Record { .. } => "records",
            AsideSeen::Note { .. } => continue,
            AsideSeen::Other(_) => "other files",
        };
        *kinds.entry(kind).or_default() += 1;
    }
    for (kind, count) in kinds {
        findings.push(format!(
            "{SET_ASIDE}: {count} {kind}; `bellwire store salvage` tries to use them"
        ));
    }
}

/// The default settings of a store, as far as a look needs them.
fn memory_bytes() -> u64 {
    StoreSettings::new("").memory_bytes
}
