//! The store as a process of its own: killed at random moments, and watched at its system calls.
//!
//! The tests start this very binary again with [`CHILD`] in its environment; the test [`child`] then plays the part that it
//! names, and does nothing when it is run like any other.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use bellwire_server::delivery::{
    AppId, Change, DeviceId, Hold, MailboxRead, Notification, Outcome, PingId, RowKey, RowMeta,
    Summary, Urgency, WireSlot,
};
use bellwire_server::ports::{DeviceRecord, Op, Store};
use bellwire_server::store::testing::{ManualClock, SeededEntropy};
use bellwire_server::store::{EngineKind, Opened, StoreSettings, open};

/// Names the part that the child plays, and the directory of its store.
const CHILD: &str = "BELLWIRE_STORE_CHILD";

/// How long a test waits for its child.
const PATIENCE: Duration = Duration::from_secs(60);

/// Rounds of killing in an ordinary run; `BELLWIRE_STORE_KILLS` asks for more.
const KILLS: u64 = 25;

fn open_store(dir: &Path, engine: EngineKind, seed: u64) -> Opened {
    let settings = StoreSettings {
        engine,
        // Small, so that segments change and snapshots are taken while the killing goes on.
        segment_bytes: 64 << 10,
        snapshot_bytes: 128 << 10,
        memory_bytes: 32 << 20,
        reserve_bytes: 0,
        ..StoreSettings::new(dir)
    };
    open(
        &settings,
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(seed)),
    )
    .unwrap()
}

/// Rows of a wave: they come, and then they go.
const WAVE: u64 = 1_000;
const WAVES: u64 = 30;

/// Waves after which caches, tables and heaps have the size that they keep.
const SETTLED: u64 = 6;

/// How much the resident memory may grow in all later waves, bytes: about 2.4 KiB a row. Seen were 10 MiB up and down on
/// sled and 14 MiB on fjall.
const GROWTH_MAX: u64 = 56 << 20;

fn device() -> DeviceId {
    DeviceId([7; 16])
}

fn ping(order: u64) -> PingId {
    let mut id = [9; 16];
    id[..8].copy_from_slice(&order.to_be_bytes());
    PingId(id)
}

fn insert(order: u64) -> Vec<Op> {
    let notification = Arc::new(Notification {
        ping: ping(order),
        app: AppId::DEFAULT,
        accepted_ms: 1,
        expires_ms: u64::MAX,
        urgency: Urgency::Normal,
        collapse: None,
        size: 400,
        transient: false,
        shared: false,
        content: vec![order as u8; 400].into(),
        wire: WireSlot::default(),
        hold: Hold::default(),
    });
    let device = device();
    vec![
        Op::Mailbox(Change::Insert {
            device,
            order,
            run: 1,
            notification,
        }),
        Op::Mailbox(Change::Summary {
            device,
            summary: Summary {
                next_order: order + 1,
                count: order as u32,
                ..Summary::new(AppId::DEFAULT)
            },
        }),
    ]
}

fn remove(order: u64) -> Op {
    Op::Mailbox(Change::Remove {
        app: AppId::DEFAULT,
        device: device(),
        row: RowMeta {
            key: RowKey {
                urgency: Urgency::Normal,
                order,
            },
            ping: ping(order),
            size: 400,
            expires_ms: u64::MAX,
            collapse: None,
            run: 1,
            shared: false,
        },
        outcome: Outcome::Acknowledged,
        at_ms: 2,
    })
}

fn register() -> Vec<Op> {
    vec![Op::PutDevice {
        record: DeviceRecord {
            id: device(),
            app: AppId::DEFAULT,
            user: "ada".to_owned(),
            name: None,
            created_ms: 1,
            secret_hash: [0; 32],
            previous_secrets: Vec::new(),
        },
        fresh: true,
        previous_user: None,
    }]
}

fn commit(store: &dyn Store, batch: Vec<Op>) {
    let (sender, receiver) = mpsc::channel();
    store.commit(
        batch,
        Box::new(move |verdict| sender.send(verdict).unwrap()),
    );
    receiver.recv().unwrap().unwrap();
}

