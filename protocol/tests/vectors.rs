//! The golden vectors in `protocol/vectors/`: files that clients in other languages test against. They bind: a change here
//! is a change of the protocol. After adding a frame, run once with `UPDATE_VECTORS=1`, and read the difference.

#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use bellwire_protocol::*;
use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

#[derive(Serialize, Deserialize)]
struct File {
    /// For people who open the file.
    about: String,
    /// Both forms of one frame; encoders must make exactly these, or the same members in another order.
    frames: Vec<Golden>,
    /// Must be read, as the frame named in `like`, or skipped.
    tolerated: Vec<Odd>,
    /// Must be refused, with this code.
    refused: Vec<Odd>,
}

#[derive(Serialize, Deserialize, PartialEq, Debug)]
struct Golden {
    name: String,
    json: String,
    cbor: String,
}

#[derive(Serialize, Deserialize)]
struct Odd {
    name: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    json: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cbor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    like: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    code: Option<String>,
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("vectors")
        .join(name)
}

fn id(n: u8) -> Id {
    Id(std::array::from_fn(|place| {
        n.wrapping_mul(16).wrapping_add(place as u8)
    }))
}

fn device_frames() -> Vec<(&'static str, DeviceFrame)> {
    let hello = Hello {
        device: id(1),
        secret: None,
        instance: id(2),
        attempt: 1,
        seen: Vec::new(),
        window: None,
        min_urgency: None,
        agent: None,
    };
    let full = Hello {
        secret: Some("s3cret-\"quoted\"-ü".into()),
        attempt: 4_294_967_296,
        seen: vec![
            Seen {
                id: id(3),
                verdict: Verdict::Acknowledged,
            },
            Seen {
                id: id(4),
                verdict: Verdict::Declined,
            },
        ],
        window: Some(256),
        min_urgency: Some(Urgency::VeryLow),
        agent: Some("example/1.0".into()),
        ..hello.clone()
    };
    let topics = |names: &[&str]| Topics {
        topics: names.iter().map(|&name| name.to_owned()).collect(),
    };
    vec![
        ("hello with a client certificate", DeviceFrame::Hello(hello)),
        ("hello with everything", DeviceFrame::Hello(full)),
        ("ack up to", DeviceFrame::Ack(Ack::UpTo(24))),
        (
            "ack up to the greatest number",
            DeviceFrame::Ack(Ack::UpTo(limits::INTEGER_MAX)),
        ),
        ("ack ids", DeviceFrame::Ack(Ack::Ids(vec![id(3), id(4)]))),
        (
            "decline",
            DeviceFrame::Decline(Decline {
                id: id(3),
                reason: "expired".into(),
            }),
        ),
        (
            "presence active",
            DeviceFrame::Presence(Presence {
                state: PresenceState::Active,
            }),
        ),
        (
            "presence idle",
            DeviceFrame::Presence(Presence {
                state: PresenceState::Idle,
            }),
        ),
        (
            "subscribe",
            DeviceFrame::Subscribe(topics(&["news", "région/нью"])),
        ),
        ("unsubscribe", DeviceFrame::Unsubscribe(topics(&["news"]))),
        ("ping", DeviceFrame::Ping),
        ("bye", DeviceFrame::Bye),
    ]
}

fn server_frames() -> Vec<(&'static str, ServerFrame)> {
    let welcome = Welcome {
        session: 77,
        pending: 3,
        window: 32,
        max_bytes: 4_096,
        keep_alive_s: KeepAlive {
            min_s: 20,
            max_s: 120,
        },
        now_ms: 1_767_225_600_000,
    };
    let notify = Notify {
        seq: 1,
        redelivered: false,
        id: id(3),
        accepted_ms: 1_767_225_600_000,
        expires_ms: 1_767_830_400_000,
        urgency: Urgency::Normal,
        content: Content::default(),
    };
    let text = Content {
        title: Some("Hello".into()),
        body: Some("Wörld \"✓\"\n\u{1}".into()),
        ..Content::default()
    };
    let full = Content {
        title: Some("Title".into()),
        body: Some("Body".into()),
        sound: Some("bell.wav".into()),
        badge: Some(u32::MAX),
        vibrate_ms: Some(2_000),
        category: Some("invoice".into()),
        sync: Some(vec!["Customer".into(), "Product".into()]),
        data: Some(bytes::Bytes::from_static(&[0, 1, 2, 0xfb, 0xff])),
        encoding: Some(Encoding::Aes128Gcm),
        topic: Some("news".into()),
    };
    let urgent = |urgency, seq| Notify {
        seq,
        urgency,
        redelivered: true,
        ..notify.clone()
    };
    let goaway = |reason, endpoint: Option<&str>| {
        let reconnect_ms = ReconnectRange {
            min_ms: 1_000,
            max_ms: 30_000,
        };
        ServerFrame::Goaway(Goaway {
            reason,
            reconnect_ms,
            endpoint: endpoint.map(str::to_owned),
        })
    };
    let error = |retry| {
        let message = "`up_to` is 9, the last `seq` sent is 3".into();
        ServerFrame::Error(ErrorFrame {
            code: "ack_ahead".into(),
            message,
            retry,
        })
    };
    vec![
        ("welcome", ServerFrame::Welcome(welcome)),
        (
            "notify without content",
            ServerFrame::Notify(notify.clone()),
        ),
        (
            "notify with text",
            ServerFrame::Notify(Notify {
                content: text,
                ..notify.clone()
            }),
        ),
        (
            "notify with everything",
            ServerFrame::Notify(Notify {
                seq: 300,
                content: full,
                ..notify.clone()
            }),
        ),
        (
            "notify very-low",
            ServerFrame::Notify(urgent(Urgency::VeryLow, 2)),
        ),
        ("notify low", ServerFrame::Notify(urgent(Urgency::Low, 3))),
        (
            "notify high",
            ServerFrame::Notify(urgent(Urgency::High, 70_000)),
        ),
        (
            "withdraw",
            ServerFrame::Withdraw(Withdraw {
                ids: vec![id(3), id(4)],
            }),
        ),
        ("pong", ServerFrame::Pong),
        (
            "subscribed",
            ServerFrame::Subscribed(Topics {
                topics: vec!["news".into(), "région/нью".into()],
            }),
        ),
        (
            "subscribed to nothing",
            ServerFrame::Subscribed(Topics { topics: Vec::new() }),
        ),
        ("goaway drain", goaway(GoawayReason::Drain, None)),
        ("goaway replaced", goaway(GoawayReason::Replaced, None)),
        ("goaway revoked", goaway(GoawayReason::Revoked, None)),
        (
            "goaway upgrade",
            goaway(GoawayReason::Upgrade, Some("push2.example.com:4433")),
        ),
        ("error never", error(Retry::Never)),
        ("error later", error(Retry::Later)),
        ("error now", error(Retry::Now)),
    ]
}

