//! The client: builder, handle, and the loop that keeps a session up.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bellwire_protocol::limits::{
    AGENT_BYTES_MAX, KEEP_ALIVE_MAX_S, SECRET_BYTES_MAX, TOPIC_BYTES_MAX, TOPICS_MAX,
    WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN,
};
use bellwire_protocol::{Carrier, Codec, Hello, Id, PresenceState, ReconnectWhen, Secret, Urgency};
use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::carrier::{
    ConnectError, Dialer, Door, EnvironmentProxyError, Exceptions, Link, Proxy, ProxyUse, Route,
    from_environment,
};
use crate::clock::Clock;
use crate::end::Disconnect;
use crate::endpoint::{Endpoint, ParseEndpointError};
use crate::handover::{Desk, Events, Handler, Handover};
use crate::keepalive::Silence;
use crate::notification::{Event, Notification, Verdict};
use crate::race::{HEAD_START, staggered};
use crate::reconnect::Backoff;
use crate::session::{self, Command, Ended, LAST_CALLBACK, Setting};
use crate::state::{
    Journal, LastSession, Lock, Networks, Opened, Record, StateError, Winner, make_directory,
};
use crate::surroundings::Surroundings;
use crate::testing;
use crate::tls::{Trust, TrustError};

/// Requests of the app that may wait. They are answered within one turn of the loop.
const COMMANDS_MAX: usize = 16;

/// How soon after a silence that was not answered a new session must stand, for the network to be blamed, in milliseconds: one
/// that comes later may have had other reasons.
const BLAME_WITHIN_MS: u64 = 60_000;

/// Pause before the next race when the app says that the network changed, at most, in milliseconds.
const AFTER_CHANGE_MS: u64 = 200;

/// Greatest length of a network name in bytes.
const NETWORK_BYTES_MAX: usize = 128;

/// Which carriers a client may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Carriers {
    /// Both race; the winner is remembered for the network. The right choice outside of tests.
    #[default]
    Auto,
    /// QUIC only.
    Quic,
    /// WebSocket only.
    WebSocket,
}

