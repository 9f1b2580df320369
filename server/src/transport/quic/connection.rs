//! One QUIC connection, driven by the task that serves its device.
//!
//! The protocol is quinn-proto's: a state machine without sockets or clocks. Whoever holds a [`Connection`] lets it work at
//! the beginning of each turn ([`Connection::begin`]: what came, what is late) and lets it send at the end
//! ([`Connection::finish`]), so that everything a turn has to say shares datagrams and system calls. Between turns nothing is
//! held but the state of the protocol, one timer, and the place where the endpoint puts what comes ([`Wire`]).

use std::cell::RefCell;
use std::future::Future;
use std::mem;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use atomic_waker::AtomicWaker;
use bytes::Bytes;
use quinn_proto::{
    ConnectionError, ConnectionEvent, ConnectionHandle, Dir, EndpointEvent, Event, ReadError,
    StreamEvent, StreamId, Transmit, VarInt, WriteError,
};
use tokio::time::{Sleep, sleep_until};

use super::endpoint::{Hub, Place};
use super::time::now;
use crate::transport::pace::PLACE_TIME;

/// What may wait for a connection whose task does not get to run; more is dropped, as a network would.
pub(super) const ARRIVED_MAX: usize = 1_024;

/// Calls of the system for sending in one turn; then others have theirs.
const SENDS_PER_TURN: usize = 16;

/// How often a turn looks whether what it did led to more; then others have theirs.
const ROUNDS_PER_TURN: usize = 8;

/// How long the protocol waits with an acknowledgement for words to go with, when it was not asked otherwise (RFC 9000
/// section 18.2): quinn-proto has no setting for what we state.
pub(super) const ACK_DELAY: Duration = Duration::from_millis(25);

