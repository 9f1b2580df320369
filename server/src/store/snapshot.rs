//! Snapshots: everything that lives, in one file, so that the log need not be kept for ever.
//!
//! A snapshot is taken while the store serves. It is a walk over the engine, with writes going on beside it, so it shows no
//! single moment: keys early in the walk may be older than keys late in it. That is enough, because the frame that
//! the engine would take next when the walk begins is noted first. Loading the file and replaying the
//! log from that frame on writes every key again that can have changed during the walk, with absolute values.
//!
//! ```text
//! header   "BWSNAPSH"  u32 version  u32 CRC-32C of the rest of the header  u64 frame  u64 made at (Unix ms)  16 bytes store
//! blocks   u32 length  u32 CRC-32C of the payload  payload: entries of u16 key length, u32 value length, key, value
//! trailer  u32 0xffffffff  u32 CRC-32C of what follows  u64 entries  u64 bytes of all entries  u32 CRC-32C over all block sums
//! ```
//!
//! The file is written under another name, synced, read again in full, and only then gets its name. Two are kept, and the
//! log from the start of the older one on: should the newer one rot, the older still restores everything.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use super::engine::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite};
use super::keys;
use super::little::{u32_at, u64_at};
use super::log::disk::{Disk, DiskFile};
use super::record;
use super::set_aside::SetAside;

/// Where snapshots are.
pub(super) const DIR: &str = "snapshots";
const TEMPORARY: &str = "snapshots/next.tmp";

const MAGIC: [u8; 8] = *b"BWSNAPSH";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const TRAILER: usize = 28;
const TRAILER_MARK: u32 = u32::MAX;

/// A block is closed once it holds this much.
const BLOCK: usize = 1 << 20;
/// No block is larger: the last entry may go over.
const BLOCK_MAX: usize = BLOCK + record::RECORD_MAX + keys::KEY_MAX + ENTRY_HEAD;
const ENTRY_HEAD: usize = 6;

/// What a snapshot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Info {
    /// The first frame that must be replayed over it.
    pub(super) frame: u64,
    /// When it was made, Unix milliseconds.
    pub(super) made_ms: u64,
    pub(super) entries: u64,
    /// Bytes of keys and values.
    pub(super) bytes: u64,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error("format {0} is newer than this program")]
    Newer(u32),
    #[error("it is damaged: {0}")]
    Rotten(&'static str),
    #[error("it belongs to another store")]
    Foreign,
    #[error("the server is going down")]
    Interrupted,
}

/// The name of the snapshot that starts at a frame.
pub(super) fn name(frame: u64) -> String {
    format!("{DIR}/{frame:020}.snap")
}

/// The frames of the snapshots that are there, oldest first.
pub(super) fn list(disk: &dyn Disk) -> io::Result<Vec<u64>> {
    let mut frames: Vec<u64> = disk
        .list(DIR)?
        .iter()
        .filter_map(|file| file.strip_suffix(".snap")?.parse().ok())
        .collect();
    frames.sort_unstable();
    Ok(frames)
}

/// What a walk needs to know and to ask.
pub(super) struct Surroundings<'a> {
    pub(super) disk: &'a dyn Disk,
    pub(super) store: [u8; 16],
    pub(super) now_ms: u64,
    pub(super) aside: &'a SetAside,
    /// Called after each block; may wait, so that the walk leaves room for others, or end it.
    pub(super) breathe: &'a dyn Fn() -> ControlFlow<()>,
}

/// Takes a snapshot, verifies it and gives it its name. Safe when this returns.
pub(super) fn take(engine: &dyn Engine, around: &Surroundings<'_>) -> Result<Info, SnapshotError> {
    around.disk.make_dir(DIR)?;
    // Before the walk: see the head of this file.
    let frame = engine.position()?.unwrap_or(1);
    let taken = write(engine, frame, around).and_then(|wrote| {
        let read = read(around.disk, TEMPORARY, around.store, &mut |_, _| Ok(()))?;
        if read == wrote {
            Ok(read)
        } else {
            Err(SnapshotError::Rotten(
                "it reads differently than it was written",
            ))
        }
    });
    match taken {
        Ok(info) => {
            publish(around.disk, frame)?;
            Ok(info)
        }
        Err(error) => {
            // Half a snapshot only takes room that a full disk lacks.
            if let Err(error) = around.disk.remove(TEMPORARY)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(%error, "an unfinished snapshot could not be removed");
            }
            Err(error)
        }
    }
}

