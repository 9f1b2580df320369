//! Changing devices: another user, another secret; when they were last seen; users as a whole.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{AppId, Closing, DeviceId, Outcome, PingId};
use bellwire_server::ports::{Carrier, PairState};
use bellwire_server::runtime::{
    DeviceChange, DeviceQuery, DeviceView, Identity, Out, RuntimeError, Target, Waiting, WhoError,
};

use crate::house::{APP, Device, House, Link, ping, settings, until};
use crate::store::Mode;

fn to(user: &str, waiting: Waiting) -> DeviceChange {
    DeviceChange {
        user: Some(user.to_owned()),
        waiting,
        ..DeviceChange::default()
    }
}

fn user(name: &str) -> Target {
    Target::Users(vec![name.to_owned()])
}

async fn send(house: &House, target: Target) -> PingId {
    house.handle.ping(ping(target)).await.unwrap().id
}

async fn state(house: &House, id: PingId) -> PairState {
    let view = house.handle.ping_view(APP, id, None, 10).await.unwrap();
    view.unwrap().devices[0].state
}

fn is_revoked(state: PairState) -> bool {
    matches!(
        state,
        PairState::Ended {
            outcome: Outcome::Revoked,
            ..
        }
    )
}

async fn look(house: &House, device: DeviceId) -> DeviceView {
    house.handle.device(APP, device).await.unwrap().unwrap()
}

#[tokio::test]
async fn a_device_given_away_loses_what_waited_for_its_old_user_and_keeps_its_session() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let before = send(&house, user("anna")).await;
    let mut link = device.attach().await;
    assert_eq!(link.notification().await.0, before);
    let changed = house
        .handle
        .change_device(APP, device.id, to("ben", Waiting::Revoke))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((changed.device.user.as_str(), changed.revoked), ("ben", 1));
    assert_eq!(changed.device.waiting, Some(0));
    let word = link.next().await;
    assert!(
        matches!(&word, Out::Withdraw(pings) if *pings == [before]),
        "{word:?}"
    );
    assert!(is_revoked(state(&house, before).await));

    assert_eq!(
        house.handle.ping(ping(user("anna"))).await.unwrap().devices,
        0
    );
    let after = send(&house, user("ben")).await;
    assert_eq!(link.notification().await.0, after);
    house.store.disk(|disk| {
        assert_eq!(disk.devices[&device.id].user, "ben");
        assert_eq!(disk.summaries[&device.id].count, 1);
    });
    // The same again changes nothing: a retry takes nothing away that came since.
    let again = house
        .handle
        .change_device(APP, device.id, to("ben", Waiting::Revoke))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((again.revoked, again.device.waiting), (0, Some(1)));
}

#[tokio::test]
async fn what_waits_goes_with_the_device_if_that_is_asked_for() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let kept = send(&house, user("anna")).await;
    let changed = house
        .handle
        .change_device(APP, device.id, to("ben", Waiting::Keep))
        .await
        .unwrap()
        .unwrap();
    assert_eq!((changed.revoked, changed.device.waiting), (0, Some(1)));
    let mut link = device.attach().await;
    assert_eq!(link.notification().await.0, kept);
    assert_eq!(
        house.handle.ping(ping(user("ben"))).await.unwrap().devices,
        1
    );
}

#[tokio::test]
async fn the_revocation_and_the_new_user_are_in_one_frame() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let waiting = send(&house, user("anna")).await;
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let id = device.id;
    let change = tokio::spawn(async move {
        handle
            .change_device(APP, id, to("ben", Waiting::Revoke))
            .await
    });
    until("the frame", async || house.store.held() == 1).await;
    house.store.disk(|disk| {
        assert_eq!(disk.devices[&id].user, "anna");
        assert_eq!(disk.rows.len(), 1);
    });
    // One frame more or less makes the difference between before and after.
    house.store.set_mode(Mode::Commit);
    assert_eq!(change.await.unwrap().unwrap().unwrap().revoked, 1);
    house.store.disk(|disk| {
        assert_eq!(disk.devices[&id].user, "ben");
        assert!(disk.rows.is_empty());
    });
    assert!(is_revoked(state(&house, waiting).await));
}

