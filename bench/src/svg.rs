//! Charts as SVG text: panels with two axes, lines, bars, and marked places.
//!
//! Pure and small on purpose: it knows numbers and names, not latencies. Values that a logarithmic axis cannot
//! show are left out.

use std::fmt::Write as _;

const WIDTH: f64 = 560.0;
const HEIGHT: f64 = 300.0;
const HEAD: f64 = 64.0;
/// Room around a panel's axes: left, right, top, bottom.
const MARGIN: [f64; 4] = [64.0, 24.0, 44.0, 48.0];
/// More bars than this are drawn as one shape.
const MANY_BARS: usize = 130;
/// Colours that stay apart for most colour-blind readers, and in print.
const COLOURS: [&str; 4] = ["#2563eb", "#d97706", "#059669", "#be185d"];

/// An axis.
#[derive(Clone, Debug)]
pub(crate) struct Axis {
    pub(crate) title: String,
    pub(crate) logarithmic: bool,
}

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Draw {
    /// A line with a dot at each point.
    Line,
    /// From each point's x to the next one's, as high as its y.
    Bars,
}

/// Points that belong together.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) name: String,
    pub(crate) draw: Draw,
    pub(crate) points: Vec<(f64, f64)>,
}

/// Two axes and what is between them.
#[derive(Clone, Debug)]
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) x: Axis,
    pub(crate) y: Axis,
    pub(crate) series: Vec<Series>,
    /// Places on the x axis that have a name.
    pub(crate) marks: Vec<(f64, String)>,
}

/// One axis with its range, on the screen.
struct Scale {
    logarithmic: bool,
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Scale {
    fn of(axis: &Axis, values: impl Iterator<Item = f64>, (from, to): (f64, f64)) -> Self {
        let shown = |value: &f64| value.is_finite() && (!axis.logarithmic || *value > 0.0);
        let range = (f64::INFINITY, f64::NEG_INFINITY);
        let (low, high) = values.filter(shown).fold(range, |(low, high), value| {
            (low.min(value), high.max(value))
        });
        let (low, high) = match (low.is_finite(), axis.logarithmic) {
            (false, _) => (1.0, 10.0),
            (true, true) => (low / 1.15, high * 1.15),
            // Heights are compared by eye: they begin at 0.
            (true, false) => (low.min(0.0), if high > 0.0 { high } else { 1.0 }),
        };
        Self {
            logarithmic: axis.logarithmic,
            low,
            high,
            from,
            to,
        }
    }

    fn place(&self, value: f64) -> f64 {
        let share = if self.logarithmic {
            (value.max(self.low) / self.low).ln() / (self.high / self.low).ln()
        } else {
            (value - self.low) / (self.high - self.low)
        };
        self.from + share.clamp(0.0, 1.0) * (self.to - self.from)
    }

    /// Round values within the range, four to eight where the axis is linear.
    fn ticks(&self) -> Vec<f64> {
        let exponents = |low: f64, high: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "exponents of finite values"
            )]
            let range = (low.log10().floor() as i32, high.log10().ceil() as i32);
            range.0..=range.1
        };
        if self.logarithmic {
            let few = self.high / self.low < 150.0;
            let digits: &[f64] = if few { &[1.0, 2.0, 5.0] } else { &[1.0] };
            let all = exponents(self.low, self.high)
                .flat_map(|exponent| digits.iter().map(move |d| d * 10f64.powi(exponent)));
            return all
                .filter(|tick| (self.low..=self.high).contains(tick))
                .collect();
        }
        let rough = (self.high - self.low) / 8.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
        let step = step
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let first = (self.low / step).ceil() * step;
        (0..20)
            .map(|number| first + f64::from(number) * step)
            .take_while(|tick| *tick <= self.high * (1.0 + 1e-9))
            .collect()
    }
}

/// The panels in two columns under a title.
pub(crate) fn document(title: &str, subtitle: &str, panels: &[Panel]) -> String {
    let rows = panels.len().div_ceil(2) as f64;
    let (width, height) = (2.0 * WIDTH, HEAD + rows * HEIGHT);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" \
         height=\"{height}\" font-family=\"Inter, Helvetica, Arial, sans-serif\" font-size=\"12\" \
         fill=\"#374151\">\n<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    );
    let title = escape(title);
    let subtitle = escape(subtitle);
    let _ = writeln!(
        svg,
        "<text x=\"24\" y=\"32\" font-size=\"20\" font-weight=\"600\" fill=\"#111827\">{title}</text>\n\
         <text x=\"24\" y=\"54\" font-size=\"13\" fill=\"#6b7280\">{subtitle}</text>"
    );
    for (index, panel) in panels.iter().enumerate() {
        let (x, y) = (
            (index % 2) as f64 * WIDTH,
            HEAD + (index / 2) as f64 * HEIGHT,
        );
        let _ = writeln!(svg, "<g transform=\"translate({x} {y})\">");
        panel.write(&mut svg);
        svg.push_str("</g>\n");
    }
    svg + "</svg>\n"
}

