//! The versioned format of every value on disk.
//!
//! A record is a version byte, a bincode 2 body and a CRC-32C over its key, the version and the body. With the key in
//! the sum a value that an engine hands out for another key is found as well. The types here are the promise to
//! our own later versions and live nowhere else: the domain types may change, these are only ever added to. A newer version than
//! ours is refused ([`Fault::Newer`]), an older one is read by the arm of its number, and anything that does not
//! check is [`Fault::Rotten`]: the reader sets it aside and goes on.
//!
//! bincode is named in this file alone. It is no longer maintained, so its format is frozen by the golden files in
//! `server/golden/store/`: another coder may take its place the day those can be read by it.

use std::sync::Arc;

use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use crate::delivery::{
    AppId, CollapseKey, DeviceId, Hold, Notification, Outcome, PingId, RowKey, RowMeta, Summary,
    Urgency, WireSlot,
};
use crate::ports::{
    AppRecord, Audience, CallbackRecord, Carrier, DeadLetter, DeviceRecord, Erased, Erasure,
    ExpansionProgress, ExpansionRecord, Failing, IdempotencyRecord, KeyRecord, Membership,
    OutcomePosition, PairState, PreviousSecret, Scopes, Seen, SigningSecret, Span, Spans, Stamp,
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
struct RowV1<'a> {
    app: u32,
    ping: [u8; 16],
    size: u32,
    accepted_ms: u64,
    expires_ms: u64,
    collapse: Option<&'a str>,
    run: u32,
    shared: bool,
    content: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct BodyV1<'a> {
    content: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct SummaryV1 {
    app: u32,
    count: u32,
    bytes: u64,
    next_order: u64,
    sent_up_to: u64,
}

#[derive(Encode, BorrowDecode)]
struct ExpiryV1 {
    ping: [u8; 16],
}

#[derive(Encode, BorrowDecode)]
struct CollapseV1 {
    urgency: u8,
}

#[derive(Encode, BorrowDecode)]
struct PairV1 {
    app: u32,
    state: PairStateV1,
}

#[derive(Encode, BorrowDecode)]
enum PairStateV1 {
    Waiting {
        urgency: u8,
        order: u64,
        expires_ms: u64,
    },
    Ended {
        outcome: u8,
        at_ms: u64,
    },
}

#[derive(Encode, BorrowDecode)]
struct DeviceV1<'a> {
    app: u32,
    user: &'a str,
    name: Option<&'a str>,
    created_ms: u64,
    secret_hash: [u8; 32],
}

#[derive(Encode, BorrowDecode)]
struct DeviceV2<'a> {
    app: u32,
    user: &'a str,
    name: Option<&'a str>,
    created_ms: u64,
    secret_hash: [u8; 32],
    previous_secrets: Vec<PreviousSecretV2>,
}

#[derive(Encode, BorrowDecode)]
struct PreviousSecretV2 {
    hash: [u8; 32],
    until_ms: u64,
}

#[derive(Encode, BorrowDecode)]
struct SeenV1<'a> {
    at_ms: u64,
    carrier: u8,
    agent: Option<&'a str>,
}

#[derive(Encode, BorrowDecode)]
struct AppV1<'a> {
    id: u32,
    name: &'a str,
    secret: [u8; 32],
    created_ms: u64,
}

#[derive(Encode, BorrowDecode)]
struct ApiKeyV1<'a> {
    id: [u8; 10],
    app: u32,
    scopes: u8,
    name: &'a str,
    created_ms: u64,
    secret_hash: [u8; 32],
}

#[derive(Encode, BorrowDecode)]
struct SigningSecretV1<'a> {
    key: &'a [u8],
    until_ms: Option<u64>,
}

#[derive(Encode, BorrowDecode)]
struct FailingV1<'a> {
    since_ms: u64,
    tries: u32,
    why: &'a str,
}

#[derive(Encode, BorrowDecode)]
struct CallbackV1<'a> {
    app: u32,
    url: &'a str,
    outcomes: &'a [u8],
    secrets: Vec<SigningSecretV1<'a>>,
    created_ms: u64,
    position: u64,
    sending: Option<u64>,
    failing: Option<FailingV1<'a>>,
    gone_ms: Option<u64>,
    next_letter: u64,
}

