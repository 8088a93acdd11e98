//! The exponential function, in a form the compiler turns into vector instructions.
//!
//! Argument reduction to `[-ln 2 / 2, ln 2 / 2]`, the Taylor series to the sixth power there, and the
//! power of two put into the exponent bits. Multiplications and additions are rounded one by one, so the
//! result is the same on every CPU.

/// Above this the result stays what it is here: about 1.7e38.
const LARGEST: f32 = 88.0;

/// Below this the result is zero: what would follow is subnormal.
const SMALLEST: f32 = -87.0;

/// Adding this rounds a small f32 to an integer, which is then in the low bits.
const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23

/// `e^x` within 3e-7 relative; 0 below -87, no larger than `e^88`, NaN for NaN.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    let y = if x > LARGEST { LARGEST } else { x };
    let shifted = y * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits so that its product with n is exact.
    let r = (y - n * 0.693_359_4) - n * -2.121_944_4e-4;
    let mut p = 1.0 / 720.0;
    for c in [1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(0x3f80_0000));
    if x < SMALLEST { 0.0 } else { p * power }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_close_to_the_exact_value() {
        let mut worst = 0.0_f64;
        for i in -870_000..=880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - exact).abs() / exact);
        }
        assert!(worst < 3e-7, "off by {worst:e}");
    }

    #[test]
    fn is_defined_at_the_ends() {
        assert_eq!(exp(0.0).to_bits(), 1.0_f32.to_bits());
        assert_eq!(exp(f32::NEG_INFINITY).to_bits(), 0.0_f32.to_bits());
        assert_eq!(exp(f32::MIN).to_bits(), 0.0_f32.to_bits());
        assert!(exp(f32::INFINITY) > 1e38 && exp(f32::INFINITY).is_finite());
        assert!(exp(f32::NAN).is_nan());
    }
}
