//! Everything that can happen to a mailbox, and everything a mailbox can cause: two closed lists.

use std::sync::Arc;

use super::ids::{AppId, DeviceId, PingId, SessionId, Ticket, Tickets};
use super::notification::{CollapseKey, Notification, Urgency};
use super::stock::Quota;

/// What can happen to one mailbox.
#[derive(Debug)]
pub enum Event {
    /// A ping addresses this device.
    Enqueue(Enqueue),
    /// A device said hello and was authenticated.
    Attach(Attach),
    /// The connection of `session` is gone. Unknown sessions change nothing.
    Detach {
        /// The session that ended.
        session: SessionId,
    },
    /// The device has these; the verdict is `acknowledged`. Unknown ones are ignored and counted.
    Acknowledge {
        /// The session that says so; another than the attached one changes nothing.
        session: SessionId,
        /// Which ones.
        what: Acknowledged,
    },
    /// The device cannot or will not use this one; the verdict is `declined`.
    Decline {
        /// The session that says so.
        session: SessionId,
        /// Which one.
        ping: PingId,
    },
    /// The person at the device is there, or not. Kept for message rules.
    Presence {
        /// The session that says so.
        session: SessionId,
        /// Whether the device is in use.
        active: bool,
    },
    /// The publisher takes a ping back.
    Revoke {
        /// Who waits for the answer.
        ticket: Ticket,
        /// Which one.
        ping: PingId,
    },
    /// What is held back of this ping has waited long enough ([`Enqueue::patient`]): it is offered to the disk.
    Release {
        /// Which ping.
        ping: PingId,
    },
    /// The device is to take something off the screen. The store knows it already, so a mailbox that sleeps is not
    /// woken: the next session is told.
    Withdraw(Withdrawal),
    /// The device itself is revoked: cut the session, empty the mailbox, forget it.
    Wipe {
        /// Who waits for the answer.
        ticket: Ticket,
    },
    /// Whoever the device belongs to changes: revoke everything that waits. The mailbox and its session stay.
    Clear {
        /// Who waits for the answer.
        ticket: Ticket,
    },
    /// The sweep found these rows past their expiry. Rows that are gone meanwhile are ignored.
    Expire {
        /// The rows, as the sweep read them.
        rows: Vec<RowKey>,
    },
    /// The answer to [`Effect::Read`].
    Read(Result<Box<MailboxView>, ()>),
    /// The answer to [`Effect::Fetch`]: a body for each row asked for; `None` for one that cannot be read.
    /// `Err` if the store could not be asked at all (it is asked again later).
    Bodies(Result<Vec<Body>, ()>),
}

/// A ping for one device.
#[derive(Debug)]
pub struct Enqueue {
    /// Who waits for the answer.
    pub ticket: Ticket,
    /// What to hand over.
    pub notification: Arc<Notification>,
    /// The id was derived from an idempotency key: look whether it waits already.
    pub may_repeat: bool,
    /// The device is sent too much: it is accepted only if it waits already.
    pub too_fast: bool,
    /// It is safe without its row until the ticket is answered: a crash brings it here again. So the row may wait for the
    /// acknowledgement for as long as whoever hands it over lets it ([`Event::Release`]). With `may_repeat`: an earlier
    /// run may have sent it.
    pub patient: bool,
}

/// What a device's `hello` means to its mailbox.
#[derive(Debug)]
pub struct Attach {
    /// The new session.
    pub session: SessionId,
    /// Random per client process.
    pub instance: u128,
    /// Rising per instance.
    pub attempt: u64,
    /// Granted notifications in flight, at least 1.
    pub window: u16,
    /// Less urgent ones stay in the mailbox.
    pub min_urgency: Urgency,
    /// Verdicts whose acknowledgement may have been lost; applied before anything is sent.
    pub seen: Vec<(PingId, Verdict)>,
}

/// A device's word on one notification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The app has it.
    Acknowledged,
    /// The app cannot or will not use it.
    Declined,
}

/// Which notifications an acknowledgement names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Acknowledged {
    /// This session's `seq`, and all before it.
    UpTo(u64),
    /// These, wherever they stand.
    Ids(Vec<PingId>),
}

