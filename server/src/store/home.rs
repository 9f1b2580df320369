//! Where engines live: how the one that counts is found, how another is built beside it and takes its place, and what
//! may be removed.
//!
//! An engine's files are a directory of the data directory: the first is named after the engine (`sled`), later ones carry
//! a generation too (`sled.2`, `fjall.3`). Generations are counted over all engines. The file `engine` names the
//! directory that counts:
//!
//! ```text
//! bellwire-engine 1 <directory> <directories that it replaced, comma between, or -> <CRC-32C of all before it, hex>
//! ```
//!
//! It is written under another name, synced, renamed and its directory synced, so at any moment it names the old engine or the
//! new one, and a new one only when that is complete. Where there is no such file, the directory named after the engine counts:
//! so it was before the file existed.
//!
//! # What may be removed
//!
//! Two kinds of directories are nothing but copies, and a start removes them: those of a later generation than the one that
//! counts (a build that was cut off before it was named; the file is written before the first such build begins, so a
//! later generation without a file means that the file was lost), and those that the file itself says it replaced.
//! Everything else is moved aside under a dated name at most, and stays until the operator removes it; also at a start, if
//! whoever was about to do it was cut off.
//!
//! An engine whose directory is there but is not named is never opened: it may be old. So choosing another engine in the
//! settings builds that engine from snapshot and log.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::engine::fjall::FjallEngine;
use super::engine::memory::MemoryEngine;
use super::engine::sled::SledEngine;
use super::engine::{Engine, EngineError, disk_bytes};
use super::log::disk::Disk;
use super::set_aside::unused;

/// Why the engine that is there cannot be used.
#[derive(Debug)]
pub(super) enum Unusable {
    /// It is broken, or nothing proves that it is not, or it is not the one that was chosen: another is built.
    Broken(String),
    /// Somebody else has it open: it must not be touched.
    Busy(String),
    /// A later version of this program wrote it.
    Newer(String),
}

/// An engine in a place of its own, which does not count yet.
pub(super) struct Built {
    pub(super) engine: Arc<dyn Engine>,
    place: Option<Place>,
}

/// What becomes of the engine that counted when another takes its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Before {
    /// It stays until [`EngineHome::move_aside`].
    Kept,
    /// The new one was copied from it and is known to be complete: it is removed by [`EngineHome::remove_replaced`], or at the
    /// next start.
    Replaced,
}

/// Where an engine lives, and how it is replaced.
pub(super) trait EngineHome: Send + Sync {
    /// The engine's name.
    fn name(&self) -> &'static str;
    /// Opens the engine that counts. `None`: there is none. Removes what may be removed.
    fn open(&self) -> Result<Option<Arc<dyn Engine>>, Unusable>;
    /// An empty engine in a place of its own.
    fn build(&self) -> Result<Built, EngineError>;
    /// From here on the built engine counts, also after a crash.
    fn adopt(&self, built: &Built, before: Before) -> Result<(), EngineError>;
    /// Removes a build that was given up.
    fn discard(&self, built: Built);
    /// The directories that get another name by [`EngineHome::move_leftovers`] or, if the engine was built `anew`, by
    /// [`EngineHome::move_aside`].
    fn leaving(&self, anew: bool) -> Vec<String>;
    /// Puts what was found by [`EngineHome::open`] and does not count any more out of the way; answers where it is now.
    fn move_aside(&self, stamp: &str) -> io::Result<Option<String>>;
    /// Puts directories out of the way that no longer count and kept their name, because whoever was about to give them
    /// another was cut off.
    fn move_leftovers(&self, stamp: &str) -> io::Result<()>;
    /// Removes what was replaced. Nobody may have it open any more.
    fn remove_replaced(&self) -> io::Result<()>;
    /// Bytes of the directories that were moved aside.
    fn aside_bytes(&self) -> io::Result<u64>;
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
    fn build(&self) -> Result<Built, EngineError> {
        Ok(Built {
            engine: Arc::new(MemoryEngine::new()),
            place: None,
        })
    }
    fn adopt(&self, _built: &Built, _before: Before) -> Result<(), EngineError> {
        Ok(())
    }
    fn discard(&self, _built: Built) {}
    fn leaving(&self, _anew: bool) -> Vec<String> {
        Vec::new()
    }
    fn move_aside(&self, _stamp: &str) -> io::Result<Option<String>> {
        Ok(None)
    }
    fn move_leftovers(&self, _stamp: &str) -> io::Result<()> {
        Ok(())
    }
    fn remove_replaced(&self) -> io::Result<()> {
        Ok(())
    }
    fn aside_bytes(&self) -> io::Result<u64> {
        Ok(0)
    }
    fn begin(&self) -> io::Result<()> {
        Ok(())
    }
    fn end(&self) -> io::Result<()> {
        Ok(())
    }
}

