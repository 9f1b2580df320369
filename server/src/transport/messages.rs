//! WebSocket messages of a client, out of bytes (RFC 6455 section 5).
//!
//! Unmasks, joins fragments, and refuses what the RFC forbids. A message that comes whole is handed out in the memory that it
//! came in; between messages nothing is held.

use std::mem;

use bytes::{Buf, Bytes, BytesMut};

/// Most bytes of a control frame (RFC 6455 section 5.5).
pub(crate) const CONTROL_MAX_BYTES: usize = 125;

/// What a close frame answers when its own code is none that may be sent (RFC 6455 section 7.4.1).
const PROTOCOL_ERROR: u16 = 1002;

/// A message, a part of one, or a control frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Message {
    /// Text; it is UTF-8.
    Text(Bytes),
    /// Bytes.
    Binary(Bytes),
    /// A fragment after which others come. The joined message follows; this says that there was work.
    Part,
    /// To be answered with these bytes.
    Ping(Bytes),
    /// An answer to nothing, as we send no pings.
    Pong,
    /// The peer leaves; it is answered with this code, if it named one.
    Close(Option<u16>),
}

/// What the peer did wrong. Nothing can be read after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Wrong {
    /// A message of so many bytes, of which at most these are taken.
    TooLarge(u64, usize),
    /// Against the RFC.
    Rules(&'static str),
}

/// A message of which the last fragment has not come.
struct Joined {
    is_text: bool,
    bytes: Vec<u8>,
}

/// Takes bytes, gives messages.
pub(crate) struct MessageReader {
    bytes: BytesMut,
    joined: Option<Box<Joined>>,
    message_max: usize,
}

struct Header {
    is_last: bool,
    opcode: u8,
    mask: [u8; 4],
    /// Of the header itself.
    size: usize,
    /// Of what follows.
    length: u64,
}

impl Header {
    /// `None`: it is not all there.
    fn read(bytes: &[u8]) -> Result<Option<Header>, Wrong> {
        let [first, second, rest @ ..] = bytes else {
            return Ok(None);
        };
        // Judged at once: whoever speaks another protocol is not waited for.
        if first & 0x70 != 0 {
            return Err(Wrong::Rules("reserved bits of a WebSocket frame are set"));
        }
        if second & 0x80 == 0 {
            return Err(Wrong::Rules("a WebSocket frame that is not masked"));
        }
        let (is_last, opcode, short) = (first & 0x80 != 0, first & 0x0f, second & 0x7f);
        match opcode {
            0x0..=0x2 => {}
            0x8..=0xa if !is_last => {
                return Err(Wrong::Rules("a WebSocket control frame in fragments"));
            }
            0x8..=0xa if usize::from(short) > CONTROL_MAX_BYTES => {
                return Err(Wrong::Rules(
                    "a WebSocket control frame of more than 125 bytes",
                ));
            }
            0x8..=0xa => {}
            _ => return Err(Wrong::Rules("an unknown kind of WebSocket frame")),
        }
        let (length, extra) = match (short, rest) {
            (126, [a, b, ..]) => (u64::from(u16::from_be_bytes([*a, *b])), 2),
            (127, [a, b, c, d, e, f, g, h, ..]) => {
                (u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]), 8)
            }
            (126 | 127, _) => return Ok(None),
            (short, _) => (short.into(), 0),
        };
        let Some(&[a, b, c, d]) = rest.get(extra..extra + 4) else {
            // The length is known already, and may be too much.
            return match extra {
                0 => Ok(None),
                _ => Ok(Some(Header {
                    is_last,
                    opcode,
                    mask: [0; 4],
                    size: usize::MAX,
                    length,
                })),
            };
        };
        Ok(Some(Header {
            is_last,
            opcode,
            mask: [a, b, c, d],
            size: 2 + extra + 4,
            length,
        }))
    }
}

impl MessageReader {
    /// Messages of at most so many bytes, in one frame or in many.
    pub(crate) fn new(message_max: usize) -> MessageReader {
        MessageReader {
            bytes: BytesMut::new(),
            joined: None,
            message_max,
        }
    }

