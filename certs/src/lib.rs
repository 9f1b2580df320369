//! Certificates for Bellwire: a development authority, a reader, and safe files.
//!
//! Three small parts, in reading order:
//!
//! - [`DevAuthority`] makes a certificate authority and, from it, certificates for a server, a
//!   device or another client. It exists so that a first run works within a second and tests have
//!   something to trust. It is not a PKI: it keeps no list of what it issued and cannot revoke.
//!   `certs/README.md` says how a company's own PKI takes its place.
//! - [`inspect()`], [`inspect_chain`] and [`check_server`] read PEM files whoever made them, and say
//!   what is wrong with them in words that an operator can act on.
//! - [`write_private`] and [`write_public`] put files on disk whole or not at all, private ones
//!   readable by their owner only.
//!
//! Nothing here reads the clock: every validity starts from a time that the caller hands in. Keys
//! and serial numbers come from the cryptographic generator of `aws-lc-rs`.

mod authority;
mod error;
mod files;
mod inspect;

pub use authority::{
    AUTHORITY_DAYS, BACKDATE, CLIENT_URI_PREFIX, DEVICE_URI_PREFIX, DevAuthority, Issued,
    LEAF_DAYS, MAX_NAME_CHARS, MAX_SERVER_NAMES, SanName, Validity,
};
pub use error::CertError;
pub use files::{IfExists, write_private, write_public};
pub use inspect::{
    AltName, CertInfo, MAX_CHAIN, MAX_PEM_BYTES, check_server, check_server_files, inspect,
    inspect_chain, inspect_file,
};

/// The example of the README, compiled and run as a documentation test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
pub struct ReadmeExamples;
