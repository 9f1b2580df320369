//! The log: what a 2xx rests on.
//!
//! The log is a row of segment files. Each holds numbered, checksummed frames, one behind the other; a frame is what
//! one sync made safe. [`Log::write`] returns `Ok` only after the whole frame was written and `fdatasync` said
//! yes, and nothing else in the house may call a batch safe. Everything else on the disk can be thrown away and
//! made again from a snapshot and the frames since.
//!
//! # What a disk can do to us, and what we do then
//!
//! - *Power is lost while a frame is written.* Any part of it may be there. Its checksum fails, no frame follows it: the
//!   log ends before it. Nobody was told that it is safe. The remains are overwritten with zeros before the
//!   next frame is written there, so they are never looked at again.
//! - *A sync fails.* Nobody knows what is on the disk: the kernel may have dropped the pages and will not say so
//!   twice. The log is poisoned; everything after is `Failed` until a restart looks at what is really there.
//! - *The process ended between the write and the answer.* The frame is whole in memory of the kernel, perhaps not on
//!   the disk. A restart takes it for part of the log, and therefore writes that last frame once more
//!   and syncs it before anything is built on it. Only the last frame can be in doubt, because each is synced
//!   before the next is written.
//! - *There is no room for a new segment.* Nothing was written; the batch is refused with `NoRoom`, and the
//!   next one tries again. Segments are allocated in full before their first frame, so within a segment this cannot
//!   happen.
//! - *Bits rot in the middle.* A frame is bad although later ones are whole. Frames of the past that a snapshot or
//!   the engine already covers do not matter. From the first frame that does matter on, nothing is
//!   provable: the log is cut there, loudly, and the segment and all after it are kept under `set-aside/`.
//!   Nothing unreadable is deleted.
//!
//! # Who may delete
//!
//! A segment goes when every frame in it is older than the start of a verified snapshot that is itself kept
//! ([`Segments::release`]).

pub(in crate::store) mod disk;
pub(in crate::store) mod frame;
mod live;
pub(in crate::store) mod segment;

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use self::disk::{Disk, is_no_room};
use self::frame::End;
use self::segment::{BadHeader, Header, Maker, Segment};
use super::set_aside::free_name;

pub(in crate::store) use self::live::LiveError;

/// Where files go that nobody may lose but nobody can use.
pub(in crate::store) const SET_ASIDE: &str = "set-aside";

/// A segment on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Kept {
    number: u64,
    header: Result<Header, BadHeader>,
    size: u64,
}

/// The log as it is found at the start, before it is written to.
#[derive(Debug)]
pub(in crate::store) struct Shelf {
    disk: Arc<dyn Disk>,
    kept: Vec<Kept>,
}

/// Why the log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum ShelfError {
    /// The disk did not do what was asked.
    #[error("the log cannot be read: {0}")]
    Io(#[from] io::Error),
    /// A later program wrote it.
    #[error("log segment {number} has format {version}, newer than this program")]
    Newer {
        /// Which segment.
        number: u64,
        /// Its format.
        version: u32,
    },
    /// It belongs to another store.
    #[error("log segment {0} belongs to another store")]
    Foreign(u64),
}

/// Why a replay stopped before the end.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum ReplayError<E> {
    /// The log begins later.
    #[error("the log begins at frame {first}, after frame {wanted}")]
    NotCovered {
        /// The first frame that is there.
        first: u64,
        /// The frame that was asked for.
        wanted: u64,
    },
    /// The disk did not do what was asked.
    #[error("the log cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The frames could not be used.
    #[error(transparent)]
    Visit(E),
}

/// Where the log ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Tail {
    /// The number that the next frame gets.
    pub(in crate::store) next_frame: u64,
    /// What stands behind the last frame.
    pub(in crate::store) ending: Ending,
    /// Frames that are missing or bad but that nobody needs.
    pub(in crate::store) gaps: u64,
    /// Segments in which they are: they are not thrown away when they are released.
    damaged: Vec<u64>,
    /// The segment to go on with, and where.
    place: Option<(usize, u64)>,
    /// The last frame: its segment, its offset, its length.
    last: Option<(usize, u64, u64)>,
}

/// What stands behind the last provable frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Ending {
    /// Nothing.
    Clean,
    /// A write that was cut off and never promised.
    Torn,
    /// Something that was good once. Frames from here on are lost to us, and set aside.
    Rotten {
        /// The segment with the bad place.
        segment: u64,
        /// Where it begins.
        offset: u64,
    },
}

impl std::fmt::Debug for dyn Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Disk")
    }
}

