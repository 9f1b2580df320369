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

use crate::carrier::{ConnectError, Dialer, Link, Proxy};
use crate::clock::Clock;
use crate::end::Disconnect;
use crate::endpoint::{Endpoint, ParseEndpointError};
use crate::handover::{Desk, Events, Handler, Handover};
use crate::notification::{Event, Notification, Verdict};
use crate::race::{HEAD_START, staggered};
use crate::reconnect::Backoff;
use crate::session::{self, Command, Ended, LAST_CALLBACK, Setting};
use crate::state::{Journal, Lock, Networks, Opened, Record, StateError, make_directory};
use crate::tls::{Trust, TrustError};

/// Requests of the app that may wait. They are answered within one turn of the loop.
const COMMANDS_MAX: usize = 16;

/// Sign of life on QUIC unless the app says otherwise, in seconds: many home routers forget a UDP flow after 30 s, and a
/// notification could then not come in. It costs a packet each way.
const KEEP_ALIVE_QUIC_S: u32 = 25;

/// Sign of life on WebSocket unless the app says otherwise, in seconds: below the 5 minutes after which many load balancers
/// and firewalls forget a TCP flow.
const KEEP_ALIVE_WEBSOCKET_S: u32 = 240;

/// Pause before the next race when the app says that the network changed, at most, in milliseconds.
const AFTER_CHANGE_MS: u64 = 200;

