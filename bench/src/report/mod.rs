//! What a workload found: figures with their spread over the runs, their floors and their budgets; printed as Markdown, as
//! JSON, and drawn as plots.
//!
//! A workload makes one report a run. [`Report::of_runs`] makes one of several: the value of a figure is then the median,
//! beside the least and the most that a run had.

mod markdown;
mod plot;

use std::collections::BTreeMap;
use std::process::Command;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value};

pub(crate) use plot::{Drawing, Plot};

use crate::failure::{During, Outcome};
use crate::process::Machine;

/// One figure.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figure {
    /// What was measured; one name stands once in a report.
    pub(crate) name: String,
    /// The median over the runs.
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What each run had, in the order of the runs.
    pub(crate) runs: Vec<f64>,
    /// The same of a program that does only this, measured in the same runs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) floor: Option<f64>,
    /// The line that the first measured release must reach.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) budget: Option<Budget>,
    /// Where it stands in a plot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) place: Option<Place>,
}

/// A line that a figure must reach.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Budget {
    /// In the unit of the figure.
    AtMost(f64),
    /// In the unit of the figure.
    AtLeast(f64),
    /// Figure divided by its floor.
    TimesFloorAtMost(f64),
}

/// A point of a plot.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Place {
    #[serde(serialize_with = "title_of")]
    pub(crate) plot: &'static Plot,
    /// The line that it belongs to.
    pub(crate) series: String,
    pub(crate) x: f64,
}

fn title_of<S: serde::Serializer>(plot: &&'static Plot, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(plot.title)
}

impl Figure {
    pub(crate) fn new(name: impl Into<String>, value: f64, unit: &'static str) -> Figure {
        Figure {
            name: name.into(),
            value,
            unit,
            runs: vec![value],
            floor: None,
            budget: None,
            place: None,
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

    /// A budget that counts only where it was meant for what was measured.
    pub(crate) fn budget_if(self, meant: bool, budget: Budget) -> Figure {
        if meant { self.budget(budget) } else { self }
    }

    pub(crate) fn plotted(
        self,
        plot: &'static Plot,
        series: impl Into<String>,
        x: impl Into<f64>,
    ) -> Figure {
        Figure {
            place: Some(Place {
                plot,
                series: series.into(),
                x: x.into(),
            }),
            ..self
        }
    }

    /// The least and the most that a run had; nothing to tell of one run.
    pub(crate) fn spread(&self) -> Option<(f64, f64)> {
        if self.runs.len() < 2 {
            return None;
        }
        let least = self.runs.iter().copied().fold(f64::INFINITY, f64::min);
        let most = self.runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some((least, most))
    }

    /// Figure divided by floor.
    pub(crate) fn ratio(&self) -> Option<f64> {
        self.floor
            .filter(|floor| *floor > 0.0)
            .map(|floor| self.value / floor)
    }

    /// Whether the budget is met; `None` without one, or without the floor that it speaks of.
    pub(crate) fn within(&self) -> Option<bool> {
        match self.budget? {
            Budget::AtMost(most) => Some(self.value <= most),
            Budget::AtLeast(least) => Some(self.value >= least),
            Budget::TimesFloorAtMost(times) => Some(self.ratio()? <= times),
        }
    }
}

/// Everything that a workload found.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Report {
    pub(crate) workload: &'static str,
    machine: Machine,
    /// The commit that stands beside this program, if it stands in a repository.
    #[serde(skip_serializing_if = "Option::is_none")]
    commit: Option<String>,
    /// `release`, or `debug`, whose figures mean nothing.
    build: &'static str,
    settings: Map<String, Value>,
    /// Runs that the figures come from.
    runs: usize,
    pub(crate) figures: Vec<Figure>,
    /// What a reader must know to read the figures, such as what was the bottleneck.
    pub(crate) notes: Vec<String>,
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
            runs: 1,
            figures: Vec::new(),
            notes: Vec::new(),
            violations: Vec::new(),
        })
    }

    /// One report of several runs of the same workload with the same settings. `None` without runs.
    pub(crate) fn of_runs(runs: Vec<Report>) -> Option<Report> {
        let count = runs.len();
        let mut runs = runs.into_iter();
        let mut whole = runs.next()?;
        if count == 1 {
            return Some(whole);
        }
        let mut places: BTreeMap<String, usize> = BTreeMap::new();
        let mut floors: Vec<Vec<f64>> = Vec::new();
        for (place, figure) in whole.figures.iter().enumerate() {
            places.insert(figure.name.clone(), place);
            floors.push(figure.floor.into_iter().collect());
        }
        for violation in &mut whole.violations {
            *violation = format!("run 1: {violation}");
        }
        for (number, run) in runs.enumerate() {
            for figure in run.figures {
                match places.get(&figure.name) {
                    Some(&place) => {
                        whole.figures[place].runs.extend(figure.runs);
                        floors[place].extend(figure.floor);
                    }
                    None => {
                        places.insert(figure.name.clone(), whole.figures.len());
                        floors.push(figure.floor.into_iter().collect());
                        whole.figures.push(figure);
                    }
                }
            }
            for note in run.notes {
                if !whole.notes.contains(&note) {
                    whole.notes.push(note);
                }
            }
            let violations = run.violations.into_iter();
            whole
                .violations
                .extend(violations.map(|what| format!("run {}: {what}", number + 2)));
        }
        for (figure, floors) in whole.figures.iter_mut().zip(floors) {
            figure.value = median(&figure.runs).unwrap_or(figure.value);
            figure.floor = median(&floors);
        }
        whole.runs = count;
        Some(whole)
    }

    pub(crate) fn push(&mut self, figure: Figure) {
        self.figures.push(figure);
    }

    pub(crate) fn note(&mut self, note: impl Into<String>) {
        let note = note.into();
        if !self.notes.contains(&note) {
            self.notes.push(note);
        }
    }

    pub(crate) fn violation(&mut self, what: impl Into<String>) {
        self.violations.push(what.into());
    }

    /// The percentiles of a histogram of microseconds, in milliseconds.
    pub(crate) fn push_latency(&mut self, name: &str, micros: &Histogram<u64>) {
        for (label, quantile) in PERCENTILES {
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

    /// States the floor under a figure that is there already.
    pub(crate) fn set_floor(&mut self, name: &str, floor: f64) {
        for figure in self.figures.iter_mut().filter(|figure| figure.name == name) {
            figure.floor = Some(floor);
        }
    }

    pub(crate) fn markdown(&self) -> String {
        markdown::report(self)
    }

    /// The plots that its figures have places in.
    pub(crate) fn drawings(&self) -> Vec<Drawing> {
        plot::draw(self.workload, &self.figures)
    }
}

/// What is told of a histogram.
const PERCENTILES: [(&str, f64); 5] = [
    ("p50", 0.5),
    ("p90", 0.9),
    ("p99", 0.99),
    ("p99.9", 0.999),
    ("max", 1.0),
];

/// The middle one; of an even number, the mean of the two in the middle.
pub(crate) fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let upper = *sorted.get(middle)?;
    Some(match sorted.len().is_multiple_of(2) {
        true => f64::midpoint(sorted[middle - 1], upper),
        false => upper,
    })
}

