//! Carriers: one link to the server, over QUIC or WebSocket, that takes and gives frames.

mod error;
mod proxy;
mod quic;
mod websocket;

use std::net::SocketAddr;
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, DecodeError, Decoded, DeviceFrame, ServerFrame};
use bytes::Bytes;
use futures_util::FutureExt;

pub use error::ConnectError;
pub use proxy::{ParseProxyError, Proxy};

use crate::endpoint::Endpoint;
use crate::race::staggered;
use crate::tls::{Tls, Trust, TrustError};

/// How long one carrier may take until frames can be sent: name look-up, TCP, TLS, upgrade.
pub const DIAL_TIMEOUT: Duration = Duration::from_secs(10);

/// How long the first address of a host has before the next one is tried beside it (RFC 8305 section 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);

/// Addresses of one host that are tried.
const ADDRESSES_MAX: usize = 8;

/// How long a farewell may take: what was sent must arrive, and the other side close.
const FAREWELL: Duration = Duration::from_secs(2);

/// A link that stands: TLS and, on WebSocket, the upgrade are done, nothing has been said.
///
/// [`receive`](Self::receive) may be dropped at any time without losing a frame.
#[derive(Debug)]
pub struct Link {
    inner: Inner,
    codec: Codec,
}

#[derive(Debug)]
enum Inner {
    Quic(Box<quic::QuicLink>),
    WebSocket(Box<websocket::WebSocketLink>),
}

/// How a link ended.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{detail}")]
pub struct LinkEnd {
    /// The close code, if it is one of ours.
    pub code: Option<Code>,
    /// What happened, for a log.
    pub detail: String,
}

impl LinkEnd {
    fn new(code: Option<Code>, detail: impl Into<String>) -> Self {
        Self {
            code,
            detail: detail.into(),
        }
    }
}

/// What came over a link: the bytes of one frame, or why they are none.
pub type Received = Result<Bytes, DecodeError>;

impl Link {
    fn quic(link: quic::QuicLink) -> Self {
        Self {
            inner: Inner::Quic(Box::new(link)),
            codec: Codec::Cbor,
        }
    }

    fn websocket(link: websocket::WebSocketLink, codec: Codec) -> Self {
        Self {
            inner: Inner::WebSocket(Box::new(link)),
            codec,
        }
    }

    /// What carries this link.
    pub fn carrier(&self) -> Carrier {
        match &self.inner {
            Inner::Quic(_) => Carrier::Quic,
            Inner::WebSocket(_) => Carrier::WebSocket,
        }
    }

    /// How frames are written on it.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The next frame, undecoded.
    ///
    /// # Errors
    /// When the link is over; asking again answers the same way.
    pub async fn receive_bytes(&mut self) -> Result<Received, LinkEnd> {
        match &mut self.inner {
            Inner::Quic(link) => link.receive().await,
            Inner::WebSocket(link) => link.receive(self.codec).await,
        }
    }

    /// The next frame.
    ///
    /// # Errors
    /// When the link is over; asking again answers the same way.
    pub async fn receive(&mut self) -> Result<Result<Decoded<ServerFrame>, DecodeError>, LinkEnd> {
        let bytes = self.receive_bytes().await?;
        Ok(bytes.and_then(|bytes| self.codec.decode_server(&bytes)))
    }

    /// Writes a frame into the buffer of the link; [`flush`](Self::flush) sends what was gathered.
    ///
    /// # Errors
    /// When the link is over.
    pub async fn feed(&mut self, frame: &DeviceFrame) -> Result<(), LinkEnd> {
        let bytes = self.codec.encode_device(frame);
        self.feed_bytes(bytes).await
    }

    /// Like [`feed`](Self::feed), for the bytes of one frame, whatever they are.
    ///
    /// # Errors
    /// When the link is over.
    pub async fn feed_bytes(&mut self, frame: Vec<u8>) -> Result<(), LinkEnd> {
        match &mut self.inner {
            Inner::Quic(link) => {
                link.feed(&frame);
                Ok(())
            }
            Inner::WebSocket(link) => link.feed(frame, self.codec).await,
        }
    }

