//! QUIC: one bidirectional stream on one connection, every frame behind its length.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, FrameReader, write_framed};
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ConnectionError, ReadError, TransportConfig, VarInt, WriteError};

use super::{ConnectError, LinkEnd, Received};
use crate::endpoint::Endpoint;
use crate::tls::Tls;

/// What the server may send ahead of our reading, in bytes: a full window of small notifications, or one of the largest.
const RECEIVE_WINDOW: u32 = 256 * 1024;

/// What may wait for the server's acknowledgement, in bytes: a device says little.
const SEND_WINDOW: u64 = 64 * 1024;

/// Handshake bytes that may arrive out of order, in bytes.
const CRYPTO_BUFFER: usize = 16 * 1024;

/// Most bytes of one read.
const READ_MAX_BYTES: usize = 64 * 1024;

/// What is read and thrown away while a link is closed, in bytes: a server that goes on talking must not keep us.
const IGNORED_MAX_BYTES: usize = 1024 * 1024;

/// How long the close with its code may take after the end of the stream.
const CLOSE_AFTER_END: Duration = Duration::from_secs(1);

/// How long the last packet of a connection may take to leave this machine.
const LAST_PACKET: Duration = Duration::from_millis(100);

const _: () = assert!(RECEIVE_WINDOW as usize > bellwire_protocol::limits::SERVER_FRAME_MAX_BYTES);

#[derive(Debug)]
pub(super) struct QuicLink {
    endpoint: quinn::Endpoint,
    connection: quinn::Connection,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    reader: FrameReader,
    out: Vec<u8>,
    /// The server has ended the stream; the close with its code follows.
    at_end: bool,
    /// Other connections use the endpoint as well.
    shared: bool,
}

/// Connects to one address. No round trip is spent on the stream: the server sees it with the `hello`.
pub(super) async fn dial(
    server: &Endpoint,
    address: SocketAddr,
    tls: &Tls,
    shared: Option<&quinn::Endpoint>,
) -> Result<QuicLink, ConnectError> {
    let host = server.host();
    let failed = |detail: String| ConnectError::handshake(Carrier::Quic, host, detail);
    let endpoint = match shared {
        Some(endpoint) => endpoint.clone(),
        None => quinn::Endpoint::client(any_local(&address))
            .map_err(|source| ConnectError::Socket { source })?,
    };
    let crypto =
        QuicClientConfig::try_from(tls.quic.clone()).map_err(|error| failed(error.to_string()))?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    let connecting = endpoint
        .connect_with(config, address, host)
        .map_err(|error| failed(error.to_string()))?;
    let connection = connecting
        .await
        .map_err(|error| connect_error(error, server))?;
    let (send, receive) = connection
        .open_bi()
        .await
        .map_err(|error| connect_error(error, server))?;
    let reader = FrameReader::new(Codec::Cbor.server_frame_max_bytes());
    Ok(QuicLink {
        endpoint,
        connection,
        send,
        receive,
        reader,
        out: Vec::new(),
        at_end: false,
        shared: shared.is_some(),
    })
}

fn any_local(peer: &SocketAddr) -> SocketAddr {
    match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// Small, because a device has one stream and says little.
fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW))
        .send_window(SEND_WINDOW)
        .crypto_buffer_size(CRYPTO_BUFFER)
        .datagram_receive_buffer_size(None)
        // Probes for larger packets would wake the radio, and keep a router from forgetting the flow in the middle of a silence
        // that is to tell how long it remembers.
        .mtu_discovery_config(None)
        // The session's own `ping` notices a server that is gone, and the server knows the silence it bears.
        .max_idle_timeout(None)
        .keep_alive_interval(None);
    transport
}

fn connect_error(error: ConnectionError, server: &Endpoint) -> ConnectError {
    match &error {
        ConnectionError::TimedOut => ConnectError::Timeout {
            carrier: Carrier::Quic,
            to: server.authority(),
        },
        ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => {
            ConnectError::handshake(Carrier::Quic, server.host(), error.to_string())
        }
    }
}

