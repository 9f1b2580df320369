//! The real binary, started and ended by a test, in a directory that goes with it.

mod api;
mod load;
mod phone;
mod proxy;
mod server;

pub use api::{Answer, Api};
pub use load::{Load, Promise, Publisher};
pub use phone::{Ledger, Phone, Way};
pub use proxy::Proxy;
pub use server::{Listen, Server, Site, binary};

use std::time::{Duration, Instant};

/// How long a condition may take before a test gives up. Generous: a busy machine must not fail a test, and a
/// condition that comes true is seen at once.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until `condition` yields something; panics with `what` after [`PATIENCE`].
///
/// # Panics
///
/// When the condition does not come true in time.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let give_up = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < give_up, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Installs the one cryptographic provider of the house; harmless when called again.
pub fn install_provider() {
    let _already = rustls::crypto::aws_lc_rs::default_provider().install_default();
}
