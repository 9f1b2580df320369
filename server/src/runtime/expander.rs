//! Brings pings to their audiences: reads a page of members, hands the same notification to the shards, waits for them,
//! notes how far it has come, goes on.
//!
//! It yields to everybody: one page is small, few are on their way at a time, and none begins while shards, the engine or the disk
//! have enough to do. What it holds in memory is bounded by the page, whatever the size of the audience.
//!
//! After a crash, and after a page that was broken off, some devices ahead may have got it already. Those that have the
//! notification or its outcome are passed over, so that each has one outcome.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::api::RuntimeError;
use super::audiences::{Expansion, Phase};
use super::handle::Inner;
use super::settings::EXPANSION_CHUNK;
use super::shard::{Gather, Input, Parts, Waiter};
use crate::delivery::{AppId, CommitFailure, DeviceId, Outcome, Rejection};
use crate::ports::{
    Audience, Batch, ExpansionProgress, Op, OutcomeRecord, Stamp, Store, StoreHealth,
};
use crate::telemetry::metrics as names;

/// Inputs that may wait for a shard when a page begins: what it does in a moment.
const SHARD_YIELDS: usize = 512;
/// How long it looks away from somebody who has enough to do.
const PAUSE: Duration = Duration::from_millis(20);
/// Longest that it looks away from shards that have enough to do: then it goes on with a page all the same. Shards take apps
/// in turns, so that is fair, and without it one app could keep all audiences waiting.
const PATIENCE: Duration = Duration::from_secs(1);
/// The same for an engine that lags and is not yet so far behind that single pings wait: a steady stream of those could keep it so for
/// ever, and one page each so often hurts none of them.
const ENGINE_PATIENCE: Duration = Duration::from_secs(10);
/// How long it waits after something failed.
const RETRY: Duration = Duration::from_millis(200);
/// Places of topics' lists that are tidied up after one page.
const PRUNED_PER_PAGE: usize = 64;
/// Notifications of a ping that are read at a time to learn who has it.
const KNOWN_PAGE: usize = 1_000;

/// Whether an expansion that wants something goes on with a page all the same. `behind`: single pings wait for the engine as well.
fn has_waited(reason: &str, waited: Duration, behind: bool) -> bool {
    match reason {
        "shards" => waited >= PATIENCE,
        "engine" => waited >= ENGINE_PATIENCE && !behind,
        _ => false,
    }
}

/// Why a page was not finished.
enum Broken {
    /// It is being taken back, or the server goes down.
    Off,
    /// It can be tried again.
    Again,
}

impl From<RuntimeError> for Broken {
    fn from(error: RuntimeError) -> Broken {
        tracing::warn!(%error, "a page of an audience must be read again");
        Broken::Again
    }
}

/// A page of an audience.
struct Page {
    /// Whom to address, by rising id.
    devices: Vec<DeviceId>,
    /// Where it ends.
    done: Option<DeviceId>,
    /// The next chunk.
    chunk: u32,
    /// Nothing follows.
    last: bool,
    /// Devices whose places in the list of the topic have more in them than is needed after this.
    stale: Vec<DeviceId>,
}

impl Inner {
    /// The work of one app, until nothing is left or the server goes down.
    pub(super) async fn bring_all(self: Arc<Inner>, app: AppId) {
        while !self.audiences.is_halted()
            && !self.shared.failed.load(Ordering::Relaxed)
            && let Some(expansion) = self.audiences.next(app)
        {
            tokio::select! {
                () = expansion.leaves(Phase::Opening) => {}
                () = self.audiences.is_to_halt() => break,
            }
            self.bring(&expansion).await;
            // One that is being taken back leaves the queue when that is safe.
            tokio::select! {
                () = expansion.leaves(Phase::Stopping) => {}
                () = self.audiences.is_to_halt() => break,
            }
        }
        self.audiences.worker_ended();
    }

