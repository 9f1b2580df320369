//! The real binary on disks that lose power, fail, take their time and run full.
//!
//! `BELLWIRE_DISK_SEED=n` repeats what the cuts of one run chose (the rest of the timing is the machine's).

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::fs;
use std::path::Path;
use std::time::Duration;

use bellwire_faultfs::{Errno, Fault, FaultFs, Op, Options, SmallDisk};
use bellwire_tests::real::{Phone, Publisher, Site, Way, eventually};
use serde_json::json;

/// Losses of power for each engine.
const CUTS: u64 = 8;

/// A server with its data on this disk, and everything small.
fn site(disk: &Path, engine: &str) -> Site {
    Site::new()
        .with_data(disk.join("data"))
        .with("STORE__TRUST_FILE_SYSTEM", "true")
        .with("STORE__ENGINE", engine)
        .with("STORE__SEGMENT_BYTES", "1MiB")
        .with("STORE__SNAPSHOT_BYTES", "1MiB")
        .with("STORE__RESERVE_BYTES", "0")
}

/// The machine has booted since: sled's files prove nothing any more.
fn booted(disk: &FaultFs) {
    let note = disk.path().join("data/sled.in-use");
    if note.exists() {
        fs::write(note, "00000000-0000-0000-0000-000000000000\n").unwrap();
        disk.settle();
    }
}

