//! The proxy of the environment: `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, as most programs read them.
//!
//! The variables in lower case come first, as in curl. An empty one counts as absent. `NO_PROXY` is a list with commas or
//! spaces of: `*` (everything), a name (`example.org` or `.example.org`: this host and all below it), an address, or a network
//! (`10.0.0.0/8`); each may end in `:port`.

use std::net::IpAddr;

use super::{ParseProxyError, Proxy};
use crate::endpoint::Endpoint;

/// Entries of `NO_PROXY` that are read.
const EXCEPTIONS_MAX: usize = 256;

/// Why the proxy of the environment cannot be used. The text names the variable, never its value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the environment variable {variable}: {source}")]
pub struct EnvironmentProxyError {
    variable: &'static str,
    source: ParseProxyError,
}

/// Servers that are reached without the proxy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Exceptions(Vec<Exception>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Exception {
    host: Host,
    port: Option<u16>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Any,
    /// Without leading dots, in lower case.
    Name(String),
    Network(IpAddr, u8),
}

/// What the environment says, read once.
pub(crate) fn from_environment() -> Result<Option<(Proxy, Exceptions)>, EnvironmentProxyError> {
    read(|name| std::env::var(name).ok())
}

fn read(
    variable: impl Fn(&str) -> Option<String>,
) -> Result<Option<(Proxy, Exceptions)>, EnvironmentProxyError> {
    let first = |names: &[&'static str]| {
        names.iter().find_map(|&name| {
            let value = variable(name)?;
            let value = value.trim();
            (!value.is_empty()).then(|| (name, value.to_owned()))
        })
    };
    let Some((name, url)) = first(&["https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"]) else {
        return Ok(None);
    };
    let proxy = url.parse().map_err(|source| EnvironmentProxyError {
        variable: name,
        source,
    })?;
    let exceptions = first(&["no_proxy", "NO_PROXY"])
        .map_or_else(Exceptions::default, |(_, list)| Exceptions::read(&list));
    Ok(Some((proxy, exceptions)))
}

impl Exceptions {
    /// Entries that cannot be read match nothing, as everywhere.
    fn read(list: &str) -> Self {
        let entries = list
            .split(|character: char| character == ',' || character.is_whitespace())
            .filter(|entry| !entry.is_empty());
        Self(
            entries
                .take(EXCEPTIONS_MAX)
                .filter_map(Exception::read)
                .collect(),
        )
    }

    /// Whether this server is reached directly.
    pub(crate) fn name(&self, server: &Endpoint) -> bool {
        self.0.iter().any(|exception| exception.names(server))
    }
}

impl Exception {
    fn read(entry: &str) -> Option<Self> {
        if entry == "*" {
            return Some(Self {
                host: Host::Any,
                port: None,
            });
        }
        let (host, port) = match entry.rsplit_once(':') {
            // The colons of an IPv6 address are no ports; one with a port has brackets.
            Some((host, port)) if !host.contains(':') || host.ends_with(']') => {
                (host, Some(port.parse().ok()?))
            }
            _ => (entry, None),
        };
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let (address, bits) = match host.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (host, None),
        };
        let host = match (address.parse::<IpAddr>(), bits) {
            (Ok(address), None) => Host::Network(address, width(&address)),
            (Ok(address), Some(bits)) => {
                let bits = bits.parse().ok().filter(|bits| *bits <= width(&address))?;
                Host::Network(address, bits)
            }
            (Err(_), None) => Host::Name(
                host.trim_start_matches("*.")
                    .trim_matches('.')
                    .to_ascii_lowercase(),
            ),
            (Err(_), Some(_)) => return None,
        };
        (host != Host::Name(String::new())).then_some(Self { host, port })
    }

    fn names(&self, server: &Endpoint) -> bool {
        if self.port.is_some_and(|port| port != server.port()) {
            return false;
        }
        match &self.host {
            Host::Any => true,
            Host::Name(name) => {
                let host = server.host().trim_end_matches('.').to_ascii_lowercase();
                host.strip_suffix(name.as_str())
                    .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            Host::Network(network, bits) => {
                let host = server.host().parse::<IpAddr>();
                host.is_ok_and(|host| within(&host, network, *bits))
            }
        }
    }
}

const fn width(address: &IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}

fn within(host: &IpAddr, network: &IpAddr, bits: u8) -> bool {
    let (host, network, width) = match (host, network) {
        (IpAddr::V4(host), IpAddr::V4(network)) => (
            u128::from(u32::from(*host)),
            u128::from(u32::from(*network)),
            32,
        ),
        (IpAddr::V6(host), IpAddr::V6(network)) => (u128::from(*host), u128::from(*network), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => return false,
    };
    bits == 0 || (host ^ network) >> (width - u32::from(bits)) == 0
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn from(
        variables: &[(&str, &str)],
    ) -> Result<Option<(Proxy, Exceptions)>, EnvironmentProxyError> {
        read(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn variables_in_lower_case_come_first_and_empty_ones_do_not_count() {
        let shown = |variables: &[(&str, &str)]| {
            let found = from(variables).unwrap();
            found.map(|(proxy, _)| proxy.to_string())
        };
        assert_eq!(shown(&[]), None);
        assert_eq!(shown(&[("HTTP_PROXY", "http://a:1")]), None, "not for TLS");
        assert_eq!(
            shown(&[("HTTPS_PROXY", "http://a:1"), ("https_proxy", "http://b:2")]),
            Some("b:2".to_owned())
        );
        assert_eq!(
            shown(&[("https_proxy", " "), ("ALL_PROXY", "https://c")]),
            Some("https://c:443".to_owned())
        );
        let error = from(&[("HTTPS_PROXY", "socks5://ann:s3cret@a:1")])
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("HTTPS_PROXY") && error.contains("SOCKS") && !error.contains("s3cret"),
            "{error}"
        );
    }

    #[test]
    fn no_proxy_names_hosts_those_below_them_networks_and_ports() {
        let check = |list: &str, server: &str, expected: bool| {
            let server: Endpoint = server.parse().unwrap();
            assert_eq!(
                Exceptions::read(list).name(&server),
                expected,
                "{list} and {server}"
            );
        };
        check("*", "push.example.org", true);
        check("example.org", "push.example.org", true);
        check(".example.org", "EXAMPLE.org", true);
        check("*.example.org", "push.example.org", true);
        check("example.org", "badexample.org", false);
        check("a, example.org b", "example.org", true);
        check("example.org:443", "example.org:4433", false);
        check("example.org:4433", "example.org:4433", true);
        check("10.0.0.0/8", "10.1.2.3", true);
        check("10.0.0.0/8", "11.1.2.3", false);
        check("10.1.2.3", "10.1.2.3", true);
        check("10.1.2.3", "10.1.2.30", false);
        check("0.0.0.0/0", "10.1.2.3", true);
        check("2001:db8::/32", "[2001:db8:1::1]:1", true);
        check("[::1]:4433", "[::1]:4433", true);
        check("[::1]:1", "[::1]:4433", false);
        check("10.0.0.0/33,,  ., /8", "10.1.2.3", false);
    }
}
