//! `bellwire store convert`: from one engine to another while no server runs.

use std::sync::Arc;

use bellwire_server::runtime::SystemClock;
use bellwire_server::store::{
    ConvertError, ConvertPlan, ConvertStep, Converted, EngineKind, OpenError, StoreSettings,
    convert, plan_conversion,
};
use clap::{Args, ValueEnum};
use serde::Serialize;

use super::super::progress::Progress;
use super::super::{Console, Failure, Outcome};
use super::{DirArg, json, size};

const AFTER_HELP: &str = "\
Examples:
  bellwire store convert --to fjall --dry-run
  bellwire store convert --to fjall
  bellwire store convert --to sled --data-dir /var/lib/bellwire --json

Stop the server first. The engine that is there is brought up to date with the log and copied; number and checksum of all
entries must be equal before the new engine counts. Broken off at any moment, it leaves the old engine or the new one, whole;
run it again. The old one's directory is kept under a dated name: remove it when the server runs well. Then change the setting
store.engine, or the next start builds the old kind again.";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct ConvertArgs {
    /// The engine that shall count
    #[arg(long, value_enum)]
    to: To,
    #[command(flatten)]
    dir: DirArg,
    /// Only say what would be done, and whether there is room for it
    #[arg(long)]
    dry_run: bool,
    /// The directory may lie on a network file system, because you know that syncs and locks hold there
    #[arg(long)]
    trust_file_system: bool,
    /// Answer in JSON, for scripts
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum To {
    Sled,
    Fjall,
}

#[derive(Serialize)]
struct Answer<'a> {
    converted: bool,
    from: Option<&'a str>,
    to: &'a str,
    entries: u64,
    bytes: u64,
    checksum: String,
    kept: Option<&'a str>,
    replayed_frames: u64,
    setting: String,
}

#[derive(Serialize)]
struct Plan<'a> {
    converted: bool,
    from: Option<&'a str>,
    to: &'a str,
    live_bytes_max: u64,
    room_needed_max: u64,
    room_free: u64,
}

pub(crate) fn run(args: &ConvertArgs) -> Outcome {
    let engine = match args.to {
        To::Sled => EngineKind::Sled,
        To::Fjall => EngineKind::Fjall,
    };
    let settings = StoreSettings {
        engine,
        trust_file_system: args.trust_file_system,
        ..StoreSettings::new(args.dir.find()?)
    };
    if args.dry_run {
        let plan = plan_conversion(&settings).map_err(failure)?;
        return print_plan(&plan, args.json);
    }
    let mut progress = Progress::new(args.json);
    let clock = Arc::new(SystemClock::new());
    let converted = convert(&settings, &*clock, &mut |step, done, of| {
        progress.step(name(step), done, of);
    });
    progress.done();
    print_converted(&converted.map_err(failure)?, args.json)
}

fn failure(error: ConvertError) -> Failure {
    let (text, advice) = match &error {
        ConvertError::Open(OpenError::InUse { dir, holder }) => (
            format!(
                "the data directory {} is in use{}, and an engine is converted while nobody uses it",
                dir.display(),
                holder.map_or(String::new(), |pid| format!(" by process {pid}"))
            ),
            "stop that server, convert, and start it again with the other engine",
        ),
        ConvertError::Open(OpenError::FileSystem { dir, name }) => (
            format!(
                "the data directory {} lies on a file system of type {name}, where it cannot be seen from here whether a sync \
                 reaches a disk and a lock holds",
                dir.display()
            ),
            "if you know that both hold, say so with --trust-file-system",
        ),
        ConvertError::Open(OpenError::NotAStore { .. }) => (
            error.to_string(),
            "name the data directory with --data-dir, or the settings file with --config",
        ),
        ConvertError::Open(_) => (
            error.to_string(),
            "nothing was converted; `bellwire store inspect` shows what is there, docs/store.md says what it means",
        ),
        ConvertError::Already { .. } | ConvertError::Memory => (
            error.to_string(),
            "nothing needs to be done but to choose the engine: store.engine",
        ),
        ConvertError::NoRoom { need, free } => (
            format!(
                "there is no room for another engine beside the one that is there: up to {} may be needed, {} are free",
                size(*need),
                size(*free)
            ),
            "nothing was converted; make room (*.aside-* directories that nobody needs, old backups), then try again",
        ),
        ConvertError::Engine(_) => (
            error.to_string(),
            "the engine that counted still does and the server can be started as before; check room and health of the disk, \
             then try again",
        ),
        ConvertError::Differs { .. } => (
            error.to_string(),
            "the engine that counted still does and the server can be started as before; please report this",
        ),
        ConvertError::SetAside { .. } => (
            error.to_string(),
            "set store.engine to the new one; the next start gives the old directory its dated name",
        ),
    };
    Failure::new(text, advice)
}

fn print_plan(plan: &ConvertPlan, as_json: bool) -> Outcome {
    if as_json {
        return json(&Plan {
            converted: false,
            from: plan.from,
            to: plan.to,
            live_bytes_max: plan.live_bytes_max,
            room_needed_max: plan.room_needed_max,
            room_free: plan.room_free,
        });
    }
    let out = Console::out();
    out.pairs(&[
        (
            "from",
            plan.from
                .unwrap_or("none that counts: it would be built from snapshot and log")
                .to_owned(),
        ),
        ("to", plan.to.to_owned()),
        ("to copy", format!("at most {}", size(plan.live_bytes_max))),
        (
            "room",
            format!(
                "{} are surely enough, {} are free",
                size(plan.room_needed_max),
                size(plan.room_free)
            ),
        ),
    ]);
    out.line("Nothing was changed: this was a dry run.");
    Ok(())
}

fn print_converted(converted: &Converted, as_json: bool) -> Outcome {
    let setting = format!("store.engine = \"{}\"", converted.to);
    let digest = converted.digest;
    if as_json {
        return json(&Answer {
            converted: true,
            from: converted.from,
            to: converted.to,
            entries: digest.entries,
            bytes: digest.bytes,
            checksum: format!("{:08x}", digest.checksum),
            kept: converted.kept.as_deref(),
            replayed_frames: converted.report.replayed_frames,
            setting,
        });
    }
    let out = Console::out();
    let holds = format!(
        "{} entries, {}, checksum {:08x}",
        digest.entries,
        size(digest.bytes),
        digest.checksum
    );
    match converted.from {
        Some(from) => out.line(&format!(
            "converted from {from} to {}: {holds}, equal before and after",
            converted.to
        )),
        None => out.line(&format!(
            "no engine counted; built {} from snapshot and log: {holds}",
            converted.to
        )),
    }
    if let Some(kept) = &converted.kept {
        out.line(&format!(
            "the old engine is kept as {kept}; remove it when the server runs well"
        ));
    }
    out.line(&format!(
        "now set {setting} (or BELLWIRE__STORE__ENGINE={}): a start that chooses another engine builds that one again",
        converted.to
    ));
    Ok(())
}

fn name(step: ConvertStep) -> &'static str {
    match step {
        ConvertStep::Recover => "bringing the engine up to date",
        ConvertStep::Count => "counting entries",
        ConvertStep::Copy => "copying entries",
        ConvertStep::Verify => "comparing entries",
        ConvertStep::SetAside => "the new engine counts; setting the old one aside",
    }
}
