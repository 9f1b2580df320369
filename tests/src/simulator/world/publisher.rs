//! The publisher: pings, repeats, revocations, wipes.

use super::*;

impl World {
    pub(super) fn publish(&mut self, number: usize, targets: &[usize]) {
        let plan = self.plan[number].clone();
        let retries = self.faults.retries;
        let Some(house) = &mut self.house else {
            // Connection refused.
            if retries {
                let wait_ms = 500 + self.random.random_range(0..2_000);
                for &device in targets {
                    self.after_ms(wait_ms, Ev::Retry(number, device));
                }
            }
            return;
        };
        let now = house.now(self.now_us);
        // What goes to several is asked for again whenever a crash took it, as a ping to an audience is.
        let patient = retries && plan.targets.len() > 1;
        let content = Content {
            body: Some("x".repeat(plan.text)),
            ..Content::default()
        };
        let notification = Arc::new(Notification {
            ping: plan.ping,
            app: AppId::DEFAULT,
            accepted_ms: now.unix_ms,
            expires_ms: now.unix_ms + plan.ttl_ms,
            urgency: plan.urgency,
            collapse: plan
                .key
                .and_then(|key| CollapseKey::new(&format!("key-{key}"))),
            size: u32::try_from(content.size()).unwrap_or(u32::MAX),
            transient: plan.transient,
            shared: plan.targets.len() > 1,
            content: content.to_cbor().into(),
            wire: WireSlot::default(),
            hold: Hold::default(),
        });
        for &device in targets {
            let ping = plan.ping;
            let ticket = house.ticket(Ask::Ping { ping, device });
            let enqueue = Enqueue {
                ticket,
                notification: Arc::clone(&notification),
                may_repeat: retries,
                too_fast: false,
                patient,
            };
            house.inbox.push_back((device, Event::Enqueue(enqueue)));
            self.ledger.asks(ping, device, plan.key, plan.transient);
            if self.wipes.contains(&device) || self.devices[device].gone {
                self.ledger.revoked(ping, device);
            }
        }
        for &device in targets.iter().filter(|_| patient) {
            self.after_ms(1_000, Ev::Release(number, device));
        }
        self.say(|| {
            format!(
                "publish {} to {targets:?}{}{} ttl {} ms",
                short(plan.ping),
                plan.key.map_or(String::new(), |key| format!(" key {key}")),
                if plan.transient { " transient" } else { "" },
                plan.ttl_ms
            )
        });
    }

    pub(super) fn number(ping: PingId) -> usize {
        u32::from_be_bytes([ping.0[0], ping.0[1], ping.0[2], ping.0[3]]) as usize
    }

    /// The publisher got no answer, or one that says "later".
    pub(super) fn ask_again(&mut self, ping: PingId, device: usize) {
        if self.faults.retries {
            let wait_ms = 500 + self.random.random_range(0..2_000);
            self.after_ms(wait_ms, Ev::Retry(Self::number(ping), device));
        }
    }

    /// What is held back of it for a device has waited long enough.
    pub(super) fn release(&mut self, number: usize, device: usize) {
        let ping = self.plan[number].ping;
        if let Some(house) = &mut self.house {
            let release = Event::Release { ping };
            house.inbox.push_back((device, release));
        }
    }

    pub(super) fn revoke(&mut self, number: usize) {
        let plan = self.plan[number].clone();
        let Some(house) = &mut self.house else { return };
        for &device in &plan.targets {
            let ticket = house.ticket(Ask::Revoke);
            let ping = plan.ping;
            house
                .inbox
                .push_back((device, Event::Revoke { ticket, ping }));
            self.ledger.revoked(ping, device);
        }
        self.say(|| format!("revoke {}", short(plan.ping)));
    }

    pub(super) fn wipe(&mut self, device: usize) {
        if !self.wipes.contains(&device) {
            self.wipes.push(device);
        }
        self.ledger.wiped(device);
        let Some(house) = &mut self.house else {
            return self.after_ms(1_000, Ev::Wipe(device));
        };
        let ticket = house.ticket(Ask::Wipe { device });
        house.inbox.push_back((device, Event::Wipe { ticket }));
        self.say(|| format!("wipe d{device}"));
    }
}
