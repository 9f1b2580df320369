//! The start of everything that runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use arc_swap::ArcSwap;
use tokio::sync::{OnceCell, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::audiences::{Audiences, Expansion, read_open};
use super::background;
use super::callbacks::Callbacks;
use super::directory::{Users, by_id};
use super::events::Followers;
use super::handle::{Handle, Inner, millis};
use super::hashing::HashKey;
use super::idempotency::Idempotency;
use super::ledger::Ledger;
use super::listings::Listings;
use super::meters::Meters;
use super::quota::App;
use super::rate::{LivePace, Pace};
use super::reading::Reading;
use super::reserve::Reserve;
use super::settings::{READING_THREADS_MAX, RuntimeSettings, SHARDS_MAX};
use super::shard::{ShardDoor, ShardTask, Shared};
use super::status::DrainSummary;
use super::traces::Traces;
use crate::delivery::{AppId, CommitFailure, Hold, Policy, Stock};
use crate::ports::{AppRecord, Clock, Entropy, NoOutbound, Op, Outbound, ReadError, Store};
use crate::telemetry::metrics as names;

/// Why the runtime does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The apps or keys could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// App `default` could not be made.
    #[error("the store did not take the app `default`: {0}")]
    Commit(&'static str),
    /// A reading thread could not be started.
    #[error("a reading thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// Everything that runs.
pub struct Runtime {
    /// The door to it.
    pub handle: Handle,
}

impl Runtime {
    /// Starts shards, reading threads and the sweep on the current tokio runtime. Metrics must be installed before.
    pub async fn start(
        settings: RuntimeSettings,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        hash_key: HashKey,
    ) -> Result<Runtime, StartError> {
        Runtime::start_with(
            settings,
            store,
            clock,
            entropy,
            hash_key,
            Arc::new(NoOutbound),
        )
        .await
    }

    /// The same, with a way out of the process for callbacks.
    pub async fn start_with(
        settings: RuntimeSettings,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        hash_key: HashKey,
        outbound: Arc<dyn Outbound>,
    ) -> Result<Runtime, StartError> {
        let from = Arc::clone(&store);
        let reserve = Arc::new(Reserve::default());
        let read = tokio::task::spawn_blocking(move || {
            let open = read_open(&*from)?;
            Ok::<_, ReadError>((from.apps()?, from.keys()?, from.callbacks()?, open))
        });
        let (apps, keys, callbacks, open) = match read.await {
            Ok(read) => read?,
            Err(panic) => return Err(ReadError::Engine(panic.to_string()).into()),
        };
        let apps = with_default(apps, &store, &*clock, &*entropy).await?;
        let threads = settings.reading_threads.clamp(1, READING_THREADS_MAX);
        let run = store.stats().run;
        let started = clock.now();
        let meters = Meters::new();
        meters.set_apps(apps.iter().map(|app| (app.id, app.name.as_str())));
        metrics::gauge!(names::BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        #[expect(clippy::cast_precision_loss, reason = "a measurement")]
        metrics::gauge!(names::STARTED_SECONDS).set(started.unix_ms as f64 / 1_000.0);
        let count = match settings.shards {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            given => given,
        }
        .clamp(1, SHARDS_MAX);
        let stock = Stock::new(apps.iter().map(|app| app.id), count);
        for app in &apps {
            stock.limit(app.id, settings.quotas.of(&app.name).held);
        }
        let shared = Arc::new(Shared {
            reading: Reading::start(&store, threads)?,
            store,
            clock,
            ledger: Ledger::new(settings.ledger_entries, settings.ledger_bytes),
            traces: Traces::default(),
            meters,
            stock: Arc::new(stock),
            device_pace: LivePace::new(Pace::of_device(&settings.limits)),
            accept_wait_ms: AtomicU64::new(millis(settings.limits.accept_wait)),
            failed: AtomicBool::new(false),
            durable: settings.receipts_durable,
        });
        let policy = Policy {
            run,
            ..settings.policy.clone()
        };
        let tasks = TaskTracker::new();
        let shards: Vec<Arc<ShardDoor>> = (0..count).map(|_| Arc::new(ShardDoor::new())).collect();
        for (place, door) in shards.iter().enumerate() {
            let (door, shared) = (Arc::clone(door), Arc::clone(&shared));
            let task = ShardTask::new(door, shared, policy.clone(), place);
            tasks.spawn(task.run());
        }
        let apps = apps
            .iter()
            .map(|app| (app.id, App::new(app, &settings.quotas)))
            .collect::<HashMap<AppId, App>>();
        let hold = |app: AppId, size| {
            // They were let in before: they count, and are not refused now.
            let all = (u64::MAX, u64::MAX);
            let room = apps.get(&app).map(|app| &app.room);
            Hold::of(room.and_then(|room| reserve.take(room, size, all)))
        };
        let open = open
            .into_iter()
            .map(|open| Expansion::restored(open, hold))
            .collect();
        let inner = Arc::new(Inner {
            shared,
            shards,
            entropy,
            hash_key,
            apps,
            keys: ArcSwap::from_pointee(by_id(keys)),
            users: Users::new(),
            idempotency: Arc::new(Idempotency::new(
                settings.idempotency_entries,
                millis(settings.idempotency_keep),
            )),
            audiences: Audiences::new(run, settings.expansion_page, open),
            subscribable: ArcSwap::from_pointee(settings.self_subscribe.clone()),
            reserve,
            limits: ArcSwap::from_pointee(settings.limits),
            link: ArcSwap::from_pointee(settings.link.clone()),
            policy: ArcSwap::from_pointee(settings.policy.clone()),
            erasures_keep_ms: millis(settings.erasures_keep),
            run,
            receipts_keep_ms: millis(settings.receipts_keep),
            listings: Listings::new(threads / 2),
            followers: Followers::default(),
            callbacks: Callbacks::new(outbound),
            started,
            sessions: AtomicU64::new(0),
            draining: AtomicBool::new(false),
            refusing: AtomicBool::new(false),
            drained: OnceCell::new(),
            tasks,
            parted: CancellationToken::new(),
            stop: CancellationToken::new(),
        });
        inner.warn_of_unknown_apps(&settings.quotas);
        background::start(&inner, &settings);
        inner.start_callbacks(callbacks);
        inner.bring_on();
        Ok(Runtime {
            handle: Handle { inner },
        })
    }

    /// Drains ([`Handle::drain`]) and waits until every task has ended.
    pub async fn shutdown(self, window: std::time::Duration) -> DrainSummary {
        let summary = self.handle.drain(window).await;
        self.handle.inner.tasks.close();
        self.handle.inner.tasks.wait().await;
        summary
    }
}

/// All apps; `default` is made if it is not there.
async fn with_default(
    mut apps: Vec<AppRecord>,
    store: &Arc<dyn Store>,
    clock: &dyn Clock,
    entropy: &dyn Entropy,
) -> Result<Vec<AppRecord>, StartError> {
    if apps.iter().any(|app| app.id == AppId::DEFAULT) {
        return Ok(apps);
    }
    let mut secret = [0; 32];
    entropy.fill(&mut secret);
    let app = AppRecord {
        id: AppId::DEFAULT,
        name: "default".to_owned(),
        secret,
        created_ms: clock.now().unix_ms,
    };
    let (answer, answered) = oneshot::channel();
    store.commit(
        vec![Op::PutApp(app.clone())],
        Box::new(move |result| super::reply(answer, result)),
    );
    match answered.await {
        Ok(Ok(())) => {
            apps.push(app);
            Ok(apps)
        }
        Ok(Err(CommitFailure::NoRoom)) => Err(StartError::Commit("no room on disk")),
        Ok(Err(CommitFailure::Failed)) | Err(_) => {
            Err(StartError::Commit("a write or sync failed"))
        }
    }
}
