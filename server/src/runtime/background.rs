//! What runs beside the shards: a look at disk and clock each second, the sweep, and the drain.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use metrics::{counter, gauge};
use tokio::sync::oneshot;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;

use super::handle::{Inner, millis};
use super::settings::RuntimeSettings;
use super::shard::Input;
use super::status::DrainSummary;
use crate::delivery::{DeviceId, Disk, Event, Mono, RowKey};
use crate::ports::{Batch, ClockState, ExpiryCursor, StoreHealth};
use crate::telemetry::metrics as names;

/// How often disk, clock and figures are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Rows of one page of the sweep.
const SWEEP_PAGE: usize = 500;
/// Pages of one sweep: 2,000 rows a second, about a twentieth of a core; a backlog of a million takes nine minutes.
const SWEEP_PAGES: usize = 4;
/// Pages of one sweep once rows are later than [`SWEEP_LATE`]: disk space matters more than quiet then.
const SWEEP_PAGES_LATE: usize = 40;
/// How long after its expiry a row may still be on disk before the sweep hurries.
const SWEEP_LATE: Duration = Duration::from_secs(900);
/// The sweep leaves a shard alone that has so many inputs waiting.
const SWEEP_YIELDS: usize = 1_000;
/// How often the sweep begins at the oldest row again, in case something slipped by behind the cursor.
const SWEEP_RESTARTS: Duration = Duration::from_secs(600);
/// Receipts dropped at a time.
const RECEIPTS_PAGE: usize = 1_000;
/// Most pages of receipts in one sweep; it begins with one and doubles while there are more.
const RECEIPTS_PAGES: usize = 32;

/// Shares of the drain window: pings are taken for a tenth, sessions are told within six tenths.
const DRAIN_PINGS_MAX: Duration = Duration::from_secs(1);
/// Steps in which sessions are told.
const DRAIN_STEP: Duration = Duration::from_millis(50);
/// Sessions told in a second if there is time: what a small server takes back without sweating.
const DRAIN_RATE: u64 = 1_000;
/// Sessions come back no earlier than this after the last one was told.
const DRAIN_PAUSE_MS: u64 = 250;
/// Sessions come back spread over at least this.
const DRAIN_SPREAD_MS: u64 = 1_000;
/// How often a drain looks whether the sessions are gone.
const DRAIN_LOOK: Duration = Duration::from_millis(20);
/// Longest wait for the last commits.
const DRAIN_COMMIT: Duration = Duration::from_secs(10);

/// Longest time for writing when devices were last seen.
const DRAIN_SEEN: Duration = Duration::from_secs(2);
/// Devices of one batch of these.
const DRAIN_SEEN_BATCH: usize = 1_000;

/// Starts what runs beside the shards.
pub(super) fn start(inner: &Arc<Inner>, settings: &RuntimeSettings) {
    let look = look_around(Arc::clone(inner));
    inner.tasks.spawn(until_stopped(inner.stop.clone(), look));
    let count = Arc::clone(inner).count_stock();
    inner.tasks.spawn(until_stopped(inner.stop.clone(), count));
    let sweep = Sweep {
        inner: Arc::clone(inner),
        every: settings.sweep_every.max(Duration::from_millis(10)),
        receipts_keep_ms: millis(settings.receipts_keep),
        receipts_pages: 1,
        cursor: ExpiryCursor::default(),
        restarted: inner.started.mono,
    };
    inner
        .tasks
        .spawn(until_stopped(inner.stop.clone(), sweep.run()));
}

async fn until_stopped(stop: CancellationToken, work: impl Future<Output = ()>) {
    tokio::select! {
        () = stop.cancelled() => {}
        () = work => {}
    }
}

// ---- Looking around ----------------------------------------------------------------------------------------------

async fn look_around(inner: Arc<Inner>) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Disk::Open;
    loop {
        ticks.tick().await;
        let health = inner.shared.store.health();
        let disk = match &health {
            StoreHealth::Open | StoreHealth::Behind => Disk::Open,
            StoreHealth::Full { .. } => Disk::Full,
            StoreHealth::Failed(_) => Disk::Failed,
        };
        if disk != before {
            report(&health);
            before = disk;
        }
        if disk == Disk::Failed {
            inner.shared.failed.store(true, Ordering::Relaxed);
        }
        for shard in &inner.shards {
            // Sent each time: a shard may have learned otherwise by itself meanwhile, and it is what makes a quiet shard
            // look for publishers whose patience is over.
            shard.inbox.push(Input::Disk(disk));
        }
        publish(&inner, &health);
        inner.measure_callbacks();
    }
}

