//! Real proxies: tinyproxy, with TLS in front of it, and things that only look like a proxy. tests/run installs tinyproxy; where
//! it is missing these tests fail and say so.

use std::net::SocketAddr;
use std::process::Stdio;

use bellwire_client::raw::Dialer;
use bellwire_client::{Carrier, Carriers, Client, Proxy, Trust, inspect};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};

use crate::support::{FakeServer, PATIENCE, Seen, Udp, acceptor, notify};

/// Ports that are tried until one is free for the proxy.
const PORTS_TRIED: usize = 10;

/// A running tinyproxy that wants `ann` and `s3cret-one`, and permits the ports that it is told.
struct Tinyproxy {
    port: u16,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Tinyproxy {
    async fn start(permitted: &[u16]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..PORTS_TRIED {
            let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let port = free.local_addr().unwrap().port();
            drop(free);
            let mut settings = format!(
                "Port {port}\nListen 127.0.0.1\nTimeout 60\nLogLevel Critical\nBasicAuth ann s3cret-one\n"
            );
            for port in permitted {
                settings.push_str(&format!("ConnectPort {port}\n"));
            }
            let path = dir.path().join("tinyproxy.conf");
            std::fs::write(&path, settings).unwrap();
            let mut child = Command::new("tinyproxy")
                .arg("-d")
                .arg("-c")
                .arg(&path)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()
                .expect("tinyproxy is missing: tests/run installs it (apt-get install tinyproxy)");
            // It is there, or it could not have the port.
            let deadline = tokio::time::Instant::now() + PATIENCE;
            while child.try_wait().unwrap().is_none() {
                if TcpStream::connect(("127.0.0.1", port)).await.is_ok() {
                    return Self {
                        port,
                        child,
                        _dir: dir,
                    };
                }
                assert!(tokio::time::Instant::now() < deadline, "it does not listen");
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        }
        panic!("tinyproxy does not start");
    }

    fn url(&self, credentials: &str) -> String {
        format!("http://{credentials}127.0.0.1:{}", self.port)
    }

    async fn end(mut self) {
        self.child.kill().await.unwrap();
    }
}

fn proxy(url: &str) -> Proxy {
    url.parse().unwrap()
}

/// What a client says that cannot get through this proxy, with the advice.
async fn refusal(server: &FakeServer, url: &str) -> String {
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let client = server
        .client(state.path(), &seen)
        .proxy(proxy(url))
        .start()
        .await
        .unwrap();
    let told = seen.event_like("disconnected: the proxy").await;
    client.shutdown().await;
    assert!(!told.contains("s3cret"), "{told}");
    told
}

#[tokio::test]
async fn a_session_goes_through_a_real_proxy_and_survives_its_restart_by_a_new_one() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let tinyproxy = Tinyproxy::start(&[server.address.port()]).await;
    let client = server
        .client(state.path(), &seen)
        .network("office")
        .proxy(proxy(&tinyproxy.url("ann:s3cr%65t-one@")))
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    assert_eq!(peer.carrier, Carrier::WebSocket);
    peer.say([notify(1, 1), notify(2, 2)]).await;
    peer.acknowledged_up_to(2).await;
    assert_eq!(seen.titles(), ["1", "2"]);
    let found = inspect(state.path()).unwrap();
    let last = found.last_session.unwrap();
    let shown = format!("127.0.0.1:{}", tinyproxy.port);
    assert_eq!(last.proxy.as_deref(), Some(shown.as_str()));
    // The credentials are nowhere on disk.
    for entry in std::fs::read_dir(state.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        assert!(!bytes.windows(6).any(|bytes| bytes == b"s3cret"));
    }
    // The proxy dies: the link is lost, and what is told is about the proxy, not about the server.
    tinyproxy.end().await;
    seen.event_like("disconnected: the connection").await;
    seen.event_like("disconnected: the proxy").await;
    client.shutdown().await;
}

#[tokio::test]
async fn a_proxy_that_refuses_is_told_in_words_that_help() {
    let server = FakeServer::start(Udp::Quic).await;
    let port = server.address.port();
    let open = Tinyproxy::start(&[port]).await;
    let closed = Tinyproxy::start(&[1]).await;
    for (url, what, advice) in [
        (
            open.url(""),
            "it wants a user and a password (HTTP 407)",
            "http://user:password@host:port",
        ),
        (
            open.url("ann:s3cret-two@"),
            // tinyproxy says 401 where the standard has 407.
            "it does not accept this user and password (HTTP 401)",
            "percent-encoded",
        ),
        (
            closed.url("ann:s3cr%65t-one@"),
            "it forbids this server and port (HTTP 403)",
            "permit CONNECT",
        ),
    ] {
        let told = refusal(&server, &url).await;
        assert!(told.contains(what) && told.contains(advice), "{told}");
    }
    // The proxy is there and the server is not.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = nobody.local_addr().unwrap().port();
    drop(nobody);
    let through = Tinyproxy::start(&[port]).await;
    let dialer = Dialer::new(
        format!("localhost:{port}").parse().unwrap(),
        &Trust::Pem(server.ca_pem.clone()),
    );
    let dialer = dialer
        .unwrap()
        .with_proxy(Some(proxy(&through.url("ann:s3cr%65t-one@"))));
    let error = dialer.dial(Carrier::WebSocket).await.unwrap_err();
    let told = format!("{error} {}", error.advice());
    assert!(
        told.contains("cannot reach the server (HTTP 500)"),
        "{told}"
    );
    assert!(told.contains("Check that the server runs"), "{told}");
}

/// Takes connections and does this with each.
async fn impostor<F>(with: impl Fn(TcpStream) -> F + Send + 'static) -> SocketAddr
where
    F: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(with(stream));
        }
    });
    address
}

