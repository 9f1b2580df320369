//! What a workload found: one list of figures, printed as a Markdown table or as JSON.

use std::fmt::Write as _;
use std::process::Command;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::failure::{During, Outcome};
use crate::process::Machine;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// What was measured.
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// The same of a program that does only this, measured in the same run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) floor: Option<f64>,
    /// The line that the first measured release must reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) budget: Option<Budget>,
}

/// A line that a figure must reach.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Budget {
    /// In the unit of the figure.
    AtMost(f64),
    /// In the unit of the figure.
    AtLeast(f64),
    /// Figure divided by its floor.
    TimesFloorAtMost(f64),
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Figure {
        Figure {
            name: name.into(),
            value,
            unit,
            floor: None,
            budget: None,
        }
    }

    pub(crate) fn floor(self, floor: Option<f64>) -> Figure {
        Figure { floor, ..self }
    }

    pub(crate) fn budget(self, budget: Budget) -> Figure {
        Figure {
            budget: Some(budget),
            ..self
        }
    }

    /// Figure divided by floor.
    fn ratio(&self) -> Option<f64> {
        self.floor
            .filter(|floor| *floor > 0.0)
            .map(|floor| self.value / floor)
    }

    fn within(&self) -> Option<bool> {
        match self.budget? {
            Budget::AtMost(most) => Some(self.value <= most),
            Budget::AtLeast(least) => Some(self.value >= least),
            Budget::TimesFloorAtMost(times) => Some(self.ratio()? <= times),
        }
    }
}

/// Everything that a run found.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub(crate) workload: &'static str,
    machine: Machine,
    /// The commit that stands beside this program, if it stands in a repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<String>,
    /// `release`, or `debug`, whose figures mean nothing.
    build: &'static str,
    settings: Map<String, Value>,
    pub(crate) figures: Vec<Figure>,
    /// What must not happen and did. Empty in a good run.
    pub(crate) violations: Vec<String>,
}

impl Report {
    pub(crate) fn new(workload: &'static str, settings: &impl Serialize) -> Outcome<Report> {
        let settings = serde_json::to_value(settings).during("write down the settings")?;
        let settings = settings.as_object().cloned().unwrap_or_default();
        Ok(Report {
            workload,
            machine: Machine::here(),
            commit: commit(),
            build: if cfg!(debug_assertions) {
                "debug"
            } else {
                "release"
            },
            settings,
            figures: Vec::new(),
            violations: Vec::new(),
        })
    }

    pub(crate) fn push(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    /// The percentiles of a histogram of microseconds, in milliseconds.
    pub(crate) fn push_latency(&mut self, name: &str, micros: &Histogram<u64>) {
        for (label, quantile) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            let value = micros.value_at_quantile(quantile) as f64 / 1_000.0;
            self.push(Figure::new(format!("{name} {label}"), value, "ms"));
        }
    }

    /// States the line for a figure that is there already.
    pub(crate) fn set_budget(&mut self, name: &str, budget: Budget) {
        for figure in self.figures.iter_mut().filter(|figure| figure.name == name) {
            figure.budget = Some(budget);
        }
    }

    pub(crate) fn json(&self) -> Outcome<String> {
        serde_json::to_string_pretty(self).during("write the report")
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "## {}\n", self.workload);
        let _ = writeln!(
            text,
            "{}; commit {}; {} build\n",
            self.machine,
            self.commit.as_deref().unwrap_or("unknown"),
            self.build
        );
        let settings: Vec<String> = self
            .settings
            .iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| format!("{name} {value}"))
            .collect();
        let _ = writeln!(text, "{}\n", settings.join(", "));
        let header = ["figure", "value", "unit", "floor", "× floor", "budget", ""];
        let mut rows = vec![header.map(str::to_owned)];
        for figure in &self.figures {
            let budget = match figure.budget {
                None => String::new(),
                Some(Budget::AtMost(most)) => format!("≤ {}", number(most)),
                Some(Budget::AtLeast(least)) => format!("≥ {}", number(least)),
                Some(Budget::TimesFloorAtMost(times)) => format!("≤ {times} × floor"),
            };
            let within = match figure.within() {
                None => "",
                Some(true) => "met",
                Some(false) => "missed",
            };
            rows.push([
                figure.name.clone(),
                number(figure.value),
                figure.unit.to_owned(),
                figure.floor.map(number).unwrap_or_default(),
                figure.ratio().map(number).unwrap_or_default(),
                budget,
                within.to_owned(),
            ]);
        }
        table(&mut text, &rows);
        for violation in &self.violations {
            let _ = writeln!(text, "\nFAILED: {violation}");
        }
        text
    }
}

/// Writes a Markdown table whose columns line up; the first row is its head. Columns of numbers are the second, fourth
/// and fifth.
fn table(text: &mut String, rows: &[[String; 7]]) {
    let width: [usize; 7] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or_default()
    });
    let right = |column: usize| matches!(column, 1 | 3 | 4);
    for (place, row) in rows.iter().enumerate() {
        text.push('|');
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(width[column] - cell.chars().count());
            let _ = match right(column) {
                true => write!(text, " {pad}{cell} |"),
                false => write!(text, " {cell}{pad} |"),
            };
        }
        text.push('\n');
        if place == 0 {
            text.push('|');
            for (column, width) in width.iter().enumerate() {
                let dashes = "-".repeat(*width);
                let _ = match right(column) {
                    true => write!(text, " {dashes}:|"),
                    false => write!(text, " {dashes} |"),
                };
            }
            text.push('\n');
        }
    }
}

/// A number with as many digits as mean something.
fn number(value: f64) -> String {
    if value == 0.0 || value.abs() >= 1_000.0 {
        let digits = format!("{value:.0}");
        let mut grouped = String::new();
        for (place, digit) in digits.chars().enumerate() {
            let left = digits.len() - place;
            if place > 0 && left % 3 == 0 && !grouped.ends_with('-') {
                grouped.push(',');
            }
            grouped.push(digit);
        }
        grouped
    } else if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else if value.abs() >= 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.2}")
    }
}

fn commit() -> Option<String> {
    let directory = std::env::current_exe().ok()?.parent()?.to_owned();
    let output = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .current_dir(directory)
        .stderr(std::process::Stdio::null())
        .output()
        .ok()?;
    let commit = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    (output.status.success() && !commit.is_empty()).then_some(commit)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn numbers_show_what_means_something() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(1.234), "1.23");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(123.4), "123");
        assert_eq!(number(1_234_567.8), "1,234,568");
        assert_eq!(number(-123_456.0), "-123,456");
    }

    #[test]
    fn a_report_names_what_was_missed() {
        let mut report = Report::new("deliver", &serde_json::json!({"devices": 2})).unwrap();
        report.push(
            Figure::new("connect", 300.0, "µs")
                .floor(Some(200.0))
                .budget(Budget::TimesFloorAtMost(1.25)),
        );
        report.push(Figure::new("rate", 20_000.0, "pings/s").budget(Budget::AtLeast(15_000.0)));
        let text = report.markdown();
        let line = |name: &str| {
            text.lines()
                .find(|line| line.contains(name))
                .unwrap()
                .to_owned()
        };
        assert!(line("connect").ends_with("| missed |"), "{text}");
        assert!(line("| rate").ends_with("| met    |"), "{text}");
        let json: Value = serde_json::from_str(&report.json().unwrap()).unwrap();
        assert_eq!(json["figures"][0]["floor"], 200.0);
        assert_eq!(json["settings"]["devices"], 2);
    }
}
