//! The ping endpoint of RhoConnect. docs/rhoconnect.md is its page: what is mapped how, and what is different.
//!
//! Callers of RhoConnect know three statuses: 200, 422 for the token, 500 for everything else; so there are no others
//! here, whatever goes wrong. The order is theirs too: the body is parsed before the token is looked at, the token before
//! the parameters.

pub mod fuzz;
mod mapping;
mod params;

use std::collections::HashSet;
use std::fmt::Write as _;
use std::panic::AssertUnwindSafe;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use axum::routing::MethodRouter;
use futures_util::FutureExt as _;
use http::header::{CACHE_CONTROL, CONTENT_TYPE, PRAGMA, WARNING};
use http::{HeaderMap, HeaderValue, StatusCode};
use http_body_util::{BodyExt as _, Limited};
use utoipa::ToSchema;
use utoipa::openapi::Deprecated;
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt as _};
use utoipa_axum::routes;

use self::params::Params;
use crate::delivery::{AppId, Rejection, Urgency};
use crate::runtime::{
    Allowance, Content, Handle, Origin, PingError, PingRequest, Principal, Scopes, Target,
    USERS_PER_PING, WhoError,
};

/// Largest body, bytes: as for the native API.
const BODY_MAX: usize = 1 << 20;

/// How long a body may take to arrive.
const BODY_TIME: std::time::Duration = std::time::Duration::from_secs(30);

/// How much of a body that is too large is still read, and for how long.
const BODY_DISCARDED_MAX: usize = 8 << 20;
const BODY_DISCARD_TIME: std::time::Duration = std::time::Duration::from_secs(5);

/// The header with the token.
const TOKEN_HEADER: &str = "x-rhoconnect-api-token";

/// Most failures that an answer lists; a caller who sees so many looks at the server.
const MESSAGES_MAX: usize = 100;

/// The routes of this door.
pub(super) fn routes() -> OpenApiRouter<Handle> {
    let only_post = |router: MethodRouter<Handle>| router.fallback(wrong_method);
    let mut routes = OpenApiRouter::new()
        .routes(routes!(ping).map(only_post))
        .routes(routes!(ping_api_alias).map(only_post))
        .routes(routes!(ping_client_alias).map(only_post));
    // Marked in the document, not in the code, where calling them is no mistake.
    for alias in ["/api/ping", "/api/client/ping"] {
        let item = routes.get_openapi_mut().paths.paths.get_mut(alias);
        if let Some(operation) = item.and_then(|item| item.post.as_mut()) {
            operation.deprecated = Some(Deprecated::True);
        }
    }
    routes
}

/// The parameters, as a form or as JSON.
#[derive(ToSchema)]
#[schema(as = RhoConnectPing)]
#[expect(dead_code, reason = "describes what `params` reads")]
struct PingSchema {
    /// A user, or an array of users (in a form: `user_id[]`, repeated). Unknown ones are skipped.
    user_id: Option<serde_json::Value>,
    /// Text shown on the device.
    message: Option<String>,
    /// A source, or an array of sources, to synchronise (in a form: `sources[]`, repeated).
    sources: Option<serde_json::Value>,
    /// How long to vibrate, in milliseconds, as a number or a text.
    vibrate: Option<serde_json::Value>,
    /// Number on the app's icon, as a number or a text.
    badge: Option<serde_json::Value>,
    /// Name of the sound to play.
    sound: Option<String>,
    /// Any true value: failures are only logged.
    r#async: Option<serde_json::Value>,
    /// The API key, when it is not in the header.
    api_token: Option<String>,
}

