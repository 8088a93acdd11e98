//! Attention against its formula, and the equivalences that the scheduler relies on.

#[cfg(feature = "cuda")]
mod flashinfer;
#[cfg(target_arch = "x86_64")]
mod tiles;

use super::*;
use crate::backend::{Backend, Element, Heads, Precision};
use crate::batch::Batch;
use crate::testing::{
    ELEMENTS, KV_ELEMENTS, Rng, assert_close, backends, bits, rounded, tensor, tokens, upload,
};

/// What is tested.
type Attend<B> = fn(
    &B,
    &<B as Backend>::DeviceBatch,
    &Attention,
    (&<B as Backend>::Tensor, &<B as Backend>::KvCache),
    &mut <B as Backend>::Tensor,
);

/// A few sequences, all their queries, keys and values, and their blocks in a pool.
struct Scene {
    layout: KvLayout,
    attention: Attention,
    heads: Heads,
    /// `[tokens, qkv width]` for each sequence
    sequences: Vec<Vec<f32>>,
    blocks: Vec<Vec<u32>>,
}

impl Scene {
    fn random(rng: &mut Rng) -> Self {
        let heads = Heads {
            local_kv_heads: rng.within(1..4),
            local_heads: 0,
            head_dim: rng.pick(&[8, 16, 20, 33, 64]),
        };
        let heads = Heads {
            local_heads: heads.local_kv_heads * rng.within(1..8),
            ..heads
        };
        Self::with_heads(rng, heads)
    }

    fn with_heads(rng: &mut Rng, heads: Heads) -> Self {
        let lengths: Vec<usize> = (0..rng.within(1..4)).map(|_| rng.within(1..90)).collect();
        Self::with_lengths(rng, heads, &lengths)
    }

    fn with_lengths(rng: &mut Rng, heads: Heads, lengths: &[usize]) -> Self {
        let block_size = rng.pick(&[1, 5, 16, 24, 32]);
        let needed: usize = lengths
            .iter()
            .map(|length| length.div_ceil(block_size))
            .sum();
        let layout = KvLayout {
            layers: 2,
            blocks: needed + 3,
            block_size,
            local_kv_heads: heads.local_kv_heads,
            head_dim: heads.head_dim,
            element: rng.pick(&ELEMENTS),
        };
        let attention = Attention {
            layer: rng.within(0..2),
            local_heads: heads.local_heads,
            scale: 4.0 / (heads.head_dim as f32).sqrt(),
            sliding_window: rng.pick(&[None, None, Some(1), Some(7), Some(40)]),
            logit_soft_cap: rng.pick(&[None, None, Some(1.0), Some(50.0)]),
        };
        let width = heads.qkv_width();
        let sequences = lengths
            .iter()
            .map(|length| rng.values(length * width))
            .collect();
        let mut scene = Self {
            layout,
            attention,
            heads,
            sequences,
            blocks: Vec::new(),
        };
        scene.place(rng);
        scene
    }

    fn length(&self, sequence: usize) -> usize {
        self.sequences[sequence].len() / self.heads.qkv_width()
    }

    /// Gives the sequences other blocks.
    fn place(&mut self, rng: &mut Rng) {
        let mut pool: Vec<u32> = (0..self.layout.blocks as u32).collect();
        rng.shuffle(&mut pool);
        let needed = |s| self.length(s).div_ceil(self.layout.block_size);
        self.blocks = (0..self.sequences.len())
            .map(|s| pool.split_off(pool.len() - needed(s)))
            .collect();
    }

