//! How a thread goes through the panels that it claims: those of a group together, block of columns by block of columns.
//!
//! Where pairs of panels make gates and what they gate, both are multiplied into memory of the thread, where they stay in its
//! second-level cache, and only what comes of both goes to the output.
//!
//! Invariant: every block of every claimed panel is visited once, a panel's blocks in order.

use super::round::AddBias;
use crate::backend::Activation;
use crate::cpu::element::{Stored, by_element};
use crate::cpu::matrix::Panel;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::simd::{Kernel, Simd};
use crate::cpu::threads::Panels;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::ops::gated_activation::{gelu_gated, silu_gated};
use std::ops::Range;

/// Rows of activations that have to fit a second-level cache for pairs to pay: with fewer at once, codes would be read and written
/// out more often than what is put out is saved.
pub(super) const LEAST_GATED_ROWS: usize = 256;

/// What a thread is while it multiplies.
pub(super) trait Multiplier {
    /// Panels of the weight, by number, with all rows: `out` has their columns. Nothing waits when it returns. `behind` is the
    /// panel that probably comes next.
    fn multiply(&mut self, panels: Range<usize>, behind: usize, out: &mut Panel<'_>);
}

/// What a thread claims some of.
pub(super) trait Claimed {
    /// The thread's index.
    fn thread(&self) -> usize;

    /// Goes through all that the thread gets. `start` makes it ready with the first claim: one that comes too late to get any has
    /// nothing to do.
    fn run<S: Simd, M: Multiplier>(self, simd: S, start: impl FnOnce() -> M);
}

/// Panels of outputs, of some rows, and what is added there.
pub(super) struct Claims<'a, 'p> {
    pub(super) panels: Panels<'p>,
    pub(super) rows: Range<usize>,
    pub(super) bias: Option<&'a CpuWeight>,
}

impl Claimed for Claims<'_, '_> {
    fn thread(&self) -> usize {
        self.panels.thread()
    }

    #[inline(always)]
    fn run<S: Simd, M: Multiplier>(mut self, simd: S, start: impl FnOnce() -> M) {
        let (mut start, mut multiplier) = (Some(start), None);
        while let Some((panels, mut out)) = self.panels.claim() {
            if let Some(start) = start.take() {
                multiplier = Some(start());
            }
            if let Some(multiplier) = &mut multiplier {
                let behind = panels.end;
                multiplier.multiply(panels, behind, &mut out);
            }
            if let Some(bias) = self.bias {
                let (rows, panel) = (self.rows.clone(), &mut out);
                AddBias { bias, rows, panel }.run(simd);
            }
        }
    }
}

/// Panels of what comes of gates and what they gate, of some rows, whose numbers in the multiplier begin at 0.
pub(super) struct Pairs<'a, 'p> {
    pub(super) panels: Panels<'p>,
    pub(super) rows: Range<usize>,
    /// Of gates, and then of what they gate.
    pub(super) bias: Option<&'a CpuWeight>,
    pub(super) activation: Activation,
    /// How many pairs the weight has: what a panel of gates gates is so many panels behind it.
    pub(super) count: usize,
    /// `[2][rows][32]`
    pub(super) space: &'p mut [f32],
}

impl Claimed for Pairs<'_, '_> {
    fn thread(&self) -> usize {
        self.panels.thread()
    }

    #[inline(always)]
    fn run<S: Simd, M: Multiplier>(mut self, _: S, start: impl FnOnce() -> M) {
        let (mut start, mut multiplier) = (Some(start), None);
        while let Some((pairs, mut out)) = self.panels.claim() {
            if let Some(start) = start.take() {
                multiplier = Some(start());
            }
            for (i, gate) in pairs.enumerate() {
                let up = gate + self.count;
                let (gates, ups) = self.space.split_at_mut(self.rows.len() * PANEL_ROWS);
                if let Some(multiplier) = &mut multiplier {
                    let out = &mut Panel::whole(gates, PANEL_ROWS);
                    multiplier.multiply(gate..gate + 1, up, out);
                    let out = &mut Panel::whole(ups, PANEL_ROWS);
                    multiplier.multiply(up..up + 1, gate + 1, out);
                }
                let both = Both {
                    gates,
                    ups,
                    bias: self
                        .bias
                        .map(|bias| [gate, up].map(|panel| biases(bias, panel))),
                    first: self.rows.start,
                };
                match self.activation {
                    Activation::Silu => both.put(silu_gated, i * PANEL_ROWS, &mut out),
                    Activation::GeluTanh => both.put(gelu_gated, i * PANEL_ROWS, &mut out),
                }
            }
        }
    }
}

/// Divides what comes of gates and what they gate, `out: [rows, n]`, of which `part` are multiplied now, among threads: `multiply`
/// gets what each of them claims some of. One panel of the weight costs `cost`.
pub(super) fn claim_pairs(
    cpu: &CpuBackend,
    (part, cost): (Range<usize>, usize),
    (bias, activation): (Option<&CpuWeight>, Activation),
    out: &mut CpuTensor,
    multiply: impl Fn(Pairs<'_, '_>) + Sync,
) {
    let n = out.width();
    let (values, panel) = (out.values_mut(), (PANEL_ROWS, 2 * cost));
    cpu.threads.panels((values, n), 0..n, panel, |panels| {
        let mut space = cpu.scratch.of_thread(panels.thread());
        let space = space.as_flattened_mut();
        multiply(Pairs {
            panels,
            rows: part.clone(),
            bias,
            activation,
            count: n / PANEL_ROWS,
            space: &mut space[..2 * part.len() * PANEL_ROWS],
        });
    });
}

/// What two panels gave. `[rows][32]`
struct Both<'a> {
    gates: &'a [f32],
    ups: &'a [f32],
    bias: Option<[[f32; PANEL_ROWS]; 2]>,
    /// The first row of the output.
    first: usize,
}

