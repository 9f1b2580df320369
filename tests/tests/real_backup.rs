//! The drill of `docs/backup.md`, with the very lines of the document, and what can go wrong while a backup is made, kept or
//! restored.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bellwire_tests::real::{Api, Phone, Server, Site, Way, binary, eventually};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

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
        let (third, _) = api.device("eve").await;
        let withdrawn = json!({"to": {"device": third}, "body": "not this"});
        let withdrawn = api.post("/v1/pings", withdrawn).await.expect(202);
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
        assert!(String::from_utf8_lossy(&taken.stdout).contains("4 devices"));
        let last = String::from_utf8_lossy(&verified.stdout);
        let held: Value = serde_json::from_str(last.lines().last().unwrap()).unwrap();
        assert_eq!(
            (held["devices"].as_u64(), held["keys"].as_u64()),
            (Some(4), Some(2))
        );
        assert!(held["waiting"].as_u64().unwrap() >= 80);
        stop.store(true, Ordering::Relaxed);
        load.await.unwrap();
        // Revoked after the backup.
        let _ = api
            .delete(&format!("/v1/devices/{revoked}"))
            .await
            .expect(204);
        let taken_back = withdrawn["id"].as_str().unwrap();
        let back = api.delete(&format!("/v1/pings/{taken_back}")).await;
        assert!(back.status.is_success());
        let id = made["id"].as_str().unwrap();
        let _ = api.delete(&format!("/v1/keys/{id}")).await.expect(204);

        let variables = [("BELLWIRE__STORE__ENGINE", engine)];
        let restored =
            tokio::task::block_in_place(|| drill.run("restore", &next.data(), &variables));
        let said = String::from_utf8_lossy(&restored.stdout).into_owned();
        assert!(
            said.contains("1 devices, 1 API keys, 1 notifications"),
            "{said}"
        );
        drop(server);
        let next = next.with("STORE__ENGINE", engine);
        let server = next.start();
        let restored = Api::new(server.listen().api, server.listen().operations, api.key());
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

/// A site whose backups are larger than what lies about in the buffers of two sockets.
fn large_site() -> Site {
    Site::new()
        .with("LIMITS__CONTENT_BYTES", "65536")
        .with("LIMITS__MAILBOX_BYTES", "67108864")
}

async fn fill(api: &Api) {
    let (device, _) = api.device("ana").await;
    for number in 0..400_u32 {
        // Nothing that anybody could make smaller.
        let body: String = (0..60_000_u32)
            .map(|at| {
                char::from(b'a' + ((at ^ number).wrapping_mul(2_654_435_761) >> 27) as u8 % 26)
            })
            .collect();
        let ping = json!({"to": {"device": device}, "body": body});
        let _ = api.post("/v1/pings", ping).await.expect(202);
    }
}

