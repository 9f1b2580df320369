//! 128 opaque bits that name a ping or a device.

use std::fmt;
use std::str::FromStr;

use serde::de::{Deserialize, Deserializer, Visitor};
use serde::ser::{Serialize, Serializer};

const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// The identity of a ping or a device: 128 opaque bits.
///
/// As text it is always 26 lower-case base32 characters (the alphabet of RFC 4648 section 6 in lower case, no padding), in
/// CBOR a byte string of 16 bytes. Parsing is strict, so that one id has exactly one text. The order of ids means nothing;
/// `Ord` is there for maps that must iterate in a stable order.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

/// Why a text is no id. It does not repeat the text, which came from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// The text is not 26 bytes long.
    #[error("an id has exactly 26 characters")]
    Length,
    /// A character outside of `a-z2-7`.
    #[error("an id is written in lower-case base32: a-z and 2-7")]
    Alphabet,
    /// The two bits that the last character has to spare are not zero.
    #[error("the last character of an id has spare bits that must be zero")]
    SpareBits,
}

impl Id {
    /// Length of the text form in bytes.
    pub const TEXT_LEN: usize = 26;

    /// The id made of these bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The bytes of the id.
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// The text form as ASCII bytes, without allocation.
    pub fn text(&self) -> [u8; Self::TEXT_LEN] {
        let bits = u128::from_be_bytes(self.0);
        let mut text = [0u8; Self::TEXT_LEN];
        for (place, character) in text.iter_mut().enumerate() {
            // 26 characters hold 130 bits: the last one carries three, and two spare ones below them.
            let five = match place {
                25 => (bits & 0b111) << 2,
                _ => (bits >> (123 - 5 * place)) & 0b1_1111,
            };
            *character = ALPHABET[five as usize];
        }
        text
    }

    fn parse(text: &[u8]) -> Result<Self, ParseIdError> {
        let text: &[u8; Self::TEXT_LEN] = text.try_into().map_err(|_| ParseIdError::Length)?;
        let mut bits = 0u128;
        for (place, character) in text.iter().enumerate() {
            let five = match character {
                b'a'..=b'z' => character - b'a',
                b'2'..=b'7' => character - b'2' + 26,
                _ => return Err(ParseIdError::Alphabet),
            };
            if place < 25 {
                bits = bits << 5 | u128::from(five);
            } else if five & 0b11 == 0 {
                bits = bits << 3 | u128::from(five >> 2);
            } else {
                return Err(ParseIdError::SpareBits);
            }
        }
        Ok(Self(bits.to_be_bytes()))
    }
}

impl From<[u8; 16]> for Id {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl From<Id> for [u8; 16] {
    fn from(id: Id) -> Self {
        id.0
    }
}

impl FromStr for Id {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        Self::parse(text.as_bytes())
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = self.text();
        f.pad(std::str::from_utf8(&text).map_err(|_| fmt::Error)?)
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Id {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Id;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an id of 26 lower-case base32 characters")
            }
            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Id, E> {
                text.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Text)
    }
}

impl<C> minicbor::Encode<C> for Id {
    fn encode<W: minicbor::encode::Write>(
        &self,
        encoder: &mut minicbor::Encoder<W>,
        _: &mut C,
    ) -> Result<(), minicbor::encode::Error<W::Error>> {
        encoder.bytes(&self.0)?;
        Ok(())
    }
}

impl<'b, C> minicbor::Decode<'b, C> for Id {
    fn decode(
        decoder: &mut minicbor::Decoder<'b>,
        _: &mut C,
    ) -> Result<Self, minicbor::decode::Error> {
        let bytes = decoder.bytes()?;
        let bytes = bytes
            .try_into()
            .map_err(|_| minicbor::decode::Error::message("an id has 16 bytes"))?;
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn text_is_26_lower_case_characters_and_parses_back() {
        for bytes in [
            [0; 16],
            [0xff; 16],
            *b"0123456789abcdef",
            std::array::from_fn(|i| i as u8 * 17),
        ] {
            let id = Id(bytes);
            let text = id.to_string();
            assert_eq!(text.len(), Id::TEXT_LEN);
            assert_eq!(text.parse::<Id>().unwrap(), id);
            // An independent implementation agrees.
            let reference = data_encoding::BASE32_NOPAD.encode(&bytes).to_lowercase();
            assert_eq!(text, reference);
        }
    }

    #[test]
    fn an_id_is_a_byte_string_in_cbor_and_a_string_in_json() {
        let id = Id(*b"0123456789abcdef");
        let bytes = minicbor::to_vec(id).unwrap();
        assert_eq!(bytes, [&[0x50][..], &id.0].concat());
        assert_eq!(minicbor::decode::<Id>(&bytes).unwrap(), id);
        assert!(minicbor::decode::<Id>(&[0x41, 7]).is_err());
        let json = serde_json::to_string(&id).unwrap();
        assert_eq!(json, format!("\"{id}\""));
        assert_eq!(serde_json::from_str::<Id>(&json).unwrap(), id);
        assert!(serde_json::from_str::<Id>("\"abc\"").is_err());
    }

    #[test]
    fn an_id_has_exactly_one_text() {
        let text = Id([7; 16]).to_string();
        assert_eq!(
            text.to_uppercase().parse::<Id>(),
            Err(ParseIdError::Alphabet)
        );
        assert_eq!(text[1..].parse::<Id>(), Err(ParseIdError::Length));
        assert_eq!(format!("{text}=").parse::<Id>(), Err(ParseIdError::Length));
        assert_eq!(
            "aaaaaaaaaaaaaaaaaaaaaaaaab".parse::<Id>(),
            Err(ParseIdError::SpareBits)
        );
        assert_eq!(
            "aaaaaaaaaaaaaaaaaaaaaaaaa1".parse::<Id>(),
            Err(ParseIdError::Alphabet)
        );
        assert_eq!("".parse::<Id>(), Err(ParseIdError::Length));
    }
}
