//! Apps, devices, users and API keys.
//!
//! Secrets are shown once and kept as keyed hashes. Apps and keys are few and live in memory, which is the truth while
//! the server runs; devices are many and live in the store, with a bounded cache of who owns which.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Mutex};

use data_encoding::{Encoding, Specification};
use tokio::sync::oneshot;
use zeroize::Zeroizing;

use super::api::{
    Authenticated, DeviceView, Identity, KeyView, Principal, Requested, RuntimeError, WhoError,
};
use super::cache::Generations;
use super::handle::Inner;
use super::hashing::equal;
use super::rate::Rate;
use super::settings::{KEYS_MAX, NAME_MAX_BYTES, USER_MAX_BYTES};
use super::shard::Input;
use super::{locked, reply};
use crate::delivery::{AppId, CommitFailure, DeviceId};
use crate::ports::{
    Batch, DeviceFilter, DeviceRecord, Erased, Erasure, KeyRecord, Op, Page, Scopes,
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

/// The devices of one user.
type Owned = Arc<[DeviceId]>;

/// Who owns which devices, as far as somebody asked lately.
pub(super) struct Users {
    cache: Mutex<Generations<(AppId, String), Owned>>,
    /// Raised by every registration: what was read before it must not be cached after it.
    epoch: AtomicU64,
}

impl Users {
    pub(super) fn new() -> Users {
        Users {
            cache: Mutex::new(Generations::new(USER_CACHE_WEIGHT)),
            epoch: AtomicU64::new(0),
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
        let (exists, hash) = record.map_or((false, [0; 32]), |record| (true, record.secret_hash));
        let fits = equal(&hash, &shown) && exists;
        count_authentication("device", fits);
        fits.then_some(Authenticated { device })
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
        };
        let view = self.device_view(&record);
        let op = Op::PutDevice {
            record,
            fresh: true,
            previous_user: None,
        };
        let inner = Arc::clone(self);
        let user = user.to_owned();
        self.commit(vec![op], move || inner.users.changed(app, &user))
            .await?;
        Ok(Requested { made: view, secret })
    }

    pub(super) async fn device(
        &self,
        app: AppId,
        device: DeviceId,
    ) -> Result<Option<DeviceView>, RuntimeError> {
        let record = self.device_record(app, device).await?;
        Ok(record.map(|record| self.device_view(&record)))
    }

    pub(super) async fn devices(
        &self,
        app: AppId,
        user: Option<&str>,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceView, DeviceId>, RuntimeError> {
        let filter = DeviceFilter {
            user: user.map(str::to_owned),
        };
        let limit = limit.clamp(1, DEVICES_PAGE_MAX);
        let page = self
            .shared
            .reading
            .read(move |store| store.devices(app, &filter, after, limit))
            .await?;
        Ok(Page {
            items: page
                .items
                .iter()
                .map(|record| self.device_view(record))
                .collect(),
            next: page.next,
        })
    }

    /// Runs to its end even if the caller goes away: a device without a mailbox must not stay on the lists.
    pub(super) async fn revoke_device(
        self: &Arc<Inner>,
        app: AppId,
        device: DeviceId,
    ) -> Result<bool, RuntimeError> {
        let Some(record) = self.device_record(app, device).await? else {
            return Ok(false);
        };
        let inner = Arc::clone(self);
        let work = tokio::spawn(async move {
            let (answer, wiped) = oneshot::channel();
            inner
                .shard(device)
                .inbox
                .push(Input::Wipe { device, answer });
            let wiped = async { wiped.await.map_err(|_| RuntimeError::Draining) };
            let revoked = inner.in_time(wiped).await?;
            tracing::info!(%device, revoked, "device revoked");
            let erased = inner.erased(app, Erased::Device(device));
            let user = record.user.clone();
            let users = Arc::clone(&inner);
            inner
                .commit(vec![Op::DropDevice(record), erased], move || {
                    users.users.changed(app, &user);
                })
                .await
        });
        work.await.map_err(|_| RuntimeError::StoreUnavailable)??;
        Ok(true)
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

    fn device_view(&self, record: &DeviceRecord) -> DeviceView {
        let presence = self.shard(record.id).presence(record.id);
        DeviceView {
            device: record.id,
            user: record.user.clone(),
            name: record.name.clone(),
            created_ms: record.created_ms,
            attached: presence.map(|presence| (presence.carrier.as_str(), presence.since_ms)),
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
        count_authentication("key", fits);
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
        Op::Erase(Erasure {
            app,
            what,
            at_ms,
            until_ms: at_ms.saturating_add(self.erasures_keep_ms),
        })
    }

    /// Commits a batch that stands alone; `safe` runs as soon as it is safe, whether or not the caller still waits.
    async fn commit(
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
        let answered = async { answered.await.map_err(|_| RuntimeError::StoreUnavailable) };
        self.in_time(answered).await?.map_err(|error| match error {
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

fn count_authentication(who: &'static str, fits: bool) {
    let result = if fits { "accepted" } else { "refused" };
    metrics::counter!(names::AUTHENTICATIONS_TOTAL, "who" => who, "result" => result).increment(1);
}
