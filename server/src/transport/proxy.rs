//! The header of the PROXY protocol, version 2, by which a load balancer that ended TLS says who really connects.
//!
//! Parsing is a plain function over bytes, so that it can be fuzzed, and strict: a header that is not exactly what
//! version 2 allows ends the connection, because whatever follows it would be taken for a device's words. Whoever may
//! send one is decided before a byte is read (`listen.proxy_networks`).

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

/// What every header of version 2 begins with; no text and no TLS record does.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";

/// What a header of version 1 begins with.
const VERSION_1: &[u8] = b"PROXY ";

/// Signature, version and command, family and protocol, length.
pub(crate) const FIXED_BYTES: usize = 16;

/// Longest header that is read, in bytes. Addresses take 36; the rest is what the balancer adds, of which a client
/// certificate is the largest.
pub(crate) const HEADER_MAX_BYTES: usize = 8 * 1024;

/// Most additions (TLVs) in one header. A dozen kinds are defined.
const TLVS_MAX: usize = 64;

/// Type of the addition that holds a checksum of the whole header.
const TLV_CRC32C: u8 = 0x03;

/// Length of an addition's own head: type and length.
const TLV_HEAD_BYTES: usize = 3;

/// Length of a pair of Unix socket paths.
const UNIX_BYTES: usize = 216;

/// What the bytes so far mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Header {
    /// At least so many bytes are needed in all; reading more would take the device's first words.
    Partial(usize),
    /// A good header.
    Whole {
        /// Who connects. `None`: the balancer itself, as for its health checks, or it does not say.
        from: Option<SocketAddr>,
        /// Length of the header; what follows are the device's words.
        length: usize,
    },
    /// Anything else.
    Refused(Unfit),
}

/// Why a header is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unfit {
    /// There is none: the bytes are something else.
    Missing,
    /// It is one of version 1.
    Version1,
    /// Its version is neither 1 nor 2.
    UnknownVersion,
    /// It breaks the rules of version 2.
    Malformed,
    /// It speaks of datagrams, or of a family that is not defined.
    UnknownFamily,
    /// It is longer than [`HEADER_MAX_BYTES`], or has too many additions.
    TooLarge,
    /// Its checksum does not fit.
    Checksum,
}

impl Unfit {
    /// How many there are.
    pub(crate) const COUNT: usize = Unfit::Checksum as usize + 1;

    /// The word for it in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Unfit::Missing => "proxy_header_missing",
            Unfit::Version1 | Unfit::UnknownVersion => "proxy_version",
            Unfit::Malformed | Unfit::UnknownFamily | Unfit::Checksum => "proxy_header",
            Unfit::TooLarge => "proxy_header_too_large",
        }
    }

    /// What the operator should know and do.
    pub(crate) fn advice(self) -> &'static str {
        match self {
            Unfit::Missing => {
                "the balancer sends no PROXY header: switch version 2 on there (HAProxy: send-proxy-v2)"
            }
            Unfit::Version1 => {
                "the balancer speaks version 1 of the PROXY protocol: switch it to version 2 (HAProxy: send-proxy-v2 \
                 instead of send-proxy)"
            }
            Unfit::UnknownVersion => {
                "the balancer speaks a version of the PROXY protocol that is not known here: switch it to version 2"
            }
            Unfit::Malformed => {
                "the PROXY header is not what version 2 allows: look at the balancer"
            }
            Unfit::UnknownFamily => {
                "the PROXY header speaks of something else than TCP: look at what the balancer forwards"
            }
            Unfit::TooLarge => {
                "the PROXY header has more than 8 KiB or more than 64 additions: let the balancer add less"
            }
            Unfit::Checksum => {
                "the PROXY header's checksum does not fit: something between the balancer and here changes bytes"
            }
        }
    }
}

