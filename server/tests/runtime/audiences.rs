//! Topics, everyone, long lists: who is addressed, in which order, and what a crash, a stop or a full disk changes.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bellwire_server::delivery::{DeviceId, Outcome, OverflowRule, PingId};
use bellwire_server::ports::{ExpansionProgress, PairState};
use bellwire_server::runtime::{
    Out, Patterns, PingError, RevokeCounts, RuntimeError, RuntimeSettings, Target, TopicsChange,
};

use crate::house::{APP, Device, House, ping, settings, until};
use crate::store::{Disk, Mode};

/// Pages of two devices, so that a handful makes several.
fn small() -> RuntimeSettings {
    RuntimeSettings {
        expansion_page: 2,
        ..settings()
    }
}

async fn open() -> House {
    House::with(small(), Arc::default()).await
}

async fn killed_and_started(house: House) -> House {
    let store = house.store.restarted();
    House::with(small(), store).await
}

async fn devices(house: &House, count: usize) -> Vec<Device> {
    let mut devices = Vec::new();
    for _ in 0..count {
        devices.push(house.device("anna").await);
    }
    devices
}

async fn set(house: &House, device: DeviceId, topics: &[&str]) {
    let topics = topics.iter().map(|topic| (*topic).to_owned()).collect();
    let change = TopicsChange::Set(topics);
    let answer = house.handle.change_topics(APP, device, change).await;
    assert!(answer.unwrap().is_some());
}

fn topic(name: &str) -> Target {
    Target::Topic(name.to_owned())
}

/// Waits until a ping has reached all of its audience.
async fn brought(house: &House, ping: PingId) {
    until("the audience to be reached", async || {
        let view = house.handle.ping_view(APP, ping, None, 1_000).await;
        view.unwrap().is_none_or(|view| view.expansion.is_none())
    })
    .await;
}

/// What is known of a ping, device by device.
async fn states(house: &House, ping: PingId) -> BTreeMap<DeviceId, Option<Outcome>> {
    let view = house.handle.ping_view(APP, ping, None, 1_000).await;
    let devices = view.unwrap().map(|view| view.devices).unwrap_or_default();
    devices
        .into_iter()
        .map(|pair| match pair.state {
            PairState::Waiting { .. } => (pair.device, None),
            PairState::Ended { outcome, .. } => (pair.device, Some(outcome)),
        })
        .collect()
}

async fn reached(house: &House, ping: PingId) -> BTreeSet<DeviceId> {
    states(house, ping).await.into_keys().collect()
}

fn ids(devices: &[Device]) -> BTreeSet<DeviceId> {
    devices.iter().map(|device| device.id).collect()
}

#[tokio::test]
async fn a_ping_to_a_topic_reaches_its_members_and_nobody_else() {
    let house = open().await;
    let all = devices(&house, 9).await;
    for device in &all[..5] {
        set(&house, device.id, &["news", "ward/3"]).await;
    }
    for device in &all[5..7] {
        set(&house, device.id, &["newsletter"]).await;
    }
    set(&house, all[4].id, &["ward/3"]).await;
    let answer = house.handle.ping(ping(topic("news"))).await.unwrap();
    assert_eq!(answer.devices, 4);
    brought(&house, answer.id).await;
    assert_eq!(reached(&house, answer.id).await, ids(&all[..4]));
    let topics = house.handle.topics(APP, all[0].id).await.unwrap().unwrap();
    assert_eq!(topics, ["news", "ward/3"]);
    // One that nobody is in is known all the same.
    let nobody = house.handle.ping(ping(topic("empty"))).await.unwrap();
    assert_eq!(nobody.devices, 0);
    let view = house.handle.ping_view(APP, nobody.id, None, 10).await;
    assert!(view.unwrap().unwrap().devices.is_empty());
    brought(&house, nobody.id).await;
    assert!(house.store.disk(|disk| disk.expansions.is_empty()));
}

