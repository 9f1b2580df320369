//! The accept loop: what is no HTTP, too much, too slow or over TLS, and the end.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::aws_lc_rs};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::support::{PATIENCE, Setup, parse, raw, send, start, start_with, until};

/// Reads one answer of a connection that stays open.
async fn one_answer(stream: &mut (impl AsyncRead + Unpin)) -> crate::support::Reply {
    let mut bytes = Vec::new();
    let read = async {
        loop {
            let mut piece = [0; 4_096];
            let count = stream.read(&mut piece).await.unwrap();
            assert!(
                count > 0,
                "closed after {:?}",
                String::from_utf8_lossy(&bytes)
            );
            bytes.extend_from_slice(&piece[..count]);
            if !bytes.windows(4).any(|four| four == b"\r\n\r\n") {
                continue;
            }
            let reply = parse(&bytes);
            let length: usize = reply
                .header("content-length")
                .unwrap_or("0")
                .parse()
                .unwrap();
            if reply.body.len() == length {
                return reply;
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.unwrap()
}

const ALIVE: &[u8] = b"GET /openapi.json HTTP/1.1\r\nhost: test\r\n\r\n";

#[tokio::test]
async fn one_connection_serves_many_requests() {
    let server = start().await;
    let mut stream = TcpStream::connect(server.operations).await.unwrap();
    for _ in 0..3 {
        stream
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: test\r\n\r\n")
            .await
            .unwrap();
        assert_eq!(one_answer(&mut stream).await.text(), "alive\n");
    }
    // A refusal keeps it open as well.
    stream
        .write_all(b"GET /nowhere HTTP/1.1\r\nhost: test\r\n\r\n")
        .await
        .unwrap();
    assert_eq!(one_answer(&mut stream).await.problem(), "404 not_found");
    stream.write_all(ALIVE).await.unwrap();
    assert_eq!(one_answer(&mut stream).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn what_is_no_http_or_too_much_of_it_ends_its_connection_alone() {
    let server = start().await;
    let mut kept = TcpStream::connect(server.api).await.unwrap();
    let many: String = (0..65).map(|number| format!("x-{number}: 1\r\n")).collect();
    let long = format!(
        "GET / HTTP/1.1\r\nhost: test\r\nx: {}\r\n\r\n",
        "y".repeat(64 << 10)
    );
    for (bytes, status) in [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), 400),
        (b"GET / HTTP/1.1\r\nhost: te st\r\nbad header\r\n\r\n".to_vec(), 400),
        (b"POST /v1/pings HTTP/1.1\r\nhost: t\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx".to_vec(), 400),
        (format!("GET / HTTP/1.1\r\nhost: test\r\n{many}\r\n").into_bytes(), 431),
        (long.into_bytes(), 431),
    ] {
        let reply = raw(server.api, &bytes).await;
        assert_eq!(reply.status, status, "{:?}", String::from_utf8_lossy(&bytes[..40.min(bytes.len())]));
    }
    // HTTP/2 without TLS: no answer that its speaker would understand.
    let mut http2 = TcpStream::connect(server.api).await.unwrap();
    http2
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut nothing = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, http2.read_to_end(&mut nothing))
        .await
        .unwrap();
    assert!(nothing.is_empty());

    kept.write_all(ALIVE).await.unwrap();
    assert_eq!(one_answer(&mut kept).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn a_body_that_breaks_off_costs_nobody_else_anything() {
    let server = start().await;
    let mut cut = TcpStream::connect(server.api).await.unwrap();
    let head = format!(
        "POST /v1/pings HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{{\"to\"",
        server.key
    );
    cut.write_all(head.as_bytes()).await.unwrap();
    cut.shutdown().await.unwrap();
    let mut rest = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, cut.read_to_end(&mut rest))
        .await
        .unwrap();
    assert_eq!(
        send(server.api, "GET", "/openapi.json", &[], b"")
            .await
            .status,
        200
    );
    server.stop().await;
}

#[tokio::test]
async fn connections_over_the_limit_wait_for_a_place() {
    let server = start_with(Setup {
        connections_max: 2,
        ..Setup::default()
    })
    .await;
    let mut taken = Vec::new();
    for _ in 0..2 {
        let mut stream = TcpStream::connect(server.api).await.unwrap();
        stream.write_all(ALIVE).await.unwrap();
        assert_eq!(one_answer(&mut stream).await.status, 200);
        taken.push(stream);
    }
    let mut waiting = TcpStream::connect(server.api).await.unwrap();
    waiting.write_all(ALIVE).await.unwrap();
    drop(taken.pop());
    assert_eq!(one_answer(&mut waiting).await.status, 200);
    server.stop().await;
}

#[tokio::test]
async fn shutting_down_lets_open_requests_end_and_closes_idle_connections() {
    let server = start().await;
    let (_, _) = server.device("ana").await;
    let mut idle = TcpStream::connect(server.api).await.unwrap();
    idle.write_all(ALIVE).await.unwrap();
    assert_eq!(one_answer(&mut idle).await.status, 200);

    let mut busy = TcpStream::connect(server.api).await.unwrap();
    let body = r#"{"to":{"user":"ana"}}"#;
    let request = format!(
        "POST /v1/pings?wait=acknowledged&timeout_s=1 HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        server.key,
        body.len()
    );
    busy.write_all(request.as_bytes()).await.unwrap();
    // The ping is known to the runtime; its caller waits for the device.
    until(|| server.handle.status().ledger_entries > 0).await;
    server.shutdown.cancel();
    let mut nothing = Vec::new();
    let closed = tokio::time::timeout(PATIENCE, idle.read_to_end(&mut nothing))
        .await
        .unwrap();
    assert_eq!(closed.unwrap(), 0);
    let reply = one_answer(&mut busy).await;
    assert_eq!(
        (reply.status, reply.json()["outcomes"][0]["state"].as_str()),
        (200, Some("waiting"))
    );
    let api = server.api;
    let report = server.stop().await;
    assert_eq!(report.cut, 0);
    assert!(TcpStream::connect(api).await.is_err());
}

#[tokio::test]
async fn what_does_not_end_in_time_is_cut() {
    let server = start_with(Setup {
        drain: Duration::from_millis(50),
        ..Setup::default()
    })
    .await;
    server.device("ana").await;
    let mut busy = TcpStream::connect(server.api).await.unwrap();
    let body = r#"{"to":{"user":"ana"}}"#;
    let request = format!(
        "POST /v1/pings?wait=acknowledged&timeout_s=60 HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {}\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        server.key,
        body.len()
    );
    busy.write_all(request.as_bytes()).await.unwrap();
    until(|| server.handle.status().ledger_entries > 0).await;
    assert_eq!(server.stop().await.cut, 1);
}

// ---- TLS ---------------------------------------------------------------------------------------------------------

struct Pki {
    server: Arc<ServerConfig>,
    roots: RootCertStore,
}

fn pki() -> Pki {
    use bellwire_certs::{DevAuthority, SanName, Validity};
    let now = time::OffsetDateTime::now_utc();
    let authority = DevAuthority::generate("test", Validity::authority(now).unwrap()).unwrap();
    let names = [SanName::Dns("localhost".to_owned())];
    let issued = authority
        .server(&names, Validity::leaf(now).unwrap())
        .unwrap();
    let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes());
    let chain: Vec<_> = chain.map(Result::unwrap).collect();
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).unwrap();
    let mut server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    server.alpn_protocols = bellwire_server::http::ALPN
        .iter()
        .map(|name| name.to_vec())
        .collect();
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.certificate_pem().as_bytes()).unwrap();
    roots.add(ca).unwrap();
    Pki {
        server: Arc::new(server),
        roots,
    }
}