    /// Sends what was gathered. It waits while the server does not read; the caller sets the limit.
    ///
    /// # Errors
    /// When the link is over.
    pub async fn flush(&mut self) -> Result<(), LinkEnd> {
        match &mut self.inner {
            Inner::Quic(link) => link.flush().await,
            Inner::WebSocket(link) => link.flush().await,
        }
    }

    /// Sends one frame at once.
    ///
    /// # Errors
    /// When the link is over.
    pub async fn send(&mut self, frame: &DeviceFrame) -> Result<(), LinkEnd> {
        self.feed(frame).await?;
        self.flush().await
    }

    /// Breaks the carrier's own rules, for tests of a server: on QUIC these bytes go into the stream without a length, on
    /// WebSocket they go as a message of the other kind (binary for JSON, text for CBOR; then they must be UTF-8).
    ///
    /// # Errors
    /// When the link is over, or text is no UTF-8.
    pub async fn send_against_the_rules(&mut self, bytes: &[u8]) -> Result<(), LinkEnd> {
        match &mut self.inner {
            Inner::Quic(link) => link.feed_unframed(bytes),
            Inner::WebSocket(link) => {
                let other = match self.codec {
                    Codec::Cbor => Codec::Json,
                    Codec::Json => Codec::Cbor,
                };
                link.feed(bytes.to_vec(), other).await?;
            }
        }
        self.flush().await
    }

    /// The network changed: on QUIC moves the connection to a new local socket, so that the session goes on (RFC 9000
    /// section 9). Answers false where that is impossible.
    pub fn rebind(&self) -> bool {
        match &self.inner {
            Inner::Quic(link) => link.rebind(),
            Inner::WebSocket(_) => false,
        }
    }

    /// Ends the link in good order: what was sent arrives, the other side is given two seconds to close. Answers with the
    /// code that the server closed with, if it did.
    pub async fn close(mut self, code: Code) -> Option<Code> {
        let farewell = async {
            self.flush().await.err().and_then(|end| end.code)?;
            None
        };
        let ended = tokio::time::timeout(FAREWELL, farewell)
            .await
            .ok()
            .flatten();
        if ended.is_some() {
            return ended;
        }
        match self.inner {
            Inner::Quic(link) => link.close(code, FAREWELL).await,
            Inner::WebSocket(link) => link.close(code, FAREWELL).await,
        }
    }
}

/// Makes links to one server. Cheap to clone; clones share TLS sessions.
#[derive(Debug, Clone)]
pub struct Dialer {
    endpoint: Endpoint,
    tls: Tls,
    codec: Codec,
    proxy: Option<Proxy>,
    shared: Option<quinn::Endpoint>,
}

impl Dialer {
    /// A dialer for this server. WebSocket speaks CBOR until [`with_codec`](Self::with_codec) says otherwise.
    ///
    /// # Errors
    /// When the authorities to trust cannot be read.
    pub fn new(endpoint: Endpoint, trust: &Trust) -> Result<Self, TrustError> {
        Ok(Self {
            endpoint,
            tls: Tls::new(trust)?,
            codec: Codec::Cbor,
            proxy: None,
            shared: None,
        })
    }

    /// The same dialer with this codec on WebSocket. QUIC always speaks CBOR.
    #[must_use]
    pub fn with_codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// The same dialer through this proxy; QUIC does not pass one.
    #[must_use]
    pub fn with_proxy(mut self, proxy: Option<Proxy>) -> Self {
        self.proxy = proxy;
        self
    }

    /// The same dialer with one UDP socket for all its QUIC connections, bound here. For load generators: a device has one
    /// connection, and a socket of its own lets [`Link::rebind`] move it.
    ///
    /// # Errors
    /// When the socket cannot be bound.
    pub fn with_shared_socket(mut self, local: SocketAddr) -> std::io::Result<Self> {
        self.shared = Some(quinn::Endpoint::client(local)?);
        Ok(self)
    }

    /// The server.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// The same dialer for another server.
    pub(crate) fn toward(&self, endpoint: Endpoint) -> Self {
        Self {
            endpoint,
            ..self.clone()
        }
    }

    /// Whether this carrier can be tried at all.
    pub(crate) fn offers(&self, carrier: Carrier) -> bool {
        match carrier {
            Carrier::Quic => self.endpoint.offers_quic() && self.proxy.is_none(),
            Carrier::WebSocket => true,
        }
    }

