//! A side line judged by what came after it, and what was erased for good taken out again.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::lines::{DELETED, WRITTEN, each_of};
use super::{SalvageError, SideLine, engine_error};
use crate::delivery::{AppId, DeviceId, Notification, PingId, RowKey, Summary, Urgency};
use crate::ports::Erased;
use crate::store::backup::erasures;
use crate::store::engine::{Engine, EngineWrite};
use crate::store::examine::InspectError;
use crate::store::examine::sources::put;
use crate::store::keys;
use crate::store::record::{self, Pair, PairStored};

/// Takes out again what was erased for good: a side line may be of a time before that.
pub(super) fn erase(main: &dyn Engine) -> Result<(), SalvageError> {
    let mut gone: Vec<EngineWrite> = Vec::new();
    let mut expansions: BTreeSet<PingId> = BTreeSet::new();
    let delete = |key: &[u8]| EngineWrite {
        key: Bytes::copy_from_slice(key),
        value: None,
    };
    each_of(main, keys::ERASURES, &mut |key, value| {
        let Some(erasure) = erasures::of_entry(key, value) else {
            return Ok(());
        };
        match erasure.what {
            // Its rows end with it: a repair ends what has lost its device.
            Erased::Device(device) => {
                gone.push(delete(&keys::device(device)));
                gone.push(delete(&keys::seen(device)));
                gone.push(delete(&keys::topics(device)));
            }
            Erased::Key(id) => gone.push(delete(&keys::api_key(id))),
            Erased::Notification(ping, device) => {
                let pair = keys::pair(ping, device);
                let stored = main.get(&pair).map_err(engine_error)?;
                let stored = stored.and_then(|value| record::pair(&pair, &value).ok());
                if let Some(PairStored::Waiting { row, .. }) = stored.map(|pair| pair.state) {
                    let row_key = keys::row(device, row);
                    let value = main.get(&row_key).map_err(engine_error)?;
                    let accepted = value.and_then(|value| {
                        let row = record::row(&row_key, row, &value).ok()?;
                        Some(row.notification(None).accepted_ms)
                    });
                    if accepted.is_some_and(|accepted| accepted <= erasure.at_ms) {
                        gone.push(delete(&row_key));
                    }
                }
            }
            Erased::Expansion(ping) => drop(expansions.insert(ping)),
            // The devices of the user have erasures of their own.
            Erased::User(_) => {}
        }
        if gone.len() + 3 >= crate::store::engine::BATCH_OPERATIONS {
            main.apply(&gone, None).map_err(engine_error)?;
            gone.clear();
        }
        Ok(())
    })?;
    main.apply(&gone, None).map_err(engine_error)?;
    gone.clear();
    // A repair drops what belongs to a head that is gone.
    if !expansions.is_empty() {
        each_of(main, keys::EXPANSIONS, &mut |key, value| {
            if let Some((app, stamp, keys::Part::Head)) = keys::parse_expansion(key)
                && let Ok(head) = record::expansion(key, app, stamp, value)
                && expansions.contains(&head.notification.ping)
            {
                gone.push(delete(key));
            }
            Ok(())
        })?;
        for batch in gone.chunks(crate::store::engine::BATCH_OPERATIONS) {
            main.apply(batch, None).map_err(engine_error)?;
        }
    }
    Ok(())
}

pub(super) struct Merge<'a> {
    pub(super) main: &'a dyn Engine,
    pub(super) later: &'a dyn Engine,
}

