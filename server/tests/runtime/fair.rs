//! What one publisher may take from others: rates of devices, quotas of apps, room in memory.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{AppId, Rejection};
use bellwire_server::ports::{AppRecord, Scopes};
use bellwire_server::runtime::{
    Allowance, AppQuota, PingError, PingRequest, Principal, RuntimeError, RuntimeSettings, Target,
};

use crate::house::{House, ping, settings, until};
use crate::store::{FakeStore, Mode};

const OTHER: AppId = AppId(2);

fn two_apps() -> Arc<FakeStore> {
    let store = FakeStore::default();
    store.disk(|disk| {
        disk.apps.push(AppRecord {
            id: OTHER,
            name: "other".to_owned(),
            secret: [7; 32],
            created_ms: 1,
        });
    });
    Arc::new(store)
}

async fn principal(house: &House, app: AppId) -> Principal {
    let made = house.handle.create_key(app, "test", Scopes::PING).await;
    let secret = made.unwrap().secret;
    house.handle.authenticate_key(&secret).await.unwrap()
}

fn with(change: impl FnOnce(&mut RuntimeSettings)) -> RuntimeSettings {
    let mut settings = settings();
    change(&mut settings);
    settings
}

#[tokio::test]
async fn one_device_is_sent_no_more_than_its_rate_and_others_do_not_notice() {
    let settings = with(|settings| {
        settings.limits.device_pings_per_second = 1;
        settings.limits.device_ping_burst = 3;
    });
    let house = House::with(settings.clone(), Arc::default()).await;
    let (one, other) = (house.device("ana").await, house.device("ben").await);
    let to = |device| house.handle.ping(ping(Target::Device(device)));
    // The clock of a test runs on while it works, so a few more may get through on a machine that is very slow.
    let mut accepted = 0;
    let refused = loop {
        match to(one.id).await {
            Ok(_) => accepted += 1,
            Err(error) => break error,
        }
        assert!(accepted < 1_000);
    };
    assert_eq!(refused, PingError::DeviceTooFast);
    assert!(accepted >= 3);
    assert!(to(other.id).await.is_ok());
    // Whoever addresses several reaches the others.
    let both = house
        .handle
        .ping(ping(Target::Devices(vec![one.id, other.id])));
    let both = both.await.unwrap();
    assert_eq!(both.rejected, [(one.id, Rejection::TooFast)]);
    // Nothing of what was refused is kept.
    let kept = |device| {
        house
            .store
            .disk(|disk| disk.rows.keys().filter(|key| key.0 == device).count())
    };
    assert_eq!(kept(one.id), accepted);
    assert_eq!(kept(other.id), 2);
    house.clock.advance(Duration::from_secs(60));
    assert!(to(one.id).await.is_ok());
    // A limit that is taken away holds at once.
    house.handle.reload(&with(|settings| {
        settings.limits.device_pings_per_second = 0
    }));
    for _ in 0..50 {
        assert!(to(one.id).await.is_ok());
    }
}

#[tokio::test]
async fn an_app_sends_what_it_may_in_a_day_whichever_key_it_uses() {
    let quota = |pings_per_day| {
        with(|settings| {
            settings.quotas.default.pings_per_day = 2;
            settings.quotas.apps.insert(
                "default".to_owned(),
                AppQuota {
                    pings_per_day,
                    ..AppQuota::default()
                },
            );
        })
    };
    let house = House::with(quota(4), two_apps()).await;
    let first = principal(&house, AppId::DEFAULT).await;
    let second = principal(&house, AppId::DEFAULT).await;
    let other = principal(&house, OTHER).await;
    for who in [&first, &second, &first, &second] {
        house.handle.admit(who).unwrap();
    }
    let refused = house.handle.admit(&first).unwrap_err();
    assert_eq!(refused.by, Allowance::App);
    assert!(refused.wait > Duration::from_secs(5 * 3_600), "{refused:?}");
    assert_eq!(house.handle.admit(&second).unwrap_err().by, Allowance::App);
    // The other app has the quota of all that have none of their own.
    assert!(house.handle.admit(&other).is_ok() && house.handle.admit(&other).is_ok());
    assert_eq!(house.handle.admit(&other).unwrap_err().by, Allowance::App);
    let views = house.handle.allowances(&first);
    assert_eq!(views.len(), 2);
    assert_eq!(
        (
            views[1].by,
            views[1].quota,
            views[1].window_s,
            views[1].left
        ),
        (Allowance::App, 4, 86_400, 0)
    );
    house.clock.advance(Duration::from_secs(6 * 3_600));
    assert!(house.handle.admit(&first).is_ok());
    assert!(house.handle.admit(&second).is_err());
    house.handle.reload(&quota(0));
    assert!(house.handle.admit(&second).is_ok());
    assert_eq!(house.handle.allowances(&first).len(), 1);
}

