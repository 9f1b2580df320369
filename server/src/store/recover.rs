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
//! it ends, or was left open when the machine (not only the process) went down: sled never syncs, so after a
//! loss of power its files prove nothing. It is moved aside under a dated name and a new one is built in a place of its
//! own, which takes the old one's place only when it is complete.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::apply::apply_run;
use super::engine::memory::MemoryEngine;
use super::engine::sled::SledEngine;
use super::engine::{Engine, EngineError};
use super::log::disk::{Disk, FILE_MODE};
use super::log::{Ending, ReplayError, Shelf, Tail};
use super::settings::{OpenError, OpenReport, Rebuilt};
use super::snapshot::{self, SnapshotError};
use super::write::{self, Write};

/// Bytes of frames that are applied at a time in a replay.
const RUN_BYTES: usize = 8 << 20;

/// Why the engine that is there cannot be used.
pub(super) enum Unusable {
    /// It is broken, or nothing proves that it is not: it is moved aside.
    Broken(String),
    /// Somebody else has it open: it must not be touched.
    Busy(String),
}

/// Where an engine lives, and how it is replaced.
pub(super) trait EngineHome {
    /// The engine's name.
    fn name(&self) -> &'static str;
    /// Opens the engine that is there. `None`: there is none.
    fn open(&self) -> Result<Option<Arc<dyn Engine>>, Unusable>;
    /// Puts the engine that is there out of the way; answers where it is now.
    fn move_aside(&self, stamp: &str) -> io::Result<Option<String>>;
    /// An empty engine in a place of its own.
    fn build(&self) -> Result<Arc<dyn Engine>, EngineError>;
    /// Gives a built engine the place of the one that was there.
    fn adopt(&self, built: Arc<dyn Engine>) -> Result<Arc<dyn Engine>, EngineError>;
    /// Notes that the engine is in use.
    fn begin(&self) -> io::Result<()>;
    /// Notes that the engine was closed in order.
    fn end(&self) -> io::Result<()>;
}

/// The engine in memory has no place.
pub(super) struct MemoryHome;

impl EngineHome for MemoryHome {
    fn name(&self) -> &'static str {
        "memory"
    }
    fn open(&self) -> Result<Option<Arc<dyn Engine>>, Unusable> {
        Ok(None)
    }
    fn move_aside(&self, _stamp: &str) -> io::Result<Option<String>> {
        Ok(None)
    }
    fn build(&self) -> Result<Arc<dyn Engine>, EngineError> {
        Ok(Arc::new(MemoryEngine::new()))
    }
    fn adopt(&self, built: Arc<dyn Engine>) -> Result<Arc<dyn Engine>, EngineError> {
        Ok(built)
    }
    fn begin(&self) -> io::Result<()> {
        Ok(())
    }
    fn end(&self) -> io::Result<()> {
        Ok(())
    }
}

/// sled's files: `<data>/sled`.
pub(super) struct SledHome {
    dir: PathBuf,
    cache_bytes: u64,
}

/// How often, and after which wait, files that somebody else has open are tried again: 5 s in all.
const BUSY_TRIES: u32 = 100;
const BUSY_WAIT: Duration = Duration::from_millis(50);

const SLED: &str = "sled";
const BUILDING: &str = "sled.building";
/// Holds the identity of the machine's boot while the engine is in use.
const IN_USE: &str = "sled.in-use";

impl SledHome {
    pub(super) fn new(dir: &Path, cache_bytes: u64) -> SledHome {
        SledHome {
            dir: dir.to_owned(),
            cache_bytes,
        }
    }

    /// Which boot of the machine this is. `None` where the system does not say; then a crash of the machine cannot be told
    /// from one of the process.
    fn boot() -> Option<String> {
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .ok()
            .map(|id| id.trim().to_owned())
    }

    fn sync_dir(&self) -> io::Result<()> {
        fs::File::open(&self.dir)?.sync_all()
    }
}