/// Reads a header.
pub(crate) fn parse(bytes: &[u8]) -> Header {
    let known = bytes.len().min(SIGNATURE.len());
    if bytes[..known] != SIGNATURE[..known] {
        let known = bytes.len().min(VERSION_1.len());
        if bytes[..known] != VERSION_1[..known] {
            return Header::Refused(Unfit::Missing);
        }
        return if known < VERSION_1.len() {
            Header::Partial(VERSION_1.len())
        } else {
            Header::Refused(Unfit::Version1)
        };
    }
    let Some((fixed, rest)) = bytes.split_first_chunk::<FIXED_BYTES>() else {
        return Header::Partial(FIXED_BYTES);
    };
    let (version, command) = (fixed[12] >> 4, fixed[12] & 0xf);
    if version != 2 {
        return Header::Refused(Unfit::UnknownVersion);
    }
    let length = FIXED_BYTES + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if length > HEADER_MAX_BYTES {
        return Header::Refused(Unfit::TooLarge);
    }
    if command > 1 {
        return Header::Refused(Unfit::Malformed);
    }
    let Some(body) = rest.get(..length - FIXED_BYTES) else {
        return Header::Partial(length);
    };
    let local = command == 0;
    let read = match fixed[13] {
        // What a balancer says of its own connections is to be skipped whatever it is; so is what comes with a family that is not
        // specified, whose addresses have no length that anybody knows.
        _ if local => Ok((None, None)),
        0x00 => Ok((None, None)),
        0x11 => ipv4(body),
        0x21 => ipv6(body),
        // Paths of sockets say nothing about who connects.
        0x31 => match body.get(UNIX_BYTES..) {
            Some(_) => Ok((None, Some(UNIX_BYTES))),
            None => Err(Unfit::Malformed),
        },
        _ => Err(Unfit::UnknownFamily),
    };
    let checked = read.and_then(|(from, tlvs)| {
        if let Some(start) = tlvs {
            check_tlvs(&bytes[..length], FIXED_BYTES + start)?;
        }
        Ok(from)
    });
    match checked {
        Ok(from) => Header::Whole { from, length },
        Err(unfit) => Header::Refused(unfit),
    }
}

/// Who connects, and where the additions begin in the body.
type Addresses = (Option<SocketAddr>, Option<usize>);

/// Source address, destination address, source port, destination port.
fn ipv4(body: &[u8]) -> Result<Addresses, Unfit> {
    let (from, _) = body.split_first_chunk::<12>().ok_or(Unfit::Malformed)?;
    let address = Ipv4Addr::new(from[0], from[1], from[2], from[3]);
    let port = u16::from_be_bytes([from[8], from[9]]);
    Ok((Some(SocketAddr::new(address.into(), port)), Some(12)))
}

fn ipv6(body: &[u8]) -> Result<Addresses, Unfit> {
    let (from, _) = body.split_first_chunk::<36>().ok_or(Unfit::Malformed)?;
    let (address, rest) = from.split_first_chunk::<16>().ok_or(Unfit::Malformed)?;
    let port = u16::from_be_bytes([rest[16], rest[17]]);
    let address = Ipv6Addr::from(*address);
    Ok((Some(SocketAddr::new(address.into(), port)), Some(36)))
}

