//! Faults strike, and heal.

use super::*;

impl World {
    pub(super) fn fault(&mut self, fault: Fault) {
        if self.healed && !matches!(fault, Fault::FreeDisk) {
            return;
        }
        self.say(|| format!("fault: {fault:?}"));
        match fault {
            Fault::KillServer => {
                let wait_ms = 100 + self.up_to(5_000);
                self.stop_server(false, wait_ms);
            }
            Fault::CutPower => {
                let wait_ms = 500 + self.up_to(5_000);
                self.stop_server(true, wait_ms);
            }
            Fault::KillClient => {
                let index = self.random.random_range(0..self.devices.len());
                self.kill_client(index);
            }
            Fault::CutLink => {
                if let Some(id) = self.any_link() {
                    let at_us = self.now_us + self.up_to(50_000);
                    if let Some(conn) = self.conns.get_mut(&id) {
                        conn.cut(&mut self.random);
                    }
                    self.at(at_us, Ev::Arrive(id, Way::Up));
                    self.at(at_us, Ev::Arrive(id, Way::Down));
                }
            }
            Fault::HalfOpen => {
                if let Some(conn) = self.any_link().and_then(|id| self.conns.get_mut(&id)) {
                    conn.silent = true;
                }
            }
            Fault::FillDisk => {
                let used = self.disk.used();
                let room = self.up_to(8 << 10);
                self.disk.set_capacity(Some(used + room));
            }
            Fault::FreeDisk => self.disk.set_capacity(None),
            Fault::FailSync => {
                let later = self.up_to(3);
                self.disk.fail_sync_in(later);
            }
            Fault::FailWrite => {
                let later = self.up_to(3);
                self.disk.fail_write_in(later);
            }
            Fault::Snapshot => {
                if self.house.is_some() {
                    self.store.snapshot();
                }
            }
        }
    }

    pub(super) fn any_link(&mut self) -> Option<u64> {
        let ids: Vec<u64> = self.conns.keys().copied().collect();
        let at = self.random.random_range(0..ids.len().max(1));
        ids.get(at).copied()
    }

    pub(super) fn heal(&mut self) {
        self.say(|| "everything heals".to_owned());
        self.healed = true;
        self.disk.set_capacity(None);
        // Faults that have not struck never will.
        self.disk.fail_sync_in(u64::MAX);
        self.disk.fail_write_in(u64::MAX);
        // Devices that only wanted what is urgent want everything from now on.
        for index in 0..self.devices.len() {
            if self.devices[index].picky {
                self.kill_client(index);
            }
        }
    }
}
