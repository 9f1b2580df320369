//! Going down without losing anything.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::runtime::{
    Identity, NotReady, Out, PingError, RuntimeError, Target, WhoError,
};

use crate::house::{House, ping, settings, until};
use crate::store::{FakeStore, Mode};

#[tokio::test]
async fn every_session_is_told_when_to_come_back_and_the_store_is_closed() {
    let house = House::open().await;
    let mut links = Vec::new();
    let mut devices = Vec::new();
    for _ in 0..20 {
        let device = house.device("anna").await;
        links.push(device.attach().await);
        devices.push(device);
    }
    let handle = house.handle.clone();
    let drained = tokio::spawn(async move { handle.drain(Duration::from_secs(30)).await });
    for link in &mut links {
        match link.next().await {
            Out::Drain { min_ms, max_ms } => assert!(min_ms > 0 && max_ms > min_ms),
            other @ (Out::Welcome { .. }
            | Out::Refuse(_)
            | Out::Send { .. }
            | Out::Withdraw(_)
            | Out::Close(_)) => panic!("expected a farewell, not {other:?}"),
        }
        link.leave();
    }
    let summary = drained.await.unwrap();
    assert_eq!((summary.sessions, summary.cut), (20, 0));
    assert!(summary.committed && house.store.closed());
    assert_eq!(house.handle.ready(), Err(NotReady::Draining));
    let who = house
        .handle
        .authenticate(devices[0].id, Identity::Secret(&devices[0].secret))
        .await;
    assert_eq!(who.unwrap_err(), WhoError::Draining);
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(devices[0].id)))
            .await
            .unwrap_err(),
        PingError::Runtime(RuntimeError::Draining)
    );
    // A second call has the same answer.
    assert_eq!(house.handle.drain(Duration::ZERO).await, summary);
}

#[tokio::test]
async fn sessions_that_stay_are_cut_and_what_they_held_back_is_stored() {
    let mut settings = settings();
    settings.policy.defer_max = Duration::from_secs(3_600);
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    // Its device takes its time, so that the next row is held back for three times that, which is longer than the drain.
    let first = house.handle.ping(ping(Target::Device(device.id)));
    let answer = async {
        link.notification().await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        link.acknowledge(1);
    };
    let (first, ()) = tokio::join!(first, answer);
    first.unwrap();
    let handle = house.handle.clone();
    let request = ping(Target::Device(device.id));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    let (id, _, _) = link.notification().await;
    let summary = house.handle.drain(Duration::from_millis(300)).await;
    assert_eq!(
        (summary.sessions, summary.cut, summary.committed),
        (1, 1, true)
    );
    assert_eq!(asked.await.unwrap().unwrap().id, id);
    let stored = house
        .store
        .disk(|disk| disk.rows.values().any(|(row, _)| row.ping == id));
    assert!(stored);
}

#[tokio::test]
async fn pings_under_way_are_answered_before_the_end() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let request = ping(Target::Device(device.id));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    until("a batch", async || house.store.held() > 0).await;
    let handle = house.handle.clone();
    let drained = tokio::spawn(async move { handle.drain(Duration::from_millis(50)).await });
    until("refusal", async || {
        let answer = house.handle.ping(ping(Target::Users(Vec::new()))).await;
        answer == Err(PingError::Runtime(RuntimeError::Draining))
    })
    .await;
    assert!(!asked.is_finished());
    house.store.set_mode(Mode::Commit);
    asked.await.unwrap().unwrap();
    assert!(drained.await.unwrap().committed);
}

#[tokio::test]
async fn a_failed_store_drains_too_and_the_summary_says_so() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Fail);
    drop(house.handle.ping(ping(Target::Device(device.id))).await);
    let summary = house.handle.drain(Duration::from_millis(50)).await;
    assert!(!summary.committed);
}

#[tokio::test]
async fn a_shut_down_runtime_leaves_no_task_behind() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap();
    let handle = house.handle.clone();
    house.runtime.shutdown(Duration::from_millis(50)).await;
    assert_eq!(
        handle
            .revoke_ping(
                crate::house::APP,
                bellwire_server::delivery::PingId([1; 16])
            )
            .await,
        Ok(None)
    );
    assert_eq!(
        handle
            .create_device(crate::house::APP, "anna", None)
            .await
            .err(),
        Some(RuntimeError::StoreUnavailable)
    );
}