thread_local! {
    /// Where datagrams are made, for all connections of a thread.
    static DATAGRAMS: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// What the endpoint has for a connection.
#[derive(Default)]
struct Arrived {
    events: Vec<ConnectionEvent>,
    /// How many of these are datagrams.
    datagrams: u64,
    /// When the last of them came.
    last: Option<Instant>,
    close: Option<(VarInt, Bytes)>,
}

/// The way from the endpoint to a connection.
#[derive(Default)]
pub(super) struct Wire {
    arrived: Mutex<Arrived>,
    waker: AtomicWaker,
}

impl Wire {
    fn arrived(&self) -> MutexGuard<'_, Arrived> {
        // Nothing in there can be half done.
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over a datagram that came `now`, as the protocol was told too; too many are dropped.
    pub(super) fn datagram(&self, event: ConnectionEvent, now: Instant) {
        let mut arrived = self.arrived();
        if arrived.events.len() >= ARRIVED_MAX {
            return;
        }
        arrived.events.push(event);
        arrived.datagrams += 1;
        arrived.last = Some(now);
        drop(arrived);
        self.waker.wake();
    }

    /// Hands over what the connection asked the endpoint for.
    pub(super) fn answer(&self, event: ConnectionEvent) {
        self.arrived().events.push(event);
        self.waker.wake();
    }

    /// Ends the connection.
    pub(super) fn close(&self, code: VarInt, reason: Bytes) {
        self.arrived().close = Some((code, reason));
        self.waker.wake();
    }

    fn register(&self, waker: &Waker) {
        self.waker.register(waker);
    }

    fn take(&self) -> Arrived {
        mem::take(&mut *self.arrived())
    }
}

/// Datagrams for which the system had no room.
struct Unsent {
    transmit: Transmit,
    bytes: Box<[u8]>,
    room: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// What reading comes to.
pub(super) enum Read {
    /// So many bytes were handed over.
    Bytes(usize),
    /// Nothing more for now.
    Blocked,
    /// The device has said everything.
    Ended,
    /// The device took the stream back.
    Reset,
}

/// What writing comes to.
pub(super) enum Write {
    /// So many bytes were taken.
    Bytes(usize),
    /// No room for now.
    Blocked,
    /// The device wants no more.
    Stopped,
}

/// A QUIC connection of a device, with the one stream that it may open.
pub(crate) struct Connection {
    /// Until the handshake is through or has taken its time, and since when.
    place: Option<Box<(Place, Instant)>>,
    proto: Box<quinn_proto::Connection>,
    handle: ConnectionHandle,
    hub: Arc<Hub>,
    wire: Arc<Wire>,
    /// Datagrams that came.
    heard: u64,
    timer: Pin<Box<Sleep>>,
    /// What the timer is set to; `None`: it means nothing.
    rings: Option<Instant>,
    unsent: Option<Box<Unsent>>,
    /// When something was said last.
    said: Option<Instant>,
    /// That was alone: what was said before it was said longer ago than [`ACK_DELAY`].
    said_alone: bool,
    /// When the protocol will acknowledge what came in this turn, if it waits with that.
    acknowledges: Option<Instant>,
    stream: Option<StreamId>,
    lost: Option<Box<ConnectionError>>,
    is_connected: bool,
    /// All that was said has come, or is wanted no more.
    is_said: bool,
    /// The endpoint was told that nothing comes of this any more.
    is_over: bool,
}

impl Connection {
    pub(super) fn new(
        proto: quinn_proto::Connection,
        handle: ConnectionHandle,
        hub: Arc<Hub>,
        wire: Arc<Wire>,
        place: Place,
    ) -> Connection {
        let begun = now();
        Connection {
            place: Some(Box::new((place, begun))),
            proto: Box::new(proto),
            handle,
            hub,
            wire,
            heard: 0,
            timer: Box::pin(sleep_until(begun.into())),
            rings: None,
            unsent: None,
            said: None,
            said_alone: false,
            acknowledges: None,
            stream: None,
            lost: None,
            is_connected: false,
            is_said: false,
            is_over: false,
        }
    }

    /// Takes what has come and what is due; [`Connection::finish`] answers it, together with what the turn makes.
    pub(super) fn begin(&mut self, cx: &mut Context<'_>) {
        // First, so that nothing comes unnoticed.
        self.wire.register(cx.waker());
        self.take_arrived();
        self.mind_timer(cx);
        self.take_events();
        self.mind_place();
    }

    /// A turn of which nobody makes anything: takes what has come and what is due, and answers it.
    pub(super) fn turn(&mut self, cx: &mut Context<'_>) {
        self.begin(cx);
        self.finish(cx);
    }

    /// Gives the place of the handshake back when it needs none any more.
    fn mind_place(&mut self) {
        if self.is_connected || self.lost.is_some() {
            self.place = None;
        }
    }

    /// Until when the handshake may keep its place; `None`: it has none. Whoever takes the connection through its handshake
    /// wakes for it: the protocol's own timer stands still when it may say nothing more to a peer that does not answer.
    pub(super) fn keeps_place_until(&self) -> Option<Instant> {
        self.place.as_ref().map(|place| place.1 + PLACE_TIME)
    }

    /// Gives the place back before the handshake is through; it goes on without.
    pub(super) fn give_place_back(&mut self) {
        self.place = None;
    }

    /// Sends what the turn made, and sets the timer.
    pub(super) fn finish(&mut self, cx: &mut Context<'_>) {
        let mut rang = false;
        for _ in 0..ROUNDS_PER_TURN {
            self.transmit(cx);
            if self.hasten_acknowledgement() {
                self.transmit(cx);
            }
            self.tell_endpoint();
            // A timer that has rung already may have something to say.
            rang = self.mind_timer(cx);
            if !rang {
                break;
            }
        }
        // What that leads to is for the next turn; a timer that rang last is not set again, and would wake nobody.
        if self.take_events() || rang {
            cx.waker().wake_by_ref();
        }
    }

    /// The stream that the device opened.
    pub(super) fn stream(&self) -> Option<StreamId> {
        self.stream
    }

    /// Whether the handshake is through.
    pub(super) fn is_connected(&self) -> bool {
        self.is_connected
    }

    /// Why the connection is no more.
    pub(super) fn lost(&self) -> Option<&ConnectionError> {
        self.lost.as_deref()
    }

    /// Whether the device has everything that was said before [`Connection::end_stream`], or wants no more of it.
    pub(super) fn is_said(&self) -> bool {
        self.is_said || self.lost.is_some()
    }

    /// Datagrams that came.
    pub(super) fn heard(&self) -> u64 {
        self.heard
    }

    /// Datagrams and answers that wait for a turn.
    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.wire.arrived().events.len()
    }

    /// Datagrams that were sent.
    #[cfg(test)]
    pub(super) fn sent(&self) -> u64 {
        self.proto.stats().udp_tx.datagrams
    }

    /// Hands the next bytes of the stream to `take`, at most `max`.
    pub(super) fn read(&mut self, max: usize, take: impl FnOnce(&[u8])) -> Read {
        let Some(id) = self.stream else {
            return Read::Blocked;
        };
        let mut stream = self.proto.recv_stream(id);
        let mut chunks = match stream.read(true) {
            Ok(chunks) => chunks,
            // It was read to its end before.
            Err(_) => return Read::Ended,
        };
        let read = match chunks.next(max) {
            Ok(Some(chunk)) => {
                take(&chunk.bytes);
                Read::Bytes(chunk.bytes.len())
            }
            Ok(None) => Read::Ended,
            Err(ReadError::Blocked) => Read::Blocked,
            Err(ReadError::Reset(_)) => Read::Reset,
        };
        // Whether there is news for the device is seen at the end of the turn.
        let _ = chunks.finalize();
        read
    }

    /// Gives bytes to the stream.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Write {
        let Some(id) = self.stream else {
            return Write::Blocked;
        };
        match self.proto.send_stream(id).write(bytes) {
            Ok(written) => {
                self.note_said();
                Write::Bytes(written)
            }
            Err(WriteError::Blocked) => Write::Blocked,
            Err(WriteError::Stopped(_) | WriteError::ClosedStream) => Write::Stopped,
        }
    }

    /// Nothing more is said on the stream.
    pub(super) fn end_stream(&mut self) {
        let ended = self
            .stream
            .map(|id| self.proto.send_stream(id).finish().is_ok());
        // It was stopped or ended before: there is nothing to wait for.
        if ended != Some(true) {
            self.is_said = true;
        }
    }

    /// Closes the connection, and stays in a task of its own until the device has heard of it or had its time.
    pub(super) fn leave(mut self, code: VarInt, reason: &[u8]) {
        self.proto
            .close(now(), code, Bytes::copy_from_slice(reason));
        // Without a runtime there is nobody who could send; dropping it tells the endpoint.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(Leaving(self));
        }
    }

    // ---- What the protocol is told and says ------------------------------------------------------------------------

    fn take_arrived(&mut self) {
        let arrived = self.wire.take();
        self.heard += arrived.datagrams;
        self.acknowledges = arrived.last.map(|last| last + ACK_DELAY);
        for event in arrived.events {
            self.proto.handle_event(event);
        }
        if let Some((code, reason)) = arrived.close {
            self.proto.close(now(), code, reason);
            self.lost
                .get_or_insert_with(|| Box::new(ConnectionError::LocallyClosed));
        }
    }

    /// Sets the timer, or tells the protocol that it has rung.
    fn mind_timer(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(at) = self.proto.poll_timeout() else {
            self.rings = None;
            return false;
        };
        if self.rings != Some(at) {
            self.timer.as_mut().reset(at.into());
            self.rings = Some(at);
        }
        if self.timer.as_mut().poll(cx).is_pending() {
            return false;
        }
        self.rings = None;
        self.proto.handle_timeout(now());
        true
    }

    fn note_said(&mut self) {
        let at = now();
        let before = self.said.replace(at);
        self.said_alone = before.is_some_and(|before| at - before > ACK_DELAY);
    }

    /// Has the protocol acknowledge at once what came in this turn, instead of waiting for words to go with: `true` if it
    /// does. To a device that gets something now and then, none follow that soon, and the acknowledgement would cost a
    /// turn of its own. Where words follow each other quickly it waits, and goes with them.
    fn hasten_acknowledgement(&mut self) -> bool {
        let Some(due) = self.acknowledges.take() else {
            return false;
        };
        // What it waits for next is this and nothing else. It has no other way of being asked.
        if !self.said_alone || self.proto.poll_timeout() != Some(due) {
            return false;
        }
        self.proto.handle_timeout(due);
        true
    }

    fn take_events(&mut self) -> bool {
        let mut worked = false;
        while let Some(event) = self.proto.poll() {
            worked = true;
            match event {
                Event::Connected => self.is_connected = true,
                Event::ConnectionLost { reason } => {
                    self.lost.get_or_insert_with(|| Box::new(reason));
                }
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) if self.stream.is_none() => {
                    self.stream = self.proto.streams().accept(Dir::Bi);
                }
                Event::Stream(StreamEvent::Finished { id } | StreamEvent::Stopped { id, .. })
                    if Some(id) == self.stream =>
                {
                    self.is_said = true;
                }
                // Reading and writing are tried in each turn.
                Event::Stream(_)
                | Event::HandshakeDataReady
                | Event::DatagramReceived
                | Event::DatagramsUnblocked => {}
            }
        }
        worked
    }

    fn tell_endpoint(&mut self) {
        while let Some(event) = self.proto.poll_endpoint_events() {
            self.is_over |= event.is_drained();
            self.hub.tell(self.handle, event);
        }
    }

    // ---- Sending ---------------------------------------------------------------------------------------------------

    /// Sends what there is to send, as far as the system takes it.
    fn transmit(&mut self, cx: &mut Context<'_>) {
        if !self.send_unsent(cx) {
            return;
        }
        let segments = self.hub.socket.segments();
        DATAGRAMS.with_borrow_mut(|bytes| {
            let at = now();
            for _ in 0..SENDS_PER_TURN {
                bytes.clear();
                let Some(transmit) = self.proto.poll_transmit(at, segments, bytes) else {
                    return;
                };
                let datagrams = bytes.get(..transmit.size).unwrap_or(bytes);
                if !self.hub.socket.send(&transmit, datagrams) {
                    self.unsent = Some(Box::new(Unsent {
                        transmit,
                        bytes: datagrams.into(),
                        room: room(&self.hub),
                    }));
                    self.send_unsent(cx);
                    return;
                }
            }
            // There may be more.
            cx.waker().wake_by_ref();
        });
    }

    /// Tries again what the system had no room for; `false`: it still has none, and wakes when it has.
    fn send_unsent(&mut self, cx: &mut Context<'_>) -> bool {
        while let Some(unsent) = &mut self.unsent {
            if unsent.room.as_mut().poll(cx).is_pending() {
                return false;
            }
            if self.hub.socket.send(&unsent.transmit, &unsent.bytes) {
                self.unsent = None;
            } else {
                unsent.room = room(&self.hub);
            }
        }
        true
    }
}

fn room(hub: &Arc<Hub>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    let hub = Arc::clone(hub);
    Box::pin(async move { hub.socket.writable().await })
}

impl Drop for Connection {
    fn drop(&mut self) {
        if !self.is_over {
            self.hub.tell(self.handle, EndpointEvent::drained());
        }
    }
}

/// A connection that was closed and is not yet forgotten (RFC 9000 section 10.2).
struct Leaving(Connection);

impl Future for Leaving {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.0.turn(cx);
        if self.0.is_over {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }
}
