//! What was erased, in a file of its own beside the backups, so that restoring an old one does not bring it back.
//!
//! Every erasure is a key of the store, written in the frame that erases. This file is a copy of those keys that outlives the
//! store's disk. It is written within about a second, and compared with the store at each start; so a
//! machine that dies may leave out the last second, and the newest backup has those of its time.
//!
//! ```text
//! header   "BWERASED"  u32 version  u32 CRC-32C of the header without it  48 zeros
//! records  u32 CRC-32C of the rest  u8 kind  u8 length of the subject  2 zeros  u32 app  u64 at (Unix ms)  u64 until (Unix ms)
//!          36 bytes subject, zeros behind it
//! ```
//!
//! All records have the same length, so that a torn or rotten one spoils no other.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use crate::delivery::AppId;
use crate::ports::{Erased, Erasure, ReadError};
use crate::store::keys::{self, Key};
use crate::store::log::disk::{Disk, DiskFile};
use crate::store::read::Reader;
use crate::store::record;
use crate::store::write::Write;

/// The name of the file.
pub(in crate::store) const FILE: &str = "erasures";
const FRESH: &str = "erasures.new";
const MAGIC: [u8; 8] = *b"BWERASED";
const VERSION: u32 = 1;
/// Bytes of the header, and of each record.
const UNIT: usize = 64;
const SUBJECT: usize = 28;
/// Records read or written at a time.
const STEP: usize = 4_096;
/// A file is written anew at a start if it has at least so many records and most of them need not be kept any longer.
const WORTH: u64 = 1_024;
/// Most erasures that wait to be copied; beyond that the file is compared with the store again.
const WAITING_MAX: usize = 65_536;
/// Erasures of one page of the store.
const PAGE: usize = 1_024;

fn encode(erasure: &Erasure) -> [u8; UNIT] {
    let mut unit = [0; UNIT];
    let (kind, subject) = keys::erased(erasure.what);
    unit[4] = kind;
    // At most 32: `keys::erased`.
    unit[5] = subject.len() as u8;
    unit[8..12].copy_from_slice(&erasure.app.0.to_le_bytes());
    unit[12..20].copy_from_slice(&erasure.at_ms.to_le_bytes());
    unit[20..28].copy_from_slice(&erasure.until_ms.to_le_bytes());
    unit[SUBJECT..SUBJECT + subject.len()].copy_from_slice(&subject);
    let sum = crc32c::crc32c(&unit[4..]);
    unit[..4].copy_from_slice(&sum.to_le_bytes());
    unit
}

fn decode(unit: &[u8; UNIT]) -> Option<Erasure> {
    let [s0, s1, s2, s3, kind, length, ..] = *unit;
    if u32::from_le_bytes([s0, s1, s2, s3]) != crc32c::crc32c(&unit[4..]) {
        return None;
    }
    let subject = unit.get(SUBJECT..SUBJECT + usize::from(length))?;
    let number = |at: usize| {
        let mut number = [0; 8];
        number.copy_from_slice(&unit[at..at + 8]);
        u64::from_le_bytes(number)
    };
    Some(Erasure {
        // The upper half belongs to the time behind it.
        app: AppId(number(8) as u32),
        what: keys::parse_erased(kind, subject)?,
        at_ms: number(12),
        until_ms: number(20),
    })
}

fn header() -> [u8; UNIT] {
    let mut header = [0; UNIT];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    let sum = super::header_sum(&header);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
    header
}

/// A file of these erasures, for golden files.
#[cfg(test)]
pub(in crate::store) fn file_of(erasures: &[Erasure]) -> Vec<u8> {
    let mut file = header().to_vec();
    file.extend(erasures.iter().flat_map(encode));
    file
}

/// Whether bytes begin like a file of erasures.
pub(in crate::store) fn is_one(head: &[u8]) -> bool {
    head.starts_with(&MAGIC)
}

/// What an entry of the store erases; `None`: it is not one that can be read.
pub(in crate::store) fn of_entry(key: &[u8], value: &[u8]) -> Option<Erasure> {
    let (until_ms, what) = keys::parse_erasure(key)?;
    record::erasure(key, until_ms, what, value).ok()
}

/// Of two erasures of one thing, what both say: the later one counts, because what was accepted between them went with it.
pub(in crate::store) fn merged(one: Erasure, other: Erasure) -> Erasure {
    Erasure {
        at_ms: one.at_ms.max(other.at_ms),
        until_ms: one.until_ms.max(other.until_ms),
        ..one
    }
}

/// What a file of erasures holds.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::store) struct Held {
    pub(in crate::store) erasures: u64,
    /// Records that cannot be read.
    pub(in crate::store) damaged: u64,
}

