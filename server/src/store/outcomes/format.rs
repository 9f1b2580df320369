//! What the files of the history look like.
//!
//! ```text
//! NNNNNNNNNN.out  header (64 bytes), then slots of 64 bytes, one record each
//!   header        "BWOUTCOM"  u32 version  u32 CRC-32C of the rest  u32 number  u32 zero  u64 made at (Unix ms)
//!                 16 bytes store  16 bytes zero
//!   slot          u64 ended at (Unix ms)  u64 accepted at (0: not known)  16 bytes ping  16 bytes device  u32 app
//!                 u8 outcome  7 bytes zero  u32 CRC-32C
//!                 outcome 255: records are missing before this place; "accepted at" is how many, 0: nobody knows
//! NNNNNNNNNN.idx  header (64 bytes), then pages of 4,096 bytes by ping, pages by device, and the two lists of fences
//!   header        "BWOUTIDX"  u32 version  u32 CRC-32C of the rest  u32 number  u32 slots  u32 entries  u32 rotten
//!                 u64 earliest ended at  u64 latest  16 bytes store
//!   page          u32 CRC-32C  u16 entries  u16 zero  up to 340 entries of 12 bytes: the first 8 bytes of the id
//!                 (big endian), u32 slot
//!   fences        the first entry of every page, then their u32 CRC-32C
//! mark            "BWOUTMRK"  u32 version  u32 CRC-32C of the rest  u32 1: a run is under way  u32 zero
//!                 u64 behind the last record that was dropped (u32 segment, u32 place)  16 bytes store  16 bytes zero
//! ```
//!
//! Numbers are little endian unless it says otherwise. The sum of a slot covers the store, the number of the segment and
//! the place as well, so that a record which turns up anywhere else is found out. Slots have the size of a header and
//! divide a sector: what a torn sector takes away is whole records. A slot of nothing but zeros was never written.

use crate::delivery::{AppId, DeviceId, PingId};
use crate::ports::{OutcomePosition, OutcomeRecord};
use crate::store::little::{array_at, u32_at, u64_at};
use crate::store::record;

/// Where the files are.
pub(in crate::store) const DIR: &str = "outcomes";

const MAGIC: [u8; 8] = *b"BWOUTCOM";
const INDEX_MAGIC: [u8; 8] = *b"BWOUTIDX";
const MARK_MAGIC: [u8; 8] = *b"BWOUTMRK";
const VERSION: u32 = 1;
/// The name of the mark.
pub(super) const MARK: &str = "outcomes/mark";
/// The name of a mark that is being written.
pub(super) const MARK_TEMPORARY: &str = "outcomes/mark.tmp";

/// Bytes of either header.
pub(super) const HEADER: usize = 64;
/// Bytes of a slot.
pub(super) const SLOT: usize = 64;
/// Bytes of a page of an index.
pub(super) const PAGE: usize = 4_096;
const PAGE_HEAD: usize = 8;
/// Bytes of an entry of an index, and of a fence.
const ENTRY: usize = 12;
/// Entries of a full page.
pub(super) const PAGE_ENTRIES: usize = (PAGE - PAGE_HEAD) / ENTRY;

/// Why a file cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    /// Written by a later program.
    #[error("format {0} is newer than this program")]
    Newer(u32),
    /// Not what was written.
    #[error("it is damaged: {0}")]
    Rotten(&'static str),
    /// It belongs to another store.
    #[error("it belongs to another store")]
    Foreign,
}

/// The name of a segment.
pub(super) fn segment_name(number: u32) -> String {
    format!("{DIR}/{number:010}.out")
}

/// The name of the index of a segment.
pub(super) fn index_name(number: u32) -> String {
    format!("{DIR}/{number:010}.idx")
}

/// The name of an index that is being written.
pub(super) fn index_temporary(number: u32) -> String {
    format!("{DIR}/{number:010}.idx.tmp")
}

/// The number in a name, if it ends like this.
pub(super) fn parse_name(file: &str, ending: &str) -> Option<u32> {
    let digits = file.strip_suffix(ending)?;
    (digits.len() == 10 && digits.bytes().all(|byte| byte.is_ascii_digit()))
        .then(|| digits.parse().ok())?
}

