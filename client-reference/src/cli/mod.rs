//! Arguments, credentials, exit codes; `listen` does the work.

mod listen;
mod print;

use std::ffi::OsString;
use std::fmt;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bellwire_client::{Carriers, Codec, Id, Proxy, Secret, Urgency};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};

/// Greatest credentials file, in bytes.
const CREDENTIALS_MAX_BYTES: u64 = 16 * 1024;

/// How a run ends, for scripts. 2 is clap's: the arguments are wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// The wanted number of notifications arrived, or someone pressed Ctrl-C.
    Done = 0,
    /// Nothing was tried: a file, a setting or the state directory is wrong.
    Setup = 1,
    /// The server said never to come back: wrong credentials, revoked, wrong version.
    Refused = 3,
    /// With `--fail-fast`: no session could be had, or it was lost.
    Unreachable = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// A trouble before anything was tried, in words that say what to do.
#[derive(Debug)]
pub(crate) struct Setup(String);

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

const EXAMPLES: &str = "\
Examples:
  Listen with the credentials that `bellwire device add --user anna --out anna.json` wrote:
    bellwire-device listen --server localhost:4433 --ca bellwire-data/dev-ca.pem --credentials anna.json

  Wait for one notification, for a script; the exit code says whether it came:
    bellwire-device listen --server push.example.org --credentials anna.json --count 1 --json

  Look at the frames in plain JSON, over WebSocket alone:
    bellwire-device listen --server push.example.org --credentials anna.json --carrier websocket --codec json

Exit codes:
  0  the wanted number of notifications arrived, or you pressed Ctrl-C
  1  nothing was tried: a file, a setting or the state directory is wrong
  2  the arguments are wrong
  3  the server said never to come back: wrong credentials, revoked, wrong version
  4  with --fail-fast: no session could be had, or it was lost";

/// Receives notifications from a Bellwire server, like a device does.
#[derive(Debug, Parser)]
#[command(name = "bellwire-device", version, after_help = EXAMPLES, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connects and prints one line for each notification, until Ctrl-C.
    #[command(after_help = EXAMPLES)]
    Listen(Box<Listen>),
    /// Prints a completion script for a shell.
    #[command(
        after_help = "Example:\n  bellwire-device completions bash > /etc/bash_completion.d/bellwire-device"
    )]
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("identity").required(true).args(["credentials", "device"]))]
pub(crate) struct Listen {
    /// The server: host:port, bellwire://host:port, or wss://host:port/v1/link for WebSocket alone. The port is 4433 when it
    /// is left out.
    #[arg(long, env = "BELLWIRE_SERVER", value_name = "ADDRESS")]
    server: String,

    /// PEM file with the authority that signed the server's certificate. Without it, the authorities that this machine trusts
    /// count.
    #[arg(long, env = "BELLWIRE_CA", value_name = "FILE")]
    ca: Option<PathBuf>,

    /// JSON file with `device` and `secret`, as POST /v1/devices answers and `bellwire device add --out` writes.
    #[arg(long, env = "BELLWIRE_CREDENTIALS", value_name = "FILE")]
    credentials: Option<PathBuf>,

    /// The device's id; the secret comes from --secret-file or the environment variable BELLWIRE_DEVICE_SECRET.
    #[arg(long, env = "BELLWIRE_DEVICE", value_name = "ID")]
    device: Option<String>,

    /// File that holds the device's secret and nothing else. `-` reads it from standard input.
    #[arg(long, value_name = "FILE", requires = "device")]
    secret_file: Option<PathBuf>,

    /// Directory that remembers what was answered, so that nothing is shown twice. One for each device.
    /// [default: $XDG_STATE_HOME/bellwire-device/ID, or ~/.local/state/bellwire-device/ID]
    #[arg(long, env = "BELLWIRE_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,

    /// Which carrier to use; auto races both and takes the first.
    #[arg(long, value_enum, default_value_t = CarrierChoice::Auto)]
    carrier: CarrierChoice,

    /// How frames are written on WebSocket.
    #[arg(long, value_enum, default_value_t = CodecChoice::Cbor)]
    codec: CodecChoice,

