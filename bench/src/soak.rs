//! Does anything grow that should not? Minutes of mixed load: pings to attached and to absent devices, pings to a topic,
//! devices that leave and come back; and memory, files and threads of the server looked at all along. In the end everything
//! that was accepted must have arrived.

use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::time::sleep;

use crate::failure::Outcome;
use crate::fleet::{self, Carriers};
use crate::generator::backends::Target;
use crate::generator::devices::Fleet;
use crate::process;
use crate::progress::Progress;
use crate::report::{Figure, Plot, Report};
use crate::rig::{self, Load, Rig, ServerArgs};

/// The topic of all devices.
const TOPIC: &str = "soak";

/// Seconds of a turn: in each, one load runs and the devices that come and go change once.
const TURN_SECONDS: u32 = 5;

/// Pings to the topic in a turn.
const FANS: u32 = 2;

/// Connections that post.
const CONNECTIONS: u32 = 16;

static OVER_TIME: Plot = Plot {
    title: "The server over time",
    x_label: "minutes",
    x_log: false,
    y_log: false,
};

/// Mix all kinds of load for some minutes, and look at memory, files and threads of the server
#[derive(Debug, Clone, clap::Args, Serialize)]
#[command(after_help = "Examples:
  bellwire-bench soak                                          three minutes
  bellwire-bench soak --minutes 600 --out report               a night, with a plot")]
pub(crate) struct SoakArgs {
    #[command(flatten)]
    #[serde(flatten)]
    pub(crate) server: ServerArgs,
    /// How long, minutes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    minutes: u32,
    /// Devices; half of them stay attached, the others come and go
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(2..=10_000))]
    devices: u32,
    /// What the devices connect by
    #[arg(long, value_enum, default_value_t = Carriers::Both)]
    carrier: Carriers,
    /// Pings a second to single devices
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rate: u32,
    /// Content of a ping in bytes
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(33..=1_000))]
    bytes: u32,
}

/// One look at the server.
struct Sample {
    minutes: f64,
    resident: f64,
    files: f64,
    threads: f64,
}

/// Runs the workload.
pub(crate) async fn run(args: SoakArgs, progress: Progress) -> Outcome<Report> {
    let mut args = args;
    let mut turns = (args.minutes * 60).div_ceil(TURN_SECONDS);
    let mut turn_seconds = TURN_SECONDS;
    if args.server.smoke {
        (args.devices, args.rate) = (20, 200);
        (turns, turn_seconds) = (2, 1);
    }
    let mut report = Report::new("soak", &args)?;
    let count = args.devices as usize;
    let mut rig = Rig::start(&args.server, &[], count, progress).await?;
    let (api, key) = (rig.server.listen.api, rig.server.key.clone());
    fleet::subscribe(api, &key, &rig.devices, TOPIC, progress).await?;
    let place = rig.place(args.carrier);
    // Who stays is at the start of the list, who comes and goes after it.
    let half = count / 2;
    let mut stay = Fleet::sample(&place, args.carrier, &rig.devices[..half], count).await?;
    let mut roam = Fleet::rest(&place, args.carrier, &rig.devices, half).await?;
    stay.attach(half, false).await?;
    let before = rig.books().await?;
    let mut singles = rig
        .backends(rig.to_devices(), CONNECTIONS, 1, args.bytes, None)
        .await?;
    let topic = Target::Topic(TOPIC.to_owned());
    let mut fans = rig.backends(topic, 1, 1, args.bytes, None).await?;
    let bar = progress.phase("mixed load", turns as usize);
    let started = Instant::now();
    let (mut next, mut next_fan) = (0, 0);
    let mut expected = 0;
    let mut attached = false;
    let mut samples = Vec::new();
    for _ in 0..turns {
        let load = Load::by_the_clock(args.rate, 0, turn_seconds);
        let measured = rig::load(&mut rig.server, &mut singles, &mut [], load, next).await?;
        rig::none_refused(&mut report, "single pings", &measured.posted, &[]);
        next = measured.posted.next;
        expected += measured.posted.accepted;
        let load = Load::closed(0, 60).at_most(FANS.into());
        let measured = rig::load(&mut rig.server, &mut fans, &mut [], load, next_fan).await?;
        rig::none_refused(&mut report, "pings to a topic", &measured.posted, &[]);
        next_fan = measured.posted.next;
        expected += measured.posted.accepted * count as u64;
        // Some of what is under way when they leave comes once more, and says so.
        match attached {
            true => roam.leave().await?,
            false => drop(roam.attach(count - half, false).await?),
        }
        attached = !attached;
        let pid = rig.server.pid();
        let (files, threads) = process::files_and_threads(pid)?;
        samples.push(Sample {
            minutes: started.elapsed().as_secs_f64() / 60.0,
            resident: process::memory(pid)?.resident as f64 / f64::from(1 << 20),
            files: files as f64,
            threads: threads as f64,
        });
        bar.step();
    }
    bar.done();
    if !attached {
        roam.attach(count - half, false).await?;
    }
    rig::judge(
        &mut report,
        &rig.server,
        &mut [&mut stay, &mut roam],
        before,
        expected,
    )
    .await?;
    tell(&mut report, &samples);
    report.push(Figure::new(
        "notifications in all",
        expected as f64,
        "notifications",
    ));
    singles.stop().await;
    fans.stop().await;
    stay.stop().await;
    roam.stop().await;
    // What belongs to devices goes with them.
    rig.sessions(0).await?;
    sleep(Duration::from_secs(1)).await;
    let (files, _) = process::files_and_threads(rig.server.pid())?;
    report.push(Figure::new(
        "files after all devices left",
        files as f64,
        "files",
    ));
    rig.stop(&mut report).await;
    Ok(report)
}