fn write(
    engine: &dyn Engine,
    frame: u64,
    around: &Surroundings<'_>,
) -> Result<Info, SnapshotError> {
    let mut writer = Writer::create(around.disk, frame, around.now_ms, around.store)?;
    let mut trouble = None;
    engine.scan(&[]..&[u8::MAX], Direction::Up, &mut |key, value| {
        // The engine's own note of where it stands is not part of what it holds.
        if key == keys::POSITION {
            return ControlFlow::Continue(());
        }
        match record::verify(key, value) {
            Ok(()) => {}
            Err(fault @ record::Fault::Rotten(_)) => {
                around.aside.record(key, value, fault);
                return ControlFlow::Continue(());
            }
            Err(record::Fault::Newer(version)) => {
                trouble = Some(SnapshotError::Newer(u32::from(version)));
                return ControlFlow::Break(());
            }
        }
        match writer.add(key, value) {
            Ok(false) => return ControlFlow::Continue(()),
            Ok(true) => {}
            Err(error) => {
                trouble = Some(error.into());
                return ControlFlow::Break(());
            }
        }
        let flow = (around.breathe)();
        if flow.is_break() {
            trouble = Some(SnapshotError::Interrupted);
        }
        flow
    })?;
    if let Some(trouble) = trouble {
        return Err(trouble);
    }
    Ok(writer.finish()?)
}

/// A snapshot that is being written, under its temporary name.
pub(super) struct Writer {
    file: Box<dyn DiskFile>,
    info: Info,
    offset: u64,
    /// Begins with room for length and sum.
    block: Vec<u8>,
    sums: u32,
}

impl Writer {
    pub(super) fn create(
        disk: &dyn Disk,
        frame: u64,
        now_ms: u64,
        store: [u8; 16],
    ) -> io::Result<Writer> {
        let file = disk.create(TEMPORARY)?;
        let mut header = [0; HEADER];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&frame.to_le_bytes());
        header[24..32].copy_from_slice(&now_ms.to_le_bytes());
        header[32..48].copy_from_slice(&store);
        let sum = crc32c::crc32c(&header[16..]);
        header[12..16].copy_from_slice(&sum.to_le_bytes());
        file.write_at(&header, 0)?;
        Ok(Writer {
            file,
            info: Info {
                frame,
                made_ms: now_ms,
                entries: 0,
                bytes: 0,
            },
            offset: HEADER as u64,
            block: vec![0; 8],
            sums: 0,
        })
    }

    /// Adds an entry; keys rise. `true`: a block was closed, and others may breathe.
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) -> io::Result<bool> {
        self.info.entries += 1;
        self.info.bytes += (key.len() + value.len()) as u64;
        // Both are far below: keys::KEY_MAX and record::RECORD_MAX.
        self.block
            .extend_from_slice(&(key.len() as u16).to_le_bytes());
        self.block
            .extend_from_slice(&(value.len() as u32).to_le_bytes());
        self.block.extend_from_slice(key);
        self.block.extend_from_slice(value);
        if self.block.len() < BLOCK {
            return Ok(false);
        }
        self.close()?;
        Ok(true)
    }

    fn close(&mut self) -> io::Result<()> {
        let payload = self.block.len() - 8;
        if payload == 0 {
            return Ok(());
        }
        let sum = crc32c::crc32c(&self.block[8..]);
        self.sums = crc32c::crc32c_append(self.sums, &sum.to_le_bytes());
        self.block[0..4].copy_from_slice(&(payload as u32).to_le_bytes());
        self.block[4..8].copy_from_slice(&sum.to_le_bytes());
        self.file.write_at(&self.block, self.offset)?;
        self.offset += self.block.len() as u64;
        self.block.truncate(8);
        Ok(())
    }

    /// Writes the end and makes the content safe; the name is still the temporary one.
    pub(super) fn finish(mut self) -> io::Result<Info> {
        self.close()?;
        let mut trailer = [0; TRAILER];
        trailer[0..4].copy_from_slice(&TRAILER_MARK.to_le_bytes());
        trailer[8..16].copy_from_slice(&self.info.entries.to_le_bytes());
        trailer[16..24].copy_from_slice(&self.info.bytes.to_le_bytes());
        trailer[24..28].copy_from_slice(&self.sums.to_le_bytes());
        let sum = crc32c::crc32c(&trailer[8..]);
        trailer[4..8].copy_from_slice(&sum.to_le_bytes());
        self.file.write_at(&trailer, self.offset)?;
        self.file.sync()?;
        Ok(self.info)
    }
}