    /// HTTP proxy to go through: http://host:port or http://user:password@host:port. QUIC does not pass one.
    #[arg(
        long,
        env = "BELLWIRE_PROXY",
        value_name = "URL",
        hide_env_values = true
    )]
    proxy: Option<String>,

    /// Ask for nothing less urgent; it waits on the server.
    #[arg(long, value_enum, value_name = "URGENCY")]
    min_urgency: Option<UrgencyChoice>,

    /// How many notifications may be in flight, 1 to 256.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    window: u16,

    /// A name for this network; the carrier that won is remembered by it.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "",
        hide_default_value = true
    )]
    network: String,

    /// Seconds between signs of life, within what the server advises. [default: 25 on QUIC, 240 on WebSocket]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    keep_alive: Option<u32>,

    /// Leave after this many notifications.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Decline every notification, with this reason, instead of acknowledging it.
    #[arg(long, value_name = "REASON", num_args = 0..=1, default_missing_value = "declined_by_hand")]
    decline: Option<String>,

    /// Take this many milliseconds for each notification, like a slow app.
    #[arg(
        long,
        value_name = "MS",
        default_value_t = 0,
        hide_default_value = true
    )]
    delay_ms: u64,

    /// Print JSON, one object a line, events too.
    #[arg(long)]
    json: bool,

    /// Print notifications only, nothing about the connection.
    #[arg(long, short)]
    quiet: bool,

    /// End with exit code 4 as soon as there is no session, instead of trying again.
    #[arg(long)]
    fail_fast: bool,

    /// Do not wait for the disk before acknowledging: after a power cut a notification may be shown twice.
    #[arg(long)]
    no_sync: bool,

    /// Log what the client does, to standard error. The variable RUST_LOG says more precisely what.
    #[arg(long, short)]
    verbose: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CarrierChoice {
    Auto,
    Quic,
    #[value(alias = "ws")]
    Websocket,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum CodecChoice {
    Cbor,
    Json,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum UrgencyChoice {
    VeryLow,
    Low,
    Normal,
    High,
}

impl From<CarrierChoice> for Carriers {
    fn from(choice: CarrierChoice) -> Self {
        match choice {
            CarrierChoice::Auto => Self::Auto,
            CarrierChoice::Quic => Self::Quic,
            CarrierChoice::Websocket => Self::WebSocket,
        }
    }
}

impl From<CodecChoice> for Codec {
    fn from(choice: CodecChoice) -> Self {
        match choice {
            CodecChoice::Cbor => Self::Cbor,
            CodecChoice::Json => Self::Json,
        }
    }
}

impl From<UrgencyChoice> for Urgency {
    fn from(choice: UrgencyChoice) -> Self {
        match choice {
            UrgencyChoice::VeryLow => Self::VeryLow,
            UrgencyChoice::Low => Self::Low,
            UrgencyChoice::Normal => Self::Normal,
            UrgencyChoice::High => Self::High,
        }
    }
}

/// Parses, runs, and answers with the exit code.
pub(crate) fn run() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(
                shell,
                &mut Arguments::command(),
                "bellwire-device",
                &mut script,
            );
            match print::raw(&script) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => Exit::Setup.into(),
            }
        }
        Command::Listen(arguments) => {
            log(arguments.verbose);
            match listen::run(*arguments) {
                Ok(exit) => exit.into(),
                Err(setup) => {
                    print::complain(&setup.to_string());
                    Exit::Setup.into()
                }
            }
        }
    }
}

