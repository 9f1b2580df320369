//! The body of `POST /v1/pings`: bytes in, a checked request or a precise refusal out.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bellwire_protocol::limits::SYNC_MAX;
use bellwire_protocol::{Code, Content, Encoding};
use bytes::Bytes;
use serde::de::MapAccess;
use utoipa::ToSchema;

use super::error::{Place, Problem};
use super::json::{self, Members, Trail};
use super::text;
use super::topics;
use crate::delivery::{CollapseKey, DeviceId, Urgency};
use crate::runtime::{DEVICES_PER_LIST, Target};

/// Most names in a list, but for the devices of a ping.
pub(super) const NAMED_MAX: usize = 1_000;
/// Most devices, whatever the operator set.
const DEVICES_MAX: usize = DEVICES_PER_LIST as usize;

/// A checked publish request.
#[derive(Debug)]
pub(super) struct PingBody {
    /// Whom it addresses.
    pub(super) target: Target,
    /// What it says.
    pub(super) content: Content,
    /// Asked TTL, seconds.
    pub(super) ttl_s: Option<u64>,
    /// How much it matters.
    pub(super) urgency: Urgency,
    /// Replacement key.
    pub(super) collapse: Option<CollapseKey>,
}

/// Reads the body of a ping.
///
/// # Errors
/// 400 `malformed` with a pointer to the member; 422 for what is well-formed and impossible.
pub(super) fn read(bytes: &[u8]) -> Result<PingBody, Problem> {
    check(json::read(bytes)?)
}

/// Reads a line of a batch: a ping, and its idempotency key if it has one.
///
/// # Errors
/// As [`read`].
pub(super) fn read_line(line: &[u8]) -> Result<(PingBody, Option<String>), Problem> {
    let Line { ping, key } = json::read_line(line)?;
    Ok((check(ping)?, key))
}

fn check(ping: Ping) -> Result<PingBody, Problem> {
    let target = target(ping.to)?;
    if ping.content.encoding.is_some() && ping.content.data.is_none() {
        return Err(Problem::new(
            Code::Unprocessable,
            "`/encoding` says how `data` is encrypted, and there is no `data`.",
        )
        .at(Place::Body("/encoding".to_owned())));
    }
    Ok(PingBody {
        target,
        content: ping.content,
        ttl_s: ping.ttl_s,
        urgency: ping.urgency.unwrap_or_default(),
        collapse: ping.collapse,
    })
}

// ---- The members -------------------------------------------------------------------------------------------------

#[derive(Default)]
struct Ping {
    to: Option<To>,
    content: Content,
    ttl_s: Option<u64>,
    urgency: Option<Urgency>,
    collapse: Option<CollapseKey>,
}

const UINT32: &str = "an integer from 0 to 4294967295";
const TEXT: &str = "a text";

impl Members for Ping {
    const NAMES: &'static [&'static str] = &[
        "to",
        "title",
        "body",
        "sound",
        "badge",
        "vibrate_ms",
        "category",
        "sync",
        "data",
        "encoding",
        "ttl_s",
        "urgency",
        "collapse",
    ];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        let content = &mut self.content;
        match name {
            "to" => self.to = trail.object(map)?,
            "title" => content.title = trail.value(map, TEXT)?,
            "body" => content.body = trail.value(map, TEXT)?,
            "sound" => content.sound = trail.value(map, TEXT)?,
            "badge" => content.badge = trail.value(map, UINT32)?,
            "vibrate_ms" => content.vibrate_ms = trail.value(map, UINT32)?,
            "category" => content.category = trail.value(map, TEXT)?,
            "sync" => {
                content.sync = trail.texts(map, ("an array of texts", TEXT), SYNC_MAX, |name| {
                    Some(name.to_owned())
                })?;
            }
            "data" => {
                content.data = trail.text(map, "bytes in padded standard base64", |text| {
                    STANDARD.decode(text).ok().map(Bytes::from)
                })?;
            }
            "encoding" => {
                content.encoding = trail.text(map, "`aes128gcm`", |text| {
                    (text == Encoding::Aes128Gcm.name()).then_some(Encoding::Aes128Gcm)
                })?;
            }
            "ttl_s" => {
                self.ttl_s = trail.value(map, "an integer number of seconds, 0 or more")?;
            }
            "urgency" => {
                self.urgency = trail.text(map, "`very-low`, `low`, `normal` or `high`", urgency)?;
            }
            "collapse" => {
                self.collapse = trail.text(map, "a text of 1 to 64 bytes", CollapseKey::new)?;
            }
            other => return Err(forgotten(other, trail)),
        }
        Ok(())
    }
}

/// A line of a batch.
#[derive(Default)]
struct Line {
    ping: Ping,
    key: Option<String>,
}

const KEY_NAME: &str = "idempotency_key";
const KEY: &str = "a text of 1 to 255 visible ASCII characters";

