//! One `notify` for many sessions: encoded once, shared by all; only a small head differs.

use std::sync::OnceLock;

use bytes::Bytes;
use serde::Serialize;

use crate::codec::{Codec, DecodeError, cbor, json};
use crate::content::Content;
use crate::frame::Urgency;
use crate::id::Id;

/// Most bytes that the head of a `notify` takes: `{"type":"notify","seq":18446744073709551615,"redelivered":false,`.
const HEAD_MAX_BYTES: usize = 64;

/// The part of a `notify` that differs from session to session: `seq` and `redelivered`. No allocation.
#[derive(Debug, Clone, Copy)]
pub struct NotifyHead {
    bytes: [u8; HEAD_MAX_BYTES],
    len: u8,
}

impl NotifyHead {
    fn new(head: &[u8]) -> Self {
        let mut bytes = [0; HEAD_MAX_BYTES];
        bytes[..head.len()].copy_from_slice(head);
        Self {
            bytes,
            len: head.len() as u8,
        }
    }

    /// The bytes of the head.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

/// One session's `notify`: head and tail, to be written one after the other.
#[derive(Debug, Clone)]
pub struct NotifyFrame {
    /// This session's own bytes.
    pub head: NotifyHead,
    /// The bytes that all sessions with this codec share.
    pub tail: Bytes,
}

impl NotifyFrame {
    /// Length of the frame in bytes.
    pub fn len(&self) -> usize {
        self.head.as_bytes().len() + self.tail.len()
    }

    /// Never: a frame has bytes.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Head and tail in one piece.
    pub fn to_vec(&self) -> Vec<u8> {
        [self.head.as_bytes(), &self.tail].concat()
    }
}

/// A notification on its way to any number of sessions.
///
/// The content stays the CBOR map that it is at rest: on a CBOR link its entries follow the head byte for byte, also those
/// of a later version that this one does not know. For JSON it is transcoded once, when the first JSON session asks.
#[derive(Debug)]
pub struct SharedNotify {
    id: Id,
    accepted_ms: u64,
    expires_ms: u64,
    urgency: Urgency,
    content_entries: usize,
    content_cbor: Bytes,
    cbor: OnceLock<Bytes>,
    json: OnceLock<Bytes>,
}

impl SharedNotify {
    /// A notification with the content that [`Content::to_cbor`] made. Members as in [`Notify`](crate::Notify).
    ///
    /// # Errors
    /// When the content is not such a map, for instance because the record at rest is damaged. Ours, never the device's fault.
    pub fn new(
        id: Id,
        accepted_ms: u64,
        expires_ms: u64,
        urgency: Urgency,
        content_cbor: impl Into<Bytes>,
    ) -> Result<Self, DecodeError> {
        let content_cbor = content_cbor.into();
        let content_entries = cbor::check_content(&content_cbor)?;
        let (cbor, json) = Default::default();
        Ok(Self {
            id,
            accepted_ms,
            expires_ms,
            urgency,
            content_entries,
            content_cbor,
            cbor,
            json,
        })
    }

    /// The ping that made it.
    pub fn id(&self) -> Id {
        self.id
    }

    /// When it is of no more use.
    pub fn expires_ms(&self) -> u64 {
        self.expires_ms
    }

    /// How urgent it is.
    pub fn urgency(&self) -> Urgency {
        self.urgency
    }

    /// The frame for one session.
    pub fn frame(&self, codec: Codec, seq: u64, redelivered: bool) -> NotifyFrame {
        match codec {
            Codec::Cbor => {
                let mut writer = cbor::Writer::with_capacity(HEAD_MAX_BYTES);
                cbor::write_notify_head(&mut writer, self.content_entries, seq, redelivered);
                let tail = self.cbor.get_or_init(|| self.cbor_tail()).clone();
                NotifyFrame {
                    head: NotifyHead::new(&writer.into_bytes()),
                    tail,
                }
            }
            Codec::Json => {
                let head =
                    format!("{{\"type\":\"notify\",\"seq\":{seq},\"redelivered\":{redelivered},");
                let tail = self.json.get_or_init(|| self.json_tail()).clone();
                NotifyFrame {
                    head: NotifyHead::new(head.as_bytes()),
                    tail,
                }
            }
        }
    }

    fn cbor_tail(&self) -> Bytes {
        let mut writer = cbor::Writer::with_capacity(self.content_cbor.len() + 64);
        cbor::write_notify_own(
            &mut writer,
            self.id,
            self.accepted_ms,
            self.expires_ms,
            self.urgency,
        );
        writer.raw(&self.content_cbor[1..]);
        writer.into_bytes().into()
    }

