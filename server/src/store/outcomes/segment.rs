//! One segment: a file of records in the order in which they were recorded, and how they are found.
//!
//! | kind | how a device or ping is found |
//! | --- | --- |
//! | open | the beginnings of both ids of every record are in memory, 16 bytes a record; a look walks over them |
//! | sealed | an index beside it: its fences in memory once they were needed, a page or two read for each look |
//! | bare | not at all, every record is read; until the writer has made the index (again) |
//! | unusable | nobody can read it; it is kept until its age says that nothing in it is wanted any more |

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError, RwLock};

use rustix::io::Errno;

use super::format::{
    self, Entry, HEADER, PAGE, SLOT, Slot, Slots, Summary, Unusable, fences_length, page_offset,
    prefix, slot_offset, slots_in,
};
use crate::delivery::{DeviceId, PingId};
use crate::ports::{OutcomeOrder, OutcomeRecord};
use crate::store::log::disk::{Disk, DiskFile};

/// Records that are read at once in a walk over all of them: 64 KiB.
pub(super) const CHUNK: u32 = 1_024;
/// What reading a page costs, in records looked at.
pub(super) const PAGE_COST: usize = 16;
/// Most unreadable places of a segment that are counted one by one.
const ROT_COUNTED: usize = 1_024;

/// A segment as a look sees it.
pub(super) struct Segment {
    pub(super) number: u32,
    pub(super) slots: Slots,
    pub(super) kind: Kind,
    /// Places that could not be read.
    rot: Mutex<BTreeSet<u32>>,
    /// The index was found wanting and is to be made again.
    doubted: AtomicBool,
    /// The disk did not give its records.
    failing: AtomicBool,
}

pub(super) enum Kind {
    Open(Open),
    Sealed(Sealed),
    Bare(Bare),
    Unusable(Unused),
}

/// The segment that grows.
pub(super) struct Open {
    pub(super) file: Box<dyn DiskFile>,
    pub(super) made_ms: u64,
    state: RwLock<Growing>,
}

#[derive(Default)]
struct Growing {
    /// The beginnings of ping and device of every slot, by place.
    keys: Vec<(u64, u64)>,
    /// The slots that are no records.
    missing: BTreeSet<u32>,
    /// When they ended.
    span: Option<(u64, u64)>,
}

impl Growing {
    fn reach(&mut self, at_ms: u64) {
        let (earliest, latest) = self.span.unwrap_or((at_ms, at_ms));
        self.span = Some((earliest.min(at_ms), latest.max(at_ms)));
    }
}

/// A segment that is complete and has an index.
pub(super) struct Sealed {
    pub(super) summary: Summary,
    /// By ping, by device.
    fences: OnceLock<(Vec<Entry>, Vec<Entry>)>,
}

/// A segment without an index.
pub(super) struct Bare {
    pub(super) slots: u32,
    /// When its records ended, if that is known.
    pub(super) span: Option<(u64, u64)>,
    /// It was never sealed: what cannot be read at its end was never whole.
    pub(super) torn: bool,
}

/// A file that cannot be used.
pub(super) struct Unused {
    pub(super) bytes: u64,
    pub(super) why: Unusable,
}

/// What an index says.
pub(super) enum Found {
    /// The places, in the order asked for.
    Places(Vec<u32>),
    /// There is no index to ask.
    Unindexed,
}

impl Segment {
    pub(super) fn new(store: [u8; 16], number: u32, kind: Kind) -> Segment {
        Segment {
            number,
            slots: Slots::new(store, number),
            kind,
            rot: Mutex::default(),
            doubted: AtomicBool::new(false),
            failing: AtomicBool::new(false),
        }
    }

    /// A new, empty one in this file.
    pub(super) fn open(
        store: [u8; 16],
        number: u32,
        file: Box<dyn DiskFile>,
        made_ms: u64,
    ) -> Segment {
        let kind = Kind::Open(Open {
            file,
            made_ms,
            state: RwLock::default(),
        });
        Segment::new(store, number, kind)
    }

