//! Carriers: one link to the server, over QUIC or WebSocket, that takes and gives frames.

mod error;
mod memory;
mod proxy;
mod quic;
mod websocket;

use std::net::SocketAddr;
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec, DecodeError, Decoded, DeviceFrame, ServerFrame};
use bytes::Bytes;
use futures_util::FutureExt;
use tokio_rustls::client::TlsStream;

pub use error::ConnectError;
pub(crate) use memory::{Door, MemoryLink};
pub(crate) use proxy::Pipe;
pub use proxy::{EnvironmentProxyError, ParseProxyError, Proxy, ProxyFault};
pub(crate) use proxy::{Exceptions, from_environment};

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
    Memory(Box<MemoryLink>),
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

    fn memory(link: MemoryLink) -> Self {
        Self {
            codec: link.codec,
            inner: Inner::Memory(Box::new(link)),
        }
    }

    /// What carries this link.
    pub fn carrier(&self) -> Carrier {
        match &self.inner {
            Inner::Quic(_) => Carrier::Quic,
            Inner::WebSocket(_) => Carrier::WebSocket,
            Inner::Memory(link) => link.carrier,
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
            Inner::Memory(link) => link.receive().await,
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
            Inner::Memory(link) => {
                link.feed(frame);
                Ok(())
            }
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
            Inner::Memory(link) => link.flush().await,
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
            Inner::Memory(link) => link.feed(bytes.to_vec()),
        }
        self.flush().await
    }

    /// The network changed: on QUIC moves the connection to a new local socket, so that the session goes on (RFC 9000
    /// section 9). Answers false where that is impossible.
    pub fn rebind(&self) -> bool {
        match &self.inner {
            Inner::Quic(link) => link.rebind(),
            Inner::WebSocket(_) => false,
            // Nothing in memory depends on an address.
            Inner::Memory(link) => link.carrier == Carrier::Quic,
        }
    }

    /// How often the server has found us at another address. It rises when we moved ([`rebind`](Self::rebind)), and also when
    /// a router had forgotten our flow and made a new one of our next packet: QUIC hides that from both sides otherwise. Always
    /// 0 where an address cannot change.
    pub(crate) fn address_checks(&self) -> u64 {
        match &self.inner {
            Inner::Quic(link) => link.address_checks(),
            Inner::WebSocket(_) => 0,
            Inner::Memory(link) => link.address_checks(),
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
            Inner::Memory(link) => link.close(code, FAREWELL).await,
        }
    }
}

/// One way to the server: a carrier, and whether it goes through the proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) carrier: Carrier,
    pub(crate) by_proxy: bool,
}

/// A proxy, and when it is used.
#[derive(Debug, Clone)]
pub(crate) struct ProxyUse {
    pub(crate) proxy: Proxy,
    /// Servers that are reached without it.
    pub(crate) except: Exceptions,
    /// The direct ways are tried as well; what works is remembered for the network.
    pub(crate) when_needed: bool,
}

impl ProxyUse {
    /// Always, for every server.
    pub(crate) fn always(proxy: Proxy) -> Self {
        Self {
            proxy,
            except: Exceptions::default(),
            when_needed: false,
        }
    }
}

