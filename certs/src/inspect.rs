//! Reads PEM files, whoever made them, and says what is in them or what is wrong with them.
//!
//! This is for people and metrics: `bellwire check`, expiry dates, first lines in a log. Whether a peer's certificate is
//! to be trusted is decided by rustls during the handshake and nowhere else.

use std::fmt;
use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rcgen::{KeyPair, PublicKeyData};
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use time::OffsetDateTime;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};
use zeroize::Zeroizing;

use crate::authority::{DEVICE_URI_PREFIX, is_device_id};
use crate::error::CertError;

/// Most bytes read of a PEM file: ten certificates of the largest common keys with their text dumps stay below it.
pub const MAX_PEM_BYTES: usize = 256 * 1024;

/// Most certificates read of one file; chains have two to four.
pub const MAX_CHAIN: usize = 10;

/// Characters in a line of PEM (RFC 7468 section 2).
const PEM_LINE_CHARS: usize = 64;

/// What one certificate says of itself. Read, not verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertInfo {
    /// The subject's distinguished name, for people.
    pub subject: String,
    /// The distinguished name of who issued it, for people.
    pub issuer: String,
    /// The serial number in hexadecimal, as an authority's register shows it.
    pub serial: String,
    /// The alternative names: the only ones that clients compare.
    pub alt_names: Vec<AltName>,
    /// The first moment at which it is valid.
    pub not_before: OffsetDateTime,
    /// The last moment at which it is valid.
    pub not_after: OffsetDateTime,
    /// Whether it may issue others.
    pub is_ca: bool,
    /// Whether it may stand for a server: extended usage serverAuth, or no such restriction.
    pub for_servers: bool,
    /// Whether it may stand for a client: extended usage clientAuth, or no such restriction.
    pub for_clients: bool,
}

impl CertInfo {
    /// The id of the device that the certificate speaks for: its only alternative name that starts with
    /// [`DEVICE_URI_PREFIX`], if that is followed by a device id. Two of them speak for none.
    #[must_use]
    pub fn device(&self) -> Option<&str> {
        let mut ids = self.alt_names.iter().filter_map(|name| match name {
            AltName::Uri(uri) => uri.strip_prefix(DEVICE_URI_PREFIX),
            AltName::Dns(_) | AltName::Ip(_) | AltName::Other(_) => None,
        });
        let id = ids.next()?;
        (ids.next().is_none() && is_device_id(id)).then_some(id)
    }

    /// Refuses a certificate that is not valid at `now`.
    ///
    /// # Errors
    /// [`CertError::Expired`] or [`CertError::NotYetValid`].
    pub fn check_time(&self, now: OffsetDateTime) -> Result<(), CertError> {
        if now > self.not_after {
            return Err(CertError::Expired {
                subject: self.subject.clone(),
                not_after: self.not_after,
            });
        }
        if now < self.not_before {
            return Err(CertError::NotYetValid {
                subject: self.subject.clone(),
                not_before: self.not_before,
            });
        }
        Ok(())
    }
}

/// One subject alternative name (RFC 5280 section 4.2.1.6).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum AltName {
    /// A DNS name, perhaps with a `*` as its first label.
    Dns(String),
    /// An IP address.
    Ip(IpAddr),
    /// A URI.
    Uri(String),
    /// Any other kind, described for people.
    Other(String),
}

impl fmt::Display for AltName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => write!(f, "DNS:{name}"),
            Self::Ip(ip) => write!(f, "IP:{ip}"),
            Self::Uri(uri) => write!(f, "URI:{uri}"),
            Self::Other(text) => f.write_str(text),
        }
    }
}

/// Reads the first certificate of a PEM text: of a server's file, the server's own.
///
/// # Errors
/// As [`inspect_chain`].
pub fn inspect(pem: &[u8]) -> Result<CertInfo, CertError> {
    certificate_info(&first_certificate(pem)?, 1)
}

/// Reads every certificate of a PEM text, in the order of the text. Text around them is skipped.
///
/// # Errors
/// No certificate, more than [`MAX_CHAIN`], more than [`MAX_PEM_BYTES`], damaged PEM, or something that is not X.509.
pub fn inspect_chain(pem: &[u8]) -> Result<Vec<CertInfo>, CertError> {
    certificates(pem)?
        .iter()
        .enumerate()
        .map(|(index, der)| certificate_info(der, index + 1))
        .collect()
}

/// [`inspect_chain`] of a file.
///
/// # Errors
/// As [`inspect_chain`], and whatever reading a file can bring; each names the file.
pub fn inspect_file(path: &Path) -> Result<Vec<CertInfo>, CertError> {
    read_limited(path)
        .and_then(|pem| inspect_chain(&pem))
        .map_err(|error| error.in_file(path))
}