#[tokio::test]
async fn a_ping_to_the_old_user_never_reaches_the_new_one() {
    for waiting in [Waiting::Revoke, Waiting::Keep] {
        let house = House::open().await;
        let device = house.device("anna").await;
        let handle = house.handle.clone();
        let publishing = tokio::spawn(async move {
            let mut annas = Vec::new();
            loop {
                let anna = handle.ping(ping(user("anna"))).await.unwrap();
                let ben = handle.ping(ping(user("ben"))).await.unwrap();
                annas.extend((anna.devices == 1).then_some(anna.id));
                if ben.devices == 1 {
                    return (annas, ben.id);
                }
            }
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let changed = house
            .handle
            .change_device(APP, device.id, to("ben", waiting))
            .await
            .unwrap();
        let (mut annas, last) = publishing.await.unwrap();
        let wait: Vec<PingId> = house
            .store
            .disk(|disk| disk.rows.values().map(|(meta, _)| meta.ping).collect());
        match waiting {
            Waiting::Revoke => {
                assert_eq!(changed.unwrap().revoked as usize, annas.len());
                assert_eq!(wait, [last]);
            }
            Waiting::Keep => {
                annas.push(last);
                assert_eq!(wait, annas);
            }
        }
    }
}

#[tokio::test]
async fn pings_to_both_users_wait_for_a_change_that_is_being_written() {
    for waiting in [Waiting::Revoke, Waiting::Keep] {
        let house = House::open().await;
        let device = house.device("anna").await;
        // Both are in the cache by now.
        send(&house, user("anna")).await;
        send(&house, user("ben")).await;
        house.store.set_mode(Mode::Hold);
        let handle = house.handle.clone();
        let id = device.id;
        let change =
            tokio::spawn(async move { handle.change_device(APP, id, to("ben", waiting)).await });
        until("the frame", async || house.store.held() == 1).await;
        let pings: Vec<_> = ["anna", "ben"]
            .into_iter()
            .map(|name| {
                let handle = house.handle.clone();
                tokio::spawn(async move { handle.ping(ping(user(name))).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_millis(50)).await;
        house.store.set_mode(Mode::Commit);
        change.await.unwrap().unwrap();
        let mut devices = Vec::new();
        for ping in pings {
            devices.push(ping.await.unwrap().unwrap().devices);
        }
        assert_eq!(devices, [0, 1]);
    }
}

#[tokio::test]
async fn names_change_and_go_and_nobody_else_changes_them() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let name = |name: Option<&str>| DeviceChange {
        name: Some(name.map(str::to_owned)),
        ..DeviceChange::default()
    };
    let change = async |change| house.handle.change_device(APP, device.id, change).await;
    let changed = change(name(Some("tablet"))).await.unwrap().unwrap();
    assert_eq!(changed.device.name.as_deref(), Some("tablet"));
    let nothing = change(DeviceChange::default()).await.unwrap().unwrap();
    assert_eq!(nothing.device.name.as_deref(), Some("tablet"));
    let changed = change(name(None)).await.unwrap().unwrap();
    assert_eq!(changed.device.name, None);
    let long = "x".repeat(256);
    let error = change(name(Some(&long))).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Invalid(_)));
    let error = change(to(&long, Waiting::Keep)).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Invalid(_)));
    for (app, id) in [(AppId(2), device.id), (APP, DeviceId([1; 16]))] {
        let other = house
            .handle
            .change_device(app, id, name(Some("mine")))
            .await;
        assert!(other.unwrap().is_none());
        let rotated = house.handle.rotate_secret(app, id, None).await.unwrap();
        assert!(rotated.is_none());
    }
    assert_eq!(look(&house, device.id).await.name, None);
}

#[tokio::test]
async fn changes_meet_a_full_and_a_failed_store() {
    let house = House::open().await;
    let device = house.device("anna").await;
    send(&house, user("anna")).await;
    house.store.set_mode(Mode::Fail);
    let handle = &house.handle;
    let changed = handle
        .change_device(APP, device.id, to("ben", Waiting::Revoke))
        .await;
    assert_eq!(changed.unwrap_err(), RuntimeError::StoreUnavailable);
    let rotated = handle.rotate_secret(APP, device.id, None).await;
    assert_eq!(rotated.err(), Some(RuntimeError::StoreUnavailable));
    assert_eq!(
        handle.erase_user(APP, "anna").await.unwrap_err(),
        RuntimeError::StoreUnavailable
    );
    // Nothing of it happened.
    assert_eq!(look(&house, device.id).await.user, "anna");
    assert!(knows(&house, &device, &device.secret).await);
}

