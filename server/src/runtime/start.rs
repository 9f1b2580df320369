//! Start and end of everything that runs.

use std::sync::Arc;

use super::handle::Handle;
use super::hashing::HashKey;
use super::settings::RuntimeSettings;
use crate::ports::{Clock, Entropy, ReadError, Store};

/// Why the runtime does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The apps or keys could not be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// App `default` could not be made.
    #[error("the store did not take the app `default`: {0}")]
    Commit(&'static str),
    /// A reading thread could not be started.
    #[error("a reading thread could not be started: {0}")]
    Thread(#[from] std::io::Error),
}

/// Everything that runs.
pub struct Runtime {
    /// The door to it.
    pub handle: Handle,
}

impl Runtime {
    /// Starts shards, reading threads and the sweep on the current tokio runtime.
    #[expect(clippy::unused_async, unused_variables, reason = "filled in next")]
    pub async fn start(
        settings: RuntimeSettings,
        store: Arc<dyn Store>,
        clock: Arc<dyn Clock>,
        entropy: Arc<dyn Entropy>,
        hash_key: HashKey,
    ) -> Result<Runtime, StartError> {
        Ok(Runtime {
            handle: Handle {
                _inner: Arc::new(()),
            },
        })
    }
}
