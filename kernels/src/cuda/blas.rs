//! Matrix products by cuBLASLt, f32 sums whatever the elements are.
//!
//! cuBLASLt thinks in columns: `out = x · weightᵀ` by rows is `outᵀ = weight · xᵀ` by columns, where the stored bytes
//! of a matrix by rows are its transpose by columns. So A is the weight (transposed), B is `x`, and the bias runs
//! along the rows of D, as its epilogue has it.
//!
//! The library names some algorithms for a shape, the one it believes in first. That one computes the process's first
//! step, so that the first token is not late; after it all are tried in the products of the steps that come,
//! and the fastest is kept ([`Trials`]). Numbers of rows share one with those of about their size. No device memory
//! is taken after the start.
//!
//! Invariant: `emulated_blas.rs` is this file's twin and computes the same within rounding.

#![expect(unsafe_code, reason = "the library's interface is C")]

use super::device::{Device, Memory};
use super::trials::Trials;
use super::{CudaTensor, CudaWeight, libraries};
use crate::backend::{DeviceError, Element};
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::c_void;

/// What NVIDIA recommends for Hopper; sums of divided products are kept in it.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Algorithms that are asked for.
const CANDIDATES: usize = 8;

/// `CUBLAS_OP_T`, which the bindings of cuBLASLt leave to those of cuBLAS.
const TRANSPOSED: i32 = 1;

/// cuBLASLt on one device.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: RefCell<Memory>,
    plans: RefCell<HashMap<Shape, Plan>>,
    /// Whether algorithms are tried.
    tries: Cell<bool>,
}

// SAFETY: the handle and descriptors are plain memory of the library, bound to no thread; one thread at a time
// uses them, since `Blas` is not `Sync`.
unsafe impl Send for Blas {}

/// Products that share an algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Shape {
    rows: usize,
    inputs: usize,
    outputs: usize,
    element: Element,
    out: Element,
    biased: bool,
}

/// A product's description and its algorithm.
#[derive(Debug)]
struct Plan {
    problem: Problem,
    choice: Choice,
}

#[derive(Debug)]
struct Problem {
    product: Product,
    weight: Layout,
    x: Layout,
    out: Layout,
}

#[derive(Debug)]
enum Choice {
    Open(Trials<sys::cublasLtMatmulAlgo_t>),
    Made(sys::cublasLtMatmulAlgo_t),
}

/// Where a product's matrices are.
#[derive(Clone, Copy, Debug)]
struct Operands {
    x: *const c_void,
    rows: usize,
    weight: *const c_void,
    bias: Option<*const c_void>,
    out: *mut c_void,
}

impl Blas {
    /// Opens the library.
    pub(crate) fn new(device: &Device) -> Result<Self, DeviceError> {
        libraries::check_cublaslt(device.name())?;
        let workspace = device.allocate("the workspace of matrix products", WORKSPACE_BYTES)?;
        let handle = result::create_handle().map_err(|error| DeviceError::Failed {
            device: device.name().to_owned(),
            reason: format!("cuBLASLt cannot start ({error})"),
        })?;
        Ok(Self {
            handle,
            workspace: RefCell::new(workspace),
            plans: RefCell::default(),
            tries: Cell::new(false),
        })
    }

    /// Whether from now on algorithms are tried. Not while work is recorded: a try is one product's.
    pub(crate) fn set_tries(&self, tries: bool) {
        self.tries.set(tries);
    }

    /// Keeps what was found out so far; the device is done with it. Comes before work is recorded, which is no time to
    /// ask the device.
    pub(crate) fn settle(&self) {
        for plan in self.plans.borrow_mut().values_mut() {
            plan.settle();
        }
    }

    /// Whether no more algorithms will be tried for products of `rows` rows. Depends on how many there were alone.
    pub(crate) fn has_chosen(&self, rows: usize) -> bool {
        let (plans, shared) = (self.plans.borrow(), bucket(rows));
        let mut plans = plans.iter();
        plans.all(|(shape, plan)| {
            let concerned = shape.rows == rows || shape.rows == shared;
            !concerned || plan.has_tried()
        })
    }

