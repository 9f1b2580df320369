//! TLS of one TCP connection, between bytes and bytes: no sockets, and no buffers of its own.
//!
//! rustls would keep what it reads in a buffer of 4 KiB for each connection, and copy everything that is written once more.
//! Here it works on memory that all connections of a thread share (`wire.rs`); between two reads a connection
//! holds only the part of a record that has not come yet.

use std::sync::Arc;

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, InsufficientSizeError,
    UnbufferedStatus, WriteTraffic,
};
use rustls::{Error, InvalidMessage, ProtocolVersion, ServerConfig};

/// Bytes that may wait for the rest of a record or of a handshake message: a whole record is 18,437 bytes at most, and of
/// a client that is asked for no certificate every handshake message fits into one.
const PARTIAL_MAX_BYTES: usize = 20 * 1024;

/// Bytes of the header of a record (RFC 8446 section 5.1).
const HEADER_BYTES: u8 = 5;

/// What sealing adds at most to so many bytes: a header, a tag, padding, for each record that they take.
const OVERHEAD_BYTES: usize = 64;

/// Plain bytes in one record (RFC 8446 section 5.1).
const RECORD_BYTES: usize = 16 * 1024;

/// The server's side of TLS on one connection.
pub(crate) struct Secure {
    tls: Box<UnbufferedServerConnection>,
    /// What came of a record, or of a handshake message, that is not whole yet.
    partial: Vec<u8>,
    records: Records,
    /// The peer broke these rules: rustls is not asked again, whose place in the bytes is lost.
    failure: Option<Box<Error>>,
}

/// Where records begin and end in what the peer sends, so that rustls, which looks at all that waits from its beginning, is
/// asked only when there is something new for it to see.
#[derive(Default)]
struct Records {
    /// Bytes of the header that came; all five: what came is of the body.
    header: u8,
    /// Bytes of the body that are still to come, as far as the header says.
    left: u16,
}

impl Records {
    /// Counts bytes that came; whether a header or a record became whole with them.
    fn count(&mut self, mut bytes: &[u8]) -> bool {
        let mut is_news = false;
        while let Some(&first) = bytes.first() {
            if self.header < HEADER_BYTES {
                match self.header {
                    3 => self.left = u16::from(first) << 8,
                    4 => self.left |= u16::from(first),
                    _ => {}
                }
                self.header += 1;
                bytes = &bytes[1..];
                is_news |= self.header == HEADER_BYTES;
            } else {
                let now = bytes.len().min(self.left.into());
                // At most `left`.
                self.left -= now as u16;
                bytes = &bytes[now..];
            }
            if self.header == HEADER_BYTES && self.left == 0 {
                self.header = 0;
                is_news = true;
            }
        }
        is_news
    }
}