impl Shelf {
    /// Looks at the names and headers of all segments.
    pub(in crate::store) fn look(
        disk: &Arc<dyn Disk>,
        store: [u8; 16],
    ) -> Result<Shelf, ShelfError> {
        disk.make_dir(segment::DIR)?;
        segment::sweep_temporaries(&**disk)?;
        let mut kept = Vec::new();
        for file in disk.list(segment::DIR)? {
            let Some(number) = segment::parse_name(&file) else {
                continue;
            };
            let file = disk.open(&segment::name(number))?;
            let size = file.length()?;
            let header = if size < segment::HEADER {
                Err(BadHeader::Rotten)
            } else {
                let mut bytes = [0; segment::HEADER as usize];
                file.read_at(&mut bytes, 0)?;
                Header::decode(&bytes)
            };
            match header {
                Err(BadHeader::Newer(version)) => {
                    return Err(ShelfError::Newer { number, version });
                }
                Ok(header) if header.store != store => return Err(ShelfError::Foreign(number)),
                // A file under another's name is as good as unreadable.
                Ok(header) if header.number != number => kept.push(Kept {
                    number,
                    header: Err(BadHeader::Rotten),
                    size,
                }),
                Ok(_) | Err(BadHeader::Rotten) => kept.push(Kept {
                    number,
                    header,
                    size,
                }),
            }
        }
        kept.sort_by_key(|kept| kept.number);
        Ok(Shelf {
            disk: Arc::clone(disk),
            kept,
        })
    }

    /// The first frame that is there, if any segment can be read.
    pub(in crate::store) fn first_frame(&self) -> Option<u64> {
        self.kept
            .iter()
            .find_map(|kept| kept.header.ok().map(|header| header.first_frame))
    }

    /// Bytes of the segments from the one on that holds a frame: at least what was written from there on.
    pub(in crate::store) fn bytes_from(&self, frame: u64) -> u64 {
        let holds = |kept: &Kept| {
            kept.header
                .is_ok_and(|header| header.first_frame <= frame.max(1))
        };
        let from = self.kept.iter().rposition(holds).unwrap_or(0);
        self.kept[from..].iter().map(|kept| kept.size).sum()
    }

    fn read(&self, index: usize) -> io::Result<Bytes> {
        let kept = &self.kept[index];
        let file = self.disk.open(&segment::name(kept.number))?;
        let length = usize::try_from(kept.size).map_err(io::Error::other)?;
        let mut data = vec![0; length];
        file.read_at(&mut data, 0)?;
        Ok(Bytes::from(data))
    }

    /// Hands every frame from `from` on to `visit`, in order, and says where the log ends. A log that ends before `from`
    /// hands out nothing.
    pub(in crate::store) fn replay<E>(
        &self,
        from: u64,
        visit: &mut dyn FnMut(u64, Bytes) -> Result<(), E>,
    ) -> Result<Tail, ReplayError<E>> {
        let Some(start) = self
            .kept
            .iter()
            .rposition(|kept| kept.header.is_ok_and(|header| header.first_frame <= from))
        else {
            return match self.first_frame() {
                Some(first) => Err(ReplayError::NotCovered {
                    first,
                    wanted: from,
                }),
                // No segment, or none that can be read.
                None => Ok(Tail {
                    next_frame: from,
                    ending: match self.kept.first() {
                        None => Ending::Clean,
                        Some(kept) => Ending::Rotten {
                            segment: kept.number,
                            offset: 0,
                        },
                    },
                    gaps: 0,
                    damaged: Vec::new(),
                    place: None,
                    last: None,
                }),
            };
        };
        let mut tail = Tail {
            next_frame: from,
            ending: Ending::Clean,
            gaps: 0,
            damaged: Vec::new(),
            place: None,
            last: None,
        };
        let mut expected = None;
        for (index, kept) in self.kept.iter().enumerate().skip(start) {
            let rotten = |offset| Ending::Rotten {
                segment: kept.number,
                offset,
            };
            let header = match kept.header {
                Ok(header) if expected.is_none_or(|number| number == header.first_frame) => header,
                Ok(_) | Err(_) => {
                    tail.ending = rotten(0);
                    break;
                }
            };
            let data = self.read(index)?;
            let scan = frame::scan(
                &data,
                segment::HEADER as usize,
                header.seed(),
                header.first_frame,
                from,
            );
            if !scan.gaps.is_empty() {
                tail.damaged.push(kept.number);
            }
            tail.gaps += scan.gaps.iter().map(|gap| gap.end - gap.start).sum::<u64>();
            for found in &scan.frames {
                if found.number >= from {
                    visit(found.number, data.slice(found.payload.clone()))
                        .map_err(ReplayError::Visit)?;
                }
            }
            if let Some(last) = scan.frames.last() {
                let begin = (last.payload.start - frame::HEADER) as u64;
                tail.last = Some((index, begin, last.end as u64 - begin));
            }
            let next = scan
                .frames
                .last()
                .map_or(header.first_frame, |last| last.number + 1);
            expected = Some(next);
            tail.next_frame = next;
            let (offset, ending) = match scan.end {
                End::Clean { offset } => (offset as u64, Ending::Clean),
                End::Torn { offset } => (offset as u64, Ending::Torn),
                End::Rotten { offset, .. } => (offset as u64, rotten(offset as u64)),
            };
            tail.place = Some((index, offset));
            tail.ending = ending;
            let goes_on = self
                .kept
                .get(index + 1)
                .is_some_and(|after| after.header.is_ok_and(|header| header.first_frame == next));
            match tail.ending {
                // Whatever stands behind the last frame of a segment that the next one continues was never a frame.
                Ending::Clean | Ending::Torn if goes_on => {}
                Ending::Clean | Ending::Torn => {
                    // Later segments that do not continue this one: what connects them is missing.
                    if index + 1 < self.kept.len() {
                        tail.ending = rotten(offset);
                    }
                    break;
                }
                Ending::Rotten { .. } => break,
            }
        }
        Ok(tail)
    }