/// Why a client cannot start. All of it is for whoever set it up; nothing here depends on the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The server's address.
    #[error(transparent)]
    Endpoint(#[from] ParseEndpointError),
    /// The authorities to trust.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The proxy that the environment names.
    #[error(transparent)]
    Proxy(#[from] EnvironmentProxyError),
    /// A setting is missing.
    #[error("`{0}` is not set")]
    Missing(&'static str),
    /// A setting is out of range.
    #[error("`{what}` must be {rule}")]
    Invalid {
        /// The setting.
        what: &'static str,
        /// What it must be.
        rule: &'static str,
    },
}

/// Settings of a [`Client`]. What has no default is said so; everything is checked in [`start`](Self::start).
#[must_use]
pub struct Builder {
    server: Option<String>,
    device: Option<Id>,
    secret: Option<Secret>,
    trust: Trust,
    state_dir: Option<PathBuf>,
    sync: bool,
    carriers: Carriers,
    codec: Codec,
    proxy: ProxySetting,
    proxy_trust: Option<Trust>,
    window: u16,
    min_urgency: Option<Urgency>,
    agent: Option<String>,
    network: Option<String>,
    keep_alive: Option<Duration>,
    leave_after: Option<u64>,
    handler: Option<Handler>,
    events: Events,
    /// For tests: links in memory.
    door: Option<Door>,
    /// For tests: a clock that stands still.
    manual: Option<testing::Clock>,
}

/// Which proxy, and when.
#[derive(Debug, Clone)]
enum ProxySetting {
    None,
    Always(Proxy),
    WhenNeeded(Proxy),
    Environment,
}

impl ProxySetting {
    fn read(self) -> Result<Option<ProxyUse>, EnvironmentProxyError> {
        Ok(match self {
            Self::None => None,
            Self::Always(proxy) => Some(ProxyUse::always(proxy)),
            Self::WhenNeeded(proxy) => Some(ProxyUse {
                proxy,
                except: Exceptions::default(),
                when_needed: true,
            }),
            Self::Environment => from_environment()?.map(|(proxy, except)| ProxyUse {
                proxy,
                except,
                when_needed: false,
            }),
        })
    }
}

impl Builder {
    fn new() -> Self {
        Self {
            server: None,
            device: None,
            secret: None,
            trust: Trust::System,
            state_dir: None,
            sync: true,
            carriers: Carriers::Auto,
            codec: Codec::Cbor,
            proxy: ProxySetting::None,
            proxy_trust: None,
            window: WINDOW_DEFAULT,
            min_urgency: None,
            agent: Some(concat!("bellwire-client/", env!("CARGO_PKG_VERSION")).to_owned()),
            network: None,
            keep_alive: None,
            leave_after: None,
            handler: None,
            events: Events(Arc::new(|_| {})),
            door: None,
            manual: None,
        }
    }

    /// Where the server is (required): `host:port`, `bellwire://host:port` or `wss://host/path`, see [`Endpoint`].
    pub fn server(mut self, address: impl Into<String>) -> Self {
        self.server = Some(address.into());
        self
    }

    /// Who the device is (required): id and secret as `POST /v1/devices` answered them. Keep the secret where the platform
    /// keeps passwords.
    pub fn device(mut self, device: Id, secret: impl Into<Secret>) -> Self {
        self.device = Some(device);
        self.secret = Some(secret.into());
        self
    }

    /// Whose certificates to accept. Default: the authorities that the machine trusts.
    pub fn trust(mut self, trust: Trust) -> Self {
        self.trust = trust;
        self
    }

    /// A directory that belongs to this client alone (required). It is made when absent, readable by its owner only, and must
    /// survive restarts: it is what keeps a repeated notification from reaching the app twice. Do not copy it to another
    /// device, and leave it out of cloned images.
    pub fn state_dir(mut self, path: impl Into<PathBuf>) -> Self {
        self.state_dir = Some(path.into());
        self
    }

    /// Does not wait for the disk before acknowledging. **The consequence:** after a power cut or a crash of the operating
    /// system (not of the app alone) notifications of the last moments may reach the app a second time. For devices whose
    /// flash wears, and for load tests.
    pub fn without_sync(mut self) -> Self {
        self.sync = false;
        self
    }

    /// Which carriers to use. Default: both, in a race.
    pub fn carriers(mut self, carriers: Carriers) -> Self {
        self.carriers = carriers;
        self
    }

    /// How frames are written on WebSocket. Default: CBOR; JSON is for looking on with a proxy. QUIC always speaks CBOR.
    pub fn websocket_codec(mut self, codec: Codec) -> Self {
        self.codec = codec;
        self
    }

    /// An HTTP proxy to go through by CONNECT, always. QUIC does not pass one, so WebSocket is used alone. Default: none. Of
    /// this and the next two, the last one called counts.
    pub fn proxy(mut self, proxy: Proxy) -> Self {
        self.proxy = ProxySetting::Always(proxy);
        self
    }

    /// An HTTP proxy for networks that have no other way out: the direct ways are raced against it, and what worked is
    /// remembered for the network. For devices that move between an office and a home. The connection is the same TLS to the
    /// server on every way; a company that wants to see all of it at its proxy sets [`proxy`](Self::proxy).
    pub fn proxy_when_needed(mut self, proxy: Proxy) -> Self {
        self.proxy = ProxySetting::WhenNeeded(proxy);
        self
    }

    /// The proxy that the environment names, if it does: `HTTPS_PROXY` or `ALL_PROXY` (in lower case first), except for what
    /// `NO_PROXY` names. The variables are read once, in [`start`](Self::start).
    pub fn proxy_from_environment(mut self) -> Self {
        self.proxy = ProxySetting::Environment;
        self
    }

    /// Whose certificate to accept from a proxy that speaks TLS (`https://`). Default: as for the server.
    pub fn proxy_trust(mut self, trust: Trust) -> Self {
        self.proxy_trust = Some(trust);
        self
    }

    /// How many notifications may be in flight, 1 to 256. Default: 32. More of them arrive in one go after a time away; each
    /// takes memory until the app has answered it.
    pub fn window(mut self, window: u16) -> Self {
        self.window = window;
        self
    }

    /// Send nothing less urgent in this session; it waits on the server. Default: everything.
    pub fn min_urgency(mut self, urgency: Urgency) -> Self {
        self.min_urgency = Some(urgency);
        self
    }

    /// Name and version for the operator's eyes, at most 256 bytes. Default: name and version of this library.
    pub fn agent(mut self, agent: impl Into<String>) -> Self {
        self.agent = Some(agent.into());
        self
    }

    /// A name for the network that the device is on, at most 128 bytes (an SSID's hash, "mobile"): the way that won, and how
    /// long the network bears silence, are remembered by it, for the last 32 networks. Default: told apart by gateway and own
    /// addresses, and watched: when they change, the session moves. An app that names networks says so when they change
    /// ([`Client::network_changed`]).
    pub fn network(mut self, name: impl Into<String>) -> Self {
        self.network = Some(name.into());
        self
    }

    /// How often to give a sign of life when nothing else is said; the server's advice bounds it. Default: learned for each
    /// network and carrier from the silences that it bore, beginning at 25 s on QUIC and 240 s on WebSocket. Too long, and
    /// network equipment forgets the flow: notifications then wait until the next sign of life.
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = Some(interval);
        self
    }

    pub(crate) fn in_memory(mut self, door: Door) -> Self {
        self.door = Some(door);
        self
    }

    pub(crate) fn by_clock(mut self, clock: testing::Clock) -> Self {
        self.manual = Some(clock);
        self
    }

    /// Leaves by itself, in good order, once this many notifications were handed to the app; the next ones stay with the
    /// server. For tools. Default: never.
    pub fn leave_after(mut self, notifications: u64) -> Self {
        self.leave_after = Some(notifications);
        self
    }

    /// What to do with a notification (required, this or [`on_notification_async`](Self::on_notification_async)). The calls
    /// come one after the other, in order. Once it has answered, the id and the verdict are written to disk, and then the
    /// server is told. It runs on the client's task, so it must not block; hand long work to a thread of your own.
    pub fn on_notification(
        self,
        handler: impl Fn(Notification) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        self.on_notification_async(move |notification| std::future::ready(handler(notification)))
    }

    /// The same with a future. The next notification waits for it; after 5 minutes without a verdict the server breaks the
    /// session and repeats. A callback that panics declines with `handler_panicked`.
    pub fn on_notification_async<Fut>(
        mut self,
        handler: impl Fn(Notification) -> Fut + Send + Sync + 'static,
    ) -> Self
    where
        Fut: Future<Output = Verdict> + Send + 'static,
    {
        self.handler = Some(Arc::new(move |notification| handler(notification).boxed()));
        self
    }

    /// Who hears of everything else. It must not block. Default: nobody.
    pub fn on_event(mut self, listener: impl Fn(Event) + Send + Sync + 'static) -> Self {
        self.events = Events(Arc::new(listener));
        self
    }

    /// Checks the settings, opens the state directory and starts to connect, on the current Tokio runtime.
    ///
    /// # Errors
    /// What is wrong with the settings or the directory. Trouble with the network is no error: it comes as
    /// [`Event::Disconnected`], and the client tries again.
    pub async fn start(self) -> Result<Client, BuildError> {
        let endpoint: Endpoint = self
            .server
            .as_deref()
            .ok_or(BuildError::Missing("server"))?
            .parse()?;
        let device = self.device.ok_or(BuildError::Missing("device"))?;
        let secret = self.secret.clone().ok_or(BuildError::Missing("device"))?;
        let state_dir = self
            .state_dir
            .clone()
            .ok_or(BuildError::Missing("state_dir"))?;
        let handler = self
            .handler
            .clone()
            .ok_or(BuildError::Missing("on_notification"))?;
        let check = |holds: bool, what, rule| {
            if holds {
                Ok(())
            } else {
                Err(BuildError::Invalid { what, rule })
            }
        };
        check(
            (1..=SECRET_BYTES_MAX).contains(&secret.expose().len()),
            "secret",
            "1 to 256 bytes long",
        )?;
        check(
            (WINDOW_MIN..=WINDOW_MAX).contains(&self.window),
            "window",
            "1 to 256",
        )?;
        let agent_bytes = self.agent.as_ref().map_or(0, String::len);
        check(
            agent_bytes <= AGENT_BYTES_MAX,
            "agent",
            "at most 256 bytes long",
        )?;
        check(
            self.network.as_ref().map_or(0, String::len) <= NETWORK_BYTES_MAX,
            "network",
            "at most 128 bytes long",
        )?;
        check(self.leave_after != Some(0), "leave_after", "at least 1")?;
        let keep_alive_s = self
            .keep_alive
            .map(|interval| interval.as_secs().clamp(1, KEEP_ALIVE_MAX_S.into()) as u32);

        let clock = self.manual.map_or_else(Clock::new, Clock::manual);
        let dialer = match self.door {
            None => Dialer::new(endpoint, &self.trust)?,
            Some(door) => Dialer::in_memory(endpoint, door)?,
        };
        let mut dialer = dialer
            .with_codec(self.codec)
            .with_proxy_use(self.proxy.read()?);
        if let Some(trust) = &self.proxy_trust {
            dialer = dialer.with_proxy_trust(trust)?;
        }
        check(
            dialer
                .routes()
                .iter()
                .any(|route| self.carriers.permit(route.carrier)),
            "carriers",
            "WebSocket or both for a wss:// address or through a proxy",
        )?;
        let clock = Arc::new(clock);
        let surroundings = Surroundings::new(self.network, &clock);
        let wall_ms = clock.wall_ms();
        let sync = self.sync;
        let opening = tokio::task::spawn_blocking(move || {
            make_directory(&state_dir)?;
            let lock = Lock::take(&state_dir)?;
            let (mut journal, memory, opened) = Journal::open(&state_dir, sync, wall_ms)?;
            journal.hold(lock);
            Ok::<_, StateError>((
                journal,
                memory,
                opened,
                Networks::open(&state_dir),
                state_dir,
            ))
        });
        let opened = opening.await.unwrap_or_else(|error| {
            let source = std::io::Error::other(error);
            Err(StateError::Io {
                what: "open",
                path: PathBuf::new(),
                source,
            })
        });
        let (journal, memory, opened, networks, state_dir) = opened?;
        report(&opened, &state_dir, &self.events);

        let desk = Arc::new(Desk::new(memory));
        let journal = Arc::new(Mutex::new(journal));
        let handover = Handover {
            desk: desk.clone(),
            journal: journal.clone(),
            handler,
            events: self.events.clone(),
            clock: clock.clone(),
            remaining: self.leave_after,
        };
        let mut handing_over = tokio::spawn(handover.run());
        let (commands, asked) = mpsc::channel(COMMANDS_MAX);
        let (ended, has_ended) = watch::channel(false);
        let instance = clock.id();
        let keeper = Keeper {
            hello: Hello {
                device,
                secret: Some(secret),
                instance,
                attempt: 0,
                seen: Vec::new(),
                window: Some(self.window),
                min_urgency: self.min_urgency,
                agent: self.agent,
            },
            home: dialer.clone(),
            dialer,
            carriers: self.carriers,
            keep_alive_s,
            surroundings,
            networks,
            state_dir,
            last: None,
            suspect: None,
            demoted: None,
            backoff: Backoff::default(),
            desk,
            journal: journal.clone(),
            events: self.events,
            clock,
            commands: asked,
        };
        let crash = CancellationToken::new();
        let crashed = crash.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = keeper.run() => {
                    // It ends after the callback that runs; one that never returns must not hold the directory.
                    let _ = tokio::time::timeout(LAST_CALLBACK, &mut handing_over).await;
                }
                () = crashed.cancelled() => {}
            }
            handing_over.abort();
            let releasing = tokio::task::spawn_blocking(move || {
                journal
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .release();
            });
            let _ = releasing.await;
            let _ = ended.send(true);
        });
        Ok(Client {
            commands,
            has_ended,
            crash,
        })
    }
}

