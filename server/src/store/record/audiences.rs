//! Records of topics, of who is in them, and of expansions.

use std::sync::Arc;

use bincode::{BorrowDecode, Encode};
use bytes::Bytes;

use super::mailbox::urgency;
use super::{Fault, read, write};
use crate::delivery::{AppId, CollapseKey, DeviceId, Hold, Notification, PingId, WireSlot};
use crate::ports::{Audience, ExpansionProgress, ExpansionRecord, Membership, Span, Spans, Stamp};

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

/// Writes when a device became one of its app's.
pub(in crate::store) fn put_joined(key: &[u8], out: &mut Vec<u8>, stamp: Stamp) {
    write(key, out, &StampV1::from(stamp));
}

/// Reads when a device became one of its app's; nothing: before that was kept.
pub(in crate::store) fn joined(key: &[u8], value: &[u8]) -> Result<Stamp, Fault> {
    if value.is_empty() {
        return Ok(Stamp::FIRST);
    }
    let disk: StampV1 = read(key, value)?;
    Ok(disk.into())
}

/// Writes the topics of a device.
pub(in crate::store) fn put_topics(
    key: &[u8],
    out: &mut Vec<u8>,
    app: AppId,
    topics: &[Membership],
) {
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
pub(in crate::store) fn topics(
    key: &[u8],
    value: &[u8],
) -> Result<(AppId, Vec<Membership>), Fault> {
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
pub(in crate::store) fn put_spans(key: &[u8], out: &mut Vec<u8>, spans: &[Span]) {
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
pub(in crate::store) fn spans(key: &[u8], value: &[u8]) -> Result<Spans, Fault> {
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
pub(in crate::store) fn put_expansion(key: &[u8], out: &mut Vec<u8>, expansion: &ExpansionRecord) {
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
pub(in crate::store) fn expansion(
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
pub(in crate::store) fn put_progress(key: &[u8], out: &mut Vec<u8>, progress: &ExpansionProgress) {
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
pub(in crate::store) fn progress(key: &[u8], value: &[u8]) -> Result<ExpansionProgress, Fault> {
    let disk: ProgressV1 = read(key, value)?;
    Ok(ExpansionProgress {
        done: disk.done.map(DeviceId),
        devices: disk.devices,
        unknown: disk.unknown,
        chunk: disk.chunk,
    })
}

/// Writes a chunk of a list.
pub(in crate::store) fn put_chunk(key: &[u8], out: &mut Vec<u8>, devices: &[DeviceId]) {
    let devices: Vec<u8> = devices.iter().flat_map(|device| device.0).collect();
    write(key, out, &ChunkV1 { devices: &devices });
}

/// Reads a chunk of a list.
pub(in crate::store) fn chunk(key: &[u8], value: &[u8]) -> Result<Vec<DeviceId>, Fault> {
    let disk: ChunkV1<'_> = read(key, value)?;
    let (devices, rest) = disk.devices.as_chunks::<16>();
    if !rest.is_empty() {
        return Err(Fault::Rotten("a chunk ends within a device"));
    }
    Ok(devices.iter().copied().map(DeviceId).collect())
}
