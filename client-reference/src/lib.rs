//! Bellwire.
