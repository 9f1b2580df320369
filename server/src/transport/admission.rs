//! Who may knock: bounds on connections that have not yet shown who they are.
//!
//! A connection takes a [`Knock`] when it arrives and gives it back by dropping it: when its device is authenticated,
//! or when it is gone. A refused device keeps it until it is closed, so that guessing secrets costs places too.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::runtime::LinkSettings;

/// Bits of an IPv6 address that count as one address: a site gets at least so much, and may use all of it.
const IPV6_SITE_BITS: u8 = 64;

/// From this share of a limit on, a QUIC peer must prove its address first (`retry`): one in so many.
const VALIDATE_FROM_SHARE: u32 = 4;

/// Counts connections before authentication. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Admission {
    counts: Arc<Counts>,
    count_loopback: bool,
}

#[derive(Default)]
struct Counts {
    total: AtomicU32,
    /// Never more entries than `total`.
    addresses: Mutex<HashMap<IpAddr, u32>>,
}

/// A place among those who knock; dropping it gives it back.
#[must_use]
pub(crate) struct Knock {
    counts: Arc<Counts>,
    /// `None`: loopback and exempt networks are not counted by address.
    counted: Option<IpAddr>,
}

/// Why somebody may not even knock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Crowded {
    /// Too many from this address.
    Address,
    /// Too many in all.
    Total,
}

impl Crowded {
    /// The word for it in metrics.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Crowded::Address => "address_crowded",
            Crowded::Total => "total_crowded",
        }
    }
}

impl Admission {
    /// Nobody knocks yet. Loopback is where a proxy or a load generator of one's own lives, and is not counted by
    /// address unless asked.
    pub(crate) fn new(count_loopback: bool) -> Admission {
        Admission {
            counts: Arc::default(),
            count_loopback,
        }
    }

    /// A place for a connection from this address.
    pub(crate) fn knock(&self, from: IpAddr, limits: &LinkSettings) -> Result<Knock, Crowded> {
        let mut knock = self.knock_through_proxy(limits)?;
        self.name(&mut knock, from, limits)?;
        Ok(knock)
    }

    /// A place for a connection that has yet to say for whom it is; [`Admission::name`] follows.
    pub(crate) fn knock_through_proxy(&self, limits: &LinkSettings) -> Result<Knock, Crowded> {
        let counts = &self.counts;
        // Taken first and given back on refusal, so that two threads cannot both take the last place.
        let total = counts.total.fetch_add(1, Ordering::Relaxed) + 1;
        let knock = Knock {
            counts: Arc::clone(counts),
            counted: None,
        };
        if total > limits.unauthenticated {
            return Err(Crowded::Total);
        }
        Ok(knock)
    }

    /// Counts a place, taken without one, under an address.
    pub(crate) fn name(
        &self,
        knock: &mut Knock,
        from: IpAddr,
        limits: &LinkSettings,
    ) -> Result<(), Crowded> {
        let Some(address) = self.counted_as(from, limits) else {
            return Ok(());
        };
        let mut addresses = self.counts.addresses();
        let count = addresses.entry(address).or_default();
        if *count >= limits.per_address {
            if *count == 0 {
                addresses.remove(&address);
            }
            return Err(Crowded::Address);
        }
        *count += 1;
        knock.counted = Some(address);
        Ok(())
    }

    /// Whether this peer may say for whom it connects: a load balancer of the operator's.
    pub(crate) fn is_proxy(from: IpAddr, limits: &LinkSettings) -> bool {
        let from = from.to_canonical();
        limits
            .proxies
            .iter()
            .any(|&(network, prefix)| within(from, network.to_canonical(), prefix))
    }

    /// Whether a peer whose address is not proven must prove it before it costs a handshake.
    pub(crate) fn wants_proof(&self, from: IpAddr, limits: &LinkSettings) -> bool {
        let over = |count: u32, limit: u32| count >= limit / VALIDATE_FROM_SHARE;
        if over(self.total(), limits.unauthenticated) {
            return true;
        }
        let Some(address) = self.counted_as(from, limits) else {
            return false;
        };
        let count = self.counts.addresses().get(&address).copied().unwrap_or(0);
        count > 0 && over(count, limits.per_address)
    }

