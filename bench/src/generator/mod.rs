//! What plays the devices and the backends: processes of their own, so that the kernel tells how much of the machine each
//! of them took, and so that none waits for another.
//!
//! Every ping carries its number and the time at which it was due, in its title. So a device tells by itself how long a
//! ping took, and everybody counts: what was accepted here must have arrived there, once.

pub(crate) mod backends;
pub(crate) mod devices;

use hdrhistogram::Histogram;

/// Latencies above this are counted as this, in microseconds.
const LATENCY_MAX_MICROS: u64 = 600_000_000;

/// Digits of the number and of the time in a title.
const NUMBER_DIGITS: usize = 12;
const TIME_DIGITS: usize = 20;

/// Length of a title.
pub(crate) const TITLE_BYTES: usize = 1 + NUMBER_DIGITS + TIME_DIGITS;

/// Whom a ping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The device whose place in the list is the number modulo the length of the list.
    Single,
    /// Every device.
    Fan,
}

/// What stands in a title.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Title {
    pub(crate) kind: Kind,
    pub(crate) number: u64,
    /// When the ping was due, on [`crate::clock`].
    pub(crate) due: u64,
}

impl Title {
    /// Writes it over `TITLE_BYTES` bytes.
    pub(crate) fn write(self, out: &mut [u8]) {
        out[0] = match self.kind {
            Kind::Single => b's',
            Kind::Fan => b'f',
        };
        digits(&mut out[1..=NUMBER_DIGITS], self.number);
        digits(&mut out[1 + NUMBER_DIGITS..TITLE_BYTES], self.due);
    }

    /// `None`: not one of ours.
    pub(crate) fn read(text: &str) -> Option<Title> {
        if text.len() != TITLE_BYTES {
            return None;
        }
        Some(Title {
            kind: match text.as_bytes()[0] {
                b's' => Kind::Single,
                b'f' => Kind::Fan,
                _ => return None,
            },
            number: text.get(1..=NUMBER_DIGITS)?.parse().ok()?,
            due: text.get(1 + NUMBER_DIGITS..)?.parse().ok()?,
        })
    }
}

fn digits(out: &mut [u8], mut rest: u64) {
    for digit in out.iter_mut().rev() {
        *digit = b'0' + (rest % 10) as u8;
        rest /= 10;
    }
}

/// A histogram of microseconds.
pub(crate) fn histogram() -> Histogram<u64> {
    // The bounds are constants that the library accepts.
    Histogram::new_with_max(LATENCY_MAX_MICROS, 3)
        .unwrap_or_else(|_| unreachable!("the bounds are valid"))
}

/// Records a time in nanoseconds.
pub(crate) fn record(micros: &mut Histogram<u64>, nanos: u64) {
    micros.saturating_record((nanos / 1_000).max(1));
}

/// How a histogram travels between processes: its values and how often each was recorded.
pub(crate) type Recorded = Vec<(u64, u64)>;

pub(crate) fn recorded(micros: &Histogram<u64>) -> Recorded {
    micros
        .iter_recorded()
        .map(|value| (value.value_iterated_to(), value.count_at_value()))
        .collect()
}

pub(crate) fn add(micros: &mut Histogram<u64>, recorded: &Recorded) {
    for (value, count) in recorded {
        // The value comes out of a histogram with the same bounds.
        micros.saturating_record_n(*value, *count);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn titles_are_read_as_they_were_written() {
        let title = Title {
            kind: Kind::Fan,
            number: 123_456_789_012,
            due: u64::MAX / 2,
        };
        let mut text = [0; TITLE_BYTES];
        title.write(&mut text);
        let text = std::str::from_utf8(&text).unwrap();
        assert_eq!(Title::read(text), Some(title));
        assert_eq!(Title::read(&text[1..]), None);
        assert_eq!(Title::read(&text.replace('f', "x")), None);
        assert_eq!(Title::read(&text.replace('1', "x")), None);
    }

    #[test]
    fn histograms_travel() {
        let mut micros = histogram();
        for nanos in [500, 40_000, 40_000, 9_000_000_000] {
            record(&mut micros, nanos);
        }
        let mut other = histogram();
        add(&mut other, &recorded(&micros));
        assert_eq!(other.len(), 4);
        assert_eq!(other.value_at_quantile(0.5), micros.value_at_quantile(0.5));
        assert_eq!(other.max(), micros.max());
    }
}
