//! The server's side of a session: what a device may say when.

use crate::code::{Code, Retry};
use crate::codec::{DecodeError, Decoded};
use crate::frame::{
    Ack, DeviceFrame, ErrorFrame, Goaway, GoawayReason, Hello, PresenceState, ServerFrame, Welcome,
};
use crate::id::Id;
use crate::limits::{FRAMES_BEFORE_WELCOME_MAX, GOAWAY_GRACE_MS};

/// What the server has to do for a session.
#[expect(
    clippy::large_enum_variant,
    reason = "only a few exist at a time, in a buffer that is used again"
)]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerAction {
    /// Authenticate the device and ask its mailbox to attach; answer with [`ServerSession::handle_welcome`] or
    /// [`ServerSession::handle_refused`]. Comes once.
    Attach(Box<Hello>),
    /// The device has these.
    Acknowledge(Ack),
    /// The device cannot or will not use this one.
    Decline {
        /// Which one.
        id: Id,
        /// Why, in the device's words.
        reason: String,
    },
    /// Whether a person uses the app.
    Presence(PresenceState),
    /// Make the device a member of these topics as far as its app allows, and send `subscribed` with the full set.
    Subscribe(Vec<String>),
    /// End its membership of these, and send `subscribed` with the full set.
    Unsubscribe(Vec<String>),
    /// Send this frame.
    Send(ServerFrame),
    /// The device said `bye`: detach it now. A [`Close`](Self::Close) follows.
    Leave,
    /// Send what is waiting, then close the connection. The last action of a session.
    Close {
        /// Its numbers close the connection.
        code: Code,
        /// One sentence for logs and the close reason.
        message: String,
        /// When the device may come back.
        retry: Retry,
    },
}

/// The server's session machine, one for each connection.
///
/// Feed it whatever happens, then do what it says, in order:
///
/// - from the device: [`handle_decoded`](Self::handle_decoded) with the codec's result for each frame;
/// - from inside: [`handle_welcome`](Self::handle_welcome), [`handle_refused`](Self::handle_refused),
///   [`handle_sent`](Self::handle_sent), [`handle_goaway`](Self::handle_goaway), [`handle_failure`](Self::handle_failure);
/// - from the clock: [`handle_deadline`](Self::handle_deadline) when [`deadline_ms`](Self::deadline_ms) has come.
///
/// After `Close` it ignores everything. Silence is measured outside, for all connections together; how long is too long
/// says [`KeepAlive::silence_ms`](crate::KeepAlive::silence_ms), and the verdict comes in as a failure with [`Code::Silence`].
#[derive(Debug)]
pub struct ServerSession {
    state: State,
}

#[derive(Debug)]
enum State {
    AwaitingHello {
        deadline_ms: u64,
    },
    /// Between `hello` and the mailbox's answer. What the device says meanwhile waits here.
    Attaching {
        waiting: Vec<DeviceFrame>,
    },
    Attached {
        last_sent: u64,
    },
    /// `goaway` was said; verdicts still count.
    Draining {
        last_sent: u64,
        deadline_ms: u64,
        code: Code,
    },
    Closed,
}

impl ServerSession {
    /// A session whose connection stands. The device has until `hello_deadline_ms` for its `hello`: the moment the connection was
    /// accepted plus [`HELLO_TIMEOUT_MS`](crate::limits::HELLO_TIMEOUT_MS).
    pub const fn new(hello_deadline_ms: u64) -> Self {
        Self {
            state: State::AwaitingHello {
                deadline_ms: hello_deadline_ms,
            },
        }
    }

    /// When [`handle_deadline`](Self::handle_deadline) wants to be called. An attached session has no deadline, and costs no timer.
    pub const fn deadline_ms(&self) -> Option<u64> {
        match self.state {
            State::AwaitingHello { deadline_ms } | State::Draining { deadline_ms, .. } => {
                Some(deadline_ms)
            }
            State::Attaching { .. } | State::Attached { .. } | State::Closed => None,
        }
    }

    /// Whether the mailbox's answer was `welcome` and the session still stands.
    pub const fn is_attached(&self) -> bool {
        matches!(self.state, State::Attached { .. } | State::Draining { .. })
    }

    /// Whether the last action was given.
    pub const fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// Takes what the codec made of a frame.
    pub fn handle_decoded(
        &mut self,
        decoded: Result<Decoded<DeviceFrame>, DecodeError>,
        actions: &mut Vec<ServerAction>,
    ) {
        match decoded {
            Ok(Decoded::Frame(frame)) => self.handle_frame(frame, actions),
            Ok(Decoded::Skipped) => {}
            Err(error) => self.handle_decode_error(error, actions),
        }
    }

