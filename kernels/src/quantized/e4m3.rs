//! Floats of 8 bits: OCP's `E4M3`, which has no infinities.

/// The value of a float with 4 bits of exponent (bias 7) and 3 of mantissa. All ones but the sign are no number.
pub fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = ((code >> 3) & 15, f32::from(code & 7));
    let size = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa / 512.0,
        _ => (1.0 + mantissa / 8.0) * f32::from(exponent).exp2() / 128.0,
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// The nearest [`e4m3`] of a number, halves to the even code; what is beyond 448 becomes 448, what is no number stays none.
///
/// Without branches, so that compilers turn it into vector code.
#[inline(always)]
pub fn to_e4m3(value: f32) -> u8 {
    const MOST: u32 = 0x7e; // 448
    const SMALLEST_NORMAL: f32 = 1.0 / 64.0;
    const NAN: u32 = 0x7f;
    /// Bits of a mantissa of f32 that are too many.
    const DROPPED: u32 = 20;
    let (sign, size) = (value.to_bits() >> 24 & 0x80, value.abs());
    // Steps of 1/512: the number of them stands in the last bits of a sum that has no room for less.
    let denormal = (size * 512.0 + 8_388_608.0).to_bits() & 0xf;
    let bits = size.to_bits();
    let even = bits.wrapping_add((1 << (DROPPED - 1)) - 1 + (bits >> DROPPED & 1));
    // From one bias to the other.
    let normal = (even >> DROPPED).wrapping_sub((127 - 7) << 3).min(MOST);
    let number = if size < SMALLEST_NORMAL {
        denormal
    } else {
        normal
    };
    let code = if size.is_nan() { NAN } else { number };
    (sign | code).to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_has_its_published_values() {
        let known = [
            (0x00, 0.0),
            (0x01, 0.001_953_125),
            (0x08, 0.015_625),
            (0x38, 1.0),
            (0xb8, -1.0),
            (0x7e, 448.0),
        ];
        for (code, value) in known {
            assert_eq!(e4m3(code).to_bits(), f32::to_bits(value), "{code:#x}");
        }
        assert!(e4m3(0x7f).is_nan() && e4m3(0xff).is_nan());
    }

    /// Every number between two codes goes to the nearer one, and every code to itself.
    #[test]
    fn rounding_to_e4m3_finds_the_nearest_code() {
        for code in 0..0x7e_u8 {
            let (low, high) = (e4m3(code), e4m3(code + 1));
            let middle = f32::midpoint(low, high);
            let even = if code % 2 == 0 { code } else { code + 1 };
            for (value, expected) in [
                (low, code),
                (middle.next_down(), code),
                (middle, even),
                (middle.next_up(), code + 1),
                (high, code + 1),
            ] {
                assert_eq!(to_e4m3(value), expected, "{value}");
                assert_eq!(to_e4m3(-value), 0x80 | expected, "-{value}");
            }
        }
        assert_eq!([1e9, f32::INFINITY].map(to_e4m3), [0x7e; 2]);
        assert!(e4m3(to_e4m3(f32::NAN)).is_nan());
    }
}
