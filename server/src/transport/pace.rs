//! How many handshakes go on at a time, so that a fleet that comes back at once takes neither the machine nor its memory.
//!
//! A handshake is mostly work for the processor, and a little memory until it is through. So it needs two things here. A
//! *turn* lets it compute: there are as many as processors, each is given back before the handshake waits for its peer
//! again, and they go round in order; whoever serves the API or a link finds at most that many handshakes
//! before it. One part of a QUIC handshake has no turn: the answer to a first flight is computed in the call that takes it in, by the
//! endpoint's task, which is one and lets others go first after some ([`super::quic`]). A *place* lets a handshake begin: it is
//! taken when the peer has said something, and given back when the way in is through, or after [`PLACE_TIME`], so that slow
//! or silent peers do not keep others out. Whoever waits for a place holds nothing but its socket, over QUIC its first
//! datagrams; nobody is refused here ([`super::admission`] does that).

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::thread::available_parallelism;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tokio_util::sync::PollSemaphore;

/// Places for each processor: what it gets through in a tenth of a second, so that peers that are far away do not keep
/// it idle.
const PLACES_PER_PROCESSOR: usize = 256;

/// How long a handshake keeps its place at most. Two round trips of a phone are half of it.
pub(crate) const PLACE_TIME: Duration = Duration::from_millis(500);

/// Turns and places. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Pace {
    turns: Arc<Semaphore>,
    places: Arc<Semaphore>,
}

impl Pace {
    /// As many as this machine has processors for.
    pub(crate) fn new() -> Pace {
        let processors = available_parallelism().map_or(1, usize::from);
        Pace::of(processors, processors * PLACES_PER_PROCESSOR)
    }

    fn of(turns: usize, places: usize) -> Pace {
        Pace {
            turns: Arc::new(Semaphore::new(turns)),
            places: Arc::new(Semaphore::new(places)),
        }
    }

    /// Handshakes that may go on at a time.
    pub(crate) fn places_of_this_machine() -> usize {
        available_parallelism().map_or(1, usize::from) * PLACES_PER_PROCESSOR
    }

    /// Has a handshake compute in turns.
    pub(crate) fn in_turns<F: Future>(&self, handshake: Pin<Box<F>>) -> InTurns<F> {
        InTurns {
            turns: PollSemaphore::new(Arc::clone(&self.turns)),
            handshake,
        }
    }

    /// Waits for a place.
    pub(crate) async fn place(&self) -> Place {
        // It would fail if the semaphore were closed, which nobody does.
        Place(Arc::clone(&self.places).acquire_owned().await.ok())
    }

    /// Has a handshake compute in turns, in its place as long as it may have it. Make it when the place is there: its memory
    /// is many times that of waiting.
    pub(crate) async fn in_place<F: Future>(
        &self,
        place: Place,
        handshake: Pin<Box<F>>,
    ) -> F::Output {
        let mut handshake = pin!(self.in_turns(handshake));
        tokio::select! {
            biased;
            done = &mut handshake => return done,
            () = sleep(PLACE_TIME) => drop(place),
        }
        handshake.await
    }
}

/// What a handshake needs to begin. Given back when dropped.
pub(crate) struct Place(
    #[expect(dead_code, reason = "held, not read")] Option<OwnedSemaphorePermit>,
);

/// A handshake that computes in turns.
pub(crate) struct InTurns<F> {
    turns: PollSemaphore,
    handshake: Pin<Box<F>>,
}

impl<F: Future> Future for InTurns<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        // `None` would mean that the semaphore was closed, which nobody does.
        let _turn = ready!(self.turns.poll_acquire(cx));
        self.handshake.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Notify;
    use tokio::task::yield_now;

    /// Handshakes that were begun, and those at work now.
    #[derive(Default)]
    struct Seen {
        begun: AtomicUsize,
        ended: AtomicUsize,
    }

    async fn handshake(seen: Arc<Seen>, answer: Arc<Notify>) {
        seen.begun.fetch_add(1, Ordering::Relaxed);
        answer.notified().await;
        seen.ended.fetch_add(1, Ordering::Relaxed);
    }

    async fn settle() {
        for _ in 0..100 {
            yield_now().await;
        }
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_begin_than_there_are_places_and_everybody_gets_one() {
        let (pace, seen, answer) = (Pace::of(1, 3), Arc::default(), Arc::new(Notify::new()));
        for _ in 0..10 {
            let (pace, seen, answer) = (pace.clone(), Arc::clone(&seen), Arc::clone(&answer));
            tokio::spawn(async move {
                let place = pace.place().await;
                pace.in_place(place, Box::pin(handshake(seen, answer)))
                    .await;
            });
        }
        let begun = |seen: &Arc<Seen>| seen.begun.load(Ordering::Relaxed);
        settle().await;
        assert_eq!(begun(&seen), 3);
        answer.notify_one();
        settle().await;
        assert_eq!(begun(&seen), 4);
        // Peers that do not answer keep their places for a while, and no longer.
        tokio::time::advance(PLACE_TIME / 2).await;
        settle().await;
        assert_eq!(begun(&seen), 4);
        tokio::time::advance(PLACE_TIME / 2 + Duration::from_millis(1)).await;
        settle().await;
        assert_eq!(begun(&seen), 7);
        tokio::time::advance(PLACE_TIME * 4).await;
        settle().await;
        assert_eq!(begun(&seen), 10);
        // And they may still answer.
        for _ in 0..9 {
            answer.notify_one();
            settle().await;
        }
        assert_eq!(seen.ended.load(Ordering::Relaxed), 10);
    }

    #[tokio::test]
    async fn a_handshake_without_a_turn_waits_and_one_that_waits_holds_no_turn() {
        let (pace, seen, answer) = (Pace::of(1, 9), Arc::default(), Arc::new(Notify::new()));
        let turn = Arc::clone(&pace.turns).acquire_owned().await;
        for _ in 0..2 {
            let (pace, seen, answer) = (pace.clone(), Arc::clone(&seen), Arc::clone(&answer));
            tokio::spawn(async move { pace.in_turns(Box::pin(handshake(seen, answer))).await });
        }
        settle().await;
        assert_eq!(seen.begun.load(Ordering::Relaxed), 0);
        drop(turn);
        settle().await;
        assert_eq!(seen.begun.load(Ordering::Relaxed), 2);
        assert_eq!(pace.turns.available_permits(), 1);
    }
}
