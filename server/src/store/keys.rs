//! The only place that knows keys.
//!
//! One keyspace, sorted by bytes, serves every engine; the first byte says what a key leads to. Numbers are big endian,
//! so that their order is the order of the bytes; texts of any length are led by their length, so that no key of
//! one range is the beginning of another's.
//!
//! | key | value |
//! | --- | --- |
//! | `r` device urgency order | a row: its meta and, unless it is shared, its body |
//! | `b` ping | the body that the rows of a ping share |
//! | `s` device | the summary of a mailbox; it exists as long as the device does |
//! | `x` expiry device urgency order | the ping of the row: rows by the time they run out |
//! | `c` device collapse-key order | the urgency of the row: rows by replacement key, the newest last |
//! | `p` ping device | what is known of one notification of a ping |
//! | `t` time ping device | nothing: ended notifications by age |
//! | `d` device | a device as the backend registered it |
//! | `l` device | when and how the device was last seen |
//! | `e` app device | the devices of an app, and when each became one (nothing: before that was kept) |
//! | `u` app user device | nothing: the devices of a user |
//! | `h` device | the topics of a device |
//! | `g` app topic device | when the device was in the topic: the members of a topic |
//! | `o` app stamp part | a ping on its way to an audience: what was accepted, how far it is, chunks of a list |
//! | `a` app | an app |
//! | `k` key id | an API key |
//! | `i` app key hash | a used idempotency key |
//! | `j` time app key hash | nothing: used idempotency keys by age |
//! | `z` until kind subject | what was erased, by the time until which that is kept |
//! | `f` app | where its outcomes are posted |
//! | `v` app number | a batch of outcomes that could not be posted |
//! | `m` name | what the store keeps of itself |

use std::ops::Deref;

use smallvec::SmallVec;

use crate::delivery::{AppId, CollapseKey, DeviceId, PingId, RowKey, Urgency};
use crate::ports::{Erased, Stamp};

/// Bytes of a key that need no allocation; longer are only those with a user or a long replacement key.
const INLINE: usize = 48;

/// The longest key that is ever built: `u` app length user(255) device.
pub(super) const KEY_MAX: usize = 1 + 4 + 1 + 255 + 16;

/// The longest user name that fits a key; the runtime allows no longer one.
pub(super) const USER_MAX: usize = 255;

/// A key, or the beginning of one.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key(SmallVec<[u8; INLINE]>);

impl Key {
    fn new(room: u8) -> Key {
        let mut bytes = SmallVec::new();
        bytes.push(room);
        Key(bytes)
    }

    fn with(mut self, part: &[u8]) -> Key {
        self.0.extend_from_slice(part);
        self
    }

    fn with_text(self, text: &str) -> Key {
        let length = u8::try_from(text.len()).unwrap_or(u8::MAX);
        self.with(&[length]).with(text.as_bytes())
    }

    /// The first key that is greater than every key which begins like this one.
    pub(super) fn end(&self) -> Key {
        let mut end = self.0.clone();
        while let Some(last) = end.last_mut() {
            if *last < u8::MAX {
                *last += 1;
                break;
            }
            end.pop();
        }
        Key(end)
    }

    /// The key right behind this one: where a scan goes on that stopped here.
    pub(super) fn after(self) -> Key {
        self.with(&[0])
    }

    /// A key that was read from an engine.
    pub(super) fn from_slice(bytes: &[u8]) -> Key {
        Key(SmallVec::from_slice(bytes))
    }
}