    /// Takes a frame from the device.
    pub fn handle_frame(&mut self, frame: DeviceFrame, actions: &mut Vec<ServerAction>) {
        match (&mut self.state, frame) {
            (State::Closed, _) => {}
            (State::AwaitingHello { .. }, DeviceFrame::Hello(hello)) => {
                self.state = State::Attaching {
                    waiting: Vec::new(),
                };
                actions.push(ServerAction::Attach(Box::new(hello)));
            }
            (State::AwaitingHello { .. }, DeviceFrame::Bye) | (_, DeviceFrame::Bye) => {
                actions.push(ServerAction::Leave);
                self.close(Code::Bye, String::new(), actions);
            }
            (State::AwaitingHello { .. }, frame) => {
                self.fail(
                    Code::HelloExpected,
                    format!("`{}` came before `hello`", frame.name()),
                    actions,
                );
            }
            (_, DeviceFrame::Hello(_)) => {
                self.fail(Code::SecondHello, "this session has said `hello`", actions)
            }
            (State::Attaching { .. }, DeviceFrame::Ack(Ack::UpTo(seq))) if seq > 0 => {
                self.fail_ack_ahead(seq, 0, actions)
            }
            (State::Attaching { waiting }, frame) => {
                if waiting.len() < FRAMES_BEFORE_WELCOME_MAX {
                    waiting.push(frame);
                } else {
                    let message =
                        format!("more than {FRAMES_BEFORE_WELCOME_MAX} frames before `welcome`");
                    self.fail(Code::FramesBeforeWelcome, message, actions);
                }
            }
            (
                State::Attached { last_sent } | State::Draining { last_sent, .. },
                DeviceFrame::Ack(Ack::UpTo(seq)),
            ) if seq > *last_sent => {
                let last_sent = *last_sent;
                self.fail_ack_ahead(seq, last_sent, actions);
            }
            (_, DeviceFrame::Ack(Ack::UpTo(0))) => {}
            (_, DeviceFrame::Ack(ack)) => actions.push(ServerAction::Acknowledge(ack)),
            (_, DeviceFrame::Decline(decline)) => {
                actions.push(ServerAction::Decline {
                    id: decline.id,
                    reason: decline.reason,
                });
            }
            (_, DeviceFrame::Ping) => actions.push(ServerAction::Send(ServerFrame::Pong)),
            (_, DeviceFrame::Presence(presence)) => {
                actions.push(ServerAction::Presence(presence.state))
            }
            (_, DeviceFrame::Subscribe(topics)) => {
                actions.push(ServerAction::Subscribe(topics.topics))
            }
            (_, DeviceFrame::Unsubscribe(topics)) => {
                actions.push(ServerAction::Unsubscribe(topics.topics))
            }
        }
    }

    /// Takes the codec's, or the frame reader's, complaint: the session ends.
    pub fn handle_decode_error(&mut self, error: DecodeError, actions: &mut Vec<ServerAction>) {
        self.fail(error.code(), error.to_string(), actions);
    }

    /// The device's mailbox attached this session. What the device said meanwhile is dealt with now, after the `welcome`.
    pub fn handle_welcome(&mut self, welcome: Welcome, actions: &mut Vec<ServerAction>) {
        let State::Attaching { waiting } = &mut self.state else {
            return;
        };
        let waiting = std::mem::take(waiting);
        self.state = State::Attached { last_sent: 0 };
        actions.push(ServerAction::Send(ServerFrame::Welcome(welcome)));
        for frame in waiting {
            self.handle_frame(frame, actions);
        }
    }

    /// The session is not attached: wrong credentials, a stale attempt, too many replacements, a store that cannot be read.
    pub fn handle_refused(
        &mut self,
        code: Code,
        message: impl Into<String>,
        actions: &mut Vec<ServerAction>,
    ) {
        self.fail(code, message, actions);
    }

    /// A `notify` with this number was handed to the transport. From now on it may be acknowledged.
    pub fn handle_sent(&mut self, seq: u64) {
        if let State::Attached { last_sent } | State::Draining { last_sent, .. } = &mut self.state {
            *last_sent = seq.max(*last_sent);
        }
    }