impl QuicLink {
    pub(super) async fn receive(&mut self) -> Result<Received, LinkEnd> {
        loop {
            match self.reader.pull() {
                Ok(Some(frame)) => return Ok(Ok(frame)),
                Ok(None) => {}
                Err(error) => return Ok(Err(error)),
            }
            let bytes = self.read().await?;
            self.reader.push(&bytes);
        }
    }

    /// What comes next, frames or not. May be dropped without losing anything.
    async fn read(&mut self) -> Result<bytes::Bytes, LinkEnd> {
        if !self.at_end {
            match self.receive.read_chunk(READ_MAX_BYTES, true).await {
                Ok(Some(chunk)) => return Ok(chunk.bytes),
                Ok(None) => self.at_end = true,
                Err(ReadError::ConnectionLost(error)) => return Err(ended(&error)),
                Err(ReadError::Reset(code)) => {
                    return Err(coded(code, "the server reset the stream"));
                }
                Err(
                    error @ (ReadError::ClosedStream
                    | ReadError::IllegalOrderedRead
                    | ReadError::ZeroRttRejected),
                ) => {
                    return Err(LinkEnd::new(None, error.to_string()));
                }
            }
        }
        let closed = tokio::time::timeout(CLOSE_AFTER_END, self.connection.closed()).await;
        Err(match closed {
            Ok(error) => ended(&error),
            Err(_) => LinkEnd::new(None, "the server ended the stream"),
        })
    }

    pub(super) fn feed(&mut self, frame: &[u8]) {
        write_framed(&mut self.out, frame);
    }

    pub(super) fn feed_unframed(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(super) async fn flush(&mut self) -> Result<(), LinkEnd> {
        if self.out.is_empty() {
            return Ok(());
        }
        let out = std::mem::take(&mut self.out);
        self.send
            .write_all(&out)
            .await
            .map_err(|error| match error {
                WriteError::ConnectionLost(error) => ended(&error),
                WriteError::Stopped(code) => coded(code, "the server stopped the stream"),
                WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                    LinkEnd::new(None, error.to_string())
                }
            })
    }

    /// How many PATH_CHALLENGE frames came (RFC 9000 section 8.2): a server sends one when packets of this connection suddenly
    /// come from another address.
    pub(super) fn address_checks(&self) -> u64 {
        self.connection.stats().frame_rx.path_challenge
    }

    pub(super) fn rebind(&self) -> bool {
        let local = match self.endpoint.local_addr() {
            Ok(local) => any_local(&local),
            Err(_) => return false,
        };
        let socket = std::net::UdpSocket::bind(local);
        match socket.and_then(|socket| self.endpoint.rebind(socket)) {
            Ok(()) => true,
            Err(error) => {
                tracing::warn!(%error, "cannot move to a new UDP socket");
                false
            }
        }
    }

    pub(super) async fn close(mut self, code: Code, farewell: Duration) -> Option<Code> {
        // A close throws away what has not arrived, so the stream is ended first and the other side may answer.
        let _ = self.send.finish();
        let answer = tokio::time::timeout(farewell, async {
            // Bytes, not frames: after bytes that are no frame the reader answers the same for ever, and nothing would wait.
            let mut ignored = 0;
            while ignored <= IGNORED_MAX_BYTES {
                match self.read().await {
                    Ok(bytes) => ignored += bytes.len(),
                    Err(end) => return end.code,
                }
            }
            None
        });
        let answer = answer.await.ok().flatten();
        let number = code.quic_close().unwrap_or_default();
        self.connection.close(VarInt::from_u32(number), b"");
        if !self.shared {
            // Time for the last packet; a process that ends right now would swallow it.
            let _ = tokio::time::timeout(LAST_PACKET, self.endpoint.wait_idle()).await;
        }
        answer
    }
}

fn ended(error: &ConnectionError) -> LinkEnd {
    let code = match error {
        ConnectionError::ApplicationClosed(close) => {
            Code::from_quic_close(close.error_code.into_inner())
        }
        ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::TimedOut
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => None,
    };
    LinkEnd::new(code, error.to_string())
}

fn coded(code: VarInt, detail: &str) -> LinkEnd {
    LinkEnd::new(Code::from_quic_close(code.into_inner()), detail)
}