/// Asks for a backup and takes nothing of it yet.
async fn ask(api: &Api, server: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(server.listen().api).await.unwrap();
    let request = format!(
        "GET /v1/backup HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {}\r\n\r\n",
        api.key()
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    // It has begun.
    let _ = stream.peek(&mut [0; 1]).await.unwrap();
    let second = api.get("/v1/backup").await;
    assert_eq!(second.status.as_u16(), 409, "{}", second.text);
    stream
}

/// Everything that still comes, until the connection ends: without chunked framing, so for a verdict on its end only.
async fn rest_of(mut stream: TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    // An end that is no end may be a reset.
    let _ = stream.read_to_end(&mut bytes).await;
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_that_does_not_take_its_backup_is_cut_and_others_get_theirs() {
    let site = large_site().with("LIMITS__BACKUP_STALL", "1s");
    let server = site.start();
    let api = server.api();
    fill(&api).await;
    let stalled = ask(&api, &server).await;
    eventually("it is cut", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        server.log().contains("too slowly").then_some(())
    })
    .await;
    // Pings went on, and somebody else gets a backup now.
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("b.backup");
    let taken = tokio::task::block_in_place(|| take(&site, &file, &[]));
    assert!(
        taken.status.success(),
        "{}",
        String::from_utf8_lossy(&taken.stderr)
    );
    // The connection is gone: what was on its way comes, and then its end, without the last chunk.
    let bytes = rest_of(stalled).await;
    assert!(bytes.starts_with(b"HTTP/1.1 200"));
    assert!(!bytes.ends_with(b"0\r\n\r\n"), "it must not look whole");
    assert_eq!(server.stop().await.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_goes_down_in_order_while_somebody_takes_a_backup() {
    let site = large_site().with("LIMITS__BACKUP_STALL", "1h");
    let server = site.start();
    let api = server.api();
    fill(&api).await;
    let stalled = ask(&api, &server).await;
    assert_eq!(server.stop().await.code(), Some(0));
    let bytes = rest_of(stalled).await;
    assert!(!bytes.ends_with(b"0\r\n\r\n"), "it must not look whole");
    // It was closed in order: nothing is built anew.
    let server = site.start();
    assert!(server.api().get("/v1/status").await.status.is_success());
}

fn take(site: &Site, to: &Path, more: &[&str]) -> Output {
    let data = site.data();
    let mut arguments = vec![
        "backup",
        "--data-dir",
        data.to_str().unwrap(),
        "--to",
        to.to_str().unwrap(),
    ];
    arguments.extend(more);
    bellwire(&arguments)
}

/// Stands between a caller and the server, and lets so many bytes of the answer through; then it ends the connection, or says
/// nothing any more.
async fn in_between(server: SocketAddr, bytes: usize, ends: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        let (caller, _) = listener.accept().await.unwrap();
        let server = TcpStream::connect(server).await.unwrap();
        let (mut from_caller, mut to_caller) = caller.into_split();
        let (from_server, mut to_server) = server.into_split();
        tokio::spawn(async move {
            let _ = tokio::io::copy(&mut from_caller, &mut to_server).await;
        });
        let mut some = from_server.take(bytes as u64);
        let _ = tokio::io::copy(&mut some, &mut to_caller).await;
        if !ends {
            std::future::pending::<()>().await;
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_was_broken_off_or_killed_never_has_its_name() {
    let site = large_site().with("LIMITS__BACKUP_STALL", "1s");
    let server = site.start();
    fill(&server.api()).await;
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("b.backup");
    let partial = place.path().join("b.backup.partial");
    let through = |address: SocketAddr| {
        let mut command = Command::new(binary("bellwire"));
        command
            .args(["backup", "--api", &format!("http://{address}"), "--to"])
            .arg(&file)
            .arg("--key-file")
            .arg(site.data().join("bootstrap.key"));
        command
    };
    let broken = in_between(server.listen().api, 5 << 20, true).await;
    let output = tokio::task::block_in_place(|| through(broken).output().unwrap());
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("broke off before the end"), "{said}");
    assert!(!file.exists() && !partial.exists());

    // Killed in the middle: what is left does not have the name, and is in nobody's way.
    let silent = in_between(server.listen().api, 5 << 20, false).await;
    let mut child = through(silent).spawn().unwrap();
    eventually("part of it is there", async || {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let size = fs::metadata(&partial).map_or(0, |found| found.len());
        (size > 4 << 20).then_some(())
    })
    .await;
    // Two to the same file never write into each other.
    let second = tokio::task::block_in_place(|| take(&site, &file, &[]));
    assert_eq!(second.status.code(), Some(1));
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(said.contains("another process"), "{said}");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!file.exists() && partial.exists());
    let verified = bellwire(&["backup", "verify", partial.to_str().unwrap()]);
    assert_eq!(verified.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&verified.stderr).contains("cut short"));
    // The server notices that its caller is gone.
    eventually("another one can be made", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let taken = tokio::task::block_in_place(|| take(&site, &file, &[]));
        taken.status.success().then_some(())
    })
    .await;
    assert!(!partial.exists());
    let mode = fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);

    // The server is killed in the middle.
    let stalled = ask(&server.api(), &server).await;
    server.kill();
    let bytes = rest_of(stalled).await;
    assert!(!bytes.ends_with(b"0\r\n\r\n"), "it must not look whole");
    let server = site.start();
    assert!(server.api().get("/v1/status").await.status.is_success());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_store_serves_with_the_hash_key_of_its_backup_and_with_no_other() {
    let site = Site::new();
    let server = site.start();
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    fs::create_dir(at("kept")).unwrap();
    let file = at("kept/b.backup");
    let taken = tokio::task::block_in_place(|| take(&site, &file, &[]));
    assert!(taken.status.success());
    let restore = |more: &[&str], to: &Path| {
        let mut arguments = vec!["restore", "--from", file.to_str().unwrap(), "--data-dir"];
        arguments.push(to.to_str().unwrap());
        arguments.extend(more);
        bellwire(&arguments)
    };
    let said = |output: &Output| String::from_utf8_lossy(&output.stderr).into_owned();

    // Not into a directory that a server has, nor into one that holds something else.
    let refused = restore(&["--replace"], &site.data());
    assert!(said(&refused).contains("in use"), "{}", said(&refused));
    fs::create_dir(at("letters")).unwrap();
    fs::write(at("letters/dear.txt"), "x").unwrap();
    for more in [&[][..], &["--replace"]] {
        let refused = restore(more, &at("letters"));
        assert_eq!(refused.status.code(), Some(1));
        assert!(said(&refused).contains("dear.txt"), "{}", said(&refused));
    }
    fs::write(at("wrong.key"), [7; 32]).unwrap();
    let wrong = at("wrong.key");
    let next = Site::new();
    let refused = restore(&["--hash-key", wrong.to_str().unwrap()], &next.data());
    assert_eq!(refused.status.code(), Some(1));
    assert!(said(&refused).contains("is not the hash key"));
    assert!(!next.data().join("format").exists());

    // Without any it is restored, and says what is missing; a start says it again, and makes no new one.
    let done = restore(&[], &next.data());
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("the hash key was not found"));
    let serve = || {
        let output = next.command().arg("serve").output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        said(&output)
    };
    assert!(serve().contains("hash.key is gone"));
    fs::write(next.data().join("hash.key"), [7; 32]).unwrap();
    let told = serve();
    assert!(told.contains("hashed with another key"), "{told}");
    fs::copy(site.data().join("hash.key"), next.data().join("hash.key")).unwrap();
    let restored = next.start();
    let key = fs::read_to_string(site.data().join("bootstrap.key")).unwrap();
    let listen = restored.listen();
    let api = Api::new(listen.api, listen.operations, key.trim_end());
    assert!(api.get("/v1/status").await.status.is_success());
    drop(server);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_that_fails_is_seen_everywhere_and_one_that_works_outlives_a_restart() {
    let place = tempfile::tempdir().unwrap();
    let dir = place.path().join("volume");
    let site = Site::new().with("BACKUP__DIR", dir.to_str().unwrap());
    // The volume is not mounted: the server serves, and tells.
    let server = site.start();
    let api = server.api();
    let status = eventually("the failure is told", async || {
        let status = api.get("/v1/status").await.expect(200);
        (status["backup"]["failures"] == 1).then_some(status)
    })
    .await;
    let trouble = status["backup"]["trouble"].as_str().unwrap();
    assert!(trouble.contains("No such file"), "{trouble}");
    assert!(server.log().contains("no backup could be made"));
    eventually("and in the metrics", async || {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let text = api.operations("/metrics").await.text;
        text.contains("bellwire_backup_failures_total 1")
            .then_some(())
    })
    .await;
    assert!(!dir.exists(), "it is never made");
    assert_eq!(server.stop().await.code(), Some(0));

    fs::create_dir(&dir).unwrap();
    let backups = || -> Vec<PathBuf> {
        fs::read_dir(&dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|ending| ending == "backup"))
            .collect()
    };
    let mut due = 0;
    for run in 0..2 {
        let server = site.start();
        let api = server.api();
        let status = eventually("there is one", async || {
            let status = api.get("/v1/status").await.expect(200);
            let backup = &status["backup"];
            (backup["kept"] == 1 && backup["due_ms"].as_u64() > Some(0)).then_some(status)
        })
        .await;
        let next = status["backup"]["due_ms"].as_u64().unwrap();
        if run == 0 {
            due = next;
        } else {
            // A day after the one of the run before, not after this start; as far as it took a while.
            assert!(next.abs_diff(due) < 60_000, "{due} {next}");
            assert_eq!(status["backup"]["took_ms"], 0, "an earlier run made it");
        }
        assert_eq!(backups().len(), 1);
        let mode = fs::metadata(&backups()[0]).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(server.stop().await.code(), Some(0));
    }
}