/// An engine that keeps files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum FileEngine {
    Sled,
    Fjall,
}

impl FileEngine {
    const ALL: [FileEngine; 2] = [FileEngine::Sled, FileEngine::Fjall];

    pub(super) fn name(self) -> &'static str {
        match self {
            FileEngine::Sled => "sled",
            FileEngine::Fjall => "fjall",
        }
    }

    /// Whether its files may be believed after the machine went down while they were in use (`docs/decisions/0014`).
    fn survives_loss_of_power(self) -> bool {
        match self {
            FileEngine::Sled => false,
            FileEngine::Fjall => true,
        }
    }
}

/// A directory for an engine's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    generation: u32,
    kind: FileEngine,
}

impl Place {
    fn name(self) -> String {
        match self.generation {
            1 => self.kind.name().to_owned(),
            later => format!("{}.{later}", self.kind.name()),
        }
    }

    fn parse(name: &str) -> Option<Place> {
        let place = FileEngine::ALL.into_iter().find_map(|kind| {
            let generation = match name.strip_prefix(kind.name())? {
                "" => 1,
                rest => rest.strip_prefix('.')?.parse().ok()?,
            };
            Some(Place { generation, kind })
        })?;
        // No leading zeros, no `sled.1`: one name a place.
        (place.name() == name).then_some(place)
    }
}

/// Between the name of a directory that was moved aside and the time of that.
pub(super) const ASIDE: &str = ".aside-";

/// The file that names the engine that counts.
pub(super) const POINTER: &str = "engine";
const POINTER_TEMPORARY: &str = "engine.tmp";
const POINTER_MAGIC: &str = "bellwire-engine";
const POINTER_VERSION: u32 = 1;
/// Longer than any that is written: at most [`REPLACED_MAX`] names.
const POINTER_BYTES_MAX: u64 = 4096;
/// Replaced engines remembered. More than one is there only if removing failed again and again; then no further one is
/// built.
const REPLACED_MAX: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Pointer {
    place: Place,
    replaced: Vec<Place>,
}

#[derive(Debug, PartialEq, Eq)]
enum BadPointer {
    Rotten,
    Newer(u32),
}

impl Pointer {
    fn encode(&self) -> String {
        let replaced = if self.replaced.is_empty() {
            "-".to_owned()
        } else {
            let names: Vec<String> = self.replaced.iter().map(|place| place.name()).collect();
            names.join(",")
        };
        let text = format!(
            "{POINTER_MAGIC} {POINTER_VERSION} {} {replaced}",
            self.place.name()
        );
        format!("{text} {:08x}\n", crc32c::crc32c(text.as_bytes()))
    }

    fn decode(text: &str) -> Result<Pointer, BadPointer> {
        let (body, sum) = text
            .trim_end_matches('\n')
            .rsplit_once(' ')
            .ok_or(BadPointer::Rotten)?;
        if u32::from_str_radix(sum, 16) != Ok(crc32c::crc32c(body.as_bytes())) {
            return Err(BadPointer::Rotten);
        }
        let mut words = body.split(' ');
        if words.next() != Some(POINTER_MAGIC) {
            return Err(BadPointer::Rotten);
        }
        match words.next().and_then(|word| word.parse().ok()) {
            Some(POINTER_VERSION) => {}
            Some(newer) if newer > POINTER_VERSION => return Err(BadPointer::Newer(newer)),
            _ => return Err(BadPointer::Rotten),
        }
        let place = |word: Option<&str>| word.and_then(Place::parse).ok_or(BadPointer::Rotten);
        let counts = place(words.next())?;
        let replaced = match words.next() {
            Some("-") => Vec::new(),
            Some(names) => names
                .split(',')
                .map(|name| place(Some(name)))
                .collect::<Result<_, _>>()?,
            None => return Err(BadPointer::Rotten),
        };
        Ok(Pointer {
            place: counts,
            replaced,
        })
    }
}

