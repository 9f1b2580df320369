//! `/v1/pings/batch`: many pings in one request, one a line, each with an answer of its own.
//!
//! The body is read whole before its first line is looked at, so that a batch that is too large is refused before anything of it
//! happened, and so that a caller who sends everything before it reads anything never waits for us while we wait for it. What is read
//! counts against the memory reserve. Then a task of its own starts the lines in their order, many at the same time, and sends the answers
//! in the same order as they come. A line begins when the one before has its place in every mailbox: so the lines of one batch
//! to one device arrive in their order.
//!
//! The task, and not the answer's reader, drives the pings: what is under way goes on whether or not somebody reads, so that no slow
//! reader holds what others wait for. A reader who takes nothing only keeps further lines from being begun, and is cut after
//! `limits.batch_stall`.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::ops::Range;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use bellwire_protocol::Code;
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{self, FuturesOrdered};
use futures_util::{FutureExt as _, StreamExt as _};
use http::header::{CONTENT_TYPE, HeaderName};
use http::{HeaderMap, HeaderValue, StatusCode, Version};
use serde::Serialize;
use tokio::sync::mpsc;
use utoipa::ToSchema;

use super::auth::{Ping, Scoped};
use super::document::refusals;
use super::error::{Place, Problem};
use super::ping_body::{self, PingLineSchema};
use super::pings::{self, Rejected};
use super::query::Query;
use super::serve::Cut;
use super::{Backend, allowance, body, text};
use crate::delivery::PingId;
use crate::runtime::{
    Begun, BodyShare, HandedPing, Handle, Origin, PingAnswer, PingError, PingRequest, Placed,
    Principal, Target, Turn, sha256,
};
use crate::telemetry::metrics as names;

/// Pings of one batch under way at the same time.
const UNDER_WAY_MAX: usize = 512;
/// Lines that are read ahead of those under way; their users are looked up together.
const AHEAD_MAX: usize = 64;
/// Answers that wait to be sent, bytes, beyond which no further line is begun. Those under way may add theirs.
const UNSENT_MAX: usize = 64 << 10;
/// Pieces of the answer between the task and the connection.
const PIECES_MAX: usize = 2;

/// The media type of the answer, and the first of those of a batch.
const NDJSON: &str = "application/x-ndjson";
const NDJSON_TYPES: [&str; 3] = [NDJSON, "application/ndjson", "application/jsonl"];
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

refusals! {
    BatchRefusals: Malformed, Unauthenticated, Forbidden, BodyTimeout, BodyTooLarge, UnsupportedMediaType, Internal,
        StoreUnavailable, Draining, MemoryReserve;
}

/// What became of one line of a batch: the members of an accepted ping, or `problem`.
#[derive(Serialize, ToSchema)]
#[schema(as = PingLineAnswer)]
struct LineAnswer<'a> {
    /// The number of the line in the body, from 1; empty lines count.
    #[schema(minimum = 1)]
    line: u32,
    /// What `POST /v1/pings` would have answered: 202, or the status of `problem`.
    #[schema(minimum = 200, maximum = 599, example = 202)]
    status: u16,
    /// The id of the ping.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "id")]
    #[schema(value_type = String, nullable = false, required = false, example = "k5xw6ztqmfzwk3thonuw4zlsme")]
    id: Option<PingId>,
    /// How many devices it addresses, those in `rejected` included.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    devices: Option<u32>,
    /// Granted TTL in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    ttl_s: Option<u64>,
    /// Devices that did not accept theirs, when the ping names several. Nothing of it is kept for these.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(required = false)]
    rejected: Vec<Rejected>,
    /// Why the line was refused; nothing of it is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, inline)]
    problem: Option<LineProblem<'a>>,
}

/// Why a line was refused.
#[derive(Serialize, ToSchema)]
struct LineProblem<'a> {
    /// The stable code; docs/errors.md lists all of them.
    code: &'a str,
    /// What the code means.
    title: &'a str,
    /// What is wrong in this line.
    detail: &'a str,
    /// What to do about it.
    remedy: &'a str,
    /// The offending member of the line, as a JSON pointer (RFC 6901).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "/to/device")]
    pointer: Option<&'a str>,
    /// When to try again, in seconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    retry_after_s: Option<u32>,
}

fn id<S: serde::Serializer>(id: &Option<PingId>, serializer: S) -> Result<S::Ok, S::Error> {
    match id {
        Some(id) => text::display(id, serializer),
        None => serializer.serialize_none(),
    }
}

