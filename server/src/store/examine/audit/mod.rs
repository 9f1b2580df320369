//! Every record of a state, read and held against the others; and the same, putting right what does not fit.
//!
//! What a publisher or a device gave us cannot be made up: rows, bodies, devices, keys, ends of notifications. Everything else
//! follows from it: counters and every index. So a check compares the second with the first, and a repair writes the second
//! anew and ends what has lost a part that nothing brings back. Where two records contradict each other, the one that says
//! that something has ended is right.

mod checks;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::ops::ControlFlow;

use bytes::Bytes;
use serde::Serialize;

use crate::delivery::{AppId, DeviceId, Outcome, PingId, RowKey, RowMeta, Summary};
use crate::store::engine::{BATCH_OPERATIONS, Direction, Engine, EngineError, EngineWrite};
use crate::store::keys::{self, Key, Part};
use crate::store::record::{self, Fault, Pair, PairStored};

/// Entries that are taken out of the engine at a time.
const PAGE: usize = 1024;

/// Most findings that are told one by one; the rest is counted.
const TOLD_MAX: usize = 200;

/// Most rotten keys that are remembered, so that other places may be searched for them.
pub(super) const ROTTEN_MAX: usize = 1_000_000;

/// What a check found.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Audit {
    /// Records of each kind, by the first letter of their keys.
    pub records: BTreeMap<char, u64>,
    /// How much is wrong.
    pub wrong: u64,
    /// What is wrong, each in words; no more than 200.
    pub told: Vec<String>,
    /// The same, counted by kind.
    pub kinds: BTreeMap<&'static str, u64>,
    /// Places in indexes of what ended or was forgotten early; the sweep removes them in its time, and nothing is wrong with
    /// that.
    pub leftovers: u64,
    /// Records of a later format, the highest version met.
    pub newer: Option<u8>,
}

impl Audit {
    fn tell(&mut self, kind: &'static str, about: impl Display) {
        self.wrong += 1;
        *self.kinds.entry(kind).or_default() += 1;
        if self.told.len() < TOLD_MAX {
            self.told.push(format!("{kind}: {about}"));
        }
    }
}

/// How an audit goes about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Manner {
    /// Only looks.
    Check,
    /// Puts right what it finds.
    Repair {
        /// When what is ended now ends.
        now_ms: u64,
        /// Frames are missing, so a device without a mailbox may have lost it; otherwise it was being revoked.
        gaps: bool,
    },
}

