//! The device port: one number, TCP for WebSocket and UDP for QUIC, and the tasks that let connections in.

use std::future::Future;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code};
use metrics::gauge;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{MissedTickBehavior, Sleep, interval, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::admission::{Admission, Knock};
use super::door::Door;
use super::link::{Link, Shared, silence};
use super::meters::Meters;
use super::outbox::Kick;
use super::pace::{Pace, Place};
use super::proxy::Unfit;
use super::quic::{self, Connection, Endpoint, Gate, Judgement, Proof};
use super::tls::{Prepared, Tls, TlsError, TlsSettings};
use super::websocket;
use super::websocket::ProxyTrouble;
use super::wheel::Wheel;
use super::wire;
use crate::telemetry::metrics as names;

/// Connections that the system holds ready for the accepting task.
const BACKLOG: i32 = 4_096;

/// Buffer asked of the system for UDP in each direction, in bytes: 20 ms of a gigabit. What a system grants by default
/// drops packets when a fleet reconnects.
const UDP_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Port 0: how often TCP gives a number that UDP has taken, before we give up.
const PORT_TRIES: u32 = 64;

/// Shortest pause of accepting while the system is out of something; doubled each time up to a second.
const PAUSE_MIN: Duration = Duration::from_millis(10);

/// Longest pause of accepting.
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// How often the operator is told that a load balancer is set up wrongly.
const COMPLAINT_EVERY: Duration = Duration::from_secs(60);

/// What to do about a stranger on the listener for load balancers.
const NOT_A_PROXY: &str = "only load balancers connect here: if this is one of yours, add its network to listen.proxy_networks";

/// Time that a handshake needs before the hello deadline to be begun.
const SHAKE_MIN: Duration = Duration::from_secs(2);

/// One tick of the wheel.
const TICK: Duration = Duration::from_secs(1);

/// How long [`Transport::shutdown`] waits for links to say good-bye: grace for last verdicts, lingering, and a little.
const SHUTDOWN_MAX: Duration = Duration::from_secs(10);

/// What the device port needs to know. Limits come from the runtime, so that a reload reaches them.
#[derive(Debug, Clone)]
pub struct TransportSettings {
    /// Where to listen. Port 0 picks one.
    pub addr: SocketAddr,
    /// Where load balancers bring devices from whose connections they took TLS; `None`: nowhere. Port 0 picks one.
    pub plain: Option<SocketAddr>,
    /// The certificate shown on both carriers.
    pub tls: TlsSettings,
    /// Counts connections from loopback by address, like all others. Default false: a proxy or a load generator on
    /// this machine speaks for many.
    pub count_loopback: bool,
}

/// Why the device port does not open. All of it is the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Certificate or key.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The address.
    #[error("cannot listen on {addr} ({protocol}): {source}")]
    Bind {
        /// Which address.
        addr: SocketAddr,
        /// TCP or UDP.
        protocol: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The address for load balancers.
    #[error("cannot listen on {addr} for load balancers: {source}")]
    BindPlain {
        /// Which address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// No number was free for both TCP and UDP.
    #[error("no port of {0} is free for both TCP and UDP")]
    NoCommonPort(std::net::IpAddr),
}

/// The device port, open. Dropping it does not close it; [`Transport::shutdown`] does.
pub struct Transport {
    local_addr: SocketAddr,
    plain_addr: Option<SocketAddr>,
    tls: Arc<Tls>,
    wheel: Arc<Wheel>,
    endpoint: Endpoint,
    /// What the endpoint's configuration is made of at a reload.
    silence: Box<dyn Fn() -> Duration + Send + Sync>,
    admission: Admission,
    /// Stops accepting, and sends away whoever waits to begin.
    accepting: CancellationToken,
    /// Ends the ways in that have begun.
    closing: CancellationToken,
    /// Stops the wheel.
    turning: CancellationToken,
    /// Everything that belongs to connections.
    tasks: TaskTracker,
}

/// Connections of devices that have not said hello yet. Cheap to clone.
#[derive(Clone)]
pub struct Knocking(Admission);

impl Knocking {
    /// How many there are.
    #[must_use]
    pub fn total(&self) -> u32 {
        self.0.total()
    }

    /// How many the busiest address has, of those that are counted by address. Looks at all of them: for people, not for loops.
    #[must_use]
    pub fn busiest(&self) -> u32 {
        self.0.busiest()
    }
}

impl Transport {
    /// Opens the port and serves devices at `door`.
    ///
    /// # Errors
    /// When the certificate cannot be used or the address cannot be bound.
    pub fn start<D: Door>(
        door: D,
        settings: &TransportSettings,
    ) -> Result<Transport, TransportError> {
        let tls = Arc::new(Tls::new(&settings.tls)?);
        let (tcp, udp) = bind(settings.addr)?;
        let failed = |protocol| {
            move |source| TransportError::Bind {
                addr: settings.addr,
                protocol,
                source,
            }
        };
        let local_addr = tcp.local_addr().map_err(failed("TCP"))?;
        let tcp = TcpListener::from_std(tcp).map_err(failed("TCP"))?;
        let config = quic::server_config(tls.quic(), silence(&door, Carrier::Quic));
        let plain = settings.plain.map(bind_plain).transpose()?;

        let wheel = Arc::new(Wheel::new());
        let port = Port {
            shared: Arc::new(Shared {
                door: door.clone(),
                wheel: Arc::clone(&wheel),
                quic: Meters::new(Carrier::Quic),
                websocket: Meters::new(Carrier::WebSocket),
            }),
            admission: Admission::new(settings.count_loopback),
            pace: Pace::new(),
            tls: Arc::clone(&tls),
            tasks: TaskTracker::new(),
            accepting: CancellationToken::new(),
            closing: CancellationToken::new(),
            complaints: Arc::default(),
        };
        let endpoint = Endpoint::start(udp, config, port.clone()).map_err(failed("UDP"))?;
        let transport = Transport {
            local_addr,
            plain_addr: plain.as_ref().map(|(_, addr)| *addr),
            tls,
            wheel: Arc::clone(&wheel),
            endpoint,
            silence: Box::new(move || silence(&door, Carrier::Quic)),
            admission: port.admission.clone(),
            accepting: port.accepting.clone(),
            closing: port.closing.clone(),
            turning: CancellationToken::new(),
            tasks: port.tasks.clone(),
        };
        tokio::spawn(turn(
            wheel,
            port.admission.clone(),
            transport.turning.clone(),
        ));
        if let Some((listener, address)) = plain {
            tokio::spawn(accept_tcp(port.clone(), listener, Way::Plain));
            info!(%address, "load balancers may bring devices without TLS, with a PROXY header of version 2");
        }
        tokio::spawn(accept_tcp(port, tcp, Way::Tls));
        info!(address = %local_addr, "devices are served over QUIC and WebSocket");
        Ok(transport)
    }

    /// The address really bound.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// The address really bound for load balancers.
    #[must_use]
    pub fn plain_addr(&self) -> Option<SocketAddr> {
        self.plain_addr
    }

    /// Links that are open, and connections on their way to one.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.tasks.len()
    }

    /// Reads and checks another certificate for [`Transport::take`]. Changes nothing.
    ///
    /// # Errors
    /// When the certificate cannot be used.
    pub fn prepare(&self, tls: &TlsSettings) -> Result<Prepared, TlsError> {
        self.tls.prepare(tls)
    }

    /// Takes another certificate, and the keep-alive bounds that the runtime has by now, for new connections. Living
    /// ones keep theirs, and tickets stay good.
    pub fn take(&self, prepared: Prepared) {
        self.tls.take(prepared);
        if self.accepting.is_cancelled() {
            // Going down: QUIC lets nobody in any more, and must not begin again.
            return;
        }
        let config = quic::server_config(self.tls.quic(), (self.silence)());
        self.endpoint.set_server_config(Some(config));
    }

    /// [`Transport::prepare`] and [`Transport::take`] in one.
    ///
    /// # Errors
    /// When the certificate cannot be used; nothing changes then.
    pub fn reload(&self, tls: &TlsSettings) -> Result<(), TlsError> {
        self.take(self.prepare(tls)?);
        Ok(())
    }

    /// Tells who knocks, at any time.
    #[must_use]
    pub fn knocking(&self) -> Knocking {
        Knocking(self.admission.clone())
    }

    /// Lets nobody in any more, and leaves the living links alone: the first step of a drain.
    pub fn stop_accepting(&self) {
        self.accepting.cancel();
        self.endpoint.set_server_config(None);
    }

    /// Closes the port: sends the links away that are still there, and waits until all are gone, for some seconds at
    /// most. Call it after the runtime has drained.
    pub async fn shutdown(self) {
        self.stop_accepting();
        self.closing.cancel();
        self.tasks.close();
        self.wheel.kick_all(Kick::Shutdown);
        if timeout(SHUTDOWN_MAX, self.tasks.wait()).await.is_err() {
            warn!(
                left = self.tasks.len(),
                "links did not end in time; they are cut off"
            );
        }
        let code = Code::Drain;
        self.endpoint
            .close(quic::close_number(code), code.meaning().as_bytes());
        // Gives the last packets their way out; a peer that does not answer is not waited for.
        let _ = timeout(TICK, self.endpoint.wait_idle()).await;
        self.turning.cancel();
    }
}

// ---- Sockets -------------------------------------------------------------------------------------------------------

/// Binds TCP, then UDP on the same number.
fn bind(addr: SocketAddr) -> Result<(std::net::TcpListener, UdpSocket), TransportError> {
    let failed = |protocol| {
        move |source| TransportError::Bind {
            addr,
            protocol,
            source,
        }
    };
    for _ in 0..PORT_TRIES {
        let tcp = bind_tcp(addr).map_err(failed("TCP"))?;
        let bound = tcp.local_addr().map_err(failed("TCP"))?;
        match bind_udp(bound) {
            Ok(udp) => return Ok((tcp, udp)),
            Err(error) if addr.port() == 0 && error.kind() == io::ErrorKind::AddrInUse => {
                debug!(
                    port = bound.port(),
                    "UDP has this port taken; trying another"
                );
            }
            Err(error) => return Err(failed("UDP")(error)),
        }
    }
    Err(TransportError::NoCommonPort(addr.ip()))
}

fn socket(addr: SocketAddr, kind: Type, protocol: Protocol) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), kind, Some(protocol))?;
    if addr.is_ipv6() && addr.ip().is_unspecified() {
        // `[::]` means everybody, whatever the system's default is.
        socket.set_only_v6(false)?;
    }
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn bind_tcp(addr: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = socket(addr, Type::STREAM, Protocol::TCP)?;
    // Connections of the last run may still be in TIME_WAIT. Windows means something else by it.
    #[cfg(not(windows))]
    socket.set_reuse_address(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Binds the listener for load balancers.
fn bind_plain(addr: SocketAddr) -> Result<(TcpListener, SocketAddr), TransportError> {
    let bound = || {
        let listener = TcpListener::from_std(bind_tcp(addr)?)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    bound().map_err(|source| TransportError::BindPlain { addr, source })
}

fn bind_udp(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket(addr, Type::DGRAM, Protocol::UDP)?;
    // Asking is free; how much is granted is the system's limit, and worth a line.
    let _ = socket.set_recv_buffer_size(UDP_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(UDP_BUFFER_BYTES);
    let receive = socket.recv_buffer_size().unwrap_or(0);
    let send = socket.send_buffer_size().unwrap_or(0);
    if receive < UDP_BUFFER_BYTES || send < UDP_BUFFER_BYTES {
        info!(
            receive,
            send,
            wanted = UDP_BUFFER_BYTES,
            "the system grants smaller UDP buffers; for large fleets raise net.core.rmem_max and net.core.wmem_max"
        );
    }
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

// ---- Tasks ---------------------------------------------------------------------------------------------------------

/// What the accepting tasks share.
struct Port<D> {
    shared: Arc<Shared<D>>,
    admission: Admission,
    pace: Pace,
    tls: Arc<Tls>,
    tasks: TaskTracker,
    accepting: CancellationToken,
    closing: CancellationToken,
    complaints: Arc<Complaints>,
}

impl<D: Door> Port<D> {
    /// Tells the operator of a load balancer that is set up wrongly, now and then.
    fn complain(&self, peer: SocketAddr, mistake: Mistake) {
        let advice = mistake.advice();
        if self.complaints.due(mistake, self.shared.door.now_ms()) {
            warn!(%peer, advice, "a connection on listen.devices_plain was refused; others like it are not logged for a minute");
        } else {
            debug!(%peer, advice, "a connection on listen.devices_plain was refused");
        }
    }
}

impl<D> Clone for Port<D> {
    fn clone(&self) -> Port<D> {
        Port {
            shared: Arc::clone(&self.shared),
            admission: self.admission.clone(),
            pace: self.pace.clone(),
            tls: Arc::clone(&self.tls),
            tasks: self.tasks.clone(),
            accepting: self.accepting.clone(),
            closing: self.closing.clone(),
            complaints: Arc::clone(&self.complaints),
        }
    }
}

/// By which door a TCP connection came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The device port.
    Tls,
    /// The listener for load balancers.
    Plain,
}

/// What is wrong with a connection on the listener for load balancers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    /// It does not come from a balancer that is listed.
    NotAProxy,
    /// What the balancer says of it cannot be taken.
    Header(Unfit),
}

impl Mistake {
    const COUNT: usize = 1 + Unfit::COUNT;

    fn advice(self) -> &'static str {
        match self {
            Mistake::NotAProxy => NOT_A_PROXY,
            Mistake::Header(unfit) => unfit.advice(),
        }
    }

    fn place(self) -> usize {
        match self {
            Mistake::NotAProxy => 0,
            Mistake::Header(unfit) => 1 + unfit as usize,
        }
    }
}

/// When the operator was last told of each mistake.
#[derive(Debug, Default)]
struct Complaints {
    last_ms: [AtomicU64; Mistake::COUNT],
}

impl Complaints {
    /// Whether to tell again. A balancer brings thousands of connections, each with the same mistake; a stranger's must not hide
    /// what is wrong with it.
    fn due(&self, mistake: Mistake, now_ms: u64) -> bool {
        let told = &self.last_ms[mistake.place()];
        let last = told.load(Ordering::Relaxed);
        (last == 0 || now_ms.saturating_sub(last) >= millis(COMPLAINT_EVERY))
            && told
                .compare_exchange(last, now_ms.max(1), Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

async fn turn(wheel: Arc<Wheel>, admission: Admission, turning: CancellationToken) {
    let unauthenticated = gauge!(names::LINKS_UNAUTHENTICATED);
    let mut ticks = interval(TICK);
    // After a stall of the machine time goes on from where it was, or all devices would seem silent.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while turning.run_until_cancelled(ticks.tick()).await.is_some() {
        wheel.advance();
        unauthenticated.set(admission.total());
    }
}

async fn accept_tcp<D: Door>(port: Port<D>, listener: TcpListener, way: Way) {
    let meters = &port.shared.websocket;
    let mut pause = PAUSE_MIN;
    while let Some(accepted) = port.accepting.run_until_cancelled(listener.accept()).await {
        match accepted {
            Ok((tcp, peer)) => {
                pause = PAUSE_MIN;
                let limits = port.shared.door.link_settings();
                let knock = match way {
                    Way::Tls => port.admission.knock(peer.ip(), &limits),
                    Way::Plain if !Admission::is_proxy(peer.ip(), &limits) => {
                        meters.refused("not_a_proxy");
                        port.complain(peer, Mistake::NotAProxy);
                        websocket::reset(&tcp);
                        continue;
                    }
                    Way::Plain => port.admission.knock_through_proxy(&limits),
                };
                match knock {
                    Ok(knock) => {
                        meters.accepted();
                        let (port, tasks) = (port.clone(), &port.tasks);
                        match way {
                            Way::Tls => tasks.spawn(serve_tcp(port, tcp, peer, knock)),
                            Way::Plain => tasks.spawn(serve_plain(port, tcp, peer, knock)),
                        };
                    }
                    Err(crowded) => {
                        meters.refused(crowded.as_str());
                        websocket::reset(&tcp);
                    }
                }
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                // Out of file descriptors or memory: trying at once would only burn a core.
                meters.refused("accept_failed");
                warn!(%error, ?pause, "connections cannot be accepted; pausing");
                sleep(pause).await;
                pause = (pause * 2).min(PAUSE_MAX);
            }
        }
    }
}

/// Whether a failure to accept says something about the connection that was to be accepted, rather than about us.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::TimedOut
    )
}

/// How a TCP connection begins that has said something.
enum Start {
    /// With a handshake, in this place.
    Shake(Place),
    /// Not with TLS, but with this byte.
    Away(u8),
}

async fn serve_tcp<D: Door>(port: Port<D>, tcp: TcpStream, peer: SocketAddr, knock: Knock) {
    let settings = port.shared.door.link_settings();
    let mut deadline = Box::pin(sleep(settings.hello_deadline));
    if let Err(error) = websocket::prepare(&tcp, settings.write_deadline) {
        debug!(%peer, %error, "the socket's options cannot be set");
    }
    let begin_until = deadline.deadline() - time_to_shake(settings.hello_deadline);
    let wait = async {
        // A place is for those who have something to say. That a socket is said to be readable does not mean that there is
        // something to read.
        let mut first = [0];
        if !matches!(tcp.peek(&mut first).await, Ok(1..)) {
            return Err("closed");
        }
        if !wire::begins_tls(first[0]) {
            // There is no handshake to wait for, and whoever speaks HTTP may have said its last word before the answer.
            return Ok(Start::Away(first[0]));
        }
        // With too little time left no handshake begins; whoever speaks late and need not wait is let in as ever.
        let place = timeout_at(begin_until, port.pace.place())
            .await
            .map_err(|_| Code::HelloTimeout.name())?;
        is_still_there(&tcp).await.map(|()| Start::Shake(place))
    };
    let begin = tokio::select! {
        place = wait => place,
        () = &mut deadline => Err(Code::HelloTimeout.name()),
        // Whoever has not begun is not let in any more.
        () = port.accepting.cancelled() => Err(Code::Drain.name()),
    };
    let accepted = match begin {
        Ok(Start::Away(first)) => {
            let answer = async { Err(websocket::turn_away(tcp, first).await) };
            within(&port, &mut deadline, answer).await
        }
        Ok(Start::Shake(place)) => {
            let handshake = websocket::accept(tcp, port.tls.tcp(), settings.frame_max);
            let handshake = port.pace.in_place(place, Box::pin(handshake));
            within(&port, &mut deadline, handshake).await
        }
        Err(reason) => Err(reason),
    };
    link(&port, accepted, knock, deadline, peer);
}

/// With less time than this to the hello deadline no handshake begins: the round trips of a slow network, or a quarter of a
/// deadline that is shorter than most.
fn time_to_shake(hello_deadline: Duration) -> Duration {
    (hello_deadline / 4).min(SHAKE_MIN)
}

/// Whether a device that waited for its place has not given up meanwhile.
async fn is_still_there(tcp: &TcpStream) -> Result<(), websocket::Refusal> {
    let ready = tcp.ready(Interest::READABLE).await;
    match ready.map_or(true, |ready| ready.is_read_closed()) {
        true => Err("closed"),
        false => Ok(()),
    }
}

/// The way in, while there is time and the server does not go down.
async fn within<D, T>(
    port: &Port<D>,
    deadline: &mut Pin<Box<Sleep>>,
    way_in: impl Future<Output = Result<T, websocket::Refusal>>,
) -> Result<T, websocket::Refusal> {
    tokio::select! {
        accepted = way_in => accepted,
        () = deadline => Err(Code::HelloTimeout.name()),
        () = port.closing.cancelled() => Err(Code::Drain.name()),
    }
}

/// Serves a connection that a load balancer brings.
async fn serve_plain<D: Door>(
    port: Port<D>,
    mut tcp: TcpStream,
    proxy: SocketAddr,
    mut knock: Knock,
) {
    let settings = port.shared.door.link_settings();
    let mut deadline = Box::pin(sleep(settings.hello_deadline));
    if let Err(error) = websocket::prepare(&tcp, settings.write_deadline) {
        debug!(%proxy, %error, "the socket's options cannot be set");
    }
    let header = tokio::select! {
        header = websocket::read_proxy_header(&mut tcp) => header,
        () = &mut deadline => {
            port.shared.websocket.refused(Code::HelloTimeout.name());
            return;
        }
        () = port.accepting.cancelled() => {
            port.shared.websocket.refused(Code::Drain.name());
            return;
        }
    };
    let peer = match header {
        Ok(from) => from.unwrap_or(proxy),
        Err(ProxyTrouble::Closed) => {
            port.shared.websocket.refused("closed");
            return;
        }
        Err(ProxyTrouble::Unfit(unfit)) => {
            port.shared.websocket.refused(unfit.as_str());
            port.complain(proxy, Mistake::Header(unfit));
            return;
        }
    };
    // The balancer's own connections are few, and it is trusted not to make many.
    if peer != proxy
        && let Err(crowded) = port.admission.name(&mut knock, peer.ip(), &settings)
    {
        port.shared.websocket.refused(crowded.as_str());
        websocket::reset(&tcp);
        return;
    }
    let way_in = websocket::accept_plain(tcp, settings.frame_max);
    let accepted = within(&port, &mut deadline, way_in).await;
    link(&port, accepted, knock, deadline, peer);
}

/// Starts the link of a WebSocket that stands.
fn link<D: Door>(
    port: &Port<D>,
    accepted: Result<websocket::WebSocketPipe, websocket::Refusal>,
    knock: Knock,
    deadline: Pin<Box<Sleep>>,
    peer: SocketAddr,
) {
    match accepted {
        Ok(pipe) => {
            // A fresh task: this one keeps the size of the handshake.
            let shared = Arc::clone(&port.shared);
            port.tasks
                .spawn(Link::new(shared, pipe, knock, deadline, peer));
        }
        Err(reason) => {
            debug!(%peer, reason, "a TCP connection is no device link");
            port.shared.websocket.refused(reason);
        }
    }
}

/// A QUIC connection on its way in.
struct Arrival {
    knock: Knock,
    deadline: Pin<Box<Sleep>>,
    frame_max: usize,
}

impl<D: Door> Gate for Port<D> {
    type Ticket = Arrival;

    fn judge(&mut self, peer: SocketAddr, proof: Proof) -> Judgement<Arrival> {
        let meters = &self.shared.quic;
        let limits = self.shared.door.link_settings();
        let is_due = match proof {
            Proof::Given => false,
            Proof::Possible => self.admission.wants_proof(peer.ip(), &limits),
            Proof::Due => true,
        };
        if is_due {
            meters.refused("retry");
            return Judgement::Prove;
        }
        match self.admission.knock(peer.ip(), &limits) {
            Ok(knock) => {
                meters.accepted();
                Judgement::Admit(Arrival {
                    knock,
                    deadline: Box::pin(sleep(limits.hello_deadline)),
                    frame_max: limits.frame_max,
                })
            }
            Err(crowded) => {
                meters.refused(crowded.as_str());
                Judgement::Refuse
            }
        }
    }

    fn admit(&mut self, connection: Connection, peer: SocketAddr, arrival: Arrival) {
        self.tasks
            .spawn(serve_quic(self.clone(), connection, peer, arrival));
    }

    fn failed(&mut self, peer: SocketAddr, _: Arrival, reason: &'static str) {
        no_device_link(self, peer, reason);
    }
}

fn no_device_link<D>(port: &Port<D>, peer: SocketAddr, reason: &'static str) {
    debug!(%peer, reason, "a QUIC connection is no device link");
    port.shared.quic.refused(reason);
}

async fn serve_quic<D: Door>(
    port: Port<D>,
    connection: Connection,
    peer: SocketAddr,
    arrival: Arrival,
) {
    let Arrival {
        knock,
        mut deadline,
        frame_max,
    } = arrival;
    let way_in = quic::accept(
        connection,
        deadline.as_mut(),
        port.closing.cancelled(),
        frame_max,
    );
    match port.pace.in_turns(Box::pin(way_in)).await {
        Ok(pipe) => {
            let shared = Arc::clone(&port.shared);
            port.tasks
                .spawn(Link::new(shared, pipe, knock, deadline, peer));
        }
        Err(reason) => no_device_link(&port, peer, reason),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::io::AsyncWriteExt;

    #[tokio::test]
    async fn no_handshake_begins_with_a_device_that_left() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut device = TcpStream::connect(listener.local_addr().unwrap())
            .await
            .unwrap();
        let (tcp, _) = listener.accept().await.unwrap();
        device.write_all(&[0x16, 3, 1]).await.unwrap();
        tcp.readable().await.unwrap();
        assert_eq!(is_still_there(&tcp).await, Ok(()));
        drop(device);
        // What it said is still there to be read.
        let left = async {
            while is_still_there(&tcp).await.is_ok() {
                sleep(Duration::from_millis(1)).await;
            }
        };
        timeout(Duration::from_secs(20), left).await.unwrap();
        assert_eq!(is_still_there(&tcp).await, Err("closed"));
    }

    #[test]
    fn a_short_hello_deadline_leaves_time_to_begin() {
        assert_eq!(time_to_shake(Duration::from_secs(10)), SHAKE_MIN);
        let short = Duration::from_millis(400);
        assert_eq!(time_to_shake(short), short / 4);
    }

    #[test]
    fn a_mistake_is_told_once_a_minute_and_hides_no_other() {
        let complaints = Complaints::default();
        let stranger = Mistake::NotAProxy;
        assert!(complaints.due(stranger, 1_000));
        assert!(!complaints.due(stranger, 60_999));
        for unfit in [Unfit::Missing, Unfit::Version1, Unfit::Checksum] {
            assert!(complaints.due(Mistake::Header(unfit), 1_000), "{unfit:?}");
            assert!(!complaints.due(Mistake::Header(unfit), 2_000), "{unfit:?}");
        }
        assert!(complaints.due(stranger, 61_000));
    }
}
