//! Time enters here.

use crate::delivery::Now;

/// The two clocks as one pair.
pub trait Clock: Send + Sync + 'static {
    /// This moment. `mono` never moves backwards; `unix_ms` is the wall time at the start plus the monotonic
    /// time since, slewed towards the system's clock, so it never jumps within a run.
    fn now(&self) -> Now;

    /// How the pair stands to the system's wall clock.
    fn state(&self) -> ClockState;
}

/// How our wall time stands to the system's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClockState {
    /// Within a minute; slewing if need be.
    Steady,
    /// The system's clock jumped by this many milliseconds (positive: forwards). The sweep pauses until it comes
    /// back or the server is restarted.
    Jumped {
        /// System clock minus ours.
        by_ms: i64,
    },
}
