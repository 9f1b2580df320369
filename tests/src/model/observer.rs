//! What must hold whatever happens when: the promises of one mailbox, watched from outside.
//!
//! The observer sees what goes in, what comes out and what is on disk; it knows nothing of how the core decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bellwire_server::delivery::{
    Acknowledged, Attach, Change, Closing, CommitFailure, Disk, Effect, Notification, Outcome,
    PingId, Refusal, Rejection, SessionId, Ticket, Verdict,
};

use super::store::ModelStore;
use super::world::{START_MS, name, serial};

/// Who waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waiting {
    Ping(PingId),
    Revoke(PingId),
    Wipe,
}

/// What the publisher was told about a ping, and what others said of it.
#[derive(Debug, Default)]
struct Account {
    /// Accepted, and no outcome yet.
    promised: Option<Promise>,
    /// An outcome was told, and it was not asked for again since.
    over: bool,
    /// A crash left it on disk without anybody having been told.
    left_on_disk: bool,
    acknowledged: bool,
    declined: bool,
    revoked: bool,
    serials: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Promise {
    Stored,
    Transient,
}

/// One notification that was asked for.
#[derive(Debug)]
struct Made {
    notification: Arc<Notification>,
    run: u32,
    /// It was sent in this or an earlier run.
    sent: bool,
    /// It was sent in this run.
    sent_in_run: bool,
    /// It may wait for its acknowledgement until it is released.
    patient: bool,
    /// An earlier run may have sent it, as far as whoever asked knows.
    repeated: bool,
    /// It took its place: what it replaced must not come after it.
    took_place: bool,
}

/// The session that was welcomed last.
#[derive(Debug)]
struct Open {
    id: SessionId,
    window: usize,
    seq: u64,
    /// Sent and without the device's word, by seq.
    unanswered: Vec<(u64, PingId)>,
    sent: BTreeSet<usize>,
    last_serial: Option<usize>,
    /// What it was told to take off the screen, and its last number then.
    withdrawn: BTreeMap<PingId, u64>,
    /// The highest number that the device has answered.
    answered: u64,
    /// A newcomer was turned away meanwhile, and what it had pushed out came back.
    came_back: bool,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Observer {
    /// Unix milliseconds.
    pub now_ms: u64,
    /// What must not happen, and did.
    pub complaints: Vec<String>,
    run: u32,
    waiting: BTreeMap<Ticket, Waiting>,
    accounts: BTreeMap<PingId, Account>,
    made: Vec<Made>,
    attaching: BTreeMap<SessionId, u16>,
    left: BTreeSet<SessionId>,
    sessions: BTreeSet<SessionId>,
    open: Option<Open>,
    disk: Disk,
    was_full: bool,
    no_room: bool,
    reads_failed: bool,
    wiped: bool,
    /// What was ever withdrawn.
    withdrawn: BTreeSet<PingId>,
}

impl Observer {
    fn complain(&mut self, complaint: impl Into<String>) {
        self.complaints.push(complaint.into());
    }

    // ---- What goes in --------------------------------------------------------------------------------------------

    /// A ping goes in.
    pub fn asked(
        &mut self,
        ticket: Ticket,
        notification: Arc<Notification>,
        run: u32,
        (patient, repeat): (bool, bool),
    ) {
        self.now_ms = self.now_ms.max(START_MS);
        self.run = run;
        let ping = notification.ping;
        let account = self.accounts.entry(ping).or_default();
        account.over = false;
        account.serials.push(serial(&notification));
        self.waiting.insert(ticket, Waiting::Ping(ping));
        self.made.push(Made {
            notification,
            run,
            sent: false,
            sent_in_run: false,
            patient,
            repeated: patient && repeat,
            took_place: false,
        });
    }

    /// A device says hello.
    pub fn attaches(&mut self, attach: &Attach) {
        self.now_ms = self.now_ms.max(START_MS);
        self.sessions.insert(attach.session);
        self.attaching.insert(attach.session, attach.window);
        for &(ping, verdict) in &attach.seen {
            self.verdict(ping, verdict);
        }
    }

    fn verdict(&mut self, ping: PingId, verdict: Verdict) {
        if let Some(account) = self.accounts.get_mut(&ping) {
            match verdict {
                Verdict::Acknowledged => account.acknowledged = true,
                Verdict::Declined => account.declined = true,
            }
        }
    }

