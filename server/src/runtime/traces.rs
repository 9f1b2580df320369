//! Which trace a ping belongs to, so that the log lines of its acceptance and of its outcomes can be found together.
//!
//! Kept in memory only, for pings whose lines will be written: those that their caller samples, and all of them while
//! `debug` is on for this module. Bounded; the oldest give way, and their outcomes are then logged without a trace.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::locked;
use crate::delivery::{DeviceId, Outcome, PingId};

/// The origin of so many pings, the newest, is remembered: at 150 bytes each, and at most 128 more for the id of the
/// request, 15 to 28 MB.
const TRACED_MAX: usize = 100_000;

/// A trace and our place in it, in the words of W3C Trace Context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trace {
    /// The whole trace; never all zeros.
    pub trace_id: [u8; 16],
    /// Our part of it; never all zeros.
    pub span_id: [u8; 8],
    /// The caller records this trace, so our lines are written at `info` rather than `debug`.
    pub sampled: bool,
}

/// Bytes as lower-case hexadecimal digits.
struct Hex<const N: usize>([u8; N]);

impl<const N: usize> fmt::Display for Hex<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Trace {
    /// The id of the whole trace as it is written.
    #[must_use]
    pub fn trace_id(&self) -> impl fmt::Display + use<> {
        Hex(self.trace_id)
    }

    /// The id of our part as it is written.
    #[must_use]
    pub fn span_id(&self) -> impl fmt::Display + use<> {
        Hex(self.span_id)
    }

    /// Whether lines of a trace that nobody samples are written now.
    #[must_use]
    pub fn unsampled_are_logged() -> bool {
        tracing::enabled!(tracing::Level::DEBUG)
    }
}

/// Where a ping came from. Front doors find it among the extensions of a request that is traced.
#[derive(Debug, Clone)]
pub struct Origin {
    /// The trace it belongs to.
    pub trace: Trace,
    /// The id of the request that brought it.
    pub request: Arc<str>,
}

/// A line at `info` for a trace that is sampled, at `debug` for others.
macro_rules! say {
    ($trace:expr, $($line:tt)+) => {
        if $trace.sampled {
            tracing::info!(trace_id = %$trace.trace_id(), span_id = %$trace.span_id(), $($line)+)
        } else {
            tracing::debug!(trace_id = %$trace.trace_id(), span_id = %$trace.span_id(), $($line)+)
        }
    };
}

impl Origin {
    /// The ping was accepted.
    pub(super) fn accepted(&self, ping: PingId, devices: u32, rejected: usize) {
        say!(self.trace, %ping, devices, rejected, request_id = &*self.request, "a ping was accepted");
    }

    /// The ping was not accepted.
    pub(super) fn refused(&self, code: &'static str) {
        say!(
            self.trace,
            code,
            request_id = &*self.request,
            "a ping was refused"
        );
    }
}

/// The traces of recent pings.
#[derive(Debug, Default)]
pub(super) struct Traces {
    known: Mutex<Known>,
    /// As many as are known, so that nobody takes the lock where nothing is traced.
    count: AtomicUsize,
}

#[derive(Debug, Default)]
struct Known {
    pings: HashMap<PingId, Entry>,
    /// Oldest first; those that ended are skipped when their turn comes.
    order: VecDeque<PingId>,
}

#[derive(Debug)]
struct Entry {
    origin: Origin,
    /// Notifications without an outcome.
    open: usize,
}

impl Traces {
    /// Remembers where a ping came from that addresses so many devices.
    pub(super) fn open(&self, ping: PingId, origin: Origin, devices: usize) {
        if devices == 0 {
            return;
        }
        let mut known = locked(&self.known);
        let entry = Entry {
            origin,
            open: devices,
        };
        if known.pings.insert(ping, entry).is_none() {
            known.order.push_back(ping);
        }
        // One for one, and those that ended before do not count, so this is at most a few steps in the mean.
        while known.order.len() > TRACED_MAX {
            if let Some(oldest) = known.order.pop_front() {
                known.pings.remove(&oldest);
            }
        }
        self.count.store(known.pings.len(), Ordering::Relaxed);
    }

