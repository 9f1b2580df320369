//! The endpoint: takes datagrams from the socket, finds whose they are, and lets connections in.
//!
//! One task holds it, and nobody waits for it: connections put what they have for it into the [`Hub`], and get what comes for
//! them through a [`Wire`] each. Who was let in begins when one of the places for handshakes is free (`pace.rs`), the newest
//! first; until then there is nothing of it but its first datagrams. Of those who wait the newest is the likeliest to be still
//! there: a device that has waited for some hundred milliseconds tries WebSocket too, and takes what stands first.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    ConnectionHandle, DatagramEvent, EcnCodepoint, EndpointConfig, EndpointEvent, Incoming,
    RandomConnectionIdGenerator, ServerConfig, Transmit, VarInt,
};
use quinn_udp::{BATCH_SIZE, RecvMeta};
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::sleep;
use tracing::warn;

use super::connection::{Connection, Wire};
use super::socket::Socket;
use super::time::now;
use crate::transport::pace::Pace;

/// Calls of the system for receiving before others have their turn; each brings up to 32 buffers.
const RECEIVES_PER_TURN: usize = 8;

/// Pause after the socket failed to receive.
const PAUSE: Duration = Duration::from_millis(100);

/// Connections that wait for a place. When one more comes the oldest is dropped, and comes again by itself if it is still
/// there, as after a lost packet.
pub(super) const WAITING_MAX: usize = 4_096;

/// Bytes kept of what a connection says while it waits, beside its first datagram: the rest of its first flight, sent again
/// twice.
pub(super) const WAITING_BYTES: u64 = 8 * 1024;

/// The same of all that wait.
pub(super) const WAITING_BYTES_TOTAL: u64 = WAITING_BYTES * WAITING_MAX as u64 / 4;

/// How long somebody may wait for a place before it counts as gone. A device that is still there says its first words again
/// after one second and after three (RFC 9002 section 6.2), and with the third time it is a newcomer.
const PATIENCE: Duration = Duration::from_millis(2_500);

/// As long as fewer than one in so many places are free, newcomers prove their address first.
const PROOF_FROM_SHARE: usize = 4;

/// Connections that begin before others have their turn. The protocol answers a first flight as soon as it is told of it, so
/// each may be the key exchange and signature of a handshake, in the endpoint's task and without a turn.
const BEGINS_PER_TURN: usize = 4;

/// Shortest datagram with which a device may begin (RFC 9000 section 14.1).
const FIRST_BYTES_MIN: usize = 1_200;

/// Length of a connection's ids. Among ten million of them a new one is in use once in 10¹² times.
const CONNECTION_ID_BYTES: usize = 8;

/// What is done with a connection that knocks.
pub(crate) enum Judgement<T> {
    /// It comes in, with what [`Gate::admit`] gets back.
    Admit(T),
    /// It shall prove first that it is where it says it is.
    Prove,
    /// It stays outside, and is told so.
    Refuse,
}

/// Who decides which connections come in. Asked by the endpoint's task, so it must not block.
pub(crate) trait Gate: Send + 'static {
    /// What belongs to a connection on its way in.
    type Ticket: Send;

    /// Decides about a newcomer.
    fn judge(&mut self, peer: SocketAddr, proof: Proof) -> Judgement<Self::Ticket>;

    /// Takes a connection whose handshake has begun.
    fn admit(&mut self, connection: Connection, peer: SocketAddr, ticket: Self::Ticket);

    /// Nothing came of it. The reason is a word for metrics.
    fn failed(&mut self, peer: SocketAddr, ticket: Self::Ticket, reason: &'static str);
}

/// Whether a newcomer is where it says it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Proof {
    /// It has shown it, or cannot be asked.
    Given,
    /// It may be asked to show it.
    Possible,
    /// The same, and it should be: others wait for places, or few are left.
    Due,
}

/// What bounds those who have not come in yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Handshakes that go on at a time.
    pub(super) places: usize,
    /// Connections that wait for one.
    pub(super) waiting: usize,
    /// How long they count as still there.
    pub(super) patience: Duration,
}

/// Somebody who may come in and waits for a place.
struct Waiting<T> {
    incoming: Incoming,
    peer: SocketAddr,
    ticket: T,
    since: Instant,
}

/// What the connections have for the endpoint, and the operator.
#[derive(Default)]
struct Told {
    events: Vec<(ConnectionHandle, EndpointEvent)>,
    config: Option<Option<Arc<ServerConfig>>>,
    close: Option<(VarInt, Bytes)>,
}

/// What the endpoint shares with its connections.
pub(super) struct Hub {
    pub(super) socket: Socket,
    told: Mutex<Told>,
    news: Notify,
    pub(super) open: AtomicUsize,
    idle: Notify,
    /// Places for handshakes that are free.
    places: AtomicUsize,
}

