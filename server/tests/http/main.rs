//! The HTTP side over real sockets, on the real runtime, with a store that a test can make fail.

#![allow(clippy::unwrap_used)]

mod batch;
mod callbacks;
mod devices;
mod events;
mod fair;
mod native;
mod openapi;
mod outcomes;
mod rhoconnect;
mod serving;
mod stock;
mod support;
mod topics;

#[path = "../runtime/store.rs"]
#[expect(dead_code, reason = "the tests of the runtime use more of it")]
mod store;