impl Panel {
    fn write(&self, svg: &mut String) {
        let [left, right, top, bottom] = MARGIN;
        let points = || self.series.iter().flat_map(|series| &series.points);
        let marked = self.marks.iter().map(|mark| mark.0);
        let xs = points().map(|point| point.0).chain(marked);
        let x = Scale::of(&self.x, xs, (left, WIDTH - right));
        let y = Scale::of(
            &self.y,
            points().map(|point| point.1),
            (HEIGHT - bottom, top),
        );
        self.write_axes(svg, &x, &y);
        for (series, colour) in self.series.iter().zip(COLOURS.iter().cycle()) {
            series.write(svg, &x, &y, colour);
        }
        self.write_names(svg, &x);
    }

    fn write_axes(&self, svg: &mut String, x: &Scale, y: &Scale) {
        let title = escape(&self.title);
        let (floor, middle) = (y.from, f64::midpoint(x.from, x.to));
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"20\" font-size=\"14\" font-weight=\"600\" fill=\"#111827\">{title}</text>",
            x.from
        );
        for tick in y.ticks() {
            let at = y.place(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\" stroke=\"#e5e7eb\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                x.from,
                x.to,
                x.from - 8.0,
                at + 4.0,
                label(tick)
            );
        }
        for tick in x.ticks() {
            let at = x.place(tick);
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{floor}\" y2=\"{}\" stroke=\"#9ca3af\"/>\
                 <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                floor + 4.0,
                floor + 18.0,
                label(tick)
            );
        }
        let _ = writeln!(
            svg,
            "<line x1=\"{}\" x2=\"{}\" y1=\"{floor}\" y2=\"{floor}\" stroke=\"#9ca3af\"/>\
             <text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\" fill=\"#6b7280\">{}</text>\
             <text transform=\"translate(16 {}) rotate(-90)\" text-anchor=\"middle\" fill=\"#6b7280\">{}</text>",
            x.from,
            x.to,
            floor + 38.0,
            escape(&self.x.title),
            f64::midpoint(y.from, y.to),
            escape(&self.y.title)
        );
    }

    /// Marks, and which colour is which series where there are several.
    fn write_names(&self, svg: &mut String, x: &Scale) {
        let [_, _, top, bottom] = MARGIN;
        for (row, (value, name)) in self.marks.iter().enumerate() {
            let at = x.place(*value);
            // Near the right end the name stands on the left of its line; names of neighbours stand apart.
            let (anchor, shift) = if at > WIDTH - 110.0 {
                ("end", -5.0)
            } else {
                ("start", 5.0)
            };
            let _ = writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{top}\" y2=\"{}\" stroke=\"#111827\" \
                 stroke-dasharray=\"4 3\"/><text x=\"{:.1}\" y=\"{}\" text-anchor=\"{anchor}\" \
                 fill=\"#111827\" stroke=\"#ffffff\" stroke-width=\"3\" paint-order=\"stroke\">{}</text>",
                HEIGHT - bottom,
                at + shift,
                top + 12.0 + 15.0 * (row % 3) as f64,
                escape(name)
            );
        }
        if self.series.len() < 2 {
            return;
        }
        let mut at = x.to;
        for (series, colour) in self.series.iter().zip(COLOURS).rev() {
            let name = escape(&series.name);
            let _ = writeln!(
                svg,
                "<text x=\"{at:.1}\" y=\"20\" text-anchor=\"end\" fill=\"{colour}\" \
                 font-weight=\"600\">{name}</text>"
            );
            at -= 7.0 * series.name.chars().count() as f64 + 16.0;
        }
    }
}

