//! The oracle: what was promised to whom, what reached which app, and how it all ended.
//!
//! It sees only what an outsider sees: answers to publishers, calls of apps, announced outcomes. At the end it is shown
//! the store.

use std::collections::BTreeMap;

use bellwire_server::delivery::{Outcome, PingId};
use bellwire_server::ports::PairState;

/// One notification: a ping for a device.
#[derive(Debug, Clone, Default)]
pub(super) struct Pair {
    /// The place of its first asking among all.
    asked: u64,
    /// How often the publisher asked.
    attempts: u32,
    /// A 2xx was given.
    accepted: bool,
    /// Its replacement key.
    key: Option<u8>,
    /// TTL 0: not kept over a crash.
    transient: bool,
    /// It was asked to be taken back, or the device was wiped.
    revoked: bool,
    /// Outcomes as they were announced.
    ended: Vec<(Outcome, bool)>,
    /// How often the app got it.
    calls: u32,
    /// How often a killed client had called the app and not written it down.
    forgotten: u32,
    /// The place of its first call among the device's.
    called: u64,
    /// The client declined it (for the app, or as expired).
    declined: bool,
}

/// What is allowed in this run.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Allowed {
    /// Mailboxes are small enough to overflow.
    pub(super) evictions: bool,
    /// Devices may pass over what is not urgent, or publishers are told that there is no room: the order may change.
    pub(super) disorder: bool,
}

/// See the head of this file.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    pub(super) pairs: BTreeMap<(PingId, usize), Pair>,
    pub(super) allowed: Allowed,
    /// Objections, the first first.
    pub(super) objections: Vec<String>,
    asked: u64,
    called: u64,
    /// Server crashes so far.
    pub(super) crashes: u32,
    /// Calls of apps.
    pub(super) calls: u64,
}

pub(super) fn short(ping: PingId) -> String {
    format!(
        "p{}",
        u32::from_be_bytes([ping.0[0], ping.0[1], ping.0[2], ping.0[3]])
    )
}

impl Ledger {
    pub(super) fn new(allowed: Allowed) -> Ledger {
        Ledger {
            allowed,
            ..Ledger::default()
        }
    }

    pub(super) fn object(&mut self, objection: String) {
        self.objections.push(objection);
    }

    fn pair(&mut self, ping: PingId, device: usize) -> &mut Pair {
        self.pairs.entry((ping, device)).or_default()
    }

    /// The publisher asks.
    pub(super) fn asks(&mut self, ping: PingId, device: usize, key: Option<u8>, transient: bool) {
        self.asked += 1;
        let asked = self.asked;
        let pair = self.pair(ping, device);
        if pair.attempts == 0 {
            pair.asked = asked;
        }
        pair.attempts += 1;
        pair.key = key;
        pair.transient = transient;
    }

    /// It was asked to be taken back.
    pub(super) fn revoked(&mut self, ping: PingId, device: usize) {
        self.pair(ping, device).revoked = true;
    }

    /// The device was wiped.
    pub(super) fn wiped(&mut self, device: usize) {
        for ((_, of), pair) in &mut self.pairs {
            pair.revoked |= *of == device;
        }
    }

    /// The publisher has its 2xx.
    pub(super) fn accepted(&mut self, ping: PingId, device: usize) {
        self.pair(ping, device).accepted = true;
    }

    /// An outcome is announced.
    pub(super) fn ended(
        &mut self,
        ping: PingId,
        device: usize,
        outcome: Outcome,
        stored: bool,
        late_by_ms: i64,
    ) {
        let allowed = self.allowed;
        let pair = self.pair(ping, device);
        pair.ended.push((outcome, stored));
        let what = format!("{} on d{device}", short(ping));
        let objection = if pair.ended.len() as u32 > pair.attempts {
            Some(format!(
                "{what} ended more often than it was asked for: {:?}",
                pair.ended
            ))
        } else {
            let legal = match outcome {
                Outcome::Acknowledged => pair.calls > 0,
                Outcome::Declined => pair.declined,
                Outcome::Replaced => pair.key.is_some(),
                Outcome::Expired => late_by_ms >= 0,
                Outcome::Evicted | Outcome::Refused => allowed.evictions,
                Outcome::Revoked => pair.revoked,
                Outcome::Forwarded => false,
            };
            (!legal).then(|| format!("{what} cannot have ended as {}", outcome.as_str()))
        };
        self.objections.extend(objection);
    }