/// Send many pings.
///
/// One ping a line, each as `POST /v1/pings` takes it and with `idempotency_key` as a member in place of the header. The answer has one
/// line for each, in the same order, sent as they come: a line that is refused costs no other line anything. Lines to the same device
/// reach it in their order. At most 1,000 lines and 8 MiB; lines with nothing but spaces are passed over.
///
/// The answer is complete when it has as many lines as the request. If the connection breaks before, send those without an answer again:
/// with the same `idempotency_key` in the same line that is safe.
#[utoipa::path(
    post,
    path = "/v1/pings/batch",
    tag = "pings",
    operation_id = "create_pings",
    request_body(content = PingLineSchema, content_type = "application/x-ndjson", description = "One of these on each line.",
        example = json!({"to": {"user": "ana"}, "title": "Ward 3", "idempotency_key": "call-17"})),
    responses(
        (status = 200, description = "One of these on each line, for each line in its order.", body = LineAnswer<'static>,
            content_type = "application/x-ndjson", headers(
            ("RateLimit-Policy" = String, description = "What this caller may send: for each allowance the pings at once, `q`, and the seconds in which they come back, `w`. On every answer of this call."),
            ("RateLimit" = String, description = "How the allowances stand: pings left, `r`, and seconds until all of them are there again, `t`. On every answer of this call."),
        ), examples(
                ("accepted" = (value = json!({"line": 1, "status": 202, "id": "k5xw6ztqmfzwk3thonuw4zlsme", "devices": 2, "ttl_s": 604800}))),
                ("refused" = (value = json!({"line": 2, "status": 404, "problem": {"code": "unknown_device",
                    "title": Code::UnknownDevice.meaning(), "detail": Code::UnknownDevice.meaning(),
                    "remedy": Code::UnknownDevice.remedy(), "pointer": "/to/device"}}))),
            )),
        BatchRefusals,
    ),
)]
pub(super) async fn create(
    who: Scoped<Ping>,
    State(backend): State<Backend>,
    request: Request,
) -> Response {
    let result = take(&who, backend.clone(), request).await;
    allowance::told(&backend.handle, &who, result)
}

async fn take(who: &Principal, backend: Backend, request: Request) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    no_key_for_all(&parts.headers)?;
    body::expect(
        &parts.headers,
        &NDJSON_TYPES,
        "The body must be one JSON object a line and say so: `Content-Type: application/x-ndjson`.",
    )?;
    let limits = backend.handle.limits();
    let (bytes, share) = body::read_reserved(body, limits.batch_body_max, |size| {
        backend.handle.hold_body(who.app(), size)
    })
    .await?;
    let lines = lines(&bytes, limits.batch_lines_max)?;
    let (pieces, answer) = mpsc::channel(PIECES_MAX);
    let cut = parts.extensions.get::<Cut>().cloned();
    // An HTTP/2 connection carries other calls as well, and one that nobody reads holds only its own stream there.
    let cut = cut.filter(|_| parts.version < Version::HTTP_2);
    let batch = Batch {
        line_max: limits.body_max,
        stall: limits.batch_stall,
        handle: backend.handle,
        who: who.clone(),
        origin: parts.extensions.get::<Origin>().cloned().map(Arc::new),
        _share: share,
        bytes,
        lines,
        ahead: VecDeque::new(),
        looking: None,
        placed: Placed::default(),
        unsent: Vec::new(),
        counts: [0; CLASSES.len()],
    };
    tokio::spawn(async move {
        if batch.run(pieces).await == Over::Stalled {
            metrics::counter!(names::HTTP_BATCHES_STALLED_TOTAL).increment(1);
            tracing::debug!("a batch was cut: nobody took its answers (limits.batch_stall)");
            if let Some(Cut(cut)) = cut {
                cut.cancel();
            }
        }
    });
    let mut response = Response::new(Body::from_stream(stream::unfold(Some(answer), next_piece)));
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    Ok(response)
}

/// A key for a whole batch would have to say what a retry of half of it means.
fn no_key_for_all(headers: &HeaderMap) -> Result<(), Problem> {
    if headers.contains_key(IDEMPOTENCY_KEY) {
        return Err(Problem::new(
            Code::Malformed,
            "`Idempotency-Key` is for one ping; in a batch each line has a member `idempotency_key`.",
        )
        .at(Place::Header("Idempotency-Key")));
    }
    Ok(())
}

