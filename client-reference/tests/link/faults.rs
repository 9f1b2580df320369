//! Servers that do what no server should: the client comes back, or leaves when it is asked to.

use std::time::Duration;

use bellwire_client::{Carriers, Verdict};

use crate::support::{FakeServer, PATIENCE, Seen, Udp, notify};

#[tokio::test]
async fn a_length_that_no_frame_may_have_ends_the_session_and_not_the_client() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let client = server
        .client(state.path(), &seen)
        .carriers(Carriers::Quic)
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    // A varint of eight bytes, all ones; the server keeps the connection open.
    peer.say_unframed(&[0xff; 8]).await;
    let mut next = server.accept().await;
    next.welcome().await;
    drop(peer);
    next.say([notify(1, 2)]).await;
    next.acknowledged_up_to(1).await;
    let (_, ()) = tokio::join!(client.shutdown(), next.goodbye());
    assert_eq!(seen.titles(), ["1", "2"]);
}

#[tokio::test]
async fn a_server_that_reads_nothing_does_not_keep_an_app_that_wants_to_leave() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let client = server
        .client(state.path(), &seen)
        .carriers(Carriers::Quic)
        .without_sync()
        .on_notification(|_| Verdict::decline("x".repeat(256)))
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    // Its answers fill every buffer on the way, until it cannot send and so reads no more either.
    let mut number = 0;
    loop {
        let batch = (number + 1..=number + 16).map(|number| notify(number, number));
        let said = tokio::time::timeout(Duration::from_secs(3), peer.say(batch)).await;
        if said.is_err() {
            break;
        }
        number += 16;
        assert!(number < 200_000, "nothing ever fills up");
    }
    let left = tokio::time::timeout(PATIENCE, client.shutdown()).await;
    left.expect("the client does not leave");
}
