//! The compact codec: one definite CBOR map with integer keys; key 0 holds the number of the frame's type.

use minicbor::data::Type;
use minicbor::decode::Decoder;

use super::{DecodeError, Decoded};
use crate::code::Retry;
use crate::content::{self, Content, Encoding};
use crate::frame::*;
use crate::id::Id;
use crate::limits::*;

/// Numbers of the frame types: what key 0 holds.
pub(crate) mod frame_type {
    pub(crate) const HELLO: u64 = 1;
    pub(crate) const ACK: u64 = 2;
    pub(crate) const DECLINE: u64 = 3;
    pub(crate) const PRESENCE: u64 = 4;
    pub(crate) const SUBSCRIBE: u64 = 5;
    pub(crate) const UNSUBSCRIBE: u64 = 6;
    pub(crate) const PING: u64 = 7;
    pub(crate) const BYE: u64 = 8;
    pub(crate) const WELCOME: u64 = 16;
    pub(crate) const NOTIFY: u64 = 17;
    pub(crate) const WITHDRAW: u64 = 18;
    pub(crate) const PONG: u64 = 19;
    pub(crate) const SUBSCRIBED: u64 = 20;
    pub(crate) const GOAWAY: u64 = 21;
    pub(crate) const ERROR: u64 = 22;
}

/// Keys of the members, frame by frame. Key 0 is the type; 8 to 31 in `notify` belong to the content.
pub(crate) mod key {
    pub(crate) const TYPE: u64 = 0;

    pub(crate) mod hello {
        pub(crate) const DEVICE: u64 = 1;
        pub(crate) const SECRET: u64 = 2;
        pub(crate) const INSTANCE: u64 = 3;
        pub(crate) const ATTEMPT: u64 = 4;
        pub(crate) const SEEN: u64 = 5;
        pub(crate) const WINDOW: u64 = 6;
        pub(crate) const MIN_URGENCY: u64 = 7;
        pub(crate) const AGENT: u64 = 8;
    }
    pub(crate) mod seen {
        pub(crate) const ID: u64 = 0;
        pub(crate) const VERDICT: u64 = 1;
    }
    pub(crate) mod ack {
        pub(crate) const UP_TO: u64 = 1;
        pub(crate) const IDS: u64 = 2;
    }
    pub(crate) mod decline {
        pub(crate) const ID: u64 = 1;
        pub(crate) const REASON: u64 = 2;
    }
    pub(crate) mod presence {
        pub(crate) const STATE: u64 = 1;
    }
    pub(crate) mod topics {
        pub(crate) const TOPICS: u64 = 1;
    }
    pub(crate) mod welcome {
        pub(crate) const SESSION: u64 = 1;
        pub(crate) const PENDING: u64 = 2;
        pub(crate) const WINDOW: u64 = 3;
        pub(crate) const MAX_BYTES: u64 = 4;
        pub(crate) const KEEP_ALIVE_S: u64 = 5;
        pub(crate) const NOW_MS: u64 = 6;
    }
    pub(crate) mod notify {
        pub(crate) const SEQ: u64 = 1;
        pub(crate) const REDELIVERED: u64 = 2;
        pub(crate) const ID: u64 = 3;
        pub(crate) const ACCEPTED_MS: u64 = 4;
        pub(crate) const EXPIRES_MS: u64 = 5;
        pub(crate) const URGENCY: u64 = 6;
    }
    pub(crate) mod withdraw {
        pub(crate) const IDS: u64 = 1;
    }
    pub(crate) mod goaway {
        pub(crate) const REASON: u64 = 1;
        pub(crate) const RECONNECT_MS: u64 = 2;
        pub(crate) const ENDPOINT: u64 = 3;
    }
    pub(crate) mod error {
        pub(crate) const CODE: u64 = 1;
        pub(crate) const MESSAGE: u64 = 2;
        pub(crate) const RETRY: u64 = 3;
    }
}

/// Entries of a `notify` beside its content: type, seq, redelivered, id, accepted_ms, expires_ms, urgency.
pub(crate) const NOTIFY_OWN_ENTRIES: usize = 7;

