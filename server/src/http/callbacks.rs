//! `/v1/callbacks`: where outcomes are posted.

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use bellwire_protocol::Code;
use http::StatusCode;
use serde::Serialize;
use serde::de::MapAccess;
use std::time::Duration;
use utoipa::ToSchema;

use super::auth::{Keys, Read, Scoped};
use super::document::refusals;
use super::error::{Place, Problem};
use super::json::{self, Members, Trail};
use super::query::{PathId, Query};
use super::{Backend, answer, body, secret_answer};
use crate::runtime::{
    CallbackError, CallbackView, CallbackWish, DeadLetter, Failing, Outcome, Posted,
};

/// Longest time for which the old secret can stay good, seconds: 90 days.
const OVERLAP_MAX_S: u64 = 90 * 86_400;
/// Dead letters of one page.
const LETTERS_MAX: usize = 100;

const URL: &str = "the URL to post to, such as `https://hooks.example.com/bellwire`";
const SECRET: &str = "`whsec_` and 24 to 64 bytes in base64";
const OUTCOMES: &str = "an array of names of outcomes";
const OVERLAP: &str = "an integer from 0 to 7776000";

/// Where outcomes are to be posted.
#[derive(Default, ToSchema)]
#[schema(as = NewCallback)]
pub(super) struct Wanted {
    /// Where to: `https`, to a host that the operator allows.
    #[schema(required = true, nullable = false, max_length = 2048)]
    url: Option<String>,
    /// Only those that ended so. Default: all.
    #[schema(value_type = Option<Vec<String>>, max_items = 8, example = json!(["expired", "declined"]))]
    outcomes: Option<Vec<Outcome>>,
    /// A secret of your own: `whsec_` and 24 to 64 bytes in base64. Default: one is made, and shown once.
    secret: Option<String>,
}

fn outcome(name: &str) -> Option<Outcome> {
    Outcome::ALL
        .into_iter()
        .find(|outcome| outcome.as_str() == name)
}

impl Members for Wanted {
    const NAMES: &'static [&'static str] = &["url", "outcomes", "secret"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "url" => self.url = trail.text(map, URL, |text| Some(text.to_owned()))?,
            "secret" => self.secret = trail.text(map, SECRET, |text| Some(text.to_owned()))?,
            _ => {
                self.outcomes = trail.texts(
                    map,
                    (OUTCOMES, "the name of an outcome"),
                    Outcome::ALL.len(),
                    outcome,
                )?;
            }
        }
        Ok(())
    }
}

/// A new secret for a callback.
#[derive(Default, ToSchema)]
#[schema(as = NewCallbackSecret)]
pub(super) struct Rotation {
    /// One of your own. Default: one is made, and shown once.
    secret: Option<String>,
    /// For how long the one before signs as well, seconds. Default: 24 hours unless the operator set another time.
    #[schema(maximum = 7_776_000)]
    overlap_s: Option<u64>,
}

impl Members for Rotation {
    const NAMES: &'static [&'static str] = &["secret", "overlap_s"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "secret" => self.secret = trail.text(map, SECRET, |text| Some(text.to_owned()))?,
            _ => self.overlap_s = trail.value(map, OVERLAP)?,
        }
        Ok(())
    }
}

/// Since when posts fail.
#[derive(Serialize, ToSchema)]
pub(super) struct FailingBody {
    /// When the batch under way failed first, Unix milliseconds.
    since_ms: u64,
    /// How often it was tried.
    tries: u32,
    /// Why it failed last, for people.
    why: String,
    /// When it is tried again, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next_try_ms: Option<u64>,
}

/// Where outcomes are posted, and how that goes.
#[derive(Serialize, ToSchema)]
pub(super) struct Callback {
    /// Where to.
    url: String,
    /// Only those that ended so; empty: all.
    #[schema(value_type = Vec<String>)]
    outcomes: Vec<&'static str>,
    /// When it was set first, Unix milliseconds.
    created_ms: u64,
    /// `ok`, `failing` (it is tried again), or `gone` (the receiver said 410: set it again to go on).
    state: &'static str,
    /// How old the oldest outcome is that was not posted yet, milliseconds; 0: all are.
    lag_ms: u64,
    /// Batches that were given up and are kept.
    dead_letters: u64,
    /// While posts fail: since when, and why.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    failing: Option<FailingBody>,
    /// Until when the secret before this one signs as well, Unix milliseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    previous_secret_until_ms: Option<u64>,
    /// The secret, if it was made by this call. Shown this once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    secret: Option<String>,
}

