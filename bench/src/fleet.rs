//! Many devices at once, as the API sees them.

use std::net::SocketAddr;
use std::sync::Arc;

use bellwire_protocol::Carrier;
use tokio::task::JoinSet;

use crate::api::{self, Connection, Registered};
use crate::failure::{During, Failure, Outcome};
use crate::progress::Progress;

/// API connections that register devices.
const REGISTERING: usize = 32;

/// Devices that belong to one user.
const DEVICES_OF_A_USER: usize = 10;

/// Registers `count` devices.
pub(crate) async fn register(
    api: SocketAddr,
    key: &str,
    count: usize,
    progress: Progress,
) -> Outcome<Vec<Registered>> {
    let bar = progress.phase("register devices", count);
    let mut workers = JoinSet::new();
    for worker in 0..REGISTERING.min(count) {
        let (key, bar) = (key.to_owned(), bar.clone());
        workers.spawn(async move {
            let mut connection = Connection::open(api).await?;
            let mut devices = Vec::new();
            for number in (worker..count).step_by(REGISTERING) {
                let user = format!("user-{}", number / DEVICES_OF_A_USER);
                devices.push(api::register(&mut connection, api, &key, &user).await?);
                bar.step();
            }
            Ok::<_, Failure>(devices)
        });
    }
    let mut devices = Vec::with_capacity(count);
    while let Some(done) = workers.join_next().await {
        devices.extend(done.during("register devices")??);
    }
    bar.done();
    Ok(devices)
}

/// Puts all of them into a topic.
pub(crate) async fn subscribe(
    api: SocketAddr,
    key: &str,
    devices: &Arc<[Registered]>,
    topic: &str,
    progress: Progress,
) -> Outcome<()> {
    let bar = progress.phase("subscribe devices", devices.len());
    let mut workers = JoinSet::new();
    for worker in 0..REGISTERING.min(devices.len()) {
        let (key, bar, devices) = (key.to_owned(), bar.clone(), Arc::clone(devices));
        let topics = format!(r#"{{"topics":["{topic}"]}}"#);
        workers.spawn(async move {
            let mut connection = Connection::open(api).await?;
            for device in devices.iter().skip(worker).step_by(REGISTERING) {
                let path = format!("/v1/devices/{}/topics", device.device);
                let request = api::request("PUT", "application/json", &path, api, &key, &topics);
                let answer = connection.exchange(&request.0).await?;
                if answer.status != 200 {
                    return Err(Failure::new(format!(
                        "putting a device into a topic was answered by {}: {}",
                        answer.status,
                        String::from_utf8_lossy(connection.body(answer))
                    )));
                }
                bar.step();
            }
            Ok::<_, Failure>(())
        });
    }
    while let Some(done) = workers.join_next().await {
        done.during("subscribe devices")??;
    }
    bar.done();
    Ok(())
}

/// Which carriers the devices of a workload take.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Carriers {
    /// Every other device.
    Both,
    /// QUIC.
    Quic,
    /// WebSocket over TLS.
    Websocket,
    /// WebSocket without TLS, as behind a load balancer that ends it.
    Plain,
}

impl Carriers {
    /// The carrier of the n-th device.
    pub(crate) fn of(self, number: usize) -> Carrier {
        match self {
            Carriers::Quic => Carrier::Quic,
            Carriers::Websocket | Carriers::Plain => Carrier::WebSocket,
            Carriers::Both if number.is_multiple_of(2) => Carrier::Quic,
            Carriers::Both => Carrier::WebSocket,
        }
    }

    /// Each by itself: what is told of one carrier at a time.
    pub(crate) fn each(self) -> &'static [Carriers] {
        match self {
            Carriers::Both => &[Carriers::Websocket, Carriers::Quic],
            Carriers::Websocket => &[Carriers::Websocket],
            Carriers::Plain => &[Carriers::Plain],
            Carriers::Quic => &[Carriers::Quic],
        }
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Carriers::Both => "both",
            Carriers::Websocket => "websocket",
            Carriers::Plain => "plain",
            Carriers::Quic => "quic",
        }
    }
}
