//! Where accepted notifications are kept: **the log is the promise; the engine is an index that can be thrown away.**
//!
//! ```text
//!   shards ── want/submit ──▸ committer ── one frame, one sync ──▸ log ──▸ answers
//!                                │                                  │
//!                                ▾ shows the frame                  ▾ a little later, merged
//!   reads ───────────────────▸ overlay ──── over ──────────────▸ engine ──▸ snapshots ──▸ log is released
//! ```
//!
//! - [`log`]: segments of checksummed, numbered frames. What it synced is safe, and nothing else is.
//! - [`committer`]: gathers what everybody wants written, one frame at a time.
//! - [`mod@write`] and [`keys`]: from the port's operations to puts and deletes of keys; [`record`]: what a value looks like.
//! - [`layer`], [`overlay`] and [`read`]: everything that is safe, in one consistent look, however far the engine is behind.
//! - [`apply`]: from the log into the [`engine`].
//! - [`outcomes`]: how notifications ended, as history that promises nothing.
//! - [`snapshot`] and [`keeper`]: so that neither log nor engine grows for ever, and an engine can be rebuilt; [`current`]: how a
//!   rebuilt one takes the place of the other while everybody goes on.
//! - [`mod@recover`]: what can be proved at a start; [`mod@home`]: where the engine's files are.
//!
//! Nothing outside this folder knows trees or keys. Time and chance come in through the ports.

mod apply;
pub mod backup;
mod committer;
mod convert;
mod current;
mod engine;
pub mod examine;
pub mod fuzz;
mod home;
mod identity;
mod keeper;
mod keys;
mod layer;
mod little;
mod lock;
mod log;
mod outcomes;
mod overlay;
pub mod place;
mod read;
mod record;
mod recover;
mod set_aside;
mod settings;
mod snapshot;
pub mod testing;
mod write;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;

use self::apply::{Applier, LagLimit, Queue};
use self::backup::Copier;
use self::backup::erasures::Fresh;
use self::backup::schedule::{BackupFigures, Bell, Schedule};
use self::committer::{Desk, Done, Entry, LogFigures, Rides, Waiter, Work, Writer};
use self::current::Current;
use self::engine::Engine;
use self::home::{EngineHome, FileEngine, FilesHome, MemoryHome, RealFiles};
use self::identity::{FORMAT, Identity, UNDER_WAY, identity, write_identity};
use self::keeper::{Inheritance, Keeper, Room, Rules, Tools};
use self::lock::{DirLock, LockError};
use self::log::disk::{Disk, RealDisk};
use self::log::segment::Maker;
use self::log::{Ending, Shelf, ShelfError};
use self::outcomes::History;
use self::overlay::Overlay;
use self::read::Reader;
use self::recover::{Recovered, recover};
use self::set_aside::SetAside;
use self::write::Chore;
use crate::delivery::{
    AppId, CommitFailure, DeviceId, MailboxRead, MailboxView, Notification, PingId, RowKey,
    StoredMailbox, Withdrawal,
};
use crate::ports::{
    AppRecord, Audience, BackupError, BackupSummary, BackupWatch, Batch, CallbackRecord, Clock,
    Committed, DeadLetter, DeviceFilter, DeviceRecord, Entropy, ExpiredRow, ExpiryCursor, Grant,
    IdempotencyRecord, KeyRecord, Member, Membership, Op, OpenExpansion, OutcomeEvents,
    OutcomeFollow, OutcomeFollower, OutcomePage, OutcomePosition, OutcomeQuery, OutcomeRecord,
    OutcomeStats, Page, PairState, ReadError, Seen, SourceId, Spans, Stamp, Store, StoreHealth,
    StoreStats,
};

pub use self::convert::{
    ConvertError, ConvertPlan, ConvertStep, Converted, Digest, convert, plan_conversion,
};
pub use self::settings::{BackupPlan, EngineKind, OpenError, OpenReport, Rebuilt, StoreSettings};

/// Which part of the memory that the store may use is for frames that the engine has not applied yet.
const LAG_PART: u64 = 4;

/// An open store and how it was found.
pub struct Opened {
    /// The store.
    pub store: Arc<dyn Store>,
    /// What happened at the start; it has been told to the log already.
    pub report: OpenReport,
}

