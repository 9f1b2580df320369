//! Pings to everyone, with the real binary, killed while they are on their way: everybody gets each once, in order, and
//! nobody who came later.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bellwire_tests::real::{Api, Phone, Proxy, Server, Site, Way, eventually};
use futures_util::future::join_all;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use serde_json::json;

/// Devices that are away: more than a page of the expansion.
const AWAY: usize = 2_500;

async fn crowd(api: &Api) -> BTreeSet<String> {
    let mut ids = BTreeSet::new();
    while ids.len() < AWAY {
        let made = join_all((0..50).map(|_| api.device("crowd"))).await;
        ids.extend(made.into_iter().map(|(id, _)| id));
    }
    ids
}

async fn everyone(api: &Api, body: &str) -> String {
    let ping = json!({"to": {"everyone": true}, "body": body});
    api.post("/v1/pings", ping).await.expect(202)["id"]
        .as_str()
        .unwrap()
        .to_owned()
}

/// What is known of a ping once it has reached its audience: the state of each device.
async fn reached(api: &Api, id: &str) -> BTreeMap<String, String> {
    let path = format!("/v1/pings/{id}");
    eventually("the ping reaches its audience", async || {
        let look = api.get(&format!("{path}?limit=1")).await.expect(200);
        look["expanding"].is_null().then_some(())
    })
    .await;
    let mut states = BTreeMap::new();
    let mut after = String::new();
    loop {
        let page = api.get(&format!("{path}?limit=1000{after}")).await;
        let page = page.expect(200);
        for pair in page["devices"].as_array().unwrap() {
            let device = pair["device"].as_str().unwrap().to_owned();
            let state = pair["state"].as_str().unwrap().to_owned();
            assert!(
                states.insert(device, state).is_none(),
                "a device is told twice"
            );
        }
        match page["next"].as_str() {
            Some(next) => after = format!("&after={next}"),
            None => return states,
        }
    }
}

