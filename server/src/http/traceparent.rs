//! The header `traceparent` of W3C Trace Context, level 1: which trace a request belongs to.
//!
//! What is not exactly of that form is as good as absent, and a new trace begins here, as the standard asks for. The
//! header `tracestate` is for those who pass a trace on; nothing is passed on from here, so it is not read.

use http::{HeaderMap, HeaderName};

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");

/// Length of version `00`: version, trace id, parent id and flags with dashes between them.
const LENGTH: usize = 55;

/// The flag that says that the caller records.
const SAMPLED: u8 = 1;

/// What a caller says of its trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Traceparent {
    /// The whole trace.
    pub(super) trace_id: [u8; 16],
    /// Whether the caller records it.
    pub(super) sampled: bool,
}

/// Reads the header; `None` if there is none, several, or one of another form.
pub(super) fn read(headers: &HeaderMap) -> Option<Traceparent> {
    let mut values = headers.get_all(TRACEPARENT).iter();
    let value = values.next()?;
    if values.next().is_some() {
        return None;
    }
    parse(value.as_bytes())
}

/// Understands one value.
pub(super) fn parse(value: &[u8]) -> Option<Traceparent> {
    let (known, more) = value.split_at_checked(LENGTH)?;
    let [version] = hex(&known[..2])?;
    // `ff` is no version. Later ones may say more, after a dash; what is known of them stands where it stood.
    let fits = match version {
        0xff => false,
        0 => more.is_empty(),
        _ => more.is_empty() || more[0] == b'-',
    };
    let dashes = [2, 35, 52].iter().all(|&at| known[at] == b'-');
    if !fits || !dashes {
        return None;
    }
    let trace_id: [u8; 16] = hex(&known[3..35])?;
    let parent_id: [u8; 8] = hex(&known[36..52])?;
    let [flags] = hex(&known[53..])?;
    (trace_id != [0; 16] && parent_id != [0; 8]).then_some(Traceparent {
        trace_id,
        sampled: flags & SAMPLED != 0,
    })
}

/// Bytes from lower-case hexadecimal digits, twice as many.
fn hex<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    let (pairs, []) = digits.as_chunks::<2>() else {
        return None;
    };
    if pairs.len() != N {
        return None;
    }
    for (byte, &[high, low]) in bytes.iter_mut().zip(pairs) {
        *byte = value(high)? << 4 | value(low)?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    #[test]
    fn what_the_standard_allows_is_taken() {
        let good = parse(GOOD.as_bytes()).unwrap();
        assert!(good.sampled);
        assert_eq!((good.trace_id[0], good.trace_id[15]), (0x4b, 0x36));
        let end = |flags: &str| format!("{}{flags}", &GOOD[..53]);
        assert!(!parse(end("00").as_bytes()).unwrap().sampled);
        // Flags that are not known yet say nothing.
        assert!(!parse(end("fe").as_bytes()).unwrap().sampled);
        assert!(parse(end("03").as_bytes()).unwrap().sampled);
        for later in [
            format!("01{}", &GOOD[2..]),
            format!("cc{}-what-comes", &GOOD[2..]),
            format!("fe{}-", &GOOD[2..]),
        ] {
            assert_eq!(parse(later.as_bytes()).unwrap().trace_id, good.trace_id);
        }
    }

    #[test]
    fn everything_else_is_as_good_as_absent() {
        for bad in [
            String::new(),
            GOOD[..54].to_owned(),
            format!("{GOOD}-more"),
            format!("{GOOD} "),
            format!("ff{}", &GOOD[2..]),
            format!("01{}more", &GOOD[2..]),
            format!("0g{}", &GOOD[2..]),
            GOOD.to_uppercase(),
            GOOD.replace('-', "_"),
            GOOD.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            GOOD.replace("00f067aa0ba902b7", &"0".repeat(16)),
            GOOD.replace("-01", "-0x"),
            "é".repeat(30),
        ] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        let mut headers = HeaderMap::new();
        assert_eq!(read(&headers), None);
        headers.append(TRACEPARENT, GOOD.parse().unwrap());
        assert!(read(&headers).is_some());
        headers.append(TRACEPARENT, GOOD.parse().unwrap());
        assert_eq!(read(&headers), None, "two of them");
    }

    proptest! {
        #[test]
        fn random_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = parse(&bytes);
        }

        #[test]
        fn one_damaged_byte_is_noticed_or_is_another_good_one(at in 0..LENGTH, byte: u8) {
            let mut bytes = GOOD.as_bytes().to_vec();
            bytes[at] = byte;
            if let Some(read) = parse(&bytes) {
                prop_assert!(read.trace_id != [0; 16]);
                prop_assert!(byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte) || byte == b'-');
            }
        }
    }
}