/// Logs go to standard error: nothing by default, because everything worth knowing is an event.
fn log(verbose: bool) {
    use tracing_subscriber::EnvFilter;
    let default = if verbose {
        "bellwire_client=debug,info"
    } else {
        "off"
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Who this device is.
pub(crate) struct Credentials {
    pub(crate) device: Id,
    pub(crate) secret: Secret,
}

impl Listen {
    pub(crate) fn identity(&self) -> Result<Credentials, Setup> {
        match &self.credentials {
            Some(path) => from_file(path),
            None => {
                let device = self.device.as_deref().unwrap_or_default();
                let secret = match &self.secret_file {
                    Some(path) => read(path, "secret")?,
                    None => std::env::var("BELLWIRE_DEVICE_SECRET").map_err(|_| {
                        Setup("no secret: name it by --secret-file FILE, or in the environment variable BELLWIRE_DEVICE_SECRET".to_owned())
                    })?,
                };
                identity(device, secret.trim())
            }
        }
    }

    pub(crate) fn state_dir(&self, device: Id) -> PathBuf {
        let from_environment = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty());
        default_state_dir(
            self.state_dir.clone(),
            from_environment("XDG_STATE_HOME"),
            from_environment("HOME"),
            device,
        )
    }

    pub(crate) fn proxy(&self) -> Result<Option<Proxy>, Setup> {
        let parse = |text: &String| {
            text.parse()
                .map_err(|error| Setup(format!("--proxy: {error}")))
        };
        self.proxy.as_ref().map(parse).transpose()
    }
}

fn default_state_dir(
    named: Option<PathBuf>,
    state_home: Option<OsString>,
    home: Option<OsString>,
    device: Id,
) -> PathBuf {
    if let Some(path) = named {
        return path;
    }
    let base = match (state_home, home) {
        (Some(state), _) => PathBuf::from(state),
        (None, Some(home)) => Path::new(&home).join(".local/state"),
        (None, None) => PathBuf::from("."),
    };
    base.join("bellwire-device").join(device.to_string())
}

/// The answer of `POST /v1/devices`; other members are skipped.
fn from_file(path: &Path) -> Result<Credentials, Setup> {
    #[derive(serde::Deserialize)]
    struct File {
        device: String,
        secret: String,
    }
    let text = read(path, "credentials")?;
    let file: File = serde_json::from_str(&text).map_err(|error| {
        // The text of the error may quote the file, which holds a secret.
        Setup(format!(
            "{} is no credentials file (line {}): expected {{\"device\": \"<id>\", \"secret\": \"<secret>\"}}, as POST /v1/devices answers",
            path.display(),
            error.line()
        ))
    })?;
    identity(&file.device, &file.secret)
}

fn identity(device: &str, secret: &str) -> Result<Credentials, Setup> {
    let device = device
        .trim()
        .parse()
        .map_err(|error| Setup(format!("the device's id is wrong: {error}")))?;
    if secret.is_empty() {
        return Err(Setup("the secret is empty".to_owned()));
    }
    Ok(Credentials {
        device,
        secret: secret.into(),
    })
}

fn read(path: &Path, what: &str) -> Result<String, Setup> {
    let failed = |error: std::io::Error| {
        Setup(format!(
            "cannot read the {what} file {}: {error}",
            path.display()
        ))
    };
    let mut text = String::new();
    if path == Path::new("-") {
        std::io::stdin()
            .take(CREDENTIALS_MAX_BYTES)
            .read_to_string(&mut text)
            .map_err(failed)?;
    } else {
        let file = std::fs::File::open(path).map_err(failed)?;
        file.take(CREDENTIALS_MAX_BYTES)
            .read_to_string(&mut text)
            .map_err(failed)?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_state_directory_belongs_to_one_device() {
        let device = Id::from_bytes([7; 16]);
        let (state, home) = (Some("/s".into()), Some("/h".into()));
        let choose = |named: Option<&str>, state, home| {
            default_state_dir(named.map(Into::into), state, home, device)
        };
        assert_eq!(
            choose(Some("/n"), state.clone(), home.clone()),
            Path::new("/n")
        );
        assert_eq!(
            choose(None, state, home.clone()),
            Path::new("/s/bellwire-device").join(device.to_string())
        );
        assert_eq!(
            choose(None, None, home),
            Path::new("/h/.local/state/bellwire-device").join(device.to_string())
        );
    }

    #[test]
    fn credentials_are_those_of_the_api_and_errors_do_not_repeat_them() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device.json");
        let device = Id::from_bytes([7; 16]);
        std::fs::write(
            &path,
            format!(r#"{{"device": "{device}", "secret": "s3cret", "user": "ann"}}"#),
        )
        .unwrap();
        let credentials = from_file(&path).unwrap();
        assert_eq!(
            (credentials.device, credentials.secret.expose()),
            (device, "s3cret")
        );
        for wrong in [
            "s3cret",
            r#"{"device": "s3cret"}"#,
            r#"{"device": "s3cret", "secret": "s3cret"}"#,
        ] {
            std::fs::write(&path, wrong).unwrap();
            let error = from_file(&path).err().unwrap().to_string();
            assert!(!error.contains("s3cret"), "{error}");
        }
    }
}
