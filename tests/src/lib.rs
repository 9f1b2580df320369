//! What the tests of the whole share: the real binary on real sockets.

pub mod real;