impl Deref for Key {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Whether a key is written once and never again after it was removed, because it names an acceptance number.
/// Such a key that is written and removed between two looks of the engine need never reach it.
pub(super) fn is_written_once(key: &[u8]) -> bool {
    matches!(key.first(), Some(b'r' | b'x' | b'c'))
}

/// A row.
pub(super) fn row(device: DeviceId, row: RowKey) -> Key {
    rows(device)
        .with(&[row.urgency.rank()])
        .with(&row.order.to_be_bytes())
}

/// Every row of a mailbox, lowest urgency first, oldest first within it.
pub(super) fn rows(device: DeviceId) -> Key {
    Key::new(b'r').with(&device.0)
}

/// Which row a key of [`rows`] leads to.
pub(super) fn parse_row(key: &[u8]) -> Option<(DeviceId, RowKey)> {
    let rest = key.strip_prefix(b"r")?;
    let (device, rest) = take::<16>(rest)?;
    Some((DeviceId(device), parse_row_key(rest)?))
}

fn parse_row_key(rest: &[u8]) -> Option<RowKey> {
    let (rank, rest) = take::<1>(rest)?;
    let (order, rest) = take::<8>(rest)?;
    let urgency = Urgency::from_rank(rank[0])?;
    rest.is_empty().then_some(RowKey {
        urgency,
        order: u64::from_be_bytes(order),
    })
}

/// The shared body of a ping.
pub(super) fn body(ping: PingId) -> Key {
    Key::new(b'b').with(&ping.0)
}

/// The summaries of all mailboxes.
pub(super) fn summaries() -> Key {
    Key::new(b's')
}

/// The summary of a mailbox.
pub(super) fn summary(device: DeviceId) -> Key {
    Key::new(b's').with(&device.0)
}

/// A row by its expiry.
pub(super) fn expiry(expires_ms: u64, device: DeviceId, row: RowKey) -> Key {
    expiries(expires_ms)
        .with(&device.0)
        .with(&[row.urgency.rank()])
        .with(&row.order.to_be_bytes())
}

/// Where the rows begin that expire at this time or later.
pub(super) fn expiries(expires_ms: u64) -> Key {
    Key::new(b'x').with(&expires_ms.to_be_bytes())
}

/// What an expiry key says.
pub(super) fn parse_expiry(key: &[u8]) -> Option<(u64, DeviceId, RowKey)> {
    let rest = key.strip_prefix(b"x")?;
    let (expires, rest) = take::<8>(rest)?;
    let (device, rest) = take::<16>(rest)?;
    Some((
        u64::from_be_bytes(expires),
        DeviceId(device),
        parse_row_key(rest)?,
    ))
}

/// A row by its replacement key.
pub(super) fn collapse(device: DeviceId, key: &CollapseKey, order: u64) -> Key {
    collapses(device, key).with(&order.to_be_bytes())
}

/// The rows of a mailbox with one replacement key, by order.
pub(super) fn collapses(device: DeviceId, key: &CollapseKey) -> Key {
    const { assert!(CollapseKey::MAX_BYTES <= u8::MAX as usize) };
    Key::new(b'c').with(&device.0).with_text(key.as_str())
}

/// The order at the end of a key of [`collapses`].
pub(super) fn parse_collapse(key: &[u8]) -> Option<u64> {
    let at = key.len().checked_sub(8)?;
    let (order, _) = take::<8>(key.get(at..)?)?;
    Some(u64::from_be_bytes(order))
}

/// What is known of one notification of a ping.
pub(super) fn pair(ping: PingId, device: DeviceId) -> Key {
    pairs(ping).with(&device.0)
}

/// Everything that is known of a ping.
pub(super) fn pairs(ping: PingId) -> Key {
    Key::new(b'p').with(&ping.0)
}

/// Whom a key of [`pairs`] is about.
pub(super) fn parse_pair(key: &[u8]) -> Option<(PingId, DeviceId)> {
    let rest = key.strip_prefix(b"p")?;
    let (ping, rest) = take::<16>(rest)?;
    let (device, rest) = take::<16>(rest)?;
    rest.is_empty().then_some((PingId(ping), DeviceId(device)))
}

/// An ended notification by its age.
pub(super) fn ended(at_ms: u64, ping: PingId, device: DeviceId) -> Key {
    endings(at_ms).with(&ping.0).with(&device.0)
}

/// Where the notifications begin that ended at this time or later.
pub(super) fn endings(at_ms: u64) -> Key {
    Key::new(b't').with(&at_ms.to_be_bytes())
}

/// What a key of [`endings`] says.
pub(super) fn parse_ended(key: &[u8]) -> Option<(u64, PingId, DeviceId)> {
    let rest = key.strip_prefix(b"t")?;
    let (at, rest) = take::<8>(rest)?;
    let (ping, rest) = take::<16>(rest)?;
    let (device, rest) = take::<16>(rest)?;
    rest.is_empty()
        .then_some((u64::from_be_bytes(at), PingId(ping), DeviceId(device)))
}

/// What a device is to take off the screen.
pub(super) fn withdrawal(device: DeviceId, ping: PingId) -> Key {
    withdrawals(device).with(&ping.0)
}

/// Everything that a device is to take off the screen.
pub(super) fn withdrawals(device: DeviceId) -> Key {
    Key::new(b'w').with(&device.0)
}

/// What a key of [`withdrawals`] says.
pub(super) fn parse_withdrawal(key: &[u8]) -> Option<(DeviceId, PingId)> {
    let rest = key.strip_prefix(b"w")?;
    let (device, rest) = take::<16>(rest)?;
    let (ping, rest) = take::<16>(rest)?;
    rest.is_empty().then_some((DeviceId(device), PingId(ping)))
}

/// A withdrawal by the time until which it is told.
pub(super) fn withdrawal_end(until_ms: u64, device: DeviceId, ping: PingId) -> Key {
    withdrawal_ends(until_ms).with(&device.0).with(&ping.0)
}

/// Where the withdrawals begin that are told until this time or longer.
pub(super) fn withdrawal_ends(until_ms: u64) -> Key {
    Key::new(b'y').with(&until_ms.to_be_bytes())
}

/// What a key of [`withdrawal_ends`] says.
pub(super) fn parse_withdrawal_end(key: &[u8]) -> Option<(u64, DeviceId, PingId)> {
    let rest = key.strip_prefix(b"y")?;
    let (until, rest) = take::<8>(rest)?;
    let (device, rest) = take::<16>(rest)?;
    let (ping, rest) = take::<16>(rest)?;
    rest.is_empty()
        .then_some((u64::from_be_bytes(until), DeviceId(device), PingId(ping)))
}

/// The id that a key of a summary, a shared body or a device consists of.
pub(super) fn parse_id(key: &[u8]) -> Option<[u8; 16]> {
    let (id, rest) = take::<16>(key.get(1..)?)?;
    rest.is_empty().then_some(id)
}

/// What a key of [`collapses`] says: the device, the replacement key, the order.
pub(super) fn parse_collapse_key(key: &[u8]) -> Option<(DeviceId, CollapseKey, u64)> {
    let (device, rest) = take::<16>(key.strip_prefix(b"c")?)?;
    let (length, rest) = take::<1>(rest)?;
    let (text, rest) = rest.split_at_checked(usize::from(length[0]))?;
    let (order, rest) = take::<8>(rest)?;
    let text = CollapseKey::new(str::from_utf8(text).ok()?)?;
    rest.is_empty()
        .then_some((DeviceId(device), text, u64::from_be_bytes(order)))
}

/// What a key of [`app_devices`] says.
pub(super) fn parse_app_device(key: &[u8]) -> Option<(AppId, DeviceId)> {
    let (app, rest) = take::<4>(key.strip_prefix(b"e")?)?;
    let (device, rest) = take::<16>(rest)?;
    rest.is_empty()
        .then_some((AppId(u32::from_be_bytes(app)), DeviceId(device)))
}

/// What a key of [`user_devices`] says.
pub(super) fn parse_user_device(key: &[u8]) -> Option<(AppId, &str, DeviceId)> {
    let (app, rest) = take::<4>(key.strip_prefix(b"u")?)?;
    let (length, rest) = take::<1>(rest)?;
    let (user, rest) = rest.split_at_checked(usize::from(length[0]))?;
    let (device, rest) = take::<16>(rest)?;
    let user = str::from_utf8(user).ok()?;
    rest.is_empty()
        .then_some((AppId(u32::from_be_bytes(app)), user, DeviceId(device)))
}

/// What a key of a used idempotency key says.
pub(super) fn parse_idempotency(key: &[u8]) -> Option<(AppId, [u8; 32])> {
    let (app, rest) = take::<4>(key.strip_prefix(b"i")?)?;
    let (hash, rest) = take::<32>(rest)?;
    rest.is_empty()
        .then_some((AppId(u32::from_be_bytes(app)), hash))
}

/// A device record.
pub(super) fn device(device: DeviceId) -> Key {
    Key::new(b'd').with(&device.0)
}

/// When a device was last seen.
pub(super) fn seen(device: DeviceId) -> Key {
    Key::new(b'l').with(&device.0)
}

/// A device among those of its app.
pub(super) fn app_device(app: AppId, device: DeviceId) -> Key {
    app_devices(app).with(&device.0)
}

/// The devices of an app.
pub(super) fn app_devices(app: AppId) -> Key {
    Key::new(b'e').with(&app.0.to_be_bytes())
}

/// A device among those of its user.
pub(super) fn user_device(app: AppId, user: &str, device: DeviceId) -> Key {
    user_devices(app, user).with(&device.0)
}

/// The devices of a user.
pub(super) fn user_devices(app: AppId, user: &str) -> Key {
    Key::new(b'u').with(&app.0.to_be_bytes()).with_text(user)
}

/// The device at the end of a key of [`app_devices`] or [`user_devices`].
pub(super) fn parse_device(key: &[u8]) -> Option<DeviceId> {
    let at = key.len().checked_sub(16)?;
    let (device, _) = take::<16>(key.get(at..)?)?;
    Some(DeviceId(device))
}

/// The topics of a device.
pub(super) fn topics(device: DeviceId) -> Key {
    Key::new(b'h').with(&device.0)
}

/// A device in a topic.
pub(super) fn member(app: AppId, topic: &str, device: DeviceId) -> Key {
    members(app, topic).with(&device.0)
}

/// The members of a topic.
pub(super) fn members(app: AppId, topic: &str) -> Key {
    Key::new(b'g').with(&app.0.to_be_bytes()).with_text(topic)
}

/// What a key of [`members`] says.
pub(super) fn parse_member(key: &[u8]) -> Option<(AppId, &str, DeviceId)> {
    let (app, rest) = take::<4>(key.strip_prefix(b"g")?)?;
    let (length, rest) = take::<1>(rest)?;
    let (topic, rest) = rest.split_at_checked(usize::from(length[0]))?;
    let (device, rest) = take::<16>(rest)?;
    let topic = str::from_utf8(topic).ok()?;
    rest.is_empty()
        .then_some((AppId(u32::from_be_bytes(app)), topic, DeviceId(device)))
}

/// The room of expansions.
pub(super) const EXPANSIONS: u8 = b'o';

/// A part of an expansion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// What was accepted.
    Head,
    /// How far it is.
    Progress,
    /// A chunk of its list.
    Chunk(u32),
}

