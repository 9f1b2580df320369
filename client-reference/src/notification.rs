//! What the app sees: a notification, its verdict, and what else happens.

use std::time::Duration;

use bellwire_protocol::{Carrier, Codec, Content, Id, Notify, Urgency};
use serde::Serialize;

use crate::end::Disconnect;

/// One notification, for the app.
///
/// `Debug` prints the size of the content, not the content.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Notification {
    /// The id of the ping that made it. The same id is never handed over twice, see the crate's promise.
    pub id: Id,
    /// The server may have sent it before, in a session that broke; this device never answered it.
    pub redelivered: bool,
    /// When the server accepted it, in Unix milliseconds of the server's clock.
    pub accepted_ms: u64,
    /// When it is of no more use, in Unix milliseconds of the server's clock.
    pub expires_ms: u64,
    /// How urgent the publisher thinks it is.
    pub urgency: Urgency,
    /// What to show or to do.
    #[serde(flatten)]
    pub content: Content,
}

impl From<Notify> for Notification {
    fn from(notify: Notify) -> Self {
        let Notify {
            seq: _,
            redelivered,
            id,
            accepted_ms,
            expires_ms,
            urgency,
            content,
        } = notify;
        Self {
            id,
            redelivered,
            accepted_ms,
            expires_ms,
            urgency,
            content,
        }
    }
}

/// What the app did with a notification. It is final: the publisher sees it as the outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The app has it: shown, stored, or handed on for good.
    Acknowledge,
    /// The app cannot or will not use it. The reason, a word or a short sentence of at most 256 bytes, reaches the publisher;
    /// what is longer is cut.
    Decline(String),
}

impl Verdict {
    /// A decline with this reason.
    pub fn decline(reason: impl Into<String>) -> Self {
        Self::Decline(reason.into())
    }
}

/// What happens beside notifications. A later version may add more.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// A session stands.
    Connected {
        /// What carries it.
        carrier: Carrier,
        /// How frames are written.
        codec: Codec,
        /// Number of the session, to find it in the server's log.
        session: u64,
        /// How many notifications wait for this device.
        pending: u64,
        /// How many the server may send before the first verdict.
        window: u16,
    },
    /// There is no session, or no longer.
    Disconnected {
        /// Why; its text is one line for a person, [`Disconnect::advice`] says what to do.
        why: Disconnect,
        /// When the client tries again; `None`: it does not, [`Event::Stopped`] follows.
        retry_in: Option<Duration>,
    },
    /// Notifications that their publisher took back, or that were read elsewhere: the app may take them off the screen. An id
    /// comes after the callback for it has ended, however long that takes; what the app has not seen by then never reaches it, so there may be
    /// ids here that it does not know, and the same ones may come again. A verdict that was given stays.
    Withdrawn {
        /// Their ids.
        ids: Vec<Id>,
    },
    /// Another installation with the same device id took over. This client stays away for at least 60 s; if it happens again
    /// and again, two installations share one identity: enrol each one by itself.
    Replaced,
    /// A notification came again that was answered before. It got the same verdict again; the app does not see it.
    Repeated {
        /// Its id.
        id: Id,
    },
    /// A notification arrived, or waited for the app, past its expiry. It was declined; the app does not see it.
    Expired {
        /// Its id.
        id: Id,
    },
    /// The server answered what was asked of topics ([`Client::subscribe`](crate::Client::subscribe)).
    Subscribed {
        /// All topics that the device is a member of now.
        topics: Vec<String>,
        /// What was asked for and did not come true: the app's rules do not allow it, or the device has 100 topics.
        refused: Vec<String>,
    },
    /// The state directory or the app made trouble. Nothing is lost; the text says what to do.
    Trouble {
        /// One sentence.
        what: String,
    },
    /// The machine slept. The link is checked at once; if it is gone, the client comes back.
    Woke {
        /// How long.
        slept: Duration,
    },
    /// The machine is on another network, or has another address there. On QUIC the session moves along; on WebSocket it is
    /// checked at once.
    Moved {
        /// The name of the network, see [`Builder::network`](crate::Builder::network).
        network: String,
    },
    /// The client has ended and does not come back by itself: the app wanted it, or the server said never.
    Stopped,
}
