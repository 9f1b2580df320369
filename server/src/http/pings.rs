//! `/v1/pings`: publish, look, take back.

use std::time::Duration;

use axum::extract::{Request, State};
use axum::response::Response;
use bellwire_protocol::Code;
use http::{HeaderMap, StatusCode};
use serde::Serialize;
use serde::de::MapAccess;
use utoipa::ToSchema;

use super::auth::{Ping, Read, Scoped};
use super::document::refusals;
use super::error::{Place, Problem, rejection_code};
use super::json::{self, Members, Trail};
use super::ping_body::{self, PingBody, PingSchema};
use super::query::{self, PathId, Query};
use super::{Backend, allowance, answer, body, text};
use crate::delivery::{AppId, DeviceId, PingId};
use crate::runtime::{
    Content, Limits, Origin, PairState, PairView, PingAnswer, PingRequest, Principal, Target,
    sha256,
};

/// Largest body of a ping, bytes, if no larger one is allowed anyway: room for a list of 100,000 devices (29 bytes each) and the
/// largest content in base64.
pub(crate) const PING_BODY_MAX: usize = 4 << 20;

/// What became of a ping that was accepted: everything in it is promised.
#[derive(Serialize, ToSchema)]
pub(super) struct Accepted {
    /// Its id.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String, example = "k5xw6ztqmfzwk3thonuw4zlsme")]
    id: PingId,
    /// How many devices it addresses, those in `rejected` included. For a topic, everyone and lists of more than 1,000 devices:
    /// about how many, exactly only up to 1,000.
    devices: u32,
    /// Granted TTL in seconds.
    ttl_s: u64,
    /// Devices that did not accept theirs, when the ping names several. Nothing of it is kept for these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    rejected: Vec<Rejected>,
    /// With `wait=acknowledged`: what is known of each device by now.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    outcomes: Option<Vec<DeviceState>>,
}

/// A device that did not accept its part of a ping.
#[derive(Serialize, ToSchema)]
pub(super) struct Rejected {
    /// Which device.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// Why: `unknown_device`, `mailbox_full`, `no_room` or `store_unavailable`, as in docs/errors.md.
    code: &'static str,
}

/// What is known of one device's part of a ping.
#[derive(Serialize, ToSchema)]
pub(super) struct DeviceState {
    /// Which device.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// `waiting`, or how it ended: `acknowledged`, `declined`, `replaced`, `expired`, `evicted`, `revoked`, `refused` or
    /// `forwarded`.
    state: &'static str,
    /// While it waits: when it expires, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    expires_ms: Option<u64>,
    /// When it ended, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    at_ms: Option<u64>,
}

impl From<&PairView> for DeviceState {
    fn from(pair: &PairView) -> DeviceState {
        let (state, expires_ms, at_ms) = match pair.state {
            PairState::Waiting { expires_ms } => ("waiting", Some(expires_ms), None),
            PairState::Ended { outcome, at_ms } => (outcome.as_str(), None, Some(at_ms)),
        };
        DeviceState {
            device: pair.device,
            state,
            expires_ms,
            at_ms,
        }
    }
}

/// How far a ping to an audience (a topic, everyone, a list of more than 1,000 devices) has come.
#[derive(Serialize, ToSchema)]
struct Expanding {
    /// About how many devices it addresses.
    estimate: u32,
    /// How many it has come to.
    done: u32,
    /// Of these, how many are no device of the app.
    unknown: u32,
}

/// What is known of a ping.
#[derive(Serialize, ToSchema)]
pub(super) struct PingReport {
    /// Its id.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    id: PingId,
    /// While it is on its way to an audience: how far it has come.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    expanding: Option<Expanding>,
    /// Device by device; of an audience those that it has come to.
    devices: Vec<DeviceState>,
    /// Pass this as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next: Option<String>,
}

/// What a withdrawal did.
#[derive(Serialize, ToSchema)]
pub(super) struct Withdrawn {
    /// Notifications taken back before their device had said that it has them.
    revoked: u32,
    /// Devices that have it and are told to take it off the screen: at once, or when they come back.
    withdrawn: u32,
    /// Notifications that had ended otherwise before.
    ended: u32,
    /// Devices left alone, as asked.
    kept: u32,
}

/// Which devices a withdrawal leaves alone.
#[derive(Default, ToSchema)]
#[schema(as = Withdrawal)]
pub(super) struct Withdrawal {
    /// Devices that keep it, such as the one on which it was read.
    #[schema(value_type = Option<Vec<String>>, nullable = false, max_items = 1000)]
    pub(super) except: Option<Vec<DeviceId>>,
}

