//! Outcomes as they happen, for whoever follows an app.
//!
//! A stream is a place in the history (`ports::OutcomePosition`) and nothing else: what it has not taken yet waits on disk, so a
//! slow one costs nobody memory, and one that comes back goes on where it was. While there is a stream the history writes
//! within some ten milliseconds instead of once a second, and wakes all of them.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::futures::Notified;
use tokio_util::task::AbortOnDropHandle;

use super::api::{Principal, RuntimeError};
use super::handle::Inner;
use super::locked;
use crate::delivery::{AppId, DeviceId, Outcome, PingId};
use crate::ports::{
    OutcomeEvent, OutcomeEvents, OutcomeFollow, OutcomeGap, OutcomePosition, Store,
};
use crate::telemetry::metrics as names;

/// Most events handed over at once.
const PAGE: usize = 256;
/// A stream without events says where it stands so often: proxies and NATs forget what is silent for a minute.
const QUIET: Duration = Duration::from_secs(15);

/// How many follow.
#[derive(Default)]
struct Counts {
    /// How many streams each app has; none that has none.
    streams: HashMap<AppId, usize>,
    /// How many callbacks there are.
    posters: usize,
}

impl Counts {
    fn is_empty(&self) -> bool {
        self.streams.is_empty() && self.posters == 0
    }
}

/// Who follows.
#[derive(Default)]
pub(super) struct Followers {
    woken: Arc<Notify>,
    counts: Mutex<Counts>,
}

impl Followers {
    /// Is woken by the next thing that happens.
    pub(super) fn woken(&self) -> Notified<'_> {
        self.woken.notified()
    }

    /// Something changed that every stream should look at.
    pub(super) fn wake(&self) {
        self.woken.notify_waiters();
    }

    /// Takes one of the places of an app's streams.
    fn join(&self, app: AppId, most: usize, store: &dyn Store) -> Result<(), RuntimeError> {
        self.change(store, |counts| {
            let count = counts.streams.get(&app).copied().unwrap_or(0);
            if count >= most {
                return Err(RuntimeError::TooManyStreams);
            }
            counts.streams.insert(app, count + 1);
            Ok(())
        })
    }

    fn leave(&self, app: AppId, store: &dyn Store) {
        self.change(store, |counts| match counts.streams.get(&app) {
            Some(count @ 2..) => {
                let left = count - 1;
                counts.streams.insert(app, left);
            }
            Some(_) | None => drop(counts.streams.remove(&app)),
        });
    }

    /// A callback follows from now on.
    pub(super) fn join_poster(&self, store: &dyn Store) {
        self.change(store, |counts| counts.posters += 1);
    }

    /// A callback follows no longer.
    pub(super) fn leave_poster(&self, store: &dyn Store) {
        self.change(store, |counts| {
            counts.posters = counts.posters.saturating_sub(1)
        });
    }

    fn change<T>(&self, store: &dyn Store, change: impl FnOnce(&mut Counts) -> T) -> T {
        // Held over the call, so that the last one's goodbye cannot come after the next one's arrival.
        let mut counts = locked(&self.counts);
        let before = counts.is_empty();
        let changed = change(&mut counts);
        match (before, counts.is_empty()) {
            (true, false) => {
                let woken = Arc::clone(&self.woken);
                store.follow_outcomes(Some(Arc::new(move || woken.notify_waiters())));
            }
            (false, true) => store.follow_outcomes(None),
            (true, true) | (false, false) => {}
        }
        #[expect(clippy::cast_precision_loss, reason = "a measurement")]
        metrics::gauge!(names::EVENT_STREAMS).set(counts.streams.values().sum::<usize>() as f64);
        changed
    }
}

/// Where a stream begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventsFrom {
    /// With what ends from now on.
    Now,
    /// With the oldest outcome that is kept.
    Oldest,
    /// Behind the event with this position.
    After(OutcomePosition),
}

/// Which outcomes a stream tells.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventsOf {
    /// Only those of this ping.
    pub ping: Option<PingId>,
    /// Only those of this device.
    pub device: Option<DeviceId>,
    /// Only those that ended so; none: all.
    pub outcomes: Vec<Outcome>,
}

/// What a stream says next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Events, each with the position to go on from.
    Events(Vec<(OutcomePosition, OutcomeEvent)>),
    /// Nothing happened for a while; everything before this position was told.
    Quiet(OutcomePosition),
    /// The server goes down, or the caller's key was revoked. What comes later is told to whoever comes back.
    End,
}