#[tokio::test]
async fn everyone_is_who_was_there_when_the_ping_was_accepted() {
    let house = open().await;
    let before = devices(&house, 7).await;
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    assert_eq!(answer.devices, 7);
    let after = devices(&house, 7).await;
    house.store.set_crowded(false);
    brought(&house, answer.id).await;
    assert_eq!(reached(&house, answer.id).await, ids(&before));
    let all = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    brought(&house, all.id).await;
    let everybody = before.iter().chain(&after).map(|device| device.id);
    assert_eq!(reached(&house, all.id).await, everybody.collect());
}

#[tokio::test]
async fn who_leaves_after_acceptance_still_gets_it_and_who_joins_after_it_does_not() {
    let house = open().await;
    let all = devices(&house, 6).await;
    for device in &all[..4] {
        set(&house, device.id, &["news"]).await;
    }
    house.store.set_crowded(true);
    let first = house.handle.ping(ping(topic("news"))).await.unwrap();
    set(&house, all[0].id, &[]).await;
    set(&house, all[1].id, &[]).await;
    set(&house, all[1].id, &["news"]).await;
    set(&house, all[4].id, &["news"]).await;
    let second = house.handle.ping(ping(topic("news"))).await.unwrap();
    set(&house, all[2].id, &[]).await;
    let listed = house.store.disk(|disk| disk.members.len());
    assert_eq!(
        listed, 5,
        "those that left stay in the list for the time being"
    );
    // In the middle of all that the server is killed.
    let house = killed_and_started(house).await;
    brought(&house, first.id).await;
    brought(&house, second.id).await;
    assert_eq!(reached(&house, first.id).await, ids(&all[..4]));
    assert_eq!(reached(&house, second.id).await, ids(&all[1..5]));
    // Another one comes by what nobody needs any more.
    let third = house.handle.ping(ping(topic("news"))).await.unwrap();
    brought(&house, third.id).await;
    let now: BTreeSet<DeviceId> = [1, 3, 4]
        .into_iter()
        .map(|place: usize| all[place].id)
        .collect();
    assert_eq!(reached(&house, third.id).await, now);
    until("the list to be tidied up", async || {
        house.store.disk(|disk| disk.members.len()) == 3
    })
    .await;
    let open = house.store.disk(|disk| {
        let spans = disk.members.values();
        spans
            .filter(|spans| spans.len() == 1 && spans[0].left.is_none())
            .count()
    });
    assert_eq!(open, 3);
}

/// A small generator of repeatable choices.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides as u64).unwrap()
    }
}

#[tokio::test]
async fn random_joins_leaves_pings_and_crashes_address_exactly_those_who_were_in() {
    for seed in 1..=6 {
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        let mut house = open().await;
        let mut all = devices(&house, 5).await;
        let mut members: BTreeSet<DeviceId> = BTreeSet::new();
        let mut pings: Vec<(PingId, BTreeSet<DeviceId>)> = Vec::new();
        for _ in 0..60 {
            match dice.roll(12) {
                0..=3 => {
                    let device = all[dice.roll(all.len())].id;
                    if !members.remove(&device) {
                        members.insert(device);
                    }
                    let topics: &[&str] = if members.contains(&device) {
                        &["news"]
                    } else {
                        &[]
                    };
                    set(&house, device, topics).await;
                }
                4 => all.push(house.device("ben").await),
                5..=7 => {
                    let answer = house.handle.ping(ping(topic("news"))).await.unwrap();
                    pings.push((answer.id, members.clone()));
                }
                8 => {
                    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
                    pings.push((answer.id, ids(&all)));
                }
                9 => house.store.set_crowded(true),
                10 => house.store.set_crowded(false),
                _ => house = killed_and_started(house).await,
            }
        }
        house.store.set_crowded(false);
        for (ping, addressed) in pings {
            brought(&house, ping).await;
            assert_eq!(reached(&house, ping).await, addressed, "seed {seed}");
        }
        let left = house
            .store
            .disk(|disk| (disk.expansions.len(), disk.chunks.len()));
        assert_eq!(left, (0, 0));
    }
}

