//! The kinds of values that settings have, and how each is written.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// A value as it was given, before anybody asked what it means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Given {
    /// Text; everything from the environment is.
    Text(String),
    /// A whole number.
    Number(i128),
    /// `true` or `false`.
    Flag(bool),
    /// A list of texts.
    List(Vec<String>),
    /// Something that no setting is: a date, a fraction, a mixed list.
    Other(&'static str),
}

impl Given {
    fn describe(&self) -> String {
        match self {
            Given::Text(text) => format!("\"{text}\""),
            Given::Number(number) => number.to_string(),
            Given::Flag(flag) => flag.to_string(),
            Given::List(_) => "a list".to_owned(),
            Given::Other(kind) => (*kind).to_owned(),
        }
    }
}

/// A value that does not do: what is wrong, and what would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unfit {
    /// What is wrong.
    pub what: String,
    /// What to write instead.
    pub help: String,
}

/// A kind of value.
pub trait Setting: Sync {
    /// What it is once it is understood.
    type Value: PartialEq;

    /// Understands what was given.
    ///
    /// # Errors
    /// What is wrong with it, and what would do.
    fn parse(&self, given: &Given) -> Result<Self::Value, Unfit>;

    /// What may be written, in a few words for the table of keys.
    fn takes(&self) -> String;

    /// What was given does not do.
    fn unfit(&self, given: &Given) -> Unfit {
        Unfit {
            what: format!("{} does not do here", given.describe()),
            help: format!("write {}", self.takes()),
        }
    }
}

/// One key: its name, what it takes, its default as it would be written in the file, what it is for.
pub struct Key<S: Setting + 'static> {
    /// `section.key`, or a name alone at the top of the file.
    pub name: &'static str,
    /// What it takes.
    pub setting: S,
    /// As it would be written; empty: there is none, the setting is off.
    pub default: &'static str,
    /// What it is for, and what an operator notices when it is set wrong.
    pub about: &'static str,
}

/// A key whatever its kind.
pub trait AnyKey: Sync {
    /// `section.key`.
    fn name(&self) -> &'static str;
    /// As it would be written; empty: there is none.
    fn default(&self) -> &'static str;
    /// What it is for.
    fn about(&self) -> &'static str;
    /// What may be written.
    fn takes(&self) -> String;
    /// Whether this would do.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&self, given: &Given) -> Result<(), Unfit>;
    /// Whether two ways of writing it mean the same.
    fn same(&self, one: &Given, other: &Given) -> bool;
}

impl<S: Setting> AnyKey for Key<S> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn default(&self) -> &'static str {
        self.default
    }

    fn about(&self) -> &'static str {
        self.about
    }

    fn takes(&self) -> String {
        self.setting.takes()
    }

    fn check(&self, given: &Given) -> Result<(), Unfit> {
        self.setting.parse(given).map(|_| ())
    }

    fn same(&self, one: &Given, other: &Given) -> bool {
        match (self.setting.parse(one), self.setting.parse(other)) {
            (Ok(one), Ok(other)) => one == other,
            (Ok(_) | Err(_), _) => one == other,
        }
    }
}

/// A path of a file or directory.
pub struct PathSetting;

impl Setting for PathSetting {
    type Value = PathBuf;

    fn parse(&self, given: &Given) -> Result<PathBuf, Unfit> {
        match given {
            Given::Text(text) if !text.is_empty() && !text.contains('\0') => {
                Ok(PathBuf::from(text))
            }
            Given::Text(_)
            | Given::Number(_)
            | Given::Flag(_)
            | Given::List(_)
            | Given::Other(_) => Err(self.unfit(given)),
        }
    }

    fn takes(&self) -> String {
        "a path".to_owned()
    }
}

/// An address of this machine with a port.
pub struct AddressSetting;

impl Setting for AddressSetting {
    type Value = SocketAddr;

    fn parse(&self, given: &Given) -> Result<SocketAddr, Unfit> {
        let Given::Text(text) = given else {
            return Err(self.unfit(given));
        };
        if let Some(port) = text
            .strip_prefix("localhost:")
            .and_then(|port| port.parse().ok())
        {
            return Ok(SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port));
        }
        text.parse().map_err(|_| Unfit {
            what: format!("\"{text}\" is not an address with a port"),
            help: "write an address of this machine and a port, such as \"127.0.0.1:8480\", \"0.0.0.0:4433\" (every \
                   IPv4 address) or \"[::]:4433\" (every address); names other than localhost are not looked up"
                .to_owned(),
        })
    }

    fn takes(&self) -> String {
        "address:port; port 0 picks a free one".to_owned()
    }
}

