//! The window of ids: what this device already answered, so that a repeat never reaches the app twice.
//!
//! The server repeats whatever it holds no verdict for. The order that makes "at least once" look like "once" to the app is:
//! callback, then this window on disk, then the acknowledgement. Two parts keep it:
//!
//! - [`Memory`] knows the last [`WINDOW_IDS`] ids with their verdicts, and which of them the server surely has.
//! - [`Journal`] writes them: an append-only file of checksummed frames, one frame and one sync for all notifications that
//!   arrived together.
//!
//! The file begins with seven letters and a format number. A frame is its length (u32), the CRC-32C of length and body (u32),
//! and the body; a body is a row of records (see `Record`). Integers are little-endian. A frame cut short at the end is what
//! a crash leaves, and is dropped: its notifications were never acknowledged. A broken frame with good ones behind it is not,
//! so the file is set aside under a dated name, and what can still be read goes into a new one.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bellwire_protocol::limits::{REASON_BYTES_MAX, SEEN_MAX};
use bellwire_protocol::{Id, Seen, Verdict};

use super::files::{free_name, private, replace, sync_directory_of};
use super::{Lock, StateError, WindowState};

/// How many ids are remembered. The server's mailbox holds 1,000 notifications by default, and 256 more may be in flight:
/// everything that it could still repeat.
pub const WINDOW_IDS: usize = 1_256;

/// Records in the file before it is written anew: rarely enough to cost nothing, often enough to stay small.
const RECORDS_MAX: usize = 4 * WINDOW_IDS;

/// Greatest frame body in bytes: every remembered id with the longest reason.
const BODY_MAX_BYTES: usize = WINDOW_IDS * (1 + 16 + 2 + REASON_BYTES_MAX) + 1;

/// Greatest file that is read, in bytes. Appending stops long before it.
const FILE_MAX_BYTES: u64 = 4 * 1024 * 1024;

/// The file is written anew when it is larger than this, in bytes.
const REWRITE_BYTES: u64 = 1024 * 1024;

const MAGIC: &[u8; 7] = b"BELLWND";
const FORMAT: u8 = 1;
const HEADER_BYTES: usize = MAGIC.len() + 1;
const FRAME_HEAD_BYTES: usize = 8;

const _: () = {
    // A rewritten file and the largest batch after it stay readable.
    assert!(REWRITE_BYTES + 2 * (BODY_MAX_BYTES + FRAME_HEAD_BYTES) as u64 <= FILE_MAX_BYTES);
    assert!(SEEN_MAX <= WINDOW_IDS);
};

/// The verdict that was given, with the reason that a repeat of a decline needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// The app has it.
    Acknowledged,
    /// It could not be used, and why.
    Declined(Box<str>),
}

impl Given {
    /// A decline with its reason cut to what a frame may carry.
    pub fn declined(reason: &str) -> Self {
        Self::Declined(reason[..reason.floor_char_boundary(REASON_BYTES_MAX)].into())
    }

    fn verdict(&self) -> Verdict {
        match self {
            Self::Acknowledged => Verdict::Acknowledged,
            Self::Declined(_) => Verdict::Declined,
        }
    }
}

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// This verdict was given.
    Given(Id, Given),
    /// The server surely has every verdict before this record.
    Confirmed,
}

/// The window in memory: pure, bounded by [`WINDOW_IDS`].
#[derive(Debug, Default)]
pub struct Memory {
    order: VecDeque<Id>,
    entries: HashMap<Id, Entry>,
    unsaved: Vec<Id>,
    /// Numbers verdicts in the order in which they were given.
    next: u64,
    /// The server surely has every verdict with a lower number.
    confirmed: u64,
}

#[derive(Debug)]
struct Entry {
    given: Given,
    number: u64,
    saved: bool,
}

impl Memory {
    /// What the file told, oldest first.
    pub fn from_records(records: Vec<Record>) -> Self {
        let mut memory = Self::default();
        for record in records {
            match record {
                Record::Given(id, given) => memory.remember(id, given),
                Record::Confirmed => memory.confirmed = memory.next,
            }
        }
        memory.saved();
        memory
    }

    /// The verdict that was given for `id`, if it is remembered.
    pub fn given(&self, id: &Id) -> Option<&Given> {
        self.entries.get(id).map(|entry| &entry.given)
    }

