//! Pings to audiences: topics, everyone, long lists.
//!
//! Such a ping is accepted by one small record, whatever the size of its audience; [`super::expander`] brings it to the devices
//! afterwards, and the record says how far it has come. Who belongs to it was decided when it was accepted: everything that
//! joins, leaves or is accepted gets a [`Stamp`] under one lock, and the stamps are compared. A device that leaves a topic stays
//! in its list, marked, for as long as a ping of before that is on its way.
//!
//! Expansions of an app are brought one after the other, so that in every mailbox pings to audiences stand in the order of
//! their acceptance; apps take turns page by page.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot, watch};

use super::api::{ExpansionView, PingAnswer, PingError, RuntimeError};
use super::handle::Inner;
use super::locked;
use super::settings::{ESTIMATE_LOOK, EXPANSION_CHUNK, PAGES_AHEAD_IN_ALL, PAGES_IN_FLIGHT};
use super::shard::Had;
use crate::delivery::{AppId, CommitFailure, DeviceId, Hold, Notification, PingId, WireSlot};
use crate::ports::{
    Audience, Batch, Committed, Erased, ExpansionProgress, ExpansionRecord, IdempotencyRecord,
    Member, Op, OpenExpansion, ReadError, Stamp, Store,
};

/// Expansions read of the store at a time when the server starts.
const START_PAGE: usize = 64;

/// Where an expansion is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Its record is not safe yet.
    Opening,
    /// It is being brought to its devices, or waits for its turn.
    Open,
    /// It is being taken back: no further page.
    Stopping,
    /// It is done, or was taken back.
    Ended,
}

/// One ping on its way to an audience.
pub(super) struct Expansion {
    pub(super) stamp: Stamp,
    pub(super) audience: Audience,
    pub(super) estimate: u32,
    pub(super) notification: Arc<Notification>,
    /// The list of one that is never stored (TTL 0).
    pub(super) listed: Arc<[DeviceId]>,
    /// Some of the devices ahead may have got it already: an earlier run, or an earlier try, came as far.
    pub(super) repeats: AtomicBool,
    /// It ended because its record could not be made safe: nobody may be promised anything of it.
    failed: AtomicBool,
    /// Held while pages of it are on their way, and for the stop: nobody stops in the middle of a page.
    pub(super) alone: tokio::sync::Mutex<()>,
    phase: watch::Sender<Phase>,
    progress: Mutex<ExpansionProgress>,
    /// Devices of pages that are not noted which have it, or its outcome: they are not to be given it again. Files do not
    /// tell, because a row that was acknowledged in time never was in one, and its outcome may still wait to be written.
    pub(super) had: Had,
}

impl Expansion {
    /// One of an earlier run, as it is brought on by this one. `hold`: what its content in memory costs its app.
    pub(super) fn restored(
        open: OpenExpansion,
        hold: impl Fn(AppId, usize) -> Hold,
    ) -> Arc<Expansion> {
        let OpenExpansion { record, progress } = open;
        let stored = record.notification;
        let notification = Arc::new(Notification {
            content: stored.content.clone(),
            collapse: stored.collapse.clone(),
            wire: WireSlot::default(),
            hold: hold(stored.app, stored.content.len()),
            ..*stored
        });
        Arc::new(Expansion {
            stamp: record.stamp,
            audience: record.audience,
            estimate: record.estimate,
            notification,
            listed: Arc::from([]),
            repeats: AtomicBool::new(true),
            failed: AtomicBool::new(false),
            alone: tokio::sync::Mutex::default(),
            phase: watch::Sender::new(Phase::Open),
            progress: Mutex::new(progress),
            had: Had::default(),
        })
    }

    pub(super) fn app(&self) -> AppId {
        self.notification.app
    }

    pub(super) fn ping(&self) -> PingId {
        self.notification.ping
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(super) fn progress(&self) -> ExpansionProgress {
        *locked(&self.progress)
    }

    pub(super) fn advance(&self, progress: ExpansionProgress) {
        *locked(&self.progress) = progress;
    }

    /// Leaves out the devices that have it, or its outcome.
    pub(super) fn without_had(&self, devices: &mut Vec<DeviceId>) {
        let had = locked(&self.had);
        devices.retain(|device| !had.contains(device));
    }

    /// These were noted: nobody asks for them again.
    pub(super) fn forget_had(&self, devices: &[DeviceId]) {
        let mut had = locked(&self.had);
        for device in devices {
            had.remove(device);
        }
        if had.is_empty() {
            *had = HashSet::new();
        }
    }

    /// Whether it is kept on disk; TTL 0 never is.
    pub(super) fn is_stored(&self) -> bool {
        !self.notification.transient
    }

    /// Waits until it is in another phase than `from`.
    pub(super) async fn leaves(&self, from: Phase) {
        let mut phase = self.phase.subscribe();
        // The sender lives as long as this.
        let _ = phase.wait_for(|phase| *phase != from).await;
    }

    /// Waits until it is done or was taken back.
    pub(super) async fn ended(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|phase| *phase == Phase::Ended).await;
    }

