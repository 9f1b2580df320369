//! Identifiers, each a type of its own, so that one is never taken for another.

use std::fmt;
use std::str::FromStr;

use data_encoding::{Encoding, Specification};
use std::sync::LazyLock;

/// RFC 4648 base32, lower case, without padding.
static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut spec = Specification::new();
    spec.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    spec.encoding()
        .expect("a constant alphabet of 32 distinct symbols")
});

/// A text that is not the text of an identifier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("an id is 26 characters of a-z and 2-7")]
pub struct IdError;

macro_rules! opaque_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// 128 opaque bits, written as 26 lower-case base32 characters, never sorted by meaning.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub [u8; 16]);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&BASE32.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let bytes = BASE32.decode(text.as_bytes()).map_err(|_| IdError)?;
                bytes.try_into().map($name).map_err(|_| IdError)
            }
        }
    };
}

opaque_id! {
    /// The identity of one publish request and of every notification it made.
    PingId
}
opaque_id! {
    /// The identity of one installation that holds a connection; unique across apps.
    DeviceId
}

/// A tenant. `default` is app 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AppId(pub u32);

impl AppId {
    /// The app that exists on every server.
    pub const DEFAULT: AppId = AppId(1);
}

/// One attached connection of this run; never reused within a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SessionId(pub u64);

/// The runtime's name for somebody who waits for an answer. The core only carries it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(pub u64);

/// Those who wait for the answer about one notification; mostly one.
pub type Tickets = smallvec::SmallVec<[Ticket; 2]>;