#[tokio::test]
async fn what_is_no_proxy_is_noticed_in_time_and_named() {
    let server = FakeServer::start(Udp::Quic).await;
    let silent = impostor(|mut stream| async move {
        let mut sink = Vec::new();
        let _ = stream.read_to_end(&mut sink).await;
    })
    .await;
    let closing = impostor(|mut stream| async move {
        let _ = stream.read_u8().await;
    })
    .await;
    let other = impostor(|mut stream| async move {
        let _ = stream.write_all(b"220 mail.example.org ESMTP\r\n").await;
        let _ = stream.read_u8().await;
    })
    .await;
    let endless = impostor(|mut stream| async move {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n").await;
        while stream
            .write_all(b"X-Filler: xxxxxxxxxxxxxxxx\r\n")
            .await
            .is_ok()
        {}
    })
    .await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let gone = nobody.local_addr().unwrap();
    drop(nobody);
    let url = |address: SocketAddr| format!("http://ann:s3cret@{address}");
    let urls = [silent, closing, other, endless, gone].map(url);
    let (silent, closing, other, endless, gone) = tokio::join!(
        refusal(&server, &urls[0]),
        refusal(&server, &urls[1]),
        refusal(&server, &urls[2]),
        refusal(&server, &urls[3]),
        refusal(&server, &urls[4]),
    );
    assert!(silent.contains("it does not answer within 8 s"), "{silent}");
    assert!(
        closing.contains("closed the connection") || closing.contains("broke"),
        "{closing}"
    );
    assert!(other.contains("it does not speak HTTP"), "{other}");
    assert!(
        endless.contains("longer than 8 KiB or 64 lines"),
        "{endless}"
    );
    assert!(gone.contains("cannot connect to 127.0.0.1"), "{gone}");
}

