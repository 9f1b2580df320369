//! `/v1/devices`: register, look, change, rotate the secret, revoke.

use std::time::Duration;

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
use super::error::{Place, Problem};
use super::json::{self, Members, Trail};
use super::query::{PathId, Query};
use super::{Backend, answer, body, secret_answer, text, topics};
use crate::delivery::DeviceId;
use crate::runtime::{DeviceChange, DeviceQuery, DeviceView, SECRET_OVERLAP_MAX, Waiting};

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
    /// When and how it was last there; absent if it never was.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    last_seen: Option<LastSeen>,
    /// Until when the secret before the current one is good as well, Unix milliseconds; absent when it is not.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    previous_secret_until_ms: Option<u64>,
    /// Notifications in its mailbox on disk; not in lists of devices. Those on their way to an attached device that have
    /// not touched the disk are not counted.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    waiting: Option<u32>,
}

/// When and how a device was last there.
#[derive(Serialize, ToSchema)]
struct LastSeen {
    /// When, Unix milliseconds: now, while it is attached. It may be some minutes behind after a crash of the server.
    at_ms: u64,
    /// `quic` or `websocket`.
    carrier: &'static str,
    /// What its client said it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false, example = "bellwire-client/0.1")]
    agent: Option<String>,
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
            last_seen: view.seen.map(|seen| LastSeen {
                at_ms: seen.at_ms,
                carrier: seen.carrier.as_str(),
                agent: seen.agent.map(|agent| agent.as_ref().to_owned()),
            }),
            previous_secret_until_ms: view.previous_secret_until_ms,
            waiting: view.waiting,
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
    CreateRefusals: Malformed, Unauthenticated, Forbidden, BodyTimeout, BodyTooLarge, UnsupportedMediaType, QuotaExceeded, Internal,
        StoreUnavailable, StoreBusy, Draining, NoRoom;
    ListRefusals: Malformed, Unauthenticated, Forbidden, Internal, StoreUnavailable, StoreBusy, Draining;
    ChangeRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, BodyTimeout, BodyTooLarge, UnsupportedMediaType,
        Unprocessable, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
    OneRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, Internal, StoreUnavailable, StoreBusy, Draining;
    RevokeRefusals: Malformed, Unauthenticated, Forbidden, UnknownDevice, Internal, StoreUnavailable, StoreBusy, Draining, NoRoom;
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
    let new: NewDevice = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
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
pub(super) fn page(query: Option<&str>) -> Result<(DeviceQuery, Option<DeviceId>, usize), Problem> {
    const TIME: &str = "a time in Unix milliseconds";
    let query = Query::read(
        query,
        &[
            "user",
            "topic",
            "attached",
            "seen_before_ms",
            "seen_after_ms",
            "after",
            "limit",
        ],
    )?;
    let time = |name| query.parsed(name, TIME, |text| text.parse().ok());
    let wanted = DeviceQuery {
        user: query.parsed("user", NAME, text::name)?,
        topic: query.parsed("topic", topics::EXPECTED, topics::topic)?,
        attached: query.parsed("attached", "`true` or `false`", |text| text.parse().ok())?,
        seen_before_ms: time("seen_before_ms")?,
        seen_after_ms: time("seen_after_ms")?,
    };
    let after = query.parsed("after", "the `next` of the page before", |text| {
        text.parse().ok()
    })?;
    Ok((wanted, after, query.limit()?))
}

/// List devices.
///
/// Everything that is asked for must fit. With `topic`, `attached`, `seen_before_ms` or `seen_after_ms` one call looks at 10,000 devices
/// at most: a page may then have fewer devices than `limit`, or none, and still have a `next`.
#[utoipa::path(
    get,
    path = "/v1/devices",
    tag = "devices",
    operation_id = "list_devices",
    params(
        ("user" = Option<String>, Query, description = "Only those of this user."),
        ("topic" = Option<String>, Query, description = "Only those in this topic."),
        ("attached" = Option<bool>, Query, description = "Only those that are connected now, or only those that are not."),
        ("seen_before_ms" = Option<u64>, Query,
            description = "Only those last seen before this time; one that was never seen counts from its registration."),
        ("seen_after_ms" = Option<u64>, Query, description = "Only those seen at this time or later."),
        ("after" = Option<String>, Query, description = "`next` of the page before."),
        ("limit" = Option<u32>, Query, minimum = 1, maximum = 1000, description = "Most devices to list. Default 100."),
    ),
    responses(
        (status = 200, description = "A page of devices, by id.", body = DeviceList,
            example = json!({"devices": [{"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ana", "name": "Ward 3 tablet",
                "created_ms": 1795240000000u64, "attached": {"carrier": "quic", "since_ms": 1795249000000u64},
                "last_seen": {"at_ms": 1795250000000u64, "carrier": "quic", "agent": "bellwire-client/0.1"}}]})),
        ListRefusals,
    ),
)]
pub(super) async fn list(
    who: Scoped<Read>,
    State(backend): State<Backend>,
    request: Request,
) -> Result<Response, Problem> {
    let (query, after, limit) = page(request.uri().query())?;
    let page = backend
        .handle
        .devices(who.app(), &query, after, limit)
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
            example = json!({"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ana", "created_ms": 1795240000000u64,
                "last_seen": {"at_ms": 1795245000000u64, "carrier": "websocket", "agent": "bellwire-client/0.1"}, "waiting": 2})),
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