/// A part of an expansion.
pub(super) fn expansion_part(app: AppId, stamp: Stamp, part: Part) -> Key {
    let key = expansion(app, stamp);
    match part {
        Part::Head => key.with(&[0]),
        Part::Progress => key.with(&[1]),
        Part::Chunk(number) => key.with(&[2]).with(&number.to_be_bytes()),
    }
}

/// Every part of an expansion, the head first.
pub(super) fn expansion(app: AppId, stamp: Stamp) -> Key {
    expansions()
        .with(&app.0.to_be_bytes())
        .with(&stamp.run.to_be_bytes())
        .with(&stamp.count.to_be_bytes())
}

/// Every expansion, those of an app in the order in which they were accepted.
pub(super) fn expansions() -> Key {
    Key::new(EXPANSIONS)
}

/// What a key of [`expansions`] says.
pub(super) fn parse_expansion(key: &[u8]) -> Option<(AppId, Stamp, Part)> {
    let (_, rest) = take::<1>(key).filter(|([room], _)| *room == EXPANSIONS)?;
    let (app, rest) = take::<4>(rest)?;
    let (run, rest) = take::<4>(rest)?;
    let (count, rest) = take::<8>(rest)?;
    let (kind, rest) = take::<1>(rest)?;
    let part = match (kind[0], rest) {
        (0, []) => Part::Head,
        (1, []) => Part::Progress,
        (2, number) => Part::Chunk(u32::from_be_bytes(number.try_into().ok()?)),
        _ => return None,
    };
    let stamp = Stamp {
        run: u32::from_be_bytes(run),
        count: u64::from_be_bytes(count),
    };
    Some((AppId(u32::from_be_bytes(app)), stamp, part))
}