/// Where the lines are that have something on them, with their numbers.
pub(super) fn lines(bytes: &[u8], most: usize) -> Result<VecDeque<(u32, Range<usize>)>, Problem> {
    let mut lines = VecDeque::new();
    let mut start = 0;
    for (number, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let end = start + line.len();
        if !line.trim_ascii().is_empty() {
            if lines.len() == most {
                return Err(Problem::new(
                    Code::BodyTooLarge,
                    format!("The batch has more than {most} lines."),
                ));
            }
            // What stands at the end of a line belongs to no line: its hash must not depend on it.
            let kept = line.strip_suffix(b"\r").unwrap_or(line).len();
            lines.push_back((number, start..start + kept));
        }
        start = end + 1;
    }
    if lines.is_empty() {
        return Err(Problem::new(Code::Malformed, "The batch has no line."));
    }
    Ok(lines)
}

/// The next piece of an answer. One that ends without its end broke off, and the connection must say so.
async fn next_piece(
    answer: Option<mpsc::Receiver<Piece>>,
) -> Option<(io::Result<Bytes>, Option<mpsc::Receiver<Piece>>)> {
    let mut answer = answer?;
    match answer.recv().await {
        Some(Piece::Answers(bytes)) => Some((Ok(bytes), Some(answer))),
        Some(Piece::End) => None,
        None => Some((Err(io::Error::other("the batch was given up")), None)),
    }
}

enum Piece {
    Answers(Bytes),
    /// Every line has its answer.
    End,
}

/// A line that was read: a ping, or why it is none.
struct Line {
    number: u32,
    ping: Result<PingRequest, Problem>,
    /// Of the whole batch, if it is traced.
    origin: Option<Arc<Origin>>,
}

/// How a line ended.
struct Ended {
    number: u32,
    result: Result<PingAnswer, Problem>,
}

/// Lines that were begun and not answered.
#[derive(Default)]
struct UnderWay {
    /// In their order.
    lines: VecDeque<(u32, Way)>,
    /// Those that are [`Way::Long`], in their order.
    long: FuturesOrdered<BoxFuture<'static, Result<PingAnswer, PingError>>>,
    /// What became of the first of these.
    answered: VecDeque<Result<PingAnswer, PingError>>,
}

/// How a line goes on.
enum Way {
    Over(Result<PingAnswer, Problem>),
    Handed(HandedPing),
    Long,
}

impl UnderWay {
    fn len(&self) -> usize {
        self.lines.len()
    }

    fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Begins a line.
    fn begin(&mut self, handle: &Handle, line: Line, turn: Turn) {
        let way = match line.ping {
            Err(problem) => Way::Over(Err(problem)),
            Ok(ping) => match handle.begin_ping(ping, turn, line.origin) {
                Begun::Over(answer) => Way::Over(answer.map_err(refusal)),
                Begun::Handed(ping) => Way::Handed(ping),
                Begun::Long(ping) => {
                    self.long.push_back(ping);
                    Way::Long
                }
            },
        };
        self.lines.push_back((line.number, way));
    }

    /// The next line's end; `None`: nothing is under way. The first line alone is asked, but for those that go on only while they are
    /// polled: so the task is not woken for each of hundreds that nobody can be told of yet.
    fn poll_next(&mut self, handle: &Handle, cx: &mut Context<'_>) -> Poll<Option<Ended>> {
        while let Poll::Ready(Some(answer)) = self.long.poll_next_unpin(cx) {
            self.answered.push_back(answer);
        }
        let Some((number, way)) = self.lines.pop_front() else {
            return Poll::Ready(None);
        };
        let way = match way {
            Way::Over(result) => Ok(result),
            Way::Handed(mut ping) => match ping.poll(handle, cx) {
                Poll::Ready(answer) => Ok(answer.map_err(refusal)),
                Poll::Pending => Err(Way::Handed(ping)),
            },
            Way::Long => match self.answered.pop_front() {
                Some(answer) => Ok(answer.map_err(refusal)),
                None => Err(Way::Long),
            },
        };
        match way {
            Ok(result) => Poll::Ready(Some(Ended { number, result })),
            Err(way) => {
                self.lines.push_front((number, way));
                Poll::Pending
            }
        }
    }
}

/// In a batch the key is a member.
fn refusal(error: PingError) -> Problem {
    let conflict = error == PingError::IdempotencyConflict;
    let problem = Problem::from(error);
    if conflict {
        problem.at(Place::Body("/idempotency_key".to_owned()))
    } else {
        problem
    }
}

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    /// Everything is answered, and somebody took it.
    Answered,
    /// Nobody reads any more.
    Gone,
    /// Nobody took an answer for too long.
    Stalled,
}

