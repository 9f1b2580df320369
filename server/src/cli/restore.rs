//! `bellwire restore`: a data directory out of a backup, without what was erased since.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bellwire_certs::{IfExists, write_private};
use bellwire_server::config::{self, Environment};
use bellwire_server::delivery::AppId;
use bellwire_server::runtime::{HashKey, SystemClock, SystemEntropy};
use bellwire_server::store::backup::{
    Restore, RestoreError, RestoreStep, Restored, UserHash, restore,
};
use bellwire_server::store::{EngineKind, StoreSettings};
use clap::{Args, ValueEnum};
use data_encoding::HEXLOWER;
use serde_json::json;

use super::backup::{as_json, broken, verify};
use super::console::Paint;
use super::files::{DataDir, HASH_KEY, cert};
use super::progress::Progress;
use super::serve::store_settings;
use super::{Console, Failure, Outcome, keep_to_ourselves, moment};

const AFTER_HELP: &str = "\
Examples:
  bellwire restore --verify /backups/monday.backup
  bellwire restore --from monday.backup --data-dir /srv/bellwire --hash-key /safe/hash.key
  bellwire restore --from monday.backup --data-dir /srv/bellwire --replace --erasures tuesday.backup
  bellwire restore --from monday.backup --data-dir /srv/bellwire --engine fjall --json

The data directory must be empty or new. With --replace a store that is there is put aside, under
replaced-TIME in the same directory, and nothing of it is deleted; stop its server first.
What was erased after the backup was made stays erased, as far as somebody knows of it: the store
that is replaced, the file `erasures` beside the backup, and whatever --erasures names.
The hash key is a file, hash.key: it is in no backup and in no setting. It is put into the new data
directory if it is not there. A wrong one is refused.
docs/backup.md has the drill.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct RestoreArgs {
    /// The backup to restore
    #[arg(
        long,
        value_name = "FILE",
        required_unless_present = "verify",
        conflicts_with = "verify"
    )]
    from: Option<PathBuf>,
    /// Only check this backup and say what is in it
    #[arg(long, value_name = "FILE")]
    verify: Option<PathBuf>,
    /// The data directory to make; default: the one that the settings name
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// The engine to build; default: the one that the settings name. Another one can be taken at any later start
    #[arg(long, value_enum)]
    engine: Option<EngineArg>,
    /// Put the store that is there aside
    #[arg(long)]
    replace: bool,
    /// Where else to look for what was erased since: a newer backup, a file of erasures, an old data directory, a
    /// directory of backups. Can be given several times
    #[arg(long, value_name = "PATH")]
    erasures: Vec<PathBuf>,
    /// The hash.key of the server that made the backup; default: the one in the data directory or beside the backup
    #[arg(long, value_name = "FILE")]
    hash_key: Option<PathBuf>,
    /// Settings file, for the store's settings
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum EngineArg {
    Sled,
    Fjall,
    Memory,
}

/// A hash key that was found.
struct FoundKey {
    path: PathBuf,
    bytes: [u8; 32],
}

pub(crate) fn run(args: &RestoreArgs) -> Outcome {
    if let Some(file) = &args.verify {
        return verify(file, args.json);
    }
    let Some(from) = &args.from else {
        return Err(Failure::usage(
            "the backup to restore is missing",
            "name it with --from FILE",
        ));
    };
    keep_to_ourselves();
    let checked = config::load(args.config.as_deref(), &Environment::of_process())?;
    let dir = args.data_dir.as_deref().unwrap_or(&checked.data_dir);
    let data = DataDir::take(dir)?;
    let dir = data.path();
    let key = find_key(args, dir, from)?;
    let of_users = key.as_ref().map(|key| HashKey::new(&key.bytes));
    let user_hash = |app: AppId, user: &str| {
        of_users
            .as_ref()
            .map_or([0; 32], |key| key.erased_user(app, user))
    };
    let settings = store_settings(&checked, &data);
    let mut progress = Progress::new(args.json);
    let done = restore(Restore {
        from,
        settings: StoreSettings {
            engine: match args.engine {
                Some(EngineArg::Sled) => EngineKind::Sled,
                Some(EngineArg::Fjall) => EngineKind::Fjall,
                Some(EngineArg::Memory) => EngineKind::Memory,
                None => settings.engine,
            },
            key_mark: [0; 32],
            backup: None,
            ..settings
        },
        replace: args.replace,
        erasures: args.erasures.clone(),
        user_hash: of_users.is_some().then_some(&user_hash as UserHash<'_>),
        check: &|summary| match &key {
            Some(key)
                if summary.key_mark != [0; 32]
                    && HashKey::new(&key.bytes).mark() != summary.key_mark =>
            {
                Err(format!(
                    "{} is not the hash key of the server that made the backup",
                    key.path.display()
                ))
            }
            Some(_) | None => Ok(()),
        },
        clock: Arc::new(SystemClock::new()),
        entropy: Arc::new(SystemEntropy::new()),
        progress: &mut |step, done, total| match step {
            RestoreStep::Verify => progress.bytes("verify", done, total),
            RestoreStep::Unpack => progress.bytes("restore", done, total),
            RestoreStep::Open => progress.count("build the engine", done, total),
            RestoreStep::Erase => progress.count("erase again", done, total),
        },
    });
    progress.done();
    let done = done.map_err(|error| failure(&error))?;
    if let Some(key) = &key {
        let path = dir.join(HASH_KEY);
        if !path.exists() {
            write_private(&path, &key.bytes, IfExists::Refuse).map_err(|error| cert(&error))?;
        }
    }
    tell(args, dir, &done, key.as_ref());
    Ok(())
}

/// The hash key, from where it was named or from where it usually is.
fn find_key(args: &RestoreArgs, dir: &Path, from: &Path) -> Result<Option<FoundKey>, Failure> {
    let usual = [
        Some(dir.join(HASH_KEY)),
        from.parent().map(|beside| beside.join(HASH_KEY)),
    ];
    let places = match &args.hash_key {
        Some(path) => vec![path.clone()],
        None => usual.into_iter().flatten().collect(),
    };
    for path in places {
        match fs::read(&path) {
            Ok(bytes) => {
                let bytes = bytes.try_into().map_err(|_| {
                    Failure::new(
                        format!("{} is no hash key: one has 32 bytes", path.display()),
                        "name the right file with --hash-key",
                    )
                })?;
                let there = fs::read(dir.join(HASH_KEY)).ok();
                if there.is_some_and(|there| there != bytes) {
                    return Err(Failure::new(
                        format!(
                            "{} and {} differ",
                            dir.join(HASH_KEY).display(),
                            path.display()
                        ),
                        "put the wrong one away first, or restore into another directory",
                    ));
                }
                return Ok(Some(FoundKey { path, bytes }));
            }
            Err(error)
                if args.hash_key.is_none() && error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(Failure::new(
                    format!("{} cannot be read: {error}", path.display()),
                    "name the hash key of the server that made the backup with --hash-key",
                ));
            }
        }
    }
    Ok(None)
}

