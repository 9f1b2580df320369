//! A server that does what the test says, frame by frame, on real sockets: both carriers on one port number.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_certs::{DevAuthority, Validity};
use bellwire_client::{Builder, Carriers, Client, Event, Notification, Trust, Verdict};
use bellwire_protocol::{
    Ack, Carrier, Code, Codec, Content, Decoded, DeviceFrame, ErrorFrame, FrameReader, Hello, Id,
    Notify, ServerFrame, Urgency, Welcome, negotiate, write_framed,
};
use futures_util::{SinkExt, StreamExt};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::server::{Request, Response};
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// The server's wall time in `welcome`; any number will do.
pub(crate) const NOW_MS: u64 = 1_700_000_000_000;

/// What the server does with UDP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Udp {
    /// Speaks QUIC.
    Quic,
    /// Swallows everything, like a firewall.
    Blackhole,
    /// QUIC, and little of what the device says is taken before it is read.
    Narrow,
}

/// The server.
pub(crate) struct FakeServer {
    pub(crate) address: SocketAddr,
    pub(crate) ca_pem: Vec<u8>,
    arrived: Option<mpsc::Receiver<Peer>>,
    taking_tcp: JoinHandle<()>,
    _blackhole: Option<UdpSocket>,
}

/// How [`FakeServer::welcome_everyone`] treats who comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Everyone {
    /// Welcomed, by this machine's clock.
    Now,
    /// Welcomed, by a clock that shows this.
    At(u64),
    /// Welcomed by this machine's clock, but for the first: that connection breaks.
    ButTheFirst,
    /// Refused.
    Refused(Code),
}

/// Serves whoever comes until it is dropped.
pub(crate) struct Serving {
    hellos: watch::Receiver<usize>,
    task: JoinHandle<()>,
}

impl Serving {
    /// How many have said `hello` by now.
    pub(crate) fn hellos(&self) -> usize {
        *self.hellos.borrow()
    }