impl Members for Line {
    const NAMES: &'static [&'static str] = &{
        let mut names = [KEY_NAME; Ping::NAMES.len() + 1];
        let mut place = 0;
        while place < Ping::NAMES.len() {
            names[place] = Ping::NAMES[place];
            place += 1;
        }
        names
    };

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        if name == KEY_NAME {
            self.key = trail.text(map, KEY, |text| {
                text::is_idempotency_key(text.as_bytes()).then(|| text.to_owned())
            })?;
            return Ok(());
        }
        self.ping.read(name, map, trail)
    }
}

#[derive(Default)]
struct To {
    device: Option<DeviceId>,
    user: Option<String>,
    users: Option<Vec<String>>,
    devices: Option<Vec<DeviceId>>,
    topic: Option<String>,
    everyone: Option<bool>,
}

pub(super) const DEVICE: &str = "a device id: 26 characters of a-z and 2-7";
const USER: &str = "a user name: a text of 1 to 255 bytes without control characters";

impl Members for To {
    const NAMES: &'static [&'static str] =
        &["device", "user", "users", "devices", "topic", "everyone"];

    fn read<'de, A: MapAccess<'de>>(
        &mut self,
        name: &'static str,
        map: &mut A,
        trail: &mut Trail,
    ) -> Result<(), A::Error> {
        match name {
            "device" => self.device = trail.text(map, DEVICE, |text| text.parse().ok())?,
            "user" => self.user = trail.text(map, USER, text::name)?,
            "users" => {
                self.users =
                    trail.texts(map, ("an array of user names", USER), NAMED_MAX, text::name)?;
            }
            "devices" => {
                self.devices = trail.texts(
                    map,
                    ("an array of device ids", DEVICE),
                    DEVICES_MAX,
                    |text| text.parse().ok(),
                )?;
            }
            "topic" => self.topic = trail.text(map, topics::EXPECTED, topics::topic)?,
            "everyone" => self.everyone = trail.value(map, "`true`")?,
            other => return Err(forgotten(other, trail)),
        }
        Ok(())
    }
}

/// A name in the list without a reader: a defect of ours, found by the first test that sends it.
pub(super) fn forgotten<E: serde::de::Error>(name: &str, trail: &mut Trail) -> E {
    trail.refuse(Code::Internal, format!("`{name}` is known and not read."))
}

const ONE_TARGET: &str =
    "an object with exactly one of `device`, `user`, `users`, `devices`, `topic`, `everyone`";

fn target(to: Option<To>) -> Result<Target, Problem> {
    let Some(to) = to else {
        return Err(json::missing("/to", ONE_TARGET));
    };
    let empty = |list: &str| {
        Problem::new(
            Code::Malformed,
            format!("`/to/{list}` must name at least one."),
        )
        .at(Place::Body(format!("/to/{list}")))
    };
    let one = |target| {
        Err(
            Problem::new(Code::Malformed, format!("`{target}` must be {ONE_TARGET}."))
                .at(Place::Body("/to".to_owned())),
        )
    };
    match to {
        To {
            topic: Some(topic),
            device: None,
            user: None,
            users: None,
            devices: None,
            everyone: None,
        } => return Ok(Target::Topic(topic)),
        To {
            everyone: Some(true),
            device: None,
            user: None,
            users: None,
            devices: None,
            topic: None,
        } => return Ok(Target::Everyone),
        To {
            everyone: Some(false),
            ..
        } => {
            return Err(Problem::new(
                Code::Malformed,
                "`/to/everyone` must be `true`, or left out.",
            )
            .at(Place::Body("/to/everyone".to_owned())));
        }
        To { topic: Some(_), .. }
        | To {
            everyone: Some(_), ..
        } => return one("/to"),
        To { .. } => {}
    }
    match (to.device, to.user, to.users, to.devices) {
        (Some(device), None, None, None) => Ok(Target::Device(device)),
        (None, Some(user), None, None) => Ok(Target::Users(vec![user])),
        (None, None, Some(users), None) if users.is_empty() => Err(empty("users")),
        (None, None, Some(users), None) => Ok(Target::Users(users)),
        (None, None, None, Some(devices)) if devices.is_empty() => Err(empty("devices")),
        (None, None, None, Some(devices)) => Ok(Target::Devices(devices)),
        _ => one("/to"),
    }
}

fn urgency(text: &str) -> Option<Urgency> {
    match text {
        "very-low" => Some(Urgency::VeryLow),
        "low" => Some(Urgency::Low),
        "normal" => Some(Urgency::Normal),
        "high" => Some(Urgency::High),
        _ => None,
    }
}

// ---- The same, for the OpenAPI document --------------------------------------------------------------------------