/// The place of a handshake; dropping it gives it back.
pub(super) struct Place(Arc<Hub>);

impl Drop for Place {
    fn drop(&mut self) {
        // Whoever waits does so because there was none.
        if self.0.places.fetch_add(1, Ordering::AcqRel) == 0 {
            self.0.news.notify_one();
        }
    }
}

impl Hub {
    /// A place, if one is free.
    fn place(self: &Arc<Hub>) -> Option<Place> {
        self.places
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |free| {
                free.checked_sub(1)
            })
            .is_ok()
            .then(|| Place(Arc::clone(self)))
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Nothing in there can be half done.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the endpoint something of a connection.
    pub(super) fn tell(&self, handle: ConnectionHandle, event: EndpointEvent) {
        self.told().events.push((handle, event));
        self.news.notify_one();
    }
}

/// The handle of the endpoint. Dropping it changes nothing; [`Endpoint::close`] ends it.
pub(crate) struct Endpoint(Arc<Hub>);

impl Endpoint {
    /// Serves QUIC on a bound socket that does not block, in a task of its own.
    ///
    /// # Errors
    /// When the system does not give what a UDP socket needs.
    pub(crate) fn start<G: Gate>(
        socket: UdpSocket,
        config: ServerConfig,
        gate: G,
    ) -> io::Result<Endpoint> {
        let bounds = Bounds {
            places: Pace::places_of_this_machine(),
            waiting: WAITING_MAX,
            patience: PATIENCE,
        };
        Endpoint::with_bounds(socket, config, gate, bounds)
    }

    pub(super) fn with_bounds<G: Gate>(
        socket: UdpSocket,
        config: ServerConfig,
        gate: G,
        bounds: Bounds,
    ) -> io::Result<Endpoint> {
        let hub = Arc::new(Hub {
            socket: Socket::new(socket)?,
            told: Mutex::default(),
            news: Notify::new(),
            open: AtomicUsize::new(0),
            idle: Notify::new(),
            places: AtomicUsize::new(bounds.places),
        });
        let rules = rules();
        let datagram_max = usize::try_from(rules.get_max_udp_payload_size()).unwrap_or(usize::MAX);
        let config = Some(Arc::new(config));
        let proto = quinn_proto::Endpoint::new(
            Arc::new(rules),
            config.clone(),
            !hub.socket.may_fragment(),
            None,
        );
        let serving = Serving {
            proto,
            config,
            bounds,
            datagram_max,
            hub: Arc::clone(&hub),
            wires: Vec::new(),
            gate,
            waiting: VecDeque::new(),
            closed: None,
            response: Vec::new(),
        };
        tokio::spawn(serving.run());
        Ok(Endpoint(hub))
    }

    /// Another configuration for connections to come; `None`: none comes in any more. Living ones keep theirs.
    pub(crate) fn set_server_config(&self, config: Option<ServerConfig>) {
        self.0.told().config = Some(config.map(Arc::new));
        self.0.news.notify_one();
    }

    /// Closes all connections, lets no other in, and ends the endpoint once they are gone.
    pub(crate) fn close(&self, code: VarInt, reason: &[u8]) {
        self.0.told().close = Some((code, Bytes::copy_from_slice(reason)));
        self.0.news.notify_one();
    }

    #[cfg(test)]
    pub(super) fn hub(&self) -> &Hub {
        &self.0
    }

