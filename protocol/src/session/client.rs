//! The device's side of a session: what a client says when, what it believes, and when it comes back.

use std::collections::VecDeque;

use crate::code::{Code, Retry};
use crate::codec::{DecodeError, Decoded};
use crate::frame::*;
use crate::id::Id;
use crate::limits::*;

/// The reason in the `decline` of a notification that arrived past its expiry.
pub const EXPIRED: &str = "expired";

/// The reason in the `decline` of a notification that the server took back before the app saw it. The server knows its outcome already;
/// the answer frees the place in the window.
pub const WITHDRAWN: &str = "withdrawn";

/// What a client has to do for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientAction {
    /// Send this frame.
    Send(DeviceFrame),
    /// The session stands.
    Attached(Welcome),
    /// Hand this to the app, then remember its id and verdict on disk, then tell
    /// [`ClientSession::handle_acknowledged`] or [`ClientSession::handle_declined`]. If an earlier session brought the same id
    /// and its callback still runs, let that one finish and use its verdict.
    Deliver(Notify),
    /// Take these off the screen.
    Withdraw(Vec<Id>),
    /// All topics that the device is a member of now.
    Subscribed(Vec<String>),
    /// Send what is waiting, then close the connection with this code.
    Close(Code),
    /// The session is over; come back or not. The last action of a session.
    Reconnect(Reconnect),
}

/// Whether and when to come back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reconnect {
    /// When.
    pub when: ReconnectWhen,
    /// Where, if not to the same place.
    pub endpoint: Option<String>,
    /// Why the session ended.
    pub why: SessionEnd,
}

/// When to connect again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReconnectWhen {
    /// Not by itself: the app or a person must change something first.
    Never,
    /// At a random moment of this range, in milliseconds from now.
    Within {
        /// Not before.
        min_ms: u64,
        /// Not after.
        max_ms: u64,
    },
    /// After `floor_ms` plus full jitter: a random time between 0 and [`backoff_ceiling_ms`] of the failures in a row.
    Backoff {
        /// Not before.
        floor_ms: u64,
    },
}

/// Why a session ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEnd {
    /// The app wanted it.
    Left,
    /// The server sent the device away.
    Goaway(GoawayReason),
    /// The server reported an error.
    Error {
        /// The code's name, perhaps of a later version.
        code: String,
        /// One sentence for the log.
        message: String,
    },
    /// The connection ended, with one of our close codes or none.
    Closed(Option<Code>),
    /// Nothing was heard of the server after a `ping`.
    Silence,
    /// No `welcome` came.
    NoWelcome,
    /// The server sent bytes that are no frame.
    Malformed(DecodeError),
    /// The server broke a rule of the session.
    Misbehaved(&'static str),
}

/// Ceiling of the full jitter before the next connection, in milliseconds, after this many failures in a row.
pub const fn backoff_ceiling_ms(failures: u32) -> u64 {
    let doublings = if failures < 32 { failures } else { 32 };
    let ceiling = BACKOFF_FIRST_MS << doublings;
    if ceiling < BACKOFF_MAX_MS {
        ceiling
    } else {
        BACKOFF_MAX_MS
    }
}

/// The client's session machine, one for each connection.
///
/// - [`handle_connected`](Self::handle_connected) on the carrier that won the race, and on no other: it says `hello`;
/// - [`handle_decoded`](Self::handle_decoded) with the codec's result for each frame;
/// - the app's verdicts, then [`flush`](Self::flush) once nothing more is at hand: verdicts that come together share a frame;
/// - [`handle_deadline`](Self::handle_deadline) when [`deadline_ms`](Self::deadline_ms) has come;
/// - [`handle_closed`](Self::handle_closed) when the connection is gone.
///
/// It ends with exactly one [`ClientAction::Reconnect`] and ignores everything after that.
#[derive(Debug)]
pub struct ClientSession {
    state: State,
    /// Interval that the app asked for, in milliseconds; the advice of the server bounds it.
    wanted_interval_ms: Option<u64>,
}

#[derive(Debug)]
enum State {
    Connecting {
        hello: Box<Hello>,
    },
    HelloSent {
        deadline_ms: u64,
    },
    Attached(Attached),
    Draining {
        attached: Attached,
        deadline_ms: u64,
        goaway: Goaway,
    },
    Over,
}

#[derive(Debug)]
struct Attached {
    welcome: Welcome,
    welcomed_at_ms: u64,
    interval_ms: u64,
    /// Number of the last `notify`.
    last_seq: u64,
    /// In the order of `seq`: those that wait for a verdict, or whose acknowledgement has not been sent.
    in_flight: VecDeque<InFlight>,
    /// Acknowledgements of what an earlier session brought.
    earlier: Vec<Id>,
    last_sent_ms: u64,
    /// When the `ping` was sent that nothing was heard since.
    pinged_at_ms: Option<u64>,
}

#[derive(Debug)]
struct InFlight {
    seq: u64,
    id: Id,
    acknowledged: bool,
}

