//! Readers of malformed and hostile requests, as plain functions for fuzzing. They must not panic.

use super::{mapping, params::Params};

/// Reads a form body, with the same text as the query.
pub fn form(bytes: &[u8]) {
    let query = String::from_utf8_lossy(bytes);
    if let Ok(params) = Params::read(Some(&query), false, bytes) {
        let _ = mapping::content(&params);
    }
}

/// Reads a JSON body.
pub fn json(bytes: &[u8]) {
    if let Ok(params) = Params::read(None, true, bytes) {
        let _ = params.list("user_id");
        let _ = mapping::content(&params);
    }
}
