//! Devices without comfort: the frames of the protocol on a socket, nothing else. They say hello, take what comes and
//! acknowledge it, so that many of them fit beside the server that is measured.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bellwire_protocol::{
    ALPN, Carrier, Codec, Decoded, DeviceFrame, FrameReader, Hello, Id, KeepAlive, LINK_PATH,
    SUBPROTOCOL_CBOR, Secret, ServerFrame, write_framed,
};
use bytes::Bytes;
use futures_util::{FutureExt, SinkExt, StreamExt};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::client::{
    ClientSessionMemoryCache, ClientSessionStore, Resumption, Tls12ClientSessionValue,
    Tls13ClientSessionValue,
};
use rustls::{ClientConfig, HandshakeKind, NamedGroup, RootCertStore};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsConnector;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::http::header::SEC_WEBSOCKET_PROTOCOL;
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use crate::api::Registered;
use crate::clock;
use crate::failure::{During, Failure, Outcome};

/// Time for a connection, its handshake and the welcome.
const CONNECT_MAX: Duration = Duration::from_secs(60);

/// Longest wait for connections that were closed to be gone.
const FAREWELL_MAX: Duration = Duration::from_secs(2);

/// Longest wait for a ticket, and how often it is looked for.
const TICKET_MAX: Duration = Duration::from_secs(1);
const TICKET_LOOK_EVERY: Duration = Duration::from_millis(1);

/// Servers whose tickets a device remembers.
const TICKET_SERVERS: usize = 4;

/// Most bytes of one read of a QUIC stream.
const READ_MAX_BYTES: usize = 64 * 1024;

/// UDP sockets that all QUIC devices share.
const ENDPOINTS: usize = 4;

/// Buffers asked of the system for each of them, in bytes. What is granted depends on the system.
const UDP_BUFFER_BYTES: usize = 8 * 1024 * 1024;

/// Read buffer of a WebSocket, in bytes.
const READ_BUFFER_BYTES: usize = 4 * 1024;

/// The name in the certificates of servers measured here.
const SERVER_NAME: &str = "localhost";

/// Connects devices to one server.
#[derive(Clone)]
pub(crate) struct Dialer {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
    quic: quinn::ClientConfig,
    endpoints: Arc<[quinn::Endpoint]>,
    next_endpoint: Arc<AtomicUsize>,
    /// Where connections come from.
    source: IpAddr,
    roots: Arc<RootCertStore>,
    /// What it takes to resume a session; `None`: every handshake is a full one.
    tickets: Option<Arc<Tickets>>,
    /// Offer the subprotocol and the path of device links.
    speaks_bellwire: bool,
    /// WebSockets without TLS, brought by what a server of Bellwire takes for a load balancer.
    plain: bool,
    /// Rising with every connection, whoever's it is, from a beginning above that of any process before.
    attempt: Arc<AtomicU64>,
}

impl Dialer {
    /// A dialer that trusts the authorities in `authority` (PEM). Without `resume` every handshake is a full one.
    pub(crate) fn new(
        address: SocketAddr,
        authority: &[u8],
        speaks_bellwire: bool,
        resume: bool,
        source: IpAddr,
    ) -> Outcome<Dialer> {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(authority) {
            roots
                .add(certificate.during("read the server's authority")?)
                .during("trust the server's authority")?;
        }
        let roots = Arc::new(roots);
        let tickets = resume.then(Tickets::new);
        let (tls, quic) = configure(&roots, tickets.as_ref())?;
        let endpoints = (0..ENDPOINTS)
            .map(|_| endpoint(source))
            .collect::<Outcome<Vec<_>>>()?;
        Ok(Dialer {
            address,
            tls: Arc::new(tls),
            quic,
            endpoints: endpoints.into(),
            next_endpoint: Arc::default(),
            source,
            roots,
            tickets,
            speaks_bellwire,
            plain: false,
            attempt: Arc::new(AtomicU64::new(clock::now())),
        })
    }

    /// The same without TLS, over WebSocket only.
    pub(crate) fn plain(self) -> Dialer {
        Dialer {
            plain: true,
            ..self
        }
    }

    /// The same for one device, which resumes only its own sessions.
    pub(crate) fn for_one(&self) -> Outcome<Dialer> {
        let mut one = self.clone();
        if self.tickets.is_some() {
            one.tickets = Some(Tickets::new());
            let (tls, quic) = configure(&self.roots, one.tickets.as_ref())?;
            (one.tls, one.quic) = (Arc::new(tls), quic);
        }
        Ok(one)
    }

