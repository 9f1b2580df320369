//! Log lines: for people on a terminal, JSON for machines.
//!
//! Levels say what the operator must do: `error` now, `warn` soon, `info` nothing but good to know, `debug` and
//! `trace` for whoever looks into something. Content and secrets are never logged, on any level.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// Pretty on a terminal, JSON otherwise.
    #[default]
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A filter that cannot be understood, or a second call.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The operator's filter.
    #[error("the log filter `{filter}` cannot be understood: {why}")]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// Somebody set up logging before.
    #[error("logging is set up already")]
    Again,
    /// What was set up is no longer in use.
    #[error("logging was taken down")]
    Gone,
}

/// Checks a filter without setting anything up, for `bellwire check`.
pub fn check_filter(filter: &str) -> Result<(), LoggingError> {
    parse_filter(filter).map(drop)
}

/// Which log lines are written, changeable while the process runs.
pub struct Levels(Box<dyn Fn(EnvFilter) -> Result<(), LoggingError> + Send + Sync>);

impl Levels {
    /// Takes another filter, of the form that [`install`] takes.
    ///
    /// # Errors
    /// A filter that cannot be understood; nothing changes then.
    pub fn set(&self, filter: &str) -> Result<(), LoggingError> {
        (self.0)(parse_filter(filter)?)
    }
}

/// Sends every log line of this process to standard error, so that standard output stays free for answers.
///
/// `filter` is a list of `target=level`, such as `info` or `info,bellwire_server::store=debug`.
pub fn install(filter: &str, format: Format) -> Result<Levels, LoggingError> {
    let filter = parse_filter(filter)?;
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        Format::Auto => !terminal,
        Format::Text => false,
        Format::Json => true,
    };
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    // One for each form, because they are of different types.
    if json {
        let builder = builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_filter_reloading();
        let handle = builder.reload_handle();
        builder.try_init().map_err(|_| LoggingError::Again)?;
        Ok(Levels(Box::new(move |filter| {
            handle.reload(filter).map_err(|_| LoggingError::Gone)
        })))
    } else {
        let builder = builder
            .with_ansi(terminal)
            .with_target(false)
            .with_filter_reloading();
        let handle = builder.reload_handle();
        builder.try_init().map_err(|_| LoggingError::Again)?;
        Ok(Levels(Box::new(move |filter| {
            handle.reload(filter).map_err(|_| LoggingError::Gone)
        })))
    }
}

fn parse_filter(filter: &str) -> Result<EnvFilter, LoggingError> {
    EnvFilter::builder()
        .parse(filter)
        .map_err(|error| LoggingError::Filter {
            filter: filter.to_owned(),
            why: error.to_string(),
        })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn a_filter_by_level_and_target_is_understood() {
        check_filter("info").unwrap();
        check_filter("warn,bellwire_server::store=debug").unwrap();
    }

    #[test]
    fn a_wrong_filter_names_itself_in_the_error() {
        let error = check_filter("store=loudly").unwrap_err();
        assert!(error.to_string().contains("store=loudly"));
    }
}
