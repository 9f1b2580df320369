//! What do memory and disk do when a million notifications come and go, and how long does the store take to open afterwards?
//!
//! The store runs in a process of its own, without a server around it, so that what it holds is what is measured. Rows come
//! in batches, as shards hand them over; each later goes with an outcome, and outcomes are forgotten as they are when
//! their time has passed. Nothing but the log, its engine and snapshots is on the disk. Beside the peaks, the sizes over time
//! are reported.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bellwire_server::delivery::{
    AppId, Change, CommitFailure, DeviceId, Hold, Notification, Outcome as Ending, PingId, RowKey,
    RowMeta, Summary, Urgency, WireSlot,
};
use bellwire_server::ports::{DeviceRecord, Op, Store};
use bellwire_server::runtime::{SystemClock, SystemEntropy};
use bellwire_server::store::{self, EngineKind, StoreSettings};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::engine::Engine;
use crate::failure::{During, Failure, Outcome};
use crate::process;
use crate::progress::Progress;
use crate::report::{Budget, Figure, Plot, Report};

/// Batches handed over and not yet answered, as several shards would have.
const UNDER_WAY: usize = 8;

/// Samples of a run.
const SAMPLES: u64 = 40;

/// Outcomes forgotten at a time.
const FORGET: usize = 5_000;

/// Longest time for the store to come to rest after the last row.
const REST_MAX: Duration = Duration::from_secs(120);

/// Time without a change of any size after which the store is at rest.
const REST: Duration = Duration::from_secs(8);

/// How often snapshots are due here: often, so that what a run leaves behind is judged while it is watched.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(10);

/// Rows that are written before a kill.
const BEFORE_KILL: u64 = 50_000;

/// Budget of the resident memory, as a part of what the store may use.
const OVER_CACHE: f64 = 1.25;

static OVER_ROWS: Plot = Plot {
    title: "Memory and files while rows come and go",
    x_label: "rows in and out",
    x_log: false,
    y_log: false,
};

/// Put rows into a store and take them out again, and weigh it
#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
pub(crate) struct Churn {
    /// The engine
    #[arg(long, value_enum, default_value_t = Engine::Sled)]
    engine: Engine,
    /// Rows that come and go
    #[arg(long, default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    rows: u64,
    /// Rows that wait at a time at most; default: all, so that all come before the first goes
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    live: Option<u64>,
    /// Bytes of content of a row
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    content: u32,
    /// Rows in a batch
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    batch: u64,
    /// Devices that they wait for
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    devices: u64,
    /// Memory that the store may use, MiB (store.memory_bytes)
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u64).range(4..=65_536))]
    memory_mib: u64,
    /// Where the data directory is made, and left; default: a temporary one, which is removed
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// A few thousand rows, to see that all of it works; sizes and times are not looked at
    #[arg(long)]
    smoke: bool,
}