    /// Connections that knock now.
    pub(crate) fn total(&self) -> u32 {
        self.counts.total.load(Ordering::Relaxed)
    }

    /// Those of the address that has most, if it is counted.
    pub(crate) fn busiest(&self) -> u32 {
        self.counts.addresses().values().copied().max().unwrap_or(0)
    }

    /// The address to count under; `None` if it is not counted.
    fn counted_as(&self, from: IpAddr, limits: &LinkSettings) -> Option<IpAddr> {
        let from = from.to_canonical();
        let exempt =
            |&(network, prefix): &(IpAddr, u8)| within(from, network.to_canonical(), prefix);
        let own = from.is_loopback() && !self.count_loopback;
        if own || limits.exempt.iter().any(exempt) {
            return None;
        }
        Some(match from {
            IpAddr::V4(_) => from,
            IpAddr::V6(v6) => {
                let mask = u128::MAX << (128 - u32::from(IPV6_SITE_BITS));
                IpAddr::V6((v6.to_bits() & mask).into())
            }
        })
    }
}

impl Counts {
    fn addresses(&self) -> std::sync::MutexGuard<'_, HashMap<IpAddr, u32>> {
        // Nothing in the critical sections can stop half-way.
        self.addresses
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Knock {
    fn drop(&mut self) {
        self.counts.total.fetch_sub(1, Ordering::Relaxed);
        let Some(address) = self.counted else { return };
        let mut addresses = self.counts.addresses();
        if let Some(count) = addresses.get_mut(&address) {
            *count -= 1;
            if *count == 0 {
                addresses.remove(&address);
            }
        }
    }
}

/// Whether an address lies in a network. A prefix longer than the address means the address itself.
fn within(address: IpAddr, network: IpAddr, prefix: u8) -> bool {
    let same = |a: u128, b: u128, width: u32| {
        let ignored = width.saturating_sub(u32::from(prefix));
        a.checked_shr(ignored).unwrap_or(0) == b.checked_shr(ignored).unwrap_or(0)
    };
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => same(a.to_bits().into(), b.to_bits().into(), 32),
        (IpAddr::V6(a), IpAddr::V6(b)) => same(a.to_bits(), b.to_bits(), 128),
        (IpAddr::V4(_), IpAddr::V6(_)) | (IpAddr::V6(_), IpAddr::V4(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn limits(per_address: u32, unauthenticated: u32) -> LinkSettings {
        LinkSettings {
            per_address,
            unauthenticated,
            exempt: vec![("10.1.0.0".parse().unwrap(), 16)],
            ..LinkSettings::default()
        }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_address_has_its_places_and_gets_them_back() {
        let (admission, limits) = (Admission::new(false), limits(2, 100));
        let first = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        let _second = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        assert_eq!(
            admission.knock(ip("192.0.2.1"), &limits).err(),
            Some(Crowded::Address)
        );
        let _other = admission.knock(ip("192.0.2.2"), &limits).unwrap();
        assert_eq!(admission.busiest(), 2);
        drop(first);
        assert_eq!(admission.busiest(), 1);
        let _again = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        assert_eq!(admission.total(), 3);
    }

    #[test]
    fn one_site_of_ipv6_is_one_address_and_a_mapped_one_is_the_ipv4_it_stands_for() {
        let (admission, limits) = (Admission::new(false), limits(1, 100));
        let _one = admission.knock(ip("2001:db8:1:2::1"), &limits).unwrap();
        assert!(
            admission
                .knock(ip("2001:db8:1:2:ffff::9"), &limits)
                .is_err()
        );
        let _two = admission.knock(ip("2001:db8:1:3::1"), &limits).unwrap();
        let _three = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        assert!(admission.knock(ip("::ffff:192.0.2.1"), &limits).is_err());
    }

    #[test]
    fn loopback_and_exempt_networks_count_only_in_all() {
        let (admission, limits) = (Admission::new(false), limits(1, 5));
        let places: Vec<_> = ["127.0.0.1", "127.0.0.1", "10.1.2.3", "10.1.2.3", "::1"]
            .map(|from| admission.knock(ip(from), &limits).unwrap())
            .into();
        assert_eq!(
            admission.knock(ip("::1"), &limits).err(),
            Some(Crowded::Total)
        );
        drop(places);
        assert_eq!(admission.total(), 0);
        let strict = Admission::new(true);
        let _one = strict.knock(ip("127.0.0.1"), &limits).unwrap();
        assert_eq!(
            strict.knock(ip("127.0.0.1"), &limits).err(),
            Some(Crowded::Address)
        );
    }

    #[test]
    fn a_place_taken_through_a_proxy_counts_under_the_address_behind_it() {
        let (admission, limits) = (Admission::new(false), limits(1, 3));
        let mut first = admission.knock_through_proxy(&limits).unwrap();
        let mut second = admission.knock_through_proxy(&limits).unwrap();
        let (near, far) = (ip("192.0.2.1"), ip("192.0.2.2"));
        admission.name(&mut first, near, &limits).unwrap();
        assert_eq!(
            admission.name(&mut second, near, &limits),
            Err(Crowded::Address)
        );
        admission.name(&mut second, far, &limits).unwrap();
        let _third = admission.knock_through_proxy(&limits).unwrap();
        assert_eq!(
            admission.knock_through_proxy(&limits).err(),
            Some(Crowded::Total)
        );
        drop((first, second));
        assert_eq!(admission.total(), 1);
        assert!(admission.counts.addresses().is_empty());
    }

    #[test]
    fn only_listed_networks_may_say_for_whom_they_connect() {
        let limits = LinkSettings {
            proxies: vec![(ip("10.2.0.0"), 16), (ip("2001:db8::"), 32)],
            ..limits(1, 1)
        };
        for (from, may) in [
            ("10.2.3.4", true),
            ("::ffff:10.2.3.4", true),
            ("2001:db8::7", true),
            ("10.3.0.1", false),
            ("127.0.0.1", false),
        ] {
            assert_eq!(Admission::is_proxy(ip(from), &limits), may, "{from}");
        }
    }

    #[test]
    fn a_refusal_leaves_nothing_behind() {
        let (admission, limits) = (Admission::new(false), limits(0, 10));
        for _ in 0..100 {
            assert!(admission.knock(ip("192.0.2.1"), &limits).is_err());
        }
        assert_eq!(admission.total(), 0);
        assert!(admission.counts.addresses().is_empty());
    }

    #[test]
    fn an_address_must_be_proven_once_a_quarter_of_a_limit_is_taken() {
        let (admission, limits) = (Admission::new(false), limits(8, 1_000));
        assert!(!admission.wants_proof(ip("192.0.2.1"), &limits));
        let _one = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        assert!(!admission.wants_proof(ip("192.0.2.1"), &limits));
        let _two = admission.knock(ip("192.0.2.1"), &limits).unwrap();
        assert!(admission.wants_proof(ip("192.0.2.1"), &limits));
        assert!(!admission.wants_proof(ip("192.0.2.2"), &limits));
    }

    #[test]
    fn networks_are_compared_by_their_prefix() {
        assert!(within(ip("10.1.2.3"), ip("10.1.0.0"), 16));
        assert!(!within(ip("10.2.2.3"), ip("10.1.0.0"), 16));
        assert!(within(ip("203.0.113.9"), ip("0.0.0.0"), 0));
        assert!(within(ip("2001:db8::9"), ip("2001:db8::"), 32));
        assert!(within(ip("192.0.2.1"), ip("192.0.2.1"), 200));
        assert!(!within(ip("192.0.2.1"), ip("2001:db8::"), 0));
    }
}
