//! Bytes over a TCP connection, with TLS or without.
//!
//! What is read and what is sealed lies in memory of the thread; a connection keeps only what came of a record that is not
//! whole, and what the system had no room for. A turn that has something to say seals it once and hands it to the system in
//! one call; tickets wait for the first words.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::link::Traffic;
use super::outgoing::Outgoing;
use super::secure::Secure;

/// First byte of a TLS record that starts a handshake (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// What is read at a time, in bytes: a whole TLS record.
const READ_BYTES: usize = 16 * 1024 + 512;

/// What is sealed at a time, in bytes.
const SEAL_BYTES: usize = 64 * 1024;

/// Up to so many bytes of TLS itself go together with what is said next.
const TOGETHER_BYTES: usize = 1024;

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch { incoming: Vec::new(), sealed: Vec::new() }) };
}

/// Whether somebody who says this first speaks TLS.
pub(crate) const fn begins_tls(first: u8) -> bool {
    first == TLS_HANDSHAKE
}

/// Memory that all connections of a thread use, one after the other.
struct Scratch {
    incoming: Vec<u8>,
    sealed: Vec<u8>,
}

/// Why nothing more comes or goes.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// The system says so.
    Io(io::Error),
    /// The peer breaks the rules of TLS; it has been told.
    Tls(rustls::Error),
    /// The first byte is of no TLS handshake.
    NotTls(u8),
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Io(error)
    }
}

impl From<rustls::Error> for Trouble {
    fn from(error: rustls::Error) -> Trouble {
        Trouble::Tls(error)
    }
}

/// What reading comes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Came {
    /// Bytes; those of TLS itself are not handed over.
    Bytes,
    /// The peer says no more.
    End,
}

/// A TCP connection, or what stands for one in tests. It counts below TLS: what the system took is progress.
pub(crate) struct Wire<S = TcpStream> {
    tcp: S,
    /// `None`: plain, from a load balancer that ended TLS.
    secure: Option<Secure>,
    /// Sealed bytes that wait.
    unsent: Outgoing,
    traffic: Traffic,
    /// The peer said that it says no more.
    is_over: bool,
    /// We said so.
    is_closed: bool,
    /// Read after that.
    discarded: u64,
    /// Whoever reads knows that the peer broke the rules of TLS.
    is_failure_told: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    /// A connection without TLS.
    pub(crate) fn plain(tcp: S) -> Wire<S> {
        Wire {
            tcp,
            secure: None,
            unsent: Outgoing::default(),
            traffic: Traffic::default(),
            is_over: false,
            is_closed: false,
            discarded: 0,
            is_failure_told: false,
        }
    }

