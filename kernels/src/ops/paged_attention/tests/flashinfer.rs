//! `FlashInfer`'s kernels against the CPU path, on sequences long enough for every size of tile and for keys cut
//! into chunks. 8-bit caches are compared with the kernel for every shape. Runs on a device only: nothing of it is
//! emulated.

use super::super::flashinfer::{FlashInfer, attend as launch, takes};
use super::{Attend, Scene};
use crate::backend::{Attention, Element, Heads};
use crate::cpu::CpuBackend;
use crate::cuda::CudaBackend;
use crate::cuda::testing::each_element;
use crate::ops::paged_attention::attend;
use crate::testing::{Rng, assert_close, rounded};

/// Compares with the exact result. Probabilities, and the results of chunks, are rounded to the element, too. The
/// tanh of a soft cap is the device's quick one, which is off by 2^-11.
pub(super) fn assert_close_to(
    cuda: &CudaBackend,
    attention: &Attention,
    (actual, expected): (&[f32], &[f32]),
) {
    let (atol, rtol) = match (cuda.element(), attention.logit_soft_cap) {
        (Element::F32 | Element::Fp8, _) => (0.0, 0.0),
        (Element::Bf16, _) => (6e-3, 1.0 / 128.0),
        (Element::F16, None) => (8e-4, 1.0 / 1024.0),
        (Element::F16, Some(_)) => (3e-3, 1.0 / 256.0),
    };
    assert_close(actual, expected, atol, rtol);
}

const TAKEN: Attend<CudaBackend> = |cuda, batch, attention, (qkv, cache), out| {
    let taken = launch(cuda, batch, attention, (qkv, cache), out);
    assert!(taken.expect("it is launched"), "the shape is compiled");
};

/// `cache` is what keys and values are stored as.
fn scene(rng: &mut Rng, element: Element, cache: Element, head_dim: usize) -> Scene {
    let local_kv_heads = rng.pick(&[1, 2, 8]);
    let heads = Heads {
        local_heads: local_kv_heads * rng.pick(&[1, 4, 7]),
        local_kv_heads,
        head_dim,
    };
    // One long sequence alone has its keys cut into chunks; several short ones have small tiles.
    let longest = rng.pick(&[20, 300, 1500]);
    let lengths: Vec<usize> = (0..rng.pick(&[1, 1, 3]))
        .map(|_| rng.within(longest / 2..longest))
        .collect();
    let mut scene = Scene::with_lengths(rng, heads, &lengths);
    scene.layout.element = cache;
    scene.attention.sliding_window = rng.pick(&[None, None, Some(1), Some(7), Some(700)]);
    if head_dim == 64 {
        // Not compiled with a cap.
        scene.attention.logit_soft_cap = None;
    }
    for sequence in &mut scene.sequences {
        *sequence = rounded(sequence, element);
    }
    scene
}

#[test]
fn tiles_and_chunks_give_the_same() {
    each_element(109, |cuda, rng| {
        let element = cuda.element();
        if !FlashInfer::is_for(element) {
            return println!("skipped: no kernel of FlashInfer's for {element:?} is in this build");
        }
        let cpu = CpuBackend::new(2, None).expect("threads start");
        for case in 0..24 {
            let head_dim = [64, 128, 256][case % 3];
            let cache = match head_dim {
                64 => element,
                _ => rng.pick(&[element, Element::Fp8]),
            };
            let scene = scene(rng, element, cache, head_dim);
            println!("case {case}: {:?} {:?}", scene.layout, scene.attention);
            assert!(takes(element, &scene.layout, &scene.attention));
            let expected = scene.whole((&cpu, attend));
            let on = (cuda, TAKEN);
            let mut ends = vec![Vec::new(); expected.len()];
            let mut cache = scene.dirty_cache(cuda);
            // All but the last tokens, and then those: prefill and decode.
            let lengths: Vec<usize> = (0..expected.len()).map(|s| scene.length(s)).collect();
            for last in [false, true] {
                let part = |(s, &length): (usize, &usize)| {
                    let start = if last { length - 1 } else { 0 };
                    (s, start..start.max(length - 1) + usize::from(last))
                };
                let parts: Vec<_> = lengths.iter().enumerate().map(part).collect();
                scene.step(on, &parts, &mut cache, &mut ends);
            }
            for outputs in [ends, scene.whole(on), scene.chunked(on, rng)] {
                for (actual, expected) in outputs.iter().zip(&expected) {
                    assert_close_to(cuda, &scene.attention, (actual, expected));
                }
            }
        }
    });
}