/// A size in bytes.
pub struct BytesSetting {
    /// Least.
    pub min: u64,
    /// Most.
    pub max: u64,
}

/// Units of sizes, largest first.
const SIZE_UNITS: [(&str, u64); 4] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
];

/// A size as it is written.
pub(super) struct Size(pub(super) u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, bytes) in SIZE_UNITS {
            if self.0 >= bytes && self.0.is_multiple_of(bytes) {
                return write!(f, "{}{unit}", self.0 / bytes);
            }
        }
        self.0.fmt(f)
    }
}

impl Setting for BytesSetting {
    type Value = u64;

    fn parse(&self, given: &Given) -> Result<u64, Unfit> {
        let bytes = match given {
            Given::Number(number) => u64::try_from(*number).ok(),
            Given::Text(text) => parse_size(text),
            Given::Flag(_) | Given::List(_) | Given::Other(_) => None,
        };
        let Some(bytes) = bytes else {
            return Err(self.unfit(given));
        };
        if bytes < self.min || bytes > self.max {
            return Err(Unfit {
                what: format!("{} is out of bounds", given.describe()),
                help: format!("write {}", self.takes()),
            });
        }
        Ok(bytes)
    }

    fn takes(&self) -> String {
        format!(
            "a size such as \"64MiB\", or a number of bytes; {} to {}",
            Size(self.min),
            Size(self.max)
        )
    }
}

fn parse_size(text: &str) -> Option<u64> {
    for (unit, bytes) in SIZE_UNITS {
        if let Some(number) = text.strip_suffix(unit) {
            return number.trim_end().parse::<u64>().ok()?.checked_mul(bytes);
        }
    }
    text.parse().ok()
}

/// A length of time.
pub struct SpanSetting {
    /// Least, milliseconds.
    pub min_ms: u64,
    /// Most, milliseconds.
    pub max_ms: u64,
}

/// Units of time, largest first, in milliseconds.
const SPAN_UNITS: [(&str, u64); 5] = [
    ("d", 86_400_000),
    ("h", 3_600_000),
    ("m", 60_000),
    ("s", 1_000),
    ("ms", 1),
];

/// A length of time as it is written, milliseconds.
struct Span(u64);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, ms) in SPAN_UNITS {
            if self.0 >= ms && self.0.is_multiple_of(ms) {
                return write!(f, "{}{unit}", self.0 / ms);
            }
        }
        f.write_str("0s")
    }
}

impl Setting for SpanSetting {
    type Value = Duration;

    fn parse(&self, given: &Given) -> Result<Duration, Unfit> {
        if let Given::Number(number) = given {
            return Err(Unfit {
                what: format!("{number} has no unit of time"),
                help: format!("write {}", self.takes()),
            });
        }
        let Given::Text(text) = given else {
            return Err(self.unfit(given));
        };
        let Some(ms) = parse_span(text) else {
            return Err(self.unfit(given));
        };
        if ms < self.min_ms || ms > self.max_ms {
            return Err(Unfit {
                what: format!("\"{text}\" is out of bounds"),
                help: format!("write {}", self.takes()),
            });
        }
        Ok(Duration::from_millis(ms))
    }

    fn takes(&self) -> String {
        format!(
            "a time with its unit (ms, s, m, h, d); {} to {}",
            Span(self.min_ms),
            Span(self.max_ms)
        )
    }
}

fn parse_span(text: &str) -> Option<u64> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let (_, ms) = SPAN_UNITS
        .iter()
        .find(|(name, _)| *name == unit.trim_start())?;
    number.parse::<u64>().ok()?.checked_mul(*ms)
}

/// A whole number.
pub struct CountSetting {
    /// Least.
    pub min: u64,
    /// Most.
    pub max: u64,
}

impl Setting for CountSetting {
    type Value = u64;

    fn parse(&self, given: &Given) -> Result<u64, Unfit> {
        let number = match given {
            Given::Number(number) => u64::try_from(*number).ok(),
            Given::Text(text) => text.parse().ok(),
            Given::Flag(_) | Given::List(_) | Given::Other(_) => None,
        };
        number
            .filter(|number| (self.min..=self.max).contains(number))
            .ok_or_else(|| self.unfit(given))
    }

    fn takes(&self) -> String {
        format!("a whole number; {} to {}", self.min, self.max)
    }
}

/// One of a few words.
pub struct ChoiceSetting<T: Copy + Sync + 'static> {
    /// The words and what they mean.
    pub words: &'static [(&'static str, T)],
    /// Words that are understood and refused, with the reason.
    pub refused: &'static [(&'static str, &'static str)],
}

