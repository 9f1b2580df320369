//! The content of a notification: what the app on the device gets to see.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::DecodeError;
use crate::codec::cbor;
use crate::limits::{SYNC_MAX, TOPIC_BYTES_MAX};

/// How `data` is encrypted end to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Encoding {
    /// The content coding of RFC 8188, as Web Push uses it (RFC 8291).
    #[serde(rename = "aes128gcm")]
    Aes128Gcm,
}

impl Encoding {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm => "aes128gcm",
        }
    }
}

/// The content of a notification. Every member is optional; an empty content is a bare wake-up.
///
/// The server carries it and never looks inside: at rest and on a CBOR link it is the map that [`to_cbor`](Self::to_cbor)
/// makes, copied byte for byte. `Debug` prints sizes only, so that content does not end in a log.
///
/// In JSON the members have their names, `data` is padded standard base64, and unknown members are skipped. A caller that
/// wants to refuse unknown members compares with [`MEMBERS`](Self::MEMBERS).
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Content {
    /// Headline of the message that is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    /// Text of the message that is shown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub body: Option<String>,
    /// Name of the sound to play.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sound: Option<String>,
    /// Number to show on the app's icon; 0 takes it away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub badge: Option<u32>,
    /// How long to vibrate, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vibrate_ms: Option<u32>,
    /// Name of the set of actions that the app offers with the message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub category: Option<String>,
    /// Names of the sources that the app should synchronise, at most [`SYNC_MAX`].
    #[serde(
        default,
        deserialize_with = "sync_from_json",
        skip_serializing_if = "Option::is_none"
    )]
    pub sync: Option<Vec<String>>,
    /// Bytes for the app.
    #[serde(
        default,
        with = "base64_bytes",
        skip_serializing_if = "Option::is_none"
    )]
    pub data: Option<Bytes>,
    /// Set when `data` is encrypted end to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encoding: Option<Encoding>,
    /// The topic that the ping addressed, at most [`TOPIC_BYTES_MAX`] bytes.
    #[serde(
        default,
        deserialize_with = "topic_from_json",
        skip_serializing_if = "Option::is_none"
    )]
    pub topic: Option<String>,
}

/// Keys of the content members in CBOR.
pub(crate) mod key {
    pub(crate) const TITLE: u64 = 8;
    pub(crate) const BODY: u64 = 9;
    pub(crate) const SOUND: u64 = 10;
    pub(crate) const BADGE: u64 = 11;
    pub(crate) const VIBRATE_MS: u64 = 12;
    pub(crate) const CATEGORY: u64 = 13;
    pub(crate) const SYNC: u64 = 14;
    pub(crate) const DATA: u64 = 15;
    pub(crate) const ENCODING: u64 = 16;
    pub(crate) const TOPIC: u64 = 17;
}

impl Content {
    /// JSON names of all members, in the order of their CBOR keys.
    pub const MEMBERS: &'static [&'static str] = &[
        "title",
        "body",
        "sound",
        "badge",
        "vibrate_ms",
        "category",
        "sync",
        "data",
        "encoding",
        "topic",
    ];

    /// The size that limits count, in bytes: UTF-8 of all texts (the names in `sync`, `encoding` and `topic` too) plus the
    /// decoded bytes of `data`. Numbers count nothing, and neither does what a codec adds.
    pub fn size(&self) -> usize {
        let texts = [
            &self.title,
            &self.body,
            &self.sound,
            &self.category,
            &self.topic,
        ];
        let texts: usize = texts.into_iter().flatten().map(String::len).sum();
        let sync: usize = self.sync.iter().flatten().map(String::len).sum();
        let data = self.data.as_ref().map_or(0, Bytes::len);
        let encoding = self.encoding.map_or(0, |encoding| encoding.name().len());
        texts + sync + data + encoding
    }

    /// Whether there is no member at all.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The content as one definite CBOR map with integer keys and at most 23 entries, so that its header is the one byte
    /// `0xA0 + n`. This is the form at rest and the tail of a CBOR `notify`.
    pub fn to_cbor(&self) -> Vec<u8> {
        let mut writer = cbor::Writer::with_capacity(self.size() + 64);
        writer.map(self.entries());
        self.write_entries(&mut writer);
        writer.into_bytes()
    }

    /// Reads what [`to_cbor`](Self::to_cbor) wrote, skipping unknown entries.
    ///
    /// # Errors
    /// When it is not exactly one such map, a known member has a wrong type or comes twice, or a limit is crossed.
    pub fn from_cbor(bytes: &[u8]) -> Result<Self, DecodeError> {
        cbor::read_content(bytes)
    }

    pub(crate) fn entries(&self) -> usize {
        [
            self.title.is_some(),
            self.body.is_some(),
            self.sound.is_some(),
            self.badge.is_some(),
            self.vibrate_ms.is_some(),
            self.category.is_some(),
            self.sync.is_some(),
            self.data.is_some(),
            self.encoding.is_some(),
            self.topic.is_some(),
        ]
        .into_iter()
        .map(usize::from)
        .sum()
    }

    pub(crate) fn write_entries(&self, writer: &mut cbor::Writer) {
        writer.optional_text(key::TITLE, self.title.as_deref());
        writer.optional_text(key::BODY, self.body.as_deref());
        writer.optional_text(key::SOUND, self.sound.as_deref());
        writer.optional_uint(key::BADGE, self.badge.map(u64::from));
        writer.optional_uint(key::VIBRATE_MS, self.vibrate_ms.map(u64::from));
        writer.optional_text(key::CATEGORY, self.category.as_deref());
        if let Some(sync) = &self.sync {
            writer.uint(key::SYNC);
            writer.texts(sync);
        }
        if let Some(data) = &self.data {
            writer.uint(key::DATA);
            writer.bytes(data);
        }
        writer.optional_text(key::ENCODING, self.encoding.map(Encoding::name));
        writer.optional_text(key::TOPIC, self.topic.as_deref());
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Content({} members, {} bytes)",
            self.entries(),
            self.size()
        )
    }
}

