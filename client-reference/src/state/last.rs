//! The last session, for `bellwire-device status` and the like: written when a session begins and when it ends. Nothing of
//! the client depends on it.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::files;

/// Greatest file that is read, in bytes.
const FILE_MAX_BYTES: u64 = 16 * 1024;

/// The format that is written.
const FORMAT: u32 = 1;

/// Name in the state directory.
const NAME: &str = "session.json";

/// The last session of a client, as far as it knew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct LastSession {
    /// The server: host and port, or a `wss://` URL.
    pub server: String,
    /// `quic` or `websocket`.
    pub carrier: String,
    /// `cbor` or `json`.
    pub codec: String,
    /// The proxy that it went through: host and port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy: Option<String>,
    /// Name of the network.
    pub network: String,
    /// Number of the session, to find it in the server's log.
    pub session: u64,
    /// When it began, in Unix milliseconds of this machine's clock.
    pub began_ms: u64,
    /// When it ended; absent while it stands, or when the process was killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_ms: Option<u64>,
    /// Why it ended, one line for a person.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct File<S> {
    format: u32,
    #[serde(flatten)]
    session: S,
}

impl LastSession {
    /// Replaces the file. A failure costs what a person would read, so it is only logged.
    pub(crate) fn save(&self, directory: &Path) {
        let file = File {
            format: FORMAT,
            session: self,
        };
        let written = serde_json::to_vec(&file)
            .map_err(std::io::Error::other)
            .and_then(|text| files::replace(&directory.join(NAME), &text, false));
        if let Err(error) = written {
            tracing::debug!(%error, "cannot write down the last session");
        }
    }

    /// The last session, unless there was none or the file cannot be read.
    pub(crate) fn look(directory: &Path) -> Option<Self> {
        let path = directory.join(NAME);
        let short = std::fs::metadata(&path).is_ok_and(|file| file.len() <= FILE_MAX_BYTES);
        let text = short.then(|| std::fs::read(&path).ok()).flatten()?;
        let file: File<Self> = serde_json::from_slice(&text).ok()?;
        (file.format == FORMAT).then_some(file.session)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_session_is_read_back_and_a_torn_file_counts_as_none() {
        let directory = tempfile::tempdir().unwrap();
        let last = LastSession {
            server: "push.example.org:4433".to_owned(),
            carrier: "quic".to_owned(),
            codec: "cbor".to_owned(),
            proxy: None,
            network: "home".to_owned(),
            session: 7,
            began_ms: 1,
            ended_ms: Some(2),
            why: Some("left in good order".to_owned()),
        };
        assert_eq!(LastSession::look(directory.path()), None);
        last.save(directory.path());
        assert_eq!(LastSession::look(directory.path()), Some(last));
        let path = directory.path().join(NAME);
        let whole = std::fs::read(&path).unwrap();
        for cut in 0..whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert_eq!(LastSession::look(directory.path()), None);
        }
    }
}
