//! `bellwire backup`: everything that is kept into one file, checked while it comes; and what is in such a file.

use std::fs::{self, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bellwire_server::config::{self, Environment};
use bellwire_server::ports::{BackupError, BackupSummary, Clock};
use bellwire_server::runtime::{HashKey, SystemClock, SystemEntropy};
use bellwire_server::store::backup::{BackupFault, Checker, Contents};
use bellwire_server::store::{self, StoreSettings};
use clap::{Args, Subcommand};
use data_encoding::HEXLOWER;
use rustix::fs::{CWD, OFlags, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::api::{Api, ApiArgs};
use super::files::{DataDir, HASH_KEY};
use super::progress::Progress;
use super::serve::store_settings;
use super::store::size;
use super::{Console, Failure, Outcome, keep_to_ourselves, moment, now, on_one_thread};

const AFTER_HELP: &str = "\
Examples:
  bellwire backup --to /backups/monday.backup
  bellwire backup --to /backups                  a file with the time in its name
  bellwire backup --to b.backup --api https://push.example.com:8480 --key-file ops.key --json
  bellwire backup --offline --data-dir /var/lib/bellwire --to b.backup
  bellwire backup verify /backups/monday.backup

The server goes on serving; the backup is the state at one moment near its end. The key needs the
scope `admin`. One backup is made at a time. Until it is whole it is called FILE.partial.
Keep the data directory's hash.key somewhere safe as well, once: without it nobody in a backup is
let in. The server makes backups by itself when backup.dir is set. docs/backup.md has the drill for
a restore.";

const VERIFY_HELP: &str = "\
Examples:
  bellwire backup verify /backups/monday.backup
  bellwire backup verify b.backup --json | jq .devices

Exit code 0 if every byte is what was written, 1 otherwise.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
pub(crate) struct BackupArgs {
    #[command(subcommand)]
    command: Option<Command>,
    /// The file to make, or a directory for it
    #[arg(long, value_name = "FILE")]
    to: Option<PathBuf>,
    /// Read the data directory itself; no server may run on it
    #[arg(long)]
    offline: bool,
    #[command(flatten)]
    api: ApiArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check every byte of a backup and say what is in it
    #[command(after_help = VERIFY_HELP)]
    Verify(VerifyArgs),
}

#[derive(Debug, Args)]
pub(crate) struct VerifyArgs {
    /// The backup
    file: PathBuf,
    /// Answer in JSON, for scripts
    #[arg(long)]
    json: bool,
}

impl BackupArgs {
    pub(crate) fn json(&self) -> bool {
        match &self.command {
            Some(Command::Verify(args)) => args.json,
            None => self.api.json,
        }
    }
}

pub(crate) fn run(args: &BackupArgs) -> Outcome {
    if let Some(Command::Verify(args)) = &args.command {
        return verify(&args.file, args.json);
    }
    keep_to_ourselves();
    let Some(to) = &args.to else {
        return Err(Failure::usage(
            "where the backup goes is missing",
            "name a file with --to FILE, or look into one with: bellwire backup verify FILE",
        ));
    };
    let mut target = Target::new(to)?;
    let mut progress = Progress::new(args.api.json);
    let taken = if args.offline {
        offline(args, &mut target, &mut progress)
    } else {
        on_one_thread(online(args, &mut target, &mut progress))
    };
    progress.done();
    let (summary, contents) = match taken.and_then(|()| target.finish()) {
        Ok(done) => done,
        Err(failure) => {
            target.discard();
            return Err(failure);
        }
    };
    tell(&target.path, &summary, &contents, args.api.json);
    Ok(())
}

async fn online(args: &BackupArgs, target: &mut Target, progress: &mut Progress) -> Outcome {
    let api = Api::find(&args.api)?;
    let mut done = 0;
    api.download("/v1/backup", &mut |bytes| {
        target.take(bytes)?;
        done += bytes.len() as u64;
        progress.bytes("backup", done, 0);
        Ok(())
    })
    .await
}

fn offline(args: &BackupArgs, target: &mut Target, progress: &mut Progress) -> Outcome {
    let checked = config::load(args.api.config(), &Environment::of_process())?;
    let dir = args.api.data_dir().unwrap_or(&checked.data_dir);
    if !dir.join("format").is_file() {
        return Err(Failure::new(
            format!("{} holds no store", dir.display()),
            "name the data directory with --data-dir",
        ));
    }
    let data = DataDir::take(dir)?;
    let settings = StoreSettings {
        key_mark: key_mark(&data.path().join(HASH_KEY)).unwrap_or_default(),
        backup: None,
        ..store_settings(&checked, &data)
    };
    // The server's settings may come from its environment, which is not ours.
    let opened = store::open_as_it_is(
        &settings,
        Arc::new(SystemClock::new()),
        Arc::new(SystemEntropy::new()),
    )
    .map_err(|error| {
        Failure::new(
            format!("the store cannot be opened: {error}"),
            "`bellwire store inspect` tells what is there; nothing in it was deleted",
        )
    })?;
    let mut failed = None;
    let watched = std::cell::RefCell::new(progress);
    let made = opened.store.backup(
        &mut Sink {
            target,
            failed: &mut failed,
        },
        &|progress| {
            watched.borrow_mut().bytes("backup", progress.bytes, 0);
            std::ops::ControlFlow::Continue(())
        },
    );
    opened.store.close();
    match (made, failed) {
        (Ok(_), _) => Ok(()),
        (Err(_), Some(failure)) => Err(failure),
        (
            Err(
                error @ (BackupError::Busy
                | BackupError::Write(_)
                | BackupError::Store(_)
                | BackupError::NoRoom
                | BackupError::Interrupted),
            ),
            None,
        ) => Err(Failure::new(
            format!("no backup could be made: {error}"),
            "`bellwire store inspect` tells what is in the data directory",
        )),
    }
}

/// The target, as something that is written to; keeps the words for what went wrong.
struct Sink<'a> {
    target: &'a mut Target,
    failed: &'a mut Option<Failure>,
}

impl Write for Sink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.target.take(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(failure) => {
                *self.failed = Some(failure);
                Err(io::Error::from(io::ErrorKind::Other))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Which hash key a file holds; `None`: none.
pub(crate) fn key_mark(path: &Path) -> Option<[u8; 32]> {
    let bytes: [u8; 32] = fs::read(path).ok()?.try_into().ok()?;
    Some(HashKey::new(&bytes).mark())
}

/// A backup that is being written under another name, and checked on the way.
struct Target {
    path: PathBuf,
    partial: PathBuf,
    file: File,
    checker: Checker,
}

impl Target {
    fn new(to: &Path) -> Result<Target, Failure> {
        let path = if to.is_dir() {
            let at = moment(SystemClock::new().now().unix_ms);
            let at: String = at.chars().filter(char::is_ascii_alphanumeric).collect();
            to.join(format!("bellwire-{at}.backup"))
        } else {
            to.to_owned()
        };
        if path.exists() {
            return Err(Failure::new(
                format!("{} is there already", path.display()),
                "name another file; a backup is never written over",
            ));
        }
        let mut partial = path.clone().into_os_string();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        let bad = |error: &io::Error| unwritable(&partial, error);
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            // Emptied only once it is known to be nobody's.
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&partial)
            .map_err(|error| bad(&error))?;
        let taken = || {
            Failure::new(
                format!("{} is being written by another process", partial.display()),
                "wait until that one is done, or name another file with --to",
            )
        };
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken()),
            Err(TryLockError::Error(error)) => return Err(bad(&error)),
        }
        // That one may have been done a moment ago: then this is a backup by now, under its own name.
        let same = |ours: fs::Metadata, theirs: fs::Metadata| {
            (ours.dev(), ours.ino()) == (theirs.dev(), theirs.ino())
        };
        let found = file.metadata().map_err(|error| bad(&error))?;
        if !fs::symlink_metadata(&partial).is_ok_and(|there| same(found, there)) {
            return Err(taken());
        }
        // What a backup that was broken off left there goes, and is nobody else's to read.
        file.set_len(0)
            .and_then(|()| file.set_permissions(Permissions::from_mode(0o600)))
            .map_err(|error| bad(&error))?;
        Ok(Target {
            path,
            partial,
            file,
            checker: Checker::new(),
        })
    }

    fn take(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.checker
            .feed(bytes)
            .map_err(|fault| broken(&self.path, &fault))?;
        self.file
            .write_all(bytes)
            .map_err(|error| unwritable(&self.partial, &error))
    }

    /// Makes it safe under its name.
    fn finish(&mut self) -> Result<(BackupSummary, Contents), Failure> {
        let held = std::mem::take(&mut self.checker)
            .finish()
            .map_err(|fault| broken(&self.path, &fault))?;
        let dir = match self.path.parent() {
            Some(dir) if !dir.as_os_str().is_empty() => dir,
            Some(_) | None => Path::new("."),
        };
        self.file
            .sync_all()
            .and_then(|()| name(&self.partial, &self.path))
            .and_then(|()| File::open(dir)?.sync_all())
            .map_err(|error| unwritable(&self.path, &error))?;
        Ok(held)
    }

    /// Half a backup only takes room.
    fn discard(&self) {
        if let Err(error) = fs::remove_file(&self.partial)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, file = %self.partial.display(), "an unfinished backup could not be removed");
        }
    }
}

