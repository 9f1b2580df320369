//! Devices that change hands and secrets, and users that are erased, with the real binary: across crashes and restores.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::fs;
use std::process::{Command, Output};
use std::time::Duration;

use bellwire_client::Verdict;
use bellwire_tests::real::{Answer, Api, Phone, Site, Way, binary, eventually};
use http::Method;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

fn bellwire(arguments: &[&str]) -> Output {
    Command::new(binary("bellwire"))
        .args(arguments)
        .output()
        .unwrap()
}

/// The owners in turn.
const USERS: [&str; 2] = ["ana", "ben"];

/// What the publisher knows at the moment of a crash.
#[derive(Default)]
struct Known {
    /// The owner of whom it was told.
    owner: usize,
    /// What was promised to that owner since.
    promised: Vec<String>,
    /// It asked for a change to the other one and was not answered.
    asked: bool,
}

async fn batch(api: &Api, lines: &str) -> Option<Answer> {
    let headers = [("content-type", "application/x-ndjson")];
    let request = api.request(Method::POST, "/v1/pings/batch", &headers, lines);
    api.try_send(request).await
}

/// Gives the device to and fro, and sends to each owner in batches, until the server is gone.
async fn give_and_send(api: &Api, device: &str, known: &mut Known) {
    let path = format!("/v1/devices/{device}");
    for turn in 0.. {
        let next = (known.owner + 1) % USERS.len();
        let change = json!({"user": USERS[next]}).to_string();
        known.asked = true;
        let request = api.request(Method::PATCH, &path, &[], &change);
        let Some(answer) = api.try_send(request).await else {
            return;
        };
        assert_eq!(answer.expect(200)["user"], USERS[next]);
        *known = Known {
            owner: next,
            ..Known::default()
        };
        let lines: String = (0..40)
            .map(|number| {
                // To both: what is for the other one must not come here.
                let user = USERS[(next + number) % 2];
                let body = format!("{user} {turn} {number}");
                format!("{}\n", json!({"to": {"user": user}, "body": body}))
            })
            .collect();
        let Some(answer) = batch(api, &lines).await else {
            return;
        };
        for line in answer.text.lines() {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["status"], 202, "{line}");
            if line["devices"] == 1 {
                known.promised.push(line["id"].as_str().unwrap().to_owned());
            }
        }
        assert_eq!(known.promised.len(), 20);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_changes_hands_while_the_server_is_killed_never_has_what_was_for_another() {
    for (seed, engine) in [(11, "sled"), (12, "fjall")] {
        let site = Site::new().with("STORE__ENGINE", engine);
        let phones = tempfile::tempdir().unwrap();
        let mut chance = StdRng::seed_from_u64(seed);
        let mut server = site.start();
        let mut api = server.api();
        let key = api.key().to_owned();
        let mut phone =
            Phone::register(&server, &api, phones.path(), USERS[0], Way::WebSocket).await;
        let mut changed_unanswered = 0;
        for round in 0..6 {
            let mut known = Known {
                owner: owner(&api, &phone).await,
                ..Known::default()
            };
            let alive = Duration::from_millis(chance.random_range(30..400));
            let device = phone.id();
            let load = give_and_send(&api, &device, &mut known);
            let killed = async {
                tokio::time::sleep(alive).await;
                server.kill();
            };
            tokio::join!(load, killed);
            server = site.start();
            api = Api::new(server.listen().api, server.listen().operations, &key);
            let now = owner(&api, &phone).await;
            assert!(
                now == known.owner || known.asked,
                "{engine} {round}: an answered change is lost"
            );
            let of_others = api
                .get(&format!("/v1/users/{}", USERS[(now + 1) % 2]))
                .await
                .expect(200);
            assert_eq!(of_others["devices"], json!([]), "on one list only");

            let before = phone.ledger.bodies().len();
            phone.attach(&server, &api).await;
            let path = format!("/v1/devices/{device}");
            eventually("the mailbox is empty", async || {
                (api.get(&path).await.expect(200)["waiting"] == 0).then_some(())
            })
            .await;
            let bodies = phone.ledger.bodies();
            for body in &bodies[before..] {
                assert!(
                    body.starts_with(USERS[now]),
                    "{engine} {round}: {} was given {body}",
                    USERS[now]
                );
            }
            if now == known.owner {
                let given = phone.ledger.ids();
                for id in &known.promised {
                    assert!(
                        given[before..].contains(id),
                        "{engine} {round}: {id} is lost"
                    );
                }
            } else {
                changed_unanswered += 1;
            }
            phone.leave().await;
        }
        println!("{engine}: {changed_unanswered} changes were done and not answered");
        server.stop().await;
    }
}

/// Which of the two owns the device.
async fn owner(api: &Api, phone: &Phone) -> usize {
    let shown = api.get(&format!("/v1/devices/{}", phone.id())).await;
    let user = shown.expect(200)["user"].clone();
    USERS.iter().position(|known| user == *known).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_secrets_of_a_rotation_and_its_end_survive_a_crash() {
    let site = Site::new();
    let phones = tempfile::tempdir().unwrap();
    let server = site.start();
    let api = server.api();
    let key = api.key().to_owned();
    let mut old = Phone::register(&server, &api, phones.path(), "ana", Way::Quic).await;
    let path = format!("/v1/devices/{}/secret", old.id());
    let rotated = api
        .post(&path, json!({"overlap_s": 3600}))
        .await
        .expect(200);
    server.kill();
    let server = site.start();
    let api = Api::new(server.listen().api, server.listen().operations, &key);
    old.attach(&server, &api).await;
    let shown = api
        .get(&format!("/v1/devices/{}", old.id()))
        .await
        .expect(200);
    assert_eq!(shown["last_seen"]["carrier"], "quic");
    assert!(shown["last_seen"]["agent"].is_string());
    old.leave().await;
    old.set_secret(rotated["secret"].as_str().unwrap());
    old.attach(&server, &api).await;
    // A stolen secret: it ends with its session, and stays ended.
    let last = api.post(&path, json!({"overlap_s": 0})).await.expect(200);
    eventually("the session is cut", async || {
        let shown = api.get(&format!("/v1/devices/{}", old.id())).await;
        shown.json()["attached"].is_null().then_some(())
    })
    .await;
    old.leave().await;
    server.kill();
    let server = site.start();
    let api = Api::new(server.listen().api, server.listen().operations, &key);
    old.start(&server, |_| Verdict::Acknowledge).await;
    eventually("the ended secret is refused", async || {
        let events = old.ledger.events().join(" ");
        let refused = events.contains("unauthorized") || events.contains("Unauthorized");
        refused.then_some(())
    })
    .await;
    old.leave().await;
    old.set_secret(last["secret"].as_str().unwrap());
    old.attach(&server, &api).await;
    old.leave().await;
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_erased_user_stays_erased_when_an_older_backup_is_restored() {
    let site = Site::new();
    let place = tempfile::tempdir().unwrap();
    let server = site.start();
    let api = server.api();
    let mut of_ana = Vec::new();
    for _ in 0..3 {
        of_ana.push(api.device("ana").await.0);
    }
    let (of_ben, _) = api.device("ben").await;
    for user in USERS {
        let ping = json!({"to": {"user": user}, "body": user});
        let _ = api.post("/v1/pings", ping).await.expect(202);
    }
    let at = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let data = site.data().to_str().unwrap().to_owned();
    let back_up = |name: &str| {
        let file = at(name);
        let taken = tokio::task::block_in_place(|| {
            bellwire(&["backup", "--data-dir", &data, "--to", &file])
        });
        assert!(taken.status.success(), "{taken:?}");
        file
    };
    let older = back_up("older.backup");
    // A device that came to her after the backup, and one that she gave away before she was erased.
    let (later, _) = api.device("ben").await;
    let path = format!("/v1/devices/{later}");
    let _ = api
        .call(Method::PATCH, &path, &json!({"user": "ana"}))
        .await
        .expect(200);
    let path = format!("/v1/devices/{}", of_ana[0]);
    let _ = api
        .call(Method::PATCH, &path, &json!({"user": "ben"}))
        .await
        .expect(200);
    let _ = api.delete("/v1/users/ana").await.expect(204);
    // The name is good for somebody new.
    let (fresh, _) = api.device("ana").await;
    let newer = back_up("newer.backup");
    // Killed, so that only what was promised is there.
    server.kill();

    let restore = |from: &str, to: &str| {
        let hash_key = site.data().join("hash.key");
        let done = bellwire(&[
            "restore",
            "--from",
            from,
            "--data-dir",
            to,
            "--hash-key",
            hash_key.to_str().unwrap(),
            "--erasures",
            &data,
        ]);
        assert!(done.status.success(), "{done:?}");
    };
    for (from, name, expected) in [
        (&older, "from-older", vec![]),
        (&newer, "from-newer", vec![fresh.clone()]),
    ] {
        let to = at(name);
        restore(from, &to);
        let next = Site::new().with_data(&to);
        let server = next.start();
        let restored = Api::new(server.listen().api, server.listen().operations, api.key());
        let shown = restored.get("/v1/users/ana").await.expect(200);
        let devices: Vec<String> = shown["devices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|device| device["device"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(devices, expected, "{name}");
        for gone in of_ana.iter().skip(1) {
            let answer = restored.get(&format!("/v1/devices/{gone}")).await;
            assert_eq!(answer.status.as_u16(), 404, "{name}");
        }
        let ben = restored
            .get(&format!("/v1/devices/{of_ben}"))
            .await
            .expect(200);
        assert_eq!((&ben["user"], &ben["waiting"]), (&json!("ben"), &json!(1)));
        server.stop().await;
    }
    // What stays of her is a hash: her name is in no note of an erasure.
    let erasures = fs::read_dir(site.data()).unwrap().filter_map(Result::ok);
    for file in erasures.filter(|entry| entry.file_name() == "erasures") {
        let bytes = fs::read(file.path()).unwrap();
        assert!(!bytes.windows(3).any(|three| three == b"ana"));
    }
}