// ---- Changes -----------------------------------------------------------------------------------------------------

/// How to change a device: a merge patch (RFC 7396). What is left out stays as it is.
#[derive(Default, ToSchema)]
#[schema(as = DeviceChange)]
pub(super) struct Change {
    /// The new user: 1 to 255 bytes without control characters. Every device has one.
    #[schema(nullable = false, min_length = 1, max_length = 255, example = "ben")]
    user: Option<String>,
    /// The new name; `null` takes it away.
    #[schema(value_type = Option<String>, min_length = 1, max_length = 255, example = "Ward 4 tablet")]
    name: Option<Option<String>>,
    /// What becomes of what waits when `user` changes: `revoke` (default) ends it as `revoked`, because it was meant for
    /// somebody else; `keep` lets it go with the device. It is about this change and is not kept.
    #[schema(value_type = Option<String>, write_only, pattern = "^(keep|revoke)$", example = "revoke")]
    waiting: Option<Waiting>,
}

impl Members for Change {
    const NAMES: &'static [&'static str] = &["user", "name", "waiting"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "user" => {
                self.user = trail.text(map, NAME, text::name)?;
                if self.user.is_none() {
                    return Err(trail.refuse(
                        Code::Unprocessable,
                        "`/user` cannot be taken away: every device has one.".to_owned(),
                    ));
                }
            }
            "name" => self.name = Some(trail.text(map, NAME, text::name)?),
            _ => {
                self.waiting = trail.text(map, "`keep` or `revoke`", |text| match text {
                    "keep" => Some(Waiting::Keep),
                    "revoke" => Some(Waiting::Revoke),
                    _ => None,
                })?;
            }
        }
        Ok(())
    }
}

/// A device after a change.
#[derive(Serialize, ToSchema)]
pub(super) struct ChangedDevice {
    #[serde(flatten)]
    device: Device,
    /// Notifications that ended as `revoked` because the user changed.
    revoked: u32,
}

/// Change a device: its name, its user.
///
/// A merge patch (RFC 7396). All of it is safe together when this is answered, or nothing of it happened. With another `user` the device
/// stays connected; pings to either user are delivered by the one owner or the other, never by a mixture. What waits was meant
/// for the old user and ends as `revoked`, unless `waiting` is `keep`.
#[utoipa::path(
    patch,
    path = "/v1/devices/{id}",
    tag = "devices",
    operation_id = "change_device",
    params(("id" = String, Path, description = "The device.")),
    request_body(content(
        (Change = "application/merge-patch+json", example = json!({"user": "ben", "name": null, "waiting": "keep"})),
        (Change = "application/json", example = json!({"name": "Ward 4 tablet"})),
    )),
    responses(
        (status = 200, description = "The device as it is now.", body = ChangedDevice,
            example = json!({"device": "mfzwizjanfxgk4tfon2ca43fmy", "user": "ben", "created_ms": 1795240000000u64, "waiting": 0,
                "revoked": 2})),
        ChangeRefusals,
    ),
)]
pub(super) async fn change(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    body::expect_merge_patch(&parts.headers)?;
    let change: Change = json::read(&body::read(body, backend.handle.limits().body_max).await?)?;
    if change.waiting.is_some() && change.user.is_none() {
        return Err(Problem::new(
            Code::Unprocessable,
            "`/waiting` says what becomes of what waits when `user` changes, and there is no `user`.",
        )
        .at(Place::Body("/waiting".to_owned())));
    }
    let changed = backend
        .handle
        .change_device(
            who.app(),
            device_id(&id)?,
            DeviceChange {
                user: change.user,
                name: change.name,
                waiting: change.waiting.unwrap_or_default(),
            },
        )
        .await?
        .ok_or_else(unknown)?;
    Ok(answer(
        StatusCode::OK,
        &ChangedDevice {
            device: Device::from(changed.device),
            revoked: changed.revoked,
        },
    ))
}

