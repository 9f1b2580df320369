//! The floor under a device that is connected and silent: what the bare libraries keep for it, and what its handshake cost.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::server::{Floor, FloorCarrier};
use crate::failure::Outcome;
use crate::fleet::Carriers;
use crate::generator::devices::{Fleet, Place};
use crate::process;

/// Connections that come and leave before anything is measured, so that what a process makes once is there.
const WARM_UP: usize = 64;

/// Time for those to be gone.
const GONE: Duration = Duration::from_secs(1);

/// What one connection costs the server.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    /// Growth of memory, bytes.
    pub(crate) own: f64,
    /// Growth of the kernel's memory, bytes, half of it, because both ends are on this machine.
    pub(crate) kernel: Option<f64>,
    /// Processor time from the first packet to the end of the quiet time, microseconds.
    pub(crate) cpu_micros: f64,
    pub(crate) per_second: f64,
    /// Connections that stood at the end.
    pub(crate) connected: usize,
}

/// Connects `count` times, `at_once` at a time, by full handshakes, and weighs the server after `settle`.
pub(crate) async fn measure(
    carrier: FloorCarrier,
    count: usize,
    at_once: usize,
    settle: Duration,
) -> Outcome<Found> {
    let floor = Floor::start(carrier).await?;
    let place = Place {
        address: floor.address,
        authority: &floor.authority,
        bellwire: false,
    };
    let carriers = match carrier {
        FloorCarrier::Quic => Carriers::Quic,
        FloorCarrier::Websocket => Carriers::Websocket,
        FloorCarrier::Plain => Carriers::Plain,
    };
    let mut fleet = Fleet::strangers(&place, carriers, count.min(WARM_UP), false).await?;
    fleet.attach(at_once, false).await?;
    fleet.stop().await;
    let mut fleet = Fleet::strangers(&place, carriers, count, false).await?;
    sleep(GONE).await;
    let pid = floor.pid()?;
    let before = process::memory(pid)?;
    let kernel = process::kernel_memory();
    let cpu = process::cpu_time(pid)?;
    let started = Instant::now();
    fleet.attach(at_once, false).await?;
    let took = started.elapsed();
    sleep(settle).await;
    let cpu = process::cpu_time(pid)?.saturating_sub(cpu);
    let after = process::memory(pid)?;
    let kernel = kernel.zip(process::kernel_memory());
    let each = |before: u64, after: u64| (after as f64 - before as f64) / count as f64;
    let found = Found {
        own: each(before.own, after.own),
        kernel: kernel.map(|(before, after)| each(before.sum(), after.sum()) / 2.0),
        cpu_micros: cpu.as_secs_f64() * 1e6 / count as f64,
        per_second: count as f64 / took.as_secs_f64(),
        connected: usize::try_from(fleet.counts().await?.attached).unwrap_or_default(),
    };
    fleet.stop().await;
    floor.stop().await;
    Ok(found)
}