    /// Waits until this many have.
    pub(crate) async fn at_least(&self, number: usize) {
        let mut hellos = self.hellos.clone();
        let waiting = hellos.wait_for(|hellos| *hellos >= number);
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.expect("nobody says hello").unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl FakeServer {
    pub(crate) async fn start(udp: Udp) -> Self {
        let authority = DevAuthority::generate(
            "Test CA",
            Validity::authority(time::OffsetDateTime::now_utc()).unwrap(),
        );
        let authority = authority.unwrap();
        let leaf = Validity::leaf(time::OffsetDateTime::now_utc()).unwrap();
        let issued = authority
            .server(
                &["localhost".parse().unwrap(), "127.0.0.1".parse().unwrap()],
                leaf,
            )
            .unwrap();
        let chain: Vec<_> = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes())
            .map(Result::unwrap)
            .collect();
        let key = || PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
        let tls = |versions: &[&'static rustls::SupportedProtocolVersion]| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = rustls::ServerConfig::builder_with_provider(provider)
                .with_protocol_versions(versions)
                .unwrap();
            builder
                .with_no_client_auth()
                .with_single_cert(chain.clone(), key())
                .unwrap()
        };
        let (found, arrived) = mpsc::channel(16);

        // A free TCP port whose UDP twin is free as well.
        let (listener, socket) = loop {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            if let Ok(socket) = std::net::UdpSocket::bind(listener.local_addr().unwrap()) {
                break (listener, socket);
            }
        };
        let address = listener.local_addr().unwrap();
        let blackhole = match udp {
            Udp::Quic | Udp::Narrow => {
                let mut config = tls(&[&rustls::version::TLS13]);
                config.alpn_protocols = vec![bellwire_protocol::ALPN.to_vec()];
                let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
                let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
                if udp == Udp::Narrow {
                    let mut transport = quinn::TransportConfig::default();
                    transport.stream_receive_window(quinn::VarInt::from_u32(4 * 1024));
                    config.transport_config(Arc::new(transport));
                }
                let runtime = Arc::new(quinn::TokioRuntime);
                let endpoint =
                    quinn::Endpoint::new(Default::default(), Some(config), socket, runtime)
                        .unwrap();
                tokio::spawn(take_quic(endpoint, found.clone()));
                None
            }
            Udp::Blackhole => {
                socket.set_nonblocking(true).unwrap();
                Some(UdpSocket::from_std(socket).unwrap())
            }
        };
        let acceptor = TlsAcceptor::from(Arc::new(tls(&[
            &rustls::version::TLS13,
            &rustls::version::TLS12,
        ])));
        let taking_tcp = tokio::spawn(take_websocket(listener, acceptor, found));
        let ca_pem = authority.certificate_pem().as_bytes().to_vec();
        Self {
            address,
            ca_pem,
            arrived: Some(arrived),
            taking_tcp,
            _blackhole: blackhole,
        }
    }

    /// The next device that has spoken.
    pub(crate) async fn accept(&mut self) -> Peer {
        let arrived = self.arrived.as_mut().expect("everyone is served");
        tokio::time::timeout(PATIENCE, arrived.recv())
            .await
            .expect("no device came")
            .unwrap()
    }

    /// From now on everyone is served in the background: `hello` as it is said here, `ping` by `pong`, `bye` by the close.
    pub(crate) fn welcome_everyone(&mut self, how: Everyone) -> Serving {
        let mut arrived = self.arrived.take().expect("everyone is served");
        let (count, hellos) = watch::channel(0);
        let task = tokio::spawn(async move {
            while let Some(peer) = arrived.recv().await {
                count.send_modify(|hellos| *hellos += 1);
                let first = *count.borrow() == 1;
                tokio::spawn(async move {
                    match how {
                        Everyone::Now => peer.serve(unix_ms()).await,
                        Everyone::At(now_ms) => peer.serve(now_ms).await,
                        Everyone::ButTheFirst if first => peer.break_off(),
                        Everyone::ButTheFirst => peer.serve(unix_ms()).await,
                        Everyone::Refused(code) => peer.refuse(code).await,
                    }
                });
            }
        });
        Serving { hellos, task }
    }

    /// The same server with its TCP port closed.
    pub(crate) async fn without_tcp(mut self) -> Self {
        self.taking_tcp.abort();
        let _ = (&mut self.taking_tcp).await;
        self
    }

    /// Whether no other device has spoken by now.
    pub(crate) fn nobody_else_came(&mut self) -> bool {
        let arrived = self.arrived.as_mut().expect("everyone is served");
        arrived.try_recv().is_err()
    }

    /// A client of this server that records what it sees; the test adds what it needs.
    pub(crate) fn client(&self, state: &Path, seen: &Seen) -> Builder {
        let (notifications, events) = (seen.clone(), seen.clone());
        Client::builder()
            .server(format!("localhost:{}", self.address.port()))
            .device(DEVICE, "a secret")
            .trust(Trust::Pem(self.ca_pem.clone()))
            .state_dir(state)
            .carriers(Carriers::Auto)
            .on_notification(move |notification| notifications.notification(notification))
            .on_event(move |event| events.event(event))
    }
}

fn unix_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.unwrap().as_millis() as u64
}

/// What takes TLS for `localhost`, and the authority behind it, as PEM.
pub(crate) fn acceptor() -> (TlsAcceptor, Vec<u8>) {
    let now = time::OffsetDateTime::now_utc();
    let authority = DevAuthority::generate("Other CA", Validity::authority(now).unwrap()).unwrap();
    let issued = authority.server(
        &["localhost".parse().unwrap()],
        Validity::leaf(now).unwrap(),
    );
    let issued = issued.unwrap();
    let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes())
        .map(Result::unwrap)
        .collect();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    let ca = authority.certificate_pem().as_bytes().to_vec();
    (TlsAcceptor::from(Arc::new(config)), ca)
}

async fn take_quic(endpoint: quinn::Endpoint, found: mpsc::Sender<Peer>) {
    while let Some(incoming) = endpoint.accept().await {
        let found = found.clone();
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else {
                return;
            };
            // The stream is seen with its first bytes: whoever lost the race never gets here.
            let Ok((send, receive)) = connection.accept_bi().await else {
                return;
            };
            let wire = Wire::Quic {
                connection,
                send,
                receive,
                reader: FrameReader::new(16 * 1024),
            };
            let _ = found
                .send(Peer {
                    carrier: Carrier::Quic,
                    codec: Codec::Cbor,
                    wire,
                })
                .await;
        });
    }
}

