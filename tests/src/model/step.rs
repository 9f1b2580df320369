//! What can happen in a history, in the language of the mailbox tables.

use std::fmt;
use std::time::Duration;

use bellwire_server::delivery::{Disk, Urgency, Verdict};

/// A ping's name: one letter. Its id is that letter sixteen times.
pub type Name = char;

/// One thing that happens. One that is impossible by now is passed over, so that any part of a history is a history.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// The device is registered.
    Device,
    /// Limits of the mailbox.
    Policy {
        /// Most notifications.
        count: u32,
        /// Most bytes.
        bytes: u64,
        /// A full mailbox refuses newcomers.
        refuse: bool,
        /// Longest time for which a row is held back.
        defer_ms: u64,
    },
    /// A ping.
    Enqueue {
        /// Its name.
        name: Name,
        /// Its life.
        ttl_ms: u64,
        /// Its urgency.
        urgency: Urgency,
        /// Its replacement key.
        key: Option<char>,
        /// Its content size.
        size: u32,
        /// TTL 0.
        transient: bool,
        /// Its id may wait already.
        repeat: bool,
        /// It is safe without its row: that may wait until it is released.
        patient: bool,
    },
    /// The device says hello.
    Attach {
        /// Number of the session.
        session: u64,
        /// Which client process.
        instance: u128,
        /// Its attempt.
        attempt: u64,
        /// The window.
        window: u16,
        /// The lowest urgency that it wants.
        min: Urgency,
        /// Verdicts of earlier sessions.
        seen: Vec<(Name, Verdict)>,
    },
    /// The connection is gone.
    Detach(u64),
    /// The device has all up to this number.
    AckUpTo(u64, u64),
    /// The device has these.
    AckIds(u64, Vec<Name>),
    /// The device will not have this one.
    Decline(u64, Name),
    /// The publisher takes it back.
    Revoke(Name),
    /// What is held back of it has waited long enough.
    Release(Name),
    /// The device is to take this one off the screen, and is told so for a minute.
    Withdraw(Name),
    /// The device is revoked.
    Wipe,
    /// The sweep looks for rows past their expiry.
    Sweep,
    /// It is so many milliseconds after the start.
    At(u64),
    /// The shard hands over what it has.
    Seal,
    /// The frame is safe.
    Commit,
    /// There was no room for the frame.
    NoRoom,
    /// The frame failed; what of it is on disk shows after a restart: all (`true`) or nothing.
    Fail(bool),
    /// What the disk can do from now on.
    Disk(Disk),
    /// Reads are not answered for a while.
    HoldReads,
    /// The oldest read is answered, as of the time of the question.
    AnswerOne,
    /// All are.
    AnswerReads,
    /// All fail.
    FailReads,
    /// The body cannot be read any more.
    Rot(Name),
    /// The server dies and starts again; the frame that was being written is on disk (`true`) or not.
    Crash(bool),
}

fn urgency(urgency: Urgency) -> &'static str {
    match urgency {
        Urgency::VeryLow => "very-low",
        Urgency::Low => "low",
        Urgency::Normal => "normal",
        Urgency::High => "high",
    }
}

fn names(names: &[Name]) -> String {
    let names: Vec<String> = names.iter().map(char::to_string).collect();
    names.join(",")
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Device => f.write_str("device"),
            Step::Policy {
                count,
                bytes,
                refuse,
                defer_ms,
            } => {
                write!(f, "policy count={count} bytes={bytes}")?;
                if *refuse {
                    f.write_str(" refuse")?;
                }
                write!(f, " defer={defer_ms}ms")
            }
            Step::Enqueue {
                name,
                ttl_ms,
                urgency: rank,
                key,
                size,
                transient,
                repeat,
                patient,
            } => {
                write!(f, "enqueue {name}")?;
                if *transient {
                    f.write_str(" transient")?;
                } else {
                    write!(f, " ttl={ttl_ms}ms")?;
                }
                write!(f, " urgency={} size={size}", urgency(*rank))?;
                if let Some(key) = key {
                    write!(f, " key={key}")?;
                }
                if *repeat {
                    f.write_str(" repeat")?;
                }
                if *patient {
                    f.write_str(" patient")?;
                }
                Ok(())
            }
            Step::Attach {
                session,
                instance,
                attempt,
                window,
                min,
                seen,
            } => {
                write!(
                    f,
                    "attach s{session} instance={instance} attempt={attempt} window={window} min={}",
                    urgency(*min)
                )?;
                if !seen.is_empty() {
                    let seen: Vec<String> = seen
                        .iter()
                        .map(|(name, verdict)| match verdict {
                            Verdict::Acknowledged => name.to_string(),
                            Verdict::Declined => format!("{name}-"),
                        })
                        .collect();
                    write!(f, " seen={}", seen.join(","))?;
                }
                Ok(())
            }
            Step::Detach(session) => write!(f, "detach s{session}"),
            Step::AckUpTo(session, seq) => write!(f, "ack s{session} {seq}"),
            Step::AckIds(session, pings) => write!(f, "ack s{session} {}", names(pings)),
            Step::Decline(session, name) => write!(f, "decline s{session} {name}"),
            Step::Revoke(name) => write!(f, "revoke {name}"),
            Step::Release(name) => write!(f, "release {name}"),
            Step::Withdraw(name) => write!(f, "withdraw {name}"),
            Step::Wipe => f.write_str("wipe"),
            Step::Sweep => f.write_str("sweep"),
            Step::At(ms) => write!(f, "at {ms}ms"),
            Step::Seal => f.write_str("seal"),
            Step::Commit => f.write_str("commit"),
            Step::NoRoom => f.write_str("no-room"),
            Step::Fail(written) => f.write_str(if *written { "fail written" } else { "fail" }),
            Step::Disk(Disk::Open) => f.write_str("disk open"),
            Step::Disk(Disk::Full) => f.write_str("disk full"),
            Step::Disk(Disk::Failed) => f.write_str("disk failed"),
            Step::HoldReads => f.write_str("hold-reads"),
            Step::AnswerOne => f.write_str("answer-one"),
            Step::AnswerReads => f.write_str("answer-reads"),
            Step::FailReads => f.write_str("fail-reads"),
            Step::Rot(name) => write!(f, "rot {name}"),
            Step::Crash(written) => f.write_str(if *written { "crash written" } else { "crash" }),
        }
    }
}

/// How long a device that comes back is told of a withdrawal, milliseconds.
pub const WITHDRAWN_MS: u64 = 60_000;

/// The life of a TTL 0 notification: it expires 30 s after acceptance.
pub const TRANSIENT: Duration = Duration::from_secs(30);
