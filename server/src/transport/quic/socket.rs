//! The one UDP socket of all QUIC connections.

use std::io::{self, IoSliceMut};

use quinn_proto::Transmit;
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSocketState};
use tokio::io::Interest;
use tokio::net::UdpSocket;

/// Datagrams that are handed to the kernel in one call: what a turn of a busy connection has to say.
const SEGMENTS_MAX: usize = 10;

/// A UDP socket that takes and gives many datagrams in a call where the system can.
pub(super) struct Socket {
    io: UdpSocket,
    state: UdpSocketState,
}

impl Socket {
    /// Takes a bound socket that does not block. Call it in a runtime.
    pub(super) fn new(socket: std::net::UdpSocket) -> io::Result<Socket> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Socket {
            io: UdpSocket::from_std(socket)?,
            state,
        })
    }

    /// Whether datagrams may be split on their way, so that a larger one proves nothing.
    pub(super) fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }

    /// How many datagrams of one connection go in one call.
    pub(super) fn segments(&self) -> usize {
        self.state.max_gso_segments().clamp(1, SEGMENTS_MAX)
    }

    /// Bytes that one buffer for receiving must have.
    pub(super) const RECEIVE_BYTES: usize = 64 * 1024;

    /// Hands datagrams to the system; `false`: it has no room now, ask again after [`Socket::writable`]. What it does not
    /// take for another reason is lost, as a datagram may be.
    pub(super) fn send(&self, transmit: &Transmit, bytes: &[u8]) -> bool {
        let datagrams = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit
                .ecn
                .and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
            contents: bytes,
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        let sent = self.io.try_io(Interest::WRITABLE, || {
            self.state.send((&self.io).into(), &datagrams)
        });
        !matches!(sent, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Waits until the system has room, or for nothing.
    pub(super) async fn writable(&self) {
        // An error is met again when sending.
        let _ = self.io.writable().await;
    }

    /// Waits until something has come, or an error.
    pub(super) async fn readable(&self) -> io::Result<()> {
        self.io.readable().await
    }

    /// Takes what has come into these buffers; answers how many of them were filled.
    pub(super) fn receive(
        &self,
        buffers: &mut [IoSliceMut<'_>],
        metas: &mut [RecvMeta],
    ) -> io::Result<usize> {
        self.io.try_io(Interest::READABLE, || {
            self.state.recv((&self.io).into(), buffers, metas)
        })
    }
}
