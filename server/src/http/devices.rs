//! `/v1/devices`: register, look, revoke.

use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use bellwire_protocol::Code;
use http::header::LOCATION;
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use serde::de::MapAccess;
use utoipa::ToSchema;

use super::auth::{Devices, Read, Scoped};
use super::document::refusals;
use super::error::Problem;
use super::json::{self, Members, Trail};
use super::query::{PathId, Query};
use super::{Backend, answer, body, secret_answer, text};
use crate::delivery::DeviceId;
use crate::runtime::DeviceView;

/// A device to register.
#[derive(Default, ToSchema)]
#[schema(as = NewDevice)]
pub(super) struct NewDevice {
    /// Who owns it: 1 to 255 bytes without control characters.
    #[schema(
        required = true,
        nullable = false,
        min_length = 1,
        max_length = 255,
        example = "ana"
    )]
    user: Option<String>,
    /// A name for people.
    #[schema(min_length = 1, max_length = 255, example = "Ward 3 tablet")]
    name: Option<String>,
}

const NAME: &str = "a text of 1 to 255 bytes without control characters";

impl Members for NewDevice {
    const NAMES: &'static [&'static str] = &["user", "name"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        let value = trail.text(map, NAME, text::name)?;
        match name {
            "user" => self.user = value,
            _ => self.name = value,
        }
        Ok(())
    }
}

/// A device just registered.
#[derive(Serialize, ToSchema)]
pub(super) struct Registered {
    /// Its id.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// What it proves itself with. Shown this once and kept nowhere.
    secret: String,
}

/// A device.
#[derive(Serialize, ToSchema)]
pub(super) struct Device {
    /// Its id.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// Its owner.
    user: String,
    /// A name for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    name: Option<String>,
    /// When it was registered, Unix milliseconds.
    created_ms: u64,
    /// Its connection, while it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    attached: Option<Attached>,
}

/// A device's connection.
#[derive(Serialize, ToSchema)]
struct Attached {
    /// `quic` or `websocket`.
    carrier: &'static str,
    /// Since when, Unix milliseconds.
    since_ms: u64,
}

impl From<DeviceView> for Device {
    fn from(view: DeviceView) -> Device {
        Device {
            device: view.device,
            user: view.user,
            name: view.name,
            created_ms: view.created_ms,
            attached: view
                .attached
                .map(|(carrier, since_ms)| Attached { carrier, since_ms }),
        }
    }
}

/// A page of devices, by id.
#[derive(Serialize, ToSchema)]
pub(super) struct DeviceList {
    /// The devices.
    devices: Vec<Device>,
    /// Pass this as `after` to get the next page; absent on the last one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    next: Option<String>,
}

refusals! {
    CreateRefusals: Malformed, Unauthenticated, Forbidden, BodyTimeout, BodyTooLarge, UnsupportedMediaType, Internal,
        StoreUnavailable, StoreBusy, Draining, NoRoom;
    ListRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining;
    OneRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, Internal, StoreUnavailable, StoreBusy, Draining;
}

/// Register a device.
///
/// The secret is in this answer and nowhere else: hand it to the installation at once.
#[utoipa::path(
    post,
    path = "/v1/devices",
    tag = "devices",
    operation_id = "create_device",
    request_body(content = NewDevice, content_type = "application/json",
        example = json!({"user": "ana", "name": "Ward 3 tablet"})),
    responses(
        (status = 201, description = "Registered.", body = Registered,
            headers(("Location" = String, description = "The path of the device.")),
            example = json!({"device": "mfzwizjanfxgk4tfon2ca43fmy", "secret": "(shown once)"})),
        CreateRefusals,
    ),
)]
pub(super) async fn create(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_json(&parts.headers)?;
    let new: NewDevice = json::read(&body::read(body).await?)?;
    let user = new.user.ok_or_else(|| json::missing("/user", NAME))?;
    let registered = backend
        .handle
        .create_device(who.app(), &user, new.name.as_deref())
        .await?;
    let device = registered.made.device;
    let mut response = secret_answer(
        StatusCode::CREATED,
        &Registered {
            device,
            secret: registered.secret,
        },
    );
    if let Ok(location) = HeaderValue::try_from(format!("/v1/devices/{device}")) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

/// One page, from the query.
pub(super) fn page(
    query: Option<&str>,
) -> Result<(Option<String>, Option<DeviceId>, usize), Problem> {
    let query = Query::read(query, &["user", "after", "limit"])?;
    let user = query.parsed("user", NAME, text::name)?;
    let after = query.parsed("after", "the `next` of the page before", |text| {
        text.parse().ok()
    })?;
    Ok((user, after, query.limit()?))
}

/// List devices.
#[utoipa::path(
    get,
    path = "/v1/devices",
    tag = "devices",
    operation_id = "list_devices",
    params(
        ("user" = Option<String>, Query, description = "Only those of this user."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most devices to list. Default 100."),
    ),
    responses(
        (status = 200, description = "A page of devices, by id.", body = DeviceList,
            example = json!({"devices": [{"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ana", "name": "Ward 3 tablet",
                "created_ms": 1795240000000u64, "attached": {"carrier": "quic", "since_ms": 1795249000000u64}}]})),
        ListRefusals,
    ),
)]
pub(super) async fn list(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (user, after, limit) = page(request.uri().query())?;
    let page = backend
        .handle
        .devices(who.app(), user.as_deref(), after, limit)
        .await?;
    Ok(answer(
        StatusCode::OK,
        &DeviceList {
            devices: page.items.into_iter().map(Device::from).collect(),
            next: page.next.map(|next| next.to_string()),
        },
    ))
}

/// The id of a device in a path. What is no id names no device.
pub(super) fn device_id(text: &str) -> Result<DeviceId, Problem> {
    text.parse().map_err(|_| unknown())
}

fn unknown() -> Problem {
    Problem::plain(Code::UnknownDevice)
}

/// Look at a device.
#[utoipa::path(
    get,
    path = "/v1/devices/{id}",
    tag = "devices",
    operation_id = "get_device",
    params(("id" = String, Path, description = "The device.")),
    responses(
        (status = 200, description = "The device.", body = Device,
            example = json!({"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ana", "created_ms": 1795240000000u64})),
        OneRefusals,
    ),
)]
pub(super) async fn look(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    let view = backend
        .handle
        .device(who.app(), device_id(&id)?)
        .await?
        .ok_or_else(unknown)?;
    Ok(answer(StatusCode::OK, &Device::from(view)))
}

/// Revoke a device.
///
/// Cuts its session, revokes what waits for it and forgets it. Its id and secret stay dead.
#[utoipa::path(
    delete,
    path = "/v1/devices/{id}",
    tag = "devices",
    operation_id = "revoke_device",
    params(("id" = String, Path, description = "The device.")),
    responses((status = 204, description = "Revoked."), OneRefusals),
)]
pub(super) async fn revoke(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    Query::read(request.uri().query(), &[])?;
    if backend
        .handle
        .revoke_device(who.app(), device_id(&id)?)
        .await?
    {
        Ok(StatusCode::NO_CONTENT.into_response())
    } else {
        Err(unknown())
    }
}
