//! What became of it: waiting, looking, taking back, expiry, the ledger's bounds.

use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{AppId, Outcome, PingId};
use bellwire_server::ports::{OutcomeEvent, PairState, Scopes};
use bellwire_server::runtime::{
    EventsFrom, EventsOf, Out, PingAnswer, PingError, PingRequest, RevokeCounts, RuntimeSettings,
    Step, Target,
};

use crate::house::{APP, Device, House, ping, settings, until};
use crate::store::{FakeStore, Mode};

async fn state(house: &House, id: PingId) -> PairState {
    let view = house
        .handle
        .ping_view(APP, id, None, 10)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(view.devices.len(), 1);
    view.devices[0].state
}

fn outcome(state: PairState) -> Option<Outcome> {
    match state {
        PairState::Waiting { .. } => None,
        PairState::Ended { outcome, .. } => Some(outcome),
    }
}

fn waiting_for(target: Target, wait: Duration) -> PingRequest {
    PingRequest {
        wait_acknowledged: Some(wait),
        ..ping(target)
    }
}

#[tokio::test]
async fn whoever_waits_is_answered_with_the_verdict() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut link = device.attach().await;
    let handle = house.handle.clone();
    let request = waiting_for(Target::Device(device.id), Duration::from_secs(60));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    let (id, seq, _) = link.notification().await;
    link.acknowledge(seq);
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer.id, id);
    assert_eq!(
        outcome(answer.outcomes[0].state),
        Some(Outcome::Acknowledged)
    );
}

#[tokio::test]
async fn waiting_ends_with_the_time_and_tells_what_is_known() {
    let house = House::open().await;
    let one = house.device("anna").await;
    let two = house.device("anna").await;
    let mut link = one.attach().await;
    let handle = house.handle.clone();
    let target = Target::Devices(vec![one.id, two.id]);
    let request = waiting_for(target, Duration::from_millis(200));
    let asked = tokio::spawn(async move { handle.ping(request).await });
    let (_, seq, _) = link.notification().await;
    link.acknowledge(seq);
    let outcomes = asked.await.unwrap().unwrap().outcomes;
    assert_eq!(outcomes.len(), 2);
    for pair in outcomes {
        let wanted = (pair.device == one.id).then_some(Outcome::Acknowledged);
        assert_eq!(outcome(pair.state), wanted);
    }
}

#[tokio::test]
async fn outcomes_of_stored_notifications_survive_a_restart() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let id = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    assert_eq!(outcome(state(&house, id).await), None);
    let house = house.restart().await;
    assert_eq!(outcome(state(&house, id).await), None);
    let mut link = device.at(&house).attach().await;
    link.notification().await;
    link.acknowledge(1);
    house.ended(id).await;
    let house = house.restart().await;
    assert_eq!(
        outcome(state(&house, id).await),
        Some(Outcome::Acknowledged)
    );
}

#[tokio::test]
async fn a_ping_of_another_app_is_not_known() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let id = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    let other = AppId(2);
    assert!(
        house
            .handle
            .ping_view(other, id, None, 10)
            .await
            .unwrap()
            .is_none()
    );
    assert!(house.handle.revoke_ping(other, id).await.unwrap().is_none());
    let house = house.restart().await;
    assert!(
        house
            .handle
            .ping_view(other, id, None, 10)
            .await
            .unwrap()
            .is_none()
    );
    let unknown = PingId([1; 16]);
    assert!(
        house
            .handle
            .ping_view(APP, unknown, None, 10)
            .await
            .unwrap()
            .is_none()
    );
}

#[tokio::test]
async fn views_are_paged_by_device_over_ledger_and_store() {
    let house = House::open().await;
    let mut devices = Vec::new();
    for _ in 0..7 {
        devices.push(house.device("anna").await);
    }
    // One of them gets it without the disk.
    let mut link = devices[3].attach().await;
    let handle = house.handle.clone();
    let anna = Target::Users(vec!["anna".to_owned()]);
    let asked = tokio::spawn(async move { handle.ping(ping(anna)).await });
    let (id, seq, _) = link.notification().await;
    link.acknowledge(seq);
    asked.await.unwrap().unwrap();
    let mut seen = Vec::new();
    let mut after = None;
    loop {
        let view = house
            .handle
            .ping_view(APP, id, after, 3)
            .await
            .unwrap()
            .unwrap();
        assert!(view.devices.len() <= 3);
        seen.extend(view.devices.iter().map(|pair| pair.device));
        after = view.next;
        if after.is_none() {
            break;
        }
    }
    let mut wanted: Vec<_> = devices.iter().map(|device| device.id).collect();
    wanted.sort_unstable();
    assert_eq!(seen, wanted);
}

