//! One connection at a time to one receiver, over HTTP/1.1.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, RETRY_AFTER, USER_AGENT};
use http::{HeaderName, HeaderValue, Method, Request, Response};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;

use super::rules::{Host, Place, Rules};
use super::{Caller, Ways};
use crate::ports::{OutboundLine, Post, PostAnswer, PostError, Posting, UrlRefusal};

/// Longest time for looking a name up.
const LOOKUP_MAX: Duration = Duration::from_secs(5);
/// Longest time for connecting to one address.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest time for TLS to agree.
const TLS_MAX: Duration = Duration::from_secs(5);
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 4;
/// Bytes of an answer that are read, so that the connection can be used again. Nobody looks at them.
const ANSWER_MAX: usize = 64 << 10;

/// See the module.
pub(super) struct Line {
    caller: Arc<Caller>,
    open: Option<Open>,
}

/// A connection that can be used again.
struct Open {
    tls: bool,
    authority: String,
    address: IpAddr,
    sender: SendRequest<Full<Bytes>>,
    _task: Task,
}

/// The task that moves the bytes of a connection; it ends with whoever holds this.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl OutboundLine for Line {
    fn post<'a>(&'a mut self, post: &'a Post) -> Posting<'a> {
        Box::pin(self.run(post))
    }
}

impl Line {
    pub(super) fn new(caller: Arc<Caller>) -> Line {
        Line { caller, open: None }
    }

    async fn run(&mut self, post: &Post) -> Result<PostAnswer, PostError> {
        let ways = self.caller.now.load_full();
        let place = ways.rules.place(&post.url).map_err(|refusal| {
            PostError::NotAllowed(match refusal {
                UrlRefusal::Off => "callbacks are off (`callbacks.allow` is empty)".to_owned(),
                UrlRefusal::Malformed(why) => format!("the address must be {why}"),
                UrlRefusal::NotAllowed(why) => why,
            })
        })?;
        // Taken out, so that a connection in the middle of something ends with this future.
        let kept = self.open.take().filter(|open| {
            open.tls == place.tls
                && open.authority == place.authority
                && ways.rules.may_reach(&place, open.address)
        });
        if let Some(mut open) = kept
            && open.sender.ready().await.is_ok()
        {
            match exchange(&mut open, &place, post, &ways).await {
                // Closed while nobody looked: as if there had been none.
                Err(Ended::Stale) => {}
                Err(Ended::With(error)) => return Err(error),
                Ok((answer, reusable)) => {
                    self.open = reusable.then_some(open);
                    return Ok(answer);
                }
            }
        }
        let mut open = connect(&place, &ways).await?;
        let (answer, reusable) =
            exchange(&mut open, &place, post, &ways)
                .await
                .map_err(|ended| match ended {
                    Ended::Stale => {
                        PostError::Broken("the connection was closed before the answer".to_owned())
                    }
                    Ended::With(error) => error,
                })?;
        self.open = reusable.then_some(open);
        Ok(answer)
    }
}

/// Waits, but not for ever.
async fn within<T>(
    after: Duration,
    phase: &'static str,
    work: impl Future<Output = T>,
) -> Result<T, PostError> {
    tokio::time::timeout(after, work)
        .await
        .map_err(|_| PostError::Timeout { phase, after })
}

/// The addresses of a host that may be connected to.
async fn addresses(place: &Place, rules: &Rules) -> Result<Vec<SocketAddr>, PostError> {
    let name = match &place.host {
        // It was checked with the URL.
        Host::Address(address) => return Ok(vec![SocketAddr::new(*address, place.port)]),
        Host::Name(name) => name,
    };
    let found = within(
        LOOKUP_MAX,
        "looking the name up",
        tokio::net::lookup_host((name.as_str(), place.port)),
    )
    .await?
    .map_err(|error| PostError::Lookup(error.to_string()))?;
    let found: Vec<SocketAddr> = found.collect();
    let allowed: Vec<SocketAddr> = found
        .iter()
        .copied()
        .filter(|address| rules.may_reach(place, address.ip()))
        .take(ADDRESSES_MAX)
        .collect();
    match (allowed.is_empty(), found.first()) {
        (false, _) => Ok(allowed),
        (true, Some(kept)) => Err(PostError::NotAllowed(format!(
            "{name} leads to {}, which is no public address, and none of the networks of `callbacks.allow` has it with port {}",
            kept.ip(),
            place.port
        ))),
        (true, None) => Err(PostError::Lookup("it has no address".to_owned())),
    }
}

