//! From operations to writes: what a frame says, and how it is said in bytes.
//!
//! A write puts or deletes one key, absolutely: applied twice, or applied over a state that has seen later writes of the
//! same log, a run of writes ends in the same state. That is what lets a replay start anywhere, a snapshot be taken
//! while writes go on, and the engine take several frames in one gulp (`docs/decisions/0002`).
//!
//! Three writes are rules instead of values, because their value cannot be known without reading what other
//! frames, still on their way, may change. They are judged by the state when the engine takes them
//! (`docs/decisions/0003`):
//! - [`Write::Collect`]: the shared body of a ping goes unless a notification of the ping still waits;
//! - [`Write::DropReceipt`]: what is known of a notification goes if it is still the outcome of that time;
//! - [`Write::Settle`]: a notification whose row was lost to rot ends as expired if it still waits.
//!
//! A frame is put together in one buffer, header first, and is never copied: its writes are slices of it, which the
//! overlay keeps until the engine has them. Translation reads nothing and decides nothing.

use std::collections::HashSet;
use std::ops::Range;

use bytes::Bytes;

use super::keys::{self, Key, Part};
use super::log::frame;
use super::record::{self, Pair, PairStored, RECORD_MAX};
use crate::delivery::{
    AppId, Change, DeviceId, Notification, Outcome, PingId, RowKey, RowMeta, Summary, Urgency,
    Withdrawal,
};
use crate::ports::{DeviceRecord, Erased, Erasure, Op, Stamp, TopicChange};

/// One write of a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Write {
    /// This key has this value.
    Put { key: Bytes, value: Bytes },
    /// This key has no value.
    Delete { key: Bytes },
    /// The shared body of this ping is deleted unless a notification of it waits.
    Collect { ping: PingId },
    /// What is known of this notification is deleted if it ended at this time.
    DropReceipt {
        at_ms: u64,
        ping: PingId,
        device: DeviceId,
    },
    /// This notification ends as expired if it still waits in this row.
    Settle {
        expires_ms: u64,
        ping: PingId,
        device: DeviceId,
        row: RowKey,
    },
}

const PUT: u8 = 1;
const DELETE: u8 = 2;
const COLLECT: u8 = 3;
const DROP_RECEIPT: u8 = 4;
const SETTLE: u8 = 5;

/// What the store itself wants written, beside the operations of the port.
#[derive(Debug, Clone)]
pub(super) enum Chore {
    /// The run that begins.
    Run(u32),
    /// Which hash key the secrets are hashed with: the beginning of its mark.
    HashKey(u64),
    /// The outcome of a notification is old enough to be forgotten.
    DropReceipt {
        at_ms: u64,
        ping: PingId,
        device: DeviceId,
    },
    /// An idempotency key is old enough to be forgotten; `record`: with the record, not only its place in the index.
    DropIdempotency {
        at_ms: u64,
        app: AppId,
        key_hash: [u8; 32],
        record: bool,
    },
    /// An erasure need not be kept any longer.
    DropErasure { until_ms: u64, what: Erased },
    /// The time of a withdrawal is over; `record`: with the record, not only its place in the index.
    DropWithdrawal {
        device: DeviceId,
        withdrawal: Withdrawal,
        record: bool,
    },
    /// A row was rotten and has been set aside: its key goes.
    DropRow { device: DeviceId, row: RowKey },
    /// The expiry of a row that is gone: its key goes, and if its notification still counts as waiting, it ends here.
    DropExpiry {
        expires_ms: u64,
        device: DeviceId,
        row: RowKey,
        ping: Option<PingId>,
    },
}

/// An operation that cannot be written. The callers of the port keep to its limits, so this is a mistake of ours; the
/// batch is refused as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unwritable {
    /// A record beyond [`RECORD_MAX`].
    #[error("a record of {0} bytes; the most is {RECORD_MAX}")]
    Record(usize),
    /// A user beyond [`keys::USER_MAX`].
    #[error("a user name of {0} bytes; the most is {max}", max = keys::USER_MAX)]
    User(usize),
    /// The name of a topic beyond [`keys::USER_MAX`].
    #[error("a topic of {0} bytes; the most is {max}", max = keys::USER_MAX)]
    Topic(usize),
    /// The frame would be larger than any reader accepts.
    #[error("a frame of {0} bytes; the most is {max}", max = frame::FRAME_MAX)]
    Frame(usize),
}

