//! What the server answers to peers that break the rules, on every way; and that it costs others nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwire_protocol::limits::DEVICE_FRAME_MAX_BYTES;
use bellwire_protocol::{ALPN, Ack, Code, Codec, DeviceFrame, LengthPrefix, ServerFrame};
use bellwire_server::runtime::LinkSettings;
use futures_util::SinkExt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;

use super::desk::{Answer, PATIENCE, notification, send, start};
use super::device::{Device, WAYS, Way, connect_tls, endpoint, hello, id, quic_tls, tls};

fn impatient() -> LinkSettings {
    LinkSettings {
        hello_deadline: Duration::from_millis(300),
        ..LinkSettings::default()
    }
}

/// A device that only wants to be left in peace.
struct Bystander(Device);

impl Bystander {
    async fn attach(server: SocketAddr) -> Bystander {
        Bystander(Device::attach(server, Way::WebSocketCbor, 200).await.0)
    }

    async fn is_well(&mut self) {
        self.0.say(&DeviceFrame::Ping).await;
        assert_eq!(self.0.next().await, ServerFrame::Pong);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frame_that_is_wrong_before_the_welcome_is_named_and_ends_the_session() {
    let (desk, transport) = start(LinkSettings::default());
    let mut bystander = Bystander::attach(transport.local_addr()).await;
    for way in WAYS {
        let frames: [(DeviceFrame, Code); 3] = [
            (DeviceFrame::Ping, Code::HelloExpected),
            (DeviceFrame::Ack(Ack::UpTo(1)), Code::HelloExpected),
            (DeviceFrame::Bye, Code::Bye),
        ];
        for (frame, code) in frames {
            let mut device = Device::connect(transport.local_addr(), way).await;
            device.say(&frame).await;
            match code {
                Code::Bye => device.closed_with(code).await,
                _ => device.refused_with(code).await,
            }
        }
        bystander.is_well().await;
    }
    assert_eq!(desk.balance(), (1, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_hello_an_ack_ahead_and_too_much_too_early_end_the_session() {
    let (desk, transport) = start(LinkSettings::default());
    let mut bystander = Bystander::attach(transport.local_addr()).await;
    for way in WAYS {
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        device.say(&DeviceFrame::Hello(hello(1, "good"))).await;
        device.refused_with(Code::SecondHello).await;

        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        desk.push(id(1), send(1, &notification(7, "one")));
        assert!(matches!(device.next().await, ServerFrame::Notify(_)));
        device.say(&DeviceFrame::Ack(Ack::UpTo(2))).await;
        device.refused_with(Code::AckAhead).await;

        desk.answer(Answer::Nothing);
        let mut device = Device::connect(transport.local_addr(), way).await;
        device.say(&DeviceFrame::Hello(hello(1, "good"))).await;
        for _ in 0..9 {
            device.say(&DeviceFrame::Ping).await;
        }
        device.refused_with(Code::FramesBeforeWelcome).await;
        desk.answer(Answer::Welcome);
        bystander.is_well().await;
    }
    // The last one may be refused before or after it is attached; the bystander stays.
    desk.wait_until("all detached", || {
        let (attached, detached) = desk.balance();
        attached == detached + 1
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn garbage_is_malformed_before_and_after_the_welcome() {
    let (desk, transport) = start(LinkSettings::default());
    let mut bystander = Bystander::attach(transport.local_addr()).await;
    for way in WAYS {
        let garbage: &[&[u8]] = match way {
            Way::WebSocketJson => &[
                b"",
                b"{",
                b"[]",
                b"null",
                br#"{"type":"ack"}"#,
                br#"{"type":"ping"}x"#,
            ],
            Way::WebSocketCbor | Way::Quic => &[
                b"",
                b"\xff",
                b"\xa0",
                b"\xa1\x00",
                b"\xa1\x00\x02",
                b"\xa1\x00\x07\x00",
                b"{}",
            ],
        };
        for bytes in garbage {
            let mut device = Device::connect(transport.local_addr(), way).await;
            device.say_bytes(bytes).await;
            device.refused_with(Code::Malformed).await;
            let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
            device.say_bytes(bytes).await;
            device.refused_with(Code::Malformed).await;
        }
        bystander.is_well().await;
    }
    let (attached, detached) = desk.balance();
    assert_eq!(attached, detached + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_frames_and_members_are_skipped() {
    let (_desk, transport) = start(LinkSettings::default());
    for way in WAYS {
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        let later: [&[u8]; 2] = match way {
            Way::WebSocketJson => [br#"{"type":"dance","x":1}"#, br#"{"type":"ping","x":[1]}"#],
            Way::WebSocketCbor | Way::Quic => {
                [b"\xa2\x00\x18\x63\x01\x02", b"\xa2\x00\x07\x18\x63\x80"]
            }
        };
        for bytes in later {
            device.say_bytes(bytes).await;
        }
        assert_eq!(device.next().await, ServerFrame::Pong);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_oversized_frame_is_refused_before_it_is_read() {
    let (desk, transport) = start(LinkSettings::default());
    let mut bystander = Bystander::attach(transport.local_addr()).await;
    for way in WAYS {
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        // The largest one is taken (as garbage), one byte more is not.
        device.say_bytes(&vec![b' '; DEVICE_FRAME_MAX_BYTES]).await;
        device.refused_with(Code::Malformed).await;
        let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
        device
            .say_bytes(&vec![b' '; DEVICE_FRAME_MAX_BYTES + 1])
            .await;
        device.refused_with(Code::FrameTooLarge).await;
        bystander.is_well().await;
    }
    // On QUIC the length alone is enough, whatever it promises.
    for length in [DEVICE_FRAME_MAX_BYTES + 1, usize::MAX >> 2] {
        let (mut device, _) = Device::attach(transport.local_addr(), Way::Quic, 1).await;
        device.say_raw(LengthPrefix::new(length).as_bytes()).await;
        device.refused_with(Code::FrameTooLarge).await;
    }
    // On WebSocket a message may come in fragments; together they count.
    use tokio_tungstenite::tungstenite::protocol::frame::Frame;
    use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
    let (mut device, _) = Device::attach(transport.local_addr(), Way::WebSocketCbor, 1).await;
    for opcode in [Data::Binary, Data::Continue, Data::Continue] {
        let piece = vec![0; DEVICE_FRAME_MAX_BYTES / 2];
        let frame = Frame::message(piece, OpCode::Data(opcode), false);
        let _ = device.socket().send(Message::Frame(frame)).await;
    }
    device.refused_with(Code::FrameTooLarge).await;
    let (attached, detached) = desk.balance();
    assert_eq!(attached, detached + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_larger_frame_is_taken_where_the_operator_allows_it() {
    let most = 2 * DEVICE_FRAME_MAX_BYTES;
    let (_desk, transport) = start(LinkSettings {
        frame_max: most,
        ..LinkSettings::default()
    });
    for way in WAYS {
        for (size, code) in [(most, Code::Malformed), (most + 1, Code::FrameTooLarge)] {
            let (mut device, _) = Device::attach(transport.local_addr(), way, 1).await;
            device.say_bytes(&vec![b' '; size]).await;
            device.refused_with(code).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_where_binary_belongs_and_the_other_way_round_is_malformed() {
    let (_desk, transport) = start(LinkSettings::default());
    let hello = DeviceFrame::Hello(hello(1, "good"));
    let mut device = Device::connect(transport.local_addr(), Way::WebSocketCbor).await;
    let text = String::from_utf8(Codec::Json.encode_device(&hello)).unwrap();
    device.socket().send(Message::text(text)).await.unwrap();
    device.refused_with(Code::Malformed).await;
    let mut device = Device::connect(transport.local_addr(), Way::WebSocketJson).await;
    let binary = Codec::Cbor.encode_device(&hello);
    device.socket().send(Message::binary(binary)).await.unwrap();
    device.refused_with(Code::Malformed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn websocket_frames_against_the_rfc_are_malformed() {
    let (_desk, transport) = start(LinkSettings::default());
    let raw: [&[u8]; 5] = [
        // Unmasked; reserved bits; an unknown opcode; a fragmented ping; a continuation of nothing.
        &[0x81, 0x00],
        &[0xf1, 0x80, 0, 0, 0, 0],
        &[0x83, 0x80, 0, 0, 0, 0],
        &[0x09, 0x80, 0, 0, 0, 0],
        &[0x80, 0x80, 0, 0, 0, 0],
    ];
    for bytes in raw {
        let (mut device, _) = Device::attach(transport.local_addr(), Way::WebSocketJson, 1).await;
        device.socket().get_mut().write_all(bytes).await.unwrap();
        device.refused_with(Code::Malformed).await;
    }
    let (mut device, _) = Device::attach(transport.local_addr(), Way::WebSocketJson, 1).await;
    // Text that is not UTF-8.
    device
        .socket()
        .get_mut()
        .write_all(&[0x81, 0x81, 0, 0, 0, 0, 0xff])
        .await
        .unwrap();
    device.refused_with(Code::Malformed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_before_hello_ends_at_the_deadline_on_every_way() {
    let (desk, transport) = start(impatient());
    for way in [Way::WebSocketCbor, Way::WebSocketJson] {
        let mut device = Device::connect(transport.local_addr(), way).await;
        device.refused_with(Code::HelloTimeout).await;
    }
    // On QUIC a stream stands once something is said on it.
    let mut device = Device::connect(transport.local_addr(), Way::Quic).await;
    device.closed_with(Code::HelloTimeout).await;
    let mut device = Device::connect(transport.local_addr(), Way::Quic).await;
    device.say_raw(&[0x40]).await;
    device.refused_with(Code::HelloTimeout).await;

    // No byte at all, half a TLS handshake, half an HTTP request: closed without a word.
    let silent = TcpStream::connect(transport.local_addr()).await.unwrap();
    is_closed(silent).await;
    let mut half = TcpStream::connect(transport.local_addr()).await.unwrap();
    half.write_all(&[0x16, 3, 1]).await.unwrap();
    is_closed(half).await;
    let mut head = connect_tls(transport.local_addr(), Arc::new(tls(&[])))
        .await
        .unwrap();
    head.write_all(b"GET /v1/link HTTP/1.1\r\n").await.unwrap();
    is_closed(head).await;
    assert_eq!(desk.balance(), (0, 0));
    desk.wait_until("nothing is left", || transport.connections() == 0)
        .await;
}

async fn is_closed(mut io: impl AsyncRead + Unpin) {
    let mut heard = Vec::new();
    let _ = timeout(PATIENCE, io.read_to_end(&mut heard))
        .await
        .expect("closed");
    assert_eq!(heard, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_application_protocols_fail_in_tls() {
    let (_desk, transport) = start(LinkSettings::default());
    let refused = connect_tls(transport.local_addr(), Arc::new(tls(&[b"h2"]))).await;
    let error = refused.unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
    // Among others ours is enough.
    connect_tls(transport.local_addr(), Arc::new(tls(&[b"h2", b"http/1.1"])))
        .await
        .unwrap();

    let endpoint = endpoint(quic_tls(b"h3"));
    let refused = endpoint
        .connect(transport.local_addr(), "localhost")
        .unwrap()
        .await;
    match refused.unwrap_err() {
        quinn::ConnectionError::ConnectionClosed(close) => {
            assert_eq!(u64::from(close.error_code), 0x100 + 120, "{close}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_on_the_tls_port_is_told_so() {
    let (_desk, transport) = start(LinkSettings::default());
    let tcp = TcpStream::connect(transport.local_addr()).await.unwrap();
    let (status, code) = ask(tcp, "GET /v1/link HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert_eq!((status, code.as_str()), (400, "tls_required"));
    // Also who has said its last word with it.
    let mut tcp = TcpStream::connect(transport.local_addr()).await.unwrap();
    let request = b"GET /v1/link HTTP/1.1\r\nHost: x\r\n\r\n";
    tcp.write_all(request).await.unwrap();
    tcp.shutdown().await.unwrap();
    let mut answer = String::new();
    let heard = timeout(PATIENCE, tcp.read_to_string(&mut answer)).await;
    heard.unwrap().unwrap();
    assert!(answer.contains("\"tls_required\""), "{answer:?}");
    // What does not even look like HTTP gets no answer.
    let mut tcp = TcpStream::connect(transport.local_addr()).await.unwrap();
    tcp.write_all(b"\x05\x01\x00").await.unwrap();
    is_closed(tcp).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn other_requests_on_the_device_port_are_told_what_it_speaks() {
    let (_desk, transport) = start(LinkSettings::default());
    let good = "GET /v1/link HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n";
    let cases = [
        (good.replace("/v1/link", "/"), 404, "not_a_device_endpoint"),
        (good.replace("GET", "DELETE"), 404, "not_a_device_endpoint"),
        (
            "POST /v1/pings HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}".into(),
            404,
            "not_a_device_endpoint",
        ),
        (
            good.replace("Upgrade: websocket\r\n", ""),
            426,
            "unsupported_version",
        ),
        (
            good.replace("Version: 13", "Version: 7"),
            426,
            "unsupported_version",
        ),
        (good.replace("AAAA==", "=="), 400, "malformed"),
        (
            good.replace("Host: x", "Sec-WebSocket-Protocol: chat"),
            400,
            "unsupported_subprotocol",
        ),
        (
            good.replace("Host: x", &format!("Host: {}", "x".repeat(9_000))),
            400,
            "malformed",
        ),
        ("nonsense\r\n\r\n".into(), 400, "malformed"),
    ];
    for (request, status, code) in cases {
        let stream = connect_tls(transport.local_addr(), Arc::new(tls(&[])))
            .await
            .unwrap();
        assert_eq!(
            ask(stream, &request).await,
            (status, code.to_owned()),
            "{request}"
        );
    }
}

/// Asks over HTTP; answers status and code.
async fn ask(mut io: impl AsyncRead + AsyncWrite + Unpin, request: &str) -> (u16, String) {
    io.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    timeout(PATIENCE, io.read_to_end(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(
        head.contains("\r\nContent-Type: application/problem+json\r\n"),
        "{head}"
    );
    assert!(
        head.contains(&format!("\r\nContent-Length: {}\r\n", body.len())),
        "{head}"
    );
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    (
        head.split(' ').nth(1).unwrap().parse().unwrap(),
        body["code"].as_str().unwrap().to_owned(),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_device_gets_one_stream_and_nothing_else() {
    let (_desk, transport) = start(LinkSettings::default());
    let (mut device, _) = Device::attach(transport.local_addr(), Way::Quic, 1).await;
    let connection = device.connection().clone();
    let second = tokio::spawn({
        let connection = connection.clone();
        async move { connection.open_bi().await.map(drop) }
    });
    let one_way = tokio::spawn({
        let connection = connection.clone();
        async move { connection.open_uni().await.map(drop) }
    });
    // Not allowed by what the server stated, so a stack that keeps to it waits; datagrams it knows not to be taken.
    assert_eq!(connection.max_datagram_size(), None);
    device.say(&DeviceFrame::Ping).await;
    assert_eq!(device.next().await, ServerFrame::Pong);
    assert!(!second.is_finished() && !one_way.is_finished());
    device.say(&DeviceFrame::Bye).await;
    device.closed_with(Code::Bye).await;
    assert!(second.await.unwrap().is_err() && one_way.await.unwrap().is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_stream_that_ends_is_a_leave_and_inside_a_frame_it_is_malformed() {
    let (desk, transport) = start(LinkSettings::default());
    for (bytes, code) in [
        (&[][..], Code::Bye),
        (&[0x7f, 0xff, 1, 2][..], Code::Malformed),
    ] {
        let endpoint = endpoint(quic_tls(ALPN));
        let connection = endpoint
            .connect(transport.local_addr(), "localhost")
            .unwrap()
            .await
            .unwrap();
        let (mut send, _receive) = connection.open_bi().await.unwrap();
        send.write_all(bytes).await.unwrap();
        send.finish().unwrap();
        match timeout(PATIENCE, connection.closed()).await.unwrap() {
            quinn::ConnectionError::ApplicationClosed(close) => {
                assert_eq!(
                    Code::from_quic_close(close.error_code.into_inner()),
                    Some(code)
                );
            }
            other => panic!("{other}"),
        }
    }
    assert_eq!(desk.balance(), (0, 0));
}