// ---- Secrets -----------------------------------------------------------------------------------------------------

async fn knows(house: &House, device: &Device, secret: &str) -> bool {
    let who = house
        .handle
        .authenticate(device.id, Identity::Secret(secret))
        .await;
    match who {
        Ok(_) => true,
        Err(WhoError::Unauthorized) => false,
        Err(other) => panic!("{other}"),
    }
}

async fn rotate(house: &House, device: &Device, overlap: Option<u64>) -> String {
    let overlap = overlap.map(Duration::from_secs);
    let rotated = house.handle.rotate_secret(APP, device.id, overlap).await;
    rotated.unwrap().unwrap().secret
}

#[tokio::test]
async fn each_secret_is_good_until_its_own_overlap_is_over() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let second = rotate(&house, &device, None).await;
    assert!(knows(&house, &device, &device.secret).await);
    assert!(knows(&house, &device, &second).await);
    let until_ms = look(&house, device.id).await.previous_secret_until_ms;
    let day_ms = until_ms.unwrap() - house.handle.now_ms();
    assert!((86_000_000..=86_400_000).contains(&day_ms), "{day_ms}");

    // Somebody whose answer got lost rotates again: the secret that the device has stays good.
    let third = rotate(&house, &device, Some(60)).await;
    for secret in [&device.secret, &second, &third] {
        assert!(knows(&house, &device, secret).await);
    }
    house.clock.advance(Duration::from_secs(59));
    assert!(knows(&house, &device, &second).await);
    house.clock.advance(Duration::from_secs(2));
    assert!(!knows(&house, &device, &second).await);
    assert!(knows(&house, &device, &device.secret).await);
    assert!(knows(&house, &device, &third).await);
    // The session goes on meanwhile, on the longer of what it may have been proved with.
    let id = send(&house, Target::Device(device.id)).await;
    assert_eq!(link.notification().await.0, id);

    let house = house.restart().await;
    // The clock of the new one begins without what was added to the old one's.
    house.clock.advance(Duration::from_secs(61));
    let device = device.at(&house);
    assert!(knows(&house, &device, &third).await);
    assert!(knows(&house, &device, &device.secret).await);
    assert!(!knows(&house, &device, &second).await);
    house.clock.advance(Duration::from_secs(86_400));
    assert!(!knows(&house, &device, &device.secret).await);
    assert_eq!(look(&house, device.id).await.previous_secret_until_ms, None);
}

#[tokio::test]
async fn no_device_has_more_good_secrets_than_five_and_all_older_ones_can_be_ended() {
    let house = House::open().await;
    let device = house.device("anna").await;
    for _ in 0..4 {
        rotate(&house, &device, None).await;
    }
    let again = house.handle.rotate_secret(APP, device.id, None).await;
    assert!(matches!(again, Err(RuntimeError::Invalid(_))));
    assert!(knows(&house, &device, &device.secret).await);
    let last = rotate(&house, &device, Some(0)).await;
    assert!(!knows(&house, &device, &device.secret).await);
    assert!(knows(&house, &device, &last).await);
}

#[tokio::test]
async fn a_session_ends_with_the_secret_that_it_was_proved_with() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let early = device.attach().await;
    let second = rotate(&house, &device, Some(60)).await;
    early.leave();
    // One that shows the old secret while it is good, and one that has the new one.
    let mut old = device.attach().await;
    let other = house.device("ben").await;
    let renewed = rotate(&house, &other, Some(60)).await;
    let mut new = Device {
        secret: renewed,
        ..other.at(&house)
    }
    .attach()
    .await;
    house.clock.advance(Duration::from_secs(61));
    let word = old.next().await;
    assert!(matches!(word, Out::Close(Closing::SecretEnded)), "{word:?}");
    let id = send(&house, Target::Device(other.id)).await;
    assert_eq!(new.notification().await.0, id);
    assert!(knows(&house, &device, &second).await);
}

