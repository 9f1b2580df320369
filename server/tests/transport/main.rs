//! The device port on real sockets, with a runtime that does what the test says.
//!
//! Each test is a line of docs/abuse.md, or of the life of a well-behaved device. `desk` stands in for the runtime,
//! `device` is a peer that can also misbehave.

#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "all others are one surprise"
)]
#![allow(unreachable_pub, reason = "what the modules of one test share")]

mod admission;
mod desk;
mod device;
mod life;
mod misbehaviour;
mod proxy;
mod slow;
