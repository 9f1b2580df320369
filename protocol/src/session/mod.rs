//! Both sides of a session, without sockets and clocks: what arrives and what time it is go in, what to do comes out.
//!
//! Times are milliseconds of one monotonic clock; where it starts is the caller's choice. Calling a `handle_deadline` early,
//! or twice, changes nothing.

mod client;
mod server;

#[cfg(test)]
mod together;

pub use client::{
    ClientAction, ClientSession, EXPIRED, Reconnect, ReconnectWhen, SessionEnd, WITHDRAWN,
    backoff_ceiling_ms,
};
pub use server::{ServerAction, ServerSession};
