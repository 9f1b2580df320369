//! One connection, whatever carries it: the session machine of the protocol between a pipe and the runtime.
//!
//! A link is one task and one hand-written future. It wakes for three things only: bytes to read, words in its outbox,
//! kicks of the wheel. While nothing happens it holds no buffer and no timer; a timer exists only until `hello`, during
//! a drain and while closing.
//!
//! Reading goes on while writing is blocked, so that acknowledgements are seen and no two peers wait for each other.
//! What is answered to frames meanwhile is bounded: beyond a few waiting answers, further ones count as said.
//!
//! Whatever happens (a refusal, a cut, a panic), each attach is followed by exactly one detach.

use std::collections::VecDeque;
use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bellwire_protocol::limits::{
    DEVICE_FRAME_CEILING_BYTES, GOAWAY_GRACE_MS, REPLACED_AWAY_MIN_MS, WINDOW_MAX, WINDOW_MIN,
    WITHDRAW_IDS_MAX,
};
use bellwire_protocol::{
    Ack, Carrier, Code, Codec, DecodeError, Goaway, GoawayReason, Hello, Id, KeepAlive,
    PresenceState, ReconnectRange, ServerAction, ServerFrame, ServerSession, SharedNotify, Topics,
    Welcome, Withdraw,
};
use bytes::Bytes;
use tokio::time::{Sleep, sleep};
use tracing::{debug, warn};

use super::admission::Knock;
use super::door::Door;
use super::meters::Meters;
use super::outbox::{Kick, Outbox};
use super::wheel::Wheel;
use crate::delivery::{
    Acknowledged, Closing, DeviceId, Notification, PingId, Refusal, SessionId, Urgency, Verdict,
};
use crate::runtime::{AttachRequest, Identity, LinkSettings, Out, Outlet, RuntimeError, WhoError};

/// Encoded bytes that wait to be written; beyond them notifications stay in the outbox, where all devices of a fan-out
/// share them. Enough to fill the pipe of a fast network for one turn.
const QUEUED_HIGH_BYTES: usize = 64 * 1024;

/// Frames taken from one device before other links have their turn.
const FRAMES_PER_TURN: usize = 64;

/// Requests of a device to join or leave topics that wait for the one before; then nothing more is read from it.
const CHOICES_WAITING_MAX: usize = 4;

/// Answers to frames (`pong`) that wait to be written; one waiting answer stands for all later ones.
const ANSWERS_WAITING_MAX: u32 = 16;

/// How long a closing link waits for the peer to take the last frame.
const LINGER: Duration = Duration::from_secs(3);

/// When a replaced client may come back: away for the minute that the protocol asks, then spread over another.
const REPLACED_RECONNECT_MS: ReconnectRange = ReconnectRange {
    min_ms: REPLACED_AWAY_MIN_MS as u32,
    max_ms: 2 * REPLACED_AWAY_MIN_MS as u32,
};

/// When those may come back who arrive while the server goes down.
const DRAINING_RECONNECT_MS: ReconnectRange = ReconnectRange {
    min_ms: 1_000,
    max_ms: 10_000,
};

/// Why nothing more can be read from a pipe, or written to it.
#[derive(Debug)]
pub(crate) enum Broken {
    /// The peer is gone; there is nobody to tell. The word is for metrics.
    Gone(&'static str),
    /// The peer left in good order, without `bye`.
    Left,
    /// The peer broke the rules of the carrier, and can still be told.
    Fault(Code, String),
}

/// Bytes of frames that went through a pipe so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Traffic {
    /// From the peer.
    pub(crate) received: u64,
    /// Taken by the peer's transport or our system's.
    pub(crate) sent: u64,
}

