//! One mailbox as one would write it without a disk that is slow and memory that is short: a list of notifications, all of it
//! known, every change safe at once. Written from the promises in `docs/`, not from the core.

use bellwire_server::delivery::{Urgency, Verdict};

use super::step::{Name, Step, TRANSIENT, WITHDRAWN_MS};

/// Something that must come out: its text, and how strictly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// In the language of the tables.
    pub text: String,
    /// Whether it may end in `redelivered`.
    pub redelivered: Redelivered,
    /// It may be missing: whether something was sent is known for sure only while the mailbox is awake.
    pub optional: bool,
}

/// What is known of a notification's past.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Redelivered {
    /// It was never sent, and that is known.
    No,
    /// It was sent, or another run accepted it.
    Yes,
    /// It was not sent, but a later one was: it may be told either way.
    Either,
}

#[derive(Debug, Clone)]
struct Row {
    name: Name,
    order: u64,
    urgency: Urgency,
    key: Option<char>,
    size: u32,
    expires_ms: u64,
    transient: bool,
    run: u32,
    sent: bool,
    in_flight: bool,
    superseded: bool,
}

#[derive(Debug)]
struct Flight {
    seq: u64,
    /// `None`: it ended without the device's word, and keeps its place.
    order: Option<u64>,
    name: Name,
    sent_ms: u64,
}

#[derive(Debug)]
struct Session {
    id: u64,
    instance: u128,
    attempt: u64,
    window: usize,
    min: Urgency,
    seq: u64,
    /// Up to here everything was sent, or passed over because of its urgency.
    cursor: u64,
    flights: Vec<Flight>,
    replaced_ms: Vec<u64>,
    refuse_until_ms: Option<u64>,
}

/// What the device is to take off the screen.
#[derive(Debug)]
struct Withdrawn {
    name: Name,
    /// `None`: told at once to whoever was there, and kept nowhere.
    until_ms: Option<u64>,
    /// The session's last number when it was told.
    after: Option<u64>,
    /// Whether it was told at all is not known.
    perhaps: bool,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub struct Reference {
    device: bool,
    count: u32,
    bytes: u64,
    refuse: bool,
    now_ms: u64,
    run: u32,
    orders: u64,
    /// The newest that was sent in this run.
    newest_sent: u64,
    tickets: u64,
    sessions: Vec<u64>,
    rows: Vec<Row>,
    session: Option<Session>,
    withdrawn: Vec<Withdrawn>,
    lines: Vec<Line>,
}

/// No verdict within this time closes the session.
const ACK_TIMEOUT_MS: u64 = 300_000;
/// More replacements than this within a minute, and other instances are refused for a minute.
const REPLACEMENTS: usize = 3;
const MINUTE_MS: u64 = 60_000;

impl Reference {
    /// A world without a device.
    #[must_use]
    pub fn new() -> Reference {
        Reference {
            count: 1_000,
            bytes: 1 << 20,
            run: 1,
            ..Reference::default()
        }
    }

    /// Whether one in flight has a successor: after a crash both are there, until somebody looks.
    #[must_use]
    pub fn has_superseded(&self) -> bool {
        self.rows.iter().any(|row| row.superseded)
    }