    /// So many devices of a ping did not accept theirs: nothing of these will end.
    pub(super) fn rejected(&self, ping: PingId, devices: usize) {
        let mut known = locked(&self.known);
        if let Some(entry) = known.pings.get_mut(&ping) {
            entry.open = entry.open.saturating_sub(devices);
            if entry.open == 0 {
                known.close(ping);
            }
        }
        self.count.store(known.pings.len(), Ordering::Relaxed);
    }

    /// A notification ended.
    pub(super) fn ended(
        &self,
        ping: PingId,
        device: DeviceId,
        outcome: Outcome,
        took_ms: Option<u64>,
    ) {
        let origin = self.origin_of_one_ended(ping);
        let outcome = outcome.as_str();
        match origin {
            Some(Origin { trace, request }) => {
                say!(trace, %ping, %device, outcome, took_ms, request_id = &*request, "a notification ended");
            }
            // Accepted in an earlier run, or before somebody looked, or too long ago.
            None => tracing::debug!(%ping, %device, outcome, took_ms, "a notification ended"),
        }
    }

    fn origin_of_one_ended(&self, ping: PingId) -> Option<Origin> {
        if self.count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let mut known = locked(&self.known);
        let entry = known.pings.get_mut(&ping)?;
        let origin = entry.origin.clone();
        entry.open -= 1;
        if entry.open == 0 {
            known.close(ping);
            self.count.store(known.pings.len(), Ordering::Relaxed);
        }
        Some(origin)
    }
}

impl Known {
    fn close(&mut self, ping: PingId) {
        self.pings.remove(&ping);
        if self.pings.is_empty() {
            self.order.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const TRACE: Trace = Trace {
        trace_id: [0xab; 16],
        span_id: [7; 8],
        sampled: true,
    };

    fn origin() -> Origin {
        Origin {
            trace: TRACE,
            request: "order-17".into(),
        }
    }

    fn one_ended(traces: &Traces, ping: PingId) -> Option<Trace> {
        let origin = traces.origin_of_one_ended(ping)?;
        assert_eq!(&*origin.request, "order-17");
        Some(origin.trace)
    }

    fn ping(n: usize) -> PingId {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&n.to_be_bytes());
        PingId(id)
    }

    #[test]
    fn a_trace_is_known_until_the_last_notification_has_ended() {
        let traces = Traces::default();
        assert_eq!(one_ended(&traces, ping(1)), None);
        traces.open(ping(1), origin(), 2);
        assert_eq!(one_ended(&traces, ping(2)), None);
        assert_eq!(one_ended(&traces, ping(1)), Some(TRACE));
        assert_eq!(one_ended(&traces, ping(1)), Some(TRACE));
        assert_eq!(one_ended(&traces, ping(1)), None);
        traces.open(ping(3), origin(), 3);
        traces.rejected(ping(3), 2);
        assert_eq!(one_ended(&traces, ping(3)), Some(TRACE));
        traces.open(ping(3), origin(), 1);
        traces.rejected(ping(3), 1);
        assert_eq!(one_ended(&traces, ping(3)), None);
        traces.open(ping(4), origin(), 0);
        assert_eq!(traces.count.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn the_oldest_traces_give_way() {
        let traces = Traces::default();
        for n in 0..=TRACED_MAX {
            traces.open(ping(n), origin(), 1);
        }
        assert_eq!(one_ended(&traces, ping(0)), None);
        assert_eq!(one_ended(&traces, ping(1)), Some(TRACE));
        // Those that end at once leave nothing behind, however many they are.
        for n in 0..3 * TRACED_MAX {
            traces.open(ping(TRACED_MAX + n), origin(), 1);
            one_ended(&traces, ping(TRACED_MAX + n));
        }
        let known = locked(&traces.known);
        assert!(known.pings.len() <= TRACED_MAX && known.order.len() <= TRACED_MAX);
    }

    #[test]
    fn ids_are_written_as_the_standard_has_them() {
        assert_eq!(TRACE.trace_id().to_string(), "ab".repeat(16));
        assert_eq!(TRACE.span_id().to_string(), "0707070707070707");
    }
}
