//! One device: the reference client, and a diary of what reached its app.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bellwire_client::{Carrier, Carriers, Client, Event, Trust, Verdict};
use tokio::sync::Notify;

use super::screen::Screen;
use crate::cli::Failure;

/// What is needed to be this device again after it was away.
#[derive(Clone)]
pub(super) struct Identity {
    /// For people.
    pub(super) name: &'static str,
    /// Device id.
    pub(super) id: String,
    /// Its secret.
    pub(super) secret: String,
    /// `host:port` of the device port.
    pub(super) server: String,
    /// The authority to trust.
    pub(super) ca: PathBuf,
    /// Where it keeps its window of ids.
    pub(super) state: PathBuf,
    /// Which carrier it uses, so that the tour shows both.
    pub(super) carriers: Carriers,
}

/// A device that is switched on.
pub(super) struct Device {
    client: Client,
    diary: Arc<Diary>,
}

/// What happened to a device; outlives its being switched off.
#[derive(Default)]
pub(super) struct Diary {
    pages: Mutex<Pages>,
    changed: Notify,
}

#[derive(Default)]
struct Pages {
    connected: Option<Carrier>,
    sessions: u32,
    /// Id and body of each call of the app.
    rang: Vec<(String, Option<String>)>,
    last_trouble: Option<String>,
}

impl Diary {
    fn open(&self) -> MutexGuard<'_, Pages> {
        // A panic while writing a page leaves it readable.
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, entry: impl FnOnce(&mut Pages)) {
        entry(&mut self.open());
        self.changed.notify_waiters();
    }

    /// How often the app was called with this ping.
    pub(super) fn times(&self, ping: &str) -> usize {
        self.open().rang.iter().filter(|(id, _)| id == ping).count()
    }

    /// How many sessions stood so far.
    pub(super) fn sessions(&self) -> u32 {
        self.open().sessions
    }

    /// Which carrier the session has that stands now.
    pub(super) fn carrier(&self) -> Option<Carrier> {
        self.open().connected
    }

    /// Whether the app was called with this text.
    pub(super) fn has_body(&self, body: &str) -> bool {
        self.open()
            .rang
            .iter()
            .any(|(_, text)| text.as_deref() == Some(body))
    }

    /// Waits until it is so.
    pub(super) async fn until(
        &self,
        what: &str,
        limit: Duration,
        so: impl Fn(&Diary) -> bool,
    ) -> Result<(), Failure> {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                // Listen first, look then: what happens in between is not missed.
                changed.as_mut().enable();
                if so(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(limit, waiting).await.map_err(|_| {
            let trouble = self.open().last_trouble.clone();
            Failure::new(
                format!("{what}: this did not happen within {} s", limit.as_secs()),
                trouble.unwrap_or_else(|| {
                    "the device reports no trouble; look at the server's log".to_owned()
                }),
            )
        })
    }
}

impl Device {
    /// Switches it on. The diary may be one from before.
    pub(super) async fn on(
        identity: &Identity,
        diary: Arc<Diary>,
        screen: Arc<Screen>,
    ) -> Result<Device, Failure> {
        let unfit = |error: String| {
            Failure::new(
                format!("{} cannot be set up: {error}", identity.name),
                "please report it",
            )
        };
        let id = identity
            .id
            .parse()
            .map_err(|_| unfit(format!("\"{}\" is no device id", identity.id)))?;
        let (heard, seen, name) = (Arc::clone(&diary), Arc::clone(&diary), identity.name);
        let client = Client::builder()
            .server(identity.server.as_str())
            .device(id, identity.secret.as_str())
            .trust(Trust::File(identity.ca.clone()))
            .state_dir(&identity.state)
            .carriers(identity.carriers)
            .agent("bellwire demo")
            .on_notification(move |notification| {
                let content = &notification.content;
                screen.rang(name, content.title.as_deref(), content.body.as_deref());
                let (id, body) = (notification.id.to_string(), content.body.clone());
                seen.write(|pages| pages.rang.push((id, body)));
                Verdict::Acknowledge
            })
            .on_event(move |event| {
                if let Event::Connected { carrier, .. } = event {
                    heard.write(|pages| {
                        pages.connected = Some(carrier);
                        pages.sessions += 1;
                    });
                } else if let Event::Disconnected { why, .. } = event {
                    heard.write(|pages| {
                        pages.connected = None;
                        pages.last_trouble = Some(format!("{why}. {}", why.advice()));
                    });
                }
            })
            .start()
            .await
            .map_err(|error| unfit(error.to_string()))?;
        Ok(Device { client, diary })
    }

    /// What happened to it.
    pub(super) fn diary(&self) -> &Diary {
        &self.diary
    }

    /// Takes it away in good order; its diary stays.
    pub(super) async fn close(self) -> Arc<Diary> {
        self.client.shutdown().await;
        self.diary.write(|pages| pages.connected = None);
        self.diary
    }
}
