//! The files of the log: their names, their headers, and the next one made ready before it is needed.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::disk::{Disk, DiskFile, fill_with_zeros};
use super::frame;
use crate::ports::Entropy;

/// Where segments are.
pub(in crate::store) const DIR: &str = "log";

/// Bytes before the first frame.
pub(in crate::store) const HEADER: u64 = 64;

const MAGIC: [u8; 8] = *b"BWLOGSEG";

/// The format that is written.
pub(in crate::store) const VERSION: u32 = 1;

/// The name of a segment that is being made ready.
const NEXT: &str = "log/next.tmp";
/// The name of a segment that is made in a hurry, for a frame that fits no other.
const HURRIED: &str = "log/hurried.tmp";

/// What the head of a segment says.
///
/// ```text
/// offset 0   magic        offset 16  u64  segment number    offset 32  16 bytes  salt
/// offset 8   u32 version  offset 24  u64  first frame       offset 48  16 bytes  store
/// offset 12  u32 CRC-32C over everything else
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Header {
    /// Rising by one.
    pub(in crate::store) number: u64,
    /// The number of the first frame in it.
    pub(in crate::store) first_frame: u64,
    /// Leads every checksum of this segment.
    pub(in crate::store) salt: [u8; 16],
    /// Which store it belongs to, so that files of two stores are never mixed up.
    pub(in crate::store) store: [u8; 16],
}

/// Why a header cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum BadHeader {
    /// Written by a later program.
    Newer(u32),
    /// Not a header.
    Rotten,
}

impl Header {
    pub(in crate::store) fn encode(&self) -> [u8; HEADER as usize] {
        let mut bytes = [0; HEADER as usize];
        bytes[0..8].copy_from_slice(&MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.number.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.first_frame.to_le_bytes());
        bytes[32..48].copy_from_slice(&self.salt);
        bytes[48..64].copy_from_slice(&self.store);
        let sum = Self::checksum(&bytes);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn checksum(bytes: &[u8; HEADER as usize]) -> u32 {
        crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..])
    }

    pub(in crate::store) fn decode(bytes: &[u8]) -> Result<Header, BadHeader> {
        let Some(bytes) = bytes.first_chunk::<{ HEADER as usize }>() else {
            return Err(BadHeader::Rotten);
        };
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let id = |at: usize| {
            let mut id = [0; 16];
            id.copy_from_slice(&bytes[at..at + 16]);
            id
        };
        if bytes[0..8] != MAGIC || word(12) != Self::checksum(bytes) {
            return Err(BadHeader::Rotten);
        }
        match word(8) {
            VERSION => Ok(Header {
                number: long(16),
                first_frame: long(24),
                salt: id(32),
                store: id(48),
            }),
            0 => Err(BadHeader::Rotten),
            newer => Err(BadHeader::Newer(newer)),
        }
    }

    pub(in crate::store) fn seed(&self) -> u32 {
        frame::seed(&self.salt)
    }
}

/// The name of a segment.
pub(in crate::store) fn name(number: u64) -> String {
    format!("{DIR}/{number:010}.seg")
}

/// The number in a segment's name (without the directory).
pub(in crate::store) fn parse_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg")?;
    (digits.len() >= 10 && digits.bytes().all(|b| b.is_ascii_digit()))
        .then(|| digits.parse().ok())
        .flatten()
}

/// A segment that is written to.
pub(in crate::store) struct Segment {
    pub(in crate::store) header: Header,
    pub(in crate::store) file: Box<dyn DiskFile>,
    /// Where the next frame goes.
    pub(in crate::store) offset: u64,
    /// How far it was allocated.
    pub(in crate::store) size: u64,
}

/// Makes segments.
pub(in crate::store) struct Maker {
    disk: Arc<dyn Disk>,
    entropy: Arc<dyn Entropy>,
    store: [u8; 16],
    size: u64,
    ready: Option<Ready>,
}

/// The next segment, made ready by a thread of its own while the present one is written.
struct Ready {
    bench: Arc<Bench>,
    thread: Option<JoinHandle<()>>,
}

struct Bench {
    state: Mutex<BenchState>,
    changed: Condvar,
}

enum BenchState {
    /// Nothing is ready, nothing is asked for.
    Empty,
    /// Asked for, or under way.
    Wanted,
    /// Ready: zeros on disk, synced.
    Done(Box<dyn DiskFile>),
    /// The thread ends.
    Closed,
}

impl Maker {
    pub(in crate::store) fn new(
        disk: Arc<dyn Disk>,
        entropy: Arc<dyn Entropy>,
        store: [u8; 16],
        size: u64,
    ) -> Maker {
        Maker {
            disk,
            entropy,
            store,
            size,
            ready: None,
        }
    }

    /// From now on the next segment is made ready in the background.
    pub(in crate::store) fn make_ahead(&mut self) -> io::Result<()> {
        let bench = Arc::new(Bench {
            state: Mutex::new(BenchState::Wanted),
            changed: Condvar::new(),
        });
        let (disk, size, shared) = (Arc::clone(&self.disk), self.size, Arc::clone(&bench));
        let thread = std::thread::Builder::new()
            .name("store-segments".to_owned())
            .spawn(move || shared.run(&*disk, size))?;
        self.ready = Some(Ready {
            bench,
            thread: Some(thread),
        });
        Ok(())
    }

