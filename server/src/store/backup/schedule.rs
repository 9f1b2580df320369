//! Backups that the server makes by itself, and how many of them are kept.
//!
//! A thread of its own looks once a second whether a backup is due, and copies what was erased to the file beside them. A backup is
//! written under another name, synced, read again in full, and only then gets its name; only after that the oldest ones go.
//! What goes has the name that the schedule gives, and says inside that it is of this very store. So a directory that several
//! servers share, that holds backups of before a restore, or those that somebody made by hand, loses nothing of theirs.

use std::cell::RefCell;
use std::io::{self, Read};
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use data_encoding::HEXLOWER;

use super::erasures::{Fresh, Mirror};
use super::read::{BackupFault, read};
use super::write::{Copier, Gentle};
use super::{HEADER, head_of};
use crate::delivery::Mono;
use crate::ports::{BackupError, BackupStats, BackupSummary, Clock};
use crate::store::log::disk::{Disk, DiskFile};
use crate::store::read::Reader;
use crate::store::settings::BackupPlan;
use crate::store::stamp;

/// How often the thread looks around.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it waits after the first failure; twice as long after each further one, up to the other.
const RETRY: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));
/// How long it waits while somebody else makes one.
const BUSY: Duration = Duration::from_secs(10);
/// Bytes after which the free room is looked at again.
const ROOM_EVERY: u64 = 16 << 20;
/// A trouble with the file of erasures is told so often.
const TELL_EVERY: Duration = Duration::from_secs(600);

const ENDING: &str = ".backup";
const PARTIAL: &str = ".partial";

/// Figures that others look at.
#[derive(Default)]
pub(in crate::store) struct BackupFigures {
    last_ms: AtomicU64,
    took_ms: AtomicU64,
    bytes: AtomicU64,
    kept: AtomicU64,
    failures: AtomicU64,
    due_ms: AtomicU64,
    trouble: Mutex<Option<String>>,
}

impl BackupFigures {
    pub(in crate::store) fn stats(&self, running: bool) -> BackupStats {
        let at = |number: &AtomicU64| number.load(Ordering::Relaxed);
        BackupStats {
            last_ms: at(&self.last_ms),
            took_ms: at(&self.took_ms),
            bytes: at(&self.bytes),
            kept: at(&self.kept),
            failures: at(&self.failures),
            due_ms: at(&self.due_ms),
            running,
            trouble: self
                .trouble
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .clone(),
        }
    }

    fn trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }
}

/// Whether the thread is to end.
#[derive(Default)]
pub(in crate::store) struct Bell {
    closing: Mutex<bool>,
    changed: Condvar,
}

impl Bell {
    fn lock(&self) -> MutexGuard<'_, bool> {
        self.closing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::store) fn close(&self) {
        *self.lock() = true;
        self.changed.notify_all();
    }

    fn closing(&self) -> bool {
        *self.lock()
    }

    /// `true`: to end.
    fn wait(&self, time: Duration) -> bool {
        let (closing, _) = self
            .changed
            .wait_timeout_while(self.lock(), time, |closing| !*closing)
            .unwrap_or_else(PoisonError::into_inner);
        *closing
    }
}

/// What the thread needs.
pub(in crate::store) struct Schedule {
    pub(in crate::store) disk: Arc<dyn Disk>,
    pub(in crate::store) plan: BackupPlan,
    pub(in crate::store) copier: Arc<Copier>,
    pub(in crate::store) reader: Reader,
    pub(in crate::store) clock: Arc<dyn Clock>,
    pub(in crate::store) fresh: Arc<Fresh>,
    pub(in crate::store) reserve_bytes: u64,
    pub(in crate::store) figures: Arc<BackupFigures>,
    pub(in crate::store) bell: Arc<Bell>,
}

