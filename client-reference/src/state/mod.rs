//! What a client keeps on disk: one small directory for one device.
//!
//! | file | what | lost or broken |
//! | --- | --- | --- |
//! | `lock` | held while a client runs, so that two cannot share a directory | made again |
//! | `window` | the last ids with their verdicts ([`window`]) | a notification may reach the app twice |
//! | `networks.json` | which way won on which network, and how long it bears silence ([`networks`]) | one connection takes a moment longer, and the silences are learned anew |
//! | `topics.json` | what the server said of topics, and what was asked for and not answered ([`subscriptions`]) | wishes that were not answered |
//! | `session.json` | the last session, for people ([`last`]) | nothing |
//!
//! The directory has mode 0700, the files 0600. Content of notifications is never written.

mod files;
mod inspect;
mod last;
mod lock;
mod networks;
mod subscriptions;
mod window;

pub(crate) use files::make_directory;
pub(crate) use inspect::inspect_at;
pub use inspect::{Inspection, KnownNetwork, WindowInspection, WindowState, inspect};
pub use last::LastSession;
pub(crate) use lock::Lock;
pub(crate) use networks::{Networks, Winner};
pub(crate) use subscriptions::SubscriptionsFile;
pub use window::{Given, Memory, Record, WINDOW_IDS};
pub(crate) use window::{Journal, Opened};

use std::path::PathBuf;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// Another client runs in this directory.
    #[error(
        "{} is in use by another client: one directory belongs to one running client. Stop the other one, or give each device a directory of its own",
        path.display()
    )]
    InUse {
        /// The directory.
        path: PathBuf,
    },
    /// The window was written by a newer version of this client.
    #[error(
        "{} has format {found}, this version reads up to {known}: use the newer client, or move the file away and accept that a notification may come twice",
        path.display()
    )]
    NewerFormat {
        /// The file.
        path: PathBuf,
        /// The format that it says it has.
        found: u8,
        /// The newest format that this version reads.
        known: u8,
    },
    /// The file system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// With which file or directory.
        path: PathBuf,
        /// The answer of the operating system.
        source: std::io::Error,
    },
}

impl StateError {
    fn io(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { what, path, source }
    }
}
