//! The drill of `docs/backup.md`, with the very lines of the document, and what can go wrong while a backup is made.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bellwire_tests::real::{Phone, Site, Way, binary, eventually};
use serde_json::{Value, json};

/// The lines of the document behind `<!-- drill:NAME -->`.
fn lines(name: &str) -> String {
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/backup.md");
    let document = fs::read_to_string(document).unwrap();
    let mark = format!("<!-- drill:{name} -->");
    let (_, rest) = document.split_once(&mark).expect("the document has it");
    let (_, rest) = rest.split_once("```sh\n").unwrap();
    let (block, _) = rest.split_once("```").unwrap();
    block
        .lines()
        .map(|line| format!("{}\n", line.trim()))
        .collect()
}

struct Drill {
    data: PathBuf,
    backups: PathBuf,
}

impl Drill {
    /// Runs a block of the document.
    fn run(&self, name: &str, new: &Path, more: &[(&str, &str)]) -> Output {
        let bin = binary("bellwire").parent().unwrap().to_owned();
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap());
        let output = Command::new("sh")
            .args(["-euc", &lines(name)])
            .env("PATH", path)
            .env("DATA", &self.data)
            .env("BACKUPS", &self.backups)
            .env("NEW", new)
            .envs(more.iter().copied())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{name}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }
}

