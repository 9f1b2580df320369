//! Outcomes posted to where an app wants them.
//!
//! A callback is a position in the history of outcomes, like a stream of events, that outlives the process: nothing is copied until a
//! batch is given up. One poster an app ([`poster`]) walks the history from there, one post at a time, so that the order is kept
//! and nobody's slowness is anybody else's. The end of a batch is safe before the batch is first posted, and its id is made of
//! the two positions: however often it is posted, over crashes too, it is the same one.

mod body;
mod poster;

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use metrics::{counter, gauge};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::poster::Poster;
use super::api::RuntimeError;
use super::handle::{Inner, millis};
use crate::delivery::{AppId, Outcome};
use crate::ports::{
    CallbackRecord, DeadLetter, Failing, Op, Outbound, Page, Post, PostAnswer, PostError,
    SigningSecret, Store, UrlRefusal,
};
use crate::telemetry::metrics as names;

/// Posts under way at once, over all apps.
const POSTS_MAX: usize = 64;
/// Tests and dead letters that are posted at once, of all apps; more wait.
const POSTS_BY_HAND_MAX: usize = 8;
/// Longest wait for posts that are under way when the server goes down.
const STOP_MAX: Duration = Duration::from_secs(5);
/// Bytes of a secret that we make.
const SECRET_BYTES: usize = 32;
/// Longest text that says why something failed, bytes.
const WHY_MAX: usize = 200;

/// How callbacks are posted. Settable while they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallbackLimits {
    /// Events of one post. Default 100.
    pub batch: u32,
    /// Longest wait between two tries. Default 5 minutes.
    pub retry_max: Duration,
    /// How long a batch is tried before it is a dead letter. Default 12 hours.
    pub give_up: Duration,
    /// Dead letters that are kept for each app; above it the oldest goes. Default 1,000.
    pub dead_letters: u32,
}

impl Default for CallbackLimits {
    fn default() -> CallbackLimits {
        CallbackLimits {
            batch: 100,
            retry_max: Duration::from_secs(300),
            give_up: Duration::from_secs(12 * 3_600),
            dead_letters: 1_000,
        }
    }
}

/// What is asked for.
#[derive(Clone, PartialEq, Eq)]
pub struct CallbackWish {
    /// Where to.
    pub url: String,
    /// Only those that ended so; none: all.
    pub outcomes: Vec<Outcome>,
    /// A secret of the caller's own, as it is written.
    pub secret: Option<String>,
}

impl fmt::Debug for CallbackWish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallbackWish")
            .field("url", &self.url)
            .field("outcomes", &self.outcomes)
            .field("secret", &self.secret.as_ref().map(|_| "(hidden)"))
            .finish()
    }
}

