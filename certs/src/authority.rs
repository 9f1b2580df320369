//! The development authority: makes itself and the certificates of servers, devices and other clients.
//!
//! Profiles follow RFC 5280: authority with path length 0 and the usages keyCertSign and cRLSign; leaves with
//! digitalSignature and exactly one extended usage. Keys are ECDSA P-256, the curve that every TLS stack has.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType, SerialNumber,
};
use rustls_pki_types::{CertificateDer, DnsName};
use time::{Duration, OffsetDateTime};
use zeroize::Zeroizing;

use crate::error::CertError;
use crate::inspect::{self, CertInfo};

/// Days that an authority lasts: ten years, so that no test bench wakes up to an ended one.
pub const AUTHORITY_DAYS: u32 = 3_652;

/// Days that a leaf lasts: what platforms accept at most for a server certificate is 398, one is kept in reserve.
pub const LEAF_DAYS: u32 = 397;

/// How far before "now" a validity starts, so that a device whose clock is behind can connect at once.
pub const BACKDATE: Duration = Duration::HOUR;

/// A device certificate names its device by this prefix and the device id, as a URI among its alternative names.
pub const DEVICE_URI_PREFIX: &str = "bellwire:device:";

/// A certificate for any other client carries this prefix and the client's name, in the same place.
pub const CLIENT_URI_PREFIX: &str = "bellwire:client:";

/// Most characters in the name of an authority or a client: the bound of a common name (RFC 5280, `ub-common-name`).
pub const MAX_NAME_CHARS: usize = 64;

/// Most names in one server certificate; a handshake carries them all, so a long list costs every connection.
pub const MAX_SERVER_NAMES: usize = 64;

/// Characters of a device id in its text form: 128 bits in base32.
const DEVICE_ID_CHARS: usize = 26;

/// Bytes of a serial number: 128 random bits, far more than the 64 that public authorities must use.
const SERIAL_BYTES: usize = 16;

/// When a certificate is valid, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    not_before: OffsetDateTime,
    not_after: OffsetDateTime,
}

impl Validity {
    /// From [`BACKDATE`] before `now` until `days` after `now`.
    ///
    /// # Errors
    /// [`CertError::BadValidity`] for zero days and for ends that X.509 cannot write (the year 9999 and later).
    pub fn days(now: OffsetDateTime, days: u32) -> Result<Self, CertError> {
        // X.509 has whole seconds; what is kept here is what the certificate will say.
        let now = now
            .replace_nanosecond(0)
            .map_err(|_| CertError::BadValidity)?;
        let not_before = now.checked_sub(BACKDATE).ok_or(CertError::BadValidity)?;
        let not_after = now
            .checked_add(Duration::days(i64::from(days)))
            .ok_or(CertError::BadValidity)?;
        if days == 0 || not_after.year() >= 9_999 || not_before.year() < 1_970 {
            return Err(CertError::BadValidity);
        }
        Ok(Self {
            not_before,
            not_after,
        })
    }

    /// The validity of a server, device or client certificate issued `now`: [`LEAF_DAYS`].
    ///
    /// # Errors
    /// As [`Validity::days`].
    pub fn leaf(now: OffsetDateTime) -> Result<Self, CertError> {
        Self::days(now, LEAF_DAYS)
    }

    /// The validity of an authority made `now`: [`AUTHORITY_DAYS`].
    ///
    /// # Errors
    /// As [`Validity::days`].
    pub fn authority(now: OffsetDateTime) -> Result<Self, CertError> {
        Self::days(now, AUTHORITY_DAYS)
    }
}

/// A name that a server is reached by, as it stands in the certificate.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum SanName {
    /// A DNS name; the first label may be `*`.
    Dns(String),
    /// An address, for devices that connect without DNS.
    Ip(IpAddr),
}

impl FromStr for SanName {
    type Err = CertError;

    /// Reads an IP address, or else a DNS name in ASCII (internationalised names in their `xn--` form).
    fn from_str(text: &str) -> Result<Self, CertError> {
        if let Ok(ip) = text.parse() {
            return Ok(Self::Ip(ip));
        }
        let host = text.strip_prefix("*.").unwrap_or(text);
        // A name of digits and dots alone is a mistyped address: no client would look it up as a name.
        let digits_only = host.bytes().all(|b| b.is_ascii_digit() || b == b'.');
        if digits_only || host.ends_with('.') || DnsName::try_from(host).is_err() {
            return Err(CertError::BadServerName {
                name: text.to_owned(),
            });
        }
        Ok(Self::Dns(text.to_ascii_lowercase()))
    }
}

