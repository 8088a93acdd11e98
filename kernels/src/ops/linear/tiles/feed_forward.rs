//! Two products on tiles with a gated activation between them, whose result exists as tiles alone.
//!
//! A panel of gates and that of what they gate give 32 columns of the second product's input, one chunk of its tiles, so
//! each pair of panels is computed to its end, activated and rounded where the second product reads it. In f32 those
//! columns would be written, read, written and read again, all of it far from the caches.
//!
//! Invariant: the bits are those of the three operations one after the other.

use super::{CACHED, CHUNK, MAX_ROWS, Shape, Turn, lay_out, multiply};
use crate::backend::{Activation, Element, FeedForward};
use crate::cpu::element::to_bf16;
use crate::cpu::matrix::Panel;
use crate::cpu::packed::{PANEL_ROWS, Packed};
use crate::cpu::scratch::TILE_INPUTS;
use crate::cpu::simd::amx::{Floats, Multiply, TILE_ROWS, TileUnit};
use crate::cpu::simd::{Kernel, LANES, Simd};
use crate::cpu::weight::Values;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};
use crate::ops::gated_activation::{gelu_gated, silu_gated};
use crate::ops::linear::claims::biases;
use crate::ops::linear::equal_parts;

/// Fewer rows at once would read the weights too often.
pub(in crate::ops::linear) const LEAST_ROWS: usize = 128;

/// A weight, and what is added to its outputs.
type Linear<'a> = (&'a Packed, Option<&'a CpuWeight>);

/// The layer on the tiles of `unit`. Does nothing and answers `false` where it would not pay, there is no room, or weights
/// are not in bfloat16.
pub(in crate::ops) fn feed_forward<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    x: &CpuTensor,
    layer: &FeedForward<'_, CpuWeight>,
    out: &mut CpuTensor,
) -> bool {
    let (Some(gate_up), Some(down)) = (linear(layer.gate_up), linear(layer.down)) else {
        return false;
    };
    let activation = layer.activation;
    let n = gate_up.0.rows() / 2;
    let lines_of_row = [x.width(), n].map(|columns| columns.div_ceil(CHUNK));
    // Padding of blocks is less than as much again.
    let most = (CACHED / lines_of_row[0]).min((TILE_INPUTS - 2 * CACHED) / (2 * lines_of_row[1]));
    let most = (most / TILE_ROWS * TILE_ROWS).min(MAX_ROWS);
    let has_pairs = gate_up.0.rows().is_multiple_of(2 * PANEL_ROWS);
    if x.rows() < LEAST_ROWS || most < LEAST_ROWS || !has_pairs {
        return false;
    }
    let mut memory = cpu.scratch.tile_inputs();
    for part in equal_parts(x.rows(), most, TILE_ROWS) {
        let shapes = [x.width(), n].map(|columns| Shape::of(part.len(), columns));
        let (inputs, rest) = memory.as_mut_slice().split_at_mut(shapes[0].inputs());
        let activated = &mut rest[..shapes[1].inputs()];
        lay_out(cpu, x, (part.start, shapes[0]), inputs);
        activate(
            (cpu, unit),
            (inputs, shapes[0]),
            gate_up,
            activation,
            (activated, shapes[1]),
        );
        multiply((cpu, unit), (activated, shapes[1]), down, (part, out));
    }
    true
}

/// A weight in bfloat16.
fn linear<'a>((weight, bias): (&'a CpuWeight, Option<&'a CpuWeight>)) -> Option<Linear<'a>> {
    match weight.values() {
        Values::Matrix(packed) if weight.element() == Element::Bf16 => Some((packed, bias)),
        _ => None,
    }
}

/// The first product, activated and rounded, as tiles of `shape`.
fn activate<U: TileUnit>(
    (cpu, unit): (&CpuBackend, U),
    (inputs, own): (&[Floats], Shape),
    (weight, bias): Linear<'_>,
    activation: Activation,
    (activated, shape): (&mut [Floats], Shape),
) {
    let pairs = weight.rows() / PANEL_ROWS / 2;
    let cost = 2 * own.rows * weight.columns().padded() * PANEL_ROWS;
    let chunk = ((shape.tiles, shape.tile_rows), cost);
    cpu.threads
        .tiles(activated, shape.run(), chunk, |thread, runs, lines| {
            let place = lines.columns().start / shape.tile_rows;
            let gate = runs.start / shape.tiles * shape.block_chunks + place;
            if gate >= pairs {
                return; // the last block's padding, which the weight has no cells for
            }
            let up = gate + pairs;
            let mut memory = cpu.scratch.tile_space(thread);
            let (gates, rest) = memory.as_mut_slice().split_at_mut(own.sums());
            let ups = &mut rest[..own.sums()];
            let mut turn = Turn {
                tiles: unit.tiles(own.tile_rows),
                shape: own,
                inputs,
                weight,
            };
            turn.panel(gate, up, gates);
            turn.panel(up, gate + 1, ups);
            drop(turn);
            cpu.isa.run(Activate {
                activation,
                gates,
                ups,
                bias: bias.map(|bias| [gate, up].map(|panel| biases(bias, panel))),
                tile_rows: shape.tile_rows,
                lines,
            });
        });
}

impl<T: Multiply> Turn<'_, T> {
    /// The sums of one panel, before `next`.
    fn panel(&mut self, panel: usize, next: usize, sums: &mut [[f32; LANES]]) {
        for block in 0..self.shape.blocks {
            let then = if block + 1 < self.shape.blocks {
                (block + 1, panel)
            } else {
                (0, next)
            };
            self.block((block, panel), then, sums, None);
        }
    }
}

