//! The hand-over: one task that gives notifications to the app, one after the other, and writes the verdicts down.
//!
//! It outlives sessions: a callback that runs while the connection breaks is finished, its verdict saved, and told in the next
//! session. The order is always callback, window on disk, acknowledgement. What waits together is saved together.

use std::collections::VecDeque;
use std::panic::AssertUnwindSafe;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bellwire_protocol::{EXPIRED, Id, Notify, WITHDRAWN};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use tokio::sync::Notify as Bell;

use crate::clock::Clock;
use crate::notification::{Event, Notification, Verdict};
use crate::state::{Given, Journal, Memory};

/// How long a verdict may wait for others of its batch before it is saved, in milliseconds: a slow app must not delay what it
/// answered before.
const SAVE_AFTER_MS: u64 = 50;

/// What a panicking callback declines with. Repeating a notification that breaks the app would break it for ever.
const HANDLER_PANICKED: &str = "handler_panicked";

/// The app's callback.
pub(crate) type Handler = Arc<dyn Fn(Notification) -> BoxFuture<'static, Verdict> + Send + Sync>;

/// The app's ear for everything else.
#[derive(Clone)]
pub(crate) struct Events(pub(crate) Arc<dyn Fn(Event) + Send + Sync>);

impl Events {
    /// Tells the app. A panic of its callback is the app's own affair.
    pub(crate) fn tell(&self, event: Event) {
        tracing::debug!(?event, "event");
        if std::panic::catch_unwind(AssertUnwindSafe(|| (self.0)(event))).is_err() {
            tracing::error!("the callback for events panicked");
        }
    }
}

/// A notification that waits for the app.
#[derive(Debug)]
struct Waiting {
    notify: Notify,
    /// When it is of no more use, on the client's own clock.
    expires_at_ms: u64,
    /// The server has taken it back meanwhile.
    withdrawn: bool,
}

/// The notification that the app works on.
#[derive(Debug)]
struct Current {
    id: Id,
    withdrawn: bool,
}

/// A verdict that is safe on disk and waits to be sent.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) id: Id,
    pub(crate) given: Given,
    /// Behind this verdict in the order of [`Memory`], for confirmation.
    pub(crate) mark: u64,
}

/// What the session and the hand-over share.
pub(crate) struct Desk {
    inner: Mutex<Inner>,
    memory: Mutex<Memory>,
    /// Rings when there is something for the app, or it is time to end.
    arrived: Bell,
    /// Rings when there is something for the session.
    decided: Bell,
}

#[derive(Default)]
struct Inner {
    /// Bounded by the window: the session machine ends a session whose server overruns it, and a new one starts empty.
    waiting: VecDeque<Waiting>,
    current: Option<Current>,
    /// Bounded likewise: a verdict answers a notification of this window, or of the last one.
    decided: Vec<Decided>,
    /// Verdicts could not be saved; the session must end without them.
    failed: Option<String>,
    closing: bool,
    closed: bool,
}

/// What the session takes from the desk.
#[derive(Debug, Default)]
pub(crate) struct Taken {
    pub(crate) decided: Vec<Decided>,
    pub(crate) failed: Option<String>,
    /// The hand-over has ended: nothing will follow.
    pub(crate) closed: bool,
}

