//! Records of what waits: rows, bodies, summaries, expiries, collapse keys, pairs, withdrawals.

use std::sync::Arc;

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use super::{Fault, read, write};
use crate::delivery::{
    AppId, CollapseKey, Hold, Notification, Outcome, PingId, RowKey, RowMeta, Summary, Urgency,
    WireSlot,
};
use crate::ports::PairState;

#[derive(Encode, BorrowDecode)]
struct RowV1<'a> {
    app: u32,
    ping: [u8; 16],
    size: u32,
    accepted_ms: u64,
    expires_ms: u64,
    collapse: Option<&'a str>,
    run: u32,
    shared: bool,
    content: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct BodyV1<'a> {
    content: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct SummaryV1 {
    app: u32,
    count: u32,
    bytes: u64,
    next_order: u64,
    sent_up_to: u64,
}

#[derive(Encode, BorrowDecode)]
struct ExpiryV1 {
    ping: [u8; 16],
}

#[derive(Encode, BorrowDecode)]
struct CollapseV1 {
    urgency: u8,
}

#[derive(Encode, BorrowDecode)]
struct PairV1 {
    app: u32,
    state: PairStateV1,
}

#[derive(Encode, BorrowDecode)]
enum PairStateV1 {
    Waiting {
        urgency: u8,
        order: u64,
        expires_ms: u64,
    },
    Ended {
        outcome: u8,
        at_ms: u64,
    },
}

#[derive(Encode, BorrowDecode)]
struct WithdrawalV1 {
    app: u32,
    until_ms: u64,
}

/// What is known of one notification of a ping, as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Pair {
    pub(in crate::store) app: AppId,
    pub(in crate::store) state: PairStored,
}

/// Where it stands; a waiting one knows its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum PairStored {
    Waiting { row: RowKey, expires_ms: u64 },
    Ended { outcome: Outcome, at_ms: u64 },
}

impl PairStored {
    /// As the port speaks of it.
    pub(in crate::store) fn state(self) -> PairState {
        match self {
            PairStored::Waiting { expires_ms, .. } => PairState::Waiting { expires_ms },
            PairStored::Ended { outcome, at_ms } => PairState::Ended { outcome, at_ms },
        }
    }
}

/// A stored row, with its body unless the rows of its ping share one.
#[derive(Debug)]
pub(in crate::store) struct Row<'a> {
    pub(in crate::store) meta: RowMeta,
    app: AppId,
    accepted_ms: u64,
    content: &'a [u8],
}

impl Row<'_> {
    /// The notification as it was accepted. `shared` is the content of the body record, if it has one.
    pub(in crate::store) fn notification(&self, shared: Option<&[u8]>) -> Arc<Notification> {
        Arc::new(Notification {
            ping: self.meta.ping,
            app: self.app,
            accepted_ms: self.accepted_ms,
            expires_ms: self.meta.expires_ms,
            urgency: self.meta.key.urgency,
            collapse: self.meta.collapse.clone(),
            size: self.meta.size,
            transient: false,
            shared: self.meta.shared,
            content: Bytes::copy_from_slice(shared.unwrap_or(self.content)),
            wire: WireSlot::default(),
            hold: Hold::default(),
        })
    }
}

pub(super) fn urgency(rank: u8) -> Result<Urgency, Fault> {
    Urgency::from_rank(rank).ok_or(Fault::Rotten("no such urgency"))
}

/// The number of an outcome on disk.
pub(in crate::store) fn outcome_number(outcome: Outcome) -> u8 {
    // The place in the list is the number on disk; the list has eight entries.
    Outcome::ALL
        .iter()
        .position(|known| *known == outcome)
        .and_then(|place| u8::try_from(place).ok())
        .unwrap_or(u8::MAX)
}

/// The outcome of a number on disk.
pub(in crate::store) fn outcome(number: u8) -> Result<Outcome, Fault> {
    Outcome::ALL
        .get(usize::from(number))
        .copied()
        .ok_or(Fault::Rotten("no such outcome"))
}

/// Writes a row; a shared body is left out.
pub(in crate::store) fn put_row(
    key: &[u8],
    out: &mut Vec<u8>,
    run: u32,
    notification: &Notification,
) {
    write(
        key,
        out,
        &RowV1 {
            app: notification.app.0,
            ping: notification.ping.0,
            size: notification.size,
            accepted_ms: notification.accepted_ms,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.as_ref().map(CollapseKey::as_str),
            run,
            shared: notification.shared,
            content: if notification.shared {
                &[]
            } else {
                &notification.content
            },
        },
    );
}

