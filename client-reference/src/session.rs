//! One session: the link, the session machine of `bellwire-protocol`, and the desk, joined in one loop.
//!
//! The machine decides what to say and when to leave; this file carries it out.

use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;

use bellwire_protocol::{
    Carrier, ClientAction, ClientSession, Code, DecodeError, Decoded, DeviceFrame, EXPIRED,
    GoawayReason, Hello, Id, KeepAlive, PresenceState, Reconnect, ReconnectWhen, ServerFrame,
    SessionEnd, Verdict,
};
use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::carrier::{Link, LinkEnd};
use crate::clock::Clock;
use crate::end::Disconnect;
use crate::handover::{Desk, Events, Taken};
use crate::keepalive::{Quiet, Silence};
use crate::membership::Membership;
use crate::notification::Event;
use crate::state::{Given, Networks};
use crate::surroundings::{Change, Surroundings};
use crate::topics::{Request, Wish};

/// How long the server may take nothing of what is sent.
const SEND_TIMEOUT: Duration = Duration::from_secs(30);

/// The same once the app wants to leave.
const LAST_SEND: Duration = Duration::from_secs(2);

/// Frames that are taken in one turn before anything else gets its chance.
const FRAMES_PER_TURN: usize = 256;

/// How long a callback may still run once the app wants to leave.
pub(crate) const LAST_CALLBACK: Duration = Duration::from_secs(5);

/// How long the server may take to answer after the machine woke up or moved, in milliseconds. Far less than otherwise: the
/// link is probably gone, and a new one takes less than this.
pub(crate) const WAKE_ANSWER_MS: u64 = 5_000;

/// Sign of life on QUIC where nothing is known of the network, in seconds: many home routers forget a UDP flow after 30 s, and
/// a notification could then not come in.
pub(crate) const USUAL_QUIC_S: u32 = 25;

/// Sign of life on WebSocket where nothing is known of the network, in seconds: below the 5 minutes after which many load
/// balancers and firewalls forget a TCP flow.
pub(crate) const USUAL_WEBSOCKET_S: u32 = 240;

/// Shortest pause after verdicts could not be saved, in milliseconds.
const STATE_TROUBLE_MIN_MS: u64 = 5_000;

/// What the app asks for.
#[derive(Debug)]
pub(crate) enum Command {
    /// Leave for good.
    Shutdown,
    /// The device is on another network, perhaps with a name.
    NetworkChanged(Option<String>),
    /// Whether a person uses the app.
    Presence(PresenceState),
    /// There is something new to ask of topics.
    Topics,
}

/// What a session needs to know.
pub(crate) struct Setting<'a> {
    pub(crate) hello: Hello,
    /// Behind the newest verdict that `hello` may name.
    pub(crate) hello_mark: u64,
    /// The interval that the app wants; otherwise it is learned.
    pub(crate) keep_alive_s: Option<u32>,
    pub(crate) networks: &'a mut Networks,
    pub(crate) surroundings: &'a mut Surroundings,
    pub(crate) desk: &'a Arc<Desk>,
    pub(crate) membership: &'a Arc<Membership>,
    pub(crate) events: &'a Events,
    pub(crate) clock: &'a Clock,
    /// What the app said last of whether a person uses it.
    pub(crate) presence: &'a mut Option<PresenceState>,
    pub(crate) commands: &'a mut mpsc::Receiver<Command>,
    /// The app wants to leave. Said beside the commands, which wait while something is sent.
    pub(crate) leaving: &'a CancellationToken,
}

/// How a session ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) when: ReconnectWhen,
    /// Where to come back to, if not to the same place.
    pub(crate) endpoint: Option<String>,
    pub(crate) why: Disconnect,
    /// How long it stood; `None`: there never was a `welcome`.
    pub(crate) stood_ms: Option<u64>,
    /// The app wanted it.
    pub(crate) left: bool,
    /// A silence of this length, in milliseconds, was perhaps lost: the sign of life after it was not answered.
    pub(crate) unanswered_ms: Option<u64>,
    /// The server closed after our `bye`, so it has every verdict.
    pub(crate) said_goodbye: bool,
}

