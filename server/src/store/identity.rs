//! The file `format`: what a data directory is, in which layout, and which store it holds.
//!
//! One line of text, so that anybody can read it: `bellwire-store <version> <identity> [begun]`. The identity stands in the head
//! of every segment and snapshot as well; so files of two stores are never mixed.

use std::path::Path;

use data_encoding::HEXLOWER;

use super::log;
use super::log::disk::Disk;
use super::settings::OpenError;
use super::snapshot;
use crate::ports::Entropy;

/// The name of the file that says what the directory is.
pub(super) const FORMAT: &str = "format";
/// The first word of that file.
const NAME: &str = "bellwire-store";
/// The first word while a restore puts a store here.
const RESTORE: &str = "bellwire-restore";
/// What the file says meanwhile: no start takes it for a store.
pub(super) const UNDER_WAY: &str =
    "bellwire-restore under way: run the restore again, with --replace\n";
/// More of a format file is not read.
const LENGTH_MAX: u64 = 4096;
const FORMAT_TEMPORARY: &str = "format.tmp";
/// The version of the directory's layout.
pub(super) const FORMAT_VERSION: u32 = 1;

/// Said in the format file once a frame was safe: from then on a store without a log has lost it.
const BEGUN: &str = "begun";

/// Which store a directory holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) store: [u8; 16],
    /// A frame was safe once: a store without a log has lost it.
    pub(super) begun: bool,
}

/// Writes the format file, whole, by renaming it into place.
pub(super) fn write_identity(disk: &dyn Disk, store: [u8; 16], begun: bool) -> std::io::Result<()> {
    let begun = if begun { BEGUN } else { "" };
    let text = format!(
        "{NAME} {FORMAT_VERSION} {} {begun}\n",
        HEXLOWER.encode(&store)
    );
    let file = disk.create(FORMAT_TEMPORARY)?;
    file.write_at(text.as_bytes(), 0)?;
    file.sync()?;
    disk.rename(FORMAT_TEMPORARY, FORMAT)?;
    disk.sync_dir("")
}

/// Reads the words of a format file. Each version has an arm of its own: what an earlier one wrote stays readable.
fn parse(text: &str) -> Result<Identity, Unreadable> {
    let mut words = text.split_whitespace();
    match words.next() {
        Some(NAME) => {}
        Some(RESTORE) => return Err(Unreadable::UnderWay),
        Some(_) | None => {
            return Err(Unreadable::Garbage(
                "it does not begin with `bellwire-store`",
            ));
        }
    }
    match words.next().and_then(|word| word.parse::<u32>().ok()) {
        Some(FORMAT_VERSION) => {}
        Some(version) if version > FORMAT_VERSION => return Err(Unreadable::Newer(version)),
        Some(_) | None => return Err(Unreadable::Garbage("it names no version")),
    }
    let store = words
        .next()
        .and_then(|word| HEXLOWER.decode(word.as_bytes()).ok())
        .and_then(|id| id.try_into().ok())
        .ok_or(Unreadable::Garbage("it names no identity"))?;
    // Without the word the directory was made and nothing was promised yet; it is added with the first frame.
    let begun = words.next() == Some(BEGUN);
    Ok(Identity { store, begun })
}

enum Unreadable {
    Newer(u32),
    UnderWay,
    Garbage(&'static str),
}

/// Which store a directory holds; `None` if it has no format file. Changes nothing.
pub(super) fn read_identity(disk: &dyn Disk, dir: &Path) -> Result<Option<Identity>, OpenError> {
    let path = dir.join(FORMAT);
    let io = || OpenError::io("could not read", &path);
    let file = match disk.open(FORMAT) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io()(error)),
    };
    let length = file.length().map_err(io())?.min(LENGTH_MAX);
    let mut bytes = vec![0; length as usize];
    file.read_at(&mut bytes, 0).map_err(io())?;
    let parsed = match str::from_utf8(&bytes) {
        Ok(text) => parse(text),
        Err(_) => Err(Unreadable::Garbage("it is not text")),
    };
    match parsed {
        Ok(identity) => Ok(Some(identity)),
        Err(Unreadable::Newer(version)) => Err(OpenError::Newer {
            what: format!("the data directory has format {version}"),
        }),
        Err(Unreadable::UnderWay) => Err(OpenError::Restoring(dir.to_owned())),
        Err(Unreadable::Garbage(why)) => Err(OpenError::NotAStore { path, why }),
    }
}

/// Which store this is; a new one is given an identity.
pub(super) fn identity(
    disk: &dyn Disk,
    dir: &Path,
    entropy: &dyn Entropy,
) -> Result<Identity, OpenError> {
    if let Some(identity) = read_identity(disk, dir)? {
        return Ok(identity);
    }
    let path = dir.join(FORMAT);
    for (kept, why) in [
        (log::segment::DIR, "it is missing although there is a log"),
        (snapshot::DIR, "it is missing although there are snapshots"),
    ] {
        if disk.list(kept).is_ok_and(|files| !files.is_empty()) {
            return Err(OpenError::NotAStore { path, why });
        }
    }
    let mut store = [0; 16];
    entropy.fill(&mut store);
    write_identity(disk, store, false).map_err(OpenError::io("could not write", &path))?;
    Ok(Identity {
        store,
        begun: false,
    })
}
