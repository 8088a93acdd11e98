//! Vectors of sixteen f32, and the choice of the instruction set that holds them.
//!
//! An operation is written once, as a [`Kernel`] generic over [`Simd`]; [`Isa::run`] calls the copy
//! of it compiled for the instruction set found at start. What is not here: any operation, and any
//! vector width but sixteen.
//!
//! Invariant: an element's arithmetic is a fixed sequence. All instruction sets hold sixteen lanes
//! and sum them by the same tree, so machines that have a fused multiply-add agree bit for bit; the
//! portable version differs from them only where it must round the product.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod ints;
mod panel;
mod portable;

pub(crate) use dot::dot;
pub(crate) use ints::{CODES, IntKernel, IntSimd};
pub(crate) use panel::{MAX_TILE, by_rows, panel, tiles};

use super::element::F8;
use half::{bf16, f16};
use portable::Portable;

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Elements of a cell, the unit of packed matrices: two columns of sixteen rows.
pub(crate) const CELL: usize = 2 * LANES;

/// Sixteen-lane arithmetic of one instruction set.
///
/// A value is the proof that the CPU has the instructions.
pub(crate) trait Simd: Copy + Send + Sync {
    /// Sixteen f32.
    type Vector: Copy;

    /// Rows, and vectors of sixteen outputs, whose sums [`panel()`] can keep in registers at once.
    const TILE: (usize, usize);

    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::Vector;

    /// Reads f32.
    fn load(self, values: &[f32; LANES]) -> Self::Vector;

    /// Reads and widens bfloat16.
    fn load_bf16(self, values: &[bf16; LANES]) -> Self::Vector;

    /// Reads and widens half.
    fn load_f16(self, values: &[f16; LANES]) -> Self::Vector;

    /// Reads and converts integers, to nearest even; exact below 2^24.
    fn load_i32(self, values: &[i32; LANES]) -> Self::Vector;

    /// Reads a cell of bfloat16, `[16][2]`, and widens the first of each pair, or the second.
    fn column_bf16<const SECOND: bool>(self, cell: &[bf16; CELL]) -> Self::Vector;

    /// Reads floats of 8 bits and widens them, in units.
    fn load_f8<const NAN: bool>(self, values: &[F8<NAN>; LANES]) -> Self::Vector;

    /// Reads a cell of them, `[16][2]`, and widens the first of each pair, or the second, in units.
    fn column_f8<const NAN: bool, const SECOND: bool>(self, cell: &[F8<NAN>; CELL])
    -> Self::Vector;

    /// Asks for the cache line of `at`, to be read some time later.
    fn prefetch<T>(self, at: &T);

    /// Runs `kernel` as a function of its own: what has many variants would be too large for the compiler in one.
    fn call<K: Kernel>(self, kernel: K) -> K::Output;

    /// Lanes in memory order.
    fn to_array(self, vector: Self::Vector) -> [f32; LANES];

    /// `a * b + c`, rounded once where the CPU can.
    fn mul_add(self, a: Self::Vector, b: Self::Vector, c: Self::Vector) -> Self::Vector;

    /// Sum of the lanes by a fixed tree: those eight apart, then four, two, one.
    fn sum(self, vector: Self::Vector) -> f32;
}

/// Work that is compiled once for each instruction set.
///
/// `run` and all it calls up to the arithmetic must be `#[inline(always)]`: only what ends up inside
/// the function that enables the instructions is compiled with them.
pub(crate) trait Kernel {
    /// What comes out.
    type Output;

    /// Does the work.
    fn run<S: Simd>(self, simd: S) -> Self::Output;
}

/// Names of all instruction sets for programs, best first.
const NAMES: [&str; 5] = ["amx", "avx512vnni", "avx512", "avx2", "portable"];

