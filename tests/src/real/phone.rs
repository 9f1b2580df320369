//! A device: the reference client with a ledger of what its app was given.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bellwire_client::{Carriers, Client, Codec, Event, Id, Notification, Trust, Verdict};

use super::{Api, Server, eventually};

/// How a device connects. Every scenario runs over each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// QUIC, CBOR.
    Quic,
    /// WebSocket, CBOR.
    WebSocket,
    /// WebSocket, JSON.
    Json,
}

impl Way {
    /// All of them.
    pub const ALL: [Way; 3] = [Way::Quic, Way::WebSocket, Way::Json];
}

/// What an app was given, in order, over all its lives.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: Mutex<Vec<(Id, String, bool)>>,
    events: Mutex<Vec<String>>,
}

impl Ledger {
    /// The bodies, in the order in which the app was given them.
    #[must_use]
    pub fn bodies(&self) -> Vec<String> {
        self.locked()
            .iter()
            .map(|(_, body, _)| body.clone())
            .collect()
    }

    /// The ids, in the same order.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        self.locked()
            .iter()
            .map(|(id, _, _)| id.to_string())
            .collect()
    }

    /// Whether each was marked as redelivered, in the same order.
    #[must_use]
    pub fn redelivered(&self) -> Vec<bool> {
        self.locked()
            .iter()
            .map(|&(_, _, redelivered)| redelivered)
            .collect()
    }

    /// What else happened, as debug text.
    #[must_use]
    pub fn events(&self) -> Vec<String> {
        self.events
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn locked(&self) -> std::sync::MutexGuard<'_, Vec<(Id, String, bool)>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A registered device with its state on disk; the client itself comes and goes.
pub struct Phone {
    device: Id,
    secret: String,
    way: Way,
    state: PathBuf,
    ca: PathBuf,
    window: u16,
    through: Option<SocketAddr>,
    /// What its app was given.
    pub ledger: Arc<Ledger>,
    client: Option<Client>,
}

impl Phone {
    /// Registers a device of `user` that keeps its state under `dir`.
    ///
    /// # Panics
    ///
    /// When registering is refused.
    pub async fn register(server: &Server, api: &Api, dir: &Path, user: &str, way: Way) -> Phone {
        let (device, secret) = api.device(user).await;
        Phone {
            state: dir.join(format!("phone-{device}")),
            device: device.parse().expect("the server made this id"),
            secret,
            way,
            ca: server.ca(),
            window: 32,
            through: None,
            ledger: Arc::default(),
            client: None,
        }
    }

    /// The same device, asking for a window.
    #[must_use]
    pub fn with_window(mut self, window: u16) -> Phone {
        self.window = window;
        self
    }

    /// From now on it trusts the authority of this server, as after a move to another data directory.
    pub fn trust(&mut self, server: &Server) {
        self.ca = server.ca();
    }

    /// The same device, connecting to this address instead of the server's.
    #[must_use]
    pub fn through(mut self, address: SocketAddr) -> Phone {
        self.through = Some(address);
        self
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> String {
        self.device.to_string()
    }

    /// Its secret.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// From now on it shows this secret.
    pub fn set_secret(&mut self, secret: &str) {
        secret.clone_into(&mut self.secret);
    }

    /// Starts the client. It answers every notification at once with `verdict`.
    ///
    /// # Panics
    ///
    /// When it does not start.
    pub async fn start(
        &mut self,
        server: &Server,
        verdict: impl Fn(&Notification) -> Verdict + Send + Sync + 'static,
    ) {
        super::install_provider();
        let (carriers, codec) = match self.way {
            Way::Quic => (Carriers::Quic, Codec::Cbor),
            Way::WebSocket => (Carriers::WebSocket, Codec::Cbor),
            Way::Json => (Carriers::WebSocket, Codec::Json),
        };
        let (ledger, events) = (Arc::clone(&self.ledger), Arc::clone(&self.ledger));
        let client = Client::builder()
            .server(self.through.unwrap_or(server.listen().devices).to_string())
            .device(self.device, self.secret.as_str())
            .trust(Trust::File(self.ca.clone()))
            .state_dir(&self.state)
            .carriers(carriers)
            .websocket_codec(codec)
            .window(self.window)
            .on_event(move |event: Event| {
                events
                    .events
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push(format!("{event:?}"));
            })
            .on_notification(move |notification: Notification| {
                let body = notification.content.body.clone().unwrap_or_default();
                ledger
                    .locked()
                    .push((notification.id, body, notification.redelivered));
                verdict(&notification)
            })
            .start()
            .await
            .expect("the client starts");
        self.client = Some(client);
    }

    /// Starts the client and waits until it is attached.
    pub async fn attach(&mut self, server: &Server, api: &Api) {
        self.start(server, |_| Verdict::Acknowledge).await;
        self.attached(api).await;
    }

    /// Waits until the server shows it as attached.
    pub async fn attached(&self, api: &Api) {
        let path = format!("/v1/devices/{}", self.device);
        eventually("the device is attached", async || {
            (!api.get(&path).await.json()["attached"].is_null()).then_some(())
        })
        .await;
    }

    /// Leaves in good order.
    pub async fn leave(&mut self) {
        if let Some(client) = self.client.take() {
            client.shutdown().await;
        }
    }

    /// Whether the client runs, attached or not.
    #[must_use]
    pub fn runs(&self) -> bool {
        self.client.is_some()
    }

    /// Lets a client that waits for its next attempt try at once.
    pub async fn nudge(&self) {
        if let Some(client) = &self.client {
            let _gone = client.network_changed(None).await;
        }
    }

    /// Ends the client as a killed app ends. Answers the ids that its app was given and its disk does not know: those may come
    /// again.
    pub async fn crash(&mut self) -> Vec<String> {
        if let Some(client) = self.client.take() {
            client.crash().await;
        }
        let window = std::fs::read(self.state.join("window")).unwrap_or_default();
        let known = |id: &Id| window.windows(16).any(|bytes| bytes == id.as_bytes());
        // Newest first: what comes before something known was saved with it or earlier.
        let given = self.ledger.locked();
        let unknown = given.iter().rev().map(|(id, _, _)| *id);
        unknown
            .take_while(|id| !known(id))
            .map(|id| id.to_string())
            .collect()
    }

    /// How many notifications have reached the device, over all its lives: those the app was given, and those the client
    /// answered by itself, because the app had answered them before or because their time was over.
    #[must_use]
    pub fn reached(&self) -> usize {
        let by_itself =
            |event: &&String| event.starts_with("Repeated") || event.starts_with("Expired");
        self.ledger.bodies().len() + self.ledger.events().iter().filter(by_itself).count()
    }

    /// Waits until so many have [reached](Self::reached) the device.
    ///
    /// # Panics
    ///
    /// When they do not come in time.
    pub async fn reached_by(&self, count: usize) {
        let (given, reached) = (self.ledger.bodies().len(), self.reached());
        eventually(
            &format!("{count} reached the device; at first {reached} had, {given} of them the app"),
            async || (self.reached() >= count).then_some(()),
        )
        .await;
    }

    /// Waits until the app was given so many.
    pub async fn given(&self, count: usize) {
        eventually(&format!("the app was given {count}"), async || {
            (self.ledger.bodies().len() >= count).then_some(())
        })
        .await;
    }
}