impl Series {
    fn write(&self, svg: &mut String, x: &Scale, y: &Scale, colour: &str) {
        let shown = |p: &&(f64, f64)| {
            (p.0 > 0.0 || !x.logarithmic) && (p.1 > 0.0 || !y.logarithmic) && p.1.is_finite()
        };
        let places = |(px, py): &(f64, f64)| (x.place(*px), y.place(*py));
        match self.draw {
            Draw::Line => {
                let all: Vec<_> = self.points.iter().filter(shown).map(places).collect();
                let path = all.iter().map(|(px, py)| format!("{px:.1},{py:.1}"));
                let path = path.collect::<Vec<_>>().join(" ");
                let _ = writeln!(
                    svg,
                    "<polyline points=\"{path}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\" \
                     stroke-linejoin=\"round\"/>"
                );
                for (px, py) in all {
                    let _ = writeln!(
                        svg,
                        "<circle cx=\"{px:.1}\" cy=\"{py:.1}\" r=\"3\" fill=\"{colour}\"/>"
                    );
                }
            }
            Draw::Bars if self.points.len() > MANY_BARS => {
                let Some(last) = self.points.last() else {
                    return;
                };
                // One shape: edges of thin bars beside each other would show as stripes.
                let first = x.place(self.points[0].0);
                let mut path = format!("M{first:.1} {:.1}", y.from);
                for (px, py) in self.points.iter().map(places) {
                    let _ = write!(path, "H{px:.1}V{py:.1}");
                }
                let _ = writeln!(
                    svg,
                    "<path d=\"{path}H{:.1}V{:.1}Z\" fill=\"{colour}\" fill-opacity=\"0.75\"/>",
                    x.place(last.0),
                    y.from
                );
            }
            Draw::Bars => {
                for pair in self.points.windows(2) {
                    let (px, py) = places(&pair[0]);
                    let (width, height) = (x.place(pair[1].0) - px, y.from - py);
                    if height > 0.0 {
                        let _ = writeln!(
                            svg,
                            "<rect x=\"{px:.1}\" y=\"{py:.1}\" width=\"{:.1}\" height=\"{height:.1}\" \
                             fill=\"{colour}\" fill-opacity=\"0.75\"/>",
                            (width - 0.6).max(0.4)
                        );
                    }
                }
            }
        }
    }
}

/// A number as short as it is exact enough for an axis or a mark.
pub(crate) fn label(value: f64) -> String {
    let digits = match value.abs() {
        large if large >= 100.0 || large == 0.0 => 0,
        middle if middle >= 10.0 => 1,
        small if small >= 0.1 => 2,
        _ => 4,
    };
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        return text.trim_end_matches('0').trim_end_matches('.').to_owned();
    }
    // Thousands apart: 12,500.
    let (sign, digits) = text
        .strip_prefix('-')
        .map_or(("", text.as_str()), |rest| ("-", rest));
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).expect("digits are ASCII"))
        .collect();
    format!("{sign}{}", groups.join(","))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scale(logarithmic: bool, low: f64, high: f64) -> Scale {
        let title = String::new();
        let axis = Axis { title, logarithmic };
        Scale::of(&axis, [low, high].into_iter(), (0.0, 100.0))
    }

    #[test]
    fn ticks_are_round_within_the_range_and_not_too_many() {
        for logarithmic in [false, true] {
            for exponent in -4..7 {
                for high in [1.0, 1.7, 3.0, 9.9] {
                    let high = high * 10f64.powi(exponent);
                    let scale = scale(logarithmic, high / 30.0, high);
                    let ticks = scale.ticks();
                    assert!((2..=10).contains(&ticks.len()), "{high}: {ticks:?}");
                    for tick in ticks {
                        assert!((scale.low..=scale.high * 1.001).contains(&tick));
                        let digits =
                            10.0 * tick / 10f64.powf((tick.max(1e-9) * 1.000_001).log10().floor());
                        assert!(
                            (digits - digits.round()).abs() < 1e-6,
                            "{tick} is not round"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn places_keep_the_order_of_values() {
        for logarithmic in [false, true] {
            let scale = scale(logarithmic, 2.0, 800.0);
            let places = [2.0, 3.0, 50.0, 800.0].map(|value| scale.place(value));
            assert!(places.is_sorted() && places[3] <= 100.0 && places[0] >= 0.0);
        }
    }

    #[test]
    fn labels_are_short() {
        for (value, expected) in [
            (0.0, "0"),
            (0.05, "0.05"),
            (1.0, "1"),
            (2.5, "2.5"),
            (12.34, "12.3"),
            (12_500.0, "12,500"),
            (1_000_000.0, "1,000,000"),
        ] {
            assert_eq!(label(value), expected);
        }
    }
}
