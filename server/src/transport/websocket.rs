//! Frames as WebSocket messages over TLS over TCP, one message a frame (docs/protocol.md); or over plain TCP, from a
//! load balancer that ended TLS and says in a header of the PROXY protocol who connects.
//!
//! The way in (TLS, the HTTP head, the upgrade) runs in a task of its own, because a task keeps the size of the largest
//! future that ever ran in it; the link then starts in a fresh one.
//!
//! Data frames of a server are a header and the payload, and are put together here; what a client sends is read by
//! `messages.rs`. While nothing is on its way in or out, neither holds a buffer.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec};
use bytes::Bytes;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::http_head::{self, HEAD_MAX_BYTES, Head, Refused};
use super::link::{Broken, Pipe, Traffic};
use super::messages::{CONTROL_MAX_BYTES, Message, MessageReader, Wrong};
use super::outgoing::Outgoing;
use super::proxy;
use super::wire::{Came, Trouble, Wire};

/// Longest reason of a close frame: a control frame less the code (RFC 6455 section 5.5).
const CLOSE_REASON_MAX_BYTES: usize = CONTROL_MAX_BYTES - 2;

/// Bytes read and dropped while closing, so that a peer that still talks gets our last words and not a reset.
const DISCARD_MAX_BYTES: u64 = 64 * 1024;

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
    upgrade(Wire::tls(tcp, tls).map_err(|_| "tls")?, frame_max).await
}

/// Takes a TCP connection from which a load balancer took TLS through the upgrade.
///
/// # Errors
/// When it is no device link. Whoever can be told has been told.
pub(crate) async fn accept_plain(
    tcp: TcpStream,
    frame_max: usize,
) -> Result<WebSocketPipe, Refusal> {
    upgrade(Wire::plain(tcp), frame_max).await
}

