//! What is held against each other beside the rows: devices, pairs, bodies, indexes, topics, expansions and the rest.

use std::ops::ControlFlow;

use super::{Manner, Named, Work};
use crate::delivery::{DeviceId, Outcome, PingId, RowKey, Summary};
use crate::ports::Span;
use crate::store::engine::{Direction, EngineError};
use crate::store::keys::{self, Part};
use crate::store::record::{self, PairStored};

impl Work<'_> {
    pub(super) fn devices(&mut self) -> Result<(), EngineError> {
        self.each(b'd', |work, key, value| {
            let Some(id) = keys::parse_id(key).map(DeviceId) else {
                return Ok(());
            };
            let Ok(device) = record::device(key, id, value) else {
                return Ok(());
            };
            if !work.has(&keys::summary(id))? {
                work.audit
                    .tell("a device without a mailbox", format!("device {id}"));
                if let Manner::Repair { gaps: false, .. } = work.manner {
                    // Nothing is missing, so it was forgotten: its revocation was cut off.
                    work.delete(key);
                    return Ok(());
                }
                work.put(&keys::summary(id), |key, out| {
                    record::put_summary(key, out, &Summary::new(device.app));
                });
            }
            for place in [
                keys::app_device(device.app, id),
                keys::user_device(device.app, &device.user, id),
            ] {
                if !work.has(&place)? {
                    work.audit
                        .tell("a device that is not on its lists", format!("device {id}"));
                    work.put(&place, |_, _| {});
                }
            }
            Ok(())
        })
    }

    pub(super) fn pairs(&mut self) -> Result<(), EngineError> {
        self.each(b'p', |work, key, value| {
            let (Some((ping, device)), Ok(pair)) =
                (keys::parse_pair(key), record::pair(key, value))
            else {
                return Ok(());
            };
            match pair.state {
                PairStored::Waiting { row, expires_ms } => {
                    let there = work.row(device, row)?.is_some_and(|meta| meta.ping == ping);
                    if !there {
                        work.audit.tell(
                            "a notification that waits without a row",
                            format!("ping {ping} for device {device}"),
                        );
                        work.end(pair.app, ping, device, Outcome::Expired, expires_ms);
                    }
                }
                PairStored::Ended { at_ms, .. } => {
                    let place = keys::ended(at_ms, ping, device);
                    if !work.has(&place)? {
                        work.audit.tell(
                            "an outcome that is not in the index of ages",
                            format!("ping {ping} for device {device}"),
                        );
                        work.put(&place, |_, _| {});
                    }
                }
            }
            Ok(())
        })
    }

    pub(super) fn bodies(&mut self) -> Result<(), EngineError> {
        self.each(b'b', |work, key, _| {
            let Some(ping) = keys::parse_id(key).map(PingId) else {
                return Ok(());
            };
            let mut waits = false;
            let pairs = keys::pairs(ping);
            work.engine
                .scan(&pairs..&pairs.end(), Direction::Up, &mut |key, value| {
                    // One that cannot be read may wait.
                    waits |= record::pair(key, value).map_or(true, |pair| {
                        matches!(pair.state, PairStored::Waiting { .. })
                    });
                    if waits {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                })?;
            if !waits {
                work.audit.tell(
                    "a shared body that nobody waits for",
                    format!("ping {ping}"),
                );
                work.delete(key);
            }
            Ok(())
        })
    }

    pub(super) fn expiries(&mut self) -> Result<(), EngineError> {
        self.each(b'x', |work, key, _| {
            let Some((expires_ms, device, row)) = keys::parse_expiry(key) else {
                return Ok(());
            };
            if work
                .row(device, row)?
                .is_none_or(|meta| meta.expires_ms != expires_ms)
            {
                work.audit.tell(
                    "a place in the index of expiries without its row",
                    format!("row {} of device {device}", row.order),
                );
                work.delete(key);
            }
            Ok(())
        })
    }

    pub(super) fn collapses(&mut self) -> Result<(), EngineError> {
        self.each(b'c', |work, key, value| {
            let (Some((device, collapse, order)), Ok(urgency)) =
                (keys::parse_collapse_key(key), record::collapse(key, value))
            else {
                return Ok(());
            };
            if work
                .row(device, RowKey { urgency, order })?
                .is_none_or(|meta| meta.collapse != Some(collapse))
            {
                work.audit.tell(
                    "a place in the index of replacement keys without its row",
                    format!("row {order} of device {device}"),
                );
                work.delete(key);
            }
            Ok(())
        })
    }

    /// The lists of devices, of apps and of users.
    pub(super) fn lists(&mut self) -> Result<(), EngineError> {
        for room in [b'e', b'u'] {
            self.each(room, |work, key, _| {
                let listed = match keys::parse_app_device(key) {
                    Some((app, device)) => Some((app, None, device)),
                    None => keys::parse_user_device(key)
                        .map(|(app, user, device)| (app, Some(user), device)),
                };
                let Some((app, user, device)) = listed else {
                    return Ok(());
                };
                let place = keys::device(device);
                let value = work.engine.get(&place)?;
                let fits = value
                    .and_then(|value| record::device(&place, device, &value).ok())
                    .is_some_and(|record| {
                        record.app == app && user.is_none_or(|user| record.user == user)
                    });
                if !fits {
                    work.audit.tell(
                        "a place on a list of devices without its device",
                        format!("device {device}"),
                    );
                    work.delete(key);
                }
                Ok(())
            })?;
        }
        self.each(b'l', |work, key, _| {
            let Some(device) = keys::parse_id(key).map(DeviceId) else {
                return Ok(());
            };
            if !work.has(&keys::device(device))? {
                work.audit.tell(
                    "the last sight of a device that is gone",
                    format!("device {device}"),
                );
                work.delete(key);
            }
            Ok(())
        })
    }

    /// The topics of devices: each is in the list of its topic, as a member.
    pub(super) fn topics(&mut self) -> Result<(), EngineError> {
        self.each(b'h', |work, key, value| {
            let (Some(device), Ok((app, topics))) = (
                keys::parse_id(key).map(DeviceId),
                record::topics(key, value),
            ) else {
                return Ok(());
            };
            if work.device_app(device)? != Some(app) {
                work.audit.tell(
                    "the topics of a device that is gone",
                    format!("device {device}"),
                );
                work.delete(key);
                return Ok(());
            }
            for membership in topics {
                let place = keys::member(app, &membership.topic, device);
                let stored = work.engine.get(&place)?;
                let mut spans = stored
                    .and_then(|value| record::spans(&place, &value).ok())
                    .unwrap_or_default();
                if spans.iter().all(|span| span.left.is_some()) {
                    work.audit.tell(
                        "a member that is not in the list of its topic",
                        format!("device {device}"),
                    );
                    spans.push(Span {
                        joined: membership.joined,
                        left: None,
                    });
                    work.put(&place, |key, out| record::put_spans(key, out, &spans));
                }
            }
            Ok(())
        })
    }

    /// The lists of topics. A device that left stays in one while a ping of before that is on its way.
    pub(super) fn members(&mut self) -> Result<(), EngineError> {
        let mut expanding = false;
        let room = keys::expansions();
        self.engine
            .scan(&room..&room.end(), Direction::Up, &mut |_, _| {
                expanding = true;
                ControlFlow::Break(())
            })?;
        self.each(b'g', |work, key, value| {
            let (Some((app, topic, device)), Ok(spans)) =
                (keys::parse_member(key), record::spans(key, value))
            else {
                return Ok(());
            };
            let own = keys::topics(device);
            let stored = work.engine.get(&own)?;
            let member = stored
                .and_then(|value| record::topics(&own, &value).ok())
                .is_some_and(|(owner, topics)| {
                    owner == app && topics.iter().any(|membership| membership.topic == topic)
                });
            if member {
                return Ok(());
            }
            if spans.iter().any(|span| span.left.is_none()) {
                work.audit.tell(
                    "a place in the list of a topic without its member",
                    format!("device {device}"),
                );
                work.delete(key);
            } else if !expanding || work.device_app(device)?.is_none() {
                work.audit.leftovers += 1;
                work.delete(key);
            }
            Ok(())
        })
    }

    /// Expansions: without what was accepted nothing can go on.
    pub(super) fn expansions(&mut self) -> Result<(), EngineError> {
        self.each(keys::EXPANSIONS, |work, key, _| {
            let Some((app, stamp, part)) = keys::parse_expansion(key) else {
                return Ok(());
            };
            if part != Part::Head && !work.has(&keys::expansion_part(app, stamp, Part::Head))? {
                work.audit
                    .tell("a part of an expansion without its head", Named(key));
                work.delete(key);
            }
            Ok(())
        })
    }

    pub(super) fn idempotency(&mut self) -> Result<(), EngineError> {
        self.each(b'i', |work, key, value| {
            let Some((app, hash)) = keys::parse_idempotency(key) else {
                return Ok(());
            };
            let Ok(used) = record::idempotency(key, app, hash, value) else {
                return Ok(());
            };
            let place = keys::idempotency_age(used.at_ms, app, hash);
            if !work.has(&place)? {
                work.audit.tell(
                    "an idempotency key that is not in the index of ages",
                    format!("of ping {}", used.ping),
                );
                work.put(&place, |_, _| {});
            }
            Ok(())
        })
    }

    pub(super) fn withdrawals(&mut self) -> Result<(), EngineError> {
        self.each(b'w', |work, key, value| {
            let (Some((device, ping)), Ok((_, until_ms))) =
                (keys::parse_withdrawal(key), record::withdrawal(key, value))
            else {
                return Ok(());
            };
            if work.device_app(device)?.is_none() {
                work.audit.leftovers += 1;
                work.delete(key);
                return Ok(());
            }
            let place = keys::withdrawal_end(until_ms, device, ping);
            if !work.has(&place)? {
                work.audit.tell(
                    "a withdrawal that is not in the index of ages",
                    format!("of ping {ping} from device {device}"),
                );
                work.put(&place, |_, _| {});
            }
            Ok(())
        })
    }

    /// Places by age whose records ended anew or were used anew: harmless, and gone with the sweep.
    pub(super) fn ages(&mut self) -> Result<(), EngineError> {
        self.each(b't', |work, key, _| {
            let Some((at, ping, device)) = keys::parse_ended(key) else {
                return Ok(());
            };
            let ended = work.pair(ping, device)?.map(|pair| pair.state);
            if !matches!(ended, Some(PairStored::Ended { at_ms, .. }) if at_ms == at) {
                work.audit.leftovers += 1;
                work.delete(key);
            }
            Ok(())
        })?;
        self.each(b'j', |work, key, _| {
            let Some((at, app, hash)) = keys::parse_idempotency_age(key) else {
                return Ok(());
            };
            let place = keys::idempotency(app, hash);
            let value = work.engine.get(&place)?;
            let used = value.and_then(|value| record::idempotency(&place, app, hash, &value).ok());
            if used.is_none_or(|used| used.at_ms != at) {
                work.audit.leftovers += 1;
                work.delete(key);
            }
            Ok(())
        })?;
        self.each(b'y', |work, key, _| {
            let Some((until, device, ping)) = keys::parse_withdrawal_end(key) else {
                return Ok(());
            };
            let place = keys::withdrawal(device, ping);
            let value = work.engine.get(&place)?;
            let told = value.and_then(|value| record::withdrawal(&place, &value).ok());
            if told.is_none_or(|(_, until_ms)| until_ms != until) {
                work.audit.leftovers += 1;
                work.delete(key);
            }
            Ok(())
        })
    }
}
