//! The versioned format of every value on disk.
//!
//! A record is a version byte, a bincode 2 body and a CRC-32C over its key, the version and the body. With the key in
//! the sum a value that an engine hands out for another key is found as well. The types here are the promise to
//! our own later versions and live nowhere else: the domain types may change, these are only ever added to. A newer version than
//! ours is refused ([`Fault::Newer`]), an older one is read by the arm of its number, and anything that does not
//! check is [`Fault::Rotten`]: the reader sets it aside and goes on.
//!
//! bincode is named in this folder alone. It is no longer maintained, so its format is frozen by the golden files in
//! `server/golden/store/`: another coder may take its place the day those can be read by it.

mod audiences;
mod callbacks;
mod directory;
mod mailbox;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{BorrowDecode, Encode};

pub(super) use self::audiences::{
    chunk, expansion, joined, progress, put_chunk, put_expansion, put_joined, put_progress,
    put_spans, put_topics, spans, topics,
};
pub(super) use self::callbacks::{callback, dead_letter, put_callback, put_dead_letter};
pub(super) use self::directory::{
    api_key, app, device, erasure, idempotency, put_api_key, put_app, put_device, put_erasure,
    put_idempotency, put_seen, seen,
};
pub(super) use self::mailbox::{
    Pair, PairStored, body, collapse, expiry, outcome, outcome_number, pair, put_body,
    put_collapse, put_expiry, put_pair, put_row, put_summary, put_withdrawal, row, summary,
    withdrawal,
};

/// The largest record: 64 KiB of content, the most that can be configured, with 8 KiB for what surrounds it. Larger
/// ones would make sled put them into files that it never syncs.
pub(super) const RECORD_MAX: usize = 72 << 10;

/// The newest version of most records.
const VERSION: u8 = 1;

/// The newest version of the record of a device. 2: a secret that was rotated stays good for a while.
const DEVICE_VERSION: u8 = 2;

/// The newest version of the record that a key leads to; it is the one that is written.
fn newest(key: &[u8]) -> u8 {
    match key.first() {
        Some(b'd') => DEVICE_VERSION,
        _ => VERSION,
    }
}

/// Bytes of the checksum at the end.
const SUM: usize = 4;

/// Refuses to believe a length beyond this, whatever a rotten record says.
const DECODE_LIMIT: usize = RECORD_MAX;

type Config = Configuration<LittleEndian, Varint, Limit<DECODE_LIMIT>>;

const CONFIG: Config = bincode::config::standard().with_limit::<DECODE_LIMIT>();

/// Why a record cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// Written by a later program: this one must not guess.
    #[error("format {0} is newer than this program")]
    Newer(u8),
    /// The bytes are not what was written.
    #[error("{0}")]
    Rotten(&'static str),
}

#[derive(Encode, BorrowDecode)]
struct NumberV1 {
    number: u64,
}

/// Closes the record that begins at `start` of `out`: adds its checksum.
fn close(key: &[u8], out: &mut Vec<u8>, start: usize) {
    let sum = checksum(key, &out[start..]);
    out.extend_from_slice(&sum.to_le_bytes());
}

fn checksum(key: &[u8], value: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(key), value)
}

fn write<T: Encode>(key: &[u8], out: &mut Vec<u8>, body: &T) {
    let start = out.len();
    out.push(newest(key));
    // A Vec takes every byte and these types have no custom encoder; were it to fail, the record would be short and
    // found rotten by its reader instead of being believed.
    let written = bincode::encode_into_std_write(body, out, CONFIG);
    debug_assert!(written.is_ok());
    close(key, out, start);
}

/// Checks a record and takes its version and its body out of it.
fn open<'a>(key: &[u8], value: &'a [u8]) -> Result<(u8, &'a [u8]), Fault> {
    let Some((checked, sum)) = value.split_last_chunk::<SUM>() else {
        return Err(Fault::Rotten("the record is cut short"));
    };
    if checksum(key, checked) != u32::from_le_bytes(*sum) {
        return Err(Fault::Rotten("the checksum does not match"));
    }
    match checked.split_first() {
        Some((&version, _)) if version > newest(key) => Err(Fault::Newer(version)),
        Some((&version, body)) if version > 0 => Ok((version, body)),
        _ => Err(Fault::Rotten("the record has no known version")),
    }
}

/// Reads a record that has had one version only.
fn read<'a, T: BorrowDecode<'a, ()>>(key: &[u8], value: &'a [u8]) -> Result<T, Fault> {
    match open(key, value)? {
        (1, body) => decode(body),
        (version, _) => Err(Fault::Newer(version)),
    }
}

fn decode<'a, T: BorrowDecode<'a, ()>>(body: &'a [u8]) -> Result<T, Fault> {
    match bincode::borrow_decode_from_slice::<T, Config>(body, CONFIG) {
        Ok((decoded, used)) if used == body.len() => Ok(decoded),
        Ok(_) => Err(Fault::Rotten("the record is longer than its body")),
        Err(_) => Err(Fault::Rotten("the body cannot be decoded")),
    }
}

/// Whether a value is a whole record of a version that we know; what it says is not looked at.
pub(super) fn verify(key: &[u8], value: &[u8]) -> Result<(), Fault> {
    // The values of pure indexes are empty, and the engine's own position is no record.
    if value.is_empty() {
        return Ok(());
    }
    open(key, value).map(|_| ())
}

/// Writes a number that the store keeps of itself.
pub(super) fn put_number(key: &[u8], out: &mut Vec<u8>, number: u64) {
    write(key, out, &NumberV1 { number });
}

/// Reads a number that the store keeps of itself.
pub(super) fn number(key: &[u8], value: &[u8]) -> Result<u64, Fault> {
    let disk: NumberV1 = read(key, value)?;
    Ok(disk.number)
}