/// Reads a row.
pub(in crate::store) fn row<'a>(
    key: &[u8],
    place: RowKey,
    value: &'a [u8],
) -> Result<Row<'a>, Fault> {
    let disk: RowV1<'a> = read(key, value)?;
    let collapse = match disk.collapse {
        None => None,
        Some(text) => Some(CollapseKey::new(text).ok_or(Fault::Rotten("no collapse key"))?),
    };
    Ok(Row {
        meta: RowMeta {
            key: place,
            ping: PingId(disk.ping),
            size: disk.size,
            expires_ms: disk.expires_ms,
            collapse,
            run: disk.run,
            shared: disk.shared,
        },
        app: AppId(disk.app),
        accepted_ms: disk.accepted_ms,
        content: disk.content,
    })
}

/// Writes a shared body.
pub(in crate::store) fn put_body(key: &[u8], out: &mut Vec<u8>, content: &[u8]) {
    write(key, out, &BodyV1 { content });
}

/// Reads a shared body.
pub(in crate::store) fn body<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], Fault> {
    let disk: BodyV1<'a> = read(key, value)?;
    Ok(disk.content)
}

/// Writes a summary.
pub(in crate::store) fn put_summary(key: &[u8], out: &mut Vec<u8>, summary: &Summary) {
    write(
        key,
        out,
        &SummaryV1 {
            app: summary.app.0,
            count: summary.count,
            bytes: summary.bytes,
            next_order: summary.next_order,
            sent_up_to: summary.sent_up_to,
        },
    );
}

/// Reads a summary.
pub(in crate::store) fn summary(key: &[u8], value: &[u8]) -> Result<Summary, Fault> {
    let disk: SummaryV1 = read(key, value)?;
    Ok(Summary {
        app: AppId(disk.app),
        count: disk.count,
        bytes: disk.bytes,
        next_order: disk.next_order,
        sent_up_to: disk.sent_up_to,
    })
}

/// Writes the ping of an expiry key, so that a row that rots can still be brought to its end.
pub(in crate::store) fn put_expiry(key: &[u8], out: &mut Vec<u8>, ping: PingId) {
    write(key, out, &ExpiryV1 { ping: ping.0 });
}

/// Reads the ping of an expiry key.
pub(in crate::store) fn expiry(key: &[u8], value: &[u8]) -> Result<PingId, Fault> {
    let disk: ExpiryV1 = read(key, value)?;
    Ok(PingId(disk.ping))
}

/// Writes the urgency of a collapse key.
pub(in crate::store) fn put_collapse(key: &[u8], out: &mut Vec<u8>, urgency: Urgency) {
    write(
        key,
        out,
        &CollapseV1 {
            urgency: urgency.rank(),
        },
    );
}

/// Reads the urgency of a collapse key.
pub(in crate::store) fn collapse(key: &[u8], value: &[u8]) -> Result<Urgency, Fault> {
    let disk: CollapseV1 = read(key, value)?;
    urgency(disk.urgency)
}

/// Writes what is known of a notification.
pub(in crate::store) fn put_pair(key: &[u8], out: &mut Vec<u8>, pair: Pair) {
    let state = match pair.state {
        PairStored::Waiting { row, expires_ms } => PairStateV1::Waiting {
            urgency: row.urgency.rank(),
            order: row.order,
            expires_ms,
        },
        PairStored::Ended { outcome, at_ms } => PairStateV1::Ended {
            outcome: outcome_number(outcome),
            at_ms,
        },
    };
    write(
        key,
        out,
        &PairV1 {
            app: pair.app.0,
            state,
        },
    );
}

/// Reads what is known of a notification.
pub(in crate::store) fn pair(key: &[u8], value: &[u8]) -> Result<Pair, Fault> {
    let disk: PairV1 = read(key, value)?;
    let state = match disk.state {
        PairStateV1::Waiting {
            urgency: rank,
            order,
            expires_ms,
        } => PairStored::Waiting {
            row: RowKey {
                urgency: urgency(rank)?,
                order,
            },
            expires_ms,
        },
        PairStateV1::Ended {
            outcome: number,
            at_ms,
        } => PairStored::Ended {
            outcome: outcome(number)?,
            at_ms,
        },
    };
    Ok(Pair {
        app: AppId(disk.app),
        state,
    })
}

/// Writes what a device is to take off the screen. Device and ping are those of its key.
pub(in crate::store) fn put_withdrawal(key: &[u8], out: &mut Vec<u8>, app: AppId, until_ms: u64) {
    let app = app.0;
    write(key, out, &WithdrawalV1 { app, until_ms });
}

/// Reads what a device is to take off the screen: whose app, and until when it is told.
pub(in crate::store) fn withdrawal(key: &[u8], value: &[u8]) -> Result<(AppId, u64), Fault> {
    let disk: WithdrawalV1 = read(key, value)?;
    Ok((AppId(disk.app), disk.until_ms))
}
