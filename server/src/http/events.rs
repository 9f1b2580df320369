//! `/v1/events`: outcomes as they happen, as server-sent events (WHATWG HTML, section 9.2).

use std::fmt::Write as _;
use std::io;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bellwire_protocol::Code;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderName, HeaderValue, Version};
use serde::Serialize;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::Backend;
use super::auth::{Read, Scoped};
use super::document::refusals;
use super::error::{Place, Problem};
use super::outcomes::{OutcomeEntry, cursor, parse_cursor};
use super::query::Query;
use super::serve::Cut;
use crate::runtime::{
    EventStream, EventsFrom, EventsOf, Outcome, OutcomeEvent, OutcomeGap, OutcomeOrder,
    OutcomePosition, Step,
};

const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");
const LAST_EVENT_ID: &str = "Last-Event-ID";
/// How long whoever reads may take none of what is there before it counts as gone.
const STALL: Duration = Duration::from_secs(60);
/// What a reader is told to wait before it comes back.
const RETRY: &str = "retry: 2000\n";

refusals! {
    EventRefusals: Malformed, Unauthenticated, Forbidden, TooManyStreams, Internal, StoreUnavailable, Draining;
}

/// That outcomes are missing.
#[derive(Serialize, ToSchema)]
pub(super) struct GapEntry {
    /// `dropped`: by age or size, before they were asked for. `lost`: never written, by a crash or a failing disk. `unreadable`:
    /// rot. `elsewhere`: the id is not of this server's history.
    why: &'static str,
}

impl From<OutcomeGap> for GapEntry {
    fn from(gap: OutcomeGap) -> GapEntry {
        GapEntry { why: gap.as_str() }
    }
}

/// Follow the outcomes of the key's app as they happen.
///
/// Server-sent events without an end. `event: outcome` has an entry as `GET /v1/outcomes` lists them; `event: gap` says that
/// outcomes may be missing at this place, and why. The `id` of an event is a position in the history: sent back as `Last-Event-ID` the
/// stream goes on right behind it, after a restart of the server too, as far back as `receipts.keep` reaches; as `after` of
/// `GET /v1/outcomes?order=oldest` it begins a page there. An `id` without data, every 15 seconds while nothing happens, says that everything up to there was told.
///
/// An outcome is told some ten milliseconds after it is known. Those of stored notifications are told at least once, and only
/// after a crash twice. A reader may be as slow as it likes; one that takes nothing for a minute is cut off and can come
/// back.
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "pings",
    operation_id = "follow_events",
    params(
        ("from" = Option<String>, Query, pattern = "^(now|oldest|o[0-9a-f]{16})$",
            description = "Where to begin: `now` (default), `oldest`, or behind the event with this `id`."),
        ("ping" = Option<String>, Query, description = "Only the outcomes of this ping."),
        ("device" = Option<String>, Query, description = "Only the outcomes of this device."),
        ("outcome" = Option<String>, Query, description = "Only those that ended so: names of outcomes, with commas between them.",
            example = "expired,evicted"),
        ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that was seen; counts more than `from`."),
    ),
    responses(
        (status = 200, description = "Events. The data of `outcome` is an OutcomeEntry, that of `gap` a GapEntry.", body = String,
            content_type = "text/event-stream",
            example = "id: o0000000c00000155\nevent: outcome\ndata: {\"ping\":\"k5xw6ztqmfzwk3thonuw4zlsme\",\
                \"device\":\"mfzwizjanfxgk4tfon2ca43fmy\",\"outcome\":\"acknowledged\",\"at_ms\":1795250000400}\n\n"),
        EventRefusals,
    ),
)]
pub(super) async fn follow(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(
        request.uri().query(),
        &["from", "ping", "device", "outcome"],
    )?;
    let from = query.parsed(
        "from",
        "`now`, `oldest` or the `id` of an event",
        |text| match text {
            "now" => Some(EventsFrom::Now),
            "oldest" => Some(EventsFrom::Oldest),
            id => position(id).map(EventsFrom::After),
        },
    )?;
    let from = match last_event_id(&request)? {
        Some(position) => EventsFrom::After(position),
        None => from.unwrap_or(EventsFrom::Now),
    };
    let wanted = EventsOf {
        ping: query.parsed("ping", "the id of a ping", |id| id.parse().ok())?,
        device: query.parsed("device", "the id of a device", |id| id.parse().ok())?,
        outcomes: query
            .parsed(
                "outcome",
                "names of outcomes with commas between them",
                outcomes,
            )?
            .unwrap_or_default(),
    };
    let mut events = backend.handle.follow(&who, from, wanted)?;
    let (to, mut written) = mpsc::channel(1);
    // An HTTP/2 connection carries other calls as well, and a stream that nobody reads holds only itself there.
    let cut = request.extensions().get::<Cut>().cloned();
    let cut = cut.filter(|_| request.version() < Version::HTTP_2);
    tokio::spawn(async move {
        let over = pump(&mut events, &to).await;
        // Its place among the streams is for others again.
        drop(events);
        if over == Over::Stalled
            && let Some(Cut(cut)) = cut
        {
            tracing::debug!("a stream of events was cut: nobody took any for a minute");
            cut.cancel();
        }
    });
    let body = stream::poll_fn(move |context| written.poll_recv(context));
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, EVENT_STREAM);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // Proxies that gather answers would hold back what is small.
    headers.insert(
        HeaderName::from_static("x-accel-buffering"),
        HeaderValue::from_static("no"),
    );
    Ok(response)
}