    /// A connection is gone.
    pub fn detaches(&mut self, session: SessionId) {
        if self.sessions.contains(&session) {
            self.left.insert(session);
        }
        if self.open.as_ref().is_some_and(|open| open.id == session) {
            self.open = None;
        }
    }

    /// The device has these.
    pub fn acknowledges(&mut self, session: SessionId, what: &Acknowledged) {
        let Some(open) = self.open.as_mut().filter(|open| open.id == session) else {
            return;
        };
        let mut named = Vec::new();
        let answered = &mut open.answered;
        match what {
            Acknowledged::UpTo(up_to) => open.unanswered.retain(|&(seq, ping)| {
                if seq <= *up_to {
                    *answered = seq.max(*answered);
                    named.push(ping);
                }
                seq > *up_to
            }),
            Acknowledged::Ids(ids) => {
                named.clone_from(ids);
                open.unanswered.retain(|&(seq, ping)| {
                    if ids.contains(&ping) {
                        *answered = seq.max(*answered);
                    }
                    !ids.contains(&ping)
                });
            }
        }
        for ping in named {
            self.verdict(ping, Verdict::Acknowledged);
        }
    }

    /// The device will not have this one.
    pub fn declines(&mut self, session: SessionId, ping: PingId) {
        let Some(open) = self.open.as_mut().filter(|open| open.id == session) else {
            return;
        };
        let answered = &mut open.answered;
        open.unanswered.retain(|&(seq, one)| {
            if one == ping {
                *answered = seq.max(*answered);
            }
            one != ping
        });
        self.verdict(ping, Verdict::Declined);
    }

    /// The publisher takes one back.
    pub fn revokes(&mut self, ticket: Ticket, ping: PingId) {
        self.waiting.insert(ticket, Waiting::Revoke(ping));
        if let Some(account) = self.accounts.get_mut(&ping) {
            account.revoked = true;
        }
    }

    /// The device is to take one off the screen.
    pub fn withdraws(&mut self, ping: PingId) {
        self.withdrawn.insert(ping);
    }

    /// The device is revoked.
    pub fn wipes(&mut self, ticket: Ticket) {
        self.waiting.insert(ticket, Waiting::Wipe);
        self.wiped = true;
    }

    /// What the disk can do from now on.
    pub fn disk(&mut self, disk: Disk) {
        if self.disk != Disk::Failed {
            self.disk = disk;
            self.was_full |= disk == Disk::Full;
        }
    }

    /// A frame is about to be written. Rows go to the disk in their order, or a crash could bring an earlier one again behind a
    /// later one.
    pub fn sealed(&mut self, changes: &[Change], store: &ModelStore) {
        let rows = changes.iter().filter_map(|change| match change {
            Change::Insert { notification, .. } => Some(notification),
            Change::Remove { .. }
            | Change::Outcome { .. }
            | Change::Withdraw { .. }
            | Change::Summary { .. }
            | Change::Forget { .. }
            | Change::Cleared { .. } => None,
        });
        let rows: Vec<&Arc<Notification>> = rows.collect();
        let Some(last) = rows.iter().map(|row| serial(row)).max() else {
            return;
        };
        let mut left = Vec::new();
        for made in self.made.iter().take(last) {
            let ping = made.notification.ping;
            let in_flight = self.open.as_ref().is_some_and(|open| {
                let waits = open.unanswered.iter().any(|&(_, one)| one == ping);
                let number = serial(&made.notification);
                // One that was turned away and asked for again is another.
                let newest = self.accounts[&ping].serials.last() == Some(&number);
                let sent = open.sent.contains(&number);
                waits && sent && newest && !self.left.contains(&open.id)
            });
            if !made.patient || made.notification.collapse.is_some() || !in_flight {
                continue;
            }
            let account = &self.accounts[&ping];
            let waits = self
                .waiting
                .values()
                .any(|what| *what == Waiting::Ping(ping));
            let ended = account.acknowledged || account.declined || account.revoked || self.wiped;
            let is_there = store.has(ping) || rows.iter().any(|row| row.ping == ping);
            if waits
                && !ended
                && !is_there
                && !made.notification.transient
                && made.notification.expires_ms > self.now_ms
            {
                left.push(ping);
            }
        }
        for ping in left {
            self.complain(format!(
                "{} is held back, and a later one goes to the disk",
                name(ping)
            ));
        }
    }

