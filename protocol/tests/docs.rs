//! docs/protocol.md and docs/errors.md against the code: tables between `<!-- generated:NAME -->` and `<!-- /generated -->` are
//! written from it (`UPDATE_DOCS=1` rewrites them), and the sessions that are shown are understood by the codec.

#![allow(clippy::unwrap_used)]

use std::fmt::Write;
use std::path::PathBuf;

use bellwire_protocol::limits::TABLE;
use bellwire_protocol::schema::{
    CONTENT, DEVICE_FRAMES, ENCODINGS, Member, SEEN, SERVER_FRAMES, Shape, enumerations,
};
use bellwire_protocol::{Code, Codec, Decoded};

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

fn members(members: &[Member]) -> String {
    let mut out = "| member | CBOR key | type | |\n| --- | --- | --- | --- |\n".to_owned();
    for member in members {
        let mark = if member.optional { "?" } else { "" };
        writeln!(
            out,
            "| `{}`{mark} | {} | {} | {} |",
            member.name,
            member.key,
            member.kind.name(),
            member.about
        )
        .unwrap();
    }
    out
}

fn frames(shapes: &[Shape]) -> String {
    let mut out = "| frame | CBOR type | |\n| --- | --- | --- |\n".to_owned();
    for shape in shapes {
        writeln!(
            out,
            "| `{}` | {} | {} |",
            shape.name,
            shape.number.unwrap(),
            shape.about
        )
        .unwrap();
    }
    out.push_str("\nA question mark stands behind optional members.\n");
    for shape in shapes.iter().filter(|shape| !shape.members.is_empty()) {
        write!(out, "\n**`{}`**\n\n{}", shape.name, members(shape.members)).unwrap();
    }
    out
}

fn device_frames() -> String {
    format!(
        "{}\n**An entry of `seen`**\n\n{}",
        frames(DEVICE_FRAMES),
        members(SEEN.members)
    )
}

fn enumeration_table() -> String {
    let mut out = "| enumeration | values in JSON, and in CBOR |\n| --- | --- |\n".to_owned();
    for (name, values) in enumerations() {
        let values: Vec<_> = values
            .iter()
            .enumerate()
            .map(|(number, value)| format!("`{value}` {number}"))
            .collect();
        writeln!(out, "| {name} | {} |", values.join(", ")).unwrap();
    }
    let encodings: Vec<_> = ENCODINGS
        .iter()
        .map(|encoding| format!("`{}`", encoding.name()))
        .collect();
    writeln!(
        out,
        "| `encoding` (a text in both) | {} |",
        encodings.join(", ")
    )
    .unwrap();
    out
}

fn limits() -> String {
    let mut out = "| limit | value | of what |\n| --- | --- | --- |\n".to_owned();
    for limit in TABLE {
        let digits = limit.value.to_string();
        let groups: Vec<_> = digits
            .as_bytes()
            .rchunks(3)
            .rev()
            .map(|group| str::from_utf8(group).unwrap())
            .collect();
        let value = format!("{} {}", groups.join(","), limit.unit);
        writeln!(
            out,
            "| `{}` | {} | {} |",
            limit.name,
            value.trim(),
            limit.about
        )
        .unwrap();
    }
    out
}

fn close_codes() -> String {
    let mut out =
        "| code | number | WebSocket | retry | |\n| --- | --- | --- | --- | --- |\n".to_owned();
    for code in Code::ALL {
        if let (Some(quic), Some(websocket)) = (code.quic_close(), code.websocket_close()) {
            let (retry, meaning) = (code.retry().name(), code.meaning());
            writeln!(
                out,
                "| `{code}` | {quic} | {websocket} | {retry} | {meaning} |"
            )
            .unwrap();
        }
    }
    out
}

fn http_codes() -> String {
    let mut codes: Vec<_> = Code::ALL
        .iter()
        .filter(|code| code.http_status().is_some())
        .collect();
    codes.sort_by_key(|code| code.http_status());
    let mut out = "| status | code | whose | retry | what it means | what to do |\n".to_owned();
    out.push_str("| --- | --- | --- | --- | --- | --- |\n");
    for code in codes {
        let (status, blame, retry) = (
            code.http_status().unwrap(),
            code.blame().name(),
            code.retry().name(),
        );
        writeln!(
            out,
            "| {status} | `{code}` | {blame} | {retry} | {} | {} |",
            code.meaning(),
            code.remedy()
        )
        .unwrap();
    }
    out
}