impl Both<'_> {
    /// What comes of both goes to columns from `column` on.
    #[inline(always)]
    fn put(self, gated: impl Fn(f32, f32) -> f32, column: usize, out: &mut Panel<'_>) {
        let (gates, ups) = (self.gates.as_chunks().0, self.ups.as_chunks().0);
        for (row, (gates, ups)) in gates.iter().zip(ups).enumerate() {
            let (mut gates, mut ups): ([f32; PANEL_ROWS], [f32; PANEL_ROWS]) = (*gates, *ups);
            if let Some([of_gates, of_ups]) = &self.bias {
                for i in 0..PANEL_ROWS {
                    gates[i] += of_gates[i];
                    ups[i] += of_ups[i];
                }
            }
            let to = &mut out.row(self.first + row)[column..column + PANEL_ROWS];
            for (i, to) in to.iter_mut().enumerate() {
                *to = gated(gates[i], ups[i]);
            }
        }
    }
}

/// What is added to the outputs of one panel.
pub(super) fn biases(bias: &CpuWeight, panel: usize) -> [f32; PANEL_ROWS] {
    by_element!(bias.element(), E => {
        let bias = &bias.vector::<E>()[panel * PANEL_ROWS..][..PANEL_ROWS];
        std::array::from_fn(|i| bias[i].widen())
    })
}

/// A block of one panel.
#[derive(Clone, Copy)]
pub(super) struct Visit {
    pub(super) block: usize,
    pub(super) panel: usize,
    /// Of the panel in its group.
    pub(super) in_group: usize,
    /// Of the panel in what is claimed.
    pub(super) column: usize,
}

/// The blocks of claimed panels, in order, and with each the block and panel that come next: after the last, the first block of
/// a panel that comes behind them.
///
/// An iterator, since closures are not compiled for the instructions of whom they are handed to.
pub(super) struct Visits {
    claimed: Range<usize>,
    behind: usize,
    blocks: usize,
    /// Panels of a group; the last may have fewer.
    group: usize,
    /// The first of the present group.
    first: usize,
    next: (usize, usize),
}

impl Visits {
    #[inline(always)]
    pub(super) fn of(
        claimed: Range<usize>,
        behind: usize,
        (group, blocks): (usize, usize),
    ) -> Self {
        let first = claimed.start;
        Self {
            claimed,
            behind,
            blocks,
            group,
            first,
            next: (0, first),
        }
    }
}

impl Iterator for Visits {
    type Item = (Visit, (usize, usize));

    #[inline(always)]
    fn next(&mut self) -> Option<Self::Item> {
        if self.first >= self.claimed.end {
            return None;
        }
        let (block, panel) = self.next;
        let visit = Visit {
            block,
            panel,
            in_group: panel - self.first,
            column: (panel - self.claimed.start) * PANEL_ROWS,
        };
        let end = (self.first + self.group).min(self.claimed.end);
        self.next = if panel + 1 < end {
            (block, panel + 1)
        } else if block + 1 < self.blocks {
            (block + 1, self.first)
        } else {
            self.first = end;
            let is_last = end == self.claimed.end;
            (0, if is_last { self.behind } else { end })
        };
        Some((visit, self.next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    #[test]
    fn every_block_is_visited_once_and_announced_before() {
        let mut rng = Rng::new(55);
        for _ in 0..300 {
            let start = rng.within(0..9);
            let claimed = start..start + rng.within(0..20);
            let (group, blocks) = (rng.within(1..8), rng.within(1..5));
            let visits: Vec<_> = Visits::of(claimed.clone(), 77, (group, blocks)).collect();
            for panel in claimed.clone() {
                let of_panel = visits.iter().filter(|(visit, _)| visit.panel == panel);
                let found: Vec<_> = of_panel.map(|(visit, _)| visit.block).collect();
                assert_eq!(found, (0..blocks).collect::<Vec<_>>());
            }
            assert_eq!(visits.len(), claimed.len() * blocks);
            for (visit, _) in &visits {
                let place = visit.panel - claimed.start;
                assert_eq!(visit.column, place * PANEL_ROWS);
                assert_eq!(visit.in_group, place % group);
            }
            let follow = visits
                .iter()
                .skip(1)
                .map(|(visit, _)| (visit.block, visit.panel));
            let follow = follow.chain([(0, 77)]);
            for ((_, next), expected) in visits.iter().zip(follow) {
                assert_eq!(*next, expected);
            }
            // A group's panels meet a block together.
            let groups = visits.chunk_by(|(one, _), (other, _)| one.block == other.block);
            assert!(
                groups
                    .into_iter()
                    .all(|visits| blocks == 1 || visits.len() <= group)
            );
        }
    }
}
