//! What is on disk stays readable: golden files for every record, a corpus for every parser.
//!
//! The files of `server/golden/store/` were written by the version that their name ends with. They are never changed: a change
//! of format gets a new version and new files beside them (`docs/decisions/0019`). `data-directory-v1.txt` is a whole data
//! directory. `server/golden/store/corpus/` holds inputs for the fuzz bodies.

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use data_encoding::HEXLOWER;

use super::super::examine::verify;
use super::super::log::frame;
use super::super::record::{Fault, Pair, PairStored};
use super::super::write::{FrameBuilder, Write};
use super::super::*;
use super::examining::{DEVICE, acknowledge, acknowledge_at, note, post, remembered, waiting};
use super::files::{Shop, files, settle};
use super::support::*;
use crate::delivery::{Outcome, RowMeta, Summary, Urgency};
use crate::ports::{
    Audience, CallbackRecord, Carrier, DeadLetter, Erased, Erasure, ExpansionProgress,
    ExpansionRecord, Failing, KeyRecord, Membership, OutcomePosition, PreviousSecret, Scopes, Seen,
    SigningSecret, Span, Spans, Stamp, TopicChange,
};

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

/// What an earlier program wrote.
fn kept(name: &str) -> Vec<u8> {
    let path = golden().join(format!("{name}.hex"));
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let digits: String = text.split_whitespace().collect();
    HEXLOWER.decode(digits.as_bytes()).unwrap()
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

    let key = keys::withdrawal(device_id(1), note.ping);
    let bytes = check(
        "withdrawal-v1",
        &written(|out| record::put_withdrawal(&key, out, AppId(3), 90_000)),
    );
    assert_eq!(record::withdrawal(&key, &bytes), Ok((AppId(3), 90_000)));

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
    assert!(record::device(&key, device.id, &kept("device-v1")) == Ok(device));

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

    let callback = CallbackRecord {
        app: AppId(3),
        url: "https://hooks.example.com/bellwire".to_owned(),
        outcomes: vec![Outcome::Expired, Outcome::Declined],
        secrets: vec![
            SigningSecret {
                key: vec![7; 32],
                until_ms: None,
            },
            SigningSecret {
                key: vec![8; 24],
                until_ms: Some(11),
            },
        ],
        created_ms: 5,
        position: OutcomePosition(6),
        sending: Some(OutcomePosition(7)),
        failing: Some(Failing {
            since_ms: 8,
            tries: 9,
            why: "it answered 503".to_owned(),
        }),
        gone_ms: None,
        next_letter: 10,
    };
    let key = keys::callback(callback.app);
    let bytes = check(
        "callback-v1",
        &written(|out| record::put_callback(&key, out, &callback)),
    );
    assert!(record::callback(&key, &bytes) == Ok(callback));

    let letter = DeadLetter {
        app: AppId(3),
        number: 4,
        id: "msg_0f1e".to_owned(),
        body: Bytes::from_static(b"{}"),
        events: 5,
        tries: 6,
        since_ms: 7,
        at_ms: 8,
        why: "it answered 400".to_owned(),
    };
    let key = keys::dead_letter(letter.app, letter.number);
    let bytes = check(
        "dead-letter-v1",
        &written(|out| record::put_dead_letter(&key, out, &letter)),
    );
    assert!(record::dead_letter(&key, letter.app, letter.number, &bytes) == Ok(letter));

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
fn a_device_and_when_it_was_seen_read_as_they_were_written() {
    let rotated = PreviousSecret {
        hash: [4; 32],
        until_ms: 86_400_007,
    };
    let devices = [vec![], vec![rotated]].map(|previous_secrets| DeviceRecord {
        name: Some("scanner 4".to_owned()),
        previous_secrets,
        ..device_record(device_id(1), "ada")
    });
    let key = keys::device(device_id(1));
    let records = devices
        .each_ref()
        .map(|device| written(|out| record::put_device(&key, out, device)));
    // One after the other in one file.
    let bytes = check("device-v2", &records.concat());
    let (plain, with_two_secrets) = bytes.split_at(records[0].len());
    for (bytes, device) in [plain, with_two_secrets].into_iter().zip(devices) {
        assert!(record::device(&key, device.id, bytes) == Ok(device));
    }

    let key = keys::seen(device_id(1));
    for (name, carrier, agent) in [
        ("seen-v1", Carrier::Quic, Some("scanner/2.1 (linux)".into())),
        ("seen-silent-v1", Carrier::WebSocket, None),
    ] {
        let seen = Seen {
            at_ms: 60_000,
            carrier,
            agent,
        };
        let bytes = check(name, &written(|out| record::put_seen(&key, out, &seen)));
        assert_eq!(record::seen(&key, &bytes), Ok(seen));
    }
}

#[test]
fn a_version_is_newer_or_not_by_what_its_kind_has_had() {
    let sealed = |key: &[u8], version: u8| {
        let mut value = vec![version, 0, 0];
        let sum = crc32c::crc32c_append(crc32c::crc32c(key), &value);
        value.extend_from_slice(&sum.to_le_bytes());
        record::verify(key, &value)
    };
    let device = keys::device(device_id(1));
    let summary = keys::summary(device_id(1));
    assert_eq!(sealed(&device, 2), Ok(()));
    assert_eq!(sealed(&device, 3), Err(Fault::Newer(3)));
    assert_eq!(sealed(&summary, 2), Err(Fault::Newer(2)));
    assert!(matches!(sealed(&device, 0), Err(Fault::Rotten(_))));
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
        Op::PutSeen(
            device_id(1),
            Seen {
                at_ms: 60_000,
                carrier: Carrier::Quic,
                agent: None,
            },
        ),
        Op::DropDevice(device_record(device_id(1), "bob")),
        Op::DropKey(AppId(1), [1; 10]),
    ]
    .into_iter()
    .chain(audience_ops())
    .collect()
}

