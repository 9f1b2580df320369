//! Erasing again in the new store what was erased after the backup.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc;

use super::{Applied, COMMITS_MAX, EXPANSIONS_PAGE, PAGE, RestoreError, UserHash};
use crate::delivery::{AppId, Change, DeviceId, MailboxRead, Outcome, PingId, RowMeta, Summary};
use crate::ports::{
    Batch, Committed, DeviceFilter, Erased, Erasure, Op, OpenExpansion, OutcomeRecord, ReadError,
    TopicChange,
};
use crate::store::House;
use crate::store::committer::Work;

/// Hands over a batch and waits until it is safe.
pub(super) fn wait(house: &House, work: Work) -> Result<(), RestoreError> {
    let (sender, receiver) = mpsc::sync_channel(1);
    house.desk.commit(
        work,
        Box::new(move |verdict: Committed| {
            // The receiver waits below for as long as this lives.
            let _ = sender.send(verdict);
        }),
    );
    settled(receiver.recv())
}

fn settled(verdict: Result<Committed, mpsc::RecvError>) -> Result<(), RestoreError> {
    match verdict {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(RestoreError::Erase(
            "the log could not be written; look at the disk and its free room".to_owned(),
        )),
    }
}

pub(super) struct Applier<'a> {
    pub(super) house: &'a House,
    pub(super) now_ms: u64,
    pub(super) applied: Applied,
}

impl Applier<'_> {
    pub(super) fn run(
        mut self,
        erasures: &BTreeMap<Erased, Erasure>,
        user_hash: Option<UserHash<'_>>,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Applied, RestoreError> {
        let mut devices: BTreeSet<DeviceId> = BTreeSet::new();
        let mut notifications: BTreeMap<DeviceId, BTreeMap<PingId, u64>> = BTreeMap::new();
        let mut batches: Vec<Batch> = Vec::new();
        let mut users: BTreeMap<(AppId, [u8; 32]), u64> = BTreeMap::new();
        let mut expansions: BTreeSet<PingId> = BTreeSet::new();
        for (what, erasure) in erasures {
            let mut batch = Vec::new();
            match *what {
                Erased::Device(device) => drop(devices.insert(device)),
                Erased::Key(id) => {
                    if let Some(key) = self.house.reader.key(id)? {
                        self.applied.keys += 1;
                        batch.push(Op::DropKey(key.app, id));
                    }
                }
                Erased::Notification(ping, device) => {
                    let pings = notifications.entry(device).or_default();
                    pings.insert(ping, erasure.at_ms);
                }
                Erased::Expansion(ping) => drop(expansions.insert(ping)),
                Erased::User(hash) => drop(users.insert((erasure.app, hash), erasure.at_ms)),
            }
            // Known in the new store as well: it may be restored again, from another backup.
            if erasure.until_ms > self.now_ms {
                batch.push(Op::Erase(*erasure));
            }
            if !batch.is_empty() {
                batches.push(batch);
            }
        }
        if let (Some(hash), false) = (user_hash, users.is_empty()) {
            self.devices_of(&users, hash, &mut devices)?;
        }
        if !expansions.is_empty() {
            batches.extend(self.stopped(&expansions)?);
        }
        let going = match notifications.is_empty() {
            true => BTreeMap::new(),
            false => self.going(&expansions)?,
        };
        let (sender, receiver) = mpsc::channel();
        let (mut under_way, mut done) = (0, 0);
        let mut commit = |batch: Batch| -> Result<(), RestoreError> {
            if under_way == COMMITS_MAX {
                settled(receiver.recv())?;
                under_way -= 1;
            }
            let sender = sender.clone();
            self.house.desk.commit(
                Work::Ops(batch),
                Box::new(move |verdict: Committed| {
                    // The receiver waits below for every one of them.
                    let _ = sender.send(verdict);
                }),
            );
            under_way += 1;
            done += 1;
            progress(done);
            Ok(())
        };
        for batch in batches {
            commit(batch)?;
        }
        for device in &devices {
            if let Some(batch) = forget_device(self.house, *device, self.now_ms)? {
                self.applied.devices += 1;
                commit(batch)?;
            }
        }
        for (device, pings) in notifications {
            if devices.contains(&device) {
                continue;
            }
            let (count, mut batch) = take_back(self.house, device, &pings, self.now_ms)?;
            if count == 0 {
                batch.clear();
            }
            self.applied.notifications += count;
            batch.extend(passed_over(self.house, device, &pings, &going)?);
            if !batch.is_empty() {
                commit(batch)?;
            }
        }
        for _ in 0..under_way {
            settled(receiver.recv())?;
        }
        Ok(self.applied)
    }

    /// What ends expansions that were taken back after the backup was made.
    fn stopped(&self, taken_back: &BTreeSet<PingId>) -> Result<Vec<Batch>, ReadError> {
        let mut batches = Vec::new();
        let mut after = None;
        loop {
            let page = self.house.reader.expansions(after, EXPANSIONS_PAGE)?;
            for OpenExpansion { record, progress } in page.items {
                if taken_back.contains(&record.notification.ping) {
                    batches.push(vec![Op::DropExpansion {
                        app: record.notification.app,
                        stamp: record.stamp,
                        chunks: record.chunks_from(progress.chunk),
                    }]);
                }
            }
            after = page.next;
            if after.is_none() {
                return Ok(batches);
            }
        }
    }

    /// The pings that go on with their expansion, and when each was accepted.
    fn going(
        &self,
        taken_back: &BTreeSet<PingId>,
    ) -> Result<BTreeMap<PingId, (AppId, u64)>, ReadError> {
        let mut going = BTreeMap::new();
        let mut after = None;
        loop {
            let page = self.house.reader.expansions(after, EXPANSIONS_PAGE)?;
            let open = page.items.iter().map(|open| &open.record.notification);
            going.extend(
                open.filter(|one| !taken_back.contains(&one.ping))
                    .map(|one| (one.ping, (one.app, one.accepted_ms))),
            );
            after = page.next;
            if after.is_none() {
                return Ok(going);
            }
        }
    }

    /// The devices of erased users. Those registered after the erasure belong to somebody who came back.
    fn devices_of(
        &self,
        users: &BTreeMap<(AppId, [u8; 32]), u64>,
        hash: UserHash<'_>,
        devices: &mut BTreeSet<DeviceId>,
    ) -> Result<(), RestoreError> {
        let apps: BTreeSet<AppId> = users.keys().map(|(app, _)| *app).collect();
        for app in apps {
            let mut after = None;
            loop {
                let filter = DeviceFilter::default();
                let page = self.house.reader.devices(app, &filter, after, PAGE)?;
                for record in page.items {
                    let erased_ms = users.get(&(app, hash(app, &record.user)));
                    if erased_ms.is_some_and(|at_ms| record.created_ms <= *at_ms) {
                        devices.insert(record.id);
                    }
                }
                after = page.next;
                if after.is_none() {
                    break;
                }
            }
        }
        Ok(())
    }
}

