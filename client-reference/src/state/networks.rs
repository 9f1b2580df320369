//! What is known of each network: which way to the server won, and how long it bears silence. Advice, nothing more.
//!
//! The file is JSON with a format number. It is replaced whole, without waiting for the disk: a power cut may bring the one
//! before back. What cannot be read is set aside as `networks.unreadable-*` and counts as empty.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bellwire_protocol::{Carrier, KeepAlive as Bounds};
use serde::{Deserialize, Serialize};

use super::files;
use crate::carrier::Route;
use crate::keepalive::{Evidence, Silence};

/// Networks that are remembered; the one unused for the longest time makes room.
pub(crate) const NETWORKS_MAX: usize = 32;

/// Greatest file that is read, in bytes. All networks with all that can be known of them are less.
const FILE_MAX_BYTES: u64 = 1024 * 1024;

/// How long a winner goes first, in milliseconds: a network that blocked UDP yesterday may let it through today.
const REMEMBERED_FOR_MS: u64 = 24 * 3_600 * 1_000;

/// What was learned is written down at most this often while a session stands, in milliseconds.
const SAVE_EVERY_MS: u64 = 30 * 60 * 1_000;

/// The format that is written. Format 1 was a plain map of winners, without a number.
const FORMAT: u32 = 2;

/// What is known, by network name.
#[derive(Debug)]
pub(crate) struct Networks {
    path: PathBuf,
    known: BTreeMap<String, Network>,
    /// Something was learned that is not on disk.
    unsaved: bool,
    saved_at_ms: u64,
}

/// What is known of one network.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Network {
    /// When it was last used, in wall time.
    pub(crate) used_ms: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) winner: Option<Winner>,
    #[serde(default)]
    quic: Evidence,
    #[serde(default)]
    websocket: Evidence,
}

/// Who won the last race.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Winner {
    carrier: Name,
    /// The proxy that it went through: host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) proxy: Option<String>,
    pub(crate) at_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Name {
    Quic,
    WebSocket,
}

