//! The loop that keeps a session up: race, session, pause.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bellwire_protocol::{Carrier, Hello, PresenceState, ReconnectWhen};
use futures_util::FutureExt;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::builder::Carriers;
use crate::carrier::{ConnectError, Dialer, Link, Route};
use crate::clock::Clock;
use crate::end::Disconnect;
use crate::endpoint::Endpoint;
use crate::handover::{Desk, Events};
use crate::keepalive::Silence;
use crate::membership::Membership;
use crate::notification::Event;
use crate::race::{HEAD_START, staggered};
use crate::reconnect::Backoff;
use crate::session::{self, Command, Ended, Setting};
use crate::state::{Journal, LastSession, Networks, Record, Winner};
use crate::surroundings::Surroundings;

/// How soon after a silence that was not answered a new session must stand, for the network to be blamed, in milliseconds: one
/// that comes later may have had other reasons.
const BLAME_WITHIN_MS: u64 = 60_000;

/// Pause before the next race when the app says that the network changed, at most, in milliseconds.
const AFTER_CHANGE_MS: u64 = 200;

/// How long the disk may take for what is only advice.
const NOTE_MAX: Duration = Duration::from_secs(1);

/// Keeps a session up.
pub(crate) struct Keeper {
    /// As it will be said; `attempt` and `seen` change.
    pub(crate) hello: Hello,
    /// The server that was configured.
    pub(crate) home: Dialer,
    /// The server to try next.
    pub(crate) dialer: Dialer,
    pub(crate) carriers: Carriers,
    pub(crate) keep_alive_s: Option<u32>,
    pub(crate) surroundings: Surroundings,
    pub(crate) networks: Networks,
    pub(crate) state_dir: PathBuf,
    pub(crate) last: Option<LastSession>,
    /// A silence that was perhaps lost, until a new session on the same network shows that nothing else was wrong.
    pub(crate) suspect: Option<Suspect>,
    /// A carrier that connected but bore no session: the other one goes first.
    pub(crate) demoted: Option<Route>,
    pub(crate) backoff: Backoff,
    pub(crate) desk: Arc<Desk>,
    pub(crate) journal: Arc<Mutex<Journal>>,
    pub(crate) membership: Arc<Membership>,
    pub(crate) events: Events,
    pub(crate) clock: Arc<Clock>,
    pub(crate) commands: mpsc::Receiver<Command>,
    pub(crate) leaving: CancellationToken,
    /// What the app said last of whether a person uses it.
    pub(crate) presence: Option<PresenceState>,
}

/// A silence that was perhaps lost.
pub(crate) struct Suspect {
    network: String,
    mark: u64,
    carrier: Carrier,
    silent_ms: u64,
    at_ms: u64,
}

/// What comes after waiting.
enum Next {
    Connect,
    Leave,
}

impl Keeper {
    /// Runs until the app leaves, or the server says never to come back.
    pub(crate) async fn run(mut self) {
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
                    // Said when there is a session.
                    Some(Command::Presence(state)) => self.presence = Some(state),
                    Some(Command::Topics) => {}
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
            membership: &self.membership,
            events: &self.events,
            clock,
            presence: &mut self.presence,
            commands: &mut self.commands,
            leaving: &self.leaving,
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
                // A last verdict of the wanted number may come now. Other verdicts stand in `seen` of the next `hello`.
                taken = self.desk.decided() => {
                    if taken.closed {
                        return Next::Leave;
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
                    Some(Command::Presence(state)) => self.presence = Some(state),
                    Some(Command::Topics) => {}
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
        match tokio::time::timeout(NOTE_MAX, noted).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => {
                tracing::debug!(%error, "cannot note that the server has every verdict");
            }
            Ok(Err(_)) | Err(_) => {
                tracing::debug!("the disk does not take it that the server has every verdict");
            }
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
