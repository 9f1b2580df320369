//! How notifications ended, asked by ping, by device, by user and by time.

use bellwire_server::delivery::{AppId, DeviceId, Outcome, PingId};
use bellwire_server::ports::{Clock as _, OutcomeRecord, Scopes, Store as _};
use bellwire_server::runtime::SystemClock;
use serde_json::{Value, json};

use crate::support::{OTHER_APP, Server, send, start};

const DAY_MS: u64 = 86_400_000;

fn now_ms() -> u64 {
    SystemClock::new().now().unix_ms
}

fn ping(n: u8) -> PingId {
    PingId([n; 16])
}

/// An outcome as the history of an earlier run has it: nothing else knows of it.
fn past(app: AppId, n: u8, device: DeviceId, outcome: Outcome, at_ms: u64) -> OutcomeRecord {
    OutcomeRecord {
        app,
        ping: ping(n),
        device,
        outcome,
        at_ms,
        accepted_ms: n.is_multiple_of(2).then_some(at_ms - 7),
    }
}

/// Every page of a list, and how many there were.
async fn walk(server: &Server, path: &str) -> (Vec<Value>, usize) {
    let (mut all, mut pages, mut next) = (Vec::new(), 0, String::new());
    loop {
        let page = server.ask("GET", &format!("{path}{next}"), "").await;
        assert_eq!(page.status, 200, "{}", page.text());
        let page = page.json();
        all.extend(page["outcomes"].as_array().unwrap().clone());
        pages += 1;
        match page["next"].as_str() {
            Some(cursor) => next = format!("&after={cursor}"),
            None => return (all, pages),
        }
    }
}

fn times(list: &[Value]) -> Vec<u64> {
    list.iter()
        .map(|one| one["at_ms"].as_u64().unwrap())
        .collect()
}

#[tokio::test]
async fn what_only_the_history_knows_is_told_by_ping_until_it_is_past_its_time() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let now = now_ms();
    server.store.record_outcomes(&mut vec![
        past(AppId::DEFAULT, 1, device, Outcome::Acknowledged, now - 9),
        past(
            AppId::DEFAULT,
            2,
            device,
            Outcome::Expired,
            now - DAY_MS - 9,
        ),
    ]);
    let look = async |n: u8| {
        server
            .ask("GET", &format!("/v1/pings/{}", ping(n)), "")
            .await
    };
    let known = look(1).await.json();
    assert_eq!(
        known["devices"],
        json!([{"device": device.to_string(), "state": "acknowledged", "at_ms": now - 9}])
    );
    assert_eq!(look(2).await.problem(), "404 ping_not_retained");
    assert_eq!(look(3).await.problem(), "404 ping_not_retained");
    // It has ended: there is nothing to take back, and that is known as well.
    let path = format!("/v1/pings/{}", ping(1));
    let revoked = server.ask("DELETE", &path, "").await;
    assert_eq!(revoked.json(), json!({"revoked": 0, "ended": 1}));
    server.stop().await;
}

#[tokio::test]
async fn outcomes_are_listed_by_time_device_and_user_a_page_at_a_time() {
    let server = start().await;
    let (ana, _) = server.device("ana").await;
    let (ana_too, _) = server.device("ana").await;
    let (ben, _) = server.device("ben").await;
    let begin = now_ms() - 1_000;
    let devices = [ana, ana_too, ben];
    let mut records: Vec<OutcomeRecord> = (0..30u8)
        .map(|n| {
            let device = devices[usize::from(n) % 3];
            let outcome = Outcome::ALL[usize::from(n) % 8];
            past(AppId::DEFAULT, n, device, outcome, begin + u64::from(n))
        })
        .collect();
    server.store.record_outcomes(&mut records);

    let (newest, pages) = walk(&server, "/v1/outcomes?limit=7").await;
    assert_eq!(pages, 5);
    let expected: Vec<u64> = (0..30).rev().map(|n| begin + n).collect();
    assert_eq!(times(&newest), expected);
    assert_eq!(
        newest[0],
        json!({"ping": ping(29).to_string(), "device": ben.to_string(), "outcome": "revoked", "at_ms": begin + 29})
    );
    assert_eq!(newest[1]["accepted_ms"], begin + 28 - 7);
    let (mut oldest, _) = walk(&server, "/v1/outcomes?limit=4&order=oldest").await;
    oldest.reverse();
    assert_eq!(oldest, newest);

    let range = format!("/v1/outcomes?from_ms={}&to_ms={}", begin + 3, begin + 9);
    let (some, _) = walk(&server, &range).await;
    assert_eq!(
        times(&some),
        (3..9).rev().map(|n| begin + n).collect::<Vec<_>>()
    );
    let (expired, _) = walk(&server, "/v1/outcomes?outcome=expired&limit=2").await;
    assert!(expired.iter().all(|one| one["outcome"] == "expired"));
    assert_eq!(expired.len(), 4);

    let (of_ana, _) = walk(&server, "/v1/outcomes?user=ana&limit=3").await;
    assert_eq!(of_ana.len(), 20);
    assert!(of_ana.iter().all(|one| one["device"] != ben.to_string()));
    let nobody = server.ask("GET", "/v1/outcomes?user=nobody", "").await;
    assert_eq!(nobody.json()["outcomes"], json!([]));

    let path = format!("/v1/devices/{ben}/outcomes");
    let (of_ben, _) = walk(&server, &format!("{path}?limit=4")).await;
    assert_eq!(of_ben.len(), 10);
    assert!(of_ben.iter().all(|one| one["device"] == ben.to_string()));
    let (both, _) = walk(
        &server,
        &format!("{path}?limit=4&outcome=evicted&order=oldest"),
    )
    .await;
    assert!(!both.is_empty() && both.iter().all(|one| one["outcome"] == "evicted"));

    // New ones do not move what comes on the next page.
    let page = server.ask("GET", "/v1/outcomes?limit=5", "").await.json();
    let mut later = vec![past(AppId::DEFAULT, 99, ana, Outcome::Expired, begin + 99)];
    server.store.record_outcomes(&mut later);
    let next = page["next"].as_str().unwrap();
    let page = server
        .ask("GET", &format!("/v1/outcomes?limit=5&after={next}"), "")
        .await;
    let page = page.json();
    assert_eq!(
        times(page["outcomes"].as_array().unwrap()),
        (20..25).rev().map(|n| begin + n).collect::<Vec<_>>()
    );

    // A revoked device is asked about by ping and by time, no longer by its id or its user.
    server
        .ask("DELETE", &format!("/v1/devices/{ben}"), "")
        .await;
    assert_eq!(
        server.ask("GET", &path, "").await.problem(),
        "404 unknown_device"
    );
    let (of_ben, _) = walk(&server, "/v1/outcomes?user=ben").await;
    assert!(of_ben.is_empty());
    server.stop().await;
}