impl fmt::Display for SanName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dns(name) => f.write_str(name),
            Self::Ip(ip) => ip.fmt(f),
        }
    }
}

/// A certificate with its private key, fresh from the authority.
pub struct Issued {
    /// The certificate alone, PEM.
    pub cert_pem: String,
    /// The certificate followed by its authority, PEM: the order in which TLS sends a chain.
    pub chain_pem: String,
    /// The private key, PKCS#8 in PEM; wiped from memory when dropped. Goes to disk through [`crate::write_private`].
    pub key_pem: Zeroizing<String>,
    /// The last moment at which the certificate is valid.
    pub not_after: OffsetDateTime,
}

impl fmt::Debug for Issued {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Issued")
            .field("cert_pem", &self.cert_pem)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// A certificate authority for development, demonstrations and tests.
///
/// It issues and forgets: there is no register and no revocation, and its key lies beside the data. Whoever holds that
/// key can impersonate any server and any device that trusts it.
pub struct DevAuthority {
    certificate: CertificateDer<'static>,
    certificate_pem: String,
    key: Zeroizing<KeyPair>,
    info: CertInfo,
}

impl fmt::Debug for DevAuthority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DevAuthority")
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

impl DevAuthority {
    /// Makes a new authority whose subject says `name`, for instance `Bellwire development CA`.
    ///
    /// # Errors
    /// [`CertError::BadClientName`] for a name that is empty, too long or not printable ASCII; [`CertError::Making`] when
    /// the cryptographic library fails.
    pub fn generate(name: &str, validity: Validity) -> Result<Self, CertError> {
        let printable = name.bytes().all(|b| b == b' ' || b.is_ascii_graphic());
        if name.is_empty() || name.len() > MAX_NAME_CHARS || !printable {
            return Err(CertError::BadClientName {
                name: name.to_owned(),
                limit: MAX_NAME_CHARS,
            });
        }
        let key = Zeroizing::new(KeyPair::generate()?);
        let mut params = params(name, validity)?;
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&*key)?;
        Self::new(certificate.der().clone(), certificate.pem(), key)
    }

    /// Takes up an authority that was made before, from the two PEM texts.
    ///
    /// # Errors
    /// The text is no PEM, holds no certificate or key, the two do not belong together, or the certificate is no
    /// authority.
    pub fn from_pem(certificate_pem: &[u8], key_pem: &[u8]) -> Result<Self, CertError> {
        let certificate = inspect::first_certificate(certificate_pem)?;
        let key = inspect::key_pair(key_pem)?;
        // Re-encoded, because the file may hold more than the one certificate.
        let text = inspect::to_pem(&certificate);
        let authority = Self::new(certificate, text, key)?;
        if !authority.info.is_ca {
            return Err(CertError::NotAnAuthority {
                subject: authority.info.subject,
            });
        }
        inspect::check_key_belongs(&authority.certificate, &authority.key)?;
        Ok(authority)
    }

    fn new(
        certificate: CertificateDer<'static>,
        certificate_pem: String,
        key: Zeroizing<KeyPair>,
    ) -> Result<Self, CertError> {
        let info = inspect::certificate_info(&certificate, 1)?;
        Ok(Self {
            certificate,
            certificate_pem,
            key,
            info,
        })
    }

    /// The authority's own certificate, PEM: what devices and backends are given to trust.
    #[must_use]
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// The authority's private key, PKCS#8 in PEM; wiped from memory when dropped.
    #[must_use]
    pub fn key_pem(&self) -> Zeroizing<String> {
        Zeroizing::new(self.key.serialize_pem())
    }

    /// What the authority's certificate says.
    #[must_use]
    pub fn info(&self) -> &CertInfo {
        &self.info
    }