/// Checks that a certificate chain and a key, both PEM, can serve devices at `now`, and says what the chain holds.
///
/// # Errors
/// Whatever keeps a device from connecting: unreadable PEM, a key that is encrypted or belongs to another certificate, a
/// chain in the wrong order, an authority in the server's place, no alternative name, no serverAuth, outside of its
/// validity.
pub fn check_server(
    chain_pem: &[u8],
    key_pem: &[u8],
    now: OffsetDateTime,
) -> Result<Vec<CertInfo>, CertError> {
    let (leaf, infos) = check_server_chain(chain_pem, now)?;
    let key = key_pair(key_pem)?;
    check_key_belongs(&leaf, &key)?;
    Ok(infos)
}

/// [`check_server`] of two files.
///
/// # Errors
/// As [`check_server`], and whatever reading a file can bring; each names the file that has to change.
pub fn check_server_files(
    chain: &Path,
    key: &Path,
    now: OffsetDateTime,
) -> Result<Vec<CertInfo>, CertError> {
    let (leaf, infos) = read_limited(chain)
        .and_then(|pem| check_server_chain(&pem, now))
        .map_err(|error| error.in_file(chain))?;
    read_limited(key)
        .and_then(|pem| key_pair(&pem))
        .and_then(|pair| check_key_belongs(&leaf, &pair))
        .map_err(|error| error.in_file(key))?;
    Ok(infos)
}

/// The chain's part of [`check_server`]: the server's own certificate, and what each one says.
fn check_server_chain(
    pem: &[u8],
    now: OffsetDateTime,
) -> Result<(CertificateDer<'static>, Vec<CertInfo>), CertError> {
    let chain = certificates(pem)?;
    let infos = chain
        .iter()
        .enumerate()
        .map(|(index, der)| certificate_info(der, index + 1))
        .collect::<Result<Vec<_>, _>>()?;
    let leaf = chain.into_iter().next().ok_or(CertError::NoCertificate)?;
    let own = infos.first().ok_or(CertError::NoCertificate)?;
    let subject = || own.subject.clone();
    if own.is_ca {
        return Err(CertError::LeafIsAuthority { subject: subject() });
    }
    if !own
        .alt_names
        .iter()
        .any(|name| matches!(name, AltName::Dns(_) | AltName::Ip(_)))
    {
        return Err(CertError::NoAltName { subject: subject() });
    }
    if !own.for_servers {
        return Err(CertError::NotForServers { subject: subject() });
    }
    for (index, pair) in infos.windows(2).enumerate() {
        if pair[0].issuer != pair[1].subject || !pair[1].is_ca {
            return Err(CertError::ChainOrder {
                position: index + 2,
                subject: pair[1].subject.clone(),
            });
        }
    }
    for info in &infos {
        info.check_time(now)?;
    }
    Ok((leaf, infos))
}

/// Refuses a key whose public half is not the certificate's.
pub(crate) fn check_key_belongs(
    certificate: &CertificateDer<'_>,
    key: &KeyPair,
) -> Result<(), CertError> {
    let x509 = parse(certificate, 1)?;
    // Compared without the algorithm's parameters, which encoders write in more than one way.
    if x509.public_key().subject_public_key.data.as_ref() == key.der_bytes() {
        return Ok(());
    }
    Err(CertError::KeyMismatch {
        subject: x509.subject().to_string(),
    })
}

/// The first certificate of a PEM text.
pub(crate) fn first_certificate(pem: &[u8]) -> Result<CertificateDer<'static>, CertError> {
    certificates(pem)?
        .into_iter()
        .next()
        .ok_or(CertError::NoCertificate)
}

/// The first private key of a PEM text, ready to sign.
pub(crate) fn key_pair(pem: &[u8]) -> Result<Zeroizing<KeyPair>, CertError> {
    check_size(pem)?;
    let encrypted = |mark: &[u8]| pem.windows(mark.len()).any(|window| window == mark);
    // The second mark is the older form, where the section keeps its plain name.
    if encrypted(b"BEGIN ENCRYPTED PRIVATE KEY") || encrypted(b"Proc-Type: 4,ENCRYPTED") {
        return Err(CertError::EncryptedKey);
    }
    let der = PrivateKeyDer::from_pem_slice(pem)
        .map_err(|error| pem_error(&error, CertError::NoPrivateKey))?;
    KeyPair::try_from(&der)
        .map(Zeroizing::new)
        .map_err(|error| CertError::BadKey {
            detail: error.to_string(),
        })
}

