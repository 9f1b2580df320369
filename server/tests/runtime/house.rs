//! A server without sockets: the runtime, a store, a clock that can be moved, and devices that are an outlet each.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bellwire_server::delivery::{
    Acknowledged, AppId, DeviceId, Now, PingId, SessionId, Urgency, Verdict,
};
use bellwire_server::ports::{Clock, ClockState, Store};
use bellwire_server::runtime::{
    AttachRequest, Authenticated, Content, Handle, HashKey, Identity, Out, Outlet, PingRequest,
    Runtime, RuntimeSettings, SystemClock, SystemEntropy, Target,
};
use tokio::sync::mpsc;

use crate::store::FakeStore;

pub(crate) const APP: AppId = AppId::DEFAULT;

/// Far more than anything here takes; only a hang reaches it.
const PATIENCE: Duration = Duration::from_secs(20);

/// The system's clock, and what a test adds to it.
pub(crate) struct MovedClock {
    system: SystemClock,
    ahead_ms: AtomicU64,
    jumped: AtomicU64,
    asked: AtomicU64,
}

impl MovedClock {
    pub(crate) fn new() -> MovedClock {
        MovedClock {
            system: SystemClock::new(),
            ahead_ms: AtomicU64::new(0),
            jumped: AtomicU64::new(0),
            asked: AtomicU64::new(0),
        }
    }

    /// How often somebody asked how it stands; the sweep does so each time before it begins.
    pub(crate) fn asked(&self) -> u64 {
        self.asked.load(Ordering::SeqCst)
    }

    pub(crate) fn advance(&self, span: Duration) {
        let ms = u64::try_from(span.as_millis()).unwrap();
        self.ahead_ms.fetch_add(ms, Ordering::SeqCst);
    }

    pub(crate) fn set_jumped(&self, jumped: bool) {
        self.jumped.store(u64::from(jumped), Ordering::SeqCst);
    }
}

impl Clock for MovedClock {
    fn now(&self) -> Now {
        let ahead_ms = self.ahead_ms.load(Ordering::SeqCst);
        let now = self.system.now();
        Now {
            mono: now.mono + Duration::from_millis(ahead_ms),
            unix_ms: now.unix_ms + ahead_ms,
        }
    }

    fn state(&self) -> ClockState {
        self.asked.fetch_add(1, Ordering::SeqCst);
        match self.jumped.load(Ordering::SeqCst) {
            0 => ClockState::Steady,
            _ => ClockState::Jumped { by_ms: 90_000 },
        }
    }
}

pub(crate) struct House {
    pub(crate) runtime: Runtime,
    pub(crate) handle: Handle,
    pub(crate) store: Arc<FakeStore>,
    pub(crate) clock: Arc<MovedClock>,
}

/// Settings of small tests: two shards, a quick sweep, no holding back unless a test asks for it.
pub(crate) fn settings() -> RuntimeSettings {
    let mut settings = RuntimeSettings {
        shards: 2,
        sweep_every: Duration::from_millis(20),
        ..RuntimeSettings::default()
    };
    settings.policy.defer_max = Duration::ZERO;
    settings
}

impl House {
    pub(crate) async fn open() -> House {
        House::with(settings(), Arc::default()).await
    }

    pub(crate) async fn with(settings: RuntimeSettings, store: Arc<FakeStore>) -> House {
        House::over(settings, Arc::clone(&store) as _, store).await
    }

    /// Runs on `store`; `fake` is what the tests of this house look at, if it is one.
    pub(crate) async fn over(
        settings: RuntimeSettings,
        store: Arc<dyn Store>,
        fake: Arc<FakeStore>,
    ) -> House {
        House::at(Arc::new(MovedClock::new()), settings, store, fake).await
    }

    /// The same by a clock that the store has as well.
    pub(crate) async fn at(
        clock: Arc<MovedClock>,
        settings: RuntimeSettings,
        store: Arc<dyn Store>,
        fake: Arc<FakeStore>,
    ) -> House {
        let runtime = Runtime::start(
            settings,
            store,
            Arc::clone(&clock) as _,
            Arc::new(SystemEntropy::new()),
            HashKey::new(&[9; 32]),
        )
        .await
        .unwrap();
        House {
            handle: runtime.handle.clone(),
            runtime,
            store: fake,
            clock,
        }
    }

    /// Kills this server without a word and starts one on what is on disk.
    pub(crate) async fn restart(self) -> House {
        let store = self.store.restarted();
        House::with(settings(), store).await
    }

    pub(crate) async fn device(&self, user: &str) -> Device {
        let made = self.handle.create_device(APP, user, None).await.unwrap();
        Device {
            handle: self.handle.clone(),
            id: made.made.device,
            secret: made.secret,
        }
    }

