//! Plots as SVG: lines over a linear or logarithmic axis, a bar from the least to the most that a run had, floors dashed.
//!
//! Written by hand, because a plot of a few lines needs no library of drawing.

use std::fmt::Write as _;

use super::Figure;
use super::markdown::number;

/// What a plot shows. Its points are figures that name it.
#[derive(Debug, PartialEq)]
pub(crate) struct Plot {
    pub(crate) title: &'static str,
    pub(crate) x_label: &'static str,
    /// Logarithmic axis; values of 0 are left out.
    pub(crate) x_log: bool,
    pub(crate) y_log: bool,
}

/// A plot that is drawn.
#[derive(Debug, Clone)]
pub(crate) struct Drawing {
    pub(crate) title: &'static str,
    /// The name of its file.
    pub(crate) file: String,
    pub(crate) svg: String,
}

/// Size of a drawing, and of what surrounds the plot itself, in units of the drawing.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 84.0;
const RIGHT: f64 = 200.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 56.0;

/// Ticks wanted on a linear axis.
const TICKS: f64 = 6.0;

/// Colours that are told apart by people who see few.
const COLOURS: [&str; 7] = [
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333",
];

/// One axis: from the values to places between 0 and 1.
struct Axis {
    from: f64,
    to: f64,
    log: bool,
    ticks: Vec<f64>,
}

impl Axis {
    fn over(values: impl Iterator<Item = f64>, log: bool) -> Option<Axis> {
        let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in values.filter(|value| value.is_finite() && (!log || *value > 0.0)) {
            least = least.min(value);
            most = most.max(value);
        }
        if least > most {
            return None;
        }
        if log {
            let (low, high) = (least.log10().floor(), most.log10().ceil());
            let high = if high > low { high } else { low + 1.0 };
            let mut ticks = Vec::new();
            for power in low as i32..=high as i32 {
                ticks.push(10f64.powi(power));
            }
            return Some(Axis {
                from: low,
                to: high,
                log,
                ticks,
            });
        }
        // From zero: what is drawn is how much there is, not only how it changes.
        let low = least.min(0.0);
        let high = if most > low { most } else { low + 1.0 };
        let rough = (high - low) / TICKS;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|times| times * power)
            .find(|step| *step >= rough)
            .unwrap_or(10.0 * power);
        let (low, high) = ((low / step).floor(), (high / step).ceil());
        let ticks = (low as i64..=high as i64)
            .map(|tick| tick as f64 * step)
            .collect();
        Some(Axis {
            from: low * step,
            to: high * step,
            log,
            ticks,
        })
    }

    /// `None`: a value that a logarithm does not have.
    fn place(&self, value: f64) -> Option<f64> {
        let value = match self.log {
            true if value <= 0.0 => return None,
            true => value.log10(),
            false => value,
        };
        Some((value - self.from) / (self.to - self.from))
    }
}

