//! Coming to rest, and what must hold then.

use super::*;

impl World {
    /// Why it does not rest, for people.
    pub(super) fn unrest(&self) -> String {
        let Some(house) = &self.house else {
            return "the server is away".to_owned();
        };
        for (index, device) in self.devices.iter().enumerate() {
            if device.gone {
                continue;
            }
            let Some(process) = &device.process else {
                return format!("d{index} is away");
            };
            if !process
                .machine
                .as_ref()
                .is_some_and(ClientSession::is_attached)
            {
                return format!("d{index} is not attached");
            }
            if !matches!(process.hand, Hand::Idle) || !process.waiting.is_empty() {
                return format!("d{index} is busy");
            }
        }
        if !house.tickets.is_empty() {
            return format!("{:?} wait", house.tickets.values().next());
        }
        if house.writing
            || house
                .desks
                .iter()
                .any(|desk| desk.outstanding || desk.core.has_offers())
        {
            return "frames follow frames".to_owned();
        }
        if self.pairs_waiting() > 0 {
            return format!("{} rows wait", self.pairs_waiting());
        }
        "something is on its way".to_owned()
    }

    pub(super) fn pairs_waiting(&self) -> usize {
        self.devices
            .iter()
            .map(|device| self.rows_of(device).map_or(0, |view| view.rows.len()))
            .sum()
    }

    pub(super) fn rows_of(
        &self,
        device: &Device,
    ) -> Option<bellwire_server::delivery::MailboxView> {
        self.store
            .read_mailbox(&MailboxRead {
                device: DeviceId(device.id.0),
                all: true,
                ping: None,
                collapse: None,
                lowest: None,
                rows: Vec::new(),
                withdrawals: false,
            })
            .ok()
    }

    pub(super) fn is_at_rest(&self) -> bool {
        let Some(house) = &self.house else {
            return false;
        };
        if house.disk != Disk::Open || !house.tickets.is_empty() || house.writing {
            return false;
        }
        let busy = self.queue.values().any(|event| match event {
            Ev::Tick | Ev::Heal => false,
            Ev::Publish(_)
            | Ev::Retry(..)
            | Ev::Release(..)
            | Ev::Revoke(_)
            | Ev::Wipe(_)
            | Ev::Arrive(..)
            | Ev::Dial(..)
            | Ev::AppDone(..)
            | Ev::Saved(..)
            | Ev::StartClient(_)
            | Ev::StartServer
            | Ev::ReadDone(..)
            | Ev::BeginFrame(_)
            | Ev::EndFrame(_)
            | Ev::Fault(_) => true,
        });
        if busy
            || house
                .desks
                .iter()
                .any(|desk| desk.outstanding || desk.core.has_offers())
        {
            return false;
        }
        let clients = self.devices.iter().all(|device| {
            device.gone
                || device.process.as_ref().is_some_and(|process| {
                    let attached = process
                        .machine
                        .as_ref()
                        .is_some_and(|machine| machine.is_attached() && machine.in_flight() == 0);
                    let silent = process
                        .conn
                        .and_then(|conn| self.conns.get(&conn))
                        .is_none_or(|conn| conn.silent || !conn.server);
                    attached && !silent && matches!(process.hand, Hand::Idle)
                })
        });
        clients && self.pairs_waiting() == 0
    }

    /// All leave in good order; then nobody may be awake.
    pub(super) fn farewell(&mut self) {
        self.say(|| "everybody leaves".to_owned());
        let now_ms = self.now_ms();
        for index in 0..self.devices.len() {
            let mut actions = Vec::new();
            if let Some(process) = &mut self.devices[index].process {
                process.leaving = true;
                if let Some(machine) = &mut process.machine {
                    machine.leave(now_ms, &mut actions);
                }
            }
            self.client_actions(index, actions);
        }
        self.settle();
        let until_us = self.now_us + 400 * 1_000_000;
        while let Some((&(at_us, _), _)) = self.queue.first_key_value() {
            let awake = self.awake();
            if awake == 0
                && self
                    .house
                    .as_ref()
                    .is_some_and(|house| house.links.is_empty())
            {
                break;
            }
            let due_us = self.next_deadline_us().unwrap_or(u64::MAX);
            let next_us = at_us.min(due_us);
            if next_us > until_us || !self.ledger.objections.is_empty() {
                break;
            }
            self.now_us = self.now_us.max(next_us);
            self.clock.0.store(self.now_us, Ordering::Relaxed);
            if at_us <= due_us {
                if let Some((_, event)) = self.queue.pop_first() {
                    self.happen(event);
                }
            } else {
                self.mind_deadlines();
            }
            self.settle();
        }
        let awake = self.awake();
        if awake > 0 {
            self.ledger.object(format!("{awake} mailboxes stay awake"));
        }
    }

    pub(super) fn awake(&self) -> usize {
        self.house.as_ref().map_or(0, |house| {
            house.desks.iter().map(|desk| desk.core.awake()).sum()
        })
    }

    /// What the shards counted is what is on disk.
    pub(super) fn look_at_the_count(&mut self) {
        let Some(house) = &mut self.house else { return };
        house.walk_on(&self.store, usize::MAX);
        let counted = house.stock.held(AppId::DEFAULT);
        let Ok(page) = self.store.mailboxes(None, usize::MAX) else {
            return;
        };
        let stored = Held {
            notifications: page.items.iter().map(|one| u64::from(one.count)).sum(),
            bytes: page.items.iter().map(|one| one.bytes).sum(),
            devices: page.items.len() as u64,
        };
        if !house.stock.is_whole() || counted != stored {
            self.ledger
                .object(format!("{counted:?} is counted, {stored:?} is on disk"));
        }
    }

    pub(super) fn look_at_the_store(&mut self) {
        // What is promised must also be there after the last crash.
        let seed = self.random.random();
        self.house = None;
        if let Err(error) = self.store.crash_and_reopen(seed) {
            return self
                .ledger
                .object(format!("the store does not open: {error}"));
        }
        let mut rows = 0;
        for index in 0..self.devices.len() {
            let Some(view) = self.rows_of(&self.devices[index]) else {
                return self.ledger.object("a mailbox cannot be read".to_owned());
            };
            let bytes: u64 = view.rows.iter().map(|row| u64::from(row.size)).sum();
            rows += view.rows.len() as u64;
            match view.summary {
                Some(summary) => {
                    if (summary.count as usize, summary.bytes) != (view.rows.len(), bytes) {
                        self.ledger
                            .object(format!("the summary of d{index} is wrong"));
                    }
                }
                None => {
                    if !self.devices[index].gone || !view.rows.is_empty() {
                        self.ledger.object(format!("d{index} has no summary"));
                    }
                }
            }
        }
        let census = self.store.census().unwrap_or_default();
        let count = |kind: char| census.get(&kind).copied().unwrap_or(0);
        if count('r') != rows || count('x') != rows || count('c') > rows {
            self.ledger
                .object(format!("{rows} rows, and in the store {census:?}"));
        }
        if rows == 0 && count('b') > 0 {
            self.ledger
                .object(format!("bodies without rows: {census:?}"));
        }
        let store = &self.store;
        let devices = &self.devices;
        self.ledger.settle(|ping, device| {
            let page = store.pairs(ping, None, 100).ok()?;
            let id = DeviceId(devices[device].id.0);
            page.items
                .into_iter()
                .find(|(_, of, _)| *of == id)
                .map(|(_, _, state)| state)
        });
    }
}
