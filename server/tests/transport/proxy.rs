//! Load balancers that end TLS and say for whom they connect.

use std::net::SocketAddr;
use std::time::Duration;

use bellwire_protocol::{Codec, Decoded, DeviceFrame, ServerFrame};
use bellwire_server::runtime::LinkSettings;
use bellwire_server::transport::Transport;
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;
use tokio_tungstenite::client_async;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;

use super::desk::{Desk, PATIENCE, Told, start_counting};
use super::device::{hello, id};

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header of version 2 for TCP over IPv4 from this address.
fn header(from: &str, additions: &[u8]) -> Vec<u8> {
    let SocketAddr::V4(from) = from.parse().unwrap() else {
        panic!("an IPv4 address")
    };
    let mut bytes = SIGNATURE.to_vec();
    bytes.extend([0x21, 0x11]);
    bytes.extend(u16::try_from(12 + additions.len()).unwrap().to_be_bytes());
    bytes.extend(from.ip().octets());
    bytes.extend([10, 0, 0, 1]);
    bytes.extend(from.port().to_be_bytes());
    bytes.extend(443_u16.to_be_bytes());
    bytes.extend(additions);
    bytes
}

/// What a balancer says of connections of its own.
fn local() -> Vec<u8> {
    [SIGNATURE, &[0x20, 0, 0, 0]].concat()
}

fn limits() -> LinkSettings {
    LinkSettings {
        per_address: 2,
        unauthenticated: 100,
        // 127.0.0.1 is the balancer; the other addresses of the machine are strangers.
        proxies: vec![("127.0.0.1".parse().unwrap(), 32)],
        ..LinkSettings::default()
    }
}

fn plain(limits: LinkSettings) -> (Desk, Transport, SocketAddr) {
    let (desk, transport) = start_counting(limits, true);
    let address = transport.plain_addr().unwrap();
    (desk, transport, address)
}

/// Everything that is still said until the connection ends.
async fn rest(tcp: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset is an end as well.
    let _ = timeout(PATIENCE, tcp.read_to_end(&mut said))
        .await
        .expect("an end");
    said
}