/// Reads every record. Answers the keys of those that cannot be read, as many as can be remembered.
pub(super) fn read_all(engine: &dyn Engine, audit: &mut Audit) -> Result<Vec<Bytes>, EngineError> {
    let mut rotten = Vec::new();
    engine.scan(&[]..&[u8::MAX], Direction::Up, &mut |key, value| {
        if key == keys::POSITION {
            return ControlFlow::Continue(());
        }
        let room = key.first().map_or('?', |byte| char::from(*byte));
        *audit.records.entry(room).or_default() += 1;
        match decode(key, value) {
            Ok(()) => {}
            Err(Fault::Newer(version)) => {
                audit.newer = audit.newer.max(Some(version));
                audit.tell("a record of a later format", Named(key));
            }
            Err(fault @ Fault::Rotten(_)) => {
                audit.tell(
                    "a record that cannot be read",
                    format!("{}: {fault}", Named(key)),
                );
                if rotten.len() < ROTTEN_MAX {
                    rotten.push(Bytes::copy_from_slice(key));
                }
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(rotten)
}

/// Whether a value is what its key promises.
fn decode(key: &[u8], value: &[u8]) -> Result<(), Fault> {
    const NO_KEY: Fault = Fault::Rotten("no record has such a key");
    const NOT_EMPTY: Fault = Fault::Rotten("a place in an index says something");
    match key.first() {
        Some(b'r') => {
            let (_, row) = keys::parse_row(key).ok_or(NO_KEY)?;
            record::row(key, row, value).map(|_| ())
        }
        Some(b'b') => keys::parse_id(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::body(key, value).map(|_| ())),
        Some(b's') => keys::parse_id(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::summary(key, value).map(|_| ())),
        Some(b'x') => keys::parse_expiry(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::expiry(key, value).map(|_| ())),
        Some(b'c') => keys::parse_collapse_key(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::collapse(key, value).map(|_| ())),
        Some(b'p') => keys::parse_pair(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::pair(key, value).map(|_| ())),
        Some(b'd') => keys::parse_id(key)
            .ok_or(NO_KEY)
            .and_then(|id| record::device(key, DeviceId(id), value).map(|_| ())),
        Some(b'l') => keys::parse_id(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::seen(key, value).map(|_| ())),
        Some(b'h') => keys::parse_id(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::topics(key, value).map(|_| ())),
        Some(b'g') => keys::parse_member(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::spans(key, value).map(|_| ())),
        Some(&keys::EXPANSIONS) => match keys::parse_expansion(key).ok_or(NO_KEY)? {
            (app, stamp, Part::Head) => record::expansion(key, app, stamp, value).map(|_| ()),
            (_, _, Part::Progress) => record::progress(key, value).map(|_| ()),
            (_, _, Part::Chunk(_)) => record::chunk(key, value).map(|_| ()),
        },
        Some(b'e') => keys::parse_app_device(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::joined(key, value).map(|_| ())),
        Some(b'a') => record::app(key, value).map(|_| ()),
        Some(b'k') => record::api_key(key, value).map(|_| ()),
        Some(b'f') => record::callback(key, value).map(|_| ()),
        Some(b'v') => keys::parse_dead_letter(key)
            .ok_or(NO_KEY)
            .and_then(|(app, number)| record::dead_letter(key, app, number, value).map(|_| ())),
        Some(b'i') => keys::parse_idempotency(key)
            .ok_or(NO_KEY)
            .and_then(|(app, hash)| record::idempotency(key, app, hash, value).map(|_| ())),
        Some(b'w') => keys::parse_withdrawal(key)
            .ok_or(NO_KEY)
            .and_then(|_| record::withdrawal(key, value).map(|_| ())),
        Some(b'y') if keys::parse_withdrawal_end(key).is_none() => Err(NO_KEY),
        Some(b't') if keys::parse_ended(key).is_none() => Err(NO_KEY),
        Some(b'u') if keys::parse_user_device(key).is_none() => Err(NO_KEY),
        Some(b'j') if keys::parse_idempotency_age(key).is_none() => Err(NO_KEY),
        Some(b't' | b'u' | b'j' | b'y') if !value.is_empty() => Err(NOT_EMPTY),
        Some(b't' | b'u' | b'j' | b'y') => Ok(()),
        Some(_) => record::verify(key, value),
        None => Err(NO_KEY),
    }
}

/// A key as it may be shown: its kind and the ids in it, nothing that anybody chose.
struct Named<'a>(&'a [u8]);

impl Display for Named<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = self.0;
        let id = |at: usize| {
            key.get(at..at + 16)
                .and_then(|id| <[u8; 16]>::try_from(id).ok())
        };
        match key.first() {
            Some(b'r') => match keys::parse_row(key) {
                Some((device, row)) => write!(f, "row {} of device {device}", row.order),
                None => f.write_str("a row"),
            },
            Some(b'b') => match id(1) {
                Some(ping) => write!(f, "body of ping {}", PingId(ping)),
                None => f.write_str("a body"),
            },
            Some(b's') => match id(1) {
                Some(device) => write!(f, "mailbox of device {}", DeviceId(device)),
                None => f.write_str("a mailbox"),
            },
            Some(b'd') => match id(1) {
                Some(device) => write!(f, "device {}", DeviceId(device)),
                None => f.write_str("a device"),
            },
            Some(b'l') => match id(1) {
                Some(device) => write!(f, "last sight of device {}", DeviceId(device)),
                None => f.write_str("the last sight of a device"),
            },
            Some(b'h') => match id(1) {
                Some(device) => write!(f, "topics of device {}", DeviceId(device)),
                None => f.write_str("the topics of a device"),
            },
            Some(&keys::EXPANSIONS) => match keys::parse_expansion(key) {
                Some((app, stamp, _)) => write!(
                    f,
                    "expansion {}.{} of app {}",
                    stamp.run, stamp.count, app.0
                ),
                None => f.write_str("an expansion"),
            },
            Some(b'p') => match keys::parse_pair(key) {
                Some((ping, device)) => write!(f, "ping {ping} for device {device}"),
                None => f.write_str("what is known of a ping"),
            },
            Some(b'w') => match keys::parse_withdrawal(key) {
                Some((device, ping)) => write!(f, "withdrawal of ping {ping} from device {device}"),
                None => f.write_str("a withdrawal"),
            },
            Some(b'k') => f.write_str("an API key"),
            Some(b'f') => f.write_str("a callback"),
            Some(b'v') => f.write_str("a dead letter of a callback"),
            Some(b'a') => f.write_str("an app"),
            Some(b'i' | b'j') => f.write_str("an idempotency key"),
            Some(b'm') => f.write_str("a note of the store"),
            Some(room) => write!(
                f,
                "a place in index `{}`",
                char::from(*room).escape_default()
            ),
            None => f.write_str("an empty key"),
        }
    }
}

/// Holds the records of a state against each other.
pub(super) fn cross_check(
    engine: &dyn Engine,
    manner: Manner,
    audit: &mut Audit,
) -> Result<(), EngineError> {
    let mut work = Work {
        engine,
        manner,
        audit,
        writes: Vec::new(),
    };
    work.rows()?;
    work.devices()?;
    work.summaries()?;
    work.pairs()?;
    work.bodies()?;
    work.expiries()?;
    work.collapses()?;
    work.lists()?;
    work.topics()?;
    work.members()?;
    work.expansions()?;
    work.idempotency()?;
    work.withdrawals()?;
    work.ages()?;
    work.flush()
}

struct Work<'a> {
    engine: &'a dyn Engine,
    manner: Manner,
    audit: &'a mut Audit,
    writes: Vec<EngineWrite>,
}

