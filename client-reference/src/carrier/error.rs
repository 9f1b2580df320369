//! Why there is no link, and what to do about it.

use std::net::SocketAddr;

use bellwire_protocol::{Carrier, Code};

use super::ProxyFault;

/// Why a carrier could not connect. Sorted by where to look: the network, the certificate, the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The name has no address.
    #[error("cannot find `{host}`: {source}")]
    Resolve {
        /// The name.
        host: String,
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
    /// A local socket cannot be made.
    #[error("cannot open a UDP socket: {source}")]
    Socket {
        /// The answer of the operating system.
        source: std::io::Error,
    },
    /// No answer in time.
    #[error("no answer from {to} over {} within 10 s", carrier.name())]
    Timeout {
        /// The carrier that was tried.
        carrier: Carrier,
        /// The server.
        to: String,
    },
    /// The proxy refused, is none, or is not there.
    #[error("the proxy {proxy} does not let us through: {fault}")]
    Proxy {
        /// The proxy: host and port, never the credentials.
        proxy: String,
        /// What went wrong.
        fault: ProxyFault,
    },
    /// The server's certificate is not one to trust.
    #[error("the certificate of {host} is not trusted: {detail}")]
    Certificate {
        /// The server.
        host: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The TLS or QUIC handshake failed otherwise.
    #[error("no secure connection to {host} over {}: {detail}", carrier.name())]
    Handshake {
        /// The carrier that was tried.
        carrier: Carrier,
        /// The server.
        host: String,
        /// What happened.
        detail: String,
    },
    /// The server, or something in front of it, did not upgrade to WebSocket.
    #[error("{host} answered the WebSocket upgrade with HTTP {status}{}", code.map(|code| format!(" ({code})")).unwrap_or_default())]
    Upgrade {
        /// The server.
        host: String,
        /// The HTTP status.
        status: u16,
        /// Our code, if the answer carries one.
        code: Option<Code>,
    },
    /// What answered does not speak WebSocket as it should.
    #[error("{host} does not speak Bellwire over WebSocket: {detail}")]
    WebSocket {
        /// The server.
        host: String,
        /// What happened.
        detail: String,
    },
}

impl ConnectError {
    /// One sentence: what to do.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => {
                "Check the spelling of the server's name and this machine's DNS."
            }
            Self::Tcp { .. } => {
                "Check address and port (devices use 4433 by default), that the server runs, and the firewall."
            }
            Self::Socket { .. } => {
                "Check the limit of open files and whether this system permits UDP."
            }
            Self::Timeout {
                carrier: Carrier::Quic,
                ..
            } => {
                "UDP may be blocked on the way; WebSocket is tried as well. Otherwise check address, port and firewall."
            }
            Self::Timeout {
                carrier: Carrier::WebSocket,
                ..
            } => "Check address, port and firewall, and that the server runs.",
            Self::Proxy { fault, .. } => fault.advice(),
            Self::Certificate { detail, .. } => certificate_advice(detail),
            Self::Handshake { .. } => {
                "Check that this is the device port of a Bellwire server and not another service."
            }
            Self::Upgrade {
                code: Some(code), ..
            } => code.remedy(),
            Self::Upgrade { .. } => {
                "Check host, port and path: something else than a Bellwire device port answered."
            }
            Self::WebSocket { .. } => {
                "Check that host, port and path are those of a Bellwire device port."
            }
        }
    }

    /// Whether the other side of the network said so: such a failure tells more than silence.
    pub(crate) fn is_from_server(&self) -> bool {
        match self {
            Self::Certificate { .. }
            | Self::Handshake { .. }
            | Self::Upgrade { .. }
            | Self::WebSocket { .. } => true,
            Self::Proxy { fault, .. } => fault.is_from_proxy(),
            Self::Resolve { .. }
            | Self::Tcp { .. }
            | Self::Socket { .. }
            | Self::Timeout { .. } => false,
        }
    }

    /// The error behind a failed TLS handshake, from the text of the verifier.
    pub(crate) fn handshake(carrier: Carrier, host: &str, detail: String) -> Self {
        let host = host.to_owned();
        // The carriers put different words around the verifier's; with its own alone, two carriers say the same thing once.
        match detail.find("invalid peer certificate") {
            Some(at) => Self::Certificate {
                host,
                detail: detail[at..].to_owned(),
            },
            None => Self::Handshake {
                carrier,
                host,
                detail,
            },
        }
    }
}

fn certificate_advice(detail: &str) -> &'static str {
    if detail.contains("UnknownIssuer") || detail.contains("BadSignature") {
        "Name the authority that signed the server's certificate (--ca FILE); a development server keeps it in dev-ca.pem in its data directory."
    } else if detail.contains("Expired") {
        "The certificate ran out, or this machine's clock is ahead: check the date, then renew the certificate."
    } else if detail.contains("NotValidYet") {
        "The certificate begins later, or this machine's clock is behind: check the date."
    } else if detail.contains("NotValidForName") {
        "The certificate names other hosts: connect by a name that stands in it, or have it made for this one."
    } else {
        "Have the operator look at the server's certificate."
    }
}