impl<T: Copy + PartialEq + Sync + 'static> Setting for ChoiceSetting<T> {
    type Value = T;

    fn parse(&self, given: &Given) -> Result<T, Unfit> {
        let Given::Text(text) = given else {
            return Err(self.unfit(given));
        };
        if let Some((_, value)) = self.words.iter().find(|(word, _)| word == text) {
            return Ok(*value);
        }
        if let Some((word, why)) = self.refused.iter().find(|(word, _)| word == text) {
            return Err(Unfit {
                what: format!("\"{word}\" {why}"),
                help: format!("write {}", self.takes()),
            });
        }
        let guess = super::closest(text, self.words.iter().map(|(word, _)| *word));
        Err(Unfit {
            what: format!("\"{text}\" is not known here"),
            help: match guess {
                Some(word) => format!("did you mean \"{word}\"? Write {}", self.takes()),
                None => format!("write {}", self.takes()),
            },
        })
    }

    fn takes(&self) -> String {
        let words: Vec<String> = self
            .words
            .iter()
            .map(|(word, _)| format!("\"{word}\""))
            .collect();
        words.join(" or ")
    }
}

/// Yes or no.
pub struct FlagSetting;

impl Setting for FlagSetting {
    type Value = bool;

    fn parse(&self, given: &Given) -> Result<bool, Unfit> {
        match given {
            Given::Flag(flag) => Ok(*flag),
            Given::Text(text) if text == "true" => Ok(true),
            Given::Text(text) if text == "false" => Ok(false),
            Given::Text(_) | Given::Number(_) | Given::List(_) | Given::Other(_) => {
                Err(self.unfit(given))
            }
        }
    }

    fn takes(&self) -> String {
        "true or false".to_owned()
    }
}

/// A list of networks.
pub struct NetworksSetting;

/// Most networks in a list: each one is looked at for each new connection.
const MAX_NETWORKS: usize = 64;

impl Setting for NetworksSetting {
    type Value = Vec<(IpAddr, u8)>;

    fn parse(&self, given: &Given) -> Result<Vec<(IpAddr, u8)>, Unfit> {
        let listed: Vec<&str> = match given {
            Given::List(list) => list.iter().map(String::as_str).collect(),
            Given::Text(text) if text.is_empty() => Vec::new(),
            Given::Text(text) => text.split(',').map(str::trim).collect(),
            Given::Number(_) | Given::Flag(_) | Given::Other(_) => return Err(self.unfit(given)),
        };
        if listed.len() > MAX_NETWORKS {
            return Err(Unfit {
                what: format!("{} networks are listed", listed.len()),
                help: format!(
                    "write at most {MAX_NETWORKS}; several small ones may be one larger one"
                ),
            });
        }
        listed
            .into_iter()
            .map(|text| {
                parse_network(text).ok_or_else(|| Unfit {
                    what: format!("\"{text}\" is not a network"),
                    help: "write an address and a prefix length, such as \"10.0.0.0/8\" or \"2001:db8::/32\""
                        .to_owned(),
                })
            })
            .collect()
    }

    fn takes(&self) -> String {
        format!("a list of networks such as \"10.0.0.0/8\"; at most {MAX_NETWORKS}")
    }
}

/// What may be posted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Allowed {
    /// Which host.
    pub host: Host,
    /// At which port of it.
    pub port: AllowedPort,
}

/// A port that may be posted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AllowedPort {
    /// That of the URL's scheme: 443 for https, 80 for http.
    OfScheme,
    /// This one.
    Only(u16),
    /// Every one.
    Any,
}

/// A host that may be posted to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// This name, lower case.
    Name(String),
    /// Every name that ends so, lower case, with the point in front.
    Below(String),
    /// Every address of this network.
    Network(IpAddr, u8),
}

/// A list of hosts and networks.
pub struct HostsSetting;

/// Most hosts in a list.
const MAX_HOSTS: usize = 256;

impl Setting for HostsSetting {
    type Value = Vec<Allowed>;

    fn parse(&self, given: &Given) -> Result<Vec<Allowed>, Unfit> {
        let listed: Vec<&str> = match given {
            Given::List(list) => list.iter().map(String::as_str).collect(),
            Given::Text(text) if text.is_empty() => Vec::new(),
            Given::Text(text) => text.split(',').map(str::trim).collect(),
            Given::Number(_) | Given::Flag(_) | Given::Other(_) => return Err(self.unfit(given)),
        };
        if listed.len() > MAX_HOSTS {
            return Err(Unfit {
                what: format!("{} hosts are listed", listed.len()),
                help: format!("write at most {MAX_HOSTS}; `*.example.com` stands for many"),
            });
        }
        listed
            .into_iter()
            .map(|text| {
                parse_allowed(text).ok_or_else(|| Unfit {
                    what: format!("\"{text}\" is neither a host nor a network"),
                    help: "write names such as \"hooks.example.com\" or \"*.example.com:8443\", and networks such as \"10.0.0.0/8\" or \
                           \"[fd00::/8]:8443\""
                        .to_owned(),
                })
            })
            .collect()
    }

