//! Randomness as a function: Philox 4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
//! easy as 1, 2, 3" (SC 2011).
//!
//! No state: the number for a seed and a position is the same on every rank, in every batch, and when a
//! sequence is computed again.

/// Uniform in `[0, 1)` as a fraction of 2^64, from a request's seed and the position of the token to be drawn.
///
/// The key is the seed; the counter is `[position, 0, 0, 0]`; the number is made of the first two words.
pub(crate) fn uniform(seed: u64, position: u32) -> u64 {
    let [low, high, ..] = philox([position, 0, 0, 0], words(seed));
    u64::from(high) << 32 | u64::from(low)
}

/// Ten rounds. Constants as published.
fn philox(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let ([mut a, mut b, mut c, mut d], [mut k, mut l]) = (counter, key);
    for _ in 0..10 {
        let [low_0, high_0] = words(u64::from(a) * 0xd251_1f53);
        let [low_1, high_1] = words(u64::from(c) * 0xcd9e_8d57);
        [a, b, c, d] = [high_1 ^ b ^ k, low_1, high_0 ^ d ^ l, low_0];
        k = k.wrapping_add(0x9e37_79b9);
        l = l.wrapping_add(0xbb67_ae85);
    }
    [a, b, c, d]
}

/// Low and high half.
#[expect(
    clippy::cast_possible_truncation,
    reason = "the low half is what is wanted"
)]
pub(super) fn words(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gives_the_published_answers() {
        let cases = [
            (
                [0; 4],
                [0; 2],
                [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8],
            ),
            (
                [!0; 4],
                [!0; 2],
                [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd],
            ),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ];
        for (counter, key, expected) in cases {
            assert_eq!(philox(counter, key), expected);
        }
    }

    #[test]
    fn is_uniform_over_seeds_and_over_positions() {
        for over_positions in [false, true] {
            let mut bins = [0_u32; 64];
            for i in 0..64_000_u32 {
                let u = if over_positions {
                    uniform(7, i)
                } else {
                    uniform(u64::from(i), 7)
                };
                bins[(u >> 58) as usize] += 1;
            }
            // 63 degrees of freedom: above 120 has probability 2e-5.
            let chi: f64 = bins
                .iter()
                .map(|&n| (f64::from(n) - 1000.0).powi(2) / 1000.0)
                .sum();
            assert!(chi < 120.0, "chi-square {chi}");
        }
    }
}
