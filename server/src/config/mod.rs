//! Settings: one TOML file, every key overridable from the environment, each value checked before anything starts.
//!
//! Reading order: [`keys`] is the list of everything that can be set; `setting` knows how each kind of value is
//! written; `source` reads the file and the environment and remembers where each value stood; [`Checked`] is what the
//! rest of the program sees; `reload` tells what of it can change while serving. What is wrong comes back as [`Problem`]s, all of them at once, each pointing at its place.
//!
//! Nothing here opens a socket, looks up a name or touches the data directory.

mod checked;
pub mod fuzz;
pub mod keys;
mod problem;
mod reload;
mod setting;
mod source;
mod suggest;
mod table;

pub use checked::{
    ApiAccess, AppQuota, Backup, Callbacks, Checked, Engine, KeepAlive, Limits, Listen, LogFormat,
    LogSettings, MailboxFull, PemPair, Quotas, Store,
};
pub use problem::{Problem, Problems};
pub use reload::{Changes, is_live};
pub use setting::{Allowed, AllowedPort, AnyKey, Host, Key, Setting};
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
