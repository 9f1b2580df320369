//! Settings: one TOML file, every key overridable from the environment, each value checked before anything starts.
//!
//! Reading order: [`keys`] is the list of everything that can be set; `setting` knows how each kind of value is
//! written; `source` reads the file and the environment and remembers where each value stood; [`Checked`] is what the
//! rest of the program sees. What is wrong comes back as [`Problem`]s, all of them at once, each pointing at its place.
//!
//! Nothing here opens a socket, looks up a name or touches the data directory.

mod checked;
pub mod keys;
mod problem;
mod setting;
mod source;
mod suggest;
mod table;

pub use checked::{
    ApiAccess, Checked, Engine, KeepAlive, Limits, Listen, LogFormat, LogSettings, MailboxFull,
    PemPair, Store,
};
pub use problem::{Problem, Problems};
pub use setting::{AnyKey, Key, Setting};
pub use source::{ENV_PREFIX, Environment, MAX_FILE_BYTES, Source, variable_of};
pub use suggest::closest;
pub use table::{BEGIN_MARK, END_MARK, markdown};

use std::path::Path;

/// The file that is read when none is named.
pub const DEFAULT_FILE: &str = "bellwire.toml";

/// Reads and checks the settings.
///
/// `named` is the file given on the command line; it must exist. Without one, [`DEFAULT_FILE`] of the working directory
/// is read if it is there, and no file at all means the defaults.
///
/// # Errors
/// Everything that is wrong, at once: the operator's to put right.
pub fn load(named: Option<&Path>, environment: &Environment) -> Result<Checked, Problems> {
    let source = Source::read(named, environment)?;
    Checked::from_source(&source)
}

/// Settings of somebody who means harm, as a plain function for fuzzing. It must not panic.
pub mod fuzz {
    use super::{Checked, Environment, Source};

    /// Reads the text of a settings file.
    pub fn settings_file(bytes: &[u8]) {
        let Ok(text) = std::str::from_utf8(bytes) else {
            return;
        };
        let file = Some(("fuzz.toml".into(), text.to_owned()));
        let checked = Source::understand(file, &Environment::default())
            .and_then(|source| Checked::from_source(&source));
        // Placing a problem in the text is part of telling it.
        if let Err(problems) = checked {
            for problem in problems.iter() {
                let _ = (problem.position(), problem.to_string());
            }
        }
    }

    #[cfg(test)]
    mod tests {
        #[test]
        fn odd_files_are_told_about_and_not_stumbled_over() {
            for text in [
                "",
                "\u{feff}data_dir = 'x'",
                "[listen]\r\napi = 'é:1'\r\n",
                "listen = 3",
                "[limits]\nmailbox_bytes = 99999999999999999999999999999999999999999",
                "limits.content_bytes = -0x1",
                "[[listen]]\napi = 1",
                "[store]\nengine = ['sled']\n[store]",
                "'\u{1F514}' = { a = { b = 1 } }",
                "data_dir = \"\\u0000\"",
                "tls.cert = 1979-05-27\ntls.key = nan",
                "[limits]\nexempt_networks = ['1.2.3.4/99', 5]",
                "log.level = '=,=,::=info'",
            ] {
                super::settings_file(text.as_bytes());
            }
            super::settings_file(b"\xff");
            super::settings_file("[".repeat(10_000).as_bytes());
            super::settings_file(format!("a = {}", "[".repeat(10_000)).as_bytes());
        }
    }
}