fn report(health: &StoreHealth) {
    match health {
        StoreHealth::Open | StoreHealth::Behind => {
            tracing::info!("the store takes everything again");
        }
        StoreHealth::Full { free, reserve } => tracing::error!(
            free,
            reserve,
            "free disk space is below the reserve; new notifications for absent devices are refused"
        ),
        StoreHealth::Failed(why) => {
            tracing::error!(why, "the store failed; nothing is promised until a restart");
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "measurements")]
fn publish(inner: &Inner, health: &StoreHealth) {
    let state = match health {
        StoreHealth::Open => "open",
        StoreHealth::Full { .. } => "full",
        StoreHealth::Behind => "behind",
        StoreHealth::Failed(_) => "failed",
    };
    for name in ["open", "full", "behind", "failed"] {
        gauge!(names::STORE_HEALTH, "state" => name).set(if name == state { 1.0 } else { 0.0 });
    }
    let stock = &inner.shared.stock;
    let held = inner.apps.keys().map(|app| (*app, stock.held(*app)));
    inner.shared.meters.held(held);
    gauge!(names::QUOTA_COUNTING).set(if stock.is_whole() { 0.0 } else { 1.0 });
    let stats = inner.shared.store.stats();
    counter!(names::STORE_FRAMES_TOTAL).absolute(stats.frames);
    counter!(names::STORE_SYNCS_TOTAL).absolute(stats.syncs);
    counter!(names::STORE_REBUILDS_TOTAL).absolute(stats.rebuilds);
    if let Some(backup) = &stats.backup {
        gauge!(names::BACKUP_LAST_SUCCESS_SECONDS).set(backup.last_ms as f64 / 1e3);
        gauge!(names::BACKUP_SECONDS).set(backup.took_ms as f64 / 1e3);
        gauge!(names::BACKUP_BYTES).set(backup.bytes as f64);
        gauge!(names::BACKUPS_KEPT).set(backup.kept as f64);
        gauge!(names::BACKUP_RUNNING).set(f64::from(u8::from(backup.running)));
        counter!(names::BACKUP_FAILURES_TOTAL).absolute(backup.failures);
    }
    let history = &stats.outcomes;
    counter!(names::HISTORY_WRITTEN_TOTAL).absolute(history.written);
    counter!(names::HISTORY_LOST_TOTAL, "reason" => "overflow").absolute(history.overflowed);
    counter!(names::HISTORY_LOST_TOTAL, "reason" => "failed").absolute(history.failed);
    counter!(names::HISTORY_SEGMENTS_DROPPED_TOTAL).absolute(history.segments_dropped);
    let jump_ms = match inner.shared.clock.state() {
        ClockState::Steady => 0,
        ClockState::Jumped { by_ms } => by_ms,
    };
    let (open, accepted_ms) = inner.audiences.open();
    let oldest_ms = accepted_ms.map_or(0, |at_ms| {
        inner.shared.clock.now().unix_ms.saturating_sub(at_ms)
    });
    let awake: usize = inner.shards.iter().map(|shard| shard.awake()).sum();
    let seen: usize = inner.shards.iter().map(|shard| shard.seen_waiting()).sum();
    let waiting: usize = inner.shards.iter().map(|shard| shard.waiting()).sum();
    for (name, value) in [
        (
            names::STORE_SYNC_MEDIAN_SECONDS,
            stats.sync_us.0 as f64 / 1e6,
        ),
        (
            names::STORE_SYNC_WORST_SECONDS,
            stats.sync_us.1 as f64 / 1e6,
        ),
        (names::STORE_LAG_BYTES, stats.lag_bytes as f64),
        (names::STORE_LAG_SECONDS, stats.lag_ms as f64 / 1e3),
        (names::STORE_LOG_BYTES, stats.log_bytes as f64),
        (names::STORE_LOG_SEGMENTS, stats.log_segments as f64),
        (names::STORE_ENGINE_BYTES, stats.engine_bytes as f64),
        (names::STORE_LIVE_BYTES, stats.live_bytes as f64),
        (names::STORE_SNAPSHOT_BYTES, stats.snapshot_bytes as f64),
        (names::STORE_FREE_BYTES, stats.free_bytes as f64),
        (names::STORE_SET_ASIDE, stats.set_aside as f64),
        (names::STORE_ASIDE_BYTES, stats.aside_bytes as f64),
        (names::HISTORY_BYTES, history.bytes as f64),
        (names::HISTORY_SEGMENTS, history.segments as f64),
        (names::HISTORY_RECORDS, history.records as f64),
        (
            names::HISTORY_OLDEST_SECONDS,
            history.oldest_ms as f64 / 1e3,
        ),
        (names::HISTORY_UNREADABLE, history.unreadable as f64),
        (names::CLOCK_JUMP_SECONDS, jump_ms as f64 / 1e3),
        (names::SWEEP_PAUSED, f64::from(u8::from(jump_ms != 0))),
        (names::MAILBOXES_AWAKE, awake as f64),
        (names::SHARD_INPUTS_WAITING, waiting as f64),
        (names::READS_WAITING, inner.shared.reading.waiting() as f64),
        (names::SEEN_WAITING, seen as f64),
        (names::EXPANSIONS_OPEN, open as f64),
        (names::EXPANSION_OLDEST_SECONDS, oldest_ms as f64 / 1e3),
        (names::RESERVE_BYTES, inner.reserve.used() as f64),
        (names::LEDGER_ENTRIES, inner.shared.ledger.entries() as f64),
        (names::LEDGER_BYTES, inner.shared.ledger.bytes() as f64),
        (
            names::IDEMPOTENCY_ENTRIES,
            inner.idempotency.entries() as f64,
        ),
        (names::DRAINING, f64::from(u8::from(inner.draining()))),
    ] {
        gauge!(name).set(value);
    }
    counter!(names::LEDGER_DROPPED_TOTAL).absolute(inner.shared.ledger.dropped());
}

// ---- The sweep ---------------------------------------------------------------------------------------------------

/// Finds rows past their expiry in mailboxes that sleep. Those of attached devices expire by themselves; for those
/// the sweep only comes second.
struct Sweep {
    inner: Arc<Inner>,
    every: Duration,
    receipts_keep_ms: u64,
    receipts_pages: usize,
    cursor: ExpiryCursor,
    restarted: Mono,
}

impl Sweep {
    async fn run(mut self) {
        let mut ticks = tokio::time::interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            // No TTL may run out because somebody set the clock, and removals cannot be written otherwise.
            let steady = self.inner.shared.clock.state() == ClockState::Steady;
            let failed = self.inner.shared.failed.load(Ordering::Relaxed);
            if !steady || failed {
                continue;
            }
            self.expire().await;
            self.drop_receipts().await;
        }
    }

    async fn expire(&mut self) {
        let now = self.inner.shared.clock.now();
        if now.mono - self.restarted >= SWEEP_RESTARTS {
            self.restarted = now.mono;
            self.cursor = ExpiryCursor::default();
        }
        let mut pages = SWEEP_PAGES;
        let mut page_number = 0;
        while page_number < pages {
            page_number += 1;
            let busy = self
                .inner
                .shards
                .iter()
                .any(|shard| shard.waiting() > SWEEP_YIELDS);
            if busy || self.inner.shared.store.health() == StoreHealth::Behind {
                return;
            }
            let store = Arc::clone(&self.inner.shared.store);
            let cursor = self.cursor.clone();
            // Not on the reading threads: nobody who waits for a read shall wait for the sweep.
            let read = tokio::task::spawn_blocking(move || {
                store.expired(now.unix_ms, &cursor, SWEEP_PAGE)
            });
            let page = match read.await {
                Ok(Ok(page)) => page,
                Ok(Err(error)) => {
                    tracing::error!(%error, "the sweep could not read; it tries again");
                    return;
                }
                Err(_) => {
                    tracing::error!("the sweep panicked while reading; it tries again");
                    return;
                }
            };
            counter!(names::SWEEP_ROWS_TOTAL).increment(page.items.len() as u64);
            if page
                .items
                .first()
                .is_some_and(|row| now.unix_ms.saturating_sub(row.expires_ms) > millis(SWEEP_LATE))
            {
                pages = SWEEP_PAGES_LATE;
            }
            let mut devices: HashMap<DeviceId, Vec<RowKey>> = HashMap::new();
            for row in page.items {
                devices.entry(row.device).or_default().push(row.key);
            }
            for (device, rows) in devices {
                self.inner
                    .shard(device)
                    .inbox
                    .push(Input::Event(device, Event::Expire { rows }));
            }
            match page.next {
                Some(next) => self.cursor = next,
                // The end: the next sweep looks at this last page again, which is gone by then.
                None => return,
            }
            tokio::task::yield_now().await;
        }
    }

    async fn drop_receipts(&mut self) {
        let now_ms = self.inner.shared.clock.now().unix_ms;
        let before_ms = now_ms.saturating_sub(self.receipts_keep_ms);
        for _ in 0..self.receipts_pages {
            let store = Arc::clone(&self.inner.shared.store);
            let work =
                tokio::task::spawn_blocking(move || store.drop_receipts(before_ms, RECEIPTS_PAGE));
            let dropped = match work.await {
                Ok(Ok(dropped)) => dropped,
                Ok(Err(error)) => {
                    tracing::error!(%error, "old receipts could not be dropped; tried again later");
                    return;
                }
                Err(_) => {
                    tracing::error!("dropping old receipts panicked; tried again later");
                    return;
                }
            };
            counter!(names::RECEIPTS_DROPPED_TOTAL).increment(dropped as u64);
            if dropped < RECEIPTS_PAGE {
                self.receipts_pages = 1;
                return;
            }
        }
        self.receipts_pages = (self.receipts_pages * 2).min(RECEIPTS_PAGES);
    }
}