const STAMP: Stamp = Stamp { run: 3, count: 300 };

fn an_expansion() -> ExpansionRecord {
    ExpansionRecord {
        stamp: STAMP,
        audience: Audience::Topic("ward/3".to_owned()),
        estimate: 1_200,
        notification: notification(ping_id(8), |note| note.shared = true),
    }
}

fn a_change() -> TopicChange {
    let span = |left| Span {
        joined: Stamp { run: 1, count: 5 },
        left,
    };
    TopicChange {
        app: AppId(1),
        device: device_id(1),
        topics: vec![Membership {
            topic: "news".to_owned(),
            joined: STAMP,
        }],
        places: vec![
            ("news".to_owned(), Spans::from_buf([span(None)])),
            ("ward/3".to_owned(), Spans::from_buf([span(Some(STAMP))])),
            ("old".to_owned(), Spans::new()),
        ],
    }
}

const PROGRESS: ExpansionProgress = ExpansionProgress {
    done: Some(DeviceId([7; 16])),
    devices: 1_000,
    unknown: 2,
    chunk: 1,
};

fn audience_ops() -> Vec<Op> {
    let (app, stamp) = (AppId(1), STAMP);
    vec![
        Op::PutJoined(app, device_id(1), stamp),
        Op::PutTopics(a_change()),
        Op::PutExpansion(an_expansion()),
        Op::PutChunk {
            app,
            stamp,
            number: 1,
            devices: [device_id(1), device_id(2)].into(),
        },
        Op::PutProgress {
            app,
            stamp,
            progress: PROGRESS,
            done: 0..1,
        },
        Op::DropExpansion {
            app,
            stamp,
            chunks: 1..2,
        },
    ]
}

