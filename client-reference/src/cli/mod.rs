//! Arguments, credentials, exit codes; each command has a file of its own.

mod bench_one;
mod doctor;
mod listen;
mod print;
mod status;

use std::ffi::OsString;
use std::fmt;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bellwire_client::raw::Dialer;
use bellwire_client::{Carriers, Codec, Id, Proxy, Secret, Trust, Urgency};
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
    /// With `--fail-fast`: no session could be had, or it was lost. Of `doctor`: there is no way to a session.
    Unreachable = 4,
    /// Of `doctor`: a session is possible, but something is wrong. Of `bench-one`: a part of it failed.
    Limited = 5,
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

const OVERVIEW: &str = "\
Examples:
  Receive notifications:
    bellwire-device listen --server localhost:4433 --ca bellwire-data/dev-ca.pem --credentials anna.json

  Nothing arrives? Find out why, step by step:
    bellwire-device doctor --server push.example.org --credentials anna.json

  See what this device remembers:
    bellwire-device status";

const EXAMPLES: &str = "\
Examples:
  Listen with the credentials that `bellwire device add --user anna --out anna.json` wrote:
    bellwire-device listen --server localhost:4433 --ca bellwire-data/dev-ca.pem --credentials anna.json

  Wait for one notification, for a script; the exit code says whether it came:
    bellwire-device listen --server push.example.org --credentials anna.json --count 1 --json

  From a company's network, by the proxy that the environment names:
    HTTPS_PROXY=http://proxy:3128 bellwire-device listen --server push.example.org --credentials anna.json --proxy env

  Become a member of a topic, as far as the app's rules allow it; the device stays one until it leaves it:
    bellwire-device listen --server push.example.org --credentials anna.json --subscribe news --unsubscribe weather

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
#[command(name = "bellwire-device", version, after_help = OVERVIEW, max_term_width = 120)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Connects and prints one line for each notification, until Ctrl-C.
    #[command(after_help = EXAMPLES)]
    Listen(Box<Listen>),
    /// Shows what a device remembers on disk: what it answered, its networks, its last session.
    #[command(after_help = status::EXAMPLES)]
    Status(status::Status),
    /// Looks at the way to a server step by step, and says what to do about what fails.
    #[command(after_help = doctor::EXAMPLES)]
    Doctor(Box<doctor::Doctor>),
    /// Measures one server from here: connections, or round trips within one.
    #[command(after_help = bench_one::EXAMPLES)]
    BenchOne(Box<bench_one::BenchOne>),
    /// Prints a completion script for a shell.
    #[command(
        after_help = "Example:\n  bellwire-device completions bash > /etc/bash_completion.d/bellwire-device"
    )]
    Completions {
        /// For which shell.
        shell: clap_complete::Shell,
    },
}

/// Where the server is, and how to get there.
#[derive(Debug, Args)]
pub(crate) struct Way {
    /// The server: host:port, bellwire://host:port, or wss://host:port/v1/link for WebSocket alone. The port is 4433 when it
    /// is left out.
    #[arg(long, env = "BELLWIRE_SERVER", value_name = "ADDRESS")]
    server: String,

    /// PEM file with the authority that signed the server's certificate. Without it, the authorities that this machine trusts
    /// count.
    #[arg(long, env = "BELLWIRE_CA", value_name = "FILE")]
    ca: Option<PathBuf>,

    /// HTTP proxy to go through: http://host:port or http://user:password@host:port, https:// if the proxy itself speaks TLS.
    /// `env` takes the one that HTTPS_PROXY or ALL_PROXY names, except for what NO_PROXY names. QUIC does not pass one.
    /// Programs of the same user can see arguments: a password is safer in the variable.
    #[arg(
        long,
        env = "BELLWIRE_PROXY",
        value_name = "URL",
        hide_env_values = true
    )]
    proxy: Option<String>,

    /// Try the direct ways as well, and remember for each network what works.
    #[arg(long, requires = "proxy")]
    proxy_when_needed: bool,

    /// PEM file with the authority that signed the certificate of a proxy that speaks TLS. [default: as for the server]
    #[arg(long, value_name = "FILE", requires = "proxy")]
    proxy_ca: Option<PathBuf>,
}

/// Who the device is, and where it keeps its state.
#[derive(Debug, Args)]
pub(crate) struct Identity {
    /// JSON file with `device` and `secret`, as POST /v1/devices answers and `bellwire device add --out` writes.
    #[arg(long, env = "BELLWIRE_CREDENTIALS", value_name = "FILE")]
    credentials: Option<PathBuf>,

    /// The device's id; the secret comes from --secret-file or the environment variable BELLWIRE_DEVICE_SECRET.
    #[arg(
        long,
        env = "BELLWIRE_DEVICE",
        value_name = "ID",
        conflicts_with = "credentials"
    )]
    device: Option<String>,

    /// File that holds the device's secret and nothing else. `-` reads it from standard input.
    #[arg(long, value_name = "FILE", requires = "device")]
    secret_file: Option<PathBuf>,

    /// Directory that remembers what was answered, so that nothing is shown twice. One for each device.
    /// [default: $XDG_STATE_HOME/bellwire-device/ID, or ~/.local/state/bellwire-device/ID]
    #[arg(long, env = "BELLWIRE_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("identity").required(true).args(["credentials", "device"]))]
pub(crate) struct Listen {
    #[command(flatten)]
    way: Way,

    #[command(flatten)]
    identity: Identity,

    /// Which carrier to use; auto races both and takes the first.
    #[arg(long, value_enum, default_value_t = CarrierChoice::Auto)]
    carrier: CarrierChoice,

