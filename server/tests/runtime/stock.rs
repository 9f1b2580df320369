//! What apps hold is counted exactly, whatever happens to it, and their quotas hold for it.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{
    AppId, CollapseKey, DeviceId, Held, OverflowRule, Quota, Rejection, Summary,
};
use bellwire_server::ports::{DeviceRecord, Scopes};
use bellwire_server::runtime::{
    AppUse, DeviceChange, PingError, PingRequest, RuntimeError, RuntimeSettings, Target, Waiting,
};

use crate::house::{APP, House, ping, settings, until};
use crate::store::{FakeStore, Mode};

fn limited(held: Held) -> RuntimeSettings {
    let mut settings = settings();
    settings.quotas.default.held = held;
    settings
}

fn notifications(most: u64) -> Held {
    Held {
        notifications: most,
        ..Held::default()
    }
}

fn own(house: &House) -> AppUse {
    let status = house.handle.status();
    status.apps.into_iter().next().unwrap()
}

/// What is on disk, added up row by row.
fn stored(house: &House) -> Held {
    house.store.disk(|disk| Held {
        notifications: disk.rows.len() as u64,
        bytes: disk
            .rows
            .values()
            .map(|(meta, _)| u64::from(meta.size))
            .sum(),
        devices: disk.summaries.len() as u64,
    })
}

/// Waits until the count is that of the disk, which has so many rows.
async fn counts(house: &House, rows: u64) {
    until("the count of what is on disk", async || {
        let stored = stored(house);
        house.handle.status().counted && stored.notifications == rows && own(house).held == stored
    })
    .await;
}

fn over(quota: Quota, limit: u64, used: u64) -> PingError {
    PingError::Runtime(RuntimeError::QuotaExceeded { quota, limit, used })
}

async fn send(house: &House, target: Target) -> Result<(), PingError> {
    house.handle.ping(ping(target)).await.map(drop)
}

#[tokio::test]
async fn whatever_ends_a_notification_the_count_is_that_of_the_disk() {
    let mut settings = settings();
    settings.policy.mailbox_notifications = 3;
    settings.policy.overflow = OverflowRule::Evict;
    let house = House::with(settings, Arc::default()).await;
    counts(&house, 0).await;
    let (ana, ben) = (house.device("ana").await, house.device("ben").await);
    let to_ana = || Target::Device(ana.id);
    // Stored, and evicted by what comes after.
    for _ in 0..5 {
        send(&house, to_ana()).await.unwrap();
    }
    counts(&house, 3).await;
    // Acknowledged.
    let mut link = ana.attach().await;
    let mut last = 0;
    for _ in 0..3 {
        last = link.notification().await.1;
    }
    link.acknowledge(last);
    counts(&house, 0).await;
    // Stored with a session that does not answer, and left behind by it.
    send(&house, to_ana()).await.unwrap();
    counts(&house, 1).await;
    link.leave();
    // Replaced.
    let replacing = || PingRequest {
        collapse: CollapseKey::new("state"),
        ..ping(Target::Device(ben.id))
    };
    for _ in 0..3 {
        house.handle.ping(replacing()).await.unwrap();
    }
    counts(&house, 2).await;
    // Revoked, with its ping and by the change of hands.
    let both = ping(Target::Devices(vec![ana.id, ben.id]));
    let both = house.handle.ping(both).await.unwrap().id;
    counts(&house, 4).await;
    house.handle.revoke_ping(APP, both).await.unwrap();
    counts(&house, 2).await;
    let change = DeviceChange {
        user: Some("carl".to_owned()),
        waiting: Waiting::Revoke,
        ..DeviceChange::default()
    };
    let changed = house.handle.change_device(APP, ben.id, change).await;
    assert_eq!(changed.unwrap().unwrap().revoked, 1);
    counts(&house, 1).await;
    // Everyone, then expired by the sweep.
    send(&house, Target::Everyone).await.unwrap();
    counts(&house, 3).await;
    house.clock.advance(Duration::from_secs(31 * 86_400));
    counts(&house, 0).await;
    // A frame that finds no room changes nothing, and what is tried again counts once.
    house.store.set_mode(Mode::NoRoom);
    assert!(send(&house, to_ana()).await.is_err());
    house.store.set_mode(Mode::Commit);
    counts(&house, 0).await;
    until("room again", async || send(&house, to_ana()).await.is_ok()).await;
    counts(&house, 1).await;
    // With the device, and with the user.
    assert!(house.handle.revoke_device(APP, ana.id).await.unwrap());
    counts(&house, 0).await;
    send(&house, Target::Device(ben.id)).await.unwrap();
    counts(&house, 1).await;
    assert_eq!(house.handle.erase_user(APP, "carl").await.unwrap(), 1);
    counts(&house, 0).await;
    assert_eq!(own(&house).held, Held::default());
}

