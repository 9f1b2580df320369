//! Request bodies: what kind, how large, how slow.

use std::time::Duration;

use axum::body::{Body, Bytes};
use bellwire_protocol::Code;
use bytes::BytesMut;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use http_body_util::BodyExt as _;
use hyper::body::Body as _;

use super::error::{Place, Problem};
use crate::runtime::RuntimeError;

/// How long a body may take to arrive. Slower than 35 KB/s for the largest one is a defect or an attack.
const BODY_TIME: Duration = Duration::from_secs(30);

/// How much of a body that is refused for its size is still read and thrown away, so that the caller gets to read the
/// answer: closing with unread bytes resets the connection.
const DRAIN_MAX: usize = 8 << 20;

/// How long that may take.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// Why there is no body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BodyError {
    /// Larger than so many bytes.
    TooLarge(usize),
    /// It did not arrive within [`BODY_TIME`].
    TooSlow,
    /// The connection broke, or the transfer coding is wrong.
    Broken,
}

impl From<BodyError> for Problem {
    fn from(error: BodyError) -> Problem {
        match error {
            BodyError::TooLarge(max) => Problem::new(
                Code::BodyTooLarge,
                format!("The body is larger than {max} bytes."),
            )
            .closing(),
            BodyError::TooSlow => Problem::new(
                Code::BodyTimeout,
                format!("The body did not arrive within {} s.", BODY_TIME.as_secs()),
            )
            .closing(),
            BodyError::Broken => Problem::new(
                Code::Malformed,
                "The body broke off, or its transfer coding is wrong.",
            )
            .closing(),
        }
    }
}

/// Room that the first bytes of a body take, bytes. It doubles as more arrive: what a caller holds is what it sent, at most twice,
/// and not what it only announced, until [`RESERVE_WHOLE`].
const RESERVE_FIRST: usize = 16 << 10;

/// Who said how much comes and has sent so much of it gets the room for all of it at once, bytes, or is refused. Otherwise several
/// large bodies could each hold a part of the reserve and wait in vain for the rest.
const RESERVE_WHOLE: usize = 1 << 20;

/// Largest body of one ping that takes no room of its own while it is read, bytes. Nearly every ping is smaller, and has its room
/// from when it is published.
const UNRESERVED_MAX: usize = 64 << 10;

/// Reads a body of at most `max` bytes; each part of it is only kept once `hold` has given room for it. What `hold` gave is given
/// back with the body.
///
/// # Errors
/// As [`BodyError`], and what `hold` refused with.
pub(super) async fn read_reserved<S>(
    mut body: Body,
    max: usize,
    hold: impl Fn(usize) -> Result<S, RuntimeError>,
) -> Result<(Bytes, Vec<S>), Problem> {
    let least = body.size_hint().lower();
    let known = usize::try_from(least).unwrap_or(usize::MAX);
    if known > max {
        return Err(BodyError::TooLarge(max).into());
    }
    let mut shares = Vec::new();
    let mut held = 0;
    let mut whole = BytesMut::new();
    let collect = async {
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else {
                continue;
            };
            let size = whole.len() + data.len();
            if size > max {
                return Err(BodyError::TooLarge(max).into());
            }
            if size > held {
                let most = if known > 0 { known } else { max };
                let room = if known > 0 && size >= RESERVE_WHOLE {
                    most.max(size)
                } else {
                    size.max(RESERVE_FIRST).max(2 * held).min(most.max(size))
                };
                shares.push(hold(room - held)?);
                held = room;
                whole.reserve(room - whole.len());
            }
            whole.extend_from_slice(&data);
        }
        Ok::<_, Problem>(())
    };
    match tokio::time::timeout(BODY_TIME, collect).await {
        Ok(Ok(())) => Ok((whole.freeze(), shares)),
        Ok(Err(problem)) => {
            // It is not kept, so others have its room while the rest is thrown away.
            drop((whole, shares));
            // Of one that broke off nothing more comes.
            if problem.code() != Code::Malformed {
                drain(&mut body).await;
            }
            Err(problem.closing())
        }
        Err(_) => Err(BodyError::TooSlow.into()),
    }
}

