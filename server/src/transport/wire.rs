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
    /// Bytes were handed over.
    Bytes,
    /// The peer says no more.
    End,
}

/// A TCP connection. It counts below TLS: what the system took is progress.
pub(crate) struct Wire {
    tcp: TcpStream,
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
}

impl Wire {
    /// A connection without TLS.
    pub(crate) fn plain(tcp: TcpStream) -> Wire {
        Wire {
            tcp,
            secure: None,
            unsent: Outgoing::default(),
            traffic: Traffic::default(),
            is_over: false,
            is_closed: false,
            discarded: 0,
        }
    }

    /// A connection with TLS, which begins with the first read.
    ///
    /// # Errors
    /// When the configuration cannot be used.
    pub(crate) fn tls(
        tcp: TcpStream,
        config: Arc<rustls::ServerConfig>,
    ) -> Result<Wire, rustls::Error> {
        Ok(Wire {
            secure: Some(Secure::new(config)?),
            ..Wire::plain(tcp)
        })
    }

    /// The same connection without the TLS that it never had.
    pub(crate) fn without_tls(self) -> Wire {
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

    /// Hands what came to `take`, some 16 KiB at most; the handshake of TLS is part of it.
    pub(crate) fn poll_receive(
        &mut self,
        cx: &mut Context<'_>,
        mut take: impl FnMut(&[u8]),
    ) -> Poll<Result<Came, Trouble>> {
        loop {
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
            match ready!(came)? {
                Came::End => return Poll::Ready(Ok(Came::End)),
                Came::Bytes if handed => return Poll::Ready(Ok(Came::Bytes)),
                Came::Bytes => {}
            }
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
        let partial = self.secure.as_ref().map_or(&[][..], Secure::partial);
        let start = partial.len();
        let incoming = &mut scratch.incoming;
        if incoming.len() < start + READ_BYTES {
            incoming.resize(start + READ_BYTES, 0);
        }
        incoming[..start].copy_from_slice(partial);
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
        if is_first && bytes[0] != TLS_HANDSHAKE {
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
                (Poll::Ready(Err(error.into())), false)
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

    /// Says that nothing more is said; ready when the system has that too.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Trouble>> {
        if !self.is_closed {
            self.is_closed = true;
            if let Some(secure) = &mut self.secure {
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
        poll_fn(|cx| self.poll_close(cx)).await?;
        poll_fn(|cx| self.poll_discard(cx, max)).await;
        Ok(())
    }
}
