//! What is on disk stays readable: golden files for every record, a corpus for every parser.
//!
//! `server/golden/store/*.hex` were written by version 1 of each record. They are never changed: a change of format gets a
//! new version and new files beside them. `server/golden/store/corpus/` holds inputs for the fuzz bodies.

use std::fs;
use std::path::{Path, PathBuf};

use data_encoding::HEXLOWER;

use super::super::log::frame;
use super::super::record::{Fault, Pair, PairStored};
use super::super::write::{FrameBuilder, Write};
use super::super::*;
use super::support::*;
use crate::delivery::{Outcome, RowMeta, Summary, Urgency};
use crate::ports::{Erased, Erasure, KeyRecord, Scopes};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/store")
}

/// Compares with a golden file. With `BELLWIRE_GOLDEN=write` a file that is missing is made; none is ever changed.
pub(in crate::store) fn check(name: &str, written: &[u8]) -> Vec<u8> {
    let path = golden().join(format!("{name}.hex"));
    if !path.exists() && std::env::var("BELLWIRE_GOLDEN").is_ok_and(|word| word == "write") {
        fs::create_dir_all(golden()).unwrap();
        let mut text = String::new();
        for line in written.chunks(32) {
            text.push_str(&HEXLOWER.encode(line));
            text.push('\n');
        }
        fs::write(&path, text).unwrap();
    }
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let digits: String = text.split_whitespace().collect();
    let bytes = HEXLOWER.decode(digits.as_bytes()).unwrap();
    assert_eq!(
        HEXLOWER.encode(written),
        HEXLOWER.encode(&bytes),
        "{name}: what is written now differs from the golden file; a new format needs a new version"
    );
    bytes
}

fn written(put: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::new();
    put(&mut out);
    out
}

fn a_row() -> (RowMeta, Arc<Notification>) {
    let note = notification(ping_id(5), |note| {
        note.collapse = key("score");
        note.urgency = Urgency::High;
        note.content = (0..100u8).collect::<Vec<u8>>().into();
        note.size = 90;
    });
    (row_meta(9, &note), note)
}

#[test]
fn a_row_reads_as_it_was_written_by_version_1() {
    let (meta, note) = a_row();
    let key = keys::row(device_id(1), meta.key);
    let bytes = check(
        "row-v1",
        &written(|out| record::put_row(&key, out, 1, &note)),
    );
    let row = record::row(&key, meta.key, &bytes).unwrap();
    assert_eq!(row.meta, meta);
    let read = row.notification(None);
    assert_eq!(read.content, note.content);
    assert_eq!((read.accepted_ms, read.app), (note.accepted_ms, note.app));
    assert!(!read.transient);
}

#[test]
fn a_shared_row_and_its_body_read_as_they_were_written_by_version_1() {
    let (_, note) = a_row();
    let note = Arc::new(Notification {
        shared: true,
        ..Arc::try_unwrap(note).unwrap()
    });
    let meta = row_meta(9, &note);
    let key = keys::row(device_id(1), meta.key);
    let row = check(
        "row-shared-v1",
        &written(|out| record::put_row(&key, out, 1, &note)),
    );
    let body_key = keys::body(note.ping);
    let body = check(
        "body-v1",
        &written(|out| record::put_body(&body_key, out, &note.content)),
    );
    let row = record::row(&key, meta.key, &row).unwrap();
    let body = record::body(&body_key, &body).unwrap();
    assert_eq!(row.notification(Some(body)).content, note.content);
}

