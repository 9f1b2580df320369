//! Devices: sessions, the hand-over to the app, what is saved when.

use super::*;

impl World {
    pub(super) fn start_client(&mut self, index: usize) {
        let instance = Id(self.random.random());
        let device = &mut self.devices[index];
        if device.process.is_some() || device.gone {
            return;
        }
        device.life += 1;
        let life = device.life;
        device.process = Some(Process::new(
            instance,
            &device.disk,
            SERVER_JSON_FRAME_MAX_BYTES,
        ));
        self.say(|| format!("d{index} starts"));
        self.at(self.now_us, Ev::Dial(index, life));
    }

    pub(super) fn process(&mut self, index: usize, life: u32) -> Option<&mut Process> {
        let device = &mut self.devices[index];
        device.process.as_mut().filter(|_| device.life == life)
    }

    pub(super) fn dial(&mut self, index: usize, life: u32) {
        let now_ms = self.now_ms();
        let healed = self.healed;
        let window = self.faults.window;
        let picky = self.devices[index].picky;
        let id = self.devices[index].id;
        let run = self.house.as_ref().map(|house| house.run);
        let Some(process) = self.process(index, life) else {
            return;
        };
        if process.conn.is_some() || process.leaving {
            return;
        }
        let Some(run) = run else {
            return self.come_back(index, ReconnectWhen::Backoff { floor_ms: 0 }, None);
        };
        process.attempt += 1;
        let hello = Hello {
            device: id,
            secret: Some(Secret("secret".to_owned())),
            instance: process.instance,
            attempt: process.attempt,
            seen: process.memory.seen(),
            window: Some(window),
            min_urgency: (picky && !healed).then_some(bellwire_protocol::Urgency::Normal),
            agent: None,
        };
        process.hello_mark = process.memory.mark();
        process.sent_mark = 0;
        process.ping_mark = None;
        process.welcomed_at_ms = None;
        process.waiting.clear();
        process.untold.clear();
        process.reader = FrameReader::new(SERVER_JSON_FRAME_MAX_BYTES);
        let mut machine = ClientSession::new(hello, None);
        let mut actions = Vec::new();
        machine.handle_connected(now_ms, &mut actions);
        process.machine = Some(machine);
        let conn = self.next_conn;
        self.next_conn += 1;
        if let Some(process) = self.process(index, life) {
            process.conn = Some(conn);
        }
        let clock = self
            .house
            .as_ref()
            .map_or((0, 0), |house| (house.started_us, house.started_ms));
        let how = match self.random.random_range(0..3) {
            0 => (Carrier::Stream, Codec::Cbor),
            1 => (Carrier::Messages, Codec::Cbor),
            _ => (Carrier::Messages, Codec::Json),
        };
        let delay_us = 1_000 + self.up_to(self.faults.delay_ms * 1_000);
        let pieces = self.faults.pieces;
        self.conns.insert(
            conn,
            Conn::new(index, life, (run, clock), how, delay_us, pieces),
        );
        if let Some(house) = &mut self.house {
            house.links.insert(
                conn,
                Link {
                    session: ServerSession::new(now_ms + HELLO_TIMEOUT_MS),
                    reader: FrameReader::new(DEVICE_FRAME_MAX_BYTES),
                    attached: None,
                    heard_us: self.now_us,
                },
            );
        }
        self.say(|| format!("d{index} connects: c{conn}, {how:?}"));
        self.client_actions(index, actions);
    }

    pub(super) fn come_back(&mut self, index: usize, when: ReconnectWhen, stood_ms: Option<u64>) {
        let random = &mut self.random;
        let device = &mut self.devices[index];
        let life = device.life;
        let Some(process) = &mut device.process else {
            return;
        };
        let wait = process
            .backoff
            .wait(when, stood_ms, |most| random.random_range(0..=most));
        match wait {
            Some(wait) => {
                let at_us = self.now_us + u64::try_from(wait.as_micros()).unwrap_or(0);
                self.at(at_us, Ev::Dial(index, life));
            }
            None => {
                if !self.wipes.contains(&index) && !self.devices[index].process_leaves() {
                    self.ledger
                        .object(format!("d{index} was told never to come back"));
                }
                self.devices[index].gone |= self.wipes.contains(&index);
            }
        }
    }