    /// How many ids are remembered.
    pub(crate) fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether `id` was acknowledged and the disk knows it: then the server may be told at once.
    pub fn is_acknowledged_safely(&self, id: &Id) -> bool {
        self.entries
            .get(id)
            .is_some_and(|entry| entry.saved && entry.given == Given::Acknowledged)
    }

    /// Remembers a verdict; it still has to be saved. The first one for an id stays.
    pub fn remember(&mut self, id: Id, given: Given) {
        if self.entries.contains_key(&id) {
            return;
        }
        self.entries.insert(
            id,
            Entry {
                given,
                number: self.next,
                saved: false,
            },
        );
        self.order.push_back(id);
        self.unsaved.push(id);
        self.next += 1;
        if self.order.len() > WINDOW_IDS {
            self.order
                .pop_front()
                .and_then(|oldest| self.entries.remove(&oldest));
        }
    }

    /// The records that are not on disk yet, oldest first.
    pub fn unsaved(&self) -> Vec<Record> {
        self.unsaved
            .iter()
            .filter_map(|id| self.record(id))
            .collect()
    }

    /// Everything that a new file must hold, oldest first.
    pub fn all(&self) -> Vec<Record> {
        let mut records = Vec::with_capacity(self.order.len() + 1);
        let mut marked = self.confirmed == 0;
        for id in &self.order {
            let Some(entry) = self.entries.get(id) else {
                continue;
            };
            if !marked && entry.number >= self.confirmed {
                records.push(Record::Confirmed);
                marked = true;
            }
            records.push(Record::Given(*id, entry.given.clone()));
        }
        if !marked {
            records.push(Record::Confirmed);
        }
        records
    }

    fn record(&self, id: &Id) -> Option<Record> {
        self.entries
            .get(id)
            .map(|entry| Record::Given(*id, entry.given.clone()))
    }

    /// Everything remembered so far is on disk.
    pub fn saved(&mut self) {
        for id in self.unsaved.drain(..) {
            if let Some(entry) = self.entries.get_mut(&id) {
                entry.saved = true;
            }
        }
    }

    /// A mark behind the newest verdict, for [`confirm`](Self::confirm).
    pub fn mark(&self) -> u64 {
        self.next
    }

    /// The server surely has every verdict before `mark`.
    pub fn confirm(&mut self, mark: u64) {
        self.confirmed = self.confirmed.max(mark);
    }

    /// For `hello`: the newest verdicts that are on disk and may not have reached the server, oldest first.
    pub fn seen(&self) -> Vec<Seen> {
        let newest = self
            .order
            .iter()
            .rev()
            .filter_map(|id| Some((id, self.entries.get(id)?)));
        let mut seen: Vec<Seen> = newest
            .take_while(|(_, entry)| entry.number >= self.confirmed)
            .filter(|(_, entry)| entry.saved)
            .take(SEEN_MAX)
            .map(|(id, entry)| Seen {
                id: *id,
                verdict: entry.given.verdict(),
            })
            .collect();
        seen.reverse();
        seen
    }
}

/// How opening the file went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Opened {
    /// There was none.
    Fresh,
    /// It was in order.
    Intact,
    /// A crash had cut the end; what was cut had never been acknowledged.
    TornTail {
        /// How much was dropped.
        bytes: u64,
    },
    /// It was damaged, and is kept under another name.
    SetAside {
        /// The other name.
        path: PathBuf,
        /// How many verdicts could still be read.
        salvaged: usize,
    },
}

/// A window on disk, looked at from outside: nothing is changed.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) state: WindowState,
    pub(super) memory: Memory,
    pub(super) bytes: u64,
}

impl Look {
    pub(super) fn at(directory: &Path) -> Result<Self, StateError> {
        let path = directory.join("window");
        let mut bytes = Vec::new();
        let read = File::open(&path)
            .and_then(|file| file.take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes));
        let looked = |state, memory| Self {
            state,
            memory,
            bytes: bytes.len() as u64,
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(looked(WindowState::Absent, Memory::default()));
            }
            read => read.map_err(StateError::io("read", &path))?,
        };
        if newer_format(&bytes).is_some() {
            return Ok(looked(WindowState::Newer, Memory::default()));
        }
        if bytes.len() < HEADER_BYTES && header().starts_with(&bytes) {
            return Ok(looked(WindowState::Torn, Memory::default()));
        }
        let parsed = parse(&bytes);
        let state = match parsed.damage {
            None => WindowState::Intact,
            Some(Damage::Torn) => WindowState::Torn,
            Some(Damage::Corrupt) => WindowState::Damaged,
        };
        Ok(looked(state, Memory::from_records(parsed.records)))
    }
}