async fn upgrade(mut wire: Wire, frame_max: usize) -> Result<WebSocketPipe, Refusal> {
    let mut head = Vec::new();
    loop {
        match wire.receive(&mut head).await {
            Ok(Came::Bytes) => {}
            Ok(Came::End) => return Err("closed"),
            Err(Trouble::NotTls(first)) => {
                // Worth an answer only if it is somebody who reads HTTP.
                if first.is_ascii_uppercase() {
                    refuse(wire.without_tls(), Refused::TlsRequired).await;
                }
                return Err(Refused::TlsRequired.code().name());
            }
            Err(trouble) => return Err(refusal(&trouble)),
        }
        match http_head::parse(&head[..head.len().min(HEAD_MAX_BYTES)]) {
            Head::Partial => {}
            Head::Refused(refused) => {
                refuse(wire, refused).await;
                return Err(refused.code().name());
            }
            Head::Upgrade(upgrade, length) => {
                wire.send(upgrade.answer().as_bytes())
                    .await
                    .map_err(|_| "closed")?;
                let codec = upgrade.negotiated.codec;
                let mut reader = MessageReader::new(frame_max);
                reader.push(head.get(length..).unwrap_or_default());
                return Ok(WebSocketPipe {
                    wire,
                    outgoing: Outgoing::default(),
                    reader,
                    codec,
                    pong: None,
                    closed_by_peer: None,
                    shut: false,
                });
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

fn refusal(trouble: &Trouble) -> Refusal {
    match trouble {
        Trouble::Tls(rustls::Error::NoApplicationProtocol) => "alpn",
        Trouble::Tls(_) | Trouble::NotTls(_) => "tls",
        Trouble::Io(_) => "closed",
    }
}

/// Answers a request that gets no link, and waits a little for the peer to take the answer.
async fn refuse(mut wire: Wire, refused: Refused) {
    let told = async {
        wire.send(refused.answer().as_bytes()).await?;
        wire.finish(DISCARD_MAX_BYTES).await
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

// ---- The pipe ------------------------------------------------------------------------------------------------------

/// A WebSocket that stands.
pub(crate) struct WebSocketPipe {
    wire: Wire,
    outgoing: Outgoing,
    reader: MessageReader,
    codec: Codec,
    /// What the newest ping wants to hear; those before it are answered by the same (RFC 6455 section 5.5.3).
    pong: Option<Bytes>,
    /// The peer sent its close frame, with this code.
    closed_by_peer: Option<Option<u16>>,
    /// After our close frame: the wire was shut for writing.
    shut: bool,
}

impl WebSocketPipe {
    fn take(&mut self, message: Message) -> Result<Option<Bytes>, Broken> {
        let wrong = |message: &str| Err(Broken::Fault(Code::Malformed, message.to_owned()));
        match (message, self.codec) {
            (Message::Binary(frame), Codec::Cbor) | (Message::Text(frame), Codec::Json) => {
                Ok(Some(frame))
            }
            (Message::Binary(_), Codec::Json) => {
                wrong("a binary message; this session speaks JSON in text messages")
            }
            (Message::Text(_), Codec::Cbor) => {
                wrong("a text message; this session speaks CBOR in binary messages")
            }
            (Message::Close(code), _) => {
                self.closed_by_peer = Some(code);
                Err(Broken::Left)
            }
            (Message::Ping(payload), _) => {
                // Copied, so that it does not keep what it came with.
                self.pong = Some(Bytes::copy_from_slice(&payload));
                Ok(None)
            }
            (Message::Pong, _) => Ok(None),
        }
    }
}

impl Pipe for WebSocketPipe {
    const CARRIER: Carrier = Carrier::WebSocket;

    fn codec(&self) -> Codec {
        self.codec
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        loop {
            match self.reader.pull() {
                Ok(Some(message)) => return Poll::Ready(self.take(message)),
                Ok(None) => {}
                Err(wrong) => return Poll::Ready(Err(fault(&wrong))),
            }
            let Self { wire, reader, .. } = self;
            match ready!(wire.poll_receive(cx, |bytes| reader.push(bytes))) {
                Ok(Came::Bytes) => {}
                // Without a close frame before it.
                Ok(Came::End) => return Poll::Ready(Err(Broken::Gone("lost"))),
                Err(trouble) => return Poll::Ready(Err(broken(&trouble))),
            }
        }
    }

    fn queue(&mut self, head: &[u8], tail: &[u8]) {
        let opcode = match self.codec {
            Codec::Cbor => 0x2,
            Codec::Json => 0x1,
        };
        let length = head.len() + tail.len();
        self.outgoing.reserve(length + 10);
        push_header(&mut self.outgoing, opcode, length);
        self.outgoing.push(head);
        self.outgoing.push(tail);
    }

    fn queued(&self) -> usize {
        self.outgoing.len() + self.wire.unsent()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            // Behind what waits, so that there is at most one answer.
            if self.outgoing.is_empty()
                && let Some(payload) = self.pong.take()
            {
                push_header(&mut self.outgoing, 0xa, payload.len());
                self.outgoing.push(&payload);
            }
            if let Err(trouble) = ready!(self.wire.poll_send(cx, &mut self.outgoing)) {
                return Poll::Ready(Err(broken(&trouble)));
            }
            if self.pong.is_none() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    fn traffic(&self) -> Traffic {
        self.wire.traffic()
    }

    fn heard_of_peer(&self) -> Option<u64> {
        // The system notices, see `prepare`.
        None
    }

    fn end(&mut self, code: Code, message: &str) {
        self.pong = None;
        let (number, reason) = match self.closed_by_peer {
            // It is answered as it was said (RFC 6455 section 5.5.1).
            Some(answer) => (answer, ""),
            // Codes without a number are not sent on links; 1011 is what a server says of itself (RFC 6455 section 7.4.1).
            None => (
                Some(code.websocket_close().unwrap_or(1011)),
                &message[..message.floor_char_boundary(CLOSE_REASON_MAX_BYTES)],
            ),
        };
        let number = number.map(u16::to_be_bytes);
        let number = number.as_ref().map_or(&[][..], |number| number);
        push_header(&mut self.outgoing, 0x8, number.len() + reason.len());
        self.outgoing.push(number);
        self.outgoing.push(reason.as_bytes());
    }

    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.shut {
            if ready!(self.poll_send(cx)).is_err() || ready!(self.wire.poll_close(cx)).is_err() {
                return Poll::Ready(());
            }
            self.shut = true;
        }
        // The peer answers our close frame and goes; to go first could cost it our last words.
        self.wire.poll_discard(cx, DISCARD_MAX_BYTES)
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

fn fault(wrong: &Wrong) -> Broken {
    match wrong {
        Wrong::TooLarge(size, max) => Broken::Fault(
            Code::FrameTooLarge,
            format!("a frame of {size} bytes; at most {max} are accepted"),
        ),
        Wrong::Rules(rule) => Broken::Fault(Code::Malformed, (*rule).to_owned()),
    }
}

fn broken(trouble: &Trouble) -> Broken {
    Broken::Gone(match trouble {
        // `prepare` had the system notice.
        Trouble::Io(error) if error.kind() == io::ErrorKind::TimedOut => Code::SlowReader.name(),
        Trouble::Io(_) => "lost",
        Trouble::Tls(_) | Trouble::NotTls(_) => "tls",
    })
}
