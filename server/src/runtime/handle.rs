//! The one door to the runtime.

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use smallvec::SmallVec;
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api::{
    AttachRequest, Authenticated, DeviceChange, DeviceChanged, DeviceQuery, DeviceView, Identity,
    KeyView, LinkSettings, Outlet, PingAnswer, PingError, PingRequest, PingView, Principal,
    Requested, RevokeCounts, Rotated, RuntimeError, TopicsChange, UserView, WhoError,
    WithdrawCounts,
};
use super::audiences::Audiences;
use super::backup::{BackupStream, NoBackup};
use super::callbacks::{
    CallbackError, CallbackFigures, CallbackView, CallbackWish, Callbacks, Posted,
};
use super::directory::{Keys, Users};
use super::events::{EventStream, EventsFrom, EventsOf, Followers};
use super::hashing::HashKey;
use super::idempotency::Idempotency;
use super::listings::Listings;
use super::pings::Depth;
use super::quota::{AllowanceView, App, Throttle};
use super::rate::Pace;
use super::reserve::{BodyShare, Reserve};
use super::settings::{Limits, RuntimeSettings};
use super::shard::{Input, ShardDoor, Shared};
use super::status::{DrainSummary, NotReady, Status};
use super::topics::Patterns;
use super::traces::{Origin, Trace};
use super::turn::Turn;
use crate::delivery::{
    Acknowledged, AppId, Attach, DeviceId, Event, Now, PingId, Policy, SessionId,
};
use crate::ports::{
    Carrier, DeadLetter, Entropy, OutcomePage, OutcomeQuery, Page, Scopes, StoreHealth,
};

/// A cheap, cloneable handle to everything that runs.
#[derive(Clone)]
pub struct Handle {
    pub(super) inner: Arc<Inner>,
}

/// What the handle shares.
pub(super) struct Inner {
    pub(super) shared: Arc<Shared>,
    pub(super) shards: Vec<Arc<ShardDoor>>,
    pub(super) entropy: Arc<dyn Entropy>,
    pub(super) hash_key: HashKey,
    pub(super) apps: HashMap<AppId, App>,
    pub(super) keys: ArcSwap<Keys>,
    pub(super) users: Users,
    pub(super) idempotency: Arc<Idempotency>,
    pub(super) audiences: Audiences,
    /// Topics that devices may join and leave by themselves.
    pub(super) subscribable: ArcSwap<Patterns>,
    pub(super) reserve: Arc<Reserve>,
    pub(super) limits: ArcSwap<Limits>,
    pub(super) link: ArcSwap<LinkSettings>,
    /// What the shards were told last.
    pub(super) policy: ArcSwap<Policy>,
    /// How long it is known what was erased, milliseconds.
    pub(super) erasures_keep_ms: u64,
    pub(super) run: u32,
    /// How long outcomes are told, milliseconds.
    pub(super) receipts_keep_ms: u64,
    /// Who reads the history takes one: half of the reading threads at most, so that mailboxes never wait for them all.
    pub(super) listings: Listings,
    /// Who follows outcomes as they happen.
    pub(super) followers: Followers,
    /// Where outcomes are posted.
    pub(super) callbacks: Callbacks,
    pub(super) started: Now,
    pub(super) sessions: AtomicU64,
    /// Going down: not ready, no new sessions.
    pub(super) draining: AtomicBool,
    /// Going down, and new pings are refused by now.
    pub(super) refusing: AtomicBool,
    pub(super) drained: OnceCell<DrainSummary>,
    pub(super) tasks: TaskTracker,
    /// Going down, and no device is left: nobody needs to wait for an acknowledgement any more.
    pub(super) parted: CancellationToken,
    pub(super) stop: CancellationToken,
}

impl Inner {
    pub(super) fn shard(&self, device: DeviceId) -> &ShardDoor {
        &self.shards[self.shard_place(device)]
    }

    /// The place of a device's shard in the list of shards.
    pub(super) fn shard_place(&self, device: DeviceId) -> usize {
        // Ids are random, so any eight bytes spread them evenly.
        let mut half = [0; 8];
        half.copy_from_slice(&device.0[..8]);
        let place = u64::from_le_bytes(half) % self.shards.len() as u64;
        #[expect(
            clippy::cast_possible_truncation,
            reason = "less than the number of shards"
        )]
        let place = place as usize;
        place
    }

    pub(super) fn app(&self, app: AppId) -> Option<&App> {
        self.apps.get(&app)
    }

    pub(super) fn draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// What the store must answer within the accept wait.
    pub(super) async fn in_time<T>(
        &self,
        work: impl Future<Output = Result<T, RuntimeError>>,
    ) -> Result<T, RuntimeError> {
        let wait = self.limits.load().accept_wait;
        tokio::time::timeout(wait, work)
            .await
            .unwrap_or(Err(RuntimeError::StoreBusy))
    }

    /// Devices attached or about to be.
    pub(super) fn sessions_left(&self) -> u64 {
        self.shards.iter().map(|shard| shard.sessions()).sum()
    }

    fn tell(&self, device: DeviceId, event: Event) {
        self.shard(device).inbox.push(Input::Event(device, event));
    }
}

