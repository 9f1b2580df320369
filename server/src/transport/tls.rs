//! The one place that configures TLS: which versions, which provider, which names are spoken inside.
//!
//! Both carriers show the same certificate. On TCP TLS 1.2 and up is spoken, with `http/1.1` as the only application
//! protocol: a client that offers nothing is let in, one that offers only others is refused by TLS itself. On QUIC it
//! is TLS 1.3 and `bellwire/1`. Session tickets are on, so that a returning device saves a round trip; early data is
//! off, because a replayed `hello` could push out a living session (docs/protocol.md).
//!
//! Of the cipher suites that a client offers, our order decides: AES-128-GCM with SHA-256 before AES-256-GCM with SHA-384 and
//! ChaCha20 (decision 0049). Whoever must speak AES-256 and nothing else says so ([`Suites`]).
//!
//! The provider is named wherever a configuration is made, so that nothing depends on a process-wide default.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use quinn_proto::crypto::rustls::QuicServerConfig;
use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::server::{NoServerSessionStorage, ProducesTickets};
use rustls::version::{TLS12, TLS13};
use rustls::{CipherSuite, ServerConfig, SupportedProtocolVersion, Tls13CipherSuite};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use bellwire_protocol::ALPN;

/// The application protocol inside TLS on TCP: WebSocket starts as HTTP/1.1 (RFC 6455 section 4.1).
const ALPN_HTTP: &[u8] = b"http/1.1";

/// Most bytes of a PEM file that are read. Chains of ten certificates stay below; a larger file is the wrong file.
const PEM_MAX_BYTES: u64 = 256 * 1024;

/// Tickets sent with each full handshake: a device comes back with one connection at a time.
const TICKETS_PER_HANDSHAKE: usize = 1;

/// Where a PEM text comes from.
#[derive(Clone)]
pub enum PemSource {
    /// A file, read now and again at every reload.
    File(PathBuf),
    /// The text itself.
    Text(Vec<u8>),
}

impl fmt::Debug for PemSource {
    // A text may be a private key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PemSource::File(path) => write!(f, "File({})", path.display()),
            PemSource::Text(text) => write!(f, "Text({} bytes)", text.len()),
        }
    }
}

impl PemSource {
    fn read(&self, what: &'static str) -> Result<Vec<u8>, TlsError> {
        match self {
            PemSource::Text(text) => Ok(text.clone()),
            PemSource::File(path) => {
                let failed = |source| TlsError::Unreadable {
                    what,
                    path: path.clone(),
                    source,
                };
                let length = std::fs::metadata(path).map_err(failed)?.len();
                if length > PEM_MAX_BYTES {
                    return Err(TlsError::TooLarge {
                        what,
                        path: path.clone(),
                    });
                }
                std::fs::read(path).map_err(failed)
            }
        }
    }

    fn place(&self) -> String {
        match self {
            PemSource::File(path) => path.display().to_string(),
            PemSource::Text(_) => "the text given".to_owned(),
        }
    }
}

/// Which cipher suites are spoken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Suites {
    /// Those of the library, in our order.
    #[default]
    All,
    /// AES-256-GCM with SHA-384 alone. QUIC's first packets keep the protection that RFC 9001 section 5.2 gives them: its keys are
    /// known to everybody, and hide nothing.
    Aes256,
}

impl Suites {
    /// The cryptography, with these suites in our order: AES with 128 bits and SHA-256 come first.
    #[must_use]
    pub fn provider(self) -> CryptoProvider {
        let mut provider = aws_lc_rs::default_provider();
        let suites = &mut provider.cipher_suites;
        match self {
            Suites::All => suites.sort_by_key(|suite| !is_light(suite.suite())),
            Suites::Aes256 => suites.retain(|suite| is_aes_256(suite.suite())),
        }
        provider
    }
}

/// The certificate that the device port shows, and its key.
#[derive(Debug, Clone)]
pub struct TlsSettings {
    /// The server's certificate first, then those that lead to the authority; PEM.
    pub chain: PemSource,
    /// The private key of the first certificate; PEM (PKCS#8, PKCS#1 or SEC1), not encrypted.
    pub key: PemSource,
    /// What is spoken. Fixed at the start: a reload takes the pair alone.
    pub suites: Suites,
}

