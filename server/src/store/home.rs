//! Where engines live: how one is found, built beside what is there, and put out of the way.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::engine::memory::MemoryEngine;
use super::engine::sled::SledEngine;
use super::engine::{Engine, EngineError};
use super::log::disk::FILE_MODE;

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

pub(super) const SLED: &str = "sled";
const BUILDING: &str = "sled.building";
/// Holds the identity of the machine's boot while the engine is in use.
pub(super) const IN_USE: &str = "sled.in-use";

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
