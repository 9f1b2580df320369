//! Where the server is: `host:port`, `bellwire://host:port` or `wss://host/path`.

use std::fmt;
use std::str::FromStr;

use bellwire_protocol::LINK_PATH;
use rustls_pki_types::ServerName;

/// Port of the device link when none is named.
pub const DEFAULT_PORT: u16 = 4433;

/// Port of `wss://` when none is named.
const WSS_PORT: u16 = 443;

/// Greatest length of an address in bytes.
const ADDRESS_MAX_BYTES: usize = 512;

/// The address of a server.
///
/// | written | means |
/// | --- | --- |
/// | `push.example.org` | both carriers, port 4433 |
/// | `push.example.org:4433`, `192.0.2.1:4433`, `[2001:db8::1]:4433` | both carriers |
/// | `bellwire://push.example.org:4433` | the same |
/// | `wss://push.example.org/v1/link` | WebSocket only; port 443 unless it says otherwise |
///
/// The host must be named by the server's certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    host: String,
    port: u16,
    path: String,
    quic: bool,
}

/// Why a text is no address of a server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{text}` is no address of a server: {why}. Write host:port, bellwire://host:port or wss://host:port/v1/link"
)]
pub struct ParseEndpointError {
    text: String,
    why: &'static str,
}

impl Endpoint {
    /// The host, as a name or an address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port, the same number for UDP and TCP.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Path and query of the WebSocket endpoint.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Whether QUIC may be tried.
    pub fn offers_quic(&self) -> bool {
        self.quic
    }

    /// Host and port as they stand in a URL.
    pub(crate) fn authority(&self) -> String {
        match self.host.contains(':') {
            true => format!("[{}]:{}", self.host, self.port),
            false => format!("{}:{}", self.host, self.port),
        }
    }

    /// The name that the certificate must have.
    pub(crate) fn server_name(&self) -> Option<ServerName<'static>> {
        ServerName::try_from(self.host.clone()).ok()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.quic {
            true => f.write_str(&self.authority()),
            false => write!(f, "wss://{}{}", self.authority(), self.path),
        }
    }
}

impl FromStr for Endpoint {
    type Err = ParseEndpointError;

    fn from_str(text: &str) -> Result<Self, ParseEndpointError> {
        let wrong = |why| {
            let shown = text
                .chars()
                .take(80)
                .filter(|character| !character.is_control())
                .collect();
            ParseEndpointError { text: shown, why }
        };
        if text.len() > ADDRESS_MAX_BYTES {
            return Err(wrong("it is too long"));
        }
        let (quic, rest) = match text.split_once("://") {
            None => (true, text),
            Some(("bellwire", rest)) => (true, rest),
            Some(("wss", rest)) => (false, rest),
            Some(("ws" | "http", _)) => return Err(wrong("devices speak TLS only")),
            Some(_) => return Err(wrong("the scheme is unknown")),
        };
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        if quic && !matches!(path, "" | "/") {
            return Err(wrong("only wss:// has a path"));
        }
        let path = if matches!(path, "" | "/") {
            LINK_PATH
        } else {
            path
        };
        if path
            .chars()
            .any(|character| !character.is_ascii_graphic() || character == '#')
        {
            return Err(wrong("the path has characters that a URL does not have"));
        }
        let default = if quic { DEFAULT_PORT } else { WSS_PORT };
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let (host, after) = rest
                    .split_once(']')
                    .ok_or_else(|| wrong("a bracket is not closed"))?;
                let port = match after {
                    "" => None,
                    _ => Some(
                        after
                            .strip_prefix(':')
                            .ok_or_else(|| wrong("after the bracket comes a port"))?,
                    ),
                };
                (host, port)
            }
            None => match authority.rsplit_once(':') {
                Some((host, _)) if host.contains(':') => {
                    return Err(wrong("an IPv6 address needs brackets"));
                }
                Some((host, port)) => (host, Some(port)),
                None => (authority, None),
            },
        };
        let port = match port {
            None => default,
            Some(port) => match port.parse() {
                Ok(port) if port != 0 => port,
                _ => return Err(wrong("the port is a number from 1 to 65535")),
            },
        };
        let endpoint = Self {
            host: host.to_owned(),
            port,
            path: path.to_owned(),
            quic,
        };
        match endpoint.server_name() {
            Some(_) => Ok(endpoint),
            None => Err(wrong("the host is neither a name nor an address")),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn check(text: &str, expected: (&str, u16, &str, bool)) {
        let endpoint: Endpoint = text.parse().unwrap();
        let found = (
            endpoint.host(),
            endpoint.port(),
            endpoint.path(),
            endpoint.offers_quic(),
        );
        assert_eq!(found, expected, "{text}");
        assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
    }

    #[test]
    fn addresses_are_read_in_every_form() {
        check(
            "push.example.org",
            ("push.example.org", 4433, "/v1/link", true),
        );
        check("localhost:1", ("localhost", 1, "/v1/link", true));
        check(
            "bellwire://127.0.0.1:4433/",
            ("127.0.0.1", 4433, "/v1/link", true),
        );
        check("[::1]:4434", ("::1", 4434, "/v1/link", true));
        check(
            "wss://push.example.org",
            ("push.example.org", 443, "/v1/link", false),
        );
        check(
            "wss://[2001:db8::1]:8443/a/link?x=1",
            ("2001:db8::1", 8443, "/a/link?x=1", false),
        );
    }

    #[test]
    fn what_is_no_address_is_refused_with_a_reason() {
        for (text, why) in [
            ("", "neither a name"),
            ("ws://push.example.org", "TLS only"),
            ("ftp://push.example.org", "scheme"),
            ("push.example.org:0", "port"),
            ("push.example.org:70000", "port"),
            ("2001:db8::1", "brackets"),
            ("[::1", "closed"),
            ("[::1]4433", "after the bracket"),
            ("push.example.org/v1/link", "only wss"),
            ("two words:1", "neither a name"),
            ("wss://host/\r\nX: y", "path"),
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