#[test]
fn small_records_read_as_they_were_written_by_version_1() {
    let summary = Summary {
        app: AppId(3),
        count: 4,
        bytes: 5_000,
        next_order: 600,
        sent_up_to: 70,
    };
    let key = keys::summary(device_id(1));
    let bytes = check(
        "summary-v1",
        &written(|out| record::put_summary(&key, out, &summary)),
    );
    assert_eq!(record::summary(&key, &bytes), Ok(summary));

    let (meta, note) = a_row();
    let key = keys::expiry(5, device_id(1), meta.key);
    let bytes = check(
        "expiry-v1",
        &written(|out| record::put_expiry(&key, out, note.ping)),
    );
    assert_eq!(record::expiry(&key, &bytes), Ok(note.ping));

    let key = keys::collapse(device_id(1), note.collapse.as_ref().unwrap(), 9);
    let bytes = check(
        "collapse-v1",
        &written(|out| record::put_collapse(&key, out, Urgency::High)),
    );
    assert_eq!(record::collapse(&key, &bytes), Ok(Urgency::High));

    let key = keys::pair(note.ping, device_id(1));
    let waiting = PairStored::Waiting {
        row: meta.key,
        expires_ms: 50_000,
    };
    let ended = PairStored::Ended {
        outcome: Outcome::Forwarded,
        at_ms: 60_000,
    };
    for (name, state) in [("pair-waiting-v1", waiting), ("pair-ended-v1", ended)] {
        let pair = Pair {
            app: AppId(3),
            state,
        };
        let bytes = check(name, &written(|out| record::put_pair(&key, out, pair)));
        assert_eq!(record::pair(&key, &bytes), Ok(pair));
    }

    let erasure = Erasure {
        app: AppId(3),
        what: Erased::Notification(note.ping, device_id(1)),
        at_ms: 70_000,
        until_ms: 80_000,
    };
    let key = keys::erasure(erasure.until_ms, erasure.what);
    let bytes = check(
        "erasure-v1",
        &written(|out| record::put_erasure(&key, out, &erasure)),
    );
    let read = record::erasure(&key, erasure.until_ms, erasure.what, &bytes);
    assert_eq!(read, Ok(erasure));

    let bytes = check(
        "number-v1",
        &written(|out| record::put_number(keys::RUN, out, 12)),
    );
    assert_eq!(record::number(keys::RUN, &bytes), Ok(12));
}

#[test]
fn registrations_read_as_they_were_written_by_version_1() {
    let device = DeviceRecord {
        name: Some("scanner 4".to_owned()),
        ..device_record(device_id(1), "ada")
    };
    let key = keys::device(device.id);
    let bytes = check(
        "device-v1",
        &written(|out| record::put_device(&key, out, &device)),
    );
    assert!(record::device(&key, device.id, &bytes) == Ok(device));

    let app = AppRecord {
        id: AppId(3),
        name: "ward".to_owned(),
        secret: [8; 32],
        created_ms: 4,
    };
    let key = keys::app(app.id);
    let bytes = check("app-v1", &written(|out| record::put_app(&key, out, &app)));
    assert!(record::app(&key, &bytes) == Ok(app));

    let api_key = KeyRecord {
        id: *b"abcdefghij",
        app: AppId(3),
        scopes: Scopes::PING.with(Scopes::READ),
        name: "nightly job".to_owned(),
        created_ms: 5,
        secret_hash: [6; 32],
    };
    let key = keys::api_key(api_key.id);
    let bytes = check(
        "api-key-v1",
        &written(|out| record::put_api_key(&key, out, &api_key)),
    );
    assert!(record::api_key(&key, &bytes) == Ok(api_key));

    let used = IdempotencyRecord {
        app: AppId(3),
        key_hash: [1; 32],
        body_hash: [2; 32],
        ping: ping_id(5),
        devices: 7,
        ttl_s: 604_800,
        at_ms: 9,
    };
    let key = keys::idempotency(used.app, used.key_hash);
    let bytes = check(
        "idempotency-v1",
        &written(|out| record::put_idempotency(&key, out, &used)),
    );
    assert_eq!(
        record::idempotency(&key, used.app, used.key_hash, &bytes),
        Ok(used)
    );
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_record_is_rot() {
    let (meta, note) = a_row();
    let key = keys::row(device_id(1), meta.key);
    let good = written(|out| record::put_row(&key, out, 1, &note));
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let fault = record::row(&key, meta.key, &bad).err();
        assert!(
            matches!(fault, Some(Fault::Rotten(_))),
            "bit {bit}: {fault:?}"
        );
    }
    for cut in 0..good.len() {
        assert!(
            record::row(&key, meta.key, &good[..cut]).is_err(),
            "cut {cut}"
        );
    }
    let elsewhere = keys::row(device_id(2), meta.key);
    assert!(
        record::row(&elsewhere, meta.key, &good).is_err(),
        "a value of another key is not believed"
    );
}

