//! Rotary frequencies and the table of their cosines and sines.
//!
//! Computed in f64 once at start; the rotation itself is a kernel. All ways of stretching the
//! frequencies end here: the kernels see one table.
//!
//! Invariant: the row of a position does not depend on how many positions the table has.

use std::f64::consts::TAU;
use topology::model_shape::{Rope, RopeScaling};

/// `[positions, head_dim]`: cosines of the `head_dim / 2` frequencies, then their sines, times the
/// attention factor of YaRN.
pub fn table(rope: &Rope, head_dim: usize, positions: usize) -> Vec<f32> {
    let frequencies = frequencies(rope, head_dim);
    let factor = match rope.scaling {
        RopeScaling::Yarn {
            attention_factor, ..
        } => attention_factor,
        RopeScaling::None | RopeScaling::Linear { .. } | RopeScaling::Llama3 { .. } => 1.0,
    };
    let mut table = Vec::with_capacity(positions * head_dim);
    for position in 0..positions {
        let angles = frequencies.iter().map(|f| position as f64 * f);
        table.extend(angles.clone().map(|a| narrow(a.cos() * factor)));
        table.extend(angles.map(|a| narrow(a.sin() * factor)));
    }
    table
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "rounds to the nearest f32, as meant"
)]
fn narrow(x: f64) -> f32 {
    x as f32
}

/// Radians per position of the `head_dim / 2` pairs, the fastest first.
pub fn frequencies(rope: &Rope, head_dim: usize) -> Vec<f64> {
    let pairs = head_dim / 2;
    let trained = |i: usize| rope.theta.powf(-2.0 * i as f64 / head_dim as f64);
    let scaled: Box<dyn Fn(usize) -> f64> = match rope.scaling {
        RopeScaling::None => Box::new(trained),
        RopeScaling::Linear { factor } => Box::new(move |i| trained(i) / factor),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position,
        } => Box::new(move |i| {
            let frequency = trained(i);
            // How often the pair turns within the original context: below `low` it is stretched,
            // above `high` kept, and between them both are mixed.
            let turns = original_max_position * frequency / TAU;
            let kept =
                ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0.0, 1.0);
            frequency * kept + frequency / factor * (1.0 - kept)
        }),
        RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast,
            beta_slow,
            truncate,
            ..
        } => {
            // The pair that turns `rotations` times within the original context.
            let pair = |rotations: f64| {
                head_dim as f64 * (original_max_position / (rotations * TAU)).ln()
                    / (2.0 * rope.theta.ln())
            };
            let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            // The published bound is the head's width, not its number of pairs.
            let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
            let width = if low < high || high < low {
                high - low
            } else {
                0.001
            };
            Box::new(move |i| {
                let stretched = ((i as f64 - low) / width).clamp(0.0, 1.0);
                let frequency = trained(i);
                frequency * (1.0 - stretched) + frequency / factor * stretched
            })
        }
    };
    (0..pairs).map(scaled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIM: usize = 64;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope {
            theta: 10_000.0,
            scaling,
        }
    }

    fn ratios(scaling: RopeScaling) -> Vec<f64> {
        let plain = frequencies(&rope(RopeScaling::None), DIM);
        let scaled = frequencies(&rope(scaling), DIM);
        plain.iter().zip(scaled).map(|(a, b)| a / b).collect()
    }

    #[test]
    fn plain_frequencies_fall_from_one_to_nearly_the_base() {
        let f = frequencies(&rope(RopeScaling::None), DIM);
        assert_eq!(f.len(), DIM / 2);
        assert!((f[0] - 1.0).abs() < 1e-12);
        assert!((f[16] - 0.01).abs() < 1e-12);
    }

    #[test]
    fn linear_scaling_divides_every_frequency() {
        for ratio in ratios(RopeScaling::Linear { factor: 4.0 }) {
            assert!((ratio - 4.0).abs() < 1e-9);
        }
    }

    #[test]
    fn llama3_keeps_the_fast_and_divides_the_slow() {
        let ratios = ratios(RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 2048.0,
        });
        assert!((ratios[0] - 1.0).abs() < 1e-9, "{ratios:?}");
        assert!((ratios[DIM / 2 - 1] - 8.0).abs() < 1e-9, "{ratios:?}");
        assert!(ratios.is_sorted(), "{ratios:?}");
        assert!(
            ratios.iter().any(|r| (1.1..7.9).contains(r)),
            "a passage between: {ratios:?}"
        );
    }

    #[test]
    fn yarn_keeps_the_fast_divides_the_slow_and_folds_its_factor_in() {
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 4.0,
            original_max_position: 2048.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: 1.25,
            truncate,
        };
        let (rounded, exact) = (ratios(yarn(true)), ratios(yarn(false)));
        for ratios in [&rounded, &exact] {
            assert!((ratios[0] - 1.0).abs() < 1e-9, "{ratios:?}");
            assert!((ratios[DIM / 2 - 1] - 4.0).abs() < 1e-9, "{ratios:?}");
            assert!(ratios.is_sorted(), "{ratios:?}");
        }
        assert_ne!(rounded, exact);
        let table = table(&rope(yarn(true)), DIM, 1);
        let (cosines, sines) = table.split_at(DIM / 2);
        assert!(cosines.iter().all(|c| (c - 1.25).abs() < 1e-6));
        assert!(sines.iter().all(|s| *s == 0.0));
    }

    #[test]
    fn a_longer_table_begins_with_the_shorter() {
        let rope = rope(RopeScaling::Linear { factor: 2.0 });
        let (short, long) = (table(&rope, 16, 10), table(&rope, 16, 33));
        assert_eq!(short.len(), 160);
        assert_eq!(short[..], long[..160]);
        let (cosine, sine) = (long[17], long[25]);
        // Position 1, second pair: half of 10000^(-1/8).
        let angle = 10_000f64.powf(-2.0 / 16.0) / 2.0;
        assert!((f64::from(cosine) - angle.cos()).abs() < 1e-7);
        assert!((f64::from(sine) - angle.sin()).abs() < 1e-7);
    }
}
