//! Backups: everything that lives, as it was right after one frame, in one file.
//!
//! A backup is made while the store serves, by the same reasoning as a snapshot (`snapshot.rs`): the frame that the engine
//! takes next is noted, then the engine is walked over while writes go on, then every frame logged from the noted one up to the
//! end of the walk is added. Loading the entries and replaying the frames is the state right after the last of them, because
//! frames write absolute values. Unlike a snapshot it needs no log to be of use, so it can be kept anywhere.
//!
//! ```text
//! header   "BWBACKUP"  u32 version  u32 CRC-32C of the header without it
//!          u64 first frame  u64 begun at (Unix ms)  16 bytes store  32 bytes mark of the hash key
//!          u32 run  u8 length of the program's version, 3 zeros, 32 bytes program's version  8 zeros
//! blocks   u32 kind  u32 length  u32 CRC-32C over the block's place (u64: 0, 1, 2 and so on), kind, length and payload  payload
//!   1 entries  one after the other, keys rising: u16 key length, u32 value length, key, value
//!   2 frames   one after the other, without a gap: u64 number, u32 length, payload as in the log
//!   3 end      u64 last frame, entries, bytes of entries, frames, bytes of frames, records left out, finished at (Unix ms);
//!              32 bytes SHA-256 over every byte before this block and over the seven numbers. Nothing follows.
//! ```
//!
//! All numbers are little endian. The checksum of a block finds where a file is damaged; the digest at the end says that the
//! file is the one that was written, with every block in its place. A file without its end is no backup.
//!
//! The walk goes page by page, and nothing of the store is locked while a page is handed to whoever takes it, so somebody slow
//! slows nobody. Memory: one block, or one frame.

mod check;
pub(in crate::store) mod erasures;
mod read;
mod restore;
pub(in crate::store) mod schedule;
mod unpack;
mod write;

pub use self::check::Checker;
pub use self::read::{BackupFault, verify};
pub use self::restore::{
    Applied, Contents, ErasureSource, Restore, RestoreError, RestoreStep, Restored, UserHash,
    is_unfinished, restore,
};
pub(in crate::store) use self::restore::{BUILDING, REPLACED};
#[cfg(test)]
pub(in crate::store) use self::unpack::Unpack;
pub(in crate::store) use self::write::{Copier, Tools};

use self::read::Parser;
use super::log::frame;
use super::{keys, record};

const MAGIC: [u8; 8] = *b"BWBACKUP";
/// The format that is written.
const VERSION: u32 = 1;
const HEADER: usize = 128;
const PROGRAM_MAX: usize = 32;

/// Bytes before a block's payload.
const BLOCK_HEAD: usize = 12;
/// A block is closed once it holds this much.
const BLOCK: usize = 1 << 20;
const ENTRIES: u32 = 1;
const FRAMES: u32 = 2;
const END: u32 = 3;
const ENTRY_HEAD: usize = 6;
const FRAME_HEAD: usize = 12;
const TOTALS: usize = 7 * 8;
const END_LENGTH: usize = TOTALS + 32;

/// No block of this kind is larger: its last entry or frame may go over.
fn most(kind: u32) -> Option<usize> {
    match kind {
        ENTRIES => Some(BLOCK + ENTRY_HEAD + keys::KEY_MAX + record::RECORD_MAX),
        FRAMES => Some(BLOCK + FRAME_HEAD + frame::FRAME_MAX),
        END => Some(END_LENGTH),
        _ => None,
    }
}

/// What the header of a backup says; `None`: it is none that can be read.
fn head_of(header: &[u8; HEADER]) -> Option<crate::ports::BackupSummary> {
    let mut found = None;
    let read = Parser::new().feed(header, &mut |piece| {
        if let read::Piece::Head(head) = piece {
            found = Some(head.clone());
        }
        Ok(())
    });
    read.ok().and(found)
}

fn header_sum(header: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&header[..12]), &header[16..])
}

fn block_sum(place: u64, head: &[u8], payload: &[u8]) -> u32 {
    let sum = crc32c::crc32c(&place.to_le_bytes());
    crc32c::crc32c_append(crc32c::crc32c_append(sum, head), payload)
}