/// Opens the store in a data directory, or makes one there. Blocks for as long as the replay takes.
///
/// Starts five threads, which end with [`Store::close`] or when the store is dropped; idle, they cost one look at the
/// free room a second.
///
/// # Errors
///
/// When the directory is in use, cannot be read or written, was written by a later version, or holds nothing that can be
/// proved. Nothing is deleted then.
pub fn open(
    settings: &StoreSettings,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
) -> Result<Opened, OpenError> {
    let (house, report) = open_house(settings, clock, entropy)?;
    Ok(Opened {
        store: Arc::new(house),
        report,
    })
}

/// Opens a store to copy what is in it, whatever settings its server runs with: with the engine that counts there, which is
/// never built anew for its size, and without the history of outcomes, so that none of it is dropped.
///
/// # Errors
///
/// As [`open`]. Like a start, it builds an engine where none can be used.
pub fn open_as_it_is(
    settings: &StoreSettings,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
) -> Result<Opened, OpenError> {
    let settings = StoreSettings {
        rebuild_factor: 0,
        backup: None,
        ..settings.clone()
    };
    let (house, report) = open_house_for(&settings, Use::Copy, clock, entropy)?;
    Ok(Opened {
        store: Arc::new(house),
        report,
    })
}

/// What a store is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Serve,
    Copy,
}

fn open_house(
    settings: &StoreSettings,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
) -> Result<(House, OpenReport), OpenError> {
    open_house_for(settings, Use::Serve, clock, entropy)
}

fn open_house_for(
    settings: &StoreSettings,
    purpose: Use,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
) -> Result<(House, OpenReport), OpenError> {
    let place = place::prepare(&settings.dir)?;
    // Every path from here on is the one that links led to.
    let settings = &StoreSettings {
        dir: place.path,
        ..settings.clone()
    };
    let dir = settings.dir.as_path();
    place::judge(dir, settings.trust_file_system)?;
    let lock = DirLock::take(dir).map_err(|error| match error {
        LockError::Held(holder) => OpenError::InUse {
            dir: dir.to_owned(),
            holder,
        },
        LockError::Io(path, error) => OpenError::Io {
            what: "could not lock",
            path,
            error,
        },
    })?;
    // Without this word a server would begin with an empty store where somebody expects a full one.
    if backup::is_unfinished(dir) {
        return Err(OpenError::Restoring(dir.to_owned()));
    }
    let disk: Arc<dyn Disk> = Arc::new(RealDisk::new(dir));
    let engine = match purpose {
        Use::Serve => settings.engine,
        Use::Copy => there(settings, &disk)?,
    };
    let home = home(settings, &disk, engine);
    let parts = assemble(settings, disk, home, clock, entropy)?;
    let report = parts.report.clone();
    report.log();
    let history = (purpose == Use::Serve)
        .then(|| outcomes::Rules::new(settings.outcomes_keep, settings.outcomes_max_bytes));
    let house = House::start(parts, Some(lock), history)?;
    Ok((house, report))
}

/// The engine that counts in a data directory. Where none does, the one that the settings choose.
fn there(settings: &StoreSettings, disk: &Arc<dyn Disk>) -> Result<EngineKind, OpenError> {
    let files = RealFiles::new(&settings.dir, settings.memory_bytes);
    let home = FilesHome::new(Arc::clone(disk), Box::new(files), FileEngine::Sled);
    let counts = home.counts().map_err(OpenError::io(
        "could not look for the engine in",
        &settings.dir,
    ))?;
    Ok(match counts {
        Some(FileEngine::Sled) => EngineKind::Sled,
        Some(FileEngine::Fjall) => EngineKind::Fjall,
        None => settings.engine,
    })
}

/// Where an engine lives in a data directory.
fn home(settings: &StoreSettings, disk: &Arc<dyn Disk>, engine: EngineKind) -> Arc<dyn EngineHome> {
    let kind = match engine {
        EngineKind::Memory => return Arc::new(MemoryHome),
        EngineKind::Sled => FileEngine::Sled,
        EngineKind::Fjall => FileEngine::Fjall,
    };
    let files = RealFiles::new(&settings.dir, settings.memory_bytes);
    Arc::new(FilesHome::new(Arc::clone(disk), Box::new(files), kind))
}

/// An open store before its threads run.
struct Parts {
    engine: Arc<Current>,
    queue: Arc<Queue>,
    reader: Reader,
    writer: Writer,
    applier: Applier,
    keeper: Arc<Keeper>,
    copier: Arc<Copier>,
    /// Backups that the server makes by itself, if any.
    schedule: Option<Schedule>,
    figures: Arc<LogFigures>,
    clock: Arc<dyn Clock>,
    home: Arc<dyn EngineHome>,
    report: OpenReport,
}

