//! Apps, devices, users and API keys.
//!
//! Secrets are shown once and kept as keyed hashes. Apps and keys are few and live in memory, which is the truth while
//! the server runs; devices are many and live in the store, with a bounded cache of who owns which.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};
use std::time::Duration;

use data_encoding::{Encoding, Specification};
use smallvec::SmallVec;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard, oneshot};
use zeroize::Zeroizing;

use super::api::{
    Authenticated, DeviceChange, DeviceChanged, DeviceQuery, DeviceView, Identity, KeyView,
    Principal, Requested, Rotated, RuntimeError, UserView, Waiting, WhoError,
};
use super::cache::Generations;
use super::erasing::Erasing;
use super::handle::{Inner, millis};
use super::hashing::equal;
use super::meters::Who;
use super::rate::Rate;
use super::settings::{KEYS_MAX, NAME_MAX_BYTES, SECRET_OVERLAP_MAX, USER_MAX_BYTES};
use super::shard::{Emptied, Input};
use super::{locked, reply};
use crate::delivery::{AppId, CommitFailure, DeviceId, MailboxRead};
use crate::ports::{
    Batch, DeviceFilter, DeviceRecord, Erased, Erasure, KeyRecord, Op, Page, PreviousSecret,
    Scopes, Seen, StoreHealth, TopicChange,
};
use crate::telemetry::metrics as names;

/// Device ids in one generation of the cache of users, an entry counting as one more: 16 MiB at worst.
const USER_CACHE_WEIGHT: usize = 200_000;
/// Bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Longest secret or key that is looked at: anything longer is not ours.
const SECRET_TEXT_MAX: usize = 128;
/// What a secret of a device begins with, so that one found somewhere is recognised.
const DEVICE_PREFIX: &str = "bds_";
/// What an API key begins with.
const KEY_PREFIX: &str = "bw_";
/// Most devices of one page.
const DEVICES_PAGE_MAX: usize = 1_000;

const FOR_DEVICE: &[u8] = b"device secret";
const FOR_KEY: &[u8] = b"api key";

/// RFC 4648 base32, lower case, without padding: no character needs quoting anywhere.
static BASE32: LazyLock<Encoding> = LazyLock::new(|| {
    let mut spec = Specification::new();
    spec.symbols.push_str("abcdefghijklmnopqrstuvwxyz234567");
    spec.encoding()
        .expect("a constant alphabet of 32 distinct symbols")
});

/// All API keys by their public part.
pub(super) type Keys = HashMap<[u8; 10], Key>;

/// An API key, and how much was sent with it.
#[derive(Clone)]
pub(super) struct Key {
    record: Arc<KeyRecord>,
    rate: Arc<Rate>,
}

impl Key {
    fn new(record: KeyRecord) -> Key {
        Key {
            record: Arc::new(record),
            rate: Arc::default(),
        }
    }
}

/// Devices read at a time for a list with a filter.
const DEVICES_STEP: usize = 500;
/// Devices that one call of a list with a filter looks at, so that nobody holds a reading thread for long.
const DEVICES_LOOK_MAX: usize = 10_000;
/// Devices of a user that are erased at the same time.
const ERASED_AT_ONCE: usize = 64;
/// How often somebody who waits for a shard looks whether the store has failed meanwhile.
const FAILURE_LOOK: Duration = Duration::from_secs(1);
/// Locks for changes of devices: two devices share one now and then, which costs a moment.
const DEVICE_LOCKS: usize = 256;
/// Gates for pings to users, shared in the same way.
const USER_GATES: usize = 1_024;

/// The devices of one user.
type Owned = Arc<[DeviceId]>;

/// Who owns which devices, as far as somebody asked lately.
pub(super) struct Users {
    cache: Mutex<Generations<(AppId, String), Owned>>,
    /// Raised by every registration: what was read before it must not be cached after it.
    epoch: AtomicU64,
    /// Held while the record of a device is read, changed and written.
    locks: Box<[tokio::sync::Mutex<()>]>,
    /// Held by pings to users from the look-up of the devices until the notifications are with the shards, and alone
    /// by whoever gives a device to another user.
    gates: Box<[RwLock<()>]>,
    erasing: Erasing,
    hasher: RandomState,
}

impl Users {
    /// The lock under which the record of a device changes.
    pub(super) fn changing(&self, device: DeviceId) -> &tokio::sync::Mutex<()> {
        &self.locks[usize::from(device.0[15]) % DEVICE_LOCKS]
    }

