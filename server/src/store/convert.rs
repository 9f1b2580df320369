//! From one engine to another while no server runs: a copy, compared with the original before it counts.
//!
//! A start that finds another engine chosen builds it too, but from snapshot and log alone. This goes further: it copies
//! from the engine that is there, brought up to date with the log, and proves that both hold the same before the new one
//! is named. The old one's files are kept under a dated name.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::current::Current;
use super::engine::{Direction, Engine, EngineError};
use super::home::{Before, EngineHome, FileEngine, Files, FilesHome, RealFiles, Unusable};
use super::identity::{FORMAT, Identity, read_identity};
use super::keeper::room_for_engine;
use super::keys;
use super::lock::{DirLock, LockError};
use super::log::disk::{Disk, RealDisk};
use super::log::{Shelf, ShelfError};
use super::place;
use super::recover::{go_on_without, leave, note, recover};
use super::set_aside;
use super::settings::{EngineKind, OpenError, OpenReport, StoreSettings};
use super::snapshot;
use crate::ports::Clock;

/// Entries between two words of progress.
const WORD_EVERY: u64 = if cfg!(test) { 16 } else { 10_000 };

/// Where a conversion is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConvertStep {
    /// The engine that is there is brought up to date with the log; nothing is counted.
    Recover,
    /// Entries of the engine that is there are counted and summed up.
    Count,
    /// Entries are copied.
    Copy,
    /// Entries of the copy are counted and summed up.
    Verify,
    /// The new engine counts; the old one gets another name.
    SetAside,
}

/// What every live entry of an engine comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Digest {
    /// Entries.
    pub entries: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// CRC-32C over length and content of all keys and values, in the order of the keys.
    pub checksum: u32,
}

/// What a conversion would do, as far as that can be said without opening an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConvertPlan {
    /// The engine that counts; `None`: none is there, or nothing says which.
    pub from: Option<&'static str>,
    /// The one that shall count.
    pub to: &'static str,
    /// Bytes of keys and values that lived at the newest snapshot, and all that was written since: at most so much is
    /// copied.
    pub live_bytes_max: u64,
    /// Free bytes that are enough for that. The conversion itself counts first, and may need less.
    pub room_needed_max: u64,
    /// Free bytes.
    pub room_free: u64,
}

/// What was converted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Converted {
    /// The engine that counted before; `None`: there was none, and the new one was built from snapshot and log.
    pub from: Option<&'static str>,
    /// The one that counts now.
    pub to: &'static str,
    /// What both hold.
    pub digest: Digest,
    /// Where the old engine's files are now, relative to the data directory.
    pub kept: Option<String>,
    /// What happened when the old engine was brought up to date.
    pub report: OpenReport,
}

/// Why nothing was converted. But for [`ConvertError::SetAside`], the engine that counted still does.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The store cannot be opened, as it could not be by a server.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It is there already.
    #[error("the engine that counts in {dir} is {engine} already; there is nothing to convert")]
    Already {
        /// The data directory.
        dir: PathBuf,
        /// Its engine.
        engine: &'static str,
    },
    /// Only engines with files can be converted to.
    #[error("the engine `memory` keeps no files; choose it in the settings and start the server")]
    Memory,
    /// Another engine would not fit.
    #[error(
        "there is no room for another engine beside the one that is there: up to {need} bytes may be needed, {free} are free"
    )]
    NoRoom {
        /// Free bytes that may be needed.
        need: u64,
        /// Free bytes.
        free: u64,
    },
    /// An engine failed.
    #[error("{0}")]
    Engine(String),
    /// Old and new do not hold the same.
    #[error("the copy differs from the original and was removed: {before:?} became {after:?}")]
    Differs {
        /// What the original holds.
        before: Digest,
        /// What the copy holds.
        after: Digest,
    },
    /// The conversion is done, but for the name of the old engine's directory.
    #[error("{engine} counts now, but the old engine's directory kept its name: {error}")]
    SetAside {
        /// The engine that counts now.
        engine: &'static str,
        /// What came back.
        error: std::io::Error,
    },
}