async fn connect(place: &Place, ways: &Ways) -> Result<Open, PostError> {
    let mut failure = PostError::Lookup("it has no address".to_owned());
    for address in addresses(place, &ways.rules).await? {
        let stream = match within(CONNECT_MAX, "connecting", TcpStream::connect(address)).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(error)) => {
                failure = PostError::Connect(error.to_string());
                continue;
            }
            Err(error) => {
                failure = error;
                continue;
            }
        };
        // A batch is one write.
        let _ = stream.set_nodelay(true);
        if !place.tls {
            return speak(stream, place, address.ip()).await;
        }
        let Some(config) = &ways.tls else {
            return Err(PostError::Tls("no authorities are known".to_owned()));
        };
        let name = match &place.host {
            Host::Address(address) => ServerName::IpAddress((*address).into()),
            Host::Name(name) => ServerName::try_from(name.clone())
                .map_err(|_| PostError::Tls("the host is no name for TLS".to_owned()))?,
        };
        let connector = TlsConnector::from(Arc::clone(config));
        let stream = within(TLS_MAX, "TLS", connector.connect(name, stream))
            .await?
            .map_err(|error| PostError::Tls(error.to_string()))?;
        return speak(stream, place, address.ip()).await;
    }
    Err(failure)
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    place: &Place,
    address: IpAddr,
) -> Result<Open, PostError> {
    let (sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| PostError::Broken(error.to_string()))?;
    // How it ends is seen by whoever waits for an answer.
    let task = tokio::spawn(async move {
        let _ = connection.await;
    });
    Ok(Open {
        tls: place.tls,
        authority: place.authority.clone(),
        address,
        sender,
        _task: Task(task.abort_handle()),
    })
}

/// Why there is no answer.
enum Ended {
    /// The connection was closed before anything came back.
    Stale,
    With(PostError),
}

/// Sends and waits for the answer; `true`: the connection is good for another one.
async fn exchange(
    open: &mut Open,
    place: &Place,
    post: &Post,
    ways: &Ways,
) -> Result<(PostAnswer, bool), Ended> {
    let request = request(place, post).map_err(Ended::With)?;
    let work = async {
        let response = open.sender.send_request(request).await.map_err(|error| {
            if error.is_canceled() || error.is_incomplete_message() || error.is_closed() {
                Ended::Stale
            } else {
                Ended::With(PostError::Broken(error.to_string()))
            }
        })?;
        let answer = read_head(&response);
        // Whoever says more than anybody reads loses the connection, and nothing else.
        let read = Limited::new(response.into_body(), ANSWER_MAX)
            .collect()
            .await;
        Ok((answer, read.is_ok()))
    };
    within(ways.timeout, "the answer", work)
        .await
        .map_err(Ended::With)?
}

fn request(place: &Place, post: &Post) -> Result<Request<Full<Bytes>>, PostError> {
    let mut request = Request::builder()
        .method(Method::POST)
        .uri(&place.path)
        .header(HOST, &place.authority)
        .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
        .header(
            USER_AGENT,
            HeaderValue::from_static(concat!("bellwire/", env!("CARGO_PKG_VERSION"))),
        );
    for (name, value) in &post.headers {
        request = request.header(HeaderName::from_static(name), value);
    }
    request
        .body(Full::new(post.body.clone()))
        .map_err(|error| PostError::Broken(error.to_string()))
}

fn read_head(response: &Response<Incoming>) -> PostAnswer {
    let seconds = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse().ok());
    PostAnswer {
        status: response.status().as_u16(),
        retry_after: seconds.map(Duration::from_secs),
    }
}
