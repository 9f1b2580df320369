//! `bellwire serve`: puts the house together, says when it is ready, and takes it down in order.

mod certificates;
mod process;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwire_server::compat;
use bellwire_server::config::{
    self, ApiAccess, Checked, Engine, Environment, Listen, LogFormat, MailboxFull, keys,
};
use bellwire_server::delivery::{AppId, Held, OverflowRule, Policy};
use bellwire_server::http::{
    ApiState, Connections, Listening, LoadedSettings, Places, ServeReport, Sites, routers,
    serve as serve_http,
};
use bellwire_server::outbound::{Caller, SharedCaller, Ways};
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::{
    AppQuota, CallbackLimits, Handle, Limits, LinkSettings, Patterns, Quotas, Runtime,
    RuntimeSettings, SystemClock, SystemEntropy, load_or_create_hash_key,
};
use bellwire_server::store::{self, BackupPlan, EngineKind, StoreSettings};
use bellwire_server::telemetry::logging::Levels;
use bellwire_server::telemetry::{logging, metrics};
use bellwire_server::transport::{
    Prepared, TlsSettings, Transport, TransportError, TransportSettings,
};
use clap::Args;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::certificates::{ApiTls, FreshApi, devices_tls};
use self::process::{Signals, Word, raise_file_limit};
use super::check::cannot_listen;
use super::files::{DataDir, HASH_KEY};
use super::notify::Notify;
use super::outbound;
use super::{ConfigArg, Console, EXIT_TROUBLE, Failure, Outcome, keep_to_ourselves, no_threads};

/// How often histogram samples are folded together.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// How long open requests of backends may take after the drain.
const HTTP_DRAIN: Duration = Duration::from_secs(5);
/// How long a stop may take after the drain: links that say good-bye, open requests, the last commit.
const STOP_MAX: Duration = Duration::from_secs(60);
/// Connections of the operations listener: probes and a scraper or two.
const OPERATIONS_CONNECTIONS: usize = 256;

const AFTER_HELP: &str = "\
Examples:
  bellwire serve
  bellwire serve --config /etc/bellwire/bellwire.toml
  BELLWIRE__LISTEN__DEVICES=0.0.0.0:4433 bellwire serve

Without a settings file everything has a default: the data goes to ./bellwire-data, certificates for development are
made there, and only programs on this machine can connect. One line on standard output says that the server is ready.

Signals: SIGTERM and SIGINT drain and stop (a second one stops at once), SIGHUP reads settings and certificates anew.
Exit codes: 0 stopped in order, 1 something went wrong or a second signal came, 2 the command line is wrong, 78 the
settings are wrong.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    config: ConfigArg,
    /// Make a new bootstrap key although there are keys: for when all of them were lost
    #[arg(long)]
    new_key: bool,
    /// Stop as soon as standard input ends: for a parent that must not leave a server behind
    #[arg(long, hide = true)]
    until_stdin_ends: bool,
}

pub(crate) fn run(args: &ServeArgs) -> Outcome {
    keep_to_ourselves();
    let checked = config::load(args.config.config.as_deref(), &Environment::of_process())?;
    let format = match checked.log.format {
        LogFormat::Auto => logging::Format::Auto,
        LogFormat::Text => logging::Format::Text,
        LogFormat::Json => logging::Format::Json,
    };
    let levels = logging::install(&checked.log.level, format)
        .map_err(|error| Failure::new(error.to_string(), "set log.level to something like info"))?;
    let exposition = metrics::install().map_err(|error| {
        Failure::new(
            error.to_string(),
            "this is a fault of the program: please report it",
        )
    })?;
    raise_file_limit();
    for warning in &checked.warnings {
        tracing::warn!("{warning}");
    }
    let data = DataDir::take(&checked.data_dir)?;
    data.forget_listeners()?;
    let devices_tls = devices_tls(&checked, &data)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("bellwire")
        .build()
        .map_err(|error| no_threads(&error))?;
    let outcome = runtime.block_on(serve(args, checked, &data, devices_tls, exposition, levels));
    // What is left are tasks that were cut off, of devices that did not answer: up to all of them. The process ends now, and need
    // not give their memory back one by one.
    runtime.shutdown_background();
    outcome
}

