//! A link between one device and the server: two streams of bytes that arrive late, in pieces, or not at all.

use std::collections::VecDeque;

use bellwire_protocol::{Code, Codec, write_framed};
use rand::Rng;
use rand::rngs::StdRng;

/// A way through a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the device to the server.
    Up,
    /// From the server to the device.
    Down,
}

/// What is on its way.
#[derive(Debug, Clone)]
pub(super) enum Piece {
    /// Bytes of a stream, or one whole message.
    Bytes(Vec<u8>),
    /// The end, in good order.
    Close(Code),
    /// The end, in no order.
    Broken,
}

/// What a link does to bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carrier {
    /// A stream, as QUIC carries it: frames are led by their length and may arrive in any pieces.
    Stream,
    /// Messages, as WebSocket carries them: whole or not at all.
    Messages,
}

#[derive(Debug, Default)]
struct Pipe {
    pieces: VecDeque<Piece>,
    /// When the last one arrives: nothing overtakes.
    last_us: u64,
}

/// One connection.
#[derive(Debug)]
pub(super) struct Conn {
    pub(super) device: usize,
    /// The client's process that made it.
    pub(super) life: u32,
    /// The server's run that took it.
    pub(super) run: u32,
    /// When that run began: microseconds of the simulation, and its wall time, Unix milliseconds.
    clock: (u64, u64),
    pub(super) carrier: Carrier,
    pub(super) codec: Codec,
    delay_us: u64,
    pieces: bool,
    up: Pipe,
    down: Pipe,
    /// Nothing arrives any more, and nobody is told.
    pub(super) silent: bool,
    /// The client's side is still there.
    pub(super) client: bool,
    /// The server's side is still there.
    pub(super) server: bool,
}

impl Conn {
    pub(super) fn new(
        device: usize,
        life: u32,
        (run, clock): (u32, (u64, u64)),
        (carrier, codec): (Carrier, Codec),
        delay_us: u64,
        pieces: bool,
    ) -> Conn {
        Conn {
            device,
            life,
            run,
            clock,
            carrier,
            codec,
            delay_us,
            pieces,
            up: Pipe::default(),
            down: Pipe::default(),
            silent: false,
            client: true,
            server: true,
        }
    }

    fn pipe(&mut self, way: Way) -> &mut Pipe {
        match way {
            Way::Up => &mut self.up,
            Way::Down => &mut self.down,
        }
    }

    fn put(&mut self, way: Way, piece: Piece, now_us: u64, random: &mut StdRng) -> u64 {
        let at = now_us + random.random_range(self.delay_us / 4..=self.delay_us);
        let pipe = self.pipe(way);
        pipe.last_us = pipe.last_us.max(at);
        pipe.pieces.push_back(piece);
        pipe.last_us
    }

    /// When something that expires at this wall time of the server is over for the device at the latest, microseconds of the
    /// simulation. The device knows the server's time as of the `welcome`, so it is behind by the way of that one.
    pub(super) fn over_at_us(&self, expires_ms: u64) -> u64 {
        let (started_us, started_ms) = self.clock;
        let lives_us = expires_ms.saturating_sub(started_ms).saturating_mul(1_000);
        let way_us = self.delay_us + 2_000;
        started_us.saturating_add(lives_us).saturating_add(way_us)
    }

    /// Sends a frame; answers when its pieces arrive.
    pub(super) fn send(
        &mut self,
        way: Way,
        frame: &[u8],
        now_us: u64,
        random: &mut StdRng,
    ) -> Vec<u64> {
        let mut bytes = Vec::with_capacity(frame.len() + 8);
        match self.carrier {
            Carrier::Stream => write_framed(&mut bytes, frame),
            Carrier::Messages => bytes.extend_from_slice(frame),
        }
        let mut arrivals = Vec::with_capacity(1);
        if self.pieces && self.carrier == Carrier::Stream && bytes.len() > 1 {
            let rest = bytes.split_off(random.random_range(1..bytes.len()));
            arrivals.push(self.put(way, Piece::Bytes(bytes), now_us, random));
            bytes = rest;
        }
        arrivals.push(self.put(way, Piece::Bytes(bytes), now_us, random));
        arrivals
    }

    /// Ends one way, behind what is on it.
    pub(super) fn end(&mut self, way: Way, piece: Piece, now_us: u64, random: &mut StdRng) -> u64 {
        self.put(way, piece, now_us, random)
    }

    /// What arrives next on this way.
    pub(super) fn arrive(&mut self, way: Way) -> Option<Piece> {
        let piece = self.pipe(way).pieces.pop_front()?;
        (!self.silent).then_some(piece)
    }

    /// Cuts both ways, each at any byte: what is behind it never arrives, and both sides learn that the link broke.
    pub(super) fn cut(&mut self, random: &mut StdRng) {
        for way in [Way::Up, Way::Down] {
            let stream = self.carrier == Carrier::Stream;
            let pipe = self.pipe(way);
            let keep = random.random_range(0..=pipe.pieces.len());
            let mut lost = pipe.pieces.split_off(keep);
            if stream
                && let Some(Piece::Bytes(bytes)) = lost.front_mut()
                && bytes.len() > 1
            {
                let at = random.random_range(1..bytes.len());
                bytes.truncate(at);
                pipe.pieces.extend(lost.pop_front());
            }
            // Arrivals that were told before find what is there now.
            pipe.pieces.push_back(Piece::Broken);
        }
    }
}