    fn takes(&self) -> String {
        format!(
            "a list of hosts such as \"hooks.example.com\" and networks such as \"10.0.0.0/8\", each with a port such as \":8443\" \
             where it is another; at most {MAX_HOSTS}"
        )
    }
}

fn parse_allowed(text: &str) -> Option<Allowed> {
    // What is an address or a network as it stands has no port, whatever follows its last colon.
    if let Some((address, prefix)) = parse_network(text) {
        return Some(Allowed {
            host: Host::Network(address, prefix),
            port: AllowedPort::OfScheme,
        });
    }
    let (host, port) = match text.strip_prefix('[') {
        // An address of IPv6 has colons itself, so its port stands behind brackets.
        Some(rest) => {
            let (inside, port) = rest.split_once(']')?;
            let (address, prefix) =
                parse_network(inside).filter(|(address, _)| address.is_ipv6())?;
            (Host::Network(address, prefix), port)
        }
        None => {
            let end = text.find(':').unwrap_or(text.len());
            (parse_host(&text[..end])?, &text[end..])
        }
    };
    let port = match port.strip_prefix(':') {
        Some("*") => AllowedPort::Any,
        Some(number) => AllowedPort::Only(number.parse().ok().filter(|port| *port > 0)?),
        None if port.is_empty() => AllowedPort::OfScheme,
        None => return None,
    };
    Some(Allowed { host, port })
}

fn parse_host(text: &str) -> Option<Host> {
    if let Some((address, prefix)) = parse_network(text) {
        return Some(Host::Network(address, prefix));
    }
    let name = text.to_ascii_lowercase();
    let (below, name) = match name.strip_prefix("*.") {
        Some(name) => (true, name),
        None => (false, name.as_str()),
    };
    let label = |label: &str| {
        (1..=63).contains(&label.len())
            && label
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_'))
    };
    // One that ends in a number would be an address that was not written well.
    let last_is_number = name
        .rsplit('.')
        .next()
        .is_some_and(|last| last.bytes().all(|byte| byte.is_ascii_digit()));
    if name.len() > 253 || last_is_number || !name.split('.').all(label) {
        return None;
    }
    Some(if below {
        Host::Below(format!(".{name}"))
    } else {
        Host::Name(name.to_owned())
    })
}

fn parse_network(text: &str) -> Option<(IpAddr, u8)> {
    let (address, prefix) = match text.split_once('/') {
        Some((address, prefix)) => (address.parse::<IpAddr>().ok()?, prefix.parse::<u8>().ok()?),
        None => {
            let address = text.parse::<IpAddr>().ok()?;
            (address, if address.is_ipv4() { 32 } else { 128 })
        }
    };
    let most = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= most).then_some((address, prefix))
}

/// A text with some rule of its own.
pub struct TextSetting {
    /// What may be written.
    pub takes: &'static str,
    /// Whether this may.
    pub fits: fn(&str) -> bool,
}

impl Setting for TextSetting {
    type Value = String;

    fn parse(&self, given: &Given) -> Result<String, Unfit> {
        match given {
            Given::Text(text) if (self.fits)(text) => Ok(text.clone()),
            Given::Text(_)
            | Given::Number(_)
            | Given::Flag(_)
            | Given::List(_)
            | Given::Other(_) => Err(self.unfit(given)),
        }
    }