    /// Sends the device away in good order. Replaced and revoked sessions end at once; with `drain` and `upgrade` the device has
    /// [`GOAWAY_GRACE_MS`] for its last verdicts. Send it no more notifications.
    pub fn handle_goaway(&mut self, goaway: Goaway, now_ms: u64, actions: &mut Vec<ServerAction>) {
        let code = goaway.reason.code();
        let stays = matches!(goaway.reason, GoawayReason::Drain | GoawayReason::Upgrade);
        match self.state {
            State::Closed | State::Draining { .. } if stays => {}
            State::Closed => {}
            State::Attached { last_sent } if stays => {
                actions.push(ServerAction::Send(ServerFrame::Goaway(goaway)));
                let deadline_ms = now_ms.saturating_add(GOAWAY_GRACE_MS);
                self.state = State::Draining {
                    last_sent,
                    deadline_ms,
                    code,
                };
            }
            // Before the welcome there is nothing to wait for.
            State::AwaitingHello { .. }
            | State::Attaching { .. }
            | State::Attached { .. }
            | State::Draining { .. } => {
                actions.push(ServerAction::Send(ServerFrame::Goaway(goaway)));
                self.close(code, code.meaning(), actions);
            }
        }
    }

    /// Ends the session for a reason that was found outside: `slow_reader`, `silence`, `ack_timeout`, `store_unavailable`,
    /// `internal`.
    pub fn handle_failure(
        &mut self,
        code: Code,
        message: impl Into<String>,
        actions: &mut Vec<ServerAction>,
    ) {
        self.fail(code, message, actions);
    }

    /// The time has come, or not yet.
    pub fn handle_deadline(&mut self, now_ms: u64, actions: &mut Vec<ServerAction>) {
        match self.state {
            State::AwaitingHello { deadline_ms } if now_ms >= deadline_ms => {
                self.fail(
                    Code::HelloTimeout,
                    "no `hello` within the deadline",
                    actions,
                );
            }
            State::Draining {
                deadline_ms, code, ..
            } if now_ms >= deadline_ms => {
                self.close(code, code.meaning(), actions);
            }
            State::AwaitingHello { .. }
            | State::Attaching { .. }
            | State::Attached { .. }
            | State::Draining { .. }
            | State::Closed => {}
        }
    }

    fn fail_ack_ahead(&mut self, seq: u64, last_sent: u64, actions: &mut Vec<ServerAction>) {
        self.fail(
            Code::AckAhead,
            format!("`up_to` is {seq}, the last `seq` sent is {last_sent}"),
            actions,
        );
    }

    /// Says what is wrong, then closes.
    fn fail(&mut self, code: Code, message: impl Into<String>, actions: &mut Vec<ServerAction>) {
        if self.is_closed() {
            return;
        }
        let error = ErrorFrame::new(code, message);
        let message = error.message.clone();
        actions.push(ServerAction::Send(ServerFrame::Error(error)));
        self.close(code, message, actions);
    }