/// What a certificate says; `position` counts from 1 and is for the error.
pub(crate) fn certificate_info(
    certificate: &CertificateDer<'_>,
    position: usize,
) -> Result<CertInfo, CertError> {
    let x509 = parse(certificate, position)?;
    let bad = |error: x509_parser::error::X509Error| CertError::BadCertificate {
        position,
        detail: error.to_string(),
    };
    let alt_names = x509
        .subject_alternative_name()
        .map_err(bad)?
        .map(|extension| extension.value.general_names.iter().map(alt_name).collect())
        .unwrap_or_default();
    let usage = x509
        .extended_key_usage()
        .map_err(bad)?
        .map(|extension| extension.value);
    let may_sign = x509
        .key_usage()
        .map_err(bad)?
        .is_none_or(|extension| extension.value.key_cert_sign());
    let is_ca = x509
        .basic_constraints()
        .map_err(bad)?
        .is_some_and(|extension| extension.value.ca)
        && may_sign;
    Ok(CertInfo {
        subject: x509.subject().to_string(),
        issuer: x509.issuer().to_string(),
        serial: x509.raw_serial_as_string(),
        alt_names,
        not_before: x509.validity().not_before.to_datetime(),
        not_after: x509.validity().not_after.to_datetime(),
        is_ca,
        for_servers: usage.is_none_or(|usage| usage.server_auth || usage.any),
        for_clients: usage.is_none_or(|usage| usage.client_auth || usage.any),
    })
}

/// One certificate in PEM, lines of 64 characters (RFC 7468).
pub(crate) fn to_pem(certificate: &CertificateDer<'_>) -> String {
    let body = BASE64_STANDARD.encode(certificate);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    for (index, character) in body.chars().enumerate() {
        if index > 0 && index % PEM_LINE_CHARS == 0 {
            pem.push('\n');
        }
        pem.push(character);
    }
    pem.push_str("\n-----END CERTIFICATE-----\n");
    pem
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertError> {
    check_size(pem)?;
    let mut found = Vec::new();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        if found.len() == MAX_CHAIN {
            return Err(CertError::TooManyCertificates { limit: MAX_CHAIN });
        }
        found.push(certificate.map_err(|error| pem_error(&error, CertError::NoCertificate))?);
    }
    if found.is_empty() {
        return Err(CertError::NoCertificate);
    }
    Ok(found)
}

fn check_size(pem: &[u8]) -> Result<(), CertError> {
    if pem.len() > MAX_PEM_BYTES {
        return Err(CertError::TooLarge {
            limit: MAX_PEM_BYTES,
        });
    }
    Ok(())
}

fn pem_error(error: &pem::Error, nothing_found: CertError) -> CertError {
    if matches!(error, pem::Error::NoItemsFound) {
        return nothing_found;
    }
    CertError::BadPem {
        detail: error.to_string(),
    }
}

fn parse<'a>(
    certificate: &'a CertificateDer<'_>,
    position: usize,
) -> Result<X509Certificate<'a>, CertError> {
    match X509Certificate::from_der(certificate) {
        Ok(([], x509)) => Ok(x509),
        Ok(_) => Err(CertError::BadCertificate {
            position,
            detail: "bytes left over after its end".to_owned(),
        }),
        Err(error) => Err(CertError::BadCertificate {
            position,
            detail: error.to_string(),
        }),
    }
}

fn alt_name(name: &GeneralName<'_>) -> AltName {
    if let GeneralName::DNSName(name) = name {
        return AltName::Dns((*name).to_owned());
    }
    if let GeneralName::URI(uri) = name {
        return AltName::Uri((*uri).to_owned());
    }
    if let GeneralName::IPAddress(bytes) = name {
        if let Ok(v4) = <[u8; 4]>::try_from(*bytes) {
            return AltName::Ip(Ipv4Addr::from(v4).into());
        }
        if let Ok(v6) = <[u8; 16]>::try_from(*bytes) {
            return AltName::Ip(Ipv6Addr::from(v6).into());
        }
    }
    AltName::Other(name.to_string())
}

/// Reads a file that is expected to be small, whole.
fn read_limited(path: &Path) -> Result<Zeroizing<Vec<u8>>, CertError> {
    let io = |error| CertError::Io {
        doing: "it cannot be read",
        error,
    };
    // The whole capacity at once, so that a growing buffer leaves no copies of a key behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_PEM_BYTES + 1));
    let limit = u64::try_from(MAX_PEM_BYTES + 1).unwrap_or(u64::MAX);
    File::open(path)
        .map_err(io)?
        .take(limit)
        .read_to_end(&mut bytes)
        .map_err(io)?;
    check_size(&bytes)?;
    Ok(bytes)
}
