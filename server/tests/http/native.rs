//! The native API: every refusal at its place, every call as docs/http-api.md tells it.

use bellwire_server::delivery::{AppId, OverflowRule};
use bellwire_server::ports::Scopes;
use bellwire_server::runtime::RuntimeSettings;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::store::Mode;
use crate::support::{OTHER_APP, PATIENCE, Setup, parse, raw, send, start, start_with};

const NOBODY: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaa";

#[tokio::test]
async fn malformed_pings_are_refused_at_their_place_and_reach_no_mailbox() {
    let server = start().await;
    let (device, secret) = server.device("ana").await;
    let attached = server.attach(device, &secret).await;
    let to = format!(r#""to":{{"device":"{device}"}}"#);
    let users = serde_json::to_string(&vec!["u"; 1_001]).unwrap();
    let names = serde_json::to_string(&vec!["s"; 101]).unwrap();
    let long = "x".repeat(256);
    let with = |rest: &str| format!("{{{to},{rest}}}");
    for (body, expected) in [
        ("".to_owned(), "415 unsupported_media_type Content-Type"),
        (" ".to_owned(), "400 malformed"),
        ("{".to_owned(), "400 malformed"),
        ("[]".to_owned(), "400 malformed "),
        ("null".to_owned(), "400 malformed "),
        ("\u{feff}{}".to_owned(), "400 malformed"),
        ("{}".to_owned(), "400 malformed /to"),
        (r#"{"to":null}"#.to_owned(), "400 malformed /to"),
        (r#"{"to":{}}"#.to_owned(), "400 malformed /to"),
        (r#"{"to":"ana"}"#.to_owned(), "400 malformed /to"),
        (r#"{"to":[]}"#.to_owned(), "400 malformed /to"),
        (
            r#"{"to":{"device":7}}"#.to_owned(),
            "400 malformed /to/device",
        ),
        (
            r#"{"to":{"device":"me"}}"#.to_owned(),
            "400 malformed /to/device",
        ),
        (
            format!(
                r#"{{"to":{{"device":"{}"}}}}"#,
                device.to_string().to_uppercase()
            ),
            "400 malformed /to/device",
        ),
        (
            format!(r#"{{"to":{{"device":"{device}","user":"ana"}}}}"#),
            "400 malformed /to",
        ),
        (
            format!(r#"{{"to":{{"device":"{device}","device":"{device}"}}}}"#),
            "400 malformed /to/device",
        ),
        (r#"{"to":{"user":""}}"#.to_owned(), "400 malformed /to/user"),
        (
            format!(r#"{{"to":{{"user":"{long}"}}}}"#),
            "400 malformed /to/user",
        ),
        (
            r#"{"to":{"user":"a\nb"}}"#.to_owned(),
            "400 malformed /to/user",
        ),
        (
            r#"{"to":{"users":"ana"}}"#.to_owned(),
            "400 malformed /to/users",
        ),
        (
            r#"{"to":{"users":[]}}"#.to_owned(),
            "400 malformed /to/users",
        ),
        (
            r#"{"to":{"users":["ana",7]}}"#.to_owned(),
            "400 malformed /to/users/1",
        ),
        (
            format!(r#"{{"to":{{"users":{users}}}}}"#),
            "422 unprocessable /to/users",
        ),
        (
            r#"{"to":{"devices":[]}}"#.to_owned(),
            "400 malformed /to/devices",
        ),
        (
            format!(r#"{{"to":{{"devices":["{device}","x"]}}}}"#),
            "400 malformed /to/devices/1",
        ),
        (
            r#"{"to":{"topic":"news","everyone":true}}"#.to_owned(),
            "400 malformed /to",
        ),
        (
            r#"{"to":{"topic":"a b"}}"#.to_owned(),
            "400 malformed /to/topic",
        ),
        (
            r#"{"to":{"everyone":1}}"#.to_owned(),
            "400 malformed /to/everyone",
        ),
        (
            r#"{"to":{"everyone":false}}"#.to_owned(),
            "400 malformed /to/everyone",
        ),
        (
            r#"{"to":{"group":"x"}}"#.to_owned(),
            "400 malformed /to/group",
        ),
        (with(r#""tll_s":1"#), "400 malformed /tll_s"),
        (with(r#""topic":"x""#), "400 malformed /topic"),
        (with(r#""a/b":1"#), "400 malformed /a~1b"),
        (with(r#""body":"a","body":"a""#), "400 malformed /body"),
        (with(r#""title":1"#), "400 malformed /title"),
        (with(r#""body":["x"]"#), "400 malformed /body"),
        (with(r#""sound":true"#), "400 malformed /sound"),
        (with(r#""category":{}"#), "400 malformed /category"),
        (with(r#""badge":-1"#), "400 malformed /badge"),
        (with(r#""badge":"3""#), "400 malformed /badge"),
        (with(r#""badge":4294967296"#), "400 malformed /badge"),
        (with(r#""badge":1.5"#), "400 malformed /badge"),
        (with(r#""vibrate_ms":"2000""#), "400 malformed /vibrate_ms"),
        (with(r#""sync":"Orders""#), "400 malformed /sync"),
        (with(r#""sync":["Orders",null]"#), "400 malformed /sync/1"),
        (
            with(&format!(r#""sync":{names}"#)),
            "422 unprocessable /sync",
        ),
        (with(r#""data":"a""#), "400 malformed /data"),
        (with(r#""data":"YQ""#), "400 malformed /data"),
        (with(r#""data":"Y-_="#), "400 malformed"),
        (with(r#""data":"Y-_=""#), "400 malformed /data"),
        (with(r#""data":"YR==""#), "400 malformed /data"),
        (
            with(r#""data":"YQ==","encoding":"gzip""#),
            "400 malformed /encoding",
        ),
        (
            with(r#""encoding":"aes128gcm""#),
            "422 unprocessable /encoding",
        ),
        (with(r#""ttl_s":-1"#), "400 malformed /ttl_s"),
        (with(r#""ttl_s":"60""#), "400 malformed /ttl_s"),
        (with(r#""ttl_s":1e400"#), "400 malformed"),
        (with(r#""urgency":"urgent""#), "400 malformed /urgency"),
        (with(r#""urgency":1"#), "400 malformed /urgency"),
        (with(r#""collapse":"""#), "400 malformed /collapse"),
        (
            with(&format!(r#""collapse":"{}""#, "k".repeat(65))),
            "400 malformed /collapse",
        ),
        (
            with(&format!(r#""body":"{}""#, "x".repeat(4_097))),
            "413 content_too_large",
        ),
        (format!("{}}}", with(r#""body":"x""#)), "400 malformed"),
        (
            format!(r#"{{"to":{{"device":"{NOBODY}"}}}}"#),
            "404 unknown_device /to/device",
        ),
    ] {
        let reply = server.ask("POST", "/v1/pings", &body).await;
        let told = reply.problem();
        // The pointer of the whole body is the empty text.
        assert_eq!(told, expected, "for {body}: {}", reply.text());
    }
    let device_view = server
        .ask("GET", &format!("/v1/devices/{device}"), "")
        .await;
    assert_eq!(device_view.json()["user"], "ana");
    assert!(attached.contents().is_empty());
    server.stop().await;
}

#[tokio::test]
async fn a_body_must_say_it_is_json_and_fit() {
    let server = start().await;
    let bearer = format!("Bearer {}", server.key);
    let body = br#"{"to":{"user":"nobody"}}"#;
    for (content_type, status) in [
        ("application/json", 202),
        ("application/json; charset=utf-8", 202),
        ("APPLICATION/JSON", 202),
        ("application/jsonx", 415),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
    ] {
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", content_type),
        ];
        let reply = send(server.api, "POST", "/v1/pings", &headers, body).await;
        assert_eq!(reply.status, status, "{content_type}");
    }
    // Announced, and not: in both cases the answer can be read, and the connection ends.
    let large = format!(
        r#"{{"to":{{"user":"u"}},"body":"{}"}}"#,
        "x".repeat(6 << 20)
    );
    let reply = server.ask("POST", "/v1/pings", &large).await;
    assert_eq!(reply.problem(), "413 body_too_large");
    // More than all buffers on the way hold, so that writing only ends if the server reads on.
    let large = "x".repeat(7 << 20);
    let mut chunked = format!(
        "POST /v1/pings HTTP/1.1\r\nhost: test\r\nauthorization: {bearer}\r\n\
         content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n",
        large.len()
    )
    .into_bytes();
    chunked.extend_from_slice(large.as_bytes());
    chunked.extend_from_slice(b"\r\n0\r\n\r\n");
    let mut stream = TcpStream::connect(server.api).await.unwrap();
    let exchange = async {
        stream.write_all(&chunked).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(PATIENCE, exchange).await.unwrap();
    let reply = parse(&answer);
    assert_eq!(reply.problem(), "413 body_too_large");
    assert_eq!(reply.header("connection"), Some("close"));
    server.stop().await;
}

#[tokio::test]
async fn who_may_not_is_told_why() {
    let server = start().await;
    let ping_key = server.key_with(AppId::DEFAULT, Scopes::PING).await;
    let read_key = server.key_with(AppId::DEFAULT, Scopes::READ).await;
    let ping_bearer = format!("Bearer {ping_key}");
    let read_bearer = format!("bearer {read_key}");
    for (authorization, method, path, expected) in [
        (
            None,
            "POST",
            "/v1/pings",
            "401 unauthenticated Authorization",
        ),
        (
            Some("Basic YTpi"),
            "POST",
            "/v1/pings",
            "401 unauthenticated Authorization",
        ),
        (
            Some("Bearer"),
            "GET",
            "/v1/devices",
            "401 unauthenticated Authorization",
        ),
        (
            Some("Bearer nonsense"),
            "GET",
            "/v1/devices",
            "401 unauthenticated Authorization",
        ),
        (
            Some("Bearer bw_aaaaaaaaaaaaaaaa_x"),
            "GET",
            "/v1/keys",
            "401 unauthenticated Authorization",
        ),
        (Some(&read_bearer), "POST", "/v1/pings", "403 forbidden"),
        (Some(&read_bearer), "DELETE", "/v1/pings/x", "403 forbidden"),
        (Some(&read_bearer), "POST", "/v1/devices", "403 forbidden"),
        (
            Some(&read_bearer),
            "DELETE",
            "/v1/devices/x",
            "403 forbidden",
        ),
        (Some(&read_bearer), "GET", "/v1/keys", "403 forbidden"),
        (Some(&read_bearer), "POST", "/v1/keys", "403 forbidden"),
        (Some(&read_bearer), "DELETE", "/v1/keys/x", "403 forbidden"),
        (Some(&ping_bearer), "GET", "/v1/pings/x", "403 forbidden"),
        (Some(&ping_bearer), "GET", "/v1/devices", "403 forbidden"),
        (Some(&ping_bearer), "GET", "/v1/devices/x", "403 forbidden"),
        (Some(&ping_bearer), "GET", "/v1/status", "403 forbidden"),
    ] {
        let headers: Vec<_> = authorization
            .map(|value| ("authorization", value))
            .into_iter()
            .collect();
        let reply = send(server.api, method, path, &headers, b"").await;
        assert_eq!(
            reply.problem(),
            expected,
            "{method} {path} {authorization:?}"
        );
        let challenge = reply.header("www-authenticate");
        assert_eq!(
            reply.status == 401,
            challenge.is_some_and(|text| text.starts_with("Bearer"))
        );
    }
    let twice = [
        ("authorization", ping_bearer.as_str()),
        ("authorization", ping_bearer.as_str()),
    ];
    let reply = send(server.api, "POST", "/v1/pings", &twice, b"{}").await;
    assert_eq!(reply.problem(), "401 unauthenticated Authorization");
    server.stop().await;
}

#[tokio::test]
async fn paths_and_methods_that_are_not_there_are_problems_too() {
    let server = start().await;
    for (method, path, expected, allow) in [
        ("GET", "/", "404 not_found", None),
        ("GET", "/v2/pings", "404 not_found", None),
        ("POST", "/v1/pings/", "404 not_found", None),
        ("GET", "/metrics", "404 not_found", None),
        ("GET", "/v1/pings", "405 method_not_allowed", Some("POST")),
        (
            "PUT",
            "/v1/devices",
            "405 method_not_allowed",
            Some("POST,GET,HEAD"),
        ),
        (
            "BREW",
            "/v1/keys",
            "405 method_not_allowed",
            Some("POST,GET,HEAD"),
        ),
        ("GET", "/v1/pings/x", "404 ping_not_retained", None),
        ("GET", "/v1/pings/%ff", "400 malformed", None),
        (
            "GET",
            &format!("/v1/pings/{NOBODY}"),
            "404 ping_not_retained",
            None,
        ),
        (
            "DELETE",
            &format!("/v1/pings/{NOBODY}"),
            "404 ping_not_retained",
            None,
        ),
        ("GET", "/v1/devices/x", "404 unknown_device", None),
        (
            "GET",
            &format!("/v1/devices/{NOBODY}"),
            "404 unknown_device",
            None,
        ),
        (
            "DELETE",
            &format!("/v1/devices/{NOBODY}"),
            "404 unknown_device",
            None,
        ),
        ("DELETE", "/v1/keys/nobody", "404 not_found", None),
        ("GET", "/v1/devices?limit=0", "400 malformed limit", None),
        ("GET", "/v1/devices?limit=1001", "400 malformed limit", None),
        ("GET", "/v1/devices?limit=ten", "400 malformed limit", None),
        (
            "GET",
            "/v1/devices?limit=1&limit=1",
            "400 malformed limit",
            None,
        ),
        ("GET", "/v1/devices?after=x", "400 malformed after", None),
        ("GET", "/v1/devices?user=", "400 malformed user", None),
        ("GET", "/v1/devices?usr=ana", "400 malformed usr", None),
        ("GET", "/v1/keys?x=1", "400 malformed x", None),
        ("POST", "/v1/pings?wait=yes", "400 malformed wait", None),
        (
            "POST",
            "/v1/pings?wait=acknowledged&timeout_s=61",
            "400 malformed timeout_s",
            None,
        ),
        (
            "POST",
            "/v1/pings?timeout_s=1",
            "400 malformed timeout_s",
            None,
        ),
    ] {
        let reply = server.ask(method, path, "").await;
        assert_eq!(reply.problem(), expected, "{method} {path}");
        assert_eq!(reply.header("allow"), allow, "{method} {path}");
    }
    let options = server.ask("OPTIONS", "/v1/devices", "").await;
    assert_eq!(
        (options.status, options.header("allow")),
        (204, Some("POST,GET,HEAD,OPTIONS"))
    );
    assert_eq!(server.ask("OPTIONS", "*", "").await.status, 204);
    let head = server.ask("HEAD", "/v1/devices", "").await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    let head = server.ask("HEAD", "/nowhere", "").await;
    assert_eq!((head.status, head.body.len()), (404, 0));
    server.stop().await;
}

#[tokio::test]
async fn a_request_is_named_by_its_caller_or_by_us() {
    let server = start().await;
    let ask = async |id: &str| {
        let reply = send(
            server.operations,
            "GET",
            "/nowhere",
            &[("x-request-id", id)],
            b"",
        )
        .await;
        assert_eq!(reply.problem(), "404 not_found");
        reply.header("x-request-id").unwrap().to_owned()
    };
    assert_eq!(ask("order-4711/a.b:c").await, "order-4711/a.b:c");
    for bad in ["", "with space", "a\"b", "é", &"x".repeat(129)] {
        let ours = ask(bad).await;
        assert!(ours != bad && !ours.is_empty(), "{bad}");
    }
    assert_ne!(ask("").await, ask("").await);
    let reply = raw(
        server.api,
        b"GET /nowhere HTTP/1.1\r\nconnection: close\r\n\r\n",
    )
    .await;
    assert_eq!(reply.problem(), "400 malformed Host");
    server.stop().await;
}

#[tokio::test]
async fn a_ping_waits_is_acknowledged_and_can_be_asked_about() {
    let server = start().await;
    let (device, secret) = server.device("ana").await;
    let body = r#"{"to":{"user":"ana"},"title":"t","body":"b","sound":"s","badge":1,"vibrate_ms":2,"category":"c",
        "sync":["x","y"],"data":"AAEC","encoding":"aes128gcm","ttl_s":60,"urgency":"high","collapse":"k"}"#;
    let reply = server.ask("POST", "/v1/pings", body).await;
    assert_eq!(reply.status, 202, "{}", reply.text());
    let accepted = reply.json();
    assert_eq!(
        (&accepted["devices"], &accepted["ttl_s"]),
        (&json!(1), &json!(60))
    );
    assert_eq!(accepted.as_object().unwrap().len(), 3);
    let path = format!("/v1/pings/{}", accepted["id"].as_str().unwrap());

    let waiting = server.ask("GET", &path, "").await.json();
    assert_eq!(waiting["devices"][0]["device"], device.to_string());
    assert_eq!(waiting["devices"][0]["state"], "waiting");
    assert!(waiting["devices"][0]["expires_ms"].is_u64());

    let attached = server.attach(device, &secret).await;
    crate::support::until(|| attached.contents().len() == 1).await;
    let content = &attached.contents()[0];
    assert_eq!(
        serde_json::to_value(content).unwrap(),
        json!({"title": "t", "body": "b", "sound": "s", "badge": 1, "vibrate_ms": 2, "category": "c",
            "sync": ["x", "y"], "data": "AAEC", "encoding": "aes128gcm"})
    );
    // The outcome is announced once the removal is safe.
    loop {
        let state = server.ask("GET", &path, "").await.json()["devices"][0]["state"].clone();
        if state == "acknowledged" {
            break;
        }
        assert_eq!(state, "waiting");
    }
    let revoked = server.ask("DELETE", &path, "").await;
    assert_eq!(
        (revoked.status, revoked.json()),
        (200, json!({"revoked": 0, "ended": 1}))
    );
    let off = format!("{path}/withdraw");
    let withdrawn = server.ask("POST", &off, "").await;
    assert_eq!(
        (withdrawn.status, withdrawn.json()),
        (
            200,
            json!({"revoked": 0, "withdrawn": 1, "ended": 0, "kept": 0})
        )
    );
    let except = format!(r#"{{"except": ["{device}"]}}"#);
    let kept = server.ask("POST", &off, &except).await.json();
    assert_eq!(
        kept,
        json!({"revoked": 0, "withdrawn": 0, "ended": 0, "kept": 1})
    );
    for (body, problem) in [
        ("[]", "400 malformed "),
        (r#"{"except": "me"}"#, "400 malformed /except"),
        (r#"{"except": ["me"]}"#, "400 malformed /except/0"),
        (r#"{"but": []}"#, "400 malformed /but"),
    ] {
        let reply = server.ask("POST", &off, body).await;
        assert_eq!(reply.problem(), problem, "{body}");
    }
    let nobody = server.ask("POST", "/v1/pings/nothing/withdraw", "").await;
    assert_eq!(nobody.status, 404);

    // Another app sees nothing of it.
    let other = server.key_with(OTHER_APP, Scopes::ALL).await;
    let bearer = format!("Bearer {other}");
    for method in ["GET", "DELETE"] {
        let headers = [("authorization", bearer.as_str())];
        let reply = send(server.api, method, &path, &headers, b"").await;
        assert_eq!(reply.problem(), "404 ping_not_retained");
        let path = format!("/v1/devices/{device}");
        let reply = send(server.api, method, &path, &headers, b"").await;
        assert_eq!(reply.problem(), "404 unknown_device");
    }
    server.stop().await;
}

#[tokio::test]
async fn waiting_answers_with_the_outcomes_so_far() {
    let server = start().await;
    let (here, secret) = server.device("ana").await;
    let attached = server.attach(here, &secret).await;
    let path = "/v1/pings?wait=acknowledged&timeout_s=60";
    let reply = server.ask("POST", path, r#"{"to":{"user":"ana"}}"#).await;
    assert_eq!(reply.status, 200, "{}", reply.text());
    let outcomes = &reply.json()["outcomes"];
    assert_eq!(outcomes[0]["state"], "acknowledged");
    assert_eq!(outcomes[0]["device"], here.to_string());
    assert!(outcomes[0]["at_ms"].is_u64());
    assert!(attached.contents()[0].is_empty());

    let (away, _) = server.device("ben").await;
    let path = "/v1/pings?wait=acknowledged&timeout_s=0";
    let reply = server
        .ask("POST", path, r#"{"to":{"users":["ana","ben","ana"]}}"#)
        .await;
    let answer = reply.json();
    assert_eq!(
        (reply.status, &answer["devices"]),
        (200, &json!(2)),
        "{answer}"
    );
    let outcomes = answer["outcomes"].as_array().unwrap();
    let state = outcomes
        .iter()
        .find(|one| one["device"] == away.to_string())
        .unwrap();
    assert_eq!(state["state"], "waiting");

    let reply = server
        .ask("POST", path, r#"{"to":{"user":"nobody"}}"#)
        .await;
    assert_eq!(reply.json()["outcomes"], json!([]));
    server.stop().await;
}

#[tokio::test]
async fn several_devices_list_those_that_refused_and_one_is_an_error() {
    let mut settings = RuntimeSettings::default();
    settings.policy.mailbox_notifications = 1;
    settings.policy.overflow = OverflowRule::Refuse;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let (full, _) = server.device("ana").await;
    let (empty, _) = server.device("ben").await;
    let body = format!(r#"{{"to":{{"device":"{full}"}}}}"#);
    assert_eq!(server.ask("POST", "/v1/pings", &body).await.status, 202);
    let refused = server.ask("POST", "/v1/pings", &body).await;
    assert_eq!(refused.problem(), "429 mailbox_full");
    assert!(
        refused
            .header("retry-after")
            .unwrap()
            .parse::<u32>()
            .unwrap()
            > 0
    );

    let body = format!(r#"{{"to":{{"devices":["{full}","{NOBODY}","{empty}","{empty}"]}}}}"#);
    let reply = server.ask("POST", "/v1/pings", &body).await;
    let answer = reply.json();
    assert_eq!(
        (reply.status, &answer["devices"]),
        (202, &json!(3)),
        "{answer}"
    );
    let mut rejected: Vec<(String, String)> = answer["rejected"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| {
            (
                one["device"].to_string(),
                one["code"].as_str().unwrap().to_owned(),
            )
        })
        .collect();
    rejected.sort();
    let mut expected = vec![
        (format!("\"{full}\""), "mailbox_full".to_owned()),
        (format!("\"{NOBODY}\""), "unknown_device".to_owned()),
    ];
    expected.sort();
    assert_eq!(rejected, expected);

    // Page by page.
    let path = format!("/v1/pings/{}", answer["id"].as_str().unwrap());
    let page = server
        .ask("GET", &format!("{path}?limit=1"), "")
        .await
        .json();
    assert_eq!(page["devices"].as_array().unwrap().len(), 1);
    server.stop().await;
}

#[tokio::test]
async fn an_idempotency_key_makes_one_ping_of_many_requests() {
    let server = start().await;
    let (device, _) = server.device("ana").await;
    let bearer = format!("Bearer {}", server.key);
    let post = async |key: &str, body: &str| {
        let headers = [
            ("authorization", bearer.as_str()),
            ("content-type", "application/json"),
            ("idempotency-key", key),
        ];
        send(server.api, "POST", "/v1/pings", &headers, body.as_bytes()).await
    };
    let body = format!(r#"{{"to":{{"device":"{device}"}},"body":"once"}}"#);
    let first = post("order-1", &body).await;
    assert_eq!(first.status, 202);
    let again = post("order-1", &body).await;
    assert_eq!((again.status, again.json()), (202, first.json()));
    let other = post("order-1", &format!("{body} ")).await;
    assert_eq!(other.problem(), "409 idempotency_conflict Idempotency-Key");
    let path = format!("/v1/pings/{}", first.json()["id"].as_str().unwrap());
    assert_eq!(
        server.ask("GET", &path, "").await.json()["devices"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let revoked = server.ask("DELETE", &path, "").await;
    assert_eq!(revoked.json(), json!({"revoked": 1, "ended": 0}));

    for bad in ["", "with space", "é", &"k".repeat(256)] {
        let reply = post(bad, &body).await;
        assert_eq!(reply.problem(), "400 malformed Idempotency-Key", "{bad:?}");
    }
    assert_eq!(post(&"k".repeat(255), &body).await.status, 202);
    let twice = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
        ("idempotency-key", "a"),
        ("idempotency-key", "a"),
    ];
    let reply = send(server.api, "POST", "/v1/pings", &twice, body.as_bytes()).await;
    assert_eq!(reply.problem(), "400 malformed Idempotency-Key");
    server.stop().await;
}

#[tokio::test]
async fn a_key_that_runs_away_is_slowed_down_alone() {
    let mut settings = RuntimeSettings::default();
    settings.limits.pings_per_second = 1;
    settings.limits.ping_burst = 2;
    let server = start_with(Setup {
        settings,
        ..Setup::default()
    })
    .await;
    let body = r#"{"to":{"user":"nobody"}}"#;
    let mut answers = Vec::new();
    // However slow the machine: it is quicker than one ping a second.
    while answers.last().is_none_or(|status| *status == 202) && answers.len() < 1_000 {
        answers.push(server.ask("POST", "/v1/pings", body).await.status);
    }
    assert!(
        answers.len() > 2 && answers.last() == Some(&429),
        "{answers:?}"
    );
    let refused = server.ask("POST", "/v1/pings", "x").await;
    if refused.status == 429 {
        assert_eq!(refused.problem(), "429 rate_limited");
        assert_eq!(refused.header("retry-after"), Some("1"));
    }
    let other = server.key_with(AppId::DEFAULT, Scopes::PING).await;
    let bearer = format!("Bearer {other}");
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    let reply = send(server.api, "POST", "/v1/pings", &headers, body.as_bytes()).await;
    assert_eq!(reply.status, 202);
    server.stop().await;
}

#[tokio::test]
async fn devices_are_registered_listed_and_revoked() {
    let server = start().await;
    for (body, expected) in [
        ("{}", "400 malformed /user"),
        (r#"{"user":""}"#, "400 malformed /user"),
        (r#"{"user":7}"#, "400 malformed /user"),
        (r#"{"user":"a","name":""}"#, "400 malformed /name"),
        (r#"{"user":"a","nmae":"x"}"#, "400 malformed /nmae"),
    ] {
        assert_eq!(
            server.ask("POST", "/v1/devices", body).await.problem(),
            expected
        );
    }
    let mut made = Vec::new();
    for user in ["ana", "ana", "ana", "ben"] {
        let body = json!({"user": user, "name": "tablet"}).to_string();
        let reply = server.ask("POST", "/v1/devices", &body).await;
        assert_eq!(reply.status, 201);
        assert_eq!(reply.header("cache-control"), Some("no-store"));
        let device = reply.json()["device"].as_str().unwrap().to_owned();
        assert_eq!(
            reply.header("location"),
            Some(format!("/v1/devices/{device}").as_str())
        );
        assert!(reply.json()["secret"].as_str().unwrap().len() >= 32);
        made.push((device, reply.json()["secret"].as_str().unwrap().to_owned()));
    }
    let mut listed = Vec::new();
    let mut path = "/v1/devices?user=ana&limit=2".to_owned();
    loop {
        let page = server.ask("GET", &path, "").await.json();
        assert!(!page.to_string().contains("secret"));
        listed.extend(page["devices"].as_array().unwrap().clone());
        match page["next"].as_str() {
            Some(next) => path = format!("/v1/devices?user=ana&limit=2&after={next}"),
            None => break,
        }
    }
    let mut expected: Vec<&str> = made[..3]
        .iter()
        .map(|(device, _)| device.as_str())
        .collect();
    expected.sort_unstable();
    let mut devices: Vec<&str> = listed
        .iter()
        .map(|one| one["device"].as_str().unwrap())
        .collect();
    devices.sort_unstable();
    assert_eq!(devices, expected);
    assert!(
        listed
            .iter()
            .all(|one| one["attached"] == Value::Null && one["name"] == "tablet")
    );

    let (device, secret) = &made[3];
    let attached = server.attach(device.parse().unwrap(), secret).await;
    let path = format!("/v1/devices/{device}");
    let view = server.ask("GET", &path, "").await.json();
    assert_eq!(view["attached"]["carrier"], "quic");
    assert!(view["attached"]["since_ms"].is_u64());
    let gone = server.ask("DELETE", &path, "").await;
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    assert_eq!(
        server.ask("DELETE", &path, "").await.problem(),
        "404 unknown_device"
    );
    assert_eq!(
        server.ask("GET", &path, "").await.problem(),
        "404 unknown_device"
    );
    drop(attached);
    server.stop().await;
}

#[tokio::test]
async fn keys_pass_on_no_more_than_they_have() {
    let server = start().await;
    for (body, expected) in [
        ("{}", "400 malformed /name"),
        (r#"{"name":"a"}"#, "400 malformed /scopes"),
        (r#"{"name":"a","scopes":[]}"#, "400 malformed /scopes"),
        (r#"{"name":"a","scopes":"ping"}"#, "400 malformed /scopes"),
        (
            r#"{"name":"a","scopes":["pin"]}"#,
            "400 malformed /scopes/0",
        ),
        (
            r#"{"name":"a","scopes":["ping"],"app":2}"#,
            "400 malformed /app",
        ),
    ] {
        assert_eq!(
            server.ask("POST", "/v1/keys", body).await.problem(),
            expected
        );
    }
    let body = r#"{"name":"keys only","scopes":["keys"]}"#;
    let made = server.ask("POST", "/v1/keys", body).await;
    assert_eq!(
        (made.status, made.header("cache-control")),
        (201, Some("no-store"))
    );
    let made = made.json();
    assert_eq!(made["scopes"], json!(["keys"]));
    let bearer = format!("Bearer {}", made["key"].as_str().unwrap());
    let headers = [
        ("authorization", bearer.as_str()),
        ("content-type", "application/json"),
    ];
    let more = br#"{"name":"more","scopes":["keys","ping"]}"#;
    let reply = send(server.api, "POST", "/v1/keys", &headers, more).await;
    assert_eq!(reply.problem(), "403 forbidden /scopes");

    let list = send(server.api, "GET", "/v1/keys", &headers, b"").await;
    let id = made["id"].as_str().unwrap();
    let keys = list.json()["keys"].as_array().unwrap().clone();
    assert!(
        keys.iter()
            .any(|key| key["id"] == id && key["name"] == "keys only")
    );
    assert!(!list.text().contains("bw_"));
    let path = format!("/v1/keys/{id}");
    let gone = send(server.api, "DELETE", &path, &headers, b"").await;
    assert_eq!(gone.status, 204);
    let reply = send(server.api, "GET", "/v1/keys", &headers, b"").await;
    assert_eq!(reply.problem(), "401 unauthenticated Authorization");
    server.stop().await;
}

#[tokio::test]
async fn a_store_in_trouble_makes_no_promise() {
    let server = start().await;
    server.device("ana").await;
    let body = r#"{"to":{"user":"ana"}}"#;
    assert_eq!(server.ask("POST", "/v1/pings", body).await.status, 202);
    assert_eq!(
        send(server.operations, "GET", "/readyz", &[], b"")
            .await
            .status,
        200
    );

    server.store.set_mode(Mode::NoRoom);
    let reply = server.ask("POST", "/v1/pings", body).await;
    assert_eq!(reply.problem(), "507 no_room");
    assert!(reply.header("retry-after").is_some());

    server.store.set_mode(Mode::Fail);
    let mut reply = server.ask("POST", "/v1/pings", body).await;
    while reply.status == 507 {
        // The shard still knows the disk as full; its next try tells it better.
        reply = server.ask("POST", "/v1/pings", body).await;
    }
    assert_eq!(reply.problem(), "503 store_unavailable");
    assert!(reply.header("retry-after").is_some());
    let ready = send(server.operations, "GET", "/readyz", &[], b"").await;
    assert_eq!(ready.problem(), "503 store_unavailable");
    assert_eq!(
        send(server.operations, "GET", "/healthz", &[], b"")
            .await
            .status,
        200
    );
    let status = server.ask("GET", "/v1/status", "").await.json();
    assert_eq!(
        (&status["ready"], &status["store"]["health"]),
        (&json!(false), &json!("failed"))
    );
    server.stop().await;
}

#[tokio::test]
async fn operations_are_on_their_own_listener() {
    let server = start().await;
    let get = async |path: &str| send(server.operations, "GET", path, &[], b"").await;
    assert_eq!(get("/healthz").await.text(), "alive\n");
    assert_eq!(get("/readyz").await.text(), "ready\n");
    let metrics = get("/metrics").await;
    assert_eq!(metrics.text(), "bellwire_up 1\n");
    assert_eq!(
        metrics.header("content-type"),
        Some("text/plain; version=0.0.4; charset=utf-8")
    );
    assert_eq!(get("/v1/pings").await.problem(), "404 not_found");
    assert_eq!(
        get("/v1/status").await.problem(),
        "401 unauthenticated Authorization"
    );
    let bearer = format!("Bearer {}", server.key);
    let headers = [("authorization", bearer.as_str())];
    let status = send(server.operations, "GET", "/v1/status", &headers, b"")
        .await
        .json();
    assert_eq!(status["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(status["store"]["health"], "open");
    let committed = include_str!("../../../openapi.json");
    assert!(get("/openapi.json").await.text() == committed);
    let on_api = send(server.api, "GET", "/openapi.json", &[], b"").await;
    assert!(on_api.text() == committed);
    let runtime = server.handle.clone();
    tokio::spawn(async move { runtime.drain(std::time::Duration::ZERO).await });
    crate::support::until(|| server.handle.draining()).await;
    assert_eq!(get("/readyz").await.problem(), "503 draining");
    server.stop().await;
}

#[tokio::test]
async fn a_panic_ends_its_own_request_and_is_a_problem() {
    let setup = Setup {
        metrics: || panic!("told to"),
        ..Setup::default()
    };
    let server = start_with(setup).await;
    let reply = send(server.operations, "GET", "/metrics", &[], b"").await;
    assert_eq!(reply.problem(), "500 internal");
    assert!(!reply.text().contains("told to"));
    let reply = send(server.operations, "GET", "/healthz", &[], b"").await;
    assert_eq!(reply.status, 200);
    server.stop().await;
}

/// What `POST /v1/pings` must survive: each file of the corpus, and each with every byte cut off its end.
#[test]
fn the_ping_body_corpus_does_no_harm() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/http/corpus/ping_body");
    for bytes in crate::support::corpus(folder) {
        bellwire_server::http::fuzz::ping_body(&bytes);
        bellwire_server::http::fuzz::batch(&bytes);
        for end in 0..bytes.len().min(512) {
            bellwire_server::http::fuzz::ping_body(&bytes[..end]);
        }
        bellwire_server::http::fuzz::query(&String::from_utf8_lossy(&bytes));
    }
}
