//! From a publish request to its answer.

use std::collections::{BTreeMap, HashSet};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use aws_lc_rs::hmac;
use smallvec::SmallVec;
use tokio::sync::{RwLockReadGuard, oneshot};

use super::api::{
    PairView, PingAnswer, PingError, PingRequest, PingView, RevokeCounts, RuntimeError, Target,
};
use super::audiences::ToAudience;
use super::handed::About;
use super::handle::Inner;
use super::hashing::sha256;
use super::idempotency::{Begin, Done};
use super::quota::App;
use super::settings::{EXPANSION_CHUNK, Limits, USERS_PER_PING};
use super::shard::{Gather, Input, Parts, Settled, Waiter};
use super::traces::Origin;
use super::turn::Turn;
use crate::delivery::{AppId, DeviceId, PingId, Quota, Rejection};
use crate::ports::{
    Audience, IdempotencyRecord, Op, OutcomePage, OutcomeQuery, OutcomeRecord, PairState,
    ReadError, Store,
};
use crate::telemetry::metrics as names;

/// Pairs read of the store at a time when a ping is revoked.
pub(super) const REVOKE_PAGE: usize = 1_024;

/// A publish request without its key: everything is checked, and its id is known.
struct Publication<'a> {
    app: AppId,
    id: PingId,
    may_repeat: bool,
    request: &'a mut PingRequest,
    limits: Limits,
    trace: Option<Origin>,
    /// The key that made it: its hash, and the hash of the body.
    key: Option<([u8; 32], [u8; 32])>,
}

impl Inner {
    pub(super) async fn ping(
        self: &Arc<Inner>,
        mut request: PingRequest,
        mut turn: Option<Turn>,
        origin: Option<&Origin>,
    ) -> Result<PingAnswer, PingError> {
        let about = self.about(&request);
        let answer = match self.hand_over(&mut request, &mut turn, origin) {
            Some(Ok(mut handed)) => poll_fn(|cx| handed.poll(self, about.app, cx)).await,
            Some(Err(error)) => Err(error),
            // Apart, so that those above need no room for it.
            None => Box::pin(self.answer(&mut request, turn, origin.cloned())).await,
        };
        self.told(about, &answer, origin);
        let mut answer = answer?;
        if let Some(wait) = request.wait_acknowledged {
            answer.outcomes = Box::pin(async {
                let wait = self.brought(about.app, answer.id, wait).await;
                self.outcomes(about.app, answer.id, wait).await
            })
            .await;
        }
        Ok(answer)
    }

    /// What is counted of a ping that begins now.
    pub(super) fn about(&self, request: &PingRequest) -> About {
        let to_audience = match &request.target {
            Target::Topic(_) | Target::Everyone => true,
            Target::Devices(named) => named.len() > self.limits.load().devices_max as usize,
            Target::Device(_) | Target::Users(_) => false,
        };
        About {
            app: request.app,
            begun: self.shared.clock.now().mono,
            to_audience,
        }
    }

    /// Counts a ping that was answered.
    pub(super) fn told(
        &self,
        about: About,
        answer: &Result<PingAnswer, PingError>,
        origin: Option<&Origin>,
    ) {
        if let Some(origin) = origin {
            match answer {
                Ok(answer) => origin.accepted(answer.id, answer.devices, answer.rejected.len()),
                Err(error) => origin.refused(code(error)),
            }
        }
        let took = self.shared.clock.now().mono - about.begun;
        let meters = &self.shared.meters;
        meters.accept_seconds.record(took.as_secs_f64());
        match answer {
            Ok(answer) => meters.app(about.app, |app| {
                app.pings_accepted.increment(1);
                // Those of an audience count as they are reached.
                if !about.to_audience {
                    app.notifications
                        .increment(u64::from(answer.devices) - answer.rejected.len() as u64);
                }
            }),
            Err(error) => {
                let label = meters.app(about.app, |app| app.label.clone());
                metrics::counter!(names::PINGS_TOTAL, "app" => label, "result" => code(error))
                    .increment(1);
            }
        }
    }