#[tokio::test]
async fn pings_to_audiences_stand_in_every_mailbox_in_the_order_of_their_acceptance() {
    let house = open().await;
    let all = devices(&house, 7).await;
    for device in &all {
        set(&house, device.id, &["news"]).await;
    }
    house.store.set_crowded(true);
    let mut order = Vec::new();
    for target in [Target::Everyone, topic("news"), Target::Everyone] {
        order.push(house.handle.ping(ping(target)).await.unwrap().id);
    }
    // It takes its place at once, before those that are still on their way.
    let single = house.handle.ping(ping(Target::Device(all[3].id))).await;
    let single = single.unwrap().id;
    let house = killed_and_started(house).await;
    for ping in &order {
        brought(&house, *ping).await;
    }
    for device in &all {
        let mut link = device.at(&house).attach().await;
        if device.id == all[3].id {
            assert_eq!(link.notification().await.0, single);
        }
        for ping in &order {
            assert_eq!(link.notification().await.0, *ping);
        }
    }
}

#[tokio::test]
async fn a_crash_in_the_middle_leaves_nobody_out_and_gives_nobody_two_outcomes() {
    let house = open().await;
    let all = devices(&house, 9).await;
    // One has its outcome already.
    let mut sorted: Vec<&Device> = all.iter().collect();
    sorted.sort_by_key(|device| device.id);
    let mut link = sorted[0].attach().await;
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    house.store.set_crowded(false);
    let (ping, seq, _) = link.notification().await;
    // Its outcome is one of a stored row: that is what a crash must not forget.
    let id = sorted[0].id;
    until("its row is stored", async || {
        let stored = |disk: &mut Disk| disk.rows.keys().any(|(device, _)| *device == id);
        house.store.disk(stored)
    })
    .await;
    link.acknowledge(seq);
    assert_eq!(ping, answer.id);
    brought(&house, ping).await;
    // As if the process had been killed after the first page, and the frame of its progress with it.
    let store = house.store.restarted();
    let stamp = bellwire_server::ports::Stamp { run: 1, count: 10 };
    let progress = store.disk(|disk| disk.expansions.len());
    assert_eq!(progress, 0);
    let notification = store.disk(|disk| {
        let row = disk.rows.values().next().unwrap();
        Arc::clone(&row.1)
    });
    store.disk(|disk| {
        let record = bellwire_server::ports::ExpansionRecord {
            stamp,
            audience: bellwire_server::ports::Audience::Everyone,
            estimate: 9,
            notification,
        };
        disk.expansions
            .insert((APP, stamp), (record, ExpansionProgress::default()));
        // One row was not written yet.
        let missing = sorted[5].id;
        disk.rows.retain(|(device, _), _| *device != missing);
    });
    let before = store.disk(|disk| disk.rows.len());
    let house = House::with(small(), store).await;
    brought(&house, ping).await;
    let after = house.store.disk(|disk| disk.rows.len());
    // Only the one that had nothing gets it; the acknowledged one keeps its outcome.
    assert_eq!(after, before + 1);
    let states = states(&house, ping).await;
    assert_eq!(states.keys().copied().collect::<BTreeSet<_>>(), ids(&all));
    let acknowledged = states
        .values()
        .filter(|state| **state == Some(Outcome::Acknowledged));
    assert_eq!(acknowledged.count(), 1);
}

#[tokio::test]
async fn a_revoked_ping_stops_on_its_way_and_stays_so_over_a_crash() {
    let house = open().await;
    let all = devices(&house, 9).await;
    let first = {
        let mut sorted: Vec<DeviceId> = ids(&all).into_iter().collect();
        sorted.truncate(2);
        sorted
    };
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    // One page, and then the disk is slow.
    house.store.set_mode(Mode::Hold);
    house.store.set_crowded(false);
    until("a page", async || house.store.held() > 0).await;
    house.store.set_crowded(true);
    house.store.set_mode(Mode::Commit);
    until("the first devices", async || {
        !reached(&house, answer.id).await.is_empty()
    })
    .await;
    let counts = house.handle.revoke_ping(APP, answer.id).await.unwrap();
    let counts = counts.unwrap();
    assert_eq!((counts.revoked, counts.ended), (2, 0));
    house.store.set_crowded(false);
    let house = killed_and_started(house).await;
    let states = states(&house, answer.id).await;
    let revoked: Vec<DeviceId> = states.keys().copied().collect();
    assert_eq!(revoked, first);
    assert!(
        states
            .values()
            .all(|state| *state == Some(Outcome::Revoked))
    );
    assert!(house.store.disk(|disk| disk.expansions.is_empty()));
    // Again is no error; before anybody had it, neither.
    house.store.set_crowded(true);
    let early = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    for _ in 0..2 {
        let counts = house.handle.revoke_ping(APP, early.id).await.unwrap();
        assert_eq!(counts, Some(RevokeCounts::default()));
    }
}

