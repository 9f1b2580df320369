//! The floor under a connection: a server that only accepts connections and keeps them, on the same libraries with the same
//! certificates and limits, without hello, mailboxes or anything else of Bellwire. It runs as a child process of this
//! program, so that its memory and time are its own.

use std::io::{Read as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use bellwire_protocol::ALPN;
use futures_util::StreamExt;
use quinn::crypto::rustls::QuicServerConfig;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWrite, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;

use crate::failure::{During, Failure, Outcome};
use crate::tls::Identity;

/// How long the child may take to listen.
const START_MAX: Duration = Duration::from_secs(30);

/// How long the child may take to end after its input has.
const STOP_MAX: Duration = Duration::from_secs(10);

/// Most bytes that it reads of a frame; a device that is idle says next to nothing.
const FRAME_MAX_BYTES: usize = 16 * 1024;

/// Flow control of a QUIC stream, bytes.
const STREAM_WINDOW_BYTES: u32 = 4 * 1024;

/// Out-of-order handshake data of a QUIC connection, bytes.
const CRYPTO_BUFFER_BYTES: usize = 8 * 1024;

/// Read buffer of a WebSocket, bytes.
const READ_BUFFER_BYTES: usize = 128;

/// Buffers asked of the system for UDP, in bytes; as the server asks.
const UDP_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Connections that the system holds ready for accepting.
const BACKLOG: i32 = 4_096;

/// Accept connections and keep them, until standard input ends
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FloorServer {
    /// What to accept
    #[arg(long, value_enum)]
    pub(crate) carrier: FloorCarrier,
}

/// What a floor server accepts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum FloorCarrier {
    Quic,
    Websocket,
    /// WebSocket without TLS.
    Plain,
}

/// What it tells its parent.
#[derive(Debug, Serialize, Deserialize)]
struct Told {
    address: SocketAddr,
    authority: String,
}

// ---- The parent's side ---------------------------------------------------------------------------------------------

/// A floor server that runs. Dropping it kills it.
pub(crate) struct Floor {
    child: Child,
    pub(crate) address: SocketAddr,
    /// The authority of its certificate, PEM.
    pub(crate) authority: Vec<u8>,
}

impl Floor {
    pub(crate) async fn start(carrier: FloorCarrier) -> Outcome<Floor> {
        let program: PathBuf = std::env::current_exe().during("find this program's own path")?;
        let carrier = match carrier {
            FloorCarrier::Quic => "quic",
            FloorCarrier::Websocket => "websocket",
            FloorCarrier::Plain => "plain",
        };
        let mut child = Command::new(program)
            .args(["floor-server", "--carrier", carrier])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .during("start the floor server")?;
        let output = child
            .stdout
            .take()
            .ok_or_else(|| Failure::new("the floor server has no output"))?;
        let mut line = String::new();
        timeout(START_MAX, BufReader::new(output).read_line(&mut line))
            .await
            .map_err(|_| Failure::new("the floor server was not ready within 30 s"))?
            .during("hear of the floor server")?;
        let told: Told = serde_json::from_str(&line).during("understand the floor server")?;
        Ok(Floor {
            child,
            address: told.address,
            authority: told.authority.into_bytes(),
        })
    }

    pub(crate) fn pid(&self) -> Outcome<u32> {
        self.child
            .id()
            .ok_or_else(|| Failure::new("the floor server ended early"))
    }

    pub(crate) async fn stop(mut self) {
        drop(self.child.stdin.take());
        if timeout(STOP_MAX, self.child.wait()).await.is_err() {
            // Dropping would kill it as well; here it is waited for.
            let _ = self.child.kill().await;
        }
    }
}

// ---- The child's side ----------------------------------------------------------------------------------------------

/// Runs until the parent is gone.
pub(crate) async fn serve(args: FloorServer) -> Outcome<()> {
    crate::process::raise_file_limit();
    let identity = Identity::fresh()?;
    let address = match args.carrier {
        FloorCarrier::Websocket => websocket(Some(identity.server()?))?,
        FloorCarrier::Plain => websocket(None)?,
        FloorCarrier::Quic => quic(identity.server()?)?,
    };
    let told = Told {
        address,
        authority: identity.authority,
    };
    let mut line = serde_json::to_string(&told).during("tell the parent")?;
    line.push('\n');
    std::io::stdout()
        .write_all(line.as_bytes())
        .during("tell the parent")?;
    parent_gone().await
}

