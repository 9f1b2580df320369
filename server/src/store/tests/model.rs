//! What a store should hold, told in the plainest way, and random histories to compare by.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::support::*;
use crate::delivery::{
    AppId, Change, DeviceId, MailboxRead, Notification, Outcome, PingId, RowKey, Summary, Urgency,
    Withdrawal,
};
use crate::ports::{
    AppRecord, Audience, Carrier, DeviceFilter, ExpansionProgress, ExpansionRecord, ExpiryCursor,
    Membership, Op, PairState, Seen, Span, Spans, Stamp, Store, TopicChange,
};

const TOPICS: [&str; 2] = ["news", "ward/3"];
/// Chunks of every list.
const CHUNKS: u32 = 3;

/// A small generator of repeatable choices.
pub(super) struct Dice(pub(super) u64);

impl Dice {
    pub(super) fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

/// What the store should answer.
#[derive(Clone, Default)]
pub(super) struct Model {
    pub(super) summaries: BTreeMap<DeviceId, Summary>,
    pub(super) rows: BTreeMap<(DeviceId, u64), Arc<Notification>>,
    pub(super) pairs: BTreeMap<(PingId, DeviceId), PairState>,
    pub(super) withdrawals: BTreeMap<(DeviceId, PingId), u64>,
    users: BTreeMap<DeviceId, String>,
    seen: BTreeMap<DeviceId, Seen>,
    topics: BTreeMap<DeviceId, Vec<Membership>>,
    members: BTreeMap<(String, DeviceId), Spans>,
    joined: BTreeMap<DeviceId, Stamp>,
    expansions: BTreeMap<Stamp, (PingId, ExpansionProgress)>,
    chunks: BTreeMap<(Stamp, u32), Vec<DeviceId>>,
    apps: BTreeMap<u32, String>,
}

impl Model {
    pub(super) fn apply(&mut self, op: &Op) {
        match op {
            Op::Mailbox(Change::Insert {
                device,
                order,
                notification,
                ..
            }) => {
                self.rows
                    .insert((*device, *order), Arc::clone(notification));
                self.pairs.insert(
                    (notification.ping, *device),
                    PairState::Waiting {
                        expires_ms: notification.expires_ms,
                    },
                );
            }
            Op::Mailbox(Change::Remove {
                device,
                row,
                outcome,
                at_ms,
                ..
            }) => {
                self.rows.remove(&(*device, row.key.order));
                self.pairs.insert(
                    (row.ping, *device),
                    PairState::Ended {
                        outcome: *outcome,
                        at_ms: *at_ms,
                    },
                );
            }
            Op::Mailbox(Change::Summary { device, summary }) => {
                self.summaries.insert(*device, *summary);
            }
            Op::Mailbox(Change::Forget { device }) => {
                self.summaries.remove(device);
            }
            Op::Mailbox(Change::Cleared { .. }) => {}
            Op::Mailbox(Change::Outcome {
                device,
                ping,
                outcome,
                at_ms,
                ..
            }) => {
                self.pairs.insert(
                    (*ping, *device),
                    PairState::Ended {
                        outcome: *outcome,
                        at_ms: *at_ms,
                    },
                );
            }
            Op::Mailbox(Change::Withdraw {
                device, withdrawal, ..
            }) => {
                self.withdrawals
                    .insert((*device, withdrawal.ping), withdrawal.until_ms);
            }
            Op::PutDevice { record, fresh, .. } => {
                self.users.insert(record.id, record.user.clone());
                if *fresh {
                    self.summaries.insert(record.id, Summary::new(record.app));
                }
            }
            Op::DropDevice(record) => {
                self.users.remove(&record.id);
                self.seen.remove(&record.id);
                self.joined.remove(&record.id);
            }
            Op::PutApp(app) => {
                self.apps.insert(app.id.0, app.name.clone());
            }
            Op::PutSeen(device, seen) => drop(self.seen.insert(*device, seen.clone())),
            Op::PutTopics(change) => {
                self.topics.insert(change.device, change.topics.clone());
                for (topic, spans) in &change.places {
                    let place = (topic.clone(), change.device);
                    if spans.is_empty() {
                        self.members.remove(&place);
                    } else {
                        self.members.insert(place, spans.clone());
                    }
                }
            }
            Op::PutJoined(_, device, stamp) => drop(self.joined.insert(*device, *stamp)),
            Op::PutExpansion(record) => {
                let told = (record.notification.ping, ExpansionProgress::default());
                self.expansions.insert(record.stamp, told);
            }
            Op::PutChunk {
                stamp,
                number,
                devices,
                ..
            } => drop(self.chunks.insert((*stamp, *number), devices.to_vec())),
            Op::PutProgress {
                stamp,
                progress,
                done,
                ..
            } => {
                if let Some(expansion) = self.expansions.get_mut(stamp) {
                    expansion.1 = *progress;
                }
                self.chunks
                    .retain(|(of, number), _| of != stamp || !done.contains(number));
            }
            Op::DropExpansion { stamp, chunks, .. } => {
                self.expansions.remove(stamp);
                self.chunks
                    .retain(|(of, number), _| of != stamp || !chunks.contains(number));
            }
            Op::PutKey(_)
            | Op::DropKey(..)
            | Op::PutCallback(_)
            | Op::DropCallback(_)
            | Op::PutDeadLetter(_)
            | Op::DropDeadLetter(..)
            | Op::PutIdempotency(_)
            | Op::PutOutcome(_)
            | Op::Erase(_) => {}
            Op::PutWithdrawal {
                device, withdrawal, ..
            } => {
                self.withdrawals
                    .insert((*device, withdrawal.ping), withdrawal.until_ms);
            }
            Op::DropWithdrawal { device, withdrawal } => {
                self.withdrawals.remove(&(*device, withdrawal.ping));
            }
        }
    }