    /// The locks of several devices. Everybody who takes more than one takes them in this order, so nobody waits in a
    /// circle.
    pub(super) async fn changing_all(
        &self,
        devices: &[DeviceId],
    ) -> Vec<tokio::sync::MutexGuard<'_, ()>> {
        let mut places: Vec<usize> = devices
            .iter()
            .map(|device| usize::from(device.0[15]) % DEVICE_LOCKS)
            .collect();
        places.sort_unstable();
        places.dedup();
        let mut guards = Vec::with_capacity(places.len());
        for place in places {
            guards.push(self.locks[place].lock().await);
        }
        guards
    }

    fn gate(&self, app: AppId, user: &str) -> usize {
        #[expect(clippy::cast_possible_truncation, reason = "any bits of a hash do")]
        let hash = self.hasher.hash_one((app, user)) as usize;
        hash % USER_GATES
    }

    /// Keeps these users' devices where they are, until the guards are dropped. Everybody takes gates in one order, so nobody
    /// waits in a circle.
    pub(super) async fn hold_gates(
        &self,
        app: AppId,
        users: &[String],
    ) -> SmallVec<[RwLockReadGuard<'_, ()>; 1]> {
        let mut places: SmallVec<[usize; 1]> =
            users.iter().map(|user| self.gate(app, user)).collect();
        places.sort_unstable();
        places.dedup();
        let mut guards = SmallVec::with_capacity(places.len());
        for place in places {
            guards.push(self.gates[place].read().await);
        }
        guards
    }

    /// Waits until nobody is on the way between these users and their devices, and lets nobody in.
    async fn close_gates(
        &self,
        users: [(AppId, &str); 2],
    ) -> SmallVec<[RwLockWriteGuard<'_, ()>; 2]> {
        let mut places: SmallVec<[usize; 2]> = users
            .iter()
            .map(|(app, user)| self.gate(*app, user))
            .collect();
        places.sort_unstable();
        places.dedup();
        let mut guards = SmallVec::new();
        for place in places {
            guards.push(self.gates[place].write().await);
        }
        guards
    }

    pub(super) fn new() -> Users {
        Users {
            cache: Mutex::new(Generations::new(USER_CACHE_WEIGHT)),
            epoch: AtomicU64::new(0),
            locks: (0..DEVICE_LOCKS)
                .map(|_| tokio::sync::Mutex::default())
                .collect(),
            gates: (0..USER_GATES).map(|_| RwLock::default()).collect(),
            erasing: Erasing::default(),
            hasher: RandomState::new(),
        }
    }

    fn changed(&self, app: AppId, user: &str) {
        let mut cache = locked(&self.cache);
        self.epoch.fetch_add(1, Ordering::SeqCst);
        cache.remove(&(app, user.to_owned()));
    }
}

impl Inner {
    // ---- Devices -------------------------------------------------------------------------------------------------

    pub(super) async fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> Result<Authenticated, WhoError> {
        if self.draining() {
            return Err(WhoError::Draining);
        }
        let Identity::Secret(secret) = identity;
        let at = self.shared.clock.now();
        // The same work whether or not the device exists, so that time tells nothing.
        let secret = secret
            .get(..secret.len().min(SECRET_TEXT_MAX))
            .unwrap_or("");
        let shown = self.hash_key.hash(FOR_DEVICE, &device.0, secret.as_bytes());
        let record = self
            .shared
            .reading
            .read(move |store| store.device(device))
            .await
            .map_err(|_| WhoError::StoreUnavailable)?;
        let (exists, hash, previous) = record.map_or((false, [0; 32], Vec::new()), |record| {
            (true, record.secret_hash, record.previous_secrets)
        });
        // As many are compared in any case.
        let mut fits = equal(&hash, &shown) & exists;
        let mut until_ms = None;
        for place in 0..DeviceRecord::PREVIOUS_SECRETS_MAX {
            let (overlaps, hash, end_ms) = previous.get(place).map_or((false, [0; 32], 0), |one| {
                (at.unix_ms < one.until_ms, one.hash, one.until_ms)
            });
            if equal(&hash, &shown) & overlaps {
                fits = true;
                until_ms = Some(end_ms);
            }
        }
        self.shared.meters.authenticated(Who::Device, fits);
        fits.then_some(Authenticated {
            device,
            at: at.mono,
            until_ms,
        })
        .ok_or(WhoError::Unauthorized)
    }

