//! Frames as WebSocket messages over TLS over TCP, one message a frame (docs/protocol.md); or over plain TCP, from a
//! load balancer that ended TLS and says in a header of the PROXY protocol who connects.
//!
//! The way in (TLS, the HTTP head, the upgrade) runs in a task of its own, because a task keeps the size of the largest
//! future that ever ran in it; the link then starts in a fresh one on boxed parts.
//!
//! tungstenite reads: it unmasks, joins fragments, answers pings. What it writes goes through the same buffer as our
//! own frames, so that both stay whole: data frames of a server are a header and the payload, and are put together
//! here, without a copy that stays allocated while the link is idle.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec};
use bytes::Bytes;
use futures_util::task::noop_waker_ref;
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use super::http_head::{self, HEAD_MAX_BYTES, Head, Refused};
use super::link::{Broken, Pipe, Traffic};
use super::outgoing::Outgoing;
use super::proxy;

/// First byte of a TLS record that starts a handshake (RFC 8446 section 5.1).
const TLS_HANDSHAKE: u8 = 0x16;

/// What tungstenite reads at a time, in bytes; acknowledgements fit. It stays allocated while the link is idle.
const READ_BUFFER_BYTES: usize = 128;

/// A received frame from this size on is kept until the next read, in bytes, so that tungstenite starts a small buffer
/// rather than keep the large one for good.
const HELD_FROM_BYTES: usize = 1024;

/// Answers to WebSocket pings that tungstenite keeps while writing is blocked, in bytes: a handful. Further pings
/// replace the answer that waits (RFC 6455 section 5.5.3 allows it).
const PONGS_MAX_BYTES: usize = 1024;

/// From so many waiting bytes on, tungstenite's answers wait as well.
const OUTGOING_HIGH_BYTES: usize = 64 * 1024;

/// Longest reason of a close frame: 125 bytes of a control frame less the code (RFC 6455 section 5.5).
const CLOSE_REASON_MAX_BYTES: usize = 123;

/// Bytes read and dropped while closing, so that a peer that still talks gets our last words and not a reset.
const DISCARD_MAX_BYTES: usize = 64 * 1024;

/// How long a refused request may take to read its answer.
const ANSWER_LINGER: Duration = Duration::from_secs(2);

/// Why a TCP connection did not become a link; the word for metrics.
pub(crate) type Refusal = &'static str;

// ---- The way in ----------------------------------------------------------------------------------------------------

/// Takes a TCP connection through TLS and the upgrade.
///
/// # Errors
/// When it is no device link. Whoever can be told has been told.
pub(crate) async fn accept(
    tcp: TcpStream,
    tls: Arc<rustls::ServerConfig>,
    frame_max: usize,
) -> Result<WebSocketPipe, Refusal> {
    let mut first = [0];
    if tcp.peek(&mut first).await.map_err(|_| "closed")? == 0 {
        return Err("closed");
    }
    if first[0] != TLS_HANDSHAKE {
        // Worth an answer only if it is somebody who reads HTTP.
        if first[0].is_ascii_uppercase() {
            refuse(tcp, Refused::TlsRequired).await;
        }
        return Err(Refused::TlsRequired.code().name());
    }
    let counted = Counted {
        tcp,
        traffic: Traffic::default(),
    };
    let accept = TlsAcceptor::from(tls).accept(counted);
    let tls = Box::new(accept.await.map_err(|error| tls_refusal(&error))?);
    upgrade(Wire::Tls(tls), frame_max).await
}

/// Takes a TCP connection from which a load balancer took TLS through the upgrade.
///
/// # Errors
/// When it is no device link. Whoever can be told has been told.
pub(crate) async fn accept_plain(
    tcp: TcpStream,
    frame_max: usize,
) -> Result<WebSocketPipe, Refusal> {
    let counted = Counted {
        tcp,
        traffic: Traffic::default(),
    };
    upgrade(Wire::Plain(Box::new(counted)), frame_max).await
}