#[derive(Encode, BorrowDecode)]
struct DeadLetterV1<'a> {
    id: &'a str,
    body: &'a [u8],
    events: u32,
    tries: u32,
    since_ms: u64,
    at_ms: u64,
    why: &'a str,
}

#[derive(Encode, BorrowDecode)]
struct IdempotencyV1 {
    body_hash: [u8; 32],
    ping: [u8; 16],
    devices: u32,
    ttl_s: u64,
    at_ms: u64,
}

#[derive(Encode, BorrowDecode)]
struct ErasureV1 {
    app: u32,
    at_ms: u64,
}

#[derive(Encode, BorrowDecode)]
struct WithdrawalV1 {
    app: u32,
    until_ms: u64,
}

#[derive(Encode, BorrowDecode)]
struct StampV1 {
    run: u32,
    count: u64,
}

impl From<Stamp> for StampV1 {
    fn from(stamp: Stamp) -> StampV1 {
        StampV1 {
            run: stamp.run,
            count: stamp.count,
        }
    }
}

impl From<StampV1> for Stamp {
    fn from(disk: StampV1) -> Stamp {
        Stamp {
            run: disk.run,
            count: disk.count,
        }
    }
}

#[derive(Encode, BorrowDecode)]
struct TopicsV1<'a> {
    app: u32,
    topics: Vec<MembershipV1<'a>>,
}

#[derive(Encode, BorrowDecode)]
struct MembershipV1<'a> {
    topic: &'a str,
    joined: StampV1,
}

#[derive(Encode, BorrowDecode)]
struct SpansV1 {
    spans: Vec<SpanV1>,
}

#[derive(Encode, BorrowDecode)]
struct SpanV1 {
    joined: StampV1,
    left: Option<StampV1>,
}

#[derive(Encode, BorrowDecode)]
struct ExpansionV1<'a> {
    ping: [u8; 16],
    accepted_ms: u64,
    expires_ms: u64,
    urgency: u8,
    collapse: Option<&'a str>,
    size: u32,
    estimate: u32,
    audience: AudienceV1<'a>,
    content: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
enum AudienceV1<'a> {
    Topic(&'a str),
    Everyone,
    Listed { chunks: u32, devices: u32 },
}

#[derive(Encode, BorrowDecode)]
struct ProgressV1 {
    done: Option<[u8; 16]>,
    devices: u32,
    unknown: u32,
    chunk: u32,
}

#[derive(Encode, BorrowDecode)]
struct ChunkV1<'a> {
    devices: &'a [u8],
}

#[derive(Encode, BorrowDecode)]
struct NumberV1 {
    number: u64,
}

/// What is known of one notification of a ping, as it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pair {
    pub(super) app: AppId,
    pub(super) state: PairStored,
}

/// Where it stands; a waiting one knows its row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PairStored {
    Waiting { row: RowKey, expires_ms: u64 },
    Ended { outcome: Outcome, at_ms: u64 },
}

impl PairStored {
    /// As the port speaks of it.
    pub(super) fn state(self) -> PairState {
        match self {
            PairStored::Waiting { expires_ms, .. } => PairState::Waiting { expires_ms },
            PairStored::Ended { outcome, at_ms } => PairState::Ended { outcome, at_ms },
        }
    }
}

/// A stored row, with its body unless the rows of its ping share one.
#[derive(Debug)]
pub(super) struct Row<'a> {
    pub(super) meta: RowMeta,
    app: AppId,
    accepted_ms: u64,
    content: &'a [u8],
}

impl Row<'_> {
    /// The notification as it was accepted. `shared` is the content of the body record, if it has one.
    pub(super) fn notification(&self, shared: Option<&[u8]>) -> Arc<Notification> {
        Arc::new(Notification {
            ping: self.meta.ping,
            app: self.app,
            accepted_ms: self.accepted_ms,
            expires_ms: self.meta.expires_ms,
            urgency: self.meta.key.urgency,
            collapse: self.meta.collapse.clone(),
            size: self.meta.size,
            transient: false,
            shared: self.meta.shared,
            content: Bytes::copy_from_slice(shared.unwrap_or(self.content)),
            wire: WireSlot::default(),
            hold: Hold::default(),
        })
    }
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