    pub(super) fn sealed(store: [u8; 16], number: u32, summary: Summary) -> Segment {
        let kind = Kind::Sealed(Sealed {
            summary,
            fences: OnceLock::new(),
        });
        Segment::new(store, number, kind)
    }

    /// What is there at a start, of the two files of a number.
    pub(super) fn found(disk: &dyn Disk, store: [u8; 16], number: u32) -> Segment {
        let (kind, bytes) = match look(disk, store, number) {
            Ok((slots, length)) => match sealed_index(disk, store, number) {
                Index::Whole(summary) => return Segment::sealed(store, number, summary),
                Index::Missing => (Ok((slots, true)), length),
                Index::Bad => (Ok((slots, false)), length),
            },
            Err((why, length)) => (Err(why), length),
        };
        let kind = match kind {
            Ok((slots, torn)) => Kind::Bare(Bare {
                slots,
                span: None,
                torn,
            }),
            Err(why) => Kind::Unusable(Unused { bytes, why }),
        };
        Segment::new(store, number, kind)
    }

    /// Places, readable or not.
    pub(super) fn length(&self) -> u32 {
        match &self.kind {
            Kind::Open(open) => open.length(),
            Kind::Sealed(sealed) => sealed.summary.slots,
            Kind::Bare(bare) => bare.slots,
            Kind::Unusable(_) => 0,
        }
    }

    /// Records, as far as that is known.
    pub(super) fn records(&self) -> u64 {
        match &self.kind {
            Kind::Sealed(sealed) => u64::from(sealed.summary.entries),
            Kind::Open(open) => u64::from(open.length()) - open.missing(),
            Kind::Bare(_) => u64::from(self.length()),
            Kind::Unusable(_) => 0,
        }
    }

    /// Bytes of its files.
    pub(super) fn bytes(&self) -> u64 {
        match &self.kind {
            Kind::Sealed(sealed) => {
                slot_offset(sealed.summary.slots) + index_length(sealed.summary.entries)
            }
            Kind::Open(_) | Kind::Bare(_) => slot_offset(self.length()),
            Kind::Unusable(unused) => unused.bytes,
        }
    }

    /// When its earliest and its latest record ended, if that is known and there is one.
    pub(super) fn span(&self) -> Option<(u64, u64)> {
        match &self.kind {
            Kind::Open(open) => {
                open.state
                    .read()
                    .unwrap_or_else(PoisonError::into_inner)
                    .span
            }
            Kind::Sealed(Sealed { summary, .. }) => {
                (summary.latest_ms > 0).then_some((summary.earliest_ms, summary.latest_ms))
            }
            Kind::Bare(bare) => bare.span,
            Kind::Unusable(_) => None,
        }
    }

    /// Whether there are bytes and, as far as is known, not one record that can be read.
    pub(super) fn says_nothing(&self) -> bool {
        match &self.kind {
            Kind::Unusable(_) => true,
            Kind::Open(_) => false,
            Kind::Sealed(_) | Kind::Bare(_) => self.length() > 0 && self.span().is_none(),
        }
    }

    /// Whether nobody knows how old it is.
    pub(super) fn is_undated(&self) -> bool {
        self.span().is_none() && !matches!(self.kind, Kind::Open(_))
    }

    /// Whether a record of this time or later, and before that time, may be in it.
    pub(super) fn may_hold(&self, from_ms: u64, to_ms: u64) -> bool {
        match (&self.kind, self.span()) {
            (Kind::Unusable(_), _) => false,
            (_, Some((earliest, latest))) => latest >= from_ms && earliest < to_ms,
            (Kind::Bare(_), None) => true,
            (Kind::Open(_) | Kind::Sealed(_), None) => false,
        }
    }

    /// Places that could not be read.
    pub(super) fn unreadable(&self) -> u64 {
        let met = self
            .rot
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .len() as u64;
        match &self.kind {
            Kind::Sealed(sealed) => met.max(u64::from(sealed.summary.rotten)),
            Kind::Open(_) | Kind::Bare(_) => met,
            Kind::Unusable(_) => 1,
        }
        .max(u64::from(self.failing.load(Ordering::Relaxed)))
    }

