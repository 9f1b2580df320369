//! docs/write-a-client.md against the code: every frame on the page is one, every number on it is the right one.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use bellwire_client::WINDOW_IDS;
use bellwire_protocol::limits::*;
use bellwire_protocol::{Code, Codec, Decoded, Retry};

fn page() -> String {
    std::fs::read_to_string(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../docs/write-a-client.md"
    ))
    .unwrap()
}

#[test]
fn every_line_of_a_session_is_a_frame() {
    let page = page();
    let (mut from_device, mut from_server) = (Vec::new(), Vec::new());
    for line in page.lines() {
        if let Some(frame) = line.strip_prefix("> {") {
            match Codec::Json
                .decode_device(format!("{{{frame}").as_bytes())
                .unwrap()
            {
                Decoded::Frame(frame) => from_device.push(frame.name()),
                Decoded::Skipped => panic!("an unknown frame: {line}"),
            }
        }
        if let Some(frame) = line.strip_prefix("< {") {
            match Codec::Json
                .decode_server(format!("{{{frame}").as_bytes())
                .unwrap()
            {
                Decoded::Frame(frame) => from_server.push(frame.name()),
                Decoded::Skipped => panic!("an unknown frame: {line}"),
            }
        }
    }
    assert_eq!(from_device, ["hello", "ack", "decline", "ping", "bye"]);
    assert_eq!(
        from_server,
        ["welcome", "notify", "notify", "pong", "error"]
    );
}

/// The page has this, wherever its lines break.
#[track_caller]
fn says(what: &str) {
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        flat(&page()).contains(&flat(what)),
        "the page does not say `{what}`"
    );
}

fn thousands(number: usize) -> String {
    if number < 1_000 {
        number.to_string()
    } else {
        format!("{},{:03}", number / 1_000, number % 1_000)
    }
}

#[test]
fn the_numbers_are_those_of_the_code() {
    says(&format!("the last {} ids", thousands(WINDOW_IDS)));
    says(&format!(
        "at most {} bytes in JSON",
        thousands(SERVER_JSON_FRAME_MAX_BYTES)
    ));
    says(&format!(
        "A frame of yours has at most {} KiB",
        DEVICE_FRAME_MAX_BYTES / 1024
    ));
    says(&format!("`seen`: up to {SEEN_MAX} objects"));
    says(&format!("an array of up to {ACK_IDS_MAX} ids"));
    says(&format!(
        "{WINDOW_MIN} to {WINDOW_MAX}; {WINDOW_DEFAULT} if you leave it out"
    ));
    says(&format!(
        "at most {REASON_BYTES_MAX} bytes; the publisher sees it"
    ));
    says(&format!(
        "first, within {} s, once",
        HELLO_TIMEOUT_MS / 1_000
    ));
    says(&format!(
        "within {} seconds after `hello`",
        WELCOME_TIMEOUT_MS / 1_000
    ));
    says(&format!(
        "If {} seconds after a `ping`",
        PONG_TIMEOUT_MS / 1_000
    ));
    says(&format!("| {} s plus a random time", LATER_MIN_MS / 1_000));
    says(&format!(
        "at least {} s, then within `reconnect_ms`",
        REPLACED_AWAY_MIN_MS / 1_000
    ));
    says(&format!("`bye` within {} s", GOAWAY_GRACE_MS / 1_000));
    says(&format!(
        "C is {} second after the first failure",
        BACKOFF_FIRST_MS / 1_000
    ));
    says(&format!("up to {} seconds", BACKOFF_MAX_MS / 1_000));
}

#[test]
fn the_close_codes_are_those_of_the_table() {
    for code in Code::ALL
        .iter()
        .filter(|code| code.websocket_close().is_some())
    {
        let number = code.websocket_close().unwrap().to_string();
        let named = page().contains(&number);
        // What is neither named nor lost means "later".
        assert!(
            named || code.retry() == Retry::Later,
            "{code} is not on the page"
        );
    }
    says("The server closes with 4000");
}