/// What carries frames. All methods are called from one task, and wake it.
pub(crate) trait Pipe: Send + Unpin + 'static {
    /// Which carrier.
    const CARRIER: Carrier;

    /// How frames are written here.
    fn codec(&self) -> Codec;

    /// Before anything else in a turn of the task: for carriers whose connection is driven by it.
    fn begin_turn(&mut self, _cx: &mut Context<'_>) {}

    /// After a turn that does not end the link: sends what the turn made.
    fn end_turn(&mut self, _cx: &mut Context<'_>) {}

    /// The next frame; `None` for a sign of life that is no frame.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>>;

    /// Takes a frame, given in two parts, for writing. It always fits; look at [`Pipe::queued`] first.
    fn queue(&mut self, head: &[u8], tail: &[u8]);

    /// Bytes taken and not yet written.
    fn queued(&self) -> usize;

    /// Writes what was taken; ready when all of it is on its way.
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Broken>>;

    /// What went through so far.
    fn traffic(&self) -> Traffic;

    /// A number that rises whenever the peer's transport is heard, for carriers whose system does not tell when the
    /// peer stops acknowledging.
    fn heard_of_peer(&self) -> Option<u64>;

    /// Nothing more will be queued: prepares to close with this code.
    fn end(&mut self, code: Code, message: &str);

    /// After [`Pipe::end`]: ready when the peer has everything and the connection can be dropped.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()>;
}

/// What all links share.
pub(crate) struct Shared<D> {
    pub(crate) door: D,
    pub(crate) wheel: Arc<Wheel>,
    pub(crate) quic: Meters,
    pub(crate) websocket: Meters,
}

impl<D> Shared<D> {
    /// The counters of a carrier.
    pub(crate) fn meters(&self, carrier: Carrier) -> &Meters {
        match carrier {
            Carrier::Quic => &self.quic,
            Carrier::WebSocket => &self.websocket,
        }
    }
}

/// The keep-alive bounds advised on a carrier.
pub(crate) fn keep_alive<D: Door>(door: &D, carrier: Carrier) -> KeepAlive {
    let settings = door.link_settings();
    match carrier {
        Carrier::Quic => settings.keep_alive_quic_s,
        Carrier::WebSocket => settings.keep_alive_websocket_s,
    }
    .into()
}

/// Silence that is borne on a carrier.
pub(crate) fn silence<D: Door>(door: &D, carrier: Carrier) -> Duration {
    let percent = door.link_settings().silence_percent;
    Duration::from_millis(keep_alive(door, carrier).silence_ms(percent))
}

/// Since when something waits without progress.
#[derive(Debug, Default)]
struct Waiting {
    since: Option<u32>,
    mark: u64,
}

impl Waiting {
    /// It waits; `mark` rises with every progress.
    fn note(&mut self, mark: u64, now: u32) {
        if self.since.is_none() || self.mark != mark {
            *self = Waiting {
                since: Some(now),
                mark,
            };
        }
    }

    fn done(&mut self) {
        self.since = None;
    }

    /// Ticks until it has waited for too long; `Some(0)`: it has.
    fn left(&self, limit: u32, now: u32) -> Option<u32> {
        self.since
            .map(|since| limit.saturating_sub(now.saturating_sub(since)))
    }
}

type Proving<D> =
    Pin<Box<dyn Future<Output = (Result<<D as Door>::Proof, WhoError>, Box<Hello>)> + Send>>;

type Choosing = Pin<Box<dyn Future<Output = Result<Option<Vec<String>>, RuntimeError>> + Send>>;

/// What a device asked for about its topics: one request at a time, in order.
#[derive(Default)]
struct Choices {
    running: Option<Choosing>,
    /// Whether to join, and what.
    waiting: VecDeque<(bool, Vec<String>)>,
}

/// One connection.
pub(crate) struct Link<D: Door, P: Pipe> {
    shared: Arc<Shared<D>>,
    pipe: P,
    outbox: Arc<Outbox>,
    session: ServerSession,
    /// Words taken out of the outbox that found the pipe full.
    backlog: VecDeque<Out>,
    /// The authentication under way.
    proving: Option<Proving<D>>,
    /// Requests about topics; none while nothing was asked.
    choices: Option<Box<Choices>>,
    /// Given back once the device is authenticated.
    knock: Option<Box<Knock>>,
    /// [`Door::detach`] is owed for these.
    attached: Option<(DeviceId, SessionId)>,
    /// Until `hello`, while draining, while closing.
    timer: Option<Pin<Box<Sleep>>>,
    /// Bytes that the pipe cannot write.
    stalled: Waiting,
    /// Bytes that were written, and nothing was heard since.
    unanswered: Waiting,
    /// The wheel will kick with [`Kick::Sent`].
    reminded: bool,
    answers_waiting: u32,
    counted: Traffic,
    /// The session has had its last action.
    ending: bool,
    /// Why it ended, for metrics.
    reason: &'static str,
    peer: SocketAddr,
}

impl<D: Door, P: Pipe> Link<D, P> {
    /// A link on a connection that stands and has not said `hello`. `deadline` ends with the hello deadline.
    pub(crate) fn new(
        shared: Arc<Shared<D>>,
        pipe: P,
        knock: Knock,
        deadline: Pin<Box<Sleep>>,
        peer: SocketAddr,
    ) -> Link<D, P> {
        // Silence on QUIC is noticed by its own idle timer (quic.rs); the wheel only knows the link.
        let silence = match P::CARRIER {
            Carrier::Quic => u32::MAX,
            Carrier::WebSocket => silence_ticks(silence(&shared.door, P::CARRIER)),
        };
        let outbox = Outbox::new(Arc::clone(&shared.wheel), silence);
        outbox.watch_silence();
        Link {
            shared,
            pipe,
            outbox,
            // Its time is the timer's: it is asked once that has rung.
            session: ServerSession::new(0),
            backlog: VecDeque::new(),
            proving: None,
            choices: None,
            knock: Some(Box::new(knock)),
            attached: None,
            timer: Some(deadline),
            stalled: Waiting::default(),
            unanswered: Waiting::default(),
            reminded: false,
            answers_waiting: 0,
            counted: Traffic::default(),
            ending: false,
            reason: "lost",
            peer,
        }
    }

    fn meters(&self) -> &Meters {
        self.shared.meters(P::CARRIER)
    }

    // ---- One turn --------------------------------------------------------------------------------------------------

    /// Does what can be done now; ready when the link is over.
    fn turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut frames_left = FRAMES_PER_TURN;
        loop {
            self.mind_kicks();
            // Before reading: what is through makes room for more.
            self.mind_choices(cx);
            if let Err(broken) = self.receive(cx, &mut frames_left)
                && self.is_over(broken)
            {
                return Poll::Ready(());
            }
            self.mind_choices(cx);
            self.mind_proof(cx);
            self.mind_words();
            if self.mind_timer(cx).is_ready() {
                return Poll::Ready(());
            }
            if self.ending {
                return self.pipe.poll_end(cx);
            }
            let written = match self.pipe.poll_send(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(broken)) => {
                    if self.is_over(broken) {
                        return Poll::Ready(());
                    }
                    continue;
                }
                Poll::Pending => false,
            };
            self.note_sending(written);
            if frames_left == 0 {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            // Words that came while the pipe was full woke nobody: whoever made room looks for them.
            if !written
                || (self.backlog.is_empty()
                    && !self.outbox.has_words()
                    && !self.has_choice_to_begin())
            {
                return Poll::Pending;
            }
        }
    }

    fn mind_kicks(&mut self) {
        let kicks = self.outbox.take_kicks();
        if kicks.is_empty() || self.ending {
            return;
        }
        if kicks.has(Kick::Shutdown) {
            self.go_away(GoawayReason::Drain, DRAINING_RECONNECT_MS);
        }
        if kicks.has(Kick::Silence) {
            self.fail(Code::Silence, "nothing was heard for too long");
        }
        if kicks.has(Kick::Overflow) {
            warn!(peer = %self.peer, "more words wait for a device than may; it is cut off");
            self.fail(Code::SlowReader, "more waits for the device than may");
        }
        if kicks.has(Kick::Sent) {
            self.reminded = false;
            self.mind_sent();
        }
    }

    /// Takes frames until there are no more for now.
    fn receive(&mut self, cx: &mut Context<'_>, frames_left: &mut usize) -> Result<(), Broken> {
        while !self.ending && *frames_left > 0 && !self.has_many_choices() {
            let Poll::Ready(received) = self.pipe.poll_receive(cx) else {
                return Ok(());
            };
            // Even what breaks the rules was heard.
            self.outbox.heard();
            self.unanswered.done();
            *frames_left -= 1;
            if let Some(frame) = received? {
                self.meters().frame_received();
                let decoded = self
                    .pipe
                    .codec()
                    .decode_device_within(&frame, DEVICE_FRAME_CEILING_BYTES);
                self.drive(|session, actions| session.handle_decoded(decoded, actions));
            }
        }
        Ok(())
    }

    fn has_many_choices(&self) -> bool {
        self.choices
            .as_ref()
            .is_some_and(|choices| choices.waiting.len() >= CHOICES_WAITING_MAX)
    }

    fn has_choice_to_begin(&self) -> bool {
        self.choices
            .as_ref()
            .is_some_and(|choices| choices.running.is_none() && !choices.waiting.is_empty())
    }

    /// Goes on with what the device asked about its topics. Nothing is begun while its answers are not taken.
    fn mind_choices(&mut self, cx: &mut Context<'_>) {
        let held_back = self.has_many_choices();
        while let Some(choices) = &mut self.choices {
            let Some((device, _)) = self.attached.filter(|_| !self.ending) else {
                self.choices = None;
                return;
            };
            let Some(running) = &mut choices.running else {
                if self.pipe.queued() >= QUEUED_HIGH_BYTES {
                    return;
                }
                let Some((joins, topics)) = choices.waiting.pop_front() else {
                    self.choices = None;
                    break;
                };
                let (join, leave) = if joins {
                    (topics, Vec::new())
                } else {
                    (Vec::new(), topics)
                };
                let door = self.shared.door.clone();
                choices.running = Some(Box::pin(async move {
                    door.subscribe(device, join, leave).await
                }));
                continue;
            };
            let Poll::Ready(said) = running.as_mut().poll(cx) else {
                break;
            };
            choices.running = None;
            match said {
                Ok(Some(topics)) => self.send(&ServerFrame::Subscribed(Topics { topics })),
                // It was revoked, and is told so.
                Ok(None) => {}
                Err(RuntimeError::Draining) => {
                    self.go_away(GoawayReason::Drain, DRAINING_RECONNECT_MS);
                }
                Err(error) => self.fail(Code::StoreUnavailable, error.to_string()),
            }
        }
        if held_back && !self.has_many_choices() {
            // Bytes that came meanwhile woke nobody.
            cx.waker().wake_by_ref();
        }
    }

    /// Polls the authentication under way and goes on with its result.
    fn mind_proof(&mut self, cx: &mut Context<'_>) {
        let Some(proving) = &mut self.proving else {
            return;
        };
        if self.ending {
            self.proving = None;
            return;
        }
        let Poll::Ready((proof, hello)) = proving.as_mut().poll(cx) else {
            return;
        };
        self.proving = None;
        match proof {
            Ok(proof) => {
                self.knock = None;
                let device = DeviceId(hello.device.0);
                let session = self.shared.door.next_session();
                self.attached = Some((device, session));
                let outlet: Arc<dyn Outlet> = Arc::clone(&self.outbox) as Arc<dyn Outlet>;
                let settings = self.shared.door.link_settings();
                let request = attach_request(session, &hello, P::CARRIER, &settings);
                self.shared.door.attach(proof, request, outlet);
            }
            Err(WhoError::Unauthorized) => self.refuse(Code::Unauthorized),
            Err(WhoError::StoreUnavailable) => self.refuse(Code::StoreUnavailable),
            Err(WhoError::Draining) => self.go_away(GoawayReason::Drain, DRAINING_RECONNECT_MS),
        }
    }

    /// Turns words of the runtime into frames, as far as the pipe has room.
    fn mind_words(&mut self) {
        while !self.ending && self.pipe.queued() < QUEUED_HIGH_BYTES {
            if self.backlog.is_empty() {
                self.backlog = self.outbox.take_words();
            }
            match self.backlog.pop_front() {
                Some(out) => self.say(out),
                None => break,
            }
        }
        if self.backlog.is_empty() {
            // Gives the memory back: an idle link holds no queue.
            self.backlog = VecDeque::new();
        }
    }

    /// Lets the timer ring; ready when the link was closing and its time is up.
    fn mind_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(timer) = &mut self.timer {
            if timer.as_mut().poll(cx).is_pending() {
                break;
            }
            self.timer = None;
            if self.ending {
                return Poll::Ready(());
            }
            self.drive(|session, actions| session.handle_deadline(u64::MAX, actions));
        }
        Poll::Pending
    }

    /// Whether a broken pipe means the end at once. If not, the peer is being told.
    fn is_over(&mut self, broken: Broken) -> bool {
        match broken {
            Broken::Gone(reason) => {
                if !self.ending {
                    self.reason = reason;
                }
                true
            }
            _ if self.ending => true,
            Broken::Left => {
                self.reason = "left";
                self.finish(Code::Bye, "");
                false
            }
            Broken::Fault(code, message) => {
                self.fail(code, message);
                false
            }
        }
    }

    // ---- Sending ---------------------------------------------------------------------------------------------------

    /// After an attempt to write: notes what waits, and has the wheel remind this link of it.
    fn note_sending(&mut self, written: bool) {
        let traffic = self.pipe.traffic();
        let sent = traffic.sent.saturating_sub(self.counted.sent);
        self.count_traffic();
        if written {
            self.stalled.done();
            self.answers_waiting = 0;
        } else {
            self.stalled.note(traffic.sent, self.outbox.now());
        }
        if sent > 0
            && let Some(mark) = self.pipe.heard_of_peer()
        {
            self.unanswered.note(mark, self.outbox.now());
        }
        self.mind_reminder();
    }

    /// Has the wheel remind this link when something may have waited for too long.
    fn mind_reminder(&mut self) {
        if self.reminded {
            return;
        }
        let (limit, now) = (self.write_ticks(), self.outbox.now());
        let left = [&self.stalled, &self.unanswered]
            .into_iter()
            .filter_map(|waiting| waiting.left(limit, now))
            .min();
        if let Some(left) = left {
            self.reminded = true;
            self.outbox.remind(left.max(1));
        }
    }

    /// The wheel reminds: does something wait for too long?
    fn mind_sent(&mut self) {
        let (limit, now) = (self.write_ticks(), self.outbox.now());
        if let Some(mark) = self.pipe.heard_of_peer()
            && mark != self.unanswered.mark
        {
            self.unanswered.done();
        }
        let late = |waiting: &Waiting| waiting.left(limit, now) == Some(0);
        if late(&self.stalled) || late(&self.unanswered) {
            self.fail(Code::SlowReader, "what was sent was not taken in time");
        } else {
            self.mind_reminder();
        }
    }

    fn write_ticks(&self) -> u32 {
        let deadline = self.shared.door.link_settings().write_deadline;
        u32::try_from(deadline.as_secs()).unwrap_or(u32::MAX).max(1)
    }

    fn count_traffic(&mut self) {
        let traffic = self.pipe.traffic();
        if traffic != self.counted {
            let received = traffic.received.saturating_sub(self.counted.received);
            let sent = traffic.sent.saturating_sub(self.counted.sent);
            self.meters().bytes(received, sent);
            self.counted = traffic;
        }
    }

    fn send(&mut self, frame: &ServerFrame) {
        if matches!(frame, ServerFrame::Pong) {
            if self.answers_waiting >= ANSWERS_WAITING_MAX {
                return;
            }
            self.answers_waiting += 1;
        }
        let bytes = self.pipe.codec().encode_server(frame);
        self.pipe.queue(&bytes, &[]);
        self.meters().frame_sent();
    }

    /// Says one word of the runtime to the device.
    fn say(&mut self, out: Out) {
        match out {
            Out::Welcome { pending, window } => self.welcome(pending, window),
            Out::Refuse(why) => self.refuse(match why {
                Refusal::StaleAttempt => Code::StaleAttempt,
                Refusal::DuplicateDevice => Code::DuplicateDevice,
                // The same answer as for an unknown one: it is unknown now.
                Refusal::UnknownDevice => Code::Unauthorized,
                Refusal::StoreFailed => Code::StoreUnavailable,
            }),
            Out::Send {
                seq,
                redelivered,
                notification,
            } => self.notify(seq, redelivered, &notification),
            Out::Withdraw(pings) => {
                for pings in pings.chunks(WITHDRAW_IDS_MAX) {
                    let ids = pings.iter().map(|ping| Id(ping.0)).collect();
                    self.send(&ServerFrame::Withdraw(Withdraw { ids }));
                }
            }
            Out::Close(Closing::Replaced) => {
                self.go_away(GoawayReason::Replaced, REPLACED_RECONNECT_MS);
            }
            Out::Close(Closing::Revoked) => {
                let never = ReconnectRange {
                    min_ms: 0,
                    max_ms: 0,
                };
                self.go_away(GoawayReason::Revoked, never);
            }
            Out::Close(Closing::AckTimeout) => {
                self.fail(Code::AckTimeout, Code::AckTimeout.meaning());
            }
            Out::Close(Closing::SecretEnded) => self.fail(
                Code::Unauthorized,
                "The secret of this device was replaced, and the old one ended at once.",
            ),
            Out::Drain { min_ms, max_ms } => {
                let at_most = |ms: u64| u32::try_from(ms).unwrap_or(u32::MAX);
                let range = ReconnectRange {
                    min_ms: at_most(min_ms),
                    max_ms: at_most(max_ms),
                };
                self.go_away(GoawayReason::Drain, range);
            }
        }
    }

    fn welcome(&mut self, pending: u32, window: u16) {
        let Some((_, session)) = self.attached else {
            return;
        };
        let door = &self.shared.door;
        let welcome = Welcome {
            session: session.0,
            pending: pending.into(),
            window,
            max_bytes: door.link_settings().content_max,
            keep_alive_s: keep_alive(door, P::CARRIER),
            now_ms: door.now_ms(),
        };
        self.drive(|session, actions| session.handle_welcome(welcome, actions));
    }

    fn notify(&mut self, seq: u64, redelivered: bool, notification: &Notification) {
        // After `goaway` nothing new is sent; the mailbox takes it back when this link detaches.
        if !self.session.is_attached() || self.session.deadline_ms().is_some() {
            return;
        }
        if notification.expires_ms <= self.shared.door.now_ms() {
            // It waited here, behind a pipe that was full: nothing is sent past its expiry, and a number cannot be left out,
            // because `ack` counts by numbers. The mailbox ends it, and the next session begins behind it.
            return self.fail(
                Code::SlowReader,
                "what waited for the device expired before it could be sent",
            );
        }
        let shared = notification
            .wire
            .get_or_init(|| shared_notify(notification));
        let Some(Ok(shared)) = shared.as_deref() else {
            warn!(ping = %notification.ping, "the stored content cannot be sent; it is declined");
            self.decline(notification.ping);
            return self.fail(Code::Internal, "a notification could not be sent");
        };
        let frame = shared.frame(self.pipe.codec(), seq, redelivered);
        self.pipe.queue(frame.head.as_bytes(), &frame.tail);
        self.meters().frame_sent();
        self.session.handle_sent(seq);
    }

    fn decline(&self, ping: PingId) {
        if let Some((device, session)) = self.attached {
            self.shared.door.decline(device, session, ping);
        }
    }

    // ---- The session machine ---------------------------------------------------------------------------------------

    /// Lets the session decide, and does what it says.
    fn drive(&mut self, decide: impl FnOnce(&mut ServerSession, &mut Vec<ServerAction>)) {
        let mut actions = Vec::new();
        decide(&mut self.session, &mut actions);
        for action in actions {
            self.perform(action);
        }
        if self.ending {
            return;
        }
        match self.session.deadline_ms() {
            None => self.timer = None,
            Some(_) if self.timer.is_none() => {
                let grace = Duration::from_millis(GOAWAY_GRACE_MS);
                self.timer = Some(Box::pin(sleep(grace)));
            }
            Some(_) => {}
        }
    }

    fn perform(&mut self, action: ServerAction) {
        let door = &self.shared.door;
        match (action, self.attached) {
            (ServerAction::Attach(hello), _) => self.prove(hello),
            (ServerAction::Send(frame), _) => self.send(&frame),
            (ServerAction::Acknowledge(ack), Some((device, session))) => {
                let what = match ack {
                    Ack::UpTo(seq) => Acknowledged::UpTo(seq),
                    Ack::Ids(ids) => {
                        Acknowledged::Ids(ids.into_iter().map(|id| PingId(id.0)).collect())
                    }
                };
                door.acknowledge(device, session, what);
            }
            (ServerAction::Decline { id, .. }, Some((device, session))) => {
                door.decline(device, session, PingId(id.0));
            }
            (ServerAction::Presence(state), Some((device, session))) => {
                door.presence(device, session, state == PresenceState::Active);
            }
            (ServerAction::Subscribe(topics), Some(_)) => self.choose(true, topics),
            (ServerAction::Unsubscribe(topics), Some(_)) => self.choose(false, topics),
            (ServerAction::Leave, _) => self.detach(),
            (ServerAction::Close { code, message, .. }, _) => self.finish(code, &message),
            // The machine gives these to an attached session only.
            (
                ServerAction::Acknowledge(_)
                | ServerAction::Decline { .. }
                | ServerAction::Presence(_)
                | ServerAction::Subscribe(_)
                | ServerAction::Unsubscribe(_),
                None,
            ) => {}
        }
    }

    fn choose(&mut self, joins: bool, topics: Vec<String>) {
        let choices = self.choices.get_or_insert_default();
        choices.waiting.push_back((joins, topics));
    }

    fn prove(&mut self, hello: Box<Hello>) {
        if hello.secret.is_none() {
            self.refuse(Code::Unauthorized);
            return;
        }
        let door = self.shared.door.clone();
        self.proving = Some(Box::pin(async move {
            let secret = hello.secret.as_ref().map_or("", |secret| secret.expose());
            let device = DeviceId(hello.device.0);
            let proof = door.authenticate(device, Identity::Secret(secret)).await;
            (proof, hello)
        }));
    }

    fn refuse(&mut self, code: Code) {
        self.drive(|session, actions| session.handle_refused(code, code.meaning(), actions));
    }

    fn fail(&mut self, code: Code, message: impl Into<String>) {
        let message = message.into();
        self.drive(|session, actions| session.handle_failure(code, message, actions));
    }

    fn go_away(&mut self, reason: GoawayReason, reconnect_ms: ReconnectRange) {
        let goaway = Goaway {
            reason,
            reconnect_ms,
            endpoint: None,
        };
        // Its time is the timer's, as with `hello`.
        self.drive(|session, actions| session.handle_goaway(goaway, 0, actions));
    }

    // ---- The end ---------------------------------------------------------------------------------------------------

    /// Closes: the last frames are written, then the connection ends with this code.
    fn finish(&mut self, code: Code, message: &str) {
        if self.ending {
            return;
        }
        self.ending = true;
        if self.reason == "lost" {
            self.reason = code.name();
        }
        debug!(peer = %self.peer, carrier = P::CARRIER.name(), %code, message, "the link closes");
        self.detach();
        self.proving = None;
        self.choices = None;
        self.backlog = VecDeque::new();
        self.pipe.end(code, message);
        self.timer = Some(Box::pin(sleep(LINGER)));
    }

    /// Lets go of the mailbox, once.
    fn detach(&mut self) {
        if let Some((device, session)) = self.attached.take() {
            self.shared.door.detach(device, session);
        }
        self.outbox.close();
    }
}