impl ClientSession {
    /// A session about to connect. `keep_alive_s` is the interval that the app would like between signs of life; without it
    /// the longest advised one is taken, which costs the least battery.
    pub fn new(hello: Hello, keep_alive_s: Option<u32>) -> Self {
        let wanted_interval_ms = keep_alive_s.map(|seconds| u64::from(seconds) * 1_000);
        Self {
            state: State::Connecting {
                hello: Box::new(hello),
            },
            wanted_interval_ms,
        }
    }

    /// When [`handle_deadline`](Self::handle_deadline) wants to be called.
    pub fn deadline_ms(&self) -> Option<u64> {
        match &self.state {
            State::Connecting { .. } | State::Over => None,
            State::HelloSent { deadline_ms } => Some(*deadline_ms),
            State::Attached(attached) => Some(attached.deadline_ms()),
            State::Draining { deadline_ms, .. } => Some(*deadline_ms),
        }
    }

    /// Whether the session stands: verdicts and requests can be sent.
    pub fn is_attached(&self) -> bool {
        matches!(self.state, State::Attached(_) | State::Draining { .. })
    }

    /// Whether the last action was given.
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::Over)
    }

    /// How many notifications wait for the app's verdict, or for [`flush`](Self::flush).
    pub fn in_flight(&self) -> usize {
        match &self.state {
            State::Attached(attached) | State::Draining { attached, .. } => {
                attached.in_flight.len()
            }
            State::Connecting { .. } | State::HelloSent { .. } | State::Over => 0,
        }
    }

    /// The server's wall time as far as this side knows: what `welcome` said plus the monotonic time since.
    pub fn server_now_ms(&self, now_ms: u64) -> Option<u64> {
        match &self.state {
            State::Attached(attached) | State::Draining { attached, .. } => {
                Some(attached.server_now_ms(now_ms))
            }
            State::Connecting { .. } | State::HelloSent { .. } | State::Over => None,
        }
    }

    /// The connection stands, and this carrier won the race: say `hello`.
    pub fn handle_connected(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Connecting { hello } => {
                self.state = State::HelloSent {
                    deadline_ms: now_ms.saturating_add(WELCOME_TIMEOUT_MS),
                };
                actions.push(ClientAction::Send(DeviceFrame::Hello(*hello)));
            }
            other @ (State::HelloSent { .. }
            | State::Attached(_)
            | State::Draining { .. }
            | State::Over) => {
                self.state = other;
            }
        }
    }

    /// Takes what the codec made of a frame. `known` answers from the window of ids on disk: the verdict that was given before.
    pub fn handle_decoded(
        &mut self,
        decoded: Result<Decoded<ServerFrame>, DecodeError>,
        now_ms: u64,
        known: &dyn Fn(&Id) -> Option<Verdict>,
        actions: &mut Vec<ClientAction>,
    ) {
        match decoded {
            Ok(Decoded::Frame(frame)) => self.handle_frame(frame, now_ms, known, actions),
            Ok(Decoded::Skipped) => self.heard(),
            Err(error) => {
                let code = error.code();
                self.finish_closing(
                    code,
                    backoff(Retry::Later),
                    SessionEnd::Malformed(error),
                    actions,
                );
            }
        }
    }

    /// Takes a frame from the server. `known` as in [`handle_decoded`](Self::handle_decoded).
    pub fn handle_frame(
        &mut self,
        frame: ServerFrame,
        now_ms: u64,
        known: &dyn Fn(&Id) -> Option<Verdict>,
        actions: &mut Vec<ClientAction>,
    ) {
        self.heard();
        match (&mut self.state, frame) {
            (State::Over, _) => {}
            (_, ServerFrame::Error(error)) => self.handle_error(error, actions),
            (_, ServerFrame::Goaway(goaway)) => self.handle_goaway(goaway, now_ms, actions),
            (State::HelloSent { .. }, ServerFrame::Welcome(welcome)) => {
                self.state =
                    State::Attached(Attached::new(welcome, now_ms, self.wanted_interval_ms));
                actions.push(ClientAction::Attached(welcome));
            }
            (State::Connecting { .. }, _) => self.misbehaved("a frame before `hello`", actions),
            (State::HelloSent { .. }, _) => self.misbehaved("a frame before `welcome`", actions),
            (_, ServerFrame::Welcome(_)) => self.misbehaved("a second `welcome`", actions),
            (
                State::Attached(attached) | State::Draining { attached, .. },
                ServerFrame::Notify(notify),
            ) => match attached.handle_notify(notify, now_ms, known, actions) {
                Ok(()) => self.leave_if_done(now_ms, actions),
                Err(rule) => self.misbehaved(rule, actions),
            },
            (_, ServerFrame::Withdraw(withdraw)) => {
                actions.push(ClientAction::Withdraw(withdraw.ids))
            }
            (_, ServerFrame::Subscribed(topics)) => {
                actions.push(ClientAction::Subscribed(topics.topics))
            }
            (_, ServerFrame::Pong) => {}
        }
    }

    /// The app has this notification, and the disk its id. Answers false when there is no session to tell: then say it in
    /// `seen` of the next `hello`.
    pub fn handle_acknowledged(
        &mut self,
        id: Id,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        let (State::Attached(attached) | State::Draining { attached, .. }) = &mut self.state else {
            return false;
        };
        attached.acknowledge(id);
        if attached.earlier.len() == ACK_IDS_MAX {
            attached.flush(now_ms, actions);
        }
        true
    }

    /// The app cannot or will not use this notification. Answers false when there is no session to tell. A reason over 256
    /// bytes is cut.
    pub fn handle_declined(
        &mut self,
        id: Id,
        reason: impl Into<String>,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        let (State::Attached(attached) | State::Draining { attached, .. }) = &mut self.state else {
            return false;
        };
        attached.decline(id, reason.into(), now_ms, actions);
        true
    }

    /// Sends the acknowledgements that were gathered: one `ack up_to` as far as every verdict is given, one `ack ids` for those
    /// beyond. A draining session whose last verdict is sent says `bye`.
    pub fn flush(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        if let State::Attached(attached) | State::Draining { attached, .. } = &mut self.state {
            attached.flush(now_ms, actions);
        }
        self.leave_if_done(now_ms, actions);
    }

    /// Tells the server whether a person uses the app. Answers false when there is no session.
    pub fn send_presence(
        &mut self,
        state: PresenceState,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        self.request(DeviceFrame::Presence(Presence { state }), now_ms, actions)
    }

    /// Asks to become a member of topics, at most 100 in one request. Answers false when there is no session.
    pub fn subscribe(
        &mut self,
        topics: Vec<String>,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        self.request(DeviceFrame::Subscribe(Topics { topics }), now_ms, actions)
    }

    /// Asks to leave topics, at most 100 in one request. Answers false when there is no session.
    pub fn unsubscribe(
        &mut self,
        topics: Vec<String>,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        self.request(DeviceFrame::Unsubscribe(Topics { topics }), now_ms, actions)
    }

    /// From now on the app would like this interval between signs of life, in milliseconds; the advice of the server bounds it.
    /// A silence that lasts longer already ends at the next [`handle_deadline`](Self::handle_deadline).
    pub fn set_keep_alive_ms(&mut self, interval_ms: u64) {
        self.wanted_interval_ms = Some(interval_ms);
        if let State::Attached(attached) = &mut self.state {
            attached.interval_ms = attached.bounded(Some(interval_ms));
        }
    }

    /// Asks for a sign of life at once: after the machine woke up, or the network changed.
    pub fn probe(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        if let State::Attached(attached) = &mut self.state {
            attached.ping(now_ms, actions);
        }
    }

    /// Leaves in good order; the app wanted it.
    pub fn leave(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        self.flush(now_ms, actions);
        if self.is_attached() {
            actions.push(ClientAction::Send(DeviceFrame::Bye));
        }
        self.finish_closing(Code::Bye, ReconnectWhen::Never, SessionEnd::Left, actions);
    }

    /// The connection is gone; `close` is the code that came with it, if it is one of ours.
    pub fn handle_closed(&mut self, close: Option<Code>, actions: &mut Vec<ClientAction>) {
        let over = std::mem::replace(&mut self.state, State::Over);
        let reconnect = match (over, close) {
            (State::Over, _) => return,
            (State::Draining { goaway, .. }, _) => after_goaway(goaway),
            // The frames before the close may have been lost; its code says the same.
            (_, Some(code)) => after_code(code, SessionEnd::Closed(close)),
            (_, None) => Reconnect {
                when: backoff(Retry::Now),
                endpoint: None,
                why: SessionEnd::Closed(None),
            },
        };
        actions.push(ClientAction::Reconnect(reconnect));
    }

    /// The time has come, or not yet: no `welcome`, time for a `ping`, no answer to it, time to leave a draining server.
    pub fn handle_deadline(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        match &mut self.state {
            State::HelloSent { deadline_ms } if now_ms >= *deadline_ms => {
                self.finish_closing(
                    Code::Silence,
                    backoff(Retry::Later),
                    SessionEnd::NoWelcome,
                    actions,
                );
            }
            State::Attached(attached) if now_ms >= attached.deadline_ms() => {
                if attached.pinged_at_ms.is_some() {
                    self.finish_closing(
                        Code::Silence,
                        backoff(Retry::Now),
                        SessionEnd::Silence,
                        actions,
                    );
                } else {
                    attached.ping(now_ms, actions);
                }
            }
            State::Draining {
                attached,
                deadline_ms,
                ..
            } if now_ms >= *deadline_ms => {
                attached.flush(now_ms, actions);
                self.say_farewell(actions);
            }
            State::Connecting { .. }
            | State::HelloSent { .. }
            | State::Attached(_)
            | State::Draining { .. }
            | State::Over => {}
        }
    }

    fn request(
        &mut self,
        frame: DeviceFrame,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) -> bool {
        let State::Attached(attached) = &mut self.state else {
            return false;
        };
        attached.send(frame, now_ms, actions);
        true
    }

    fn heard(&mut self) {
        if let State::Attached(attached) = &mut self.state {
            attached.pinged_at_ms = None;
        }
    }

    fn handle_error(&mut self, error: ErrorFrame, actions: &mut Vec<ClientAction>) {
        let known = error.known_code();
        let why = SessionEnd::Error {
            code: error.code,
            message: error.message,
        };
        let when = match known {
            Some(Code::DuplicateDevice) => ReconnectWhen::Backoff {
                floor_ms: REPLACED_AWAY_MIN_MS,
            },
            _ => backoff(error.retry),
        };
        // The server closes; answering with its own code tells its log nothing new.
        self.finish_closing(Code::Bye, when, why, actions);
    }

    fn handle_goaway(&mut self, goaway: Goaway, now_ms: u64, actions: &mut Vec<ClientAction>) {
        let stays = matches!(goaway.reason, GoawayReason::Drain | GoawayReason::Upgrade);
        match std::mem::replace(&mut self.state, State::Over) {
            State::Attached(mut attached) if stays => {
                attached.flush(now_ms, actions);
                let deadline_ms = now_ms.saturating_add(FAREWELL_MS);
                self.state = State::Draining {
                    attached,
                    deadline_ms,
                    goaway,
                };
                self.leave_if_done(now_ms, actions);
            }
            State::Draining {
                attached,
                deadline_ms,
                ..
            } if stays => {
                self.state = State::Draining {
                    attached,
                    deadline_ms,
                    goaway,
                };
            }
            State::Over => {}
            State::Connecting { .. }
            | State::HelloSent { .. }
            | State::Attached(_)
            | State::Draining { .. } => {
                actions.push(ClientAction::Close(Code::Bye));
                actions.push(ClientAction::Reconnect(after_goaway(goaway)));
            }
        }
    }

    /// A draining session with nothing left to say leaves.
    fn leave_if_done(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        if let State::Draining { attached, .. } = &mut self.state
            && attached.in_flight.iter().all(|one| one.acknowledged)
        {
            attached.flush(now_ms, actions);
            self.say_farewell(actions);
        }
    }

    fn say_farewell(&mut self, actions: &mut Vec<ClientAction>) {
        match std::mem::replace(&mut self.state, State::Over) {
            State::Draining { goaway, .. } => {
                actions.push(ClientAction::Send(DeviceFrame::Bye));
                actions.push(ClientAction::Close(Code::Bye));
                actions.push(ClientAction::Reconnect(after_goaway(goaway)));
            }
            other @ (State::Connecting { .. }
            | State::HelloSent { .. }
            | State::Attached(_)
            | State::Over) => {
                self.state = other;
            }
        }
    }

    fn misbehaved(&mut self, rule: &'static str, actions: &mut Vec<ClientAction>) {
        self.finish_closing(
            Code::Malformed,
            backoff(Retry::Later),
            SessionEnd::Misbehaved(rule),
            actions,
        );
    }

    fn finish_closing(
        &mut self,
        code: Code,
        when: ReconnectWhen,
        why: SessionEnd,
        actions: &mut Vec<ClientAction>,
    ) {
        if self.is_over() {
            return;
        }
        self.state = State::Over;
        actions.push(ClientAction::Close(code));
        actions.push(ClientAction::Reconnect(Reconnect {
            when,
            endpoint: None,
            why,
        }));
    }
}

