//! What the tests of kernels share: a device for each element, and how close a kernel must come.
//!
//! Under `cuda-emulation` there always is a device. Otherwise the tests run on GPU 0, and say so and
//! pass where there is none. Not compiled into the library.

use super::{CudaBackend, CudaBatch};
use crate::backend::{Backend, DeviceError, Element, Queued};
use crate::testing::{ELEMENTS, Rng, rounded};

/// Calls `test` with a device that computes in each element type, and values to test with.
pub(crate) fn each_element(seed: u64, mut test: impl FnMut(&CudaBackend, &mut Rng)) {
    let mut rng = Rng::new(seed);
    for element in ELEMENTS {
        let mut cuda = match CudaBackend::new(0) {
            Ok(cuda) => cuda,
            Err(error) => return println!("skipped, there is no GPU: {error}"),
        };
        cuda.compute_in(element);
        test(&cuda, &mut rng);
        cuda.synchronize().expect("the kernels end well");
        cuda.check().expect("the kernels are launched");
    }
}

/// `count` random values that the device's element holds exactly.
pub(crate) fn values(cuda: &CudaBackend, rng: &mut Rng, count: usize) -> Vec<f32> {
    rounded(&rng.values(count), cuda.element())
}

/// Absolute and relative difference that one rounding to `element`, and sums in another order before it,
/// may make in values around one.
pub(crate) fn tolerance(element: Element) -> (f32, f32) {
    match element {
        Element::F32 => (2e-5, 2e-5),
        Element::Bf16 => (2e-5, 1.0 / 256.0),
        Element::F16 => (2e-5, 1.0 / 1024.0),
        Element::Fp8 => panic!("nothing is computed in 8-bit floats"),
    }
}

/// Checks what a kernel gave against its twin.
///
/// # Panics
/// If an element differs by more than [`tolerance`] says.
pub(crate) fn assert_twin(cuda: &CudaBackend, actual: &[f32], expected: &[f32]) {
    let (atol, rtol) = tolerance(cuda.element());
    crate::testing::assert_close(actual, expected, atol, rtol);
}

/// Queues a step as one that is alone does: recorded where the device takes it, as it comes otherwise.
pub(crate) fn queue(
    cuda: &CudaBackend,
    rows: usize,
    batch: &CudaBatch,
    mut ops: impl FnMut() -> Result<(), DeviceError>,
) -> Result<(), DeviceError> {
    match cuda.queue(rows, batch, &mut ops)? {
        Queued::Done => Ok(()),
        Queued::Recorded => cuda.replay(rows, batch),
        Queued::Refused => {
            cuda.stop_recording(rows);
            ops()
        }
    }
}

/// Reads a tensor back.
pub(crate) fn read(cuda: &CudaBackend, tensor: &super::CudaTensor) -> Vec<f32> {
    let mut values = Vec::new();
    cuda.read(tensor, &mut values).expect("it can be read");
    values
}