    /// Queues `out = x · weightᵀ (+ bias)`. The shapes agree and there is at least one row.
    pub(crate) fn linear(
        &self,
        device: &Device,
        (x, weight): (&CudaTensor, &CudaWeight),
        bias: Option<&CudaWeight>,
        out: &mut CudaTensor,
    ) -> Result<(), String> {
        let exact = Shape {
            rows: x.rows(),
            inputs: weight.cols(),
            outputs: weight.rows(),
            element: weight.element(),
            out: out.element(),
            biased: bias.is_some(),
        };
        let operands = Operands {
            x: x.pointer(),
            rows: x.rows(),
            weight: weight.pointer(),
            bias: bias.map(|bias| bias.pointer_as(out.element())),
            out: out.pointer_mut(),
        };
        let shared = Shape {
            rows: bucket(exact.rows),
            ..exact
        };
        let mut plans = self.plans.borrow_mut();
        let mut run = |shape: Shape| {
            let plan = match plans.entry(shape) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(Plan::choose(self.handle, shape)?),
            };
            plan.run((self, device), operands)
        };
        // An algorithm may refuse numbers of rows near the one it was chosen for; these get their own.
        let done = run(shared).or_else(|_| run(exact));
        done.map_err(|error| format!("cuBLASLt failed ({error}) at {exact:?}"))
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle was created once and is destroyed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

/// The number of rows whose algorithm `rows` rows use: the next of 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, …
fn bucket(rows: usize) -> usize {
    let power = rows.next_power_of_two();
    let between = power / 4 * 3;
    if power >= 16 && rows <= between {
        between
    } else {
        power
    }
}

impl Plan {
    fn choose(handle: sys::cublasLtHandle_t, shape: Shape) -> Result<Self, CublasError> {
        let Shape {
            rows,
            inputs,
            outputs,
            element,
            out,
            biased,
        } = shape;
        let product = Product::new(biased.then_some(out))?;
        let weight = Layout::new(element, inputs, outputs)?;
        let x = Layout::new(element, inputs, rows)?;
        let out = Layout::new(out, outputs, rows)?;
        let preference = Preference::new()?;

        let mut found: [sys::cublasLtMatmulHeuristicResult_t; CANDIDATES] =
            std::array::from_fn(|_| {
                // SAFETY: a structure of numbers, of which all zeros is one.
                unsafe { std::mem::zeroed() }
            });
        let (mut count, most) = (0, i32::try_from(CANDIDATES).unwrap_or(1));
        // SAFETY: all descriptors are alive, and there is room for `most` results.
        let status = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                handle,
                product.0,
                weight.0,
                x.0,
                out.0,
                out.0,
                preference.0,
                most,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        status.result()?;
        let count = usize::try_from(count).unwrap_or(0);
        let usable = found.iter().take(count).filter(|one| {
            one.state == sys::cublasStatus_t::CUBLAS_STATUS_SUCCESS
                && one.workspaceSize <= WORKSPACE_BYTES
        });
        let usable: Vec<_> = usable.map(|one| one.algo).collect();
        if usable.is_empty() {
            return Err(CublasError(
                sys::cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED,
            ));
        }
        let problem = Problem {
            product,
            weight,
            x,
            out,
        };
        let choice = Choice::Open(Trials::new(usable));
        Ok(Self { problem, choice })
    }

    fn has_tried(&self) -> bool {
        match &self.choice {
            Choice::Open(trials) => trials.are_over(),
            Choice::Made(_) => true,
        }
    }

    /// Makes the choice, if all that it depends on is known.
    fn settle(&mut self) {
        if let Choice::Open(trials) = &mut self.choice
            && let Some(&winner) = trials.winner()
        {
            self.choice = Choice::Made(winner);
        }
    }

    fn run(
        &mut self,
        (blas, device): (&Blas, &Device),
        operands: Operands,
    ) -> Result<(), CublasError> {
        let tries = blas.tries.get();
        if tries {
            self.settle();
        }
        let problem = &self.problem;
        problem.point_to(operands)?;
        let run = |algorithm: &_| problem.run((blas, device), algorithm, operands);
        match &mut self.choice {
            Choice::Made(algorithm) => run(algorithm),
            Choice::Open(trials) => trials.run(device, tries, run),
        }
    }
}

impl Problem {
    /// Puts what differs between products of one plan into the descriptions.
    fn point_to(&self, operands: Operands) -> Result<(), CublasError> {
        self.x.set_columns(operands.rows)?;
        self.out.set_columns(operands.rows)?;
        if let Some(bias) = operands.bias {
            use sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            self.product
                .set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, &(bias as u64))?;
        }
        Ok(())
    }