impl Desk {
    pub(crate) fn new(memory: Memory) -> Self {
        Self {
            inner: Mutex::default(),
            memory: Mutex::new(memory),
            arrived: Bell::new(),
            decided: Bell::new(),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new session begins. What the last one brought and the app has not seen comes again, in order, so it is dropped; what
    /// was decided meanwhile stands in `seen`, or is repeated and answered from the window.
    pub(crate) fn begin_session(&self) {
        let mut inner = self.inner();
        inner.waiting.clear();
        inner.decided.clear();
        inner.failed = None;
    }

    /// Puts a notification before the app; [`ring`](Self::ring) follows.
    pub(crate) fn put(&self, notify: Notify, expires_at_ms: u64) {
        let mut inner = self.inner();
        if !inner.closing {
            inner.waiting.push_back(Waiting {
                notify,
                expires_at_ms,
                withdrawn: false,
            });
        }
    }

    /// The server takes notifications back. What the app has not seen will not reach it; of what it works on it is told once
    /// it is done. Answers with the others, of which it is to be told now.
    pub(crate) fn withdraw(&self, mut ids: Vec<Id>) -> Vec<Id> {
        let mut inner = self.inner();
        for waiting in &mut inner.waiting {
            waiting.withdrawn |= ids.contains(&waiting.notify.id);
        }
        if let Some(current) = &mut inner.current
            && ids.contains(&current.id)
        {
            current.withdrawn = true;
            ids.retain(|id| *id != current.id);
        }
        ids
    }

    /// Wakes the hand-over.
    pub(crate) fn ring(&self) {
        self.arrived.notify_one();
    }

    /// Waits for verdicts; may be dropped without losing one.
    pub(crate) async fn decided(&self) -> Taken {
        loop {
            let bell = self.decided.notified();
            {
                let mut inner = self.inner();
                if !inner.decided.is_empty() || inner.failed.is_some() || inner.closed {
                    return Taken {
                        decided: std::mem::take(&mut inner.decided),
                        failed: inner.failed.take(),
                        closed: inner.closed,
                    };
                }
            }
            bell.await;
        }
    }

    /// No more callbacks: the one that runs is finished and its verdict saved, then the hand-over ends.
    pub(crate) fn close(&self) {
        {
            let mut inner = self.inner();
            inner.closing = true;
            inner.waiting.clear();
        }
        self.arrived.notify_one();
    }

    /// The next one for the app. On the way out there is none: what the app has not seen stays with the server.
    fn next(&self) -> Option<Waiting> {
        let mut inner = self.inner();
        let waiting = inner.waiting.pop_front()?;
        inner.current = Some(Current {
            id: waiting.notify.id,
            withdrawn: waiting.withdrawn,
        });
        Some(waiting)
    }

    /// The app is done with it; answers whether it was taken back meanwhile.
    fn done(&self) -> bool {
        let current = self.inner().current.take();
        current.is_some_and(|current| current.withdrawn)
    }

    fn is_closing(&self) -> bool {
        self.inner().closing
    }

    /// Whether the hand-over has ended: nothing reaches the app any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.inner().closed
    }
}

/// The task.
pub(crate) struct Handover {
    pub(crate) desk: Arc<Desk>,
    pub(crate) journal: Arc<Mutex<Journal>>,
    pub(crate) handler: Handler,
    pub(crate) events: Events,
    pub(crate) clock: Arc<Clock>,
    /// How many notifications may still reach the app; `None`: any number.
    pub(crate) remaining: Option<u64>,
}

impl Handover {
    /// Runs until the desk is closed.
    pub(crate) async fn run(mut self) {
        let desk = self.desk.clone();
        // No more than two windows: a verdict that was not told keeps its place in the session that it belongs to.
        let mut decided = Vec::new();
        let mut first_at_ms = None;
        loop {
            let bell = desk.arrived.notified();
            match desk.next() {
                Some(waiting) => {
                    decided.push(self.decide(waiting).await);
                    let now_ms = self.clock.now_ms();
                    let waited_ms = now_ms.saturating_sub(*first_at_ms.get_or_insert(now_ms));
                    if waited_ms >= SAVE_AFTER_MS {
                        self.save(std::mem::take(&mut decided)).await;
                        first_at_ms = None;
                    }
                }
                None if !decided.is_empty() => {
                    self.save(std::mem::take(&mut decided)).await;
                    first_at_ms = None;
                }
                None if desk.is_closing() => break,
                None => bell.await,
            }
        }
        desk.inner().closed = true;
        desk.decided.notify_one();
    }