/// Loud when something was lost or set aside, silent otherwise.
fn report(opened: &Opened, state_dir: &std::path::Path, events: &Events) {
    match opened {
        Opened::Fresh | Opened::Intact => {}
        Opened::TornTail { bytes } => {
            tracing::info!(bytes, directory = %state_dir.display(), "dropped a torn end of the window of ids");
        }
        Opened::SetAside { path, salvaged } => {
            let what = format!(
                "the window of ids in {} was damaged and is kept as {}; {salvaged} verdicts could be read, the others may repeat. Check the disk",
                state_dir.display(),
                path.display()
            );
            tracing::error!("{what}");
            events.tell(Event::Trouble { what });
        }
    }
}

/// A running client. Dropping it leaves in the background; [`shutdown`](Self::shutdown) waits until it is done.
#[derive(Debug, Clone)]
pub struct Client {
    commands: mpsc::Sender<Command>,
    has_ended: watch::Receiver<bool>,
    crash: CancellationToken,
}

impl Client {
    /// Begins the settings of a client.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Leaves in good order: the callback that runs is finished, its verdict saved and told, the server hears `bye`. What the
    /// app has not seen stays with the server. Takes at most about ten seconds.
    pub async fn shutdown(self) {
        let _ = self.commands.send(Command::Shutdown).await;
        self.ended().await;
    }

