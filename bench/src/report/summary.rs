//! A distribution in numbers.
//!
//! Invariant: values are kept sorted, so that any percentile can be asked for.

/// A distribution; latencies of a [`super::Report`] are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    sorted: Vec<f64>,
    /// Arithmetic mean.
    pub mean: f64,
    /// Standard deviation of all there are, not an estimate for more.
    pub std: f64,
}

impl Summary {
    /// Of values in any order; zeros if there are none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let count = values.len().max(1) as f64;
        // Not `sum`: of nothing that is -0.
        let mean = values.iter().fold(0.0, |sum, value| sum + value) / count;
        let squares = values
            .iter()
            .fold(0.0, |sum, value| sum + (value - mean).powi(2));
        Self {
            sorted: values,
            mean,
            std: (squares / count).sqrt(),
        }
    }

    /// The values, ascending.
    pub fn values(&self) -> &[f64] {
        &self.sorted
    }

    /// Half are below.
    pub fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// So many of 100 are below; linear between the two nearest. 0 if there are none.
    pub fn percentile(&self, percentile: f64) -> f64 {
        let Some(last) = self.sorted.len().checked_sub(1) else {
            return 0.0;
        };
        let place = percentile / 100.0 * last as f64;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a share of an index is an index"
        )]
        let below = (place.floor() as usize).min(last);
        let above = (below + 1).min(last);
        self.sorted[below] + (self.sorted[above] - self.sorted[below]) * (place - below as f64)
    }
}

/// A percentile as it stands in names: `99`, `99.9`.
pub fn percentile_name(percentile: f64) -> String {
    percentile.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_lie_between_neighbours() {
        let summary = Summary::of((0..=100).rev().map(f64::from).collect());
        for percentile in [0.0, 10.0, 50.0, 90.0, 99.9, 100.0] {
            let value = summary.percentile(percentile);
            assert!((value - percentile).abs() < 1e-9, "{percentile}: {value}");
        }
        assert!((summary.mean - 50.0).abs() < 1e-9);
        assert!((summary.std - 850f64.sqrt()).abs() < 1e-9);
        let two = Summary::of(vec![2.0, 1.0]);
        assert!((two.median() - 1.5).abs() < 1e-9);
        assert_eq!(Summary::of(vec![]), Summary::default());
        assert!(Summary::default().percentile(99.0).abs() < 1e-9);
    }

    #[test]
    fn a_percentile_is_named_as_it_is_written() {
        assert_eq!(percentile_name(99.0), "99");
        assert_eq!(percentile_name(99.9), "99.9");
    }
}