impl From<EngineError> for ConvertError {
    fn from(error: EngineError) -> ConvertError {
        ConvertError::Engine(error.0)
    }
}

/// A data directory that nobody else has.
struct Site {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    identity: Identity,
    _lock: Option<DirLock>,
}

fn target(settings: &StoreSettings) -> Result<FileEngine, ConvertError> {
    match settings.engine {
        EngineKind::Memory => Err(ConvertError::Memory),
        EngineKind::Sled => Ok(FileEngine::Sled),
        EngineKind::Fjall => Ok(FileEngine::Fjall),
    }
}

/// Takes a data directory that holds a store. Unlike a start, this makes none.
fn take(settings: &StoreSettings) -> Result<Site, ConvertError> {
    let identity = |dir: &Path| {
        read_identity(&RealDisk::new(dir), dir)?.ok_or_else(|| OpenError::NotAStore {
            path: dir.join(FORMAT),
            why: "it is not there",
        })
    };
    identity(&settings.dir)?;
    let dir = place::prepare(&settings.dir)?.path;
    place::judge(&dir, settings.trust_file_system)?;
    let lock = DirLock::take(&dir).map_err(|error| match error {
        LockError::Held(holder) => OpenError::InUse {
            dir: dir.clone(),
            holder,
        },
        LockError::Io(path, error) => OpenError::Io {
            what: "could not lock",
            path,
            error,
        },
    })?;
    Ok(Site {
        disk: Arc::new(RealDisk::new(&dir)),
        identity: identity(&dir)?,
        dir,
        _lock: Some(lock),
    })
}

/// Says what [`convert`] would do. Nothing is changed but the file `lock`.
///
/// # Errors
///
/// When the directory is in use or holds no store, or has that engine already.
pub fn plan_conversion(settings: &StoreSettings) -> Result<ConvertPlan, ConvertError> {
    let target = target(settings)?;
    let site = take(settings)?;
    let home = FilesHome::new(
        Arc::clone(&site.disk),
        Box::new(RealFiles::new(&site.dir, settings.memory_bytes)),
        target,
    );
    let there = there(&home, &site, target)?;
    plan(&site, &shelf(&site)?, there, target)
}

fn there(
    home: &FilesHome,
    site: &Site,
    target: FileEngine,
) -> Result<Option<FileEngine>, ConvertError> {
    let there = home
        .counts()
        .map_err(OpenError::io("could not look for the engine in", &site.dir))?;
    if there == Some(target) {
        return Err(ConvertError::Already {
            dir: site.dir.clone(),
            engine: target.name(),
        });
    }
    Ok(there)
}

fn shelf(site: &Site) -> Result<Shelf, ConvertError> {
    Shelf::look(&site.disk, site.identity.store).map_err(|error| {
        ConvertError::Open(match error {
            ShelfError::Io(error) => OpenError::io("could not read the log in", &site.dir)(error),
            ShelfError::Newer { .. } => OpenError::Newer {
                what: error.to_string(),
            },
            ShelfError::Foreign(_) => OpenError::Mixed(error.to_string()),
        })
    })
}

fn plan(
    site: &Site,
    shelf: &Shelf,
    from: Option<FileEngine>,
    to: FileEngine,
) -> Result<ConvertPlan, ConvertError> {
    let io = |what| OpenError::io(what, &site.dir);
    let newest = snapshot::list(&*site.disk)
        .map_err(io("could not list the snapshots in"))?
        .last()
        .copied();
    let at_snapshot = newest.and_then(|frame| snapshot::live_bytes(&*site.disk, frame));
    let live_bytes_max = at_snapshot
        .unwrap_or(0)
        .saturating_add(shelf.bytes_from(newest.unwrap_or(0)));
    Ok(ConvertPlan {
        from: from.map(FileEngine::name),
        to: to.name(),
        live_bytes_max,
        room_needed_max: room_for_engine(live_bytes_max),
        room_free: site
            .disk
            .free()
            .map_err(io("could not see the free room of"))?,
    })
}

