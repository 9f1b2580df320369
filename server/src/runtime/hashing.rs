//! Secrets at rest: a keyed hash of each, under a key that only this server has.

use std::io::{ErrorKind, Write};
use std::path::Path;

use aws_lc_rs::{constant_time, digest, hmac};

use crate::delivery::AppId;
use crate::ports::Entropy;

/// Bytes of the server's hash key.
const HASH_KEY_BYTES: usize = 32;

/// The server's hash key. Who copies the store without it cannot check guesses of secrets against it.
pub struct HashKey(hmac::Key);

impl HashKey {
    /// A key of these bytes.
    #[must_use]
    pub fn new(bytes: &[u8; HASH_KEY_BYTES]) -> HashKey {
        HashKey(hmac::Key::new(hmac::HMAC_SHA256, bytes))
    }

    /// HMAC-SHA-256 of a secret, bound to what it is for and to whose it is, so that no hash fits elsewhere.
    #[must_use]
    pub fn hash(&self, purpose: &[u8], owner: &[u8], secret: &[u8]) -> [u8; 32] {
        let mut context = hmac::Context::with_key(&self.0);
        for part in [purpose, owner] {
            // Lengths keep the parts apart; purposes and owners are ours and short.
            context.update(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            context.update(part);
        }
        context.update(secret);
        into_32(context.sign().as_ref())
    }
}

impl HashKey {
    /// Tells this key from others, and nothing else about it: backups carry it, because without the right key
    /// nobody in them is let in.
    #[must_use]
    pub fn mark(&self) -> [u8; 32] {
        self.hash(b"mark", b"", b"")
    }

    /// Under what a user is known as erased: the name itself must not stay for the sake of its erasure.
    #[must_use]
    pub fn erased_user(&self, app: AppId, user: &str) -> [u8; 32] {
        self.hash(b"erased user", &app.0.to_be_bytes(), user.as_bytes())
    }
}

/// Whether two hashes are equal, in a time that does not depend on where they differ.
#[must_use]
pub(super) fn equal(a: &[u8; 32], b: &[u8; 32]) -> bool {
    constant_time::verify_slices_are_equal(a, b).is_ok()
}

/// SHA-256.
#[must_use]
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    into_32(digest::digest(&digest::SHA256, bytes).as_ref())
}

/// The 32 bytes of a SHA-256 output.
pub(super) fn into_32(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(bytes) {
        *to = *from;
    }
    out
}

/// The hash key cannot be read or made.
#[derive(Debug, thiserror::Error)]
pub enum HashKeyError {
    /// The file is there but is not a key: perhaps a torn copy. Without the right key no device and no API key is
    /// let in, so a new one is never made in its place.
    #[error("{path} does not hold {HASH_KEY_BYTES} bytes; restore it from a backup")]
    Malformed {
        /// Which file.
        path: String,
    },
    /// The file system said no.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// What it said.
        source: std::io::Error,
    },
}

/// Reads the hash key, or makes one (mode 0600, synced, renamed into place) where there is none.
pub fn load_or_create_hash_key(
    path: &Path,
    entropy: &dyn Entropy,
) -> Result<HashKey, HashKeyError> {
    let failed = |source| HashKeyError::Io {
        path: path.display().to_string(),
        source,
    };
    match std::fs::read(path) {
        Ok(bytes) => {
            let bytes: [u8; HASH_KEY_BYTES] =
                bytes.try_into().map_err(|_| HashKeyError::Malformed {
                    path: path.display().to_string(),
                })?;
            return Ok(HashKey::new(&bytes));
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
    }
    let mut bytes = [0; HASH_KEY_BYTES];
    entropy.fill(&mut bytes);
    write_private(path, &bytes).map_err(failed)?;
    Ok(HashKey::new(&bytes))
}

fn write_private(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let fresh = path.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    {
        use std::os::unix::fs::OpenOptionsExt;
        options.mode(0o600);
    }
    let mut file = options.open(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    if let Some(folder) = path
        .parent()
        .filter(|folder| !folder.as_os_str().is_empty())
    {
        std::fs::File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    struct Sevens;

    impl Entropy for Sevens {
        fn fill(&self, buffer: &mut [u8]) {
            buffer.fill(7);
        }
    }

    #[test]
    fn the_key_is_made_once_for_its_owner_only_and_read_afterwards() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hash.key");
        let made = load_or_create_hash_key(&path, &Sevens).unwrap();
        let read = load_or_create_hash_key(&path, &Sevens).unwrap();
        assert_eq!(made.hash(b"a", b"b", b"c"), read.hash(b"a", b"b", b"c"));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            let mode = std::fs::metadata(&path).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600);
        }
    }

    #[test]
    fn a_torn_key_is_never_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hash.key");
        std::fs::write(&path, [1; 31]).unwrap();
        assert!(matches!(
            load_or_create_hash_key(&path, &Sevens),
            Err(HashKeyError::Malformed { .. })
        ));
        assert_eq!(std::fs::read(&path).unwrap().len(), 31);
    }

    #[test]
    fn a_hash_fits_only_its_purpose_and_owner() {
        let key = HashKey::new(&[1; 32]);
        let hash = key.hash(b"device", b"1", b"secret");
        assert!(equal(&hash, &key.hash(b"device", b"1", b"secret")));
        assert!(!equal(&hash, &key.hash(b"device", b"2", b"secret")));
        assert!(!equal(&hash, &key.hash(b"key", b"1", b"secret")));
        assert!(!equal(&hash, &key.hash(b"device1", b"", b"secret")));
    }
}