    fn run(
        &self,
        (blas, device): (&Blas, &Device),
        algorithm: &sys::cublasLtMatmulAlgo_t,
        Operands { x, weight, out, .. }: Operands,
    ) -> Result<(), CublasError> {
        let (one, zero) = (1.0_f32, 0.0_f32);
        // SAFETY: the caller checked that the matrices have the plan's shape; they, the bias and the workspace
        // are freed only after the stream has come by.
        unsafe {
            result::matmul(
                blas.handle,
                self.product.0,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                weight,
                self.weight.0,
                x,
                self.x.0,
                out,
                self.out.0,
                out,
                self.out.0,
                std::ptr::from_ref(algorithm),
                blas.workspace.borrow_mut().pointer_mut(),
                WORKSPACE_BYTES,
                device.stream().cast(),
            )
        }
    }
}

fn data_type(element: Element) -> sys::cudaDataType {
    match element {
        Element::F32 => sys::cudaDataType::CUDA_R_32F,
        Element::Bf16 => sys::cudaDataType::CUDA_R_16BF,
        Element::F16 => sys::cudaDataType::CUDA_R_16F,
        Element::Fp8 => unreachable!("neither weights nor activations are floats of 8 bits"),
    }
}

/// What is computed: `D = Aᵀ · B (+ bias)`.
#[derive(Debug)]
struct Product(sys::cublasLtMatmulDesc_t);

impl Product {
    /// With a bias stored as `bias`, or without.
    fn new(bias: Option<Element>) -> Result<Self, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let product = Self(result::create_matmul_desc(sums, data_type(Element::F32))?);
        product.set(Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if let Some(bias) = bias {
            product.set(
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &(sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32),
            )?;
            product.set(
                Attribute::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE,
                &(data_type(bias) as i32),
            )?;
        }
        Ok(product)
    }

    /// Attributes are plain numbers of the size the library expects of each.
    fn set<T: Copy>(
        &self,
        attribute: sys::cublasLtMatmulDescAttributes_t,
        value: &T,
    ) -> Result<(), CublasError> {
        let at = std::ptr::from_ref(value).cast();
        // SAFETY: the descriptor is alive, and `value` is read before this returns.
        unsafe { result::set_matmul_desc_attribute(self.0, attribute, at, size_of::<T>()) }
    }
}

impl Drop for Product {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

/// A matrix by columns without gaps.
#[derive(Debug)]
struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new(element: Element, rows: usize, columns: usize) -> Result<Self, CublasError> {
        let stride = i64::try_from(rows).unwrap_or(i64::MAX);
        let layout =
            result::create_matrix_layout(data_type(element), rows as u64, columns as u64, stride);
        layout.map(Self)
    }

    fn set_columns(&self, columns: usize) -> Result<(), CublasError> {
        use sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_COLS;
        let columns = columns as u64;
        let at = (&raw const columns).cast();
        // SAFETY: the layout is alive, and the number is read before this returns.
        unsafe {
            result::set_matrix_layout_attribute(
                self.0,
                CUBLASLT_MATRIX_LAYOUT_COLS,
                at,
                size_of::<u64>(),
            )
        }
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

/// What an algorithm may use.
struct Preference(sys::cublasLtMatmulPreference_t);

impl Preference {
    fn new() -> Result<Self, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let preference = Self(result::create_matmul_pref()?);
        let bytes: usize = WORKSPACE_BYTES;
        let at = (&raw const bytes).cast();
        // SAFETY: the preference is alive, and the number is read before this returns.
        unsafe {
            result::set_matmul_pref_attribute(
                preference.0,
                CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                at,
                size_of::<usize>(),
            )
        }?;
        Ok(preference)
    }
}

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: created once, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_hold_their_rows_and_are_few() {
        let mut all: Vec<_> = (1..=8192).map(bucket).collect();
        for (rows, bucket) in (1..=8192).zip(&all) {
            assert!(rows <= *bucket && *bucket < 2 * rows, "{rows} in {bucket}");
        }
        all.dedup();
        assert!(all.is_sorted() && all.len() < 30, "{all:?}");
    }
}
