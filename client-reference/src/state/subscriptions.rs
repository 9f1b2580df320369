//! What is known of the device's topics, and what was asked for and not answered yet.
//!
//! Written when the app asks and when the server answers. Lost, it costs wishes that were not answered; what is known is told
//! by the next answer.

use std::io;
use std::path::{Path, PathBuf};

use bellwire_protocol::limits::{TOPIC_BYTES_MAX, TOPICS_MAX};
use serde::{Deserialize, Serialize};

use super::files;
use crate::topics::{Subscriptions, WISHES_MAX};

/// The format that is written.
const FORMAT: u32 = 1;

/// Name in the state directory.
const NAME: &str = "topics.json";

/// Greatest file that is read, in bytes: every name as long as it may be and written in escapes.
const FILE_MAX_BYTES: u64 = ((TOPICS_MAX + WISHES_MAX) * (TOPIC_BYTES_MAX * 6 + 3) + 1024) as u64;

#[derive(Serialize, Deserialize)]
struct File {
    format: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    topics: Option<Vec<String>>,
    #[serde(default)]
    joining: Vec<String>,
    #[serde(default)]
    leaving: Vec<String>,
}

impl File {
    fn is_sound(&self) -> bool {
        let lists = [
            self.topics.as_deref().unwrap_or_default(),
            &self.joining,
            &self.leaving,
        ];
        self.format == FORMAT
            && lists
                .into_iter()
                .flatten()
                .all(|name| (1..=TOPIC_BYTES_MAX).contains(&name.len()))
    }
}

/// What a file said.
enum Read {
    Nothing,
    Known(Subscriptions),
    Unreadable,
}

fn read(path: &Path) -> Read {
    let text = match std::fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Read::Nothing,
        Ok(metadata) if metadata.len() <= FILE_MAX_BYTES => std::fs::read(path),
        Ok(_) | Err(_) => return Read::Unreadable,
    };
    let file = text
        .ok()
        .and_then(|text| serde_json::from_slice::<File>(&text).ok())
        .filter(File::is_sound);
    match file {
        None => Read::Unreadable,
        Some(file) => Read::Known(Subscriptions {
            topics: file.topics,
            joining: file.joining,
            leaving: file.leaving,
        }),
    }
}

/// The file, as long as this client has the directory.
#[derive(Debug)]
pub(crate) struct SubscriptionsFile {
    path: PathBuf,
    sync: bool,
}

impl SubscriptionsFile {
    /// Reads what an earlier process knew. The caller holds the directory's lock. What cannot be read is kept under another
    /// name, loudly; `wall_ms` names it.
    pub(crate) fn open(directory: &Path, sync: bool, wall_ms: u64) -> (Self, Subscriptions) {
        let path = directory.join(NAME);
        let known = match read(&path) {
            Read::Known(known) => known,
            Read::Nothing => Subscriptions::default(),
            Read::Unreadable => {
                let aside = files::set_aside(&path, "unreadable", wall_ms);
                tracing::warn!(
                    path = %path.display(), ?aside,
                    "cannot read what was asked for of topics; the app has to ask again"
                );
                Subscriptions::default()
            }
        };
        (Self { path, sync }, known)
    }

    /// Replaces the file.
    ///
    /// # Errors
    /// Those of the file system.
    pub(crate) fn save(&self, known: &Subscriptions) -> io::Result<()> {
        let file = File {
            format: FORMAT,
            topics: known.topics.clone(),
            joining: known.joining.clone(),
            leaving: known.leaving.clone(),
        };
        let text = serde_json::to_vec(&file).map_err(io::Error::other)?;
        files::replace(&self.path, &text, self.sync).map(drop)
    }

    /// What a directory holds, from outside; `None`: nothing, or nothing that can be read.
    pub(super) fn look(directory: &Path) -> Option<Subscriptions> {
        match read(&directory.join(NAME)) {
            Read::Known(known) => Some(known),
            Read::Nothing | Read::Unreadable => None,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn known() -> Subscriptions {
        Subscriptions {
            topics: Some(vec!["news".to_owned(), "\u{1}\"".to_owned()]),
            joining: vec!["staff".to_owned()],
            leaving: vec!["old".to_owned()],
        }
    }

    #[test]
    fn what_was_asked_for_is_read_back() {
        let directory = tempfile::tempdir().unwrap();
        let (file, nothing) = SubscriptionsFile::open(directory.path(), true, 7);
        assert_eq!(nothing, Subscriptions::default());
        assert_eq!(SubscriptionsFile::look(directory.path()), None);
        file.save(&known()).unwrap();
        assert_eq!(
            SubscriptionsFile::open(directory.path(), true, 7).1,
            known()
        );
        assert_eq!(SubscriptionsFile::look(directory.path()), Some(known()));
    }

    #[test]
    fn the_largest_file_that_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let (file, _) = SubscriptionsFile::open(directory.path(), false, 7);
        let many = |count: usize| -> Vec<String> {
            let worst = |n: usize| format!("{}{n:03}", "\u{1}".repeat(TOPIC_BYTES_MAX - 3));
            (0..count).map(worst).collect()
        };
        let most = Subscriptions {
            topics: Some(many(TOPICS_MAX)),
            joining: many(WISHES_MAX),
            leaving: Vec::new(),
        };
        file.save(&most).unwrap();
        assert_eq!(SubscriptionsFile::look(directory.path()), Some(most));
    }

    #[test]
    fn a_file_cut_anywhere_and_one_of_a_later_format_are_kept_aside() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let (file, _) = SubscriptionsFile::open(directory.path(), false, 7);
        file.save(&known()).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let later = br#"{"format":2,"topics":[]}"#.to_vec();
        let long = format!(
            r#"{{"format":1,"joining":["{}"]}}"#,
            "x".repeat(TOPIC_BYTES_MAX + 1)
        );
        let cuts = (0..whole.len()).map(|cut| whole[..cut].to_vec());
        for (now_ms, bad) in cuts.chain([later, long.into_bytes()]).enumerate() {
            std::fs::write(&path, &bad).unwrap();
            let now_ms = now_ms as u64;
            let (_, nothing) = SubscriptionsFile::open(directory.path(), false, now_ms);
            assert_eq!(nothing, Subscriptions::default());
            let aside = path.with_extension(format!("unreadable-{now_ms}"));
            assert_eq!(std::fs::read(aside).unwrap(), bad);
            assert!(!path.exists());
        }
    }
}