#[tokio::test]
async fn a_proxy_may_speak_tls_itself_by_an_authority_of_its_own() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let tinyproxy = Tinyproxy::start(&[server.address.port()]).await;
    let behind = tinyproxy.port;
    let (acceptor, proxy_ca) = acceptor();
    let front = impostor(move |stream| {
        let acceptor = acceptor.clone();
        async move {
            if let Ok(mut stream) = acceptor.accept(stream).await {
                let mut tinyproxy = TcpStream::connect(("127.0.0.1", behind)).await.unwrap();
                let _ = tokio::io::copy_bidirectional(&mut stream, &mut tinyproxy).await;
            }
        }
    })
    .await;
    let url = format!("https://ann:s3cr%65t-one@localhost:{}", front.port());
    // The server's authority says nothing about the proxy.
    let told = refusal(&server, &url).await;
    assert!(told.contains("its certificate is not trusted"), "{told}");
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let client = server
        .client(state.path(), &seen)
        .proxy(proxy(&url))
        .proxy_trust(Trust::Pem(proxy_ca))
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    peer.say([notify(1, 1)]).await;
    peer.acknowledged_up_to(1).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
}

#[tokio::test]
async fn a_proxy_that_is_only_there_for_need_is_used_where_nothing_else_works() {
    // UDP is swallowed, and nobody listens on the port that the client knows directly: the name that it dials exists for the
    // proxy alone.
    let mut server = FakeServer::start(Udp::Blackhole).await;
    let target = server.address;
    let forwarding = impostor(move |mut stream| async move {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await;
        let mut upstream = TcpStream::connect(target).await.unwrap();
        let _ = tokio::io::copy_bidirectional(&mut stream, &mut upstream).await;
    })
    .await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let closed = nobody.local_addr().unwrap().port();
    drop(nobody);
    let (seen, state) = (Seen::default(), tempfile::tempdir().unwrap());
    let (notifications, events) = (seen.clone(), seen.clone());
    let client = Client::builder()
        .server(format!("localhost:{closed}"))
        .device(crate::support::DEVICE, "a secret")
        .trust(Trust::Pem(server.ca_pem.clone()))
        .state_dir(state.path())
        .carriers(Carriers::Auto)
        .network("office")
        .proxy_when_needed(proxy(&format!("http://{forwarding}")))
        .on_notification(move |notification| notifications.notification(notification))
        .on_event(move |event| events.event(event))
        .start()
        .await
        .unwrap();
    let mut peer = server.accept().await;
    peer.welcome().await;
    seen.connected_times(1).await;
    let (_, ()) = tokio::join!(client.shutdown(), peer.goodbye());
    let networks = inspect(state.path()).unwrap().networks.unwrap();
    assert_eq!(networks[0].name, "office");
    assert_eq!(
        networks[0].proxy.as_deref(),
        Some(forwarding.to_string().as_str())
    );
}

#[tokio::test]
async fn the_command_takes_the_proxy_that_the_environment_names_except_for_what_it_excludes() {
    let mut server = FakeServer::start(Udp::Quic).await;
    let tinyproxy = Tinyproxy::start(&[server.address.port()]).await;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::write(path("ca"), &server.ca_pem).unwrap();
    let credentials = format!(
        r#"{{"device":"{}","secret":"a secret"}}"#,
        crate::support::DEVICE
    );
    std::fs::write(path("anna.json"), credentials).unwrap();
    let address = format!("localhost:{}", server.address.port());
    for (except, by_proxy) in [("", true), ("example.org, localhost", false)] {
        let state = path(if by_proxy { "proxy" } else { "direct" });
        let mut child = Command::new(env!("CARGO_BIN_EXE_bellwire-device"))
            .args(["listen", "--json", "--count", "1", "--proxy", "env"])
            .args(["--server", &address, "--ca"])
            .arg(path("ca"))
            .arg("--credentials")
            .arg(path("anna.json"))
            .arg("--state-dir")
            .arg(&state)
            .env_remove("https_proxy")
            .env_remove("no_proxy")
            .env("HTTPS_PROXY", tinyproxy.url("ann:s3cr%65t-one@"))
            .env("NO_PROXY", except)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut peer = server.accept().await;
        peer.welcome().await;
        peer.say([notify(1, 1)]).await;
        peer.goodbye().await;
        let ended = tokio::time::timeout(PATIENCE, child.wait()).await;
        assert!(ended.unwrap().unwrap().success());
        let last = inspect(&state).unwrap().last_session.unwrap();
        assert_eq!(last.proxy.is_some(), by_proxy, "{last:?}");
    }
}
