//! The matrix extension of x86 processors (AMX): tiles of up to sixteen rows of 64 bytes, and products of them.
//!
//! A product is what one or two tiles of activations give with the two cells of a packed panel that lie side by side,
//! over as many chunks as there are. A chunk is what one tile holds of a row: 32 bfloat16 or 64 codes of a byte. What is
//! not here: how matrices are cut into blocks (`ops/linear/tiles`, `ops/linear/code_tiles`, `ops/linear/float8_tiles`).
//!
//! Unsafe code here rests on two facts: an [`Amx`] exists only where CPU and system let this process use the
//! instructions, and while a [`Tiles`] lives, its thread's tiles have the shapes that it says.
//! Invariant: what a product adds to a sum depends on the row of activations and the row of the panel alone.
#![expect(
    unsafe_code,
    reason = "instructions need a CPU that has them, and memory of the tiles' sizes; the types are the proof"
)]

mod products;
mod steps;
mod widen;

use super::ints::Vnni;
use super::{CELL, Kernel, LANES};
use crate::cpu::element::F8;
use crate::cpu::matrix::Strip;
use half::bf16;
use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::cell::Cell;
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Most rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;

/// Cells of a panel that a chunk takes, two side by side: [`TILE_ROWS`] of each.
pub(crate) const CHUNK_CELLS: usize = 2 * TILE_ROWS;

/// What tiles hold of activations, of weights and of sums: 64 bytes each.
pub(crate) type Floats = [bf16; CELL];
/// The same of codes of a byte with a sign.
pub(crate) type Signed = [i8; 64];

/// Operands of a product of `n` chunks, one at least.
#[derive(Debug)]
pub(crate) struct Product<'a, A, B, S> {
    /// One or two tiles of activations, `[n][rows]` each.
    pub(crate) rows: &'a [&'a [A]],
    /// `[n][16][2]`: each of 16 lines has 2 columns (of bytes: 4) of sixteen rows of the panel, as packed matrices do.
    pub(crate) cells: &'a [B],
    /// What is added to, or written: `[tiles][2][rows]`.
    pub(crate) sums: &'a mut [S],
    /// Lines that will be read some time later, which are asked for now.
    pub(crate) ahead: &'a [B],
    /// What comes again soon.
    pub(crate) kept: Kept,
}

/// Which operands are read again by the next products and belong in the first-level cache; the other one passes by.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kept {
    Rows,
    Cells,
    Both,
}

/// How the sums of a product of floats begin, and where they go.
#[derive(Debug)]
pub(crate) struct Course<'a> {
    /// At zero, whatever is in memory.
    pub(crate) is_first: bool,
    /// There, a row for each of the tiles', and what is in memory stays as it is.
    pub(crate) out: Option<Strip<'a>>,
}

/// Tiles, or what computes as they do.
pub(crate) trait TileUnit: Copy + Sync {
    /// One thread's.
    type Tiles: Multiply;

    /// Tiles of sums and of activations get `rows` rows, 1 to 16.
    fn tiles(self, rows: usize) -> Self::Tiles;

    /// What floats of 8 bits are in bfloat16, where each of them is exact, cell by cell. What lies some KiB behind the cells is
    /// asked for.
    fn widen(self, cells: &[[F8; CELL]], to: &mut [Floats]);
}

/// Products of tiles.
pub(crate) trait Multiply {
    /// Of bfloat16. To each sum is added, chunk by chunk, the sum of two: of the products of even columns, summed one
    /// by one from zero, and of those of odd ones. Each is rounded to nearest even together with its sum; what is too
    /// small for a normal f32 counts as zero.
    fn floats(&mut self, product: Product<'_, Floats, Floats, [f32; LANES]>, course: Course<'_>);

    /// The same in steps: the sums of one or two tiles of activations begin at zero, or at what was written before:
    /// `[tiles][2][rows]`.
    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>);

    /// One chunk with each tile of activations: `[rows]` each, as many as have begun, and [`CHUNK_CELLS`].
    fn step(&mut self, rows: [&[Floats]; 2], cells: &[Floats]);

    /// Writes the sums: `[tiles][2][rows]`.
    fn end(&mut self, sums: &mut [[f32; LANES]]);

    /// As [`Self::step`], of codes; those of the weight have a sign if `SIGN`. The sums are exact; they begin at zero.
    fn step_codes<const SIGN: bool>(
        &mut self,
        rows: [&[Signed]; 2],
        cells: &[[u8; 64]],
        kept: Kept,
    );

    /// As [`Self::end`], of codes.
    fn end_codes(&mut self, sums: &mut [[i32; LANES]]);
}

/// Proof that this process may use AMX with bfloat16 and bytes, permutations of bytes (AVX512-VBMI), and of all that [`Vnni`]
/// proves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Vnni);