fn commit() -> Option<String> {
    let directory = std::env::current_exe().ok()?.parent()?.to_owned();
    let git = |arguments: &[&str]| {
        let output = Command::new("git")
            .args(arguments)
            .current_dir(&directory)
            .stderr(std::process::Stdio::null())
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(text)
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"]).filter(|commit| !commit.is_empty())?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])
        .is_some_and(|changes| !changes.is_empty());
    Some(match changed {
        true => format!("{commit} with changes"),
        false => commit,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn run(connect: f64, floor: f64) -> Report {
        let mut report = Report::new("connect", &serde_json::json!({"devices": 2})).unwrap();
        report.push(
            Figure::new("connect", connect, "µs")
                .floor(Some(floor))
                .budget(Budget::TimesFloorAtMost(1.25)),
        );
        report
    }

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0]), Some(3.0));
        assert_eq!(median(&[9.0, 1.0, 4.0]), Some(4.0));
        assert_eq!(median(&[9.0, 1.0, 4.0, 2.0]), Some(3.0));
    }

    #[test]
    fn several_runs_make_one_report_with_spread() {
        let mut second = run(300.0, 200.0);
        second.push(Figure::new("only here", 1.0, "pings"));
        second.note("the generator was late");
        second.violation("one lost");
        let whole = Report::of_runs(vec![run(200.0, 210.0), second, run(220.0, 190.0)]).unwrap();
        let connect = &whole.figures[0];
        assert_eq!(connect.value, 220.0);
        assert_eq!(connect.spread(), Some((200.0, 300.0)));
        assert_eq!(connect.floor, Some(200.0));
        assert_eq!(connect.within(), Some(true));
        assert_eq!(whole.figures[1].spread(), None);
        assert_eq!(whole.runs, 3);
        assert_eq!(whole.notes, ["the generator was late"]);
        assert_eq!(whole.violations, ["run 2: one lost"]);
        assert!(Report::of_runs(Vec::new()).is_none());
    }

    #[test]
    fn json_has_floors_and_settings() {
        let json = serde_json::to_value(run(300.0, 200.0)).unwrap();
        assert_eq!(json["figures"][0]["floor"], 200.0);
        assert_eq!(json["settings"]["devices"], 2);
    }
}