/// A batch under way.
struct Batch {
    handle: Handle,
    who: Principal,
    /// The trace that the batch belongs to, if it is traced.
    origin: Option<Arc<Origin>>,
    /// Longest line, bytes.
    line_max: usize,
    /// How long nobody may take a piece of the answer.
    stall: Duration,
    bytes: Bytes,
    /// The room of `bytes` in the memory reserve; held for what dropping it does.
    _share: Vec<BodyShare>,
    /// Lines that nobody has looked at.
    lines: VecDeque<(u32, Range<usize>)>,
    /// Lines that were read and not begun.
    ahead: VecDeque<Line>,
    /// The look-up of their users.
    looking: Option<BoxFuture<'static, ()>>,
    /// Whether the line that was begun last has its places.
    placed: Placed,
    /// Answers to be sent.
    unsent: Vec<u8>,
    /// Lines that ended, by the class of their status.
    counts: [u64; CLASSES.len()],
}

/// What lines are counted by.
const CLASSES: [&str; 3] = ["2xx", "4xx", "5xx"];

impl Batch {
    async fn run(mut self, pieces: mpsc::Sender<Piece>) -> Over {
        let mut under_way = UnderWay::default();
        let stall = self.stall;
        let mut stalled = pin!(tokio::time::sleep(stall));
        let over = loop {
            tokio::select! {
                biased;
                place = pieces.reserve(), if !self.unsent.is_empty() => match place {
                    Ok(place) => {
                        place.send(Piece::Answers(std::mem::take(&mut self.unsent).into()));
                        stalled.set(tokio::time::sleep(stall));
                    }
                    Err(_) => break Over::Gone,
                },
                more = poll_fn(|cx| self.advance(cx, &mut under_way)) => if !more {
                    break Over::Answered;
                },
                () = pieces.closed() => break Over::Gone,
                () = stalled.as_mut(), if !self.unsent.is_empty() => break Over::Stalled,
            }
        };
        // What was begun ends as if somebody still listened.
        while let Some(ended) = poll_fn(|cx| under_way.poll_next(&self.handle, cx)).await {
            self.count(&ended);
        }
        for (class, count) in CLASSES.into_iter().zip(self.counts) {
            metrics::counter!(names::HTTP_BATCH_LINES_TOTAL, "status" => class).increment(count);
        }
        // The room is for others again before anybody waits for the reader's last steps.
        drop(self);
        if over != Over::Answered {
            return over;
        }
        match tokio::time::timeout(stall, pieces.send(Piece::End)).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return Over::Gone,
            Err(_) => return Over::Stalled,
        }
        match tokio::time::timeout(stall, pieces.closed()).await {
            Ok(()) => Over::Answered,
            Err(_) => Over::Stalled,
        }
    }

    /// Begins what may begin, and gathers answers: `true` as soon as there are some, `false` when everything is answered and sent.
    fn advance(&mut self, cx: &mut Context<'_>, under_way: &mut UnderWay) -> Poll<bool> {
        let mut gathered = false;
        for _ in 0..AHEAD_MAX {
            while let Poll::Ready(Some(ended)) = under_way.poll_next(&self.handle, cx) {
                self.count(&ended);
                put(&mut self.unsent, &ended);
                gathered = true;
            }
            let left = !self.lines.is_empty() || !self.ahead.is_empty();
            let may_begin = left
                && self.placed.is_so()
                && under_way.len() < UNDER_WAY_MAX
                && self.unsent.len() < UNSENT_MAX;
            if !may_begin {
                let over = !left && under_way.is_empty() && self.unsent.is_empty();
                return match (gathered, over) {
                    (true, _) => Poll::Ready(true),
                    (false, true) => Poll::Ready(false),
                    (false, false) => Poll::Pending,
                };
            }
            if self.ahead.is_empty() {
                self.read_ahead();
            }
            if let Some(looking) = &mut self.looking {
                if looking.poll_unpin(cx).is_pending() {
                    return if gathered {
                        Poll::Ready(true)
                    } else {
                        Poll::Pending
                    };
                }
                self.looking = None;
            }
            if let Some(line) = self.ahead.pop_front() {
                let (turn, placed) = Turn::new();
                self.placed = placed;
                under_way.begin(&self.handle, line, turn);
            }
        }
        // Others shall have their turn as well.
        cx.waker().wake_by_ref();
        if gathered {
            Poll::Ready(true)
        } else {
            Poll::Pending
        }
    }

    /// Reads the next lines, and has their users looked up.
    fn read_ahead(&mut self) {
        let mut users = Vec::new();
        while self.ahead.len() < AHEAD_MAX
            && let Some((number, place)) = self.lines.pop_front()
        {
            let ping = self.read(place);
            if let Ok(ping) = &ping
                && let Target::Users(named) = &ping.target
                && users.len() < AHEAD_MAX
            {
                users.extend_from_slice(named);
            }
            self.ahead.push_back(Line {
                number,
                ping,
                origin: self.origin.clone(),
            });
        }
        // A single one looks for itself.
        if users.len() > 1 {
            let handle = self.handle.clone();
            let app = self.who.app();
            self.looking = Some(async move { handle.know_users(app, &users).await }.boxed());
        }
    }

    fn read(&self, place: Range<usize>) -> Result<PingRequest, Problem> {
        let line = &self.bytes[place];
        self.handle.admit(&self.who)?;
        if line.len() > self.line_max {
            return Err(Problem::new(
                Code::BodyTooLarge,
                format!("The line is longer than {} bytes.", self.line_max),
            ));
        }
        let (ping, key) = ping_body::read_line(line)?;
        let key = key.map(|key| (key, sha256(line)));
        Ok(pings::request(self.who.app(), ping, key, None))
    }

    fn count(&mut self, ended: &Ended) {
        let class = match &ended.result {
            Ok(_) => 0,
            Err(problem) if problem.status().is_client_error() => 1,
            Err(_) => 2,
        };
        self.counts[class] += 1;
    }
}