async fn power_cuts(engine: &str) {
    let seed = std::env::var("BELLWIRE_DISK_SEED")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or_else(rand::random::<u32>);
    eprintln!("BELLWIRE_DISK_SEED={seed}");
    let disk = FaultFs::new(&Options::default()).unwrap();
    let site = site(disk.path(), engine);
    let server = site.start();
    let api = server.api();
    let mut here = Phone::register(&server, &api, site.dir(), "ann", Way::WebSocket).await;
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    let publisher = Publisher::new(vec![here.id(), away.id()]);
    // Right after the first start and two registrations, without any time to settle.
    let mut running = Some(server);
    for cut in 0..CUTS {
        let server = match running.take() {
            Some(server) => server,
            None => site.start(),
        };
        let api = server.api();
        if cut > 0 {
            here.start(&server, |_| bellwire_client::Verdict::Acknowledge)
                .await;
            let load = publisher.begin(&api, u64::from(seed) + cut);
            let wanted = publisher.promised() + 30;
            eventually("there is load", async || {
                (publisher.promised() >= wanted).then_some(())
            })
            .await;
            disk.power_cut(u64::from(seed) * 100 + cut);
            server.kill();
            load.end().await;
            here.crash().await;
        } else {
            disk.power_cut(u64::from(seed));
            server.kill();
        }
        disk.power_on().unwrap();
        booted(&disk);
    }
    let server = site.start();
    let api = server.api();
    here.attach(&server, &api).await;
    away.attach(&server, &api).await;
    publisher.kept(&api, &[&here, &away]).await;
    eprintln!("{} promises kept", publisher.promised());
    here.crash().await;
    away.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_losses_of_power_with_sled() {
    power_cuts("sled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_losses_of_power_with_fjall() {
    power_cuts("fjall").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_ends_new_promises_and_deliveries_go_on() {
    let disk = FaultFs::new(&Options::default()).unwrap();
    let site = site(disk.path(), "sled");
    let server = site.start();
    let api = server.api();
    let mut phone = Phone::register(&server, &api, site.dir(), "ann", Way::Json).await;
    let publisher = Publisher::new(vec![phone.id()]);
    publisher.fill(&api, &phone.id(), 20, 100).await;
    disk.fail(Fault::new(Op::Sync, Errno::IO).always().on("log/"));
    for _ in 0..3 {
        let answer = publisher.one(&api, &phone.id(), 100).await;
        assert_eq!(
            (answer.status.as_u16(), answer.code().as_str()),
            (503, "store_unavailable"),
            "{}",
            answer.text
        );
    }
    disk.clear_faults();
    let answer = publisher.one(&api, &phone.id(), 100).await;
    assert_eq!(
        answer.status, 503,
        "until a restart, whatever the disk says"
    );
    assert_eq!(api.operations("/readyz").await.status, 503);
    // What was promised before is delivered all the same.
    phone.attach(&server, &api).await;
    phone.given(20).await;
    phone.crash().await;
    server.kill();
    let server = site.start();
    let api = server.api();
    assert_eq!(api.operations("/readyz").await.status, 200);
    let answer = publisher.one(&api, &phone.id(), 100).await;
    assert!(answer.status.is_success(), "{}", answer.text);
    phone.attach(&server, &api).await;
    publisher.kept(&api, &[&phone]).await;
    phone.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slow_syncs_make_answers_late_and_not_untrue() {
    let disk = FaultFs::new(&Options::default()).unwrap();
    let site = site(disk.path(), "sled");
    let server = site.start();
    let api = server.api();
    let mut here = Phone::register(&server, &api, site.dir(), "ann", Way::WebSocket).await;
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Quic).await;
    here.attach(&server, &api).await;
    let publisher = Publisher::new(vec![here.id(), away.id()]);
    disk.delay_on(Op::Sync, Duration::from_millis(150), "log/");
    let (here_id, away_id) = (here.id(), away.id());
    tokio::join!(
        publisher.fill(&api, &here_id, 40, 100),
        publisher.fill(&api, &away_id, 40, 100)
    );
    here.given(40).await;
    // Each answer came after its sync: nothing is lost when the power goes right behind the last one.
    disk.power_cut_without_luck();
    server.kill();
    here.crash().await;
    disk.power_on().unwrap();
    booted(&disk);
    let server = site.start();
    let api = server.api();
    here.attach(&server, &api).await;
    away.attach(&server, &api).await;
    publisher.kept(&api, &[&here, &away]).await;
    here.crash().await;
    away.crash().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_filled_to_the_last_byte_loses_nothing_and_opens_again_with_sled() {
    filled(SmallDisk::new(64 << 20).unwrap(), "sled").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_filled_to_the_last_byte_loses_nothing_and_opens_again_with_fjall() {
    filled(SmallDisk::new(256 << 20).unwrap(), "fjall").await;
}

async fn filled(disk: SmallDisk, engine: &str) {
    let mut site = site(disk.path(), engine);
    site.set("STORE__RESERVE_BYTES", "8MiB");
    let server = site.start();
    let api = server.api();
    let mut here = Phone::register(&server, &api, site.dir(), "ann", Way::WebSocket).await;
    let mut away = Phone::register(&server, &api, site.dir(), "ann", Way::Json).await;
    here.attach(&server, &api).await;
    let publisher = Publisher::new(vec![here.id(), away.id()]);
    publisher.fill(&api, &away.id(), 30, 500).await;
    let revocable = publisher_ping(&api, &away.id()).await;

    // Somebody else takes nearly all of it: what is left is a part of the reserve.
    disk.fill_but(4 << 20).unwrap();
    eventually("new pings are refused", async || {
        let answer = publisher.one(&api, &away.id(), 100).await;
        (answer.status == 507).then(|| assert_eq!(answer.code(), "no_room"))
    })
    .await;
    // Revocations go on: that is what the reserve is for.
    let revoked = api.delete(&format!("/v1/pings/{revocable}")).await;
    assert_eq!(revoked.expect(200)["revoked"], 1);
    // And the rest. Nothing is promised any more, for want of room or because the engine cannot go on; deliveries go on.
    let stranger = disk.fill_but(0).unwrap();
    let answer = publisher.one(&api, &away.id(), 100).await;
    assert!(
        [503, 507].contains(&answer.status.as_u16()),
        "{}",
        answer.text
    );
    away.attach(&server, &api).await;
    away.given(30).await;
    away.crash().await;

    // Killed and started again with not a byte to spare: it starts and still refuses, or it says what to do and changes nothing.
    server.kill();
    match site.try_start() {
        Ok(server) => {
            eprintln!("{engine}: it starts on a full disk");
            let answer = publisher.one(&server.api(), &away.id(), 100).await;
            assert!(
                [503, 507].contains(&answer.status.as_u16()),
                "{}",
                answer.text
            );
            server.kill();
        }
        Err(log) => {
            eprintln!("{engine}: it does not start on a full disk: {log}");
            assert!(log.contains("free some and start again"), "{log}");
        }
    }
    fs::remove_file(stranger).unwrap();
    let server = site.start();
    let api = server.api();
    eventually("there is room again", async || {
        let answer = publisher.one(&api, &away.id(), 100).await;
        answer.status.is_success().then_some(())
    })
    .await;

    // While it runs, too: full, room, open, without a restart.
    let stranger = disk.fill_but(4 << 20).unwrap();
    eventually("new pings are refused again", async || {
        let answer = publisher.one(&api, &away.id(), 100).await;
        (answer.status == 507).then_some(())
    })
    .await;
    fs::remove_file(stranger).unwrap();
    eventually("it opens again by itself", async || {
        let answer = publisher.one(&api, &away.id(), 100).await;
        answer.status.is_success().then_some(())
    })
    .await;
    here.crash().await;
    here.attach(&server, &api).await;
    away.attach(&server, &api).await;
    publisher.kept(&api, &[&here, &away]).await;
    here.crash().await;
    away.crash().await;
}

/// A ping that the test itself looks after.
async fn publisher_ping(api: &bellwire_tests::real::Api, device: &str) -> String {
    let ping = json!({ "to": { "device": device }, "body": "never mind" });
    let answer = api.post("/v1/pings", ping).await;
    assert!(answer.status.is_success(), "{}", answer.text);
    answer.id()
}
