//! The command line: each command in a file of its own, and what they share.

mod api;
mod backup;
mod batch;
mod callback;
mod certs;
mod check;
mod console;
mod device;
mod doctor;
mod events;
mod failure;
mod files;
mod findings;
mod key;
mod notify;
mod outbound;
mod outcomes;
mod ping;
mod progress;
mod restore;
mod serve;
mod status;
mod store;
mod topic;
mod user;
mod withdraw;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use time::OffsetDateTime;

#[cfg(feature = "demo")]
pub(crate) use self::api::{Api, ListenFile, encode};
#[cfg(feature = "demo")]
pub(crate) use self::console::Paint;
pub(crate) use self::console::{Console, plain};
pub(crate) use self::failure::{EXIT_OK, EXIT_TROUBLE, Failure, Outcome};
#[cfg(feature = "demo")]
pub(crate) use self::files::{BOOTSTRAP_KEY, DEV_CA};

const AFTER_HELP: &str = "\
Examples:
  bellwire demo                         see it work, in a minute
  bellwire serve                        start with defaults; everything goes to ./bellwire-data
  bellwire device add --user anna       register a device
  bellwire ping --user anna --body Hi   ring it

Exit codes: 0 done, 1 something went wrong, 2 the command line is wrong, 78 the settings are wrong.
docs/operations.md describes settings, files and operation.";

/// Self-hosted push: rings devices over connections that you own.
#[derive(Debug, Parser)]
#[command(name = "bellwire", version, after_help = AFTER_HELP, propagate_version = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server
    Serve(serve::ServeArgs),
    /// Check settings, certificates, data directory and ports without starting
    Check(check::CheckArgs),
    /// Look at this machine and at a server that runs here: time, disk, network, limits
    Doctor(doctor::DoctorArgs),
    /// Make development certificates, look at any certificate
    Certs(certs::CertsArgs),
    /// API keys of backends
    Key(key::KeyArgs),
    /// Devices: register, list, change, revoke
    Device(device::DeviceArgs),
    /// Users: look at one, erase one
    User(user::UserArgs),
    /// Send a ping and see what became of it
    Ping(Box<ping::PingArgs>),
    /// Take a ping back, also off the screens where it is shown
    Withdraw(withdraw::WithdrawArgs),
    /// Who is in a topic, and which topics a device is in
    Topic(topic::TopicArgs),
    /// How notifications ended: by ping, device, user or time
    Outcomes(Box<outcomes::OutcomesArgs>),
    /// Follow outcomes as they happen
    Events(Box<events::EventsArgs>),
    /// Where outcomes are posted
    Callback(Box<callback::CallbackArgs>),
    /// How the server is
    Status(status::StatusArgs),
    /// Take a backup while the server serves, look into one
    Backup(Box<backup::BackupArgs>),
    /// Make a data directory out of a backup
    Restore(restore::RestoreArgs),
    /// Look at what is kept in a data directory, check it, save what can be saved
    Store(store::StoreArgs),
    /// See everything work: a server, two devices, a crash, a restart
    #[cfg(feature = "demo")]
    Demo(crate::demo::DemoArgs),
    /// Print the completions for a shell
    #[command(after_help = COMPLETIONS_HELP)]
    Completions {
        /// Which shell
        shell: clap_complete::Shell,
    },
}

const COMPLETIONS_HELP: &str = "\
Examples:
  bellwire completions bash > /etc/bash_completion.d/bellwire
  bellwire completions zsh > \"${fpath[1]}/_bellwire\"";

/// Runs the command of this process and gives its exit code.
pub(crate) fn run(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output, mistakes to standard error; nobody is left to tell if that fails.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(EXIT_TROUBLE));
        }
    };
    let as_json = cli.command.json();
    match cli.command.run() {
        Ok(()) => ExitCode::from(EXIT_OK),
        Err(failure) => {
            failure.report(Console::err(), as_json);
            ExitCode::from(failure.exit())
        }
    }
}

