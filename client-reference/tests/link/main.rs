//! The client on real sockets against a scripted server: as a library, and as the two programs that devices authors look at.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
#![allow(
    clippy::wildcard_enum_match_arm,
    reason = "a test names what it expects"
)]

mod commands;
mod faults;
mod programs;
mod proxies;
mod routers;
mod sessions;
mod support;