    /// Waits until the client has ended, by [`shutdown`](Self::shutdown) or because the server said never to come back.
    pub async fn ended(&self) {
        let mut has_ended = self.has_ended.clone();
        // An error means that the task is gone: ended as well.
        let _ = has_ended.wait_for(|ended| *ended).await;
    }

    /// Ends at once, as if the process had been killed: no verdict is saved or said any more, nothing is closed in order. For
    /// tests of what comes after a crash.
    pub async fn crash(self) {
        self.crash.cancel();
        self.ended().await;
    }

    /// The network changed, or the machine woke up: on QUIC the session moves to the new network, on WebSocket it is probed,
    /// and without a session a pause is cut short. `name` is as in [`Builder::network`].
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn network_changed(&self, name: Option<String>) -> Result<(), Gone> {
        self.ask(Command::NetworkChanged(name)).await
    }

    /// Tells the server whether a person uses the app just now. Without a session it changes nothing.
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn presence(&self, state: PresenceState) -> Result<(), Gone> {
        self.ask(Command::Presence(state)).await
    }

    /// Asks to become a member of topics, as far as the app's rules allow it. [`Event::Subscribed`] answers with the full set.
    /// Without a session it changes nothing.
    ///
    /// # Errors
    /// When the client has ended, or for more than 100 topics or a name that is not 1 to 128 bytes long.
    pub async fn subscribe(&self, topics: Vec<String>) -> Result<(), TopicsError> {
        check_topics(&topics)?;
        Ok(self.ask(Command::Subscribe(topics)).await?)
    }

