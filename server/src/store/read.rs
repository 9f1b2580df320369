//! Reads: what the port asks, answered from one consistent view.
//!
//! A record that cannot be read is set aside and left out; only one of a later program fails the whole read, because
//! going on without it would be a guess. What rot leaves behind, such as a place in an index whose row is gone, is
//! noticed on the way and handed to the committer as a chore.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;

use super::engine::{Direction, Engine, EngineError};
use super::keys::{self, Key, Part};
use super::overlay::{Overlay, View};
use super::record::{self, Fault, Pair, PairStored};
use super::set_aside::SetAside;
use super::write::Chore;
use crate::delivery::{
    AppId, DeviceId, MailboxRead, MailboxView, Notification, PingId, RowKey, RowMeta,
    StoredMailbox, Withdrawal,
};
use crate::ports::{
    AppRecord, Audience, CallbackRecord, DeadLetter, DeviceFilter, DeviceRecord, Erasure,
    ExpiredRow, ExpiryCursor, IdempotencyRecord, KeyRecord, Member, Membership, OpenExpansion,
    OutcomeRecord, Page, PairState, ReadError, Seen, Span, Spans, Stamp,
};

impl From<EngineError> for ReadError {
    fn from(error: EngineError) -> ReadError {
        ReadError::Engine(error.to_string())
    }
}

/// Answers reads.
#[derive(Clone)]
pub(super) struct Reader {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) overlay: Arc<Overlay>,
    pub(super) aside: Arc<SetAside>,
}

/// What a walk is told about each entry, when looking at one may fail.
type TryVisit<'a> = &'a mut dyn FnMut(&[u8], &[u8]) -> Result<ControlFlow<()>, ReadError>;

/// Rows and what was read of them.
type Bodies = Vec<(RowKey, Option<Arc<Notification>>)>;