impl Members for Withdrawal {
    const NAMES: &'static [&'static str] = &["except"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "except" => {
                let what = ("an array of device ids", ping_body::DEVICE);
                self.except =
                    trail.texts(map, what, ping_body::NAMED_MAX, |text| text.parse().ok())?;
            }
            other => return Err(ping_body::forgotten(other, trail)),
        }
        Ok(())
    }
}

/// What a revocation did.
#[derive(Serialize, ToSchema)]
pub(super) struct Revocation {
    /// Notifications taken back now.
    revoked: u32,
    /// Notifications that had ended before.
    ended: u32,
}

refusals! {
    CreateRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, BodyTimeout, IdempotencyConflict,
        BodyTooLarge, ContentTooLarge, UnsupportedMediaType, Unprocessable, MailboxFull, RateLimited, DeviceRateLimited,
        QuotaExceeded, TooManyExpansions, Internal,
        StoreUnavailable, StoreBusy, Draining, MemoryReserve, NoRoom;
    WithdrawRefusals: Malformed, Unauthenticated, Forbidden, PingNotRetained, BodyTimeout, BodyTooLarge,
        UnsupportedMediaType, Unprocessable, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    LookRefusals: Malformed, Unauthenticated, Forbidden, PingNotRetained, Internal, StoreUnavailable, StoreBusy, Draining;
    RevokeRefusals: Malformed, Unauthenticated, Forbidden, PingNotRetained, Internal, StoreUnavailable, StoreBusy, Draining,
        NoRoom;
}

/// Send a ping.
///
/// A 2xx is a promise: the notification of every device not listed in `rejected` is safe on disk, or has its outcome
/// already. With an `Idempotency-Key` the request can be repeated until it is answered: the same key and body make the
/// same ping, once.
///
/// A ping to a user without devices is accepted with `devices: 0`. Unknown devices in a list, full mailboxes that refuse
/// and devices that a failing disk kept out are listed in `rejected`; a single device that does not accept is an error.
///
/// A topic, everyone and a list of more than 1,000 devices are an audience: then a 2xx promises that the ping will be brought to
/// each device that belongs to it now, over a restart as well, and `devices` is an estimate. It takes its place in each mailbox
/// when it arrives there; pings to audiences keep their order. With `wait`, the answer comes when it has reached all of the audience, or
/// the time is over, and has what is known of the first 1,000 devices by id.
#[utoipa::path(
    post,
    path = "/v1/pings",
    tag = "pings",
    operation_id = "create_ping",
    params(
        ("Idempotency-Key" = Option<String>, Header, min_length = 1, max_length = 255,
            description = "1 to 255 visible ASCII characters. One key is for one ping, for ever."),
        ("traceparent" = Option<String>, Header,
            description = "W3C Trace Context, level 1: the log lines of this ping's acceptance and outcomes name that trace. Of another form: as if absent."),
        ("wait" = Option<String>, Query, pattern = "^acknowledged$",
            description = "`acknowledged`: answer when every device's notification has ended, or the time is over."),
        ("timeout_s" = Option<u32>, Query, maximum = 60,
            description = "With `wait`: for how long, in seconds. Default 10."),
    ),
    request_body(content = PingSchema, content_type = "application/json", examples(
        ("a text for one user" = (value = json!({"to": {"user": "ana"}, "title": "Ward 3", "body": "Bed 12 calls", "urgency": "high", "ttl_s": 600}))),
        ("a sync for two devices" = (value = json!({"to": {"devices": ["mfzwizjanfxgk4tfon2ca43fmy", "orugs4zanfzsa4timu2ca2lome"]}, "sync": ["Orders"], "collapse": "orders"}))),
        ("a text for a topic" = (value = json!({"to": {"topic": "ward/3"}, "title": "Ward 3", "body": "Visiting time is over"}))),
        ("a bare wake-up" = (value = json!({"to": {"device": "mfzwizjanfxgk4tfon2ca43fmy"}}))),
    )),
    responses(
        (status = 202, description = "Accepted.", body = Accepted,
            headers(
            ("RateLimit-Policy" = String, description = "What this caller may send: for each allowance the pings at once, `q`, and the seconds in which they come back, `w`. On every answer of this call."),
            ("RateLimit" = String, description = "How the allowances stand: pings left, `r`, and seconds until all of them are there again, `t`. On every answer of this call."),
        ),
            example = json!({"id": "k5xw6ztqmfzwk3thonuw4zlsme", "devices": 2, "ttl_s": 604800})),
        (status = 200, description = "Accepted, with `wait`: what is known by now.", body = Accepted,
            example = json!({"id": "k5xw6ztqmfzwk3thonuw4zlsme", "devices": 1, "ttl_s": 600, "outcomes": [
                {"device": "mfzwizjanfxgk4tfon2ca43fmy", "state": "acknowledged", "at_ms": 1795250000000u64}]})),
        CreateRefusals,
    ),
)]
pub(super) async fn create(
    who: Scoped<Ping>,
    State(backend): State<Backend>,
    request: Request,
) -> Response {
    let result = publish(&who, &backend, request).await;
    allowance::told(&backend.handle, &who, result)
}