    /// The chunks that are still stored.
    pub(super) fn chunks_left(&self) -> std::ops::Range<u32> {
        match self.audience {
            Audience::Listed { chunks, .. } if self.is_stored() => {
                self.progress().chunk.min(chunks)..chunks
            }
            Audience::Listed { .. } | Audience::Topic(_) | Audience::Everyone => 0..0,
        }
    }

    /// What ends it on disk.
    pub(super) fn drop_op(&self) -> Op {
        Op::DropExpansion {
            app: self.app(),
            stamp: self.stamp,
            chunks: self.chunks_left(),
        }
    }

    pub(super) fn view(&self) -> ExpansionView {
        let progress = self.progress();
        ExpansionView {
            estimate: self.estimate.max(progress.devices),
            done: progress.devices,
            unknown: progress.unknown,
        }
    }
}

/// All expansions that are not done, and the stamps.
pub(super) struct Audiences {
    registry: Mutex<Registry>,
    /// Pages on their way to the shards, until nothing but acknowledgements is waited for. Whoever waits longest is next, so apps take turns.
    pub(super) pages: Semaphore,
    /// Pages that the shards have and that are not settled.
    pub(super) ahead: Arc<Semaphore>,
    /// The server goes down: no further page.
    halted: watch::Sender<bool>,
    workers: AtomicUsize,
    /// Devices of one page.
    pub(super) page: usize,
}

#[derive(Default)]
struct Registry {
    run: u32,
    count: u64,
    apps: HashMap<AppId, Queue>,
    pings: HashMap<PingId, Arc<Expansion>>,
}

/// The expansions of one app, in the order of their acceptance.
#[derive(Default)]
struct Queue {
    expansions: VecDeque<Arc<Expansion>>,
    /// Somebody brings them.
    worked: bool,
}

impl Registry {
    fn stamp(&mut self) -> Stamp {
        self.count += 1;
        Stamp {
            run: self.run,
            count: self.count,
        }
    }
}