/// The file that names this place, for golden files.
#[cfg(test)]
pub(super) fn pointer_text(place: &str, replaced: &[&str]) -> String {
    let parse = |name: &&str| Place::parse(name).expect("the test names places");
    let pointer = Pointer {
        place: parse(&place),
        replaced: replaced.iter().map(parse).collect(),
    };
    pointer.encode()
}

/// The format of the file that names the engine that counts, if a later version of this program wrote it.
pub(super) fn newer(disk: &dyn Disk) -> Option<u32> {
    match Pointer::decode(&read_small(disk, POINTER).ok()???) {
        Err(BadPointer::Newer(version)) => Some(version),
        Ok(_) | Err(BadPointer::Rotten) => None,
    }
}

/// The directories of engines, and how one is opened.
pub(super) trait Files: Send + Sync {
    /// The names of all directories that are there.
    fn list(&self) -> io::Result<Vec<String>>;
    /// Opens or makes the engine in a directory.
    fn open(&self, kind: FileEngine, name: &str) -> Result<Arc<dyn Engine>, Unusable>;
    /// Makes an empty directory for an engine.
    fn make(&self, name: &str) -> io::Result<()>;
    /// Gives a directory another name. Safe after a sync of the data directory.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a directory with all that is in it.
    fn remove(&self, name: &str) -> io::Result<()>;
    /// Bytes that a directory takes on the disk.
    fn size(&self, name: &str) -> u64;
    /// Which boot of the machine this is. `None` where the system does not say; then a crash of the machine cannot be
    /// told from one of the process.
    fn boot(&self) -> Option<String>;
}

/// How often, and after which wait, files that somebody else has open are tried again: 5 s in all.
const BUSY_TRIES: u32 = 100;
const BUSY_WAIT: Duration = Duration::from_millis(50);

/// Directories of the real file system.
pub(super) struct RealFiles {
    dir: PathBuf,
    memory_bytes: u64,
}

impl RealFiles {
    pub(super) fn new(dir: &Path, memory_bytes: u64) -> RealFiles {
        RealFiles {
            dir: dir.to_owned(),
            memory_bytes,
        }
    }
}

impl Files for RealFiles {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            if let (true, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string())
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn open(&self, kind: FileEngine, name: &str) -> Result<Arc<dyn Engine>, Unusable> {
        open_files(kind, &self.dir.join(name), self.memory_bytes)
    }

    fn make(&self, name: &str) -> io::Result<()> {
        super::log::disk::make_private_dir(&self.dir.join(name))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.dir.join(from), self.dir.join(to))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_dir_all(self.dir.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn size(&self, name: &str) -> u64 {
        disk_bytes(&self.dir.join(name))
    }

    fn boot(&self) -> Option<String> {
        boot()
    }
}

/// Which boot of the machine this is.
fn boot() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .ok()
        .map(|id| id.trim().to_owned())
}

/// Opens or makes an engine's files in a directory. Waits a while for files that somebody else has open.
pub(super) fn open_files(
    kind: FileEngine,
    dir: &Path,
    memory_bytes: u64,
) -> Result<Arc<dyn Engine>, Unusable> {
    let mut tries = 0;
    loop {
        let opened: Result<Arc<dyn Engine>, EngineError> = match kind {
            FileEngine::Sled => {
                SledEngine::open(dir, memory_bytes).map(|engine| Arc::new(engine) as _)
            }
            FileEngine::Fjall => {
                FjallEngine::open(dir, memory_bytes).map(|engine| Arc::new(engine) as _)
            }
        };
        let busy = |error: &EngineError| match kind {
            FileEngine::Sled => SledEngine::is_busy(error),
            FileEngine::Fjall => FjallEngine::is_busy(error),
        };
        match opened {
            Ok(engine) => return Ok(engine),
            Err(error) if !busy(&error) => return Err(Unusable::Broken(error.to_string())),
            // Threads of the engine's own may hold the files for a moment after their last user is gone.
            Err(_) if tries < BUSY_TRIES => {
                tries += 1;
                std::thread::sleep(BUSY_WAIT);
            }
            Err(error) => return Err(Unusable::Busy(error.to_string())),
        }
    }
}

