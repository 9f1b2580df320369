//! One app's poster: one batch at a time, in order, until it is taken or given up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aws_lc_rs::hmac;
use bytes::Bytes;
use metrics::counter;

use super::super::api::RuntimeError;
use super::super::handle::{Inner, millis};
use super::body::{self, Gathering};
use super::{DROP_PAGE, Posted, State, count, is_success, why};
use crate::ports::{
    CallbackRecord, DeadLetter, Failing, Op, OutboundLine, OutcomeFollow, OutcomePosition, Post,
    PostError,
};
use crate::telemetry::metrics as names;

/// Wait after the first failure; it doubles with each.
const RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest wait that a receiver can ask for with `Retry-After`.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(3_600);
/// How often a batch is tried that the receiver says is wrong in itself (400, 413, 415, 422).
const REFUSED_TRIES: u32 = 10;
/// Wait after trouble with the store.
const STORE_RETRY: Duration = Duration::from_secs(5);

/// A batch that is ready.
struct Batch {
    /// Behind its last event.
    to: OutcomePosition,
    events: u32,
    body: Bytes,
}

/// What there is from a position on.
struct Gathered {
    /// Everything up to here was looked at.
    to: OutcomePosition,
    gathering: Gathering,
}

pub(super) struct Poster {
    inner: Arc<Inner>,
    state: Arc<State>,
    line: Box<dyn OutboundLine>,
}

/// What to do next.
enum Next {
    /// Look again.
    Go,
    /// Wait for news, at most so long.
    Wait(Option<Duration>),
    /// The callback is no more.
    End,
}

impl Poster {
    pub(super) fn new(inner: Arc<Inner>, state: Arc<State>) -> Poster {
        let line = inner.callbacks.outbound.line();
        Poster { inner, state, line }
    }

    pub(super) async fn run(mut self) {
        let inner = Arc::clone(&self.inner);
        inner.followers.join_poster(&*inner.shared.store);
        let stop = inner.callbacks.stop.clone();
        tokio::select! {
            () = stop.cancelled() => {}
            () = self.post_on() => {}
        }
        inner.followers.leave_poster(&*inner.shared.store);
    }

    async fn post_on(&mut self) {
        self.count_letters().await;
        loop {
            let inner = Arc::clone(&self.inner);
            let state = Arc::clone(&self.state);
            let news = inner.followers.woken();
            let settings = inner.callbacks.changed.notified();
            tokio::pin!(news, settings);
            // Before looking: what happens meanwhile wakes.
            news.as_mut().enable();
            settings.as_mut().enable();
            let (wait, heeds_news) = match self.step().await {
                Ok(Next::Go) => continue,
                Ok(Next::End) => return,
                Ok(Next::Wait(None)) => (Duration::MAX, true),
                Ok(Next::Wait(Some(wait))) => (wait, false),
                Err(error) => {
                    tracing::warn!(%error, "a callback waits for the store");
                    (STORE_RETRY, false)
                }
            };
            let quiet = tokio::time::sleep(wait.min(RETRY_AFTER_MAX));
            tokio::select! {
                () = news, if heeds_news => {}
                () = settings => {}
                () = state.changed.notified() => {}
                () = quiet => {}
            }
        }
    }

    async fn count_letters(&self) {
        let (mut count, mut after) = (0, None);
        loop {
            match self
                .inner
                .dead_letters(self.state.app, after, DROP_PAGE)
                .await
            {
                Ok(page) => {
                    count += page.items.len() as u64;
                    after = page.next;
                    if after.is_none() {
                        break;
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "the dead letters of a callback could not be counted; it is tried again");
                    tokio::time::sleep(STORE_RETRY).await;
                }
            }
        }
        self.state.letters.store(count, Ordering::Relaxed);
    }

    async fn step(&mut self) -> Result<Next, RuntimeError> {
        let state = Arc::clone(&self.state);
        let held = state.held.lock().await;
        let Some(record) = held.record.clone() else {
            return Ok(Next::End);
        };
        let epoch = held.epoch;
        drop(held);
        if record.gone_ms.is_some() {
            return Ok(Next::Wait(None));
        }
        let gathered = self.gather(&record).await?;
        let now_ms = self.inner.shared.clock.now().unix_ms;
        let oldest_ms = gathered.gathering.first_ms.unwrap_or(0);
        state.oldest_ms.store(oldest_ms, Ordering::Relaxed);
        if gathered.gathering.events == 0 {
            return self.nothing(&record, epoch, gathered.to).await;
        }
        let batch = Batch {
            to: gathered.to,
            events: gathered.gathering.events,
            body: gathered.gathering.body(gathered.to, now_ms),
        };
        if record.sending != Some(batch.to) {
            // Which batch it is must be known after a crash as well.
            let begun = CallbackRecord {
                sending: Some(batch.to),
                ..record.clone()
            };
            if !self.write(epoch, begun, Vec::new()).await? {
                return Ok(Next::Go);
            }
        }
        let id = self.id(&record, batch.to);
        match self.post(epoch, &id, &batch.body).await {
            Some(answer) => self.conclude(epoch, &id, batch, answer).await,
            None => Ok(Next::Go),
        }
    }

