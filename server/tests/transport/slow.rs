//! Peers that do not read, that talk without reading, and that vanish without a word.

use std::net::SocketAddr;
use std::time::Duration;

use bellwire_protocol::{ALPN, Ack, Code, DeviceFrame, ServerFrame};
use bellwire_server::delivery::{Acknowledged, PingId};
use bellwire_server::runtime::{LinkSettings, Out};
use futures_util::SinkExt;
use tokio_tungstenite::tungstenite::Message;

use super::desk::{Told, notification, send, start};
use super::device::{Device, Network, WAYS, Way, connect_narrow, endpoint, id, quic_tls};

/// Content of a notification that fills buffers, in bytes.
const LARGE: usize = 60_000;

fn hasty() -> LinkSettings {
    LinkSettings {
        write_deadline: Duration::from_secs(2),
        ..LinkSettings::default()
    }
}

/// A device that said hello and reads no more.
async fn deaf(server: SocketAddr, way: Way, id: u8) -> Device {
    let mut device = match way {
        Way::Quic => {
            let endpoint = endpoint(quic_tls(ALPN));
            Device::over_quic(endpoint, server).await
        }
        Way::WebSocketCbor | Way::WebSocketJson => {
            Device::over_tcp(connect_narrow(server).await, way).await
        }
    };
    device.hello(id).await;
    device
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_read_is_cut_off_and_others_get_theirs() {
    for way in WAYS {
        let (desk, transport) = start(hasty());
        let server = transport.local_addr();
        let _deaf = deaf(server, way, 1).await;
        let (mut well, _) = Device::attach(server, way, 2).await;
        let large = notification(7, &"x".repeat(LARGE));
        for seq in 1..=200 {
            desk.push(id(1), send(seq, &large));
        }
        desk.push(id(2), send(1, &large));
        assert!(matches!(well.next().await, ServerFrame::Notify(_)));
        desk.wait_for(id(1), Told::Detached).await;
        desk.push(id(2), send(2, &large));
        assert!(matches!(well.next().await, ServerFrame::Notify(_)));
        assert_eq!(desk.balance(), (2, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_device_says_is_heard_while_it_does_not_read() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        let mut device = deaf(transport.local_addr(), way, 1).await;
        let large = notification(7, &"x".repeat(LARGE));
        for seq in 1..=200 {
            desk.push(id(1), send(seq, &large));
        }
        // Far more questions than answers fit anywhere: they are read all the same.
        for _ in 0..2_000 {
            device.say(&DeviceFrame::Ping).await;
        }
        device.say(&DeviceFrame::Ack(Ack::UpTo(1))).await;
        desk.wait_for(id(1), Told::Acknowledged(Acknowledged::UpTo(1)))
            .await;
        // Reading at last, it gets everything in order, and some answer to its questions.
        let (mut seen, mut pongs) = (0, 0);
        while seen < 200 || pongs == 0 {
            match device.next().await {
                ServerFrame::Notify(notify) => {
                    seen += 1;
                    assert_eq!(notify.seq, seen);
                }
                ServerFrame::Pong => pongs += 1,
                other => panic!("{other:?}"),
            }
        }
        assert!(pongs <= 2_000);
        assert_eq!(desk.balance(), (1, 0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_websocket_pings_without_reading_holds_no_memory_and_no_link() {
    let (desk, transport) = start(LinkSettings::default());
    let mut device = deaf(transport.local_addr(), Way::WebSocketCbor, 1).await;
    let large = notification(7, &"x".repeat(LARGE));
    for seq in 1..=100 {
        desk.push(id(1), send(seq, &large));
    }
    for _ in 0..5_000 {
        let _ = device
            .socket()
            .send(Message::Ping(vec![0; 125].into()))
            .await;
    }
    device.say(&DeviceFrame::Ack(Ack::UpTo(1))).await;
    desk.wait_for(id(1), Told::Acknowledged(Acknowledged::UpTo(1)))
        .await;
    let mut seen = 0;
    while seen < 100 {
        if let ServerFrame::Notify(notify) = device.next().await {
            seen += 1;
            assert_eq!(notify.seq, seen);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn more_words_than_an_outbox_holds_end_the_link() {
    for way in WAYS {
        let (desk, transport) = start(LinkSettings::default());
        let _deaf = deaf(transport.local_addr(), way, 1).await;
        let large = notification(7, &"x".repeat(LARGE));
        for seq in 1..=200 {
            desk.push(id(1), send(seq, &large));
        }
        // Taken back again and again, as a publisher may; the core sends no more than a window, but says so each time.
        for _ in 0..3_000 {
            desk.push(id(1), Out::Withdraw(vec![PingId([7; 16])]));
        }
        desk.wait_for(id(1), Told::Detached).await;
        assert_eq!(desk.balance(), (1, 1));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_falls_silent_is_told_and_detached() {
    let settings = LinkSettings {
        keep_alive_quic_s: (1, 1),
        keep_alive_websocket_s: (1, 1),
        ..LinkSettings::default()
    };
    let (desk, transport) = start(settings);
    let (mut silent, welcome) = Device::attach(transport.local_addr(), Way::WebSocketCbor, 1).await;
    assert_eq!(welcome.keep_alive_s, (1, 1).into());
    let (mut alive, _) = Device::attach(transport.local_addr(), Way::WebSocketJson, 2).await;
    let (_quic, _) = Device::attach(transport.local_addr(), Way::Quic, 3).await;
    let keeping = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_millis(500)).await;
            alive.say(&DeviceFrame::Ping).await;
            assert_eq!(alive.next().await, ServerFrame::Pong);
        }
    });
    silent.refused_with(Code::Silence).await;
    desk.wait_for(id(1), Told::Detached).await;
    desk.wait_for(id(3), Told::Detached).await;
    assert!(!desk.told(id(2)).contains(&Told::Detached));
    assert!(!keeping.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn how_much_silence_is_borne_is_the_operators_to_say() {
    // One second of a hundred: by the share that is usual it would be four minutes.
    let (desk, transport) = start(LinkSettings {
        keep_alive_quic_s: (100, 100),
        keep_alive_websocket_s: (100, 100),
        silence_percent: 1,
        ..LinkSettings::default()
    });
    let server = transport.local_addr();
    let (mut silent, _) = Device::attach(server, Way::WebSocketCbor, 1).await;
    let (_quic, _) = Device::attach(server, Way::Quic, 2).await;
    silent.refused_with(Code::Silence).await;
    desk.wait_for(id(1), Told::Detached).await;
    desk.wait_for(id(2), Told::Detached).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quic_device_that_vanishes_is_noticed_when_something_is_sent() {
    let (desk, transport) = start(hasty());
    let server = transport.local_addr();
    let (mut well, _) = Device::attach(server, Way::Quic, 1).await;
    let network = Network::to(server).await;
    let (mut cut_off, _) = Device::attach(network.near(), Way::Quic, 2).await;
    desk.push(id(2), send(1, &notification(6, "arrives")));
    assert!(matches!(cut_off.next().await, ServerFrame::Notify(_)));
    network.cut().await;
    // Waiting for a verdict is no reason to give a device up: its transport has answered.
    desk.push(id(1), send(1, &notification(7, "arrives")));
    assert!(matches!(well.next().await, ServerFrame::Notify(_)));
    desk.push(id(2), send(2, &notification(7, "is lost")));
    desk.wait_for(id(2), Told::Detached).await;
    desk.push(id(1), send(2, &notification(8, "arrives too")));
    assert!(matches!(well.next().await, ServerFrame::Notify(_)));
    assert_eq!(desk.balance(), (2, 1));
}