async fn take_websocket(listener: TcpListener, acceptor: TlsAcceptor, found: mpsc::Sender<Peer>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (acceptor, found) = (acceptor.clone(), found.clone());
        tokio::spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else {
                return;
            };
            let mut codec = Codec::Json;
            #[expect(clippy::result_large_err, reason = "the library's own callback type")]
            let choose = |request: &Request, mut response: Response| {
                assert_eq!(request.uri().path(), bellwire_protocol::LINK_PATH);
                // What a proxy wants to know is none of the server's business.
                for header in ["proxy-authorization", "authorization"] {
                    assert!(!request.headers().contains_key(header), "{header}");
                }
                let offered = request
                    .headers()
                    .get("sec-websocket-protocol")
                    .map_or("", |value| value.to_str().unwrap());
                let negotiated = negotiate(offered.split(',')).unwrap();
                codec = negotiated.codec;
                if let Some(name) = negotiated.subprotocol {
                    response
                        .headers_mut()
                        .insert("sec-websocket-protocol", name.parse().unwrap());
                }
                Ok(response)
            };
            let Ok(stream) = tokio_tungstenite::accept_hdr_async(stream, choose).await else {
                return;
            };
            let mut peer = Peer {
                carrier: Carrier::WebSocket,
                codec,
                wire: Wire::WebSocket(Box::new(stream), None),
            };
            if peer.wait_for_bytes().await {
                let _ = found.send(peer).await;
            }
        });
    }
}

/// A device that has spoken.
pub(crate) struct Peer {
    pub(crate) carrier: Carrier,
    pub(crate) codec: Codec,
    wire: Wire,
}

enum Wire {
    Quic {
        connection: quinn::Connection,
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        reader: FrameReader,
    },
    /// With the message that showed that it speaks.
    WebSocket(Box<WebSocketStream<TlsStream<TcpStream>>>, Option<Message>),
}

impl Peer {
    async fn wait_for_bytes(&mut self) -> bool {
        let Wire::WebSocket(stream, first) = &mut self.wire else {
            return true;
        };
        match stream.next().await {
            Some(Ok(message)) => {
                *first = Some(message);
                true
            }
            _ => false,
        }
    }

    /// The next frame, or the code with which the device closed.
    pub(crate) async fn hear(&mut self) -> Result<DeviceFrame, Option<Code>> {
        let bytes = tokio::time::timeout(PATIENCE, self.hear_bytes())
            .await
            .expect("the device says nothing")?;
        match self.codec.decode_device(&bytes) {
            Ok(Decoded::Frame(frame)) => Ok(frame),
            other => panic!("{other:?}"),
        }
    }

    async fn hear_bytes(&mut self) -> Result<bytes::Bytes, Option<Code>> {
        match &mut self.wire {
            Wire::Quic {
                connection,
                receive,
                reader,
                ..
            } => loop {
                if let Some(frame) = reader.pull().unwrap() {
                    return Ok(frame);
                }
                match receive.read_chunk(4_096, true).await {
                    Ok(Some(chunk)) => reader.push(&chunk.bytes),
                    Ok(None) => return Err(None),
                    Err(_) => {
                        return Err(match connection.close_reason() {
                            Some(quinn::ConnectionError::ApplicationClosed(close)) => {
                                Code::from_quic_close(close.error_code.into_inner())
                            }
                            _ => None,
                        });
                    }
                }
            },
            Wire::WebSocket(stream, first) => loop {
                let message = match first.take() {
                    Some(message) => message,
                    None => match stream.next().await {
                        Some(Ok(message)) => message,
                        _ => return Err(None),
                    },
                };
                match message {
                    Message::Text(text) => return Ok(text.into()),
                    Message::Binary(bytes) => return Ok(bytes),
                    Message::Close(frame) => {
                        return Err(
                            frame.and_then(|frame| Code::from_websocket_close(frame.code.into()))
                        );
                    }
                    _ => {}
                }
            },
        }
    }

    /// Where the device is, as its last packet says. For QUIC.
    pub(crate) fn remote(&self) -> SocketAddr {
        match &self.wire {
            Wire::Quic { connection, .. } => connection.remote_address(),
            Wire::WebSocket(..) => panic!("a TCP connection stays where it is"),
        }
    }

