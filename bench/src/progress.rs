//! What the person at the terminal sees while a workload runs: a bar, or a line for each phase where there is no terminal.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// How often a bar without steps moves.
const TICK: Duration = Duration::from_millis(200);

/// Shows phases on standard error.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    terminal: bool,
    silent: bool,
}

impl Progress {
    /// `silent`: say nothing.
    pub(crate) fn new(silent: bool) -> Progress {
        Progress {
            terminal: std::io::stderr().is_terminal(),
            silent,
        }
    }

    /// One line.
    pub(crate) fn say(self, what: &str) {
        if !self.silent {
            eprintln!("{what}");
        }
    }

    /// A phase of so many steps.
    pub(crate) fn phase(self, name: &str, steps: usize) -> Phase {
        self.begin(name, steps, "{msg:22} {bar:40} {pos}/{len} {elapsed}")
    }

    /// A phase that ends by itself.
    pub(crate) fn wait(self, name: &str) -> Phase {
        self.begin(name, 0, "{msg:22} {spinner} {elapsed}")
    }

    fn begin(self, name: &str, steps: usize, template: &str) -> Phase {
        if self.silent {
            return Phase(ProgressBar::hidden());
        }
        if !self.terminal {
            eprintln!("{name} ...");
            return Phase(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(steps as u64).with_message(name.to_owned());
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.enable_steady_tick(TICK);
        Phase(bar)
    }
}

/// One phase; it leaves the terminal when it is done or dropped.
#[derive(Debug, Clone)]
pub(crate) struct Phase(ProgressBar);

impl Phase {
    pub(crate) fn step(&self) {
        self.0.inc(1);
    }

    pub(crate) fn done(&self) {
        self.0.finish_and_clear();
    }
}
