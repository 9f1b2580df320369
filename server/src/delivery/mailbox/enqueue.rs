//! A ping arrives: joins, replaces, makes room, waits its turn, or is turned away.

use std::sync::Arc;

use super::{
    Context, Departure, FULL_DISK_PATIENCE, Found, Insert, Known, Load, Mailbox, Row, Stage,
};
use crate::delivery::event::{Disk, Effect, Enqueue, Notice, Outcome, Rejection, RowKey, RowMeta};
use crate::delivery::ids::{PingId, Ticket, Tickets};
use crate::delivery::notification::{CollapseKey, Notification};
use crate::delivery::policy::{OverflowRule, Policy};
use crate::delivery::session::{InFlight, UNTIL_RELEASED};
use crate::delivery::stock::Quota;

impl Mailbox {
    pub(super) fn enqueue(&mut self, enqueue: Enqueue, cx: &mut Context<'_>) {
        let Enqueue {
            ticket,
            notification,
            may_repeat,
            too_fast,
            patient,
        } = enqueue;
        let ping = notification.ping;
        if cx.disk == Disk::Failed {
            return cx.reject(ticket, ping, Rejection::StoreFailed);
        }
        if self.known == Known::Absent
            || self.wipe.is_some()
            || notification.app != self.summary.app
        {
            return cx.reject(ticket, ping, Rejection::UnknownDevice);
        }
        if may_repeat && self.join(ticket, ping, cx) {
            return;
        }
        if too_fast {
            return cx.reject(ticket, ping, Rejection::TooFast);
        }
        if notification.expires_ms <= cx.now.unix_ms {
            return self.end_at_once(
                ticket,
                &notification,
                Outcome::Expired,
                notification.expires_ms,
                cx,
            );
        }
        if notification.transient {
            return self.enqueue_transient(ticket, notification, cx);
        }
        let replaced = notification
            .collapse
            .as_ref()
            .and_then(|key| self.position_of_key(key));
        let victims = match self.overflow(&notification, replaced, cx.policy) {
            None => Vec::new(),
            Some(_) if cx.policy.overflow == OverflowRule::Refuse => {
                return cx.reject(ticket, ping, Rejection::MailboxFull);
            }
            Some(over) => match self.victims(&notification, replaced, over) {
                Some(victims) => victims,
                None => {
                    return self.end_at_once(
                        ticket,
                        &notification,
                        Outcome::Refused,
                        cx.now.unix_ms,
                        cx,
                    );
                }
            },
        };
        if cx.disk == Disk::Full && !self.could_send(&notification) {
            return cx.reject(ticket, ping, Rejection::NoRoom);
        }
        // As with a full disk: what can be sent at once is, and its window bounds what may have to be stored all the same.
        if !self.could_send(&notification)
            && let Some(quota) = self.crossed(&notification, replaced, &victims, cx)
        {
            return cx.reject(ticket, ping, Rejection::Quota(quota));
        }

        let mut rides = Vec::new();
        // The one replaced goes first: its index does not outlive the victims.
        if let Some(old) = replaced {
            if self.rows[old.index].in_flight {
                self.rows[old.index].superseded = true;
            } else {
                self.ride(old.order, Outcome::Replaced, &mut rides, cx);
            }
        }
        for order in victims {
            self.ride(order, Outcome::Evicted, &mut rides, cx);
        }

        let order = self.summary.next_order;
        self.summary.next_order += 1;
        // What is brought again may have been sent by the run that brought it first.
        let sent = patient && may_repeat;
        let meta = RowMeta {
            key: RowKey {
                urgency: notification.urgency,
                order,
            },
            ping,
            size: notification.size,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.clone(),
            run: cx.policy.run.wrapping_sub(u32::from(sent)),
            shared: notification.shared,
        };
        // One that comes back after a crash with its replacement key would push out what replaced it: that is not to be any
        // likelier than it is.
        let waits = patient && meta.collapse.is_none();
        self.unsealed.add(meta.size);
        if self.rows.capacity() == 0 {
            // Mostly it stays the only one.
            self.rows.reserve_exact(1);
        }
        self.rows.push_back(Row {
            meta,
            stage: Stage::Offered,
            body: Some(notification),
            tickets: Tickets::from_iter([ticket]),
            sent,
            in_flight: false,
            superseded: false,
            rides,
        });
        self.pump(cx);
        if !self.hold_back(order, waits, cx) {
            self.release_before(order, cx);
        }
    }

