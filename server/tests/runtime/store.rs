//! A store in memory that does what it is told: commit at once, hold everything, refuse, break.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_server::delivery::{
    AppId, Body, Change, CommitFailure, DeviceId, Hold, MailboxRead, MailboxView, Notification,
    Outcome, PingId, RowKey, RowMeta, StoredMailbox, Summary, WireSlot, Withdrawal,
};
use bellwire_server::ports::{
    AppRecord, Audience, BackupError, BackupSummary, BackupWatch, Batch, CallbackRecord, Committed,
    DeadLetter, DeviceFilter, DeviceRecord, ExpansionProgress, ExpansionRecord, ExpiredRow,
    ExpiryCursor, Grant, IdempotencyRecord, KeyRecord, Member, Membership, Op, OpenExpansion,
    OutcomeEvent, OutcomeEvents, OutcomeFollow, OutcomeFollower, OutcomeOrder, OutcomePage,
    OutcomePosition, OutcomeQuery, OutcomeRecord, Page, PairState, ReadError, Seen, SourceId, Span,
    Spans, Stamp, Store, StoreHealth, StoreStats,
};

/// What the store does with a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Mode {
    #[default]
    Commit,
    /// Keep it until [`FakeStore::set_mode`] says otherwise.
    Hold,
    NoRoom,
    Fail,
}

type GrantFn = Arc<dyn Fn(Grant) + Send + Sync>;
type DoneFn = Box<dyn FnOnce(Committed) + Send>;

/// What survives a restart.
#[derive(Default)]
pub(crate) struct Disk {
    pub(crate) apps: Vec<AppRecord>,
    pub(crate) devices: BTreeMap<DeviceId, DeviceRecord>,
    pub(crate) seen: HashMap<DeviceId, Seen>,
    pub(crate) keys: HashMap<[u8; 10], KeyRecord>,
    pub(crate) idempotency: HashMap<(AppId, [u8; 32]), IdempotencyRecord>,
    pub(crate) callbacks: BTreeMap<AppId, CallbackRecord>,
    pub(crate) letters: BTreeMap<(AppId, u64), DeadLetter>,
    pub(crate) summaries: HashMap<DeviceId, Summary>,
    pub(crate) rows: BTreeMap<(DeviceId, u64), (RowMeta, Arc<Notification>)>,
    pub(crate) outcomes: BTreeMap<(PingId, DeviceId), (AppId, Outcome, u64)>,
    pub(crate) withdrawals: BTreeMap<(DeviceId, PingId), u64>,
    /// Looks at the history fail.
    pub(crate) history_fails: bool,
    /// Looks at the history find nothing yet.
    pub(crate) history_late: bool,
    pub(crate) joined: BTreeMap<(AppId, DeviceId), Stamp>,
    pub(crate) topics: HashMap<DeviceId, Vec<Membership>>,
    pub(crate) members: BTreeMap<(AppId, String, DeviceId), Spans>,
    pub(crate) expansions: BTreeMap<(AppId, Stamp), (ExpansionRecord, ExpansionProgress)>,
    pub(crate) chunks: BTreeMap<(AppId, Stamp, u32), Vec<DeviceId>>,
    run: u32,
}

