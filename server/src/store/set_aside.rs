//! Records that cannot be read: counted, told once, and kept as files for whoever looks into it.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::log::SET_ASIDE;
use super::log::disk::Disk;
use super::record::Fault;

/// Most records of one run that are told and kept one by one. Beyond that the disk is the news, not the record.
const KEPT_MAX: usize = 10_000;

/// What was set aside in this run.
pub(super) struct SetAside {
    disk: Arc<dyn Disk>,
    run: u32,
    seen: Mutex<HashSet<Vec<u8>>>,
    count: AtomicU64,
}

impl SetAside {
    pub(super) fn new(disk: Arc<dyn Disk>, run: u32) -> SetAside {
        SetAside {
            disk,
            run,
            seen: Mutex::new(HashSet::new()),
            count: AtomicU64::new(0),
        }
    }

    /// Records of this run that were set aside.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// Sets a record aside, the first time it is met. The file holds the length of the key (4 bytes, little endian),
    /// the key and the value. Nothing of the value is logged.
    pub(super) fn record(&self, key: &[u8], value: &[u8], fault: Fault) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= KEPT_MAX || !seen.insert(key.to_vec()) {
            return;
        }
        let number = seen.len();
        drop(seen);
        self.count.fetch_add(1, Ordering::Relaxed);
        let name = format!("{SET_ASIDE}/record-run{}-{number:05}.bin", self.run);
        let room = key.first().map_or('?', |byte| char::from(*byte));
        tracing::error!(%fault, %room, file = name, "a record cannot be read and was set aside");
        let mut content = Vec::with_capacity(4 + key.len() + value.len());
        content.extend_from_slice(&u32::try_from(key.len()).unwrap_or(u32::MAX).to_le_bytes());
        content.extend_from_slice(key);
        content.extend_from_slice(value);
        let kept = self
            .disk
            .make_dir(SET_ASIDE)
            .and_then(|()| self.disk.create(&name))
            .and_then(|file| {
                file.write_at(&content, 0)?;
                file.sync()
            })
            .and_then(|()| self.disk.sync_dir(SET_ASIDE));
        if let Err(error) = kept {
            tracing::error!(%error, file = name, "the record could not be kept as a file");
        }
    }
}