// An enumeration is a number in CBOR: its place in these tables. Places never change.
pub(crate) const VERDICTS: &[Verdict] = &[Verdict::Acknowledged, Verdict::Declined];
pub(crate) const URGENCIES: &[Urgency] = &[
    Urgency::VeryLow,
    Urgency::Low,
    Urgency::Normal,
    Urgency::High,
];
pub(crate) const PRESENCE_STATES: &[PresenceState] = &[PresenceState::Idle, PresenceState::Active];
pub(crate) const GOAWAY_REASONS: &[GoawayReason] = &[
    GoawayReason::Drain,
    GoawayReason::Replaced,
    GoawayReason::Revoked,
    GoawayReason::Upgrade,
];
pub(crate) const RETRIES: &[Retry] = &[Retry::Never, Retry::Later, Retry::Now];

/// The number of an enumeration's value.
trait Number: Copy + PartialEq + 'static {
    const TABLE: &'static [Self];

    fn number(self) -> u64 {
        let place = Self::TABLE.iter().position(|value| *value == self);
        place.expect("the tables list every value; a test walks through all of them") as u64
    }

    fn from_number(number: u64) -> Option<Self> {
        Self::TABLE.get(usize::try_from(number).ok()?).copied()
    }
}

impl Number for Verdict {
    const TABLE: &'static [Self] = VERDICTS;
}
impl Number for Urgency {
    const TABLE: &'static [Self] = URGENCIES;
}
impl Number for PresenceState {
    const TABLE: &'static [Self] = PRESENCE_STATES;
}
impl Number for GoawayReason {
    const TABLE: &'static [Self] = GOAWAY_REASONS;
}
impl Number for Retry {
    const TABLE: &'static [Self] = RETRIES;
}