async fn publish(
    who: &Principal,
    backend: &Backend,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let wait = wait(parts.uri.query(), &backend.handle.limits())?;
    let key = idempotency_key(&parts.headers)?;
    body::expect_json(&parts.headers)?;
    let most = backend.handle.limits().body_max;
    let (bytes, _room) = body::read_long(body, most.max(PING_BODY_MAX), |size| {
        backend.handle.hold_body(who.app(), size)
    })
    .await?;
    // After the body, or the connection could not be used again.
    backend.handle.admit(who)?;
    let ping = ping_body::read(&bytes)?;
    let key = key.map(|key| (key, sha256(&bytes)));
    let request = self::request(who.app(), ping, key, wait);
    let answered = match parts.extensions.get::<Origin>() {
        Some(origin) => backend.handle.ping_traced(request, origin).await,
        None => backend.handle.ping(request).await,
    }?;
    Ok(accepted(&answered, wait.is_some()))
}

/// What the runtime is asked for.
pub(super) fn request(
    app: AppId,
    ping: PingBody,
    idempotency: Option<(String, [u8; 32])>,
    wait_acknowledged: Option<Duration>,
) -> PingRequest {
    let mut content = ping.content;
    if let Target::Topic(topic) = &ping.target {
        content.topic = Some(topic.clone());
    }
    PingRequest {
        app,
        target: ping.target,
        content: Content {
            encoded: content.to_cbor().into(),
            // A body of a few MiB holds less than 4 GiB.
            size: u32::try_from(content.size()).unwrap_or(u32::MAX),
        },
        ttl_s: ping.ttl_s,
        urgency: ping.urgency,
        collapse: ping.collapse,
        idempotency,
        wait_acknowledged,
    }
}

/// The devices that did not accept theirs.
pub(super) fn rejected(answered: &PingAnswer) -> Vec<Rejected> {
    answered
        .rejected
        .iter()
        .map(|(device, why)| Rejected {
            device: *device,
            code: rejection_code(*why).name(),
        })
        .collect()
}

fn accepted(answered: &PingAnswer, waited: bool) -> Response {
    let body = Accepted {
        id: answered.id,
        devices: answered.devices,
        ttl_s: answered.ttl_s,
        rejected: rejected(answered),
        outcomes: waited.then(|| answered.outcomes.iter().map(DeviceState::from).collect()),
    };
    let status = if waited {
        StatusCode::OK
    } else {
        StatusCode::ACCEPTED
    };
    answer(status, &body)
}

/// How long to wait, from the query.
pub(super) fn wait(query: Option<&str>, limits: &Limits) -> Result<Option<Duration>, Problem> {
    let query = Query::read(query, &["wait", "timeout_s"])?;
    let asked = query.parsed("wait", "`acknowledged`", |text| {
        (text == "acknowledged").then_some(())
    })?;
    let most = limits.wait_max.as_secs();
    let takes = format!("an integer from 0 to {most}");
    let timeout_s = query.parsed("timeout_s", &takes, |text| {
        text.parse().ok().filter(|seconds| *seconds <= most)
    })?;
    match (asked, timeout_s) {
        (Some(()), timeout_s) => Ok(Some(
            timeout_s.map_or(limits.wait_default, Duration::from_secs),
        )),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(query::wrong("timeout_s", "used with `wait=acknowledged`")),
    }
}

/// The idempotency key, if there is one.
fn idempotency_key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    const NAME: &str = "Idempotency-Key";
    let mut values = headers.get_all("idempotency-key").iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let key = value.as_bytes();
    let fits = text::is_idempotency_key(key) && values.next().is_none();
    match std::str::from_utf8(key) {
        Ok(key) if fits => Ok(Some(key.to_owned())),
        _ => Err(Problem::new(
            Code::Malformed,
            "`Idempotency-Key` must be 1 to 255 visible ASCII characters, and come once.",
        )
        .at(Place::Header(NAME))),
    }
}