/// Converts the engine of a data directory to the one that `settings.engine` names. Blocks until it is done; `progress` is told
/// how many of how many entries a step has seen, 0 of 0 where that is not known.
///
/// # Errors
///
/// When the directory is in use or holds no store, when it has that engine already, when there is no room, or when the
/// copy differs. The engine that counted then still does.
pub fn convert(
    settings: &StoreSettings,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(ConvertStep, u64, u64),
) -> Result<Converted, ConvertError> {
    let target = target(settings)?;
    let site = take(settings)?;
    let files = || -> Box<dyn Files> { Box::new(RealFiles::new(&site.dir, settings.memory_bytes)) };
    convert_at(&site, &files, target, clock, progress)
}

/// The same on a disk of memory, with other engines.
#[cfg(test)]
pub(super) fn convert_on(
    disk: Arc<dyn Disk>,
    files: &dyn Fn() -> Box<dyn Files>,
    target: FileEngine,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(ConvertStep, u64, u64),
) -> Result<Converted, ConvertError> {
    let dir = PathBuf::new();
    let site = Site {
        identity: read_identity(&*disk, &dir)?.expect("a test that has a store"),
        disk,
        dir,
        _lock: None,
    };
    convert_at(&site, files, target, clock, progress)
}

fn convert_at(
    site: &Site,
    files: &dyn Fn() -> Box<dyn Files>,
    target: FileEngine,
    clock: &dyn Clock,
    progress: &mut dyn FnMut(ConvertStep, u64, u64),
) -> Result<Converted, ConvertError> {
    let (disk, dir) = (&site.disk, site.dir.as_path());
    let io = |what| OpenError::io(what, dir);
    let Identity { store, begun } = site.identity;
    let fresh = FilesHome::new(Arc::clone(disk), files(), target);
    let there = there(&fresh, site, target)?;
    let shelf = shelf(site)?;
    let stamp = set_aside::free_stamp(&**disk, &super::stamp(clock.now().unix_ms))
        .map_err(io("could not look at what was set aside in"))?;
    // Where nothing counts, or the pointer cannot be read, the start's own way: from snapshot and log, into the target.
    let Some(from) = there else {
        let plan = plan(site, &shelf, there, target)?;
        enough(plan.room_needed_max, plan.room_free)?;
        progress(ConvertStep::Recover, 0, 0);
        let mut report = OpenReport::default();
        let recovered = recover(&**disk, &shelf, &fresh, store, begun, &mut report)?;
        go_on_without(&**disk, &shelf, &fresh, &recovered, &stamp, &mut report)?;
        let digest = digest(&*recovered.engine, |done| {
            progress(ConvertStep::Count, done, 0);
        })?;
        recovered.engine.close()?;
        fresh
            .end()
            .map_err(io("could not note the end of the engine in"))?;
        return Ok(Converted {
            from: None,
            to: target.name(),
            digest,
            kept: report
                .rebuilt
                .as_ref()
                .and_then(|rebuilt| rebuilt.moved_to.clone()),
            report,
        });
    };
    progress(ConvertStep::Recover, 0, 0);
    let source = FilesHome::new(Arc::clone(disk), files(), from);
    let mut report = OpenReport::default();
    let recovered = recover(&**disk, &shelf, &source, store, begun, &mut report)?;
    go_on_without(&**disk, &shelf, &source, &recovered, &stamp, &mut report)?;
    let (old, next_frame) = (recovered.engine, recovered.next_frame);
    let end = |engine: Arc<dyn Engine>, home: &FilesHome| -> Result<(), ConvertError> {
        engine.close()?;
        // The last handle: nothing writes any more when the note goes, nor when a directory gets another name.
        drop(engine);
        home.end()
            .map_err(io("could not note the end of the engine in"))?;
        Ok(())
    };
    let copied = copy(disk, dir, &fresh, &old, progress);
    // The old engine was brought up to date: it is whole, whether it still counts or not.
    let ended = end(old, &source);
    let (digest, new) = copied?;
    // Neither makes the new one less: it counts, and was handed to the disk before it did.
    for ended in [ended, end(new, &fresh)] {
        if let Err(error) = ended {
            tracing::warn!(%error, "an engine could not be closed in order");
        }
    }
    progress(ConvertStep::SetAside, 0, 0);
    // One of its own: the old engine may have been set aside a moment ago under the other one.
    let kept = set_aside::free_stamp(&**disk, &stamp)
        .and_then(|stamp| {
            let mut words = vec![format!("The engine was converted to {}.", target.name())];
            words.extend(leave(&fresh.leaving(true), &stamp));
            note(&**disk, &stamp, next_frame, words)?;
            fresh.move_aside(&stamp)
        })
        .map_err(|error| ConvertError::SetAside {
            engine: target.name(),
            error,
        })?;
    Ok(Converted {
        from: Some(from.name()),
        to: target.name(),
        digest,
        kept,
        report,
    })
}