    async fn answer(
        self: &Arc<Inner>,
        request: &mut PingRequest,
        turn: Option<Turn>,
        trace: Option<Origin>,
    ) -> Result<PingAnswer, PingError> {
        let limits = self.takes(request)?;
        let app = self.app(request.app).ok_or(PingError::UnknownDevice)?;
        match request.idempotency.take() {
            None => {
                let publication = Publication {
                    app: request.app,
                    id: self.new_ping_id(),
                    may_repeat: false,
                    request,
                    limits,
                    trace,
                    key: None,
                };
                self.publish(publication, turn).await
            }
            Some((key, body_hash)) => {
                self.publish_once(app, request, limits, (&key, &body_hash), turn, trace)
                    .await
            }
        }
    }

    // ---- Idempotency ---------------------------------------------------------------------------------------------

    async fn publish_once(
        self: &Arc<Inner>,
        app: &App,
        request: &mut PingRequest,
        limits: Limits,
        (key, body_hash): (&str, &[u8; 32]),
        mut turn: Option<Turn>,
        trace: Option<Origin>,
    ) -> Result<PingAnswer, PingError> {
        let id = derived_id(app, key, body_hash);
        let key_hash = sha256(key.as_bytes());
        let hits = |result: &'static str| {
            metrics::counter!(names::IDEMPOTENCY_HITS_TOTAL, "result" => result).increment(1);
        };
        loop {
            let now_ms = self.shared.clock.now().unix_ms;
            match self.idempotency.begin(request.app, &key_hash, id, now_ms) {
                Begin::Known(done) => {
                    hits("same");
                    return Ok(done.answer());
                }
                Begin::Conflict => {
                    hits("conflict");
                    return Err(PingError::IdempotencyConflict);
                }
                Begin::Join(mut flight) => {
                    hits("joined");
                    // It has the places of the other, which waits for nobody behind us: it had begun before. What is ours to be
                    // followed by follows it.
                    if turn.is_some() && flight.placed.wait_for(|placed| *placed).await.is_ok() {
                        drop(turn.take());
                    }
                    if let Ok(shared) = flight.answer.wait_for(Option::is_some).await
                        && let Some(answer) = shared.clone()
                    {
                        return answer;
                    }
                    // The first one went away without an answer.
                }
                Begin::Lead(mut lead) => {
                    let (answer, fresh) = match self.remembered(request.app, key_hash, now_ms).await
                    {
                        Err(error) => (Err(error.into()), false),
                        Ok(Some(record)) if record.body_hash == *body_hash => {
                            hits("same");
                            (Ok(repeat(&record)), false)
                        }
                        Ok(Some(_)) => {
                            hits("conflict");
                            (Err(PingError::IdempotencyConflict), false)
                        }
                        Ok(None) => {
                            let publication = Publication {
                                app: request.app,
                                id,
                                may_repeat: true,
                                request,
                                limits,
                                trace,
                                key: Some((key_hash, *body_hash)),
                            };
                            let turn = lead.turn(turn.take());
                            (self.publish(publication, turn).await, true)
                        }
                    };
                    let done = answer
                        .as_ref()
                        .ok()
                        .filter(|answer| answer.rejected.is_empty())
                        .map(|answer| Done {
                            ping: answer.id,
                            devices: answer.devices,
                            ttl_s: answer.ttl_s,
                            at_ms: now_ms,
                        });
                    if let Some(done) = done.filter(|_| fresh) {
                        self.shared
                            .store
                            .ride_along(Op::PutIdempotency(IdempotencyRecord {
                                app: request.app,
                                key_hash,
                                body_hash: *body_hash,
                                ping: done.ping,
                                devices: done.devices,
                                ttl_s: done.ttl_s,
                                at_ms: done.at_ms,
                            }));
                    }
                    lead.finish(answer.clone(), done);
                    return answer;
                }
            }
        }
    }

    /// What the store remembers of a key that memory does not know, where it can know more.
    async fn remembered(
        &self,
        app: AppId,
        key_hash: [u8; 32],
        now_ms: u64,
    ) -> Result<Option<IdempotencyRecord>, RuntimeError> {
        let keep_ms = self.idempotency.keep_ms();
        let earlier_runs = self.run > 1 && now_ms.saturating_sub(self.started.unix_ms) < keep_ms;
        if !earlier_runs && !self.idempotency.lost() {
            return Ok(None);
        }
        let record = self
            .shared
            .reading
            .read(move |store| store.idempotency(app, key_hash))
            .await?;
        Ok(record.filter(|record| now_ms.saturating_sub(record.at_ms) < keep_ms))
    }

    // ---- Publishing ----------------------------------------------------------------------------------------------

    async fn publish(
        self: &Arc<Inner>,
        publication: Publication<'_>,
        turn: Option<Turn>,
    ) -> Result<PingAnswer, PingError> {
        let Publication {
            app,
            id,
            may_repeat,
            request,
            limits,
            trace,
            key,
        } = publication;
        if self.shared.failed.load(Ordering::Relaxed) {
            return Err(RuntimeError::StoreUnavailable.into());
        }
        // Until the shards have it, no device goes to another user.
        let gates = self.in_time(self.hold_gates(request)).await?;
        let audience = audience(&request.target, &limits)?;
        let devices = match audience {
            Some(_) => Vec::new(),
            None => self.resolve(request, &limits).await?,
        };
        let listed = audience.as_ref().map_or(0, |(_, listed)| listed.len());
        let shared = devices.len() > 1 || audience.is_some();
        let more = listed * size_of::<DeviceId>();
        let (notification, ttl_s) = self.notification(request, id, &limits, shared, more)?;
        let now_ms = notification.accepted_ms;
        let notification = Arc::new(notification);
        if let Some((audience, listed)) = audience {
            // Its places are taken when it is accepted: what is accepted later is brought later.
            return self
                .publish_to_audience(ToAudience {
                    notification,
                    audience,
                    listed,
                    ttl_s,
                    key: key.map(|(key_hash, body_hash)| (key_hash, body_hash, now_ms)),
                    limit: limits.expansions_max,
                })
                .await;
        }
        // Before the shards see it, so that no outcome comes before the trace is known.
        if let Some(origin) = &trace {
            self.shared.traces.open(id, origin.clone(), devices.len());
        }
        let answer = |rejected| PingAnswer {
            id,
            devices: u32::try_from(devices.len()).unwrap_or(u32::MAX),
            ttl_s,
            rejected,
            outcomes: Vec::new(),
        };
        match devices.as_slice() {
            [] => {
                self.shared.ledger.open(app, id, now_ms);
                Ok(answer(Vec::new()))
            }
            &[device] => {
                let settled = self.hand_to_shard(device, notification, may_repeat);
                drop(gates);
                if let Some(turn) = turn {
                    turn.end();
                }
                // Without an answer the shard was stopped.
                match settled.await.map_err(|_| RuntimeError::Draining)? {
                    Settled::Accepted => Ok(answer(Vec::new())),
                    Settled::Busy => Err(RuntimeError::StoreBusy.into()),
                    Settled::Rejected(Rejection::UnknownDevice)
                        if !matches!(request.target, Target::Device(_)) =>
                    {
                        if trace.is_some() {
                            self.shared.traces.rejected(id, 1);
                        }
                        Ok(answer(vec![(device, Rejection::UnknownDevice)]))
                    }
                    Settled::Rejected(why) => {
                        if trace.is_some() {
                            self.shared.traces.rejected(id, 1);
                        }
                        Err(self.refusal(app, why))
                    }
                }
            }
            several => {
                let (gather, settled) = Gather::new(several.len());
                for &device in several {
                    self.shard(device).inbox.push(Input::Enqueue {
                        device,
                        notification: Arc::clone(&notification),
                        may_repeat,
                        paced: true,
                        patient: false,
                        waiter: Waiter::Part(Arc::clone(&gather)),
                    });
                }
                drop((gather, notification, gates));
                if let Some(turn) = turn {
                    turn.end();
                }
                let Parts { rejected, busy } = settled.await.map_err(|_| RuntimeError::Draining)?;
                if busy {
                    return Err(RuntimeError::StoreBusy.into());
                }
                if trace.is_some() && !rejected.is_empty() {
                    self.shared.traces.rejected(id, rejected.len());
                }
                if rejected.len() == several.len()
                    && let Some(error) = self.all_for_one(app, &rejected)
                {
                    return Err(error.into());
                }
                Ok(answer(rejected))
            }
        }
    }

    /// Why the only device of a ping did not take it.
    pub(super) fn refusal(&self, app: AppId, why: Rejection) -> PingError {
        match why {
            Rejection::UnknownDevice => PingError::UnknownDevice,
            Rejection::MailboxFull => PingError::MailboxFull,
            Rejection::NoRoom => RuntimeError::NoRoom.into(),
            Rejection::StoreFailed => RuntimeError::StoreUnavailable.into(),
            Rejection::TooFast => PingError::DeviceTooFast,
            Rejection::Quota(quota) => self.over_quota(app, quota).into(),
        }
    }

    /// What is wrong with the ping as a whole, if every device was refused because of the store or of the app's quotas.
    fn all_for_one(&self, app: AppId, rejected: &[(DeviceId, Rejection)]) -> Option<RuntimeError> {
        match worst(rejected.iter().map(|(_, why)| *why))? {
            Common::Quota(quota) => Some(self.over_quota(app, quota)),
            Common::NoRoom => Some(RuntimeError::NoRoom),
            Common::StoreFailed => Some(RuntimeError::StoreUnavailable),
        }
    }

    async fn hold_gates(
        &self,
        request: &PingRequest,
    ) -> Result<SmallVec<[RwLockReadGuard<'_, ()>; 1]>, RuntimeError> {
        match &request.target {
            Target::Users(users) if users.len() <= USERS_PER_PING => {
                Ok(self.users.hold_gates(request.app, users).await)
            }
            // Too many are refused; devices that are named are meant whoever owns them.
            Target::Users(_)
            | Target::Device(_)
            | Target::Devices(_)
            | Target::Topic(_)
            | Target::Everyone => Ok(SmallVec::new()),
        }
    }

    /// The devices of a target, each once.
    async fn resolve(
        self: &Arc<Inner>,
        request: &PingRequest,
        limits: &Limits,
    ) -> Result<Vec<DeviceId>, PingError> {
        let too_many = PingError::TooManyDevices {
            limit: limits.devices_max,
        };
        let devices_max = limits.devices_max as usize;
        let mut devices = Vec::new();
        let mut seen = HashSet::new();
        match &request.target {
            // These are brought to their devices afterwards.
            Target::Topic(_) | Target::Everyone => {}
            Target::Device(device) => devices.push(*device),
            Target::Devices(named) => {
                for &device in named {
                    if seen.insert(device) {
                        devices.push(device);
                    }
                    if devices.len() > devices_max {
                        return Err(too_many);
                    }
                }
            }
            Target::Users(users) => {
                if users.len() > USERS_PER_PING {
                    return Err(too_many);
                }
                for owned in self
                    .user_devices(request.app, users, devices_max + 1)
                    .await?
                {
                    for device in self.newest_first(&owned) {
                        if seen.insert(device) {
                            devices.push(device);
                        }
                    }
                    if devices.len() > devices_max {
                        return Err(too_many);
                    }
                }
            }
        }
        Ok(devices)
    }

    /// A user's devices: those attached now, the newest first, then the others.
    fn newest_first(&self, owned: &[DeviceId]) -> Vec<DeviceId> {
        let mut devices = owned.to_vec();
        if devices.len() > 1 {
            devices.sort_by_cached_key(|&device| {
                let presence = self.shard(device).presence(device);
                std::cmp::Reverse(presence.map_or(0, |presence| presence.since_ms))
            });
        }
        devices
    }

    // ---- Afterwards ----------------------------------------------------------------------------------------------

    /// Waits until every notification of a ping has ended, or the time is over, or a drain has sent the devices away;
    /// answers what is known then.
    async fn outcomes(&self, app: AppId, ping: PingId, wait: Duration) -> Vec<PairView> {
        let ended = async {
            while let Some((watch, _)) = self.shared.ledger.watch(ping) {
                let notified = watch.notified();
                tokio::pin!(notified);
                notified.as_mut().enable();
                match self.shared.ledger.watch(ping) {
                    Some((_, open)) if open > 0 => notified.await,
                    _ => return,
                }
            }
        };
        // Either way, what is known is read below.
        let ended = self.parted.run_until_cancelled(ended);
        let result = match tokio::time::timeout(wait, ended).await {
            Ok(Some(())) => "settled",
            Ok(None) => "drain",
            Err(_) => "timeout",
        };
        metrics::counter!(names::WAITS_TOTAL, "result" => result).increment(1);
        let limit = self.limits.load().devices_max as usize;
        match self.ping_view(app, ping, None, limit, Depth::Recent).await {
            Ok(Some(view)) => view.devices,
            Ok(None) | Err(_) => self
                .shared
                .ledger
                .known(ping, 0, None, limit)
                .map(|known| known.pairs)
                .unwrap_or_default(),
        }
    }

    pub(super) async fn ping_view(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
        depth: Depth,
    ) -> Result<Option<PingView>, RuntimeError> {
        let limit = limit.max(1);
        let now_ms = self.shared.clock.now().unix_ms;
        let from_ms = now_ms.saturating_sub(self.receipts_keep_ms);
        let recent = self.shared.ledger.known(ping, from_ms, after, limit + 1);
        if recent.as_ref().is_some_and(|known| known.app != app) {
            return Ok(None);
        }
        let expansion = self.audiences.get(app, ping).map(|open| open.view());
        let known = recent.is_some() || expansion.is_some();
        let kept = move |state: PairState| match state {
            PairState::Waiting { .. } => true,
            PairState::Ended { at_ms, .. } => at_ms >= from_ms,
        };
        let (stored, history, exists) = self
            .shared
            .reading
            .read(move |store| {
                let page = store.pairs(ping, after, limit + 1)?;
                let history = |after, limit| -> Result<Vec<OutcomeRecord>, ReadError> {
                    match depth {
                        Depth::Recent => Ok(Vec::new()),
                        Depth::History | Depth::HistoryIfReadable => {
                            let past = store.outcomes_of_ping(app, ping, after, limit);
                            let mut past = match past {
                                Err(error) if depth == Depth::HistoryIfReadable => {
                                    tracing::warn!(%error, "a notification is revoked without a look at the history");
                                    Vec::new()
                                }
                                past => past?,
                            };
                            past.retain(|record| record.at_ms >= from_ms);
                            Ok(past)
                        }
                    }
                };
                let past = history(after, limit + 1)?;
                let mut exists = known
                    || !past.is_empty()
                    || page.items.iter().any(|&(_, _, state)| kept(state));
                if !exists && after.is_some() {
                    // Nothing follows, but there may be something before.
                    let first = store.pairs(ping, None, 1)?;
                    exists = first.items.iter().any(|&(_, _, state)| kept(state))
                        || !history(None, 1)?.is_empty();
                }
                Ok((page, past, exists))
            })
            .await?;
        if !exists || stored.items.iter().any(|&(owner, _, _)| owner != app) {
            return Ok(None);
        }
        // Beyond the end of a cut page of the store others may name devices whose stored neighbours are not here.
        let end = stored.next.and(stored.items.last().map(|item| item.1));
        let stored = stored
            .items
            .into_iter()
            .map(|(_, device, state)| (device, state));
        let history = history.into_iter().map(|record| {
            let (outcome, at_ms) = (record.outcome, record.at_ms);
            (record.device, PairState::Ended { outcome, at_ms })
        });
        let recent = recent
            .into_iter()
            .flat_map(|known| known.pairs)
            .map(|pair| (pair.device, pair.state));
        let mut devices: BTreeMap<DeviceId, PairState> = BTreeMap::new();
        for (device, state) in stored.chain(history).chain(recent) {
            if kept(state) && end.is_none_or(|end| device <= end) {
                devices
                    .entry(device)
                    .and_modify(|known| *known = first_verdict(*known, state))
                    .or_insert(state);
            }
        }
        let mut devices: Vec<PairView> = devices
            .into_iter()
            .map(|(device, state)| PairView { device, state })
            .collect();
        let more = devices.len() > limit || end.is_some();
        devices.truncate(limit);
        Ok(Some(PingView {
            id: ping,
            next: devices
                .last()
                .map(|pair| pair.device)
                .or(end)
                .filter(|_| more),
            devices,
            expansion,
        }))
    }

    pub(super) async fn outcomes_page(
        self: &Arc<Inner>,
        user: Option<&str>,
        mut query: OutcomeQuery,
    ) -> Result<OutcomePage, RuntimeError> {
        if let Some(user) = user {
            const MAX: usize = OutcomeQuery::DEVICES_MAX;
            let users = [user.to_owned()];
            let owned = self.user_devices(query.app, &users, MAX + 1).await?;
            let devices: Vec<DeviceId> = owned
                .iter()
                .flat_map(|owned| owned.iter().copied())
                .collect();
            // Of none: nothing is found, and the answer says as always how long things are kept.
            if devices.len() > MAX {
                return Err(RuntimeError::Invalid(
                    "the user has more devices than one query may name; ask device by device",
                ));
            }
            query.devices = Some(devices);
        }
        self.in_time(async {
            // The place is free again when the read is over, even if nobody waits for it any more.
            let place = self.listings.place(query.app).await;
            let read = move |store: &dyn Store| {
                let page = store.outcomes(&query);
                drop(place);
                page
            };
            self.shared.reading.read(read).await
        })
        .await
    }

    pub(super) async fn revoke_ping(
        self: &Arc<Inner>,
        app: AppId,
        ping: PingId,
    ) -> Result<Option<RevokeCounts>, RuntimeError> {
        self.revoke_except(app, ping, &HashSet::new()).await
    }

    /// Takes a ping back where it waits, but not from `except`. The mailboxes see to it that devices that may have it all the
    /// same are told.
    pub(super) async fn revoke_except(
        self: &Arc<Inner>,
        app: AppId,
        ping: PingId,
        except: &HashSet<DeviceId>,
    ) -> Result<Option<RevokeCounts>, RuntimeError> {
        let mut known = self.stop_expansion(app, ping).await?;
        let mut counts = RevokeCounts::default();
        let mut after = None;
        loop {
            let page = self.ping_view(app, ping, after, REVOKE_PAGE, Depth::HistoryIfReadable);
            let Some(page) = page.await? else {
                // One that was stopped before it reached anybody.
                return Ok(known.then_some(counts));
            };
            known = true;
            let mut answers = Vec::new();
            for pair in page.devices {
                match pair.state {
                    _ if except.contains(&pair.device) => {}
                    PairState::Ended { .. } => counts.ended += 1,
                    PairState::Waiting { .. } => {
                        let (answer, answered) = oneshot::channel();
                        self.shard(pair.device).inbox.push(Input::Revoke {
                            app,
                            device: pair.device,
                            ping,
                            answer,
                        });
                        answers.push(answered);
                    }
                }
            }
            // Page by page: an audience may be large.
            let settled = async {
                for answered in answers {
                    if answered.await.map_err(|_| RuntimeError::Draining)? {
                        counts.revoked += 1;
                    } else {
                        counts.ended += 1;
                    }
                }
                Ok(())
            };
            self.in_time(settled).await?;
            if page.next.is_none() {
                break;
            }
            after = page.next;
        }
        self.shared
            .meters
            .revocations
            .increment(u64::from(counts.revoked));
        Ok(Some(counts))
    }
}