    /// TTL 0: sent now or never.
    pub(super) fn enqueue_transient(
        &mut self,
        ticket: Ticket,
        notification: Arc<Notification>,
        cx: &mut Context<'_>,
    ) {
        if !self.could_send(&notification) {
            return self.end_at_once(ticket, &notification, Outcome::Expired, cx.now.unix_ms, cx);
        }
        let order = self.summary.next_order;
        self.summary.next_order += 1;
        let meta = RowMeta {
            key: RowKey {
                urgency: notification.urgency,
                order,
            },
            ping: notification.ping,
            size: notification.size,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.clone(),
            run: cx.policy.run,
            shared: notification.shared,
        };
        let mut tickets = Tickets::from_iter([ticket]);
        cx.accept(&mut tickets, notification.ping);
        self.rows.push_back(Row {
            meta,
            stage: Stage::Transient,
            body: Some(notification),
            tickets,
            sent: false,
            in_flight: false,
            superseded: false,
            rides: Vec::new(),
        });
        self.pump(cx);
    }

    /// An id that waits already changes nothing and takes that row's answer. Answers whether there was one.
    pub(super) fn join(&mut self, ticket: Ticket, ping: PingId, cx: &mut Context<'_>) -> bool {
        if let Some(index) = self.position_of(ping) {
            let row = &mut self.rows[index];
            match row.stage {
                Stage::Held | Stage::Offered | Stage::Sealed => row.tickets.push(ticket),
                Stage::Transient | Stage::Stored => {
                    cx.accept(&mut Tickets::from_iter([ticket]), ping)
                }
            }
            return true;
        }
        let rides = self.rows.iter_mut().flat_map(|row| row.rides.iter_mut());
        let leaving = self
            .departures
            .iter_mut()
            .chain(self.sealed.iter_mut())
            .chain(rides);
        for departure in leaving {
            if departure.meta.ping == ping {
                departure.tickets.push(ticket);
                return true;
            }
        }
        false
    }

    /// It is accepted and has its outcome in the same moment; nothing is kept.
    #[expect(clippy::unused_self, reason = "reads as what happens to this mailbox")]
    pub(super) fn end_at_once(
        &self,
        ticket: Ticket,
        notification: &Notification,
        outcome: Outcome,
        at_ms: u64,
        cx: &mut Context<'_>,
    ) {
        let (app, ping, device) = (notification.app, notification.ping, cx.device);
        cx.emit(Effect::Ended {
            tickets: Tickets::from_iter([ticket]),
            app,
            device,
            ping,
            outcome,
            at_ms,
            stored: false,
        });
    }

    /// What the mailbox would hold too much with the newcomer in it; `None`: it fits.
    pub(super) fn overflow(
        &self,
        newcomer: &Notification,
        replaced: Option<Found>,
        policy: &Policy,
    ) -> Option<Load> {
        let Load {
            mut count,
            mut bytes,
        } = self.occupied();
        if let Some(old) = replaced.filter(|old| !self.rows[old.index].in_flight) {
            count = count.saturating_sub(1);
            bytes = bytes.saturating_sub(u64::from(self.rows[old.index].meta.size));
        }
        let over = Load {
            count: (count + 1).saturating_sub(policy.mailbox_notifications),
            bytes: (bytes + u64::from(newcomer.size)).saturating_sub(policy.mailbox_bytes),
        };
        (over != Load::default()).then_some(over)
    }

