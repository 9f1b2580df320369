//! Where posts may go.
//!
//! A name is looked up only if it is listed. An address that is part of the public internet is allowed for a listed name; any other
//! (this machine, private networks, what clouds keep their metadata on) only if a listed network has it, by whatever name it
//! was reached. An address in the URL itself needs a listed network. Whatever lets a URL through lets it through at one port only: that
//! of the scheme, unless it names another one, or all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use http::Uri;
use http::uri::Scheme;

use crate::ports::{CallbackRecord, UrlRefusal};

/// What is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Which host.
    pub host: AllowedHost,
    /// At which port of it.
    pub port: AllowedPort,
}

/// A port that is allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedPort {
    /// That of the URL's scheme.
    OfScheme,
    /// This one.
    Only(u16),
    /// Every one.
    Any,
}

/// A host that is allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AllowedHost {
    /// This name, lower case.
    Name(String),
    /// Every name that ends so, lower case, with the point in front.
    Below(String),
    /// Every address of this network.
    Network(IpAddr, u8),
}

/// What the settings allow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    /// Hosts and networks. None: nothing.
    pub allow: Vec<Allowed>,
    /// `http://` as well.
    pub plain_http: bool,
}

/// Where a URL leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) tls: bool,
    pub(super) host: Host,
    pub(super) port: u16,
    /// Host and port as the header says them.
    pub(super) authority: String,
    pub(super) path: String,
}

/// A host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Host {
    Name(String),
    Address(IpAddr),
}

impl Rules {
    /// Whether nothing is allowed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty()
    }

    /// Reads a URL and says whether posts may go there.
    pub(super) fn place(&self, url: &str) -> Result<Place, UrlRefusal> {
        if self.is_empty() {
            return Err(UrlRefusal::Off);
        }
        let place = parse(url)?;
        if !place.tls && !self.plain_http {
            return Err(UrlRefusal::NotAllowed(
                "it must begin with `https://`: the operator's settings do not allow plain http (`callbacks.plain_http`)"
                    .to_owned(),
            ));
        }
        match &place.host {
            Host::Address(address) if self.has(&place, *address) => Ok(place),
            Host::Address(address) => Err(UrlRefusal::NotAllowed(format!(
                "the address {address} with port {} is in none of the networks of the operator's `callbacks.allow`",
                place.port
            ))),
            Host::Name(name) if self.knows(&place, name) => Ok(place),
            Host::Name(name) => Err(UrlRefusal::NotAllowed(format!(
                "the host {name} with port {} is not among those of the operator's `callbacks.allow`",
                place.port
            ))),
        }
    }

    /// Whether a connection may be made to an address that the listed host of a place was looked up to.
    pub(super) fn may_reach(&self, place: &Place, address: IpAddr) -> bool {
        self.has(place, address) || is_public(address)
    }

    /// The hosts that are listed with the port of a place.
    fn at(&self, place: &Place) -> impl Iterator<Item = &AllowedHost> {
        let port = place.port;
        let of_scheme = port == port_of_scheme(place.tls);
        let fits = move |allowed: &&Allowed| match allowed.port {
            AllowedPort::OfScheme => of_scheme,
            AllowedPort::Only(only) => only == port,
            AllowedPort::Any => true,
        };
        self.allow.iter().filter(fits).map(|allowed| &allowed.host)
    }

    fn knows(&self, place: &Place, name: &str) -> bool {
        self.at(place).any(|allowed| match allowed {
            AllowedHost::Name(known) => known == name,
            AllowedHost::Below(end) => name.ends_with(end.as_str()) && name.len() > end.len(),
            AllowedHost::Network(..) => false,
        })
    }

    fn has(&self, place: &Place, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.at(place).any(|allowed| match allowed {
            AllowedHost::Network(network, prefix) => in_network(address, *network, *prefix),
            AllowedHost::Name(_) | AllowedHost::Below(_) => false,
        })
    }
}

fn port_of_scheme(tls: bool) -> u16 {
    if tls { 443 } else { 80 }
}