    /// The segments that [`Shelf::take_over`] would set aside, whole or from a place on.
    pub(in crate::store) fn unprovable(&self, tail: &Tail) -> Vec<String> {
        if !matches!(tail.ending, Ending::Rotten { .. }) {
            return Vec::new();
        }
        let first = tail.place.map_or(0, |(index, _)| index);
        self.kept[first..]
            .iter()
            .map(|kept| segment::name(kept.number))
            .collect()
    }

    /// Takes the log over for writing, with `next_frame` as the number of the next frame. What is unprovable goes
    /// under `set-aside/` with `stamp` in its name; the names are returned. Everything that was replayed is safe when
    /// this returns.
    pub(in crate::store) fn take_over(
        self,
        tail: &Tail,
        next_frame: u64,
        maker: Maker,
        stamp: &str,
    ) -> Result<(Log, Vec<String>), io::Error> {
        let mut aside = Vec::new();
        let mut kept = self.kept;
        if let Ending::Rotten { .. } = tail.ending {
            self.disk.make_dir(SET_ASIDE)?;
            let first_bad = tail.place.map_or(0, |(index, _)| index + 1);
            if let Some((index, _)) = tail.place {
                let from = segment::name(kept[index].number);
                let to = format!("{SET_ASIDE}/{stamp}-{:010}.seg", kept[index].number);
                copy(&*self.disk, &from, &to)?;
                aside.push(to);
            }
            for bad in kept.drain(first_bad..).rev() {
                let to = format!("{SET_ASIDE}/{stamp}-{:010}.seg", bad.number);
                self.disk.rename(&segment::name(bad.number), &to)?;
                aside.push(to);
            }
            self.disk.sync_dir(SET_ASIDE)?;
            self.disk.sync_dir(segment::DIR)?;
        }
        if let Some((index, begin, length)) = tail.last {
            let file = self.disk.open(&segment::name(kept[index].number))?;
            let mut frame = vec![0; usize::try_from(length).map_err(io::Error::other)?];
            file.read_at(&mut frame, begin)?;
            file.write_at(&frame, begin)?;
            file.sync()?;
        }
        let resumed = match tail.place {
            Some((index, offset)) => {
                let file = self.disk.open(&segment::name(kept[index].number))?;
                let size = kept[index].size;
                if tail.ending != Ending::Clean {
                    wipe(&*file, offset, size)?;
                }
                kept[index].header.ok().map(|header| Segment {
                    header,
                    file,
                    offset,
                    size,
                })
            }
            None => None,
        };
        let next_number = kept.last().map_or(1, |kept| kept.number + 1);
        let current = match resumed {
            Some(segment) if next_frame == tail.next_frame => segment,
            // Nothing there, or frames are missing between it and what we know: begin anew.
            Some(_) | None => maker.make(next_number, next_frame, 0)?,
        };
        let mut list: Vec<SegmentInfo> = kept
            .iter()
            .filter_map(|kept| {
                kept.header.ok().map(|header| SegmentInfo {
                    number: kept.number,
                    first_frame: header.first_frame,
                    size: kept.size,
                    damaged: tail.damaged.contains(&kept.number),
                })
            })
            .collect();
        if list
            .last()
            .is_none_or(|last| last.number < current.header.number)
        {
            list.push(SegmentInfo::of(&current));
        }
        let log = Log {
            maker,
            segments: Arc::new(Segments {
                disk: self.disk,
                list: Mutex::new(list),
                holds: Mutex::new(Vec::new()),
            }),
            current,
            next_frame,
            failed: None,
        };
        Ok((log, aside))
    }
}