    fn json_tail(&self) -> Bytes {
        #[derive(Serialize)]
        struct Tail {
            id: Id,
            accepted_ms: u64,
            expires_ms: u64,
            urgency: Urgency,
            #[serde(flatten)]
            content: Content,
        }
        // A map whose known members have impossible values cannot come from `Content::to_cbor`; a JSON device then gets a
        // bare notification rather than none, and fetches what it needs.
        let content = Content::from_cbor(&self.content_cbor).unwrap_or_default();
        let Self {
            id,
            accepted_ms,
            expires_ms,
            urgency,
            ..
        } = *self;
        let tail = json::write(&Tail {
            id,
            accepted_ms,
            expires_ms,
            urgency,
            content,
        });
        Bytes::from(tail).slice(1..)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::{Decoded, Notify, ServerFrame};

    fn contents() -> [Content; 3] {
        let full = Content {
            title: Some("Title \"quoted\"".into()),
            body: Some("Bödy\n".into()),
            sound: Some("bell".into()),
            badge: Some(3),
            vibrate_ms: Some(200),
            category: Some("invoice".into()),
            sync: Some(vec!["A".into(), "B".into()]),
            data: Some(Bytes::from_static(&[0, 255, 7])),
            encoding: Some(crate::Encoding::Aes128Gcm),
            topic: Some("news".into()),
        };
        [
            Content::default(),
            Content {
                body: Some("hi".into()),
                ..Default::default()
            },
            full,
        ]
    }

    #[test]
    fn a_shared_frame_is_the_very_frame_that_a_single_one_would_be() {
        for content in contents() {
            let (id, urgency) = (Id([9; 16]), Urgency::High);
            let shared = SharedNotify::new(id, 1_000, 2_000, urgency, content.to_cbor()).unwrap();
            for codec in [Codec::Cbor, Codec::Json] {
                for (seq, redelivered) in [(1, false), (24, true), (u64::MAX, false)] {
                    let content = content.clone();
                    let single = ServerFrame::Notify(Notify {
                        seq,
                        redelivered,
                        id,
                        accepted_ms: 1_000,
                        expires_ms: 2_000,
                        urgency,
                        content,
                    });
                    let frame = shared.frame(codec, seq, redelivered);
                    assert_eq!(frame.to_vec(), codec.encode_server(&single));
                    assert_eq!(frame.len(), frame.to_vec().len());
                }
            }
        }
    }

    #[test]
    fn sessions_share_one_tail_per_codec() {
        let shared =
            SharedNotify::new(Id([1; 16]), 1, 2, Urgency::Low, contents()[1].to_cbor()).unwrap();
        for codec in [Codec::Cbor, Codec::Json] {
            let (one, two) = (shared.frame(codec, 1, false), shared.frame(codec, 2, true));
            assert_eq!(one.tail.as_ptr(), two.tail.as_ptr());
        }
    }

    #[test]
    fn content_members_of_a_later_version_travel_on_over_cbor() {
        // {9: "hi", 31: [1]}
        let content = [0xa2, 0x09, 0x62, b'h', b'i', 0x18, 0x1f, 0x81, 0x01];
        let shared = SharedNotify::new(Id([1; 16]), 1, 2, Urgency::Low, content.to_vec()).unwrap();
        let bytes = shared.frame(Codec::Cbor, 1, false).to_vec();
        assert!(bytes.ends_with(&content[1..]));
        for codec in [Codec::Cbor, Codec::Json] {
            let decoded = codec
                .decode_server(&shared.frame(codec, 1, false).to_vec())
                .unwrap();
            let Decoded::Frame(ServerFrame::Notify(notify)) = decoded else {
                panic!("a notify")
            };
            assert_eq!(notify.content, contents()[1]);
        }
    }

    #[test]
    fn damaged_content_is_refused() {
        let new =
            |content: &[u8]| SharedNotify::new(Id([1; 16]), 1, 2, Urgency::Low, content.to_vec());
        assert!(new(&[]).is_err());
        assert!(new(&[0xa1]).is_err());
        assert!(new(&[0xa0, 0x00]).is_err(), "trailing bytes");
        assert!(
            new(&[0xa1, 0x01, 0x00]).is_err(),
            "a key that belongs to the frame"
        );
        assert!(new(&[0xb8, 0x00]).is_err(), "a longer header than needed");
        assert!(new(&[0xbf, 0xff]).is_err(), "an indefinite map");
        assert!(new(&[0xa0]).is_ok());
    }
}
