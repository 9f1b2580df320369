//! What was delivered and is taken off the screen again.

use std::collections::HashSet;
use std::time::Duration;

use bellwire_server::delivery::{DeviceId, PingId, WITHDRAWALS_MAX};
use bellwire_server::runtime::{Out, Target, WithdrawCounts};

use crate::house::{APP, Device, House, Link, ping, settings, until};
use crate::store::{FakeStore, Mode};
use bellwire_server::ports::PairState;

fn anna() -> Target {
    Target::Users(vec!["anna".to_owned()])
}

/// Sends one to everybody of `links` and has them acknowledge it.
async fn delivered(house: &House, target: Target, links: &mut [&mut Link]) -> PingId {
    let handle = house.handle.clone();
    let asked = tokio::spawn(async move { handle.ping(ping(target)).await });
    for link in links {
        let (_, seq, _) = link.notification().await;
        link.acknowledge(seq);
    }
    let id = asked.await.unwrap().unwrap().id;
    house.ended(id).await;
    id
}

async fn withdraw(house: &House, id: PingId, except: &[DeviceId]) -> WithdrawCounts {
    let except: HashSet<DeviceId> = except.iter().copied().collect();
    let counts = house.handle.withdraw_ping(APP, id, except).await;
    counts.unwrap().unwrap()
}

async fn told(link: &mut Link) -> Vec<PingId> {
    let word = link.next().await;
    let Out::Withdraw(ids) = word else {
        panic!("not a withdrawal: {word:?}")
    };
    ids
}

fn kept(house: &House) -> usize {
    house.store.disk(|disk| disk.withdrawals.len())
}

#[tokio::test]
async fn those_who_have_it_are_told_now_or_when_they_come_back_and_those_named_keep_it() {
    let house = House::open().await;
    let reads = house.device("anna").await;
    let shows = house.device("anna").await;
    let leaves = house.device("anna").await;
    let (mut one, mut two) = (reads.attach().await, shows.attach().await);
    let mut three = leaves.attach().await;
    let id = delivered(&house, anna(), &mut [&mut one, &mut two, &mut three]).await;
    three.leave();
    let counts = withdraw(&house, id, &[reads.id]).await;
    let expected = WithdrawCounts {
        withdrawn: 2,
        kept: 1,
        ..WithdrawCounts::default()
    };
    assert_eq!(counts, expected);
    assert_eq!(told(&mut two).await, [id]);
    assert!(one.silent());

    // Also behind a restart.
    let house = house.restart().await;
    let mut back = leaves.at(&house).attach().await;
    assert_eq!(told(&mut back).await, [id]);
    let mut reader = reads.at(&house).attach().await;
    let next = delivered(&house, Target::Device(reads.id), &mut [&mut reader]).await;
    assert_ne!(next, id);
}

#[tokio::test]
async fn what_still_waits_is_revoked_and_what_ended_otherwise_is_counted() {
    let house = House::open().await;
    let (absent, shows) = (house.device("anna").await, house.device("anna").await);
    let mut link = shows.attach().await;
    let handle = house.handle.clone();
    let asked = tokio::spawn(async move { handle.ping(ping(anna())).await });
    let (id, seq, _) = link.notification().await;
    link.acknowledge(seq);
    asked.await.unwrap().unwrap();
    until("the verdict", async || {
        let counts = house.handle.ping_view(APP, id, None, 10).await;
        let devices = counts.unwrap().unwrap().devices;
        devices
            .iter()
            .any(|pair| pair.device == shows.id && matches!(pair.state, PairState::Ended { .. }))
    })
    .await;
    let counts = withdraw(&house, id, &[]).await;
    assert_eq!((counts.revoked, counts.withdrawn, counts.ended), (1, 1, 0));
    assert_eq!(told(&mut link).await, [id]);
    // Once more: nobody has to be told twice, and nothing is left to take back.
    let counts = withdraw(&house, id, &[]).await;
    assert_eq!((counts.revoked, counts.withdrawn, counts.ended), (0, 1, 1));
    assert!(link.silent());
    let mut late = absent.attach().await;
    let next = delivered(&house, Target::Device(absent.id), &mut [&mut late]).await;
    assert_ne!(next, id);
}

#[tokio::test]
async fn one_that_is_being_acknowledged_is_taken_off_the_screen_once_that_is_safe() {
    let house = House::open().await;
    let device = house.device("anna").await;
    // It is stored: its removal needs the disk.
    let id = house.handle.ping(ping(anna())).await.unwrap().id;
    let mut link = device.attach().await;
    let (_, seq, _) = link.notification().await;
    house.store.set_mode(Mode::Hold);
    link.acknowledge(seq);
    until("the removal", async || house.store.held() > 0).await;
    let handle = house.handle.clone();
    let asked = tokio::spawn(async move { handle.withdraw_ping(APP, id, HashSet::new()).await });
    let revoke = house.handle.revoke_ping(APP, id);
    assert!(
        tokio::time::timeout(Duration::from_millis(50), revoke)
            .await
            .is_err(),
        "answered before the end of the notification was safe"
    );
    house.store.set_mode(Mode::Commit);
    let counts = asked.await.unwrap().unwrap().unwrap();
    assert_eq!((counts.revoked, counts.withdrawn, counts.ended), (0, 1, 0));
    assert_eq!(told(&mut link).await, [id]);
}