impl Merge<'_> {
    pub(super) fn get(&self, key: &[u8]) -> Result<Option<Bytes>, InspectError> {
        self.main.get(key).map_err(engine_error)
    }

    pub(super) fn write(&self, writes: &[EngineWrite]) -> Result<(), InspectError> {
        self.main.apply(writes, None).map_err(engine_error)
    }

    /// A device, an app, a key: what came later counts.
    pub(super) fn registration(
        &self,
        key: &[u8],
        value: &[u8],
        line: &mut SideLine,
    ) -> Result<(), InspectError> {
        if self.later.get(key).map_err(engine_error)?.is_some() {
            return Ok(());
        }
        let there = self.get(key)?;
        match value.split_first() {
            Some((&WRITTEN, value)) if there.as_deref() != Some(value) => {
                let mut writes = vec![put(key, value.to_vec())];
                // A device has a mailbox as long as it is there.
                if let Some(id) = key.strip_prefix(b"d").and_then(|_| keys::parse_id(key)) {
                    let device = DeviceId(id);
                    let summary = keys::summary(device);
                    if let (None, Ok(record)) =
                        (self.get(&summary)?, record::device(key, device, value))
                    {
                        let mut bytes = Vec::new();
                        record::put_summary(&summary, &mut bytes, &Summary::new(record.app));
                        writes.push(put(&summary, bytes));
                    }
                }
                self.write(&writes)?;
                line.registrations += 1;
            }
            Some((&DELETED, _)) if there.is_some() => {
                self.write(&[EngineWrite {
                    key: Bytes::copy_from_slice(key),
                    value: None,
                }])?;
                line.removed += 1;
            }
            Some(_) | None => {}
        }
        Ok(())
    }

    pub(super) fn pair(&self, key: &[u8]) -> Result<Option<Pair>, InspectError> {
        Ok(self
            .get(key)?
            .and_then(|value| record::pair(key, &value).ok()))
    }

    fn notification(
        &self,
        device: DeviceId,
        row: RowKey,
    ) -> Result<Option<Arc<Notification>>, InspectError> {
        let key = keys::row(device, row);
        Ok(self.get(&key)?.and_then(|value| {
            record::row(&key, row, &value)
                .ok()
                .map(|row| row.notification(None))
        }))
    }

    /// The end of a notification: it counts unless the notification was accepted anew after it.
    pub(super) fn end(
        &self,
        key: &[u8],
        value: &[u8],
        line: &mut SideLine,
    ) -> Result<(), InspectError> {
        let Some((&WRITTEN, value)) = value.split_first() else {
            return Ok(());
        };
        let (Some((_, device)), Ok(side)) = (keys::parse_pair(key), record::pair(key, value))
        else {
            return Ok(());
        };
        let PairStored::Ended { at_ms, .. } = side.state else {
            return Ok(());
        };
        match self.pair(key)?.map(|pair| pair.state) {
            Some(PairStored::Waiting { row, .. }) => {
                let accepted = self.notification(device, row)?.map(|note| note.accepted_ms);
                if accepted.is_some_and(|accepted| accepted > at_ms) {
                    return Ok(());
                }
                line.ended += u64::from(accepted.is_some());
                self.write(&[
                    put(key, value.to_vec()),
                    EngineWrite {
                        key: Bytes::copy_from_slice(&keys::row(device, row)),
                        value: None,
                    },
                ])
            }
            // The first verdict wins.
            Some(PairStored::Ended { at_ms: known, .. }) if known <= at_ms => Ok(()),
            Some(PairStored::Ended { .. }) | None => self.write(&[put(key, value.to_vec())]),
        }
    }

    /// A notification that waited: it waits again unless something says that it has ended.
    pub(super) fn row(
        &self,
        key: &[u8],
        value: &[u8],
        line: &mut SideLine,
    ) -> Result<(), InspectError> {
        let (Some((&WRITTEN, value)), Some((device, row))) =
            (value.split_first(), keys::parse_row(key))
        else {
            return Ok(());
        };
        let Ok(stored) = record::row(key, row, value) else {
            return Ok(());
        };
        let note = stored.notification(None);
        let (ping, run) = (stored.meta.ping, stored.meta.run);
        let pair_key = keys::pair(ping, device);
        let ended = |pair: Option<Pair>| {
            matches!(
                pair.map(|pair| pair.state),
                Some(PairStored::Ended { at_ms, .. }) if at_ms >= note.accepted_ms
            )
        };
        let known = self.pair(&pair_key)?;
        let later = self
            .later
            .get(&pair_key)
            .map_err(engine_error)?
            .and_then(|value| record::pair(&pair_key, &value).ok());
        if ended(known) || ended(later) {
            return Ok(());
        }
        if let Some(PairStored::Waiting { row, .. }) = known.map(|pair| pair.state)
            && self.notification(device, row)?.is_some()
        {
            return Ok(());
        }
        let place = self.free_place(device, row, note.app)?;
        let row_key = keys::row(device, place);
        let mut bytes = Vec::new();
        record::put_row(&row_key, &mut bytes, run, &note);
        let mut pair = Vec::new();
        record::put_pair(
            &pair_key,
            &mut pair,
            Pair {
                app: note.app,
                state: PairStored::Waiting {
                    row: place,
                    expires_ms: note.expires_ms,
                },
            },
        );
        self.write(&[put(&row_key, bytes), put(&pair_key, pair)])?;
        line.notifications += 1;
        Ok(())
    }

    /// Where a row of a side line may stand: its own place, or behind all others if another row has its number now.
    fn free_place(
        &self,
        device: DeviceId,
        row: RowKey,
        app: AppId,
    ) -> Result<RowKey, InspectError> {
        let mut taken = false;
        for urgency in Urgency::ALL {
            taken |= self
                .get(&keys::row(device, RowKey { urgency, ..row }))?
                .is_some();
        }
        let key = keys::summary(device);
        let stored = self.get(&key)?;
        let mut summary = stored
            .and_then(|value| record::summary(&key, &value).ok())
            .unwrap_or(Summary::new(app));
        let order = if taken { summary.next_order } else { row.order };
        summary.next_order = summary.next_order.max(order.saturating_add(1));
        let mut bytes = Vec::new();
        record::put_summary(&key, &mut bytes, &summary);
        self.write(&[put(&key, bytes)])?;
        Ok(RowKey { order, ..row })
    }
}
