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

/// Serialises by `Display`, without a copy.
pub(super) fn display<T: Display, S: Serializer>(
    value: &T,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}
