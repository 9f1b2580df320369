//! Pings to audiences while the disk stands still or is full, and many at once: nobody gets one twice, and nobody waits for
//! what is not theirs.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{AppId, PingId};
use bellwire_server::ports::AppRecord;
use bellwire_server::runtime::{PingRequest, RuntimeError, RuntimeSettings, Target};

use crate::house::{APP, Device, House, Link, ping, settings, until};
use crate::store::{FakeStore, Mode};

/// Rows wait for acknowledgements, the ledger forgets at once, and patience is short.
fn forgetful(page: usize) -> RuntimeSettings {
    let mut settings = RuntimeSettings {
        expansion_page: page,
        ledger_entries: 1,
        ledger_bytes: 1,
        ..settings()
    };
    settings.policy.defer_max = Duration::from_secs(1);
    settings.limits.accept_wait = Duration::from_millis(200);
    settings
}

/// A store with so many apps besides the first.
fn apps(count: u32) -> (Arc<FakeStore>, Vec<AppId>) {
    let apps: Vec<AppId> = (2..2 + count).map(AppId).collect();
    let store = FakeStore::default();
    store.disk(|disk| {
        for app in &apps {
            disk.apps.push(AppRecord {
                id: *app,
                name: format!("app-{}", app.0),
                secret: [7; 32],
                created_ms: 1,
            });
        }
    });
    (Arc::new(store), apps)
}

async fn device(house: &House, app: AppId) -> Device {
    let made = house.handle.create_device(app, "anna", None).await.unwrap();
    Device {
        handle: house.handle.clone(),
        id: made.made.device,
        secret: made.secret,
    }
}

fn everyone(app: AppId) -> PingRequest {
    PingRequest {
        app,
        ..ping(Target::Everyone)
    }
}

async fn brought(house: &House, ping: PingId) {
    until("the audience to be reached", async || {
        let view = house.handle.ping_view(APP, ping, None, 1_000).await;
        view.unwrap().is_none_or(|view| view.expansion.is_none())
    })
    .await;
}

/// Attached devices that have the notification of a ping to everyone; nothing of it is on the disk.
async fn rung(house: &House, count: usize) -> (PingId, Vec<(Link, u64)>) {
    let mut links = Vec::new();
    for _ in 0..count {
        links.push(house.device("anna").await.attach().await);
    }
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    // What ended is written to the history later.
    house.store.disk(|disk| disk.history_late = true);
    house.store.set_mode(Mode::Hold);
    house.store.set_crowded(false);
    let mut rung = Vec::new();
    for mut link in links {
        let (ping, seq, again) = link.notification().await;
        assert_eq!((ping, again), (answer.id, false));
        rung.push((link, seq));
    }
    (answer.id, rung)
}

#[tokio::test]
async fn a_store_that_stands_still_has_nobody_asked_twice_who_acknowledged() {
    let house = House::with(forgetful(10), Arc::default()).await;
    let (ping, mut links) = rung(&house, 6).await;
    let (mut mute, mute_seq) = links.pop().unwrap();
    for (link, seq) in &links {
        link.acknowledge(*seq);
    }
    until("the last one's row to be let go", async || {
        house.store.held() > 0
    })
    .await;
    house.clock.advance(Duration::from_secs(60));
    // Longer than whoever loses patience waits before it tries again.
    tokio::time::sleep(Duration::from_secs(1)).await;
    house.store.set_mode(Mode::Commit);
    brought(&house, ping).await;
    mute.acknowledge(mute_seq);
    until("all outcomes", async || house.store.ended(ping).len() >= 6).await;
    let mut ended = house.store.ended(ping);
    ended.sort_unstable();
    let mut devices: Vec<_> = links.iter().map(|(link, _)| link.device).collect();
    devices.push(mute.device);
    devices.sort_unstable();
    assert_eq!(ended, devices);
    assert!(links.iter_mut().all(|(link, _)| link.silent()));
    assert!(mute.silent());
}

#[tokio::test]
async fn who_acknowledged_is_not_asked_again_after_a_revocation_that_found_no_room() {
    let house = House::with(forgetful(2), Arc::default()).await;
    let (ping, mut links) = rung(&house, 6).await;
    house.store.set_mode(Mode::NoRoom);
    for (link, seq) in &links {
        link.acknowledge(*seq);
    }
    until("all outcomes", async || house.store.ended(ping).len() == 6).await;
    // It is not noted, and cannot be taken back either.
    let refused = house.handle.revoke_ping(APP, ping).await;
    assert_eq!(refused.unwrap_err(), RuntimeError::NoRoom);
    house.store.set_mode(Mode::Commit);
    brought(&house, ping).await;
    assert_eq!(house.store.ended(ping).len(), 6);
    assert!(links.iter_mut().all(|(link, _)| link.silent()));
}

#[tokio::test]
async fn many_apps_have_no_more_than_two_pages_on_their_way_to_a_slow_disk() {
    let (store, apps) = apps(20);
    let house = House::with(forgetful(2), store).await;
    house.store.set_crowded(true);
    for app in &apps {
        for _ in 0..4 {
            device(&house, *app).await;
        }
        house.handle.ping(everyone(*app)).await.unwrap();
    }
    let before = house.store.member_reads();
    house.store.set_mode(Mode::Hold);
    house.store.set_crowded(false);
    until("two pages", async || {
        house.store.member_reads() == before + 2 && house.store.held() > 0
    })
    .await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(house.store.member_reads(), before + 2);
    house.store.set_mode(Mode::Commit);
    until("all rows", async || {
        house.store.disk(|disk| disk.rows.len()) == 4 * apps.len()
    })
    .await;
}

#[tokio::test]
async fn a_full_disk_and_no_place_left_hold_up_neither_a_fleeting_ping_nor_a_revocation_nor_a_drain()
 {
    let (store, apps) = apps(6);
    let house = House::with(forgetful(1), store).await;
    let (calm, busy) = apps.split_first().unwrap();
    let mut bell = device(&house, *calm).await.attach().await;
    let mut links = Vec::new();
    for app in busy {
        for _ in 0..40 {
            links.push(device(&house, *app).await.attach().await);
        }
    }
    house.store.set_crowded(true);
    let mut pings = Vec::new();
    for app in busy {
        pings.push((*app, house.handle.ping(everyone(*app)).await.unwrap().id));
    }
    house.store.set_mode(Mode::Hold);
    house.store.set_crowded(false);
    // Of 160 that would be a page of their own within what one ping may have ahead, as many as there are places for.
    until("all places to be taken", async || {
        links
            .iter_mut()
            .map(Link::silent)
            .filter(|silent| !silent)
            .count()
            == 128
    })
    .await;
    house.store.set_mode(Mode::NoRoom);
    let mut fleeting = everyone(*calm);
    fleeting.ttl_s = Some(0);
    let fleeting = house.handle.ping(fleeting).await.unwrap();
    assert_eq!(bell.notification().await.0, fleeting.id);
    for (app, ping) in pings {
        let answer =
            tokio::time::timeout(Duration::from_secs(15), house.handle.revoke_ping(app, ping));
        // Taking it back is not safe while there is no room, and is tried to its end either way.
        let refused = answer.await.unwrap().unwrap_err();
        assert!(matches!(
            refused,
            RuntimeError::NoRoom | RuntimeError::StoreBusy
        ));
    }
    let drained = house.handle.drain(Duration::ZERO);
    tokio::time::timeout(Duration::from_secs(20), drained)
        .await
        .unwrap();
}
