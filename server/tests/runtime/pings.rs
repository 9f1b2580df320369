//! Acceptance: who is promised what, and who is told why not.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{DeviceId, OverflowRule, Rejection};
use bellwire_server::ports::Store;
use bellwire_server::runtime::{PingError, RuntimeError, Target};

use crate::house::{APP, House, ping, settings, until};
use crate::store::{FakeStore, Mode};

#[tokio::test]
async fn a_ping_for_an_absent_device_is_answered_when_it_is_safe() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let request = ping(Target::Device(device.id));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    until("the batch", async || house.store.held() == 1).await;
    assert!(!asked.is_finished());
    house.store.set_mode(Mode::Commit);
    let answer = asked.await.unwrap().unwrap();
    assert_eq!((answer.devices, answer.ttl_s), (1, 7 * 86_400));
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn a_ping_for_an_attached_device_reads_no_directory() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let before = house.store.device_reads();
    let answer = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap();
    assert_eq!(link.notification().await, (answer.id, 1, false));
    link.acknowledge(1);
    house.ended(answer.id).await;
    assert_eq!(house.store.device_reads(), before);
}

#[tokio::test]
async fn what_waits_is_delivered_in_order_after_a_restart() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        let answer = house.handle.ping(ping(Target::Device(device.id))).await;
        ids.push(answer.unwrap().id);
    }
    let house = house.restart().await;
    let mut link = device.at(&house).attach().await;
    for (place, id) in ids.into_iter().enumerate() {
        let (ping, seq, redelivered) = link.notification().await;
        assert_eq!((ping, seq, redelivered), (id, place as u64 + 1, true));
    }
}

#[tokio::test]
async fn an_unknown_device_is_an_error_alone_and_a_rejection_among_others() {
    let house = House::open().await;
    let known = house.device("anna").await;
    let unknown = DeviceId([3; 16]);
    let alone = house.handle.ping(ping(Target::Device(unknown))).await;
    assert_eq!(alone.unwrap_err(), PingError::UnknownDevice);
    let both = Target::Devices(vec![unknown, known.id]);
    let answer = house.handle.ping(ping(both)).await.unwrap();
    assert_eq!(answer.devices, 2);
    assert_eq!(answer.rejected, [(unknown, Rejection::UnknownDevice)]);
}

#[tokio::test]
async fn users_are_pinged_on_every_device_once() {
    let house = House::open().await;
    let mut devices = Vec::new();
    for user in ["anna", "anna", "ben"] {
        devices.push(house.device(user).await);
    }
    let users = ["anna", "nobody", "ben", "anna"]
        .map(str::to_owned)
        .to_vec();
    let answer = house
        .handle
        .ping(ping(Target::Users(users.clone())))
        .await
        .unwrap();
    assert_eq!((answer.devices, answer.rejected.len()), (3, 0));
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 3);

    // Asked again, nothing is read; a new device is known at once.
    let reads = house.store.user_reads();
    house
        .handle
        .ping(ping(Target::Users(users.clone())))
        .await
        .unwrap();
    assert_eq!(house.store.user_reads(), reads);
    house.device("ben").await;
    let answer = house.handle.ping(ping(Target::Users(users))).await.unwrap();
    assert_eq!(answer.devices, 4);
}

#[tokio::test]
async fn a_user_without_devices_is_accepted_and_the_ping_is_known() {
    let house = House::open().await;
    let nobody = Target::Users(vec!["nobody".to_owned()]);
    let answer = house.handle.ping(ping(nobody)).await.unwrap();
    assert_eq!(answer.devices, 0);
    let view = house
        .handle
        .ping_view(APP, answer.id, None, 10)
        .await
        .unwrap();
    assert!(view.unwrap().devices.is_empty());
}

#[tokio::test]
async fn the_ttl_is_lowered_to_its_ceiling_and_zero_means_now_or_never() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut long = ping(Target::Device(device.id));
    long.ttl_s = Some(u64::MAX);
    assert_eq!(house.handle.ping(long).await.unwrap().ttl_s, 30 * 86_400);

    let mut zero = ping(Target::Device(device.id));
    zero.ttl_s = Some(0);
    let answer = house.handle.ping(zero.clone()).await.unwrap();
    assert_eq!(answer.ttl_s, 0);
    house.ended(answer.id).await;
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);

    let mut link = device.attach().await;
    link.notification().await;
    let answer = house.handle.ping(zero).await.unwrap();
    assert_eq!(link.notification().await.0, answer.id);
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
}

#[tokio::test]
async fn too_much_content_and_too_many_devices_are_refused() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut large = ping(Target::Device(device.id));
    large.content.size = 4_097;
    assert_eq!(
        house.handle.ping(large).await.unwrap_err(),
        PingError::ContentTooLarge {
            size: 4_097,
            limit: 4_096
        }
    );
    let many = (0..100_001_u32)
        .map(|n| {
            let mut id = [0; 16];
            id[..4].copy_from_slice(&n.to_be_bytes());
            DeviceId(id)
        })
        .collect();
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Devices(many)))
            .await
            .unwrap_err(),
        PingError::TooManyDevices { limit: 100_000 }
    );
    let same = vec![device.id; 5_000];
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Devices(same)))
            .await
            .unwrap()
            .devices,
        1
    );
}