/// The instruction set in use.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Isa {
    /// Tiles for matrices of bfloat16, of floats of 8 bits, and of integer codes; 512-bit vectors for all else.
    #[cfg(target_arch = "x86_64")]
    Amx(amx::Amx),
    /// 512-bit vectors, and instructions for products of bytes.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(ints::Vnni),
    /// 512-bit vectors.
    #[cfg(target_arch = "x86_64")]
    Avx512(avx512::Avx512),
    /// 256-bit vectors with fused multiply-add.
    #[cfg(target_arch = "x86_64")]
    Avx2(avx2::Avx2),
    /// What the target guarantees.
    Portable(Portable),
}

impl Isa {
    /// The best one that this CPU has.
    pub(crate) fn detect() -> Self {
        Self::available()[0]
    }

    /// All that this CPU has, best first.
    pub(crate) fn available() -> Vec<Self> {
        let mut found = Vec::with_capacity(NAMES.len());
        #[cfg(target_arch = "x86_64")]
        {
            found.extend(amx::Amx::detect().map(Self::Amx));
            found.extend(ints::Vnni::detect().map(Self::Avx512Vnni));
            found.extend(avx512::Avx512::detect().map(Self::Avx512));
            found.extend(avx2::Avx2::detect().map(Self::Avx2));
        }
        found.push(Self::Portable(Portable));
        found
    }

    /// The one of this name (`--cpu-isa`), or the best one where it is `auto`.
    ///
    /// # Errors
    /// A sentence that says which there are.
    pub(crate) fn named(name: &str) -> Result<Self, String> {
        let available = Self::available();
        if let Some(isa) = available.iter().find(|isa| isa.key() == name) {
            return Ok(*isa);
        }
        let is_there = |key: &&&str| available.iter().any(|isa| isa.key() == **key);
        let list = |keys: Vec<&&str>| keys.into_iter().copied().collect::<Vec<_>>().join(", ");
        let (there, lacking) = NAMES.iter().partition(is_there);
        match name {
            "auto" => Ok(available[0]),
            _ if NAMES.contains(&name) => Err(format!(
                "--cpu-isa {name} cannot be used: this CPU, or its system, lacks {}; it has {}, of which `auto` takes \
                 the first",
                list(lacking),
                list(there)
            )),
            _ => Err(format!(
                "--cpu-isa {name} is none of auto, {}",
                NAMES.join(", ")
            )),
        }
    }

    /// Its name for programs, one of [`NAMES`].
    fn key(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "avx512vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            Self::Portable(_) => "portable",
        }
    }

    /// Its name for people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(_) => "AMX",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "AVX-512 with VNNI",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "AVX-512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "AVX2",
            Self::Portable(_) => "portable",
        }
    }

    /// Whether products of matrices of bfloat16 and of floats of 8 bits run on tiles, which take `x` in bfloat16, and those of
    /// codes may.
    pub(crate) fn has_tiles(self) -> bool {
        self.key() == "amx"
    }

    /// The tiles, where [`Self::has_tiles`].
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn tiles(self) -> Option<amx::Amx> {
        match self {
            Self::Amx(amx) => Some(amx),
            _ => None,
        }
    }

    /// Runs the copy of `kernel` made for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(simd) => simd.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(simd) => simd.run(kernel),
            Self::Portable(simd) => kernel.run(simd),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_finds_its_set_or_says_what_is_there() {
        let available = Isa::available();
        assert_eq!(Isa::named("auto").unwrap().key(), available[0].key());
        for name in NAMES {
            let is_there = available.iter().any(|isa| isa.key() == name);
            match Isa::named(name) {
                Ok(isa) => assert!(is_there && isa.key() == name, "{name}"),
                Err(why) => {
                    assert!(!is_there, "{why}");
                    assert!(why.contains(&format!("--cpu-isa {name} cannot")), "{why}");
                    assert!(why.contains("portable"), "{why}");
                }
            }
        }
        let why = Isa::named("sse2").unwrap_err();
        assert!(
            why.contains("none of auto, amx, avx512vnni, avx512, avx2, portable"),
            "{why}"
        );
    }
}
