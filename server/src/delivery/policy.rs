//! The limits and waits that the core keeps, each with its default and its reason.

use std::time::Duration;

/// Longest time that a row of a ping to an audience waits for its acknowledgement, which has time to come because such a ping is
/// safe without its rows. Longer than a busy server and a phone network take together; short enough that a crash asks
/// few devices twice, and that a device which does not answer holds up nobody. Such devices are known by the next ping.
pub const AUDIENCE_DEFER_MAX: Duration = Duration::from_secs(1);

/// What a full mailbox does with a newcomer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OverflowRule {
    /// Lowest urgency first, oldest first within it, makes room; a newcomer that ranks lowest is `refused`.
    #[default]
    Evict,
    /// The newcomer is not accepted (429 `mailbox_full`).
    Refuse,
}

/// The settings of the delivery core. All of them may change between two events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// Most notifications that a mailbox holds. Default 1,000.
    pub mailbox_notifications: u32,
    /// Most content bytes that a mailbox holds. Default 1 MiB.
    pub mailbox_bytes: u64,
    /// What happens when either is reached.
    pub overflow: OverflowRule,
    /// Longest time that a row of an attached device is kept from the disk, waiting for its acknowledgement.
    /// Default 50 ms; zero turns holding back off. Longer saves disk work on slow networks and makes the 2xx later.
    pub defer_max: Duration,
    /// How long a notification may be in flight without a verdict before the session is closed. Default 5 min.
    pub ack_timeout: Duration,
    /// Replacements by different instances within [`Policy::replacement_span`] after which newcomers are
    /// refused. Default 3: two clones of one installation would otherwise cut each other for ever.
    pub replacements: u8,
    /// The span in which replacements are counted, and for which newcomers are then refused. Default 60 s.
    pub replacement_span: Duration,
    /// How long a device that comes back is told what it is to take off the screen. Default 7 days; zero: only a device that
    /// is attached is told.
    pub withdrawals_keep: Duration,
    /// The number of this run, kept by the store and raised at each start: a row of another run may have been sent.
    pub run: u32,
}

impl Default for Policy {
    fn default() -> Policy {
        Policy {
            mailbox_notifications: 1_000,
            mailbox_bytes: 1 << 20,
            overflow: OverflowRule::Evict,
            defer_max: Duration::from_millis(50),
            ack_timeout: Duration::from_secs(300),
            replacements: 3,
            replacement_span: Duration::from_secs(60),
            withdrawals_keep: Duration::from_secs(7 * 86_400),
            run: 1,
        }
    }
}
