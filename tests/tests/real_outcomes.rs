//! How notifications ended, asked of the real binary by ping, by device, by user and by time: over restarts, kills, drops by
//! size, a torn end and rot.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;

use bellwire_client::Verdict;
use bellwire_tests::real::{Api, Phone, Server, Site, Way, eventually};
use http::StatusCode;
use serde_json::{Value, json};

/// Every page of a list.
async fn walk(api: &Api, path: &str) -> Vec<Value> {
    walk_on(api, path, String::new()).await
}

/// Every page of a list from `next` on.
async fn walk_on(api: &Api, path: &str, mut next: String) -> Vec<Value> {
    let mut all = Vec::new();
    loop {
        let page = api.get(&format!("{path}{next}")).await.expect(200);
        all.extend(page["outcomes"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(cursor) => next = format!("&after={cursor}"),
            None => return all,
        }
    }
}

/// Ping to outcome.
fn endings(list: &[Value]) -> BTreeMap<String, String> {
    let found: BTreeMap<String, String> = list
        .iter()
        .map(|one| {
            let text = |name: &str| one[name].as_str().unwrap().to_owned();
            (text("ping"), text("outcome"))
        })
        .collect();
    assert_eq!(found.len(), list.len(), "each is listed once: {list:?}");
    found
}

async fn ping(api: &Api, device: &str, more: Value) -> String {
    let mut body = json!({ "to": { "device": device } });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let answer = api.post("/v1/pings", body).await;
    assert!(answer.status.is_success(), "{}", answer.text);
    answer.id()
}

/// What the server says of a ping to one device; `None`: not retained.
async fn state(api: &Api, id: &str) -> Option<String> {
    let answer = api.get(&format!("/v1/pings/{id}")).await;
    if answer.status == StatusCode::NOT_FOUND {
        assert_eq!(answer.code(), "ping_not_retained");
        return None;
    }
    let view = answer.expect(200);
    let state = view["devices"][0]["state"].as_str().unwrap();
    Some(state.to_owned())
}

/// Waits until the list has all of these, and nothing else.
async fn listed(api: &Api, wanted: &BTreeMap<String, String>) {
    let what = format!("{} outcomes are listed", wanted.len());
    eventually(&what, async || {
        let found = endings(&walk(api, "/v1/outcomes?limit=1000").await);
        (found == *wanted).then_some(())
    })
    .await;
}

/// Runs `bellwire` and answers with its exit code and what it wrote.
fn run(site: &Site, arguments: &[&str]) -> (i32, String) {
    let output = site.command().args(arguments).output().unwrap();
    let mut said = String::from_utf8(output.stdout).unwrap();
    said.push_str(&String::from_utf8(output.stderr).unwrap());
    (output.status.code().unwrap(), said)
}

fn json_of(site: &Site, arguments: &[&str]) -> Value {
    let (code, said) = run(site, arguments);
    assert_eq!(code, 0, "{said}");
    serde_json::from_str(&said).unwrap()
}

/// The files of the history with this ending, oldest first.
fn files(site: &Site, ending: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = fs::read_dir(site.data().join("outcomes"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_string_lossy().ends_with(ending))
        .collect();
    files.sort();
    files
}

/// Makes outcomes of several kinds; by ping.
async fn story(api: &Api, here: &Phone, away: &str) -> BTreeMap<String, String> {
    let mut wanted = BTreeMap::new();
    for _ in 0..8 {
        let body = json!({ "to": { "device": here.id() }, "ttl_s": 0 });
        let path = "/v1/pings?wait=acknowledged&timeout_s=30";
        let answer = api.post(path, body).await.expect(200);
        assert_eq!(answer["outcomes"][0]["state"], "acknowledged", "{answer}");
        wanted.insert(
            answer["id"].as_str().unwrap().to_owned(),
            "acknowledged".to_owned(),
        );
    }
    for _ in 0..4 {
        let id = ping(api, away, json!({ "ttl_s": 0 })).await;
        wanted.insert(id, "expired".to_owned());
        let id = ping(api, away, json!({})).await;
        let revoked = api.delete(&format!("/v1/pings/{id}")).await.expect(200);
        assert_eq!(revoked["revoked"], 1);
        wanted.insert(id, "revoked".to_owned());
    }
    let replaced = ping(api, away, json!({ "collapse": "k" })).await;
    let waits = ping(api, away, json!({ "collapse": "k" })).await;
    wanted.insert(replaced, "replaced".to_owned());
    assert_eq!(state(api, &waits).await.unwrap(), "waiting");
    wanted
}

async fn all_is_told(
    site: &Site,
    api: &Api,
    here: &str,
    away: &str,
    wanted: &BTreeMap<String, String>,
) {
    listed(api, wanted).await;
    for (id, outcome) in wanted {
        assert_eq!(state(api, id).await.as_ref(), Some(outcome));
    }
    // Small pages, in both orders, by device and by user: the same.
    let newest = walk(api, "/v1/outcomes?limit=3").await;
    let mut oldest = walk(api, "/v1/outcomes?limit=3&order=oldest").await;
    oldest.reverse();
    assert_eq!(newest, oldest);
    let mut by_device = endings(&walk(api, &format!("/v1/devices/{here}/outcomes?limit=3")).await);
    assert!(by_device.values().all(|outcome| outcome == "acknowledged"));
    assert_eq!(by_device.len() % 8, 0);
    let of_ann = endings(&walk(api, "/v1/outcomes?user=ann&limit=2").await);
    assert_eq!(of_ann, by_device);
    by_device.extend(endings(
        &walk(
            api,
            &format!("/v1/devices/{away}/outcomes?limit=3&order=oldest"),
        )
        .await,
    ));
    assert_eq!(by_device, *wanted);
    let revoked = walk(api, "/v1/outcomes?outcome=revoked&limit=3").await;
    let count = wanted
        .values()
        .filter(|outcome| *outcome == "revoked")
        .count();
    assert_eq!(endings(&revoked).len(), count);
    // By time: both halves are the whole.
    let middle = newest[newest.len() / 2]["at_ms"].as_u64().unwrap();
    let late = walk(api, &format!("/v1/outcomes?from_ms={middle}&limit=3")).await;
    let early = walk(api, &format!("/v1/outcomes?to_ms={middle}&limit=3")).await;
    assert!(
        !late.is_empty()
            && late
                .iter()
                .all(|one| one["at_ms"].as_u64().unwrap() >= middle)
    );
    let both: Vec<Value> = late.into_iter().chain(early).collect();
    assert_eq!(endings(&both), *wanted);
    // The command line says the same.
    let whole = json_of(site, &["outcomes", "--limit", "1000", "--json"]);
    assert_eq!(whole, json!({ "outcomes": newest, "next": null }));
    let first = json_of(site, &["outcomes", "--limit", "5", "--json"]);
    let next = first["next"].as_str().unwrap();
    let second = json_of(
        site,
        &["outcomes", "--limit", "1000", "--after", next, "--json"],
    );
    let parts = [&first, &second].map(|part| part["outcomes"].as_array().unwrap().clone());
    assert_eq!(parts.concat(), newest);
    let of_device = [
        "outcomes",
        "--device",
        away,
        "--outcome",
        "expired",
        "--from",
        "1h",
        "--json",
    ];
    let expired = json_of(site, &of_device);
    assert!(!expired["outcomes"].as_array().unwrap().is_empty());
    let id = newest[0]["ping"].as_str().unwrap();
    let one = json_of(site, &["outcomes", "--ping", id, "--json"]);
    assert_eq!(one["devices"][0]["state"], newest[0]["outcome"]);
    let (code, table) = run(site, &["outcomes", "--limit", "2"]);
    assert_eq!((code, table.lines().count()), (0, 4), "{table}");
    assert!(table.contains(id) && table.contains("--after n"), "{table}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_outcome_is_told_by_ping_device_user_and_time_over_restarts_and_kills() {
    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut here = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    let (away, _) = api.device("ben").await;
    here.attach(&server, &api).await;
    let mut wanted = story(&api, &here, &away).await;
    all_is_told(&site, &api, &here.id(), &away, &wanted).await;

    // A walk under way does not mind what comes.
    let page = api.get("/v1/outcomes?limit=4").await.expect(200);
    let mut met = page["outcomes"].as_array().unwrap().clone();
    let more = story(&api, &here, &away).await;
    let both = wanted.clone().into_iter().chain(more);
    let both: BTreeMap<String, String> = both.collect();
    // The second story replaced what waited of the first.
    eventually("the second story is listed", async || {
        let found = endings(&walk(&api, "/v1/outcomes?limit=1000").await);
        (found.len() == both.len() + 1).then_some(())
    })
    .await;
    let next = page["next"].as_str().unwrap();
    met.extend(walk_on(&api, "/v1/outcomes?limit=4", format!("&after={next}")).await);
    assert_eq!(endings(&met), wanted);
    wanted = endings(&walk(&api, "/v1/outcomes?limit=1000").await);
    assert!(
        both.iter()
            .all(|(id, outcome)| wanted.get(id) == Some(outcome))
    );

    // What is listed is written: neither a stop in order nor a kill loses it.
    assert!(server.stop().await.success());
    here.leave().await;
    let server = site.start();
    all_is_told(&site, &server.api(), &here.id(), &away, &wanted).await;
    here.start(&server, |_| Verdict::Decline("no".to_owned()))
        .await;
    here.attached(&server.api()).await;
    let declined = ping(&server.api(), &here.id(), json!({})).await;
    eventually("it is declined", async || {
        let state = state(&server.api(), &declined).await.unwrap();
        (state == "declined").then_some(())
    })
    .await;
    // The outcome of a stored one is in the log: it comes back although nobody waited for the history.
    server.kill();
    here.leave().await;
    let server = site.start();
    let told = state(&server.api(), &declined).await;
    assert!(matches!(
        told.as_deref(),
        Some("declined" | "waiting") | None
    ));
    server.kill();
    let server = site.start();
    let api = server.api();
    for (id, outcome) in &wanted {
        assert_eq!(state(&api, id).await.as_ref(), Some(outcome));
    }
    let found = endings(&walk(&api, "/v1/outcomes?limit=7").await);
    assert!(
        wanted
            .iter()
            .all(|(id, outcome)| found.get(id) == Some(outcome))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_durable_outcome_that_was_told_survives_a_kill_at_once() {
    let mut site = Site::new().with("RECEIPTS__DURABLE", "true");
    let server = site.start();
    let api = server.api();
    let mut phone = Phone::register(&server, &api, site.dir(), "ann", Way::WebSocket).await;
    server.kill();
    let tell = async |server: &Server, phone: &mut Phone| {
        let api = server.api();
        phone.attach(server, &api).await;
        let body = json!({ "to": { "device": phone.id() }, "ttl_s": 0 });
        let path = "/v1/pings?wait=acknowledged&timeout_s=30";
        let answer = api.post(path, body).await.expect(200);
        assert_eq!(answer["outcomes"][0]["state"], "acknowledged");
        answer["id"].as_str().unwrap().to_owned()
    };
    let mut told = BTreeSet::new();
    for _ in 0..4 {
        let server = site.start();
        told.insert(tell(&server, &mut phone).await);
        server.kill();
        phone.leave().await;
    }
    let server = site.start();
    let api = server.api();
    for id in &told {
        assert_eq!(state(&api, id).await.as_deref(), Some("acknowledged"));
    }
    // And it is in the lists again: the engine knew it, the history learned it at the start.
    eventually("all of them are listed", async || {
        let listed = endings(&walk(&api, "/v1/outcomes?user=ann&limit=1000").await);
        told.iter()
            .all(|id| {
                listed
                    .get(id)
                    .is_some_and(|outcome| outcome == "acknowledged")
            })
            .then_some(())
    })
    .await;
    server.kill();

    // Without it, the last second may be forgotten, and then it is said to be.
    site.set("RECEIPTS__DURABLE", "false");
    let server = site.start();
    let id = tell(&server, &mut phone).await;
    server.kill();
    phone.leave().await;
    let server = site.start();
    let known = state(&server.api(), &id).await;
    assert!(
        matches!(known.as_deref(), None | Some("acknowledged")),
        "{known:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn above_their_size_the_oldest_are_dropped_and_said_not_to_be_retained() {
    let site = Site::new().with("RECEIPTS__MAX_BYTES", "1MiB");
    let server = site.start();
    let api = server.api();
    for _ in 0..50 {
        api.device("crowd").await;
    }
    // Nobody is there, so each is fifty outcomes at once, and none of them touches the disk.
    let mut ids = Vec::new();
    for _ in 0..400 {
        let body = json!({ "to": { "user": "crowd" }, "ttl_s": 0 });
        let answer = api.post("/v1/pings", body).await.expect(202);
        ids.push(answer["id"].as_str().unwrap().to_owned());
    }
    let size = async |api: &Api| api.get("/v1/status").await.expect(200)["history"].clone();
    eventually("all are written and the oldest dropped", async || {
        let history = size(&api).await;
        let metrics = api.operations("/metrics").await.text;
        let written = metrics.contains("bellwire_history_written_total 20000");
        (written && history["records"].as_u64().unwrap() < 16_000).then_some(())
    })
    .await;
    let history = size(&api).await;
    // A segment is dropped when the next one is begun.
    assert!(
        history["bytes"].as_u64().unwrap() <= (1 << 20) + (128 << 10),
        "{history}"
    );
    assert!(history["segments"].as_u64().unwrap() > 4, "{history}");
    assert_eq!(
        (&history["lost"], &history["unreadable"]),
        (&json!(0), &json!(0))
    );
    assert!(server.stop().await.success());
    let server = site.start();
    let api = server.api();
    assert_eq!(state(&api, &ids[0]).await, None);
    assert_eq!(
        state(&api, ids.last().unwrap()).await.as_deref(),
        Some("expired")
    );
    let left = walk(&api, "/v1/outcomes?limit=1000&order=oldest").await;
    assert_eq!(
        left.len() as u64,
        size(&api).await["records"].as_u64().unwrap()
    );
    let last = left.last().unwrap();
    assert_eq!(last["ping"], *ids.last().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_torn_end_is_nothing_and_rot_costs_the_outcome_it_hits_and_is_told() {
    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let (away, _) = api.device("ben").await;
    let mut wanted = BTreeMap::new();
    for _ in 0..20 {
        let id = ping(&api, &away, json!({ "ttl_s": 0 })).await;
        wanted.insert(id, "expired".to_owned());
    }
    listed(&api, &wanted).await;
    server.kill();
    // Half a record at the end, and zeros: what a crash of the machine leaves.
    let last = files(&site, ".out").pop().unwrap();
    let mut bytes = fs::read(&last).unwrap();
    assert_eq!(bytes.len(), 64 + 20 * 64);
    bytes.extend([0xab; 40]);
    bytes.extend([0; 200]);
    fs::write(&last, &bytes).unwrap();
    let server = site.start();
    let api = server.api();
    listed(&api, &wanted).await;
    for id in wanted.keys() {
        assert_eq!(state(&api, id).await.as_deref(), Some("expired"));
    }
    let history = api.get("/v1/status").await.expect(200)["history"].clone();
    assert_eq!(history["unreadable"], 0, "{history}");
    assert!(server.stop().await.success());
    let (code, said) = run(&site, &["store", "verify"]);
    assert_eq!(code, 0, "{said}");

    let mut bytes = fs::read(&last).unwrap();
    bytes[64 + 7 * 64 + 20] ^= 1;
    fs::write(&last, &bytes).unwrap();
    let name = last.file_name().unwrap().to_str().unwrap();
    let (code, said) = run(&site, &["store", "verify"]);
    assert_eq!(code, 1);
    assert!(
        said.contains(name) && said.contains("1 outcomes in it cannot be read"),
        "{said}"
    );
    let (code, said) = run(&site, &["store", "inspect"]);
    assert!(code == 0 && said.contains("outcomes"), "{said}");
    let server = site.start();
    let api = server.api();
    let left = endings(&walk(&api, "/v1/outcomes?limit=6").await);
    assert_eq!(left.len(), 19);
    assert!(left.keys().all(|id| wanted.contains_key(id)));
    let lost: Vec<&String> = wanted.keys().filter(|id| !left.contains_key(*id)).collect();
    assert_eq!(state(&api, lost[0]).await, None);
    let history = api.get("/v1/status").await.expect(200)["history"].clone();
    assert_eq!(history["unreadable"], 1, "{history}");
    assert!(server.log().contains(name), "{}", server.log());

    // An index is only a help.
    assert!(server.stop().await.success());
    for index in files(&site, ".idx") {
        fs::write(index, b"nothing of the kind").unwrap();
    }
    let server = site.start();
    let api = server.api();
    for id in left.keys() {
        assert_eq!(state(&api, id).await.as_deref(), Some("expired"));
    }
    assert_eq!(
        endings(&walk(&api, &format!("/v1/devices/{away}/outcomes?limit=5")).await),
        left
    );
}
