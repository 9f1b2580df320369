//! One link of the server for tests: what is due on it, and what the device says.

use std::collections::VecDeque;
use std::sync::Arc;

use bellwire_protocol::limits::TOPICS_MAX;
use bellwire_protocol::{
    Ack, Carrier, Code, Goaway, GoawayReason, Hello, Id, ServerAction, ServerFrame, ServerSession,
    Verdict, Welcome,
};

use super::{DEVICE, FAREWELL, HEARD_MAX, Order, Outcome, SECRET, Shared, Standing, State};
use crate::carrier::MemoryLink;

/// One link.
pub(super) struct Serving {
    pub(super) shared: Arc<Shared>,
    pub(super) number: u64,
    pub(super) link: MemoryLink,
    pub(super) session: ServerSession,
    /// What was sent in this session, by `seq` from 1.
    pub(super) sent: Vec<Id>,
    pub(super) window: usize,
    /// When the router last let something through.
    pub(super) passed_at_ms: u64,
    /// The router has forgotten this flow.
    pub(super) forgotten: bool,
    /// What waits for a new flow. Bounded by the window and by what the test orders.
    pub(super) held: VecDeque<Vec<u8>>,
}

impl Serving {
    /// Runs until the link ends.
    pub(super) async fn run(mut self) {
        let mut changes = self.shared.changes.subscribe();
        let code = loop {
            changes.mark_unchanged();
            if let Some(end) = self.work().await {
                break end;
            }
            tokio::select! {
                received = self.link.receive() => match received {
                    Ok(bytes) => {
                        if self.shared.state().silent || !self.passes_up().await {
                            continue;
                        }
                        let decoded = bytes.and_then(|bytes| self.link.codec.decode_device(&bytes));
                        if let Ok(bellwire_protocol::Decoded::Frame(frame)) = &decoded {
                            let frame = frame.clone();
                            self.shared.change(|state| {
                                if state.heard.len() == HEARD_MAX {
                                    state.heard.pop_front();
                                }
                                state.heard.push_back(frame);
                            });
                        }
                        let mut actions = Vec::new();
                        self.session.handle_decoded(decoded, &mut actions);
                        if let Some(code) = self.carry_out(actions).await {
                            break Some(code);
                        }
                    }
                    Err(_) => break None,
                },
                _ = changes.changed() => {}
            }
        };
        let number = self.number;
        self.shared.change(|state| {
            if state
                .attached
                .is_some_and(|attached| attached.link == number)
            {
                state.attached = None;
            }
        });
        if let Some(code) = code {
            self.link.close(code, FAREWELL).await;
        }
    }

    /// Orders of the test, then the mailbox. `Some`: the link ends, with this code or broken.
    async fn work(&mut self) -> Option<Option<Code>> {
        let orders = {
            let mut state = self.shared.state();
            if state.closed {
                return Some(None);
            }
            let mine = state
                .attached
                .is_some_and(|attached| attached.link == self.number);
            match (mine, self.session.is_attached()) {
                (true, _) => std::mem::take(&mut state.orders),
                // A newer session took over.
                (false, true) => VecDeque::from([Order::Goaway(Goaway {
                    reason: GoawayReason::Replaced,
                    reconnect_ms: (0, 0).into(),
                    endpoint: None,
                })]),
                (false, false) => VecDeque::new(),
            }
        };
        let mut actions = Vec::new();
        for order in orders {
            match order {
                Order::Say(frame) => actions.push(ServerAction::Send(*frame)),
                Order::Goaway(goaway) => {
                    let now_ms = self.shared.clock.now_ms();
                    self.session.handle_goaway(goaway, now_ms, &mut actions);
                }
                Order::Fail(code) => {
                    self.session
                        .handle_failure(code, "the test wants it", &mut actions)
                }
                Order::Break => return Some(None),
            }
        }
        if let Some(code) = self.carry_out(actions).await {
            return Some(Some(code));
        }
        self.pump().await
    }

    /// Sends what waits, up to the window.
    async fn pump(&mut self) -> Option<Option<Code>> {
        loop {
            let notify = {
                let mut state = self.shared.state();
                if !self.session.is_attached() || state.silent {
                    return None;
                }
                let number = self.number;
                let mut in_flight = state
                    .mailbox
                    .iter()
                    .filter(|one| one.sent_on == Some(number) && !one.answered);
                if in_flight.by_ref().count() >= self.window {
                    return None;
                }
                let now_ms = self.shared.clock.wall_ms();
                let next = state.mailbox.iter_mut().find(|one| {
                    one.outcome.is_none()
                        && one.sent_on != Some(number)
                        && one.notify.expires_ms > now_ms
                })?;
                next.notify.redelivered |= next.sent_on.is_some();
                next.sent_on = Some(number);
                self.sent.push(next.notify.id);
                next.notify.seq = self.sent.len() as u64;
                next.notify.clone()
            };
            self.session.handle_sent(notify.seq);
            if self.send(&ServerFrame::Notify(notify)).await.is_err() {
                return Some(None);
            }
        }
    }

    async fn send(&mut self, frame: &ServerFrame) -> Result<(), crate::carrier::LinkEnd> {
        let frame = self.link.codec.encode_server(frame);
        self.note_silence();
        match (self.forgotten, self.link.carrier) {
            (false, _) => self.link.feed(frame),
            (true, Carrier::Quic) => self.held.push_back(frame),
            (true, Carrier::WebSocket) => {}
        }
        self.link.flush().await
    }