/// From a disk to an open store.
fn assemble(
    settings: &StoreSettings,
    disk: Arc<dyn Disk>,
    home: Arc<dyn EngineHome>,
    clock: Arc<dyn Clock>,
    entropy: Arc<dyn Entropy>,
) -> Result<Parts, OpenError> {
    let dir = settings.dir.as_path();
    let io = |what| OpenError::io(what, dir);
    let Identity { store, begun } = identity(&*disk, dir, &*entropy)?;
    let shelf = Shelf::look(&disk, store).map_err(|error| match error {
        ShelfError::Io(error) => io("could not read the log in")(error),
        ShelfError::Newer { .. } => OpenError::Newer {
            what: error.to_string(),
        },
        ShelfError::Foreign(_) => OpenError::Mixed(error.to_string()),
    })?;
    let stamp = set_aside::free_stamp(&*disk, &stamp(clock.now().unix_ms))
        .map_err(io("could not look at what was set aside in"))?;
    let mut report = OpenReport::default();
    let recovered = recover(&*disk, &shelf, &*home, store, begun, &mut report)?;
    recover::go_on_without(&*disk, &shelf, &*home, &recovered, &stamp, &mut report)?;
    let Recovered {
        engine,
        tail,
        next_frame,
        live,
        anew: _,
        doubtful,
    } = recovered;
    report.torn = tail.ending == Ending::Torn;
    report.gaps = tail.gaps;
    report.last_frame = next_frame - 1;
    let mut put_out = put_out_snapshots(&*disk, next_frame, &stamp)
        .map_err(io("could not set a snapshot aside in"))?;
    let maker = Maker::new(Arc::clone(&disk), entropy, store, settings.segment_bytes);
    let (log, set_aside) = shelf
        .take_over(&tail, next_frame, maker, &stamp)
        .map_err(|error| {
            if log::disk::is_no_room(&error) {
                OpenError::NoRoom(error.to_string())
            } else {
                io("could not go on with the log in")(error)
            }
        })?;
    report.set_aside = set_aside;
    report.set_aside.append(&mut put_out);
    let queue = Arc::new(Queue::new(
        LagLimit {
            // What waits for the engine is in memory.
            bytes: settings.lag_bytes.min(settings.memory_bytes / LAG_PART),
            time: settings.lag_time.saturating_add(settings.rest_time),
        },
        settings.rest_time,
        next_frame - 1,
    ));
    let overlay = Arc::new(Overlay::new());
    let figures = Arc::new(LogFigures::default());
    let engine = Arc::new(Current::new(engine));
    let unnumbered = Arc::new(SetAside::new(Arc::clone(&disk), 0));
    let identity_disk = Arc::clone(&disk);
    let mut reader = Reader {
        engine: Arc::clone(&engine) as Arc<dyn Engine>,
        overlay: Arc::clone(&overlay),
        aside: unnumbered,
    };
    let run = match reader.run() {
        // It was there and cannot be read: rows must not look as if this run had accepted them. There were fewer runs
        // than seconds.
        Ok(_) if reader.aside.count() > 0 => {
            u32::try_from(clock.now().unix_ms / 1000).unwrap_or(u32::MAX)
        }
        Ok(run) => run.saturating_add(1),
        Err(ReadError::Newer(version)) => {
            return Err(OpenError::Newer {
                what: format!("its records have format {version}"),
            });
        }
        Err(ReadError::Engine(error) | ReadError::NotYet(error)) => {
            return Err(OpenError::Engine(error));
        }
    };
    report.run = run;
    let known_by = hash_key(&reader, &settings.key_mark)?;
    let aside = Arc::new(SetAside::new(Arc::clone(&disk), run));
    reader.aside = Arc::clone(&aside);
    let snapshots = snapshot::list(&*disk).map_err(io("could not list the snapshots in"))?;
    let newest = snapshots.last().copied().unwrap_or(0);
    let segments = Arc::clone(log.segments());
    let room = Arc::new(Room::default());
    let copier = Arc::new(Copier::new(backup::Tools {
        engine: Arc::clone(&engine) as Arc<dyn Engine>,
        segments: Arc::clone(&segments),
        figures: Arc::clone(&figures),
        aside: Arc::clone(&aside),
        clock: Arc::clone(&clock),
        store,
        key_mark: settings.key_mark,
        run,
        room: Arc::clone(&room),
    }));
    let live = match snapshots.last() {
        Some(frame) if live == 0 => snapshot::live_bytes(&*disk, *frame).unwrap_or(0),
        Some(_) | None => live,
    };
    let keeper = Keeper::new(
        Tools {
            engine: Arc::clone(&engine),
            home: Arc::clone(&home),
            disk,
            store,
            segments: Arc::clone(&segments),
            figures: Arc::clone(&figures),
            aside,
            clock: Arc::clone(&clock),
            room,
        },
        Rules {
            rebuild_factor: settings.rebuild_factor,
            rebuild_floor: settings.rebuild_floor,
            snapshot_bytes: settings.snapshot_bytes,
            snapshot_every: settings.snapshot_every,
            reserve_bytes: settings.reserve_bytes,
        },
        Inheritance {
            snapshots,
            live,
            log_bytes: segments.size_from(newest),
            last_frame: next_frame - 1,
        },
    );
    let mut applier = Applier::new(
        Arc::clone(&engine) as Arc<dyn Engine>,
        Arc::clone(&overlay),
        Arc::clone(&clock),
    );
    if doubtful {
        applier = applier.doubtful();
    }
    let mut writer = Writer::new(
        log,
        overlay,
        Arc::clone(&queue),
        Arc::clone(&clock),
        Arc::clone(&figures),
    );
    let schedule = settings.backup.clone().map(|plan| {
        let fresh = Arc::new(Fresh::default());
        writer.note_erased(Arc::clone(&fresh));
        Schedule {
            disk: Arc::new(RealDisk::new(&plan.dir)),
            plan,
            copier: Arc::clone(&copier),
            reader: reader.clone(),
            clock: Arc::clone(&clock),
            fresh,
            reserve_bytes: settings.reserve_bytes,
            figures: Arc::default(),
            bell: Arc::default(),
        }
    });
    let mut first = vec![Chore::Run(run)];
    first.extend(known_by);
    begin_run(&mut writer, &mut applier, &queue, first)?;
    if !begun {
        write_identity(&*identity_disk, store, true)
            .map_err(OpenError::io("could not write", &dir.join(FORMAT)))?;
    }
    Ok(Parts {
        engine,
        queue,
        reader,
        writer,
        applier,
        keeper: Arc::new(keeper),
        copier,
        schedule,
        figures,
        clock,
        home,
        report,
    })
}