async fn upgrade(mut wire: Wire, frame_max: usize) -> Result<WebSocketPipe, Refusal> {
    let mut head = Vec::with_capacity(1024);
    loop {
        if wire.read_buf(&mut head).await.map_err(|_| "closed")? == 0 {
            return Err("closed");
        }
        match http_head::parse(&head[..head.len().min(HEAD_MAX_BYTES)]) {
            Head::Partial => {}
            Head::Refused(refused) => {
                refuse(wire, refused).await;
                return Err(refused.code().name());
            }
            Head::Upgrade(upgrade, length) => {
                let answer = upgrade.answer();
                wire.write_all(answer.as_bytes())
                    .await
                    .map_err(|_| "closed")?;
                wire.flush().await.map_err(|_| "closed")?;
                let early = head.split_off(length);
                let codec = upgrade.negotiated.codec;
                return Ok(WebSocketPipe::new(wire, early, codec, frame_max).await);
            }
        }
    }
}

/// What a load balancer says in front of a connection (see [`proxy`]).
///
/// # Errors
/// When it says it wrongly or not at all.
pub(crate) async fn read_proxy_header(
    tcp: &mut TcpStream,
) -> Result<Option<SocketAddr>, ProxyTrouble> {
    let mut bytes = Vec::with_capacity(128);
    let mut needed = proxy::FIXED_BYTES;
    loop {
        let room = needed - bytes.len();
        // Never further than the header reaches, so that no word of the device is lost.
        let read = tcp.take(room as u64).read_buf(&mut bytes).await;
        if read.map_err(|_| ProxyTrouble::Closed)? == 0 {
            return Err(ProxyTrouble::Closed);
        }
        match proxy::parse(&bytes) {
            proxy::Header::Partial(more) => needed = more,
            proxy::Header::Whole { from, .. } => return Ok(from),
            proxy::Header::Refused(unfit) => return Err(ProxyTrouble::Unfit(unfit)),
        }
    }
}

/// Why nothing is known of who connects through a load balancer.
pub(crate) enum ProxyTrouble {
    /// The connection ended, as those of plain health checks do.
    Closed,
    /// What was said is not what is spoken here.
    Unfit(proxy::Unfit),
}

fn tls_refusal(error: &io::Error) -> Refusal {
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::NoApplicationProtocol) => "alpn",
        Some(_) => "tls",
        None => "closed",
    }
}

/// Answers a request that gets no link, and waits a little for the peer to take the answer.
async fn refuse(mut io: impl AsyncRead + AsyncWrite + Unpin, refused: Refused) {
    let answer = refused.answer();
    let told = async {
        io.write_all(answer.as_bytes()).await?;
        io.flush().await?;
        io.shutdown().await?;
        let mut discarded = 0;
        let mut scratch = [0; 1024];
        while discarded < DISCARD_MAX_BYTES {
            match io.read(&mut scratch).await? {
                0 => break,
                count => discarded += count,
            }
        }
        io::Result::Ok(())
    };
    // Whether it worked is the peer's business.
    let _ = timeout(ANSWER_LINGER, told).await;
}

/// Sets the options of an accepted socket.
pub(crate) fn prepare(tcp: &TcpStream, write_deadline: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    // The system cuts a connection whose peer acknowledges nothing for so long, also when the peer just vanished:
    // otherwise it goes on for a quarter of an hour. Not every system has it; then only silence is noticed.
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(tcp).set_tcp_user_timeout(Some(write_deadline))?;
    #[cfg(not(target_os = "linux"))]
    let _ = write_deadline;
    Ok(())
}

/// Closes a socket without a word and without leaving it in TIME_WAIT, for floods.
pub(crate) fn reset(tcp: &TcpStream) {
    let _ = socket2::SockRef::from(tcp).set_linger(Some(Duration::ZERO));
}

// ---- Layers --------------------------------------------------------------------------------------------------------

/// A TCP stream that counts, below TLS: what the system took is progress.
struct Counted {
    tcp: TcpStream,
    traffic: Traffic,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.tcp).poll_read(cx, buffer))?;
        self.traffic.received += (buffer.filled().len() - before) as u64;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write(cx, bytes))?;
        self.traffic.sent += written as u64;
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.tcp).poll_write_vectored(cx, slices))?;
        self.traffic.sent += written as u64;
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

/// What a link is carried on below WebSocket.
enum Wire {
    /// TLS, ended here.
    Tls(Box<TlsStream<Counted>>),
    /// Plain TCP, from a load balancer that ended TLS.
    Plain(Box<Counted>),
}

