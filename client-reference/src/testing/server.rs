//! A server for tests: one device, one mailbox, and as much misbehaviour as the test asks for.

mod serving;

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bellwire_protocol::{
    Carrier, Code, Codec, Content, DeviceFrame, Goaway, GoawayReason, Hello, Id, KeepAlive, Notify,
    PresenceState, ServerFrame, ServerSession, Topics, Urgency, Withdraw,
};
use tokio::sync::watch;

use self::serving::Serving;
use super::Clock;
use crate::builder::Builder;
use crate::carrier::{Door, MemoryLink, Route};
use crate::client::Client;

/// The id of the only device.
pub const DEVICE: Id = Id::from_bytes([7; 16]);

/// How long a wait of a test may take before it panics, by the real clock.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Its secret.
const SECRET: &str = "the secret of the test";

/// Notifications that a server holds, answered ones included.
const MAILBOX_MAX: usize = 10_000;

/// Frames of the device that are remembered; the oldest makes room.
const HEARD_MAX: usize = 10_000;

/// Steps of time until a session is given up.
const STEPS_MAX: usize = 10_000;

/// Turns that other tasks get before time passes again.
const SETTLE_TURNS: usize = 64;

/// Lifetime of a notification unless the test says otherwise.
const TTL: Duration = Duration::from_secs(3_600);

/// How a farewell is given.
const FAREWELL: Duration = Duration::from_secs(2);

/// A content with a title and a body.
pub fn content(title: impl Into<String>, body: impl Into<String>) -> Content {
    Content {
        title: Some(title.into()),
        body: Some(body.into()),
        ..Content::default()
    }
}

/// What became of a notification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The app has it.
    Acknowledged,
    /// The app, or the client for it, declined; `expired` when it came too late. Empty when the reason was said in an earlier
    /// session that broke.
    Declined(String),
    /// The test took it back before there was a verdict ([`Server::withdraw`]).
    Revoked,
}

/// On which ways the server can be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reach {
    /// On all.
    #[default]
    All,
    /// Not by UDP: WebSocket alone.
    WebSocketOnly,
    /// Only through the proxy that the client was given.
    ProxyOnly,
    /// On none.
    Nothing,
}

/// A server for one device. It behaves like the real one until it is told otherwise: it holds what is not answered, sends at
/// most a window of it, repeats after a break, and believes `seen`.
///
/// Methods do not wait unless they are `async`; those wait for what the client does, and panic after [`PATIENCE`] with what
/// they know. Dropping the server breaks its link.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    clock: Clock,
    state: Mutex<State>,
    /// Counts changes of the state.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    mailbox: Vec<Stored>,
    reach: Reach,
    refusal: Option<Code>,
    silent: bool,
    /// A router on the way forgets a flow that was silent for this long, in milliseconds.
    forgets_after_ms: Option<u64>,
    keep_alive: Option<KeepAlive>,
    /// Sessions that were welcomed.
    sessions: u64,
    /// Links that were made; the newest one counts.
    links: u64,
    /// What the newest link has to do.
    orders: VecDeque<Order>,
    attached: Option<Standing>,
    last_hello: Option<Hello>,
    topics: BTreeSet<String>,
    /// What the device may neither join nor leave by itself.
    forbidden_topics: BTreeSet<String>,
    /// Whoever asks about topics is sent away with this.
    topics_failure: Option<Code>,
    presence: Option<PresenceState>,
    heard: VecDeque<DeviceFrame>,
    closed: bool,
}

/// What carries the attached session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Standing {
    link: u64,
    carrier: Carrier,
}

#[derive(Debug)]
struct Stored {
    notify: Notify,
    /// The link that it was sent on last.
    sent_on: Option<u64>,
    /// The device has answered it, or never has to: its place in the window is free.
    answered: bool,
    outcome: Option<Outcome>,
}

#[derive(Debug)]
enum Order {
    Say(Box<ServerFrame>),
    Goaway(Goaway),
    Fail(Code),
    Break,
}

impl Default for Server {
    fn default() -> Self {
        Self::new()
    }
}

