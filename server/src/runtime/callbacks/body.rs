//! What is posted, and its signature, in the form of Standard Webhooks 1.0.0.

use std::fmt::Write as _;

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Serialize;

use crate::ports::{
    CallbackRecord, DeadLetter, OutcomeEvent, OutcomeGap, OutcomePosition, SigningSecret,
};

/// How a secret is written: this, then base64.
const SECRET_PREFIX: &str = "whsec_";
/// Bytes that a secret may have.
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 24..=64;
/// Room that is left for what surrounds the events.
const FRAME_BYTES: usize = 256;

/// The types of what is posted.
const OUTCOMES: &str = "bellwire.outcomes";
const TEST: &str = "bellwire.test";

#[derive(Serialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Entry {
    Outcome {
        ping: String,
        device: String,
        outcome: &'static str,
        at_ms: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        accepted_ms: Option<u64>,
    },
    Gap {
        why: &'static str,
    },
}

impl From<&OutcomeEvent> for Entry {
    fn from(event: &OutcomeEvent) -> Entry {
        match event {
            OutcomeEvent::Ended(record) => Entry::Outcome {
                ping: record.ping.to_string(),
                device: record.device.to_string(),
                outcome: record.outcome.as_str(),
                at_ms: record.at_ms,
                accepted_ms: record.accepted_ms,
            },
            OutcomeEvent::Gap(gap) => Entry::Gap { why: gap.as_str() },
        }
    }
}

impl OutcomeGap {
    /// The word for it, wherever it is told.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            OutcomeGap::Dropped => "dropped",
            OutcomeGap::Lost => "lost",
            OutcomeGap::Unreadable => "unreadable",
            OutcomeGap::Elsewhere => "elsewhere",
        }
    }
}

/// The events of one post, while they are gathered.
#[derive(Default)]
pub(super) struct Gathering {
    text: String,
    /// How many.
    pub(super) events: u32,
    /// When the last outcome among them ended, Unix milliseconds.
    pub(super) last_ms: Option<u64>,
    /// When the first one did.
    pub(super) first_ms: Option<u64>,
}

impl Gathering {
    /// Takes an event, unless it would not fit any more.
    pub(super) fn take(&mut self, event: &OutcomeEvent) -> bool {
        // Our own types of texts and numbers: serialising them cannot fail.
        let entry = serde_json::to_string(&Entry::from(event)).unwrap_or_default();
        if self.text.len() + entry.len() + 1 + FRAME_BYTES > DeadLetter::BODY_MAX {
            return false;
        }
        if !self.text.is_empty() {
            self.text.push(',');
        }
        self.text.push_str(&entry);
        self.events += 1;
        if let OutcomeEvent::Ended(record) = event {
            self.first_ms.get_or_insert(record.at_ms);
            self.last_ms = Some(record.at_ms);
        }
        true
    }

    /// The body. `now_ms` stands in where no outcome tells the time.
    pub(super) fn body(&self, next: OutcomePosition, now_ms: u64) -> Bytes {
        let at = utc(self.last_ms.unwrap_or(now_ms));
        Bytes::from(format!(
            r#"{{"type":"{OUTCOMES}","timestamp":"{at}","data":{{"next":"o{:016x}","events":[{}]}}}}"#,
            next.0, self.text
        ))
    }
}

/// What a test posts.
pub(super) fn test_body(now_ms: u64) -> Bytes {
    let at = utc(now_ms);
    Bytes::from(format!(
        r#"{{"type":"{TEST}","timestamp":"{at}","data":{{}}}}"#
    ))
}

/// The headers of an attempt: the id, now, and a signature with each secret that is good now.
pub(super) fn headers(
    record: &CallbackRecord,
    id: &str,
    body: &[u8],
    now_ms: u64,
) -> Vec<(&'static str, String)> {
    let seconds = (now_ms / 1_000).to_string();
    let mut signatures = String::new();
    for secret in good(&record.secrets, now_ms) {
        let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, &secret.key));
        for part in [id.as_bytes(), b".", seconds.as_bytes(), b".", body] {
            context.update(part);
        }
        let separator = if signatures.is_empty() { "" } else { " " };
        // Writing to a text cannot fail.
        let _ = write!(
            signatures,
            "{separator}v1,{}",
            STANDARD.encode(context.sign())
        );
    }
    vec![
        ("webhook-id", id.to_owned()),
        ("webhook-timestamp", seconds),
        ("webhook-signature", signatures),
    ]
}

/// The secrets that sign at this time.
pub(super) fn good(secrets: &[SigningSecret], now_ms: u64) -> impl Iterator<Item = &SigningSecret> {
    secrets
        .iter()
        .filter(move |secret| secret.until_ms.is_none_or(|until| now_ms < until))
}

/// Reads a secret as it is written.
pub(super) fn parse_secret(text: &str) -> Option<Vec<u8>> {
    let key = STANDARD.decode(text.strip_prefix(SECRET_PREFIX)?).ok()?;
    SECRET_BYTES.contains(&key.len()).then_some(key)
}

