//! The server: shards, frames, reads, and its side of links.

use super::*;

impl World {
    pub(super) fn start_server(&mut self, again: bool) {
        self.starting = false;
        if self.house.is_some() {
            return;
        }
        if again {
            let seed = self.random.random();
            let opened = if self.dark {
                self.store.crash_and_reopen(seed)
            } else {
                self.store.kill_and_reopen()
            };
            match opened {
                Ok(report) => {
                    if !report.set_aside.is_empty() {
                        self.ledger
                            .object(format!("files set aside: {:?}", report.set_aside));
                    }
                }
                Err(error) => {
                    if self.healed {
                        self.ledger
                            .object(format!("the store does not open: {error}"));
                    }
                    self.say(|| format!("the server does not start: {error}"));
                    self.dark = false;
                    self.starting = true;
                    return self.after_ms(3_000, Ev::StartServer);
                }
            }
            self.dark = false;
            let jump = i64::try_from(self.faults.clock_jump_s * 1_000).unwrap_or(0);
            self.skew_ms = self.random.random_range(-jump..=jump);
        }
        let run = self.store.stats().run;
        let policy = Policy {
            mailbox_notifications: self.faults.mailbox,
            mailbox_bytes: self.faults.mailbox_bytes,
            overflow: if self.faults.refuse {
                OverflowRule::Refuse
            } else {
                OverflowRule::Evict
            },
            defer_max: Duration::from_millis(if self.faults.defer { 50 } else { 0 }),
            ack_timeout: Duration::from_secs(60),
            run,
            ..Policy::default()
        };
        let grants: Grants = Arc::default();
        let stock = Arc::new(Stock::new([AppId::DEFAULT], self.faults.shards));
        let desks = (0..self.faults.shards)
            .map(|shard| {
                let grants = Arc::clone(&grants);
                let grant = move |grant| grants.lock().unwrap().push_back((shard, grant));
                desk(&policy, self.store.register(Box::new(grant)), &stock, shard)
            })
            .collect();
        self.house = Some(House {
            run,
            desks,
            links: BTreeMap::new(),
            sessions: BTreeMap::new(),
            tickets: BTreeMap::new(),
            grants,
            inbox: VecDeque::new(),
            next_session: 1,
            next_ticket: 0,
            started_us: self.now_us,
            started_ms: (START_MS + self.now_ms()).saturating_add_signed(self.skew_ms),
            disk: Disk::Open,
            sweep: ExpiryCursor::default(),
            writing: false,
            stock,
            walk: Some(None),
        });
        self.say(|| format!("the server starts, run {run}"));
    }

    /// The server's process is gone. `dark`: its machine lost power.
    pub(super) fn stop_server(&mut self, dark: bool, wait_ms: u64) {
        let Some(house) = self.house.take() else {
            self.dark |= dark;
            return;
        };
        self.say(|| {
            format!(
                "the server dies{}",
                if dark { ", power and all" } else { "" }
            )
        });
        self.dark |= dark;
        self.ledger.crashes += 1;
        // What was being written is there in whole, in part, or not.
        if house.writing {
            match self.random.random_range(0..4) {
                0 => {}
                1 => {
                    self.disk.fail_write_in(0);
                    self.store.finish_frame();
                }
                2 => {
                    self.disk.cut_sync_in(0);
                    self.store.finish_frame();
                }
                _ => {
                    self.store.finish_frame();
                }
            }
            // A frame of nothing writes nothing.
            self.disk.fail_write_in(u64::MAX);
            self.disk.cut_sync_in(u64::MAX);
        }
        for ask in house.tickets.values() {
            match *ask {
                Ask::Ping { ping, device } => self.ask_again(ping, device),
                Ask::Wipe { device } => self.after_ms(1_000, Ev::Wipe(device)),
                Ask::Revoke => {}
            }
        }
        let ids: Vec<u64> = self.conns.keys().copied().collect();
        for id in ids {
            self.break_way(id, Way::Down);
        }
        self.starting = true;
        self.after_ms(wait_ms, Ev::StartServer);
    }