/// An app.
pub(super) fn app(app: AppId) -> Key {
    apps().with(&app.0.to_be_bytes())
}

/// Every app.
pub(super) fn apps() -> Key {
    Key::new(b'a')
}

/// An API key.
pub(super) fn api_key(id: [u8; 10]) -> Key {
    api_keys().with(&id)
}

/// Every API key.
pub(super) fn api_keys() -> Key {
    Key::new(b'k')
}

/// Where the outcomes of an app are posted.
pub(super) fn callback(app: AppId) -> Key {
    callbacks().with(&app.0.to_be_bytes())
}

/// Every callback.
pub(super) fn callbacks() -> Key {
    Key::new(b'f')
}

/// A batch that could not be posted.
pub(super) fn dead_letter(app: AppId, number: u64) -> Key {
    dead_letters(app).with(&number.to_be_bytes())
}

/// Every batch of an app that could not be posted, the oldest first.
pub(super) fn dead_letters(app: AppId) -> Key {
    Key::new(b'v').with(&app.0.to_be_bytes())
}

/// Which one a key of [`dead_letters`] leads to.
pub(super) fn parse_dead_letter(key: &[u8]) -> Option<(AppId, u64)> {
    let (app, rest) = take::<4>(key.strip_prefix(b"v")?)?;
    let (number, rest) = take::<8>(rest)?;
    rest.is_empty()
        .then_some((AppId(u32::from_be_bytes(app)), u64::from_be_bytes(number)))
}