fn sync_from_json<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<String>>, D::Error> {
    let sync = Option::<Vec<String>>::deserialize(deserializer)?;
    match &sync {
        Some(names) if names.len() > SYNC_MAX => Err(serde::de::Error::custom(format_args!(
            "`sync` has at most {SYNC_MAX} names"
        ))),
        _ => Ok(sync),
    }
}

fn topic_from_json<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let topic = Option::<String>::deserialize(deserializer)?;
    match &topic {
        Some(name) if name.len() > TOPIC_BYTES_MAX => Err(serde::de::Error::custom(format_args!(
            "`topic` has at most {TOPIC_BYTES_MAX} bytes"
        ))),
        _ => Ok(topic),
    }
}

/// Bytes in JSON: padded standard base64 (RFC 4648 section 4), anything else is malformed.
mod base64_bytes {
    use super::*;

    pub(super) fn serialize<S: Serializer>(
        bytes: &Option<Bytes>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        match bytes {
            Some(bytes) => serializer.serialize_some(&STANDARD.encode(bytes)),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Bytes>, D::Error> {
        let Some(text) = Option::<std::borrow::Cow<'de, str>>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let bytes = STANDARD.decode(text.as_bytes());
        let bytes =
            bytes.map_err(|_| serde::de::Error::custom("`data` is padded standard base64"))?;
        Ok(Some(bytes.into()))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn size_counts_every_text_and_decoded_byte_and_no_number() {
        let json = r#"{"title":"ab","body":"ü","sound":"s","badge":7,"vibrate_ms":100,"category":"cat",
            "sync":["x","yz"],"data":"AAEC","encoding":"aes128gcm","topic":"news"}"#;
        let content: Content = serde_json::from_str(json).unwrap();
        assert_eq!(content.size(), 2 + 2 + 1 + 3 + 3 + 3 + 9 + 4);
        assert_eq!(content.entries(), Content::MEMBERS.len());
        assert_eq!(Content::default().size(), 0);
        assert!(Content::default().is_empty() && !content.is_empty());
    }

    #[test]
    fn the_map_has_a_header_of_one_byte_and_keys_of_the_range_set_aside() {
        let json = r#"{"title":"a","body":"b","sound":"c","badge":1,"vibrate_ms":2,"category":"d","sync":[],
            "data":"","encoding":"aes128gcm","topic":"e"}"#;
        let content: Content = serde_json::from_str(json).unwrap();
        let bytes = content.to_cbor();
        assert_eq!(bytes[0], 0xa0 + Content::MEMBERS.len() as u8);
        assert_eq!(cbor::check_content(&bytes), Ok(Content::MEMBERS.len()));
        assert_eq!(Content::from_cbor(&bytes), Ok(content));
        assert_eq!(Content::default().to_cbor(), [0xa0]);
    }

    #[test]
    fn json_skips_unknown_members_and_takes_null_for_absent() {
        let content: Content =
            serde_json::from_str(r#"{"image":[1],"title":null,"data":null,"sync":null}"#).unwrap();
        assert!(content.is_empty());
        for json in [
            r#"{"data":"AAE"}"#,
            r#"{"data":"AA-_"}"#,
            r#"{"badge":-1}"#,
            r#"{"encoding":"gzip"}"#,
        ] {
            assert!(serde_json::from_str::<Content>(json).is_err(), "{json}");
        }
        let long = format!(r#"{{"topic":"{}"}}"#, "x".repeat(TOPIC_BYTES_MAX + 1));
        assert!(serde_json::from_str::<Content>(&long).is_err());
        let many = format!(r#"{{"sync":{:?}}}"#, vec!["s"; SYNC_MAX + 1]);
        assert!(serde_json::from_str::<Content>(&many).is_err());
    }
}
