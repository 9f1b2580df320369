//! Frames on the one bidirectional stream of a QUIC connection, each behind its length (docs/protocol.md).
//!
//! A device gets one stream and nothing else: a second one, a unidirectional one or a datagram breaks the limits that
//! we stated in the handshake, and QUIC itself closes that connection. What a connection may hold is small and stated
//! below; the device keeps it alive, and QUIC's own idle timer notices its silence.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, FrameReader, LengthPrefix};
use bytes::Bytes;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connection, ConnectionError, IdleTimeout, ReadError, RecvStream, SendStream, ServerConfig,
    TransportConfig, VarInt, WriteError,
};
use tokio::time::Sleep;

use super::link::{Broken, Pipe, Traffic};
use super::outgoing::Outgoing;

/// What a device may send on its stream before we have read it, in bytes: a `hello` with everything in it fits, and
/// a frame of the largest size comes through in a few turns.
const RECEIVE_WINDOW_BYTES: u32 = 8 * 1024;

/// What we keep of a stream until the device acknowledges it, in bytes. At 100 ms it allows a megabyte a second.
const SEND_WINDOW_BYTES: u64 = 128 * 1024;

/// Out-of-order handshake data of one connection, in bytes: a client certificate chain fits.
const CRYPTO_BUFFER_BYTES: usize = 8 * 1024;

/// Connections that wait for the accepting task. It does hardly anything for each, so a queue means overload.
const INCOMING_MAX: usize = 4_096;

/// Packets buffered for a connection that waits for the accepting task, in bytes: the rest of a ClientHello with
/// post-quantum keys.
const INCOMING_BUFFER_BYTES: u64 = 8 * 1024;

/// The same for all connections together.
const INCOMING_BUFFER_TOTAL_BYTES: u64 = 8 * 1024 * 1024;

/// What is read of a stream at a time, on the stack.
const SCRATCH_BYTES: usize = 2 * 1024;

/// The configuration of the endpoint.
pub(crate) fn server_config(tls: Arc<QuicServerConfig>, silence: Duration) -> ServerConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(RECEIVE_WINDOW_BYTES))
        .send_window(SEND_WINDOW_BYTES)
        // The greatest duration that QUIC can state is longer than any that can be configured.
        .max_idle_timeout(Some(
            IdleTimeout::try_from(silence).unwrap_or(VarInt::MAX.into()),
        ))
        // Keep-alive is the device's job: it knows its battery and its network.
        .keep_alive_interval(None)
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .mtu_discovery_config(None)
        .crypto_buffer_size(CRYPTO_BUFFER_BYTES)
        // With it, each connection keeps a buffer of ten packets for good, 12 KB, to save system calls in bursts that
        // notifications hardly make.
        .enable_segmentation_offload(false);
    let mut config = ServerConfig::with_crypto(tls);
    config
        .transport_config(Arc::new(transport))
        // Devices change networks; the connection follows.
        .migration(true)
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BUFFER_BYTES)
        .incoming_buffer_size_total(INCOMING_BUFFER_TOTAL_BYTES);
    config
}

/// Takes a QUIC connection to the first stream of its device, before the deadline.
///
/// # Errors
/// The word for metrics, when it came to nothing.
pub(crate) async fn accept(
    connecting: quinn::Connecting,
    mut deadline: Pin<&mut Sleep>,
    frame_max: usize,
) -> Result<QuicPipe, &'static str> {
    let late = Code::HelloTimeout;
    let connection = tokio::select! {
        connected = connecting => connected.map_err(|error| handshake_refusal(&error))?,
        () = &mut deadline => return Err(late.name()),
    };
    let (send, receive) = tokio::select! {
        streams = connection.accept_bi() => streams.map_err(|error| loss(&error))?,
        () = &mut deadline => {
            connection.close(close_number(late), late.meaning().as_bytes());
            return Err(late.name());
        }
    };
    Ok(QuicPipe {
        connection,
        send,
        receive,
        reader: FrameReader::new(frame_max),
        outgoing: Outgoing::default(),
        traffic: Traffic::default(),
        end: None,
    })
}

/// Number with which a connection is closed.
pub(crate) fn close_number(code: Code) -> VarInt {
    let number = code.quic_close().or(Code::Internal.quic_close());
    VarInt::from_u32(number.unwrap_or_default())
}

fn handshake_refusal(error: &ConnectionError) -> &'static str {
    /// QUIC's error number for a TLS alert (RFC 9001 section 4.8), and the alert of RFC 7301 section 3.2.
    const NO_APPLICATION_PROTOCOL: u64 = 0x0100 + 120;
    match error {
        ConnectionError::TransportError(error)
            if u64::from(error.code) == NO_APPLICATION_PROTOCOL =>
        {
            "alpn"
        }
        ConnectionError::TransportError(_) => "tls",
        ConnectionError::VersionMismatch
        | ConnectionError::ConnectionClosed(_)
        | ConnectionError::ApplicationClosed(_)
        | ConnectionError::Reset
        | ConnectionError::TimedOut
        | ConnectionError::LocallyClosed
        | ConnectionError::CidsExhausted => "closed",
    }
}

