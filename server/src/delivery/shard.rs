//! The mailboxes that are awake, their deadlines, and the frames between them and the disk.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::event::{Change, CommitFailure, Disk, Effect, Event};
use super::fair::FairQueue;
use super::ids::DeviceId;
use super::mailbox::{Context, Mailbox};
use super::policy::Policy;
use super::stock::{Stock, StoredMailbox, Tally};
use super::time::{Mono, Now};

/// How long the shard waits after a frame found no room before it offers again.
const ROOM_RETRY: Duration = Duration::from_secs(1);

/// What one frame of a shard may cost, in bytes as [`cost`] counts them: some milliseconds of a disk. What is offered beyond it
/// waits for the next frame, so that an app with much to write makes the frames of others no later than that. The last mailbox
/// that is taken may go beyond it.
const FRAME_COST_MAX: u64 = 4 << 20;

/// What one app may have written before the next has its turn.
const FRAME_QUANTUM: u32 = 64 << 10;

/// What a change costs besides the content: its row, its indexes, its share of the summary.
const CHANGE_COST: u64 = 256;

/// What changes of a mailbox cost, about as many bytes as the log writes for them.
fn cost(changes: &[Change]) -> u64 {
    changes
        .iter()
        .map(|change| match change {
            Change::Insert { notification, .. } => CHANGE_COST + u64::from(notification.size),
            Change::Remove { .. }
            | Change::Outcome { .. }
            | Change::Withdraw { .. }
            | Change::Summary { .. }
            | Change::Forget { .. }
            | Change::Cleared { .. } => CHANGE_COST,
        })
        .sum()
}

/// The mailboxes of one shard.
///
/// Call [`Shard::handle`] for each event and [`Shard::handle_deadlines`] when the moment of
/// [`Shard::next_deadline`] has come (earlier calls change nothing). While [`Shard::has_offers`], ask the store for a
/// place; when it is granted call [`Shard::seal`] and commit what it gives; one frame is outstanding at a time;
/// tell [`Shard::handle_committed`] what became of it. After each call the effects are in the buffer, in order.
#[derive(Debug)]
pub struct Shard {
    policy: Policy,
    disk: Disk,
    // Looked up by device only; nothing depends on the order of iteration, which differs from run to run.
    mailboxes: HashMap<DeviceId, Box<Mailbox>>,
    lists: Lists,
    /// Mailboxes in the outstanding frame; `None`: no frame is outstanding.
    sealed: Option<Vec<DeviceId>>,
    /// A frame found no room: not before then.
    not_before: Option<Mono>,
}

/// Where mailboxes are listed and counted, beside the shard's map of them.
#[derive(Debug)]
struct Lists {
    /// One entry for a mailbox with a deadline, at or before it: early visits are harmless, moving entries is not free.
    deadlines: BTreeSet<(Mono, DeviceId)>,
    /// Mailboxes that want a frame: by app in turns, and within an app in the order in which they began to.
    offering: FairQueue<DeviceId>,
    /// What its mailboxes hold, by app.
    tally: Tally,
}

impl Shard {
    /// An empty shard that counts for nobody.
    #[must_use]
    pub fn new(policy: Policy) -> Shard {
        Shard::counting(policy, Tally::default())
    }

    /// An empty shard that counts in this place of the stock. The walk ([`Shard::seed`]) has yet to come.
    #[must_use]
    pub fn with_stock(policy: Policy, stock: Arc<Stock>, place: usize) -> Shard {
        Shard::counting(policy, Tally::new(stock, place))
    }

    fn counting(policy: Policy, tally: Tally) -> Shard {
        Shard {
            policy,
            disk: Disk::Open,
            mailboxes: HashMap::new(),
            lists: Lists {
                deadlines: BTreeSet::new(),
                offering: FairQueue::new(FRAME_QUANTUM),
                tally,
            },
            sealed: None,
            not_before: None,
        }
    }