impl Disk {
    fn apply(&mut self, batch: Batch) {
        for op in batch {
            match op {
                Op::Mailbox(change) => self.change(change),
                Op::PutApp(app) => self.apps.push(app),
                Op::PutDevice { record, fresh, .. } => {
                    if fresh {
                        self.summaries.insert(record.id, Summary::new(record.app));
                    }
                    self.devices.insert(record.id, record);
                }
                Op::DropDevice(record) => {
                    self.devices.remove(&record.id);
                    self.joined.remove(&(record.app, record.id));
                    self.seen.remove(&record.id);
                }
                Op::PutSeen(device, seen) => drop(self.seen.insert(device, seen)),
                Op::PutJoined(app, device, stamp) => {
                    self.joined.insert((app, device), stamp);
                }
                Op::PutTopics(change) => {
                    if change.topics.is_empty() {
                        self.topics.remove(&change.device);
                    } else {
                        self.topics.insert(change.device, change.topics);
                    }
                    for (topic, spans) in change.places {
                        let place = (change.app, topic, change.device);
                        if spans.is_empty() {
                            self.members.remove(&place);
                        } else {
                            self.members.insert(place, spans);
                        }
                    }
                }
                Op::PutExpansion(record) => {
                    let record = ExpansionRecord {
                        notification: written(&record.notification),
                        ..record
                    };
                    let key = (record.notification.app, record.stamp);
                    self.expansions
                        .insert(key, (record, ExpansionProgress::default()));
                }
                Op::PutChunk {
                    app,
                    stamp,
                    number,
                    devices,
                } => drop(self.chunks.insert((app, stamp, number), devices.to_vec())),
                Op::PutProgress {
                    app,
                    stamp,
                    progress,
                    done,
                } => {
                    if let Some(expansion) = self.expansions.get_mut(&(app, stamp)) {
                        expansion.1 = progress;
                    }
                    self.chunks
                        .retain(|key, _| (key.0, key.1) != (app, stamp) || !done.contains(&key.2));
                }
                Op::DropExpansion { app, stamp, chunks } => {
                    self.expansions.remove(&(app, stamp));
                    self.chunks.retain(|key, _| {
                        (key.0, key.1) != (app, stamp) || !chunks.contains(&key.2)
                    });
                }
                Op::PutKey(key) => drop(self.keys.insert(key.id, key)),
                Op::DropKey(_, id) => drop(self.keys.remove(&id)),
                Op::PutCallback(callback) => drop(self.callbacks.insert(callback.app, callback)),
                Op::DropCallback(app) => drop(self.callbacks.remove(&app)),
                Op::PutDeadLetter(letter) => {
                    self.letters.insert((letter.app, letter.number), letter);
                }
                Op::DropDeadLetter(app, number) => drop(self.letters.remove(&(app, number))),
                // Only restores look at them.
                Op::Erase(_) => {}
                Op::PutWithdrawal {
                    device, withdrawal, ..
                } => {
                    self.withdrawals
                        .insert((device, withdrawal.ping), withdrawal.until_ms);
                }
                Op::DropWithdrawal { device, withdrawal } => {
                    self.withdrawals.remove(&(device, withdrawal.ping));
                }
                Op::PutOutcome(record) => {
                    self.outcomes.insert(
                        (record.ping, record.device),
                        (record.app, record.outcome, record.at_ms),
                    );
                }
                Op::PutIdempotency(record) => {
                    self.idempotency
                        .insert((record.app, record.key_hash), record);
                }
            }
        }
    }

    fn withdrawals(&self, device: DeviceId) -> Vec<Withdrawal> {
        let all = (device, PingId([0; 16]))..=(device, PingId([u8::MAX; 16]));
        let mut found: Vec<Withdrawal> = self
            .withdrawals
            .range(all)
            .map(|(&(_, ping), &until_ms)| Withdrawal { ping, until_ms })
            .collect();
        found.sort_by_key(|one| one.until_ms);
        found
    }

    fn change(&mut self, change: Change) {
        match change {
            Change::Insert {
                device,
                order,
                run,
                notification,
            } => {
                let meta = RowMeta {
                    key: RowKey {
                        urgency: notification.urgency,
                        order,
                    },
                    ping: notification.ping,
                    size: notification.size,
                    expires_ms: notification.expires_ms,
                    collapse: notification.collapse.clone(),
                    run,
                    shared: notification.shared,
                };
                self.rows
                    .insert((device, order), (meta, written(&notification)));
            }
            Change::Remove {
                app,
                device,
                row,
                outcome,
                at_ms,
            } => {
                self.rows.remove(&(device, row.key.order));
                self.outcomes
                    .insert((row.ping, device), (app, outcome, at_ms));
            }
            Change::Summary { device, summary } => drop(self.summaries.insert(device, summary)),
            Change::Forget { device } => drop(self.summaries.remove(&device)),
            Change::Cleared { .. } => {}
            Change::Outcome {
                app,
                device,
                ping,
                outcome,
                at_ms,
                ..
            } => {
                self.outcomes.insert((ping, device), (app, outcome, at_ms));
            }
            Change::Withdraw {
                device, withdrawal, ..
            } => {
                self.withdrawals
                    .insert((device, withdrawal.ping), withdrawal.until_ms);
            }
        }
    }
}