impl Callback {
    fn new(view: CallbackView, secret: Option<String>) -> Callback {
        let state = match (view.gone_ms, &view.failing) {
            (Some(_), _) => "gone",
            (None, Some(_)) => "failing",
            (None, None) => "ok",
        };
        let next_try_ms = view.next_try_ms;
        Callback {
            url: view.url,
            outcomes: view.outcomes.into_iter().map(Outcome::as_str).collect(),
            created_ms: view.created_ms,
            state,
            lag_ms: view.lag_ms,
            dead_letters: view.dead_letters,
            failing: view.failing.map(
                |Failing {
                     since_ms,
                     tries,
                     why,
                 }| FailingBody {
                    since_ms,
                    tries,
                    why,
                    next_try_ms,
                },
            ),
            previous_secret_until_ms: view.previous_secret_until_ms,
            secret,
        }
    }
}

/// What a post came to.
#[derive(Serialize, ToSchema)]
pub(super) struct PostedBody {
    /// The status that the receiver answered, 200 to 299.
    status: u16,
}

/// A batch that was given up.
#[derive(Serialize, ToSchema)]
pub(super) struct Letter {
    /// Its number.
    number: u64,
    /// Its `webhook-id`, the same as in every attempt.
    id: String,
    /// How many events are in it.
    events: u32,
    /// How often it was tried.
    tries: u32,
    /// When it failed first, Unix milliseconds.
    since_ms: u64,
    /// When it was given up, Unix milliseconds.
    at_ms: u64,
    /// Why it failed last, for people.
    why: String,
}

impl From<DeadLetter> for Letter {
    fn from(letter: DeadLetter) -> Letter {
        Letter {
            number: letter.number,
            id: letter.id,
            events: letter.events,
            tries: letter.tries,
            since_ms: letter.since_ms,
            at_ms: letter.at_ms,
            why: letter.why,
        }
    }
}

/// A page of dead letters.
#[derive(Serialize, ToSchema)]
pub(super) struct Letters {
    /// The letters, the oldest first.
    dead_letters: Vec<Letter>,
    /// Pass this as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next: Option<u64>,
}

refusals! {
    SetRefusals: Malformed, Unauthenticated, Forbidden, BodyTimeout, BodyTooLarge, UnsupportedMediaType, CallbackNotAllowed,
        Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    RotateRefusals: Malformed, Unauthenticated, Forbidden, NoCallback, BodyTimeout, BodyTooLarge, UnsupportedMediaType,
        Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    LookRefusals: Malformed, Unauthenticated, Forbidden, NoCallback, Internal;
    DropRefusals: Malformed, Unauthenticated, Forbidden, NoCallback, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    TestRefusals: Malformed, Unauthenticated, Forbidden, NoCallback, Internal, CallbackFailed;
    LettersRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining;
    LetterRefusals: Malformed, Unauthenticated, Forbidden, NotFound, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    ResendRefusals: Malformed, Unauthenticated, Forbidden, NotFound, Internal, CallbackFailed, StoreUnavailable, StoreBusy, Draining, NoRoom;
}

fn problem(error: CallbackError) -> Problem {
    let at = |code, detail: String, pointer: &str| {
        Problem::new(code, detail).at(Place::Body(pointer.to_owned()))
    };
    match error {
        CallbackError::Off => Problem::new(
            Code::CallbackNotAllowed,
            "Callbacks are off: the operator's `callbacks.allow` names no host and no network.",
        ),
        CallbackError::NotAllowed(why) => at(
            Code::CallbackNotAllowed,
            format!("This address is not allowed: {why}."),
            "/url",
        ),
        CallbackError::Malformed(why) => at(
            Code::Malformed,
            format!("The member `url` must be {why}."),
            "/url",
        ),
        CallbackError::Secret => at(
            Code::Malformed,
            format!("The member `secret` must be {SECRET}."),
            "/secret",
        ),
        CallbackError::Unknown => Problem::plain(Code::NoCallback),
        CallbackError::Runtime(error) => error.into(),
    }
}