/// A used idempotency key.
pub(super) fn idempotency(app: AppId, hash: [u8; 32]) -> Key {
    Key::new(b'i').with(&app.0.to_be_bytes()).with(&hash)
}

/// A used idempotency key by its age.
pub(super) fn idempotency_age(at_ms: u64, app: AppId, hash: [u8; 32]) -> Key {
    idempotency_ages(at_ms)
        .with(&app.0.to_be_bytes())
        .with(&hash)
}

/// Where the idempotency keys begin that were used at this time or later.
pub(super) fn idempotency_ages(at_ms: u64) -> Key {
    Key::new(b'j').with(&at_ms.to_be_bytes())
}

/// What a key of [`idempotency_ages`] says.
pub(super) fn parse_idempotency_age(key: &[u8]) -> Option<(u64, AppId, [u8; 32])> {
    let rest = key.strip_prefix(b"j")?;
    let (at, rest) = take::<8>(rest)?;
    let (app, rest) = take::<4>(rest)?;
    let (hash, rest) = take::<32>(rest)?;
    rest.is_empty()
        .then_some((u64::from_be_bytes(at), AppId(u32::from_be_bytes(app)), hash))
}

/// The room of erasures.
pub(super) const ERASURES: u8 = b'z';

/// Kinds of what was erased, in keys and in files.
const ERASED_DEVICE: u8 = 1;
const ERASED_KEY: u8 = 2;
const ERASED_NOTIFICATION: u8 = 3;
const ERASED_USER: u8 = 4;
const ERASED_EXPANSION: u8 = 5;