    /// How frames are written on WebSocket.
    #[arg(long, value_enum, default_value_t = CodecChoice::Cbor)]
    codec: CodecChoice,

    /// Ask for nothing less urgent; it waits on the server.
    #[arg(long, value_enum, value_name = "URGENCY")]
    min_urgency: Option<UrgencyChoice>,

    /// How many notifications may be in flight, 1 to 256.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=256))]
    window: u16,

    /// A name for this network; what works on it is remembered by it. [default: told apart by gateway and own addresses]
    #[arg(long, value_name = "NAME")]
    network: Option<String>,

    /// Seconds between signs of life, within what the server advises. [default: learned for each network]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=86_400))]
    keep_alive: Option<u32>,

    /// Ask to become a member of this topic; the line `topics:` says what came of it. May be given again for others. The
    /// server keeps it: asking once is enough.
    #[arg(long, value_name = "TOPIC")]
    subscribe: Vec<String>,

    /// Ask to leave this topic. May be given again for others.
    #[arg(long, value_name = "TOPIC")]
    unsubscribe: Vec<String>,

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
            ended(listen::run(*arguments))
        }
        Command::Status(arguments) => ended(status::run(&arguments)),
        Command::Doctor(arguments) => {
            log(false);
            ended(doctor::run(*arguments))
        }
        Command::BenchOne(arguments) => {
            log(false);
            ended(bench_one::run(*arguments))
        }
    }
}

fn ended(run: Result<Exit, Setup>) -> ExitCode {
    match run {
        Ok(exit) => exit.into(),
        Err(setup) => {
            print::complain(&setup.to_string());
            Exit::Setup.into()
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

/// Which proxy, and when.
pub(crate) enum ProxyChoice {
    None,
    Environment,
    Always(Proxy),
    WhenNeeded(Proxy),
}

impl Way {
    pub(crate) fn trust(&self) -> Trust {
        match &self.ca {
            Some(path) => Trust::File(path.clone()),
            None => Trust::System,
        }
    }

    pub(crate) fn proxy(&self) -> Result<ProxyChoice, Setup> {
        let Some(text) = &self.proxy else {
            return Ok(ProxyChoice::None);
        };
        if text == "env" {
            return match self.proxy_when_needed {
                false => Ok(ProxyChoice::Environment),
                true => Err(Setup(
                    "--proxy-when-needed goes with a proxy's URL: what the environment names is used always, except for NO_PROXY".to_owned(),
                )),
            };
        }
        let proxy = text
            .parse()
            .map_err(|error| Setup(format!("--proxy: {error}")))?;
        Ok(match self.proxy_when_needed {
            true => ProxyChoice::WhenNeeded(proxy),
            false => ProxyChoice::Always(proxy),
        })
    }

    /// For what needs no client: links alone.
    pub(crate) fn dialer(&self) -> Result<Dialer, Setup> {
        let setup = |error: &dyn fmt::Display| Setup(error.to_string());
        let endpoint = self.server.parse().map_err(|error| setup(&error))?;
        let dialer = Dialer::new(endpoint, &self.trust()).map_err(|error| setup(&error))?;
        let dialer = match self.proxy()? {
            ProxyChoice::None => dialer,
            ProxyChoice::Always(proxy) => dialer.with_proxy(Some(proxy)),
            ProxyChoice::WhenNeeded(proxy) => dialer.with_proxy_when_needed(proxy),
            ProxyChoice::Environment => dialer
                .with_proxy_from_environment()
                .map_err(|error| setup(&error))?,
        };
        match &self.proxy_ca {
            None => Ok(dialer),
            Some(path) => dialer
                .with_proxy_trust(&Trust::File(path.clone()))
                .map_err(|error| setup(&error)),
        }
    }
}

impl Identity {
    /// Who the device is, if the arguments say so.
    pub(crate) fn read_if_given(&self) -> Result<Option<Credentials>, Setup> {
        match (&self.credentials, &self.device) {
            (None, None) => Ok(None),
            _ => self.read().map(Some),
        }
    }

    /// Who the device is.
    pub(crate) fn read(&self) -> Result<Credentials, Setup> {
        match &self.credentials {
            Some(path) => from_file(path),
            None => {
                let Some(device) = self.device.as_deref() else {
                    return Err(Setup("no identity: name the file with the credentials by --credentials FILE, or the device's id by --device ID".to_owned()));
                };
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
        self.state_dir
            .clone()
            .unwrap_or_else(|| base_dir().join(device.to_string()))
    }
}

/// Where the state directories of all devices of this user are, unless they are named.
pub(crate) fn base_dir() -> PathBuf {
    let from_environment = |name: &str| std::env::var_os(name).filter(|path| !path.is_empty());
    default_base_dir(from_environment("XDG_STATE_HOME"), from_environment("HOME"))
}

fn default_base_dir(state_home: Option<OsString>, home: Option<OsString>) -> PathBuf {
    let base = match (state_home, home) {
        (Some(state), _) => PathBuf::from(state),
        (None, Some(home)) => Path::new(&home).join(".local/state"),
        (None, None) => PathBuf::from("."),
    };
    base.join("bellwire-device")
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
    fn state_directories_are_where_the_system_keeps_state() {
        let (state, home) = (Some("/s".into()), Some("/h".into()));
        assert_eq!(
            default_base_dir(state, home.clone()),
            Path::new("/s/bellwire-device")
        );
        assert_eq!(
            default_base_dir(None, home),
            Path::new("/h/.local/state/bellwire-device")
        );
        assert_eq!(default_base_dir(None, None), Path::new("./bellwire-device"));
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