    /// Whether the router lets a frame of the device through.
    async fn passes_up(&mut self) -> bool {
        self.note_silence();
        match (self.forgotten, self.link.carrier) {
            (false, _) => true,
            (true, Carrier::WebSocket) => false,
            (true, Carrier::Quic) => {
                self.forgotten = false;
                self.passed_at_ms = self.shared.clock.now_ms();
                self.link.check_address();
                for frame in std::mem::take(&mut self.held) {
                    self.link.feed(frame);
                }
                // A broken link is seen when the next frame is awaited.
                let _ = self.link.flush().await;
                true
            }
        }
    }

    /// Something is to pass: has the router forgotten the flow by now?
    fn note_silence(&mut self) {
        let forgets_after_ms = self.shared.state().forgets_after_ms;
        let now_ms = self.shared.clock.now_ms();
        let silent_ms = now_ms.saturating_sub(self.passed_at_ms);
        self.forgotten |= forgets_after_ms.is_some_and(|after_ms| silent_ms >= after_ms);
        if !self.forgotten {
            self.passed_at_ms = now_ms;
        }
    }

    /// `Some`: close with this code.
    async fn carry_out(&mut self, actions: Vec<ServerAction>) -> Option<Code> {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            let about_topics = matches!(
                action,
                ServerAction::Subscribe(_) | ServerAction::Unsubscribe(_)
            );
            let failure = self.shared.state().topics_failure;
            if let Some(code) = failure.filter(|_| about_topics) {
                let mut more = Vec::new();
                self.session
                    .handle_failure(code, "the test wants it", &mut more);
                actions.extend(more);
                continue;
            }
            match action {
                ServerAction::Attach(hello) => {
                    let mut more = Vec::new();
                    self.attach(*hello, &mut more);
                    actions.extend(more);
                }
                ServerAction::Acknowledge(ack) => {
                    let ids = match ack {
                        Ack::UpTo(seq) => {
                            let count = (seq as usize).min(self.sent.len());
                            self.sent[..count].to_vec()
                        }
                        Ack::Ids(ids) => ids,
                    };
                    self.shared.change(|state| {
                        ids.iter()
                            .for_each(|id| state.decide(id, Outcome::Acknowledged));
                    });
                }
                ServerAction::Decline { id, reason } => {
                    self.shared
                        .change(|state| state.decide(&id, Outcome::Declined(reason)));
                }
                ServerAction::Presence(presence) => {
                    self.shared.change(|state| state.presence = Some(presence));
                }
                ServerAction::Subscribe(topics) => {
                    let topics = self.shared.change(|state| {
                        for topic in topics {
                            let full = state.topics.len() >= TOPICS_MAX;
                            if !full && !state.forbidden_topics.contains(&topic) {
                                state.topics.insert(topic);
                            }
                        }
                        state.topics()
                    });
                    actions.push_front(ServerAction::Send(ServerFrame::Subscribed(topics)));
                }
                ServerAction::Unsubscribe(topics) => {
                    let topics = self.shared.change(|state| {
                        let State {
                            topics: of_device,
                            forbidden_topics,
                            ..
                        } = state;
                        of_device.retain(|topic| {
                            !topics.contains(topic) || forbidden_topics.contains(topic)
                        });
                        state.topics()
                    });
                    actions.push_front(ServerAction::Send(ServerFrame::Subscribed(topics)));
                }
                ServerAction::Send(frame) => {
                    // A broken link is seen when the next frame is awaited.
                    if !self.shared.state().silent {
                        let _ = self.send(&frame).await;
                    }
                }
                ServerAction::Leave => {}
                ServerAction::Close { code, .. } => return Some(code),
            }
        }
        None
    }

    fn attach(&mut self, hello: Hello, actions: &mut Vec<ServerAction>) {
        let right = hello.device == DEVICE
            && hello.secret.as_ref().map(|secret| secret.expose()) == Some(SECRET);
        let refusal = match right {
            true => self.shared.state().refusal,
            false => Some(Code::Unauthorized),
        };
        let window = hello
            .window
            .unwrap_or(bellwire_protocol::limits::WINDOW_DEFAULT);
        let (number, carrier) = (self.number, self.link.carrier);
        let welcome = self.shared.change(|state| {
            state.last_hello = Some(hello.clone());
            if refusal.is_some() {
                return None;
            }
            for seen in &hello.seen {
                let outcome = match seen.verdict {
                    Verdict::Acknowledged => Outcome::Acknowledged,
                    Verdict::Declined => Outcome::Declined(String::new()),
                };
                state.decide(&seen.id, outcome);
            }
            state.sessions += 1;
            state.orders.clear();
            state.attached = Some(Standing {
                link: number,
                carrier,
            });
            Some(Welcome {
                session: state.sessions,
                pending: state.waiting(),
                window,
                max_bytes: bellwire_protocol::limits::CONTENT_DEFAULT_MAX_BYTES as u32,
                keep_alive_s: state.keep_alive.unwrap_or(carrier.keep_alive()),
                now_ms: self.shared.clock.wall_ms(),
            })
        });
        match (welcome, refusal) {
            (Some(welcome), _) => {
                self.window = usize::from(window);
                self.session.handle_welcome(welcome, actions);
            }
            (None, refusal) => {
                let code = refusal.unwrap_or(Code::Unauthorized);
                self.session
                    .handle_refused(code, "the test wants it", actions);
            }
        }
    }
}