    /// Whoever asks goes on without this segment, because the disk does not give its records; told once.
    ///
    /// # Errors
    /// The same again if it is this process that has no memory or too many files open: that says nothing of the file.
    pub(super) fn skip(&self, error: io::Error) -> io::Result<()> {
        if !is_of_the_file(&error) {
            return Err(error);
        }
        if !self.failing.swap(true, Ordering::Relaxed) {
            tracing::error!(
                %error,
                file = format::segment_name(self.number),
                "outcomes cannot be read and are left out; have the disk checked"
            );
        }
        Ok(())
    }

    /// Whether size may drop it: what nobody can read goes by age.
    pub(super) fn goes_by_size(&self) -> bool {
        match &self.kind {
            Kind::Open(_) | Kind::Unusable(_) => false,
            Kind::Sealed(_) => !self.says_nothing(),
            Kind::Bare(_) => true,
        }
    }

    pub(super) fn is_doubted(&self) -> bool {
        self.doubted.load(Ordering::Relaxed)
    }

    /// A place cannot be read: it is left out, counted and, the first of a segment, told.
    fn rotten(&self, place: u32) {
        let mut rot = self.rot.lock().unwrap_or_else(PoisonError::into_inner);
        if rot.len() < ROT_COUNTED && rot.insert(place) && rot.len() == 1 {
            tracing::error!(
                file = format::segment_name(self.number),
                place,
                "an outcome cannot be read and is left out; have the disk checked"
            );
        }
    }