#[tokio::test]
async fn a_single_ping_finds_no_more_than_a_page_before_it() {
    // One shard: its frame is under way, so that what comes after the page stays its own until it is acknowledged.
    let settings = RuntimeSettings {
        shards: 1,
        ..small()
    };
    let house = House::with(settings, Arc::default()).await;
    let all = devices(&house, 20).await;
    house.store.set_crowded(true);
    let wide = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    let single = house.device("carl").await;
    let mut link = single.attach().await;
    house.store.set_mode(Mode::Hold);
    house.store.set_crowded(false);
    until("a page", async || house.store.held() > 0).await;
    // The disk answers nobody, and of the audience no more than a page has been handed out: to look how many they are, and
    // that page. What is acknowledged at once needs no disk.
    let target = Target::Device(single.id);
    let answer = tokio::spawn({
        let handle = house.handle.clone();
        async move { handle.ping(ping(target)).await }
    });
    let (ping, seq, _) = link.notification().await;
    link.acknowledge(seq);
    assert_eq!(answer.await.unwrap().unwrap().id, ping);
    assert_eq!(house.store.member_reads(), 2);
    house.store.set_mode(Mode::Commit);
    brought(&house, wide.id).await;
    assert_eq!(reached(&house, wide.id).await, ids(&all));
}

#[tokio::test]
async fn a_full_mailbox_refuses_for_its_own_device_only_and_that_is_its_outcome() {
    let mut settings = small();
    settings.policy.overflow = OverflowRule::Refuse;
    settings.policy.mailbox_notifications = 1;
    let house = House::with(settings, Arc::default()).await;
    let all = devices(&house, 5).await;
    let full = &all[2];
    house
        .handle
        .ping(ping(Target::Device(full.id)))
        .await
        .unwrap();
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    brought(&house, answer.id).await;
    for (device, state) in states(&house, answer.id).await {
        let expected = (device == full.id).then_some(Outcome::Refused);
        assert_eq!(state, expected);
    }
    assert_eq!(reached(&house, answer.id).await, ids(&all));
}

#[tokio::test]
async fn a_long_list_is_brought_in_chunks_and_unknown_devices_are_only_counted() {
    let mut settings = small();
    settings.limits.devices_max = 3;
    let house = House::with(settings.clone(), Arc::default()).await;
    let all = devices(&house, 7).await;
    let mut named: Vec<DeviceId> = all.iter().map(|device| device.id).collect();
    named.push(DeviceId([9; 16]));
    named.push(named[0]);
    house.store.set_crowded(true);
    let answer = house
        .handle
        .ping(ping(Target::Devices(named)))
        .await
        .unwrap();
    assert_eq!((answer.devices, answer.rejected.len()), (8, 0));
    let view = house
        .handle
        .ping_view(APP, answer.id, None, 10)
        .await
        .unwrap();
    let expansion = view.unwrap().expansion.unwrap();
    assert_eq!((expansion.estimate, expansion.done), (8, 0));
    assert_eq!(house.store.disk(|disk| disk.chunks.len()), 1);
    let store = house.store.restarted();
    let house = House::with(settings, store).await;
    brought(&house, answer.id).await;
    assert_eq!(reached(&house, answer.id).await, ids(&all));
    assert!(
        house
            .store
            .disk(|disk| disk.chunks.is_empty() && disk.expansions.is_empty())
    );
    let few = Target::Devices(all[..3].iter().map(|device| device.id).collect());
    let answer = house.handle.ping(ping(few)).await.unwrap();
    assert_eq!(
        reached(&house, answer.id).await,
        ids(&all[..3]),
        "answered device by device"
    );
}

