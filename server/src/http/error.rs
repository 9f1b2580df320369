//! The one conversion from what can go wrong to what a caller is told: `application/problem+json` (RFC 9457).

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use bellwire_protocol::Code;
use http::header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use crate::delivery::{Quota, Rejection};
use crate::runtime::{Allowance, NoBackup, NotReady, PingError, RuntimeError, Throttle, WhoError};

/// The media type of every refusal of the native API.
pub(crate) const PROBLEM_JSON: HeaderValue = HeaderValue::from_static("application/problem+json");

/// Which part of the request is meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// The request as a whole.
    Request,
    /// A member of the body, as a JSON pointer (RFC 6901).
    Body(String),
    /// A query parameter.
    Parameter(String),
    /// A header.
    Header(&'static str),
}

/// A refusal on its way to the caller.
///
/// Handlers return it; [`Site`](super::Site) gives it its body, because only there the request's id is known.
#[derive(Debug, Clone)]
pub(crate) struct Problem(Arc<Told>);

#[derive(Debug, Clone)]
struct Told {
    code: Code,
    detail: Cow<'static, str>,
    place: Place,
    /// A key was shown and is not good (RFC 6750 section 3.1).
    bad_token: bool,
    /// The rest of the request was not read, so the connection cannot be used again.
    close: bool,
    /// When to try again, seconds, where that is known better than from the code.
    retry_after_s: Option<u32>,
}

/// The body of a refusal.
///
/// `code` is stable and what programs should look at; `detail` is for people and may change.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct ProblemBody<'a> {
    /// Names the kind of problem: `urn:bellwire:problem:` and the code.
    #[serde(rename = "type")]
    #[schema(example = "urn:bellwire:problem:malformed")]
    kind: String,
    /// What the code means, the same in every occurrence.
    title: &'a str,
    /// The HTTP status, repeated.
    #[schema(minimum = 400, maximum = 599)]
    status: u16,
    /// What is wrong in this occurrence.
    detail: &'a str,
    /// The stable code; docs/errors.md lists all of them.
    code: &'a str,
    /// What to do about it.
    remedy: &'a str,
    /// The offending member of the body, as a JSON pointer (RFC 6901).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "/to/device")]
    pointer: Option<&'a str>,
    /// The offending query parameter.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    parameter: Option<&'a str>,
    /// The offending header.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    header: Option<&'a str>,
    /// The id of the request, as in the header `X-Request-Id` and in the server's log.
    request_id: &'a str,
}

impl Problem {
    pub(crate) fn new(code: Code, detail: impl Into<Cow<'static, str>>) -> Problem {
        Problem(Arc::new(Told {
            code,
            detail: detail.into(),
            place: Place::Request,
            bad_token: false,
            close: false,
            retry_after_s: None,
        }))
    }

    /// A refusal that says no more than its code.
    pub(crate) fn plain(code: Code) -> Problem {
        Problem::new(code, code.meaning())
    }

    pub(crate) fn at(mut self, place: Place) -> Problem {
        Arc::make_mut(&mut self.0).place = place;
        self
    }

    pub(super) fn bad_token(mut self) -> Problem {
        Arc::make_mut(&mut self.0).bad_token = true;
        self
    }

    pub(super) fn closing(mut self) -> Problem {
        Arc::make_mut(&mut self.0).close = true;
        self
    }

    /// Says when to try again.
    pub(super) fn later(mut self, wait: Duration) -> Problem {
        let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
        let seconds = u32::try_from(seconds.max(1)).unwrap_or(u32::MAX);
        Arc::make_mut(&mut self.0).retry_after_s = Some(seconds);
        self
    }

    /// When to try again, seconds.
    pub(super) fn retry_after_s(&self) -> Option<u32> {
        self.0.retry_after_s.or_else(|| retry_after_s(self.0.code))
    }

    pub(super) fn code(&self) -> Code {
        self.0.code
    }