    /// The rows that make room: lowest urgency first, oldest first within it, none more urgent than the newcomer,
    /// none in flight. `None`: the known rows do not suffice.
    pub(super) fn victims(
        &self,
        newcomer: &Notification,
        replaced: Option<Found>,
        over: Load,
    ) -> Option<Vec<u64>> {
        let mut candidates: Vec<(RowKey, u32)> = self
            .rows
            .iter()
            .filter(|row| !row.in_flight && row.stage != Stage::Transient)
            .filter(|row| row.meta.key.urgency <= newcomer.urgency)
            .filter(|row| replaced.is_none_or(|old| old.order != row.meta.key.order))
            .map(|row| (row.meta.key, row.meta.size))
            .collect();
        if self.known != Known::All && !self.asked.lowest {
            // Rows that rank lower may exist unseen.
            return None;
        }
        candidates.sort_unstable_by_key(|&(key, _)| key);
        let mut freed = Load::default();
        let mut orders = Vec::new();
        for (key, size) in candidates {
            if freed.count >= over.count && freed.bytes >= over.bytes {
                break;
            }
            freed.add(size);
            orders.push(key.order);
        }
        (freed.count >= over.count && freed.bytes >= over.bytes).then_some(orders)
    }

    /// Whether enough rows are known that rank lowest and yet may not make room: then the newcomer ranks lowest itself.
    pub(super) fn outranked(&self, replaced: Option<Found>, over: Load) -> bool {
        let mut known = Load::default();
        for row in &self.rows {
            let stays = row.in_flight || row.stage == Stage::Transient;
            if !stays && replaced.is_none_or(|old| old.order != row.meta.key.order) {
                known.add(row.meta.size);
            }
        }
        known.count >= over.count && known.bytes >= over.bytes
    }

    /// Takes a row out and lets it ride with a newcomer.
    pub(super) fn ride(
        &mut self,
        order: u64,
        outcome: Outcome,
        rides: &mut Vec<Departure>,
        cx: &Context<'_>,
    ) {
        let Some(mut row) = self
            .index_of(order)
            .and_then(|index| self.rows.remove(index))
        else {
            return;
        };
        let insert = match row.stage {
            Stage::Stored => Insert::Done,
            Stage::Sealed => Insert::Outstanding,
            Stage::Held | Stage::Offered | Stage::Transient => Insert::Never,
        };
        match insert {
            Insert::Never => {
                self.unsealed.remove(row.meta.size);
                rides.append(&mut row.rides);
            }
            Insert::Outstanding | Insert::Done => self.leaving.add(row.meta.size),
        }
        if row.stage == Stage::Sealed {
            self.sealed_rows -= 1;
        }
        rides.push(Departure {
            meta: row.meta,
            insert,
            outcome,
            at_ms: cx.now.unix_ms,
            tickets: row.tickets,
            revokers: Vec::new(),
            late: Vec::new(),
            sent: row.sent,
            because: None,
        });
    }

    /// The quota of the app that would be crossed if the newcomer took its place here, and the others left theirs.
    fn crossed(
        &self,
        newcomer: &Notification,
        replaced: Option<Found>,
        victims: &[u64],
        cx: &Context<'_>,
    ) -> Option<Quota> {
        let (mut count, mut bytes) = self.uncounted();
        count += 1;
        bytes += i64::from(newcomer.size);
        let replaced = replaced.filter(|old| !self.rows[old.index].in_flight);
        let victims = victims.iter().filter_map(|order| self.index_of(*order));
        for index in victims.chain(replaced.map(|old| old.index)) {
            count -= 1;
            bytes -= i64::from(self.rows[index].meta.size);
        }
        cx.tally.crossed(self.summary.app, (count, bytes))
    }

