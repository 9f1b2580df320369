//! The same house over the real store: what was answered is there after a stop and a start.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bellwire_server::delivery::Outcome;
use bellwire_server::ports::{OutcomeOrder, OutcomeQuery, PairState, Store};
use bellwire_server::runtime::{DeviceQuery, RuntimeSettings, SystemClock, SystemEntropy, Target};
use bellwire_server::store::{EngineKind, OpenError, StoreSettings, open};

use crate::house::{APP, Device, House, MovedClock, ping, settings, until};
use crate::store::FakeStore;

fn store_settings(dir: &Path, engine: EngineKind) -> StoreSettings {
    StoreSettings {
        engine,
        segment_bytes: 1 << 20,
        reserve_bytes: 0,
        ..StoreSettings::new(dir)
    }
}

async fn open_store(dir: &Path, engine: EngineKind) -> Arc<dyn Store> {
    let settings = store_settings(dir, engine);
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let opened = open(
            &settings,
            Arc::new(SystemClock::new()),
            Arc::new(SystemEntropy::new()),
        );
        match opened {
            // The directory stays locked until the last thread of the house before has let go of its store.
            Err(OpenError::InUse { .. }) if Instant::now() < give_up => {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            opened => return opened.unwrap().store,
        }
    }
}

async fn start(dir: &Path, engine: EngineKind) -> House {
    let store = open_store(dir, engine).await;
    House::over(settings(), store, Arc::new(FakeStore::default())).await
}

async fn stop(house: House) {
    let House {
        runtime, handle, ..
    } = house;
    assert!(runtime.shutdown(Duration::from_millis(200)).await.committed);
    drop(handle);
}

async fn restart(house: House, dir: &Path, engine: EngineKind) -> House {
    stop(house).await;
    start(dir, engine).await
}

