//! Why a workload did not run: one sentence for the person at the terminal.

use std::fmt::{self, Display};

/// A workload or its preparation failed. The text says what was tried and what came of it.
#[derive(Debug, Clone)]
pub(crate) struct Failure(String);

/// What everything here returns.
pub(crate) type Outcome<T> = Result<T, Failure>;

impl Failure {
    pub(crate) fn new(text: impl Into<String>) -> Failure {
        Failure(text.into())
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Says what was tried when it failed.
pub(crate) trait During<T> {
    /// `what` reads like "connect to the server".
    fn during(self, what: impl Display) -> Outcome<T>;
}

impl<T, E: Display> During<T> for Result<T, E> {
    fn during(self, what: impl Display) -> Outcome<T> {
        self.map_err(|error| Failure(format!("cannot {what}: {error}")))
    }
}