impl Secure {
    /// TLS that has not begun.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub(crate) fn new(config: Arc<ServerConfig>) -> Result<Secure, Error> {
        Ok(Secure {
            tls: Box::new(UnbufferedServerConnection::new(config)?),
            partial: Vec::new(),
            records: Records::default(),
            failure: None,
        })
    }

    /// Whether the handshake is under way.
    pub(crate) fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    /// Whether what TLS itself has to say may wait until there is something else to say: in TLS 1.3 the tickets after the
    /// handshake, which no client waits for.
    pub(crate) fn may_hold_back(&self) -> bool {
        !self.is_handshaking() && self.tls.protocol_version() == Some(ProtocolVersion::TLSv1_3)
    }

    /// How many bytes stand before the next ones from the peer, for [`Secure::digest`].
    pub(crate) fn waiting(&self) -> usize {
        self.partial.len()
    }

    /// Which rules the peer broke.
    pub(crate) fn failure(&self) -> Option<&Error> {
        self.failure.as_deref()
    }

    /// Takes bytes from the peer, which stand behind room for [`Secure::waiting`] others: plain ones go to `take`, what there
    /// is to say to the peer is added to `reply`, alerts too. `true`: the peer says no more.
    ///
    /// # Errors
    /// When the peer breaks the rules; nothing can be read any more then.
    pub(crate) fn digest(
        &mut self,
        incoming: &mut [u8],
        mut take: impl FnMut(&[u8]),
        reply: &mut Vec<u8>,
    ) -> Result<bool, Error> {
        if let Some(failure) = &self.failure {
            return Err((**failure).clone());
        }
        let (before, came) = incoming.split_at_mut(self.partial.len());
        if !self.records.count(came) && !self.partial.is_empty() {
            // Nothing became whole; a peer that sends byte by byte does not have all of it looked at each time.
            self.keep(came)?;
            return Ok(false);
        }
        before.copy_from_slice(&self.partial);
        self.partial = Vec::new();
        let digested = self.digest_records(incoming, &mut take, reply);
        if let Err(error) = &digested {
            self.failure = Some(Box::new(error.clone()));
        }
        digested
    }

    /// Keeps bytes for the next time.
    fn keep(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.partial.len() + bytes.len() > PARTIAL_MAX_BYTES {
            let error = Error::from(InvalidMessage::HandshakePayloadTooLarge);
            self.failure = Some(Box::new(error.clone()));
            return Err(error);
        }
        self.partial.extend_from_slice(bytes);
        Ok(())
    }

    fn digest_records(
        &mut self,
        incoming: &mut [u8],
        take: &mut impl FnMut(&[u8]),
        reply: &mut Vec<u8>,
    ) -> Result<bool, Error> {
        let (mut used, mut is_over) = (0, false);
        loop {
            let rest = incoming.get_mut(used..).unwrap_or_default();
            let UnbufferedStatus { mut discard, state } = self.tls.process_tls_records(rest);
            let is_done = match state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(record) = traffic.next_record() {
                        let record = record?;
                        discard += record.discard;
                        take(record.payload);
                    }
                    false
                }
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    encode(data, reply)?;
                    false
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    false
                }
                Ok(ConnectionState::PeerClosed) => {
                    is_over = true;
                    false
                }
                Ok(
                    ConnectionState::BlockedHandshake
                    | ConnectionState::WriteTraffic(_)
                    | ConnectionState::Closed,
                ) => true,
                // Early data is not offered, and there is nothing else yet.
                Ok(_) => return Err(Error::General("an unknown state of TLS".to_owned())),
                Err(error) => {
                    used += discard;
                    self.alert(incoming.get_mut(used..).unwrap_or_default(), reply);
                    return Err(error);
                }
            };
            used += discard;
            if is_done {
                break;
            }
        }
        self.keep(incoming.get(used..).unwrap_or_default())?;
        Ok(is_over)
    }

    /// What rustls had to say when it found an error: an alert, and what it said before. It is asked for no more than that,
    /// because it would judge the same bytes again.
    fn alert(&mut self, rest: &mut [u8], reply: &mut Vec<u8>) {
        while self.tls.wants_write() {
            let UnbufferedStatus { state, .. } = self.tls.process_tls_records(rest);
            match state {
                Ok(ConnectionState::EncodeTlsData(data)) => {
                    if encode(data, reply).is_err() {
                        return;
                    }
                }
                // Without it the peer finds the connection closed.
                Ok(_) | Err(_) => return,
            }
        }
    }

    /// Adds these bytes to `sealed`, as the peer is to get them.
    ///
    /// # Errors
    /// Before the end of the handshake, and when the keys are used up.
    pub(crate) fn seal(&mut self, plain: &[u8], sealed: &mut Vec<u8>) -> Result<(), Error> {
        self.with_traffic(sealed, |mut traffic, sealed| {
            let records = plain.len() / RECORD_BYTES + 2;
            let room = plain.len() + records * OVERHEAD_BYTES;
            append(sealed, room, |room| traffic.encrypt(plain, room))
        })
    }

    /// Adds to `sealed` that we say no more.
    pub(crate) fn close(&mut self, sealed: &mut Vec<u8>) {
        let closed = self.with_traffic(sealed, |mut traffic, sealed| {
            append(sealed, OVERHEAD_BYTES, |room| {
                traffic.queue_close_notify(room)
            })
        });
        // Where TLS does not stand there is nothing to close.
        let _ = closed;
    }

    fn with_traffic(
        &mut self,
        sealed: &mut Vec<u8>,
        say: impl FnOnce(
            WriteTraffic<'_, rustls::server::ServerConnectionData>,
            &mut Vec<u8>,
        ) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if let Some(failure) = &self.failure {
            return Err((**failure).clone());
        }
        loop {
            let waiting = self.partial.len();
            let UnbufferedStatus { discard, state } =
                self.tls.process_tls_records(&mut self.partial);
            debug_assert!(
                discard <= waiting,
                "rustls is done with bytes that are not there"
            );
            match state? {
                ConnectionState::WriteTraffic(traffic) => {
                    self.partial.drain(..discard.min(self.partial.len()));
                    return say(traffic, sealed);
                }
                ConnectionState::EncodeTlsData(data) => encode(data, sealed)?,
                ConnectionState::TransmitTlsData(data) => data.done(),
                ConnectionState::PeerClosed => {}
                ConnectionState::ReadTraffic(_)
                | ConnectionState::ReadEarlyData(_)
                | ConnectionState::BlockedHandshake
                | ConnectionState::Closed
                | _ => return Err(Error::HandshakeNotComplete),
            }
            self.partial.drain(..discard.min(self.partial.len()));
        }
    }
}