fn urgency(rank: u8) -> Result<Urgency, Fault> {
    Urgency::from_rank(rank).ok_or(Fault::Rotten("no such urgency"))
}

/// The number of an outcome on disk.
pub(super) fn outcome_number(outcome: Outcome) -> u8 {
    // The place in the list is the number on disk; the list has eight entries.
    Outcome::ALL
        .iter()
        .position(|known| *known == outcome)
        .and_then(|place| u8::try_from(place).ok())
        .unwrap_or(u8::MAX)
}

/// The outcome of a number on disk.
pub(super) fn outcome(number: u8) -> Result<Outcome, Fault> {
    Outcome::ALL
        .get(usize::from(number))
        .copied()
        .ok_or(Fault::Rotten("no such outcome"))
}

/// Writes a row; a shared body is left out.
pub(super) fn put_row(key: &[u8], out: &mut Vec<u8>, run: u32, notification: &Notification) {
    write(
        key,
        out,
        &RowV1 {
            app: notification.app.0,
            ping: notification.ping.0,
            size: notification.size,
            accepted_ms: notification.accepted_ms,
            expires_ms: notification.expires_ms,
            collapse: notification.collapse.as_ref().map(CollapseKey::as_str),
            run,
            shared: notification.shared,
            content: if notification.shared {
                &[]
            } else {
                &notification.content
            },
        },
    );
}

/// Reads a row.
pub(super) fn row<'a>(key: &[u8], place: RowKey, value: &'a [u8]) -> Result<Row<'a>, Fault> {
    let disk: RowV1<'a> = read(key, value)?;
    let collapse = match disk.collapse {
        None => None,
        Some(text) => Some(CollapseKey::new(text).ok_or(Fault::Rotten("no collapse key"))?),
    };
    Ok(Row {
        meta: RowMeta {
            key: place,
            ping: PingId(disk.ping),
            size: disk.size,
            expires_ms: disk.expires_ms,
            collapse,
            run: disk.run,
            shared: disk.shared,
        },
        app: AppId(disk.app),
        accepted_ms: disk.accepted_ms,
        content: disk.content,
    })
}

/// Writes a shared body.
pub(super) fn put_body(key: &[u8], out: &mut Vec<u8>, content: &[u8]) {
    write(key, out, &BodyV1 { content });
}

/// Reads a shared body.
pub(super) fn body<'a>(key: &[u8], value: &'a [u8]) -> Result<&'a [u8], Fault> {
    let disk: BodyV1<'a> = read(key, value)?;
    Ok(disk.content)
}

/// Writes a summary.
pub(super) fn put_summary(key: &[u8], out: &mut Vec<u8>, summary: &Summary) {
    write(
        key,
        out,
        &SummaryV1 {
            app: summary.app.0,
            count: summary.count,
            bytes: summary.bytes,
            next_order: summary.next_order,
            sent_up_to: summary.sent_up_to,
        },
    );
}

/// Reads a summary.
pub(super) fn summary(key: &[u8], value: &[u8]) -> Result<Summary, Fault> {
    let disk: SummaryV1 = read(key, value)?;
    Ok(Summary {
        app: AppId(disk.app),
        count: disk.count,
        bytes: disk.bytes,
        next_order: disk.next_order,
        sent_up_to: disk.sent_up_to,
    })
}

/// Writes the ping of an expiry key, so that a row that rots can still be brought to its end.
pub(super) fn put_expiry(key: &[u8], out: &mut Vec<u8>, ping: PingId) {
    write(key, out, &ExpiryV1 { ping: ping.0 });
}

/// Reads the ping of an expiry key.
pub(super) fn expiry(key: &[u8], value: &[u8]) -> Result<PingId, Fault> {
    let disk: ExpiryV1 = read(key, value)?;
    Ok(PingId(disk.ping))
}

/// Writes the urgency of a collapse key.
pub(super) fn put_collapse(key: &[u8], out: &mut Vec<u8>, urgency: Urgency) {
    write(
        key,
        out,
        &CollapseV1 {
            urgency: urgency.rank(),
        },
    );
}

