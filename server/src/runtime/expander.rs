//! Brings pings to their audiences: reads a page of members, hands the same notification to the shards, goes on with the next;
//! beside that waits until all devices of the oldest page have it safe or with its outcome, and notes how far it has come.
//!
//! Until it is noted, a crash brings the page anew, so rows of attached devices need no disk: they wait for their acknowledgements
//! ([`crate::delivery::Enqueue::patient`]). What is not acknowledged in time is released, and stored together. A page with a device
//! that does not answer holds up neither those behind it, up to [`PAGES_AHEAD`], nor another ping: the more of those wait, the
//! sooner rows are released. What needs the disk is waited for, page by page.
//!
//! It yields to everybody: one page is small, few are on their way at a time, and none begins while shards, the engine or the disk
//! have enough to do. What it holds in memory is bounded by pages, whatever the size of the audience.
//!
//! After a crash, and after a page that was broken off, some devices ahead may have got it already. Those that have the
//! notification or its outcome are passed over, so that each has one outcome. One that acknowledged, of which nothing was written,
//! is asked once more, under the same id, which its client knows.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, SemaphorePermit, mpsc, oneshot};

use super::api::RuntimeError;
use super::audiences::{Expansion, Phase};
use super::handle::Inner;
use super::locked;
use super::settings::{EXPANSION_CHUNK, PAGES_AHEAD, RELEASED_AT_ONCE, UNSETTLED_MAX};
use super::shard::{Gather, Input, Parts, Waiter};
use crate::delivery::{
    AUDIENCE_DEFER_MAX, AppId, CommitFailure, DeviceId, Mono, Outcome, Rejection,
};
use crate::ports::{
    Audience, Batch, ExpansionProgress, Op, OutcomeRecord, Stamp, Store, StoreHealth,
};
use crate::telemetry::metrics as names;

/// Inputs that may wait for a shard when a page begins: what it does in a moment.
const SHARD_YIELDS: usize = 512;
/// Reads that may wait for the store when a page begins: mailboxes that sleep are read before they take anything.
const READS_YIELD: usize = 512;
/// How long it looks away from somebody who has enough to do, and from devices that have time to acknowledge.
const PAUSE: Duration = Duration::from_millis(20);
/// The same for shards: what they have to do is done sooner.
const SHARD_PAUSE: Duration = Duration::from_millis(5);
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
        "shards" | "reads" => waited >= PATIENCE,
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

/// A page that the shards have.
struct Handed {
    page: Page,
    /// `None`: nobody was left to ask.
    asked: Option<Asked>,
    /// Devices of the page, also those that were passed over.
    addressed: usize,
    /// Its place among those that are not settled; `None`: it asks nothing of the disk.
    _place: Option<OwnedSemaphorePermit>,
}

