//! The files of a data directory that the command line knows: who holds it, where it listens, its first key and its
//! development certificates. What the store keeps there is the store's own.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use bellwire_certs::{
    AltName, CertError, CertInfo, DevAuthority, IfExists, SanName, Validity, check_server_files,
    inspect_file, write_private,
};
use bellwire_server::config::{Listen, PemPair};
use bellwire_server::store::backup::is_unfinished;
use bellwire_server::store::{OpenError, place};
use serde_json::json;
use time::OffsetDateTime;

use super::failure::Failure;

/// Addresses really bound; there only while a server runs.
pub(crate) const LISTEN_JSON: &str = "listen.json";
/// The first API key.
pub(crate) const BOOTSTRAP_KEY: &str = "bootstrap.key";
/// The key that secrets at rest are hashed with.
pub(crate) const HASH_KEY: &str = "hash.key";
/// The development authority's certificate: what devices trust.
pub(crate) const DEV_CA: &str = "dev-ca.pem";
/// The development authority's key.
pub(crate) const DEV_CA_KEY: &str = "dev-ca-key.pem";
/// The certificate chain that the development authority issued for this server.
pub(crate) const DEV_SERVER: &str = "dev-server.pem";
/// Its key.
pub(crate) const DEV_SERVER_KEY: &str = "dev-server-key.pem";
/// What the store writes first of all; where it is, something was kept before.
const STORE_FORMAT: &str = "format";
/// Held by the server that uses the directory.
const LOCK: &str = "server.lock";

/// The name in the subject of the development authority.
const DEV_CA_NAME: &str = "Bellwire development CA";
/// A development certificate that ends within so many days is made anew at a start.
const RENEW_DAYS: i64 = 30;

/// A data directory that this process alone uses, as long as this lives.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Makes the directory if it is not there (mode 0700), sees that it is this user's alone, and takes it for this process.
    pub(crate) fn take(path: &Path) -> Result<DataDir, Failure> {
        let place = place::prepare(path).map_err(|error| {
            if let OpenError::Io { path, error, .. } = &error {
                return unusable(path, error);
            }
            Failure::new(
                error.to_string(),
                "name another directory with data_dir (BELLWIRE__DATA_DIR)",
            )
        })?;
        let path = place.path.as_path();
        let lock_path = path.join(LOCK);
        let mut lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&lock_path)
            .map_err(|error| unusable(path, &error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(taken(path, &mut lock)),
            Err(TryLockError::Error(error)) => return Err(unusable(path, &error)),
        }
        // For people and for the message above; the lock itself is what counts.
        lock.set_len(0)
            .and_then(|()| lock.write_all(format!("{}\n", std::process::id()).as_bytes()))
            .map_err(|error| unusable(path, &error))?;
        Ok(DataDir {
            path: path.to_owned(),
            _lock: lock,
        })
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Refuses a directory that has a store but not the key that its secrets were hashed with: a new key would lock out every
    /// device and every backend, silently.
    pub(crate) fn hash_key_is_not_lost(&self) -> Result<(), Failure> {
        if is_unfinished(&self.path) {
            // Before a new hash key is made, which would not be the backup's.
            return Err(Failure::new(
                OpenError::Restoring(self.path.clone()).to_string(),
                "docs/backup.md says what a restore does",
            ));
        }
        let there = |name: &str| self.path.join(name).exists();
        if there(HASH_KEY) || !there(STORE_FORMAT) {
            return Ok(());
        }
        Err(Failure::new(
            format!(
                "{} is gone, and no device and no API key of this data directory can be let in without it",
                self.path.join(HASH_KEY).display()
            ),
            "put back the copy that was kept beside the backups (it is in none of them); if it is lost for good, start with a fresh data directory and register devices and \
             keys anew",
        ))
    }

    /// Removes `listen.json`: nobody listens (any more).
    pub(crate) fn forget_listeners(&self) -> Result<(), Failure> {
        let path = self.path.join(LISTEN_JSON);
        match fs::remove_file(&path) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(unusable(&path, &error)),
        }
    }

    /// Writes `listen.json`, whole, by renaming it into place.
    pub(crate) fn announce(&self, bound: Listen, api_scheme: &str) -> Result<(), Failure> {
        let mut content = json!({
            "devices": bound.devices.to_string(),
            "api": bound.api.to_string(),
            "operations": bound.operations.to_string(),
            "api_scheme": api_scheme,
            "pid": std::process::id(),
        });
        if let Some(plain) = bound.devices_plain {
            content["devices_plain"] = json!(plain.to_string());
        }
        let path = self.path.join(LISTEN_JSON);
        write_private(&path, format!("{content}\n").as_bytes(), IfExists::Replace)
            .map_err(|error| cert(&error))
    }

    /// Writes the first API key, for its owner only.
    pub(crate) fn write_bootstrap_key(&self, key: &str) -> Result<PathBuf, Failure> {
        let path = self.path.join(BOOTSTRAP_KEY);
        write_private(&path, format!("{key}\n").as_bytes(), IfExists::Replace)
            .map_err(|error| cert(&error))?;
        Ok(path)
    }

    /// The development certificate for this server, made or renewed as needed.
    pub(crate) fn dev_certificate(
        &self,
        devices: IpAddr,
        now: OffsetDateTime,
    ) -> Result<DevCertificate, Failure> {
        dev_certificate(&self.path, &server_names(devices), now).map_err(|error| cert(&error))
    }
}

