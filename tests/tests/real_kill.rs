//! `kill -9` at random moments under load, of the server and of the apps: what was promised is kept, and no app is told
//! twice, but for what it was killed with before its disk knew.
//!
//! 50 rounds in a run; `BELLWIRE_KILL_ROUNDS=1000` runs more, `BELLWIRE_KILL_SEED=n` repeats the moments of one run (the
//! rest of the timing is the machine's).

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bellwire_client::Verdict;
use bellwire_protocol::limits::WINDOW_MAX;
use bellwire_tests::real::{Api, PATIENCE, Phone, Proxy, Server, Site, Way, eventually};
use http::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Pings for the device that is away: fewer than its mailbox holds, so that eviction never explains a loss.
const ABSENT_MAX: u64 = 900;

/// What a publisher was promised: which device, and whether the notification may rightly end without delivery.
#[derive(Debug, Clone)]
struct Promise {
    device: String,
    collapse: bool,
    short: bool,
}

/// Publishes until told to stop. Each ping has its own idempotency key; one that got no answer is tried again as it
/// was, by the next round's publisher, like a careful backend does.
struct Publisher {
    /// The last one is away until the end.
    devices: Vec<String>,
    counter: AtomicU64,
    for_the_absent: AtomicU64,
    /// Ping id to what was promised with a 2xx.
    promises: Mutex<BTreeMap<String, Promise>>,
    /// Requests without an answer: key, body, promise.
    open: Mutex<Vec<(String, String, Promise)>>,
}