    /// What became of a frame.
    pub fn committed(&mut self, result: Result<(), CommitFailure>) {
        match result {
            Ok(()) => {}
            Err(CommitFailure::NoRoom) => self.no_room = true,
            Err(CommitFailure::Failed) => self.disk = Disk::Failed,
        }
    }

    /// A read failed.
    pub fn read_failed(&mut self) {
        self.reads_failed = true;
    }

    /// The server died and starts again.
    pub fn crashes(&mut self, store: &ModelStore, run: u32) {
        self.run = run;
        self.waiting.clear();
        self.attaching.clear();
        self.open = None;
        self.disk = Disk::Open;
        self.wiped = store.summary.is_none();
        let mut lost = Vec::new();
        for (&ping, account) in &mut self.accounts {
            let on_disk = store.has(ping);
            let ended = store.outcomes.contains_key(&ping);
            if account.promised == Some(Promise::Stored) && !on_disk && !ended {
                lost.push(ping);
            }
            if account.over && on_disk {
                lost.push(ping);
            }
            account.left_on_disk = on_disk;
            account.promised = on_disk.then_some(Promise::Stored);
            account.over = !on_disk;
        }
        for ping in lost {
            self.complain(format!("the crash changed what became of {}", name(ping)));
        }
        for made in &mut self.made {
            made.sent_in_run = false;
        }
    }

    // ---- What comes out ------------------------------------------------------------------------------------------

    /// Something happened.
    pub fn happened(&mut self, effect: &Effect, store: &ModelStore) {
        match effect {
            Effect::Accepted { ticket, ping, .. } => self.accepted(*ticket, *ping, store),
            Effect::Ended {
                tickets,
                ping,
                outcome,
                at_ms,
                stored,
                ..
            } => self.ended(tickets, *ping, *outcome, *at_ms, *stored, store),
            Effect::Rejected {
                ticket, ping, why, ..
            } => self.rejected(*ticket, *ping, *why),
            Effect::RevokeAnswered { ticket, revoked } => match self.waiting.remove(ticket) {
                Some(Waiting::Revoke(ping)) => {
                    if *revoked && store.has(ping) {
                        self.complain(format!("{} is revoked and still on disk", name(ping)));
                    }
                }
                Some(Waiting::Ping(_) | Waiting::Wipe) | None => {
                    self.complain(format!("nobody waits with t{}", ticket.0));
                }
            },
            Effect::Cleared { ticket, .. } => {
                self.complain(format!("nobody asked to clear with t{}", ticket.0));
            }
            Effect::Wiped { ticket, .. } => {
                if self.waiting.remove(ticket) != Some(Waiting::Wipe) {
                    self.complain(format!("nobody waits with t{}", ticket.0));
                }
                if store.summary.is_some() || !store.rows.is_empty() {
                    self.complain("wiped, and still on disk");
                }
            }
            Effect::Welcome {
                session, window, ..
            } => self.welcomed(*session, *window),
            Effect::Refuse { session, why } => self.refused(*session, *why),
            Effect::Send {
                session,
                seq,
                redelivered,
                notification,
            } => self.sent(*session, *seq, *redelivered, notification),
            Effect::Withdraw { session, pings } => self.withdrawal_told(*session, pings),
            Effect::WithdrawalsHeard { heard, .. } => {
                for one in heard {
                    let heard = self.open.as_ref().is_some_and(|open| {
                        let told = open.withdrawn.get(&one.ping);
                        told.is_some_and(|&seq| seq < open.answered)
                    });
                    if !heard {
                        self.complain(format!(
                            "the withdrawal of {} counts as heard, and was not",
                            name(one.ping)
                        ));
                    }
                }
            }
            Effect::Close { session, why } => {
                if self.open.as_ref().is_none_or(|open| open.id != *session) {
                    self.complain("a session is closed that is not open");
                }
                let legal = match why {
                    Closing::Replaced => !self.attaching.is_empty(),
                    Closing::Revoked => self.wiped,
                    // The core knows no secrets.
                    Closing::SecretEnded => false,
                    Closing::AckTimeout => self
                        .open
                        .as_ref()
                        .is_some_and(|open| !open.unanswered.is_empty()),
                };
                if !legal {
                    self.complain(format!("a session is closed as {why:?} without reason"));
                }
                self.open = None;
            }
            Effect::Read(_) | Effect::Fetch { .. } | Effect::Noticed(_) => {}
        }
    }

