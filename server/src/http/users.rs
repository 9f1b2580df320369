//! `/v1/users`: look, erase. A user is a name that owns devices, and is registered nowhere else.

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use bellwire_protocol::Code;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::auth::{Devices, Read, Scoped};
use super::devices::Device;
use super::document::refusals;
use super::error::Problem;
use super::query::{PathId, Query};
use super::{Backend, answer, text};

/// A user: whoever owns devices.
#[derive(Serialize, ToSchema)]
pub(super) struct User {
    /// Its name.
    user: String,
    /// How many of the listed devices are connected now.
    attached: u32,
    /// How many notifications wait on disk for the listed devices.
    waiting: u64,
    /// Its devices, by id.
    devices: Vec<Device>,
    /// Pass this as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next: Option<String>,
}

refusals! {
    LookRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining;
    EraseRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
}

/// The user that a path names.
fn named(id: &str) -> Result<String, Problem> {
    text::name(id).ok_or_else(|| {
        Problem::new(
            Code::Malformed,
            "The user in the path must be a text of 1 to 255 bytes without control characters, percent-encoded.",
        )
    })
}

/// Look at a user: its devices, whether they are connected, what waits for them.
///
/// A name that owns no device has an empty list, as a ping to it would reach nobody.
#[utoipa::path(
    get,
    path = "/v1/users/{id}",
    tag = "users",
    operation_id = "get_user",
    params(
        ("id" = String, Path, description = "The user, percent-encoded."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most devices to list. Default 100."),
    ),
    responses(
        (status = 200, description = "The user.", body = User,
            example = json!({"user": "ana", "attached": 1, "waiting": 2, "devices": [
                {"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ana", "name": "Ward 3 tablet", "created_ms": 1795240000000u64,
                    "attached": {"carrier": "quic", "since_ms": 1795249000000u64},
                    "last_seen": {"at_ms": 1795250000000u64, "carrier": "quic", "agent": "bellwire-client/0.1"}, "waiting": 2}]})),
        LookRefusals,
    ),
)]
pub(super) async fn look(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let query = Query::read(request.uri().query(), &["after", "limit"])?;
    let after = query.parsed("after", "the `next` of the page before", |text| {
        text.parse().ok()
    })?;
    let user = named(&id)?;
    let view = backend
        .handle
        .user(who.app(), &user, after, query.limit()?)
        .await?;
    let attached = view
        .devices
        .iter()
        .filter(|device| device.attached.is_some())
        .count();
    let waiting = view
        .devices
        .iter()
        .map(|device| u64::from(device.waiting.unwrap_or(0)))
        .sum();
    Ok(answer(
        StatusCode::OK,
        &User {
            user,
            // A page has at most 1,000.
            attached: u32::try_from(attached).unwrap_or(u32::MAX),
            waiting,
            devices: view.devices.into_iter().map(Device::from).collect(),
            next: view.next.map(|next| next.to_string()),
        },
    ))
}

/// Erase everything held of a user.
///
/// Each of its devices is revoked: sessions are cut, what waits ends as `revoked`, records and index entries go. 204 says that all of
/// it is safe; a user that nobody knows is erased already. A user with very many devices takes longer than one call waits: then the answer
/// is 503 `store_busy`, and it goes on. If it fails or the server crashes half way, doing it again finishes: repeat it until there is 204.
#[utoipa::path(
    delete,
    path = "/v1/users/{id}",
    tag = "users",
    operation_id = "erase_user",
    params(("id" = String, Path, description = "The user, percent-encoded.")),
    responses((status = 204, description = "Nothing is held of this user any more."), EraseRefusals),
)]
pub(super) async fn erase(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    backend.handle.erase_user(who.app(), &named(&id)?).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}
