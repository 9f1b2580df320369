//! `faultfs`: mounts the file system by hand and takes commands, line by line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bellwire_faultfs::{Errno, Fault, FaultFs, Names, Op, Options};
use clap::Parser;

const COMMANDS: &str = "\
Commands, one a line; each is answered with `ok` or `error: ...`:

  cut SEED         the power goes: unsynced writes and names are kept, lost or torn, as SEED chooses;
                   everything fails from now on
  on               the survivors are mounted (end the programs of before first); without a cut
                   before it, everything written is there
  fail OP ERRNO [after N] [times N] [on PART]
                   operations fail: EIO, ENOSPC, EROFS or EDQUOT; after N more, N in a row
                   (`times always`: until `clear`), only on paths that contain PART
  delay OP TIME [on PART]
                   `read`, `write`, `sync` and `syncdir` take so much longer: 200ms, 2s, 0
  clear            no fault and no delay any more
  full             nothing fits any more
  capacity BYTES   limits what fits; `capacity none` lifts the limit
  liar on|off      syncs say yes and do nothing
  settle           makes everything safe that was written so far
  unsynced         lists what would be lost, in part or in whole, if the power went now
  stats            how often what was asked
  quit             unmounts and ends

OP is read, write, sync, syncdir, create, open, rename, unlink, mkdir, allocate or truncate.

Example, in two terminals:

  faultfs /mnt/bad --socket /run/faultfs.sock
  bellwire serve --config bad.toml &            # with its data directory below /mnt/bad
  echo 'fail sync EIO on log/' | nc -U /run/faultfs.sock
  echo 'cut 7' | nc -U /run/faultfs.sock; kill -9 %1; echo 'on' | nc -U /run/faultfs.sock";

/// Mounts a file system that forgets, tears, delays, fails and runs full when told to.
///
/// It keeps everything in memory and is gone with this program. It needs Linux, /dev/fuse, and the right to mount (root).
#[derive(Parser)]
#[command(name = "faultfs", version, after_help = COMMANDS)]
struct Arguments {
    /// The directory to mount at; it must be there
    mount_point: PathBuf,
    /// Take commands at this Unix socket as well
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Bytes that fit; without it there is no limit
    #[arg(long, value_name = "BYTES")]
    capacity: Option<u64>,
    /// Names go through one journal, as with ext4 and XFS, and any sync makes all of them safe; without it each change of a
    /// name is safe only after a sync of its directory
    #[arg(long)]
    journaled: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("faultfs: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> std::io::Result<()> {
    let options = Options {
        names: if arguments.journaled {
            Names::Journaled
        } else {
            Names::Strict
        },
        capacity: arguments.capacity,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let disk = Arc::new(FaultFs::at(&arguments.mount_point, &options)?);
    let (quit, ended) = mpsc::channel();
    if let Some(path) = &arguments.socket {
        let listener = UnixListener::bind(path)?;
        let (disk, quit) = (Arc::clone(&disk), quit.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (disk, quit) = (Arc::clone(&disk), quit.clone());
                std::thread::spawn(move || {
                    if let Ok(answers) = stream.try_clone() {
                        converse(&disk, BufReader::new(stream), answers, &quit);
                    }
                });
            }
        });
    }
    println!("mounted at {}", disk.path().display());
    {
        let (disk, quit) = (Arc::clone(&disk), quit.clone());
        std::thread::spawn(move || {
            converse(&disk, std::io::stdin().lock(), std::io::stdout(), &quit);
        });
    }
    std::thread::spawn(move || {
        runtime.block_on(async {
            use tokio::signal::unix::{SignalKind, signal};
            if let (Ok(mut interrupted), Ok(mut terminated)) = (
                signal(SignalKind::interrupt()),
                signal(SignalKind::terminate()),
            ) {
                tokio::select! {
                    _ = interrupted.recv() => {}
                    _ = terminated.recv() => {}
                }
                let _nobody_waits = quit.send(());
            }
        });
    });
    let _ended = ended.recv();
    disk.end();
    if let Some(path) = &arguments.socket {
        std::fs::remove_file(path)?;
    }
    Ok(())
}

