//! Certificates: as the files have them, and as a running server shows them.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use bellwire_certs::{AltName, CertInfo, check_server_files};
use bellwire_server::config::{ApiAccess, Checked, PemPair};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::ANSWER_MAX;
use crate::cli::api::{ListenFile, reachable};
use crate::cli::files::DEV_SERVER;
use crate::cli::findings::{Finding, failed, good, warned};
use crate::cli::now;

/// A certificate that ends within so many days is worth a word.
const SOON_DAYS: i64 = 30;

pub(super) fn look(checked: &Checked, findings: &mut Vec<Finding>) {
    const DEVICES: &str = "devices' certificate";
    match &checked.tls {
        Some(pair) => {
            let outside = !checked.listen.devices.ip().is_loopback();
            findings.push(certificate(DEVICES, pair, outside));
        }
        None => findings.push(warned(
            DEVICES,
            "none is set, so one for development is made",
            "set tls.cert and tls.key before real devices connect",
        )),
    }
    if let ApiAccess::Https(pair) = &checked.api {
        let outside = !checked.listen.api.ip().is_loopback();
        findings.push(certificate("API's certificate", pair, outside));
    }
}

fn certificate(about: &'static str, pair: &PemPair, outside: bool) -> Finding {
    let moment = now();
    let file = pair.cert.display();
    let chain = match check_server_files(&pair.cert, &pair.key, moment) {
        Ok(chain) => chain,
        Err(error) => {
            return failed(
                about,
                error.to_string(),
                format!(
                    "look at it with: bellwire certs inspect {file} --key {}",
                    pair.key.display()
                ),
            );
        }
    };
    let Some(leaf) = chain.first() else {
        return failed(
            about,
            format!("{file} holds no certificate"),
            "put the chain into it",
        );
    };
    let names: Vec<String> = leaf.alt_names.iter().map(ToString::to_string).collect();
    let found = format!(
        "{file} fits its key, names {}, has {} in its chain and is valid until {}",
        names.join(", "),
        chain.len(),
        leaf.not_after
    );
    if outside && leaf.alt_names.iter().all(is_local) {
        return warned(
            about,
            found,
            "it names this machine only, and devices elsewhere will refuse it: get one with the name that they connect to",
        );
    }
    let soon = moment + time::Duration::days(SOON_DAYS);
    let ends_soon = |info: &&CertInfo| info.check_time(soon).is_err();
    match chain.iter().find(ends_soon) {
        Some(info) => warned(
            about,
            found,
            format!(
                "{} ends at {}: renew it, then `systemctl reload bellwire` (SIGHUP)",
                info.subject, info.not_after
            ),
        ),
        None => good(about, found),
    }
}

fn is_local(name: &AltName) -> bool {
    match name {
        AltName::Dns(name) => name == "localhost" || name.ends_with(".localhost"),
        AltName::Ip(ip) => ip.is_loopback(),
        AltName::Uri(_) | AltName::Other(_) => true,
    }
}

// ---- As they are shown ---------------------------------------------------------------------------------------------

/// Compares what a running server shows with what its files hold: a renewed certificate that was never reloaded works
/// until the old one ends, and then for nobody.
pub(super) async fn look_at_shown(
    checked: &Checked,
    listen: &ListenFile,
    devices: Option<CertificateDer<'static>>,
    findings: &mut Vec<Finding>,
) {
    let development = checked.data_dir.join(DEV_SERVER);
    let file = checked.tls.as_ref().map_or(&development, |pair| &pair.cert);
    findings.extend(devices.map(|shown| compare("shown to devices", file, &shown)));
    if let ApiAccess::Https(pair) = &checked.api {
        let shown = shown_over_tcp(reachable(listen.api)).await;
        findings.extend(shown.map(|shown| compare("shown by the API", &pair.cert, &shown)));
    }
}

fn compare(about: &'static str, file: &Path, shown: &CertificateDer<'_>) -> Finding {
    let path = file.display();
    let held = CertificateDer::pem_file_iter(file)
        .ok()
        .and_then(|mut chain| chain.next()?.ok());
    match held {
        Some(held) if held == *shown => good(about, format!("the certificate of {path}")),
        Some(_) => warned(
            about,
            format!("another certificate than {path} holds now"),
            "`systemctl reload bellwire` (SIGHUP) takes the file; if that was done, the log says why it was refused",
        ),
        // That it cannot be read was said before.
        None => warned(
            about,
            format!("a certificate that cannot be compared with {path}"),
            "mend the file before the next reload or start",
        ),
    }
}

/// The certificate that is shown there; none if nobody speaks TLS.
async fn shown_over_tcp(address: SocketAddr) -> Option<CertificateDer<'static>> {
    let look = Look::new();
    let config = rustls::ClientConfig::builder()
        .dangerous()
        .with_custom_certificate_verifier(Arc::clone(&look) as Arc<dyn ServerCertVerifier>)
        .with_no_client_auth();
    let shaking = async {
        let tcp = TcpStream::connect(address).await?;
        TlsConnector::from(Arc::new(config))
            .connect(ServerName::from(address.ip()), tcp)
            .await
    };
    // It ends with the refusal of the look, or too late.
    let _ended = timeout(ANSWER_MAX, shaking).await;
    look.shown()
}

/// Looks at the certificate that a server shows, and goes no further: every handshake with it fails.
#[derive(Debug)]
pub(super) struct Look {
    schemes: Vec<SignatureScheme>,
    shown: Mutex<Option<CertificateDer<'static>>>,
}

impl Look {
    pub(super) fn new() -> Arc<Look> {
        Arc::new(Look {
            schemes: CryptoProvider::get_default()
                .map(|provider| {
                    provider
                        .signature_verification_algorithms
                        .supported_schemes()
                })
                .unwrap_or_default(),
            shown: Mutex::new(None),
        })
    }

    /// What was shown.
    pub(super) fn shown(&self) -> Option<CertificateDer<'static>> {
        self.shown
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

fn seen_enough() -> rustls::Error {
    rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
}

impl ServerCertVerifier for Look {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        *self.shown.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(end_entity.clone().into_owned());
        Err(seen_enough())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(seen_enough())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(seen_enough())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.schemes.clone()
    }
}
