//! Ports: free for a server that will start, or answered by the one that runs; and whether QUIC comes through.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;

use bellwire_certs::{DevAuthority, Validity};
use bellwire_server::config::{AnyKey, Checked, keys};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::ServerCertVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::time::timeout;

use super::certificates::Look;
use super::{ANSWER_MAX, TEXT_MAX};
use crate::cli::api::{ListenFile, reachable};
use crate::cli::check::cannot_listen;
use crate::cli::findings::{Finding, failed, good, warned};
use crate::cli::now;

/// A server is said to run: does it answer, wherever it listens? Answers with the certificate that it shows to devices.
pub(super) async fn running_server(
    listen: &ListenFile,
    findings: &mut Vec<Finding>,
) -> Option<CertificateDer<'static>> {
    findings.push(match readiness(reachable(listen.operations)) {
        Ok(answer) if is_ready(&answer) => good(
            "server",
            format!(
                "the server with process id {} runs and is ready",
                listen.pid
            ),
        ),
        Ok(answer) => failed(
            "server",
            format!(
                "the server with process id {} runs and is not ready: {}",
                listen.pid,
                answer.lines().next().unwrap_or_default()
            ),
            "see `bellwire status` and the log",
        ),
        Err(error) => failed(
            "server",
            format!(
                "the server with process id {} does not answer on {}: {error}",
                listen.pid, listen.operations
            ),
            "it was killed, or hangs: look at its log and start it again",
        ),
    });
    let plain = listen
        .devices_plain
        .map(|plain| ("load balancers, TCP", plain));
    for (about, address) in [("devices, TCP", listen.devices), ("API, TCP", listen.api)]
        .into_iter()
        .chain(plain)
    {
        let target = reachable(address);
        findings.push(match TcpStream::connect_timeout(&target, ANSWER_MAX) {
            Ok(_) => good(about, format!("{target} takes connections")),
            Err(error) => failed(
                about,
                format!("{target} takes no connection: {error}"),
                "look for a packet filter on this machine",
            ),
        });
    }
    let (found, shown) = handshake(reachable(listen.devices), None).await;
    findings.push(found);
    shown
}

/// Whether an answer of HTTP/1.1 says 200. What stands behind its first line says nothing about that.
fn is_ready(answer: &str) -> bool {
    let line = answer.split("\r\n").next().unwrap_or_default();
    let mut words = line.split(' ');
    words
        .next()
        .is_some_and(|version| version.starts_with("HTTP/1."))
        && words.next() == Some("200")
}

