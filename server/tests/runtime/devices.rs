//! Registering, recognising and revoking devices and keys.

use std::time::Duration;

use bellwire_server::delivery::{AppId, Closing, DeviceId, Outcome};
use bellwire_server::ports::{PairState, Scopes};
use bellwire_server::runtime::{
    DeviceQuery, Identity, Out, PingError, RuntimeError, Target, WhoError,
};

use crate::house::{APP, House, ping, until};
use crate::store::Mode;

fn of(user: &str) -> DeviceQuery {
    DeviceQuery {
        user: Some(user.to_owned()),
        ..DeviceQuery::default()
    }
}

#[tokio::test]
async fn a_device_is_known_by_its_secret_and_by_nothing_else() {
    let house = House::open().await;
    let device = house.device("anna").await;
    assert!(device.secret.starts_with("bds_") && device.secret.len() == 56);
    let other = house.device("anna").await;
    for (id, secret) in [
        (device.id, other.secret.as_str()),
        (device.id, ""),
        (device.id, &device.secret[..55]),
        (DeviceId([1; 16]), &device.secret),
    ] {
        let who = house
            .handle
            .authenticate(id, Identity::Secret(secret))
            .await;
        assert_eq!(who.unwrap_err(), WhoError::Unauthorized);
    }
    let who = house
        .handle
        .authenticate(device.id, Identity::Secret(&device.secret))
        .await;
    assert_eq!(who.unwrap().device(), device.id);
    let hashed = house
        .store
        .disk(|disk| disk.devices[&device.id].secret_hash);
    assert_ne!(&hashed[..], device.secret.as_bytes());
}

#[tokio::test]
async fn users_and_names_are_checked() {
    let house = House::open().await;
    let long = "x".repeat(256);
    for (user, name) in [
        ("", None),
        (long.as_str(), None),
        ("line\nbreak", None),
        ("anna", Some(long.as_str())),
    ] {
        let made = house.handle.create_device(APP, user, name).await;
        assert!(matches!(made, Err(RuntimeError::Invalid(_))), "{user:?}");
    }
    let longest = "x".repeat(255);
    house
        .handle
        .create_device(APP, &longest, Some(&longest))
        .await
        .unwrap();
}

#[tokio::test]
async fn lists_show_how_a_device_is_attached() {
    let house = House::open().await;
    let mut ids = Vec::new();
    for user in ["anna", "anna", "ben"] {
        ids.push(house.device(user).await.id);
    }
    let anna = house
        .handle
        .devices(APP, &of("anna"), None, 10)
        .await
        .unwrap();
    assert_eq!(anna.items.len(), 2);
    let all = DeviceQuery::default();
    let page = house.handle.devices(APP, &all, None, 2).await.unwrap();
    let rest = house.handle.devices(APP, &all, page.next, 2).await.unwrap();
    assert_eq!(
        (page.items.len(), rest.items.len(), rest.next),
        (2, 1, None)
    );

    let device = house.device("cleo").await;
    let view = house.handle.device(APP, device.id).await.unwrap().unwrap();
    assert_eq!(view.attached, None);
    let link = device.attach().await;
    let view = house.handle.device(APP, device.id).await.unwrap().unwrap();
    assert_eq!(view.attached.unwrap().0, "websocket");
    link.leave();
    until("absence", async || {
        let view = house.handle.device(APP, device.id).await.unwrap().unwrap();
        view.attached.is_none()
    })
    .await;
    assert!(
        house
            .handle
            .device(AppId(2), device.id)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn a_second_session_replaces_the_first_and_is_the_one_that_counts() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut first = device.attach().await;
    let mut second = device.connect(2).await;
    assert!(matches!(second.next().await, Out::Welcome { .. }));
    let word = first.next().await;
    assert!(matches!(word, Out::Close(Closing::Replaced)), "{word:?}");
    assert_eq!(house.handle.status().connected(), 1);
    first.leave();
    let id = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    assert_eq!(second.notification().await.0, id);
    assert_eq!(house.handle.status().connected(), 1);
    assert!(first.silent());
}

#[tokio::test]
async fn a_revoked_device_is_cut_emptied_and_forgotten() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let waiting = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    let mut link = device.attach().await;
    link.notification().await;
    assert!(
        !house
            .handle
            .revoke_device(AppId(2), device.id)
            .await
            .unwrap()
    );
    assert!(house.handle.revoke_device(APP, device.id).await.unwrap());
    let word = link.next().await;
    assert!(matches!(word, Out::Close(Closing::Revoked)), "{word:?}");
    let view = house
        .handle
        .ping_view(APP, waiting, None, 10)
        .await
        .unwrap()
        .unwrap();
    assert!(matches!(
        view.devices[0].state,
        PairState::Ended {
            outcome: Outcome::Revoked,
            ..
        }
    ));
    assert_eq!(
        house
            .handle
            .ping(ping(Target::Device(device.id)))
            .await
            .unwrap_err(),
        PingError::UnknownDevice
    );
    let anna = Target::Users(vec!["anna".to_owned()]);
    assert_eq!(house.handle.ping(ping(anna)).await.unwrap().devices, 0);
    let who = house
        .handle
        .authenticate(device.id, Identity::Secret(&device.secret))
        .await;
    assert_eq!(who.unwrap_err(), WhoError::Unauthorized);
    assert!(!house.handle.revoke_device(APP, device.id).await.unwrap());
    house.store.disk(|disk| {
        assert!(disk.devices.is_empty() && disk.summaries.is_empty() && disk.rows.is_empty());
    });
}

