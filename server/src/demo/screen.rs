//! Writes the steps: with colours and marks on a terminal, plain lines elsewhere.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bellwire_server::delivery::Mono;
use bellwire_server::ports::Clock;
use bellwire_server::runtime::SystemClock;

use crate::cli::{Console, Paint, plain};

/// Column at which the times stand.
const TIME_COLUMN: usize = 82;

/// Where the demonstration is shown.
pub(super) struct Screen {
    console: Console,
    clock: SystemClock,
    steps: AtomicU32,
    watching: AtomicBool,
}

/// When something began.
#[derive(Debug, Clone, Copy)]
pub(super) struct Began(Mono);

impl Screen {
    pub(super) fn new() -> Screen {
        let screen = Screen {
            console: Console::out(),
            clock: SystemClock::new(),
            steps: AtomicU32::new(0),
            watching: AtomicBool::new(false),
        };
        let title = format!("Bellwire {}", env!("CARGO_PKG_VERSION"));
        screen.console.line(&format!(
            "{}: a server, two devices, a crash. Every step is checked; times are of this machine.",
            screen.console.paint(Paint::Bold, &title)
        ));
        screen
    }

    /// Begins a step: what is about to happen.
    pub(super) fn step(&self, text: &str) {
        let number = self.steps.fetch_add(1, Ordering::Relaxed) + 1;
        let heading = self.console.paint(Paint::Bold, text);
        self.console.line(&format!("\n{number:>2}. {heading}"));
    }

    /// Starts a watch.
    pub(super) fn begin(&self) -> Began {
        Began(self.clock.now().mono)
    }

    /// Something was checked and is so; with the time since it began.
    pub(super) fn good(&self, text: &str, began: Began) {
        let took = self.took(began);
        let mark = if self.console.colour() {
            self.console.paint(Paint::Green, "✓")
        } else {
            "ok".to_owned()
        };
        let width = TIME_COLUMN.saturating_sub(text.chars().count());
        let time = self
            .console
            .paint(Paint::Dim, &format!("{:>width$}", format!("{took} ms")));
        self.console.line(&format!("    {mark} {text} {time}"));
    }

    /// A remark.
    pub(super) fn note(&self, text: &str) {
        self.console
            .line(&format!("      {}", self.console.paint(Paint::Dim, text)));
    }

    /// Something to copy into another terminal.
    pub(super) fn command(&self, text: &str) {
        self.console.line(&format!(
            "\n      {}",
            self.console.paint(Paint::Cyan, text)
        ));
    }

    /// A plain paragraph.
    pub(super) fn say(&self, text: &str) {
        self.console.line(&format!("\n{text}"));
    }

    /// From now on, what reaches a device is shown as it comes.
    pub(super) fn watch(&self) {
        self.watching.store(true, Ordering::Relaxed);
    }

    /// No longer.
    pub(super) fn quiet(&self) {
        self.watching.store(false, Ordering::Relaxed);
    }

    /// Whether the tour is over and pings by hand are shown.
    pub(super) fn watching(&self) -> bool {
        self.watching.load(Ordering::Relaxed)
    }

    /// A device got something, in the part after the tour.
    pub(super) fn rang(&self, device: &str, title: Option<&str>, body: Option<&str>) {
        if !self.watching() {
            return;
        }
        let text: Vec<String> = [title, body].into_iter().flatten().map(plain).collect();
        let name = self.console.paint(Paint::Bold, device);
        self.console
            .line(&format!("      {name}: {}", text.join(" - ")));
    }

    /// All of it happened.
    pub(super) fn finish(&self) {
        let text = self.console.paint(Paint::Green, "Every step happened.");
        self.console.line(&format!("\n{text}"));
    }

    fn took(&self, began: Began) -> String {
        let took: Duration = self.clock.now().mono - began.0;
        let ms = took.as_secs_f64() * 1_000.0;
        if ms < 10.0 {
            format!("{ms:.1}")
        } else {
            format!("{ms:.0}")
        }
    }
}