/// Reads names of outcomes.
fn outcomes(names: &str) -> Option<Vec<Outcome>> {
    let outcome = |name: &str| Outcome::ALL.into_iter().find(|one| one.as_str() == name);
    names.split(',').map(outcome).collect()
}

fn position(id: &str) -> Option<OutcomePosition> {
    parse_cursor(id, OutcomeOrder::OldestFirst)
}

fn last_event_id(request: &Request) -> Result<Option<OutcomePosition>, Problem> {
    let mut values = request.headers().get_all(LAST_EVENT_ID).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    let id = value.to_str().ok().filter(|_| values.next().is_none());
    if id == Some("") {
        // Whoever saw no event yet may say so.
        return Ok(None);
    }
    match id.and_then(position) {
        Some(position) => Ok(Some(position)),
        None => Err(Problem::new(
            Code::Malformed,
            "`Last-Event-ID` must be the `id` of an event of this stream, given once.",
        )
        .at(Place::Header(LAST_EVENT_ID))),
    }
}

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Nothing more is told, or nobody listens.
    Told,
    /// Nobody took anything for [`STALL`].
    Stalled,
}

/// Hands on what the stream says until either end has had enough.
async fn pump(events: &mut EventStream, to: &mpsc::Sender<io::Result<Bytes>>) -> Over {
    let mut begun = false;
    loop {
        let step = tokio::select! {
            step = events.next() => step,
            // Nobody reads any more; without this a quiet stream would keep its place.
            () = to.closed() => return Over::Told,
        };
        let mut text = String::new();
        if !std::mem::replace(&mut begun, true) {
            text.push_str(RETRY);
        }
        match step {
            Ok(Step::Events(some)) => {
                for (position, event) in some {
                    write_event(&mut text, position, &event);
                }
            }
            Ok(Step::Quiet(position)) => {
                let id = cursor(position, OutcomeOrder::OldestFirst);
                // Writing to a text cannot fail.
                let _ = write!(text, ": nothing new\nid: {id}\n\n");
            }
            Ok(Step::End) => return Over::Told,
            Err(error) => {
                // The end of a stream is no promise of anything; whoever comes back is told why.
                tracing::warn!(%error, "a stream of events ends early");
                return Over::Told;
            }
        }
        match tokio::time::timeout(STALL, to.send(Ok(Bytes::from(text)))).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Over::Told,
            Err(_) => return Over::Stalled,
        }
    }
}

fn write_event(text: &mut String, position: OutcomePosition, event: &OutcomeEvent) {
    let id = cursor(position, OutcomeOrder::OldestFirst);
    // Our own types of texts and numbers: serialising them cannot fail.
    let (name, data) = match event {
        OutcomeEvent::Ended(record) => (
            "outcome",
            serde_json::to_string(&OutcomeEntry::from(*record)).unwrap_or_default(),
        ),
        OutcomeEvent::Gap(gap) => (
            "gap",
            serde_json::to_string(&GapEntry::from(*gap)).unwrap_or_default(),
        ),
    };
    // Writing to a text cannot fail.
    let _ = write!(text, "id: {id}\nevent: {name}\ndata: {data}\n\n");
}