fn failure(error: &RestoreError) -> Failure {
    let help = match error {
        RestoreError::Backup { path, fault } => return broken(path, fault),
        RestoreError::Unfit(_) => {
            "name the hash.key of that server with --hash-key, and put the wrong one away"
        }
        RestoreError::Occupied(_) => {
            "stop its server and add --replace, which puts that store aside and deletes nothing; or name an empty \
             directory with --data-dir"
        }
        RestoreError::Strange { .. } => "name an empty directory with --data-dir",
        RestoreError::Erasures { .. } => {
            "name a newer backup, a file of erasures, or a data directory with --erasures"
        }
        RestoreError::Target { .. } => {
            "a restore needs room for the backup several times over, and for three log segments; nothing of it was left \
             behind. Make room, or name another volume with --data-dir"
        }
        RestoreError::Io { .. } | RestoreError::Open(_) | RestoreError::Erase(_) => {
            "look at the disk and its free room; nothing was deleted, and the restore can be done again"
        }
    };
    Failure::new(error.to_string(), help)
}

fn tell(args: &RestoreArgs, dir: &Path, done: &Restored, key: Option<&FoundKey>) {
    let out = Console::out();
    let from = args.from.as_deref().unwrap_or(Path::new(""));
    if args.json {
        let sources: Vec<_> = done
            .sources
            .iter()
            .map(|source| {
                json!({
                    "path": source.path.display().to_string(),
                    "found": source.found,
                    "trouble": source.trouble,
                })
            })
            .collect();
        out.line(
            &json!({
                "backup": as_json(from, &done.backup, &done.contents),
                "data_dir": dir.display().to_string(),
                "store": HEXLOWER.encode(&done.store),
                "replaced": done.replaced.as_ref().map(|path| path.display().to_string()),
                "erasures": {
                    "sources": sources,
                    "devices": done.applied.devices,
                    "keys": done.applied.keys,
                    "notifications": done.applied.notifications,
                },
                "hash_key": key.is_some(),
            })
            .to_string(),
        );
        return;
    }
    let mut pairs = vec![
        (
            "restored",
            format!("{} into {}", from.display(), dir.display()),
        ),
        ("state of", moment(done.backup.finished_ms)),
        (
            "holds",
            format!(
                "{} apps, {} devices, {} API keys, {} waiting notifications",
                done.contents.apps,
                done.contents.devices,
                done.contents.keys,
                done.contents.waiting
            ),
        ),
        (
            "erased again",
            format!(
                "{} devices, {} API keys, {} notifications",
                done.applied.devices, done.applied.keys, done.applied.notifications
            ),
        ),
    ];
    for source in &done.sources {
        let trouble = source.trouble.as_ref().map_or(String::new(), |trouble| {
            format!(", not all of it: {trouble}")
        });
        pairs.push((
            "known from",
            format!("{} ({}{trouble})", source.path.display(), source.found),
        ));
    }
    if let Some(key) = key {
        let here = dir.join(HASH_KEY);
        let text = if key.path == here {
            format!("{}, as it was there", here.display())
        } else {
            format!("{}, from {}", here.display(), key.path.display())
        };
        pairs.push(("hash key", text));
    }
    if let Some(replaced) = &done.replaced {
        pairs.push(("put aside", replaced.display().to_string()));
    }
    out.pairs(&pairs);
    let err = Console::err();
    let loud = |text: &str| err.line(&err.paint(Paint::Yellow, text));
    if done.sources.is_empty() {
        loud(
            "WARNING: nobody could say what was erased after this backup was made. Devices and keys revoked since then are \
             back. Restore again with --erasures if a newer backup, the file `erasures` or the old data directory turns up.",
        );
    }
    if key.is_none() {
        loud(&format!(
            "WARNING: the hash key was not found. Put the hash.key of the server that made the backup into {} (mode 0600) \
             before the start; without it no device and no API key is let in.",
            dir.display()
        ));
    }
}