fn no_callback() -> Problem {
    Problem::plain(Code::NoCallback)
}

fn unknown() -> Problem {
    Problem::plain(Code::NotFound)
}

/// What to answer after a post.
fn posted(posted: Posted) -> Result<Response, Problem> {
    let why = match posted {
        Ok(answered) if (200..300).contains(&answered.status) => {
            return Ok(answer(
                StatusCode::OK,
                &PostedBody {
                    status: answered.status,
                },
            ));
        }
        Ok(answered) => format!("it answered {}", answered.status),
        Err(error) => error.to_string(),
    };
    Err(Problem::new(
        Code::CallbackFailed,
        format!("The receiver did not take it: {why}."),
    ))
}

/// Set where outcomes are posted.
///
/// Every outcome of the key's app from now on is posted to this URL, signed as Standard Webhooks 1.0.0 say, in the order in which
/// they were recorded, at least once, until it is answered 2xx. Setting it again changes URL and choice and goes on where it was; its secret
/// stays unless another is given. The operator must allow the host.
#[utoipa::path(
    put,
    path = "/v1/callbacks",
    tag = "callbacks",
    operation_id = "set_callback",
    request_body(content = Wanted, content_type = "application/json",
        example = json!({"url": "https://hooks.example.com/bellwire", "outcomes": ["expired", "declined"]})),
    responses(
        (status = 200, description = "Set.", body = Callback,
            example = json!({"url": "https://hooks.example.com/bellwire", "outcomes": ["expired", "declined"],
                "created_ms": 1795240000000u64, "state": "ok", "lag_ms": 0, "dead_letters": 0, "secret": "(shown once)"})),
        SetRefusals,
    ),
)]
pub(super) async fn set(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let wanted: Wanted = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    let wish = CallbackWish {
        url: wanted.url.ok_or_else(|| json::missing("/url", URL))?,
        outcomes: wanted.outcomes.unwrap_or_default(),
        secret: wanted.secret,
    };
    let (view, secret) = backend
        .handle
        .set_callback(who.app(), wish)
        .await
        .map_err(problem)?;
    Ok(secret_answer(StatusCode::OK, &Callback::new(view, secret)))
}

/// See where outcomes are posted, and how that goes.
#[utoipa::path(
    get,
    path = "/v1/callbacks",
    tag = "callbacks",
    operation_id = "get_callback",
    responses(
        (status = 200, description = "The callback.", body = Callback,
            example = json!({"url": "https://hooks.example.com/bellwire", "outcomes": [], "created_ms": 1795240000000u64,
                "state": "failing", "lag_ms": 61_000, "dead_letters": 0,
                "failing": {"since_ms": 1795250000000u64, "tries": 6, "why": "it answered 503", "next_try_ms": 1795250063000u64}})),
        LookRefusals,
    ),
)]
pub(super) async fn look(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let view = backend.handle.callback(who.app()).await;
    let view = view.ok_or_else(no_callback)?;
    Ok(answer(StatusCode::OK, &Callback::new(view, None)))
}

/// Post outcomes nowhere any more.
///
/// What was not posted yet is not posted, and dead letters are forgotten. The outcomes themselves stay as long as any.
#[utoipa::path(
    delete,
    path = "/v1/callbacks",
    tag = "callbacks",
    operation_id = "remove_callback",
    responses((status = 204, description = "Nothing is posted any more."), DropRefusals),
)]
pub(super) async fn remove(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    if backend.handle.drop_callback(who.app()).await? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(no_callback())
    }
}

