//! A link in memory, for tests of apps: it carries the same frames as the others, and needs no socket and no certificate.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bellwire_protocol::{Carrier, Code, Codec};
use bytes::Bytes;
use tokio::sync::mpsc;

use super::{ConnectError, LinkEnd, Received, Route};

/// Frames that wait on the way, in each direction. A sender waits for room.
const ON_THE_WAY_MAX: usize = 256;

/// What goes over the link.
#[derive(Debug)]
pub(crate) enum Wire {
    Frame(Bytes),
    Close(Option<Code>),
}

/// One end of a link.
#[derive(Debug)]
pub(crate) struct MemoryLink {
    pub(crate) carrier: Carrier,
    pub(crate) codec: Codec,
    out: mpsc::Sender<Wire>,
    incoming: mpsc::Receiver<Wire>,
    gathered: Vec<Bytes>,
    end: Option<LinkEnd>,
    /// How often the server's end found the device's at another address; both ends share it.
    address_checks: Arc<AtomicU64>,
}

/// Answers when a client dials: the other end goes to whoever made the door.
pub(crate) type Answer = dyn Fn(Route, Codec) -> Option<MemoryLink> + Send + Sync;

/// Where links in memory begin.
#[derive(Clone)]
pub(crate) struct Door {
    answer: Arc<Answer>,
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Door")
    }
}

impl Door {
    pub(crate) fn new(
        answer: impl Fn(Route, Codec) -> Option<MemoryLink> + Send + Sync + 'static,
    ) -> Self {
        Self {
            answer: Arc::new(answer),
        }
    }

    /// A link, unless nobody answers on this way.
    pub(crate) fn dial(&self, route: Route, codec: Codec) -> Result<MemoryLink, ConnectError> {
        (self.answer)(route, codec).ok_or_else(|| ConnectError::Resolve {
            host: "the server of the test".to_owned(),
            source: std::io::Error::other("it cannot be reached"),
        })
    }
}

impl MemoryLink {
    /// Both ends of a link: the device's and the server's.
    pub(crate) fn pair(carrier: Carrier, codec: Codec) -> (Self, Self) {
        let (to_server, at_server) = mpsc::channel(ON_THE_WAY_MAX);
        let (to_device, at_device) = mpsc::channel(ON_THE_WAY_MAX);
        let address_checks = Arc::<AtomicU64>::default();
        let end = |out, incoming| Self {
            address_checks: address_checks.clone(),
            carrier,
            codec,
            out,
            incoming,
            gathered: Vec::new(),
            end: None,
        };
        (end(to_server, at_device), end(to_device, at_server))
    }

    pub(crate) async fn receive(&mut self) -> Result<Received, LinkEnd> {
        if let Some(end) = &self.end {
            return Err(end.clone());
        }
        let end = match self.incoming.recv().await {
            Some(Wire::Frame(frame)) => return Ok(Ok(frame)),
            Some(Wire::Close(code)) => LinkEnd::new(code, "closed by the other side"),
            None => LinkEnd::new(None, "the connection broke"),
        };
        self.end = Some(end.clone());
        Err(end)
    }

    /// The server's end finds the device at another address.
    pub(crate) fn check_address(&self) {
        self.address_checks.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn address_checks(&self) -> u64 {
        self.address_checks.load(Ordering::Relaxed)
    }

    pub(crate) fn feed(&mut self, frame: Vec<u8>) {
        self.gathered.push(frame.into());
    }

    pub(crate) async fn flush(&mut self) -> Result<(), LinkEnd> {
        for frame in self.gathered.drain(..) {
            if self.out.send(Wire::Frame(frame)).await.is_err() {
                return Err(self
                    .end
                    .clone()
                    .unwrap_or_else(|| LinkEnd::new(None, "the connection broke")));
            }
        }
        Ok(())
    }

    pub(crate) async fn close(mut self, code: Code, farewell: Duration) -> Option<Code> {
        let _ = self.out.try_send(Wire::Close(Some(code)));
        let answer = tokio::time::timeout(farewell, async {
            loop {
                if let Err(end) = self.receive().await {
                    return end.code;
                }
            }
        });
        answer.await.ok().flatten()
    }
}