    /// Connects, as far as the carrier goes.
    pub(crate) async fn connect(&self, carrier: Carrier) -> Outcome<Link> {
        timeout(CONNECT_MAX, async {
            match carrier {
                Carrier::WebSocket => self.connect_websocket().await,
                Carrier::Quic => self.connect_quic().await,
            }
        })
        .await
        .map_err(|_| Failure::new("a connection did not stand within 60 s"))?
    }

    async fn connect_websocket(&self) -> Outcome<Link> {
        let socket = TcpSocket::new_v4().during("make a socket")?;
        socket
            .bind((self.source, 0).into())
            .during("bind a socket")?;
        let tcp = socket
            .connect(self.address)
            .await
            .during("connect by TCP")?;
        tcp.set_nodelay(true).during("set an option of a socket")?;
        if self.plain {
            let mut tcp = tcp;
            if self.speaks_bellwire {
                tcp.write_all(&proxy_header(&tcp).during("find the ends of a connection")?)
                    .await
                    .during("say whom a connection is for")?;
            }
            return self.upgrade("ws", Box::new(tcp), false).await;
        }
        let name = ServerName::try_from(SERVER_NAME).during("name the server")?;
        let tls = TlsConnector::from(Arc::clone(&self.tls))
            .connect(name, tcp)
            .await
            .during("complete the TLS handshake")?;
        let resumed = tls.get_ref().1.handshake_kind() == Some(HandshakeKind::Resumed);
        self.upgrade("wss", Box::new(tls), resumed).await
    }

    async fn upgrade(&self, scheme: &str, stream: Stream, resumed: bool) -> Outcome<Link> {
        let url = format!(
            "{scheme}://{SERVER_NAME}:{}{LINK_PATH}",
            self.address.port()
        );
        let mut request = url.into_client_request().during("make the upgrade")?;
        if self.speaks_bellwire {
            request.headers_mut().insert(
                SEC_WEBSOCKET_PROTOCOL,
                HeaderValue::from_static(SUBPROTOCOL_CBOR),
            );
        }
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_BUFFER_BYTES)
            .write_buffer_size(0);
        let (socket, _) =
            tokio_tungstenite::client_async_with_config(request, stream, Some(config))
                .await
                .during("upgrade to WebSocket")?;
        Ok(Link::WebSocket(Box::new(socket), resumed))
    }

    async fn connect_quic(&self) -> Outcome<Link> {
        let tickets = self.tickets.as_deref();
        let used = tickets.map_or(0, |tickets| tickets.used.load(Ordering::Relaxed));
        let turn = self.next_endpoint.fetch_add(1, Ordering::Relaxed);
        let endpoint = &self.endpoints[turn % self.endpoints.len()];
        let connection = endpoint
            .connect_with(self.quic.clone(), self.address, SERVER_NAME)
            .during("start a QUIC connection")?
            .await
            .during("complete the QUIC handshake")?;
        let (send, receive) = connection.open_bi().await.during("open a stream")?;
        Ok(Link::Quic(Box::new(QuicLink {
            _connection: connection,
            resumed: tickets.is_some_and(|tickets| tickets.used.load(Ordering::Relaxed) > used),
            send,
            receive,
            reader: FrameReader::new(Codec::Cbor.server_frame_max_bytes()),
        })))
    }

    /// Waits until the other side has been told of all QUIC connections that were dropped, for some time.
    pub(crate) async fn farewell(&self) {
        for endpoint in self.endpoints.iter() {
            // What is not told by then, silence will tell.
            let _ = timeout(FAREWELL_MAX, endpoint.wait_idle()).await;
        }
    }

    /// How many tickets came so far.
    pub(crate) fn tickets(&self) -> u64 {
        let tickets = self.tickets.as_ref();
        tickets.map_or(0, |tickets| tickets.came.load(Ordering::Relaxed))
    }

    /// Waits until more than `before` tickets came. A server that gives none is not waited for for long.
    pub(crate) async fn ticket_after(&self, before: u64) {
        let wait = async {
            while self.tickets() <= before {
                sleep(TICKET_LOOK_EVERY).await;
            }
        };
        if self.tickets.is_some() {
            // Without it the next handshake is a full one, and counted as such.
            let _ = timeout(TICKET_MAX, wait).await;
        }
    }

    /// Connects and says hello; returns once welcomed.
    pub(crate) async fn attach(
        &self,
        carrier: Carrier,
        device: &Registered,
    ) -> Outcome<(Link, KeepAlive)> {
        let mut link = self.connect(carrier).await?;
        let hello = Hello {
            device: device.device,
            secret: Some(Secret::from(device.secret.as_str())),
            // One process is one instance; telling devices apart is the device id's work.
            instance: Id([7; 16]),
            attempt: self.attempt.fetch_add(1, Ordering::Relaxed),
            seen: Vec::new(),
            window: None,
            min_urgency: None,
            agent: None,
        };
        link.send(&DeviceFrame::Hello(hello)).await?;
        match timeout(CONNECT_MAX, link.receive()).await {
            Ok(Ok(ServerFrame::Welcome(welcome))) => Ok((link, welcome.keep_alive_s)),
            Ok(Ok(other)) => Err(Failure::new(format!(
                "the server answered hello by {}",
                describe(&other)
            ))),
            Ok(Err(failure)) => Err(failure),
            Err(_) => Err(Failure::new("no welcome within 60 s")),
        }
    }
}