impl Amx {
    /// Asks the CPU, and the system for permission, which then all threads have.
    pub(super) fn detect() -> Option<Self> {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        let vectors = Vnni::detect()?;
        let allowed = *ALLOWED.get_or_init(|| {
            is_x86_feature_detected!("avx512vbmi") && cpu_has_tiles() && system_saves_tiles()
        });
        allowed.then_some(Self(vectors))
    }

    /// Runs `kernel` compiled for 512-bit vectors, and for what [`widen`] needs.
    #[inline]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(
            enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,fma,f16c"
        )]
        fn compiled<K: Kernel>(kernel: K, vectors: Vnni) -> K::Output {
            kernel.run(vectors.vectors())
        }
        // SAFETY: `self` proves that the CPU has these instructions.
        unsafe { compiled(kernel, self.0) }
    }

    /// For integer products of one row, and of widths that tiles have no room for.
    pub(super) fn ints(self) -> Vnni {
        self.0
    }
}

impl TileUnit for Amx {
    type Tiles = Tiles;

    fn tiles(self, rows: usize) -> Tiles {
        Tiles::configure(self, rows)
    }

    #[inline(always)]
    fn widen(self, cells: &[[F8; CELL]], to: &mut [Floats]) {
        widen::widen(self, cells, to);
    }
}

/// AMX-BF16, AMX-TILE and AMX-INT8, and that the system has turned tiles on.
fn cpu_has_tiles() -> bool {
    // Who has AVX-512 has these leaves, and a system that saves registers with `xsave`.
    let tiles = 1 << 22 | 1 << 24 | 1 << 25;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(7, 0).edx & tiles != tiles {
        return false;
    }
    let (config, data) = (1 << 17, 1 << 18);
    // SAFETY: only called where AVX-512 was found, which includes asking the system by this instruction.
    let saved = unsafe { _xgetbv(0) };
    saved & (config | data) == config | data
}

/// Asks Linux to save the tiles' contents, which it does for those who asked only.
#[cfg(target_os = "linux")]
fn system_saves_tiles() -> bool {
    const ARCH_PRCTL: i64 = 158;
    const ARCH_REQ_XCOMP_PERM: i64 = 0x1023;
    const XFEATURE_XTILEDATA: i64 = 18;
    let answer: i64;
    // SAFETY: a system call that takes numbers alone; the registers that it changes are named.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => answer,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    answer == 0
}

#[cfg(not(target_os = "linux"))]
fn system_saves_tiles() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

const _: () = assert!(size_of::<Config>() == 64);

thread_local! {
    static TAKEN: Cell<bool> = const { Cell::new(false) };
}

/// This thread's tiles, until it is dropped.
///
/// 0 to 3 are sums, 4 and 5 activations, 6 and 7 weights. The system saves and restores what is in use when it switches
/// threads, 8 KiB, so they are held for a product and no longer.
#[derive(Debug)]
pub(crate) struct Tiles {
    rows: usize,
    /// Tiles of activations, of which sums have begun.
    begun: usize,
    /// It stays in its thread.
    here: PhantomData<*const ()>,
}

impl Tiles {
    fn configure(_: Amx, rows: usize) -> Self {
        assert!((1..=TILE_ROWS).contains(&rows), "{rows} rows of a tile");
        assert!(!TAKEN.replace(true), "a thread has one set of tiles");
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        config.row_bytes[..8].fill(64);
        // In a byte: at most 16.
        config.rows[..6].fill(u8::try_from(rows).unwrap_or(u8::MAX));
        config.rows[6..8].fill(16);
        // SAFETY: `Amx` proves that the instruction is there, and the configuration is one that it takes. It reads
        // memory, which is why this must not be said to read none.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                config = in(reg) &raw const config,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        Self {
            rows,
            begun: 0,
            here: PhantomData,
        }
    }
}

impl Multiply for Tiles {
    fn floats(&mut self, product: Product<'_, Floats, Floats, [f32; LANES]>, course: Course<'_>) {
        self.multiply_floats(product, course);
    }

    #[inline(always)]
    fn begin(&mut self, tiles: usize, sums: Option<&[[f32; LANES]]>) {
        self.begin_sums(tiles, sums);
    }

    #[inline(always)]
    fn step(&mut self, rows: [&[Floats]; 2], cells: &[Floats]) {
        self.step_floats(rows, cells);
    }

    #[inline(always)]
    fn end(&mut self, sums: &mut [[f32; LANES]]) {
        self.write_sums(sums);
    }

    #[inline(always)]
    fn step_codes<const SIGN: bool>(
        &mut self,
        rows: [&[Signed]; 2],
        cells: &[[u8; 64]],
        kept: Kept,
    ) {
        self.step_bytes::<SIGN>(rows, cells, kept);
    }

    #[inline(always)]
    fn end_codes(&mut self, sums: &mut [[i32; LANES]]) {
        self.write_sums(sums);
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: a `Tiles` is made of an `Amx`, which proves that the instruction is there. Nothing is left in tiles.
        unsafe {
            asm!(
                "tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack),
            );
        }
        TAKEN.set(false);
    }
}

#[cfg(test)]
pub(crate) mod tests;