#[tokio::test]
async fn whoever_is_let_in_while_its_secret_is_ended_is_sent_nothing() {
    let house = House::open().await;
    let device = house.device("anna").await;
    send(&house, Target::Device(device.id)).await;
    house.store.hold_reads(true);
    let mut link = device.connect(3).await;
    until("the mailbox is asked for", async || {
        house.store.reads_held() > 0
    })
    .await;
    rotate(&house, &device, Some(0)).await;
    house.store.hold_reads(false);
    let word = link.next().await;
    assert!(matches!(word, Out::Close(Closing::SecretEnded)), "{word:?}");
    assert!(link.silent());
    assert_eq!(look(&house, device.id).await.attached, None);
}

#[tokio::test]
async fn without_an_overlap_the_old_secret_and_its_session_end_at_once() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    // Somebody who was let in with the old secret and has not come to the shard yet.
    let late = device.knock().await;
    let second = rotate(&house, &device, Some(0)).await;
    let word = link.next().await;
    assert!(matches!(word, Out::Close(Closing::SecretEnded)), "{word:?}");
    assert!(!knows(&house, &device, &device.secret).await);
    assert_eq!(look(&house, device.id).await.attached, None);
    let mut late = late.enter(7);
    let word = late.next().await;
    assert!(matches!(word, Out::Refuse(_)), "{word:?}");

    let renewed = Device {
        secret: second,
        ..device.at(&house)
    };
    let mut link: Link = renewed.attach().await;
    let id = send(&house, Target::Device(device.id)).await;
    assert_eq!(link.notification().await.0, id);
}

#[tokio::test]
async fn an_overlap_beyond_the_limit_is_refused() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let overlap = Some(Duration::from_secs(7_776_001));
    let rotated = house.handle.rotate_secret(APP, device.id, overlap).await;
    assert!(matches!(rotated.err(), Some(RuntimeError::Invalid(_))));
    assert!(knows(&house, &device, &device.secret).await);
}

// ---- Last seen ---------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_fleet_that_comes_and_goes_causes_no_frame_and_is_seen_all_the_same() {
    let house = House::open().await;
    let mut devices = Vec::new();
    for _ in 0..20 {
        devices.push(house.device("anna").await);
    }
    assert_eq!(look(&house, devices[0].id).await.seen, None);
    let frames = house.handle.status().store.frames;
    for device in &devices {
        let link = device.attach().await;
        let view = look(&house, device.id).await;
        let seen = view.seen.unwrap();
        assert_eq!(seen.carrier, Carrier::WebSocket);
        assert_eq!(seen.agent.as_deref(), Some("tester/1"));
        link.leave();
    }
    until("all to leave", async || {
        house.handle.status().connected() == 0
    })
    .await;
    let seen = look(&house, devices[0].id).await.seen.unwrap();
    assert!(seen.at_ms <= house.handle.now_ms());
    house.clock.advance(Duration::from_secs(3_600));
    // The shards look around by themselves now and then; nothing of that is worth a frame.
    let asked = house.clock.asked();
    until("a few sweeps", async || house.clock.asked() > asked + 5).await;
    assert_eq!(house.handle.status().store.frames, frames);

    // The next frames that are written anyway take it along.
    for device in &devices {
        send(&house, Target::Device(device.id)).await;
    }
    house.store.disk(|disk| assert_eq!(disk.seen.len(), 20));
    assert_eq!(look(&house, devices[0].id).await.seen, Some(seen));
}

#[tokio::test]
async fn an_orderly_stop_writes_when_devices_were_last_seen() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let _link = device.attach().await;
    house.handle.drain(Duration::from_millis(50)).await;
    house.store.disk(|disk| {
        let seen = &disk.seen[&device.id];
        assert_eq!(seen.agent.as_deref(), Some("tester/1"));
    });
}