/// The id that a key and a body make in an app: nobody without the app's secret can guess it.
fn derived_id(app: &App, key: &str, body_hash: &[u8; 32]) -> PingId {
    let mut context = hmac::Context::with_key(&app.secret);
    // The hash has a fixed length, so key and hash cannot be cut differently.
    context.update(key.as_bytes());
    context.update(body_hash);
    let mut id = [0; 16];
    for (to, from) in id.iter_mut().zip(context.sign().as_ref()) {
        *to = *from;
    }
    PingId(id)
}

fn repeat(record: &IdempotencyRecord) -> PingAnswer {
    PingAnswer {
        id: record.ping,
        devices: record.devices,
        ttl_s: record.ttl_s,
        rejected: Vec::new(),
        outcomes: Vec::new(),
    }
}

/// How far back a look at a ping goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// What the ledger and the store know: enough for a ping that was just accepted.
    Recent,
    /// The history of outcomes as well.
    History,
    /// The history of outcomes as well, if it can be read: what is waiting is known without it.
    HistoryIfReadable,
}

/// Of two things known of one notification: an outcome beats waiting, and the first one stays.
fn first_verdict(one: PairState, other: PairState) -> PairState {
    match (one, other) {
        (PairState::Ended { at_ms: first, .. }, PairState::Ended { at_ms: second, .. }) => {
            if second < first { other } else { one }
        }
        (PairState::Ended { .. }, PairState::Waiting { .. }) => one,
        (PairState::Waiting { .. }, _) => other,
    }
}

