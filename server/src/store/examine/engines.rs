//! The directories of engines, and what a copy of one says.

use std::fs;
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::lock::Probe;
use super::{Inspect, InspectError, memory_bytes, names, size};
use crate::store::engine::Engine;
use crate::store::home::{self, FileEngine, Role, Unusable};
use crate::store::log::disk::{Disk, FILE_MODE, make_private_dir};

/// The directory of an engine.
#[derive(Debug, Clone, Serialize)]
pub struct EngineSeen {
    /// Its directory, below the data directory.
    pub dir: String,
    /// Which engine's files they are.
    pub engine: &'static str,
    /// A start looks at this one.
    pub counts: bool,
    /// It was moved aside: by a start that did not believe it or found another chosen, or by a conversion.
    pub aside: bool,
    /// Size of its files.
    pub bytes: u64,
    /// How it is.
    pub state: EngineState,
}

impl EngineSeen {
    /// The finding about one that was moved aside. It takes room and nothing else: nothing is wrong with the store.
    pub(super) fn moved_aside(&self) -> Option<String> {
        (self.aside && self.dir.contains(home::ASIDE))
            .then(|| format!("{}: an engine that was moved aside", self.dir))
    }
}

/// How an engine is.
#[derive(Debug, Clone, Serialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum EngineState {
    /// It was not opened.
    NotOpened {
        /// Why.
        why: String,
    },
    /// A copy of it opens.
    Opens {
        /// The frame that it takes next.
        position: u64,
    },
    /// A copy of it does not open.
    Fails {
        /// Why.
        why: String,
    },
    /// Nothing proves that its files are what was written.
    Unproven {
        /// Why.
        why: String,
        /// The frame that it takes next, if a copy of it opens all the same.
        position: Option<u64>,
    },
}

/// The directories of engines, and what is wrong with the file that names the one that counts.
pub(super) fn engines(
    disk: &dyn Disk,
    dir: &Path,
    ask: &Inspect,
    probe: &Probe,
) -> Result<(Vec<EngineSeen>, Option<String>), InspectError> {
    let all = names(dir).map_err(InspectError::io("the data directory cannot be listed"))?;
    let directories: Vec<String> = all
        .into_iter()
        .filter(|name| dir.join(name).is_dir())
        .collect();
    let (found, trouble) = home::survey(disk, &directories, None)
        .map_err(InspectError::io("the engines cannot be listed"))?;
    let mut seen = Vec::new();
    for found in found {
        let path = dir.join(&found.name);
        let state = if probe.is_busy() && found.role == Role::Counts {
            EngineState::NotOpened {
                why: "a server has it open".to_owned(),
            }
        } else if found.unproven {
            EngineState::Unproven {
                why: "the machine went down while it was in use, and its files are never synced"
                    .to_owned(),
                position: if ask.open_engines {
                    match open_copy(found.kind, &path, ask)? {
                        EngineState::Opens { position } => Some(position),
                        EngineState::NotOpened { .. }
                        | EngineState::Fails { .. }
                        | EngineState::Unproven { .. } => None,
                    }
                } else {
                    None
                },
            }
        } else if ask.open_engines && found.role != Role::Copy {
            open_copy(found.kind, &path, ask)?
        } else {
            EngineState::NotOpened {
                why: "opening an engine writes to its files; --open-engine looks at a copy"
                    .to_owned(),
            }
        };
        seen.push(EngineSeen {
            engine: found.kind.name(),
            counts: found.role == Role::Counts,
            aside: found.role == Role::Aside,
            bytes: size(&path),
            state,
            dir: found.name,
        });
    }
    Ok((seen, trouble))
}

fn open_copy(kind: FileEngine, path: &Path, ask: &Inspect) -> Result<EngineState, InspectError> {
    let copy = TempCopy::of(path, ask.scratch.as_deref()).map_err(InspectError::io(format!(
        "{} cannot be copied",
        path.display()
    )))?;
    Ok(match position(kind, copy.path()) {
        Ok(Some(position)) => EngineState::Opens { position },
        Ok(None) => EngineState::Fails {
            why: "it does not say which frames it has".to_owned(),
        },
        Err(why) => EngineState::Fails { why },
    })
}

fn position(kind: FileEngine, dir: &Path) -> Result<Option<u64>, String> {
    open_engine(kind, dir)?
        .position()
        .map_err(|error| error.to_string())
}

/// Opens the engine in a copy of its files.
pub(super) fn open_engine(kind: FileEngine, dir: &Path) -> Result<Arc<dyn Engine>, String> {
    home::open_files(kind, dir, memory_bytes()).map_err(|error| match error {
        Unusable::Broken(why) | Unusable::Busy(why) | Unusable::Newer(why) => why,
    })
}

/// A copy of a directory for its owner alone, removed when this goes.
pub(super) struct TempCopy {
    path: PathBuf,
}

/// Most names that are tried for a directory of temporary files.
const NAMES_TRIED: u32 = 10_000;

impl TempCopy {
    /// Copies a directory below `scratch`, or below the system's directory for temporary files.
    pub(super) fn of(from: &Path, scratch: Option<&Path>) -> io::Result<TempCopy> {
        let copy = TempCopy::empty(scratch)?;
        copy_dir(from, &copy.path)?;
        Ok(copy)
    }

    /// An empty directory of that kind.
    pub(super) fn empty(scratch: Option<&Path>) -> io::Result<TempCopy> {
        let below = scratch.map_or_else(std::env::temp_dir, Path::to_owned);
        for number in 0..NAMES_TRIED {
            let path = below.join(format!("bellwire-{}-{number}", std::process::id()));
            match fs::symlink_metadata(&path) {
                Ok(_) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            make_private_dir(&path)?;
            return Ok(TempCopy { path });
        }
        Err(io::Error::other("no free name for a temporary directory"))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for TempCopy {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a temporary copy could not be removed");
        }
    }
}

/// Copies the files and directories below a directory. Anything else is none of an engine's.
pub(super) fn copy_dir(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            make_private_dir(&target)?;
            copy_dir(&entry.path(), &target)?;
        } else if kind.is_file() {
            copy_file(&entry.path(), &target)?;
        }
    }
    Ok(())
}

/// Copies a file, for its owner alone, and makes the copy safe.
pub(super) fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let mut source = fs::File::open(from)?;
    let mut target = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(FILE_MODE)
        .open(to)?;
    io::copy(&mut source, &mut target)?;
    target.sync_all()
}
