//! What apps hold is counted exactly after a stop and after `kill -9` in the middle of everything, and the quota holds for it.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::time::Duration;

use bellwire_tests::real::{Api, Site, eventually};
use http::Method;
use serde_json::{Value, json};

async fn own(api: &Api) -> Value {
    let status = eventually("everything to be counted", async || {
        let status = api.get("/v1/status").await.expect(200);
        (status["apps_counted"] == true).then_some(status)
    })
    .await;
    status["apps"][0].clone()
}

/// What waits in mailboxes, mailbox by mailbox.
async fn waiting(api: &Api, devices: &[String]) -> u64 {
    let mut sum = 0;
    for device in devices {
        let look = api.get(&format!("/v1/devices/{device}")).await;
        sum += look.expect(200)["waiting"].as_u64().unwrap();
    }
    sum
}

#[tokio::test(flavor = "multi_thread")]
async fn the_count_is_exact_after_a_kill_in_the_middle_of_everything() {
    let mut site = Site::new();
    let server = site.start();
    let api = server.api();
    let mut devices = Vec::new();
    for number in 0..12 {
        devices.push(api.device(&format!("user {number}")).await.0);
    }
    server.kill();
    for round in 0..4_u64 {
        let server = site.start();
        let api = server.api();
        let mut senders = Vec::new();
        for sender in 0..4_usize {
            let (api, devices) = (api.clone(), devices.clone());
            senders.push(tokio::spawn(async move {
                for number in sender.. {
                    let (one, other) = (&devices[number % 12], &devices[(number * 5 + 3) % 12]);
                    let body = json!({"to": {"devices": [one, other]}, "body": "ring", "collapse": (number % 3 == 0).then_some("key")});
                    let request = api.request(Method::POST, "/v1/pings", &[], &body.to_string());
                    let Some(answer) = api.try_send(request).await else {
                        return;
                    };
                    if number % 4 == 0 {
                        let path = format!("/v1/pings/{}", answer.id());
                        let request = api.request(Method::DELETE, &path, &[], "");
                        if api.try_send(request).await.is_none() {
                            return;
                        }
                    }
                }
            }));
        }
        tokio::time::sleep(Duration::from_millis(60 + 90 * round)).await;
        server.kill();
        for sender in senders {
            sender.await.unwrap();
        }
    }
    let server = site.start();
    let api = server.api();
    let counted = own(&api).await;
    let rows = waiting(&api, &devices).await;
    assert!(rows > 0);
    assert_eq!(counted["notifications"], rows);
    assert_eq!(counted["devices"], 12);
    assert!(server.stop().await.success());

    // The quota holds for what was there before it.
    site.set("QUOTA__NOTIFICATIONS", &rows.to_string());
    let server = site.start();
    let api = server.api();
    assert_eq!(own(&api).await["notifications"], rows);
    let body = json!({"to": {"device": devices[0]}, "body": "ring"});
    let refused = api.post("/v1/pings", body).await;
    assert_eq!(
        (refused.status.as_u16(), refused.code().as_str()),
        (429, "quota_exceeded")
    );
    let detail = refused.json()["detail"].clone();
    let wanted = format!(": {rows}, and it may have {rows} (quota.notifications)");
    assert!(detail.as_str().unwrap().contains(&wanted), "{detail}");
    let gone = api.delete(&format!("/v1/devices/{}", devices[1])).await;
    assert_eq!(gone.status.as_u16(), 204);
    let left = waiting(&api, &[&devices[..1], &devices[2..]].concat()).await;
    let counted = own(&api).await;
    assert_eq!(
        (&counted["notifications"], &counted["devices"]),
        (&json!(left), &json!(11))
    );
    server.kill();
}