/// An audience, with its list if it has one.
type Many = (Audience, Arc<[DeviceId]>);

/// The audience of a target that is not answered device by device, with its list if it has one. `None`: the others.
fn audience(target: &Target, limits: &Limits) -> Result<Option<Many>, PingError> {
    let none = || Arc::from([]);
    match target {
        Target::Topic(topic) => Ok(Some((Audience::Topic(topic.clone()), none()))),
        Target::Everyone => Ok(Some((Audience::Everyone, none()))),
        Target::Devices(named) if named.len() > limits.devices_max as usize => {
            let mut devices = named.clone();
            devices.sort_unstable();
            devices.dedup();
            if devices.len() <= limits.devices_max as usize {
                return Ok(None);
            }
            let limit = limits.list_max.max(limits.devices_max);
            if devices.len() > limit as usize {
                return Err(PingError::TooManyDevices { limit });
            }
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            let audience = Audience::Listed {
                chunks: count(devices.len().div_ceil(EXPANSION_CHUNK)),
                devices: count(devices.len()),
            };
            Ok(Some((audience, devices.into())))
        }
        Target::Device(_) | Target::Devices(_) | Target::Users(_) => Ok(None),
    }
}

/// A refusal that is no device's own, the worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Common {
    Quota(Quota),
    NoRoom,
    StoreFailed,
}