fn encode<D>(mut data: EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> Result<(), Error> {
    append(out, 0, |room| {
        data.encode(room).map_err(|error| match error {
            EncodeError::InsufficientSize(size) => EncryptError::InsufficientSize(size),
            EncodeError::AlreadyEncoded => EncryptError::EncryptExhausted,
        })
    })
}

/// Has something written behind `out`, into room of at least `guess` bytes.
fn append(
    out: &mut Vec<u8>,
    guess: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncryptError>,
) -> Result<(), Error> {
    let before = out.len();
    let mut room = guess;
    loop {
        out.resize(before + room, 0);
        match write(out.get_mut(before..).unwrap_or_default()) {
            Ok(written) => {
                out.truncate(before + written);
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size }))
                if required_size > room =>
            {
                room = required_size;
            }
            Err(_) => {
                out.truncate(before);
                return Err(Error::EncryptError);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::testing;
    use crate::transport::tls::Tls;
    use rustls::{ClientConfig, ClientConnection, RootCertStore};
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    use std::io::{Read as _, Write as _};

    /// A client and the server's side, joined by hand.
    struct Pair {
        client: ClientConnection,
        server: Secure,
        heard: Vec<u8>,
        answered: Vec<u8>,
        is_over: bool,
    }

    impl Pair {
        fn configs() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
            let (settings, root) = testing::tls_and_root();
            let mut roots = RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_slice(root.as_bytes()).unwrap())
                .unwrap();
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let config = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            (Arc::new(config), Tls::new(&settings).unwrap().tcp())
        }

        fn new((client, server): &(Arc<ClientConfig>, Arc<ServerConfig>)) -> Pair {
            let name = "localhost".try_into().unwrap();
            Pair {
                client: ClientConnection::new(Arc::clone(client), name).unwrap(),
                server: Secure::new(Arc::clone(server)).unwrap(),
                heard: Vec::new(),
                answered: Vec::new(),
                is_over: false,
            }
        }

        /// Takes what the client says, in pieces of so many bytes, and gives the answer back.
        fn pass(&mut self, piece: usize, damage: impl FnOnce(&mut Vec<u8>)) -> Result<(), Error> {
            let mut said = Vec::new();
            while self.client.wants_write() {
                self.client.write_tls(&mut said).unwrap();
            }
            damage(&mut said);
            let mut reply = Vec::new();
            let mut outcome = Ok(());
            for piece in said.chunks(piece) {
                let mut incoming = [&vec![0; self.server.waiting()][..], piece].concat();
                let heard = &mut self.heard;
                let digested = self.server.digest(
                    &mut incoming,
                    |plain| heard.extend_from_slice(plain),
                    &mut reply,
                );
                match digested {
                    Ok(is_over) => self.is_over |= is_over,
                    Err(error) => {
                        outcome = Err(error);
                        break;
                    }
                }
            }
            self.hear(&reply);
            outcome
        }

        fn hear(&mut self, mut reply: &[u8]) {
            while !reply.is_empty() {
                self.client.read_tls(&mut reply).unwrap();
                // An alert is an error here.
                let _ = self.client.process_new_packets();
                let _ = self.client.reader().read_to_end(&mut self.answered);
            }
        }

        fn shake(&mut self, piece: usize) {
            for _ in 0..4 {
                self.pass(piece, |_| ()).unwrap();
            }
            assert!(!self.client.is_handshaking() && !self.server.is_handshaking());
        }
    }

    #[test]
    fn what_is_said_arrives_in_whatever_pieces_it_comes() {
        let configs = Pair::configs();
        for piece in [1, 3, 100, 1_400, usize::MAX] {
            let mut pair = Pair::new(&configs);
            pair.shake(piece);
            assert!(pair.server.may_hold_back());
            let said: Vec<u8> = (0..40_000_u32).map(|n| n as u8).collect();
            pair.client.writer().write_all(&said).unwrap();
            pair.pass(piece, |_| ()).unwrap();
            assert_eq!(pair.heard, said, "{piece}");
            assert_eq!(pair.server.partial.capacity(), 0, "nothing is kept");
            // And the other way, in more than one record.
            let mut sealed = b"before".to_vec();
            pair.server.seal(&said, &mut sealed).unwrap();
            pair.hear(&sealed[6..]);
            assert_eq!(pair.answered, said);
        }
    }

    #[test]
    fn both_sides_may_close() {
        let mut pair = Pair::new(&Pair::configs());
        pair.shake(usize::MAX);
        let mut sealed = Vec::new();
        pair.server.close(&mut sealed);
        pair.hear(&sealed);
        assert_eq!(pair.client.reader().read(&mut [0; 8]).unwrap(), 0);
        pair.client.send_close_notify();
        pair.pass(usize::MAX, |_| ()).unwrap();
        assert!(pair.is_over);
        // Nothing stands yet: there is nothing to close, and nothing can be said.
        let mut early = Pair::new(&Pair::configs());
        early.server.close(&mut sealed);
        assert!(early.server.seal(b"x", &mut sealed).is_err());
    }

    #[test]
    fn the_keys_may_be_renewed_by_the_peer() {
        let mut pair = Pair::new(&Pair::configs());
        pair.shake(usize::MAX);
        for round in 0..3 {
            pair.client.refresh_traffic_keys().unwrap();
            pair.client.writer().write_all(b"x").unwrap();
            pair.pass(5, |_| ()).unwrap();
            assert_eq!(pair.heard.len(), round + 1);
            let mut sealed = Vec::new();
            pair.server.seal(b"y", &mut sealed).unwrap();
            pair.hear(&sealed);
            assert_eq!(pair.answered.len(), round + 1);
        }
    }

    #[test]
    fn what_is_damaged_on_its_way_ends_in_an_alert_and_never_in_more() {
        let configs = Pair::configs();
        let mut refused = 0;
        for at in (0..4_000_usize).step_by(7) {
            let mut pair = Pair::new(&configs);
            let in_handshake = at % 2 == 0;
            if !in_handshake {
                pair.shake(usize::MAX);
                pair.client.writer().write_all(&[7; 3_000]).unwrap();
            }
            let piece = 1 + at % 999;
            let outcome = pair.pass(piece, |said| {
                let place = at % said.len();
                said[place] ^= 1 << (at % 8);
            });
            if outcome.is_err() {
                refused += 1;
                // Whatever comes then, it is refused again.
                let again = pair.pass(usize::MAX, |said| said.extend([0x17, 3, 3, 0, 1, 0]));
                assert!(again.is_err() || pair.heard.is_empty());
            }
            assert!(in_handshake || outcome.is_err() || pair.heard.len() < 3_000);
        }
        assert!(refused > 200, "{refused}");
    }

    #[test]
    fn a_record_is_looked_at_when_its_header_and_when_all_of_it_is_there() {
        let record = |length: u16| {
            let mut record = vec![0x17, 3, 3];
            record.extend(length.to_be_bytes());
            record.extend(vec![0; length.into()]);
            record
        };
        let stream = [record(700), record(0), record(1), record(18_432)].concat();
        let mut records = Records::default();
        let news: Vec<usize> = (1..=stream.len())
            .filter(|end| records.count(&stream[end - 1..*end]))
            .collect();
        let expected = [5, 705, 710, 715, 716, 721, stream.len()];
        assert_eq!(news, expected);
        // In larger pieces there is news in those in which one of these ends is.
        for piece in [2, 3, 7, 100, 704, 1_000] {
            let mut records = Records::default();
            for (n, bytes) in stream.chunks(piece).enumerate() {
                let range = n * piece..n * piece + bytes.len();
                let is_news = expected.iter().any(|end| range.contains(&(end - 1)));
                assert_eq!(records.count(bytes), is_news, "{piece} {range:?}");
            }
        }
    }

    #[test]
    fn the_largest_record_fits_and_byte_by_byte_no_more_than_it_is_kept() {
        let mut pair = Pair::new(&Pair::configs());
        pair.shake(usize::MAX);
        let mut refused = None;
        let record = [&[0x17, 3, 3, 0x47, 0xff][..], &[0; 18_431]].concat();
        for (n, byte) in record.iter().enumerate() {
            let mut incoming = vec![0; pair.server.waiting()];
            assert_eq!(incoming.len(), n);
            incoming.push(*byte);
            let digested =
                pair.server
                    .digest(&mut incoming, |_| panic!("nothing"), &mut Vec::new());
            if digested.is_err() {
                refused = Some(n + 1);
                break;
            }
            assert!(pair.server.partial.capacity() <= 2 * PARTIAL_MAX_BYTES);
        }
        // It is waited for to its end, and is none of this session.
        assert_eq!(refused, Some(record.len()));
    }

    #[test]
    fn garbage_is_refused_and_little_of_it_is_kept() {
        let config = Pair::configs().1;
        for first in 0..=255_u8 {
            let mut server = Secure::new(Arc::clone(&config)).unwrap();
            for _ in 0..100 {
                let mut incoming = [vec![0; server.waiting()], vec![first; 2_000]].concat();
                let kept = incoming.len();
                if server
                    .digest(&mut incoming, |_| panic!("nothing"), &mut Vec::new())
                    .is_err()
                {
                    break;
                }
                assert!(kept <= PARTIAL_MAX_BYTES + 2_000);
            }
        }
    }
}