/// Draws every plot that figures have places in.
pub(super) fn draw(workload: &str, figures: &[Figure]) -> Vec<Drawing> {
    let mut plots: Vec<(&'static Plot, Vec<&Figure>)> = Vec::new();
    for figure in figures {
        let Some(place) = &figure.place else { continue };
        match plots.iter_mut().find(|(plot, _)| **plot == *place.plot) {
            Some((_, points)) => points.push(figure),
            None => plots.push((place.plot, vec![figure])),
        }
    }
    plots
        .into_iter()
        .filter_map(|(plot, points)| {
            Some(Drawing {
                title: plot.title,
                file: format!("{workload}-{}.svg", slug(plot.title)),
                svg: svg(plot, &points)?,
            })
        })
        .collect()
}

fn slug(title: &str) -> String {
    let words: Vec<String> = title
        .split(|letter: char| !letter.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_ascii_lowercase)
        .collect();
    words.join("-")
}

fn svg(plot: &Plot, points: &[&Figure]) -> Option<String> {
    let x_of = |figure: &Figure| figure.place.as_ref().map_or(0.0, |place| place.x);
    let x = Axis::over(points.iter().map(|point| x_of(point)), plot.x_log)?;
    let values = points.iter().flat_map(|point| {
        let (least, most) = point.spread().unwrap_or((point.value, point.value));
        [Some(least), Some(most), point.floor].into_iter().flatten()
    });
    let y = Axis::over(values, plot.y_log)?;
    let right = |value: f64| {
        x.place(value)
            .map(|place| LEFT + place * (WIDTH - LEFT - RIGHT))
    };
    let up = |value: f64| {
        y.place(value)
            .map(|place| HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM))
    };
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>
<text x="{LEFT}" y="24" font-size="15">{}</text>"##,
        escaped(plot.title)
    );
    for tick in &x.ticks {
        let Some(at) = right(*tick) else { continue };
        let _ = writeln!(
            out,
            r##"<line x1="{at:.1}" x2="{at:.1}" y1="{TOP}" y2="{:.1}" stroke="#e4e4e4"/><text x="{at:.1}" y="{:.1}" text-anchor="middle">{}</text>"##,
            HEIGHT - BOTTOM,
            HEIGHT - BOTTOM + 18.0,
            short(*tick)
        );
    }
    for tick in &y.ticks {
        let Some(at) = up(*tick) else { continue };
        let _ = writeln!(
            out,
            r##"<line x1="{LEFT}" x2="{:.1}" y1="{at:.1}" y2="{at:.1}" stroke="#e4e4e4"/><text x="{:.1}" y="{:.1}" text-anchor="end">{}</text>"##,
            WIDTH - RIGHT,
            LEFT - 8.0,
            at + 4.0,
            short(*tick)
        );
    }
    let unit = points.first().map_or("", |point| point.unit);
    let middle = f64::midpoint(TOP, HEIGHT - BOTTOM);
    let _ = writeln!(
        out,
        r#"<text x="{:.1}" y="{:.1}" text-anchor="middle">{}</text>
<text x="18" y="{middle:.1}" text-anchor="middle" transform="rotate(-90 18 {middle:.1})">{}</text>"#,
        f64::midpoint(LEFT, WIDTH - RIGHT),
        HEIGHT - 14.0,
        escaped(plot.x_label),
        escaped(unit)
    );
    let mut series: Vec<(&str, Vec<&Figure>)> = Vec::new();
    for point in points {
        let name = point
            .place
            .as_ref()
            .map_or("", |place| place.series.as_str());
        match series.iter_mut().find(|(known, _)| *known == name) {
            Some((_, line)) => line.push(point),
            None => series.push((name, vec![point])),
        }
    }
    for (number, (name, mut line)) in series.into_iter().enumerate() {
        line.sort_by(|one, other| x_of(one).total_cmp(&x_of(other)));
        let colour = COLOURS[number % COLOURS.len()];
        let path = |value: &dyn Fn(&Figure) -> Option<f64>| {
            let places: Vec<String> = line
                .iter()
                .filter_map(|point| {
                    Some(format!(
                        "{:.1},{:.1}",
                        right(x_of(point))?,
                        up(value(point)?)?
                    ))
                })
                .collect();
            places.join(" ")
        };
        let _ = writeln!(
            out,
            r#"<polyline points="{}" fill="none" stroke="{colour}" stroke-width="2"/>"#,
            path(&|point| Some(point.value))
        );
        let floor = path(&|point| point.floor);
        if !floor.is_empty() {
            let _ = writeln!(
                out,
                r#"<polyline points="{floor}" fill="none" stroke="{colour}" stroke-dasharray="4 4"/>"#
            );
        }
        for point in &line {
            let Some((at, height)) = right(x_of(point)).zip(up(point.value)) else {
                continue;
            };
            let _ = writeln!(
                out,
                r#"<circle cx="{at:.1}" cy="{height:.1}" r="3" fill="{colour}"/>"#
            );
            let bar = point
                .spread()
                .and_then(|(least, most)| up(least).zip(up(most)));
            if let Some((low, high)) = bar {
                let _ = writeln!(
                    out,
                    r#"<line x1="{at:.1}" x2="{at:.1}" y1="{low:.1}" y2="{high:.1}" stroke="{colour}"/>"#
                );
            }
        }
        let height = TOP + 16.0 * number as f64 + 8.0;
        let _ = writeln!(
            out,
            r#"<rect x="{:.1}" y="{:.1}" width="10" height="10" fill="{colour}"/><text x="{:.1}" y="{height:.1}">{}</text>"#,
            WIDTH - RIGHT + 14.0,
            height - 9.0,
            WIDTH - RIGHT + 30.0,
            escaped(name)
        );
    }
    if points.iter().any(|point| point.floor.is_some()) {
        let _ = writeln!(
            out,
            r#"<text x="{:.1}" y="{:.1}">dashed: floor</text>"#,
            WIDTH - RIGHT + 14.0,
            HEIGHT - BOTTOM
        );
    }
    out.push_str("</svg>\n");
    Some(out)
}