/// One ping: to whom, what, and for how long. Without any content member it is a bare wake-up.
#[derive(ToSchema)]
#[schema(as = Ping)]
#[expect(dead_code, reason = "describes what `read` reads")]
pub(super) struct PingSchema {
    /// Whom it addresses: exactly one member.
    #[schema(inline)]
    to: ToSchemaBody,
    /// Headline of the message that is shown.
    title: Option<String>,
    /// Text of the message that is shown.
    body: Option<String>,
    /// Name of the sound to play.
    sound: Option<String>,
    /// Number to show on the app's icon; 0 takes it away.
    #[schema(format = Int64, maximum = 4294967295u64)]
    badge: Option<u32>,
    /// How long to vibrate, in milliseconds.
    #[schema(format = Int64, maximum = 4294967295u64)]
    vibrate_ms: Option<u32>,
    /// Name of the set of actions that the app offers with the message.
    category: Option<String>,
    /// Names of the sources that the app should synchronise.
    #[schema(max_items = 100)]
    sync: Option<Vec<String>>,
    /// Bytes for the app, in padded standard base64.
    #[schema(content_encoding = "base64")]
    data: Option<String>,
    /// Set when `data` is encrypted end to end.
    #[schema(pattern = "^aes128gcm$")]
    encoding: Option<String>,
    /// How long it may be held, in seconds. Default 604,800 (7 days); larger ones are lowered to 2,592,000 (30 days) or what
    /// the operator set, and the answer says what was granted. 0: now or never.
    ttl_s: Option<u64>,
    /// How much it matters. Default `normal`. A full mailbox lets the least urgent go first.
    #[schema(pattern = "^(very-low|low|normal|high)$")]
    urgency: Option<String>,
    /// Replacement key: takes the place of one with the same key that still waits.
    #[schema(min_length = 1, max_length = 64)]
    collapse: Option<String>,
}

/// One line of a batch: a ping, and perhaps its key.
#[derive(ToSchema)]
#[schema(as = PingLine)]
#[expect(dead_code, reason = "describes what `read_line` reads")]
pub(super) struct PingLineSchema {
    #[serde(flatten)]
    ping: PingSchema,
    /// 1 to 255 visible ASCII characters. One key is for one ping, for ever: the same key in the same line makes the same ping, once.
    #[schema(min_length = 1, max_length = 255)]
    idempotency_key: Option<String>,
}

/// Whom a ping addresses: exactly one member.
#[derive(ToSchema)]
#[schema(as = To, min_properties = 1, max_properties = 1)]
#[expect(dead_code, reason = "describes what `read` reads")]
struct ToSchemaBody {
    /// One device; unknown is 404.
    #[schema(nullable = false, pattern = "^[a-z2-7]{26}$")]
    device: Option<String>,
    /// All devices of one user; none is no error.
    #[schema(nullable = false, min_length = 1, max_length = 255)]
    user: Option<String>,
    /// All devices of these users.
    #[schema(nullable = false, min_items = 1, max_items = 1000)]
    users: Option<Vec<String>>,
    /// These devices. Up to 1,000: unknown ones are in `rejected`. More are an audience, as a topic is.
    #[schema(nullable = false, min_items = 1, max_items = 100000)]
    devices: Option<Vec<String>>,
    /// The devices in this topic when the ping is accepted.
    #[schema(
        nullable = false,
        min_length = 1,
        max_length = 128,
        pattern = "^[A-Za-z0-9._~/:@+-]+$"
    )]
    topic: Option<String>,
    /// Every device of the app when the ping is accepted.
    #[schema(nullable = false)]
    everyone: Option<bool>,
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use utoipa::PartialSchema;

    use super::super::{devices, keys, pings};
    use super::*;

    /// The members of a schema and those of its reader.
    fn members<S: PartialSchema, M: Members>() -> (BTreeSet<String>, BTreeSet<String>) {
        let schema = serde_json::to_value(S::schema()).unwrap_or_default();
        let described = schema["properties"].as_object().into_iter();
        (
            described
                .flat_map(|members| members.keys().cloned())
                .collect(),
            M::NAMES.iter().map(|name| (*name).to_owned()).collect(),
        )
    }

    #[test]
    fn the_document_describes_the_members_that_are_read() {
        let (described, read) = members::<PingSchema, Ping>();
        assert_eq!(described, read);
        let (described, read) = members::<ToSchemaBody, To>();
        assert_eq!(described, read);
        let (described, read) = members::<topics::NewTopics, topics::NewTopics>();
        assert_eq!(described, read);
        let (described, read) = members::<topics::Edit, topics::Edit>();
        assert_eq!(described, read);
        let (described, read) = members::<devices::NewDevice, devices::NewDevice>();
        assert_eq!(described, read);
        let (described, read) = members::<pings::Withdrawal, pings::Withdrawal>();
        assert_eq!(described, read);
        let (described, read) = members::<keys::NewKey, keys::NewKey>();
        assert_eq!(described, read);
    }

    #[test]
    fn every_member_that_is_known_has_a_reader() {
        for name in Ping::NAMES {
            let told = read(format!("{{\"{name}\": null, \"to\": {{}}}}").as_bytes());
            assert!(told.is_err_and(|problem| problem.code() == Code::Malformed));
        }
        for name in To::NAMES {
            let told = read(format!("{{\"to\": {{\"{name}\": null}}}}").as_bytes());
            assert!(told.is_err_and(|problem| problem.code() != Code::Internal));
        }
    }
}
