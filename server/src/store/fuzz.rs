//! What a fuzzer runs: every parser of bytes that come from a disk, as plain functions that must neither panic nor take
//! long, whatever they are given. A corpus is replayed by the tests.

use std::io;

use bytes::Bytes;

use super::log::disk::DiskFile;
use super::log::{frame, segment};
use super::{keys, record, snapshot, write};
use crate::delivery::{AppId, DeviceId, RowKey, Urgency};
use crate::ports::Stamp;

/// Every reader of a record: once with the bytes as they are, once as a body with the right version and checksum, so that
/// the decoder behind the checksum is reached.
pub fn records(data: &[u8]) {
    let mut sealed = vec![1];
    sealed.extend_from_slice(data);
    let key = b"r-key";
    let sum = crc32c::crc32c_append(crc32c::crc32c(key), &sealed);
    sealed.extend_from_slice(&sum.to_le_bytes());
    for value in [data, &sealed] {
        let row = RowKey {
            urgency: Urgency::Normal,
            order: 1,
        };
        if let Ok(row) = record::row(key, row, value) {
            drop(row.notification(None));
        }
        let _ = record::body(key, value);
        let _ = record::summary(key, value);
        let _ = record::expiry(key, value);
        let _ = record::collapse(key, value);
        let _ = record::pair(key, value);
        let _ = record::device(key, DeviceId([0; 16]), value).map(drop);
        let _ = record::seen(key, value);
        let _ = record::topics(key, value).map(drop);
        let _ = record::spans(key, value).map(drop);
        let _ = record::joined(key, value);
        let _ = record::expansion(key, AppId(1), Stamp::FIRST, value).map(drop);
        let _ = record::progress(key, value);
        let _ = record::chunk(key, value).map(drop);
        let _ = record::app(key, value).map(drop);
        let _ = record::api_key(key, value).map(drop);
        let _ = record::callback(key, value).map(drop);
        let _ = record::dead_letter(key, AppId(1), 1, value).map(drop);
        let _ = record::idempotency(key, AppId(1), [0; 32], value);
        let _ = record::number(key, value);
    }
    // The kind that has had two versions.
    let key = b"d-key";
    for version in [1, 2] {
        let mut sealed = vec![version];
        sealed.extend_from_slice(data);
        let sum = crc32c::crc32c_append(crc32c::crc32c(key), &sealed);
        sealed.extend_from_slice(&sum.to_le_bytes());
        let _ = record::device(key, DeviceId([0; 16]), &sealed).map(drop);
    }
    let _ = keys::parse_row(data);
    let _ = keys::parse_expiry(data);
    let _ = keys::parse_pair(data);
    let _ = keys::parse_ended(data);
    let _ = keys::parse_collapse(data);
    let _ = keys::parse_device(data);
    let _ = keys::parse_dead_letter(data);
    let _ = keys::parse_idempotency_age(data);
    let _ = keys::parse_member(data);
    let _ = keys::parse_expansion(data);
}

/// The writes of a frame.
pub fn payload(data: &[u8]) {
    let _ = write::decode(&Bytes::copy_from_slice(data));
}

/// What the files of the history of outcomes hold.
pub fn history(data: &[u8]) {
    super::outcomes::read_anything(data);
}

/// The header and the frames of a segment.
pub fn log_segment(data: &[u8]) {
    let _ = segment::Header::decode(data);
    let scan = frame::scan(data, 0, 0, 1, 1);
    for found in &scan.frames {
        payload(&data[found.payload.clone()]);
    }
    let _ = frame::scan(data, 0, 0, 1, u64::MAX);
}

/// A snapshot.
pub fn snapshot_file(data: &[u8]) {
    let _ = snapshot::parse(&Slice(data.to_vec()), None, &mut |key, value| {
        let _ = record::verify(key, value);
        Ok(())
    });
}

/// A backup.
pub fn backup_file(data: &[u8]) {
    let _ = super::backup::verify(&mut &*data, &mut |_| {});
}

/// A file that is only read.
struct Slice(Vec<u8>);

impl DiskFile for Slice {
    fn length(&self) -> io::Result<u64> {
        Ok(self.0.len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let from = usize::try_from(offset).map_err(io::Error::other)?;
        let bytes = from
            .checked_add(buffer.len())
            .and_then(|to| self.0.get(from..to))
            .ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, _data: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn allocate(&self, _length: u64) -> io::Result<()> {
        Err(io::Error::from(io::ErrorKind::ReadOnlyFilesystem))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}
