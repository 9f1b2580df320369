//! Which carrier won on which network: advice for the next race, nothing more.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellwire_protocol::Carrier;
use serde::{Deserialize, Serialize};

use super::files;

/// Networks that are remembered; the one unused for the longest time makes room.
const NETWORKS_MAX: usize = 32;

/// Greatest file that is read, in bytes.
const FILE_MAX_BYTES: u64 = 64 * 1024;

/// How long a winner goes first, in milliseconds: a network that blocked UDP yesterday may let it through today.
const REMEMBERED_FOR_MS: u64 = 24 * 3_600 * 1_000;

/// The winners by network name.
#[derive(Debug)]
pub(crate) struct Networks {
    path: PathBuf,
    known: BTreeMap<String, Winner>,
}

#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Winner {
    carrier: Name,
    at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    Quic,
    WebSocket,
}

impl Networks {
    /// Reads what is known. A file that cannot be read counts as empty: the next winner replaces it.
    pub(crate) fn open(directory: &Path) -> Self {
        let path = directory.join("networks.json");
        let short = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() <= FILE_MAX_BYTES);
        let text = if short {
            std::fs::read(&path).ok()
        } else {
            None
        };
        let known = text
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        Self { path, known }
    }

    /// Who won here lately. `now_ms` is wall time.
    pub(crate) fn winner(&self, network: &str, now_ms: u64) -> Option<Carrier> {
        let winner = self.known.get(network)?;
        // A clock that was set back must not keep a winner for ever, so the future counts as old.
        if now_ms.checked_sub(winner.at_ms)? > REMEMBERED_FOR_MS {
            return None;
        }
        Some(match winner.carrier {
            Name::Quic => Carrier::Quic,
            Name::WebSocket => Carrier::WebSocket,
        })
    }

    /// Remembers who won here. A file that cannot be written costs the advice, so it is only logged.
    pub(crate) fn remember(&mut self, network: &str, carrier: Carrier, now_ms: u64) {
        let carrier = match carrier {
            Carrier::Quic => Name::Quic,
            Carrier::WebSocket => Name::WebSocket,
        };
        self.known.insert(
            network.to_owned(),
            Winner {
                carrier,
                at_ms: now_ms,
            },
        );
        while self.known.len() > NETWORKS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, winner)| winner.at_ms);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else {
                break;
            };
            self.known.remove(&oldest);
        }
        self.save();
    }

    /// Forgets who won here, because it failed.
    pub(crate) fn forget(&mut self, network: &str) {
        if self.known.remove(network).is_some() {
            self.save();
        }
    }

    fn save(&self) {
        let written = serde_json::to_vec(&self.known)
            .map_err(std::io::Error::other)
            .and_then(|text| files::replace(&self.path, &text, false));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember which carrier won");
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_winner_is_remembered_for_a_day_and_per_network() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path());
        networks.remember("office", Carrier::WebSocket, 1_000);
        networks.remember("home", Carrier::Quic, 2_000);
        let networks = Networks::open(directory.path());
        assert_eq!(networks.winner("office", 1_000), Some(Carrier::WebSocket));
        assert_eq!(networks.winner("home", 2_000), Some(Carrier::Quic));
        assert_eq!(networks.winner("cafe", 2_000), None);
        assert_eq!(networks.winner("office", 1_001 + REMEMBERED_FOR_MS), None);
        assert_eq!(
            networks.winner("office", 999),
            None,
            "a clock that was set back"
        );
    }

    #[test]
    fn a_failed_winner_is_forgotten_and_a_broken_file_counts_as_empty() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path());
        networks.remember("office", Carrier::WebSocket, 1_000);
        networks.forget("office");
        assert_eq!(
            Networks::open(directory.path()).winner("office", 1_000),
            None
        );
        std::fs::write(directory.path().join("networks.json"), b"{\"office\":").unwrap();
        assert_eq!(
            Networks::open(directory.path()).winner("office", 1_000),
            None
        );
    }

    #[test]
    fn the_network_unused_for_the_longest_time_makes_room() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path());
        for at in 0..=NETWORKS_MAX as u64 {
            networks.remember(&format!("network {at}"), Carrier::Quic, at);
        }
        assert_eq!(networks.winner("network 0", 100), None);
        assert_eq!(networks.winner("network 1", 100), Some(Carrier::Quic));
        assert_eq!(networks.known.len(), NETWORKS_MAX);
    }
}