/// Why TLS cannot be set up. All of it is the operator's to mend.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("the {what} {path} cannot be read: {source}", path = path.display())]
    Unreadable {
        /// Certificate or key.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is so large that it cannot be what it is meant to be.
    #[error("the {what} {path} is larger than 256 KiB, so it is not a {what}", path = path.display())]
    TooLarge {
        /// Certificate or key.
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// The PEM text is broken.
    #[error("the {what} in {place} is not well-formed PEM: {reason}")]
    Pem {
        /// Certificate or key.
        what: &'static str,
        /// Where.
        place: String,
        /// Why.
        reason: String,
    },
    /// There is no certificate in the PEM text.
    #[error("there is no certificate in {place}: it needs at least one BEGIN CERTIFICATE block")]
    NoCertificate {
        /// Where.
        place: String,
    },
    /// There is no private key in the PEM text.
    #[error(
        "there is no private key in {place}: it needs a BEGIN PRIVATE KEY block that is not encrypted"
    )]
    NoKey {
        /// Where.
        place: String,
    },
    /// Certificate and key do not fit each other, or not us.
    #[error("certificate and key cannot be used together: {0}")]
    Unusable(#[from] rustls::Error),
    /// The key is of a kind that TLS 1.3 on QUIC cannot use.
    #[error("QUIC cannot use this configuration: {0}")]
    Quic(#[from] quinn_proto::crypto::rustls::NoInitialCipherSuite),
}

/// TLS for both carriers. What is handed out is for the next connection; [`Tls::take`] changes what comes after.
pub(crate) struct Tls {
    provider: Arc<CryptoProvider>,
    /// Outlives reloads, so that tickets given before are good after.
    ticketer: Arc<dyn ProducesTickets>,
    tcp: ArcSwap<ServerConfig>,
    quic: ArcSwap<QuicServerConfig>,
}

impl Tls {
    /// TLS with this certificate.
    ///
    /// # Errors
    /// When certificate or key cannot be read or used.
    pub(crate) fn new(settings: &TlsSettings) -> Result<Tls, TlsError> {
        let provider = Arc::new(settings.suites.provider());
        let ticketer = aws_lc_rs::Ticketer::new()?;
        let pair = Pair::load(settings)?;
        let (tcp, quic) = configure(&provider, &ticketer, &pair)?;
        Ok(Tls {
            provider,
            ticketer,
            tcp: ArcSwap::new(tcp),
            quic: ArcSwap::new(quic),
        })
    }

    /// Reads and checks another certificate; changes nothing.
    ///
    /// # Errors
    /// When certificate or key cannot be read or used.
    pub(crate) fn prepare(&self, settings: &TlsSettings) -> Result<Prepared, TlsError> {
        let pair = Pair::load(settings)?;
        let (tcp, quic) = configure(&self.provider, &self.ticketer, &pair)?;
        Ok(Prepared { tcp, quic })
    }

    /// Takes another certificate for new connections; living ones keep theirs.
    pub(crate) fn take(&self, prepared: Prepared) {
        self.tcp.store(prepared.tcp);
        self.quic.store(prepared.quic);
    }

    /// The configuration for the next TCP connection.
    pub(crate) fn tcp(&self) -> Arc<ServerConfig> {
        self.tcp.load_full()
    }

    /// The configuration for the next QUIC connections.
    pub(crate) fn quic(&self) -> Arc<QuicServerConfig> {
        self.quic.load_full()
    }
}

/// A certificate that was read and checked, to be taken once everything else is in order too.
pub struct Prepared {
    tcp: Arc<ServerConfig>,
    quic: Arc<QuicServerConfig>,
}

/// A chain and its key, read but not yet tried together.
struct Pair {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Pair {
    fn load(settings: &TlsSettings) -> Result<Pair, TlsError> {
        let text = settings.chain.read("certificate")?;
        let chain = CertificateDer::pem_slice_iter(&text)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| malformed("certificate", &settings.chain, &error))?;
        if chain.is_empty() {
            return Err(TlsError::NoCertificate {
                place: settings.chain.place(),
            });
        }
        let text = zeroize::Zeroizing::new(settings.key.read("private key")?);
        let key = PrivateKeyDer::from_pem_slice(&text).map_err(|error| {
            if matches!(error, pem::Error::NoItemsFound) {
                let place = settings.key.place();
                return TlsError::NoKey { place };
            }
            malformed("private key", &settings.key, &error)
        })?;
        Ok(Pair { chain, key })
    }
}

fn malformed(what: &'static str, source: &PemSource, error: &pem::Error) -> TlsError {
    TlsError::Pem {
        what,
        place: source.place(),
        reason: error.to_string(),
    }
}

/// Suites whose hash processors have instructions for. A handshake hashes much and says little: over SHA-384 it costs a tenth
/// more.
fn is_light(suite: CipherSuite) -> bool {
    [
        CipherSuite::TLS13_AES_128_GCM_SHA256,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256,
    ]
    .contains(&suite)
}

fn is_aes_256(suite: CipherSuite) -> bool {
    [
        CipherSuite::TLS13_AES_256_GCM_SHA384,
        CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
        CipherSuite::TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384,
    ]
    .contains(&suite)
}

type Configs = (Arc<ServerConfig>, Arc<QuicServerConfig>);

fn configure(
    provider: &Arc<CryptoProvider>,
    ticketer: &Arc<dyn ProducesTickets>,
    pair: &Pair,
) -> Result<Configs, TlsError> {
    let build = |versions: &[&'static SupportedProtocolVersion],
                 alpn: &[u8]|
     -> Result<ServerConfig, TlsError> {
        let mut config = ServerConfig::builder_with_provider(Arc::clone(provider))
            .with_protocol_versions(versions)?
            .with_no_client_auth()
            .with_single_cert(pair.chain.clone(), pair.key.clone_key())?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // Ours counts. A device that wants no other suite offers no other.
        config.ignore_client_order = true;
        config.ticketer = Arc::clone(ticketer);
        // Tickets carry the state, so that an absent device costs no memory here.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = TICKETS_PER_HANDSHAKE;
        config.max_early_data_size = 0;
        Ok(config)
    };
    let tcp = build(&[&TLS13, &TLS12], ALPN_HTTP)?;
    let quic = build(&[&TLS13], ALPN)?;
    // The suite of the first packets is stated by RFC 9001, whatever is spoken after them.
    let first = TLS13_AES_128_GCM_SHA256.tls13();
    let quic = match first.and_then(Tls13CipherSuite::quic_suite) {
        Some(first) => QuicServerConfig::with_initial(Arc::new(quic), first)?,
        None => QuicServerConfig::try_from(quic)?,
    };
    Ok((Arc::new(tcp), Arc::new(quic)))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::transport::testing;

    fn text(text: &str) -> PemSource {
        PemSource::Text(text.as_bytes().to_vec())
    }

    #[test]
    fn a_good_pair_is_taken_and_can_be_reloaded() {
        let (first, second) = (testing::tls(), testing::tls());
        let tls = Tls::new(&first).unwrap();
        let before = tls.tcp();
        tls.take(tls.prepare(&second).unwrap());
        assert!(!Arc::ptr_eq(&before, &tls.tcp()));
        assert_eq!(tls.tcp().max_early_data_size, 0);
    }

    #[test]
    fn what_is_wrong_with_a_pair_is_said_and_a_failed_reload_changes_nothing() {
        let (good, other) = (testing::tls(), testing::tls());
        let tls = Tls::new(&good).unwrap();
        let before = tls.tcp();
        let with = |chain: &PemSource, key: &PemSource| TlsSettings {
            chain: chain.clone(),
            key: key.clone(),
            suites: Suites::All,
        };
        let missing = PemSource::File("/nonexistent/chain.pem".into());
        let cases = [
            (
                with(&missing, &good.key),
                "/nonexistent/chain.pem cannot be read",
            ),
            (
                with(&text(""), &good.key),
                "there is no certificate in the text given",
            ),
            (
                with(&good.chain, &text("")),
                "there is no private key in the text given",
            ),
            (
                with(&good.chain, &good.chain),
                "there is no private key in the text given",
            ),
            (
                with(
                    &text("-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"),
                    &good.key,
                ),
                "is not well-formed PEM",
            ),
            (with(&good.chain, &other.key), "cannot be used together"),
        ];
        for (settings, expected) in cases {
            let error = tls.prepare(&settings).err().unwrap().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(Arc::ptr_eq(&before, &tls.tcp()));
    }
}