/// Why a callback cannot be.
#[derive(Debug, thiserror::Error)]
pub enum CallbackError {
    /// The operator's settings allow no callbacks.
    #[error("callbacks are off")]
    Off,
    /// The address is none that can be posted to; completes "`url` must be …".
    #[error("the address must be {0}")]
    Malformed(&'static str),
    /// The operator's settings do not allow this address.
    #[error("{0}")]
    NotAllowed(String),
    /// The secret is not one.
    #[error("the secret must be `whsec_` and 24 to 64 bytes in base64")]
    Secret,
    /// There is none.
    #[error("no callback is set")]
    Unknown,
    /// Something that has nothing to do with callbacks.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

/// A callback as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallbackView {
    /// Where to.
    pub url: String,
    /// Only those that ended so; none: all.
    pub outcomes: Vec<Outcome>,
    /// When it was registered, Unix milliseconds.
    pub created_ms: u64,
    /// Until when the secret before this one signs as well.
    pub previous_secret_until_ms: Option<u64>,
    /// Since when the batch under way fails, and why.
    pub failing: Option<Failing>,
    /// When it is tried again, Unix milliseconds.
    pub next_try_ms: Option<u64>,
    /// When the receiver said that it is gone; nothing is posted since.
    pub gone_ms: Option<u64>,
    /// How old the oldest outcome is that is not posted yet, milliseconds.
    pub lag_ms: u64,
    /// Dead letters that are kept.
    pub dead_letters: u64,
}

/// What a post of its own came to.
pub type Posted = Result<PostAnswer, PostError>;

/// All callbacks.
pub(super) struct Callbacks {
    outbound: Arc<dyn Outbound>,
    posters: Mutex<HashMap<AppId, Arc<State>>>,
    /// Held while one is made, so that no app gets two.
    making: tokio::sync::Mutex<()>,
    places: Semaphore,
    /// Who posts a test or a dead letter takes one of these, so that no poster waits behind them.
    by_hand: Semaphore,
    /// Something that concerns every poster changed.
    changed: Notify,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// One callback, shared by its poster and those who change it.
pub(super) struct State {
    app: AppId,
    /// Held while something is written, so that what is on disk and what is here change together.
    held: tokio::sync::Mutex<Held>,
    changed: Notify,
    next_try_ms: AtomicU64,
    /// When the oldest outcome ended that is not posted yet, Unix milliseconds; 0: there is none.
    oldest_ms: AtomicU64,
    letters: AtomicU64,
}

/// What the lock holds.
struct Held {
    /// `None`: it was removed.
    record: Option<CallbackRecord>,
    /// Rises when what was begun does not count any more.
    epoch: u64,
}

impl State {
    fn new(record: CallbackRecord) -> State {
        State {
            app: record.app,
            held: tokio::sync::Mutex::new(Held {
                record: Some(record),
                epoch: 0,
            }),
            changed: Notify::new(),
            next_try_ms: AtomicU64::new(0),
            oldest_ms: AtomicU64::new(0),
            letters: AtomicU64::new(0),
        }
    }
}

impl Callbacks {
    pub(super) fn new(outbound: Arc<dyn Outbound>) -> Callbacks {
        Callbacks {
            outbound,
            posters: Mutex::default(),
            making: tokio::sync::Mutex::default(),
            places: Semaphore::new(POSTS_MAX),
            by_hand: Semaphore::new(POSTS_BY_HAND_MAX),
            changed: Notify::new(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }
    }

    fn posters(&self) -> std::sync::MutexGuard<'_, HashMap<AppId, Arc<State>>> {
        self.posters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, app: AppId) -> Option<Arc<State>> {
        self.posters().get(&app).map(Arc::clone)
    }

    /// The operator's settings changed: what was not allowed may be now.
    pub(super) fn wake(&self) {
        self.changed.notify_waiters();
    }

    /// Ends all posting, so that the store can be closed.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tasks.close();
        if tokio::time::timeout(STOP_MAX, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!(
                "a post was under way when the server went down; it is posted again after the start"
            );
        }
    }

    /// How many are set, fail, are gone; and dead letters.
    pub(super) fn figures(&self) -> CallbackFigures {
        let states: Vec<Arc<State>> = self.posters().values().map(Arc::clone).collect();
        let mut figures = CallbackFigures {
            on: self.outbound.is_on(),
            set: states.len() as u64,
            ..CallbackFigures::default()
        };
        for state in states {
            figures.dead_letters += state.letters.load(Ordering::Relaxed);
            // One that is being written now counts the next time.
            if let Ok(held) = state.held.try_lock()
                && let Some(record) = &held.record
            {
                figures.gone += u64::from(record.gone_ms.is_some());
                figures.failing += u64::from(record.failing.is_some() && record.gone_ms.is_none());
            }
        }
        figures
    }

    /// The age of the oldest outcome that is not posted, over all apps.
    fn lag_ms(&self, now_ms: u64) -> u64 {
        self.posters()
            .values()
            .map(|state| lag(state, now_ms))
            .max()
            .unwrap_or(0)
    }
}

/// What the status says.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CallbackFigures {
    /// The operator's settings allow callbacks.
    pub on: bool,
    /// Callbacks that are set.
    pub set: u64,
    /// Of these, those whose batch under way fails.
    pub failing: u64,
    /// Of these, those whose receiver said that it is gone.
    pub gone: u64,
    /// Dead letters that are kept.
    pub dead_letters: u64,
}

fn lag(state: &State, now_ms: u64) -> u64 {
    match state.oldest_ms.load(Ordering::Relaxed) {
        0 => 0,
        oldest => now_ms.saturating_sub(oldest),
    }
}

impl Inner {
    /// Starts a poster for each callback that is known.
    pub(super) fn start_callbacks(self: &Arc<Inner>, records: Vec<CallbackRecord>) {
        for record in records {
            self.start_poster(record);
        }
    }

    fn start_poster(self: &Arc<Inner>, record: CallbackRecord) -> Arc<State> {
        let state = Arc::new(State::new(record));
        self.callbacks
            .posters()
            .insert(state.app, Arc::clone(&state));
        let poster = Poster::new(Arc::clone(self), Arc::clone(&state));
        self.callbacks.tasks.spawn(poster.run());
        state
    }

