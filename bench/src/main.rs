//! Bellwire.
fn main() {}