#[tokio::test]
async fn ttl_0_rings_who_is_there_and_writes_nothing() {
    let house = open().await;
    let all = devices(&house, 5).await;
    let mut link = all[1].attach().await;
    let before = house
        .store
        .disk(|disk| (disk.rows.len(), disk.expansions.len()));
    let mut request = ping(Target::Everyone);
    request.ttl_s = Some(0);
    let answer = house.handle.ping(request).await.unwrap();
    let (ping, seq, _) = link.notification().await;
    assert_eq!(ping, answer.id);
    link.acknowledge(seq);
    house.ended(answer.id).await;
    brought(&house, answer.id).await;
    for (device, state) in states(&house, answer.id).await {
        let acknowledged = device == all[1].id;
        let expected = if acknowledged {
            Outcome::Acknowledged
        } else {
            Outcome::Expired
        };
        assert_eq!(state, Some(expected));
    }
    assert_eq!(
        house
            .store
            .disk(|disk| (disk.rows.len(), disk.expansions.len())),
        before
    );
}

#[tokio::test]
async fn what_runs_out_on_its_way_ends_as_expired_and_is_sent_to_nobody() {
    let house = open().await;
    let all = devices(&house, 5).await;
    let mut link = all[0].attach().await;
    house.store.set_crowded(true);
    let mut request = ping(Target::Everyone);
    request.ttl_s = Some(60);
    let answer = house.handle.ping(request).await.unwrap();
    house.clock.advance(Duration::from_secs(61));
    // The engine is still behind: what is past its time asks nothing of it.
    brought(&house, answer.id).await;
    let states = states(&house, answer.id).await;
    assert_eq!(states.len(), 5);
    assert!(
        states
            .values()
            .all(|state| *state == Some(Outcome::Expired))
    );
    assert!(link.silent());
}

#[tokio::test]
async fn a_repeated_key_finds_the_ping_on_its_way_and_over_a_crash() {
    let house = open().await;
    devices(&house, 5).await;
    house.store.set_crowded(true);
    let mut request = ping(Target::Everyone);
    request.idempotency = Some(("tonight".to_owned(), [4; 32]));
    let first = house.handle.ping(request.clone()).await.unwrap();
    let again = house.handle.ping(request.clone()).await.unwrap();
    assert_eq!((again.id, again.devices), (first.id, 5));
    let house = killed_and_started(house).await;
    let after = house.handle.ping(request.clone()).await.unwrap();
    assert_eq!((after.id, after.devices), (first.id, 5));
    brought(&house, first.id).await;
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 5);
    let mut other = request;
    other.idempotency = Some(("tonight".to_owned(), [5; 32]));
    let conflict = house.handle.ping(other).await;
    assert_eq!(conflict.unwrap_err(), PingError::IdempotencyConflict);
}

#[tokio::test]
async fn a_repeat_is_promised_nothing_before_the_ping_is_safe() {
    let mut settings = small();
    settings.limits.accept_wait = Duration::from_millis(100);
    let house = House::with(settings, Arc::default()).await;
    devices(&house, 5).await;
    let mut request = ping(Target::Everyone);
    request.idempotency = Some(("tonight".to_owned(), [4; 32]));
    house.store.set_mode(Mode::Hold);
    // Whoever comes again meanwhile is told to come again as well.
    for _ in 0..2 {
        let busy = house.handle.ping(request.clone()).await;
        assert_eq!(busy.unwrap_err(), RuntimeError::StoreBusy.into());
    }
    let handle = house.handle.clone();
    let waits = request.clone();
    let waiting = tokio::spawn(async move { handle.ping(waits).await });
    // What was held finds no room: it is on no disk, and nobody may believe that it is.
    house.store.set_mode(Mode::NoRoom);
    let lost = waiting.await.unwrap();
    assert!(lost.is_err(), "{lost:?}");
    house.store.set_mode(Mode::Commit);
    let answer = house.handle.ping(request).await.unwrap();
    brought(&house, answer.id).await;
    assert_eq!(house.store.disk(|disk| disk.rows.len()), 5);
}

