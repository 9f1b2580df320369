//! The new store, made of the engine that holds what was saved.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::{fs, io};

use data_encoding::HEXLOWER;

use super::{Salvage, SalvageError, Salvaged};
use crate::ports::{Clock, Entropy};
use crate::store::backup::{BUILDING, REPLACED};
use crate::store::engine::Engine;
use crate::store::examine::{InspectError, Inspection, Progress};
use crate::store::identity::{FORMAT, write_identity};
use crate::store::log::disk::{Disk, RealDisk, make_private_dir};
use crate::store::set_aside::SetAside;
use crate::store::settings::StoreSettings;
use crate::store::{open, snapshot};

/// Files at the top of a data directory that belong to a process or to the old store's files, and are not copied. Nor is a store
/// that a restore is making.
const NOT_COPIED: [&str; 5] = ["lock", "server.lock", "listen.json", FORMAT, BUILDING];

pub(super) fn write_store(
    ask: &Salvage,
    into: &Path,
    engine: &dyn Engine,
    (clock, entropy): (Arc<dyn Clock>, Arc<dyn Entropy>),
    salvaged: &mut Salvaged,
    progress: Progress<'_>,
) -> Result<(), SalvageError> {
    let io = |what: &str| InspectError::io(format!("{what} {}", into.display()));
    let place = crate::store::place::prepare(into)?;
    let into = place.path.as_path();
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(into));
    let mut store = [0; 16];
    entropy.fill(&mut store);
    snapshot::take(
        engine,
        &snapshot::Surroundings {
            disk: &*disk,
            store,
            now_ms: clock.now().unix_ms,
            aside: &SetAside::new(Arc::clone(&disk), 0),
            breathe: &|| ControlFlow::Continue(()),
        },
    )
    .map_err(|error| InspectError::engine(format!("the snapshot cannot be written: {error}")))?;
    salvaged.copied =
        copy_others(&salvaged.inspection, into).map_err(io("other files cannot be copied to"))?;
    // Last: a directory without it is no store, so one that was left half made is never started from.
    write_identity(&*disk, store, true).map_err(io("the format file cannot be written in"))?;
    progress("starting from it once");
    let settings = StoreSettings {
        dir: into.to_owned(),
        ..ask.settings.clone()
    };
    let opened = open(&settings, clock, entropy)?;
    salvaged.run = u64::from(opened.report.run);
    opened.store.close();
    salvaged.store = Some(HEXLOWER.encode(&store));
    salvaged.into = Some(into.to_owned());
    Ok(())
}

/// Copies what is not the store's: keys and certificates, without which no device could come back.
fn copy_others(inspection: &Inspection, into: &Path) -> io::Result<Vec<String>> {
    let mut copied = Vec::new();
    for other in &inspection.other {
        let from = inspection.dir.join(&other.name);
        let skip = NOT_COPIED.contains(&other.name.as_str())
            || other.name.contains(".aside")
            || other.name.starts_with(REPLACED);
        if skip {
            continue;
        }
        let to = into.join(&other.name);
        let kind = fs::symlink_metadata(&from)?.file_type();
        if kind.is_dir() {
            make_private_dir(&to)?;
            crate::store::examine::engines::copy_dir(&from, &to)?;
        } else if kind.is_file() {
            crate::store::examine::engines::copy_file(&from, &to)?;
        } else {
            continue;
        }
        copied.push(other.name.clone());
    }
    fs::File::open(into)?.sync_all()?;
    Ok(copied)
}