    /// What a step must cause, its frame included.
    pub fn step(&mut self, step: &Step) -> Vec<Line> {
        self.lines.clear();
        match step {
            Step::Device => self.device = true,
            Step::Policy {
                count,
                bytes,
                refuse,
                ..
            } => {
                (self.count, self.bytes, self.refuse) = (*count, *bytes, *refuse);
            }
            Step::Enqueue {
                name,
                ttl_ms,
                urgency,
                key,
                size,
                transient,
                repeat,
                patient,
            } => {
                self.tickets += 1;
                let ttl_ms = match transient {
                    true => u64::try_from(TRANSIENT.as_millis()).unwrap_or(u64::MAX),
                    false => *ttl_ms,
                };
                let row = Row {
                    name: *name,
                    order: 0,
                    urgency: *urgency,
                    key: *key,
                    size: *size,
                    expires_ms: self.now_ms + ttl_ms,
                    transient: *transient,
                    // It counts as one of an earlier run, which may have sent it.
                    run: self.run - u32::from(*patient && *repeat && !*transient),
                    sent: false,
                    in_flight: false,
                    superseded: false,
                };
                self.enqueue(row, *repeat);
            }
            Step::Attach {
                session,
                instance,
                attempt,
                window,
                min,
                seen,
            } => {
                if !self.sessions.contains(session) {
                    self.sessions.push(*session);
                    let fresh = Session {
                        id: *session,
                        instance: *instance,
                        attempt: *attempt,
                        window: usize::from(*window),
                        min: *min,
                        seq: 0,
                        cursor: 0,
                        flights: Vec::new(),
                        replaced_ms: Vec::new(),
                        refuse_until_ms: None,
                    };
                    self.attach(fresh, seen);
                }
            }
            Step::Detach(session) => {
                if self.is_attached(*session) {
                    self.detach();
                }
            }
            Step::AckUpTo(session, seq) => {
                if self.is_attached(*session) {
                    self.acknowledge_up_to(*seq);
                }
            }
            Step::AckIds(session, names) => {
                if self.is_attached(*session) {
                    for &name in names {
                        self.verdict(name, "acknowledged");
                    }
                    self.pump();
                }
            }
            Step::Decline(session, name) => {
                if self.is_attached(*session) {
                    self.verdict(*name, "declined");
                    self.pump();
                }
            }
            Step::Revoke(name) => self.revoke(*name),
            Step::Withdraw(name) => self.withdraw(*name),
            Step::Wipe => self.wipe(),
            Step::Sweep => {
                let now_ms = self.now_ms;
                while let Some(index) = self
                    .rows
                    .iter()
                    .position(|row| !row.transient && row.expires_ms <= now_ms)
                {
                    self.expire(index);
                }
                self.pump();
            }
            Step::At(ms) => self.at(*ms),
            Step::Crash(_) => {
                self.run += 1;
                self.session = None;
                self.untell();
                self.newest_sent = 0;
                self.rows.retain(|row| !row.transient);
                for row in &mut self.rows {
                    row.in_flight = false;
                }
            }
            Step::Release(_)
            | Step::Seal
            | Step::Commit
            | Step::NoRoom
            | Step::Fail(_)
            | Step::Disk(_)
            | Step::HoldReads
            | Step::AnswerOne
            | Step::AnswerReads
            | Step::FailReads
            | Step::Rot(_) => {}
        }
        std::mem::take(&mut self.lines)
    }

    fn line(&mut self, text: String) {
        self.lines.push(Line {
            text,
            redelivered: Redelivered::No,
            optional: false,
        });
    }

    fn is_attached(&self, session: u64) -> bool {
        self.session
            .as_ref()
            .is_some_and(|current| current.id == session)
    }

    fn past(&self, row: &Row) -> Redelivered {
        if row.sent || row.run != self.run {
            Redelivered::Yes
        } else if row.order < self.newest_sent {
            Redelivered::Either
        } else {
            Redelivered::No
        }
    }

    fn enqueue(&mut self, mut row: Row, repeat: bool) {
        let (ticket, name, now_ms) = (self.tickets, row.name, self.now_ms);
        if !self.device {
            return self.line(format!("rejected t{ticket} {name} UnknownDevice"));
        }
        if repeat && self.rows.iter().any(|row| row.name == name) {
            return self.line(format!("accepted t{ticket} {name}"));
        }
        if row.expires_ms <= now_ms {
            let at_ms = row.expires_ms;
            return self.line(format!("ended [t{ticket}] {name} expired @{at_ms}ms"));
        }
        if row.transient && !self.could_send(&row) {
            return self.line(format!("ended [t{ticket}] {name} expired @{now_ms}ms"));
        }
        if !row.transient {
            let predecessor = self.rows.iter().rposition(|old| {
                row.key.is_some() && old.key == row.key && !old.superseded && !old.transient
            });
            let Some(victims) = self.make_room(&row, predecessor) else {
                let answer = match self.refuse {
                    true => format!("rejected t{ticket} {name} MailboxFull"),
                    false => format!("ended [t{ticket}] {name} refused @{now_ms}ms"),
                };
                return self.line(answer);
            };
            let mut ending: Vec<(u64, &str)> = victims
                .into_iter()
                .map(|order| (order, "evicted"))
                .collect();
            if let Some(index) = predecessor {
                let old = &mut self.rows[index];
                if old.in_flight {
                    old.superseded = true;
                } else {
                    ending.push((old.order, "replaced"));
                }
            }
            for (order, outcome) in ending {
                if let Some(index) = self.rows.iter().position(|row| row.order == order) {
                    self.end(index, outcome, now_ms);
                }
            }
        }
        self.orders += 1;
        row.order = self.orders;
        self.rows.push(row);
        self.line(format!("accepted t{ticket} {name}"));
        self.pump();
    }