async fn serve(
    args: &ServeArgs,
    checked: Checked,
    data: &DataDir,
    devices_tls: TlsSettings,
    exposition: metrics::Exposition,
    levels: Levels,
) -> Outcome {
    let manager = Arc::new(Notify::of_process());
    let alive = CancellationToken::new();
    let watched = (Arc::clone(&manager), alive.clone());
    tokio::spawn(async move { watched.0.live(watched.1).await });
    manager.status("opening the store");
    // Before anything is bound, so that a signal during the start is not lost.
    let mut signals = Signals::new(args.until_stdin_ends)?;
    let entropy = Arc::new(SystemEntropy::new());
    data.hash_key_is_not_lost()?;
    let hash_key = load_or_create_hash_key(&data.path().join(HASH_KEY), entropy.as_ref()).map_err(
        |error| {
            Failure::new(
                error.to_string(),
                "without this key no device and no API key of this data directory is let in",
            )
        },
    )?;
    let clock = Arc::new(SystemClock::new());
    let settings = StoreSettings {
        key_mark: hash_key.mark(),
        ..store_settings(&checked, data)
    };
    let (store_clock, store_entropy) = (clock.clone(), entropy.clone());
    let opened = tokio::task::spawn_blocking(move || store::open(&settings, store_clock, store_entropy))
        .await
        .map_err(|error| Failure::new(format!("opening the store broke off: {error}"), "look at the log above"))?
        .map_err(|error| {
            Failure::new(
                format!("the store cannot be opened: {error}"),
                "docs/operations.md says what its files are and what can be done; nothing in it was deleted",
            )
        })?;
    let caller = Arc::new(Caller::new(outbound::ways(&checked)?));
    let runtime = Runtime::start_with(
        runtime_settings(&checked),
        opened.store,
        clock,
        entropy,
        hash_key,
        Arc::new(SharedCaller(Arc::clone(&caller))),
    )
    .await
    .map_err(|error| {
        Failure::new(
            format!("the server cannot start: {error}"),
            "look at the log above",
        )
    })?;
    let handle = runtime.handle.clone();
    bootstrap(&handle, data, args.new_key).await?;

    let house = House::open(
        handle,
        &checked,
        data,
        devices_tls,
        exposition,
        levels,
        caller,
    )
    .await?;
    data.announce(house.bound, house.scheme)?;
    manager.ready(&house.summary("serving"));
    Console::out().line(&format!(
        "bellwire {} is ready: devices {}, API {}://{}, operations http://{}, data {}",
        env!("CARGO_PKG_VERSION"),
        house.bound.devices,
        house.scheme,
        house.bound.api,
        house.bound.operations,
        data.path().display(),
    ));

    let mut current = checked;
    loop {
        match signals.next().await {
            Word::Reload => {
                manager.reloading();
                let (now, said) = match house.reload(args, &current, data) {
                    Ok(next) => {
                        current = next;
                        (house.summary("serving"), "settings were read anew")
                    }
                    Err(Refused) => (
                        house.summary("serving with the settings of before"),
                        "a reload was refused, see the log",
                    ),
                };
                manager.ready(&format!("{now}; {said}"));
            }
            Word::Stop(why) => {
                let window = current.drain_window;
                tracing::info!(why, window_s = window.as_secs(), "going down");
                manager.stopping(window + STOP_MAX, "sending devices away");
                break;
            }
        }
    }
    // Whoever is in a hurry says so again. Nothing that was accepted is lost by that.
    tokio::spawn(async move {
        let why = signals.stop().await;
        tracing::error!(why, "a second signal: stopping at once");
        std::process::exit(i32::from(EXIT_TROUBLE));
    });
    let committed = house.close(current.drain_window).await;
    alive.cancel();
    data.forget_listeners()?;
    if !committed {
        return Err(Failure::new(
            "the store failed, so the last commit could not be made",
            "everything that was answered with a 2xx before is safe; look at the disk before the next start",
        ));
    }
    tracing::info!("stopped in order");
    Ok(())
}