/// Sets snapshots aside that begin behind the end of the log and were not used: the frames that lead up to them are written a
/// second time now, with something else in them.
fn put_out_snapshots(
    disk: &dyn Disk,
    next_frame: u64,
    stamp: &str,
) -> std::io::Result<Vec<String>> {
    let mut put_out = Vec::new();
    for frame in snapshot::list(disk)? {
        if frame > next_frame {
            let to = format!("{}/{stamp}-{frame:020}.snap", log::SET_ASIDE);
            disk.make_dir(log::SET_ASIDE)?;
            disk.rename(&snapshot::name(frame), &to)?;
            put_out.push(to);
        }
    }
    if !put_out.is_empty() {
        disk.sync_dir(log::SET_ASIDE)?;
        disk.sync_dir(snapshot::DIR)?;
    }
    Ok(put_out)
}

/// The beginning of a hash key's mark; `None`: the mark is not known.
fn mark_number(mark: &[u8; 32]) -> Option<u64> {
    let [a, b, c, d, e, f, g, h, ..] = *mark;
    (*mark != [0; 32]).then(|| u64::from_le_bytes([a, b, c, d, e, f, g, h]))
}

/// Compares the hash key of this start with the one that the store was begun with. Answers what is to be written if the
/// store does not know it yet.
fn hash_key(reader: &Reader, mark: &[u8; 32]) -> Result<Option<Chore>, OpenError> {
    let Some(ours) = mark_number(mark) else {
        return Ok(None);
    };
    match reader.hash_key() {
        Ok(Some(theirs)) if theirs != ours => Err(OpenError::HashKey),
        Ok(Some(_)) => Ok(None),
        Ok(None) => Ok(Some(Chore::HashKey(ours))),
        Err(ReadError::Newer(version)) => Err(OpenError::Newer {
            what: format!("its records have format {version}"),
        }),
        Err(ReadError::Engine(error) | ReadError::NotYet(error)) => Err(OpenError::Engine(error)),
    }
}

