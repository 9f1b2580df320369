//! From a backup to the files of a store.
//!
//! The entries become a snapshot, the frames a log, both under an identity of their own: what the store that the backup is of
//! wrote afterwards, or before, can never be mixed in. No engine is made; a start builds whichever is wanted, as it does
//! whenever there is none. Entries and frames go from the one file to the others as they come, so memory is bounded.

use std::io::{self, Read};
use std::sync::Arc;

use super::read::{BackupFault, Piece, read};
use crate::ports::{BackupSummary, Entropy};
use crate::store::log::disk::{Disk, is_no_room};
use crate::store::log::frame;
use crate::store::log::segment::Maker;
use crate::store::log::{AppendError, Log, Shelf, ShelfError};
use crate::store::snapshot;

/// What to make of a backup.
pub(in crate::store) struct Unpack<'a> {
    /// Where; nothing of a store is there.
    pub(in crate::store) disk: Arc<dyn Disk>,
    pub(in crate::store) entropy: Arc<dyn Entropy>,
    /// The new store's identity.
    pub(in crate::store) store: [u8; 16],
    pub(in crate::store) segment_bytes: u64,
    pub(in crate::store) now_ms: u64,
    /// Told how many bytes of the backup have been read.
    pub(in crate::store) progress: &'a mut dyn FnMut(u64),
}

/// Where the pieces go.
enum Stage {
    Empty,
    Entries(snapshot::Writer, u64),
    Frames(Box<Log>),
}

fn failed(error: &io::Error) -> BackupFault {
    if is_no_room(error) {
        BackupFault::Refused("there is no room on the disk for what is in it".to_owned())
    } else {
        BackupFault::Refused(format!("what is in it cannot be written: {error}"))
    }
}

impl Unpack<'_> {
    /// Reads the backup to its end. Only `Ok` says that what is on the disk now is whole, and safe.
    pub(in crate::store) fn run(self, from: &mut dyn Read) -> Result<BackupSummary, BackupFault> {
        let Unpack {
            disk,
            entropy,
            store,
            segment_bytes,
            now_ms,
            progress,
        } = self;
        disk.make_dir(snapshot::DIR).map_err(|e| failed(&e))?;
        let mut stage = Stage::Empty;
        let begin_log = |writer: snapshot::Writer, first: u64| -> Result<Log, BackupFault> {
            writer
                .finish()
                .and_then(|_| snapshot::publish(&*disk, first))
                .map_err(|e| failed(&e))?;
            let shelf = Shelf::look(&disk, store).map_err(|error| match error {
                ShelfError::Io(error) => failed(&error),
                ShelfError::Newer { .. } | ShelfError::Foreign(_) => {
                    BackupFault::Refused("there is a log already".to_owned())
                }
            })?;
            let maker = Maker::new(
                Arc::clone(&disk),
                Arc::clone(&entropy),
                store,
                segment_bytes,
            );
            let tail = shelf
                .replay::<io::Error>(first, &mut |_, _| Ok(()))
                .map_err(|error| BackupFault::Refused(error.to_string()))?;
            let (log, _) = shelf
                .take_over(&tail, first, maker, "")
                .map_err(|e| failed(&e))?;
            Ok(log)
        };
        let summary = read(
            from,
            &mut |piece| {
                match piece {
                    Piece::Head(head) => {
                        let first = head.first_frame;
                        let writer = snapshot::Writer::create(&*disk, first, now_ms, store)
                            .map_err(|e| failed(&e))?;
                        stage = Stage::Entries(writer, first);
                    }
                    Piece::Entry(key, value) => {
                        if let Stage::Entries(writer, _) = &mut stage {
                            writer.add(key, value).map_err(|e| failed(&e))?;
                        }
                    }
                    Piece::Frame(number, payload, _) => {
                        stage = match std::mem::replace(&mut stage, Stage::Empty) {
                            Stage::Entries(writer, first) => {
                                Stage::Frames(Box::new(begin_log(writer, first)?))
                            }
                            further @ (Stage::Frames(_) | Stage::Empty) => further,
                        };
                        if let Stage::Frames(log) = &mut stage {
                            append(log, number, payload)?;
                        }
                    }
                }
                Ok(())
            },
            progress,
        )?;
        let mut log = match stage {
            Stage::Entries(writer, first) => Box::new(begin_log(writer, first)?),
            Stage::Frames(log) => log,
            Stage::Empty => return Err(BackupFault::Foreign),
        };
        log.settle().map_err(|e| failed(&e))?;
        Ok(summary)
    }
}

fn append(log: &mut Log, number: u64, payload: &[u8]) -> Result<(), BackupFault> {
    let mut bytes = vec![0; frame::HEADER];
    bytes.extend_from_slice(payload);
    if !log.fits(bytes.len()) {
        log.settle().map_err(|e| failed(&e))?;
    }
    let (next, seed) = log.make_room(bytes.len()).map_err(|error| match error {
        AppendError::NoRoom(_) => {
            BackupFault::Refused("there is no room on the disk for what is in it".to_owned())
        }
        AppendError::Failed(why) => BackupFault::Refused(why),
    })?;
    debug_assert_eq!(next, number);
    frame::seal(&mut bytes, next, seed);
    log.write_later(&bytes).map_err(|e| failed(&e))
}
