//! What will happen, drawn from the seed before anything does.

use super::*;

impl World {
    pub(super) fn prepare(&mut self) {
        for index in 0..self.faults.devices {
            let mut id = [0xd0; 16];
            id[0] = u8::try_from(index).unwrap_or(0);
            let picky = self.faults.picky && self.random.random_bool(0.5);
            self.devices.push(Device {
                id: Id(id),
                disk: Vec::new(),
                life: 0,
                process: None,
                gone: false,
                picky,
            });
            let record = DeviceRecord {
                id: DeviceId(id),
                app: AppId::DEFAULT,
                user: "user".to_owned(),
                name: None,
                created_ms: START_MS,
                secret_hash: [0; 32],
                previous_secrets: Vec::new(),
            };
            let registered = Op::PutDevice {
                record,
                fresh: true,
                previous_user: None,
            };
            self.store.commit(vec![registered], Box::new(|_| {}));
            let start_ms = self.up_to(2_000);
            self.after_ms(start_ms, Ev::StartClient(index));
        }
        while self.store.begin_frame() {
            self.store.finish_frame();
        }
        self.start_server(false);
        self.plan_pings();
        self.plan_faults();
        self.after_ms(1_000, Ev::Tick);
        let heal_us = self.faults.trouble_s * 1_000_000;
        self.at(heal_us, Ev::Heal);
    }

    pub(super) fn plan_pings(&mut self) {
        let trouble_us = self.faults.trouble_s * 1_000_000;
        let mut at_us = 0;
        for number in 0..self.faults.pings {
            if !self.random.random_bool(self.faults.bursts) {
                at_us = self.random.random_range(0..trouble_us);
            }
            let mut id = [0xb0; 16];
            id[..4].copy_from_slice(&u32::try_from(number).unwrap_or(0).to_be_bytes());
            let everyone = self.random.random_bool(self.faults.shared);
            let targets = if everyone {
                (0..self.devices.len()).collect()
            } else {
                vec![self.random.random_range(0..self.devices.len())]
            };
            let transient = self.random.random_bool(self.faults.ttl_zero);
            let short = self.random.random_bool(self.faults.short_lives);
            let plan = PingPlan {
                ping: PingId(id),
                targets,
                urgency: Urgency::ALL[self.random.random_range(0..4)],
                key: (!transient && self.random.random_bool(self.faults.collapse))
                    .then(|| self.random.random_range(0..3)),
                ttl_ms: match (transient, short) {
                    (true, _) => 30_000,
                    (false, true) => self.random.random_range(1_000..20_000),
                    (false, false) => 7 * 86_400_000,
                },
                transient,
                text: self.random.random_range(1..=60),
            };
            self.plan.push(plan);
            self.at(at_us, Ev::Publish(number));
            if self.random.random_bool(self.faults.revokes) {
                let later = self.random.random_range(0..10_000_000);
                self.at(at_us + later, Ev::Revoke(number));
            }
        }
        if self.faults.wipe {
            let at_us = self.random.random_range(0..trouble_us);
            let device = self.random.random_range(0..self.devices.len());
            self.at(at_us, Ev::Wipe(device));
        }
    }

    pub(super) fn plan_faults(&mut self) {
        let trouble_us = self.faults.trouble_s * 1_000_000;
        let faults = self.faults.clone();
        let counted = [
            (faults.server_kills, Fault::KillServer),
            (faults.power_cuts, Fault::CutPower),
            (faults.client_kills, Fault::KillClient),
            (faults.link_cuts, Fault::CutLink),
            (faults.half_opens, Fault::HalfOpen),
            (u32::from(faults.failed_sync), Fault::FailSync),
            (u32::from(faults.failed_write), Fault::FailWrite),
            (3 * u32::from(faults.snapshots), Fault::Snapshot),
        ];
        for (count, fault) in counted {
            for _ in 0..count {
                let at_us = self.random.random_range(0..trouble_us);
                self.at(at_us, Ev::Fault(fault));
            }
        }
        if faults.disk_full {
            let at_us = self.random.random_range(0..trouble_us);
            let for_us = self.random.random_range(0..20_000_000);
            self.at(at_us, Ev::Fault(Fault::FillDisk));
            self.at(at_us + for_us, Ev::Fault(Fault::FreeDisk));
        }
    }
}
