//! Between the mailbox and the disk: reads that come back, frames that are sealed, and what became of them.

use std::sync::Arc;

use super::withdraw::withdrawal;
use super::{
    Asked, Context, Counted, Departure, Insert, Known, Load, Mailbox, READ_RETRY, Row, Stage,
};
use crate::delivery::event::{
    Change, CommitFailure, Disk, Effect, Event, MailboxView, Notice, Outcome, Refusal, Rejection,
};
use crate::delivery::ids::{DeviceId, Tickets};
use crate::delivery::policy::Policy;

impl Mailbox {
    pub(super) fn handle_read(
        &mut self,
        answer: Result<Box<MailboxView>, ()>,
        cx: &mut Context<'_>,
    ) {
        self.reading = false;
        let gone = std::mem::take(&mut self.gone);
        match answer {
            Ok(view) => self.merge(*view, &gone, cx),
            Err(()) => self.read_failed(cx),
        }
    }

    pub(super) fn merge(&mut self, view: MailboxView, gone: &[u64], cx: &mut Context<'_>) {
        let Some(summary) = view.summary else {
            self.known = Known::Absent;
            return;
        };
        if let Some(withdrawals) = &view.withdrawals {
            self.learn(withdrawals);
        }
        if self.known == Known::Nothing {
            self.summary = summary;
            self.known = Known::Some;
            self.counted = Counted::Read(Load {
                count: summary.count,
                bytes: summary.bytes,
            });
        }
        for meta in view.rows {
            let order = meta.key.order;
            if self.index_of(order).is_some() || gone.contains(&order) || self.is_leaving(order) {
                continue;
            }
            let sent = meta.run != cx.policy.run || order <= self.summary.sent_up_to;
            let row = Row {
                meta,
                stage: Stage::Stored,
                body: None,
                tickets: Tickets::new(),
                sent,
                in_flight: false,
                superseded: false,
                rides: Vec::new(),
            };
            self.rows.insert(
                self.rows.partition_point(|row| row.meta.key.order < order),
                row,
            );
            self.summary.next_order = self.summary.next_order.max(order + 1);
        }
        if view.complete {
            self.known = Known::All;
            self.repair(cx);
        }
    }

    /// A crash may have left a row in flight beside its successor: the successor wins.
    pub(super) fn repair(&mut self, cx: &mut Context<'_>) {
        let mut index = self.rows.len();
        while index > 0 {
            index -= 1;
            let Some(key) = self.rows[index].meta.collapse.clone() else {
                continue;
            };
            let newer = self
                .rows
                .range(index + 1..)
                .any(|row| row.meta.collapse.as_ref() == Some(&key));
            if newer {
                cx.emit(Effect::Noticed(Notice::CollapseRepaired));
                self.end(index, Outcome::Replaced, cx.now.unix_ms, None, cx);
            }
        }
    }

    /// Those who can be told are told; the rest is tried again.
    pub(super) fn read_failed(&mut self, cx: &mut Context<'_>) {
        self.asked = Asked::default();
        for event in std::mem::take(&mut self.backlog) {
            match event {
                Event::Enqueue(enqueue) => {
                    cx.reject(
                        enqueue.ticket,
                        enqueue.notification.ping,
                        Rejection::StoreFailed,
                    );
                }
                Event::Attach(attach) => {
                    cx.emit(Effect::Refuse {
                        session: attach.session,
                        why: Refusal::StoreFailed,
                    });
                }
                Event::Revoke { .. } | Event::Wipe { .. } | Event::Clear { .. } => {
                    self.backlog.push_back(event);
                    self.read_again_at = Some(cx.now.mono + READ_RETRY);
                }
                // The sweep comes back to them; the store keeps what is withdrawn.
                Event::Expire { .. } | Event::Withdraw(_) => {}
                // These speak of sessions, and there is none before every row is known.
                Event::Detach { .. }
                | Event::Acknowledge { .. }
                | Event::Decline { .. }
                | Event::Presence { .. }
                | Event::Release { .. }
                | Event::Read(_)
                | Event::Bodies(_) => {}
            }
        }
    }