#[test]
fn topics_and_expansions_read_as_they_were_written_by_version_1() {
    let (app, device) = (AppId(1), device_id(1));
    let key = keys::app_device(app, device);
    let bytes = check(
        "joined-v1",
        &written(|out| record::put_joined(&key, out, STAMP)),
    );
    assert_eq!(record::joined(&key, &bytes), Ok(STAMP));
    assert_eq!(
        record::joined(&key, &[]),
        Ok(Stamp::FIRST),
        "as it was before"
    );

    let change = a_change();
    let key = keys::topics(device);
    let bytes = check(
        "topics-v1",
        &written(|out| record::put_topics(&key, out, app, &change.topics)),
    );
    assert_eq!(record::topics(&key, &bytes), Ok((app, change.topics)));

    let (topic, spans) = &change.places[1];
    let key = keys::member(app, topic, device);
    let bytes = check(
        "spans-v1",
        &written(|out| record::put_spans(&key, out, spans)),
    );
    assert_eq!(record::spans(&key, &bytes).as_ref(), Ok(spans));

    let key = keys::expansion_part(app, STAMP, keys::Part::Head);
    for (name, audience) in [
        ("expansion-topic-v1", Audience::Topic("ward/3".to_owned())),
        ("expansion-everyone-v1", Audience::Everyone),
        (
            "expansion-listed-v1",
            Audience::Listed {
                chunks: 2,
                devices: 1_001,
            },
        ),
    ] {
        let expansion = ExpansionRecord {
            audience,
            ..an_expansion()
        };
        let bytes = check(
            name,
            &written(|out| record::put_expansion(&key, out, &expansion)),
        );
        let read = record::expansion(&key, app, STAMP, &bytes).unwrap();
        assert_eq!(
            (read.audience, read.estimate),
            (expansion.audience, expansion.estimate)
        );
        let (read, note) = (read.notification, expansion.notification);
        assert_eq!(
            (read.ping, &read.content, read.urgency, &read.collapse),
            (note.ping, &note.content, note.urgency, &note.collapse)
        );
        assert_eq!(
            (read.accepted_ms, read.expires_ms, read.size, read.shared),
            (note.accepted_ms, note.expires_ms, note.size, true)
        );
    }

    let key = keys::expansion_part(app, STAMP, keys::Part::Progress);
    let bytes = check(
        "progress-v1",
        &written(|out| record::put_progress(&key, out, &PROGRESS)),
    );
    assert_eq!(record::progress(&key, &bytes), Ok(PROGRESS));

    let devices = [device_id(1), device_id(2)];
    let key = keys::expansion_part(app, STAMP, keys::Part::Chunk(1));
    let bytes = check(
        "chunk-v1",
        &written(|out| record::put_chunk(&key, out, &devices)),
    );
    assert_eq!(record::chunk(&key, &bytes).as_deref(), Ok(&devices[..]));
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
    let bytes = check("frame-audiences-v1", &bytes);
    let frame::Place::Frame(found) = frame::look(&bytes, 0, 7) else {
        panic!("no frame");
    };
    assert_eq!(found.number, 42);
    let payload = Bytes::from(bytes[found.payload].to_vec());
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
fn frames_of_earlier_programs_are_still_read() {
    for name in ["frame-v1", "frame-two-secrets-v1"] {
        users_of(&kept(name));
    }
}

fn users_of(bytes: &[u8]) {
    let frame::Place::Frame(found) = frame::look(bytes, 0, 7) else {
        panic!("no frame");
    };
    let payload = Bytes::from(bytes[found.payload].to_vec());
    let device = keys::device(device_id(1));
    let users: Vec<String> = write::decode(&payload)
        .unwrap()
        .into_iter()
        .filter_map(|write| {
            if let Write::Put { key, value } = write
                && *key == *device
            {
                record::device(&key, device_id(1), &value).ok()
            } else {
                None
            }
        })
        .map(|device| device.user)
        .collect();
    assert_eq!(users, ["ada", "bob"]);
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
    let bytes = check("snapshot-v1", &a_snapshot());
    disk.make_dir("snapshots").unwrap();
    put(&disk, "snapshots/x", &bytes);
    let info = snapshot::read(&disk, "snapshots/x", [1; 16], &mut |_, _| Ok(())).unwrap();
    assert_eq!((info.frame, info.made_ms, info.entries), (7, 5, 40));
}

#[test]
fn small_files_of_version_1_are_still_read() {
    let disk = testing::MemoryDisk::new();
    for (name, begun) in [("format-v1", false), ("format-begun-v1", true)] {
        write_identity(&disk, [0xab; 16], begun).unwrap();
        let bytes = check(name, &taken(&disk, "format"));
        put(&disk, "format", &bytes);
        let read = identity::read_identity(&disk, Path::new(""))
            .unwrap()
            .unwrap();
        assert_eq!((read.store, read.begun), ([0xab; 16], begun));
    }

    let pointer = home::pointer_text("fjall.3", &["sled", "sled.2"]);
    let bytes = check("engine-v1", pointer.as_bytes());
    put(&disk, "engine", &bytes);
    assert_eq!(home::named(&disk).as_deref(), Some("fjall.3"));

    set_aside::write_note(&disk, "20261121T085913Z", 41, &["what happened".to_owned()]).unwrap();
    let bytes = check("note-v1", &taken(&disk, "set-aside/20261121T085913Z.txt"));
    let text = String::from_utf8(bytes).unwrap();
    assert_eq!(set_aside::cut_of(&text), Some(41));

    let erasures = [
        Erasure {
            app: AppId(3),
            what: Erased::Notification(ping_id(5), device_id(1)),
            at_ms: 70_000,
            until_ms: 80_000,
        },
        Erasure {
            app: AppId(3),
            what: Erased::Device(device_id(2)),
            at_ms: 71_000,
            until_ms: 81_000,
        },
    ];
    let file = backup::erasures::file_of(&erasures);
    let bytes = check("erasures-v1", &file);
    put(&disk, "erasures", &bytes);
    let mut read = Vec::new();
    let held = backup::erasures::read(&*disk.open("erasures").unwrap(), &mut |erasure| {
        read.push(erasure);
    });
    assert_eq!((held.unwrap().damaged, read.as_slice()), (0, &erasures[..]));
}

#[test]
fn a_mark_of_use_of_version_1_is_understood() {
    let shop = Shop::lived(EngineKind::Sled, 9);
    let (house, _) = shop.open();
    let mark = shop.data().join("sled.in-use");
    let now = fs::read_to_string(&mark).unwrap();
    drop(house);
    // Which boot it was differs; how it is said does not.
    let other = "3f9f2d1c-6f5e-4a53-9a0f-1c2d3e4f5a6b\n";
    assert_eq!(now.len(), other.len());
    let bytes = check("in-use-v1", other.as_bytes());
    fs::write(&mark, bytes).unwrap();
    let (house, report) = shop.open();
    assert!(report.rebuilt.unwrap().why.contains("machine went down"));
    shop.check(&house);
}

fn taken(disk: &dyn Disk, name: &str) -> Vec<u8> {
    let file = disk.open(name).unwrap();
    let mut bytes = vec![0; file.length().unwrap() as usize];
    file.read_at(&mut bytes, 0).unwrap();
    bytes
}

fn put(disk: &dyn Disk, name: &str, bytes: &[u8]) {
    let file = disk.create(name).unwrap();
    file.write_at(bytes, 0).unwrap();
}

// ---- A whole data directory ----------------------------------------------------------------------------------------

/// When the golden directory was made, as its store was told.
const MADE_MS: u64 = 1_700_000_000_000;

/// A directory as text: each file's name and length, and what is not zero in it, 32 bytes a line.
fn as_text(dir: &Path) -> String {
    use std::fmt::Write as _;
    let mut dirs = vec![dir.to_owned()];
    let mut names = Vec::new();
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else {
                names.push(path);
            }
        }
    }
    names.sort();
    let mut text = String::new();
    for path in names {
        let bytes = fs::read(&path).unwrap();
        let name = path.strip_prefix(dir).unwrap().display();
        writeln!(text, "file {name} {}", bytes.len()).unwrap();
        for (line, piece) in bytes.chunks(32).enumerate() {
            if piece.iter().any(|byte| *byte != 0) {
                writeln!(text, "{:08x} {}", line * 32, HEXLOWER.encode(piece)).unwrap();
            }
        }
    }
    text
}

