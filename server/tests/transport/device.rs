//! A device for tests: speaks the protocol by hand, so that it can break it as well.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bellwire_protocol::limits::SERVER_JSON_FRAME_MAX_BYTES;
use bellwire_protocol::{
    ALPN, Code, Codec, Decoded, DeviceFrame, FrameReader, Hello, Id, ServerFrame, Welcome,
    write_framed,
};
use bellwire_server::delivery::DeviceId;
use futures_util::{SinkExt, StreamExt};
use quinn::crypto::rustls::QuicClientConfig;
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::desk::{PATIENCE, authority};

/// Carrier and codec, the three ways to connect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Quic,
    WebSocketCbor,
    WebSocketJson,
}

pub const WAYS: [Way; 3] = [Way::Quic, Way::WebSocketCbor, Way::WebSocketJson];

/// TLS that trusts the test authority.
pub fn tls(alpn: &[&[u8]]) -> ClientConfig {
    let mut roots = rustls::RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(authority().certificate_pem().as_bytes()).unwrap();
    roots.add(root).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config
}

/// TLS over TCP to the server.
pub async fn connect_tls(
    server: SocketAddr,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(server).await?;
    connect_tls_on(tcp, config).await
}

/// TLS over this connection.
pub async fn connect_tls_on(
    tcp: TcpStream,
    config: Arc<ClientConfig>,
) -> std::io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(config).connect(name, tcp).await
}

/// A TCP connection whose receive buffer is as small as the system allows.
pub async fn connect_narrow(server: SocketAddr) -> TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(4_096).unwrap();
    socket.connect(server).await.unwrap()
}

/// A QUIC endpoint for devices.
pub fn endpoint(config: ClientConfig) -> quinn::Endpoint {
    let mut endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = QuicClientConfig::try_from(config).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(config)));
    endpoint
}

/// TLS 1.3 for QUIC with this protocol name.
pub fn quic_tls(alpn: &[u8]) -> ClientConfig {
    tls(&[alpn])
}

type Socket = WebSocketStream<TlsStream<TcpStream>>;

#[allow(clippy::large_enum_variant, reason = "there are a handful of devices")]
enum Pipe {
    WebSocket(Box<Socket>),
    Quic {
        _endpoint: quinn::Endpoint,
        connection: quinn::Connection,
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        reader: FrameReader,
    },
}

/// One connection of a device.
pub struct Device {
    codec: Codec,
    pipe: Pipe,
}

impl Device {
    /// Connects without saying anything.
    pub async fn connect(server: SocketAddr, way: Way) -> Device {
        match way {
            Way::Quic => Device::over_quic(endpoint(quic_tls(ALPN)), server).await,
            Way::WebSocketCbor | Way::WebSocketJson => {
                let tcp = TcpStream::connect(server).await.unwrap();
                Device::over_tcp(tcp, way).await
            }
        }
    }

    /// Opens a WebSocket on a TCP connection.
    pub async fn over_tcp(tcp: TcpStream, way: Way) -> Device {
        let stream = connect_tls_on(tcp, Arc::new(tls(&[b"http/1.1"])))
            .await
            .unwrap();
        let (codec, subprotocol) = match way {
            Way::WebSocketCbor => (Codec::Cbor, "bellwire.1.cbor"),
            Way::WebSocketJson => (Codec::Json, "bellwire.1.json"),
            Way::Quic => panic!("not over TCP"),
        };
        let mut request = "wss://localhost/v1/link".into_client_request().unwrap();
        let headers = request.headers_mut();
        headers.insert("Sec-WebSocket-Protocol", subprotocol.parse().unwrap());
        let (socket, answer) = client_async(request, stream).await.unwrap();
        assert_eq!(answer.headers()["Sec-WebSocket-Protocol"], subprotocol);
        Device {
            codec,
            pipe: Pipe::WebSocket(Box::new(socket)),
        }
    }

    /// Opens the stream of a QUIC connection.
    pub async fn over_quic(endpoint: quinn::Endpoint, server: SocketAddr) -> Device {
        let connection = endpoint
            .connect(server, "localhost")
            .unwrap()
            .await
            .unwrap();
        let (send, receive) = connection.open_bi().await.unwrap();
        Device {
            codec: Codec::Cbor,
            pipe: Pipe::Quic {
                _endpoint: endpoint,
                connection,
                send,
                receive,
                reader: FrameReader::new(SERVER_JSON_FRAME_MAX_BYTES),
            },
        }
    }

    /// Connects and says a good hello.
    pub async fn attach(server: SocketAddr, way: Way, id: u8) -> (Device, Welcome) {
        let mut device = Device::connect(server, way).await;
        let welcome = device.hello(id).await;
        (device, welcome)
    }

    /// Says a good hello and waits for the welcome.
    pub async fn hello(&mut self, id: u8) -> Welcome {
        self.say(&DeviceFrame::Hello(hello(id, "good"))).await;
        match self.next().await {
            ServerFrame::Welcome(welcome) => welcome,
            other => panic!("{other:?}"),
        }
    }

    /// The QUIC connection.
    pub fn connection(&self) -> &quinn::Connection {
        match &self.pipe {
            Pipe::Quic { connection, .. } => connection,
            Pipe::WebSocket(_) => panic!("not over QUIC"),
        }
    }

    /// The WebSocket.
    pub fn socket(&mut self) -> &mut Socket {
        match &mut self.pipe {
            Pipe::WebSocket(socket) => socket,
            Pipe::Quic { .. } => panic!("not over WebSocket"),
        }
    }

    /// Says a frame.
    pub async fn say(&mut self, frame: &DeviceFrame) {
        self.say_bytes(&self.codec.encode_device(frame)).await;
    }

