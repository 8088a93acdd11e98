//! Whether the emulation is CUDA: kernels whose results are known, and kernels that are wrong on purpose.
//!
//! Twin of `emulation_test.cu`. Compiled for tests under the feature `cuda-emulation` only.

#![expect(unsafe_code, reason = "the kernels are launched by C functions")]

use crate::testing::{Rng, assert_close, bits};
use std::ffi::{CStr, c_char, c_int};

const LAUNCHED: c_int = 0;
const REFUSED: c_int = 9;
const FAILED: c_int = 719;

unsafe extern "C" {
    fn cluster_emulation_test(which: c_int, input: *const f32, out: *mut f32, n: c_int) -> c_int;
    fn cluster_emulation_message() -> *const c_char;
}

/// Runs a kernel of `emulation_test.cu` with room for `room` results.
fn run(which: c_int, input: &[f32], room: usize) -> (c_int, Vec<f32>) {
    let mut out = vec![0.0; room];
    let n = c_int::try_from(input.len()).expect("few values");
    // SAFETY: the kernels read `n` values, and each test gives its kernel the room that it writes.
    let code = unsafe { cluster_emulation_test(which, input.as_ptr(), out.as_mut_ptr(), n) };
    (code, out)
}

/// Runs a kernel that is wrong and answers what the emulation says.
fn sentence(which: c_int, code: c_int) -> String {
    assert_eq!(run(which, &[0.0; 64], 128).0, code, "kernel {which}");
    // SAFETY: it takes nothing and answers with a string.
    let message = unsafe { cluster_emulation_message() };
    // SAFETY: the string is this thread's and stays until its next launch.
    let message = unsafe { CStr::from_ptr(message) };
    message.to_str().expect("it is ASCII").to_owned()
}

#[test]
fn reductions_give_every_thread_the_result() {
    let input = Rng::new(41).values(256);
    let (code, out) = run(0, &input, 3 * 256);
    assert_eq!(code, LAUNCHED);
    let most = input.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    assert_close(&out[..256], &[input.iter().sum(); 256], 1e-4, 1e-5);
    assert_eq!(out[256..512], [most; 256]);
    for (group, sums) in input.chunks(8).zip(out[512..].chunks(8)) {
        assert_close(sums, &[group.iter().sum(); 8], 1e-5, 1e-5);
    }
}

#[test]
fn lanes_get_the_values_they_ask_for() {
    let input = Rng::new(42).values(32);
    let (code, out) = run(1, &input, 7 * 32);
    assert_eq!(code, LAUNCHED);
    let positive = input.iter().filter(|&&value| value > 0.0).count();
    for lane in 0..32_usize {
        let above = lane.checked_sub(3).unwrap_or(lane);
        let below = if lane % 8 + 3 < 8 { lane + 3 } else { lane };
        let expected = [
            input[above],
            input[below],
            input[lane * 7 % 32],
            positive as f32,
            input[if lane < 16 { lane ^ 1 } else { lane }],
            -40.0,
            if lane < 16 { 65535.0 } else { 0.0 },
        ];
        let seen: Vec<f32> = out.iter().skip(lane).step_by(32).copied().collect();
        assert_eq!(bits(&seen), bits(&expected), "lane {lane}");
    }
}

#[test]
fn blocks_share_memory_and_add_to_one_place() {
    let mut input = Rng::new(43).values(256);
    let (code, out) = run(2, &input, 258);
    assert_eq!(code, LAUNCHED);
    assert_close(&out[256..257], &[input.iter().sum()], 1e-4, 1e-5);
    assert_eq!(out[257].to_bits(), 255);
    input.chunks_mut(64).for_each(<[f32]>::reverse);
    assert_eq!(out[..256], input);
}

#[test]
fn wrong_kernels_end_with_a_sentence_and_the_next_launch_works() {
    for (which, code, expected) in [
        (3, FAILED, "57 have ended, 7 wait at a barrier"),
        (4, FAILED, "is at the barrier in line"),
        (5, FAILED, "or with another mask or width"),
        (6, FAILED, "1 have ended, 31 wait for lanes"),
        (7, FAILED, "wrote behind its 128 bytes"),
        (8, FAILED, "index 32 is outside its array"),
        (10, REFUSED, "a device refuses a grid of (0, 1, 1)"),
        (11, FAILED, "which the block does not have"),
    ] {
        let message = sentence(which, code);
        assert!(message.contains(expected), "kernel {which}: {message}");
        assert_eq!(run(1, &[1.0; 32], 7 * 32).0, LAUNCHED);
    }
}

/// The two blocks of that kernel should give the same, and do where the order of threads does not matter.
#[test]
fn a_missing_barrier_shows() {
    let input = Rng::new(44).values(32);
    let (code, out) = run(9, &input, 64);
    assert_eq!(code, LAUNCHED);
    let reversed: Vec<f32> = input.iter().rev().copied().collect();
    assert!(out[..32] != reversed[..] && out[32..] != reversed[..]);
}

#[test]
fn elements_round_as_on_the_cpu() {
    let mut input = Rng::new(45).values(1000);
    for (i, value) in input.iter_mut().enumerate() {
        *value *= ((i % 60) as f32 - 35.0).exp2();
    }
    // Ties, the ends of the ranges, subnormal halves.
    input.extend([0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, 1e30, -1e30]);
    input.extend([f32::INFINITY, 5.96e-8, 2.98e-8, 2.99e-8, 6.1e-5, 6.097e-5]);
    input.extend([
        257.0 / 256.0,
        259.0 / 256.0,
        2049.0 / 2048.0,
        2051.0 / 2048.0,
    ]);
    let half = |value: f32| half::f16::from_f32(value).to_f32();
    let brain = |value: f32| half::bf16::from_f32(value).to_f32();
    let roundings: [&dyn Fn(f32) -> f32; 3] = [&|value| value, &brain, &half];
    for (which, round) in (20..).zip(roundings) {
        let (code, out) = run(which, &input, input.len());
        assert_eq!(code, LAUNCHED);
        for (&value, &out) in input.iter().zip(&out) {
            assert_eq!(
                out.to_bits(),
                round(value).to_bits(),
                "{value} as kernel {which}"
            );
        }
    }
}