/// Activates the sums of two panels, and rounds them to lines.
struct Activate<'a, 'p> {
    activation: Activation,
    /// `[tiles][2][tile_rows]`
    gates: &'a [[f32; LANES]],
    ups: &'a [[f32; LANES]],
    /// Of gates and what they gate.
    bias: Option<[[f32; PANEL_ROWS]; 2]>,
    tile_rows: usize,
    /// `[tiles][tile_rows]`
    lines: Panel<'p, Floats>,
}

impl Kernel for Activate<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        match self.activation {
            Activation::Silu => self.with(silu_gated),
            Activation::GeluTanh => self.with(gelu_gated),
        }
    }
}

impl Activate<'_, '_> {
    #[inline(always)]
    fn with(mut self, gated: impl Fn(f32, f32) -> f32) {
        let rows = self.tile_rows;
        let sums = self.gates.chunks_exact(2 * rows);
        let sums = sums.zip(self.ups.chunks_exact(2 * rows));
        for (run, (gates, ups)) in self.lines.rows().zip(sums) {
            for (row, line) in self.lines.row(run).iter_mut().enumerate() {
                for (half, to) in line.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
                    let (mut gate, mut up) = (gates[half * rows + row], ups[half * rows + row]);
                    if let Some(bias) = &self.bias {
                        for lane in 0..LANES {
                            gate[lane] += bias[0][half * LANES + lane];
                            up[lane] += bias[1][half * LANES + lane];
                        }
                    }
                    for lane in 0..LANES {
                        to[lane] = to_bf16(gated(gate[lane], up[lane]));
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Backend, Precision};
    use crate::cpu::scratch::Scratch;
    use crate::cpu::simd::Isa;
    use crate::cpu::simd::amx::tests::Model;
    use crate::testing::{Rng, bits, tensor, weight};

    fn check<U: TileUnit>(unit: U, seed: u64) {
        let mut rng = Rng::new(seed);
        // One block; several, with padding in the last; rows with a rest; a width that is no whole chunk.
        for (rows, inputs, n) in [(128, 64, 32), (150, 700, 672), (131, 90, 96), (530, 33, 64)] {
            let threads = rng.pick(&[1, 3]);
            let mut cpu = CpuBackend::new(threads, None).unwrap();
            cpu.scratch = Scratch::of(threads).with_tiles().unwrap();
            cpu.threads.inline_cost = 0;
            let activation = rng.pick(&[Activation::Silu, Activation::GeluTanh]);
            let biased = rng.pick(&[false, true]);
            println!("seed {seed}: {rows} x {inputs} x {n}, {activation:?}, bias: {biased}");
            let (gate_up, _) = weight(&mut rng, &cpu, (2 * n, inputs), Element::Bf16);
            let (gate_up_bias, _) = weight(&mut rng, &cpu, (1, 2 * n), Element::Bf16);
            let (down, _) = weight(&mut rng, &cpu, (70, n), Element::Bf16);
            let (down_bias, _) = weight(&mut rng, &cpu, (1, 70), Element::F32);
            let biases = [&gate_up_bias, &down_bias].map(|bias| biased.then_some(bias));
            let x = tensor(&cpu, &rng.values(rows * inputs), inputs);
            let allocate = |width| cpu.allocate(rows, width, Precision::Compute).unwrap();
            let [mut both, mut activated, mut out, mut expected] = [2 * n, n, 70, 70].map(allocate);

            let layer = FeedForward {
                gate_up: (&gate_up, biases[0]),
                activation,
                down: (&down, biases[1]),
            };
            let on = (&cpu, unit);
            assert!(feed_forward(on, &x, &layer, &mut out));
            let [first, second] = [layer.gate_up, layer.down].map(|one| linear(one).unwrap());
            super::super::linear(on, &x, first.0, first.1, &mut both);
            cpu.gated_activation(activation, &both, &mut activated);
            super::super::linear(on, &activated, second.0, second.1, &mut expected);
            assert_eq!(bits(out.values()), bits(expected.values()));
        }
    }

    #[test]
    fn tiles_in_plain_rust_give_the_bits_of_three_operations() {
        check(Model, 21);
    }

    #[test]
    fn the_instructions_give_the_bits_of_three_operations() {
        match Isa::detect().tiles() {
            Some(amx) => check(amx, 22),
            None => println!("skipped: this CPU has no tiles"),
        }
    }

    #[test]
    fn what_has_no_pairs_of_panels_or_few_rows_is_left_to_others() {
        let mut rng = Rng::new(23);
        for (rows, n) in [(LEAST_ROWS, 48), (LEAST_ROWS - 1, 64)] {
            let mut cpu = CpuBackend::new(1, None).unwrap();
            cpu.scratch = Scratch::of(1).with_tiles().unwrap();
            let (gate_up, _) = weight(&mut rng, &cpu, (2 * n, 64), Element::Bf16);
            let (down, _) = weight(&mut rng, &cpu, (70, n), Element::Bf16);
            let x = tensor(&cpu, &rng.values(rows * 64), 64);
            let mut out = cpu.allocate(rows, 70, Precision::Compute).unwrap();
            let layer = FeedForward {
                gate_up: (&gate_up, None),
                activation: Activation::Silu,
                down: (&down, None),
            };
            assert!(!feed_forward((&cpu, Model), &x, &layer, &mut out));
            assert!(out.values().iter().all(|value| *value == 0.0));
        }
    }
}