/// Closes a header: the sum of everything behind it.
fn close(header: &mut [u8; HEADER]) {
    let sum = crc32c::crc32c(&header[16..]);
    header[12..16].copy_from_slice(&sum.to_le_bytes());
}

fn open(header: &[u8; HEADER], magic: [u8; 8]) -> Result<(), Unusable> {
    if header[..8] != magic {
        return Err(Unusable::Rotten("it does not begin like one"));
    }
    let version = u32_at(header, 8);
    if version > VERSION {
        return Err(Unusable::Newer(version));
    }
    if version != VERSION {
        return Err(Unusable::Rotten("its header has no known version"));
    }
    if u32_at(header, 12) != crc32c::crc32c(&header[16..]) {
        return Err(Unusable::Rotten(
            "the checksum of its header does not match",
        ));
    }
    Ok(())
}

/// The header of a segment.
pub(super) fn header(store: [u8; 16], number: u32, made_ms: u64) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..20].copy_from_slice(&number.to_le_bytes());
    header[24..32].copy_from_slice(&made_ms.to_le_bytes());
    header[32..48].copy_from_slice(&store);
    close(&mut header);
    header
}

/// Whether this is the header of that segment.
pub(super) fn check_header(
    header: &[u8; HEADER],
    store: [u8; 16],
    number: u32,
) -> Result<(), Unusable> {
    open(header, MAGIC)?;
    if array_at(header, 32) != store {
        return Err(Unusable::Foreign);
    }
    if u32_at(header, 16) != number {
        return Err(Unusable::Rotten("it has the name of another segment"));
    }
    Ok(())
}

/// What the next start has to know, beyond what the segments say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Mark {
    /// A run is under way: if a start finds this, the run before did not end in order.
    pub(super) running: bool,
    /// Behind the last record that was ever dropped.
    pub(super) dropped_to: OutcomePosition,
}

/// The bytes of a mark.
pub(super) fn mark(store: [u8; 16], mark: Mark) -> [u8; HEADER] {
    let mut bytes = [0; HEADER];
    bytes[..8].copy_from_slice(&MARK_MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..20].copy_from_slice(&u32::from(mark.running).to_le_bytes());
    bytes[24..32].copy_from_slice(&mark.dropped_to.0.to_le_bytes());
    bytes[32..48].copy_from_slice(&store);
    close(&mut bytes);
    bytes
}

/// What a mark says.
pub(super) fn parse_mark(bytes: &[u8; HEADER], store: [u8; 16]) -> Result<Mark, Unusable> {
    open(bytes, MARK_MAGIC)?;
    if array_at(bytes, 32) != store {
        return Err(Unusable::Foreign);
    }
    Ok(Mark {
        running: u32_at(bytes, 16) != 0,
        dropped_to: OutcomePosition(u64_at(bytes, 24)),
    })
}

/// The outcome of a slot that tells of missing records.
const MISSING: u8 = u8::MAX;

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slot {
    /// A record.
    Record(OutcomeRecord),
    /// Records that belong before this place were never written.
    Missing {
        /// When that was written, Unix milliseconds.
        at_ms: u64,
        /// How many; `None`: nobody knows.
        count: Option<u64>,
    },
    /// Nothing was written here: a crash of the machine took it.
    Empty,
    /// Not what was written.
    Rotten,
}

/// Writes and reads the slots of one segment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slots {
    /// The sum of what surrounds every slot.
    seed: u32,
}

impl Slots {
    pub(super) fn new(store: [u8; 16], number: u32) -> Slots {
        let seed = crc32c::crc32c_append(crc32c::crc32c(&store), &number.to_le_bytes());
        Slots { seed }
    }

    fn sum(self, place: u32, body: &[u8]) -> u32 {
        let seed = crc32c::crc32c_append(self.seed, &place.to_le_bytes());
        crc32c::crc32c_append(seed, body)
    }

    /// Appends the slot of a record.
    pub(super) fn put(self, out: &mut Vec<u8>, place: u32, record: &OutcomeRecord) {
        let mut slot = [0; SLOT];
        slot[..8].copy_from_slice(&record.at_ms.to_le_bytes());
        slot[8..16].copy_from_slice(&record.accepted_ms.unwrap_or(0).to_le_bytes());
        slot[16..32].copy_from_slice(&record.ping.0);
        slot[32..48].copy_from_slice(&record.device.0);
        slot[48..52].copy_from_slice(&record.app.0.to_le_bytes());
        slot[52] = record::outcome_number(record.outcome);
        self.close(out, place, slot);
    }