/// The directory that a text describes.
pub(super) fn from_text(text: &str, dir: &Path) {
    let mut at: Option<(PathBuf, Vec<u8>)> = None;
    let flush = |at: Option<(PathBuf, Vec<u8>)>| {
        if let Some((path, bytes)) = at {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    };
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("file ") {
            flush(at.take());
            let (name, length) = rest.rsplit_once(' ').unwrap();
            at = Some((dir.join(name), vec![0; length.parse().unwrap()]));
        } else {
            let (offset, digits) = line.split_once(' ').unwrap();
            let offset = usize::from_str_radix(offset, 16).unwrap();
            let piece = HEXLOWER.decode(digits.as_bytes()).unwrap();
            let (_, bytes) = at.as_mut().unwrap();
            bytes[offset..offset + piece.len()].copy_from_slice(&piece);
        }
    }
    flush(at);
}

/// A short life with a bit of everything: registrations, notifications that wait and that ended, a shared one, snapshots, an
/// engine that took another's place, several segments, an outcome.
fn make_a_directory() -> String {
    let shop = Shop::new(EngineKind::Sled, 1);
    let (house, _) = shop.open();
    let app = AppRecord {
        id: AppId::DEFAULT,
        name: "ward".to_owned(),
        secret: [8; 32],
        created_ms: 4,
    };
    let mut batch = vec![Op::PutApp(app), Op::PutKey(a_key())];
    batch.extend([1, 2].map(|n| register(device_id(n), "ada")));
    commit(&house, batch).unwrap();
    post(&house, 1..=20);
    acknowledge(&house, 3);
    settle(&house);
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    post(&house, 21..=30);
    acknowledge_at(&house, 22, MADE_MS - 1_000);
    let shared = notification(ping_id(900), |note| {
        note.shared = true;
        note.expires_ms = MADE_MS * 2;
    });
    commit(
        &house,
        vec![
            insert(device_id(2), 1, &shared),
            summary(device_id(2), 1, 5, 2),
        ],
    )
    .unwrap();
    settle(&house);
    house.keeper.rebuild().unwrap();
    assert!(house.keeper.take_snapshot().unwrap().is_some());
    post(&house, 31..=40);
    drop(house);
    // Once more: a run of its own, and what was replaced is removed.
    let (house, _) = shop.open();
    post(&house, 41..=42);
    remembered(&house, 22);
    drop(house);
    assert_eq!(files(&shop.data().join("snapshots"), ".snap").len(), 2);
    assert_eq!(files(&shop.data().join("outcomes"), ".out").len(), 1);
    for name in ["lock", "log/next.tmp"] {
        // Not there, or of no meaning.
        drop(fs::remove_file(shop.data().join(name)));
    }
    as_text(&shop.data())
}

