//! Many devices at once: registered over the API, connected a bounded number at a time.

use std::net::SocketAddr;
use std::sync::Arc;

use bellwire_protocol::{Carrier, KeepAlive};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::api::{self, Connection, Registered};
use crate::device::{Dialer, Link};
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

/// A device with its connection.
pub(crate) type Attached = (Link, Option<KeepAlive>);

/// Connects all `devices`, the n-th by `carriers`, at most `at_once` in the middle of it. They come back in any order.
pub(crate) async fn attach(
    dialer: &Dialer,
    devices: &Arc<[Registered]>,
    carriers: Carriers,
    at_once: usize,
    progress: Progress,
) -> Outcome<Vec<Attached>> {
    let bar = progress.phase("connect devices", devices.len());
    let links = connect_all(devices.len(), at_once, |number| {
        let (dialer, devices, bar) = (dialer.clone(), Arc::clone(devices), bar.clone());
        async move {
            let carrier = carriers.of(number);
            let (link, keep_alive) = dialer.attach(carrier, &devices[number]).await?;
            bar.step();
            Ok((link, Some(keep_alive)))
        }
    });
    let links = links.await?;
    bar.done();
    Ok(links)
}

/// Runs `count` connections, at most `at_once` at a time, each in a task of its own.
pub(crate) async fn connect_all<F>(
    count: usize,
    at_once: usize,
    connect: impl Fn(usize) -> F,
) -> Outcome<Vec<Attached>>
where
    F: Future<Output = Outcome<Attached>> + Send + 'static,
{
    let places = Arc::new(Semaphore::new(at_once.max(1)));
    let mut tasks = JoinSet::new();
    let mut links = Vec::with_capacity(count);
    for number in 0..count {
        let place = Arc::clone(&places)
            .acquire_owned()
            .await
            .during("wait for a place")?;
        let connecting = connect(number);
        tasks.spawn(async move {
            let link = connecting.await;
            drop(place);
            link
        });
        while let Some(done) = tasks.try_join_next() {
            links.push(done.during("connect")??);
        }
    }
    while let Some(done) = tasks.join_next().await {
        links.push(done.during("connect")??);
    }
    Ok(links)
}

/// Which carriers the devices of a workload take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Carriers {
    /// Every other device.
    Both,
    /// QUIC.
    Quic,
    /// WebSocket over TLS.
    Websocket,
}

impl Carriers {
    /// The carrier of the n-th device.
    pub(crate) fn of(self, number: usize) -> Carrier {
        match self {
            Carriers::Quic => Carrier::Quic,
            Carriers::Websocket => Carrier::WebSocket,
            Carriers::Both if number.is_multiple_of(2) => Carrier::Quic,
            Carriers::Both => Carrier::WebSocket,
        }
    }
}
