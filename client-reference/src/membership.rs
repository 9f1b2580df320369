//! The topics of the device, joined: the wishes, their file, and who else wants to know.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::state::SubscriptionsFile;
use crate::topics::{Full, Request, Subscriptions, Wish, Wishes};

/// What the handle and the session share about topics.
#[derive(Debug)]
pub(crate) struct Membership {
    inner: Mutex<Inner>,
    /// `None`: the directory was given back, and nothing is written any more. Locked before `inner`, for as long as a write takes.
    file: Mutex<Option<SubscriptionsFile>>,
}

#[derive(Debug)]
struct Inner {
    wishes: Wishes,
    /// The file does not have all of it.
    unsaved: bool,
}

impl Membership {
    pub(crate) fn new(file: SubscriptionsFile, earlier: Subscriptions) -> Self {
        Self {
            inner: Mutex::new(Inner {
                wishes: Wishes::from_earlier(earlier),
                unsaved: false,
            }),
            file: Mutex::new(Some(file)),
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn file(&self) -> MutexGuard<'_, Option<SubscriptionsFile>> {
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn subscriptions(&self) -> Subscriptions {
        self.inner().wishes.subscriptions()
    }

    /// The app wants this; [`save`](Self::save) follows.
    pub(crate) fn want(&self, wish: Wish, names: Vec<String>) -> Result<(), Full> {
        let mut inner = self.inner();
        inner.wishes.want(wish, names)?;
        inner.unsaved = true;
        Ok(())
    }

    /// What is to be said next.
    pub(crate) fn next_request(&self) -> Option<Request> {
        self.inner().wishes.next_request()
    }

    /// See [`Wishes::confirm`]. Written down in the background.
    pub(crate) fn confirm(
        self: &Arc<Self>,
        request: Option<Request>,
        topics: &[String],
    ) -> Vec<String> {
        let refused = {
            let mut inner = self.inner();
            inner.unsaved = true;
            inner.wishes.confirm(request, topics)
        };
        self.save_in_background();
        refused
    }

    /// See [`Wishes::blame`]. Written down in the background.
    pub(crate) fn blame(self: &Arc<Self>, request: Request) -> Vec<String> {
        let given_up = {
            let mut inner = self.inner();
            inner.unsaved = true;
            inner.wishes.blame(request)
        };
        self.save_in_background();
        given_up
    }

    /// Writes down what changed.
    ///
    /// # Errors
    /// Those of the file system, or that the directory was given back.
    pub(crate) async fn save(self: &Arc<Self>) -> io::Result<()> {
        let membership = self.clone();
        let saving = tokio::task::spawn_blocking(move || membership.save_now());
        saving
            .await
            .unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// A failure costs a question that is asked once more after a restart.
    fn save_in_background(self: &Arc<Self>) {
        let membership = self.clone();
        // Dropped, so it runs by itself; `release` waits for a write that has begun.
        drop(tokio::task::spawn_blocking(move || {
            if let Err(error) = membership.save_now() {
                tracing::debug!(%error, "cannot write down what is known of topics");
            }
        }));
    }

    fn save_now(&self) -> io::Result<()> {
        let file = self.file();
        let known = {
            let mut inner = self.inner();
            if !inner.unsaved {
                return Ok(());
            }
            inner.unsaved = false;
            inner.wishes.subscriptions()
        };
        let saved = match &*file {
            Some(file) => file.save(&known),
            None => Err(io::Error::other("the directory was given back")),
        };
        if saved.is_err() {
            self.inner().unsaved = true;
        }
        saved
    }

    /// Gives the directory back; what changed last is written first, unless it is to look like a crash. Blocks.
    pub(crate) fn release(&self, save: bool) {
        if save && let Err(error) = self.save_now() {
            tracing::warn!(%error, "cannot write down what is known of topics");
        }
        *self.file() = None;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn open(directory: &std::path::Path) -> Arc<Membership> {
        let (file, earlier) = SubscriptionsFile::open(directory, true, 7);
        Arc::new(Membership::new(file, earlier))
    }

    #[tokio::test]
    async fn a_wish_is_on_disk_when_it_was_saved_and_a_failure_is_told_and_mended_by_the_next() {
        let directory = tempfile::tempdir().unwrap();
        let membership = open(directory.path());
        membership.want(Wish::Join, vec!["a".to_owned()]).unwrap();
        membership.save().await.unwrap();
        assert_eq!(open(directory.path()).subscriptions().joining, ["a"]);

        std::fs::remove_dir_all(directory.path()).unwrap();
        membership.want(Wish::Join, vec!["b".to_owned()]).unwrap();
        assert!(membership.save().await.is_err());
        std::fs::create_dir(directory.path()).unwrap();
        membership.save().await.unwrap();
        assert_eq!(open(directory.path()).subscriptions().joining, ["a", "b"]);
    }

    #[tokio::test]
    async fn nothing_is_written_once_the_directory_was_given_back() {
        let directory = tempfile::tempdir().unwrap();
        let membership = open(directory.path());
        membership.want(Wish::Join, vec!["a".to_owned()]).unwrap();
        membership.release(true);
        membership.want(Wish::Join, vec!["b".to_owned()]).unwrap();
        assert!(membership.save().await.is_err());
        assert_eq!(open(directory.path()).subscriptions().joining, ["a"]);
    }
}
