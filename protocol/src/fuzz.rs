//! Fuzz bodies for everything here that reads bytes from outside, as plain functions: a fuzzer calls them, and a test replays
//! the corpus in `protocol/fuzz/corpus/` with deterministic mutations.
//!
//! Each body panics when a promise is broken: decoding never panics, and what was decoded survives being written and read
//! again, in either codec.

use crate::codec::{Codec, DecodeError, Decoded};
use crate::content::Content;
use crate::framing::FrameReader;
use crate::id::Id;

/// One body: the name of its corpus folder, and the function.
pub type Body = (&'static str, fn(&[u8]));

/// All bodies.
pub const BODIES: &[Body] = &[
    ("device_cbor", fuzz_device_cbor),
    ("device_json", fuzz_device_json),
    ("server_cbor", fuzz_server_cbor),
    ("server_json", fuzz_server_json),
    ("frame_reader", fuzz_frame_reader),
    ("content", fuzz_content),
    ("id", fuzz_id),
];

/// A device's frame in CBOR.
pub fn fuzz_device_cbor(data: &[u8]) {
    check(
        Codec::Cbor,
        data,
        Codec::decode_device,
        Codec::encode_device,
    );
}

/// A device's frame in JSON.
pub fn fuzz_device_json(data: &[u8]) {
    check(
        Codec::Json,
        data,
        Codec::decode_device,
        Codec::encode_device,
    );
}

/// A server's frame in CBOR.
pub fn fuzz_server_cbor(data: &[u8]) {
    check(
        Codec::Cbor,
        data,
        Codec::decode_server,
        Codec::encode_server,
    );
}

/// A server's frame in JSON.
pub fn fuzz_server_json(data: &[u8]) {
    check(
        Codec::Json,
        data,
        Codec::decode_server,
        Codec::encode_server,
    );
}

fn check<F: PartialEq + std::fmt::Debug>(
    codec: Codec,
    data: &[u8],
    decode: fn(Codec, &[u8]) -> Result<Decoded<F>, DecodeError>,
    encode: fn(Codec, &F) -> Vec<u8>,
) {
    let frame = match decode(codec, data) {
        Ok(Decoded::Frame(frame)) => frame,
        Ok(Decoded::Skipped) => return,
        Err(error) => {
            // Whatever is wrong can be said to the peer.
            assert!(error.to_string().len() <= crate::limits::MESSAGE_BYTES_MAX);
            assert!(error.code().quic_close().is_some());
            return;
        }
    };
    for codec in [Codec::Cbor, Codec::Json] {
        match decode(codec, &encode(codec, &frame)) {
            Ok(Decoded::Frame(again)) => assert_eq!(again, frame),
            // Escapes can make the JSON form of a large CBOR frame too large.
            Err(DecodeError::TooLarge { .. }) => {}
            other => panic!("{frame:?} came back as {other:?}"),
        }
    }
}

/// A byte stream of frames: the first two bytes choose the limit and the cuts. The cuts must not matter.
pub fn fuzz_frame_reader(data: &[u8]) {
    let [limit, step, stream @ ..] = data else {
        return;
    };
    let limit = usize::from(*limit) * 16;
    let read = |piece: usize| {
        let mut reader = FrameReader::new(limit);
        let mut frames = Vec::new();
        for bytes in stream.chunks(piece) {
            reader.push(bytes);
            loop {
                match reader.pull() {
                    Ok(Some(frame)) => {
                        assert!(frame.len() <= limit);
                        frames.push(frame);
                    }
                    Ok(None) => break,
                    Err(error) => return (frames, Some(error), reader.is_at_boundary()),
                }
            }
            assert!(reader.buffered() <= limit + crate::framing::LENGTH_MAX_BYTES);
        }
        (frames, None, reader.is_at_boundary())
    };
    assert_eq!(read(usize::from(*step) % 17 + 1), read(stream.len().max(1)));
}

/// A stored content map.
pub fn fuzz_content(data: &[u8]) {
    if let Ok(content) = Content::from_cbor(data) {
        let bytes = content.to_cbor();
        assert_eq!(Content::from_cbor(&bytes).as_ref(), Ok(&content));
        assert!(
            content.size() <= data.len(),
            "size counts bytes that are there"
        );
    }
    let shared = crate::SharedNotify::new(Id([0; 16]), 1, 2, crate::Urgency::Normal, data.to_vec());
    if let Ok(shared) = shared {
        for codec in [Codec::Cbor, Codec::Json] {
            let frame = shared.frame(codec, 1, true).to_vec();
            let decoded = codec.decode_server(&frame);
            match (codec, Content::from_cbor(data), decoded) {
                (_, Ok(content), Ok(Decoded::Frame(crate::ServerFrame::Notify(notify)))) => {
                    assert_eq!(notify.content, content);
                }
                (_, _, Err(DecodeError::TooLarge { .. })) => {}
                (Codec::Cbor, Err(_), Err(_)) | (Codec::Json, Err(_), Ok(_)) => {}
                (_, content, decoded) => panic!("{content:?} came back as {decoded:?}"),
            }
        }
    }
}

/// The text of an id.
pub fn fuzz_id(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(id) = text.parse::<Id>() {
        assert_eq!(id.to_string(), text, "an id has one text");
    }
}
