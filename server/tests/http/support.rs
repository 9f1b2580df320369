//! A server of routers, runtime and fake store, and a client that sends exactly the bytes that a test wants.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bellwire_server::compat;
use bellwire_server::delivery::{Acknowledged, AppId, DeviceId, Urgency};
use bellwire_server::http::{
    self, ApiState, Connections, Listening, LoadedSettings, Places, ServeReport, TlsSource,
};
use bellwire_server::ports::{AppRecord, NoOutbound, Outbound, Scopes};
use bellwire_server::runtime::{
    AttachRequest, Handle, HashKey, Identity, Out, Outlet, Runtime, RuntimeSettings, SystemClock,
    SystemEntropy,
};
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::store::FakeStore;

/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// A second app, for what must not be seen across apps.
pub(crate) const OTHER_APP: AppId = AppId(2);

pub(crate) struct Server {
    pub(crate) api: SocketAddr,
    pub(crate) operations: SocketAddr,
    pub(crate) handle: Handle,
    pub(crate) store: Arc<FakeStore>,
    /// A key of app `default` with every scope.
    pub(crate) key: String,
    pub(crate) shutdown: CancellationToken,
    pub(crate) serving: JoinHandle<ServeReport>,
    runtime: Runtime,
}

pub(crate) struct Setup {
    pub(crate) settings: RuntimeSettings,
    pub(crate) tls: Option<TlsSource>,
    pub(crate) connections_max: usize,
    pub(crate) drain: Duration,
    pub(crate) metrics: fn() -> String,
    pub(crate) outbound: Arc<dyn Outbound>,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            settings: RuntimeSettings::default(),
            tls: None,
            connections_max: 1_024,
            drain: PATIENCE,
            metrics: || "bellwire_up 1\n".to_owned(),
            outbound: Arc::new(NoOutbound),
        }
    }
}

pub(crate) async fn start() -> Server {
    start_with(Setup::default()).await
}

pub(crate) async fn start_with(setup: Setup) -> Server {
    let store = Arc::new(FakeStore::default());
    let other = AppRecord {
        id: OTHER_APP,
        name: "other".to_owned(),
        secret: [7; 32],
        created_ms: 1,
    };
    store.disk(|disk| disk.apps.push(other));
    start_on(setup, store, None).await
}

async fn start_on(setup: Setup, store: Arc<FakeStore>, key: Option<String>) -> Server {
    let runtime = Runtime::start_with(
        setup.settings,
        Arc::clone(&store) as _,
        Arc::new(SystemClock::new()),
        Arc::new(SystemEntropy::new()),
        HashKey::new(&[3; 32]),
        setup.outbound,
    )
    .await
    .unwrap();
    let handle = runtime.handle.clone();
    let made = handle.ensure_bootstrap_key().await.unwrap();
    let key = key.or(made).unwrap();
    let places = Places::new(setup.connections_max);
    let counted = places.clone();
    let sites = http::routers(ApiState {
        handle: handle.clone(),
        metrics: Arc::new(setup.metrics),
        loaded: Arc::new(LoadedSettings::new(handle.now_ms())),
        connections: Arc::new(move || Connections {
            unauthenticated: 3,
            busiest_address: 2,
            api: counted.taken(),
            api_max: counted.max(),
        }),
        doors: compat::doors(handle.clone()),
    });
    let shutdown = CancellationToken::new();
    let listen = async |name, tls, places| {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let listening = Listening {
            listener,
            tls,
            name,
            places,
            drain: setup.drain,
        };
        (address, listening)
    };
    let (api, listening) = listen("api", setup.tls.clone(), places).await;
    let serving = tokio::spawn(http::serve(listening, sites.api, shutdown.clone()));
    let (operations, listening) = listen("operations", None, Places::new(64)).await;
    tokio::spawn(http::serve(listening, sites.operations, shutdown.clone()));
    Server {
        api,
        operations,
        handle,
        store,
        key,
        shutdown,
        serving,
        runtime,
    }
}

impl Server {
    /// A request with the good key and, when there is a body, the JSON type.
    pub(crate) async fn ask(&self, method: &str, path: &str, body: &str) -> Reply {
        let bearer = format!("Bearer {}", self.key);
        let mut headers = vec![("authorization", bearer.as_str())];
        if !body.is_empty() {
            headers.push(("content-type", "application/json"));
        }
        send(self.api, method, path, &headers, body.as_bytes()).await
    }

    pub(crate) async fn key_with(&self, app: AppId, scopes: Scopes) -> String {
        let made = self.handle.create_key(app, "test", scopes).await.unwrap();
        made.secret
    }

    /// Registers a device; its id and secret.
    pub(crate) async fn device(&self, user: &str) -> (DeviceId, String) {
        let made = self.handle.create_device(AppId::DEFAULT, user, None).await;
        let made = made.unwrap();
        (made.made.device, made.secret)
    }

