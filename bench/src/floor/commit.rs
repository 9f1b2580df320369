//! The floor under storing: records come in groups, and each group is safe before the next one begins. One thread, no
//! server, no log beside an engine; what the disk and the engine allow and no more.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fjall::{Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::child::{self, Child};
use crate::failure::{During, Failure, Outcome};
use crate::process;

/// Operations that the server hands to an engine in one batch at most.
const BATCH_OPERATIONS: usize = 256;

/// Devices that the records are for.
const DEVICES: u64 = 10_000;

/// Length of the bare log; writing begins again at its start when it is full.
const LOG_BYTES: u64 = 128 << 20;

/// Zeros are written in pieces of this size.
const ZEROS: usize = 1 << 20;

/// Records that are looked at afterwards.
const LOOKED_AT: u64 = 10_000;

/// Commits longer than this count as this, in microseconds.
const COMMIT_MAX_MICROS: u64 = 60_000_000;

/// Longest a child may take beyond its measured time: files are made before it and read after it.
const AROUND_MAX: Duration = Duration::from_secs(180);

/// Memory that an engine may use, bytes; as `store.memory_bytes` by default.
const MEMORY_BYTES: u64 = 256 << 20;

/// What records are committed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Ground {
    /// A preallocated file, `fdatasync` after each group
    Log,
    /// fjall, journal synced after each group
    Fjall,
    /// fjall as the server uses it beside its log: nothing is synced
    FjallUnsynced,
    /// sled, flushed, and its file synced, after each group
    Sled,
    /// sled as the server uses it beside its log: nothing is synced
    SledUnsynced,
}

impl Ground {
    pub(crate) const ALL: [Ground; 5] = [
        Ground::Log,
        Ground::Fjall,
        Ground::FjallUnsynced,
        Ground::Sled,
        Ground::SledUnsynced,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Ground::Log => "log",
            Ground::Fjall => "fjall",
            Ground::FjallUnsynced => "fjall, unsynced",
            Ground::Sled => "sled",
            Ground::SledUnsynced => "sled, unsynced",
        }
    }
}

/// Commit records, started by `floor`.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct FloorCommit {
    /// A [`Job`] as JSON.
    job: String,
}

/// What is to be measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) ground: Ground,
    /// Records that become safe together.
    pub(crate) group: usize,
    /// Size of a record without its key.
    pub(crate) bytes: usize,
    pub(crate) seconds: u32,
    /// An empty directory.
    pub(crate) dir: PathBuf,
}

/// What was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Found {
    pub(crate) records: u64,
    pub(crate) seconds: f64,
    pub(crate) cpu_seconds: f64,
    /// Time of one group until it is safe, milliseconds.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
    /// Records looked at after everything was opened again, and those of them that were as written.
    pub(crate) looked_at: u64,
    pub(crate) as_written: u64,
}

/// Measures in a process of its own.
pub(crate) async fn measure(job: &Job) -> Outcome<Found> {
    let mut child = Child::start("floor-commit", job)?;
    let found = child
        .hear(AROUND_MAX + Duration::from_secs(job.seconds.into()))
        .await?;
    child.stop().await;
    Ok(found)
}

/// The child's side.
pub(crate) fn serve(args: &FloorCommit) -> Outcome<()> {
    let job: Job = child::job(&args.job)?;
    let mut store = Store::open(&job)?;
    let mut micros = Histogram::<u64>::new_with_max(COMMIT_MAX_MICROS, 3)
        .unwrap_or_else(|_| unreachable!("the bounds are valid"));
    let mut value = vec![b'x'; job.bytes.max(8)];
    let me = std::process::id();
    let cpu = process::cpu_time(me)?;
    let started = Instant::now();
    let end = started + Duration::from_secs(job.seconds.into());
    let mut records = 0u64;
    while Instant::now() < end {
        let began = Instant::now();
        let next = records + job.group as u64;
        store.commit(records..next, &mut value)?;
        records = next;
        let took = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        micros.saturating_record(took.max(1));
    }
    let seconds = started.elapsed().as_secs_f64();
    let cpu_seconds = process::cpu_time(me)?.saturating_sub(cpu).as_secs_f64();
    drop(store);
    let (looked_at, as_written) = look(&job, records)?;
    child::say(&Found {
        records,
        seconds,
        cpu_seconds,
        p50_ms: micros.value_at_quantile(0.5) as f64 / 1e3,
        p99_ms: micros.value_at_quantile(0.99) as f64 / 1e3,
        looked_at,
        as_written,
    })
}