#[tokio::test]
async fn more_than_may_be_on_their_way_are_told_to_come_again() {
    let mut settings = small();
    settings.limits.expansions_max = 2;
    let house = House::with(settings, Arc::default()).await;
    devices(&house, 3).await;
    house.store.set_crowded(true);
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(house.handle.ping(ping(Target::Everyone)).await.unwrap().id);
    }
    let third = house.handle.ping(ping(Target::Everyone)).await;
    assert_eq!(
        third.unwrap_err(),
        PingError::TooManyExpansions { limit: 2 }
    );
    assert_eq!(house.handle.status().expansions, 2);
    house.store.set_crowded(false);
    for ping in open {
        brought(&house, ping).await;
    }
    house.handle.ping(ping(Target::Everyone)).await.unwrap();
}

#[tokio::test]
async fn no_room_refuses_new_ones_and_holds_those_on_their_way_until_there_is_some() {
    let house = open().await;
    let all = devices(&house, 5).await;
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    house.store.set_mode(Mode::NoRoom);
    house.store.set_crowded(false);
    let refused = house.handle.ping(ping(Target::Everyone)).await;
    assert_eq!(
        refused.unwrap_err(),
        PingError::Runtime(RuntimeError::NoRoom)
    );
    house.store.set_mode(Mode::Commit);
    brought(&house, answer.id).await;
    let states = states(&house, answer.id).await;
    assert_eq!(states.len(), all.len());
    assert!(states.values().all(Option::is_none), "{states:?}");
}

#[tokio::test]
async fn a_stop_ends_at_a_page_and_the_next_start_goes_on() {
    let house = open().await;
    let all = devices(&house, 9).await;
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    let summary = house.handle.drain(Duration::ZERO).await;
    assert!(summary.committed);
    let refused = house.handle.ping(ping(Target::Everyone)).await;
    assert_eq!(
        refused.unwrap_err(),
        PingError::Runtime(RuntimeError::Draining)
    );
    let house = killed_and_started(house).await;
    brought(&house, answer.id).await;
    assert_eq!(reached(&house, answer.id).await, ids(&all));
}

#[tokio::test]
async fn waiting_means_until_all_of_the_audience_is_reached() {
    let house = open().await;
    let all = devices(&house, 5).await;
    let mut request = ping(Target::Everyone);
    request.wait_acknowledged = Some(Duration::from_millis(1));
    house.store.set_crowded(true);
    let answer = house.handle.ping(request.clone()).await.unwrap();
    assert!(answer.outcomes.is_empty(), "the time was over before");
    house.store.set_crowded(false);
    brought(&house, answer.id).await;
    request.wait_acknowledged = Some(Duration::from_secs(20));
    let mut links = Vec::new();
    for device in &all {
        links.push(device.attach().await);
    }
    let handle = house.handle.clone();
    let asked = tokio::spawn(async move { handle.ping(request).await });
    for link in &mut links {
        for _ in 0..2 {
            let (_, seq, _) = link.notification().await;
            link.acknowledge(seq);
        }
    }
    let answer = asked.await.unwrap().unwrap();
    assert_eq!(answer.outcomes.len(), 5);
    for pair in answer.outcomes {
        assert!(matches!(
            pair.state,
            PairState::Ended {
                outcome: Outcome::Acknowledged,
                ..
            }
        ));
    }
}