/// Ping users, as RhoConnect does.
///
/// The token is an API key of app `default` with the scope `ping`; it comes in the header or as the parameter `api_token` of
/// the body or the query. Users and devices are those of app `default`. All answers carry `Cache-Control: no-cache` and
/// `Pragma: no-cache`.
#[utoipa::path(
    post,
    path = "/rc/v1/users/ping",
    tag = "rhoconnect",
    operation_id = "rhoconnect_ping",
    security(()),
    params(("X-RhoConnect-API-TOKEN" = Option<String>, Header, description = "An API key with the scope `ping`.")),
    request_body(content(
        (PingSchema = "application/x-www-form-urlencoded"),
        (PingSchema = "application/json", example = json!({"user_id": ["ana"], "message": "Order ready", "sources": ["Orders"],
            "vibrate": "2000", "badge": 3, "sound": "ding.mp3"})),
    )),
    responses(
        (status = 200, description = "Done; an empty body. Unknown users and users without devices are no errors."),
        (status = 422, description = "`No API token provided`, or `Invalid/missing API user` for a key without the scope.",
            body = String, content_type = "text/plain"),
        (status = 500, description = "`Server error while processing client data` for malformed JSON; else what failed, \
            joined by a backslash and an `n`.", body = String, content_type = "text/plain"),
    ),
)]
async fn ping(State(handle): State<Handle>, request: Request) -> Response {
    answer(&handle, request).await
}

/// The same, under an older name.
///
/// A `Warning` header says that it is deprecated.
#[utoipa::path(
    post,
    path = "/api/ping",
    tag = "rhoconnect",
    operation_id = "rhoconnect_ping_api",
    security(()),
    params(("X-RhoConnect-API-TOKEN" = Option<String>, Header, description = "An API key with the scope `ping`.")),
    request_body(content((PingSchema = "application/x-www-form-urlencoded"), (PingSchema = "application/json"))),
    responses(
        (status = 200, description = "As for `/rc/v1/users/ping`.", headers(("Warning" = String))),
        (status = 422, description = "As for `/rc/v1/users/ping`.", body = String, content_type = "text/plain"),
        (status = 500, description = "As for `/rc/v1/users/ping`.", body = String, content_type = "text/plain"),
    ),
)]
async fn ping_api_alias(State(handle): State<Handle>, request: Request) -> Response {
    deprecated(answer(&handle, request).await, "/api/ping")
}

/// The same, under another older name.
///
/// A `Warning` header says that it is deprecated.
#[utoipa::path(
    post,
    path = "/api/client/ping",
    tag = "rhoconnect",
    operation_id = "rhoconnect_ping_client",
    security(()),
    params(("X-RhoConnect-API-TOKEN" = Option<String>, Header, description = "An API key with the scope `ping`.")),
    request_body(content((PingSchema = "application/x-www-form-urlencoded"), (PingSchema = "application/json"))),
    responses(
        (status = 200, description = "As for `/rc/v1/users/ping`.", headers(("Warning" = String))),
        (status = 422, description = "As for `/rc/v1/users/ping`.", body = String, content_type = "text/plain"),
        (status = 500, description = "As for `/rc/v1/users/ping`.", body = String, content_type = "text/plain"),
    ),
)]
async fn ping_client_alias(State(handle): State<Handle>, request: Request) -> Response {
    deprecated(answer(&handle, request).await, "/api/client/ping")
}

/// Another method than `POST`. The router adds `Allow`.
async fn wrong_method() -> Response {
    reply(StatusCode::METHOD_NOT_ALLOWED, "Only POST is known here")
}

fn deprecated(mut response: Response, path: &str) -> Response {
    // RFC 7234 section 5.5: code, agent, text.
    let warning = format!("299 bellwire \"POST {path} is deprecated, use POST /rc/v1/users/ping\"");
    if let Ok(warning) = HeaderValue::try_from(warning) {
        response.headers_mut().insert(WARNING, warning);
    }
    response
}

// ---- Answering ---------------------------------------------------------------------------------------------------

/// Why there is no 200.
enum Refusal {
    /// 422: no token, or none that is known.
    NoToken,
    /// 422: the key may not ping.
    NotAllowed,
    /// 500, with this text.
    Failed(String),
}

