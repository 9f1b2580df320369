//! Keeping the order of pings that are published at the same time: the next one begins when the one before has its places.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Held by a ping until it has its place in every mailbox that it addresses, or is refused. Dropping it tells the [`Placed`] that was
/// made with it, and wakes nobody: whoever looks polls the ping itself.
#[derive(Debug)]
pub struct Turn(Arc<AtomicBool>);

/// Whether a ping has its places.
#[derive(Debug)]
pub struct Placed(Arc<AtomicBool>);

impl Turn {
    /// A turn that begins now, and how to see that it is over.
    #[must_use]
    pub fn new() -> (Turn, Placed) {
        let over = Arc::new(AtomicBool::new(false));
        (Turn(Arc::clone(&over)), Placed(over))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
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