    /// Counts mailboxes of this shard as they were in the store at any moment since the start of the run: by rising id, all
    /// those behind the last ones up to `passed`; `None`: to the end.
    pub fn seed(&mut self, mailboxes: &[StoredMailbox], passed: Option<DeviceId>) {
        self.lists.tally.seed(mailboxes, passed);
    }

    /// A device of this shard is about to be made, and was claimed ([`Stock::claim_device`]).
    pub fn made(&mut self, device: DeviceId) {
        self.lists.tally.made(device);
    }

    /// Replaces the policy; holds from the next event on.
    pub fn set_policy(&mut self, policy: Policy) {
        self.policy = policy;
    }

    /// What the disk can do now. From [`Disk::Failed`] there is no way back within a run.
    pub fn set_disk(&mut self, disk: Disk, now: Now, effects: &mut Vec<Effect>) {
        if self.disk == Disk::Failed || self.disk == disk {
            return;
        }
        self.disk = disk;
        if disk == Disk::Failed {
            self.store_failed(now, effects);
        }
    }

    /// One event for one mailbox.
    pub fn handle(&mut self, device: DeviceId, event: Event, now: Now, effects: &mut Vec<Effect>) {
        let wakes = match &event {
            Event::Enqueue(_)
            | Event::Attach(_)
            | Event::Revoke { .. }
            | Event::Wipe { .. }
            | Event::Clear { .. }
            | Event::Expire { .. } => true,
            Event::Detach { .. }
            | Event::Acknowledge { .. }
            | Event::Decline { .. }
            | Event::Presence { .. }
            | Event::Release { .. }
            | Event::Withdraw(_)
            | Event::Read(_)
            | Event::Bodies(_) => false,
        };
        let mailbox = match self.mailboxes.entry(device) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(_) if !wakes => return,
            Entry::Vacant(entry) => entry.insert(Box::new(Mailbox::new())),
        };
        mailbox.handle(
            event,
            &mut Context {
                device,
                policy: &self.policy,
                disk: self.disk,
                now,
                tally: &self.lists.tally,
                effects,
            },
        );
        if self.lists.settle(device, mailbox, &self.policy) {
            self.mailboxes.remove(&device);
        }
    }

    /// The earliest moment at which something may be due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Mono> {
        let mailboxes = self.lists.deadlines.first().map(|&(at, _)| at);
        mailboxes.into_iter().chain(self.not_before).min()
    }

    /// Does what is due; too early changes nothing.
    pub fn handle_deadlines(&mut self, now: Now, effects: &mut Vec<Effect>) {
        if self.not_before.is_some_and(|at| at <= now.mono) {
            self.not_before = None;
        }
        // Taken out before any is visited, so that one that stays due cannot hold the shard in this loop.
        let mut due = Vec::new();
        while let Some(&(at, device)) = self.lists.deadlines.first() {
            if at > now.mono {
                break;
            }
            self.lists.deadlines.pop_first();
            due.push(device);
        }
        for device in due {
            let Some(mailbox) = self.mailboxes.get_mut(&device) else {
                continue;
            };
            mailbox.deadline = None;
            mailbox.handle_deadline(&mut Context {
                device,
                policy: &self.policy,
                disk: self.disk,
                now,
                tally: &self.lists.tally,
                effects,
            });
            if self.lists.settle(device, mailbox, &self.policy) {
                self.mailboxes.remove(&device);
            }
        }
    }

    /// Something waits for a frame, and none is outstanding.
    #[must_use]
    pub fn has_offers(&self) -> bool {
        !self.lists.offering.is_empty()
            && self.sealed.is_none()
            && self.not_before.is_none()
            && self.disk != Disk::Failed
    }

    /// Takes what is offered for one frame, up to [`FRAME_COST_MAX`], apps in turns. [`Shard::handle_committed`] must be called
    /// before the next.
    #[must_use]
    pub fn seal(&mut self) -> Vec<Change> {
        debug_assert!(self.sealed.is_none(), "one frame is outstanding at a time");
        // A frame is bounded by its cost, however many offer.
        let room = self.lists.offering.len().min(4_096);
        let mut changes = Vec::with_capacity(room * 2);
        let mut sealed = Vec::with_capacity(room);
        let mut spent = 0;
        while spent < FRAME_COST_MAX
            && let Some((app, device)) = self.lists.offering.pop()
        {
            let Some(mailbox) = self.mailboxes.get_mut(&device) else {
                continue;
            };
            mailbox.listed = false;
            // What was offered may have been withdrawn meanwhile.
            if !mailbox.has_offers() {
                continue;
            }
            let before = changes.len();
            mailbox.seal(device, &self.policy, &mut changes);
            let cost = cost(&changes[before..]);
            self.lists.offering.charge(app, cost);
            spent += cost;
            sealed.push(device);
        }
        self.sealed = Some(sealed);
        changes
    }

    /// What became of the frame.
    pub fn handle_committed(
        &mut self,
        result: Result<(), CommitFailure>,
        now: Now,
        effects: &mut Vec<Effect>,
    ) {
        let Some(sealed) = self.sealed.take() else {
            return;
        };
        match result {
            Ok(()) => {}
            Err(CommitFailure::NoRoom) => self.not_before = Some(now.mono + ROOM_RETRY),
            Err(CommitFailure::Failed) => self.disk = Disk::Failed,
        }
        for device in sealed {
            let Some(mailbox) = self.mailboxes.get_mut(&device) else {
                continue;
            };
            mailbox.handle_committed(
                result,
                &mut Context {
                    device,
                    policy: &self.policy,
                    disk: self.disk,
                    now,
                    tally: &self.lists.tally,
                    effects,
                },
            );
            if self.lists.settle(device, mailbox, &self.policy) {
                self.mailboxes.remove(&device);
            }
        }
        if result == Err(CommitFailure::Failed) {
            self.store_failed(now, effects);
        }
    }

    /// Mailboxes awake now.
    #[must_use]
    pub fn awake(&self) -> usize {
        self.mailboxes.len()
    }

    fn store_failed(&mut self, now: Now, effects: &mut Vec<Effect>) {
        let mut devices: Vec<DeviceId> = self.mailboxes.keys().copied().collect();
        devices.sort_unstable();
        for device in devices {
            if let Some(mailbox) = self.mailboxes.get_mut(&device) {
                mailbox.store_failed(&mut Context {
                    device,
                    policy: &self.policy,
                    disk: self.disk,
                    now,
                    tally: &self.lists.tally,
                    effects,
                });
            }
            self.settle(device);
        }
    }

    /// After anything happened to a mailbox: its places on the lists, or sleep.
    fn settle(&mut self, device: DeviceId) {
        let lists = &mut self.lists;
        if let Some(mailbox) = self.mailboxes.get_mut(&device)
            && lists.settle(device, mailbox, &self.policy)
        {
            self.mailboxes.remove(&device);
        }
    }
}