    fn could_send(&self, newcomer: &Row) -> bool {
        self.session.as_ref().is_some_and(|session| {
            session.flights.len() < session.window
                && newcomer.urgency >= session.min
                && self.next_to_send(session).is_none()
        })
    }

    /// Who goes: lowest urgency first, oldest first within it. `None`: there is no room to be made.
    fn make_room(&self, newcomer: &Row, predecessor: Option<usize>) -> Option<Vec<u64>> {
        let leaves = predecessor.filter(|&index| !self.rows[index].in_flight);
        let (mut count, mut bytes) = (1, u64::from(newcomer.size));
        for (index, row) in self.rows.iter().enumerate() {
            if !row.transient && leaves != Some(index) {
                count += 1;
                bytes += u64::from(row.size);
            }
        }
        let mut ranked: Vec<&Row> = self
            .rows
            .iter()
            .enumerate()
            .filter(|(index, row)| {
                predecessor != Some(*index)
                    && !row.transient
                    && !row.in_flight
                    && row.urgency <= newcomer.urgency
            })
            .map(|(_, row)| row)
            .collect();
        ranked.sort_by_key(|row| (row.urgency, row.order));
        let mut victims = Vec::new();
        for row in ranked {
            if count <= self.count && bytes <= self.bytes {
                break;
            }
            count -= 1;
            bytes -= u64::from(row.size);
            victims.push(row.order);
        }
        let fits = count <= self.count && bytes <= self.bytes;
        (fits && (victims.is_empty() || !self.refuse)).then_some(victims)
    }

    fn attach(&mut self, mut fresh: Session, seen: &[(Name, Verdict)]) {
        let (id, now_ms) = (fresh.id, self.now_ms);
        if !self.device {
            return self.line(format!("refuse s{id} UnknownDevice"));
        }
        if let Some(current) = &mut self.session {
            if current.instance == fresh.instance {
                if fresh.attempt <= current.attempt {
                    return self.line(format!("refuse s{id} StaleAttempt"));
                }
            } else {
                if current.refuse_until_ms.is_some_and(|until| now_ms >= until) {
                    current.refuse_until_ms = None;
                    current.replaced_ms.clear();
                }
                current.replaced_ms.retain(|at| now_ms - at < MINUTE_MS);
                if current.refuse_until_ms.is_none() && current.replaced_ms.len() >= REPLACEMENTS {
                    current.refuse_until_ms = Some(now_ms + MINUTE_MS);
                }
                if current.refuse_until_ms.is_some() {
                    return self.line(format!("refuse s{id} DuplicateDevice"));
                }
                current.replaced_ms.push(now_ms);
            }
            fresh.replaced_ms.clone_from(&current.replaced_ms);
            fresh.refuse_until_ms = current.refuse_until_ms;
            let text = format!("close s{} Replaced", current.id);
            self.line(text);
            self.detach();
        }
        for (name, verdict) in seen {
            let outcome = match verdict {
                Verdict::Acknowledged => "acknowledged",
                Verdict::Declined => "declined",
            };
            if let Some(index) = self.rows.iter().position(|row| row.name == *name) {
                self.end(index, outcome, now_ms);
            }
        }
        let waiting = self.rows.iter().filter(|row| row.urgency >= fresh.min);
        let (pending, window) = (waiting.count(), fresh.window);
        self.line(format!("welcome s{id} pending={pending} window={window}"));
        self.session = Some(fresh);
        self.tell_all(id);
        self.pump();
    }

