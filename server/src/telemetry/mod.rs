//! What an operator sees: the one list of metrics, and how log lines are written.
//!
//! Everybody but the core may use it; it knows nobody inside.

pub mod logging;
pub mod metrics;
