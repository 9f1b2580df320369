//! `/v1/backup`: everything that is kept, as one stream.

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use futures_util::stream;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use tokio_util::sync::CancellationToken;

use super::Backend;
use super::auth::{Admin, Scoped};
use super::document::refusals;
use super::error::Problem;
use super::query::Query;
use super::serve::Cut;

/// The media type of a backup.
const BACKUP: HeaderValue = HeaderValue::from_static("application/vnd.bellwire.backup");

refusals! {
    BackupRefusals: Malformed, Unauthenticated, Forbidden, BackupUnderWay, Internal, StoreUnavailable, NoRoom, Draining;
}

/// Take a backup of the whole store while it serves.
///
/// The stream is a backup only if it comes to its end: `bellwire backup` checks it while it comes, and `bellwire backup verify`
/// any time later. It holds everything of every app that the store holds, secrets only as keyed hashes; the key of those hashes
/// is not in it. One is made at a time. A caller that does not go on taking it (`limits.backup_stall`) is cut.
#[utoipa::path(
    get,
    path = "/v1/backup",
    tag = "operations",
    operation_id = "backup",
    responses(
        (status = 200, description = "The backup, as docs/backup.md describes it.", body = Vec<u8>,
            content_type = "application/vnd.bellwire.backup"),
        BackupRefusals,
    ),
)]
pub(super) async fn take(
    who: Scoped<Admin>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let cut = request
        .extensions()
        .get::<Cut>()
        .map_or_else(CancellationToken::new, |cut| cut.0.clone());
    let backup = backend.handle.backup(&who, cut).await?;
    let bytes = stream::unfold(backup, |mut backup| async {
        Some((backup.next().await?, backup))
    });
    let mut response = Response::new(Body::from_stream(bytes));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, BACKUP);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}
