//! The endpoint: takes datagrams from the socket, finds whose they are, and lets connections in.
//!
//! One task holds it, and nobody waits for it: connections put what they have for it into the [`Hub`], and get what comes for
//! them through a [`Wire`] each. Who was let in begins when one of the places for handshakes is free (`pace.rs`), in order; until
//! then there is nothing of it but its first datagrams.

use std::collections::VecDeque;
use std::io::{self, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn_proto::{
    ConnectionHandle, DatagramEvent, EcnCodepoint, EndpointConfig, EndpointEvent, Incoming,
    ServerConfig, Transmit, VarInt,
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

/// Connections that wait for a place; further ones are dropped and come again by themselves, as after a lost packet.
pub(super) const WAITING_MAX: usize = 4_096;

/// Bytes kept of what a connection says while it waits: its first flight, sent again once.
pub(super) const WAITING_BYTES: u64 = 8 * 1024;

/// Connections that begin before the socket is looked at again; some begin with their handshake's work.
const BEGINS_PER_TURN: usize = 4;

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

    /// Decides about a newcomer. `can_prove`: it has not shown its address yet, and may be asked to.
    fn judge(&mut self, peer: SocketAddr, can_prove: bool) -> Judgement<Self::Ticket>;

    /// Takes a connection whose handshake has begun.
    fn admit(&mut self, connection: Connection, peer: SocketAddr, ticket: Self::Ticket);

    /// Its first datagram was not what it seemed.
    fn failed(&mut self, peer: SocketAddr, ticket: Self::Ticket);
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
        Endpoint::with_places(socket, config, gate, Pace::places_of_this_machine())
    }

    pub(super) fn with_places<G: Gate>(
        socket: UdpSocket,
        config: ServerConfig,
        gate: G,
        places: usize,
    ) -> io::Result<Endpoint> {
        let hub = Arc::new(Hub {
            socket: Socket::new(socket)?,
            told: Mutex::default(),
            news: Notify::new(),
            open: AtomicUsize::new(0),
            idle: Notify::new(),
            places: AtomicUsize::new(places),
        });
        let proto = quinn_proto::Endpoint::new(
            Arc::new(EndpointConfig::default()),
            Some(Arc::new(config)),
            !hub.socket.may_fragment(),
            None,
        );
        let serving = Serving {
            proto,
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

/// The endpoint in its task.
struct Serving<G: Gate> {
    proto: quinn_proto::Endpoint,
    hub: Arc<Hub>,
    /// By the number of the connection's handle.
    wires: Vec<Option<Arc<Wire>>>,
    gate: G,
    /// Those who may come in and wait for a place.
    waiting: VecDeque<(Incoming, SocketAddr, G::Ticket)>,
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
            self.proto.set_server_config(config);
        }
        if let Some((code, reason)) = told.close {
            self.proto.set_server_config(None);
            for (incoming, _, _) in self.waiting.drain(..) {
                self.response.clear();
                let refused = self.proto.refuse(incoming, &mut self.response);
                if let Some(bytes) = self.response.get(..refused.size) {
                    self.hub.socket.send(&refused, bytes);
                }
            }
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
                let mut rest = BytesMut::from(buffer.get(..meta.len).unwrap_or_default());
                while !rest.is_empty() {
                    let datagram = rest.split_to(meta.stride.clamp(1, rest.len()));
                    self.datagram(now, meta, datagram);
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
                    wire.datagram(event);
                }
            }
            Some(DatagramEvent::NewConnection(incoming)) => self.knock(incoming),
            Some(DatagramEvent::Response(transmit)) => self.respond(&transmit),
            None => {}
        }
    }

    fn knock(&mut self, incoming: Incoming) {
        let peer = incoming.remote_address();
        let can_prove = !incoming.remote_address_validated() && incoming.may_retry();
        let judgement = match self.closed {
            Some(_) => Judgement::Refuse,
            None => self.gate.judge(peer, can_prove),
        };
        self.response.clear();
        match judgement {
            Judgement::Admit(ticket) if self.waiting.len() < WAITING_MAX => {
                self.waiting.push_back((incoming, peer, ticket));
            }
            Judgement::Admit(ticket) => {
                self.proto.ignore(incoming);
                self.gate.failed(peer, ticket);
            }
            Judgement::Prove => match self.proto.retry(incoming, &mut self.response) {
                Ok(transmit) => self.respond(&transmit),
                // It has proved it already.
                Err(error) => {
                    self.response.clear();
                    let refused = self.proto.refuse(error.into_incoming(), &mut self.response);
                    self.respond(&refused);
                }
            },
            Judgement::Refuse => {
                let refused = self.proto.refuse(incoming, &mut self.response);
                self.respond(&refused);
            }
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
            if let Some((incoming, peer, ticket)) = self.waiting.pop_front() {
                self.admit(incoming, place, peer, ticket);
            }
        }
        if self.waiting.is_empty() {
            // Gives the memory of a storm back.
            self.waiting = VecDeque::new();
        }
        !self.waiting.is_empty()
    }

    fn admit(&mut self, incoming: Incoming, place: Place, peer: SocketAddr, ticket: G::Ticket) {
        self.response.clear();
        let now = now();
        match self.proto.accept(incoming, now, &mut self.response, None) {
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
                self.gate.failed(peer, ticket);
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