#[tokio::test]
async fn what_waited_before_a_restart_is_counted_although_some_of_it_moves_meanwhile() {
    // More than one page of the walk, of a house that went down long ago.
    let store = FakeStore::default();
    store.disk(|disk| {
        for number in 0_u32..2_500 {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&number.reverse_bits().to_be_bytes());
            id[8..12].copy_from_slice(&number.to_be_bytes());
            let id = DeviceId(id);
            disk.summaries.insert(id, Summary::new(APP));
            disk.devices.insert(
                id,
                DeviceRecord {
                    id,
                    app: APP,
                    user: format!("user {number}"),
                    name: None,
                    created_ms: 1,
                    secret_hash: [0; 32],
                    previous_secrets: Vec::new(),
                },
            );
        }
    });
    let house = House::with(settings(), Arc::new(store)).await;
    counts(&house, 0).await;
    assert_eq!(own(&house).held.devices, 2_500);
    let devices: Vec<DeviceId> = house
        .store
        .disk(|disk| disk.devices.keys().copied().collect());
    for some in devices.chunks(800) {
        send(&house, Target::Devices(some.to_vec())).await.unwrap();
    }
    counts(&house, 2_500).await;

    let house = house.restart().await;
    // At once, while the walk is on its way: more arrives, some of it goes, devices come and go.
    let made = house.device("new").await;
    send(&house, Target::Device(made.id)).await.unwrap();
    for device in devices.iter().step_by(100) {
        send(&house, Target::Device(*device)).await.unwrap();
    }
    for device in devices.iter().skip(1).step_by(100) {
        assert!(house.handle.revoke_device(APP, *device).await.unwrap());
    }
    counts(&house, 2_501).await;
    assert_eq!(own(&house).held.devices, 2_501 - 25);
}