    /// Nothing to post up to here.
    async fn nothing(
        &self,
        record: &CallbackRecord,
        epoch: u64,
        to: OutcomePosition,
    ) -> Result<Next, RuntimeError> {
        if to == record.position && record.sending.is_none() {
            return Ok(Next::Wait(None));
        }
        let moved = CallbackRecord {
            position: to,
            sending: None,
            failing: None,
            ..record.clone()
        };
        // Not for each outcome that is not wanted: in memory at once, on disk with the next post or the next segment. After a
        // crash it is looked at once more.
        let far = (to.0 >> 32) != (record.position.0 >> 32);
        if far || record.sending.is_some() {
            self.write(epoch, moved, Vec::new()).await?;
        } else {
            let mut held = self.state.held.lock().await;
            if held.epoch == epoch
                && let Some(now) = &mut held.record
            {
                // Nothing else of it: its secrets may have changed since it was read.
                (now.position, now.sending, now.failing) = (to, None, None);
            }
        }
        Ok(Next::Go)
    }

    /// Reads on from where the callback is, as far as one batch goes.
    async fn gather(&self, record: &CallbackRecord) -> Result<Gathered, RuntimeError> {
        let most = self.inner.limits.load().callbacks.batch.max(1) as usize;
        let mut gathering = Gathering::default();
        let mut at = record.position;
        loop {
            let wanted = most.saturating_sub(gathering.events as usize).max(1);
            let follow = OutcomeFollow {
                outcomes: record.outcomes.clone(),
                ..OutcomeFollow::all(self.state.app, at, wanted)
            };
            let found = self.inner.read_events(follow).await?;
            // A position of another history leads to the end of this one, which may be before it.
            let elsewhere = found.next < at;
            for (position, event) in &found.items {
                let end = record.sending.filter(|_| !elsewhere);
                if let Some(end) = end.filter(|end| position > end) {
                    return Ok(Gathered { to: end, gathering });
                }
                if !gathering.take(event) {
                    return Ok(Gathered { to: at, gathering });
                }
                at = *position;
            }
            let full = gathering.events as usize >= most;
            if !full {
                at = found.next;
            }
            let over = record.sending.is_some_and(|end| at >= end);
            if full || elsewhere || !found.more || over {
                if let Some(end) = record.sending.filter(|_| over && !elsewhere) {
                    at = end;
                }
                return Ok(Gathered { to: at, gathering });
            }
        }
    }

    /// The id of a batch: nobody else can make it, and it is the same however often it is posted.
    fn id(&self, record: &CallbackRecord, to: OutcomePosition) -> String {
        let from = record.position;
        let Some(app) = self.inner.apps.get(&self.state.app) else {
            // Every callback belongs to an app.
            return format!("msg_{:016x}{:016x}", from.0, to.0);
        };
        let mut context = hmac::Context::with_key(&app.secret);
        // Shorter than what ids of pings are made of, so neither can be the other.
        context.update(b"callback");
        context.update(&from.0.to_be_bytes());
        context.update(&to.0.to_be_bytes());
        // With other outcomes the same places are another batch.
        for outcome in &record.outcomes {
            context.update(outcome.as_str().as_bytes());
            context.update(b",");
        }
        let sum = context.sign();
        let half = sum.as_ref().get(..16).unwrap_or_default();
        format!("msg_{}", data_encoding::HEXLOWER.encode(half))
    }

    async fn post(&mut self, epoch: u64, id: &str, body: &Bytes) -> Option<Posted> {
        // It is never closed.
        let _place = self.inner.callbacks.places.acquire().await;
        let now_ms = self.inner.shared.clock.now().unix_ms;
        let post = {
            // Not as it was before reading and waiting: a secret that was replaced at once must not sign any more.
            let held = self.state.held.lock().await;
            let record = held.record.as_ref().filter(|_| held.epoch == epoch)?;
            Post {
                url: record.url.clone(),
                headers: body::headers(record, id, body, now_ms),
                body: body.clone(),
            }
        };
        let answer = self.line.post(&post).await;
        count(&answer);
        Some(answer)
    }

    /// Writes a new state of the callback; `false`: it is not what it was any more, and nothing was written.
    async fn write(
        &self,
        epoch: u64,
        record: CallbackRecord,
        mut also: Vec<Op>,
    ) -> Result<bool, RuntimeError> {
        let mut held = self.state.held.lock().await;
        let Some(now) = held.record.as_ref().filter(|_| held.epoch == epoch) else {
            return Ok(false);
        };
        let record = CallbackRecord {
            // These change without ending what is under way.
            secrets: now.secrets.clone(),
            ..record
        };
        also.push(Op::PutCallback(record.clone()));
        self.inner.commit(also, || {}).await?;
        held.record = Some(record);
        Ok(true)
    }