impl Command {
    fn json(&self) -> bool {
        match self {
            Command::Check(args) => args.json,
            Command::Doctor(args) => args.json,
            Command::Certs(args) => args.json(),
            Command::Key(args) => args.json(),
            Command::Device(args) => args.json(),
            Command::User(args) => args.json(),
            Command::Ping(args) => args.api.json,
            Command::Withdraw(args) => args.api.json,
            Command::Topic(args) => args.json(),
            Command::Outcomes(args) => args.api.json,
            Command::Events(args) => args.api.json,
            Command::Callback(args) => args.json(),
            Command::Status(args) => args.api.json,
            Command::Store(args) => args.json(),
            Command::Backup(args) => args.json(),
            Command::Restore(args) => args.json,
            #[cfg(feature = "demo")]
            Command::Demo(_) => false,
            Command::Serve(_) | Command::Completions { .. } => false,
        }
    }

    fn run(self) -> Outcome {
        match self {
            Command::Serve(args) => serve::run(&args),
            #[cfg(feature = "demo")]
            Command::Demo(args) => crate::demo::run(&args),
            Command::Check(args) => check::run(&args),
            Command::Doctor(args) => on_one_thread(doctor::run(&args)),
            Command::Certs(args) => certs::run(&args),
            Command::Key(args) => on_one_thread(key::run(&args)),
            Command::Device(args) => on_one_thread(device::run(&args)),
            Command::User(args) => on_one_thread(user::run(&args)),
            Command::Ping(args) => on_one_thread(ping::run(&args)),
            Command::Withdraw(args) => on_one_thread(withdraw::run(&args)),
            Command::Topic(args) => on_one_thread(topic::run(&args)),
            Command::Outcomes(args) => on_one_thread(outcomes::run(&args)),
            Command::Events(args) => on_one_thread(events::run(&args)),
            Command::Callback(args) => on_one_thread(callback::run(&args)),
            Command::Status(args) => on_one_thread(status::run(&args)),
            Command::Store(args) => store::run(&args),
            Command::Backup(args) => backup::run(&args),
            Command::Restore(args) => restore::run(&args),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(shell, &mut Cli::command(), "bellwire", &mut script);
                Console::out().line(String::from_utf8_lossy(&script).trim_end());
                Ok(())
            }
        }
    }
}

/// Runs a command that only asks the API: one thread is enough.
fn on_one_thread(command: impl Future<Output = Outcome>) -> Outcome {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| no_threads(&error))?
        .block_on(command)
}

/// From here on whatever this process makes is for its user alone, also the files of libraries that do not ask for a mode.
pub(crate) fn keep_to_ourselves() {
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
}

/// The system gives no threads or timers.
pub(crate) fn no_threads(error: &std::io::Error) -> Failure {
    Failure::new(
        format!("the system gives no room to run: {error}"),
        "look at the limits of this user (ulimit -a)",
    )
}

/// This moment on the calendar.
pub(crate) fn now() -> OffsetDateTime {
    use bellwire_server::ports::Clock;
    let unix_ms = bellwire_server::runtime::SystemClock::new().now().unix_ms;
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .unwrap_or(OffsetDateTime::UNIX_EPOCH)
}

/// A moment of the API (Unix milliseconds) as people and logs write it, in UTC.
pub(crate) fn moment(unix_ms: u64) -> String {
    const FORM: &[time::format_description::BorrowedFormatItem<'_>] =
        time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second]Z");
    OffsetDateTime::from_unix_timestamp_nanos(i128::from(unix_ms) * 1_000_000)
        .ok()
        .and_then(|moment| moment.format(FORM).ok())
        .unwrap_or_else(|| unix_ms.to_string())
}

/// The settings file of the command line.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ConfigArg {
    /// Settings file; default: bellwire.toml of the working directory, if there is one
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}
