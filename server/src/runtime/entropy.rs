//! Chance from the operating system, by way of the process's one cryptography provider.

use aws_lc_rs::rand::{SecureRandom, SystemRandom};

use crate::ports::Entropy;

/// Cryptographic randomness of the system.
#[derive(Debug, Default)]
pub struct SystemEntropy(SystemRandom);

impl SystemEntropy {
    /// The system's source.
    #[must_use]
    pub fn new() -> SystemEntropy {
        SystemEntropy(SystemRandom::new())
    }
}

impl Entropy for SystemEntropy {
    fn fill(&self, buffer: &mut [u8]) {
        if self.0.fill(buffer).is_err() {
            // Going on would hand out ids and secrets that can be guessed. A supervisor restarts the process.
            tracing::error!("the system gives no randomness; the process ends");
            std::process::abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_fillings_differ() {
        let entropy = SystemEntropy::new();
        let (mut a, mut b) = ([0; 32], [0; 32]);
        entropy.fill(&mut a);
        entropy.fill(&mut b);
        assert_ne!(a, b);
    }
}