    /// Asks to leave topics; otherwise like [`subscribe`](Self::subscribe).
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    pub async fn unsubscribe(&self, topics: Vec<String>) -> Result<(), TopicsError> {
        check_topics(&topics)?;
        Ok(self.ask(Command::Unsubscribe(topics)).await?)
    }

    async fn ask(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).await.map_err(|_| Gone)
    }
}

/// The client has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has ended")]
pub struct Gone;

/// Why topics cannot be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopicsError {
    /// More than 100 names, or one that is not 1 to 128 bytes long.
    #[error("at most 100 topics, each with a name of 1 to 128 bytes")]
    Invalid,
    /// The client has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

fn check_topics(topics: &[String]) -> Result<(), TopicsError> {
    let fits = topics.len() <= TOPICS_MAX
        && topics
            .iter()
            .all(|topic| (1..=TOPIC_BYTES_MAX).contains(&topic.len()));
    if fits {
        Ok(())
    } else {
        Err(TopicsError::Invalid)
    }
}

/// Keeps a session up.
struct Keeper {
    /// As it will be said; `attempt` and `seen` change.
    hello: Hello,
    /// The server that was configured.
    home: Dialer,
    /// The server to try next.
    dialer: Dialer,
    carriers: Carriers,
    keep_alive_s: Option<u32>,
    surroundings: Surroundings,
    networks: Networks,
    state_dir: PathBuf,
    last: Option<LastSession>,
    /// A silence that was perhaps lost, until a new session on the same network shows that nothing else was wrong.
    suspect: Option<Suspect>,
    /// A carrier that connected but bore no session: the other one goes first.
    demoted: Option<Route>,
    backoff: Backoff,
    desk: Arc<Desk>,
    journal: Arc<Mutex<Journal>>,
    events: Events,
    clock: Arc<Clock>,
    commands: mpsc::Receiver<Command>,
}

/// A silence that was perhaps lost.
struct Suspect {
    network: String,
    mark: u64,
    carrier: Carrier,
    silent_ms: u64,
    at_ms: u64,
}

impl Carriers {
    fn permit(self, carrier: Carrier) -> bool {
        match self {
            Self::Auto => true,
            Self::Quic => carrier == Carrier::Quic,
            Self::WebSocket => carrier == Carrier::WebSocket,
        }
    }
}

/// What comes after waiting.
enum Next {
    Connect,
    Leave,
}