#[tokio::test]
async fn an_app_sees_its_own_outcomes_only() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let now = now_ms();
    server.store.record_outcomes(&mut vec![
        past(AppId::DEFAULT, 1, device, Outcome::Acknowledged, now),
        past(OTHER_APP, 2, DeviceId([7; 16]), Outcome::Expired, now),
    ]);
    let other = format!("Bearer {}", server.key_with(OTHER_APP, Scopes::ALL).await);
    let headers = [("authorization", other.as_str())];
    let ask = async |path: &str| send(server.api, "GET", path, &headers, b"").await;
    let (mine, _) = walk(&server, "/v1/outcomes?limit=1").await;
    assert_eq!(mine.len(), 1);
    assert_eq!(mine[0]["ping"], ping(1).to_string());
    let theirs = ask("/v1/outcomes").await.json();
    let theirs = theirs["outcomes"].as_array().unwrap().clone();
    assert_eq!(theirs.len(), 1);
    assert_eq!(theirs[0]["ping"], ping(2).to_string());
    assert_eq!(
        ask("/v1/outcomes?user=ana").await.json()["outcomes"],
        json!([])
    );
    let path = format!("/v1/devices/{device}/outcomes");
    assert_eq!(ask(&path).await.problem(), "404 unknown_device");
    let path = format!("/v1/pings/{}", ping(1));
    assert_eq!(ask(&path).await.problem(), "404 ping_not_retained");

    let blind = format!(
        "Bearer {}",
        server.key_with(AppId::DEFAULT, Scopes::PING).await
    );
    let headers = [("authorization", blind.as_str())];
    for path in [
        "/v1/outcomes".to_owned(),
        format!("/v1/devices/{device}/outcomes"),
    ] {
        let reply = send(server.api, "GET", &path, &headers, b"").await;
        assert_eq!(reply.problem(), "403 forbidden");
        let reply = send(server.api, "GET", &path, &[], b"").await;
        assert_eq!(reply.status, 401);
    }
    server.stop().await;
}

#[tokio::test]
async fn a_list_of_outcomes_that_cannot_be_is_refused_at_its_place() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    for (query, parameter) in [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("outcome=lost", "outcome"),
        ("outcome=Expired", "outcome"),
        ("from_ms=yesterday", "from_ms"),
        ("to_ms=-1", "to_ms"),
        ("from_ms=5&to_ms=5", "from_ms"),
        ("order=random", "order"),
        ("after=1", "after"),
        ("after=o0000000000000001", "after"),
        ("order=oldest&after=n0000000000000001", "after"),
        ("form_ms=1", "form_ms"),
        ("order=oldest&order=newest", "order"),
    ] {
        for path in [
            "/v1/outcomes".to_owned(),
            format!("/v1/devices/{device}/outcomes"),
        ] {
            let reply = server.ask("GET", &format!("{path}?{query}"), "").await;
            assert_eq!(reply.status, 400, "{path}?{query}");
            let problem = reply.json();
            assert_eq!(problem["code"], "malformed");
            assert_eq!(problem["parameter"], parameter, "{query}");
        }
    }
    let of_nobody = server.ask("GET", "/v1/devices/nobody/outcomes", "").await;
    assert_eq!(of_nobody.problem(), "404 unknown_device");
    // The far ends are no mistakes.
    for after in ["n0000000000000000", "nffffffffffffffff"] {
        let reply = server
            .ask("GET", &format!("/v1/outcomes?after={after}"), "")
            .await;
        assert_eq!(reply.status, 200);
    }
    server.stop().await;
}