    fn withdrawal_told(&mut self, session: SessionId, pings: &[PingId]) {
        let Some(open) = self.open.as_mut().filter(|open| open.id == session) else {
            return self.complain("a withdrawal for nobody");
        };
        let mut without_reason = None;
        for &ping in pings {
            open.withdrawn.insert(ping, open.seq);
            let revoked = self.accounts.get(&ping).is_some_and(|one| one.revoked);
            if !revoked && !self.withdrawn.contains(&ping) {
                without_reason = Some(ping);
            }
        }
        if let Some(ping) = without_reason {
            self.complain(format!("{} is withdrawn without reason", name(ping)));
        }
    }

    fn answers(&mut self, ticket: Ticket, ping: PingId) {
        if self.waiting.remove(&ticket) != Some(Waiting::Ping(ping)) {
            self.complain(format!(
                "nobody waits with t{} for {}",
                ticket.0,
                name(ping)
            ));
        }
    }

    fn accepted(&mut self, ticket: Ticket, ping: PingId, store: &ModelStore) {
        self.answers(ticket, ping);
        let stored = store.has(ping);
        let transient = self
            .made
            .iter()
            .any(|made| made.notification.ping == ping && made.notification.transient);
        let promise = match (stored, transient) {
            (true, _) => Promise::Stored,
            (false, true) => Promise::Transient,
            (false, false) => {
                self.complain(format!("{} is accepted and not on disk", name(ping)));
                return;
            }
        };
        let account = self.accounts.entry(ping).or_default();
        account.over = false;
        account.promised = Some(promise);
    }

    fn ended(
        &mut self,
        tickets: &[Ticket],
        ping: PingId,
        outcome: Outcome,
        at_ms: u64,
        stored: bool,
        store: &ModelStore,
    ) {
        for &ticket in tickets {
            self.answers(ticket, ping);
        }
        let of = name(ping);
        let newest = self.accounts[&ping].serials.last();
        let in_flight = self.open.as_ref().is_some_and(|open| {
            let waits = open.unanswered.iter().any(|&(_, one)| one == ping);
            waits
                && !self.left.contains(&open.id)
                && newest.is_some_and(|newest| open.sent.contains(newest))
        });
        let mine: Vec<&Made> = self
            .made
            .iter()
            .filter(|made| made.notification.ping == ping)
            .collect();
        let legal = match outcome {
            Outcome::Acknowledged => self.accounts[&ping].acknowledged,
            Outcome::Declined => self.accounts[&ping].declined,
            Outcome::Replaced => mine.iter().any(|old| {
                old.notification.collapse.is_some()
                    && self.made.iter().any(|new| {
                        new.notification.collapse == old.notification.collapse
                            && serial(&new.notification) > serial(&old.notification)
                    })
            }),
            Outcome::Expired => {
                at_ms <= self.now_ms
                    && mine.iter().any(|made| {
                        made.notification.transient || made.notification.expires_ms == at_ms
                    })
            }
            Outcome::Evicted => !in_flight,
            Outcome::Revoked => self.accounts[&ping].revoked || self.wiped,
            Outcome::Refused => !stored && !tickets.is_empty(),
            Outcome::Forwarded => false,
        };
        if !legal {
            self.complain(format!("{of} must not end as {}", outcome.as_str()));
        }
        if stored && store.outcomes.get(&ping) != Some(&outcome) {
            self.complain(format!(
                "the end of {of} is told, the disk does not know it"
            ));
        }
        if store.has(ping) {
            self.complain(format!("{of} has ended and is on disk"));
        }
        let verdict = matches!(
            outcome,
            Outcome::Acknowledged | Outcome::Declined | Outcome::Revoked
        );
        // One that was asked for again may begin anew.
        let asked_again = self
            .waiting
            .values()
            .any(|what| *what == Waiting::Ping(ping));
        let account = self.accounts.entry(ping).or_default();
        if tickets.is_empty() && account.promised.is_none() && !account.left_on_disk {
            self.complaints
                .push(format!("{of} ends twice, or without having been accepted"));
        }
        account.promised = None;
        account.left_on_disk = false;
        account.over = !asked_again;
        if verdict {
            for made in &mut self.made {
                made.took_place |= made.notification.ping == ping && made.sent_in_run;
            }
        }
    }