/// The worst of these refusals, in whatever order the shards gave them; `None` if one of them is its device's own: then each is to be
/// told by itself.
fn worst(refusals: impl Iterator<Item = Rejection>) -> Option<Common> {
    let mut worst = None;
    for why in refusals {
        let one = match why {
            Rejection::UnknownDevice | Rejection::MailboxFull | Rejection::TooFast => return None,
            Rejection::Quota(quota) => Common::Quota(quota),
            Rejection::NoRoom => Common::NoRoom,
            Rejection::StoreFailed => Common::StoreFailed,
        };
        worst = worst.max(Some(one));
    }
    worst
}

fn code(error: &PingError) -> &'static str {
    match error {
        PingError::UnknownDevice => "unknown_device",
        PingError::MailboxFull => "mailbox_full",
        PingError::DeviceTooFast => "device_rate_limited",
        PingError::IdempotencyConflict => "idempotency_conflict",
        PingError::ContentTooLarge { .. } => "content_too_large",
        PingError::TooManyDevices { .. } => "too_many_devices",
        PingError::TooManyExpansions { .. } => "too_many_expansions",
        PingError::Runtime(error) => match error {
            RuntimeError::StoreUnavailable => "store_unavailable",
            RuntimeError::StoreBusy => "store_busy",
            RuntimeError::Draining => "draining",
            RuntimeError::MemoryReserve => "memory_reserve",
            RuntimeError::NoRoom => "no_room",
            RuntimeError::TooManyStreams => "too_many_streams",
            RuntimeError::QuotaExceeded { .. } => "quota_exceeded",
            RuntimeError::Invalid(_) => "invalid",
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_ping_is_answered_does_not_depend_on_which_shard_was_first() {
        let own = [
            Rejection::UnknownDevice,
            Rejection::MailboxFull,
            Rejection::TooFast,
        ];
        let common = [
            (
                Rejection::Quota(Quota::Notifications),
                Common::Quota(Quota::Notifications),
            ),
            (Rejection::Quota(Quota::Bytes), Common::Quota(Quota::Bytes)),
            (Rejection::NoRoom, Common::NoRoom),
            (Rejection::StoreFailed, Common::StoreFailed),
        ];
        for (place, (one, worse)) in common.into_iter().enumerate() {
            for (other, _) in &common[..=place] {
                assert_eq!(worst([one, *other].into_iter()), Some(worse));
                assert_eq!(worst([*other, one].into_iter()), Some(worse));
            }
            for its in own {
                assert_eq!(worst([one, its].into_iter()), None);
                assert_eq!(worst([its, one].into_iter()), None);
            }
        }
        assert_eq!(worst(std::iter::empty()), None);
    }
}