/// What the store says of the device: the order of the next row, and the orders of all rows.
fn rows(store: &dyn Store) -> (u64, Vec<u64>) {
    let view = store
        .read_mailbox(&MailboxRead {
            device: device(),
            all: true,
            ping: None,
            collapse: None,
            lowest: None,
            rows: Vec::new(),
            withdrawals: false,
        })
        .unwrap();
    let keys: Vec<_> = view.rows.iter().map(|row| row.key).collect();
    for (key, body) in store.read_bodies(device(), &keys).unwrap() {
        let note = body.expect("every row has its body");
        assert_eq!(note.content, vec![key.order as u8; 400]);
    }
    let next = view.summary.map_or(0, |summary| summary.next_order);
    (next, keys.iter().map(|key| key.order).collect())
}

/// Says a line to the parent, in one write.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    out.write_all(format!("{line}\n").as_bytes()).unwrap();
    out.flush().unwrap();
}

#[test]
fn child() {
    let Ok(part) = std::env::var(CHILD) else {
        return;
    };
    let (part, dir) = part.split_once(':').unwrap();
    if let Some(engine) = part.strip_prefix("waves on ") {
        waves(Path::new(dir), engine);
        return;
    }
    let (engine, seed) = match part {
        "memory" => (EngineKind::Memory, 1),
        "fjall" => (EngineKind::Fjall, u64::from(std::process::id())),
        _ => (EngineKind::Sled, u64::from(std::process::id())),
    };
    let opened = open_store(Path::new(dir), engine, seed);
    let store = &*opened.store;
    let (mut next, _) = rows(store);
    if next == 0 {
        commit(store, register());
        next = 1;
    }
    say("open");
    let last = if part == "few" { next + 20 } else { u64::MAX };
    while next < last {
        commit(store, insert(next));
        say(&format!("safe {next}"));
        next += 1;
    }
    say("done");
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.unwrap().trim().trim_end_matches("kB").trim();
    kib.parse::<u64>().unwrap() << 10
}

/// Rows come and go, wave after wave, and after each wave it says how much memory that took.
fn waves(dir: &Path, engine: &str) {
    let settings = StoreSettings {
        engine: match engine {
            "sled" => EngineKind::Sled,
            _ => EngineKind::Fjall,
        },
        segment_bytes: 1 << 20,
        snapshot_bytes: 8 << 20,
        memory_bytes: 32 << 20,
        reserve_bytes: 0,
        ..StoreSettings::new(dir)
    };
    let opened = open(
        &settings,
        Arc::new(ManualClock::new(1_700_000_000_000)),
        Arc::new(SeededEntropy::new(1)),
    )
    .unwrap();
    let store = &*opened.store;
    commit(store, register());
    for wave in 0..WAVES {
        let orders: Vec<u64> = (wave * WAVE + 1..=(wave + 1) * WAVE).collect();
        for some in orders.chunks(250) {
            commit(
                store,
                some.iter().flat_map(|order| insert(*order)).collect(),
            );
        }
        for some in orders.chunks(250) {
            commit(store, some.iter().map(|order| remove(*order)).collect());
        }
        while store.drop_receipts(u64::MAX, 1_000).unwrap() > 0 {}
        while store.stats().lag_bytes > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        say(&format!("safe {}", resident()));
    }
}

#[test]
fn memory_follows_what_lives_and_not_what_came_by() {
    for engine in ["sled", "fjall"] {
        let dir = tempfile::tempdir().unwrap();
        let mut child = spawn(&format!("waves on {engine}"), dir.path(), None);
        let lines = lines(&mut child);
        let sizes: Vec<u64> = (0..WAVES)
            .map(|_| {
                loop {
                    let line = lines.recv_timeout(PATIENCE).expect("the child goes on");
                    if let Some(resident) = safe(&line) {
                        break resident;
                    }
                }
            })
            .collect();
        assert!(child.wait().unwrap().success());
        let settled = sizes[SETTLED as usize];
        let last = sizes[sizes.len() - 1];
        assert!(last <= settled + GROWTH_MAX, "{engine}: {sizes:?}");
    }
}

