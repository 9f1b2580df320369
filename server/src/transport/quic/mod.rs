//! Frames on the one bidirectional stream of a QUIC connection, each behind its length (docs/protocol.md).
//!
//! A device gets one stream and nothing else: a second one, a unidirectional one or a datagram breaks the limits that
//! we stated in the handshake, and QUIC itself closes that connection. What a connection may hold is small and stated
//! below; the device keeps it alive, and QUIC's own idle timer notices its silence.

mod connection;
mod endpoint;
mod socket;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod time;

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, FrameReader, LengthPrefix};
use bytes::Bytes;
use quinn_proto::crypto::rustls::QuicServerConfig;
use quinn_proto::{ConnectionError, IdleTimeout, ServerConfig, TransportConfig, VarInt};
use tokio::time::{Sleep, sleep_until};

pub(crate) use self::connection::Connection;
use self::connection::{Read, Write};
pub(crate) use self::endpoint::{Endpoint, Gate, Judgement, Proof};
use super::link::{Broken, Pipe, Traffic};
use super::outgoing::Outgoing;

/// What a device may send on its stream before we have read it, in bytes: a `hello` with everything in it fits, and
/// a frame of the largest size comes through in a few turns.
const RECEIVE_WINDOW_BYTES: u32 = 8 * 1024;

/// What we keep of a stream until the device acknowledges it, in bytes. At 100 ms it allows a megabyte a second.
const SEND_WINDOW_BYTES: u64 = 128 * 1024;

/// Out-of-order handshake data of one connection, in bytes: a client certificate chain fits.
const CRYPTO_BUFFER_BYTES: usize = 8 * 1024;

/// What is read of a stream at a time, in bytes.
const READ_BYTES: usize = 2 * 1024;

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
        .crypto_buffer_size(CRYPTO_BUFFER_BYTES);
    let mut config = ServerConfig::with_crypto(tls);
    config
        .transport_config(Arc::new(transport))
        // Those who wait for a place (endpoint.rs) hold their first flight and no more. One more than may wait, so that it is
        // we who drop, and count it.
        .max_incoming(endpoint::WAITING_MAX + 1)
        .incoming_buffer_size(endpoint::WAITING_BYTES)
        .incoming_buffer_size_total(endpoint::WAITING_BYTES_TOTAL)
        // Devices change networks; the connection follows.
        .migration(true);
    config
}

/// Takes a QUIC connection to the first stream of its device, before the deadline and before the server goes down.
///
/// # Errors
/// The word for metrics, when it came to nothing.
pub(crate) async fn accept(
    mut connection: Connection,
    deadline: Pin<&mut Sleep>,
    closing: impl Future<Output = ()>,
    frame_max: usize,
) -> Result<QuicPipe, &'static str> {
    let until = connection.keeps_place_until().unwrap_or_else(time::now);
    let mut place_time = pin!(sleep_until(until.into()));
    let stands = poll_fn(|cx| {
        connection.turn(cx);
        if connection.keeps_place_until().is_some() && place_time.as_mut().poll(cx).is_ready() {
            connection.give_place_back();
        }
        if let Some(error) = connection.lost() {
            return Poll::Ready(Err(match connection.is_connected() {
                true => loss(error),
                false => handshake_refusal(error),
            }));
        }
        // With data that came early a stream can be there before the handshake is through.
        match connection.is_connected() && connection.stream().is_some() {
            true => Poll::Ready(Ok(())),
            false => Poll::Pending,
        }
    });
    let mut code = Code::HelloTimeout;
    let outcome = tokio::select! {
        outcome = stands => outcome,
        () = deadline => Err(code.name()),
        () = closing => {
            code = Code::Drain;
            Err(code.name())
        }
    };
    match outcome {
        Ok(()) => Ok(QuicPipe {
            connection: Some(connection),
            reader: FrameReader::new(frame_max),
            outgoing: Outgoing::default(),
            traffic: Traffic::default(),
            end: None,
        }),
        Err(reason) => {
            connection.leave(close_number(code), code.meaning().as_bytes());
            Err(reason)
        }
    }
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