impl<D: Door, P: Pipe> Future for Link<D, P> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.outbox.register(cx.waker());
        self.pipe.begin_turn(cx);
        let turn = self.turn(cx);
        if turn.is_pending() {
            self.pipe.end_turn(cx);
        }
        turn
    }
}

impl<D: Door, P: Pipe> Drop for Link<D, P> {
    fn drop(&mut self) {
        self.detach();
        self.count_traffic();
        self.meters().ended(self.reason);
    }
}

/// Ticks of silence that are borne: a tick is a second, and a part of one counts.
fn silence_ticks(silence: Duration) -> u32 {
    u32::try_from(silence.as_millis().div_ceil(1_000)).unwrap_or(u32::MAX)
}

fn attach_request(
    session: SessionId,
    hello: &Hello,
    carrier: Carrier,
    settings: &LinkSettings,
) -> AttachRequest {
    let window = hello.window.unwrap_or(settings.window_default);
    let most = settings.window_max.clamp(WINDOW_MIN, WINDOW_MAX);
    AttachRequest {
        session,
        instance: u128::from_be_bytes(hello.instance.0),
        attempt: hello.attempt,
        window: window.clamp(WINDOW_MIN, most),
        min_urgency: hello.min_urgency.map_or(Urgency::VeryLow, urgency_inside),
        seen: hello
            .seen
            .iter()
            .map(|seen| (PingId(seen.id.0), verdict_inside(seen.verdict)))
            .collect(),
        carrier: carrier.name(),
        agent: hello.agent.as_deref().map(Arc::from),
    }
}

