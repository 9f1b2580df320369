//! Lines for people and lines for programs.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

use bellwire_client::{Event, Notification, Urgency};
use serde::Serialize;
use serde_json::json;

/// Longest text that a line for people shows, in characters.
const SHOWN_MAX_CHARS: usize = 200;

/// Prints to standard output; what is about the connection goes to standard error, unless it is JSON.
pub(crate) struct Printer {
    json: bool,
    quiet: bool,
    /// There is no next try to announce.
    fail_fast: bool,
    colour: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    event: &'static str,
    #[serde(flatten)]
    notification: &'a Notification,
}

impl Printer {
    pub(crate) fn new(json: bool, quiet: bool, fail_fast: bool) -> Self {
        let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            json,
            quiet,
            fail_fast,
            colour: colour && !json,
        }
    }

    /// One line. An error means that nobody reads it.
    pub(crate) fn notification(&self, notification: &Notification) -> io::Result<()> {
        if self.json {
            return line(&serde_json::to_string(&Line {
                event: "notification",
                notification,
            })?);
        }
        line(&for_people(notification, self.colour))
    }

    /// One line, or none for what a person need not know.
    pub(crate) fn event(&self, event: &Event) -> io::Result<()> {
        if self.quiet {
            return Ok(());
        }
        if self.json {
            return match event_json(event) {
                Some(value) => line(&value.to_string()),
                None => Ok(()),
            };
        }
        if let Some(text) = event_text(event, self.fail_fast) {
            // Trouble with standard error is no reason to end.
            let mut out = io::stderr().lock();
            for line in text.lines() {
                let _ = writeln!(out, "{}", plain(line));
            }
        }
        Ok(())
    }
}

/// A line on standard output.
pub(crate) fn line(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Bytes as they are.
pub(crate) fn raw(bytes: &[u8]) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(bytes)?;
    out.flush()
}

/// An error before the start.
pub(crate) fn complain(what: &str) {
    let _ = writeln!(io::stderr().lock(), "bellwire-device: {}", plain(what));
}

/// `10:42:07  high  Title: body  (id)`. The time is the server's, in UTC.
fn for_people(notification: &Notification, colour: bool) -> String {
    let content = &notification.content;
    let mut text = clock(notification.accepted_ms);
    let urgency = match notification.urgency {
        Urgency::VeryLow => "very-low",
        Urgency::Low => "low",
        Urgency::Normal => "normal",
        Urgency::High => "high",
    };
    let _ = write!(text, "  {urgency:<8}  ");
    let (bold, off) = if colour {
        ("\u{1b}[1m", "\u{1b}[0m")
    } else {
        ("", "")
    };
    let headline = match (&content.title, &content.body) {
        (Some(title), Some(body)) => format!("{bold}{}{off}: {}", shown(title), shown(body)),
        (Some(one), None) | (None, Some(one)) => format!("{bold}{}{off}", shown(one)),
        (None, None) => "(no text)".to_owned(),
    };
    text.push_str(&headline);
    if let Some(badge) = content.badge {
        let _ = write!(text, "  badge {badge}");
    }
    if let Some(sync) = &content.sync {
        let _ = write!(text, "  sync {}", shown(&sync.join(",")));
    }
    if let Some(topic) = &content.topic {
        let _ = write!(text, "  topic {}", shown(topic));
    }
    if let Some(data) = &content.data {
        let sealed = if content.encoding.is_some() {
            " encrypted"
        } else {
            ""
        };
        let _ = write!(text, "  {} bytes{sealed} of data", data.len());
    }
    let again = if notification.redelivered {
        ", perhaps sent before"
    } else {
        ""
    };
    let _ = write!(text, "  ({}{again})", notification.id);
    text
}

/// `2026-11-21 10:42:07 UTC`.
pub(crate) fn date(unix_ms: u64) -> String {
    let seconds = unix_ms / 1_000;
    // Days since 0000-03-01, so that the leap day is the last one of its year (H. Hinnant's algorithm).
    let days = seconds / 86_400 + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let time = clock(unix_ms);
    format!(
        "{year:04}-{month:02}-{day:02} {} UTC",
        time.trim_end_matches('Z')
    )
}

fn clock(unix_ms: u64) -> String {
    let seconds = unix_ms / 1_000 % 86_400;
    format!(
        "{:02}:{:02}:{:02}Z",
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60
    )
}

