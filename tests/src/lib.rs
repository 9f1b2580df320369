//! What the tests of the whole share: a naive model of one mailbox, a simulator of whole installations, and the real binary
//! on real sockets.
//!
//! docs/testing.md says what is tested how, and how to replay what failed.

// Everything here serves tests: a wrong assumption of theirs must stop them at once.
#![allow(clippy::unwrap_used)]

pub mod model;
pub mod real;
pub mod simulator;
