//! The client against a scripted server, on real sockets, over both carriers.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::support::{FakeServer, NOW_MS, PATIENCE, Peer, Seen, Udp, id, notify, window_names};
use bellwire_client::{
    Builder, Carrier, Carriers, Client, Code, Codec, GoawayReason, PresenceState, Trust, Verdict,
};
use bellwire_protocol::{
    Ack, DeviceFrame, ErrorFrame, Goaway, Hello, Notify, Presence, Seen as SeenId, ServerFrame,
    Topics, Withdraw,
};

/// Every way to carry a session.
const WAYS: [(Carriers, Codec, &str); 3] = [
    (Carriers::Quic, Codec::Cbor, "connected quic cbor"),
    (Carriers::WebSocket, Codec::Cbor, "connected websocket cbor"),
    (Carriers::WebSocket, Codec::Json, "connected websocket json"),
];

struct World {
    server: FakeServer,
    state: tempfile::TempDir,
    seen: Seen,
    welcomed: usize,
}

impl World {
    async fn new(udp: Udp) -> Self {
        let server = FakeServer::start(udp).await;
        Self {
            server,
            state: tempfile::tempdir().unwrap(),
            seen: Seen::default(),
            welcomed: 0,
        }
    }

    fn builder(&self) -> Builder {
        self.server.client(self.state.path(), &self.seen)
    }

    /// Welcomes, and waits until the client knows: from then on requests of the app reach the server.
    async fn welcome(&mut self, peer: &mut Peer) -> Hello {
        let hello = peer.welcome().await;
        self.welcomed += 1;
        self.seen.connected_times(self.welcomed).await;
        hello
    }

    /// A client with an attached session.
    async fn attached(&mut self) -> (Client, Peer) {
        let client = self.builder().start().await.unwrap();
        let mut peer = self.server.accept().await;
        self.welcome(&mut peer).await;
        (client, peer)
    }
}

#[tokio::test]
async fn a_notification_is_on_disk_before_it_is_acknowledged_over_every_carrier() {
    for (carriers, codec, connected) in WAYS {
        let mut world = World::new(Udp::Quic).await;
        let client = world
            .builder()
            .carriers(carriers)
            .websocket_codec(codec)
            .start()
            .await
            .unwrap();
        let mut peer = world.server.accept().await;
        let hello = world.welcome(&mut peer).await;
        assert_eq!(
            (hello.device, hello.attempt, hello.window),
            (crate::support::DEVICE, 1, Some(32))
        );
        assert_eq!(hello.secret.unwrap().expose(), "a secret");
        peer.say([notify(1, 1)]).await;
        peer.acknowledged_up_to(1).await;
        assert!(window_names(world.state.path(), 1));
        assert_eq!(world.seen.titles(), ["1"]);
        assert_eq!(world.seen.events()[0], connected);
        let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
        assert!(world.seen.events().contains(&"stopped".to_owned()));
    }
}

#[tokio::test]
async fn notifications_that_come_together_keep_their_order_and_share_acknowledgements() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    peer.say((1..=32).map(|number| notify(number, number)))
        .await;
    let frames = peer.acknowledged_up_to(32).await;
    assert!(
        frames < 32,
        "{frames} acknowledgements for 32 notifications"
    );
    let expected: Vec<_> = (1..=32).map(|number| number.to_string()).collect();
    assert_eq!(world.seen.titles(), expected);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_repeat_gets_the_same_verdict_after_a_restart_and_the_app_does_not_see_it() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    peer.say([notify(1, 1), notify(2, 2)]).await;
    peer.acknowledged_up_to(2).await;
    // The server never saw the acknowledgement: the link broke.
    peer.break_off();
    drop(client);
    world.seen.event_like("stopped").await;

    let client = start_when_free(&world).await;
    let mut peer = world.server.accept().await;
    let hello = world.welcome(&mut peer).await;
    assert_eq!(
        hello
            .seen
            .iter()
            .map(|seen: &SeenId| seen.id)
            .collect::<Vec<_>>(),
        [id(1), id(2)]
    );
    peer.say([notify(1, 1), notify(2, 2), notify(3, 3)]).await;
    peer.acknowledged_up_to(3).await;
    assert_eq!(world.seen.titles(), ["1", "2", "3"]);
    world.seen.event_like("repeated 1").await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());

    // After a clean farewell there is nothing to say twice.
    let client = start_when_free(&world).await;
    let mut peer = world.server.accept().await;
    assert_eq!(world.welcome(&mut peer).await.seen, []);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