    pub(super) fn client_hears(
        &mut self,
        id: u64,
        index: usize,
        carrier: Carrier,
        codec: Codec,
        bytes: &[u8],
    ) {
        let now_ms = self.now_ms();
        let mut first = true;
        loop {
            let forgets = self.sabotage == Sabotage::ForgetsWhatItHad;
            let Some(process) = self.devices[index]
                .process
                .as_mut()
                .filter(|process| process.conn == Some(id))
            else {
                return;
            };
            let decoded = match carrier {
                Carrier::Messages if first => codec.decode_server(bytes),
                Carrier::Messages => break,
                Carrier::Stream => {
                    if first {
                        process.reader.push(bytes);
                    }
                    match process.reader.pull() {
                        Ok(Some(frame)) => codec.decode_server(&frame),
                        Ok(None) => break,
                        Err(error) => Err(error),
                    }
                }
            };
            first = false;
            if let Err(error) = &decoded {
                self.ledger
                    .object(format!("d{index} cannot read a frame: {error}"));
            }
            if matches!(
                decoded,
                Ok(bellwire_protocol::Decoded::Frame(ServerFrame::Pong))
            ) && let Some(mark) = process.ping_mark.take()
            {
                process.memory.confirm(mark);
            }
            let Some(machine) = &mut process.machine else {
                return;
            };
            let memory = &process.memory;
            let known = |id: &Id| {
                (!forgets && memory.is_acknowledged_safely(id)).then_some(Verdict::Acknowledged)
            };
            let mut actions = Vec::new();
            machine.handle_decoded(decoded, now_ms, &known, &mut actions);
            self.client_actions(index, actions);
        }
        self.flush_client(index);
    }

    pub(super) fn flush_client(&mut self, index: usize) {
        let now_ms = self.now_ms();
        let mut actions = Vec::new();
        if let Some(process) = &mut self.devices[index].process
            && let Some(machine) = &mut process.machine
        {
            machine.flush(now_ms, &mut actions);
        }
        self.client_actions(index, actions);
    }

    pub(super) fn client_closed(&mut self, id: u64, index: usize, code: Option<Code>) {
        let mut actions = Vec::new();
        if let Some(process) = self.devices[index]
            .process
            .as_mut()
            .filter(|process| process.conn == Some(id))
            && let Some(machine) = &mut process.machine
        {
            machine.handle_closed(code, &mut actions);
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.client = false;
        }
        self.client_actions(index, actions);
        // The other side learns it as well.
        if self.conns.contains_key(&id) {
            self.break_way(id, Way::Up);
        }
    }