    /// Runs a step over some tokens of some sequences and adds what comes out to `outputs`.
    fn step<B: Backend>(
        &self,
        (backend, attend): (&B, Attend<B>),
        parts: &[(usize, Range<usize>)],
        cache: &mut B::KvCache,
        outputs: &mut [Vec<f32>],
    ) {
        let (width, size) = (self.heads.qkv_width(), self.layout.block_size);
        let mut batch = Batch {
            row_starts: vec![0],
            block_starts: vec![0],
            ..Batch::default()
        };
        let mut qkv = Vec::new();
        for (sequence, tokens) in parts {
            let blocks = &self.blocks[*sequence];
            for t in tokens.clone() {
                batch.token_ids.push(0);
                batch.positions.push(t as u32);
                batch
                    .slots
                    .push(blocks[t / size] * size as u32 + (t % size) as u32);
                qkv.extend(&self.sequences[*sequence][t * width..][..width]);
            }
            batch.row_starts.push(batch.token_ids.len() as u32);
            batch.context_lens.push(tokens.end as u32);
            batch.blocks.extend(&blocks[..tokens.end.div_ceil(size)]);
            batch.block_starts.push(batch.blocks.len() as u32);
        }
        let tokens = batch.num_tokens();
        let (batch, qkv) = (upload(backend, &batch), tensor(backend, &qkv, width));
        backend.write_kv(&batch, self.attention.layer, &qkv, self.heads, cache);
        let out_width = self.heads.local_heads * self.heads.head_dim;
        let mut out = backend
            .allocate(tokens, out_width, Precision::Compute)
            .unwrap();
        attend(backend, &batch, &self.attention, (&qkv, cache), &mut out);
        let mut values = Vec::new();
        backend.read(&out, &mut values).unwrap();
        let mut rows = values.chunks_exact(out_width);
        for (sequence, tokens) in parts {
            for row in rows.by_ref().take(tokens.len()) {
                outputs[*sequence].extend(row);
            }
        }
    }

    /// A pool full of values that must not be seen.
    fn dirty_cache<B: Backend>(&self, backend: &B) -> B::KvCache {
        let mut cache = backend.kv_cache(self.layout).unwrap();
        let slots = self.layout.blocks * self.layout.block_size;
        let batch = upload(
            backend,
            &tokens(vec![0; slots], (0..slots as u32).collect()),
        );
        let width = self.heads.qkv_width();
        let nothing = tensor(backend, &vec![f32::NAN; slots * width], width);
        for layer in 0..self.layout.layers {
            backend.write_kv(&batch, layer, &nothing, self.heads, &mut cache);
        }
        cache
    }

    fn whole<B: Backend>(&self, on: (&B, Attend<B>)) -> Vec<Vec<f32>> {
        let mut outputs = vec![Vec::new(); self.sequences.len()];
        let all: Vec<_> = (0..outputs.len()).map(|s| (s, 0..self.length(s))).collect();
        self.step(on, &all, &mut self.dirty_cache(on.0), &mut outputs);
        outputs
    }

    /// Each sequence cut into chunks at random, chunks of several in one step at random.
    fn chunked<B: Backend>(&self, on: (&B, Attend<B>), rng: &mut Rng) -> Vec<Vec<f32>> {
        let mut outputs = vec![Vec::new(); self.sequences.len()];
        let mut done = vec![0; outputs.len()];
        let mut cache = self.dirty_cache(on.0);
        while (0..done.len()).any(|s| done[s] < self.length(s)) {
            let mut parts = Vec::new();
            for (s, done) in done.iter_mut().enumerate() {
                let left = self.length(s) - *done;
                if left > 0 && rng.within(0..3) > 0 {
                    let several = rng.within(1..left + 1);
                    let count = rng.pick(&[1, several]);
                    parts.push((s, *done..*done + count));
                    *done += count;
                }
            }
            if !parts.is_empty() {
                self.step(on, &parts, &mut cache, &mut outputs);
            }
        }
        outputs
    }

