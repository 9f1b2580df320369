//! `/v1/outcomes` and `/v1/devices/{id}/outcomes`: how notifications ended, by time and by device.

use axum::extract::{Request, State};
use axum::response::Response;
use bellwire_protocol::Code;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::{Read, Scoped};
use super::devices::device_id;
use super::document::refusals;
use super::error::{Place, Problem};
use super::query::{self, PathId, Query};
use super::{Backend, answer, text};
use crate::delivery::{AppId, DeviceId, PingId};
use crate::runtime::{
    Outcome, OutcomeOrder, OutcomePage, OutcomePosition, OutcomeQuery, OutcomeRecord, RuntimeError,
};

/// How one notification for one device ended.
#[derive(Serialize, ToSchema)]
pub(super) struct OutcomeEntry {
    /// Which ping.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    ping: PingId,
    /// Which device.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// `acknowledged`, `declined`, `replaced`, `expired`, `evicted`, `revoked`, `refused` or `forwarded`.
    outcome: &'static str,
    /// When it ended, Unix milliseconds.
    at_ms: u64,
    /// When it was accepted, Unix milliseconds; absent where that was no longer known.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    accepted_ms: Option<u64>,
}

impl From<OutcomeRecord> for OutcomeEntry {
    fn from(record: OutcomeRecord) -> OutcomeEntry {
        OutcomeEntry {
            ping: record.ping,
            device: record.device,
            outcome: record.outcome.as_str(),
            at_ms: record.at_ms,
            accepted_ms: record.accepted_ms,
        }
    }
}

/// A page of outcomes, in the order in which they were recorded.
#[derive(Serialize, ToSchema)]
pub(super) struct OutcomeList {
    /// The outcomes. There may be fewer than `limit`, even none, on a page that is not the last one.
    outcomes: Vec<OutcomeEntry>,
    /// What ended before this time is past its keeping time and not listed, Unix milliseconds.
    kept_from_ms: u64,
    /// Pass this as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next: Option<String>,
}

impl OutcomeList {
    fn new(page: OutcomePage, order: OutcomeOrder) -> OutcomeList {
        OutcomeList {
            outcomes: page.items.into_iter().map(OutcomeEntry::from).collect(),
            kept_from_ms: page.kept_from_ms,
            next: page.next.map(|next| cursor(next, order)),
        }
    }
}

/// A place in the history and the direction of the walk, as callers carry it.
pub(super) fn cursor(position: OutcomePosition, order: OutcomeOrder) -> String {
    format!("{}{:016x}", direction(order), position.0)
}

pub(super) fn parse_cursor(text: &str, order: OutcomeOrder) -> Option<OutcomePosition> {
    let digits = text.strip_prefix(direction(order))?;
    let plain = digits.len() == 16
        && digits
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let number = u64::from_str_radix(digits, 16).ok().filter(|_| plain)?;
    Some(OutcomePosition(number))
}

fn direction(order: OutcomeOrder) -> char {
    match order {
        OutcomeOrder::NewestFirst => 'n',
        OutcomeOrder::OldestFirst => 'o',
    }
}

/// Reads what to list; `devices` is left open.
fn wanted(app: AppId, query: &Query<'_>) -> Result<OutcomeQuery, Problem> {
    const TIME: &str = "an integer, Unix milliseconds";
    let outcome = query.parsed("outcome", "the name of an outcome", |text| {
        Outcome::ALL
            .into_iter()
            .find(|outcome| outcome.as_str() == text)
    })?;
    let from_ms = query.parsed("from_ms", TIME, |text| text.parse().ok())?;
    let to_ms = query.parsed("to_ms", TIME, |text| text.parse().ok())?;
    let (from_ms, to_ms) = (from_ms.unwrap_or(0), to_ms.unwrap_or(u64::MAX));
    if from_ms >= to_ms {
        return Err(query::wrong("from_ms", "before `to_ms`"));
    }
    let order = query
        .parsed("order", "`newest` or `oldest`", |text| match text {
            "newest" => Some(OutcomeOrder::NewestFirst),
            "oldest" => Some(OutcomeOrder::OldestFirst),
            _ => None,
        })?
        .unwrap_or_default();
    let start = query.parsed(
        "after",
        "the `next` of the page before, in the same order",
        |text| parse_cursor(text, order),
    )?;
    Ok(OutcomeQuery {
        app,
        devices: None,
        outcome,
        from_ms,
        to_ms,
        order,
        start,
        limit: query.limit()?,
    })
}

refusals! {
    ListRefusals: Malformed, Unauthenticated, Forbidden, Unprocessable, Internal, StoreUnavailable, StoreBusy, Draining;
    DeviceRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, Internal, StoreUnavailable, StoreBusy, Draining;
}