    /// Bytes that came.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// What the next frame makes; `None`: more bytes are needed.
    ///
    /// # Errors
    /// When the peer does what it must not.
    pub(crate) fn pull(&mut self) -> Result<Option<Message>, Wrong> {
        let Some(header) = Header::read(&self.bytes)? else {
            return Ok(None);
        };
        let joined = self.joined.as_ref().map_or(0, |joined| joined.bytes.len());
        match (header.opcode, &self.joined) {
            (0x0, None) => {
                return Err(Wrong::Rules("a WebSocket continuation of nothing"));
            }
            (0x1 | 0x2, Some(_)) => {
                return Err(Wrong::Rules(
                    "a WebSocket message inside the fragments of another",
                ));
            }
            _ => {}
        }
        let whole = header.length.saturating_add(joined as u64);
        if header.opcode < 0x8 && whole > self.message_max as u64 {
            return Err(Wrong::TooLarge(whole, self.message_max));
        }
        // It is no more than a message may be, or a control frame.
        let length = header.length as usize;
        let Some(size) = header.size.checked_add(length) else {
            return Ok(None);
        };
        if self.bytes.len() < size {
            return Ok(None);
        }
        let mut frame = match self.bytes.len() == size {
            true => mem::take(&mut self.bytes),
            false => self.bytes.split_to(size),
        };
        frame.advance(header.size);
        unmask(&mut frame, header.mask);
        self.take(&header, frame.freeze()).map(Some)
    }

    fn take(&mut self, header: &Header, payload: Bytes) -> Result<Message, Wrong> {
        let (is_text, payload) = match (header.opcode, self.joined.take()) {
            (0x8, _) => return close(&payload),
            (0x9, joined) => {
                self.joined = joined;
                return Ok(Message::Ping(payload));
            }
            (0xa, joined) => {
                self.joined = joined;
                return Ok(Message::Pong);
            }
            (_, Some(mut joined)) => {
                joined.bytes.extend_from_slice(&payload);
                if !header.is_last {
                    self.joined = Some(joined);
                    return Ok(Message::Part);
                }
                (joined.is_text, joined.bytes.into())
            }
            (opcode, None) => {
                let is_text = opcode == 0x1;
                if !header.is_last {
                    let bytes = payload.to_vec();
                    self.joined = Some(Box::new(Joined { is_text, bytes }));
                    return Ok(Message::Part);
                }
                (is_text, payload)
            }
        };
        if !is_text {
            return Ok(Message::Binary(payload));
        }
        match str::from_utf8(&payload) {
            Ok(_) => Ok(Message::Text(payload)),
            Err(_) => Err(Wrong::Rules("a text message that is not UTF-8")),
        }
    }
}