/// What a mailbox comes to while its rows are walked over.
#[derive(Default)]
struct Tally {
    device: Option<DeviceId>,
    /// There is such a device.
    known: bool,
    count: u32,
    bytes: u64,
    highest: u64,
}

impl Work<'_> {
    fn flush(&mut self) -> Result<(), EngineError> {
        for batch in self.writes.chunks(BATCH_OPERATIONS) {
            self.engine.apply(batch, None)?;
        }
        self.writes.clear();
        Ok(())
    }

    fn repairs(&self) -> bool {
        matches!(self.manner, Manner::Repair { .. })
    }

    fn put(&mut self, key: &Key, value: impl FnOnce(&[u8], &mut Vec<u8>)) {
        if self.repairs() {
            let mut bytes = Vec::new();
            value(key, &mut bytes);
            self.writes.push(EngineWrite {
                key: Bytes::copy_from_slice(key),
                value: Some(bytes.into()),
            });
        }
    }

    fn delete(&mut self, key: &[u8]) {
        if self.repairs() {
            self.writes.push(EngineWrite {
                key: Bytes::copy_from_slice(key),
                value: None,
            });
        }
    }

    /// Hands every record of a room to `visit`, a page at a time, and writes what came of it after each page.
    fn each(
        &mut self,
        room: u8,
        mut visit: impl FnMut(&mut Self, &[u8], &[u8]) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        let end = [room + 1];
        let mut from = vec![room];
        loop {
            let mut page: Vec<(Bytes, Bytes)> = Vec::with_capacity(PAGE);
            self.engine
                .scan(&from..&end, Direction::Up, &mut |key, value| {
                    page.push((Bytes::copy_from_slice(key), Bytes::copy_from_slice(value)));
                    if page.len() < PAGE {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
                    }
                })?;
            for (key, value) in &page {
                visit(self, key, value)?;
            }
            self.flush()?;
            match page.last() {
                Some((last, _)) if page.len() == PAGE => {
                    from.clear();
                    from.extend_from_slice(last);
                    from.push(0);
                }
                Some(_) | None => return Ok(()),
            }
        }
    }

    fn has(&self, key: &[u8]) -> Result<bool, EngineError> {
        Ok(self.engine.get(key)?.is_some())
    }

    fn pair(&self, ping: PingId, device: DeviceId) -> Result<Option<Pair>, EngineError> {
        let key = keys::pair(ping, device);
        let value = self.engine.get(&key)?;
        Ok(value.and_then(|value| record::pair(&key, &value).ok()))
    }

    fn row(&self, device: DeviceId, row: RowKey) -> Result<Option<RowMeta>, EngineError> {
        let key = keys::row(device, row);
        let value = self.engine.get(&key)?;
        Ok(value.and_then(|value| record::row(&key, row, &value).ok().map(|row| row.meta)))
    }

    fn device_app(&self, device: DeviceId) -> Result<Option<AppId>, EngineError> {
        let key = keys::device(device);
        let value = self.engine.get(&key)?;
        Ok(value.and_then(|value| {
            record::device(&key, device, &value)
                .ok()
                .map(|record| record.app)
        }))
    }

    /// Ends a notification that has lost something, unless it has ended already.
    fn end(&mut self, app: AppId, ping: PingId, device: DeviceId, outcome: Outcome, at_ms: u64) {
        let pair = Pair {
            app,
            state: PairStored::Ended { outcome, at_ms },
        };
        self.put(&keys::pair(ping, device), |key, out| {
            record::put_pair(key, out, pair);
        });
        self.put(&keys::ended(at_ms, ping, device), |_, _| {});
    }

    fn rows(&mut self) -> Result<(), EngineError> {
        let mut tally = Tally::default();
        self.each(b'r', |work, key, value| {
            let Some((device, row)) = keys::parse_row(key) else {
                return Ok(());
            };
            if tally.device != Some(device) {
                work.mailbox(&std::mem::take(&mut tally))?;
                tally.device = Some(device);
                tally.known = work.device_app(device)?.is_some();
            }
            let Ok(stored) = record::row(key, row, value) else {
                return Ok(());
            };
            let (meta, accepted) = (stored.meta.clone(), stored.notification(None));
            if work.one_row(
                device,
                &meta,
                accepted.app,
                accepted.accepted_ms,
                tally.known,
            )? {
                tally.count = tally.count.saturating_add(1);
                tally.bytes += u64::from(meta.size);
                tally.highest = tally.highest.max(row.order);
            }
            Ok(())
        })?;
        self.mailbox(&tally)?;
        self.flush()
    }

    /// One row. Answers whether it stays.
    fn one_row(
        &mut self,
        device: DeviceId,
        meta: &RowMeta,
        app: AppId,
        accepted_ms: u64,
        known: bool,
    ) -> Result<bool, EngineError> {
        let row_key = keys::row(device, meta.key);
        let named = format!("row {} of device {device}", meta.key.order);
        if !known {
            self.audit.tell("a row whose device is gone", &named);
            self.delete(&row_key);
            if let Manner::Repair { now_ms, .. } = self.manner {
                self.end(app, meta.ping, device, Outcome::Revoked, now_ms);
            }
            return Ok(false);
        }
        let waiting = Pair {
            app,
            state: PairStored::Waiting {
                row: meta.key,
                expires_ms: meta.expires_ms,
            },
        };
        match self.pair(meta.ping, device)? {
            Some(pair) if pair == waiting => {}
            Some(Pair {
                state: PairStored::Ended { at_ms, .. },
                ..
            }) if at_ms >= accepted_ms => {
                self.audit
                    .tell("a row whose notification has ended", &named);
                self.delete(&row_key);
                return Ok(false);
            }
            Some(Pair {
                state: PairStored::Waiting { row, .. },
                ..
            }) if row != meta.key
                && self
                    .row(device, row)?
                    .is_some_and(|other| other.ping == meta.ping) =>
            {
                self.audit.tell("a second row of one notification", &named);
                self.delete(&row_key);
                return Ok(false);
            }
            Some(_) | None => {
                self.audit.tell("a row that its ping does not know", &named);
                self.put(&keys::pair(meta.ping, device), |key, out| {
                    record::put_pair(key, out, waiting);
                });
            }
        }
        if meta.shared && !self.has(&keys::body(meta.ping))? {
            self.audit.tell("a row whose body is gone", &named);
            self.delete(&row_key);
            self.end(app, meta.ping, device, Outcome::Expired, meta.expires_ms);
            return Ok(false);
        }
        let expiry = keys::expiry(meta.expires_ms, device, meta.key);
        let indexed = self.engine.get(&expiry)?;
        if indexed.and_then(|value| record::expiry(&expiry, &value).ok()) != Some(meta.ping) {
            self.audit
                .tell("a row that is not in the index of expiries", &named);
            self.put(&expiry, |key, out| record::put_expiry(key, out, meta.ping));
        }
        if let Some(collapse) = &meta.collapse {
            let place = keys::collapse(device, collapse, meta.key.order);
            let indexed = self.engine.get(&place)?;
            if indexed.and_then(|value| record::collapse(&place, &value).ok())
                != Some(meta.key.urgency)
            {
                self.audit
                    .tell("a row that is not in the index of replacement keys", &named);
                self.put(&place, |key, out| {
                    record::put_collapse(key, out, meta.key.urgency);
                });
            }
        }
        Ok(true)
    }

    /// The end of a mailbox's rows: its summary must say what they come to.
    fn mailbox(&mut self, tally: &Tally) -> Result<(), EngineError> {
        let Some(device) = tally.device.filter(|_| tally.known) else {
            return Ok(());
        };
        let Some(app) = self.device_app(device)? else {
            return Ok(());
        };
        let key = keys::summary(device);
        let stored = self.engine.get(&key)?;
        let stored = stored.and_then(|value| record::summary(&key, &value).ok());
        let next_order = if tally.count == 0 {
            Summary::new(app).next_order
        } else {
            tally.highest.saturating_add(1)
        };
        let wanted = Summary {
            count: tally.count,
            bytes: tally.bytes,
            next_order: stored.map_or(next_order, |stored| stored.next_order.max(next_order)),
            ..stored.unwrap_or(Summary::new(app))
        };
        if stored != Some(wanted) {
            self.audit.tell(
                "a mailbox whose counters do not fit its rows",
                format!("device {device}"),
            );
            self.put(&key, |key, out| record::put_summary(key, out, &wanted));
        }
        Ok(())
    }

    fn summaries(&mut self) -> Result<(), EngineError> {
        self.each(b's', |work, key, value| {
            let Some(device) = keys::parse_id(key).map(DeviceId) else {
                return Ok(());
            };
            let Some(app) = work.device_app(device)? else {
                work.audit
                    .tell("a mailbox whose device is gone", format!("device {device}"));
                work.delete(key);
                return Ok(());
            };
            let mut empty = true;
            let rows = keys::rows(device);
            work.engine
                .scan(&rows..&rows.end(), Direction::Up, &mut |_, _| {
                    empty = false;
                    ControlFlow::Break(())
                })?;
            // One with rows was counted on the way through them.
            let Ok(stored) = record::summary(key, value) else {
                return Ok(());
            };
            if empty && (stored.count, stored.bytes) != (0, 0) {
                work.audit.tell(
                    "a mailbox whose counters do not fit its rows",
                    format!("device {device}"),
                );
                let wanted = Summary {
                    app,
                    count: 0,
                    bytes: 0,
                    ..stored
                };
                work.put(&keys::summary(device), |key, out| {
                    record::put_summary(key, out, &wanted);
                });
            }
            Ok(())
        })
    }
}