/// Makes links to one server. Cheap to clone; clones share TLS sessions.
#[derive(Debug, Clone)]
pub struct Dialer {
    endpoint: Endpoint,
    tls: Tls,
    codec: Codec,
    proxy: Option<ProxyUse>,
    shared: Option<quinn::Endpoint>,
    /// For tests: links in memory in the place of all others.
    memory: Option<Door>,
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
            memory: None,
        })
    }

    /// A dialer whose links are in memory.
    pub(crate) fn in_memory(endpoint: Endpoint, door: Door) -> Result<Self, TrustError> {
        Ok(Self {
            endpoint,
            tls: Tls::of_nobody()?,
            codec: Codec::Cbor,
            proxy: None,
            shared: None,
            memory: Some(door),
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
        self.proxy = proxy.map(ProxyUse::always);
        self
    }

    /// The same dialer with a proxy that is used only where [`dial`](Self::dial) cannot do without: for diagnosis.
    #[must_use]
    pub fn with_proxy_when_needed(mut self, proxy: Proxy) -> Self {
        self.proxy = Some(ProxyUse {
            when_needed: true,
            ..ProxyUse::always(proxy)
        });
        self
    }

    /// The same dialer through the proxy that the environment names, if it does.
    ///
    /// # Errors
    /// When what it names is no proxy.
    pub fn with_proxy_from_environment(mut self) -> Result<Self, EnvironmentProxyError> {
        self.proxy = from_environment()?.map(|(proxy, except)| ProxyUse {
            except,
            ..ProxyUse::always(proxy)
        });
        Ok(self)
    }

    pub(crate) fn with_proxy_use(mut self, proxy: Option<ProxyUse>) -> Self {
        self.proxy = proxy;
        self
    }

    /// The same dialer with these authorities for a proxy that speaks TLS, in the place of the server's.
    ///
    /// # Errors
    /// When they cannot be read.
    pub fn with_proxy_trust(mut self, trust: &Trust) -> Result<Self, TrustError> {
        self.tls = self.tls.with_proxy_trust(trust)?;
        Ok(self)
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

    /// Whether QUIC may be tried: not through a proxy, and not for a `wss://` address.
    pub fn offers_quic(&self) -> bool {
        self.routes()
            .iter()
            .any(|route| route.carrier == Carrier::Quic)
    }

    /// The proxy for this server, if one is to be used.
    pub(crate) fn proxy(&self) -> Option<&ProxyUse> {
        self.proxy
            .as_ref()
            .filter(|used| !used.except.name(&self.endpoint))
    }

    /// Every way that can be tried at all, QUIC first. QUIC does not pass a proxy.
    pub(crate) fn routes(&self) -> Vec<Route> {
        let (direct, by_proxy) = match self.proxy() {
            None => (true, false),
            Some(used) => (used.when_needed, true),
        };
        let quic = direct && self.endpoint.offers_quic();
        let all = [
            (quic, Carrier::Quic, false),
            (direct, Carrier::WebSocket, false),
            (by_proxy, Carrier::WebSocket, true),
        ];
        let offered = all.into_iter().filter(|(offered, ..)| *offered);
        offered
            .map(|(_, carrier, by_proxy)| Route { carrier, by_proxy })
            .collect()
    }

    /// Connects over one carrier, within [`DIAL_TIMEOUT`]; WebSocket goes through the proxy if there is one. Nothing is said
    /// yet: only the winner of a race says `hello`. Dropping this future ends the attempt quietly.
    ///
    /// # Errors
    /// Why there is no link; [`ConnectError::advice`] says what to do.
    pub async fn dial(&self, carrier: Carrier) -> Result<Link, ConnectError> {
        let by_proxy = carrier == Carrier::WebSocket && self.proxy().is_some();
        self.dial_route(Route { carrier, by_proxy }).await
    }

    pub(crate) async fn dial_route(&self, route: Route) -> Result<Link, ConnectError> {
        if let Some(door) = &self.memory {
            let codec = match route.carrier {
                Carrier::Quic => Codec::Cbor,
                Carrier::WebSocket => self.codec,
            };
            return door.dial(route, codec).map(Link::memory);
        }
        let dialing = async {
            match route.carrier {
                Carrier::Quic => self.dial_quic().await,
                Carrier::WebSocket => self.dial_websocket(route.by_proxy).await,
            }
        };
        match tokio::time::timeout(DIAL_TIMEOUT, dialing).await {
            Ok(dialed) => dialed,
            Err(_) => Err(ConnectError::Timeout {
                carrier: route.carrier,
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

    async fn dial_websocket(&self, by_proxy: bool) -> Result<Link, ConnectError> {
        let stream = self.open_pipe(by_proxy).await?;
        let stream = self.secure(stream).await?;
        self.upgrade(stream).await
    }

    /// The steps of WebSocket one by one, for whoever wants to know which one fails: TCP, through the proxy or not.
    pub(crate) async fn open_pipe(&self, by_proxy: bool) -> Result<Pipe, ConnectError> {
        match self.proxy.as_ref().filter(|_| by_proxy) {
            Some(used) => used.proxy.tunnel(&self.endpoint, &self.tls).await,
            None => {
                let stream = tcp(self.endpoint.host(), self.endpoint.port()).await?;
                Ok(tokio_util::either::Either::Left(stream))
            }
        }
    }

    /// TLS.
    pub(crate) async fn secure(&self, pipe: Pipe) -> Result<TlsStream<Pipe>, ConnectError> {
        websocket::secure(&self.endpoint, pipe, &self.tls).await
    }

    /// The WebSocket handshake.
    pub(crate) async fn upgrade(&self, stream: TlsStream<Pipe>) -> Result<Link, ConnectError> {
        let link = websocket::upgrade(&self.endpoint, stream, self.codec).await?;
        Ok(Link::websocket(link, self.codec))
    }
}

/// The addresses of a host, in the order of the resolver.
pub(crate) async fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, ConnectError> {
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