#[tokio::test]
async fn bodies_of_one_app_never_take_the_whole_reserve_from_another() {
    let settings = with(|settings| settings.limits.memory_reserve = 40_000);
    let house = House::with(settings, two_apps()).await;
    let made = house
        .handle
        .create_device(AppId::DEFAULT, "ana", None)
        .await;
    let ana = made.unwrap().made.device;
    let made = house.handle.create_device(OTHER, "ben", None).await;
    let ben = made.unwrap().made.device;
    house.store.set_mode(Mode::Hold);
    let send = |app, device| {
        let handle = house.handle.clone();
        let mut request = ping(Target::Device(device));
        request.app = app;
        request.content.encoded = vec![0; 1_488].into();
        tokio::spawn(async move { handle.ping(request).await })
    };
    // Each takes 2,000 with what is reckoned for the rest.
    let flood: Vec<_> = (0..40).map(|_| send(AppId::DEFAULT, ana)).collect();
    until("the flood to be in", async || {
        house.handle.status().reserve_bytes == 30_000
    })
    .await;
    let other: Vec<_> = (0..5).map(|_| send(OTHER, ben)).collect();
    until("the rest to be taken", async || {
        house.handle.status().reserve_bytes == 40_000
    })
    .await;
    house.store.set_mode(Mode::Commit);
    for ping in other {
        assert!(ping.await.unwrap().is_ok());
    }
    let mut accepted = 0;
    for ping in flood {
        match ping.await.unwrap() {
            Ok(_) => accepted += 1,
            Err(error) => assert_eq!(error, PingError::Runtime(RuntimeError::MemoryReserve)),
        }
    }
    assert_eq!(accepted, 15);
    until("everything to come back", async || {
        house.handle.status().reserve_bytes == 0
    })
    .await;
}

/// One call of one app addresses a thousand devices, again and again; a single ping of another app is answered meanwhile.
#[tokio::test]
async fn fan_outs_of_one_app_leave_turns_to_another() {
    let house = House::with(with(|settings| settings.shards = 1), two_apps()).await;
    let mut devices = Vec::new();
    for number in 0..1_000 {
        devices.push(house.device(&format!("u{}", number / 10)).await.id);
    }
    let made = house.handle.create_device(OTHER, "ben", None).await;
    let ben = made.unwrap().made.device;
    let flood: Vec<_> = (0..40)
        .map(|_| {
            let handle = house.handle.clone();
            let request = ping(Target::Devices(devices.clone()));
            tokio::spawn(async move { handle.ping(request).await })
        })
        .collect();
    tokio::task::yield_now().await;
    let mut single = ping(Target::Device(ben));
    single.app = OTHER;
    let answer = house.handle.ping(single).await.unwrap();
    assert_eq!(answer.devices, 1);
    for ping in flood {
        let answer = ping.await.unwrap().unwrap();
        assert_eq!((answer.devices, answer.rejected.len()), (1_000, 0));
    }
    // In every mailbox the order is that of acceptance, and nothing was lost on the way through the lanes.
    let rows = house.store.disk(|disk| disk.rows.len());
    assert_eq!(rows, 40 * 1_000 + 1);
}

#[tokio::test]
async fn what_was_accepted_is_answered_again_by_its_key_however_fast_its_device_is_sent() {
    let settings = with(|settings| {
        settings.limits.device_pings_per_second = 1;
        settings.limits.device_ping_burst = 2;
    });
    let store = Arc::<FakeStore>::default();
    let house = House::with(settings, Arc::clone(&store)).await;
    let device = house.device("ana").await;
    let keyed = |key: &str| PingRequest {
        idempotency: Some((key.to_owned(), [1; 32])),
        ..ping(Target::Device(device.id))
    };
    // The caller goes away before the answer: nobody remembers the key.
    store.set_mode(Mode::Hold);
    let (handle, request) = (house.handle.clone(), keyed("waits"));
    let gone = tokio::spawn(async move { handle.ping(request).await });
    until("it is on its way", async || store.held() > 0).await;
    gone.abort();
    drop(gone.await);
    store.set_mode(Mode::Commit);
    let refused = loop {
        if let Err(error) = house.handle.ping(ping(Target::Device(device.id))).await {
            break error;
        }
    };
    assert_eq!(refused, PingError::DeviceTooFast);
    let rows = || store.disk(|disk| disk.rows.len());
    let before = rows();
    house.handle.ping(keyed("waits")).await.unwrap();
    assert_eq!(rows(), before);
    // A new one is still one too many.
    let refused = house.handle.ping(keyed("new")).await.unwrap_err();
    assert_eq!(refused, PingError::DeviceTooFast);
    assert_eq!(rows(), before);
}