async fn story(engine: EngineKind) {
    let dir = tempfile::tempdir().unwrap();
    let house = start(dir.path(), engine).await;
    let key = house.handle.ensure_bootstrap_key().await.unwrap().unwrap();
    // Kept without the house's handle: what holds one holds the store, and the store its directory.
    let card = |device: Device| (device.id, device.secret);
    let anna = card(house.device("anna").await);
    let other = card(house.device("anna").await);
    let at = |house: &House| Device {
        handle: house.handle.clone(),
        id: anna.0,
        secret: anna.1.clone(),
    };
    let mut ids = Vec::new();
    for _ in 0..20 {
        let users = Target::Users(vec!["anna".to_owned()]);
        let answer = house.handle.ping(ping(users)).await.unwrap();
        assert_eq!(answer.devices, 2);
        ids.push(answer.id);
    }
    let mut keyed = ping(Target::Device(anna.0));
    keyed.idempotency = Some(("order-1".to_owned(), [1; 32]));
    let answer = house.handle.ping(keyed.clone()).await.unwrap();
    ids.push(answer.id);

    let house = restart(house, dir.path(), engine).await;
    assert!(house.handle.authenticate_key(&key).await.is_ok());
    assert_eq!(house.handle.ensure_bootstrap_key().await.unwrap(), None);
    let again = house.handle.ping(keyed).await.unwrap();
    assert_eq!(again, answer);
    let mut link = at(&house).attach().await;
    for id in &ids {
        let (ping, seq, redelivered) = link.notification().await;
        assert_eq!((ping, redelivered), (*id, true));
        link.acknowledge(seq);
    }
    house.ended(ids[20]).await;
    assert!(house.handle.revoke_device(APP, other.0).await.unwrap());
    drop(link);

    let house = restart(house, dir.path(), engine).await;
    assert_eq!(house.handle.status().run, 3);
    let view = house.handle.ping_view(APP, ids[0], None, 10).await.unwrap();
    for pair in view.unwrap().devices {
        let wanted = if pair.device == anna.0 {
            Outcome::Acknowledged
        } else {
            Outcome::Revoked
        };
        assert!(
            matches!(pair.state, PairState::Ended { outcome, .. } if outcome == wanted),
            "{pair:?}"
        );
    }
    let left = house
        .handle
        .devices(APP, &DeviceQuery::default(), None, 10)
        .await
        .unwrap();
    assert_eq!(left.items.len(), 1);
    let mut link = at(&house).attach().await;
    let next = house
        .handle
        .ping(ping(Target::Device(anna.0)))
        .await
        .unwrap();
    assert_eq!(link.notification().await.0, next.id);
    stop(house).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_answered_survives_over_the_memory_engine() {
    story(EngineKind::Memory).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_answered_survives_over_sled() {
    story(EngineKind::Sled).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_answered_survives_over_fjall() {
    story(EngineKind::Fjall).await;
}

#[tokio::test]
async fn a_stored_row_is_swept_over_the_real_expiry_index() {
    let dir = tempfile::tempdir().unwrap();
    let house = start(dir.path(), EngineKind::Memory).await;
    let device = house.device("anna").await;
    let mut ids = Vec::new();
    for ttl_s in [60, 120, 180] {
        let mut request = ping(Target::Device(device.id));
        request.ttl_s = Some(ttl_s);
        ids.push(house.handle.ping(request).await.unwrap().id);
    }
    for id in ids {
        house.clock.advance(Duration::from_secs(61));
        house.ended(id).await;
    }
    stop(house).await;
}

/// Sends so many that are never stored, has each acknowledged, and counts the syncs of the log meanwhile.
async fn syncs_of(house: &House, device: &Device, count: u64) -> u64 {
    let mut link = device.attach().await;
    let before = house.handle.status().store.syncs;
    for _ in 0..count {
        let mut request = ping(Target::Device(device.id));
        request.ttl_s = Some(0);
        let id = house.handle.ping(request).await.unwrap().id;
        let (_, seq, _) = link.notification().await;
        link.acknowledge(seq);
        house.ended(id).await;
    }
    house.handle.status().store.syncs - before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outcome_costs_a_sync_only_if_it_is_to_be_durable() {
    let dir = tempfile::tempdir().unwrap();
    let house = start(dir.path(), EngineKind::Memory).await;
    let device = house.device("anna").await;
    assert_eq!(syncs_of(&house, &device, 50).await, 0);
    let (id, secret) = (device.id, device.secret);
    // It reaches the history all the same, before and after an orderly stop.
    let all = OutcomeQuery {
        app: APP,
        devices: None,
        outcome: None,
        from_ms: 0,
        to_ms: u64::MAX,
        order: OutcomeOrder::OldestFirst,
        start: None,
        limit: 1_000,
    };
    drop(device.handle);
    stop(house).await;

    let settings = RuntimeSettings {
        receipts_durable: true,
        ..settings()
    };
    let store = open_store(dir.path(), EngineKind::Memory).await;
    let house = House::over(settings, store, Arc::new(FakeStore::default())).await;
    let page = house.handle.outcomes(None, all).await.unwrap();
    assert_eq!(page.items.len(), 50);
    let device = Device {
        handle: house.handle.clone(),
        id,
        secret,
    };
    let syncs = syncs_of(&house, &device, 10).await;
    assert!((10..=20).contains(&syncs), "{syncs}");
    drop(device);
    stop(house).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_past_their_time_are_not_told_at_once_and_their_segments_go() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(MovedClock::new());
    let opened = open(
        &store_settings(dir.path(), EngineKind::Memory),
        Arc::clone(&clock) as _,
        Arc::new(SystemEntropy::new()),
    );
    let store = opened.unwrap().store;
    let house = House::at(
        Arc::clone(&clock),
        settings(),
        Arc::clone(&store),
        Arc::new(FakeStore::default()),
    )
    .await;
    let device = house.device("anna").await;
    let mut ids = Vec::new();
    for ttl_s in [Some(0), Some(1)] {
        let mut request = ping(Target::Device(device.id));
        request.ttl_s = ttl_s;
        ids.push(house.handle.ping(request).await.unwrap().id);
    }
    clock.advance(Duration::from_secs(2));
    house.ended(ids[1]).await;
    let all = OutcomeQuery {
        app: APP,
        devices: Some(vec![device.id]),
        outcome: None,
        from_ms: 0,
        to_ms: u64::MAX,
        order: OutcomeOrder::NewestFirst,
        start: None,
        limit: 10,
    };
    until("both are listed", async || {
        let page = house.handle.outcomes(None, all.clone()).await.unwrap();
        page.items.len() == 2
    })
    .await;
    assert_eq!(house.handle.status().store.outcomes.segments, 1);

    clock.advance(Duration::from_secs(24 * 3600 + 5));
    // Whatever was dropped by now: none is told any more, neither by the ledger nor by the engine nor by the history.
    let page = house.handle.outcomes(None, all).await.unwrap();
    assert!(page.items.is_empty() && page.next.is_none());
    for id in ids {
        let view = house.handle.ping_view(APP, id, None, 10).await.unwrap();
        assert!(view.is_none(), "{view:?}");
    }
    until("the segment is dropped", async || {
        let history = house.handle.status().store.outcomes;
        (history.records, history.oldest_ms) == (0, 0)
    })
    .await;
    // Empty ones stay, so that no position is used twice.
    let left: Vec<u64> = std::fs::read_dir(dir.path().join("outcomes"))
        .unwrap()
        .map(|file| file.unwrap().metadata().unwrap().len())
        .collect();
    let empty = left.iter().all(|&bytes| bytes <= 64);
    assert!(empty && (1..=2).contains(&left.len()), "{left:?}");
    drop((device.handle, store));
    stop(house).await;
}
