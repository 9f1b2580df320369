//! The server's process: shards, links, publishers who wait. What its runtime and transports do in tasks is done here in steps;
//! core, store, session machine and bytes are the real ones.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use bellwire_protocol::{FrameReader, ServerSession};
use bellwire_server::delivery::{
    DeviceId, Disk, Event, Mono, Now, PingId, Policy, SessionId, Shard, Stock, StoredMailbox,
    Ticket,
};
use bellwire_server::ports::{ExpiryCursor, Grant, SourceId, Store};

/// A shard and its dealings with the committer.
pub(super) struct Desk {
    pub(super) core: Shard,
    pub(super) source: SourceId,
    pub(super) wanted: bool,
    pub(super) outstanding: bool,
}

/// The server's side of a link.
pub(super) struct Link {
    pub(super) session: ServerSession,
    pub(super) reader: FrameReader,
    pub(super) attached: Option<SessionId>,
    pub(super) heard_us: u64,
}

/// Who waits with a ticket.
#[derive(Debug, Clone, Copy)]
pub(super) enum Ask {
    /// Which of the publisher's pings, for which device.
    Ping {
        ping: PingId,
        device: usize,
    },
    Revoke,
    Wipe {
        device: usize,
    },
}

/// Grants of the committer, in order: which shard, what.
pub(super) type Grants = Arc<Mutex<VecDeque<(usize, Grant)>>>;

/// One run of the server.
pub(super) struct House {
    pub(super) run: u32,
    pub(super) desks: Vec<Desk>,
    pub(super) links: BTreeMap<u64, Link>,
    pub(super) sessions: BTreeMap<SessionId, u64>,
    pub(super) tickets: BTreeMap<Ticket, Ask>,
    pub(super) grants: Grants,
    /// Events that wait for their shard: device and what happened.
    pub(super) inbox: VecDeque<(usize, Event)>,
    pub(super) next_session: u64,
    pub(super) next_ticket: u64,
    pub(super) started_us: u64,
    /// Wall time at the start, Unix milliseconds.
    pub(super) started_ms: u64,
    pub(super) disk: Disk,
    pub(super) sweep: ExpiryCursor,
    /// A frame is being written.
    pub(super) writing: bool,
    /// What the shards count.
    pub(super) stock: Arc<Stock>,
    /// How far the walk has come that counts what was there before; `None`: it is over.
    pub(super) walk: Option<Option<DeviceId>>,
}

impl House {
    pub(super) fn now(&self, now_us: u64) -> Now {
        let since = now_us - self.started_us;
        Now {
            mono: Mono(since),
            unix_ms: self.started_ms + since / 1_000,
        }
    }

    pub(super) fn ticket(&mut self, ask: Ask) -> Ticket {
        self.next_ticket += 1;
        let ticket = Ticket(self.next_ticket);
        self.tickets.insert(ticket, ask);
        ticket
    }

    /// When something is due, microseconds of the simulation.
    pub(super) fn next_deadline_us(&self) -> Option<u64> {
        let shards = self
            .desks
            .iter()
            .filter_map(|desk| desk.core.next_deadline());
        let links = self
            .links
            .values()
            .filter_map(|link| link.session.deadline_ms());
        shards
            .map(|at| self.started_us + at.0)
            .chain(links.map(|ms| ms * 1_000))
            .min()
    }

    /// Goes on with the walk by a page.
    pub(super) fn walk_on(&mut self, store: &impl Store, page: usize) {
        let Some(after) = self.walk else { return };
        // It is tried again.
        let Ok(page) = store.mailboxes(after, page) else {
            return;
        };
        let count = self.desks.len();
        for (place, desk) in self.desks.iter_mut().enumerate() {
            let own = |mailbox: &&StoredMailbox| usize::from(mailbox.device.0[0]) % count == place;
            let mailboxes: Vec<StoredMailbox> = page.items.iter().filter(own).copied().collect();
            desk.core.seed(&mailboxes, page.next);
        }
        self.walk = page.next.map(Some);
    }

    pub(super) fn desk(&mut self, device: usize) -> &mut Desk {
        let count = self.desks.len();
        &mut self.desks[device % count]
    }
}

/// An empty desk.
pub(super) fn desk(policy: &Policy, source: SourceId, stock: &Arc<Stock>, place: usize) -> Desk {
    Desk {
        core: Shard::with_stock(policy.clone(), Arc::clone(stock), place),
        source,
        wanted: false,
        outstanding: false,
    }
}
