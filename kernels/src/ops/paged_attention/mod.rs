//! Causal attention over keys and values in blocks, with grouped queries, a sliding window and a soft cap.
//!
//! For the token at position `p`, query head `h` and its key head `g = h / (local_heads / local_kv_heads)`:
//! `out = Σ softmax_j(scale * q·k_j) * v_j` over positions `max(0, p + 1 - window) <= j <= p`.
//! With a soft cap a score `s = scale * q·k_j` becomes `cap * tanh(s / cap)` before the softmax.
//! `qkv: [tokens, (local_heads + 2 * local_kv_heads) * head_dim]`, `out: [tokens, local_heads * head_dim]`.
//! Keys and values of new tokens are read from the cache too, so a prompt cut into chunks gives the
//! bits of the whole prompt.
//!
//! The fast path takes a few tokens of a sequence and all query heads of a key head at a time (`rows.rs`, `round.rs`). Where there
//! are too few of those for all threads, as when one long sequence decodes, threads share the keys of each, too:
//! the parts of the keys and the order in which they are merged are the same either way. Models of bfloat16 are
//! computed on matrix tiles where the CPU has them (`tiles`), rounded as their products are; with other bits, and so
//! for one row as for many.

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "cuda")]
pub(crate) mod flashinfer;
mod round;
mod rows;
#[cfg(test)]
mod tests;
#[cfg(target_arch = "x86_64")]
mod tiles;

use crate::backend::{Attention, Element, KvLayout};
use crate::cpu::element::{Stored, by_kv_element};
use crate::cpu::kv_cache::LayerBlocks;
use crate::cpu::simd::LANES;
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::amx::Amx;
#[cfg(all(test, target_arch = "x86_64"))]
use crate::cpu::simd::amx::tests::Model;
use crate::cpu::{CpuBackend, CpuBatch, CpuKvCache, CpuTensor};
use round::{Sequence, visible};
use rows::{Merge, Rows, Target, head_vectors, most_rows, parts};
use std::ops::Range;

/// Tiles for each thread, so that none waits long for another.
const TILES_PER_THREAD: usize = 4;

/// What computes rows. The same for all rows of a model, since bits differ.
#[derive(Clone, Copy)]
enum Unit {
    Vectors,
    #[cfg(target_arch = "x86_64")]
    Tiles(Amx),
    #[cfg(all(test, target_arch = "x86_64"))]
    Model(Model),
}

impl Unit {
    /// Tiles where the CPU has them, but not for models of more bits than tiles multiply.
    fn of(cpu: &CpuBackend, head_dim: usize) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = cpu.isa.tiles()
            && cpu.element == Element::Bf16
            && tiles::takes(head_dim)
        {
            return Self::Tiles(amx);
        }
        let _ = (cpu, head_dim);
        Self::Vectors
    }

    /// How many rows a thread's memory is enough for.
    fn most_rows(self, head_dim: usize) -> usize {
        match self {
            Self::Vectors => most_rows(head_dim),
            #[cfg(target_arch = "x86_64")]
            _ => tiles::MOST_ROWS,
        }
    }
}

/// The fast path.
pub(crate) fn attend(
    cpu: &CpuBackend,
    batch: &CpuBatch,
    attention: &Attention,
    (qkv, cache): (&CpuTensor, &CpuKvCache),
    out: &mut CpuTensor,
) {
    let unit = Unit::of(cpu, cache.layout().head_dim);
    attend_on((cpu, unit), batch, attention, (qkv, cache), out);
}

fn attend_on(
    (cpu, unit): (&CpuBackend, Unit),
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

    by_kv_element!(layout.element, E => {
        let problem = Problem {
            cpu,
            unit,
            batch,
            attention,
            qkv,
            blocks: cache.layer::<E>(attention.layer),
            group,
        };
        if !problem.attend_in_parts(out) {
            problem.attend_in_tiles(out);
        }
    });
}

/// What is to be computed.
struct Problem<'a, E> {
    cpu: &'a CpuBackend,
    unit: Unit,
    batch: &'a CpuBatch,
    attention: &'a Attention,
    qkv: &'a CpuTensor,
    blocks: LayerBlocks<'a, E>,
    /// Query heads of a key head.
    group: usize,
}

impl<'a, E: Stored> Problem<'a, E> {
    /// Threads share tokens and key heads.
    fn attend_in_tiles(&self, out: &mut CpuTensor) {
        let KvLayout {
            local_kv_heads,
            head_dim,
            ..
        } = self.blocks.layout();
        let (tokens, width) = (out.rows(), out.width());
        let threads = self.cpu.threads.count();
        let most_rows = self.unit.most_rows(head_dim);
        let heads_at_once = self.group.min(most_rows);
        let tiles = (tokens * local_kv_heads).div_ceil(threads * TILES_PER_THREAD);
        let most = most_rows / heads_at_once;
        let rows = tiles.clamp(1, most);
        let columns = self.group * head_dim;
        let cost = rows * self.cost_of_token();
        let tile = ((rows, columns), cost);
        let values = out.values_mut();
        self.cpu
            .threads
            .tiles(values, width, tile, |thread, tokens, mut panel| {
                let kv_head = panel.columns().start / columns;
                let mut start = tokens.start;
                while start < tokens.end {
                    let row = self.batch.token_rows[start] as usize;
                    let end = tokens.end.min(self.batch.host.row_starts[row + 1] as usize);
                    for first in (0..self.group).step_by(heads_at_once) {
                        let heads = first..(first + heads_at_once).min(self.group);
                        let target = Target::Out(&mut panel, first * head_dim);
                        self.run(thread, (row, start..end), (kv_head, heads), target);
                    }
                    start = end;
                }
            });
    }