/// Runs one session to its end. `attached` is told when the `welcome` came, with the number of the session.
pub(crate) async fn run<'a>(
    link: Link,
    setting: Setting<'a>,
    attached: impl FnMut(&mut Networks, &mut Surroundings, u64),
) -> Ended {
    let Setting {
        hello,
        hello_mark,
        keep_alive_s,
        networks,
        surroundings,
        desk,
        membership,
        events,
        clock,
        presence,
        commands,
        leaving,
    } = setting;
    let session = Session {
        machine: ClientSession::new(hello, keep_alive_s),
        link,
        learns: keep_alive_s.is_none(),
        bounds: None,
        quiet: Quiet::new(clock.now_ms()),
        address_checks: 0,
        answer_by_ms: None,
        networks,
        surroundings,
        desk,
        membership,
        asked_topics: None,
        events,
        clock,
        presence,
        presence_told: false,
        leaving,
        actions: Vec::new(),
        attached,
        hello_mark,
        sent_mark: 0,
        ping_mark: None,
        welcomed_at_ms: None,
        leaving_at_ms: None,
        end_detail: None,
    };
    session.run(commands).await
}

/// How long a server that takes nothing is waited for: less once the app wants to leave, also in the middle of it.
async fn patience(leaving: &CancellationToken) {
    let last = async {
        leaving.cancelled().await;
        tokio::time::sleep(LAST_SEND).await;
    };
    let _ = tokio::time::timeout(SEND_TIMEOUT, last).await;
}

struct Session<'a, F> {
    machine: ClientSession,
    link: Link,
    /// The interval of signs of life is learned; otherwise the app has set it.
    learns: bool,
    /// What the server advises.
    bounds: Option<KeepAlive>,
    quiet: Quiet,
    /// How often the server had found us at another address when we last heard of it.
    address_checks: u64,
    /// The machine woke up or moved: something must be heard by then.
    answer_by_ms: Option<u64>,
    networks: &'a mut Networks,
    surroundings: &'a mut Surroundings,
    desk: &'a Desk,
    membership: &'a Arc<Membership>,
    /// The request about topics that waits for its answer.
    asked_topics: Option<Request>,
    events: &'a Events,
    clock: &'a Clock,
    presence: &'a mut Option<PresenceState>,
    /// This session has heard of it.
    presence_told: bool,
    leaving: &'a CancellationToken,
    actions: Vec<ClientAction>,
    attached: F,
    hello_mark: u64,
    /// Behind the newest verdict that was sent.
    sent_mark: u64,
    /// The same when the `ping` was sent that waits for its `pong`: the answer proves that the server has those.
    ping_mark: Option<u64>,
    welcomed_at_ms: Option<u64>,
    /// The app wants to leave; by then at the latest.
    leaving_at_ms: Option<u64>,
    end_detail: Option<String>,
}

/// What woke the loop.
enum Woken {
    Received(Result<Result<Decoded<ServerFrame>, DecodeError>, LinkEnd>),
    Decided(Taken),
    Asked(Option<Command>),
    Changed(Change),
    Deadline,
}