/// What the shards were asked.
struct Asked {
    /// When.
    at: Mono,
    answer: oneshot::Receiver<Parts>,
    gather: Weak<Gather>,
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
            // Nobody takes it back before what the shards have of it is settled.
            let alone = expansion.alone.lock().await;
            let (to, handed) = mpsc::channel(PAGES_AHEAD);
            let (handing, settling) = tokio::join!(
                self.hand_pages(expansion, to),
                self.settle_pages(expansion, handed)
            );
            drop(alone);
            let pause = match (handing, settling) {
                // What was handed over is noted as well, so nothing is repeated.
                (Ok(()) | Err(Broken::Off), Ok(())) => return,
                (Err(Broken::Again), Ok(())) => RETRY,
                (_, Err(broken)) => {
                    expansion.repeats.store(true, Ordering::Relaxed);
                    match broken {
                        Broken::Off => return tokio::time::sleep(PAUSE).await,
                        Broken::Again => RETRY,
                    }
                }
            };
            tokio::time::sleep(pause).await;
        }
    }

    fn is_off(&self, expansion: &Expansion) -> bool {
        expansion.phase() != Phase::Open
            || self.audiences.is_halted()
            || self.shared.failed.load(Ordering::Relaxed)
    }

    /// Waits until nobody else is hurt by going on; `false`: it is off. `waited`: how long it has done so for this page.
    async fn waits_for_room(&self, expansion: &Expansion, waited: &mut Duration) -> bool {
        let mut told = None;
        loop {
            if self.is_off(expansion) {
                return false;
            }
            let Some(reason) = self.wanting(expansion, *waited) else {
                return true;
            };
            let pause = match reason {
                "shards" => SHARD_PAUSE,
                _ => PAUSE,
            };
            *waited += pause;
            if told != Some(reason) {
                told = Some(reason);
                metrics::counter!(names::EXPANSION_PAUSES_TOTAL, "reason" => reason).increment(1);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Waits for its turn to hand over a page, and for the room; `None`: it is off.
    async fn turn(&self, expansion: &Expansion) -> Option<SemaphorePermit<'_>> {
        let mut waited = Duration::ZERO;
        while self.waits_for_room(expansion, &mut waited).await {
            let turn = tokio::select! {
                // It is never closed.
                turn = self.audiences.pages.acquire() => turn.ok()?,
                () = self.is_to_stop(expansion) => return None,
            };
            // Those who had their turn before may have taken the room.
            if !self.is_off(expansion) && self.wanting(expansion, waited).is_none() {
                return Some(turn);
            }
        }
        None
    }

    /// The same, and with a place for its page among those that are not settled. Nobody waits for a turn or a place with
    /// the other one in hand, or holds a place while there is no room; who asks nothing of the disk needs none.
    async fn turn_with_place(
        &self,
        expansion: &Expansion,
    ) -> Option<(SemaphorePermit<'_>, Option<OwnedSemaphorePermit>)> {
        loop {
            let turn = self.turn(expansion).await?;
            if self.spares_disk(expansion) {
                return Some((turn, None));
            }
            if let Ok(place) = Arc::clone(&self.audiences.ahead).try_acquire_owned() {
                return Some((turn, Some(place)));
            }
            drop(turn);
            let free = self.audiences.ahead.acquire();
            tokio::pin!(free);
            while !self.spares_disk(expansion) {
                tokio::select! {
                    _free = &mut free => break,
                    () = self.is_to_stop(expansion) => return None,
                    () = tokio::time::sleep(RETRY) => {}
                }
            }
        }
    }

    /// Waits until it is being taken back, or the server goes down.
    async fn is_to_stop(&self, expansion: &Expansion) {
        tokio::select! {
            () = expansion.leaves(Phase::Open) => {}
            () = self.audiences.is_to_halt() => {}
        }
    }

    /// Whether it asks nothing of the disk: it is past its time, or never stored.
    fn spares_disk(&self, expansion: &Expansion) -> bool {
        let expired = expansion.notification.expires_ms <= self.shared.clock.now().unix_ms;
        expired || !expansion.is_stored()
    }

    /// Why it should wait, after it has for so long.
    fn wanting(&self, expansion: &Expansion, waited: Duration) -> Option<&'static str> {
        let reason = self.in_the_way(expansion)?;
        let behind = self.shared.store.health() == StoreHealth::Behind;
        (!has_waited(reason, waited, behind)).then_some(reason)
    }

    fn in_the_way(&self, expansion: &Expansion) -> Option<&'static str> {
        let store = &self.shared.store;
        if self
            .shards
            .iter()
            .any(|shard| shard.waiting() > SHARD_YIELDS)
        {
            return Some("shards");
        }
        if self.shared.reading.waiting() > READS_YIELD {
            return Some("reads");
        }
        if self.spares_disk(expansion) {
            return None;
        }
        if matches!(store.health(), StoreHealth::Full { .. }) {
            return Some("disk");
        }
        store.crowded().then_some("engine")
    }

    /// Hands over page by page, up to [`PAGES_AHEAD`] that are not settled.
    async fn hand_pages(
        &self,
        expansion: &Expansion,
        to: mpsc::Sender<Handed>,
    ) -> Result<(), Broken> {
        let mut from = expansion.progress();
        let mut ahead = VecDeque::new();
        loop {
            // Closed when a page before was broken off.
            let Ok(slot) = to.reserve().await else {
                return Err(Broken::Again);
            };
            while is_enough(&mut ahead) && !self.is_off(expansion) {
                tokio::time::sleep(SHARD_PAUSE).await;
            }
            let Some((turn, place)) = self.turn_with_place(expansion).await else {
                return Err(Broken::Off);
            };
            let mut page = self.read_page(expansion, from).await?;
            let addressed = page.devices.len();
            let repeats = expansion.repeats.load(Ordering::Relaxed);
            if repeats {
                page.devices = self.without_known(expansion, page.devices).await?;
            }
            from.done = page.done.or(from.done);
            from.chunk = page.chunk;
            let last = page.last;
            let asked = self.hand_devices(expansion, &page.devices, repeats);
            let gather = asked.as_ref().map(|asked| Weak::clone(&asked.gather));
            slot.send(Handed {
                page,
                asked,
                addressed,
                _place: place,
            });
            if let Some(gather) = gather {
                looked_at(&gather).await;
                ahead.push_back(gather);
            }
            drop(turn);
            if last {
                return Ok(());
            }
        }
    }

    /// Settles what was handed over, in its order.
    async fn settle_pages(
        self: &Arc<Inner>,
        expansion: &Arc<Expansion>,
        mut handed: mpsc::Receiver<Handed>,
    ) -> Result<(), Broken> {
        while let Some(next) = handed.recv().await {
            let settled = self.settle_page(expansion, next).await;
            if settled.is_err() {
                // What is behind it does not count. It is let go all the same: the ping behind this one must find it in its
                // place, and whoever takes this one back must find all that there is.
                handed.close();
                let until = self.shared.clock.now().mono + self.shared.accept_wait();
                while let Some(mut next) = handed.recv().await {
                    let devices = &next.page.devices;
                    let _ = self
                        .answered(expansion, devices, &mut next.asked, Some(until))
                        .await;
                }
                return settled;
            }
        }
        Ok(())
    }

    /// Waits until each device of a page is settled, and notes it.
    async fn settle_page(
        self: &Arc<Inner>,
        expansion: &Arc<Expansion>,
        handed: Handed,
    ) -> Result<(), Broken> {
        let Handed {
            mut page,
            asked,
            addressed,
            _place,
        } = handed;
        let before = expansion.progress();
        let mut ops = Batch::new();
        let devices = std::mem::take(&mut page.devices);
        let unknown = self.settled(expansion, &devices, asked, &mut ops).await?;
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
        expansion.forget_had(&devices);
        metrics::counter!(names::EXPANDED_TOTAL).increment(addressed as u64);
        if page.last {
            self.audiences.end(expansion);
            tracing::debug!(ping = %expansion.ping(), devices = expansion.progress().devices, "a ping reached its audience");
        }
        self.tidy(expansion, page.stale).await;
        Ok(())
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
        expansion.without_had(&mut devices);
        devices.retain(|device| {
            !known.contains(device) && !self.shared.ledger.has_ended(ping, *device)
        });
        Ok(devices)
    }

    // ---- Handing over --------------------------------------------------------------------------------------------

    /// Waits until each of these devices has it or is done with it. Answers how many are no device of the app.
    async fn settled(
        &self,
        expansion: &Expansion,
        devices: &[DeviceId],
        mut asked: Option<Asked>,
        ops: &mut Batch,
    ) -> Result<usize, Broken> {
        let mut unknown = 0;
        let mut full = Vec::new();
        let mut again: Vec<DeviceId>;
        let mut waiting = devices;
        while let Some(rejected) = self.answered(expansion, waiting, &mut asked, None).await? {
            let accepted = waiting.len() - rejected.len();
            self.shared.meters.app(expansion.app(), |app| {
                app.notifications.increment(accepted as u64)
            });
            again = Vec::new();
            for (device, why) in rejected {
                match why {
                    Rejection::UnknownDevice => unknown += 1,
                    Rejection::MailboxFull | Rejection::TooFast | Rejection::Quota(_) => {
                        full.push(device);
                    }
                    Rejection::NoRoom => again.push(device),
                    Rejection::StoreFailed => return Err(Broken::Off),
                }
            }
            if again.is_empty() {
                break;
            }
            again.sort_unstable();
            waiting = &again;
            // There is no room: only for those that it was refused for it is tried again. The shards hear a little later
            // than the store that there is room again.
            tokio::time::sleep(RETRY).await;
            let Some(turn) = self.turn(expansion).await else {
                return Err(Broken::Off);
            };
            asked = self.hand_devices(expansion, waiting, true);
            if let Some(asked) = &asked {
                looked_at(&asked.gather).await;
            }
            drop(turn);
        }
        self.refuse(expansion, full, ops);
        Ok(unknown)
    }

    /// Hands the notification to these devices' mailboxes; nobody answers for nobody.
    fn hand_devices(
        &self,
        expansion: &Expansion,
        devices: &[DeviceId],
        may_repeat: bool,
    ) -> Option<Asked> {
        if devices.is_empty() {
            return None;
        }
        let (gather, answer) = Gather::of_all(devices.len(), Arc::clone(&expansion.had));
        let mut inputs: Vec<Vec<Input>> = self.shards.iter().map(|_| Vec::new()).collect();
        for &device in devices {
            inputs[self.shard_place(device)].push(Input::Enqueue {
                device,
                notification: Arc::clone(&expansion.notification),
                may_repeat,
                // What is handed over again was counted the first time.
                paced: !may_repeat,
                patient: true,
                waiter: Waiter::Part(Arc::clone(&gather)),
            });
        }
        let asked = Asked {
            at: self.shared.clock.now().mono,
            answer,
            gather: Arc::downgrade(&gather),
        };
        drop(gather);
        for (shard, inputs) in self.shards.iter().zip(inputs) {
            if !inputs.is_empty() {
                shard.inbox.push_all(inputs);
            }
        }
        Some(asked)
    }

    /// Who was refused, once the shards have answered for all. Devices have time to acknowledge; those that have not by then are
    /// let go. `until`: it is over, and until then only it is waited for. The same is so from the moment at which it is off: a disk
    /// that is full or stands still keeps nobody from taking it back.
    async fn answered(
        &self,
        expansion: &Expansion,
        devices: &[DeviceId],
        asked: &mut Option<Asked>,
        mut until: Option<Mono>,
    ) -> Result<Option<Vec<(DeviceId, Rejection)>>, Broken> {
        let Some(Asked { at, answer, .. }) = asked else {
            return Ok(None);
        };
        let mut released: Option<Mono> = None;
        loop {
            let now = self.shared.clock.now().mono;
            if until.is_none() && self.is_off(expansion) {
                until = Some(now + self.shared.accept_wait());
            }
            let due = match released {
                None => until.is_some() || now - *at >= self.patience(expansion),
                // Once is enough, unless it came to a shard before what it means.
                Some(last) => now - last >= AUDIENCE_DEFER_MAX,
            };
            if due && answer.is_empty() {
                released = Some(now);
                self.let_go(expansion, devices);
            }
            tokio::select! {
                biased;
                // Without an answer the shards were stopped.
                parts = &mut *answer => {
                    return parts.map(|parts| Some(parts.rejected)).map_err(|_| Broken::Off);
                }
                () = tokio::time::sleep(PAUSE) => {}
            }
            if until.is_some_and(|until| now >= until) {
                return Err(Broken::Off);
            }
        }
    }

    /// How long devices have time to acknowledge: half as long for each ping of the app that waits behind this one.
    fn patience(&self, expansion: &Expansion) -> Duration {
        if self.is_off(expansion) {
            return Duration::ZERO;
        }
        let behind = self.audiences.behind(expansion.app());
        let halved = u32::try_from(behind).unwrap_or(u32::MAX).min(16);
        AUDIENCE_DEFER_MAX / (1 << halved)
    }

    /// What these devices have not acknowledged goes to the disk.
    fn let_go(&self, expansion: &Expansion, devices: &[DeviceId]) {
        let mut devices = devices.to_vec();
        expansion.without_had(&mut devices);
        let mut theirs: Vec<Vec<DeviceId>> = self.shards.iter().map(|_| Vec::new()).collect();
        for device in devices {
            theirs[self.shard_place(device)].push(device);
        }
        for (shard, devices) in self.shards.iter().zip(theirs) {
            let pieces = devices.chunks(RELEASED_AT_ONCE).map(|some| Input::Release {
                app: expansion.app(),
                ping: expansion.ping(),
                devices: some.to_vec(),
            });
            let pieces: Vec<Input> = pieces.collect();
            if !pieces.is_empty() {
                shard.inbox.push_all(pieces);
            }
        }
    }

    /// A full mailbox, a device that is sent too much, and an app that has no more room refuse for one device only, and that is
    /// the outcome there.
    fn refuse(&self, expansion: &Expansion, devices: Vec<DeviceId>, ops: &mut Batch) {
        let at_ms = self.shared.clock.now().unix_ms;
        let notification = &expansion.notification;
        let accepted_ms = Some(notification.accepted_ms);
        let mut records = Vec::new();
        for device in devices {
            locked(&expansion.had).insert(device);
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

/// Waits until the devices of a page were looked at and nobody of them waits for the disk.
async fn looked_at(page: &Weak<Gather>) {
    let waits = |page: Arc<Gather>| {
        let (left, held) = page.left();
        left > held
    };
    while page.upgrade().is_some_and(waits) {
        tokio::time::sleep(SHARD_PAUSE).await;
    }
}

/// Whether the shards and the disk have enough of these pages: some device has not been looked at or waits for the disk, or too
/// many are waited for. Settled pages leave.
fn is_enough(pages: &mut VecDeque<Weak<Gather>>) -> bool {
    let (mut unsettled, mut held) = (0, 0);
    pages.retain(|page| {
        let (left, of_these) = page.upgrade().map_or((0, 0), |gather| gather.left());
        unsettled += left;
        held += of_these;
        left > 0
    });
    unsettled > held || unsettled >= UNSETTLED_MAX
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
            ("reads", ms(999), false, false),
            ("reads", ms(1_000), true, true),
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