/// Writes CBOR in its shortest form. Unlike a general encoder it cannot fail, so neither can encoding a frame.
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(crate) fn with_capacity(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
        }
    }

    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn head(&mut self, major: u8, argument: u64) {
        let major = major << 5;
        let bytes = argument.to_be_bytes();
        match argument {
            0..=23 => self.bytes.push(major | bytes[7]),
            24..=0xff => self.bytes.extend_from_slice(&[major | 24, bytes[7]]),
            0x100..=0xffff => {
                self.bytes.push(major | 25);
                self.bytes.extend_from_slice(&bytes[6..]);
            }
            0x1_0000..=0xffff_ffff => {
                self.bytes.push(major | 26);
                self.bytes.extend_from_slice(&bytes[4..]);
            }
            _ => {
                self.bytes.push(major | 27);
                self.bytes.extend_from_slice(&bytes);
            }
        }
    }

    pub(crate) fn uint(&mut self, value: u64) {
        self.head(0, value);
    }

    pub(crate) fn bytes(&mut self, value: &[u8]) {
        self.head(2, value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    pub(crate) fn text(&mut self, value: &str) {
        self.head(3, value.len() as u64);
        self.bytes.extend_from_slice(value.as_bytes());
    }

    pub(crate) fn array(&mut self, entries: usize) {
        self.head(4, entries as u64);
    }

    pub(crate) fn map(&mut self, entries: usize) {
        self.head(5, entries as u64);
    }

    pub(crate) fn bool(&mut self, value: bool) {
        self.bytes.push(if value { 0xf5 } else { 0xf4 });
    }

    /// Entries of a map that were written elsewhere.
    pub(crate) fn raw(&mut self, entries: &[u8]) {
        self.bytes.extend_from_slice(entries);
    }

    pub(crate) fn texts(&mut self, values: &[String]) {
        self.array(values.len());
        values.iter().for_each(|value| self.text(value));
    }

    fn ids(&mut self, ids: &[Id]) {
        self.array(ids.len());
        ids.iter().for_each(|id| self.bytes(id.as_bytes()));
    }

    fn pair(&mut self, (first, second): (u32, u32)) {
        self.array(2);
        self.uint(first.into());
        self.uint(second.into());
    }

    fn frame(&mut self, number: u64, members: usize) {
        self.map(1 + members);
        self.uint(key::TYPE);
        self.uint(number);
    }

    fn uint_member(&mut self, key: u64, value: u64) {
        self.uint(key);
        self.uint(value);
    }

    fn id_member(&mut self, key: u64, id: Id) {
        self.uint(key);
        self.bytes(id.as_bytes());
    }

    pub(crate) fn optional_text(&mut self, key: u64, value: Option<&str>) {
        if let Some(value) = value {
            self.uint(key);
            self.text(value);
        }
    }

    pub(crate) fn optional_uint(&mut self, key: u64, value: Option<u64>) {
        if let Some(value) = value {
            self.uint_member(key, value);
        }
    }
}

pub(crate) fn write_device(frame: &DeviceFrame) -> Vec<u8> {
    use frame_type::*;
    let mut w = Writer::with_capacity(64);
    match frame {
        DeviceFrame::Hello(hello) => {
            let optional = [
                hello.secret.is_some(),
                !hello.seen.is_empty(),
                hello.window.is_some(),
                hello.min_urgency.is_some(),
                hello.agent.is_some(),
            ];
            w.frame(
                HELLO,
                3 + optional.into_iter().map(usize::from).sum::<usize>(),
            );
            w.id_member(key::hello::DEVICE, hello.device);
            w.optional_text(
                key::hello::SECRET,
                hello.secret.as_ref().map(Secret::expose),
            );
            w.id_member(key::hello::INSTANCE, hello.instance);
            w.uint_member(key::hello::ATTEMPT, hello.attempt);
            if !hello.seen.is_empty() {
                w.uint(key::hello::SEEN);
                w.array(hello.seen.len());
                for seen in &hello.seen {
                    w.map(2);
                    w.id_member(key::seen::ID, seen.id);
                    w.uint_member(key::seen::VERDICT, seen.verdict.number());
                }
            }
            w.optional_uint(key::hello::WINDOW, hello.window.map(u64::from));
            w.optional_uint(
                key::hello::MIN_URGENCY,
                hello.min_urgency.map(Number::number),
            );
            w.optional_text(key::hello::AGENT, hello.agent.as_deref());
        }
        DeviceFrame::Ack(Ack::UpTo(seq)) => {
            w.frame(ACK, 1);
            w.uint_member(key::ack::UP_TO, *seq);
        }
        DeviceFrame::Ack(Ack::Ids(ids)) => {
            w.frame(ACK, 1);
            w.uint(key::ack::IDS);
            w.ids(ids);
        }
        DeviceFrame::Decline(decline) => {
            w.frame(DECLINE, 2);
            w.id_member(key::decline::ID, decline.id);
            w.uint(key::decline::REASON);
            w.text(&decline.reason);
        }
        DeviceFrame::Presence(presence) => {
            w.frame(PRESENCE, 1);
            w.uint_member(key::presence::STATE, presence.state.number());
        }
        DeviceFrame::Subscribe(topics) => write_topics(&mut w, SUBSCRIBE, topics),
        DeviceFrame::Unsubscribe(topics) => write_topics(&mut w, UNSUBSCRIBE, topics),
        DeviceFrame::Ping => w.frame(PING, 0),
        DeviceFrame::Bye => w.frame(BYE, 0),
    }
    w.into_bytes()
}

pub(crate) fn write_server(frame: &ServerFrame) -> Vec<u8> {
    use frame_type::*;
    let mut w = Writer::with_capacity(64);
    match frame {
        ServerFrame::Welcome(welcome) => {
            w.frame(WELCOME, 6);
            w.uint_member(key::welcome::SESSION, welcome.session);
            w.uint_member(key::welcome::PENDING, welcome.pending);
            w.uint_member(key::welcome::WINDOW, welcome.window.into());
            w.uint_member(key::welcome::MAX_BYTES, welcome.max_bytes.into());
            w.uint(key::welcome::KEEP_ALIVE_S);
            w.pair(welcome.keep_alive_s.into());
            w.uint_member(key::welcome::NOW_MS, welcome.now_ms);
        }
        ServerFrame::Notify(notify) => {
            let content = &notify.content;
            write_notify_head(&mut w, content.entries(), notify.seq, notify.redelivered);
            write_notify_own(
                &mut w,
                notify.id,
                notify.accepted_ms,
                notify.expires_ms,
                notify.urgency,
            );
            content.write_entries(&mut w);
        }
        ServerFrame::Withdraw(withdraw) => {
            w.frame(WITHDRAW, 1);
            w.uint(key::withdraw::IDS);
            w.ids(&withdraw.ids);
        }
        ServerFrame::Pong => w.frame(PONG, 0),
        ServerFrame::Subscribed(topics) => write_topics(&mut w, SUBSCRIBED, topics),
        ServerFrame::Goaway(goaway) => {
            w.frame(GOAWAY, 2 + usize::from(goaway.endpoint.is_some()));
            w.uint_member(key::goaway::REASON, goaway.reason.number());
            w.uint(key::goaway::RECONNECT_MS);
            w.pair(goaway.reconnect_ms.into());
            w.optional_text(key::goaway::ENDPOINT, goaway.endpoint.as_deref());
        }
        ServerFrame::Error(error) => {
            w.frame(ERROR, 3);
            w.uint(key::error::CODE);
            w.text(&error.code);
            w.uint(key::error::MESSAGE);
            w.text(&error.message);
            w.uint_member(key::error::RETRY, error.retry.number());
        }
    }
    w.into_bytes()
}

fn write_topics(w: &mut Writer, number: u64, topics: &Topics) {
    w.frame(number, 1);
    w.uint(key::topics::TOPICS);
    w.texts(&topics.topics);
}

/// What of a `notify` differs from session to session: the header of the map, type, `seq` and `redelivered`.
pub(crate) fn write_notify_head(
    w: &mut Writer,
    content_entries: usize,
    seq: u64,
    redelivered: bool,
) {
    w.frame(frame_type::NOTIFY, NOTIFY_OWN_ENTRIES - 1 + content_entries);
    w.uint_member(key::notify::SEQ, seq);
    w.uint(key::notify::REDELIVERED);
    w.bool(redelivered);
}

/// What all sessions share beside the content.
pub(crate) fn write_notify_own(
    w: &mut Writer,
    id: Id,
    accepted_ms: u64,
    expires_ms: u64,
    urgency: Urgency,
) {
    w.id_member(key::notify::ID, id);
    w.uint_member(key::notify::ACCEPTED_MS, accepted_ms);
    w.uint_member(key::notify::EXPIRES_MS, expires_ms);
    w.uint_member(key::notify::URGENCY, urgency.number());
}

type Result<T, E = DecodeError> = std::result::Result<T, E>;

pub(crate) fn read_device(bytes: &[u8]) -> Result<Decoded<DeviceFrame>> {
    use frame_type::*;
    Ok(Decoded::Frame(match read_type(bytes)? {
        HELLO => DeviceFrame::Hello(read_hello(bytes)?),
        ACK => DeviceFrame::Ack(read_ack(bytes)?),
        DECLINE => DeviceFrame::Decline(read_decline(bytes)?),
        PRESENCE => {
            let mut state = None;
            read_map(bytes, |key, d| match key {
                key::presence::STATE => set(&mut state, "state", enumeration(d, "state")),
                _ => Ok(false),
            })?;
            DeviceFrame::Presence(Presence {
                state: needed(state, "state")?,
            })
        }
        SUBSCRIBE => DeviceFrame::Subscribe(read_topics(bytes)?),
        UNSUBSCRIBE => DeviceFrame::Unsubscribe(read_topics(bytes)?),
        PING => DeviceFrame::Ping,
        BYE => DeviceFrame::Bye,
        _ => return Ok(Decoded::Skipped),
    }))
}

pub(crate) fn read_server(bytes: &[u8]) -> Result<Decoded<ServerFrame>> {
    use frame_type::*;
    Ok(Decoded::Frame(match read_type(bytes)? {
        WELCOME => ServerFrame::Welcome(read_welcome(bytes)?),
        NOTIFY => ServerFrame::Notify(read_notify(bytes)?),
        WITHDRAW => {
            let mut withdrawn = None;
            read_map(bytes, |key, d| match key {
                key::withdraw::IDS => set(&mut withdrawn, "ids", ids(d, "ids", WITHDRAW_IDS_MAX)),
                _ => Ok(false),
            })?;
            ServerFrame::Withdraw(Withdraw {
                ids: needed(withdrawn, "ids")?,
            })
        }
        PONG => ServerFrame::Pong,
        SUBSCRIBED => ServerFrame::Subscribed(read_topics(bytes)?),
        GOAWAY => ServerFrame::Goaway(read_goaway(bytes)?),
        ERROR => ServerFrame::Error(read_error(bytes)?),
        _ => return Ok(Decoded::Skipped),
    }))
}

/// Reads exactly one content map.
pub(crate) fn read_content(bytes: &[u8]) -> Result<Content> {
    let mut content = Content::default();
    check_content_header(bytes)?;
    let mut members = ContentMembers::default();
    let end = read_entries(bytes, |key, d| members.read(&mut content, key, d))?;
    if end == bytes.len() {
        Ok(content)
    } else {
        Err(DecodeError::TrailingBytes)
    }
}

/// Number of entries, when these bytes are exactly one well-formed content map: definite, at most 23 entries, every key in
/// the range that is set aside for content. Reads no values.
pub(crate) fn check_content(bytes: &[u8]) -> Result<usize> {
    let entries = check_content_header(bytes)?;
    let mut in_range = true;
    let end = read_entries(bytes, |key, _| {
        in_range &= (CONTENT_KEY_MIN..=CONTENT_KEY_MAX).contains(&key);
        Ok(false)
    })?;
    match (in_range, end == bytes.len()) {
        (true, true) => Ok(entries),
        (_, false) => Err(DecodeError::TrailingBytes),
        (false, true) => Err(DecodeError::OutOfRange("content")),
    }
}

fn check_content_header(bytes: &[u8]) -> Result<usize> {
    match bytes.first() {
        Some(&header @ 0xa0..=0xb7) => Ok(usize::from(header - 0xa0)),
        Some(_) => Err(DecodeError::NotAMap),
        None => Err(DecodeError::NotCbor(0)),
    }
}

/// Finds the frame's type, and makes sure of all that holds for every frame: one map, nothing behind it, not too deep.
fn read_type(bytes: &[u8]) -> Result<u64> {
    let mut number = None;
    let end = read_entries(bytes, |key, d| match key {
        key::TYPE => set(&mut number, "type", uint(d, "type")),
        _ => Ok(false),
    })?;
    if end != bytes.len() {
        return Err(DecodeError::TrailingBytes);
    }
    needed(number, "type")
}

/// Walks through the entries of a frame whose type has been read.
fn read_map<'b>(
    bytes: &'b [u8],
    member: impl FnMut(u64, &mut Decoder<'b>) -> Result<bool>,
) -> Result<()> {
    read_entries(bytes, member).map(drop)
}

/// Walks through the entries of the map at the beginning; answers where it ends.
fn read_entries<'b>(
    bytes: &'b [u8],
    member: impl FnMut(u64, &mut Decoder<'b>) -> Result<bool>,
) -> Result<usize> {
    let mut decoder = Decoder::new(bytes);
    if bytes.is_empty() {
        return Err(DecodeError::NotCbor(0));
    }
    read_nested(&mut decoder, 1, member)?;
    Ok(decoder.position())
}

/// Walks through one map. `member` reads the value of a key that it knows and answers true, or leaves it alone and answers
/// false; then the value is skipped.
fn read_nested<'b>(
    d: &mut Decoder<'b>,
    depth: usize,
    mut member: impl FnMut(u64, &mut Decoder<'b>) -> Result<bool>,
) -> Result<()> {
    if d.datatype()
        .map_err(|_| DecodeError::NotCbor(d.position()))?
        != Type::Map
    {
        return Err(DecodeError::NotAMap);
    }
    let entries = d
        .map()
        .map_err(|_| DecodeError::NotCbor(d.position()))?
        .unwrap_or_default();
    for _ in 0..entries {
        let key = match d.datatype() {
            Ok(Type::U8 | Type::U16 | Type::U32 | Type::U64) => {
                d.u64().map_err(|_| DecodeError::NotCbor(d.position()))?
            }
            // No key of ours; another version's, perhaps.
            _ => {
                skip(d, depth)?;
                skip(d, depth)?;
                continue;
            }
        };
        if !member(key, d)? {
            skip(d, depth)?;
        }
    }
    Ok(())
}

/// Passes over one value, whatever it is.
#[expect(
    clippy::wildcard_enum_match_arm,
    reason = "every other type is a scalar, which the decoder passes over by itself"
)]
fn skip(d: &mut Decoder<'_>, depth: usize) -> Result<()> {
    let at = d.position();
    let broken = |_| DecodeError::NotCbor(at);
    let kind = d.datatype().map_err(broken)?;
    let (entries, values_per_entry) = match kind {
        Type::Array | Type::ArrayIndef => (d.array().map_err(broken)?, 1),
        Type::Map | Type::MapIndef => (d.map().map_err(broken)?, 2),
        Type::Tag => {
            d.tag().map_err(broken)?;
            (Some(1), 1)
        }
        Type::Break | Type::Unknown(_) => return Err(DecodeError::NotCbor(at)),
        _ => return d.skip().map_err(broken),
    };
    if depth >= DEPTH_MAX {
        return Err(DecodeError::TooDeep);
    }
    match entries {
        // A false count ends with the bytes: every value takes at least one.
        Some(entries) => {
            for _ in 0..entries {
                for _ in 0..values_per_entry {
                    skip(d, depth + 1)?;
                }
            }
        }
        None => {
            while d.datatype().map_err(broken)? != Type::Break {
                for _ in 0..values_per_entry {
                    skip(d, depth + 1)?;
                }
            }
            d.set_position(d.position() + 1);
        }
    }
    Ok(())
}