    fn takes(&self) -> String {
        self.takes.to_owned()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn text(text: &str) -> Given {
        Given::Text(text.to_owned())
    }

    #[test]
    fn sizes_are_numbers_of_bytes_or_carry_a_unit() {
        let size = BytesSetting {
            min: 0,
            max: 1 << 40,
        };
        assert_eq!(size.parse(&text("64MiB")), Ok(64 << 20));
        assert_eq!(size.parse(&text("4 KiB")), Ok(4096));
        assert_eq!(size.parse(&text("4096")), Ok(4096));
        assert_eq!(size.parse(&Given::Number(17)), Ok(17));
        for bad in [
            "64MB",
            "-1",
            "MiB",
            "1.5GiB",
            "99999999999999999999",
            "16777216TiB",
            "",
        ] {
            assert!(size.parse(&text(bad)).is_err(), "{bad}");
        }
        assert!(size.parse(&Given::Number(-1)).is_err());
        assert_eq!(Size(64 << 20).to_string(), "64MiB");
        assert_eq!(Size(1500).to_string(), "1500");
    }

    #[test]
    fn times_always_carry_a_unit() {
        let span = SpanSetting {
            min_ms: 0,
            max_ms: u64::MAX,
        };
        assert_eq!(span.parse(&text("50ms")), Ok(Duration::from_millis(50)));
        assert_eq!(span.parse(&text("7d")), Ok(Duration::from_secs(7 * 86_400)));
        assert_eq!(span.parse(&text("2 h")), Ok(Duration::from_secs(7_200)));
        assert_eq!(span.parse(&text("5m")), Ok(Duration::from_secs(300)));
        for bad in [
            "30",
            "s",
            "",
            "1.5s",
            "-1s",
            "30 seconds",
            "99999999999999999999d",
            "３s",
        ] {
            assert!(span.parse(&text(bad)).is_err(), "{bad}");
        }
        assert!(
            span.parse(&Given::Number(30))
                .unwrap_err()
                .what
                .contains("unit")
        );
        assert_eq!(Span(90_000).to_string(), "90s");
        assert_eq!(Span(0).to_string(), "0s");
    }

    #[test]
    fn addresses_are_numbers_or_localhost_and_never_looked_up() {
        let address = AddressSetting;
        assert_eq!(
            address.parse(&text("localhost:0")).unwrap().to_string(),
            "127.0.0.1:0"
        );
        assert_eq!(
            address.parse(&text("[::]:4433")).unwrap().to_string(),
            "[::]:4433"
        );
        for bad in [
            "push.example.com:4433",
            "127.0.0.1",
            ":4433",
            "localhost:x",
            "127.0.0.1:70000",
        ] {
            assert!(address.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn hosts_are_names_endings_and_networks() {
        let both = HostsSetting
            .parse(&text(
                "Hooks.example.com, *.bank.internal,10.0.0.0/8 , ::1, fd00::/8, [::1]",
            ))
            .unwrap();
        let network = |address: &str, prefix| Host::Network(address.parse().unwrap(), prefix);
        let name = Host::Name("hooks.example.com".to_owned());
        let below = Host::Below(".bank.internal".to_owned());
        let hosts = [
            name.clone(),
            below.clone(),
            network("10.0.0.0", 8),
            network("::1", 128),
            network("fd00::", 8),
            network("::1", 128),
        ];
        let of_scheme = hosts.map(|host| Allowed {
            host,
            port: AllowedPort::OfScheme,
        });
        assert_eq!(both, of_scheme);
        let with_ports = HostsSetting
            .parse(&text(
                "hooks.example.com:8443,*.bank.internal:*,10.0.0.0/8:80,127.0.0.1:*,[::1]:1,[fd00::/8]:65535",
            ))
            .unwrap();
        let with_ports: Vec<_> = with_ports
            .into_iter()
            .map(|one| (one.host, one.port))
            .collect();
        assert_eq!(
            with_ports,
            [
                (name, AllowedPort::Only(8_443)),
                (below, AllowedPort::Any),
                (network("10.0.0.0", 8), AllowedPort::Only(80)),
                (network("127.0.0.1", 32), AllowedPort::Any),
                (network("::1", 128), AllowedPort::Only(1)),
                (network("fd00::", 8), AllowedPort::Only(65_535)),
            ]
        );
        assert_eq!(HostsSetting.parse(&text("")).unwrap(), []);
        for bad in [
            "*",
            "a..b",
            "10.0.0.0/33",
            "10.0.0",
            "https://a.b",
            "a b",
            "*.*.b",
            "a.b:",
            "a.b:0",
            "a.b:65536",
            "a.b:80:80",
            "a.b:http",
            ":443",
            "fd00::/8:443",
            "[10.0.0.1]:443",
            "[a.b]:443",
            "[::1]443",
            "[::1",
        ] {
            assert!(HostsSetting.parse(&text(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn networks_come_as_a_list_or_with_commas() {
        let networks = NetworksSetting;
        let both = networks.parse(&text("10.0.0.0/8, ::1")).unwrap();
        assert_eq!(
            both,
            [
                ("10.0.0.0".parse().unwrap(), 8),
                ("::1".parse().unwrap(), 128)
            ]
        );
        assert_eq!(networks.parse(&text("")).unwrap(), []);
        assert!(networks.parse(&text("10.0.0.0/33")).is_err());
        assert!(
            networks
                .parse(&Given::List(vec!["office".to_owned()]))
                .is_err()
        );
    }
}
