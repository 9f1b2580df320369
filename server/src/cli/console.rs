//! What people see: text and tables on standard output, trouble on standard error.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};

/// A colour or weight on a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Paint {
    /// Headings and names.
    Bold,
    /// What is less important.
    Dim,
    /// It went well.
    Green,
    /// It did not.
    Red,
    /// Look here.
    Yellow,
    /// Something to copy.
    Cyan,
}

impl Paint {
    fn code(self) -> &'static str {
        match self {
            Paint::Bold => "1",
            Paint::Dim => "2",
            Paint::Green => "32",
            Paint::Red => "31",
            Paint::Yellow => "33",
            Paint::Cyan => "36",
        }
    }
}

/// One of the two streams, with or without colours.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Console {
    stream: Stream,
    colour: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stream {
    Out,
    Err,
}

impl Console {
    /// Standard output: answers.
    pub(crate) fn out() -> Console {
        Console {
            stream: Stream::Out,
            colour: colour_wanted(io::stdout().is_terminal()),
        }
    }

    /// Standard error: trouble.
    pub(crate) fn err() -> Console {
        Console {
            stream: Stream::Err,
            colour: colour_wanted(io::stderr().is_terminal()),
        }
    }

    /// Whether colours are written.
    pub(crate) fn colour(self) -> bool {
        self.colour
    }

    /// The text, painted if this stream has colours.
    pub(crate) fn paint(self, paint: Paint, text: &str) -> String {
        if self.colour && !text.is_empty() {
            format!("\x1b[{}m{text}\x1b[0m", paint.code())
        } else {
            text.to_owned()
        }
    }

    /// Writes one line. A reader that went away is not our trouble; anything else cannot be told to anybody.
    pub(crate) fn line(self, text: &str) {
        let _ = match self.stream {
            Stream::Out => {
                let mut out = io::stdout().lock();
                writeln!(out, "{text}").and_then(|()| out.flush())
            }
            Stream::Err => writeln!(io::stderr().lock(), "{text}"),
        };
    }

    /// Writes a table: columns aligned, two spaces between, the heading in bold.
    pub(crate) fn table(self, heading: &[&str], rows: &[Vec<String>]) {
        let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let aligned = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (cell, width) in cells.zip(&widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:<width$}  ");
            }
            line.trim_end().to_owned()
        };
        let heading = aligned(&mut heading.iter().copied());
        self.line(&self.paint(Paint::Bold, &heading));
        for row in rows {
            self.line(&aligned(&mut row.iter().map(String::as_str)));
        }
    }

    /// Writes names and values, one pair a line.
    pub(crate) fn pairs(self, pairs: &[(&str, String)]) {
        let width = pairs
            .iter()
            .map(|(name, _)| name.chars().count())
            .max()
            .unwrap_or(0);
        for (name, value) in pairs {
            let name = self.paint(Paint::Bold, &format!("{name:<width$}"));
            self.line(format!("{name}  {value}").trim_end());
        }
    }
}

/// <https://no-color.org>: set and not empty means no colours; so does a terminal that says it is dumb.
fn colour_wanted(terminal: bool) -> bool {
    let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
    terminal && !is_set("NO_COLOR") && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// Text of others made safe for a terminal: control characters would let a device's name move the cursor.
pub(crate) fn plain(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}