impl Publisher {
    async fn publish(&self, api: &Api, seed: u64, stop: &AtomicBool) {
        let mut chance = StdRng::seed_from_u64(seed);
        while !stop.load(Ordering::Relaxed) {
            let again = self.open.lock().unwrap().pop();
            let (key, body, promise) = again.unwrap_or_else(|| self.invent(&mut chance));
            let headers = [("idempotency-key", key.as_str())];
            let answer = api
                .try_send(api.request(Method::POST, "/v1/pings", &headers, &body))
                .await;
            match answer {
                Some(answer) if answer.status.is_success() => {
                    let id = answer.json()["id"].as_str().unwrap().to_owned();
                    self.promises.lock().unwrap().insert(id, promise);
                }
                // Killed, draining or busy: nothing was promised.
                Some(answer) => {
                    assert!(
                        answer.status.is_server_error(),
                        "{} {}",
                        answer.status,
                        answer.text
                    );
                    self.open.lock().unwrap().push((key, body, promise));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                None => {
                    self.open.lock().unwrap().push((key, body, promise));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            }
        }
    }

    fn invent(&self, chance: &mut StdRng) -> (String, String, Promise) {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let mut device = chance.random_range(0..self.devices.len());
        if device == self.devices.len() - 1
            && self.for_the_absent.fetch_add(1, Ordering::Relaxed) >= ABSENT_MAX
        {
            device = 0;
        }
        let device = self.devices[device].clone();
        let collapse = chance.random_bool(0.1);
        let short = chance.random_bool(0.05);
        let mut body = json!({ "to": { "device": device }, "body": format!("n{number}") });
        if collapse {
            body["collapse"] = json!(format!("k{}", number % 3));
        }
        if short {
            body["ttl_s"] = json!(1);
        }
        (
            format!("key-{number}"),
            body.to_string(),
            Promise {
                device,
                collapse,
                short,
            },
        )
    }
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// A device and the way it takes; on the way through a proxy its address stays, so it may outlive servers.
struct Device {
    phone: Phone,
    proxy: Option<Proxy>,
    /// What may rightly come once more: given to the app, and its process ended before its disk knew.
    unsaved: Vec<String>,
}

impl Device {
    /// Ends the round: the server is gone, and the app crashes, leaves in good order, or waits for the next server.
    async fn end_round(&mut self, chance: &mut StdRng) {
        match chance.random_range(0..10) {
            0..=4 => {
                let unsaved = self.phone.crash().await;
                self.unsaved.extend(unsaved);
            }
            5.. if self.proxy.is_some() => {}
            5..=8 => {
                let unsaved = self.phone.crash().await;
                self.unsaved.extend(unsaved);
            }
            _ => self.phone.leave().await,
        }
    }

    async fn begin_round(&mut self, server: &Server) {
        if let Some(proxy) = &self.proxy {
            proxy.hold_after(None);
            proxy.lead_to(server.listen().devices);
        }
        if self.phone.runs() {
            self.phone.nudge().await;
        } else {
            self.phone.start(server, |_| Verdict::Acknowledge).await;
        }
    }
}

/// What a device says is held back every so many rounds.
const HOLD_EVERY: u64 = 8;

/// More than `seen` of a `hello` can tell, and no more than may be in flight: what is beyond it must be repeated by the
/// server and recognised by the device.
const HELD_BACK: usize = 230;
/// So many bytes of the server belong to the handshake and the first notifications.
const HANDSHAKE_BYTES: u64 = 12_000;

impl Publisher {
    /// Publishes so many pings to one device, with some content.
    async fn fill(self: &Arc<Self>, api: &Api, device: &str, count: usize) {
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (publisher, api, device) = (Arc::clone(self), api.clone(), device.to_owned());
                tokio::spawn(async move {
                    for _ in (task..count).step_by(8) {
                        let number = publisher.counter.fetch_add(1, Ordering::Relaxed);
                        let body = format!("n{number} {}", "x".repeat(200));
                        let answer = api
                            .post(
                                "/v1/pings",
                                json!({ "to": { "device": device }, "body": body }),
                            )
                            .await;
                        assert!(answer.status.is_success(), "{}", answer.text);
                        let id = answer.json()["id"].as_str().unwrap().to_owned();
                        let promise = Promise {
                            device: device.clone(),
                            collapse: false,
                            short: false,
                        };
                        publisher.promises.lock().unwrap().insert(id, promise);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_kill_nine_and_no_app_is_told_twice() {
    let rounds = setting("BELLWIRE_KILL_ROUNDS").unwrap_or(50);
    let seed = setting("BELLWIRE_KILL_SEED").unwrap_or_else(rand::random);
    eprintln!("BELLWIRE_KILL_SEED={seed}, {rounds} rounds");
    let mut chance = StdRng::seed_from_u64(seed);

    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut ways = Vec::new();
    for way in Way::ALL {
        let phone = Phone::register(&server, &api, site.dir(), "ann", way).await;
        ways.push(if way == Way::Quic {
            Device {
                phone,
                proxy: None,
                unsaved: Vec::new(),
            }
        } else {
            let proxy = Proxy::start().await;
            Device {
                phone: phone.through(proxy.address()).with_window(WINDOW_MAX),
                proxy: Some(proxy),
                unsaved: Vec::new(),
            }
        });
    }
    // One device that is away all the time, until the end.
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    let publisher = Arc::new(Publisher {
        devices: ways
            .iter()
            .map(|way| way.phone.id())
            .chain([away.id()])
            .collect(),
        counter: AtomicU64::new(0),
        for_the_absent: AtomicU64::new(0),
        promises: Mutex::default(),
        open: Mutex::default(),
    });
    server.kill();

    for round in 0..rounds {
        let server = site.start();
        let api = server.api();
        // Every few rounds, what one of the devices says is held back from the server until that is killed.
        let held =
            (round % HOLD_EVERY == HOLD_EVERY - 1).then(|| 1 + (round / HOLD_EVERY) as usize % 2);
        for (index, way) in ways.iter_mut().enumerate() {
            if held != Some(index) {
                way.begin_round(&server).await;
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let publishers: Vec<_> = (0..4)
            .map(|n| {
                let (publisher, api, stop) =
                    (Arc::clone(&publisher), api.clone(), Arc::clone(&stop));
                tokio::spawn(
                    async move { publisher.publish(&api, seed ^ (round * 4 + n), &stop).await },
                )
            })
            .collect();
        if let Some(way) = held.map(|index| &mut ways[index]) {
            let unsaved = way.phone.crash().await;
            way.unsaved.extend(unsaved);
            let before = way.phone.ledger.ids().len();
            publisher.fill(&api, &way.phone.id(), HELD_BACK).await;
            way.begin_round(&server).await;
            let proxy = way.proxy.as_ref().unwrap();
            proxy.hold_after(Some(HANDSHAKE_BYTES));
            way.phone.given(before + HELD_BACK).await;
        }
        tokio::time::sleep(Duration::from_millis(chance.random_range(20..300))).await;
        server.kill();
        stop.store(true, Ordering::Relaxed);
        for publisher in publishers {
            publisher.await.unwrap();
        }
        for (index, way) in ways.iter_mut().enumerate() {
            // Whose words were held back lives on: it knows what the server does not.
            if held != Some(index) {
                way.end_round(&mut chance).await;
            }
        }
    }

    let server = site.start();
    let api = server.api();
    for way in &mut ways {
        way.begin_round(&server).await;
        way.phone.attached(&api).await;
    }
    away.attach(&server, &api).await;
    let promises = publisher.promises.lock().unwrap().clone();
    assert!(
        promises.len() as u64 > rounds,
        "there was load: {} promises",
        promises.len()
    );
    let everybody = || ways.iter().map(|way| &way.phone).chain([&away]);
    for phone in everybody() {
        eventually(
            &format!(
                "the mailbox of {} is drained within {PATIENCE:?}",
                phone.id()
            ),
            async || {
                let waits = promises
                    .iter()
                    .filter(|(_, promise)| promise.device == phone.id());
                let given: BTreeSet<String> = phone.ledger.ids().into_iter().collect();
                let mut all_told = true;
                for (id, _) in waits.filter(|(id, _)| !given.contains(*id)) {
                    all_told &= outcome(&api, id)
                        .await
                        .is_some_and(|outcome| outcome != "waiting");
                }
                all_told.then_some(())
            },
        )
        .await;
    }

    let mut lost = Vec::new();
    let nothing = Vec::new();
    let unsaved = ways.iter().map(|way| &way.unsaved).chain([&nothing]);
    for (phone, unsaved) in everybody().zip(unsaved) {
        let ids = phone.ledger.ids();
        let given: BTreeSet<&String> = ids.iter().collect();
        let mut times = BTreeMap::<&String, usize>::new();
        for id in &ids {
            *times.entry(id).or_default() += 1;
        }
        for (id, times) in times {
            let may_be = 1 + unsaved.iter().filter(|one| *one == id).count();
            assert!(
                times <= may_be,
                "{} was told {id} {times} times, and its app crashed {} times before its disk knew",
                phone.id(),
                may_be - 1
            );
        }
        for (id, promise) in promises
            .iter()
            .filter(|(_, promise)| promise.device == phone.id())
        {
            if given.contains(id) {
                continue;
            }
            let outcome = outcome(&api, id).await;
            let truthful = match outcome.as_deref() {
                Some("replaced") => promise.collapse,
                Some("expired") => promise.short,
                _ => false,
            };
            if !truthful {
                lost.push((id.clone(), promise.clone(), outcome));
            }
        }
    }
    assert!(
        lost.is_empty(),
        "{} promises of {} were not kept, such as {:?}",
        lost.len(),
        promises.len(),
        lost[0]
    );
    eprintln!("{} promises kept over {rounds} kills", promises.len());
    for phone in ways.iter_mut().map(|way| &mut way.phone).chain([&mut away]) {
        phone.crash().await;
    }
}

/// How a ping's only device stands: `waiting`, an outcome, or `None` when it is not known any more.
async fn outcome(api: &Api, id: &str) -> Option<String> {
    let answer = api.get(&format!("/v1/pings/{id}")).await;
    if answer.status == 404 {
        return None;
    }
    let view = answer.expect(200);
    let device = &view["devices"].as_array().unwrap()[0];
    device["state"].as_str().map(str::to_owned)
}