#[tokio::test]
async fn an_app_at_its_quota_takes_what_takes_no_room() {
    let house = House::with(limited(notifications(2)), Arc::default()).await;
    let (ana, ben) = (house.device("ana").await, house.device("ben").await);
    let keyed = |key: &str, device: DeviceId| PingRequest {
        idempotency: Some((key.to_owned(), [1; 32])),
        ..ping(Target::Device(device))
    };
    let first = house.handle.ping(keyed("a", ana.id)).await.unwrap();
    let state = PingRequest {
        collapse: CollapseKey::new("state"),
        ..ping(Target::Device(ben.id))
    };
    house.handle.ping(state.clone()).await.unwrap();
    counts(&house, 2).await;
    let refused = send(&house, Target::Device(ben.id)).await.unwrap_err();
    assert_eq!(refused, over(Quota::Notifications, 2, 2));
    let several = send(&house, Target::Devices(vec![ana.id, ben.id])).await;
    assert_eq!(several.unwrap_err(), over(Quota::Notifications, 2, 2));
    // One that was accepted is answered as it was, by whoever remembers the key.
    let again = house.handle.ping(keyed("a", ana.id)).await.unwrap();
    assert_eq!(again.id, first.id);
    // What takes another's place, what is never stored, and what is sent at once.
    house.handle.ping(state).await.unwrap();
    let now_or_never = PingRequest {
        ttl_s: Some(0),
        ..ping(Target::Device(ana.id))
    };
    house.handle.ping(now_or_never).await.unwrap();
    let carl = house.device("carl").await;
    let mut link = carl.attach().await;
    let to_carl = house.handle.clone();
    let sent = tokio::spawn(async move { to_carl.ping(ping(Target::Device(carl.id))).await });
    let (_, seq, _) = link.notification().await;
    link.acknowledge(seq);
    sent.await.unwrap().unwrap();
    counts(&house, 2).await;
    // Of several, those for whom there is room.
    house.handle.revoke_ping(APP, first.id).await.unwrap();
    counts(&house, 1).await;
    let made = [
        house.device("d").await.id,
        house.device("e").await.id,
        house.device("f").await.id,
    ];
    let several = ping(Target::Devices(made.to_vec()));
    let several = house.handle.ping(several).await.unwrap();
    // Two shards may each take the last place at the same moment.
    assert!(!several.rejected.is_empty());
    for (_, why) in several.rejected {
        assert_eq!(why, Rejection::Quota(Quota::Notifications));
    }
    // A reload holds at once.
    house.handle.reload(&limited(notifications(100)));
    send(&house, Target::Device(ana.id)).await.unwrap();
    house.handle.reload(&limited(Held {
        bytes: 1,
        ..Held::default()
    }));
    let refused = send(&house, Target::Device(ana.id)).await.unwrap_err();
    let PingError::Runtime(RuntimeError::QuotaExceeded { quota, limit, .. }) = refused else {
        panic!("{refused}");
    };
    assert_eq!((quota, limit), (Quota::Bytes, 1));
}

#[tokio::test]
async fn an_audience_beyond_the_quota_is_refused_device_by_device() {
    let house = House::with(limited(notifications(3)), Arc::default()).await;
    for number in 0..10 {
        house.device(&format!("user {number}")).await;
    }
    let all = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    until("the audience to be reached", async || {
        let view = house.handle.ping_view(APP, all.id, None, 100).await;
        view.unwrap().unwrap().devices.len() == 10
    })
    .await;
    let rows = stored(&house).notifications;
    // One more for each shard but one.
    assert!((3..=4).contains(&rows), "{rows}");
    counts(&house, rows).await;
}

#[tokio::test]
async fn devices_have_a_quota_and_a_failed_registration_costs_nothing() {
    let devices = |most| {
        limited(Held {
            devices: most,
            ..Held::default()
        })
    };
    let house = House::with(devices(2), Arc::default()).await;
    house.store.set_mode(Mode::NoRoom);
    for _ in 0..3 {
        let failed = house.handle.create_device(APP, "ana", None).await;
        assert_eq!(failed.err(), Some(RuntimeError::NoRoom));
    }
    house.store.set_mode(Mode::Commit);
    let ana = house.device("ana").await;
    house.device("ana").await;
    let refused = house.handle.create_device(APP, "ana", None).await;
    let wanted = RuntimeError::QuotaExceeded {
        quota: Quota::Devices,
        limit: 2,
        used: 2,
    };
    assert_eq!(refused.err(), Some(wanted));
    // Another app is not concerned, and neither are keys.
    let key = house.handle.create_key(APP, "k", Scopes::PING).await;
    assert!(key.is_ok());
    assert!(house.handle.revoke_device(APP, ana.id).await.unwrap());
    house.device("ana").await;
    house.handle.reload(&devices(3));
    house.device("ana").await;
    assert_eq!(own(&house).held.devices, 3);
    assert_eq!(own(&house).quota.held.devices, 3);
    assert_eq!(AppId::DEFAULT, APP);
}