// ---- The drain ---------------------------------------------------------------------------------------------------

impl Inner {
    pub(super) async fn drain(&self, window: Duration) -> DrainSummary {
        let begun = self.shared.clock.now().mono;
        self.draining.store(true, Ordering::Relaxed);
        // What is on its way to an audience stops at the end of its page; the next start goes on.
        self.audiences.halt();
        gauge!(names::DRAINING).set(1.0);
        // Streams of events end first: they would keep the listeners open.
        self.followers.wake();
        let sessions = self.sessions_left();
        tracing::info!(sessions, "draining");

        let mut cut = 0;
        let told = tokio::time::timeout(window, async {
            let pings = async {
                tokio::time::sleep(DRAIN_PINGS_MAX.min(window / 10)).await;
                self.refusing.store(true, Ordering::Relaxed);
            };
            tokio::join!(pings, self.send_away(window, sessions));
            while self.sessions_left() > 0 {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        })
        .await;
        self.refusing.store(true, Ordering::Relaxed);
        if told.is_err() || self.sessions_left() > 0 {
            for shard in &self.shards {
                let (answer, answered) = oneshot::channel();
                shard.inbox.push(Input::Cut(answer));
                cut += answered.await.unwrap_or(0);
            }
        }

        // Whoever waits for an acknowledgement is told what is known, while there is time to say it.
        self.parted.cancel();
        let quiet = async {
            while !self.audiences.is_quiet() {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        };
        // One that takes longer repeats its page at the next start.
        let _ = tokio::time::timeout(DRAIN_COMMIT, quiet).await;
        let settled: Vec<_> = self
            .shards
            .iter()
            .map(|shard| {
                let (answer, answered) = oneshot::channel();
                shard.inbox.push(Input::Settle(answer));
                answered
            })
            .collect();
        let all = async {
            let mut all = true;
            for answered in settled {
                all &= answered.await.is_ok();
            }
            all
        };
        let mut committed = tokio::time::timeout(DRAIN_COMMIT, all)
            .await
            .unwrap_or(false);
        committed &= !self.shared.failed.load(Ordering::Relaxed);
        self.callbacks.end().await;
        if committed {
            // Nobody was promised this, so it changes nothing about how the stop went.
            let _ = tokio::time::timeout(DRAIN_SEEN, self.write_seen()).await;
        }
        self.stop.cancel();
        for shard in &self.shards {
            shard.inbox.push(Input::Stop);
        }
        let store = Arc::clone(&self.shared.store);
        if tokio::task::spawn_blocking(move || store.close())
            .await
            .is_err()
        {
            tracing::error!("closing the store panicked; the log has everything that was answered");
            committed = false;
        }
        let summary = DrainSummary {
            sessions,
            cut,
            committed,
            took: self.shared.clock.now().mono - begun,
        };
        tracing::info!(
            sessions,
            cut,
            committed,
            took_ms = millis(summary.took),
            "drained"
        );
        summary
    }

    /// Writes when devices were last seen, as far as that still waits for a frame.
    async fn write_seen(&self) {
        let mut ops: Batch = self
            .shards
            .iter()
            .flat_map(|shard| shard.take_seen())
            .collect();
        while !ops.is_empty() {
            let rest = ops.split_off(ops.len().min(DRAIN_SEEN_BATCH));
            if let Err(error) = self.commit(std::mem::replace(&mut ops, rest), || {}).await {
                tracing::warn!(%error, "when devices were last seen could not be written");
                return;
            }
        }
    }

    /// Tells every session to go and when to come back: not before the last one was told, and spread out, so that
    /// whoever takes over is not run down.
    async fn send_away(&self, window: Duration, sessions: u64) {
        let spread_ms = sessions
            .saturating_mul(1_000 / DRAIN_RATE)
            .min(millis(window) * 6 / 10);
        let steps = u32::try_from(spread_ms / millis(DRAIN_STEP))
            .unwrap_or(u32::MAX)
            .max(1);
        for step in 0..steps {
            if step > 0 {
                tokio::time::sleep(DRAIN_STEP).await;
            }
            let left_ms = u64::from(steps - 1 - step) * millis(DRAIN_STEP);
            let min_ms = left_ms + DRAIN_PAUSE_MS;
            let max_ms = min_ms + spread_ms.max(DRAIN_SPREAD_MS);
            for shard in &self.shards {
                shard.inbox.push(Input::Drain {
                    steps_left: steps - step,
                    min_ms,
                    max_ms,
                });
            }
        }
    }
}