impl Server {
    /// A server with an empty mailbox and a clock of its own.
    pub fn new() -> Self {
        Self::with_clock(Clock::new())
    }

    /// The same by this clock, for tests with several servers or clients.
    pub fn with_clock(clock: Clock) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                state: Mutex::default(),
                changes: watch::Sender::new(0),
            }),
        }
    }

    /// The clock of this server and of its clients.
    pub fn clock(&self) -> Clock {
        self.shared.clock.clone()
    }

    /// The settings of a client of this server: device, secret, links and clock. The test adds a directory and what it tests.
    pub fn client(&self) -> Builder {
        let shared = self.shared.clone();
        let door = Door::new(move |route, codec| shared.answer(route, codec));
        Client::builder()
            .server("server.test:4433")
            .device(DEVICE, SECRET)
            .network("test")
            .in_memory(door)
            .by_clock(self.shared.clock.clone())
    }

    /// Puts a notification of normal urgency into the mailbox, for an hour. An attached client gets it at once.
    ///
    /// # Panics
    /// When more than 10,000 were put in.
    pub fn notify(&self, content: Content) -> Id {
        self.notify_for(content, TTL)
    }

    /// The same with a lifetime.
    ///
    /// # Panics
    /// As [`notify`](Self::notify).
    pub fn notify_for(&self, content: Content, lifetime: Duration) -> Id {
        let now_ms = self.shared.clock.wall_ms();
        self.shared.change(|state| {
            assert!(
                state.mailbox.len() < MAILBOX_MAX,
                "a test's server holds {MAILBOX_MAX} notifications"
            );
            let mut bytes = [1; 16];
            bytes[8..].copy_from_slice(&(state.mailbox.len() as u64 + 1).to_be_bytes());
            let id = Id::from_bytes(bytes);
            state.mailbox.push(Stored {
                notify: Notify {
                    seq: 0,
                    redelivered: false,
                    id,
                    accepted_ms: now_ms,
                    expires_ms: now_ms.saturating_add(lifetime.as_millis() as u64),
                    urgency: Urgency::Normal,
                    content,
                },
                sent_on: None,
                answered: false,
                outcome: None,
            });
            id
        })
    }

    /// Forgets the verdict on a notification and sends it again, as a server does that never got the acknowledgement.
    pub fn repeat(&self, id: Id) {
        self.shared.change(|state| {
            if let Some(stored) = state.mailbox.iter_mut().find(|one| one.notify.id == id) {
                stored.outcome = None;
                stored.answered = false;
                stored.sent_on = None;
                stored.notify.redelivered = true;
            }
        });
    }

    /// Takes notifications back: what has no verdict is revoked, and the device is told to take all of them off the screen.
    /// As with the real server, one that is on its way keeps its place in the window until the device has answered it.
    pub fn withdraw(&self, ids: Vec<Id>) {
        self.shared.change(|state| {
            ids.iter().for_each(|id| state.end(id, Outcome::Revoked));
            state
                .orders
                .push_back(Order::Say(Box::new(ServerFrame::Withdraw(Withdraw {
                    ids,
                }))));
        });
    }

    /// Says any frame in the present session, whether it is right or not.
    pub fn say(&self, frame: ServerFrame) {
        self.order(Order::Say(Box::new(frame)));
    }

    /// The connection breaks without a word.
    pub fn break_link(&self) {
        self.order(Order::Break);
    }

    /// Sends the device away in good order; it may come back at a random moment of this range of milliseconds.
    pub fn send_away(&self, reason: GoawayReason, reconnect_ms: (u32, u32)) {
        self.order(Order::Goaway(Goaway {
            reason,
            reconnect_ms: reconnect_ms.into(),
            endpoint: None,
        }));
    }

    /// Ends the present session with an error.
    pub fn fail(&self, code: Code) {
        self.order(Order::Fail(code));
    }

    /// Refuses every `hello` with this code from now on; `None`: welcomes again.
    pub fn refuse(&self, code: Option<Code>) {
        self.shared.change(|state| state.refusal = code);
    }

    /// Hears nothing and says nothing from now on, as behind a router that forgot the flow; `false`: is back.
    pub fn be_silent(&self, silent: bool) {
        self.shared.change(|state| state.silent = silent);
    }

    /// From now on a router on the way forgets a flow on which nothing was said for this long; `None`: it remembers for ever.
    ///
    /// As on real networks, nobody is told. Over WebSocket nothing passes on that connection any more, in either direction.
    /// Over QUIC what the server says waits until the device speaks: the router makes a new flow of that packet, and the
    /// server finds the device at another address.
    pub fn router_forgets_after(&self, silence: Option<Duration>) {
        let silence_ms = silence.map(|silence| silence.as_millis() as u64);
        self.shared
            .change(|state| state.forgets_after_ms = silence_ms);
    }

    /// On which ways the server can be reached from now on. A link that stands stays.
    pub fn reach(&self, reach: Reach) {
        self.shared.change(|state| state.reach = reach);
    }

    /// Advises these seconds between signs of life from the next session on, in the place of what is usual.
    pub fn keep_alive(&self, min_s: u32, max_s: u32) {
        self.shared
            .change(|state| state.keep_alive = Some((min_s, max_s).into()));
    }

    /// The outcome of a notification, if there is one.
    pub fn outcome_now(&self, id: Id) -> Option<Outcome> {
        self.shared.state().outcome(id)
    }

    /// Waits for the outcome of a notification.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    pub async fn outcome(&self, id: Id) -> Outcome {
        self.until(&format!("no verdict on {id}"), |state| state.outcome(id))
            .await
    }

    /// Waits until this many sessions were welcomed since the start.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    pub async fn sessions(&self, number: u64) {
        let what = format!("there are no {number} sessions");
        self.until(&what, |state| (state.sessions >= number).then_some(()))
            .await;
    }

    /// The same while time passes: goes from one thing that is due to the next, through every pause of the client. For clients
    /// on this thread alone (`#[tokio::test]` without a flavor).
    ///
    /// # Panics
    /// When it takes more than 10,000 steps, or nobody waits for anything.
    pub async fn sessions_in_time(&self, number: u64) {
        for _ in 0..STEPS_MAX {
            for _ in 0..SETTLE_TURNS {
                tokio::task::yield_now().await;
            }
            if self.shared.state().sessions >= number {
                return;
            }
            let due = self.shared.clock.due_in();
            self.shared
                .clock
                .advance(due.expect("no session, and nobody waits for anything"));
        }
        panic!("there are no {number} sessions after {STEPS_MAX} steps");
    }

    /// Waits until a session stands, and answers with its carrier.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    pub async fn attached(&self) -> Carrier {
        self.until("no session stands", |state| {
            state.attached.map(|attached| attached.carrier)
        })
        .await
    }

    /// Waits until no session stands.
    ///
    /// # Panics
    /// After [`PATIENCE`].
    pub async fn detached(&self) {
        self.until("a session still stands", |state| {
            state.attached.is_none().then_some(())
        })
        .await;
    }

    /// Waits until the device said a frame like this, and answers with it. What was asked about before is not found again.
    ///
    /// # Panics
    /// After [`PATIENCE`], with the names of what the device said.
    pub async fn heard(&self, like: impl Fn(&DeviceFrame) -> bool) -> DeviceFrame {
        let waiting = async {
            let mut changes = self.shared.changes.subscribe();
            loop {
                {
                    let mut state = self.shared.state();
                    if let Some(at) = state.heard.iter().position(&like)
                        && let Some(frame) = state.heard.remove(at)
                    {
                        return frame;
                    }
                }
                let _ = changes.changed().await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(frame) => frame,
            Err(_) => {
                let state = self.shared.state();
                let names: Vec<_> = state.heard.iter().map(DeviceFrame::name).collect();
                panic!("the device did not say that, but: {}", names.join(", "));
            }
        }
    }

    /// What the device said since this was asked last, oldest first, apart from what [`heard`](Self::heard) found.
    pub fn take_heard(&self) -> Vec<DeviceFrame> {
        self.shared.state().heard.drain(..).collect()
    }

    /// The last `hello`.
    pub fn last_hello(&self) -> Option<Hello> {
        self.shared.state().last_hello.clone()
    }

    /// Makes the device a member of these topics and of no others, as a backend does. The device is not told.
    pub fn set_topics<T: Into<String>>(&self, topics: impl IntoIterator<Item = T>) {
        let topics = topics.into_iter().map(Into::into).collect();
        self.shared.change(|state| state.topics = topics);
    }

    /// Topics that the device may neither join nor leave by itself. Before this is called it may join and leave any; a real
    /// server allows what the app's rules say, by default nothing.
    pub fn forbid_topics<T: Into<String>>(&self, topics: impl IntoIterator<Item = T>) {
        let topics = topics.into_iter().map(Into::into).collect();
        self.shared.change(|state| state.forbidden_topics = topics);
    }

    /// Ends every session in which the device asks about topics with this code; `None`: answers again.
    pub fn fail_on_topics(&self, code: Option<Code>) {
        self.shared.change(|state| state.topics_failure = code);
    }

    /// The device's topics, sorted.
    pub fn topics(&self) -> Vec<String> {
        self.shared.state().topics.iter().cloned().collect()
    }

    /// What the device last said about whether a person uses the app.
    pub fn presence(&self) -> Option<PresenceState> {
        self.shared.state().presence
    }

    fn order(&self, order: Order) {
        self.shared.change(|state| state.orders.push_back(order));
    }

    async fn until<T>(&self, otherwise: &str, found: impl Fn(&State) -> Option<T>) -> T {
        let waiting = async {
            let mut changes = self.shared.changes.subscribe();
            loop {
                let value = found(&self.shared.state());
                if let Some(value) = value {
                    return value;
                }
                let _ = changes.changed().await;
            }
        };
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(value) => value,
            Err(_) => panic!("{otherwise} after {} s", PATIENCE.as_secs()),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.change(|state| state.closed = true);
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let changed = change(&mut self.state());
        self.changes.send_modify(|changes| *changes += 1);
        changed
    }

    /// A client dials.
    fn answer(self: &Arc<Self>, route: Route, codec: Codec) -> Option<MemoryLink> {
        let number = self.change(|state| {
            let reached = match state.reach {
                Reach::All => true,
                Reach::WebSocketOnly => route.carrier == Carrier::WebSocket,
                Reach::ProxyOnly => route.by_proxy,
                Reach::Nothing => false,
            };
            if !reached || state.closed {
                return None;
            }
            state.links += 1;
            Some(state.links)
        })?;
        let (device, server) = MemoryLink::pair(route.carrier, codec);
        let serving = Serving {
            shared: self.clone(),
            number,
            link: server,
            session: ServerSession::new(u64::MAX),
            sent: Vec::new(),
            window: 0,
            passed_at_ms: self.clock.now_ms(),
            forgotten: false,
            held: VecDeque::new(),
        };
        tokio::spawn(serving.run());
        Some(device)
    }
}

impl State {
    /// The device gave its verdict. The first outcome stays.
    fn decide(&mut self, id: &Id, outcome: Outcome) {
        if let Some(stored) = self.mailbox.iter_mut().find(|one| one.notify.id == *id) {
            stored.answered = true;
            stored.outcome.get_or_insert(outcome);
        }
    }

    /// It ends without the device, which may still have to answer it.
    fn end(&mut self, id: &Id, outcome: Outcome) {
        if let Some(stored) = self.mailbox.iter_mut().find(|one| one.notify.id == *id) {
            stored.outcome.get_or_insert(outcome);
        }
    }

    fn outcome(&self, id: Id) -> Option<Outcome> {
        let stored = self.mailbox.iter().find(|one| one.notify.id == id)?;
        stored.outcome.clone()
    }

    fn waiting(&self) -> u64 {
        let waiting = self.mailbox.iter().filter(|one| one.outcome.is_none());
        waiting.count() as u64
    }

    fn topics(&self) -> Topics {
        Topics {
            topics: self.topics.iter().cloned().collect(),
        }
    }
}