/// What was erased as a number and bytes: the end of its key.
pub(super) fn erased(what: Erased) -> (u8, SmallVec<[u8; 32]>) {
    match what {
        Erased::Device(device) => (ERASED_DEVICE, SmallVec::from_slice(&device.0)),
        Erased::Key(id) => (ERASED_KEY, SmallVec::from_slice(&id)),
        Erased::Notification(ping, device) => {
            let mut both = SmallVec::from_slice(&ping.0);
            both.extend_from_slice(&device.0);
            (ERASED_NOTIFICATION, both)
        }
        Erased::User(hash) => (ERASED_USER, SmallVec::from_slice(&hash)),
        Erased::Expansion(ping) => (ERASED_EXPANSION, SmallVec::from_slice(&ping.0)),
    }
}

/// The reverse of [`erased`].
pub(super) fn parse_erased(kind: u8, subject: &[u8]) -> Option<Erased> {
    match kind {
        ERASED_DEVICE => subject
            .try_into()
            .ok()
            .map(|id| Erased::Device(DeviceId(id))),
        ERASED_KEY => subject.try_into().ok().map(Erased::Key),
        ERASED_NOTIFICATION => {
            let (ping, rest) = take::<16>(subject)?;
            let device = rest.try_into().ok()?;
            Some(Erased::Notification(PingId(ping), DeviceId(device)))
        }
        ERASED_USER => subject.try_into().ok().map(Erased::User),
        ERASED_EXPANSION => subject
            .try_into()
            .ok()
            .map(|id| Erased::Expansion(PingId(id))),
        _ => None,
    }
}

/// An erasure.
pub(super) fn erasure(until_ms: u64, what: Erased) -> Key {
    let (kind, subject) = erased(what);
    erasures(until_ms).with(&[kind]).with(&subject)
}

/// Where the erasures begin that are kept until this time or longer.
pub(super) fn erasures(until_ms: u64) -> Key {
    Key::new(ERASURES).with(&until_ms.to_be_bytes())
}

/// What a key of [`erasures`] says: until when, and what.
pub(super) fn parse_erasure(key: &[u8]) -> Option<(u64, Erased)> {
    let (_, rest) = take::<1>(key).filter(|([room], _)| *room == ERASURES)?;
    let (until, rest) = take::<8>(rest)?;
    let ([kind], subject) = take::<1>(rest)?;
    Some((u64::from_be_bytes(until), parse_erased(kind, subject)?))
}

/// The frame that the engine takes next. Written by the engines alone, in the batch that it describes; never in a
/// frame and never in a snapshot.
pub(super) const POSITION: &[u8] = b"mposition";

/// The number of the run.
pub(super) const RUN: &[u8] = b"mrun";

/// Which hash key the secrets were hashed with, told by the first bytes of its mark.
pub(super) const HASH_KEY: &[u8] = b"mhashkey";

