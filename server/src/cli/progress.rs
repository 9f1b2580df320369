//! How far a long piece of work is: a bar on a terminal, a plain line now and then elsewhere, nothing for scripts.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::store::size;
use super::{Console, plain};

/// Plain lines come when so much more of the whole is done, percent.
const STEP: u64 = 20;
/// Less than so many bytes are no long work: no line is written.
const WORTH: u64 = 64 << 20;

/// One piece of work after the other.
pub(crate) struct Progress {
    bar: Option<ProgressBar>,
    quiet: bool,
    what: &'static str,
    told: u64,
}

impl Progress {
    /// `quiet`: for scripts, which look at the answer only.
    pub(crate) fn new(quiet: bool) -> Progress {
        let terminal = std::io::stderr().is_terminal() && !quiet;
        Progress {
            bar: terminal.then(|| {
                ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10))
            }),
            quiet,
            what: "",
            told: 0,
        }
    }

    /// So much of `total` bytes is done; 0: nobody knows of how much.
    pub(crate) fn bytes(&mut self, what: &'static str, done: u64, total: u64) {
        self.begin(what, total, true);
        if self.bar.is_none() && done.max(total) < WORTH {
            return;
        }
        self.at(done, total, &size(done), &size(total));
    }

    /// So many of `total` are done; 0: nobody knows of how many.
    pub(crate) fn count(&mut self, what: &'static str, done: u64, total: u64) {
        self.begin(what, total, false);
        self.at(done, total, &done.to_string(), &total.to_string());
    }

    /// The same, of a step that is told when it begins, however short it is.
    pub(crate) fn step(&mut self, what: &'static str, done: u64, total: u64) {
        if self.what != what && self.bar.is_none() && !self.quiet {
            Console::err().line(&plain(what));
        }
        self.count(what, done, total);
    }

    fn begin(&mut self, what: &'static str, total: u64, bytes: bool) {
        if self.what == what {
            return;
        }
        self.what = what;
        self.told = 0;
        let Some(bar) = &self.bar else {
            return;
        };
        let template = match (total, bytes) {
            (0, true) => "{msg}  {bytes} ({bytes_per_sec})",
            (0, false) => "{msg}",
            (_, true) => "{msg}  [{bar:30}] {bytes} of {total_bytes} ({bytes_per_sec}, {eta})",
            (_, false) => "{msg}  [{bar:30}] {pos} of {len}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.reset();
        bar.enable_steady_tick(Duration::from_millis(250));
        bar.set_message(what);
    }

    fn at(&mut self, done: u64, total: u64, done_text: &str, total_text: &str) {
        if let Some(bar) = &self.bar {
            if total > 0 {
                bar.set_length(total);
            }
            bar.set_position(done);
            return;
        }
        if self.quiet {
            return;
        }
        // Of an unknown whole each doubling from 64 MiB on is told.
        let reached = match done.saturating_mul(100).checked_div(total) {
            Some(percent) => percent / STEP * STEP,
            None if done >= WORTH => u64::from(done.ilog2()),
            None => 0,
        };
        if reached > self.told {
            self.told = reached;
            let of = if total > 0 {
                format!(" of {total_text}")
            } else {
                String::new()
            };
            Console::err().line(&plain(&format!("{}: {done_text}{of}", self.what)));
        }
    }

    /// Nothing more is to come: the bar goes.
    pub(crate) fn done(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done();
    }
}
