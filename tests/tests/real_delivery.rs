//! The main job on the real binary, real sockets and a real disk, over every way in which a device connects.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use bellwire_client::Verdict;
use bellwire_tests::real::{Api, Phone, Server, Site, Way, eventually};
use serde_json::{Value, json};

async fn ping(api: &Api, phone: &Phone, body: &str, more: Value) -> String {
    let mut ping = json!({ "to": { "device": phone.id() }, "body": body });
    ping.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    let answer = api.post("/v1/pings", ping).await.expect(202);
    assert_eq!(answer["devices"], 1);
    answer["id"].as_str().unwrap().to_owned()
}

/// The state of a ping's only device: `waiting` or the outcome.
async fn state(api: &Api, id: &str) -> String {
    let view = api.get(&format!("/v1/pings/{id}")).await.expect(200);
    let devices = view["devices"].as_array().unwrap();
    assert_eq!(devices.len(), 1, "{view}");
    devices[0]["outcome"]
        .as_str()
        .or(devices[0]["state"].as_str())
        .unwrap()
        .to_owned()
}

async fn becomes(api: &Api, id: &str, wanted: &str) {
    eventually(&format!("{id} is {wanted}"), async || {
        (state(api, id).await == wanted).then_some(())
    })
    .await;
}

/// Starts a site and runs a story over each way.
async fn over_each_way(site: Site, story: impl AsyncFn(&Site, Server, Api, Phone)) {
    for way in Way::ALL {
        let server = site.start();
        let api = server.api();
        let phone = Phone::register(&server, &api, site.dir(), "ann", way).await;
        eprintln!("over {way:?}");
        story(&site, server, api, phone).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_online_device_gets_it_and_the_publisher_learns_of_it() {
    over_each_way(Site::new(), async |_, server, api, mut phone| {
        phone.attach(&server, &api).await;
        let body = json!({ "to": { "device": phone.id() }, "title": "Order", "body": "ready", "data": "AAEC" });
        let answer = api.post("/v1/pings?wait=acknowledged&timeout_s=30", body).await.expect(200);
        assert_eq!(answer["outcomes"][0]["state"], "acknowledged", "{answer}");
        assert_eq!(phone.ledger.bodies(), ["ready"]);
        assert_eq!(phone.ledger.redelivered(), [false]);
        becomes(&api, answer["id"].as_str().unwrap(), "acknowledged").await;
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offline_device_gets_all_in_order_when_it_returns_even_after_a_kill() {
    over_each_way(Site::new(), async |site, server, api, mut phone| {
        let mut ids = Vec::new();
        for n in 0..50 {
            ids.push(ping(&api, &phone, &n.to_string(), json!({})).await);
        }
        assert_eq!(state(&api, &ids[0]).await, "waiting");
        server.kill();
        let server = site.start();
        let api = server.api();
        for id in &ids {
            assert_eq!(state(&api, id).await, "waiting");
        }
        phone.attach(&server, &api).await;
        phone.given(50).await;
        for id in &ids {
            becomes(&api, id, "acknowledged").await;
        }
        assert_eq!(phone.ledger.ids(), ids);
        assert!(
            phone.ledger.redelivered().iter().all(|&marked| marked),
            "another run accepted them"
        );
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_device_that_lived_through_a_restart_is_told_nothing_twice() {
    over_each_way(Site::new(), async |site, server, api, mut phone| {
        phone.attach(&server, &api).await;
        let first = ping(&api, &phone, "first", json!({})).await;
        becomes(&api, &first, "acknowledged").await;
        server.kill();
        let server = site.start();
        let api = server.api();
        phone.leave().await;
        phone.attach(&server, &api).await;
        let second = ping(&api, &phone, "second", json!({})).await;
        becomes(&api, &second, "acknowledged").await;
        assert_eq!(phone.ledger.bodies(), ["first", "second"]);
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ttl_that_runs_out_ends_as_expired_and_is_never_sent() {
    over_each_way(Site::new(), async |_, server, api, mut phone| {
        let late = ping(&api, &phone, "late", json!({ "ttl_s": 1 })).await;
        let never = ping(&api, &phone, "never stored", json!({ "ttl_s": 0 })).await;
        assert_eq!(state(&api, &never).await, "expired");
        becomes(&api, &late, "expired").await;
        let kept = ping(&api, &phone, "kept", json!({ "ttl_s": 3600 })).await;
        phone.attach(&server, &api).await;
        becomes(&api, &kept, "acknowledged").await;
        assert_eq!(phone.ledger.bodies(), ["kept"]);
        let now = ping(&api, &phone, "now or never", json!({ "ttl_s": 0 })).await;
        becomes(&api, &now, "acknowledged").await;
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_mailbox_evicts_the_lowest_and_oldest() {
    let site = Site::new().with("LIMITS__MAILBOX_NOTIFICATIONS", "3");
    over_each_way(site, async |_, server, api, mut phone| {
        let a = ping(&api, &phone, "a", json!({})).await;
        let b = ping(&api, &phone, "b", json!({ "urgency": "low" })).await;
        let c = ping(&api, &phone, "c", json!({ "urgency": "high" })).await;
        let d = ping(&api, &phone, "d", json!({})).await;
        let e = ping(&api, &phone, "e", json!({ "urgency": "very-low" })).await;
        assert_eq!(state(&api, &b).await, "evicted");
        assert_eq!(state(&api, &e).await, "refused");
        phone.attach(&server, &api).await;
        for id in [&a, &c, &d] {
            becomes(&api, id, "acknowledged").await;
        }
        assert_eq!(phone.ledger.bodies(), ["a", "c", "d"]);
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_newest_with_a_collapse_key_waits_alone() {
    over_each_way(Site::new(), async |site, server, api, mut phone| {
        let old = ping(&api, &phone, "3 unread", json!({ "collapse": "unread" })).await;
        let new = ping(&api, &phone, "4 unread", json!({ "collapse": "unread" })).await;
        let other = ping(&api, &phone, "other", json!({ "collapse": "mail" })).await;
        assert_eq!(state(&api, &old).await, "replaced");
        server.kill();
        let server = site.start();
        let api = server.api();
        assert_eq!(state(&api, &old).await, "replaced");
        phone.attach(&server, &api).await;
        becomes(&api, &new, "acknowledged").await;
        becomes(&api, &other, "acknowledged").await;
        assert_eq!(phone.ledger.bodies(), ["4 unread", "other"]);
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_ping_is_not_delivered_and_a_delivered_one_is_not_revoked() {
    over_each_way(Site::new(), async |site, server, api, mut phone| {
        let taken = ping(&api, &phone, "taken back", json!({})).await;
        let kept = ping(&api, &phone, "kept", json!({})).await;
        let counts = api.delete(&format!("/v1/pings/{taken}")).await.expect(200);
        assert_eq!(counts["revoked"], 1, "{counts}");
        server.kill();
        let server = site.start();
        let api = server.api();
        assert_eq!(state(&api, &taken).await, "revoked");
        phone.attach(&server, &api).await;
        becomes(&api, &kept, "acknowledged").await;
        assert_eq!(phone.ledger.bodies(), ["kept"]);
        let counts = api.delete(&format!("/v1/pings/{kept}")).await.expect(200);
        assert_eq!(
            (&counts["revoked"], &counts["ended"]),
            (&json!(0), &json!(1))
        );
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_device_is_cut_off_and_unknown_from_then_on() {
    over_each_way(Site::new(), async |_, server, api, mut phone| {
        phone.attach(&server, &api).await;
        let answer = api.delete(&format!("/v1/devices/{}", phone.id())).await;
        assert_eq!(answer.status, 204, "{}", answer.text);
        eventually("the client has stopped for good", async || {
            phone
                .ledger
                .events()
                .iter()
                .any(|event| event.starts_with("Stopped"))
                .then_some(())
        })
        .await;
        let answer = api
            .post(
                "/v1/pings",
                json!({ "to": { "device": phone.id() }, "body": "x" }),
            )
            .await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (404, "unknown_device")
        );
        assert_eq!(
            api.get(&format!("/v1/devices/{}", phone.id())).await.status,
            404
        );
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_declined_one_ends_as_declined() {
    over_each_way(Site::new(), async |_, server, api, mut phone| {
        phone
            .start(&server, |_| Verdict::decline("no such screen"))
            .await;
        let id = ping(&api, &phone, "x", json!({})).await;
        becomes(&api, &id, "declined").await;
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_sends_devices_away_ends_with_zero_and_loses_nothing() {
    let site = Site::new().with("DRAIN__WINDOW", "2s");
    over_each_way(site, async |site, server, api, mut phone| {
        phone.attach(&server, &api).await;
        let data = site.data();
        let status = server.stop().await;
        assert!(status.success(), "{status}");
        assert!(
            !data.join("listen.json").exists(),
            "a clean exit removes listen.json"
        );
        let server = site.start();
        let api = server.api();
        let id = {
            phone.leave().await;
            ping(&api, &phone, "after", json!({})).await
        };
        phone.attach(&server, &api).await;
        becomes(&api, &id, "acknowledged").await;
        let away = phone
            .ledger
            .events()
            .iter()
            .any(|event| event.to_lowercase().contains("drain"));
        assert!(
            away,
            "the client was told of the drain: {:?}",
            phone.ledger.events()
        );
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idempotency_key_makes_one_ping_even_over_a_kill() {
    over_each_way(Site::new(), async |site, server, api, mut phone| {
        let key = format!("order-{}", phone.id());
        let headers = [("idempotency-key", key.as_str())];
        let body = json!({ "to": { "device": phone.id() }, "body": "once" }).to_string();
        let post = async |api: &Api, body: &str| {
            api.try_send(api.request(http::Method::POST, "/v1/pings", &headers, body))
                .await
                .unwrap()
        };
        let first = post(&api, &body).await.expect(202);
        let second = post(&api, &body).await.expect(202);
        assert_eq!(first["id"], second["id"]);
        let other = post(&api, &body.replace("once", "twice")).await;
        assert_eq!(
            (other.status.as_u16(), other.code().as_str()),
            (409, "idempotency_conflict")
        );
        server.kill();
        let server = site.start();
        let api = server.api();
        let third = post(&api, &body).await.expect(202);
        assert_eq!(first["id"], third["id"]);
        phone.attach(&server, &api).await;
        becomes(&api, first["id"].as_str().unwrap(), "acknowledged").await;
        assert_eq!(phone.ledger.bodies(), ["once"]);
        phone.leave().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_is_pinged_on_every_device_and_unknown_users_cost_nothing() {
    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut phones = Vec::new();
    for way in Way::ALL {
        phones.push(Phone::register(&server, &api, site.dir(), "bea", way).await);
    }
    phones[0].attach(&server, &api).await;
    let answer = api
        .post(
            "/v1/pings",
            json!({ "to": { "users": ["bea", "nobody", "bea"] }, "body": "all" }),
        )
        .await;
    let answer = answer.expect(202);
    assert_eq!(answer["devices"], 3, "{answer}");
    let nobody = api
        .post(
            "/v1/pings",
            json!({ "to": { "user": "nobody" }, "body": "x" }),
        )
        .await
        .expect(202);
    assert_eq!(nobody["devices"], 0);
    server.kill();
    let server = site.start();
    let api = server.api();
    for phone in &mut phones[1..] {
        phone.attach(&server, &api).await;
        phone.given(1).await;
        assert_eq!(phone.ledger.bodies(), ["all"]);
    }
    assert_eq!(phones[0].ledger.bodies(), ["all"]);
    for phone in &mut phones {
        phone.leave().await;
    }
}