impl Lists {
    /// Takes a mailbox to which something happened to its places; `true`: it sleeps.
    fn settle(&mut self, device: DeviceId, mailbox: &mut Mailbox, policy: &Policy) -> bool {
        mailbox.count(device, &mut self.tally);
        if mailbox.may_sleep() {
            if let Some(at) = mailbox.deadline {
                self.deadlines.remove(&(at, device));
            }
            return true;
        }
        if !mailbox.listed && mailbox.has_offers() {
            mailbox.listed = true;
            self.offering.push(mailbox.app(), device);
        }
        if let Some(due) = mailbox.next_deadline(policy)
            && mailbox.deadline.is_none_or(|known| due < known)
        {
            if let Some(known) = mailbox.deadline.replace(due) {
                self.deadlines.remove(&(known, device));
            }
            self.deadlines.insert((due, device));
        }
        false
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::collections::HashSet;
    use std::sync::Arc;

    use super::super::event::{Enqueue, MailboxView, Summary};
    use super::super::ids::{AppId, PingId, Ticket};
    use super::super::notification::{Hold, Notification, Urgency, WireSlot};
    use super::*;

    const NOW: Now = Now {
        mono: Mono(1_000),
        unix_ms: 1_700_000_000_000,
    };

    fn device(app: AppId, number: u32) -> DeviceId {
        let mut id = [0; 16];
        id[..4].copy_from_slice(&app.0.to_be_bytes());
        id[4..8].copy_from_slice(&number.to_be_bytes());
        DeviceId(id)
    }

    /// Offers a row for each of so many absent devices of an app, each of 4 KiB.
    fn offer(shard: &mut Shard, app: AppId, numbers: std::ops::Range<u32>) {
        let mut effects = Vec::new();
        for number in numbers {
            let device = device(app, number);
            let enqueue = Enqueue {
                ticket: Ticket(u64::from(number)),
                notification: Arc::new(Notification {
                    ping: PingId(device.0),
                    app,
                    accepted_ms: NOW.unix_ms,
                    expires_ms: NOW.unix_ms + 60_000,
                    urgency: Urgency::Normal,
                    collapse: None,
                    size: 4_096,
                    transient: false,
                    shared: false,
                    content: bytes::Bytes::from_static(b"ring"),
                    wire: WireSlot::default(),
                    hold: Hold::default(),
                }),
                may_repeat: false,
                too_fast: false,
                patient: false,
            };
            shard.handle(device, Event::Enqueue(enqueue), NOW, &mut effects);
            let view = MailboxView {
                summary: Some(Summary::new(app)),
                rows: Vec::new(),
                complete: true,
                withdrawals: None,
            };
            shard.handle(device, Event::Read(Ok(Box::new(view))), NOW, &mut effects);
        }
    }

    /// How many rows of each app the next frame has; it is committed.
    fn frame(shard: &mut Shard) -> [usize; 2] {
        let rows = shard.seal();
        let rows: Vec<AppId> = rows
            .iter()
            .filter_map(|change| match change {
                Change::Insert { notification, .. } => Some(notification.app),
                Change::Remove { .. }
                | Change::Outcome { .. }
                | Change::Withdraw { .. }
                | Change::Summary { .. }
                | Change::Forget { .. }
                | Change::Cleared { .. } => None,
            })
            .collect();
        shard.handle_committed(Ok(()), NOW, &mut Vec::new());
        [1, 2].map(|app| rows.iter().filter(|of| of.0 == app).count())
    }

    #[test]
    fn the_frames_of_a_flooding_app_have_room_for_another() {
        let mut shard = Shard::new(Policy::default());
        offer(&mut shard, AppId(1), 0..5_000);
        let [first, _] = frame(&mut shard);
        assert!((500..1_500).contains(&first), "{first}");
        // It comes late, and is in the next frame all the same, although thousands of rows wait before it.
        offer(&mut shard, AppId(2), 0..1);
        let [flood, other] = frame(&mut shard);
        assert_eq!(other, 1);
        assert!((500..1_500).contains(&flood), "{flood}");
        // While both have much to write each gets about half.
        offer(&mut shard, AppId(2), 1..3_000);
        let [one, other] = frame(&mut shard);
        assert!(one.abs_diff(other) <= 32, "{one} and {other}");
        // Nothing is left behind.
        let mut rest = [0; 2];
        while shard.has_offers() {
            let next = frame(&mut shard);
            assert!(next[0] + next[1] > 0);
            rest = [rest[0] + next[0], rest[1] + next[1]];
        }
        assert_eq!(first + flood + one + rest[0], 5_000);
        assert_eq!(1 + other + rest[1], 3_000);
    }

    #[test]
    fn a_mailbox_is_in_one_frame_at_a_time_and_keeps_its_place() {
        let mut shard = Shard::new(Policy::default());
        offer(&mut shard, AppId(1), 0..3_000);
        let mut seen = HashSet::new();
        let mut order = Vec::new();
        while shard.has_offers() {
            for change in shard.seal() {
                if let Change::Summary { device, .. } = change {
                    assert!(seen.insert(device));
                    order.push(device);
                }
            }
            shard.handle_committed(Ok(()), NOW, &mut Vec::new());
        }
        let expected: Vec<DeviceId> = (0..3_000).map(|number| device(AppId(1), number)).collect();
        assert_eq!(order, expected);
    }
}