    /// One notification: from the window if it was answered before, otherwise by the app.
    async fn decide(&mut self, waiting: Waiting) -> Decided {
        let id = waiting.notify.id;
        let already_told = waiting.withdrawn;
        let decided = self.verdict(waiting).await;
        if self.desk.done() && !already_told {
            self.events.tell(Event::Withdrawn { ids: vec![id] });
        }
        decided
    }

    async fn verdict(&mut self, waiting: Waiting) -> Decided {
        let id = waiting.notify.id;
        let known = self.desk.memory().given(&id).cloned();
        if let Some(given) = known {
            self.events.tell(Event::Repeated { id });
            return Decided { id, given, mark: 0 };
        }
        // Both are remembered like any verdict: a copy that a later session brought, by a clock that was set back, must not
        // reach the app after all.
        if waiting.withdrawn {
            return self.remember(id, Given::declined(WITHDRAWN));
        }
        if self.clock.now_ms() >= waiting.expires_at_ms {
            self.events.tell(Event::Expired { id });
            return self.remember(id, Given::declined(EXPIRED));
        }
        let handler = &self.handler;
        let notification = Notification::from(waiting.notify);
        let called = AssertUnwindSafe(async move { handler(notification).await });
        let given = match called.catch_unwind().await {
            Ok(Verdict::Acknowledge) => Given::Acknowledged,
            Ok(Verdict::Decline(reason)) => Given::declined(&reason),
            Err(_) => {
                let what =
                    format!("the callback panicked on notification {id}, which was declined");
                self.events.tell(Event::Trouble { what });
                Given::declined(HANDLER_PANICKED)
            }
        };
        self.remaining = self.remaining.map(|remaining| remaining.saturating_sub(1));
        if self.remaining == Some(0) {
            self.desk.close();
        }
        self.remember(id, given)
    }

    fn remember(&self, id: Id, given: Given) -> Decided {
        let mut memory = self.desk.memory();
        memory.remember(id, given.clone());
        Decided {
            id,
            given,
            mark: memory.mark(),
        }
    }

    /// Writes down what is not yet on disk, once for all, and only then lets the session tell the server.
    async fn save(&self, decided: Vec<Decided>) {
        if decided.is_empty() {
            return;
        }
        let unsaved = self.desk.memory().unsaved();
        if !unsaved.is_empty() {
            let (journal, desk) = (self.journal.clone(), self.desk.clone());
            let saving = tokio::task::spawn_blocking(move || {
                let mut journal = journal.lock().unwrap_or_else(PoisonError::into_inner);
                if journal.wants_rewrite(unsaved.len()) {
                    let all = desk.memory().all();
                    return journal.rewrite(&all);
                }
                journal.append(&unsaved)
            });
            let saved = saving
                .await
                .unwrap_or_else(|error| Err(std::io::Error::other(error)));
            if let Err(error) = saved {
                tracing::error!(%error, "cannot save verdicts");
                self.desk.inner().failed = Some(error.to_string());
                self.desk.decided.notify_one();
                return;
            }
            self.desk.memory().saved();
        }
        self.desk.inner().decided.extend(decided);
        self.desk.decided.notify_one();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use bellwire_protocol::{Content, Urgency};

    struct World {
        directory: tempfile::TempDir,
        desk: Arc<Desk>,
        journal: Arc<Mutex<Journal>>,
        shown: Arc<Mutex<Vec<Id>>>,
        clock: Arc<Clock>,
    }

    impl World {
        /// A running hand-over with an app that acknowledges everything.
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let (journal, memory, _) = Journal::open(directory.path(), true, 7).unwrap();
            let world = Self {
                directory,
                desk: Arc::new(Desk::new(memory)),
                journal: Arc::new(Mutex::new(journal)),
                shown: Arc::default(),
                clock: Arc::new(Clock::new()),
            };
            let shown = world.shown.clone();
            let handover = Handover {
                desk: world.desk.clone(),
                journal: world.journal.clone(),
                handler: Arc::new(move |notification| {
                    shown.lock().unwrap().push(notification.id);
                    std::future::ready(Verdict::Acknowledge).boxed()
                }),
                events: Events(Arc::new(|_| {})),
                clock: world.clock.clone(),
                remaining: None,
            };
            tokio::spawn(handover.run());
            world
        }

        fn put(&self, id: Id, expires_at_ms: u64) {
            self.desk.put(notify(id), expires_at_ms);
            self.desk.ring();
        }

        async fn decided(&self) -> Taken {
            let waiting =
                tokio::time::timeout(std::time::Duration::from_secs(20), self.desk.decided());
            waiting.await.expect("nothing was decided")
        }
    }