    /// The formula. `[tokens, local_heads * head_dim]`
    fn reference(&self, sequence: usize) -> Vec<f32> {
        let Heads {
            local_heads,
            local_kv_heads,
            head_dim,
        } = self.heads;
        let width = self.heads.qkv_width();
        let qkv = &self.sequences[sequence];
        let stored = rounded(qkv, self.layout.element);
        let mut out = Vec::new();
        for t in 0..self.length(sequence) {
            let first = self
                .attention
                .sliding_window
                .map_or(0, |w| (t + 1).saturating_sub(w as usize));
            for head in 0..local_heads {
                let kv_head = head / (local_heads / local_kv_heads);
                let query = &qkv[t * width + head * head_dim..][..head_dim];
                let at = |j: usize, head: usize| &stored[j * width + head * head_dim..][..head_dim];
                let weights: Vec<f32> = (first..=t)
                    .map(|j| {
                        let key = at(j, local_heads + kv_head);
                        let product: f32 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                        let score = product * self.attention.scale;
                        let cap = self.attention.logit_soft_cap;
                        cap.map_or(score, |cap| cap * (score / cap).tanh()).exp()
                    })
                    .collect();
                let sum: f32 = weights.iter().sum();
                for d in 0..head_dim {
                    let value = |j| at(j, local_heads + local_kv_heads + kv_head)[d];
                    let weighted = weights.iter().zip(first..).map(|(w, j)| w * value(j));
                    out.push(weighted.sum::<f32>() / sum);
                }
            }
        }
        out
    }
}

#[test]
fn is_the_reference_and_chunked_is_whole_and_batched_is_alone_bit_for_bit() {
    let mut rng = Rng::new(12);
    let all = backends();
    for case in 0..40 {
        let mut scene = Scene::random(&mut rng);
        scene.layout.element = rng.pick(&KV_ELEMENTS);
        println!("case {case}: {:?} {:?}", scene.layout, scene.attention);
        // The instruction sets in turn, against one and several threads of the same.
        let pair = &all[case % (all.len() / 2) * 2..][..2];
        check_equivalences(&mut scene, (pair, attend), 2e-5, &mut rng);
    }
}

/// On two backends of one kind.
fn check_equivalences(
    scene: &mut Scene,
    (pair, attend): (&[CpuBackend], Attend<CpuBackend>),
    tolerance: f32,
    rng: &mut Rng,
) {
    let whole = scene.whole((&pair[0], attend));
    for (s, out) in whole.iter().enumerate() {
        assert_close(out, &scene.reference(s), tolerance, tolerance);
    }
    scene.place(rng);
    let other = (&pair[1], attend);
    for other in [scene.whole(other), scene.chunked(other, rng)] {
        for (a, b) in whole.iter().zip(&other) {
            assert_eq!(bits(a), bits(b));
        }
    }
    for (s, out) in whole.iter().enumerate() {
        let mut alone = vec![Vec::new(); whole.len()];
        let mut cache = scene.dirty_cache(&pair[0]);
        let on = (&pair[0], attend);
        scene.step(on, &[(s, 0..scene.length(s))], &mut cache, &mut alone);
        assert_eq!(bits(out), bits(&alone[s]));
    }
}

/// Long enough for several parts of the keys, which one thread goes through and several share.
#[test]
fn the_last_token_of_a_long_sequence_alone_gives_the_bits_of_the_whole() {
    let mut rng = Rng::new(14);
    for (case, pair) in backends().chunks_exact(2).cycle().take(12).enumerate() {
        let heads = Heads {
            local_kv_heads: rng.within(1..3),
            local_heads: 0,
            head_dim: rng.pick(&[16, 20, 48]),
        };
        let heads = Heads {
            local_heads: heads.local_kv_heads * rng.within(1..4),
            ..heads
        };
        let element = KV_ELEMENTS[case % KV_ELEMENTS.len()];
        check_last_tokens(&mut rng, (heads, element), (pair, attend), 2e-5);
    }
}