/// Keeps a member's value, once.
fn set<T>(slot: &mut Option<T>, name: &'static str, value: Result<T>) -> Result<bool> {
    match slot.replace(value?) {
        None => Ok(true),
        Some(_) => Err(DecodeError::Duplicate(name)),
    }
}

/// Keeps an optional member's value, once. `null` stands for absent.
fn set_optional<'b, T>(
    slot: &mut Option<Option<T>>,
    name: &'static str,
    d: &mut Decoder<'b>,
    read: impl FnOnce(&mut Decoder<'b>, &'static str) -> Result<T>,
) -> Result<bool> {
    let value = if matches!(d.datatype(), Ok(Type::Null)) {
        d.null().map_err(|_| DecodeError::WrongValue(name))?;
        Ok(None)
    } else {
        read(d, name).map(Some)
    };
    set(slot, name, value)
}

fn needed<T>(slot: Option<T>, name: &'static str) -> Result<T> {
    slot.ok_or(DecodeError::Missing(name))
}

/// Turns a reader's complaint into ours: cut short is not the same as of a wrong type.
fn complain(name: &'static str, at: usize) -> impl Fn(minicbor::decode::Error) -> DecodeError {
    move |error| {
        if error.is_end_of_input() {
            DecodeError::NotCbor(at)
        } else {
            DecodeError::WrongValue(name)
        }
    }
}