    /// Says these frames in one go.
    pub(crate) async fn say(&mut self, frames: impl IntoIterator<Item = ServerFrame>) {
        let frames = frames
            .into_iter()
            .map(|frame| self.codec.encode_server(&frame));
        match &mut self.wire {
            Wire::Quic { send, .. } => {
                let mut out = Vec::new();
                frames.for_each(|frame| write_framed(&mut out, &frame));
                send.write_all(&out).await.unwrap();
            }
            Wire::WebSocket(stream, _) => {
                for frame in frames {
                    let message = match self.codec {
                        Codec::Cbor => Message::binary(frame),
                        Codec::Json => Message::text(String::from_utf8(frame).unwrap()),
                    };
                    stream.feed(message).await.unwrap();
                }
                stream.flush().await.unwrap();
            }
        }
    }

    /// Says these bytes on QUIC, without a length before them.
    pub(crate) async fn say_unframed(&mut self, bytes: &[u8]) {
        match &mut self.wire {
            Wire::Quic { send, .. } => send.write_all(bytes).await.unwrap(),
            Wire::WebSocket(..) => panic!("a message has a length"),
        }
    }

    /// Welcomes, answers every `ping`, and closes after `bye`.
    async fn serve(mut self, now_ms: u64) {
        self.welcome_at(now_ms).await;
        loop {
            let Ok(bytes) = self.hear_bytes().await else {
                return;
            };
            match self.codec.decode_device(&bytes) {
                Ok(Decoded::Frame(DeviceFrame::Ping)) => self.say([ServerFrame::Pong]).await,
                Ok(Decoded::Frame(DeviceFrame::Bye)) => return self.close(Code::Bye).await,
                _ => {}
            }
        }
    }

    /// Takes the `hello`, and refuses it.
    async fn refuse(mut self, code: Code) {
        let _ = self.hear_bytes().await;
        let error = ErrorFrame {
            code: code.name().to_owned(),
            message: "the test wants it".to_owned(),
            retry: code.retry(),
        };
        self.say([ServerFrame::Error(error)]).await;
        self.close(code).await;
    }

    /// Takes the `hello` and welcomes.
    pub(crate) async fn welcome(&mut self) -> Hello {
        self.welcome_at(NOW_MS).await
    }

    async fn welcome_at(&mut self, now_ms: u64) -> Hello {
        let Ok(DeviceFrame::Hello(hello)) = self.hear().await else {
            panic!("no hello")
        };
        let keep_alive_s = self.carrier.keep_alive();
        let window = hello.window.unwrap();
        let welcome = Welcome {
            session: 7,
            pending: 0,
            window,
            max_bytes: 4_096,
            keep_alive_s,
            now_ms,
        };
        self.say([ServerFrame::Welcome(welcome)]).await;
        hello
    }