/// A development certificate on disk.
pub(crate) struct DevCertificate {
    /// Chain and key.
    pub(crate) pair: PemPair,
    /// What devices trust.
    pub(crate) ca: PathBuf,
    /// It was made just now.
    pub(crate) fresh: bool,
}

fn taken(path: &Path, lock: &mut File) -> Failure {
    let mut pid = String::new();
    // Only for the message: without it the sentence is shorter.
    let _ = lock.take(20).read_to_string(&mut pid);
    let holder = match pid.trim() {
        "" => "another process".to_owned(),
        pid => format!("the server with process id {pid}"),
    };
    Failure::new(
        format!(
            "the data directory {} is in use by {holder}",
            path.display()
        ),
        "stop that one first, or give this one a directory of its own with data_dir (BELLWIRE__DATA_DIR)",
    )
}

/// A file or directory that cannot be used, with the advice that fits.
pub(crate) fn unusable(path: &Path, error: &io::Error) -> Failure {
    let kind = error.kind();
    let help = if kind == io::ErrorKind::PermissionDenied {
        "the user that runs bellwire must be able to read and write the data directory; name another one with data_dir \
         (BELLWIRE__DATA_DIR)"
    } else if kind == io::ErrorKind::StorageFull || kind == io::ErrorKind::QuotaExceeded {
        "make room on that volume"
    } else if kind == io::ErrorKind::ReadOnlyFilesystem {
        "the volume is read-only: mount it writable, or name another place with data_dir (BELLWIRE__DATA_DIR)"
    } else {
        "look at the volume that the data directory lies on; data_dir (BELLWIRE__DATA_DIR) names another place"
    };
    Failure::new(format!("{}: {error}", path.display()), help)
}

/// Certificate errors carry their advice in their own words.
pub(crate) fn cert(error: &CertError) -> Failure {
    Failure::new(
        error.to_string(),
        "`bellwire certs inspect FILE` shows what a file holds; certs/README.md says what is needed",
    )
}

/// The names that a server on this machine is reached by.
fn server_names(devices: IpAddr) -> Vec<SanName> {
    let mut names = vec![
        SanName::Dns("localhost".to_owned()),
        SanName::Ip(IpAddr::from([127, 0, 0, 1])),
        SanName::Ip(IpAddr::from([0, 0, 0, 0, 0, 0, 0, 1])),
    ];
    if let Some(host) = host_name() {
        names.push(host);
    }
    if !devices.is_unspecified() {
        names.push(SanName::Ip(devices));
    }
    let mut seen = Vec::new();
    names.retain(|name| {
        !seen.contains(name) && {
            seen.push(name.clone());
            true
        }
    });
    names
}

/// The name that this machine gives itself, if it can stand in a certificate.
fn host_name() -> Option<SanName> {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").ok()?;
    match name.trim().parse() {
        Ok(SanName::Dns(name)) => Some(SanName::Dns(name.to_ascii_lowercase())),
        Ok(SanName::Ip(_)) | Err(_) => None,
    }
}