impl Attached {
    fn new(welcome: Welcome, now_ms: u64, wanted_interval_ms: Option<u64>) -> Self {
        let mut attached = Self {
            welcome,
            welcomed_at_ms: now_ms,
            interval_ms: 0,
            last_seq: 0,
            in_flight: VecDeque::new(),
            earlier: Vec::new(),
            last_sent_ms: now_ms,
            pinged_at_ms: None,
        };
        attached.interval_ms = attached.bounded(wanted_interval_ms);
        attached
    }

    /// An interval within the server's advice, in milliseconds.
    fn bounded(&self, wanted_interval_ms: Option<u64>) -> u64 {
        let KeepAlive { min_s, max_s } = self.welcome.keep_alive_s;
        // The codec makes sure of 1 <= min <= max; a caller that built the frame by itself must not make us panic.
        let longest = u64::from(max_s.max(1)) * 1_000;
        let shortest = (u64::from(min_s.max(1)) * 1_000).min(longest);
        wanted_interval_ms
            .unwrap_or(longest)
            .clamp(shortest, longest)
    }

    fn deadline_ms(&self) -> u64 {
        match self.pinged_at_ms {
            Some(pinged_at_ms) => pinged_at_ms.saturating_add(PONG_TIMEOUT_MS),
            None => self.last_sent_ms.saturating_add(self.interval_ms),
        }
    }

