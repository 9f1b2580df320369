//! Threads that read the store, because its reads block.
//!
//! Two queues, served fairly: what mailboxes ask for, which cannot be refused and is bounded by the mailboxes awake
//! (one read and one fetch each), and what HTTP and hellos ask for, bounded by [`READS_WAITING_MAX`].

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, unbounded};
use tokio::sync::oneshot;

use super::api::RuntimeError;
use super::reply;
use super::shard::{Inbox, Input};
use crate::delivery::{DeviceId, Event, MailboxRead, RowKey};
use crate::ports::{ReadError, Store};

/// Reads of HTTP and hellos that may wait. More than connections before hello (10,000), so that only a store that
/// stands still turns anybody away.
pub(super) const READS_WAITING_MAX: usize = 16_384;
/// Reads that one thread takes at a time from one shard's turn, so that two threads share a long list.
const READS_AT_ONCE: usize = 16;

/// What a mailbox wants to know.
pub(super) enum MailboxJob {
    /// Rows and summary.
    Read(MailboxRead),
    /// Bodies.
    Fetch(DeviceId, Vec<RowKey>),
}

type Job = Box<dyn FnOnce(&dyn Store) + Send>;
type MailboxJobs = (Arc<Inbox>, Vec<MailboxJob>);

/// The pool. Its threads end when it is dropped.
pub(super) struct Reading {
    jobs: Sender<Job>,
    mailboxes: Sender<MailboxJobs>,
    /// Mailbox reads that wait or run.
    pending: Arc<AtomicUsize>,
}

impl Reading {
    /// Starts the threads.
    pub(super) fn start(store: &Arc<dyn Store>, threads: usize) -> std::io::Result<Reading> {
        let (jobs, job_queue) = bounded(READS_WAITING_MAX);
        let (mailboxes, mailbox_queue) = unbounded();
        let pending = Arc::new(AtomicUsize::new(0));
        for number in 0..threads {
            let reader = Reader {
                store: Arc::clone(store),
                jobs: job_queue.clone(),
                mailboxes: mailbox_queue.clone(),
                pending: Arc::clone(&pending),
            };
            thread::Builder::new()
                .name(format!("bellwire-read-{number}"))
                .spawn(move || reader.run())?;
        }
        Ok(Reading {
            jobs,
            mailboxes,
            pending,
        })
    }

    /// Reads that wait.
    pub(super) fn waiting(&self) -> usize {
        self.jobs.len() + self.pending.load(Ordering::Relaxed)
    }

    /// Hands over all that one turn of a shard wants to know; the answers come to its inbox.
    pub(super) fn mailboxes(&self, inbox: &Arc<Inbox>, jobs: &mut Vec<MailboxJob>) {
        self.pending.fetch_add(jobs.len(), Ordering::Relaxed);
        while !jobs.is_empty() {
            let rest = jobs.split_off(jobs.len().min(READS_AT_ONCE));
            let some = std::mem::replace(jobs, rest);
            // The receiving threads live as long as this sender.
            drop(self.mailboxes.send((Arc::clone(inbox), some)));
        }
    }

    /// Runs `read` on a reading thread.
    pub(super) async fn read<T, F>(&self, read: F) -> Result<T, RuntimeError>
    where
        T: Send + 'static,
        F: FnOnce(&dyn Store) -> Result<T, ReadError> + Send + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |store| {
            if answer.is_closed() {
                return;
            }
            reply(answer, read(store));
        });
        match self.jobs.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                metrics::counter!(crate::telemetry::metrics::READS_REFUSED_TOTAL).increment(1);
                return Err(RuntimeError::StoreBusy);
            }
            Err(TrySendError::Disconnected(_)) => return Err(RuntimeError::StoreUnavailable),
        }
        match answered.await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error @ ReadError::NotYet(_))) => {
                tracing::warn!(%error, "a read must be tried again");
                Err(RuntimeError::StoreBusy)
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "a read failed");
                Err(RuntimeError::StoreUnavailable)
            }
            // The thread caught a panic of the read and said so.
            Err(_) => Err(RuntimeError::StoreUnavailable),
        }
    }
}

struct Reader {
    store: Arc<dyn Store>,
    jobs: Receiver<Job>,
    mailboxes: Receiver<MailboxJobs>,
    pending: Arc<AtomicUsize>,
}

impl Reader {
    fn run(self) {
        loop {
            crossbeam_channel::select! {
                recv(self.mailboxes) -> some => match some {
                    Ok((inbox, jobs)) => self.mailbox_jobs(&inbox, jobs),
                    Err(_) => return,
                },
                recv(self.jobs) -> job => match job {
                    Ok(job) => {
                        if catch_unwind(AssertUnwindSafe(|| job(&*self.store))).is_err() {
                            tracing::error!("a read panicked; its caller is told that the store is unavailable");
                        }
                    }
                    Err(_) => return,
                },
            }
        }
    }

    fn mailbox_jobs(&self, inbox: &Inbox, jobs: Vec<MailboxJob>) {
        let count = jobs.len();
        let answers = jobs.into_iter().map(|job| {
            let device = match &job {
                MailboxJob::Read(request) => request.device,
                MailboxJob::Fetch(device, _) => *device,
            };
            Input::Event(device, self.mailbox_job(&job))
        });
        // Collected before the inbox is locked.
        let answers: Vec<Input> = answers.collect();
        self.pending.fetch_sub(count, Ordering::Relaxed);
        inbox.push_all(answers);
    }

    fn mailbox_job(&self, job: &MailboxJob) -> Event {
        match job {
            MailboxJob::Read(request) => Event::Read(
                self.attempt(|store| store.read_mailbox(request))
                    .map(Box::new),
            ),
            MailboxJob::Fetch(device, rows) => {
                Event::Bodies(self.attempt(|store| store.read_bodies(*device, rows)))
            }
        }
    }

    fn attempt<T>(&self, read: impl FnOnce(&dyn Store) -> Result<T, ReadError>) -> Result<T, ()> {
        match catch_unwind(AssertUnwindSafe(|| read(&*self.store))) {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => {
                tracing::error!(%error, "a mailbox could not be read");
                Err(())
            }
            Err(_) => {
                tracing::error!("reading a mailbox panicked");
                Err(())
            }
        }
    }
}