    /// The figures of all callbacks, once a second.
    pub(super) fn measure_callbacks(&self) {
        let figures = self.callbacks.figures();
        let now_ms = self.shared.clock.now().unix_ms;
        #[expect(clippy::cast_precision_loss, reason = "a measurement")]
        {
            let healthy = figures.set.saturating_sub(figures.failing + figures.gone);
            gauge!(names::CALLBACKS, "state" => "ok").set(healthy as f64);
            gauge!(names::CALLBACKS, "state" => "failing").set(figures.failing as f64);
            gauge!(names::CALLBACKS, "state" => "gone").set(figures.gone as f64);
            gauge!(names::CALLBACK_DEAD_LETTERS).set(figures.dead_letters as f64);
            gauge!(names::CALLBACK_LAG).set(self.callbacks.lag_ms(now_ms) as f64 / 1_000.0);
        }
    }

    pub(super) async fn callback(&self, app: AppId) -> Option<CallbackView> {
        let state = self.callbacks.find(app)?;
        let held = state.held.lock().await;
        held.record.as_ref().map(|record| self.view(&state, record))
    }

    fn view(&self, state: &State, record: &CallbackRecord) -> CallbackView {
        let now_ms = self.shared.clock.now().unix_ms;
        let next_try_ms = state.next_try_ms.load(Ordering::Relaxed);
        CallbackView {
            url: record.url.clone(),
            outcomes: record.outcomes.clone(),
            created_ms: record.created_ms,
            previous_secret_until_ms: body::good(&record.secrets, now_ms)
                .find_map(|secret| secret.until_ms),
            failing: record.failing.clone(),
            next_try_ms: (next_try_ms > 0).then_some(next_try_ms),
            gone_ms: record.gone_ms,
            lag_ms: lag(state, now_ms),
            dead_letters: state.letters.load(Ordering::Relaxed),
        }
    }

    /// Sets where outcomes are posted. Answers the secret if it was made now. A callback that is there goes on where it is.
    pub(super) async fn set_callback(
        self: &Arc<Inner>,
        app: AppId,
        wish: CallbackWish,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        self.callbacks
            .outbound
            .check(&wish.url)
            .map_err(|refusal| match refusal {
                UrlRefusal::Off => CallbackError::Off,
                UrlRefusal::Malformed(why) => CallbackError::Malformed(why),
                UrlRefusal::NotAllowed(why) => CallbackError::NotAllowed(why),
            })?;
        let given = match &wish.secret {
            None => None,
            Some(text) => Some(body::parse_secret(text).ok_or(CallbackError::Secret)?),
        };
        let inner = Arc::clone(self);
        self.callback_to_the_end(async move { inner.setting_callback(app, wish, given).await })
            .await
    }

    async fn setting_callback(
        self: &Arc<Inner>,
        app: AppId,
        wish: CallbackWish,
        given: Option<Vec<u8>>,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        let _making = self.callbacks.making.lock().await;
        if let Some(state) = self.callbacks.find(app) {
            let mut held = state.held.lock().await;
            if let Some(record) = &held.record {
                let mut record = record.clone();
                record.url = wish.url;
                record.outcomes = wish.outcomes;
                if let Some(key) = given {
                    record.secrets = vec![SigningSecret {
                        key,
                        until_ms: None,
                    }];
                }
                record.sending = None;
                record.failing = None;
                record.gone_ms = None;
                self.write_callback(&mut held, record.clone()).await?;
                held.epoch += 1;
                state.next_try_ms.store(0, Ordering::Relaxed);
                state.changed.notify_one();
                return Ok((self.view(&state, &record), None));
            }
        }
        let made = given.is_none();
        let key = given.unwrap_or_else(|| self.new_secret());
        let record = CallbackRecord {
            app,
            url: wish.url,
            outcomes: wish.outcomes,
            secrets: vec![SigningSecret {
                key: key.clone(),
                until_ms: None,
            }],
            created_ms: self.shared.clock.now().unix_ms,
            position: self.shared.store.outcomes_end(),
            sending: None,
            failing: None,
            gone_ms: None,
            // Letters of a callback that was removed are gone, so none can have a number twice.
            next_letter: 1,
        };
        self.commit_fully(vec![Op::PutCallback(record.clone())], || {})
            .await?;
        let state = self.start_poster(record.clone());
        Ok((
            self.view(&state, &record),
            made.then(|| body::secret_text(&key)),
        ))
    }