/// Give the callback a new secret.
///
/// For a while every post carries a signature with each of the two, so that a receiver can change over at any moment of it.
#[utoipa::path(
    post,
    path = "/v1/callbacks/secret",
    tag = "callbacks",
    operation_id = "rotate_callback_secret",
    request_body(content = Rotation, content_type = "application/json", example = json!({"overlap_s": 86_400})),
    responses(
        (status = 200, description = "Changed.", body = Callback,
            example = json!({"url": "https://hooks.example.com/bellwire", "outcomes": [], "created_ms": 1795240000000u64,
                "state": "ok", "lag_ms": 0, "dead_letters": 0, "previous_secret_until_ms": 1795336400000u64,
                "secret": "(shown once)"})),
        RotateRefusals,
    ),
)]
pub(super) async fn rotate(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let rotation: Rotation =
        json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    if rotation
        .overlap_s
        .is_some_and(|overlap| overlap > OVERLAP_MAX_S)
    {
        return Err(Problem::new(
            Code::Malformed,
            format!("The member `overlap_s` must be {OVERLAP}."),
        )
        .at(Place::Body("/overlap_s".to_owned())));
    }
    let (view, secret) = backend
        .handle
        .rotate_callback_secret(
            who.app(),
            rotation.secret.as_deref(),
            rotation.overlap_s.map(Duration::from_secs),
        )
        .await
        .map_err(problem)?;
    Ok(secret_answer(StatusCode::OK, &Callback::new(view, secret)))
}

/// Post a test.
///
/// Posts a body of type `bellwire.test` now and waits for the answer. It is not tried again.
#[utoipa::path(
    post,
    path = "/v1/callbacks/test",
    tag = "callbacks",
    operation_id = "test_callback",
    responses((status = 200, description = "The receiver took it.", body = PostedBody, example = json!({"status": 204})), TestRefusals),
)]
pub(super) async fn test(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let answered = backend.handle.test_callback(who.app()).await;
    posted(answered.ok_or_else(no_callback)?)
}

/// List the batches that were given up.
#[utoipa::path(
    get,
    path = "/v1/callbacks/dead-letters",
    tag = "callbacks",
    operation_id = "list_dead_letters",
    params(
        ("after" = Option<u64>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 100, description = "Most letters to list. Default 100."),
    ),
    responses(
        (status = 200, description = "A page of them.", body = Letters,
            example = json!({"dead_letters": [{"number": 1, "id": "msg_0f1e2d3c4b5a69788796a5b4c3d2e1f0", "events": 100,
                "tries": 151, "since_ms": 1795200000000u64, "at_ms": 1795243200000u64, "why": "it answered 500"}]})),
        LettersRefusals,
    ),
)]
pub(super) async fn letters(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(request.uri().query(), &["after", "limit"])?;
    let after = query.parsed("after", "the `next` of the page before", |text| {
        text.parse().ok()
    })?;
    let limit = query.parsed("limit", "an integer from 1 to 100", |text| {
        text.parse()
            .ok()
            .filter(|limit| (1..=LETTERS_MAX).contains(limit))
    })?;
    let page = backend
        .handle
        .dead_letters(who.app(), after, limit.unwrap_or(LETTERS_MAX))
        .await?;
    Ok(answer(
        StatusCode::OK,
        &Letters {
            dead_letters: page.items.into_iter().map(Letter::from).collect(),
            next: page.next,
        },
    ))
}

fn number(id: &str) -> Result<u64, Problem> {
    id.parse().map_err(|_| unknown())
}

/// Post a dead letter again.
///
/// Once, now, with the same body under the same id. If it is taken it is forgotten here.
#[utoipa::path(
    post,
    path = "/v1/callbacks/dead-letters/{id}/resend",
    tag = "callbacks",
    operation_id = "resend_dead_letter",
    params(("id" = String, Path, description = "Its number.")),
    responses((status = 200, description = "The receiver took it.", body = PostedBody, example = json!({"status": 200})), ResendRefusals),
)]
pub(super) async fn resend(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let answered = backend.handle.resend(who.app(), number(&id)?).await?;
    posted(answered.ok_or_else(unknown)?)
}

/// Forget a dead letter.
#[utoipa::path(
    delete,
    path = "/v1/callbacks/dead-letters/{id}",
    tag = "callbacks",
    operation_id = "drop_dead_letter",
    params(("id" = String, Path, description = "Its number.")),
    responses((status = 204, description = "It is forgotten."), LetterRefusals),
)]
pub(super) async fn drop_letter(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let number = number(&id)?;
    if backend.handle.drop_dead_letter(who.app(), number).await? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(unknown())
    }
}