/// The format of a file that this version cannot read.
fn newer_format(bytes: &[u8]) -> Option<u8> {
    let (magic, rest) = bytes.split_at_checked(MAGIC.len())?;
    rest.first()
        .copied()
        .filter(|found| magic == MAGIC && *found > FORMAT)
}

/// The window on disk. Its calls block; the owner makes them on a thread that may.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    records: usize,
    bytes: u64,
    sync: bool,
    /// A write or sync failed: nobody knows what the file holds, so the next save writes a new one.
    broken: bool,
    /// Held as long as anybody may still write.
    lock: Option<Lock>,
    /// The directory was given back: nothing is written any more.
    released: bool,
}

impl Journal {
    /// Opens the window of `directory`, or makes it. `now_ms` (wall time) names a file that must be set aside.
    pub(crate) fn open(
        directory: &Path,
        sync: bool,
        now_ms: u64,
    ) -> Result<(Self, Memory, Opened), StateError> {
        let path = directory.join("window");
        let file = private()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .open(&path);
        let file = file.map_err(StateError::io("open", &path))?;
        let mut bytes = Vec::new();
        let read = (&file).take(FILE_MAX_BYTES + 1).read_to_end(&mut bytes);
        read.map_err(StateError::io("read", &path))?;
        let mut journal = Self {
            path: path.clone(),
            file,
            records: 0,
            bytes: 0,
            sync,
            broken: false,
            lock: None,
            released: false,
        };

        // An empty or cut header: the first start was interrupted before anything was promised.
        if bytes.len() < HEADER_BYTES && header().starts_with(&bytes) {
            let opened = match bytes.len() {
                0 => Opened::Fresh,
                cut => Opened::TornTail { bytes: cut as u64 },
            };
            journal
                .rewrite(&[])
                .map_err(StateError::io("write", &path))?;
            return Ok((journal, Memory::default(), opened));
        }
        if let Some(found) = newer_format(&bytes) {
            return Err(StateError::NewerFormat {
                path,
                found,
                known: FORMAT,
            });
        }
        let parsed = parse(&bytes);
        match parsed.damage {
            None | Some(Damage::Torn) => {
                let torn = bytes.len() as u64 - parsed.valid_bytes;
                let opened = match torn {
                    0 => Opened::Intact,
                    bytes => Opened::TornTail { bytes },
                };
                journal
                    .cut(parsed.valid_bytes)
                    .map_err(StateError::io("cut", &path))?;
                journal.records = parsed.records.len();
                Ok((journal, Memory::from_records(parsed.records), opened))
            }
            Some(Damage::Corrupt) => {
                let aside = keep_damaged(&path, now_ms)?;
                let memory = Memory::from_records(parsed.records);
                journal
                    .rewrite(&memory.all())
                    .map_err(StateError::io("write", &path))?;
                let salvaged = memory.order.len();
                Ok((
                    journal,
                    memory,
                    Opened::SetAside {
                        path: aside,
                        salvaged,
                    },
                ))
            }
        }
    }

    /// Keeps the directory's lock until [`release`](Self::release), or for as long as the journal lives.
    pub(crate) fn hold(&mut self, lock: Lock) {
        self.lock = Some(lock);
    }