/// How to rotate a secret.
#[derive(Default, ToSchema)]
#[schema(as = SecretRotation)]
pub(super) struct Rotation {
    /// How long the old secret stays good, in seconds. 0: not at all, and the session is cut. Default 86,400 (24 h), unless
    /// the operator set another.
    #[schema(maximum = 7_776_000, example = 3600)]
    overlap_s: Option<u64>,
}

impl Members for Rotation {
    const NAMES: &'static [&'static str] = &["overlap_s"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        _: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        self.overlap_s = trail.value(map, "an integer number of seconds, 0 or more")?;
        Ok(())
    }
}

/// A new secret.
#[derive(Serialize, ToSchema)]
pub(super) struct NewSecret {
    /// Whose.
    #[serde(serialize_with = "text::display")]
    #[schema(value_type = String)]
    device: DeviceId,
    /// What the device proves itself with from now on. Shown this once and kept nowhere.
    secret: String,
    /// Until when the old secret is good as well, Unix milliseconds; absent if it ended at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    previous_until_ms: Option<u64>,
}

/// Give a device a new secret.
///
/// Both secrets are good until the overlap is over; then the old one is refused, and a session that was begun with it ends.
/// `overlap_s` 0 ends every older secret and the session at once. Each replaced secret keeps its own end, so a rotation whose
/// answer got lost can be repeated; at most five are good at a time (422). The body may be left out.
#[utoipa::path(
    post,
    path = "/v1/devices/{id}/secret",
    tag = "devices",
    operation_id = "rotate_device_secret",
    params(("id" = String, Path, description = "The device.")),
    request_body(content = Option<Rotation>, content_type = "application/json", example = json!({"overlap_s": 3600})),
    responses(
        (status = 200, description = "The new secret.", body = NewSecret,
            example = json!({"device": "mfzwizjanfxgk4tfon2ca43fmy", "secret": "(shown once)", "previous_until_ms": 1795326400000u64})),
        ChangeRefusals,
    ),
)]
pub(super) async fn rotate(
    who: Scoped<Devices>,
    State(backend): State<Backend>,
    PathId(id): PathId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    Query::read(parts.uri.query(), &[])?;
    let bytes = body::read(body, backend.handle.limits().body_max).await?;
    let rotation = if bytes.is_empty() {
        Rotation::default()
    } else {
        body::expect_json(&parts.headers)?;
        json::read(&bytes)?
    };
    if rotation
        .overlap_s
        .is_some_and(|seconds| seconds > SECRET_OVERLAP_MAX.as_secs())
    {
        return Err(Problem::new(
            Code::Unprocessable,
            format!(
                "`/overlap_s` must be at most {} (90 days).",
                SECRET_OVERLAP_MAX.as_secs()
            ),
        )
        .at(Place::Body("/overlap_s".to_owned())));
    }
    let rotated = backend
        .handle
        .rotate_secret(
            who.app(),
            device_id(&id)?,
            rotation.overlap_s.map(Duration::from_secs),
        )
        .await?
        .ok_or_else(unknown)?;
    Ok(secret_answer(
        StatusCode::OK,
        &NewSecret {
            device: rotated.made.device,
            secret: rotated.secret,
            previous_until_ms: rotated.made.previous_until_ms,
        },
    ))
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
    responses((status = 204, description = "Revoked."), RevokeRefusals),
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