fn a_key() -> KeyRecord {
    KeyRecord {
        id: *b"abcdefghij",
        app: AppId::DEFAULT,
        scopes: Scopes::PING.with(Scopes::READ),
        name: "nightly job".to_owned(),
        created_ms: 5,
        secret_hash: [6; 32],
    }
}

#[test]
fn a_whole_data_directory_of_version_1_starts_and_holds_what_it_held() {
    let path = golden().join("data-directory-v1.txt");
    if !path.exists() && std::env::var("BELLWIRE_GOLDEN").is_ok_and(|word| word == "write") {
        fs::write(&path, make_a_directory()).unwrap();
    }
    let text = fs::read_to_string(&path).unwrap();
    // With its own engine, without it, and with each of the others: snapshot and log are read too.
    for (engine, keep_engine) in [
        (EngineKind::Sled, true),
        (EngineKind::Sled, false),
        (EngineKind::Fjall, true),
        (EngineKind::Memory, true),
    ] {
        let mut shop = Shop::new(EngineKind::Sled, 1);
        from_text(&text, &shop.data());
        assert_eq!(shop.engine_dir(), shop.data().join("sled.2"));
        if !keep_engine {
            shop.without_engine();
        }
        shop.engine = engine;
        let (house, report) = shop.open();
        assert_eq!(report.set_aside, [""; 0]);
        let expected: Vec<u64> = (1..=42).filter(|n| ![3, 22].contains(n)).collect();
        assert_eq!(waiting(&house), expected, "{engine:?}");
        let second = house.read_mailbox(&everything(device_id(2))).unwrap();
        let rows: Vec<_> = second.rows.iter().map(|row| row.key).collect();
        let bodies = house.read_bodies(device_id(2), &rows).unwrap();
        let [(_, Some(body))] = bodies.as_slice() else {
            panic!("{engine:?}: the shared one is gone");
        };
        assert_eq!(
            (body.ping, &body.content[..]),
            (ping_id(900), &b"hello"[..])
        );
        for n in [1, 2] {
            let record = house.device(device_id(n)).unwrap();
            assert!(record == Some(device_record(device_id(n), "ada")));
        }
        assert!(house.keys().unwrap() == [a_key()]);
        for (ping, at_ms) in [(3, 5_003), (22, MADE_MS - 1_000)] {
            let page = house.pairs(ping_id(ping), None, 10).unwrap();
            let ended = PairState::Ended {
                outcome: Outcome::Acknowledged,
                at_ms,
            };
            assert_eq!(page.items, [(AppId::DEFAULT, device_id(DEVICE), ended)]);
        }
        remembered(&house, 22);
        let ended = house.outcomes_of_ping(AppId::DEFAULT, ping_id(22), None, 10);
        let ended: Vec<_> = ended.unwrap().iter().map(|record| record.at_ms).collect();
        assert_eq!(ended, [MADE_MS - 1_000], "{engine:?}");
        // And it is a store like any other from here on.
        post(&house, 43..=45);
        drop(house);
        let found = verify(shop.data(), None, &|_| {}).unwrap();
        assert!(found.sound, "{engine:?}: {:?}", found.wrong);
        let (house, _) = shop.open();
        assert_eq!(waiting(&house).len(), expected.len() + 3);
        assert!(waiting(&house).iter().all(|n| note(*n).size == 300));
    }
}