/// How one notification for one device ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Outcome {
    /// The device has it.
    Acknowledged,
    /// The device cannot or will not use it.
    Declined,
    /// A newer one with the same collapse key took its place.
    Replaced,
    /// Its TTL ran out first.
    Expired,
    /// It made room for others in a full mailbox.
    Evicted,
    /// The publisher, or whoever revoked the device, took it back.
    Revoked,
    /// The mailbox was full of more urgent ones.
    Refused,
    /// A bridge handed its content to another service.
    Forwarded,
}

impl Outcome {
    /// All of them, in the order of their numbers on disk.
    pub const ALL: [Outcome; 8] = [
        Outcome::Acknowledged,
        Outcome::Declined,
        Outcome::Replaced,
        Outcome::Expired,
        Outcome::Evicted,
        Outcome::Revoked,
        Outcome::Refused,
        Outcome::Forwarded,
    ];

    /// The word for it in the API, logs and metrics.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Acknowledged => "acknowledged",
            Outcome::Declined => "declined",
            Outcome::Replaced => "replaced",
            Outcome::Expired => "expired",
            Outcome::Evicted => "evicted",
            Outcome::Revoked => "revoked",
            Outcome::Refused => "refused",
            Outcome::Forwarded => "forwarded",
        }
    }
}

/// Why a notification was not accepted. Nothing of it is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rejection {
    /// No such device in this app (404).
    UnknownDevice,
    /// The mailbox is full and the rule is to refuse (429 `mailbox_full`).
    MailboxFull,
    /// The disk has no room (507); delivery and deletes go on.
    NoRoom,
    /// The store failed and must be restarted (503).
    StoreFailed,
    /// A quota of the app would be crossed (429 `quota_exceeded`).
    Quota(Quota),
    /// The device is sent more than it may be (429). Whoever hands notifications to the core finds that out ([`Enqueue::too_fast`]).
    TooFast,
}

/// Why a session is not attached. The older session, if there is one, stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// A later attempt of the same instance is attached already.
    StaleAttempt,
    /// Several installations use this device id and secret.
    DuplicateDevice,
    /// The device was revoked meanwhile.
    UnknownDevice,
    /// The store could not be read; try again later.
    StoreFailed,
}

/// Why the core ends a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Closing {
    /// A newer session took its place (`goaway replaced`).
    Replaced,
    /// The device was revoked (`goaway revoked`).
    Revoked,
    /// Something was in flight for too long without a verdict (`error ack_timeout`).
    AckTimeout,
    /// The secret that the device said hello with ended at once (`error unauthorized`). The runtime says so; the core
    /// never does.
    SecretEnded,
}

/// Something worth counting that changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Notice {
    /// A verdict named a notification that is not here.
    UnknownVerdict,
    /// Sessions of this device are refused because too many instances replace one another.
    DuplicateDevice,
    /// A row's body could not be read; the row ended as `evicted`.
    UnreadableBody,
    /// Rows with one collapse key were found side by side after a restart; the older ended as `replaced`.
    CollapseRepaired,
    /// A row was held back from the disk.
    Deferred,
    /// The acknowledgement won: a row never went to the disk.
    DeferralWon,
}