fn again(site: &Site, key: &str) -> (Server, Api) {
    let server = site.start();
    let api = Api::new(server.listen().api, server.listen().operations, key);
    (server, api)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_expansion_goes_on_after_each_kill_and_reaches_everybody_once() {
    for (seed, engine) in [(21, "sled"), (22, "fjall")] {
        // Or a kill takes the outcomes of the last second with it, of what was acknowledged before it was stored.
        let site = Site::new()
            .with("STORE__ENGINE", engine)
            .with("RECEIPTS__DURABLE", "true");
        let phones = tempfile::tempdir().unwrap();
        let mut chance = StdRng::seed_from_u64(seed);
        let mut server = site.start();
        let mut api = server.api();
        let key = api.key().to_owned();
        let mut addressed = crowd(&api).await;
        let mut phone = Phone::register(&server, &api, phones.path(), "ana", Way::WebSocket).await;
        addressed.insert(phone.id());
        phone.attach(&server, &api).await;

        let (first, second) = (
            everyone(&api, "first").await,
            everyone(&api, "second").await,
        );
        let (late, _) = api.device("late").await;
        let third = everyone(&api, "third").await;
        let mut cut = 0;
        for _ in 0..4 {
            tokio::time::sleep(Duration::from_millis(chance.random_range(0..60))).await;
            server.kill();
            (server, api) = again(&site, &key);
            let look = api.get(&format!("/v1/pings/{third}?limit=1")).await;
            cut += u32::from(!look.expect(200)["expanding"].is_null());
        }
        println!("{engine}: {cut} kills came while they were on their way");
        phone.leave().await;
        phone.attach(&server, &api).await;
        for (id, others) in [(&first, None), (&second, None), (&third, Some(&late))] {
            let states = reached(&api, id).await;
            let reached: BTreeSet<String> = states.keys().cloned().collect();
            let mut expected = addressed.clone();
            expected.extend(others.cloned());
            let wrong: Vec<&String> = expected.symmetric_difference(&reached).collect();
            assert!(
                wrong.is_empty(),
                "{engine}: {id} reached {} of {}: {wrong:?} (the phone is {})",
                reached.len(),
                expected.len(),
                phone.id()
            );
        }
        eventually("the phone has all", async || {
            (phone.ledger.ids().len() >= 3).then_some(())
        })
        .await;
        assert_eq!(
            phone.ledger.bodies(),
            ["first", "second", "third"],
            "{engine}"
        );

        // Taken back over a crash: nothing of it waits anywhere, and nothing comes afterwards.
        phone.leave().await;
        let fourth = everyone(&api, "fourth").await;
        let path = format!("/v1/pings/{fourth}");
        let revoked = api.delete(&path).await.expect(200);
        assert!(revoked["revoked"].is_u64());
        server.kill();
        (server, api) = again(&site, &key);
        let states = reached(&api, &fourth).await;
        assert!(states.values().all(|state| state == "revoked"), "{engine}");
        phone.attach(&server, &api).await;
        let fifth = everyone(&api, "fifth").await;
        eventually("the phone has the fifth", async || {
            phone.ledger.ids().contains(&fifth).then_some(())
        })
        .await;
        assert_eq!(phone.ledger.bodies().len(), 4, "{engine}: not the fourth");
        phone.leave().await;
        server.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_does_not_answer_holds_up_nobody_and_a_kill_meanwhile_repeats_nothing() {
    let site = Site::new();
    let phones = tempfile::tempdir().unwrap();
    let server = site.start();
    let api = server.api();
    let key = api.key().to_owned();
    let way = Proxy::start().await;
    way.lead_to(server.listen().devices);
    let mut ana = Phone::register(&server, &api, phones.path(), "ana", Way::WebSocket).await;
    let mute = Phone::register(&server, &api, phones.path(), "mute", Way::WebSocket).await;
    let mut mute = mute.through(way.address());
    ana.attach(&server, &api).await;
    mute.attach(&server, &api).await;

    // What it says does not arrive, and its connection stands: nothing of the page is noted while it is waited for.
    way.hold_after(Some(0));
    let first = everyone(&api, "first").await;
    ana.given(1).await;
    mute.given(1).await;
    let look = api.get(&format!("/v1/pings/{first}?limit=1")).await;
    let open = !look.expect(200)["expanding"].is_null();
    server.kill();
    println!("the kill came while it was waited for: {open}");
    let (server, api) = again(&site, &key);
    ana.leave().await;
    mute.leave().await;
    way.hold_after(None);
    way.lead_to(server.listen().devices);
    ana.attach(&server, &api).await;
    mute.attach(&server, &api).await;
    let both = BTreeSet::from([ana.id(), mute.id()]);
    let path = format!("/v1/pings/{first}");
    eventually("both have acknowledged", async || {
        let look = api.get(&path).await.expect(200);
        let devices = look["devices"].as_array().unwrap().iter();
        let acknowledged: BTreeSet<String> = devices
            .filter(|pair| pair["state"] == "acknowledged")
            .map(|pair| pair["device"].as_str().unwrap().to_owned())
            .collect();
        (acknowledged == both).then_some(())
    })
    .await;
    assert_eq!(ana.ledger.bodies(), ["first"]);
    assert_eq!(mute.ledger.bodies(), ["first"]);

    // Others come behind it, to everybody, in their order.
    way.hold_after(Some(0));
    let bodies: Vec<String> = (0..8).map(|number| format!("number {number}")).collect();
    for body in &bodies {
        everyone(&api, body).await;
    }
    let last = everyone(&api, "last").await;
    let states = reached(&api, &last).await;
    assert_eq!(states[&mute.id()], "waiting");
    ana.given(10).await;
    mute.given(10).await;
    assert_eq!(ana.ledger.bodies()[1..9], bodies);
    assert_eq!(mute.ledger.bodies()[1..9], bodies);
    way.hold_after(None);
    eventually("it has acknowledged the last", async || {
        let states = reached(&api, &last).await;
        (states[&mute.id()] == "acknowledged").then_some(())
    })
    .await;
    ana.leave().await;
    mute.leave().await;
    server.stop().await;
}