    fn doubt(&self, what: &'static str) {
        if !self.doubted.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                file = format::index_name(self.number),
                what,
                "an index of outcomes is damaged and will be made again; until then every record is read"
            );
        }
    }

    /// Opens its records for reading. `None`: it was dropped meanwhile, or nobody can read it.
    pub(super) fn records_of<'a>(&'a self, disk: &dyn Disk) -> io::Result<Option<Records<'a>>> {
        let file = match &self.kind {
            Kind::Open(open) => File::Shared(&*open.file),
            Kind::Unusable(_) => return Ok(None),
            Kind::Sealed(_) | Kind::Bare(_) => {
                match disk.open(&format::segment_name(self.number)) {
                    Ok(file) => File::Own(file),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                    Err(error) => return Err(error),
                }
            }
        };
        Ok(Some(Records {
            segment: self,
            file,
            buffer: Vec::new(),
        }))
    }

    /// The places of a ping, by the beginning of the device's id. They may hold another ping whose id begins alike.
    pub(super) fn of_ping(&self, disk: &dyn Disk, ping: PingId) -> io::Result<Found> {
        let key = prefix(ping.0);
        match &self.kind {
            Kind::Open(open) => {
                let state = open.state.read().unwrap_or_else(PoisonError::into_inner);
                let mut found: Vec<(u64, u32)> = (0u32..)
                    .zip(&state.keys)
                    .filter(|(_, keys)| keys.0 == key)
                    .map(|(place, keys)| (keys.1, place))
                    .collect();
                drop(state);
                found.sort_unstable();
                Ok(Found::Places(
                    found.into_iter().map(|(_, place)| place).collect(),
                ))
            }
            Kind::Sealed(sealed) if !self.is_doubted() => {
                let Some(mut index) = self.index(disk, sealed, By::Ping)? else {
                    return Ok(Found::Unindexed);
                };
                let first = index.fences.partition_point(|fence| fence.key < key);
                let mut places = Vec::new();
                for page in first.saturating_sub(1)..index.fences.len() {
                    if index.fences[page].key > key {
                        break;
                    }
                    let Some(entries) = index.page(page)? else {
                        self.doubt("a page by ping");
                        return Ok(Found::Unindexed);
                    };
                    let equal = entries.iter().filter(|entry| entry.key == key);
                    places.extend(equal.map(|entry| entry.place));
                }
                Ok(Found::Places(places))
            }
            Kind::Sealed(_) | Kind::Bare(_) => Ok(Found::Unindexed),
            Kind::Unusable(_) => Ok(Found::Places(Vec::new())),
        }
    }

    /// The places of a device from `start` on in this order, `start` included, at most `most`. They may hold another
    /// device whose id begins alike. Adds to `cost` what it looked at.
    pub(super) fn of_device(
        &self,
        disk: &dyn Disk,
        device: DeviceId,
        order: OutcomeOrder,
        start: u32,
        most: usize,
        cost: &mut usize,
    ) -> io::Result<Found> {
        let key = prefix(device.0);
        match &self.kind {
            Kind::Open(open) => {
                *cost += PAGE_COST;
                let state = open.state.read().unwrap_or_else(PoisonError::into_inner);
                let all = (0u32..).zip(&state.keys);
                let places = match order {
                    OutcomeOrder::OldestFirst => all
                        .skip(start as usize)
                        .filter(|(_, keys)| keys.1 == key)
                        .map(|(place, _)| place)
                        .take(most)
                        .collect(),
                    OutcomeOrder::NewestFirst => {
                        let end = (start as usize).saturating_add(1).min(state.keys.len());
                        state.keys[..end]
                            .iter()
                            .enumerate()
                            .rev()
                            .filter(|(_, keys)| keys.1 == key)
                            // A segment has fewer places than a u32 counts.
                            .map(|(place, _)| place as u32)
                            .take(most)
                            .collect()
                    }
                };
                Ok(Found::Places(places))
            }
            Kind::Sealed(sealed) if !self.is_doubted() => {
                let Some(mut index) = self.index(disk, sealed, By::Device)? else {
                    return Ok(Found::Unindexed);
                };
                let from = Entry { key, place: start };
                let mut places = Vec::new();
                // The page in which the start would stand: the last one that begins at or before it.
                let stands = index.fences.partition_point(|fence| *fence <= from);
                let mut page = stands.saturating_sub(1);
                while page < index.fences.len() && places.len() < most {
                    *cost += PAGE_COST;
                    let Some(entries) = index.page(page)? else {
                        self.doubt("a page by device");
                        return Ok(Found::Unindexed);
                    };
                    let wanted = |entry: &&Entry| {
                        entry.key == key
                            && match order {
                                OutcomeOrder::OldestFirst => entry.place >= start,
                                OutcomeOrder::NewestFirst => entry.place <= start,
                            }
                    };
                    let left = most - places.len();
                    let place = |entry: &Entry| entry.place;
                    match order {
                        OutcomeOrder::OldestFirst => {
                            places.extend(entries.iter().filter(wanted).map(place).take(left));
                            if entries.last().is_none_or(|last| last.key > key) {
                                break;
                            }
                            page += 1;
                        }
                        OutcomeOrder::NewestFirst => {
                            places
                                .extend(entries.iter().rev().filter(wanted).map(place).take(left));
                            if page == 0 || entries.first().is_none_or(|first| first.key < key) {
                                break;
                            }
                            page -= 1;
                        }
                    }
                }
                Ok(Found::Places(places))
            }
            Kind::Sealed(_) | Kind::Bare(_) => Ok(Found::Unindexed),
            Kind::Unusable(_) => Ok(Found::Places(Vec::new())),
        }
    }

    fn index<'a>(
        &'a self,
        disk: &dyn Disk,
        sealed: &'a Sealed,
        by: By,
    ) -> io::Result<Option<IndexFile<'a>>> {
        let file = match disk.open(&format::index_name(self.number)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // If the records are there it was lost; otherwise both were dropped.
                if disk.open(&format::segment_name(self.number)).is_ok() {
                    self.doubt("the file is not there");
                }
                return Ok(None);
            }
            Err(error) if is_of_the_file(&error) => {
                self.doubt("the file cannot be opened");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let pages = format::pages(sealed.summary.entries);
        let both = match sealed.fences.get() {
            Some(both) => both,
            None => {
                let Some(read) = read_fences(&*file, self.slots, pages)? else {
                    self.doubt("its fences");
                    return Ok(None);
                };
                sealed.fences.get_or_init(|| read)
            }
        };
        let (fences, first) = match by {
            By::Ping => (&both.0, 0),
            By::Device => (&both.1, pages),
        };
        Ok(Some(IndexFile {
            file,
            slots: self.slots,
            fences,
            first,
            buffer: vec![0; PAGE],
        }))
    }
}

