//! Products of quantised activations with a weight of integer codes, on vectors. More than one row goes to matrix tiles where
//! there are any (`code_tiles`), which is faster and nothing else.
//!
//! Invariant: `out[i][j]` is the sum over blocks of columns, from the first to the last, of a block's sum; that is the sum
//! over its segments, from the first to the last, of `(dot * weight_scale) * x_scale`, fused where the CPU can; `dot`,
//! the sum of products of codes less their zeros, is an integer below 2^24, which is exact whatever the order.
//! Nothing else about the shapes, and nothing about threads, changes a bit.

use super::activations::{Divide, Factor, Quantize, Slots};
use super::claims::{Claimed, Claims, Multiplier};
use super::equal_parts;
use super::round::{prefetch, put};
use crate::cpu::matrix::Panel;
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::quantized::{Codes, PanelScales, QUAD, Segment};
use crate::cpu::simd::{CODES, IntKernel, IntSimd, LANES, Simd, by_rows, tiles};
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::quantized::Code;
use std::ops::Range;

/// The outputs of `weight`, which are the columns of `out` from `first` on.
pub(super) fn linear(
    cpu: &CpuBackend,
    x: &CpuTensor,
    (weight, first): (&Codes, usize),
    bias: Option<&CpuWeight>,
    out: &mut CpuTensor,
) {
    let (columns, width) = (weight.columns(), out.width());
    let mut shared = cpu.scratch.shared();
    let room = shared.len();
    let slots = cpu.isa.run_ints(Divide { columns, room });
    let zero = weight.zero().unwrap_or(0);
    // Tiles are not all of the largest size: one more may be needed.
    let at_once = match room / slots.slot {
        1 => slots.most.min(8),
        fit => (fit - 1) * slots.most,
    };
    for rows in equal_parts(x.rows(), at_once, slots.most) {
        let tiles = || tiles(rows.len(), slots.most);
        let memory = &mut shared[..tiles().count() * slots.slot];
        let cost = slots.most * columns.padded();
        cpu.threads.rows(memory, slots.slot, cost, |i, slot| {
            let tile = tiles().nth(i).expect("a slot for each tile");
            let rows = rows.start + tile.start..rows.start + tile.end;
            cpu.isa.run_ints(Quantize {
                x,
                columns,
                zero,
                rows,
                slots,
                slot,
            });
        });
        let cost = rows.len() * columns.padded() * PANEL_ROWS;
        let within = first..first + weight.rows();
        let out = (out.values_mut(), width);
        cpu.threads
            .panels(out, within, (PANEL_ROWS, cost), |panels| {
                let (x, rows) = (&shared[..], rows.clone());
                let claims = Claims {
                    panels: panels.for_rows(rows.len()),
                    rows: rows.clone(),
                    bias,
                };
                cpu.isa.run_ints(Turn {
                    weight,
                    x,
                    slots,
                    rows,
                    claims,
                });
            });
    }
}

/// A thread's part of the product of some rows.
struct Turn<'a, 'p> {
    weight: &'a Codes,
    /// A slot for each tile of rows.
    x: &'a [f32],
    slots: Slots,
    rows: Range<usize>,
    claims: Claims<'a, 'p>,
}

impl IntKernel for Turn<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: IntSimd>(self, simd: S) {
        let (weight, x) = (self.weight, (self.x, self.slots, &self.rows));
        self.claims
            .run(simd.floats(), || Thread { simd, weight, x });
    }
}

/// A thread at work.
struct Thread<'a, S> {
    simd: S,
    weight: &'a Codes,
    x: (&'a [f32], Slots, &'a Range<usize>),
}

impl<S: IntSimd> Multiplier for Thread<'_, S> {
    #[inline(always)]
    fn multiply(&mut self, numbers: Range<usize>, _: usize, out: &mut Panel<'_>) {
        for (i, number) in numbers.enumerate() {
            let out = (&mut *out, i * PANEL_ROWS);
            multiply(self.simd, (self.weight, number), self.x, out);
        }
    }
}

