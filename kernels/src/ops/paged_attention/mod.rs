//! Causal attention over keys and values in blocks, with grouped queries, a sliding window and a soft cap.
//!
//! For the token at position `p`, query head `h` and its key head `g = h / (local_heads / local_kv_heads)`:
//! `out = Σ softmax_j(scale * q·k_j) * v_j` over positions `max(0, p + 1 - window) <= j <= p`.
//! With a soft cap a score `s = scale * q·k_j` becomes `cap * tanh(s / cap)` before the softmax.
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`, `out: [tokens, local_heads * head_dim]`.
//! Keys and values of new tokens are read from the cache too, so a prompt cut into chunks gives the
//! bits of the whole prompt.
//!
//! The fast path goes once through the keys, in runs of at most sixteen, with a running maximum
//! (the "online" softmax). Runs end at multiples of sixteen within a block, so their bounds follow from the
//! position, the window and the block size alone.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod flashinfer;
#[cfg(test)]
mod tests;

use crate::backend::{Attention, KvLayout};
use crate::cpu::element::{Stored, by_element};
use crate::cpu::exp::exp;
use crate::cpu::kv_cache::LayerBlocks;
use crate::cpu::simd::{Kernel, LANES, Simd, tile};
use crate::cpu::tanh::soft_capped;
use crate::cpu::{CpuBackend, CpuBatch, CpuKvCache, CpuTensor};
use std::ops::Range;

/// The fast path.
pub(crate) fn attend(
    cpu: &CpuBackend,
    batch: &CpuBatch,
    attention: &Attention,
    (qkv, cache): (&CpuTensor, &CpuKvCache),
    out: &mut CpuTensor,
) {
    let layout = cache.layout();
    let KvLayout {
        local_kv_heads,
        head_dim,
        ..
    } = layout;
    let group = attention.local_heads / local_kv_heads;
    assert_eq!(
        attention.local_heads,
        group * local_kv_heads,
        "heads are in equal groups"
    );
    assert_eq!(
        qkv.width(),
        (attention.local_heads + 2 * local_kv_heads) * head_dim,
        "qkv width"
    );
    assert_eq!(
        out.width(),
        attention.local_heads * head_dim,
        "out is as wide as the queries"
    );
    assert_eq!(
        out.rows(),
        batch.host.num_tokens(),
        "a row of out for each token"
    );
    assert!(
        attention.layer < layout.layers,
        "layer {} of {}",
        attention.layer,
        layout.layers
    );

    let width = group * head_dim;
    let visible = |t: usize| visible(batch.host.positions[t], attention.sliding_window);
    let keys: usize = (0..out.rows()).map(|t| visible(t).len()).sum();
    let cost = 2 * keys.div_ceil(out.rows().max(1)) * width;
    by_element!(layout.element, E => {
        let blocks = cache.layer::<E>(attention.layer);
        cpu.threads.rows(out.values_mut(), width, cost, |i, out| {
            let (token, kv_head) = (i / local_kv_heads, i % local_kv_heads);
            cpu.isa.run(Group {
                queries: &qkv.row(token)[kv_head * width..][..width],
                keys: visible(token),
                table: batch.row_blocks(batch.token_rows[token] as usize),
                blocks,
                kv_head,
                block_size: layout.block_size,
                head_dim,
                scale: attention.scale,
                soft_cap: attention.logit_soft_cap,
                out,
            });
        });
    });
}

/// Positions that the token at `position` sees.
fn visible(position: u32, window: Option<u32>) -> Range<usize> {
    let end = position as usize + 1;
    end - window.map_or(end, |window| end.min(window as usize))..end
}

/// The query heads of one token that share a key head.
struct Group<'a, E> {
    /// `[group, head_dim]`
    queries: &'a [f32],
    keys: Range<usize>,
    table: &'a [u32],
    blocks: LayerBlocks<'a, E>,
    kv_head: usize,
    block_size: usize,
    head_dim: usize,
    scale: f32,
    soft_cap: Option<f32>,
    /// `[group, head_dim]`
    out: &'a mut [f32],
}

impl<E: Stored> Kernel for Group<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let heads = self.queries.len() / self.head_dim;
        let mut head = 0;
        while head < heads {
            head += match heads - head {
                4.. => self.heads::<S, 4>(simd, head),
                2.. => self.heads::<S, 2>(simd, head),
                _ => self.heads::<S, 1>(simd, head),
            };
        }
    }
}

impl<E: Stored> Group<'_, E> {
    /// `M` query heads; says how many.
    #[inline(always)]
    fn heads<S: Simd, const M: usize>(&mut self, simd: S, head: usize) -> usize {
        let part = head * self.head_dim..(head + M) * self.head_dim;
        let mut queries: [&[f32]; M] = [&[]; M];
        for (m, query) in self.queries[part.clone()]
            .chunks_exact(self.head_dim)
            .enumerate()
        {
            queries[m] = query;
        }
        let scaling = (self.scale, self.soft_cap);
        let out = &mut self.out[part];
        out.fill(0.0);
        let mut softmax = [Softmax {
            max: f32::NEG_INFINITY,
            sum: 0.0,
        }; M];

        let mut key = self.keys.start;
        while key < self.keys.end {
            let (block, offset) = (key / self.block_size, key % self.block_size);
            let room = (LANES - offset % LANES).min(self.block_size - offset);
            let count = room.min(self.keys.end - key);
            let (keys, values) = self.blocks.head(self.table[block] as usize, self.kv_head);
            let run = offset * self.head_dim..(offset + count) * self.head_dim;

            let mut weights = scores(simd, queries, &keys[run.clone()], self.head_dim);
            for (m, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
                scale_and_cap(&mut weights[m], count, scaling);
                let factor = softmax[m].step(simd, &mut weights[m], count);
                if factor < 1.0 {
                    for value in out {
                        *value *= factor;
                    }
                }
            }
            add_values(simd, &weights, &values[run], out, self.head_dim);
            key += count;
        }
        for (m, out) in out.chunks_exact_mut(self.head_dim).enumerate() {
            for value in out {
                *value /= softmax[m].sum;
            }
        }
        M
    }
}

/// Turns the products of `count` keys into scores; lanes from there on stay minus infinity.
#[inline(always)]
fn scale_and_cap(scores: &mut [f32; LANES], count: usize, (scale, soft_cap): (f32, Option<f32>)) {
    for score in &mut scores[..count] {
        *score *= scale;
    }
    if let Some(cap) = soft_cap {
        // All lanes, which are whole vectors, and then back what the cap made of infinity.
        for score in scores.iter_mut() {
            *score = soft_capped(*score, cap);
        }
        scores[count..].fill(f32::NEG_INFINITY);
    }
}

/// `q·k` of `M` queries with up to sixteen keys; minus infinity for those that are not there.
#[inline(always)]
fn scores<S: Simd, E: Stored, const M: usize>(
    simd: S,
    queries: [&[f32]; M],
    keys: &[E],
    head_dim: usize,
) -> [[f32; LANES]; M] {
    let mut scores = [[f32::NEG_INFINITY; LANES]; M];
    let key = |j: usize| &keys[j * head_dim..][..head_dim];
    let count = keys.len() / head_dim;
    let mut j = 0;
    while j + 4 <= count {
        let products = tile(simd, queries, [key(j), key(j + 1), key(j + 2), key(j + 3)]);
        for (scores, products) in scores.iter_mut().zip(&products) {
            scores[j..j + 4].copy_from_slice(products);
        }
        j += 4;
    }
    while j < count {
        let products = tile(simd, queries, [key(j)]);
        for (scores, products) in scores.iter_mut().zip(&products) {
            scores[j] = products[0];
        }
        j += 1;
    }
    scores
}

/// State of a softmax whose terms come in runs.
#[derive(Clone, Copy)]
struct Softmax {
    max: f32,
    sum: f32,
}

impl Softmax {
    /// Turns a run's `count` scores into weights relative to the maximum so far; lanes from `count` on become zero.
    /// Answers what to multiply everything before by.
    #[inline(always)]
    fn step<S: Simd>(&mut self, simd: S, scores: &mut [f32; LANES], count: usize) -> f32 {
        let mut max = self.max;
        for score in &scores[..count] {
            max = max.max(*score);
        }
        let factor = if max > self.max {
            exp(self.max - max)
        } else {
            1.0
        };
        for score in scores.iter_mut() {
            *score = exp(*score - max);
        }
        self.max = max;
        self.sum = self.sum * factor + simd.sum(simd.load(scores));
        factor
    }
}

/// `out[m] += Σ_j weights[m][j] * values[j]`, in the order of `j`.
#[inline(always)]
fn add_values<S: Simd, E: Stored, const M: usize>(
    simd: S,
    weights: &[[f32; LANES]; M],
    values: &[E],
    out: &mut [f32],
    head_dim: usize,
) {
    let whole = head_dim / LANES * LANES;
    for d in (0..whole).step_by(LANES) {
        let mut sums = [simd.splat(0.0); M];
        for m in 0..M {
            sums[m] = simd.load(lanes(&out[m * head_dim + d..]));
        }
        for (j, value) in values.chunks_exact(head_dim).enumerate() {
            let value = E::load(simd, lanes(&value[d..]));
            for m in 0..M {
                sums[m] = simd.mul_add(simd.splat(weights[m][j]), value, sums[m]);
            }
        }
        for m in 0..M {
            out[m * head_dim + d..][..LANES].copy_from_slice(&simd.to_array(sums[m]));
        }
    }
    for d in whole..head_dim {
        for m in 0..M {
            let sum = &mut out[m * head_dim + d];
            for (j, value) in values.chunks_exact(head_dim).enumerate() {
                *sum += weights[m][j] * value[d].widen();
            }
        }
    }
}

/// The first sixteen.
#[inline(always)]
fn lanes<T>(values: &[T]) -> &[T; LANES] {
    values
        .first_chunk()
        .expect("the caller keeps to whole vectors")
}