    /// Gives the directory back, with everything on disk that was written. A write that comes later, from a thread that was
    /// late, fails.
    pub(crate) fn release(&mut self) {
        self.released = true;
        if !self.sync
            && let Err(error) = self.file.sync_all()
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot sync the window of ids at the end");
        }
        self.lock = None;
    }

    /// Whether the next save needs everything rather than what is new.
    pub(crate) fn wants_rewrite(&self, new: usize) -> bool {
        self.broken || self.records + new > RECORDS_MAX || self.bytes > REWRITE_BYTES
    }

    /// Appends records as one frame and waits until it is safe. After an error the next save must be a [`rewrite`](Self::rewrite).
    pub(crate) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        self.check_held()?;
        if self.broken {
            return Err(io::Error::other(
                "an earlier write failed; the file must be written anew",
            ));
        }
        let frame = frame(records);
        self.broken = true;
        self.file.write_all(&frame)?;
        if self.sync {
            self.file.sync_data()?;
        }
        self.broken = false;
        self.records += records.len();
        self.bytes += frame.len() as u64;
        Ok(())
    }

    /// Replaces the file by one that holds exactly `records`, and waits until it is safe.
    pub(crate) fn rewrite(&mut self, records: &[Record]) -> io::Result<()> {
        self.check_held()?;
        let mut bytes = header().to_vec();
        if !records.is_empty() {
            bytes.extend_from_slice(&frame(records));
        }
        self.broken = true;
        self.file = replace(&self.path, &bytes, self.sync)?;
        self.broken = false;
        self.records = records.len();
        self.bytes = bytes.len() as u64;
        Ok(())
    }

    fn check_held(&self) -> io::Result<()> {
        match self.released {
            true => Err(io::Error::other("the directory was given back")),
            false => Ok(()),
        }
    }

    /// As after a failed write.
    #[cfg(test)]
    pub(crate) fn distrust(&mut self) {
        self.broken = true;
    }

    /// Makes `valid` bytes the end of the file.
    fn cut(&mut self, valid: u64) -> io::Result<()> {
        if self.file.metadata()?.len() != valid {
            self.file.set_len(valid)?;
            if self.sync {
                self.file.sync_data()?;
            }
        }
        self.file.seek(SeekFrom::Start(valid))?;
        self.bytes = valid;
        Ok(())
    }
}

/// Gives a damaged file a second name that nothing has yet; the caller then replaces the first one, so that there is a
/// window at every moment. File systems without links get a rename, which a crash may follow.
fn keep_damaged(path: &Path, now_ms: u64) -> Result<PathBuf, StateError> {
    let name = free_name(path, "corrupt", now_ms);
    let linked = std::fs::hard_link(path, &name).or_else(|_| std::fs::rename(path, &name));
    linked.map_err(StateError::io("set aside", path))?;
    sync_directory_of(path).map_err(StateError::io("set aside", path))?;
    Ok(name)
}

fn header() -> [u8; HEADER_BYTES] {
    let mut header = [FORMAT; HEADER_BYTES];
    header[..MAGIC.len()].copy_from_slice(MAGIC);
    header
}

const KIND_ACKNOWLEDGED: u8 = 1;
const KIND_DECLINED: u8 = 2;
const KIND_CONFIRMED: u8 = 3;

fn frame(records: &[Record]) -> Vec<u8> {
    let mut frame = vec![0; FRAME_HEAD_BYTES];
    for record in records {
        match record {
            Record::Given(id, Given::Acknowledged) => {
                frame.push(KIND_ACKNOWLEDGED);
                frame.extend_from_slice(id.as_bytes());
            }
            Record::Given(id, Given::Declined(reason)) => {
                frame.push(KIND_DECLINED);
                frame.extend_from_slice(id.as_bytes());
                // `Given::declined` cuts reasons far below 2^16 bytes.
                frame.extend_from_slice(&(reason.len() as u16).to_le_bytes());
                frame.extend_from_slice(reason.as_bytes());
            }
            Record::Confirmed => frame.push(KIND_CONFIRMED),
        }
    }
    // A body has at most BODY_MAX_BYTES.
    let length = ((frame.len() - FRAME_HEAD_BYTES) as u32).to_le_bytes();
    frame[..4].copy_from_slice(&length);
    let checksum = checksum(length, &frame[FRAME_HEAD_BYTES..]).to_le_bytes();
    frame[4..FRAME_HEAD_BYTES].copy_from_slice(&checksum);
    frame
}

fn checksum(length: [u8; 4], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&length), body)
}

