//! `bellwire-device bench-one`.

use std::time::Duration;

use bellwire_client::raw::{Dialer, Link};
use bellwire_client::{Carrier, Code, Id, Urgency, inspect};
use bellwire_protocol::{Decoded, DeviceFrame, Hello, ServerFrame};
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use rand::RngCore;
use serde::Serialize;
use tokio::time::Instant;

use super::print::line;
use super::{Credentials, Exit, Identity, Setup, Way};

/// How long one answer may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(20);

/// Most rounds of one run: each leaves a few bytes here.
const ROUNDS_MAX: u64 = 1_000_000;

/// Failures in a row after which the server is taken for gone.
const FAILURES_IN_A_ROW_MAX: u32 = 10;

/// Where there is no terminal, a line says so often how far it is.
const TELL_EVERY: Duration = Duration::from_secs(5);

pub(crate) const EXAMPLES: &str = "\
It takes the device's place: a session of the same device that stands is replaced. Notifications that the server sends \
meanwhile are not answered, so they stay with it. One connection at a time; for load there is bellwire-bench.

Examples:
  How long does a connection take from here, over both carriers?
    bellwire-device bench-one --server push.example.org --credentials anna.json

  A thousand round trips in one session over QUIC, for a script:
    bellwire-device bench-one --server push.example.org --credentials anna.json \\
        --measure round-trips --rounds 1000 --carrier quic --json

Exit codes:
  0  every round was measured
  1  nothing was tried: a file or a setting is wrong, or a client of this device runs on this machine
  2  the arguments are wrong
  3  the server said never to come back: wrong credentials, revoked, wrong version
  4  not one round was measured
  5  some rounds failed";

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("identity").required(true).args(["credentials", "device"]))]
pub(crate) struct BenchOne {
    #[command(flatten)]
    way: Way,

    #[command(flatten)]
    identity: Identity,

    /// What a round is.
    #[arg(long, value_enum, default_value_t = Measure::Connections)]
    measure: Measure,

    /// How many rounds, on each carrier.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=ROUNDS_MAX))]
    rounds: u64,

    /// Pause between rounds in milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=600_000))]
    pause_ms: u64,

    /// Which carrier to measure; both, one after the other, unless one is named.
    #[arg(long, value_enum)]
    carrier: Option<One>,

    /// Print one JSON object, times in microseconds.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Measure {
    /// A new connection: until the link stands, and until `welcome`.
    Connections,
    /// A `ping` and its `pong` in a session that stands.
    RoundTrips,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum One {
    Quic,
    #[value(alias = "ws")]
    Websocket,
}

/// What was measured on one carrier.
#[derive(Debug, Serialize)]
struct Measured {
    carrier: &'static str,
    rounds: u64,
    failed: u64,
    /// The last failure.
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    /// From the first packet until frames can be sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    link_us: Option<Percentiles>,
    /// From the first packet until `welcome`.
    #[serde(skip_serializing_if = "Option::is_none")]
    welcome_us: Option<Percentiles>,
    /// From `ping` to `pong`.
    #[serde(skip_serializing_if = "Option::is_none")]
    round_trip_us: Option<Percentiles>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Percentiles {
    min: u64,
    p50: u64,
    p90: u64,
    p99: u64,
    max: u64,
}

/// Of any number of times; `None`: of none. The nearest rank, so each is a time that was measured.
fn percentiles(mut times: Vec<u64>) -> Option<Percentiles> {
    times.sort_unstable();
    let rank = |percent: usize| {
        let place = (times.len() * percent).div_ceil(100).max(1) - 1;
        times.get(place).copied()
    };
    Some(Percentiles {
        min: *times.first()?,
        p50: rank(50)?,
        p90: rank(90)?,
        p99: rank(99)?,
        max: *times.last()?,
    })
}

/// Why a round failed.
enum Failure {
    /// Another round may pass.
    Round(String),
    /// The server said never.
    Refused(String),
}

pub(crate) fn run(arguments: BenchOne) -> Result<Exit, Setup> {
    let dialer = arguments.way.dialer()?;
    let credentials = arguments.identity.read()?;
    let state_dir = arguments.identity.state_dir(credentials.device);
    if inspect(&state_dir).is_ok_and(|found| found.in_use) {
        return Err(Setup(
            "a client of this device runs on this machine, and would lose its session: stop it, or use a device of its own for measuring".to_owned(),
        ));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Setup(format!("cannot start: {error}")))?;
    runtime.block_on(bench(&arguments, &dialer, &credentials))
}

async fn bench(
    arguments: &BenchOne,
    dialer: &Dialer,
    credentials: &Credentials,
) -> Result<Exit, Setup> {
    let carriers = match arguments.carrier {
        Some(One::Quic) => vec![Carrier::Quic],
        Some(One::Websocket) => vec![Carrier::WebSocket],
        None if dialer.offers_quic() => vec![Carrier::Quic, Carrier::WebSocket],
        None => vec![Carrier::WebSocket],
    };
    let mut bencher = Bencher {
        arguments,
        dialer,
        credentials,
        instance: random_id(),
        attempt: 0,
    };
    let (mut all, mut refused) = (Vec::new(), None);
    for carrier in carriers {
        let (measured, refusal) = bencher.measure(carrier).await;
        all.push(measured);
        if refusal.is_some() {
            refused = refusal;
            break;
        }
    }
    let text = match arguments.json {
        true => serde_json::json!({
            "server": dialer.endpoint().to_string(), "measure": arguments.measure.name(), "carriers": all,
        })
        .to_string(),
        false => for_people(&all, arguments.measure),
    };
    let _ = line(&text);
    if let Some(refusal) = refused {
        super::print::complain(&refusal);
        return Ok(Exit::Refused);
    }
    let (rounds, failed) = all.iter().fold((0, 0), |(rounds, failed), measured| {
        (rounds + measured.rounds, failed + measured.failed)
    });
    Ok(match (rounds, failed) {
        (0, _) => Exit::Unreachable,
        (_, 0) => Exit::Done,
        _ => Exit::Limited,
    })
}

impl Measure {
    const fn name(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::RoundTrips => "round-trips",
        }
    }
}

struct Bencher<'a> {
    arguments: &'a BenchOne,
    dialer: &'a Dialer,
    credentials: &'a Credentials,
    /// One for all rounds: they are one process to the server, and do not count as replacements by another.
    instance: Id,
    attempt: u64,
}

