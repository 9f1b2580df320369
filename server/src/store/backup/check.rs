//! Looking into a backup: is it whole, and what is in it.

use std::collections::{HashMap, HashSet};
use std::io::{self, Read};

use super::read::{BackupFault, Parser, Piece};
use super::restore::Contents;
use crate::ports::BackupSummary;
use crate::store::record;
use crate::store::write::Write;

/// Bytes that are read at a time.
const STEP: usize = 256 << 10;

/// Checks every byte of a backup as it comes and counts what is in it. Memory: about 50 bytes for each device.
pub struct Checker {
    parser: Parser,
    tally: Tally,
}

#[derive(Default)]
struct Tally {
    apps: HashSet<Vec<u8>>,
    keys: HashSet<Vec<u8>>,
    devices: HashSet<[u8; 16]>,
    waiting: HashMap<[u8; 16], u32>,
}

impl Tally {
    fn put(&mut self, key: &[u8], value: Option<&[u8]>) {
        let Some((room, rest)) = key.split_first() else {
            return;
        };
        let set = match room {
            b'a' => &mut self.apps,
            b'k' => &mut self.keys,
            b'd' | b's' => {
                let Ok(device) = rest.try_into() else {
                    return;
                };
                match (room, value) {
                    (b'd', Some(_)) => drop(self.devices.insert(device)),
                    (b'd', None) => drop(self.devices.remove(&device)),
                    // The counters of a mailbox are absolute, so the last ones stand.
                    (_, Some(value)) => {
                        let count = record::summary(key, value).map_or(0, |summary| summary.count);
                        self.waiting.insert(device, count);
                    }
                    (_, None) => drop(self.waiting.remove(&device)),
                }
                return;
            }
            _ => return,
        };
        if value.is_some() {
            set.insert(rest.to_vec());
        } else {
            set.remove(rest);
        }
    }
}

impl Default for Checker {
    fn default() -> Checker {
        Checker::new()
    }
}

impl Checker {
    /// Nothing has come yet.
    #[must_use]
    pub fn new() -> Checker {
        Checker {
            parser: Parser::new(),
            tally: Tally::default(),
        }
    }

    /// Takes further bytes.
    ///
    /// # Errors
    ///
    /// What is wrong with them.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<(), BackupFault> {
        let tally = &mut self.tally;
        self.parser.feed(bytes, &mut |piece| {
            match piece {
                Piece::Head(_) => {}
                Piece::Entry(key, value) => tally.put(key, Some(value)),
                Piece::Frame(_, _, writes) => {
                    for write in writes {
                        match write {
                            Write::Put { key, value } => tally.put(key, Some(value)),
                            Write::Delete { key } => tally.put(key, None),
                            Write::Collect { .. }
                            | Write::DropReceipt { .. }
                            | Write::Settle { .. } => {}
                        }
                    }
                }
            }
            Ok(())
        })
    }

    /// That was all: what it is and what it holds, if it was whole.
    ///
    /// # Errors
    ///
    /// When its end is missing.
    pub fn finish(self) -> Result<(BackupSummary, Contents), BackupFault> {
        let summary = self.parser.finish()?;
        let tally = self.tally;
        Ok((
            summary,
            Contents {
                apps: tally.apps.len() as u64,
                devices: tally.devices.len() as u64,
                keys: tally.keys.len() as u64,
                waiting: tally.waiting.values().map(|count| u64::from(*count)).sum(),
            },
        ))
    }

    /// Checks a whole file. `progress` is told how many bytes have been read.
    ///
    /// # Errors
    ///
    /// What is wrong with it, and where.
    pub fn check(
        mut self,
        from: &mut dyn Read,
        progress: &mut dyn FnMut(u64),
    ) -> Result<(BackupSummary, Contents), BackupFault> {
        let mut buffer = vec![0; STEP];
        let mut done = 0;
        loop {
            match from.read(&mut buffer) {
                Ok(0) => return self.finish(),
                Ok(count) => {
                    self.feed(&buffer[..count])?;
                    done += count as u64;
                    progress(done);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
