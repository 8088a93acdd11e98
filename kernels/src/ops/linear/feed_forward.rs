//! The choice of what computes a feed-forward layer in fewer operations than there are.
//!
//! Invariant: the bits are those of the operations one after the other.

use crate::backend::FeedForward;
#[cfg(target_arch = "x86_64")]
use crate::cpu::quantized::Part;
#[cfg(target_arch = "x86_64")]
use crate::cpu::weight::Values;
use crate::cpu::{CpuBackend, CpuTensor, CpuWeight};

/// Two products with a gated activation between them, which is part of the first; `false` where that would not be faster, and
/// nothing is done. What it gives goes to `activated`, or straight into the second product.
pub(crate) fn feed_forward(
    cpu: &CpuBackend,
    x: &CpuTensor,
    layer: &FeedForward<'_, CpuWeight>,
    activated: &mut CpuTensor,
    out: &mut CpuTensor,
) -> bool {
    let (gate_up, down) = (layer.gate_up.0, layer.down.0);
    assert_eq!(
        (x.width(), gate_up.rows()),
        (gate_up.cols(), 2 * down.cols()),
        "x is as wide as the first weight's rows, of whose outputs half go into the second"
    );
    assert_eq!(
        (out.rows(), out.width()),
        (x.rows(), down.rows()),
        "out is [rows, out]"
    );
    #[cfg(target_arch = "x86_64")]
    if let Some(unit) = cpu.isa.tiles() {
        if super::tiles::feed_forward((cpu, unit), x, layer, out) {
            return true;
        }
        let Values::Quantized(quantized) = gate_up.values() else {
            return false;
        };
        let epilogue = (layer.gate_up.1, layer.activation);
        let is_done = match quantized.parts() {
            [Part::Codes(codes)] => {
                super::code_tiles::gated((cpu, unit), x, codes, epilogue, activated)
            }
            [Part::Floats(packed)] => {
                super::float8_tiles::gated((cpu, unit), x, packed, epilogue, activated)
            }
            _ => false,
        };
        if is_done {
            super::linear(cpu, activated, down, layer.down.1, out);
        }
        return is_done;
    }
    let _ = (cpu, x, layer, activated, out);
    false
}