    pub(super) async fn create_device(
        self: &Arc<Inner>,
        app: AppId,
        user: &str,
        name: Option<&str>,
    ) -> Result<Requested<DeviceView>, RuntimeError> {
        check_user(user)?;
        check_name(name.unwrap_or(""))?;
        if self.app(app).is_none() {
            return Err(RuntimeError::Invalid("app: there is no such app"));
        }
        let mut id = [0; 16];
        self.entropy.fill(&mut id);
        let device = DeviceId(id);
        let secret = self.secret(DEVICE_PREFIX);
        let record = DeviceRecord {
            id: device,
            app,
            user: user.to_owned(),
            name: name.filter(|name| !name.is_empty()).map(str::to_owned),
            created_ms: self.shared.clock.now().unix_ms,
            secret_hash: self.hash_key.hash(FOR_DEVICE, &device.0, secret.as_bytes()),
            previous_secrets: Vec::new(),
        };
        let view = self.device_view(&record, None);
        let claim = self.claim_device(app)?;
        // Before it can be found in the store, so that the count after a start passes over it.
        self.shard(device).inbox.push(Input::Made(device));
        let op = Op::PutDevice {
            record,
            fresh: true,
            previous_user: None,
        };
        let joined = Op::PutJoined(app, device, self.audiences.stamp());
        let inner = Arc::clone(self);
        let user = user.to_owned();
        // It is counted if it becomes safe, even if nobody waits for that any more.
        let made = move || {
            claim.keep();
            inner.users.changed(app, &user);
        };
        self.commit(vec![op, joined], made).await?;
        Ok(Requested { made: view, secret })
    }