impl Wire {
    fn traffic(&self) -> Traffic {
        match self {
            Wire::Tls(tls) => tls.get_ref().0.traffic,
            Wire::Plain(counted) => counted.traffic,
        }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Wire::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
            Wire::Plain(counted) => Pin::new(counted).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Wire::Tls(tls) => Pin::new(tls).poll_write(cx, bytes),
            Wire::Plain(counted) => Pin::new(counted).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Wire::Tls(tls) => Pin::new(tls).poll_flush(cx),
            Wire::Plain(counted) => Pin::new(counted).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Wire::Tls(tls) => Pin::new(tls).poll_shutdown(cx),
            Wire::Plain(counted) => Pin::new(counted).poll_shutdown(cx),
        }
    }
}

/// What tungstenite takes for its stream: reads come from the wire, writes go to the buffer of outgoing bytes.
struct Tunnel {
    wire: Wire,
    outgoing: Outgoing,
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.wire).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.outgoing.len() >= OUTGOING_HIGH_BYTES {
            // tungstenite tries again with every read, and a read follows every write that makes room.
            return Poll::Pending;
        }
        self.outgoing.push(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

// ---- The pipe ------------------------------------------------------------------------------------------------------

/// A WebSocket that stands.
pub(crate) struct WebSocketPipe {
    socket: WebSocketStream<Tunnel>,
    codec: Codec,
    /// Something was given to the wire that may not have reached the system.
    unflushed: bool,
    /// The peer sent its close frame; tungstenite answers it.
    closed_by_peer: bool,
    /// After our close frame: the wire was shut for writing.
    shut: bool,
    discarded: usize,
    held: Option<Bytes>,
}

impl WebSocketPipe {
    async fn new(wire: Wire, early: Vec<u8>, codec: Codec, frame_max: usize) -> WebSocketPipe {
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0)
            .max_write_buffer_size(PONGS_MAX_BYTES)
            .max_message_size(Some(frame_max))
            .max_frame_size(Some(frame_max));
        let tunnel = Tunnel {
            wire,
            outgoing: Outgoing::default(),
        };
        let socket =
            WebSocketStream::from_partially_read(tunnel, early, Role::Server, Some(config)).await;
        WebSocketPipe {
            socket,
            codec,
            unflushed: false,
            closed_by_peer: false,
            shut: false,
            discarded: 0,
            held: None,
        }
    }

    fn take(&mut self, message: Message) -> Result<Option<Bytes>, Broken> {
        let frame = match (message, self.codec) {
            (Message::Binary(frame), Codec::Cbor) => frame,
            (Message::Text(frame), Codec::Json) => frame.into(),
            (Message::Binary(_), Codec::Json) => {
                let message = "a binary message; this session speaks JSON in text messages";
                return Err(Broken::Fault(Code::Malformed, message.to_owned()));
            }
            (Message::Text(_), Codec::Cbor) => {
                let message = "a text message; this session speaks CBOR in binary messages";
                return Err(Broken::Fault(Code::Malformed, message.to_owned()));
            }
            (Message::Close(_), _) => {
                self.closed_by_peer = true;
                return Err(Broken::Left);
            }
            (Message::Ping(_) | Message::Pong(_) | Message::Frame(_), _) => return Ok(None),
        };
        if frame.len() >= HELD_FROM_BYTES {
            self.held = Some(frame.clone());
        }
        Ok(Some(frame))
    }

    fn discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut scratch = [0; 1024];
        while self.discarded < DISCARD_MAX_BYTES {
            let mut buffer = ReadBuf::new(&mut scratch);
            let wire = &mut self.socket.get_mut().wire;
            match ready!(Pin::new(wire).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => self.discarded += buffer.filled().len(),
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(())
    }
}

impl Pipe for WebSocketPipe {
    const CARRIER: Carrier = Carrier::WebSocket;

    fn codec(&self) -> Codec {
        self.codec
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        let held = self.held.take();
        let received = ready!(Pin::new(&mut self.socket).poll_next(cx));
        drop(held);
        Poll::Ready(match received {
            Some(Ok(message)) => self.take(message),
            Some(Err(error)) => Err(broken(error)),
            None => Err(Broken::Left),
        })
    }

    fn queue(&mut self, head: &[u8], tail: &[u8]) {
        let opcode = match self.codec {
            Codec::Cbor => 0x2,
            Codec::Json => 0x1,
        };
        let outgoing = &mut self.socket.get_mut().outgoing;
        let length = head.len() + tail.len();
        outgoing.reserve(length + 10);
        push_header(outgoing, opcode, length);
        outgoing.push(head);
        outgoing.push(tail);
    }

    fn queued(&self) -> usize {
        self.socket.get_ref().outgoing.len()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        let Tunnel { wire, outgoing } = self.socket.get_mut();
        while !outgoing.is_empty() {
            match ready!(Pin::new(&mut *wire).poll_write(cx, outgoing.rest())) {
                Ok(0) => return Poll::Ready(Err(Broken::Gone("lost"))),
                Ok(written) => {
                    outgoing.advance(written);
                    self.unflushed = true;
                }
                Err(error) => return Poll::Ready(Err(broken(error.into()))),
            }
        }
        if self.unflushed {
            match ready!(Pin::new(wire).poll_flush(cx)) {
                Ok(()) => self.unflushed = false,
                Err(error) => return Poll::Ready(Err(broken(error.into()))),
            }
        }
        Poll::Ready(Ok(()))
    }

    fn traffic(&self) -> Traffic {
        self.socket.get_ref().wire.traffic()
    }

    fn heard_of_peer(&self) -> Option<u64> {
        // The system notices, see `prepare`.
        None
    }

    fn end(&mut self, code: Code, message: &str) {
        if self.closed_by_peer {
            // tungstenite has its answer ready, and only needs to be asked for it.
            let mut cx = Context::from_waker(noop_waker_ref());
            let _ = Pin::new(&mut self.socket).poll_flush(&mut cx);
            return;
        }
        let reason = &message[..message.floor_char_boundary(CLOSE_REASON_MAX_BYTES)];
        // Codes without a number are not sent on links; 1011 is what a server says of itself (RFC 6455 section 7.4.1).
        let number = code.websocket_close().unwrap_or(1011);
        let outgoing = &mut self.socket.get_mut().outgoing;
        push_header(outgoing, 0x8, 2 + reason.len());
        outgoing.push(&number.to_be_bytes());
        outgoing.push(reason.as_bytes());
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.shut {
            if ready!(self.poll_send(cx)).is_err() {
                return Poll::Ready(());
            }
            let wire = &mut self.socket.get_mut().wire;
            if ready!(Pin::new(wire).poll_shutdown(cx)).is_err() {
                return Poll::Ready(());
            }
            self.shut = true;
        }
        // The peer answers our close frame and goes; to go first could cost it our last words.
        self.discard(cx)
    }
}

/// The header of a whole, unmasked frame (RFC 6455 section 5.2).
fn push_header(outgoing: &mut Outgoing, opcode: u8, length: usize) {
    outgoing.push(&[0x80 | opcode]);
    match length {
        0..=125 => outgoing.push(&[length as u8]),
        126..=0xffff => {
            outgoing.push(&[126]);
            outgoing.push(&(length as u16).to_be_bytes());
        }
        _ => {
            outgoing.push(&[127]);
            outgoing.push(&(length as u64).to_be_bytes());
        }
    }
}

fn broken(error: WsError) -> Broken {
    match error {
        WsError::Io(error) if error.kind() == io::ErrorKind::TimedOut => {
            // `prepare` had the system notice.
            Broken::Gone(Code::SlowReader.name())
        }
        WsError::Io(error) if error.kind() == io::ErrorKind::InvalidData => Broken::Gone("tls"),
        WsError::Io(_) => Broken::Gone("lost"),
        WsError::Capacity(CapacityError::MessageTooLong { size, max_size }) => Broken::Fault(
            Code::FrameTooLarge,
            format!("a frame of {size} bytes; at most {max_size} are accepted"),
        ),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => Broken::Gone("lost"),
        WsError::Protocol(error) => Broken::Fault(Code::Malformed, error.to_string()),
        WsError::Utf8(_) => Broken::Fault(
            Code::Malformed,
            "a text message that is not UTF-8".to_owned(),
        ),
        WsError::ConnectionClosed | WsError::AlreadyClosed => Broken::Left,
        WsError::Capacity(_)
        | WsError::Tls(_)
        | WsError::WriteBufferFull(_)
        | WsError::AttackAttempt
        | WsError::Url(_)
        | WsError::Http(_)
        | WsError::HttpFormat(_) => Broken::Gone("lost"),
    }
}
