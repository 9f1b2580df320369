//! The history as it lies on disk, for whoever looks at a data directory without a store. Changes nothing.

use std::io;

use super::format::{self, DIR, index_name, segment_name};
use super::segment::{self, Kind, Segment};
use crate::store::log::disk::Disk;

/// What is known of the index of a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) enum IndexLook {
    /// It has one.
    Whole,
    /// It was never sealed: it is the one that grew last.
    Missing,
    /// It is not what was written.
    Damaged,
}

/// A segment, by the headers of its two files.
#[derive(Debug)]
pub(in crate::store) struct SegmentLook {
    pub(in crate::store) number: u32,
    pub(in crate::store) file: String,
    /// Both files.
    pub(in crate::store) bytes: u64,
    /// Places for records; those of an index that are readable.
    pub(in crate::store) records: u64,
    pub(in crate::store) index: IndexLook,
    /// When the earliest and the latest ended, if the index says so.
    pub(in crate::store) span: Option<(u64, u64)>,
    /// Why it cannot be used.
    pub(in crate::store) why: Option<String>,
}

/// The segments by rising number.
pub(in crate::store) fn look(disk: &dyn Disk, store: [u8; 16]) -> io::Result<Vec<SegmentLook>> {
    let files = match disk.list(DIR) {
        Ok(files) => files,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut numbers: Vec<u32> = files
        .iter()
        .filter_map(|file| format::parse_name(file, ".out"))
        .collect();
    numbers.sort_unstable();
    Ok(numbers
        .into_iter()
        .map(|number| {
            let segment = Segment::found(disk, store, number);
            SegmentLook {
                number,
                file: segment_name(number),
                bytes: segment.bytes(),
                records: segment.records(),
                index: match &segment.kind {
                    Kind::Sealed(_) => IndexLook::Whole,
                    Kind::Bare(bare) if bare.torn => IndexLook::Missing,
                    Kind::Open(_) | Kind::Bare(_) | Kind::Unusable(_) => IndexLook::Damaged,
                },
                span: segment.span(),
                why: match &segment.kind {
                    Kind::Unusable(unused) => Some(unused.why.to_string()),
                    Kind::Open(_) | Kind::Sealed(_) | Kind::Bare(_) => None,
                },
            }
        })
        .collect())
}

/// What every byte of a segment says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Checked {
    /// Records that can be read.
    pub(in crate::store) records: u64,
    /// Records that cannot.
    pub(in crate::store) rotten: u64,
    /// It has no index, or each entry of it is as the records say. With rotten records it cannot be compared.
    pub(in crate::store) index_fits: bool,
}

/// Reads every record and the whole index of a segment. `None`: it cannot be used, or is gone.
pub(in crate::store) fn check(
    disk: &dyn Disk,
    store: [u8; 16],
    number: u32,
) -> io::Result<Option<Checked>> {
    let found = Segment::found(disk, store, number);
    let torn = matches!(&found.kind, Kind::Bare(bare) if bare.torn);
    let Some((keys, summary)) = segment::read_all(disk, &found, torn)? else {
        return Ok(None);
    };
    let mut checked = Checked {
        records: u64::from(summary.entries),
        rotten: u64::from(summary.rotten),
        index_fits: true,
    };
    if let Kind::Sealed(sealed) = &found.kind
        && sealed.summary == summary
    {
        let wanted = segment::index_bytes(store, number, keys, &summary);
        let mut bytes = vec![0; wanted.len()];
        let read = disk
            .open(&index_name(number))
            .and_then(|file| file.read_at(&mut bytes, 0));
        checked.index_fits = match read {
            Ok(()) => bytes == wanted,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            // Whatever the disk says: whoever asks it is not answered.
            Err(_) => false,
        };
    }
    Ok(Some(checked))
}