/// TLS for both carriers.
fn configure(
    roots: &Arc<RootCertStore>,
    tickets: Option<&Arc<Tickets>>,
) -> Outcome<(ClientConfig, quinn::ClientConfig)> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = || -> Outcome<ClientConfig> {
        let mut config = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .during("set up TLS")?
            .with_root_certificates(Arc::clone(roots))
            .with_no_client_auth();
        config.resumption = match tickets {
            Some(tickets) => Resumption::store(Arc::clone(tickets) as Arc<dyn ClientSessionStore>),
            None => Resumption::disabled(),
        };
        Ok(config)
    };
    let tls = config()?;
    let mut quic = config()?;
    quic.alpn_protocols = vec![ALPN.to_vec()];
    let quic = QuicClientConfig::try_from(quic).during("set up QUIC")?;
    let mut quic = quinn::ClientConfig::new(Arc::new(quic));
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_idle_timeout(None)
        .max_concurrent_bidi_streams(0u32.into())
        .max_concurrent_uni_streams(0u32.into())
        .datagram_receive_buffer_size(None)
        .mtu_discovery_config(None);
    quic.transport_config(Arc::new(transport));
    Ok((tls, quic))
}

/// Tickets, counted.
#[derive(Debug)]
struct Tickets {
    inner: ClientSessionMemoryCache,
    came: AtomicU64,
    used: AtomicU64,
}

impl Tickets {
    fn new() -> Arc<Tickets> {
        Arc::new(Tickets {
            inner: ClientSessionMemoryCache::new(TICKET_SERVERS),
            came: AtomicU64::new(0),
            used: AtomicU64::new(0),
        })
    }
}

impl ClientSessionStore for Tickets {
    fn set_kx_hint(&self, server: ServerName<'static>, group: NamedGroup) {
        self.inner.set_kx_hint(server, group);
    }

    fn kx_hint(&self, server: &ServerName<'_>) -> Option<NamedGroup> {
        self.inner.kx_hint(server)
    }

    fn set_tls12_session(&self, server: ServerName<'static>, session: Tls12ClientSessionValue) {
        self.inner.set_tls12_session(server, session);
    }

    fn tls12_session(&self, server: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        self.inner.tls12_session(server)
    }

    fn remove_tls12_session(&self, server: &ServerName<'static>) {
        self.inner.remove_tls12_session(server);
    }

    fn insert_tls13_ticket(&self, server: ServerName<'static>, ticket: Tls13ClientSessionValue) {
        self.inner.insert_tls13_ticket(server, ticket);
        self.came.fetch_add(1, Ordering::Relaxed);
    }

    fn take_tls13_ticket(&self, server: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let ticket = self.inner.take_tls13_ticket(server);
        self.used
            .fetch_add(u64::from(ticket.is_some()), Ordering::Relaxed);
        ticket
    }
}

fn describe(frame: &ServerFrame) -> String {
    match frame {
        ServerFrame::Error(error) => format!("error {} ({})", error.code, error.message),
        ServerFrame::Goaway(goaway) => format!("goaway {:?}", goaway.reason),
        ServerFrame::Welcome(_)
        | ServerFrame::Notify(_)
        | ServerFrame::Withdraw(_)
        | ServerFrame::Pong
        | ServerFrame::Subscribed(_) => frame.name().to_owned(),
    }
}

/// A QUIC client on a port of its own, with buffers for the words of thousands.
pub(crate) fn endpoint(source: IpAddr) -> Outcome<quinn::Endpoint> {
    let socket = socket2::Socket::new(
        socket2::Domain::IPV4,
        socket2::Type::DGRAM,
        Some(socket2::Protocol::UDP),
    )
    .during("make a UDP socket")?;
    // Asking is free; how much is granted is the system's affair.
    let _ = socket.set_recv_buffer_size(UDP_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(UDP_BUFFER_BYTES);
    let any = SocketAddr::from((source, 0));
    socket.bind(&any.into()).during("bind a UDP socket")?;
    quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        None,
        socket.into(),
        Arc::new(quinn::TokioRuntime),
    )
    .during("start a QUIC endpoint")
}