fn tell(report: &mut Report, samples: &[Sample]) {
    // The first third is for caches and pools to fill.
    let settled = &samples[samples.len() / 3..];
    type Of = fn(&Sample) -> f64;
    let looks: [(&str, &'static str, Of); 3] = [
        ("resident", "MiB", |sample| sample.resident),
        ("files", "files", |sample| sample.files),
        ("threads", "threads", |sample| sample.threads),
    ];
    for (name, unit, of) in looks {
        let values: Vec<f64> = samples.iter().map(of).collect();
        let last = values.last().copied().unwrap_or_default();
        report.push(Figure::new(format!("{name} at the end"), last, unit));
        let most = values.iter().copied().fold(0.0, f64::max);
        report.push(Figure::new(format!("{name}, most"), most, unit));
        let points: Vec<(f64, f64)> = settled
            .iter()
            .map(|sample| (sample.minutes, of(sample)))
            .collect();
        let unit = match name {
            "resident" => "MiB an hour",
            _ => "an hour",
        };
        report.push(Figure::new(
            format!("{name}, slope over the last two thirds"),
            slope(&points) * 60.0,
            unit,
        ));
    }
    for sample in samples.iter().step_by((samples.len() / 60).max(1)) {
        report.push(
            Figure::new(
                format!("resident at {:.2} minutes", sample.minutes),
                sample.resident,
                "MiB",
            )
            .plotted(&OVER_TIME, "resident", sample.minutes),
        );
    }
}

/// How much the second grows for each of the first, by least squares.
fn slope(points: &[(f64, f64)]) -> f64 {
    let count = points.len().max(1) as f64;
    let mean_x = points.iter().map(|point| point.0).sum::<f64>() / count;
    let mean_y = points.iter().map(|point| point.1).sum::<f64>() / count;
    let (mut up, mut across) = (0.0, 0.0);
    for (x, y) in points {
        up += (x - mean_x) * (y - mean_y);
        across += (x - mean_x) * (x - mean_x);
    }
    if across > 0.0 { up / across } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slope_is_that_of_the_line() {
        let line: Vec<(f64, f64)> = (0..10)
            .map(|x| (f64::from(x), 3.0 + 2.0 * f64::from(x)))
            .collect();
        assert!((slope(&line) - 2.0).abs() < 1e-9);
        assert_eq!(slope(&line[..1]), 0.0);
        assert_eq!(slope(&[]), 0.0);
    }
}