#[tokio::test]
async fn a_revoked_ping_never_arrives_and_what_was_sent_is_withdrawn() {
    let house = House::open().await;
    let absent = house.device("anna").await;
    let attached = house.device("anna").await;
    let done = house.device("anna").await;
    let mut link = attached.attach().await;
    let mut quick = done.attach().await;
    let anna = Target::Users(vec!["anna".to_owned()]);
    let handle = house.handle.clone();
    let asked = tokio::spawn(async move { handle.ping(ping(anna)).await });
    let (id, _, _) = link.notification().await;
    let (_, seq, _) = quick.notification().await;
    quick.acknowledge(seq);
    asked.await.unwrap().unwrap();
    until("one verdict", async || {
        let view = house
            .handle
            .ping_view(APP, id, None, 10)
            .await
            .unwrap()
            .unwrap();
        view.devices
            .iter()
            .any(|pair| outcome(pair.state).is_some())
    })
    .await;
    let counts = house.handle.revoke_ping(APP, id).await.unwrap().unwrap();
    assert_eq!(
        counts,
        RevokeCounts {
            revoked: 2,
            ended: 1
        }
    );
    let word = link.next().await;
    assert!(
        matches!(&word, Out::Withdraw(ids) if ids == &[id]),
        "{word:?}"
    );
    let mut late = absent.attach().await;
    let next = house
        .handle
        .ping(ping(Target::Device(absent.id)))
        .await
        .unwrap()
        .id;
    assert_eq!(late.notification().await.0, next);
    // A second time there is nothing left to take back.
    let counts = house.handle.revoke_ping(APP, id).await.unwrap().unwrap();
    assert_eq!((counts.revoked, counts.ended), (0, 3));
}

#[tokio::test]
async fn a_sleeping_mailbox_is_swept_when_its_ttl_is_over() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(60);
    let id = house.handle.ping(request).await.unwrap().id;
    house.clock.advance(Duration::from_secs(61));
    house.ended(id).await;
    assert_eq!(outcome(state(&house, id).await), Some(Outcome::Expired));
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 0);
}

#[tokio::test]
async fn the_sweep_pauses_while_the_clock_has_jumped() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(60);
    let id = house.handle.ping(request).await.unwrap().id;
    house.clock.set_jumped(true);
    // The sweep looks at the clock before it begins: once more, and none that began before is under way.
    let some_sweeps = async || {
        let asked = house.clock.asked();
        until("sweeps", async || house.clock.asked() > asked + 5).await;
    };
    some_sweeps().await;
    house.clock.advance(Duration::from_secs(61));
    some_sweeps().await;
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 1);
    house.clock.set_jumped(false);
    house.ended(id).await;
}

#[tokio::test]
async fn old_receipts_are_dropped() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(1);
    let id = house.handle.ping(request).await.unwrap().id;
    house.clock.advance(Duration::from_secs(2));
    house.ended(id).await;
    house.clock.advance(Duration::from_secs(25 * 3_600));
    until("the receipt to go", async || {
        house.store.disk(|disk| disk.outcomes.is_empty())
    })
    .await;
}

#[tokio::test]
async fn the_ledger_forgets_the_oldest_but_the_store_remembers() {
    let mut settings = settings();
    settings.ledger_entries = 16;
    let house = House::with(settings, Arc::new(FakeStore::default())).await;
    let device = house.device("anna").await;
    let mut ids = Vec::new();
    for _ in 0..200 {
        ids.push(
            house
                .handle
                .ping(ping(Target::Device(device.id)))
                .await
                .unwrap()
                .id,
        );
    }
    assert!(house.handle.status().ledger_entries <= 16);
    for id in ids {
        assert_eq!(outcome(state(&house, id).await), None);
    }
}