/// Why no backup was made.
#[derive(Debug, thiserror::Error)]
enum Unmade {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("only {free} bytes are free where backups go; {needed} are needed with the reserve")]
    NoRoom { free: u64, needed: u64 },
    #[error(transparent)]
    Backup(#[from] BackupError),
    #[error("what was written does not read back: {0}")]
    Unproved(BackupFault),
    #[error("it reads differently than it was written")]
    Different,
}

/// A backup of this store in the directory.
struct Made {
    name: String,
    begun_ms: u64,
    bytes: u64,
}

impl Schedule {
    /// The thread.
    pub(in crate::store) fn run(self) {
        let mut turns = Turns::new(self);
        while !turns.schedule.bell.wait(LOOK_EVERY) {
            turns.turn();
        }
        // What was erased in the last moment.
        turns.mirror();
    }

    /// The backups that the schedule made of this store, oldest first. What cannot be read, or is another's, is not among them.
    fn made(&self) -> io::Result<Vec<Made>> {
        let mut made = Vec::new();
        let prefix = self.prefix();
        for name in self.disk.list("")? {
            if !name.starts_with(&prefix) || !name.ends_with(ENDING) {
                continue;
            }
            let Ok(file) = self.disk.open(&name) else {
                continue;
            };
            let bytes = file.length()?;
            let mut head = [0; HEADER];
            if bytes <= HEADER as u64 || file.read_at(&mut head, 0).is_err() {
                continue;
            }
            if let Some(head) = head_of(&head)
                && head.store == self.copier.store
            {
                made.push(Made {
                    name,
                    begun_ms: head.begun_ms,
                    bytes,
                });
            }
        }
        made.sort_by(|a, b| (a.begun_ms, &a.name).cmp(&(b.begun_ms, &b.name)));
        Ok(made)
    }

    fn prefix(&self) -> String {
        format!("bellwire-{}-", HEXLOWER.encode(&self.copier.store[..4]))
    }

