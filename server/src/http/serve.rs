//! Carrying a [`Site`] on a listener: connections in, bounded and told apart from one another; a graceful end.
//!
//! Plain connections speak HTTP/1.1; TLS ones what ALPN agreed on. The protocol is never guessed from the first bytes,
//! because a guesser waits for them without a deadline.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::{counter, gauge};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::Site;
use super::again::again;
use crate::telemetry::metrics::{HTTP_CONNECTION_ERRORS_TOTAL, HTTP_CONNECTIONS};

/// What a TLS configuration for these listeners offers, best first.
pub const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// Gives the TLS configuration for the next connection, so that certificates can change while serving.
pub type TlsSource = Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>;

/// How long a request's head may take to arrive, and how long a connection may be idle between two requests. Longer than
/// the pools of usual HTTP clients keep a connection that they will use again (60 s and less), so that it is the client
/// who closes: a request that crosses our close on the wire looks like a failure to its sender.
const HEAD_TIME: Duration = Duration::from_secs(75);

/// How long a TLS handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(10);

/// Most headers of a request.
const HEADERS_MAX: usize = 64;

/// Largest head of a request, bytes, and largest piece read at once. The longest head that makes sense has an
/// idempotency key, an API key and what proxies add.
const HEAD_MAX: usize = 32 << 10;

/// Requests that one HTTP/2 connection may have open at once.
const STREAMS_MAX: u32 = 256;

/// How often a silent HTTP/2 connection is asked whether somebody is there, and how long it may take to say so.
const HTTP2_KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(15));

/// Waits after a failure to accept for lack of something (descriptors, memory): first and longest.
const ACCEPT_PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// A listener and how to serve on it.
pub struct Listening {
    /// Bound and listening.
    pub listener: TcpListener,
    /// `None`: plain HTTP.
    pub tls: Option<TlsSource>,
    /// `api` or `operations`, for logs and metrics.
    pub name: &'static str,
    /// Places of connections that are served at once; more wait in the system's queue.
    pub places: Places,
    /// How long requests may go on after the shutdown began.
    pub drain: Duration,
}

/// Places of connections. Clones share them.
#[derive(Debug, Clone)]
pub struct Places {
    free: Arc<Semaphore>,
    max: usize,
}

impl Places {
    /// So many, at least one. Default in the configuration: 4,096.
    #[must_use]
    pub fn new(max: usize) -> Places {
        let max = max.clamp(1, Semaphore::MAX_PERMITS);
        Places {
            free: Arc::new(Semaphore::new(max)),
            max,
        }
    }

    /// How many there are.
    #[must_use]
    pub fn max(&self) -> usize {
        self.max
    }

    /// How many are taken: one of them is held ready for the next connection while the listener accepts.
    #[must_use]
    pub fn taken(&self) -> usize {
        self.max.saturating_sub(self.free.available_permits())
    }
}

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServeReport {
    /// Connections that were still busy when the time was over, and were cut.
    pub cut: usize,
}

/// Serves until `shutdown` is cancelled, then lets open requests end within the drain time.
pub async fn serve(listening: Listening, site: Site, shutdown: CancellationToken) -> ServeReport {
    let Listening {
        listener,
        tls,
        name,
        places,
        drain,
    } = listening;
    let places = places.free;
    let tracker = TaskTracker::new();
    let cut = CancellationToken::new();
    let mut pause = ACCEPT_PAUSE.0;
    // Whether the last connection had to wait for a place: said once, not for each.
    let mut full = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.cancelled() => break,
            accepted = accept(&listener, &places, name, &mut full) => accepted,
        };
        match accepted {
            Ok((stream, peer, place)) => {
                pause = ACCEPT_PAUSE.0;
                tracker.spawn(again(connection(
                    stream,
                    peer,
                    tls.as_ref().map(|source| source()),
                    site.clone(),
                    Ends {
                        shutdown: shutdown.clone(),
                        cut: cut.child_token(),
                    },
                    Counted::new(name, place),
                )));
            }
            Err(error) if of_one_connection(&error) => {}
            Err(error) => {
                // Out of descriptors or memory: what is being served goes on, and accepting is tried again.
                count_error(name, "accept");
                tracing::warn!(listener = name, %error, pause_ms = pause.as_millis(), "cannot accept connections");
                tokio::select! {
                    () = shutdown.cancelled() => break,
                    () = tokio::time::sleep(pause) => {}
                }
                pause = (pause * 2).min(ACCEPT_PAUSE.1);
            }
        }
    }
    drop(listener);
    tracker.close();
    if tokio::time::timeout(drain, tracker.wait()).await.is_ok() {
        return ServeReport { cut: 0 };
    }
    let left = tracker.len();
    tracing::warn!(
        listener = name,
        connections = left,
        "requests did not end in time and are cut"
    );
    cut.cancel();
    tracker.wait().await;
    ServeReport { cut: left }
}