/// What comes back from a disk: the same words, but nothing of the process that wrote them.
fn written(notification: &Notification) -> Arc<Notification> {
    Arc::new(Notification {
        ping: notification.ping,
        app: notification.app,
        accepted_ms: notification.accepted_ms,
        expires_ms: notification.expires_ms,
        urgency: notification.urgency,
        collapse: notification.collapse.clone(),
        size: notification.size,
        transient: notification.transient,
        shared: notification.shared,
        content: notification.content.clone(),
        wire: WireSlot::default(),
        hold: Hold::default(),
    })
}

#[derive(Default)]
struct State {
    disk: Disk,
    mode: Mode,
    sources: Vec<GrantFn>,
    held: Vec<(Option<usize>, Batch, Option<DoneFn>)>,
    riding: Batch,
    frames: u64,
    asked: u64,
    closed: bool,
    device_reads: u64,
    user_reads: u64,
    member_reads: u64,
    crowded: bool,
    history: Vec<OutcomeRecord>,
    follower: Option<OutcomeFollower>,
}

#[derive(Default)]
pub(crate) struct FakeStore(Mutex<State>, Held, Held);

/// Reads that are let wait: those of mailboxes and of users' devices, and those of events.
#[derive(Default)]
struct Held {
    hold: AtomicBool,
    waiting: AtomicU64,
    passed: AtomicU64,
}

impl Held {
    fn pass(&self) {
        self.waiting.fetch_add(1, Ordering::SeqCst);
        while self.hold.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.passed.fetch_add(1, Ordering::SeqCst);
    }
}

impl FakeStore {
    /// Whether somebody wants to be told of outcomes.
    #[allow(dead_code, reason = "not every test binary that shares this file asks")]
    pub(crate) fn is_followed(&self) -> bool {
        self.0.lock().unwrap().follower.is_some()
    }

    /// What a process that starts after a kill finds.
    pub(crate) fn restarted(&self) -> Arc<FakeStore> {
        let mut state = self.0.lock().unwrap();
        let mut disk = std::mem::take(&mut state.disk);
        disk.run += 1;
        let state = State {
            disk,
            ..State::default()
        };
        Arc::new(FakeStore(
            Mutex::new(state),
            Held::default(),
            Held::default(),
        ))
    }

    pub(crate) fn set_mode(&self, mode: Mode) {
        let held = {
            let mut state = self.0.lock().unwrap();
            state.mode = mode;
            if mode == Mode::Hold {
                return;
            }
            std::mem::take(&mut state.held)
        };
        for (source, batch, done) in held {
            self.write(source, batch, done);
        }
    }

    /// Lets reads of mailboxes and of users' devices wait until it is told otherwise.
    pub(crate) fn hold_reads(&self, hold: bool) {
        self.1.hold.store(hold, Ordering::SeqCst);
    }

    pub(crate) fn reads_held(&self) -> u64 {
        self.1.waiting.load(Ordering::SeqCst)
    }