    /// Connects a device that notes what it is sent and acknowledges it.
    pub(crate) async fn attach(&self, device: DeviceId, secret: &str) -> Arc<Device> {
        let who = self
            .handle
            .authenticate(device, Identity::Secret(secret))
            .await
            .unwrap();
        let session = self.handle.next_session();
        let attached = Arc::new(Device {
            handle: self.handle.clone(),
            id: device,
            session,
            sent: Mutex::default(),
        });
        let request = AttachRequest {
            session,
            instance: 1,
            attempt: 1,
            window: 32,
            min_urgency: Urgency::VeryLow,
            seen: Vec::new(),
            carrier: "quic",
            agent: Some("tester/1".into()),
        };
        self.handle.attach(who, request, Arc::clone(&attached) as _);
        until(|| {
            let sent = attached.sent.lock().unwrap();
            sent.iter().any(|out| matches!(out, Out::Welcome { .. }))
        })
        .await;
        attached
    }

    /// Stops and starts again on what is on disk.
    pub(crate) async fn restart(self) -> Server {
        let (store, key) = (Arc::clone(&self.store), self.key.clone());
        self.stop().await;
        start_on(Setup::default(), store.restarted(), Some(key)).await
    }

    pub(crate) async fn stop(self) -> ServeReport {
        self.shutdown.cancel();
        let report = self.serving.await.unwrap();
        self.runtime.shutdown(Duration::ZERO).await;
        report
    }
}

/// A connected device.
pub(crate) struct Device {
    handle: Handle,
    id: DeviceId,
    session: bellwire_server::delivery::SessionId,
    sent: Mutex<Vec<Out>>,
}

impl Outlet for Device {
    fn push(&self, out: Out) {
        if let Out::Send { notification, .. } = &out {
            let ids = Acknowledged::Ids(vec![notification.ping]);
            self.handle.acknowledge(self.id, self.session, ids);
        }
        self.sent.lock().unwrap().push(out);
    }
}

impl Device {
    /// The contents it was sent, in order.
    pub(crate) fn contents(&self) -> Vec<bellwire_protocol::Content> {
        let sent = self.sent.lock().unwrap();
        sent.iter()
            .filter_map(|out| match out {
                Out::Send { notification, .. } => {
                    Some(bellwire_protocol::Content::from_cbor(&notification.content).unwrap())
                }
                Out::Welcome { .. }
                | Out::Refuse(_)
                | Out::Withdraw(_)
                | Out::Close(_)
                | Out::Drain { .. } => None,
            })
            .collect()
    }
}

/// Waits for a condition, with patience.
pub(crate) async fn until(condition: impl Fn() -> bool) {
    let waited = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waited)
        .await
        .expect("the condition came true in time");
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Reply {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error} in {:?}", self.text()))
    }

    /// Status, code and place of a refusal, as one text; checks all that refusals have in common.
    pub(crate) fn problem(&self) -> String {
        assert_eq!(
            self.header("content-type"),
            Some("application/problem+json"),
            "{self:?}"
        );
        let body = self.json();
        let code = body["code"].as_str().unwrap();
        assert_eq!(body["type"], format!("urn:bellwire:problem:{code}"));
        assert_eq!(body["status"], self.status);
        assert_eq!(body["request_id"].as_str(), self.header("x-request-id"));
        for member in ["title", "detail", "remedy"] {
            assert!(
                body[member]
                    .as_str()
                    .is_some_and(|text| text.ends_with('.')),
                "{body}"
            );
        }
        let place = ["pointer", "parameter", "header"]
            .into_iter()
            .find_map(|kind| body[kind].as_str());
        match place {
            Some(place) => format!("{} {code} {place}", self.status),
            None => format!("{} {code}", self.status),
        }
    }
}

/// One request on a connection of its own.
pub(crate) async fn send(
    to: SocketAddr,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &[u8],
) -> Reply {
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if !body.is_empty() || method == "POST" {
        head.push_str(&format!("content-length: {}\r\n", body.len()));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    raw(to, &bytes).await
}

/// Sends bytes and reads the answer until the server closes.
pub(crate) async fn raw(to: SocketAddr, bytes: &[u8]) -> Reply {
    let exchange = async {
        let mut stream = TcpStream::connect(to).await.unwrap();
        // A server that refuses early may close before all is written.
        let _ = stream.write_all(bytes).await;
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let answer = tokio::time::timeout(PATIENCE, exchange).await.unwrap();
    parse(&answer)
}

pub(crate) fn parse(answer: &[u8]) -> Reply {
    let end = answer
        .windows(4)
        .position(|four| four == b"\r\n\r\n")
        .unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(answer)));
    let head = std::str::from_utf8(&answer[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap();
    Reply {
        status: status.parse().unwrap(),
        headers: lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
            .collect(),
        body: answer[end + 4..].to_vec(),
    }
}

/// The files of a corpus, in the order of their names.
pub(crate) fn corpus(folder: &str) -> Vec<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "{folder} is empty");
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}
