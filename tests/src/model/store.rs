//! A store of one mailbox, as the log would have it: a list, and rules about what may be written.

use std::collections::BTreeMap;
use std::sync::Arc;

use bellwire_server::delivery::{
    Change, MailboxRead, MailboxView, Notification, Outcome, PingId, RowKey, RowMeta, Summary,
    Withdrawal,
};

/// What is on disk.
#[derive(Debug, Default)]
pub struct ModelStore {
    /// The mailbox as a whole.
    pub summary: Option<Summary>,
    /// Its rows by order.
    pub rows: BTreeMap<u64, (RowMeta, Arc<Notification>)>,
    /// Outcomes of rows that were removed.
    pub outcomes: BTreeMap<PingId, Outcome>,
    /// Orders of rows whose bodies cannot be read.
    pub rotten: Vec<u64>,
    /// What the device is to take off the screen.
    pub withdrawals: Vec<Withdrawal>,
}

impl ModelStore {
    /// Writes a frame.
    ///
    /// # Errors
    /// What a frame must never say.
    pub fn apply(&mut self, changes: Vec<Change>, run: u32) -> Result<(), String> {
        for change in changes {
            match change {
                Change::Insert {
                    order,
                    run: of,
                    notification,
                    ..
                } => {
                    // What may have been sent by an earlier run counts as one of that.
                    if of != run && of + 1 != run {
                        return Err(format!("an insert of run {of} in run {run}"));
                    }
                    let meta = RowMeta {
                        key: RowKey {
                            urgency: notification.urgency,
                            order,
                        },
                        ping: notification.ping,
                        size: notification.size,
                        expires_ms: notification.expires_ms,
                        collapse: notification.collapse.clone(),
                        run: of,
                        shared: notification.shared,
                    };
                    if notification.transient {
                        return Err("TTL 0 was stored".to_owned());
                    }
                    if self.has(meta.ping) {
                        return Err(format!("{} waits twice", meta.ping));
                    }
                    self.outcomes.remove(&meta.ping);
                    if self.rows.insert(order, (meta, notification)).is_some() {
                        return Err(format!("order {order} was given twice"));
                    }
                }
                Change::Remove { row, outcome, .. } => {
                    if self.rows.remove(&row.key.order).is_none() {
                        return Err(format!("row {} is removed twice", row.key.order));
                    }
                    self.outcomes.insert(row.ping, outcome);
                }
                Change::Outcome { ping, outcome, .. } => {
                    if self.has(ping) {
                        return Err(format!("{ping} ended without its row"));
                    }
                    self.outcomes.insert(ping, outcome);
                }
                Change::Withdraw { withdrawal, .. } => self.withdraw(withdrawal),
                Change::Summary { summary, .. } => self.summary = Some(summary),
                Change::Forget { .. } => {
                    self.summary = None;
                    self.withdrawals.clear();
                }
                Change::Cleared { .. } => {}
            }
        }
        let Some(summary) = self.summary else {
            return match self.rows.is_empty() {
                true => Ok(()),
                false => Err("a mailbox was forgotten with rows in it".to_owned()),
            };
        };
        let bytes: u64 = self
            .rows
            .values()
            .map(|(meta, _)| u64::from(meta.size))
            .sum();
        if (summary.count as usize, summary.bytes) != (self.rows.len(), bytes) {
            return Err(format!(
                "the summary counts {} and {} bytes, there are {} and {bytes}",
                summary.count,
                summary.bytes,
                self.rows.len()
            ));
        }
        if self.rows.keys().any(|&order| order >= summary.next_order) {
            return Err("the next order is taken".to_owned());
        }
        Ok(())
    }

    /// Whether a row of this ping is here.
    #[must_use]
    pub fn has(&self, ping: PingId) -> bool {
        self.rows.values().any(|(meta, _)| meta.ping == ping)
    }

    /// Keeps a withdrawal, once for each ping.
    pub fn withdraw(&mut self, withdrawal: Withdrawal) {
        self.withdrawals.retain(|one| one.ping != withdrawal.ping);
        self.withdrawals.push(withdrawal);
    }

    /// Answers a read of the core.
    #[must_use]
    pub fn read(&self, request: &MailboxRead) -> MailboxView {
        let mut rows: BTreeMap<u64, RowMeta> = BTreeMap::new();
        let mut take = |meta: &RowMeta| {
            rows.insert(meta.key.order, meta.clone());
        };
        let all = self.rows.values().map(|(meta, _)| meta);
        if request.all {
            all.clone().for_each(&mut take);
        }
        if let Some(ping) = request.ping {
            all.clone()
                .filter(|meta| meta.ping == ping)
                .for_each(&mut take);
        }
        if let Some(key) = &request.collapse {
            all.clone()
                .rfind(|meta| meta.collapse.as_ref() == Some(key))
                .into_iter()
                .for_each(&mut take);
        }
        if let Some(lowest) = request.lowest {
            let mut ranked: Vec<&RowMeta> = all.clone().collect();
            ranked.sort_by_key(|meta| meta.key);
            let (mut count, mut bytes) = (0, 0);
            for meta in ranked {
                if count >= lowest.count && bytes >= lowest.bytes {
                    break;
                }
                count += 1;
                bytes += u64::from(meta.size);
                take(meta);
            }
        }
        for key in &request.rows {
            if let Some((meta, _)) = self.rows.get(&key.order) {
                take(meta);
            }
        }
        MailboxView {
            summary: self.summary,
            rows: rows.into_values().collect(),
            complete: request.all,
            withdrawals: request.withdrawals.then(|| self.withdrawals.clone()),
        }
    }

    /// Reads bodies; those that are gone or rotten are `None`.
    #[must_use]
    pub fn bodies(&self, rows: &[RowKey]) -> Vec<(RowKey, Option<Arc<Notification>>)> {
        rows.iter()
            .map(|key| {
                let row = self
                    .rows
                    .get(&key.order)
                    .filter(|_| !self.rotten.contains(&key.order));
                (*key, row.map(|(_, notification)| Arc::clone(notification)))
            })
            .collect()
    }
}
