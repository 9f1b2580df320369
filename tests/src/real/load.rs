//! Load on a real server, and whether what it was promised was kept.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

use super::{Answer, Api, PATIENCE, Phone, eventually};

/// Pings for the device that is away: fewer than its mailbox holds, so that eviction never explains a loss.
const ABSENT_MAX: u64 = 900;

/// What a publisher was promised: which device, and whether the notification may rightly end without delivery.
#[derive(Debug, Clone)]
pub struct Promise {
    device: String,
    collapse: Option<String>,
    short: bool,
}

/// Publishes until told to stop. Each ping has its own idempotency key; one that got no answer is tried again as it
/// was, by the next round's publisher, like a careful backend does.
pub struct Publisher {
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
    /// For these devices; the last one is away until the end, and gets no more than its mailbox holds.
    #[must_use]
    pub fn new(devices: Vec<String>) -> Arc<Publisher> {
        Arc::new(Publisher {
            devices,
            counter: AtomicU64::new(0),
            for_the_absent: AtomicU64::new(0),
            promises: Mutex::default(),
            open: Mutex::default(),
        })
    }

    fn promises(&self) -> MutexGuard<'_, BTreeMap<String, Promise>> {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> MutexGuard<'_, Vec<(String, String, Promise)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many promises there are.
    #[must_use]
    pub fn promised(&self) -> usize {
        self.promises().len()
    }

    /// Some of them at once, until told to stop.
    #[must_use]
    pub fn begin(self: &Arc<Self>, api: &Api, seed: u64) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let tasks = (0..4)
            .map(|n| {
                let (publisher, api, stop) = (Arc::clone(self), api.clone(), Arc::clone(&stop));
                tokio::spawn(async move { publisher.publish(&api, seed * 4 + n, &stop).await })
            })
            .collect();
        Load { stop, tasks }
    }

    async fn publish(&self, api: &Api, seed: u64, stop: &AtomicBool) {
        let mut chance = StdRng::seed_from_u64(seed);
        while !stop.load(Ordering::Relaxed) {
            let again = self.open().pop();
            let (key, body, promise) = again.unwrap_or_else(|| self.invent(&mut chance));
            let headers = [("idempotency-key", key.as_str())];
            let answer = api
                .try_send(api.request(Method::POST, "/v1/pings", &headers, &body))
                .await;
            match answer {
                Some(answer) if answer.status.is_success() => {
                    self.promises().insert(answer.id(), promise);
                }
                // Killed, draining, busy, failed or full: nothing was promised.
                Some(answer) => {
                    assert!(
                        answer.status.is_server_error(),
                        "{} {}",
                        answer.status,
                        answer.text
                    );
                    self.open().push((key, body, promise));
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                None => {
                    self.open().push((key, body, promise));
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
        let collapse = chance.random_bool(0.1).then(|| format!("k{}", number % 3));
        let short = chance.random_bool(0.05);
        let mut body = json!({ "to": { "device": device }, "body": format!("n{number}") });
        if let Some(key) = &collapse {
            body["collapse"] = json!(key);
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

    /// Publishes so many pings of this length to one device.
    ///
    /// # Panics
    ///
    /// When one of them is refused.
    pub async fn fill(self: &Arc<Self>, api: &Api, device: &str, count: usize, length: usize) {
        let tasks: Vec<_> = (0..8)
            .map(|task| {
                let (publisher, api, device) = (Arc::clone(self), api.clone(), device.to_owned());
                tokio::spawn(async move {
                    for _ in (task..count).step_by(8) {
                        let answer = publisher.one(&api, &device, length).await;
                        assert!(answer.status.is_success(), "{}", answer.text);
                    }
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("it was promised");
        }
    }

    /// Publishes one ping of this length, and remembers what was promised.
    pub async fn one(&self, api: &Api, device: &str, length: usize) -> Answer {
        let number = self.counter.fetch_add(1, Ordering::Relaxed);
        let body = format!("n{number} {}", "x".repeat(length));
        let ping = json!({ "to": { "device": device }, "body": body });
        let answer = api.post("/v1/pings", ping).await;
        if answer.status.is_success() {
            let promise = Promise {
                device: device.to_owned(),
                collapse: None,
                short: false,
            };
            self.promises().insert(answer.id(), promise);
        }
        answer
    }

    /// Waits until nothing waits any more for these devices, which are attached. Then every promise was kept: delivered, or
    /// ended in a way that its publisher asked for.
    ///
    /// # Panics
    ///
    /// When one was not.
    pub async fn kept(&self, api: &Api, phones: &[&Phone]) {
        let promises = self.promises().clone();
        for phone in phones {
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
                        all_told &= outcome(api, id)
                            .await
                            .is_none_or(|outcome| outcome != "waiting");
                    }
                    all_told.then_some(())
                },
            )
            .await;
        }
        let mut lost = Vec::new();
        for phone in phones {
            let given: BTreeSet<String> = phone.ledger.ids().into_iter().collect();
            let replaced = |promise: &Promise| {
                promise.collapse.is_some()
                    && given.iter().filter_map(|id| promises.get(id)).any(|other| {
                        other.device == promise.device && other.collapse == promise.collapse
                    })
            };
            let of_phone = promises
                .iter()
                .filter(|(id, promise)| promise.device == phone.id() && !given.contains(*id));
            for (id, promise) in of_phone {
                let outcome = outcome(api, id).await;
                let truthful = match outcome.as_deref() {
                    Some("replaced") => promise.collapse.is_some(),
                    Some("expired") => promise.short,
                    Some(_) => false,
                    // What ended before it was ever written has its outcome in memory only, and a kill takes that along. It
                    // rightly ended if its time was short, or if another one of its key came through.
                    None => promise.short || replaced(promise),
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
    }
}

/// Publishers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    /// Stops them.
    ///
    /// # Panics
    ///
    /// When one of them was told something that it should not have been told.
    pub async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("publishers are refused only by 5xx");
        }
    }
}

/// How a ping's only device stands: `waiting`, an outcome, or `None` when it is not known any more.
async fn outcome(api: &Api, id: &str) -> Option<String> {
    let answer = api.get(&format!("/v1/pings/{id}")).await;
    if answer.status == 404 {
        return None;
    }
    let view = answer.expect(200);
    let device = view["devices"].get(0)?;
    device["state"].as_str().map(str::to_owned)
}