/// Reads a file of erasures; what cannot be read in it is passed over and counted.
pub(in crate::store) fn read(
    file: &dyn DiskFile,
    visit: &mut dyn FnMut(Erasure),
) -> io::Result<Held> {
    let invalid = |why: String| io::Error::new(io::ErrorKind::InvalidData, why);
    let length = file.length()?;
    let mut head = [0; UNIT];
    if length < UNIT as u64 {
        return Err(invalid("it is no file of erasures".to_owned()));
    }
    file.read_at(&mut head, 0)?;
    if !is_one(&head) {
        return Err(invalid("it is no file of erasures".to_owned()));
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    if head != header() && version > VERSION {
        return Err(invalid(format!(
            "it has format {version}, newer than this program"
        )));
    }
    let mut held = Held::default();
    let mut at = UNIT as u64;
    while at < length {
        let step = ((length - at) as usize).min(STEP * UNIT);
        let mut piece = vec![0; step];
        file.read_at(&mut piece, at)?;
        at += step as u64;
        let (units, rest) = piece.as_chunks::<UNIT>();
        for unit in units {
            match decode(unit) {
                Some(erasure) => {
                    held.erasures += 1;
                    visit(erasure);
                }
                None => held.damaged += 1,
            }
        }
        held.damaged += u64::from(!rest.is_empty());
    }
    Ok(held)
}

/// Erasures that became safe and are not in the file yet.
#[derive(Default)]
pub(in crate::store) struct Fresh(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    list: Vec<Erasure>,
    /// Some did not fit: the file must be compared with the store.
    lost: bool,
}

impl Fresh {
    fn lock(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what a frame that has just become safe erased.
    pub(in crate::store) fn note(&self, writes: &[Write]) {
        for write in writes {
            let Write::Put { key, value } = write else {
                continue;
            };
            if key.first() != Some(&keys::ERASURES) {
                continue;
            }
            let mut waiting = self.lock();
            match of_entry(key, value) {
                Some(erasure) if waiting.list.len() < WAITING_MAX => waiting.list.push(erasure),
                Some(_) | None => waiting.lost = true,
            }
        }
    }

    fn take(&self) -> (Vec<Erasure>, bool) {
        let mut waiting = self.lock();
        (
            std::mem::take(&mut waiting.list),
            std::mem::take(&mut waiting.lost),
        )
    }

    fn lose(&self) {
        self.lock().lost = true;
    }
}

/// Why the file is not up to date.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum MirrorError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Store(#[from] ReadError),
}

/// Keeps the file up to date.
pub(in crate::store) struct Mirror {
    disk: Arc<dyn Disk>,
    fresh: Arc<Fresh>,
    open: Option<Open>,
}

struct Open {
    file: Box<dyn DiskFile>,
    end: u64,
}

impl Mirror {
    /// A mirror in the directory of the backups.
    pub(in crate::store) fn new(disk: Arc<dyn Disk>, fresh: Arc<Fresh>) -> Mirror {
        Mirror {
            disk,
            fresh,
            open: None,
        }
    }

    /// Brings the file up to date. After an error the next call begins anew.
    pub(in crate::store) fn turn(
        &mut self,
        reader: &Reader,
        now_ms: u64,
    ) -> Result<(), MirrorError> {
        let (list, lost) = self.fresh.take();
        if list.is_empty() && !lost && self.open.is_some() {
            return Ok(());
        }
        let turned = match self.open.as_mut() {
            Some(open) if !lost => open.append(&list).map_err(MirrorError::Io),
            Some(_) | None => self
                .compare(reader, now_ms)
                .map(|open| self.open = Some(open)),
        };
        if turned.is_err() {
            self.open = None;
            self.fresh.lose();
        }
        turned
    }

    /// Opens the file, made if there is none, and adds what it lacks.
    fn compare(&self, reader: &Reader, now_ms: u64) -> Result<Open, MirrorError> {
        let mut known: HashMap<Erased, Erasure> = HashMap::new();
        let learn = |known: &mut HashMap<Erased, Erasure>, erasure: Erasure| {
            let before = known.get(&erasure.what).copied();
            let after = before.map_or(erasure, |before| merged(before, erasure));
            known.insert(erasure.what, after);
            before != Some(after)
        };
        let mut open = match self.disk.open(FILE) {
            Ok(file) => {
                let mut old = 0;
                let held = read(&*file, &mut |erasure| {
                    old += u64::from(erasure.until_ms < now_ms);
                    learn(&mut known, erasure);
                })?;
                // A file with a damaged record is left as it is: nothing unreadable is deleted.
                if held.damaged == 0 && held.erasures >= WORTH && old > held.erasures / 2 {
                    self.anew(&*file, now_ms)?
                } else {
                    // A torn record is passed over.
                    let end = file.length()?.next_multiple_of(UNIT as u64);
                    Open { file, end }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let open = Open::create(&*self.disk)?;
                open.publish(&*self.disk)?
            }
            Err(error) => return Err(error.into()),
        };
        let mut after: Option<Key> = None;
        loop {
            let page = reader.erasures(after.as_ref(), PAGE)?;
            let missing: Vec<Erasure> = page
                .items
                .into_iter()
                .filter(|erasure| learn(&mut known, *erasure))
                .collect();
            open.append(&missing)?;
            after = page.next;
            if after.is_none() {
                return Ok(open);
            }
        }
    }

    /// The file without what need not be kept any longer.
    fn anew(&self, old: &dyn DiskFile, now_ms: u64) -> io::Result<Open> {
        let mut open = Open::create(&*self.disk)?;
        let mut kept = Vec::new();
        read(old, &mut |erasure| {
            if erasure.until_ms >= now_ms {
                kept.push(erasure);
            }
        })?;
        for some in kept.chunks(STEP) {
            open.append(some)?;
        }
        open.publish(&*self.disk)
    }
}

impl Open {
    /// A new file under its temporary name.
    fn create(disk: &dyn Disk) -> io::Result<Open> {
        let file = disk.create(FRESH)?;
        file.write_at(&header(), 0)?;
        Ok(Open {
            file,
            end: UNIT as u64,
        })
    }

    fn publish(self, disk: &dyn Disk) -> io::Result<Open> {
        self.file.sync()?;
        disk.rename(FRESH, FILE)?;
        disk.sync_dir("")?;
        Ok(self)
    }

    fn append(&mut self, erasures: &[Erasure]) -> io::Result<()> {
        for some in erasures.chunks(STEP) {
            let bytes: Vec<u8> = some.iter().flat_map(encode).collect();
            self.file.write_at(&bytes, self.end)?;
            self.file.sync()?;
            self.end += bytes.len() as u64;
        }
        Ok(())
    }
}