fn uint(d: &mut Decoder<'_>, name: &'static str) -> Result<u64> {
    let at = d.position();
    d.u64().map_err(complain(name, at))
}

fn small<T: TryFrom<u64>>(d: &mut Decoder<'_>, name: &'static str) -> Result<T> {
    T::try_from(uint(d, name)?).map_err(|_| DecodeError::OutOfRange(name))
}

fn boolean(d: &mut Decoder<'_>, name: &'static str) -> Result<bool> {
    let at = d.position();
    d.bool().map_err(complain(name, at))
}

fn text(d: &mut Decoder<'_>, name: &'static str) -> Result<String> {
    let at = d.position();
    d.str().map(str::to_owned).map_err(complain(name, at))
}

fn octets(d: &mut Decoder<'_>, name: &'static str) -> Result<bytes::Bytes> {
    let at = d.position();
    d.bytes()
        .map(bytes::Bytes::copy_from_slice)
        .map_err(complain(name, at))
}

fn id(d: &mut Decoder<'_>, name: &'static str) -> Result<Id> {
    let at = d.position();
    let bytes = d.bytes().map_err(complain(name, at))?;
    bytes
        .try_into()
        .map(Id)
        .map_err(|_| DecodeError::WrongValue(name))
}

fn enumeration<T: Number>(d: &mut Decoder<'_>, name: &'static str) -> Result<T> {
    T::from_number(uint(d, name)?).ok_or(DecodeError::WrongValue(name))
}