    fn notify(id: Id) -> Notify {
        Notify {
            seq: 1,
            redelivered: false,
            id,
            accepted_ms: 0,
            expires_ms: 0,
            urgency: Urgency::Normal,
            content: Content::default(),
        }
    }

    const ID: Id = Id::from_bytes([9; 16]);
    const NEVER: u64 = u64::MAX;

    #[tokio::test]
    async fn a_verdict_that_cannot_be_saved_is_not_told_and_a_repeat_saves_it_without_the_app() {
        let world = World::new();
        // The disk is gone: neither appending nor writing anew is possible.
        world.journal.lock().unwrap().distrust();
        std::fs::remove_dir_all(world.directory.path()).unwrap();
        world.put(ID, NEVER);
        let taken = world.decided().await;
        assert!(
            taken.failed.is_some() && taken.decided.is_empty(),
            "{taken:?}"
        );
        assert_eq!(*world.shown.lock().unwrap(), [ID]);
        assert_eq!(
            world.desk.memory().seen(),
            [],
            "what is not on disk is not told"
        );
        assert!(!world.desk.memory().is_acknowledged_safely(&ID));

        // The disk is back, and the server repeats.
        std::fs::create_dir(world.directory.path()).unwrap();
        world.desk.begin_session();
        world.put(ID, NEVER);
        let taken = world.decided().await;
        assert_eq!(
            taken.decided.iter().map(|one| one.id).collect::<Vec<_>>(),
            [ID]
        );
        assert_eq!(*world.shown.lock().unwrap(), [ID], "the app saw it twice");
        let (_, memory, _) = Journal::open(world.directory.path(), true, 7).unwrap();
        assert_eq!(memory.given(&ID), Some(&Given::Acknowledged));
    }

    #[tokio::test]
    async fn what_is_withdrawn_while_it_waits_for_the_app_is_declined_and_never_shown() {
        let world = World::new();
        let other = Id::from_bytes([8; 16]);
        // The hand-over has not looked yet: nobody rang.
        world.desk.put(notify(ID), NEVER);
        // The app is told of both: it may have shown the other one in an earlier session.
        assert_eq!(world.desk.withdraw(vec![ID, other]), [ID, other]);
        world.desk.ring();
        let taken = world.decided().await;
        assert_eq!(taken.decided[0].given, Given::declined(WITHDRAWN));
        // A copy gets the same verdict.
        world.put(ID, NEVER);
        let taken = world.decided().await;
        assert_eq!(taken.decided[0].given, Given::declined(WITHDRAWN));
        assert!(world.shown.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn what_expires_while_it_waits_for_the_app_is_declined() {
        let world = World::new();
        world.put(ID, world.clock.now_ms());
        let taken = world.decided().await;
        assert_eq!(taken.decided[0].given, Given::declined(EXPIRED));
        assert!(world.shown.lock().unwrap().is_empty());
    }

    #[tokio::test]
    async fn nothing_is_written_once_the_directory_was_given_back() {
        let world = World::new();
        world.journal.lock().unwrap().release();
        world.put(ID, NEVER);
        assert!(world.decided().await.failed.is_some());
        let (_, memory, _) = Journal::open(world.directory.path(), true, 7).unwrap();
        assert_eq!(memory.given(&ID), None);
    }
}
