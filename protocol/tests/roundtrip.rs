//! Whatever can be said can be said in both codecs, and is understood as it was meant.

#![allow(clippy::unwrap_used)]

use bellwire_protocol::limits::*;
use bellwire_protocol::*;
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn id() -> impl Strategy<Value = Id> {
    any::<[u8; 16]>().prop_map(Id)
}

fn integer() -> impl Strategy<Value = u64> {
    prop_oneof![0u64..300, Just(INTEGER_MAX), 0..=INTEGER_MAX]
}

/// Texts of at most `most` bytes, with quotes, control characters and whatever else there is.
fn text(least: usize, most: usize) -> impl Strategy<Value = String> {
    vec(
        prop_oneof![
            any::<char>(),
            Just('"'),
            Just('\\'),
            Just('\u{1}'),
            Just('a')
        ],
        least..=most / 4,
    )
    .prop_map(|letters| letters.into_iter().collect())
}

fn urgency() -> impl Strategy<Value = Urgency> {
    prop::sample::select(vec![
        Urgency::VeryLow,
        Urgency::Low,
        Urgency::Normal,
        Urgency::High,
    ])
}

fn hello() -> impl Strategy<Value = Hello> {
    let verdict = prop::sample::select(vec![Verdict::Acknowledged, Verdict::Declined]);
    let seen = vec(
        (id(), verdict).prop_map(|(id, verdict)| Seen { id, verdict }),
        0..20,
    );
    let options = (
        option::of(text(1, 64)),
        option::of(1..=256u16),
        option::of(urgency()),
        option::of(text(0, 256)),
    );
    (id(), id(), integer(), seen, options).prop_map(|(device, instance, attempt, seen, options)| {
        let (secret, window, min_urgency, agent) = options;
        Hello {
            device,
            secret: secret.map(Secret),
            instance,
            attempt,
            seen,
            window,
            min_urgency,
            agent,
        }
    })
}

fn topics() -> impl Strategy<Value = Topics> {
    vec(text(1, TOPIC_BYTES_MAX), 0..10).prop_map(|topics| Topics { topics })
}

fn device_frame() -> impl Strategy<Value = DeviceFrame> {
    let state = prop::sample::select(vec![PresenceState::Active, PresenceState::Idle]);
    prop_oneof![
        hello().prop_map(DeviceFrame::Hello),
        integer().prop_map(|seq| DeviceFrame::Ack(Ack::UpTo(seq))),
        vec(id(), 0..=ACK_IDS_MAX).prop_map(|ids| DeviceFrame::Ack(Ack::Ids(ids))),
        (id(), text(0, 256)).prop_map(|(id, reason)| DeviceFrame::Decline(Decline { id, reason })),
        state.prop_map(|state| DeviceFrame::Presence(Presence { state })),
        topics().prop_map(DeviceFrame::Subscribe),
        topics().prop_map(DeviceFrame::Unsubscribe),
        Just(DeviceFrame::Ping),
        Just(DeviceFrame::Bye),
    ]
}

fn content() -> impl Strategy<Value = Content> {
    let texts = (
        option::of(text(0, 200)),
        option::of(text(0, 2_000)),
        option::of(text(0, 80)),
        option::of(text(0, 80)),
    );
    let numbers = (option::of(any::<u32>()), option::of(any::<u32>()));
    let rest = (
        option::of(vec(text(0, 40), 0..=SYNC_MAX)),
        option::of(vec(any::<u8>(), 0..600)),
        option::of(Just(Encoding::Aes128Gcm)),
        option::of(text(0, TOPIC_BYTES_MAX)),
    );
    (texts, numbers, rest).prop_map(
        |((title, body, sound, category), (badge, vibrate_ms), rest)| {
            let (sync, data, encoding, topic) = rest;
            let data = data.map(Into::into);
            Content {
                title,
                body,
                sound,
                badge,
                vibrate_ms,
                category,
                sync,
                data,
                encoding,
                topic,
            }
        },
    )
}

fn range(most: u32) -> impl Strategy<Value = (u32, u32)> {
    (1..=most, 1..=most).prop_map(|(a, b)| (a.min(b), a.max(b)))
}

fn server_frame() -> impl Strategy<Value = ServerFrame> {
    let welcome = (
        integer(),
        integer(),
        1..=256u16,
        any::<u32>(),
        range(KEEP_ALIVE_MAX_S),
        integer(),
    );
    let welcome = welcome.prop_map(
        |(session, pending, window, max_bytes, keep_alive, now_ms)| {
            ServerFrame::Welcome(Welcome {
                session,
                pending,
                window,
                max_bytes,
                keep_alive_s: keep_alive.into(),
                now_ms,
            })
        },
    );
    let notify = (
        integer(),
        any::<bool>(),
        id(),
        integer(),
        integer(),
        urgency(),
        content(),
    );
    let notify = notify.prop_map(
        |(seq, redelivered, id, accepted_ms, expires_ms, urgency, content)| {
            ServerFrame::Notify(Notify {
                seq,
                redelivered,
                id,
                accepted_ms,
                expires_ms,
                urgency,
                content,
            })
        },
    );
    let reason = prop::sample::select(vec![
        GoawayReason::Drain,
        GoawayReason::Replaced,
        GoawayReason::Revoked,
        GoawayReason::Upgrade,
    ]);
    let goaway = (
        reason,
        range(RECONNECT_MAX_MS),
        option::of(text(0, ENDPOINT_BYTES_MAX)),
    );
    let goaway = goaway.prop_map(|(reason, range, endpoint)| {
        ServerFrame::Goaway(Goaway {
            reason,
            reconnect_ms: range.into(),
            endpoint,
        })
    });
    let error = (prop::sample::select(Code::ALL), text(0, MESSAGE_BYTES_MAX));
    prop_oneof![
        welcome,
        notify,
        vec(id(), 0..=WITHDRAW_IDS_MAX).prop_map(|ids| ServerFrame::Withdraw(Withdraw { ids })),
        Just(ServerFrame::Pong),
        topics().prop_map(ServerFrame::Subscribed),
        goaway,
        error.prop_map(|(code, message)| ServerFrame::Error(ErrorFrame::new(code, message))),
    ]
}

