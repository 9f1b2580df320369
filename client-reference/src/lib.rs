//! The reference client of Bellwire: what a device author embeds, or copies into another language.
//!
//! It keeps one session with the server over QUIC or WebSocket, hands notifications to the app in order, and never hands over
//! the same one twice. docs/write-a-client.md tells the same story frame by frame; docs/protocol.md is the reference.
//!
//! ```no_run
//! use bellwire_client::{Client, Event, Trust, Verdict};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::builder()
//!     .server("push.example.org:4433")
//!     .device("mfrggzdfmztwq2lknnwg23tpoa".parse()?, "the secret that was shown once")
//!     .trust(Trust::File("/etc/bellwire/ca.pem".into()))
//!     .state_dir("/var/lib/my-app/bellwire")
//!     .on_notification(|notification| {
//!         println!("{:?}", notification.content.title);
//!         Verdict::Acknowledge
//!     })
//!     .on_event(|event| {
//!         if let Event::Disconnected { why, retry_in } = event {
//!             eprintln!("{why}. {} Next try: {retry_in:?}", why.advice());
//!         }
//!     })
//!     .start()
//!     .await?;
//!
//! // ... the app lives ...
//! client.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # What is promised
//!
//! - **In order, one at a time.** The callback is never called twice at once.
//! - **Once.** The order is: callback, then id and verdict on disk, then the acknowledgement. The server repeats whatever it
//!   has no verdict for, and the client answers repeats from its window of the last [`WINDOW_IDS`] ids. One gap remains and
//!   cannot be closed from here: a process killed after the callback and before the disk has it hands that notification (and
//!   the others of its batch) over once more. An app that must not show anything twice remembers [`Notification::id`] in the
//!   same transaction as its own data.
//! - **Never late.** What is past its expiry, by the server's clock, is declined and not handed over.
//! - **Bounded.** At most two windows of notifications are in memory, and a megabyte or two on disk.
//! - **Polite.** It comes back with full jitter, when the server says so, or not at all when it must not.
//!
//! # A tour of the source
//!
//! 1. `builder`: the settings. `client`: the handle. `keeper`: the loop that keeps a session up.
//! 2. `carrier` and `race`: QUIC and WebSocket, and which of them wins.
//!    `carrier::proxy` is the way through an HTTP proxy.
//! 3. `session`: joins a link with the session machine of `bellwire-protocol`, which makes all decisions.
//! 4. `handover`: the app's callback, and the order of promise.
//! 5. `state`: the window of ids and what else is on disk.
//! 6. `topics` and `membership`: what the app asked for, until the server has answered.
//! 7. `reconnect`: when to come back. `clock`: the only reader of time and chance.
//! 8. `surroundings` and `network`: where the machine is, and that it slept. `keepalive`: how long it may be silent there.
//! 9. [`diagnose`]: the same steps one by one, told to a person. [`testing`]: a server and a clock for the tests of apps.

mod builder;
mod carrier;
mod client;
mod clock;
pub mod diagnose;
mod end;
mod endpoint;
mod handover;
mod keepalive;
mod keeper;
mod membership;
mod network;
mod notification;
mod race;
mod reconnect;
mod session;
mod state;
mod surroundings;
pub mod testing;
mod tls;
mod topics;

pub mod parts {
    //! The pure parts of the client, for the simulator: the window of ids without its file, and when to come back.

    pub use crate::reconnect::Backoff;
    pub use crate::state::{Given, Memory, Record};
}

pub mod raw {
    //! Links without a session: for tests that misbehave on purpose, for load generators, and for those who drive the session
    //! machine of `bellwire-protocol` by themselves.
    //!
    //! ```no_run
    //! use bellwire_client::raw::Dialer;
    //! use bellwire_client::{Carrier, Trust};
    //! # async fn run(hello: bellwire_protocol::DeviceFrame) -> Result<(), Box<dyn std::error::Error>> {
    //! let dialer = Dialer::new("localhost:4433".parse()?, &Trust::File("dev-ca.pem".into()))?;
    //! let mut link = dialer.dial(Carrier::Quic).await?;
    //! link.send(&hello).await?;
    //! link.send(&hello).await?; // a second hello: an error, then the end
    //! println!("{:?}", link.receive().await);
    //! # Ok(())
    //! # }
    //! ```

    pub use crate::carrier::{DIAL_TIMEOUT, Dialer, Link, LinkEnd, Received};
}

pub use bellwire_protocol::{
    Carrier, Code, Codec, Content, GoawayReason, Id, PresenceState, Secret, Urgency,
};
pub use builder::{BuildError, Builder, Carriers};
pub use carrier::{ConnectError, EnvironmentProxyError, ParseProxyError, Proxy, ProxyFault};
pub use client::{Client, Gone, TopicsError};
pub use end::Disconnect;
pub use endpoint::{DEFAULT_PORT, Endpoint, ParseEndpointError};
pub use notification::{Event, Notification, Verdict};
pub use race::HEAD_START;
pub use state::{
    Inspection, KnownNetwork, LastSession, StateError, WINDOW_IDS, WindowInspection, WindowState,
    inspect,
};
pub use tls::{SYSTEM_CA_FILES, Trust, TrustError};
pub use topics::Subscriptions;
