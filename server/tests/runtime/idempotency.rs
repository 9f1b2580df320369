//! One key, one ping, one answer.

use bellwire_server::runtime::{PingError, PingRequest, RuntimeError, Target, Turn};

use crate::house::{House, ping, until};
use crate::store::Mode;

fn keyed(target: Target, key: &str, body: u8) -> PingRequest {
    PingRequest {
        idempotency: Some((key.to_owned(), [body; 32])),
        ..ping(target)
    }
}

#[tokio::test]
async fn a_repeated_key_gets_the_same_answer_and_rings_nobody() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let request = keyed(Target::Device(device.id), "order-1", 1);
    let first = house.handle.ping(request.clone()).await.unwrap();
    link.notification().await;
    link.acknowledge(1);
    house.ended(first.id).await;
    let again = house.handle.ping(request).await.unwrap();
    assert_eq!(again, first);
    let next = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    assert_eq!(link.notification().await.0, next);
}

#[tokio::test]
async fn a_key_with_another_body_is_a_conflict_before_and_after_the_answer() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let target = || Target::Device(device.id);
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let first = keyed(target(), "order-1", 1);
    let asked = tokio::spawn(async move { handle.ping(first).await });
    until("a batch", async || house.store.held() > 0).await;
    let other = keyed(target(), "order-1", 2);
    assert_eq!(
        house.handle.ping(other.clone()).await.unwrap_err(),
        PingError::IdempotencyConflict
    );
    house.store.set_mode(Mode::Commit);
    asked.await.unwrap().unwrap();
    assert_eq!(
        house.handle.ping(other).await.unwrap_err(),
        PingError::IdempotencyConflict
    );
}

#[tokio::test]
async fn requests_at_once_with_one_key_share_one_answer() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let asked: Vec<_> = (0..10)
        .map(|_| {
            let handle = house.handle.clone();
            let request = keyed(Target::Device(device.id), "order-1", 1);
            tokio::spawn(async move { handle.ping(request).await })
        })
        .collect();
    until("a batch", async || house.store.held() > 0).await;
    house.store.set_mode(Mode::Commit);
    let mut answers = Vec::new();
    for one in asked {
        answers.push(one.await.unwrap().unwrap());
    }
    assert!(answers.iter().all(|answer| *answer == answers[0]));
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn another_takes_over_when_the_first_caller_goes_away() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let request = keyed(Target::Device(device.id), "order-1", 1);
    let ask = || {
        let handle = house.handle.clone();
        let request = request.clone();
        tokio::spawn(async move { handle.ping(request).await })
    };
    let first = ask();
    until("a batch", async || house.store.held() > 0).await;
    let second = ask();
    tokio::task::yield_now().await;
    first.abort();
    drop(first.await);
    house.store.set_mode(Mode::Commit);
    second.await.unwrap().unwrap();
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn after_a_crash_the_same_key_makes_the_same_ping() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let request = keyed(Target::Device(device.id), "order-1", 1);
    let first = house.handle.ping(request.clone()).await.unwrap();
    // The record only rode along with later frames, and there was none.
    assert!(house.store.disk(|disk| disk.idempotency.is_empty()));
    let house = house.restart().await;
    let again = house.handle.ping(request).await.unwrap();
    assert_eq!(again, first);
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn after_a_restart_a_remembered_key_answers_or_conflicts() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let request = keyed(Target::Devices(vec![device.id]), "order-1", 1);
    let first = house.handle.ping(request.clone()).await.unwrap();
    house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap();
    assert_eq!(house.store.disk(|disk| disk.idempotency.len()), 1);
    let house = house.restart().await;
    // The notification is gone meanwhile; the answer stays the same all the same, and nothing is sent again.
    house.store.disk(|disk| disk.rows.clear());
    assert_eq!(house.handle.ping(request.clone()).await.unwrap(), first);
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 0);
    let mut other = request;
    other.idempotency = Some(("order-1".to_owned(), [2; 32]));
    assert_eq!(
        house.handle.ping(other).await.unwrap_err(),
        PingError::IdempotencyConflict
    );
}

#[tokio::test]
async fn a_refused_ping_may_be_tried_again_with_its_key() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::NoRoom);
    let request = keyed(Target::Device(device.id), "order-1", 1);
    assert_eq!(
        house.handle.ping(request.clone()).await.unwrap_err(),
        PingError::Runtime(RuntimeError::NoRoom)
    );
    house.store.set_mode(Mode::Commit);
    until("room", async || {
        house.handle.ping(request.clone()).await.is_ok()
    })
    .await;
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn who_follows_a_repeat_waits_for_the_places_of_the_first() {
    let house = House::open().await;
    let device = house.device("anna").await;
    // The first has not come to the mailboxes: it does not know yet which they are.
    house.store.hold_reads(true);
    let request = || keyed(Target::Users(vec!["anna".to_owned()]), "order-1", 1);
    let (handle, first) = (house.handle.clone(), request());
    let first = tokio::spawn(async move { handle.ping(first).await });
    until("it looks for the devices", async || {
        house.store.reads_held() > 0
    })
    .await;
    let (turn, placed) = Turn::new();
    let (handle, second) = (house.handle.clone(), request());
    let second = tokio::spawn(async move { handle.ping_in_turn(second, turn, None).await });
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!placed.is_so(), "what follows would overtake it");
    house.store.hold_reads(false);
    until("both are there", async || placed.is_so()).await;
    let first = first.await.unwrap().unwrap();
    assert_eq!(second.await.unwrap().unwrap(), first);
    assert_eq!(
        house.store.disk(|disk| disk.rows.keys().next().unwrap().0),
        device.id
    );
}

#[tokio::test]
async fn who_joined_one_that_went_away_takes_its_own_places() {
    let house = House::open().await;
    house.device("anna").await;
    house.store.hold_reads(true);
    let request = || keyed(Target::Users(vec!["anna".to_owned()]), "order-1", 1);
    let (handle, first) = (house.handle.clone(), request());
    let first = tokio::spawn(async move { handle.ping(first).await });
    until("it looks for the devices", async || {
        house.store.reads_held() > 0
    })
    .await;
    let (turn, placed) = Turn::new();
    let (handle, second) = (house.handle.clone(), request());
    let second = tokio::spawn(async move { handle.ping_in_turn(second, turn, None).await });
    tokio::task::yield_now().await;
    first.abort();
    drop(first.await);
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    assert!(!placed.is_so(), "it has no places yet");
    house.store.hold_reads(false);
    second.await.unwrap().unwrap();
    assert!(placed.is_so());
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}