    pub(super) fn client_actions(&mut self, index: usize, actions: Vec<ClientAction>) {
        let now_ms = self.now_ms();
        for action in actions {
            let device = &mut self.devices[index];
            let Some(process) = &mut device.process else {
                return;
            };
            let Some(conn) = process.conn else { return };
            match action {
                ClientAction::Send(frame) => {
                    match &frame {
                        DeviceFrame::Ping => process.ping_mark = Some(process.sent_mark),
                        DeviceFrame::Decline(decline) if decline.reason == EXPIRED => {
                            self.ledger.declined(PingId(decline.id.0), index);
                        }
                        DeviceFrame::Hello(_)
                        | DeviceFrame::Ack(_)
                        | DeviceFrame::Decline(_)
                        | DeviceFrame::Presence(_)
                        | DeviceFrame::Subscribe(_)
                        | DeviceFrame::Unsubscribe(_)
                        | DeviceFrame::Bye => {}
                    }
                    self.say(|| format!("c{conn} ▸ {}", told(&frame)));
                    if let Some(link) = self.conns.get(&conn) {
                        let bytes = link.codec.encode_device(&frame);
                        self.put(conn, Way::Up, &bytes);
                    }
                }
                ClientAction::Attached(_) => {
                    process.welcomed_at_ms = Some(now_ms);
                    process.memory.confirm(process.hello_mark);
                }
                ClientAction::Deliver(notify) => {
                    let server_now_ms = process
                        .machine
                        .as_ref()
                        .and_then(|machine| machine.server_now_ms(now_ms))
                        .unwrap_or(notify.accepted_ms);
                    let left_ms = notify.expires_ms.saturating_sub(server_now_ms);
                    let over_at_us = self
                        .conns
                        .get(&conn)
                        .map_or(0, |link| link.over_at_us(notify.expires_ms));
                    process.waiting.push_back(Waiting {
                        notify,
                        expires_at_ms: now_ms + left_ms,
                        over_at_us,
                    });
                    self.hand_over(index);
                }
                ClientAction::Withdraw(_) | ClientAction::Subscribed(_) => {}
                ClientAction::Close(code) => {
                    if let Some(link) = self.conns.get_mut(&conn) {
                        let at_us =
                            link.end(Way::Up, Piece::Close(code), self.now_us, &mut self.random);
                        self.at(at_us, Ev::Arrive(conn, Way::Up));
                    }
                }
                ClientAction::Reconnect(reconnect) => {
                    let stood_ms = process.welcomed_at_ms.map(|at| now_ms - at);
                    process.conn = None;
                    process.machine = None;
                    if let Some(link) = self.conns.get_mut(&conn) {
                        link.client = false;
                    }
                    self.forget_conn(conn);
                    self.say(|| format!("c{conn} ends for d{index}: {:?}", reconnect.why));
                    if let bellwire_protocol::SessionEnd::Misbehaved(rule) = reconnect.why {
                        self.ledger
                            .object(format!("the server broke a rule of the session: {rule}"));
                    }
                    self.come_back(index, reconnect.when, stood_ms);
                }
            }
        }
    }

    /// The client's hand-over takes its next step, if it is free.
    pub(super) fn hand_over(&mut self, index: usize) {
        let app_ms = self.faults.app_ms;
        loop {
            let now_ms = self.now_ms();
            let now_us = self.now_us;
            let device = &mut self.devices[index];
            let life = device.life;
            let Some(process) = &mut device.process else {
                return;
            };
            if !matches!(process.hand, Hand::Idle) {
                return;
            }
            let late = process
                .first_decided_ms
                .is_some_and(|first| now_ms - first >= SAVE_AFTER_MS);
            if process.batch.is_empty() || late {
                if !process.decided.is_empty() {
                    return self.save(index);
                }
                if process.batch.is_empty() {
                    process.batch = std::mem::take(&mut process.waiting);
                }
                if process.batch.is_empty() {
                    return;
                }
                continue;
            }
            let Some(next) = process.batch.pop_front() else {
                return;
            };
            let id = next.notify.id;
            let forgets = self.sabotage == Sabotage::ForgetsWhatItHad;
            if let Some(given) = process.memory.given(&id).filter(|_| !forgets).cloned() {
                process.decided.push(Decided { id, given, mark: 0 });
                continue;
            }
            if now_ms >= next.expires_at_ms {
                let given = Given::declined(EXPIRED);
                process.memory.remember(id, given.clone());
                let mark = process.memory.mark();
                process.decided.push(Decided { id, given, mark });
                process.first_decided_ms.get_or_insert(now_ms);
                self.ledger.declined(PingId(id.0), index);
                continue;
            }
            if now_us >= next.over_at_us {
                self.ledger
                    .object(format!("{} reaches its app late", short(PingId(id.0))));
            }
            process.hand = Hand::Calling(id);
            self.ledger.called(PingId(id.0), index);
            self.say(|| format!("d{index} calls its app with {}", short(PingId(id.0))));
            let takes_us = self.random.random_range(0..=app_ms * 1_000);
            return self.at(self.now_us + takes_us, Ev::AppDone(index, life));
        }
    }

