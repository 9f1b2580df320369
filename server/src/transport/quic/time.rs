//! The time that the protocol is told.
//!
//! QUIC counts in the system's own instants, and its timers are tokio's: they must be of one clock.

use std::time::Instant;

/// Now.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