#[tokio::test]
async fn a_full_mailbox_that_refuses_is_an_error_alone_and_a_rejection_among_others() {
    let mut settings = settings();
    settings.policy.overflow = OverflowRule::Refuse;
    settings.policy.mailbox_notifications = 1;
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let full = house.device("anna").await;
    let empty = house.device("ben").await;
    house
        .handle
        .ping(ping(Target::Device(full.id)))
        .await
        .unwrap();
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(full.id)))
            .await
            .unwrap_err(),
        PingError::MailboxFull
    );
    let both = Target::Devices(vec![full.id, empty.id]);
    let answer = house.handle.ping(ping(both)).await.unwrap();
    assert_eq!(answer.rejected, [(full.id, Rejection::MailboxFull)]);
}

#[tokio::test]
async fn a_failed_store_promises_nothing_until_a_restart() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let other = house.device("ben").await;
    house.store.set_mode(Mode::Fail);
    let target = Target::Devices(vec![device.id, other.id]);
    assert_eq!(
        house.handle.ping(ping(target)).await.unwrap_err(),
        PingError::Runtime(RuntimeError::StoreUnavailable)
    );
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(device.id)))
            .await
            .unwrap_err(),
        PingError::Runtime(RuntimeError::StoreUnavailable)
    );
    assert!(house.handle.ready().is_err());
    house.store.set_mode(Mode::Commit);
    let house = house.restart().await;
    house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap();
    assert!(house.handle.ready().is_ok());
}

#[tokio::test]
async fn a_full_disk_refuses_absent_devices_and_serves_attached_ones() {
    // One shard, so that it knows of the full disk when the attached device has its turn.
    let mut settings = settings();
    settings.shards = 1;
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let absent = house.device("anna").await;
    let attached = house.device("ben").await;
    let mut link = attached.attach().await;
    house.store.set_mode(Mode::NoRoom);
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(absent.id)))
            .await
            .unwrap_err(),
        PingError::Runtime(RuntimeError::NoRoom)
    );
    let handle = house.handle.clone();
    let request = ping(Target::Device(attached.id));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    link.notification().await;
    link.acknowledge(1);
    assert_eq!(asked.await.unwrap().unwrap().devices, 1);
    house.store.set_mode(Mode::Commit);
    until("room", async || {
        house
            .handle
            .ping(ping(Target::Device(absent.id)))
            .await
            .is_ok()
    })
    .await;
}

#[tokio::test]
async fn a_store_that_does_not_answer_in_time_is_busy_and_nothing_leaks() {
    let mut settings = settings();
    settings.limits.accept_wait = Duration::from_millis(1);
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let one = house.device("anna").await;
    let two = house.device("ben").await;
    house.store.set_mode(Mode::Hold);
    let (alone, both) = tokio::join!(
        house.handle.ping(ping(Target::Device(one.id))),
        house
            .handle
            .ping(ping(Target::Devices(vec![one.id, two.id]))),
    );
    let busy = PingError::Runtime(RuntimeError::StoreBusy);
    assert_eq!(
        (alone.unwrap_err(), both.unwrap_err()),
        (busy.clone(), busy)
    );
    house.store.set_mode(Mode::Commit);
    until("the reserve", async || {
        house.handle.status().reserve_bytes == 0
    })
    .await;
    until("sleep", async || house.handle.status().awake == 0).await;
}

#[tokio::test]
async fn callers_who_go_away_leave_nothing_behind() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let other = house.device("ben").await;
    house.store.set_mode(Mode::Hold);
    for target in [
        Target::Device(device.id),
        Target::Devices(vec![device.id, other.id]),
    ] {
        let handle = house.handle.clone();
        let asked = tokio::spawn(async move { handle.ping(ping(target)).await });
        until("the reserve", async || {
            house.handle.status().reserve_bytes > 0
        })
        .await;
        until("a batch", async || house.store.held() > 0).await;
        asked.abort();
        assert!(asked.await.unwrap_err().is_cancelled());
        house.store.set_mode(Mode::Commit);
        until("the reserve", async || {
            house.handle.status().reserve_bytes == 0
        })
        .await;
        until("sleep", async || house.handle.status().awake == 0).await;
        house.store.set_mode(Mode::Hold);
    }
}

#[tokio::test]
async fn bodies_in_flight_are_bounded_by_the_memory_reserve() {
    let mut settings = settings();
    settings.limits.memory_reserve = 600;
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let handle = house.handle.clone();
    let first = ping(Target::Device(device.id));
    let asked = tokio::spawn(async move { handle.ping(first).await });
    until("a batch", async || house.store.held() > 0).await;
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(device.id)))
            .await
            .unwrap_err(),
        PingError::Runtime(RuntimeError::MemoryReserve)
    );
    house.store.set_mode(Mode::Commit);
    asked.await.unwrap().unwrap();
    // What is stored for an absent device is not in memory any more.
    until("the reserve", async || {
        house.handle.status().reserve_bytes == 0
    })
    .await;
    house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap();
}

#[tokio::test]
async fn another_apps_pings_reach_nobody_here() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut foreign = ping(Target::Device(device.id));
    foreign.app = bellwire_server::delivery::AppId(7);
    assert_eq!(
        house.handle.ping(foreign).await.unwrap_err(),
        PingError::UnknownDevice
    );
}

#[tokio::test]
async fn the_status_tells_the_run_and_who_is_connected() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let link = device.attach().await;
    let status = house.handle.status();
    assert_eq!(status.run, house.store.stats().run);
    assert_eq!((status.connected_websocket, status.connected()), (1, 1));
    assert_eq!(status.awake, 1);
    link.leave();
    until("absence", async || house.handle.status().connected() == 0).await;
    until("sleep", async || house.handle.status().awake == 0).await;
}