/// Answers commands until there are no more, or `quit`. The end of the input alone does not end the program.
fn converse(
    disk: &FaultFs,
    commands: impl BufRead,
    mut answers: impl Write,
    quit: &mpsc::Sender<()>,
) {
    for line in commands.lines() {
        let Ok(line) = line else {
            return;
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.is_empty() {
            continue;
        }
        let told = match obey(disk, &words) {
            Ok(text) => writeln!(answers, "{text}ok"),
            Err(error) => writeln!(answers, "error: {error}"),
        };
        if told.and_then(|()| answers.flush()).is_err() {
            return;
        }
        if words == ["quit"] {
            let _nobody_waits = quit.send(());
        }
    }
}

/// Does what a command says; answers lines.
fn obey(disk: &FaultFs, words: &[&str]) -> Result<String, String> {
    match words {
        ["cut", seed] => disk.power_cut(number(seed)?),
        ["on"] => disk.power_on().map_err(|error| error.to_string())?,
        ["fail", op, errno, rest @ ..] => {
            let mut fault = Fault::new(Op::from_str(op)?, errno_of(errno)?);
            for pair in rest.chunks(2) {
                fault = match pair {
                    ["after", n] => fault.after(number(n)?),
                    ["times", "always"] => fault.always(),
                    ["times", n] => fault.times(number(n)?),
                    ["on", part] => fault.on(part),
                    _ => return Err(format!("`{}` says nothing about a fault", pair.join(" "))),
                };
            }
            disk.fail(fault);
        }
        ["delay", op, by] => disk.delay(delayable(op)?, duration(by)?),
        ["delay", op, by, "on", part] => disk.delay_on(delayable(op)?, duration(by)?, part),
        ["clear"] => disk.clear_faults(),
        ["full"] => disk.fill(),
        ["capacity", "none"] => disk.set_capacity(None),
        ["capacity", bytes] => disk.set_capacity(Some(number(bytes)?)),
        ["liar", "on"] => disk.set_liar(true),
        ["liar", "off"] => disk.set_liar(false),
        ["settle"] => disk.settle(),
        ["unsynced"] => {
            return Ok(disk
                .unsynced()
                .iter()
                .map(|one| {
                    format!(
                        "{}: {} changes, {} bytes\n",
                        one.path, one.changes, one.bytes
                    )
                })
                .collect());
        }
        ["stats"] => {
            let counters = disk.counters();
            let mut lines: String = Op::ALL
                .iter()
                .map(|op| format!("{op}: {}\n", counters.of(*op)))
                .collect();
            lines += &format!("bytes written: {}\n", counters.bytes_written);
            lines += &format!("bytes used: {}\n", disk.used());
            lines += &format!("cuts: {}\n", counters.cuts);
            return Ok(lines);
        }
        ["quit"] => {}
        _ => {
            return Err(format!(
                "`{}` is no command; `faultfs --help` lists them",
                words.join(" ")
            ));
        }
    }
    Ok(String::new())
}

fn number(text: &str) -> Result<u64, String> {
    text.parse().map_err(|_| format!("`{text}` is no number"))
}

fn errno_of(text: &str) -> Result<Errno, String> {
    match text {
        "EIO" => Ok(Errno::IO),
        "ENOSPC" => Ok(Errno::NOSPC),
        "EROFS" => Ok(Errno::ROFS),
        "EDQUOT" => Ok(Errno::DQUOT),
        _ => Err(format!(
            "`{text}` is no error; there are EIO, ENOSPC, EROFS and EDQUOT"
        )),
    }
}

fn delayable(text: &str) -> Result<Op, String> {
    let op = Op::from_str(text)?;
    if matches!(op, Op::Read | Op::Write | Op::Sync | Op::SyncDir) {
        Ok(op)
    } else {
        Err(format!(
            "`{op}` cannot be delayed; read, write, sync and syncdir can"
        ))
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no time; say 200ms, 2s or 0");
    if let Some(ms) = text.strip_suffix("ms") {
        return Ok(Duration::from_millis(ms.parse().map_err(|_| wrong())?));
    }
    let seconds = text.strip_suffix('s').or((text == "0").then_some(text));
    seconds
        .and_then(|text| text.parse().ok())
        .map(Duration::from_secs)
        .ok_or_else(wrong)
}