    /// A connection with TLS, which begins with the first read.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub(crate) fn tls(tcp: S, config: Arc<rustls::ServerConfig>) -> Result<Wire<S>, rustls::Error> {
        Ok(Wire {
            secure: Some(Secure::new(config)?),
            ..Wire::plain(tcp)
        })
    }

    /// The same connection without the TLS that it never had.
    pub(crate) fn without_tls(self) -> Wire<S> {
        Wire {
            secure: None,
            ..self
        }
    }

    /// What went through so far.
    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Sealed bytes that wait.
    pub(crate) fn unsent(&self) -> usize {
        self.unsent.len()
    }

    /// Whether the peer broke the rules of TLS after bytes that were handed over, and the next [`Wire::poll_receive`] says so.
    /// Nothing can be sealed any more.
    pub(crate) fn has_untold_failure(&self) -> bool {
        !self.is_failure_told && self.failure().is_some()
    }

    fn failure(&self) -> Option<&rustls::Error> {
        self.secure.as_ref().and_then(Secure::failure)
    }

    /// Reads once and hands what came to `take`, some 16 KiB at most; the handshake of TLS is part of it. Bytes that came in
    /// front of an error are handed over first.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&[u8]),
    ) -> Poll<Result<Came, Trouble>> {
        if let Some(failure) = self.failure() {
            let failure = failure.clone();
            self.is_failure_told = true;
            // The alert, if there is room for it.
            let _ = self.poll_flush(cx);
            return Poll::Ready(Err(failure.into()));
        }
        if self.is_over {
            return Poll::Ready(Ok(Came::End));
        }
        if self.has_answer() {
            match self.poll_flush(cx) {
                Poll::Ready(flushed) => flushed?,
                // Before the end of the handshake there is nothing to read until the peer has it; afterwards reading goes
                // on while writing is blocked.
                Poll::Pending if self.is_handshaking() => return Poll::Pending,
                Poll::Pending => {}
            }
        }
        let (came, handed) =
            SCRATCH.with_borrow_mut(|scratch| self.poll_read(cx, scratch, &mut take));
        match came {
            // The next call says what was wrong.
            Poll::Ready(Err(Trouble::Tls(_))) if handed => Poll::Ready(Ok(Came::Bytes)),
            Poll::Ready(Err(Trouble::Tls(failure))) => {
                self.is_failure_told = true;
                Poll::Ready(Err(Trouble::Tls(failure)))
            }
            Poll::Ready(Ok(_) | Err(Trouble::Io(_) | Trouble::NotTls(_))) | Poll::Pending => came,
        }
    }

    /// Whether the peer waits for what TLS has to say.
    fn has_answer(&self) -> bool {
        !self.unsent.is_empty()
            && self
                .secure
                .as_ref()
                .is_some_and(|secure| !secure.may_hold_back())
    }

    fn is_handshaking(&self) -> bool {
        self.secure.as_ref().is_some_and(Secure::is_handshaking)
    }

    /// One call of the system; whether there was anything for `take`.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        take: &mut impl FnMut(&[u8]),
    ) -> (Poll<Result<Came, Trouble>>, bool) {
        // Room for what came before, in front.
        let start = self.secure.as_ref().map_or(0, Secure::waiting);
        let incoming = &mut scratch.incoming;
        if incoming.len() < start + READ_BYTES {
            incoming.resize(start + READ_BYTES, 0);
        }
        let mut buffer = ReadBuf::new(&mut incoming[start..start + READ_BYTES]);
        match Pin::new(&mut self.tcp).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) => return (Poll::Ready(Err(error.into())), false),
            Poll::Pending => return (Poll::Pending, false),
        }
        let count = buffer.filled().len();
        if count == 0 {
            return (Poll::Ready(Ok(Came::End)), false);
        }
        let is_first = self.traffic.received == 0;
        self.traffic.received += count as u64;
        let bytes = &mut incoming[..start + count];
        let Some(secure) = &mut self.secure else {
            take(bytes);
            return (Poll::Ready(Ok(Came::Bytes)), true);
        };
        if is_first && !begins_tls(bytes[0]) {
            return (Poll::Ready(Err(Trouble::NotTls(bytes[0]))), false);
        }
        let mut handed = false;
        let digested = self.unsent.fill(|reply| {
            secure.digest(
                bytes,
                |plain| {
                    handed |= !plain.is_empty();
                    take(plain);
                },
                reply,
            )
        });
        match digested {
            Ok(is_over) => {
                self.is_over = is_over;
                (Poll::Ready(Ok(Came::Bytes)), handed)
            }
            Err(error) => {
                // The alert, if there is room for it.
                let _ = self.poll_flush(cx);
                (Poll::Ready(Err(error.into())), handed)
            }
        }
    }

    /// Writes these bytes and what waits before them; ready when the system has all of it.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        plain: &mut Outgoing,
    ) -> Poll<Result<(), Trouble>> {
        if self.secure.is_none() {
            while !plain.is_empty() {
                let written = ready!(self.poll_write(cx, plain.rest()))?;
                plain.advance(written);
            }
            return Poll::Ready(Ok(()));
        }
        loop {
            if plain.is_empty() || self.unsent.len() > TOGETHER_BYTES {
                ready!(self.poll_flush(cx))?;
            }
            if plain.is_empty() {
                return Poll::Ready(Ok(()));
            }
            ready!(SCRATCH.with_borrow_mut(|scratch| self.poll_seal(cx, scratch, plain)))?;
        }
    }

    /// Seals and writes, up to [`SEAL_BYTES`].
    fn poll_seal(
        &mut self,
        cx: &mut Context<'_>,
        scratch: &mut Scratch,
        plain: &mut Outgoing,
    ) -> Poll<Result<(), Trouble>> {
        let Some(secure) = &mut self.secure else {
            return Poll::Ready(Ok(()));
        };
        let sealed = &mut scratch.sealed;
        sealed.clear();
        sealed.extend_from_slice(self.unsent.rest());
        self.unsent = Outgoing::default();
        let rest = plain.rest();
        let now = &rest[..rest.len().min(SEAL_BYTES)];
        secure.seal(now, sealed)?;
        plain.advance(now.len());
        let mut written = 0;
        while written < sealed.len() {
            match self.poll_write(cx, &sealed[written..]) {
                Poll::Ready(Ok(count)) => written += count,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => {
                    self.unsent.push(&sealed[written..]);
                    return Poll::Pending;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Writes what waits; ready when the system has all of it.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Trouble>> {
        while !self.unsent.is_empty() {
            let unsent = std::mem::take(&mut self.unsent);
            let written = self.poll_write(cx, unsent.rest());
            self.unsent = unsent;
            self.unsent.advance(ready!(written)?);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<Result<usize, Trouble>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        if written == 0 {
            return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
        }
        self.traffic.sent += written as u64;
        Poll::Ready(Ok(written))
    }

    /// Says these last words and that nothing follows them, together if they are few; ready when the system has all of it.
    pub(crate) fn poll_close(
        &mut self,
        cx: &mut Context<'_>,
        last: &mut Outgoing,
    ) -> Poll<Result<(), Trouble>> {
        if !self.is_closed {
            if self.secure.is_none() || last.len() > TOGETHER_BYTES {
                ready!(self.poll_send(cx, last))?;
            }
            self.is_closed = true;
            if let Some(secure) = &mut self.secure {
                self.unsent.fill(|sealed| match last.is_empty() {
                    true => Ok(()),
                    false => secure.seal(last.rest(), sealed),
                })?;
                last.advance(last.len());
                self.unsent.fill(|sealed| secure.close(sealed));
            }
        }
        ready!(self.poll_flush(cx))?;
        ready!(Pin::new(&mut self.tcp).poll_shutdown(cx))?;
        Poll::Ready(Ok(()))
    }

    /// After [`Wire::poll_close`]: reads what nobody wants to know, at most `max` bytes; ready at the end of it.
    pub(crate) fn poll_discard(&mut self, cx: &mut Context<'_>, max: u64) -> Poll<()> {
        while self.discarded < max {
            let received = SCRATCH.with_borrow_mut(|scratch| {
                let room = READ_BYTES.max(scratch.incoming.len());
                scratch.incoming.resize(room, 0);
                let mut buffer = ReadBuf::new(&mut scratch.incoming);
                ready!(Pin::new(&mut self.tcp).poll_read(cx, &mut buffer))?;
                Poll::Ready(io::Result::Ok(buffer.filled().len()))
            });
            match ready!(received) {
                Ok(0) | Err(_) => break,
                Ok(count) => self.discarded += count as u64,
            }
        }
        Poll::Ready(())
    }

    /// [`Wire::poll_receive`] into `bytes`.
    pub(crate) async fn receive(&mut self, bytes: &mut Vec<u8>) -> Result<Came, Trouble> {
        poll_fn(|cx| self.poll_receive(cx, |plain| bytes.extend_from_slice(plain))).await
    }

    /// [`Wire::poll_send`] of these.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        let mut plain = Outgoing::default();
        plain.push(bytes);
        poll_fn(|cx| self.poll_send(cx, &mut plain)).await
    }

    /// [`Wire::poll_close`], then [`Wire::poll_discard`].
    pub(crate) async fn finish(&mut self, max: u64) -> Result<(), Trouble> {
        poll_fn(|cx| self.poll_close(cx, &mut Outgoing::default())).await?;
        poll_fn(|cx| self.poll_discard(cx, max)).await;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::testing;
    use crate::transport::tls::{Suites, Tls, TlsSettings};
    use rustls::{
        ClientConfig, ClientConnection, RootCertStore, SupportedCipherSuite,
        SupportedProtocolVersion,
    };
    use rustls_pki_types::CertificateDer;
    use rustls_pki_types::pem::PemObject;
    use std::io::{Read as _, Write as _};
    use std::task::Waker;

    /// What a socket does at the end of its script.
    #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
    pub(crate) enum Then {
        /// Nothing more comes yet.
        #[default]
        Wait,
        End,
        Fail,
    }

    /// A socket that does what it is told.
    pub(crate) struct Scripted {
        pub(crate) incoming: Vec<u8>,
        pub(crate) then: Then,
        pub(crate) sent: Vec<u8>,
        /// Bytes that are taken yet.
        pub(crate) room: usize,
        pub(crate) fails_to_write: bool,
        /// Bytes of a read and of a write at most.
        pub(crate) piece: usize,
        /// Whether each second call has to wait.
        pub(crate) is_hesitant: bool,
        pub(crate) reads: usize,
        pub(crate) writes: usize,
    }

    impl Default for Scripted {
        fn default() -> Scripted {
            Scripted {
                incoming: Vec::new(),
                then: Then::Wait,
                sent: Vec::new(),
                room: usize::MAX,
                fails_to_write: false,
                piece: usize::MAX,
                is_hesitant: false,
                reads: 0,
                writes: 0,
            }
        }
    }

    impl AsyncRead for Scripted {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buffer: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.reads += 1;
            if self.is_hesitant && self.reads % 2 == 1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            if self.incoming.is_empty() {
                return match self.then {
                    Then::Wait => Poll::Pending,
                    Then::End => Poll::Ready(Ok(())),
                    Then::Fail => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                };
            }
            let count = self.incoming.len().min(buffer.remaining()).min(self.piece);
            buffer.put_slice(&self.incoming[..count]);
            self.incoming.drain(..count);
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Scripted {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            if self.fails_to_write {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            self.writes += 1;
            if self.room == 0 || self.is_hesitant && self.writes % 2 == 1 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            let count = bytes.len().min(self.piece).min(self.room);
            self.sent.extend_from_slice(&bytes[..count]);
            self.room -= count;
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    impl Wire<Scripted> {
        pub(crate) fn socket(&mut self) -> &mut Scripted {
            &mut self.tcp
        }
    }

    /// Both configurations, for clients of each version of TLS.
    struct Configs {
        clients: [Arc<ClientConfig>; 2],
        server: Arc<rustls::ServerConfig>,
        root: CertificateDer<'static>,
    }

    impl Configs {
        fn new() -> Configs {
            Configs::speaking(Suites::All)
        }

        fn speaking(suites: Suites) -> Configs {
            let (settings, root) = testing::tls_and_root();
            let settings = TlsSettings { suites, ..settings };
            let root = CertificateDer::from_pem_slice(root.as_bytes()).unwrap();
            let provider = rustls::crypto::aws_lc_rs::default_provider;
            Configs {
                clients: [0, 1].map(|version| Configs::client(provider(), version, root.clone())),
                server: Tls::new(&settings).unwrap().tcp(),
                root,
            }
        }

        fn client(
            provider: rustls::crypto::CryptoProvider,
            version: usize,
            root: CertificateDer<'static>,
        ) -> Arc<ClientConfig> {
            let versions: [&'static SupportedProtocolVersion; 2] =
                [&rustls::version::TLS13, &rustls::version::TLS12];
            let mut roots = RootCertStore::empty();
            roots.add(root).unwrap();
            let config = ClientConfig::builder_with_provider(Arc::new(provider))
                .with_protocol_versions(&versions[version..=version])
                .unwrap()
                .with_root_certificates(roots)
                .with_no_client_auth();
            Arc::new(config)
        }
    }

    /// A client, and a server's wire over a scripted socket.
    struct Pair {
        client: ClientConnection,
        wire: Wire<Scripted>,
        /// What the client said and the socket did not bring yet.
        held: Vec<u8>,
        /// Bytes that the socket may still bring before [`Pair::then`].
        budget: usize,
        then: Then,
        heard: Vec<u8>,
        answered: Vec<u8>,
        outgoing: Outgoing,
    }

    impl Pair {
        fn new(configs: &Configs, version: usize, socket: Scripted) -> Pair {
            let name = "localhost".try_into().unwrap();
            Pair {
                client: ClientConnection::new(Arc::clone(&configs.clients[version]), name).unwrap(),
                wire: Wire::tls(socket, Arc::clone(&configs.server)).unwrap(),
                held: Vec::new(),
                budget: usize::MAX,
                then: Then::Wait,
                heard: Vec::new(),
                answered: Vec::new(),
                outgoing: Outgoing::default(),
            }
        }

        /// What the client has to say goes to the socket, as far as it may.
        fn say(&mut self) {
            while self.client.wants_write() {
                self.client.write_tls(&mut self.held).unwrap();
            }
            let count = self.held.len().min(self.budget);
            self.wire.tcp.incoming.extend(self.held.drain(..count));
            self.budget -= count;
            if self.budget == 0 {
                self.wire.tcp.then = self.then;
            }
        }

        /// The client takes what the server wrote.
        fn hear(&mut self) {
            let sent = std::mem::take(&mut self.wire.tcp.sent);
            let mut rest = &sent[..];
            while !rest.is_empty() {
                self.client.read_tls(&mut rest).unwrap();
                let _ = self.client.process_new_packets();
                let _ = self.client.reader().read_to_end(&mut self.answered);
            }
        }

        /// One read and one write of the server; `None`: neither goes on.
        fn turn(&mut self) -> Option<Result<Came, Trouble>> {
            let cx = &mut Context::from_waker(Waker::noop());
            let heard = &mut self.heard;
            let came = self
                .wire
                .poll_receive(cx, |plain| heard.extend_from_slice(plain));
            let is_standing = !self.wire.is_handshaking() && !self.wire.has_untold_failure();
            if is_standing
                && let Poll::Ready(Err(trouble)) = self.wire.poll_send(cx, &mut self.outgoing)
                && came.is_pending()
            {
                return Some(Err(trouble));
            }
            match came {
                Poll::Ready(came) => Some(came),
                Poll::Pending => None,
            }
        }

        /// Both sides go on until nothing moves, or there is an end.
        fn run(&mut self) -> Result<Came, Trouble> {
            // A socket that hesitates needs a second call.
            let mut idle = 0;
            while idle < 3 {
                self.say();
                let sent = self.wire.traffic.sent;
                match self.turn() {
                    Some(Ok(Came::Bytes)) => idle = 0,
                    Some(end) => {
                        self.hear();
                        return end;
                    }
                    None if self.wire.traffic.sent > sent => idle = 0,
                    None => idle += 1,
                }
                self.hear();
            }
            Ok(Came::Bytes)
        }

        /// A handshake through and through.
        fn standing(configs: &Configs, version: usize, socket: Scripted) -> Pair {
            let mut pair = Pair::new(configs, version, socket);
            assert_eq!(pair.run().unwrap(), Came::Bytes);
            assert!(!pair.client.is_handshaking() && !pair.wire.is_handshaking());
            pair
        }
    }

    fn words(length: u32) -> Vec<u8> {
        (0..length).map(|n| (n % 253) as u8).collect()
    }

    #[test]
    fn a_session_is_the_same_over_a_socket_that_takes_and_gives_single_bytes_and_hesitates() {
        let configs = Configs::new();
        for version in [0, 1] {
            for (piece, is_hesitant) in [(1, true), (1, false), (700, true), (usize::MAX, true)] {
                let socket = Scripted {
                    piece,
                    is_hesitant,
                    ..Scripted::default()
                };
                let mut pair = Pair::standing(&configs, version, socket);
                let said = words(20_000);
                pair.client.writer().write_all(&said).unwrap();
                pair.outgoing.push(&said);
                assert_eq!(pair.run().unwrap(), Came::Bytes);
                assert_eq!(pair.heard, said);
                assert_eq!(pair.answered, said);
                assert_eq!(pair.wire.secure.as_ref().unwrap().waiting(), 0);
                pair.client.send_close_notify();
                assert_eq!(pair.run().unwrap(), Came::End);
            }
        }
    }

    #[test]
    fn our_order_of_cipher_suites_counts_and_who_offers_another_one_alone_gets_it() {
        let mut configs = Configs::new();
        let chosen = |configs: &Configs, version| {
            let pair = Pair::standing(configs, version, Scripted::default());
            let suite = pair.client.negotiated_cipher_suite().unwrap().suite();
            format!("{suite:?}")
        };
        for version in [0, 1] {
            let first = configs.clients[version].crypto_provider().cipher_suites[0].suite();
            assert!(format!("{first:?}").contains("AES_256"), "{first:?}");
            let light = chosen(&configs, version);
            assert!(light.ends_with("AES_128_GCM_SHA256"), "{light}");
            for only in ["AES_256_GCM_SHA384", "CHACHA20_POLY1305_SHA256"] {
                let offering =
                    |suite: &SupportedCipherSuite| format!("{:?}", suite.suite()).ends_with(only);
                let client = &configs.clients[version];
                let mut provider = (**client.crypto_provider()).clone();
                provider.cipher_suites.retain(offering);
                let root = configs.root.clone();
                let strict = Configs::client(provider, version, root);
                let before = std::mem::replace(&mut configs.clients[version], strict);
                let suite = chosen(&configs, version);
                assert!(suite.ends_with(only), "{suite}");
                configs.clients[version] = before;
            }
        }
    }

    #[test]
    fn where_aes_256_is_asked_for_nothing_else_is_spoken() {
        let mut configs = Configs::speaking(Suites::Aes256);
        for version in [0, 1] {
            let pair = Pair::standing(&configs, version, Scripted::default());
            let suite = pair.client.negotiated_cipher_suite().unwrap().suite();
            assert!(format!("{suite:?}").ends_with("AES_256_GCM_SHA384"));
            let mut provider = (**configs.clients[version].crypto_provider()).clone();
            let others =
                |suite: &SupportedCipherSuite| !format!("{:?}", suite.suite()).contains("AES_256");
            provider.cipher_suites.retain(others);
            configs.clients[version] = Configs::client(provider, version, configs.root.clone());
            let mut pair = Pair::new(&configs, version, Scripted::default());
            pair.say();
            let refused = pair.run().unwrap_err();
            assert!(
                format!("{refused:?}").contains("NoCipherSuitesInCommon"),
                "{refused:?}"
            );
        }
    }

    #[test]
    fn the_last_words_and_the_end_go_in_one_call_and_wait_for_a_socket_that_has_no_room() {
        let configs = Configs::new();
        for version in [0, 1] {
            // Few, none, and more than go together.
            for (length, calls) in [(30, 1), (0, 1), (2 * TOGETHER_BYTES as u32, 2)] {
                for has_room in [true, false] {
                    let mut pair = Pair::standing(&configs, version, Scripted::default());
                    let cx = &mut Context::from_waker(Waker::noop());
                    // What TLS itself had to say has gone.
                    pair.outgoing.push(b"!");
                    pair.run().unwrap();
                    pair.answered.clear();
                    let last = words(length);
                    pair.outgoing.push(&last);
                    let writes = pair.wire.socket().writes;
                    if !has_room {
                        pair.wire.socket().room = 10;
                        assert!(pair.wire.poll_close(cx, &mut pair.outgoing).is_pending());
                        pair.wire.socket().room = usize::MAX;
                    }
                    let closed = pair.wire.poll_close(cx, &mut pair.outgoing);
                    assert!(matches!(closed, Poll::Ready(Ok(()))));
                    if has_room {
                        assert_eq!(pair.wire.socket().writes - writes, calls);
                    }
                    let said = std::mem::take(&mut pair.wire.socket().sent);
                    let mut said = &said[..];
                    while !said.is_empty() {
                        pair.client.read_tls(&mut said).unwrap();
                        let state = pair.client.process_new_packets().unwrap();
                        let mut plain = vec![0; state.plaintext_bytes_to_read()];
                        pair.client.reader().read_exact(&mut plain).unwrap();
                        pair.answered.extend(plain);
                        if said.is_empty() {
                            assert!(state.peer_has_closed());
                        }
                    }
                    assert_eq!(pair.answered, last);
                }
            }
        }
    }

    #[test]
    fn wherever_a_session_is_cut_it_goes_on_or_ends_and_nothing_is_heard_that_was_not_said() {
        let configs = Configs::new();
        let said = words(300);
        for version in [0, 1] {
            for then in [Then::Wait, Then::End, Then::Fail] {
                for cut in 1.. {
                    let mut pair = Pair::new(&configs, version, Scripted::default());
                    pair.client.writer().write_all(&said).unwrap();
                    (pair.budget, pair.then) = (cut, then);
                    let end = pair.run();
                    if pair.budget > 0 {
                        assert!(cut > 300, "a whole session is more than its words");
                        assert_eq!(pair.heard, said);
                        break;
                    }
                    assert!(said.starts_with(&pair.heard));
                    match then {
                        Then::Wait => {
                            pair.budget = usize::MAX;
                            assert_eq!(pair.run().unwrap(), Came::Bytes);
                            assert_eq!(pair.heard, said, "{cut}");
                        }
                        Then::End => assert_eq!(end.unwrap(), Came::End, "{cut}"),
                        Then::Fail => assert!(matches!(end, Err(Trouble::Io(_))), "{cut}"),
                    }
                }
            }
        }
    }

    #[test]
    fn a_socket_that_cannot_be_written_to_ends_it() {
        let configs = Configs::new();
        for version in [0, 1] {
            let mut pair = Pair::new(&configs, version, Scripted::default());
            pair.wire.tcp.fails_to_write = true;
            assert!(
                matches!(pair.run(), Err(Trouble::Io(_))),
                "in the handshake"
            );
            let mut pair = Pair::standing(&configs, version, Scripted::default());
            pair.wire.tcp.fails_to_write = true;
            pair.outgoing.push(b"x");
            assert!(matches!(pair.run(), Err(Trouble::Io(_))), "afterwards");
        }
    }

    #[test]
    fn a_handshake_that_cannot_be_written_waits_and_goes_on() {
        let configs = Configs::new();
        for version in [0, 1] {
            for room in [0, 1, 5, 100] {
                let socket = Scripted {
                    room,
                    ..Scripted::default()
                };
                let mut pair = Pair::new(&configs, version, socket);
                assert_eq!(pair.run().unwrap(), Came::Bytes);
                assert!(pair.wire.is_handshaking() && pair.wire.unsent() > 0);
                // Nothing is read meanwhile.
                pair.wire.tcp.incoming.push(0);
                assert!(pair.turn().is_none());
                assert_eq!(pair.wire.tcp.incoming.len(), 1);
                pair.wire.tcp.incoming.clear();
                pair.wire.tcp.room = usize::MAX;
                pair.client.writer().write_all(b"hello").unwrap();
                pair.outgoing.push(b"there");
                assert_eq!(pair.run().unwrap(), Came::Bytes);
                assert_eq!(
                    (&pair.heard[..], &pair.answered[..]),
                    (&b"hello"[..], &b"there"[..])
                );
            }
        }
    }

    #[test]
    fn the_keys_may_be_renewed_while_writing_is_blocked() {
        let configs = Configs::new();
        let mut pair = Pair::standing(&configs, 0, Scripted::default());
        let said = words(200_000);
        pair.outgoing.push(&said);
        pair.wire.tcp.room = 1_000;
        for round in 1..=20 {
            pair.client.refresh_traffic_keys().unwrap();
            pair.client.writer().write_all(b"x").unwrap();
            assert_eq!(pair.run().unwrap(), Came::Bytes);
            assert_eq!(pair.heard.len(), round, "it is heard all the same");
        }
        assert!(
            pair.wire.unsent() <= 2 * SEAL_BYTES,
            "answers do not pile up"
        );
        pair.wire.tcp.room = usize::MAX;
        pair.outgoing.push(b"and more");
        assert_eq!(pair.run().unwrap(), Came::Bytes);
        assert_eq!(pair.answered, [&said[..], b"and more"].concat());
    }

    #[test]
    fn what_follows_the_end_of_tls_is_not_heard() {
        let configs = Configs::new();
        for version in [0, 1] {
            for (piece, junk) in [(usize::MAX, 40), (7, 40), (usize::MAX, 60_000)] {
                let socket = Scripted {
                    piece,
                    ..Scripted::default()
                };
                let mut pair = Pair::standing(&configs, version, socket);
                pair.client.writer().write_all(b"bye").unwrap();
                pair.client.send_close_notify();
                pair.say();
                pair.wire.tcp.incoming.extend(vec![0x17; junk]);
                assert_eq!(pair.run().unwrap(), Came::End, "{piece} {junk}");
                assert_eq!(pair.heard, b"bye");
                assert_eq!(pair.run().unwrap(), Came::End);
            }
        }
    }

    #[test]
    fn what_came_before_a_damaged_record_in_the_same_read_is_handed_over_first() {
        let configs = Configs::new();
        for version in [0, 1] {
            let mut pair = Pair::standing(&configs, version, Scripted::default());
            pair.client.writer().write_all(b"ack, bye").unwrap();
            pair.say();
            pair.client.writer().write_all(b"damaged").unwrap();
            pair.say();
            *pair.wire.tcp.incoming.last_mut().unwrap() ^= 1;
            assert!(matches!(pair.turn(), Some(Ok(Came::Bytes))));
            assert_eq!(pair.heard, b"ack, bye");
            assert!(pair.wire.has_untold_failure());
            for _ in 0..2 {
                assert!(matches!(pair.turn(), Some(Err(Trouble::Tls(_)))));
            }
            assert!(!pair.wire.has_untold_failure());
            assert_eq!(pair.heard, b"ack, bye");
            assert!(!pair.wire.tcp.sent.is_empty(), "the alert");
        }
    }

    #[test]
    fn without_tls_bytes_go_through_as_they_are() {
        let mut wire = Wire::plain(Scripted {
            incoming: words(50_000),
            then: Then::End,
            piece: 3_000,
            is_hesitant: true,
            ..Scripted::default()
        });
        let cx = &mut Context::from_waker(Waker::noop());
        let mut heard = Vec::new();
        loop {
            match wire.poll_receive(cx, |plain| heard.extend_from_slice(plain)) {
                Poll::Ready(Ok(Came::End)) => break,
                Poll::Ready(came) => assert_eq!(came.unwrap(), Came::Bytes),
                Poll::Pending => {}
            }
        }
        assert_eq!(heard, words(50_000));
        let mut outgoing = Outgoing::default();
        outgoing.push(&heard);
        while wire.poll_send(cx, &mut outgoing).is_pending() {}
        assert_eq!(wire.tcp.sent, heard);
    }
}