// ---- The parts -----------------------------------------------------------------------------------------------------

/// Everything that listens.
struct House {
    handle: Handle,
    transport: Transport,
    api: Option<ApiTls>,
    bound: Listen,
    scheme: &'static str,
    shutdown: CancellationToken,
    serving: [JoinHandle<ServeReport>; 2],
    levels: Levels,
    caller: Arc<Caller>,
    /// What the process was started with: what cannot change while it runs.
    started_with: Checked,
    loaded: Arc<LoadedSettings>,
}

/// A reload that was refused; everything stayed as it was, and the log says why.
struct Refused;

impl House {
    /// Binds the three listeners and serves on them.
    async fn open(
        handle: Handle,
        checked: &Checked,
        data: &DataDir,
        devices_tls: TlsSettings,
        exposition: metrics::Exposition,
        levels: Levels,
        caller: Arc<Caller>,
    ) -> Result<House, Failure> {
        let api_tls = match &checked.api {
            ApiAccess::Https(pair) => Some(ApiTls::new(pair, checked)?),
            ApiAccess::Loopback | ApiAccess::TrustedProxy => None,
        };
        let (api_listener, api) = bind(&keys::LISTEN_API, checked.listen.api).await?;
        let (operations_listener, operations) =
            bind(&keys::LISTEN_OPERATIONS, checked.listen.operations).await?;
        let settings = TransportSettings {
            addr: checked.listen.devices,
            plain: checked.listen.devices_plain,
            tls: devices_tls,
            count_loopback: false,
        };
        let transport = Transport::start(handle.clone(), &settings)
            .map_err(|error| device_port(&error, data))?;

        let shutdown = CancellationToken::new();
        let rendering = exposition.clone();
        let loaded = Arc::new(LoadedSettings::new(handle.now_ms()));
        let connections = usize::try_from(checked.limits.api_connections).unwrap_or(usize::MAX);
        let places = Places::new(connections);
        let (knocking, counted) = (transport.knocking(), places.clone());
        let Sites {
            api: api_site,
            operations: operations_site,
        } = routers(ApiState {
            handle: handle.clone(),
            metrics: Arc::new(move || rendering.render()),
            loaded: Arc::clone(&loaded),
            connections: Arc::new(move || Connections {
                unauthenticated: knocking.total(),
                busiest_address: knocking.busiest(),
                api: counted.taken(),
                api_max: counted.max(),
            }),
            doors: compat::doors(handle.clone()),
        });
        tokio::spawn(upkeep(exposition, shutdown.clone()));
        let scheme = if api_tls.is_some() { "https" } else { "http" };
        let on_api = Listening {
            listener: api_listener,
            tls: api_tls.as_ref().map(ApiTls::source),
            name: "api",
            places,
            drain: HTTP_DRAIN,
        };
        let on_operations = Listening {
            listener: operations_listener,
            tls: None,
            name: "operations",
            places: Places::new(OPERATIONS_CONNECTIONS),
            drain: HTTP_DRAIN,
        };
        Ok(House {
            bound: Listen {
                devices: transport.local_addr(),
                devices_plain: transport.plain_addr(),
                api,
                operations,
            },
            serving: [
                tokio::spawn(serve_http(on_api, api_site, shutdown.clone())),
                tokio::spawn(serve_http(on_operations, operations_site, shutdown.clone())),
            ],
            handle,
            transport,
            api: api_tls,
            scheme,
            shutdown,
            levels,
            caller,
            started_with: checked.clone(),
            loaded,
        })
    }

    /// Where it listens, for people who look at the service manager's status.
    fn summary(&self, doing: &str) -> String {
        format!(
            "{doing}: devices {}, API {}://{}, operations http://{}",
            self.bound.devices, self.scheme, self.bound.api, self.bound.operations
        )
    }