    /// Waits until there are no connections.
    pub(crate) async fn wait_idle(&self) {
        loop {
            // Counts from here on, even if it is not waited for yet.
            let idle = self.0.idle.notified();
            if self.0.open.load(Ordering::Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }
}

/// How the endpoint speaks, whatever is configured.
fn rules() -> EndpointConfig {
    let mut rules = EndpointConfig::default();
    rules.cid_generator(|| Box::new(connection_ids()));
    rules
}

/// Makes the ids by which datagrams are told apart. Every bit of them is by chance. Those that quinn-proto makes by itself
/// leave 24 bits to chance, and the id in a Retry is compared with none of a living connection: beside 200,000
/// connections with a few ids each, one in twenty of those who have to prove their address would take up an id that is in use, and wait
/// for an answer that never comes.
fn connection_ids() -> RandomConnectionIdGenerator {
    RandomConnectionIdGenerator::new(CONNECTION_ID_BYTES)
}

/// The endpoint in its task.
struct Serving<G: Gate> {
    proto: quinn_proto::Endpoint,
    /// What those who begin now get; `None`: nobody comes in any more.
    config: Option<Arc<ServerConfig>>,
    bounds: Bounds,
    /// The largest datagram that we say we take, in bytes.
    datagram_max: usize,
    hub: Arc<Hub>,
    /// By the number of the connection's handle.
    wires: Vec<Option<Arc<Wire>>>,
    gate: G,
    /// Those who may come in and wait for a place, the oldest in front.
    waiting: VecDeque<Waiting<G::Ticket>>,
    closed: Option<(VarInt, Bytes)>,
    /// Where answers to strangers are made.
    response: Vec<u8>,
}

impl<G: Gate> Serving<G> {
    async fn run(mut self) {
        let hub = Arc::clone(&self.hub);
        let mut memory = vec![0; Socket::RECEIVE_BYTES * BATCH_SIZE];
        loop {
            let ready = if self.begin_some() {
                // There are more; whoever has to do something gets to it first.
                yield_now().await;
                Ok(true)
            } else {
                tokio::select! {
                    ready = hub.socket.readable() => ready.map(|()| true),
                    () = hub.news.notified() => Ok(false),
                }
            };
            self.heed();
            // Before anything is read: whoever was given up and speaks again is a newcomer.
            self.forget_some();
            if self.closed.is_some() && hub.open.load(Ordering::Acquire) == 0 {
                return;
            }
            let received = match ready {
                Ok(true) => self.receive(&mut memory),
                Ok(false) => continue,
                Err(error) => Err(error),
            };
            match received {
                // As with other tasks: whoever has more to do lets others go first.
                Ok(true) => yield_now().await,
                Ok(false) => {}
                Err(error) => {
                    warn!(%error, "the UDP socket of the device port cannot receive; pausing");
                    sleep(PAUSE).await;
                }
            }
        }
    }

    /// Does what connections and the operator ask for.
    fn heed(&mut self) {
        let told = std::mem::take(&mut *self.hub.told());
        if let Some(config) = told.config {
            self.configure(config);
        }
        if let Some((code, reason)) = told.close {
            self.configure(None);
            for wire in self.wires.iter().flatten() {
                wire.close(code, reason.clone());
            }
            self.closed = Some((code, reason));
        }
        for (handle, event) in told.events {
            let gone = event.is_drained();
            let answer = self.proto.handle_event(handle, event);
            let Some(wire) = self.wires.get_mut(handle.0) else {
                continue;
            };
            if let (Some(wire), Some(answer)) = (wire.as_ref(), answer) {
                wire.answer(answer);
            }
            if gone && wire.take().is_some() && self.hub.open.fetch_sub(1, Ordering::AcqRel) == 1 {
                self.hub.idle.notify_waiters();
            }
        }
    }

    /// Takes another configuration, or lets nobody in any more: not even those who wait.
    fn configure(&mut self, config: Option<Arc<ServerConfig>>) {
        self.proto.set_server_config(config.clone());
        self.config = config;
        if self.config.is_some() {
            return;
        }
        for waiting in std::mem::take(&mut self.waiting) {
            self.refuse(waiting.incoming);
            self.gate.failed(waiting.peer, waiting.ticket, "shutdown");
        }
    }

    /// Takes what has come; `true`: there may be more.
    fn receive(&mut self, memory: &mut [u8]) -> io::Result<bool> {
        let mut buffers: Vec<IoSliceMut<'_>> = memory
            .chunks_mut(Socket::RECEIVE_BYTES)
            .map(IoSliceMut::new)
            .collect();
        let mut metas = [RecvMeta::default(); BATCH_SIZE];
        for _ in 0..RECEIVES_PER_TURN {
            let count = match self.hub.socket.receive(&mut buffers, &mut metas) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                // Anybody can cause this with an ICMP packet, and it says nothing about the socket.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => continue,
                Err(error) => return Err(error),
            };
            let now = now();
            for (meta, buffer) in metas.iter().zip(&buffers).take(count) {
                let came = buffer.get(..meta.len).unwrap_or_default();
                // Memory for each: what is kept of one must not keep the others that came with it.
                for datagram in came.chunks(meta.stride.max(1)) {
                    if is_fit(datagram, self.datagram_max) {
                        self.datagram(now, meta, BytesMut::from(datagram));
                    }
                }
            }
        }
        Ok(true)
    }

    fn datagram(&mut self, now: Instant, meta: &RecvMeta, datagram: BytesMut) {
        self.response.clear();
        let ecn = meta.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8));
        let event = self.proto.handle(
            now,
            meta.addr,
            meta.dst_ip,
            ecn,
            datagram,
            &mut self.response,
        );
        match event {
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                if let Some(Some(wire)) = self.wires.get(handle.0) {
                    wire.datagram(event, now);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.knock(incoming),
            Some(DatagramEvent::Response(transmit)) => self.respond(&transmit),
            None => {}
        }
    }