struct End {
    code: Code,
    message: String,
    /// The stream was ended: all was written.
    is_written: bool,
}

/// A QUIC connection with its stream.
pub(crate) struct QuicPipe {
    /// Always there until this is dropped.
    connection: Option<Connection>,
    reader: FrameReader,
    outgoing: Outgoing,
    traffic: Traffic,
    end: Option<Box<End>>,
}

impl Pipe for QuicPipe {
    const CARRIER: Carrier = Carrier::Quic;

    fn codec(&self) -> Codec {
        Codec::Cbor
    }

    fn begin_turn(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection {
            connection.begin(cx);
        }
    }

    fn end_turn(&mut self, cx: &mut Context<'_>) {
        if let Some(connection) = &mut self.connection {
            connection.finish(cx);
        }
    }

    fn poll_receive(&mut self, _cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let fault = |error: bellwire_protocol::DecodeError| {
            Err(Broken::Fault(error.code(), error.to_string()))
        };
        match self.reader.pull() {
            Ok(Some(frame)) => return Poll::Ready(Ok(Some(frame))),
            Ok(None) => {}
            Err(error) => return Poll::Ready(fault(error)),
        }
        let Some(connection) = &mut self.connection else {
            return Poll::Ready(Err(Broken::Left));
        };
        let reader = &mut self.reader;
        let received = match connection.read(READ_BYTES, |bytes| reader.push(bytes)) {
            Read::Bytes(received) => received,
            Read::Blocked => {
                return match connection.lost() {
                    Some(error) => Poll::Ready(Err(Broken::Gone(loss(error)))),
                    // The endpoint wakes when something comes.
                    None => Poll::Pending,
                };
            }
            Read::Ended => {
                return Poll::Ready(Err(if self.reader.is_at_boundary() {
                    Broken::Left
                } else {
                    Broken::Fault(Code::Malformed, "the stream ends inside a frame".to_owned())
                }));
            }
            Read::Reset => return Poll::Ready(Err(Broken::Left)),
        };
        self.traffic.received += received as u64;
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

    fn poll_send(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let Some(connection) = &mut self.connection else {
            return Poll::Ready(Err(Broken::Left));
        };
        while !self.outgoing.is_empty() {
            if let Some(error) = connection.lost() {
                return Poll::Ready(Err(Broken::Gone(loss(error))));
            }
            match connection.write(self.outgoing.rest()) {
                Write::Bytes(written) => {
                    self.traffic.sent += written as u64;
                    self.outgoing.advance(written);
                }
                // What the device acknowledges makes room, and wakes.
                Write::Blocked => return Poll::Pending,
                Write::Stopped => return Poll::Ready(Err(Broken::Left)),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn traffic(&self) -> Traffic {
        self.traffic
    }

    fn heard_of_peer(&self) -> Option<u64> {
        self.connection.as_ref().map(Connection::heard)
    }

    fn end(&mut self, code: Code, message: &str) {
        self.end = Some(Box::new(End {
            code,
            message: message.to_owned(),
            is_written: false,
        }));
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if ready!(self.poll_send(cx)).is_err() {
            return Poll::Ready(());
        }
        let (Some(connection), Some(end)) = (&mut self.connection, &mut self.end) else {
            return Poll::Ready(());
        };
        if !end.is_written {
            connection.end_stream();
            end.is_written = true;
        }
        match connection.is_said() {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }
}

impl Drop for QuicPipe {
    fn drop(&mut self) {
        let (code, message) = match &self.end {
            Some(end) => (end.code, end.message.as_str()),
            None => (Code::Bye, ""),
        };
        if let Some(connection) = self.connection.take() {
            connection.leave(close_number(code), message.as_bytes());
        }
    }
}