/// All rows with one panel of the weight.
#[inline(always)]
fn multiply<S: IntSimd>(
    simd: S,
    (weight, number): (&Codes, usize),
    (x, slots, rows): (&[f32], Slots, &Range<usize>),
    (out, column): (&mut Panel<'_>, usize),
) {
    let all = weight.cells();
    let start = number * weight.panel_cells();
    let (scales, offsets) = (weight.scales(number), weight.offsets(number));
    let columns = weight.columns();
    for block in columns.blocks() {
        let segments = &columns.segments()[block.clone()];
        let (Some(first), Some(last)) = (segments.first(), segments.last()) else {
            continue;
        };
        let padded = first.padded.start..last.padded.end;
        let cells = [padded.start, padded.end].map(|column| start + weight.cell_of(column));
        // As many cells as these, which are read next.
        let next = [cells[1], 2 * cells[1] - cells[0]].map(|cell| cell.min(all.len()));
        let ahead = &all[next[0]..next[1]];
        for (tile, slot) in tiles(rows.len(), slots.most).zip(x.chunks_exact(slots.slot)) {
            let count = tile.len();
            let (quads, factors) = slot.split_at(slots.quads);
            let factors: &[Factor] = bytemuck::cast_slice(factors);
            let words = count * size_of::<S::Quad>() / size_of::<f32>();
            // Each tile asks for as much as it has work.
            let asked = [tile.start, tile.end].map(|row| row * ahead.len() / rows.len());
            let work = Work {
                segments,
                cells: &all[cells[0]..cells[1]],
                ahead: &ahead[asked[0]..asked[1]],
                scales,
                offsets,
                quads: &quads[padded.start / QUAD * words..padded.end / QUAD * words],
                factors: &factors[block.start * count..block.end * count],
                is_first: block.start == 0,
                row: rows.start + tile.start,
                column,
                out: &mut *out,
            };
            by_rows!(S, count, M => match weight.code() {
                Code::Int4 => simd.call(Tile::<M, true>(work)),
                Code::Int8 | Code::Fp8 => simd.call(Tile::<M, false>(work)),
            });
        }
    }
}

/// A few rows of `out` and 32 of its columns, of one block.
struct Work<'a, 'p> {
    segments: &'a [Segment],
    /// Those of the block.
    cells: &'a [[u8; CODES]],
    ahead: &'a [[u8; CODES]],
    scales: PanelScales<'a>,
    offsets: Option<PanelScales<'a>>,
    /// Those of the block. `[padded columns / 4][rows]` of what the instruction set takes
    quads: &'a [f32],
    /// Those of the block. `[segments][rows]`
    factors: &'a [Factor],
    is_first: bool,
    row: usize,
    /// In the panel.
    column: usize,
    out: &'a mut Panel<'p>,
}

/// Of `M` rows. Codes have 4 bits if `HALF`, or else 8.
struct Tile<'a, 'p, const M: usize, const HALF: bool>(Work<'a, 'p>);

impl<const M: usize, const HALF: bool> IntKernel for Tile<'_, '_, M, HALF> {
    type Output = ();

    #[inline(always)]
    fn run<S: IntSimd>(self, simd: S) {
        let Self(mut work) = self;
        prefetch::<S::Floats, M>(simd.floats(), work.out, (work.row, work.column));
        if const { S::TILE.1 >= 2 } {
            work.sum::<S, M, 2, 0, HALF>(simd);
        } else {
            work.sum::<S, M, 1, 0, HALF>(simd);
            work.ahead = &[];
            work.sum::<S, M, 1, 1, HALF>(simd);
        }
    }
}

/// Steps for which what is read later is asked for at once.
const STEPS: usize = 4;

/// Vectors of outputs of a panel: cells of a step.
const WIDTH: usize = PANEL_ROWS / LANES;

impl Work<'_, '_> {
    /// The `N` vectors of outputs from the `F`th on.
    #[inline(always)]
    fn sum<S: IntSimd, const M: usize, const N: usize, const F: usize, const HALF: bool>(
        &mut self,
        simd: S,
    ) {
        let floats = simd.floats();
        let quads_of_step = const { if HALF { 2 } else { 1 } };
        let (mut quads, mut cells): (&[S::Quad], _) =
            (bytemuck::cast_slice(self.quads), self.cells);
        let some = (cells.len() / (WIDTH * STEPS)).max(1);
        let mut ahead = self.ahead.chunks(self.ahead.len().div_ceil(some).max(1));
        let mut sums = [[floats.splat(0.0); N]; M];
        for (segment, factors) in self.segments.iter().zip(self.factors.chunks_exact(M)) {
            let steps = segment.padded.len() / (QUAD * quads_of_step);
            let (of_segment, rest) = quads.split_at(steps * quads_of_step * M);
            quads = rest;
            let (cells_of_segment, rest) = cells.split_at(steps * WIDTH);
            cells = rest;
            let mut dots = [[simd.splat(0); N]; M];
            for m in 0..M {
                dots[m] = [simd.splat(factors[m].start); N];
            }
            let x = of_segment.chunks(STEPS * quads_of_step * M);
            for (x, cells) in x.zip(cells_of_segment.chunks(STEPS * WIDTH)) {
                for cell in ahead.next().unwrap_or_default() {
                    floats.prefetch(cell);
                }
                let x = x.chunks_exact(quads_of_step * M);
                for (x, cells) in x.zip(cells.chunks_exact(WIDTH)) {
                    if HALF {
                        add_halves::<S, M, N, F>(simd, x, cells, &mut dots);
                    } else {
                        add_bytes::<S, M, N, F>(simd, x, cells, &mut dots);
                    }
                }
            }
            let offsets = self.offsets.map(|all| all.load(floats, segment.group, F));
            let scales = self.scales.load::<_, N>(floats, segment.group, F);
            let dots = to_floats(simd, &dots, factors, offsets);
            for m in 0..M {
                let x_scale = floats.splat(factors[m].scale);
                for n in 0..N {
                    let scaled = floats.mul_add(dots[m][n], scales[n], floats.splat(0.0));
                    sums[m][n] = floats.mul_add(scaled, x_scale, sums[m][n]);
                }
            }
        }
        put(
            floats,
            self.out,
            (self.row, self.column + F * LANES, self.is_first),
            &sums,
        );
    }
}

/// What sums of products stand for but for the scales. Where zeros differ, they come in here.
#[inline(always)]
fn to_floats<S: IntSimd, const M: usize, const N: usize>(
    simd: S,
    dots: &[[S::Sums; N]; M],
    factors: &[Factor],
    offsets: Option<[<S::Floats as Simd>::Vector; N]>,
) -> [[<S::Floats as Simd>::Vector; N]; M] {
    let floats = simd.floats();
    let mut all = [[floats.splat(0.0); N]; M];
    for m in 0..M {
        for n in 0..N {
            all[m][n] = simd.to_floats(dots[m][n]);
        }
    }
    if let Some(offsets) = offsets {
        for m in 0..M {
            let sum = floats.splat(factors[m].sum);
            for n in 0..N {
                // Exact: both are integers, and so small that what comes out is one of f32.
                all[m][n] = floats.mul_add(sum, offsets[n], all[m][n]);
            }
        }
    }
    all
}

/// One step: four columns. `x: [M]`, `cells: [WIDTH]`
#[inline(always)]
fn add_bytes<S: IntSimd, const M: usize, const N: usize, const F: usize>(
    simd: S,
    x: &[S::Quad],
    cells: &[[u8; CODES]],
    dots: &mut [[S::Sums; N]; M],
) {
    let codes = std::array::from_fn(|n| simd.bytes(&cells[F + n]));
    add(simd, x, codes, dots);
}

/// One step: eight columns. `x: [2][M]`, `cells: [WIDTH]`
#[inline(always)]
fn add_halves<S: IntSimd, const M: usize, const N: usize, const F: usize>(
    simd: S,
    x: &[S::Quad],
    cells: &[[u8; CODES]],
    dots: &mut [[S::Sums; N]; M],
) {
    let codes: [_; N] = std::array::from_fn(|n| simd.nibbles(&cells[F + n]));
    add(simd, &x[..M], codes.map(|[low, _]| low), dots);
    add(simd, &x[M..], codes.map(|[_, high]| high), dots);
}

/// The activations one after the other, so that few registers are needed beside those of the sums.
#[inline(always)]
fn add<S: IntSimd, const M: usize, const N: usize>(
    simd: S,
    x: &[S::Quad],
    codes: [S::Codes; N],
    dots: &mut [[S::Sums; N]; M],
) {
    for m in 0..M {
        for n in 0..N {
            dots[m][n] = simd.dot(codes[n], x[m], dots[m][n]);
        }
    }
}
