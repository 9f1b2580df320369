//! Reading frames that are safe while the committer writes further ones behind them.
//!
//! Only one frame is in memory at a time. Nothing behind the last frame that was asked for is looked at, so a frame that is
//! being written is never taken for a damaged one.

use std::io;

use bytes::Bytes;

use super::disk::DiskFile;
use super::frame::{self, Place};
use super::segment::{self, Header};
use super::{SegmentInfo, Segments};

/// Why frames could not be read.
#[derive(Debug, thiserror::Error)]
pub(in crate::store) enum LiveError<E> {
    /// The disk did not do what was asked.
    #[error("the log cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The log has the frame no more, or it is damaged.
    #[error("frame {0} of the log is missing or damaged")]
    Missing(u64),
    /// The frames could not be used.
    #[error(transparent)]
    Visit(E),
}

type Visit<'a, E> = &'a mut dyn FnMut(u64, Bytes) -> Result<(), E>;

impl Segments {
    /// Hands the frames `from` to `to`, both included, to `visit`, in order. All of them must be safe, and their segments
    /// [held](Segments::hold).
    pub(in crate::store) fn frames<E>(
        &self,
        from: u64,
        to: u64,
        visit: Visit<'_, E>,
    ) -> Result<(), LiveError<E>> {
        let mut wanted = from;
        let list: Vec<SegmentInfo> = self.lock().clone();
        let start = list
            .iter()
            .rposition(|segment| segment.first_frame <= from)
            .unwrap_or(0);
        for info in list.into_iter().skip(start) {
            if wanted > to {
                break;
            }
            self.frames_of(&info, &mut wanted, to, visit)?;
        }
        if wanted <= to {
            return Err(LiveError::Missing(wanted));
        }
        Ok(())
    }

    /// The same, of one segment.
    fn frames_of<E>(
        &self,
        info: &SegmentInfo,
        wanted: &mut u64,
        to: u64,
        visit: Visit<'_, E>,
    ) -> Result<(), LiveError<E>> {
        let file = self.disk.open(&segment::name(info.number))?;
        let mut bytes = [0; segment::HEADER as usize];
        file.read_at(&mut bytes, 0)?;
        let Ok(header) = Header::decode(&bytes) else {
            return Err(LiveError::Missing(*wanted));
        };
        let length = file.length()?;
        let mut number = header.first_frame;
        let mut at = segment::HEADER;
        while *wanted <= to && at + frame::HEADER as u64 <= length {
            let mut head = [0; frame::HEADER];
            file.read_at(&mut head, at)?;
            let (payload, found) = frame::head(&head);
            if payload == 0 && number >= *wanted {
                // The rest of the segment was never written.
                return Ok(());
            }
            let end = at + (frame::HEADER + payload) as u64;
            if payload == 0 || payload > frame::FRAME_MAX || end > length || found != number {
                return self.frames_around_damage(info, header, wanted, to, visit);
            }
            if number == *wanted {
                let mut whole = vec![0; frame::HEADER + payload];
                file.read_at(&mut whole, at)?;
                let Place::Frame(found) = frame::look(&whole, 0, header.seed()) else {
                    return Err(LiveError::Missing(number));
                };
                let whole = Bytes::from(whole);
                visit(number, whole.slice(found.payload)).map_err(LiveError::Visit)?;
                *wanted += 1;
            }
            number += 1;
            at = end.next_multiple_of(frame::ALIGNMENT as u64);
        }
        Ok(())
    }

    /// Whether every frame of a segment can be read, up to but not including `end`. Whatever else is in it was never a frame.
    pub(super) fn is_whole(&self, info: &SegmentInfo, end: u64) -> bool {
        let file = match self.disk.open(&segment::name(info.number)) {
            Ok(file) => file,
            // There is nothing to keep.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return true,
            Err(_) => return false,
        };
        let mut window = Window {
            file: &*file,
            begin: 0,
            bytes: Vec::new(),
        };
        let mut walk = || -> io::Result<bool> {
            let length = file.length()?;
            let head = window.at(0, segment::HEADER as usize)?;
            let Ok(header) = Header::decode(head) else {
                return Ok(false);
            };
            let (mut number, mut at) = (header.first_frame, segment::HEADER);
            while number < end {
                let head = window.at(at, frame::HEADER)?;
                let Some(head) = head.first_chunk() else {
                    return Ok(false);
                };
                let whole = frame::HEADER + frame::head(head).0;
                if whole > frame::HEADER + frame::FRAME_MAX || at + whole as u64 > length {
                    return Ok(false);
                }
                match frame::look(window.at(at, whole)?, 0, header.seed()) {
                    Place::Frame(found) if found.number == number => {}
                    Place::Frame(_) | Place::Empty | Place::Bad => return Ok(false),
                }
                number += 1;
                at += (whole as u64).next_multiple_of(frame::ALIGNMENT as u64);
            }
            Ok(number == end)
        };
        walk().unwrap_or(false)
    }

    /// A segment with a bad place among frames that nobody needs any more: searched as at a start, in memory.
    fn frames_around_damage<E>(
        &self,
        info: &SegmentInfo,
        header: Header,
        wanted: &mut u64,
        to: u64,
        visit: Visit<'_, E>,
    ) -> Result<(), LiveError<E>> {
        let file = self.disk.open(&segment::name(info.number))?;
        let length = usize::try_from(file.length()?).map_err(io::Error::other)?;
        let mut data = vec![0; length];
        file.read_at(&mut data, 0)?;
        let data = Bytes::from(data);
        let start = segment::HEADER as usize;
        let found = frame::scan(&data, start, header.seed(), header.first_frame, *wanted);
        for frame in found.frames {
            if frame.number == *wanted && frame.number <= to {
                visit(frame.number, data.slice(frame.payload)).map_err(LiveError::Visit)?;
                *wanted += 1;
            }
        }
        Ok(())
    }
}

/// Bytes of a file that are read at once, or as many as a frame has.
const WINDOW: u64 = 1 << 20;

/// A part of a file in memory, for whoever reads it from its beginning to its end.
struct Window<'a> {
    file: &'a dyn DiskFile,
    begin: u64,
    bytes: Vec<u8>,
}

impl Window<'_> {
    /// So many bytes from this place on.
    fn at(&mut self, at: u64, count: usize) -> io::Result<&[u8]> {
        let inside = |window: &Window<'_>| {
            let from = usize::try_from(at.checked_sub(window.begin)?).ok()?;
            Some((from, from.checked_add(count)?)).filter(|(_, to)| *to <= window.bytes.len())
        };
        if inside(self).is_none() {
            let left = self.file.length()?.saturating_sub(at);
            let length = WINDOW.max(count as u64).min(left);
            if length < count as u64 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
            // At most the largest frame, or a window.
            self.bytes.resize(length as usize, 0);
            self.file.read_at(&mut self.bytes, at)?;
            self.begin = at;
        }
        let (from, to) = inside(self).unwrap_or_default();
        Ok(&self.bytes[from..to])
    }
}