/// Sends something that is never stored, and has it acknowledged on a disk like this; the publisher waits for that.
async fn never_stored(
    house: &House,
    device: &Device,
    mode: Mode,
) -> tokio::task::JoinHandle<Result<PingAnswer, PingError>> {
    let mut link = device.attach().await;
    let mut request = waiting_for(Target::Device(device.id), Duration::from_secs(60));
    request.ttl_s = Some(0);
    let handle = house.handle.clone();
    let publisher = tokio::spawn(async move { handle.ping(request).await });
    let (_, seq, _) = link.notification().await;
    house.store.set_mode(mode);
    link.acknowledge(seq);
    publisher
}

#[tokio::test]
async fn a_durable_outcome_is_announced_once_it_is_safe_and_survives_a_crash() {
    let settings = RuntimeSettings {
        receipts_durable: true,
        ..settings()
    };
    let house = House::with(settings, Arc::default()).await;
    let device = house.device("anna").await;
    let publisher = never_stored(&house, &device, Mode::Hold).await;
    until("the outcome to be handed to the disk", async || {
        house.store.held() == 1
    })
    .await;
    assert!(!publisher.is_finished());
    house.store.set_mode(Mode::Commit);
    let answer = publisher.await.unwrap().unwrap();
    let known = answer.outcomes[0].state;
    assert_eq!(outcome(known), Some(Outcome::Acknowledged));
    let house = house.restart().await;
    assert_eq!(
        state(&house, answer.id).await,
        known,
        "with the time at which it ended"
    );
}

#[tokio::test]
async fn whoever_revokes_again_is_answered_when_the_first_outcome_is_safe() {
    let settings = RuntimeSettings {
        receipts_durable: true,
        shards: 1,
        ..settings()
    };
    let house = House::with(settings, Arc::default()).await;
    let device = house.device("anna").await;
    let other = house.device("otto").await;
    let mut link = device.attach().await;
    let mut others = other.attach().await;
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(0);
    let id = house.handle.ping(request).await.unwrap().id;
    link.notification().await;
    house.store.set_mode(Mode::Hold);
    let revoke = || {
        let handle = house.handle.clone();
        tokio::spawn(async move { handle.revoke_ping(APP, id).await })
    };
    let first = revoke();
    until("the outcome to be handed to the disk", async || {
        house.store.held() == 1
    })
    .await;
    let second = revoke();
    // These go the same ways after the second one.
    for _ in 0..20 {
        state(&house, id).await;
        let mut request = ping(Target::Device(other.id));
        request.ttl_s = Some(0);
        house.handle.ping(request).await.unwrap();
        others.notification().await;
    }
    assert!(!first.is_finished() && !second.is_finished());
    house.store.set_mode(Mode::Commit);
    assert_eq!(first.await.unwrap().unwrap().unwrap().revoked, 1);
    assert_eq!(second.await.unwrap().unwrap().unwrap().ended, 1);
}

#[tokio::test]
async fn a_history_that_cannot_be_read_does_not_keep_anybody_from_revoking() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let id = house
        .handle
        .ping(ping(Target::Device(device.id)))
        .await
        .unwrap()
        .id;
    house.store.disk(|disk| disk.history_fails = true);
    let counts = house.handle.revoke_ping(APP, id).await.unwrap().unwrap();
    assert_eq!((counts.revoked, counts.ended), (1, 0));
}

#[tokio::test]
async fn without_it_the_disk_is_not_asked_and_a_crash_may_forget() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let publisher = never_stored(&house, &device, Mode::Hold).await;
    let answer = publisher.await.unwrap().unwrap();
    assert_eq!(
        outcome(answer.outcomes[0].state),
        Some(Outcome::Acknowledged)
    );
    assert_eq!(house.store.held(), 0);
    house.store.set_mode(Mode::Commit);
    let house = house.restart().await;
    let view = house.handle.ping_view(APP, answer.id, None, 10).await;
    assert!(view.unwrap().is_none());
}