/// A tick's value in few letters.
fn short(value: f64) -> String {
    for (over, letter) in [(1e9, "G"), (1e6, "M"), (1e3, "k")] {
        if value.abs() >= over {
            let times = value / over;
            return match times.fract() == 0.0 {
                true => format!("{times:.0}{letter}"),
                false => format!("{times:.1}{letter}"),
            };
        }
    }
    if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        let text = if value.abs() < 0.01 {
            format!("{value:.4}")
        } else {
            number(value)
        };
        text.trim_end_matches('0').to_owned()
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    static PLOT: Plot = Plot {
        title: "Latency, by <rate>",
        x_label: "pings/s",
        x_log: true,
        y_log: false,
    };

    #[test]
    fn figures_with_a_place_are_drawn() {
        let point = |name: &str, x: f64, value: f64| {
            Figure::new(name, value, "ms").plotted(&PLOT, "p50 & more", x)
        };
        let figures = [
            point("a", 10.0, 2.0).floor(Some(1.0)),
            point("b", 1_000.0, 4.0).floor(Some(1.5)),
            point("no logarithm", 0.0, 4.0),
            Figure::new("no place", 9.0, "ms"),
        ];
        let drawings = draw("ping", &figures);
        assert_eq!(drawings.len(), 1);
        assert_eq!(drawings[0].file, "ping-latency-by-rate.svg");
        let svg = &drawings[0].svg;
        assert_eq!(svg.matches("<polyline").count(), 2, "{svg}");
        assert_eq!(svg.matches("<circle").count(), 2, "{svg}");
        assert!(svg.contains("by &lt;rate&gt;"), "{svg}");
        assert!(svg.contains("p50 &amp; more"), "{svg}");
        assert!(!svg.contains("NaN"), "{svg}");
        assert!(draw("ping", &figures[3..]).is_empty());
    }

    #[test]
    fn axes_reach_over_their_values() {
        let linear = Axis::over([3.0, 17.0].into_iter(), false).unwrap();
        assert_eq!((linear.from, linear.to), (0.0, 20.0));
        assert_eq!(linear.place(10.0), Some(0.5));
        let log = Axis::over([5.0, 0.0, 500.0].into_iter(), true).unwrap();
        assert_eq!(log.ticks, [1.0, 10.0, 100.0, 1_000.0]);
        assert_eq!(log.place(0.0), None);
        assert!(Axis::over([f64::NAN].into_iter(), false).is_none());
        let flat = Axis::over([0.0].into_iter(), false).unwrap();
        assert_eq!(flat.place(0.0), Some(0.0));
    }

    #[test]
    fn ticks_are_short() {
        assert_eq!(short(0.0), "0");
        assert_eq!(short(0.5), "0.5");
        assert_eq!(short(20_000.0), "20k");
        assert_eq!(short(1_500_000.0), "1.5M");
    }
}
