//! Client and server sessions joined by bytes in both codecs: what one sends, the other must understand.

#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

use super::*;
use crate::*;

/// A server with a mailbox of `count` notifications and an app that takes them in odd order.
fn run(codec: Codec, count: u64, window: u16) -> Vec<Id> {
    let hello = Hello {
        device: Id([1; 16]),
        secret: Some("secret".into()),
        instance: Id([2; 16]),
        attempt: 1,
        seen: Vec::new(),
        window: Some(window),
        min_urgency: None,
        agent: Some("together".into()),
    };
    let mut client = ClientSession::new(hello, None);
    let mut server = ServerSession::new(10_000);
    let (mut to_client, mut to_server) = (Vec::new(), Vec::new());
    let (mut client_actions, mut server_actions) = (Vec::new(), Vec::new());
    let (mut sent, mut in_flight, mut acknowledged, mut handed) =
        (0, Vec::<(u64, Id)>::new(), Vec::new(), Vec::new());
    let id = |seq: u64| Id((u128::from(seq) * 7).to_be_bytes());
    client.handle_connected(0, &mut client_actions);
    for turn in 0.. {
        assert!(turn < 100_000, "the session makes no progress");
        for action in client_actions.drain(..) {
            match action {
                ClientAction::Send(frame) => to_server.push(codec.encode_device(&frame)),
                ClientAction::Deliver(notify) => handed.push(notify.id),
                ClientAction::Attached(_) | ClientAction::Close(_) => {}
                ClientAction::Reconnect(reconnect) => {
                    assert_eq!(reconnect.why, SessionEnd::Left);
                }
                ClientAction::Withdraw(_) | ClientAction::Subscribed(_) => {
                    panic!("nobody asked for it")
                }
            }
        }
        for bytes in to_server.drain(..) {
            server.handle_decoded(codec.decode_device(&bytes), &mut server_actions);
        }
        for action in std::mem::take(&mut server_actions) {
            match action {
                ServerAction::Attach(hello) => {
                    let keep_alive_s = Carrier::Quic.keep_alive();
                    let window = hello.window.unwrap();
                    let welcome = Welcome {
                        session: 1,
                        pending: count,
                        window,
                        max_bytes: 4_096,
                        keep_alive_s,
                        now_ms: 0,
                    };
                    server.handle_welcome(welcome, &mut server_actions);
                    let ServerAction::Send(frame) = server_actions.pop().unwrap() else {
                        panic!("a welcome")
                    };
                    to_client.push(codec.encode_server(&frame));
                }
                ServerAction::Acknowledge(Ack::UpTo(seq)) => {
                    let (done, rest) = in_flight.into_iter().partition(|(sent, _)| *sent <= seq);
                    in_flight = rest;
                    acknowledged.extend::<Vec<(u64, Id)>>(done);
                }
                ServerAction::Acknowledge(Ack::Ids(ids)) => {
                    let (done, rest) = in_flight.into_iter().partition(|(_, id)| ids.contains(id));
                    in_flight = rest;
                    acknowledged.extend::<Vec<(u64, Id)>>(done);
                }
                ServerAction::Leave => {}
                ServerAction::Close { code, .. } => {
                    assert_eq!(code, Code::Bye);
                    assert!(client.is_over() && in_flight.is_empty());
                    return acknowledged.into_iter().map(|(_, id)| id).collect();
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        while server.is_attached() && sent < count && in_flight.len() < usize::from(window) {
            sent += 1;
            let shared = SharedNotify::new(
                id(sent),
                0,
                9_999,
                Urgency::Normal,
                Content::default().to_cbor(),
            )
            .unwrap();
            to_client.push(shared.frame(codec, sent, false).to_vec());
            server.handle_sent(sent);
            in_flight.push((sent, id(sent)));
        }
        for bytes in to_client.drain(..) {
            client.handle_decoded(
                codec.decode_server(&bytes),
                0,
                &|_| None,
                &mut client_actions,
            );
        }
        // The app takes them from the end or from the middle.
        for action in &client_actions {
            if let ClientAction::Deliver(notify) = action {
                handed.push(notify.id);
            }
        }
        client_actions.retain(|action| !matches!(action, ClientAction::Deliver(_)));
        for _ in 0..=turn % 3 {
            if !handed.is_empty() {
                let taken = handed.remove((turn * 5) % handed.len());
                client.handle_acknowledged(taken, 0, &mut client_actions);
            }
        }
        client.flush(0, &mut client_actions);
        if sent == count && handed.is_empty() && client.in_flight() == 0 && client.is_attached() {
            client.leave(0, &mut client_actions);
        }
    }
    unreachable!()
}

#[test]
fn every_notification_is_acknowledged_once_whatever_the_order_of_verdicts() {
    for codec in [Codec::Cbor, Codec::Json] {
        for (count, window) in [(0, 1), (1, 1), (50, 1), (200, 7), (300, 256)] {
            let mut acknowledged = run(codec, count, window);
            assert_eq!(acknowledged.len() as u64, count);
            acknowledged.sort();
            acknowledged.dedup();
            assert_eq!(acknowledged.len() as u64, count);
        }
    }
}