    /// Connects over one carrier, within [`DIAL_TIMEOUT`]. Nothing is said yet: only the winner of a race says `hello`.
    /// Dropping this future ends the attempt quietly.
    ///
    /// # Errors
    /// Why there is no link; [`ConnectError::advice`] says what to do.
    pub async fn dial(&self, carrier: Carrier) -> Result<Link, ConnectError> {
        let dialing = async {
            match carrier {
                Carrier::Quic => self.dial_quic().await,
                Carrier::WebSocket => self.dial_websocket().await,
            }
        };
        match tokio::time::timeout(DIAL_TIMEOUT, dialing).await {
            Ok(dialed) => dialed,
            Err(_) => Err(ConnectError::Timeout {
                carrier,
                to: self.endpoint.authority(),
            }),
        }
    }

    async fn dial_quic(&self) -> Result<Link, ConnectError> {
        let addresses = resolve(self.endpoint.host(), self.endpoint.port()).await?;
        let mut dials = Vec::with_capacity(addresses.len());
        for address in addresses {
            let Self {
                endpoint,
                tls,
                shared,
                ..
            } = self.clone();
            dials.push(
                async move { quic::dial(&endpoint, address, &tls, shared.as_ref()).await }.boxed(),
            );
        }
        let link = first(staggered(dials, NEXT_ADDRESS_AFTER).await, &self.endpoint)?;
        Ok(Link::quic(link))
    }

    async fn dial_websocket(&self) -> Result<Link, ConnectError> {
        let stream = match &self.proxy {
            Some(proxy) => proxy.tunnel(&self.endpoint).await?,
            None => tcp(self.endpoint.host(), self.endpoint.port()).await?,
        };
        let link = websocket::upgrade(&self.endpoint, stream, &self.tls, self.codec).await?;
        Ok(Link::websocket(link, self.codec))
    }
}

/// The addresses of a host, in the order of the resolver.
async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
    let failed = |source| ConnectError::Resolve {
        host: host.to_owned(),
        source,
    };
    let addresses = tokio::net::lookup_host((host, port))
        .await
        .map_err(failed)?;
    let addresses: Vec<_> = addresses.take(ADDRESSES_MAX).collect();
    if addresses.is_empty() {
        return Err(failed(std::io::Error::other("the name has no address")));
    }
    Ok(addresses)
}

/// A TCP connection to the first address that answers.
async fn tcp(host: &str, port: u16) -> Result<tokio::net::TcpStream, ConnectError> {
    let addresses = resolve(host, port).await?;
    let mut dials = Vec::with_capacity(addresses.len());
    for address in addresses {
        dials.push(tcp_to(address).boxed());
    }
    match staggered(dials, NEXT_ADDRESS_AFTER).await {
        Ok((_, stream)) => Ok(stream),
        Err(failures) => Err(telling(failures, host)),
    }
}

async fn tcp_to(address: SocketAddr) -> Result<tokio::net::TcpStream, ConnectError> {
    let failed = |source| ConnectError::Tcp { address, source };
    let stream = tokio::net::TcpStream::connect(address)
        .await
        .map_err(failed)?;
    // Verdicts are small and must not wait for company.
    stream.set_nodelay(true).map_err(failed)?;
    Ok(stream)
}

fn first<T>(
    raced: Result<(usize, T), Vec<ConnectError>>,
    endpoint: &Endpoint,
) -> Result<T, ConnectError> {
    match raced {
        Ok((_, link)) => Ok(link),
        Err(failures) => Err(telling(failures, endpoint.host())),
    }
}

/// The failure that tells most: one that came from the server rather than from the network, else the first.
fn telling(failures: Vec<ConnectError>, host: &str) -> ConnectError {
    let mut failures = failures.into_iter();
    let nothing_tried = || ConnectError::Resolve {
        host: host.to_owned(),
        source: std::io::Error::other("the name has no address"),
    };
    let first = failures.next().unwrap_or_else(nothing_tried);
    if first.is_from_server() {
        return first;
    }
    failures.find(ConnectError::is_from_server).unwrap_or(first)
}
