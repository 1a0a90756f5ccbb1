//! SVG plots of the figures.

use std::error::Error;
use std::path::Path;

use plotters::prelude::*;

use super::measure::SUBJECTS;
use super::measure::summary::Figure;
use super::measure::workload::{Row, Workload};

const COLOURS: [RGBColor; SUBJECTS.len()] = [
    RGBColor(150, 150, 150),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 114, 90),
];
const FONT: &str = "sans-serif";

/// One group of bars a row: medians, with whiskers from p10 to p90.
pub fn rows(file: &Path, rows: &[Row], figures: &[Figure]) -> Result<(), Box<dyn Error>> {
    let rows: Vec<_> = rows
        .iter()
        .filter(|row| row.workload != Workload::Live)
        .collect();
    let highest = highest(
        figures
            .iter()
            .filter(|figure| rows.iter().any(|row| figure.is_of(row))),
    );
    if highest == 0.0 {
        return Ok(());
    }
    // A range of segments includes its end. There is a row: it has the highest figure.
    let labels: Vec<_> = rows.iter().map(|row| row.label()).collect();

    let root = SVGBackend::new(file, (1200, 560)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption("A thread's price (median, p10 to p90)", (FONT, 20))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(56)
        .build_cartesian_2d((0..labels.len() - 1).into_segmented(), 0.0..highest * 1.05)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(WHITE)
        .y_desc("µs a thread")
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
    let height = |us: f64| area.map_coordinate(&(SegmentValue::Exact(0), us)).1;
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
        let (x, y) = (right - 90, 48 + 20 * index as i32);
        root.draw(&Rectangle::new([(x, y), (x + 12, y + 12)], colour.filled()))?;
        root.draw(&Text::new(*subject, (x + 18, y), (FONT, 14)))?;
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
    let (Some(fewest), Some(most)) = (
        figures.iter().map(|figure| figure.threads).min(),
        figures.iter().map(|figure| figure.threads).max(),
    ) else {
        return Ok(());
    };

    let root = SVGBackend::new(file, (900, 520)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Spawn and join beside live threads (median, p10 to p90)",
            (FONT, 20),
        )
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(
            (fewest as f64 * 0.8..most as f64 * 1.25).log_scale(),
            0.0..highest(figures.iter().copied()) * 1.05,
        )?;
    chart
        .configure_mesh()
        .x_desc("live threads")
        .light_line_style(WHITE)
        .y_desc("µs a spawn and join")
        .x_label_formatter(&|threads| format!("{threads:.0}"))
        .draw()?;
    for (index, (subject, colour)) in SUBJECTS.iter().zip(COLOURS).enumerate() {
        let points = figures.iter().filter(|figure| figure.subject == *subject);
        let medians = points
            .clone()
            .map(|figure| (figure.threads as f64, figure.median_ns / 1e3));
        chart
            .draw_series(LineSeries::new(medians.clone(), colour.stroke_width(2)))?
            .label(*subject)
            .legend(move |(x, y)| Rectangle::new([(x, y - 6), (x + 12, y + 6)], colour.filled()));
        chart.draw_series(medians.map(|point| Circle::new(point, 3, colour.filled())))?;
        chart.draw_series(points.map(|figure| {
            // Side by side, or the whiskers of all subjects would be one line.
            let x = figure.threads as f64 * (1.0 + 0.02 * index as f64);
            PathElement::new([(x, figure.p10_ns / 1e3), (x, figure.p90_ns / 1e3)], colour)
        }))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 14))
        .draw()?;
    root.present()?;
    Ok(())
}

fn highest<'f>(figures: impl Iterator<Item = &'f Figure>) -> f64 {
    figures
        .map(|figure| figure.p90_ns / 1e3)
        .fold(0.0, f64::max)
}