/// Waits until standard input ends, which it does with the parent, however that ends.
async fn parent_gone() -> Outcome<()> {
    // A thread of its own, because nobody waits for it at the end.
    let (ended, end) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        let _ = ended.send(());
    });
    end.await.during("wait for the parent")
}

/// A TCP listener on a free port of loopback.
pub(super) fn listen() -> Outcome<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)
        .during("make a socket")?;
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&any.into()).during("bind a socket")?;
    socket.listen(BACKLOG).during("listen")?;
    socket.set_nonblocking(true).during("set an option")?;
    TcpListener::from_std(socket.into()).during("listen")
}

fn websocket(tls: Option<rustls::ServerConfig>) -> Outcome<SocketAddr> {
    let listener = listen()?;
    let address = listener.local_addr().during("find the port")?;
    let acceptor = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            if tcp.set_nodelay(true).is_err() {
                continue;
            }
            // What fails here fails at the client as well, and is reported there.
            match acceptor.clone() {
                Some(acceptor) => drop(tokio::spawn(accept_tls(tcp, acceptor))),
                None => drop(tokio::spawn(accept_websocket(tcp))),
            }
        }
    });
    Ok(address)
}

async fn accept_tls(tcp: TcpStream, acceptor: TlsAcceptor) {
    if let Ok(stream) = acceptor.accept(tcp).await {
        accept_websocket(Box::new(stream)).await;
    }
}

async fn accept_websocket<S>(stream: S)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let config = WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(0)
        .max_message_size(Some(FRAME_MAX_BYTES))
        .max_frame_size(Some(FRAME_MAX_BYTES));
    let accepted = tokio_tungstenite::accept_async_with_config(stream, Some(config)).await;
    if let Ok(mut socket) = accepted {
        // A fresh task, because this one keeps the size of the handshake.
        tokio::spawn(async move { while let Some(Ok(_)) = socket.next().await {} });
    }
}

fn quic(tls: rustls::ServerConfig) -> Outcome<SocketAddr> {
    let endpoint = endpoint(tls, None)?;
    let address = endpoint.local_addr().during("find the port")?;
    tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            tokio::spawn(accept_quic(incoming));
        }
    });
    Ok(address)
}

/// A QUIC endpoint on a free port of loopback, with the server's limits. `unacknowledged`: bytes that a connection may have
/// written before the other side acknowledges some.
pub(super) fn endpoint(
    mut tls: rustls::ServerConfig,
    unacknowledged: Option<u64>,
) -> Outcome<quinn::Endpoint> {
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).during("set up QUIC")?;
    let mut transport = quinn::TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(1u32.into())
        .max_concurrent_uni_streams(0u32.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(STREAM_WINDOW_BYTES.into())
        .max_idle_timeout(None)
        .datagram_receive_buffer_size(None)
        .datagram_send_buffer_size(0)
        .mtu_discovery_config(None)
        // With it a connection keeps a buffer for ten packets for good.
        .enable_segmentation_offload(false)
        .crypto_buffer_size(CRYPTO_BUFFER_BYTES);
    if let Some(bytes) = unacknowledged {
        transport.send_window(bytes);
    }
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport));
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::DGRAM, None)
        .during("make a socket")?;
    let _ = socket.set_recv_buffer_size(UDP_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(UDP_BUFFER_BYTES);
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    socket.bind(&any.into()).during("bind a socket")?;
    quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        Some(config),
        socket.into(),
        Arc::new(quinn::TokioRuntime),
    )
    .during("start a QUIC endpoint")
}

async fn accept_quic(incoming: quinn::Incoming) {
    let Ok(connection) = incoming.await else {
        return;
    };
    let Ok((send, mut receive)) = connection.accept_bi().await else {
        return;
    };
    tokio::spawn(async move {
        let mut scratch = [0; 64];
        while let Ok(Some(_)) = receive.read(&mut scratch).await {}
        // Kept until the device is gone: letting go of the sending half would end the stream, and the device would leave.
        drop((send, connection));
    });
}