impl Refusal {
    fn into_response(self) -> Response {
        match self {
            Refusal::NoToken => reply(StatusCode::UNPROCESSABLE_ENTITY, "No API token provided"),
            Refusal::NotAllowed => {
                reply(StatusCode::UNPROCESSABLE_ENTITY, "Invalid/missing API user")
            }
            Refusal::Failed(text) => reply(StatusCode::INTERNAL_SERVER_ERROR, text),
        }
    }
}

/// An answer of this door. A 200 has no body and so no type.
fn reply(status: StatusCode, text: impl Into<Body>) -> Response {
    let mut response = Response::new(text.into());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    if status != StatusCode::OK {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    }
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    headers.insert(PRAGMA, HeaderValue::from_static("no-cache"));
    response
}

async fn answer(handle: &Handle, request: Request) -> Response {
    // Caught here rather than further out, so that this answer too looks as the callers know it.
    match AssertUnwindSafe(handled(handle, request))
        .catch_unwind()
        .await
    {
        Ok(Ok(())) => reply(StatusCode::OK, Body::empty()),
        Ok(Err(refusal)) => refusal.into_response(),
        Err(_) => {
            tracing::error!(door = "rhoconnect", "a request ended in an internal error");
            reply(StatusCode::INTERNAL_SERVER_ERROR, "Internal error")
        }
    }
}

async fn handled(handle: &Handle, request: Request) -> Result<(), Refusal> {
    let (parts, body) = request.into_parts();
    let bytes = read_body(body).await?;
    let params = Params::read(parts.uri.query(), params::is_json(&parts.headers), &bytes).map_err(
        |params::NotJson| Refusal::Failed("Server error while processing client data".to_owned()),
    )?;
    let who = authenticate(handle, &parts.headers, &params).await?;
    handle.admit(&who).map_err(|why| {
        let text = match why.by {
            Allowance::Key => "The API key sends faster than it may",
            Allowance::App => "The app has sent as many pings as it may in a day",
        };
        Refusal::Failed(text.to_owned())
    })?;
    let mut messages = Messages::default();
    let origin = parts.extensions.get::<Origin>();
    publish(handle, &who, &params, origin, &mut messages).await;
    let Some(text) = messages.joined() else {
        return Ok(());
    };
    if params.truthy("async") {
        // The original only puts the ping in a queue. Ours is safe or failed by now, which takes no longer.
        tracing::warn!(
            door = "rhoconnect",
            failures = messages.count,
            "an asynchronous ping failed in part"
        );
        return Ok(());
    }
    Err(Refusal::Failed(text))
}

async fn read_body(mut body: Body) -> Result<axum::body::Bytes, Refusal> {
    let limited = Limited::new(&mut body, BODY_MAX).collect();
    match tokio::time::timeout(BODY_TIME, limited).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(_)) => {
            // Closing with unread bytes would keep the caller from reading the answer.
            let rest = Limited::new(body, BODY_DISCARDED_MAX).collect();
            let _ = tokio::time::timeout(BODY_DISCARD_TIME, rest).await;
            Err(Refusal::Failed(format!(
                "The body broke off or is larger than {BODY_MAX} bytes"
            )))
        }
        Err(_) => Err(Refusal::Failed(
            "The body did not arrive in time".to_owned(),
        )),
    }
}

/// The first known token decides, the header's before the parameter's.
async fn authenticate(
    handle: &Handle,
    headers: &HeaderMap,
    params: &Params,
) -> Result<Principal, Refusal> {
    let header = headers
        .get(TOKEN_HEADER)
        .and_then(|value| value.to_str().ok());
    let parameter = params.text("api_token");
    for token in [header, parameter.as_deref()].into_iter().flatten() {
        match handle.authenticate_key(token.trim()).await {
            Ok(principal) if allowed(&principal) => return Ok(principal),
            Ok(_) => return Err(Refusal::NotAllowed),
            Err(WhoError::Unauthorized) => {}
            // Never 422 for that: callers would take their token for dead.
            Err(error @ (WhoError::StoreUnavailable | WhoError::Draining)) => {
                return Err(Refusal::Failed(error.to_string()));
            }
        }
    }
    Err(Refusal::NoToken)
}

