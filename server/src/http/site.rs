//! What every request goes through before and after its handler: an id, the handling of panics, the body of refusals,
//! metrics. One plain wrapper around axum's router rather than layers, each of which would cost an allocation for
//! every request of every route.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::body::Body;
use axum::response::Response;
use bellwire_protocol::Code;
use bytes::Bytes;
use futures_util::FutureExt as _;
use http::header::{ALLOW, CONTENT_TYPE, HOST};
use http::{HeaderName, HeaderValue, Method, Request, StatusCode, Version};
use hyper::body::Incoming;
use metrics::{Counter, Histogram};
use tower::Service as _;

use super::allowance;
use super::error::{Place, Problem};
use super::traceparent;
use crate::runtime::{Handle, Origin, Trace};
use crate::telemetry::metrics::{HTTP_REFUSALS_TOTAL, HTTP_REQUESTS_TOTAL, HTTP_SECONDS};

/// The header that names a request, in both directions.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Longest request id that is taken over from the caller, bytes. Others are replaced by one of ours.
const REQUEST_ID_MAX: usize = 128;

/// Handlers, ready to be [served](super::serve()).
#[derive(Clone)]
pub struct Site(Arc<Inner>);

struct Inner {
    router: Router,
    handle: Handle,
    routes: Routes,
    meters: Vec<RouteMeters>,
    /// Tells the ids of this run from those of others.
    run: String,
    requests: AtomicU64,
}

impl Site {
    /// Wraps a router whose routes are in the document.
    pub(super) fn new(router: Router, handle: Handle, document: &utoipa::openapi::OpenApi) -> Site {
        let routes = Routes::new(document.paths.paths.keys());
        let meters = routes
            .templates
            .iter()
            .map(|_| RouteMeters::default())
            .collect();
        Site(Arc::new(Inner {
            router,
            run: base36(handle.now_ms()),
            handle,
            routes,
            meters,
            requests: AtomicU64::new(0),
        }))
    }

    /// Answers one request.
    pub(super) async fn answer(&self, mut request: Request<Incoming>) -> Response {
        let inner = &*self.0;
        let started = inner.handle.now().mono;
        let id = inner.request_id(&request);
        let route = inner.routes.find(request.uri().path());
        let method = request.method().clone();
        let trace = inner.trace(&request);
        if let Some(trace) = trace {
            // Ids are made of plain characters only.
            let request_id = id.to_str().unwrap_or_default().into();
            request.extensions_mut().insert(Origin {
                trace,
                request: request_id,
            });
        }

        let mut response = match refuse_early(&request) {
            Some(response) => response,
            None => inner.handle_safely(request).await,
        };
        let problem = response.extensions_mut().remove::<Problem>();
        if method == Method::OPTIONS && response.status() == StatusCode::METHOD_NOT_ALLOWED {
            response = options(&response);
        } else if let Some(problem) = problem {
            metrics::counter!(HTTP_REFUSALS_TOTAL, "code" => problem.code().name()).increment(1);
            // What is true of the call whatever became of it.
            let mut before = std::mem::take(response.headers_mut());
            response = problem.render(id.to_str().unwrap_or_default());
            for name in [ALLOW, allowance::POLICY, allowance::LEFT] {
                if let Some(value) = before.remove(&name) {
                    response.headers_mut().insert(name, value);
                }
            }
            if method == Method::HEAD {
                *response.body_mut() = Body::empty();
            }
        }

        let status = response.status();
        let took = inner.handle.now().mono - started;
        inner.meters[route].count(&inner.routes.templates[route], &method, status, took);
        tracing::debug!(
            route = inner.routes.templates[route],
            %method,
            status = status.as_u16(),
            micros = took.as_micros(),
            request_id = ?id,
            trace_id = trace.map(|trace| tracing::field::display(trace.trace_id())),
            "answered"
        );
        if status == StatusCode::INTERNAL_SERVER_ERROR {
            tracing::error!(
                route = inner.routes.templates[route],
                %method,
                request_id = ?id,
                "a request ended in an internal error"
            );
        }
        response.headers_mut().insert(REQUEST_ID, id);
        response
    }
}

impl Inner {
    async fn handle_safely(&self, request: Request<Incoming>) -> Response {
        let mut router = self.router.clone();
        // What a handler shares with others is the runtime's handle, which keeps no lock across a call.
        let handled = AssertUnwindSafe(async move { router.call(request).await });
        match handled.catch_unwind().await {
            Ok(Ok(response)) => dressed(response),
            Ok(Err(never)) => match never {},
            Err(_) => problem(Problem::plain(Code::Internal)),
        }
    }

    /// The trace that the request belongs to, if anything of it will be logged.
    fn trace(&self, request: &Request<Incoming>) -> Option<Trace> {
        let told = traceparent::read(request.headers());
        let sampled = told.is_some_and(|told| told.sampled);
        (sampled || Trace::unsampled_are_logged())
            .then(|| self.handle.trace(told.map(|told| told.trace_id), sampled))
    }

    /// The caller's id if it is short and plain, else one of ours.
    fn request_id(&self, request: &Request<Incoming>) -> HeaderValue {
        if let Some(id) = request.headers().get(REQUEST_ID)
            && (1..=REQUEST_ID_MAX).contains(&id.len())
            && id
                .as_bytes()
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || b"-_.:/+=@".contains(byte))
        {
            return id.clone();
        }
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        HeaderValue::from_maybe_shared(Bytes::from(format!("{}-{number}", self.run)))
            .unwrap_or(HeaderValue::from_static("unnamed"))
    }
}