impl Winner {
    pub(crate) fn carrier(&self) -> Carrier {
        match self.carrier {
            Name::Quic => Carrier::Quic,
            Name::WebSocket => Carrier::WebSocket,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct File<K> {
    format: u32,
    networks: K,
}

/// What a file said.
enum Read {
    Nothing,
    Known(BTreeMap<String, Network>),
    Unreadable,
}

fn read(path: &Path) -> Read {
    #[derive(Deserialize)]
    struct First {
        carrier: Name,
        at_ms: u64,
    }
    let text = match std::fs::metadata(path) {
        Ok(metadata) if metadata.len() == 0 => return Read::Nothing,
        Ok(metadata) if metadata.len() > FILE_MAX_BYTES => return Read::Unreadable,
        Ok(_) => std::fs::read(path),
        Err(error) => Err(error),
    };
    let text = match text {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Read::Nothing,
        Err(_) => return Read::Unreadable,
    };
    if let Ok(file) = serde_json::from_slice::<File<BTreeMap<String, Network>>>(&text) {
        let sound = file
            .networks
            .values()
            .all(|network| network.quic.is_sound() && network.websocket.is_sound());
        return match file.format == FORMAT && sound {
            true => Read::Known(file.networks),
            false => Read::Unreadable,
        };
    }
    match serde_json::from_slice::<BTreeMap<String, First>>(&text) {
        Ok(first) => Read::Known(
            first
                .into_iter()
                .map(|(name, First { carrier, at_ms })| {
                    let winner = Some(Winner {
                        carrier,
                        proxy: None,
                        at_ms,
                    });
                    let network = Network {
                        used_ms: at_ms,
                        winner,
                        ..Network::default()
                    };
                    (name, network)
                })
                .collect(),
        ),
        Err(_) => Read::Unreadable,
    }
}

impl Networks {
    /// Reads what is known. The caller holds the directory's lock. `wall_ms` names a file that must be set aside.
    pub(crate) fn open(directory: &Path, wall_ms: u64) -> Self {
        let path = directory.join("networks.json");
        let known = match read(&path) {
            Read::Known(known) => known,
            Read::Nothing => BTreeMap::new(),
            Read::Unreadable => {
                let aside = files::set_aside(&path, "unreadable", wall_ms);
                tracing::warn!(
                    path = %path.display(), ?aside,
                    "cannot read what is known of networks; starting without"
                );
                BTreeMap::new()
            }
        };
        let mut networks = Self {
            path,
            known,
            unsaved: false,
            saved_at_ms: 0,
        };
        networks.make_room();
        networks
    }

    /// Reads what is known and changes nothing; `None`: it cannot be read.
    pub(crate) fn look(directory: &Path) -> Option<BTreeMap<String, Network>> {
        match read(&directory.join("networks.json")) {
            Read::Known(known) => Some(known),
            Read::Nothing => Some(BTreeMap::new()),
            Read::Unreadable => None,
        }
    }

    /// Who won here lately. `wall_ms` is wall time.
    pub(crate) fn winner(&self, network: &str, wall_ms: u64) -> Option<&Winner> {
        let winner = self.known.get(network)?.winner.as_ref()?;
        // A clock that was set back must not keep a winner for ever, so the future counts as old.
        (wall_ms.checked_sub(winner.at_ms)? <= REMEMBERED_FOR_MS).then_some(winner)
    }

    /// Remembers who won here, and through which proxy. A file that cannot be written costs the advice, so it is only logged.
    pub(crate) fn remember(
        &mut self,
        network: &str,
        route: Route,
        proxy: Option<String>,
        wall_ms: u64,
    ) {
        let carrier = match route.carrier {
            Carrier::Quic => Name::Quic,
            Carrier::WebSocket => Name::WebSocket,
        };
        let proxy = proxy.filter(|_| route.by_proxy);
        let same = self
            .winner(network, wall_ms)
            .is_some_and(|winner| winner.carrier == carrier && winner.proxy == proxy);
        let entry = self.entry(network, wall_ms);
        // A winner is set down again only once it is forgotten: a disk is not written for every reconnect.
        if !same {
            entry.winner = Some(Winner {
                carrier,
                proxy,
                at_ms: wall_ms,
            });
            self.save(wall_ms);
        }
    }

    /// Forgets who won here, because it failed.
    pub(crate) fn forget(&mut self, network: &str, wall_ms: u64) {
        if let Some(known) = self.known.get_mut(network)
            && known.winner.take().is_some()
        {
            self.save(wall_ms);
        }
    }

    /// A silence ended here.
    pub(crate) fn note(
        &mut self,
        network: &str,
        carrier: Carrier,
        silent_ms: u64,
        end: Silence,
        wall_ms: u64,
    ) {
        let entry = self.entry(network, wall_ms);
        entry.evidence_mut(carrier).note(silent_ms, end, wall_ms);
        self.unsaved = true;
        if wall_ms.abs_diff(self.saved_at_ms) >= SAVE_EVERY_MS {
            self.save(wall_ms);
        }
    }

    /// How long to be silent here, in milliseconds; see [`Evidence::draw`].
    pub(crate) fn draw(
        &self,
        network: &str,
        carrier: Carrier,
        bounds: Bounds,
        usual_s: u32,
        wall_ms: u64,
        up_to: impl FnOnce(u64) -> u64,
    ) -> u64 {
        match self.known.get(network) {
            Some(known) => known
                .evidence(carrier)
                .draw(bounds, usual_s, wall_ms, up_to),
            None => Evidence::default().draw(bounds, usual_s, wall_ms, up_to),
        }
    }

    /// Writes down what was learned since.
    pub(crate) fn save_what_is_new(&mut self, wall_ms: u64) {
        if self.unsaved {
            self.save(wall_ms);
        }
    }

    fn entry(&mut self, network: &str, wall_ms: u64) -> &mut Network {
        if !self.known.contains_key(network) {
            let fresh = Network {
                used_ms: wall_ms,
                ..Network::default()
            };
            self.known.insert(network.to_owned(), fresh);
            self.make_room();
        }
        let entry = self.known.entry(network.to_owned()).or_default();
        entry.used_ms = wall_ms;
        entry
    }

    fn make_room(&mut self) {
        while self.known.len() > NETWORKS_MAX {
            let oldest = self.known.iter().min_by_key(|(_, known)| known.used_ms);
            let Some(oldest) = oldest.map(|(name, _)| name.clone()) else {
                break;
            };
            self.known.remove(&oldest);
        }
    }

    fn save(&mut self, wall_ms: u64) {
        self.unsaved = false;
        self.saved_at_ms = wall_ms;
        let file = File {
            format: FORMAT,
            networks: &self.known,
        };
        let written = serde_json::to_vec(&file)
            .map_err(std::io::Error::other)
            .and_then(|text| files::replace(&self.path, &text, false));
        if let Err(error) = written {
            tracing::warn!(path = %self.path.display(), %error, "cannot remember what is known of networks");
        }
    }
}

impl Network {
    pub(crate) fn evidence(&self, carrier: Carrier) -> &Evidence {
        match carrier {
            Carrier::Quic => &self.quic,
            Carrier::WebSocket => &self.websocket,
        }
    }

    fn evidence_mut(&mut self, carrier: Carrier) -> &mut Evidence {
        match carrier {
            Carrier::Quic => &mut self.quic,
            Carrier::WebSocket => &mut self.websocket,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const QUIC: Route = Route {
        carrier: Carrier::Quic,
        by_proxy: false,
    };
    const WEBSOCKET: Route = Route {
        carrier: Carrier::WebSocket,
        by_proxy: false,
    };
    const BY_PROXY: Route = Route {
        carrier: Carrier::WebSocket,
        by_proxy: true,
    };

    fn carrier(networks: &Networks, name: &str, wall_ms: u64) -> Option<Carrier> {
        networks.winner(name, wall_ms).map(Winner::carrier)
    }

    #[test]
    fn a_winner_is_remembered_for_a_day_and_per_network() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path(), 7);
        networks.remember("office", BY_PROXY, Some("proxy:3128".to_owned()), 1_000);
        networks.remember("hotel", WEBSOCKET, Some("proxy:3128".to_owned()), 1_000);
        networks.remember("home", QUIC, None, 2_000);
        let networks = Networks::open(directory.path(), 7);
        let office = networks.winner("office", 1_000).unwrap();
        assert_eq!(
            (office.carrier(), office.proxy.as_deref()),
            (Carrier::WebSocket, Some("proxy:3128"))
        );
        assert_eq!(networks.winner("hotel", 1_000).unwrap().proxy, None);
        assert_eq!(carrier(&networks, "home", 2_000), Some(Carrier::Quic));
        assert_eq!(networks.winner("cafe", 2_000), None);
        assert_eq!(networks.winner("office", 1_001 + REMEMBERED_FOR_MS), None);
        assert_eq!(
            networks.winner("office", 999),
            None,
            "a clock that was set back"
        );
    }

    #[test]
    fn a_failed_winner_is_forgotten_and_what_was_learned_stays() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path(), 7);
        networks.remember("office", WEBSOCKET, None, 1_000);
        for _ in 0..3 {
            networks.note(
                "office",
                Carrier::WebSocket,
                400_000,
                Silence::Survived,
                1_000,
            );
        }
        networks.forget("office", 1_000);
        let networks = Networks::open(directory.path(), 7);
        assert_eq!(networks.winner("office", 1_000), None);
        let known = &networks.known["office"];
        assert!(known.evidence(Carrier::WebSocket).reach_s(1_000) > Some(350));
        assert_eq!(known.evidence(Carrier::Quic).reach_s(1_000), None);
    }

    #[test]
    fn the_first_format_is_read_and_what_cannot_be_read_is_set_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("networks.json");
        std::fs::write(
            &path,
            r#"{"office":{"carrier":"websocket","at_ms":1000},"":{"carrier":"quic","at_ms":2000}}"#,
        )
        .unwrap();
        let networks = Networks::open(directory.path(), 7);
        assert_eq!(
            carrier(&networks, "office", 1_000),
            Some(Carrier::WebSocket)
        );
        assert_eq!(carrier(&networks, "", 2_000), Some(Carrier::Quic));

        for (now_ms, broken) in (0..).zip([
            &b"{\"office\":"[..],
            b"\xff",
            br#"{"format":9,"networks":{}}"#,
            br#"{"format":2,"networks":{"a":{"used_ms":1,"quic":{"at_ms":1,"bands":{"9":{"survived":-1.0,"lost":0}}}}}}"#,
        ]) {
            std::fs::write(&path, broken).unwrap();
            let networks = Networks::open(directory.path(), now_ms);
            assert!(networks.known.is_empty());
            let aside = path.with_extension(format!("unreadable-{now_ms}"));
            let aside = std::fs::read(aside).unwrap();
            assert_eq!(aside, broken);
            assert!(!path.exists());
        }
    }