/// The id of a ping in a path. What is no id names no ping.
fn ping_id(text: &str) -> Result<PingId, Problem> {
    text.parse().map_err(|_| not_retained())
}

fn not_retained() -> Problem {
    Problem::plain(Code::PingNotRetained)
}

/// See what became of a ping.
///
/// Outcomes are kept for 24 hours unless the operator set another time. A ping of another app is not found.
#[utoipa::path(
    get,
    path = "/v1/pings/{id}",
    tag = "pings",
    operation_id = "get_ping",
    params(
        ("id" = String, Path, description = "The ping."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most devices to list. Default 100."),
    ),
    responses(
        (status = 200, description = "What is known, by device.", body = PingReport,
            example = json!({"id": "k5xw6ztqmfzwk3thonuw4zlsme",
                "expanding": {"estimate": 48000, "done": 12000, "unknown": 0}, "devices": [
                {"device": "mfzwizjanfxgk4tfon2ca43fmy", "state": "waiting", "expires_ms": 1795854800000u64},
                {"device": "orugs4zanfzsa4timu2ca2lome", "state": "acknowledged", "at_ms": 1795250000000u64}]})),
        LookRefusals,
    ),
)]
pub(super) async fn look(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(request.uri().query(), &["after", "limit"])?;
    let after = query.parsed("after", "the `next` of the page before", |text| {
        text.parse().ok()
    })?;
    let view = backend
        .handle
        .ping_view(who.app(), ping_id(&id)?, after, query.limit()?)
        .await?
        .ok_or_else(not_retained)?;
    Ok(answer(
        StatusCode::OK,
        &PingReport {
            id: view.id,
            expanding: view.expansion.map(|open| Expanding {
                estimate: open.estimate,
                done: open.done,
                unknown: open.unknown,
            }),
            devices: view.devices.iter().map(DeviceState::from).collect(),
            next: view.next.map(|next| next.to_string()),
        },
    ))
}

/// Take a ping back where it has not ended.
///
/// Devices that have it already are told to take it off the screen. Revoking twice is no error. One that is on its way to an
/// audience stops first, and comes to no further device.
#[utoipa::path(
    delete,
    path = "/v1/pings/{id}",
    tag = "pings",
    operation_id = "revoke_ping",
    params(("id" = String, Path, description = "The ping.")),
    responses(
        (status = 200, description = "What was taken back.", body = Revocation, example = json!({"revoked": 1, "ended": 1})),
        RevokeRefusals,
    ),
)]
pub(super) async fn revoke(
    who: Scoped<Ping>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let counts = backend
        .handle
        .revoke_ping(who.app(), ping_id(&id)?)
        .await?
        .ok_or_else(not_retained)?;
    Ok(answer(
        StatusCode::OK,
        &Revocation {
            revoked: counts.revoked,
            ended: counts.ended,
        },
    ))
}

/// Take a ping off the screens.
///
/// Where it waits it is revoked, as `DELETE` does. A device that has it is told to take it off the screen: at once if it is
/// connected, and otherwise when it comes back, within `limits.withdrawals_keep` (7 days unless the operator set another
/// time). `except` names devices that keep it, such as the one on which it was read. Withdrawing twice is no error.
#[utoipa::path(
    post,
    path = "/v1/pings/{id}/withdraw",
    tag = "pings",
    operation_id = "withdraw_ping",
    params(("id" = String, Path, description = "The ping.")),
    request_body(content = Option<Withdrawal>, content_type = "application/json", description = "May be absent.", examples(
        ("read on one device" = (value = json!({"except": ["mfzwizjanfxgk4tfon2ca43fmy"]}))),
    )),
    responses(
        (status = 200, description = "What was taken back.", body = Withdrawn,
            example = json!({"revoked": 1, "withdrawn": 2, "ended": 0, "kept": 1})),
        WithdrawRefusals,
    ),
)]
pub(super) async fn withdraw(
    who: Scoped<Ping>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    let bytes = body::read(body, backend.handle.limits().body_max).await?;
    let asked: Withdrawal = if bytes.is_empty() {
        Withdrawal::default()
    } else {
        body::expect_json(&parts.headers)?;
        json::read(&bytes)?
    };
    let except = asked.except.unwrap_or_default().into_iter().collect();
    let counts = backend
        .handle
        .withdraw_ping(who.app(), ping_id(&id)?, except)
        .await?
        .ok_or_else(not_retained)?;
    Ok(answer(
        StatusCode::OK,
        &Withdrawn {
            revoked: counts.revoked,
            withdrawn: counts.withdrawn,
            ended: counts.ended,
            kept: counts.kept,
        },
    ))
}
