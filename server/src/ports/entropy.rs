//! Chance enters here.

/// Cryptographic randomness. An implementation that repeats itself is a security hole: ids, secrets and keys are
/// made of it. The one for tests is seeded and says so in its name.
pub trait Entropy: Send + Sync + 'static {
    /// Fills `buffer` with unpredictable bytes.
    fn fill(&self, buffer: &mut [u8]);
}