/// What the core causes.
#[derive(Debug)]
pub enum Effect {
    /// It is safe on disk (or, for TTL 0, sent): answer the publisher. Each ticket is answered exactly once, by
    /// this, by [`Effect::Ended`] or by [`Effect::Rejected`].
    Accepted {
        /// Who waits.
        ticket: Ticket,
        /// Which device.
        device: DeviceId,
        /// Which ping.
        ping: PingId,
    },
    /// It has its outcome, once and for all; of a stored one, the removal is safe. Announced exactly once for
    /// each notification that was or is hereby accepted.
    Ended {
        /// Those who still wait for an answer; empty if it was given before.
        tickets: Tickets,
        /// Whose app.
        app: AppId,
        /// Which device.
        device: DeviceId,
        /// Which ping.
        ping: PingId,
        /// How.
        outcome: Outcome,
        /// When, Unix milliseconds.
        at_ms: u64,
        /// The outcome is in the store as well, because the row was, or because it left with a frame.
        stored: bool,
    },
    /// It is not accepted, and nothing of it is kept.
    Rejected {
        /// Who waits.
        ticket: Ticket,
        /// Which device.
        device: DeviceId,
        /// Which ping.
        ping: PingId,
        /// Why.
        why: Rejection,
    },
    /// The answer to [`Event::Revoke`], given once the removal is safe. `false`: nothing of it waits here.
    RevokeAnswered {
        /// Who waits.
        ticket: Ticket,
        /// Whether something was taken back.
        revoked: bool,
    },
    /// The answer to [`Event::Wipe`], given once everything is safe.
    Wiped {
        /// Who waits.
        ticket: Ticket,
        /// How many notifications were revoked with it.
        revoked: u32,
        /// Whether there was such a mailbox; without one no frame carried [`Change::Forget`].
        known: bool,
    },
    /// The answer to [`Event::Clear`], given once everything is safe, [`Change::Cleared`] included.
    Cleared {
        /// Who waits.
        ticket: Ticket,
        /// How many notifications were revoked.
        revoked: u32,
        /// Whether there is such a mailbox; without one no frame carried [`Change::Cleared`].
        known: bool,
    },
    /// The session is attached: greet it.
    Welcome {
        /// The session.
        session: SessionId,
        /// How many wait for it.
        pending: u32,
        /// The granted window.
        window: u16,
    },
    /// The session is not attached: say why and close.
    Refuse {
        /// The session.
        session: SessionId,
        /// Why.
        why: Refusal,
    },
    /// Send one notification.
    Send {
        /// To whom.
        session: SessionId,
        /// Its number in this session: 1, 2, 3 …
        seq: u64,
        /// False only if this run accepted it and never sent it.
        redelivered: bool,
        /// What.
        notification: Arc<Notification>,
    },
    /// Tell the app that these, sent before, were taken back.
    Withdraw {
        /// To whom.
        session: SessionId,
        /// Which ones.
        pings: Vec<PingId>,
    },
    /// The device has heard that these were taken back, so the store need not keep them.
    WithdrawalsHeard {
        /// Which device.
        device: DeviceId,
        /// What it heard.
        heard: Vec<Withdrawal>,
    },
    /// End the session; the mailbox has let go of it already.
    Close {
        /// The session.
        session: SessionId,
        /// Why.
        why: Closing,
    },
    /// Read of the store what the next event needs; answer with [`Event::Read`]. At most one is under way for
    /// a mailbox.
    Read(MailboxRead),
    /// Read these bodies; answer with [`Event::Bodies`]. At most one is under way for a mailbox.
    Fetch {
        /// Whose.
        device: DeviceId,
        /// Which ones, in order.
        rows: Vec<RowKey>,
    },
    /// Count this.
    Noticed(Notice),
}

/// A notification that the device may show and should not show any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Withdrawal {
    /// Which ping.
    pub ping: PingId,
    /// How long a device that comes back is told so, Unix milliseconds.
    pub until_ms: u64,
}

/// A row and its body; `None` when it is gone or cannot be read.
pub type Body = (RowKey, Option<Arc<Notification>>);

/// Where a row stands in its mailbox. Orders are the order of acceptance; together with the urgency they are the
/// order of eviction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RowKey {
    /// Its urgency.
    pub urgency: Urgency,
    /// Its acceptance number in this mailbox, from 1.
    pub order: u64,
}

/// All that the core needs to know of a stored notification; the body stays on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RowMeta {
    /// Where it stands.
    pub key: RowKey,
    /// Which ping.
    pub ping: PingId,
    /// Content size as limits count it.
    pub size: u32,
    /// When it must no longer be sent, Unix milliseconds.
    pub expires_ms: u64,
    /// Its replacement key.
    pub collapse: Option<CollapseKey>,
    /// The run that accepted it; an earlier one if that may have sent it.
    pub run: u32,
    /// Its body is stored beside the rows of its ping.
    pub shared: bool,
}

/// What is written about a mailbox as a whole. Its existence means that the device exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The app of the device.
    pub app: AppId,
    /// Stored notifications.
    pub count: u32,
    /// Their content bytes.
    pub bytes: u64,
    /// The next acceptance number.
    pub next_order: u64,
    /// Rows up to this order may have been sent before.
    pub sent_up_to: u64,
}