/// Gives a finished snapshot its name. Safe when this returns.
pub(super) fn publish(disk: &dyn Disk, frame: u64) -> io::Result<()> {
    disk.rename(TEMPORARY, &name(frame))?;
    disk.sync_dir(DIR)
}

/// What a reader of a snapshot is told about each entry.
pub(super) type Visit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<(), SnapshotError>;

/// Reads a snapshot. Entries are handed on as they come; only `Ok` says that all of them were what was written.
pub(super) fn read(
    disk: &dyn Disk,
    name: &str,
    store: [u8; 16],
    visit: Visit<'_>,
) -> Result<Info, SnapshotError> {
    parse(&*disk.open(name)?, Some(store), visit)
}

/// Bytes of keys and values in a snapshot, by its last words alone. For judging sizes; whether it is whole is [`read`]'s to say.
pub(super) fn live_bytes(disk: &dyn Disk, frame: u64) -> Option<u64> {
    let file = disk.open(&name(frame)).ok()?;
    let at = file.length().ok()?.checked_sub(TRAILER as u64)?;
    let mut trailer = [0; TRAILER];
    file.read_at(&mut trailer, at).ok()?;
    (u32_at(&trailer, 0) == TRAILER_MARK && u32_at(&trailer, 4) == crc32c::crc32c(&trailer[8..]))
        .then(|| u64_at(&trailer, 16))
}

/// Reads a snapshot from an open file. `store`: which store it must belong to.
pub(super) fn parse(
    file: &dyn DiskFile,
    store: Option<[u8; 16]>,
    visit: Visit<'_>,
) -> Result<Info, SnapshotError> {
    const SHORT: SnapshotError = SnapshotError::Rotten("it is cut short");
    let length = file.length()?;
    let mut header = [0; HEADER];
    if length < HEADER as u64 {
        return Err(SHORT);
    }
    file.read_at(&mut header, 0)?;
    if header[0..8] != MAGIC || u32_at(&header, 12) != crc32c::crc32c(&header[16..]) {
        return Err(SnapshotError::Rotten("its header is not one"));
    }
    match u32_at(&header, 8) {
        VERSION => {}
        0 => return Err(SnapshotError::Rotten("its header has no version")),
        newer => return Err(SnapshotError::Newer(newer)),
    }
    if store.is_some_and(|store| header[32..48] != store) {
        return Err(SnapshotError::Foreign);
    }
    let mut info = Info {
        frame: u64_at(&header, 16),
        made_ms: u64_at(&header, 24),
        entries: 0,
        bytes: 0,
    };
    let mut offset = HEADER as u64;
    let mut sums = 0;
    let mut payload = Vec::new();
    loop {
        let mut head = [0; 8];
        if length - offset < 8 {
            return Err(SHORT);
        }
        file.read_at(&mut head, offset)?;
        if u32_at(&head, 0) == TRAILER_MARK {
            let mut trailer = [0; TRAILER];
            if length - offset != TRAILER as u64 {
                return Err(SnapshotError::Rotten("its trailer is not at its end"));
            }
            file.read_at(&mut trailer, offset)?;
            if u32_at(&trailer, 4) != crc32c::crc32c(&trailer[8..])
                || u64_at(&trailer, 8) != info.entries
                || u64_at(&trailer, 16) != info.bytes
                || u32_at(&trailer, 24) != sums
            {
                return Err(SnapshotError::Rotten("its trailer does not match"));
            }
            return Ok(info);
        }
        let size = u32_at(&head, 0) as usize;
        offset += 8;
        if size > BLOCK_MAX || length - offset < size as u64 {
            return Err(SnapshotError::Rotten("a block has an impossible length"));
        }
        payload.resize(size, 0);
        file.read_at(&mut payload, offset)?;
        offset += size as u64;
        let sum = crc32c::crc32c(&payload);
        if sum != u32_at(&head, 4) {
            return Err(SnapshotError::Rotten("a block's checksum does not match"));
        }
        sums = crc32c::crc32c_append(sums, &sum.to_le_bytes());
        let mut rest = payload.as_slice();
        while !rest.is_empty() {
            let (key, value, after) =
                entry(rest).ok_or(SnapshotError::Rotten("an entry leaves its block"))?;
            info.entries += 1;
            info.bytes += (key.len() + value.len()) as u64;
            visit(key, value)?;
            rest = after;
        }
    }
}

