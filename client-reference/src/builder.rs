//! The settings of a client, and its start.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bellwire_protocol::limits::{
    AGENT_BYTES_MAX, KEEP_ALIVE_MAX_S, SECRET_BYTES_MAX, WINDOW_DEFAULT, WINDOW_MAX, WINDOW_MIN,
};
use bellwire_protocol::{Carrier, Codec, Hello, Id, Secret, Urgency};
use futures_util::FutureExt;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::carrier::{
    Dialer, Door, EnvironmentProxyError, Exceptions, Proxy, ProxyUse, from_environment,
};
use crate::client::Client;
use crate::clock::Clock;
use crate::endpoint::{Endpoint, ParseEndpointError};
use crate::handover::{Desk, Events, Handler, Handover};
use crate::keeper::Keeper;
use crate::membership::Membership;
use crate::notification::{Event, Notification, Verdict};
use crate::reconnect::Backoff;
use crate::session::LAST_CALLBACK;
use crate::state::{
    Journal, Lock, Networks, Opened, StateError, SubscriptionsFile, make_directory,
};
use crate::surroundings::Surroundings;
use crate::testing;
use crate::tls::{Trust, TrustError};

/// Requests of the app that may wait. They are answered within one turn of the loop.
const COMMANDS_MAX: usize = 16;

/// How long the directory may take to be given back.
const RELEASE_MAX: Duration = Duration::from_secs(5);

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

impl Carriers {
    pub(crate) fn permit(self, carrier: Carrier) -> bool {
        match self {
            Self::Auto => true,
            Self::Quic => carrier == Carrier::Quic,
            Self::WebSocket => carrier == Carrier::WebSocket,
        }
    }
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
    pub(crate) fn new() -> Self {
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
                Networks::open(&state_dir, wall_ms),
                SubscriptionsFile::open(&state_dir, sync, wall_ms),
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
        let (journal, memory, opened, networks, (topics, earlier), state_dir) = opened?;
        report(&opened, &state_dir, &self.events);

        let desk = Arc::new(Desk::new(memory));
        let journal = Arc::new(Mutex::new(journal));
        let membership = Arc::new(Membership::new(topics, earlier));
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
        let leaving = CancellationToken::new();
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
            membership: membership.clone(),
            events: self.events,
            clock,
            commands: asked,
            leaving: leaving.clone(),
            presence: None,
        };
        let crash = CancellationToken::new();
        let crashed = crash.clone();
        let for_release = membership.clone();
        tokio::spawn(async move {
            let in_order = tokio::select! {
                () = keeper.run() => {
                    // It ends after the callback that runs; one that never returns must not hold the directory.
                    let _ = tokio::time::timeout(LAST_CALLBACK, &mut handing_over).await;
                    true
                }
                () = crashed.cancelled() => false,
            };
            handing_over.abort();
            let releasing = tokio::task::spawn_blocking(move || {
                // Before the journal, which holds the lock of the directory.
                for_release.release(in_order);
                journal
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .release();
            });
            // A disk that hangs keeps the directory; it must not keep the app.
            if tokio::time::timeout(RELEASE_MAX, releasing).await.is_err() {
                tracing::warn!(
                    "the disk does not answer: the directory is given back when it does"
                );
            }
            let _ = ended.send(true);
        });
        Ok(Client {
            commands,
            has_ended,
            crash,
            leave: leaving.clone(),
            _leave_when_dropped: Arc::new(leaving.drop_guard()),
            membership,
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