impl Keeper {
    async fn run(mut self) {
        // Closed without a session: `leave_after` was reached while the connection was gone.
        while !self.desk.is_closed() {
            let ended = match self.connect().await {
                Some(Ok((route, link))) => self.hold(route, link).await,
                Some(Err(errors)) => unreachable(errors),
                None => break,
            };
            if ended.left {
                if ended.said_goodbye {
                    self.note_confirmed().await;
                }
                self.events.tell(Event::Disconnected {
                    why: ended.why,
                    retry_in: None,
                });
                break;
            }
            let clock = self.clock.clone();
            let retry_in = self
                .backoff
                .wait(ended.when, ended.stood_ms, |max| clock.up_to(max));
            // Someone said when: a changed network does not make it earlier.
            let binding = match ended.when {
                ReconnectWhen::Never | ReconnectWhen::Within { .. } => true,
                ReconnectWhen::Backoff { floor_ms } => floor_ms > 0,
            };
            self.events.tell(Event::Disconnected {
                why: ended.why,
                retry_in,
            });
            let Some(wait) = retry_in else { break };
            match self.pause(wait, binding).await {
                Next::Connect => {}
                Next::Leave => break,
            }
        }
        self.desk.close();
        self.events.tell(Event::Stopped);
    }

    /// The race. `None`: the app wants to leave.
    async fn connect(&mut self) -> Option<Result<(Route, Link), Vec<ConnectError>>> {
        let order = self.order();
        let mut runners = Vec::with_capacity(order.len());
        for &route in &order {
            let dialer = self.dialer.clone();
            runners.push(async move { dialer.dial_route(route).await }.boxed());
        }
        let mut race = staggered(runners, HEAD_START).boxed();
        let raced = loop {
            tokio::select! {
                raced = &mut race => break raced,
                command = self.commands.recv() => match command {
                    Some(Command::NetworkChanged(name)) => self.surroundings.told(name),
                    // Without a session there is nobody to tell.
                    Some(Command::Presence(_) | Command::Subscribe(_) | Command::Unsubscribe(_)) => {}
                    Some(Command::Shutdown) | None => return None,
                },
            }
        };
        match raced {
            Ok((place, link)) => Some(Ok((order[place], link))),
            Err(errors) => {
                // An endpoint that a `goaway` named gets one chance.
                self.dialer = self.home.clone();
                Some(Err(errors))
            }
        }
    }

    /// Who starts: the winner on this network, otherwise QUIC; never the one that just connected in vain.
    fn order(&self) -> Vec<Route> {
        let mut order = self.dialer.routes();
        order.retain(|route| self.carriers.permit(route.carrier));
        let winner = self
            .networks
            .winner(self.surroundings.network(), self.clock.wall_ms());
        // What another proxy won says nothing of this one.
        let proxy = self.dialer.proxy().map(|used| used.proxy.to_string());
        let won = |route: &Route, winner: &Winner| {
            winner.carrier() == route.carrier
                && winner.proxy == proxy.clone().filter(|_| route.by_proxy)
        };
        order.sort_by_key(|route| {
            let first = winner.is_some_and(|winner| won(route, winner));
            (self.demoted == Some(*route), !first)
        });
        order
    }

