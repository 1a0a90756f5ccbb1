//! SVG plots of the figures.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use measure::summary::Figure;
use measure::workload::{Row, Workload};
use measure::{SUBJECTS, proc};

const COLOURS: [RGBColor; SUBJECTS.len()] = [
    RGBColor(150, 150, 150),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 90),
    RGBColor(240, 200, 120),
    RGBColor(204, 121, 167),
    RGBColor(170, 215, 240),
    RGBColor(213, 94, 0),
];
const FONT: &str = "sans-serif";
/// Height of the legend's line, which lies between the caption and the plot: over the plot it would hide figures.
const LEGEND: i32 = 24;

/// One group of bars a row: medians, with whiskers from p10 to p90.
pub fn rows(file: &Path, rows: &[Row], figures: &[Figure]) -> Result<(), Box<dyn Error>> {
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.workload != Workload::Live)
        .collect();
    let of_rows = |figure: &&Figure| rows.iter().any(|row| figure.is_of(row));
    let Some(top) = top(figures.iter().filter(of_rows)) else {
        return Ok(());
    };
    // A range of segments includes its end. There is a row: it has a figure.
    let labels: Vec<_> = rows.iter().map(|row| row.label()).collect();

    let root = SVGBackend::new(file, (1200, 600)).into_drawing_area();
    let plot = frame(&root, "A thread's price: median, and p10 to p90")?;
    let mut chart = ChartBuilder::on(&plot)
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d((0..labels.len() - 1).into_segmented(), 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .label_style((FONT, 13))
        .x_desc("workload")
        .y_desc("µs a thread")
        .y_label_formatter(&|us| format!("{us:.0}"))
        .x_labels(labels.len())
        .x_label_formatter(&|segment| match segment {
            SegmentValue::CenterOf(row) => labels.get(*row).cloned().unwrap_or_default(),
            _ => String::new(),
        })
        .draw()?;

    // A segmented axis knows no fractions of a segment, so the bars of a group are placed in pixels
    // of its width.
    let area = chart.plotting_area();
    let (left, right) = (area.get_pixel_range().0.start, area.get_pixel_range().0.end);
    let group = f64::from(right - left) / labels.len() as f64;
    let bar = group * 0.8 / SUBJECTS.len() as f64;
    let height = |us: f64| {
        area.map_coordinate(&(SegmentValue::Exact(0), us.min(top)))
            .1
    };
    for (index, (subject, colour)) in SUBJECTS.iter().zip(COLOURS).enumerate() {
        for (place, row) in rows.iter().enumerate() {
            let Some(figure) = figures
                .iter()
                .find(|figure| figure.is_of(row) && figure.subject == *subject)
            else {
                continue;
            };
            let x = f64::from(left) + group * (place as f64 + 0.1) + bar * index as f64;
            let (x0, x1, middle) = (x as i32, (x + bar * 0.92) as i32, (x + bar * 0.46) as i32);
            root.draw(&Rectangle::new(
                [(x0, height(figure.median_ns / 1e3)), (x1, height(0.0))],
                colour.filled(),
            ))?;
            let whisker = [
                (middle, height(figure.p10_ns / 1e3)),
                (middle, height(figure.p90_ns / 1e3)),
            ];
            root.draw(&PathElement::new(whisker, BLACK.mix(0.6)))?;
        }
    }
    root.present()?;
    Ok(())
}

/// Spawn and join against the number of live threads, a line a subject.
pub fn live(file: &Path, figures: &[Figure]) -> Result<(), Box<dyn Error>> {
    let figures: Vec<_> = figures
        .iter()
        .filter(|figure| figure.workload == Workload::Live.name())
        .collect();
    let crowds = || figures.iter().map(|figure| figure.threads);
    let (Some(fewest), Some(most), Some(top)) =
        (crowds().min(), crowds().max(), top(figures.iter().copied()))
    else {
        return Ok(());
    };

    let root = SVGBackend::new(file, (900, 560)).into_drawing_area();
    let plot = frame(
        &root,
        "Spawn and join beside live threads: median, and p10 to p90",
    )?;
    let mut chart = ChartBuilder::on(&plot)
        .margin(12)
        .margin_right(24)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(
            (fewest as f64 * 0.8..most as f64 * 1.25).log_scale(),
            0.0..top,
        )?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .label_style((FONT, 13))
        .x_desc("live threads (logarithmic)")
        .y_desc("µs a spawn and join")
        .x_label_formatter(&|threads| format!("{threads:.0}"))
        .y_label_formatter(&|us| format!("{us:.0}"))
        .draw()?;
    for (index, (subject, colour)) in SUBJECTS.iter().zip(COLOURS).enumerate() {
        // Side by side around the number of threads, or the whiskers of all subjects would be one
        // line.
        let aside = 1.0 + 0.025 * (index as f64 - (SUBJECTS.len() - 1) as f64 / 2.0);
        let points = || {
            let figures = figures.iter().filter(|figure| figure.subject == *subject);
            figures.map(move |figure| (figure.threads as f64 * aside, figure))
        };
        let medians = || points().map(|(x, figure)| (x, figure.median_ns / 1e3));
        chart.draw_series(LineSeries::new(medians(), colour.stroke_width(2)))?;
        chart.draw_series(medians().map(|point| Circle::new(point, 4, colour.filled())))?;
        chart.draw_series(points().map(|(x, figure)| {
            let end = |ns: f64| (x, (ns / 1e3).min(top));
            PathElement::new([end(figure.p10_ns), end(figure.p90_ns)], colour)
        }))?;
    }
    root.present()?;
    Ok(())
}

/// Draws what stands above a plot, and returns the place for the plot.
fn frame<'a>(
    root: &DrawingArea<SVGBackend<'a>, Shift>,
    caption: &str,
) -> Result<DrawingArea<SVGBackend<'a>, Shift>, Box<dyn Error>> {
    root.fill(&WHITE)?;
    let below = root.titled(caption, (FONT, 20))?;
    let (legend, plot) = below.split_vertically(LEGEND);
    let width = legend.dim_in_pixel().0 as i32;
    for (index, (subject, colour)) in SUBJECTS.iter().zip(COLOURS).enumerate() {
        let x = width / 2 + 100 * (index as i32 - SUBJECTS.len() as i32 / 2);
        legend.draw(&Rectangle::new([(x, 6), (x + 12, 18)], colour.filled()))?;
        legend.draw(&Text::new(*subject, (x + 18, 6), (FONT, 14)))?;
    }
    let note = format!(
        "{}. A whisker that meets the upper edge goes on beyond it.",
        proc::machine()
    );
    let height = plot.dim_in_pixel().1 as i32;
    let (plot, foot) = plot.split_vertically(height - 22);
    foot.draw(&Text::new(note, (16, 2), (FONT, 12)))?;
    Ok(plot)
}

/// Where the axis ends, in µs: above all medians, but not so far that the p90 of one disturbed figure would
/// flatten all others.
fn top<'f>(figures: impl Iterator<Item = &'f Figure> + Clone) -> Option<f64> {
    let highest = |of: fn(&Figure) -> f64| figures.clone().map(of).max_by(f64::total_cmp);
    let (median, p90) = highest(|figure| figure.median_ns).zip(highest(|figure| figure.p90_ns))?;
    Some(p90.min(median * 1.8) * 1.05 / 1e3)
}
