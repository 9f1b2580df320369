//! Who is being erased: each user once at a time, and so many users of one app.
//!
//! An erasure that meets a full disk waits until there is room, however long that takes. So what it holds is its own user's and its own
//! app's, and nobody else waits behind it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedMutexGuard, OwnedSemaphorePermit, Semaphore};

use super::locked;
use crate::delivery::AppId;

/// Users of one app that are erased at the same time; more wait.
const USERS_ERASED_AT_ONCE: usize = 16;

/// All erasures. Nothing is kept of an app or a user once nobody erases or waits.
#[derive(Default)]
pub(super) struct Erasing(Arc<Mutex<HashMap<AppId, Lane>>>);

struct Lane {
    places: Arc<Semaphore>,
    users: HashMap<String, Entry>,
}

#[derive(Default)]
struct Entry {
    lock: Arc<tokio::sync::Mutex<()>>,
    /// Who erases this user or waits for it.
    callers: usize,
}

/// Nobody else erases this user until it is dropped.
pub(super) struct Alone {
    apps: Arc<Mutex<HashMap<AppId, Lane>>>,
    app: AppId,
    user: String,
    held: Option<(OwnedMutexGuard<()>, Option<OwnedSemaphorePermit>)>,
}

impl Erasing {
    /// Waits for whoever erases this user, and for a place among its app's. Dropping the future leaves nothing behind.
    pub(super) async fn alone(&self, app: AppId, user: &str) -> Alone {
        let (lock, places) = {
            let mut apps = locked(&self.0);
            let lane = apps.entry(app).or_insert_with(|| Lane {
                places: Arc::new(Semaphore::new(USERS_ERASED_AT_ONCE)),
                users: HashMap::new(),
            });
            let entry = lane.users.entry(user.to_owned()).or_default();
            entry.callers += 1;
            (Arc::clone(&entry.lock), Arc::clone(&lane.places))
        };
        let mut alone = Alone {
            apps: Arc::clone(&self.0),
            app,
            user: user.to_owned(),
            held: None,
        };
        let guard = lock.lock_owned().await;
        // It is never closed.
        let place = places.acquire_owned().await.ok();
        alone.held = Some((guard, place));
        alone
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        // Before the entry: who comes next must not find another lock while this one is held.
        self.held = None;
        let mut apps = locked(&self.apps);
        let Some(lane) = apps.get_mut(&self.app) else {
            return;
        };
        if let Some(entry) = lane.users.get_mut(&self.user) {
            entry.callers -= 1;
            if entry.callers == 0 {
                lane.users.remove(&self.user);
            }
        }
        if lane.users.is_empty() {
            apps.remove(&self.app);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const ONE: AppId = AppId(1);
    const OTHER: AppId = AppId(2);

    #[test]
    fn an_erasure_that_stands_still_is_in_nobody_elses_way() {
        let erasing = Erasing::default();
        let stuck = (0..USERS_ERASED_AT_ONCE)
            .map(|number| erasing.alone(ONE, &number.to_string()).now_or_never());
        let mut stuck: Vec<_> = stuck.collect();
        assert!(stuck.iter().all(Option::is_some));
        // One more of this app waits, and so does who erases one of them again.
        let mut more = Box::pin(erasing.alone(ONE, "more"));
        let mut again = Box::pin(erasing.alone(ONE, "0"));
        assert!((&mut more).now_or_never().is_none());
        assert!((&mut again).now_or_never().is_none());
        // As many as like of another app do not, users of the same names among them.
        for number in 0..1_000 {
            assert!(
                erasing
                    .alone(OTHER, &number.to_string())
                    .now_or_never()
                    .is_some()
            );
        }
        drop(stuck.remove(0));
        let more = more.now_or_never();
        assert!(more.is_some());
        drop(more);
        assert!(again.now_or_never().is_some());
        drop(stuck);
        assert!(locked(&erasing.0).is_empty());
    }

    #[test]
    fn who_gave_up_waiting_leaves_nothing_behind() {
        let erasing = Erasing::default();
        let first = erasing.alone(ONE, "anna").now_or_never();
        assert!(erasing.alone(ONE, "anna").now_or_never().is_none());
        assert_eq!(locked(&erasing.0)[&ONE].users["anna"].callers, 1);
        drop(first);
        assert!(locked(&erasing.0).is_empty());
    }
}
