//! Certificates and TLS for servers and clients that only exist while something is measured.

use std::sync::Arc;

use bellwire_certs::{DevAuthority, Issued, Validity};
use rustls::client::Resumption;
use rustls::server::NoServerSessionStorage;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use time::OffsetDateTime;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::failure::{During, Outcome};

/// The name in the certificates of servers measured here.
pub(crate) const SERVER_NAME: &str = "localhost";

/// A server's certificate with its key, and the authority that it comes from.
pub(crate) struct Identity {
    pub(crate) issued: Issued,
    /// PEM.
    pub(crate) authority: String,
}

impl Identity {
    /// A fresh one, as `bellwire serve` makes for itself at its first start.
    pub(crate) fn fresh() -> Outcome<Identity> {
        let now = OffsetDateTime::now_utc();
        let validity = Validity::authority(now).during("date a certificate")?;
        let authority = DevAuthority::generate("Bench", validity).during("make an authority")?;
        let names = [SERVER_NAME, "127.0.0.1"]
            .iter()
            .map(|name| name.parse())
            .collect::<Result<Vec<_>, _>>()
            .during("name the server")?;
        let validity = Validity::leaf(now).during("date a certificate")?;
        let issued = authority
            .server(&names, validity)
            .during("make a certificate")?;
        Ok(Identity {
            issued,
            authority: authority.certificate_pem().to_owned(),
        })
    }

    /// As the server's own: TLS 1.3, one ticket, no state kept for it, no early data.
    pub(crate) fn server(&self) -> Outcome<ServerConfig> {
        let chain = CertificateDer::pem_slice_iter(self.issued.chain_pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .during("read a certificate")?;
        let key =
            PrivateKeyDer::from_pem_slice(self.issued.key_pem.as_bytes()).during("read a key")?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .during("set up TLS")?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .during("set up TLS")?;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new().during("set up tickets")?;
        config.send_tls13_tickets = 1;
        Ok(config)
    }
}

/// What a client needs that trusts the authorities in `authority` (PEM). Every handshake is a full one.
pub(crate) fn client(authority: &[u8]) -> Outcome<ClientConfig> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authority) {
        roots
            .add(certificate.during("read the server's authority")?)
            .during("trust the server's authority")?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .during("set up TLS")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// Puts TLS over a connection that stands.
pub(crate) async fn over(
    connector: &TlsConnector,
    tcp: TcpStream,
) -> Outcome<TlsStream<TcpStream>> {
    let name = ServerName::try_from(SERVER_NAME).during("name the server")?;
    connector
        .connect(name, tcp)
        .await
        .during("complete the TLS handshake")
}