/// Reads a body of at most `max` bytes; one that may be more than [`UNRESERVED_MAX`] is only kept once `hold` has given room for it,
/// as with [`read_reserved`].
///
/// # Errors
/// As [`BodyError`], and what `hold` refused with.
pub(super) async fn read_long<S>(
    body: Body,
    max: usize,
    hold: impl Fn(usize) -> Result<S, RuntimeError>,
) -> Result<(Bytes, Vec<S>), Problem> {
    let small = max.min(UNRESERVED_MAX);
    let size = body.size_hint();
    if size.upper().is_some_and(|upper| upper <= small as u64) {
        return Ok((read(body, small).await?, Vec::new()));
    }
    read_reserved(body, max, hold).await
}

/// Reads a body of at most `most` bytes.
pub(crate) async fn read(mut body: Body, most: usize) -> Result<Bytes, BodyError> {
    // What says at the outset that it is too large is not even invited (`Expect: 100-continue`).
    if body.size_hint().lower() > most as u64 {
        return Err(BodyError::TooLarge(most));
    }
    match tokio::time::timeout(BODY_TIME, collect(&mut body, most)).await {
        Ok(Err(BodyError::TooLarge(max))) => {
            drain(&mut body).await;
            Err(BodyError::TooLarge(max))
        }
        Ok(result) => result,
        Err(_) => Err(BodyError::TooSlow),
    }
}

async fn collect(body: &mut Body, most: usize) -> Result<Bytes, BodyError> {
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| BodyError::Broken)?.into_data() else {
            continue;
        };
        if first.len() + rest.len() + data.len() > most {
            return Err(BodyError::TooLarge(most));
        }
        // Nearly every body comes in one piece and is not copied.
        if first.is_empty() {
            first = data;
        } else {
            rest.extend_from_slice(&data);
        }
    }
    if rest.is_empty() {
        return Ok(first);
    }
    let mut whole = BytesMut::with_capacity(first.len() + rest.len());
    whole.extend_from_slice(&first);
    whole.extend_from_slice(&rest);
    Ok(whole.freeze())
}

/// Reads on without keeping anything, within bounds.
async fn drain(body: &mut Body) {
    let discard = async {
        let mut discarded = 0;
        while let Some(Ok(frame)) = body.frame().await {
            discarded += frame.data_ref().map_or(0, Bytes::len);
            if discarded > DRAIN_MAX {
                break;
            }
        }
    };
    // Too slow or too long: the connection is closed either way.
    let _ = tokio::time::timeout(DRAIN_TIME, discard).await;
}

/// Checks that the body says it is JSON.
pub(super) fn expect_json(headers: &HeaderMap) -> Result<(), Problem> {
    expect(
        headers,
        &["application/json"],
        "The body must be JSON and say so: `Content-Type: application/json`.",
    )
}

/// Checks that the body says it is a merge patch (RFC 7396), or at least JSON.
pub(super) fn expect_merge_patch(headers: &HeaderMap) -> Result<(), Problem> {
    expect(
        headers,
        &["application/merge-patch+json", "application/json"],
        "The body must be a JSON merge patch and say so: `Content-Type: application/merge-patch+json`.",
    )
}