    fn server_now_ms(&self, now_ms: u64) -> u64 {
        self.welcome
            .now_ms
            .saturating_add(now_ms.saturating_sub(self.welcomed_at_ms))
    }

    /// The rules of a `notify`, in this order: numbers rise by one; the window holds; a repeat gets its verdict again, without
    /// the app; what has expired is declined; the rest is for the app.
    fn handle_notify(
        &mut self,
        notify: Notify,
        now_ms: u64,
        known: &dyn Fn(&Id) -> Option<Verdict>,
        actions: &mut Vec<ClientAction>,
    ) -> Result<(), &'static str> {
        // A gap would make `ack up_to` acknowledge what never arrived.
        if notify.seq != self.last_seq + 1 {
            return Err("`seq` does not rise by one");
        }
        if self.in_flight.len() >= usize::from(self.welcome.window) {
            return Err("more in flight than the window");
        }
        self.last_seq = notify.seq;
        let id = notify.id;
        self.in_flight.push_back(InFlight {
            seq: notify.seq,
            id,
            acknowledged: false,
        });
        match known(&id) {
            Some(Verdict::Acknowledged) => self.acknowledge(id),
            Some(Verdict::Declined) => {
                self.decline(id, "declined before".to_owned(), now_ms, actions)
            }
            None if self.server_now_ms(now_ms) >= notify.expires_ms => {
                self.decline(id, EXPIRED.to_owned(), now_ms, actions);
            }
            None => actions.push(ClientAction::Deliver(notify)),
        }
        Ok(())
    }

    fn acknowledge(&mut self, id: Id) {
        match self.in_flight.iter_mut().find(|one| one.id == id) {
            Some(one) => one.acknowledged = true,
            None => self.earlier.push(id),
        }
    }

    fn decline(
        &mut self,
        id: Id,
        mut reason: String,
        now_ms: u64,
        actions: &mut Vec<ClientAction>,
    ) {
        reason.truncate(reason.floor_char_boundary(REASON_BYTES_MAX));
        self.in_flight.retain(|one| one.id != id);
        self.send(
            DeviceFrame::Decline(Decline { id, reason }),
            now_ms,
            actions,
        );
    }

    fn flush(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        // `up_to` must not cover one that still waits for its verdict.
        let undecided = self
            .in_flight
            .iter()
            .find(|one| !one.acknowledged)
            .map_or(u64::MAX, |one| one.seq);
        let mut up_to = None;
        let mut ids = std::mem::take(&mut self.earlier);
        self.in_flight.retain(|one| {
            if one.acknowledged && one.seq < undecided {
                up_to = Some(one.seq);
            } else if one.acknowledged {
                ids.push(one.id);
            }
            !one.acknowledged
        });
        if let Some(seq) = up_to {
            self.send(DeviceFrame::Ack(Ack::UpTo(seq)), now_ms, actions);
        }
        for ids in ids.chunks(ACK_IDS_MAX) {
            self.send(DeviceFrame::Ack(Ack::Ids(ids.to_vec())), now_ms, actions);
        }
    }

    fn ping(&mut self, now_ms: u64, actions: &mut Vec<ClientAction>) {
        if self.pinged_at_ms.is_none() {
            self.pinged_at_ms = Some(now_ms);
            self.send(DeviceFrame::Ping, now_ms, actions);
        }
    }

    fn send(&mut self, frame: DeviceFrame, now_ms: u64, actions: &mut Vec<ClientAction>) {
        // Whatever is sent shows the server that the device lives.
        self.last_sent_ms = now_ms;
        actions.push(ClientAction::Send(frame));
    }
}

