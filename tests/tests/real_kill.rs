//! `kill -9` at random moments under load: what was promised is kept, and no app is told twice.
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
use bellwire_tests::real::{Api, PATIENCE, Phone, Site, Way, eventually};
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

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_kill_nine_and_no_app_is_told_twice() {
    let rounds = setting("BELLWIRE_KILL_ROUNDS").unwrap_or(50);
    let seed = setting("BELLWIRE_KILL_SEED").unwrap_or_else(rand::random);
    eprintln!("BELLWIRE_KILL_SEED={seed}, {rounds} rounds");
    let mut chance = StdRng::seed_from_u64(seed);

    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut phones = Vec::new();
    for way in Way::ALL {
        phones.push(Phone::register(&server, &api, site.dir(), "ann", way).await);
    }
    // One device that is away all the time, until the end.
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    let devices = phones.iter().chain([&away]).map(Phone::id).collect();
    let publisher = Arc::new(Publisher {
        devices,
        counter: AtomicU64::new(0),
        for_the_absent: AtomicU64::new(0),
        promises: Mutex::default(),
        open: Mutex::default(),
    });
    server.kill();

    for round in 0..rounds {
        let server = site.start();
        let api = server.api();
        for phone in &mut phones {
            phone.start(&server, |_| Verdict::Acknowledge).await;
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
        tokio::time::sleep(Duration::from_millis(chance.random_range(20..400))).await;
        server.kill();
        stop.store(true, Ordering::Relaxed);
        for publisher in publishers {
            publisher.await.unwrap();
        }
        // Each round's server has other ports; what the app was given is remembered in the client's directory.
        for phone in &mut phones {
            phone.leave().await;
        }
    }

    let server = site.start();
    let api = server.api();
    for phone in phones.iter_mut().chain([&mut away]) {
        phone.attach(&server, &api).await;
    }
    let promises = publisher.promises.lock().unwrap().clone();
    assert!(
        promises.len() as u64 > rounds,
        "there was load: {} promises",
        promises.len()
    );
    let everybody = || phones.iter().chain([&away]);
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
    for phone in everybody() {
        let ids = phone.ledger.ids();
        let given: BTreeSet<&String> = ids.iter().collect();
        assert_eq!(
            given.len(),
            ids.len(),
            "{} was told something twice",
            phone.id()
        );
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
    for phone in phones.iter_mut().chain([&mut away]) {
        phone.leave().await;
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
