//! A client in Python, written from docs/write-a-client.md alone, against the real server.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use bellwire_tests::real::{Api, Server, Site, eventually};
use serde_json::{Value, json};

/// The interpreter that `tests/run` prepares, or one that has the packages of tests/requirements.txt.
fn python() -> PathBuf {
    std::env::var_os("BELLWIRE_TEST_PYTHON").map_or_else(|| "python3".into(), PathBuf::from)
}

struct Client {
    child: Child,
    out: PathBuf,
}

impl Client {
    fn start(site: &Site, server: &Server, credentials: &Path, count: usize) -> Client {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("python/client.py");
        let out = site.dir().join(format!("python-{count}.out"));
        let child = Command::new(python())
            .arg(script)
            .args(["--server", &server.listen().devices.to_string()])
            .arg("--ca")
            .arg(server.ca())
            .arg("--credentials")
            .arg(credentials)
            .arg("--state-dir")
            .arg(site.dir().join("python-state"))
            .args(["--count", &count.to_string()])
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out).unwrap())
            .spawn()
            .expect("python3 starts (tests/run prepares it)");
        Client { child, out }
    }

    /// Waits for its end and answers the bodies that its app was given.
    async fn ended(mut self) -> Vec<String> {
        let status = eventually("the client ends", async || {
            self.child.try_wait().expect("a child can be asked")
        })
        .await;
        let text = std::fs::read_to_string(&self.out).unwrap();
        assert!(status.success(), "{status}: {text}");
        let lines = text
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).expect("each line is JSON"));
        lines
            .filter_map(|line| line["body"].as_str().map(str::to_owned))
            .collect()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _status = self.child.wait();
    }
}

async fn ping(api: &Api, device: &str, body: &str) -> String {
    let answer = api
        .post(
            "/v1/pings",
            json!({ "to": { "device": device }, "body": body }),
        )
        .await
        .expect(202);
    answer["id"].as_str().unwrap().to_owned()
}

async fn becomes_acknowledged(api: &Api, id: &str) {
    eventually("it is acknowledged", async || {
        let view = api.get(&format!("/v1/pings/{id}")).await.expect(200);
        (view["devices"][0]["state"] == "acknowledged").then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_written_from_the_page_alone_gets_everything_once() {
    let site = Site::new();
    let server = site.start();
    let api = server.api();
    let (device, secret) = api.device("ann").await;
    let credentials = site.dir().join("credentials.json");
    std::fs::write(
        &credentials,
        json!({ "device": device, "secret": secret }).to_string(),
    )
    .unwrap();

    // Two wait, one more comes while it is attached.
    ping(&api, &device, "one").await;
    ping(&api, &device, "two").await;
    let client = Client::start(&site, &server, &credentials, 3);
    eventually("it is attached", async || {
        let view = api.get(&format!("/v1/devices/{device}")).await.json();
        (!view["attached"].is_null()).then_some(())
    })
    .await;
    let three = ping(&api, &device, "three").await;
    assert_eq!(client.ended().await, ["one", "two", "three"]);
    becomes_acknowledged(&api, &three).await;

    // After a kill of the server it goes on where it was, and nothing comes twice.
    let four = ping(&api, &device, "four").await;
    server.kill();
    let server = site.start();
    let api = server.api();
    let client = Client::start(&site, &server, &credentials, 1);
    assert_eq!(client.ended().await, ["four"]);
    becomes_acknowledged(&api, &four).await;
}
