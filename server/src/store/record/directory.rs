//! Records of who there is: devices, when they were seen, apps, keys, idempotency keys, erasures.

use std::sync::Arc;

use bincode::{BorrowDecode, Encode};

use super::{Fault, decode, open, read, write};
use crate::delivery::{AppId, DeviceId, PingId};
use crate::ports::{
    AppRecord, Carrier, DeviceRecord, Erased, Erasure, IdempotencyRecord, KeyRecord,
    PreviousSecret, Scopes, Seen,
};

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

/// Writes a device record.
pub(in crate::store) fn put_device(key: &[u8], out: &mut Vec<u8>, device: &DeviceRecord) {
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
pub(in crate::store) fn device(
    key: &[u8],
    id: DeviceId,
    value: &[u8],
) -> Result<DeviceRecord, Fault> {
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
pub(in crate::store) fn put_seen(key: &[u8], out: &mut Vec<u8>, seen: &Seen) {
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
pub(in crate::store) fn seen(key: &[u8], value: &[u8]) -> Result<Seen, Fault> {
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
pub(in crate::store) fn put_app(key: &[u8], out: &mut Vec<u8>, app: &AppRecord) {
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
pub(in crate::store) fn app(key: &[u8], value: &[u8]) -> Result<AppRecord, Fault> {
    let disk: AppV1<'_> = read(key, value)?;
    Ok(AppRecord {
        id: AppId(disk.id),
        name: disk.name.to_owned(),
        secret: disk.secret,
        created_ms: disk.created_ms,
    })
}

/// Writes an API key.
pub(in crate::store) fn put_api_key(key: &[u8], out: &mut Vec<u8>, record: &KeyRecord) {
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
pub(in crate::store) fn api_key(key: &[u8], value: &[u8]) -> Result<KeyRecord, Fault> {
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
pub(in crate::store) fn put_idempotency(key: &[u8], out: &mut Vec<u8>, record: &IdempotencyRecord) {
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
pub(in crate::store) fn idempotency(
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

/// Writes an erasure; what and until when is in its key.
pub(in crate::store) fn put_erasure(key: &[u8], out: &mut Vec<u8>, erasure: &Erasure) {
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
pub(in crate::store) fn erasure(
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
