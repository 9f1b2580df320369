//! A runtime for tests: lets devices in by their secret, notes what links tell it, and pushes what the test says.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use bellwire_certs::{DevAuthority, SanName, Validity};
use bellwire_protocol::Content;
use bellwire_server::delivery::{
    Acknowledged, AppId, DeviceId, Hold, Notification, PingId, SessionId, Urgency, WireSlot,
};
use bellwire_server::runtime::{
    AttachRequest, Identity, LinkSettings, Out, Outlet, RuntimeError, WhoError,
};
use bellwire_server::transport::{
    Door, PemSource, Suites, TlsSettings, Transport, TransportSettings,
};
use tokio::time::timeout;

/// How long a test waits for something that must happen. Only a hanging test gets here.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// What a link told the runtime.
#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    Attached {
        window: u16,
        seen: usize,
        carrier: &'static str,
    },
    Detached,
    Acknowledged(Acknowledged),
    Declined(PingId),
    Presence(bool),
}

/// What to answer to an attach.
#[derive(Debug, Clone, Copy)]
pub enum Answer {
    Welcome,
    Refuse(bellwire_server::delivery::Refusal),
    Nothing,
}

struct State {
    told: Vec<(DeviceId, SessionId, Told)>,
    outlets: HashMap<DeviceId, Arc<dyn Outlet>>,
    topics: HashMap<DeviceId, BTreeSet<String>>,
    answer: Answer,
}

/// The runtime.
#[derive(Clone)]
pub struct Desk {
    state: Arc<Mutex<State>>,
    changed: Arc<tokio::sync::Notify>,
    settings: Arc<LinkSettings>,
    sessions: Arc<AtomicU64>,
    now_ms: Arc<AtomicU64>,
}

impl Desk {
    pub fn new(settings: LinkSettings) -> Desk {
        Desk {
            state: Arc::new(Mutex::new(State {
                told: Vec::new(),
                outlets: HashMap::new(),
                topics: HashMap::new(),
                answer: Answer::Welcome,
            })),
            changed: Arc::default(),
            settings: Arc::new(settings),
            sessions: Arc::default(),
            now_ms: Arc::new(AtomicU64::new(1_000_000)),
        }
    }

    /// What to answer from now on.
    pub fn answer(&self, answer: Answer) {
        self.state.lock().unwrap().answer = answer;
    }

    /// Time passes.
    pub fn set_now_ms(&self, now_ms: u64) {
        self.now_ms.store(now_ms, Ordering::SeqCst);
    }

    /// Pushes a word to a device that is or was attached.
    pub fn push(&self, device: DeviceId, out: Out) {
        let outlet = Arc::clone(&self.state.lock().unwrap().outlets[&device]);
        outlet.push(out);
    }

    /// Everything that was told of a device, in order.
    pub fn told(&self, device: DeviceId) -> Vec<Told> {
        let state = self.state.lock().unwrap();
        let of = state.told.iter().filter(|(of, ..)| *of == device);
        of.map(|(_, _, told)| told.clone()).collect()
    }

    /// How many attaches and detaches there were, each with its session counted once.
    pub fn balance(&self) -> (usize, usize) {
        let state = self.state.lock().unwrap();
        let count = |wanted: fn(&Told) -> bool| {
            let mut sessions: Vec<_> = state
                .told
                .iter()
                .filter(|(.., told)| wanted(told))
                .map(|(_, session, _)| *session)
                .collect();
            let all = sessions.len();
            sessions.sort();
            sessions.dedup();
            assert_eq!(all, sessions.len(), "twice for one session");
            all
        };
        (
            count(|told| matches!(told, Told::Attached { .. })),
            count(|told| *told == Told::Detached),
        )
    }

    /// Waits until this was told of a device.
    pub async fn wait_for(&self, device: DeviceId, wanted: Told) {
        self.wait_until(&format!("{wanted:?}"), || {
            self.told(device).contains(&wanted)
        })
        .await;
    }

    /// Waits for a condition on what was told.
    pub async fn wait_until(&self, what: &str, met: impl Fn() -> bool) {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                if met() {
                    return;
                }
                // Not everything that is waited for is told here.
                let _ = timeout(Duration::from_millis(20), changed).await;
            }
        };
        if timeout(PATIENCE, waiting).await.is_err() {
            panic!("never: {what}; told: {:?}", self.state.lock().unwrap().told);
        }
    }

    fn tell(&self, device: DeviceId, session: SessionId, told: Told) {
        self.state
            .lock()
            .unwrap()
            .told
            .push((device, session, told));
        self.changed.notify_waiters();
    }
}

impl Door for Desk {
    type Proof = DeviceId;

    fn link_settings(&self) -> Arc<LinkSettings> {
        Arc::clone(&self.settings)
    }

    fn now_ms(&self) -> u64 {
        self.now_ms.load(Ordering::SeqCst)
    }