    fn rejected(&mut self, ticket: Ticket, ping: PingId, why: Rejection) {
        self.answers(ticket, ping);
        let legal = match why {
            Rejection::UnknownDevice => true,
            Rejection::MailboxFull => true,
            Rejection::NoRoom => self.was_full || self.no_room,
            Rejection::StoreFailed => self.disk == Disk::Failed || self.reads_failed,
            // Found out before the core sees anything.
            Rejection::TooFast | Rejection::Quota(_) => false,
        };
        if !legal {
            self.complain(format!(
                "{} is rejected as {why:?} without reason",
                name(ping)
            ));
        }
        if let Some(open) = self.open.as_mut() {
            open.came_back = true;
        }
    }

    fn welcomed(&mut self, session: SessionId, window: u16) {
        if self.attaching.remove(&session) != Some(window) {
            self.complain("a welcome for nobody, or with another window");
        }
        let left = |open: &Open| self.left.contains(&open.id);
        if self.open.as_ref().is_some_and(|open| !left(open)) {
            self.complain("two sessions at once");
        }
        self.open = Some(Open {
            id: session,
            window: usize::from(window),
            seq: 0,
            unanswered: Vec::new(),
            sent: BTreeSet::new(),
            last_serial: None,
            withdrawn: BTreeMap::new(),
            answered: 0,
            came_back: false,
        });
    }

    fn refused(&mut self, session: SessionId, why: Refusal) {
        if self.attaching.remove(&session).is_none() {
            self.complain("a refusal for nobody");
        }
        let legal = match why {
            Refusal::StaleAttempt | Refusal::DuplicateDevice => self.open.is_some(),
            Refusal::UnknownDevice => true,
            Refusal::StoreFailed => self.reads_failed,
        };
        if !legal {
            self.complain(format!("a session is refused as {why:?} without reason"));
        }
    }

    fn sent(
        &mut self,
        session: SessionId,
        seq: u64,
        redelivered: bool,
        notification: &Notification,
    ) {
        let of = name(notification.ping);
        let number = serial(notification);
        let (now_ms, run) = (self.now_ms, self.run);
        // One that was in flight, or had its verdict when the server died, may come again.
        let account = &self.accounts[&notification.ping];
        let decided = account.acknowledged || account.declined || account.revoked;
        let overtaken = notification.collapse.is_some()
            && !decided
            && !self.made[number].sent
            && self.made.iter().any(|new| {
                new.took_place
                    && !new.notification.transient
                    && new.notification.collapse == notification.collapse
                    && serial(&new.notification) > number
            });
        let later_sent = self
            .made
            .iter()
            .skip(number + 1)
            .any(|made| made.sent_in_run);
        let Some(open) = self.open.as_mut().filter(|open| open.id == session) else {
            return self.complain(format!("{of} is sent to nobody"));
        };
        let mut complaints = Vec::new();
        if seq != open.seq + 1 {
            complaints.push("the numbers of a session have a gap".to_owned());
        }
        open.seq = seq;
        if notification.expires_ms <= now_ms {
            complaints.push(format!("{of} is sent past its expiry"));
        }
        if open.unanswered.len() >= open.window {
            complaints.push(format!("{of} is sent beyond the window"));
        }
        open.unanswered.push((seq, notification.ping));
        if !open.sent.insert(number) {
            complaints.push(format!("{of} is sent twice in one session"));
        }
        if open.last_serial.is_some_and(|last| last > number) && !open.came_back {
            complaints.push(format!("{of} is sent out of order"));
        }
        open.last_serial = Some(number);
        if overtaken {
            complaints.push(format!("{of} is sent after its successor took its place"));
        }
        let made = &mut self.made[number];
        if !redelivered && (made.run != run || made.sent) {
            complaints.push(format!(
                "{of} may have been sent before, and does not say so"
            ));
        }
        if redelivered && made.run == run && !made.sent && !later_sent && !made.repeated {
            complaints.push(format!("{of} says that it may have been sent before"));
        }
        made.sent = true;
        made.sent_in_run = true;
        self.complaints.append(&mut complaints);
    }