    /// Whether a newcomer would be sent at once.
    pub(super) fn could_send(&self, newcomer: &Notification) -> bool {
        self.session.as_ref().is_some_and(|session| {
            session.has_place()
                && newcomer.urgency >= session.min_urgency
                && self
                    .next_to_send(session.cursor, session.min_urgency)
                    .is_none()
        })
    }

    /// Gives the acknowledgement of a row just sent a chance to beat the disk. `waits`: the row may wait until it is released.
    /// Answers whether it is held.
    pub(super) fn hold_back(&mut self, order: u64, waits: bool, cx: &mut Context<'_>) -> bool {
        let Some(session) = self.session.as_mut() else {
            return false;
        };
        let now = cx.now.mono;
        let (until, long) = match (cx.disk, session.defers_for(now, cx.policy)) {
            (Disk::Full, _) => (now + FULL_DISK_PATIENCE, true),
            _ if waits && session.is_prompt(now, cx.policy) => (UNTIL_RELEASED, true),
            (_, Some(patience)) => (now + patience, false),
            (_, None) => return false,
        };
        let Some(flight) = session
            .in_flight
            .back_mut()
            .filter(|flight| flight.order == order)
        else {
            return false;
        };
        let Some(row) = self
            .rows
            .back_mut()
            .filter(|row| row.meta.key.order == order)
        else {
            return false;
        };
        flight.held_until = Some(until);
        flight.held_long = long;
        row.stage = Stage::Held;
        self.held += 1;
        cx.emit(Effect::Noticed(Notice::Deferred));
        true
    }

    /// Ends the holding back of every row for which `due` says so, and of those before them that are held for long.
    pub(super) fn release(&mut self, due: impl Fn(&InFlight) -> bool, cx: &mut Context<'_>) {
        if self.held == 0 {
            return;
        }
        let Some(session) = self.session.as_mut() else {
            return;
        };
        let mut orders = Vec::new();
        for flight in &mut session.in_flight {
            if flight.held_until.is_some() && due(flight) {
                flight.held_until = None;
                orders.push(flight.order);
            }
        }
        let last = orders.iter().max().copied();
        for order in orders {
            self.offer_held(order, cx);
        }
        if let Some(last) = last {
            self.release_before(last, cx);
        }
    }

    /// The row of this order goes to the disk: what is held for long before it goes along. (What is held for moments was
    /// promised to nobody yet.)
    fn release_before(&mut self, order: u64, cx: &mut Context<'_>) {
        let is_due = |flight: &InFlight| {
            flight.held_until.is_some() && flight.held_long && flight.order < order
        };
        let waits = self.held > 0
            && self
                .session
                .as_ref()
                .is_some_and(|session| session.in_flight.iter().any(is_due));
        if waits {
            self.release(is_due, cx);
        }
    }

    /// What is held back of a ping has waited long enough.
    pub(super) fn release_ping(&mut self, ping: PingId, cx: &mut Context<'_>) {
        let Some(row) = self.rows.iter().rev().find(|row| row.meta.ping == ping) else {
            return;
        };
        let order = row.meta.key.order;
        let is_due = |flight: &InFlight| flight.order == order && flight.is_patient();
        if cx.disk == Disk::Full {
            // As with one that comes now: it is in flight, and would be turned away.
            let flights = self.session.iter_mut().flat_map(|s| &mut s.in_flight);
            for flight in flights.filter(|flight| is_due(flight)) {
                flight.held_until = Some(cx.now.mono + FULL_DISK_PATIENCE);
            }
            return;
        }
        self.release(is_due, cx);
    }

    pub(super) fn offer_held(&mut self, order: u64, cx: &mut Context<'_>) {
        let Some(index) = self
            .index_of(order)
            .filter(|&index| self.rows[index].stage == Stage::Held)
        else {
            return;
        };
        self.held -= 1;
        self.rows[index].stage = Stage::Offered;
        match cx.disk {
            Disk::Open => {}
            Disk::Full => self.turn_away(index, Rejection::NoRoom, cx),
            Disk::Failed => self.turn_away(index, Rejection::StoreFailed, cx),
        }
    }