impl Open {
    pub(super) fn length(&self) -> u32 {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        // A segment has fewer places than a u32 counts.
        state.keys.len() as u32
    }

    fn missing(&self) -> u64 {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        state.missing.len() as u64
    }

    /// Shows records that have been written.
    pub(super) fn show(&self, records: &[OutcomeRecord]) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        for record in records {
            state.reach(record.at_ms);
            state
                .keys
                .push((prefix(record.ping.0), prefix(record.device.0)));
        }
    }

    /// Shows a slot that tells of missing records.
    pub(super) fn show_missing(&self, at_ms: u64) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        // A segment has fewer places than a u32 counts.
        let place = state.keys.len() as u32;
        state.reach(at_ms);
        state.missing.insert(place);
        // No id is asked for by accident that begins so; if one is, the slot says what it is.
        state.keys.push((0, 0));
    }

    /// What its index is made of: the beginnings of ping and device, and the place of each record.
    pub(super) fn keys(&self) -> Vec<Keys> {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        (0u32..)
            .zip(&state.keys)
            .filter(|(place, _)| !state.missing.contains(place))
            .map(|(place, keys)| Keys {
                ping: keys.0,
                device: keys.1,
                place,
            })
            .collect()
    }
}

#[derive(Clone, Copy)]
enum By {
    Ping,
    Device,
}

struct IndexFile<'a> {
    file: Box<dyn DiskFile>,
    slots: Slots,
    fences: &'a [Entry],
    /// The number of its first page in the file.
    first: u32,
    buffer: Vec<u8>,
}

