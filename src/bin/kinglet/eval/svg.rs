//! A table of numbers as coloured squares, in SVG: text that browsers draw.

use std::fmt::Write;

/// Pixels of a square, across and down.
const SQUARE: (usize, usize) = (72, 30);

/// Pixels beside and above the squares.
const MARGIN: (usize, usize) = (90, 60);

/// What a heat map shows.
pub struct HeatMap<'a> {
    pub title: &'a str,
    /// What the columns are, and the label of each.
    pub across: (&'a str, &'a [usize]),
    /// The same of rows.
    pub down: (&'a str, &'a [usize]),
    /// Values that get the coldest and the warmest colour.
    pub range: (f64, f64),
    /// Of the labels of a row and a column.
    pub value: &'a dyn Fn(usize, usize) -> f64,
}

/// Draws `map`.
pub fn heat_map(map: &HeatMap) -> String {
    let ((across, columns), (down, rows)) = (map.across, map.down);
    let width = MARGIN.0 + columns.len() * SQUARE.0 + 20;
    // A title in letters of some 6.5 pixels.
    let width = width.max(MARGIN.0 + map.title.chars().count() * 13 / 2);
    let height = MARGIN.1 + rows.len() * SQUARE.1 + 20;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n"
    );
    let mut text = |x: usize, y: usize, anchor: &str, text: &str| {
        let text = text.replace('&', "&amp;").replace('<', "&lt;");
        let _ = writeln!(
            out,
            "<text x=\"{x}\" y=\"{y}\" text-anchor=\"{anchor}\">{text}</text>"
        );
    };
    text(MARGIN.0, 18, "start", map.title);
    text(MARGIN.0 - 8, 40, "end", across);
    text(MARGIN.0 - 8, 54, "end", down);
    for (i, label) in columns.iter().enumerate() {
        let x = MARGIN.0 + i * SQUARE.0 + SQUARE.0 / 2;
        text(x, 40, "middle", &label.to_string());
    }
    for (i, label) in rows.iter().enumerate() {
        let y = MARGIN.1 + i * SQUARE.1 + 20;
        text(MARGIN.0 - 8, y, "end", &label.to_string());
    }
    for (i, &row) in rows.iter().enumerate() {
        for (j, &column) in columns.iter().enumerate() {
            let (x, y) = (MARGIN.0 + j * SQUARE.0, MARGIN.1 + i * SQUARE.1);
            let value = (map.value)(row, column);
            let _ = writeln!(
                out,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{}\" height=\"{}\" fill=\"{}\" stroke=\"white\"/>\
                 <text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{value:.2}</text>",
                SQUARE.0,
                SQUARE.1,
                colour(value, map.range),
                x + SQUARE.0 / 2,
                y + 20,
            );
        }
    }
    out.push_str("</svg>\n");
    out
}

/// From orange over white to blue, which the colour-blind tell apart too; grey for no number.
fn colour(value: f64, (cold, warm): (f64, f64)) -> String {
    if value.is_nan() {
        return "#cccccc".into();
    }
    let at = ((value - cold) / (warm - cold)).clamp(0.0, 1.0);
    let (end, share) = match at < 0.5 {
        true => ([230.0, 140.0, 60.0], 1.0 - 2.0 * at),
        false => ([90.0, 160.0, 220.0], 2.0 * at - 1.0),
    };
    let [r, g, b] = end.map(|end: f64| (255.0 + (end - 255.0) * share).round() as u8);
    format!("#{r:02x}{g:02x}{b:02x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_square_for_each_value_and_no_markup_from_a_title() {
        let map = HeatMap {
            title: "a < b & c",
            across: ("x", &[1, 2, 3]),
            down: ("y", &[10, 20]),
            range: (0.0, 1.0),
            value: &|row, column| if row == 10 { f64::NAN } else { column as f64 },
        };
        let svg = heat_map(&map);
        assert_eq!(svg.matches("<rect x=").count(), 6);
        assert_eq!(svg.matches("#cccccc").count(), 3);
        assert_eq!(svg.matches("#5aa0dc").count(), 3);
        assert!(svg.contains("a &lt; b &amp; c"));
    }

    #[test]
    fn colours_run_from_end_to_end() {
        assert_eq!(colour(-9.0, (-1.0, 1.0)), "#e68c3c");
        assert_eq!(colour(0.0, (-1.0, 1.0)), "#ffffff");
        assert_eq!(colour(9.0, (-1.0, 1.0)), "#5aa0dc");
    }
}