/// Copies a file and makes the copy safe (but not its name).
fn copy(disk: &dyn Disk, from: &str, to: &str) -> io::Result<()> {
    const STEP: u64 = 1 << 20;
    let (source, target) = (disk.open(from)?, disk.create(to)?);
    let length = source.length()?;
    let mut at = 0;
    while at < length {
        let step = (length - at).min(STEP);
        let mut piece = vec![0; step as usize];
        source.read_at(&mut piece, at)?;
        target.write_at(&piece, at)?;
        at += step;
    }
    target.sync()
}

/// Overwrites what is not zero from `offset` on, and makes that safe.
fn wipe(file: &dyn disk::DiskFile, offset: u64, size: u64) -> io::Result<()> {
    const STEP: u64 = 1 << 20;
    let mut at = offset;
    while at < size {
        let step = (size - at).min(STEP);
        let mut piece = vec![0; step as usize];
        file.read_at(&mut piece, at)?;
        if piece.iter().any(|byte| *byte != 0) {
            piece.fill(0);
            file.write_at(&piece, at)?;
        }
        at += step;
    }
    file.sync()
}

/// A segment, as the list of segments knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SegmentInfo {
    number: u64,
    first_frame: u64,
    size: u64,
    /// The start found bad places in it.
    damaged: bool,
}

impl SegmentInfo {
    fn of(segment: &Segment) -> SegmentInfo {
        SegmentInfo {
            number: segment.header.number,
            first_frame: segment.header.first_frame,
            size: segment.size,
            damaged: false,
        }
    }
}

/// The segments that are kept. The committer adds, the keeper of snapshots releases.
pub(in crate::store) struct Segments {
    disk: Arc<dyn Disk>,
    list: Mutex<Vec<SegmentInfo>>,
    /// Frames from which on somebody reads: one entry for each [`Hold`].
    holds: Mutex<Vec<(u64, Arc<()>)>>,
}

/// Keeps segments from being released as long as it lives. Made with [`Segments::hold`].
pub(in crate::store) struct Hold {
    segments: Arc<Segments>,
    mark: Arc<()>,
}

impl Hold {
    /// From now on only frames from `frame` on are needed.
    pub(in crate::store) fn narrow(&self, frame: u64) {
        for (held, mark) in self.segments.holds().iter_mut() {
            if Arc::ptr_eq(mark, &self.mark) {
                *held = frame;
            }
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.segments
            .holds()
            .retain(|(_, mark)| !Arc::ptr_eq(mark, &self.mark));
    }
}

impl Segments {
    fn lock(&self) -> MutexGuard<'_, Vec<SegmentInfo>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn holds(&self) -> MutexGuard<'_, Vec<(u64, Arc<()>)>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps every segment that is there until the hold is [narrowed](Hold::narrow) or dropped.
    pub(in crate::store) fn hold(self: &Arc<Segments>) -> Hold {
        let mark = Arc::new(());
        self.holds().push((0, Arc::clone(&mark)));
        Hold {
            segments: Arc::clone(self),
            mark,
        }
    }

    /// Bytes and number of all segments.
    pub(in crate::store) fn size(&self) -> (u64, u64) {
        let list = self.lock();
        (
            list.iter().map(|segment| segment.size).sum(),
            list.len() as u64,
        )
    }

    /// Bytes of the segments that hold frames from `frame` on.
    pub(in crate::store) fn size_from(&self, frame: u64) -> u64 {
        let list = self.lock();
        let start = list
            .iter()
            .rposition(|segment| segment.first_frame <= frame)
            .unwrap_or(0);
        // The last one may be as good as empty.
        let end = list.len().saturating_sub(1);
        list.get(start..end)
            .map_or(0, |kept| kept.iter().map(|segment| segment.size).sum())
    }

