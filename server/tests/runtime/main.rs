//! The runtime from its door: publish, attach, acknowledge, revoke, drain, over the real core and a store in memory that
//! can be held, filled and broken.

#![allow(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

mod audiences;
mod changes;
mod crowds;
mod devices;
mod drain;
mod fair;
mod house;
mod idempotency;
mod outcomes;
mod pings;
mod real_store;
mod stock;
mod store;
mod withdraw;