// ---- What is promised of formats -----------------------------------------------------------------------------------

fn sources(dir: &Path) -> Vec<(String, String)> {
    let mut dirs = vec![dir.to_owned()];
    let mut found = Vec::new();
    while let Some(at) = dirs.pop() {
        for entry in fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|end| end == "rs") {
                let name = path.strip_prefix(dir).unwrap().display().to_string();
                found.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The rows of the table whose first heading is this, as cells.
fn table(text: &str, heading: &str) -> Vec<Vec<String>> {
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim().trim_matches('|');
        line.split('|').map(|cell| cell.trim().to_owned()).collect()
    };
    let mut lines = text
        .lines()
        .skip_while(|line| !line.starts_with(&format!("| {heading} |")));
    assert!(lines.next().is_some(), "no table with {heading}");
    lines
        .skip(1)
        .take_while(|line| line.starts_with('|'))
        .map(cells)
        .collect()
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Constants that say the version of a format: the file that has one, and its value.
fn versions(sources: &[(String, String)]) -> Vec<(String, u32)> {
    let mut found = Vec::new();
    for (file, text) in sources {
        for line in text.lines() {
            let Some((_, rest)) = line.split_once("const ") else {
                continue;
            };
            let Some((name, rest)) = rest.split_once(": u") else {
                continue;
            };
            if name == "VERSION" || name.ends_with("_VERSION") {
                let (_, value) = rest.split_once(" = ").unwrap();
                let value = value.trim_end_matches(';').parse().unwrap();
                found.push((file.clone(), value));
            }
        }
    }
    found
}

#[test]
fn a_format_is_not_raised_without_a_golden_file_and_a_row_in_the_decision() {
    let sources = sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/store"));
    let versions = versions(&sources);
    assert!(versions.len() >= 8, "{versions:?}");
    let decision = document("decisions/0019-what-is-promised-about-formats.md");
    let rows = table(&decision, "format");
    let kept: Vec<String> = fs::read_dir(golden())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "corpus")
        .collect();
    let mut known = Vec::new();
    for row in &rows {
        let [_, _, version, constant, goldens] = row.as_slice() else {
            panic!("a row of five cells: {row:?}");
        };
        let version: u32 = version.parse().unwrap();
        for file in quoted(constant) {
            let file = file.strip_prefix("store/").unwrap();
            let found: Vec<u32> = versions
                .iter()
                .filter(|(name, _)| name == file)
                .map(|(_, value)| *value)
                .collect();
            assert!(
                found.contains(&version),
                "{file}: the decision says otherwise than {found:?}"
            );
            known.push((file, version));
        }
        for name in quoted(goldens) {
            for earlier in 1..=version {
                let stem = format!("{name}-v{earlier}.");
                assert!(
                    kept.iter().any(|file| file.starts_with(&stem)),
                    "no golden file {stem}*: see {}",
                    "docs/decisions/0019"
                );
            }
        }
    }
    for (file, version) in &versions {
        assert!(
            known.contains(&(file.as_str(), *version)),
            "{file} is not in docs/decisions/0019"
        );
    }
    // Nothing is kept that nobody reads, and nothing that no row tells of.
    for file in &kept {
        let stem = file.split('.').next().unwrap();
        let (name, _) = stem.rsplit_once("-v").unwrap();
        assert!(
            rows.iter().any(|row| quoted(&row[4]).contains(&name)),
            "{file} is not in docs/decisions/0019"
        );
        assert!(
            sources.iter().any(|(_, text)| text.contains(stem)),
            "no test reads {file}"
        );
    }
}

#[test]
fn every_test_that_the_documentation_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut text = String::new();
    for dir in ["src", "tests", "../tests/tests"] {
        for (_, source) in sources(&root.join(dir)) {
            text.push_str(&source);
        }
    }
    let store = document("store.md");
    let rows = table(&store, "damage");
    assert!(rows.len() > 15, "{}", rows.len());
    let mut missing = Vec::new();
    for row in &rows {
        let tests = quoted(row.last().unwrap());
        assert!(!tests.is_empty(), "no test for: {}", row[0]);
        for test in tests {
            let is_a_test = ["#[test]\nfn ", "#[test]\n    fn "]
                .iter()
                .any(|head| text.contains(&format!("{head}{test}(")))
                || text.contains(&format!("async fn {test}("));
            if !is_a_test {
                missing.push(test.to_owned());
            }
        }
    }
    assert_eq!(
        missing, [""; 0],
        "docs/store.md names tests that are not there"
    );
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

/// A snapshot of a small engine.
fn a_snapshot() -> Vec<u8> {
    let engine = engine::memory::MemoryEngine::new();
    let entries: Vec<engine::EngineWrite> = (0..40u8)
        .map(|n| engine::EngineWrite {
            key: vec![b'e', n].into(),
            value: Some(Bytes::new()),
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
    taken(&disk, &snapshot::name(7))
}

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
    let snapshot = a_snapshot();
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