/// A read of the history that has begun. It goes on by itself, so that its place is used and given back at once even while nobody
/// asks the stream: only what it found waits.
type Reading = AbortOnDropHandle<Result<OutcomeEvents, RuntimeError>>;

/// The outcomes of an app, from a position on and without an end.
pub struct EventStream {
    inner: Arc<Inner>,
    who: Principal,
    wanted: EventsOf,
    at: OutcomePosition,
    /// What goes on while a reader is told that nothing is new: it keeps its turn.
    reading: Option<Reading>,
    /// Nothing was said yet.
    fresh: bool,
    /// It begins with the oldest that is kept, and what is not kept any more is no gap.
    oldest: bool,
}

impl EventStream {
    /// Waits for what comes next. Dropping the future loses nothing.
    ///
    /// # Errors
    /// The history cannot be read now; the stream can be asked again.
    pub async fn next(&mut self) -> Result<Step, RuntimeError> {
        // Where it begins is said at once: who is cut off before the first event can go on from there.
        if std::mem::take(&mut self.fresh) {
            return Ok(Step::Quiet(self.at));
        }
        let quiet = tokio::time::sleep(QUIET);
        tokio::pin!(quiet);
        loop {
            let inner = Arc::clone(&self.inner);
            let woken = inner.followers.woken.notified();
            tokio::pin!(woken);
            // Before looking: what is written meanwhile wakes.
            woken.as_mut().enable();
            let carried = self.reading.is_some();
            let reading = match &mut self.reading {
                Some(reading) => reading,
                none => {
                    let follow = OutcomeFollow {
                        app: self.who.app(),
                        ping: self.wanted.ping,
                        device: self.wanted.device,
                        outcomes: self.wanted.outcomes.clone(),
                        from: self.at,
                        limit: PAGE,
                    };
                    let inner = Arc::clone(&inner);
                    let read = tokio::spawn(async move { inner.read_events(follow).await });
                    none.insert(AbortOnDropHandle::new(read))
                }
            };
            let found = tokio::select! {
                biased;
                // What is looked for may be far away, and whoever waits for it must not seem gone.
                () = &mut quiet => None,
                found = reading => Some(found.unwrap_or(Err(RuntimeError::StoreUnavailable))),
            };
            if found.is_some() {
                self.reading = None;
            }
            // After the read, so that nothing is told of what ended after the key did.
            if inner.draining() || !inner.key_lives(&self.who) {
                return Ok(Step::End);
            }
            let Some(found) = found else {
                return Ok(Step::Quiet(self.at));
            };
            let mut found = found?;
            self.at = found.next;
            if self.oldest {
                let dropped = OutcomeEvent::Gap(OutcomeGap::Dropped);
                let kept = found.items.iter().position(|(_, event)| *event != dropped);
                found.items.drain(..kept.unwrap_or(found.items.len()));
                self.oldest = found.items.is_empty();
            }
            if !found.items.is_empty() {
                metrics::counter!(names::EVENTS_SENT_TOTAL).increment(found.items.len() as u64);
                return Ok(Step::Events(found.items));
            }
            // What one saw that had begun earlier may be older than the last wake-up.
            if found.more || carried {
                continue;
            }
            tokio::select! {
                () = woken => {}
                () = &mut quiet => return Ok(Step::Quiet(self.at)),
            }
        }
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.inner
            .followers
            .leave(self.who.app(), &*self.inner.shared.store);
    }
}

impl Inner {
    pub(super) fn follow(
        self: &Arc<Inner>,
        who: &Principal,
        from: EventsFrom,
        wanted: EventsOf,
    ) -> Result<EventStream, RuntimeError> {
        if self.draining() {
            return Err(RuntimeError::Draining);
        }
        let store = &*self.shared.store;
        let most = self.limits.load().event_streams;
        self.followers.join(who.app(), most, store)?;
        Ok(EventStream {
            at: match from {
                EventsFrom::Now => store.outcomes_end(),
                EventsFrom::Oldest => OutcomePosition::default(),
                EventsFrom::After(position) => position,
            },
            inner: Arc::clone(self),
            who: who.clone(),
            wanted,
            reading: None,
            fresh: true,
            oldest: from == EventsFrom::Oldest,
        })
    }

    /// Reads on in the history.
    pub(super) async fn read_events(
        &self,
        follow: OutcomeFollow,
    ) -> Result<OutcomeEvents, RuntimeError> {
        // The place is free again when the read is over, even if nobody waits for it any more.
        let place = self.listings.place(follow.app).await;
        let read = move |store: &dyn Store| {
            let events = store.outcome_events(&follow);
            drop(place);
            events
        };
        self.shared.reading.read(read).await
    }
}