    /// Deletes the segments whose frames are all below `frame` and that nobody [holds](Segments::hold); the last one
    /// always stays. Each is read first, on the caller's thread: one with a place in it that cannot be read is kept aside, because
    /// what is there may be wanted by whoever salvages. Answers how many went.
    pub(in crate::store) fn release(&self, frame: u64) -> io::Result<usize> {
        let mut released = 0;
        loop {
            let (oldest, end) = {
                let list = self.lock();
                // Looked at each time: a hold may begin between two segments.
                let held = self.holds().iter().map(|(frame, _)| *frame).min();
                let needed = held.map_or(frame, |held| frame.min(held));
                match list.as_slice() {
                    [oldest, next, ..] if next.first_frame <= needed => (*oldest, next.first_frame),
                    _ => break,
                }
            };
            let name = segment::name(oldest.number);
            let damaged = oldest.damaged || !self.is_whole(&oldest, end);
            let gone = if damaged {
                tracing::error!(
                    file = name,
                    "a log segment that is not needed any more cannot be read in whole and is kept under set-aside/; have the disk checked"
                );
                // Not under a name like those that a start gives: its frames are no history of their own.
                let stem = format!("released-{:010}", oldest.number);
                let to = free_name(&*self.disk, &stem, "segment")?;
                let moved = self.disk.rename(&name, &to);
                self.disk.sync_dir(SET_ASIDE)?;
                moved
            } else {
                self.disk.remove(&name)
            };
            match gone {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                Ok(()) | Err(_) => {}
            }
            self.lock().remove(0);
            released += 1;
        }
        if released > 0 {
            self.disk.sync_dir(segment::DIR)?;
        }
        Ok(released)
    }
}

/// Why a frame is not in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum AppendError {
    /// There is no room; nothing was written.
    NoRoom(String),
    /// A write or a sync failed, now or before.
    Failed(String),
}

/// The log, open for writing.
pub(in crate::store) struct Log {
    maker: Maker,
    segments: Arc<Segments>,
    current: Segment,
    next_frame: u64,
    failed: Option<String>,
}

impl Log {
    /// The segments, for statistics and release.
    pub(in crate::store) fn segments(&self) -> &Arc<Segments> {
        &self.segments
    }

    /// The number that the next frame gets.
    pub(in crate::store) fn next_frame(&self) -> u64 {
        self.next_frame
    }

    /// From now on segments are made ready in the background.
    pub(in crate::store) fn make_ahead(&mut self) -> io::Result<()> {
        self.maker.make_ahead()
    }

    /// Finds room for a frame of `length` bytes, header and padding included, and says which number and seed it
    /// must be sealed with.
    pub(in crate::store) fn make_room(&mut self, length: usize) -> Result<(u64, u32), AppendError> {
        if let Some(why) = &self.failed {
            return Err(AppendError::Failed(why.clone()));
        }
        let length = length.next_multiple_of(frame::ALIGNMENT) as u64;
        if self.current.offset + length > self.current.size {
            let number = self.current.header.number + 1;
            match self.maker.make(number, self.next_frame, length) {
                Ok(segment) => {
                    self.segments.lock().push(SegmentInfo::of(&segment));
                    self.current = segment;
                }
                Err(error) if is_no_room(&error) => {
                    return Err(AppendError::NoRoom(error.to_string()));
                }
                Err(error) => {
                    return Err(self.poison("a new log segment could not be made", &error));
                }
            }
        }
        Ok((self.next_frame, self.current.header.seed()))
    }

    /// Writes a sealed frame and syncs it. `Ok` is the promise.
    pub(in crate::store) fn write(&mut self, frame: &[u8]) -> Result<(), AppendError> {
        if let Some(why) = &self.failed {
            return Err(AppendError::Failed(why.clone()));
        }
        if let Err(error) = self.current.file.write_at(frame, self.current.offset) {
            return Err(self.poison("a write to the log failed", &error));
        }
        if let Err(error) = self.current.file.sync() {
            return Err(self.poison("a sync of the log failed", &error));
        }
        self.current.offset += frame.len() as u64;
        self.next_frame += 1;
        Ok(())
    }

    /// Writes a sealed frame without a sync, for a log that nobody was promised anything of yet: [`Log::settle`] must
    /// follow, and come before each new segment.
    pub(in crate::store) fn write_later(&mut self, frame: &[u8]) -> io::Result<()> {
        self.current.file.write_at(frame, self.current.offset)?;
        self.current.offset += frame.len() as u64;
        self.next_frame += 1;
        Ok(())
    }

    /// Whether a frame of this length still fits into the current segment.
    pub(in crate::store) fn fits(&self, length: usize) -> bool {
        let length = length.next_multiple_of(frame::ALIGNMENT) as u64;
        self.current.offset + length <= self.current.size
    }

    /// Syncs what was written into the current segment.
    pub(in crate::store) fn settle(&mut self) -> io::Result<()> {
        self.current.file.sync()
    }

    fn poison(&mut self, what: &str, error: &io::Error) -> AppendError {
        let why = format!("{what}: {error}");
        tracing::error!(
            why,
            "nothing more is promised until a restart; check the disk first"
        );
        self.failed = Some(why.clone());
        AppendError::Failed(why)
    }
}