    /// A new segment for a first frame of `room` bytes, safe under its name.
    pub(in crate::store) fn make(
        &self,
        number: u64,
        first_frame: u64,
        room: u64,
    ) -> io::Result<Segment> {
        let size = self.size.max(HEADER + room);
        let prepared = match &self.ready {
            Some(ready) if size == self.size => ready.bench.take(),
            _ => None,
        };
        let (file, temporary) = match prepared {
            Some(file) => (file, NEXT),
            None => {
                let file = self.disk.create(HURRIED)?;
                if let Err(error) = file.allocate(size) {
                    // Give back what it took, or the full disk would stay a little fuller.
                    drop(file);
                    if let Err(error) = self.disk.remove(HURRIED) {
                        tracing::warn!(%error, "a segment that could not be allocated could not be removed");
                    }
                    return Err(error);
                }
                (file, HURRIED)
            }
        };
        let mut salt = [0; 16];
        self.entropy.fill(&mut salt);
        let header = Header {
            number,
            first_frame,
            salt,
            store: self.store,
        };
        file.write_at(&header.encode(), 0)?;
        file.sync()?;
        self.disk.rename(temporary, &name(number))?;
        self.disk.sync_dir(DIR)?;
        if let Some(ready) = &self.ready {
            ready.bench.want();
        }
        Ok(Segment {
            header,
            file,
            offset: HEADER,
            size,
        })
    }
}

impl Drop for Maker {
    fn drop(&mut self) {
        if let Some(ready) = &mut self.ready {
            ready.bench.close();
            if let Some(thread) = ready.thread.take()
                && thread.join().is_err()
            {
                tracing::error!("the thread that makes segments ready had panicked");
            }
            if let Err(error) = self.disk.remove(NEXT)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "a prepared segment could not be removed");
            }
        }
    }
}

impl Bench {
    fn lock(&self) -> std::sync::MutexGuard<'_, BenchState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is ready. Waits for what is under way: it is at least as far as a new one would be.
    fn take(&self) -> Option<Box<dyn DiskFile>> {
        let mut state = self.lock();
        loop {
            match std::mem::replace(&mut *state, BenchState::Empty) {
                BenchState::Done(file) => return Some(file),
                BenchState::Empty => return None,
                BenchState::Closed => {
                    *state = BenchState::Closed;
                    return None;
                }
                BenchState::Wanted => {
                    *state = BenchState::Wanted;
                    state = self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    fn want(&self) {
        let mut state = self.lock();
        if matches!(*state, BenchState::Empty) {
            *state = BenchState::Wanted;
            self.changed.notify_all();
        }
    }

    fn close(&self) {
        *self.lock() = BenchState::Closed;
        self.changed.notify_all();
    }

    fn run(&self, disk: &dyn Disk, size: u64) {
        loop {
            {
                let mut state = self.lock();
                loop {
                    match *state {
                        BenchState::Wanted => break,
                        BenchState::Closed => return,
                        BenchState::Empty | BenchState::Done(_) => {
                            state = self
                                .changed
                                .wait(state)
                                .unwrap_or_else(PoisonError::into_inner);
                        }
                    }
                }
            }
            let made = Self::prepare(disk, size);
            let mut state = self.lock();
            if matches!(*state, BenchState::Closed) {
                return;
            }
            *state = match made {
                Ok(file) => BenchState::Done(file),
                Err(error) => {
                    // The committer will meet the same trouble when it needs the segment, and answer for it.
                    tracing::warn!(%error, "the next log segment could not be made ready");
                    BenchState::Empty
                }
            };
            self.changed.notify_all();
        }
    }

    fn prepare(disk: &dyn Disk, size: u64) -> io::Result<Box<dyn DiskFile>> {
        let file = disk.create(NEXT)?;
        let made = file
            .allocate(size)
            .and_then(|()| fill_with_zeros(&*file, size))
            .and_then(|()| file.sync());
        match made {
            Ok(()) => Ok(file),
            Err(error) => {
                drop(file);
                disk.remove(NEXT)?;
                Err(error)
            }
        }
    }
}

/// Removes what an earlier run was making ready: it never held a frame.
pub(in crate::store) fn sweep_temporaries(disk: &dyn Disk) -> io::Result<()> {
    for file in disk.list(DIR)? {
        if file.ends_with(".tmp") {
            disk.remove(&format!("{DIR}/{file}"))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_header_is_read_back_and_every_flipped_bit_is_seen() {
        let header = Header {
            number: 7,
            first_frame: 1_000,
            salt: [3; 16],
            store: [4; 16],
        };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Header::decode(&bad), Err(BadHeader::Rotten), "bit {bit}");
        }
        assert_eq!(Header::decode(&bytes[..63]), Err(BadHeader::Rotten));
    }

    #[test]
    fn a_later_format_is_told_from_rot() {
        let mut bytes = Header {
            number: 1,
            first_frame: 1,
            salt: [0; 16],
            store: [0; 16],
        }
        .encode();
        bytes[8..12].copy_from_slice(&9u32.to_le_bytes());
        let sum = Header::checksum(&bytes);
        bytes[12..16].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(Header::decode(&bytes), Err(BadHeader::Newer(9)));
    }

    #[test]
    fn names_are_numbers() {
        assert_eq!(name(42), "log/0000000042.seg");
        assert_eq!(parse_name("0000000042.seg"), Some(42));
        assert_eq!(parse_name("next.tmp"), None);
        assert_eq!(parse_name("42.seg"), None);
    }
}