#[tokio::test]
async fn nothing_of_a_revoked_device_is_written_afterwards() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let other = house.device("ben").await;
    let _link = device.attach().await;
    house.clock.advance(Duration::from_secs(600));
    assert!(house.handle.revoke_device(APP, device.id).await.unwrap());
    house.clock.advance(Duration::from_secs(600));
    send(&house, Target::Device(other.id)).await;
    house.handle.drain(Duration::from_millis(50)).await;
    house.store.disk(|disk| {
        assert!(!disk.seen.contains_key(&device.id));
        assert!(!disk.devices.contains_key(&device.id));
    });
}

#[tokio::test]
async fn lists_are_filtered_by_presence_and_by_when_a_device_was_seen() {
    let house = House::open().await;
    let begin_ms = house.handle.now_ms();
    let old = house.device("anna").await;
    let never = house.device("anna").await;
    old.attach().await.leave();
    until("absence", async || house.handle.status().connected() == 0).await;
    house.clock.advance(Duration::from_secs(3_600));
    let here = house.device("ben").await;
    let _link = here.attach().await;
    let middle_ms = begin_ms + 1_800_000;

    let list = async |query: DeviceQuery| {
        let mut found = Vec::new();
        let mut after = None;
        loop {
            let page = house.handle.devices(APP, &query, after, 1).await.unwrap();
            found.extend(page.items.into_iter().map(|view| view.device));
            after = page.next;
            if after.is_none() {
                break;
            }
        }
        found.sort_unstable();
        found
    };
    let sorted = |devices: &[&Device]| {
        let mut ids: Vec<DeviceId> = devices.iter().map(|device| device.id).collect();
        ids.sort_unstable();
        ids
    };
    let any = DeviceQuery::default;
    assert_eq!(list(any()).await.len(), 3);
    let attached = |attached| DeviceQuery {
        attached: Some(attached),
        ..any()
    };
    assert_eq!(list(attached(true)).await, [here.id]);
    assert_eq!(list(attached(false)).await, sorted(&[&old, &never]));
    let before = DeviceQuery {
        seen_before_ms: Some(middle_ms),
        ..any()
    };
    assert_eq!(list(before.clone()).await, sorted(&[&old, &never]));
    let after = |ms| DeviceQuery {
        seen_after_ms: Some(ms),
        ..any()
    };
    assert_eq!(list(after(middle_ms)).await, [here.id]);
    assert_eq!(list(after(begin_ms)).await, sorted(&[&old, &here]));
    let both = DeviceQuery {
        user: Some("ben".to_owned()),
        ..before
    };
    assert!(list(both).await.is_empty());
}

// ---- Users -------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_user_is_its_devices_and_what_waits_for_them() {
    let house = House::open().await;
    let here = house.device("anna").await;
    let away = house.device("anna").await;
    house.device("ben").await;
    let _link = here.attach().await;
    send(&house, Target::Device(away.id)).await;
    send(&house, Target::Device(away.id)).await;
    let view = house.handle.user(APP, "anna", None, 10).await.unwrap();
    assert_eq!(view.devices.len(), 2);
    for device in view.devices {
        let expected = if device.device == away.id { 2 } else { 0 };
        assert_eq!(device.waiting, Some(expected));
        assert_eq!(device.attached.is_some(), device.device == here.id);
    }
    let nobody = house.handle.user(AppId(2), "anna", None, 10).await.unwrap();
    assert!(nobody.devices.is_empty());
}

#[tokio::test]
async fn an_erased_user_leaves_nothing_behind_and_takes_nobody_along() {
    let house = House::open().await;
    let mut ids = Vec::new();
    for _ in 0..100 {
        ids.push(house.device("anna").await.id);
    }
    let gone = house.device("anna").await;
    let stays = house.device("ben").await;
    let mut link = gone.attach().await;
    let id = send(&house, user("anna")).await;
    link.notification().await;
    assert_eq!(house.handle.erase_user(AppId(2), "anna").await.unwrap(), 0);
    assert_eq!(house.handle.erase_user(APP, "anna").await.unwrap(), 101);
    let word = link.next().await;
    assert!(matches!(word, Out::Close(Closing::Revoked)), "{word:?}");
    house.store.disk(|disk| {
        assert_eq!(disk.devices.keys().copied().collect::<Vec<_>>(), [stays.id]);
        assert_eq!(disk.summaries.len(), 1);
        assert!(disk.rows.is_empty() && disk.seen.is_empty());
    });
    assert!(is_revoked(state(&house, id).await));
    assert_eq!(
        house.handle.ping(ping(user("anna"))).await.unwrap().devices,
        0
    );
    assert_eq!(house.handle.erase_user(APP, "anna").await.unwrap(), 0);
}