/// A definite array of at most `most` entries. The bound comes first, so that a false count reserves nothing.
fn array<'b, T>(
    d: &mut Decoder<'b>,
    name: &'static str,
    most: usize,
    mut read: impl FnMut(&mut Decoder<'b>, &'static str) -> Result<T>,
) -> Result<Vec<T>> {
    let at = d.position();
    let entries = d
        .array()
        .map_err(complain(name, at))?
        .ok_or(DecodeError::WrongValue(name))?;
    if entries > most as u64 {
        return Err(DecodeError::TooMany(name));
    }
    (0..entries).map(|_| read(d, name)).collect()
}

fn ids(d: &mut Decoder<'_>, name: &'static str, most: usize) -> Result<Vec<Id>> {
    array(d, name, most, id)
}

fn pair(d: &mut Decoder<'_>, name: &'static str) -> Result<(u32, u32)> {
    match array(d, name, 2, small::<u32>)?[..] {
        [first, second] => Ok((first, second)),
        _ => Err(DecodeError::WrongValue(name)),
    }
}

fn read_hello(bytes: &[u8]) -> Result<Hello> {
    let (mut device, mut instance, mut attempt) = (None, None, None);
    let (mut secret, mut seen, mut window, mut min_urgency, mut agent) =
        (None, None, None, None, None);
    read_map(bytes, |key, d| match key {
        key::hello::DEVICE => set(&mut device, "device", id(d, "device")),
        key::hello::SECRET => set_optional(&mut secret, "secret", d, text),
        key::hello::INSTANCE => set(&mut instance, "instance", id(d, "instance")),
        key::hello::ATTEMPT => set(&mut attempt, "attempt", uint(d, "attempt")),
        key::hello::SEEN => set_optional(&mut seen, "seen", d, |d, name| {
            array(d, name, SEEN_MAX, read_seen)
        }),
        key::hello::WINDOW => set_optional(&mut window, "window", d, small::<u16>),
        key::hello::MIN_URGENCY => set_optional(&mut min_urgency, "min_urgency", d, enumeration),
        key::hello::AGENT => set_optional(&mut agent, "agent", d, text),
        _ => Ok(false),
    })?;
    Ok(Hello {
        device: needed(device, "device")?,
        secret: secret.flatten().map(Secret),
        instance: needed(instance, "instance")?,
        attempt: needed(attempt, "attempt")?,
        seen: seen.flatten().unwrap_or_default(),
        window: window.flatten(),
        min_urgency: min_urgency.flatten(),
        agent: agent.flatten(),
    })
}