    /// An unsealed row that can no longer be promised: its publisher is told, what it pushed out comes back.
    pub(super) fn turn_away(&mut self, index: usize, why: Rejection, cx: &mut Context<'_>) {
        let Some(row) = self.rows.remove(index) else {
            return;
        };
        debug_assert!(matches!(row.stage, Stage::Offered | Stage::Held));
        self.unsealed.remove(row.meta.size);
        if row.stage == Stage::Held {
            self.held -= 1;
        }
        if let Some(session) = self.session.as_mut() {
            session.end(row.meta.key.order, row.meta.ping);
        }
        for ticket in row.tickets {
            cx.reject(ticket, row.meta.ping, why);
        }
        for ride in row.rides {
            self.bring_back(ride, why, cx);
        }
        self.superseded_no_more(row.meta.collapse.as_ref());
    }

    /// Undoes a departure whose cause did not happen.
    pub(super) fn bring_back(
        &mut self,
        departure: Departure,
        why: Rejection,
        cx: &mut Context<'_>,
    ) {
        let stage = match departure.insert {
            Insert::Done => Stage::Stored,
            Insert::Outstanding => Stage::Sealed,
            Insert::Never => {
                for ticket in departure.tickets {
                    cx.reject(ticket, departure.meta.ping, why);
                }
                for ticket in departure.late {
                    cx.emit(Effect::RevokeAnswered {
                        ticket,
                        revoked: false,
                    });
                }
                return;
            }
        };
        let order = departure.meta.key.order;
        if let Some(key) = &departure.meta.collapse
            && let Some(successor) = self.rows.iter_mut().rev().find(|row| {
                row.meta.collapse.as_ref() == Some(key)
                    && row.meta.key.order > order
                    && row.stage != Stage::Transient
            })
        {
            // A still newer one has its place.
            let outcome = Outcome::Replaced;
            let departures = match successor.stage {
                Stage::Held | Stage::Offered => &mut successor.rides,
                Stage::Sealed | Stage::Stored | Stage::Transient => &mut self.departures,
            };
            return departures.push(Departure {
                outcome,
                ..departure
            });
        }
        self.leaving.remove(departure.meta.size);
        if stage == Stage::Sealed {
            self.sealed_rows += 1;
        }
        let sent = departure.meta.run != cx.policy.run || order <= self.summary.sent_up_to;
        let (ping, late) = (departure.meta.ping, departure.late);
        let mut tickets = departure.tickets;
        if stage == Stage::Stored {
            // They joined it on its way out; it stays, and it is safe.
            cx.accept(&mut tickets, departure.meta.ping);
        }
        let row = Row {
            meta: departure.meta,
            stage,
            body: None,
            tickets,
            sent,
            in_flight: false,
            superseded: false,
            rides: Vec::new(),
        };
        self.rows.insert(
            self.rows.partition_point(|row| row.meta.key.order < order),
            row,
        );
        if let Some(session) = self.session.as_mut() {
            // Never sent in this session, or it would have been in flight: let the cursor meet it again. What lies
            // between is in flight or was passed over, and neither is sent twice.
            session.cursor = session.cursor.min(order - 1);
        }
        // It did not end after all.
        for ticket in late {
            self.revoke(ticket, ping, cx);
        }
    }

    /// The successor of a row in flight was turned away.
    pub(super) fn superseded_no_more(&mut self, key: Option<&CollapseKey>) {
        let Some(key) = key else { return };
        if self.position_of_key(key).is_none()
            && let Some(row) = self
                .rows
                .iter_mut()
                .rev()
                .find(|row| row.meta.collapse.as_ref() == Some(key))
        {
            row.superseded = false;
        }
    }
}
