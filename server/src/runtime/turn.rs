//! Keeping the order of pings that are published at the same time: the next one begins when the one before has its places.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::watch;

/// Held by a ping until it has its place in every mailbox that it addresses, or is refused. Dropping it tells the [`Placed`] that was
/// made with it, and wakes nobody: whoever looks polls the ping itself.
#[derive(Debug)]
pub struct Turn {
    over: Arc<AtomicBool>,
    /// Those who have the same places as this ping, and wait for them.
    joined: Option<watch::Sender<bool>>,
}

/// Whether a ping has its places.
#[derive(Debug)]
pub struct Placed(Arc<AtomicBool>);

impl Turn {
    /// A turn that begins now, and how to see that it is over.
    #[must_use]
    pub fn new() -> (Turn, Placed) {
        let over = Arc::new(AtomicBool::new(false));
        let turn = Turn {
            over: Arc::clone(&over),
            joined: None,
        };
        (turn, Placed(over))
    }

    /// Ends the turn of a ping that has its places, and tells those who joined it. Those of one that went away without are not told:
    /// they go on in their own turn.
    pub(super) fn end(self) {
        if let Some(joined) = &self.joined {
            joined.send_replace(true);
        }
    }

    /// The same turn, whose [end](Turn::end) others are told as well.
    pub(super) fn told(turn: Option<Turn>, joined: watch::Sender<bool>) -> Turn {
        let mut turn = turn.unwrap_or_else(|| Turn::new().0);
        turn.joined = Some(joined);
        turn
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
    }
}

impl Placed {
    /// Whether it is so.
    #[must_use]
    pub fn is_so(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// Before the first turn.
impl Default for Placed {
    fn default() -> Placed {
        Placed(Arc::new(AtomicBool::new(true)))
    }
}