const fn backoff(retry: Retry) -> ReconnectWhen {
    match retry {
        Retry::Never => ReconnectWhen::Never,
        Retry::Later => ReconnectWhen::Backoff {
            floor_ms: LATER_MIN_MS,
        },
        // Still with jitter: a server that breaks all links at once would get all devices back at once.
        Retry::Now => ReconnectWhen::Backoff { floor_ms: 0 },
    }
}

fn after_goaway(goaway: Goaway) -> Reconnect {
    let (min_ms, max_ms) = (
        u64::from(goaway.reconnect_ms.min_ms),
        u64::from(goaway.reconnect_ms.max_ms),
    );
    let when = match goaway.reason {
        GoawayReason::Revoked => ReconnectWhen::Never,
        GoawayReason::Replaced => {
            let min_ms = min_ms.max(REPLACED_AWAY_MIN_MS);
            ReconnectWhen::Within {
                min_ms,
                max_ms: max_ms.max(min_ms),
            }
        }
        GoawayReason::Drain | GoawayReason::Upgrade => ReconnectWhen::Within { min_ms, max_ms },
    };
    Reconnect {
        when,
        endpoint: goaway.endpoint,
        why: SessionEnd::Goaway(goaway.reason),
    }
}

fn after_code(code: Code, why: SessionEnd) -> Reconnect {
    let when = if matches!(code, Code::Replaced | Code::DuplicateDevice) {
        ReconnectWhen::Backoff {
            floor_ms: REPLACED_AWAY_MIN_MS,
        }
    } else if code == Code::Bye {
        // A server that closes in good order has no complaint.
        backoff(Retry::Now)
    } else {
        backoff(code.retry())
    };
    Reconnect {
        when,
        endpoint: None,
        why,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::content::Content;

    fn hello() -> Hello {
        Hello {
            device: Id([1; 16]),
            secret: None,
            instance: Id([2; 16]),
            attempt: 1,
            seen: Vec::new(),
            window: Some(3),
            min_urgency: None,
            agent: None,
        }
    }

    fn welcome() -> Welcome {
        let keep_alive_s = (20, 120).into();
        Welcome {
            session: 7,
            pending: 0,
            window: 3,
            max_bytes: 4_096,
            keep_alive_s,
            now_ms: 1_000_000,
        }
    }

    fn id(n: u64) -> Id {
        Id([n as u8; 16])
    }

    fn notify(seq: u64) -> Notify {
        Notify {
            seq,
            redelivered: false,
            id: id(seq),
            accepted_ms: 1_000_000,
            expires_ms: 1_060_000,
            urgency: Urgency::Normal,
            content: Content::default(),
        }
    }

    fn told(action: &ClientAction) -> String {
        match action {
            ClientAction::Send(DeviceFrame::Ack(Ack::UpTo(seq))) => format!("ack up to {seq}"),
            ClientAction::Send(DeviceFrame::Ack(Ack::Ids(ids))) => {
                format!("ack {:?}", ids.iter().map(|id| id.0[0]).collect::<Vec<_>>())
            }
            ClientAction::Send(DeviceFrame::Decline(decline)) => {
                format!("decline {}: {}", decline.id.0[0], decline.reason)
            }
            ClientAction::Send(frame) => format!("send {}", frame.name()),
            ClientAction::Attached(_) => "attached".into(),
            ClientAction::Deliver(notify) => format!("deliver {}", notify.seq),
            ClientAction::Withdraw(ids) => format!("withdraw {}", ids.len()),
            ClientAction::Subscribed(topics) => format!("subscribed {}", topics.join(" ")),
            ClientAction::Close(code) => format!("close {code}"),
            ClientAction::Reconnect(reconnect) => match reconnect.when {
                ReconnectWhen::Never => "reconnect never".into(),
                ReconnectWhen::Within { min_ms, max_ms } => {
                    format!("reconnect within {min_ms}..{max_ms}")
                }
                ReconnectWhen::Backoff { floor_ms } => {
                    format!("reconnect by backoff from {floor_ms}")
                }
            },
        }
    }

    /// A session under test at a settable time, with what it remembers of earlier ones.
    struct Story {
        session: ClientSession,
        actions: Vec<ClientAction>,
        known: Vec<(Id, Verdict)>,
        now_ms: u64,
    }

    impl Story {
        fn attached() -> Self {
            let mut story = Self::connecting(None);
            story.connected();
            story.frame(ServerFrame::Welcome(welcome()));
            story.expect(&["send hello", "attached"]);
            story
        }

        fn connecting(keep_alive_s: Option<u32>) -> Self {
            let session = ClientSession::new(hello(), keep_alive_s);
            Self {
                session,
                actions: Vec::new(),
                known: Vec::new(),
                now_ms: 5_000,
            }
        }

        fn connected(&mut self) {
            self.session
                .handle_connected(self.now_ms, &mut self.actions);
        }

        fn frame(&mut self, frame: ServerFrame) {
            let known = |id: &Id| {
                self.known
                    .iter()
                    .find(|(known, _)| known == id)
                    .map(|(_, verdict)| *verdict)
            };
            self.session
                .handle_frame(frame, self.now_ms, &known, &mut self.actions);
        }

        fn notify(&mut self, seqs: impl IntoIterator<Item = u64>) {
            seqs.into_iter()
                .for_each(|seq| self.frame(ServerFrame::Notify(notify(seq))));
        }

        fn acknowledge(&mut self, n: u64) {
            assert!(
                self.session
                    .handle_acknowledged(id(n), self.now_ms, &mut self.actions)
            );
        }

        fn flush(&mut self) {
            self.session.flush(self.now_ms, &mut self.actions);
        }

        fn goaway(&mut self, reason: GoawayReason) {
            let reconnect_ms = (100, 2_000).into();
            self.frame(ServerFrame::Goaway(Goaway {
                reason,
                reconnect_ms,
                endpoint: None,
            }));
        }

        fn advance(&mut self, ms: u64) {
            self.now_ms += ms;
            self.session.handle_deadline(self.now_ms, &mut self.actions);
        }

        #[track_caller]
        fn expect(&mut self, expected: &[&str]) {
            let actions: Vec<_> = self.actions.drain(..).map(|action| told(&action)).collect();
            assert_eq!(actions, expected);
        }
    }

    #[test]
    fn verdicts_that_come_together_share_one_cumulative_ack() {
        let mut story = Story::attached();
        story.notify(1..=3);
        story.expect(&["deliver 1", "deliver 2", "deliver 3"]);
        for n in [2, 1, 3] {
            story.acknowledge(n);
        }
        story.flush();
        story.expect(&["ack up to 3"]);
        assert_eq!(story.session.in_flight(), 0);
        story.flush();
        story.expect(&[]);
    }

    #[test]
    fn an_ack_never_covers_one_that_waits_for_its_verdict() {
        let mut story = Story::attached();
        story.notify(1..=3);
        story.acknowledge(1);
        story.acknowledge(3);
        story.flush();
        story.expect(&[
            "deliver 1",
            "deliver 2",
            "deliver 3",
            "ack up to 1",
            "ack [3]",
        ]);
        // 3 is out of flight, so the server may go on.
        story.notify([4, 5]);
        story.acknowledge(2);
        story.flush();
        story.expect(&["deliver 4", "deliver 5", "ack up to 2"]);
    }

    #[test]
    fn a_decline_is_sent_at_once_and_later_acks_pass_over_it() {
        let mut story = Story::attached();
        story.notify(1..=2);
        story
            .session
            .handle_declined(id(1), "x".repeat(300), story.now_ms, &mut story.actions);
        story.acknowledge(2);
        story.flush();
        story.expect(&[
            "deliver 1",
            "deliver 2",
            &format!("decline 1: {}", "x".repeat(256)),
            "ack up to 2",
        ]);
    }

    #[test]
    fn a_repeat_gets_its_verdict_again_without_the_app_even_past_its_expiry() {
        let mut story = Story::attached();
        story.known = vec![
            (id(1), Verdict::Acknowledged),
            (id(2), Verdict::Declined),
            (id(3), Verdict::Acknowledged),
        ];
        story.notify(1..=2);
        story.now_ms += 100_000;
        story.notify([3]);
        story.flush();
        story.expect(&["decline 2: declined before", "ack up to 3"]);
    }

    #[test]
    fn what_arrives_expired_by_the_servers_clock_is_declined() {
        let mut story = Story::attached();
        story.now_ms += 59_999;
        story.notify([1]);
        story.now_ms += 1;
        story.notify([2]);
        story.expect(&["deliver 1", "decline 2: expired"]);
    }

    #[test]
    fn verdicts_of_an_earlier_sessions_callbacks_are_told_by_id() {
        let mut story = Story::attached();
        story.acknowledge(77);
        story.flush();
        story.expect(&["ack [77]"]);
    }

    #[test]
    fn without_a_session_a_verdict_is_left_to_the_next_hello() {
        let mut story = Story::connecting(None);
        assert!(
            !story
                .session
                .handle_acknowledged(id(1), 0, &mut story.actions)
        );
        assert!(
            !story
                .session
                .handle_declined(id(1), "no", 0, &mut story.actions)
        );
        assert!(!story.session.subscribe(vec![], 0, &mut story.actions));
        story.expect(&[]);
    }

    #[test]
    fn a_gap_in_seq_ends_the_session() {
        let mut story = Story::attached();
        story.notify([1, 3]);
        story.expect(&[
            "deliver 1",
            "close malformed",
            "reconnect by backoff from 2000",
        ]);
        story.notify([4]);
        story.expect(&[]);
    }

    #[test]
    fn a_server_that_overruns_the_window_is_left() {
        let mut story = Story::attached();
        story.notify(1..=4);
        story.expect(&[
            "deliver 1",
            "deliver 2",
            "deliver 3",
            "close malformed",
            "reconnect by backoff from 2000",
        ]);
    }

    #[test]
    fn keep_alive_pings_at_the_longest_interval_and_only_when_nothing_else_was_said() {
        let mut story = Story::attached();
        story.advance(119_999);
        story.expect(&[]);
        story.advance(1);
        story.expect(&["send ping"]);
        story.frame(ServerFrame::Pong);
        story.advance(60_000);
        story
            .session
            .send_presence(PresenceState::Active, story.now_ms, &mut story.actions);
        story.advance(119_999);
        story.expect(&["send presence"]);
        story.advance(1);
        story.expect(&["send ping"]);
    }

    #[test]
    fn a_wanted_interval_stays_within_the_advice() {
        for (wanted, expected) in [
            (Some(45), 45_000),
            (Some(1), 20_000),
            (Some(9_999), 120_000),
            (None, 120_000),
        ] {
            let mut story = Story::connecting(wanted);
            story.connected();
            story.frame(ServerFrame::Welcome(welcome()));
            assert_eq!(story.session.deadline_ms(), Some(story.now_ms + expected));
        }
    }

    #[test]
    fn a_server_that_does_not_answer_a_ping_is_gone() {
        let mut story = Story::attached();
        story.session.probe(story.now_ms, &mut story.actions);
        story.session.probe(story.now_ms, &mut story.actions);
        story.advance(PONG_TIMEOUT_MS - 1);
        story.expect(&["send ping"]);
        story.advance(1);
        story.expect(&["close silence", "reconnect by backoff from 0"]);
    }

    #[test]
    fn any_frame_is_a_sign_of_life() {
        let mut story = Story::attached();
        story.session.probe(story.now_ms, &mut story.actions);
        story.notify([1]);
        story.advance(PONG_TIMEOUT_MS);
        story.expect(&["send ping", "deliver 1"]);
    }

    #[test]
    fn no_welcome_ends_the_session() {
        let mut story = Story::connecting(None);
        story.connected();
        story.advance(WELCOME_TIMEOUT_MS);
        story.expect(&[
            "send hello",
            "close silence",
            "reconnect by backoff from 2000",
        ]);
    }

    #[test]
    fn a_drained_client_finishes_its_verdicts_says_bye_and_returns_when_told() {
        let mut story = Story::attached();
        story.notify([1]);
        story.goaway(GoawayReason::Drain);
        story.expect(&["deliver 1"]);
        story.acknowledge(1);
        story.flush();
        story.expect(&[
            "ack up to 1",
            "send bye",
            "close bye",
            "reconnect within 100..2000",
        ]);
    }

    #[test]
    fn a_drained_client_with_nothing_in_flight_leaves_at_once() {
        let mut story = Story::attached();
        story.goaway(GoawayReason::Drain);
        story.expect(&["send bye", "close bye", "reconnect within 100..2000"]);
    }

    #[test]
    fn a_drained_client_does_not_wait_for_ever_for_the_app() {
        let mut story = Story::attached();
        story.notify([1]);
        story.goaway(GoawayReason::Upgrade);
        story.advance(FAREWELL_MS);
        story.expect(&[
            "deliver 1",
            "send bye",
            "close bye",
            "reconnect within 100..2000",
        ]);
    }

    #[test]
    fn a_drained_client_whose_connection_breaks_still_returns_when_told() {
        let mut story = Story::attached();
        story.notify([1]);
        story.goaway(GoawayReason::Drain);
        story.session.handle_closed(None, &mut story.actions);
        story.expect(&["deliver 1", "reconnect within 100..2000"]);
    }

    #[test]
    fn a_replaced_client_stays_away_for_a_minute_and_a_revoked_one_for_ever() {
        let mut story = Story::attached();
        story.goaway(GoawayReason::Replaced);
        story.expect(&["close bye", "reconnect within 60000..60000"]);
        let mut story = Story::attached();
        story.goaway(GoawayReason::Revoked);
        story.expect(&["close bye", "reconnect never"]);
    }

    #[test]
    fn errors_say_when_to_return() {
        for (code, expected) in [
            (Code::Unauthorized, "reconnect never"),
            (Code::StaleAttempt, "reconnect by backoff from 2000"),
            (Code::DuplicateDevice, "reconnect by backoff from 60000"),
            (Code::Silence, "reconnect by backoff from 0"),
        ] {
            let mut story = Story::connecting(None);
            story.connected();
            story.frame(ServerFrame::Error(ErrorFrame::new(code, "so")));
            story.expect(&["send hello", "close bye", expected]);
            // The same, when only the close code arrived.
            let mut story = Story::attached();
            story.session.handle_closed(Some(code), &mut story.actions);
            story.expect(&[expected]);
        }
        // A code of a later version: its retry counts.
        let error = ErrorFrame {
            code: "moon_phase".into(),
            message: "new".into(),
            retry: Retry::Never,
        };
        let mut story = Story::attached();
        story.frame(ServerFrame::Error(error));
        story.expect(&["close bye", "reconnect never"]);
    }

    #[test]
    fn a_lost_connection_backs_off_and_leaving_ends_it() {
        let mut story = Story::attached();
        story.session.handle_closed(None, &mut story.actions);
        story.session.handle_closed(None, &mut story.actions);
        story.expect(&["reconnect by backoff from 0"]);
        let mut story = Story::attached();
        story.notify([1]);
        story.acknowledge(1);
        story.session.leave(story.now_ms, &mut story.actions);
        story.expect(&[
            "deliver 1",
            "ack up to 1",
            "send bye",
            "close bye",
            "reconnect never",
        ]);
    }

    #[test]
    fn frames_out_of_place_end_the_session() {
        let mut story = Story::connecting(None);
        story.connected();
        story.notify([1]);
        story.expect(&[
            "send hello",
            "close malformed",
            "reconnect by backoff from 2000",
        ]);
        let mut story = Story::attached();
        story.frame(ServerFrame::Welcome(welcome()));
        story.expect(&["close malformed", "reconnect by backoff from 2000"]);
    }

    #[test]
    fn hello_is_said_once() {
        let mut story = Story::connecting(None);
        story.connected();
        story.connected();
        story.expect(&["send hello"]);
    }

    #[test]
    fn backoff_doubles_up_to_its_ceiling() {
        assert_eq!(
            [0, 1, 2, 8, 9, 40, u32::MAX].map(backoff_ceiling_ms),
            [1_000, 2_000, 4_000, 256_000, 300_000, 300_000, 300_000]
        );
    }
}