    pub(super) fn drop_receipts(&mut self, before: u64) {
        self.pairs.retain(|_, state| match state {
            PairState::Ended { at_ms, .. } => *at_ms >= before,
            PairState::Waiting { .. } => true,
        });
    }

    /// Pings whose body is shared by rows that wait.
    pub(super) fn shared_bodies(&self) -> usize {
        let mut pings: Vec<PingId> = self
            .rows
            .values()
            .filter(|note| note.shared)
            .map(|note| note.ping)
            .collect();
        pings.sort_unstable();
        pings.dedup();
        pings.len()
    }

    /// Everything the store answers, as text, asked in every way there is. Two stores that hold the same say the same.
    pub(super) fn expected(&self, devices: u64, pings: u64) -> Vec<String> {
        let mut lines = Vec::new();
        for device in (1..=devices).map(device_id) {
            lines.push(format!("{device} {:?}", self.summaries.get(&device)));
            for ((_, order), note) in self.rows.range((device, 0)..=(device, u64::MAX)) {
                lines.push(line(device, *order, note));
            }
            for text in ["red", "blue"] {
                let newest = self
                    .rows
                    .range((device, 0)..=(device, u64::MAX))
                    .rev()
                    .find(|(_, note)| note.collapse == key(text))
                    .map(|((_, order), _)| *order);
                lines.push(format!("{device} {text} {newest:?}"));
            }
            lines.push(format!("{device} user {:?}", self.users.get(&device)));
            lines.push(format!("{device} seen {:?}", self.seen.get(&device)));
            let all = (device, PingId([0; 16]))..=(device, PingId([0xff; 16]));
            for ((_, ping), until_ms) in self.withdrawals.range(all) {
                lines.push(format!("{device} withdraws {ping} {until_ms}"));
            }
            let topics = self.topics.get(&device).cloned().unwrap_or_default();
            lines.push(format!("{device} topics {topics:?}"));
        }
        for topic in TOPICS {
            for ((_, device), spans) in self.members.iter().filter(|((of, _), _)| of == topic) {
                lines.push(format!("{topic} {device} {spans:?}"));
            }
        }
        for device in self.users.keys() {
            let joined = self.joined.get(device).copied().unwrap_or(Stamp::FIRST);
            lines.push(format!("everyone {device} {joined:?}"));
        }
        for (stamp, (ping, progress)) in &self.expansions {
            lines.push(format!("expansion {stamp:?} {ping} {progress:?}"));
            for number in 0..CHUNKS {
                let chunk = self.chunks.get(&(*stamp, number));
                lines.push(format!(
                    "chunk {number} {:?}",
                    chunk.cloned().unwrap_or_default()
                ));
            }
        }
        for ping in (1..=pings).map(ping_id) {
            let all = (ping, DeviceId([0; 16]))..=(ping, DeviceId([0xff; 16]));
            for ((_, device), state) in self.pairs.range(all) {
                lines.push(format!("{ping} {device} {state:?}"));
            }
        }
        let mut expiring: Vec<(u64, DeviceId, RowKey)> = self
            .rows
            .iter()
            .map(|((device, order), note)| {
                (
                    note.expires_ms,
                    *device,
                    RowKey {
                        urgency: note.urgency,
                        order: *order,
                    },
                )
            })
            .collect();
        expiring.sort_unstable();
        lines.extend(expiring.iter().map(|row| format!("expires {row:?}")));
        lines.extend(self.apps.iter().map(|app| format!("app {app:?}")));
        lines
    }