    // ---- What is on disk -----------------------------------------------------------------------------------------

    /// After each step.
    pub fn look(&mut self, store: &ModelStore) {
        // Its connection broke before the mailbox could welcome it.
        if let Some(open) = &self.open
            && self.left.contains(&open.id)
        {
            self.open = None;
        }
        for (&ping, account) in &self.accounts {
            let on_disk = store.has(ping);
            if account.promised == Some(Promise::Stored)
                && !on_disk
                && !store.outcomes.contains_key(&ping)
            {
                self.complaints.push(format!(
                    "{} was promised and is neither on disk nor ended",
                    name(ping)
                ));
            }
            if account.over && on_disk {
                self.complaints
                    .push(format!("{} came back after its end", name(ping)));
            }
        }
        if let Some(open) = &self.open {
            for one in &store.withdrawals {
                if one.until_ms > self.now_ms && !open.withdrawn.contains_key(&one.ping) {
                    let name = name(one.ping);
                    self.complaints.push(format!(
                        "the device is not told to take {name} off the screen"
                    ));
                }
            }
        }
        for (meta, notification) in store.rows.values() {
            if let Some(made) = self.made.get_mut(serial(notification)) {
                made.took_place = true;
            }
            debug_assert_eq!(meta.ping, notification.ping);
        }
    }

    /// At rest, nobody may be left waiting.
    pub fn nobody_waits(&mut self) {
        let failed = self.is_failed();
        let left: Vec<String> = self
            .waiting
            .iter()
            // After the disk failed only a restart tells what became of removals; the runtime answers these.
            .filter(|(_, what)| !failed || matches!(what, Waiting::Ping(_)))
            .map(|(ticket, what)| match what {
                Waiting::Ping(ping) => format!("t{} for {}", ticket.0, name(*ping)),
                Waiting::Revoke(ping) => format!("t{} to revoke {}", ticket.0, name(*ping)),
                Waiting::Wipe => format!("t{} to wipe", ticket.0),
            })
            .collect();
        if !left.is_empty() {
            self.complain(format!("nobody answers {}", left.join(", ")));
        }
        if !self.attaching.is_empty() {
            self.complain("nobody answers a hello");
        }
    }

    /// Pings that somebody waits for.
    #[must_use]
    pub fn waited_for(&self) -> Vec<PingId> {
        let pings = self.waiting.values().filter_map(|what| match what {
            Waiting::Ping(ping) => Some(*ping),
            Waiting::Revoke(_) | Waiting::Wipe => None,
        });
        pings.collect()
    }

    // ---- What generators ask -------------------------------------------------------------------------------------

    /// Whether the disk failed.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.disk == Disk::Failed
    }

    /// Whether this number was given to a session.
    #[must_use]
    pub fn knows_session(&self, session: SessionId) -> bool {
        self.sessions.contains(&session)
    }

    /// A number for the next session.
    #[must_use]
    pub fn next_session(&self) -> u64 {
        self.sessions.last().map_or(1, |last| last.0 + 1)
    }

    /// Whether this session has said hello and waits for the mailbox.
    #[must_use]
    pub fn is_attaching(&self, session: SessionId) -> bool {
        self.attaching.contains_key(&session)
    }

    /// Whether this session is attached.
    #[must_use]
    pub fn is_attached(&self, session: SessionId) -> bool {
        self.open.as_ref().is_some_and(|open| open.id == session)
    }

    /// The last number sent in this session; 0 for one that is not attached.
    #[must_use]
    pub fn last_seq(&self, session: SessionId) -> u64 {
        self.open
            .as_ref()
            .filter(|open| open.id == session)
            .map_or(0, |open| open.seq)
    }

    /// The attached session and what waits for its word.
    #[must_use]
    pub fn session(&self) -> Option<(u64, &[(u64, PingId)])> {
        self.open
            .as_ref()
            .map(|open| (open.id.0, open.unanswered.as_slice()))
    }
}