/// Content comes from outside: it must not steer the terminal, nor fill it.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_MAX_CHARS).map(harmless).collect();
    if text.chars().nth(SHOWN_MAX_CHARS).is_some() {
        shown.push('…');
    }
    shown
}

/// What comes from outside must not steer the terminal.
pub(crate) fn plain(text: &str) -> String {
    text.chars().map(harmless).collect()
}

/// Control characters, and those that change the direction of writing, become a visible mark.
fn harmless(character: char) -> char {
    match character {
        '\n' | '\t' => ' ',
        '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}' => '\u{fffd}',
        character if character.is_control() => '\u{fffd}',
        character => character,
    }
}

fn event_text(event: &Event, fail_fast: bool) -> Option<String> {
    Some(match event {
        Event::Connected { carrier, codec, session, pending, .. } => {
            let codec = codec.name();
            format!("connected over {} ({codec}), session {session}, {pending} waiting", carrier.name())
        }
        Event::Disconnected { why, retry_in } => {
            let mut text = why.to_string();
            let advice = why.advice();
            if !advice.is_empty() {
                let _ = write!(text, "\n  {advice}");
            }
            if let (Some(wait), false) = (retry_in, fail_fast) {
                let _ = write!(text, "\n  trying again in {:.1} s", wait.as_secs_f64());
            }
            text
        }
        Event::Withdrawn { ids } => {
            let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
            format!("withdrawn: {}", ids.join(" "))
        }
        Event::Replaced => {
            "another installation with this device id took over; staying away for a minute. If it repeats, enrol each one by itself".to_owned()
        }
        Event::Subscribed { topics, refused } => {
            let mut text = match topics.is_empty() {
                true => "topics: none".to_owned(),
                false => format!("topics: {}", topics.join(" ")),
            };
            if !refused.is_empty() {
                let _ = write!(
                    text,
                    "\n  not changed: {}\n  The app's rules do not allow it, or the device has 100 topics; the backend can do it.",
                    refused.join(" ")
                );
            }
            text
        }
        Event::Repeated { id } => format!("{id} came again; it was answered before and got the same verdict"),
        Event::Expired { id } => format!("{id} came too late and was declined"),
        Event::Trouble { what } => what.clone(),
        Event::Woke { slept } => format!("the machine slept for {} s; checking the link", slept.as_secs()),
        Event::Moved { .. } => "the machine is on another network, or has another address; checking the link".to_owned(),
        Event::Stopped | _ => return None,
    })
}

fn event_json(event: &Event) -> Option<serde_json::Value> {
    Some(match event {
        Event::Connected {
            carrier,
            codec,
            session,
            pending,
            window,
        } => json!({
            "event": "connected", "carrier": carrier.name(), "codec": codec.name(), "session": session,
            "pending": pending, "window": window,
        }),
        Event::Disconnected { why, retry_in } => json!({
            "event": "disconnected", "why": why.to_string(), "code": why.code().map(|code| code.name()),
            "advice": why.advice(), "retry_in_ms": retry_in.map(|wait| wait.as_millis() as u64),
        }),
        Event::Withdrawn { ids } => json!({"event": "withdrawn", "ids": ids}),
        Event::Replaced => json!({"event": "replaced"}),
        Event::Repeated { id } => json!({"event": "repeated", "id": id}),
        Event::Expired { id } => json!({"event": "expired", "id": id}),
        Event::Subscribed { topics, refused } => {
            json!({"event": "subscribed", "topics": topics, "refused": refused})
        }
        Event::Trouble { what } => json!({"event": "trouble", "what": what}),
        Event::Woke { slept } => json!({"event": "woke", "slept_ms": slept.as_millis() as u64}),
        Event::Moved { network } => json!({"event": "moved", "network": network}),
        Event::Stopped => json!({"event": "stopped"}),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_cannot_steer_the_terminal() {
        assert_eq!(
            shown("a\u{1b}[2Jb\r\nc\u{202e}d"),
            "a\u{fffd}[2Jb\u{fffd} c\u{fffd}d"
        );
        assert_eq!(shown(&"x".repeat(300)).chars().count(), SHOWN_MAX_CHARS + 1);
    }

    #[test]
    fn a_time_of_day_is_the_servers_in_utc() {
        assert_eq!(clock(1_700_000_000_123), "22:13:20Z");
        assert_eq!(date(1_700_000_000_123), "2023-11-14 22:13:20 UTC");
        assert_eq!(date(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(date(951_782_400_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(date(4_107_542_400_000), "2100-03-01 00:00:00 UTC");
    }
}