/// What is an admin in RhoConnect is a key with the scope `ping` here. The users are those of app `default`, so keys of
/// other apps are no admins.
fn allowed(principal: &Principal) -> bool {
    principal.may(Scopes::PING) && principal.app() == AppId::DEFAULT
}

/// What failed, in the order in which it did.
#[derive(Default)]
struct Messages {
    list: Vec<String>,
    count: usize,
}

impl Messages {
    fn add(&mut self, message: impl Into<String>) {
        self.count += 1;
        if self.list.len() < MESSAGES_MAX {
            self.list.push(message.into());
        }
    }

    /// Joined by a backslash and an `n`, as the original does it.
    fn joined(&self) -> Option<String> {
        let mut text = self.list.join("\\n");
        if self.count > self.list.len() {
            // Writing to a string cannot fail.
            let _ = write!(text, "\\nand {} more", self.count - self.list.len());
        }
        (self.count > 0).then_some(text)
    }
}

/// Pings the users in the order given, each once. A part that addresses too many devices for one ping is halved.
async fn publish(
    handle: &Handle,
    who: &Principal,
    params: &Params,
    origin: Option<&Origin>,
    messages: &mut Messages,
) {
    let mut seen = HashSet::new();
    let mut users = params.list("user_id").unwrap_or_default();
    users.retain(|user| !user.is_empty() && seen.insert(user.clone()));
    let content = match mapping::content(params) {
        Ok(content) => content,
        Err(why) => return messages.add(why),
    };
    let content = Content {
        encoded: content.to_cbor().into(),
        // A body of at most 1 MiB holds less than 4 GiB.
        size: u32::try_from(content.size()).unwrap_or(u32::MAX),
    };
    // A stack of parts, the first on top.
    let mut parts: Vec<Vec<String>> = users
        .chunks(USERS_PER_PING)
        .rev()
        .map(<[String]>::to_vec)
        .collect();
    while let Some(mut part) = parts.pop() {
        let request = PingRequest {
            app: who.app(),
            target: Target::Users(part.clone()),
            content: content.clone(),
            ttl_s: None,
            urgency: Urgency::default(),
            collapse: None,
            idempotency: None,
            wait_acknowledged: None,
        };
        let answered = match origin {
            Some(origin) => handle.ping_traced(request, origin).await,
            None => handle.ping(request).await,
        };
        match answered {
            Ok(answered) => {
                for (device, why) in answered.rejected {
                    messages.add(format!("device {device}: {}", rejected(why)));
                }
            }
            Err(PingError::TooManyDevices { .. }) if part.len() > 1 => {
                let second = part.split_off(part.len() / 2);
                parts.push(second);
                parts.push(part);
            }
            Err(PingError::MailboxFull) => messages.add(rejected(Rejection::MailboxFull)),
            Err(PingError::DeviceTooFast) => messages.add(rejected(Rejection::TooFast)),
            // A device that was revoked meanwhile is no error, as any unknown one.
            Err(PingError::UnknownDevice) => {}
            Err(error @ (PingError::TooManyDevices { .. } | PingError::IdempotencyConflict)) => {
                messages.add(error.to_string());
            }
            // The same for every part that is left.
            Err(
                error @ (PingError::ContentTooLarge { .. }
                | PingError::TooManyExpansions { .. }
                | PingError::Runtime(_)),
            ) => {
                return messages.add(error.to_string());
            }
        }
    }
}

fn rejected(why: Rejection) -> &'static str {
    match why {
        Rejection::UnknownDevice => "not known here",
        Rejection::MailboxFull => "the mailbox is full",
        Rejection::NoRoom => "no room on disk",
        Rejection::StoreFailed => "the store is unavailable",
        Rejection::TooFast => "the device is sent more than it may be",
        Rejection::Quota(_) => "the app has as much waiting as it may have",
    }
}
