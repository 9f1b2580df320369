//! Idempotency keys: one key, one ping, one answer.
//!
//! The id of the ping is derived from the app's secret, the key and the body, so that a retry makes the same id even
//! after a crash that forgot the key; the devices then repeat their verdict silently. What is remembered here, in
//! bounded memory, spares that work and finds a key that was used with another body. Only an answer in which
//! every device accepted is remembered: anything else is worth a real retry, which finds what waits already.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use super::api::{PingAnswer, PingError};
use super::locked;
use super::turn::Turn;
use crate::delivery::{AppId, PingId};

/// Stripes, each with its own lock: a growing map is moved in small parts, so that nobody waits for long.
const STRIPES: usize = 16;

/// The first half of the hash of a key; 128 bits do not collide by accident, nor can a publisher harm others by
/// making them do so: keys are kept by app.
type Short = [u8; 16];

/// The answer that a key got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) ping: PingId,
    pub(super) devices: u32,
    pub(super) ttl_s: u64,
    pub(super) at_ms: u64,
}

impl Done {
    pub(super) fn answer(self) -> PingAnswer {
        PingAnswer {
            id: self.ping,
            devices: self.devices,
            ttl_s: self.ttl_s,
            rejected: Vec::new(),
            outcomes: Vec::new(),
        }
    }
}

/// An answer that several requests share.
pub(super) type Shared = Option<Result<PingAnswer, PingError>>;

/// A request that is under way, for those who sent the same.
#[derive(Clone)]
pub(super) struct Flight {
    ping: PingId,
    /// Whether it has its places; nobody says so any more if it went away.
    pub(super) placed: watch::Receiver<bool>,
    pub(super) answer: watch::Receiver<Shared>,
}

/// What a key means now.
pub(super) enum Begin {
    /// It got this answer before.
    Known(Done),
    /// It was, or is being, used with another body.
    Conflict,
    /// A request with it is under way: wait for its answer; if it goes away without one, begin again.
    Join(Flight),
    /// It is new here: do the work, then [`Lead::finish`].
    Lead(Lead),
}

/// Keys in use and keys used.
pub(super) struct Idempotency {
    stripes: Vec<Mutex<HashMap<AppId, Keys>>>,
    /// Of each app in one stripe.
    entries_max: usize,
    keep_ms: u64,
    entries: AtomicU64,
    /// A key younger than it is kept gave way: the store has to be asked about unknown ones.
    lost: AtomicBool,
}

#[derive(Default)]
struct Keys {
    done: HashMap<Short, Done>,
    /// By age.
    order: VecDeque<(Short, u64)>,
    flights: HashMap<Short, Flight>,
}

/// The right and duty to answer for a key. Dropped unfinished, those who wait begin again.
pub(super) struct Lead {
    keys: Arc<Idempotency>,
    app: AppId,
    short: Short,
    placed: Option<watch::Sender<bool>>,
    tell: watch::Sender<Shared>,
    finished: bool,
}

impl Idempotency {
    /// Remembers at most `entries_max` keys of each app for `keep_ms`.
    pub(super) fn new(entries_max: usize, keep_ms: u64) -> Idempotency {
        Idempotency {
            stripes: (0..STRIPES).map(|_| Mutex::default()).collect(),
            entries_max: (entries_max / STRIPES).max(1),
            keep_ms,
            entries: AtomicU64::new(0),
            lost: AtomicBool::new(false),
        }
    }

    /// Keys remembered.
    pub(super) fn entries(&self) -> u64 {
        self.entries.load(Ordering::Relaxed)
    }

    /// A key that should still be known may have been forgotten here.
    pub(super) fn lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// How long a key is remembered, milliseconds.
    pub(super) fn keep_ms(&self) -> u64 {
        self.keep_ms
    }

    /// A request with a key and the ping id derived from it and its body.
    pub(super) fn begin(
        self: &Arc<Idempotency>,
        app: AppId,
        key_hash: &[u8; 32],
        ping: PingId,
        now_ms: u64,
    ) -> Begin {
        let short = shorten(key_hash);
        let mut apps = locked(self.stripe(short));
        let keys = apps.entry(app).or_default();
        self.forget_old(keys, now_ms);
        if let Some(done) = keys.done.get(&short) {
            return if done.ping == ping {
                Begin::Known(*done)
            } else {
                Begin::Conflict
            };
        }
        if let Some(flight) = keys.flights.get(&short) {
            return if flight.ping == ping {
                Begin::Join(flight.clone())
            } else {
                Begin::Conflict
            };
        }
        let (tell, answer) = watch::channel(None);
        let (placed, told) = watch::channel(false);
        let flight = Flight {
            ping,
            placed: told,
            answer,
        };
        keys.flights.insert(short, flight);
        Begin::Lead(Lead {
            keys: Arc::clone(self),
            app,
            short,
            placed: Some(placed),
            tell,
            finished: false,
        })
    }

    fn stripe(&self, short: Short) -> &Mutex<HashMap<AppId, Keys>> {
        // Hashes, so any byte spreads them evenly.
        &self.stripes[usize::from(short[0]) % STRIPES]
    }