    /// A new session hears everything that is withdrawn and not heard yet.
    fn tell_all(&mut self, session: u64) {
        let now_ms = self.now_ms;
        self.withdrawn
            .retain(|one| one.until_ms.is_some_and(|until| until > now_ms));
        let mut names: Vec<Name> = Vec::new();
        for one in &mut self.withdrawn {
            one.after = Some(0);
            names.push(one.name);
        }
        names.sort_by_key(|&name| u8::try_from(name).ok());
        if !names.is_empty() {
            let names: Vec<String> = names.iter().map(char::to_string).collect();
            self.line(format!("withdraw s{session} {}", names.join(",")));
        }
    }

    fn untell(&mut self) {
        self.withdrawn.retain(|one| one.until_ms.is_some());
        for one in &mut self.withdrawn {
            (one.after, one.perhaps) = (None, false);
        }
    }

    fn withdraw(&mut self, name: Name) {
        if !self.device {
            return;
        }
        let until_ms = Some(self.now_ms + WITHDRAWN_MS);
        let at = match self.withdrawn.iter().position(|one| one.name == name) {
            Some(at) => at,
            None => {
                self.withdrawn.push(Withdrawn {
                    name,
                    until_ms,
                    after: None,
                    perhaps: false,
                });
                self.withdrawn.len() - 1
            }
        };
        let one = &mut self.withdrawn[at];
        one.until_ms = until_ms;
        if let Some(session) = &self.session
            && (one.after.is_none() || one.perhaps)
        {
            let optional = one.perhaps;
            (one.after, one.perhaps) = (Some(session.seq), false);
            self.lines.push(Line {
                text: format!("withdraw s{} {name}", session.id),
                redelivered: Redelivered::No,
                optional,
            });
        }
    }

    /// The device has answered this number: it has heard all that came before.
    fn heard_before(&mut self, seq: u64) {
        self.withdrawn
            .retain(|one| one.after.is_none_or(|after| after >= seq));
    }

    fn detach(&mut self) {
        let Some(session) = self.session.take() else {
            return;
        };
        self.untell();
        for flight in session.flights {
            let Some(index) = self
                .rows
                .iter()
                .position(|row| Some(row.order) == flight.order)
            else {
                continue;
            };
            self.rows[index].in_flight = false;
            if self.rows[index].superseded {
                self.end(index, "replaced", self.now_ms);
            } else if self.rows[index].transient {
                self.end(index, "expired", self.now_ms);
            }
        }
    }

    fn next_to_send(&self, session: &Session) -> Option<usize> {
        self.rows.iter().position(|row| {
            row.order > session.cursor && row.urgency >= session.min && !row.in_flight
        })
    }

    fn pump(&mut self) {
        loop {
            let Some(session) = &self.session else { return };
            if session.flights.len() >= session.window {
                return;
            }
            let Some(index) = self.next_to_send(session) else {
                return;
            };
            if self.rows[index].expires_ms <= self.now_ms {
                self.expire(index);
                continue;
            }
            let redelivered = self.past(&self.rows[index]);
            let row = &mut self.rows[index];
            row.sent = true;
            row.in_flight = true;
            self.newest_sent = self.newest_sent.max(row.order);
            let Some(session) = &mut self.session else {
                return;
            };
            session.seq += 1;
            session.cursor = row.order;
            session.flights.push(Flight {
                seq: session.seq,
                order: Some(row.order),
                name: row.name,
                sent_ms: self.now_ms,
            });
            self.lines.push(Line {
                text: format!("send s{} #{} {}", session.id, session.seq, row.name),
                redelivered,
                optional: false,
            });
        }
    }

    fn acknowledge_up_to(&mut self, seq: u64) {
        let Some(session) = &mut self.session else {
            return;
        };
        if seq > session.seq {
            return;
        }
        let mut orders = Vec::new();
        let mut last = 0;
        session.flights.retain(|flight| {
            if flight.seq <= seq {
                orders.extend(flight.order);
                last = flight.seq;
            }
            flight.seq > seq
        });
        self.heard_before(last);
        for order in orders {
            if let Some(index) = self.rows.iter().position(|row| row.order == order) {
                self.end(index, "acknowledged", self.now_ms);
            }
        }
        self.pump();
    }

