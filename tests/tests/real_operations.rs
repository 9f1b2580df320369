//! What an operator does to a server that has devices: reload, drain, a load balancer in front.

#![expect(clippy::unwrap_used, reason = "a test may stop at anything unexpected")]

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use bellwire_certs::{DevAuthority, Validity};
use bellwire_client::{Carriers, Client, Codec, Trust, Verdict};
use bellwire_tests::real::{Phone, Site, Way, eventually, install_provider};
use rustix::process::Signal;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_cuts_no_device_and_newcomers_see_the_new_certificate_and_limits() {
    let site = Site::new().with("LOG__FORMAT", "json");
    let first = issue(site.dir(), "chain.pem", "key.pem");
    let settings = site.dir().join("bellwire.toml");
    let write = |content: u32, keep_alive: &str| {
        fs::write(
            &settings,
            format!(
                "[limits]\ncontent_bytes = {content}\nkeep_alive_quic_max = \"{keep_alive}\"\n[tls]\ncert = \
                 \"chain.pem\"\nkey = \"key.pem\"\n"
            ),
        )
        .unwrap();
    };
    write(1_000, "2m");
    let server = site.start();
    let api = server.api();
    // Where clients of these tests look for what to trust.
    fs::write(server.ca(), first).unwrap();
    let mut phones = Vec::new();
    for way in Way::ALL {
        let mut phone = Phone::register(&server, &api, site.dir(), "ann", way).await;
        phone.attach(&server, &api).await;
        phones.push(phone);
    }
    let attached_since = async |phone: &Phone| {
        let view = api.get(&format!("/v1/devices/{}", phone.id())).await.json();
        view["attached"].clone()
    };
    let mut before = Vec::new();
    for phone in &phones {
        before.push(attached_since(phone).await);
    }
    // Of another authority, which those who are here do not know.
    let second = issue(site.dir(), "chain.pem", "key.pem");
    write(2_000, "3m");
    server.signal(Signal::HUP);
    eventually("the reload is taken", async || {
        (api.get("/v1/status").await.json()["settings"]["reloads"] == 1).then_some(())
    })
    .await;
    assert_eq!(
        api.get("/v1/status").await.json()["limits"]["content_max"],
        2_000
    );
    // Everybody is still there, in the same session, and gets what is larger than was allowed before.
    let large = "x".repeat(1_500);
    for (phone, before) in phones.iter().zip(before) {
        let ping = json!({ "to": { "device": phone.id() }, "body": large });
        let answer = api
            .post("/v1/pings?wait=acknowledged&timeout_s=30", ping)
            .await;
        assert_eq!(answer.expect(200)["outcomes"][0]["state"], "acknowledged");
        assert_eq!(attached_since(phone).await, before);
        assert_eq!(phone.ledger.bodies(), std::slice::from_ref(&large));
    }
    // And devices that come now are shown the new certificate on both carriers: they trust nothing else.
    fs::write(server.ca(), second).unwrap();
    let newcomers = async || {
        for way in [Way::Quic, Way::WebSocket] {
            let mut phone = Phone::register(&server, &api, site.dir(), "bea", way).await;
            phone.attach(&server, &api).await;
            phone.leave().await;
        }
    };
    newcomers().await;
    // Settings that lost it lock nobody out: none for development takes its place.
    fs::write(&settings, "[limits]\ncontent_bytes = 3000\n").unwrap();
    server.signal(Signal::HUP);
    let refused = eventually("the reload is refused", async || {
        let status = api.get("/v1/status").await.json();
        (status["settings"]["refused"] == 1).then_some(status)
    })
    .await;
    let problem = &refused["settings"]["last_reload"]["problems"][0];
    assert!(problem.as_str().unwrap().contains("tls.cert"), "{problem}");
    assert_eq!(refused["limits"]["content_max"], 2_000);
    newcomers().await;
    for mut phone in phones {
        phone.leave().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_exchanges_the_apis_certificate_under_connections_that_stay() {
    let site = Site::new()
        .with("API__CERT", "api.pem")
        .with("API__KEY", "api-key.pem");
    let _authority = issue(site.dir(), "api.pem", "api-key.pem");
    let server = site.start();
    let api = server.listen().api;
    let mut held = tls(api).await;
    let old = certificate(&held);

    let _authority = issue(site.dir(), "api.pem", "api-key.pem");
    server.signal(Signal::HUP);
    eventually("newcomers see the new certificate", async || {
        (certificate(&tls(api).await) != old).then_some(())
    })
    .await;
    // Whoever was there is still served.
    held.write_all(b"GET /v1/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    let _unclean_end = held.read_to_end(&mut answer).await;
    assert!(answer.starts_with(b"HTTP/1.1 401"), "{answer:?}");

    // A key that does not belong to the certificate is not taken, and nobody notices.
    let kept = certificate(&tls(api).await);
    let chain = fs::read(site.dir().join("api.pem")).unwrap();
    let _authority = issue(site.dir(), "api.pem", "api-key.pem");
    fs::write(site.dir().join("api.pem"), chain).unwrap();
    server.signal(Signal::HUP);
    eventually("the operator is told", async || {
        server.log().contains("nothing was taken").then_some(())
    })
    .await;
    assert_eq!(certificate(&tls(api).await), kept);
}

/// Writes a certificate for 127.0.0.1 of a new authority, and its key. Answers the authority's own, PEM.
fn issue(folder: &Path, chain: &str, key: &str) -> String {
    let now = time::OffsetDateTime::now_utc();
    let authority = DevAuthority::generate("reload", Validity::authority(now).unwrap()).unwrap();
    let names = ["127.0.0.1".parse().unwrap()];
    let issued = authority
        .server(&names, Validity::leaf(now).unwrap())
        .unwrap();
    fs::write(folder.join(chain), issued.chain_pem.as_bytes()).unwrap();
    fs::write(folder.join(key), issued.key_pem.as_bytes()).unwrap();
    authority.certificate_pem().to_owned()
}

/// TLS with whoever is there.
async fn tls(server: SocketAddr) -> TlsStream<TcpStream> {
    use rustls::pki_types::ServerName;
    install_provider();
    #[derive(Debug)]
    struct Anybody(std::sync::Arc<rustls::crypto::CryptoProvider>);
    impl rustls::client::danger::ServerCertVerifier for Anybody {
        fn verify_server_cert(
            &self,
            _: &rustls::pki_types::CertificateDer<'_>,
            _: &[rustls::pki_types::CertificateDer<'_>],
            _: &ServerName<'_>,
            _: &[u8],
            _: rustls::pki_types::UnixTime,
        ) -> Result<rustls::client::danger::ServerCertVerified, rustls::Error> {
            Ok(rustls::client::danger::ServerCertVerified::assertion())
        }
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signed: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            let known = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls12_signature(message, certificate, signed, known)
        }
        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &rustls::pki_types::CertificateDer<'_>,
            signed: &rustls::DigitallySignedStruct,
        ) -> Result<rustls::client::danger::HandshakeSignatureValid, rustls::Error> {
            let known = &self.0.signature_verification_algorithms;
            rustls::crypto::verify_tls13_signature(message, certificate, signed, known)
        }
        fn supported_verify_schemes(&self) -> Vec<rustls::SignatureScheme> {
            self.0.signature_verification_algorithms.supported_schemes()
        }
    }
    let provider = std::sync::Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(std::sync::Arc::new(Anybody(provider)))
        .with_no_client_auth();
    let tcp = TcpStream::connect(server).await.unwrap();
    tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(ServerName::from(server.ip()), tcp)
        .await
        .unwrap()
}

/// The certificate that was shown.
fn certificate(tls: &TlsStream<TcpStream>) -> Vec<u8> {
    tls.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

/// A load balancer that ends TLS.
struct Balancer(Child);

impl Drop for Balancer {
    fn drop(&mut self) {
        let _gone = self.0.kill();
        let _ended = self.0.wait();
    }
}

impl Balancer {
    /// HAProxy in front of `backend`.
    fn start(
        folder: &Path,
        certificate: &Path,
        backend: SocketAddr,
        send: &str,
    ) -> (Balancer, SocketAddr) {
        // Free now, and taken in a moment by nobody else on a machine that runs tests.
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let config = folder.join(format!("haproxy-{}.cfg", address.port()));
        fs::write(
            &config,
            format!(
                "defaults\n  mode tcp\n  timeout connect 10s\n  timeout client 1h\n  timeout server 1h\n\
                 frontend devices\n  bind {address} ssl crt {}\n  default_backend bellwire\n\
                 backend bellwire\n  server one {backend} {send}\n",
                certificate.display()
            ),
        )
        .unwrap();
        let log = fs::File::create(folder.join("haproxy.log")).unwrap();
        // Where Debian puts it, which the path of an ordinary user does not name.
        let installed = Path::new("/usr/sbin/haproxy");
        let program = if installed.exists() {
            installed
        } else {
            Path::new("haproxy")
        };
        let child = Command::new(program)
            .args(["-db", "-f"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        match child {
            Ok(child) => (Balancer(child), address),
            Err(error) => panic!(
                "HAProxy does not start ({error}); this test needs it: tests/run installs it, or: apt-get install haproxy"
            ),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn devices_come_through_a_load_balancer_that_ends_tls() {
    let site = Site::new()
        .with("LISTEN__DEVICES_PLAIN", "127.0.0.1:0")
        .with("LISTEN__PROXY_NETWORKS", "127.0.0.1/32")
        .with("LOG__LEVEL", "debug");
    let server = site.start();
    let api = server.api();
    let plain = server.listen().devices_plain.unwrap();
    // The balancer shows the certificate that the server made for itself.
    let data = site.data();
    let mut pem = fs::read_to_string(data.join("dev-server.pem")).unwrap();
    pem.push_str(&fs::read_to_string(data.join("dev-server-key.pem")).unwrap());
    let certificate = site.dir().join("balancer.pem");
    fs::write(&certificate, pem).unwrap();
    let checks = "send-proxy-v2-ssl-cn check check-send-proxy inter 100ms";
    let (_balancer, address) = Balancer::start(site.dir(), &certificate, plain, checks);
    install_provider();
    for codec in [Codec::Cbor, Codec::Json] {
        let (device, secret) = api.device("ann").await;
        let state = site.dir().join(format!("behind-{device}"));
        let client = Client::builder()
            .server(address.to_string())
            .device(device.parse().unwrap(), secret.as_str())
            .trust(Trust::File(server.ca()))
            .state_dir(&state)
            .carriers(Carriers::WebSocket)
            .websocket_codec(codec)
            .on_notification(|_| Verdict::Acknowledge)
            .start()
            .await
            .unwrap();
        eventually("the device is attached", async || {
            let view = api.get(&format!("/v1/devices/{device}")).await.json();
            (!view["attached"].is_null()).then_some(())
        })
        .await;
        let ping = json!({ "to": { "device": device }, "body": "through the balancer" });
        let answer = api
            .post("/v1/pings?wait=acknowledged&timeout_s=30", ping)
            .await;
        assert_eq!(answer.expect(200)["outcomes"][0]["state"], "acknowledged");
        client.shutdown().await;
    }
    // Health checks of the balancer are no complaint.
    let refusals = |metrics: &str| -> Vec<String> {
        metrics
            .lines()
            .filter(|line| line.starts_with("bellwire_link_refusals") && line.contains("proxy"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(
        refusals(&api.operations("/metrics").await.text),
        Vec::<String>::new()
    );

    // One that speaks version 1 is refused, and the log says what to change.
    let (_older, older) = Balancer::start(site.dir(), &certificate, plain, "send-proxy");
    eventually("the operator is told", async || {
        // A balancer connects to the server behind once TLS in front stands.
        if TcpStream::connect(older).await.is_ok() {
            let _knock = tls(older).await;
        }
        server
            .log()
            .contains("send-proxy-v2 instead of send-proxy")
            .then_some(())
    })
    .await;
    let metrics = api.operations("/metrics").await.text;
    assert!(
        refusals(&metrics)
            .iter()
            .any(|line| line.contains("proxy_version")),
        "{metrics}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_sends_everybody_away_with_advice_and_ends_in_order() {
    let site = Site::new().with("DRAIN__WINDOW", "10s");
    let server = site.start();
    let api = server.api();
    let mut phones = Vec::new();
    for way in Way::ALL {
        let mut phone = Phone::register(&server, &api, site.dir(), "ann", way).await;
        phone.attach(&server, &api).await;
        phones.push(phone);
    }
    let devices = server.listen().devices;
    let log = fs::read_dir(site.dir())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.extension().is_some_and(|ending| ending == "log"))
        .unwrap();
    // A backend that waits for a device that is not there is told so before the end.
    let (absent, _secret) = api.device("bea").await;
    let ping = json!({ "to": { "device": absent }, "body": "who waits?" });
    let waiting = api.post("/v1/pings?wait=acknowledged&timeout_s=60", ping);
    let stopping = async {
        eventually("the ping is accepted", async || {
            let view = api.get(&format!("/v1/devices/{absent}")).await.json();
            (view["waiting"] == 1).then_some(())
        })
        .await;
        server.stop().await
    };
    let (answer, status) = tokio::join!(waiting, stopping);
    assert_eq!(answer.expect(200)["outcomes"][0]["state"], "waiting");
    let said = fs::read_to_string(log).unwrap();
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(
        said.contains("\"sessions\":3,\"cut\":0"),
        "nobody had to be cut: {said}"
    );
    // Each was told when to come back, rather than left to find out.
    for phone in &phones {
        eventually("the device was sent away", async || {
            phone
                .ledger
                .events()
                .iter()
                .any(|event| event.to_lowercase().contains("drain"))
                .then_some(())
        })
        .await;
    }
    assert!(TcpStream::connect(devices).await.is_err());
    // The next server has them back.
    let again = site.with("LISTEN__DEVICES", &devices.to_string());
    let server = again.start();
    let api = server.api();
    for phone in &phones {
        phone.attached(&api).await;
    }
    let status: Value = api.get("/v1/status").await.json();
    assert_eq!(status["devices"]["connected"], 3, "{status}");
    for mut phone in phones {
        phone.leave().await;
    }
}