    async fn hold(&mut self, route: Route, link: Link) -> Ended {
        let (carrier, codec) = (link.carrier(), link.codec());
        self.desk.begin_session();
        // One hello for one connection, so that the server can tell a late one from a new one.
        self.hello.attempt += 1;
        let hello_mark = {
            let memory = self.desk.memory();
            self.hello.seen = memory.seen();
            memory.mark()
        };
        let proxy = self.dialer.proxy().filter(|_| route.by_proxy);
        let proxy = proxy.map(|used| used.proxy.to_string());
        let (clock, state_dir) = (&self.clock, &self.state_dir);
        let (last, suspect) = (&mut self.last, &mut self.suspect);
        let server = self.dialer.endpoint().to_string();
        let attached = |networks: &mut Networks, surroundings: &mut Surroundings, session| {
            surroundings.look();
            let (network, wall_ms) = (surroundings.network(), clock.wall_ms());
            networks.remember(network, route, proxy.clone(), wall_ms);
            if let Some(lost) = suspect.take()
                && lost.mark == surroundings.mark()
                && lost.network == network
                && clock.now_ms().saturating_sub(lost.at_ms) <= BLAME_WITHIN_MS
            {
                networks.note(
                    network,
                    lost.carrier,
                    lost.silent_ms,
                    Silence::Lost,
                    wall_ms,
                );
            }
            let session = LastSession {
                server: server.clone(),
                carrier: carrier.name().to_owned(),
                codec: codec.name().to_owned(),
                proxy: proxy.clone(),
                network: network.to_owned(),
                session,
                began_ms: wall_ms,
                ended_ms: None,
                why: None,
            };
            session.save(state_dir);
            *last = Some(session);
        };
        let setting = Setting {
            hello: self.hello.clone(),
            hello_mark,
            keep_alive_s: self.keep_alive_s,
            networks: &mut self.networks,
            surroundings: &mut self.surroundings,
            desk: &self.desk,
            events: &self.events,
            clock,
            commands: &mut self.commands,
        };
        let ended = session::run(link, setting, attached).await;
        let (network, wall_ms) = (self.surroundings.network().to_owned(), self.clock.wall_ms());
        if let Some(silent_ms) = ended.unanswered_ms {
            self.suspect = Some(Suspect {
                network: network.clone(),
                mark: self.surroundings.mark(),
                carrier,
                silent_ms,
                at_ms: self.clock.now_ms(),
            });
        }
        match ended.stood_ms {
            Some(_) => self.demoted = None,
            None if matches!(
                ended.why,
                Disconnect::Lost { .. } | Disconnect::Silent | Disconnect::Misbehaved { .. }
            ) =>
            {
                self.demoted = Some(route);
                self.networks.forget(&network, wall_ms);
            }
            None => {}
        }
        self.networks.save_what_is_new(wall_ms);
        if let Some(mut last) = self.last.take().filter(|_| ended.stood_ms.is_some()) {
            last.ended_ms = Some(wall_ms);
            last.why = Some(ended.why.to_string());
            last.save(&self.state_dir);
        }
        match ended.endpoint.as_deref().map(str::parse::<Endpoint>) {
            Some(Ok(endpoint)) => self.dialer = self.home.toward(endpoint),
            Some(Err(error)) => {
                tracing::warn!(%error, "the server named an endpoint that is none");
                self.dialer = self.home.clone();
            }
            None => {}
        }
        ended
    }

    /// Waits before the next race.
    async fn pause(&mut self, wait: Duration, binding: bool) -> Next {
        let mut until_ms = self.clock.now_ms() + wait.as_millis() as u64;
        loop {
            tokio::select! {
                () = self.clock.sleep_until(until_ms) => {
                    if self.clock.now_ms() >= until_ms {
                        return Next::Connect;
                    }
                }
                change = self.surroundings.change(&self.clock) => {
                    if let Some(slept) = change.slept {
                        self.events.tell(Event::Woke { slept });
                    }
                    if change.moved {
                        let network = self.surroundings.network().to_owned();
                        self.events.tell(Event::Moved { network });
                    }
                    until_ms = self.sooner(until_ms, binding);
                }
                command = self.commands.recv() => match command {
                    Some(Command::NetworkChanged(name)) => {
                        self.surroundings.told(name);
                        until_ms = self.sooner(until_ms, binding);
                    }
                    Some(Command::Presence(_) | Command::Subscribe(_) | Command::Unsubscribe(_)) => {}
                    Some(Command::Shutdown) | None => return Next::Leave,
                },
            }
        }
    }

    /// Something changed for the better, perhaps. Still with jitter: a whole office changes its network at once.
    fn sooner(&self, until_ms: u64, binding: bool) -> u64 {
        if binding {
            return until_ms;
        }
        let soon = self.clock.up_to(AFTER_CHANGE_MS);
        until_ms.min(self.clock.now_ms() + soon)
    }

    /// Writes down that the server has every verdict, so that the next start need not repeat them. Only advice.
    async fn note_confirmed(&self) {
        let journal = self.journal.clone();
        let noted = tokio::task::spawn_blocking(move || {
            journal
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .append(&[Record::Confirmed])
        });
        if let Ok(Err(error)) = noted.await {
            tracing::debug!(%error, "cannot note that the server has every verdict");
        }
    }
}

fn unreachable(errors: Vec<ConnectError>) -> Ended {
    Ended {
        when: ReconnectWhen::Backoff { floor_ms: 0 },
        endpoint: None,
        why: Disconnect::Unreachable { errors },
        stood_ms: None,
        left: false,
        unanswered_ms: None,
        said_goodbye: false,
    }
}
