//! The hyperbolic tangent, in a form the compiler turns into vector instructions, and the soft cap made of it.
//!
//! Near zero a quotient of polynomials, the continued fraction of tanh cut after five terms; further out
//! `(1 - e^-2|x|) / (1 + e^-2|x|)`. Operations are rounded one by one, so the result is the same on every CPU.

use super::exp::exp;

/// Below this the polynomials' quotient is exact to f32; above it nothing cancels in the other form.
const SMALL: f32 = 0.55;

/// `tanh(x)` within 4e-7 relative; NaN for NaN.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let square = x * x;
    let small = x * ((square + 105.0) * square + 945.0);
    let under_small = (15.0 * square + 420.0) * square + 945.0;
    let e = exp(-2.0 * x.abs());
    let large = (1.0 - e).copysign(x);
    // One division for either form. NaN goes the way of the large ones, where `exp` keeps it.
    let is_small = x.abs() < SMALL;
    let above = if is_small { small } else { large };
    let below = if is_small { under_small } else { 1.0 + e };
    above / below
}

/// `cap * tanh(x / cap)`.
#[inline(always)]
pub(crate) fn soft_capped(x: f32, cap: f32) -> f32 {
    cap * tanh(x / cap)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_close_to_the_exact_value() {
        let mut worst = 0.0_f64;
        for i in 1..=1_000_000 {
            let x = i as f32 * 1.1e-5;
            let exact = f64::from(x).tanh();
            worst = worst.max((f64::from(tanh(x)) - exact).abs() / exact);
            assert_eq!(tanh(-x).to_bits(), (-tanh(x)).to_bits());
        }
        assert!(worst < 4e-7, "off by {worst:e}");
    }

    #[test]
    fn is_defined_at_the_ends() {
        assert_eq!(tanh(0.0).to_bits(), 0.0_f32.to_bits());
        assert_eq!(tanh(-0.0).to_bits(), (-0.0_f32).to_bits());
        for x in [20.0, f32::MAX, f32::INFINITY] {
            assert_eq!(tanh(x).to_bits(), 1.0_f32.to_bits());
            assert_eq!(tanh(-x).to_bits(), (-1.0_f32).to_bits());
        }
        assert!(tanh(f32::NAN).is_nan());
        assert!((tanh(1e-30) / 1e-30 - 1.0).abs() < 1e-6);
    }
}