    fn new_secret(&self) -> Vec<u8> {
        let mut key = vec![0; SECRET_BYTES];
        self.entropy.fill(&mut key);
        key
    }

    async fn write_callback(
        &self,
        held: &mut Held,
        record: CallbackRecord,
    ) -> Result<(), RuntimeError> {
        self.commit_fully(vec![Op::PutCallback(record.clone())], || {})
            .await?;
        held.record = Some(record);
        Ok(())
    }

    /// Runs a change to its end even if the caller goes away or has waited long enough, so that what is on disk and what is
    /// done never differ.
    async fn callback_to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, CallbackError>> + Send + 'static,
    ) -> Result<T, CallbackError> {
        let done = self.to_the_end(async move { Ok(work.await) }).await;
        done.map_err(CallbackError::from).flatten()
    }

    /// A new secret; the one before signs as well for `overlap`.
    pub(super) async fn rotate_callback_secret(
        self: &Arc<Inner>,
        app: AppId,
        secret: Option<&str>,
        overlap: Option<Duration>,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        let given = match secret {
            None => None,
            Some(text) => Some(body::parse_secret(text).ok_or(CallbackError::Secret)?),
        };
        let inner = Arc::clone(self);
        self.callback_to_the_end(async move { inner.rotating(app, given, overlap).await })
            .await
    }

    async fn rotating(
        &self,
        app: AppId,
        given: Option<Vec<u8>>,
        overlap: Option<Duration>,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        let state = self.callbacks.find(app).ok_or(CallbackError::Unknown)?;
        let mut held = state.held.lock().await;
        let mut record = held.record.clone().ok_or(CallbackError::Unknown)?;
        let overlap = overlap.unwrap_or_else(|| self.limits.load().secret_overlap);
        let now_ms = self.shared.clock.now().unix_ms;
        let made = given.is_none();
        let key = given.unwrap_or_else(|| self.new_secret());
        if let Some(before) = record.secrets.first_mut() {
            before.until_ms = Some(now_ms.saturating_add(millis(overlap)));
        }
        record.secrets.insert(
            0,
            SigningSecret {
                key: key.clone(),
                until_ms: None,
            },
        );
        record.secrets.truncate(CallbackRecord::SECRETS_MAX);
        self.write_callback(&mut held, record.clone()).await?;
        Ok((
            self.view(&state, &record),
            made.then(|| body::secret_text(&key)),
        ))
    }

    /// Posts nothing any more and forgets the dead letters; `false`: there was none.
    pub(super) async fn drop_callback(self: &Arc<Inner>, app: AppId) -> Result<bool, RuntimeError> {
        let inner = Arc::clone(self);
        self.to_the_end(async move { inner.dropping(app).await })
            .await
    }

    async fn dropping(&self, app: AppId) -> Result<bool, RuntimeError> {
        let Some(state) = self.callbacks.find(app) else {
            return Ok(false);
        };
        let mut held = state.held.lock().await;
        if held.record.is_none() {
            return Ok(false);
        }
        // The letters first: what is left of them after a failure still has its callback.
        loop {
            let page = self.dead_letters(app, None, DROP_PAGE).await?;
            let ops: Vec<Op> = page
                .items
                .iter()
                .map(|letter| Op::DropDeadLetter(app, letter.number))
                .collect();
            if ops.is_empty() {
                break;
            }
            self.commit_fully(ops, || {}).await?;
        }
        self.commit_fully(vec![Op::DropCallback(app)], || {})
            .await?;
        held.record = None;
        held.epoch += 1;
        let mut posters = self.callbacks.posters();
        posters.remove(&app);
        drop(posters);
        state.changed.notify_one();
        Ok(true)
    }

    /// Posts a test now. `None`: no callback is set.
    pub(super) async fn test_callback(&self, app: AppId) -> Option<Posted> {
        let state = self.callbacks.find(app)?;
        let now_ms = self.shared.clock.now().unix_ms;
        let mut random = [0; 16];
        self.entropy.fill(&mut random);
        let id = format!("test_{}", data_encoding::HEXLOWER.encode(&random));
        self.post_once(&state, &id, body::test_body(now_ms)).await
    }

    /// `None`: the callback was removed.
    async fn post_once(&self, state: &State, id: &str, body: bytes::Bytes) -> Option<Posted> {
        // It is never closed.
        let _place = self.callbacks.by_hand.acquire().await;
        // After the wait: where it goes, what it is signed with and when are of the moment in which it is posted.
        let record = state.held.lock().await.record.clone()?;
        let now_ms = self.shared.clock.now().unix_ms;
        let post = Post {
            url: record.url.clone(),
            headers: body::headers(&record, id, &body, now_ms),
            body,
        };
        let answer = self.callbacks.outbound.line().post(&post).await;
        count(&answer);
        Some(answer)
    }

    pub(super) async fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, RuntimeError> {
        // With their bodies: as much as a piece of the history.
        self.in_time(async {
            let place = self.listings.place(app).await;
            let read = move |store: &dyn Store| {
                let letters = store.dead_letters(app, after, limit);
                drop(place);
                letters
            };
            self.shared.reading.read(read).await
        })
        .await
    }

    /// Posts a dead letter again, and forgets it if that went well. `None`: there is no such letter.
    pub(super) async fn resend(
        &self,
        app: AppId,
        number: u64,
    ) -> Result<Option<Posted>, RuntimeError> {
        let Some(state) = self.callbacks.find(app) else {
            return Ok(None);
        };
        let Some(letter) = self.dead_letter(app, number).await? else {
            return Ok(None);
        };
        let Some(answer) = self.post_once(&state, &letter.id, letter.body).await else {
            return Ok(None);
        };
        if matches!(&answer, Ok(answer) if is_success(answer.status)) {
            self.drop_dead_letter(app, number).await?;
        }
        Ok(Some(answer))
    }

    async fn dead_letter(
        &self,
        app: AppId,
        number: u64,
    ) -> Result<Option<DeadLetter>, RuntimeError> {
        let Some(before) = number.checked_sub(1) else {
            return Ok(None);
        };
        let page = self.dead_letters(app, Some(before), 1).await?;
        let found = page.items.into_iter().next();
        Ok(found.filter(|letter| letter.number == number))
    }

    /// Forgets a dead letter; `false`: there is no such one.
    pub(super) async fn drop_dead_letter(
        &self,
        app: AppId,
        number: u64,
    ) -> Result<bool, RuntimeError> {
        let Some(state) = self.callbacks.find(app) else {
            return Ok(false);
        };
        // Held, so that two who drop the same one count it once.
        let _held = state.held.lock().await;
        if self.dead_letter(app, number).await?.is_none() {
            return Ok(false);
        }
        self.commit(vec![Op::DropDeadLetter(app, number)], || {})
            .await?;
        let _ = state
            .letters
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |letters| {
                letters.checked_sub(1)
            });
        Ok(true)
    }
}