#[tokio::test]
async fn what_was_sent_and_not_answered_is_withdrawn_when_it_is_revoked() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let handle = house.handle.clone();
    let to = Target::Device(device.id);
    let asked = tokio::spawn(async move { handle.ping(ping(to)).await });
    let (id, _, _) = link.notification().await;
    link.leave();
    asked.await.unwrap().unwrap();
    let counts = house.handle.revoke_ping(APP, id).await.unwrap().unwrap();
    assert_eq!((counts.revoked, counts.ended), (1, 0));
    let mut back = device.attach().await;
    assert_eq!(told(&mut back).await, [id]);

    // What nobody was sent, nobody is told of.
    let other = house.device("ben").await;
    let id = house.handle.ping(ping(Target::Device(other.id))).await;
    let id = id.unwrap().id;
    house.handle.revoke_ping(APP, id).await.unwrap().unwrap();
    assert_eq!(kept(&house), 1);
}

#[tokio::test]
async fn what_the_device_has_shown_to_have_heard_is_forgotten() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let id = delivered(&house, anna(), &mut [&mut link]).await;
    withdraw(&house, id, &[]).await;
    assert_eq!(told(&mut link).await, [id]);
    assert_eq!(kept(&house), 1);
    // A verdict on what came behind it is the proof.
    delivered(&house, anna(), &mut [&mut link]).await;
    // What rides along is written with whatever comes next.
    house.device("ben").await;
    until("that it is forgotten", async || kept(&house) == 0).await;
}

#[tokio::test]
async fn a_device_keeps_no_more_withdrawals_than_the_limit_and_none_when_it_is_gone() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut first = None;
    let mut last = None;
    for _ in 0..WITHDRAWALS_MAX + 2 {
        let mut link = device.attach().await;
        let id = next_notification(&house, &device, &mut link).await;
        link.leave();
        withdraw(&house, id, &[]).await;
        first.get_or_insert(id);
        last = Some(id);
        house.clock.advance(Duration::from_millis(1));
    }
    assert_eq!(kept(&house), WITHDRAWALS_MAX);
    let mut link = device.attach().await;
    let ids = told(&mut link).await;
    assert_eq!(ids.len(), WITHDRAWALS_MAX);
    assert!(ids.contains(&last.unwrap()) && !ids.contains(&first.unwrap()));
    house.handle.revoke_device(APP, device.id).await.unwrap();
    assert_eq!(kept(&house), 0);
}

/// Sends one and has it acknowledged by its id, so that nothing is shown about what was heard before it.
async fn next_notification(house: &House, device: &Device, link: &mut Link) -> PingId {
    let handle = house.handle.clone();
    let to = Target::Device(device.id);
    let asked = tokio::spawn(async move { handle.ping(ping(to)).await });
    let id = loop {
        let word = link.next().await;
        if let Out::Send { notification, .. } = &word {
            break notification.ping;
        }
        assert!(matches!(word, Out::Withdraw(_)), "{word:?}");
    };
    // Another session says that it has it: this one stays silent about what else it heard.
    link.leave();
    let again = device.connect_having(1, &[id]).await;
    asked.await.unwrap().unwrap();
    house.ended(id).await;
    again.leave();
    id
}

#[tokio::test]
async fn without_a_time_to_keep_them_only_those_who_are_there_are_told() {
    let mut settings = settings();
    settings.limits.withdrawals_keep = Duration::ZERO;
    settings.policy.withdrawals_keep = Duration::ZERO;
    let house = House::with(settings, std::sync::Arc::new(FakeStore::default())).await;
    let (here, away) = (house.device("anna").await, house.device("anna").await);
    let (mut one, mut two) = (here.attach().await, away.attach().await);
    let id = delivered(&house, anna(), &mut [&mut one, &mut two]).await;
    two.leave();
    let counts = withdraw(&house, id, &[]).await;
    assert_eq!(counts.withdrawn, 2);
    assert_eq!(told(&mut one).await, [id]);
    assert_eq!(kept(&house), 0);
}

#[tokio::test]
async fn a_ping_that_nobody_knows_cannot_be_withdrawn() {
    let house = House::open().await;
    let unknown = house
        .handle
        .withdraw_ping(APP, PingId([9; 16]), HashSet::new())
        .await;
    assert!(unknown.unwrap().is_none());
}