fn dev_certificate(
    dir: &Path,
    names: &[SanName],
    now: OffsetDateTime,
) -> Result<DevCertificate, CertError> {
    let pair = PemPair {
        cert: dir.join(DEV_SERVER),
        key: dir.join(DEV_SERVER_KEY),
    };
    let ca = dir.join(DEV_CA);
    let found = DevCertificate {
        pair: pair.clone(),
        ca: ca.clone(),
        fresh: false,
    };
    if still_fits(&pair, &ca, names, now) {
        return Ok(found);
    }
    let authority = dev_authority(dir, now, write_private)?;
    let issued = authority.server(names, Validity::leaf(now)?)?;
    // The key first: a certificate without its key would be reported as a mismatch and made anew; so would this one.
    write_private(&pair.key, issued.key_pem.as_bytes(), IfExists::Replace)?;
    write_private(&pair.cert, issued.chain_pem.as_bytes(), IfExists::Replace)?;
    Ok(DevCertificate {
        fresh: true,
        ..found
    })
}

/// The development authority of a directory, made if there is none or the one there has ended.
///
/// `write_cert`: how its certificate is written. In a data directory everything is private; elsewhere it is there to be given
/// to devices.
pub(crate) fn dev_authority(
    dir: &Path,
    now: OffsetDateTime,
    write_cert: fn(&Path, &[u8], IfExists) -> Result<(), CertError>,
) -> Result<DevAuthority, CertError> {
    let (cert, key) = (dir.join(DEV_CA), dir.join(DEV_CA_KEY));
    if let (Ok(cert), Ok(key)) = (fs::read(&cert), fs::read(&key)) {
        let authority = DevAuthority::from_pem(&cert, &key)?;
        if authority
            .info()
            .check_time(now + time::Duration::days(RENEW_DAYS))
            .is_ok()
        {
            return Ok(authority);
        }
    }
    let authority = DevAuthority::generate(DEV_CA_NAME, Validity::authority(now)?)?;
    write_private(&key, authority.key_pem().as_bytes(), IfExists::Replace)?;
    write_cert(
        &cert,
        authority.certificate_pem().as_bytes(),
        IfExists::Replace,
    )?;
    Ok(authority)
}

/// Whether the certificate on disk can serve as it is: issued by the authority there, for all these names, and for a
/// while yet. Whatever is wrong with it, a new one mends it.
fn still_fits(pair: &PemPair, ca: &Path, names: &[SanName], now: OffsetDateTime) -> bool {
    let later = now + time::Duration::days(RENEW_DAYS);
    let (Ok(chain), Ok(authority)) = (
        check_server_files(&pair.cert, &pair.key, later),
        inspect_file(ca),
    ) else {
        return false;
    };
    let same = |a: &CertInfo, b: &CertInfo| a.serial == b.serial && a.subject == b.subject;
    let issued_here =
        matches!((chain.last(), authority.first()), (Some(last), Some(ca)) if same(last, ca));
    let Some(leaf) = chain.first() else {
        return false;
    };
    issued_here
        && names.iter().all(|name| {
            leaf.alt_names.contains(&match name {
                SanName::Dns(name) => AltName::Dns(name.clone()),
                SanName::Ip(ip) => AltName::Ip(*ip),
            })
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn day(day: i64) -> OffsetDateTime {
        OffsetDateTime::UNIX_EPOCH + time::Duration::days(20_000 + day)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_development_certificate_is_kept_until_it_ends_or_lacks_a_name() {
        let dir = tempfile::tempdir().unwrap();
        let names = server_names([127, 0, 0, 1].into());
        let first = dev_certificate(dir.path(), &names, day(0)).unwrap();
        assert!(first.fresh);
        assert_eq!(mode(&first.pair.key), 0o600);
        assert_eq!(mode(&dir.path().join(DEV_CA_KEY)), 0o600);
        assert!(!dev_certificate(dir.path(), &names, day(300)).unwrap().fresh);
        let ca = fs::read(&first.ca).unwrap();
        assert!(
            dev_certificate(dir.path(), &names, day(380)).unwrap().fresh,
            "it ends soon"
        );
        let more = server_names([192, 0, 2, 7].into());
        assert!(
            dev_certificate(dir.path(), &more, day(380)).unwrap().fresh,
            "it lacks an address"
        );
        assert_eq!(
            fs::read(&first.ca).unwrap(),
            ca,
            "the authority that devices trust stays"
        );
    }

    #[test]
    fn a_directory_serves_one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made");
        let held = DataDir::take(&path).unwrap();
        assert_eq!(mode(&path), 0o700);
        let Err(Failure::Trouble(trouble)) = DataDir::take(&path) else {
            panic!("the second one got it too");
        };
        assert!(
            trouble
                .what
                .contains(&format!("process id {}", std::process::id())),
            "{}",
            trouble.what
        );
        drop(held);
        assert!(DataDir::take(&path).is_ok());
    }
}