fn spawn(part: &str, dir: &Path, wrap: Option<Command>) -> Child {
    let me = std::env::current_exe().unwrap();
    let mut command = match wrap {
        Some(mut wrap) => {
            wrap.arg(me);
            wrap
        }
        None => Command::new(me),
    };
    command
        .args(["--exact", "child", "--nocapture", "--test-threads", "1"])
        .env(CHILD, format!("{part}:{}", dir.display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

/// The lines of a child, as they come.
fn lines(child: &mut Child) -> mpsc::Receiver<String> {
    let out = BufReader::new(child.stdout.take().unwrap());
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in out.lines() {
            let Ok(line) = line else { break };
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

/// The number in `safe 17`, wherever the test harness put something before it.
fn safe(line: &str) -> Option<u64> {
    let (_, number) = line.rsplit_once("safe ")?;
    number.parse().ok()
}

fn killed_at_random_moments(part: &str, engine: EngineKind) {
    let rounds = std::env::var("BELLWIRE_STORE_KILLS")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(KILLS);
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("data");
    let mut promised = 0;
    for round in 0..rounds {
        let mut child = spawn(part, &dir, None);
        let lines = lines(&mut child);
        // The moment is a number of answers that differs from round to round; where the committer, the applier and
        // the keeper stand by then is left to chance.
        let answers = 1 + (round * 37) % 90;
        let mut heard = 0;
        while heard < answers {
            let line = lines.recv_timeout(PATIENCE).expect("the child goes on");
            if let Some(order) = safe(&line) {
                promised = order;
                heard += 1;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();
        // What it managed to say before it died counts as well.
        for line in lines.iter() {
            promised = safe(&line).unwrap_or(promised);
        }
        if round % 5 == 4 {
            let opened = open_store(&dir, engine, round);
            assert_eq!(
                opened.report.rebuilt, None,
                "a kill does not harm the engine"
            );
            assert_eq!(opened.report.set_aside, [""; 0]);
            let (next, orders) = rows(&*opened.store);
            assert!(next > promised, "promised {promised}, found before {next}");
            assert!(
                orders.iter().copied().eq(1..next),
                "all of them, once, in order"
            );
        }
    }
    let opened = open_store(&dir, engine, 0);
    let (next, orders) = rows(&*opened.store);
    assert!(next > promised && orders.iter().copied().eq(1..next));
}

#[test]
fn whatever_was_promised_survives_kill_9_on_sled() {
    killed_at_random_moments("sled", EngineKind::Sled);
}

#[test]
fn whatever_was_promised_survives_kill_9_on_fjall() {
    killed_at_random_moments("fjall", EngineKind::Fjall);
}

#[test]
fn whatever_was_promised_survives_kill_9_on_memory() {
    killed_at_random_moments("memory", EngineKind::Memory);
}

#[test]
fn a_second_process_is_refused_and_told_who_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn("memory", dir.path(), None);
    let lines = lines(&mut child);
    while !lines.recv_timeout(PATIENCE).unwrap().ends_with("open") {}
    let refused = open(
        &StoreSettings::new(dir.path()),
        Arc::new(ManualClock::new(0)),
        Arc::new(SeededEntropy::new(0)),
    );
    let pid = child.id();
    child.kill().unwrap();
    child.wait().unwrap();
    let message = refused.err().expect("only one process").to_string();
    assert!(message.contains(&format!("by process {pid}")), "{message}");
    drop(open_store(dir.path(), EngineKind::Memory, 1));
}

/// What a trace says about one thread's call.
#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// A write to a log segment ended well.
    Wrote,
    /// A sync of a log segment ended well.
    Synced,
    /// A sync of a log segment did not.
    SyncFailed,
    /// An answer is about to leave the process.
    Answers(u64),
}

/// Reads a trace line by line. Calls of other threads may come between the beginning and the end of one; a write of
/// an answer counts from its beginning, everything else from its end.
fn calls(trace: &str) -> Vec<Call> {
    let mut begun: std::collections::HashMap<&str, &str> = std::collections::HashMap::new();
    let mut calls = Vec::new();
    for line in trace.lines() {
        let Some((thread, rest)) = line.split_once(' ') else {
            continue;
        };
        let rest = rest.trim_start();
        if rest.starts_with("write(1<") || rest.starts_with("write(1,") {
            // strace shows the end of the line as the two characters `\n`.
            let text = rest.split('"').nth(1).unwrap_or_default();
            if let Some(order) = safe(text.trim_end_matches("\\n")) {
                calls.push(Call::Answers(order));
            }
        }
        let (call, result) = if rest.ends_with("<unfinished ...>") {
            begun.insert(thread, rest);
            continue;
        } else if rest.starts_with("<... ") {
            match begun.remove(thread) {
                Some(begin) => (begin, rest),
                None => continue,
            }
        } else {
            (rest, rest)
        };
        if !call.contains(".seg>") {
            continue;
        }
        let result = result.rsplit_once("= ").map_or("", |(_, result)| result);
        if call.starts_with("fdatasync(") || call.starts_with("fsync(") {
            calls.push(if result.starts_with('0') {
                Call::Synced
            } else {
                Call::SyncFailed
            });
        } else if call.starts_with("pwrite64(") || call.starts_with("write(") {
            calls.push(Call::Wrote);
        }
    }
    calls
}

#[test]
fn every_answer_leaves_after_the_log_was_written_and_synced() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("trace");
    let mut strace = Command::new("strace");
    strace
        .args([
            "-f",
            "-y",
            "-s",
            "64",
            "-e",
            "trace=fdatasync,fsync,write,pwrite64",
            "-o",
        ])
        .arg(&trace);
    assert!(
        Command::new("strace").arg("-V").output().is_ok(),
        "this test needs `strace` (Debian: apt-get install strace): without it nothing proves that a sync precedes \
         each answer"
    );
    let mut child = spawn("few", &dir.path().join("data"), Some(strace));
    let out: Vec<String> = lines(&mut child).iter().collect();
    assert!(child.wait().unwrap().success(), "{out:#?}");
    let trace = std::fs::read_to_string(trace).unwrap();
    let calls = calls(&trace);
    let (mut wrote, mut synced, mut answers) = (0, 0, 0);
    let mut unsynced = 0;
    for call in &calls {
        match call {
            Call::Wrote => {
                wrote += 1;
                unsynced += 1;
            }
            Call::Synced => {
                synced += 1;
                unsynced = 0;
            }
            Call::SyncFailed => panic!("a sync failed"),
            Call::Answers(order) => {
                answers += 1;
                assert_eq!(*order, answers, "one answer for each, in order");
                assert_eq!(unsynced, 0, "answer {order} left before a sync:\n{trace}");
                // Each answer has a write and a sync of its own behind it, besides those that the start needs:
                // the first frame of the run and the registration.
                assert!(wrote >= answers + 2, "answer {order}, {wrote} writes");
                assert!(synced >= answers + 2, "answer {order}, {synced} syncs");
            }
        }
    }
    assert_eq!(answers, 20, "{out:#?}");
}

#[test]
fn the_reader_of_traces_sees_an_answer_that_came_too_early() {
    let trace = "\
        7 pwrite64(5</d/log/0000000001.seg>, \"x\", 1, 64 <unfinished ...>\n\
        8 write(1<pipe:[1]>, \"safe 1\\n\", 7) = 7\n\
        7 <... pwrite64 resumed>) = 1\n\
        7 fdatasync(5</d/log/0000000001.seg>) = 0\n\
        7 fdatasync(6</d/log/next.tmp>) = 0\n\
        7 fdatasync(5</d/log/0000000001.seg>) = -1 EIO (Input/output error)\n";
    assert_eq!(
        calls(trace),
        [
            Call::Answers(1),
            Call::Wrote,
            Call::Synced,
            Call::SyncFailed
        ]
    );
}
