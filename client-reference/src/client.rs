//! The handle of a running client.

use std::sync::Arc;

use bellwire_protocol::PresenceState;
use bellwire_protocol::limits::{TOPIC_BYTES_MAX, TOPICS_MAX};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::builder::Builder;
use crate::membership::Membership;
use crate::session::Command;
use crate::topics::{Full, Subscriptions, Wish};

/// A running client. Dropping it leaves in the background; [`shutdown`](Self::shutdown) waits until it is done.
#[derive(Debug, Clone)]
pub struct Client {
    pub(crate) commands: mpsc::Sender<Command>,
    pub(crate) has_ended: watch::Receiver<bool>,
    pub(crate) crash: CancellationToken,
    pub(crate) leave: CancellationToken,
    /// Cancels `leave` with the last handle.
    pub(crate) _leave_when_dropped: Arc<DropGuard>,
    pub(crate) membership: Arc<Membership>,
}

impl Client {
    /// Begins the settings of a client.
    pub fn builder() -> Builder {
        Builder::new()
    }

    /// Leaves in good order: the callback that runs is finished, its verdict saved and told, the server hears `bye`. What the
    /// app has not seen stays with the server. Takes no longer than the callback and the answer of the server, and at most about
    /// 25 seconds, when the app, the network and the disk hang all at once.
    pub async fn shutdown(self) {
        self.leave.cancel();
        let _ = self.commands.send(Command::Shutdown).await;
        self.ended().await;
    }

    /// Waits until the client has ended, by [`shutdown`](Self::shutdown) or because the server said never to come back.
    pub async fn ended(&self) {
        let mut has_ended = self.has_ended.clone();
        // An error means that the task is gone: ended as well.
        let _ = has_ended.wait_for(|ended| *ended).await;
    }

    /// Ends at once, as if the process had been killed: no verdict is saved or said any more, nothing is closed in order. For
    /// tests of what comes after a crash.
    pub async fn crash(self) {
        self.crash.cancel();
        self.ended().await;
    }

    /// The network changed, or the machine woke up: on QUIC the session moves to the new network, on WebSocket it is probed,
    /// and without a session a pause is cut short. `name` is as in [`Builder::network`].
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn network_changed(&self, name: Option<String>) -> Result<(), Gone> {
        self.ask(Command::NetworkChanged(name)).await
    }

    /// Tells the server whether a person uses the app just now: this session at once, and every later one when it begins. Until
    /// this is called nothing is said.
    ///
    /// # Errors
    /// When the client has ended.
    pub async fn presence(&self, state: PresenceState) -> Result<(), Gone> {
        self.ask(Command::Presence(state)).await
    }

    /// Asks to become a member of topics, as far as the app's rules allow it; [`Event::Subscribed`](crate::Event::Subscribed)
    /// tells what came of it. Once this returns, the wish is on disk: it is said to the server as soon as there is a session, over
    /// broken connections and restarts, until it is answered, and then never again. The server keeps memberships, so
    /// an app asks once, or at each of its starts. Of two wishes for one topic the later one counts. No topics at all: asks what the device
    /// is a member of.
    ///
    /// # Errors
    /// What is wrong with the names, when 200 of them wait for an answer already, when the file cannot be written, or when the
    /// client has ended.
    pub async fn subscribe<T: Into<String>>(
        &self,
        topics: impl IntoIterator<Item = T>,
    ) -> Result<(), TopicsError> {
        self.wish(Wish::Join, collect(topics)?).await
    }

    /// Asks to leave topics; otherwise like [`subscribe`](Self::subscribe).
    ///
    /// # Errors
    /// As [`subscribe`](Self::subscribe).
    pub async fn unsubscribe<T: Into<String>>(
        &self,
        topics: impl IntoIterator<Item = T>,
    ) -> Result<(), TopicsError> {
        self.wish(Wish::Leave, collect(topics)?).await
    }

    /// What is known of the device's topics, also without a session: what the server said last, and what was asked for and not
    /// answered yet. The backend may have changed it since.
    pub fn subscriptions(&self) -> Subscriptions {
        self.membership.subscriptions()
    }

    async fn wish(&self, wish: Wish, topics: Vec<String>) -> Result<(), TopicsError> {
        if self.commands.is_closed() {
            return Err(Gone.into());
        }
        self.membership
            .want(wish, topics)
            .map_err(|Full| TopicsError::TooMany)?;
        let saved = self.membership.save().await;
        // Also what a restart would forget is asked for now.
        self.ask(Command::Topics).await?;
        saved.map_err(TopicsError::Unsaved)
    }

    async fn ask(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).await.map_err(|_| Gone)
    }
}

/// The client has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has ended")]
pub struct Gone;

/// Why topics cannot be asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TopicsError {
    /// More than 100 names, or one that is not 1 to 128 bytes long.
    #[error("at most 100 topics, each with a name of 1 to 128 bytes")]
    Invalid,
    /// 200 wishes wait for the server's answer already. Nothing was changed.
    #[error("200 wishes for topics wait for the server's answer already; wait for a session first")]
    TooMany,
    /// The wish could not be written down. It is said to the server all the same, but a restart forgets it.
    #[error("the wish is not on disk, so a restart forgets it: {0}")]
    Unsaved(#[source] std::io::Error),
    /// The client has ended.
    #[error(transparent)]
    Gone(#[from] Gone),
}

/// The names, unless there are too many of them or one has a wrong length.
fn collect<T: Into<String>>(
    topics: impl IntoIterator<Item = T>,
) -> Result<Vec<String>, TopicsError> {
    let topics: Vec<String> = topics
        .into_iter()
        .take(TOPICS_MAX + 1)
        .map(Into::into)
        .collect();
    let fits = topics.len() <= TOPICS_MAX
        && topics
            .iter()
            .all(|topic| (1..=TOPIC_BYTES_MAX).contains(&topic.len()));
    if fits {
        Ok(topics)
    } else {
        Err(TopicsError::Invalid)
    }
}