impl Audiences {
    /// Those that the store has, of a run with this number.
    pub(super) fn new(run: u32, page: usize, open: Vec<Arc<Expansion>>) -> Audiences {
        let mut registry = Registry {
            run,
            ..Registry::default()
        };
        for expansion in open {
            registry
                .pings
                .insert(expansion.ping(), Arc::clone(&expansion));
            let queue = registry.apps.entry(expansion.app()).or_default();
            queue.expansions.push_back(expansion);
        }
        Audiences {
            registry: Mutex::new(registry),
            pages: Semaphore::new(PAGES_IN_FLIGHT),
            ahead: Arc::new(Semaphore::new(PAGES_AHEAD_IN_ALL)),
            halted: watch::Sender::new(false),
            workers: AtomicUsize::new(0),
            page: page.max(1),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Registry> {
        locked(&self.registry)
    }

    /// A stamp for a device that comes into being.
    pub(super) fn stamp(&self) -> Stamp {
        self.lock().stamp()
    }

    /// A stamp for a change of memberships, and the expansions to each of these topics that began before and are open.
    pub(super) fn stamp_change(&self, app: AppId, topics: &[String]) -> (Stamp, Vec<Vec<Stamp>>) {
        let mut registry = self.lock();
        let stamp = registry.stamp();
        let open = topics
            .iter()
            .map(|topic| open_to(&registry, app, topic))
            .collect();
        (stamp, open)
    }

    /// The expansions to a topic that are open.
    pub(super) fn open_to(&self, app: AppId, topic: &str) -> Vec<Stamp> {
        open_to(&self.lock(), app, topic)
    }

    /// An expansion that is not done.
    pub(super) fn get(&self, app: AppId, ping: PingId) -> Option<Arc<Expansion>> {
        let found = self.lock().pings.get(&ping).cloned();
        found.filter(|expansion| expansion.app() == app)
    }

    /// How many are not done, and when the oldest of them was accepted, Unix milliseconds.
    pub(super) fn open(&self) -> (u64, Option<u64>) {
        let registry = self.lock();
        let oldest = registry
            .apps
            .values()
            .filter_map(|queue| queue.expansions.front())
            .map(|expansion| expansion.notification.accepted_ms)
            .min();
        (registry.pings.len() as u64, oldest)
    }

    /// Those of an app that are not done.
    fn open_of(registry: &Registry, app: AppId) -> usize {
        registry
            .apps
            .get(&app)
            .map_or(0, |queue| queue.expansions.len())
    }

    /// How many wait behind the one of this app that is being brought.
    pub(super) fn behind(&self, app: AppId) -> usize {
        Audiences::open_of(&self.lock(), app).saturating_sub(1)
    }

    /// Gives the ping its stamp and its place behind the others of its app.
    fn begin(
        &self,
        limit: u32,
        make: impl FnOnce(Stamp) -> Expansion,
    ) -> Result<Arc<Expansion>, PingError> {
        let mut registry = self.lock();
        let stamp = registry.stamp();
        let expansion = Arc::new(make(stamp));
        let app = expansion.app();
        if Audiences::open_of(&registry, app) >= limit as usize {
            return Err(PingError::TooManyExpansions { limit });
        }
        registry
            .pings
            .insert(expansion.ping(), Arc::clone(&expansion));
        let queue = registry.apps.entry(app).or_default();
        queue.expansions.push_back(Arc::clone(&expansion));
        Ok(expansion)
    }

    /// It is done, was taken back, or never became safe.
    pub(super) fn end(&self, expansion: &Expansion) {
        let mut registry = self.lock();
        registry.pings.remove(&expansion.ping());
        if let Some(queue) = registry.apps.get_mut(&expansion.app()) {
            queue
                .expansions
                .retain(|open| open.stamp != expansion.stamp);
        }
        drop(registry);
        expansion.phase.send_replace(Phase::Ended);
    }

    /// Apps with expansions that nobody brings; from now on the caller does.
    fn unworked(&self) -> Vec<AppId> {
        let mut registry = self.lock();
        let mut apps = Vec::new();
        for (app, queue) in &mut registry.apps {
            if !queue.worked && !queue.expansions.is_empty() {
                queue.worked = true;
                apps.push(*app);
            }
        }
        self.workers.fetch_add(apps.len(), Ordering::SeqCst);
        apps
    }

    /// The expansion of an app that is next; `None`: there is none, and its worker ends.
    pub(super) fn next(&self, app: AppId) -> Option<Arc<Expansion>> {
        let mut registry = self.lock();
        let queue = registry.apps.get_mut(&app)?;
        let next = queue.expansions.front().cloned();
        if next.is_none() {
            registry.apps.remove(&app);
        }
        next
    }

    /// A worker has ended.
    pub(super) fn worker_ended(&self) {
        self.workers.fetch_sub(1, Ordering::SeqCst);
    }

    /// No further page from now on.
    pub(super) fn halt(&self) {
        self.halted.send_replace(true);
    }

    pub(super) fn is_halted(&self) -> bool {
        *self.halted.borrow()
    }

    /// Waits for [`Audiences::halt`].
    pub(super) async fn is_to_halt(&self) {
        let mut halted = self.halted.subscribe();
        // The sender lives as long as this.
        let _ = halted.wait_for(|halted| *halted).await;
    }

    /// Whether nobody brings anything any more.
    pub(super) fn is_quiet(&self) -> bool {
        self.workers.load(Ordering::SeqCst) == 0
    }
}

fn open_to(registry: &Registry, app: AppId, topic: &str) -> Vec<Stamp> {
    registry
        .apps
        .get(&app)
        .into_iter()
        .flat_map(|queue| &queue.expansions)
        .filter(|open| matches!(&open.audience, Audience::Topic(name) if name == topic))
        .map(|open| open.stamp)
        .collect()
}

/// What the store has of expansions that are not done.
pub(super) fn read_open(store: &dyn Store) -> Result<Vec<OpenExpansion>, ReadError> {
    let mut all = Vec::new();
    let mut after = None;
    loop {
        let page = store.expansions(after, START_PAGE)?;
        all.extend(page.items);
        after = page.next;
        if after.is_none() {
            return Ok(all);
        }
    }
}

/// About how many devices an audience has, from the first of its members. Ids are random, so the part of all possible ids
/// up to the last one that was looked at tells the part of the members that were.
fn estimate(members: &[Member], more: bool) -> u32 {
    let open = members
        .iter()
        .filter(|member| member.spans.iter().any(|span| span.left.is_none()))
        .count() as u128;
    let count = match members.last() {
        Some(last) if more => {
            let mut first = [0; 8];
            first.copy_from_slice(&last.device.0[..8]);
            (open << 64) / (u128::from(u64::from_be_bytes(first)) + 1)
        }
        Some(_) | None => open,
    };
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A ping to an audience, checked, and what it promises.
pub(super) struct ToAudience {
    pub(super) notification: Arc<Notification>,
    pub(super) audience: Audience,
    /// The devices of a list, by rising id.
    pub(super) listed: Arc<[DeviceId]>,
    pub(super) ttl_s: u64,
    /// The idempotency key that made it, written with it: its hash, the hash of the body, and when.
    pub(super) key: Option<([u8; 32], [u8; 32], u64)>,
    /// Expansions that the app may have open.
    pub(super) limit: u32,
}

impl Inner {
    /// Accepts a ping to an audience: answered when it is safe that it will be brought to all of it.
    pub(super) async fn publish_to_audience(
        self: &Arc<Inner>,
        to: ToAudience,
    ) -> Result<PingAnswer, PingError> {
        if self.draining() {
            return Err(RuntimeError::Draining.into());
        }
        let (app, ping) = (to.notification.app, to.notification.ping);
        let answer = |devices| PingAnswer {
            id: ping,
            devices,
            ttl_s: to.ttl_s,
            rejected: Vec::new(),
            outcomes: Vec::new(),
        };
        if let Some(open) = self.audiences.get(app, ping) {
            // Somebody who comes again is promised nothing before it is safe.
            let opening = async {
                open.leaves(Phase::Opening).await;
                Ok(())
            };
            self.in_time(opening).await?;
            if !open.failed.load(Ordering::Relaxed) {
                return Ok(answer(open.estimate));
            }
        }
        let stored = !to.notification.transient;
        if stored
            && matches!(
                self.shared.store.health(),
                crate::ports::StoreHealth::Full { .. }
            )
        {
            return Err(RuntimeError::NoRoom.into());
        }
        let devices = match &to.audience {
            Audience::Listed { devices, .. } => *devices,
            audience @ (Audience::Topic(_) | Audience::Everyone) => {
                let audience = audience.clone();
                let read = move |store: &dyn Store| {
                    let page = store.members(app, &audience, None, ESTIMATE_LOOK)?;
                    Ok(estimate(&page.items, page.next.is_some()))
                };
                self.in_time(self.shared.reading.read(read)).await?
            }
        };
        let ToAudience {
            notification,
            audience,
            listed,
            key,
            limit,
            ttl_s,
        } = to;
        let accepted_ms = notification.accepted_ms;
        let kept = if stored {
            Arc::from([])
        } else {
            Arc::clone(&listed)
        };
        let expansion = self.audiences.begin(limit, |stamp| Expansion {
            stamp,
            audience,
            estimate: devices,
            notification,
            listed: kept,
            repeats: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            alone: tokio::sync::Mutex::default(),
            phase: watch::Sender::new(Phase::Opening),
            progress: Mutex::default(),
            had: Had::default(),
        })?;
        // Known from now on, also before the first device has it, and if there is none.
        self.shared.ledger.open(app, ping, accepted_ms);
        if stored {
            let mut batch: Batch = vec![Op::PutExpansion(ExpansionRecord {
                stamp: expansion.stamp,
                audience: expansion.audience.clone(),
                estimate: expansion.estimate,
                notification: Arc::clone(&expansion.notification),
            })];
            for (number, devices) in (0..).zip(listed.chunks(EXPANSION_CHUNK)) {
                batch.push(Op::PutChunk {
                    app,
                    stamp: expansion.stamp,
                    number,
                    devices: devices.into(),
                });
            }
            batch.extend(key.map(|(key_hash, body_hash, at_ms)| {
                Op::PutIdempotency(IdempotencyRecord {
                    app,
                    key_hash,
                    body_hash,
                    ping,
                    devices,
                    ttl_s,
                    at_ms,
                })
            }));
            drop(listed);
            let inner = Arc::clone(self);
            // To its end even if the caller goes away or has waited long enough: its place is not to stay open.
            self.to_the_end(async move {
                let result = inner.commit_one(batch).await;
                inner.opened(&expansion, result);
                result.map_err(commit_error)
            })
            .await?;
        } else {
            self.opened(&expansion, Ok(()));
        }
        Ok(answer(devices))
    }

    fn opened(self: &Arc<Inner>, expansion: &Arc<Expansion>, result: Committed) {
        match result {
            Ok(()) => {
                expansion.phase.send_if_modified(|phase| {
                    let opens = *phase == Phase::Opening;
                    if opens {
                        *phase = Phase::Open;
                    }
                    opens
                });
                self.bring_on();
            }
            Err(_) => {
                expansion.failed.store(true, Ordering::Relaxed);
                self.audiences.end(expansion);
            }
        }
    }

    /// Starts a worker for every app that has expansions and none.
    pub(super) fn bring_on(self: &Arc<Inner>) {
        for app in self.audiences.unworked() {
            let inner = Arc::clone(self);
            self.tasks.spawn(async move { inner.bring_all(app).await });
        }
    }

    /// Commits a batch that stands alone, however long it takes.
    pub(super) async fn commit_one(&self, batch: Batch) -> Committed {
        let (answer, answered) = oneshot::channel();
        self.shared
            .store
            .commit(batch, Box::new(move |result| super::reply(answer, result)));
        answered.await.unwrap_or(Err(CommitFailure::Failed))
    }

    /// Takes an expansion back: when this is answered, no further device is addressed, after a crash or a restore neither.
    /// `false`: none is open for this ping.
    pub(super) async fn stop_expansion(
        self: &Arc<Inner>,
        app: AppId,
        ping: PingId,
    ) -> Result<bool, RuntimeError> {
        let Some(expansion) = self.audiences.get(app, ping) else {
            return Ok(false);
        };
        let inner = Arc::clone(self);
        self.to_the_end(async move {
            tokio::select! {
                () = expansion.leaves(Phase::Opening) => {}
                () = inner.audiences.is_to_halt() => return Err(RuntimeError::Draining),
            }
            expansion.phase.send_if_modified(|phase| {
                let open = *phase == Phase::Open;
                if open {
                    *phase = Phase::Stopping;
                }
                open
            });
            // The page under way ends first: what it makes is found by whoever revokes after this.
            let _alone = expansion.alone.lock().await;
            if expansion.phase() == Phase::Ended {
                return Ok(true);
            }
            if expansion.is_stored() {
                let erased = inner.erased_until(
                    app,
                    Erased::Expansion(ping),
                    expansion.notification.expires_ms,
                );
                let batch = vec![expansion.drop_op(), erased];
                if let Err(failure) = inner.commit_one(batch).await {
                    // It goes on: nobody was promised that it does not.
                    expansion.phase.send_replace(Phase::Open);
                    return Err(commit_error(failure));
                }
            }
            inner.audiences.end(&expansion);
            tracing::info!(%ping, done = expansion.progress().devices, "a ping to an audience was taken back on its way");
            Ok(true)
        })
        .await
    }

    /// Waits until a ping that is on its way to an audience has reached all of it, or the time is over. Answers what is left
    /// of the time.
    pub(super) async fn brought(&self, app: AppId, ping: PingId, wait: Duration) -> Duration {
        let Some(expansion) = self.audiences.get(app, ping) else {
            return wait;
        };
        let begun = self.shared.clock.now().mono;
        // Either way, what is known is read afterwards.
        let ended = self.parted.run_until_cancelled(expansion.ended());
        let _ = tokio::time::timeout(wait, ended).await;
        wait.saturating_sub(self.shared.clock.now().mono - begun)
    }
}

/// What a failed commit means to whoever asked.
pub(super) fn commit_error(failure: CommitFailure) -> RuntimeError {
    match failure {
        CommitFailure::NoRoom => RuntimeError::NoRoom,
        CommitFailure::Failed => RuntimeError::StoreUnavailable,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::ports::{Span, Spans};

    fn member(first: u64, left: bool) -> Member {
        let mut device = [0; 16];
        device[..8].copy_from_slice(&first.to_be_bytes());
        let stamp = Stamp { run: 1, count: 1 };
        Member {
            device: DeviceId(device),
            spans: Spans::from_buf([Span {
                joined: stamp,
                left: left.then_some(stamp),
            }]),
        }
    }

    #[test]
    fn an_audience_that_was_looked_at_in_full_is_counted() {
        let members = [member(1, false), member(2, true), member(3, false)];
        assert_eq!(estimate(&members, false), 2);
        assert_eq!(estimate(&[], false), 0);
    }

    #[test]
    fn a_larger_audience_is_estimated_by_how_far_its_first_members_reach() {
        // 1,000 members within the first hundredth of all ids.
        let step = u64::MAX / 100_000;
        let members: Vec<Member> = (1..=1_000).map(|n| member(n * step, false)).collect();
        let estimated = estimate(&members, true);
        assert!((99_000..=101_000).contains(&estimated), "{estimated}");
        assert_eq!(estimate(&[member(0, false)], true), u32::MAX);
    }
}
