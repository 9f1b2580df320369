//! The HTTP side of the house: what backends and operators call.
//!
//! - [`routers`] puts together two [`Site`]s: the API (with the front doors of `compat` beside it) and operations.
//! - [`serve()`] carries one of them on a listener: plain or TLS, bounded, with a graceful end.
//! - [`document()`] is the OpenAPI document of all of it, generated from the handlers.
//!
//! A request goes through `site` (its id, panics, metrics), axum's router, `auth` (a [`auth::Scoped`] value is the
//! proof), then one of `pings`, `outcomes`, `events`, `callbacks`, `devices`, `keys`, `operations`, which read it with `body`, `json` and `query` and hand
//! it to the runtime's [`Handle`]. Whatever goes wrong is an [`error::Problem`]; nothing here decides about deliveries.

mod again;
mod allowance;
mod auth;
mod backup;
mod batch;
mod body;
mod callbacks;
mod devices;
mod docs_page;
mod document;
mod error;
mod events;
pub mod fuzz;
mod json;
mod keys;
mod loaded;
mod operations;
mod outcomes;
mod ping_body;
mod pings;
mod query;
mod serve;
mod site;
mod text;
mod topics;
mod traceparent;
mod users;

use std::sync::Arc;

use axum::response::Response;
use http::HeaderValue;
use http::StatusCode;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use serde::Serialize;
use utoipa_axum::router::OpenApiRouter;

pub use document::document;
pub use loaded::LoadedSettings;
pub use serve::{ALPN, Listening, Places, ServeReport, TlsSource, serve};
pub use site::Site;

use crate::runtime::Handle;

/// What the handlers need.
#[derive(Clone)]
struct Backend {
    handle: Handle,
    metrics: Arc<dyn Fn() -> String + Send + Sync>,
    loaded: Arc<LoadedSettings>,
    connections: ConnectionsNow,
    /// The OpenAPI document as it is served.
    document: bytes::Bytes,
    /// The same as a page for people.
    page: bytes::Bytes,
}

/// What [`routers`] is made of.
pub struct ApiState {
    /// The door to everything that runs.
    pub handle: Handle,
    /// Renders the metrics in the Prometheus text format.
    pub metrics: Arc<dyn Fn() -> String + Send + Sync>,
    /// What is known of the settings in force.
    pub loaded: Arc<LoadedSettings>,
    /// Tells what connections there are.
    pub connections: ConnectionsNow,
    /// The front doors of other systems, served beside the native API under their own paths.
    pub doors: OpenApiRouter,
}

/// Tells what connections there are at this moment.
pub type ConnectionsNow = Arc<dyn Fn() -> Connections + Send + Sync>;

/// Connections, as far as the sites themselves cannot know.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Connections {
    /// Of devices, that have not said hello yet.
    pub unauthenticated: u32,
    /// Of these, those of the address that has most.
    pub busiest_address: u32,
    /// Of the API.
    pub api: usize,
    /// As many as the API serves at once.
    pub api_max: usize,
}

/// The two sites of a server.
pub struct Sites {
    /// For backends: `/v1/…` and the front doors. Needs a listener that only they reach, TLS, or a trusted proxy.
    pub api: Site,
    /// For operators and their tools: status, health, metrics.
    pub operations: Site,
}

/// Puts the sites together.
#[must_use]
pub fn routers(state: ApiState) -> Sites {
    let (doors, doors_document) = state.doors.split_for_parts();
    let document = document(doors_document);
    let backend = Backend {
        handle: state.handle.clone(),
        metrics: state.metrics,
        loaded: state.loaded,
        connections: state.connections,
        // Made of constants, which a test serialises.
        page: docs_page::render(&serde_json::to_value(&document).unwrap_or_default()).into(),
        document: bytes::Bytes::from(document::render(&document)),
    };
    let api = document::api_routes()
        .with_state::<()>(backend.clone())
        .split_for_parts()
        .0
        .merge(doors);
    let operations = document::operations_routes()
        .with_state::<()>(backend)
        .split_for_parts()
        .0;
    Sites {
        api: Site::new(api, state.handle.clone(), &document),
        operations: Site::new(operations, state.handle, &document),
    }
}

/// A JSON answer.
fn answer(status: StatusCode, body: &impl Serialize) -> Response {
    // Our own types of texts, numbers and lists: serialising them cannot fail.
    let body = serde_json::to_vec(body).unwrap_or_default();
    let mut response = Response::new(axum::body::Body::from(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A JSON answer with a secret in it, which nobody on the way may keep.
fn secret_answer(status: StatusCode, body: &impl Serialize) -> Response {
    let mut response = answer(status, body);
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}