impl Bencher<'_> {
    async fn measure(&mut self, carrier: Carrier) -> (Measured, Option<String>) {
        let (mut links, mut welcomes, mut trips) = (Vec::new(), Vec::new(), Vec::new());
        let (mut failed, mut in_a_row, mut failure, mut refusal) = (0, 0, None, None);
        let mut session: Option<Link> = None;
        let progress = Progress::new(self.arguments.rounds, carrier);
        for round in 0..self.arguments.rounds {
            let result = match self.arguments.measure {
                Measure::Connections => match self.connect(carrier).await {
                    Ok((link, linked, welcomed)) => {
                        links.push(micros(linked));
                        welcomes.push(micros(welcomed));
                        leave(link).await;
                        Ok(())
                    }
                    Err(failure) => Err(failure),
                },
                Measure::RoundTrips => match self.round_trip(carrier, &mut session).await {
                    Ok(trip) => {
                        trips.push(micros(trip));
                        Ok(())
                    }
                    Err(failure) => {
                        session = None;
                        Err(failure)
                    }
                },
            };
            progress.at(round + 1);
            match result {
                Ok(()) => in_a_row = 0,
                Err(Failure::Refused(why)) => {
                    failed += 1;
                    refusal = Some(why);
                    break;
                }
                Err(Failure::Round(why)) => {
                    failed += 1;
                    in_a_row += 1;
                    failure = Some(why);
                    if in_a_row == FAILURES_IN_A_ROW_MAX {
                        break;
                    }
                }
            }
            if self.arguments.pause_ms > 0 {
                tokio::time::sleep(Duration::from_millis(self.arguments.pause_ms)).await;
            }
        }
        progress.end();
        if let Some(link) = session {
            leave(link).await;
        }
        let measured = Measured {
            carrier: carrier.name(),
            rounds: links.len().max(trips.len()) as u64,
            failed,
            failure,
            link_us: percentiles(links),
            welcome_us: percentiles(welcomes),
            round_trip_us: percentiles(trips),
        };
        (measured, refusal)
    }

    /// A session, and how long link and `welcome` took.
    async fn connect(&mut self, carrier: Carrier) -> Result<(Link, Duration, Duration), Failure> {
        let from = Instant::now();
        let mut link = self
            .dialer
            .dial(carrier)
            .await
            .map_err(|error| Failure::Round(format!("{error}. {}", error.advice())))?;
        let linked = from.elapsed();
        self.attempt += 1;
        let hello = Hello {
            device: self.credentials.device,
            secret: Some(self.credentials.secret.clone()),
            instance: self.instance,
            attempt: self.attempt,
            seen: Vec::new(),
            // As little as possible is sent that nobody will answer.
            window: Some(1),
            min_urgency: Some(Urgency::High),
            agent: Some(concat!("bellwire-bench-one/", env!("CARGO_PKG_VERSION")).to_owned()),
        };
        let hello = DeviceFrame::Hello(hello);
        within(async {
            link.send(&hello).await.map_err(ended)?;
            until(&mut link, |frame| matches!(frame, ServerFrame::Welcome(_))).await
        })
        .await?;
        Ok((link, linked, from.elapsed()))
    }

    async fn round_trip(
        &mut self,
        carrier: Carrier,
        session: &mut Option<Link>,
    ) -> Result<Duration, Failure> {
        if session.is_none() {
            *session = Some(self.connect(carrier).await?.0);
        }
        let Some(link) = session else {
            return Err(Failure::Round("there is no session".to_owned()));
        };
        let from = Instant::now();
        within(async {
            link.send(&DeviceFrame::Ping).await.map_err(ended)?;
            until(link, |frame| *frame == ServerFrame::Pong).await
        })
        .await?;
        Ok(from.elapsed())
    }
}