    async fn conclude(
        &self,
        epoch: u64,
        id: &str,
        batch: Batch,
        answer: Posted,
    ) -> Result<Next, RuntimeError> {
        let Some(record) = self.state.held.lock().await.record.clone() else {
            return Ok(Next::End);
        };
        let now_ms = self.inner.shared.clock.now().unix_ms;
        let over = CallbackRecord {
            position: batch.to,
            sending: None,
            failing: None,
            ..record.clone()
        };
        let status = answer.as_ref().map_or(0, |answer| answer.status);
        if is_success(status) {
            if self.write(epoch, over, Vec::new()).await? {
                self.state.next_try_ms.store(0, Ordering::Relaxed);
                self.state.oldest_ms.store(0, Ordering::Relaxed);
                counter!(names::CALLBACK_EVENTS_TOTAL).increment(u64::from(batch.events));
                if record.failing.is_some() {
                    tracing::info!(app = %record.app.0, "a callback is taken again");
                }
            }
            return Ok(Next::Go);
        }
        if status == 410 {
            tracing::warn!(app = %record.app.0, "the receiver of a callback says that it is gone; nothing is posted until the callback is set again");
            let gone = CallbackRecord {
                gone_ms: Some(now_ms),
                ..record
            };
            self.write(epoch, gone, Vec::new()).await?;
            return Ok(Next::Go);
        }
        let before = record.failing.as_ref();
        let failing = Failing {
            since_ms: before.map_or(now_ms, |failing| failing.since_ms),
            tries: before.map_or(0, |failing| failing.tries).saturating_add(1),
            why: why(&answer),
        };
        if before.is_none() {
            tracing::warn!(app = %record.app.0, why = failing.why, "a callback fails; it is tried again");
        }
        let limits = self.inner.limits.load();
        let limits = &limits.callbacks;
        // What the operator does not allow is not the fault of the batch.
        let held_back = matches!(answer, Err(PostError::NotAllowed(_)));
        let refused = matches!(status, 400 | 413 | 415 | 422) && failing.tries >= REFUSED_TRIES;
        let too_long = now_ms.saturating_sub(failing.since_ms) >= millis(limits.give_up);
        if !held_back && (refused || too_long) {
            let letter = DeadLetter {
                app: record.app,
                number: record.next_letter,
                id: id.to_owned(),
                body: batch.body,
                events: batch.events,
                tries: failing.tries,
                since_ms: failing.since_ms,
                at_ms: now_ms,
                why: failing.why,
            };
            return self
                .give_up(epoch, over, letter, u64::from(limits.dead_letters))
                .await;
        }
        let asked = answer.ok().and_then(|answer| answer.retry_after);
        let wait = if held_back {
            limits.retry_max
        } else {
            self.pause(failing.tries, limits.retry_max)
                .max(asked.unwrap_or_default().min(RETRY_AFTER_MAX))
        };
        let failed = CallbackRecord {
            failing: Some(failing),
            ..record
        };
        if !self.write(epoch, failed, Vec::new()).await? {
            return Ok(Next::Go);
        }
        self.state
            .next_try_ms
            .store(now_ms.saturating_add(millis(wait)), Ordering::Relaxed);
        Ok(Next::Wait(Some(wait)))
    }

    /// Makes the batch a dead letter and goes on behind it.
    async fn give_up(
        &self,
        epoch: u64,
        over: CallbackRecord,
        letter: DeadLetter,
        most: u64,
    ) -> Result<Next, RuntimeError> {
        let app = letter.app;
        tracing::error!(app = %app.0, id = letter.id, tries = letter.tries, why = letter.why, "a batch of outcomes is given up; it is kept as a dead letter");
        let mut ops = Vec::new();
        let mut kept = self.state.letters.load(Ordering::Relaxed);
        if kept >= most.max(1) {
            let page = self.inner.dead_letters(app, None, 1).await?;
            if let Some(oldest) = page.items.first() {
                tracing::error!(app = %app.0, id = oldest.id, "the oldest dead letter of a callback is dropped: there are too many (callbacks.dead_letters)");
                counter!(names::CALLBACK_DEAD_LETTERS_DROPPED_TOTAL).increment(1);
                ops.push(Op::DropDeadLetter(app, oldest.number));
                kept = kept.saturating_sub(1);
            }
        }
        let next_letter = letter.number.saturating_add(1);
        ops.push(Op::PutDeadLetter(letter));
        let over = CallbackRecord {
            next_letter,
            ..over
        };
        if self.write(epoch, over, ops).await? {
            self.state.letters.store(kept + 1, Ordering::Relaxed);
            self.state.next_try_ms.store(0, Ordering::Relaxed);
            counter!(names::CALLBACK_DEAD_LETTERS_TOTAL).increment(1);
        }
        Ok(Next::Go)
    }

    /// The wait after so many failures: doubled with each, and somewhere in its second half.
    fn pause(&self, tries: u32, most: Duration) -> Duration {
        let doubled = RETRY_FIRST.saturating_mul(1 << tries.saturating_sub(1).min(20));
        let whole = millis(doubled.min(most));
        let mut random = [0; 8];
        self.inner.entropy.fill(&mut random);
        let half = whole / 2;
        Duration::from_millis(half + u64::from_le_bytes(random) % (whole - half + 1))
    }
}