    /// Issues a server certificate for the given names (extended usage serverAuth).
    ///
    /// A validity that outlasts the authority is cut to the authority's end.
    ///
    /// # Errors
    /// No name or too many, a name that is none, or an authority that has ended.
    pub fn server(&self, names: &[SanName], validity: Validity) -> Result<Issued, CertError> {
        if names.is_empty() {
            return Err(CertError::NoNames);
        }
        if names.len() > MAX_SERVER_NAMES {
            return Err(CertError::TooManyNames {
                given: names.len(),
                limit: MAX_SERVER_NAMES,
            });
        }
        let alt_names = names
            .iter()
            .map(|name| match name {
                SanName::Dns(dns) => ia5(dns).map(SanType::DnsName),
                SanName::Ip(ip) => Ok(SanType::IpAddress(*ip)),
            })
            .collect::<Result<Vec<_>, _>>()?;
        self.issue(
            "Bellwire server",
            alt_names,
            ExtendedKeyUsagePurpose::ServerAuth,
            validity,
        )
    }

    /// Issues a client certificate that speaks for one device (extended usage clientAuth, alternative name
    /// [`DEVICE_URI_PREFIX`] and the id).
    ///
    /// # Errors
    /// [`CertError::BadDeviceId`] unless `device` is the text form of a device id; an authority that has ended.
    pub fn device(&self, device: &str, validity: Validity) -> Result<Issued, CertError> {
        if !is_device_id(device) {
            return Err(CertError::BadDeviceId {
                device: device.to_owned(),
            });
        }
        let uri = ia5(&format!("{DEVICE_URI_PREFIX}{device}"))?;
        self.issue(
            device,
            vec![SanType::URI(uri)],
            ExtendedKeyUsagePurpose::ClientAuth,
            validity,
        )
    }

    /// Issues a client certificate for something that is no device, such as a backend or a proxy (extended usage
    /// clientAuth, alternative name [`CLIENT_URI_PREFIX`] and the name).
    ///
    /// # Errors
    /// [`CertError::BadClientName`] for a name outside of 1 to [`MAX_NAME_CHARS`] letters, digits, `.`, `_` and `-`; an
    /// authority that has ended.
    pub fn client(&self, name: &str, validity: Validity) -> Result<Issued, CertError> {
        let plain = name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
        if name.is_empty() || name.len() > MAX_NAME_CHARS || !plain {
            return Err(CertError::BadClientName {
                name: name.to_owned(),
                limit: MAX_NAME_CHARS,
            });
        }
        let uri = ia5(&format!("{CLIENT_URI_PREFIX}{name}"))?;
        self.issue(
            name,
            vec![SanType::URI(uri)],
            ExtendedKeyUsagePurpose::ClientAuth,
            validity,
        )
    }

    fn issue(
        &self,
        common_name: &str,
        alt_names: Vec<SanType>,
        usage: ExtendedKeyUsagePurpose,
        validity: Validity,
    ) -> Result<Issued, CertError> {
        let not_after = validity.not_after.min(self.info.not_after);
        if not_after <= validity.not_before + BACKDATE {
            return Err(CertError::AuthorityEnded {
                subject: self.info.subject.clone(),
                not_after: self.info.not_after,
            });
        }
        let key = Zeroizing::new(KeyPair::generate()?);
        let mut params = params(
            common_name,
            Validity {
                not_after,
                ..validity
            },
        )?;
        params.subject_alt_names = alt_names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![usage];
        params.use_authority_key_identifier_extension = true;
        let issuer = Issuer::from_ca_cert_der(&self.certificate, &*self.key)?;
        let certificate = params.signed_by(&*key, &issuer)?;
        let cert_pem = certificate.pem();
        Ok(Issued {
            chain_pem: format!("{cert_pem}{}", self.certificate_pem),
            cert_pem,
            key_pem: Zeroizing::new(key.serialize_pem()),
            not_after,
        })
    }
}

/// Whether `text` has the one form of a device id: 26 characters of the lower-case base32 alphabet.
pub(crate) fn is_device_id(text: &str) -> bool {
    text.len() == DEVICE_ID_CHARS && text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'2'..=b'7'))
}

/// What all our certificates share: subject, validity and a random serial number.
fn params(common_name: &str, validity: Validity) -> Result<CertificateParams, CertError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Bellwire development");
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params.not_before = validity.not_before;
    params.not_after = validity.not_after;
    let mut serial = [0u8; SERIAL_BYTES];
    aws_lc_rs::rand::fill(&mut serial).map_err(|_| CertError::Making {
        detail: "the system has no random numbers".to_owned(),
    })?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

fn ia5(text: &str) -> Result<Ia5String, CertError> {
    Ia5String::try_from(text).map_err(|_| CertError::BadServerName {
        name: text.to_owned(),
    })
}
