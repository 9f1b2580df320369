//! Why there is no session, in words for a person.

use bellwire_protocol::{Code, GoawayReason, SessionEnd};

use crate::carrier::ConnectError;

/// Why there is no session, or no longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Disconnect {
    /// No carrier connected.
    #[error("{}", unreachable_text(errors))]
    Unreachable {
        /// What each carrier ran into, in the order in which they were tried.
        errors: Vec<ConnectError>,
    },
    /// The server ended the session, or refused it, with a code.
    #[error("the server said `{code}`: {message}")]
    Refused {
        /// The code's name, perhaps of a later version.
        code: String,
        /// One sentence of the server.
        message: String,
    },
    /// The server sent the device away in good order.
    #[error("the server sends this device away: {}", goaway_text(*reason))]
    SentAway {
        /// Why.
        reason: GoawayReason,
    },
    /// The connection broke.
    #[error("the connection is gone: {detail}")]
    Lost {
        /// What happened.
        detail: String,
    },
    /// The server answers no more.
    #[error("the server answers no more")]
    Silent,
    /// The server sent what it must not.
    #[error("the server breaks the protocol: {detail}")]
    Misbehaved {
        /// What it did.
        detail: String,
    },
    /// Verdicts cannot be written down, so they cannot be given.
    #[error("the state directory cannot be written: {detail}")]
    State {
        /// The answer of the operating system.
        detail: String,
    },
    /// The app wanted it.
    #[error("left in good order")]
    Left,
}

impl Disconnect {
    /// The code, if the server gave one that this version knows.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Refused { code, .. } => Code::from_name(code),
            Self::SentAway { reason } => Some(reason.code()),
            Self::Unreachable { .. }
            | Self::Lost { .. }
            | Self::Silent
            | Self::Misbehaved { .. }
            | Self::State { .. }
            | Self::Left => None,
        }
    }

    /// One or two sentences: what to do. Empty when there is nothing to do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Unreachable { errors } => {
                let telling = errors
                    .iter()
                    .find(|error| error.is_from_server())
                    .or(errors.last());
                telling.map_or("", ConnectError::advice)
            }
            Self::Refused { .. } | Self::SentAway { .. } => self.code().map_or("", Code::remedy),
            Self::State { .. } => {
                "Make room on the disk, and make sure that this user may write the state directory."
            }
            Self::Misbehaved { .. } => {
                "Check that the server is a Bellwire server, and the newer of the two is not ahead by a version."
            }
            Self::Lost { .. } | Self::Silent | Self::Left => "",
        }
    }

    /// From the session machine's word; `detail` is what the carrier reported.
    pub(crate) fn from_session(end: SessionEnd, detail: Option<String>) -> Self {
        match end {
            SessionEnd::Left => Self::Left,
            SessionEnd::Goaway(reason) => Self::SentAway { reason },
            SessionEnd::Error { code, message } => Self::Refused { code, message },
            SessionEnd::Closed(Some(code)) if code != Code::Bye => Self::Refused {
                code: code.name().to_owned(),
                message: code.meaning().to_owned(),
            },
            SessionEnd::Closed(_) => Self::Lost {
                detail: detail.unwrap_or_else(|| "closed by the server".to_owned()),
            },
            SessionEnd::Silence | SessionEnd::NoWelcome => Self::Silent,
            SessionEnd::Malformed(error) => Self::Misbehaved {
                detail: error.to_string(),
            },
            SessionEnd::Misbehaved(rule) => Self::Misbehaved {
                detail: rule.to_owned(),
            },
        }
    }
}

fn unreachable_text(errors: &[ConnectError]) -> String {
    let mut texts: Vec<String> = errors.iter().map(ConnectError::to_string).collect();
    texts.dedup();
    match texts.is_empty() {
        true => "no carrier may be used for this address".to_owned(),
        false => texts.join("; "),
    }
}

fn goaway_text(reason: GoawayReason) -> &'static str {
    match reason {
        GoawayReason::Drain => "it shuts down, or gives connections away",
        GoawayReason::Replaced => "another session of the same device took over",
        GoawayReason::Revoked => "this device was revoked",
        GoawayReason::Upgrade => "it wants the device elsewhere",
    }
}
