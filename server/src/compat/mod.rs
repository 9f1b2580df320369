//! Front doors: HTTP interfaces borrowed from other systems, one folder each. A door translates to a ping and back, and
//! decides nothing.

pub mod rhoconnect;

use utoipa_axum::router::OpenApiRouter;

use crate::runtime::Handle;

/// All doors, ready to be served beside the native API.
#[must_use]
pub fn doors(handle: Handle) -> OpenApiRouter {
    rhoconnect::routes().with_state(handle)
}

/// Their part of the OpenAPI document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    rhoconnect::routes().into_openapi()
}