/// The directory is free once the client before has let go of it.
async fn start_when_free(world: &World) -> Client {
    let starting = async {
        loop {
            match world.builder().start().await {
                Ok(client) => return client,
                Err(error) => assert!(error.to_string().contains("in use"), "{error}"),
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, starting).await.unwrap()
}

#[tokio::test]
async fn a_decline_keeps_its_reason_when_it_is_repeated() {
    let mut world = World::new(Udp::Quic).await;
    world.seen = Seen::answering(Verdict::decline("no such account"));
    let (client, mut peer) = world.attached().await;
    for seq in 1..=2 {
        peer.say([notify(seq, 1)]).await;
        match peer.hear().await {
            Ok(DeviceFrame::Decline(decline)) => {
                assert_eq!(
                    (decline.id, decline.reason.as_str()),
                    (id(1), "no such account")
                );
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(world.seen.titles(), ["1"]);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn what_arrives_past_its_expiry_is_declined_and_not_shown() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    let ServerFrame::Notify(late) = notify(1, 1) else {
        unreachable!()
    };
    peer.say([ServerFrame::Notify(Notify {
        expires_ms: NOW_MS,
        ..late
    })])
    .await;
    match peer.hear().await {
        Ok(DeviceFrame::Decline(decline)) => assert_eq!(decline.reason, "expired"),
        other => panic!("{other:?}"),
    }
    assert_eq!(world.seen.titles(), [""; 0]);
    world.seen.event_like("expired").await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_callback_that_panics_declines_and_the_next_one_is_served() {
    let mut world = World::new(Udp::Quic).await;
    let seen = world.seen.clone();
    let builder = world.builder().on_notification(move |notification| {
        assert_ne!(
            notification.content.title.as_deref(),
            Some("1"),
            "a broken app"
        );
        seen.notification(notification)
    });
    let client = builder.start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say([notify(1, 1), notify(2, 2)]).await;
    match peer.hear().await {
        Ok(DeviceFrame::Decline(decline)) => assert_eq!(decline.reason, "handler_panicked"),
        other => panic!("{other:?}"),
    }
    peer.acknowledged_up_to(2).await;
    assert_eq!(world.seen.titles(), ["2"]);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn where_udp_is_blocked_websocket_wins_and_is_remembered() {
    let mut world = World::new(Udp::Blackhole).await;
    let (client, peer) = world.attached().await;
    assert_eq!(peer.carrier, Carrier::WebSocket);
    world.seen.event_like("connected websocket").await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
    let remembered = std::fs::read_to_string(world.state.path().join("networks.json")).unwrap();
    assert!(remembered.contains("websocket"), "{remembered}");
}

#[tokio::test]
async fn a_carrier_that_connects_but_bears_no_session_goes_last_in_the_next_race() {
    let mut world = World::new(Udp::Quic).await;
    let client = world.builder().start().await.unwrap();
    // The handshake passes, everything after it is lost: a network that mangles large UDP packets.
    let mut peer = world.server.accept().await;
    assert_eq!(peer.carrier, Carrier::Quic);
    assert!(matches!(peer.hear().await, Ok(DeviceFrame::Hello(_))));
    peer.break_off();
    let mut peer = world.server.accept().await;
    assert_eq!(peer.carrier, Carrier::WebSocket);
    world.welcome(&mut peer).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn after_a_crash_the_directory_is_free_and_the_verdicts_are_there() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    client.crash().await;
    let (client, mut peer) = world.attached().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    assert_eq!(world.seen.titles(), ["1"]);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn only_the_winner_of_the_race_says_hello() {
    let mut world = World::new(Udp::Quic).await;
    for attempt in 1..=3 {
        let (client, peer) = world.attached().await;
        assert!(
            world.server.nobody_else_came(),
            "two hellos in race {attempt}"
        );
        let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
        assert!(world.server.nobody_else_came());
    }
}

#[tokio::test]
async fn a_broken_link_is_replaced_and_the_attempt_rises() {
    let mut world = World::new(Udp::Quic).await;
    let client = world.builder().start().await.unwrap();
    let mut instance = None;
    for attempt in 1..=3 {
        let mut peer = world.server.accept().await;
        let hello = world.welcome(&mut peer).await;
        assert_eq!(hello.attempt, attempt);
        assert_eq!(*instance.get_or_insert(hello.instance), hello.instance);
        peer.say([notify(1, attempt)]).await;
        peer.acknowledged_up_to(1).await;
        peer.break_off();
    }
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    assert_eq!(world.seen.titles(), ["1", "2", "3"]);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_drained_client_says_its_verdicts_and_bye_and_returns_when_told() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    let goaway = Goaway {
        reason: GoawayReason::Drain,
        reconnect_ms: (10, 20).into(),
        endpoint: None,
    };
    peer.say([notify(1, 1), ServerFrame::Goaway(goaway)]).await;
    peer.acknowledged_up_to(1).await;
    peer.goodbye().await;
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_goaway_with_an_endpoint_moves_the_client_there_and_a_dead_one_brings_it_home() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("wss://localhost:{}", nobody.local_addr().unwrap().port());
    drop(nobody);
    let reconnect_ms = (0, 1).into();
    let goaway = Goaway {
        reason: GoawayReason::Upgrade,
        reconnect_ms,
        endpoint: Some(endpoint),
    };
    peer.say([ServerFrame::Goaway(goaway)]).await;
    peer.goodbye().await;
    world.seen.event_like("disconnected: cannot connect").await;
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn wrong_credentials_stop_the_client_and_the_app_is_told_what_to_do() {
    for (carriers, codec, _) in WAYS {
        let mut world = World::new(Udp::Quic).await;
        let client = world
            .builder()
            .carriers(carriers)
            .websocket_codec(codec)
            .start()
            .await
            .unwrap();
        let mut peer = world.server.accept().await;
        assert!(matches!(peer.hear().await, Ok(DeviceFrame::Hello(_))));
        peer.say([ServerFrame::Error(ErrorFrame::new(
            Code::Unauthorized,
            "who are you",
        ))])
        .await;
        peer.close(Code::Unauthorized).await;
        client.ended().await;
        let told = world
            .seen
            .event_like("disconnected: the server said `unauthorized`")
            .await;
        assert!(
            told.contains("Check the id and the secret") && told.ends_with("never"),
            "{told}"
        );
        assert!(world.server.nobody_else_came());
    }
}

#[tokio::test]
async fn a_close_code_alone_is_enough_to_know_why() {
    for (carriers, codec, _) in WAYS {
        let mut world = World::new(Udp::Quic).await;
        let client = world
            .builder()
            .carriers(carriers)
            .websocket_codec(codec)
            .start()
            .await
            .unwrap();
        let mut peer = world.server.accept().await;
        world.welcome(&mut peer).await;
        peer.close(Code::Revoked).await;
        client.ended().await;
        world
            .seen
            .event_like("disconnected: the server said `revoked`")
            .await;
    }
}

#[tokio::test]
async fn a_replaced_client_tells_the_app_and_stays_away_for_a_minute() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    let goaway = Goaway {
        reason: GoawayReason::Replaced,
        reconnect_ms: (0, 0).into(),
        endpoint: None,
    };
    peer.say([ServerFrame::Goaway(goaway)]).await;
    world.seen.event_like("replaced").await;
    let told = world.seen.event_like("disconnected").await;
    assert!(told.ends_with("in 60 s"), "{told}");
    // A changed network is no reason to come back earlier.
    client.network_changed(None).await.unwrap();
    client.shutdown().await;
    assert!(world.server.nobody_else_came());
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused_in_words_that_help() {
    let world = World::new(Udp::Quic).await;
    let other = FakeServer::start(Udp::Blackhole).await;
    for carriers in [Carriers::Quic, Carriers::WebSocket] {
        let trust = Trust::Pem(other.ca_pem.clone());
        let client = world
            .builder()
            .carriers(carriers)
            .trust(trust)
            .start()
            .await
            .unwrap();
        let told = world
            .seen
            .event_like("disconnected: the certificate of localhost is not trusted")
            .await;
        assert!(told.contains("--ca FILE"), "{told}");
        client.shutdown().await;
    }
}

#[tokio::test]
async fn shutdown_lets_the_running_callback_finish_and_leaves_the_rest_with_the_server() {
    let mut world = World::new(Udp::Quic).await;
    let seen = world.seen.clone();
    let (gate, started) = (
        Arc::new(tokio::sync::Notify::new()),
        Arc::new(tokio::sync::Notify::new()),
    );
    let (open, begun) = (gate.clone(), started.clone());
    let builder = world.builder().on_notification_async(move |notification| {
        let (seen, open, begun) = (seen.clone(), open.clone(), begun.clone());
        async move {
            begun.notify_one();
            open.notified().await;
            seen.notification(notification)
        }
    });
    let client = builder.start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say([notify(1, 1), notify(2, 2)]).await;
    started.notified().await;
    let leaving = tokio::spawn(client.shutdown());
    tokio::task::yield_now().await;
    gate.notify_one();
    peer.acknowledged_up_to(1).await;
    peer.goodbye().await;
    leaving.await.unwrap();
    assert_eq!(world.seen.titles(), ["1"]);
    assert!(window_names(world.state.path(), 1) && !window_names(world.state.path(), 2));
}

#[tokio::test]
async fn a_verdict_given_while_the_link_was_gone_is_told_in_the_next_session() {
    let mut world = World::new(Udp::Quic).await;
    let seen = world.seen.clone();
    let gate = Arc::new(tokio::sync::Notify::new());
    let (open, first) = (gate.clone(), Arc::new(AtomicBool::new(true)));
    let builder = world.builder().on_notification_async(move |notification| {
        let (seen, open, wait) = (
            seen.clone(),
            open.clone(),
            first.swap(false, Ordering::SeqCst),
        );
        async move {
            if wait {
                open.notified().await;
            }
            seen.notification(notification)
        }
    });
    let client = builder.start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say([notify(1, 1), notify(2, 2)]).await;
    // The callback runs while the link breaks and the server repeats both.
    peer.break_off();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say([notify(1, 1), notify(2, 2)]).await;
    gate.notify_one();
    peer.acknowledged_up_to(2).await;
    assert_eq!(world.seen.titles(), ["1", "2"]);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_quic_session_goes_on_after_the_network_changed() {
    let mut world = World::new(Udp::Quic).await;
    let client = world
        .builder()
        .carriers(Carriers::Quic)
        .start()
        .await
        .unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    client
        .network_changed(Some("home".to_owned()))
        .await
        .unwrap();
    // The probe comes over the new path, and so does everything after it.
    assert_eq!(peer.hear().await, Ok(DeviceFrame::Ping));
    peer.say([ServerFrame::Pong, notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    assert!(world.server.nobody_else_came());
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn notifications_that_cross_moves_to_new_sockets_arrive_once_and_in_order() {
    const MOVES: u64 = 10;
    const AT_ONCE: u64 = 8;
    let mut world = World::new(Udp::Quic).await;
    let client = world.builder().carriers(Carriers::Quic);
    let client = client.start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    let mut places = BTreeSet::from([peer.remote()]);
    for round in 0..MOVES {
        let (from, to) = (round * AT_ONCE, (round + 1) * AT_ONCE);
        client.network_changed(None).await.unwrap();
        peer.say((from + 1..=to).map(|number| notify(number, number)))
            .await;
        // Each move asks for a sign of life, somewhere among the acknowledgements.
        let (mut asked, mut acknowledged) = (false, 0);
        while !asked || acknowledged < to {
            match peer.hear().await {
                Ok(DeviceFrame::Ping) => {
                    asked = true;
                    peer.say([ServerFrame::Pong]).await;
                }
                Ok(DeviceFrame::Ack(Ack::UpTo(up_to))) => acknowledged = up_to,
                other => panic!("{other:?}"),
            }
        }
        places.insert(peer.remote());
    }
    // Each move was one. (The system may give a port a second time.)
    assert!(places.len() as u64 > MOVES / 2, "{places:?}");
    let expected: Vec<_> = (1..=MOVES * AT_ONCE)
        .map(|number| number.to_string())
        .collect();
    assert_eq!(world.seen.titles(), expected);
    assert!(world.server.nobody_else_came());
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn presence_topics_and_withdrawals_pass_both_ways() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    client.presence(PresenceState::Active).await.unwrap();
    assert_eq!(
        peer.hear().await,
        Ok(DeviceFrame::Presence(Presence {
            state: PresenceState::Active
        }))
    );
    let topics = vec!["news".to_owned()];
    client.subscribe(topics.clone()).await.unwrap();
    assert_eq!(
        peer.hear().await,
        Ok(DeviceFrame::Subscribe(Topics {
            topics: topics.clone()
        }))
    );
    peer.say([
        ServerFrame::Subscribed(Topics { topics }),
        ServerFrame::Withdraw(Withdraw { ids: vec![id(1)] }),
    ])
    .await;
    world.seen.event_like("Subscribed").await;
    world.seen.event_like("Withdrawn").await;
    client.subscribe(vec![String::new()]).await.unwrap_err();
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn leaving_after_a_number_hands_over_exactly_that_many() {
    let mut world = World::new(Udp::Quic).await;
    let client = world.builder().leave_after(2).start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say((1..=5).map(|number| notify(number, number))).await;
    peer.acknowledged_up_to(2).await;
    peer.goodbye().await;
    client.ended().await;
    assert_eq!(world.seen.titles(), ["1", "2"]);
}

#[tokio::test]
async fn a_server_that_overruns_the_window_is_left() {
    let mut world = World::new(Udp::Quic).await;
    let builder = world
        .builder()
        .window(2)
        .on_notification_async(|_| std::future::pending());
    let client = builder.start().await.unwrap();
    let mut peer = world.server.accept().await;
    assert_eq!(world.welcome(&mut peer).await.window, Some(2));
    peer.say((1..=3).map(|number| notify(number, number))).await;
    let told = world
        .seen
        .event_like("disconnected: the server breaks the protocol")
        .await;
    assert!(told.contains("more in flight than the window"), "{told}");
    drop(client);
}

#[tokio::test]
async fn one_directory_serves_one_client() {
    let mut world = World::new(Udp::Quic).await;
    let (client, peer) = world.attached().await;
    let second = world.builder().start().await.unwrap_err().to_string();
    assert!(second.contains("in use by another client"), "{second}");
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
    let (client, peer) = world.attached().await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_proxy_is_passed_by_connect_and_a_refusal_is_told() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut world = World::new(Udp::Quic).await;
    let proxy = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://ann:secret@{}", proxy.local_addr().unwrap());
    let target = world.server.address;
    let proxying = tokio::spawn(async move {
        let head = async |stream: &mut tokio::net::TcpStream| {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                head.push(stream.read_u8().await.unwrap());
            }
            String::from_utf8(head).unwrap()
        };
        let (mut refused, _) = proxy.accept().await.unwrap();
        head(&mut refused).await;
        refused
            .write_all(b"HTTP/1.1 403 Forbidden\r\n\r\n")
            .await
            .unwrap();
        let (mut stream, _) = proxy.accept().await.unwrap();
        let asked = head(&mut stream).await;
        stream
            .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
            .await
            .unwrap();
        let mut upstream = tokio::net::TcpStream::connect(target).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
        asked
    });
    let client = world
        .builder()
        .proxy(url.parse().unwrap())
        .start()
        .await
        .unwrap();
    let told = world.seen.event_like("disconnected: the proxy").await;
    assert!(
        told.contains("HTTP 403") && !told.contains("secret"),
        "{told}"
    );
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    assert_eq!(peer.carrier, Carrier::WebSocket);
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
    let asked = proxying.await.unwrap();
    assert!(
        asked.starts_with(&format!("CONNECT localhost:{} HTTP/1.1\r\n", target.port())),
        "{asked}"
    );
    assert!(
        asked.contains("Proxy-Authorization: Basic YW5uOnNlY3JldA==\r\n"),
        "{asked}"
    );
}

#[tokio::test]
async fn a_pong_proves_what_the_server_has_so_the_next_hello_need_not_say_it() {
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    client.network_changed(None).await.unwrap();
    assert_eq!(peer.hear().await, Ok(DeviceFrame::Ping));
    peer.say([ServerFrame::Pong, notify(2, 2)]).await;
    peer.acknowledged_up_to(2).await;
    peer.break_off();
    let mut peer = world.server.accept().await;
    let hello = world.welcome(&mut peer).await;
    assert_eq!(
        hello.seen.iter().map(|seen| seen.id).collect::<Vec<_>>(),
        [id(2)]
    );
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn acknowledgements_pass_over_a_slow_notification_only_by_name() {
    // A repeat is answered from the window while the app still works on the one before it.
    let mut world = World::new(Udp::Quic).await;
    let (client, mut peer) = world.attached().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
    let gate = Arc::new(tokio::sync::Notify::new());
    let open = gate.clone();
    let builder = world.builder().on_notification_async(move |_| {
        let open = open.clone();
        async move {
            open.notified().await;
            Verdict::Acknowledge
        }
    });
    let client = builder.start().await.unwrap();
    let mut peer = world.server.accept().await;
    world.welcome(&mut peer).await;
    peer.say([notify(1, 2), notify(2, 1)]).await;
    assert_eq!(
        peer.hear().await,
        Ok(DeviceFrame::Ack(Ack::Ids(vec![id(1)])))
    );
    gate.notify_one();
    peer.acknowledged_up_to(1).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}