    /// The same for reads of events.
    #[allow(
        dead_code,
        reason = "for the tests over HTTP, which have this file as well"
    )]
    pub(crate) fn hold_events(&self, hold: bool) {
        self.2.hold.store(hold, Ordering::SeqCst);
    }

    #[allow(
        dead_code,
        reason = "for the tests over HTTP, which have this file as well"
    )]
    pub(crate) fn events_held(&self) -> u64 {
        self.2.waiting.load(Ordering::SeqCst)
    }

    /// How often events were read.
    #[allow(
        dead_code,
        reason = "for the tests over HTTP, which have this file as well"
    )]
    pub(crate) fn event_reads(&self) -> u64 {
        self.2.passed.load(Ordering::SeqCst)
    }

    /// Whose outcomes of a ping were recorded, each time that one was.
    #[allow(dead_code, reason = "not every test binary that shares this file asks")]
    pub(crate) fn ended(&self, ping: PingId) -> Vec<DeviceId> {
        let state = self.0.lock().unwrap();
        let of_it = state.history.iter().filter(|record| record.ping == ping);
        of_it.map(|record| record.device).collect()
    }

    pub(crate) fn disk<T>(&self, look: impl FnOnce(&mut Disk) -> T) -> T {
        look(&mut self.0.lock().unwrap().disk)
    }

    pub(crate) fn held(&self) -> usize {
        self.0.lock().unwrap().held.len()
    }

    pub(crate) fn closed(&self) -> bool {
        self.0.lock().unwrap().closed
    }

    pub(crate) fn device_reads(&self) -> u64 {
        self.0.lock().unwrap().device_reads
    }

    pub(crate) fn member_reads(&self) -> u64 {
        self.0.lock().unwrap().member_reads
    }

    /// Whether the engine is behind by half of what it may be.
    pub(crate) fn set_crowded(&self, crowded: bool) {
        self.0.lock().unwrap().crowded = crowded;
    }

    pub(crate) fn user_reads(&self) -> u64 {
        self.0.lock().unwrap().user_reads
    }

    fn write(&self, source: Option<usize>, batch: Batch, done: Option<DoneFn>) {
        let (result, grant) = {
            let mut state = self.0.lock().unwrap();
            let result = match state.mode {
                Mode::Commit if !state.closed => {
                    let riding = std::mem::take(&mut state.riding);
                    state.disk.apply(riding);
                    state.disk.apply(batch);
                    state.frames += 1;
                    Ok(())
                }
                Mode::Hold => {
                    state.held.push((source, batch, done));
                    return;
                }
                Mode::NoRoom => Err(CommitFailure::NoRoom),
                Mode::Fail | Mode::Commit => Err(CommitFailure::Failed),
            };
            let grant = source.map(|source| Arc::clone(&state.sources[source]));
            (result, grant)
        };
        if let Some(grant) = grant {
            grant(Grant::Committed(result));
        }
        if let Some(done) = done {
            done(result);
        }
    }
}

impl Store for FakeStore {
    fn register(&self, grant: Box<dyn Fn(Grant) + Send + Sync>) -> SourceId {
        let mut state = self.0.lock().unwrap();
        state.sources.push(Arc::from(grant));
        SourceId(state.sources.len() - 1)
    }

    fn want(&self, source: SourceId) -> bool {
        let grant = {
            let mut state = self.0.lock().unwrap();
            state.asked += 1;
            // Every other time the place comes later, as from a real committer.
            if state.asked.is_multiple_of(2) {
                return true;
            }
            Arc::clone(&state.sources[source.0])
        };
        grant(Grant::Ready);
        false
    }

    fn submit(&self, source: SourceId, batch: Batch) {
        self.write(Some(source.0), batch, None);
    }

    fn commit(&self, batch: Batch, done: DoneFn) {
        self.write(None, batch, Some(done));
    }

    fn ride_along(&self, op: Op) {
        self.0.lock().unwrap().riding.push(op);
    }

    fn read_mailbox(&self, request: &MailboxRead) -> Result<MailboxView, ReadError> {
        self.1.pass();
        // More than was asked for is allowed by no contract, but everything is: it says so.
        let state = self.0.lock().unwrap();
        let mut rows: Vec<RowMeta> = state
            .disk
            .rows
            .range((request.device, 0)..=(request.device, u64::MAX))
            .map(|(_, (meta, _))| meta.clone())
            .collect();
        rows.sort_by_key(|row| row.key.order);
        Ok(MailboxView {
            summary: state.disk.summaries.get(&request.device).copied(),
            rows,
            complete: true,
            withdrawals: request
                .withdrawals
                .then(|| state.disk.withdrawals(request.device)),
        })
    }

    fn read_bodies(&self, device: DeviceId, rows: &[RowKey]) -> Result<Vec<Body>, ReadError> {
        let state = self.0.lock().unwrap();
        Ok(rows
            .iter()
            .map(|&key| {
                let found = state.disk.rows.get(&(device, key.order));
                (key, found.map(|(_, body)| Arc::clone(body)))
            })
            .collect())
    }

    fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError> {
        Ok(self.0.lock().unwrap().disk.withdrawals(device))
    }

    fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError> {
        let state = self.0.lock().unwrap();
        let mut pairs = BTreeMap::new();
        for ((device, _), (meta, body)) in &state.disk.rows {
            if meta.ping == ping {
                let expires_ms = meta.expires_ms;
                pairs.insert(*device, (body.app, PairState::Waiting { expires_ms }));
            }
        }
        for ((of, device), &(app, outcome, at_ms)) in &state.disk.outcomes {
            if *of == ping {
                pairs.insert(*device, (app, PairState::Ended { outcome, at_ms }));
            }
        }
        let mut items: Vec<_> = pairs
            .into_iter()
            .filter(|(device, _)| after.is_none_or(|after| *device > after))
            .map(|(device, (app, pair))| (app, device, pair))
            .collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().map(|item| item.1).filter(|_| more);
        Ok(Page { items, next })
    }

    fn record_outcomes(&self, records: &mut Vec<OutcomeRecord>) {
        let mut state = self.0.lock().unwrap();
        state.history.append(records);
        let follower = state.follower.clone();
        drop(state);
        if let Some(follower) = follower {
            follower();
        }
    }

    fn outcomes_end(&self) -> OutcomePosition {
        OutcomePosition(self.0.lock().unwrap().history.len() as u64)
    }

    fn outcome_events(&self, follow: &OutcomeFollow) -> Result<OutcomeEvents, ReadError> {
        self.2.pass();
        let state = self.0.lock().unwrap();
        let all = (1..).zip(&state.history).skip(follow.from.0 as usize);
        let events = all.filter(|(_, record)| follow.wants(record));
        let items: Vec<(OutcomePosition, OutcomeEvent)> = events
            .map(|(next, record)| (OutcomePosition(next), OutcomeEvent::Ended(*record)))
            .take(follow.limit)
            .collect();
        let more = items.len() == follow.limit;
        Ok(OutcomeEvents {
            next: match items.last() {
                Some(last) if more => last.0,
                _ => OutcomePosition(state.history.len() as u64),
            },
            items,
            more,
        })
    }

    fn follow_outcomes(&self, follower: Option<OutcomeFollower>) {
        self.0.lock().unwrap().follower = follower;
    }

    fn outcomes(&self, query: &OutcomeQuery) -> Result<OutcomePage, ReadError> {
        let state = self.0.lock().unwrap();
        let mut all: Vec<(u64, OutcomeRecord)> = (0..).zip(state.history.iter().copied()).collect();
        if query.order == OutcomeOrder::NewestFirst {
            all.reverse();
        }
        let mut page = OutcomePage::default();
        for (position, record) in all {
            let begun = query.start.is_none_or(|start| match query.order {
                OutcomeOrder::NewestFirst => position <= start.0,
                OutcomeOrder::OldestFirst => position >= start.0,
            });
            let devices = query.devices.as_ref();
            if !begun
                || record.app != query.app
                || !(query.from_ms..query.to_ms).contains(&record.at_ms)
                || query
                    .outcome
                    .is_some_and(|outcome| outcome != record.outcome)
                || devices.is_some_and(|devices| !devices.contains(&record.device))
            {
                continue;
            }
            if page.items.len() == query.limit {
                page.next = Some(OutcomePosition(position));
                break;
            }
            page.items.push(record);
        }
        Ok(page)
    }