/// The answer of `/readyz`.
fn readiness(operations: SocketAddr) -> io::Result<String> {
    let mut tcp = TcpStream::connect_timeout(&operations, ANSWER_MAX)?;
    tcp.set_read_timeout(Some(ANSWER_MAX))?;
    tcp.set_write_timeout(Some(ANSWER_MAX))?;
    write!(
        tcp,
        "GET /readyz HTTP/1.1\r\nhost: {operations}\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    tcp.take(TEXT_MAX).read_to_string(&mut answer)?;
    Ok(answer)
}

/// No server runs: could one listen, and does QUIC come through?
pub(super) async fn free_ports(checked: &Checked, findings: &mut Vec<Finding>) {
    let listen = &checked.listen;
    let tcp = |address: SocketAddr| TcpListener::bind(address).map(drop);
    let mut looks: Vec<(&'static str, &dyn AnyKey, SocketAddr)> = vec![
        ("devices, TCP", &keys::LISTEN_DEVICES, listen.devices),
        ("API, TCP", &keys::LISTEN_API, listen.api),
        (
            "operations, TCP",
            &keys::LISTEN_OPERATIONS,
            listen.operations,
        ),
    ];
    if let Some(plain) = listen.devices_plain {
        looks.push(("load balancers, TCP", &keys::LISTEN_DEVICES_PLAIN, plain));
    }
    for (about, key, address) in looks {
        findings.push(match tcp(address) {
            Ok(()) => good(about, format!("{address} is free")),
            Err(error) => failed(
                about,
                cannot_listen(key.name(), address, &error),
                "then run this again",
            ),
        });
    }
    match UdpSocket::bind(listen.devices) {
        Ok(socket) => findings.push(handshake(listen.devices, Some(socket)).await.0),
        Err(error) => findings.push(failed(
            "devices, UDP",
            cannot_listen(keys::LISTEN_DEVICES.name, listen.devices, &error),
            "then run this again",
        )),
    }
}

/// A QUIC handshake with whoever listens there, or with a listener of our own on this socket. That the certificate is
/// then refused is expected: it shows that packets pass in both directions.
async fn handshake(
    address: SocketAddr,
    listener: Option<UdpSocket>,
) -> (Finding, Option<CertificateDer<'static>>) {
    const ABOUT: &str = "devices, UDP";
    let own = match listener.map(own_listener).transpose() {
        Ok(own) => own,
        Err(error) => {
            let text = format!("QUIC could not be tried: {error}");
            return (warned(ABOUT, text, "run this again"), None);
        }
    };
    let address = match &own {
        Some(endpoint) => match endpoint.local_addr() {
            Ok(bound) => reachable(bound),
            Err(_) => address,
        },
        None => address,
    };
    let serving = own.clone().map(|endpoint| {
        tokio::spawn(async move {
            if let Some(incoming) = endpoint.accept().await {
                // The peer breaks it off; that it came so far is what matters.
                let _ = incoming.await;
            }
        })
    });
    let look = Look::new();
    let tried = try_quic(address, &look).await;
    if let Some(serving) = serving {
        serving.abort();
    }
    let found = match tried {
        Ok(true) => good(
            ABOUT,
            format!("a QUIC handshake with {address} passes on this machine"),
        ),
        Ok(false) => failed(
            ABOUT,
            format!("nothing came back of a QUIC handshake with {address} on this machine"),
            "look for a packet filter that drops UDP; without UDP devices use WebSocket",
        ),
        Err(error) => warned(
            ABOUT,
            format!("QUIC could not be tried: {error}"),
            "run this again",
        ),
    };
    (found, look.shown())
}

fn own_listener(socket: UdpSocket) -> io::Result<quinn::Endpoint> {
    let authority = DevAuthority::generate(
        "doctor",
        Validity::authority(now()).map_err(io::Error::other)?,
    )
    .map_err(io::Error::other)?;
    let name = "localhost".parse().map_err(io::Error::other)?;
    let issued = authority
        .server(&[name], Validity::leaf(now()).map_err(io::Error::other)?)
        .map_err(io::Error::other)?;
    let chain = CertificateDer::pem_slice_iter(issued.chain_pem.as_bytes())
        .collect::<Result<Vec<_>, _>>()
        .map_err(io::Error::other)?;
    let key = PrivateKeyDer::from_pem_slice(issued.key_pem.as_bytes()).map_err(io::Error::other)?;
    let mut tls = rustls::ServerConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    tls.alpn_protocols = vec![bellwire_protocol::ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).map_err(io::Error::other)?;
    socket.set_nonblocking(true)?;
    quinn::Endpoint::new(
        quinn::EndpointConfig::default(),
        Some(quinn::ServerConfig::with_crypto(Arc::new(crypto))),
        socket,
        Arc::new(quinn::TokioRuntime),
    )
}

/// Whether something came back.
async fn try_quic(address: SocketAddr, look: &Arc<Look>) -> io::Result<bool> {
    let mut tls = rustls::ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13])
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(look) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    tls.alpn_protocols = vec![bellwire_protocol::ALPN.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
    let any: SocketAddr = if address.is_ipv4() {
        (std::net::Ipv4Addr::UNSPECIFIED, 0).into()
    } else {
        (std::net::Ipv6Addr::UNSPECIFIED, 0).into()
    };
    let endpoint = quinn::Endpoint::client(any)?;
    let connecting = endpoint
        .connect_with(
            quinn::ClientConfig::new(Arc::new(crypto)),
            address,
            "localhost",
        )
        .map_err(io::Error::other)?;
    // Any end but a silent one shows that the peer was heard.
    Ok(match timeout(ANSWER_MAX, connecting).await {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => !matches!(error, quinn::ConnectionError::TimedOut),
        Err(_) => false,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::cli::findings::Mark;

    #[test]
    fn only_the_status_line_says_that_a_server_is_ready() {
        assert!(is_ready("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"));
        assert!(is_ready("HTTP/1.1 200 \r\n\r\n"));
        for other in [
            "HTTP/1.1 503 Service Unavailable\r\nx-waits: 200 \r\n\r\nsince 200 ms",
            "HTTP/1.1 503 after 200 ms\r\n\r\n",
            "HTTP/1.1 2000 OK\r\n\r\n",
            "SSH-2.0 200 \r\n",
            "",
        ] {
            assert!(!is_ready(other), "{other}");
        }
    }

    #[tokio::test]
    async fn a_handshake_shows_whether_packets_come_back() {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (found, shown) = handshake(address, Some(listener)).await;
        assert_eq!(found.mark, Mark::Good, "{found:?}");
        assert!(shown.is_some(), "a certificate was seen");
        // Somebody who takes packets and says nothing.
        let silent = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (found, shown) = handshake(silent.local_addr().unwrap(), None).await;
        assert_eq!(found.mark, Mark::Failed, "{found:?}");
        assert_eq!(shown, None);
    }
}