/// Reads the urgency of a collapse key.
pub(super) fn collapse(key: &[u8], value: &[u8]) -> Result<Urgency, Fault> {
    let disk: CollapseV1 = read(key, value)?;
    urgency(disk.urgency)
}

/// Writes what is known of a notification.
pub(super) fn put_pair(key: &[u8], out: &mut Vec<u8>, pair: Pair) {
    let state = match pair.state {
        PairStored::Waiting { row, expires_ms } => PairStateV1::Waiting {
            urgency: row.urgency.rank(),
            order: row.order,
            expires_ms,
        },
        PairStored::Ended { outcome, at_ms } => PairStateV1::Ended {
            outcome: outcome_number(outcome),
            at_ms,
        },
    };
    write(
        key,
        out,
        &PairV1 {
            app: pair.app.0,
            state,
        },
    );
}

/// Reads what is known of a notification.
pub(super) fn pair(key: &[u8], value: &[u8]) -> Result<Pair, Fault> {
    let disk: PairV1 = read(key, value)?;
    let state = match disk.state {
        PairStateV1::Waiting {
            urgency: rank,
            order,
            expires_ms,
        } => PairStored::Waiting {
            row: RowKey {
                urgency: urgency(rank)?,
                order,
            },
            expires_ms,
        },
        PairStateV1::Ended {
            outcome: number,
            at_ms,
        } => PairStored::Ended {
            outcome: outcome(number)?,
            at_ms,
        },
    };
    Ok(Pair {
        app: AppId(disk.app),
        state,
    })
}

/// Writes a device record.
pub(super) fn put_device(key: &[u8], out: &mut Vec<u8>, device: &DeviceRecord) {
    write(
        key,
        out,
        &DeviceV2 {
            app: device.app.0,
            user: &device.user,
            name: device.name.as_deref(),
            created_ms: device.created_ms,
            secret_hash: device.secret_hash,
            previous_secrets: device
                .previous_secrets
                .iter()
                .map(|previous| PreviousSecretV2 {
                    hash: previous.hash,
                    until_ms: previous.until_ms,
                })
                .collect(),
        },
    );
}

/// Reads a device record.
pub(super) fn device(key: &[u8], id: DeviceId, value: &[u8]) -> Result<DeviceRecord, Fault> {
    let disk = match open(key, value)? {
        (1, body) => {
            let before: DeviceV1<'_> = decode(body)?;
            DeviceV2 {
                app: before.app,
                user: before.user,
                name: before.name,
                created_ms: before.created_ms,
                secret_hash: before.secret_hash,
                previous_secrets: Vec::new(),
            }
        }
        (_, body) => decode(body)?,
    };
    Ok(DeviceRecord {
        id,
        app: AppId(disk.app),
        user: disk.user.to_owned(),
        name: disk.name.map(str::to_owned),
        created_ms: disk.created_ms,
        secret_hash: disk.secret_hash,
        previous_secrets: disk
            .previous_secrets
            .into_iter()
            .map(|previous| PreviousSecret {
                hash: previous.hash,
                until_ms: previous.until_ms,
            })
            .collect(),
    })
}

const QUIC: u8 = 0;
const WEBSOCKET: u8 = 1;

/// Writes when a device was last seen.
pub(super) fn put_seen(key: &[u8], out: &mut Vec<u8>, seen: &Seen) {
    write(
        key,
        out,
        &SeenV1 {
            at_ms: seen.at_ms,
            carrier: match seen.carrier {
                Carrier::Quic => QUIC,
                Carrier::WebSocket => WEBSOCKET,
            },
            agent: seen.agent.as_deref(),
        },
    );
}

/// Reads when a device was last seen.
pub(super) fn seen(key: &[u8], value: &[u8]) -> Result<Seen, Fault> {
    let disk: SeenV1<'_> = read(key, value)?;
    Ok(Seen {
        at_ms: disk.at_ms,
        carrier: match disk.carrier {
            QUIC => Carrier::Quic,
            WEBSOCKET => Carrier::WebSocket,
            _ => return Err(Fault::Rotten("no such carrier")),
        },
        agent: disk.agent.map(Arc::from),
    })
}

/// Writes an app.
pub(super) fn put_app(key: &[u8], out: &mut Vec<u8>, app: &AppRecord) {
    write(
        key,
        out,
        &AppV1 {
            id: app.id.0,
            name: &app.name,
            secret: app.secret,
            created_ms: app.created_ms,
        },
    );
}