    /// Reads the settings anew and takes what can change without a restart: everything that can, or, if anything is
    /// wrong, nothing.
    fn reload(
        &self,
        args: &ServeArgs,
        current: &Checked,
        data: &DataDir,
    ) -> Result<Checked, Refused> {
        let refuse = |problems: Vec<String>| {
            tracing::error!(
                "the reload was refused and nothing was taken; everything stays as it was"
            );
            self.loaded.refused(self.handle.now_ms(), problems);
            Refused
        };
        let next = config::load(args.config.config.as_deref(), &Environment::of_process())
            .map_err(|problems| {
                refuse(
                    problems
                        .iter()
                        .map(|problem| {
                            let place = problem.position().map(|(file, line, column)| {
                                format!("{}:{line}:{column}", file.display())
                            });
                            tracing::error!(place, help = problem.advice(), "{problem}");
                            place.map_or_else(
                                || problem.to_string(),
                                |place| format!("{place}: {problem}"),
                            )
                        })
                        .collect(),
                )
            })?;
        // Everything that can fail comes first, and changes nothing.
        let prepared = self.prepare(&next, current, data).and_then(|prepared| {
            // The last step that can fail, and it changes nothing if it does.
            self.levels.set(&next.log.level).map_err(|error| {
                Failure::new(error.to_string(), "set log.level to something like info")
            })?;
            Ok(prepared)
        });
        let (devices, api, ways) = prepared.map_err(|failure| {
            let what = failure.what();
            tracing::error!(help = failure.help(), "{what}");
            refuse(vec![what])
        })?;

        // Before the runtime, which wakes those who wait for another rule.
        self.caller.set(ways);
        self.handle.reload(&runtime_settings(&next));
        // After the runtime, whose keep-alive bounds go into what QUIC tells new devices.
        self.transport.take(devices);
        if let Some((current, fresh)) = api {
            current.take(fresh);
        }
        let changed = next.changes_since(current).live;
        let waiting = next.changes_since(&self.started_with).restart;
        for setting in &waiting {
            tracing::warn!(
                setting,
                "this was changed, and changes at the next start only"
            );
        }
        for warning in &next.warnings {
            tracing::warn!("{warning}");
        }
        tracing::info!(
            changed = changed.join(" "),
            waiting_for_restart = waiting.join(" "),
            "settings and certificates were read anew"
        );
        self.loaded.taken(self.handle.now_ms(), &changed, &waiting);
        Ok(next)
    }

    /// Reads and checks every certificate that these settings name.
    fn prepare(
        &self,
        next: &Checked,
        current: &Checked,
        data: &DataDir,
    ) -> Result<(Prepared, Option<FreshApi<'_>>, Ways), Failure> {
        // Devices that trust the operator's authority would all be locked out at once.
        if current.tls.is_some() && next.tls.is_none() {
            return Err(Failure::new(
                "tls.cert and tls.key are gone from the settings, and a reload does not put a certificate for development in \
                 place of yours",
                "set them again; to serve with a certificate for development stop the server and start it",
            ));
        }
        let devices = self
            .transport
            .prepare(&devices_tls(next, data)?)
            .map_err(|error| {
                Failure::new(
                    format!("the devices' certificate cannot be used: {error}"),
                    "look at tls.cert and tls.key with: bellwire certs inspect FILE --key FILE",
                )
            })?;
        let api = match (&self.api, &next.api) {
            (Some(api), ApiAccess::Https(pair)) => Some((api, api.load(pair)?)),
            (Some(_) | None, _) => None,
        };
        Ok((devices, api, outbound::ways(next)?))
    }

    /// Goes down in order. Answers whether everything accepted was committed.
    async fn close(self, window: Duration) -> bool {
        self.transport.stop_accepting();
        let drained = self.handle.drain(window).await;
        self.transport.shutdown().await;
        self.shutdown.cancel();
        for serving in self.serving {
            if let Err(error) = serving.await {
                tracing::error!(%error, "a listener broke off");
            }
        }
        drained.committed
    }
}