fn verdict_inside(verdict: bellwire_protocol::Verdict) -> Verdict {
    match verdict {
        bellwire_protocol::Verdict::Acknowledged => Verdict::Acknowledged,
        bellwire_protocol::Verdict::Declined => Verdict::Declined,
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

fn urgency_outside(urgency: Urgency) -> bellwire_protocol::Urgency {
    match urgency {
        Urgency::VeryLow => bellwire_protocol::Urgency::VeryLow,
        Urgency::Low => bellwire_protocol::Urgency::Low,
        Urgency::Normal => bellwire_protocol::Urgency::Normal,
        Urgency::High => bellwire_protocol::Urgency::High,
    }
}

fn shared_notify(notification: &Notification) -> Result<SharedNotify, DecodeError> {
    SharedNotify::new(
        Id(notification.ping.0),
        notification.accepted_ms,
        notification.expires_ms,
        urgency_outside(notification.urgency),
        notification.content.clone(),
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::delivery::{AppId, Hold, WireSlot};
    use crate::transport::admission::Admission;
    use bellwire_protocol::{Content, Decoded, DeviceFrame};
    use futures_util::task::noop_waker_ref;
    use std::sync::Mutex;

    /// A runtime that lets everybody in and counts.
    #[derive(Clone, Default)]
    struct Desk(Arc<Mutex<Vec<&'static str>>>);

    impl Desk {
        fn note(&self, what: &'static str) {
            self.0.lock().unwrap().push(what);
        }
    }

    impl Door for Desk {
        type Proof = ();

        fn link_settings(&self) -> Arc<LinkSettings> {
            Arc::new(LinkSettings::default())
        }
        fn now_ms(&self) -> u64 {
            1
        }
        fn next_session(&self) -> SessionId {
            SessionId(1)
        }
        async fn authenticate(&self, _: DeviceId, _: Identity<'_>) -> Result<(), WhoError> {
            Ok(())
        }
        fn attach(&self, (): (), request: AttachRequest, outlet: Arc<dyn Outlet>) {
            self.note("attach");
            let window = request.window;
            outlet.push(Out::Welcome { pending: 0, window });
        }
        fn detach(&self, _: DeviceId, _: SessionId) {
            self.note("detach");
        }
        fn acknowledge(&self, _: DeviceId, _: SessionId, _: Acknowledged) {
            self.note("acknowledge");
        }
        fn decline(&self, _: DeviceId, _: SessionId, _: PingId) {
            self.note("decline");
        }
        fn presence(&self, _: DeviceId, _: SessionId, _: bool) {
            self.note("presence");
        }
        async fn subscribe(
            &self,
            _: DeviceId,
            join: Vec<String>,
            _: Vec<String>,
        ) -> Result<Option<Vec<String>>, RuntimeError> {
            self.note("subscribe");
            Ok(Some(join))
        }
    }

    /// A pipe in the test's hands. It never wakes anybody: the test polls.
    #[derive(Default)]
    struct Hose {
        incoming: VecDeque<DeviceFrame>,
        queued: Vec<Vec<u8>>,
        written: Vec<ServerFrame>,
        blocked: bool,
        sent: u64,
        heard: u64,
        ended: Option<Code>,
    }

    impl Pipe for Hose {
        const CARRIER: Carrier = Carrier::Quic;

        fn codec(&self) -> Codec {
            Codec::Cbor
        }
        fn poll_receive(&mut self, _: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
            match self.incoming.pop_front() {
                None => Poll::Pending,
                Some(frame) => Poll::Ready(Ok(Some(Codec::Cbor.encode_device(&frame).into()))),
            }
        }
        fn queue(&mut self, head: &[u8], tail: &[u8]) {
            self.queued.push([head, tail].concat());
        }
        fn queued(&self) -> usize {
            self.queued.iter().map(Vec::len).sum()
        }
        fn poll_send(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Broken>> {
            if self.blocked && !self.queued.is_empty() {
                return Poll::Pending;
            }
            for frame in self.queued.drain(..) {
                let Ok(Decoded::Frame(frame)) = Codec::Cbor.decode_server(&frame) else {
                    panic!("a frame")
                };
                self.written.push(frame);
                self.sent += 1;
            }
            Poll::Ready(Ok(()))
        }
        fn traffic(&self) -> Traffic {
            Traffic {
                received: 0,
                sent: self.sent,
            }
        }
        fn heard_of_peer(&self) -> Option<u64> {
            Some(self.heard)
        }
        fn end(&mut self, code: Code, _: &str) {
            self.ended = Some(code);
        }
        fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<()> {
            self.poll_send(cx).map(drop)
        }
    }

    type TestLink = Pin<Box<Link<Desk, Hose>>>;

    fn link() -> (Desk, TestLink) {
        let desk = Desk::default();
        let shared = Arc::new(Shared {
            door: desk.clone(),
            wheel: Arc::new(Wheel::new()),
            quic: Meters::new(Carrier::Quic),
            websocket: Meters::new(Carrier::WebSocket),
        });
        let peer: SocketAddr = "192.0.2.1:9".parse().unwrap();
        let knock = Admission::new(false).knock(peer.ip(), &LinkSettings::default());
        let deadline = Box::pin(sleep(Duration::from_secs(10)));
        let link = Link::new(shared, Hose::default(), knock.ok().unwrap(), deadline, peer);
        (desk, Box::pin(link))
    }

    #[test]
    fn a_device_is_granted_the_window_that_it_asks_for_within_what_is_set() {
        let settings = LinkSettings {
            window_default: 8,
            window_max: 64,
            ..LinkSettings::default()
        };
        let granted = |window| {
            let hello = Hello {
                device: Id([1; 16]),
                secret: Some("s".into()),
                instance: Id([2; 16]),
                attempt: 1,
                seen: Vec::new(),
                window,
                min_urgency: None,
                agent: None,
            };
            attach_request(SessionId(1), &hello, Carrier::Quic, &settings).window
        };
        assert_eq!(granted(None), 8);
        assert_eq!(granted(Some(40)), 40);
        assert_eq!(granted(Some(256)), 64);
        assert_eq!(granted(Some(0)), 1);
    }

    fn attached() -> (Desk, TestLink) {
        let (desk, mut link) = link();
        link.pipe.incoming.push_back(DeviceFrame::Hello(Hello {
            device: Id([1; 16]),
            secret: Some("s".into()),
            instance: Id([2; 16]),
            attempt: 1,
            seen: Vec::new(),
            window: None,
            min_urgency: None,
            agent: None,
        }));
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.written.len(), 1, "the welcome");
        assert!(link.timer.is_none() && link.knock.is_none() && link.proving.is_none());
        link.pipe.written.clear();
        (desk, link)
    }

    fn poll(link: &mut TestLink) -> Poll<()> {
        link.as_mut()
            .poll(&mut Context::from_waker(noop_waker_ref()))
    }

    fn large(seq: u64) -> Out {
        let content = Content {
            body: Some("x".repeat(QUEUED_HIGH_BYTES / 2)),
            ..Content::default()
        };
        Out::Send {
            seq,
            redelivered: false,
            notification: Arc::new(Notification {
                ping: PingId([7; 16]),
                app: AppId::DEFAULT,
                accepted_ms: 0,
                expires_ms: 1_000,
                urgency: Urgency::Normal,
                collapse: None,
                size: 0,
                transient: false,
                shared: false,
                content: content.to_cbor().into(),
                wire: WireSlot::default(),
                hold: Hold::default(),
            }),
        }
    }

    fn pass(link: &TestLink, ticks: u32) {
        (0..ticks).for_each(|_| link.shared.wheel.advance());
    }

    #[tokio::test]
    async fn words_that_came_while_the_pipe_was_full_are_sent_when_it_is_free() {
        let (_desk, mut link) = attached();
        link.pipe.blocked = true;
        (1..=2).for_each(|seq| link.outbox.push(large(seq)));
        assert!(poll(&mut link).is_pending());
        assert!(link.pipe.queued() >= QUEUED_HIGH_BYTES && link.backlog.is_empty());
        (3..=6).for_each(|seq| link.outbox.push(large(seq)));
        assert!(poll(&mut link).is_pending());
        link.pipe.blocked = false;
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.written.len(), 6);
    }

    #[tokio::test]
    async fn what_is_encoded_ahead_of_a_full_pipe_is_bounded() {
        let (_desk, mut link) = attached();
        link.pipe.blocked = true;
        (1..=100).for_each(|seq| link.outbox.push(large(seq)));
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.queued.len(), 2);
    }

    #[tokio::test]
    async fn frames_are_taken_in_turns_and_surplus_answers_count_as_said() {
        let (_desk, mut link) = attached();
        link.pipe.blocked = true;
        let pings = (0..3 * FRAMES_PER_TURN).map(|_| DeviceFrame::Ping);
        link.pipe.incoming.extend(pings);
        for left in [2, 1, 0] {
            assert!(poll(&mut link).is_pending());
            assert_eq!(link.pipe.incoming.len(), left * FRAMES_PER_TURN);
        }
        assert_eq!(link.pipe.queued.len(), ANSWERS_WAITING_MAX as usize);
        link.pipe.blocked = false;
        assert!(poll(&mut link).is_pending());
        link.pipe.incoming.push_back(DeviceFrame::Ping);
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.written.len(), ANSWERS_WAITING_MAX as usize + 1);
    }

    #[tokio::test]
    async fn a_pipe_that_takes_nothing_for_the_write_deadline_is_given_up() {
        let (desk, mut link) = attached();
        link.pipe.blocked = true;
        link.outbox.push(large(1));
        assert!(poll(&mut link).is_pending());
        // The peer's transport lives: it acknowledges, but takes nothing.
        for _ in 0..29 {
            pass(&link, 1);
            link.pipe.heard += 1;
            assert!(poll(&mut link).is_pending());
            assert_eq!(link.pipe.ended, None);
        }
        pass(&link, 1);
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.ended, Some(Code::SlowReader));
        assert_eq!(desk.0.lock().unwrap().as_slice(), ["attach", "detach"]);
    }

    #[tokio::test]
    async fn a_transport_that_does_not_acknowledge_is_given_up_and_one_that_does_is_not() {
        for (hears, ended) in [(true, None), (false, Some(Code::SlowReader))] {
            let (_desk, mut link) = attached();
            link.outbox.push(large(1));
            assert!(poll(&mut link).is_pending());
            link.pipe.heard += u64::from(hears);
            pass(&link, 60);
            let _ = poll(&mut link);
            assert_eq!(link.pipe.ended, ended);
        }
    }

    #[tokio::test]
    async fn the_last_of_many_sends_counts_from_its_own_time() {
        let (_desk, mut link) = attached();
        link.outbox.push(large(1));
        assert!(poll(&mut link).is_pending());
        pass(&link, 25);
        link.pipe.heard += 1;
        link.outbox.push(large(2));
        assert!(poll(&mut link).is_pending());
        pass(&link, 29);
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.ended, None);
        pass(&link, 1);
        let _ = poll(&mut link);
        assert_eq!(link.pipe.ended, Some(Code::SlowReader));
    }

    #[tokio::test]
    async fn an_idle_link_holds_no_buffer_and_no_timer() {
        let (_desk, mut link) = attached();
        (1..=50).for_each(|seq| link.outbox.push(large(seq)));
        assert!(poll(&mut link).is_pending());
        assert_eq!(link.pipe.written.len(), 50);
        assert_eq!(link.backlog.capacity(), 0);
        assert_eq!(link.outbox.take_words().capacity(), 0);
        assert!(link.timer.is_none());
        // The task is this and what the carrier needs.
        assert!(
            size_of::<Link<Desk, ()>>() <= 512,
            "{}",
            size_of::<Link<Desk, ()>>()
        );
    }

    /// A pipe of no size, to weigh the link alone.
    impl Pipe for () {
        const CARRIER: Carrier = Carrier::Quic;
        fn codec(&self) -> Codec {
            Codec::Cbor
        }
        fn poll_receive(&mut self, _: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Broken>> {
            Poll::Pending
        }
        fn queue(&mut self, _: &[u8], _: &[u8]) {}
        fn queued(&self) -> usize {
            0
        }
        fn poll_send(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Broken>> {
            Poll::Pending
        }
        fn traffic(&self) -> Traffic {
            Traffic::default()
        }
        fn heard_of_peer(&self) -> Option<u64> {
            None
        }
        fn end(&mut self, _: Code, _: &str) {}
        fn poll_end(&mut self, _: &mut Context<'_>) -> Poll<()> {
            Poll::Pending
        }
    }

    #[tokio::test]
    async fn a_link_that_is_dropped_detaches_once() {
        let (desk, link) = attached();
        drop(link);
        assert_eq!(desk.0.lock().unwrap().as_slice(), ["attach", "detach"]);
        let (desk, mut link) = attached();
        link.outbox.push(Out::Close(Closing::Replaced));
        let _ = poll(&mut link);
        assert_eq!(link.pipe.ended, Some(Code::Replaced));
        drop(link);
        assert_eq!(desk.0.lock().unwrap().as_slice(), ["attach", "detach"]);
    }
}