fn loss(error: &ConnectionError) -> &'static str {
    match error {
        ConnectionError::TimedOut => Code::Silence.name(),
        ConnectionError::ApplicationClosed(_) => "left",
        // The device crossed a limit that the handshake stated, such as a second stream.
        ConnectionError::TransportError(_) => "protocol_violation",
        ConnectionError::LocallyClosed => "shutdown",
        ConnectionError::ConnectionClosed(_)
        | ConnectionError::Reset
        | ConnectionError::VersionMismatch
        | ConnectionError::CidsExhausted => "lost",
    }
}

type Stopped = Pin<Box<dyn Future<Output = ()> + Send>>;

struct End {
    code: Code,
    message: String,
    /// Completes when the device has everything; made once all is written.
    stopped: Option<Stopped>,
}

/// A QUIC connection with its stream.
pub(crate) struct QuicPipe {
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    reader: FrameReader,
    outgoing: Outgoing,
    traffic: Traffic,
    end: Option<Box<End>>,
}

impl QuicPipe {
    fn poll_stopped(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(end) = &mut self.end else {
            return Poll::Ready(());
        };
        let stopped = end.stopped.get_or_insert_with(|| {
            // Fails only if it was finished or reset before, and then there is nothing to wait for either.
            let _ = self.send.finish();
            let stopped = self.send.stopped();
            Box::pin(async move { drop(stopped.await) })
        });
        stopped.as_mut().poll(cx)
    }
}

impl Pipe for QuicPipe {
    const CARRIER: Carrier = Carrier::Quic;

    fn codec(&self) -> Codec {
        Codec::Cbor
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let fault = |error: bellwire_protocol::DecodeError| {
            Err(Broken::Fault(error.code(), error.to_string()))
        };
        match self.reader.pull() {
            Ok(Some(frame)) => return Poll::Ready(Ok(Some(frame))),
            Ok(None) => {}
            Err(error) => return Poll::Ready(fault(error)),
        }
        let mut scratch = [0; SCRATCH_BYTES];
        let received = match ready!(self.receive.poll_read(cx, &mut scratch)) {
            Ok(received) => received,
            Err(ReadError::ConnectionLost(error)) => {
                return Poll::Ready(Err(Broken::Gone(loss(&error))));
            }
            Err(
                ReadError::Reset(_)
                | ReadError::ClosedStream
                | ReadError::IllegalOrderedRead
                | ReadError::ZeroRttRejected,
            ) => return Poll::Ready(Err(Broken::Left)),
        };
        if received == 0 {
            return Poll::Ready(Err(if self.reader.is_at_boundary() {
                Broken::Left
            } else {
                Broken::Fault(Code::Malformed, "the stream ends inside a frame".to_owned())
            }));
        }
        self.traffic.received += received as u64;
        self.reader.push(&scratch[..received]);
        Poll::Ready(match self.reader.pull() {
            Ok(frame) => Ok(frame),
            Err(error) => fault(error),
        })
    }

    fn queue(&mut self, head: &[u8], tail: &[u8]) {
        let length = head.len() + tail.len();
        let prefix = LengthPrefix::new(length);
        self.outgoing.reserve(prefix.as_bytes().len() + length);
        self.outgoing.push(prefix.as_bytes());
        self.outgoing.push(head);
        self.outgoing.push(tail);
    }

    fn queued(&self) -> usize {
        self.outgoing.len()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        while !self.outgoing.is_empty() {
            let rest = self.outgoing.rest();
            match ready!(Pin::new(&mut self.send).poll_write(cx, rest)) {
                Ok(written) => {
                    self.traffic.sent += written as u64;
                    self.outgoing.advance(written);
                }
                Err(WriteError::ConnectionLost(error)) => {
                    return Poll::Ready(Err(Broken::Gone(loss(&error))));
                }
                Err(
                    WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected,
                ) => return Poll::Ready(Err(Broken::Left)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn heard_of_peer(&self) -> Option<u64> {
        Some(self.connection.stats().udp_rx.datagrams)
    }

    fn end(&mut self, code: Code, message: &str) {
        self.end = Some(Box::new(End {
            code,
            message: message.to_owned(),
            stopped: None,
        }));
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if ready!(self.poll_send(cx)).is_ok() {
            ready!(self.poll_stopped(cx));
        }
        Poll::Ready(())
    }
}

impl Drop for QuicPipe {
    fn drop(&mut self) {
        let (code, message) = match &self.end {
            Some(end) => (end.code, end.message.as_str()),
            None => (Code::Bye, ""),
        };
        self.connection
            .close(close_number(code), message.as_bytes());
    }
}