impl EngineHome for SledHome {
    fn name(&self) -> &'static str {
        "sled"
    }

    fn open(&self) -> Result<Option<Arc<dyn Engine>>, Unusable> {
        let dir = self.dir.join(SLED);
        if !dir.exists() {
            return Ok(None);
        }
        match (fs::read_to_string(self.dir.join(IN_USE)), Self::boot()) {
            (Ok(then), Some(now)) if then.trim() != now => {
                return Err(Unusable::Broken(
                    "the machine went down while it was in use, and its files are never synced"
                        .to_owned(),
                ));
            }
            // Closed in order, or only the process ended.
            (Ok(_) | Err(_), _) => {}
        }
        let mut tries = 0;
        loop {
            match SledEngine::open(&dir, self.cache_bytes) {
                Ok(engine) => return Ok(Some(Arc::new(engine))),
                Err(error) if !SledEngine::is_busy(&error) => {
                    return Err(Unusable::Broken(error.to_string()));
                }
                // Threads of sled's own may hold the files for a moment after their last user is gone.
                Err(_) if tries < BUSY_TRIES => {
                    tries += 1;
                    std::thread::sleep(BUSY_WAIT);
                }
                Err(error) => return Err(Unusable::Busy(error.to_string())),
            }
        }
    }

    fn move_aside(&self, stamp: &str) -> io::Result<Option<String>> {
        let from = self.dir.join(SLED);
        if !from.exists() {
            return Ok(None);
        }
        let mut name = format!("{SLED}.aside-{stamp}");
        let mut again = 1;
        while self.dir.join(&name).exists() {
            again += 1;
            name = format!("{SLED}.aside-{stamp}-{again}");
        }
        fs::rename(from, self.dir.join(&name))?;
        self.sync_dir()?;
        Ok(Some(name))
    }

    fn build(&self) -> Result<Arc<dyn Engine>, EngineError> {
        let dir = self.dir.join(BUILDING);
        let ready = match fs::remove_dir_all(&dir) {
            // A build that was cut off: only ever a copy of what snapshot and log hold.
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => super::log::disk::make_private_dir(&dir),
        };
        ready.map_err(|error| EngineError(format!("{}: {error}", dir.display())))?;
        Ok(Arc::new(SledEngine::open(&dir, self.cache_bytes)?))
    }

    fn adopt(&self, built: Arc<dyn Engine>) -> Result<Arc<dyn Engine>, EngineError> {
        built.close()?;
        // The last handle: sled lets go of its files.
        drop(built);
        let dir = self.dir.join(SLED);
        fs::rename(self.dir.join(BUILDING), &dir)
            .and_then(|()| self.sync_dir())
            .map_err(|error| EngineError(format!("{}: {error}", dir.display())))?;
        Ok(Arc::new(SledEngine::open(&dir, self.cache_bytes)?))
    }

    fn begin(&self) -> io::Result<()> {
        use std::io::Write as _;
        use std::os::unix::fs::OpenOptionsExt;
        let Some(boot) = Self::boot() else {
            return Ok(());
        };
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(FILE_MODE)
            .open(self.dir.join(IN_USE))?;
        writeln!(file, "{boot}")?;
        file.sync_all()?;
        self.sync_dir()
    }

    fn end(&self) -> io::Result<()> {
        match fs::remove_file(self.dir.join(IN_USE)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => self.sync_dir(),
        }
    }
}

/// What was found and can be proved.
pub(super) struct Recovered {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) tail: Tail,
    /// The number of the next frame: behind the tail, unless a snapshot knows of later ones.
    pub(super) next_frame: u64,
    /// Bytes of what lived when the newest snapshot was taken, if one was read.
    pub(super) live: u64,
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
    stamp: &str,
    report: &mut OpenReport,
) -> Result<Recovered, OpenError> {
    report.engine = home.name();
    let found = home.open();
    // Before the first write to the engine, and after the look at the last note.
    home.begin()
        .map_err(OpenError::io("could not note the use of", IN_USE))?;
    let why = match found {
        Ok(None) => None,
        Ok(Some(engine)) => match try_engine(&engine, shelf)? {
            Ok(replayed) => {
                report.replayed_frames = replayed.frames;
                return Ok(Recovered {
                    engine,
                    next_frame: replayed.tail.next_frame,
                    tail: replayed.tail,
                    live: 0,
                });
            }
            Err(why) => Some(why),
        },
        Err(Unusable::Broken(why)) => Some(why),
        Err(Unusable::Busy(why)) => return Err(OpenError::Engine(why)),
    };
    let moved_to = home
        .move_aside(stamp)
        .map_err(OpenError::io("could not move aside", SLED))?;
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
                    moved_to,
                });
                return Ok(Recovered {
                    engine,
                    tail: replayed.tail,
                    next_frame,
                    live,
                });
            }
            Err(why) => {
                tracing::error!(snapshot = frame, why, "a snapshot cannot be used");
                tried = format!("{tried}; snapshot {frame}: {why}");
            }
        }
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
    let engine = home.build().map_err(|error| OpenError::Engine(error.0))?;
    let replayed = replay(&engine, shelf, 1)?.map_err(OpenError::Engine)?;
    let engine = home
        .adopt(engine)
        .map_err(|error| OpenError::Engine(error.0))?;
    report.replayed_frames = replayed.frames;
    report.rebuilt = why.map(|why| Rebuilt {
        why,
        snapshot: None,
        moved_to,
    });
    Ok(Recovered {
        engine,
        next_frame: replayed.tail.next_frame,
        tail: replayed.tail,
        live: 0,
    })
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
    let engine = home.build().map_err(|error| OpenError::Engine(error.0))?;
    let info = match snapshot::load(disk, frame, store, &engine) {
        Ok(info) => info,
        Err(SnapshotError::Newer(version)) => {
            return Err(OpenError::Newer {
                what: format!("snapshot {frame} has format {version}"),
            });
        }
        Err(error) => return Ok(Err(error.to_string())),
    };
    let replayed = match replay_over(&engine, shelf, frame)? {
        Ok(replayed) => replayed,
        Err(why) => return Ok(Err(why)),
    };
    let engine = home
        .adopt(engine)
        .map_err(|error| OpenError::Engine(error.0))?;
    Ok(Ok((engine, replayed, info.bytes)))
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