/// What a WebSocket runs over.
type Stream = Box<dyn Io>;

/// A stream of bytes in both directions.
pub(crate) trait Io: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Io for T {}

/// What a load balancer says first (PROXY protocol, version 2): the connection's own ends, over TCP and IPv4.
fn proxy_header(tcp: &TcpStream) -> std::io::Result<Vec<u8>> {
    let mut header = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x00\x0c".to_vec();
    let (from, to) = (tcp.local_addr()?, tcp.peer_addr()?);
    for address in [from, to] {
        match address.ip() {
            IpAddr::V4(address) => header.extend_from_slice(&address.octets()),
            IpAddr::V6(_) => header.extend_from_slice(&[127, 0, 0, 1]),
        }
    }
    header.extend_from_slice(&from.port().to_be_bytes());
    header.extend_from_slice(&to.port().to_be_bytes());
    Ok(header)
}

/// A connection that stands.
pub(crate) enum Link {
    /// With whether its TLS session is that of an earlier connection.
    WebSocket(Box<WebSocketStream<Stream>>, bool),
    Quic(Box<QuicLink>),
}

/// A QUIC connection with its stream.
pub(crate) struct QuicLink {
    // Keeps the connection open.
    _connection: quinn::Connection,
    /// Exact where nobody else connects with the same tickets.
    resumed: bool,
    send: quinn::SendStream,
    receive: quinn::RecvStream,
    reader: FrameReader,
}

impl Link {
    pub(crate) async fn send(&mut self, frame: &DeviceFrame) -> Outcome<()> {
        self.send_bytes(&Codec::Cbor.encode_device(frame)).await
    }

    /// Sends one message, whatever it says.
    pub(crate) async fn send_bytes(&mut self, frame: &[u8]) -> Outcome<()> {
        match self {
            Link::WebSocket(socket, _) => socket
                .send(Message::Binary(Bytes::copy_from_slice(frame)))
                .await
                .during("send on a WebSocket"),
            Link::Quic(quic) => {
                let mut framed = Vec::with_capacity(frame.len() + 4);
                write_framed(&mut framed, frame);
                quic.send
                    .write_all(&framed)
                    .await
                    .during("send on a QUIC stream")
            }
        }
    }

    /// The next frame; waits for it. Frames of a later version are skipped.
    pub(crate) async fn receive(&mut self) -> Outcome<ServerFrame> {
        loop {
            let bytes = match self {
                Link::WebSocket(socket, _) => match socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => bytes,
                    Some(Ok(Message::Ping(_) | Message::Pong(_))) => continue,
                    Some(Ok(
                        message @ (Message::Text(_) | Message::Close(_) | Message::Frame(_)),
                    )) => {
                        return Err(Failure::new(format!("the server sent {message:?}")));
                    }
                    Some(Err(error)) => {
                        return Err(Failure::new(format!("a WebSocket broke: {error}")));
                    }
                    None => return Err(Failure::new("the server closed a WebSocket")),
                },
                Link::Quic(quic) => quic.receive().await?,
            };
            let decoded = Codec::Cbor
                .decode_server(&bytes)
                .during("understand a frame")?;
            match decoded {
                Decoded::Frame(frame) => return Ok(frame),
                Decoded::Skipped => {}
            }
        }
    }

    /// The next frame, if it is here already.
    pub(crate) fn receive_ready(&mut self) -> Option<Outcome<ServerFrame>> {
        // Every wait inside is a poll that keeps what it has, so giving up is harmless.
        self.receive().now_or_never()
    }

    /// Whether the TLS session of an earlier connection was taken up.
    pub(crate) fn is_resumed(&self) -> bool {
        match self {
            Link::WebSocket(_, resumed) => *resumed,
            Link::Quic(quic) => quic.resumed,
        }
    }
}

impl QuicLink {
    async fn receive(&mut self) -> Outcome<Bytes> {
        loop {
            if let Some(frame) = self.reader.pull().during("cut a QUIC stream into frames")? {
                return Ok(frame);
            }
            let chunk = self
                .receive
                .read_chunk(READ_MAX_BYTES, true)
                .await
                .during("read a QUIC stream")?
                .ok_or_else(|| Failure::new("the server closed a QUIC stream"))?;
            self.reader.push(&chunk.bytes);
        }
    }
}