/// Outcomes for what was revoked after the backup and is not in it yet: the expansion of its ping, which goes on, finds them and
/// passes the device over.
fn passed_over(
    house: &House,
    device: DeviceId,
    pings: &BTreeMap<PingId, u64>,
    going: &BTreeMap<PingId, (AppId, u64)>,
) -> Result<Batch, ReadError> {
    let mut batch = Vec::new();
    for (&ping, &at_ms) in pings {
        let Some(&(app, accepted_ms)) = going.get(&ping) else {
            continue;
        };
        if accepted_ms > at_ms {
            continue;
        }
        let before = u128::from_be_bytes(device.0).checked_sub(1);
        let before = before.map(|number| DeviceId(number.to_be_bytes()));
        let known = house.reader.pairs(ping, before, 1)?;
        if !known.items.iter().any(|(_, known, _)| *known == device) {
            batch.push(Op::PutOutcome(OutcomeRecord {
                app,
                ping,
                device,
                outcome: Outcome::Revoked,
                at_ms,
                accepted_ms: Some(accepted_ms),
            }));
        }
    }
    Ok(batch)
}

fn mailbox(house: &House, device: DeviceId) -> Result<(Option<Summary>, Vec<RowMeta>), ReadError> {
    let mut chores = Vec::new();
    let view = house.reader.mailbox(
        &MailboxRead {
            device,
            all: true,
            ping: None,
            collapse: None,
            lowest: None,
            rows: Vec::new(),
            withdrawals: false,
        },
        &mut chores,
    )?;
    house.desk.chores(chores);
    Ok((view.summary, view.rows))
}

fn removal(app: AppId, device: DeviceId, row: RowMeta, at_ms: u64) -> Op {
    Op::Mailbox(Change::Remove {
        app,
        device,
        row,
        outcome: Outcome::Revoked,
        at_ms,
    })
}

/// What revoking a device does, in one frame. `None`: it is not there.
fn forget_device(house: &House, device: DeviceId, now_ms: u64) -> Result<Option<Batch>, ReadError> {
    let record = house.reader.device(device)?;
    let (summary, rows) = mailbox(house, device)?;
    let Some(app) = record
        .as_ref()
        .map(|record| record.app)
        .or(summary.map(|summary| summary.app))
    else {
        return Ok(None);
    };
    let mut batch: Batch = rows
        .into_iter()
        .map(|row| removal(app, device, row, now_ms))
        .collect();
    batch.push(Op::Mailbox(Change::Forget { device }));
    batch.extend(record.map(Op::DropDevice));
    let topics = house.reader.topics(device)?;
    batch.push(Op::PutTopics(TopicChange::leave_all(app, device, topics)));
    Ok(Some(batch))
}

/// What revoking these pings at these times does in one mailbox. What was accepted after that, under the same id, stays.
fn take_back(
    house: &House,
    device: DeviceId,
    pings: &BTreeMap<PingId, u64>,
    now_ms: u64,
) -> Result<(u64, Batch), ReadError> {
    let (Some(mut summary), rows) = mailbox(house, device)? else {
        return Ok((0, Vec::new()));
    };
    let mut batch = Vec::new();
    let mut chores = Vec::new();
    for row in rows {
        let Some(at_ms) = pings.get(&row.ping) else {
            continue;
        };
        let bodies = house.reader.bodies(device, &[row.key], &mut chores)?;
        // One that cannot be read is taken back: nobody could show it was meant to stay.
        let stays = bodies.iter().any(|(_, body)| {
            body.as_ref()
                .is_some_and(|notification| notification.accepted_ms > *at_ms)
        });
        if !stays {
            summary.count = summary.count.saturating_sub(1);
            summary.bytes = summary.bytes.saturating_sub(u64::from(row.size));
            batch.push(removal(summary.app, device, row, now_ms));
        }
    }
    house.desk.chores(chores);
    let count = batch.len() as u64;
    batch.push(Op::Mailbox(Change::Summary { device, summary }));
    Ok((count, batch))
}