/// Writes the answer of a line.
fn put(out: &mut Vec<u8>, ended: &Ended) {
    let mut answer = LineAnswer {
        line: ended.number,
        status: StatusCode::ACCEPTED.as_u16(),
        id: None,
        devices: None,
        ttl_s: None,
        rejected: Vec::new(),
        problem: None,
    };
    match &ended.result {
        Ok(answered) => {
            answer.id = Some(answered.id);
            answer.devices = Some(answered.devices);
            answer.ttl_s = Some(answered.ttl_s);
            answer.rejected = pings::rejected(answered);
        }
        Err(problem) => {
            let code = problem.code();
            answer.status = problem.status().as_u16();
            answer.problem = Some(LineProblem {
                code: code.name(),
                title: code.meaning(),
                detail: problem.detail(),
                remedy: code.remedy(),
                pointer: match problem.place() {
                    Place::Body(pointer) => Some(pointer),
                    Place::Request | Place::Parameter(_) | Place::Header(_) => None,
                },
                retry_after_s: problem.retry_after_s(),
            });
        }
    }
    // Our own types of texts, numbers and lists into memory: it cannot fail.
    drop(serde_json::to_writer(&mut *out, &answer));
    out.push(b'\n');
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const MOST: usize = 1_000;

    fn found(text: &str) -> Vec<(u32, &str)> {
        lines(text.as_bytes(), MOST)
            .unwrap()
            .into_iter()
            .map(|(number, place)| (number, &text[place]))
            .collect()
    }

    #[test]
    fn lines_are_numbered_as_an_editor_does_and_empty_ones_are_passed_over() {
        assert_eq!(found("a"), [(1, "a")]);
        assert_eq!(found("a\nb\n"), [(1, "a"), (2, "b")]);
        assert_eq!(
            found("\r\n a \r\n\n\t\nb\rc\n \n"),
            [(2, " a "), (5, "b\rc")]
        );
        for nothing in ["", "\n", " \r\n\t"] {
            assert_eq!(
                lines(nothing.as_bytes(), MOST).unwrap_err().code(),
                Code::Malformed
            );
        }
    }

    #[test]
    fn a_line_too_many_refuses_all_of_them() {
        let most = "{}\n".repeat(MOST);
        assert_eq!(found(&most).len(), MOST);
        assert_eq!(found(&format!("{most}\n\n")).len(), MOST);
        let refused = lines(format!("{most}{{}}").as_bytes(), MOST).unwrap_err();
        assert_eq!(refused.code(), Code::BodyTooLarge);
    }

    #[tokio::test]
    async fn an_answer_without_its_end_breaks_off() {
        let (pieces, answer) = mpsc::channel(4);
        pieces
            .send(Piece::Answers(Bytes::from_static(b"x")))
            .await
            .unwrap();
        drop(pieces);
        let (piece, rest) = next_piece(Some(answer)).await.unwrap();
        assert_eq!(piece.unwrap(), "x");
        let (broken, rest) = next_piece(rest).await.unwrap();
        assert!(broken.is_err());
        assert!(next_piece(rest).await.is_none());

        let (pieces, answer) = mpsc::channel(4);
        pieces.send(Piece::End).await.unwrap();
        assert!(next_piece(Some(answer)).await.is_none());
    }
}