impl IndexFile<'_> {
    /// The entries of a page; `None`: it is damaged.
    fn page(&mut self, page: usize) -> io::Result<Option<Vec<Entry>>> {
        // Fewer pages than entries, which a u32 counts.
        let number = self.first + page as u32;
        match self.file.read_at(&mut self.buffer, page_offset(number)) {
            Ok(()) => Ok(format::page(self.slots, number, &self.buffer)),
            Err(error) if is_of_the_file(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Whether an error says that a file is cut short or cannot be read, and not that this process has no memory or too many
/// files open.
fn is_of_the_file(error: &io::Error) -> bool {
    let ours = [Errno::NOMEM, Errno::NFILE, Errno::MFILE];
    !error
        .raw_os_error()
        .is_some_and(|code| ours.iter().any(|errno| errno.raw_os_error() == code))
}

fn read_fences(
    file: &dyn DiskFile,
    slots: Slots,
    pages: u32,
) -> io::Result<Option<(Vec<Entry>, Vec<Entry>)>> {
    let length = fences_length(pages);
    let mut bytes = vec![0; 2 * length];
    match file.read_at(&mut bytes, page_offset(2 * pages)) {
        Ok(()) => {}
        Err(error) if is_of_the_file(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let (by_ping, by_device) = bytes.split_at(length);
    Ok(format::fences(slots, by_ping).zip(format::fences(slots, by_device)))
}

/// The records of a segment, open for reading.
pub(super) struct Records<'a> {
    segment: &'a Segment,
    file: File<'a>,
    buffer: Vec<u8>,
}

enum File<'a> {
    Shared(&'a dyn DiskFile),
    Own(Box<dyn DiskFile>),
}

impl Records<'_> {
    fn read_at(&mut self, first: u32, count: u32) -> io::Result<()> {
        self.buffer.resize(count as usize * SLOT, 0);
        let offset = slot_offset(first);
        match &self.file {
            File::Shared(file) => file.read_at(&mut self.buffer, offset),
            File::Own(file) => file.read_at(&mut self.buffer, offset),
        }
    }

    /// One record; `None`: it cannot be read, which is told.
    pub(super) fn one(&mut self, place: u32) -> io::Result<Option<OutcomeRecord>> {
        let slot = match self.read_at(place, 1) {
            Ok(()) => self.segment.slots.read(place, &self.buffer),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Slot::Rotten,
            Err(error) => return Err(error),
        };
        match slot {
            Slot::Record(record) => Ok(Some(record)),
            Slot::Missing { .. } => Ok(None),
            Slot::Empty | Slot::Rotten => {
                // An index leads to records only.
                self.segment.rotten(place);
                Ok(None)
            }
        }
    }

    /// Several slots in a row, by place.
    pub(super) fn some(&mut self, first: u32, count: u32) -> io::Result<Vec<Slot>> {
        let slots = match self.read_at(first, count) {
            Ok(()) => (first..)
                .zip(self.buffer.chunks_exact(SLOT))
                .map(|(place, bytes)| self.segment.slots.read(place, bytes))
                .collect(),
            // Shorter than it was: what is left of it is read one by one.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && count > 1 => {
                let mut slots = Vec::with_capacity(count as usize);
                for place in first..first + count {
                    slots.extend(self.some(place, 1)?);
                }
                return Ok(slots);
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => vec![Slot::Rotten],
            Err(error) => return Err(error),
        };
        Ok(slots)
    }

    fn sync(&self) -> io::Result<()> {
        match &self.file {
            File::Shared(file) => file.sync(),
            File::Own(file) => file.sync(),
        }
    }

    /// Counts and tells a slot of [`Records::some`] that cannot be read.
    pub(super) fn rotten(&self, place: u32) {
        self.segment.rotten(place);
    }
}

/// Looks at the header of a segment: its slots and length, or why it cannot be used.
fn look(disk: &dyn Disk, store: [u8; 16], number: u32) -> Result<(u32, u64), (Unusable, u64)> {
    let unreadable = |_| (Unusable::Rotten("it cannot be read"), 0);
    let file = disk
        .open(&format::segment_name(number))
        .map_err(unreadable)?;
    let length = file.length().map_err(unreadable)?;
    if length < HEADER as u64 {
        // Its making was cut short: records are only written once the header is safe.
        return Ok((0, length));
    }
    let mut header = [0; HEADER];
    file.read_at(&mut header, 0)
        .map_err(|_| (Unusable::Rotten("its header cannot be read"), length))?;
    match format::check_header(&header, store, number) {
        Ok(()) => Ok((slots_in(length), length)),
        Err(Unusable::Rotten(_)) if length == HEADER as u64 => Ok((0, length)),
        Err(why) => Err((why, length)),
    }
}

enum Index {
    Whole(Summary),
    Missing,
    Bad,
}

/// Looks at the header of an index.
fn sealed_index(disk: &dyn Disk, store: [u8; 16], number: u32) -> Index {
    let file = match disk.open(&format::index_name(number)) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Index::Missing,
        Err(_) => return Index::Bad,
    };
    let mut header = [0; HEADER];
    let length = file.length();
    let read = file.read_at(&mut header, 0).and(length);
    let Ok(length) = read else {
        return Index::Bad;
    };
    match format::check_index_header(&header, store, number) {
        // A segment does not grow once it has an index; that it has shrunk, its records' own sums tell.
        Ok(summary)
            if length == index_length(summary.entries) && summary.entries <= summary.slots =>
        {
            Index::Whole(summary)
        }
        Ok(_) | Err(_) => Index::Bad,
    }
}

/// Bytes of an index of so many entries.
pub(super) fn index_length(entries: u32) -> u64 {
    let pages = format::pages(entries);
    page_offset(2 * pages) + 2 * fences_length(pages) as u64
}

/// What an index is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Keys {
    pub(super) ping: u64,
    pub(super) device: u64,
    pub(super) place: u32,
}

/// Reads every record of a segment without an index: what its index is made of, and what it says.
pub(super) fn read_all(
    disk: &dyn Disk,
    segment: &Segment,
    torn: bool,
) -> io::Result<Option<(Vec<Keys>, Summary)>> {
    let Some(mut records) = segment.records_of(disk)? else {
        return Ok(None);
    };
    if torn {
        // Whoever wrote it was killed before it came to that.
        records.sync()?;
    }
    let length = segment.length();
    let mut keys = Vec::new();
    let mut faults = Vec::new();
    // Behind the last slot that can be read.
    let mut end = 0;
    let mut summary = Summary {
        earliest_ms: u64::MAX,
        ..Summary::default()
    };
    let mut first = 0;
    while first < length {
        let count = CHUNK.min(length - first);
        for (place, slot) in (first..).zip(records.some(first, count)?) {
            let at_ms = match slot {
                Slot::Record(record) => {
                    keys.push(Keys {
                        ping: prefix(record.ping.0),
                        device: prefix(record.device.0),
                        place,
                    });
                    record.at_ms
                }
                Slot::Missing { at_ms, .. } => at_ms,
                Slot::Empty => continue,
                Slot::Rotten => {
                    faults.push(place);
                    continue;
                }
            };
            summary.earliest_ms = summary.earliest_ms.min(at_ms);
            summary.latest_ms = summary.latest_ms.max(at_ms);
            end = place + 1;
        }
        first += count;
    }
    summary.slots = match end {
        // Nothing was torn off: nothing was ever whole.
        0 if torn && faults.is_empty() => 0,
        // If not one can be read, all that is there stays until its time is over.
        0 => length,
        end if torn => end,
        _ => length,
    };
    faults.retain(|place| *place < summary.slots);
    for place in &faults {
        segment.rotten(*place);
    }
    // Both are at most the number of slots.
    summary.rotten = faults.len() as u32;
    summary.entries = keys.len() as u32;
    if end == 0 {
        summary.earliest_ms = 0;
    }
    Ok(Some((keys, summary)))
}

/// What the index of a segment looks like.
pub(super) fn index_bytes(
    store: [u8; 16],
    number: u32,
    mut keys: Vec<Keys>,
    summary: &Summary,
) -> Vec<u8> {
    let slots = Slots::new(store, number);
    // The length of an index of at most as many entries as a segment has slots.
    let mut bytes = Vec::with_capacity(index_length(summary.entries) as usize);
    bytes.extend_from_slice(&format::index_header(store, number, summary));
    keys.sort_unstable();
    let by_ping: Vec<Entry> = keys
        .iter()
        .map(|keys| Entry {
            key: keys.ping,
            place: keys.place,
        })
        .collect();
    let mut by_device: Vec<Entry> = keys
        .iter()
        .map(|keys| Entry {
            key: keys.device,
            place: keys.place,
        })
        .collect();
    drop(keys);
    by_device.sort_unstable();
    let ping_fences = format::put_pages(&mut bytes, slots, 0, &by_ping);
    let first = format::pages(summary.entries);
    let device_fences = format::put_pages(&mut bytes, slots, first, &by_device);
    format::put_fences(&mut bytes, slots, &ping_fences);
    format::put_fences(&mut bytes, slots, &device_fences);
    bytes
}

/// Writes the index of a segment beside it. Safe when this returns, but for its name.
pub(super) fn write_index(
    disk: &dyn Disk,
    store: [u8; 16],
    number: u32,
    keys: Vec<Keys>,
    summary: &Summary,
) -> io::Result<()> {
    let bytes = index_bytes(store, number, keys, summary);
    let temporary = format::index_temporary(number);
    let file = disk.create(&temporary)?;
    file.write_at(&bytes, 0)?;
    file.sync()?;
    disk.rename(&temporary, &format::index_name(number))
}
