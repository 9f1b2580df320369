//! Why a proxy does not let us through, and what to do about it.

use std::net::SocketAddr;

use super::ConnectError;

/// Why a proxy does not let us through.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyFault {
    /// Its name has no address.
    #[error("its name cannot be found: {source}")]
    Resolve {
        /// The answer of the resolver.
        source: std::io::Error,
    },
    /// Nobody takes TCP connections there.
    #[error("cannot connect to {address}: {source}")]
    Tcp {
        /// The address.
        address: SocketAddr,
        /// The answer of the operating system.
        source: std::io::Error,
    },
    /// Its certificate is not one to trust.
    #[error("its certificate is not trusted: {detail}")]
    Certificate {
        /// What is wrong with it.
        detail: String,
    },
    /// TLS with it failed otherwise.
    #[error("no TLS with it: {detail}")]
    Tls {
        /// What happened.
        detail: String,
    },
    /// It said nothing in time.
    #[error("it does not answer within 8 s")]
    Timeout,
    /// It closed the connection without an answer.
    #[error("it closed the connection without an answer")]
    Ended,
    /// The connection to it broke.
    #[error("the connection to it broke: {source}")]
    Broken {
        /// The answer of the operating system.
        source: std::io::Error,
    },
    /// It wants credentials, and has none from us.
    #[error("it wants a user and a password (HTTP {status})")]
    WantsCredentials {
        /// 407, or 401 of a proxy that does not tell the two apart.
        status: u16,
    },
    /// It refused ours.
    #[error("it does not accept this user and password (HTTP {status})")]
    WrongCredentials {
        /// 407, or 401 of a proxy that does not tell the two apart.
        status: u16,
    },
    /// It does not take Basic authentication.
    #[error("it wants another kind of authentication than Basic: {schemes} (HTTP {status})")]
    OtherScheme {
        /// What it takes instead.
        schemes: String,
        /// 407, or 401 of a proxy that does not tell the two apart.
        status: u16,
    },
    /// It answered with another status than 2xx.
    #[error("{}", refused_text(*status))]
    Refused {
        /// The HTTP status.
        status: u16,
    },
    /// What it answered is no HTTP.
    #[error("it does not speak HTTP")]
    NotHttp,
    /// The head of its answer has no end.
    #[error("the head of its answer is longer than 8 KiB or 64 lines")]
    AnswerTooLong,
    /// Something in the tunnel spoke first; neither TLS nor a proxy does.
    #[error("something behind it spoke before we did")]
    SpokeFirst,
}

fn refused_text(status: u16) -> String {
    match status {
        403 | 405 => format!("it forbids this server and port (HTTP {status})"),
        500 => format!("it failed, or cannot reach the server (HTTP {status})"),
        502..=504 => format!("it cannot reach the server (HTTP {status})"),
        _ => format!("it answered HTTP {status}"),
    }
}

impl ProxyFault {
    /// One sentence: what to do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => {
                "Check the spelling of the proxy's name and this machine's DNS."
            }
            Self::Tcp { .. } | Self::Timeout => {
                "Check the proxy's address and port, and whether this network has it at all; where it is not needed everywhere, let the client try the direct way as well."
            }
            Self::Certificate { .. } => {
                "Name the authority that signed the proxy's certificate, or write http:// if the proxy does not speak TLS."
            }
            Self::Tls { .. } | Self::NotHttp | Self::SpokeFirst | Self::AnswerTooLong => {
                "Check the proxy's address and whether it is http:// or https://: something else than an HTTP proxy answered."
            }
            Self::Ended | Self::Broken { .. } => {
                "Check that this is an HTTP proxy, and its log: it may drop what it forbids."
            }
            Self::WantsCredentials { .. } => {
                "Write user and password into the proxy's URL: http://user:password@host:port."
            }
            Self::WrongCredentials { .. } => {
                "Check user and password in the proxy's URL; special characters must be percent-encoded."
            }
            Self::OtherScheme { .. } => {
                "Ask the proxy's operator for Basic authentication, or for an exception for the server."
            }
            Self::Refused {
                status: 500 | 502..=504,
            } => {
                "Check that the server runs and that the proxy can reach it; the proxy's log says more."
            }
            Self::Refused { .. } => {
                "Ask the proxy's operator to permit CONNECT to the server's name and port (many permit 443 alone)."
            }
        }
    }

    pub(super) fn from_tcp(error: ConnectError) -> Self {
        match error {
            ConnectError::Resolve { source, .. } => Self::Resolve { source },
            ConnectError::Tcp { address, source } => Self::Tcp { address, source },
            other @ (ConnectError::Socket { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Proxy { .. }
            | ConnectError::Certificate { .. }
            | ConnectError::Handshake { .. }
            | ConnectError::Upgrade { .. }
            | ConnectError::WebSocket { .. }) => Self::Broken {
                source: std::io::Error::other(other),
            },
        }
    }

    pub(super) fn from_tls(detail: &str) -> Self {
        match detail.find("invalid peer certificate") {
            Some(at) => Self::Certificate {
                detail: detail[at..].to_owned(),
            },
            None => Self::Tls {
                detail: detail.to_owned(),
            },
        }
    }

    /// Whether the proxy itself said so; otherwise it may not even be there.
    pub(crate) fn is_from_proxy(&self) -> bool {
        !matches!(
            self,
            Self::Resolve { .. } | Self::Tcp { .. } | Self::Timeout
        )
    }
}
