//! Places for reads of the history: so many at a time, and between apps in turns.
//!
//! One app can have hundreds of streams and lists under way, each of which reads the history piece by piece. They wait behind each
//! other; another app's read waits for one of each app at most. What one place is held for is bounded by the store, which looks at a
//! limited number of outcomes in one call.

use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

use super::locked;
use crate::delivery::{AppId, FairQueue};

/// Reads of one app before another has its turn.
const QUANTUM: u32 = 1;
/// So many wait before anybody looks for those who have given up.
const SWEEP_MIN: usize = 64;

struct State {
    free: usize,
    /// Nobody, while there is a free place.
    waiting: FairQueue<oneshot::Sender<Listing>>,
    /// When so many wait, those who have given up are taken out: twice as many as were left the last time, so that each newcomer
    /// pays for one look.
    sweep_at: usize,
}

impl State {
    fn wait(&mut self, app: AppId) -> oneshot::Receiver<Listing> {
        let (tell, told) = oneshot::channel();
        self.waiting.push(app, tell);
        if self.waiting.len() >= self.sweep_at {
            self.waiting.retain(|waiting| !waiting.is_closed());
            self.sweep_at = (2 * self.waiting.len()).max(SWEEP_MIN);
        }
        told
    }
}

/// All places.
pub(super) struct Listings(Arc<Mutex<State>>);

/// A place. Dropping it gives it to whose turn it is.
pub(super) struct Listing(Option<Arc<Mutex<State>>>);

impl Listings {
    pub(super) fn new(places: usize) -> Listings {
        Listings(Arc::new(Mutex::new(State {
            free: places.max(1),
            waiting: FairQueue::new(QUANTUM),
            sweep_at: SWEEP_MIN,
        })))
    }

    /// Waits for a place. Who stops waiting is forgotten when as many have come again as waited.
    pub(super) async fn place(&self, app: AppId) -> Listing {
        loop {
            let told = {
                let mut state = locked(&self.0);
                if state.free > 0 {
                    state.free -= 1;
                    return Listing(Some(Arc::clone(&self.0)));
                }
                state.wait(app)
            };
            // It is never let go of while somebody has a place.
            if let Ok(place) = told.await {
                return place;
            }
        }
    }
}

impl Drop for Listing {
    fn drop(&mut self) {
        let Some(places) = self.0.take() else { return };
        loop {
            let next = {
                let mut state = locked(&places);
                match state.waiting.pop() {
                    Some((_, next)) => next,
                    None => {
                        state.free += 1;
                        return;
                    }
                }
            };
            match next.send(Listing(Some(Arc::clone(&places)))) {
                Ok(()) => return,
                // Nobody waits there any more.
                Err(mut place) => drop(place.0.take()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const NOISY: AppId = AppId(1);
    const QUIET: AppId = AppId(2);

    #[test]
    fn an_app_with_many_reads_lets_another_go_next() {
        let listings = Listings::new(1);
        let first = listings.place(NOISY).now_or_never();
        let mut noisy: Vec<_> = (0..100).map(|_| Box::pin(listings.place(NOISY))).collect();
        for one in &mut noisy {
            assert!(one.now_or_never().is_none());
        }
        let mut quiet = Box::pin(listings.place(QUIET));
        assert!((&mut quiet).now_or_never().is_none());
        drop(first);
        // One of the other app at most, and then it.
        let mut turns = 0;
        let place = loop {
            if let Some(place) = (&mut quiet).now_or_never() {
                break place;
            }
            turns += 1;
            let taken = noisy
                .iter_mut()
                .position(|one| one.now_or_never().is_some());
            assert!(turns <= 2 && taken.is_some(), "{turns}");
            if let Some(taken) = taken {
                drop(noisy.swap_remove(taken));
            }
        };
        drop(place);
    }

    #[test]
    fn a_place_is_passed_on_past_those_who_went_away() {
        let listings = Listings::new(1);
        let first = listings.place(NOISY).now_or_never();
        let mut gone = Box::pin(listings.place(NOISY));
        assert!((&mut gone).now_or_never().is_none());
        let mut told = Box::pin(listings.place(NOISY));
        assert!((&mut told).now_or_never().is_none());
        let mut last = Box::pin(listings.place(QUIET));
        assert!((&mut last).now_or_never().is_none());
        drop(gone);
        drop(first);
        // Given a place and gone before it looked.
        drop(told);
        let place = last.now_or_never();
        assert!(place.is_some());
        drop(place);
        assert!(listings.place(NOISY).now_or_never().is_some());
    }

    #[test]
    fn those_who_gave_up_are_forgotten_while_all_places_are_taken() {
        let listings = Listings::new(1);
        let first = listings.place(NOISY).now_or_never();
        let mut stays = Box::pin(listings.place(QUIET));
        assert!((&mut stays).now_or_never().is_none());
        for _ in 0..10_000 {
            assert!(listings.place(NOISY).now_or_never().is_none());
        }
        let waiting = locked(&listings.0).waiting.len();
        assert!(waiting <= SWEEP_MIN, "{waiting}");
        drop(first);
        assert!(stays.now_or_never().is_some());
    }
}