async fn connect(pki: &Pki, to: std::net::SocketAddr, alpn: &[&[u8]]) -> TlsStream<TcpStream> {
    let mut client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(pki.roots.clone())
        .with_no_client_auth();
    client.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    let stream = TcpStream::connect(to).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    TlsConnector::from(Arc::new(client))
        .connect(name, stream)
        .await
        .unwrap()
}

#[tokio::test]
async fn over_tls_both_versions_of_http_are_spoken() {
    let pki = pki();
    let config = Arc::clone(&pki.server);
    let setup = Setup {
        tls: Some(Arc::new(move || Arc::clone(&config))),
        ..Setup::default()
    };
    let server = start_with(setup).await;
    // Plain HTTP on the TLS port gets a TLS alert and the end, and is nobody else's trouble.
    let mut plain = TcpStream::connect(server.api).await.unwrap();
    plain.write_all(ALIVE).await.unwrap();
    let mut alert = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, plain.read_to_end(&mut alert))
        .await
        .unwrap();
    assert!(!alert.starts_with(b"HTTP"));

    for alpn in [&[b"http/1.1".as_slice()][..], &[]] {
        let mut stream = connect(&pki, server.api, alpn).await;
        stream.write_all(ALIVE).await.unwrap();
        assert_eq!(one_answer(&mut stream).await.status, 200);
    }
    let stream = connect(&pki, server.api, &[b"h2"]).await;
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(b"h2".as_slice()));
    let io = hyper_util::rt::TokioIo::new(stream);
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) = hyper::client::conn::http2::handshake(executor, io)
        .await
        .unwrap();
    let connection = tokio::spawn(connection);
    for (path, status) in [("/openapi.json", 200), ("/nowhere", 404)] {
        let request = http::Request::get(format!("https://localhost{path}"))
            .body(http_body_util::Empty::<bytes::Bytes>::new())
            .unwrap();
        let reply = sender.send_request(request).await.unwrap();
        assert_eq!(reply.status().as_u16(), status);
        assert!(reply.headers().contains_key("x-request-id"));
    }
    server.stop().await;
    drop(sender);
    let _ = tokio::time::timeout(PATIENCE, connection).await.unwrap();
}
