//! Everything that can go wrong with a certificate, a key or their files, sorted by who can put it right.

use std::io;
use std::path::PathBuf;

use time::OffsetDateTime;

/// What is wrong, as a sentence that an operator can act on.
///
/// Most of these are the operator's to put right: a file that holds something else than it should. [`CertError::InFile`]
/// adds which file. The last ones are ours or the machine's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CertError {
    /// Another error, and the file that it was found in.
    #[error("{}: {error}", path.display())]
    InFile {
        /// The file that was read or written.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        error: Box<CertError>,
    },

    /// There is no `BEGIN CERTIFICATE` section.
    #[error(
        "no certificate in it: a PEM file with a line \"-----BEGIN CERTIFICATE-----\" is expected (a DER file is \
         converted by: openssl x509 -inform der -in FILE -out FILE.pem)"
    )]
    NoCertificate,

    /// More sections than anyone's chain has.
    #[error(
        "more than {limit} certificates in it: give the server's own certificate and its intermediates only"
    )]
    TooManyCertificates {
        /// The most that is read.
        limit: usize,
    },

    /// Larger than any chain or key.
    #[error("it is larger than {limit} bytes, so it is no certificate or key file")]
    TooLarge {
        /// The most that is read.
        limit: usize,
    },

    /// The PEM armour itself is damaged.
    #[error("damaged PEM ({detail}): look for a cut-off section or characters that are not base64")]
    BadPem {
        /// What the reader stumbled over.
        detail: String,
    },

    /// The armour is whole, what it holds is not an X.509 certificate.
    #[error("certificate {position} in it cannot be read as X.509 ({detail})")]
    BadCertificate {
        /// Counted from 1, in the order of the file.
        position: usize,
        /// What the reader stumbled over.
        detail: String,
    },

    /// No unencrypted private key.
    #[error(
        "no private key in it: a PEM file with \"BEGIN PRIVATE KEY\" (PKCS#8), \"BEGIN EC PRIVATE KEY\" or \"BEGIN RSA \
         PRIVATE KEY\" is expected"
    )]
    NoPrivateKey,

    /// A key behind a passphrase: a server that starts by itself cannot ask for it.
    #[error(
        "the private key is encrypted with a passphrase: write it in the clear, readable by the server's user only \
         (openssl pkey -in ENCRYPTED -out KEY; chmod 600 KEY)"
    )]
    EncryptedKey,

    /// A key that cannot be used.
    #[error(
        "the private key cannot be used ({detail}): ECDSA P-256 or P-384, Ed25519 and RSA of 2048 bits and more work"
    )]
    BadKey {
        /// What the reader stumbled over.
        detail: String,
    },

    /// The two files do not belong together.
    #[error(
        "the private key does not belong to the first certificate ({subject}): the server's own certificate comes first \
         in the file, intermediates after it"
    )]
    KeyMismatch {
        /// Subject of the first certificate.
        subject: String,
    },

    /// A chain in the wrong order, or with a hole.
    #[error(
        "certificate {position} ({subject}) did not issue the one before it: the order is the server's own certificate, \
         then the one that issued it, and so on; a root may be left out"
    )]
    ChainOrder {
        /// Counted from 1, in the order of the file.
        position: usize,
        /// Subject of the certificate that is out of place.
        subject: String,
    },

    /// An authority where a server certificate belongs.
    #[error(
        "the first certificate ({subject}) is an authority: the server needs a certificate of its own, placed first"
    )]
    LeafIsAuthority {
        /// Its subject.
        subject: String,
    },

    /// Names in the subject alone are not looked at by any client of today.
    #[error(
        "the certificate ({subject}) has no subject alternative name: devices compare the server's name with those only"
    )]
    NoAltName {
        /// Its subject.
        subject: String,
    },

    /// Not meant for servers.
    #[error(
        "the certificate ({subject}) is not meant for servers: its extended key usage lacks serverAuth"
    )]
    NotForServers {
        /// Its subject.
        subject: String,
    },

    /// Too late.
    #[error("the certificate ({subject}) ended at {not_after}: issue a new one")]
    Expired {
        /// Its subject.
        subject: String,
        /// The last moment at which it was valid.
        not_after: OffsetDateTime,
    },

    /// Too early, or this machine's clock is behind.
    #[error(
        "the certificate ({subject}) is valid from {not_before} on: is this machine's clock right?"
    )]
    NotYetValid {
        /// Its subject.
        subject: String,
        /// The first moment at which it is valid.
        not_before: OffsetDateTime,
    },

    /// A certificate that may not issue others was given as an authority.
    #[error(
        "the certificate ({subject}) may not issue others: it is no authority (CA:TRUE, keyCertSign)"
    )]
    NotAnAuthority {
        /// Its subject.
        subject: String,
    },

    /// Nothing valid can be issued any more.
    #[error(
        "the authority ({subject}) ends at {not_after}, before the certificate would start: make a new authority"
    )]
    AuthorityEnded {
        /// Its subject.
        subject: String,
        /// The last moment at which it is valid.
        not_after: OffsetDateTime,
    },

    /// A server certificate needs something to be known by.
    #[error(
        "a server certificate needs at least one name: a DNS name or an IP address that devices connect to"
    )]
    NoNames,

    /// A list of names without end.
    #[error("{given} names asked for, {limit} are the most for one certificate")]
    TooManyNames {
        /// How many were given.
        given: usize,
        /// The most that one certificate takes.
        limit: usize,
    },

    /// Neither an address nor a DNS name.
    #[error("\"{name}\" is neither an IP address nor a DNS name")]
    BadServerName {
        /// What was given.
        name: String,
    },

    /// Device ids have one form.
    #[error("\"{device}\" is not a device id: 26 characters out of a-z and 2-7 are expected")]
    BadDeviceId {
        /// What was given.
        device: String,
    },

    /// Names of clients and authorities stand in subjects and URIs.
    #[error(
        "\"{name}\" cannot be used as a name: 1 to {limit} letters, digits, '.', '_' and '-' are expected"
    )]
    BadClientName {
        /// What was given.
        name: String,
        /// The most characters.
        limit: usize,
    },

    /// A period that ends before it starts or lies beyond the calendar.
    #[error(
        "the asked validity is impossible: it must last at least a day and end before the year 9999"
    )]
    BadValidity,

    /// A file is there and was not to be replaced.
    #[error("it exists already and is left as it is: remove it or say that it may be replaced")]
    Exists,

    /// The disk or its permissions.
    #[error("{doing}: {error}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the system said.
        #[source]
        error: io::Error,
    },

    /// The cryptographic library refused to make a key or a signature.
    #[error("making the certificate failed ({detail})")]
    Making {
        /// What the library said.
        detail: String,
    },
}

impl CertError {
    /// The same error, with the file that it was found in.
    pub(crate) fn in_file(self, path: &std::path::Path) -> Self {
        Self::InFile {
            path: path.to_owned(),
            error: Box::new(self),
        }
    }
}

impl From<rcgen::Error> for CertError {
    fn from(error: rcgen::Error) -> Self {
        Self::Making {
            detail: error.to_string(),
        }
    }
}