fn parse(url: &str) -> Result<Place, UrlRefusal> {
    let malformed = |why| Err(UrlRefusal::Malformed(why));
    if url.len() > CallbackRecord::URL_MAX {
        return malformed("at most 2,048 bytes long");
    }
    if url.contains('#') {
        return malformed("without a fragment");
    }
    let Ok(uri) = url.parse::<Uri>() else {
        return malformed("an absolute URL such as `https://hooks.example.com/bellwire`");
    };
    let tls = match uri.scheme() {
        Some(scheme) if *scheme == Scheme::HTTPS => true,
        Some(scheme) if *scheme == Scheme::HTTP => false,
        Some(_) | None => return malformed("a URL that begins with `https://`"),
    };
    let Some(authority) = uri.authority() else {
        return malformed("a URL with a host");
    };
    if authority.as_str().contains('@') {
        return malformed("without a name and a password in it");
    }
    // What the library reads as no port at all may be one that is no number.
    let port = match authority.as_str().strip_prefix(authority.host()) {
        Some("") => None,
        Some(rest) => match rest.strip_prefix(':').map(str::parse::<u16>) {
            Some(Ok(port)) if port > 0 => Some(port),
            Some(_) | None => return malformed("a URL whose port is a number from 1 to 65535"),
        },
        None => return malformed("a URL with a host"),
    };
    let text = authority.host();
    let bare = text
        .strip_prefix('[')
        .and_then(|text| text.strip_suffix(']'));
    let host = match bare.unwrap_or(text).parse::<IpAddr>() {
        Ok(address) => Host::Address(address),
        Err(_) => {
            let name = text.trim_end_matches('.').to_ascii_lowercase();
            if bare.is_some() || !is_name(&name) {
                return malformed("a URL whose host is a name or an address");
            }
            Host::Name(name)
        }
    };
    Ok(Place {
        tls,
        host,
        port: port.unwrap_or(port_of_scheme(tls)),
        authority: authority.as_str().to_ascii_lowercase(),
        path: match uri.path_and_query().map(|path| path.as_str()) {
            None => "/".to_owned(),
            Some(path) if path.starts_with('/') => path.to_owned(),
            // A query alone.
            Some(query) => format!("/{query}"),
        },
    })
}

/// Whether this is a name of DNS. One of nothing but digits and points is none: resolvers take such for addresses, in ways of their own.
fn is_name(name: &str) -> bool {
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    let last_is_number = name.rsplit('.').next().is_some_and(|last| {
        last.bytes().all(|byte| byte.is_ascii_digit()) || last.starts_with("0x")
    });
    name.len() <= 253 && name.split('.').all(label) && !last_is_number
}

pub(crate) fn in_network(address: IpAddr, network: IpAddr, prefix: u8) -> bool {
    let same = |address: u128, network: u128, bits: u32| {
        let shift = bits.saturating_sub(u32::from(prefix));
        shift >= 128 || address >> shift == network >> shift
    };
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) => {
            same(address.to_bits().into(), network.to_bits().into(), 32)
        }
        (IpAddr::V6(address), IpAddr::V6(network)) => {
            same(address.to_bits(), network.to_bits(), 128)
        }
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

/// Networks that are no part of the public internet (the special-purpose registries of IANA).
const SPECIAL_V4: [([u8; 4], u8); 15] = [
    ([0, 0, 0, 0], 8),
    ([10, 0, 0, 0], 8),
    ([100, 64, 0, 0], 10),
    ([127, 0, 0, 0], 8),
    ([169, 254, 0, 0], 16),
    ([172, 16, 0, 0], 12),
    ([192, 0, 0, 0], 24),
    ([192, 0, 2, 0], 24),
    ([192, 88, 99, 0], 24),
    ([192, 168, 0, 0], 16),
    ([198, 18, 0, 0], 15),
    ([198, 51, 100, 0], 24),
    ([203, 0, 113, 0], 24),
    ([224, 0, 0, 0], 4),
    ([240, 0, 0, 0], 4),
];

/// The only part of IPv6 that is handed out for the public internet, and what of it is not.
const GLOBAL_V6: (Ipv6Addr, u8) = (Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 0), 3);
const SPECIAL_V6: [(Ipv6Addr, u8); 4] = [
    (Ipv6Addr::new(0x2001, 0, 0, 0, 0, 0, 0, 0), 23),
    (Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0), 32),
    // 6to4, which leads to addresses of IPv4.
    (Ipv6Addr::new(0x2002, 0, 0, 0, 0, 0, 0, 0), 16),
    (Ipv6Addr::new(0x3fff, 0, 0, 0, 0, 0, 0, 0), 20),
];

