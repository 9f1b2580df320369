//! `bellwire store inspect`: what is in a data directory, and what a start would make of it.

use std::path::PathBuf;

use bellwire_server::store::examine::{
    AsideSeen, EngineState, FormatSeen, Holder, Inspect, Inspection, SegmentSeen, inspect,
};
use clap::Args;

use super::super::console::Paint;
use super::super::{Console, Failure, Outcome, moment, plain};
use super::{DirArg, json, size};

const AFTER_HELP: &str = "\
Examples:
  bellwire store inspect
  bellwire store inspect --data-dir /var/lib/bellwire
  bellwire store inspect --open-engine --scratch /var/tmp
  bellwire store inspect --json | jq .start

Reads only: not one byte of the data directory is changed. Beside a running server it shows what can be read safely.
Exit code 0 whatever was found, 1 if nothing could be read; `bellwire store verify` is the command that judges.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct InspectArgs {
    #[command(flatten)]
    dir: DirArg,
    /// Open a copy of each engine as well, to see where it stands; needs room for it
    #[arg(long)]
    open_engine: bool,
    /// Where such copies go; default: the system's directory for temporary files
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

pub(crate) fn run(args: &InspectArgs) -> Outcome {
    let found = inspect(&Inspect {
        dir: args.dir.find()?,
        open_engines: args.open_engine,
        scratch: args.scratch.clone(),
    })
    .map_err(|error| {
        Failure::new(
            error.to_string(),
            "name the data directory with --data-dir, and run this as the user that the server runs as",
        )
    })?;
    let out = Console::out();
    if args.json {
        return json(&found);
    }
    print(out, &found);
    Ok(())
}

/// For people.
pub(super) fn print(out: Console, found: &Inspection) {
    let mut pairs = vec![
        ("directory", found.dir.display().to_string()),
        (
            "in use",
            match found.holder {
                Holder::Nobody => "no".to_owned(),
                Holder::Server { pid: Some(pid) } => {
                    format!(
                        "yes, by process {pid}; its engine and its last frames are not looked at"
                    )
                }
                Holder::Server { pid: None } => {
                    "yes; its engine and its last frames are not looked at".to_owned()
                }
                Holder::Unknown => "it cannot be found out".to_owned(),
            },
        ),
        (
            "format",
            match &found.format {
                FormatSeen::Good {
                    version,
                    store,
                    begun,
                } => format!(
                    "version {version}, store {store}{}",
                    if *begun {
                        ""
                    } else {
                        ", nothing was written yet"
                    }
                ),
                FormatSeen::Empty => "none: there is no store yet".to_owned(),
                FormatSeen::Bad { why } => plain(why),
            },
        ),
        ("a start", plain(&found.start.text)),
    ];
    if !found.outcomes.is_empty() {
        let records: u64 = found.outcomes.iter().map(|seen| seen.records).sum();
        let bytes: u64 = found.outcomes.iter().map(|seen| seen.bytes).sum();
        let oldest = found.outcomes.iter().find_map(|seen| seen.earliest_ms);
        pairs.push((
            "outcomes",
            format!(
                "{records} in {} segments, {}{}",
                found.outcomes.len(),
                size(bytes),
                oldest.map_or(String::new(), |at| format!(", since {}", moment(at))),
            ),
        ));
    }
    if !found.start.sets_aside.is_empty() {
        pairs.push(("sets aside", found.start.sets_aside.join(", ")));
    }
    out.pairs(&pairs);
    if !found.log.is_empty() {
        out.line("");
        out.table(
            &["SEGMENT", "FRAMES", "USED", "SIZE", "STATE"],
            &found.log.iter().map(segment).collect::<Vec<_>>(),
        );
    }
    if !found.snapshots.is_empty() {
        out.line("");
        out.table(
            &["SNAPSHOT", "RECORDS", "SIZE", "MADE", "STATE"],
            &found
                .snapshots
                .iter()
                .map(|snapshot| {
                    vec![
                        snapshot.file.clone(),
                        snapshot.entries.map_or("-".to_owned(), |n| n.to_string()),
                        size(snapshot.bytes),
                        snapshot.made_ms.map_or("-".to_owned(), moment),
                        snapshot.why.as_deref().map_or("verified".to_owned(), plain),
                    ]
                })
                .collect::<Vec<_>>(),
        );
    }
    if !found.engines.is_empty() {
        out.line("");
        out.table(
            &["ENGINE", "SIZE", "STATE"],
            &found
                .engines
                .iter()
                .map(|engine| {
                    vec![
                        engine.dir.clone(),
                        size(engine.bytes),
                        match &engine.state {
                            EngineState::Opens { position } => {
                                format!("opens, takes frame {position} next")
                            }
                            EngineState::NotOpened { why } => format!("not opened: {}", plain(why)),
                            EngineState::Fails { why } => format!("does not open: {}", plain(why)),
                            EngineState::Unproven { why, .. } => plain(why),
                        },
                    ]
                })
                .collect::<Vec<_>>(),
        );
    }
    aside(out, found);
    list(
        out,
        "missing in the log",
        Paint::Yellow,
        found.missing_frames.iter().map(ToString::to_string),
    );
    list(
        out,
        "leftovers that a start removes",
        Paint::Dim,
        found.leftovers.iter().cloned(),
    );
    list(out, "lost", Paint::Red, found.lost.iter().cloned());
    list(
        out,
        "not as it should be",
        Paint::Yellow,
        found.findings.iter().cloned(),
    );
}

fn aside(out: Console, found: &Inspection) {
    if found.set_aside.is_empty() {
        return;
    }
    out.line("");
    let rows: Vec<Vec<String>> = found
        .set_aside
        .iter()
        .map(|aside| match aside {
            AsideSeen::Segment(seen) => segment(seen),
            AsideSeen::Record { file, room, why } => {
                let about = format!("a record `{}`: {why}", plain(&room.to_string()));
                vec![
                    file.clone(),
                    "-".to_owned(),
                    "-".to_owned(),
                    "-".to_owned(),
                    about,
                ]
            }
            AsideSeen::Note { file, text } => {
                let first = plain(text.lines().next().unwrap_or_default());
                vec![
                    file.clone(),
                    "-".to_owned(),
                    "-".to_owned(),
                    "-".to_owned(),
                    first,
                ]
            }
            AsideSeen::Other(other) => vec![
                other.name.clone(),
                "-".to_owned(),
                "-".to_owned(),
                size(other.bytes),
                "not of the store".to_owned(),
            ],
        })
        .collect();
    out.table(&["SET ASIDE", "FRAMES", "USED", "SIZE", "STATE"], &rows);
}

fn segment(seen: &SegmentSeen) -> Vec<String> {
    vec![
        seen.file.clone(),
        seen.range.map_or("-".to_owned(), |range| {
            format!("{}..{}", range.from, range.to)
        }),
        size(seen.used),
        size(seen.bytes),
        match &seen.why {
            Some(why) => format!("{}: {}", seen.state, plain(why)),
            None => seen.state.to_string(),
        },
    ]
}

fn list(out: Console, heading: &str, paint: Paint, lines: impl Iterator<Item = String>) {
    let mut lines = lines.peekable();
    if lines.peek().is_none() {
        return;
    }
    out.line("");
    out.line(&out.paint(paint, heading));
    for line in lines {
        out.line(&format!("  {}", plain(&line)));
    }
}