/// Reads an app.
pub(super) fn app(key: &[u8], value: &[u8]) -> Result<AppRecord, Fault> {
    let disk: AppV1<'_> = read(key, value)?;
    Ok(AppRecord {
        id: AppId(disk.id),
        name: disk.name.to_owned(),
        secret: disk.secret,
        created_ms: disk.created_ms,
    })
}

/// Writes an API key.
pub(super) fn put_api_key(key: &[u8], out: &mut Vec<u8>, record: &KeyRecord) {
    write(
        key,
        out,
        &ApiKeyV1 {
            id: record.id,
            app: record.app.0,
            scopes: record.scopes.bits(),
            name: &record.name,
            created_ms: record.created_ms,
            secret_hash: record.secret_hash,
        },
    );
}

/// Reads an API key.
pub(super) fn api_key(key: &[u8], value: &[u8]) -> Result<KeyRecord, Fault> {
    let disk: ApiKeyV1<'_> = read(key, value)?;
    Ok(KeyRecord {
        id: disk.id,
        app: AppId(disk.app),
        scopes: Scopes::from_bits(disk.scopes),
        name: disk.name.to_owned(),
        created_ms: disk.created_ms,
        secret_hash: disk.secret_hash,
    })
}

/// Writes a used idempotency key.
pub(super) fn put_idempotency(key: &[u8], out: &mut Vec<u8>, record: &IdempotencyRecord) {
    write(
        key,
        out,
        &IdempotencyV1 {
            body_hash: record.body_hash,
            ping: record.ping.0,
            devices: record.devices,
            ttl_s: record.ttl_s,
            at_ms: record.at_ms,
        },
    );
}

/// Reads a used idempotency key.
pub(super) fn idempotency(
    key: &[u8],
    app: AppId,
    key_hash: [u8; 32],
    value: &[u8],
) -> Result<IdempotencyRecord, Fault> {
    let disk: IdempotencyV1 = read(key, value)?;
    Ok(IdempotencyRecord {
        app,
        key_hash,
        body_hash: disk.body_hash,
        ping: PingId(disk.ping),
        devices: disk.devices,
        ttl_s: disk.ttl_s,
        at_ms: disk.at_ms,
    })
}

/// Writes where outcomes are posted.
pub(super) fn put_callback(key: &[u8], out: &mut Vec<u8>, callback: &CallbackRecord) {
    let outcomes: Vec<u8> = callback
        .outcomes
        .iter()
        .map(|outcome| outcome_number(*outcome))
        .collect();
    write(
        key,
        out,
        &CallbackV1 {
            app: callback.app.0,
            url: &callback.url,
            outcomes: &outcomes,
            secrets: callback
                .secrets
                .iter()
                .map(|secret| SigningSecretV1 {
                    key: &secret.key,
                    until_ms: secret.until_ms,
                })
                .collect(),
            created_ms: callback.created_ms,
            position: callback.position.0,
            sending: callback.sending.map(|end| end.0),
            failing: callback.failing.as_ref().map(|failing| FailingV1 {
                since_ms: failing.since_ms,
                tries: failing.tries,
                why: &failing.why,
            }),
            gone_ms: callback.gone_ms,
            next_letter: callback.next_letter,
        },
    );
}

/// Reads where outcomes are posted.
pub(super) fn callback(key: &[u8], value: &[u8]) -> Result<CallbackRecord, Fault> {
    let disk: CallbackV1<'_> = read(key, value)?;
    Ok(CallbackRecord {
        app: AppId(disk.app),
        url: disk.url.to_owned(),
        outcomes: disk
            .outcomes
            .iter()
            .map(|number| outcome(*number))
            .collect::<Result<_, _>>()?,
        secrets: disk
            .secrets
            .into_iter()
            .map(|secret| SigningSecret {
                key: secret.key.to_vec(),
                until_ms: secret.until_ms,
            })
            .collect(),
        created_ms: disk.created_ms,
        position: OutcomePosition(disk.position),
        sending: disk.sending.map(OutcomePosition),
        failing: disk.failing.map(|failing| Failing {
            since_ms: failing.since_ms,
            tries: failing.tries,
            why: failing.why.to_owned(),
        }),
        gone_ms: disk.gone_ms,
        next_letter: disk.next_letter,
    })
}

