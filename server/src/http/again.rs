//! A task that wakes itself while it is polled is polled again at once.
//!
//! hyper hands the body of a request to its handler through a channel, and both ends of it are in the one task of the connection: reading
//! a body means that the task wakes itself two or three times. A scheduler takes each of these for new work: it puts the task behind all
//! others, and wakes a thread that sleeps to look for it, which then goes on with cold caches. Here they cost a flag.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures_util::task::AtomicWaker;

/// Polls in a row before other tasks have their turn.
const POLLS_MAX: usize = 8;

/// Nobody polls: who wakes, wakes the task.
const RESTS: u8 = 0;
/// It is being polled: who wakes, says so to whoever polls.
const POLLED: u8 = 1;
/// It was woken, and will be polled.
const WOKEN: u8 = 2;

/// Where the wakes of a future go.
#[derive(Default)]
struct Wakes {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Wakes {
    fn wake(self: Arc<Wakes>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Wakes>) {
        if self.state.swap(WOKEN, Ordering::AcqRel) == RESTS {
            self.task.wake();
        }
    }
}

/// Drives a future, see the head of this file.
pub(super) async fn again<T>(future: impl Future<Output = T>) -> T {
    let mut future = pin!(future);
    let wakes = Arc::new(Wakes::default());
    let waker = Waker::from(Arc::clone(&wakes));
    poll_fn(move |task| {
        wakes.task.register(task.waker());
        let mut cx = Context::from_waker(&waker);
        for _ in 0..POLLS_MAX {
            // A swap, so that what was done before a wake is seen by this poll.
            wakes.state.swap(POLLED, Ordering::AcqRel);
            if let Poll::Ready(output) = future.as_mut().poll(&mut cx) {
                return Poll::Ready(output);
            }
            let rests =
                wakes
                    .state
                    .compare_exchange(POLLED, RESTS, Ordering::AcqRel, Ordering::Acquire);
            if rests.is_ok() {
                return Poll::Pending;
            }
        }
        task.waker().wake_by_ref();
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use futures_util::task::{ArcWake, waker};

    use super::*;

    struct Count(AtomicUsize);

    impl ArcWake for Count {
        fn wake_by_ref(this: &Arc<Count>) {
            this.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn woken(count: &Arc<Count>) -> usize {
        count.0.load(Ordering::Relaxed)
    }

    #[test]
    fn a_future_that_wakes_itself_goes_on_without_waking_its_task() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let task = waker(Arc::clone(&count));
        let mut left = POLLS_MAX - 1;
        let mut future = pin!(again(poll_fn(move |cx| {
            if left == 0 {
                return Poll::Ready("done");
            }
            left -= 1;
            cx.waker().wake_by_ref();
            Poll::Pending
        })));
        let polled = future.as_mut().poll(&mut Context::from_waker(&task));
        assert_eq!(polled, Poll::Ready("done"));
        assert_eq!(woken(&count), 0);
    }

    #[test]
    fn a_future_that_never_rests_lets_others_have_their_turn() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let task = waker(Arc::clone(&count));
        let polls = AtomicUsize::new(0);
        let mut future = pin!(again(poll_fn(|cx| {
            polls.fetch_add(1, Ordering::Relaxed);
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        })));
        for turn in 1..=3 {
            let polled = future.as_mut().poll(&mut Context::from_waker(&task));
            assert!(polled.is_pending());
            assert_eq!(polls.load(Ordering::Relaxed), turn * POLLS_MAX);
            assert_eq!(woken(&count), turn);
        }
    }

    #[test]
    fn a_wake_from_elsewhere_wakes_the_task_once_until_it_was_polled() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let task = waker(Arc::clone(&count));
        let inner = Arc::new(AtomicWaker::new());
        let registered = Arc::clone(&inner);
        let mut future = pin!(again(poll_fn(move |cx| {
            registered.register(cx.waker());
            Poll::<()>::Pending
        })));
        for turn in 1..=3 {
            let polled = future.as_mut().poll(&mut Context::from_waker(&task));
            assert!(polled.is_pending());
            assert_eq!(woken(&count), turn - 1);
            if let Some(waker) = inner.take() {
                waker.wake_by_ref();
                waker.wake();
            }
            assert_eq!(woken(&count), turn);
        }
    }
}