    /// Says a frame made of these bytes, if the connection still takes it.
    pub async fn say_bytes(&mut self, bytes: &[u8]) {
        match &mut self.pipe {
            Pipe::WebSocket(socket) => {
                let message = match self.codec {
                    Codec::Cbor => Message::binary(bytes.to_vec()),
                    Codec::Json => Message::text(String::from_utf8(bytes.to_vec()).unwrap()),
                };
                let _ = socket.send(message).await;
            }
            Pipe::Quic { send, .. } => {
                let mut framed = Vec::new();
                write_framed(&mut framed, bytes);
                let _ = send.write_all(&framed).await;
            }
        }
    }

    /// Says bytes that need not be a frame: on QUIC into the stream, on WebSocket as a message.
    pub async fn say_raw(&mut self, bytes: &[u8]) {
        match &mut self.pipe {
            Pipe::WebSocket(_) => self.say_bytes(bytes).await,
            Pipe::Quic { send, .. } => {
                let _ = send.write_all(bytes).await;
            }
        }
    }

    /// The next frame; `Err` with the close code once the server has closed.
    pub async fn hear(&mut self) -> Result<ServerFrame, Option<Code>> {
        timeout(PATIENCE, self.hear_patiently())
            .await
            .expect("something to hear")
    }

    async fn hear_patiently(&mut self) -> Result<ServerFrame, Option<Code>> {
        let frame = match &mut self.pipe {
            Pipe::WebSocket(socket) => loop {
                match socket.next().await {
                    Some(Ok(Message::Binary(bytes))) => {
                        assert_eq!(self.codec, Codec::Cbor);
                        break bytes;
                    }
                    Some(Ok(Message::Text(text))) => {
                        assert_eq!(self.codec, Codec::Json);
                        break text.into();
                    }
                    Some(Ok(Message::Close(frame))) => {
                        let code =
                            frame.and_then(|frame| Code::from_websocket_close(frame.code.into()));
                        // Answers, as a client does.
                        while let Some(Ok(_)) = socket.next().await {}
                        return Err(code);
                    }
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                    Some(Err(WsError::ConnectionClosed | WsError::AlreadyClosed)) | None => {
                        return Err(None);
                    }
                    Some(Err(_)) => return Err(None),
                }
            },
            Pipe::Quic {
                connection,
                receive,
                reader,
                ..
            } => loop {
                if let Some(frame) = reader.pull().unwrap() {
                    break frame;
                }
                match receive.read_chunk(64 * 1024, true).await {
                    Ok(Some(chunk)) => reader.push(&chunk.bytes),
                    Ok(None) | Err(_) => {
                        return Err(match connection.closed().await {
                            quinn::ConnectionError::ApplicationClosed(close) => {
                                Code::from_quic_close(close.error_code.into_inner())
                            }
                            _ => None,
                        });
                    }
                }
            },
        };
        match self.codec.decode_server(&frame) {
            Ok(Decoded::Frame(frame)) => Ok(frame),
            other => panic!("the server said {other:?}"),
        }
    }

    /// The next frame.
    pub async fn next(&mut self) -> ServerFrame {
        self.hear().await.expect("a frame")
    }

    /// Hears an `error` with this code, and then the close with the same.
    pub async fn refused_with(&mut self, code: Code) {
        match self.next().await {
            ServerFrame::Error(error) => {
                assert_eq!(error.known_code(), Some(code), "{error:?}");
                assert_eq!(error.retry, code.retry());
            }
            other => panic!("{other:?} instead of {code}"),
        }
        self.closed_with(code).await;
    }

    /// Hears nothing more but the close with this code.
    pub async fn closed_with(&mut self, code: Code) {
        match self.hear().await {
            Err(closed) => assert_eq!(closed, Some(code)),
            Ok(frame) => panic!("{frame:?} instead of a close with {code}"),
        }
    }
}

/// A network between a QUIC device and its server that can be cut.
pub struct Network {
    near: SocketAddr,
    retries: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Network {
    pub async fn to(server: SocketAddr) -> Network {
        let near = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let far = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        far.connect(server).await.unwrap();
        let address = near.local_addr().unwrap();
        let retries = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&retries);
        let task = tokio::spawn(async move {
            let (mut up, mut down) = ([0; 2_048], [0; 2_048]);
            let mut device = None;
            loop {
                tokio::select! {
                    received = near.recv_from(&mut up) => {
                        let (length, from) = received.unwrap();
                        device = Some(from);
                        far.send(&up[..length]).await.unwrap();
                    }
                    received = far.recv(&mut down) => {
                        let length = received.unwrap();
                        // A long header of type Retry (RFC 9000 section 17.2.5).
                        if down[0] >> 4 == 0b1111 {
                            seen.fetch_add(1, Ordering::SeqCst);
                        }
                        near.send_to(&down[..length], device.unwrap()).await.unwrap();
                    }
                }
            }
        });
        Network {
            near: address,
            retries,
            task,
        }
    }

    /// Where the device connects to.
    pub fn near(&self) -> SocketAddr {
        self.near
    }

    /// How often the server asked for a proof of address.
    pub fn retries(&self) -> usize {
        self.retries.load(Ordering::SeqCst)
    }

    /// From now on, nothing gets through.
    pub async fn cut(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// The id of a test device.
pub fn id(id: u8) -> DeviceId {
    DeviceId([id; 16])
}

/// A hello of a test device.
pub fn hello(id: u8, secret: &str) -> Hello {
    Hello {
        device: Id([id; 16]),
        secret: Some(secret.into()),
        instance: Id([9; 16]),
        attempt: 1,
        seen: Vec::new(),
        window: Some(16),
        min_urgency: None,
        agent: None,
    }
}