    fn knock(&mut self, incoming: Incoming) {
        let peer = incoming.remote_address();
        let proof = match !incoming.remote_address_validated() && incoming.may_retry() {
            false => Proof::Given,
            true if self.is_pressed() => Proof::Due,
            true => Proof::Possible,
        };
        let judgement = match self.closed {
            Some(_) => Judgement::Refuse,
            None => self.gate.judge(peer, proof),
        };
        match judgement {
            Judgement::Admit(ticket) => {
                while self.waiting.len() >= self.bounds.waiting.max(1) {
                    self.forget("queue_full");
                }
                self.waiting.push_back(Waiting {
                    incoming,
                    peer,
                    ticket,
                    since: now(),
                });
            }
            Judgement::Prove => {
                self.response.clear();
                match self.proto.retry(incoming, &mut self.response) {
                    Ok(transmit) => self.respond(&transmit),
                    // It has proved it already.
                    Err(error) => self.refuse(error.into_incoming()),
                }
            }
            Judgement::Refuse => self.refuse(incoming),
        }
    }

    /// Whether newcomers should show that they are where they say, because others wait or are soon to.
    fn is_pressed(&self) -> bool {
        let free = self.hub.places.load(Ordering::Acquire);
        !self.waiting.is_empty() || free.saturating_mul(PROOF_FROM_SHARE) < self.bounds.places
    }

    /// Tells somebody who has not begun that it does not come in.
    fn refuse(&mut self, incoming: Incoming) {
        self.response.clear();
        let refused = self.proto.refuse(incoming, &mut self.response);
        self.respond(&refused);
    }

    /// Forgets the oldest of those who wait, without a word: if it is there it comes again.
    fn forget(&mut self, reason: &'static str) {
        if let Some(waiting) = self.waiting.pop_front() {
            self.proto.ignore(waiting.incoming);
            self.gate.failed(waiting.peer, waiting.ticket, reason);
        }
    }

    /// Forgets those who have waited so long that they will have left: they must not cost a handshake.
    fn forget_some(&mut self) {
        let now = now();
        while let Some(oldest) = self.waiting.front()
            && now.saturating_duration_since(oldest.since) >= self.bounds.patience
        {
            self.forget("waited_too_long");
        }
    }

    /// Lets some begin of those who wait; `true`: there are more, and places for them.
    fn begin_some(&mut self) -> bool {
        for _ in 0..BEGINS_PER_TURN {
            if self.waiting.is_empty() {
                return false;
            }
            let Some(place) = self.hub.place() else {
                return false;
            };
            if let Some(newest) = self.waiting.pop_back() {
                self.admit(newest, place);
            }
        }
        if self.waiting.is_empty() {
            // Gives the memory of a storm back.
            self.waiting = VecDeque::new();
        }
        !self.waiting.is_empty()
    }

    fn admit(&mut self, newcomer: Waiting<G::Ticket>, place: Place) {
        let Waiting {
            incoming,
            peer,
            ticket,
            ..
        } = newcomer;
        self.response.clear();
        // The configuration of now: the certificate may be another than when it came.
        let config = self.config.clone();
        let begun = self
            .proto
            .accept(incoming, now(), &mut self.response, config);
        match begun {
            Ok((handle, connection)) => {
                let wire = Arc::new(Wire::default());
                if self.wires.len() <= handle.0 {
                    self.wires.resize(handle.0 + 1, None);
                }
                if let Some(place) = self.wires.get_mut(handle.0) {
                    *place = Some(Arc::clone(&wire));
                }
                self.hub.open.fetch_add(1, Ordering::AcqRel);
                let hub = Arc::clone(&self.hub);
                self.gate.admit(
                    Connection::new(connection, handle, hub, wire, place),
                    peer,
                    ticket,
                );
            }
            Err(error) => {
                if let Some(transmit) = &error.response {
                    self.respond(transmit);
                }
                self.gate.failed(peer, ticket, "closed");
            }
        }
    }

    /// Answers a stranger, or nobody if the system has no room: it will come again.
    fn respond(&self, transmit: &Transmit) {
        if let Some(bytes) = self.response.get(..transmit.size) {
            self.hub.socket.send(transmit, bytes);
        }
    }
}

/// Whether the protocol is to see a datagram. Larger ones than we say we take are not for us, and would cost their size in
/// memory; a beginning that is too short is to be thrown away (RFC 9000 section 14.1), and quinn-proto looks at that only for
/// the first one of a connection, so that many tiny ones could pile up behind it.
pub(super) fn is_fit(datagram: &[u8], max: usize) -> bool {
    /// A long header, and in it the types Initial and 0-RTT.
    const LONG: u8 = 0x80;
    const TYPE: u8 = 0x30;
    const ZERO_RTT: u8 = 0x10;
    let is_beginning = datagram
        .first()
        .is_some_and(|first| first & LONG != 0 && first & TYPE <= ZERO_RTT);
    datagram.len() <= max && (datagram.len() >= FIRST_BYTES_MIN || !is_beginning)
}
