//! One frame in bytes, and the search for frames in the bytes of a segment.
//!
//! ```text
//! offset 0   u32  length of the payload; 0 where nothing was written yet
//! offset 4   u32  CRC-32C over the segment's salt, the length, the number and the payload
//! offset 8   u64  number: one more than that of the frame before
//! offset 16       payload, then zeros up to a multiple of 8
//! ```
//!
//! All numbers are little endian. The salt is random, is known to the segment's header alone and leads every
//! checksum: content that a publisher made look like a frame is therefore not taken for one when a torn frame
//! leaves it lying at the end of the log.

use std::ops::Range;

/// Bytes before the payload.
pub(in crate::store) const HEADER: usize = 16;

/// Frames begin at multiples of this, so that the search after a bad one has few places to look at.
pub(in crate::store) const ALIGNMENT: usize = 8;

/// The largest frame. A batch is atomic and all that shards may hold back at once is bounded by the reserve for
/// bodies in flight (256 MiB by default), so this leaves half as much again for keys and records around them.
pub(in crate::store) const FRAME_MAX: usize = 384 << 20;

/// Fills in the header of a frame whose payload follows [`HEADER`] zero bytes, and pads it.
pub(in crate::store) fn seal(buffer: &mut Vec<u8>, number: u64, seed: u32) {
    const { assert!(FRAME_MAX <= u32::MAX as usize) };
    let length = (buffer.len() - HEADER) as u32;
    buffer[0..4].copy_from_slice(&length.to_le_bytes());
    buffer[8..16].copy_from_slice(&number.to_le_bytes());
    let sum = checksum(seed, &buffer[0..4], &buffer[8..]);
    buffer[4..8].copy_from_slice(&sum.to_le_bytes());
    buffer.resize(buffer.len().next_multiple_of(ALIGNMENT), 0);
}

/// The seed of a segment's checksums.
pub(in crate::store) fn seed(salt: &[u8; 16]) -> u32 {
    crc32c::crc32c(salt)
}

fn checksum(seed: u32, length: &[u8], number_and_payload: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(seed, length), number_and_payload)
}

/// A frame as it was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Found {
    /// Its number.
    pub(in crate::store) number: u64,
    /// Where its payload stands.
    pub(in crate::store) payload: Range<usize>,
    /// Where the next frame begins.
    pub(in crate::store) end: usize,
}

/// What stands at a place where a frame could begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) enum Place {
    /// A whole frame.
    Frame(Found),
    /// Nothing was written here: zeros, or the end of the segment.
    Empty,
    /// Something that is no whole frame.
    Bad,
}

/// Looks at one place.
pub(in crate::store) fn look(data: &[u8], at: usize, seed: u32) -> Place {
    let Some(rest) = data.get(at..) else {
        return Place::Empty;
    };
    let Some((header, body)) = rest.split_first_chunk::<HEADER>() else {
        return if rest.iter().all(|byte| *byte == 0) {
            Place::Empty
        } else {
            Place::Bad
        };
    };
    let ([l0, l1, l2, l3, c0, c1, c2, c3], number) = split_header(header);
    let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
    if length == 0 {
        return if header.iter().all(|byte| *byte == 0) {
            Place::Empty
        } else {
            Place::Bad
        };
    }
    if length > FRAME_MAX || length > body.len() {
        return Place::Bad;
    }
    let end = at + HEADER + length;
    if checksum(seed, &[l0, l1, l2, l3], &data[at + 8..end]) != u32::from_le_bytes([c0, c1, c2, c3])
    {
        return Place::Bad;
    }
    Place::Frame(Found {
        number,
        payload: at + HEADER..end,
        end: end.next_multiple_of(ALIGNMENT).min(data.len()),
    })
}

/// What the header of a frame says of its payload's length and of its number; nothing is checked.
pub(in crate::store) fn head(header: &[u8; HEADER]) -> (usize, u64) {
    let ([l0, l1, l2, l3, ..], number) = split_header(header);
    (u32::from_le_bytes([l0, l1, l2, l3]) as usize, number)
}