    /// One side is gone without a word; the other learns it, if anything arrives any more.
    pub(super) fn break_way(&mut self, id: u64, toward: Way) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        match toward {
            Way::Down => conn.server = false,
            Way::Up => conn.client = false,
        }
        let at_us = conn.end(toward, Piece::Broken, self.now_us, &mut self.random);
        self.at(at_us, Ev::Arrive(id, toward));
        self.forget_conn(id);
    }

    pub(super) fn forget_conn(&mut self, id: u64) {
        if self
            .conns
            .get(&id)
            .is_some_and(|conn| !conn.client && !conn.server)
        {
            self.conns.remove(&id);
        }
    }

    /// Everything that the server has to do at once.
    pub(super) fn settle(&mut self) {
        loop {
            let Some(house) = &mut self.house else { return };
            let now = house.now(self.now_us);
            let grant = house.grants.lock().unwrap().pop_front();
            if let Some((shard, grant)) = grant {
                match grant {
                    Grant::Ready => {
                        house.desks[shard].wanted = false;
                        self.submit(shard);
                    }
                    Grant::Committed(result) => self.committed(shard, result),
                }
                continue;
            }
            if let Some((device, event)) = house.inbox.pop_front() {
                let id = DeviceId(self.devices[device].id.0);
                let mut effects = Vec::new();
                house.desk(device).core.handle(id, event, now, &mut effects);
                for effect in effects {
                    self.effect(effect);
                }
                continue;
            }
            let wants = house
                .desks
                .iter()
                .position(|desk| !desk.wanted && !desk.outstanding && desk.core.has_offers());
            let Some(shard) = wants else { break };
            if self.store.want(house.desks[shard].source) {
                self.submit(shard);
            } else {
                house.desks[shard].wanted = true;
            }
        }
    }

    pub(super) fn submit(&mut self, shard: usize) {
        let Some(house) = &mut self.house else { return };
        let desk = &mut house.desks[shard];
        desk.outstanding = true;
        let batch: Vec<Op> = desk.core.seal().into_iter().map(Op::Mailbox).collect();
        let run = house.run;
        self.store.submit(desk.source, batch);
        if self.sabotage == Sabotage::AnswersBeforeSync {
            let now = house.now(self.now_us);
            let mut effects = Vec::new();
            house.desks[shard]
                .core
                .handle_committed(Ok(()), now, &mut effects);
            for effect in effects {
                self.effect(effect);
            }
        }
        let gather_us = self.up_to(500);
        self.at(self.now_us + gather_us, Ev::BeginFrame(run));
    }

    pub(super) fn committed(&mut self, shard: usize, result: Result<(), CommitFailure>) {
        self.say(|| format!("frame of shard {shard}: {result:?}"));
        let Some(house) = &mut self.house else { return };
        let now = house.now(self.now_us);
        let mut effects = Vec::new();
        let desk = &mut house.desks[shard];
        desk.outstanding = false;
        if result == Err(CommitFailure::NoRoom)
            && matches!(self.store.health(), StoreHealth::Full { .. })
        {
            desk.core.set_disk(Disk::Full, now, &mut effects);
        }
        if self.sabotage != Sabotage::AnswersBeforeSync {
            desk.core.handle_committed(result, now, &mut effects);
        }
        for effect in effects {
            self.effect(effect);
        }
    }

    pub(super) fn begin_frame(&mut self, run: u32) {
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        if !house.writing && self.store.begin_frame() {
            house.writing = true;
            let sync_us = self.random.random_range(0..=self.faults.sync_ms * 1_000);
            self.at(self.now_us + sync_us, Ev::EndFrame(run));
        }
    }

    pub(super) fn end_frame(&mut self, run: u32) {
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        house.writing = false;
        self.store.finish_frame();
        // Somebody may have submitted meanwhile.
        self.at(self.now_us, Ev::BeginFrame(run));
    }

    pub(super) fn read_done(&mut self, run: u32, device: usize, question: Question) {
        let fails = !self.healed && self.random.random_bool(self.faults.failing_reads);
        let Some(house) = self.house.as_mut().filter(|house| house.run == run) else {
            return;
        };
        let id = DeviceId(self.devices[device].id.0);
        let event = match question {
            Question::Mailbox(request) => {
                let view = self.store.read_mailbox(&request).map_err(drop);
                Event::Read(if fails { Err(()) } else { view.map(Box::new) })
            }
            Question::Bodies(rows) => {
                let bodies = self.store.read_bodies(id, &rows).map_err(drop);
                Event::Bodies(if fails { Err(()) } else { bodies })
            }
        };
        house.inbox.push_back((device, event));
    }

    pub(super) fn tick(&mut self) {
        self.after_ms(1_000, Ev::Tick);
        self.store.look_at_room();
        let health = self.store.health();
        let Some(house) = &mut self.house else {
            if !self.starting {
                self.starting = true;
                self.after_ms(1_000, Ev::StartServer);
            }
            return;
        };
        house.walk_on(&self.store, 1);
        let now = house.now(self.now_us);
        let disk = match health {
            StoreHealth::Open | StoreHealth::Behind => Disk::Open,
            StoreHealth::Full { .. } => Disk::Full,
            StoreHealth::Failed(_) => Disk::Failed,
        };
        let mut effects = Vec::new();
        house.disk = disk;
        for desk in &mut house.desks {
            desk.core.set_disk(disk, now, &mut effects);
        }
        let after = std::mem::take(&mut house.sweep);
        if let Ok(page) = self.store.expired(now.unix_ms, &after, 100) {
            house.sweep = page.next.unwrap_or_default();
            let mut rows: BTreeMap<usize, Vec<RowKey>> = BTreeMap::new();
            for row in page.items {
                rows.entry(usize::from(row.device.0[0]))
                    .or_default()
                    .push(row.key);
            }
            for (device, rows) in rows {
                house.inbox.push_back((device, Event::Expire { rows }));
            }
        }
        let silence_us = KEEP_ALIVE.silence_ms(SILENCE_PERCENT) * 1_000;
        let silent: Vec<u64> = house
            .links
            .iter()
            .filter(|(_, link)| link.heard_us + silence_us <= self.now_us)
            .map(|(&conn, _)| conn)
            .collect();
        for effect in effects {
            self.effect(effect);
        }
        for conn in silent {
            self.drive(conn, |session, actions| {
                session.handle_failure(Code::Silence, "silence", actions);
            });
        }
        if disk == Disk::Failed {
            // The operator restarts it.
            self.stop_server(false, 1_500);
        }
    }

    pub(super) fn effect(&mut self, effect: Effect) {
        let Some(house) = &mut self.house else { return };
        let now = house.now(self.now_us);
        match effect {
            Effect::Accepted { ticket, ping, .. } => {
                if let Some(Ask::Ping { device, .. }) = house.tickets.remove(&ticket) {
                    self.ledger.accepted(ping, device);
                    self.say(|| format!("accepted {} for d{device}", short(ping)));
                } else {
                    self.ledger
                        .object(format!("{} is answered twice", short(ping)));
                }
            }
            Effect::Ended {
                tickets,
                device,
                ping,
                outcome,
                at_ms,
                stored,
                ..
            } => {
                let device = usize::from(device.0[0]);
                let late_by_ms = now.unix_ms as i64 - at_ms as i64;
                let mut asked = true;
                for ticket in tickets {
                    asked &= house.tickets.remove(&ticket).is_some();
                    self.ledger.accepted(ping, device);
                }
                if !asked {
                    self.ledger
                        .object(format!("{} is answered twice", short(ping)));
                }
                self.ledger.ended(ping, device, outcome, stored, late_by_ms);
                self.say(|| {
                    let how = if stored { " (stored)" } else { "" };
                    format!(
                        "{} on d{device} ends as {}{how}",
                        short(ping),
                        outcome.as_str()
                    )
                });
            }
            Effect::Rejected {
                ticket, ping, why, ..
            } => {
                let Some(Ask::Ping { device, .. }) = house.tickets.remove(&ticket) else {
                    return self
                        .ledger
                        .object(format!("{} is answered twice", short(ping)));
                };
                self.say(|| format!("rejected {} for d{device}: {why:?}", short(ping)));
                match why {
                    Rejection::NoRoom | Rejection::StoreFailed => self.ask_again(ping, device),
                    Rejection::MailboxFull => {}
                    Rejection::TooFast | Rejection::Quota(_) => {
                        self.ledger
                            .object("there are neither rates nor quotas here".to_owned());
                    }
                    Rejection::UnknownDevice => {
                        if !self.wipes.contains(&device) {
                            self.ledger.object(format!("d{device} is unknown"));
                        }
                    }
                }
            }
            Effect::RevokeAnswered { ticket, .. } => {
                if house.tickets.remove(&ticket).is_none() {
                    self.ledger
                        .object("a revocation is answered twice".to_owned());
                }
            }
            Effect::Cleared { .. } => self.ledger.object("nobody asked to clear".to_owned()),
            Effect::Wiped { ticket, .. } => match house.tickets.remove(&ticket) {
                Some(Ask::Wipe { device }) => {
                    self.say(|| format!("d{device} is wiped"));
                    self.devices[device].gone = true;
                }
                Some(Ask::Ping { .. } | Ask::Revoke) | None => {
                    self.ledger.object("a wipe is answered twice".to_owned());
                }
            },
            Effect::Welcome {
                session,
                pending,
                window,
            } => {
                let Some(&conn) = house.sessions.get(&session) else {
                    return;
                };
                let welcome = Welcome {
                    session: session.0,
                    pending: pending.into(),
                    window,
                    max_bytes: 4_096,
                    keep_alive_s: KEEP_ALIVE,
                    now_ms: now.unix_ms,
                };
                self.drive(conn, |session, actions| {
                    session.handle_welcome(welcome, actions);
                });
            }
            Effect::Refuse { session, why } => {
                let code = match why {
                    Refusal::StaleAttempt => Code::StaleAttempt,
                    Refusal::DuplicateDevice => Code::DuplicateDevice,
                    Refusal::UnknownDevice => Code::Unauthorized,
                    Refusal::StoreFailed => Code::StoreUnavailable,
                };
                if let Some(&conn) = house.sessions.get(&session) {
                    self.say(|| format!("c{conn} is refused: {why:?}"));
                    self.drive(conn, |session, actions| {
                        session.handle_refused(code, code.meaning(), actions);
                    });
                }
            }
            Effect::Send {
                session,
                seq,
                redelivered,
                notification,
            } => self.send(session, seq, redelivered, &notification),
            Effect::Withdraw { session, pings } => {
                if let Some(&conn) = house.sessions.get(&session) {
                    let ids = pings.iter().map(|ping| Id(ping.0)).collect();
                    self.tell_device(conn, &ServerFrame::Withdraw(Withdraw { ids }));
                }
            }
            Effect::WithdrawalsHeard { device, heard } => {
                for withdrawal in heard {
                    self.store
                        .ride_along(Op::DropWithdrawal { device, withdrawal });
                }
            }
            Effect::Close { session, why } => {
                let Some(&conn) = house.sessions.get(&session) else {
                    return;
                };
                self.say(|| format!("c{conn} is closed: {why:?}"));
                match why {
                    Closing::Replaced => self.go_away(conn, GoawayReason::Replaced, 5_000),
                    Closing::Revoked => self.go_away(conn, GoawayReason::Revoked, 0),
                    Closing::SecretEnded => {
                        self.ledger.object("the core knows no secrets".to_owned());
                    }
                    Closing::AckTimeout => self.drive(conn, |session, actions| {
                        session.handle_failure(Code::AckTimeout, "too slow", actions);
                    }),
                }
            }
            Effect::Read(request) => {
                let device = usize::from(request.device.0[0]);
                let question = Question::Mailbox(Box::new(request));
                self.ask_the_store(device, question);
            }
            Effect::Fetch { device, rows } => {
                self.ask_the_store(usize::from(device.0[0]), Question::Bodies(rows));
            }
            Effect::Noticed(Notice::UnreadableBody) => {
                self.ledger.object("a body could not be read".to_owned());
            }
            Effect::Noticed(
                Notice::UnknownVerdict
                | Notice::DuplicateDevice
                | Notice::CollapseRepaired
                | Notice::Deferred
                | Notice::DeferralWon,
            ) => {}
        }
    }

    pub(super) fn ask_the_store(&mut self, device: usize, question: Question) {
        let Some(house) = &self.house else { return };
        let run = house.run;
        let read_us = self.up_to(self.faults.read_ms * 1_000);
        self.at(self.now_us + read_us, Ev::ReadDone(run, device, question));
    }

    pub(super) fn send(
        &mut self,
        session: SessionId,
        seq: u64,
        redelivered: bool,
        notification: &Notification,
    ) {
        let Some(house) = &mut self.house else { return };
        let ping = notification.ping;
        if notification.expires_ms <= house.now(self.now_us).unix_ms {
            return self
                .ledger
                .object(format!("{} is sent past its expiry", short(ping)));
        }
        let Some(&conn) = house.sessions.get(&session) else {
            return;
        };
        let Some(link) = house.links.get_mut(&conn) else {
            return;
        };
        // After `goaway` nothing new is sent.
        if !link.session.is_attached() || link.session.deadline_ms().is_some() {
            return;
        }
        let shared = notification.wire.get_or_init(|| {
            SharedNotify::new(
                Id(ping.0),
                notification.accepted_ms,
                notification.expires_ms,
                urgency_outside(notification.urgency),
                notification.content.clone(),
            )
        });
        let Some(Ok(shared)) = shared.as_deref() else {
            return self
                .ledger
                .object(format!("the content of {} is damaged", short(ping)));
        };
        link.session.handle_sent(seq);
        let Some(link) = self.conns.get_mut(&conn) else {
            return;
        };
        let frame = shared.frame(link.codec, seq, redelivered).to_vec();
        self.say(|| {
            let again = if redelivered { " (redelivered)" } else { "" };
            format!("c{conn} ◂ notify #{seq} {}{again}", short(ping))
        });
        self.put(conn, Way::Down, &frame);
    }

    pub(super) fn put(&mut self, id: u64, way: Way, frame: &[u8]) {
        let Some(conn) = self.conns.get_mut(&id) else {
            return;
        };
        let arrivals = conn.send(way, frame, self.now_us, &mut self.random);
        for at_us in arrivals {
            self.at(at_us, Ev::Arrive(id, way));
        }
    }

    pub(super) fn tell_device(&mut self, id: u64, frame: &ServerFrame) {
        let Some(conn) = self.conns.get(&id) else {
            return;
        };
        let bytes = conn.codec.encode_server(frame);
        self.say(|| format!("c{id} ◂ {}", frame.name()));
        self.put(id, Way::Down, &bytes);
    }

    pub(super) fn go_away(&mut self, conn: u64, reason: GoawayReason, away_ms: u32) {
        let goaway = Goaway {
            reason,
            reconnect_ms: ReconnectRange {
                min_ms: away_ms,
                max_ms: 2 * away_ms,
            },
            endpoint: None,
        };
        let now_ms = self.now_ms();
        self.drive(conn, |session, actions| {
            session.handle_goaway(goaway, now_ms, actions);
        });
    }

    pub(super) fn drive(
        &mut self,
        conn: u64,
        act: impl FnOnce(&mut ServerSession, &mut Vec<ServerAction>),
    ) {
        let Some(link) = self
            .house
            .as_mut()
            .and_then(|house| house.links.get_mut(&conn))
        else {
            return;
        };
        let mut actions = Vec::new();
        act(&mut link.session, &mut actions);
        self.server_actions(conn, actions);
    }

    pub(super) fn server_actions(&mut self, conn: u64, actions: Vec<ServerAction>) {
        for action in actions {
            let Some(house) = &mut self.house else { return };
            let Some(link) = house.links.get_mut(&conn) else {
                return;
            };
            let Some(device) = self.conns.get(&conn).map(|conn| conn.device) else {
                return;
            };
            let session = link.attached;
            let event = match (action, session) {
                (ServerAction::Attach(hello), _) => {
                    let session = SessionId(house.next_session);
                    house.next_session += 1;
                    link.attached = Some(session);
                    house.sessions.insert(session, conn);
                    Some(Event::Attach(attach(session, &hello)))
                }
                (ServerAction::Acknowledge(ack), Some(session)) => {
                    let what = match ack {
                        Ack::UpTo(seq) => Acknowledged::UpTo(seq),
                        Ack::Ids(ids) => {
                            Acknowledged::Ids(ids.into_iter().map(|id| PingId(id.0)).collect())
                        }
                    };
                    Some(Event::Acknowledge { session, what })
                }
                (ServerAction::Decline { id, .. }, Some(session)) => Some(Event::Decline {
                    session,
                    ping: PingId(id.0),
                }),
                (ServerAction::Subscribe(_) | ServerAction::Unsubscribe(_), _) => {
                    let topics = Topics { topics: Vec::new() };
                    self.tell_device(conn, &ServerFrame::Subscribed(topics));
                    None
                }
                (ServerAction::Send(frame), _) => {
                    self.tell_device(conn, &frame);
                    None
                }
                (ServerAction::Leave, _) => {
                    self.detach(conn);
                    None
                }
                (ServerAction::Close { code, .. }, _) => {
                    self.detach(conn);
                    self.close_link(conn, code);
                    return;
                }
                (
                    ServerAction::Acknowledge(_)
                    | ServerAction::Decline { .. }
                    | ServerAction::Presence(_),
                    _,
                ) => None,
            };
            if let (Some(event), Some(house)) = (event, &mut self.house) {
                house.inbox.push_back((device, event));
            }
        }
    }

    pub(super) fn detach(&mut self, conn: u64) {
        let Some(house) = &mut self.house else { return };
        let Some(device) = self.conns.get(&conn).map(|conn| conn.device) else {
            return;
        };
        if let Some(session) = house
            .links
            .get_mut(&conn)
            .and_then(|link| link.attached.take())
        {
            house.sessions.remove(&session);
            house.inbox.push_back((device, Event::Detach { session }));
        }
    }

    pub(super) fn close_link(&mut self, id: u64, code: Code) {
        if let Some(house) = &mut self.house {
            house.links.remove(&id);
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.server = false;
            let at_us = conn.end(Way::Down, Piece::Close(code), self.now_us, &mut self.random);
            self.at(at_us, Ev::Arrive(id, Way::Down));
        }
        self.forget_conn(id);
    }
}

