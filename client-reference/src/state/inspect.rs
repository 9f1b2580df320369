//! A look at a state directory from outside: nothing is made, taken, or changed, whether a client runs there or not.

use std::path::{Path, PathBuf};

use bellwire_protocol::Carrier;
use serde::Serialize;

use super::networks::Network;
use super::subscriptions::SubscriptionsFile;
use super::window::Look;
use super::{LastSession, Lock, Networks, StateError};
use crate::topics::Subscriptions;

/// What stands in a state directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Inspection {
    /// The directory.
    pub directory: PathBuf,
    /// A client runs with it just now.
    pub in_use: bool,
    /// What was answered.
    pub window: WindowInspection,
    /// Files of a window that was damaged, kept for whoever wants to look at them.
    pub set_aside: Vec<PathBuf>,
    /// What is known of networks, the last one used first; `None`: the file cannot be read, and the next client begins anew.
    pub networks: Option<Vec<KnownNetwork>>,
    /// What is known of the device's topics; `None`: it never asked, or the file cannot be read.
    pub subscriptions: Option<Subscriptions>,
    /// The last session, unless there was none.
    pub last_session: Option<LastSession>,
}

/// The window of ids, from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WindowInspection {
    /// In which state the file is.
    pub state: WindowState,
    /// Ids that are remembered with their verdicts.
    pub remembered: usize,
    /// Verdicts that perhaps never reached the server; the next `hello` says them.
    pub unconfirmed: usize,
    /// Length of the file in bytes.
    pub bytes: u64,
}

/// In which state the window's file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum WindowState {
    /// There is none: no client ran here yet.
    Absent,
    /// In order.
    Intact,
    /// A crash cut the end, or a client is writing just now. The next start drops what was cut; it was never acknowledged.
    Torn,
    /// Broken in the middle: the next start keeps it under another name and saves what can be read.
    Damaged,
    /// Of a newer version.
    Newer,
}

/// What is known of one network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct KnownNetwork {
    /// Its name, see [`Builder::network`](crate::Builder::network).
    pub name: String,
    /// When it was last used, in Unix milliseconds.
    pub used_ms: u64,
    /// The carrier that won last: `quic` or `websocket`.
    pub carrier: Option<&'static str>,
    /// The proxy that it went through.
    pub proxy: Option<String>,
    /// The longest silence that this network was seen to bear on QUIC, in seconds.
    pub quic_bears_s: Option<u32>,
    /// The same on WebSocket.
    pub websocket_bears_s: Option<u32>,
}

/// Looks at a state directory.
///
/// # Errors
/// When the directory or the window in it cannot be read.
pub fn inspect(directory: &Path) -> Result<Inspection, StateError> {
    inspect_at(directory, crate::clock::wall_ms())
}

/// The same at another time: what was learned loses its weight with age.
pub(crate) fn inspect_at(directory: &Path, wall_ms: u64) -> Result<Inspection, StateError> {
    let entries =
        std::fs::read_dir(directory).map_err(StateError::io("read the directory", directory))?;
    let mut set_aside: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(|name| name.starts_with("window.corrupt-"))
        })
        .collect();
    set_aside.sort();
    let Look {
        state,
        memory,
        bytes,
    } = Look::at(directory)?;
    let networks = Networks::look(directory).map(|known| {
        let mut networks: Vec<_> = known
            .into_iter()
            .map(|(name, network)| known_network(name, &network, wall_ms))
            .collect();
        networks.sort_by_key(|network| std::cmp::Reverse(network.used_ms));
        networks
    });
    Ok(Inspection {
        directory: directory.to_owned(),
        in_use: Lock::is_taken(directory),
        window: WindowInspection {
            state,
            remembered: memory.len(),
            unconfirmed: memory.seen().len(),
            bytes,
        },
        set_aside,
        networks,
        subscriptions: SubscriptionsFile::look(directory),
        last_session: LastSession::look(directory),
    })
}

fn known_network(name: String, network: &Network, wall_ms: u64) -> KnownNetwork {
    let bears = |carrier| network.evidence(carrier).reach_s(wall_ms);
    KnownNetwork {
        name,
        used_ms: network.used_ms,
        carrier: network
            .winner
            .as_ref()
            .map(|winner| winner.carrier().name()),
        proxy: network
            .winner
            .as_ref()
            .and_then(|winner| winner.proxy.clone()),
        quic_bears_s: bears(Carrier::Quic),
        websocket_bears_s: bears(Carrier::WebSocket),
    }
}
