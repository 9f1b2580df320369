//! `/v1/devices/{id}/topics`: which topics a device is in.

use axum::extract::{Request, State};
use axum::response::Response;
use bellwire_protocol::Code;
use http::StatusCode;
use serde::Serialize;
use serde::de::MapAccess;
use utoipa::ToSchema;

use super::auth::{Devices, Read, Scoped};
use super::devices::device_id;
use super::document::refusals;
use super::error::Problem;
use super::json::{self, Members, Trail};
use super::query::{PathId, Query};
use super::{Backend, answer, body};
use crate::runtime::{TOPICS_PER_DEVICE, TopicsChange, is_topic};

const TOPIC: &str = "a topic: 1 to 128 characters of a-z, A-Z, 0-9 and -._~/:@+";
const LIST: (&str, &str) = ("an array of topics", TOPIC);

/// The name of a topic.
pub(super) fn topic(text: &str) -> Option<String> {
    is_topic(text).then(|| text.to_owned())
}

/// What [`topic`] takes, for refusals.
pub(super) const EXPECTED: &str = TOPIC;

/// The topics that a device is to be in.
#[derive(Default, ToSchema)]
#[schema(as = DeviceTopics)]
pub(super) struct NewTopics {
    /// All of them: it leaves every other, also those that it joined by itself. At most 100; each 1 to 128 characters of `a-z`,
    /// `A-Z`, `0-9` and `-._~/:@+`.
    #[schema(required = true, nullable = false, max_items = 100, example = json!(["news", "ward/3"]))]
    topics: Option<Vec<String>>,
}

impl Members for NewTopics {
    const NAMES: &'static [&'static str] = &["topics"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        _: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        self.topics = trail.texts(map, LIST, TOPICS_PER_DEVICE, topic)?;
        Ok(())
    }
}

/// Topics to join and to leave; all others stay.
#[derive(Default, ToSchema)]
#[schema(as = TopicsEdit)]
pub(super) struct Edit {
    /// It joins these.
    #[schema(max_items = 100)]
    join: Option<Vec<String>>,
    /// It leaves these. One that is in both lists is joined.
    #[schema(max_items = 100)]
    leave: Option<Vec<String>>,
}

impl Members for Edit {
    const NAMES: &'static [&'static str] = &["join", "leave"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        let topics = trail.texts(map, LIST, TOPICS_PER_DEVICE, topic)?;
        match name {
            "join" => self.join = topics,
            _ => self.leave = topics,
        }
        Ok(())
    }
}

/// The topics of a device.
#[derive(Serialize, ToSchema)]
pub(super) struct Topics {
    /// All of them, by name.
    topics: Vec<String>,
}

refusals! {
    LookRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, Internal, StoreUnavailable, StoreBusy, Draining;
    ChangeRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, BodyTimeout, BodyTooLarge, UnsupportedMediaType,
        Unprocessable, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
}

fn unknown() -> Problem {
    Problem::plain(Code::UnknownDevice)
}

fn told(topics: Option<Vec<String>>) -> Result<Response, Problem> {
    let topics = topics.ok_or_else(unknown)?;
    Ok(answer(StatusCode::OK, &Topics { topics }))
}

/// See the topics of a device.
///
/// Who is in a topic: `GET /v1/devices?topic=...`.
#[utoipa::path(
    get,
    path = "/v1/devices/{id}/topics",
    tag = "devices",
    operation_id = "get_device_topics",
    params(("id" = String, Path, description = "The device.")),
    responses(
        (status = 200, description = "Its topics.", body = Topics, example = json!({"topics": ["news", "ward/3"]})),
        LookRefusals,
    ),
)]
pub(super) async fn look(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    told(backend.handle.topics(who.app(), device_id(&id)?).await?)
}

/// Say which topics a device is in.
///
/// It is in these and no others when this is answered. A ping addresses those who were in its topic when it was accepted: whoever
/// leaves after that still gets it, whoever joins after that does not.
#[utoipa::path(
    put,
    path = "/v1/devices/{id}/topics",
    tag = "devices",
    operation_id = "set_device_topics",
    params(("id" = String, Path, description = "The device.")),
    request_body(content = NewTopics, content_type = "application/json", example = json!({"topics": ["news", "ward/3"]})),
    responses(
        (status = 200, description = "Its topics.", body = Topics, example = json!({"topics": ["news", "ward/3"]})),
        ChangeRefusals,
    ),
)]
pub(super) async fn set(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let new: NewTopics = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    let topics = new.topics.ok_or_else(|| json::missing("/topics", LIST.0))?;
    let change = TopicsChange::Set(topics);
    let handle = &backend.handle;
    told(
        handle
            .change_topics(who.app(), device_id(&id)?, change)
            .await?,
    )
}

/// Let a device join and leave topics.
///
/// All that it is in besides stays, also what it joined by itself meanwhile. Otherwise as `PUT`.
#[utoipa::path(
    patch,
    path = "/v1/devices/{id}/topics",
    tag = "devices",
    operation_id = "edit_device_topics",
    params(("id" = String, Path, description = "The device.")),
    request_body(content = Edit, content_type = "application/json", example = json!({"join": ["ward/4"], "leave": ["ward/3"]})),
    responses(
        (status = 200, description = "Its topics.", body = Topics, example = json!({"topics": ["news", "ward/4"]})),
        ChangeRefusals,
    ),
)]
pub(super) async fn edit(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let edit: Edit = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    let change = TopicsChange::Edit {
        join: edit.join.unwrap_or_default(),
        leave: edit.leave.unwrap_or_default(),
    };
    let handle = &backend.handle;
    told(
        handle
            .change_topics(who.app(), device_id(&id)?, change)
            .await?,
    )
}