fn split_header(header: &[u8; HEADER]) -> ([u8; 8], u64) {
    let (mut head, mut number) = ([0; 8], [0; 8]);
    head.copy_from_slice(&header[..8]);
    number.copy_from_slice(&header[8..]);
    (head, u64::from_le_bytes(number))
}

/// How the frames of a segment end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum End {
    /// Zeros follow the last frame: the segment was left in peace.
    Clean {
        /// Where the next frame goes.
        offset: usize,
    },
    /// Bytes follow that are no frame, and no frame follows them: the last write was cut off. It was never promised.
    Torn {
        /// Where the next frame goes.
        offset: usize,
    },
    /// A frame is missing or bad although later ones are whole: these bytes were good once.
    Rotten {
        /// Where the bad place begins.
        offset: usize,
        /// The first whole frame after it.
        next_number: u64,
    },
}

/// The frames of a segment, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::store) struct Scan {
    /// Whole frames with consecutive numbers, but for `gaps`.
    pub(in crate::store) frames: Vec<Found>,
    /// Bad places whose frames nobody needs: numbers from, up to but not including. Reported, and passed over.
    pub(in crate::store) gaps: Vec<Range<u64>>,
    /// What follows them.
    pub(in crate::store) end: End,
}

/// Finds the frames from `start` on, of which the first should have the number `first`. Numbers below `needed` may be
/// missing; from there on the first frame that cannot be proved ends the search.
pub(in crate::store) fn scan(
    data: &[u8],
    start: usize,
    seed: u32,
    first: u64,
    needed: u64,
) -> Scan {
    let mut frames: Vec<Found> = Vec::new();
    let mut gaps = Vec::new();
    let (mut at, mut expected) = (start, first);
    let end = loop {
        match look(data, at, seed) {
            Place::Frame(found) if found.number == expected => {
                at = found.end;
                expected += 1;
                frames.push(found);
            }
            Place::Empty if all_zero(&data[at.min(data.len())..]) => {
                break End::Clean { offset: at };
            }
            Place::Frame(_) | Place::Empty | Place::Bad => match search(data, at, seed, expected) {
                Some(later) if later.number <= needed => {
                    gaps.push(expected..later.number);
                    at = later.end;
                    expected = later.number + 1;
                    frames.push(later);
                }
                Some(later) => {
                    break End::Rotten {
                        offset: at,
                        next_number: later.number,
                    };
                }
                None => break End::Torn { offset: at },
            },
        }
    };
    Scan { frames, gaps, end }
}

/// The next whole frame behind a bad place, with a number that could follow.
fn search(data: &[u8], bad: usize, seed: u32, expected: u64) -> Option<Found> {
    // More frames than bytes do not fit, so a number beyond that is none.
    let most = expected.saturating_add(data.len() as u64);
    let mut at = bad;
    while at + HEADER < data.len() {
        let (_, number) = split_header(data[at..].first_chunk()?);
        if number >= expected
            && number < most
            && let Place::Frame(found) = look(data, at, seed)
        {
            return Some(found);
        }
        at += ALIGNMENT;
    }
    None
}

