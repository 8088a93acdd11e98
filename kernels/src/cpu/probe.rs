//! What this machine can do at most, for measurements to be compared with: products that need no memory, and memory
//! that is read for nothing. No clock: whoever calls it has one.

#[cfg(target_arch = "x86_64")]
use super::simd::amx::{
    Amx, CHUNK_CELLS, Course, Floats, Kept, Multiply, Product, TILE_ROWS, TileUnit,
};
use super::simd::{CELL, Kernel, LANES, Simd};
use super::weight::Values;
use super::{CpuBackend, CpuWeight};
use std::hint::black_box;

/// Independent sums: enough to hide what one product takes, and not more than there are registers for.
const SUMS: usize = 12;
const FEW_SUMS: usize = 5;

impl CpuBackend {
    /// Multiplies and adds in registers, `rounds` times on each thread, and says how many multiply-adds that were on all.
    pub fn multiply_in_registers(&self, rounds: usize) -> u64 {
        let count = std::sync::atomic::AtomicU64::new(0);
        self.threads.rows(
            &mut vec![0.0; self.threads.count()],
            1,
            usize::MAX >> 16,
            |_, _| {
                let done = self.isa.run(Registers { rounds });
                count.fetch_add(done, std::sync::atomic::Ordering::Relaxed);
            },
        );
        count.into_inner()
    }

    /// As [`Self::multiply_in_registers`], in bfloat16 on tiles that come from the first-level cache; 0 without tiles.
    pub fn multiply_on_tiles(&self, rounds: usize) -> u64 {
        #[cfg(target_arch = "x86_64")]
        if let Some(amx) = self.isa.tiles() {
            return self.on_tiles(amx, rounds);
        }
        let _ = rounds;
        0
    }

    #[cfg(target_arch = "x86_64")]
    fn on_tiles(&self, amx: Amx, rounds: usize) -> u64 {
        const CHUNKS: usize = 8;
        let mut each = vec![0.0; self.threads.count()];
        self.threads
            .rows(&mut each, 1, usize::MAX >> 16, |thread, _| {
                let mut memory = self.scratch.tile_space(thread);
                let (sums, operands) = memory.as_bytes_mut().split_at_mut(4 * TILE_ROWS * 64);
                let operands: &[Floats] = bytemuck::cast_slice(operands);
                let (cells, operands) = operands.split_at(CHUNKS * CHUNK_CELLS);
                let run = CHUNKS * TILE_ROWS;
                let mut tiles = amx.tiles(TILE_ROWS);
                for _ in 0..rounds {
                    let product = Product {
                        rows: &[&operands[..run], &operands[run..2 * run]],
                        cells,
                        sums: bytemuck::cast_slice_mut(sums),
                        ahead: &[],
                        kept: Kept::Cells,
                    };
                    let course = Course {
                        is_first: false,
                        out: None,
                    };
                    tiles.floats(product, course);
                }
            });
        (rounds * each.len() * 2 * TILE_ROWS * 2 * LANES * CHUNKS * CELL) as u64
    }

    /// Reads a matrix once, on all threads, and says how many bytes that were.
    ///
    /// # Panics
    /// If it is a vector, or quantised.
    pub fn read_weight(&self, weight: &CpuWeight) -> u64 {
        let Values::Matrix(packed) = weight.values() else {
            panic!("it is not a matrix of floats")
        };
        let bytes = packed.as_bytes();
        let lines = bytes.as_chunks::<{ 2 * CELL }>().0;
        self.threads.share(lines.len(), 2 * CELL, |mut share| {
            while let Some(claimed) = share.claim() {
                black_box(self.isa.run(Lines(&lines[claimed])));
            }
        });
        bytes.len() as u64
    }
}

struct Registers {
    rounds: usize,
}

impl Kernel for Registers {
    /// Multiply-adds.
    type Output = u64;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> u64 {
        if const { S::TILE.0 * S::TILE.1 > SUMS } {
            in_registers::<S, SUMS>(simd, self.rounds)
        } else {
            in_registers::<S, FEW_SUMS>(simd, self.rounds)
        }
    }
}

#[inline(always)]
fn in_registers<S: Simd, const N: usize>(simd: S, rounds: usize) -> u64 {
    let (a, b) = (simd.splat(black_box(0.999)), simd.splat(black_box(0.001)));
    let mut sums = [b; N];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = simd.mul_add(*sum, a, b);
        }
    }
    for sum in sums {
        black_box(simd.to_array(sum));
    }
    (rounds * N * LANES) as u64
}

/// How far ahead lines are asked for, which is as far as products do for one row: 32 KiB.
const LINES_AHEAD: usize = 512;

struct Lines<'a>(&'a [[u8; 2 * CELL]]);

impl Kernel for Lines<'_> {
    type Output = [u64; 8];

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> [u64; 8] {
        let mut sums = [0; 8];
        for (i, line) in self.0.iter().enumerate() {
            if let Some(later) = self.0.get(i + LINES_AHEAD) {
                simd.prefetch(later);
            }
            let words: [u64; 8] = bytemuck::cast(*line);
            for (sum, word) in sums.iter_mut().zip(words) {
                *sum ^= word;
            }
        }
        sums
    }
}
