//! The engines that a store can have, for command lines and settings.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Engine {
    Sled,
    Fjall,
    Memory,
}

impl Engine {
    /// The setting of the server that chooses it.
    pub(crate) fn setting(self) -> String {
        format!("STORE__ENGINE={self}")
    }
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Engine::Sled => "sled",
            Engine::Fjall => "fjall",
            Engine::Memory => "memory",
        })
    }
}
