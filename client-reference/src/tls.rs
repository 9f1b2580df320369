//! Whom the client trusts, and the TLS settings of both carriers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use bellwire_protocol::ALPN;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

/// Where Linux distributions keep the authorities that the operator of the machine trusts.
pub const SYSTEM_CA_FILES: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Greatest PEM file that is read, in bytes. System bundles have about 250 KB.
const PEM_MAX_BYTES: u64 = 8 * 1024 * 1024;

/// Whose certificates the client accepts. Nothing is built in: a company's wire is signed by the company's authority.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Trust {
    /// The authorities in this PEM file, and no others.
    File(PathBuf),
    /// The authorities in this PEM text, and no others.
    Pem(Vec<u8>),
    /// Those that the machine trusts ([`SYSTEM_CA_FILES`]).
    System,
}

/// Why nobody can be trusted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TrustError {
    /// A file cannot be read.
    #[error("cannot read the CA file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The answer of the operating system.
        source: std::io::Error,
    },
    /// There is no certificate in it.
    #[error(
        "{place} holds no usable certificate: expected PEM blocks that begin with -----BEGIN CERTIFICATE----- (the authority's certificate, not its key)"
    )]
    Empty {
        /// The file, or what stands for it.
        place: String,
    },
    /// The machine has no file of trusted authorities.
    #[error("this machine has no file of trusted authorities; name the CA of your server")]
    NoSystemStore,
    /// The cryptographic library refused the settings.
    #[error("cannot set up TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl Trust {
    fn roots(&self) -> Result<RootCertStore, TrustError> {
        match self {
            Self::Pem(pem) => roots(pem, "the CA text"),
            Self::File(path) => roots(&read(path)?, &path.display().to_string()),
            Self::System => {
                let path = SYSTEM_CA_FILES
                    .iter()
                    .map(Path::new)
                    .find(|path| path.exists());
                let path = path.ok_or(TrustError::NoSystemStore)?;
                roots(&read(path)?, &path.display().to_string())
            }
        }
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TrustError> {
    use std::io::Read;
    let failed = |source| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(PEM_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok(bytes)
}

fn roots(pem: &[u8], place: &str) -> Result<RootCertStore, TrustError> {
    let mut roots = RootCertStore::empty();
    // System bundles carry a few certificates that the verifier does not take; the others count.
    let certificates = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok);
    roots.add_parsable_certificates(certificates);
    match roots.is_empty() {
        true => Err(TrustError::Empty {
            place: place.to_owned(),
        }),
        false => Ok(roots),
    }
}

/// TLS for both carriers, made once and shared by all connections, so that sessions resume.
#[derive(Debug, Clone)]
pub(crate) struct Tls {
    /// For WebSocket: TLS 1.2 and up.
    pub(crate) tcp: Arc<ClientConfig>,
    /// For QUIC: TLS 1.3, ALPN `bellwire/1`.
    pub(crate) quic: Arc<ClientConfig>,
    /// For a proxy that speaks TLS itself: TLS 1.2 and up, perhaps with authorities of its own.
    pub(crate) proxy: Arc<ClientConfig>,
}

impl Tls {
    /// No early data on either: a replayed `hello` could replace a session.
    pub(crate) fn new(trust: &Trust) -> Result<Self, TrustError> {
        Self::with_roots(trust.roots()?)
    }

    /// Trusts nobody: for links that need nobody's trust.
    pub(crate) fn of_nobody() -> Result<Self, TrustError> {
        Self::with_roots(RootCertStore::empty())
    }

    fn with_roots(roots: RootCertStore) -> Result<Self, TrustError> {
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tcp = Arc::new(over_tcp(roots.clone())?);
        let mut quic = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(roots)
            .with_no_client_auth();
        quic.alpn_protocols = vec![ALPN.to_vec()];
        Ok(Self {
            proxy: tcp.clone(),
            tcp,
            quic: Arc::new(quic),
        })
    }

    /// The same with other authorities for the proxy.
    pub(crate) fn with_proxy_trust(self, trust: &Trust) -> Result<Self, TrustError> {
        let proxy = Arc::new(over_tcp(Arc::new(trust.roots()?))?);
        Ok(Self { proxy, ..self })
    }
}

fn over_tcp(roots: Arc<RootCertStore>) -> Result<ClientConfig, TrustError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    Ok(ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])?
        .with_root_certificates(roots)
        .with_no_client_auth())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_file_without_certificates_is_refused_by_name() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ca.pem");
        std::fs::write(&path, "hello").unwrap();
        let error = Tls::new(&Trust::File(path)).unwrap_err().to_string();
        assert!(
            error.contains("ca.pem") && error.contains("BEGIN CERTIFICATE"),
            "{error}"
        );
        let error = Tls::new(&Trust::File(directory.path().join("absent.pem"))).unwrap_err();
        assert!(matches!(error, TrustError::Read { .. }), "{error}");
        assert!(matches!(
            Tls::new(&Trust::Pem(Vec::new())),
            Err(TrustError::Empty { .. })
        ));
    }
}