fn check<F: PartialEq + std::fmt::Debug>(
    name: &str,
    frames: Vec<(&'static str, F)>,
    encode: fn(Codec, &F) -> Vec<u8>,
    decode: fn(Codec, &[u8]) -> Result<Decoded<F>, DecodeError>,
) {
    let golden: Vec<Golden> = frames
        .iter()
        .map(|(name, frame)| Golden {
            name: (*name).to_owned(),
            json: String::from_utf8(encode(Codec::Json, frame)).unwrap(),
            cbor: HEXLOWER.encode(&encode(Codec::Cbor, frame)),
        })
        .collect();
    let path = path(name);
    let mut file: File = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    if std::env::var_os("UPDATE_VECTORS").is_some() {
        file.frames = golden;
        std::fs::write(&path, serde_json::to_string_pretty(&file).unwrap() + "\n").unwrap();
        return;
    }

    assert_eq!(
        file.frames, golden,
        "{name} differs from what the codecs write; a change here changes the protocol"
    );
    for (vector, (name, frame)) in file.frames.iter().zip(&frames) {
        let cbor = HEXLOWER.decode(vector.cbor.as_bytes()).unwrap();
        for (codec, bytes) in [(Codec::Json, vector.json.as_bytes()), (Codec::Cbor, &cbor)] {
            match decode(codec, bytes) {
                Ok(Decoded::Frame(decoded)) => assert_eq!(decoded, *frame, "{name} as {codec:?}"),
                other => panic!("{name} as {codec:?}: {other:?}"),
            }
        }
    }

    let forms = |odd: &Odd| {
        let json = odd
            .json
            .clone()
            .map(|text| (Codec::Json, text.into_bytes()));
        let cbor = odd
            .cbor
            .as_ref()
            .map(|hex| (Codec::Cbor, HEXLOWER.decode(hex.as_bytes()).unwrap()));
        let forms: Vec<_> = json.into_iter().chain(cbor).collect();
        assert!(!forms.is_empty(), "{} has no form", odd.name);
        forms
    };
    for odd in &file.tolerated {
        for (codec, bytes) in forms(odd) {
            match (decode(codec, &bytes), odd.like.as_deref()) {
                (Ok(Decoded::Skipped), Some("skipped")) => {}
                (Ok(Decoded::Frame(frame)), Some(like)) => {
                    let (_, expected) = frames.iter().find(|(name, _)| *name == like).unwrap();
                    assert_eq!(frame, *expected, "{} as {codec:?}", odd.name);
                }
                (other, like) => panic!("{} as {codec:?}: {other:?} instead of {like:?}", odd.name),
            }
        }
    }
    for odd in &file.refused {
        for (codec, bytes) in forms(odd) {
            match decode(codec, &bytes) {
                Err(error) => assert_eq!(
                    Some(error.code().name()),
                    odd.code.as_deref(),
                    "{}",
                    odd.name
                ),
                Ok(decoded) => panic!("{} as {codec:?} was read as {decoded:?}", odd.name),
            }
        }
    }
}

#[test]
fn device_frames_are_written_and_read_as_the_vectors_say() {
    check(
        "device.json",
        device_frames(),
        Codec::encode_device,
        Codec::decode_device,
    );
}

#[test]
fn server_frames_are_written_and_read_as_the_vectors_say() {
    check(
        "server.json",
        server_frames(),
        Codec::encode_server,
        Codec::decode_server,
    );
}
