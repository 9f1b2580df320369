//! Reading a backup: every byte is checked, whatever is done with it.

use std::io::{self, Read};

use aws_lc_rs::digest;
use bytes::Bytes;

use super::{
    BLOCK_HEAD, END, END_LENGTH, ENTRIES, ENTRY_HEAD, FRAME_HEAD, FRAMES, HEADER, MAGIC,
    PROGRAM_MAX, TOTALS, VERSION, block_sum, header_sum, most,
};
use crate::ports::BackupSummary;
use crate::store::little::{array_at, u32_at, u64_at};
use crate::store::record::{self, Fault};
use crate::store::write::{self, Write};

/// Why a file is no backup that can be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupFault {
    /// The file could not be read.
    #[error("it cannot be read: {0}")]
    Io(#[from] io::Error),
    /// It does not begin like a backup.
    #[error("it is no backup of bellwire: it does not begin like one")]
    Foreign,
    /// A later program wrote it.
    #[error(
        "it has format {0}, newer than this program: use the version that wrote it, or a later one"
    )]
    Newer(u32),
    /// It has no end.
    #[error("it is cut short after {0} bytes: it was not written to its end, or not copied whole")]
    Cut(u64),
    /// It is not what was written.
    #[error("it is damaged in the block at byte {at}: {why}")]
    Rotten {
        /// Where the block begins.
        at: u64,
        /// What is wrong with it.
        why: &'static str,
    },
    /// What it says could not be taken.
    #[error("{0}")]
    Refused(String),
}

/// What a backup says, in the order in which it says it.
pub(in crate::store) enum Piece<'a> {
    /// What stands at its beginning; totals are still 0.
    Head(&'a BackupSummary),
    /// A key and its value.
    Entry(&'a [u8], &'a [u8]),
    /// The number of a frame, its payload, and the writes in it.
    Frame(u64, &'a [u8], &'a [Write]),
}