fn link_codes() -> String {
    let mut out =
        "| number | WebSocket | code | whose | retry | what it means | what to do |\n".to_owned();
    out.push_str("| --- | --- | --- | --- | --- | --- | --- |\n");
    for code in Code::ALL {
        if let (Some(quic), Some(websocket)) = (code.quic_close(), code.websocket_close()) {
            let (blame, retry) = (code.blame().name(), code.retry().name());
            let (meaning, remedy) = (code.meaning(), code.remedy());
            writeln!(
                out,
                "| {quic} | {websocket} | `{code}` | {blame} | {retry} | {meaning} | {remedy} |"
            )
            .unwrap();
        }
    }
    out
}

/// Rewrites each generated part of a page.
fn regenerate(page: &str, parts: &[(&str, String)]) -> String {
    const END: &str = "<!-- /generated -->";
    let mut page = page.to_owned();
    for (name, table) in parts {
        let begin = format!("<!-- generated:{name} -->\n");
        let from = page
            .find(&begin)
            .unwrap_or_else(|| panic!("`{}` is missing", begin.trim()))
            + begin.len();
        let to = from
            + page[from..]
                .find(END)
                .unwrap_or_else(|| panic!("`{}` is not ended", begin.trim()));
        page.replace_range(from..to, table);
    }
    assert_eq!(
        page.matches("<!-- generated:").count(),
        parts.len(),
        "a generated part that nobody generates"
    );
    page
}

#[track_caller]
fn check(name: &str, parts: &[(&str, String)]) {
    let page = std::fs::read_to_string(path(name)).unwrap();
    let expected = regenerate(&page, parts);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        std::fs::write(path(name), expected).unwrap();
    } else {
        assert!(
            page == expected,
            "docs/{name} has drifted from the code: run the tests once with UPDATE_DOCS=1"
        );
    }
}

#[test]
fn the_protocol_page_says_what_the_code_does() {
    check(
        "protocol.md",
        &[
            ("device-frames", device_frames()),
            ("server-frames", frames(SERVER_FRAMES)),
            ("content", members(CONTENT.members)),
            ("enumerations", enumeration_table()),
            ("close-codes", close_codes()),
            ("limits", limits()),
        ],
    );
}

#[test]
fn the_errors_page_says_what_the_code_does() {
    check(
        "errors.md",
        &[("http-codes", http_codes()), ("link-codes", link_codes())],
    );
}

#[test]
fn the_sessions_shown_are_understood() {
    let page = std::fs::read_to_string(path("protocol.md")).unwrap();
    let blocks: Vec<_> = page
        .split("```json\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap())
        .collect();
    assert!(!blocks.is_empty());
    for line in blocks.iter().flat_map(|block| block.lines()) {
        let (speaker, frame) = line.split_at(2);
        let understood = match speaker {
            "> " => matches!(
                Codec::Json.decode_device(frame.as_bytes()),
                Ok(Decoded::Frame(_))
            ),
            "< " => matches!(
                Codec::Json.decode_server(frame.as_bytes()),
                Ok(Decoded::Frame(_))
            ),
            _ => panic!("who says `{line}`?"),
        };
        assert!(understood, "not understood: {line}");
    }
}

/// Numbers that the prose repeats.
#[test]
fn the_prose_repeats_the_right_numbers() {
    use bellwire_protocol::limits::*;
    let page = std::fs::read_to_string(path("protocol.md"))
        .unwrap()
        .replace('\n', " ");
    let (quic, websocket) = (QUIC_KEEP_ALIVE_S, WEBSOCKET_KEEP_ALIVE_S);
    for phrase in [
        format!(
            "has {} seconds from the accepted connection",
            HELLO_TIMEOUT_MS / 1_000
        ),
        format!("may do so for {FRAMES_BEFORE_WELCOME_MAX} frames"),
        format!(
            "they are {} to {} seconds on QUIC and {} to {} on",
            quic.0, quic.1, websocket.0, websocket.1
        ),
        format!(
            "hears nothing for {} seconds after its `ping`",
            PONG_TIMEOUT_MS / 1_000
        ),
        format!("`bye` within {} seconds", GOAWAY_GRACE_MS / 1_000),
        format!(
            "stays away for at least {} seconds",
            REPLACED_AWAY_MIN_MS / 1_000
        ),
        format!("begins at {} second and doubles", BACKOFF_FIRST_MS / 1_000),
        format!("up to {} minutes (full jitter)", BACKOFF_MAX_MS / 60_000),
        format!("After `later` it adds {} seconds", LATER_MIN_MS / 1_000),
        format!(
            "`expires_ms` {} seconds after `accepted_ms`",
            TTL_ZERO_GRACE_MS / 1_000
        ),
        format!("keys {CONTENT_KEY_MIN} to {CONTENT_KEY_MAX} are set aside"),
    ] {
        assert!(
            page.contains(&phrase),
            "docs/protocol.md does not say `{phrase}`"
        );
    }
}