/// The store's process, started by `churn`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ChurnStore {
    /// A [`Job`] as JSON.
    job: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Part {
    /// All rows come and go.
    Churn,
    /// Rows come, and the process waits to be killed.
    Fill,
    /// It is opened and closed.
    Open,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Job {
    part: Part,
    dir: PathBuf,
    churn: Churn,
}

/// What the store's process says, a line each.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Sample {
    stage: Stage,
    /// Since the store was open.
    ms: u64,
    /// How long opening took.
    opened_ms: u64,
    /// Rows that came, and rows that went.
    came: u64,
    went: u64,
    resident: u64,
    peak: u64,
    engine: u64,
    log: u64,
    snapshots: u64,
    live: u64,
    rebuilds: u64,
    replayed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Stage {
    Open,
    Working,
    Done,
    AtRest,
}

/// Runs the workload.
pub(crate) async fn run(args: Churn, progress: Progress) -> Outcome<Report> {
    let args = if args.smoke {
        Churn {
            rows: 3_000,
            devices: 50,
            ..args
        }
    } else {
        args
    };
    let mut report = Report::new("churn", &args)?;
    let temporary = match &args.dir {
        Some(dir) => {
            std::fs::create_dir_all(dir).during(format_args!("make {}", dir.display()))?;
            None
        }
        None => Some(tempfile::tempdir().during("make a temporary directory")?),
    };
    let dir = match (&args.dir, &temporary) {
        (Some(dir), _) => dir.join("data"),
        (None, Some(dir)) => dir.path().join("data"),
        (None, None) => return Err(Failure::new("no directory")),
    };
    let job = |part| Job {
        part,
        dir: dir.clone(),
        churn: args.clone(),
    };

    let mut samples = Vec::new();
    let phase = progress.phase("rows come and go", SAMPLES as usize);
    let mut child = Process::start(&job(Part::Churn))?;
    while let Some(sample) = child.next().await? {
        phase.step();
        samples.push(sample);
    }
    child.ended().await?;
    phase.done();
    let done = stage(&samples, Stage::Done)?;
    let rest = stage(&samples, Stage::AtRest)?;

    let phase = progress.wait("open it again");
    let clean = open(&job(Part::Open)).await?;
    let mut child = Process::start(&job(Part::Fill))?;
    loop {
        match child.next().await? {
            Some(sample) if sample.stage == Stage::Done => break,
            Some(_) => {}
            None => return Err(Failure::new("the store ended before it was killed")),
        }
    }
    child.kill().await?;
    let killed = open(&job(Part::Open)).await?;
    phase.done();

    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let most = |of: fn(&Sample) -> u64| samples.iter().map(of).max().unwrap_or(0);
    let seconds = done.ms as f64 / 1e3;
    report.push(Figure::new(
        "rows in and out",
        (done.came + done.went) as f64 / seconds.max(1e-3),
        "rows/s",
    ));
    let memory = Figure::new("resident, peak", mib(most(|sample| sample.peak)), "MiB");
    report.push(match args.engine {
        Engine::Fjall => memory.budget(Budget::AtMost(args.memory_mib as f64 * OVER_CACHE)),
        Engine::Sled | Engine::Memory => memory,
    });
    for (name, bytes) in [
        ("resident before the first row", samples[0].resident),
        ("resident after the last row", done.resident),
        ("resident at rest", rest.resident),
        ("engine, peak", most(|sample| sample.engine)),
        ("engine after the last row", done.engine),
        ("engine at rest", rest.engine),
        ("log, peak", most(|sample| sample.log)),
        ("log at rest", rest.log),
        ("snapshots, peak", most(|sample| sample.snapshots)),
        ("snapshots at rest", rest.snapshots),
        ("live, peak seen by a snapshot", most(|sample| sample.live)),
    ] {
        report.push(Figure::new(name, mib(bytes), "MiB"));
    }
    report.push(Figure::new(
        "engines built anew",
        rest.rebuilds as f64,
        "times",
    ));
    report.push(
        Figure::new("open after a clean end", clean.opened_ms as f64 / 1e3, "s")
            .budget(Budget::AtMost(2.0)),
    );
    report.push(
        Figure::new("open after a kill", killed.opened_ms as f64 / 1e3, "s")
            .budget(Budget::AtMost(10.0)),
    );
    report.push(Figure::new(
        "frames replayed after a kill",
        killed.replayed as f64,
        "frames",
    ));
    for sample in samples.iter().step_by((samples.len() / 10).max(1)) {
        let at = format!("at {} in, {} out:", sample.came, sample.went);
        for (name, bytes) in [
            ("resident", sample.resident),
            ("engine", sample.engine),
            ("log", sample.log),
            ("snapshots", sample.snapshots),
        ] {
            report.push(
                Figure::new(format!("{at} {name}"), mib(bytes), "MiB").plotted(
                    &OVER_ROWS,
                    name,
                    (sample.came + sample.went) as f64,
                ),
            );
        }
    }
    if done.went != args.rows {
        report
            .violations
            .push(format!("{} rows came and {} went", done.came, done.went));
    }
    Ok(report)
}

fn stage(samples: &[Sample], stage: Stage) -> Outcome<Sample> {
    samples
        .iter()
        .rfind(|sample| sample.stage == stage)
        .copied()
        .ok_or_else(|| Failure::new("the store's process ended early"))
}

async fn open(job: &Job) -> Outcome<Sample> {
    let mut child = Process::start(job)?;
    let mut first = None;
    while let Some(sample) = child.next().await? {
        first.get_or_insert(sample);
    }
    child.ended().await?;
    first.ok_or_else(|| Failure::new("the store did not open"))
}

/// The store's process. Killed when this is dropped.
struct Process {
    child: Child,
    lines: tokio::io::Lines<BufReader<tokio::process::ChildStdout>>,
}

impl Process {
    fn start(job: &Job) -> Outcome<Process> {
        let me = std::env::current_exe().during("find this program")?;
        let mut child = Command::new(me)
            .arg("churn-store")
            .arg(serde_json::to_string(job).during("write down the job")?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .during("start the store's process")?;
        let out = child
            .stdout
            .take()
            .ok_or_else(|| Failure::new("the store's process says nothing"))?;
        Ok(Process {
            child,
            lines: BufReader::new(out).lines(),
        })
    }

    async fn next(&mut self) -> Outcome<Option<Sample>> {
        let line = self.lines.next_line().await;
        match line.during("hear from the store's process")? {
            Some(line) => serde_json::from_str(&line)
                .map(Some)
                .during("understand the store's process"),
            None => Ok(None),
        }
    }

    async fn ended(mut self) -> Outcome<()> {
        let status = self.child.wait().await.during("wait for the store")?;
        match status.success() {
            true => Ok(()),
            false => Err(Failure::new(format!("the store's process ended: {status}"))),
        }
    }

    async fn kill(mut self) -> Outcome<()> {
        self.child.kill().await.during("kill the store's process")
    }
}

// ---- The store's process -------------------------------------------------------------------------------------------

/// Plays the part of the store.
pub(crate) fn serve(args: &ChurnStore) -> Outcome<()> {
    let job: Job = serde_json::from_str(&args.job).during("read the job")?;
    let began = Instant::now();
    let opened = open_store(&job.dir, &job.churn)?;
    let opened_ms = millis(began.elapsed());
    let mut work = Work {
        store: &*opened.store,
        churn: &job.churn,
        began: Instant::now(),
        opened_ms,
        replayed: opened.report.replayed_frames,
        came: 0,
        went: 0,
        answers: mpsc::channel(),
        under_way: 0,
    };
    work.say(Stage::Open)?;
    match job.part {
        Part::Open => {}
        Part::Churn => {
            work.register()?;
            work.churn(job.churn.rows, job.churn.live.unwrap_or(job.churn.rows))?;
            work.say(Stage::Done)?;
            work.rest()?;
            work.say(Stage::AtRest)?;
        }
        Part::Fill => {
            let rows = BEFORE_KILL.min(job.churn.rows);
            work.register()?;
            work.churn(rows, u64::MAX)?;
            work.say(Stage::Done)?;
            // Until it is killed.
            loop {
                std::thread::park();
            }
        }
    }
    opened.store.close();
    Ok(())
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

fn open_store(dir: &Path, churn: &Churn) -> Outcome<store::Opened> {
    let settings = StoreSettings {
        engine: match churn.engine {
            Engine::Sled => EngineKind::Sled,
            Engine::Fjall => EngineKind::Fjall,
            Engine::Memory => EngineKind::Memory,
        },
        memory_bytes: churn.memory_mib << 20,
        snapshot_every: SNAPSHOT_EVERY,
        ..StoreSettings::new(dir)
    };
    store::open(
        &settings,
        Arc::new(SystemClock::new()),
        Arc::new(SystemEntropy::new()),
    )
    .during("open the store")
}

type Verdict = Result<(), CommitFailure>;

struct Work<'a> {
    store: &'a dyn Store,
    churn: &'a Churn,
    began: Instant,
    opened_ms: u64,
    replayed: u64,
    came: u64,
    went: u64,
    answers: (mpsc::Sender<Verdict>, mpsc::Receiver<Verdict>),
    under_way: usize,
}

impl Work<'_> {
    fn say(&self, stage: Stage) -> Outcome<()> {
        let stats = self.store.stats();
        let memory = process::memory(std::process::id())?;
        let sample = Sample {
            stage,
            ms: millis(self.began.elapsed()),
            opened_ms: self.opened_ms,
            came: self.came,
            went: self.went,
            resident: memory.resident,
            peak: process::peak_memory(std::process::id())?,
            engine: stats.engine_bytes,
            log: stats.log_bytes,
            snapshots: stats.snapshot_bytes,
            live: stats.live_bytes,
            rebuilds: stats.rebuilds,
            replayed: self.replayed,
        };
        let line = serde_json::to_string(&sample).during("say how it is")?;
        writeln!(std::io::stdout().lock(), "{line}").during("say how it is")
    }

    /// Waits until at most so many batches are under way.
    fn settle(&mut self, most: usize) -> Outcome<()> {
        while self.under_way > most {
            match self.answers.1.recv() {
                Ok(Ok(())) => self.under_way -= 1,
                Ok(Err(failure)) => {
                    return Err(Failure::new(format!(
                        "a batch was not written: {failure:?}"
                    )));
                }
                Err(_) => return Err(Failure::new("the store does not answer")),
            }
        }
        Ok(())
    }

    fn commit(&mut self, batch: Vec<Op>) -> Outcome<()> {
        self.settle(UNDER_WAY - 1)?;
        let answers = self.answers.0.clone();
        self.under_way += 1;
        self.store.commit(
            batch,
            Box::new(move |verdict| {
                // The receiver lives as long as the work.
                let _ = answers.send(verdict);
            }),
        );
        Ok(())
    }

    fn register(&mut self) -> Outcome<()> {
        let devices: Vec<u64> = (0..self.churn.devices).collect();
        for some in devices.chunks(500) {
            let batch = some
                .iter()
                .map(|&number| Op::PutDevice {
                    record: DeviceRecord {
                        id: device(number),
                        app: AppId::DEFAULT,
                        user: format!("user-{number}"),
                        name: None,
                        created_ms: 1,
                        secret_hash: [0; 32],
                        previous_secrets: Vec::new(),
                    },
                    fresh: true,
                    previous_user: None,
                })
                .collect();
            self.commit(batch)?;
        }
        self.settle(0)
    }

    /// `rows` come; a row goes once more than `live` wait. In the end all go, unless `live` says otherwise.
    fn churn(&mut self, rows: u64, live: u64) -> Outcome<()> {
        let last = rows.saturating_add(live.min(rows));
        let total = if live == u64::MAX { rows } else { last };
        let every = (total / SAMPLES).max(1);
        let mut batch = Vec::new();
        for turn in 0..total {
            if turn < rows {
                self.insert(turn, &mut batch);
                self.came += 1;
            }
            if turn >= live {
                self.remove(turn - live, &mut batch);
                self.went += 1;
            }
            if (turn + 1).is_multiple_of(self.churn.batch) {
                self.commit(std::mem::take(&mut batch))?;
            }
            if self.went > 0 && (turn + 1).is_multiple_of(FORGET as u64) {
                self.forget()?;
            }
            if (turn + 1).is_multiple_of(every) {
                self.say(Stage::Working)?;
            }
        }
        self.commit(batch)?;
        self.settle(0)?;
        if self.went > 0 {
            while self.forget()? > 0 {}
        }
        Ok(())
    }

    /// Forgets outcomes, as the sweep does when their time has passed.
    fn forget(&self) -> Outcome<usize> {
        self.store
            .drop_receipts(u64::MAX, FORGET)
            .during("forget outcomes")
    }

    fn insert(&self, row: u64, batch: &mut Vec<Op>) {
        let (device, meta) = self.place(row);
        let mut content = vec![0; self.churn.content as usize];
        // Not all alike, in case somebody compresses.
        let mut word = row.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        for piece in content.chunks_mut(8) {
            word ^= word << 13;
            word ^= word >> 7;
            word ^= word << 17;
            piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
        }
        batch.push(Op::Mailbox(Change::Insert {
            device,
            order: meta.key.order,
            run: 1,
            notification: Arc::new(Notification {
                ping: meta.ping,
                app: AppId::DEFAULT,
                accepted_ms: 1,
                expires_ms: meta.expires_ms,
                urgency: meta.key.urgency,
                collapse: None,
                size: meta.size,
                transient: false,
                shared: false,
                content: content.into(),
                wire: WireSlot::default(),
                hold: Hold::default(),
            }),
        }));
        batch.push(Op::Mailbox(Change::Summary {
            device,
            summary: Summary {
                next_order: meta.key.order + 1,
                count: 1,
                ..Summary::new(AppId::DEFAULT)
            },
        }));
    }

    fn remove(&self, row: u64, batch: &mut Vec<Op>) {
        let (device, meta) = self.place(row);
        batch.push(Op::Mailbox(Change::Remove {
            app: AppId::DEFAULT,
            device,
            row: meta,
            outcome: Ending::Acknowledged,
            at_ms: 2,
        }));
    }

    /// Where a row waits.
    fn place(&self, row: u64) -> (DeviceId, RowMeta) {
        // Neighbours in time are not neighbours in the order of the keys.
        let mut ping = [0; 16];
        ping[..8].copy_from_slice(&row.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        ping[8..].copy_from_slice(&row.to_be_bytes());
        let meta = RowMeta {
            key: RowKey {
                urgency: Urgency::Normal,
                order: row / self.churn.devices + 1,
            },
            ping: PingId(ping),
            size: self.churn.content,
            expires_ms: u64::MAX / 2 + row,
            collapse: None,
            run: 1,
            shared: false,
        };
        (device(row % self.churn.devices), meta)
    }

    /// Waits until no size changes any more.
    fn rest(&self) -> Outcome<()> {
        let began = Instant::now();
        let look = || {
            let stats = self.store.stats();
            (
                stats.lag_bytes,
                stats.engine_bytes,
                stats.log_segments,
                stats.snapshot_frame,
                stats.rebuilds,
            )
        };
        let (mut last, mut since) = (look(), Instant::now());
        while since.elapsed() < SNAPSHOT_EVERY + REST && began.elapsed() < REST_MAX {
            std::thread::sleep(Duration::from_millis(500));
            let now = look();
            if now != last {
                (last, since) = (now, Instant::now());
                self.say(Stage::Working)?;
            }
        }
        Ok(())
    }
}

fn device(number: u64) -> DeviceId {
    let mut id = [7; 16];
    id[..8].copy_from_slice(&number.to_be_bytes());
    DeviceId(id)
}