impl Summary {
    /// The summary of a mailbox that has just been made.
    #[must_use]
    pub fn new(app: AppId) -> Summary {
        Summary {
            app,
            count: 0,
            bytes: 0,
            next_order: 1,
            sent_up_to: 0,
        }
    }
}

/// What to read of one mailbox, in one consistent look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailboxRead {
    /// Whose mailbox.
    pub device: DeviceId,
    /// Every row.
    pub all: bool,
    /// The row of this ping.
    pub ping: Option<PingId>,
    /// The newest row with this replacement key.
    pub collapse: Option<CollapseKey>,
    /// The rows that rank lowest.
    pub lowest: Option<Lowest>,
    /// These rows, as far as they exist.
    pub rows: Vec<RowKey>,
    /// What the device is to take off the screen.
    pub withdrawals: bool,
}

/// The lowest ranking rows ([`RowKey`] order), until both are reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lowest {
    /// At least so many rows.
    pub count: u32,
    /// At least so many content bytes.
    pub bytes: u64,
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MailboxView {
    /// `None`: the device does not exist.
    pub summary: Option<Summary>,
    /// The rows asked for, each once, by rising order. Unreadable ones are left out (and set aside by the store).
    pub rows: Vec<RowMeta>,
    /// `rows` is every row of the mailbox.
    pub complete: bool,
    /// What the device is to take off the screen, if that was asked for.
    pub withdrawals: Option<Vec<Withdrawal>>,
}

/// One thing that must reach the disk. Values are absolute, so that applying one twice changes nothing.
#[derive(Debug, Clone)]
pub enum Change {
    /// Store a notification.
    Insert {
        /// In whose mailbox.
        device: DeviceId,
        /// Its acceptance number.
        order: u64,
        /// The run that accepted it.
        run: u32,
        /// The notification.
        notification: Arc<Notification>,
    },
    /// Remove a stored notification and record its outcome.
    Remove {
        /// Whose app; the outcome outlives the mailbox, so it carries this itself.
        app: AppId,
        /// From whose mailbox.
        device: DeviceId,
        /// Which row.
        row: RowMeta,
        /// How it ended.
        outcome: Outcome,
        /// When, Unix milliseconds.
        at_ms: u64,
    },
    /// Record the outcome of a notification that leaves with this frame and never had a row. What else the frame says rests on it: a
    /// crash may bring the notification anew (a page of its ping was not noted yet), and it is to be found as ended then.
    Outcome {
        /// Whose app.
        app: AppId,
        /// Whose device.
        device: DeviceId,
        /// Which ping.
        ping: PingId,
        /// How it ended. What was revoked is kept as erased as well, as it is with a row.
        outcome: Outcome,
        /// When, Unix milliseconds.
        at_ms: u64,
        /// When it would have expired, Unix milliseconds.
        expires_ms: u64,
    },
    /// A device may show what was revoked, and is to be told so. In the frame of the removal, so that neither is without the
    /// other.
    Withdraw {
        /// Whose app.
        app: AppId,
        /// Which device.
        device: DeviceId,
        /// What, and how long it is told.
        withdrawal: Withdrawal,
    },
    /// The mailbox as a whole.
    Summary {
        /// Whose mailbox.
        device: DeviceId,
        /// Its state after this frame.
        summary: Summary,
    },
    /// The mailbox is no more.
    Forget {
        /// Whose mailbox.
        device: DeviceId,
    },
    /// The frame with this has every removal that [`Event::Clear`] asked for. Nothing to store by itself: whoever asked
    /// may put more into the same frame.
    Cleared {
        /// Whose mailbox.
        device: DeviceId,
    },
}

/// Why a frame did not reach the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CommitFailure {
    /// There is no room; nothing was written, and it may be tried again.
    NoRoom,
    /// A write or a sync failed; nobody knows what is on disk, and only a restart tells.
    Failed,
}

/// What the disk can do now, as the runtime last heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Disk {
    /// Everything.
    #[default]
    Open,
    /// Below the free-space reserve: removals only.
    Full,
    /// Nothing until a restart.
    Failed,
}