    pub(super) async fn device(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<DeviceView>, RuntimeError> {
        let Some(record) = self.device_record(app, device).await? else {
            return Ok(None);
        };
        let mut views = self.views(vec![record], true).await?;
        Ok(views.pop())
    }

    pub(super) async fn devices(
        &self,
        app: AppId,
        query: &DeviceQuery,
        mut after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceView, DeviceId>, RuntimeError> {
        let limit = limit.clamp(1, DEVICES_PAGE_MAX);
        let picky = query.attached.is_some()
            || query.topic.is_some()
            || query.seen_before_ms.is_some()
            || query.seen_after_ms.is_some();
        let step = if picky { DEVICES_STEP } else { limit };
        let mut items = Vec::new();
        let mut looked_at = 0;
        loop {
            let filter = DeviceFilter {
                user: query.user.clone(),
                topic: query.topic.clone(),
            };
            let page = self
                .shared
                .reading
                .read(move |store| store.devices(app, &filter, after, step))
                .await?;
            looked_at += page.items.len();
            for view in self.views(page.items, false).await? {
                if !fits(&view, query) {
                    continue;
                }
                let last = view.device;
                items.push(view);
                if items.len() == limit {
                    // Perhaps nothing follows; then the next page is empty.
                    let next = Some(last).filter(|_| picky).or(page.next);
                    return Ok(Page { items, next });
                }
            }
            if page.next.is_none() || !picky || looked_at >= DEVICES_LOOK_MAX {
                return Ok(Page {
                    items,
                    next: page.next,
                });
            }
            after = page.next;
        }
    }

    pub(super) async fn user(
        &self,
        app: AppId,
        user: &str,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<UserView, RuntimeError> {
        check_user(user)?;
        let filter = DeviceFilter {
            user: Some(user.to_owned()),
            topic: None,
        };
        let limit = limit.clamp(1, DEVICES_PAGE_MAX);
        let page = self
            .shared
            .reading
            .read(move |store| store.devices(app, &filter, after, limit))
            .await?;
        Ok(UserView {
            devices: self.views(page.items, true).await?,
            next: page.next,
        })
    }

    // ---- Changes -------------------------------------------------------------------------------------------------

    /// Runs `work` to its end even if the caller goes away or has waited long enough.
    pub(super) async fn to_the_end<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, RuntimeError>> + Send + 'static,
    ) -> Result<T, RuntimeError> {
        let work = tokio::spawn(work);
        self.in_time(async { work.await.unwrap_or(Err(RuntimeError::StoreUnavailable)) })
            .await
    }

    pub(super) async fn change_device(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        change: DeviceChange,
    ) -> Result<Option<DeviceChanged>, RuntimeError> {
        if let Some(user) = &change.user {
            check_user(user)?;
        }
        if let Some(Some(name)) = &change.name {
            check_name(name)?;
        }
        let inner = Arc::clone(self);
        self.to_the_end(async move { inner.changed_device(app, device, change).await })
            .await
    }

    async fn changed_device(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        change: DeviceChange,
    ) -> Result<Option<DeviceChanged>, RuntimeError> {
        let _alone = self.users.changing(device).lock().await;
        let Some(before) = self.device_record(app, device).await? else {
            return Ok(None);
        };
        let mut record = before.clone();
        if let Some(user) = change.user {
            record.user = user;
        }
        if let Some(name) = change.name {
            record.name = name.filter(|name| !name.is_empty());
        }
        let mut revoked = 0;
        if record.user != before.user {
            // Pings to either user are handed over before this, or resolved after it.
            let _gates = self
                .users
                .close_gates([(app, before.user.as_str()), (app, record.user.as_str())])
                .await;
            let op = Op::PutDevice {
                record: record.clone(),
                fresh: false,
                previous_user: Some(before.user.clone()),
            };
            match change.waiting {
                Waiting::Keep => self.commit_fully(vec![op], || {}).await?,
                Waiting::Revoke => {
                    // What a mailbox lets go of is written when there is room, however long that takes: the gates would be held,
                    // and others with them.
                    if matches!(self.shared.store.health(), StoreHealth::Full { .. }) {
                        return Err(RuntimeError::NoRoom);
                    }
                    let emptied = self.empty(app, device, false, vec![op.clone()]).await?;
                    if !emptied.written {
                        // A record without a mailbox: nothing waits.
                        self.commit_fully(vec![op], || {}).await?;
                    }
                    revoked = emptied.revoked;
                }
            }
            self.users.changed(app, &before.user);
            self.users.changed(app, &record.user);
            tracing::info!(%device, revoked, waiting = ?change.waiting, "device given to another user");
        } else if record != before {
            let op = Op::PutDevice {
                record: record.clone(),
                fresh: false,
                previous_user: None,
            };
            self.commit_fully(vec![op], || {}).await?;
        }
        let view = self.views(vec![record], true).await?.pop();
        Ok(view.map(|device| DeviceChanged { device, revoked }))
    }

    pub(super) async fn rotate_secret(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        overlap: Option<Duration>,
    ) -> Result<Option<Requested<Rotated>>, RuntimeError> {
        let overlap = overlap.unwrap_or_else(|| self.limits.load().secret_overlap);
        if overlap > SECRET_OVERLAP_MAX {
            return Err(RuntimeError::Invalid(
                "overlap_s: at most 7776000 seconds (90 days)",
            ));
        }
        let inner = Arc::clone(self);
        self.to_the_end(async move { inner.rotated_secret(app, device, overlap).await })
            .await
    }

    async fn rotated_secret(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        overlap: Duration,
    ) -> Result<Option<Requested<Rotated>>, RuntimeError> {
        let _alone = self.users.changing(device).lock().await;
        let Some(mut record) = self.device_record(app, device).await? else {
            return Ok(None);
        };
        let now_ms = self.shared.clock.now().unix_ms;
        let previous_until_ms =
            (!overlap.is_zero()).then(|| now_ms.saturating_add(millis(overlap)));
        let secret = self.secret(DEVICE_PREFIX);
        match previous_until_ms {
            Some(until_ms) => {
                // The older ones stay good until their own end: nobody knows which of them the device has, when an answer
                // got lost and the rotation was repeated.
                record.previous_secrets.retain(|one| now_ms < one.until_ms);
                if record.previous_secrets.len() >= DeviceRecord::PREVIOUS_SECRETS_MAX {
                    return Err(RuntimeError::Invalid(
                        "the device has five good secrets; wait until one has ended, or end all of them with overlap_s 0",
                    ));
                }
                record.previous_secrets.push(PreviousSecret {
                    hash: record.secret_hash,
                    until_ms,
                });
            }
            None => record.previous_secrets.clear(),
        }
        record.secret_hash = self.hash_key.hash(FOR_DEVICE, &device.0, secret.as_bytes());
        let op = Op::PutDevice {
            record,
            fresh: false,
            previous_user: None,
        };
        self.commit_fully(vec![op], || {}).await?;
        let (answer, told) = oneshot::channel();
        self.shard(device).inbox.push(Input::EndSecret {
            device,
            until_ms: previous_until_ms.unwrap_or(0),
            answer,
        });
        // A shard that has stopped has no session.
        let _ = told.await;
        metrics::counter!(names::SECRETS_ROTATED_TOTAL).increment(1);
        tracing::info!(%device, overlap_s = overlap.as_secs(), "secret of a device rotated");
        Ok(Some(Requested {
            made: Rotated {
                device,
                previous_until_ms,
            },
            secret,
        }))
    }

    /// Runs to its end even if the caller goes away.
    pub(super) async fn revoke_device(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
    ) -> Result<bool, RuntimeError> {
        let inner = Arc::clone(self);
        self.to_the_end(async move { inner.revoked_device(app, device, None).await })
            .await
    }

    /// Record and mailbox go in one frame. With `owner` only while the device belongs to that user.
    async fn revoked_device(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
        owner: Option<&str>,
    ) -> Result<bool, RuntimeError> {
        let _alone = self.users.changing(device).lock().await;
        let record = match (self.device_record(app, device).await?, owner) {
            (None, None) => return Ok(false),
            // On the user's list, and its record cannot be read: what is left of it goes as well.
            (None, Some(owner)) => DeviceRecord {
                id: device,
                app,
                user: owner.to_owned(),
                name: None,
                created_ms: 0,
                secret_hash: [0; 32],
                previous_secrets: Vec::new(),
            },
            (Some(record), Some(owner)) if record.user != owner => {
                // Given to somebody else meanwhile. Writing that again takes it off this user's list, if it is still there.
                let op = Op::PutDevice {
                    record,
                    fresh: false,
                    previous_user: Some(owner.to_owned()),
                };
                self.commit_fully(vec![op], || {}).await?;
                return Ok(false);
            }
            (Some(record), _) => record,
        };
        let user = record.user.clone();
        let (topics, withdrawals) = self
            .shared
            .reading
            .read(move |store| Ok((store.topics(device)?, store.withdrawals(device)?)))
            .await?;
        let mut ops = vec![
            Op::DropDevice(record),
            Op::PutTopics(TopicChange::leave_all(app, device, topics)),
            self.erased(app, Erased::Device(device)),
        ];
        ops.extend(
            withdrawals
                .into_iter()
                .map(|withdrawal| Op::DropWithdrawal { device, withdrawal }),
        );
        let emptied = self.empty(app, device, true, ops.clone()).await?;
        if !emptied.written {
            // A record without a mailbox: an earlier version crashed between the two.
            self.commit_fully(ops, || {}).await?;
        }
        self.users.changed(app, &user);
        tracing::info!(%device, revoked = emptied.revoked, "device revoked");
        Ok(true)
    }

    /// A user may have many devices: who waits for them is answered `StoreBusy` after the accept wait, and it goes on. Whoever asks
    /// again meanwhile waits for the same work, as long.
    pub(super) async fn erase_user(
        self: &Arc<Inner>,
        app: AppId,
        user: &str,
    ) -> Result<u32, RuntimeError> {
        check_user(user)?;
        let inner = Arc::clone(self);
        let user = user.to_owned();
        self.in_time(async {
            let alone = self.users.erasing.alone(app, &user).await;
            inner
                .to_the_end({
                    let inner = Arc::clone(&inner);
                    async move {
                        let erased = inner.erased_user(app, user).await;
                        drop(alone);
                        erased
                    }
                })
                .await
        })
        .await
    }

    async fn erased_user(self: &Arc<Inner>, app: AppId, user: String) -> Result<u32, RuntimeError> {
        // First, so that a restore finishes what a crash breaks off here. Of the user only a hash stays. Without any room on the disk it
        // is refused here, before anything waits; while only new pings are refused, erasures go on.
        let hash = self.hash_key.erased_user(app, &user);
        let note = self.erased(app, Erased::User(hash));
        self.commit_fully(vec![note], || {}).await?;
        let mut erased = 0u32;
        loop {
            let of = user.clone();
            let devices = self
                .shared
                .reading
                .read(move |store| store.user_devices(app, &of, ERASED_AT_ONCE))
                .await?;
            if devices.is_empty() {
                break;
            }
            let mut wiped = 0;
            let mut failed = None;
            // At the same time, so that one frame serves many of them.
            let revoking = devices
                .into_iter()
                .map(|device| self.revoked_device(app, device, Some(&user)));
            for result in futures_util::future::join_all(revoking).await {
                match result {
                    Ok(true) => wiped += 1,
                    Ok(false) => {}
                    Err(error) => failed = Some(error),
                }
            }
            if let Some(error) = failed {
                return Err(error);
            }
            erased = erased.saturating_add(wiped);
        }
        tracing::info!(devices = erased, "user erased");
        Ok(erased)
    }

    /// Empties a mailbox and writes `ops` in the same frame. The caller holds the device's lock.
    async fn empty(
        &self,
        app: AppId,
        device: DeviceId,
        forget: bool,
        ops: Batch,
    ) -> Result<Emptied, RuntimeError> {
        let (answer, mut emptied) = oneshot::channel();
        self.shard(device).inbox.push(Input::Empty {
            app,
            device,
            forget,
            ops,
            answer,
        });
        loop {
            match tokio::time::timeout(FAILURE_LOOK, &mut emptied).await {
                // The shard has stopped, perhaps with the frame on its way: `Draining` would say that nothing happened.
                Ok(answer) => return answer.map_err(|_| RuntimeError::StoreUnavailable),
                // Nothing that waits then is ever answered.
                Err(_) if self.shared.failed.load(Ordering::Relaxed) => {
                    return Err(RuntimeError::StoreUnavailable);
                }
                Err(_) => {}
            }
        }
    }

    async fn device_record(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<DeviceRecord>, RuntimeError> {
        let record = self
            .shared
            .reading
            .read(move |store| store.device(device))
            .await?;
        Ok(record.filter(|record| record.app == app))
    }

    /// Devices as they are shown; `counts`: with what waits for each.
    async fn views(
        &self,
        records: Vec<DeviceRecord>,
        counts: bool,
    ) -> Result<Vec<DeviceView>, RuntimeError> {
        if records.is_empty() {
            return Ok(Vec::new());
        }
        let ids: Vec<DeviceId> = records.iter().map(|record| record.id).collect();
        // Before the store: what is written meanwhile is found there.
        let noted: Vec<Option<Seen>> = ids.iter().map(|&id| self.shard(id).seen(id)).collect();
        let (stored, waiting) = self
            .shared
            .reading
            .read(move |store| {
                let stored = store.seen(&ids)?;
                let mut waiting = Vec::new();
                for &device in ids.iter().filter(|_| counts) {
                    let view = store.read_mailbox(&MailboxRead {
                        device,
                        all: false,
                        ping: None,
                        collapse: None,
                        lowest: None,
                        rows: Vec::new(),
                        withdrawals: false,
                    })?;
                    waiting.push(view.summary.map_or(0, |summary| summary.count));
                }
                Ok((stored, waiting))
            })
            .await?;
        let mut views = Vec::with_capacity(records.len());
        for (place, (record, (noted, stored))) in records
            .iter()
            .zip(noted.into_iter().zip(stored))
            .enumerate()
        {
            let mut view = self.device_view(record, noted.or(stored));
            view.waiting = waiting.get(place).copied();
            views.push(view);
        }
        Ok(views)
    }

    fn device_view(&self, record: &DeviceRecord, seen: Option<Seen>) -> DeviceView {
        let presence = self.shard(record.id).presence(record.id);
        let now_ms = self.shared.clock.now().unix_ms;
        let seen = match presence {
            Some(presence) => Some(Seen {
                at_ms: now_ms,
                carrier: presence.carrier,
                agent: seen.and_then(|seen| seen.agent),
            }),
            None => seen,
        };
        DeviceView {
            device: record.id,
            user: record.user.clone(),
            name: record.name.clone(),
            created_ms: record.created_ms,
            attached: presence.map(|presence| (presence.carrier.as_str(), presence.since_ms)),
            seen,
            previous_secret_until_ms: record
                .previous_secrets
                .iter()
                .map(|previous| previous.until_ms)
                .filter(|until_ms| now_ms < *until_ms)
                .max(),
            waiting: None,
        }
    }

    /// The devices of each of `users`, at most `limit` of each. An impossible user has none.
    pub(super) async fn user_devices(
        self: &Arc<Inner>,
        app: AppId,
        users: &[String],
        limit: usize,
    ) -> Result<Vec<Owned>, RuntimeError> {
        let none: Owned = Arc::from([]);
        let mut found = vec![none; users.len()];
        let mut missing: Vec<(usize, String)> = Vec::new();
        let epoch = {
            let mut cache = locked(&self.users.cache);
            for (place, user) in users.iter().enumerate() {
                if check_user(user).is_err() {
                    continue;
                }
                match cache.get(&(app, user.clone())) {
                    Some(devices) => found[place] = devices,
                    None => missing.push((place, user.clone())),
                }
            }
            self.users.epoch.load(Ordering::SeqCst)
        };
        if missing.is_empty() {
            return Ok(found);
        }
        let read = self
            .shared
            .reading
            .read(move |store| {
                let mut read = Vec::with_capacity(missing.len());
                for (place, user) in missing {
                    let devices: Owned = store.user_devices(app, &user, limit)?.into();
                    read.push((place, user, devices));
                }
                Ok(read)
            })
            .await?;
        let mut cache = locked(&self.users.cache);
        let current = self.users.epoch.load(Ordering::SeqCst) == epoch;
        for (place, user, devices) in read {
            // A list that was cut is not the user's list.
            if current && devices.len() < limit {
                let weight = devices.len() + 1;
                cache.insert((app, user), Arc::clone(&devices), weight);
            }
            found[place] = devices;
        }
        Ok(found)
    }

    // ---- API keys ------------------------------------------------------------------------------------------------

    pub(super) fn authenticate_key(&self, key: &str) -> Result<Principal, WhoError> {
        let parsed = parse_key(key);
        let (id, secret) = parsed.unwrap_or(([0; 10], ""));
        // The same work whether or not the key exists, so that time tells nothing.
        let shown = self.hash_key.hash(FOR_KEY, &id, secret.as_bytes());
        let keys = self.keys.load();
        let known = keys.get(&id);
        let hash = known.map_or([0; 32], |key| key.record.secret_hash);
        let fits = equal(&hash, &shown) && known.is_some() && parsed.is_some();
        self.shared.meters.authenticated(Who::Key, fits);
        known
            .filter(|_| fits)
            .map(|Key { record, rate }| Principal {
                app: record.app,
                scopes: record.scopes,
                key: BASE32.encode(&record.id),
                rate: Arc::clone(rate),
            })
            .ok_or(WhoError::Unauthorized)
    }

    /// Whether the key of a caller is still good.
    pub(super) fn key_lives(&self, who: &Principal) -> bool {
        let id = parse_key_id(who.key());
        id.is_some_and(|id| self.keys.load().contains_key(&id))
    }

    pub(super) async fn create_key(
        self: &Arc<Inner>,
        app: AppId,
        name: &str,
        scopes: Scopes,
    ) -> Result<Requested<KeyView>, RuntimeError> {
        check_name(name)?;
        if scopes == Scopes::NONE {
            return Err(RuntimeError::Invalid("scopes: at least one is needed"));
        }
        if self.app(app).is_none() {
            return Err(RuntimeError::Invalid("app: there is no such app"));
        }
        if self.keys.load().len() >= KEYS_MAX {
            return Err(RuntimeError::Invalid(
                "keys: there are too many; revoke one first",
            ));
        }
        let mut id = [0; 10];
        self.entropy.fill(&mut id);
        let secret = self.secret("");
        let record = KeyRecord {
            id,
            app,
            scopes,
            name: name.to_owned(),
            created_ms: self.shared.clock.now().unix_ms,
            secret_hash: self.hash_key.hash(FOR_KEY, &id, secret.as_bytes()),
        };
        let view = key_view(&record);
        let inner = Arc::clone(self);
        let kept = Key::new(record.clone());
        self.commit(vec![Op::PutKey(record)], move || {
            inner.keys.rcu(|keys| {
                let mut keys = Keys::clone(keys);
                keys.insert(id, kept.clone());
                keys
            });
        })
        .await?;
        let text = format!("{KEY_PREFIX}{}_{secret}", view.id);
        Ok(Requested {
            made: view,
            secret: text,
        })
    }

    pub(super) fn keys(&self, app: AppId) -> Vec<KeyView> {
        let mut views: Vec<KeyView> = self
            .keys
            .load()
            .values()
            .filter(|key| key.record.app == app)
            .map(|key| key_view(&key.record))
            .collect();
        views.sort_by(|a, b| (a.created_ms, &a.id).cmp(&(b.created_ms, &b.id)));
        views
    }

    pub(super) async fn revoke_key(
        self: &Arc<Inner>,
        app: AppId,
        id: &str,
    ) -> Result<bool, RuntimeError> {
        let Some(id) = parse_key_id(id) else {
            return Ok(false);
        };
        if self
            .keys
            .load()
            .get(&id)
            .is_none_or(|key| key.record.app != app)
        {
            return Ok(false);
        }
        let inner = Arc::clone(self);
        let erased = self.erased(app, Erased::Key(id));
        self.commit(vec![Op::DropKey(app, id), erased], move || {
            inner.keys.rcu(|keys| {
                let mut keys = Keys::clone(keys);
                keys.remove(&id);
                keys
            });
            // Streams that were opened with it end.
            inner.followers.wake();
        })
        .await?;
        Ok(true)
    }

    pub(super) async fn ensure_bootstrap_key(
        self: &Arc<Inner>,
    ) -> Result<Option<String>, RuntimeError> {
        if !self.keys.load().is_empty() {
            return Ok(None);
        }
        let key = self
            .create_key(AppId::DEFAULT, "bootstrap", Scopes::ALL)
            .await?;
        Ok(Some(key.secret))
    }

    // ---- Both ----------------------------------------------------------------------------------------------------

    /// A new secret as text.
    fn secret(&self, prefix: &str) -> String {
        let mut bytes = Zeroizing::new([0; SECRET_BYTES]);
        self.entropy.fill(bytes.as_mut());
        format!("{prefix}{}", BASE32.encode(bytes.as_ref()))
    }

    /// Notes that something is erased, for restores of backups that still have it.
    fn erased(&self, app: AppId, what: Erased) -> Op {
        let at_ms = self.shared.clock.now().unix_ms;
        self.erased_until(app, what, at_ms.saturating_add(self.erasures_keep_ms))
    }

    /// The same for what a backup is of no use for after `until_ms`.
    pub(super) fn erased_until(&self, app: AppId, what: Erased, until_ms: u64) -> Op {
        Op::Erase(Erasure {
            app,
            what,
            at_ms: self.shared.clock.now().unix_ms,
            until_ms,
        })
    }

    /// Commits a batch that stands alone; `safe` runs as soon as it is safe, whether or not the caller still waits.
    pub(super) async fn commit(
        &self,
        batch: Batch,
        safe: impl FnOnce() + Send + 'static,
    ) -> Result<(), RuntimeError> {
        self.in_time(self.commit_fully(batch, safe)).await
    }

    /// As [`Inner::commit`], however long it takes: for whoever must know how it ended.
    pub(super) async fn commit_fully(
        &self,
        batch: Batch,
        safe: impl FnOnce() + Send + 'static,
    ) -> Result<(), RuntimeError> {
        let (answer, answered) = oneshot::channel();
        self.shared.store.commit(
            batch,
            Box::new(move |result| {
                if result.is_ok() {
                    safe();
                }
                reply(answer, result);
            }),
        );
        let answered = answered.await.map_err(|_| RuntimeError::StoreUnavailable)?;
        answered.map_err(|error| match error {
            CommitFailure::NoRoom => RuntimeError::NoRoom,
            CommitFailure::Failed => RuntimeError::StoreUnavailable,
        })
    }
}

/// The keys as they are kept in memory.
pub(super) fn by_id(keys: Vec<KeyRecord>) -> Keys {
    keys.into_iter()
        .map(|record| (record.id, Key::new(record)))
        .collect()
}

/// Whether a device is one of those asked for.
fn fits(view: &DeviceView, query: &DeviceQuery) -> bool {
    let seen_ms = view.seen.as_ref().map(|seen| seen.at_ms);
    query
        .attached
        .is_none_or(|attached| attached == view.attached.is_some())
        && query
            .seen_before_ms
            .is_none_or(|before| seen_ms.unwrap_or(view.created_ms) < before)
        && query
            .seen_after_ms
            .is_none_or(|after| seen_ms.is_some_and(|seen| seen >= after))
}

fn check_user(user: &str) -> Result<(), RuntimeError> {
    if user.is_empty() || user.len() > USER_MAX_BYTES || user.chars().any(char::is_control) {
        return Err(RuntimeError::Invalid(
            "user: 1 to 255 bytes without control characters",
        ));
    }
    Ok(())
}

fn check_name(name: &str) -> Result<(), RuntimeError> {
    if name.len() > NAME_MAX_BYTES || name.chars().any(char::is_control) {
        return Err(RuntimeError::Invalid(
            "name: at most 255 bytes without control characters",
        ));
    }
    Ok(())
}

fn parse_key(text: &str) -> Option<([u8; 10], &str)> {
    if text.len() > SECRET_TEXT_MAX {
        return None;
    }
    let (id, secret) = text.strip_prefix(KEY_PREFIX)?.split_once('_')?;
    Some((parse_key_id(id)?, secret))
}

fn parse_key_id(text: &str) -> Option<[u8; 10]> {
    BASE32.decode(text.as_bytes()).ok()?.try_into().ok()
}

fn key_view(record: &KeyRecord) -> KeyView {
    KeyView {
        id: BASE32.encode(&record.id),
        scopes: record.scopes,
        name: record.name.clone(),
        created_ms: record.created_ms,
    }
}