fn read_seen(d: &mut Decoder<'_>, name: &'static str) -> Result<Seen> {
    // hello, seen, entry
    const DEPTH: usize = 3;
    let (mut seen_id, mut verdict) = (None, None);
    let read = read_nested(d, DEPTH, |key, d| match key {
        key::seen::ID => set(&mut seen_id, "id", id(d, "id")),
        key::seen::VERDICT => set(&mut verdict, "verdict", enumeration(d, "verdict")),
        _ => Ok(false),
    });
    match read {
        Err(DecodeError::NotAMap) => Err(DecodeError::WrongValue(name)),
        Err(error) => Err(error),
        Ok(()) => Ok(Seen {
            id: needed(seen_id, "id")?,
            verdict: needed(verdict, "verdict")?,
        }),
    }
}

fn read_ack(bytes: &[u8]) -> Result<Ack> {
    let (mut up_to, mut acknowledged) = (None, None);
    read_map(bytes, |key, d| match key {
        key::ack::UP_TO => set_optional(&mut up_to, "up_to", d, uint),
        key::ack::IDS => set_optional(&mut acknowledged, "ids", d, |d, name| {
            ids(d, name, ACK_IDS_MAX)
        }),
        _ => Ok(false),
    })?;
    match (up_to.flatten(), acknowledged.flatten()) {
        (Some(seq), None) => Ok(Ack::UpTo(seq)),
        (None, Some(ids)) => Ok(Ack::Ids(ids)),
        (None, None) => Err(DecodeError::Missing("up_to")),
        (Some(_), Some(_)) => Err(DecodeError::WrongValue("ids")),
    }
}

fn read_decline(bytes: &[u8]) -> Result<Decline> {
    let (mut declined, mut reason) = (None, None);
    read_map(bytes, |key, d| match key {
        key::decline::ID => set(&mut declined, "id", id(d, "id")),
        key::decline::REASON => set(&mut reason, "reason", text(d, "reason")),
        _ => Ok(false),
    })?;
    Ok(Decline {
        id: needed(declined, "id")?,
        reason: needed(reason, "reason")?,
    })
}

fn read_topics(bytes: &[u8]) -> Result<Topics> {
    let mut topics = None;
    read_map(bytes, |key, d| match key {
        key::topics::TOPICS => set(&mut topics, "topics", array(d, "topics", TOPICS_MAX, text)),
        _ => Ok(false),
    })?;
    Ok(Topics {
        topics: needed(topics, "topics")?,
    })
}

fn read_welcome(bytes: &[u8]) -> Result<Welcome> {
    let (mut session, mut pending, mut window, mut max_bytes, mut keep_alive, mut now) =
        (None, None, None, None, None, None);
    read_map(bytes, |key, d| match key {
        key::welcome::SESSION => set(&mut session, "session", uint(d, "session")),
        key::welcome::PENDING => set(&mut pending, "pending", uint(d, "pending")),
        key::welcome::WINDOW => set(&mut window, "window", small(d, "window")),
        key::welcome::MAX_BYTES => set(&mut max_bytes, "max_bytes", small(d, "max_bytes")),
        key::welcome::KEEP_ALIVE_S => set(&mut keep_alive, "keep_alive_s", pair(d, "keep_alive_s")),
        key::welcome::NOW_MS => set(&mut now, "now_ms", uint(d, "now_ms")),
        _ => Ok(false),
    })?;
    Ok(Welcome {
        session: needed(session, "session")?,
        pending: needed(pending, "pending")?,
        window: needed(window, "window")?,
        max_bytes: needed(max_bytes, "max_bytes")?,
        keep_alive_s: needed(keep_alive, "keep_alive_s")?.into(),
        now_ms: needed(now, "now_ms")?,
    })
}