async fn within(step: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let done = tokio::time::timeout(ANSWER_WITHIN, step).await;
    done.unwrap_or_else(|_| {
        let seconds = ANSWER_WITHIN.as_secs();
        Err(Failure::Round(format!("no answer within {seconds} s")))
    })
}

/// Takes frames until the wanted one; what else comes is not answered.
async fn until(link: &mut Link, wanted: impl Fn(&ServerFrame) -> bool) -> Result<(), Failure> {
    loop {
        match link.receive().await.map_err(ended)? {
            Ok(Decoded::Frame(frame)) if wanted(&frame) => return Ok(()),
            Ok(Decoded::Frame(ServerFrame::Error(error))) => {
                let text = format!("the server said `{}`: {}", error.code, error.message);
                return Err(match error.retry {
                    bellwire_protocol::Retry::Never => Failure::Refused(text),
                    bellwire_protocol::Retry::Later | bellwire_protocol::Retry::Now => {
                        Failure::Round(text)
                    }
                });
            }
            Ok(Decoded::Frame(ServerFrame::Goaway(goaway))) => {
                let code = goaway.reason.code();
                return Err(Failure::Round(format!("sent away: {}", code.meaning())));
            }
            Ok(_) => {}
            Err(error) => return Err(Failure::Round(error.to_string())),
        }
    }
}

fn ended(end: bellwire_client::raw::LinkEnd) -> Failure {
    match end.code {
        Some(code) if code.retry() == bellwire_protocol::Retry::Never => Failure::Refused(format!(
            "the server said `{}`: {}",
            code.name(),
            code.remedy()
        )),
        _ => Failure::Round(end.detail),
    }
}

async fn leave(mut link: Link) {
    let _ = link.feed(&DeviceFrame::Bye).await;
    link.close(Code::Bye).await;
}

fn micros(time: Duration) -> u64 {
    time.as_micros() as u64
}

fn random_id() -> Id {
    let mut bytes = [0; 16];
    rand::rng().fill_bytes(&mut bytes);
    Id::from_bytes(bytes)
}

/// A bar on a terminal, a line now and then elsewhere.
struct Progress {
    bar: ProgressBar,
    carrier: &'static str,
    rounds: u64,
    told: std::cell::Cell<Instant>,
}

impl Progress {
    fn new(rounds: u64, carrier: Carrier) -> Self {
        let bar = ProgressBar::new(rounds);
        let style = ProgressStyle::with_template("{prefix} [{bar:40}] {pos}/{len}, {eta} left");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.set_prefix(carrier.name());
        Self {
            bar,
            carrier: carrier.name(),
            rounds,
            told: std::cell::Cell::new(Instant::now()),
        }
    }

    fn at(&self, round: u64) {
        self.bar.set_position(round);
        if self.bar.is_hidden() && self.told.get().elapsed() >= TELL_EVERY {
            self.told.set(Instant::now());
            eprintln!("{}: {round} of {} rounds", self.carrier, self.rounds);
        }
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

fn for_people(all: &[Measured], measure: Measure) -> String {
    let mut lines = vec![format!(
        "{:<10} {:<11} {:>7} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10}",
        "carrier", "what", "rounds", "failed", "min", "p50", "p90", "p99", "max"
    )];
    for measured in all {
        let rows = match measure {
            Measure::Connections => {
                vec![("link", measured.link_us), ("welcome", measured.welcome_us)]
            }
            Measure::RoundTrips => vec![("round trip", measured.round_trip_us)],
        };
        for (what, times) in rows {
            let shown = |pick: fn(&Percentiles) -> u64| match &times {
                Some(times) => format!("{:.2} ms", pick(times) as f64 / 1_000.0),
                None => "-".to_owned(),
            };
            lines.push(format!(
                "{:<10} {what:<11} {:>7} {:>6} {:>10} {:>10} {:>10} {:>10} {:>10}",
                measured.carrier,
                measured.rounds,
                measured.failed,
                shown(|times| times.min),
                shown(|times| times.p50),
                shown(|times| times.p90),
                shown(|times| times.p99),
                shown(|times| times.max),
            ));
        }
        if let Some(failure) = &measured.failure {
            lines.push(format!("  last failure: {}", super::print::plain(failure)));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        assert_eq!(percentiles(Vec::new()), None);
        let one = percentiles(vec![7]);
        assert_eq!(
            one,
            Some(Percentiles {
                min: 7,
                p50: 7,
                p90: 7,
                p99: 7,
                max: 7
            })
        );
        let hundred = percentiles((1..=100).rev().collect());
        assert_eq!(
            hundred,
            Some(Percentiles {
                min: 1,
                p50: 50,
                p90: 90,
                p99: 99,
                max: 100
            })
        );
    }
}