async fn upkeep(exposition: metrics::Exposition, shutdown: CancellationToken) {
    let mut turn = tokio::time::interval(METRICS_UPKEEP);
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            _ = turn.tick() => exposition.upkeep(),
        }
    }
}

async fn bind(
    key: &dyn config::AnyKey,
    address: SocketAddr,
) -> Result<(TcpListener, SocketAddr), Failure> {
    let failed = |error: &std::io::Error| {
        Failure::new(
            format!(
                "the server cannot listen: {}",
                cannot_listen(key.name(), address, error)
            ),
            "`bellwire check` looks at every port without starting",
        )
    };
    let listener = TcpListener::bind(address)
        .await
        .map_err(|error| failed(&error))?;
    let bound = listener.local_addr().map_err(|error| failed(&error))?;
    Ok((listener, bound))
}

fn device_port(error: &TransportError, data: &DataDir) -> Failure {
    match error {
        TransportError::Bind {
            addr,
            protocol,
            source,
        } => Failure::new(
            format!(
                "the server cannot listen for devices ({protocol}): {}",
                cannot_listen(keys::LISTEN_DEVICES.name, *addr, source)
            ),
            "`bellwire check` looks at every port without starting",
        ),
        TransportError::BindPlain { addr, source } => Failure::new(
            format!(
                "the server cannot listen for load balancers: {}",
                cannot_listen(keys::LISTEN_DEVICES_PLAIN.name, *addr, source)
            ),
            "`bellwire check` looks at every port without starting",
        ),
        TransportError::NoCommonPort(_) => Failure::new(
            error.to_string(),
            format!("set {} to a port of your choice", keys::LISTEN_DEVICES.name),
        ),
        TransportError::Tls(tls) => Failure::new(
            format!("the devices' certificate cannot be used: {tls}"),
            format!(
                "look at tls.cert and tls.key; development certificates lie in {} and may be removed there to be made anew",
                data.path().display()
            ),
        ),
    }
}

/// The first key, where there is none, or one more, where all were lost.
async fn bootstrap(handle: &Handle, data: &DataDir, new_key: bool) -> Outcome {
    let unable = |error: bellwire_server::runtime::RuntimeError| {
        Failure::new(
            format!("no bootstrap key can be made: {error}"),
            "look at the log above and at the disk",
        )
    };
    let mut key = handle.ensure_bootstrap_key().await.map_err(unable)?;
    if key.is_none() && new_key {
        let made = handle
            .create_key(AppId::DEFAULT, "bootstrap", Scopes::ALL)
            .await
            .map_err(unable)?;
        key = Some(made.secret);
    }
    if let Some(key) = key {
        let path = data.write_bootstrap_key(&key)?;
        tracing::info!(path = %path.display(), "an API key with every scope was made; keep the file private");
    }
    Ok(())
}

// ---- Settings to parts ---------------------------------------------------------------------------------------------

pub(super) fn store_settings(checked: &Checked, data: &DataDir) -> StoreSettings {
    let store = &checked.store;
    StoreSettings {
        engine: match store.engine {
            Engine::Sled => EngineKind::Sled,
            Engine::Fjall => EngineKind::Fjall,
            Engine::Memory => EngineKind::Memory,
        },
        memory_bytes: store.memory_bytes,
        segment_bytes: store.segment_bytes,
        snapshot_bytes: store.snapshot_bytes,
        snapshot_every: store.snapshot_every,
        lag_bytes: store.lag_bytes,
        lag_time: store.lag_time,
        rest_time: store.rest_time,
        reserve_bytes: store.reserve_bytes,
        trust_file_system: store.trust_file_system,
        rebuild_factor: store.rebuild_factor,
        backup: checked.backup.as_ref().map(|backup| BackupPlan {
            dir: backup.dir.clone(),
            every: backup.every,
            keep: backup.keep,
            keep_for: backup.keep_for,
        }),
        outcomes_keep: checked.receipts_keep,
        outcomes_max_bytes: checked.receipts_max_bytes,
        ..StoreSettings::new(data.path())
    }
}