    /// Threads share the keys, too. Does nothing and answers `false` where that is not needed, or memory too small.
    fn attend_in_parts(&self, out: &mut CpuTensor) -> bool {
        let KvLayout {
            local_kv_heads,
            head_dim,
            ..
        } = self.blocks.layout();
        let items = out.rows() * local_kv_heads;
        let most = (0..out.rows()).map(|token| parts(&self.seen(token)).len());
        let most = most.max().unwrap_or(0);
        let threads = self.cpu.threads.count();
        let part = self.group * (head_vectors(head_dim) + 1) * LANES;
        let needed = items * most * part;
        let mut memory = self.cpu.scratch.shared();
        let not_needed = most < 2 || threads == 1 || items >= threads * TILES_PER_THREAD;
        if not_needed || needed > memory.len() || self.group > self.unit.most_rows(head_dim) {
            return false;
        }
        let cost = self.cost_of_token() / most;
        let memory = &mut memory[..needed];
        let tile = ((1, part), cost);
        self.cpu
            .threads
            .tiles(memory, part, tile, |thread, index, mut panel| {
                let (item, number) = (index.start / most, index.start % most);
                let (token, kv_head) = (item / local_kv_heads, item % local_kv_heads);
                let wanted = parts(&self.seen(token));
                if number < wanted.len() {
                    let row = self.batch.token_rows[token] as usize;
                    let target = Target::Part(panel.row(index.start), wanted.start + number);
                    let heads = (kv_head, 0..self.group);
                    self.run(thread, (row, token..token + 1), heads, target);
                }
            });
        let (width, columns) = (out.width(), self.group * head_dim);
        let tile = ((1, columns), most * part);
        self.cpu
            .threads
            .tiles(out.values_mut(), width, tile, |thread, token, mut panel| {
                let item = token.start * local_kv_heads + panel.columns().start / columns;
                let count = parts(&self.seen(token.start)).len();
                self.cpu.isa.run(Merge {
                    parts: memory[item * most * part..][..count * part].chunks_exact(part),
                    head_dim,
                    unit: self.blocks.unit(),
                    space: &mut self.cpu.scratch.of_thread(thread),
                    out: panel.row(token.start),
                });
            });
        true
    }

    /// Some tokens of a batch's row and some heads of a key head's group.
    fn run(
        &self,
        thread: usize,
        (row, tokens): (usize, Range<usize>),
        (kv_head, heads): (usize, Range<usize>),
        target: Target<'_, '_>,
    ) {
        let first = kv_head * self.group;
        let heads = first + heads.start..first + heads.end;
        let sequence = self.sequence(row, kv_head);
        let rows = |space| Rows {
            sequence,
            tokens,
            heads,
            space,
            target,
        };
        let (isa, scratch) = (self.cpu.isa, &self.cpu.scratch);
        #[cfg(target_arch = "x86_64")]
        let on_tiles = || scratch.tile_space(thread);
        match self.unit {
            Unit::Vectors => isa.run(rows(&mut scratch.of_thread(thread))),
            #[cfg(target_arch = "x86_64")]
            Unit::Tiles(amx) => {
                tiles::attend((isa, amx), rows(on_tiles().as_mut_slice()));
            }
            #[cfg(all(test, target_arch = "x86_64"))]
            Unit::Model(model) => {
                tiles::attend((isa, model), rows(on_tiles().as_mut_slice()));
            }
        }
    }

    fn sequence(&self, row: usize, kv_head: usize) -> Sequence<'a, E> {
        Sequence {
            qkv: self.qkv,
            positions: &self.batch.host.positions,
            table: self.batch.row_blocks(row),
            blocks: self.blocks,
            kv_head,
            scale: self.attention.scale,
            soft_cap: self.attention.logit_soft_cap,
            window: self.attention.sliding_window,
        }
    }

    fn seen(&self, token: usize) -> Range<usize> {
        visible(
            self.batch.host.positions[token],
            self.attention.sliding_window,
        )
    }

    /// Multiply-adds of one token and one key head, on average.
    fn cost_of_token(&self) -> usize {
        let tokens = self.batch.host.num_tokens();
        let keys: usize = (0..tokens).map(|token| self.seen(token).len()).sum();
        2 * keys.div_ceil(tokens.max(1)) * self.group * self.blocks.layout().head_dim
    }
}