    #[test]
    fn a_file_cut_at_any_byte_is_no_trouble() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path(), 7);
        networks.note("home", Carrier::Quic, 40_000, Silence::Survived, 9_000_000);
        networks.remember("home", QUIC, None, 9_000_000);
        let path = directory.path().join("networks.json");
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut networks = Networks::open(directory.path(), 7);
            assert!(networks.known.is_empty());
            networks.remember("home", QUIC, None, 1);
            assert!(
                Networks::open(directory.path(), 7)
                    .winner("home", 1)
                    .is_some()
            );
        }
    }

    #[test]
    fn the_network_unused_for_the_longest_time_makes_room_and_the_file_stays_small() {
        let directory = tempfile::tempdir().unwrap();
        let mut networks = Networks::open(directory.path(), 7);
        for at in 0..=NETWORKS_MAX as u64 {
            let name = format!("{at:0>128}");
            networks.remember(&name, QUIC, None, at);
            for silent_s in (15..90_000).step_by(60) {
                for carrier in [Carrier::Quic, Carrier::WebSocket] {
                    networks.note(&name, carrier, silent_s * 1_000, Silence::Lost, at);
                }
            }
        }
        networks.save(100);
        assert_eq!(networks.winner(&format!("{:0>128}", 0), 100), None);
        assert!(networks.winner(&format!("{:0>128}", 1), 100).is_some());
        assert_eq!(networks.known.len(), NETWORKS_MAX);
        let bytes = std::fs::metadata(directory.path().join("networks.json"))
            .unwrap()
            .len();
        assert!(bytes < FILE_MAX_BYTES / 2, "{bytes}");
        assert_eq!(
            Networks::open(directory.path(), 7).known.len(),
            NETWORKS_MAX
        );
    }
}