    pub(super) fn app_done(&mut self, index: usize, life: u32) {
        let declines = self.random.random_bool(self.faults.declines);
        let now_ms = self.now_ms();
        let Some(process) = self.process(index, life) else {
            return;
        };
        let Hand::Calling(id) = std::mem::replace(&mut process.hand, Hand::Idle) else {
            return;
        };
        let given = if declines {
            Given::declined("not now")
        } else {
            Given::Acknowledged
        };
        process.memory.remember(id, given.clone());
        let mark = process.memory.mark();
        process.decided.push(Decided { id, given, mark });
        process.first_decided_ms.get_or_insert(now_ms);
        if declines {
            self.ledger.declined(PingId(id.0), index);
        }
        self.hand_over(index);
    }

    pub(super) fn save(&mut self, index: usize) {
        let sabotage = self.sabotage;
        let device = &mut self.devices[index];
        let life = device.life;
        let Some(process) = &mut device.process else {
            return;
        };
        process.first_decided_ms = None;
        let records = process.memory.unsaved();
        if records.is_empty() {
            return self.decided(index);
        }
        process.hand = Hand::Saving(records);
        if sabotage == Sabotage::AcknowledgesBeforeSaving {
            self.decided(index);
        }
        let takes_us = self.up_to(SAVE_MS * 1_000);
        self.at(self.now_us + takes_us, Ev::Saved(index, life));
    }

    pub(super) fn saved(&mut self, index: usize, life: u32) {
        let Some(process) = self.process(index, life) else {
            return;
        };
        let Hand::Saving(records) = std::mem::replace(&mut process.hand, Hand::Idle) else {
            return;
        };
        process.memory.saved();
        self.devices[index].disk.extend(records);
        self.decided(index);
    }

    /// Verdicts are safe: the session tells the server.
    pub(super) fn decided(&mut self, index: usize) {
        let now_ms = self.now_ms();
        let device = &mut self.devices[index];
        let Some(process) = &mut device.process else {
            return;
        };
        let mut actions = Vec::new();
        for decided in std::mem::take(&mut process.decided) {
            let Some(machine) = &mut process.machine else {
                continue;
            };
            match decided.given {
                Given::Acknowledged => {
                    machine.handle_acknowledged(decided.id, now_ms, &mut actions);
                }
                Given::Declined(reason) => {
                    machine.handle_declined(decided.id, reason, now_ms, &mut actions);
                }
            }
            process.sent_mark = process.sent_mark.max(decided.mark);
        }
        if let Some(machine) = &mut process.machine {
            machine.flush(now_ms, &mut actions);
        }
        self.client_actions(index, actions);
        self.hand_over(index);
    }

    pub(super) fn kill_client(&mut self, index: usize) {
        let device = &mut self.devices[index];
        let Some(process) = device.process.take() else {
            return;
        };
        // What it had not written down is forgotten: exactly these may reach the app again.
        if self.sabotage != Sabotage::AcknowledgesBeforeSaving {
            for id in process.unsaved() {
                self.ledger.forgotten(PingId(id.0), index);
            }
        }
        device.life += 1;
        self.say(|| format!("d{index} is killed"));
        if let Some(conn) = process.conn {
            self.break_way(conn, Way::Up);
        }
        if !self.devices[index].gone {
            let wait_ms = 200 + self.up_to(3_000);
            self.after_ms(wait_ms, Ev::StartClient(index));
        }
    }
}

impl Device {
    fn process_leaves(&self) -> bool {
        self.process.as_ref().is_none_or(|process| process.leaving)
    }
}

#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "the rest of a frame is told by its name"
)]
fn told(frame: &DeviceFrame) -> String {
    let ids = |ids: &[Id]| {
        let ids: Vec<String> = ids.iter().map(|id| short(PingId(id.0))).collect();
        ids.join(" ")
    };
    match frame {
        DeviceFrame::Ack(Ack::UpTo(seq)) => format!("ack up to #{seq}"),
        DeviceFrame::Ack(Ack::Ids(named)) => format!("ack {}", ids(named)),
        DeviceFrame::Decline(decline) => {
            format!("decline {}: {}", ids(&[decline.id]), decline.reason)
        }
        DeviceFrame::Hello(hello) => {
            let seen: Vec<Id> = hello.seen.iter().map(|seen| seen.id).collect();
            format!("hello, attempt {}, seen [{}]", hello.attempt, ids(&seen))
        }
        other => other.name().to_owned(),
    }
}