    /// Hears acknowledgements until `seq`, and answers with how many frames that took.
    pub(crate) async fn acknowledged_up_to(&mut self, seq: u64) -> usize {
        let mut frames = 0;
        loop {
            match self.hear().await {
                Ok(DeviceFrame::Ack(Ack::UpTo(up_to))) => {
                    frames += 1;
                    assert!(up_to <= seq, "{up_to} acknowledged");
                    if up_to == seq {
                        return frames;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    /// Hears a `bye`, and closes as a server does.
    pub(crate) async fn goodbye(mut self) {
        loop {
            match self.hear().await {
                Ok(DeviceFrame::Bye) => break,
                Ok(_) => {}
                Err(end) => panic!("gone without bye: {end:?}"),
            }
        }
        self.close(Code::Bye).await;
    }

    /// Closes with a code.
    pub(crate) async fn close(self, code: Code) {
        match self.wire {
            Wire::Quic { connection, .. } => {
                connection.close(quinn::VarInt::from_u32(code.quic_close().unwrap()), b"");
                connection.closed().await;
            }
            Wire::WebSocket(mut stream, _) => {
                let frame = CloseFrame {
                    code: code.websocket_close().unwrap().into(),
                    reason: "".into(),
                };
                let _ = WebSocketStream::close(&mut stream, Some(frame)).await;
                while let Some(Ok(_)) = stream.next().await {}
            }
        }
    }

    /// The network breaks: nothing more is said, nothing is closed in order.
    pub(crate) fn break_off(self) {
        match self.wire {
            Wire::Quic { connection, .. } => connection.close(quinn::VarInt::from_u32(9_999), b""),
            Wire::WebSocket(stream, _) => drop(stream),
        }
    }
}

pub(crate) const DEVICE: Id = Id::from_bytes([7; 16]);

pub(crate) fn id(number: u64) -> Id {
    let mut bytes = [1; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    Id::from_bytes(bytes)
}

/// A notification with this place in the session and this id; its title is the number.
pub(crate) fn notify(seq: u64, number: u64) -> ServerFrame {
    ServerFrame::Notify(Notify {
        seq,
        redelivered: seq != number,
        id: id(number),
        accepted_ms: NOW_MS,
        expires_ms: NOW_MS + 3_600_000,
        urgency: Urgency::Normal,
        content: Content {
            title: Some(number.to_string()),
            ..Content::default()
        },
    })
}

/// What the app saw, and what it answers.
#[derive(Clone, Default)]
pub(crate) struct Seen {
    inner: Arc<Mutex<Inner>>,
    bell: Arc<tokio::sync::Notify>,
}

#[derive(Default)]
struct Inner {
    titles: Vec<String>,
    events: Vec<String>,
    verdict: Option<Verdict>,
}

impl Seen {
    pub(crate) fn answering(verdict: Verdict) -> Self {
        let seen = Self::default();
        seen.inner.lock().unwrap().verdict = Some(verdict);
        seen
    }

    pub(crate) fn notification(&self, notification: Notification) -> Verdict {
        let mut inner = self.inner.lock().unwrap();
        inner
            .titles
            .push(notification.content.title.unwrap_or_default());
        self.bell.notify_one();
        inner.verdict.clone().unwrap_or(Verdict::Acknowledge)
    }

    pub(crate) fn event(&self, event: Event) {
        let text = match &event {
            Event::Connected { carrier, codec, .. } => {
                format!("connected {} {}", carrier.name(), codec.name())
            }
            Event::Disconnected { why, retry_in } => {
                let wait = retry_in.map_or("never".to_owned(), |wait| {
                    format!("in {} s", wait.as_secs())
                });
                format!("disconnected: {why} / {} / {wait}", why.advice())
            }
            Event::Repeated { id: repeated } => {
                let number = (0..100).find(|number| id(*number) == *repeated);
                format!("repeated {}", number.unwrap())
            }
            Event::Expired { .. } => "expired".to_owned(),
            Event::Replaced => "replaced".to_owned(),
            Event::Stopped => "stopped".to_owned(),
            other => format!("{other:?}"),
        };
        self.inner.lock().unwrap().events.push(text);
        self.bell.notify_one();
    }

    pub(crate) fn titles(&self) -> Vec<String> {
        self.inner.lock().unwrap().titles.clone()
    }

    pub(crate) fn events(&self) -> Vec<String> {
        self.inner.lock().unwrap().events.clone()
    }

    /// Waits for an event that begins like this, and answers with it.
    pub(crate) async fn event_like(&self, beginning: &str) -> String {
        self.nth_event_like(beginning, 1).await
    }

    /// Waits until this many sessions stood.
    pub(crate) async fn connected_times(&self, times: usize) {
        self.nth_event_like("connected", times).await;
    }

    async fn nth_event_like(&self, beginning: &str, number: usize) -> String {
        let waiting = async {
            loop {
                let bell = self.bell.notified();
                let mut alike = self
                    .events()
                    .into_iter()
                    .filter(|event| event.starts_with(beginning));
                if let Some(event) = alike.nth(number - 1) {
                    return event;
                }
                bell.await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, waiting).await;
        waited.unwrap_or_else(|_| panic!("no event {number} like {beginning}: {:?}", self.events()))
    }
}

/// Whether the window on disk names this id.
pub(crate) fn window_names(state: &Path, number: u64) -> bool {
    let path: PathBuf = state.join("window");
    let bytes = std::fs::read(path).unwrap();
    bytes
        .windows(16)
        .any(|bytes| bytes == id(number).as_bytes())
}