impl<F: FnMut(&mut Networks, &mut Surroundings, u64)> Session<'_, F> {
    async fn run(mut self, commands: &mut mpsc::Receiver<Command>) -> Ended {
        self.machine
            .handle_connected(self.clock.now_ms(), &mut self.actions);
        loop {
            if let Some(reconnect) = self.carry_out().await {
                return self.finish(reconnect).await;
            }
            if self.tell_presence() || self.ask_for_topics() {
                continue;
            }
            let deadlines = [
                self.machine.deadline_ms(),
                self.leaving_at_ms,
                self.answer_by_ms,
            ];
            let deadline_ms = deadlines.into_iter().flatten().min();
            let clock = self.clock;
            let deadline = async move {
                match deadline_ms {
                    Some(ms) => clock.sleep_until(ms).await,
                    None => std::future::pending().await,
                }
            };
            let woken = tokio::select! {
                taken = self.desk.decided() => Woken::Decided(taken),
                command = commands.recv(), if self.leaving_at_ms.is_none() => Woken::Asked(command),
                received = self.link.receive() => Woken::Received(received),
                change = self.surroundings.change(clock) => Woken::Changed(change),
                () = deadline => Woken::Deadline,
            };
            match woken {
                Woken::Received(received) => self.receive(received),
                Woken::Decided(taken) => {
                    if let Some(ended) = self.decided(taken) {
                        return self.abandon(ended).await;
                    }
                }
                Woken::Asked(command) => self.asked(command),
                Woken::Changed(change) => self.changed(change),
                Woken::Deadline => {
                    let now_ms = self.clock.now_ms();
                    if self.answer_by_ms.is_some_and(|by| now_ms >= by) {
                        self.end_detail =
                            Some("no answer after the machine woke up or moved".to_owned());
                        self.quiet.forget(now_ms);
                        self.machine.handle_closed(None, &mut self.actions);
                    }
                    if self.leaving_at_ms.is_some_and(|at| now_ms >= at) {
                        self.machine.leave(now_ms, &mut self.actions);
                    }
                    self.machine.handle_deadline(now_ms, &mut self.actions);
                }
            }
        }
    }

    /// Takes what has arrived, all of it, so that notifications that came together are handed over and saved together.
    fn receive(&mut self, first: Result<Result<Decoded<ServerFrame>, DecodeError>, LinkEnd>) {
        let mut next = Some(first);
        let mut taken = 0;
        while let Some(received) = next.take() {
            match received {
                Ok(decoded) => self.handle(decoded),
                Err(end) => {
                    self.machine.handle_closed(end.code, &mut self.actions);
                    self.end_detail = Some(end.detail);
                }
            }
            taken += 1;
            if self.machine.is_over() {
                return;
            }
            if taken < FRAMES_PER_TURN {
                next = self.link.receive().now_or_never();
            }
        }
        self.machine.flush(self.clock.now_ms(), &mut self.actions);
    }

    /// The machine slept, or is somewhere else: is the server still there?
    fn changed(&mut self, change: Change) {
        if let Some(slept) = change.slept {
            self.events.tell(Event::Woke { slept });
        }
        if change.moved {
            self.events.tell(Event::Moved {
                network: self.surroundings.network().to_owned(),
            });
            self.link.rebind();
        }
        self.probe();
    }

    /// Asks for a sign of life at once, with little patience.
    fn probe(&mut self) {
        let now_ms = self.clock.now_ms();
        // What was silent before tells nothing about the network that we are on now.
        self.quiet.forget(now_ms);
        self.machine.probe(now_ms, &mut self.actions);
        if self.machine.is_attached() {
            self.answer_by_ms = Some(now_ms + WAKE_ANSWER_MS);
        }
    }

    /// Something was heard.
    fn heard(&mut self) {
        self.answer_by_ms = None;
        // QUIC lets a session live on when a router has forgotten the flow; but what the server said in between came late.
        let checks = self.link.address_checks();
        let end = match checks == self.address_checks {
            true => Silence::Survived,
            false => Silence::Lost,
        };
        self.address_checks = checks;
        if let Some(silent_ms) = self.quiet.heard(self.clock.now_ms()) {
            let wall_ms = self.clock.wall_ms();
            self.networks.note(
                self.surroundings.network(),
                self.link.carrier(),
                silent_ms,
                end,
                wall_ms,
            );
        }
    }

    /// How long the next silence may last, unless the app has set it.
    fn draw(&mut self) {
        let Some(bounds) = self.bounds.filter(|_| self.learns) else {
            return;
        };
        let carrier = self.link.carrier();
        let usual_s = match carrier {
            Carrier::Quic => USUAL_QUIC_S,
            Carrier::WebSocket => USUAL_WEBSOCKET_S,
        };
        let clock = self.clock;
        let silent_ms = self.networks.draw(
            self.surroundings.network(),
            carrier,
            bounds,
            usual_s,
            clock.wall_ms(),
            |max| clock.up_to(max),
        );
        self.machine.set_keep_alive_ms(silent_ms);
    }

    fn handle(&mut self, decoded: Result<Decoded<ServerFrame>, DecodeError>) {
        self.heard();
        if matches!(decoded, Ok(Decoded::Frame(ServerFrame::Pong)))
            && let Some(mark) = self.ping_mark.take()
        {
            self.desk.memory().confirm(mark);
        }
        let repeated = RefCell::new(Vec::new());
        let memory = self.desk.memory();
        // Declines go the long way, through the hand-over: it knows their reasons.
        let known = |id: &Id| {
            memory.is_acknowledged_safely(id).then(|| {
                repeated.borrow_mut().push(*id);
                Verdict::Acknowledged
            })
        };
        let before = self.actions.len();
        self.machine
            .handle_decoded(decoded, self.clock.now_ms(), &known, &mut self.actions);
        drop(memory);
        for id in repeated.into_inner() {
            self.events.tell(Event::Repeated { id });
        }
        for action in &self.actions[before..] {
            if let ClientAction::Send(DeviceFrame::Decline(decline)) = action
                && decline.reason == EXPIRED
            {
                self.events.tell(Event::Expired { id: decline.id });
            }
        }
    }

    fn decided(&mut self, taken: Taken) -> Option<String> {
        let now_ms = self.clock.now_ms();
        for decided in taken.decided {
            match decided.given {
                Given::Acknowledged => {
                    self.machine
                        .handle_acknowledged(decided.id, now_ms, &mut self.actions)
                }
                Given::Declined(reason) => {
                    self.machine
                        .handle_declined(decided.id, reason, now_ms, &mut self.actions)
                }
            };
            self.sent_mark = self.sent_mark.max(decided.mark);
        }
        self.machine.flush(now_ms, &mut self.actions);
        if taken.closed {
            self.machine.leave(now_ms, &mut self.actions);
        }
        taken.failed
    }

    fn asked(&mut self, command: Option<Command>) {
        let now_ms = self.clock.now_ms();
        match command {
            // A dropped client wants the same as one that says so.
            Some(Command::Shutdown) | None => {
                self.desk.close();
                self.leaving_at_ms = Some(now_ms + LAST_CALLBACK.as_millis() as u64);
            }
            Some(Command::NetworkChanged(name)) => {
                self.surroundings.told(name);
                self.link.rebind();
                self.probe();
            }
            Some(Command::Presence(state)) => {
                *self.presence = Some(state);
                self.presence_told = false;
            }
            // The loop looks by itself.
            Some(Command::Topics) => {}
        }
    }

    /// Says whether a person uses the app, once for each session and each change; answers whether there was something to say.
    fn tell_presence(&mut self) -> bool {
        if self.presence_told {
            return false;
        }
        let now_ms = self.clock.now_ms();
        let told = self
            .presence
            .is_some_and(|state| self.machine.send_presence(state, now_ms, &mut self.actions));
        self.presence_told = told;
        told
    }

    /// Says the next wish about topics, one at a time; answers whether there was one.
    fn ask_for_topics(&mut self) -> bool {
        if self.asked_topics.is_some() || !self.machine.is_attached() {
            return false;
        }
        let Some(request) = self.membership.next_request() else {
            return false;
        };
        let now_ms = self.clock.now_ms();
        let topics = request.topics();
        let said = match request.wish {
            Wish::Join => self.machine.subscribe(topics, now_ms, &mut self.actions),
            Wish::Leave => self.machine.unsubscribe(topics, now_ms, &mut self.actions),
        };
        if said {
            self.asked_topics = Some(request);
        }
        said
    }

    /// The session ended. Was it over what was asked of topics? Then it is not asked for ever.
    fn blame_topics(&mut self, why: &SessionEnd) {
        let code = match why {
            SessionEnd::Error { code, .. } => Code::from_name(code),
            SessionEnd::Closed(code) => *code,
            SessionEnd::Left
            | SessionEnd::Goaway(_)
            | SessionEnd::Silence
            | SessionEnd::NoWelcome
            | SessionEnd::Malformed(_)
            | SessionEnd::Misbehaved(_) => None,
        };
        if !matches!(code, Some(Code::Malformed | Code::FrameTooLarge)) {
            return;
        }
        let Some(request) = self.asked_topics.take() else {
            return;
        };
        let given_up = self.membership.blame(request);
        if !given_up.is_empty() {
            let what = format!(
                "the server ends the session whenever it is asked about these topics, so that is given up: {}",
                given_up.join(" ")
            );
            self.events.tell(Event::Trouble { what });
        }
    }

    /// Does what the machine said; answers when the session is over.
    async fn carry_out(&mut self) -> Option<(Reconnect, Code)> {
        let mut over = None;
        let mut code = Code::Bye;
        let mut delivered = false;
        let mut sent = false;
        for action in std::mem::take(&mut self.actions) {
            match action {
                ClientAction::Send(frame) => {
                    let asks = frame == DeviceFrame::Ping;
                    if asks {
                        self.ping_mark = Some(self.sent_mark);
                    }
                    self.quiet.sent(asks, self.clock.now_ms());
                    if asks {
                        self.draw();
                    }
                    sent = true;
                    if !self.feed(&frame).await {
                        break;
                    }
                }
                ClientAction::Attached(welcome) => {
                    self.welcomed_at_ms = Some(self.clock.now_ms());
                    self.desk.memory().confirm(self.hello_mark);
                    let carrier = self.link.carrier();
                    (self.attached)(self.networks, self.surroundings, welcome.session);
                    self.bounds = Some(welcome.keep_alive_s);
                    self.draw();
                    self.events.tell(Event::Connected {
                        carrier,
                        codec: self.link.codec(),
                        session: welcome.session,
                        pending: welcome.pending,
                        window: welcome.window,
                    });
                }
                ClientAction::Deliver(notify) => {
                    let now_ms = self.clock.now_ms();
                    let server_now_ms = self
                        .machine
                        .server_now_ms(now_ms)
                        .unwrap_or(notify.accepted_ms);
                    let expires_at_ms = now_ms + notify.expires_ms.saturating_sub(server_now_ms);
                    self.desk.put(notify, expires_at_ms);
                    delivered = true;
                }
                ClientAction::Withdraw(ids) => {
                    let ids = self.desk.withdraw(ids);
                    if !ids.is_empty() {
                        self.events.tell(Event::Withdrawn { ids });
                    }
                }
                ClientAction::Subscribed(topics) => {
                    let refused = self.membership.confirm(self.asked_topics.take(), &topics);
                    self.events.tell(Event::Subscribed { topics, refused });
                }
                ClientAction::Close(close) => code = close,
                ClientAction::Reconnect(reconnect) => over = Some(reconnect),
            }
        }
        if delivered {
            self.desk.ring();
        }
        if sent && over.is_none() {
            self.flush().await;
        }
        // A link that broke while sending ended the machine, which has said its last action by now.
        over = over.or_else(|| self.last_word());
        over.map(|reconnect| (reconnect, code))
    }

    fn last_word(&mut self) -> Option<Reconnect> {
        std::mem::take(&mut self.actions)
            .into_iter()
            .find_map(|action| match action {
                ClientAction::Reconnect(reconnect) => Some(reconnect),
                ClientAction::Send(_)
                | ClientAction::Attached(_)
                | ClientAction::Deliver(_)
                | ClientAction::Withdraw(_)
                | ClientAction::Subscribed(_)
                | ClientAction::Close(_) => None,
            })
    }

    async fn feed(&mut self, frame: &DeviceFrame) -> bool {
        let patience = patience(self.leaving);
        let fed = tokio::select! {
            biased;
            fed = self.link.feed(frame) => Some(fed),
            () = patience => None,
        };
        self.sent(fed)
    }

    async fn flush(&mut self) {
        let patience = patience(self.leaving);
        let flushed = tokio::select! {
            biased;
            flushed = self.link.flush() => Some(flushed),
            () = patience => None,
        };
        self.sent(flushed);
    }

    /// `None`: nobody took it in time.
    fn sent(&mut self, sent: Option<Result<(), LinkEnd>>) -> bool {
        let end = match sent {
            Some(Ok(())) => return true,
            Some(Err(end)) => end,
            None => LinkEnd {
                code: None,
                detail: "the server takes nothing that is sent".to_owned(),
            },
        };
        self.machine.handle_closed(end.code, &mut self.actions);
        self.end_detail = Some(end.detail);
        false
    }

    async fn finish(mut self, (reconnect, code): (Reconnect, Code)) -> Ended {
        let left = reconnect.why == SessionEnd::Left;
        self.blame_topics(&reconnect.why);
        if reconnect.why == SessionEnd::Goaway(GoawayReason::Replaced) {
            self.events.tell(Event::Replaced);
        }
        let stood_ms = self
            .welcomed_at_ms
            .map(|at| self.clock.now_ms().saturating_sub(at));
        // The server was silent after a sign of life, or the connection broke over it.
        let unanswered_ms = match reconnect.why {
            SessionEnd::Silence | SessionEnd::Closed(None) => self.quiet.unanswered(),
            SessionEnd::Closed(Some(_))
            | SessionEnd::Left
            | SessionEnd::Goaway(_)
            | SessionEnd::Error { .. }
            | SessionEnd::NoWelcome
            | SessionEnd::Malformed(_)
            | SessionEnd::Misbehaved(_) => None,
        };
        // Nothing is left to say on a link that ended by itself.
        let answered = match reconnect.why {
            SessionEnd::Closed(_) => None,
            SessionEnd::Left
            | SessionEnd::Goaway(_)
            | SessionEnd::Error { .. }
            | SessionEnd::Silence
            | SessionEnd::NoWelcome
            | SessionEnd::Malformed(_)
            | SessionEnd::Misbehaved(_) => self.link.close(code).await,
        };
        let said_goodbye = left && answered == Some(Code::Bye);
        if said_goodbye {
            self.desk
                .memory()
                .confirm(self.sent_mark.max(self.hello_mark));
        }
        Ended {
            when: reconnect.when,
            endpoint: reconnect.endpoint,
            why: Disconnect::from_session(reconnect.why, self.end_detail),
            stood_ms,
            left,
            unanswered_ms,
            said_goodbye,
        }
    }

    /// Verdicts could not be saved: go without them, so that the server repeats what has none.
    async fn abandon(self, detail: String) -> Ended {
        let stood_ms = self
            .welcomed_at_ms
            .map(|at| self.clock.now_ms().saturating_sub(at));
        self.link.close(Code::Bye).await;
        Ended {
            when: ReconnectWhen::Backoff {
                floor_ms: STATE_TROUBLE_MIN_MS,
            },
            endpoint: None,
            why: Disconnect::State { detail },
            stood_ms,
            left: self.leaving_at_ms.is_some(),
            unanswered_ms: None,
            said_goodbye: false,
        }
    }
}