/// What is answered without asking the router.
fn refuse_early(request: &Request<Incoming>) -> Option<Response> {
    if request.version() == Version::HTTP_11
        && !request.headers().contains_key(HOST)
        && request.uri().host().is_none()
    {
        // RFC 9112 section 3.2.
        return Some(problem(
            Problem::new(
                Code::Malformed,
                "An HTTP/1.1 request needs a `Host` header.",
            )
            .at(Place::Header("Host")),
        ));
    }
    if request.method() == Method::OPTIONS && request.uri().path() == "*" {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NO_CONTENT;
        return Some(response);
    }
    None
}

fn problem(problem: Problem) -> Response {
    use axum::response::IntoResponse as _;
    problem.into_response()
}

/// Gives the router's own bare refusals their problem. Those of handlers and front doors say what they are.
fn dressed(mut response: Response) -> Response {
    let status = response.status();
    let bare = (status.is_client_error() || status.is_server_error())
        && !response.headers().contains_key(CONTENT_TYPE)
        && response.extensions().get::<Problem>().is_none();
    if bare {
        let told = match status {
            StatusCode::NOT_FOUND => Problem::plain(Code::NotFound),
            StatusCode::METHOD_NOT_ALLOWED => Problem::plain(Code::MethodNotAllowed),
            _ if status.is_client_error() => Problem::plain(Code::Malformed),
            _ => Problem::plain(Code::Internal),
        };
        response.extensions_mut().insert(told);
    }
    response
}

/// The answer to `OPTIONS`: which methods there are. No other site may call from a browser, so there is no CORS.
fn options(refused: &Response) -> Response {
    let methods = refused
        .headers()
        .get(ALLOW)
        .and_then(|allow| allow.to_str().ok())
        .unwrap_or_default();
    let allow = HeaderValue::try_from(format!("{methods},OPTIONS"))
        .unwrap_or(HeaderValue::from_static("OPTIONS"));
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response.headers_mut().insert(ALLOW, allow);
    response
}

fn base36(mut number: u64) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut digits = Vec::new();
    loop {
        digits.push(char::from(DIGITS[(number % 36) as usize]));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

// ---- Routes and their figures ------------------------------------------------------------------------------------

/// The route templates, for metrics and logs.
struct Routes {
    /// The first one stands for every path that is not known.
    templates: Vec<String>,
    /// Paths without parameters.
    exact: HashMap<String, usize>,
    /// Paths with parameters, cut at the slashes; `None` is a parameter.
    patterns: Vec<(Vec<Option<String>>, usize)>,
}

/// Where paths that are not known are counted.
const UNMATCHED: usize = 0;

impl Routes {
    fn new<'p>(paths: impl Iterator<Item = &'p String>) -> Routes {
        let mut routes = Routes {
            templates: vec!["unmatched".to_owned()],
            exact: HashMap::new(),
            patterns: Vec::new(),
        };
        for path in paths {
            let index = routes.templates.len();
            routes.templates.push(path.clone());
            if path.contains('{') {
                let cut = path
                    .split('/')
                    .map(|part| (!part.starts_with('{')).then(|| part.to_owned()));
                routes.patterns.push((cut.collect(), index));
            } else {
                routes.exact.insert(path.clone(), index);
            }
        }
        routes
    }

    fn find(&self, path: &str) -> usize {
        if let Some(index) = self.exact.get(path) {
            return *index;
        }
        let fits = |pattern: &[Option<String>]| {
            let mut parts = path.split('/');
            pattern.iter().all(|wanted| {
                parts.next().is_some_and(|part| {
                    wanted
                        .as_ref()
                        .map_or(!part.is_empty(), |wanted| wanted == part)
                })
            }) && parts.next().is_none()
        };
        self.patterns
            .iter()
            .find(|(pattern, _)| fits(pattern))
            .map_or(UNMATCHED, |(_, index)| *index)
    }
}

const METHODS: [&str; 8] = [
    "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "other",
];
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// The figures of one route, looked up in the registry once.
#[derive(Default)]
struct RouteMeters {
    requests: [[OnceLock<Counter>; CLASSES.len()]; METHODS.len()],
    seconds: OnceLock<Histogram>,
}

impl RouteMeters {
    fn count(&self, route: &str, method: &Method, status: StatusCode, took: std::time::Duration) {
        let method = METHODS
            .iter()
            .position(|known| *known == method.as_str())
            .unwrap_or(METHODS.len() - 1);
        let class = (usize::from(status.as_u16()) / 100).clamp(1, CLASSES.len()) - 1;
        self.requests[method][class]
            .get_or_init(|| {
                metrics::counter!(
                    HTTP_REQUESTS_TOTAL,
                    "route" => route.to_owned(),
                    "method" => METHODS[method],
                    "status" => CLASSES[class],
                )
            })
            .increment(1);
        self.seconds
            .get_or_init(|| metrics::histogram!(HTTP_SECONDS, "route" => route.to_owned()))
            .record(took);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_documented_path_is_counted_under_its_template() {
        let document = super::super::document(utoipa::openapi::OpenApi::default());
        let routes = Routes::new(document.paths.paths.keys());
        for template in document.paths.paths.keys() {
            let path = template.replace("{id}", "mfzwizjanfxgk4tfon2ca43fmy");
            assert_eq!(&routes.templates[routes.find(&path)], template);
        }
        for path in [
            "/",
            "",
            "/v1/pings/",
            "/v1/pings/a/b",
            "/v2/pings",
            "*",
            "/v1",
        ] {
            assert_eq!(routes.find(path), UNMATCHED, "{path}");
        }
    }

    #[test]
    fn numbers_are_written_in_base_36() {
        for (number, text) in [(0, "0"), (35, "z"), (36, "10"), (1_295, "zz")] {
            assert_eq!(base36(number), text);
        }
    }
}