pub(in crate::store) type Visit<'a> = &'a mut dyn FnMut(Piece<'_>) -> Result<(), BackupFault>;

/// Takes the bytes of a backup as they come. Pieces are handed on as soon as their block is whole; only
/// [`Parser::finish`] says that all of them were what was written.
pub(in crate::store) struct Parser {
    buffer: Vec<u8>,
    /// How many bytes the next thing needs.
    needed: usize,
    state: State,
    /// Where the thing in the buffer begins.
    at: u64,
    place: u64,
    kind: u32,
    last_key: Vec<u8>,
    digest: digest::Context,
    summary: BackupSummary,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Header,
    BlockHead,
    Payload,
    Done,
}

impl Parser {
    pub(in crate::store) fn new() -> Parser {
        Parser {
            buffer: Vec::new(),
            needed: HEADER,
            state: State::Header,
            at: 0,
            place: 0,
            kind: ENTRIES,
            last_key: Vec::new(),
            digest: digest::Context::new(&digest::SHA256),
            summary: BackupSummary {
                store: [0; 16],
                key_mark: [0; 32],
                program: String::new(),
                run: 0,
                begun_ms: 0,
                finished_ms: 0,
                first_frame: 0,
                last_frame: 0,
                entries: 0,
                entry_bytes: 0,
                frames: 0,
                frame_bytes: 0,
                left_out: 0,
                bytes: 0,
                sha256: [0; 32],
            },
        }
    }

    fn rotten(&self, why: &'static str) -> BackupFault {
        BackupFault::Rotten { at: self.at, why }
    }

    /// Takes further bytes.
    pub(in crate::store) fn feed(
        &mut self,
        mut bytes: &[u8],
        visit: Visit<'_>,
    ) -> Result<(), BackupFault> {
        while !bytes.is_empty() {
            if self.state == State::Done {
                return Err(self.rotten("something follows its end"));
            }
            let missing = self.needed - self.buffer.len();
            let (now, later) = bytes.split_at(missing.min(bytes.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            if self.buffer.len() == self.needed {
                self.step(visit)?;
            }
        }
        Ok(())
    }

    /// The file has ended: what it holds, if it was whole.
    pub(in crate::store) fn finish(self) -> Result<BackupSummary, BackupFault> {
        match self.state {
            State::Done => Ok(self.summary),
            State::Header if !MAGIC.starts_with(&self.buffer[..self.buffer.len().min(8)]) => {
                Err(BackupFault::Foreign)
            }
            State::Header | State::BlockHead | State::Payload => {
                Err(BackupFault::Cut(self.at + self.buffer.len() as u64))
            }
        }
    }

    fn step(&mut self, visit: Visit<'_>) -> Result<(), BackupFault> {
        match self.state {
            State::Header => {
                self.header()?;
                visit(Piece::Head(&self.summary))?;
                self.pass(self.buffer.len(), State::BlockHead, BLOCK_HEAD);
            }
            State::BlockHead => {
                let (kind, length) = (u32_at(&self.buffer, 0), u32_at(&self.buffer, 4) as usize);
                let Some(most) = most(kind) else {
                    return Err(self.rotten("there is no such kind of block"));
                };
                let fits = if kind == END {
                    length == END_LENGTH
                } else {
                    length > 0 && length <= most
                };
                if !fits {
                    return Err(self.rotten("a block has an impossible length"));
                }
                if kind < self.kind {
                    return Err(self.rotten("entries follow frames"));
                }
                self.kind = kind;
                self.state = State::Payload;
                self.needed = BLOCK_HEAD + length;
            }
            State::Payload => {
                let sum = block_sum(self.place, &self.buffer[..8], &self.buffer[BLOCK_HEAD..]);
                if sum != u32_at(&self.buffer, 8) {
                    return Err(self.rotten("the checksum does not match"));
                }
                let buffer = std::mem::take(&mut self.buffer);
                let payload = &buffer[BLOCK_HEAD..];
                match self.kind {
                    ENTRIES => self.entries(payload, visit)?,
                    FRAMES => self.frames(payload, visit)?,
                    _ => {
                        self.end(payload)?;
                        self.summary.bytes = self.at + buffer.len() as u64;
                        self.state = State::Done;
                        return Ok(());
                    }
                }
                self.buffer = buffer;
                self.place += 1;
                self.pass(self.buffer.len(), State::BlockHead, BLOCK_HEAD);
                self.buffer.shrink_to(2 * super::BLOCK);
            }
            State::Done => {}
        }
        Ok(())
    }

    /// Goes on behind what is in the buffer.
    fn pass(&mut self, length: usize, next: State, needed: usize) {
        self.digest.update(&self.buffer[..length]);
        self.at += length as u64;
        self.buffer.clear();
        self.state = next;
        self.needed = needed;
    }

    fn header(&mut self) -> Result<(), BackupFault> {
        let header = &self.buffer;
        if header[0..8] != MAGIC {
            return Err(BackupFault::Foreign);
        }
        // The version comes first: a later header may be summed in another way.
        match u32_at(header, 8) {
            VERSION => {}
            0 => return Err(self.rotten("its header has no version")),
            newer => {
                // Rot in the version is told from a later one by the checksum that version 1 has.
                let (mut ours, sum) = (header.clone(), u32_at(header, 12));
                ours[8..12].copy_from_slice(&VERSION.to_le_bytes());
                return Err(if sum == header_sum(&ours) {
                    self.rotten("its header is damaged")
                } else {
                    BackupFault::Newer(newer)
                });
            }
        }
        if u32_at(header, 12) != header_sum(header) {
            return Err(self.rotten("its header is damaged"));
        }
        let length = usize::from(header[84]).min(PROGRAM_MAX);
        let program = std::str::from_utf8(&header[88..88 + length])
            .map_err(|_| self.rotten("its header is damaged"))?;
        self.summary = BackupSummary {
            first_frame: u64_at(header, 16),
            begun_ms: u64_at(header, 24),
            store: array_at(header, 32),
            key_mark: array_at(header, 48),
            run: u32_at(header, 80),
            program: program.to_owned(),
            ..self.summary.clone()
        };
        if self.summary.first_frame == 0 {
            return Err(self.rotten("its header names no frame"));
        }
        Ok(())
    }

    fn entries(&mut self, payload: &[u8], visit: Visit<'_>) -> Result<(), BackupFault> {
        let mut rest = payload;
        while !rest.is_empty() {
            let (key, value, after) =
                entry(rest).ok_or_else(|| self.rotten("an entry leaves its block"))?;
            if key <= self.last_key.as_slice() {
                return Err(self.rotten("its entries are not in order"));
            }
            self.record(key, value)?;
            self.last_key.clear();
            self.last_key.extend_from_slice(key);
            self.summary.entries += 1;
            self.summary.entry_bytes += (key.len() + value.len()) as u64;
            visit(Piece::Entry(key, value))?;
            rest = after;
        }
        Ok(())
    }

    fn frames(&mut self, payload: &[u8], visit: Visit<'_>) -> Result<(), BackupFault> {
        let mut at = 0;
        // Writes are slices of it.
        let payload = Bytes::copy_from_slice(payload);
        while at < payload.len() {
            let short = || self.rotten("a frame leaves its block");
            let (head, body) = payload[at..]
                .split_first_chunk::<FRAME_HEAD>()
                .ok_or_else(short)?;
            let (number, length) = (u64_at(head, 0), u32_at(head, 8) as usize);
            if length > body.len() {
                return Err(short());
            }
            if number != self.next_frame() {
                return Err(self.rotten("a frame is missing"));
            }
            let begin = at + FRAME_HEAD;
            let writes = write::decode(&payload.slice(begin..begin + length))
                .map_err(|_| self.rotten("a frame cannot be decoded"))?;
            for write in &writes {
                if let Write::Put { key, value } = write {
                    self.record(key, value)?;
                }
            }
            self.summary.frames += 1;
            self.summary.frame_bytes += length as u64;
            visit(Piece::Frame(
                number,
                &payload[begin..begin + length],
                &writes,
            ))?;
            at = begin + length;
        }
        Ok(())
    }

    fn next_frame(&self) -> u64 {
        // A forged header may begin anywhere.
        self.summary.first_frame.wrapping_add(self.summary.frames)
    }

    fn record(&self, key: &[u8], value: &[u8]) -> Result<(), BackupFault> {
        match record::verify(key, value) {
            Ok(()) => Ok(()),
            Err(Fault::Newer(version)) => Err(BackupFault::Newer(u32::from(version))),
            Err(Fault::Rotten(_)) => Err(self.rotten("a record in it does not check")),
        }
    }

    fn end(&mut self, payload: &[u8]) -> Result<(), BackupFault> {
        self.digest.update(&payload[..TOTALS]);
        let digest = self.digest.clone().finish();
        if digest.as_ref() != &payload[TOTALS..] {
            return Err(self.rotten("the digest over the whole file does not match"));
        }
        let summary = &self.summary;
        let same = u64_at(payload, 0).wrapping_add(1) == self.next_frame()
            && u64_at(payload, 8) == summary.entries
            && u64_at(payload, 16) == summary.entry_bytes
            && u64_at(payload, 24) == summary.frames
            && u64_at(payload, 32) == summary.frame_bytes;
        if !same {
            return Err(self.rotten("its totals do not match what it holds"));
        }
        self.summary.last_frame = u64_at(payload, 0);
        self.summary.left_out = u64_at(payload, 40);
        self.summary.finished_ms = u64_at(payload, 48);
        self.summary.sha256 = array_at(payload, TOTALS);
        Ok(())
    }
}

fn entry(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<ENTRY_HEAD>()?;
    let [k0, k1, v0, v1, v2, v3] = *head;
    let (key, rest) = rest.split_at_checked(usize::from(u16::from_le_bytes([k0, k1])))?;
    let (value, rest) = rest.split_at_checked(u32::from_le_bytes([v0, v1, v2, v3]) as usize)?;
    Some((key, value, rest))
}

/// Bytes that are read at a time.
const STEP: usize = 256 << 10;

/// Reads a backup and hands on what it says.
pub(in crate::store) fn read(
    from: &mut dyn Read,
    visit: Visit<'_>,
    progress: &mut dyn FnMut(u64),
) -> Result<BackupSummary, BackupFault> {
    let mut parser = Parser::new();
    let mut buffer = vec![0; STEP];
    let mut done = 0;
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return parser.finish(),
            Ok(count) => {
                parser.feed(&buffer[..count], visit)?;
                done += count as u64;
                progress(done);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Reads a backup to its end and checks every byte of it. `progress` is told how many bytes have been read.
///
/// # Errors
///
/// What is wrong with it, and where.
pub fn verify(
    from: &mut dyn Read,
    progress: &mut dyn FnMut(u64),
) -> Result<BackupSummary, BackupFault> {
    read(from, &mut |_| Ok(()), progress)
}