fn every_op() -> Vec<Op> {
    let (meta, note) = a_row();
    let shared = notification(ping_id(6), |note| note.shared = true);
    vec![
        register(device_id(1), "ada"),
        insert(device_id(1), 9, &note),
        insert(device_id(1), 10, &shared),
        insert(device_id(2), 1, &shared),
        remove(device_id(1), meta.key.order, &note, Outcome::Declined, 70),
        remove(device_id(2), 1, &shared, Outcome::Expired, 71),
        summary(device_id(1), 1, 5, 11),
        Op::PutDevice {
            record: device_record(device_id(1), "bob"),
            fresh: false,
            previous_user: Some("ada".to_owned()),
        },
        Op::DropDevice(device_record(device_id(1), "bob")),
        Op::DropKey(AppId(1), [1; 10]),
    ]
}

fn every_chore() -> Vec<Chore> {
    let row = a_row().0.key;
    vec![
        Chore::Run(3),
        Chore::DropReceipt {
            at_ms: 4,
            ping: ping_id(1),
            device: device_id(1),
        },
        Chore::DropIdempotency {
            at_ms: 4,
            app: AppId(1),
            key_hash: [1; 32],
            record: true,
        },
        Chore::DropRow {
            device: device_id(1),
            row,
        },
        Chore::DropExpiry {
            expires_ms: 5,
            device: device_id(1),
            row,
            ping: Some(ping_id(1)),
        },
    ]
}

fn every_write() -> FrameBuilder {
    let mut frame = FrameBuilder::new();
    every_op().iter().for_each(|op| frame.add(op).unwrap());
    every_chore()
        .iter()
        .for_each(|chore| frame.add_chore(chore).unwrap());
    frame
}

#[test]
fn a_frame_reads_as_it_was_built_and_as_version_1_wrote_it() {
    let (bytes, writes) = every_write().seal(42, 7);
    let bytes = check("frame-v1", &bytes);
    let frame::Place::Frame(found) = frame::look(&bytes, 0, 7) else {
        panic!("no frame");
    };
    assert_eq!(found.number, 42);
    let payload = bytes::Bytes::from(bytes[found.payload].to_vec());
    assert_eq!(write::decode(&payload).unwrap(), writes);
    let bodies = writes
        .iter()
        .filter(|write| matches!(write, Write::Put { key, .. } if key[0] == b'b'))
        .count();
    assert_eq!(bodies, 1, "a shared body is in a frame once");
    for cut in 1..payload.len() {
        // Any cut either falls between two writes or is seen.
        if let Ok(fewer) = write::decode(&payload.slice(..cut)) {
            assert!(writes.starts_with(&fewer));
        }
    }
}

#[test]
fn files_of_version_1_are_still_read() {
    let header = log::segment::Header {
        number: 3,
        first_frame: 400,
        salt: [5; 16],
        store: [6; 16],
    };
    let bytes = check("segment-header-v1", &header.encode());
    assert_eq!(log::segment::Header::decode(&bytes), Ok(header));
    let disk = testing::MemoryDisk::new();
    let file = disk.create("snapshots/x").unwrap();
    let snapshot = fs::read(golden().join("corpus/snapshot-whole")).unwrap();
    file.write_at(&snapshot, 0).unwrap();
    let info = snapshot::read(&disk, "snapshots/x", [1; 16], &mut |_, _| Ok(())).unwrap();
    assert_eq!((info.frame, info.made_ms, info.entries), (7, 5, 40));
}

