//! Frames on a byte stream (QUIC): a variable-length integer (RFC 9000 section 16) says how long the frame behind it is.

use bytes::{Buf, Bytes, BytesMut};

use crate::codec::DecodeError;

/// Most bytes that a length takes.
pub const LENGTH_MAX_BYTES: usize = 8;

/// The length prefix of a frame, as few bytes as possible.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LengthPrefix {
    bytes: [u8; LENGTH_MAX_BYTES],
    len: u8,
}

impl LengthPrefix {
    /// The prefix of a frame of `len` bytes.
    pub const fn new(len: usize) -> Self {
        // Frames are bounded far below 2^62, the greatest number that the form can hold.
        let len = len as u64 & ((1 << 62) - 1);
        let (marker, count) = match len {
            0..=0x3f => (0u8, 1u8),
            0x40..=0x3fff => (0x40, 2),
            0x4000..=0x3fff_ffff => (0x80, 4),
            _ => (0xc0, 8),
        };
        let mut bytes = (len << (64 - 8 * count as u32)).to_be_bytes();
        bytes[0] |= marker;
        Self { bytes, len: count }
    }

    /// The bytes to write before the frame.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// Appends a frame with its length before it.
pub fn write_framed(out: &mut Vec<u8>, frame: &[u8]) {
    out.extend_from_slice(LengthPrefix::new(frame.len()).as_bytes());
    out.extend_from_slice(frame);
}

/// Cuts a byte stream into frames.
///
/// Push what arrives, pull frames until there is none. A length beyond the limit is refused as soon as it is read, before a
/// byte of that frame is kept; after a refusal the stream cannot be read any further. It never holds more than one
/// incomplete frame plus what the last push brought, and gives its memory back when it is empty.
#[derive(Debug)]
pub struct FrameReader {
    buffer: BytesMut,
    limit: usize,
    refused: Option<DecodeError>,
}

impl FrameReader {
    /// A reader that accepts frames of at most `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self {
            buffer: BytesMut::new(),
            limit,
            refused: None,
        }
    }

    /// Takes bytes from the stream. After a refusal they are dropped.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.refused.is_none() {
            self.buffer.extend_from_slice(bytes);
        }
    }

    /// The next complete frame; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`DecodeError::TooLarge`], for good, when a frame is announced as larger than the limit.
    pub fn pull(&mut self) -> Result<Option<Bytes>, DecodeError> {
        if let Some(error) = self.refused {
            return Err(error);
        }
        let Some(&first) = self.buffer.first() else {
            return Ok(None);
        };
        let prefix = 1usize << (first >> 6);
        let Some(length) = self.buffer.get(..prefix) else {
            return Ok(None);
        };
        let length = length
            .iter()
            .fold(0u64, |length, &byte| length << 8 | u64::from(byte));
        let length = length & (u64::MAX >> (66 - 8 * prefix as u32));
        let frame = match usize::try_from(length) {
            Ok(frame) if frame <= self.limit => frame,
            _ => {
                let error = DecodeError::TooLarge {
                    len: length,
                    limit: self.limit as u64,
                };
                self.refused = Some(error);
                self.buffer = BytesMut::new();
                return Err(error);
            }
        };
        if self.buffer.len() < prefix + frame {
            return Ok(None);
        }
        self.buffer.advance(prefix);
        let frame = self.buffer.split_to(frame).freeze();
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        Ok(Some(frame))
    }

    /// Whether the stream could end here without cutting a frame.
    pub fn is_at_boundary(&self) -> bool {
        self.refused.is_none() && self.buffer.is_empty()
    }

    /// Bytes that wait for the rest of their frame.
    pub fn buffered(&self) -> usize {
        self.buffer.len()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn length_prefixes_are_those_of_rfc_9000() {
        let prefix = |len| LengthPrefix::new(len).as_bytes().to_vec();
        assert_eq!(prefix(0), [0]);
        assert_eq!(prefix(37), [0x25]);
        assert_eq!(prefix(63), [0x3f]);
        assert_eq!(prefix(64), [0x40, 0x40]);
        assert_eq!(prefix(15_293), [0x7b, 0xbd]);
        assert_eq!(prefix(16_384), [0x80, 0, 0x40, 0]);
        assert_eq!(prefix(494_878_333), [0x9d, 0x7f, 0x3e, 0x7d]);
        assert_eq!(prefix(1 << 30), [0xc0, 0, 0, 0, 0x40, 0, 0, 0]);
    }

    #[test]
    fn frames_come_out_whole_however_the_stream_was_cut() {
        let frames: Vec<Vec<u8>> = [0usize, 1, 63, 64, 300, 16_384]
            .iter()
            .map(|&len| vec![len as u8; len])
            .collect();
        let mut stream = Vec::new();
        frames
            .iter()
            .for_each(|frame| write_framed(&mut stream, frame));
        for step in [1, 2, 7, 1_000, stream.len()] {
            let mut reader = FrameReader::new(16_384);
            let mut out = Vec::new();
            for piece in stream.chunks(step) {
                reader.push(piece);
                while let Some(frame) = reader.pull().unwrap() {
                    out.push(frame.to_vec());
                }
            }
            assert_eq!(out, frames);
            assert!(reader.is_at_boundary());
        }
    }

    #[test]
    fn a_length_over_the_limit_is_refused_at_once_and_for_good() {
        let mut reader = FrameReader::new(100);
        reader.push(LengthPrefix::new(101).as_bytes());
        let refused = Err(DecodeError::TooLarge {
            len: 101,
            limit: 100,
        });
        assert_eq!(reader.pull(), refused);
        reader.push(&[0; 64]);
        assert_eq!(reader.buffered(), 0);
        assert_eq!(reader.pull(), refused);
        assert!(!reader.is_at_boundary());
    }

    #[test]
    fn a_cut_frame_is_not_at_a_boundary() {
        let mut reader = FrameReader::new(100);
        reader.push(&[2, 1]);
        assert_eq!(reader.pull(), Ok(None));
        assert!(!reader.is_at_boundary());
    }
}