fn bellwire(arguments: &[&str]) -> Output {
    Command::new(binary("bellwire"))
        .args(arguments)
        .output()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_drill_of_the_document_restores_what_was_promised_into_every_engine() {
    for engine in ["sled", "fjall", "memory"] {
        let site = Site::new();
        let backups = tempfile::tempdir().unwrap();
        let phones = tempfile::tempdir().unwrap();
        let server = site.start();
        let api = server.api();
        let mut kept = Phone::register(&server, &api, phones.path(), "ana", Way::Quic).await;
        let (revoked, _) = api.device("ben").await;
        let made = api
            .post("/v1/keys", json!({"name": "job", "scopes": ["read"]}))
            .await
            .expect(201);
        let mut promised = BTreeSet::new();
        for number in 0..40 {
            let ping =
                json!({"to": {"devices": [kept.id(), revoked]}, "body": format!("{number}")});
            let answer = api.post("/v1/pings", ping).await.expect(202);
            promised.insert(answer["id"].as_str().unwrap().to_owned());
        }
        // Others go on meanwhile.
        let (busy, _) = api.device("busy").await;
        let stop = Arc::new(AtomicBool::new(false));
        let load = tokio::spawn({
            let (api, stop) = (api.clone(), Arc::clone(&stop));
            async move {
                while !stop.load(Ordering::Relaxed) {
                    let ping = json!({"to": {"device": busy}, "body": "x"});
                    let _ = api.post("/v1/pings", ping).await.expect(202);
                }
            }
        });
        let drill = Drill {
            data: site.data(),
            backups: backups.path().to_owned(),
        };
        let next = Site::new();
        let (taken, verified) = tokio::task::block_in_place(|| {
            (
                drill.run("take", &next.data(), &[]),
                drill.run("verify", &next.data(), &[]),
            )
        });
        assert!(String::from_utf8_lossy(&taken.stdout).contains("3 devices"));
        let last = String::from_utf8_lossy(&verified.stdout);
        let held: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert_eq!(
            (held["devices"].as_u64(), held["keys"].as_u64()),
            (Some(3), Some(2))
        );
        assert!(held["waiting"].as_u64().unwrap() >= 80);
        stop.store(true, Ordering::Relaxed);
        load.await.unwrap();
        // Revoked after the backup.
        let _ = api
            .delete(&format!("/v1/devices/{revoked}"))
            .await
            .expect(204);
        let id = made["id"].as_str().unwrap();
        let _ = api.delete(&format!("/v1/keys/{id}")).await.expect(204);

        let variables = [("BELLWIRE__STORE__ENGINE", engine)];
        let restored =
            tokio::task::block_in_place(|| drill.run("restore", &next.data(), &variables));
        let said = String::from_utf8_lossy(&restored.stdout).into_owned();
        assert!(said.contains("1 devices, 1 API keys"), "{said}");
        drop(server);
        let next = next.with("STORE__ENGINE", engine);
        let server = next.start();
        let restored = bellwire_tests::real::Api::new(
            server.listen().api,
            server.listen().operations,
            api.key(),
        );
        let gone = restored.get(&format!("/v1/devices/{revoked}")).await;
        assert_eq!(gone.status.as_u16(), 404);
        let secret = made["key"].as_str().unwrap();
        let refused = restored.with_key(secret).get("/v1/status").await;
        assert_eq!(refused.status.as_u16(), 401);
        kept.trust(&server);
        kept.attach(&server, &restored).await;
        kept.given(promised.len()).await;
        let given = kept.ledger.ids();
        assert_eq!(given.len(), promised.len(), "each once");
        assert_eq!(given.into_iter().collect::<BTreeSet<_>>(), promised);
        assert!(kept.ledger.redelivered().iter().all(|again| *again));
        kept.leave().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_is_refused_with_the_reason_and_admin_is_needed() {
    let site = Site::new();
    let place = tempfile::tempdir().unwrap();
    let server = site.start();
    let api = server.api();
    let (device, _) = api.device("ana").await;
    for _ in 0..20 {
        let _ = api
            .post("/v1/pings", json!({"to": {"device": device}, "body": "x"}))
            .await
            .expect(202);
    }
    let at = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    let data = site.data().to_str().unwrap().to_owned();
    let (good, bad) = (at("good.backup"), at("bad.backup"));
    let take = ["backup", "--data-dir", &data, "--to", &good, "--json"];
    let taken = tokio::task::block_in_place(|| bellwire(&take));
    assert!(
        taken.status.success(),
        "{}",
        String::from_utf8_lossy(&taken.stderr)
    );
    let again = tokio::task::block_in_place(|| bellwire(&take));
    assert_eq!(
        again.status.code(),
        Some(1),
        "a backup is never written over"
    );
    let mut bytes = fs::read(&good).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&bad, bytes).unwrap();
    let verified = bellwire(&["backup", "verify", &bad]);
    assert_eq!(verified.status.code(), Some(1));
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    assert!(said.contains("damaged in the block at byte"), "{said}");
    let refused = bellwire(&["restore", "--from", &bad, "--data-dir", &at("new")]);
    assert_eq!(refused.status.code(), Some(1));
    let key = api
        .post("/v1/keys", json!({"name": "reader", "scopes": ["read"]}))
        .await
        .expect(201);
    let reader = api.with_key(key["key"].as_str().unwrap());
    assert_eq!(reader.get("/v1/backup").await.status.as_u16(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_makes_backups_by_itself_and_notes_what_is_erased() {
    let backups = tempfile::tempdir().unwrap();
    let site = Site::new().with("BACKUP__DIR", backups.path().to_str().unwrap());
    let server = site.start();
    let api = server.api();
    let status = eventually("the first backup", async || {
        let status = api.get("/v1/status").await.expect(200);
        (status["backup"]["kept"] == 1).then_some(status)
    })
    .await;
    assert_eq!(status["backup"]["failures"], 0);
    let made: Vec<PathBuf> = fs::read_dir(backups.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "backup"))
        .collect();
    let verified = bellwire(&["backup", "verify", made[0].to_str().unwrap()]);
    assert!(verified.status.success());
    let erasures = backups.path().join("erasures");
    let size = || fs::metadata(&erasures).map_or(0, |found| found.len());
    let before = size();
    let (device, _) = api.device("ana").await;
    let _ = api
        .delete(&format!("/v1/devices/{device}"))
        .await
        .expect(204);
    eventually("the erasure is noted", async || {
        tokio::time::sleep(Duration::from_millis(20)).await;
        (size() > before).then_some(())
    })
    .await;
    assert!(server.log().contains("made a backup and read it again"));
}
