//! What a caller may still send: the fields `RateLimit-Policy` and `RateLimit` of draft-ietf-httpapi-ratelimit-headers-11, on every
//! answer of a call that is limited, accepted or not.
//!
//! A policy is a bucket: `q` pings at once, refilled evenly within `w` seconds. `r` is what is in it now, `t` the seconds until it is
//! full again.

use std::fmt::Write as _;

use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};

use super::error::Problem;
use crate::runtime::{Handle, Principal};

/// What may be sent.
pub(super) const POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
/// What is left of it.
pub(super) const LEFT: HeaderName = HeaderName::from_static("ratelimit");

/// The answer of a limited call with what its caller may still send.
pub(super) fn told(
    handle: &Handle,
    who: &Principal,
    result: Result<Response, Problem>,
) -> Response {
    let mut response = result.unwrap_or_else(Problem::into_response);
    tell(handle, who, response.headers_mut());
    response
}

fn tell(handle: &Handle, who: &Principal, headers: &mut HeaderMap) {
    let (mut policy, mut left) = (String::new(), String::new());
    for view in handle.allowances(who) {
        let comma = if policy.is_empty() { "" } else { ", " };
        let name = view.by.as_str();
        // Writing to a string cannot fail. No window is shorter than a second.
        let _ = write!(
            policy,
            "{comma}\"{name}\";q={};w={}",
            view.quota,
            view.window_s.max(1)
        );
        let _ = write!(
            left,
            "{comma}\"{name}\";r={};t={}",
            view.left, view.whole_in_s
        );
    }
    for (name, text) in [(POLICY, policy), (LEFT, left)] {
        if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(text)) {
            headers.insert(name, value);
        }
    }
}