/// Key of a record: a device, whose id looks random, and a number that rises.
fn key(record: u64) -> [u8; 24] {
    // The multipliers are odd, so different devices keep different ids.
    let device = record % DEVICES + 1;
    let mut key = [0; 24];
    key[..8].copy_from_slice(&device.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_be_bytes());
    key[8..16].copy_from_slice(&device.wrapping_mul(0xD1B5_4A32_D192_ED03).to_be_bytes());
    key[16..].copy_from_slice(&record.to_be_bytes());
    key
}

/// Marks a value as that of a record.
fn mark(value: &mut [u8], record: u64) {
    value[..8].copy_from_slice(&record.to_be_bytes());
}

fn marked(value: &[u8], record: u64) -> bool {
    value.get(..8) == Some(&record.to_be_bytes())
}

/// Bytes of a record in the bare log.
fn log_record_bytes(job: &Job) -> u64 {
    24 + job.bytes.max(8) as u64
}

enum Store {
    Log {
        file: File,
        frame: Vec<u8>,
        at: u64,
    },
    Fjall {
        // Before the database: the last handle of that one ends its threads.
        entries: Keyspace,
        db: Database,
        synced: bool,
    },
    Sled {
        db: sled::Db,
        synced: Option<File>,
    },
}

impl Store {
    fn open(job: &Job) -> Outcome<Store> {
        Ok(match job.ground {
            Ground::Log => Store::Log {
                file: open_log(&job.dir)?,
                frame: Vec::new(),
                at: 0,
            },
            Ground::Fjall | Ground::FjallUnsynced => {
                let (db, entries) = open_fjall(&job.dir)?;
                Store::Fjall {
                    entries,
                    db,
                    synced: job.ground == Ground::Fjall,
                }
            }
            Ground::Sled | Ground::SledUnsynced => {
                let db = open_sled(&job.dir)?;
                let synced = match job.ground {
                    Ground::Sled => {
                        let file = job.dir.join("db");
                        Some(File::open(file).during("open sled's file once more")?)
                    }
                    Ground::Log | Ground::Fjall | Ground::FjallUnsynced | Ground::SledUnsynced => {
                        None
                    }
                };
                Store::Sled { db, synced }
            }
        })
    }