/// Writes a batch that could not be posted; whose and which is in its key.
pub(super) fn put_dead_letter(key: &[u8], out: &mut Vec<u8>, letter: &DeadLetter) {
    write(
        key,
        out,
        &DeadLetterV1 {
            id: &letter.id,
            body: &letter.body,
            events: letter.events,
            tries: letter.tries,
            since_ms: letter.since_ms,
            at_ms: letter.at_ms,
            why: &letter.why,
        },
    );
}

/// Reads a batch that could not be posted. `app` and `number` are those of its key.
pub(super) fn dead_letter(
    key: &[u8],
    app: AppId,
    number: u64,
    value: &[u8],
) -> Result<DeadLetter, Fault> {
    let disk: DeadLetterV1<'_> = read(key, value)?;
    Ok(DeadLetter {
        app,
        number,
        id: disk.id.to_owned(),
        body: Bytes::copy_from_slice(disk.body),
        events: disk.events,
        tries: disk.tries,
        since_ms: disk.since_ms,
        at_ms: disk.at_ms,
        why: disk.why.to_owned(),
    })
}

/// Writes an erasure; what and until when is in its key.
pub(super) fn put_erasure(key: &[u8], out: &mut Vec<u8>, erasure: &Erasure) {
    write(
        key,
        out,
        &ErasureV1 {
            app: erasure.app.0,
            at_ms: erasure.at_ms,
        },
    );
}

/// Reads an erasure. `until_ms` and `what` are those of its key.
pub(super) fn erasure(
    key: &[u8],
    until_ms: u64,
    what: Erased,
    value: &[u8],
) -> Result<Erasure, Fault> {
    let disk: ErasureV1 = read(key, value)?;
    Ok(Erasure {
        app: AppId(disk.app),
        what,
        at_ms: disk.at_ms,
        until_ms,
    })
}

/// Writes what a device is to take off the screen. Device and ping are those of its key.
pub(super) fn put_withdrawal(key: &[u8], out: &mut Vec<u8>, app: AppId, until_ms: u64) {
    let app = app.0;
    write(key, out, &WithdrawalV1 { app, until_ms });
}

/// Reads what a device is to take off the screen: whose app, and until when it is told.
pub(super) fn withdrawal(key: &[u8], value: &[u8]) -> Result<(AppId, u64), Fault> {
    let disk: WithdrawalV1 = read(key, value)?;
    Ok((AppId(disk.app), disk.until_ms))
}

/// Writes when a device became one of its app's.
pub(super) fn put_joined(key: &[u8], out: &mut Vec<u8>, stamp: Stamp) {
    write(key, out, &StampV1::from(stamp));
}

/// Reads when a device became one of its app's; nothing: before that was kept.
pub(super) fn joined(key: &[u8], value: &[u8]) -> Result<Stamp, Fault> {
    if value.is_empty() {
        return Ok(Stamp::FIRST);
    }
    let disk: StampV1 = read(key, value)?;
    Ok(disk.into())
}

/// Writes the topics of a device.
pub(super) fn put_topics(key: &[u8], out: &mut Vec<u8>, app: AppId, topics: &[Membership]) {
    let topics = topics
        .iter()
        .map(|membership| MembershipV1 {
            topic: &membership.topic,
            joined: membership.joined.into(),
        })
        .collect();
    write(key, out, &TopicsV1 { app: app.0, topics });
}

/// Reads the topics of a device, and whose they are.
pub(super) fn topics(key: &[u8], value: &[u8]) -> Result<(AppId, Vec<Membership>), Fault> {
    let disk: TopicsV1<'_> = read(key, value)?;
    let topics = disk
        .topics
        .into_iter()
        .map(|membership| Membership {
            topic: membership.topic.to_owned(),
            joined: membership.joined.into(),
        })
        .collect();
    Ok((AppId(disk.app), topics))
}