fn read_notify(bytes: &[u8]) -> Result<Notify> {
    let (mut seq, mut redelivered, mut notify_id) = (None, None, None);
    let (mut accepted, mut expires, mut urgency) = (None, None, None);
    let mut content = Content::default();
    let mut members = ContentMembers::default();
    read_map(bytes, |key, d| match key {
        key::notify::SEQ => set(&mut seq, "seq", uint(d, "seq")),
        key::notify::REDELIVERED => set(&mut redelivered, "redelivered", boolean(d, "redelivered")),
        key::notify::ID => set(&mut notify_id, "id", id(d, "id")),
        key::notify::ACCEPTED_MS => set(&mut accepted, "accepted_ms", uint(d, "accepted_ms")),
        key::notify::EXPIRES_MS => set(&mut expires, "expires_ms", uint(d, "expires_ms")),
        key::notify::URGENCY => set(&mut urgency, "urgency", enumeration(d, "urgency")),
        _ => members.read(&mut content, key, d),
    })?;
    Ok(Notify {
        seq: needed(seq, "seq")?,
        redelivered: needed(redelivered, "redelivered")?,
        id: needed(notify_id, "id")?,
        accepted_ms: needed(accepted, "accepted_ms")?,
        expires_ms: needed(expires, "expires_ms")?,
        urgency: needed(urgency, "urgency")?,
        content,
    })
}

/// Which content members have been read, `null` ones too.
#[derive(Default)]
struct ContentMembers {
    read: u64,
}

impl ContentMembers {
    fn read<'b>(&mut self, content: &mut Content, key: u64, d: &mut Decoder<'b>) -> Result<bool> {
        use content::key::*;
        let name = match key {
            TITLE..=TOPIC => Content::MEMBERS[(key - TITLE) as usize],
            _ => return Ok(false),
        };
        if self.read & (1 << key) != 0 {
            return Err(DecodeError::Duplicate(name));
        }
        self.read |= 1 << key;
        if matches!(d.datatype(), Ok(Type::Null)) {
            return Ok(false);
        }
        match key {
            TITLE => content.title = Some(text(d, name)?),
            BODY => content.body = Some(text(d, name)?),
            SOUND => content.sound = Some(text(d, name)?),
            BADGE => content.badge = Some(small(d, name)?),
            VIBRATE_MS => content.vibrate_ms = Some(small(d, name)?),
            CATEGORY => content.category = Some(text(d, name)?),
            SYNC => content.sync = Some(array(d, name, SYNC_MAX, text)?),
            DATA => content.data = Some(octets(d, name)?),
            ENCODING => {
                content.encoding = match text(d, name)? == Encoding::Aes128Gcm.name() {
                    true => Some(Encoding::Aes128Gcm),
                    false => return Err(DecodeError::WrongValue(name)),
                }
            }
            TOPIC => {
                let topic = text(d, name)?;
                if topic.len() > TOPIC_BYTES_MAX {
                    return Err(DecodeError::Length(name));
                }
                content.topic = Some(topic);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn read_goaway(bytes: &[u8]) -> Result<Goaway> {
    let (mut reason, mut reconnect, mut endpoint) = (None, None, None);
    read_map(bytes, |key, d| match key {
        key::goaway::REASON => set(&mut reason, "reason", enumeration(d, "reason")),
        key::goaway::RECONNECT_MS => set(&mut reconnect, "reconnect_ms", pair(d, "reconnect_ms")),
        key::goaway::ENDPOINT => set_optional(&mut endpoint, "endpoint", d, text),
        _ => Ok(false),
    })?;
    Ok(Goaway {
        reason: needed(reason, "reason")?,
        reconnect_ms: needed(reconnect, "reconnect_ms")?.into(),
        endpoint: endpoint.flatten(),
    })
}

fn read_error(bytes: &[u8]) -> Result<ErrorFrame> {
    let (mut code, mut message, mut retry) = (None, None, None);
    read_map(bytes, |key, d| match key {
        key::error::CODE => set(&mut code, "code", text(d, "code")),
        key::error::MESSAGE => set(&mut message, "message", text(d, "message")),
        key::error::RETRY => set(&mut retry, "retry", enumeration(d, "retry")),
        _ => Ok(false),
    })?;
    Ok(ErrorFrame {
        code: needed(code, "code")?,
        message: needed(message, "message")?,
        retry: needed(retry, "retry")?,
    })
}