/// Engines in files.
pub(super) struct FilesHome {
    disk: Arc<dyn Disk>,
    files: Box<dyn Files>,
    kind: FileEngine,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// What the file said, or would have said.
    pointer: Option<Pointer>,
    /// The file is there, and says that.
    written: bool,
    /// The file is there and cannot be read.
    unreadable: bool,
    /// Directories that are there and will not count once another engine does.
    put_out: Vec<Place>,
    /// Directories that are there, did not count when this looked, and may hold what nobody has seen yet.
    leftovers: Vec<Place>,
    /// The highest generation that was ever seen.
    highest: u32,
}

impl FilesHome {
    pub(super) fn new(disk: Arc<dyn Disk>, files: Box<dyn Files>, kind: FileEngine) -> FilesHome {
        FilesHome {
            disk,
            files,
            kind,
            state: Mutex::new(State::default()),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the identity of the machine's boot while the engine is in use.
    fn in_use(&self) -> String {
        format!("{}.in-use", self.kind.name())
    }

    fn places(&self) -> io::Result<Vec<Place>> {
        let mut places: Vec<Place> = self
            .files
            .list()?
            .iter()
            .filter_map(|name| Place::parse(name))
            .collect();
        places.sort_unstable();
        Ok(places)
    }

    fn read_pointer(&self) -> io::Result<Option<Result<Pointer, BadPointer>>> {
        Ok(read_small(&*self.disk, POINTER)?.map(|text| match text {
            Some(text) => Pointer::decode(&text),
            None => Err(BadPointer::Rotten),
        }))
    }

    fn write_pointer(&self, state: &mut State, pointer: Pointer) -> io::Result<()> {
        write_small(&*self.disk, POINTER_TEMPORARY, POINTER, &pointer.encode())?;
        state.pointer = Some(pointer);
        state.written = true;
        Ok(())
    }

    /// Which engine counts, whatever was chosen. `None`: none is there, or nothing says which. Changes nothing.
    pub(super) fn counts(&self) -> io::Result<Option<FileEngine>> {
        let places = self.places()?;
        Ok(match self.read_pointer()? {
            Some(Ok(pointer)) => places
                .contains(&pointer.place)
                .then_some(pointer.place.kind),
            // A start says what is wrong with it.
            Some(Err(_)) => None,
            None if places.last().is_some_and(|place| place.generation > 1) => None,
            None => places.first().map(|place| place.kind),
        })
    }

    /// Gives directories dated names; answers the last one.
    fn set_aside(&self, places: &[Place], stamp: &str) -> io::Result<Option<String>> {
        if places.is_empty() {
            return Ok(None);
        }
        let taken = self.files.list()?;
        let mut moved = None;
        for place in places {
            let name = unused(&format!("{}{ASIDE}{stamp}", place.name()), "", &taken);
            self.files.rename(&place.name(), &name)?;
            moved = Some(name);
        }
        self.disk.sync_dir("")?;
        Ok(moved)
    }

    /// Finds out what counts, and removes what may be removed.
    fn look(&self) -> Result<Option<Place>, Unusable> {
        let io = |error: io::Error| Unusable::Busy(format!("the data directory: {error}"));
        let places = self.places().map_err(io)?;
        let mut state = self.lock();
        let highest = places.last().map_or(0, |place| place.generation);
        *state = State {
            highest,
            ..State::default()
        };
        let pointer = match self.read_pointer().map_err(io)? {
            Some(Ok(pointer)) => pointer,
            Some(Err(BadPointer::Newer(version))) => {
                return Err(Unusable::Newer(format!(
                    "the file `{POINTER}` has format {version}"
                )));
            }
            Some(Err(BadPointer::Rotten)) => {
                state.unreadable = true;
                state.put_out = places;
                return Err(Unusable::Broken(format!(
                    "the file `{POINTER}` says which engine counts, and it cannot be read"
                )));
            }
            None if highest > 1 => {
                state.put_out = places;
                return Err(Unusable::Broken(format!(
                    "the file `{POINTER}` says which engine counts, and it is missing"
                )));
            }
            None => {
                // Before the file existed, or nothing was there.
                let chosen = places.iter().find(|place| place.kind == self.kind);
                let Some(place) = chosen.or(places.first()).copied() else {
                    return Ok(None);
                };
                state.pointer = Some(Pointer {
                    place,
                    replaced: Vec::new(),
                });
                return Self::chosen(&mut state, place, self.kind, true);
            }
        };
        state.written = true;
        state.highest = highest.max(pointer.place.generation);
        let mut there = false;
        for place in places {
            if place.generation > pointer.place.generation || pointer.replaced.contains(&place) {
                tracing::info!(
                    directory = place.name(),
                    "removing an engine that is only a copy"
                );
                if let Err(error) = self.files.remove(&place.name()) {
                    tracing::warn!(%error, directory = place.name(), "it could not be removed");
                }
            } else if place != pointer.place {
                state.leftovers.push(place);
            }
            there |= place == pointer.place;
        }
        let place = pointer.place;
        state.pointer = Some(pointer);
        Self::chosen(&mut state, place, self.kind, there)
    }

    fn chosen(
        state: &mut State,
        place: Place,
        kind: FileEngine,
        there: bool,
    ) -> Result<Option<Place>, Unusable> {
        if !there {
            return Ok(None);
        }
        state.put_out = vec![place];
        if place.kind == kind {
            return Ok(Some(place));
        }
        Err(Unusable::Broken(format!(
            "the settings choose {}, and what is there is of {}",
            kind.name(),
            place.kind.name()
        )))
    }
}

/// The name of the directory that the pointer file names; `None` if there is no such file or it cannot be read.
#[cfg(test)]
pub(super) fn named(disk: &dyn Disk) -> Option<String> {
    let text = read_small(disk, POINTER).ok()???;
    Some(Pointer::decode(&text).ok()?.place.name())
}

/// A file of a few words. `Some(None)`: it is there, but is no text or too long.
fn read_small(disk: &dyn Disk, name: &str) -> io::Result<Option<Option<String>>> {
    let file = match disk.open(name) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.length()?;
    if length > POINTER_BYTES_MAX {
        return Ok(Some(None));
    }
    // Far below what a word can hold.
    let mut bytes = vec![0; length as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(String::from_utf8(bytes).ok()))
}

fn write_small(disk: &dyn Disk, temporary: &str, name: &str, text: &str) -> io::Result<()> {
    let file = disk.create(temporary)?;
    file.write_at(text.as_bytes(), 0)?;
    file.sync()?;
    disk.rename(temporary, name)?;
    disk.sync_dir("")
}

fn at(name: &str) -> impl Fn(io::Error) -> EngineError {
    move |error| EngineError(format!("{name}: {error}"))
}

impl EngineHome for FilesHome {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn open(&self) -> Result<Option<Arc<dyn Engine>>, Unusable> {
        let Some(place) = self.look()? else {
            return Ok(None);
        };
        let note = read_small(&*self.disk, &self.in_use())
            .map_err(|error| Unusable::Busy(format!("{}: {error}", self.in_use())))?;
        if !self.kind.survives_loss_of_power()
            && let (Some(then), Some(now)) = (note, self.files.boot())
            && then.is_none_or(|then| then.trim() != now)
        {
            return Err(Unusable::Broken(
                "the machine went down while it was in use, and its files are never synced"
                    .to_owned(),
            ));
        }
        // Closed in order, or only the process ended.
        self.files.open(self.kind, &place.name()).map(Some)
    }

    fn build(&self) -> Result<Built, EngineError> {
        let mut state = self.lock();
        let replaced = state
            .pointer
            .as_ref()
            .map_or(0, |pointer| pointer.replaced.len());
        if replaced >= REPLACED_MAX {
            return Err(EngineError(
                "engines that were replaced could not be removed; remove them by hand".to_owned(),
            ));
        }
        // Before a later generation is there, the file must be: see the head of this file.
        if let (false, false, Some(pointer)) = (state.written, state.unreadable, &state.pointer) {
            let pointer = pointer.clone();
            self.write_pointer(&mut state, pointer)
                .map_err(at(POINTER))?;
        }
        let place = Place {
            generation: state.highest + 1,
            kind: self.kind,
        };
        state.highest = place.generation;
        drop(state);
        let name = place.name();
        self.files.make(&name).map_err(at(&name))?;
        let engine = self.files.open(self.kind, &name).map_err(|why| match why {
            Unusable::Broken(why) | Unusable::Busy(why) | Unusable::Newer(why) => EngineError(why),
        })?;
        Ok(Built {
            engine,
            place: Some(place),
        })
    }

    fn adopt(&self, built: &Built, before: Before) -> Result<(), EngineError> {
        // In the hands of the operating system, or of the disk, before anything says that it is there.
        built.engine.close()?;
        let mut state = self.lock();
        let Some(place) = built.place else {
            return Err(EngineError("it has no place".to_owned()));
        };
        if std::mem::take(&mut state.unreadable) {
            let taken = self.disk.list("").map_err(at(POINTER))?;
            let aside = unused(&format!("{POINTER}.aside"), "", &taken);
            self.disk.rename(POINTER, &aside).map_err(at(POINTER))?;
        }
        let mut replaced = state
            .pointer
            .as_ref()
            .map_or(Vec::new(), |pointer| pointer.replaced.clone());
        if before == Before::Replaced {
            replaced.extend(state.pointer.as_ref().map(|pointer| pointer.place));
        }
        self.write_pointer(&mut state, Pointer { place, replaced })
            .map_err(at(POINTER))?;
        state.put_out.retain(|out| *out != place);
        Ok(())
    }

    fn discard(&self, built: Built) {
        let Built { engine, place } = built;
        drop(engine);
        if let Some(place) = place
            && let Err(error) = self.files.remove(&place.name())
        {
            tracing::warn!(%error, directory = place.name(), "a build that was given up could not be removed; the next start does");
        }
    }

    fn leaving(&self, anew: bool) -> Vec<String> {
        let state = self.lock();
        let out: &[Place] = if anew { &state.put_out } else { &[] };
        let leaving = state.leftovers.iter().chain(out);
        leaving.map(|place| place.name()).collect()
    }

    fn move_aside(&self, stamp: &str) -> io::Result<Option<String>> {
        self.move_leftovers(stamp)?;
        let out = std::mem::take(&mut self.lock().put_out);
        self.set_aside(&out, stamp)
    }

    fn move_leftovers(&self, stamp: &str) -> io::Result<()> {
        let out = std::mem::take(&mut self.lock().leftovers);
        if let Some(moved_to) = self.set_aside(&out, stamp)? {
            tracing::info!(
                moved_to,
                "an engine that did not count any more was moved aside"
            );
        }
        Ok(())
    }

    fn remove_replaced(&self) -> io::Result<()> {
        let mut state = self.lock();
        let Some(pointer) = state.pointer.clone() else {
            return Ok(());
        };
        for place in &pointer.replaced {
            self.files.remove(&place.name())?;
        }
        if pointer.replaced.is_empty() {
            return Ok(());
        }
        self.write_pointer(
            &mut state,
            Pointer {
                replaced: Vec::new(),
                ..pointer
            },
        )
    }

    fn aside_bytes(&self) -> io::Result<u64> {
        let names = self.files.list()?;
        let aside = names
            .iter()
            .filter(|name| whose(name).is_some() && name.contains(ASIDE));
        Ok(aside.map(|name| self.files.size(name)).sum())
    }

    fn begin(&self) -> io::Result<()> {
        match self.files.boot() {
            Some(boot) if !self.kind.survives_loss_of_power() => {
                let name = self.in_use();
                write_small(
                    &*self.disk,
                    &format!("{name}.tmp"),
                    &name,
                    &format!("{boot}\n"),
                )
            }
            Some(_) | None => Ok(()),
        }
    }

    fn end(&self) -> io::Result<()> {
        match self.disk.remove(&self.in_use()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => self.disk.sync_dir(""),
        }
    }
}

// ---- Looking without touching --------------------------------------------------------------------------------------

/// What a directory of engine files is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A start opens it.
    Counts,
    /// Nothing but a copy, which a start removes.
    Copy,
    /// It was moved aside, or does not count for another reason.
    Aside,
}

/// A directory of engine files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) name: String,
    pub(super) kind: FileEngine,
    pub(super) role: Role,
    /// The machine went down while it was in use, and its files prove nothing after that.
    pub(super) unproven: bool,
}

