//! Certificates of both listeners: loaded, looked at, and exchanged while serving.

use std::sync::Arc;

use arc_swap::ArcSwap;
use bellwire_certs::{CertError, check_server_files};
use bellwire_server::config::{Checked, PemPair};
use bellwire_server::http::{ALPN, TlsSource};
use bellwire_server::transport::{PemSource, Suites, TlsSettings};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::cli::files::{DataDir, cert};
use crate::cli::{Failure, now};

/// The certificate for devices: the operator's, or one for development, said loudly.
pub(super) fn devices_tls(checked: &Checked, data: &DataDir) -> Result<TlsSettings, Failure> {
    let pair = match &checked.tls {
        Some(pair) => {
            check_pair(pair)?;
            pair.clone()
        }
        None => {
            let dev = data.dev_certificate(checked.listen.devices.ip(), now())?;
            let ca = dev.ca.display();
            if dev.fresh {
                tracing::warn!(%ca, "a certificate for development was made; devices must trust this authority");
            } else {
                tracing::warn!(%ca, "the certificate is one for development; devices must trust this authority");
            }
            dev.pair
        }
    };
    Ok(TlsSettings {
        chain: PemSource::File(pair.cert),
        key: PemSource::File(pair.key),
        suites: suites(checked),
    })
}

fn suites(checked: &Checked) -> Suites {
    match checked.aes_256_only {
        true => Suites::Aes256,
        false => Suites::All,
    }
}

/// Looks at a certificate before it is used. One that has ended is said loudly but used: a server that does not come up
/// again helps nobody, and whoever checks dates will refuse it anyway.
fn check_pair(pair: &PemPair) -> Result<(), Failure> {
    match check_server_files(&pair.cert, &pair.key, now()) {
        Ok(_) => Ok(()),
        Err(error) if of_time(&error) => {
            tracing::error!("{error}; devices will refuse it");
            Ok(())
        }
        Err(error) => Err(cert(&error)),
    }
}

fn of_time(error: &CertError) -> bool {
    if let CertError::InFile { error, .. } = error {
        return of_time(error);
    }
    matches!(
        error,
        CertError::Expired { .. } | CertError::NotYetValid { .. }
    )
}

/// The API's TLS and what takes its place.
pub(super) type FreshApi<'a> = (&'a ApiTls, Arc<rustls::ServerConfig>);

/// TLS of the API, exchanged while serving.
pub(super) struct ApiTls {
    current: Arc<ArcSwap<rustls::ServerConfig>>,
    provider: Arc<CryptoProvider>,
}

impl ApiTls {
    pub(super) fn new(pair: &PemPair, checked: &Checked) -> Result<ApiTls, Failure> {
        let provider = Arc::new(suites(checked).provider());
        let first = load(pair, &provider)?;
        Ok(ApiTls {
            current: Arc::new(ArcSwap::new(first)),
            provider,
        })
    }

    /// Reads and checks another certificate; changes nothing.
    pub(super) fn load(&self, pair: &PemPair) -> Result<Arc<rustls::ServerConfig>, Failure> {
        load(pair, &self.provider)
    }

    pub(super) fn source(&self) -> TlsSource {
        let current = Arc::clone(&self.current);
        Arc::new(move || current.load_full())
    }

    /// Newcomers are shown this one from now on.
    pub(super) fn take(&self, fresh: Arc<rustls::ServerConfig>) {
        self.current.store(fresh);
    }
}

fn load(
    pair: &PemPair,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<rustls::ServerConfig>, Failure> {
    check_pair(pair)?;
    let unusable = |why: String| {
        Failure::new(
            format!(
                "the API's certificate {} cannot be used: {why}",
                pair.cert.display()
            ),
            "look at api.cert and api.key with: bellwire certs inspect FILE --key FILE",
        )
    };
    let chain = CertificateDer::pem_file_iter(&pair.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|error| unusable(error.to_string()))?;
    let key =
        PrivateKeyDer::from_pem_file(&pair.key).map_err(|error| unusable(error.to_string()))?;
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| unusable(error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(|error| unusable(error.to_string()))?;
    config.alpn_protocols = ALPN.iter().map(|name| name.to_vec()).collect();
    Ok(Arc::new(config))
}