impl Reader {
    fn look(&self) -> Look<'_> {
        Look {
            view: self.overlay.view(&*self.engine),
            aside: &self.aside,
        }
    }

    pub(super) fn mailbox(
        &self,
        request: &MailboxRead,
        chores: &mut Vec<Chore>,
    ) -> Result<MailboxView, ReadError> {
        self.look().mailbox(request, chores)
    }

    /// How many keys there are of each kind, by their first letter.
    pub(super) fn census(&self) -> Result<BTreeMap<char, u64>, ReadError> {
        let mut census = BTreeMap::new();
        let (from, to) = (Key::from_slice(&[0]), Key::from_slice(&[u8::MAX]));
        self.look().each(&from, &to, Direction::Up, &mut |key, _| {
            let kind = key.first().map_or('?', |&kind| char::from(kind));
            *census.entry(kind).or_insert(0) += 1;
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(census)
    }

    pub(super) fn bodies(
        &self,
        device: DeviceId,
        rows: &[RowKey],
        chores: &mut Vec<Chore>,
    ) -> Result<Bodies, ReadError> {
        self.look().bodies(device, rows, chores)
    }

    pub(super) fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError> {
        self.look().withdrawals(device)
    }

    pub(super) fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError> {
        self.look().pairs(ping, after, limit)
    }

    pub(super) fn expired(
        &self,
        until_ms: u64,
        after: &ExpiryCursor,
        limit: usize,
        chores: &mut Vec<Chore>,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError> {
        self.look().expired(until_ms, after, limit, chores)
    }

    /// What ended at `from_ms` or later, oldest first, from a cursor on, and where the next page starts.
    pub(super) fn endings(
        &self,
        from_ms: u64,
        after: Option<Key>,
        limit: usize,
    ) -> Result<(Vec<OutcomeRecord>, Option<Key>), ReadError> {
        self.look().endings(from_ms, after, limit)
    }

    /// What can be forgotten: outcomes and idempotency keys older than `before_ms`, at most `limit`.
    /// Withdrawals and erasures that need not be kept any longer by `now_ms` are among them.
    pub(super) fn receipts(
        &self,
        before_ms: u64,
        now_ms: u64,
        limit: usize,
    ) -> Result<Vec<Chore>, ReadError> {
        self.look().receipts(before_ms, now_ms, limit)
    }

    /// What was erased, by the time until which that is kept, a page at a time: pass the key that the last page ended
    /// with.
    pub(super) fn erasures(
        &self,
        after: Option<&Key>,
        limit: usize,
    ) -> Result<Page<Erasure, Key>, ReadError> {
        self.look().erasures(after, limit)
    }

    pub(super) fn device(&self, id: DeviceId) -> Result<Option<DeviceRecord>, ReadError> {
        let key = keys::device(id);
        self.look()
            .get(&key, |value| record::device(&key, id, value))
    }

    pub(super) fn devices(
        &self,
        app: AppId,
        filter: &DeviceFilter,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceRecord, DeviceId>, ReadError> {
        let none = Page {
            items: Vec::new(),
            next: None,
        };
        let look = self.look();
        let (ids, next) = match (&filter.user, &filter.topic) {
            (Some(name), _) | (None, Some(name)) if name.len() > keys::USER_MAX => {
                return Ok(none);
            }
            (_, Some(topic)) => {
                let page = look.members(&keys::members(app, topic), after, limit)?;
                let now = page.items.into_iter().filter_map(|member| {
                    let open = member.spans.iter().any(|span| span.left.is_none());
                    open.then_some(member.device)
                });
                (now.collect(), page.next)
            }
            (Some(user), None) => look.device_ids(&keys::user_devices(app, user), after, limit)?,
            (None, None) => look.device_ids(&keys::app_devices(app), after, limit)?,
        };
        let mut items = Vec::with_capacity(ids.len());
        for id in ids {
            let key = keys::device(id);
            let found = look.get(&key, |value| record::device(&key, id, value))?;
            // Of a user and in a topic: the topic's list was walked over.
            items.extend(
                found.filter(|record| filter.user.as_ref().is_none_or(|user| *user == record.user)),
            );
        }
        Ok(Page { items, next })
    }

    pub(super) fn user_devices(
        &self,
        app: AppId,
        user: &str,
        limit: usize,
    ) -> Result<Vec<DeviceId>, ReadError> {
        if user.len() > keys::USER_MAX {
            return Ok(Vec::new());
        }
        let range = keys::user_devices(app, user);
        Ok(self.look().device_ids(&range, None, limit)?.0)
    }

    pub(super) fn topics(&self, device: DeviceId) -> Result<Vec<Membership>, ReadError> {
        let key = keys::topics(device);
        let found = self.look().get(&key, |value| record::topics(&key, value))?;
        Ok(found.map(|(_, topics)| topics).unwrap_or_default())
    }

    pub(super) fn spans(
        &self,
        app: AppId,
        device: DeviceId,
        topics: &[String],
    ) -> Result<Vec<Spans>, ReadError> {
        let look = self.look();
        topics
            .iter()
            .map(|topic| {
                let key = keys::member(app, topic, device);
                let found = look.get(&key, |value| record::spans(&key, value))?;
                Ok(found.unwrap_or_default())
            })
            .collect()
    }

    pub(super) fn members(
        &self,
        app: AppId,
        audience: &Audience,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError> {
        let range = match audience {
            Audience::Topic(topic) if topic.len() <= keys::USER_MAX => keys::members(app, topic),
            Audience::Everyone => keys::app_devices(app),
            Audience::Topic(_) | Audience::Listed { .. } => {
                return Ok(Page {
                    items: Vec::new(),
                    next: None,
                });
            }
        };
        self.look().members(&range, after, limit)
    }

    /// The summaries of all mailboxes by rising id, a page at a time; those that cannot be read are left out, as everywhere.
    pub(super) fn mailboxes(
        &self,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<StoredMailbox, DeviceId>, ReadError> {
        let look = self.look();
        let range = keys::summaries();
        let from = after.map_or_else(|| range.clone(), |device| keys::summary(device).after());
        let mut items = Vec::new();
        let (mut last, mut next, mut walked) = (None, None, 0);
        look.each(&from, &range.end(), Direction::Up, &mut |key, value| {
            if walked >= limit {
                next = last;
                return Ok(ControlFlow::Break(()));
            }
            walked += 1;
            let Some(device) = keys::parse_id(key).map(DeviceId) else {
                return Ok(ControlFlow::Continue(()));
            };
            last = Some(device);
            let summary = look.sound(key, value, record::summary(key, value))?;
            items.extend(summary.map(|summary| StoredMailbox {
                device,
                app: summary.app,
                count: summary.count,
                bytes: summary.bytes,
            }));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    /// Expansions that are not done. One whose head cannot be read is left out: nothing of it could go on.
    pub(super) fn expansions(
        &self,
        after: Option<(AppId, Stamp)>,
        limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError> {
        self.look().expansions(after, limit)
    }

    pub(super) fn chunk(
        &self,
        app: AppId,
        stamp: Stamp,
        number: u32,
    ) -> Result<Vec<DeviceId>, ReadError> {
        let key = keys::expansion_part(app, stamp, Part::Chunk(number));
        let found = self.look().get(&key, |value| record::chunk(&key, value))?;
        Ok(found.unwrap_or_default())
    }

    pub(super) fn seen(&self, devices: &[DeviceId]) -> Result<Vec<Option<Seen>>, ReadError> {
        let look = self.look();
        devices
            .iter()
            .map(|&device| {
                let key = keys::seen(device);
                look.get(&key, |value| record::seen(&key, value))
            })
            .collect()
    }

    pub(super) fn key(&self, id: [u8; 10]) -> Result<Option<KeyRecord>, ReadError> {
        let key = keys::api_key(id);
        self.look().get(&key, |value| record::api_key(&key, value))
    }

    pub(super) fn keys(&self) -> Result<Vec<KeyRecord>, ReadError> {
        self.look().all(&keys::api_keys(), record::api_key)
    }

    pub(super) fn callbacks(&self) -> Result<Vec<CallbackRecord>, ReadError> {
        self.look().all(&keys::callbacks(), record::callback)
    }

    pub(super) fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError> {
        self.look().dead_letters(app, after, limit)
    }

    pub(super) fn apps(&self) -> Result<Vec<AppRecord>, ReadError> {
        self.look().all(&keys::apps(), record::app)
    }

    pub(super) fn idempotency(
        &self,
        app: AppId,
        hash: [u8; 32],
    ) -> Result<Option<IdempotencyRecord>, ReadError> {
        let key = keys::idempotency(app, hash);
        self.look()
            .get(&key, |value| record::idempotency(&key, app, hash, value))
    }

    /// The number of the run that wrote last; 0 if there was none.
    pub(super) fn run(&self) -> Result<u32, ReadError> {
        let number = self
            .look()
            .get(keys::RUN, |value| record::number(keys::RUN, value))?;
        Ok(number.map_or(0, |number| u32::try_from(number).unwrap_or(u32::MAX)))
    }

    /// Which hash key the secrets were hashed with: the beginning of its mark. `None`: nobody said yet, or it is rotten.
    pub(super) fn hash_key(&self) -> Result<Option<u64>, ReadError> {
        self.look().get(keys::HASH_KEY, |value| {
            record::number(keys::HASH_KEY, value)
        })
    }
}

/// The ends of rows that a walk meets with few others in between, which is cheaper than to look for each of them: of one urgency, in
/// order, and at most every other one missing.
fn walkable(rows: &[RowKey]) -> Option<(RowKey, RowKey)> {
    let (first, last) = (*rows.first()?, *rows.last()?);
    let rise =
        |pair: &[RowKey]| pair[0].urgency == pair[1].urgency && pair[0].order < pair[1].order;
    let span = last.order.saturating_sub(first.order);
    (rows.len() > 1 && span < 2 * rows.len() as u64 && rows.windows(2).all(rise))
        .then_some((first, last))
}

/// One view, and what to do with what it shows.
struct Look<'a> {
    view: View<'a>,
    aside: &'a SetAside,
}

impl Look<'_> {
    /// What a record says; `None` if it was rotten, which is then known to the operator.
    fn sound<T>(
        &self,
        key: &[u8],
        value: &[u8],
        read: Result<T, Fault>,
    ) -> Result<Option<T>, ReadError> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(Fault::Newer(version)) => Err(ReadError::Newer(version)),
            Err(fault @ Fault::Rotten(_)) => {
                self.aside.record(key, value, fault);
                Ok(None)
            }
        }
    }

    fn get<T>(
        &self,
        key: &[u8],
        read: impl FnOnce(&[u8]) -> Result<T, Fault>,
    ) -> Result<Option<T>, ReadError> {
        match self.view.get(key)? {
            None => Ok(None),
            Some(value) => self.sound(key, &value, read(&value)),
        }
    }

    /// Every record of a range.
    fn all<T>(
        &self,
        range: &Key,
        read: impl Fn(&[u8], &[u8]) -> Result<T, Fault>,
    ) -> Result<Vec<T>, ReadError> {
        let mut items = Vec::new();
        self.each(range, &range.end(), Direction::Up, &mut |key, value| {
            items.extend(self.sound(key, value, read(key, value))?);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(items)
    }

    /// Walks over a range with a visitor that may fail.
    fn each(
        &self,
        from: &Key,
        to: &Key,
        direction: Direction,
        visit: TryVisit<'_>,
    ) -> Result<(), ReadError> {
        let mut outcome = Ok(());
        self.view.scan(
            from,
            to,
            direction,
            &mut |key, value| match visit(key, value) {
                Ok(flow) => flow,
                Err(error) => {
                    outcome = Err(error);
                    ControlFlow::Break(())
                }
            },
        )?;
        outcome
    }

    fn mailbox(
        &self,
        request: &MailboxRead,
        chores: &mut Vec<Chore>,
    ) -> Result<MailboxView, ReadError> {
        let device = request.device;
        let key = keys::summary(device);
        let summary = self.get(&key, |value| record::summary(&key, value))?;
        let mut rows: BTreeMap<u64, RowMeta> = BTreeMap::new();
        let mut complete = false;
        if request.all || request.lowest.is_some() {
            let (count, bytes) = match request.lowest {
                Some(lowest) if !request.all => (u64::from(lowest.count), lowest.bytes),
                _ => (u64::MAX, u64::MAX),
            };
            let (mut counted, mut sum) = (0u64, 0u64);
            complete = true;
            let range = keys::rows(device);
            self.each(&range, &range.end(), Direction::Up, &mut |key, value| {
                if counted >= count && sum >= bytes {
                    complete = false;
                    return Ok(ControlFlow::Break(()));
                }
                if let Some(meta) = self.row_meta(key, value, chores)? {
                    counted += 1;
                    sum = sum.saturating_add(u64::from(meta.size));
                    rows.insert(meta.key.order, meta);
                }
                Ok(ControlFlow::Continue(()))
            })?;
        }
        if !complete {
            if let Some(ping) = request.ping {
                let key = keys::pair(ping, device);
                let pair = self.get(&key, |value| record::pair(&key, value))?;
                if let Some(PairStored::Waiting { row, .. }) = pair.map(|pair| pair.state) {
                    self.add_row(device, row, &mut rows, chores)?;
                }
            }
            if let Some(collapse) = &request.collapse {
                let range = keys::collapses(device, collapse);
                let mut newest = Vec::new();
                self.each(&range, &range.end(), Direction::Down, &mut |key, value| {
                    if let (Some(order), Some(urgency)) = (
                        keys::parse_collapse(key),
                        self.sound(key, value, record::collapse(key, value))?,
                    ) {
                        newest.push(RowKey { urgency, order });
                    }
                    Ok(ControlFlow::Continue(()))
                })?;
                for row in newest {
                    if self.add_row(device, row, &mut rows, chores)? {
                        break;
                    }
                }
            }
            for row in &request.rows {
                self.add_row(device, *row, &mut rows, chores)?;
            }
        }
        Ok(MailboxView {
            summary,
            rows: rows.into_values().collect(),
            complete,
            withdrawals: match request.withdrawals {
                true => Some(self.withdrawals(device)?),
                false => None,
            },
        })
    }

    /// The meta of a row that a walk came by.
    fn row_meta(
        &self,
        key: &[u8],
        value: &[u8],
        chores: &mut Vec<Chore>,
    ) -> Result<Option<RowMeta>, ReadError> {
        let Some((device, row)) = keys::parse_row(key) else {
            self.aside
                .record(key, value, Fault::Rotten("no row has such a key"));
            return Ok(None);
        };
        let meta = record::row(key, row, value).map(|row| row.meta);
        let meta = self.sound(key, value, meta)?;
        if meta.is_none() {
            chores.push(Chore::DropRow { device, row });
        }
        Ok(meta)
    }

    fn add_row(
        &self,
        device: DeviceId,
        row: RowKey,
        rows: &mut BTreeMap<u64, RowMeta>,
        chores: &mut Vec<Chore>,
    ) -> Result<bool, ReadError> {
        let key = keys::row(device, row);
        let Some(value) = self.view.get(&key)? else {
            return Ok(false);
        };
        let Some(meta) = self.row_meta(&key, &value, chores)? else {
            return Ok(false);
        };
        rows.insert(meta.key.order, meta);
        Ok(true)
    }

    fn bodies(
        &self,
        device: DeviceId,
        rows: &[RowKey],
        chores: &mut Vec<Chore>,
    ) -> Result<Bodies, ReadError> {
        let mut found: Bodies = rows.iter().map(|row| (*row, None)).collect();
        let Some((first, last)) = walkable(rows) else {
            for (row, body) in &mut found {
                let key = keys::row(device, *row);
                if let Some(value) = self.view.get(&key)? {
                    *body = self.notification(&key, device, *row, &value, chores)?;
                }
            }
            return Ok(found);
        };
        let (from, to) = (keys::row(device, first), keys::row(device, last).after());
        let mut wanted = found.iter_mut().peekable();
        self.each(&from, &to, Direction::Up, &mut |key, value| {
            // Whatever else lies there is met by a walk over all of the mailbox.
            let Some((_, row)) = keys::parse_row(key) else {
                return Ok(ControlFlow::Continue(()));
            };
            while wanted.next_if(|(next, _)| next.order < row.order).is_some() {}
            if let Some((_, body)) = wanted.next_if(|(next, _)| *next == row) {
                *body = self.notification(key, device, row, value, chores)?;
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(found)
    }

    /// What a row says, with the body that it shares.
    fn notification(
        &self,
        key: &[u8],
        device: DeviceId,
        row: RowKey,
        value: &[u8],
        chores: &mut Vec<Chore>,
    ) -> Result<Option<Arc<Notification>>, ReadError> {
        let Some(stored) = self.sound(key, value, record::row(key, row, value))? else {
            chores.push(Chore::DropRow { device, row });
            return Ok(None);
        };
        if !stored.meta.shared {
            return Ok(Some(stored.notification(None)));
        }
        let key = keys::body(stored.meta.ping);
        let Some(body) = self.view.get(&key)? else {
            return Ok(None);
        };
        let content = self.sound(&key, &body, record::body(&key, &body))?;
        Ok(content.map(|content| stored.notification(Some(content))))
    }

    fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError> {
        let range = keys::withdrawals(device);
        let mut found = Vec::new();
        self.each(&range, &range.end(), Direction::Up, &mut |key, value| {
            if let (Some((_, ping)), Some((_, until_ms))) = (
                keys::parse_withdrawal(key),
                self.sound(key, value, record::withdrawal(key, value))?,
            ) {
                found.push(Withdrawal { ping, until_ms });
            }
            Ok(ControlFlow::Continue(()))
        })?;
        found.sort_by_key(|withdrawal| withdrawal.until_ms);
        Ok(found)
    }

    fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError> {
        let range = keys::pairs(ping);
        let from = match after {
            Some(device) => keys::pair(ping, device).after(),
            None => range.clone(),
        };
        let mut items = Vec::new();
        let (mut last, mut next) = (None, None);
        self.each(&from, &range.end(), Direction::Up, &mut |key, value| {
            if items.len() >= limit {
                next = last;
                return Ok(ControlFlow::Break(()));
            }
            if let Some((_, device)) = keys::parse_pair(key) {
                last = Some(device);
                if let Some(pair) = self.sound(key, value, record::pair(key, value))? {
                    items.push((pair.app, device, pair.state.state()));
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    fn expired(
        &self,
        until_ms: u64,
        after: &ExpiryCursor,
        limit: usize,
        chores: &mut Vec<Chore>,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError> {
        let from = match keys::parse_expiry(&after.0) {
            Some(_) => Key::from_slice(&after.0).after(),
            None => keys::expiries(0),
        };
        let to = match until_ms.checked_add(1) {
            Some(end) => keys::expiries(end),
            None => keys::expiries(u64::MAX).end(),
        };
        let mut items: Vec<ExpiredRow> = Vec::new();
        let (mut last, mut next) = (Bytes::new(), None);
        let mut walked = 0;
        self.each(&from, &to, Direction::Up, &mut |key, value| {
            if walked >= limit {
                next = Some(ExpiryCursor(last.to_vec()));
                return Ok(ControlFlow::Break(()));
            }
            walked += 1;
            last = Bytes::copy_from_slice(key);
            let Some((expires_ms, device, row)) = keys::parse_expiry(key) else {
                return Ok(ControlFlow::Continue(()));
            };
            if self.view.get(&keys::row(device, row))?.is_some() {
                items.push(ExpiredRow {
                    device,
                    key: row,
                    expires_ms,
                });
            } else {
                let ping = self.sound(key, value, record::expiry(key, value))?;
                chores.push(Chore::DropExpiry {
                    expires_ms,
                    device,
                    row,
                    ping,
                });
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError> {
        let from = match after {
            Some(number) => keys::dead_letter(app, number).after(),
            None => keys::dead_letters(app),
        };
        let end = keys::dead_letters(app).end();
        let mut items = Vec::new();
        let (mut last, mut next) = (after, None);
        self.each(&from, &end, Direction::Up, &mut |key, value| {
            if items.len() >= limit {
                next = last;
                return Ok(ControlFlow::Break(()));
            }
            if let Some((app, number)) = keys::parse_dead_letter(key) {
                last = Some(number);
                let letter = record::dead_letter(key, app, number, value);
                items.extend(self.sound(key, value, letter)?);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    fn erasures(&self, after: Option<&Key>, limit: usize) -> Result<Page<Erasure, Key>, ReadError> {
        let from = match after {
            Some(key) => key.clone().after(),
            None => keys::erasures(0),
        };
        let mut items = Vec::new();
        let (mut last, mut next) = (None, None);
        let end = keys::erasures(u64::MAX).end();
        self.each(&from, &end, Direction::Up, &mut |key, value| {
            if items.len() >= limit {
                next = last.take();
                return Ok(ControlFlow::Break(()));
            }
            last = Some(Key::from_slice(key));
            if let Some((until_ms, what)) = keys::parse_erasure(key) {
                items.extend(self.sound(
                    key,
                    value,
                    record::erasure(key, until_ms, what, value),
                )?);
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    fn endings(
        &self,
        from_ms: u64,
        after: Option<Key>,
        limit: usize,
    ) -> Result<(Vec<OutcomeRecord>, Option<Key>), ReadError> {
        let from = after.map_or_else(|| keys::endings(from_ms), Key::after);
        let to = keys::endings(u64::MAX).end();
        let mut records = Vec::new();
        let (mut last, mut next) = (None, None);
        let mut walked = 0;
        self.each(&from, &to, Direction::Up, &mut |key, _| {
            if walked >= limit {
                next = last.take();
                return Ok(ControlFlow::Break(()));
            }
            walked += 1;
            last = Some(Key::from_slice(key));
            let Some((at_ms, ping, device)) = keys::parse_ended(key) else {
                return Ok(ControlFlow::Continue(()));
            };
            let key = keys::pair(ping, device);
            let pair = self.get(&key, |value| record::pair(&key, value))?;
            if let Some(Pair {
                app,
                state: PairStored::Ended { outcome, at_ms: at },
            }) = pair
                && at == at_ms
            {
                records.push(OutcomeRecord {
                    app,
                    ping,
                    device,
                    outcome,
                    at_ms,
                    accepted_ms: None,
                });
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((records, next))
    }

    fn receipts(&self, before_ms: u64, now_ms: u64, limit: usize) -> Result<Vec<Chore>, ReadError> {
        let mut chores = Vec::new();
        let step = |chores: &Vec<Chore>| {
            if chores.len() >= limit {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        self.each(
            &keys::endings(0),
            &keys::endings(before_ms),
            Direction::Up,
            &mut |key, _| {
                if step(&chores).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                if let Some((at_ms, ping, device)) = keys::parse_ended(key) {
                    chores.push(Chore::DropReceipt {
                        at_ms,
                        ping,
                        device,
                    });
                }
                Ok(ControlFlow::Continue(()))
            },
        )?;
        self.each(
            &keys::idempotency_ages(0),
            &keys::idempotency_ages(before_ms),
            Direction::Up,
            &mut |key, _| {
                if step(&chores).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                if let Some((at_ms, app, key_hash)) = keys::parse_idempotency_age(key) {
                    let key = keys::idempotency(app, key_hash);
                    let current = self.get(&key, |value| {
                        record::idempotency(&key, app, key_hash, value)
                    })?;
                    chores.push(Chore::DropIdempotency {
                        at_ms,
                        app,
                        key_hash,
                        record: current.is_none_or(|current| current.at_ms == at_ms),
                    });
                }
                Ok(ControlFlow::Continue(()))
            },
        )?;
        self.each(
            &keys::withdrawal_ends(0),
            &keys::withdrawal_ends(now_ms),
            Direction::Up,
            &mut |key, _| {
                if step(&chores).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                if let Some((until_ms, device, ping)) = keys::parse_withdrawal_end(key) {
                    let place = keys::withdrawal(device, ping);
                    let told = self.get(&place, |value| record::withdrawal(&place, value))?;
                    chores.push(Chore::DropWithdrawal {
                        device,
                        withdrawal: Withdrawal { ping, until_ms },
                        record: told.is_none_or(|(_, until)| until == until_ms),
                    });
                }
                Ok(ControlFlow::Continue(()))
            },
        )?;
        self.each(
            &keys::erasures(0),
            &keys::erasures(now_ms),
            Direction::Up,
            &mut |key, _| {
                if step(&chores).is_break() {
                    return Ok(ControlFlow::Break(()));
                }
                if let Some((until_ms, what)) = keys::parse_erasure(key) {
                    chores.push(Chore::DropErasure { until_ms, what });
                }
                Ok(ControlFlow::Continue(()))
            },
        )?;
        Ok(chores)
    }

    /// Devices of a topic's list or an app's, with their spans.
    fn members(
        &self,
        range: &Key,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError> {
        let from = match after {
            Some(device) => Key::from_slice(&[&**range, &device.0].concat()).after(),
            None => range.clone(),
        };
        let mut items = Vec::new();
        let (mut last, mut next, mut walked) = (None, None, 0);
        self.each(&from, &range.end(), Direction::Up, &mut |key, value| {
            if walked >= limit {
                next = last;
                return Ok(ControlFlow::Break(()));
            }
            walked += 1;
            let Some(device) = keys::parse_device(key) else {
                return Ok(ControlFlow::Continue(()));
            };
            last = Some(device);
            let spans = if key.first() == Some(&b'e') {
                let joined = self.sound(key, value, record::joined(key, value))?;
                // One of the app's devices in any case.
                let joined = joined.unwrap_or(Stamp::FIRST);
                Some(Spans::from_buf([Span { joined, left: None }]))
            } else {
                self.sound(key, value, record::spans(key, value))?
            };
            items.extend(spans.map(|spans| Member { device, spans }));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Page { items, next })
    }

    fn expansions(
        &self,
        after: Option<(AppId, Stamp)>,
        limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError> {
        let mut from = match after {
            Some((app, stamp)) => keys::expansion(app, stamp).end(),
            None => keys::expansions(),
        };
        let end = keys::expansions().end();
        let mut items = Vec::new();
        loop {
            // One key of each is enough to find it; its chunks are passed over.
            let mut found = None;
            self.each(&from, &end, Direction::Up, &mut |key, _| {
                found = keys::parse_expansion(key);
                Ok(ControlFlow::Break(()))
            })?;
            let Some((app, stamp, _)) = found else {
                return Ok(Page { items, next: None });
            };
            from = keys::expansion(app, stamp).end();
            let key = keys::expansion_part(app, stamp, Part::Head);
            let head = self.get(&key, |value| record::expansion(&key, app, stamp, value))?;
            let Some(record) = head else {
                continue;
            };
            let key = keys::expansion_part(app, stamp, Part::Progress);
            let progress = self.get(&key, |value| record::progress(&key, value))?;
            items.push(OpenExpansion {
                record,
                progress: progress.unwrap_or_default(),
            });
            if items.len() >= limit {
                return Ok(Page {
                    items,
                    next: Some((app, stamp)),
                });
            }
        }
    }

    /// Devices of a range of one of their indexes, and where the next page starts.
    fn device_ids(
        &self,
        range: &Key,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<(Vec<DeviceId>, Option<DeviceId>), ReadError> {
        let from = match after {
            Some(device) => Key::from_slice(&[&**range, &device.0].concat()).after(),
            None => range.clone(),
        };
        let mut ids: Vec<DeviceId> = Vec::new();
        let mut next = None;
        self.each(&from, &range.end(), Direction::Up, &mut |key, _| {
            if ids.len() >= limit {
                next = ids.last().copied();
                return Ok(ControlFlow::Break(()));
            }
            ids.extend(keys::parse_device(key));
            Ok(ControlFlow::Continue(()))
        })?;
        Ok((ids, next))
    }
}
