//! Which network this machine is on: a name to remember things by, and a mark that changes when connections break.
//!
//! The name is made of the gateway (its address and, where the system tells it, its hardware address), so that two homes with
//! the same addresses are two networks. The mark is made of the gateway and of our own addresses towards it: when one of them
//! changes, connections that used the old one are gone. Neither is sent anywhere; no packet is sent to find them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

/// What is read of a table of the system, in bytes. Routers have long ones.
const TABLE_MAX_BYTES: u64 = 64 * 1024;

/// Addresses that stand for "anywhere else" (RFC 5737, RFC 3849): asked for a route, never written to.
const ELSEWHERE: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 9),
    SocketAddr::new(
        IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
        9,
    ),
];

/// Where this machine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// Names the network in what is remembered. Empty: no way out was found.
    pub(crate) name: String,
    /// Changes when connections break.
    pub(crate) mark: u64,
    /// Something beyond this machine and its neighbours can be reached, as far as the system knows.
    pub(crate) way_out: bool,
}

/// The way out: over which interface, to whom.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Gateway {
    interface: String,
    /// As the system writes it.
    address: String,
    hardware: Option<String>,
}

/// Looks where this machine is. Takes microseconds.
pub(crate) fn look() -> Place {
    let own: Vec<String> = ELSEWHERE.iter().filter_map(own_address).collect();
    place(gateway(), &own)
}

fn place(gateway: Option<Gateway>, own: &[String]) -> Place {
    let mut mark = Hash::new();
    own.iter().for_each(|address| mark.add(address));
    let mut name = Hash::new();
    let known = match &gateway {
        Some(gateway) => {
            mark.add(&gateway.interface);
            mark.add(&gateway.address);
            match &gateway.hardware {
                Some(hardware) => name.add(hardware),
                None => name.add(&gateway.interface),
            }
            name.add(&gateway.address);
            true
        }
        None => {
            // Without the system's tables the network part of our own address has to do.
            own.iter()
                .for_each(|address| name.add(network_part(address)));
            !own.is_empty()
        }
    };
    Place {
        name: if known {
            format!("auto-{:016x}", name.0)
        } else {
            String::new()
        },
        mark: mark.0,
        way_out: !own.is_empty(),
    }
}

/// The first three groups: more or less the network.
fn network_part(address: &str) -> &str {
    let end = address
        .match_indices(['.', ':'])
        .nth(2)
        .map_or(address.len(), |(at, _)| at);
    &address[..end]
}

/// Our own address on the way to `there`. Connecting a UDP socket asks the system for a route and sends nothing.
fn own_address(there: &SocketAddr) -> Option<String> {
    let any: SocketAddr = match there {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).ok()?;
    socket.connect(there).ok()?;
    Some(socket.local_addr().ok()?.ip().to_string())
}

#[cfg(any(target_os = "linux", target_os = "android"))]
fn gateway() -> Option<Gateway> {
    let read = |path: &str| {
        use std::io::Read;
        let mut text = String::new();
        let file = std::fs::File::open(path).ok()?;
        file.take(TABLE_MAX_BYTES).read_to_string(&mut text).ok()?;
        Some(text)
    };
    let four = read("/proc/net/route").and_then(|table| default_route_v4(&table));
    if let Some((interface, address)) = four {
        let hardware =
            read("/proc/net/arp").and_then(|table| hardware_address(&table, &address, &interface));
        return Some(Gateway {
            interface,
            address,
            hardware,
        });
    }
    let (interface, address) =
        read("/proc/net/ipv6_route").and_then(|table| default_route_v6(&table))?;
    Some(Gateway {
        interface,
        address,
        hardware: None,
    })
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
fn gateway() -> Option<Gateway> {
    let _ = TABLE_MAX_BYTES;
    None
}

/// Interface and gateway of the default route with the lowest metric, of `/proc/net/route`.
#[cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    allow(dead_code, reason = "the table of another system")
)]
fn default_route_v4(table: &str) -> Option<(String, String)> {
    let routes = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [
            interface,
            "00000000",
            gateway,
            _,
            _,
            _,
            metric,
            "00000000",
            ..,
        ] = words[..]
        else {
            return None;
        };
        // The bytes stand in the order of the network, read as a number of this machine.
        let gateway = u32::from_str_radix(gateway, 16).ok()?;
        let gateway = Ipv4Addr::from(gateway.to_ne_bytes());
        Some((metric.parse::<u32>().ok()?, interface, gateway))
    });
    let (_, interface, gateway) = routes.min_by_key(|(metric, ..)| *metric)?;
    Some((interface.to_owned(), gateway.to_string()))
}