/// Name of the network when the app names none.
const ANY_NETWORK: &str = "";

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
    proxy: Option<Proxy>,
    window: u16,
    min_urgency: Option<Urgency>,
    agent: Option<String>,
    network: String,
    keep_alive: Option<Duration>,
    leave_after: Option<u64>,
    handler: Option<Handler>,
    events: Events,
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
            proxy: None,
            window: WINDOW_DEFAULT,
            min_urgency: None,
            agent: Some(concat!("bellwire-client/", env!("CARGO_PKG_VERSION")).to_owned()),
            network: ANY_NETWORK.to_owned(),
            keep_alive: None,
            leave_after: None,
            handler: None,
            events: Events(Arc::new(|_| {})),
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

    /// An HTTP proxy to go through by CONNECT. QUIC does not pass one, so WebSocket is used alone. Default: none.
    pub fn proxy(mut self, proxy: Proxy) -> Self {
        self.proxy = Some(proxy);
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

    /// A name for the network that the device is on, at most 128 bytes (an SSID's hash, "mobile"): the carrier that won is
    /// remembered by it. Default: one memory for all networks.
    pub fn network(mut self, name: impl Into<String>) -> Self {
        self.network = name.into();
        self
    }

    /// How often to give a sign of life when nothing else is said; the server's advice bounds it. Default: 25 s on QUIC,
    /// 240 s on WebSocket. Longer saves battery; too long, and network equipment forgets the flow: notifications then wait
    /// until the next sign of life.
    pub fn keep_alive(mut self, interval: Duration) -> Self {
        self.keep_alive = Some(interval);
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
            self.network.len() <= NETWORK_BYTES_MAX,
            "network",
            "at most 128 bytes long",
        )?;
        let carriers_fit = match self.carriers {
            Carriers::Quic => endpoint.offers_quic() && self.proxy.is_none(),
            Carriers::Auto | Carriers::WebSocket => true,
        };
        check(self.leave_after != Some(0), "leave_after", "at least 1")?;
        check(
            carriers_fit,
            "carriers",
            "WebSocket or both for a wss:// address or through a proxy",
        )?;
        let keep_alive_s = self
            .keep_alive
            .map(|interval| interval.as_secs().clamp(1, KEEP_ALIVE_MAX_S.into()) as u32);

        let dialer = Dialer::new(endpoint, &self.trust)?
            .with_codec(self.codec)
            .with_proxy(self.proxy.clone());
        let clock = Arc::new(Clock::new());
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
            network: self.network,
            networks,
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
    network: String,
    networks: Networks,
    /// A carrier that connected but bore no session: the other one goes first.
    demoted: Option<Carrier>,
    backoff: Backoff,
    desk: Arc<Desk>,
    journal: Arc<Mutex<Journal>>,
    events: Events,
    clock: Arc<Clock>,
    commands: mpsc::Receiver<Command>,
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
                Some(Ok(link)) => self.hold(link).await,
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
    async fn connect(&mut self) -> Option<Result<Link, Vec<ConnectError>>> {
        let order = self.order();
        let mut runners = Vec::with_capacity(order.len());
        for carrier in order {
            let dialer = self.dialer.clone();
            runners.push(async move { dialer.dial(carrier).await }.boxed());
        }
        let mut race = staggered(runners, HEAD_START).boxed();
        let raced = loop {
            tokio::select! {
                raced = &mut race => break raced,
                command = self.commands.recv() => match command {
                    Some(Command::NetworkChanged(name)) => self.network = name.unwrap_or(std::mem::take(&mut self.network)),
                    // Without a session there is nobody to tell.
                    Some(Command::Presence(_) | Command::Subscribe(_) | Command::Unsubscribe(_)) => {}
                    Some(Command::Shutdown) | None => return None,
                },
            }
        };
        match raced {
            Ok((_, link)) => Some(Ok(link)),
            Err(errors) => {
                // An endpoint that a `goaway` named gets one chance.
                self.dialer = self.home.clone();
                Some(Err(errors))
            }
        }
    }

    /// Who starts: the winner on this network, otherwise QUIC; never the one that just connected in vain.
    fn order(&self) -> Vec<Carrier> {
        let mut order = match self.carriers {
            Carriers::Auto => vec![Carrier::Quic, Carrier::WebSocket],
            Carriers::Quic => vec![Carrier::Quic],
            Carriers::WebSocket => vec![Carrier::WebSocket],
        };
        order.retain(|&carrier| self.dialer.offers(carrier));
        let winner = self.networks.winner(&self.network, self.clock.wall_ms());
        order.sort_by_key(|&carrier| (self.demoted == Some(carrier), winner != Some(carrier)));
        order
    }

    async fn hold(&mut self, link: Link) -> Ended {
        let carrier = link.carrier();
        self.desk.begin_session();
        // One hello for one connection, so that the server can tell a late one from a new one.
        self.hello.attempt += 1;
        let hello_mark = {
            let memory = self.desk.memory();
            self.hello.seen = memory.seen();
            memory.mark()
        };
        let default_s = match carrier {
            Carrier::Quic => KEEP_ALIVE_QUIC_S,
            Carrier::WebSocket => KEEP_ALIVE_WEBSOCKET_S,
        };
        let setting = Setting {
            hello: self.hello.clone(),
            hello_mark,
            keep_alive_s: self.keep_alive_s.unwrap_or(default_s),
            desk: &self.desk,
            events: &self.events,
            clock: &self.clock,
            commands: &mut self.commands,
        };
        let (network, networks, clock) = (&self.network, &mut self.networks, &self.clock);
        let attached = |carrier| {
            if networks.winner(network, clock.wall_ms()) != Some(carrier) {
                networks.remember(network, carrier, clock.wall_ms());
            }
        };
        let ended = session::run(link, setting, attached).await;
        match ended.stood_ms {
            Some(_) => self.demoted = None,
            None if matches!(
                ended.why,
                Disconnect::Lost { .. } | Disconnect::Silent | Disconnect::Misbehaved { .. }
            ) =>
            {
                self.demoted = Some(carrier);
                self.networks.forget(&self.network);
            }
            None => {}
        }
        if let Some(name) = &ended.network {
            self.network = name.clone();
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
        let mut until = tokio::time::Instant::now() + wait;
        loop {
            tokio::select! {
                () = tokio::time::sleep_until(until) => return Next::Connect,
                command = self.commands.recv() => match command {
                    Some(Command::NetworkChanged(name)) => {
                        self.network = name.unwrap_or(std::mem::take(&mut self.network));
                        if !binding {
                            // Still with jitter: a whole office changes its network at once.
                            let soon = Duration::from_millis(self.clock.up_to(AFTER_CHANGE_MS));
                            until = until.min(tokio::time::Instant::now() + soon);
                        }
                    }
                    Some(Command::Presence(_) | Command::Subscribe(_) | Command::Unsubscribe(_)) => {}
                    Some(Command::Shutdown) | None => return Next::Leave,
                },
            }
        }
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
        network: None,
        said_goodbye: false,
    }
}