#[derive(Debug, PartialEq, Eq)]
struct Parsed {
    records: Vec<Record>,
    /// Where the last good frame ends.
    valid_bytes: u64,
    damage: Option<Damage>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Damage {
    /// Nothing good stands behind the bad place: a crash cut the end.
    Torn,
    /// The file is not ours, too large, or broken in the middle.
    Corrupt,
}

/// Reads a whole file. Takes any bytes.
fn parse(bytes: &[u8]) -> Parsed {
    let mut parsed = Parsed {
        records: Vec::new(),
        valid_bytes: 0,
        damage: None,
    };
    if bytes.len() as u64 > FILE_MAX_BYTES || bytes.get(..HEADER_BYTES) != Some(&header()) {
        parsed.damage = Some(Damage::Corrupt);
    }
    let mut at = HEADER_BYTES.min(bytes.len());
    parsed.valid_bytes = at as u64;
    while at < bytes.len() {
        if let Some((records, length)) = read_frame(&bytes[at..]) {
            parsed.records.extend(records);
            at += length;
            parsed.valid_bytes = at as u64;
            continue;
        }
        match (at + 1..bytes.len()).find(|&later| read_frame(&bytes[later..]).is_some()) {
            Some(later) => {
                parsed.damage = Some(Damage::Corrupt);
                at = later;
            }
            None => {
                parsed.damage = parsed.damage.or(Some(Damage::Torn));
                break;
            }
        }
    }
    parsed
}

/// One good frame at the beginning of `bytes`: its records, and its length with the head.
fn read_frame(bytes: &[u8]) -> Option<(Vec<Record>, usize)> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<4>()?;
    let body_bytes = u32::from_le_bytes(*length) as usize;
    // A length of 0 is never written, so that a run of zero bytes is not a row of frames.
    if body_bytes == 0 || body_bytes > BODY_MAX_BYTES {
        return None;
    }
    let mut body = rest.get(..body_bytes)?;
    if checksum(*length, body) != u32::from_le_bytes(*sum) {
        return None;
    }
    let mut records = Vec::new();
    while !body.is_empty() {
        let (record, rest) = read_record(body)?;
        records.push(record);
        body = rest;
    }
    Some((records, FRAME_HEAD_BYTES + body_bytes))
}