    fn verdict(&mut self, name: Name, outcome: &str) {
        if let Some(session) = &mut self.session
            && let Some(at) = session
                .flights
                .iter()
                .position(|flight| flight.order.is_none() && flight.name == name)
        {
            session.flights.remove(at);
        }
        if let Some(index) = self.rows.iter().position(|row| row.name == name) {
            let order = self.rows[index].order;
            let flights = self.session.iter().flat_map(|session| &session.flights);
            let flight = flights
                .into_iter()
                .find(|flight| flight.order == Some(order));
            if let Some(seq) = flight.map(|flight| flight.seq) {
                self.heard_before(seq);
            }
            self.end(index, outcome, self.now_ms);
        }
    }

    fn revoke(&mut self, name: Name) {
        self.tickets += 1;
        let ticket = self.tickets;
        let Some(index) = self.rows.iter().position(|row| row.name == name) else {
            return self.line(format!("revoke t{ticket} false"));
        };
        let past = self.past(&self.rows[index]);
        if let Some(session) = &self.session
            && past != Redelivered::No
        {
            let line = Line {
                text: format!("withdraw s{} {name}", session.id),
                redelivered: Redelivered::No,
                optional: past == Redelivered::Either,
            };
            let (after, perhaps) = (Some(session.seq), past == Redelivered::Either);
            self.lines.push(line);
            match self.withdrawn.iter_mut().find(|one| one.name == name) {
                // Told before or told now.
                Some(one) if one.after.is_some() && !one.perhaps => {
                    if !perhaps {
                        one.after = after;
                    }
                }
                Some(one) => (one.after, one.perhaps) = (after, perhaps),
                None => self.withdrawn.push(Withdrawn {
                    name,
                    until_ms: None,
                    after,
                    perhaps,
                }),
            }
        }
        if past != Redelivered::No {
            // It goes with the frame of its withdrawal, which has the outcome whatever the TTL was.
            self.rows[index].transient = false;
        }
        self.end(index, "revoked", self.now_ms);
        self.line(format!("revoke t{ticket} true"));
        self.pump();
    }

    fn wipe(&mut self) {
        self.tickets += 1;
        let ticket = self.tickets;
        if let Some(session) = &self.session {
            let text = format!("close s{} Revoked", session.id);
            self.line(text);
            self.detach();
        }
        let revoked = self.rows.len();
        while !self.rows.is_empty() {
            self.end(0, "revoked", self.now_ms);
        }
        self.device = false;
        self.withdrawn.clear();
        self.line(format!("wiped t{ticket} {revoked}"));
    }

    fn at(&mut self, ms: u64) {
        if ms < self.now_ms {
            return;
        }
        self.now_ms = ms;
        while let Some(index) = self
            .rows
            .iter()
            .position(|row| row.in_flight && row.expires_ms <= ms)
        {
            self.expire(index);
        }
        if let Some(session) = &self.session
            && let Some(oldest) = session.flights.first()
            && oldest.sent_ms + ACK_TIMEOUT_MS <= ms
        {
            let text = format!("close s{} AckTimeout", session.id);
            self.line(text);
            self.detach();
        }
        self.pump();
    }

    fn expire(&mut self, index: usize) {
        let at_ms = self.rows[index].expires_ms;
        self.end(index, "expired", at_ms);
    }

    fn end(&mut self, index: usize, outcome: &str, at_ms: u64) {
        let row = self.rows.remove(index);
        if let Some(session) = &mut self.session
            && let Some(at) = session
                .flights
                .iter()
                .position(|flight| flight.order == Some(row.order))
        {
            if matches!(outcome, "acknowledged" | "declined") {
                session.flights.remove(at);
            } else {
                session.flights[at].order = None;
            }
        }
        let stored = if row.transient { "" } else { " stored" };
        self.line(format!(
            "ended [] {} {outcome} @{at_ms}ms{stored}",
            row.name
        ));
    }
}