    fn next_session(&self) -> SessionId {
        SessionId(self.sessions.fetch_add(1, Ordering::Relaxed) + 1)
    }

    async fn authenticate(
        &self,
        device: DeviceId,
        identity: Identity<'_>,
    ) -> Result<DeviceId, WhoError> {
        let Identity::Secret(secret) = identity;
        match secret {
            "good" => Ok(device),
            "unreadable" => Err(WhoError::StoreUnavailable),
            "draining" => Err(WhoError::Draining),
            _ => Err(WhoError::Unauthorized),
        }
    }

    fn attach(&self, device: DeviceId, request: AttachRequest, outlet: Arc<dyn Outlet>) {
        let AttachRequest {
            session, window, ..
        } = request;
        let answer = {
            let mut state = self.state.lock().unwrap();
            state.outlets.insert(device, Arc::clone(&outlet));
            state.answer
        };
        let (seen, carrier) = (request.seen.len(), request.carrier);
        self.tell(
            device,
            session,
            Told::Attached {
                window,
                seen,
                carrier,
            },
        );
        match answer {
            Answer::Welcome => outlet.push(Out::Welcome { pending: 3, window }),
            Answer::Refuse(why) => outlet.push(Out::Refuse(why)),
            Answer::Nothing => {}
        }
    }

    fn detach(&self, device: DeviceId, session: SessionId) {
        self.tell(device, session, Told::Detached);
    }

    fn acknowledge(&self, device: DeviceId, session: SessionId, what: Acknowledged) {
        self.tell(device, session, Told::Acknowledged(what));
    }

    fn decline(&self, device: DeviceId, session: SessionId, ping: PingId) {
        self.tell(device, session, Told::Declined(ping));
    }

    fn presence(&self, device: DeviceId, session: SessionId, active: bool) {
        self.tell(device, session, Told::Presence(active));
    }

    async fn subscribe(
        &self,
        device: DeviceId,
        join: Vec<String>,
        leave: Vec<String>,
    ) -> Result<Option<Vec<String>>, RuntimeError> {
        // Every request takes a while, and the second one must not overtake the first.
        tokio::task::yield_now().await;
        let mut state = self.state.lock().unwrap();
        let topics = state.topics.entry(device).or_default();
        topics.extend(join);
        topics.retain(|topic| !leave.contains(topic));
        Ok(Some(topics.iter().cloned().collect()))
    }
}

/// A notification with this body.
pub fn notification(ping: u8, body: &str) -> Arc<Notification> {
    let content = Content {
        body: Some(body.to_owned()),
        ..Content::default()
    };
    notification_of(ping, content.to_cbor())
}

/// A notification with these stored bytes.
pub fn notification_of(ping: u8, content: Vec<u8>) -> Arc<Notification> {
    Arc::new(Notification {
        ping: PingId([ping; 16]),
        app: AppId::DEFAULT,
        accepted_ms: 1_000_000,
        expires_ms: 2_000_000,
        urgency: Urgency::Normal,
        collapse: None,
        size: content.len() as u32,
        transient: false,
        shared: false,
        content: content.into(),
        wire: WireSlot::default(),
        hold: Hold::default(),
    })
}

/// The word that sends it.
pub fn send(seq: u64, notification: &Arc<Notification>) -> Out {
    Out::Send {
        seq,
        redelivered: false,
        notification: Arc::clone(notification),
    }
}

/// The authority that the tests trust.
pub fn authority() -> &'static DevAuthority {
    static AUTHORITY: OnceLock<DevAuthority> = OnceLock::new();
    AUTHORITY.get_or_init(|| {
        let now = time::OffsetDateTime::now_utc();
        DevAuthority::generate("test authority", Validity::authority(now).unwrap()).unwrap()
    })
}

/// A fresh certificate for `localhost`.
pub fn certificate() -> TlsSettings {
    let names: [SanName; 1] = ["localhost".parse().unwrap()];
    let validity = Validity::leaf(time::OffsetDateTime::now_utc()).unwrap();
    let issued = authority().server(&names, validity).unwrap();
    TlsSettings {
        chain: PemSource::Text(issued.chain_pem.as_bytes().to_vec()),
        key: PemSource::Text(issued.key_pem.as_bytes().to_vec()),
        suites: Suites::All,
    }
}

/// A server on loopback.
pub fn start(settings: LinkSettings) -> (Desk, Transport) {
    start_counting(settings, false)
}

/// A server on loopback that may count its peers by address.
pub fn start_counting(settings: LinkSettings, count_loopback: bool) -> (Desk, Transport) {
    let desk = Desk::new(settings);
    let settings = TransportSettings {
        addr: "127.0.0.1:0".parse().unwrap(),
        plain: Some("127.0.0.1:0".parse().unwrap()),
        tls: certificate(),
        count_loopback,
    };
    let transport = Transport::start(desk.clone(), &settings).unwrap();
    (desk, transport)
}