    /// Makes a backup, proves it, and lets go of old ones. Answers why one could not go, if so: there is a good backup all the same.
    /// Calls `beside` again and again meanwhile.
    fn make(&self, beside: &dyn Fn()) -> Result<Option<io::Error>, Unmade> {
        let mut made = self.made()?;
        let expected = made.last().map_or(0, |last| last.bytes);
        self.room(expected)?;
        self.sweep()?;
        let begun = self.clock.now();
        let name = format!("{}{}{ENDING}", self.prefix(), stamp(begun.unix_ms));
        let partial = format!("{name}{PARTIAL}");
        let written = self.write(&partial, beside);
        let summary = match written {
            Ok(summary) => summary,
            Err(error) => {
                // Half a backup only takes room.
                if let Err(error) = self.disk.remove(&partial)
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(%error, file = partial, "an unfinished backup could not be removed");
                }
                return Err(error);
            }
        };
        self.disk.rename(&partial, &name)?;
        self.disk.sync_dir("")?;
        let took = self.clock.now().mono - begun.mono;
        let figures = &self.figures;
        figures.last_ms.store(summary.begun_ms, Ordering::Relaxed);
        figures.bytes.store(summary.bytes, Ordering::Relaxed);
        let took_ms = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
        figures.took_ms.store(took_ms, Ordering::Relaxed);
        let newest = Made {
            name: name.clone(),
            begun_ms: summary.begun_ms,
            bytes: summary.bytes,
        };
        tracing::info!(
            file = name,
            bytes = summary.bytes,
            last_frame = summary.last_frame,
            left_out = summary.left_out,
            took_ms,
            "made a backup and read it again"
        );
        made.push(newest);
        Ok(self.retire(made).err())
    }

    fn write(&self, partial: &str, beside: &dyn Fn()) -> Result<BackupSummary, Unmade> {
        let file = self.disk.create(partial)?;
        let mut out = Out {
            file: &*file,
            at: 0,
        };
        let looked = std::cell::Cell::new(0);
        let short = RefCell::new(None);
        let summary = self.copier.copy_gently(&mut out, &|progress| {
            if self.bell.closing() {
                return ControlFlow::Break(());
            }
            beside();
            if progress.bytes - looked.get() >= ROOM_EVERY {
                looked.set(progress.bytes);
                if let Err(error) = self.room(0) {
                    *short.borrow_mut() = Some(error);
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        });
        if let Some(short) = short.into_inner() {
            return Err(short);
        }
        let summary = summary?;
        file.sync()?;
        let mut input = In {
            file: &*file,
            at: 0,
            gentle: Gentle::new(&*self.clock),
        };
        let read = read(
            &mut input,
            &mut |_| {
                if self.bell.closing() {
                    return Err(BackupFault::Refused("the server goes down".to_owned()));
                }
                beside();
                Ok(())
            },
            &mut |_| {},
        )
        .map_err(Unmade::Unproved)?;
        if read != summary {
            return Err(Unmade::Different);
        }
        Ok(summary)
    }

    /// Removes what an earlier run was writing.
    fn sweep(&self) -> io::Result<()> {
        let prefix = self.prefix();
        for name in self.disk.list("")? {
            if name.starts_with(&prefix) && name.ends_with(PARTIAL) {
                tracing::warn!(file = name, "removing a backup that was never finished");
                self.disk.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Removes the oldest, by number and by age, but never the newest one.
    fn retire(&self, mut made: Vec<Made>) -> io::Result<()> {
        let keep = usize::try_from(self.plan.keep.max(1)).unwrap_or(usize::MAX);
        let keep_ms = u64::try_from(self.plan.keep_for.as_millis()).unwrap_or(u64::MAX);
        let too_old = self.clock.now().unix_ms.saturating_sub(keep_ms);
        let mut gone = 0;
        let mut removed = Ok(());
        while made.len() - gone > 1 && (made.len() - gone > keep || made[gone].begun_ms < too_old) {
            let old = &made[gone];
            removed = self.disk.remove(&old.name);
            if removed.is_err() {
                break;
            }
            tracing::info!(file = old.name, "removed an old backup");
            gone += 1;
        }
        made.drain(..gone);
        self.figures
            .kept
            .store(made.len() as u64, Ordering::Relaxed);
        if gone > 0 {
            self.disk.sync_dir("")?;
        }
        removed
    }

    fn room(&self, expected: u64) -> Result<(), Unmade> {
        let free = self.disk.free()?;
        let needed = expected.saturating_add(self.reserve_bytes);
        if free < needed {
            return Err(Unmade::NoRoom { free, needed });
        }
        Ok(())
    }
}

/// The turns of the thread, for whoever takes them.
pub(in crate::store) struct Turns {
    schedule: Schedule,
    mirror: RefCell<Mirroring>,
    due: Option<Mono>,
    failed: u32,
}

/// The file of erasures, and when it was looked at.
struct Mirroring {
    mirror: Mirror,
    last: Mono,
    told: Option<Mono>,
}

impl Turns {
    pub(in crate::store) fn new(schedule: Schedule) -> Turns {
        Turns {
            mirror: RefCell::new(Mirroring {
                mirror: Mirror::new(Arc::clone(&schedule.disk), Arc::clone(&schedule.fresh)),
                last: schedule.clock.now().mono,
                told: None,
            }),
            schedule,
            due: None,
            failed: 0,
        }
    }

    /// Looks around.
    pub(in crate::store) fn turn(&mut self) {
        self.mirror();
        let now = self.schedule.clock.now();
        let due = match self.due {
            Some(due) => due,
            None => self.first_due(),
        };
        if now.mono < due {
            return;
        }
        let wait = match self.schedule.make(&|| self.mirror_in_time()) {
            Ok(left) => {
                self.failed = 0;
                let trouble = left.map(|error| {
                    tracing::error!(
                        %error,
                        directory = %self.schedule.plan.dir.display(),
                        "a backup was made, but an old one could not be removed"
                    );
                    format!("an old backup could not be removed: {error}")
                });
                self.schedule.figures.trouble(trouble);
                self.schedule.plan.every
            }
            Err(Unmade::Backup(BackupError::Busy)) => BUSY,
            Err(Unmade::Backup(BackupError::Interrupted)) => return,
            Err(error) if self.schedule.bell.closing() => {
                tracing::debug!(%error, "a backup was broken off");
                return;
            }
            Err(error) => self.failed(&error),
        };
        self.wait(wait);
    }

    fn wait(&mut self, time: Duration) {
        let now = self.schedule.clock.now();
        self.due = Some(now.mono + time);
        let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        self.schedule
            .figures
            .due_ms
            .store(now.unix_ms.saturating_add(ms), Ordering::Relaxed);
    }

    fn failed(&mut self, error: &Unmade) -> Duration {
        let factor = 1u32.checked_shl(self.failed.min(16)).unwrap_or(u32::MAX);
        let wait = (RETRY.0 * factor)
            .min(RETRY.1)
            .min(self.schedule.plan.every);
        self.failed += 1;
        let figures = &self.schedule.figures;
        figures.failures.fetch_add(1, Ordering::Relaxed);
        figures.trouble(Some(error.to_string()));
        tracing::error!(
            %error,
            directory = %self.schedule.plan.dir.display(),
            retry_s = wait.as_secs(),
            "no backup could be made; look at the directory and its free room"
        );
        wait
    }

    /// When the first backup of this run is due: so long after the last one, at once if that time has passed.
    fn first_due(&mut self) -> Mono {
        let now = self.schedule.clock.now();
        let wait = match self.schedule.made() {
            Ok(made) => {
                let figures = &self.schedule.figures;
                figures.kept.store(made.len() as u64, Ordering::Relaxed);
                match made.last() {
                    Some(last) => {
                        figures.last_ms.store(last.begun_ms, Ordering::Relaxed);
                        figures.bytes.store(last.bytes, Ordering::Relaxed);
                        // One of the future was made under a wrong clock: it does not put off the next one for longer.
                        let age = Duration::from_millis(now.unix_ms.saturating_sub(last.begun_ms));
                        self.schedule.plan.every.saturating_sub(age)
                    }
                    None => Duration::ZERO,
                }
            }
            // Making one says what is wrong.
            Err(_) => Duration::ZERO,
        };
        self.wait(wait);
        now.mono + wait
    }

    /// While a backup is made, which may take hours, the thread has no turns.
    fn mirror_in_time(&self) {
        let last = self.mirror.borrow().last;
        if self.schedule.clock.now().mono - last >= LOOK_EVERY {
            self.mirror();
        }
    }

    fn mirror(&self) {
        let now = self.schedule.clock.now();
        let mut state = self.mirror.borrow_mut();
        state.last = now.mono;
        match state.mirror.turn(&self.schedule.reader, now.unix_ms) {
            Ok(()) => state.told = None,
            Err(error) => {
                if state.told.is_none_or(|told| now.mono - told >= TELL_EVERY) {
                    state.told = Some(now.mono);
                    tracing::error!(
                        %error,
                        directory = %self.schedule.plan.dir.display(),
                        "what is erased cannot be noted beside the backups; it is tried again each second"
                    );
                }
            }
        }
    }
}

/// A file, written from its beginning.
struct Out<'a> {
    file: &'a dyn DiskFile,
    at: u64,
}

impl io::Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_at(bytes, self.at)?;
        self.at += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file, read from its beginning.
struct In<'a> {
    file: &'a dyn DiskFile,
    at: u64,
    gentle: Gentle<'a>,
}

impl Read for In<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.gentle.rest();
        let left = self.file.length()?.saturating_sub(self.at);
        let step = buffer
            .len()
            .min(usize::try_from(left).unwrap_or(usize::MAX));
        self.file.read_at(&mut buffer[..step], self.at)?;
        self.at += step as u64;
        Ok(step)
    }
}