fn entry(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<ENTRY_HEAD>()?;
    let [k0, k1, v0, v1, v2, v3] = *head;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([k0, k1])))?;
    let (value, rest) = rest.split_at_checked(u32::from_le_bytes([v0, v1, v2, v3]) as usize)?;
    Some((key, value, rest))
}

/// Reads a snapshot to its end and believes only what checks. `store`: which store it must belong to.
pub(super) fn check(
    disk: &dyn Disk,
    frame: u64,
    store: Option<[u8; 16]>,
) -> Result<Info, SnapshotError> {
    let info = parse(&*disk.open(&name(frame))?, store, &mut |_, _| Ok(()))?;
    if info.frame != frame {
        return Err(SnapshotError::Rotten("its name is another's"));
    }
    Ok(info)
}

/// Which store a snapshot belongs to, by its head.
pub(super) fn store_of(disk: &dyn Disk, frame: u64) -> Result<[u8; 16], SnapshotError> {
    let file = disk.open(&name(frame))?;
    let mut header = [0; HEADER];
    if file.length()? < HEADER as u64 {
        return Err(SnapshotError::Rotten("it is cut short"));
    }
    file.read_at(&mut header, 0)?;
    if header[0..8] != MAGIC || u32_at(&header, 12) != crc32c::crc32c(&header[16..]) {
        return Err(SnapshotError::Rotten("its header is not one"));
    }
    let mut store = [0; 16];
    store.copy_from_slice(&header[32..48]);
    Ok(store)
}

/// Loads a snapshot that was verified into an empty engine and sets its position.
pub(super) fn pour(
    disk: &dyn Disk,
    frame: u64,
    store: Option<[u8; 16]>,
    engine: &dyn Engine,
) -> Result<(), SnapshotError> {
    let mut batch = Vec::with_capacity(BATCH_OPERATIONS);
    parse(&*disk.open(&name(frame))?, store, &mut |key, value| {
        batch.push(EngineWrite {
            key: Bytes::copy_from_slice(key),
            value: Some(Bytes::copy_from_slice(value)),
        });
        if batch.len() + 1 >= BATCH_OPERATIONS {
            engine.apply(&batch, None)?;
            batch.clear();
        }
        Ok(())
    })?;
    engine.apply(&batch, Some(frame))?;
    Ok(())
}

/// Verifies a snapshot, then loads it into an empty engine and sets its position.
pub(super) fn load(
    disk: &dyn Disk,
    frame: u64,
    store: [u8; 16],
    engine: &Arc<dyn Engine>,
) -> Result<Info, SnapshotError> {
    let name = name(frame);
    let info = read(disk, &name, store, &mut |_, _| Ok(()))?;
    if info.frame != frame {
        return Err(SnapshotError::Rotten("its name is another's"));
    }
    pour(disk, frame, Some(store), &**engine)?;
    Ok(info)
}