fn attach(session: SessionId, hello: &Hello) -> Attach {
    let window = hello.window.unwrap_or(WINDOW_DEFAULT);
    Attach {
        session,
        instance: u128::from_be_bytes(hello.instance.0),
        attempt: hello.attempt,
        window: window.clamp(WINDOW_MIN, WINDOW_MAX),
        min_urgency: hello.min_urgency.map_or(Urgency::VeryLow, urgency_inside),
        seen: hello
            .seen
            .iter()
            .map(|seen| {
                let verdict = match seen.verdict {
                    Verdict::Acknowledged => bellwire_server::delivery::Verdict::Acknowledged,
                    Verdict::Declined => bellwire_server::delivery::Verdict::Declined,
                };
                (PingId(seen.id.0), verdict)
            })
            .collect(),
    }
}

fn urgency_outside(urgency: Urgency) -> bellwire_protocol::Urgency {
    match urgency {
        Urgency::VeryLow => bellwire_protocol::Urgency::VeryLow,
        Urgency::Low => bellwire_protocol::Urgency::Low,
        Urgency::Normal => bellwire_protocol::Urgency::Normal,
        Urgency::High => bellwire_protocol::Urgency::High,
    }
}

fn urgency_inside(urgency: bellwire_protocol::Urgency) -> Urgency {
    match urgency {
        bellwire_protocol::Urgency::VeryLow => Urgency::VeryLow,
        bellwire_protocol::Urgency::Low => Urgency::Low,
        bellwire_protocol::Urgency::Normal => Urgency::Normal,
        bellwire_protocol::Urgency::High => Urgency::High,
    }
}