/// The first frame of a run says its number. Until it is safe nobody is served: a row of an earlier run may have been
/// sent, one of this run was not, and only the number tells them apart.
fn begin_run(
    writer: &mut Writer,
    applier: &mut Applier,
    queue: &Queue,
    chores: Vec<Chore>,
) -> Result<(), OpenError> {
    let mut entries = VecDeque::from([Entry {
        waiter: Waiter::Single(Box::new(|_| {})),
        work: Work::Chores(chores),
    }]);
    for (_, verdict) in writer.write_frame(&mut entries, &mut Rides::default()) {
        match verdict {
            Ok(()) => {}
            Err(CommitFailure::NoRoom) => {
                return Err(OpenError::NoRoom("no room for a log segment".to_owned()));
            }
            Err(CommitFailure::Failed) => {
                return Err(OpenError::FirstWrite(writer.failed().unwrap_or_default()));
            }
        }
    }
    applier
        .step(queue)
        .map_err(|error| OpenError::Engine(error.0))?;
    Ok(())
}

/// A time for names of files: `20261121T085913Z`.
fn stamp(unix_ms: u64) -> String {
    let seconds = i64::try_from(unix_ms / 1000).unwrap_or(i64::MAX);
    match time::OffsetDateTime::from_unix_timestamp(seconds) {
        Ok(at) => format!(
            "{:04}{:02}{:02}T{:02}{:02}{:02}Z",
            at.year(),
            u8::from(at.month()),
            at.day(),
            at.hour(),
            at.minute(),
            at.second()
        ),
        // Beyond the year 9999.
        Err(_) => format!("{unix_ms}"),
    }
}

/// The store with its threads.
struct House {
    desk: Arc<Desk>,
    queue: Arc<Queue>,
    keeper: Arc<Keeper>,
    copier: Arc<Copier>,
    backups: Option<Arc<BackupFigures>>,
    /// `None` if it could not be opened, and in tests that are not about it.
    history: Option<Arc<History>>,
    /// Outcomes that were not recorded because there is no history.
    unrecorded: AtomicU64,
    reader: Reader,
    engine: Arc<Current>,
    figures: Arc<LogFigures>,
    clock: Arc<dyn Clock>,
    run: u32,
    running: Mutex<Option<Running>>,
    /// Held until the last reader is gone, not only until [`Store::close`]: the engine's files stay open for reads. `None`
    /// in tests on a disk of memory.
    _lock: Option<DirLock>,
}

struct Running {
    committer: JoinHandle<()>,
    applier: JoinHandle<()>,
    keeper: JoinHandle<()>,
    backups: Option<(Arc<Bell>, JoinHandle<()>)>,
    history: Option<JoinHandle<()>>,
    home: Arc<dyn EngineHome>,
}

impl House {
    fn start(
        parts: Parts,
        lock: Option<DirLock>,
        history: Option<outcomes::Rules>,
    ) -> Result<House, OpenError> {
        let Parts {
            engine,
            queue,
            reader,
            mut writer,
            applier,
            keeper,
            copier,
            schedule,
            figures,
            clock,
            home,
            report,
        } = parts;
        // Before the first thread. Nothing that was promised depends on it.
        let history = history.and_then(|rules| open_history(&keeper, &clock, rules));
        let desk = Arc::new(Desk::new());
        let trouble = |error| OpenError::Io {
            what: "could not start a thread for",
            path: Path::new("the store").to_owned(),
            error,
        };
        writer.make_ahead().map_err(trouble)?;
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(run)
                .map_err(trouble)
        };
        let committer = {
            let desk = Arc::clone(&desk);
            spawn("store-committer", Box::new(move || desk.run(writer)))?
        };
        let applier = {
            let (desk, queue) = (Arc::clone(&desk), Arc::clone(&queue));
            spawn(
                "store-applier",
                Box::new(move || applier.run(&queue, &|| desk.caught_up())),
            )?
        };
        let keeping = {
            let keeper = Arc::clone(&keeper);
            spawn("store-keeper", Box::new(move || keeper.run()))?
        };
        let backups = schedule
            .as_ref()
            .map(|schedule| Arc::clone(&schedule.figures));
        let backing = match schedule {
            Some(schedule) => {
                let bell = Arc::clone(&schedule.bell);
                let thread = spawn("store-backups", Box::new(move || schedule.run()))?;
                Some((bell, thread))
            }
            None => None,
        };
        let recording = match &history {
            None => None,
            Some(history) => {
                let (history, reader) = (Arc::clone(history), reader.clone());
                let run = move || {
                    history.backfill(|from_ms, after| {
                        reader
                            .endings(from_ms, after, outcomes::BACKFILL_PAGE)
                            .map_err(|error| error.to_string())
                    });
                    drop(reader);
                    history.run();
                };
                Some(spawn("store-outcomes", Box::new(run))?)
            }
        };
        Ok(House {
            desk,
            queue,
            keeper,
            copier,
            backups,
            history,
            unrecorded: AtomicU64::new(0),
            reader,
            engine,
            figures,
            clock,
            run: report.run,
            running: Mutex::new(Some(Running {
                committer,
                applier,
                keeper: keeping,
                backups: backing,
                history: recording,
                home,
            })),
            _lock: lock,
        })
    }

    /// Reads, and hands the committer what rot left behind.
    fn reading<T>(&self, read: impl FnOnce(&Reader, &mut Vec<Chore>) -> T) -> T {
        let mut chores = Vec::new();
        let answer = read(&self.reader, &mut chores);
        self.desk.chores(chores);
        answer
    }
}

