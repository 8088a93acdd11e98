//! Floats of 8 bits as lines of bfloat16, for tiles to multiply.
//!
//! Each byte of a line is looked up among 128, for the seven bits that are a number's size: that makes normal numbers of
//! denormal ones, too, which tiles would take for zero. It is less work than tiles have with one row.

use super::{Amx, CELL, Floats};
use crate::cpu::element::F8;
use crate::quantized::e4m3;
use half::bf16;
use std::arch::x86_64::{
    __m512i, _MM_HINT_T1, _mm_prefetch, _mm512_loadu_si512, _mm512_permutex2var_epi8,
    _mm512_set1_epi8, _mm512_storeu_si512, _mm512_ternarylogic_epi64,
};
use std::sync::LazyLock;

/// How far behind what is read memory is asked for, in bytes.
const AHEAD: usize = 16 << 10;

/// What instructions look up: lower bytes of all sizes, higher ones, and which bytes of both are a line, or the next.
struct Tables {
    low: [u8; 128],
    high: [u8; 128],
    lines: [[u8; 64]; 2],
}

static TABLES: LazyLock<Tables> = LazyLock::new(|| {
    let mut sizes = (0..=127).map(|code| bf16::from_f32(e4m3(code)).to_le_bytes());
    let sizes: [[u8; 2]; 128] = std::array::from_fn(|_| sizes.next().unwrap_or_default());
    let mut bytes = (0..64).flat_map(|byte| [byte, 64 + byte]);
    Tables {
        low: sizes.map(|[low, _]| low),
        high: sizes.map(|[_, high]| high),
        lines: [(); 2].map(|()| std::array::from_fn(|_| bytes.next().unwrap_or_default())),
    }
});

/// See [`super::TileUnit::widen`].
#[inline(always)]
pub(super) fn widen(_: Amx, cells: &[[F8; CELL]], to: &mut [Floats]) {
    assert!(
        cells.len() == to.len() && cells.len().is_multiple_of(2),
        "a line for each cell, of which there are two for each pair of columns"
    );
    // SAFETY: `Amx` proves that the instructions are there.
    unsafe { lines(&TABLES, cells.as_chunks().0, to.as_chunks_mut().0) }
}

#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
fn lines(tables: &Tables, cells: &[[[F8; CELL]; 2]], to: &mut [[Floats; 2]]) {
    let [low, high] = [&tables.low, &tables.high];
    let (low, high) = (
        [load(low, 0), load(low, 64)],
        [load(high, 0), load(high, 64)],
    );
    let [first, second] = &tables.lines;
    let (first, second) = (load(first, 0), load(second, 0));
    let sign = _mm512_set1_epi8(i8::MIN);
    for (cells, to) in cells.iter().zip(to) {
        let bytes: &[u8; 64] = bytemuck::cast_ref(cells);
        prefetch(bytes);
        let codes = load(bytes, 0);
        let lower = _mm512_permutex2var_epi8(low[0], codes, low[1]);
        let size = _mm512_permutex2var_epi8(high[0], codes, high[1]);
        // size | codes & sign
        let higher = _mm512_ternarylogic_epi64::<0xf8>(size, codes, sign);
        store(_mm512_permutex2var_epi8(lower, first, higher), &mut to[0]);
        store(_mm512_permutex2var_epi8(lower, second, higher), &mut to[1]);
    }
}

/// 64 bytes from `start` on.
#[inline]
#[target_feature(enable = "avx512f")]
fn load<const N: usize>(bytes: &[u8; N], start: usize) -> __m512i {
    let bytes = &bytes[start..start + 64];
    // SAFETY: so many there are, and the instruction wants no alignment.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(line: __m512i, to: &mut Floats) {
    // SAFETY: they are 64 bytes, and the instruction wants no alignment.
    unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), line) }
}

#[inline(always)]
fn prefetch(line: &[u8; 64]) {
    let ahead = line.as_ptr().wrapping_add(AHEAD);
    // SAFETY: every x86-64 CPU has the instruction, which reads nothing.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(ahead.cast()) }
}