fn is_public(address: IpAddr) -> bool {
    let within = |network: IpAddr, prefix| in_network(address.to_canonical(), network, prefix);
    match address.to_canonical() {
        IpAddr::V4(_) => !SPECIAL_V4
            .iter()
            .any(|(network, prefix)| within(Ipv4Addr::from(*network).into(), *prefix)),
        IpAddr::V6(_) => {
            within(GLOBAL_V6.0.into(), GLOBAL_V6.1)
                && !SPECIAL_V6
                    .iter()
                    .any(|(network, prefix)| within((*network).into(), *prefix))
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn rules(plain_http: bool) -> Rules {
        let network =
            |address: &str, prefix| AllowedHost::Network(address.parse().unwrap(), prefix);
        let allow = [
            (
                AllowedHost::Name("hooks.example.com".to_owned()),
                AllowedPort::OfScheme,
            ),
            (
                AllowedHost::Below(".bank.internal".to_owned()),
                AllowedPort::OfScheme,
            ),
            (
                AllowedHost::Name("own.bank.internal".to_owned()),
                AllowedPort::Only(8_443),
            ),
            (network("10.20.0.0", 16), AllowedPort::OfScheme),
            (network("10.30.0.0", 16), AllowedPort::Only(8_443)),
            (network("fd00::", 8), AllowedPort::Any),
        ];
        Rules {
            allow: allow.map(|(host, port)| Allowed { host, port }).to_vec(),
            plain_http,
        }
    }

    fn reaches(rules: &Rules, url: &str, address: &str) -> bool {
        rules.may_reach(&rules.place(url).unwrap(), address.parse().unwrap())
    }

    #[test]
    fn what_is_listed_is_allowed_and_nothing_else() {
        let rules = rules(false);
        for allowed in [
            "https://hooks.example.com",
            "https://HOOKS.example.com./a?b=c",
            "https://hooks.example.com:443/",
            "https://own.bank.internal:8443/",
            "https://own.bank.internal/",
            "https://10.30.0.1:8443/",
            "https://a.bank.internal/x",
            "https://a.b.bank.internal/x",
            "https://10.20.255.1/x",
            "https://[fd00::1]:444/x",
            "https://[::ffff:10.20.0.1]/x",
        ] {
            assert!(rules.place(allowed).is_ok(), "{allowed}");
        }
        for refused in [
            "http://hooks.example.com/",
            "https://hooks.example.com:8443/",
            "https://hooks.example.com:22/",
            "https://hooks.example.com:80/",
            "https://a.bank.internal:8443/",
            "https://own.bank.internal:8444/",
            "https://10.20.0.1:8443/",
            "https://10.30.0.1/",
            "https://10.30.0.1:444/",
            "https://example.com/",
            "https://evilhooks.example.com/",
            "https://hooks.example.com.evil.org/",
            "https://bank.internal/",
            "https://evilbank.internal/",
            "https://10.21.0.1/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "https://8.8.8.8/",
        ] {
            let refusal = rules.place(refused).unwrap_err();
            assert!(
                matches!(refusal, UrlRefusal::NotAllowed(_)),
                "{refused}: {refusal:?}"
            );
        }
        assert_eq!(Rules::default().place("https://a.b"), Err(UrlRefusal::Off));
    }

    #[test]
    fn without_a_port_an_entry_is_for_that_of_the_scheme() {
        let rules = rules(true);
        for allowed in [
            "http://hooks.example.com/",
            "http://hooks.example.com:80/",
            "https://10.20.0.1:443/",
            "http://10.20.0.1/",
            "http://own.bank.internal:8443/",
            "http://[fd00::1]:9/",
        ] {
            assert!(rules.place(allowed).is_ok(), "{allowed}");
        }
        for refused in [
            "http://hooks.example.com:443/",
            "https://hooks.example.com:80/",
            "http://hooks.example.com:6379/",
            "http://10.20.0.1:443/",
            "http://10.30.0.1/",
        ] {
            assert!(rules.place(refused).is_err(), "{refused}");
        }
        // Name and network each allow their own ports, and both are asked.
        let other = "https://own.bank.internal:8443/";
        assert!(reaches(&rules, other, "10.30.0.1"));
        assert!(reaches(&rules, other, "fd00::1"));
        assert!(!reaches(&rules, other, "10.20.0.1"));
        assert!(reaches(&rules, "https://own.bank.internal/", "10.20.0.1"));
        assert!(!reaches(&rules, "https://own.bank.internal/", "10.30.0.1"));
    }

    #[test]
    fn what_is_no_url_to_post_to_is_said() {
        let long = format!("https://hooks.example.com/{}", "a".repeat(2_048));
        for bad in [
            "",
            "hooks.example.com",
            "/path",
            "ftp://hooks.example.com/",
            "https://",
            "https://user@hooks.example.com/",
            "https://user:pass@hooks.example.com/",
            "https://hooks.example.com/#part",
            "https://hooks.example.com:0/",
            "https://hooks.example.com:99999/",
            "https://127.1/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://0x7f000001/",
            "https://a..b/",
            "https://exa mple.com/",
            "https://exämple.com/",
            long.as_str(),
        ] {
            let refusal = rules(true).place(bad).unwrap_err();
            assert!(
                matches!(refusal, UrlRefusal::Malformed(_)),
                "{bad}: {refusal:?}"
            );
        }
        let place = rules(true).place("http://Hooks.Example.com/a?b").unwrap();
        assert_eq!(
            (place.tls, place.port, place.path.as_str()),
            (false, 80, "/a?b")
        );
        assert_eq!(place.authority, "hooks.example.com");
    }

    #[test]
    fn a_listed_name_leads_to_the_public_internet_or_to_a_listed_network() {
        let rules = rules(false);
        for reached in [
            "8.8.8.8",
            "203.0.112.255",
            "2606:4700::1111",
            "10.20.3.4",
            "fd12::1",
            "::ffff:8.8.8.8",
        ] {
            assert!(
                reaches(&rules, "https://hooks.example.com/", reached),
                "{reached}"
            );
        }
        for kept in [
            "0.0.0.0",
            "10.21.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.31.255.255",
            "192.168.1.1",
            "198.19.0.1",
            "203.0.113.7",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::7f00:1",
            "fe80::1",
            "fc00::1",
            "ff02::1",
            "2001:db8::1",
            "2002:7f00:1::",
        ] {
            assert!(
                !reaches(&rules, "https://hooks.example.com/", kept),
                "{kept}"
            );
        }
    }
}
