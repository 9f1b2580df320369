//! Texts that come in and go out.

use std::fmt::Display;

use serde::Serializer;

/// Longest name of a user, device or key, bytes.
pub(super) const NAME_MAX: usize = 255;

/// A name of 1 to [`NAME_MAX`] bytes without control characters: lists and logs show it on one line.
pub(super) fn name(text: &str) -> Option<String> {
    let fits = (1..=NAME_MAX).contains(&text.len()) && !text.chars().any(char::is_control);
    fits.then(|| text.to_owned())
}

/// Longest idempotency key, bytes.
const IDEMPOTENCY_KEY_MAX: usize = 255;

/// Whether this can be an idempotency key: 1 to 255 visible ASCII characters.
pub(super) fn is_idempotency_key(key: &[u8]) -> bool {
    (1..=IDEMPOTENCY_KEY_MAX).contains(&key.len()) && key.iter().all(u8::is_ascii_graphic)
}

/// Serialises by `Display`, without a copy.
pub(super) fn display<T: Display, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
