//! One number for each output and group of columns, in the order in which products read them.
//!
//! `[panels][groups][32]`, in 16 bits where that loses nothing, as published scales usually are: beside codes of
//! 4 bits they are a good part of what is read.

use crate::backend::{DeviceError, Element};
use crate::cpu::element::{Stored, by_element};
use crate::cpu::packed::PANEL_ROWS;
use crate::cpu::region::Region;
use crate::cpu::simd::{LANES, Simd};
use half::{bf16, f16};

/// Of a whole matrix.
#[derive(Debug)]
pub(crate) struct Scales {
    memory: Region,
    element: Element,
    groups: usize,
}

/// Of the rows of a panel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PanelScales<'a> {
    /// As they are.
    F32(&'a [[f32; LANES]]),
    /// All of them are such numbers.
    Bf16(&'a [[bf16; LANES]]),
    /// All of them are such numbers.
    F16(&'a [[f16; LANES]]),
}

impl Scales {
    /// `rows`: those of each row, `[groups]`.
    pub(crate) fn pack<'a>(
        rows: impl ExactSizeIterator<Item = &'a [f32]> + Clone,
        groups: usize,
    ) -> Result<Self, DeviceError> {
        let element = if rows.clone().flatten().copied().all(is::<f16>) {
            Element::F16
        } else if rows.clone().flatten().copied().all(is::<bf16>) {
            Element::Bf16
        } else {
            Element::F32
        };
        let panels = rows.len().div_ceil(PANEL_ROWS);
        let mut memory = Region::zeroed(&[panels, groups, PANEL_ROWS, element.bytes()])?;
        by_element!(element, E => {
            let all: &mut [E] = bytemuck::cast_slice_mut(memory.as_bytes_mut());
            for (row, scales) in rows.enumerate() {
                let panel = row / PANEL_ROWS * groups * PANEL_ROWS;
                let places = all[panel + row % PANEL_ROWS..].iter_mut().step_by(PANEL_ROWS);
                for (to, scale) in places.zip(scales) {
                    *to = E::narrow(*scale);
                }
            }
        });
        Ok(Self {
            memory,
            element,
            groups,
        })
    }

    /// Those of one panel.
    #[inline(always)]
    pub(crate) fn panel(&self, panel: usize) -> PanelScales<'_> {
        let bytes = self.groups * PANEL_ROWS * self.element.bytes();
        let bytes = &self.memory.as_bytes()[panel * bytes..][..bytes];
        match self.element {
            Element::F32 => PanelScales::F32(bytemuck::cast_slice(bytes)),
            Element::Bf16 => PanelScales::Bf16(bytemuck::cast_slice(bytes)),
            Element::F16 | Element::Fp8 => PanelScales::F16(bytemuck::cast_slice(bytes)),
        }
    }

    /// That of one row and group.
    pub(crate) fn at(&self, row: usize, group: usize) -> f32 {
        let (panel, lane) = (row / PANEL_ROWS, row % PANEL_ROWS);
        by_element!(self.element, E => {
            let all: &[E] = bytemuck::cast_slice(self.memory.as_bytes());
            all[(panel * self.groups + group) * PANEL_ROWS + lane].widen()
        })
    }
}

impl PanelScales<'_> {
    /// `N` times sixteen rows, from the `first` sixteen on.
    #[inline(always)]
    pub(crate) fn load<S: Simd, const N: usize>(
        &self,
        simd: S,
        group: usize,
        first: usize,
    ) -> [S::Vector; N] {
        let at = group * (PANEL_ROWS / LANES) + first;
        match self {
            Self::F32(all) => std::array::from_fn(|n| simd.load(&all[at + n])),
            Self::Bf16(all) => std::array::from_fn(|n| simd.load_bf16(&all[at + n])),
            Self::F16(all) => std::array::from_fn(|n| simd.load_f16(&all[at + n])),
        }
    }
}

fn is<E: Stored>(value: f32) -> bool {
    E::narrow(value).widen().to_bits() == value.to_bits()
}
