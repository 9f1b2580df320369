//! Floods before hello: bounds by address and in all, on both carriers, and what becomes of those let in before.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bellwire_protocol::{ALPN, Code, DeviceFrame, ServerFrame};
use bellwire_server::runtime::LinkSettings;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::desk::{PATIENCE, start_counting};
use super::device::{Device, Network, Way, connect_tls_on, endpoint, hello, quic_tls, tls};

fn limits(per_address: u32, unauthenticated: u32) -> LinkSettings {
    LinkSettings {
        per_address,
        unauthenticated,
        hello_deadline: Duration::from_secs(600),
        ..LinkSettings::default()
    }
}

/// A reset may come before the connect is seen to be done.
async fn connect_from(local: &str, server: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = TcpSocket::new_v4().unwrap();
    socket
        .bind(SocketAddr::new(local.parse().unwrap(), 0))
        .unwrap();
    socket.connect(server).await
}

/// Whether the server resets the connection rather than wait for a word.
async fn is_reset(tcp: std::io::Result<TcpStream>) -> bool {
    let Ok(mut tcp) = tcp else { return true };
    let read = timeout(PATIENCE, tcp.read(&mut [0]))
        .await
        .expect("an answer");
    read.is_err() || read.is_ok_and(|count| count == 0)
}

/// Whether TLS comes about.
async fn is_let_in(tcp: std::io::Result<TcpStream>) -> bool {
    connect_tls_on(tcp.unwrap(), Arc::new(tls(&[])))
        .await
        .is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_floods_is_cut_off_and_others_come_in() {
    let (desk, transport) = start_counting(limits(3, 100), true);
    let server = transport.local_addr();
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(connect_from("127.0.0.2", server).await.unwrap());
    }
    desk.wait_until("three are in", || transport.connections() == 3)
        .await;
    for _ in 0..20 {
        assert!(is_reset(connect_from("127.0.0.2", server).await).await);
    }
    assert!(is_let_in(connect_from("127.0.0.3", server).await).await);
    // A place is free again once its holder is gone.
    held.pop();
    desk.wait_until("one left", || transport.connections() == 2)
        .await;
    assert!(is_let_in(connect_from("127.0.0.2", server).await).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_total_holds_for_loopback_too_and_authenticated_devices_do_not_count() {
    let (desk, transport) = start_counting(limits(1, 4), false);
    let server = transport.local_addr();
    let mut attached = Vec::new();
    for id in 0..8 {
        attached.push(Device::attach(server, Way::WebSocketCbor, id).await.0);
    }
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(TcpStream::connect(server).await.unwrap());
    }
    desk.wait_until("all are in", || transport.connections() == 12)
        .await;
    assert!(is_reset(TcpStream::connect(server).await).await);
    let refused = endpoint(quic_tls(ALPN))
        .connect(server, "localhost")
        .unwrap()
        .await;
    assert!(matches!(
        refused.unwrap_err(),
        quinn::ConnectionError::ConnectionClosed(_)
    ));
    for device in &mut attached {
        device.say(&DeviceFrame::Ping).await;
        assert_eq!(device.next().await, ServerFrame::Pong);
    }
    drop(held);
    desk.wait_until("they left", || transport.connections() == 8)
        .await;
    Device::attach(server, Way::Quic, 9).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn quic_asks_for_proof_of_address_under_load_and_then_counts() {
    let (_desk, transport) = start_counting(limits(8, 1_000), true);
    let server = transport.local_addr();
    let mut held = Vec::new();
    for number in 1..=8 {
        // A fresh device each time: one that was here before has a token that proves its address.
        let (endpoint, network) = (endpoint(quic_tls(ALPN)), Network::to(server).await);
        let connecting = endpoint.connect(network.near(), "localhost").unwrap();
        held.push(connecting.await.unwrap());
        // From a quarter of the places on, a round trip more; a hello in two packets may be asked twice.
        assert_eq!(network.retries() > 0, number > 2);
    }
    let refused = endpoint(quic_tls(ALPN))
        .connect(server, "localhost")
        .unwrap()
        .await
        .unwrap_err();
    match refused {
        quinn::ConnectionError::ConnectionClosed(close) => {
            assert_eq!(
                close.error_code,
                quinn::TransportErrorCode::CONNECTION_REFUSED
            );
        }
        other => panic!("{other}"),
    }
    for connection in held {
        assert!(connection.close_reason().is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_secret_costs_a_place_until_the_connection_is_gone() {
    let (desk, transport) = start_counting(limits(1, 100), true);
    let server = transport.local_addr();
    let mut device = Device::connect(server, Way::WebSocketJson).await;
    device.say(&DeviceFrame::Hello(hello(1, "wrong"))).await;
    let ServerFrame::Error(error) = device.next().await else {
        panic!("an error")
    };
    assert_eq!(error.known_code(), Some(Code::Unauthorized));
    assert!(is_reset(TcpStream::connect(server).await).await);
    drop(device);
    desk.wait_until("it left", || transport.connections() == 0)
        .await;
    let (mut device, _) = Device::attach(server, Way::WebSocketJson, 1).await;
    device.say(&DeviceFrame::Ping).await;
    assert_eq!(device.next().await, ServerFrame::Pong);
}