    pub(crate) async fn ended(&self, ping: PingId) {
        until("the ping to end", async || {
            let view = self.handle.ping_view(APP, ping, None, 1_000).await;
            view.unwrap()
                .unwrap()
                .devices
                .iter()
                .all(|pair| matches!(pair.state, bellwire_server::ports::PairState::Ended { .. }))
        })
        .await;
    }
}

/// A registered device.
pub(crate) struct Device {
    pub(crate) handle: Handle,
    pub(crate) id: DeviceId,
    pub(crate) secret: String,
}

impl Device {
    /// The same device at another server.
    pub(crate) fn at(&self, house: &House) -> Device {
        Device {
            handle: house.handle.clone(),
            id: self.id,
            secret: self.secret.clone(),
        }
    }

    /// Says hello and hears the welcome.
    pub(crate) async fn attach(&self) -> Link {
        let mut link = self.connect(1).await;
        let first = link.next().await;
        assert!(matches!(first, Out::Welcome { .. }), "{first:?}");
        link
    }

    /// Says hello.
    pub(crate) async fn connect(&self, instance: u128) -> Link {
        self.connect_having(instance, &[]).await
    }

    /// Says hello, and that it has these already.
    pub(crate) async fn connect_having(&self, instance: u128, have: &[PingId]) -> Link {
        self.knock().await.enter_having(instance, have)
    }

    /// Shows its secret and goes no further.
    pub(crate) async fn knock(&self) -> Knock {
        let who = self
            .handle
            .authenticate(self.id, Identity::Secret(&self.secret))
            .await
            .unwrap();
        Knock {
            handle: self.handle.clone(),
            who,
        }
    }
}

/// A device that was let in and has not come to its mailbox yet.
pub(crate) struct Knock {
    handle: Handle,
    who: Authenticated,
}

impl Knock {
    pub(crate) fn enter(self, instance: u128) -> Link {
        self.enter_having(instance, &[])
    }

    fn enter_having(self, instance: u128, have: &[PingId]) -> Link {
        let session = self.handle.next_session();
        let (words, heard) = mpsc::unbounded_channel();
        let request = AttachRequest {
            session,
            instance,
            attempt: session.0,
            window: 32,
            min_urgency: Urgency::VeryLow,
            seen: have
                .iter()
                .map(|&ping| (ping, Verdict::Acknowledged))
                .collect(),
            carrier: "websocket",
            agent: Some("tester/1".into()),
        };
        let device = self.who.device();
        self.handle
            .attach(self.who, request, Arc::new(Words(words)));
        Link {
            handle: self.handle,
            device,
            session,
            heard,
        }
    }
}

struct Words(mpsc::UnboundedSender<Out>);

impl Outlet for Words {
    fn push(&self, out: Out) {
        drop(self.0.send(out));
    }
}

/// An attached device.
pub(crate) struct Link {
    handle: Handle,
    pub(crate) device: DeviceId,
    pub(crate) session: SessionId,
    heard: mpsc::UnboundedReceiver<Out>,
}

impl Link {
    pub(crate) async fn next(&mut self) -> Out {
        tokio::time::timeout(PATIENCE, self.heard.recv())
            .await
            .expect("nothing came in time")
            .expect("the runtime let go of the link")
    }

    /// The next notification: its ping, its number, whether it may have been sent before.
    pub(crate) async fn notification(&mut self) -> (PingId, u64, bool) {
        match self.next().await {
            Out::Send {
                seq,
                redelivered,
                notification,
            } => (notification.ping, seq, redelivered),
            other @ (Out::Welcome { .. }
            | Out::Refuse(_)
            | Out::Withdraw(_)
            | Out::Close(_)
            | Out::Drain { .. }) => panic!("expected a notification, not {other:?}"),
        }
    }

    pub(crate) fn silent(&mut self) -> bool {
        self.heard.is_empty()
    }

    pub(crate) fn acknowledge(&self, up_to: u64) {
        self.handle
            .acknowledge(self.device, self.session, Acknowledged::UpTo(up_to));
    }

    pub(crate) fn leave(&self) {
        self.handle.detach(self.device, self.session);
    }
}

/// A ping of a few bytes.
pub(crate) fn ping(target: Target) -> PingRequest {
    PingRequest {
        app: APP,
        target,
        content: Content {
            encoded: bytes::Bytes::from_static(b"ring"),
            size: 4,
        },
        ttl_s: None,
        urgency: Urgency::Normal,
        collapse: None,
        idempotency: None,
        wait_acknowledged: None,
    }
}

/// Waits for something to become true.
pub(crate) async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !is().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    assert!(
        tokio::time::timeout(PATIENCE, waiting).await.is_ok(),
        "waited in vain for {what}"
    );
}