/// List how notifications ended.
///
/// Of the key's app, by the time at which they ended, the newest first. An outcome is listed about a second after it is
/// known; `GET /v1/pings/{id}` knows it at once. Pages stay right while new outcomes come and old ones are dropped: none
/// is listed twice, and none that stays is left out. One call looks at a limited number of outcomes, so a page may have
/// few or none and still a `next`.
#[utoipa::path(
    get,
    path = "/v1/outcomes",
    tag = "pings",
    operation_id = "list_outcomes",
    params(
        ("user" = Option<String>, Query, description = "Only those of the devices that this user has now, at most 1,000."),
        ("outcome" = Option<String>, Query, description = "Only those that ended so.",
            pattern = "^(acknowledged|declined|replaced|expired|evicted|revoked|refused|forwarded)$"),
        ("from_ms" = Option<u64>, Query, description = "Only those that ended at this time or later, Unix milliseconds."),
        ("to_ms" = Option<u64>, Query, description = "Only those that ended before this time, Unix milliseconds."),
        ("order" = Option<String>, Query, pattern = "^(newest|oldest)$",
            description = "Which come first. Default `newest`."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most outcomes to list. Default 100."),
    ),
    responses(
        (status = 200, description = "A page of outcomes.", body = OutcomeList,
            example = json!({"outcomes": [{"ping": "k5xw6ztqmfzwk3thonuw4zlsme", "device": "mfzwizjanfxgk4tfon2ca43fmy",
                "outcome": "acknowledged", "at_ms": 1795250000400u64, "accepted_ms": 1795250000000u64}],
                "kept_from_ms": 1795163600000u64, "next": "n0000000c00000155"})),
        ListRefusals,
    ),
)]
pub(super) async fn list(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(
        request.uri().query(),
        &[
            "user", "outcome", "from_ms", "to_ms", "order", "after", "limit",
        ],
    )?;
    let user = query.parsed(
        "user",
        "a text of 1 to 255 bytes without control characters",
        text::name,
    )?;
    let wanted = wanted(who.app(), &query)?;
    let order = wanted.order;
    let page = match backend.handle.outcomes(user.as_deref(), wanted).await {
        Err(RuntimeError::Invalid(why)) => {
            return Err(
                Problem::new(Code::Unprocessable, why).at(Place::Parameter("user".to_owned()))
            );
        }
        page => page?,
    };
    Ok(answer(StatusCode::OK, &OutcomeList::new(page, order)))
}

/// List how the notifications of a device ended.
///
/// As `GET /v1/outcomes`, of one device. A device that was revoked is not known any more; its outcomes are still told by ping
/// and by time until they are past their keeping time.
#[utoipa::path(
    get,
    path = "/v1/devices/{id}/outcomes",
    tag = "devices",
    operation_id = "list_device_outcomes",
    params(
        ("id" = String, Path, description = "The device."),
        ("outcome" = Option<String>, Query, description = "Only those that ended so.",
            pattern = "^(acknowledged|declined|replaced|expired|evicted|revoked|refused|forwarded)$"),
        ("from_ms" = Option<u64>, Query, description = "Only those that ended at this time or later, Unix milliseconds."),
        ("to_ms" = Option<u64>, Query, description = "Only those that ended before this time, Unix milliseconds."),
        ("order" = Option<String>, Query, pattern = "^(newest|oldest)$",
            description = "Which come first. Default `newest`."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most outcomes to list. Default 100."),
    ),
    responses(
        (status = 200, description = "A page of outcomes.", body = OutcomeList,
            example = json!({"outcomes": [{"ping": "k5xw6ztqmfzwk3thonuw4zlsme", "device": "mfzwizjanfxgk4tfon2ca43fmy",
                "outcome": "expired", "at_ms": 1795250600000u64, "accepted_ms": 1795250000000u64}],
                "kept_from_ms": 1795163600000u64})),
        DeviceRefusals,
    ),
)]
pub(super) async fn of_device(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(
        request.uri().query(),
        &["outcome", "from_ms", "to_ms", "order", "after", "limit"],
    )?;
    let device = device_id(&id)?;
    let wanted = OutcomeQuery {
        devices: Some(vec![device]),
        ..wanted(who.app(), &query)?
    };
    let order = wanted.order;
    if backend.handle.device(who.app(), device).await?.is_none() {
        return Err(Problem::plain(Code::UnknownDevice));
    }
    let page = backend.handle.outcomes(None, wanted).await?;
    Ok(answer(StatusCode::OK, &OutcomeList::new(page, order)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_cursor_is_read_as_it_was_written_and_only_for_its_order() {
        for (order, other) in [
            (OutcomeOrder::NewestFirst, OutcomeOrder::OldestFirst),
            (OutcomeOrder::OldestFirst, OutcomeOrder::NewestFirst),
        ] {
            for number in [0, 1, 0xc_0000_0155, u64::MAX] {
                let position = OutcomePosition(number);
                let text = cursor(position, order);
                assert_eq!(parse_cursor(&text, order), Some(position));
                assert_eq!(parse_cursor(&text, other), None);
            }
        }
        for bad in [
            "",
            "n",
            "n1",
            "n+00000000000001",
            "nFFFFFFFFFFFFFFFF",
            "x0000000000000000",
        ] {
            assert_eq!(parse_cursor(bad, OutcomeOrder::NewestFirst), None, "{bad}");
        }
    }
}
