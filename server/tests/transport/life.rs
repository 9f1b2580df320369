//! The life of well-behaved devices.

use bellwire_protocol::{
    ALPN, Ack, Code, Decline, DeviceFrame, GoawayReason, Id, Presence, PresenceState, ServerFrame,
    Topics,
};
use bellwire_server::delivery::{Acknowledged, Closing, PingId, Refusal};
use bellwire_server::runtime::{LinkSettings, Out};
use futures_util::{SinkExt, StreamExt};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::desk::{
    Answer, PATIENCE, Told, certificate, notification, notification_of, send, start,
};
use super::device::{Device, WAYS, Way, connect_tls, endpoint, hello, id, quic_tls, tls};

#[tokio::test(flavor = "multi_thread")]
async fn a_session_from_hello_to_bye_is_the_same_on_every_way() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        let (mut device, welcome) = Device::attach(transport.local_addr(), way, 1).await;
        let keep_alive = if way == Way::Quic {
            (20, 120)
        } else {
            (60, 900)
        };
        assert_eq!(
            (welcome.pending, welcome.window, welcome.max_bytes),
            (3, 16, 4_096)
        );
        assert_eq!(
            (welcome.now_ms, welcome.keep_alive_s),
            (1_000_000, keep_alive.into())
        );
        let carrier = if way == Way::Quic {
            "quic"
        } else {
            "websocket"
        };
        let attached = Told::Attached {
            window: 16,
            seen: 0,
            carrier,
        };
        assert_eq!(desk.told(id(1)), [attached]);

        desk.push(id(1), send(1, &notification(7, "first")));
        desk.push(id(1), send(2, &notification(8, "second")));
        for (seq, ping, body) in [(1, 7, "first"), (2, 8, "second")] {
            let ServerFrame::Notify(notify) = device.next().await else {
                panic!("a notify")
            };
            assert_eq!((notify.seq, notify.id), (seq, Id([ping; 16])));
            assert_eq!(notify.content.body.as_deref(), Some(body));
        }
        device.say(&DeviceFrame::Ack(Ack::UpTo(2))).await;
        desk.wait_for(id(1), Told::Acknowledged(Acknowledged::UpTo(2)))
            .await;
        device
            .say(&DeviceFrame::Ack(Ack::Ids(vec![Id([7; 16])])))
            .await;
        desk.wait_for(
            id(1),
            Told::Acknowledged(Acknowledged::Ids(vec![PingId([7; 16])])),
        )
        .await;
        let decline = Decline {
            id: Id([8; 16]),
            reason: "no".into(),
        };
        device.say(&DeviceFrame::Decline(decline)).await;
        desk.wait_for(id(1), Told::Declined(PingId([8; 16]))).await;
        device
            .say(&DeviceFrame::Presence(Presence {
                state: PresenceState::Idle,
            }))
            .await;
        desk.wait_for(id(1), Told::Presence(false)).await;

        device.say(&DeviceFrame::Ping).await;
        assert_eq!(device.next().await, ServerFrame::Pong);
        let topics = |names: &[&str]| Topics {
            topics: names.iter().map(|name| (*name).to_owned()).collect(),
        };
        // More at once than wait in the link: the answers come in order, each with the full set.
        for name in ["a", "b", "c", "d", "e", "f", "g", "h"] {
            device.say(&DeviceFrame::Subscribe(topics(&[name]))).await;
        }
        device
            .say(&DeviceFrame::Unsubscribe(topics(&["a", "c", "h"])))
            .await;
        device.say(&DeviceFrame::Ping).await;
        let mut sets = Vec::new();
        let mut ponged = false;
        while sets.len() < 9 || !ponged {
            match device.next().await {
                ServerFrame::Subscribed(set) => sets.push(set.topics.join("")),
                ServerFrame::Pong => ponged = true,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(
            sets,
            [
                "a", "ab", "abc", "abcd", "abcde", "abcdef", "abcdefg", "abcdefgh", "bdefg"
            ]
        );
        desk.push(id(1), Out::Withdraw(vec![PingId([3; 16]); 300]));
        for count in [256, 44] {
            let ServerFrame::Withdraw(withdraw) = device.next().await else {
                panic!("a withdraw")
            };
            assert_eq!(withdraw.ids, vec![Id([3; 16]); count]);
        }

        device.say(&DeviceFrame::Bye).await;
        device.closed_with(Code::Bye).await;
        assert_eq!(desk.told(id(1)).last(), Some(&Told::Detached));
        assert_eq!(desk.balance(), (1, 1));
        transport.shutdown().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_subprotocol_means_json_and_both_mean_cbor() {
    let (desk, transport) = start(LinkSettings::default());
    for (offered, answered, greeting) in [
        ("", None, r#"{"type":"welcome""#.as_bytes()),
        (
            "Sec-WebSocket-Protocol: bellwire.1.json, bellwire.1.cbor\r\n",
            Some("bellwire.1.cbor"),
            &[0xa7],
        ),
    ] {
        let mut stream = connect_tls(transport.local_addr(), Arc::new(tls(&[])))
            .await
            .unwrap();
        let request = format!(
            "GET /v1/link HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{offered}\r\n"
        );
        let codec = match answered {
            None => bellwire_protocol::Codec::Json,
            Some(_) => bellwire_protocol::Codec::Cbor,
        };
        // The hello comes in one piece with the request: what follows the head are frames.
        let hello = codec.encode_device(&DeviceFrame::Hello(hello(1, "good")));
        let opcode = if answered.is_none() { 0x81 } else { 0x82 };
        let mut bytes = request.into_bytes();
        bytes.extend([opcode, 0x80 | 126]);
        bytes.extend((hello.len() as u16).to_be_bytes());
        bytes.extend([0, 0, 0, 0]);
        bytes.extend(&hello);
        stream.write_all(&bytes).await.unwrap();

        let mut heard = Vec::new();
        while !heard
            .windows(greeting.len())
            .any(|window| window == greeting)
        {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
        }
        let head = String::from_utf8_lossy(&heard).into_owned();
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        assert_eq!(head.contains("Sec-WebSocket-Protocol"), answered.is_some());
        assert!(answered.is_none_or(|name| head.contains(name)));
    }
    desk.wait_until("both left", || desk.balance() == (2, 2))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_say_why_and_close_with_their_code() {
    let refusals = [
        (Refusal::StaleAttempt, Code::StaleAttempt),
        (Refusal::DuplicateDevice, Code::DuplicateDevice),
        (Refusal::UnknownDevice, Code::Unauthorized),
        (Refusal::StoreFailed, Code::StoreUnavailable),
    ];
    let (desk, transport) = start(LinkSettings::default());
    for way in WAYS {
        for (why, code) in refusals {
            desk.answer(Answer::Refuse(why));
            let mut device = Device::connect(transport.local_addr(), way).await;
            device.say(&DeviceFrame::Hello(hello(1, "good"))).await;
            device.refused_with(code).await;
        }
        for (secret, code) in [
            ("wrong", Code::Unauthorized),
            ("unreadable", Code::StoreUnavailable),
        ] {
            let mut device = Device::connect(transport.local_addr(), way).await;
            device.say(&DeviceFrame::Hello(hello(1, secret))).await;
            device.refused_with(code).await;
        }
        let mut device = Device::connect(transport.local_addr(), way).await;
        let mut without = hello(1, "");
        without.secret = None;
        device.say(&DeviceFrame::Hello(without)).await;
        device.refused_with(Code::Unauthorized).await;

        let mut device = Device::connect(transport.local_addr(), way).await;
        device.say(&DeviceFrame::Hello(hello(1, "draining"))).await;
        let ServerFrame::Goaway(goaway) = device.next().await else {
            panic!("a goaway")
        };
        assert_eq!(goaway.reason, GoawayReason::Drain);
        device.closed_with(Code::Drain).await;
    }
    assert_eq!(desk.balance(), (12, 12));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mailbox_ends_a_session_with_a_word_and_a_code() {
    let (desk, transport) = start(LinkSettings::default());
    for way in WAYS {
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), Out::Close(Closing::Replaced));
        let ServerFrame::Goaway(goaway) = device.next().await else {
            panic!("a goaway")
        };
        assert_eq!(goaway.reason, GoawayReason::Replaced);
        assert!(goaway.reconnect_ms.min_ms >= 60_000);
        device.closed_with(Code::Replaced).await;

        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), Out::Close(Closing::Revoked));
        let ServerFrame::Goaway(goaway) = device.next().await else {
            panic!("a goaway")
        };
        assert_eq!(goaway.reason, GoawayReason::Revoked);
        device.closed_with(Code::Revoked).await;

        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), Out::Close(Closing::AckTimeout));
        device.refused_with(Code::AckTimeout).await;
    }
    assert_eq!(desk.balance(), (9, 9));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_device_has_time_for_its_last_verdict_and_gets_nothing_new() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), send(1, &notification(7, "first")));
        desk.push(
            id(1),
            Out::Drain {
                min_ms: 5,
                max_ms: 50,
            },
        );
        desk.push(id(1), send(2, &notification(8, "late")));
        assert!(matches!(device.next().await, ServerFrame::Notify(_)));
        let ServerFrame::Goaway(goaway) = device.next().await else {
            panic!("a goaway")
        };
        assert_eq!(
            (goaway.reason, goaway.reconnect_ms),
            (GoawayReason::Drain, (5, 50).into())
        );
        device.say(&DeviceFrame::Ack(Ack::UpTo(1))).await;
        desk.wait_for(id(1), Told::Acknowledged(Acknowledged::UpTo(1)))
            .await;
        device.say(&DeviceFrame::Bye).await;
        device.closed_with(Code::Bye).await;
        assert_eq!(desk.balance(), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shutdown_sends_everybody_away_and_leaves_nothing_behind() {
    let (desk, transport) = start(LinkSettings::default());
    let server = transport.local_addr();
    let mut devices = Vec::new();
    for (number, way) in WAYS.into_iter().enumerate() {
        devices.push(Device::attach(server, way, number as u8).await.0);
    }
    let goodbye = tokio::spawn(async move {
        for device in &mut devices {
            let ServerFrame::Goaway(goaway) = device.next().await else {
                panic!("a goaway")
            };
            assert_eq!(goaway.reason, GoawayReason::Drain);
            device.say(&DeviceFrame::Bye).await;
            device.closed_with(Code::Bye).await;
        }
    });
    transport.shutdown().await;
    goodbye.await.unwrap();
    assert_eq!(desk.balance(), (3, 3));
    assert!(TcpStream::connect(server).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_only_knocks_is_gone_when_the_server_stops() {
    let (desk, transport) = start(LinkSettings {
        hello_deadline: Duration::from_secs(600),
        ..LinkSettings::default()
    });
    let server = transport.local_addr();
    let silent = TcpStream::connect(server).await.unwrap();
    let mut half = TcpStream::connect(server).await.unwrap();
    half.write_all(&[0x16, 3, 1]).await.unwrap();
    let mut head = connect_tls(server, Arc::new(tls(&[]))).await.unwrap();
    head.write_all(b"GET /v1/link HTTP/1.1\r\n").await.unwrap();
    // Over QUIC the handshake is all there is to it, and no stream follows.
    let endpoint = endpoint(quic_tls(b"bellwire/1"));
    let stands = endpoint
        .connect(server, "localhost")
        .unwrap()
        .await
        .unwrap();
    desk.wait_until("all are there", || transport.connections() == 4)
        .await;
    transport.stop_accepting();
    // Who has said nothing is sent away; who has begun may go on until the end.
    is_closed("silent", silent).await;
    desk.wait_until("one is gone", || transport.connections() <= 3)
        .await;
    transport.shutdown().await;
    let gone = timeout(PATIENCE, stands.closed()).await.unwrap();
    let quinn::ConnectionError::ApplicationClosed(close) = gone else {
        panic!("{gone}")
    };
    assert_eq!(close.reason, Code::Drain.meaning());
    is_closed("half", half).await;
    is_closed("head", head).await;
    assert_eq!(desk.balance(), (0, 0));
}

async fn is_closed(which: &str, mut io: impl AsyncRead + Unpin) {
    let mut heard = Vec::new();
    let closed = timeout(PATIENCE, io.read_to_end(&mut heard)).await;
    assert!(closed.is_ok(), "{which} is still open");
    assert_eq!(heard, b"", "{which}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fan_out_reaches_every_way_with_its_own_number() {
    let (desk, transport) = start(LinkSettings::default());
    let shared = notification(7, "to all of you");
    for (number, way) in WAYS.into_iter().enumerate() {
        let (mut device, _) = Device::attach(transport.local_addr(), way, number as u8).await;
        let seq = number as u64 + 1;
        desk.push(id(number as u8), send(seq, &shared));
        let ServerFrame::Notify(notify) = device.next().await else {
            panic!("a notify")
        };
        assert_eq!((notify.seq, notify.id), (seq, Id([7; 16])));
        assert_eq!(notify.content.body.as_deref(), Some("to all of you"));
    }
}

/// Numbers of a session have no gap, because `ack` counts by them: what is not sent ends it.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_or_must_not_be_sent_ends_the_session_before_the_next_number() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), send(1, &notification_of(6, vec![0xff, 0x00])));
        desk.push(id(1), send(2, &notification(7, "the next")));
        desk.wait_for(id(1), Told::Declined(PingId([6; 16]))).await;
        assert_eq!(last_word(&mut device).await, Some(Code::Internal));

        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.set_now_ms(1_999_999);
        desk.push(id(1), send(1, &notification(8, "just in time")));
        let ServerFrame::Notify(notify) = device.next().await else {
            panic!("a notify")
        };
        assert_eq!(notify.seq, 1);
        desk.set_now_ms(2_000_000);
        desk.push(id(1), send(2, &notification(9, "expired")));
        desk.push(id(1), send(3, &notification(9, "the next")));
        assert_eq!(last_word(&mut device).await, Some(Code::SlowReader));
    }
}

async fn last_word(device: &mut Device) -> Option<Code> {
    match device.next().await {
        ServerFrame::Error(error) => error.known_code(),
        other => panic!("a last word, not {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_vanishes_is_detached_once_wherever_it_was() {
    let (desk, transport) = start(LinkSettings::default());
    for way in WAYS {
        // Before hello, between hello and welcome, after the welcome.
        drop(Device::connect(transport.local_addr(), way).await);
        desk.answer(Answer::Nothing);
        let before = desk.balance().0;
        let mut device = Device::connect(transport.local_addr(), way).await;
        device.say(&DeviceFrame::Hello(hello(1, "good"))).await;
        desk.wait_until("attached", || desk.balance().0 == before + 1)
            .await;
        drop(device);
        desk.answer(Answer::Welcome);
        drop(Device::attach(transport.local_addr(), way, 1).await);
        desk.wait_until("all detached", || {
            desk.balance() == (before + 2, before + 2)
        })
        .await;
    }
    desk.wait_until("nothing is left", || transport.connections() == 0)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_before_the_welcome_are_kept_and_dealt_with_after_it() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        desk.answer(Answer::Nothing);
        let mut device = Device::connect(transport.local_addr(), way).await;
        device.say(&DeviceFrame::Hello(hello(1, "good"))).await;
        device.say(&DeviceFrame::Ping).await;
        desk.wait_until("attached", || desk.balance().0 == 1).await;
        desk.push(
            id(1),
            Out::Welcome {
                pending: 0,
                window: 1,
            },
        );
        assert!(matches!(device.next().await, ServerFrame::Welcome(_)));
        assert_eq!(device.next().await, ServerFrame::Pong);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_pings_fragments_and_the_close_handshake_work() {
    use tokio_tungstenite::tungstenite::protocol::frame::Frame;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
    let (desk, transport) = start(LinkSettings::default());
    let (mut device, _) = Device::attach(transport.local_addr(), Way::WebSocketJson, 1).await;
    let socket = device.socket();
    socket
        .send(Message::Ping("are you there".into()))
        .await
        .unwrap();
    let answer = socket.next().await.unwrap().unwrap();
    assert_eq!(answer, Message::Pong("are you there".into()));
    let first = Frame::message(&br#"{"type":"#[..], OpCode::Data(Data::Text), false);
    let second = Frame::message(&br#""ping"}"#[..], OpCode::Data(Data::Continue), true);
    socket.send(Message::Frame(first)).await.unwrap();
    socket.send(Message::Frame(second)).await.unwrap();
    assert_eq!(device.next().await, ServerFrame::Pong);
    device.socket().close(None).await.unwrap();
    assert!(device.hear().await.is_err());
    desk.wait_until("detached", || desk.balance() == (1, 1))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_session_follows_its_device_to_another_address() {
    let (desk, transport) = start(LinkSettings::default());
    let endpoint = endpoint(quic_tls(ALPN));
    let mut device = Device::over_quic(endpoint.clone(), transport.local_addr()).await;
    device.hello(1).await;
    let before = endpoint.local_addr().unwrap();
    endpoint
        .rebind(std::net::UdpSocket::bind("127.0.0.1:0").unwrap())
        .unwrap();
    assert_ne!(endpoint.local_addr().unwrap(), before);
    device.say(&DeviceFrame::Ping).await;
    assert_eq!(device.next().await, ServerFrame::Pong);
    desk.push(id(1), send(1, &notification(7, "there you are")));
    assert!(matches!(device.next().await, ServerFrame::Notify(_)));
    assert_eq!(desk.balance(), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_the_certificate_for_newcomers_only_and_tickets_stay_good() {
    let (_desk, transport) = start(LinkSettings::default());
    let server = transport.local_addr();
    let shown = |stream: &tokio_rustls::client::TlsStream<TcpStream>| {
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    };
    let (mut ws, _) = Device::attach(server, Way::WebSocketCbor, 1).await;
    let (mut quic, _) = Device::attach(server, Way::Quic, 2).await;
    let config = Arc::new(tls(&[]));
    let mut first = connect_tls(server, Arc::clone(&config)).await.unwrap();
    // The ticket comes behind the handshake; an answer shows that it has arrived.
    first.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    first.read_to_end(&mut answer).await.unwrap();

    transport.reload(&certificate()).unwrap();
    let resumed = connect_tls(server, config).await.unwrap();
    let kind = resumed.get_ref().1.handshake_kind();
    assert_eq!(kind, Some(rustls::HandshakeKind::Resumed));
    assert!(!resumed.get_ref().1.is_early_data_accepted());
    let fresh = connect_tls(server, Arc::new(tls(&[]))).await.unwrap();
    assert_ne!(shown(&fresh), shown(&first));
    Device::attach(server, Way::Quic, 3).await;
    for device in [&mut ws, &mut quic] {
        device.say(&DeviceFrame::Ping).await;
        assert_eq!(device.next().await, ServerFrame::Pong);
    }
}