/// Whose files a name is of: a directory, one that was moved aside, or the note of its use.
pub(super) fn whose(name: &str) -> Option<FileEngine> {
    FileEngine::ALL.into_iter().find(|kind| {
        name.strip_prefix(kind.name())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    })
}

/// The directories of engines as a start would judge them, and what is wrong with the file that names the one that
/// counts. Changes nothing. `wanted`: the engine that the settings choose, if they are known.
pub(super) fn survey(
    disk: &dyn Disk,
    directories: &[String],
    wanted: Option<FileEngine>,
) -> io::Result<(Vec<Seen>, Option<String>)> {
    let mut places: Vec<Place> = directories
        .iter()
        .filter_map(|name| Place::parse(name))
        .collect();
    places.sort_unstable();
    let highest = places.last().map_or(0, |place| place.generation);
    let (pointer, trouble) = match read_small(disk, POINTER)? {
        None if highest > 1 => (None, Some("it is missing".to_owned())),
        None => {
            let chosen = places.iter().find(|place| Some(place.kind) == wanted);
            let pointer = chosen.or(places.first()).map(|place| Pointer {
                place: *place,
                replaced: Vec::new(),
            });
            (pointer, None)
        }
        Some(text) => match text
            .ok_or(BadPointer::Rotten)
            .and_then(|text| Pointer::decode(&text))
        {
            Ok(pointer) => (Some(pointer), None),
            Err(BadPointer::Rotten) => (None, Some("it cannot be read".to_owned())),
            Err(BadPointer::Newer(version)) => (None, Some(format!("it has format {version}"))),
        },
    };
    let mut seen = Vec::new();
    for name in directories {
        let Some(kind) = whose(name) else {
            continue;
        };
        let role = match (Place::parse(name), &pointer) {
            (Some(place), Some(pointer)) if place == pointer.place => Role::Counts,
            (Some(place), Some(pointer))
                if place.generation > pointer.place.generation
                    || pointer.replaced.contains(&place) =>
            {
                Role::Copy
            }
            (Some(_) | None, _) => Role::Aside,
        };
        let note = read_small(disk, &format!("{}.in-use", kind.name()))?;
        let unproven = role == Role::Counts
            && !kind.survives_loss_of_power()
            && matches!((note, boot()), (Some(then), Some(now)) if then.as_deref().is_none_or(|then| then.trim() != now));
        seen.push(Seen {
            name: name.clone(),
            kind,
            role,
            unproven,
        });
    }
    Ok((seen, trouble))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_pointer_says_what_counts_and_what_it_replaced_and_notices_every_flipped_bit() {
        let place = |generation, kind| Place { generation, kind };
        let pointer = Pointer {
            place: place(3, FileEngine::Fjall),
            replaced: vec![place(1, FileEngine::Sled), place(2, FileEngine::Fjall)],
        };
        let text = pointer.encode();
        assert!(
            text.starts_with("bellwire-engine 1 fjall.3 sled,fjall.2 "),
            "{text}"
        );
        assert_eq!(Pointer::decode(&text), Ok(pointer));
        for index in 0..text.len() - 1 {
            for bit in 0..7 {
                let mut bytes = text.clone().into_bytes();
                bytes[index] ^= 1 << bit;
                let flipped = String::from_utf8(bytes).unwrap();
                // The sum is hexadecimal: a flipped bit may only change a letter's case.
                if !flipped.eq_ignore_ascii_case(&text) {
                    assert_eq!(
                        Pointer::decode(&flipped),
                        Err(BadPointer::Rotten),
                        "{flipped}"
                    );
                }
            }
        }
        let newer = "bellwire-engine 2 redb.4 -";
        let newer = format!("{newer} {:08x}\n", crc32c::crc32c(newer.as_bytes()));
        assert_eq!(Pointer::decode(&newer), Err(BadPointer::Newer(2)));
    }

    #[test]
    fn a_directory_has_one_name() {
        for name in ["sled", "fjall", "sled.2", "fjall.17"] {
            assert_eq!(Place::parse(name).unwrap().name(), name);
        }
        for name in [
            "sled.1",
            "sled.02",
            "sled.",
            "sled.aside-20231114T221320Z",
            "sled.in-use",
            "sledge",
            "log",
            "",
        ] {
            assert_eq!(Place::parse(name), None, "{name}");
        }
    }
}