/// Copies the old engine into a fresh one, compares the two and names the fresh one.
fn copy(
    disk: &Arc<dyn Disk>,
    dir: &Path,
    fresh: &FilesHome,
    old: &Arc<dyn Engine>,
    progress: &mut dyn FnMut(ConvertStep, u64, u64),
) -> Result<(Digest, Arc<dyn Engine>), ConvertError> {
    let io = |what| OpenError::io(what, dir);
    let before = digest(&**old, |done| progress(ConvertStep::Count, done, 0))?;
    let free = disk.free().map_err(io("could not see the free room of"))?;
    enough(room_for_engine(before.bytes), free)?;
    // Learns what counts. Of course it is not its own.
    match fresh.open() {
        Ok(_) | Err(Unusable::Broken(_)) => {}
        Err(Unusable::Busy(why)) => return Err(ConvertError::Engine(why)),
        Err(Unusable::Newer(what)) => return Err(OpenError::Newer { what }.into()),
    }
    fresh
        .begin()
        .map_err(io("could not note the use of the engine in"))?;
    let built = fresh.build()?;
    let current = Current::new(Arc::clone(old));
    let copied = (|| {
        let mut fill = current.fill(Arc::clone(&built.engine));
        progress(ConvertStep::Copy, 0, before.entries);
        let mut word = WORD_EVERY;
        while fill.step()? {
            let done = fill.copied().entries;
            if done >= word {
                word = done + WORD_EVERY;
                progress(ConvertStep::Copy, done, before.entries);
            }
        }
        fill.settle()?;
        let after = digest(&*built.engine, |done| {
            progress(ConvertStep::Verify, done, before.entries);
        })?;
        if after != before {
            return Err(ConvertError::Differs { before, after });
        }
        fill.take_place(|| fresh.adopt(&built, Before::Kept))?;
        Ok(())
    })();
    match copied {
        Ok(()) => Ok((before, Arc::clone(&built.engine))),
        Err(error) => {
            drop(current);
            fresh.discard(built);
            if let Err(error) = fresh.end() {
                tracing::warn!(%error, "the note of an engine that was given up could not be removed");
            }
            Err(error)
        }
    }
}

fn enough(need: u64, free: u64) -> Result<(), ConvertError> {
    if free < need {
        return Err(ConvertError::NoRoom { need, free });
    }
    Ok(())
}

/// Walks over everything that lives.
fn digest(engine: &dyn Engine, mut word: impl FnMut(u64)) -> Result<Digest, EngineError> {
    let mut digest = Digest::default();
    word(0);
    engine.scan(&[]..&[u8::MAX], Direction::Up, &mut |key, value| {
        if key != keys::POSITION {
            digest.entries += 1;
            digest.bytes += (key.len() + value.len()) as u64;
            for part in [key, value] {
                let length = (part.len() as u64).to_le_bytes();
                digest.checksum = crc32c::crc32c_append(digest.checksum, &length);
                digest.checksum = crc32c::crc32c_append(digest.checksum, part);
            }
            if digest.entries.is_multiple_of(WORD_EVERY) {
                word(digest.entries);
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(digest)
}