/// What a close frame says.
fn close(payload: &[u8]) -> Result<Message, Wrong> {
    match payload {
        [] => Ok(Message::Close(None)),
        [a, b, reason @ ..] => {
            if str::from_utf8(reason).is_err() {
                return Err(Wrong::Rules("a reason for closing that is not UTF-8"));
            }
            let code = u16::from_be_bytes([*a, *b]);
            Ok(Message::Close(Some(match code {
                1000..=1003 | 1007..=1014 | 3000..=4999 => code,
                _ => PROTOCOL_ERROR,
            })))
        }
        [_] => Err(Wrong::Rules("a WebSocket close frame with half a code")),
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let mut words = bytes.chunks_exact_mut(4);
    for word in &mut words {
        for (byte, mask) in word.iter_mut().zip(mask) {
            *byte ^= mask;
        }
    }
    for (byte, mask) in words.into_remainder().iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::testing::frame;
    use super::*;
    use proptest::prelude::*;

    const MAX: usize = 70_000;

    /// All that comes out when these pieces go in one after the other.
    fn read<'b>(pieces: impl IntoIterator<Item = &'b [u8]>) -> Result<Vec<Message>, Wrong> {
        let mut reader = MessageReader::new(MAX);
        let mut messages = Vec::new();
        for piece in pieces {
            reader.push(piece);
            while let Some(message) = reader.pull()? {
                if message != Message::Part {
                    messages.push(message);
                }
            }
        }
        if reader.bytes.is_empty() {
            assert_eq!(reader.bytes.capacity(), 0, "an idle link holds no buffer");
        }
        Ok(messages)
    }

    fn binary(bytes: &[u8]) -> Message {
        Message::Binary(Bytes::copy_from_slice(bytes))
    }

    #[test]
    fn messages_of_every_length_come_out_as_they_went_in() {
        for length in [0, 1, 3, 4, 5, 125, 126, 127, 65_535, 65_536, MAX] {
            let payload: Vec<u8> = (0..length).map(|n| n as u8).collect();
            let bytes = frame(0x82, &payload);
            assert_eq!(read([&bytes[..]]), Ok(vec![binary(&payload)]), "{length}");
            let (first, second) = bytes.split_at(bytes.len() / 2);
            assert_eq!(read([first, second]), Ok(vec![binary(&payload)]));
        }
    }

    #[test]
    fn fragments_are_joined_and_control_frames_may_stand_between_them() {
        let bytes = [
            frame(0x01, b"gr\xc3"),
            frame(0x89, b"hello"),
            frame(0x00, b"\xbc"),
            frame(0x8a, b""),
            frame(0x80, b"n"),
            frame(0x82, b"next"),
        ]
        .concat();
        let expected = vec![
            Message::Ping(Bytes::from_static(b"hello")),
            Message::Pong,
            Message::Text("grün".into()),
            binary(b"next"),
        ];
        assert_eq!(read([&bytes[..]]), Ok(expected.clone()));
        assert_eq!(read(bytes.chunks(1)), Ok(expected));
    }

    #[test]
    fn what_the_rfc_forbids_is_refused() {
        let rules = |bytes: &[u8]| {
            let refused = matches!(read([bytes]), Err(Wrong::Rules(_)));
            assert!(refused, "{bytes:02x?}");
        };
        rules(&[0x81, 0x00]);
        rules(&[0xf1, 0x80]);
        rules(&[0xc2, 0x80]);
        for opcode in [3, 4, 5, 6, 7, 0xb, 0xc, 0xd, 0xe, 0xf] {
            rules(&frame(0x80 | opcode, b""));
        }
        for opcode in [8, 9, 0xa] {
            rules(&frame(opcode, b""));
            rules(&frame(0x80 | opcode, &[0; 126]));
        }
        rules(&frame(0x80, b"of nothing"));
        rules(&[frame(0x01, b"a"), frame(0x82, b"b")].concat());
        rules(&[frame(0x02, b"a"), frame(0x02, b"b")].concat());
        rules(&frame(0x81, b"\xff"));
        rules(&[frame(0x01, b"a"), frame(0x80, b"\xc3")].concat());
        rules(&frame(0x88, b"\x03"));
        rules(&frame(0x88, b"\x03\xe8\xff"));
    }

    #[test]
    fn a_message_that_is_too_large_is_refused_before_it_comes() {
        let whole = (MAX + 1) as u64;
        let bytes = frame(0x82, &vec![0; MAX + 1]);
        assert_eq!(read([&bytes[..10]]), Err(Wrong::TooLarge(whole, MAX)));
        // Nor in fragments, of which each would be small enough.
        let bytes = [frame(0x02, &vec![0; MAX]), frame(0x00, b"x")[..6].to_vec()].concat();
        assert_eq!(read([&bytes[..]]), Err(Wrong::TooLarge(whole, MAX)));
        let endless = [0x82, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff];
        assert_eq!(read([&endless[..]]), Err(Wrong::TooLarge(u64::MAX, MAX)));
        let endless = [frame(0x02, b"x"), vec![0x80, 0xff], vec![0xff; 8]].concat();
        assert_eq!(read([&endless[..]]), Err(Wrong::TooLarge(u64::MAX, MAX)));
    }

    #[test]
    fn a_close_is_answered_with_its_own_code_or_as_an_error() {
        for (payload, code) in [
            (&b""[..], None),
            (b"\x03\xe8bye", Some(1000)),
            (b"\x0f\xa0", Some(4000)),
            (b"\x03\xed", Some(PROTOCOL_ERROR)),
            (b"\x00\x00", Some(PROTOCOL_ERROR)),
        ] {
            let bytes = frame(0x88, payload);
            assert_eq!(read([&bytes[..]]), Ok(vec![Message::Close(code)]));
        }
    }

    /// The fuzz body: whatever comes, it does no harm, and in whatever pieces, the same comes out.
    fn fuzz_messages(bytes: &[u8], piece: usize) {
        let whole = read([bytes]);
        assert_eq!(read(bytes.chunks(piece.max(1))), whole);
    }

    #[test]
    fn the_corpus_does_no_harm() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/transport/corpus/messages");
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            (1..8).for_each(|piece| fuzz_messages(&bytes, piece));
            count += 1;
        }
        assert!(count >= 8, "the corpus is there");
    }

    proptest! {
        #[test]
        fn random_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600), piece in 1_usize..50) {
            fuzz_messages(&bytes, piece);
        }

        #[test]
        fn frames_of_any_kind_do_no_harm(
            frames in proptest::collection::vec((any::<u8>(), proptest::collection::vec(any::<u8>(), 0..200)), 1..8),
            piece in 1_usize..50,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(first, payload)| frame(*first & 0x8f, payload)).collect();
            fuzz_messages(&bytes, piece);
        }
    }
}