    fn forget_old(&self, keys: &mut Keys, now_ms: u64) {
        while let Some(&(short, at_ms)) = keys.order.front() {
            let old = at_ms.saturating_add(self.keep_ms) <= now_ms;
            if !old && keys.order.len() <= self.entries_max {
                break;
            }
            if !old {
                self.lost.store(true, Ordering::Relaxed);
            }
            keys.order.pop_front();
            if keys.done.remove(&short).is_some() {
                self.entries.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }
}

impl Lead {
    /// The turn of the ping that is published now, which tells those who joined as well when it is over.
    pub(super) fn turn(&mut self, turn: Option<Turn>) -> Option<Turn> {
        match self.placed.take() {
            Some(placed) => Some(Turn::told(turn, placed)),
            None => turn,
        }
    }

    /// Answers everybody. An answer worth remembering is given as `done`.
    pub(super) fn finish(mut self, answer: Result<PingAnswer, PingError>, done: Option<Done>) {
        self.finished = true;
        {
            let mut apps = locked(self.keys.stripe(self.short));
            let keys = apps.entry(self.app).or_default();
            keys.flights.remove(&self.short);
            if let Some(done) = done
                && keys.done.insert(self.short, done).is_none()
            {
                keys.order.push_back((self.short, done.at_ms));
                self.keys.entries.fetch_add(1, Ordering::Relaxed);
                self.keys.forget_old(keys, 0);
            }
        }
        drop(self.tell.send(Some(answer)));
    }
}

impl Drop for Lead {
    fn drop(&mut self) {
        if !self.finished {
            let mut apps = locked(self.keys.stripe(self.short));
            if let Some(keys) = apps.get_mut(&self.app) {
                keys.flights.remove(&self.short);
            }
        }
    }
}

fn shorten(hash: &[u8; 32]) -> Short {
    let mut short = [0; 16];
    short.copy_from_slice(&hash[..16]);
    short
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]

    use super::*;

    const APP: AppId = AppId::DEFAULT;

    /// Hashes of keys in one stripe, so that the order of age is one order.
    fn hash(n: u8) -> [u8; 32] {
        let mut hash = [0; 32];
        hash[1] = n;
        hash
    }

    fn lead(begin: Begin) -> Lead {
        match begin {
            Begin::Lead(lead) => lead,
            Begin::Known(_) | Begin::Conflict | Begin::Join(_) => panic!("expected to lead"),
        }
    }

    fn done(n: u8, at_ms: u64) -> Done {
        Done {
            ping: PingId([n; 16]),
            devices: 1,
            ttl_s: 60,
            at_ms,
        }
    }

    #[test]
    fn a_finished_key_gives_its_answer_and_refuses_another_body() {
        let keys = Arc::new(Idempotency::new(10, 1_000));
        let one = lead(keys.begin(APP, &hash(1), PingId([1; 16]), 0));
        one.finish(Ok(done(1, 0).answer()), Some(done(1, 0)));
        assert!(matches!(
            keys.begin(APP, &hash(1), PingId([1; 16]), 5),
            Begin::Known(known) if known == done(1, 0)
        ));
        assert!(matches!(
            keys.begin(APP, &hash(1), PingId([2; 16]), 5),
            Begin::Conflict
        ));
        lead(keys.begin(AppId(2), &hash(1), PingId([2; 16]), 5));
    }

    #[test]
    fn keys_are_bounded_by_number_and_age() {
        let keys = Arc::new(Idempotency::new(2 * STRIPES, 1_000));
        for n in 1..=3 {
            let one = lead(keys.begin(APP, &hash(n), PingId([n; 16]), u64::from(n)));
            one.finish(
                Ok(done(n, u64::from(n)).answer()),
                Some(done(n, u64::from(n))),
            );
        }
        assert_eq!(keys.entries(), 2);
        assert!(keys.lost());
        drop(lead(keys.begin(APP, &hash(1), PingId([1; 16]), 5)));
        drop(lead(keys.begin(APP, &hash(3), PingId([3; 16]), 1_003)));
        assert_eq!(keys.entries(), 0);
    }

    #[tokio::test]
    async fn those_who_joined_begin_again_when_the_first_goes_away() {
        let keys = Arc::new(Idempotency::new(10, 1_000));
        let first = lead(keys.begin(APP, &hash(1), PingId([1; 16]), 0));
        let Begin::Join(mut flight) = keys.begin(APP, &hash(1), PingId([1; 16]), 0) else {
            panic!("expected to join");
        };
        drop(first);
        assert!(flight.answer.changed().await.is_err());
        assert!(flight.placed.changed().await.is_err());
        lead(keys.begin(APP, &hash(1), PingId([1; 16]), 0));
    }

    #[test]
    fn a_failure_is_not_remembered() {
        let keys = Arc::new(Idempotency::new(10, 1_000));
        let first = lead(keys.begin(APP, &hash(1), PingId([1; 16]), 0));
        first.finish(Err(PingError::MailboxFull), None);
        lead(keys.begin(APP, &hash(1), PingId([1; 16]), 0));
    }
}