    /// Makes a group of records safe, as far as this ground goes.
    fn commit(&mut self, records: std::ops::Range<u64>, value: &mut [u8]) -> Outcome<()> {
        let group: Vec<u64> = records.collect();
        match self {
            Store::Log { file, frame, at } => {
                frame.clear();
                for &record in &group {
                    mark(value, record);
                    frame.extend_from_slice(&key(record));
                    frame.extend_from_slice(value);
                }
                if *at + frame.len() as u64 > LOG_BYTES {
                    *at = 0;
                }
                file.write_all_at(frame, *at).during("write the log")?;
                *at += frame.len() as u64;
                file.sync_data().during("sync the log")
            }
            Store::Fjall {
                entries,
                db,
                synced,
            } => {
                for batch in group.chunks(BATCH_OPERATIONS) {
                    let mut writes = db.batch();
                    for &record in batch {
                        mark(value, record);
                        writes.insert(entries, key(record), &*value);
                    }
                    writes.commit().during("commit a batch to fjall")?;
                }
                let mode = match synced {
                    true => PersistMode::SyncData,
                    false => PersistMode::Buffer,
                };
                db.persist(mode).during("sync fjall")
            }
            Store::Sled { db, synced } => {
                for batch in group.chunks(BATCH_OPERATIONS) {
                    let mut writes = sled::Batch::default();
                    for &record in batch {
                        mark(value, record);
                        writes.insert(&key(record), &*value);
                    }
                    db.apply_batch(writes).during("commit a batch to sled")?;
                    // Lets the garbage of the batch go, as the server does.
                    for _ in 0..64 {
                        crossbeam_epoch::pin().flush();
                    }
                }
                if let Some(file) = synced {
                    db.flush().during("flush sled")?;
                    // sled's own flush asks for no sync.
                    file.sync_data().during("sync sled's file")?;
                }
                Ok(())
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // What was not synced shall be found when it is looked at; an error shows there.
        match self {
            Store::Log { .. } => {}
            Store::Fjall { db, .. } => drop(db.persist(PersistMode::SyncAll)),
            Store::Sled { db, .. } => drop(db.flush()),
        }
    }
}

/// A file of full length whose blocks hold zeros and are on disk.
fn open_log(dir: &Path) -> Outcome<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(dir.join("log"))
        .during("make the log")?;
    if file.metadata().during("measure the log")?.len() < LOG_BYTES {
        let zeros = vec![0; ZEROS];
        let mut at = 0;
        while at < LOG_BYTES {
            file.write_all_at(&zeros, at).during("fill the log")?;
            at += ZEROS as u64;
        }
        file.sync_all().during("sync the log")?;
    }
    Ok(file)
}

/// As the server opens it, with a quarter of the memory as cache and memtables to match.
fn open_fjall(dir: &Path) -> Outcome<(Database, Keyspace)> {
    let db = Database::builder(dir)
        .cache_size(MEMORY_BYTES / 8)
        .max_cached_files(Some(256))
        .max_journaling_size(64 << 20)
        .worker_threads(2)
        .manual_journal_persist(true)
        .open()
        .during("open fjall")?;
    let entries = db
        .keyspace("floor", || {
            KeyspaceCreateOptions::default().max_memtable_size(MEMORY_BYTES / 32)
        })
        .during("open fjall's keyspace")?;
    Ok((db, entries))
}

/// As the server opens it.
fn open_sled(dir: &Path) -> Outcome<sled::Db> {
    sled::Config::new()
        .path(dir)
        .cache_capacity(MEMORY_BYTES / 4)
        .segment_size(8 << 20)
        .flush_every_ms(None)
        .open()
        .during("open sled")
}

/// Opens everything again and looks whether records are as they were written: some thousand of them, evenly spread.
fn look(job: &Job, records: u64) -> Outcome<(u64, u64)> {
    if records == 0 {
        return Ok((0, 0));
    }
    // The bare log keeps what fits into it; groups are whole, so what stands where is known from the number alone.
    let group = job.group as u64;
    let groups_kept = (LOG_BYTES / (group * log_record_bytes(job))).max(1);
    let first = match job.ground {
        Ground::Log => records.saturating_sub(groups_kept * group),
        Ground::Fjall | Ground::FjallUnsynced | Ground::Sled | Ground::SledUnsynced => 0,
    };
    let step = ((records - first) / LOOKED_AT).max(1);
    let chosen = (first..records).step_by(usize::try_from(step).unwrap_or(1));
    let (mut looked_at, mut as_written) = (0, 0);
    let mut count = |good: bool| {
        looked_at += 1;
        as_written += u64::from(good);
    };
    match job.ground {
        Ground::Log => {
            let file = open_log(&job.dir)?;
            let mut record_bytes = vec![0; 24 + 8];
            for record in chosen {
                let place = record / group % groups_kept * group + record % group;
                file.read_exact_at(&mut record_bytes, place * log_record_bytes(job))
                    .during("read the log")?;
                count(record_bytes[..24] == key(record) && marked(&record_bytes[24..], record));
            }
        }
        Ground::Fjall | Ground::FjallUnsynced => {
            let (_db, entries) = open_fjall(&job.dir)?;
            for record in chosen {
                let value = entries.get(key(record)).during("read from fjall")?;
                count(value.is_some_and(|value| marked(&value, record)));
            }
        }
        Ground::Sled | Ground::SledUnsynced => {
            let db = open_sled(&job.dir)?;
            for record in chosen {
                let value = db.get(key(record)).during("read from sled")?;
                count(value.is_some_and(|value| marked(&value, record)));
            }
        }
    }
    Ok((looked_at, as_written))
}

impl Found {
    /// What is wrong with it, if anything.
    pub(crate) fn fault(&self) -> Option<Failure> {
        (self.records == 0 || self.looked_at != self.as_written).then(|| {
            Failure::new(format!(
                "of {} records looked at, out of {}, {} were as written",
                self.looked_at, self.records, self.as_written
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn records_have_keys_of_their_own() {
        let keys: std::collections::HashSet<_> = (0..30_000).map(key).collect();
        assert_eq!(keys.len(), 30_000);
    }

    #[test]
    fn what_was_committed_is_found_and_what_was_not_is_missed() {
        for ground in Ground::ALL {
            let dir = tempfile::tempdir().unwrap();
            let job = Job {
                ground,
                group: 300,
                bytes: 64,
                seconds: 1,
                dir: dir.path().to_owned(),
            };
            let mut store = Store::open(&job).unwrap();
            store.commit(0..300, &mut [0; 64]).unwrap();
            store.commit(300..600, &mut [0; 64]).unwrap();
            drop(store);
            assert_eq!(look(&job, 600).unwrap(), (600, 600), "{ground:?}");
            assert_eq!(look(&job, 900).unwrap(), (900, 600), "{ground:?}");
        }
    }
}