    /// The same, as the store answers.
    pub(super) fn answered(store: &dyn Store, devices: u64, pings: u64) -> Vec<String> {
        let mut lines = Vec::new();
        for device in (1..=devices).map(device_id) {
            let view = store.read_mailbox(&everything(device)).unwrap();
            lines.push(format!("{device} {:?}", view.summary));
            let rows: Vec<RowKey> = view.rows.iter().map(|row| row.key).collect();
            for (row, body) in store.read_bodies(device, &rows).unwrap() {
                match body {
                    Some(note) => lines.push(line(device, row.order, &note)),
                    None => lines.push(format!("{device} {row:?} has no body")),
                }
            }
            for text in ["red", "blue"] {
                let view = store
                    .read_mailbox(&MailboxRead {
                        all: false,
                        collapse: key(text),
                        ..everything(device)
                    })
                    .unwrap();
                let newest = view.rows.first().map(|row| row.key.order);
                lines.push(format!("{device} {text} {newest:?}"));
            }
            let record = store.device(device).unwrap();
            lines.push(format!(
                "{device} user {:?}",
                record.map(|record| record.user)
            ));
            let seen = store.seen(&[device]).unwrap().remove(0);
            lines.push(format!("{device} seen {seen:?}"));
            let mut withdrawals = view.withdrawals.unwrap();
            withdrawals.sort_by_key(|one| one.ping);
            for Withdrawal { ping, until_ms } in withdrawals {
                lines.push(format!("{device} withdraws {ping} {until_ms}"));
            }
            lines.push(format!(
                "{device} topics {:?}",
                store.topics(device).unwrap()
            ));
        }
        let members = |audience: &Audience| {
            let (mut all, mut after) = (Vec::new(), None);
            loop {
                let page = store.members(AppId::DEFAULT, audience, after, 2).unwrap();
                all.extend(page.items);
                after = page.next;
                if after.is_none() {
                    return all;
                }
            }
        };
        for topic in TOPICS {
            for member in members(&Audience::Topic(topic.to_owned())) {
                let (device, spans) = (member.device, member.spans);
                let asked = store.spans(AppId::DEFAULT, device, &[topic.to_owned()]);
                assert_eq!(asked.unwrap(), std::slice::from_ref(&spans));
                lines.push(format!("{topic} {device} {spans:?}"));
            }
        }
        for member in members(&Audience::Everyone) {
            lines.push(format!(
                "everyone {} {:?}",
                member.device, member.spans[0].joined
            ));
        }
        let mut after = None;
        loop {
            let page = store.expansions(after, 1).unwrap();
            for open in page.items {
                let (stamp, ping) = (open.record.stamp, open.record.notification.ping);
                lines.push(format!("expansion {stamp:?} {ping} {:?}", open.progress));
                for number in 0..CHUNKS {
                    let chunk = store.chunk(AppId::DEFAULT, stamp, number).unwrap();
                    lines.push(format!("chunk {number} {chunk:?}"));
                }
            }
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        for ping in (1..=pings).map(ping_id) {
            let mut after = None;
            loop {
                let page = store.pairs(ping, after, 2).unwrap();
                for (_, device, state) in page.items {
                    lines.push(format!("{ping} {device} {state:?}"));
                }
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        let mut cursor = ExpiryCursor::default();
        loop {
            let page = store.expired(u64::MAX, &cursor, 3).unwrap();
            for row in page.items {
                let row = (row.expires_ms, row.device, row.key);
                lines.push(format!("expires {row:?}"));
            }
            match page.next {
                Some(next) => cursor = next,
                None => break,
            }
        }
        for app in store.apps().unwrap() {
            lines.push(format!("app {:?}", (&app.id.0, &app.name)));
        }
        lines
    }

    /// What differs, if anything.
    pub(super) fn difference(&self, store: &dyn Store, script: &Script) -> Option<String> {
        let expected = self.expected(script.devices, script.pings);
        let answered = Self::answered(store, script.devices, script.pings);
        if expected == answered {
            return None;
        }
        let missing: Vec<&String> = expected.iter().filter(|l| !answered.contains(l)).collect();
        let surplus: Vec<&String> = answered.iter().filter(|l| !expected.contains(l)).collect();
        Some(format!("missing {missing:#?}\nsurplus {surplus:#?}"))
    }

    /// The lists of devices, by app and by user, in pages.
    pub(super) fn check_lists(&self, store: &dyn Store) {
        let mut seen = Vec::new();
        let mut after = None;
        loop {
            let page = store
                .devices(AppId::DEFAULT, &DeviceFilter::default(), after, 2)
                .unwrap();
            seen.extend(page.items.iter().map(|record| record.id));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        assert!(seen.iter().eq(self.users.keys()));
        for user in ["ada", "bob"] {
            let expected: Vec<DeviceId> = self
                .users
                .iter()
                .filter(|(_, of)| *of == user)
                .map(|(id, _)| *id)
                .collect();
            let listed = store.user_devices(AppId::DEFAULT, user, 99).unwrap();
            assert_eq!(listed, expected);
        }
    }
}

fn line(device: DeviceId, order: u64, note: &Notification) -> String {
    format!(
        "{device} row {order} {} {} {} {:?} {:?} {} {} {:?}",
        note.ping,
        note.accepted_ms,
        note.expires_ms,
        note.urgency,
        note.collapse.as_ref().map(|key| key.as_str()),
        note.size,
        note.shared,
        note.content,
    )
}

/// Makes up batches as shards would.
pub(super) struct Script {
    pub(super) dice: Dice,
    /// Devices that were ever used: 1 to this.
    pub(super) devices: u64,
    /// Pings that were ever used: 1 to this.
    pub(super) pings: u64,
    /// Moves with every removal.
    pub(super) now_ms: u64,
    stamps: u64,
}

impl Script {
    pub(super) fn new(seed: u64) -> Script {
        Script {
            dice: Dice(seed),
            devices: 0,
            pings: 0,
            now_ms: 10_000,
            stamps: 0,
        }
    }

    fn stamp(&mut self) -> Stamp {
        self.stamps += 1;
        Stamp {
            run: 1,
            count: self.stamps,
        }
    }

    fn note(&mut self, ping: u64, shared: bool) -> Arc<Notification> {
        let collapse = match self.dice.roll(4) {
            0 => key("red"),
            1 => key("blue"),
            _ => None,
        };
        let urgency = Urgency::ALL[self.dice.roll(4) as usize];
        let expires_ms = 20_000 + self.dice.roll(5_000);
        // After every end so far: what was revoked and is sent anew is another notification.
        self.now_ms += 1;
        let accepted_ms = self.now_ms;
        // Shared content depends on nothing but the ping: every row of it has the same body.
        let length = if shared {
            ping % 300
        } else {
            self.dice.roll(300)
        };
        notification(ping_id(ping), |note| {
            note.collapse = collapse;
            note.urgency = urgency;
            note.accepted_ms = accepted_ms;
            note.expires_ms = expires_ms;
            note.shared = shared;
            note.size = length as u32;
            note.content = Bytes::from(vec![ping as u8; length as usize]);
        })
    }

    /// A batch that fits what the model holds; never an empty one.
    pub(super) fn batch(&mut self, model: &Model) -> Vec<Op> {
        let mut batch = Vec::new();
        let mut after = model.clone();
        let steps = 1 + self.dice.roll(3);
        let mut step = 0;
        while step < steps || batch.is_empty() {
            step += 1;
            let before = batch.len();
            self.step(&after, &mut batch);
            for op in &batch[before..] {
                after.apply(op);
            }
        }
        batch
    }

    fn step(&mut self, model: &Model, batch: &mut Vec<Op>) {
        let living: Vec<DeviceId> = model.summaries.keys().copied().collect();
        match self.dice.roll(18) {
            0 if self.devices < 5 => {
                self.devices += 1;
                let user = if self.dice.roll(2) == 0 { "ada" } else { "bob" };
                batch.push(register(device_id(self.devices), user));
                if self.dice.roll(2) == 0 {
                    let joined = self.stamp();
                    batch.push(Op::PutJoined(
                        AppId::DEFAULT,
                        device_id(self.devices),
                        joined,
                    ));
                }
            }
            1..=4 if !living.is_empty() => {
                // Sometimes an id that was used before: a repeat of a forgotten idempotency key.
                let ping = if self.pings > 0 && self.dice.roll(6) == 0 {
                    1 + self.dice.roll(self.pings)
                } else {
                    self.pings += 1;
                    self.pings
                };
                let shared = ping % 2 == 0;
                let note = self.note(ping, shared);
                for device in living {
                    let waits = matches!(
                        model.pairs.get(&(note.ping, device)),
                        Some(PairState::Waiting { .. })
                    );
                    if !waits && (shared || self.dice.roll(2) == 0) {
                        self.insert(model, device, &note, batch);
                        if !shared {
                            break;
                        }
                    }
                }
            }
            5..=8 if !model.rows.is_empty() => {
                let at = self.dice.roll(model.rows.len() as u64) as usize;
                if let Some(((device, order), note)) = model.rows.iter().nth(at) {
                    self.now_ms += self.dice.roll(50);
                    let outcome = Outcome::ALL[self.dice.roll(8) as usize];
                    batch.push(remove(*device, *order, note, outcome, self.now_ms));
                    batch.push(summary_after(model, *device, -1, note));
                }
            }
            9 if self.dice.roll(4) == 0 && !living.is_empty() => {
                let device = living[self.dice.roll(living.len() as u64) as usize];
                self.now_ms += 1;
                for ((_, order), note) in model.rows.range((device, 0)..=(device, u64::MAX)) {
                    batch.push(remove(device, *order, note, Outcome::Revoked, self.now_ms));
                }
                batch.push(Op::Mailbox(Change::Forget { device }));
                let of_device = (device, PingId([0; 16]))..=(device, PingId([0xff; 16]));
                for (&(_, ping), &until_ms) in model.withdrawals.range(of_device) {
                    let withdrawal = Withdrawal { ping, until_ms };
                    batch.push(Op::DropWithdrawal { device, withdrawal });
                }
                let user = &model.users[&device];
                batch.push(Op::DropDevice(device_record(device, user)));
                let topics = model.topics.get(&device).cloned().unwrap_or_default();
                let all = TopicChange::leave_all(AppId::DEFAULT, device, topics);
                batch.push(Op::PutTopics(all));
            }
            12 | 13 if !living.is_empty() => {
                let device = living[self.dice.roll(living.len() as u64) as usize];
                let at = self.stamp();
                let mut topics = model.topics.get(&device).cloned().unwrap_or_default();
                let topic = TOPICS[self.dice.roll(TOPICS.len() as u64) as usize];
                let place = (topic.to_owned(), device);
                let mut spans = model.members.get(&place).cloned().unwrap_or_default();
                match topics.iter().position(|was| was.topic == topic) {
                    Some(at_place) => {
                        topics.remove(at_place);
                        spans.clear();
                    }
                    None => {
                        topics.push(Membership {
                            topic: topic.to_owned(),
                            joined: at,
                        });
                        // With one that a ping on its way may need; alone no repair would keep it.
                        if self.dice.roll(2) == 0 {
                            spans.push(Span {
                                joined: Stamp::FIRST,
                                left: Some(at),
                            });
                        }
                        spans.push(Span {
                            joined: at,
                            left: None,
                        });
                    }
                }
                batch.push(Op::PutTopics(TopicChange {
                    app: AppId::DEFAULT,
                    device,
                    topics,
                    places: vec![(topic.to_owned(), spans)],
                }));
            }
            14 => {
                self.pings += 1;
                let stamp = self.stamp();
                let audience = match self.dice.roll(3) {
                    0 => Audience::Everyone,
                    1 => Audience::Topic("news".to_owned()),
                    _ => Audience::Listed {
                        chunks: CHUNKS,
                        devices: CHUNKS,
                    },
                };
                if matches!(audience, Audience::Listed { .. }) {
                    for number in 0..CHUNKS {
                        batch.push(Op::PutChunk {
                            app: AppId::DEFAULT,
                            stamp,
                            number,
                            devices: [device_id(u64::from(number) + 1)].into(),
                        });
                    }
                }
                let notification = self.note(self.pings, true);
                batch.push(Op::PutExpansion(ExpansionRecord {
                    stamp,
                    audience,
                    estimate: 7,
                    notification,
                }));
            }
            15 if !model.expansions.is_empty() => {
                let at = self.dice.roll(model.expansions.len() as u64) as usize;
                let Some((stamp, (_, before))) = model.expansions.iter().nth(at) else {
                    return;
                };
                let (app, stamp, chunk) = (AppId::DEFAULT, *stamp, before.chunk + 1);
                batch.push(if chunk < CHUNKS {
                    Op::PutProgress {
                        app,
                        stamp,
                        progress: ExpansionProgress {
                            done: Some(device_id(u64::from(chunk))),
                            devices: chunk,
                            unknown: 0,
                            chunk,
                        },
                        done: before.chunk..chunk,
                    }
                } else {
                    Op::DropExpansion {
                        app,
                        stamp,
                        chunks: before.chunk..CHUNKS,
                    }
                });
            }
            10 if !living.is_empty() => {
                let device = living[self.dice.roll(living.len() as u64) as usize];
                let previous = &model.users[&device];
                let user = if previous == "ada" { "bob" } else { "ada" };
                batch.push(Op::PutDevice {
                    record: device_record(device, user),
                    fresh: false,
                    previous_user: Some(previous.clone()),
                });
                batch.push(Op::PutSeen(
                    device,
                    Seen {
                        at_ms: self.now_ms,
                        carrier: Carrier::Quic,
                        agent: (self.dice.roll(2) == 0).then(|| "scanner/2".into()),
                    },
                ));
            }
            11 if self.pings > 0 && !living.is_empty() => {
                let device = living[self.dice.roll(living.len() as u64) as usize];
                let of_device = (device, PingId([0; 16]))..=(device, PingId([0xff; 16]));
                let known = model.withdrawals.range(of_device).next();
                let (ping, old) = match known {
                    Some((&(_, ping), &until_ms)) => (ping, Some(until_ms)),
                    None => (ping_id(1 + self.dice.roll(self.pings)), None),
                };
                if let Some(until_ms) = old {
                    let withdrawal = Withdrawal { ping, until_ms };
                    batch.push(Op::DropWithdrawal { device, withdrawal });
                }
                if old.is_none() || self.dice.roll(2) == 0 {
                    // No sweep of a history comes that far.
                    let until_ms = u64::MAX - self.dice.roll(1_000);
                    let (app, withdrawal) = (AppId::DEFAULT, Withdrawal { ping, until_ms });
                    batch.push(match self.dice.roll(2) {
                        0 => Op::PutWithdrawal {
                            app,
                            device,
                            withdrawal,
                        },
                        _ => Op::Mailbox(Change::Withdraw {
                            app,
                            device,
                            withdrawal,
                        }),
                    });
                }
            }
            _ => batch.push(Op::PutApp(AppRecord {
                id: AppId(1 + self.dice.roll(3) as u32),
                name: format!("app {}", self.dice.roll(100)),
                secret: [1; 32],
                created_ms: 1,
            })),
        }
    }

    fn insert(
        &self,
        model: &Model,
        device: DeviceId,
        note: &Arc<Notification>,
        batch: &mut Vec<Op>,
    ) {
        let order = model.summaries[&device].next_order;
        batch.push(insert(device, order, note));
        batch.push(summary_after(model, device, 1, note));
    }
}

fn summary_after(model: &Model, device: DeviceId, change: i32, note: &Notification) -> Op {
    let mut summary = model.summaries[&device];
    if change > 0 {
        summary.count += 1;
        summary.bytes += u64::from(note.size);
        summary.next_order += 1;
    } else {
        summary.count -= 1;
        summary.bytes -= u64::from(note.size);
    }
    Op::Mailbox(Change::Summary { device, summary })
}