/// Dead letters that are read at once where nobody asked for a page: each may have 64 KiB.
const DROP_PAGE: usize = 16;

fn is_success(status: u16) -> bool {
    (200..300).contains(&status)
}

/// Counts an attempt.
fn count(answer: &Posted) {
    let result = match answer {
        Ok(answer) if is_success(answer.status) => "ok",
        Ok(PostAnswer { status: 410, .. }) => "gone",
        Ok(PostAnswer {
            status: 300..400, ..
        }) => "redirect",
        Ok(PostAnswer {
            status: 400..500, ..
        }) => "refused",
        Ok(_) => "server_error",
        Err(error) => error.reason(),
    };
    counter!(names::CALLBACK_POSTS_TOTAL, "result" => result).increment(1);
}

/// What an answer says, for people.
fn why(answer: &Posted) -> String {
    let mut text = match answer {
        Ok(PostAnswer {
            status: status @ 300..400,
            ..
        }) => format!("it answered {status}, and redirects are not followed"),
        Ok(answer) => format!("it answered {}", answer.status),
        Err(error) => error.to_string(),
    };
    let end = (0..=WHY_MAX.min(text.len()))
        .rev()
        .find(|end| text.is_char_boundary(*end))
        .unwrap_or(0);
    text.truncate(end);
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_does_not_show_its_secret() {
        let wish = CallbackWish {
            url: "https://hooks.example.com".to_owned(),
            outcomes: Vec::new(),
            secret: Some("whsec_QUJD".to_owned()),
        };
        let shown = format!("{wish:?}");
        assert!(
            shown.contains("hooks.example.com") && !shown.contains("QUJD"),
            "{shown}"
        );
    }
}