/// Writes a secret.
pub(super) fn secret_text(key: &[u8]) -> String {
    format!("{SECRET_PREFIX}{}", STANDARD.encode(key))
}

/// A time of RFC 3339, in UTC.
fn utc(unix_ms: u64) -> String {
    let (days, in_day) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    // Days since 0000-03-01, in eras of 400 years (proleptic Gregorian calendar).
    let days = days + 719_468;
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    let (seconds, millis) = (in_day / 1_000, in_day % 1_000);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{millis:03}Z",
        seconds / 3_600,
        seconds / 60 % 60,
        seconds % 60
    )
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::delivery::{AppId, DeviceId, Outcome, PingId};
    use crate::ports::OutcomeRecord;

    fn record(secrets: Vec<SigningSecret>) -> CallbackRecord {
        CallbackRecord {
            app: AppId::DEFAULT,
            url: "https://hooks.example.com/".to_owned(),
            outcomes: Vec::new(),
            secrets,
            created_ms: 0,
            position: OutcomePosition(0),
            sending: None,
            failing: None,
            gone_ms: None,
            next_letter: 0,
        }
    }

    fn secret(text: &str, until_ms: Option<u64>) -> SigningSecret {
        SigningSecret {
            key: parse_secret(text).unwrap(),
            until_ms,
        }
    }

    /// Made with the standard library of Python: `hmac.new(key, b"msg_1.1674087231." + body, "sha256")`.
    #[test]
    fn a_signature_is_as_others_compute_it() {
        let key = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let record = record(vec![secret(key, None)]);
        let headers = headers(
            &record,
            "msg_p5jXN8AQM9LWM0D4loKWxJek",
            br#"{"test": 2432232314}"#,
            1_614_265_330_999,
        );
        assert_eq!(
            headers,
            [
                ("webhook-id", "msg_p5jXN8AQM9LWM0D4loKWxJek".to_owned()),
                ("webhook-timestamp", "1614265330".to_owned()),
                (
                    "webhook-signature",
                    "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=".to_owned()
                ),
            ]
        );
    }

    #[test]
    fn while_two_secrets_are_good_both_sign_and_after_that_the_newest_alone() {
        let new = "whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
        let old = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let both = record(vec![secret(new, None), secret(old, Some(10_000))]);
        let signature =
            |record: &CallbackRecord, now_ms| headers(record, "a", b"{}", now_ms).pop().unwrap().1;
        let signed = signature(&both, 9_999);
        let parts: Vec<&str> = signed.split(' ').collect();
        assert_eq!(parts.len(), 2);
        assert_eq!(parts[0], signature(&record(vec![secret(new, None)]), 9_999));
        assert_eq!(parts[1], signature(&record(vec![secret(old, None)]), 9_999));
        assert_eq!(
            signature(&both, 10_000),
            signature(&record(vec![secret(new, None)]), 10_000)
        );
    }

    #[test]
    fn secrets_are_read_as_they_were_written_and_only_if_they_are_long_enough() {
        let key = [7; 32];
        assert_eq!(parse_secret(&secret_text(&key)), Some(key.to_vec()));
        for bad in [
            String::new(),
            "whsec_".to_owned(),
            "whsec_!".to_owned(),
            secret_text(&[1; 23]),
            secret_text(&[1; 65]),
            secret_text(&key).replace("whsec_", ""),
        ] {
            assert_eq!(parse_secret(&bad), None, "{bad}");
        }
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (ms, text) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_400_000, "2000-02-29T00:00:00.000Z"),
            (951_868_799_999, "2000-02-29T23:59:59.999Z"),
            (1_795_250_000_400, "2026-11-21T08:33:20.400Z"),
            (4_107_542_400_000, "2100-03-01T00:00:00.000Z"),
        ] {
            assert_eq!(utc(ms), text);
        }
    }

    #[test]
    fn a_body_is_json_and_never_larger_than_a_dead_letter_may_be() {
        let ended = OutcomeEvent::Ended(OutcomeRecord {
            app: AppId::DEFAULT,
            ping: PingId([1; 16]),
            device: DeviceId([2; 16]),
            outcome: Outcome::Acknowledged,
            at_ms: u64::MAX,
            accepted_ms: Some(u64::MAX),
        });
        let mut gathering = Gathering::default();
        assert!(gathering.take(&OutcomeEvent::Gap(OutcomeGap::Lost)));
        while gathering.take(&ended) {}
        let body = gathering.body(OutcomePosition(u64::MAX), 0);
        assert!(body.len() <= DeadLetter::BODY_MAX);
        assert!(gathering.events > 250, "{}", gathering.events);
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let events = value["data"]["events"].as_array().unwrap();
        assert_eq!(events.len(), gathering.events as usize);
        assert_eq!(
            events[0],
            serde_json::json!({"event": "gap", "why": "lost"})
        );
        assert_eq!(events[1]["outcome"], "acknowledged");
        assert_eq!(value["data"]["next"], "offffffffffffffff");
    }
}