/// The first `N` bytes and the rest.
fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    Some((*head, rest))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn device_id(n: u8) -> DeviceId {
        DeviceId([n; 16])
    }

    #[test]
    fn keys_of_a_mailbox_sort_by_urgency_and_then_by_order() {
        let key = |urgency, order| row(device_id(7), RowKey { urgency, order });
        let sorted = [
            key(Urgency::VeryLow, 300),
            key(Urgency::Low, 2),
            key(Urgency::Normal, 1),
            key(Urgency::Normal, 256),
            key(Urgency::High, 0),
        ];
        assert!(sorted.is_sorted());
    }

    #[test]
    fn what_a_key_says_is_read_back() {
        let row_key = RowKey {
            urgency: Urgency::High,
            order: 77,
        };
        let (d, p) = (device_id(3), PingId([9; 16]));
        assert_eq!(parse_row(&row(d, row_key)), Some((d, row_key)));
        assert_eq!(parse_expiry(&expiry(5, d, row_key)), Some((5, d, row_key)));
        assert_eq!(parse_pair(&pair(p, d)), Some((p, d)));
        assert_eq!(parse_ended(&ended(6, p, d)), Some((6, p, d)));
        assert_eq!(parse_withdrawal(&withdrawal(d, p)), Some((d, p)));
        let end = withdrawal_end(8, d, p);
        assert_eq!(parse_withdrawal_end(&end), Some((8, d, p)));
        let text = CollapseKey::new("score").unwrap();
        assert_eq!(parse_collapse(&collapse(d, &text, 12)), Some(12));
        assert_eq!(parse_device(&user_device(AppId(1), "ada", d)), Some(d));
        for what in [
            Erased::Device(d),
            Erased::Key([5; 10]),
            Erased::Notification(p, d),
            Erased::User([6; 32]),
            Erased::Expansion(p),
        ] {
            assert_eq!(parse_erasure(&erasure(9, what)), Some((9, what)));
        }
        let stamp = Stamp { run: 3, count: 9 };
        for part in [Part::Head, Part::Progress, Part::Chunk(7)] {
            assert_eq!(
                parse_expansion(&expansion_part(AppId(2), stamp, part)),
                Some((AppId(2), stamp, part))
            );
        }
        assert_eq!(
            parse_member(&member(AppId(1), "news/berlin", d)),
            Some((AppId(1), "news/berlin", d))
        );
        let collapsed = parse_collapse_key(&collapse(d, &text, 12))
            .map(|(d, key, n)| (d, key.as_str().to_owned(), n));
        assert_eq!(collapsed, Some((d, "score".to_owned(), 12)));
        assert_eq!(
            parse_user_device(&user_device(AppId(1), "ada", d)),
            Some((AppId(1), "ada", d))
        );
        assert_eq!(
            parse_app_device(&app_device(AppId(1), d)),
            Some((AppId(1), d))
        );
        assert_eq!(
            parse_dead_letter(&dead_letter(AppId(1), 7)),
            Some((AppId(1), 7))
        );
        assert_eq!(
            parse_idempotency(&idempotency(AppId(1), [4; 32])),
            Some((AppId(1), [4; 32]))
        );
        assert_eq!(parse_id(&summary(d)), Some(d.0));
        assert_eq!(
            parse_idempotency_age(&idempotency_age(8, AppId(2), [4; 32])),
            Some((8, AppId(2), [4; 32]))
        );
    }

    #[test]
    fn one_text_that_begins_like_another_has_a_range_of_its_own() {
        let (short, long) = (
            user_devices(AppId(1), "an"),
            user_device(AppId(1), "anna", device_id(0)),
        );
        assert!(!(*short <= *long && *long < *short.end()));
    }

    #[test]
    fn the_end_of_a_range_of_highest_bytes_is_carried_over() {
        let range = pairs(PingId([0xff; 16]));
        assert_eq!(&*range.end(), b"q");
    }

    #[test]
    fn no_key_is_longer_than_stated() {
        let user = "u".repeat(USER_MAX);
        assert_eq!(
            user_device(AppId(u32::MAX), &user, device_id(1)).len(),
            KEY_MAX
        );
    }

    #[test]
    fn foreign_bytes_are_no_key() {
        for bytes in [&b""[..], b"r", b"rshort", b"x", b"p0123456789abcdef"] {
            assert_eq!(parse_row(bytes), None);
            assert_eq!(parse_expiry(bytes), None);
            assert_eq!(parse_pair(bytes), None);
            assert_eq!(parse_ended(bytes), None);
            assert_eq!(parse_erasure(bytes), None);
            assert_eq!(parse_withdrawal(bytes), None);
            assert_eq!(parse_withdrawal_end(bytes), None);
            assert_eq!(parse_member(bytes), None);
            assert_eq!(parse_expansion(bytes), None);
            assert_eq!(parse_idempotency_age(bytes), None);
        }
    }
}