fn runtime_settings(checked: &Checked) -> RuntimeSettings {
    let (limits, store, callbacks) = (&checked.limits, &checked.store, &checked.callbacks);
    RuntimeSettings {
        shards: checked.shards.unwrap_or(0),
        policy: Policy {
            mailbox_notifications: limits.mailbox_notifications,
            mailbox_bytes: limits.mailbox_bytes,
            overflow: match limits.mailbox_full {
                MailboxFull::Evict => OverflowRule::Evict,
                MailboxFull::Refuse => OverflowRule::Refuse,
            },
            defer_max: checked.store.defer_max,
            ack_timeout: limits.ack_timeout,
            withdrawals_keep: limits.withdrawals_keep,
            ..Policy::default()
        },
        link: LinkSettings {
            hello_deadline: limits.hello_deadline,
            write_deadline: limits.write_deadline,
            per_address: limits.per_address,
            unauthenticated: limits.unauthenticated,
            exempt: limits.exempt.clone(),
            proxies: checked.proxies.clone(),
            keep_alive_quic_s: (limits.keep_alive_quic.min_s, limits.keep_alive_quic.max_s),
            keep_alive_websocket_s: (
                limits.keep_alive_websocket.min_s,
                limits.keep_alive_websocket.max_s,
            ),
            silence_percent: limits.silence_percent,
            frame_max: size(limits.frame_bytes),
            content_max: limits.content_bytes,
            window_default: window(limits.in_flight),
            window_max: window(limits.in_flight_max),
        },
        limits: Limits {
            content_max: limits.content_bytes,
            ttl_default_s: limits.ttl_default.as_secs(),
            ttl_max_s: limits.ttl_max.as_secs(),
            list_max: limits.list_devices,
            expansions_max: limits.open_expansions,
            memory_reserve: limits.memory_bytes,
            pings_per_second: limits.pings_per_second,
            ping_burst: limits.ping_burst,
            withdrawals_keep: limits.withdrawals_keep,
            backup_stall: limits.backup_stall,
            batch_stall: limits.batch_stall,
            event_streams: usize::try_from(limits.event_streams).unwrap_or(usize::MAX),
            secret_overlap: limits.secret_overlap,
            callbacks: CallbackLimits {
                batch: callbacks.batch,
                retry_max: callbacks.retry_max,
                give_up: callbacks.give_up,
                dead_letters: callbacks.dead_letters,
            },
            drain_window: checked.drain_window,
            wait_default: limits.wait_default,
            wait_max: limits.wait_max,
            body_max: size(limits.body_bytes),
            batch_body_max: size(limits.batch_bytes),
            batch_lines_max: size(u64::from(limits.batch_lines)),
            device_pings_per_second: limits.device_pings_per_second,
            device_ping_burst: limits.device_ping_burst,
            ..Limits::default()
        },
        quotas: Quotas {
            default: quota(checked.quotas.default),
            apps: checked
                .quotas
                .apps
                .iter()
                .map(|(app, own)| (app.clone(), quota(*own)))
                .collect(),
        },
        // What does not fit was refused when the settings were read.
        self_subscribe: Patterns::read(&checked.self_subscribe).unwrap_or_default(),
        receipts_keep: checked.receipts_keep,
        erasures_keep: store.erasures_keep,
        receipts_durable: checked.receipts_durable,
        ..RuntimeSettings::default()
    }
}

/// The bounds of the setting lie below what fits.
fn window(set: u32) -> u16 {
    u16::try_from(set).unwrap_or(u16::MAX)
}

fn size(set: u64) -> usize {
    usize::try_from(set).unwrap_or(usize::MAX)
}

fn quota(set: config::AppQuota) -> AppQuota {
    AppQuota {
        pings_per_day: set.pings_per_day,
        held: Held {
            notifications: set.notifications,
            bytes: set.bytes,
            devices: set.devices,
        },
    }
}