/// The same of `/proc/net/ipv6_route`.
#[cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    allow(dead_code, reason = "the table of another system")
)]
fn default_route_v6(table: &str) -> Option<(String, String)> {
    let routes = table.lines().filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [to, "00", _, _, gateway, metric, _, _, _, interface] = words[..] else {
            return None;
        };
        let anywhere = to.bytes().all(|byte| byte == b'0') && interface != "lo";
        let metric = u32::from_str_radix(metric, 16).ok()?;
        anywhere.then_some((metric, interface, gateway))
    });
    let (_, interface, gateway) = routes.min_by_key(|(metric, ..)| *metric)?;
    Some((interface.to_owned(), gateway.to_owned()))
}

/// The hardware address of a neighbour, of `/proc/net/arp`.
#[cfg_attr(
    not(any(target_os = "linux", target_os = "android")),
    allow(dead_code, reason = "the table of another system")
)]
fn hardware_address(table: &str, address: &str, interface: &str) -> Option<String> {
    table.lines().skip(1).find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [found, _, _, hardware, _, device] = words[..] else {
            return None;
        };
        let complete = found == address && device == interface && hardware != "00:00:00:00:00:00";
        complete.then(|| hardware.to_owned())
    })
}

/// FNV-1a: the same on every machine and in every version, and hidden from a casual look.
struct Hash(u64);

impl Hash {
    const fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn add(&mut self, text: &str) {
        // The byte behind each text keeps `a`, `bc` apart from `ab`, `c`.
        for byte in text.bytes().chain([0xff]) {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const ROUTES: &str = "\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
wlan0\t00000000\t0102A8C0\t0003\t0\t0\t600\t00000000\t0\t0\t0
eth0\t00000000\t0101A8C0\t0003\t0\t0\t100\t00000000\t0\t0\t0
eth0\t0001A8C0\t00000000\t0001\t0\t0\t100\t00FFFFFF\t0\t0\t0
";

    #[test]
    fn the_default_route_with_the_lowest_metric_is_the_way_out() {
        if cfg!(target_endian = "little") {
            assert_eq!(
                default_route_v4(ROUTES).unwrap(),
                ("eth0".to_owned(), "192.168.1.1".to_owned())
            );
        }
        assert_eq!(default_route_v4("Iface\n"), None);
        assert_eq!(default_route_v4("Iface\neth0 00000000 zz\n"), None);
        let six = format!(
            "{zero} 00 {zero} 00 fe800000000000000000000000000001 00000400 1 0 00000003 wlan0\n\
             {zero} 00 {zero} 00 {zero} ffffffff 1 0 00200200 lo\n",
            zero = "0".repeat(32)
        );
        let (interface, gateway) = default_route_v6(&six).unwrap();
        assert_eq!(interface, "wlan0");
        assert!(gateway.starts_with("fe80"));
        assert_eq!(default_route_v6("\u{0}\n"), None);
    }

    #[test]
    fn a_neighbour_is_known_by_its_hardware_address() {
        let table = "IP address HW type Flags HW address Mask Device\n\
            192.168.1.1 0x1 0x0 00:00:00:00:00:00 * eth0\n\
            192.168.1.1 0x1 0x2 02:00:5e:00:53:01 * wlan0\n";
        assert_eq!(hardware_address(table, "192.168.1.1", "eth0"), None);
        assert_eq!(
            hardware_address(table, "192.168.1.1", "wlan0").as_deref(),
            Some("02:00:5e:00:53:01")
        );
    }

    #[test]
    fn two_homes_with_the_same_addresses_are_two_networks_and_a_new_address_is_the_same_one() {
        let home = |hardware: &str| {
            Some(Gateway {
                interface: "wlan0".to_owned(),
                address: "192.168.1.1".to_owned(),
                hardware: Some(hardware.to_owned()),
            })
        };
        let own = |address: &str| [address.to_owned()];
        let here = place(home("a"), &own("192.168.1.7"));
        assert_ne!(here.name, place(home("b"), &own("192.168.1.7")).name);
        let renewed = place(home("a"), &own("192.168.1.8"));
        assert_eq!(here.name, renewed.name);
        assert_ne!(here.mark, renewed.mark);
        // Where the system does not tell its gateway.
        let there = place(None, &own("10.1.2.3"));
        assert_eq!(there.name, place(None, &own("10.1.2.4")).name);
        assert_ne!(there.name, place(None, &own("10.1.3.4")).name);
        assert_eq!(place(None, &[]).name, "");
        assert_eq!(look(), look());
    }
}