#[test]
fn a_builder_that_goes_back_writes_what_it_would_have_written() {
    let (expected, _) = every_write().seal(1, 1);
    let mut frame = FrameBuilder::new();
    every_op().iter().for_each(|op| frame.add(op).unwrap());
    let mark = frame.mark();
    let huge = notification(ping_id(6), |note| note.content = vec![0; 90 << 10].into());
    assert!(frame.add(&insert(device_id(3), 1, &huge)).is_err());
    frame.back_to(mark);
    every_chore()
        .iter()
        .for_each(|chore| frame.add_chore(chore).unwrap());
    assert_eq!(frame.seal(1, 1).0, expected);
}

#[test]
fn what_cannot_be_a_key_is_refused() {
    let mut frame = FrameBuilder::new();
    assert!(
        frame
            .add(&register(device_id(1), &"u".repeat(256)))
            .is_err()
    );
    let mut frame = FrameBuilder::new();
    assert!(frame.add(&register(device_id(1), &"u".repeat(255))).is_ok());
}

/// A parser, as a plain function over bytes.
type Body = fn(&[u8]);

const BODIES: [(&str, Body); 5] = [
    ("backup", fuzz::backup_file),
    ("record", fuzz::records),
    ("payload", fuzz::payload),
    ("segment", fuzz::log_segment),
    ("snapshot", fuzz::snapshot_file),
];

/// Inputs that reach far into each parser. They are made here, and kept in the corpus beside what a fuzzer finds.
fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let (meta, note) = a_row();
    let key = keys::row(device_id(1), meta.key);
    let row = written(|out| record::put_row(&key, out, 1, &note));
    // Without version and checksum: the fuzz body adds its own.
    let body = row[1..row.len() - 4].to_vec();
    let (frame, _) = every_write().seal(1, 0);
    let mut segment = frame.to_vec();
    segment.extend_from_slice(&every_write().seal(2, 0).0);
    let mut rotten = segment.clone();
    rotten[40] ^= 1;
    let torn = segment[..segment.len() - 9].to_vec();
    let payload = frame[frame::HEADER..].to_vec();
    let engine = engine::memory::MemoryEngine::new();
    let entries: Vec<engine::EngineWrite> = (0..40u8)
        .map(|n| engine::EngineWrite {
            key: vec![b'e', n].into(),
            value: Some(bytes::Bytes::new()),
        })
        .collect();
    engine.apply(&entries, Some(7)).unwrap();
    let disk = testing::MemoryDisk::new();
    snapshot::take(
        &engine,
        &snapshot::Surroundings {
            disk: &disk,
            store: [1; 16],
            now_ms: 5,
            aside: &SetAside::new(Arc::new(disk.clone()), 1),
            breathe: &|| std::ops::ControlFlow::Continue(()),
        },
    )
    .unwrap();
    let file = disk.open(&snapshot::name(7)).unwrap();
    let mut snapshot = vec![0; file.length().unwrap() as usize];
    file.read_at(&mut snapshot, 0).unwrap();
    let cut = snapshot[..snapshot.len() - 5].to_vec();
    vec![
        ("record-row", body),
        ("record-sealed", row),
        ("payload-every-write", payload),
        ("segment-two-frames", segment),
        ("segment-rotten", rotten),
        ("segment-torn", torn),
        ("snapshot-whole", snapshot),
        ("snapshot-cut", cut),
        ("backup-whole", super::backups::a_backup()),
    ]
}

#[test]
fn no_parser_panics_on_the_corpus_or_on_what_is_near_it() {
    let dir = golden().join("corpus");
    if std::env::var("BELLWIRE_GOLDEN").is_ok_and(|word| word == "write") {
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in seeds() {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    let mut inputs = seeds();
    for entry in fs::read_dir(dir).expect("the corpus is committed") {
        inputs.push(("", fs::read(entry.unwrap().path()).unwrap()));
    }
    assert!(inputs.len() > seeds().len());
    for (_, input) in &inputs {
        for (_, body) in BODIES {
            body(input);
            for cut in (0..input.len()).step_by(7) {
                body(&input[..cut]);
            }
            for at in (0..input.len()).step_by(3) {
                for value in [0, 0xff, input[at] ^ 0x10] {
                    let mut near = input.clone();
                    near[at] = value;
                    body(&near);
                }
            }
        }
    }
}