#[tokio::test]
async fn revoking_goes_on_when_the_caller_goes_away() {
    let house = House::open().await;
    let device = house.device("anna").await;
    house.store.set_mode(Mode::Hold);
    let revoke = house.handle.revoke_device(APP, device.id);
    assert!(
        tokio::time::timeout(Duration::from_millis(100), revoke)
            .await
            .is_err()
    );
    house.store.set_mode(Mode::Commit);
    until("the record to go", async || {
        house.store.disk(|disk| disk.devices.is_empty())
    })
    .await;
}

#[tokio::test]
async fn keys_open_doors_until_they_are_revoked() {
    let house = House::open().await;
    let boot = house.handle.ensure_bootstrap_key().await.unwrap().unwrap();
    assert!(boot.starts_with("bw_"));
    assert_eq!(house.handle.ensure_bootstrap_key().await.unwrap(), None);
    assert!(
        house
            .handle
            .authenticate_key(&boot)
            .await
            .unwrap()
            .may(Scopes::ALL)
    );

    let made = house
        .handle
        .create_key(APP, "backend", Scopes::PING)
        .await
        .unwrap();
    let who = house.handle.authenticate_key(&made.secret).await.unwrap();
    assert_eq!((who.app(), who.key()), (APP, made.made.id.as_str()));
    assert!(who.may(Scopes::PING) && !who.may(Scopes::DEVICES));
    assert_eq!(house.handle.keys(APP).await.unwrap().len(), 2);

    let mut wrong = made.secret.clone();
    wrong.pop();
    for text in [wrong.as_str(), "", "bw_", "bw_a_b", &made.secret[3..]] {
        let who = house.handle.authenticate_key(text).await;
        assert_eq!(who.unwrap_err(), WhoError::Unauthorized, "{text:?}");
    }

    let house = house.restart().await;
    assert!(house.handle.authenticate_key(&made.secret).await.is_ok());
    assert!(
        !house
            .handle
            .revoke_key(AppId(2), &made.made.id)
            .await
            .unwrap()
    );
    assert!(house.handle.revoke_key(APP, &made.made.id).await.unwrap());
    assert_eq!(
        house
            .handle
            .authenticate_key(&made.secret)
            .await
            .unwrap_err(),
        WhoError::Unauthorized
    );
    assert!(!house.handle.revoke_key(APP, &made.made.id).await.unwrap());
    assert_eq!(house.handle.ensure_bootstrap_key().await.unwrap(), None);
}

#[tokio::test]
async fn registrations_meet_a_full_and_a_failed_store() {
    let house = House::open().await;
    house.store.set_mode(Mode::NoRoom);
    let made = house.handle.create_device(APP, "anna", None).await;
    assert_eq!(made.err(), Some(RuntimeError::NoRoom));
    house.store.set_mode(Mode::Fail);
    let made = house.handle.create_key(APP, "k", Scopes::PING).await;
    assert_eq!(made.err(), Some(RuntimeError::StoreUnavailable));
}