/// Steps over the additions. They must fill the header exactly; a checksum among them must fit.
fn check_tlvs(header: &[u8], start: usize) -> Result<(), Unfit> {
    let mut at = start;
    let mut checksum = None;
    let mut count = 0;
    while at < header.len() {
        count += 1;
        if count > TLVS_MAX {
            return Err(Unfit::TooLarge);
        }
        let head = header
            .get(at..at + TLV_HEAD_BYTES)
            .ok_or(Unfit::Malformed)?;
        let value = at + TLV_HEAD_BYTES;
        let end = value + usize::from(u16::from_be_bytes([head[1], head[2]]));
        if end > header.len() {
            return Err(Unfit::Malformed);
        }
        if head[0] == TLV_CRC32C {
            if end - value != 4 || checksum.is_some() {
                return Err(Unfit::Malformed);
            }
            checksum = Some(value);
        }
        at = end;
    }
    let Some(place) = checksum else { return Ok(()) };
    // The sum is over the header with four zeros in its own place.
    let (before, rest) = header.split_at(place);
    let (told, after) = rest.split_at(4);
    let sum = crc32c::crc32c_append(crc32c::crc32c(before), &[0; 4]);
    if crc32c::crc32c_append(sum, after).to_be_bytes() != *told {
        return Err(Unfit::Checksum);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use proptest::prelude::*;

    use super::*;

    fn header(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let mut bytes = SIGNATURE.to_vec();
        bytes.extend([0x20 | command, family]);
        bytes.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
        bytes.extend(body);
        bytes
    }

    fn tlv(kind: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(u16::try_from(value.len()).unwrap().to_be_bytes());
        bytes.extend(value);
        bytes
    }

    /// 192.0.2.7:4000 to 198.51.100.1:443.
    const V4: [u8; 12] = [192, 0, 2, 7, 198, 51, 100, 1, 0x0f, 0xa0, 1, 187];

    fn v4_with(tlvs: &[u8]) -> Vec<u8> {
        header(1, 0x11, &[&V4, tlvs].concat())
    }

    fn whole(bytes: &[u8], from: Option<&str>) {
        let from = from.map(|from| from.parse().unwrap());
        let length = bytes.len();
        assert_eq!(parse(bytes), Header::Whole { from, length });
    }

    #[test]
    fn addresses_of_both_families_are_read_and_what_follows_is_left_alone() {
        whole(&v4_with(&[]), Some("192.0.2.7:4000"));
        let mut v6 = [0; 36];
        v6[..16].copy_from_slice(&"2001:db8::9".parse::<Ipv6Addr>().unwrap().octets());
        v6[32..34].copy_from_slice(&5_000_u16.to_be_bytes());
        whole(&header(1, 0x21, &v6), Some("[2001:db8::9]:5000"));
        let mut more = v4_with(&[]);
        more.extend(b"GET /v1/link");
        assert!(matches!(parse(&more), Header::Whole { length: 28, .. }));
    }

    #[test]
    fn the_balancers_own_connections_and_unknown_ones_name_nobody() {
        whole(&header(0, 0x00, &[]), None);
        // Whatever stands in the header of an own connection is skipped, also what would be wrong elsewhere.
        whole(&header(0, 0x11, &V4), None);
        whole(&header(0, 0xff, b"?"), None);
        whole(&header(1, 0x00, &[]), None);
        whole(&header(1, 0x00, &tlv(0x04, b"x")), None);
        // Addresses of a family that nobody knows are no additions.
        whole(&header(1, 0x00, &[0xff; 12]), None);
        whole(&header(1, 0x00, &[0; UNIX_BYTES]), None);
        whole(&header(1, 0x31, &[0; UNIX_BYTES]), None);
    }

    #[test]
    fn additions_are_stepped_over_within_their_bounds() {
        let some = [tlv(0x01, b"h2"), tlv(0x02, b"host"), tlv(0xee, &[0; 300])].concat();
        whole(&v4_with(&some), Some("192.0.2.7:4000"));
        let many = tlv(0x04, b"").repeat(TLVS_MAX);
        whole(&v4_with(&many), Some("192.0.2.7:4000"));
        for (tlvs, unfit) in [
            (tlv(0x04, b"").repeat(TLVS_MAX + 1), Unfit::TooLarge),
            (vec![0x01], Unfit::Malformed),
            (vec![0x01, 0, 2, b'h'], Unfit::Malformed),
            (tlv(TLV_CRC32C, b"123"), Unfit::Malformed),
        ] {
            assert_eq!(parse(&v4_with(&tlvs)), Header::Refused(unfit));
        }
    }

    #[test]
    fn a_checksum_must_fit_if_there_is_one() {
        let mut good = v4_with(&[tlv(TLV_CRC32C, &[0; 4]), tlv(0x02, b"host")].concat());
        let sum = crc32c::crc32c(&good).to_be_bytes();
        good[31..35].copy_from_slice(&sum);
        whole(&good, Some("192.0.2.7:4000"));
        for at in [16, 24, 34, good.len() - 1] {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(parse(&bad), Header::Refused(Unfit::Checksum), "{at}");
        }
        let twice = [tlv(TLV_CRC32C, &[0; 4]), tlv(TLV_CRC32C, &[0; 4])].concat();
        assert_eq!(parse(&v4_with(&twice)), Header::Refused(Unfit::Malformed));
    }

    #[test]
    fn everything_else_is_refused_by_its_name_as_soon_as_it_shows() {
        let mut version_3 = v4_with(&[]);
        version_3[12] = 0x31;
        for (bytes, unfit) in [
            (
                &b"PROXY TCP4 192.0.2.7 198.51.100.1 4000 443\r\n"[..],
                Unfit::Version1,
            ),
            (b"PROXY UNKNOWN\r\n", Unfit::Version1),
            (b"G", Unfit::Missing),
            (b"GET /v1/link HTTP/1.1\r\n", Unfit::Missing),
            (&[0x16, 3, 1], Unfit::Missing),
            (b"PROXz", Unfit::Missing),
            (b"\r\n\r\n\0\r\nQUIZ", Unfit::Missing),
            (&version_3, Unfit::UnknownVersion),
            (&header(2, 0x11, &V4), Unfit::Malformed),
            (&header(1, 0x11, &V4[..11]), Unfit::Malformed),
            (&header(1, 0x21, &[0; 35]), Unfit::Malformed),
            (&header(1, 0x31, &[0; 215]), Unfit::Malformed),
            (&header(1, 0x12, &V4), Unfit::UnknownFamily),
            (&header(1, 0x41, &V4), Unfit::UnknownFamily),
            (
                &header(0, 0x00, &[0; HEADER_MAX_BYTES])[..16],
                Unfit::TooLarge,
            ),
        ] {
            assert_eq!(parse(bytes), Header::Refused(unfit), "{bytes:?}");
        }
    }

    #[test]
    fn no_more_is_asked_for_than_the_header_has() {
        let good = v4_with(&tlv(0x02, b"host"));
        for cut in 0..good.len() {
            let Header::Partial(needed) = parse(&good[..cut]) else {
                panic!("{cut} bytes are not enough");
            };
            assert!(cut < needed && needed <= good.len(), "{cut}: {needed}");
        }
        assert_eq!(parse(b"PRO"), Header::Partial(VERSION_1.len()));
    }

    /// The fuzz body: whatever comes, it neither panics, nor asks for more than it may, nor changes its mind when
    /// more bytes arrive.
    fn fuzz_header(bytes: &[u8]) {
        match parse(bytes) {
            Header::Partial(needed) => assert!(bytes.len() < needed && needed <= HEADER_MAX_BYTES),
            Header::Whole { from, length } => {
                assert!((FIXED_BYTES..=bytes.len()).contains(&length));
                assert_eq!(parse(&bytes[..length]), Header::Whole { from, length });
                assert!(matches!(parse(&bytes[..length - 1]), Header::Partial(_)));
            }
            Header::Refused(unfit) => {
                assert!(!unfit.as_str().is_empty() && !unfit.advice().is_empty());
                let more = [bytes, b"more"].concat();
                assert_eq!(parse(&more), Header::Refused(unfit));
            }
        }
    }

    #[test]
    fn the_corpus_does_no_harm() {
        let folder = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/src/transport/corpus/proxy_header"
        );
        let mut count = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            fuzz_header(&std::fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count >= 12, "the corpus is there");
    }

    proptest! {
        #[test]
        fn random_bytes_do_no_harm(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            fuzz_header(&bytes);
        }

        #[test]
        fn random_bodies_do_no_harm(
            command in 0..3_u8,
            family: u8,
            body in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            fuzz_header(&header(command, family, &body));
            fuzz_header(&header(1, 0x11, &body));
            fuzz_header(&header(1, 0x21, &body));
        }

        #[test]
        fn a_damaged_header_does_no_harm(at in 0..42_usize, byte: u8, cut in 0..42_usize) {
            let mut bytes = v4_with(&[tlv(TLV_CRC32C, &[1, 2, 3, 4]), tlv(0x02, b"host")].concat());
            prop_assert_eq!(bytes.len(), 42);
            bytes[at] = byte;
            fuzz_header(&bytes);
            bytes.truncate(cut);
            fuzz_header(&bytes);
        }
    }
}
