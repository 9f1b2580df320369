//! `/v1/keys`: API keys and what they may do.

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use bellwire_protocol::Code;
use http::StatusCode;
use serde::Serialize;
use serde::de::MapAccess;
use utoipa::ToSchema;

use super::auth::{Keys, Scoped};
use super::document::refusals;
use super::error::{Place, Problem};
use super::json::{self, Members, Trail};
use super::query::{PathId, Query};
use super::{Backend, answer, body, secret_answer, text};
use crate::runtime::{KeyView, Scopes};

/// An API key to make.
#[derive(Default, ToSchema)]
#[schema(as = NewKey)]
pub(super) struct NewKey {
    /// A name for people: 1 to 255 bytes without control characters.
    #[schema(required = true, nullable = false, min_length = 1, max_length = 255)]
    name: Option<String>,
    /// What it may do: `ping`, `read`, `devices`, `keys`, `admin`. Only scopes that the calling key has itself.
    #[schema(required = true, nullable = false, value_type = Vec<String>, min_items = 1, max_items = 5)]
    scopes: Option<Vec<Scopes>>,
}

const NAME: &str = "a text of 1 to 255 bytes without control characters";
const SCOPES: &str = "an array with at least one of `ping`, `read`, `devices`, `keys`, `admin`";

impl Members for NewKey {
    const NAMES: &'static [&'static str] = &["name", "scopes"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "name" => self.name = trail.text(map, NAME, text::name)?,
            _ => {
                self.scopes = trail.texts(
                    map,
                    (SCOPES, "one of `ping`, `read`, `devices`, `keys`, `admin`"),
                    Scopes::NAMES.len(),
                    |text| {
                        Scopes::NAMES
                            .iter()
                            .find(|(_, name)| *name == text)
                            .map(|(scope, _)| *scope)
                    },
                )?;
            }
        }
        Ok(())
    }
}

/// An API key just made.
#[derive(Serialize, ToSchema)]
pub(super) struct MadeKey {
    /// The key itself. Shown this once and kept nowhere.
    key: String,
    #[serde(flatten)]
    #[schema(inline)]
    about: Key,
}

/// An API key, without its secret.
#[derive(Serialize, ToSchema)]
pub(super) struct Key {
    /// Its public part.
    id: String,
    /// A name for people.
    name: String,
    /// What it may do.
    scopes: Vec<&'static str>,
    /// When it was made, Unix milliseconds.
    created_ms: u64,
}

impl From<KeyView> for Key {
    fn from(view: KeyView) -> Key {
        Key {
            id: view.id,
            name: view.name,
            scopes: Scopes::NAMES
                .iter()
                .filter(|(scope, _)| view.scopes.contains(*scope))
                .map(|(_, name)| *name)
                .collect(),
            created_ms: view.created_ms,
        }
    }
}

/// The API keys of an app.
#[derive(Serialize, ToSchema)]
pub(super) struct KeyList {
    /// The keys.
    keys: Vec<Key>,
}

refusals! {
    CreateRefusals: Malformed, Unauthenticated, Forbidden, BodyTimeout, BodyTooLarge, UnsupportedMediaType,
        Unprocessable, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    ListRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining;
    OneRefusals: Malformed, Unauthenticated, Forbidden, NotFound, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
}

/// Make an API key.
///
/// It belongs to the app of the calling key and can do no more than that one. The key is in this answer and nowhere else.
#[utoipa::path(
    post,
    path = "/v1/keys",
    tag = "keys",
    operation_id = "create_key",
    request_body(content = NewKey, content_type = "application/json",
        example = json!({"name": "order system", "scopes": ["ping", "read"]})),
    responses(
        (status = 201, description = "Made.", body = MadeKey,
            example = json!({"key": "(shown once)", "id": "mfzwizjanfxgk4tf", "name": "order system",
                "scopes": ["ping", "read"], "created_ms": 1795240000000u64})),
        CreateRefusals,
    ),
)]
pub(super) async fn create(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let new: NewKey = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    let name = new.name.ok_or_else(|| json::missing("/name", NAME))?;
    let scopes = new
        .scopes
        .filter(|scopes| !scopes.is_empty())
        .ok_or_else(|| json::missing("/scopes", SCOPES))?
        .into_iter()
        .fold(Scopes::NONE, Scopes::with);
    if !who.may(scopes) {
        return Err(Problem::new(
            Code::Forbidden,
            "A key can only pass on scopes that it has itself.",
        )
        .at(Place::Body("/scopes".to_owned())));
    }
    let made = backend.handle.create_key(who.app(), &name, scopes).await?;
    Ok(secret_answer(
        StatusCode::CREATED,
        &MadeKey {
            key: made.secret,
            about: Key::from(made.made),
        },
    ))
}

/// List the API keys of the calling key's app.
#[utoipa::path(
    get,
    path = "/v1/keys",
    tag = "keys",
    operation_id = "list_keys",
    responses(
        (status = 200, description = "All keys.", body = KeyList,
            example = json!({"keys": [{"id": "mfzwizjanfxgk4tf", "name": "order system", "scopes": ["ping", "read"],
                "created_ms": 1795240000000u64}]})),
        ListRefusals,
    ),
)]
pub(super) async fn list(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let keys = backend.handle.keys(who.app()).await?;
    Ok(answer(
        StatusCode::OK,
        &KeyList {
            keys: keys.into_iter().map(Key::from).collect(),
        },
    ))
}

/// Revoke an API key.
///
/// It holds for requests that come after the answer. A key may revoke itself.
#[utoipa::path(
    delete,
    path = "/v1/keys/{id}",
    tag = "keys",
    operation_id = "revoke_key",
    params(("id" = String, Path, description = "The public part of the key.")),
    responses((status = 204, description = "Revoked."), OneRefusals),
)]
pub(super) async fn revoke(
    who: Scoped<Keys>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    if backend.handle.revoke_key(who.app(), &id).await? {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(Problem::new(
            Code::NotFound,
            "No key of this app has this id.",
        ))
    }
}