    /// Appends the slot that tells of missing records.
    pub(super) fn put_missing(self, out: &mut Vec<u8>, place: u32, at_ms: u64, count: Option<u64>) {
        let mut slot = [0; SLOT];
        slot[..8].copy_from_slice(&at_ms.to_le_bytes());
        slot[8..16].copy_from_slice(&count.unwrap_or(0).to_le_bytes());
        slot[52] = MISSING;
        self.close(out, place, slot);
    }

    fn close(self, out: &mut Vec<u8>, place: u32, mut slot: [u8; SLOT]) {
        let sum = self.sum(place, &slot[..SLOT - 4]);
        slot[SLOT - 4..].copy_from_slice(&sum.to_le_bytes());
        out.extend_from_slice(&slot);
    }

    /// Reads a slot.
    pub(super) fn read(self, place: u32, slot: &[u8]) -> Slot {
        let Some(slot) = slot.first_chunk::<SLOT>() else {
            return Slot::Rotten;
        };
        if u32_at(slot, SLOT - 4) != self.sum(place, &slot[..SLOT - 4]) {
            return if slot.iter().all(|byte| *byte == 0) {
                Slot::Empty
            } else {
                Slot::Rotten
            };
        }
        if slot[52] == MISSING {
            let count = Some(u64_at(slot, 8)).filter(|count| *count > 0);
            return Slot::Missing {
                at_ms: u64_at(slot, 0),
                count,
            };
        }
        let Ok(outcome) = record::outcome(slot[52]) else {
            return Slot::Rotten;
        };
        Slot::Record(OutcomeRecord {
            app: AppId(u32_at(slot, 48)),
            ping: PingId(array_at(slot, 16)),
            device: DeviceId(array_at(slot, 32)),
            outcome,
            at_ms: u64_at(slot, 0),
            accepted_ms: Some(u64_at(slot, 8)).filter(|at| *at > 0),
        })
    }
}

/// Where the slot of a place begins in its file.
pub(super) fn slot_offset(place: u32) -> u64 {
    HEADER as u64 + u64::from(place) * SLOT as u64
}

/// How many whole slots a file of this length holds.
pub(super) fn slots_in(length: u64) -> u32 {
    u32::try_from(length.saturating_sub(HEADER as u64) / SLOT as u64).unwrap_or(u32::MAX)
}

/// The first 8 bytes of an id, as an index sorts them.
pub(super) fn prefix(id: [u8; 16]) -> u64 {
    id.first_chunk::<8>()
        .map_or(0, |chunk| u64::from_be_bytes(*chunk))
}

/// What an index says of its segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Summary {
    /// Slots, readable or not.
    pub(super) slots: u32,
    /// Records, each of which is in both indexes.
    pub(super) entries: u32,
    /// Slots that were not readable when the index was made.
    pub(super) rotten: u32,
    /// When the earliest and the latest record ended, Unix milliseconds.
    pub(super) earliest_ms: u64,
    pub(super) latest_ms: u64,
}

/// The header of an index.
pub(super) fn index_header(store: [u8; 16], number: u32, summary: &Summary) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(&INDEX_MAGIC);
    header[8..12].copy_from_slice(&VERSION.to_le_bytes());
    header[16..20].copy_from_slice(&number.to_le_bytes());
    header[20..24].copy_from_slice(&summary.slots.to_le_bytes());
    header[24..28].copy_from_slice(&summary.entries.to_le_bytes());
    header[28..32].copy_from_slice(&summary.rotten.to_le_bytes());
    header[32..40].copy_from_slice(&summary.earliest_ms.to_le_bytes());
    header[40..48].copy_from_slice(&summary.latest_ms.to_le_bytes());
    header[48..64].copy_from_slice(&store);
    close(&mut header);
    header
}

