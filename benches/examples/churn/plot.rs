//! Latency by percentile, one line a maker.

use hdrhistogram::Histogram;
use plotters::prelude::*;
use std::error::Error;
use std::path::Path;

const COLOURS: [RGBColor; 2] = [RGBColor(86, 180, 233), RGBColor(0, 114, 90)];
const FONT: &str = "sans-serif";

/// The axis counts nines: 1 is the 90th percentile, 2 the 99th.
const NINES: f64 = 3.5;

pub fn percentiles(
    file: &Path,
    names: &[&str],
    latencies: &[Histogram<u64>],
) -> Result<(), Box<dyn Error>> {
    let us = |all: &Histogram<u64>, nines: f64| {
        let percentile = 100.0 * (1.0 - 10.0_f64.powf(-nines));
        all.value_at_percentile(percentile) as f64 / 1000.0
    };
    let top = latencies
        .iter()
        .map(|all| us(all, NINES))
        .fold(1.0, f64::max);
    let root = SVGBackend::new(file, (900, 500)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(
            "Latency of a request to a pool whose workers come and go",
            (FONT, 18),
        )
        .margin(12)
        .x_label_area_size(44)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..NINES, 0.0..top * 1.05)?;
    chart
        .configure_mesh()
        .light_line_style(WHITE)
        .label_style((FONT, 13))
        .x_desc("percentile")
        .y_desc("µs")
        .x_labels(8)
        .x_label_formatter(&|nines| {
            format!("{:.5}", 100.0 * (1.0 - 10.0_f64.powf(-nines)))
                .trim_end_matches('0')
                .trim_end_matches('.')
                .to_owned()
        })
        .y_label_formatter(&|us| format!("{us:.0}"))
        .draw()?;
    for ((name, all), colour) in names.iter().zip(latencies).zip(COLOURS) {
        let points = (0..=140).map(|step| f64::from(step) * NINES / 140.0);
        chart
            .draw_series(LineSeries::new(
                points.map(|nines| (nines, us(all, nines))),
                colour.stroke_width(2),
            ))?
            .label(*name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .label_font((FONT, 13))
        .border_style(BLACK)
        .background_style(WHITE)
        .draw()?;
    root.present()?;
    Ok(())
}
