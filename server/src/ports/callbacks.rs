//! Where outcomes are posted: what is registered, what could not be posted, and the way out of the process.

use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;

use super::outcomes::OutcomePosition;
use crate::delivery::{AppId, Outcome};

/// A secret that signs what is posted.
#[derive(Clone, PartialEq, Eq)]
pub struct SigningSecret {
    /// The key of the HMAC, 24 to 64 bytes.
    pub key: Vec<u8>,
    /// Until when it signs beside a newer one, Unix milliseconds; `None`: it is the newest.
    pub until_ms: Option<u64>,
}

/// Since when a batch fails.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failing {
    /// When it failed first, Unix milliseconds.
    pub since_ms: u64,
    /// How often it was tried.
    pub tries: u32,
    /// Why it failed last, for people.
    pub why: String,
}

/// Where the outcomes of an app are posted, and how far that is.
#[derive(Clone, PartialEq, Eq)]
pub struct CallbackRecord {
    /// Whose.
    pub app: AppId,
    /// Where.
    pub url: String,
    /// Only those that ended so; none: all.
    pub outcomes: Vec<Outcome>,
    /// The newest first, at most [`CallbackRecord::SECRETS_MAX`].
    pub secrets: Vec<SigningSecret>,
    /// When it was registered, Unix milliseconds.
    pub created_ms: u64,
    /// Everything before was posted, or is a dead letter.
    pub position: OutcomePosition,
    /// The end of the batch under way. It stays the same batch, under the same id, until it is over.
    pub sending: Option<OutcomePosition>,
    /// The batch under way fails.
    pub failing: Option<Failing>,
    /// The receiver said that it is gone, at this time, Unix milliseconds: nothing is posted until somebody says otherwise.
    pub gone_ms: Option<u64>,
    /// The number of the next dead letter.
    pub next_letter: u64,
}

impl CallbackRecord {
    /// Most secrets that sign at once.
    pub const SECRETS_MAX: usize = 2;
    /// Longest address, bytes.
    pub const URL_MAX: usize = 2_048;
}

/// A batch that was given up.
#[derive(Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Whose.
    pub app: AppId,
    /// Its number in the app; a later one has a greater number.
    pub number: u64,
    /// Its `webhook-id`.
    pub id: String,
    /// What is posted, at most [`DeadLetter::BODY_MAX`] bytes.
    pub body: Bytes,
    /// How many events are in it.
    pub events: u32,
    /// How often it was tried.
    pub tries: u32,
    /// When it failed first, Unix milliseconds.
    pub since_ms: u64,
    /// When it was given up, Unix milliseconds.
    pub at_ms: u64,
    /// Why it failed last, for people.
    pub why: String,
}

impl DeadLetter {
    /// Largest body, bytes: no record of the store is larger than 72 KiB.
    pub const BODY_MAX: usize = 64 << 10;
}

/// What is posted.
#[derive(Clone)]
pub struct Post {
    /// Where.
    pub url: String,
    /// Headers beside `content-type` and what HTTP itself needs.
    pub headers: Vec<(&'static str, String)>,
    /// JSON.
    pub body: Bytes,
}

/// What came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PostAnswer {
    /// The status of HTTP.
    pub status: u16,
    /// `Retry-After`, if it was said in seconds.
    pub retry_after: Option<Duration>,
}

/// Why nothing came back. The texts are for people and hold nothing of what was posted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PostError {
    /// The operator's settings do not allow it.
    #[error("{0}")]
    NotAllowed(String),
    /// The name was not found.
    #[error("the name could not be looked up: {0}")]
    Lookup(String),
    /// No connection.
    #[error("no connection: {0}")]
    Connect(String),
    /// TLS failed: a certificate, most often.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// It took too long.
    #[error("{phase} took longer than {} s", .after.as_secs_f32())]
    Timeout {
        /// What took so long.
        phase: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The connection broke, or no HTTP came back.
    #[error("the answer was cut short: {0}")]
    Broken(String),
}

impl PostError {
    /// The word for it in metrics.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            PostError::NotAllowed(_) => "not_allowed",
            PostError::Lookup(_) => "lookup",
            PostError::Connect(_) => "connect",
            PostError::Tls(_) => "tls",
            PostError::Timeout { .. } => "timeout",
            PostError::Broken(_) => "broken",
        }
    }
}

/// Why an address cannot be a callback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum UrlRefusal {
    /// The operator allows no callbacks at all.
    Off,
    /// It is not an address that can be posted to; the text completes "The member `url` must be …".
    Malformed(&'static str),
    /// It is one, and the operator's settings do not allow it.
    NotAllowed(String),
}

/// A post under way.
pub type Posting<'a> = Pin<Box<dyn Future<Output = Result<PostAnswer, PostError>> + Send + 'a>>;

/// The way out of the process. It goes only where the operator's settings allow.
pub trait Outbound: Send + Sync + 'static {
    /// Whether anything is allowed at all.
    fn is_on(&self) -> bool;

    /// Whether this address could be posted to, as far as can be said without looking anything up.
    fn check(&self, url: &str) -> Result<(), UrlRefusal>;

    /// A line of one's own: one connection at a time, kept while it is good.
    fn line(&self) -> Box<dyn OutboundLine>;
}

/// One connection at a time.
pub trait OutboundLine: Send + Sync {
    /// Posts and waits for the answer, within the limits of time that the settings name. No redirect is followed.
    /// Dropping the future closes the connection.
    fn post<'a>(&'a mut self, post: &'a Post) -> Posting<'a>;
}

/// No way out.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoOutbound;

impl Outbound for NoOutbound {
    fn is_on(&self) -> bool {
        false
    }

    fn check(&self, _url: &str) -> Result<(), UrlRefusal> {
        Err(UrlRefusal::Off)
    }

    fn line(&self) -> Box<dyn OutboundLine> {
        Box::new(NoOutbound)
    }
}

impl OutboundLine for NoOutbound {
    fn post<'a>(&'a mut self, _post: &'a Post) -> Posting<'a> {
        let off = "callbacks are off (`callbacks.allow` is empty)".to_owned();
        Box::pin(std::future::ready(Err(PostError::NotAllowed(off))))
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SigningSecret")
            .field("until_ms", &self.until_ms)
            .finish_non_exhaustive()
    }
}
