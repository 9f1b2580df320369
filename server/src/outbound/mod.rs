//! The way out of the process: posts to addresses that the operator's settings allow, and to no others.
//!
//! By default there is none: no connection, not even a name looked up. [`rules`] has what is allowed, as the settings say it;
//! [`mod@line`] is one connection at a time to one receiver. An address is checked when it is registered, and again whenever a connection
//! is made, against the very address that is then connected to: a name that turns to another address later (DNS rebinding) gains
//! nothing, and a rule that the operator takes back holds at once.

mod line;
mod rules;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::ClientConfig;

pub use self::rules::{Allowed, AllowedHost, AllowedPort, Rules};
use crate::ports::{Outbound, OutboundLine, UrlRefusal};

/// How posts are made; it can be exchanged while they are.
pub struct Caller {
    now: ArcSwap<Ways>,
}

/// What the settings say.
pub struct Ways {
    /// Where to.
    pub rules: Rules,
    /// How receivers prove who they are; `None`: no authorities are known, so no https.
    pub tls: Option<Arc<ClientConfig>>,
    /// Longest time from the first byte of a request to the end of its answer.
    pub timeout: Duration,
}

impl Caller {
    /// Goes these ways.
    #[must_use]
    pub fn new(ways: Ways) -> Caller {
        Caller {
            now: ArcSwap::from_pointee(ways),
        }
    }

    /// Goes other ways from now on. What is under way ends as it began.
    pub fn set(&self, ways: Ways) {
        self.now.store(Arc::new(ways));
    }
}

/// A caller that shares its ways with its lines.
pub struct SharedCaller(pub Arc<Caller>);

impl Outbound for SharedCaller {
    fn is_on(&self) -> bool {
        !self.0.now.load().rules.is_empty()
    }

    fn check(&self, url: &str) -> Result<(), UrlRefusal> {
        let ways = self.0.now.load();
        let place = ways.rules.place(url)?;
        if place.tls && ways.tls.is_none() {
            return Err(UrlRefusal::NotAllowed(
                "https needs authorities to trust, and the system has none: the operator can name a file in `callbacks.ca`"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    fn line(&self) -> Box<dyn OutboundLine> {
        Box::new(line::Line::new(Arc::clone(&self.0)))
    }
}