    fn close(&mut self, code: Code, message: impl Into<String>, actions: &mut Vec<ServerAction>) {
        self.state = State::Closed;
        actions.push(ServerAction::Close {
            code,
            message: message.into(),
            retry: code.retry(),
        });
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::codec::Codec;
    use crate::frame::{Decline, Presence, ReconnectRange, Topics};

    fn hello() -> DeviceFrame {
        DeviceFrame::Hello(Hello {
            device: Id([1; 16]),
            secret: Some("s".into()),
            instance: Id([2; 16]),
            attempt: 1,
            seen: Vec::new(),
            window: None,
            min_urgency: None,
            agent: None,
        })
    }

    fn welcome() -> Welcome {
        let keep_alive_s = (20, 120).into();
        Welcome {
            session: 7,
            pending: 0,
            window: 32,
            max_bytes: 4_096,
            keep_alive_s,
            now_ms: 1,
        }
    }

    fn goaway(reason: GoawayReason) -> Goaway {
        Goaway {
            reason,
            reconnect_ms: ReconnectRange {
                min_ms: 0,
                max_ms: 1_000,
            },
            endpoint: None,
        }
    }

    /// Everything that can be done to a session, so that a story is a list.
    enum Input {
        Say(DeviceFrame),
        Bytes(&'static [u8]),
        Greet,
        Refuse(Code),
        Sent(u64),
        Away(GoawayReason, u64),
        Fail(Code),
        Time(u64),
    }
    use Input::*;

    fn told(action: &ServerAction) -> String {
        match action {
            ServerAction::Attach(_) => "attach".into(),
            ServerAction::Acknowledge(Ack::UpTo(seq)) => format!("acknowledge up to {seq}"),
            ServerAction::Acknowledge(Ack::Ids(ids)) => format!("acknowledge {} ids", ids.len()),
            ServerAction::Decline { reason, .. } => format!("decline: {reason}"),
            ServerAction::Presence(state) => format!("presence {state:?}"),
            ServerAction::Subscribe(topics) => format!("subscribe {}", topics.join(" ")),
            ServerAction::Unsubscribe(topics) => format!("unsubscribe {}", topics.join(" ")),
            ServerAction::Send(ServerFrame::Error(error)) => format!("send error {}", error.code),
            ServerAction::Send(ServerFrame::Goaway(goaway)) => {
                format!("send goaway {:?}", goaway.reason)
            }
            ServerAction::Send(frame) => format!("send {}", frame.name()),
            ServerAction::Leave => "leave".into(),
            ServerAction::Close { code, .. } => format!("close {code}"),
        }
    }

    #[track_caller]
    fn check(inputs: impl IntoIterator<Item = Input>, expected: &[&str]) -> ServerSession {
        let mut session = ServerSession::new(10_000);
        let mut actions = Vec::new();
        for input in inputs {
            match input {
                Say(frame) => session.handle_frame(frame, &mut actions),
                Bytes(bytes) => {
                    session.handle_decoded(Codec::Json.decode_device(bytes), &mut actions)
                }
                Greet => session.handle_welcome(welcome(), &mut actions),
                Refuse(code) => session.handle_refused(code, "no", &mut actions),
                Sent(seq) => session.handle_sent(seq),
                Away(reason, now_ms) => session.handle_goaway(goaway(reason), now_ms, &mut actions),
                Fail(code) => session.handle_failure(code, "so it is", &mut actions),
                Time(now_ms) => session.handle_deadline(now_ms, &mut actions),
            }
        }
        assert_eq!(actions.iter().map(told).collect::<Vec<_>>(), expected);
        session
    }

    fn up_to(seq: u64) -> Input {
        Say(DeviceFrame::Ack(Ack::UpTo(seq)))
    }

    #[test]
    fn a_session_goes_from_hello_to_bye() {
        let topics = || Topics {
            topics: vec!["a".into(), "b".into()],
        };
        let id = Id([3; 16]);
        let session = check(
            [
                Say(hello()),
                Greet,
                Say(DeviceFrame::Ping),
                Sent(1),
                Sent(2),
                up_to(2),
                Say(DeviceFrame::Ack(Ack::Ids(vec![id]))),
                Say(DeviceFrame::Decline(Decline {
                    id,
                    reason: "no room".into(),
                })),
                Say(DeviceFrame::Presence(Presence {
                    state: PresenceState::Active,
                })),
                Say(DeviceFrame::Subscribe(topics())),
                Say(DeviceFrame::Unsubscribe(topics())),
                Say(DeviceFrame::Bye),
                Say(DeviceFrame::Ping),
            ],
            &[
                "attach",
                "send welcome",
                "send pong",
                "acknowledge up to 2",
                "acknowledge 1 ids",
                "decline: no room",
                "presence Active",
                "subscribe a b",
                "unsubscribe a b",
                "leave",
                "close bye",
            ],
        );
        assert!(session.is_closed());
    }

    #[test]
    fn nothing_may_come_before_hello() {
        check(
            [Say(DeviceFrame::Ping)],
            &["send error hello_expected", "close hello_expected"],
        );
        check(
            [up_to(0)],
            &["send error hello_expected", "close hello_expected"],
        );
    }

    #[test]
    fn a_device_that_leaves_before_hello_is_let_go() {
        check([Say(DeviceFrame::Bye)], &["leave", "close bye"]);
    }

    #[test]
    fn hello_has_a_deadline_and_only_hello() {
        let session = ServerSession::new(10_000);
        assert_eq!(session.deadline_ms(), Some(10_000));
        check([Time(9_999), Say(hello()), Time(10_000)], &["attach"]);
        check(
            [Time(10_000)],
            &["send error hello_timeout", "close hello_timeout"],
        );
        // Frames of a later version do not stop the deadline.
        let unknown = Bytes(br#"{"type":"warble"}"#);
        check(
            [unknown, Time(10_000)],
            &["send error hello_timeout", "close hello_timeout"],
        );
        assert_eq!(
            check([Say(hello()), Greet], &["attach", "send welcome"]).deadline_ms(),
            None
        );
    }

    #[test]
    fn a_second_hello_ends_the_session() {
        let error = ["send error second_hello", "close second_hello"];
        check(
            [Say(hello()), Say(hello())],
            &["attach", error[0], error[1]],
        );
        check(
            [Say(hello()), Greet, Say(hello())],
            &["attach", "send welcome", error[0], error[1]],
        );
    }

    #[test]
    fn what_a_device_says_before_the_welcome_waits_for_it() {
        let id = Id([3; 16]);
        check(
            [
                Say(hello()),
                Say(DeviceFrame::Ping),
                Say(DeviceFrame::Ack(Ack::Ids(vec![id]))),
                Greet,
            ],
            &["attach", "send welcome", "send pong", "acknowledge 1 ids"],
        );
        check(
            [Say(hello()), Say(DeviceFrame::Bye), Greet],
            &["attach", "leave", "close bye"],
        );
    }

    #[test]
    fn more_than_a_few_frames_before_the_welcome_end_the_session() {
        let pings =
            |count| std::iter::once(Say(hello())).chain((0..count).map(|_| Say(DeviceFrame::Ping)));
        check(pings(FRAMES_BEFORE_WELCOME_MAX), &["attach"]);
        check(
            pings(FRAMES_BEFORE_WELCOME_MAX + 1),
            &[
                "attach",
                "send error frames_before_welcome",
                "close frames_before_welcome",
            ],
        );
    }

    #[test]
    fn an_ack_beyond_the_last_one_sent_ends_the_session() {
        let error = ["send error ack_ahead", "close ack_ahead"];
        check(
            [Say(hello()), Greet, up_to(1)],
            &["attach", "send welcome", error[0], error[1]],
        );
        check(
            [Say(hello()), up_to(1), Greet],
            &["attach", error[0], error[1]],
        );
        let acknowledged = "acknowledge up to 2";
        check(
            [Say(hello()), Greet, Sent(2), up_to(2), up_to(3)],
            &["attach", "send welcome", acknowledged, error[0], error[1]],
        );
        check([Say(hello()), Greet, up_to(0)], &["attach", "send welcome"]);
    }

    #[test]
    fn a_refused_device_is_told_why() {
        check(
            [Say(hello()), Refuse(Code::StaleAttempt), Greet],
            &["attach", "send error stale_attempt", "close stale_attempt"],
        );
    }

    #[test]
    fn malformed_bytes_end_the_session_and_nothing_after_them_counts() {
        check(
            [Say(hello()), Bytes(b"{"), Say(DeviceFrame::Ping), Greet],
            &["attach", "send error malformed", "close malformed"],
        );
    }

    #[test]
    fn unknown_frames_are_skipped() {
        check(
            [
                Bytes(br#"{"type":"warble"}"#),
                Say(hello()),
                Greet,
                Bytes(br#"{"type":"x","y":[1,{}]}"#),
            ],
            &["attach", "send welcome"],
        );
    }

    #[test]
    fn a_drained_session_still_takes_verdicts_until_its_grace_is_over() {
        let begin = || {
            [
                Say(hello()),
                Greet,
                Sent(1),
                Away(GoawayReason::Drain, 50_000),
            ]
        };
        let told = ["attach", "send welcome", "send goaway Drain"];
        let session = check(begin(), &told);
        assert_eq!(session.deadline_ms(), Some(50_000 + GOAWAY_GRACE_MS));
        check(
            begin().into_iter().chain([
                up_to(1),
                Away(GoawayReason::Drain, 50_001),
                Say(DeviceFrame::Bye),
            ]),
            &[
                told[0],
                told[1],
                told[2],
                "acknowledge up to 1",
                "leave",
                "close bye",
            ],
        );
        check(
            begin().into_iter().chain([
                Time(50_000 + GOAWAY_GRACE_MS - 1),
                Time(50_000 + GOAWAY_GRACE_MS),
            ]),
            &[told[0], told[1], told[2], "close drain"],
        );
    }

    #[test]
    fn replaced_and_revoked_sessions_end_at_once() {
        for (reason, name, close) in [
            (
                GoawayReason::Replaced,
                "send goaway Replaced",
                "close replaced",
            ),
            (
                GoawayReason::Revoked,
                "send goaway Revoked",
                "close revoked",
            ),
        ] {
            check(
                [Say(hello()), Greet, Away(reason, 0)],
                &["attach", "send welcome", name, close],
            );
        }
        // Also one that drains already.
        check(
            [
                Say(hello()),
                Greet,
                Away(GoawayReason::Drain, 0),
                Away(GoawayReason::Revoked, 0),
            ],
            &[
                "attach",
                "send welcome",
                "send goaway Drain",
                "send goaway Revoked",
                "close revoked",
            ],
        );
    }

    #[test]
    fn a_drain_before_the_welcome_closes_at_once() {
        check(
            [Away(GoawayReason::Drain, 0), Say(hello())],
            &["send goaway Drain", "close drain"],
        );
    }

    #[test]
    fn failures_found_outside_close_once() {
        check(
            [
                Say(hello()),
                Greet,
                Fail(Code::Silence),
                Fail(Code::SlowReader),
                Time(u64::MAX),
            ],
            &[
                "attach",
                "send welcome",
                "send error silence",
                "close silence",
            ],
        );
    }
}
