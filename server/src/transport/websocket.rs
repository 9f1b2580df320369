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
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
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

/// Fragments, and reads that bring no whole message, before other links have their turn.
const STEPS_PER_TURN: usize = 64;

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

async fn upgrade<S: AsyncRead + AsyncWrite + Unpin>(
    mut wire: Wire<S>,
    frame_max: usize,
) -> Result<WebSocketPipe<S>, Refusal> {
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
                return Ok(WebSocketPipe::new(wire, reader, codec));
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

/// Answers a peer that began without TLS, if it is somebody who reads HTTP. There is nothing to compute, so nobody needs a
/// place for it. Why there is no link.
pub(crate) async fn turn_away(tcp: TcpStream, first: u8) -> Refusal {
    if first.is_ascii_uppercase() {
        refuse(Wire::plain(tcp), Refused::TlsRequired).await;
    }
    Refused::TlsRequired.code().name()
}

/// Answers a request that gets no link, and waits a little for the peer to take the answer.
async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(mut wire: Wire<S>, refused: Refused) {
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
pub(crate) struct WebSocketPipe<S = TcpStream> {
    wire: Wire<S>,
    outgoing: Outgoing,
    reader: MessageReader,
    codec: Codec,
    /// Bytes of `outgoing` up to the end of the last answer to a ping in it; 0: there is none.
    pong_end: usize,
    /// What the newest ping since then wants to hear; those before it are answered by the same (RFC 6455 section 5.5.3).
    pong: Option<Bytes>,
    /// The peer sent its close frame, with this code.
    closed_by_peer: Option<Option<u16>>,
    /// After our close frame: the wire was shut for writing.
    shut: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> WebSocketPipe<S> {
    fn new(wire: Wire<S>, reader: MessageReader, codec: Codec) -> WebSocketPipe<S> {
        WebSocketPipe {
            wire,
            outgoing: Outgoing::default(),
            reader,
            codec,
            pong_end: 0,
            pong: None,
            closed_by_peer: None,
            shut: false,
        }
    }

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
                if self.pong_end == 0 {
                    self.answer(&payload);
                } else {
                    // Copied, so that it does not keep what it came with.
                    self.pong = Some(Bytes::copy_from_slice(&payload));
                }
                Ok(None)
            }
            (Message::Pong | Message::Part, _) => Ok(None),
        }
    }

    /// Answers a ping behind the frames that wait now, and before those that come.
    fn answer(&mut self, payload: &[u8]) {
        push_header(&mut self.outgoing, 0xa, payload.len());
        self.outgoing.push(payload);
        self.pong_end = self.outgoing.len();
    }

    /// Writes what waits; ready when the system has all of it.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Trouble>> {
        loop {
            let before = self.outgoing.len();
            let sent = self.wire.poll_send(cx, &mut self.outgoing);
            self.pong_end = self.pong_end.saturating_sub(before - self.outgoing.len());
            // One answer waits at a time.
            if self.pong_end == 0
                && let Some(payload) = self.pong.take()
            {
                self.answer(&payload);
                if sent.is_ready() {
                    continue;
                }
            }
            return sent;
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Pipe for WebSocketPipe<S> {
    const CARRIER: Carrier = Carrier::WebSocket;

    fn codec(&self) -> Codec {
        self.codec
    }

    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
        for _ in 0..STEPS_PER_TURN {
            match self.reader.pull() {
                // No sign of life: one message may come in as many of them as its sender likes.
                Ok(Some(Message::Part)) => continue,
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
        cx.waker().wake_by_ref();
        Poll::Pending
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
        if self.wire.has_untold_failure() {
            // What came in front of it is taken first. Whoever stopped reading goes on soon, and is told then.
            return Poll::Pending;
        }
        self.poll_write(cx).map_err(|trouble| broken(&trouble))
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
            let Self { wire, outgoing, .. } = self;
            if ready!(wire.poll_close(cx, outgoing)).is_err() {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::testing::frame;
    use crate::transport::wire::tests::{Scripted, Then};
    use proptest::prelude::*;
    use std::collections::VecDeque;
    use std::io::{Read, Write};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};
    use tokio_tungstenite::tungstenite::Message as Said;
    use tokio_tungstenite::tungstenite::protocol::{Role, WebSocket, WebSocketConfig};

    const FRAME_MAX: usize = 16 * 1024;

    fn pipe(codec: Codec, incoming: Vec<u8>) -> WebSocketPipe<Scripted> {
        let wire = Wire::plain(Scripted {
            incoming,
            ..Scripted::default()
        });
        WebSocketPipe::new(wire, MessageReader::new(FRAME_MAX), codec)
    }

    /// A blocking stream of pieces, for the other implementation; at its end it would block.
    struct Pieces(VecDeque<Vec<u8>>);

    impl Pieces {
        fn of(bytes: &[u8], piece: usize) -> Pieces {
            Pieces(bytes.chunks(piece.max(1)).map(<[u8]>::to_vec).collect())
        }
    }

    impl Read for Pieces {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(piece) = self.0.front_mut() else {
                return Err(io::ErrorKind::WouldBlock.into());
            };
            let count = piece.len().min(buffer.len());
            buffer[..count].copy_from_slice(&piece[..count]);
            piece.drain(..count);
            if piece.is_empty() {
                self.0.pop_front();
            }
            Ok(count)
        }
    }

    impl Write for Pieces {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What the other implementation makes of these bytes, up to a close or an error.
    fn theirs(role: Role, bytes: &[u8], piece: usize) -> Result<Vec<Message>, ()> {
        let config = WebSocketConfig::default()
            .max_message_size(Some(FRAME_MAX))
            .max_frame_size(Some(FRAME_MAX));
        let mut socket = WebSocket::from_raw_socket(Pieces::of(bytes, piece), role, Some(config));
        let mut messages = Vec::new();
        loop {
            let message = match socket.read() {
                Ok(Said::Text(text)) => Message::Text(Bytes::copy_from_slice(text.as_bytes())),
                Ok(Said::Binary(bytes)) => Message::Binary(bytes),
                Ok(Said::Ping(bytes)) => Message::Ping(bytes),
                Ok(Said::Pong(_)) => Message::Pong,
                Ok(Said::Close(close)) => {
                    messages.push(Message::Close(close.map(|close| close.code.into())));
                    return Ok(messages);
                }
                Ok(Said::Frame(_)) => unreachable!("only whole messages are read"),
                Err(tokio_tungstenite::tungstenite::Error::Io(error))
                    if error.kind() == io::ErrorKind::WouldBlock =>
                {
                    return Ok(messages);
                }
                Err(_) => return Err(()),
            };
            messages.push(message);
        }
    }

    /// What ours makes of them, and whether it waits for more fragments.
    fn ours(bytes: &[u8], piece: usize) -> Result<(Vec<Message>, bool), ()> {
        let mut reader = MessageReader::new(FRAME_MAX);
        let (mut messages, mut is_inside) = (Vec::new(), false);
        for piece in bytes.chunks(piece.max(1)) {
            reader.push(piece);
            while let Some(message) = reader.pull().map_err(|_| ())? {
                match message {
                    Message::Part => {
                        is_inside = true;
                        continue;
                    }
                    Message::Text(_) | Message::Binary(_) => is_inside = false,
                    Message::Ping(_) | Message::Pong | Message::Close(_) => {}
                }
                let is_close = matches!(message, Message::Close(_));
                messages.push(message);
                if is_close {
                    return Ok((messages, false));
                }
            }
        }
        Ok((messages, is_inside))
    }

    /// What one says: mostly in order, sometimes not.
    fn a_saying() -> impl Strategy<Value = Vec<u8>> {
        let payload = || {
            prop_oneof![
                4 => "\\PC{0,60}".prop_map(String::into_bytes),
                1 => proptest::collection::vec(any::<u8>(), 0..300),
                1 => (0_usize..FRAME_MAX + 3).prop_map(|length| vec![b'x'; length]),
            ]
        };
        let message = (1_u8..3, payload(), 1_usize..200, any::<bool>()).prop_map(
            |(opcode, payload, part, has_ping)| {
                let mut pieces: Vec<&[u8]> = payload.chunks(part.max(payload.len() / 5)).collect();
                if pieces.is_empty() {
                    pieces.push(b"");
                }
                let last = pieces.len() - 1;
                let mut bytes = Vec::new();
                for (n, piece) in pieces.into_iter().enumerate() {
                    let first = if n == 0 { opcode } else { 0 } | if n == last { 0x80 } else { 0 };
                    bytes.extend(frame(first, piece));
                    if has_ping && n < last {
                        bytes.extend(frame(0x89, b"between"));
                    }
                }
                bytes
            },
        );
        let close = prop_oneof![
            Just(Vec::new()),
            (any::<bool>(), 990_u16..1_014, 0_usize..3).prop_map(|(high, code, reason)| {
                let code = if high { code + 3_000 } else { code };
                [&code.to_be_bytes()[..], &b"ok\xff"[..reason]].concat()
            }),
            Just(b"\x03\xe8\xff".to_vec()),
            Just(b"\x03".to_vec()),
        ];
        prop_oneof![
            20 => message,
            4 => (9_u8..11, proptest::collection::vec(any::<u8>(), 0..126))
                .prop_map(|(opcode, payload)| frame(0x80 | opcode, &payload)),
            1 => close.prop_map(|payload| frame(0x88, &payload)),
            1 => (any::<u8>(), payload()).prop_map(|(first, payload)| frame(first, &payload)),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        #[test]
        fn what_a_client_says_is_understood_as_another_implementation_does(
            sayings in proptest::collection::vec(a_saying(), 1..12),
            piece in prop_oneof![1_usize..20, 20_usize..3_000],
        ) {
            let mut bytes = sayings.concat();
            if let Ok((_, true)) = ours(&bytes, piece) {
                // Text that is wrong is refused when its message is whole, and by the other one as soon as it is seen.
                bytes.extend(frame(0x80, b""));
            }
            let understood = ours(&bytes, piece).map(|(messages, _)| messages);
            prop_assert_eq!(understood, theirs(Role::Server, &bytes, piece));
        }

        #[test]
        fn what_we_say_is_understood_by_another_implementation(
            frames in proptest::collection::vec((0_usize..70, any::<u8>(), any::<bool>()), 1..20),
            piece in 1_usize..3_000,
        ) {
            let mut pipe = pipe(Codec::Cbor, Vec::new());
            let mut expected = Vec::new();
            for (length, byte, has_ping) in frames {
                // Around the places where the length takes another form, too.
                let length = match length {
                    0..40 => length * 9,
                    40..60 => 65_500 + 4 * (length - 40),
                    _ => 100 + length,
                }.min(FRAME_MAX);
                let payload = vec![byte; length];
                pipe.queue(&payload[..length / 3], &payload[length / 3..]);
                expected.push(Message::Binary(payload.into()));
                if has_ping {
                    pipe.take(Message::Ping(Bytes::from_static(b"p"))).unwrap();
                    let cx = &mut Context::from_waker(Waker::noop());
                    prop_assert!(pipe.poll_send(cx).is_ready());
                    expected.push(Message::Pong);
                }
            }
            pipe.end(Code::Silence, "for too long");
            let cx = &mut Context::from_waker(Waker::noop());
            let _ = pipe.poll_end(cx);
            expected.push(Message::Close(Code::Silence.websocket_close()));
            let said = std::mem::take(&mut pipe.wire.socket().sent);
            prop_assert_eq!(theirs(Role::Client, &said, piece), Ok(expected));
        }
    }

    #[test]
    fn a_ping_is_answered_behind_what_waits_and_before_what_comes_while_much_is_sent() {
        for codec in [Codec::Cbor, Codec::Json] {
            let mut pipe = pipe(codec, Vec::new());
            let cx = &mut Context::from_waker(Waker::noop());
            let payload = [b'x'; 1_000];
            let mut behind = None;
            for round in 0..200_u32 {
                // As a link does it: never empty, and never much more than 64 KiB.
                while pipe.queued() < 64 * 1024 {
                    pipe.queue(&payload, b"");
                }
                if round >= 100 {
                    let ping = frame(0x89, format!("ping {round}").as_bytes());
                    pipe.wire.socket().incoming.extend(ping);
                    assert!(matches!(pipe.poll_receive(cx), Poll::Ready(Ok(None))));
                    behind.get_or_insert(pipe.wire.socket().sent.len() / 1_004);
                }
                pipe.wire.socket().room = 10_000;
                assert!(pipe.poll_send(cx).is_pending());
            }
            pipe.wire.socket().room = usize::MAX;
            assert!(pipe.poll_send(cx).is_ready());
            let said = std::mem::take(&mut pipe.wire.socket().sent);
            let heard = theirs(Role::Client, &said, usize::MAX).unwrap();
            let pongs: Vec<usize> = (0..heard.len())
                .filter(|n| heard[*n] == Message::Pong)
                .collect();
            // 64 KiB are 66 frames.
            assert!(pongs[0] - behind.unwrap() <= 70, "{} {behind:?}", pongs[0]);
            // One waits at a time, and the newest is answered at last.
            assert!((10..=20).contains(&pongs.len()), "{}", pongs.len());
            let apart = pongs[..pongs.len() - 1].windows(2);
            assert!(apart.map(|two| two[1] - two[0]).all(|frames| frames >= 50));
            let newest = b"ping 199";
            assert!(said.windows(newest.len()).any(|bytes| bytes == newest));
            assert_eq!((pipe.pong_end, &pipe.pong), (0, &None));
        }
    }

    #[derive(Default)]
    struct Woken(AtomicUsize);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_message_in_endless_fragments_is_read_in_turns() {
        const PARTS: usize = 20_000;
        let mut incoming = frame(0x02, b"a");
        (0..PARTS).for_each(|_| incoming.extend(frame(0x00, b"")));
        incoming.extend(frame(0x80, b"z"));
        let mut pipe = pipe(Codec::Cbor, incoming);
        let woken = Arc::new(Woken::default());
        let waker = Waker::from(Arc::clone(&woken));
        let mut turns = 0;
        let came = loop {
            match pipe.poll_receive(&mut Context::from_waker(&waker)) {
                Poll::Ready(came) => break came.unwrap(),
                Poll::Pending => turns += 1,
            }
            assert_eq!(
                woken.0.load(Ordering::Relaxed),
                turns,
                "it goes on by itself"
            );
        };
        assert_eq!(came.unwrap(), "az");
        assert!(turns >= PARTS / STEPS_PER_TURN, "{turns}");
        // And with nothing to do nobody is woken.
        assert!(
            pipe.poll_receive(&mut Context::from_waker(&waker))
                .is_pending()
        );
        assert_eq!(woken.0.load(Ordering::Relaxed), turns);
    }

    #[test]
    fn a_peer_that_goes_is_noticed() {
        for (then, reason) in [(Then::End, "lost"), (Then::Fail, "lost")] {
            let mut pipe = pipe(Codec::Cbor, frame(0x82, b"x")[..3].to_vec());
            pipe.wire.socket().then = then;
            let cx = &mut Context::from_waker(Waker::noop());
            let came = pipe.poll_receive(cx);
            assert!(matches!(came, Poll::Ready(Err(Broken::Gone(word))) if word == reason));
        }
    }
}