    pub(super) fn place(&self) -> &Place {
        &self.0.place
    }

    pub(super) fn detail(&self) -> &str {
        &self.0.detail
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.0
            .code
            .http_status()
            .and_then(|status| StatusCode::from_u16(status).ok())
            .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    /// The answer as it goes out.
    pub(super) fn render(&self, request_id: &str) -> Response {
        let told = &*self.0;
        let status = self.status();
        let member = |wanted: fn(&Place) -> Option<&str>| wanted(&told.place);
        let body = ProblemBody {
            kind: format!("urn:bellwire:problem:{}", told.code),
            title: told.code.meaning(),
            status: status.as_u16(),
            detail: &told.detail,
            code: told.code.name(),
            remedy: told.code.remedy(),
            pointer: member(|place| match place {
                Place::Body(pointer) => Some(pointer),
                Place::Request | Place::Parameter(_) | Place::Header(_) => None,
            }),
            parameter: member(|place| match place {
                Place::Parameter(name) => Some(name),
                Place::Request | Place::Body(_) | Place::Header(_) => None,
            }),
            header: member(|place| match place {
                Place::Header(name) => Some(name),
                Place::Request | Place::Body(_) | Place::Parameter(_) => None,
            }),
            request_id,
        };
        // Serialising texts and numbers cannot fail; an empty body would still carry the status.
        let body = serde_json::to_vec(&body).unwrap_or_default();
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, PROBLEM_JSON);
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(seconds) = self.retry_after_s() {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            let challenge = if told.bad_token {
                r#"Bearer realm="bellwire", error="invalid_token""#
            } else {
                r#"Bearer realm="bellwire""#
            };
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if told.close {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status().into_response();
        response.extensions_mut().insert(self);
        response
    }
}

/// How long a caller should wait before it tries again, seconds: about as long as the trouble usually lasts.
pub(crate) fn retry_after_s(code: Code) -> Option<u32> {
    match code.http_status()? {
        429 | 503 | 507 => {}
        _ => return None,
    }
    // Clear by themselves within a moment.
    const MOMENT: [Code; 4] = [
        Code::StoreBusy,
        Code::MemoryReserve,
        Code::RateLimited,
        Code::DeviceRateLimited,
    ];
    Some(if MOMENT.contains(&code) {
        1
    } else if matches!(code, Code::Draining | Code::TooManyExpansions) {
        // A restart or another server; the next audience that is through.
        5
    } else {
        // A device has to come back, or an operator to act.
        30
    })
}

/// The code of a notification that one device did not accept.
pub(crate) fn rejection_code(why: Rejection) -> Code {
    match why {
        Rejection::UnknownDevice => Code::UnknownDevice,
        Rejection::MailboxFull => Code::MailboxFull,
        Rejection::NoRoom => Code::NoRoom,
        Rejection::StoreFailed => Code::StoreUnavailable,
        Rejection::TooFast => Code::DeviceRateLimited,
        Rejection::Quota(_) => Code::QuotaExceeded,
    }
}

/// How an app gets below its quota of what waits.
const QUOTA_WAITS: &str =
    "There is room again when devices take theirs, or they expire or are revoked.";

/// The code of trouble inside.
fn runtime_code(error: RuntimeError) -> Code {
    match error {
        RuntimeError::StoreUnavailable => Code::StoreUnavailable,
        RuntimeError::StoreBusy => Code::StoreBusy,
        RuntimeError::Draining => Code::Draining,
        RuntimeError::MemoryReserve => Code::MemoryReserve,
        RuntimeError::NoRoom => Code::NoRoom,
        RuntimeError::TooManyStreams => Code::TooManyStreams,
        RuntimeError::QuotaExceeded { .. } => Code::QuotaExceeded,
        RuntimeError::Invalid(_) => Code::Unprocessable,
    }
}

impl From<RuntimeError> for Problem {
    fn from(error: RuntimeError) -> Problem {
        match error {
            RuntimeError::Invalid(why) => Problem::new(runtime_code(error), why),
            RuntimeError::QuotaExceeded { quota, limit, used } => {
                let (what, way) = match quota {
                    Quota::Notifications => ("Notifications that wait in the app", QUOTA_WAITS),
                    Quota::Bytes => ("Bytes of notifications that wait in the app", QUOTA_WAITS),
                    Quota::Devices => (
                        "Devices of the app",
                        "Revoke those that are not used any more.",
                    ),
                };
                let name = quota.as_str();
                Problem::new(
                    runtime_code(error),
                    format!("{what}: {used}, and it may have {limit} (quota.{name}). {way}"),
                )
            }
            RuntimeError::StoreUnavailable
            | RuntimeError::StoreBusy
            | RuntimeError::Draining
            | RuntimeError::MemoryReserve
            | RuntimeError::NoRoom
            | RuntimeError::TooManyStreams => Problem::plain(runtime_code(error)),
        }
    }
}

impl From<Throttle> for Problem {
    fn from(why: Throttle) -> Problem {
        match why.by {
            Allowance::Key => Problem::plain(Code::RateLimited),
            Allowance::App => Problem::new(
                Code::QuotaExceeded,
                "The app has sent as many pings as it may in a day.",
            ),
        }
        .later(why.wait)
    }
}

impl From<WhoError> for Problem {
    fn from(error: WhoError) -> Problem {
        match error {
            WhoError::Unauthorized => Problem::new(
                Code::Unauthenticated,
                "The API key is not known here, or it was revoked.",
            )
            .bad_token()
            .at(Place::Header("Authorization")),
            WhoError::StoreUnavailable => Problem::plain(Code::StoreUnavailable),
            WhoError::Draining => Problem::plain(Code::Draining),
        }
    }
}

impl From<NotReady> for Problem {
    fn from(why: NotReady) -> Problem {
        match why {
            NotReady::Draining => Problem::plain(Code::Draining),
            NotReady::StoreFailed => Problem::plain(Code::StoreUnavailable),
            NotReady::StoreBehind => Problem::plain(Code::StoreBusy),
        }
    }
}

impl From<NoBackup> for Problem {
    fn from(why: NoBackup) -> Problem {
        match why {
            NoBackup::Busy => Problem::plain(Code::BackupUnderWay),
            NoBackup::Draining => Problem::plain(Code::Draining),
            NoBackup::NoRoom => Problem::plain(Code::NoRoom),
            NoBackup::Store => Problem::plain(Code::StoreUnavailable),
        }
    }
}

impl From<PingError> for Problem {
    fn from(error: PingError) -> Problem {
        match error {
            PingError::UnknownDevice => {
                Problem::plain(Code::UnknownDevice).at(Place::Body("/to/device".to_owned()))
            }
            PingError::MailboxFull => Problem::plain(Code::MailboxFull),
            PingError::DeviceTooFast => Problem::plain(Code::DeviceRateLimited),
            PingError::IdempotencyConflict => {
                Problem::plain(Code::IdempotencyConflict).at(Place::Header("Idempotency-Key"))
            }
            PingError::ContentTooLarge { size, limit } => Problem::new(
                Code::ContentTooLarge,
                format!(
                    "The content has {size} bytes (UTF-8 of all texts plus decoded `data`); at most {limit} are allowed."
                ),
            ),
            PingError::TooManyDevices { limit } => Problem::new(
                Code::Unprocessable,
                format!("The ping addresses more than {limit} devices; split it."),
            )
            .at(Place::Body("/to".to_owned())),
            PingError::TooManyExpansions { limit } => Problem::new(
                Code::TooManyExpansions,
                format!(
                    "{limit} pings to audiences are on their way already; more would only wait."
                ),
            ),
            PingError::Runtime(error) => error.into(),
        }
    }
}
