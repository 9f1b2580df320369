//! Readers of malformed and hostile requests, as plain functions for fuzzing. They must not panic; what they make of their
//! input is tested elsewhere.

/// Reads the body of a ping.
pub fn ping_body(bytes: &[u8]) {
    let _ = super::ping_body::read(bytes);
    let _ = super::ping_body::read_line(bytes);
}

/// Finds the lines of a batch.
pub fn batch(bytes: &[u8]) {
    let _ = super::batch::lines(bytes, 1_000);
}

/// Reads the query of a ping and of a list.
pub fn query(text: &str) {
    let _ = super::pings::wait(Some(text), &crate::runtime::Limits::default());
    let _ = super::devices::page(Some(text));
}