const CODECS: [Codec; 2] = [Codec::Cbor, Codec::Json];

proptest! {
    #[test]
    fn a_device_is_understood_in_both_codecs(frame in device_frame()) {
        for codec in CODECS {
            prop_assert_eq!(codec.decode_device(&codec.encode_device(&frame)), Ok(Decoded::Frame(frame.clone())));
        }
    }

    #[test]
    fn a_server_is_understood_in_both_codecs(frame in server_frame()) {
        for codec in CODECS {
            prop_assert_eq!(codec.decode_server(&codec.encode_server(&frame)), Ok(Decoded::Frame(frame.clone())));
        }
    }

    #[test]
    fn a_frame_that_is_cut_anywhere_is_refused(frame in device_frame(), cut in any::<prop::sample::Index>()) {
        for codec in CODECS {
            let bytes = codec.encode_device(&frame);
            prop_assert!(codec.decode_device(&bytes[..cut.index(bytes.len())]).is_err());
        }
    }

    #[test]
    fn content_survives_its_rest_and_a_shared_notify_equals_a_single_one(content in content(), seq in integer()) {
        let bytes = content.to_cbor();
        prop_assert_eq!(Content::from_cbor(&bytes), Ok(content.clone()));
        let shared = SharedNotify::new(Id([5; 16]), 1, 2, Urgency::Low, bytes).unwrap();
        for codec in CODECS {
            let content = content.clone();
            let (id, urgency) = (Id([5; 16]), Urgency::Low);
            let single = Notify { seq, redelivered: true, id, accepted_ms: 1, expires_ms: 2, urgency, content };
            prop_assert_eq!(shared.frame(codec, seq, true).to_vec(), codec.encode_server(&ServerFrame::Notify(single)));
        }
    }

    #[test]
    fn a_frame_reader_gives_back_what_was_framed(frames in vec(vec(any::<u8>(), 0..400), 0..8), step in 1usize..50) {
        let mut stream = Vec::new();
        frames.iter().for_each(|frame| write_framed(&mut stream, frame));
        let mut reader = FrameReader::new(400);
        let mut out = Vec::new();
        for piece in stream.chunks(step) {
            reader.push(piece);
            while let Some(frame) = reader.pull().unwrap() {
                out.push(frame.to_vec());
            }
        }
        prop_assert_eq!(out, frames);
    }
}

/// The greatest content that an operator can allow fits a frame in either codec, even when every byte of it needs an escape.
#[test]
fn the_greatest_content_fits_a_frame() {
    let most = "\u{1}".repeat(CONTENT_MAX_BYTES - 100 * SYNC_MAX);
    let sync = vec!["\u{1}".repeat(100); SYNC_MAX];
    let texts = Content {
        body: Some(most),
        sync: Some(sync),
        badge: Some(u32::MAX),
        ..Content::default()
    };
    let data = Content {
        data: Some(vec![0xff; CONTENT_MAX_BYTES].into()),
        ..Content::default()
    };
    for content in [texts, data] {
        assert_eq!(content.size(), CONTENT_MAX_BYTES);
        let shared = SharedNotify::new(
            Id([255; 16]),
            INTEGER_MAX,
            INTEGER_MAX,
            Urgency::VeryLow,
            content.to_cbor(),
        );
        let shared = shared.unwrap();
        for codec in CODECS {
            let bytes = shared.frame(codec, INTEGER_MAX, false).to_vec();
            assert!(bytes.len() <= codec.server_frame_max_bytes());
            assert!(codec.decode_server(&bytes).is_ok());
        }
    }
}

/// Nothing that is printed for a log shows content or secrets.
#[test]
fn content_and_secrets_are_not_printed() {
    let content = Content {
        body: Some("between us".into()),
        ..Content::default()
    };
    assert_eq!(format!("{content:?}"), "Content(1 members, 10 bytes)");
    assert_eq!(format!("{:?}", Secret::from("between us")), "Secret(..)");
    for bytes in [
        r#"{"type":"hello","device":"between us"}"#,
        r#"{"type":"ack","up_to":"between us"}"#,
    ] {
        let error = Codec::Json.decode_device(bytes.as_bytes()).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("between us"));
    }
}