/// Gives a file its name, unless something has it by now.
fn name(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system does not know how: then as well as can be.
        Err(Errno::INVAL | Errno::NOSYS) if !to.exists() => fs::rename(from, to),
        Err(Errno::INVAL | Errno::NOSYS) => Err(io::Error::from(io::ErrorKind::AlreadyExists)),
        done => Ok(done?),
    }
}

fn unwritable(path: &Path, error: &io::Error) -> Failure {
    Failure::new(
        format!("{} cannot be written: {error}", path.display()),
        "look at the directory, its free room and who may write there; or name another file with --to",
    )
}

/// A backup that is none.
pub(crate) fn broken(path: &Path, fault: &BackupFault) -> Failure {
    let help = match fault {
        BackupFault::Io(_) => "name a file that is there and that this user may read",
        BackupFault::Foreign => "name a file that `bellwire backup` or the server's schedule made",
        BackupFault::Newer(_) => "install that version of bellwire, or a later one",
        BackupFault::Refused(_) => "look at the disk and its free room, then try again",
        BackupFault::Cut(_) | BackupFault::Rotten { .. } => {
            "copy it again if this is a copy, or take another backup; an older one that verifies is better than a damaged \
             newer one"
        }
    };
    Failure::new(format!("{}: {fault}", path.display()), help)
}