/// Writes when a device was in a topic.
pub(super) fn put_spans(key: &[u8], out: &mut Vec<u8>, spans: &[Span]) {
    let spans = spans
        .iter()
        .map(|span| SpanV1 {
            joined: span.joined.into(),
            left: span.left.map(StampV1::from),
        })
        .collect();
    write(key, out, &SpansV1 { spans });
}

/// Reads when a device was in a topic.
pub(super) fn spans(key: &[u8], value: &[u8]) -> Result<Spans, Fault> {
    let disk: SpansV1 = read(key, value)?;
    Ok(disk
        .spans
        .into_iter()
        .map(|span| Span {
            joined: span.joined.into(),
            left: span.left.map(Stamp::from),
        })
        .collect())
}

/// Writes what was accepted for an audience.
pub(super) fn put_expansion(key: &[u8], out: &mut Vec<u8>, expansion: &ExpansionRecord) {
    let notification = &expansion.notification;
    write(
        key,
        out,
        &ExpansionV1 {
            ping: notification.ping.0,
            accepted_ms: notification.accepted_ms,
            expires_ms: notification.expires_ms,
            urgency: notification.urgency.rank(),
            collapse: notification.collapse.as_ref().map(CollapseKey::as_str),
            size: notification.size,
            estimate: expansion.estimate,
            audience: match &expansion.audience {
                Audience::Topic(topic) => AudienceV1::Topic(topic),
                Audience::Everyone => AudienceV1::Everyone,
                &Audience::Listed { chunks, devices } => AudienceV1::Listed { chunks, devices },
            },
            content: &notification.content,
        },
    );
}

/// Reads what was accepted for an audience. `app` and `stamp` are those of its key.
pub(super) fn expansion(
    key: &[u8],
    app: AppId,
    stamp: Stamp,
    value: &[u8],
) -> Result<ExpansionRecord, Fault> {
    let disk: ExpansionV1<'_> = read(key, value)?;
    let collapse = match disk.collapse {
        None => None,
        Some(text) => Some(CollapseKey::new(text).ok_or(Fault::Rotten("no collapse key"))?),
    };
    Ok(ExpansionRecord {
        stamp,
        audience: match disk.audience {
            AudienceV1::Topic(topic) => Audience::Topic(topic.to_owned()),
            AudienceV1::Everyone => Audience::Everyone,
            AudienceV1::Listed { chunks, devices } => Audience::Listed { chunks, devices },
        },
        estimate: disk.estimate,
        notification: Arc::new(Notification {
            ping: PingId(disk.ping),
            app,
            accepted_ms: disk.accepted_ms,
            expires_ms: disk.expires_ms,
            urgency: urgency(disk.urgency)?,
            collapse,
            size: disk.size,
            transient: false,
            shared: true,
            content: Bytes::copy_from_slice(disk.content),
            wire: WireSlot::default(),
            hold: Hold::default(),
        }),
    })
}

/// Writes how far an expansion has come.
pub(super) fn put_progress(key: &[u8], out: &mut Vec<u8>, progress: &ExpansionProgress) {
    write(
        key,
        out,
        &ProgressV1 {
            done: progress.done.map(|device| device.0),
            devices: progress.devices,
            unknown: progress.unknown,
            chunk: progress.chunk,
        },
    );
}

/// Reads how far an expansion has come.
pub(super) fn progress(key: &[u8], value: &[u8]) -> Result<ExpansionProgress, Fault> {
    let disk: ProgressV1 = read(key, value)?;
    Ok(ExpansionProgress {
        done: disk.done.map(DeviceId),
        devices: disk.devices,
        unknown: disk.unknown,
        chunk: disk.chunk,
    })
}

/// Writes a chunk of a list.
pub(super) fn put_chunk(key: &[u8], out: &mut Vec<u8>, devices: &[DeviceId]) {
    let devices: Vec<u8> = devices.iter().flat_map(|device| device.0).collect();
    write(key, out, &ChunkV1 { devices: &devices });
}

/// Reads a chunk of a list.
pub(super) fn chunk(key: &[u8], value: &[u8]) -> Result<Vec<DeviceId>, Fault> {
    let disk: ChunkV1<'_> = read(key, value)?;
    let (devices, rest) = disk.devices.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(Fault::Rotten("a chunk ends within a device"));
    }
    Ok(devices.iter().copied().map(DeviceId).collect())
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