/// Where one write stands in the buffer.
#[derive(Debug, Clone)]
enum Span {
    Put(Range<usize>, Range<usize>),
    Delete(Range<usize>),
    Rule(Write),
}

/// A frame that is being put together.
#[derive(Debug)]
pub(super) struct FrameBuilder {
    buffer: Vec<u8>,
    spans: Vec<Span>,
    /// Pings whose shared body is in this frame already.
    bodies: HashSet<PingId>,
    /// Pings that have a [`Write::Collect`] in this frame already.
    collected: HashSet<PingId>,
}

/// Where a builder stood, to go back to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    bytes: usize,
    spans: usize,
}

impl FrameBuilder {
    pub(super) fn new() -> FrameBuilder {
        FrameBuilder {
            buffer: vec![0; frame::HEADER],
            spans: Vec::new(),
            bodies: HashSet::new(),
            collected: HashSet::new(),
        }
    }

    /// Bytes so far, header included.
    pub(super) fn len(&self) -> usize {
        self.buffer.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Remembers this place, before a batch that may turn out to be unwritable.
    pub(super) fn mark(&self) -> Mark {
        Mark {
            bytes: self.buffer.len(),
            spans: self.spans.len(),
        }
    }

    /// Forgets everything since `mark`.
    pub(super) fn back_to(&mut self, mark: Mark) {
        self.buffer.truncate(mark.bytes);
        self.spans.truncate(mark.spans);
        // Written again if needed: twice is only wasteful, never is wrong.
        self.bodies.clear();
        self.collected.clear();
    }

    fn put(
        &mut self,
        key: &Key,
        record: impl FnOnce(&[u8], &mut Vec<u8>),
    ) -> Result<(), Unwritable> {
        let head = self.buffer.len();
        self.buffer.extend_from_slice(&[PUT, 0, 0, 0, 0, 0, 0]);
        let key_at = self.buffer.len();
        self.buffer.extend_from_slice(key);
        let value_at = self.buffer.len();
        record(key, &mut self.buffer);
        let end = self.buffer.len();
        let value = end - value_at;
        if value > RECORD_MAX {
            return Err(Unwritable::Record(value));
        }
        // Both fit: a record is bounded above, a key by `keys::KEY_MAX`.
        let (key_length, value_length) = (key.len() as u16, value as u32);
        self.buffer[head + 1..head + 3].copy_from_slice(&key_length.to_le_bytes());
        self.buffer[head + 3..head + 7].copy_from_slice(&value_length.to_le_bytes());
        self.spans.push(Span::Put(key_at..value_at, value_at..end));
        Ok(())
    }

    fn put_empty(&mut self, key: &Key) -> Result<(), Unwritable> {
        self.put(key, |_, _| {})
    }

    fn delete(&mut self, key: &Key) {
        const { assert!(keys::KEY_MAX <= u16::MAX as usize) };
        self.buffer.push(DELETE);
        self.buffer
            .extend_from_slice(&(key.len() as u16).to_le_bytes());
        let at = self.buffer.len();
        self.buffer.extend_from_slice(key);
        self.spans.push(Span::Delete(at..self.buffer.len()));
    }

    fn collect(&mut self, ping: PingId) {
        if self.collected.insert(ping) {
            self.buffer.push(COLLECT);
            self.buffer.extend_from_slice(&ping.0);
            self.spans.push(Span::Rule(Write::Collect { ping }));
        }
    }

    fn drop_receipt(&mut self, at_ms: u64, ping: PingId, device: DeviceId) {
        self.buffer.push(DROP_RECEIPT);
        self.buffer.extend_from_slice(&at_ms.to_le_bytes());
        self.buffer.extend_from_slice(&ping.0);
        self.buffer.extend_from_slice(&device.0);
        self.spans.push(Span::Rule(Write::DropReceipt {
            at_ms,
            ping,
            device,
        }));
    }

    fn settle(&mut self, expires_ms: u64, ping: PingId, device: DeviceId, row: RowKey) {
        self.buffer.push(SETTLE);
        self.buffer.extend_from_slice(&expires_ms.to_le_bytes());
        self.buffer.extend_from_slice(&ping.0);
        self.buffer.extend_from_slice(&device.0);
        self.buffer.push(row.urgency.rank());
        self.buffer.extend_from_slice(&row.order.to_le_bytes());
        self.spans.push(Span::Rule(Write::Settle {
            expires_ms,
            ping,
            device,
            row,
        }));
    }

    /// Adds an operation. After an error the builder must go [back](FrameBuilder::back_to).
    pub(super) fn add(&mut self, op: &Op) -> Result<(), Unwritable> {
        match op {
            Op::Mailbox(Change::Insert {
                device,
                order,
                run,
                notification,
            }) => self.insert(*device, *order, *run, notification)?,
            Op::Mailbox(Change::Remove {
                app,
                device,
                row,
                outcome,
                at_ms,
            }) => self.remove(*app, *device, row, *outcome, *at_ms)?,
            Op::Mailbox(Change::Outcome {
                app,
                device,
                ping,
                outcome,
                at_ms,
                expires_ms,
            }) => {
                self.end(*app, *ping, *device, *outcome, *at_ms)?;
                self.erase_revoked(*app, *ping, *device, *outcome, *at_ms, *expires_ms)?;
            }
            Op::Mailbox(Change::Summary { device, summary }) => {
                self.put(&keys::summary(*device), |key, out| {
                    record::put_summary(key, out, summary);
                })?;
            }
            Op::Mailbox(Change::Forget { device }) => self.delete(&keys::summary(*device)),
            // Says what else is in the frame; nothing to write by itself.
            Op::Mailbox(Change::Cleared { .. }) => {}
            Op::Mailbox(Change::Withdraw {
                app,
                device,
                withdrawal,
            }) => self.put_withdrawal(*app, *device, *withdrawal)?,
            Op::PutApp(app) => {
                self.put(&keys::app(app.id), |key, out| {
                    record::put_app(key, out, app)
                })?;
            }
            Op::PutDevice {
                record,
                fresh,
                previous_user,
            } => self.put_device(record, *fresh, previous_user.as_deref())?,
            Op::DropDevice(record) => {
                self.delete(&keys::device(record.id));
                self.delete(&keys::seen(record.id));
                self.delete(&keys::app_device(record.app, record.id));
                self.delete(&keys::user_device(
                    record.app,
                    user(&record.user)?,
                    record.id,
                ));
            }
            Op::PutSeen(device, seen) => {
                self.put(&keys::seen(*device), |key, out| {
                    record::put_seen(key, out, seen);
                })?;
            }
            Op::PutJoined(app, device, stamp) => {
                self.put(&keys::app_device(*app, *device), |key, out| {
                    record::put_joined(key, out, *stamp);
                })?;
            }
            Op::PutTopics(change) => self.put_topics(change)?,
            Op::PutExpansion(expansion) => {
                let app = expansion.notification.app;
                let key = keys::expansion_part(app, expansion.stamp, Part::Head);
                self.put(&key, |key, out| record::put_expansion(key, out, expansion))?;
            }
            Op::PutChunk {
                app,
                stamp,
                number,
                devices,
            } => {
                let key = keys::expansion_part(*app, *stamp, Part::Chunk(*number));
                self.put(&key, |key, out| record::put_chunk(key, out, devices))?;
            }
            Op::PutProgress {
                app,
                stamp,
                progress,
                done,
            } => {
                let key = keys::expansion_part(*app, *stamp, Part::Progress);
                self.put(&key, |key, out| record::put_progress(key, out, progress))?;
                self.drop_chunks(*app, *stamp, done.clone());
            }
            Op::DropExpansion { app, stamp, chunks } => {
                self.delete(&keys::expansion_part(*app, *stamp, Part::Head));
                self.delete(&keys::expansion_part(*app, *stamp, Part::Progress));
                self.drop_chunks(*app, *stamp, chunks.clone());
            }
            Op::PutKey(record) => {
                self.put(&keys::api_key(record.id), |key, out| {
                    record::put_api_key(key, out, record);
                })?;
            }
            Op::DropKey(_, id) => self.delete(&keys::api_key(*id)),
            Op::PutCallback(record) => {
                self.put(&keys::callback(record.app), |key, out| {
                    record::put_callback(key, out, record);
                })?;
            }
            Op::DropCallback(app) => self.delete(&keys::callback(*app)),
            Op::PutDeadLetter(letter) => {
                self.put(&keys::dead_letter(letter.app, letter.number), |key, out| {
                    record::put_dead_letter(key, out, letter);
                })?;
            }
            Op::DropDeadLetter(app, number) => self.delete(&keys::dead_letter(*app, *number)),
            Op::Erase(erasure) => self.erase(erasure)?,
            Op::PutWithdrawal {
                app,
                device,
                withdrawal,
            } => self.put_withdrawal(*app, *device, *withdrawal)?,
            Op::DropWithdrawal { device, withdrawal } => {
                self.drop_withdrawal(*device, *withdrawal, true);
            }
            Op::PutOutcome(record) => self.end(
                record.app,
                record.ping,
                record.device,
                record.outcome,
                record.at_ms,
            )?,
            Op::PutIdempotency(record) => {
                self.put(
                    &keys::idempotency(record.app, record.key_hash),
                    |key, out| record::put_idempotency(key, out, record),
                )?;
                self.put_empty(&keys::idempotency_age(
                    record.at_ms,
                    record.app,
                    record.key_hash,
                ))?;
            }
        }
        self.check()
    }

    fn insert(
        &mut self,
        device: DeviceId,
        order: u64,
        run: u32,
        notification: &Notification,
    ) -> Result<(), Unwritable> {
        let row = RowKey {
            urgency: notification.urgency,
            order,
        };
        let ping = notification.ping;
        self.put(&keys::row(device, row), |key, out| {
            record::put_row(key, out, run, notification);
        })?;
        if notification.shared && self.bodies.insert(ping) {
            self.put(&keys::body(ping), |key, out| {
                record::put_body(key, out, &notification.content);
            })?;
        }
        self.put(
            &keys::expiry(notification.expires_ms, device, row),
            |key, out| record::put_expiry(key, out, ping),
        )?;
        if let Some(collapse) = &notification.collapse {
            self.put(&keys::collapse(device, collapse, order), |key, out| {
                record::put_collapse(key, out, row.urgency);
            })?;
        }
        let pair = Pair {
            app: notification.app,
            state: PairStored::Waiting {
                row,
                expires_ms: notification.expires_ms,
            },
        };
        self.put(&keys::pair(ping, device), |key, out| {
            record::put_pair(key, out, pair);
        })
    }

    fn remove(
        &mut self,
        app: AppId,
        device: DeviceId,
        row: &RowMeta,
        outcome: Outcome,
        at_ms: u64,
    ) -> Result<(), Unwritable> {
        self.delete(&keys::row(device, row.key));
        self.delete(&keys::expiry(row.expires_ms, device, row.key));
        if let Some(collapse) = &row.collapse {
            self.delete(&keys::collapse(device, collapse, row.key.order));
        }
        self.end(app, row.ping, device, outcome, at_ms)?;
        if row.shared {
            self.collect(row.ping);
        }
        self.erase_revoked(app, row.ping, device, outcome, at_ms, row.expires_ms)
    }

    /// How a notification ended.
    fn end(
        &mut self,
        app: AppId,
        ping: PingId,
        device: DeviceId,
        outcome: Outcome,
        at_ms: u64,
    ) -> Result<(), Unwritable> {
        let pair = Pair {
            app,
            state: PairStored::Ended { outcome, at_ms },
        };
        self.put(&keys::pair(ping, device), |key, out| {
            record::put_pair(key, out, pair);
        })?;
        self.put_empty(&keys::ended(at_ms, ping, device))
    }

    /// What was revoked must not come back with a backup either.
    fn erase_revoked(
        &mut self,
        app: AppId,
        ping: PingId,
        device: DeviceId,
        outcome: Outcome,
        at_ms: u64,
        expires_ms: u64,
    ) -> Result<(), Unwritable> {
        if outcome != Outcome::Revoked {
            return Ok(());
        }
        // A backup that still has it is of use to nobody once it would have expired anyway.
        self.erase(&Erasure {
            app,
            what: Erased::Notification(ping, device),
            at_ms,
            until_ms: expires_ms,
        })
    }

    fn put_withdrawal(
        &mut self,
        app: AppId,
        device: DeviceId,
        withdrawal: Withdrawal,
    ) -> Result<(), Unwritable> {
        let Withdrawal { ping, until_ms } = withdrawal;
        self.put(&keys::withdrawal(device, ping), |key, out| {
            record::put_withdrawal(key, out, app, until_ms);
        })?;
        self.put_empty(&keys::withdrawal_end(until_ms, device, ping))
    }

    fn drop_withdrawal(&mut self, device: DeviceId, withdrawal: Withdrawal, record: bool) {
        let Withdrawal { ping, until_ms } = withdrawal;
        self.delete(&keys::withdrawal_end(until_ms, device, ping));
        if record {
            self.delete(&keys::withdrawal(device, ping));
        }
    }

    fn erase(&mut self, erasure: &Erasure) -> Result<(), Unwritable> {
        self.put(
            &keys::erasure(erasure.until_ms, erasure.what),
            |key, out| record::put_erasure(key, out, erasure),
        )
    }

    fn put_topics(&mut self, change: &TopicChange) -> Result<(), Unwritable> {
        let key = keys::topics(change.device);
        if change.topics.is_empty() {
            self.delete(&key);
        } else {
            self.put(&key, |key, out| {
                record::put_topics(key, out, change.app, &change.topics);
            })?;
        }
        for (topic, spans) in &change.places {
            if topic.len() > keys::USER_MAX {
                return Err(Unwritable::Topic(topic.len()));
            }
            let key = keys::member(change.app, topic, change.device);
            if spans.is_empty() {
                self.delete(&key);
            } else {
                self.put(&key, |key, out| record::put_spans(key, out, spans))?;
            }
        }
        Ok(())
    }

    fn drop_chunks(&mut self, app: AppId, stamp: Stamp, chunks: Range<u32>) {
        for number in chunks {
            self.delete(&keys::expansion_part(app, stamp, Part::Chunk(number)));
        }
    }

    fn put_device(
        &mut self,
        record: &DeviceRecord,
        fresh: bool,
        previous_user: Option<&str>,
    ) -> Result<(), Unwritable> {
        if let Some(previous) = previous_user {
            self.delete(&keys::user_device(record.app, user(previous)?, record.id));
        }
        self.put(&keys::device(record.id), |key, out| {
            record::put_device(key, out, record);
        })?;
        self.put_empty(&keys::user_device(
            record.app,
            user(&record.user)?,
            record.id,
        ))?;
        if fresh {
            // Never again: it may say since when ([`Op::PutJoined`]).
            self.put_empty(&keys::app_device(record.app, record.id))?;
            self.put(&keys::summary(record.id), |key, out| {
                record::put_summary(key, out, &Summary::new(record.app));
            })?;
        }
        Ok(())
    }

    /// Adds something of the store's own. After an error the builder must go [back](FrameBuilder::back_to).
    pub(super) fn add_chore(&mut self, chore: &Chore) -> Result<(), Unwritable> {
        match *chore {
            Chore::Run(run) => self.put(&Key::from_slice(keys::RUN), |key, out| {
                record::put_number(key, out, u64::from(run));
            })?,
            Chore::HashKey(mark) => self.put(&Key::from_slice(keys::HASH_KEY), |key, out| {
                record::put_number(key, out, mark);
            })?,
            Chore::DropReceipt {
                at_ms,
                ping,
                device,
            } => {
                self.delete(&keys::ended(at_ms, ping, device));
                self.drop_receipt(at_ms, ping, device);
            }
            Chore::DropIdempotency {
                at_ms,
                app,
                key_hash,
                record,
            } => {
                self.delete(&keys::idempotency_age(at_ms, app, key_hash));
                if record {
                    self.delete(&keys::idempotency(app, key_hash));
                }
            }
            Chore::DropErasure { until_ms, what } => {
                self.delete(&keys::erasure(until_ms, what));
            }
            Chore::DropWithdrawal {
                device,
                withdrawal,
                record,
            } => self.drop_withdrawal(device, withdrawal, record),
            Chore::DropRow { device, row } => self.delete(&keys::row(device, row)),
            Chore::DropExpiry {
                expires_ms,
                device,
                row,
                ping,
            } => {
                self.delete(&keys::expiry(expires_ms, device, row));
                if let Some(ping) = ping {
                    self.put_empty(&keys::ended(expires_ms, ping, device))?;
                    self.settle(expires_ms, ping, device, row);
                    self.collect(ping);
                }
            }
        }
        self.check()
    }

    fn check(&self) -> Result<(), Unwritable> {
        if self.buffer.len() > frame::FRAME_MAX {
            return Err(Unwritable::Frame(self.buffer.len()));
        }
        Ok(())
    }

    /// The frame with its header filled in, and its writes as slices of it.
    pub(super) fn seal(mut self, number: u64, seed: u32) -> (Bytes, Vec<Write>) {
        frame::seal(&mut self.buffer, number, seed);
        let buffer = Bytes::from(self.buffer);
        let writes = self
            .spans
            .into_iter()
            .map(|span| match span {
                Span::Put(key, value) => Write::Put {
                    key: buffer.slice(key),
                    value: buffer.slice(value),
                },
                Span::Delete(key) => Write::Delete {
                    key: buffer.slice(key),
                },
                Span::Rule(rule) => rule,
            })
            .collect();
        (buffer, writes)
    }
}

/// A user name that fits a key.
fn user(name: &str) -> Result<&str, Unwritable> {
    if name.len() > keys::USER_MAX {
        return Err(Unwritable::User(name.len()));
    }
    Ok(name)
}

/// A payload that is no list of writes, although its checksum matched: written by something else than this program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the writes of a frame cannot be decoded at byte {0}")]
pub(super) struct BadPayload(pub(super) usize);

/// The writes of a frame's payload, as slices of it.
pub(super) fn decode(payload: &Bytes) -> Result<Vec<Write>, BadPayload> {
    let mut writes = Vec::new();
    let mut at = 0;
    while at < payload.len() {
        let bad = BadPayload(at);
        let mut reader = Reader {
            payload,
            at: at + 1,
        };
        let write = match payload[at] {
            PUT => {
                let key = usize::from(u16::from_le_bytes(reader.array().ok_or(bad)?));
                let value = u32::from_le_bytes(reader.array().ok_or(bad)?) as usize;
                Write::Put {
                    key: reader.slice(key).ok_or(bad)?,
                    value: reader.slice(value).ok_or(bad)?,
                }
            }
            DELETE => {
                let key = usize::from(u16::from_le_bytes(reader.array().ok_or(bad)?));
                Write::Delete {
                    key: reader.slice(key).ok_or(bad)?,
                }
            }
            COLLECT => Write::Collect {
                ping: PingId(reader.array().ok_or(bad)?),
            },
            DROP_RECEIPT => Write::DropReceipt {
                at_ms: u64::from_le_bytes(reader.array().ok_or(bad)?),
                ping: PingId(reader.array().ok_or(bad)?),
                device: DeviceId(reader.array().ok_or(bad)?),
            },
            SETTLE => Write::Settle {
                expires_ms: u64::from_le_bytes(reader.array().ok_or(bad)?),
                ping: PingId(reader.array().ok_or(bad)?),
                device: DeviceId(reader.array().ok_or(bad)?),
                row: RowKey {
                    urgency: reader
                        .array::<1>()
                        .and_then(|[rank]| Urgency::from_rank(rank))
                        .ok_or(bad)?,
                    order: u64::from_le_bytes(reader.array().ok_or(bad)?),
                },
            },
            _ => return Err(bad),
        };
        writes.push(write);
        at = reader.at;
    }
    Ok(writes)
}

struct Reader<'a> {
    payload: &'a Bytes,
    at: usize,
}

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, _) = self.payload.get(self.at..)?.split_first_chunk::<N>()?;
        self.at += N;
        Some(*head)
    }

    fn slice(&mut self, length: usize) -> Option<Bytes> {
        let end = self.at.checked_add(length)?;
        if end > self.payload.len() {
            return None;
        }
        let slice = self.payload.slice(self.at..end);
        self.at = end;
        Some(slice)
    }
}