pub(super) fn expect(
    headers: &HeaderMap,
    types: &[&str],
    otherwise: &'static str,
) -> Result<(), Problem> {
    let fits = headers.get(CONTENT_TYPE).is_some_and(|value| {
        let essence = value.as_bytes().split(|byte| *byte == b';').next();
        essence.is_some_and(|essence| {
            let essence = essence.trim_ascii();
            types
                .iter()
                .any(|known| essence.eq_ignore_ascii_case(known.as_bytes()))
        })
    });
    if fits {
        Ok(())
    } else {
        Err(Problem::new(Code::UnsupportedMediaType, otherwise).at(Place::Header("Content-Type")))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::cell::RefCell;
    use std::convert::Infallible;
    use std::pin::Pin;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll};

    use hyper::body::{Frame, SizeHint};

    use super::*;

    const PIECE: usize = 64 << 10;

    /// A body that comes in pieces; `seen` is told what is held when each is asked for.
    struct Pieces {
        left: usize,
        announced: bool,
        held: Arc<AtomicUsize>,
        seen: Arc<std::sync::Mutex<Vec<usize>>>,
    }

    impl hyper::body::Body for Pieces {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            let held = self.held.load(Ordering::SeqCst);
            self.seen.lock().unwrap().push(held);
            let size = self.left.min(PIECE);
            self.left -= size;
            let piece = Bytes::from(vec![b'x'; size]);
            Poll::Ready((size > 0).then_some(Ok(Frame::data(piece))))
        }

        fn size_hint(&self) -> SizeHint {
            if self.announced {
                SizeHint::with_exact(self.left as u64)
            } else {
                SizeHint::default()
            }
        }
    }

    struct Room(Arc<AtomicUsize>, usize);

    impl Drop for Room {
        fn drop(&mut self) {
            self.0.fetch_sub(self.1, Ordering::SeqCst);
        }
    }

    /// Reads a body of `size` bytes with room for `most`; answers whether it was taken, the steps in which room was asked for, and
    /// what was held each time the next piece was awaited.
    async fn taken(size: usize, announced: bool, most: usize) -> (bool, Vec<usize>, Vec<usize>) {
        let held = Arc::new(AtomicUsize::new(0));
        let seen = Arc::default();
        let body = Body::new(Pieces {
            left: size,
            announced,
            held: Arc::clone(&held),
            seen: Arc::clone(&seen),
        });
        let steps = RefCell::new(Vec::new());
        let read = read_reserved(body, 8 << 20, |more| {
            if held.load(Ordering::SeqCst) + more > most {
                return Err(RuntimeError::MemoryReserve);
            }
            steps.borrow_mut().push(more);
            held.fetch_add(more, Ordering::SeqCst);
            Ok(Room(Arc::clone(&held), more))
        });
        let read = read.await;
        let whole = read.as_ref().is_ok_and(|(bytes, _)| bytes.len() == size);
        drop(read);
        assert_eq!(held.load(Ordering::SeqCst), 0);
        let seen = seen.lock().unwrap().clone();
        (whole, steps.into_inner(), seen)
    }

    #[tokio::test]
    async fn what_is_refused_gives_its_room_back_before_the_rest_is_thrown_away() {
        let (taken, steps, seen) = taken(4 << 20, true, 300 << 10).await;
        assert!(!taken && !steps.is_empty());
        // It was read to its end, and nothing was held from the refusal on.
        assert_eq!(seen.len(), (4 << 20) / PIECE + 1);
        let refused = seen.iter().rposition(|held| *held > 0).unwrap();
        assert!(refused < 8, "{refused}");
    }

    #[tokio::test]
    async fn who_said_how_much_comes_takes_the_rest_in_one_step() {
        let (whole, steps, _) = taken(7 << 20, true, 8 << 20).await;
        assert!(whole);
        assert_eq!(steps.iter().sum::<usize>(), 7 << 20);
        let before: usize = steps.iter().rev().skip(1).sum();
        assert!(before <= RESERVE_WHOLE, "{steps:?}");
        // Who did not say takes it bit by bit, at most twice of what came.
        let (whole, steps, seen) = taken(7 << 20, false, 8 << 20).await;
        assert!(whole && steps.len() > 5, "{steps:?}");
        for (pieces, held) in seen.iter().enumerate() {
            assert!(*held <= 2 * pieces.max(1) * PIECE, "{pieces}: {held}");
        }
    }
}