/// What the header of the index of that segment says.
pub(super) fn check_index_header(
    header: &[u8; HEADER],
    store: [u8; 16],
    number: u32,
) -> Result<Summary, Unusable> {
    open(header, INDEX_MAGIC)?;
    if array_at(header, 48) != store {
        return Err(Unusable::Foreign);
    }
    if u32_at(header, 16) != number {
        return Err(Unusable::Rotten("it has the name of another index"));
    }
    Ok(Summary {
        slots: u32_at(header, 20),
        entries: u32_at(header, 24),
        rotten: u32_at(header, 28),
        earliest_ms: u64_at(header, 32),
        latest_ms: u64_at(header, 40),
    })
}

/// An entry of an index, and a fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Entry {
    /// The first 8 bytes of the id.
    pub(super) key: u64,
    /// The slot.
    pub(super) place: u32,
}

fn put_entry(out: &mut [u8], entry: Entry) {
    out[..8].copy_from_slice(&entry.key.to_be_bytes());
    out[8..ENTRY].copy_from_slice(&entry.place.to_le_bytes());
}

fn entry(bytes: &[u8]) -> Entry {
    let key = bytes
        .first_chunk::<8>()
        .map_or(0, |chunk| u64::from_be_bytes(*chunk));
    Entry {
        key,
        place: u32_at(bytes, 8),
    }
}

/// Pages that so many entries take.
pub(super) fn pages(entries: u32) -> u32 {
    entries.div_ceil(PAGE_ENTRIES as u32)
}

/// Bytes of a list of so many fences.
pub(super) fn fences_length(pages: u32) -> usize {
    pages as usize * ENTRY + 4
}

/// Where page `page` of all pages begins in its file.
pub(super) fn page_offset(page: u32) -> u64 {
    HEADER as u64 + u64::from(page) * PAGE as u64
}

fn page_sum(slots: Slots, page: u32, content: &[u8]) -> u32 {
    // The same surroundings as a slot has, so that a page of another index is found out as well.
    slots.sum(page, content)
}

/// Appends the pages of a sorted index, of which the first is page `first` of the file, and answers their fences.
pub(super) fn put_pages(
    out: &mut Vec<u8>,
    slots: Slots,
    first: u32,
    entries: &[Entry],
) -> Vec<Entry> {
    let mut fences = Vec::with_capacity(entries.len().div_ceil(PAGE_ENTRIES));
    for (page, some) in (first..).zip(entries.chunks(PAGE_ENTRIES)) {
        let at = out.len();
        out.resize(at + PAGE, 0);
        let bytes = &mut out[at..];
        // At most PAGE_ENTRIES.
        bytes[4..6].copy_from_slice(&(some.len() as u16).to_le_bytes());
        for (place, entry) in bytes[PAGE_HEAD..].chunks_exact_mut(ENTRY).zip(some) {
            put_entry(place, *entry);
        }
        let sum = page_sum(slots, page, &bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        fences.extend(some.first());
    }
    fences
}

/// The entries of a page; `None`: it is not what was written.
pub(super) fn page(slots: Slots, number: u32, bytes: &[u8]) -> Option<Vec<Entry>> {
    if bytes.len() != PAGE || u32_at(bytes, 0) != page_sum(slots, number, &bytes[4..]) {
        return None;
    }
    let count = usize::from(u16::from_le_bytes([bytes[4], bytes[5]]));
    Some(
        bytes[PAGE_HEAD..]
            .chunks_exact(ENTRY)
            .take(count)
            .map(entry)
            .collect(),
    )
}

/// Appends a list of fences.
pub(super) fn put_fences(out: &mut Vec<u8>, slots: Slots, fences: &[Entry]) {
    let at = out.len();
    out.resize(at + fences.len() * ENTRY, 0);
    for (place, fence) in out[at..].chunks_exact_mut(ENTRY).zip(fences) {
        put_entry(place, *fence);
    }
    let sum = slots.sum(u32::MAX, &out[at..]);
    out.extend_from_slice(&sum.to_le_bytes());
}

/// The fences of a list; `None`: it is not what was written.
pub(super) fn fences(slots: Slots, bytes: &[u8]) -> Option<Vec<Entry>> {
    let (list, sum) = bytes.split_last_chunk::<4>()?;
    if u32::from_le_bytes(*sum) != slots.sum(u32::MAX, list) {
        return None;
    }
    Some(list.chunks_exact(ENTRY).map(entry).collect())
}
