//! A report as Markdown.

use std::fmt::Write as _;

use super::{Budget, Report};

/// Columns of a table of figures.
const COLUMNS: usize = 8;

pub(super) fn report(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(text, "## {}\n", report.workload);
    let _ = writeln!(
        text,
        "{}; commit {}; {} build; {} {}\n",
        report.machine,
        report.commit.as_deref().unwrap_or("unknown"),
        report.build,
        report.runs,
        if report.runs == 1 {
            "run"
        } else {
            "runs: medians, least and most beside them"
        },
    );
    let settings: Vec<String> = report
        .settings
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| format!("{name} {value}"))
        .collect();
    let _ = writeln!(text, "{}\n", settings.join(", "));
    let header = [
        "figure", "value", "spread", "unit", "floor", "× floor", "budget", "",
    ];
    let mut rows = vec![header.map(str::to_owned)];
    for figure in &report.figures {
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
        let spread = figure
            .spread()
            .map(|(least, most)| format!("{} to {}", number(least), number(most)));
        rows.push([
            figure.name.clone(),
            number(figure.value),
            spread.unwrap_or_default(),
            figure.unit.to_owned(),
            figure.floor.map(number).unwrap_or_default(),
            figure.ratio().map(number).unwrap_or_default(),
            budget,
            within.to_owned(),
        ]);
    }
    table(&mut text, &rows);
    for drawing in report.drawings() {
        let _ = writeln!(text, "\n![{}]({})", drawing.title, drawing.file);
    }
    for note in &report.notes {
        let _ = writeln!(text, "\n{note}");
    }
    for violation in &report.violations {
        let _ = writeln!(text, "\nFAILED: {violation}");
    }
    text
}

/// Writes a Markdown table whose columns line up; the first row is its head.
fn table(text: &mut String, rows: &[[String; COLUMNS]]) {
    let width: [usize; COLUMNS] = std::array::from_fn(|column| {
        rows.iter()
            .map(|row| row[column].chars().count())
            .max()
            .unwrap_or_default()
    });
    // Columns of numbers.
    let right = |column: usize| matches!(column, 1 | 2 | 4 | 5);
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
pub(super) fn number(value: f64) -> String {
    if value == 0.0 {
        // Not "-0", which is what a sum of nothing is.
        return "0".to_owned();
    }
    if value.abs() >= 1_000.0 {
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::super::Figure;
    use super::*;

    #[test]
    fn numbers_show_what_means_something() {
        assert_eq!(number(0.0), "0");
        assert_eq!(number(-0.0), "0");
        assert_eq!(number(1.234), "1.23");
        assert_eq!(number(12.34), "12.3");
        assert_eq!(number(123.4), "123");
        assert_eq!(number(1_234_567.8), "1,234,568");
        assert_eq!(number(-123_456.0), "-123,456");
    }

    #[test]
    fn a_report_names_what_was_missed() {
        let one = |connect: f64| {
            let mut report = Report::new("ping", &serde_json::json!({"devices": 2})).unwrap();
            report.push(
                Figure::new("connect", connect, "µs")
                    .floor(Some(200.0))
                    .budget(Budget::TimesFloorAtMost(1.25)),
            );
            report.push(Figure::new("rate", 20_000.0, "pings/s").budget(Budget::AtLeast(15_000.0)));
            report
        };
        let text = Report::of_runs(vec![one(300.0), one(400.0)])
            .unwrap()
            .markdown();
        let line = |name: &str| {
            text.lines()
                .find(|line| line.contains(name))
                .unwrap()
                .to_owned()
        };
        assert!(line("connect").ends_with("| missed |"), "{text}");
        assert!(line("connect").contains("300 to 400"), "{text}");
        assert!(line("| rate").ends_with("| met    |"), "{text}");
        assert!(line("commit").contains("2 runs"), "{text}");
    }
}