/// Checks a file and says what is in it.
pub(crate) fn verify(path: &Path, as_json: bool) -> Outcome {
    let mut file = File::open(path).map_err(|error| broken(path, &error.into()))?;
    let length = file.metadata().map_or(0, |found| found.len());
    let mut progress = Progress::new(as_json);
    let checked = Checker::new().check(&mut file, &mut |done| {
        progress.bytes("verify", done, length);
    });
    progress.done();
    let (summary, contents) = checked.map_err(|fault| broken(path, &fault))?;
    tell(path, &summary, &contents, as_json);
    Ok(())
}

/// What a backup is, as scripts read it.
pub(crate) fn as_json(path: &Path, summary: &BackupSummary, contents: &Contents) -> Value {
    json!({
        "file": path.display().to_string(),
        "begun_ms": summary.begun_ms,
        "finished_ms": summary.finished_ms,
        "store": HEXLOWER.encode(&summary.store),
        "run": summary.run,
        "program": summary.program,
        "last_frame": summary.last_frame,
        "apps": contents.apps,
        "devices": contents.devices,
        "keys": contents.keys,
        "waiting": contents.waiting,
        "left_out": summary.left_out,
        "bytes": summary.bytes,
        "sha256": HEXLOWER.encode(&summary.sha256),
    })
}

fn tell(path: &Path, summary: &BackupSummary, contents: &Contents, script: bool) {
    let out = Console::out();
    if script {
        out.line(&as_json(path, summary, contents).to_string());
        return;
    }
    let age_s = u64::try_from(now().unix_timestamp())
        .unwrap_or(0)
        .saturating_sub(summary.begun_ms / 1_000);
    let mut pairs = vec![
        ("backup", format!("{}, whole", path.display())),
        (
            "taken",
            format!("{} ({} ago)", moment(summary.begun_ms), span(age_s)),
        ),
        (
            "of",
            format!(
                "store {}, run {}, after frame {}, by bellwire {}",
                HEXLOWER.encode(&summary.store[..4]),
                summary.run,
                summary.last_frame,
                super::plain(&summary.program),
            ),
        ),
        (
            "holds",
            format!(
                "{} apps, {} devices, {} API keys, {} waiting notifications",
                contents.apps, contents.devices, contents.keys, contents.waiting
            ),
        ),
        (
            "size",
            format!(
                "{}, {} entries and {} frames",
                size(summary.bytes),
                summary.entries,
                summary.frames
            ),
        ),
        ("sha256", HEXLOWER.encode(&summary.sha256)),
    ];
    if summary.left_out > 0 {
        pairs.push((
            "left out",
            format!(
                "{} records that could not be read: have the disk checked",
                summary.left_out
            ),
        ));
    }
    out.pairs(&pairs);
}

/// A span for people.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{} min", seconds / 60),
        3_600..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}