    fn outcomes_of_ping(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Vec<OutcomeRecord>, ReadError> {
        let state = self.0.lock().unwrap();
        if state.disk.history_fails {
            return Err(ReadError::Engine("the history cannot be read".to_owned()));
        }
        let mut known = BTreeMap::new();
        if state.disk.history_late {
            return Ok(Vec::new());
        }
        for record in &state.history {
            if (record.app, record.ping) == (app, ping)
                && after.is_none_or(|after| record.device > after)
            {
                known.entry(record.device).or_insert(*record);
            }
        }
        Ok(known.into_values().take(limit).collect())
    }

    fn expired(
        &self,
        until_ms: u64,
        _after: &ExpiryCursor,
        limit: usize,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError> {
        let state = self.0.lock().unwrap();
        let items = state
            .disk
            .rows
            .iter()
            .filter(|(_, (meta, _))| meta.expires_ms <= until_ms)
            .take(limit)
            .map(|((device, _), (meta, _))| ExpiredRow {
                device: *device,
                key: meta.key,
                expires_ms: meta.expires_ms,
            })
            .collect();
        Ok(Page { items, next: None })
    }

    fn drop_receipts(&self, before_ms: u64, limit: usize) -> Result<usize, ReadError> {
        let mut state = self.0.lock().unwrap();
        let old: Vec<_> = state
            .disk
            .outcomes
            .iter()
            .filter(|(_, (_, _, at_ms))| *at_ms < before_ms)
            .map(|(key, _)| *key)
            .take(limit)
            .collect();
        for key in &old {
            state.disk.outcomes.remove(key);
        }
        Ok(old.len())
    }

    fn device(&self, id: DeviceId) -> Result<Option<DeviceRecord>, ReadError> {
        let mut state = self.0.lock().unwrap();
        state.device_reads += 1;
        Ok(state.disk.devices.get(&id).cloned())
    }

    fn devices(
        &self,
        app: AppId,
        filter: &DeviceFilter,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceRecord, DeviceId>, ReadError> {
        let state = self.0.lock().unwrap();
        let mut items: Vec<DeviceRecord> = state
            .disk
            .devices
            .values()
            .filter(|record| record.app == app)
            .filter(|record| filter.user.as_ref().is_none_or(|user| *user == record.user))
            .filter(|record| {
                filter.topic.as_ref().is_none_or(|topic| {
                    let of = state.disk.topics.get(&record.id);
                    of.is_some_and(|of| of.iter().any(|was| was.topic == *topic))
                })
            })
            .filter(|record| after.is_none_or(|after| record.id > after))
            .take(limit + 1)
            .cloned()
            .collect();
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().map(|item| item.id).filter(|_| more);
        Ok(Page { items, next })
    }

    fn user_devices(
        &self,
        app: AppId,
        user: &str,
        limit: usize,
    ) -> Result<Vec<DeviceId>, ReadError> {
        self.1.pass();
        let mut state = self.0.lock().unwrap();
        state.user_reads += 1;
        Ok(state
            .disk
            .devices
            .values()
            .filter(|record| record.app == app && record.user == user)
            .map(|record| record.id)
            .take(limit)
            .collect())
    }

    fn seen(&self, devices: &[DeviceId]) -> Result<Vec<Option<Seen>>, ReadError> {
        let state = self.0.lock().unwrap();
        Ok(devices
            .iter()
            .map(|device| state.disk.seen.get(device).cloned())
            .collect())
    }

    fn topics(&self, device: DeviceId) -> Result<Vec<Membership>, ReadError> {
        let state = self.0.lock().unwrap();
        Ok(state.disk.topics.get(&device).cloned().unwrap_or_default())
    }

    fn spans(
        &self,
        app: AppId,
        device: DeviceId,
        topics: &[String],
    ) -> Result<Vec<Spans>, ReadError> {
        let state = self.0.lock().unwrap();
        let place = |topic: &String| state.disk.members.get(&(app, topic.clone(), device));
        Ok(topics
            .iter()
            .map(|topic| place(topic).cloned().unwrap_or_default())
            .collect())
    }

    fn members(
        &self,
        app: AppId,
        audience: &Audience,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError> {
        let mut state = self.0.lock().unwrap();
        state.member_reads += 1;
        let mut items: Vec<Member> = match audience {
            Audience::Topic(topic) => state
                .disk
                .members
                .iter()
                .filter(|((of, name, _), _)| *of == app && name == topic)
                .map(|((_, _, device), spans)| Member {
                    device: *device,
                    spans: spans.clone(),
                })
                .collect(),
            Audience::Everyone => state
                .disk
                .joined
                .iter()
                .filter(|((of, _), _)| *of == app)
                .map(|((_, device), joined)| Member {
                    device: *device,
                    spans: Spans::from_buf([Span {
                        joined: *joined,
                        left: None,
                    }]),
                })
                .collect(),
            Audience::Listed { .. } => Vec::new(),
        };
        items.retain(|member| after.is_none_or(|after| member.device > after));
        let more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().map(|member| member.device).filter(|_| more);
        Ok(Page { items, next })
    }

    fn mailboxes(
        &self,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<StoredMailbox, DeviceId>, ReadError> {
        let state = self.0.lock().unwrap();
        let mut all: Vec<StoredMailbox> = state
            .disk
            .summaries
            .iter()
            .filter(|(device, _)| after.is_none_or(|after| **device > after))
            .map(|(&device, summary)| StoredMailbox {
                device,
                app: summary.app,
                count: summary.count,
                bytes: summary.bytes,
            })
            .collect();
        all.sort_unstable_by_key(|mailbox| mailbox.device);
        let more = all.len() > limit;
        all.truncate(limit);
        let next = all.last().map(|mailbox| mailbox.device);
        Ok(Page {
            next: next.filter(|_| more),
            items: all,
        })
    }

    fn expansions(
        &self,
        _after: Option<(AppId, Stamp)>,
        _limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError> {
        let state = self.0.lock().unwrap();
        let open = state.disk.expansions.values();
        Ok(Page {
            items: open
                .map(|(record, progress)| OpenExpansion {
                    record: record.clone(),
                    progress: *progress,
                })
                .collect(),
            next: None,
        })
    }

    fn chunk(&self, app: AppId, stamp: Stamp, number: u32) -> Result<Vec<DeviceId>, ReadError> {
        let state = self.0.lock().unwrap();
        let chunk = state.disk.chunks.get(&(app, stamp, number));
        Ok(chunk.cloned().unwrap_or_default())
    }

    fn crowded(&self) -> bool {
        self.0.lock().unwrap().crowded
    }

    fn key(&self, id: [u8; 10]) -> Result<Option<KeyRecord>, ReadError> {
        Ok(self.0.lock().unwrap().disk.keys.get(&id).cloned())
    }

    fn keys(&self) -> Result<Vec<KeyRecord>, ReadError> {
        Ok(self.0.lock().unwrap().disk.keys.values().cloned().collect())
    }

    fn callbacks(&self) -> Result<Vec<CallbackRecord>, ReadError> {
        Ok(self
            .0
            .lock()
            .unwrap()
            .disk
            .callbacks
            .values()
            .cloned()
            .collect())
    }

    fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError> {
        let state = self.0.lock().unwrap();
        let first = (app, after.map_or(0, |after| after + 1));
        let mut found = state.disk.letters.range(first..=(app, u64::MAX));
        let items: Vec<DeadLetter> = found
            .by_ref()
            .take(limit)
            .map(|(_, letter)| letter.clone())
            .collect();
        let last = items.last().map(|letter| letter.number);
        Ok(Page {
            items,
            next: found.next().and(last),
        })
    }

    fn apps(&self) -> Result<Vec<AppRecord>, ReadError> {
        Ok(self.0.lock().unwrap().disk.apps.clone())
    }

    fn idempotency(
        &self,
        app: AppId,
        key_hash: [u8; 32],
    ) -> Result<Option<IdempotencyRecord>, ReadError> {
        let state = self.0.lock().unwrap();
        Ok(state.disk.idempotency.get(&(app, key_hash)).copied())
    }

    fn backup(
        &self,
        _out: &mut dyn std::io::Write,
        _watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError> {
        Err(BackupError::Store("a store of tests has none".to_owned()))
    }

    fn health(&self) -> StoreHealth {
        match self.0.lock().unwrap().mode {
            Mode::Commit | Mode::Hold => StoreHealth::Open,
            Mode::NoRoom => StoreHealth::Full {
                free: 1,
                reserve: 2,
            },
            Mode::Fail => StoreHealth::Failed("told to".to_owned()),
        }
    }

    fn stats(&self) -> StoreStats {
        let state = self.0.lock().unwrap();
        StoreStats {
            engine: "fake",
            run: state.disk.run + 1,
            frames: state.frames,
            ..StoreStats::default()
        }
    }

    fn close(&self) {
        self.0.lock().unwrap().closed = true;
    }
}