/// What health comes to.
fn health(figures: &LogFigures, keeper: &Keeper, behind: bool) -> StoreHealth {
    if let Some(why) = figures.failed() {
        return StoreHealth::Failed(why);
    }
    if keeper.room.full.load(Ordering::Relaxed) {
        return StoreHealth::Full {
            free: keeper.room.free.load(Ordering::Relaxed),
            reserve: keeper.rules.reserve_bytes,
        };
    }
    if behind {
        return StoreHealth::Behind;
    }
    StoreHealth::Open
}

/// What the figures come to.
fn stats(
    figures: &LogFigures,
    keeper: &Keeper,
    queue: &Queue,
    run: u32,
    now: crate::delivery::Mono,
) -> StoreStats {
    let (lag_bytes, lag) = queue.lag(now);
    let (log_bytes, log_segments) = keeper.segments.size();
    StoreStats {
        engine: keeper.engine.name(),
        run,
        lag_bytes_max: queue.limit().bytes,
        lag_ms_max: u64::try_from(queue.limit().time.as_millis()).unwrap_or(u64::MAX),
        reserve_bytes: keeper.rules.reserve_bytes,
        frames: figures.frames.load(Ordering::Relaxed),
        syncs: figures.syncs.load(Ordering::Relaxed),
        last_frame: figures.last_frame.load(Ordering::Relaxed),
        applied_frame: queue.applied(),
        lag_bytes,
        lag_ms: u64::try_from(lag.as_millis()).unwrap_or(u64::MAX),
        log_bytes,
        log_segments,
        engine_bytes: keeper.engine.size_bytes(),
        live_bytes: keeper.live_bytes(),
        snapshot_bytes: keeper.snapshot_bytes(),
        rebuilds: keeper.rebuilds(),
        free_bytes: keeper.room.free.load(Ordering::Relaxed),
        sync_us: figures.sync_us(),
        snapshot_frame: keeper.snapshot_frame(),
        set_aside: keeper.aside.count(),
        aside_bytes: keeper.aside_bytes(),
        backup: None,
        outcomes: OutcomeStats::default(),
    }
}

impl Store for House {
    fn register(&self, grant: Box<dyn Fn(Grant) + Send + Sync>) -> SourceId {
        self.desk.register(grant)
    }

    fn want(&self, source: SourceId) -> bool {
        self.desk.want(source)
    }

    fn submit(&self, source: SourceId, batch: Batch) {
        self.desk.submit(source, batch);
    }

    fn commit(&self, batch: Batch, done: Done) {
        self.desk.commit(Work::Ops(batch), done);
    }

    fn ride_along(&self, op: Op) {
        self.desk.ride_along(op);
    }

    fn read_mailbox(&self, request: &MailboxRead) -> Result<MailboxView, ReadError> {
        self.reading(|reader, chores| reader.mailbox(request, chores))
    }

    fn read_bodies(
        &self,
        device: DeviceId,
        rows: &[RowKey],
    ) -> Result<Vec<(RowKey, Option<Arc<Notification>>)>, ReadError> {
        self.reading(|reader, chores| reader.bodies(device, rows, chores))
    }

    fn withdrawals(&self, device: DeviceId) -> Result<Vec<Withdrawal>, ReadError> {
        self.reader.withdrawals(device)
    }