#[tokio::test]
async fn a_device_joins_and_leaves_what_its_app_allows_and_nothing_else() {
    let settings = RuntimeSettings {
        self_subscribe: Patterns::read("news/*, ward-3").unwrap(),
        ..small()
    };
    let house = House::with(settings.clone(), Arc::default()).await;
    let device = house.device("anna").await;
    set(&house, device.id, &["staff"]).await;
    let names =
        |names: &[&str]| -> Vec<String> { names.iter().map(|name| (*name).to_owned()).collect() };
    let ask = async |join: &[&str], leave: &[&str]| {
        let asked = house.handle.subscribe(device.id, names(join), names(leave));
        asked.await.unwrap().unwrap()
    };
    let all = ask(&["news/berlin", "ward-3", "ward-33", "secret"], &[]).await;
    assert_eq!(all, ["news/berlin", "staff", "ward-3"]);
    assert_eq!(
        ask(&[], &["staff", "ward-3"]).await,
        ["news/berlin", "staff"]
    );
    let answer = house.handle.ping(ping(topic("news/berlin"))).await.unwrap();
    brought(&house, answer.id).await;
    assert_eq!(reached(&house, answer.id).await.len(), 1);
    // What would be too many is left out; the backend is told so instead.
    let many: Vec<String> = (0..120).map(|n| format!("news/{n:03}")).collect();
    let full = house.handle.subscribe(device.id, many.clone(), Vec::new());
    assert_eq!(full.await.unwrap().unwrap().len(), 100);
    let refused = house
        .handle
        .change_topics(APP, device.id, TopicsChange::Set(many))
        .await;
    assert!(matches!(refused, Err(RuntimeError::Invalid(_))));
    // Taken away while serving: nothing is allowed any more, and nothing is lost.
    house.handle.reload(&small());
    assert_eq!(ask(&[], &["news/berlin"]).await.len(), 100);
    assert!(house.handle.revoke_device(APP, device.id).await.unwrap());
    let gone = house
        .handle
        .subscribe(device.id, names(&["ward-3"]), Vec::new());
    assert_eq!(gone.await.unwrap(), None);
    let left = house
        .store
        .disk(|disk| (disk.topics.len(), disk.members.len()));
    assert_eq!(left, (0, 0), "all of it goes with the device");
}

#[tokio::test]
async fn names_that_cannot_be_are_refused_and_unknown_devices_are_told() {
    let house = open().await;
    let device = house.device("anna").await;
    for name in ["", "a b", "n*", "ü", &"x".repeat(129)] {
        let change = TopicsChange::Set(vec![name.to_owned()]);
        let refused = house.handle.change_topics(APP, device.id, change).await;
        assert!(matches!(refused, Err(RuntimeError::Invalid(_))), "{name}");
    }
    let change = TopicsChange::Set(vec!["news".to_owned()]);
    let unknown = house.handle.change_topics(APP, DeviceId([3; 16]), change);
    assert_eq!(unknown.await.unwrap(), None);
    assert_eq!(
        house.handle.topics(APP, DeviceId([3; 16])).await.unwrap(),
        None
    );
}

#[tokio::test]
async fn a_fan_out_shares_one_notification_and_what_is_encoded_of_it() {
    let house = open().await;
    let mut links = Vec::new();
    for device in devices(&house, 5).await {
        links.push(device.attach().await);
    }
    house.handle.ping(ping(Target::Everyone)).await.unwrap();
    let mut shared = Vec::new();
    for link in &mut links {
        match link.next().await {
            Out::Send { notification, .. } => shared.push(notification),
            other @ (Out::Welcome { .. }
            | Out::Refuse(_)
            | Out::Withdraw(_)
            | Out::Close(_)
            | Out::Drain { .. }) => panic!("{other:?}"),
        }
    }
    let encoded = shared[0].wire.get_or_init(|| 1_u32).unwrap();
    for notification in &shared {
        assert!(Arc::ptr_eq(notification, &shared[0]));
        let again = notification.wire.get_or_init(|| 2_u32).unwrap();
        assert!(Arc::ptr_eq(&again, &encoded));
    }
}

#[tokio::test]
async fn an_engine_that_always_lags_slows_an_audience_down_and_does_not_stop_it() {
    let house = open().await;
    let all = devices(&house, 5).await;
    house.store.set_crowded(true);
    let answer = house.handle.ping(ping(Target::Everyone)).await.unwrap();
    // Time goes on as soon as nothing else is to be done.
    tokio::time::pause();
    let brought = async {
        loop {
            let view = house.handle.ping_view(APP, answer.id, None, 1_000).await;
            if view.unwrap().is_some_and(|view| view.expansion.is_none()) {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    };
    let brought = tokio::time::timeout(Duration::from_secs(3_600), brought).await;
    brought.expect("page by page");
    tokio::time::resume();
    assert_eq!(reached(&house, answer.id).await, ids(&all));
}