impl Handle {
    // ---- The server ----------------------------------------------------------------------------------------------

    /// Limits for links.
    #[must_use]
    pub fn link_settings(&self) -> Arc<LinkSettings> {
        self.inner.link.load_full()
    }

    /// This moment in Unix milliseconds, for `welcome`.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        self.now().unix_ms
    }

    /// This moment in both clocks, for whoever must not read one of its own.
    #[must_use]
    pub fn now(&self) -> Now {
        self.inner.shared.clock.now()
    }

    /// A session id that was never used in this run.
    #[must_use]
    pub fn next_session(&self) -> SessionId {
        SessionId(self.inner.sessions.fetch_add(1, Ordering::Relaxed) + 1)
    }

    /// Whether new work is turned away because the server goes down.
    #[must_use]
    pub fn draining(&self) -> bool {
        self.inner.draining()
    }

    /// Whether the server wants traffic (`/readyz`).
    pub fn ready(&self) -> Result<(), NotReady> {
        if self.draining() {
            return Err(NotReady::Draining);
        }
        match self.inner.shared.store.health() {
            StoreHealth::Failed(_) => Err(NotReady::StoreFailed),
            StoreHealth::Behind => Err(NotReady::StoreBehind),
            // Devices are served, and what is acknowledged at once is accepted.
            StoreHealth::Open | StoreHealth::Full { .. } => Ok(()),
        }
    }

    /// A look at everything that runs.
    #[must_use]
    pub fn status(&self) -> Status {
        let inner = &self.inner;
        let now = inner.shared.clock.now();
        let awake: usize = inner.shards.iter().map(|shard| shard.awake()).sum();
        Status {
            version: env!("CARGO_PKG_VERSION"),
            run: inner.run,
            started_ms: inner.started.unix_ms,
            uptime: now.mono - inner.started.mono,
            now_ms: now.unix_ms,
            shards: inner.shards.len(),
            connected_quic: inner.shared.meters.connected(Carrier::Quic),
            connected_websocket: inner.shared.meters.connected(Carrier::WebSocket),
            awake: awake as u64,
            store: inner.shared.store.stats(),
            health: inner.shared.store.health(),
            expansions: inner.audiences.open().0,
            reserve_bytes: inner.reserve.used(),
            ledger_entries: inner.shared.ledger.entries(),
            ledger_bytes: inner.shared.ledger.bytes(),
            idempotency_entries: inner.idempotency.entries(),
            clock: inner.shared.clock.state(),
            draining: inner.draining(),
            limits: **inner.limits.load(),
            link: inner.link.load_full(),
            policy: inner.policy.load_full(),
            apps: inner.app_uses(),
            counted: inner.shared.stock.is_whole(),
        }
    }

    /// Takes the live settings (policy, link, limits) from `settings`; the rest needs a restart.
    pub fn reload(&self, settings: &RuntimeSettings) {
        let inner = &self.inner;
        inner.limits.store(Arc::new(settings.limits));
        inner.link.store(Arc::new(settings.link.clone()));
        inner.callbacks.wake();
        inner.policy.store(Arc::new(settings.policy.clone()));
        inner.set_quotas(&settings.quotas);
        inner
            .shared
            .device_pace
            .set(Pace::of_device(&settings.limits));
        inner
            .subscribable
            .store(Arc::new(settings.self_subscribe.clone()));
        inner
            .shared
            .accept_wait_ms
            .store(millis(settings.limits.accept_wait), Ordering::Relaxed);
        for shard in &inner.shards {
            shard
                .inbox
                .push(Input::Policy(Box::new(settings.policy.clone())));
        }
    }

    /// Goes down in order: not ready, `goaway` to every session spread over the window, a last commit, the store
    /// closed. Pings are still taken for a moment, then refused with `Draining`. Answers when nothing is left to do;
    /// a second call waits for the first.
    pub async fn drain(&self, window: Duration) -> DrainSummary {
        *self
            .inner
            .drained
            .get_or_init(|| self.inner.drain(window))
            .await
    }

    /// Begins a backup of everything that is stored, while serving, for this caller. `cut` is cancelled when the stream is not
    /// taken as [`Limits::backup_stall`] asks: then the connection is to end.
    pub async fn backup(
        &self,
        who: &Principal,
        cut: CancellationToken,
    ) -> Result<BackupStream, NoBackup> {
        self.inner.backup(&who.key, cut).await
    }

    // ---- Links ---------------------------------------------------------------------------------------------------

    /// Checks who a device is.
    pub async fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> Result<Authenticated, WhoError> {
        self.inner.authenticate(device, identity).await
    }

    /// Attaches a link to its mailbox; the answer comes through the outlet. [`Handle::detach`] must follow once.
    pub fn attach(&self, who: Authenticated, request: AttachRequest, outlet: Arc<dyn Outlet>) {
        let device = who.device();
        self.inner.shard(device).inbox.push(Input::Attach {
            device,
            proved: who.at,
            proof_until_ms: who.until_ms,
            agent: request.agent,
            attach: Box::new(Attach {
                session: request.session,
                instance: request.instance,
                attempt: request.attempt,
                window: request.window,
                min_urgency: request.min_urgency,
                seen: request.seen,
            }),
            outlet,
            carrier: Carrier::named(request.carrier),
        });
    }

    /// The link is gone.
    pub fn detach(&self, device: DeviceId, session: SessionId) {
        self.inner
            .shard(device)
            .inbox
            .push(Input::Detach { device, session });
    }

    /// The device has these.
    pub fn acknowledge(&self, device: DeviceId, session: SessionId, what: Acknowledged) {
        self.inner
            .tell(device, Event::Acknowledge { session, what });
    }

    /// The device will not use this one.
    pub fn decline(&self, device: DeviceId, session: SessionId, ping: PingId) {
        self.inner.tell(device, Event::Decline { session, ping });
    }

    /// Somebody is at the device, or not.
    pub fn presence(&self, device: DeviceId, session: SessionId, active: bool) {
        self.inner.tell(device, Event::Presence { session, active });
    }

    // ---- Pings ---------------------------------------------------------------------------------------------------

    /// Publishes. Answers when every part is safe or has its outcome. Dropping the future changes nothing about what
    /// was handed over.
    pub async fn ping(&self, request: PingRequest) -> Result<PingAnswer, PingError> {
        self.inner.ping(request, None, None).await
    }

    /// The same for a ping whose way is to be found in the log: its acceptance and its outcomes name the trace.
    pub async fn ping_traced(
        &self,
        request: PingRequest,
        origin: &Origin,
    ) -> Result<PingAnswer, PingError> {
        self.inner.ping(request, None, Some(origin)).await
    }

    /// Publishes, and ends `turn` as [`Handle::begin_ping`] does.
    pub async fn ping_in_turn(
        &self,
        request: PingRequest,
        turn: Turn,
        origin: Option<&Origin>,
    ) -> Result<PingAnswer, PingError> {
        self.inner.ping(request, Some(turn), origin).await
    }

    /// Our part of a trace that a caller began, or of a new one.
    #[must_use]
    pub fn trace(&self, trace_id: Option<[u8; 16]>, sampled: bool) -> Trace {
        let trace_id = trace_id.unwrap_or_else(|| {
            let mut id = [0; 16];
            self.inner.entropy.fill(&mut id);
            // All zeros stand for no trace at all.
            id[15] |= u8::from(id == [0; 16]);
            id
        });
        let mut span_id = [0; 8];
        self.inner.entropy.fill(&mut span_id);
        span_id[7] |= u8::from(span_id == [0; 8]);
        Trace {
            trace_id,
            span_id,
            sampled,
        }
    }

    /// Looks the devices of these users up together, so that pings to them need not one by one. A failure shows at the pings.
    pub async fn know_users(&self, app: AppId, users: &[String]) {
        let limit = self.inner.limits.load().devices_max as usize + 1;
        // What is found is in the cache afterwards.
        drop(self.inner.user_devices(app, users, limit).await);
    }

    /// Room for so many bytes of a body of this app, of the reserve for bodies in flight. `MemoryReserve`: there is none for the moment.
    pub fn hold_body(&self, app: AppId, bytes: usize) -> Result<BodyShare, RuntimeError> {
        let limit = self.inner.limits.load().memory_reserve;
        let share = self.inner.take_room(app, bytes, limit);
        share.map(BodyShare::new).ok_or(RuntimeError::MemoryReserve)
    }

    /// The limits in force.
    #[must_use]
    pub fn limits(&self) -> Limits {
        **self.inner.limits.load()
    }

    /// What is known of a ping of this app; `None`: not known, or no longer.
    pub async fn ping_view(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Option<PingView>, RuntimeError> {
        self.inner
            .ping_view(app, ping, after, limit, Depth::History)
            .await
    }

    /// How notifications of an app ended, a page at a time. `user`: only those of the devices that this user has now.
    /// `Invalid`: the user has more devices than one query may name. `StoreBusy`: too many list at once.
    pub async fn outcomes(
        &self,
        user: Option<&str>,
        query: OutcomeQuery,
    ) -> Result<OutcomePage, RuntimeError> {
        self.inner.outcomes_page(user, query).await
    }

    /// Where the outcomes of an app are posted; `None`: nowhere.
    pub async fn callback(&self, app: AppId) -> Option<CallbackView> {
        self.inner.callback(app).await
    }

    /// Sets where the outcomes of an app are posted. Answers the secret if it was made now: it is shown this once.
    pub async fn set_callback(
        &self,
        app: AppId,
        wish: CallbackWish,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        self.inner.set_callback(app, wish).await
    }

    /// Gives a callback a new secret, the caller's own or one that is made now. The one before signs as well for `overlap` (`None`: as
    /// set).
    pub async fn rotate_callback_secret(
        &self,
        app: AppId,
        secret: Option<&str>,
        overlap: Option<Duration>,
    ) -> Result<(CallbackView, Option<String>), CallbackError> {
        self.inner
            .rotate_callback_secret(app, secret, overlap)
            .await
    }

    /// Posts the outcomes of an app nowhere any more, and forgets its dead letters. `false`: there was no callback.
    pub async fn drop_callback(&self, app: AppId) -> Result<bool, RuntimeError> {
        self.inner.drop_callback(app).await
    }

    /// Posts a test now, once. `None`: there is no callback.
    pub async fn test_callback(&self, app: AppId) -> Option<Posted> {
        self.inner.test_callback(app).await
    }

    /// The batches of an app that were given up, the oldest first.
    pub async fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, RuntimeError> {
        self.inner.dead_letters(app, after, limit).await
    }

    /// Posts a dead letter again, once, and forgets it if it is taken. `None`: there is no such letter.
    pub async fn resend(&self, app: AppId, number: u64) -> Result<Option<Posted>, RuntimeError> {
        self.inner.resend(app, number).await
    }

    /// Forgets a dead letter; `false`: there is no such one.
    pub async fn drop_dead_letter(&self, app: AppId, number: u64) -> Result<bool, RuntimeError> {
        self.inner.drop_dead_letter(app, number).await
    }

    /// How callbacks are.
    #[must_use]
    pub fn callback_figures(&self) -> CallbackFigures {
        self.inner.callbacks.figures()
    }

    /// Follows the outcomes of the caller's app.
    ///
    /// # Errors
    /// `TooManyStreams`: as many follow this app as may; `Draining`.
    pub fn follow(
        &self,
        who: &Principal,
        from: EventsFrom,
        wanted: EventsOf,
    ) -> Result<EventStream, RuntimeError> {
        self.inner.follow(who, from, wanted)
    }

    /// Takes a ping back where it has not ended; `None`: not known, or no longer.
    pub async fn revoke_ping(
        &self,
        app: AppId,
        ping: PingId,
    ) -> Result<Option<RevokeCounts>, RuntimeError> {
        self.inner.revoke_ping(app, ping).await
    }

    /// Takes a ping back everywhere but on `except`: where it waits, and off the screens where it is shown. Answers when that
    /// is safe; devices that are away are told when they come back. `None`: not known, or no longer.
    pub async fn withdraw_ping(
        &self,
        app: AppId,
        ping: PingId,
        except: HashSet<DeviceId>,
    ) -> Result<Option<WithdrawCounts>, RuntimeError> {
        self.inner.withdraw_ping(app, ping, except).await
    }

    // ---- The directory -------------------------------------------------------------------------------------------

    /// Registers a device. `Invalid`: the user or the name cannot be.
    pub async fn create_device(
        &self,
        app: AppId,
        user: &str,
        name: Option<&str>,
    ) -> Result<Requested<DeviceView>, RuntimeError> {
        self.inner.create_device(app, user, name).await
    }

    /// One device of this app.
    pub async fn device(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<DeviceView>, RuntimeError> {
        self.inner.device(app, device).await
    }

    /// Devices of this app by id, a page at a time. Of a list with a filter a page may have fewer than `limit`, or none,
    /// and go on: one call looks at a bounded number of devices.
    pub async fn devices(
        &self,
        app: AppId,
        query: &DeviceQuery,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceView, DeviceId>, RuntimeError> {
        self.inner.devices(app, query, after, limit).await
    }

    /// The topics of a device, by name. `None`: not known.
    pub async fn topics(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        self.inner.topics(app, device).await
    }

    /// Changes the topics of a device, and answers them all, by name; safe when answered. `None`: not known. `Invalid`: one is no
    /// name, or they would be too many.
    pub async fn change_topics(
        &self,
        app: AppId,
        device: DeviceId,
        change: TopicsChange,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        self.inner.change_topics(app, device, change).await
    }

    /// What an attached device asks for by itself: it joins and leaves as far as its app allows. Answers all its topics;
    /// `None`: it was revoked meanwhile.
    pub async fn subscribe(
        &self,
        device: DeviceId,
        join: Vec<String>,
        leave: Vec<String>,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        self.inner.subscribe(device, join, leave).await
    }

    /// Changes a device; all of it is safe together. `None`: not known. `Invalid`: the user or the name cannot be.
    pub async fn change_device(
        &self,
        app: AppId,
        device: DeviceId,
        change: DeviceChange,
    ) -> Result<Option<DeviceChanged>, RuntimeError> {
        self.inner.change_device(app, device, change).await
    }

    /// Gives a device a new secret. The one before stays good for `overlap` (`None`: as set); with none the session is
    /// cut. An older one that was still good ends. `None`: not known. `Invalid`: the time is too long.
    pub async fn rotate_secret(
        &self,
        app: AppId,
        device: DeviceId,
        overlap: Option<Duration>,
    ) -> Result<Option<Requested<Rotated>>, RuntimeError> {
        self.inner.rotate_secret(app, device, overlap).await
    }

    /// The devices of a user, a page at a time, with what waits for each. A user that nobody knows has none.
    pub async fn user(
        &self,
        app: AppId,
        user: &str,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<UserView, RuntimeError> {
        self.inner.user(app, user, after, limit).await
    }

    /// Erases everything held of a user: each of its devices is revoked. Answers how many there were, once all of it is
    /// safe. After a failure or a crash half way, doing it again finishes.
    pub async fn erase_user(&self, app: AppId, user: &str) -> Result<u32, RuntimeError> {
        self.inner.erase_user(app, user).await
    }

    /// Revokes a device: cuts its session, empties its mailbox. `false`: not known.
    pub async fn revoke_device(&self, app: AppId, device: DeviceId) -> Result<bool, RuntimeError> {
        self.inner.revoke_device(app, device).await
    }

    /// Checks an API key (`bw_…`). Never waits: keys are in memory.
    #[expect(clippy::unused_async, reason = "other identities will have to ask")]
    pub async fn authenticate_key(&self, key: &str) -> Result<Principal, WhoError> {
        self.inner.authenticate_key(key)
    }

    /// Counts one ping of a caller. The error: an allowance is used up, and the ping is not to be published.
    pub fn admit(&self, who: &Principal) -> Result<(), Throttle> {
        self.inner.admit(who)
    }

    /// What a caller may still send.
    #[must_use]
    pub fn allowances(&self, who: &Principal) -> SmallVec<[AllowanceView; 2]> {
        self.inner.allowances(who)
    }

    /// Makes an API key. `Invalid`: the name or the scopes cannot be, or there are too many keys.
    pub async fn create_key(
        &self,
        app: AppId,
        name: &str,
        scopes: Scopes,
    ) -> Result<Requested<KeyView>, RuntimeError> {
        self.inner.create_key(app, name, scopes).await
    }

    /// The API keys of this app, oldest first.
    #[expect(clippy::unused_async, reason = "the other calls of the directory wait")]
    pub async fn keys(&self, app: AppId) -> Result<Vec<KeyView>, RuntimeError> {
        Ok(self.inner.keys(app))
    }

    /// Revokes an API key, at once. `false`: not known.
    pub async fn revoke_key(&self, app: AppId, id: &str) -> Result<bool, RuntimeError> {
        self.inner.revoke_key(app, id).await
    }

    /// Makes a key with every scope for app `default` if there is no key at all, and answers its text.
    pub async fn ensure_bootstrap_key(&self) -> Result<Option<String>, RuntimeError> {
        self.inner.ensure_bootstrap_key().await
    }
}

/// A span in whole milliseconds.
pub(super) fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