fn read_record(bytes: &[u8]) -> Option<(Record, &[u8])> {
    let (&kind, rest) = bytes.split_first()?;
    match kind {
        KIND_ACKNOWLEDGED => {
            let (id, rest) = rest.split_first_chunk::<16>()?;
            Some((
                Record::Given(Id::from_bytes(*id), Given::Acknowledged),
                rest,
            ))
        }
        KIND_DECLINED => {
            let (id, rest) = rest.split_first_chunk::<16>()?;
            let (length, rest) = rest.split_first_chunk::<2>()?;
            let (reason, rest) = rest.split_at_checked(u16::from_le_bytes(*length).into())?;
            let given = Given::declined(std::str::from_utf8(reason).ok()?);
            Some((Record::Given(Id::from_bytes(*id), given), rest))
        }
        KIND_CONFIRMED => Some((Record::Confirmed, rest)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn id(number: u64) -> Id {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_be_bytes());
        Id::from_bytes(bytes)
    }

    fn open(directory: &Path) -> (Journal, Memory, Opened) {
        Journal::open(directory, true, 7).unwrap()
    }

    /// What the client does after a batch of callbacks.
    fn save(journal: &mut Journal, memory: &mut Memory) {
        let unsaved = memory.unsaved();
        match journal.wants_rewrite(unsaved.len()) {
            true => journal.rewrite(&memory.all()).unwrap(),
            false => journal.append(&unsaved).unwrap(),
        }
        memory.saved();
    }

    #[test]
    fn a_verdict_survives_a_restart_with_its_reason() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, opened) = open(directory.path());
        assert_eq!(opened, Opened::Fresh);
        memory.remember(id(1), Given::Acknowledged);
        memory.remember(id(2), Given::declined("no such account"));
        save(&mut journal, &mut memory);
        drop(journal);
        let (_, memory, opened) = open(directory.path());
        assert_eq!(opened, Opened::Intact);
        assert_eq!(memory.given(&id(1)), Some(&Given::Acknowledged));
        assert_eq!(
            memory.given(&id(2)),
            Some(&Given::Declined("no such account".into()))
        );
        assert_eq!(memory.given(&id(3)), None);
    }

    #[test]
    fn the_first_verdict_for_an_id_stays() {
        let mut memory = Memory::default();
        memory.remember(id(1), Given::Acknowledged);
        memory.remember(id(1), Given::declined("changed my mind"));
        assert_eq!(memory.given(&id(1)), Some(&Given::Acknowledged));
        assert_eq!(memory.unsaved().len(), 1);
    }

    #[test]
    fn a_file_cut_at_any_byte_keeps_every_frame_before_the_cut() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, _) = open(directory.path());
        let mut ends = vec![(journal.bytes as usize, 0)];
        for batch in 0..4 {
            for number in 0..=batch {
                memory.remember(id(batch * 10 + number), Given::Acknowledged);
            }
            memory.remember(id(batch * 10 + 9), Given::declined("torn"));
            save(&mut journal, &mut memory);
            ends.push((journal.bytes as usize, memory.order.len()));
        }
        let whole = std::fs::read(directory.path().join("window")).unwrap();
        for cut in 0..=whole.len() {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join("window"), &whole[..cut]).unwrap();
            let (mut journal, mut memory, opened) = open(directory.path());
            let safe = ends
                .iter()
                .rev()
                .find(|(end, _)| *end <= cut)
                .map_or(0, |(_, ids)| *ids);
            assert_eq!(memory.order.len(), safe, "cut at {cut}");
            let clean = cut == 0 || ends.iter().any(|(end, _)| *end == cut);
            assert_eq!(
                matches!(opened, Opened::TornTail { .. }),
                !clean,
                "cut at {cut}: {opened:?}"
            );
            // What is appended behind a cut is found again.
            memory.remember(id(99), Given::Acknowledged);
            save(&mut journal, &mut memory);
            let (_, memory, opened) = open(directory.path());
            assert_eq!(
                (memory.order.len(), opened),
                (safe + 1, Opened::Intact),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn an_end_of_zeros_or_rubbish_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, _) = open(directory.path());
        memory.remember(id(1), Given::Acknowledged);
        save(&mut journal, &mut memory);
        let path = directory.path().join("window");
        let whole = std::fs::read(&path).unwrap();
        for tail in [vec![0; 4_096], vec![0xff; 100], b"\x11\0\0\0rubb".repeat(9)] {
            std::fs::write(&path, [whole.as_slice(), &tail].concat()).unwrap();
            let (_, memory, opened) = open(directory.path());
            assert_eq!(
                opened,
                Opened::TornTail {
                    bytes: tail.len() as u64
                }
            );
            assert_eq!(memory.order.len(), 1);
        }
    }

    #[test]
    fn a_file_broken_in_the_middle_is_set_aside_and_the_rest_is_salvaged() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, _) = open(directory.path());
        for number in 0..5 {
            memory.remember(id(number), Given::Acknowledged);
            save(&mut journal, &mut memory);
        }
        let path = directory.path().join("window");
        let whole = std::fs::read(&path).unwrap();
        let frame = FRAME_HEAD_BYTES + 17;
        for bit in 0..frame * 8 {
            let mut broken = whole.clone();
            broken[HEADER_BYTES + frame + bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &broken).unwrap();
            let (_, memory, opened) = open(directory.path());
            let Opened::SetAside {
                path: aside,
                salvaged,
            } = opened
            else {
                panic!("bit {bit}: {opened:?}")
            };
            assert_eq!(salvaged, 4);
            assert_eq!(memory.given(&id(1)), None);
            assert_eq!(memory.given(&id(4)), Some(&Given::Acknowledged));
            assert_eq!(
                std::fs::read(&aside).unwrap(),
                broken,
                "what is set aside is kept as it was"
            );
            assert_eq!(open(directory.path()).2, Opened::Intact);
            std::fs::remove_file(aside).unwrap();
        }
    }

    #[test]
    fn another_programs_file_is_set_aside_and_a_newer_format_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("window");
        std::fs::write(&path, b"a shopping list, not a window").unwrap();
        let (_, memory, opened) = open(directory.path());
        assert!(
            matches!(opened, Opened::SetAside { salvaged: 0, .. }),
            "{opened:?}"
        );
        assert!(memory.order.is_empty());
        std::fs::write(&path, b"BELLWND\x02whatever comes next").unwrap();
        let refused = Journal::open(directory.path(), true, 7);
        assert!(matches!(
            refused,
            Err(StateError::NewerFormat {
                found: 2,
                known: 1,
                ..
            })
        ));
    }

    #[test]
    fn the_window_holds_1256_ids_and_its_file_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, _) = open_unsynced(directory.path());
        for number in 0..20_000 {
            memory.remember(id(number), Given::declined(&"r".repeat(300)));
            if number % 16 == 0 {
                save(&mut journal, &mut memory);
            }
        }
        save(&mut journal, &mut memory);
        assert_eq!(memory.order.len(), WINDOW_IDS);
        assert_eq!(memory.entries.len(), WINDOW_IDS);
        let size = std::fs::metadata(directory.path().join("window"))
            .unwrap()
            .len();
        assert!(size <= FILE_MAX_BYTES, "{size} bytes");
        let (_, memory, opened) = open(directory.path());
        assert_eq!(opened, Opened::Intact);
        assert_eq!(memory.order.len(), WINDOW_IDS);
        assert!(memory.given(&id(20_000 - 1_256)).is_some());
        assert!(memory.given(&id(20_000 - 1_257)).is_none());
    }

    fn open_unsynced(directory: &Path) -> (Journal, Memory, Opened) {
        Journal::open(directory, false, 7).unwrap()
    }

    #[test]
    fn seen_names_the_newest_saved_verdicts_that_the_server_may_lack() {
        let mut memory = Memory::default();
        for number in 0..10 {
            memory.remember(id(number), Given::Acknowledged);
        }
        assert_eq!(memory.seen(), [], "nothing is on disk yet");
        memory.saved();
        let mark = memory.mark();
        memory.remember(id(10), Given::declined("no"));
        memory.saved();
        assert_eq!(memory.seen().len(), 11);
        memory.confirm(mark);
        assert_eq!(
            memory.seen(),
            [Seen {
                id: id(10),
                verdict: Verdict::Declined
            }]
        );
        for number in 11..500 {
            memory.remember(id(number), Given::Acknowledged);
        }
        memory.saved();
        let seen = memory.seen();
        assert_eq!(seen.len(), SEEN_MAX);
        assert_eq!(
            (seen[0].id, seen[SEEN_MAX - 1].id),
            (id(500 - 128), id(499))
        );
        memory.confirm(memory.mark());
        assert_eq!(memory.seen(), []);
    }

    #[test]
    fn what_the_server_surely_has_is_still_known_after_a_restart_and_a_rewrite() {
        let directory = tempfile::tempdir().unwrap();
        let (mut journal, mut memory, _) = open(directory.path());
        memory.remember(id(1), Given::Acknowledged);
        save(&mut journal, &mut memory);
        memory.confirm(memory.mark());
        journal.append(&[Record::Confirmed]).unwrap();
        memory.remember(id(2), Given::Acknowledged);
        save(&mut journal, &mut memory);
        let (mut journal, memory, _) = open(directory.path());
        assert_eq!(
            memory.seen(),
            [Seen {
                id: id(2),
                verdict: Verdict::Acknowledged
            }]
        );
        journal.rewrite(&memory.all()).unwrap();
        let (_, memory, _) = open(directory.path());
        assert_eq!(
            memory.seen(),
            [Seen {
                id: id(2),
                verdict: Verdict::Acknowledged
            }]
        );
        assert_eq!(memory.given(&id(1)), Some(&Given::Acknowledged));
    }

    #[test]
    fn parse_takes_any_bytes() {
        // A small generator of our own keeps the test free of seeds from outside.
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let good = [
            header().as_slice(),
            &frame(&[
                Record::Given(id(1), Given::declined("x")),
                Record::Confirmed,
            ]),
        ]
        .concat();
        for _ in 0..20_000 {
            let mut bytes = good.clone();
            for _ in 0..random() % 4 {
                let at = random() as usize % bytes.len();
                bytes[at] = random() as u8;
            }
            bytes.truncate(random() as usize % (bytes.len() + 1));
            let parsed = parse(&bytes);
            assert!(parsed.valid_bytes as usize <= bytes.len());
        }
    }

    #[cfg(unix)]
    #[test]
    fn the_directory_and_its_files_are_private() {
        use std::os::unix::fs::PermissionsExt;
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("a/b");
        crate::state::make_directory(&directory).unwrap();
        let (mut journal, ..) = open(&directory);
        journal.rewrite(&[Record::Confirmed]).unwrap();
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join("window")), 0o600);
    }
}
