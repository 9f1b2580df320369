//! Floors as other workloads ask for them, to stand beside their figures, measured a moment before in the same run.

use super::{Ground, Over, commit, write};
use crate::failure::{During, Failure, Outcome};
use crate::fleet::Carriers;

/// Measured time of each, seconds.
const SECONDS: u32 = 3;

/// Connections that messages are written to at most: more change nothing.
const CONNECTIONS_MAX: usize = 1_000;

/// What a frame and a record hold besides content, bytes, about.
const FRAME_BYTES: usize = 64;
const RECORD_BYTES: usize = 76;

fn over(carrier: Carriers) -> Over {
    match carrier {
        Carriers::Quic => Over::Quic,
        Carriers::Plain => Over::Tcp,
        Carriers::Both | Carriers::Websocket => Over::Websocket,
    }
}

/// Messages that are written for a second of CPU, so many at a time to one of the connections.
pub(crate) async fn written(
    carrier: Carriers,
    connections: usize,
    content: u32,
    together: usize,
) -> Outcome<f64> {
    let connections = connections.min(CONNECTIONS_MAX);
    let manner = write::Manner::Write(together);
    rate(carrier, manner, connections, content).await
}

/// Messages that are written for a second of CPU, one to each connection, when each is answered before the next.
pub(crate) async fn answered(carrier: Carriers, connections: usize, content: u32) -> Outcome<f64> {
    rate(carrier, write::Manner::Answered, connections, content).await
}

async fn rate(
    carrier: Carriers,
    manner: write::Manner,
    connections: usize,
    content: u32,
) -> Outcome<f64> {
    let job = write::Job {
        over: over(carrier),
        manner,
        connections,
        bytes: content as usize + FRAME_BYTES,
        seconds: SECONDS,
    };
    match write::measure(&job).await? {
        write::Found::Rates { per_cpu_second, .. } => Ok(per_cpu_second),
        write::Found::Trips { .. } => Err(Failure::new("a floor measured something else")),
    }
}

/// Median milliseconds of one quiet message to another process over TLS, one way.
pub(crate) async fn one_way_ms(content: u32) -> Outcome<f64> {
    let job = write::Job {
        over: Over::Tls,
        manner: write::Manner::Echo,
        connections: 1,
        bytes: content as usize + FRAME_BYTES,
        seconds: SECONDS,
    };
    match write::measure(&job).await? {
        write::Found::Trips { p50, .. } => Ok(p50 / 2.0),
        write::Found::Rates { .. } => Err(Failure::new("a floor measured something else")),
    }
}

/// Records a second, and the median milliseconds of a group, when so many become safe together.
pub(crate) async fn committed(ground: Ground, group: usize, content: u32) -> Outcome<(f64, f64)> {
    let dir = tempfile::tempdir().during("make a directory for records")?;
    let found = commit::measure(&commit::Job {
        ground,
        group,
        bytes: content as usize + RECORD_BYTES,
        seconds: SECONDS,
        dir: dir.path().to_owned(),
    })
    .await?;
    match found.fault() {
        Some(fault) => Err(fault),
        None => Ok((found.records as f64 / found.seconds, found.p50_ms)),
    }
}