#[tokio::test]
async fn an_outcome_that_the_disk_refuses_is_told_all_the_same_for_it_is_so() {
    for mode in [Mode::NoRoom, Mode::Fail] {
        let settings = RuntimeSettings {
            receipts_durable: true,
            ..settings()
        };
        let house = House::with(settings, Arc::default()).await;
        let device = house.device("anna").await;
        let publisher = never_stored(&house, &device, mode).await;
        let answer = publisher.await.unwrap().unwrap();
        let told = outcome(state(&house, answer.id).await);
        assert_eq!(told, Some(Outcome::Acknowledged), "{mode:?}");
    }
}

#[tokio::test]
async fn a_stream_that_looks_far_away_says_that_it_lives_and_loses_nothing() {
    let house = House::open().await;
    let device = house.device("anna").await;
    let made = house.handle.create_key(APP, "reader", Scopes::READ).await;
    let who = house.handle.authenticate_key(&made.unwrap().secret).await;
    let mut events = house
        .handle
        .follow(&who.unwrap(), EventsFrom::Now, EventsOf::default())
        .unwrap();
    let Step::Quiet(begins) = events.next().await.unwrap() else {
        panic!("where it begins is said first")
    };
    // What it reads takes as long as it takes; time goes on only where nothing else is to be done.
    house.store.hold_events(true);
    tokio::time::pause();
    for _ in 0..3 {
        let step = tokio::time::timeout(Duration::from_secs(60), events.next()).await;
        assert_eq!(step.expect("it says so").unwrap(), Step::Quiet(begins));
    }
    tokio::time::resume();
    // It ends while an old read is under way.
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(0);
    let handle = house.handle.clone();
    let sent = tokio::spawn(async move { handle.ping(request).await });
    house.store.hold_events(false);
    let id = sent.await.unwrap().unwrap().id;
    let ended = async {
        loop {
            if let Step::Events(some) = events.next().await.unwrap() {
                return some;
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_secs(10), ended).await;
    let ended = ended.expect("at once, and not when it is quiet");
    assert!(matches!(&ended[..], [(_, OutcomeEvent::Ended(record))] if record.ping == id));
}

#[tokio::test]
async fn a_stream_that_nobody_reads_keeps_no_other_from_reading() {
    // One place for reads of the history.
    let settings = RuntimeSettings {
        reading_threads: 2,
        ..settings()
    };
    let house = House::with(settings, Arc::default()).await;
    let device = house.device("anna").await;
    let made = house.handle.create_key(APP, "reader", Scopes::READ).await;
    let who = house.handle.authenticate_key(&made.unwrap().secret).await;
    let who = who.unwrap();
    let follow = || {
        let events = house
            .handle
            .follow(&who, EventsFrom::Now, EventsOf::default());
        events.unwrap()
    };
    let (mut stalled, mut other) = (follow(), follow());
    stalled.next().await.unwrap();
    other.next().await.unwrap();
    house.store.hold_events(true);
    let reading = tokio::spawn(async move {
        loop {
            if let Step::Events(some) = other.next().await.unwrap() {
                return some;
            }
        }
    });
    until("it has the place", async || house.store.events_held() == 1).await;
    // This one waits for the place, is told that nothing is new, and then nobody asks it any more.
    tokio::time::pause();
    assert!(matches!(stalled.next().await, Ok(Step::Quiet(_))));
    tokio::time::resume();
    house.store.hold_events(false);
    until("it read although nobody asks it", async || {
        house.store.event_reads() >= 2
    })
    .await;
    let mut request = ping(Target::Device(device.id));
    request.ttl_s = Some(0);
    let id = house.handle.ping(request).await.unwrap().id;
    let some = tokio::time::timeout(Duration::from_secs(10), reading).await;
    let some = some.expect("the place came back").unwrap();
    assert!(matches!(&some[..], [(_, OutcomeEvent::Ended(record))] if record.ping == id));
    // And so has this one what happened meanwhile.
    let late = tokio::time::timeout(Duration::from_secs(10), async {
        loop {
            if let Step::Events(some) = stalled.next().await.unwrap() {
                return some.len();
            }
        }
    });
    assert_eq!(late.await.expect("it goes on"), 1);
}
