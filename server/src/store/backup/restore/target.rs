//! The data directory that is restored into, and the change of places at the end.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::{REPLACED, RestoreError, STAY, io_at};
use crate::store::log::disk::make_private_dir;
use crate::store::{FORMAT, UNDER_WAY};

/// Whether there is a store in the data directory.
pub(super) fn look_at_target(dir: &Path, replace: bool) -> Result<bool, RestoreError> {
    make_private_dir(dir).map_err(io_at(dir))?;
    let names = names_in(dir)?;
    let Some(first) = names.first() else {
        return Ok(false);
    };
    let known = ["format", "log", "snapshots"];
    if !names.iter().any(|name| known.contains(&name.as_str())) {
        return Err(RestoreError::Strange {
            dir: dir.to_owned(),
            what: first.clone(),
        });
    }
    if !replace {
        return Err(RestoreError::Occupied(dir.to_owned()));
    }
    Ok(true)
}

/// The names in a data directory that belong to its store.
fn names_in(dir: &Path) -> Result<Vec<String>, RestoreError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        let name = entry.map_err(io_at(dir))?.file_name();
        let name = name.to_string_lossy().into_owned();
        if !STAY.contains(&name.as_str()) && !name.starts_with(REPLACED) {
            names.push(name);
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// Stores that were replaced before, perhaps by a restore that was cut off.
pub(super) fn replaced_in(dir: &Path) -> Result<Vec<PathBuf>, RestoreError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(io_at(dir))? {
        let entry = entry.map_err(io_at(dir))?;
        if entry.file_name().to_string_lossy().starts_with(REPLACED) {
            found.push(entry.path());
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn sync_dir(path: &Path) -> Result<(), RestoreError> {
    File::open(path)
        .and_then(|dir| dir.sync_all())
        .map_err(io_at(path))
}

fn move_file(from: &Path, to: &Path) -> Result<(), RestoreError> {
    fs::rename(from, to).map_err(io_at(from))
}

/// The word that a restore is under way, in a file of the new store's directory.
const MARK: &str = "under-way";

/// Makes the place for the old store and writes the word that a restore is under way, as long as nothing has been moved: whatever
/// takes room on the disk comes here. Answers where the old store goes.
pub(super) fn make_ready(
    dir: &Path,
    building: &Path,
    occupied: bool,
    stamp: &str,
) -> Result<Option<PathBuf>, RestoreError> {
    let mark = building.join(MARK);
    fs::write(&mark, UNDER_WAY).map_err(io_at(&mark))?;
    File::open(&mark)
        .and_then(|file| file.sync_all())
        .map_err(io_at(&mark))?;
    if !occupied {
        return Ok(None);
    }
    let mut to = dir.join(format!("{REPLACED}{stamp}"));
    let mut again = 1;
    while to.exists() {
        again += 1;
        to = dir.join(format!("{REPLACED}{stamp}-{again}"));
    }
    make_private_dir(&to).map_err(io_at(&to))?;
    let format = dir.join(FORMAT);
    // Kept under its name before the word that a restore is under way takes its place.
    let kept = if format.exists() {
        fs::copy(&format, to.join(FORMAT))
            .and_then(|_| File::open(to.join(FORMAT))?.sync_all())
            .map_err(io_at(&format))
            .and_then(|()| sync_dir(&to))
    } else {
        Ok(())
    };
    match kept {
        Ok(()) => Ok(Some(to)),
        Err(error) => {
            // Nothing but a copy is in it.
            let _ = fs::remove_dir_all(&to);
            Err(error)
        }
    }
}

/// Puts the old store aside and the new one in its place.
pub(super) fn change_places(
    dir: &Path,
    building: &Path,
    aside: Option<&Path>,
) -> Result<(), RestoreError> {
    move_file(&building.join(MARK), &dir.join(FORMAT))?;
    sync_dir(dir)?;
    if let Some(aside) = aside {
        for name in names_in(dir)? {
            if name != FORMAT {
                move_file(&dir.join(&name), &aside.join(&name))?;
            }
        }
        sync_dir(aside)?;
        sync_dir(dir)?;
    }
    for entry in fs::read_dir(building).map_err(io_at(building))? {
        let name = entry.map_err(io_at(building))?.file_name();
        if name != FORMAT && name != "lock" {
            move_file(&building.join(&name), &dir.join(&name))?;
        }
    }
    sync_dir(dir)?;
    move_file(&building.join(FORMAT), &dir.join(FORMAT))?;
    sync_dir(dir)?;
    fs::remove_dir_all(building).map_err(io_at(building))?;
    sync_dir(dir)
}