#[tokio::test]
async fn an_erasure_that_broke_off_is_finished_by_the_next_one() {
    let house = House::open().await;
    for _ in 0..10 {
        house.device("anna").await;
    }
    send(&house, user("anna")).await;
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let erasing = tokio::spawn(async move { handle.erase_user(APP, "anna").await });
    until("frames", async || house.store.held() > 0).await;
    erasing.abort();
    // The process dies with these frames unwritten; then half of the devices are gone in some other way.
    let house = house.restart().await;
    house.store.disk(|disk| assert_eq!(disk.devices.len(), 10));
    let half: Vec<DeviceId> = house
        .store
        .disk(|disk| disk.devices.keys().copied().take(5).collect());
    for device in half {
        house.handle.revoke_device(APP, device).await.unwrap();
    }
    assert_eq!(house.handle.erase_user(APP, "anna").await.unwrap(), 5);
    house.store.disk(|disk| {
        assert!(disk.devices.is_empty() && disk.summaries.is_empty() && disk.rows.is_empty());
    });
}

#[tokio::test]
async fn a_device_without_a_mailbox_can_still_be_revoked_and_given_away() {
    let house = House::open().await;
    let lost = house.device("anna").await;
    let given = house.device("anna").await;
    // What an earlier version left behind that crashed between the two.
    house.store.disk(|disk| disk.summaries.clear());
    let changed = house
        .handle
        .change_device(APP, given.id, to("ben", Waiting::Revoke))
        .await;
    assert_eq!(changed.unwrap().unwrap().device.user, "ben");
    assert!(house.handle.revoke_device(APP, lost.id).await.unwrap());
    house.store.disk(|disk| assert_eq!(disk.devices.len(), 1));
}

#[tokio::test]
async fn a_full_disk_gives_no_device_away_and_holds_up_no_ping() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.device("ben").await;
    send(&house, user("anna")).await;
    house.store.set_mode(Mode::NoRoom);
    let changed = house
        .handle
        .change_device(APP, device.id, to("ben", Waiting::Revoke))
        .await;
    assert_eq!(changed.unwrap_err(), RuntimeError::NoRoom);
    // Nothing of it happened, and nobody waits for it.
    house.store.set_mode(Mode::Commit);
    for name in ["anna", "ben"] {
        // The shard hears within a second that there is room again.
        until("there is room", async || {
            match house.handle.ping(ping(user(name))).await {
                Ok(_) => true,
                Err(error) => {
                    assert_eq!(error, RuntimeError::NoRoom.into());
                    false
                }
            }
        })
        .await;
    }
    let looked = look(&house, device.id).await;
    assert_eq!((looked.user.as_str(), looked.waiting), ("anna", Some(2)));
    let changed = house
        .handle
        .change_device(APP, device.id, to("ben", Waiting::Revoke))
        .await;
    assert_eq!(changed.unwrap().unwrap().revoked, 2);
}

#[tokio::test]
async fn an_erasure_that_takes_long_says_so_and_goes_on() {
    let mut settings = settings();
    settings.limits.accept_wait = Duration::from_millis(100);
    let house = House::with(settings, Arc::default()).await;
    for _ in 0..3 {
        house.device("anna").await;
    }
    house.store.set_mode(Mode::Hold);
    for _ in 0..5 {
        assert_eq!(
            house.handle.erase_user(APP, "anna").await.unwrap_err(),
            RuntimeError::StoreBusy
        );
    }
    // However often it was asked for, it is done once.
    assert_eq!(house.store.held(), 1);
    house.store.set_mode(Mode::Commit);
    until("it is done", async || {
        house.store.disk(|disk| disk.devices.is_empty())
    })
    .await;
    assert_eq!(house.handle.erase_user(APP, "anna").await.unwrap(), 0);
}