    /// The app of a device is called.
    pub(super) fn called(&mut self, ping: PingId, device: usize) {
        self.called += 1;
        self.calls += 1;
        let called = self.called;
        let pair = self.pair(ping, device);
        pair.calls += 1;
        if pair.calls == 1 {
            pair.called = called;
        }
        if pair.calls > 1 + pair.forgotten {
            let objection = format!("{} reached the app of d{device} twice", short(ping));
            self.object(objection);
        } else if pair.attempts == 0 {
            let objection = format!("{} reached d{device} and was never sent to it", short(ping));
            self.object(objection);
        }
    }

    /// A client was killed before it wrote down that it had called its app.
    pub(super) fn forgotten(&mut self, ping: PingId, device: usize) {
        let pair = self.pair(ping, device);
        pair.forgotten = pair.calls;
    }

    /// The client will not have it.
    pub(super) fn declined(&mut self, ping: PingId, device: usize) {
        self.pair(ping, device).declined = true;
    }

    /// After everything came to rest: `known` is the word of the store about a pair.
    pub(super) fn settle(&mut self, known: impl Fn(PingId, usize) -> Option<PairState>) {
        let mut objections = Vec::new();
        for (&(ping, device), pair) in &self.pairs {
            let what = format!("{} on d{device}", short(ping));
            let word = known(ping, device);
            let announced = pair.ended.last().map(|&(outcome, _)| outcome);
            let (stored, waits) = match word {
                Some(PairState::Ended { outcome, .. }) => (Some(outcome), false),
                Some(PairState::Waiting { .. }) => (None, true),
                None => (None, false),
            };
            // Of an outcome that was announced as stored, the store says the same.
            if let [(told, true)] = pair.ended[..]
                && pair.attempts == 1
                && stored != Some(told)
            {
                objections.push(format!(
                    "{what} was told as {told:?}, the store says {word:?}"
                ));
            }
            if waits && announced.is_some() && pair.attempts == 1 {
                objections.push(format!("{what} ended as {announced:?}, and waits"));
            }
            let ended = announced.or(stored);
            if ended == Some(Outcome::Acknowledged) && pair.calls == 0 {
                objections.push(format!("{what} is acknowledged, and its app never saw it"));
            }
            let lost_legally = pair.transient && self.crashes > 0;
            if pair.accepted && ended.is_none() && !waits && !lost_legally {
                objections.push(format!("{what} was accepted, and is lost"));
            }
        }
        self.objections.append(&mut objections);
        self.settle_order();
    }

    /// Order is the order of acceptance, for what was asked once, has no replacement key and lives in quiet times.
    fn settle_order(&mut self) {
        if self.allowed.disorder {
            return;
        }
        let mut last: BTreeMap<usize, (u64, u64, PingId)> = BTreeMap::new();
        let mut calls: Vec<(&(PingId, usize), &Pair)> = self
            .pairs
            .iter()
            .filter(|(_, pair)| {
                pair.calls > 0 && pair.key.is_none() && pair.attempts == 1 && pair.accepted
            })
            .collect();
        calls.sort_by_key(|(_, pair)| pair.called);
        let mut objections = Vec::new();
        for (&(ping, device), pair) in calls {
            if let Some(&(asked, _, before)) = last.get(&device)
                && asked > pair.asked
            {
                objections.push(format!(
                    "d{device} got {} before {}, which was asked for earlier",
                    short(before),
                    short(ping)
                ));
            }
            last.insert(device, (pair.asked, pair.called, ping));
        }
        self.objections.append(&mut objections);
    }
}
