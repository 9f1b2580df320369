//! The readable codec: one JSON object with a `type` member.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};
use serde_json::error::Category;

use super::{DecodeError, Decoded};
use crate::content::Content;
use crate::frame::{DeviceFrame, Notify, ServerFrame, Urgency};
use crate::id::Id;
use crate::limits::DEPTH_MAX;

pub(crate) fn write<F: Serialize>(frame: &F) -> Vec<u8> {
    serde_json::to_vec(frame)
        .expect("frames hold only texts, numbers and arrays of them, which always serialise")
}

pub(crate) fn read_device(bytes: &[u8]) -> Result<Decoded<DeviceFrame>, DecodeError> {
    let text = check_text(bytes)?;
    Ok(Decoded::Frame(match &*read_type(text)? {
        "hello" => DeviceFrame::Hello(parse(text)?),
        "ack" => DeviceFrame::Ack(parse(text)?),
        "decline" => DeviceFrame::Decline(parse(text)?),
        "presence" => DeviceFrame::Presence(parse(text)?),
        "subscribe" => DeviceFrame::Subscribe(parse(text)?),
        "unsubscribe" => DeviceFrame::Unsubscribe(parse(text)?),
        "ping" => DeviceFrame::Ping,
        "bye" => DeviceFrame::Bye,
        _ => return Ok(Decoded::Skipped),
    }))
}

pub(crate) fn read_server(bytes: &[u8]) -> Result<Decoded<ServerFrame>, DecodeError> {
    let text = check_text(bytes)?;
    Ok(Decoded::Frame(match &*read_type(text)? {
        "welcome" => ServerFrame::Welcome(parse(text)?),
        "notify" => ServerFrame::Notify(read_notify(text)?),
        "withdraw" => ServerFrame::Withdraw(parse(text)?),
        "pong" => ServerFrame::Pong,
        "subscribed" => ServerFrame::Subscribed(parse(text)?),
        "goaway" => ServerFrame::Goaway(parse(text)?),
        "error" => ServerFrame::Error(parse(text)?),
        _ => return Ok(Decoded::Skipped),
    }))
}

fn read_notify(text: &str) -> Result<Notify, DecodeError> {
    #[derive(Deserialize)]
    struct Own {
        seq: u64,
        redelivered: bool,
        id: Id,
        accepted_ms: u64,
        expires_ms: u64,
        urgency: Urgency,
    }
    // The content's members stand beside the frame's own; two passes are cheaper than buffering what the first leaves over.
    let Own {
        seq,
        redelivered,
        id,
        accepted_ms,
        expires_ms,
        urgency,
    } = parse(text)?;
    let content: Content = parse(text)?;
    Ok(Notify {
        seq,
        redelivered,
        id,
        accepted_ms,
        expires_ms,
        urgency,
        content,
    })
}

fn read_type(text: &str) -> Result<Cow<'_, str>, DecodeError> {
    #[derive(Deserialize)]
    struct Tag<'a> {
        #[serde(rename = "type", borrow)]
        frame_type: Cow<'a, str>,
    }
    Ok(parse::<Tag<'_>>(text)?.frame_type)
}

/// UTF-8, an object, and not nested too deep. Whether it is well-formed is left to the parser.
fn check_text(bytes: &[u8]) -> Result<&str, DecodeError> {
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let before = &bytes[..error.valid_up_to()];
        let line = before.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let column = before
            .iter()
            .rev()
            .take_while(|&&byte| byte != b'\n')
            .count()
            + 1;
        DecodeError::NotJson { line, column }
    })?;
    // A derived struct would also be read from an array.
    if !text
        .trim_start_matches([' ', '\t', '\r', '\n'])
        .starts_with('{')
    {
        return Err(DecodeError::NotAMap);
    }
    let (mut depth, mut in_string, mut escaped) = (0usize, false, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'{' | b'[' if !in_string => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(DecodeError::TooDeep);
                }
            }
            b'}' | b']' if !in_string => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    Ok(text)
}

fn parse<'de, T: Deserialize<'de>>(text: &'de str) -> Result<T, DecodeError> {
    serde_json::from_str(text).map_err(|error| explain(&error))
}

/// Every member name that may be missing or doubled.
const MEMBERS: &[&str] = &[
    "type",
    "device",
    "secret",
    "instance",
    "attempt",
    "seen",
    "window",
    "min_urgency",
    "agent",
    "up_to",
    "ids",
    "id",
    "verdict",
    "reason",
    "state",
    "topics",
    "session",
    "pending",
    "max_bytes",
    "keep_alive_s",
    "now_ms",
    "seq",
    "redelivered",
    "accepted_ms",
    "expires_ms",
    "urgency",
    "reconnect_ms",
    "endpoint",
    "code",
    "message",
    "retry",
    "title",
    "body",
    "sound",
    "badge",
    "vibrate_ms",
    "category",
    "sync",
    "data",
    "encoding",
    "topic",
];

/// Takes from the parser's error what may be shown. Its own text may quote what the peer sent.
fn explain(error: &serde_json::Error) -> DecodeError {
    let (line, column) = (error.line(), error.column());
    match error.classify() {
        Category::Data => {
            let text = error.to_string();
            let member = |prefix: &str| {
                let name = text.strip_prefix(prefix)?.split('`').next()?;
                MEMBERS.iter().copied().find(|member| *member == name)
            };
            if let Some(name) = member("missing field `") {
                DecodeError::Missing(name)
            } else if let Some(name) = member("duplicate field `") {
                DecodeError::Duplicate(name)
            } else {
                DecodeError::WrongValueAt { line, column }
            }
        }
        Category::Syntax if error.to_string().starts_with("trailing characters") => {
            DecodeError::TrailingBytes
        }
        Category::Syntax | Category::Eof | Category::Io => DecodeError::NotJson { line, column },
    }
}
