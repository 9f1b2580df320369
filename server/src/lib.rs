//! Bellwire's server: push over connections that the company owns.
//!
//! Read the modules in this order: [`delivery`] decides, [`ports`] says what it needs of the outside, and the
//! rest carries bytes and rows to and from it. `ARCHITECTURE.md` at the top of the repository draws the map.

#![expect(
    rustdoc::private_intra_doc_links,
    reason = "these pages are for those who work on the server, and are built with private items"
)]

pub mod compat;
pub mod config;
pub mod delivery;
pub mod http;
pub mod outbound;
pub mod ports;
pub mod runtime;
pub mod store;
pub mod telemetry;
pub mod transport;
