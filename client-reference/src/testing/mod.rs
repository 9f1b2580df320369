//! For the tests of apps: a server in the same process that speaks the real protocol over links in memory, and a clock that
//! stands still until the test moves it. No socket, no certificate, no waiting.
//!
//! The client in such a test is the real one, with its real files; only its links and its clock are replaced. So what the
//! test sees of repeats, order, expiry, back-off and restarts is what the field will see.
//!
//! ```
//! use std::time::Duration;
//! use bellwire_client::testing::{Outcome, Server, content};
//! use bellwire_client::Verdict;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! let server = Server::new();
//! let client = server
//!     .client()
//!     .state_dir(directory.path())
//!     .on_notification(|notification| match notification.content.title.as_deref() {
//!         Some("Invoice") => Verdict::Acknowledge,
//!         _ => Verdict::decline("not for this app"),
//!     })
//!     .start()
//!     .await?;
//!
//! let invoice = server.notify(content("Invoice", "Please approve"));
//! let lunch = server.notify(content("Lunch", "Pasta"));
//! assert_eq!(server.outcome(invoice).await, Outcome::Acknowledged);
//! assert_eq!(server.outcome(lunch).await, Outcome::Declined("not for this app".to_owned()));
//!
//! // The connection breaks; time passes over the back-off, and the client is there again.
//! server.break_link();
//! server.sessions_in_time(2).await;
//!
//! // What it missed while the machine slept comes when it wakes up.
//! let late = server.notify(content("Invoice", "Reminder"));
//! server.clock().sleep_machine(Duration::from_secs(600));
//! assert_eq!(server.outcome(late).await, Outcome::Acknowledged);
//! client.shutdown().await;
//! # Ok(())
//! # }
//! ```

mod clock;
mod server;

use std::path::Path;

use crate::builder::Builder;
use crate::state::{Inspection, StateError, inspect_at};

pub use clock::{Clock, START_MS};
pub use server::{DEVICE, Outcome, PATIENCE, Reach, Server, content};

/// [`inspect`](crate::inspect) by this clock: what was learned of networks loses its weight with age, and by the machine's clock
/// a test of [`START_MS`] is years old.
///
/// # Errors
/// As [`inspect`](crate::inspect).
pub fn inspect(directory: &Path, clock: &Clock) -> Result<Inspection, StateError> {
    inspect_at(directory, clock.wall_ms())
}

/// A client over real links that goes by this clock: for tests with a server of their own. The time limits of sockets run by
/// the real one.
pub fn by_clock(builder: Builder, clock: &Clock) -> Builder {
    builder.by_clock(clock.clone())
}