async fn accept(
    listener: &TcpListener,
    places: &Arc<Semaphore>,
    name: &'static str,
    full: &mut bool,
) -> io::Result<(TcpStream, SocketAddr, OwnedSemaphorePermit)> {
    let place = match Arc::clone(places).try_acquire_owned() {
        Ok(place) => {
            *full = false;
            place
        }
        Err(_) => {
            count_error(name, "full");
            if !*full {
                tracing::warn!(listener = name, "all connections are taken; new ones wait");
            }
            *full = true;
            Arc::clone(places)
                .acquire_owned()
                .await
                .map_err(io::Error::other)?
        }
    };
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, place))
}

/// Errors of `accept` that concern only the connection that was to be accepted.
fn of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

fn count_error(name: &'static str, reason: &'static str) {
    counter!(HTTP_CONNECTION_ERRORS_TOTAL, "listener" => name, "reason" => reason).increment(1);
}

/// A connection's place among [`Listening::places`], and in the metrics.
struct Counted {
    name: &'static str,
    _place: OwnedSemaphorePermit,
}

impl Counted {
    fn new(name: &'static str, place: OwnedSemaphorePermit) -> Counted {
        gauge!(HTTP_CONNECTIONS, "listener" => name).increment(1);
        Counted {
            name,
            _place: place,
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        gauge!(HTTP_CONNECTIONS, "listener" => self.name).decrement(1);
    }
}

/// Cuts the connection that a request came over: for an answer that nobody takes.
#[derive(Debug, Clone)]
pub(super) struct Cut(pub(super) CancellationToken);

/// How a connection is told to end.
struct Ends {
    /// After the requests that are open.
    shutdown: CancellationToken,
    /// Now.
    cut: CancellationToken,
}

async fn connection(
    stream: TcpStream,
    peer: SocketAddr,
    tls: Option<Arc<ServerConfig>>,
    site: Site,
    ends: Ends,
    counted: Counted,
) {
    // An answer is written in one piece; waiting to send more with it only makes it late. Failure costs speed only.
    let _ = stream.set_nodelay(true);
    let name = counted.name;
    let ended = match tls {
        None => speak_http1(stream, site, &ends).await,
        Some(config) => {
            let handshake = TlsAcceptor::from(config).accept(stream);
            let handshake = tokio::select! {
                () = ends.shutdown.cancelled() => return,
                handshake = tokio::time::timeout(HANDSHAKE_TIME, handshake) => handshake,
            };
            match handshake {
                Ok(Ok(stream)) if stream.get_ref().1.alpn_protocol() == Some(ALPN[0]) => {
                    speak_http2(stream, site, &ends).await
                }
                Ok(Ok(stream)) => speak_http1(stream, site, &ends).await,
                Ok(Err(error)) => {
                    count_error(name, "tls");
                    tracing::debug!(listener = name, %peer, %error, "the TLS handshake failed");
                    return;
                }
                Err(_) => {
                    count_error(name, "tls");
                    tracing::debug!(listener = name, %peer, "the TLS handshake took too long");
                    return;
                }
            }
        }
    };
    if let Err(error) = ended {
        // Broken off, no HTTP, or a head that did not come: the peer's affair.
        count_error(name, "http");
        tracing::debug!(listener = name, %peer, %error, "the connection ended early");
    }
}

async fn speak_http1(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    site: Site,
    ends: &Ends,
) -> hyper::Result<()> {
    let cut = Cut(ends.cut.clone());
    let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(cut.clone());
        let site = site.clone();
        async move { Ok::<_, Infallible>(site.answer(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEAD_MAX)
        .half_close(false)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = ends.cut.cancelled() => return Ok(()),
        () = ends.shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        ended = connection => ended,
        () = ends.cut.cancelled() => Ok(()),
    }
}

async fn speak_http2(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    site: Site,
    ends: &Ends,
) -> hyper::Result<()> {
    let cut = Cut(ends.cut.clone());
    let service = service_fn(move |mut request: http::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(cut.clone());
        let site = site.clone();
        async move { Ok::<_, Infallible>(site.answer(request).await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_MAX as u32)
        .keep_alive_interval(HTTP2_KEEP_ALIVE.0)
        .keep_alive_timeout(HTTP2_KEEP_ALIVE.1)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return ended,
        () = ends.cut.cancelled() => return Ok(()),
        () = ends.shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        ended = connection => ended,
        () = ends.cut.cancelled() => Ok(()),
    }
}