    /// Hands over what is offered.
    pub(in crate::delivery) fn seal(
        &mut self,
        device: DeviceId,
        policy: &Policy,
        changes: &mut Vec<Change>,
    ) {
        let app = self.summary.app;
        let before = changes.len();
        let mut left = self.unsealed.count;
        for row in self.rows.iter_mut().rev() {
            if left == 0 {
                break;
            }
            if row.stage == Stage::Held {
                left -= 1;
            }
            if row.stage != Stage::Offered {
                continue;
            }
            left -= 1;
            let Some(body) = &row.body else {
                debug_assert!(false, "an unsealed row keeps its body");
                continue;
            };
            let order = row.meta.key.order;
            changes.push(Change::Insert {
                device,
                order,
                run: row.meta.run,
                notification: Arc::clone(body),
            });
            row.stage = Stage::Sealed;
            self.sealed_rows += 1;
            self.unsealed.remove(row.meta.size);
            self.summary.count = self.summary.count.saturating_add(1);
            self.summary.bytes = self.summary.bytes.saturating_add(u64::from(row.meta.size));
            self.departures
                .extend(row.rides.drain(..).map(|ride| Departure {
                    because: Some(order),
                    ..ride
                }));
        }
        // Inserts were met newest first; the log tells them in order.
        changes[before..].reverse();
        for departure in self.departures.drain(..) {
            debug_assert!(
                departure.insert != Insert::Outstanding,
                "one frame is outstanding at a time"
            );
            if departure.insert == Insert::Done {
                let size = departure.meta.size;
                self.leaving.remove(size);
                self.summary.count = self.summary.count.saturating_sub(1);
                self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(size));
                changes.push(Change::Remove {
                    app,
                    device,
                    row: departure.meta.clone(),
                    outcome: departure.outcome,
                    at_ms: departure.at_ms,
                });
            } else {
                // Whoever hears of this frame believes it: nothing may bring the notification back behind it.
                changes.push(Change::Outcome {
                    app,
                    device,
                    ping: departure.meta.ping,
                    outcome: departure.outcome,
                    at_ms: departure.at_ms,
                    expires_ms: departure.meta.expires_ms,
                });
            }
            if departure.may_be_shown()
                && self.wipe.is_none()
                && let Some(withdrawal) = withdrawal(&departure, policy)
            {
                changes.push(Change::Withdraw {
                    app,
                    device,
                    withdrawal,
                });
            }
            self.sealed.push(departure);
        }
        if let Some(clearing) = self.clearing.as_mut() {
            clearing.sealed = true;
            changes.push(Change::Cleared { device });
        }
        self.touched = false;
        self.outstanding = true;
        if let Some(wipe) = self.wipe.as_mut() {
            wipe.sealed = true;
            changes.push(Change::Forget { device });
        } else {
            changes.push(Change::Summary {
                device,
                summary: self.summary,
            });
        }
    }

    /// What became of the frame.
    pub(in crate::delivery) fn handle_committed(
        &mut self,
        result: Result<(), CommitFailure>,
        cx: &mut Context<'_>,
    ) {
        self.outstanding = false;
        match result {
            Ok(()) => self.committed(cx),
            Err(failure) => self.not_committed(failure, cx),
        }
        self.pump(cx);
    }

    pub(super) fn committed(&mut self, cx: &mut Context<'_>) {
        // Only rows that are not stored yet concern a frame, and they stand near the end.
        let mut left = self.sealed_rows + self.unsealed.count;
        let mut first = self.rows.len();
        while left > 0 && first > 0 {
            first -= 1;
            match self.rows[first].stage {
                Stage::Held | Stage::Offered | Stage::Sealed => left -= 1,
                Stage::Transient | Stage::Stored => {}
            }
        }
        self.sealed_rows = 0;
        for row in self.rows.range_mut(first..) {
            for ride in &mut row.rides {
                if ride.insert == Insert::Outstanding {
                    ride.insert = Insert::Done;
                    cx.accept(&mut ride.tickets, ride.meta.ping);
                }
            }
            if row.stage == Stage::Sealed {
                row.stage = Stage::Stored;
                row.body = None;
                cx.accept(&mut row.tickets, row.meta.ping);
            }
        }
        for departure in &mut self.departures {
            if departure.insert == Insert::Outstanding {
                departure.insert = Insert::Done;
                cx.accept(&mut departure.tickets, departure.meta.ping);
            }
        }
        for departure in std::mem::take(&mut self.sealed) {
            if self.reading {
                self.gone.push(departure.meta.key.order);
            }
            self.announce(departure, true, cx);
        }
        if self
            .clearing
            .as_ref()
            .is_some_and(|clearing| clearing.sealed)
            && let Some(clearing) = self.clearing.take()
        {
            for ticket in clearing.tickets {
                cx.emit(Effect::Cleared {
                    ticket,
                    revoked: clearing.revoked,
                    known: true,
                });
            }
        }
        if self.wipe.as_ref().is_some_and(|wipe| wipe.sealed)
            && let Some(wipe) = self.wipe.take()
        {
            self.known = Known::Absent;
            for ticket in wipe.tickets {
                cx.emit(Effect::Wiped {
                    ticket,
                    revoked: wipe.revoked,
                    known: true,
                });
            }
        }
    }

    pub(super) fn not_committed(&mut self, failure: CommitFailure, cx: &mut Context<'_>) {
        let why = match failure {
            CommitFailure::NoRoom => Rejection::NoRoom,
            CommitFailure::Failed => Rejection::StoreFailed,
        };
        if let Some(wipe) = self.wipe.as_mut() {
            wipe.sealed = false;
        }
        if let Some(clearing) = self.clearing.as_mut() {
            clearing.sealed = false;
        }
        // The summary may have had more to say than its rows: how far the device was sent.
        self.touched = true;
        self.sealed_rows = 0;
        let mut lost = Vec::new();
        for row in &mut self.rows {
            if row.stage == Stage::Sealed {
                row.stage = Stage::Offered;
                self.unsealed.add(row.meta.size);
                self.summary.count = self.summary.count.saturating_sub(1);
                self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(row.meta.size));
                lost.push(row.meta.key.order);
            }
            // What was pushed out while its insert was being written: it never was.
            for ride in &mut row.rides {
                if ride.insert == Insert::Outstanding {
                    ride.insert = Insert::Never;
                    self.leaving.remove(ride.meta.size);
                    self.summary.count = self.summary.count.saturating_sub(1);
                    self.summary.bytes =
                        self.summary.bytes.saturating_sub(u64::from(ride.meta.size));
                }
            }
        }
        // Removals go back to where they came from. Those that stand alone are offered again.
        for departure in std::mem::take(&mut self.sealed) {
            if departure.insert == Insert::Done {
                let size = departure.meta.size;
                self.leaving.add(size);
                self.summary.count = self.summary.count.saturating_add(1);
                self.summary.bytes = self.summary.bytes.saturating_add(u64::from(size));
            }
            let home = departure.because.and_then(|order| self.home_of(order));
            let departures = match home {
                Some(index) => &mut self.rows[index].rides,
                None => &mut self.departures,
            };
            departures.push(Departure {
                because: None,
                ..departure
            });
        }
        for order in lost {
            if let Some(index) = self.index_of(order) {
                self.turn_away(index, why, cx);
            }
        }
        self.never_inserted(failure, cx);
        if failure == CommitFailure::Failed {
            self.store_failed(cx);
        }
    }

    /// Rows that ended while their insert was being written, and it failed.
    fn never_inserted(&mut self, failure: CommitFailure, cx: &mut Context<'_>) {
        // What they pushed out goes alone, and nobody hears of them before that is safe.
        let alone = self
            .departures
            .iter()
            .any(|departure| departure.insert == Insert::Done);
        for mut departure in std::mem::take(&mut self.departures) {
            if departure.insert != Insert::Outstanding {
                self.departures.push(departure);
                continue;
            }
            let size = departure.meta.size;
            self.leaving.remove(size);
            self.summary.count = self.summary.count.saturating_sub(1);
            self.summary.bytes = self.summary.bytes.saturating_sub(u64::from(size));
            departure.insert = Insert::Never;
            if failure == CommitFailure::Failed || cx.disk == Disk::Failed {
                // Perhaps it is on disk, and comes back after the restart: no outcome can be told. Whoever waited when the
                // disk failed was told already.
                for ticket in departure.tickets {
                    cx.reject(ticket, departure.meta.ping, Rejection::StoreFailed);
                }
            } else if alone {
                self.departures.push(departure);
            } else {
                self.announce(departure, false, cx);
            }
        }
    }

    /// Where the removals belong that the acceptance of this row caused: to it, or to the one that took its place while it was
    /// being written. `None`: it has its outcome, and they stand alone.
    fn home_of(&self, order: u64) -> Option<usize> {
        self.index_of(order).or_else(|| {
            let is_it = |departure: &Departure| departure.meta.key.order == order;
            self.rows.iter().position(|row| row.rides.iter().any(is_it))
        })
    }

    /// The store promises nothing any more: whoever waits for it is told.
    pub(in crate::delivery) fn store_failed(&mut self, cx: &mut Context<'_>) {
        self.release(|_| true, cx);
        let offered: Vec<u64> = self
            .rows
            .iter()
            .filter(|row| row.stage == Stage::Offered)
            .map(|row| row.meta.key.order)
            .collect();
        for order in offered {
            if let Some(index) = self.index_of(order) {
                self.turn_away(index, Rejection::StoreFailed, cx);
            }
        }
        // No frame will follow that could make these true: whoever waits for one of them learns that nobody knows.
        for departure in &mut self.departures {
            for ticket in std::mem::take(&mut departure.tickets) {
                cx.reject(ticket, departure.meta.ping, Rejection::StoreFailed);
            }
        }
    }
}
