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

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_cuts_no_device_and_newcomers_see_the_new_certificate_and_limits() {
    let mut site = Site::new();
    let now = time::OffsetDateTime::now_utc();
    let authority = DevAuthority::generate("reload", Validity::authority(now).unwrap()).unwrap();
    let issue = || {
        let names = ["127.0.0.1".parse().unwrap()];
        let issued = authority
            .server(&names, Validity::leaf(now).unwrap())
            .unwrap();
        fs::write(site.dir().join("chain.pem"), issued.chain_pem.as_bytes()).unwrap();
        fs::write(site.dir().join("key.pem"), issued.key_pem.as_bytes()).unwrap();
    };
    issue();
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
    site.set("LOG__FORMAT", "json");
    let server = site.start();
    let api = server.api();
    // Where clients of these tests look for what to trust.
    fs::write(server.ca(), authority.certificate_pem()).unwrap();
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
    let shown = async || bellwire_certificate(server.listen().devices).await;
    let old_certificate = shown().await;

    issue();
    write(2_000, "3m");
    server.signal(Signal::HUP);
    eventually("the reload is taken", async || {
        (api.get("/v1/status").await.json()["settings"]["reloads"] == 1).then_some(())
    })
    .await;
    assert_ne!(shown().await, old_certificate, "newcomers see the new one");
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
        assert_eq!(phone.ledger.bodies(), [large.clone()]);
    }
    // And a device that comes now is let in by both.
    for way in [Way::Quic, Way::WebSocket] {
        let mut phone = Phone::register(&server, &api, site.dir(), "bea", way).await;
        phone.attach(&server, &api).await;
        phone.leave().await;
    }
    for mut phone in phones {
        phone.leave().await;
    }
}

/// The certificate that the device port shows on TCP.
async fn bellwire_certificate(server: SocketAddr) -> Vec<u8> {
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
    let tcp = tokio::net::TcpStream::connect(server).await.unwrap();
    let tls = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config))
        .connect(ServerName::from(server.ip()), tcp)
        .await
        .unwrap();
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
    /// HAProxy in front of `backend`; `None` where it is not installed.
    fn start(
        folder: &Path,
        certificate: &Path,
        backend: SocketAddr,
        send: &str,
    ) -> Option<(Balancer, SocketAddr)> {
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
        let child = Command::new("haproxy")
            .args(["-db", "-f"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        match child {
            Ok(child) => Some((Balancer(child), address)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => panic!("haproxy does not start: {error}"),
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
    let Some((_balancer, address)) = Balancer::start(site.dir(), &certificate, plain, checks)
    else {
        eprintln!("there is no haproxy here; tests/run installs it");
        return;
    };
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
            .filter(|line| line.contains("link_refusals") && line.contains("proxy"))
            .map(str::to_owned)
            .collect()
    };
    assert_eq!(
        refusals(&api.operations("/metrics").await.text),
        Vec::<String>::new()
    );

    // One that speaks version 1 is refused, and the log says what to change.
    let Some((_older, older)) = Balancer::start(site.dir(), &certificate, plain, "send-proxy")
    else {
        panic!("it was there a moment ago");
    };
    eventually("the operator is told", async || {
        let _knock = tokio::net::TcpStream::connect(older).await;
        let shown = tokio::time::timeout(
            std::time::Duration::from_secs(1),
            bellwire_certificate_or_nothing(older),
        );
        let _seen = shown.await;
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

/// Takes TLS through a balancer, so that it connects to the server behind.
async fn bellwire_certificate_or_nothing(server: SocketAddr) -> Option<Vec<u8>> {
    tokio::net::TcpStream::connect(server).await.ok()?;
    Some(bellwire_certificate(server).await)
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
    let status = server.stop().await;
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
    assert!(tokio::net::TcpStream::connect(devices).await.is_err());
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