    fn pairs(
        &self,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<(AppId, DeviceId, PairState), DeviceId>, ReadError> {
        self.reader.pairs(ping, after, limit)
    }

    fn record_outcomes(&self, records: &mut Vec<OutcomeRecord>) {
        match &self.history {
            Some(history) => history.record(records),
            None => {
                self.unrecorded
                    .fetch_add(records.len() as u64, Ordering::Relaxed);
                records.clear();
            }
        }
    }

    fn outcomes(&self, query: &OutcomeQuery) -> Result<OutcomePage, ReadError> {
        match &self.history {
            Some(history) => history.query(query).map_err(unreadable_history),
            None => Ok(OutcomePage {
                kept_from_ms: self.clock.now().unix_ms,
                ..OutcomePage::default()
            }),
        }
    }

    fn outcomes_of_ping(
        &self,
        app: AppId,
        ping: PingId,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Vec<OutcomeRecord>, ReadError> {
        match &self.history {
            Some(history) => history
                .of_ping(app, ping, after, limit)
                .map_err(unreadable_history),
            None => Ok(Vec::new()),
        }
    }

    fn outcomes_end(&self) -> OutcomePosition {
        let history = self.history.as_ref();
        history.map_or(OutcomePosition(0), |history| history.end())
    }

    fn outcome_events(&self, follow: &OutcomeFollow) -> Result<OutcomeEvents, ReadError> {
        match &self.history {
            Some(history) => history.events(follow).map_err(unreadable_history),
            None => Ok(OutcomeEvents {
                items: Vec::new(),
                next: follow.from,
                more: false,
            }),
        }
    }

    fn follow_outcomes(&self, follower: Option<OutcomeFollower>) {
        if let Some(history) = &self.history {
            history.follow(follower);
        }
    }

    fn expired(
        &self,
        until_ms: u64,
        after: &ExpiryCursor,
        limit: usize,
    ) -> Result<Page<ExpiredRow, ExpiryCursor>, ReadError> {
        self.reading(|reader, chores| reader.expired(until_ms, after, limit, chores))
    }

    fn drop_receipts(&self, before_ms: u64, limit: usize) -> Result<usize, ReadError> {
        let now_ms = self.clock.now().unix_ms;
        let chores = self.reader.receipts(before_ms, now_ms, limit)?;
        if chores.is_empty() {
            return Ok(0);
        }
        let dropped = chores.len();
        let (sender, receiver) = mpsc::sync_channel(1);
        self.desk.commit(
            Work::Chores(chores),
            Box::new(move |verdict: Committed| {
                // The receiver waits below for as long as this lives.
                let _ = sender.send(verdict);
            }),
        );
        match receiver.recv() {
            Ok(Ok(())) => Ok(dropped),
            Ok(Err(CommitFailure::NoRoom)) => {
                Err(ReadError::Engine("there is no room on the disk".to_owned()))
            }
            Ok(Err(CommitFailure::Failed)) | Err(_) => Err(ReadError::Engine(
                "nothing can be written until a restart".to_owned(),
            )),
        }
    }

    fn device(&self, id: DeviceId) -> Result<Option<DeviceRecord>, ReadError> {
        self.reader.device(id)
    }

    fn devices(
        &self,
        app: AppId,
        filter: &DeviceFilter,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<DeviceRecord, DeviceId>, ReadError> {
        self.reader.devices(app, filter, after, limit)
    }

    fn user_devices(
        &self,
        app: AppId,
        user: &str,
        limit: usize,
    ) -> Result<Vec<DeviceId>, ReadError> {
        self.reader.user_devices(app, user, limit)
    }

    fn seen(&self, devices: &[DeviceId]) -> Result<Vec<Option<Seen>>, ReadError> {
        self.reader.seen(devices)
    }

    fn topics(&self, device: DeviceId) -> Result<Vec<Membership>, ReadError> {
        self.reader.topics(device)
    }

    fn spans(
        &self,
        app: AppId,
        device: DeviceId,
        topics: &[String],
    ) -> Result<Vec<Spans>, ReadError> {
        self.reader.spans(app, device, topics)
    }

    fn members(
        &self,
        app: AppId,
        audience: &Audience,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<Member, DeviceId>, ReadError> {
        self.reader.members(app, audience, after, limit)
    }

    fn mailboxes(
        &self,
        after: Option<DeviceId>,
        limit: usize,
    ) -> Result<Page<StoredMailbox, DeviceId>, ReadError> {
        self.reader.mailboxes(after, limit)
    }

    fn expansions(
        &self,
        after: Option<(AppId, Stamp)>,
        limit: usize,
    ) -> Result<Page<OpenExpansion, (AppId, Stamp)>, ReadError> {
        self.reader.expansions(after, limit)
    }

    fn chunk(&self, app: AppId, stamp: Stamp, number: u32) -> Result<Vec<DeviceId>, ReadError> {
        self.reader.chunk(app, stamp, number)
    }

    fn key(&self, id: [u8; 10]) -> Result<Option<KeyRecord>, ReadError> {
        self.reader.key(id)
    }

    fn keys(&self) -> Result<Vec<KeyRecord>, ReadError> {
        self.reader.keys()
    }

    fn callbacks(&self) -> Result<Vec<CallbackRecord>, ReadError> {
        self.reader.callbacks()
    }

    fn dead_letters(
        &self,
        app: AppId,
        after: Option<u64>,
        limit: usize,
    ) -> Result<Page<DeadLetter, u64>, ReadError> {
        self.reader.dead_letters(app, after, limit)
    }

    fn apps(&self) -> Result<Vec<AppRecord>, ReadError> {
        self.reader.apps()
    }

    fn idempotency(
        &self,
        app: AppId,
        key_hash: [u8; 32],
    ) -> Result<Option<IdempotencyRecord>, ReadError> {
        self.reader.idempotency(app, key_hash)
    }

    fn health(&self) -> StoreHealth {
        let behind = self.queue.behind(self.clock.now().mono);
        health(&self.figures, &self.keeper, behind)
    }

    fn crowded(&self) -> bool {
        self.queue.crowded(self.clock.now().mono)
    }

    fn stats(&self) -> StoreStats {
        let now = self.clock.now().mono;
        let backup = self.backups.as_ref();
        let history = self.history.as_ref();
        StoreStats {
            backup: backup.map(|figures| figures.stats(self.copier.is_busy())),
            outcomes: match history {
                Some(history) => history.stats(),
                None => OutcomeStats {
                    failed: self.unrecorded.load(Ordering::Relaxed),
                    ..OutcomeStats::default()
                },
            },
            ..stats(&self.figures, &self.keeper, &self.queue, self.run, now)
        }
    }

    fn backup(
        &self,
        out: &mut dyn std::io::Write,
        watch: BackupWatch<'_>,
    ) -> Result<BackupSummary, BackupError> {
        self.copier.copy_gently(out, watch)
    }

    fn close(&self) {
        self.copier.close();
        let running = self
            .running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let Some(running) = running else {
            return;
        };
        // In the order of the way: nothing comes after what its predecessor has finished.
        self.desk.close();
        join("committer", running.committer);
        self.queue.close();
        join("applier", running.applier);
        if let Some((bell, thread)) = running.backups {
            bell.close();
            join("backups", thread);
        }
        if let (Some(history), Some(thread)) = (&self.history, running.history) {
            history.close();
            join("history of outcomes", thread);
        }
        self.keeper.close();
        join("keeper", running.keeper);
        self.keeper.let_go();
        let closed = self.engine.close();
        match closed {
            Ok(()) => {
                if let Err(error) = running.home.end() {
                    tracing::warn!(%error, "the clean end of the engine could not be noted");
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the engine could not be closed; the next start replays more")
            }
        }
    }
}

impl Drop for House {
    fn drop(&mut self) {
        self.close();
    }
}

/// Opens the history of outcomes; `None`, told, if that fails.
fn open_history(
    keeper: &Arc<Keeper>,
    clock: &Arc<dyn Clock>,
    rules: outcomes::Rules,
) -> Option<Arc<History>> {
    let room = Arc::clone(keeper);
    let opened = History::open(
        Arc::clone(&keeper.disk),
        keeper.store,
        Arc::clone(clock),
        rules.beginning_at(clock.now().unix_ms),
        Box::new(move || room.room.full.load(Ordering::Relaxed)),
    );
    match opened {
        Ok(history) => {
            history.begin_run();
            Some(Arc::new(history))
        }
        Err(error) => {
            tracing::error!(
                %error,
                directory = outcomes::DIR,
                "the history of outcomes cannot be opened: until a restart outcomes are neither recorded nor told; delivery goes on"
            );
            None
        }
    }
}

fn unreadable_history(error: std::io::Error) -> ReadError {
    if error.kind() == std::io::ErrorKind::WouldBlock {
        return ReadError::NotYet(error.to_string());
    }
    ReadError::Engine(format!("the history of outcomes: {error}"))
}

fn join(what: &str, thread: JoinHandle<()>) {
    if thread.join().is_err() {
        tracing::error!(what, "a thread of the store had panicked");
    }
}
