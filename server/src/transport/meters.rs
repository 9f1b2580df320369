//! What the transports count. Handles are looked up once for each carrier, because a look-up costs more than a count.

use bellwire_protocol::Carrier;
use metrics::{Counter, counter};

use crate::telemetry::metrics as names;

/// The counters of one carrier.
pub(crate) struct Meters {
    carrier: &'static str,
    accepts: Counter,
    bytes_received: Counter,
    bytes_sent: Counter,
    frames_received: Counter,
    frames_sent: Counter,
}

impl Meters {
    /// The counters of this carrier, in the recorder installed now.
    pub(crate) fn new(carrier: Carrier) -> Meters {
        let carrier = carrier.name();
        let of = |name: &'static str, direction: &'static str| counter!(name, "carrier" => carrier, "direction" => direction);
        Meters {
            carrier,
            accepts: counter!(names::LINK_ACCEPTS_TOTAL, "carrier" => carrier),
            bytes_received: of(names::LINK_BYTES_TOTAL, "received"),
            bytes_sent: of(names::LINK_BYTES_TOTAL, "sent"),
            frames_received: of(names::LINK_FRAMES_TOTAL, "received"),
            frames_sent: of(names::LINK_FRAMES_TOTAL, "sent"),
        }
    }

    /// A connection was let in, as far as knocking goes.
    pub(crate) fn accepted(&self) {
        self.accepts.increment(1);
    }

    /// A connection was turned away before it could say `hello`, or never got so far.
    pub(crate) fn refused(&self, reason: &'static str) {
        counter!(names::LINK_REFUSALS_TOTAL, "carrier" => self.carrier, "reason" => reason)
            .increment(1);
    }

    /// A link ended.
    pub(crate) fn ended(&self, reason: &'static str) {
        counter!(names::LINK_ENDS_TOTAL, "carrier" => self.carrier, "reason" => reason)
            .increment(1);
    }

    /// Bytes went through.
    pub(crate) fn bytes(&self, received: u64, sent: u64) {
        if received > 0 {
            self.bytes_received.increment(received);
        }
        if sent > 0 {
            self.bytes_sent.increment(sent);
        }
    }

    /// A frame came in.
    pub(crate) fn frame_received(&self) {
        self.frames_received.increment(1);
    }

    /// A frame was handed on to be written.
    pub(crate) fn frame_sent(&self) {
        self.frames_sent.increment(1);
    }
}