/// On two backends of one kind.
fn check_last_tokens(
    rng: &mut Rng,
    (heads, element): (Heads, Element),
    (pair, attend): (&[CpuBackend], Attend<CpuBackend>),
    tolerance: f32,
) {
    let lengths = [3 + rng.within(0..1600), 3, 1 + rng.within(0..600)];
    let mut scene = Scene::with_lengths(rng, heads, &lengths);
    scene.attention.sliding_window = rng.pick(&[None, None, Some(530)]);
    scene.layout.element = element;
    println!("{:?} {:?} {lengths:?}", scene.layout, scene.attention);
    let whole = scene.whole((&pair[0], attend));
    for s in [0, 2] {
        assert_close(&whole[s], &scene.reference(s), tolerance, tolerance);
    }
    for (on, together) in [(0, false), (1, false), (1, true)] {
        let on = (&pair[on], attend);
        let mut cache = scene.dirty_cache(on.0);
        let mut outputs = vec![Vec::new(); lengths.len()];
        let last = |s: usize| (s, lengths[s] - 1..lengths[s]);
        let before: Vec<_> = (0..3).map(|s| (s, 0..lengths[s] - 1)).collect();
        let before: Vec<_> = before
            .into_iter()
            .filter(|(_, part)| !part.is_empty())
            .collect();
        scene.step(on, &before, &mut cache, &mut outputs);
        if together {
            scene.step(on, &[last(0), last(1), last(2)], &mut cache, &mut outputs);
        } else {
            for s in 0..3 {
                scene.step(on, &[last(s)], &mut cache, &mut outputs);
            }
        }
        for (a, b) in whole.iter().zip(&outputs) {
            assert_eq!(bits(a), bits(b));
        }
    }
}

#[test]
fn scores_far_apart_do_not_overflow() {
    let mut rng = Rng::new(13);
    for cpu in backends() {
        let mut scene = Scene::random(&mut rng);
        scene.layout.element = Element::F32;
        scene.attention.scale = 1e6;
        for out in scene.whole((&cpu, attend)) {
            assert!(out.iter().all(|value| value.abs() <= 1.0));
        }
    }
}

/// The kernel for every shape, and what the backend takes: whole prompts, chunks, decode steps and mixtures of them.
#[cfg(feature = "cuda")]
#[test]
fn the_kernels_give_the_same() {
    use crate::cuda::CudaBackend;
    use crate::cuda::testing::{assert_twin, each_element};
    let chosen: Attend<CudaBackend> = |cuda, batch, attention, (qkv, cache), out| {
        cuda.attend(batch, attention, qkv, cache, out);
    };
    each_element(107, |cuda, rng| {
        let others = [rng.pick(&[8, 20, 80, 96]), rng.within(1..257)];
        for head_dim in [64, 128, 256].into_iter().chain(others) {
            let local_kv_heads = rng.within(1..4);
            let group = rng.pick(&[1, 2, 3, 4, 5, 7, 8, 12]);
            let heads = Heads {
                local_heads: group * local_kv_heads,
                local_kv_heads,
                head_dim,
            };
            let mut scene = Scene::with_heads(rng, heads);
            if rng.within(0..3) == 0 {
                scene.layout.element = Element::Fp8;
            }
            for sequence in &mut scene.sequences {
                *sequence = rounded(sequence, cuda.element());
            }
            println!("{:?} {:?}", scene.layout, scene.attention);
            // FlashInfer is not emulated: there the backend takes the other kernel for every shape.
            let both = [chosen, cuda::attend];
            let different = if cfg!(feature = "cuda-emulation") {
                1
            } else {
                2
            };
            let taken = super::flashinfer::takes(cuda.element(), &scene.layout, &scene.attention);
            for (attend, is_chosen) in both[..different].iter().zip([true, false]) {
                let on = (cuda, *attend);
                for outputs in [scene.whole(on), scene.chunked(on, rng)] {
                    for (s, out) in outputs.iter().enumerate() {
                        if taken && is_chosen {
                            let expected = scene.reference(s);
                            let pair = (&out[..], &expected[..]);
                            flashinfer::assert_close_to(cuda, &scene.attention, pair);
                        } else {
                            assert_twin(cuda, out, &scene.reference(s));
                        }
                    }
                }
                scene.place(rng);
            }
        }
    });
}

#[cfg(feature = "cuda")]
#[test]
fn scores_far_apart_do_not_overflow_in_the_kernels() {
    crate::cuda::testing::each_element(108, |device, rng| {
        let mut scene = Scene::random(rng);
        scene.layout.element = device.element();
        scene.attention.scale = 1e6;
        for out in scene.whole((device, cuda::attend)) {
            assert!(out.iter().all(|value| value.abs() <= 1.0));
        }
    });
}
