//! Servers that do what no server should: the client comes back, or leaves when it is asked to.

use std::time::Duration;

use bellwire_client::{Carriers, Verdict};

use tokio::sync::watch;

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
    let mut server = FakeServer::start(Udp::Narrow).await;
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let (answered, mut at_app) = watch::channel(0u64);
    let client = server
        .client(state.path(), &seen)
        .carriers(Carriers::Quic)
        .window(256)
        .without_sync()
        .on_notification(move |_| {
            answered.send_modify(|answered| *answered += 1);
            Verdict::decline("x".repeat(256))
        })
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    // A window of long answers is more than every buffer on the way holds.
    peer.say((1..=256).map(|number| notify(number, number)))
        .await;
    // The app answers until the way is full; how much that is depends on who was faster.
    let full = async {
        loop {
            let before = *at_app.borrow_and_update();
            tokio::time::sleep(Duration::from_millis(300)).await;
            if before > 0 && *at_app.borrow() == before {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, full).await.unwrap();
    let left = tokio::time::timeout(PATIENCE, client.shutdown()).await;
    left.expect("the client does not leave");
}