    async fn bring(self: &Arc<Inner>, expansion: &Arc<Expansion>) {
        loop {
            if !self.waits_for_room(expansion).await {
                return;
            }
            // It is never closed.
            let _place = self.audiences.pages.acquire().await;
            let alone = expansion.alone.lock().await;
            if self.is_off(expansion) {
                return;
            }
            let brought = self.bring_page(expansion).await;
            drop(alone);
            match brought {
                Ok((true, stale)) => {
                    self.audiences.end(expansion);
                    self.tidy(expansion, stale).await;
                    tracing::debug!(ping = %expansion.ping(), devices = expansion.progress().devices, "a ping reached its audience");
                    return;
                }
                Ok((false, stale)) => self.tidy(expansion, stale).await,
                Err(Broken::Off) => {
                    expansion.repeats.store(true, Ordering::Relaxed);
                    tokio::time::sleep(PAUSE).await;
                    return;
                }
                Err(Broken::Again) => {
                    expansion.repeats.store(true, Ordering::Relaxed);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    fn is_off(&self, expansion: &Expansion) -> bool {
        expansion.phase() != Phase::Open
            || self.audiences.is_halted()
            || self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits until nobody else is hurt by going on; `false`: it is off.
    async fn waits_for_room(&self, expansion: &Expansion) -> bool {
        let mut told = None;
        let mut waited = Duration::ZERO;
        loop {
            if self.is_off(expansion) {
                return false;
            }
            let Some(reason) = self.wanting(expansion) else {
                return true;
            };
            let behind = self.shared.store.health() == StoreHealth::Behind;
            if has_waited(reason, waited, behind) {
                return true;
            }
            waited += PAUSE;
            if told != Some(reason) {
                told = Some(reason);
                metrics::counter!(names::EXPANSION_PAUSES_TOTAL, "reason" => reason).increment(1);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Why it should wait.
    fn wanting(&self, expansion: &Expansion) -> Option<&'static str> {
        let store = &self.shared.store;
        let expired = expansion.notification.expires_ms <= self.shared.clock.now().unix_ms;
        if self
            .shards
            .iter()
            .any(|shard| shard.waiting() > SHARD_YIELDS)
        {
            return Some("shards");
        }
        // What is past its time, or never stored, asks nothing of the disk.
        if expired || !expansion.is_stored() {
            return None;
        }
        if matches!(store.health(), StoreHealth::Full { .. }) {
            return Some("disk");
        }
        store.crowded().then_some("engine")
    }

    /// Brings the next page. `true`: it was the last one. With it: whose places in the topic's list can be tidied up.
    async fn bring_page(
        self: &Arc<Inner>,
        expansion: &Arc<Expansion>,
    ) -> Result<(bool, Vec<DeviceId>), Broken> {
        let before = expansion.progress();
        let page = self.read_page(expansion, before).await?;
        let addressed = page.devices.len();
        let repeats = expansion.repeats.load(Ordering::Relaxed);
        let mut devices = page.devices;
        if repeats {
            devices = self.without_known(expansion, devices).await?;
        }
        let mut ops = Batch::new();
        let unknown = self.hand(expansion, devices, repeats, &mut ops).await?;
        let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        let progress = ExpansionProgress {
            done: page.done.or(before.done),
            devices: before.devices.saturating_add(count(addressed)),
            unknown: before.unknown.saturating_add(count(unknown)),
            chunk: page.chunk,
        };
        if expansion.is_stored() {
            ops.push(if page.last {
                expansion.drop_op()
            } else {
                Op::PutProgress {
                    app: expansion.app(),
                    stamp: expansion.stamp,
                    progress,
                    done: before.chunk..page.chunk,
                }
            });
        }
        self.write(expansion, ops).await?;
        expansion.advance(progress);
        metrics::counter!(names::EXPANDED_TOTAL).increment(addressed as u64);
        Ok((page.last, page.stale))
    }

    async fn write(&self, expansion: &Expansion, ops: Batch) -> Result<(), Broken> {
        if ops.is_empty() {
            return Ok(());
        }
        loop {
            match self.commit_one(ops.clone()).await {
                Ok(()) => return Ok(()),
                Err(CommitFailure::Failed) => return Err(Broken::Off),
                Err(CommitFailure::NoRoom) if self.is_off(expansion) => return Err(Broken::Off),
                Err(CommitFailure::NoRoom) => {
                    metrics::counter!(names::EXPANSION_PAUSES_TOTAL, "reason" => "disk")
                        .increment(1);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    // ---- Who is next ---------------------------------------------------------------------------------------------

    async fn read_page(
        &self,
        expansion: &Expansion,
        before: ExpansionProgress,
    ) -> Result<Page, RuntimeError> {
        let (app, stamp) = (expansion.app(), expansion.stamp);
        let number = before.chunk;
        match &expansion.audience {
            Audience::Listed { chunks, .. } => {
                let devices = if expansion.is_stored() {
                    let chunk = move |store: &dyn Store| store.chunk(app, stamp, number);
                    self.shared.reading.read(chunk).await?
                } else {
                    let mut chunks = expansion.listed.chunks(EXPANSION_CHUNK);
                    let chunk = chunks.nth(number as usize);
                    chunk.map(<[DeviceId]>::to_vec).unwrap_or_default()
                };
                Ok(Page {
                    done: devices.last().copied(),
                    devices,
                    chunk: number + 1,
                    last: number + 1 >= *chunks,
                    stale: Vec::new(),
                })
            }
            Audience::Topic(_) | Audience::Everyone => {
                let (audience, limit) = (expansion.audience.clone(), self.audiences.page);
                let others: Vec<Stamp> = match &expansion.audience {
                    Audience::Topic(topic) => {
                        let mut open = self.audiences.open_to(app, topic);
                        open.retain(|open| *open != stamp);
                        open
                    }
                    Audience::Everyone | Audience::Listed { .. } => Vec::new(),
                };
                let read =
                    move |store: &dyn Store| store.members(app, &audience, before.done, limit);
                let members = self.shared.reading.read(read).await?;
                let mut page = Page {
                    devices: Vec::new(),
                    done: members
                        .next
                        .or(members.items.last().map(|member| member.device)),
                    chunk: 0,
                    last: members.next.is_none(),
                    stale: Vec::new(),
                };
                for member in members.items {
                    if member.spans.iter().any(|span| span.holds(stamp)) {
                        page.devices.push(member.device);
                    }
                    let stale = member.spans.iter().any(|span| {
                        span.left.is_some() && !others.iter().any(|open| span.holds(*open))
                    });
                    if stale && page.stale.len() < PRUNED_PER_PAGE {
                        page.stale.push(member.device);
                    }
                }
                Ok(page)
            }
        }
    }

    /// Without the devices that have it, or its outcome, already.
    async fn without_known(
        &self,
        expansion: &Expansion,
        mut devices: Vec<DeviceId>,
    ) -> Result<Vec<DeviceId>, RuntimeError> {
        let Some((&first, &last)) = devices.first().zip(devices.last()) else {
            return Ok(devices);
        };
        let (app, ping) = (expansion.app(), expansion.ping());
        let known = self
            .shared
            .reading
            .read(move |store| {
                let mut known = HashSet::new();
                let mut after = before(first);
                loop {
                    let page = store.pairs(ping, after, KNOWN_PAGE)?;
                    known.extend(page.items.iter().map(|&(_, device, _)| device));
                    after = page.next;
                    if after.is_none_or(|after| after >= last) {
                        break;
                    }
                }
                let mut after = before(first);
                loop {
                    let past = store.outcomes_of_ping(app, ping, after, KNOWN_PAGE)?;
                    known.extend(past.iter().map(|record| record.device));
                    after = past.last().map(|record| record.device);
                    if past.len() < KNOWN_PAGE || after.is_none_or(|after| after >= last) {
                        break;
                    }
                }
                Ok(known)
            })
            .await?;
        devices.retain(|device| {
            !known.contains(device) && !self.shared.ledger.has_ended(ping, *device)
        });
        Ok(devices)
    }

    // ---- Handing over --------------------------------------------------------------------------------------------

    /// Hands the notification to these devices' mailboxes and waits until each has it or is done with it. Answers how many
    /// are no device of the app.
    async fn hand(
        &self,
        expansion: &Expansion,
        mut devices: Vec<DeviceId>,
        mut may_repeat: bool,
        ops: &mut Batch,
    ) -> Result<usize, Broken> {
        let mut unknown = 0;
        let mut full = Vec::new();
        while !devices.is_empty() {
            let Parts { rejected, busy } = self.hand_once(expansion, &devices, may_repeat).await?;
            may_repeat = true;
            if busy {
                if self.is_off(expansion) {
                    return Err(Broken::Off);
                }
                metrics::counter!(names::EXPANSION_PAUSES_TOTAL, "reason" => "disk").increment(1);
                tokio::time::sleep(RETRY).await;
                devices = self.without_known(expansion, devices).await?;
                continue;
            }
            let accepted = devices.len() - rejected.len();
            self.shared.meters.app(expansion.app(), |app| {
                app.notifications.increment(accepted as u64)
            });
            devices.clear();
            for (device, why) in rejected {
                match why {
                    Rejection::UnknownDevice => unknown += 1,
                    Rejection::MailboxFull | Rejection::TooFast | Rejection::Quota(_) => {
                        full.push(device);
                    }
                    Rejection::NoRoom => devices.push(device),
                    Rejection::StoreFailed => return Err(Broken::Off),
                }
            }
            devices.sort_unstable();
            // There is no room: only for those that it was refused for it is tried again. The shards hear a little later than
            // the store that there is room again.
            if !devices.is_empty() {
                tokio::time::sleep(RETRY).await;
            }
            if !devices.is_empty() && !self.waits_for_room(expansion).await {
                return Err(Broken::Off);
            }
        }
        self.refuse(expansion, full, ops);
        Ok(unknown)
    }

    async fn hand_once(
        &self,
        expansion: &Expansion,
        devices: &[DeviceId],
        may_repeat: bool,
    ) -> Result<Parts, Broken> {
        let (gather, settled) = Gather::new(devices.len());
        let mut inputs: Vec<Vec<Input>> = self.shards.iter().map(|_| Vec::new()).collect();
        for &device in devices {
            inputs[self.shard_place(device)].push(Input::Enqueue {
                device,
                notification: Arc::clone(&expansion.notification),
                may_repeat,
                // What is handed over again was counted the first time.
                paced: !may_repeat,
                waiter: Waiter::Part(Arc::clone(&gather)),
            });
        }
        drop(gather);
        for (shard, inputs) in self.shards.iter().zip(inputs) {
            if !inputs.is_empty() {
                shard.inbox.push_all(inputs);
            }
        }
        // Without an answer the shards were stopped.
        settled.await.map_err(|_| Broken::Off)
    }

    /// A full mailbox, a device that is sent too much, and an app that has no more room refuse for one device only, and that is
    /// the outcome there.
    fn refuse(&self, expansion: &Expansion, devices: Vec<DeviceId>, ops: &mut Batch) {
        let at_ms = self.shared.clock.now().unix_ms;
        let notification = &expansion.notification;
        let accepted_ms = Some(notification.accepted_ms);
        let mut records = Vec::new();
        for device in devices {
            let (app, ping, outcome) = (notification.app, notification.ping, Outcome::Refused);
            let noted =
                self.shared
                    .ledger
                    .ended(app, ping, device, outcome, at_ms, false, accepted_ms);
            self.shared.meters.ended(app, outcome, at_ms, noted);
            if noted.repeated {
                continue;
            }
            let record = OutcomeRecord {
                app,
                ping,
                device,
                outcome,
                at_ms,
                accepted_ms,
            };
            if self.shared.durable && expansion.is_stored() {
                ops.push(Op::PutOutcome(record));
            }
            records.push(record);
        }
        if !records.is_empty() {
            self.shared.store.record_outcomes(&mut records);
        }
    }

    /// Tidies up places in the topic's list that this expansion was the last to need.
    async fn tidy(self: &Arc<Inner>, expansion: &Expansion, stale: Vec<DeviceId>) {
        let Audience::Topic(topic) = &expansion.audience else {
            return;
        };
        let tidied = stale
            .into_iter()
            .map(|device| self.prune(expansion.app(), topic, device, expansion.stamp));
        for result in futures_util::future::join_all(tidied).await {
            if let Err(error) = result {
                // The next ping to the topic comes by here again.
                tracing::debug!(%error, "a place in the list of a topic could not be tidied up");
            }
        }
    }
}

/// The id right before this one.
fn before(device: DeviceId) -> Option<DeviceId> {
    let number = u128::from_be_bytes(device.0);
    number
        .checked_sub(1)
        .map(|number| DeviceId(number.to_be_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn busy_shards_and_a_lagging_engine_hold_up_a_page_for_a_while_and_a_full_disk_for_good() {
        let ms = Duration::from_millis;
        for (reason, waited, behind, goes_on) in [
            ("shards", ms(999), false, false),
            ("shards", ms(1_000), false, true),
            ("shards", ms(1_000), true, true),
            ("engine", ms(9_999), false, false),
            ("engine", ms(10_000), false, true),
            ("engine", ms(3_600_000), true, false),
            ("disk", ms(3_600_000), false, false),
        ] {
            let found = has_waited(reason, waited, behind);
            assert_eq!(found, goes_on, "{reason} {waited:?} {behind}");
        }
    }
}