fn all_zero(bytes: &[u8]) -> bool {
    // In steps that the compiler turns into wide comparisons.
    let (chunks, rest) = bytes.as_chunks::<64>();
    chunks.iter().all(|chunk| *chunk == [0; 64]) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const SEED: u32 = 77;

    fn framed(number: u64, payload: &[u8]) -> Vec<u8> {
        let mut buffer = vec![0; HEADER];
        buffer.extend_from_slice(payload);
        seal(&mut buffer, number, SEED);
        buffer
    }

    fn segment(frames: &[(u64, &[u8])]) -> Vec<u8> {
        let mut data: Vec<u8> = frames.iter().flat_map(|(n, p)| framed(*n, p)).collect();
        data.resize(data.len() + 256, 0);
        data
    }

    fn numbers(scan: &Scan) -> Vec<u64> {
        scan.frames.iter().map(|found| found.number).collect()
    }

    #[test]
    fn frames_are_found_in_order_and_the_end_is_clean() {
        let data = segment(&[(5, b"five"), (6, b"six and some more"), (7, b"7")]);
        let scan = scan(&data, 0, SEED, 5, 5);
        assert_eq!(numbers(&scan), [5, 6, 7]);
        assert_eq!(&data[scan.frames[1].payload.clone()], b"six and some more");
        assert_eq!(
            scan.end,
            End::Clean {
                offset: data.len() - 256
            }
        );
    }

    #[test]
    fn a_frame_cut_anywhere_ends_the_log_there() {
        let first = framed(1, b"whole");
        let second = framed(2, b"this one is cut off by the loss of power");
        for cut in 1..HEADER + 40 {
            let mut data = first.clone();
            data.extend_from_slice(&second[..cut]);
            data.resize(512, 0);
            let scan = scan(&data, 0, SEED, 1, 1);
            assert_eq!(numbers(&scan), [1], "cut at {cut}");
            assert_eq!(
                scan.end,
                End::Torn {
                    offset: first.len()
                },
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn every_flipped_bit_before_a_whole_frame_is_rot() {
        let good = segment(&[(1, b"one"), (2, b"two"), (3, b"three")]);
        let (from, to) = (framed(1, b"one").len(), framed(2, b"two").len());
        for bit in 0..(HEADER + 3) * 8 {
            let mut data = good.clone();
            data[from + bit / 8] ^= 1 << (bit % 8);
            let scan = scan(&data, 0, SEED, 1, 1);
            assert_eq!(numbers(&scan), [1], "bit {bit}");
            assert_eq!(
                scan.end,
                End::Rotten {
                    offset: to,
                    next_number: 3
                },
                "bit {bit}"
            );
        }
    }

    #[test]
    fn rot_before_what_is_needed_is_passed_over() {
        let mut data = segment(&[(1, b"one"), (2, b"two"), (3, b"three"), (4, b"four")]);
        let at = framed(1, b"one").len() + HEADER;
        data[at] ^= 1;
        let scan = scan(&data, 0, SEED, 1, 3);
        assert_eq!(numbers(&scan), [1, 3, 4]);
        assert_eq!(scan.gaps, vec![2..3; 1]);
    }

    #[test]
    fn content_that_looks_like_a_frame_is_not_taken_for_one() {
        // What a publisher could send: a whole frame, made with a guessed salt.
        let mut forged = vec![0; HEADER];
        forged.extend_from_slice(b"forged");
        seal(&mut forged, 3, SEED + 1);
        let mut data = framed(1, b"one");
        let end = data.len();
        let mut torn = framed(2, &forged);
        torn[4] ^= 1;
        data.extend_from_slice(&torn);
        data.resize(data.len() + 256, 0);
        let scan = scan(&data, 0, SEED, 1, 1);
        assert_eq!(scan.end, End::Torn { offset: end });
    }

    #[test]
    fn a_hole_of_zeros_before_a_whole_frame_is_rot() {
        let mut data = segment(&[(1, b"one"), (2, b"two"), (3, b"three")]);
        let (from, length) = (framed(1, b"one").len(), framed(2, b"two").len());
        data[from..from + length].fill(0);
        let scan = scan(&data, 0, SEED, 1, 1);
        assert_eq!(
            scan.end,
            End::Rotten {
                offset: from,
                next_number: 3
            }
        );
    }

    #[test]
    fn a_full_segment_without_room_for_a_header_ends_cleanly() {
        let mut data = framed(1, b"one");
        data.extend_from_slice(&[0; 8]);
        let scan = scan(&data, 0, SEED, 1, 1);
        assert_eq!(
            scan.end,
            End::Clean {
                offset: data.len() - 8
            }
        );
    }
}