/// Brings a device behind this header, in pieces of so many bytes; its link is attached and answers.
async fn brings(desk: &Desk, server: SocketAddr, header: &[u8], number: u8, piece: usize) {
    let mut tcp = TcpStream::connect(server).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    for piece in header.chunks(piece) {
        tcp.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    let mut request = "ws://localhost/v1/link".into_client_request().unwrap();
    let subprotocol = "bellwire.1.json".parse().unwrap();
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", subprotocol);
    let (mut socket, _) = client_async(request, tcp).await.unwrap();
    let say = |frame: &DeviceFrame| {
        let frame = String::from_utf8(Codec::Json.encode_device(frame)).unwrap();
        Message::text(frame)
    };
    socket
        .send(say(&DeviceFrame::Hello(hello(number, "good"))))
        .await
        .unwrap();
    socket.send(say(&DeviceFrame::Ping)).await.unwrap();
    for wanted in ["welcome", "pong"] {
        let frame = timeout(PATIENCE, socket.next()).await.unwrap();
        let frame = frame.unwrap().unwrap().into_data();
        let Ok(Decoded::Frame(frame)) = Codec::Json.decode_server(&frame) else {
            panic!("a frame")
        };
        let said = match frame {
            ServerFrame::Welcome(_) => "welcome",
            ServerFrame::Pong => "pong",
            other => panic!("{other:?}"),
        };
        assert_eq!(said, wanted);
    }
    drop(socket);
    desk.wait_for(id(number), Told::Detached).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_load_balancer_brings_devices_whatever_it_adds_and_however_its_bytes_arrive() {
    let (desk, transport, server) = plain(limits());
    let added = [&[0xe0, 0, 3, 1, 2, 3][..], &[0x04, 0, 0]].concat();
    brings(&desk, server, &header("192.0.2.1:4000", &[]), 1, 1_000).await;
    brings(&desk, server, &header("192.0.2.1:4000", &added), 2, 1).await;
    brings(&desk, server, &local(), 3, 1_000).await;
    assert_eq!(desk.balance(), (3, 3));
    // The device port beside it speaks TLS as ever.
    let mut tcp = TcpStream::connect(transport.local_addr()).await.unwrap();
    tcp.write_all(&header("192.0.2.1:4000", &[])).await.unwrap();
    assert_eq!(rest(&mut tcp).await, b"");
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_behind_a_load_balancer_count_by_their_own_address() {
    let (desk, transport, server) = plain(LinkSettings {
        hello_deadline: Duration::from_secs(600),
        ..limits()
    });
    let knock = async |from: &str| {
        let mut tcp = TcpStream::connect(server).await.unwrap();
        tcp.write_all(&header(from, &[])).await.unwrap();
        tcp
    };
    let mut held = Vec::new();
    for from in ["192.0.2.1:1", "192.0.2.1:2", "192.0.2.2:1"] {
        held.push(knock(from).await);
    }
    desk.wait_until("three are in", || transport.connections() == 3)
        .await;
    let mut third = knock("192.0.2.1:3").await;
    assert_eq!(rest(&mut third).await, b"");
    // What the balancer connects for itself is not counted under anybody.
    for _ in 0..5 {
        let mut tcp = TcpStream::connect(server).await.unwrap();
        tcp.write_all(&local()).await.unwrap();
        held.push(tcp);
    }
    desk.wait_until("they are in", || transport.connections() == 8)
        .await;
    held.remove(0);
    desk.wait_until("one left", || transport.connections() == 7)
        .await;
    held.push(knock("192.0.2.1:4").await);
    desk.wait_until("another came", || transport.connections() == 8)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strangers_and_wrong_headers_are_refused_before_a_device_is_heard() {
    let (desk, _transport, server) = plain(limits());
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let request = b"GET / HTTP/1.1\r\n\r\n";
    let whole = [&header("192.0.2.1:4000", &[])[..], request].concat();
    // It may be cut before it has said everything, or before it knows that it was connected.
    match socket.connect(server).await {
        Ok(mut stranger) => {
            let _ = stranger.write_all(&whole).await;
            assert_eq!(rest(&mut stranger).await, b"");
        }
        Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset),
    }
    // The same from the balancer is answered.
    let mut balancer = TcpStream::connect(server).await.unwrap();
    balancer.write_all(&whole).await.unwrap();
    assert_ne!(rest(&mut balancer).await, b"");
    let mut version_3 = header("192.0.2.1:4000", &[]);
    version_3[12] = 0x31;
    for wrong in [
        b"PROXY TCP4 192.0.2.1 10.0.0.1 4000 443\r\n".to_vec(),
        b"GET /v1/link HTTP/1.1\r\n\r\n".to_vec(),
        vec![0x16, 3, 1, 2, 0],
        version_3,
        header("192.0.2.1:4000", &[0x02, 0xff, 0xff]),
    ] {
        let mut tcp = TcpStream::connect(server).await.unwrap();
        tcp.write_all(&wrong).await.unwrap();
        assert_eq!(rest(&mut tcp).await, b"", "{wrong:?}");
    }
    assert_eq!(desk.balance(), (0, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn other_requests_behind_a_header_are_told_what_is_spoken_here() {
    let (_desk, _transport, server) = plain(limits());
    let mut tcp = TcpStream::connect(server).await.unwrap();
    let bytes = [
        &header("192.0.2.1:4000", &[])[..],
        b"GET / HTTP/1.1\r\n\r\n",
    ]
    .concat();
    tcp.write_all(&bytes).await.unwrap();
    let said = String::from_utf8(rest(&mut tcp).await).unwrap();
    assert!(said.starts_with("HTTP/1.1 404"), "{said}");
    assert!(said.contains("not_a_device_endpoint"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_balancer_that_says_nothing_or_half_a_header_is_gone_at_the_deadline() {
    let (desk, transport, server) = plain(LinkSettings {
        hello_deadline: Duration::from_secs(1),
        ..limits()
    });
    for half in [&b""[..], b"\r\n\r\n\0", &header("192.0.2.1:4000", &[])] {
        let mut tcp = TcpStream::connect(server).await.unwrap();
        tcp.write_all(half).await.unwrap();
        assert_eq!(rest(&mut tcp).await, b"");
    }
    desk.wait_until("all are gone", || transport.connections() == 0)
        .await;
}
